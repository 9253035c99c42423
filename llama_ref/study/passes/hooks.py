"""Instrumented forwards, installed on a model while it is traced or patched.

They repeat model.py's forwards (vision/hooks.py: vision.py's), operation by operation, and pass every
value to visitors: without an edit the results are the same, bit for bit. They replace methods of one
model's instances, not of its classes, and see only passes of the thread that installed them.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama_ref.compiled.forward import CompiledForward
from llama_ref.errors import RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.machine.waiting import interrupt_held
from llama_ref.model import Attention, Context, FeedForward, Transformer, TransformerBlock, attend, rotate
from llama_ref.parallel.division import division_of
from llama_ref.parallel.pipeline import LogitsForAll, SentState
from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.study.names import LAYER_AXES, all_names, is_of_an_image
from llama_ref.study.passes.parts import Parts
from llama_ref.study.passes.steps import add_by_head, attend_in_steps
from llama_ref.study.vision.hooks import VisionForwards
from llama_ref.vision import VisionTransformer

SPLIT = (
    "the model is split across processes, and this needs gradients or all weights: load it in one process, without torchrun,"
    " or use what reads and edits activations, such as trace, patch and patch_grid"
)


class Pass:
    """One forward pass: ids (B, T), their positions (B, T) or (1, T), and the cache, if any.

    `padding`, bool (B, T), is set for texts of different lengths; ids and positions there are -1.
    `layers` are the layers that the pass runs, None for all (layer_window.py). If its output is not read
    (`is_read`), the pass stops after the last layer that a visitor watches, or after this layer's attention
    (`ends_in_attention`).
    """

    def __init__(self, tokens: Tensor, context: Context):
        self.tokens = tokens
        self.positions = context.positions
        assert context.cache is None or isinstance(context.cache, KVCache)
        self.cache = context.cache
        self.complete = False  # until the final norm has run
        self.first = self.cache is None or self.cache.longest == 0  # the first pass of its text
        self.padding: Tensor | None = None
        self.layers: range | None = None
        self.is_read = True
        self.ends_in_attention = False
        self.prompt_ends: Tensor | None = None  # (B, 1): where the prompts end whose continuation is generated
        if self.cache is not None:
            self._ask(self.cache)

    def _ask(self, cache: KVCache) -> None:
        """Take over what a cache knows of its rows' texts."""
        device = self.positions.device
        if cache.prompt_ends is not None:
            self.prompt_ends = torch.tensor(cache.prompt_ends, device=device)[:, None]
        if cache.padded_from is not None:
            padding = self.positions >= torch.tensor(cache.padded_from, device=device)[:, None]
            if padding.any():
                self.mark_padding(padding)

    def mark_padding(self, padding: Tensor) -> None:
        """Mark the positions that are padding, before any value is visited."""
        self.padding = padding
        self.tokens = self.tokens.masked_fill(padding, -1)
        self.positions = self.positions.expand(padding.shape).masked_fill(padding, -1)

    @property
    def ends(self) -> Tensor:
        """Where each row's text ends: (B or 1, 1). A prompt that is read in pieces does not end with a piece."""
        seen = self.positions.amax(1, keepdim=True) + 1
        return seen if self.prompt_ends is None else self.prompt_ends.maximum(seen)

    def at(self, wanted: Sequence[int]) -> Tensor:
        """Which tokens are at these positions: bool (B or 1, T).

        -1 is the last token of each row's text: of a prompt its last token, and every generated one, which
        was the last when it was added. (Speculative decoding adds several in one pass.)
        """
        chosen = torch.tensor(wanted, dtype=torch.long, device=self.positions.device)
        ends = self.ends if self.prompt_ends is None else self.prompt_ends
        places = torch.where(chosen < 0, ends + chosen, chosen)  # (B or 1, n)
        found = (self.positions[:, :, None] == places[:, None]).any(-1) & (self.positions >= 0)
        return found | (self.positions >= ends) if -1 in wanted else found

    def of_rows(self, rows: slice) -> "Pass":
        """The pass, limited to some of its texts."""
        own = copy(self)
        own.tokens = self.tokens[rows]
        own.positions = self.positions if len(self.positions) == 1 else self.positions[rows]
        own.padding = None if self.padding is None else self.padding[rows]
        own.prompt_ends = None if self.prompt_ends is None else self.prompt_ends[rows]
        return own


class Visitor(Protocol):
    """Receives the values of a pass. An editor may return other values; recorders run after all editors.

    Images are encoded before the pass of the text that has them, so their values have no `run`.
    """

    edits: bool
    in_path: bool  # whether gradients must reach the values that it keeps

    def wants(self, name: str) -> bool: ...

    def begin(self, run: Pass) -> None: ...

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor: ...


_attached: WeakKeyDictionary[Transformer, "Attached"] = WeakKeyDictionary()
_lock = threading.RLock()


@contextmanager
def attached(model: Transformer, visitor: Visitor, *, first: bool = False) -> Iterator[None]:
    """Pass a model's values to a visitor while the block runs, for passes of this thread.

    A compiled model runs uncompiled in the block. Blocks may be nested: the visitors of outer blocks
    come first, unless one asks to be the `first` of all. If the model is split across processes, all of
    them must attach the same visitors, each visitor gets whole values (an editor those of its stage), and
    one that wants gradients raises RequestError.
    """
    (check_model if visitor.in_path else check_part)(model)
    key = (threading.get_ident(), visitor)
    try:
        try:
            with interrupt_held(), _lock:  # whole, or not at all
                if model not in _attached:
                    _attached[model] = Attached(model)
                _attached[model].enter(key, first=first)
            yield
        finally:
            _leave(model, key)
    finally:  # again, in case Ctrl-C came just before the first call
        _leave(model, key)


def _leave(model: Transformer, key: tuple[int, Visitor]) -> None:
    with interrupt_held(), _lock:
        hooks = _attached.get(model)
        if hooks and hooks.leave(key):
            del _attached[model]


def edited_names(model: Transformer) -> list[str]:
    """The names of the activations that this thread's editors change, in the model's order."""
    hooks = _attached.get(model)
    editors = [visitor for visitor in hooks.own_visitors() if visitor.edits] if hooks else []
    names = all_names(division_of(model).args) if editors else []
    return [name for name in names if any(editor.wants(name) for editor in editors)]


def check_model(model: Transformer) -> None:
    """Raise RequestError unless `model` is a Transformer that is whole in this process."""
    check_part(model)
    if division_of(model).job.is_parallel:
        raise RequestError(SPLIT)


def check_part(model: Transformer) -> None:
    """Raise RequestError unless `model` is a Transformer, or this process's part of one."""
    if not isinstance(model, Transformer):
        hint = ": pass its .model" if isinstance(getattr(model, "model", None), Transformer) else ""
        raise RequestError(f"model is of type {type(model).__name__}, expected a llama_ref Transformer{hint}")
    if model in _attached:
        return  # checked before
    is_split = any(isinstance(module, RowParallelLinear | LogitsForAll) for module in model.modules())
    if is_split and not division_of(model).job.is_parallel:  # a part of an unknown model
        raise RequestError(SPLIT)


def read_logits(model: Transformer, states: Tensor, *, is_normed: bool = True) -> Tensor:
    """Logits of states of any tokens, before or after the final norm: (…, D) -> float32 (…, V).

    Edits of `norm` and `logits` apply, and raise RequestError if they are limited to rows or positions.
    """
    hooks = _attached.get(model)
    if hooks is not None:
        hooks.local.is_outside = True
    try:
        if not is_normed and not isinstance(model.norm, SentState):  # else the last pipeline stage sends the logits
            states = model.norm(states)
        logits = model.logits(states)
        if hooks is not None:
            hooks.fail_together()  # an edit of the norm, which only the last pipeline stage applies
        return logits
    finally:
        if hooks is not None:
            hooks.local.is_outside = False


class Attached:
    """The forwards installed on one model, and the visitors that they call."""

    def __init__(self, model: Transformer):
        self.visitors: list[tuple[int, Visitor]] = []  # (thread id, visitor)
        self.local = threading.local()  # .tokens, .run, .in_pass: each thread has its own pass
        self.model = model
        self.parts = Parts(model) if division_of(model).job.is_parallel else None
        self.first_layer = division_of(model).first_layer  # the number of the first layer held here
        self.instrumented: list[nn.Module] = []
        self.removed: list[tuple[nn.Module, str, CompiledForward]] = []  # to be restored
        self.beginning: RemovableHandle | None = None

    def enter(self, key: tuple[int, Visitor], *, first: bool = False) -> None:
        # A new list: other threads may be iterating over the old one.
        self.visitors = [key, *self.visitors] if first else [*self.visitors, key]
        if not self.instrumented:
            self._install()

    def leave(self, key: tuple[int, Visitor]) -> bool:
        """Remove a visitor; return whether it was the last, so that the model is restored."""
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
        model.embed = self.embed  # type: ignore[method-assign]  # only of this instance
        for i, block in enumerate(model.layers, self.first_layer):
            assert isinstance(block, TransformerBlock)
            self.instrument(block, self.block, f"layers.{i}")
            self.instrument(block.attention, self.attention, f"layers.{i}")
            self.instrument(block.feed_forward, self.feed_forward, f"layers.{i}")
        if isinstance(model, VisionTransformer):
            VisionForwards(self).install(model, division_of(model).first_cross_layer)
        self.instrument(model.norm, self.norm)
        self.instrument(model.output, self.output)
        # Prepended: it must also run before a cross-attention layer in front of layer 0.
        self.beginning = model.layers[0].register_forward_pre_hook(self._begin, prepend=True)

    def instrument(self, module: nn.Module, forward: Callable[..., Tensor], *where: str) -> None:
        """Replace a module's forward by `forward(module, *where, …)`."""
        if "forward" in vars(module):
            self._remove(module, "forward")
        self.instrumented.append(module)
        module.forward = _Forward(forward, module, *where)

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
        vars(self.model).pop("embed", None)
        if self.beginning is not None:
            self.beginning.remove()
        for module in self.instrumented:
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward
        for module, attribute, method in self.removed:
            setattr(module, attribute, method)
        self.instrumented, self.removed = [], []

    # ---- calls of the visitors

    def watching(self, name: str) -> list[Visitor]:
        """This thread's visitors that want a name, editors first."""
        found = [visitor for visitor in self.own_visitors() if visitor.wants(name)]
        return sorted(found, key=lambda visitor: not visitor.edits)

    def own_visitors(self) -> list[Visitor]:
        """This thread's visitors, in the order in which they were attached."""
        thread = threading.get_ident()
        return [visitor for owner, visitor in self.visitors if owner == thread]

    def editors(self, name: str) -> list[Visitor]:
        """This thread's editors of a name."""
        return [visitor for visitor in self.watching(name) if visitor.edits]

    def recorders(self, name: str) -> list[Visitor]:
        """This thread's visitors that want a name and edit nothing."""
        return [visitor for visitor in self.watching(name) if not visitor.edits]

    def see(self, name: str, value: Tensor) -> Tensor:
        """Pass a value through all visitors that want it."""
        watching = self.watching(name)
        if self.parts and watching:
            return self._see_part(self.parts, name, value)
        return self._visited(watching, name, value)

    def _visited(self, visitors: Iterable[Visitor], name: str, value: Tensor) -> Tensor:
        run = None if is_of_an_image(name) or self._is_outside() else self.local.run
        for visitor in visitors:
            value = visitor.visit(name, value, run)
        return value

    def _is_outside(self) -> bool:
        """Whether the values are not those of a pass (`read_logits`)."""
        return getattr(self.local, "is_outside", False) or not hasattr(self.local, "run")

    def _edited(self, editors: Iterable[Visitor], name: str, whole: Tensor, *, by_all_stages: bool = False) -> Tensor:
        """A whole value after the editors; the processes that a model is split across agree on the first one's."""
        if self.parts is None:
            return self._visited(editors, name, whole)
        with self.parts.failing_later():
            whole = self._visited(editors, name, whole)
        return self.parts.agreed(whole, by_all_stages=by_all_stages)

    def _see_part(self, parts: Parts, name: str, value: Tensor) -> Tensor:
        """Pass a value of a model that is split across processes through the visitors, whole; return this process's part."""
        whole = parts.whole(name, value)
        if editors := self.editors(name):
            whole = self._edited(editors, name, whole)
            value = parts.part(name, whole)
        self._record(parts.show(name, whole))
        return value

    def _record(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Show whole values of a model that is split across processes to the recorders."""
        for name, value in values:
            self._visited(self.recorders(name), name, value)

    def fail_together(self) -> None:
        """Raise an edit's error in all processes that the model is split across."""
        if self.parts and any(visitor.edits for visitor in self.own_visitors()):
            self.parts.fail_together()

    def watching_steps(self, where: str) -> list[Visitor]:
        """This thread's visitors that want an attention's scores or pattern."""
        return self.watching(f"{where}.attention.scores") + self.watching(f"{where}.attention.pattern")

    def see_shares(self, where: str, added: Tensor, out: Tensor, wo: nn.Module) -> Tensor:
        """Show each head's share of an attention's output, if a visitor wants them; return `added` with its edits."""
        name = f"{where}.attention.head_result"
        watching = self.watching(name)
        if not watching:
            return added
        return add_by_head(added, out, wo, lambda shares: self.see(name, shares), in_path(watching))

    # ---- the forwards: model.py's lines, each value passed through `see`

    def embed(self, tokens: Tensor) -> Tensor:
        self.local.tokens = tokens
        if self.parts and self.own_visitors():
            names = all_names(self.parts.args)
            self.parts.begin(tokens, [name for name in names if self.watching(name)])
        return type(self.model).embed(self.model, tokens)

    def _begin(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Start a pass at layer 0, the first module that receives the context; x is the embedding's output."""
        x, context, *rest = inputs
        self.local.run = Pass(self.local.tokens, context)
        self.local.in_pass = True
        for visitor in self.own_visitors():
            visitor.begin(self.local.run)
        if not self.local.run.is_read:
            self._leave_out_unwatched(self.local.run)
        is_embedded_here = self.parts is None or self.parts.job.share.is_first_stage
        return self.see("embedding", x) if is_embedded_here else x, context, *rest

    def _leave_out_unwatched(self, run: Pass) -> None:
        """End a pass early if its output is not read; only for texts without images, in one process."""
        if self.parts or run.cache is not None or self.watching("norm") or self.watching("logits"):
            return
        layers = run.layers if run.layers is not None else range(self.model.args.n_layers)
        for i in reversed(layers):
            watched = [part for part in LAYER_AXES if self.watching(f"layers.{i}.{part}")]
            if watched:
                run.layers = range(layers.start, i + 1)
                run.ends_in_attention = all(part == "residual_pre" or part.startswith("attention.") for part in watched)
                return
        run.layers = range(0)

    def block(self, block: TransformerBlock, where: str, x: Tensor, context: Context, layer: int) -> Tensor:
        layers = self.local.run.layers
        if layers is not None and self.first_layer + layer not in layers:
            return x
        x = self.see(f"{where}.residual_pre", x)
        x = x + block.attention(block.attention_norm(x), context, layer)
        if layers is not None and self.local.run.ends_in_attention and layer == layers[-1]:
            return x
        x = self.see(f"{where}.residual_mid", x)
        added = self.see(f"{where}.ffn.output", block.feed_forward(block.ffn_norm(x)))
        return self.see(f"{where}.residual_post", x + added)

    def attention(self, module: Attention, where: str, x: Tensor, context: Context, layer: int) -> Tensor:
        def see(name: str, value: Tensor) -> Tensor:
            return self.see(f"{where}.attention.{name}", value)

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
        watching = self.watching_steps(where)
        if watching:
            cache: KVCache | None = self.local.run.cache
            if cache is not None:
                k, v = cache.read(layer, context.n_seen)  # (B, S, K, hd)
            out = attend_in_steps(out, q, k, v, context.visible, see, in_path(watching))
        out = see("head_output", out)
        return see("output", self.see_shares(where, module.wo(out.flatten(-2)), out, module.wo))  # (B, T, D)

    def feed_forward(self, module: FeedForward, where: str, x: Tensor) -> Tensor:
        """Run a feed-forward. The caller shows the output to visitors, since a block may apply a gate to it."""

        def see(name: str, value: Tensor) -> Tensor:
            return self.see(f"{where}.ffn.{name}", value)

        x = see("norm", x)
        hidden = F.silu(see("gate", module.w1(x))) * see("up", module.w3(x))
        return module.w2(see("hidden", hidden))

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        out = _class_forward(module, x)
        if not getattr(self.local, "in_pass", False):  # a direct call of the norm
            return self._edited_outside("norm", out) if getattr(self.local, "is_outside", False) else out
        if self.parts is None or self.parts.job.share.is_last_stage:
            out = self.see("norm", out)
        self.local.in_pass = False
        if self.parts:
            self._record(self.parts.end())
            self.fail_together()
        # Generation computes logits only at some positions; recorders get all, computed here.
        if recorders := self.recorders("logits"):
            logits = self.model.logits(out)
            for visitor in recorders:
                visitor.visit("logits", logits, self.local.run)
        self.local.run.complete = True
        return out

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        out = _class_forward(module, x)
        editors = self.editors("logits")
        if not editors:
            return out
        logits = out.float()
        if self._is_outside():
            edited = self._edited_outside("logits", logits)
        else:  # (B, T, V), or one position: (B, V)
            by_position = logits if logits.dim() > 2 else logits[:, None]
            edited = self._edited(editors, "logits", by_position, by_all_stages=True).view_as(logits)
        self.fail_together()
        return edited

    def _edited_outside(self, name: str, value: Tensor) -> Tensor:
        """Edit values (…, n) that are not those of a pass, as if they were one text's."""
        editors = self.editors(name)
        if not editors:
            return value
        one_text = value.reshape(1, -1, value.shape[-1])
        return self._edited(editors, name, one_text, by_all_stages=name == "logits").view_as(value)


class _Forward:
    """An instrumented forward of a module, recognized by its type."""

    def __init__(self, forward: Callable[..., Tensor], module: nn.Module, *where: str):
        self.forward, self.bound = forward, (module, *where)

    def __call__(self, *args: Any) -> Tensor:
        return self.forward(*self.bound, *args)


def _class_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Call the forward of a module's class."""
    return type(module).forward(module, x)


def in_path(visitors: list[Visitor]) -> bool:
    """Whether gradients should reach the values that one of them keeps."""
    return any(visitor.in_path for visitor in visitors)
