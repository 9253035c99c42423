"""Studying a model on several processes gives the same names, shapes and values as on one."""

import json
from pathlib import Path

import pytest
import torch

from folders import byte_tokenizer
from jobs import torchrun
from llama_ref.parallel.tensor import RowParallelLinear
from llama_ref.quantization.linear import Int4Linear
from llama_ref.quantization.meta_int4 import MetaInt4Linear
from llama_ref.quantization.rounding import pack
from make_random_checkpoint import make_random_checkpoint
from study_worker import TEXTS, build, measure, trace_briefly
from vision_folders import IMAGE_ID, PARAMS, noise, vision_folder

WORKER = Path(__file__).parents[1] / "study_worker.py"
SHAPE = {"dim": 48, "n_layers": 3, "vocab_size": 512, "multiple_of": 10, "norm_eps": 1e-5, "rope_theta": 500000.0}
SHAPES = {
    "groups of 3": SHAPE | {"n_heads": 6, "n_kv_heads": 2, "use_scaled_rope": True},  # three processes, two key heads
    "groups of 4": SHAPE | {"n_heads": 12, "n_kv_heads": 3, "head_dim": 12},  # half of 12 ends within a group
}
VISION = PARAMS | {"dim": 96, "n_heads": 6, "n_kv_heads": 2}
LOOKING = [[256, IMAGE_ID, 70, 71, IMAGE_ID], [256, 70, 72]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("studied")
    tokenizer = byte_tokenizer(root / "tokenizer.model")
    made = {
        name: make_random_checkpoint(root / name, shape, tokenizer=tokenizer, dtype=torch.float32, tied=name == "groups of 4")
        for name, shape in SHAPES.items()
    }
    return made | {"vision": vision_folder(root / "vision", VISION, dtype=torch.float32)}


@pytest.fixture(scope="module")
def images(folders) -> list[list[str]]:
    files = [folders["vision"].parent / f"{n}.png" for n in range(2)]
    for file, size in zip(files, [(100, 40), (50, 50)], strict=True):
        noise(*size).save(file)
    return [list(map(str, files)), []]


@pytest.fixture(scope="module")
def alone(folders, images, tmp_path_factory) -> dict[str, dict]:
    place = tmp_path_factory.mktemp("alone")
    return {name: measure_alone(folder, place / name, images) for name, folder in folders.items()}


def measure_alone(folder: Path, to: Path, images: list[list[str]]) -> dict:
    looks = to.name == "vision"
    return measure(build(folder), to, LOOKING if looks else TEXTS, images if looks else None)


def measure_together(warm: Path, place: Path, folders: dict[str, Path], images: list, n_parts: int, n_stages: int) -> dict:
    """The results of the first of several processes, by folder."""
    task = {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "pipeline_parallel_size": n_stages,
        "texts": {name: LOOKING if name == "vision" else TEXTS for name in folders},
        "images": {"vision": images},
        "to": str(place),
    }
    (place / "task.json").write_text(json.dumps(task))
    done = torchrun(n_parts * n_stages, WORKER, place / "task.json", place / "out.pt", warm=warm)
    assert done.returncode == 0, done.stderr
    return torch.load(place / "out.pt", weights_only=False)


@pytest.fixture(scope="module", params=[(3, 1), (2, 2)], ids=["3 parts", "2 parts in 2 stages"])
def together(request, warm, folders, images, demo_folder, tmp_path_factory) -> dict[str, dict]:
    """The results of several processes, by folder; the demo runs on three processes only."""
    n_parts, n_stages = request.param
    studied = folders | {"demo": demo_folder} if n_parts == 3 else folders
    return measure_together(warm, tmp_path_factory.mktemp("job"), studied, images, n_parts, n_stages)


def assert_same(found: dict, expected: dict) -> None:
    assert found["args"] == expected["args"] and found["answer"] == expected["answer"]
    assert_close(found["values"], expected["values"])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        options = {"atol": 1e-4, "rtol": 1e-4, "equal_nan": True}
        torch.testing.assert_close(value, expected[name], **options, msg=lambda text, name=name: f"{name}: {text}")


def measured(together: dict[str, dict]) -> dict[str, dict]:
    """The results on the random models, without the demo."""
    return {name: found for name, found in together.items() if name != "demo"}


def test_names_shapes_and_values_are_those_of_one_process(together, alone):
    assert measured(together).keys() == alone.keys()
    for name, found in measured(together).items():
        assert_same(found, alone[name])


def test_the_demo_s_values_are_those_of_one_process(together, llama):
    if "demo" not in together:
        pytest.skip("its nine heads are for three processes")
    assert_close(together["demo"], trace_briefly(llama))


def test_all_processes_have_the_same(together):
    assert all(found["equal"] for found in measured(together).values())


def test_of_random_edits_the_first_process_s_count(together):
    assert all(found["shared"] for found in measured(together).values())


def test_the_shares_of_all_heads_add_up_to_what_attention_adds(together):
    for found in measured(together).values():
        for name in [name for name in found["values"] if name.startswith("layers.") and name.endswith("head_result")]:
            added = found["values"][name.replace("head_result", "output")]
            torch.testing.assert_close(found["values"][name].sum(2), added, atol=1e-4, rtol=0)


class SecondOfTwo:
    """A fake process group with the methods that a layer needs to find its part."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def test_of_a_matrix_that_takes_the_inputs_of_all_processes_only_the_own_columns_are_read():
    numbers = torch.randint(16, (5, 2, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = Int4Linear(pack(numbers), torch.rand(5, 2) + 1)
    linear = MetaInt4Linear(own, rounds_inputs=True, columns=range(64, 128), n_inputs=128)
    part = RowParallelLinear(linear, SecondOfTwo()).part_of(linear.dequantize())
    assert torch.equal(part, own.dequantize())


def test_gradients_and_weights_are_refused_with_what_works(together):
    for found in measured(together).values():
        assert len(found["refused"]) == 4
        for message in found["refused"]:
            assert "split across processes, and this needs gradients or all weights: load it in one process" in message


def test_an_edit_that_fails_in_one_stage_fails_in_all_processes(together):
    for found in measured(together).values():
        assert "cannot edit layers.2.residual_post at position 99: the text has positions 0 to 5" in found["failed"]
        assert "norm is computed here for other tokens than those of a pass" in found["outside"]


def test_processes_that_trace_different_tokens_are_told(together):
    for found in measured(together).values():
        assert "differ before a pass that is studied: the tokens is (1, 2) (digest" in found["differing"]


def test_a_folder_is_continued_with_the_same_weights_and_without_edits_only(together):
    for found in measured(together).values():
        without, edited, other = found["not collected again"]
        assert "was collected without edits, and now layers.0.attention.head_output, layers.2.ffn.output would be" in without
        assert "was collected with edits of layers.0.attention.head_output, layers.2.ffn.output, which may differ" in edited
        assert "was collected with another model" in other
