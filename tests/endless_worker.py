"""A job that generates until something stops it: says so once it has begun.

torchrun --nproc_per_node W endless_worker.py FOLDER TOKENIZER
"""

import math
import sys

from llama_ref.cli.parser import command, run
from llama_ref.generation import Llama


@command()
def main(name: str, tokenizer_path: str) -> None:
    """Generate until something stops it."""
    llama = Llama.build(name, tokenizer_path, max_seq_len=1 << 20, device="cpu", dtype="float32", verify="never")
    never = dict.fromkeys(llama.tokenizer.stop_tokens, -math.inf)
    for n, _ in enumerate(llama.stream([1, 2, 3], logit_bias=never)):
        if n == 0:
            print("going", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
