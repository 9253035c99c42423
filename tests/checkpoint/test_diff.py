"""Compare folders in any number of shards; the numbers match a direct computation."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import REPOSITORY
from folders import PARAMS, byte_tokenizer, tiny_folder
from llama_ref.checkpoint import diff as module
from llama_ref.checkpoint.diff import Comparison, TensorDifference, compare
from llama_ref.checkpoint.loading.loader import split_dim
from llama_ref.errors import CheckpointError

Tensors = dict[str, Tensor]
WQ, WO, NORM = "layers.0.attention.wq.weight", "layers.1.attention.wo.weight", "norm.weight"
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[int, Path]:
    """One model in 1, 2 and 4 shards."""
    root = tmp_path_factory.mktemp("compare")
    return {shards: tiny_folder(root / str(shards), shards=shards) for shards in (1, 2, 4)}


@pytest.fixture
def copy(originals, tmp_path) -> Callable[[int], Path]:
    """Copies the model in a given number of shards."""
    return lambda shards=1: Path(shutil.copytree(originals[shards], tmp_path / f"copy{shards}"))


def edit(folder: Path, change: Callable[[Tensors], object], shard: int = 0) -> Path:
    """Apply `change` to the tensors of a shard, in place."""
    path = folder / f"consolidated.{shard:02d}.pth"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)
    return folder


def written(folder: Path, *shards: Tensors) -> Path:
    """A folder of these shards; `compare` ignores that its params.json does not fit them."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    for number, tensors in enumerate(shards):
        torch.save(tensors, folder / f"consolidated.{number:02d}.pth")
    return folder


def strict_json(comparison: Comparison) -> dict:
    """The comparison as read by a JSON parser that rejects NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(comparison.to_json(), parse_constant=refuse)


# ---- equal


@pytest.mark.parametrize(("a", "b"), [*product((1, 2, 4), repeat=2)])
def test_the_number_of_shards_makes_no_difference(originals, a, b):
    comparison = compare(originals[a], originals[b])
    assert comparison == Comparison(str(originals[a]), str(originals[b]), 21)
    assert comparison.identical and strict_json(comparison)["identical"] is True


@pytest.mark.parametrize(("a", "b"), [*product(("one matrix", "left out", "two equal ones"), repeat=2)])
def test_a_tied_output_may_be_left_out(tmp_path, a, b):
    def folder(name: str, how: str) -> Path:
        path = tiny_folder(tmp_path / name, tied=True, shards=2)
        for shard in range(2):
            if how == "left out":
                edit(path, lambda tensors: tensors.pop(OUTPUT), shard)
            elif how == "two equal ones":
                edit(path, lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING].clone()}), shard)
        return path

    assert compare(folder("a", a), folder("b", b)).identical


def test_an_output_of_its_own_is_no_tied_one(originals, copy):
    comparison = compare(originals[2], edit(edit(copy(2), lambda t: t.pop(OUTPUT)), lambda t: t.pop(OUTPUT), 1))
    assert [(tensor.name, tensor.what) for tensor in comparison.tensors] == [(OUTPUT, "values")]
    assert comparison.tensors[0].n_different > 10_000


def test_precomputed_frequencies_are_not_compared(originals, copy):
    assert compare(originals[1], edit(copy(), lambda t: t.update({"rope.freqs": torch.ones(4)}))).identical


def test_equal_nan_and_infinity_are_equal(originals, copy):
    def poison(tensors: Tensors) -> None:
        tensors[WQ][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])

    poisoned = edit(copy(1), poison)
    assert compare(poisoned, edit(copy(4), poison)).identical
    assert compare(originals[1], poisoned).tensors[0].n_different == 3


# ---- different


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("name", [EMBEDDING, WQ, WO, "layers.1.feed_forward.w2.weight", OUTPUT])
def test_a_single_value_is_found_wherever_it_lies(originals, copy, name, a, b):
    shard = b - 1
    places = {}

    def raise_last(tensors: Tensors) -> None:
        value = tensors[name].flatten()[-1].item()
        tensors[name].view(-1)[-1] = places["new"] = value + 1
        places["new"] = tensors[name].flatten()[-1].item() - value  # rounded to bfloat16

    comparison = compare(originals[a], edit(copy(b), raise_last, shard))
    norm = torch.load(originals[1] / "consolidated.00.pth", weights_only=True)[name].double().norm().item()
    (found,) = comparison.tensors
    assert (found.name, found.what, found.n_different) == (name, "values", 1)
    assert found.max_abs == places["new"] and found.relative_norm == pytest.approx(places["new"] / norm, rel=1e-12)
    assert comparison.n_tensors == 21 and not comparison.identical


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 4)])
def test_another_dtype_is_a_difference_even_of_equal_values(originals, tmp_path, a, b):
    other = tiny_folder(tmp_path / "b", shards=b, dtype=torch.bfloat16)
    for shard in range(b):
        edit(other, lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}), shard)
    comparison = compare(originals[a], other)
    assert {tensor.what for tensor in comparison.tensors} == {"bfloat16 in a, float32 in b"}
    assert {(tensor.max_abs, tensor.relative_norm, tensor.n_different) for tensor in comparison.tensors} == {(0.0, 0.0, 0)}
    assert len(comparison.tensors) == comparison.n_tensors == 21


def test_one_shard_of_another_dtype_is_a_difference(originals, copy):
    other = edit(copy(2), lambda tensors: tensors.update({WQ: tensors[WQ].float()}), 1)
    assert [tensor.what for tensor in compare(other, originals[2]).tensors] == ["bfloat16 and float32 in a, bfloat16 in b"]


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        # Beyond the precision of float64, and of float32.
        (torch.tensor([1 << 62]), torch.tensor([(1 << 62) + 1]), (0, 0, 1)),
        (torch.tensor([(1 << 24) + 1]), torch.tensor([2.0**24]), (1, 1 / ((1 << 24) + 1), 1)),
        (torch.zeros(3), torch.tensor([0, 3.0, 4.0]), (4, math.inf, 2)),
        (torch.tensor([0, 3.0, 4.0]), torch.zeros(3), (4, 1, 2)),
        (torch.zeros(3), torch.zeros(3).half(), (0, 0, 0)),
    ],
    ids=["large whole numbers", "whole and floating", "from nothing", "to nothing", "nothing"],
)
def test_the_numbers_hold_at_the_edges(tmp_path, a, b, found):
    (difference,) = compare(written(tmp_path / "a", {"x": a}), written(tmp_path / "b", {"x": b})).tensors
    assert (difference.max_abs, difference.relative_norm, difference.n_different) == pytest.approx(found)


def test_copies_of_a_norm_that_disagree_are_noticed(originals, copy):
    def change(tensors: Tensors) -> None:
        tensors[NORM][0] += 1

    changed = edit(copy(2), change, shard=1)
    found = {}
    for n in (1, 4):
        found |= {tensor.name: tensor.what for tensor in compare(originals[n], changed).tensors}
        assert found == {NORM: "the shards of b disagree about it"}
    assert [tensor.what for tensor in compare(changed, originals[1]).tensors] == ["the shards of a disagree about it"]
    assert compare(changed, changed).identical


def test_a_norm_of_all_shards_is_counted_once(originals, copy):
    changed = copy(2)
    for shard in range(2):
        edit(changed, lambda tensors: tensors[NORM].neg_(), shard)
    assert [tensor.n_different for tensor in compare(originals[2], changed).tensors] == [32]


def test_missing_and_misshapen_tensors_are_reported(originals, copy):
    def change(tensors: Tensors) -> None:
        del tensors[WQ]
        tensors["layers.9.surplus"] = torch.ones(3)
        tensors[WO] = tensors[WO][:, :16].clone()

    changed = edit(copy(), change)
    found = {tensor.name: tensor.what for tensor in compare(originals[2], changed).tensors}
    assert found == {WQ: "only in a", "layers.9.surplus": "only in b", WO: "shape (32, 32) in a, (32, 16) in b"}
    assert all(tensor.max_abs is None for tensor in compare(originals[1], changed).tensors)


ODD_PARTS = {
    "scalars": [torch.tensor(1.0), torch.tensor(1.0)],
    "too few dimensions": [torch.ones(4), torch.ones(4)],
    "parts that do not fit": [torch.ones(4, 8), torch.ones(6, 8)],
    "parts of other dimensions": [torch.ones(4, 8), torch.ones(8)],
    "nothing in them": [torch.ones(0, 8), torch.ones(4, 0)],
    "float8": [torch.ones(4, 4).to(torch.float8_e4m3fn)] * 2,
    "true and false": [torch.ones(4, 4, dtype=torch.bool)] * 2,
}


@pytest.mark.parametrize("name", [WO, WQ, NORM, "unknown"])
@pytest.mark.parametrize("odd", ODD_PARTS)
def test_shapes_no_model_has_are_compared_all_the_same(tmp_path, odd, name):
    shards = [{name: part.clone()} for part in ODD_PARTS[odd]]
    a, b = written(tmp_path / "a", *shards), written(tmp_path / "b", *shards)
    one = written(tmp_path / "one", {name: torch.full((3, 3), 7.0)})
    assert compare(a, b).identical
    assert [tensor.name for tensor in compare(a, one).tensors] == [name]
    assert [tensor.name for tensor in compare(one, a).tensors] == [name]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"norm_eps": 1e-6}, "norm_eps: 1e-05 in a, 1e-06 in b"),
        ({"use_scaled_rope": True}, "rope_scaling_factor: 1.0 in a, 8.0 in b"),
        ({"unheard_of": [1, "two"]}, "extra: {} in a, {'unheard_of': [1, 'two']} in b"),
    ],
)
def test_other_params_are_reported_and_equivalent_ones_are_not(originals, copy, change, line):
    other = copy()
    (other / "params.json").write_text(json.dumps(PARAMS | {"use_scaled_rope": False}, indent=3))
    assert compare(originals[1], other).identical
    (other / "params.json").write_text(json.dumps(PARAMS | change))
    comparison = compare(originals[1], other)
    assert line in comparison.params and not comparison.identical and not comparison.tensors


def test_other_tokenizers_are_reported(originals, copy):
    other = copy()
    lines = (other / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (other / "tokenizer.model").write_bytes(
        b"".join([lines[1].replace(b" 1", b" 0"), lines[0].replace(b" 0", b" 1"), *lines[2:]])
    )
    assert compare(originals[1], other).tokenizer == "2 of 512 tokens differ"
    (other / "tokenizer.model").unlink()
    assert compare(originals[1], other).tokenizer == "only a has one"
    assert compare(other, originals[1]).tokenizer == "only b has one"
    assert compare(other, other).identical


def test_the_order_of_a_tokenizers_lines_makes_no_difference(originals, copy):
    other = copy()
    lines = byte_tokenizer(other / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (other / "tokenizer.model").write_bytes(b"".join(reversed(lines)))
    assert compare(originals[1], other).identical


@pytest.mark.parametrize("name", ["params.json", "consolidated.01.pth", "tokenizer.model"])
def test_a_folder_that_cannot_be_read_is_an_error(originals, copy, name):
    broken = copy(2)
    (broken / name).write_bytes(b"<html>")
    for pair in ((originals[1], broken), (broken, originals[1])):
        with pytest.raises(CheckpointError, match=f"{name} is an HTML page"):
            compare(*pair)


def test_progress_counts_tensors(originals):
    seen = []
    compare(originals[1], originals[2], lambda *counts: seen.append(counts))
    assert seen == [(n, 21) for n in range(1, 22)]


# ---- the numbers


def directly(a: np.ndarray, b: np.ndarray) -> tuple[float, float, int]:
    """(max abs, relative norm, count) by definition, in float64; NaN equals NaN."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.where(same, 0, np.abs(a - b))
        size, apart = math.sqrt(np.nansum(a**2)), math.sqrt((distance**2).sum())
        relative = apart / size if size else (math.inf if apart else 0.0)
    return float(distance.max()), relative, int((~same).sum())


numbers = st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 3e38, 1e-40]) | st.floats(-4, 4, width=16)


@st.composite
def pairs(draw) -> tuple[str, Tensor, Tensor]:
    """A name and two tensors of one shape, with some different values and any dtypes."""
    shape = draw(st.sampled_from([(4, 4), (8, 4), (4, 12), (12, 8)]))
    values = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    changes = draw(st.dictionaries(st.integers(0, len(values) - 1), numbers, max_size=6))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    a = torch.tensor(values, dtype=torch.float32).to(draw(dtypes)).reshape(shape)
    b = torch.tensor([changes.get(i, value) for i, value in enumerate(values)], dtype=torch.float32).to(draw(dtypes))
    return draw(st.sampled_from([WQ, WO])), a, b.reshape(shape)


def in_shards(name: str, tensor: Tensor, n: int) -> list[Tensors]:
    return [{name: part.clone()} for part in tensor.chunk(n, split_dim(name))]


@settings(max_examples=150)
@given(pairs(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 5, 1 << 20]))
def test_the_numbers_are_those_of_a_direct_computation(pair, shards_a, shards_b, block_values):
    name, a, b = pair
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_VALUES", block_values)
        folders = (
            written(Path(root) / "a", *in_shards(name, a, shards_a)),
            written(Path(root) / "b", *in_shards(name, b, shards_b)),
        )
        comparison = compare(*folders)
    largest, relative, count = directly(a.double().numpy(), b.double().numpy())
    if a.dtype == b.dtype and not count:
        assert comparison.identical
        return
    (found,) = comparison.tensors
    assert found.n_different == count
    assert found.max_abs == pytest.approx(largest, nan_ok=True)
    assert found.relative_norm == pytest.approx(relative, rel=1e-9, nan_ok=True)
    as_json = strict_json(comparison)["tensors"][0]
    assert as_json["n_different"] == count
    assert float(as_json["max_abs"]) == pytest.approx(largest, nan_ok=True)


# ---- memory

MEASURE = textwrap.dedent("""
    import sys
    from pathlib import Path
    from llama_ref.checkpoint.diff import compare

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    small, other, *folders = sys.argv[1:]
    compare(small, other)  # the libraries' first use
    before = peak()
    for a, b in zip(folders, folders[1:]):
        print(len(compare(a, b).tensors), peak() - before)
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_little_memory_is_taken_whatever_the_size(warm, originals):
    """Folders of 128 MB: equal in 1 and 2 shards, with different values, in another dtype."""
    shapes = {EMBEDDING: (24_576, 2048), WO: (8192, 2048)}
    with tempfile.TemporaryDirectory() as root:  # pytest's outlives the test
        whole = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        halves = {name: tensor.chunk(2, split_dim(name))[0].clone() for name, tensor in whole.items()}
        folders = [
            written(Path(root) / "whole", whole),
            written(Path(root) / "halves", halves, halves),
            written(Path(root) / "other", {name: tensor + 1 for name, tensor in whole.items()}),
            written(Path(root) / "float16", {name: tensor.half() for name, tensor in whole.items()}),
        ]
        small = tiny_folder(Path(root) / "small", seed=1, dtype=torch.float16)
        command = [warm / "python", "-c", MEASURE, originals[1], small, *folders]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [differing for differing, _ in rows] == [0, 2, 2]
    assert max(taken for _, taken in rows) < 150 << 20, [f"{taken >> 20} MB" for _, taken in rows]


def test_differences_are_plain_data():
    difference = TensorDifference("x", "values", math.nan, math.inf, 3)
    as_json = strict_json(Comparison("a", "b", 1, ["p"], "t", [difference]))
    assert as_json["tensors"] == [{"name": "x", "what": "values", "max_abs": "nan", "relative_norm": "inf", "n_different": 3}]
    assert (as_json["identical"], as_json["params"], as_json["tokenizer"], as_json["n_tensors"]) == (False, ["p"], "t", 1)
