"""`llama-ref lens`, `attention`, …: the study's commands. Like commands.py's, each imports what it needs when it runs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ref.cli.options import LOADING, load
from llama_ref.cli.parser import Option, command
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.generation import Llama

STUDIED_WITH = ("max_seq_len", "tokenizer_path", "quantize", "verify", "device", "dtype")
STUDYING = (
    *(option for option in LOADING if option.name in STUDIED_WITH),
    Option("compile", False, "refused: only the plain model shows what it computes."),
    Option("pipeline_parallel_size", 1, "refused: a model is studied in one process."),
)


@command(*STUDYING)
def lens(
    name: str,
    prompt: str,
    *,
    target: str | None = None,
    top: int = 5,
    out: str | None = None,
    png: str | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """What would each layer say next? The logit lens: the output matrix put onto the residual stream at every point.

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        prompt: the text to continue.
        target: a token to follow through the layers, with its space in front where it has one: " Paris".
        top: likeliest tokens to show.
        out: write an HTML page with everything: tokens, layers, attention, attribution.
        png: draw the same as pictures into this folder (needs matplotlib).
        json: print it as JSON, of all points and after every token.
    """
    from llama_ref.cli.views.study.lens import print_lens
    from llama_ref.study.inputs import prompt_tokens
    from llama_ref.study.logit_lens import logit_lens

    _check_outputs(out, png)
    llama = _open_to_study(name, options, prompt=prompt, target=target)
    wanted = None if target is None else _first_token(llama, "target", target)
    tokens = prompt_tokens(llama, prompt)
    if out is not None or png is not None:
        _write_overview(llama, name, tokens, wanted, top, out, png)
    positions = None if json else [-1]
    found = logit_lens(llama.model, tokens, target=wanted, top=top, positions=positions)
    print_lens(found, llama.tokenizer, as_json=json)


@command(*STUDYING)
def attention(
    name: str,
    prompt: str,
    *,
    layer: int | None = None,
    head: int | None = None,
    png: str | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Where do heads look? At the first token, the one before, what came after last time; one head, token by token.

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        prompt: the text to read.
        layer: only this layer's heads, counted from 0.
        head: where this head of the layer looks from each token.
        png: a folder for a picture, attention.png or pattern.png (needs matplotlib).
        json: print it as JSON.
    """
    from llama_ref.cli.views.study.attention import print_attention, print_pattern
    from llama_ref.study import figures
    from llama_ref.study.attention import attention_pattern, summarize_attention
    from llama_ref.study.inputs import check_index, prompt_tokens

    if head is not None and layer is None:
        raise RequestError(f"--head is {head!r}, but of which layer? Give --layer too")
    _check_outputs(png=png)
    llama = _open_to_study(name, options, prompt=prompt)
    tokens, tokenizer, args = prompt_tokens(llama, prompt), llama.tokenizer, llama.model.args
    layer = None if layer is None else check_index("--layer", layer, args.n_layers)
    if head is None:
        summary = summarize_attention(llama.model, tokens, bos=tokenizer.bos_id, ids=_words(llama))
        if png is not None:
            figures.draw_attention(summary, tokenizer, Path(png) / "attention.png", layer)
        print_attention(summary, tokenizer, layer, as_json=json)
        return
    head = check_index("--head", head, args.n_heads)
    pattern = attention_pattern(llama.model, tokens, layer, head)
    if png is not None:
        figures.draw_pattern(pattern, tokens, tokenizer, layer, head, Path(png) / "pattern.png")
    print_pattern(pattern, tokens, tokenizer, layer, head, as_json=json)


@command(*STUDYING)
def attribute(
    name: str,
    prompt: str,
    *,
    target: str,
    other: str | None = None,
    png: str | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Which heads and layers made a token likely? Direct logit attribution after the prompt's last token.

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        prompt: the text to continue.
        target: the token, with its space in front where it has one: " Paris".
        other: a token to compare it with: shares of how far the target is ahead.
        png: a folder for a picture, attribution.png (needs matplotlib).
        json: print it as JSON.
    """
    from llama_ref.cli.views.study.attribution import print_attribution
    from llama_ref.study import attribution, figures
    from llama_ref.study.inputs import prompt_tokens

    _check_outputs(png=png)
    llama = _open_to_study(name, options, prompt=prompt, target=target, other=other)
    wanted = _first_token(llama, "target", target)
    against = None if other is None else _first_token(llama, "other", other)
    found = attribution.attribute(llama.model, prompt_tokens(llama, prompt), wanted, against)
    if png is not None:
        figures.draw_attribution(found, llama.tokenizer, Path(png) / "attribution.png")
    print_attribution(found, llama.tokenizer, as_json=json)


@command(*STUDYING)
def patch(
    name: str,
    clean: str,
    corrupted: str,
    *,
    target: str,
    other: str | None = None,
    over: str = "layer,position",
    png: str | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Where does a model keep what tells two texts apart? Runs one with activations of the other, cell by cell.

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        clean: the text that leads to the target: "The capital of France is".
        corrupted: one of as many tokens that does not: "The capital of Italy is".
        target: the token whose probability is measured, with its space in front where it has one: " Paris".
        other: a token that the target's logit is compared with: then their difference is measured.
        over: layer,position (the residual stream before a layer) or layer,head (what a head gives, at all positions).
        png: a folder for a picture, patch.png (needs matplotlib).
        json: print it as JSON.
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.grid import print_grid
    from llama_ref.study import figures, patching_grid
    from llama_ref.study.inputs import check_over, check_same_length, prompt_tokens

    axes = check_over(over)
    _check_outputs(png=png)
    llama = _open_to_study(name, options, clean=clean, corrupted=corrupted, target=target, other=other)
    wanted = _first_token(llama, "target", target)
    against = None if other is None else _first_token(llama, "other", other)
    texts = [prompt_tokens(llama, text, which) for which, text in (("clean", clean), ("corrupted", corrupted))]
    check_same_length(llama.tokenizer, *texts)
    metric = patching_grid.probability(wanted) if against is None else patching_grid.logit_difference(wanted, against)
    with progress_bar("patching") as progress:
        found = patching_grid.patch_grid(llama.model, *texts, metric, over=axes, progress=progress)
    if png is not None:
        figures.draw_grid(found, *texts, llama.tokenizer, wanted, against, Path(png) / "patch.png")
    print_grid(found, *texts, llama.tokenizer, wanted, against, as_json=json)


@command(*STUDYING)
def norms(name: str, prompt: str, *, png: str | None = None, json: bool = False, **options: Any) -> None:
    """How long does the residual stream grow, and how does it turn, from layer to layer?

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        prompt: the text to read.
        png: a folder for a picture, norms.png (needs matplotlib).
        json: print it as JSON, of every point and token.
    """
    from llama_ref.cli.views.study.residual import print_norms
    from llama_ref.study import figures
    from llama_ref.study.inputs import prompt_tokens
    from llama_ref.study.residual import residual_stream

    _check_outputs(png=png)
    llama = _open_to_study(name, options, prompt=prompt)
    found = residual_stream(llama.model, prompt_tokens(llama, prompt))
    if png is not None:
        figures.draw_norms(found, llama.tokenizer, Path(png) / "norms.png")
    print_norms(found, llama.tokenizer, as_json=json)


@command()
def rope(name: str, *, json: bool = False) -> None:
    """How fast does each pair of a head's dimensions turn, before and after Llama 3.1's scaling? Loads no weights.

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        json: print it as JSON.
    """
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.views.study.rope import print_rope
    from llama_ref.study.rope import rope_waves

    print_rope(rope_waves(open_folder(name).read_args()), as_json=json)


@command(*STUDYING)
def spectra(name: str, *, matrices: str = "layers.0.*", to: str | None = None, json: bool = False, **options: Any) -> None:
    """How many directions does each matrix use? Or, with --to, what would rounding it to few bits change?

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        matrices: which, by name: "layers.*.attention.wq.weight", "*" for all.
        to: int8, int4 or int4:group=32: show what this costs each matrix, instead of its singular values.
        json: print it as JSON; of spectra, all singular values.
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.weights import print_errors, print_spectra
    from llama_ref.quantization.scheme import Scheme
    from llama_ref.study import weights

    scheme = None if to is None else Scheme.parse(to, "--to")
    llama = _open_to_study(name, options)
    with progress_bar("measuring") as progress:
        if scheme is None:
            measured, show = weights.spectra(llama.model, matrices, progress), print_spectra
        else:
            measured = weights.quantization_errors(llama.model, scheme, matrices, progress)
            show = partial(print_errors, scheme=str(scheme))
        found = list(measured)
    show(found, as_json=json)


# ---- what they share


def _check_outputs(out: str | None = None, png: str | None = None) -> None:
    """Raise RequestError where nothing could be written: before a long load."""
    from llama_ref.study.figures import check_pictures
    from llama_ref.study.report.writer import check_report

    if out is not None:
        check_report(out)
    if png is not None:
        check_pictures(png)


def _write_overview(
    llama: "Llama", name: str, tokens: list[int], target: int | None, top: int, out: str | None, png: str | None
) -> None:
    from llama_ref.checkpoint.folder import find_folder
    from llama_ref.cli.terminal import note, progress_bar
    from llama_ref.study.figures import draw_overview
    from llama_ref.study.overview import overview
    from llama_ref.study.report.writer import write_report

    with progress_bar("studying") as progress:
        bos, ids = llama.tokenizer.bos_id, _words(llama)
        found = overview(llama.model, tokens, target=target, top=top, bos=bos, ids=ids, progress=progress)
    if out is not None:
        write_report(found, llama.tokenizer, out, model_name=find_folder(name).resolve().name)
        note(f"wrote {out}: open it in a browser")
    if png is not None:
        draw_overview(found, llama.tokenizer, png)
        note(f"wrote pictures into {png}")


def _words(llama: "Llama") -> list[int]:
    """Ids of what is text, of which random tokens are drawn."""
    return sorted(llama.tokenizer.vocabulary.ranks.values())


def _open_to_study(name: str, options: dict[str, Any], **texts: str | None) -> "Llama":
    """Load a model alone and as it is. Raises RequestError for an empty text, or another way of running it."""
    from llama_ref.study.inputs import refuse_divided, refuse_empty

    refuse_empty(**texts)
    refuse_divided(options["pipeline_parallel_size"])
    if options["compile"]:
        raise RequestError("--compile is of no use here: only the plain model shows what it computes; leave it out")
    return load(name, options)


def _first_token(llama: "Llama", name: str, text: str) -> int:
    from llama_ref.cli.terminal import note
    from llama_ref.study.inputs import first_token

    token, remark = first_token(llama.tokenizer, text, f"--{name}")
    if remark:
        note(remark)
    return token


STUDY_COMMANDS = {
    "lens": lens,
    "attention": attention,
    "attribute": attribute,
    "patch": patch,
    "norms": norms,
    "rope": rope,
    "spectra": spectra,
}
