"""Run a benchmark: contestants take turns, each in its own process."""

import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama_ref.bench.costs import flops
from llama_ref.bench.machine import describe_machine
from llama_ref.bench.process import Failed, Process
from llama_ref.bench.results import LongResult, Report, Result, Round, Spread, Work
from llama_ref.bench.settings import OURS, Settings, missing_packages
from llama_ref.bench.worker import PROBE
from llama_ref.checkpoint.folder import open_folder
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.machine.busy import OtherPrograms

WARMUP_TOKENS = 8
Status = Callable[[str], None]


def compare(settings: Settings, status: Status = lambda text: None) -> Report:
    """Measure a checkpoint with this package and with `settings.against`.

    `status` gets each step's name.
    A peer that fails is left out, with a note that says why. Raises the errors of loading our own
    model, and LlamaRefError if it fails later.
    """
    with tempfile.TemporaryDirectory(prefix="llama-ref-bench-") as scratch, ExitStack() as stack:
        return _Comparison(settings, Path(scratch), stack, status).run()


class _Comparison:
    def __init__(self, settings: Settings, scratch: Path, stack: ExitStack, status: Status):
        self.settings, self.scratch, self.stack, self.status = settings, scratch, stack, status
        self.args = open_folder(settings.name).read_args()
        self.processes: dict[str, Process] = {}
        self.started: list[Process] = []
        self.others = OtherPrograms(self._own_seconds)
        self.facts: dict[str, dict[str, Any]] = {}  # each contestant's answer to "load"
        self.rounds: dict[tuple[str, int], list[Round]] = defaultdict(list)
        self.long_rounds: dict[int, list[Round]] = defaultdict(list)  # by context
        self.reads: list[float] = []  # bytes per second
        self.notes: list[str] = []

    def run(self) -> Report:
        settings = self.settings
        for name in (OURS, *settings.against, PROBE):
            self._load(name)
        for batch in settings.batches:
            for name in self._contestants():
                self.status(f"{name} warms up, batch {batch}")
                self._ask(name, "generate", prompts=self._prompts(batch), gen_len=min(WARMUP_TOKENS, settings.gen_len))
        for context in settings.contexts:
            self.status(f"{OURS} warms up, context {context:,}")
            self._ask(OURS, "generate_after", context=context, gen_len=min(WARMUP_TOKENS, settings.gen_len))
        for number in range(settings.rounds):
            self.status(f"round {number + 1} of {settings.rounds}")
            for batch in settings.batches:
                self._take_turns(batch)
            for context in settings.contexts:
                answer = self._ask(OURS, "generate_after", context=context, gen_len=settings.gen_len)
                if answer:
                    self.long_rounds[context].append(Round(**answer))
        return self._report()

    def _load(self, name: str) -> None:
        missing = missing_packages(name) if name in self.settings.against else None
        if missing:
            self.notes.append(missing)
            return
        self.status(f"{name} loads")
        self.processes[name] = process = Process(name, self.settings.threads, self.scratch)
        self.started.append(process)
        self.stack.callback(process.end)
        facts = self._ask(name, "load", settings=asdict(self.settings), scratch=str(self.scratch))
        if facts:
            self.facts[name] = facts

    def _take_turns(self, batch: int) -> None:
        for name in self._contestants():
            answer = self._ask(name, "generate", prompts=self._prompts(batch), gen_len=self.settings.gen_len)
            if answer:
                self.rounds[name, batch].append(Round(**answer))
        read = self._ask(PROBE, "read") if PROBE in self.processes else None
        if read:
            self.reads.append(read["bytes_per_second"])

    def _ask(self, name: str, request: str, **arguments: Any) -> dict[str, Any] | None:
        """A contestant's answer; None if a peer failed, which is then left out."""
        try:
            return self.processes[name].ask(request, **arguments)
        except (Failed, RequestError) as error:
            if name == OURS:
                raise error if isinstance(error, RequestError) else LlamaRefError(str(error)) from None
            self.notes.append(f"{name} is left out: {error}")
            self.processes.pop(name).end()
            return None

    def _own_seconds(self) -> float:
        """CPU seconds of this benchmark, in all its processes."""
        return time.process_time() + sum(process.cpu_seconds() for process in self.started)

    def _contestants(self) -> list[str]:
        return [name for name in self.processes if name != PROBE]

    def _prompts(self, batch: int) -> list[list[int]]:
        """Prompts of random ids, since speed does not depend on the text."""
        ids = random.Random(batch)
        return [[ids.randrange(self.args.vocab_size) for _ in range(self.settings.prompt_len)] for _ in range(batch)]

    def _report(self) -> Report:
        hint = self.others.hint(self.settings.threads) if torch.device(self.settings.device).type == "cpu" else None
        notes = [*self.notes, hint] if hint else self.notes
        bandwidth = Spread.from_values(self.reads) if self.reads else None
        contestants = self._contestants()
        results = [self._result(name, batch, bandwidth) for batch in self.settings.batches for name in contestants]
        machine = describe_machine(torch.device(self.settings.device), [name for name in contestants if name != OURS])
        long = [self._long_result(context, bandwidth) for context in self.settings.contexts]
        return Report(machine, self.settings, self.settings.command, bandwidth, results, long, notes)

    def _result(self, name: str, batch: int, bandwidth: Spread | None) -> Result:
        s, facts = self.settings, self.facts[name]
        rounds, ours = self.rounds[name, batch], self.rounds[OURS, batch]
        pairs = list(zip(rounds, ours, strict=True))
        decode = Spread.from_values(batch * (s.gen_len - 1) / r.decode_seconds for r in rounds)
        prefill, step = self._prefill_work(batch, facts), self._decode_work(batch, s.prompt_len, facts)
        matmuls = [r.matmul_seconds for r in rounds if r.matmul_seconds is not None]
        fractions = [r.matmul_seconds / r.first_seconds for r in rounds if r.matmul_seconds is not None]
        return Result(
            contestant=name,
            precision=facts["precision"],
            batch=batch,
            first_token=Spread.from_values(r.first_seconds for r in rounds),
            prefill=Spread.from_values(batch * s.prompt_len / r.first_seconds for r in rounds),
            decode=decode,
            peak_bytes=max(r.peak_bytes for r in rounds),
            bytes_per_token=step.bytes,
            bandwidth_fraction=step.bytes * decode.median / bandwidth.median if bandwidth else None,
            matmul_fraction=Spread.from_values(fractions).median if fractions else None,
            matmul_flops=self._matmul_flops(batch, matmuls) if matmuls else None,
            prefill_work=prefill,
            decode_work=step,
            prefill_ratio=None if name == OURS else Spread.from_values(r.first_seconds / o.first_seconds for r, o in pairs),
            decode_ratio=None if name == OURS else Spread.from_values(r.decode_seconds / o.decode_seconds for r, o in pairs),
            same_tokens=_common_prefix(rounds[-1].tokens, ours[-1].tokens),
        )

    def _long_result(self, context: int, bandwidth: Spread | None) -> LongResult:
        n, facts = self.settings.gen_len, self.facts[OURS]
        shortest = self.settings.contexts[0]
        decode = Spread.from_values((n - 1) / each.decode_seconds for each in self.long_rounds[context])
        pairs = zip(self.long_rounds[context], self.long_rounds[shortest], strict=True)
        longer = Spread.from_values((each.decode_seconds - least.decode_seconds) / (n - 1) for each, least in pairs).median
        work, more = self._decode_work(1, context, facts), facts["kv_bytes"] * (context - shortest)
        return LongResult(
            context=context,
            decode=decode,
            work=work,
            kv_bytes=work.bytes - facts["weight_bytes"],
            bandwidth_fraction=work.bytes * decode.median / bandwidth.median if bandwidth else None,
            growth_fraction=more / longer / bandwidth.median if bandwidth and more and longer > 0 else None,
        )

    def _decode_work(self, batch: int, context: int, facts: dict[str, Any]) -> Work:
        """Work per token halfway through decoding; sequences share the reading of weights."""
        seen = context + self.settings.gen_len / 2
        return Work(flops(self.args, 1, seen, 1), facts["weight_bytes"] / batch + facts["kv_bytes"] * seen)

    def _prefill_work(self, batch: int, facts: dict[str, Any]) -> Work:
        """Work per prompt token, if weights are read once, and keys and values only written."""
        n = self.settings.prompt_len
        return Work(flops(self.args, n, n * (n + 1) / 2, 1) / n, facts["weight_bytes"] / (batch * n) + facts["kv_bytes"])

    def _matmul_flops(self, batch: int, seconds: list[float]) -> float:
        """Operations per second of the prefill's matrix products, measured alone."""
        all_flops = batch * flops(self.args, self.settings.prompt_len, 0, 1)
        return all_flops / Spread.from_values(seconds).median


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
