"""A fake CUDA device for tests on machines without one.

FakeTensorMode gives tensors a device and runs PyTorch's rules of shapes, dtypes and devices without computing anything; it
raises when tensors of two devices meet. Without a driver PyTorch still refuses a few Python-level calls on such tensors, which
ask it to make their device current, or what the card can: indexing, `to`, `copy_` and attention. `FakeCuda` sends those to the
operators that the calls stand for, where the rules are checked all the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(), FakeCuda():
        yield


class FakeCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        instead = {
            Tensor.__getitem__: _get_item,
            Tensor.__setitem__: _set_item,
            Tensor.to: _to,
            Tensor.copy_: aten.copy_.default,
            F.scaled_dot_product_attention: _attention,
        }
        return instead.get(func, func)(*args, **(kwargs or {}))


def _get_item(x: Tensor, index: Any) -> Tensor:
    x, tensors = _basic(x, index)
    return aten.index(x, tensors) if tensors else x


def _set_item(x: Tensor, index: Any, value: Tensor | float) -> None:
    x, tensors = _basic(x, index)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    if tensors:
        aten.index_put_(x, tensors, value)
    else:
        aten.copy_(x, value)


def _basic(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Apply an index's integers, slices and Nones; return the remaining tensors by dimension."""
    dim, tensors = 0, []
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, int):
            x = aten.select(x, dim, item)
            continue
        if item is None:
            x = aten.unsqueeze(x, dim)
        elif isinstance(item, slice):
            x = aten.slice(x, dim, item.start, item.stop, item.step or 1)
        tensors.append(item if isinstance(item, Tensor) else None)
        dim += 1
    return x, tensors if any(tensor is not None for tensor in tensors) else []


def _to(x: Tensor, *args: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        else:
            device = arg
    return aten._to_copy(x, device=torch.device(device) if device is not None else None, dtype=dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: bool) -> Tensor:
    """Attention by its definition: to choose a kernel, PyTorch would query the card."""
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, **options)[0]
