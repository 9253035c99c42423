"""Answer a few dialogs, as an instruct model does.

    torchrun --nproc_per_node 1 scripts/chat_completion.py --ckpt_dir ~/.llama/checkpoints/Llama3.2-1B-Instruct

It also runs with plain `python`. The flags are those of Meta's example script and of `Llama.build`.
"""

import sys
from typing import Annotated

from llama_ref.cli.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # during the imports below, which take seconds

from llama_ref import Dialog, Llama
from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import command, run
from llama_ref.cli.shared.options import Building, MaxSeqLen, Name, Seed, TokenizerPath, build_arguments

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What is the recipe of mayonnaise?"}],
    [
        {"role": "user", "content": "I am going to Seoul, what should I see?"},
        {"role": "assistant", "content": "1. Gyeongbokgung, the palace of the Joseon kings.\n2. Namsan and its tower."},
        {"role": "user", "content": "What is so great about #1?"},
    ],
    [
        {"role": "system", "content": "Always answer with a haiku."},
        {"role": "user", "content": "I am going to Seoul, what should I see?"},
    ],
    [
        {"role": "system", "content": "항상 한국어로 대답하세요."},
        {"role": "user", "content": "How do I go from Seoul to Busan?"},
    ],
]


@command()
def main(
    ckpt_dir: Name,
    *,
    tokenizer_path: TokenizerPath = None,
    temperature: Annotated[float, Flag("0 always takes the most likely token")] = 0.6,
    top_p: Annotated[float, Flag("sample from the most likely tokens with this total")] = 0.9,
    max_seq_len: MaxSeqLen = 512,
    max_gen_len: Annotated[int | None, Flag("generate at most this many tokens", unset="as many as fit")] = None,
    max_batch_size: Annotated[int, Flag("number of sequences at a time")] = 4,
    seed: Seed = 1,
    building: Building,
) -> None:
    """Load a checkpoint and print each dialog with its answer."""
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **build_arguments(building))
    results = llama.chat_completion(DIALOGS, temperature, top_p, max_gen_len)
    for dialog, result in zip(DIALOGS, results, strict=True):
        for message in [*dialog, result["generation"]]:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        print("==================================\n")


if __name__ == "__main__":
    sys.exit(run(main))
