"""Converted folders hold the same model, take little memory, and are complete or absent."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from folders import PARAMS, byte_tokenizer, tiny_folder
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.formats.atomic import write_params
from llama_ref.checkpoint.integrity import write_checklist
from llama_ref.checkpoint.shapes import expected_shapes
from llama_ref.checkpoint.verify.checklist import CHECKLIST_NAME
from llama_ref.checkpoint.writing.convert import parse_bytes, to_hugging_face, to_meta
from llama_ref.cli import main
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.generation import Llama
from llama_ref.vocabulary import write_tokenizer_model
from make_random_checkpoint import make_random_checkpoint
from vocabularies import VOCABULARIES, vocabulary

REPOSITORY = Path(__file__).resolve().parents[3]
CUT_ON_1 = ("wo.weight", "w2.weight")
WQ, W1 = "layers.0.attention.wq.weight", "layers.1.feed_forward.w1.weight"
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads memory use from /proc")

# 48 query heads, a feed-forward width of 288 and 624 tokens: divisible by 2, 3, 4, 6, 8 and 16.
MANY_HEADS = {
    "dim": 96,
    "n_layers": 2,
    "n_heads": 48,
    "n_kv_heads": 8,
    "vocab_size": 624,
    "multiple_of": 48,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "of a later release": {"kept": [1, None, "예"]},
}
# If shards split groups of 6 query heads, a KV head is stored once for each part of its group.
KV_HEADS_IN = {1: 8, 2: 8, 3: 24, 4: 8, 6: 24, 8: 8, 16: 16}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request, tmp_path_factory) -> Path:
    """One float32 shard."""
    root = tmp_path_factory.mktemp("source")
    write_tokenizer_model(root, vocabulary(pairs=[bytes([97 + i // 16, 97 + i % 16]) for i in range(112)]))
    options = {"tokenizer": root / "tokenizer.model", "tied": request.param, "dtype": torch.float32}
    return make_random_checkpoint(root / "source", MANY_HEADS, **options)


@pytest.fixture(scope="module")
def resharded(source, tmp_path_factory) -> dict[int, Path]:
    """The source in every possible number of shards."""
    root = tmp_path_factory.mktemp("resharded")
    return {shards: to_meta(source, root / str(shards), shards=shards) for shards in KV_HEADS_IN}


@pytest.fixture
def tiny(tmp_path) -> Path:
    return tiny_folder(tmp_path / "tiny")


def weights_of(folder: Path, number: int = 0) -> dict[str, Tensor]:
    return torch.load(folder / f"consolidated.{number:02d}.pth", weights_only=True)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def with_weights(folder: Path, change: Callable[[dict[str, Tensor]], object], number: int = 0) -> Path:
    """Change a shard's tensors in place, and the checklist with them."""
    weights = weights_of(folder, number)
    change(weights)
    torch.save(weights, folder / f"consolidated.{number:02d}.pth")
    write_checklist(folder, force=True)
    return folder


# Shards ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", KV_HEADS_IN)
def test_shards_are_cut_as_metas_are(source, resharded, shards):
    folder, whole = resharded[shards], weights_of(source)
    assert json.loads((folder / "params.json").read_text()) == MANY_HEADS | {"n_kv_heads": KV_HEADS_IN[shards]}
    assert len(list(folder.glob("consolidated.*"))) == shards
    parts = [weights_of(folder, number) for number in range(shards)]
    for name, tensor in whole.items():
        if name.endswith(("wk.weight", "wv.weight")):
            tensor = tensor.unflatten(0, (8, 2)).repeat_interleave(KV_HEADS_IN[shards] // 8, 0).flatten(0, 1)
        dim = 1 if name.endswith(CUT_ON_1) else 0
        expected = [tensor] * shards if tensor.dim() == 1 else tensor.chunk(shards, dim)
        for part, other in zip(parts, expected, strict=True):
            assert part.keys() == whole.keys()
            assert bytes_of(part[name]) == bytes_of(other), name
    same_storage = {part[OUTPUT].data_ptr() == part[EMBEDDING].data_ptr() for part in parts}
    assert same_storage == {whole[OUTPUT].data_ptr() == whole[EMBEDDING].data_ptr()}


def test_whichever_way_leads_there_the_files_are_the_same(source, resharded, tmp_path):
    assert sums(resharded[1]) == sums(source)
    at = source
    for step, shards in enumerate((16, 6, 3, 8, 2, 16, 4, 1)):
        at = to_meta(at, tmp_path / str(step), shards=shards)
        assert sums(at) == sums(resharded[shards]), shards
    assert compare(source, at).identical


def test_logits_are_those_of_the_source(source, resharded):
    options = {"max_seq_len": 64, "device": "cpu", "dtype": "float32"}
    tokens = torch.tensor([[5, 9, 2, 7, 600], [4, 4, 8, 0, 623]])
    with torch.inference_mode():
        expected = Llama.build(source, **options).model(tokens)
        for shards, folder in resharded.items():
            logits = Llama.build(folder, **options).model(tokens)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0, msg=str(shards))


def test_the_checklist_is_true(resharded):
    for folder in resharded.values():
        checked = subprocess.run(["md5sum", "--strict", "-c", CHECKLIST_NAME], cwd=folder, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        listed = {line.split(": ")[0].removeprefix("./") for line in checked.stdout.splitlines()}
        assert listed == {path.name for path in folder.iterdir()} - {CHECKLIST_NAME}


def test_every_bit_pattern_comes_through_not_a_number_included(tiny, tmp_path):
    def any_bits(weights):
        for name, tensor in weights.items():
            bits = torch.randint(-(1 << 15), 1 << 15, tensor.shape, generator=torch.Generator().manual_seed(0))
            weights[name] = bits.to(torch.int16).view(torch.bfloat16)

    with_weights(tiny, any_bits)
    back = to_meta(to_meta(tiny, tmp_path / "4", shards=4), tmp_path / "1", shards=1)
    assert all(bytes_of(tensor) == bytes_of(weights_of(tiny)[name]) for name, tensor in weights_of(back).items())
    back = to_meta(to_hugging_face(tiny, tmp_path / "hf"), tmp_path / "meta")
    assert all(bytes_of(tensor) == bytes_of(weights_of(tiny)[name]) for name, tensor in weights_of(back).items())


@pytest.mark.parametrize("write", [lambda *a: to_meta(*a, shards=2), to_hugging_face], ids=["2 shards", "Hugging Face"])
@pytest.mark.parametrize("form", ["only the embedding", "rope.freqs", "a dtype each", "turned"])
def test_other_forms_of_the_same_files(tiny, tmp_path, write, form):
    changes = {
        "only the embedding": lambda weights: weights.pop(OUTPUT),
        "rope.freqs": lambda weights: weights.update({"rope.freqs": torch.rand(4)}),
        "a dtype each": lambda weights: weights.update({WQ: weights[WQ].float() / 3, W1: weights[W1].half()}),
        "turned": lambda weights: weights.update({WQ: weights[WQ].T.contiguous().T}),
    }
    expected = weights_of(with_weights(tiny, changes[form]))
    expected.pop("rope.freqs", None)
    back = weights_of(to_meta(write(tiny, tmp_path / "there"), tmp_path / "back", shards=1))
    if form == "only the embedding":
        assert back[OUTPUT].data_ptr() == back[EMBEDDING].data_ptr()
        expected[OUTPUT] = expected[EMBEDDING]
    assert back.keys() == expected.keys()
    assert all(back[name].dtype == t.dtype and bytes_of(back[name]) == bytes_of(t) for name, t in expected.items())


def test_parts_of_different_dtypes_lose_nothing(tmp_path):
    folder = tiny_folder(tmp_path / "source", shards=2)
    with_weights(folder, lambda weights: weights.update({WQ: weights[WQ].float() / 3}), 1)
    whole = weights_of(to_meta(folder, tmp_path / "1", shards=1))
    assert whole[WQ].dtype == torch.float32 and whole[W1].dtype == torch.bfloat16
    assert torch.equal(whole[WQ], torch.cat([weights_of(folder)[WQ].float(), weights_of(folder, 1)[WQ]]))


@pytest.mark.parametrize("shards", [1, 2])
def test_equal_heads_are_copies_only_where_shards_need_them(tmp_path, shards):
    """A new model may have equal heads, which training makes different later."""
    folder = tiny_folder(tmp_path / "source", shards=shards)
    for number in range(shards):
        names = [f"layers.{layer}.attention.w{kind}.weight" for layer in range(2) for kind in "kv"]
        with_weights(folder, lambda weights: [weights[name].fill_(1) for name in names], number)  # noqa: B023, called at once
    for target in (to_meta(folder, tmp_path / "as it is"), to_hugging_face(folder, tmp_path / "hf")):
        assert compare(folder, target).identical


def test_copied_heads_do_not_change_what_rope_is_stretched_by(tmp_path):
    """The 3.2 1B's shape implies a factor of 32; with repeated KV heads, the shape differs."""
    small = {"n_layers": 1, "vocab_size": 512, "multiple_of": 16, "ffn_dim_multiplier": 0.05, "use_scaled_rope": True}
    params = PARAMS | small | {"dim": 2048, "n_heads": 32, "n_kv_heads": 8}
    source = make_random_checkpoint(tmp_path / "1", params)
    copied = to_meta(source, tmp_path / "16", shards=16)
    args = ModelArgs.from_json(copied / "params.json")
    assert (args.n_kv_heads, args.rope_scaling_factor) == (16, 32.0)
    back = to_meta(copied, tmp_path / "back", shards=1)
    assert sums(back) == sums(source)


def test_shards_are_as_many_as_there_were_unless_said(tmp_path):
    source = tiny_folder(tmp_path / "source", shards=2)
    assert sums(to_meta(source, tmp_path / "target")) == sums(source)
    assert len(list(to_meta(to_hugging_face(source, tmp_path / "hf"), tmp_path / "meta").glob("*.pth"))) == 1


# Dtypes ----------------------------------------------------------------------------------------------------------------------


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper 16 bits of each float32, rounded to nearest, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("write", [to_meta, to_hugging_face])
def test_casts_round_to_the_nearest(tmp_path, write):
    source = tiny_folder(tmp_path / "source", dtype=torch.float32)
    ties = np.array(
        [1.00390625, 1.01171875, 1.0009765625 + 2**-11, 65519.0, 1e-7, 2**-25], np.float32
    )  # ties, and values too small
    with_weights(source, lambda weights: weights["norm.weight"][: len(ties)].copy_(torch.from_numpy(ties)))

    def cast(dtype: torch.dtype) -> dict[str, Tensor]:
        target = write(source, tmp_path / str(dtype), dtype=dtype)
        return weights_of(target if write is to_meta else to_meta(target, tmp_path / f"{dtype} back"))

    bfloat16, float16 = cast(torch.bfloat16), cast(torch.float16)
    for name, tensor in weights_of(source).items():
        assert np.array_equal(bfloat16[name].view(torch.uint16).numpy(), nearest_bfloat16(tensor.numpy())), name
        assert np.array_equal(float16[name].numpy(), tensor.numpy().astype(np.float16)), name
    wider = weights_of(to_meta(tmp_path / str(torch.bfloat16), tmp_path / "wider", dtype=torch.float32))
    assert all(torch.equal(wider[name], tensor.float()) for name, tensor in bfloat16.items())


@pytest.mark.parametrize("write", [to_meta, to_hugging_face])
def test_a_number_that_would_become_infinite_is_refused(tiny, tmp_path, write):
    with_weights(tiny, lambda weights: weights[W1][3, 5].fill_(-1e5))
    with pytest.raises(CheckpointError, match=rf"{W1} holds 9\.98e\+04, but the largest float16 is 6\.55e\+04"):
        write(tiny, tmp_path / "target", dtype=torch.float16)
    assert not (tmp_path / "target").exists()
    with_weights(tiny, lambda weights: weights[W1][3, 5].fill_(float("-inf")))
    write(tiny, tmp_path / "target", dtype=torch.float16)  # infinity in the source is fine


# Hugging Face's format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VOCABULARIES)
def test_there_and_back_is_the_same_model_with_the_same_tokenizer(tmp_path, name):
    n_words = VOCABULARIES[name].n_words
    source = make_random_checkpoint(tmp_path / "source", PARAMS | {"vocab_size": n_words}, tied=n_words % 2 == 0)
    write_tokenizer_model(source, VOCABULARIES[name])
    write_checklist(source, force=True)
    there = to_hugging_face(source, tmp_path / "there", max_shard_bytes=30_000)
    back = to_meta(there, tmp_path / "back")
    assert compare(source, there).identical and compare(source, back).identical
    assert sums(back)["consolidated.00.pth"] == sums(source)["consolidated.00.pth"]
    again = to_hugging_face(back, tmp_path / "again", max_shard_bytes=30_000)
    assert sums(again) == sums(there)


def test_files_are_no_larger_than_asked_for_and_the_index_finds_every_tensor(tiny, tmp_path):
    folder = to_hugging_face(tiny, tmp_path / "hf", max_shard_bytes=10_000)
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    sizes = {name: sum(tensor.nbytes for tensor in held.values()) for name, held in files.items()}
    assert all(size <= 10_000 or len(files[name]) == 1 for name, size in sizes.items())
    assert list(files) == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: name for name, held in files.items() for tensor in held}
    assert index["metadata"]["total_size"] == sum(sizes.values())

    one = to_hugging_face(tiny, tmp_path / "one")
    assert {path.name for path in one.glob("model*")} == {"model.safetensors"}


def test_a_folder_of_that_format_keeps_its_own_words(tiny, tmp_path):
    source = to_hugging_face(tiny, tmp_path / "source")
    for name, key in (("config.json", "use_cache"), ("tokenizer_config.json", "padding_side")):
        words = json.loads((source / name).read_text()) | {key: "their own", "글": [1.0]}
        (source / name).write_text(json.dumps(words), encoding="utf-8")
    (source / "chat_template.jinja").write_text("{{ theirs }}")
    (source / "README.md").write_text("no part of the model")
    (source / CHECKLIST_NAME).unlink()

    target = to_hugging_face(source, tmp_path / "target", max_shard_bytes=20_000)
    kept = {name: sum_ for name, sum_ in sums(source).items() if name not in ("model.safetensors", "README.md")}
    assert kept.items() <= sums(target).items()
    assert compare(source, target).identical

    cast = to_hugging_face(source, tmp_path / "cast", dtype=torch.float32)
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert json.loads((cast / "config.json").read_text()) == config
    assert {tensor.dtype for tensor in load_file(cast / "model.safetensors").values()} == {torch.float32}
    with pytest.raises(RequestError, match="leave --chat out"):
        to_hugging_face(source, tmp_path / "chat", chat=True)
    expected = sums(target)
    in_place = to_hugging_face(target, target, max_shard_bytes=20_000, force=True)
    assert sums(in_place) == expected


def test_a_folder_without_a_tokenizer_stays_one_and_has_no_place_in_the_other_format(tmp_path):
    """config.json needs the ids of the tokens that begin and end a text."""
    source = make_random_checkpoint(tmp_path / "source", PARAMS)
    assert sums(to_meta(source, tmp_path / "same")) == sums(source)
    with pytest.raises(CheckpointError, match="has no tokenizer, but"):
        to_hugging_face(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("name", "chat", "expected"),
    [("Llama3.2-1B", None, False), ("Llama3.2-1B-Instruct", None, True), ("mine", None, True), ("mine", False, False)],
)
def test_only_a_model_that_chats_gets_a_template(tmp_path, name, chat, expected):
    folder = to_hugging_face(tiny_folder(tmp_path / name), tmp_path / "hf", chat=chat)
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*config.json")}
    assert ("chat_template" in read["tokenizer_config.json"]) is expected
    assert isinstance(read["config.json"]["eos_token_id"], list) is expected
    assert read["generation_config.json"]["eos_token_id"] == read["config.json"]["eos_token_id"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 << 30), (" 1.5 kb ", 1500), ("70000", 70_000), ("1T", 10**12)],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "0", "0.0GB", "0.5", "-5GB", "5XB", "5 G B", "1e9", "nan", "inf", "9" * 400, "٥GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RequestError, match="is not a size; write it like 5GB"):
        parse_bytes(text)


# What cannot be converted ----------------------------------------------------------------------------------------------------


def hf(folder: Path) -> Path:
    """Replace a folder in Meta's format with one in Hugging Face's."""
    target = to_hugging_face(folder, folder.with_name("hf"))
    shutil.rmtree(folder)
    (target / CHECKLIST_NAME).unlink()
    return target.rename(folder)


def hf_config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = hf(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def hf_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        path = hf(folder) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return rewrite


def as_pickles(folder: Path) -> None:
    (hf(folder) / "model.safetensors").rename(folder / "pytorch_model.bin")


def as_adapter(folder: Path) -> None:
    (hf(folder) / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def damaged(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff\xfe")


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BAD_SOURCES = {
    "web page": (lambda folder: (folder / "consolidated.00.pth").write_text("<!DOCTYPE html>"), "is an HTML page"),
    "damaged": (damaged, "does not match checklist.chk"),
    "no tokenizer that fits": (
        lambda folder: byte_tokenizer(folder / "tokenizer.model").open("ab").write(b"YWE= 256\n"),
        "513",
    ),
    "adapter": (as_adapter, r"holds an adapter \(LoRA\)"),
    "pickles": (as_pickles, r"holds its weights as pickles \(\.bin\)"),
    "mistral": (hf_config(model_type="mistral", architectures=["MistralForCausalLM"]), "\"model_type\" is 'mistral'"),
    "qwen": (hf_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), "\"model_type\" is 'qwen2'"),
    "bitsandbytes": (hf_config(quantization_config={"load_in_4bit": True}), "its weights are quantized"),
    "another rope": (hf_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    "biases": (hf_tensors(lambda t: t.update({Q_PROJ[:-6] + "bias": torch.ones(32)})), r"q_proj\.bias \(32,\) is unexpected"),
    "a tensor too many": (
        hf_tensors(lambda t: t.update({"vision.weight": torch.ones(3)})),
        r"vision\.weight \(3,\) is unexpect",
    ),
    "a tensor too few": (hf_tensors(lambda t: t.pop(Q_PROJ)), rf"{Q_PROJ} is missing"),
    "another shape": (hf_tensors(lambda t: t.update({Q_PROJ: torch.ones(32, 16)})), r"has shape \(32, 16\), expected"),
    "fp8": (hf_tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)})), "is float8_e4m3fn, expected bfloat16"),
    "vision": (lambda f: (f / "params.json").write_text(json.dumps(PARAMS | {"vision_chunk_size": 448})), "that reads images"),
}


@pytest.mark.parametrize("command", [["reshard", "--shards", "2"], ["convert", "--to", "hf"], ["convert", "--to", "meta"]])
@pytest.mark.parametrize("fault", BAD_SOURCES)
def test_a_source_that_cannot_be_read_is_reported_in_one_line_and_nothing_is_written(tiny, tmp_path, capsys, fault, command):
    spoil, message = BAD_SOURCES[fault]
    spoil(tiny)
    before = sorted(tmp_path.iterdir())
    word, *options = command
    assert main([word, str(tiny), str(tmp_path / "target"), *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llama-ref: ")
    assert re.search(message, err), err
    assert str(tiny) in err
    assert sorted(tmp_path.iterdir()) == before


MISUSES = [
    (["reshard", "SRC", "DST", "--shards", "0"], "shards is 0, expected a whole number of 1 or more"),
    (["reshard", "SRC", "DST", "--shards", "-2"], "shards is -2"),
    (["reshard", "SRC", "DST", "--shards", "2.5"], "--shards is '2.5', expected a whole number"),
    (["reshard", "SRC", "DST", "--shards", "two"], "shards is 'two'"),
    (["reshard", "SRC", "DST", "--shards", "True"], "--shards is 'True', expected a whole number"),
    (["reshard", "SRC", "DST", "--shards", "3"], "3 shards cannot hold equal parts of 4 query heads"),
    (["reshard", "SRC", "DST", "--shards", "8"], "take one of 1, 2, 4"),
    (["reshard", "nowhere", "DST", "--shards", "2"], "no checkpoint at nowhere"),
    (["reshard", "SRC", "SRC", "--shards", "2"], "--force replaces it"),
    (["reshard", "SRC", "SRC/params.json", "--shards", "2"], "is a file, expected a folder"),
    (["reshard", "SRC", "SRC/params.json/x", "--shards", "2"], "is a file, expected a folder"),
    (["reshard", "SRC", "DST", "--shards", "2", "--verify", "perhaps"], "verify is 'perhaps'"),
    (["convert", "SRC", "DST", "--to", "gguf"], "--to is 'gguf', expected hf or meta"),
    (["convert", "SRC", "DST", "--to", "hf", "--dtype", "int8"], "int8"),
    (["convert", "SRC", "DST", "--to", "hf", "--dtype", ""], "dtype"),
    (["convert", "SRC", "DST", "--to", "hf", "--max_shard_size", "5XB"], "'5XB' is not a size"),
    (["convert", "SRC", "DST", "--to", "hf", "--shards", "2"], "--shards needs --to meta"),
    (["convert", "SRC", "DST", "--to", "meta", "--chat"], "--chat needs --to hf"),
    (["convert", "SRC", "DST", "--to", "meta", "--max_shard_size", "5GB"], "--max_shard_size needs --to hf"),
    (["convert", "SRC", "DST", "--to", "hf", "--chat=perhaps"], "--chat is 'perhaps'"),
]


@pytest.mark.parametrize(("words", "message"), MISUSES, ids=[" ".join(words) for words, _ in MISUSES])
def test_misuse_is_reported_and_nothing_is_written(tiny, tmp_path, capsys, words, message):
    before = sums(tiny)
    code = main([word.replace("SRC", str(tiny)).replace("DST", str(tmp_path / "target")) for word in words])
    assert code == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert sums(tiny) == before and not (tmp_path / "target").exists()


@pytest.mark.parametrize("words", [["reshard"], ["convert"], ["reshard", "--shards", "2", "--dtype", "float32"]])
def test_words_that_are_missing_or_too_many_are_misuse(tiny, tmp_path, words):
    word, *options = words
    assert main([word, str(tiny), str(tmp_path / "target"), *options]) == 2
    assert not (tmp_path / "target").exists()


def test_the_commands_write_and_print_where(tiny, tmp_path, capsys):
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["reshard", str(tiny), a, "--shards", "2"]) == 0
    assert main(["convert", a, b, "--to", "hf", "--max_shard_size", "20kB", "--dtype", "float32", "--chat=false"]) == 0
    assert main(["convert", b, c, "--to", "meta", "--shards", "4", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr() == (f"{a}\n{b}\n{c}\n", "")
    assert compare(tiny, c).identical


# Targets ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["its name", "a link"])
def test_a_folder_can_be_resharded_in_its_own_place(tiny, tmp_path, through):
    expected = sums(to_meta(tiny, tmp_path / "expected", shards=2))
    name = tiny
    if through == "a link":
        name = tmp_path / "link"
        name.symlink_to(tiny)
    with pytest.raises(RequestError, match="--force replaces it"):
        to_meta(name, tiny, shards=2)
    to_meta(name, tiny, shards=2, force=True)
    assert sums(tiny) == expected


@pytest.mark.parametrize("write", [to_meta, to_hugging_face])
def test_a_failure_in_its_own_place_leaves_the_source(tiny, tmp_path, write):
    before = sums(with_weights(tiny, lambda weights: weights[W1][3, 5].fill_(1e5)))
    with pytest.raises(CheckpointError, match="the largest float16"):
        write(tiny, tiny, dtype=torch.float16, force=True)
    assert sums(tiny) == before


def test_a_target_in_the_source_leaves_the_source_whole_and_around_it_is_refused(tiny, tmp_path):
    before = sums(tiny)
    inside = to_hugging_face(tiny, tiny / "hf")
    assert compare(tiny, inside).identical
    shutil.rmtree(inside)
    assert sums(tiny) == before
    with pytest.raises(RequestError, match="which is not a checkpoint file"):
        to_meta(tiny, tmp_path, force=True)
    assert sums(tiny) == before


def test_a_folder_that_may_not_be_written_is_reported(unprivileged_folder):
    source = tiny_folder(unprivileged_folder / "source")
    locked = unprivileged_folder / "locked"
    locked.mkdir(mode=0o555)
    for write in (to_meta, to_hugging_face):
        with pytest.raises(CheckpointError, match=f"cannot create {locked / 'target'}: Permission denied"):
            write(source, locked / "target")
    assert not any(locked.iterdir())


@pytest.mark.parametrize("write", [to_meta, to_hugging_face])
@pytest.mark.parametrize("what", ["its weights change", "its weights vanish", "its params vanish", "its tokenizer changes"])
def test_a_source_that_changes_while_it_is_read_is_reported(tiny, tmp_path, write, what):
    shard = tiny / "consolidated.00.pth"
    deeds = {
        "its weights change": lambda: shard.write_bytes(shard.read_bytes()[::-1]),
        "its weights vanish": lambda: shard.unlink(missing_ok=True),
        "its params vanish": lambda: (tiny / "params.json").unlink(missing_ok=True),
        "its tokenizer changes": lambda: (tiny / "tokenizer.model").write_bytes(b""),
    }
    for verify in ("auto", "never") if "tokenizer" not in what else ("auto",):
        with pytest.raises(CheckpointError, match=str(tiny)):
            write(tiny, tmp_path / "target", verify=verify, progress=lambda *_: deeds[what]())
        assert [path.name for path in tmp_path.iterdir() if "target" in path.name] == []
        shutil.rmtree(tiny)
        tiny_folder(tiny)


# Interrupted runs, and memory ------------------------------------------------------------------------------------------------

WIDE = PARAMS | {"dim": 1024, "n_layers": 1, "n_heads": 8, "n_kv_heads": 2, "ffn_dim_multiplier": 6.0, "multiple_of": 1024}
SHAPES = expected_shapes(ModelArgs.from_dict(WIDE))
LARGEST_BYTES = 2 * max(map(math.prod, SHAPES.values()))


@pytest.fixture(scope="module")
def wide() -> Iterator[Path]:
    """Three matrices of 32 MB each: one shard, eight shards, Hugging Face's format."""
    with tempfile.TemporaryDirectory() as root:  # pytest keeps the folders of three runs
        small, folder = tiny_folder(Path(root) / "tiny"), Path(root) / "wide"
        folder.mkdir()
        shutil.copy(small / "tokenizer.model", folder)
        write_params(folder, WIDE)
        bits = {name: torch.randint(1 << 14, shape, dtype=torch.int16) for name, shape in SHAPES.items()}
        torch.save({name: each.view(torch.bfloat16) for name, each in bits.items()}, folder / "consolidated.00.pth")
        write_checklist(folder)
        to_meta(folder, folder.with_name("wide8"), shards=8)
        to_hugging_face(folder, folder.with_name("widehf"))
        to_hugging_face(small, small.with_name("tinyhf"))
        yield Path(root)


MEASURE = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
    import torch

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    root, kind, source, target = Path(sys.argv[1]), *sys.argv[2:]
    small = "tinyhf" if source == "widehf" else "tiny"
    write = {
        "8": lambda s, t: to_meta(s, t, shards=4 if s.name == small else 8),
        "1": lambda s, t: to_meta(s, t, shards=1),
        "hf": to_hugging_face,
        "float32": lambda s, t: to_hugging_face(s, t, dtype=torch.float32),
    }[kind]
    write(root / small, root / f"{target} small")  # the libraries' first use
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    write(root / source, root / target)
    print(status("VmHWM") - before)
""")


@on_linux
@pytest.mark.parametrize(
    ("kind", "source"), [("8", "wide"), ("1", "wide8"), ("hf", "wide"), ("1", "widehf"), ("float32", "wide8")]
)
def test_memory_stays_near_the_largest_tensor(warm, wide, kind, source):
    target = wide / f"{source} to {kind}"
    command = [warm / "python", "-c", MEASURE, wide, kind, source, target.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout)
    largest = LARGEST_BYTES * (2 if kind == "float32" else 1)
    assert taken < largest + (60 << 20), f"{taken >> 20} MB"
    differing = {tensor.name.split(".")[-2]: tensor.max_abs for tensor in compare(wide / "wide", target).tensors}
    assert all(name in ("wk", "wv") if kind == "8" else distance == 0 for name, distance in differing.items())
    shutil.rmtree(target)


DIE = textwrap.dedent("""
    import os, sys
    from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta

    name, source, target, signal = sys.argv[1:]
    globals()[name](source, target, progress=lambda done, total: done > total // 2 and os.kill(os.getpid(), int(signal)))
""")


@pytest.mark.parametrize("write", [to_meta, to_hugging_face])
def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_clears_up(warm, tiny, tmp_path, write):
    target = tmp_path / "target"
    command = [warm / "python", "-c", DIE, write.__name__, tiny, target, str(int(signal.SIGKILL))]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGKILL
    assert not target.exists() and list(tmp_path.glob(".target.*.partial"))
    write(tiny, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "tiny", "tiny.model"]


INTERRUPTED = textwrap.dedent("""
    import os, signal, sys
    from llama_ref.cli import main
    from llama_ref.progress import ProgressCounter

    advance = ProgressCounter.advance

    def interrupted(self, n=1):
        advance(self, n)
        if self.done > self.total // 2:
            os.kill(os.getpid(), signal.SIGINT)

    ProgressCounter.advance = interrupted
    sys.exit(main(sys.argv[1:]))
""")


@pytest.mark.parametrize("words", [["reshard", "--shards", "4"], ["convert", "--to", "hf"]])
def test_an_interrupted_run_leaves_nothing(warm, wide, tmp_path, words):
    target, (word, *options) = tmp_path / "target", words
    command = [warm / "python", "-c", INTERRUPTED, word, wide / "wide", target, *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, b"", b"")
    assert not any(tmp_path.iterdir())


FULL = textwrap.dedent("""
    import resource, sys
    from llama_ref.cli import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    sys.exit(main(sys.argv[1:]))
""")


@pytest.mark.parametrize("words", [["reshard", "--shards", "4"], ["convert", "--to", "hf"]])
def test_a_target_that_fills_up_leaves_nothing(warm, wide, tmp_path, words):
    word, *options = words
    command = [warm / "python", "-c", FULL, word, wide / "wide", tmp_path / "target", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ)
    assert done.returncode == 1 and done.stdout == ""
    assert "File too large" in done.stderr and "Traceback" not in done.stderr and ".partial" not in done.stderr
    assert not any(tmp_path.iterdir())
