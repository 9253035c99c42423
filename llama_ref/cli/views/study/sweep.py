"""What `llama-ref ablate` prints."""

import json
from collections.abc import Sequence

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import bar, finite, new_table, prompt, say, signed, tokens_json
from llama_ref.study.ablation.sweep import Sweep
from llama_ref.study.analyses.attribution import part_label
from llama_ref.tokenizer import Tokenizer

LARGEST = 12  # changes shown


def print_sweep(found: Sweep, texts: Sequence[list[int]], tokenizer: Tokenizer, edit: str, *, as_json: bool) -> None:
    """Print the parts whose ablation changes the loss most; as JSON, all parts."""
    whole = found.whole.mean().item()
    ranked = found.top()
    if as_json:
        tokens = tokens_json(texts[0], tokenizer) if len(texts) == 1 else None
        parts = [{"name": name, "change": change, "standard_error": error} for name, change, error in ranked]
        out = {"texts": len(texts), "tokens": tokens, "over": found.over, "edit": edit, "loss": whole, "parts": parts}
        print(json.dumps(finite(out), indent=2))
        return
    if len(texts) == 1:
        print_rich(prompt(texts[0], tokenizer))
    else:
        say(f"{len(texts):,} texts of {sum(map(len, texts)):,} tokens; ± is the standard error of the mean.")
    table = new_table("without", "loss", "change", *(["±"] if len(texts) > 1 else []))
    table.add_column("", no_wrap=True)
    largest = sorted(ranked, key=lambda part: -abs(part[1]))
    for name, change, error in largest[:LARGEST]:
        errors = [f"{error:.2f}"] if len(texts) > 1 else []
        table.add_row(_label(name), f"{whole + change:.2f}", signed(change), *errors, bar(change, abs(largest[0][1])))
    print_rich(table)
    helpful = sum(change > 0 for _, change, _ in ranked)
    say(f"Loss of the whole model: {whole:.2f} nats a token. {helpful} of {len(ranked)} parts lower it.", "green")
    if found.over == "units":
        say(f"These {len(ranked)} units were run; they have the largest gradient estimates.")


def _label(name: str) -> str:
    """Name a part: layers.3.units.5 -> layer 3 unit 5."""
    return part_label(name).replace("units", "unit").replace("groups", "group")
