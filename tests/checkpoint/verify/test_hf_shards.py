"""Hugging Face's folders are checked like Meta's: by checksums, or by structure without a list."""

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from attempts import attempts
from conftest import exit_code
from folders import PARAMS, byte_tokenizer, growing, tiny_folder
from llama_ref.checkpoint.describe import describe
from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.formats.pth import inspect_pth
from llama_ref.checkpoint.formats.safetensors import DTYPES, inspect_safetensors
from llama_ref.checkpoint.integrity import verify, write_checklist
from llama_ref.checkpoint.reader import open_stored
from llama_ref.checkpoint.verify.checklist import read_checklist
from llama_ref.checkpoint.verify.findings import implied_model
from llama_ref.checkpoint.verify.report import State
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.cli.views.verify import print_reports
from llama_ref.errors import CheckpointError
from llama_ref.generation import Llama
from llama_ref.plan import count_parameters, find_model
from llama_ref.vocabulary import ADDED_TOKENS
from make_random_checkpoint import make_random_checkpoint

FILE1, FILE2, FILE3 = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
ONE, INDEX, CONFIG, TOKENIZER, LIST = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "checklist.chk",
)
OTHERS = [INDEX, CONFIG, TOKENIZER, "generation_config.json", "tokenizer_config.json"]
NORM, WQ = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("native") / "whole", shards=2)


@pytest.fixture(scope="module")
def original(native, tmp_path_factory) -> Path:
    """A complete folder with three weight files, an index and a checklist."""
    folder = to_hugging_face(native, tmp_path_factory.mktemp("hf") / "whole", max_shard_bytes=45_000)
    assert (folder / FILE3).exists()
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


@pytest.fixture
def unlisted(folder) -> Path:
    (folder / LIST).unlink()
    return folder


@pytest.fixture
def single(native, tmp_path) -> Path:
    """A folder with all weights in one file, without a checklist."""
    folder = to_hugging_face(native, tmp_path / "single")
    (folder / LIST).unlink()
    return folder


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Do not wait for recently written files to grow, unless a test makes them grow."""
    monkeypatch.setattr("llama_ref.checkpoint.integrity.GROWTH_WAIT_SECONDS", 0)


def states(report) -> dict[str, State]:
    return {file.name: file.state for file in report.bad}


def resave(path: Path, edit: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def weights(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda path: resave(path, edit)


def content(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda path: edit_json(path, edit)


def bytes_(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def cut(path: Path, n_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - n_bytes)


def append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


# ---- whole


def test_a_converted_folder_is_whole(folder):
    report = verify(folder)
    assert report.ok and report.summary() == "all 8 files are whole" and not report.notes
    listed = {entry.name: entry.sum for entry in read_checklist(folder / LIST).entries}
    assert {file.name: file.found_sum for file in report.files} == listed
    assert sorted(file.name for file in report.files) == sorted([FILE1, FILE2, FILE3, *OTHERS])
    assert verify(folder, deep=True).ok and verify(folder, quick=True).ok


def test_without_a_list_nothing_says_whether_the_bytes_are_right(unlisted):
    for deep in (False, True):
        report = verify(unlisted, deep=deep)
        assert report.exit_code == 3 and not report.bad
        assert "safetensors hold no checksums, so the bytes cannot be verified" in report.summary()
    assert {file.state for file in report.files} == {State.SOUND}
    assert verify(unlisted, quick=True).exit_code == 3


def test_a_half_filled_file_is_unwritten_where_a_sum_shows_that_it_is_wrong(folder):
    size = (folder / FILE2).stat().st_size
    os.truncate(folder / FILE2, size // 2)
    os.truncate(folder / FILE2, size)
    report = verify(folder)
    assert states(report) == {FILE2: State.UNWRITTEN} and "never written" in report.summary()


def test_a_file_copied_over_another_is_a_copy(folder):
    shutil.copy(folder / FILE1, folder / FILE2)
    report = verify(folder)
    assert states(report)[FILE2] is State.COPY and FILE1 not in states(report)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["10GB", "40KB"])
def test_what_transformers_saves_is_sound(original, tmp_path, tied, max_shard_size):
    config = LlamaConfig(**json.loads((original / CONFIG).read_text()) | {"tie_word_embeddings": tied})
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shutil.copy(original / TOKENIZER, tmp_path)
    report = verify(tmp_path)
    assert not report.bad and report.exit_code == 3
    assert {ONE, INDEX} & {file.name for file in report.files}


def test_rope_frequencies_of_older_files_are_ignored(unlisted, native):
    def name(index: dict) -> None:
        index["weight_map"] |= dict.fromkeys(frequencies, FILE1)

    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(4) for layer in range(2)}
    resave(unlisted / FILE1, lambda tensors: tensors.update(frequencies))
    edit_json(unlisted / INDEX, name)
    assert not states(verify(unlisted))
    assert compare(unlisted, native).identical
    Llama.build(unlisted, device="cpu", verify="never")


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_checksum_lists_every_file(unlisted, algorithm):
    write_checklist(unlisted, algorithm)
    done = subprocess.run([f"{algorithm}sum", "--strict", "-c", LIST], cwd=unlisted, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(f"./{name}: OK" for name in [FILE1, FILE2, FILE3, *OTHERS])
    assert verify(unlisted).summary() == "all 8 files are whole"
    (unlisted / FILE2).write_bytes((unlisted / FILE2).read_bytes()[:-1] + b"\x55")
    assert states(verify(unlisted)) == {FILE2: State.DAMAGED} and "right length, wrong sum" in verify(unlisted).summary()


def test_checksum_refuses_broken_files(unlisted):
    cut(unlisted / FILE3, 7)
    with pytest.raises(CheckpointError, match=rf"no list was written.*{FILE3} is 7 bytes short"):
        write_checklist(unlisted)
    assert not (unlisted / LIST).exists()


# ---- one fault


def one_more(path: Path) -> None:
    save_file({"x": torch.ones(1)}, path)


def in_part(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.incomplete"))


def in_the_hubs_cache(path: Path) -> None:
    parts = path.parent / ".cache" / "huggingface" / "download"
    parts.mkdir(parents=True)
    path.rename(parts / "Zm9v.0123.incomplete")


def shifted(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(data_offsets=[n + 2 for n in header[NORM]["data_offsets"]]))


def overlapping(path: Path) -> None:
    def edit(header: dict) -> None:
        first, second, *_ = (entry for entry in header.values() if entry.get("shape") == [32, 32])
        second["data_offsets"] = first["data_offsets"]

    edit_header(path, edit)


def outside(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(shape=[1 << 40], data_offsets=[0, 1 << 41]))


def linked(target: str):
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


def replaced(make: Callable[[Path], object]):
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def with_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]):
    return weights(lambda tensors: tensors.update({name: make(tensors[name])}))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:"
FAULTS = {  # file, change, expected state, pattern in the summary
    "a file is missing": (FILE2, Path.unlink, State.MISSING, "fetch it"),
    "part fetched": (FILE3, in_part, State.MISSING, "its download has not finished"),
    "part in the hub's cache": (FILE3, in_the_hubs_cache, State.MISSING, "a download has not finished: Hugging"),
    "no config": (CONFIG, Path.unlink, State.MISSING, "fetch it"),
    "no tokenizer": (TOKENIZER, Path.unlink, State.MISSING, "fetch it"),
    "a dangling link": (FILE1, linked("gone"), State.MISSING, "fetch it"),
    "a link out": (FILE1, linked("/etc/passwd"), State.REFUSED, "leads out of the folder"),
    "a link to itself": (FILE1, linked(FILE1), State.UNREADABLE, "leads back|Too many levels"),
    "a pipe": (FILE1, replaced(os.mkfifo), State.UNREADABLE, "not a plain file"),
    "a folder": (TOKENIZER, replaced(Path.mkdir), State.UNREADABLE, "not a plain file"),
    "empty": (FILE1, bytes_(b""), State.EMPTY, "did not start"),
    "cut by a byte": (FILE3, lambda path: cut(path, 1), State.CUT_SHORT, "is 1 byte short: the download broke off"),
    "cut in its header": (FILE1, lambda path: os.truncate(path, 90), State.CUT_SHORT, "ends within its header"),
    "cut to 5 bytes": (FILE1, lambda path: os.truncate(path, 5), State.CUT_SHORT, "ends within its first 8 bytes"),
    "longer": (FILE2, lambda path: append(path, b"x" * 2000), State.LONGER, "is 2 kB too long"),
    "a web page": (FILE1, bytes_(b"<!DOCTYPE html>"), State.WEB_PAGE, "fresh link"),
    "a web page for config": (CONFIG, bytes_(b"<html>"), State.WEB_PAGE, "fresh link"),
    "a pointer": (FILE1, bytes_(POINTER), State.POINTER, "git lfs pull"),
    "a pointer for tokenizer": (TOKENIZER, bytes_(POINTER), State.POINTER, "git lfs pull"),
    "an error": (FILE1, bytes_(b'{"error":"Repository not found"}'), State.ERROR_BODY, "refused the"),
    "set aside": (FILE1, bytes_(bytes(90_000)), State.UNWRITTEN, "never written"),
    "a pickle": (FILE1, lambda path: torch.save({NORM: torch.ones(2)}, path), State.DAMAGED, "does not begin as a safetensors"),
    "a header that is not JSON": (FILE1, bytes_(b"\x02" + bytes(7) + b"{]"), State.DAMAGED, "damaged header"),
    "a gap": (FILE3, shifted, State.DAMAGED, "gap after|overlaps"),
    "an overlap": (FILE1, overlapping, State.DAMAGED, "overlaps the tensor before it|leaves a gap"),
    "a place outside": (FILE3, outside, State.DAMAGED, "overlaps|gap|header describes"),
    "a lacking tensor": (FILE3, weights(lambda t: t.pop(NORM)), State.MISFIT, f"{NORM} is missing"),
    "an unexpected tensor": (FILE1, weights(lambda t: t.update(x=torch.ones(1))), State.MISFIT, "x is unexpected"),
    "a misshapen tensor": (
        FILE3,
        with_tensor(NORM, lambda t: t[:31].clone()),
        State.MISFIT,
        r"shape \(31,\), expected \(32,\)",
    ),
    "another dtype": (
        FILE3,
        with_tensor(NORM, lambda t: t.to(torch.int16)),
        State.MISFIT,
        f"{NORM} is int16, expected bfloat16",
    ),
    "float8": (FILE3, with_tensor(NORM, lambda t: t.to(torch.float8_e4m3fn)), State.MISFIT, "is float8_e4m3fn, expected"),
    "a tensor twice": (FILE1, weights(lambda t: t.update({NORM: torch.ones(32)})), State.MISFIT, "is also in"),
    "a file of another numbering": ("model-00004-of-00004.safetensors", one_more, State.EXTRA, "does not name it"),
    "a single file beside": (ONE, one_more, State.EXTRA, "does not name it"),
    "an index of other places": (
        INDEX,
        content(lambda i: i["weight_map"].update({NORM: FILE1})),
        State.MISFIT,
        f"{NORM} is in {FILE3}, not in {FILE1}",
    ),
    "an index of more": (
        INDEX,
        content(lambda index: index["weight_map"].update(x=FILE1)),
        State.MISFIT,
        "it names x, which no file holds",
    ),
    "an index of less": (
        INDEX,
        content(lambda index: index["weight_map"].pop(NORM)),
        State.MISFIT,
        f"it does not name {NORM} of {FILE3}",
    ),
    "an index of pickles": (
        INDEX,
        content(lambda index: index["weight_map"].update({NORM: "../pytorch_model.bin"})),
        State.MISFIT,
        "it names '../pytorch_model.bin', which is neither",
    ),
    "an index without a map": (INDEX, lambda path: path.write_text("[]"), State.DAMAGED, 'no "weight_map"'),
    "an index cut": (INDEX, lambda path: cut(path, 30), State.CUT_SHORT, "broke off"),
    "a config cut": (CONFIG, lambda path: cut(path, 5), State.CUT_SHORT, "broke off"),
    "two configs": (CONFIG, lambda path: append(path, b"{}"), State.LONGER, "delete it"),
    "a config of other numbers": (
        CONFIG,
        content(lambda c: c.update(vocab_size=1024)),
        State.MISFIT,
        "all 3 files .*: vocab_size is 1,024, in the weights 512",
    ),
    "a tokenizer cut": (TOKENIZER, lambda path: cut(path, 40), State.CUT_SHORT, "broke off"),
    "not a tokenizer": (TOKENIZER, lambda path: path.write_text("{}"), State.MISFIT, 'has no section "model"'),
    "a tokenizer of more": (
        TOKENIZER,
        content(lambda t: t["added_tokens"].append(t["added_tokens"][-1] | {"id": 512, "content": "xx", "special": False})),
        State.MISFIT,
        "513 tokens, but config.json has vocab_size 512",
    ),
    "another file cut": ("generation_config.json", lambda path: cut(path, 5), State.CUT_SHORT, "broke off"),
    "another file of no object": (
        "tokenizer_config.json",
        lambda path: path.write_text("3"),
        State.DAMAGED,
        "not a JSON object",
    ),
}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_without_a_list(unlisted, fault, quick):
    name, break_it, state, words = FAULTS[fault]
    break_it(unlisted / name)
    report = verify(unlisted, quick=quick)
    assert states(report) == {name: state}, report.summary()
    assert report.exit_code == 1 and re.search(words, report.summary()) and name in report.summary()
    assert f"{len(report.files) - 1} of {len(report.files)} files are sound" in report.summary()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_in_its_file_with_a_list(folder, fault):
    name, break_it, state, _ = FAULTS[fault]
    break_it(folder / name)
    report = verify(folder)
    damaged = state is State.MISFIT  # the checksum shows which file was changed
    assert states(report) == {name: State.DAMAGED if damaged else state}, report.summary()
    assert f"{len(report.files) - 1} of {len(report.files)} files are whole" in report.summary()


QUANTIZED = {  # how the weights of one matrix are stored, by the method in quantization_config
    "bitsandbytes": {"weight": torch.zeros(512, 1, dtype=torch.uint8), "weight.absmax": torch.ones(16)},
    "gptq": {"qweight": torch.zeros(4, 32, dtype=torch.int32), "g_idx": torch.zeros(32, dtype=torch.int32)},
    "compressed-tensors": {"weight": torch.zeros(32, 32, dtype=torch.float8_e4m3fn), "weight_scale": torch.ones(32, 1)},
}
SENTENCEPIECE = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}}
OTHER_MODELS = {  # changes of config.json, another tokenizer if any, and verify's message
    **{method: ({"quantization_config": {"quant_method": method}}, None, method) for method in QUANTIZED},
    "mistral": ({"model_type": "mistral", "sliding_window": 4096}, SENTENCEPIECE, "'mistral', expected \"llama\""),
    "qwen2": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, None, "'qwen2', expected \"llama\""),
    "llama4": ({"model_type": "llama4", "hidden_size": None, "text_config": {"dim": 8}}, None, "'llama4', expected \"llama\""),
    "another mllama": (
        {"model_type": "mllama", "architectures": None, "vision_config": {"patch_size": 16}},
        None,
        '"vision_config.patch_size" is 16, expected 14',
    ),
    "linear RoPE": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None, "uses no other RoPE scaling"),
    "Llama 2": ({"rope_theta": None}, SENTENCEPIECE, "a Llama 2 has no rope_theta"),
    "Llama's shape with Llama 2's tokens": ({}, SENTENCEPIECE, "SentencePiece-style vocabulary"),
}


def as_other_model(folder: Path, name: str) -> str:
    """Turn the folder into that of an unsupported model, and return the expected reason."""
    changes, tokenizer, says = OTHER_MODELS[name]
    edit_json(folder / CONFIG, lambda config: config.update(changes))
    if tokenizer:
        (folder / TOKENIZER).write_text(json.dumps(tokenizer))
    if name in QUANTIZED:
        stem = WQ.removesuffix("weight")
        resave(folder / ONE, lambda t: [t.pop(WQ), t.update({stem + end: held for end, held in QUANTIZED[name].items()})])
    return says


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_whole_folder_of_an_unsupported_model_is_not_called_damaged(single, name, listed):
    says = as_other_model(single, name)
    if listed:
        write_checklist(single)
    report, quick = verify(single), verify(single, quick=True)
    for found in (report, quick):
        assert (found.exit_code, found.ok, found.bad) == (2, False, []), found.summary()
        assert says in found.summary() and "is not supported (" in found.summary()
        assert "only text models of Llama 3 can be loaded, in a format that Meta ships" in found.summary()
        assert [file.state for file in found.files].count(State.UNSUPPORTED) == 1
    assert exit_code(["verify", str(single)]) == 2


def test_a_broken_file_of_an_unsupported_model_is_named(single):
    as_other_model(single, "mistral")
    cut(single / ONE, 100)
    report = verify(single)
    assert report.exit_code == 1 and states(report) == {ONE: State.CUT_SHORT}
    assert "model.safetensors is 100 bytes short" in report.summary() and "'mistral'" in report.summary()


def test_a_config_that_was_changed_into_another_models_is_damaged(folder):
    as_other_model(folder, "qwen2")
    assert states(verify(folder)) == {CONFIG: State.DAMAGED}


def as_one(change: Callable[[Path], object]):
    return lambda folder: change(folder / ONE)


def in_config(**change: object):
    return lambda folder: edit_json(folder / CONFIG, lambda config: config.update(change))


SINGLE = {
    "gone": (as_one(Path.unlink), {ONE: State.MISSING}),
    "config and weights gone": (
        lambda folder: [(folder / name).unlink() for name in (ONE, CONFIG)],
        {ONE: State.MISSING, CONFIG: State.MISSING},
    ),
    "a stale index": (
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: FILE1}})),
        {INDEX: State.MISFIT},
    ),
    "cut": (as_one(lambda path: cut(path, 100)), {ONE: State.CUT_SHORT}),
    "a numbered file beside": (lambda folder: one_more(folder / FILE1), {FILE1: State.EXTRA}),
    "a tensor lacks": (as_one(weights(lambda t: t.pop(WQ))), {ONE: State.MISFIT}),
    "a tied output": (in_config(tie_word_embeddings=True), {}),
    "no output": (as_one(weights(lambda t: t.pop("lm_head.weight"))), {ONE: State.MISFIT}),
    "other layers": (in_config(num_hidden_layers=3), {CONFIG: State.MISFIT}),
    "other width": (in_config(intermediate_size=64), {CONFIG: State.MISFIT}),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_folder_of_one_file(single, case):
    change, expected = SINGLE[case]
    change(single)
    report = verify(single)
    assert states(report) == expected, report.summary()


@pytest.fixture
def narrow(tmp_path) -> Path:
    """A folder of a model that is narrower than all its heads together, like kanana-1.5-2.1b."""
    shape = PARAMS | {"dim": 28, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8}
    source = make_random_checkpoint(tmp_path / "source", shape, tokenizer=byte_tokenizer(tmp_path / "t.model"))
    return to_hugging_face(source, tmp_path / "narrow")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, in the weights 2"),
        ({"head_dim": 10}, "the width of all query heads is 60, in the weights 48; the width of all key heads is 20"),
        ({"num_attention_heads": 4}, "the width of all query heads is 32, in the weights 48"),
        ({"hidden_size": 24, "head_dim": None}, "hidden_size is 24, in the weights 28"),
    ],
)
def test_heads_of_any_width_imply_their_model(narrow, change, says):
    assert verify(narrow).ok and verify(narrow, deep=True).ok
    (narrow / LIST).unlink()
    in_config(**change)(narrow)
    report = verify(narrow, quick=True)
    assert states(report) == {CONFIG: State.MISFIT} and says in report.summary()


def test_a_model_narrower_than_its_heads_is_known_to_every_command(narrow, tmp_path):
    info, model = describe(open_folder(narrow)), find_model(str(narrow))
    assert (info.dim, info.n_heads, info.head_dim, info.parameters) == (28, 6, 8, 52108)
    assert count_parameters(model.args, model.tied) == 52108
    shards = to_meta(narrow, tmp_path / "shards", shards=2)
    assert verify(shards).ok and compare(narrow, shards).identical
    greedy = {"max_gen_len": 6, "temperature": 0}
    built = {"max_seq_len": 32, "device": "cpu", "dtype": "float32"}
    quantized = quantize_folder(narrow, tmp_path / "int8", "int8")
    as_stored = Llama.build(quantized, **built).generate([[5, 6, 7]], **greedy)
    assert as_stored == Llama.build(narrow, quantize="int8", **built).generate([[5, 6, 7]], **greedy)


def test_a_padding_token_beyond_the_embedding_is_only_noted(single):
    pad = {"id": 512, "content": "[PAD]", "special": True}
    edit_json(single / TOKENIZER, lambda t: t["added_tokens"].append(t["added_tokens"][-1] | pad))
    report = verify(single, quick=True)
    assert not report.bad and "'[PAD]' (512) is beyond the model's 512 embeddings" in report.notes[0]
    assert Llama.build(single, max_seq_len=8, device="cpu").tokenizer.n_words == 512
    native = to_meta(single, single.with_name("native"))
    assert verify(native).ok and compare(single, native).identical


def test_of_several_numberings_the_fullest_is_the_model(unlisted):
    (unlisted / INDEX).unlink()
    for n in (1, 2):
        shutil.copy(unlisted / FILE1, unlisted / f"model-0000{n}-of-00009.safetensors")
    report = verify(unlisted, quick=True)
    assert states(report) == dict.fromkeys([f"model-0000{n}-of-00009.safetensors" for n in (1, 2)], State.EXTRA)
    assert "not one of the 3 files whose names end in of-00003" in report.summary()


def test_a_malicious_number_of_files_is_not_trusted(unlisted):
    (unlisted / INDEX).unlink()
    for name in (FILE1, FILE2, FILE3):
        (unlisted / name).rename(unlisted / name.replace("00003.s", "99999.s"))
    assert len(verify(unlisted).files) == 7


@pytest.mark.parametrize("name", [FILE1, INDEX, TOKENIZER, CONFIG])
def test_a_million_brackets_are_no_traceback(unlisted, name):
    brackets = b'{"a":' + b"[" * 10**6
    framed = len(brackets).to_bytes(8, "little") + brackets if name == FILE1 else brackets
    (unlisted / name).write_bytes(framed)
    assert states(verify(unlisted)).keys() == {name}


def test_swapped_files_are_named_by_what_they_hold(folder):
    (folder / FILE1).rename(folder / "x")
    (folder / FILE2).rename(folder / FILE1)
    (folder / "x").rename(folder / FILE2)
    assert states(verify(folder)) == {FILE1: State.MISNAMED, FILE2: State.MISNAMED}


def test_of_contradicting_files_those_with_right_sums_are_whole(folder):
    (folder / INDEX).unlink()
    write_checklist(folder, force=True)
    resave(folder / FILE1, lambda tensors: tensors.update({NORM: torch.ones(32)}))
    assert states(verify(folder, quick=True)) == {FILE3: State.MISFIT}
    assert states(verify(folder)) == {FILE1: State.DAMAGED}


def test_links_and_unfinished_downloads_of_a_hub_cache_are_recognised(folder, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs / f"sum-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"sum-{file.name}")
    assert verify(snapshot).ok
    (blobs / f"sum-{FILE2}").rename(blobs / "0123.incomplete")
    report = verify(snapshot)
    assert states(report) == {FILE2: State.MISSING} and "a download has not finished" in report.summary()


def test_a_growing_file_is_noticed(unlisted, monkeypatch):
    monkeypatch.setattr("llama_ref.checkpoint.integrity.GROWTH_WAIT_SECONDS", 0.3)
    with growing(unlisted / FILE2, 3000):
        assert states(verify(unlisted)) == {FILE2: State.GROWING}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_deep_names_the_tensors_that_hold_nan_or_infinity(unlisted, dtype):
    def poison(tensors: dict) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[NORM][3] = float("nan")
        tensors[WQ if WQ in tensors else "lm_head.weight"][0, :2] = float("-inf")

    resave(unlisted / FILE3, poison)
    write_checklist(unlisted)
    assert verify(unlisted).ok
    report = verify(unlisted, deep=True)
    assert states(report) == {FILE3: State.NOT_FINITE}
    assert f"{NORM}: 1 NaN, 0 infinite" in report.summary() and "0 NaN, 2 infinite" in report.summary()


# ---- both formats, and Meta's


def test_of_both_formats_one_is_checked_and_named(native, folder):
    inner = Path(shutil.copytree(native, folder / "original"))
    report = verify(folder)
    assert report.ok and report.folder == inner
    assert report.notes == ["Meta's files in original/ were checked; the safetensors beside that folder were not"]
    for shard in inner.glob("*.pth"):
        shard.unlink()
    report = verify(folder)
    assert report.ok and report.folder == folder and "original/, which holds no weights, was not" in report.notes[0]
    shutil.copytree(native, folder, dirs_exist_ok=True)  # its list replaces the other
    report = verify(folder)
    assert report.ok and f"Hugging Face's weights too ({FILE1}), which were not checked" in report.notes[0]


def test_params_are_blamed_if_they_alone_are_wrong(native, tmp_path):
    folder = Path(shutil.copytree(native, tmp_path / "folder"))
    params = folder / "params.json"
    edit_json(params, lambda content: content.update(n_layers=3))
    report = verify(folder, quick=True)
    assert states(report) == {"params.json": State.MISFIT}
    assert "it and all 2 files of weights contradict each other: n_layers is 3, in the weights 2)" in report.summary()
    assert states(verify(folder)) == {"params.json": State.DAMAGED}
    write_params = json.loads((native / "params.json").read_text())
    params.write_text(json.dumps(write_params | {"vocab_size": 1024}))  # implies twice the shards
    assert states(verify(folder, quick=True)) == {"params.json": State.MISFIT}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_tensors_imply_their_model(tmp_path, shards):
    folder = tiny_folder(tmp_path / "folder", shards=shards)
    args = open_folder(folder).read_args()
    shapes = {name: tensor.shape for name, tensor in inspect_pth(folder / "consolidated.00.pth").items()}
    implied, n_shards = implied_model(shapes)
    assert n_shards == shards
    for key in ("dim", "n_layers", "vocab_size", "ffn_dim"):
        assert getattr(implied, key) == getattr(args, key)
    for name, shape in shapes.items():
        assert implied_model(shapes | {name: (*shape[:-1], shape[-1] + 1)}) is None


@given(data=st.data())
def test_whatever_the_shapes_a_model_is_implied_or_none(data):
    sizes = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 1 << 27, 1 << 59])
    within = [f"layers.0.{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w1")]
    names = ["norm.weight", "tok_embeddings.weight", *within, "layers.99999999.ffn_norm.weight"]
    n_dims = {name: 1 if "norm" in name else 2 for name in names}
    implied_model({name: tuple(data.draw(sizes) for _ in range(n_dims[name])) for name in names if data.draw(st.booleans())})
    implied_model({name: tuple(data.draw(sizes) for _ in range(n_dims[name])) for name in names[:-1]})


@pytest.fixture
def with_added(folder, tmp_path) -> Path:
    """A native folder whose tokenizer has added tokens."""

    def add(tokenizer: dict) -> None:
        last = tokenizer["added_tokens"][-1]
        tokenizer["added_tokens"][-1] = last | {"content": "안녕", "special": False}

    edit_json(folder / TOKENIZER, add)
    (folder / LIST).unlink()
    native = to_meta(folder, tmp_path / "native")
    assert (native / ADDED_TOKENS).exists()
    return native


def test_added_tokens_belong_to_the_checkpoint(with_added):
    assert ADDED_TOKENS in {entry.name for entry in read_checklist(with_added / LIST).entries}
    assert verify(with_added).ok
    (with_added / LIST).unlink()
    write_checklist(with_added)
    assert ADDED_TOKENS in {entry.name for entry in read_checklist(with_added / LIST).entries}
    cut(with_added / ADDED_TOKENS, 9)
    assert states(verify(with_added)) == {ADDED_TOKENS: State.CUT_SHORT}
    (with_added / LIST).unlink()
    assert states(verify(with_added, quick=True)) == {ADDED_TOKENS: State.CUT_SHORT}


@pytest.mark.parametrize(
    "content, state",
    [
        ({"ordinary": {"더": 512}}, State.MISFIT),  # one token more than vocab_size
        ({"ordinary": {"더": 700}}, State.MISFIT),
        ({"더": 512}, State.MISFIT),
        ("<html>", State.WEB_PAGE),
    ],
)
def test_added_tokens_that_do_not_fit_are_named(with_added, content, state):
    (with_added / LIST).unlink()
    (with_added / ADDED_TOKENS).write_text(content if isinstance(content, str) else json.dumps(content))
    assert states(verify(with_added)) == {ADDED_TOKENS: state}


# ---- verified loading


def build(folder: Path, **options) -> Llama:
    return Llama.build(folder, device="cpu", dtype="float32", **options)


def test_each_file_that_is_used_is_hashed_once(folder, hashed):
    build(folder)
    assert sorted(hashed) == sorted([FILE1, FILE2, FILE3, CONFIG, TOKENIZER])
    build(folder)
    assert len(hashed) == 5
    for name in (FILE2, CONFIG, TOKENIZER):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + (b"\x55" if name == FILE2 else before[-1:] + b" "))
        with pytest.raises(CheckpointError, match=f"{name} does not match checklist.chk"):
            build(folder)
        (folder / name).write_bytes(before)


def test_added_tokens_are_hashed_where_they_are_used(with_added, hashed):
    build(with_added)
    assert sorted(hashed) == [ADDED_TOKENS, "consolidated.00.pth", "params.json", "tokenizer.model"]
    append(with_added / ADDED_TOKENS, b" ")
    with pytest.raises(CheckpointError, match=f"{ADDED_TOKENS} does not match checklist.chk"):
        build(with_added)
    lines = (with_added / LIST).read_text().splitlines(keepends=True)
    (with_added / LIST).write_text("".join(line for line in lines if ADDED_TOKENS not in line))
    with pytest.raises(CheckpointError, match=f"does not name {ADDED_TOKENS}"):
        build(with_added)


def test_without_a_list_one_line_says_so(unlisted, hashed, caplog):
    with caplog.at_level(logging.WARNING):
        build(unlisted)
    assert [record.getMessage() for record in caplog.records] == [
        f"{unlisted} has no checklist.chk, so its files cannot be verified"
    ]
    assert not hashed
    with pytest.raises(CheckpointError, match=r"has no checklist\.chk"):
        build(unlisted, verify="always")


# ---- headers


@pytest.mark.parametrize("dtype", sorted({name for name, _ in DTYPES.values()} - {"float4_e2m1fn_x2", "float8_e8m0fnu"}))
def test_tensors_are_seen_as_the_library_sees_them(tmp_path, dtype):
    made = {"a": torch.zeros(3, 4), "b": torch.zeros(0, 5), "c": torch.zeros(()), "d": torch.zeros(7)}
    path = tmp_path / ONE
    save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in made.items()}, path)
    found = inspect_safetensors(path)
    assert {name: (held.dtype, held.shape) for name, held in found.items()} == {
        name: (dtype, tuple(tensor.shape)) for name, tensor in made.items()
    }
    assert max(held.file_offset + held.nbytes for held in found.values()) == path.stat().st_size


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_deep_looks_at_weights_of_every_dtype(tmp_path, dtype):
    header = json.dumps({"x": {"dtype": dtype, "shape": [16], "data_offsets": [0, DTYPES[dtype][1] * 2]}}).encode()
    (tmp_path / ONE).write_bytes(len(header).to_bytes(8, "little") + header + bytes([1] * DTYPES[dtype][1] * 2))
    report = verify(tmp_path, deep=True)
    assert states(report) == {CONFIG: State.MISSING, TOKENIZER: State.MISSING}


def test_weights_as_pickles_are_reported(single):
    (single / ONE).rename(single / "pytorch_model.bin")
    report = verify(single)
    assert states(report) == {ONE: State.MISSING} and "are pickles (pytorch_model.bin), which are not read" in report.notes[0]


def meaning(path: Path) -> dict:
    return {name: (held.dtype, held.shape, held.file_offset) for name, held in inspect_safetensors(path).items()}


@pytest.mark.attack
@settings(max_examples=attempts(500), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_garbled_header_is_called_sound_that_means_something_else(original, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "garbled"
    if not folder.exists():
        shutil.copytree(original, folder)
        (folder / LIST).unlink()
    path = folder / data.draw(st.sampled_from([FILE1, FILE2, FILE3]))
    before, meant = path.read_bytes(), meaning(path)
    length = 8 + int.from_bytes(before[:8], "little")
    broken = data.draw(garbled(before, length))
    path.write_bytes(broken)
    try:
        report = verify(folder, quick=True)
        if not report.bad:
            assert meaning(path) == meant and len(broken) == len(before)
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == set(meant)
            open_stored(open_folder(folder), open_folder(folder).read_args())
        else:
            assert path.name in states(report)
    finally:
        path.write_bytes(before)


@st.composite
def garbled(draw, content: bytes, length: int) -> bytes:
    """The file with a changed header byte, or with a part removed, duplicated or swapped."""
    at, other = sorted((draw(st.integers(0, length - 1)), draw(st.integers(0, length - 1))))
    match draw(st.sampled_from(["flip", "digit", "cut", "remove", "double", "swap"])):
        case "flip":
            return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        case "digit":
            digits = [match.start() for match in re.finditer(rb"\d", content[:length])]
            at = draw(st.sampled_from(digits))
            return content[:at] + b"%d" % draw(st.integers(0, 9)) + content[at + 1 :]
        case "cut":
            return content[: draw(st.integers(0, len(content) - 1))]
        case "remove":
            return content[:at] + content[other + 1 :]
        case "double":
            return content[:other] + content[at:]
        case _:
            swapped = bytearray(content)
            swapped[at], swapped[other] = content[other], content[at]
            return bytes(swapped)


def test_80_columns_hold_usual_names_in_every_state(folder, monkeypatch, capsys):
    cut(folder / FILE2, 10)
    shutil.copy(folder / FILE1, folder / ONE)
    (folder / CONFIG).unlink()
    monkeypatch.setattr("llama_ref.cli.terminal.WIDE", 80)
    print_reports([verify(folder)], as_json=False)
    *table, last = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80 and "…" not in "".join(table)
    assert all(any(line.startswith(f"  {name} ") for line in table) for name in (FILE1, FILE2, FILE3, ONE, *OTHERS))
    assert "short" in last and CONFIG in last
