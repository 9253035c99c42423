"""What `llama-ref saliency` prints."""

import json
import math
from typing import Any

from rich.table import Table
from rich.text import Text

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import bar, cut, finite, new_table, plain, say, signed, token_json, tokens_json
from llama_ref.study.analyses.saliency import Saliency
from llama_ref.study.inputs import label
from llama_ref.tokenizer import Tokenizer

MOST_SHOWN = 40  # rows of the table: the strongest tokens, in the text's order
STRONG, WEAK = 0.5, 0.1  # fractions of the largest share from which a token is coloured


def print_saliency(found: Saliency, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Print the tokens, coloured by their shares, then a table and what the shares add up to."""
    if as_json:
        print(json.dumps(_saliency_json(found, tokenizer), indent=2))
        return
    print_rich(_coloured(found, tokenizer))
    print_rich(_table(found, tokenizer))
    say(_sum(found, tokenizer), "green")
    if found.missing is not None and abs(found.missing) > 0.05 * abs(found.value - (found.baseline_value or 0)):
        say("That is more than 5% of the change: use more --steps.", "red")


def _coloured(found: Saliency, tokenizer: Tokenizer) -> Text:
    """Format the tokens, separated by │: green for shares above 0, red for shares below 0."""
    largest, shown = _largest(found), Text()
    for position, (token, share) in enumerate(zip(found.tokens, found.shares.tolist(), strict=True)):
        strength = share / largest if largest else 0.0
        colour = "green" if strength > 0 else "red"
        style = f"black on {colour}" if abs(strength) >= STRONG else colour if abs(strength) >= WEAK else "dim"
        shown.append("│" if position else "").append(label(tokenizer, token), style=style)
    return shown


def _table(found: Saliency, tokenizer: Tokenizer) -> Table:
    shares = found.shares.tolist()
    strongest = sorted(found.positions, key=lambda position: -abs(shares[position]))[:MOST_SHOWN]
    table = new_table("token", "share")
    table.add_column("", no_wrap=True)
    for position in sorted(strongest):
        name = Text(f"{cut(label(tokenizer, found.tokens[position]))}@{position}")
        table.add_row(name, signed(shares[position]), bar(shares[position], _largest(found)))
    return table


def _sum(found: Saliency, tokenizer: Tokenizer) -> str:
    answer = "".join(label(tokenizer, token) for token in found.answer)
    what = f"{'logit' if found.of == 'logit' else 'log-probability'} of {answer}"
    if found.other is not None:
        what += f" above {label(tokenizer, found.other)}"
    if len(found.answer) > 1:
        what += f" (mean of {len(found.answer)} tokens)"
    if found.method == "gradient":
        return f"{what}: {found.value:.3f}. Shares: the length of its gradient by each embedding."
    if found.missing is None:
        return f"{what}: {found.value:.3f}; the shares add up to {found.total:.3f}."
    return (
        f"{what}: {found.value:.3f}, {found.baseline_value:.3f} at the baseline. Shares add up to {found.total:.3f} of the"
        f" {found.value - (found.baseline_value or 0):.3f} between; the steps leave out {found.missing:+.2g}."
    )


def _largest(found: Saliency) -> float:
    return max((abs(share) for share in found.shares.tolist() if math.isfinite(share)), default=0.0)


def _saliency_json(found: Saliency, tokenizer: Tokenizer) -> dict[str, Any]:
    numbers = {name: getattr(found, name) for name in ("value", "baseline_value", "total", "missing")}
    return {
        "tokens": tokens_json(found.tokens, tokenizer),
        "answer": tokens_json(found.answer, tokenizer),
        "other": None if found.other is None else token_json(found.other, tokenizer),
        "method": found.method,
        "of": found.of,
        "positions": found.positions,
        "shares": plain(found.shares),
    } | finite(numbers)
