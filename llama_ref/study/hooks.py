"""Instrumented forwards, installed on a model while it is traced or patched.

They repeat model.py's forwards, operation by operation, and pass every value to visitors: without
an edit the results are the same, bit for bit. They replace methods of one model's instances, not of
its classes, and see only passes of the thread that installed them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ref.compiled.forward import CompiledForward
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Attention, Context, FeedForward, Transformer, TransformerBlock, attend, rotate
from llama_ref.parallel.pipeline import LogitsForAll
from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.quantization.linear import QuantizedMatrix


class Pass:
    """One forward pass: ids (B, T), their positions (B, T) or (1, T), and the cache, if any.

    `padding`, bool (B, T), is set for texts of different lengths; ids and positions there are -1.
    """

    def __init__(self, tokens: Tensor, context: Context):
        self.tokens = tokens
        self.positions = context.positions
        assert context.cache is None or isinstance(context.cache, KVCache)
        self.cache = context.cache
        self.complete = False  # until the last norm has run
        self.first = self.cache is None or self.cache.longest == 0  # of its text
        self.padding: Tensor | None = None

    def mark_padding(self, padding: Tensor) -> None:
        """Say which places are padding, before any value is visited."""
        self.padding = padding
        self.tokens = self.tokens.masked_fill(padding, -1)
        self.positions = self.positions.expand(padding.shape).masked_fill(padding, -1)


class Visitor(Protocol):
    """Gets the values of a pass: an editor may return others, a recorder runs after all editors."""

    edits: bool
    in_path: bool  # whether gradients should reach the values that it keeps

    def wants(self, name: str) -> bool: ...

    def begin(self, run: Pass) -> None: ...

    def visit(self, name: str, value: Tensor, run: Pass) -> Tensor: ...


_attached: WeakKeyDictionary[Transformer, "Attached"] = WeakKeyDictionary()
_lock = threading.RLock()


@contextmanager
def attached(model: Transformer, visitor: Visitor) -> Iterator[None]:
    """Pass a model's values to a visitor while the block runs, for passes of this thread.

    A compiled model runs uncompiled in the block. Blocks may be nested. Raises RequestError for a
    model that is split across processes.
    """
    check_model(model)
    key = (threading.get_ident(), visitor)
    try:
        with _lock:
            if model not in _attached:
                _attached[model] = Attached(model)
            _attached[model].enter(key)
        yield
    finally:
        try:
            _leave(model, key)
        finally:  # again, in case Ctrl-C interrupted the first call
            _leave(model, key)


def _leave(model: Transformer, key: tuple[int, Visitor]) -> None:
    with _lock:
        hooks = _attached.get(model)
        if hooks and hooks.leave(key):
            del _attached[model]


def check_model(model: Transformer) -> None:
    """Raise RequestError unless `model` is a Transformer that is whole in this process."""
    if not isinstance(model, Transformer):
        hint = ": pass its .model" if isinstance(getattr(model, "model", None), Transformer) else ""
        raise RequestError(f"model is of type {type(model).__name__}, expected a llama_ref Transformer{hint}")
    if any(isinstance(module, RowParallelLinear | LogitsForAll) for module in model.modules()):
        raise RequestError("the model is split across processes: load it in one, without torchrun, to study it")


class Attached:
    """The forwards installed on one model, and the visitors that they call."""

    def __init__(self, model: Transformer):
        self.visitors: list[tuple[int, Visitor]] = []  # with the thread of each
        self.local = threading.local()  # .tokens, .run, .in_pass: each thread has its own pass
        self.model = model
        self.instrumented: list[nn.Module] = []
        self.removed: list[tuple[nn.Module, str, CompiledForward]] = []  # to be restored

    def enter(self, key: tuple[int, Visitor]) -> None:
        self.visitors = [*self.visitors, key]  # a new list: other threads may be iterating over the old one
        if not self.instrumented:
            self._install()

    def leave(self, key: tuple[int, Visitor]) -> bool:
        """Remove a visitor; whether it was the last, and the model is as before."""
        self.visitors = [other for other in self.visitors if other is not key]
        if not self.visitors:
            self._uninstall()
        return not self.visitors

    # ---- install and uninstall

    def _install(self) -> None:
        model = self.model
        for attribute in ("hidden", "forward"):
            if attribute in vars(model):
                self._remove(model, attribute)
        self._instrument(model.tok_embeddings, self.embedding)
        for i, block in enumerate(model.layers):
            assert isinstance(block, TransformerBlock)
            self._instrument(block, self.block, i)
            self._instrument(block.attention, self.attention, i)
            self._instrument(block.feed_forward, self.feed_forward, i)
        self._instrument(model.norm, self.norm)
        self._instrument(model.output, self.output)

    def _instrument(self, module: nn.Module, forward: Callable[..., Tensor], *layer: int) -> None:
        if "forward" in vars(module):
            self._remove(module, "forward")
        self.instrumented.append(module)
        module.forward = _Forward(forward, module, *layer)

    def _remove(self, module: nn.Module, attribute: str) -> None:
        method = vars(module)[attribute]
        if not isinstance(method, CompiledForward):
            raise RequestError(
                f"a {type(module).__name__} has its own {attribute}, {method!r:.60}: only model.py's, compiled or not, can be "
                "studied; remove it first"
            )
        self.removed.append((module, attribute, method))
        delattr(module, attribute)

    def _uninstall(self) -> None:
        """Restore the model. Safe to call again after an interruption."""
        for module in self.instrumented:
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward
        for module, attribute, method in self.removed:
            setattr(module, attribute, method)
        self.instrumented, self.removed = [], []

    # ---- calls of the visitors

    def watching(self, name: str) -> list[Visitor]:
        """This thread's visitors that want a name, editors first."""
        thread = threading.get_ident()
        found = [visitor for owner, visitor in self.visitors if owner == thread and visitor.wants(name)]
        return sorted(found, key=lambda visitor: not visitor.edits)

    def see(self, name: str, value: Tensor) -> Tensor:
        """Pass a value through all visitors that want it."""
        for visitor in self.watching(name):
            value = visitor.visit(name, value, self.local.run)
        return value

    # ---- the forwards: model.py's lines, each value passed through `see`

    def embedding(self, module: nn.Module, tokens: Tensor) -> Tensor:
        self.local.tokens = tokens
        return _class_forward(module, tokens)

    def _begin(self, x: Tensor, context: Context) -> Tensor:
        """Start a pass at layer 0, the first to get the context; x is the embedding's output."""
        self.local.run = Pass(self.local.tokens, context)
        self.local.in_pass = True
        thread = threading.get_ident()
        for owner, visitor in self.visitors:
            if owner == thread:
                visitor.begin(self.local.run)
        return self.see("embedding", x)

    def block(self, block: TransformerBlock, i: int, x: Tensor, context: Context, layer: int) -> Tensor:
        if i == 0:
            x = self._begin(x, context)
        x = self.see(f"layers.{i}.residual_pre", x)
        x = x + block.attention(block.attention_norm(x), context, layer)
        x = self.see(f"layers.{i}.residual_mid", x)
        return self.see(f"layers.{i}.residual_post", x + block.feed_forward(block.ffn_norm(x)))

    def attention(self, module: Attention, i: int, x: Tensor, context: Context, layer: int) -> Tensor:
        def see(name: str, value: Tensor) -> Tensor:
            return self.see(f"layers.{i}.attention.{name}", value)

        heads = (-1, module.head_dim)
        x = see("norm", x)
        q = see("q_unrotated", module.wq(x).unflatten(-1, heads))  # (B, T, H, hd)
        k = see("k_unrotated", module.wk(x).unflatten(-1, heads))  # (B, T, K, hd)
        v = see("v", module.wv(x).unflatten(-1, heads))  # (B, T, K, hd)
        q, k = see("q", rotate(q, *context.rotations)), see("k", rotate(k, *context.rotations))
        if context.cache is None:
            out = attend(q, k, v)  # (B, T, H, hd)
        else:
            out = context.cache.attend(layer, q, k, v, context)  # (B, T, H, hd)
        watching = self.watching(f"layers.{i}.attention.scores") + self.watching(f"layers.{i}.attention.pattern")
        if watching:
            cache: KVCache | None = self.local.run.cache
            if cache is not None:
                k, v = cache.read(layer, context.n_seen)  # (B, S, K, hd)
            out = _attend_in_steps(out, q, k, v, context.visible, see, _in_path(watching))
        out = see("head_output", out)
        added = module.wo(out.flatten(-2))  # (B, T, D)
        watching = self.watching(f"layers.{i}.attention.head_result")
        if watching:
            added = _add_by_head(added, out, module.wo, see, _in_path(watching))
        return see("output", added)

    def feed_forward(self, module: FeedForward, i: int, x: Tensor) -> Tensor:
        def see(name: str, value: Tensor) -> Tensor:
            return self.see(f"layers.{i}.ffn.{name}", value)

        x = see("norm", x)
        hidden = F.silu(see("gate", module.w1(x))) * see("up", module.w3(x))
        return see("output", module.w2(see("hidden", hidden)))

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        out = _class_forward(module, x)
        if not getattr(self.local, "in_pass", False):  # a direct call of the norm
            return out
        out = self.see("norm", out)
        self.local.in_pass = False
        # Generation computes logits of few positions; recorders get those of all, computed here.
        recorders = [visitor for visitor in self.watching("logits") if not visitor.edits]
        if recorders:
            logits = self.model.logits(out)
            for visitor in recorders:
                visitor.visit("logits", logits, self.local.run)
        self.local.run.complete = True
        return out

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        out = _class_forward(module, x)
        editors = [visitor for visitor in self.watching("logits") if visitor.edits]
        if not editors or not hasattr(self.local, "run"):
            return out
        logits = out.float()
        one_position = logits.dim() == 2  # (B, V)
        logits = logits[:, None] if one_position else logits
        for visitor in editors:
            logits = visitor.visit("logits", logits, self.local.run)
        return logits[:, 0] if one_position else logits


class _Forward:
    """An instrumented forward of a module; its type tells it from others."""

    def __init__(self, forward: Callable[..., Tensor], module: nn.Module, *layer: int):
        self.forward, self.bound = forward, (module, *layer)

    def __call__(self, *args: Any) -> Tensor:
        return self.forward(*self.bound, *args)


def _class_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Call the forward of a module's class."""
    return type(module).forward(module, x)


def _in_path(visitors: list[Visitor]) -> bool:
    return any(visitor.in_path for visitor in visitors)


def _attend_in_steps(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, see: Callable[[str, Tensor], Tensor], in_path: bool
) -> Tensor:
    """The model's `out` (B, T, H, hd), replaced where a visitor changed the scores or pattern."""
    T, H, hd = q.shape[1:]
    S, K = k.shape[1:3]
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()[None]  # (1, T, S)
    hidden = ~visible[:, None]  # (B, 1, T, S)
    grouped = q.float().unflatten(2, (K, H // K))  # (B, T, K, G, hd)
    own = torch.einsum("btkgd,bskd->bkgts", grouped, k.float()).flatten(1, 2)  # (B, H, T, S)
    own = (own * hd**-0.5).masked_fill(hidden, -torch.inf)
    scores = see("scores", own)
    changed = None
    if scores is not own:
        scores = scores.masked_fill(hidden, -torch.inf)  # an edit cannot show the future
        changed = (scores != own).any(-1)  # (B, H, T)
    own = scores.softmax(-1)
    pattern = see("pattern", own)
    if pattern is not own:
        differs = (pattern != own).any(-1)
        changed = differs if changed is None else changed | differs
    if changed is None and not in_path:
        return out
    mixed = torch.einsum("bkgts,bskd->btkgd", pattern.unflatten(1, (K, -1)), v.float()).flatten(2, 3).type_as(out)
    return _replace(out, mixed, None if changed is None else changed.transpose(1, 2)[..., None], in_path)


def _add_by_head(added: Tensor, out: Tensor, wo: nn.Module, see: Callable[[str, Tensor], Tensor], in_path: bool) -> Tensor:
    """The model's `added` (B, T, D), replaced where a visitor changed a head's share."""
    weight = wo.dequantize() if isinstance(wo, QuantizedMatrix) else wo.get_parameter("weight")  # (D, H · hd)
    by_head = weight.to(out.dtype).unflatten(1, out.shape[2:])  # (D, H, hd)
    own = torch.einsum("bthe,dhe->bthd", out, by_head)  # (B, T, H, D)
    shares = see("head_result", own)
    changed = None if shares is own else (shares != own).flatten(2).any(-1)[..., None]  # (B, T, 1)
    if changed is None and not in_path:
        return added
    return _replace(added, shares.sum(2), changed, in_path)


def _replace(own: Tensor, other: Tensor, changed: Tensor | None, in_path: bool) -> Tensor:
    """`other` where it was changed, else `own`; with `in_path`, gradients flow through `other`."""
    if changed is not None:
        own = torch.where(changed, other, own)
    return own.detach() + (other - other.detach()) if in_path else own
