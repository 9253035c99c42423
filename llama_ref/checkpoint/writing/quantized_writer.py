"""Quantize a checkpoint to int8 or int4 and save it, for checkpoint/quantized_reader.py."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ref.checkpoint.folder import QUANTIZATION, open_folder
from llama_ref.checkpoint.formats.atomic import new_folder, write_params, write_sums
from llama_ref.checkpoint.formats.lazy_tensor import LazyTensor, row_blocks
from llama_ref.checkpoint.formats.safetensors_writer import write_safetensors
from llama_ref.checkpoint.hf.config import make_params
from llama_ref.checkpoint.loading.first_load import Verify
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.quantized_reader import parts_of
from llama_ref.checkpoint.writing.carried_files import read_carried
from llama_ref.checkpoint.writing.convert import Source, write_conventions, write_native_tokenizer
from llama_ref.errors import RequestError
from llama_ref.parallel.sharding import WHOLE
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.quantization.calibration import N_TOKENS, OnRounded, calibration_text, round_layers
from llama_ref.quantization.linear import Int4Linear
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
    """Write a quantized folder: params.json, model.safetensors, tokenizer and checklist.chk.

    For int4, the model first reads a text, and each layer is rounded to fit its inputs
    (quantization/calibration.py), which leaves at most a third of the divergence
    (scripts/bench_quality.py). `calibrate` is the text; True means the text that comes with this
    package. Memory holds the rounded layers (about 3.7 GB for an 8B), and one layer's float32
    weights and four square matrices as wide as its widest input (about 5 GB).

    With `calibrate` False and for int8, memory holds only some rows and the scales. The folder then
    loads bit for bit as the source does with `quantize`. `verify` is as in `Llama.build`;
    `progress` counts bytes, those of calibrated layers twice, when rounded and when written.

    Raises RequestError for a matrix that the scheme cannot hold, a source that is already quantized
    or has no tokenizer for calibration, or an existing `target`; CheckpointError for a source that
    cannot be read, is damaged or changes while it is read, and for a target that cannot be written.
    """
    scheme = Scheme.parse(scheme)
    if open_folder(source).is_quantized:
        raise RequestError(f"{source} is already quantized: quantize the folder that it was made from")
    opened = Source.open(source)
    if opened.stored.kind is not Kind.PLAIN:
        raise RequestError(
            f"{source} is quantized already (Meta's {opened.stored.kind.value} release): convert it to bf16 first "
            "(`llama-ref convert --to meta`)"
        )
    is_calibrated = bool(calibrate) and scheme.bits == 4
    quantized = [_QuantizedTensor(scheme, tensor, opened.args.head_dim) for tensor in opened.tensors(WHOLE, None)]
    tensors = [part for each in quantized for part in each.tensors()]
    in_layers = {
        part.name: part
        for part in tensors
        if is_calibrated and part.name.startswith("layers.") and part.name.endswith(".packed")
    }
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    written = ProgressCounter(n_bytes + sum(part.nbytes for part in in_layers.values()), progress)
    with new_folder(target, force=force, n_bytes=n_bytes) as folder, opened.unchanged(verify):
        if is_calibrated:
            text = calibrate if isinstance(calibrate, str) else calibration_text()
            layers = _calibrate(opened, scheme, text, lambda name: written.advance(in_layers[f"{name}.packed"].nbytes))
            for each in quantized:
                each.rounded = layers.pop(each.tensor.name, None)
        write_params(folder, _quantized_params(opened, scheme))
        write_native_tokenizer(folder, opened)
        write_conventions(folder, opened)
        write_safetensors(folder / "model.safetensors", tensors, written.advance)
        write_sums(folder, [path.name for path in folder.iterdir()])
    return Path(target)


def _calibrate(source: Source, scheme: Scheme, text: str, rounded: OnRounded) -> dict[str, Int4Linear]:
    """The layers' matrices, calibrated on a text, by tensor name.

    Raises RequestError for a source without a tokenizer.
    """
    if source.tokenizer is None:
        raise RequestError(
            f"{source.folder.path} has no tokenizer, which calibration needs: fetch it, or leave calibration out"
        )
    tokens = source.tokenizer.encode(text, bos=True, eos=False)[:N_TOKENS]
    model = load_model(source.folder, source.folder.read_args())
    round_layers(model, scheme, tokens, rounded)
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


def _quantized_params(source: Source, scheme: Scheme) -> dict[str, Any]:
    """The source's params.json, unknown keys included, with the scheme."""
    params = make_params(source.args) if source.folder.is_hugging_face else json.loads(read_carried(source.folder.params))
    if "n_kv_heads" in params:
        params["n_kv_heads"] = source.args.n_kv_heads
    return params | {QUANTIZATION: scheme.to_params()}


@dataclass
class _QuantizedTensor:
    """Quantizes one tensor while it is written.

    The source is read twice: once for the scales, which are kept, and once for the integers.
    """

    scheme: Scheme
    tensor: LazyTensor
    head_dim: int
    scales: list[Tensor] = field(default_factory=list)
    rounded: Int4Linear | None = None  # the result, if calibrated; set before writing

    @property
    def bits(self) -> int | None:
        return self.scheme.bits_of(self.tensor.name)

    def tensors(self) -> list[LazyTensor]:
        """The tensors that store it. Raises RequestError if the scheme cannot hold it."""
        if self.bits is None:
            return [self.tensor]
        parts = parts_of(self.scheme, self.tensor.name, self.tensor.shape)
        makers = (self._numbers, lambda: self._scale(0), lambda: self._scale(1))
        return [
            LazyTensor(name, shape, dtype or self.tensor.dtype, make)
            for (name, (shape, dtype)), make in zip(parts.items(), makers, strict=False)
        ]

    def _scale(self, index: int) -> Iterator[Tensor]:
        if self.rounded is not None:
            part = (self.rounded.scale, self.rounded.zero)[index]
            assert part is not None  # our own rounding has zero points
            yield self._without_repeats(part)
        else:
            yield self._scales()[index]

    def _scales(self) -> list[Tensor]:
        """The whole tensor's scale, and zero for int4; computed on first use."""
        if not self.scales:
            found = [self._scales_of(rows) for rows in self.tensor.blocks()]
            self.scales = [torch.cat(blocks) for blocks in zip(*found, strict=True)]
        return self.scales

    def _scales_of(self, rows: Tensor) -> tuple[Tensor, ...]:
        if self.bits == 8:
            return (int8_scales(rows),)
        return int4_scales(rows, self.scheme.group_for(self.tensor.name, rows.shape[1]))

    def _numbers(self) -> Iterator[Tensor]:
        if self.rounded is not None:
            yield from row_blocks(self._without_repeats(self.rounded.packed))
            return
        start = 0
        for rows in self.tensor.blocks():
            scales = [scale[start : start + len(rows)] for scale in self._scales()]
            yield to_int8(rows, *scales) if self.bits == 8 else to_int4(rows, *scales)
            start += len(rows)

    def _without_repeats(self, rows: Tensor) -> Tensor:
        """Drop the repeats of key/value heads that the loaded model may have."""
        repeats = len(rows) // self.tensor.shape[0]
        return rows if repeats == 1 else rows.unflatten(0, (-1, self.head_dim))[::repeats].flatten(0, 1)
