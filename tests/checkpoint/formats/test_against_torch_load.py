"""For intact, crafted and damaged archives, this reader and `torch.load` agree, or one refuses."""

import io
import pickle
import random
import warnings
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from attempts import attempts
from llama_ref.checkpoint.formats.pth_pickle import ITEM_BYTES, STORAGES
from llama_ref.checkpoint.reader import read_shard
from llama_ref.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]


def some_tensor(rng: random.Random, others: list[torch.Tensor]) -> torch.Tensor:
    """A tensor of any shape and stride, which may share the storage of an earlier one."""
    if others and rng.random() < 0.3:
        return rng.choice(others).reshape(-1)[rng.randrange(2) :]
    shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
    tensor = torch.randint(0, 2, shape).to(rng.choice(DTYPES))
    if tensor.dim() >= 2 and rng.random() < 0.3:
        tensor = tensor.transpose(0, 1)
    if tensor.dim() and rng.random() < 0.3:
        tensor = tensor[::2]
    if tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn and rng.random() < 0.2:
        return torch.nn.Parameter(tensor)
    return tensor


def well_formed(rng: random.Random) -> bytes:
    tensors: dict[str, torch.Tensor] = OrderedDict() if rng.random() < 0.5 else {}
    for index in range(rng.randrange(1, 5)):
        tensors[f"layers.{index}.w"] = some_tensor(rng, list(tensors.values()))
    out = io.BytesIO()
    torch.save(tensors, out)
    return out.getvalue()


def records_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(records: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        for name, content in records:
            archive.writestr(name, content)
    return out.getvalue()


def other_case(rng: random.Random, name: str) -> str:
    return "".join(rng.choice([c.lower(), c.upper()]) for c in name)


def with_other_records(rng: random.Random, data: bytes) -> bytes:
    """An archive with records renamed, repeated, dropped, reordered, moved or changed."""
    records = list(records_of(data).items())
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(records))
        name, content = records[at]
        shuffled = bytes(rng.sample(content, len(content)))
        change = rng.randrange(6)
        if change == 0:
            records.insert(rng.randrange(len(records) + 1), (other_case(rng, name), shuffled))
        elif change == 1:
            records[at] = (other_case(rng, name), content)
        elif change == 2:
            records.insert(rng.randrange(len(records) + 1), (f"other/{name.partition('/')[2]}", shuffled))
        elif change == 3:
            records[at] = (name, rng.choice([shuffled, b"big", content + b"\0", content[:-1]]))
        elif change == 4 and len(records) > 1:
            del records[at]
        else:
            rng.shuffle(records)
    return zipped(records)


class Identity(tuple):
    """A storage's identity; the pickler writes it as a persistent id."""


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, item):
        return tuple(item) if isinstance(item, Identity) else None


def crafted(rng: random.Random, data: bytes) -> bytes:
    """Calls that torch.save does not write: other arguments, two storage types, negative bits."""
    contents = {rng.choice(["0", "1", "k", "K"]): rng.randbytes(rng.choice([16, 16, 16, 32])) for _ in range(2)}
    types = {key: rng.choice([torch.FloatStorage, torch.HalfStorage, torch.ByteStorage]) for key in contents}

    def storage() -> Identity:
        key = rng.choice(list(contents))
        kind = types[key] if rng.random() < 0.9 else torch.HalfStorage
        numel = len(contents[key]) // ITEM_BYTES[STORAGES[kind.__name__]] if rng.random() < 0.9 else rng.randrange(40)
        return Identity(("storage", kind, key, "cpu", numel))

    def tensor():
        arguments = [storage(), rng.choice([0, 0, 1]), (rng.choice([1, 2, 4]),), (rng.choice([1, 1, 2]),), False, OrderedDict()]
        extra = rng.choice([[], [], [], [], [None], [{}], [{"neg": True}], [{"conj": True}], [{"x": 1}]])
        if rng.random() < 0.1:
            arguments[rng.randrange(6)] = rng.choice([None, 0, {}, True, (2,), {"a": 1}])
        if rng.random() < 0.2:
            return Call(
                torch._utils._rebuild_tensor_v3, *arguments, rng.choice([torch.float32, torch.float16, torch.int8]), *extra
            )
        rebuilt = Call(torch._utils._rebuild_tensor_v2, *arguments, *extra)
        return Call(torch._utils._rebuild_parameter, rebuilt, False, OrderedDict()) if rng.random() < 0.2 else rebuilt

    out = io.BytesIO()
    Pickler(out, 2).dump({f"w{index}": tensor() for index in range(rng.randrange(1, 4))})
    records = {"data.pkl": out.getvalue(), "byteorder": b"little", "version": b"3\n"}
    records |= {f"data/{key}": content for key, content in contents.items()}
    return zipped([(f"archive/{name}", content) for name, content in records.items()])


def damaged_pickle(rng: random.Random, data: bytes) -> bytes:
    """Change some bytes of the pickle, in an otherwise correct zip."""
    records = records_of(data)
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = damaged(rng, records[name])
    return zipped(list(records.items()))


def damaged(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 3)):
        changed[rng.randrange(len(changed))] = rng.choice([rng.randrange(256), changed[rng.randrange(len(changed))]])
    return bytes(changed)


def damaged_directory(rng: random.Random, data: bytes) -> bytes:
    at = data.index(b"PK\1\2")
    return data[:at] + damaged(rng, data[at:])


KINDS = {
    "well-formed": lambda rng, data: data,
    "other records": with_other_records,
    "crafted calls": crafted,
    "a damaged pickle": damaged_pickle,
    "a damaged directory": damaged_directory,
}


def torch_reads(data: bytes) -> dict[str, torch.Tensor] | None:
    """The tensors that torch.load reads, by name; None if it raises anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(io.BytesIO(data), weights_only=True)
        return {name: tensor.detach().resolve_neg().resolve_conj() for name, tensor in dict(found).items()}
    except Exception:
        return None


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(described(ours[name]) == described(theirs[name]) for name in theirs)


def described(tensor: torch.Tensor) -> tuple:
    row_by_row = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return tensor.dtype, tensor.shape, tensor.stride(), row_by_row.view(torch.uint8).numpy().tobytes()


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_give_the_same_or_one_refuses(tmp_path, kind):
    path, seen = tmp_path / "model.pth", Counter[str]()
    for seed in range(attempts(120)):
        rng = random.Random(f"{kind} {seed}")
        torch.manual_seed(seed)
        data = KINDS[kind](rng, well_formed(rng))
        path.write_bytes(data)
        theirs = torch_reads(data)
        try:
            ours = read_shard(path)
        except CheckpointError as error:
            assert "weights_only" not in str(error), "torch's advice, which is to run what the file asks for"
            seen["refused here" if theirs is not None else "refused by both"] += 1
            assert kind != "well-formed", (seed, error)
            continue
        seen["read here alone" if theirs is None else "read by both"] += 1
        assert theirs is None or same(ours, theirs), (kind, seed)
    print(f"\n{kind}: {dict(seen)}")
    assert seen["read by both"], "the attack is about files that can be read"
