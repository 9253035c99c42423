"""Read the pickle inside a `.pth` as data, without importing or calling anything named in it.

A pickle is a program for a stack machine. This machine has only the instructions that `torch.save`
emits for a dictionary of tensors (protocol 2, the only one that `torch.load(weights_only=True)`
accepts). A call of torch's rebuild functions only records its arguments; other calls are rejected.
The number of instructions bounds time and memory: claimed sizes are plain numbers and allocate
nothing.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_ref.errors import CheckpointError

PICKLE_LIMIT_BYTES = 8 << 20  # 405B needs about 200 KB
INSTRUCTION_LIMIT = 1_000_000  # 405B needs about 50,000
TEXT_LIMIT_BYTES = 1024  # per name
MOST_DIMENSIONS = 8

STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
REBUILDERS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
UNSUITED = {"sparse": "sparse", "qtensor": "quantized", "Complex": "complex", "QInt": "quantized", "QUInt": "quantized"}


class RefusedPickle(CheckpointError):
    """The pickle asks for more than tensors, or is not a pickle."""


@dataclass(frozen=True)
class Global:
    """A Python object that the pickle names; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as the pickle claims it. If untyped, `dtype` is None and `numel` counts bytes."""

    key: str
    dtype: str | None
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype or "uint8"]


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle claims it; `offset` and `stride` count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_tensor_pickle(data: bytes) -> tuple[dict[str, PickledTensor], int]:
    """The dictionary of tensors at the beginning of `data` and its length. Raises RefusedPickle."""
    machine = _Machine(data)
    try:
        found = machine.run()
    except (IndexError, struct.error):
        raise RefusedPickle("its data.pkl is truncated or damaged") from None
    if not isinstance(found, dict):
        raise RefusedPickle(f"it holds {_kind(found)}, expected a dictionary of tensors")
    for name, value in found.items():
        if isinstance(value, dict):
            raise RefusedPickle(f"its entry {name!r} is a dictionary; save that inner dictionary of tensors on its own")
        if not isinstance(value, PickledTensor):
            raise RefusedPickle(f"its entry {name!r} is {_kind(value)}, expected a tensor")
    return found, machine.at


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"  # its contents may be nested very deep


_MARK = object()
_UINT8, _UINT16, _UINT32, _INT32, _FLOAT64 = map(struct.Struct, ("<B", "<H", "<I", "<i", ">d"))


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        for _ in range(INSTRUCTION_LIMIT):
            code = self.data[self.at]
            self.at += 1
            if code == ord("."):
                return self.stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise RefusedPickle(f"its data.pkl uses instruction 0x{code:02x}, which torch.save never writes for tensors")
            instruction(self)
        raise RefusedPickle(f"its data.pkl runs beyond {INSTRUCTION_LIMIT:,} instructions")

    # reading ----------------------------------------------------------------------------------------------------------
    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.data) - self.at:
            raise IndexError
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + TEXT_LIMIT_BYTES)
        if end < 0:
            raise IndexError
        text = self.data[self.at : end].decode("utf-8", "backslashreplace")
        self.at = end + 1
        return text

    def text(self) -> None:
        length = self.number(_UINT32)
        if length > TEXT_LIMIT_BYTES:
            raise RefusedPickle(f"its data.pkl holds a text of {length:,} bytes, expected short names of tensors")
        self.push(self.take(length).decode("utf-8", "backslashreplace"))

    def pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    # instructions -----------------------------------------------------------------------------------------------------
    def push(self, value: Any) -> None:
        self.stack.append(value)

    def tuple_of(self, n: int) -> None:
        items = [self.stack.pop() for _ in range(n)]
        self.push(tuple(items[::-1]))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise RefusedPickle("its data.pkl fills something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise RefusedPickle(f"its dictionary has {_kind(key)} as a key, expected tensor names")
            if key in target:
                raise RefusedPickle(f"its dictionary has the duplicate key {key!r}")
            target[key] = value

    def append_all(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise RefusedPickle("its data.pkl extends something that is not a list")
        self.stack[-1].extend(items)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(_emulate_call(function, arguments))

    def storage(self) -> None:
        found = _storage(self.stack.pop())
        if self.storages.setdefault(found.key, found) != found:  # torch.load would use the first for all
            raise RefusedPickle(f"its data.pkl describes storage {found.key!r} in two ways")
        self.push(found)

    def ignore_attributes(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise RefusedPickle("its data.pkl sets attributes on something that is not a dictionary")


_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    ord("("): lambda m: m.push(_MARK),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number(_UINT8)),
    ord("M"): lambda m: m.push(m.number(_UINT16)),
    ord("J"): lambda m: m.push(m.number(_INT32)),
    0x8A: lambda m: m.push(int.from_bytes(m.take(m.number(_UINT8)), "little", signed=True)),  # LONG1
    ord("G"): lambda m: m.push(m.number(_FLOAT64)),
    ord("X"): lambda m: m.text(),
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("s"): lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),
    ord("a"): lambda m: m.append_all([m.stack.pop()]),
    ord("e"): lambda m: m.append_all(m.pop_to_mark()),
    ord("q"): lambda m: m.memo.__setitem__(m.number(_UINT8), m.stack[-1]),
    ord("r"): lambda m: m.memo.__setitem__(m.number(_UINT32), m.stack[-1]),
    ord("h"): lambda m: m.push(_recall(m.memo, m.number(_UINT8))),
    ord("j"): lambda m: m.push(_recall(m.memo, m.number(_UINT32))),
    ord("c"): lambda m: m.push(_check_global(Global(m.line(), m.line()))),
    ord("R"): lambda m: m.call(),
    ord("Q"): lambda m: m.storage(),
    ord("b"): lambda m: m.ignore_attributes(),
}


def _recall(memo: dict[int, Any], index: int) -> Any:
    if index not in memo:
        raise RefusedPickle("its data.pkl refers to a value it never stored")
    return memo[index]


def _check_global(found: Global) -> Global:
    known = {"collections": ("OrderedDict",), "torch._utils": REBUILDERS, "torch.storage": ("UntypedStorage",)}
    if found.name in known.get(found.module, ()) or (found.module == "torch" and found.name in STORAGES | ITEM_BYTES):
        return found
    for part, word in UNSUITED.items():
        if found.module.startswith("torch") and part in found.name:
            raise RefusedPickle(f"it holds {word} tensors ({found}), which no Llama checkpoint contains")
    raise RefusedPickle(
        f"it asks Python to use {str(found)!r}, which no dictionary of tensors needs; loading such a file can run programs: "
        "nothing was run here, do not load it elsewhere"
    )


def _emulate_call(function: Any, arguments: Any) -> Any:
    if isinstance(function, Global) and isinstance(arguments, tuple):
        if function.name == "OrderedDict" and not arguments:
            return {}
        if function.name == "_rebuild_parameter" and len(arguments) == 3:
            data, *grad_and_hooks = arguments
            if isinstance(data, PickledTensor) and _is_plain(*grad_and_hooks):
                return data
        if function.name == "_rebuild_tensor_v2" and len(arguments) in (6, 7) and _is_plain(*arguments[4:]):
            return _tensor(None, *arguments[:4])
        if function.name == "_rebuild_tensor_v3" and len(arguments) in (7, 8):
            dtype = arguments[6]
            if isinstance(dtype, Global) and _is_plain(*arguments[4:6], *arguments[7:]):
                return _tensor(dtype, *arguments[:4])
    raise RefusedPickle("its data.pkl makes a call that does not rebuild a tensor")


def _is_plain(requires_grad: Any, backward_hooks: Any, metadata: Any = None) -> bool:
    """Whether a tensor has only values: no hooks, and no flags such as "negate on read"."""
    return isinstance(requires_grad, bool) and backward_hooks in (None, {}) and metadata in (None, {})


def _storage(identity: Any) -> Storage:
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise RefusedPickle("its data.pkl refers to something that is not a tensor storage")
    _, kind, key, _, numel = identity
    if not isinstance(kind, Global) or kind.name not in (*STORAGES, "UntypedStorage") or not isinstance(key, str):
        raise RefusedPickle("its data.pkl describes a storage without a known type and key")
    if not _is_count(numel):
        raise RefusedPickle(f"its storage {key!r} claims a size that is not a count")
    return Storage(key, STORAGES.get(kind.name), numel)


def _tensor(dtype: Any, storage: Any, offset: Any, shape: Any, stride: Any) -> PickledTensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise RefusedPickle("its data.pkl rebuilds a tensor from something that is not a storage")
    if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
        raise RefusedPickle(f"its data.pkl has a tensor with {len(shape)} sizes and {len(stride)} strides")
    if not all(map(_is_count, (offset, *shape, *stride))):
        raise RefusedPickle("its data.pkl has a tensor with a size, stride or offset that is not a count")
    named = dtype.name if isinstance(dtype, Global) else storage.dtype
    if named not in ITEM_BYTES:
        raise RefusedPickle("its data.pkl has a tensor without a known dtype")
    return PickledTensor(storage, named, offset, shape, stride)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
