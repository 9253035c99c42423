"""`python -m llama_ref`: the same as `llama-ref`."""

import sys

from llama_ref.cli import main

if __name__ == "__main__":
    sys.exit(main())
