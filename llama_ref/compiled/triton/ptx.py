"""PTX that converts bytes to 16-bit floats, several times faster than Triton's own operations.

Both functions convert the four bytes of a register: `prmt` puts each below the high byte of a float
whose mantissa counts in ones, so that the byte is the float's last mantissa bits.
"""

from functools import cache

import torch


@cache
def unpack8(dtype: torch.dtype) -> str:
    """PTX: a word of four int8 to four numbers of bfloat16 or float16, exactly.

    A byte becomes the last mantissa bits of a float that counts in ones, from which that float's
    offset is subtracted: (128 + (n & 127)) - (128 + (n & 128)) in bfloat16, which has only seven
    mantissa bits; (1152 + n) - 1152 in float16.
    """
    if dtype == torch.bfloat16:
        return """{
            .reg .b32 a, b, top, minus;
            prmt.b32 a, $2, 0x43434343, 0x4140;
            prmt.b32 b, $2, 0x43434343, 0x4342;
            mov.b32 minus, 0xBF80BF80;
            and.b32 top, a, 0xFF80FF80;
            and.b32 a, a, 0xFF7FFF7F;
            fma.rn.bf16x2 $0, top, minus, a;
            and.b32 top, b, 0xFF80FF80;
            and.b32 b, b, 0xFF7FFF7F;
            fma.rn.bf16x2 $1, top, minus, b;
        }"""
    return """{
            .reg .b32 a, b, bias;
            xor.b32 a, $2, 0x80808080;
            prmt.b32 b, a, 0x64646464, 0x4342;
            prmt.b32 a, a, 0x64646464, 0x4140;
            mov.b32 bias, 0x64806480;
            sub.f16x2 $0, a, bias;
            sub.f16x2 $1, b, bias;
        }"""


@cache
def unpack4(dtype: torch.dtype) -> str:
    """PTX: a word of eight 4-bit numbers q to (q - 8) * scale + zero, with a single rounding.

    The low nibbles come first. Scales and zeros come once per byte; a word's numbers share one.
    """
    digits, one, bias, kind = {
        torch.bfloat16: ("0x43434343", "0x3F803F80", "0xC308C308", "bf16x2"),  # (128 + q) - 136
        torch.float16: ("0x64646464", "0x3C003C00", "0xE408E408", "f16x2"),  # (1024 + q) - 1032
    }[dtype]
    lines = [".reg .b32 low, high, one, bias, q;", f"mov.b32 one, {one};", f"mov.b32 bias, {bias};"]
    lines += ["and.b32 low, $4, 0x0F0F0F0F;", "shr.u32 high, $4, 4;", "and.b32 high, high, 0x0F0F0F0F;"]
    for out, nibbles, bytes_ in ((0, "low", "0x4140"), (1, "low", "0x4342"), (2, "high", "0x4140"), (3, "high", "0x4342")):
        lines += [f"prmt.b32 q, {nibbles}, {digits}, {bytes_};", f"fma.rn.{kind} q, q, one, bias;"]
        lines += [f"fma.rn.{kind} ${out}, q, ${5 + out % 2}, ${7 + out % 2};"]
    return "{" + " ".join(lines) + "}"
