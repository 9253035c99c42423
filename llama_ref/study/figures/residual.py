"""Picture of the residual stream: its length and direction through the layers."""

from pathlib import Path
from typing import TYPE_CHECKING

from llama_ref.study.analyses.residual import ResidualStream, quartiles_of_others
from llama_ref.study.figures import canvas
from llama_ref.study.figures.fonts import prompt, quoted
from llama_ref.study.figures.saving import save
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"norm": "length (Euclidean)", "drift": "cosine with the point before", "to_last": "cosine with the last point"}


def draw_norms(stream: ResidualStream, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw length and direction of the residual stream: the first token, the others' median."""
    save(path, norms_figure, stream, tokenizer)


def norms_figure(stream: ResidualStream, tokenizer: Tokenizer) -> "Figure":
    """Three panels over the depth; the first token, a sink, has its own curve."""
    T = len(stream.tokens)
    first = quoted(tokenizer, stream.tokens[0])
    caption = (
        f"After each layer.{canvas.hollow(stream.points)} Band: the middle half of the others."
        f"\n{prompt(tokenizer, stream.tokens)}"
    )
    figure = canvas.new_figure(7.5, 6.5, "How the residual stream grows and turns", caption)
    panels = figure.subplots(3, sharex=True)
    panels[0].set_yscale("log")
    for axes, (measure, name) in zip(panels, MEASURES.items(), strict=True):
        values = getattr(stream, measure)  # (P, T)
        canvas.name_depths(axes, stream.points, figure.get_figwidth())
        lines = [canvas.draw_depth(axes, stream.points, values[:, 0].numpy(), canvas.ORANGE)]
        if T > 1:
            low, middle, high = quartiles_of_others(values).numpy()
            lines.append(canvas.draw_depth(axes, stream.points, middle, canvas.BLUE))
            axes.fill_between(canvas.depths(stream.points), low, high, color=canvas.BLUE, alpha=0.2, linewidth=0)
        canvas.name_axis(axes, "y", name)
    canvas.name_axis(panels[2], "x", "after layer (E: embedding)")
    canvas.name_lines(panels[0], lines, [f"the first token, {first}", f"the other {T - 1:,}: median"][: len(lines)])
    return figure
