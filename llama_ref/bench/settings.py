"""Settings of a benchmark, checked before anything is loaded."""

import importlib.util
import os
import re
import shlex
from dataclasses import dataclass
from typing import Any

from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.first_load import Verify
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.meta_quantized.matrices import Activations
from llama_ref.checkpoint.reader import stored_kind
from llama_ref.device import choose_device, choose_dtype
from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean, dtype_name
from llama_ref.plan import find_model
from llama_ref.quantization.scheme import Scheme

OURS = "llama_ref"
PEERS = {  # (modules that must be importable, how to install them)
    "transformers": (("transformers",), "pip install transformers"),
    "llama.cpp": (("llama_cpp", "gguf"), "pip install llama-cpp-python gguf"),
    "meta": (("llama_models", "fairscale"), "pip install llama-models, then pip install --no-build-isolation fairscale"),
}
MOST_ROUNDS, MOST_THREADS, MOST_ROWS = 1000, 1024, 1024


@dataclass(frozen=True)
class Settings:
    """Settings of one benchmark. Lengths are in tokens; `gen_len` includes the prefill's token.

    `contexts` are lengths, sorted, after which one sequence is decoded with random keys and values.
    """

    name: str
    quantize: str | None
    compile: bool
    device: str
    dtype: str
    verify: Verify
    in_memory: bool
    prompt_len: int
    gen_len: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    against: tuple[str, ...]
    rounds: int
    threads: int
    activations: Activations | None = None

    @classmethod
    def parse(
        cls,
        name: str,
        *,
        prompt_len: int,
        gen_len: int,
        batch: str,
        context: str | None = None,
        against: str | None = None,
        rounds: int,
        threads: int | None = None,
        quantize: str | None = None,
        activations: Activations | None = None,
        compile: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        verify: Verify = "auto",
        in_memory: bool = False,
    ) -> "Settings":
        """Check a command line's values. Raises RequestError or CheckpointError."""
        threads = default_threads() if threads is None else threads
        _check_number("prompt_len", prompt_len, 1)
        _check_number("gen_len", gen_len, 2)  # the first token comes from the prefill
        _check_number("rounds", rounds, 1, MOST_ROUNDS)
        _check_number("threads", threads, 1, MOST_THREADS)
        chosen = choose_device(device)
        own_dtype = dtype_name(choose_dtype(dtype, chosen))
        scheme = None if quantize is None else str(Scheme.parse(quantize))
        peers = _peers(against)
        if peers and chosen.type != "cpu":
            raise RequestError(
                f"--against compares only on the CPU, but the device is {chosen}: add --device cpu, or leave --against out"
            )
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise RequestError("bench measures one process: start it without torchrun")
        folder, longest = open_folder(name), find_model(name).context
        contexts = () if context is None else tuple(sorted(_numbers("context", context, longest, "8192,32768")))
        for option, length in (("prompt_len", prompt_len), *(("context", length) for length in contexts)):
            if length + gen_len > longest:
                raise RequestError(
                    f"{option} {length:,} + gen_len {gen_len:,} tokens exceed the model's context of {longest:,}"
                )
        if peers and folder.read_args().has_vision:
            raise RequestError(
                f"{folder.path} is a vision model: other programs are compared on text models only; leave --against out"
            )
        if peers and (folder.is_quantized or stored_kind(folder, folder.read_args()) is not Kind.PLAIN):
            raise RequestError(
                f"{folder.path} is quantized, which other programs cannot read: use its source folder, with --quantize"
            )
        return cls(
            name=name,
            quantize=scheme,
            activations=activations,
            compile=compile,
            device=str(chosen),
            dtype=own_dtype,
            verify=verify,
            in_memory=in_memory,
            prompt_len=prompt_len,
            gen_len=gen_len,
            batches=_numbers("batch", batch, MOST_ROWS, "1 or 1,8"),
            contexts=contexts,
            against=peers,
            rounds=rounds,
            threads=threads,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """Restore settings from the JSON of `dataclasses.asdict`."""
        return cls(**values | {key: tuple(values[key]) for key in ("batches", "contexts", "against")})

    @property
    def command(self) -> str:
        """The command line that repeats this benchmark."""
        words = ["llama-ref", "bench", shlex.quote(self.name)]
        if self.quantize:
            words.append(f"--quantize {self.quantize}")
        if self.activations:
            words.append(f"--activations {self.activations}")
        if self.compile:
            words.append("--compile")
        if self.in_memory:
            words.append("--in_memory")
        words += [f"--device {self.device}", f"--dtype {self.dtype}"]
        words += [f"--prompt_len {self.prompt_len}", f"--gen_len {self.gen_len}", f"--batch {','.join(map(str, self.batches))}"]
        if self.contexts:
            words.append(f"--context {','.join(map(str, self.contexts))}")
        if self.against:
            words.append(f"--against {','.join(self.against)}")
        return " ".join([*words, f"--rounds {self.rounds}", f"--threads {self.threads}"])


def default_threads() -> int:
    """PyTorch's default number of threads: OMP_NUM_THREADS, or one per core."""
    import torch

    return torch.get_num_threads()


def missing_packages(peer: str) -> str | None:
    """A note about a peer that is not installed, or None."""
    modules, install = PEERS[peer]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{peer} is left out: {' and '.join(missing)} not installed ({install})" if missing else None


def _check_number(name: str, value: object, least: int, most: int = 1 << 24) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name} is {value!r:.60}, expected a whole number from {least} to {most:,}")


def _numbers(name: str, text: object, most: int, example: str) -> tuple[int, ...]:
    """Parse "1,8" to (1, 8); also accepts a tuple or list of numbers."""
    words = [str(word).strip() for word in (text if isinstance(text, tuple | list) else str(text).split(","))]
    if not words or not all(re.fullmatch("[0-9]{1,8}", word) and 0 < int(word) <= most for word in words):
        raise RequestError(f"{name} is {text!r:.60}, expected numbers from 1 to {most:,}, like {example}")
    return tuple(dict.fromkeys(map(int, words)))


def _peers(text: str | None) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",")] if text else []
    unknown = [word for word in words if word not in PEERS]
    if unknown:
        raise RequestError(
            f"against is {unknown[0]!r:.60}, expected one or more of {','.join(PEERS)}{did_you_mean(unknown[0], PEERS)}"
        )
    return tuple(dict.fromkeys(words))
