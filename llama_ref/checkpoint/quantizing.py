"""A checkpoint written anew in eight or four bits, in a folder that loads at once (checkpoint/quantized.py)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.checkpoint.convert import Progress, Source, Written, write_native_tokenizer
from llama_ref.checkpoint.folder import QUANTIZATION, open_folder
from llama_ref.checkpoint.hf_config import params_of
from llama_ref.checkpoint.outgoing import Outgoing
from llama_ref.checkpoint.quantized import parts_of
from llama_ref.checkpoint.safetensors_writer import write_safetensors
from llama_ref.checkpoint.slices import WHOLE
from llama_ref.checkpoint.verified import Verify
from llama_ref.checkpoint.weights import load_model
from llama_ref.checkpoint.writing import new_folder, write_params, write_sums
from llama_ref.errors import RequestError
from llama_ref.quantization.calibration import N_TOKENS, calibration_text, importances
from llama_ref.quantization.rounding import int4_scales, int8_scales, to_int4, to_int8
from llama_ref.quantization.scheme import Scheme


def quantize_folder(
    source: str | Path,
    target: str | Path,
    scheme: Scheme | str,
    *,
    calibrate: bool | str = True,
    force: bool = False,
    verify: Verify = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write a folder's model in fewer bits: params.json naming the scheme, model.safetensors, tokenizer, checklist.chk.

    To four bits, the model first reads `calibrate` (True: a text of this project's choice), and errors count by what its layers
    saw, which leaves half the divergence or less (scripts/bench_quality.py). With False, and to eight bits, the folder loads
    as, bit for bit, what loading the source with `quantize` gives. Some rows are held at a time, and the scales. `verify`: as
    `Llama.build` has it.
    Raises RequestError for a matrix that the scheme cannot hold, a source that is quantized already or has no tokenizer to
    calibrate with, or a `target` that is taken; CheckpointError for a source that cannot be read, is damaged or changes
    meanwhile, and for a target that cannot be written.
    """
    scheme = Scheme.parse(scheme)
    if open_folder(source).is_quantized:
        raise RequestError(f"{source} is quantized already: quantize the folder that it was made from")
    source = Source.open(source)
    plain, seen = source.outgoing(WHOLE, None), {}
    tensors = [part for tensor in plain for part in _Quantized(scheme, tensor, seen).outgoing()]
    written = Written(progress, [tensors])
    with new_folder(target, force=force, n_bytes=written.total) as folder, source.unchanged(verify):
        if scheme.bits == 4 and calibrate:
            seen |= _seen(source, calibration_text() if calibrate is True else calibrate)
        _write_params(folder, source, scheme)
        write_native_tokenizer(folder, source)
        write_safetensors(folder / "model.safetensors", tensors, written.more)
        write_sums(folder, [path.name for path in folder.iterdir()])
    return Path(target)


def _seen(source: Source, text: str) -> dict[str, Tensor]:
    """What the model's layers see of a text. Raises RequestError where the folder cannot read it."""
    if source.tokenizer is None:
        raise RequestError(f"{source.folder.path} has no tokenizer to read a text with: fetch it, or leave calibration out")
    tokens = source.tokenizer.encode(text, bos=True, eos=False)[:N_TOKENS]
    return importances(load_model(source.folder, source.folder.read_args()), tokens)


def _write_params(folder: Path, source: Source, scheme: Scheme) -> None:
    """As they were, unknown keys included, and how the weights were quantized."""
    params = params_of(source.args) if source.folder.is_hugging_face else json.loads(source.folder.params.read_bytes())
    if "n_kv_heads" in params:
        params["n_kv_heads"] = source.args.n_kv_heads
    write_params(folder, params | {QUANTIZATION: scheme.to_params()})


@dataclass
class _Quantized:
    """One tensor on its way into a quantized folder.

    A file has the scales before the numbers, which hang on them: the source is read twice, and the scales are kept between.
    """

    scheme: Scheme
    tensor: Outgoing
    importances: Mapping[str, Tensor]  # filled when the first scale is asked for
    scales: list[Tensor] = field(default_factory=list)  # of the whole tensor: scale, and zero where there is one

    @property
    def bits(self) -> int | None:
        return self.scheme.bits_of(self.tensor.name)

    def outgoing(self) -> list[Outgoing]:
        """The tensors that it is stored as. Raises RequestError where the scheme cannot hold it."""
        if self.bits is None:
            return [self.tensor]
        parts = parts_of(self.scheme, self.tensor.name, self.tensor.shape)
        makers = (self._numbers, lambda: self._scale(0), lambda: self._scale(1))
        return [Outgoing(name, shape, dtype, make) for (name, (shape, dtype)), make in zip(parts.items(), makers, strict=False)]

    def _scale(self, index: int) -> Iterator[Tensor]:
        if not self.scales:
            found = [self._scales_of(rows) for rows in self.tensor.blocks()]
            self.scales = [torch.cat(blocks) for blocks in zip(*found, strict=True)]
        yield self.scales[index]

    def _scales_of(self, rows: Tensor) -> tuple[Tensor, ...]:
        if self.bits == 8:
            return (int8_scales(rows),)
        name = self.tensor.name
        return int4_scales(rows, self.scheme.group_for(name, rows.shape[1]), self.importances.get(name))

    def _numbers(self) -> Iterator[Tensor]:
        start = 0
        for rows in self.tensor.blocks():
            scales = [scale[start : start + len(rows)] for scale in self.scales]
            yield to_int8(rows, *scales) if self.bits == 8 else to_int4(rows, *scales)
            start += len(rows)
