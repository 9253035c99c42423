"""Quantized tensors at any file offset are loaded aligned, and compute the same."""

import json
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from folders import PARAMS
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.formats.safetensors import inspect_safetensors
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.quantized_reader import KERNEL_ALIGNMENT
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.parallel.sharding import WHOLE, Share
from make_random_checkpoint import make_random_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
WIDE = PARAMS | {"dim": 64, "multiple_of": 64}
SCHEMES = ["int8", "int4:group=32"]
SHARES = [WHOLE, Share(0, 2), Share(1, 2)]


def move_data(path: Path, residue: int) -> None:
    """Pad a safetensors header with spaces so that the tensors begin at `residue` modulo 64."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    header += b" " * ((residue - 8 - len(header)) % 64)
    path.unlink()  # existing mappings keep their bytes
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def buffers(folder: Path, share: Share) -> dict[str, Tensor]:
    opened = open_folder(folder)
    return dict(load_model(opened, opened.read_args(), share=share).named_buffers())


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    return quantize_folder(make_random_checkpoint(folder / "plain", WIDE), folder / "quantized", request.param, calibrate=False)


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_all_that_is_loaded_is_aligned(quantized, share):
    path = quantized / "model.safetensors"
    move_data(path, 0)
    expected = buffers(quantized, share)
    for residue in range(64):
        move_data(path, residue)
        found = buffers(quantized, share)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.data_ptr() % KERNEL_ALIGNMENT == 0, (name, residue)
            assert tensor.is_contiguous()
            assert torch.equal(tensor, expected[name])


def test_rows_of_a_share_that_begin_between_two_vectors_are_aligned(tmp_path):
    params = PARAMS | {"dim": 20, "n_heads": 2, "n_kv_heads": 2, "multiple_of": 2, "vocab_size": 258}
    folder = quantize_folder(make_random_checkpoint(tmp_path / "odd", params), tmp_path / "quantized", "int8")
    whole, part = buffers(folder, WHOLE), buffers(folder, Share(1, 2))
    for name, tensor in part.items():
        assert tensor.data_ptr() % KERNEL_ALIGNMENT == 0, name
    assert torch.equal(part["output.q"], whole["output.q"][129:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_are_written_aligned(tmp_path, scheme):
    """Tensors begin at cache lines, except after tensors of odd sizes, which come last."""
    params = WIDE | {"vocab_size": 515}  # its scales have 2,060 bytes
    folder = quantize_folder(make_random_checkpoint(tmp_path / "odd", params), tmp_path / "out", scheme, calibrate=False)
    held = inspect_safetensors(folder / "model.safetensors")
    assert held["output.scale"].nbytes % 64 != 0
    aligned = [name for name, tensor in held.items() if tensor.nbytes % 64 == 0]
    assert len(aligned) > len(held) / 2
    assert all(held[name].file_offset % 64 == 0 for name in aligned)


RUN = textwrap.dedent("""
    import json, sys
    import torch
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.checkpoint.loading.loader import load_model
    from llama_ref.quantization.apply import use_fast_kernels

    folder = open_folder(sys.argv[1])
    out = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(folder, folder.read_args(), dtype=dtype)
        use_fast_kernels(model)
        with torch.inference_mode():
            for n_tokens in (1, 3, 4, 5, 60):
                out.append(model(torch.arange(n_tokens)[None])[0, -1].float().tolist())
    print(json.dumps(out))
""")


def run(warm: Path, folder: Path) -> list[list[float]]:
    """Logits for several numbers of tokens, in a subprocess: a misaligned kernel would crash it."""
    done = subprocess.run([warm / "python", "-c", RUN, folder], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout)


def test_misaligned_files_compute_the_same(warm, quantized):
    path = quantized / "model.safetensors"
    move_data(path, 0)
    expected = run(warm, quantized)
    for residue in (8, 1):
        move_data(path, residue)
        assert run(warm, quantized) == expected
