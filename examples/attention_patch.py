"""Find the attention head that writes an answer, and change the answer by patching that head.

    python examples/attention_patch.py FOLDER

Works for any two prompts of the same number of tokens. A larger model may need several heads: give
`at` a list.
"""

import sys

import torch

from llama_ref import Llama, study

PROMPT, ANSWER = "The capital of France is", " Paris"
OTHER_PROMPT, OTHER_ANSWER = "The capital of Italy is", " Rome"


def main(folder: str) -> None:
    llama = Llama.build(folder, max_seq_len=64, dtype="float32")
    tokens, other_tokens = llama.encode(PROMPT), llama.encode(OTHER_PROMPT)
    answer, other = (llama.encode(text)[1] for text in (ANSWER, OTHER_ANSWER))

    layer, head = study.attribute(llama.model, tokens, answer, other).strongest_head
    name = f"layers.{layer}.attention.head_output"
    from_other_prompt = study.swap_from(study.trace(llama.model, other_tokens, name)).at(heads=[head])
    edits = {"unchanged": {}, "zeroed": {name: study.zero().at(heads=[head])}, "swapped": {name: from_other_prompt}}
    print(f"layer {layer}, head {head}")
    batch = torch.tensor([tokens], device=llama.device)
    for what, edit in edits.items():
        with study.patch(llama.model, edit):
            p = llama.model(batch)[0, -1].softmax(-1)  # (vocabulary,)
        print(f"{what:>10}: {ANSWER} {p[answer]:.1%}, {OTHER_ANSWER} {p[other]:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
