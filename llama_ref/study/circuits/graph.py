"""A model as a graph of the parts that write to the residual stream and those that read from it.

Senders write: the embedding, every head, every feed-forward. Receivers read, through a norm: the
queries of every head, the keys and the values of every group of heads that share them, every
feed-forward, and the logits. An edge leads from a sender to each receiver after it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.numbers import is_whole


def sender_names(args: ModelArgs) -> list[str]:
    """Names of all senders: embedding, layers.0.heads.0, …, layers.0.ffn, layers.1.heads.0, …"""
    out = ["embedding"]
    for layer in range(args.n_layers):
        out += [f"layers.{layer}.heads.{head}" for head in range(args.n_heads)]
        out.append(f"layers.{layer}.ffn")
    return out


def receiver_names(args: ModelArgs) -> list[str]:
    """Names of all receivers: layers.0.heads.0.q, …, layers.0.groups.0.k, …, layers.0.groups.0.v, …, layers.0.ffn, …, logits"""
    out = []
    for layer in range(args.n_layers):
        out += [f"layers.{layer}.heads.{head}.q" for head in range(args.n_heads)]
        out += [f"layers.{layer}.groups.{group}.{port}" for port in "kv" for group in range(args.n_kv_heads)]
        out.append(f"layers.{layer}.ffn")
    return [*out, "logits"]


def n_before(args: ModelArgs, layer: int) -> int:
    """The number of senders before a layer's attention: the first ones of `sender_names`."""
    return 1 + layer * (args.n_heads + 1)


def first_receiver(args: ModelArgs, layer: int) -> int:
    """Index of a layer's first receiver; for the layer after the last, the index of the logits."""
    return layer * (args.n_heads + 2 * args.n_kv_heads + 1)


def edge_mask(args: ModelArgs) -> Tensor:
    """A mask of the pairs that are edges: bool (receivers, senders), on the CPU."""
    before: list[int] = []
    for layer in range(args.n_layers):
        before += [n_before(args, layer)] * (args.n_heads + 2 * args.n_kv_heads)
        before.append(n_before(args, layer) + args.n_heads)
    before.append(n_before(args, args.n_layers))
    return torch.arange(n_before(args, args.n_layers), device="cpu") < torch.tensor(before, device="cpu")[:, None]


@dataclass(frozen=True)
class Edge:
    """An edge; `score` estimates how much the metric falls if the receiver reads the corrupted sender."""

    sender: str
    receiver: str
    score: float


@dataclass(frozen=True)
class EdgeScores:
    """A score for every edge: float32 (receivers, senders) on the CPU, 0 for pairs that are not edges.

    `mask` is true for edges. `clean` and `corrupted` are the metric of the two texts (means over pairs).
    """

    scores: Tensor
    mask: Tensor
    senders: list[str]
    receivers: list[str]
    clean: float
    corrupted: float

    @property
    def nodes(self) -> dict[str, float]:
        """Each sender's score: the sum over its edges, which estimates the loss if all receivers read it corrupted."""
        return dict(zip(self.senders, self.scores.double().sum(0).tolist(), strict=True))

    def top(self, n: int) -> list[Edge]:
        """The n edges with the largest absolute scores, largest first."""
        receivers, senders = self._order(n).T.tolist()
        pairs = zip(receivers, senders, strict=True)
        return [Edge(self.senders[s], self.receivers[r], self.scores[r, s].item()) for r, s in pairs]

    def keep_edges(self, n: int) -> Tensor:
        """A mask of the top n edges only: bool (receivers, senders)."""
        out = torch.zeros_like(self.mask)
        out[tuple(self._order(n).T)] = True
        return out

    def keep_nodes(self, n: int) -> Tensor:
        """A mask of all edges of the n senders with the largest absolute scores."""
        _check_count(n, len(self.senders), "nodes")
        chosen = torch.tensor(list(self.nodes.values()), device="cpu").abs().argsort(descending=True, stable=True)[:n]
        out = torch.zeros_like(self.mask)
        out[:, chosen] = True
        return out & self.mask

    def _order(self, n: int) -> Tensor:
        """Receiver and sender of the top n edges: (n, 2)."""
        edges = self.mask.nonzero()
        _check_count(n, len(edges), "edges")
        return edges[self.scores[self.mask].abs().argsort(descending=True, stable=True)[:n]]

    def _first(self, n: int) -> list[Edge]:
        """The top n edges, or all if there are fewer."""
        return self.top(min(n, int(self.mask.sum())))

    def to_json(self, n: int = 100) -> dict[str, Any]:
        """Baselines, nodes and the top n edges as plain dictionaries."""
        edges = [{"from": edge.sender, "to": edge.receiver, "score": edge.score} for edge in self._first(n)]
        nodes = [{"name": name, "score": score} for name, score in self.nodes.items()]
        return {"clean": self.clean, "corrupted": self.corrupted, "nodes": nodes, "edges": edges}

    def to_dot(self, n: int = 30) -> str:
        """The top n edges as a Graphviz graph; width shows the size of a score, red means negative."""
        edges = self._first(n)
        widest = max((abs(edge.score) for edge in edges), default=0) or 1.0
        lines = [
            f'  "{edge.sender}" -> "{node_of(edge.receiver)}" [label="{port_of(edge.receiver)}", '
            f"penwidth={0.5 + 4 * abs(edge.score) / widest:.2f}, color={'black' if edge.score >= 0 else 'red'}];"
            for edge in edges
        ]
        return "\n".join(["digraph circuit {", "  rankdir=BT; node [shape=box];", *lines, "}", ""])

    def save(self, path: str | Path, n: int = 100) -> None:
        """Write the top n edges as .json or .dot, by the file's suffix. Raises RequestError."""
        kind = Path(path).suffix
        if kind not in (".json", ".dot"):
            raise RequestError(f"{str(path)!r:.80} ends with {kind!r:.20}, expected .json or .dot")
        text = json.dumps(self.to_json(n), indent=2) if kind == ".json" else self.to_dot(n)
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error.strerror or error}") from None


def node_of(receiver: str) -> str:
    """The node of a receiver: layers.3.heads.5.q -> layers.3.heads.5; layers.3.groups.1.k -> layers.3.groups.1"""
    return receiver[:-2] if port_of(receiver) else receiver


def port_of(receiver: str) -> str:
    """The port of a receiver: q, k or v; empty for a feed-forward and the logits."""
    last = receiver.rpartition(".")[2]
    return last if last in ("q", "k", "v") else ""


def _check_count(n: int, most: int, what: str) -> None:
    if not is_whole(n) or not 0 <= n <= most:
        raise RequestError(f"n is {n!r:.40}, expected a number of {what} from 0 to {most}")
