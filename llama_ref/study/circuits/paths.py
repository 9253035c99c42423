"""Path patching: the direct effect of one part of a model on others, excluding the parts between.

A sender's output is replaced by that of another text; every part between it and the receivers stays as in
the clean run; the receivers read the change, and everything after them is recomputed. Sources: Wang et al.,
arXiv:2211.00593; Goldowsky-Dill et al., arXiv:2304.05969.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.circuits.graph import edge_mask, receiver_names, sender_names
from llama_ref.study.circuits.rerun import Rerun, Senders
from llama_ref.study.circuits.runs import Run, as_runs
from llama_ref.study.inputs import check_index
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.passes.pass_size import tokens_that_fit
from llama_ref.study.patch import Indices
from llama_ref.study.patching.metrics import Metric
from llama_ref.study.patching.pairs import Corrupted
from llama_ref.study.texts import Texts


@dataclass(frozen=True)
class PathEffects:
    """The metric where the receivers read each sender's change: `values`, float32 (senders,), on the CPU.

    `clean` and `corrupted` are the metric of the two texts. All are means over the pairs.
    """

    senders: list[str]
    values: Tensor
    clean: float
    corrupted: float

    @property
    def shares(self) -> Tensor:
        """Share of the texts' difference that each path carries: 0 if the metric stays clean, 1 if it becomes corrupted."""
        return (self.clean - self.values) / (self.clean - self.corrupted or math.nan)

    def top(self, n: int) -> list[tuple[str, float]]:
        """The n senders that change the metric most, and by how much; largest change first."""
        changes = dict(zip(self.senders, (self.values - self.clean).tolist(), strict=True))
        return sorted(changes.items(), key=lambda each: -abs(each[1]))[:n]


@torch.no_grad()
def patch_path(
    model: Transformer,
    clean: Texts,
    corrupted: Corrupted,
    metrics: Metric | Sequence[Metric],
    *,
    receivers: str | Sequence[str],
    sender: str | Sequence[str] | None = None,
    positions: Indices | None = None,
    through_ffn: bool = False,
    progress: Progress | None = None,
) -> PathEffects:
    """Measure direct effects: run the clean text where the receivers read a sender of the corrupted text.

    Texts, noise and metrics are those of `patch_grids`; swap the texts to restore instead of corrupt.
    Names and globs are those of `attribute_edges`: senders "embedding", "layers.18.heads.6",
    "layers.5.ffn"; receivers "layers.23.heads.3.q", "layers.23.groups.1.k" (keys and values belong to
    groups of heads), "layers.23.ffn", "logits". All `receivers` read the change at once: it is added to the
    input of each, so a later receiver also reads what earlier ones changed. Several senders are patched
    one by one (default: all that come before a receiver), the matches of one glob together. `positions`
    are the tokens at which the sender is changed (default: all). Between sender and receivers all heads
    are frozen, and so are feed-forwards, unless `through_ffn` recomputes these from their inputs so that
    paths through them count. `progress` is called with the senders done and their number. Raises
    RequestError for names that match nothing, and for a sender that no receiver follows.
    """
    check_model(model)
    heard = _matches("receiver", receivers, receiver_names(model.args))
    named = _sender_groups(model.args, sender, heard)
    runs = as_runs(model, clean, corrupted, metrics)
    values, ends = torch.zeros(len(named), device="cpu"), [0.0, 0.0]
    counter = ProgressCounter(len(named) * len(runs), progress)
    chosen = torch.stack(list(named.values())).to(model.device, torch.float32)
    for run in runs:
        senders = Senders.from_run(model, run, _positions(run, positions))
        rerun = Rerun(model, run, senders, heard, through_ffn=through_ffn)
        found = []
        for rows in chosen.split(max(1, tokens_that_fit(model, "residual_pre", len(run.text)) // len(run.text))):
            found.append(rerun.measure(rows))
            counter.advance(len(rows))
        values += run.weight * torch.cat(found)
        ends = [total + run.weight * own for total, own in zip(ends, senders.metrics, strict=True)]
    return PathEffects(list(named), values, *ends)


def _sender_groups(args: ModelArgs, sender: str | Sequence[str] | None, receivers: Sequence[str]) -> dict[str, Tensor]:
    """The senders that are patched together, by the given name or glob: bool (senders,) each."""
    names, mask = sender_names(args), edge_mask(args)
    known = {name: i for i, name in enumerate(receiver_names(args))}
    heard = mask[[known[receiver] for receiver in receivers]].any(0)  # senders that at least one receiver reads
    if sender is None:
        sender = [name for name, is_heard in zip(names, heard.tolist(), strict=True) if is_heard]
    out = {}
    if not sender or not isinstance(sender, str | Sequence):
        raise RequestError(f"sender is {sender!r:.60}, expected a name such as {names[-2]}, a list of them, or None for all")
    for glob in [sender] if isinstance(sender, str) else sender:
        chosen = torch.tensor([name in _matches("sender", glob, names) for name in names], device="cpu")
        if not (chosen & heard).any():
            last = [name for name, is_heard in zip(names, heard.tolist(), strict=True) if is_heard][-1]
            raise RequestError(f"no path leads from {glob!r:.60} to the receivers: the last sender that they read is {last}")
        out[glob] = chosen
    return out


def _matches(what: str, globs: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that any of the globs matches. Raises RequestError for a glob without a match."""
    given = [globs] if isinstance(globs, str) else globs
    if not isinstance(given, Sequence) or not given or not all(isinstance(glob, str) for glob in given):
        raise RequestError(f"{what} is {globs!r:.60}, expected a name such as {names[-2]}, or a list of them")
    for glob in given:
        if not any(fnmatchcase(name, glob) for name in names):
            raise RequestError(f"no {what} is called {glob!r:.60}; names are {', '.join(names[:2])}, … {', '.join(names[-3:])}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in given)]


def _positions(run: Run, given: Indices | None) -> list[int]:
    n = len(run.text)
    if given is None:
        return list(range(n))
    wanted = given if isinstance(given, Sequence) else [given]
    return [check_index("a position", position, n) for position in wanted]
