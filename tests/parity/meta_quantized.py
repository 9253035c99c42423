"""Meta's own classes for quantized releases, made to run on a CPU.

Meta's published package imports GPU kernels, a module that torchao has renamed, and an image
library; it loads int4 weights before the model can hold them, and omits SpinQuant's rotation. Here
the imports are replaced by stubs, the two kernels are written in PyTorch, the steps are in the
right order, and the rotation is added.
"""

import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import scipy.linalg
import torch
import torchao.quantization.linear_quant_modules as linear_quant_modules
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer
from torch import Tensor, nn

STAND_INS = (
    *("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"),
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
)
GONE = "torchao.quantization.GPTQ"  # now linear_quant_modules
FP8_LARGEST = 448.0


@cache
def metas_loader() -> ModuleType:
    stand_ins = {name: ModuleType(name) for name in STAND_INS}
    with mock.patch.dict(sys.modules, stand_ins | {GONE: linear_quant_modules}):
        import llama_models.llama3.quantization.loader as loader
    _define_kernels()
    return loader


def _define_kernels() -> None:
    library = torch.library.Library("fbgemm", "DEF")
    library.define("quantize_fp8_per_row(Tensor x, Tensor? bs=None, Tensor? scale_ub=None) -> (Tensor, Tensor)")
    library.define("f8f8bf16_rowwise(Tensor xq, Tensor wq, Tensor xs, Tensor ws, *, bool use_fast_accum=True) -> Tensor")
    library.impl("quantize_fp8_per_row", _quantize_fp8_per_row, "CPU")
    library.impl("f8f8bf16_rowwise", _f8f8bf16_rowwise, "CPU")
    metas_loader.library = library  # kept alive


def _quantize_fp8_per_row(x: Tensor, bs: Tensor | None = None, scale_ub: Tensor | None = None) -> tuple[Tensor, Tensor]:
    largest = x.float().abs().amax(1)
    if scale_ub is not None:
        largest = torch.minimum(largest, scale_ub)
    scale = (largest / FP8_LARGEST).clamp(min=1 / (FP8_LARGEST * 512))
    q = (x.float() / scale[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST)
    return q.to(torch.float8_e4m3fn), scale


def _f8f8bf16_rowwise(xq: Tensor, wq: Tensor, xs: Tensor, ws: Tensor, *, use_fast_accum: bool = True) -> Tensor:
    """In the default dtype instead of bfloat16: in float32, rounding cannot hide errors."""
    return ((xq.float() @ wq.float().T) * xs[:, None] * ws).to(torch.get_default_dtype())


def metas_int4_model(folder: Path) -> Transformer:
    loader, params = metas_loader(), json.loads((folder / "params.json").read_text())
    model = Transformer(ModelArgs(max_seq_len=64, max_batch_size=4, **params))
    loader.convert_to_int4_quantized_model(model, str(folder), torch.device("cpu"))
    model.load_state_dict(torch.load(folder / "consolidated.00.pth", weights_only=True), strict=True)
    if model.params.quantization_args.spinquant:
        for layer in model.layers:
            layer.feed_forward.w2.register_forward_pre_hook(_rotate_input)
    return model.eval()


def _rotate_input(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    n = inputs[0].shape[-1]
    return inputs[0] @ (torch.tensor(scipy.linalg.hadamard(n)).float() / n**0.5)


def metas_fp8_model(folder: Path, rank: int = 0) -> Transformer:
    """The part of a process with this rank, with one process per shard."""
    loader, params = metas_loader(), json.loads((folder / "params.json").read_text())
    model = Transformer(ModelArgs(max_seq_len=64, max_batch_size=4, **params))
    state = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)
    model.load_state_dict(state, strict=True)  # float8 in wider parameters, which the next step makes float8 again
    loader.convert_to_fp8_quantized_model(model, str(folder))
    return model.eval()
