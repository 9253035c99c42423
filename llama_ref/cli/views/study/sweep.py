"""What `llama-ref ablate` prints."""

import json
from collections.abc import Sequence

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import bar, finite, new_table, prompt, say, signed, tokens_json
from llama_ref.study.ablation.sweep import Sweep
from llama_ref.study.attribution import part_label
from llama_ref.tokenizer import Tokenizer

LARGEST = 12  # changes shown


def print_sweep(found: Sweep, tokens: Sequence[int], tokenizer: Tokenizer, edit: str, *, as_json: bool) -> None:
    """Print the parts whose absence changes a text's loss most; as JSON, all."""
    whole = found.whole.mean().item()
    ranked = found.top()
    if as_json:
        parts = [{"name": name, "change": change} for name, change, _ in ranked]
        out = {"tokens": tokens_json(tokens, tokenizer), "over": found.over, "edit": edit, "loss": whole, "parts": parts}
        print(json.dumps(finite(out), indent=2))
        return
    print_rich(prompt(tokens, tokenizer))
    table = new_table("without", "loss", "change")
    table.add_column("", no_wrap=True)
    largest = sorted(ranked, key=lambda part: -abs(part[1]))
    for name, change, _ in largest[:LARGEST]:
        table.add_row(_label(name), f"{whole + change:.2f}", signed(change), bar(change, abs(largest[0][1])))
    print_rich(table)
    helpful = sum(change > 0 for _, change, _ in ranked)
    say(f"Loss of the whole model: {whole:.2f} nats a token. {helpful} of {len(ranked)} parts lower it.", "green")
    if found.over == "units":
        say(f"These {len(ranked)} units were run; a gradient's estimates chose them.")


def _label(name: str) -> str:
    """layers.3.units.5 -> layer 3 unit 5"""
    return part_label(name).replace("units", "unit").replace("groups", "group")
