"""Looking at a model's activations: one pass with `trace`, whatever runs in a block with `recording`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.quantization.apply import is_quantized
from llama_ref.study.hooks import Pass, attached, check_model
from llama_ref.study.names import LOOKS, all_names, axes, matching


class NotTraced(RequestError, KeyError):
    """A name that a trace does not hold."""

    __str__ = Exception.__str__  # a KeyError would show its message's repr


class Trace(Mapping[str, Tensor]):
    """Activations by name, in the model's order. See names.py for names and shapes.

    `tokens` (B, T) are the ids that were run, `positions` (B, T) where each stands in its text; -1 in both where a row of a
    recorded batch is shorter than others. What belongs to no token is 0, and -inf among scores.
    """

    def __init__(self, values: Mapping[str, Tensor], tokens: Tensor, positions: Tensor, model_args: ModelArgs):
        self._values = {name: values[name] for name in all_names(model_args) if name in values}
        self.tokens, self.positions, self.model_args = tokens, positions, model_args

    def __getitem__(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        known = matching(self.model_args, name) if isinstance(name, str) else []  # raises for what no model has
        raise NotTraced(f"{name!r:.80} was not traced: add it to names" if known else f"{name!r:.80} is no activation's name")

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:
        return self._values.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        B, T = self.tokens.shape
        return f"Trace({len(self)} activations of {B} × {T} tokens)"


def trace(
    model: Transformer,
    tokens: Tensor | Sequence[int] | Sequence[Sequence[int]],
    names: str | Sequence[str] = "*",
    *,
    cache: KVCache | None = None,
    requires_grad: bool = False,
) -> Trace:
    """Run ids (B, T), or a list of them, through a model and keep the activations that the names or globs match.

    Nothing else is kept, and logits are made only when they are asked for. With a `cache` the tokens continue what it holds,
    and it grows as always. `requires_grad` keeps the graph, where weights are frozen from the first of the names on, so that
    `torch.autograd.grad` of anything made from the trace reaches every activation before it. Raises RequestError for names
    that match nothing, ids outside the vocabulary, a cache that does not fit, or gradients of a quantized model.
    """
    check_model(model)
    recording = Recording(names, requires_grad=requires_grad)
    ids = as_tokens(model, tokens)
    _check_cache(cache, ids)
    if requires_grad and cache is not None:
        raise RequestError("requires_grad and a cache were given: a cache is for inference; run the whole text without one")
    if requires_grad and is_quantized(model):
        raise RequestError("gradients do not go through quantized matrices: load the model without quantize")
    with _gradients(requires_grad), recording.of(model):
        model.hidden(ids.clone(), cache)  # ids of a caller in inference mode could not be saved for the way back
        return recording.single(model.args)


@contextmanager
def recording(model: Transformer, names: str | Sequence[str] = "*") -> Iterator["Recording"]:
    """Record whatever the model runs in this thread while the block lasts: `llama.generate(…)`, say.

    Afterwards the Recording's `trace` has it as if the whole text had been run at once.
    """
    record = Recording(names)
    with record.of(model):
        yield record


@dataclass(eq=False)
class _Text:
    """The passes of one text, or one batch of texts, through a cache.

    `lengths` (B,) are known where the cache went on to another text; else they are the cache's.
    """

    lengths: Tensor | None = None
    passes: list[Pass] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)  # of each pass

    def drop_broken(self) -> None:
        """Forget the last pass if an error ended it."""
        if self.passes and not self.passes[-1].complete:
            self.passes.pop()
            self.values.pop()


class Recording:
    """What passes of a model leave in its block (`with recording.of(model)`): read `trace` or `traces` afterwards.

    Every value stands at its token's position, the last one where a position was run more than once: pads, guesses that a
    model refused. A trace of generation so has what one pass over the whole text would have, to rounding; the answer's last
    token is not in it, unless the model ran it.
    """

    edits = False

    def __init__(self, names: str | Sequence[str] = "*", *, requires_grad: bool = False):
        self.names, self.in_path = names, requires_grad
        self.traces: list[Trace] = []
        self._wanted: frozenset[str] = frozenset()
        self._texts: list[_Text] = []

    @property
    def trace(self) -> Trace:
        """The only text's. Raises RequestError when there was none, or several: `traces` has them all."""
        if len(self.traces) != 1:
            found = f"{len(self.traces)} texts were run: read .traces" if self.traces else "nothing was recorded"
            raise RequestError(f"{found}; .trace is of one text, and is there when the recording's block has ended")
        return self.traces[0]

    @contextmanager
    def of(self, model: Transformer) -> Iterator[None]:
        """Record a model's passes while the block lasts."""
        check_model(model)
        self._wanted = frozenset(matching(model.args, self.names))
        try:
            with attached(model, self):
                yield
        finally:
            texts, self._texts = self._texts, []
            for text in texts:
                text.drop_broken()
            self.traces += [_aligned(text, model.args) for text in texts if text.passes]

    def single(self, args: ModelArgs) -> Trace:
        """The one pass under way, as it is, and nothing of it kept here."""
        (text,), self._texts = self._texts, []
        (run,) = text.passes
        positions = run.positions.expand(run.tokens.shape)
        return Trace(text.values[0], run.tokens, positions, args)

    # ---- as a visitor

    def wants(self, name: str) -> bool:
        return name in self._wanted

    def begin(self, run: Pass) -> None:
        if self._texts:
            self._texts[-1].drop_broken()
        last = self._texts[-1].passes[-1] if self._texts and self._texts[-1].passes else None
        same_cache = last is not None and run.cache is not None and run.cache is last.cache
        if same_cache and run.first:
            self._texts[-1].lengths = last.positions[:, -1] + 1
        if not same_cache or run.first:
            self._texts.append(_Text())
        self._texts[-1].values.append({})
        self._texts[-1].passes.append(run)

    def visit(self, name: str, value: Tensor, run: Pass) -> Tensor:
        if self.in_path and not value.requires_grad:
            value = value.detach().requires_grad_()
        self._texts[-1].values[-1][name] = value if self.in_path else value.detach()
        return value


def _aligned(text: _Text, args: ModelArgs) -> Trace:
    """A text's passes put together: every value at its token's position, from the first position that was run to the last."""
    cache = text.passes[0].cache
    if cache is None:
        run = text.passes[0]
        return Trace(text.values[0], run.tokens, run.positions.expand(run.tokens.shape), args)
    lengths = (cache.lengths if text.lengths is None else text.lengths)[:, None]  # (B, 1)
    start = int(min(run.positions.min() for run in text.passes))
    end = max(start, int(lengths.max()))
    places = [_Places(run.positions, run.positions < lengths, start) for run in text.passes]
    tokens = torch.full((len(lengths), end - start), -1, dtype=torch.long, device=lengths.device)
    positions = tokens.clone()
    for run, place in zip(text.passes, places, strict=True):
        place.put(tokens, run.tokens)
        place.put(positions, run.positions)
    values = {name: _joined(name, text.values, places, end - start, end) for name in list(text.values[0])}
    return Trace(values, tokens, positions, args)


class _Places:
    """Where the tokens of one pass stand in the whole: row by row, without what is a pad or was cut off again."""

    def __init__(self, positions: Tensor, valid: Tensor, start: int):
        self.rows, self.taken = valid.nonzero(as_tuple=True)
        self.columns = positions[self.rows, self.taken] - start

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Both (B, positions, …)."""
        whole[self.rows, self.columns] = part[self.rows, self.taken]


def _joined(name: str, values: list[dict[str, Tensor]], places: list[_Places], n_positions: int, n_keys: int) -> Tensor:
    """One activation of all passes, which is taken out of their `values` on the way."""
    looks = axes(name) == LOOKS
    first = values[0][name]
    B, H, *rest = first.shape
    shape = (B, H, n_positions, n_keys) if looks else (B, n_positions, *rest)
    whole = first.new_full(shape, -torch.inf if name.endswith(".scores") else 0)
    for place, of_pass in zip(places, values, strict=True):
        part = of_pass.pop(name)
        if looks:
            n = min(part.shape[-1], n_keys)
            place.put(whole.transpose(1, 2)[..., :n], part.transpose(1, 2)[..., :n])
        else:
            place.put(whole, part)
    return whole


@contextmanager
def _gradients(wanted: bool) -> Iterator[None]:
    if not wanted:
        with torch.no_grad():
            yield
        return
    with torch.inference_mode(False), torch.enable_grad():
        yield


# ---- what is asked


def as_tokens(model: Transformer, tokens: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """Ids as (B, T) on the model's device. Raises RequestError for what is none, or not in the vocabulary."""
    expected = "expected token ids: a list, a list of equally long lists, or a LongTensor (B, T)"
    if not isinstance(tokens, Tensor):
        rows = tokens if isinstance(tokens, Sequence) and not isinstance(tokens, str) else [None]
        flat = [id for row in rows for id in (row if isinstance(row, Sequence) else [row])]
        if not all(isinstance(id, Integral) and not isinstance(id, bool) for id in flat):
            raise RequestError(f"tokens is {tokens!r:.60}, {expected}")
        try:
            tokens = torch.tensor(tokens, dtype=torch.long)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise RequestError(f"tokens is {tokens!r:.60}, {expected}") from None
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise RequestError(f"tokens is a tensor {tuple(tokens.shape)} of {tokens.dtype}, {expected}")
    if tokens.numel() == 0:
        raise RequestError("tokens is empty; a pass needs one token at least (begin-of-text, say)")
    strange = [id for id in (int(tokens.min()), int(tokens.max())) if not 0 <= id < model.args.vocab_size]
    if strange:
        raise RequestError(f"tokens holds {strange[0]}; the vocabulary has 0 to {model.args.vocab_size - 1}")
    return tokens.to(device=model.layers[0].attention_norm.weight.device, dtype=torch.long)


def _check_cache(cache: KVCache | None, tokens: Tensor) -> None:
    if cache is None:
        return
    (B, T), rows, room = tokens.shape, len(cache.lengths), cache.max_seq_len - cache.longest
    if rows != B or room < T:
        raise RequestError(f"the cache has {rows} rows with room for {room:,} tokens more; tokens are {B} rows of {T:,}")
