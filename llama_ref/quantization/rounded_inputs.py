"""Round a matrix's inputs while the model runs, with one step size per token.

Meta's quantized releases were made for programs that multiply small integers. Rounding the inputs
in the same way reproduces their results in any arithmetic.
"""

import torch
from torch import Tensor

# 255 steps from the smallest to the largest number. Rounded inputs are multiples of 2^-8, so that no sum
# of products overflows float16; every multiple is exact in bfloat16 too.
INT8_STEPS, INT8_UNIT = 255, 2.0**-8
INT8_FINEST = 2.0**-23  # the smallest step, float32's epsilon

FP8_LARGEST = 448.0  # the largest float8_e4m3fn
FP8_BOUND = 1200.0  # larger inputs are clipped (llama_models' default; no file contains it)
FP8_FINEST = 1 / (FP8_LARGEST * 512)


def round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x (…, K) to 8 bits: n float32 (…, K) and step float32 (…, 1) with x ≈ n · step.

    Asymmetric, with the range and the rounding of torchao's per-token quantization, which Meta's
    int4 releases were trained with: https://github.com/pytorch/ao, quantization/utils.py.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / INT8_STEPS).clamp(min=INT8_FINEST)
    zero = (-128 - (low / step).round()).clamp(-128, 127)
    n = (x * (1 / step)).round_().add_(zero).clamp_(-128, 127).sub_(zero).mul_(INT8_UNIT)
    return n, step / INT8_UNIT


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x (…, K) to float8: n float8_e4m3fn (…, K) and step float32 (…, 1) with x ≈ n · step.

    The same as fbgemm's quantize_fp8_per_row, which Meta's 405B in fp8 runs with:
    https://github.com/pytorch/FBGEMM, gen_ai/src/quantize/quantize.cu.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(max=FP8_BOUND)
    step = (largest / FP8_LARGEST).clamp(min=FP8_FINEST)
    return (x / step).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn), step
