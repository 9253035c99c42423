"""Ablation sweeps: how much is lost without each part of a model, or without several at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.model import Context, Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.ablation.losses import losses_of, mean_and_error, names_of, texts_to_predict
from llama_ref.study.ablation.parts import Over, Part, check_disjoint, check_kind, draw_parts, named_part, parts_of
from llama_ref.study.inputs import check_count, seeded
from llama_ref.study.passes.gradients import gradients
from llama_ref.study.passes.hooks import Pass, check_model, check_part
from llama_ref.study.passes.layer_window import layer_window
from llama_ref.study.passes.pass_size import tokens_that_fit
from llama_ref.study.patch import Edit, as_edit, mean, patch
from llama_ref.study.patching.streams import Streams
from llama_ref.study.texts import Batch, Texts
from llama_ref.study.trace import trace


@dataclass(frozen=True)
class Sweep:
    """The loss of each text without each part: `losses`, float32 (parts, texts), nats, on the CPU.

    `whole` (texts,) are the losses of the whole model. For units, `estimated` (n_layers, F) has the mean
    changes that a gradient predicts, and `controls` the exact losses for units drawn at random.
    """

    over: Over
    parts: list[str]
    losses: Tensor
    whole: Tensor
    estimated: Tensor | None = None
    controls: "Sweep | None" = None

    @property
    def changes(self) -> Tensor:
        """By how much the loss of each text rises: (parts, texts)."""
        return self.losses - self.whole

    @property
    def mean(self) -> Tensor:
        """Mean of `changes` over the texts: (parts,)."""
        return mean_and_error(self.changes)[0]

    @property
    def standard_error(self) -> Tensor:
        """Standard error of `mean`: (parts,); NaN for one text."""
        return mean_and_error(self.changes)[1]

    def top(self, n: int | None = None) -> list[tuple[str, float, float]]:
        """The n parts (default: all) without which the loss rises most: name, mean, standard error; largest first."""
        order = self.mean.nan_to_num(torch.inf).argsort(descending=True, stable=True)[:n]
        means, errors = self.mean.tolist(), self.standard_error.tolist()
        return [(self.parts[i], means[i], errors[i]) for i in order.tolist()]


@dataclass(frozen=True)
class Joint:
    """The loss of each text without several parts at once: `losses` (texts,), `whole` (texts,), nats, on the CPU.

    `controls` (sets, texts) are the losses without random other parts, as many of each kind.
    """

    parts: list[str]
    losses: Tensor
    whole: Tensor
    controls: Tensor

    @property
    def mean(self) -> float:
        """By how much the mean loss rises."""
        return (self.losses - self.whole).mean().item()

    @property
    def control_means(self) -> list[float]:
        """The same for each set of controls."""
        return [(own - self.whole).mean().item() for own in self.controls]


@torch.no_grad()
def sweep(
    model: Transformer,
    texts: Texts,
    over: Over = "heads",
    edit: Edit | Callable[[Tensor], Tensor] | None = None,
    *,
    n_exact: int = 32,
    controls: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sweep:
    """Measure the loss of texts without each part: heads, kv_groups, attention, feed_forward, layers or units.

    `edit` replaces a part's output: `mean()`, the default, and `resample()` use the values at all tokens of
    all texts; `zero()`, or any other edit that `patch` takes. A kv_group is ablated at the outputs of its
    heads, a layer at those of attention and feed-forward. There are too many units to run each: a gradient
    estimates all of them, and only the `n_exact` with the largest estimates are run, with `controls` others
    drawn by `seed`. Runs start at the part's layer, and runs for several parts share a pass. Memory: one
    layer's outputs of all texts; for units, ffn.hidden of all layers. `progress` is called with the runs of
    texts done and their number. Raises RequestError.
    """
    check_part(model)
    ids, wanted = texts_to_predict(model, texts), mean() if edit is None else as_edit(edit)
    n_exact, controls = check_count("n_exact", n_exact, 1), check_count("controls", controls)
    if check_kind(over) != "units":
        parts = parts_of(whole_args(model), over)
        return Sweep(over, [part.name for part in parts], *_losses(model, ids, parts, wanted, progress))
    check_model(model)  # for its gradients
    generator = seeded(seed)
    estimated = _estimate_units(model, ids, wanted)
    units = parts_of(whole_args(model), "units")
    order = estimated.flatten().abs().argsort(descending=True, stable=True).tolist()
    rest = torch.tensor(order[n_exact:], device="cpu")
    drawn = torch.randperm(len(rest), generator=generator, device="cpu")[:controls]
    groups = [order[:n_exact], rest[drawn].tolist()]
    parts = [units[i] for group in groups for i in sorted(group)]
    losses, whole = _losses(model, ids, parts, wanted, progress)
    names = [part.name for part in parts]
    n = len(groups[0])
    others = Sweep("units", names[n:], losses[n:], whole) if controls else None
    return Sweep("units", names[:n], losses[:n], whole, estimated, others)


@torch.no_grad()
def ablate_together(
    model: Transformer,
    texts: Texts,
    parts: str | Sequence[str],
    edit: Edit | Callable[[Tensor], Tensor] | None = None,
    *,
    controls: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Joint:
    """Measure the loss of texts without several parts at once, and without `controls` random sets of others.

    Part names are those of a `Sweep`; the other arguments are those of `sweep`. No two parts may overlap,
    that is, edit the same head or unit, or lie one inside the other, such as `layers.0.heads.1` in
    `layers.0.attention`, `layers.0.groups.0` and `layers.0`. Controls overlap neither the parts nor, in a set,
    each other. Raises RequestError.
    """
    check_part(model)
    ids, chosen = texts_to_predict(model, texts), [named_part(whole_args(model), name) for name in names_of(parts)]
    check_disjoint(chosen)
    sets = [chosen, *draw_parts(whole_args(model), chosen, check_count("controls", controls), seed)]
    streams = Streams.from_texts(model, ids, tokens_that_fit(model, "ffn.hidden", max(map(len, ids))))
    edits = _edits(streams, _names([part for own in sets for part in own]), mean() if edit is None else as_edit(edit))
    wanted = [[part.edits(edits) for part in own] for own in sets]
    whole, *losses = _run(streams, [[], *wanted], ProgressCounter((1 + len(sets)) * len(ids), progress))
    return Joint([part.name for part in chosen], losses[0], whole, torch.stack(losses)[1:])


def _losses(
    model: Transformer, ids: Sequence[Tensor], parts: Sequence[Part], edit: Edit, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Losses without each part (parts, texts), and of the whole model (texts,)."""
    streams = Streams.from_texts(model, ids, tokens_that_fit(model, "ffn.hidden", max(map(len, ids))))
    counter = ProgressCounter((1 + len(parts)) * len(ids), progress)
    (whole,) = _run(streams, [[]], counter)
    out = torch.empty(len(parts), len(ids), device="cpu")
    for layer in range(whole_args(model).n_layers):
        own = [i for i, part in enumerate(parts) if part.layer == layer]
        if own:
            edits = _edits(streams, _names([parts[i] for i in own]), edit)
            out[own] = _run(streams, [[parts[i].edits(edits)] for i in own], counter)
        streams.advance()
    return out, whole


def _run(streams: Streams, sets: Sequence[Sequence[Mapping[str, Edit]]], counter: ProgressCounter) -> Tensor:
    """Run the texts from the streams' layer on with each set of edits: losses (sets, texts), on the CPU.

    Several sets share a pass, in separate rows.
    """
    n_texts, found = len(streams.texts), []
    texts = list(range(n_texts)) * len(sets)
    for some in streams.passes(texts):
        edits = _by_rows(sets, n_texts, some)
        with streams.resumed(texts[some.start : some.stop]) as batch, patch(streams.model, edits):
            found.append(losses_of(streams.model, batch, batch.hidden(streams.model)).cpu())
        counter.advance(len(some))
    return torch.cat(found).unflatten(0, (len(sets), n_texts))


def _by_rows(sets: Sequence[Sequence[Mapping[str, Edit]]], n_texts: int, some: range) -> dict[str, Edit]:
    """The edits of a pass with `some` of all runs; the runs are all texts with the first set, then with the next."""
    found: dict[str, list[tuple[slice, Edit]]] = {}
    for i in range(some.start // n_texts, (some.stop - 1) // n_texts + 1):
        rows = slice(max(i * n_texts, some.start) - some.start, min((i + 1) * n_texts, some.stop) - some.start)
        for edits in sets[i]:
            for name, edit in edits.items():
                found.setdefault(name, []).append((rows, edit))
    return {name: _OfRows(lambda value, name: value, own=tuple(own)) for name, own in found.items()}


@dataclass(frozen=True, kw_only=True)
class _OfRows(Edit):
    """Several edits, each applied to its own rows of a pass."""

    own: tuple[tuple[slice, Edit], ...]

    def apply(self, value: Tensor, name: str, run: Pass | None) -> Tensor:
        out = value.clone()
        for rows, edit in self.own:
            out[rows] = edit.apply(out[rows], name, run and run.of_rows(rows))
        return out


def _names(parts: Sequence[Part]) -> list[str]:
    """The distinct activations of parts."""
    return sorted({name for part in parts for name in part.activations})


def _edits(streams: Streams, names: Sequence[str], edit: Edit) -> dict[str, Edit]:
    """The edit for each activation, computed over its values at all tokens of all texts; from the streams' layer on."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    last = max(int(name.split(".")[1]) for name in names)
    for some in streams.passes(range(len(streams.texts))):
        with layer_window(streams.model, range(streams.layer, last + 1), streams.stacked(some)):
            traced = trace(streams.model, [streams.texts[i] for i in some], names)
        for row in map(traced.row, range(len(some))):
            for name in names:
                found[name].append(row[name][0])
    return {name: edit.over(torch.cat(values)) for name, values in found.items()}


def _estimate_units(model: Transformer, ids: Sequence[Tensor], edit: Edit) -> Tensor:
    """First-order estimate of the mean change of the loss without each unit: float32 (n_layers, F), on the CPU."""
    names = [f"layers.{layer}.ffn.hidden" for layer in range(whole_args(model).n_layers)]
    edits = _edits(Streams.from_texts(model, ids, tokens_that_fit(model, "ffn.hidden", max(map(len, ids)))), names, edit)
    total = torch.zeros(whole_args(model).n_layers, whole_args(model).ffn_dim, device=model.device)
    for text in ids:
        traced = trace(model, text, [*names, "norm"], requires_grad=True)
        with gradients(model):
            loss = losses_of(model, Batch.from_texts(model, [text]), traced["norm"]).sum()
            grads = torch.autograd.grad(loss, [traced[name] for name in names])
        row = text[None].to(model.device)
        run = Pass(row, Context(whole_args(model), row, None))
        for change, name, grad in zip(total, names, grads, strict=True):
            value = traced[name].detach()
            change += ((edits[name].apply(value, name, run).float() - value.float()) * grad.float()).sum((0, 1))
    return (total / len(ids)).cpu()
