"""Record a model's activations: `trace` records one pass, `recording` all passes in a block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.parallel.division import whole_args
from llama_ref.study.inputs import check_index
from llama_ref.study.names import IMAGE_SCORES, SCORES, all_names, axes, broadcastable, matching
from llama_ref.study.passes.gradients import gradients
from llama_ref.study.passes.hooks import Pass, attached, check_model, check_part
from llama_ref.study.passes.pass_size import split_passes
from llama_ref.study.texts import Batch, Texts, as_texts
from llama_ref.study.trace_file import read_trace, write_trace
from llama_ref.study.vision.images import Images, tiles_of_texts


class NotTraced(RequestError, KeyError):
    """A trace does not have this name."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class Trace(Mapping[str, Tensor]):
    """Activations by name, in the model's order; names.py has the names and shapes.

    `tokens` (B, T) are the ids, `positions` (B, T) their positions in the text. Shorter texts of a
    batch are padded: with -1 in both, with -inf in scores and 0 in other activations. `row(i)` has
    one text without its padding, and the activations of all images.
    """

    def __init__(self, values: Mapping[str, Tensor], tokens: Tensor, positions: Tensor, model_args: ModelArgs):
        self._values = {name: values[name] for name in all_names(model_args) if name in values}
        self.tokens, self.positions, self.model_args = tokens, positions, model_args

    def __getitem__(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        try:
            matching(self.model_args, name)
        except RequestError as error:  # as a KeyError, which Mapping.get expects
            raise NotTraced(str(error)) from None
        shown = " and show an image" if "vision_position" in axes(name) or name.startswith("cross_layers.") else ""
        raise NotTraced(f"{name!r:.80} was not traced: add it to names{shown}")

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        B, T = self.tokens.shape
        return f"Trace({len(self)} activations of {B} × {T} tokens)"

    def row(self, index: int) -> "Trace":
        """One text's trace, without padding: a batch of one. Its values are views."""
        row = check_index("row", index, len(self.tokens))
        n_tokens = int((self.positions[row] >= 0).sum())
        n_keys = 1 + int(self.positions[row, n_tokens - 1])
        cuts = {"batch": slice(row, row + 1), "position": slice(n_tokens), "key_position": slice(n_keys)}

        def cut(value: Tensor, own_axes: tuple[str, ...]) -> Tensor:
            return value[tuple(cuts.get(axis, slice(None)) for axis in own_axes)]

        values = {name: cut(value, axes(name)) for name, value in self.items()}
        tokens, positions = (cut(ids, ("batch", "position")) for ids in (self.tokens, self.positions))
        return Trace(values, tokens, positions, self.model_args)

    def numpy(self) -> dict[str, np.ndarray]:
        """All values as NumPy arrays; bfloat16, which NumPy lacks, becomes float32 without loss."""
        values = {name: value.detach().cpu() for name, value in self.items()}
        return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in values.items()}

    def save(self, path: str | Path) -> None:
        """Write or replace a safetensors file with every value by its name, `tokens` and `positions`.

        The file's metadata contain the `model_args` as JSON. Raises RequestError if it cannot be written.
        """
        write_trace(path, self._values, self.tokens, self.positions, self.model_args)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what `save` wrote: memory-mapped, on the CPU. Raises CheckpointError."""
        return cls(*read_trace(path))


def trace(
    model: Transformer,
    tokens: Texts,
    names: str | Sequence[str] = "*",
    *,
    images: Images | None = None,
    cache: KVCache | None = None,
    requires_grad: bool = False,
) -> Trace:
    """Run ids (B, T), or a list of them, and keep the activations that the names match.

    Names may be globs. A list of lists may have texts of different lengths, which do not attend to their
    padding. Layers after the last requested one are not run, and logits are computed only if requested.
    `images` are placed where the ids have the model's `image_id`: a list for one text, a list of lists for
    several, of paths, files' bytes or Pillow images. With a `cache` the tokens continue its text and are
    added to it. `requires_grad` keeps the graph: `torch.autograd.grad` of a value computed from the trace
    reaches every activation before it; values at padding are then not cleared. With frozen weights the
    graph starts at the first of the names; quantized matrices get the gradient of their dequantized weights
    (passes/gradients.py). Raises RequestError for names that match nothing, ids outside the vocabulary, a cache
    that is too small, or images with gradients or a cache. Under torchrun all processes must call it with
    the same arguments; each gets the whole trace, without gradients.
    """
    (check_model if requires_grad else check_part)(model)
    args = whole_args(model)
    recording = Recording(names, requires_grad=requires_grad)
    texts = as_texts(model, tokens)
    _check_cache(cache, texts)
    if requires_grad and cache is not None:
        raise RequestError("requires_grad and a cache were given: a cache is for inference; run the whole text without one")
    if images is not None and (requires_grad or cache is not None):
        raise RequestError("images were given with requires_grad or a cache: run the whole text without these")
    with gradients(model) if requires_grad else torch.no_grad(), recording.attached_to(model):
        batch = Batch.from_texts(model, texts, images)  # here: autograd cannot save tensors made in inference mode
        before = [] if cache is None else cache.lengths.tolist()
        batch.show(model, cache)
        if cache is not None and batch.padding is not None:
            cache.truncate([old + new for old, new in zip(before, batch.lengths, strict=True)])
        return recording.single(args)


def trace_each(
    model: Transformer, texts: Texts, names: str | Sequence[str] = "*", *, images: Images | None = None
) -> Iterator[Trace]:
    """Trace any number of texts and yield each one's trace (1, T), in their order, without padding.

    Several run in one pass, whose activations stay in memory until its last trace is released. It is
    fastest if neighbouring texts have similar lengths. Arguments and errors are those of `trace`.
    """
    rows = as_texts(model, texts)
    each = tiles_of_texts(model, rows, images)
    for some in split_passes(list(map(len, rows))):
        traced = trace(model, rows[some.start : some.stop], names, images=each[some.start : some.stop])
        yield from map(traced.row, range(len(some)))


@contextmanager
def recording(model: Transformer, names: str | Sequence[str] = "*") -> Iterator["Recording"]:
    """Record the model's passes in this thread during the block, such as those of `llama.generate(…)`.

    After the block, the Recording's `trace` looks as if the whole text had been run in one pass.
    """
    record = Recording(names)
    with record.attached_to(model):
        yield record


@dataclass(eq=False)
class _Text:
    """The passes of one text, or of one batch of texts, that share a cache.

    `lengths` (B,) are set when the cache is reused for another text; until then the cache has them.
    """

    lengths: Tensor | None = None
    passes: list[Pass] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)  # of each pass
    images: dict[str, list[Tensor]] = field(default_factory=dict)  # each image's values, by name

    def drop_incomplete(self) -> None:
        """Remove the last pass if an error ended it."""
        if self.passes and not self.passes[-1].complete:
            self.passes.pop()
            self.values.pop()


class Recording:
    """A visitor that records the passes of a model in `with recording.attached_to(model)`.

    Afterwards `trace` or `traces` have every value at its token's position; if a position was run
    more than once (padding, rejected drafts), the last value counts. So a trace of generation equals
    the trace of one pass over the whole text, up to rounding; the last token of the answer is missing
    unless the model ran it.
    """

    edits = False

    def __init__(self, names: str | Sequence[str] = "*", *, requires_grad: bool = False):
        self.names, self.in_path = names, requires_grad
        self.traces: list[Trace] = []
        self._wanted: frozenset[str] = frozenset()
        self._texts: list[_Text] = []
        self._images: dict[str, list[Tensor]] = {}  # values of images encoded for the next text

    @property
    def trace(self) -> Trace:
        """The trace of the only text. Raises RequestError unless there was exactly one."""
        if len(self.traces) != 1:
            found = f"{len(self.traces)} texts were run: read .traces" if self.traces else "nothing was recorded"
            raise RequestError(f"{found}; .trace is for one text, after the recording's block has ended")
        return self.traces[0]

    @contextmanager
    def attached_to(self, model: Transformer) -> Iterator[None]:
        """Record a model's passes during the block."""
        check_part(model)
        args = whole_args(model)
        self._wanted = frozenset(matching(args, self.names))
        try:
            with attached(model, self):
                yield
        finally:
            texts, self._texts = self._texts, []
            for text in texts:
                text.drop_incomplete()
            self.traces += [_merge_passes(text, args) for text in texts if text.passes]

    def single(self, args: ModelArgs) -> Trace:
        """Return the trace of the only pass, without keeping it here."""
        (text,), self._texts = self._texts, []
        return _one_pass(text, args)

    # ---- the visitor's methods, called by passes/hooks.py

    def wants(self, name: str) -> bool:
        return name in self._wanted

    def begin(self, run: Pass) -> None:
        if self._texts:
            self._texts[-1].drop_incomplete()
        last = self._texts[-1].passes[-1] if self._texts and self._texts[-1].passes else None
        if last is None or run.cache is None or run.cache is not last.cache:
            self._texts.append(_Text())
        elif run.first:  # the cache was emptied for another text
            self._texts[-1].lengths = last.positions.amax(1) + 1
            self._texts.append(_Text())
        self._texts[-1].values.append({})
        self._texts[-1].passes.append(run)
        images, self._images = self._images, {}
        for name, values in images.items():
            self._texts[-1].images.setdefault(name, []).extend(values)

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor:
        if run is None:
            self._images.setdefault(name, []).append(value.detach())
            return value
        if self.in_path and not value.requires_grad:
            value = (value.clone() if value.is_inference() else value).detach().requires_grad_()
        self._texts[-1].values[-1][name] = value if self.in_path else value.detach()
        return value


def _one_pass(text: _Text, args: ModelArgs) -> Trace:
    """The trace of a text's first pass, with its padding cleared."""
    run, values = text.passes[0], text.values[0]
    if run.padding is not None:
        values = {name: _cleared(name, values.pop(name), run.padding) for name in list(values)}
    return Trace(values | _stacked(text.images), run.tokens, run.positions.expand(run.tokens.shape), args)


def _cleared(name: str, value: Tensor, padding: Tensor) -> Tensor:
    """Clear the positions of padding, unless the value is part of a graph."""
    if value.requires_grad or "position" not in axes(name):
        return value
    return value.masked_fill(broadcastable(padding, name, "batch", "position"), _nothing(name))


def _stacked(images: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The values of all images, (1, M, …) each, as one tensor (I, M, …), padded with zeros to the longest."""
    out = {}
    for name, values in images.items():
        longest = max(value.shape[1] for value in values)
        missing = [value.new_zeros(1, longest - value.shape[1], *value.shape[2:]) for value in values]
        out[name] = torch.cat([torch.cat(pair, 1) for pair in zip(values, missing, strict=True)])
    return out


def _nothing(name: str) -> float:
    """The fill value of an activation where there is no token."""
    return -torch.inf if name.endswith(".scores") else 0


def _merge_passes(text: _Text, args: ModelArgs) -> Trace:
    """Merge a text's passes into one trace, from the first position that was run to the last."""
    cache = text.passes[0].cache
    if cache is None:
        return _one_pass(text, args)
    lengths = (cache.lengths if text.lengths is None else text.lengths)[:, None]  # (B, 1)
    start = min(int(run.positions[run.positions >= 0].min()) for run in text.passes)
    end = max(start, int(lengths.max()))
    targets = [_Target(run.positions, (run.positions >= 0) & (run.positions < lengths), start) for run in text.passes]
    tokens = torch.full((len(lengths), end - start), -1, dtype=torch.long, device=lengths.device)
    positions = tokens.clone()
    for run, target in zip(text.passes, targets, strict=True):
        target.write(tokens, run.tokens)
        target.write(positions, run.positions)
    names = dict.fromkeys(name for own in text.values for name in own)
    values = {name: _merge_values(name, text.values, targets, end - start, end) for name in names}
    return Trace(values | _stacked(text.images), tokens, positions, args)


class _Target:
    """The destination in the merged trace of one pass's tokens, without padding and rejected drafts."""

    def __init__(self, positions: Tensor, valid: Tensor, start: int):
        self.rows, self.taken = valid.nonzero(as_tuple=True)
        self.columns = positions[self.rows, self.taken] - start

    def write(self, whole: Tensor, part: Tensor) -> None:
        """Copy the pass's valid tokens; both are (B, positions, …)."""
        whole[self.rows, self.columns] = part[self.rows, self.taken]


def _merge_values(name: str, values: list[dict[str, Tensor]], targets: list[_Target], n_positions: int, n_keys: int) -> Tensor:
    """Merge one activation of all passes, removing it from their `values` to save memory.

    A pass before the first image has no values of the cross-attention layers.
    """
    own_axes = axes(name)
    parts = [(target, own.pop(name)) for target, own in zip(targets, values, strict=True) if name in own]
    last = parts[-1][1]
    if "position" not in own_axes:  # keys and values of images: every pass has those of all images so far
        return last
    has_keys = own_axes in (SCORES, IMAGE_SCORES)
    n_keys = n_keys if own_axes == SCORES else last.shape[-1]
    B, H, *rest = last.shape
    shape = (B, H, n_positions, n_keys) if has_keys else (B, n_positions, *rest)
    whole = last.new_full(shape, _nothing(name))
    for target, part in parts:
        if has_keys:
            n = min(part.shape[-1], n_keys)
            target.write(whole.transpose(1, 2)[..., :n], part.transpose(1, 2)[..., :n])
        else:
            target.write(whole, part)
    return whole


def _check_cache(cache: KVCache | None, texts: Sequence[Tensor]) -> None:
    if cache is None:
        return
    B, T, rows, room = len(texts), max(map(len, texts)), len(cache.lengths), cache.max_seq_len - cache.longest
    if rows != B or room < T:
        raise RequestError(f"the cache has {rows} rows with room for {room:,} more tokens, but tokens is {B} rows of {T:,}")
