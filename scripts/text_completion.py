"""Continue a few texts, as a base model does.

    torchrun --nproc_per_node 1 scripts/text_completion.py --ckpt_dir ~/.llama/checkpoints/Llama3.2-1B

Plain `python` does as well. The flags are those of Meta's example script, and those of `Llama.build`.
"""

import sys
from typing import Any

from llama_ref import Llama
from llama_ref.cli.options import BUILDING
from llama_ref.cli.parser import command, run

PROMPTS = [
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "A brief message congratulating the team on the launch:\n\nHi everyone,\n\nI just",
    "Translate English to Korean:\n\nsea => 바다\nmountain => 산\nriver =>",
]


@command(*BUILDING)
def main(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int | None = 64,
    max_batch_size: int = 4,
    seed: int = 1,
    **building: Any,
) -> None:
    """Load a checkpoint and print each prompt with its continuation.

    Args:
        ckpt_dir: a folder, or a release name such as Llama3.2-1B.
    """
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **building)
    results = llama.text_completion(PROMPTS, temperature, top_p, max_gen_len)
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    sys.exit(run(main))
