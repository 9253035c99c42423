"""Picture of saliency: each token's share of a prediction."""

from pathlib import Path
from typing import TYPE_CHECKING

from llama_ref.study.analyses.saliency import Saliency
from llama_ref.study.figures import canvas
from llama_ref.study.figures.fonts import prompt, quoted, token_label
from llama_ref.study.figures.saving import save
from llama_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 0.2  # inches per token
HOW = {
    "integrated": "Integrated gradients, from a baseline to the text",
    "gradient×input": "Gradient times embedding",
    "gradient": "Length of the gradient with respect to each embedding",
}


def draw_saliency(found: Saliency, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw each token's share of a prediction, in the text's order."""
    save(path, saliency_figure, found, tokenizer)


def saliency_figure(found: Saliency, tokenizer: Tokenizer) -> "Figure":
    """A bar for each token that has a share: blue above 0, orange below."""
    names = [f"{token_label(tokenizer, found.tokens[position])}@{position}" for position in found.positions]
    shares = found.shares[found.positions].tolist()
    row = canvas.row_height(ROW, len(names))
    figure = canvas.new_figure(7, max(1.5, row * len(names)) + 0.7, *_words(found, tokenizer))
    axes = figure.subplots()
    colors = [canvas.BLUE if share > 0 else canvas.ORANGE for share in shares]
    bars = axes.barh(range(len(shares)), shares, 0.8, color=colors)
    if row >= canvas.PITCH:
        axes.bar_label(bars, fmt="{:+.2f}", fontsize=canvas.SMALL, padding=2)
    axes.margins(x=0.15)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=canvas.SMALL)
    canvas.name_ticks(axes, "y", names, row)
    canvas.name_axis(axes, "x", "length of the gradient" if found.method == "gradient" else "share")
    return figure


def _words(found: Saliency, tokenizer: Tokenizer) -> tuple[str, str]:
    """Title and caption."""
    answer = " ".join(quoted(tokenizer, token) for token in found.answer)
    what = f"the {'logit' if found.of == 'logit' else 'log-probability'} of {answer}"
    if found.other is not None:
        what += f" above {quoted(tokenizer, found.other)}"
    ends = f"It is {found.value:.2f}."
    if found.baseline_value is not None:
        ends = f"From {found.baseline_value:.2f} to {found.value:.2f}; the shares add up to {found.total:.2f}."
    return f"Which tokens made {what}", f"{HOW[found.method]}. {ends}\n{prompt(tokenizer, found.tokens)}"
