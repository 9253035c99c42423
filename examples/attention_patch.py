"""Find the attention head that writes an answer, and change the answer by patching that head.

    python examples/attention_patch.py FOLDER

Works for any two prompts of the same number of tokens. A larger model may need several heads.
"""

import sys

import torch

from llama_ref import Llama, study

llama = Llama.build(sys.argv[1], max_seq_len=64, dtype="float32")
france, italy = (llama.encode(f"The capital of {country} is") for country in ("France", "Italy"))
paris, rome = (llama.encode(answer)[1] for answer in (" Paris", " Rome"))  # [0] begins the text

layer, head = study.attribute(llama.model, france, paris, rome).strongest_head
print(f"layer {layer}, head {head}")

name = f"layers.{layer}.attention.head_output"
swap = study.swap_from(study.trace(llama.model, italy, name))
edits = {"unchanged": study.scale(1), "zeroed": study.zero(), "swapped": swap}
for what, edit in edits.items():
    with study.patch(llama.model, {name: edit.at(heads=[head])}):
        logits = llama.model(torch.tensor([france], device=llama.device))  # (1, tokens, vocabulary)
    p = logits[0, -1].softmax(-1)
    print(f"{what:>10}: Paris {p[paris]:.1%}, Rome {p[rome]:.1%}")
