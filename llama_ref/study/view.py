"""What `llama-ref lens`, `attention`, `attribute` and `patch` print: tables that 80 columns hold, or JSON."""

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from llama_ref.study.attention import REPEATED_TOKENS, AttentionSummary
from llama_ref.study.attribution import Attribution
from llama_ref.study.grid import Grid
from llama_ref.study.inputs import label
from llama_ref.study.lens import LogitLens
from llama_ref.terminal import WIDE, print_rich
from llama_ref.tokenizer import Tokenizer

WIDTH = 80  # columns of sentences
LOOKED_AT = 5  # tokens shown for each that looks
STRONGEST = 12  # parts of a logit shown
WIDEST_LABEL = 16  # columns
BAR = 12  # columns of the longest bar
CELL, GAP = 5, 2  # columns of a grid's cell, and between two
MEASURES = ("sink", "previous", "induction", "entropy")


# ---- lens


def print_lens(lens: LogitLens, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """What each layer would say after the last position read; as JSON, what each point says after all of them."""
    if as_json:
        print(json.dumps(_lens_json(lens, tokenizer), indent=2))
        return
    print_rich(_prompt(lens.tokens[: lens.positions[-1] + 1], tokenizer))
    print_rich(_lens_table(lens, tokenizer))
    _say(
        "Read through the final norm and the output matrix after the last token. Entropy and KL in nats; KL: to what the model"
        " says in the end. Other positions, and points within layers: --json."
    )
    if lens.target is not None:
        _say(_when_first(lens, label(tokenizer, lens.target)), "green")


def _lens_table(lens: LogitLens, tokenizer: Tokenizer) -> Table:
    target = [] if lens.target is None else [Text(_cut(label(tokenizer, lens.target))), "rank"]
    table = _table("after", *target, "entropy", "KL")
    table.add_column("likeliest next")
    last = lens.top_ids[-1, -1, 0]
    for p, name in _block_ends(lens.points):
        of_target = [] if lens.target is None else [_percent(lens.target_probability[p, -1]), _rank_cell(lens, p)]
        said = zip(lens.top_ids[p, -1].tolist(), lens.top_probabilities[p, -1].tolist(), strict=True)
        style = "bold" if lens.top_ids[p, -1, 0] == last else ""
        best = _elastic("  ".join(f"{_cut(label(tokenizer, token))} {_percent(share)}" for token, share in said), style)
        table.add_row(name, *of_target, _number(lens.entropy[p, -1]), _number(lens.kl[p, -1]), best)
    return table


def _block_ends(points: Sequence[str]) -> list[tuple[int, str]]:
    """(index, what to call it) of the embedding and of every layer's end."""
    ends = [(p, point) for p, point in enumerate(points) if not point.endswith("residual_mid")]
    return [(p, f"layer {point.split('.')[1]}" if "." in point else point) for p, point in ends]


def _rank(lens: LogitLens, p: int, t: int) -> int | None:
    """None where a point says nothing, its numbers not being finite."""
    return None if lens.target_probability[p, t].isnan() else int(lens.target_rank[p, t])


def _rank_cell(lens: LogitLens, p: int) -> str:
    rank = _rank(lens, p, -1)
    return "–" if rank is None else f"{rank:,}"


def _when_first(lens: LogitLens, target: str) -> str:
    """Where the target comes out on top for good, in a sentence."""
    ranks = [(name, _rank(lens, p, -1)) for p, name in _block_ends(lens.points)]
    if ranks[-1][1] is None:
        return "The model's numbers are not finite: look for NaN in its weights (llama-ref verify --deep)."
    if ranks[-1][1] > 1:
        return f"{target} is number {ranks[-1][1]:,} in the end, with {_percent(lens.target_probability[-1, -1])}."
    stays = next(i for i in range(len(ranks)) if all(rank == 1 for _, rank in ranks[i:]))
    return f"{target} is the likeliest from {ranks[stays][0]} on, in the end with {_percent(lens.target_probability[-1, -1])}."


def _lens_json(lens: LogitLens, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": _tokens_json(lens.tokens, tokenizer),
        "target": _token_json(lens.target, tokenizer),
        "points": [
            {"point": point, "positions": [_reading_json(lens, p, t, tokenizer) for t in range(len(lens.positions))]}
            for p, point in enumerate(lens.points)
        ],
    }


def _reading_json(lens: LogitLens, p: int, t: int, tokenizer: Tokenizer) -> dict[str, Any]:
    has_target = lens.target is not None
    said = zip(lens.top_ids[p, t].tolist(), _plain(lens.top_probabilities[p, t]), strict=True)
    return {
        "position": lens.positions[t],
        "entropy": _plain(lens.entropy[p, t]),
        "kl": _plain(lens.kl[p, t]),
        "target_probability": _plain(lens.target_probability[p, t]) if has_target else None,
        "target_rank": _rank(lens, p, t) if has_target else None,
        "top": [_token_json(token, tokenizer) | {"probability": share} for token, share in said],
    }


# ---- attention


def print_attention(summary: AttentionSummary, tokenizer: Tokenizer, layer: int | None = None, *, as_json: bool) -> None:
    """The heads' habits: a line for each layer, or for each head of one; as JSON, for every head."""
    layers = range(len(summary.sink)) if layer is None else [layer]
    if as_json:
        heads = [{"layer": i, "heads": [_head_json(summary, i, h) for h in range(summary.sink.shape[1])]} for i in layers]
        print(json.dumps({"tokens": _tokens_json(summary.tokens, tokenizer), "layers": heads}, indent=2))
        return
    print_rich(_prompt(summary.tokens, tokenizer))
    print_rich(_layers_table(summary) if layer is None else _heads_table(summary, layer))
    _say(
        "Sink: attention to the first token; previous: to the one before. Entropy in nats. Induction: on"
        f" {REPEATED_TOKENS} random tokens that come twice, attention to what followed the first time."
    )
    if layer is None:
        _say("Of each layer: the mean, and the head that does it most (entropy: least). --layer shows its heads.")


def print_pattern(
    pattern: Tensor, tokens: Sequence[int], tokenizer: Tokenizer, layer: int, head: int, *, as_json: bool
) -> None:
    """Where one head looks from every token: the few it looks at most; as JSON, all."""
    if as_json:
        found = {"tokens": _tokens_json(tokens, tokenizer), "layer": layer, "head": head, "pattern": _plain(pattern)}
        print(json.dumps(found, indent=2))
        return
    labels = [_cut(label(tokenizer, token)) for token in tokens]
    print_rich(Text(f"layer {layer}, head {head}"))
    table = _table("from")
    table.add_column("looks at")
    for t, row in enumerate(pattern):
        most = row[: t + 1].topk(min(LOOKED_AT, t + 1))
        seen = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        at = "  ".join(f"{labels[s]}@{s} {_percent(share)}" for s, share in seen if share >= 0.005)
        table.add_row(Text(f"{labels[t]}@{t}"), _elastic(at))
    print_rich(table)


def _layers_table(summary: AttentionSummary) -> Table:
    table = _table("layer", *MEASURES)
    for layer in range(len(summary.sink)):
        cells = [_with_best(getattr(summary, measure)[layer], least=measure == "entropy") for measure in MEASURES]
        table.add_row(str(layer), *cells)
    return table


def _with_best(heads: Tensor, *, least: bool) -> str:
    """A layer's mean, and which head has most of it, or least."""
    if heads.isnan().all():
        return "–"
    best = int(heads.argmin() if least else heads.argmax())
    return f"{_number(heads.mean())} (h{best} {_number(heads[best])})"


def _heads_table(summary: AttentionSummary, layer: int) -> Table:
    table = _table("head", *MEASURES)
    for head in range(summary.sink.shape[1]):
        table.add_row(str(head), *(_number(getattr(summary, measure)[layer, head]) for measure in MEASURES))
    return table


def _head_json(summary: AttentionSummary, layer: int, head: int) -> dict[str, Any]:
    return {"head": head} | {measure: _plain(getattr(summary, measure)[layer, head]) for measure in MEASURES}


# ---- attribution


def print_attribution(found: Attribution, tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Who wrote a token's logit: layer by layer, then the parts that wrote most; as JSON, every part."""
    if as_json:
        print(json.dumps(_attribution_json(found, tokenizer), indent=2))
        return
    what = label(tokenizer, found.target)
    if found.other is not None:
        what = f"{what} over {label(tokenizer, found.other)}"
    print_rich(_prompt(found.tokens[: found.position + 1], tokenizer))
    print_rich(_by_layer(found))
    print_rich(_strongest(found))
    rounding = found.logit - found.total
    _say(f"{what}: logit {found.logit:.3f} = the parts' {found.total:.3f}, {rounding:+.1g} of rounding.", "green")
    _say("What a part does by way of later layers is not in its share.")


def _by_layer(found: Attribution) -> Table:
    table = _table("layer", "attention", "ffn", "so far")
    table.add_column("", no_wrap=True)
    so_far = found.embedding
    table.add_row("embedding", "", "", _signed(so_far), Text(""))
    layers = list(zip(found.heads.sum(-1).tolist(), found.ffns.tolist(), strict=True))
    longest = max(abs(heads + ffn) for heads, ffn in layers)
    for layer, (heads, ffn) in enumerate(layers):
        so_far += heads + ffn
        table.add_row(str(layer), _signed(heads), _signed(ffn), _signed(so_far), _bar(heads + ffn, longest))
    return table


def _strongest(found: Attribution) -> Table:
    parts = sorted(found.parts(), key=lambda part: -abs(part[1]))[:STRONGEST]
    table = _table("strongest", "share")
    table.add_column("", no_wrap=True)
    for name, share in parts:
        table.add_row(_part_label(name), _signed(share), _bar(share, abs(parts[0][1])))
    return table


def _part_label(name: str) -> str:
    """layers.3.heads.5 -> layer 3 head 5"""
    return " ".join(name.replace("layers", "layer").replace("heads", "head").split("."))


def _attribution_json(found: Attribution, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": _tokens_json(found.tokens, tokenizer),
        "position": found.position,
        "target": _token_json(found.target, tokenizer),
        "other": _token_json(found.other, tokenizer),
        "logit": found.logit,
        "total": found.total,
        "embedding": found.embedding,
        "layers": [
            {"layer": layer, "heads": heads, "ffn": ffn}
            for layer, (heads, ffn) in enumerate(zip(found.heads.tolist(), found.ffns.tolist(), strict=True))
        ],
    }


# ---- patching


def print_grid(
    grid: Grid,
    clean: Sequence[int],
    corrupted: Sequence[int],
    tokenizer: Tokenizer,
    target: int,
    other: int | None,
    *,
    as_json: bool,
) -> None:
    """How much of the target's probability, or of its logit's lead, each cell of the clean run brings back."""
    metric = f"probability of {label(tokenizer, target)}"
    if other is not None:
        metric = f"logit of {label(tokenizer, target)} above {label(tokenizer, other)}"
    if as_json:
        texts = {"clean_tokens": _tokens_json(clean, tokenizer), "corrupted_tokens": _tokens_json(corrupted, tokenizer)}
        tokens = {"target": _token_json(target, tokenizer), "other": _token_json(other, tokenizer)}
        print(json.dumps(texts | tokens | {"metric": metric} | _finite(grid.to_json()), indent=2))
        return
    for name, tokens, value in (("clean", clean, grid.clean), ("corrupted", corrupted, grid.corrupted)):
        print_rich(Text(f"{name}: ") + _prompt(tokens, tokenizer))
        print_rich(Text(f"    {metric}: {value:.4g}"))
    heads = grid.labels[1]
    if grid.axes[1] == "position":
        heads = [_column_label(label(tokenizer, token)) for token in corrupted]
    restored = _restored(grid)
    width = max(1, (_width() - CELL - 1) // (CELL + GAP) - 1)  # cells that a line holds beside the layer
    for start in range(0, len(heads), width):
        print_rich(_grid_table(grid, restored, heads, range(start, min(start + width, len(heads)))))
    _say(f"{grid.name} of each cell taken from the clean run: percent of the difference that comes back.")
    _say(_best_cells(grid, restored, heads), "green")


def _restored(grid: Grid) -> list[list[float]]:
    """0 where a cell leaves the corrupted run as it is, 1 where it makes it the clean one; NaN where these do not differ."""
    gap = grid.clean - grid.corrupted
    return [[(value - grid.corrupted) / gap if gap else math.nan for value in row] for row in grid.values.tolist()]


def _grid_table(grid: Grid, restored: list[list[float]], heads: Sequence[str], columns: range) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(Text(grid.axes[0]), no_wrap=True, justify="right")
    for column in columns:
        head = f"{heads[column]}\n@{column}" if grid.axes[1] == "position" else f"h{heads[column]}"
        table.add_column(Text(head), no_wrap=True, justify="right", width=CELL)
    for layer, row in zip(grid.labels[0], restored, strict=True):
        table.add_row(layer, *(_shaded(row[column]) for column in columns))
    return table


def _shaded(share: float) -> Text:
    """A share in percent, standing out as it is large."""
    if math.isnan(share):
        return Text("–")
    style = "black on green" if share >= 0.5 else "green" if share >= 0.1 else "red" if share <= -0.1 else "dim"
    return Text(f"{round(100 * share)}", style=style)


def _column_label(text: str) -> str:
    text = text.removeprefix("␣")
    shown = Text(text)
    shown.truncate(CELL, overflow="ellipsis")  # by the columns that letters take: Korean ones take two
    return shown.plain


def _best_cells(grid: Grid, restored: list[list[float]], heads: Sequence[str]) -> str:
    cells = [(share, layer, column) for layer, row in enumerate(restored) for column, share in enumerate(row)]
    best = sorted((cell for cell in cells if not math.isnan(cell[0])), reverse=True)[:3]
    if not best:
        if not math.isfinite(grid.clean - grid.corrupted):
            return "There is nothing to compare: numbers are not finite. Look for NaN in the weights (llama-ref verify --deep)."
        return "Both texts have the same value of it: there is no difference to bring back."
    where = "{}@{}" if grid.axes[1] == "position" else "head {}"
    return "Most: " + "; ".join(
        f"layer {grid.labels[0][layer]}, {where.format(heads[column], column)} {100 * share:.0f}%"
        for share, layer, column in best
    )


def _width() -> int:
    """Columns of the terminal, or of a table that goes elsewhere, as `print_rich` has them."""
    console = Console()
    return console.width if console.is_terminal else WIDE


# ---- what they share


def _say(text: str, style: str = "") -> None:
    """A sentence below a table, in lines that are no wider than most terminals."""
    print_rich(Text(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False), style=style))


def _prompt(tokens: Sequence[int], tokenizer: Tokenizer) -> Text:
    """The tokens with their borders."""
    return Text("│".join(label(tokenizer, token) for token in tokens), style="italic")


def _table(first: str, *columns: str | Text) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _elastic(text: str, style: str = "") -> Text:
    """A cell that gives way where a line is short, and is cut: columns that may not wrap would all be cut alike."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST_LABEL else text[: WIDEST_LABEL - 1] + "…"


def _bar(value: float, longest: float) -> Text:
    length = round(BAR * abs(value) / longest) if longest and math.isfinite(value) else 0
    return Text("█" * length, style="green") if value > 0 else Text("░" * length, style="red")


def _percent(share: Tensor | float) -> str:
    """0.62 -> 62%; what is less than a tenth of a percent keeps its size: 3e-06."""
    share = float(share)
    if math.isnan(share):
        return "–"
    if share >= 0.0995 or share == 0:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.0e}"


def _number(value: Tensor | float) -> str:
    return "–" if math.isnan(value) else f"{float(value):.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _tokens_json(tokens: Iterable[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [_token_json(token, tokenizer) for token in tokens]


def _token_json(token: int | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The id, and the text as tables show it: half a character has no text of its own."""
    return None if token is None else {"id": token, "text": label(tokenizer, token)}


def _plain(values: Tensor) -> Any:
    """Numbers for JSON, which has none for NaN and infinity: null."""
    return _finite(values.tolist())


def _finite(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite(value) for value in values]
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values
