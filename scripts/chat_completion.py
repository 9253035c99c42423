"""Answer a few dialogs, as an instruct model does.

    torchrun --nproc_per_node 1 scripts/chat_completion.py --ckpt_dir ~/.llama/checkpoints/Llama3.2-1B-Instruct

Plain `python` does as well. The flags are those of Meta's example script, and those of `Llama.build`.
"""

import sys
from typing import Any

from llama_ref import Dialog, Llama
from llama_ref.cli.options import BUILDING
from llama_ref.cli.parser import command, run

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


@command(*BUILDING)
def main(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    seed: int = 1,
    **building: Any,
) -> None:
    """Load a checkpoint and print each dialog with its answer.

    Args:
        ckpt_dir: a folder, or a release name such as Llama3.2-1B.
    """
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **building)
    results = llama.chat_completion(DIALOGS, temperature, top_p, max_gen_len)
    for dialog, result in zip(DIALOGS, results, strict=True):
        for message in [*dialog, result["generation"]]:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        print("==================================\n")


if __name__ == "__main__":
    sys.exit(run(main))
