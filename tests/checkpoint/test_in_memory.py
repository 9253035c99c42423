"""With `in_memory` a model does not change, whatever happens to its files."""

import os
import sys
from pathlib import Path

import pytest

from folders import PARAMS, byte_tokenizer, tiny_folder
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.cli import main
from llama_ref.generation import Llama
from make_random_checkpoint import make_random_checkpoint

FORMS = ["one shard", "two shards", "tied", "hugging face", "int8", "int4:group=32"]
PROMPT = [[1, 2, 3, 4]]


@pytest.fixture
def folder(tmp_path, form) -> Path:
    if form in ("int8", "int4:group=32"):
        params, tokenizer = PARAMS | {"dim": 64, "multiple_of": 64}, byte_tokenizer(tmp_path / "bytes.model")
        source = make_random_checkpoint(tmp_path / "source", params, tokenizer=tokenizer)
        return quantize_folder(source, tmp_path / "quantized", form, calibrate=False)
    source = tiny_folder(tmp_path / "source", shards=2 if form == "two shards" else 1, tied=form == "tied")
    return to_hugging_face(source, tmp_path / "hf") if form == "hugging face" else source


def build(folder: Path, in_memory: bool) -> Llama:
    return Llama.build(folder, device="cpu", dtype="bfloat16", in_memory=in_memory)


def answer(llama: Llama) -> tuple[list[list[int]], list[list[float]] | None]:
    return llama.generate(PROMPT, max_gen_len=8, temperature=0, logprobs=True)


def is_mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is mapped is read from /proc")
@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_memory_outlives_its_files(folder):
    mapped = build(folder, in_memory=False)
    assert is_mapped(folder)
    expected = answer(mapped)
    del mapped
    llama = build(folder, in_memory=True)
    assert not is_mapped(folder)
    for path in [*folder.glob("*.pth"), *folder.glob("*.safetensors")]:
        with path.open("r+b") as file:
            file.write(os.urandom(path.stat().st_size))
        assert answer(llama) == expected
        os.truncate(path, 0)
    assert answer(llama) == expected


def test_commands_take_it(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "tiny")
    words = ["complete", str(folder), "hi", "--max_gen_len", "4", "--temperature", "0", "--device", "cpu"]
    assert main(words) == 0
    expected = capsys.readouterr().out
    assert main([*words, "--in_memory"]) == 0
    assert capsys.readouterr().out == expected
