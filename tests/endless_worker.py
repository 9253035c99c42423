"""A job that generates until something stops it, and announces when it has started.

torchrun --nproc_per_node W endless_worker.py FOLDER TOKENIZER IDS

Each process writes its id to the file IDS/RANK.
"""

import math
import os
import sys
from pathlib import Path

from llama_ref.cli.parsing.parser import command, run
from llama_ref.generation import Llama


@command()
def main(name: str, tokenizer_path: str, ids: str) -> None:
    """Generate until something stops it."""
    Path(ids, os.environ["RANK"]).write_text(str(os.getpid()))
    llama = Llama.build(name, tokenizer_path, max_seq_len=1 << 20, device="cpu", dtype="float32", verify="never")
    never = dict.fromkeys(llama.tokenizer.stop_tokens, -math.inf)
    for n, _ in enumerate(llama.stream([1, 2, 3], logit_bias=never)):
        if n == 0:
            print("going", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
