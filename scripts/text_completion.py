"""Continue a few texts, as a base model does.

    torchrun --nproc_per_node 1 scripts/text_completion.py --ckpt_dir ~/.llama/checkpoints/Llama3.2-1B

It also runs with plain `python`. The flags are those of Meta's example script and of `Llama.build`.
"""

import sys
from typing import Annotated

from llama_ref.cli.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # during the imports below, which take seconds

from llama_ref import Llama
from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import command, run
from llama_ref.cli.shared.options import Building, MaxSeqLen, Name, Seed, TokenizerPath, build_arguments

PROMPTS = [
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "A brief message congratulating the team on the launch:\n\nHi everyone,\n\nI just",
    "Translate English to Korean:\n\nsea => 바다\nmountain => 산\nriver =>",
]


@command()
def main(
    ckpt_dir: Name,
    *,
    tokenizer_path: TokenizerPath = None,
    temperature: Annotated[float, Flag("0 always takes the most likely token")] = 0.6,
    top_p: Annotated[float, Flag("sample from the most likely tokens with this total")] = 0.9,
    max_seq_len: MaxSeqLen = 128,
    max_gen_len: Annotated[int | None, Flag("generate at most this many tokens")] = 64,
    max_batch_size: Annotated[int, Flag("number of sequences at a time")] = 4,
    seed: Seed = 1,
    building: Building,
) -> None:
    """Load a checkpoint and print each prompt with its continuation."""
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **build_arguments(building))
    results = llama.text_completion(PROMPTS, temperature, top_p, max_gen_len)
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    sys.exit(run(main))
