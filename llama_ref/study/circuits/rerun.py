"""Passes for path patching (paths.py): run a clean text where some receivers read the changes of some senders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.model import Transformer
from llama_ref.study.circuits.graph import n_before
from llama_ref.study.circuits.runs import Run, differences, written_names
from llama_ref.study.passes.layer_window import layer_window
from llama_ref.study.patch import patch
from llama_ref.study.patching.metrics import measure, measure_hidden
from llama_ref.study.texts import Batch
from llama_ref.study.trace import Trace, trace

PORTS = {"q": ("q_unrotated", "wq"), "k": ("k_unrotated", "wk"), "v": ("v", "wv")}
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Senders:
    """How each sender's output changes from the clean text to the other: `changes`, float32 (senders, T, D).

    `clean` has the clean run's streams and outputs, `metrics` the metric of both texts; `changed`, bool
    (T,), marks the tokens with changes.
    """

    changes: Tensor
    changed: Tensor
    clean: Trace
    metrics: tuple[float, float]

    @classmethod
    def from_run(cls, model: Transformer, run: Run, positions: Sequence[int]) -> "Senders":
        layers = [f"layers.{layer}" for layer in range(model.args.n_layers)]
        parts = ("residual_pre", "residual_mid", "residual_post", "attention.output")
        clean = run.trace(
            model, 1.0, [*written_names(model), *(f"{layer}.{part}" for layer in layers for part in parts), "norm"]
        )
        other = run.trace(model, 0.0, [*written_names(model), "norm"])
        changed = torch.zeros(len(run.text), dtype=torch.bool, device=model.device)
        changed[list(positions)] = True
        batch = Batch.from_texts(model, [run.text])
        ours, theirs = (measure_hidden(model, batch, end["norm"], [run.metric]).item() for end in (clean, other))
        return cls(-differences(model, run, clean, other) * changed[:, None], changed, clean, (ours, theirs))


class Rerun:
    """Passes of a run's clean text in which `receivers` read the senders' changes."""

    def __init__(self, model: Transformer, run: Run, senders: Senders, receivers: Sequence[str], *, through_ffn: bool):
        self.model, self.run, self.senders = model, run, senders
        self.ports = receiver_ports(model.args, receivers)
        self.layers = [int(name.split(".")[1]) for name in self.ports]
        self.through_ffn = through_ffn

    def measure(self, rows: Tensor) -> Tensor:
        """The metric where each row's senders, float32 (rows, senders) of 0 and 1, are changed: (rows,), on the CPU."""
        changes = self._through_ffn(rows) if self.through_ffn else self._direct(rows)
        first = min(self.layers)
        before = self.senders.clean[f"layers.{first - 1}.residual_post"] if first else self.run.clean[None]
        batch = Batch.from_texts(self.model, [self.run.text] * len(rows))
        layers = range(first, self.model.args.n_layers)
        with layer_window(self.model, layers, before.expand(len(rows), -1, -1)), patch(self.model, self._readers(changes)):
            return measure(self.model, batch, [self.run.metric] * len(rows)).cpu()

    # ---- changes of the streams that the receivers read: float32 (rows, T, D) by the stream's name

    def _direct(self, rows: Tensor) -> dict[str, Tensor]:
        out = {}
        for name in self.ports:
            stream = stream_of(name)
            n = senders_before(self.model.args, stream)
            out[stream] = torch.einsum("rs,std->rtd", rows[:, :n], self.senders.changes[:n])
        return out

    def _through_ffn(self, rows: Tensor) -> dict[str, Tensor]:
        """Run the text with frozen heads, so that feed-forwards propagate the changes."""
        clean, changes = self.senders.clean, self.senders.changes
        streams = list(dict.fromkeys(map(stream_of, self.ports)))
        edits: dict[str, Change] = {}
        for layer in range(max(self.layers) + 1):
            first = n_before(self.model.args, layer)
            ffn = first + self.model.args.n_heads
            added = torch.einsum("rs,std->rtd", rows[:, first:ffn], changes[first:ffn])
            edits[f"layers.{layer}.attention.output"] = _set_to(clean[f"layers.{layer}.attention.output"] + added)
            is_sender = rows[:, ffn, None, None].bool() & self.senders.changed[:, None]
            edits[f"layers.{layer}.ffn.output"] = _set_where(is_sender, clean[f"layers.{layer}.ffn.output"] + changes[ffn])
        embedded = self.run.clean
        start = (embedded + rows[:, 0, None, None] * changes[0]).to(embedded)
        with layer_window(self.model, range(max(self.layers) + 1), start), patch(self.model, edits):
            found = trace(self.model, [self.run.text] * len(rows), streams)
        return {name: found[name].float() - clean[name].float() for name in streams}

    # ---- the receivers, which read the stream of this run plus the change

    def _readers(self, changes: dict[str, Tensor]) -> dict[str, Change]:
        out: dict[str, Change] = {}
        for name, heads in self.ports.items():
            if name.endswith("residual_post"):
                out[name] = _add(changes[name])
                continue
            stream = _Stream(changes[stream_of(name)])
            out[stream_of(name)] = _chain(out.get(stream_of(name)), stream.note)
            out[name] = self._reader(name, heads, stream)
        return out

    def _reader(self, name: str, heads: list[int], stream: "_Stream") -> Change:
        block = self.model.layers[int(name.split(".")[1])]
        if name.endswith("ffn.norm"):
            return lambda value: block.ffn_norm(stream.changed())
        (matrix,) = (matrix for activation, matrix in PORTS.values() if name.endswith(f".{activation}"))

        def change(value: Tensor) -> Tensor:
            read = block.attention.get_submodule(matrix)(block.attention_norm(stream.changed()))
            value[:, :, heads] = read.view_as(value)[:, :, heads]
            return value

        return change


class _Stream:
    """A stream of the current pass, and the same with a change (rows, T, D) added."""

    def __init__(self, change: Tensor):
        self.change = change

    def note(self, value: Tensor) -> Tensor:
        self.value = value
        return value

    def changed(self) -> Tensor:
        return (self.value.float() + self.change).to(self.value)


def receiver_ports(args: ModelArgs, receivers: Sequence[str]) -> dict[str, list[int]]:
    """The activations of receivers, in the model's order, with their heads; an empty list if they have no heads."""
    out: dict[str, list[int]] = {}
    for name in receivers:
        if name == "logits":
            out[f"layers.{args.n_layers - 1}.residual_post"] = []
        elif name.endswith(".ffn"):
            out[f"{name}.norm"] = []
        else:
            _, layer, _, head, port = name.split(".")
            out.setdefault(f"layers.{layer}.attention.{PORTS[port][0]}", []).append(int(head))
    return out


def stream_of(name: str) -> str:
    """The residual stream that a receiver's activation is read from."""
    _, layer, part = name.split(".", 2)
    point = "residual_pre" if part.startswith("attention") else "residual_mid" if part.startswith("ffn") else part
    return f"layers.{layer}.{point}"


def senders_before(args: ModelArgs, stream: str) -> int:
    """The number of senders that have written to a residual stream."""
    _, layer, point = stream.split(".")
    written = {"residual_pre": 0, "residual_mid": args.n_heads, "residual_post": args.n_heads + 1}
    return n_before(args, int(layer)) + written[point]


def _set_to(wanted: Tensor) -> Change:
    return lambda value: wanted.to(value).expand_as(value)


def _set_where(chosen: Tensor, wanted: Tensor) -> Change:
    return lambda value: torch.where(chosen, wanted.to(value), value)


def _add(change: Tensor) -> Change:
    return lambda value: (value.float() + change).to(value)


def _chain(first: Change | None, second: Change) -> Change:
    return second if first is None else lambda value: second(first(value))
