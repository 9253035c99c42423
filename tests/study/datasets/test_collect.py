"""Collected data sets: values equal those of a trace, runs continue, and wrong calls raise clear errors."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from conftest import exit_code
from folders import tiny_folder
from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.model import Transformer
from llama_ref.study.datasets import collection
from random_models import grouped_model, random_model
from study.drawn import FEW, ids_of, models

ARGS = ModelArgs.from_dict(
    {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 60, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0}
)
NAMES = ["layers.*.residual_post", "layers.1.attention.k", "layers.2.attention.head_output", "layers.0.ffn.hidden", "logits"]
LENGTHS = (5, 1, 9, 5, 3, 30, 9, 2)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Limit passes to 12 tokens, and shards to one pass."""
    monkeypatch.setattr("llama_ref.study.passes.pass_size.PASS_TOKENS", 12)
    monkeypatch.setattr(collection, "SHARD_PASSES", 1)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts of several lengths; the last repeats the first."""
    generator = torch.Generator().manual_seed(1)
    some = [torch.randint(60, (length,), generator=generator).tolist() for length in LENGTHS]
    return [*some, some[0]]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*"))


@pytest.mark.parametrize("one_shard", [True, False])
@pytest.mark.parametrize("positions", ["last", "all", [0, -1], lambda ids: [len(ids) // 2]])
def test_values_are_those_of_a_trace(model, prompts, tmp_path, positions, one_shard, request):
    if not one_shard:
        request.getfixturevalue("small_shards")
    found = study.collect(model, prompts, NAMES, to=tmp_path / "a", positions=positions)
    assert len(found) == 9 and (len(shards(tmp_path / "a")) == 1) == one_shard
    assert set(found.names) == set(study.trace(model, [1], NAMES))
    for i, ids in enumerate(prompts):
        alone = study.trace(model, ids, NAMES)
        kept = {"last": [len(ids) - 1], "all": list(range(len(ids)))}.get(positions) if isinstance(positions, str) else None
        kept = kept or [p % len(ids) for p in (positions(ids) if callable(positions) else positions)]
        assert found.positions(i) == kept and found.tokens(i).tolist() == [ids[p] for p in kept]
        for name, values in found.prompt(i).items():
            torch.testing.assert_close(values, alone[name][0, kept])


@FEW
@given(models(), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 99))
def test_values_of_drawn_shapes_are_those_of_a_trace(model, lengths, seed):
    prompts = [ids_of(model, length, seed + i)[0].tolist() for i, length in enumerate(lengths)]
    names = ["layers.*.residual_post", "layers.0.attention.k", "layers.0.attention.head_output", "logits"]
    with TemporaryDirectory() as folder:
        found = study.collect(model, prompts, names, to=folder, positions="all")
        for i, prompt in enumerate(prompts):
            alone = study.trace(model, prompt, names)
            for name, values in found.prompt(i).items():
                torch.testing.assert_close(values, alone[name][0], rtol=1e-4, atol=1e-4)


def test_a_shard_is_let_go_before_the_next_is_computed(model, prompts, tmp_path, small_shards, monkeypatch):
    held = []  # by shard, at its beginning: tensors of those before
    made: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def spy(*shape, **options):
        tensor = empty(*shape, **options)
        if shape[1:] == (ARGS.dim,):
            held.append(sum(one() is not None for one in made))
            made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "empty", spy)
    study.collect(model, prompts, "layers.0.residual_post", to=tmp_path / "a", positions="all")
    assert len(held) == len(shards(tmp_path / "a")) > 2 and set(held) == {0}


def test_some_of_it_is_read(model, prompts, tmp_path, small_shards):
    found = study.collect(model, prompts, "layers.*.residual_post", to=tmp_path / "a", positions="all")
    name = "layers.1.residual_post"
    traces = [study.trace(model, ids, name)[name][0] for ids in prompts]
    torch.testing.assert_close(found.select(name), torch.cat(traces))
    torch.testing.assert_close(found.select(name, [5, -1], 0), torch.stack([traces[5][0], traces[0][0]]))
    torch.testing.assert_close(found.select(name, slice(2, 4), [-1, 0]), torch.cat([each[[-1, 0]] for each in traces[2:4]]))
    assert sum(map(len, found.blocks(name))) == sum(LENGTHS)  # a duplicate text counts once
    again = study.Collected(tmp_path / "a")
    again.select(name, [5])
    assert len(again._mapped) == 1 < len(shards(tmp_path / "a"))
    for wrong, words in (
        (lambda: found.select("norm"), "not collected"),
        (lambda: found.select(name, [9]), "from 0 to 8"),
        (lambda: found.select(name, positions=3), "position is 3"),
    ):
        with pytest.raises(RequestError, match=words):
            wrong()
    last = study.collect(model, prompts[5:6], name, to=tmp_path / "b")
    with pytest.raises(RequestError, match="position 3 of a text of 30 tokens was not collected"):
        last.select(name, positions=3)


def test_shards_are_plain_safetensors(model, prompts, tmp_path):
    found = study.collect(model, prompts, "norm", to=tmp_path / "a", dtype="bfloat16")
    (file,) = shards(tmp_path / "a")
    with safe_open(tmp_path / "a" / file, "pt") as opened:
        assert set(opened.keys()) == {"norm", "tokens"}
        assert opened.get_tensor("norm").dtype == torch.bfloat16
        assert torch.equal(opened.get_tensor("norm"), next(found.blocks("norm")))
    exact = study.collect(model, prompts, "norm", to=tmp_path / "b").select("norm")
    assert torch.equal(found.select("norm"), exact.bfloat16())


def test_an_interrupted_run_continues(model, prompts, tmp_path, small_shards):
    whole = study.collect(model, prompts, NAMES, to=tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.collect(model, prompts, NAMES, to=tmp_path / "a", progress=interrupt)
    before = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in shards(tmp_path / "a")}
    assert 0 < len(before) < len(shards(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match=r"incomplete: \d of \d shards are missing; collect again"):
        study.Collected(tmp_path / "a")
    seen = []
    study.collect(model, prompts, NAMES, to=tmp_path / "a", progress=lambda done, total: seen.append(done))
    assert seen[0] > 0 and seen[-1] == 8 and not list((tmp_path / "a").glob(".*"))
    assert {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in before} == before
    for name in shards(tmp_path / "whole"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(whole) == len(study.Collected(tmp_path / "a"))


def test_another_run_is_refused(model, prompts, tmp_path):
    study.collect(model, prompts, "norm", to=tmp_path / "a")
    other = random_model(ARGS, seed=1)
    for call, word in (
        (lambda to: study.collect(other, prompts, "norm", to=to), "another model"),
        (lambda to: study.collect(model, prompts[1:], "norm", to=to), "other prompts"),
        (lambda to: study.collect(model, prompts, "logits", to=to), "other names"),
        (lambda to: study.collect(model, prompts, "norm", to=to, dtype="float16"), "another dtype"),
        (lambda to: study.collect(model, prompts, "norm", to=to, positions=[0]), "other positions"),
    ):
        with pytest.raises(RequestError, match=f"collected with {word}"):
            call(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"already holds thesis\.txt"):
        study.collect(model, prompts, "norm", to=tmp_path / "b")


EDITS = {
    "patch": lambda model: study.patch(model, {"layers.0.ffn.output": lambda value: value + 1}),
    "steer": lambda model: study.steer(model, torch.ones(ARGS.dim), 5.0, layers=0),
    "ablate": lambda model: study.ablate(model, torch.ones(ARGS.dim)),
    "cut": lambda model: study.cut(model, keys=[0], layers=[0, 1]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_values_are_collected_in_a_new_folder_only(model, prompts, tmp_path, edit):
    name = "layers.2.residual_post"
    plain = study.collect(model, prompts, name, to=tmp_path / "a").select(name)
    with edit(model):
        edited = study.collect(model, prompts, name, to=tmp_path / "b").select(name)
        traced = torch.cat([study.trace(model, ids, name)[name][0, -1:] for ids in prompts])
        torch.testing.assert_close(edited, traced)
        assert not torch.allclose(edited, plain, atol=1e-3)
        with pytest.raises(RequestError, match=r"a was collected without edits, and now .*layers.0.*: choose another"):
            study.collect(model, prompts, name, to=tmp_path / "a")
        with pytest.raises(RequestError, match=r"b was collected with edits of .*layers.0.*: choose another folder"):
            study.collect(model, prompts, name, to=tmp_path / "b")
    with pytest.raises(RequestError, match="b was collected with edits of"):
        study.collect(model, prompts, name, to=tmp_path / "b")
    assert torch.equal(study.Collected(tmp_path / "b").select(name), edited)
    assert torch.equal(study.collect(model, prompts, name, to=tmp_path / "a").select(name), plain)


@pytest.mark.parametrize("edited_first", [True, False])
def test_a_folder_has_no_mix_of_edited_values_and_others(model, prompts, tmp_path, small_shards, edited_first):
    def interrupt(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    def edited() -> AbstractContextManager[None]:
        return study.patch(model, {"layers.1.*": study.scale(2)})

    with edited() if edited_first else nullcontext(), pytest.raises(KeyboardInterrupt):
        study.collect(model, prompts, NAMES, to=tmp_path, progress=interrupt)
    before = shards(tmp_path)
    for block in (edited, nullcontext) if edited_first else (edited,):
        with block(), pytest.raises(RequestError, match=f"was collected with{'' if edited_first else 'out'} edits"):
            study.collect(model, prompts, NAMES, to=tmp_path)
    assert 0 < len(shards(tmp_path)) == len(before)
    with pytest.raises(CheckpointError, match="remove it and collect again" if edited_first else "to continue"):
        study.Collected(tmp_path)


def test_only_edits_of_the_own_passes_count(model, prompts, tmp_path):
    plain = study.collect(model, prompts, "norm", to=tmp_path).select("norm")
    other = random_model(ARGS, seed=1)
    with study.patch(model, {}), study.recording(model, "*"), study.patch(other, {"norm": study.zero()}):
        assert torch.equal(study.collect(model, prompts, "norm", to=tmp_path).select("norm"), plain)
    with ThreadPoolExecutor(1) as elsewhere, study.patch(model, {"norm": study.zero()}):
        again = elsewhere.submit(study.collect, model, prompts, "norm", to=tmp_path).result()
        assert torch.equal(again.select("norm"), plain)


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.1.feed_forward.w2.weight", "output.weight"])
def test_a_model_with_one_other_weight_is_refused(prompts, tmp_path, name):
    wide = grouped_model(8, 2, 2, vocab_size=60)
    study.collect(wide, prompts, "norm", to=tmp_path)
    weight = wide.get_parameter(name)
    kept = weight[3, 1].clone()
    weight[3, 1] = kept.nextafter(torch.tensor(9.0))
    with pytest.raises(RequestError, match="another model"):
        study.collect(wide, prompts, "norm", to=tmp_path)
    weight[3, 1] = kept
    study.collect(wide, prompts, "norm", to=tmp_path)


def test_a_folder_of_the_first_format_is_read_but_not_continued(model, prompts, tmp_path):
    values = study.collect(model, prompts, "norm", to=tmp_path).select("norm")
    index = json.loads((tmp_path / "index.json").read_text())
    del index["edited"]
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": "llama_ref collection 1"}))
    assert torch.equal(study.Collected(tmp_path).select("norm"), values)
    with pytest.raises(RequestError, match="begun by an earlier version of llama_ref"):
        study.collect(model, prompts, "norm", to=tmp_path)


def test_misuse_is_named(model, prompts, tmp_path):
    to = tmp_path / "a"
    for call, words in (
        (lambda: study.collect(model, prompts, "layers.0.attention.pattern", to=to), "pattern cannot be collected"),
        (lambda: study.collect(model, prompts, "layers.9.residual_post", to=to), "layers 0 to 2"),
        (lambda: study.collect(model, [[1], [60]], "norm", to=to), "prompt 1: tokens contains 60"),
        (lambda: study.collect(model, [[1], []], "norm", to=to), "prompt 1: tokens is empty"),
        (lambda: study.collect(model, ["Hello"], "norm", to=to), "needs a tokenizer"),
        (lambda: study.collect(model, "Hello", "norm", to=to), "expected a list of texts"),
        (lambda: study.collect(model, [[1, 2], [1]], "norm", to=to, positions=[1]), "position of prompt 1 is 1"),
        (lambda: study.collect(model, prompts, "norm", to=to, positions="first"), 'expected "last", "all"'),
        (lambda: study.collect(model, prompts, "norm", to=to, dtype="int8"), "dtype is 'int8'"),
        (lambda: study.collect("Tiny", prompts, "norm", to=to), "model is of type str"),
    ):
        with pytest.raises(RequestError, match=words):
            call()
    assert not to.exists()
    loud = random_model(ARGS, seed=0)
    loud.norm.weight.data.fill_(1e6)
    with pytest.raises(RequestError, match="float16 cannot hold"):
        study.collect(loud, prompts, "norm", to=to, dtype="float16")
    assert shards(to) == []


def test_a_full_disk_leaves_no_half_shard(model, prompts, tmp_path):
    study.collect(model, prompts, NAMES, to=tmp_path / "whole", positions="all")
    size = (tmp_path / "whole" / shards(tmp_path / "whole")[0]).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(RequestError, match=r"cannot write .*shard-00000"):
            study.collect(model, prompts, NAMES, to=tmp_path / "a", positions="all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["index.json"]
    study.collect(model, prompts, NAMES, to=tmp_path / "a", positions="all")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("texts"), "damaged"),
        (lambda index: index.update(prompts=[99]), "damaged"),
        (lambda index: index["shards"][0].update(file="../x"), "outside its folder"),
        (lambda index: index.update(edited=[1]), "edited names are not a list"),
        (lambda index: index.update(edited=""), "edited names are not a list"),
        (lambda index: index.update(format="other"), "not an index of a collection"),
        (lambda index: index["names"].update(norm=[7]), "other tensors than the index says"),
    ],
)
def test_a_damaged_folder_is_named(model, prompts, tmp_path, change, words):
    study.collect(model, prompts, "norm", to=tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    change(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        study.Collected(tmp_path).select("norm")


# ---- the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("collect") / "Tiny"))


def test_the_command_reads_lines_and_jsonl(tiny, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("One line\n\nAnother, longer line\n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "One line"}\n"Another, longer line"\n')
    words = ("--names", "layers.*.residual_post,norm", "--positions", "0,-1", "--dtype", "float32")
    for file in ("lines.txt", "lines.jsonl"):
        assert exit_code(["collect", tiny, str(tmp_path / file), *words, "--to", str(tmp_path / f"{file}.d")]) == 0
    assert "2 prompts" in capsys.readouterr().out
    a, b = (study.Collected(tmp_path / f"{file}.d") for file in ("lines.txt", "lines.jsonl"))
    assert len(a) == 2 and a.names[-1] == "norm" and torch.equal(a.select("norm"), b.select("norm"))
    (tmp_path / "bad.jsonl").write_text('{"text": "One line"}\n')
    assert exit_code(["collect", tiny, str(tmp_path / "bad.jsonl"), *words, "--to", str(tmp_path / "c")]) == 2
    assert "line 1" in capsys.readouterr().err


def test_a_killed_command_continues(tiny, tmp_path):
    (tmp_path / "lines.txt").write_text("".join(f"{'word ' * 16}{i}\n" for i in range(1300)))
    to = tmp_path / "to"
    words = ["collect", tiny, str(tmp_path / "lines.txt"), "--names", "norm", "--to", str(to)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    running = subprocess.Popen([sys.executable, "-m", "llama_ref.cli", *words], env=env, stderr=subprocess.DEVNULL)
    while running.poll() is None and not shards(to):
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL, "the command ended before the test killed it"
    n_shards, done = len(json.loads((to / "index.json").read_text())["shards"]), len(shards(to))
    assert 0 < done < n_shards
    assert exit_code(words) == 0
    assert len(study.Collected(to)) == 1300
