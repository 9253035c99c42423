"""What `llama-ref attribute` prints."""

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import bar, new_table, prompt, say, signed, token_json, tokens_json
from llama_ref.study.analyses.attribution import Attribution, part_label
from llama_ref.study.inputs import label
from llama_ref.tokenizer import Tokenizer

STRONGEST = 12  # parts of a logit shown


def print_attribution(found: Attribution, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Print contributions to a token's logit: per layer, then the largest; as JSON, all."""
    if as_json:
        print(json.dumps(_attribution_json(found, tokenizer), indent=2))
        return
    what = f"{label(tokenizer, found.target)}: logit"
    if found.other is not None:
        what = f"{label(tokenizer, found.target)} ahead of {label(tokenizer, found.other)}: by"
    print_rich(prompt(found.tokens[: found.position + 1], tokenizer))
    print_rich(_by_layer(found))
    print_rich(_strongest(found))
    rounding = found.logit - found.total
    say(f"{what} {found.logit:.3f} = {found.total:.3f} (sum of the parts) {rounding:+.1g} (rounding)", "green")
    say("Effects through later layers are not included in a share.")


def _by_layer(found: Attribution) -> Table:
    table = new_table("layer", "attention", "ffn", "so far")
    table.add_column("", no_wrap=True)
    so_far = found.embedding
    table.add_row("embedding", "", "", signed(so_far), Text(""))
    layers = list(zip(found.heads.sum(-1).tolist(), found.ffns.tolist(), strict=True))
    longest = max(abs(heads + ffn) for heads, ffn in layers)
    for layer, (heads, ffn) in enumerate(layers):
        so_far += heads + ffn + found.cross.get(layer, 0)
        table.add_row(str(layer), signed(heads), signed(ffn), signed(so_far), bar(heads + ffn, longest))
    return table


def _strongest(found: Attribution) -> Table:
    parts = sorted(found.parts(), key=lambda part: -abs(part[1]))[:STRONGEST]
    table = new_table("strongest", "share")
    table.add_column("", no_wrap=True)
    for name, share in parts:
        table.add_row(part_label(name), signed(share), bar(share, abs(parts[0][1])))
    return table


def _attribution_json(found: Attribution, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": tokens_json(found.tokens, tokenizer),
        "position": found.position,
        "target": token_json(found.target, tokenizer),
        "other": None if found.other is None else token_json(found.other, tokenizer),
        "logit": found.logit,
        "total": found.total,
        "embedding": found.embedding,
        "layers": [
            {"layer": layer, "heads": heads, "ffn": ffn}
            for layer, (heads, ffn) in enumerate(zip(found.heads.tolist(), found.ffns.tolist(), strict=True))
        ],
    }
