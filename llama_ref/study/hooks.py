"""What stands on a model while it is studied: forwards of its layers that show every value to those who look.

They are model.py's own lines, operation for operation, and what only looks changes no bit. They stand on the instances of one
model, not on its classes, and act in the thread that asked for them; other threads' passes go by unseen.
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


class Pass:
    """One run of the model: ids (B, T), the positions (B, T) or (1, T) where they stand, and the cache, if there is one."""

    def __init__(self, tokens: Tensor, context: Context):
        self.tokens = tokens
        self.positions = context.positions
        self.cache: KVCache | None = context.cache
        self.complete = False  # until the last norm has run
        self.first = self.cache is None or self.cache.longest == 0  # whether a text begins here


class Visitor(Protocol):
    """Who sees values: an editor, which may give back others, or a recorder, which comes after all editors."""

    edits: bool
    in_path: bool  # whether gradients are to reach what it takes: see `Attached.attention`

    def wants(self, name: str) -> bool: ...

    def begin(self, run: Pass) -> None: ...

    def visit(self, name: str, value: Tensor, run: Pass) -> Tensor: ...


_attached: WeakKeyDictionary[Transformer, "Attached"] = WeakKeyDictionary()
_lock = threading.RLock()


@contextmanager
def attached(model: Transformer, visitor: Visitor) -> Iterator[None]:
    """Show a model's values to a visitor for as long as the block runs, in this thread.

    A compiled model runs on its plain path meanwhile. Blocks may stand in one another. Raises RequestError for a model that is
    divided among processes.
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
        finally:  # again, where Ctrl-C came in between
            _leave(model, key)


def _leave(model: Transformer, key: tuple[int, Visitor]) -> None:
    with _lock:
        here = _attached.get(model)
        if here and here.leave(key):
            del _attached[model]


def check_model(model: Transformer) -> None:
    """Raise RequestError for what is no model, or only a part of one."""
    if not isinstance(model, Transformer):
        hint = "; a Llama's is its .model" if isinstance(getattr(model, "model", None), Transformer) else ""
        raise RequestError(f"model is of type {type(model).__name__}, expected a llama_ref Transformer{hint}")
    if any(isinstance(module, RowParallelLinear | LogitsForAll) for module in model.modules()):
        raise RequestError("the model is divided among processes, and each has only a part: study it in one, without torchrun")


class Attached:
    """The forwards on one model, and who looks through them."""

    def __init__(self, model: Transformer):
        self.visitors: list[tuple[int, Visitor]] = []
        self.local = threading.local()  # .tokens, .run, .passing: each thread is in a pass of its own
        self.model = model
        self.set_aside: list[tuple[nn.Module, str, Any]] = []
        self.put_on: list[nn.Module] = []

    def enter(self, key: tuple[int, Visitor]) -> None:
        self.visitors = [*self.visitors, key]  # a new list: other threads may be going through the old one
        if not self.put_on:
            self._put_on()

    def leave(self, key: tuple[int, Visitor]) -> bool:
        """Whether nobody is left, and nothing stands on the model any more."""
        self.visitors = [other for other in self.visitors if other is not key]
        if not self.visitors:
            self._take_off()
        return not self.visitors

    # ---- on and off

    def _put_on(self) -> None:
        model = self.model
        for attribute in ("hidden", "forward"):
            if attribute in vars(model):
                self._set_aside(model, attribute)
        self._put(model.tok_embeddings, self.embedding)
        for i, block in enumerate(model.layers):
            self._put(block, self.block, i)
            self._put(block.attention, self.attention, i)
            self._put(block.feed_forward, self.feed_forward, i)
        self._put(model.norm, self.norm)
        self._put(model.output, self.output)

    def _put(self, module: nn.Module, forward: Callable[..., Tensor], *layer: int) -> None:
        if "forward" in vars(module):
            self._set_aside(module, "forward")
        self.put_on.append(module)
        module.forward = _Forward(forward, module, *layer)

    def _set_aside(self, module: nn.Module, attribute: str) -> None:
        standing = vars(module)[attribute]
        if not isinstance(standing, CompiledForward):
            raise RequestError(
                f"a {type(module).__name__} has a {attribute} of its own, {standing!r:.60}: only those of model.py, compiled "
                "or not, can be studied; take it off first"
            )
        self.set_aside.append((module, attribute, standing))
        delattr(module, attribute)

    def _take_off(self) -> None:
        """May be called again where it was interrupted."""
        for module in self.put_on:
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward
        for module, attribute, standing in self.set_aside:
            setattr(module, attribute, standing)
        self.put_on, self.set_aside = [], []

    # ---- showing

    def looking(self, name: str) -> list[Visitor]:
        """Who wants to see a name in this thread, editors first."""
        thread = threading.get_ident()
        found = [visitor for owner, visitor in self.visitors if owner == thread and visitor.wants(name)]
        return sorted(found, key=lambda visitor: not visitor.edits)

    def see(self, name: str, value: Tensor) -> Tensor:
        for visitor in self.looking(name):
            value = visitor.visit(name, value, self.local.run)
        return value

    # ---- the forwards: model.py's lines, with their values shown

    def embedding(self, module: nn.Module, tokens: Tensor) -> Tensor:
        self.local.tokens = tokens
        return _plain(module, tokens)

    def _begin(self, x: Tensor, context: Context) -> Tensor:
        """Where a pass has its context for the first time; what the embedding gave comes in as layer 0's input."""
        self.local.run = Pass(self.local.tokens, context)
        self.local.passing = True
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
        looking = self.looking(f"layers.{i}.attention.scores") + self.looking(f"layers.{i}.attention.pattern")
        if looking:
            if context.cache is not None:
                k, v = context.cache.read(layer, context.n_seen)  # (B, S, K, hd)
            out = _beside(out, q, k, v, context.visible, see, _in_path(looking))
        out = see("head_output", out)
        added = module.wo(out.flatten(-2))  # (B, T, D)
        looking = self.looking(f"layers.{i}.attention.head_result")
        if looking:
            added = _by_head(added, out, module.wo, see, _in_path(looking))
        return see("output", added)

    def feed_forward(self, module: FeedForward, i: int, x: Tensor) -> Tensor:
        def see(name: str, value: Tensor) -> Tensor:
            return self.see(f"layers.{i}.ffn.{name}", value)

        x = see("norm", x)
        hidden = F.silu(see("gate", module.w1(x))) * see("up", module.w3(x))
        return see("output", module.w2(see("hidden", hidden)))

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        out = _plain(module, x)
        if not getattr(self.local, "passing", False):  # somebody's own use of the norm
            return out
        out = self.see("norm", out)
        self.local.passing = False
        # Generation makes few positions' logits; who looks gets those of all, made beside.
        recorders = [visitor for visitor in self.looking("logits") if not visitor.edits]
        if recorders:
            logits = self.model.logits(out)
            for visitor in recorders:
                visitor.visit("logits", logits, self.local.run)
        self.local.run.complete = True
        return out

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        out = _plain(module, x)
        editors = [visitor for visitor in self.looking("logits") if visitor.edits]
        if not editors or not hasattr(self.local, "run"):
            return out
        logits = out.float()
        alone = logits.dim() == 2  # (B, V): of one position of each row
        logits = logits[:, None] if alone else logits
        for visitor in editors:
            logits = visitor.visit("logits", logits, self.local.run)
        return logits[:, 0] if alone else logits


class _Forward:
    """In place of a module's forward."""

    def __init__(self, forward: Callable[..., Tensor], module: nn.Module, *layer: int):
        self.forward, self.its = forward, (module, *layer)

    def __call__(self, *args: Any) -> Tensor:
        return self.forward(*self.its, *args)


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    """What a module's own class makes of x."""
    return type(module).forward(module, x)


def _in_path(looking: list[Visitor]) -> bool:
    return any(visitor.in_path for visitor in looking)


def _beside(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, see: Callable[[str, Tensor], Tensor], in_path: bool
) -> Tensor:
    """Attention in small steps, to show them: the model's own `out` (B, T, H, hd), but another where an editor changed one."""
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
        scores = scores.masked_fill(hidden, -torch.inf)  # an edit shows nobody the future
        changed = (scores != own).any(-1)  # (B, H, T)
    own = scores.softmax(-1)
    pattern = see("pattern", own)
    if pattern is not own:
        differs = (pattern != own).any(-1)
        changed = differs if changed is None else changed | differs
    if changed is None and not in_path:
        return out
    mixed = torch.einsum("bkgts,bskd->btkgd", pattern.unflatten(1, (K, -1)), v.float()).flatten(2, 3).type_as(out)
    return _replaced(out, mixed, None if changed is None else changed.transpose(1, 2)[..., None], in_path)


def _by_head(added: Tensor, out: Tensor, wo: nn.Module, see: Callable[[str, Tensor], Tensor], in_path: bool) -> Tensor:
    """The heads' shares, shown: the model's own `added` (B, T, D), but their sum at positions where an editor changed one."""
    weight = wo.weight if isinstance(wo, nn.Linear) else wo.dequantize()  # (D, H · hd)
    by_head = weight.to(out.dtype).unflatten(1, out.shape[2:])  # (D, H, hd)
    own = torch.einsum("bthe,dhe->bthd", out, by_head)  # (B, T, H, D)
    shares = see("head_result", own)
    changed = None if shares is own else (shares != own).flatten(2).any(-1)[..., None]  # (B, T, 1)
    if changed is None and not in_path:
        return added
    return _replaced(added, shares.sum(2), changed, in_path)


def _replaced(own: Tensor, other: Tensor, changed: Tensor | None, in_path: bool) -> Tensor:
    """`own` with `other` where it was changed. With gradients these come by way of `other` alone, and the numbers stay."""
    if changed is not None:
        own = torch.where(changed, other, own)
    return own.detach() + (other - other.detach()) if in_path else own
