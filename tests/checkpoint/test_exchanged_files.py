"""The loaded files are the hashed ones, whatever happens to links and folders in between."""

import contextlib
import itertools
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attempts import attempts
from background import background
from folders import tiny_folder
from llama_ref.checkpoint.folder import CheckpointFolder, open_folder
from llama_ref.checkpoint.formats.atomic import write_sums
from llama_ref.checkpoint.formats.safetensors import map_safetensors
from llama_ref.checkpoint.loading.first_load import verified
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.reader import read_shard
from llama_ref.checkpoint.writing.convert import Source, to_hugging_face
from llama_ref.errors import CheckpointError

MOMENT_SECONDS = 0.003  # a load takes about ten
NAMES = SHARD, PARAMS, TOKENIZER = ["consolidated.00.pth", "params.json", "tokenizer.model"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Two whole folders of equal shape with different weights."""
    root = tmp_path_factory.mktemp("models")
    return tiny_folder(root / "a", seed=1), tiny_folder(root / "b", seed=2)


@pytest.fixture(autouse=True)
def own_stamps(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def point(link: Path, target: Path) -> None:
    """Point a link to `target` atomically."""
    new = link.with_name("new link")
    new.symlink_to(target)
    new.replace(link)


@contextlib.contextmanager
def flipping(link: Path, *targets: Path) -> Iterator[None]:
    """While the block runs, point a link to one target after the other, for random short times."""
    lengths = random.Random(0)

    def flip(stop: threading.Event) -> None:
        for target in itertools.cycle(targets):
            point(link, target)
            if stop.wait(lengths.expovariate(1 / MOMENT_SECONDS)):
                return

    point(link, targets[0])
    with background(flip):
        yield


def load(folder: CheckpointFolder, verify: str) -> Tensor:
    """A folder's embedding, loaded as `Llama.build` does."""
    with verified(folder, verify, folder.tokenizer):
        args = folder.read_args()
        folder.open_tokenizer(args)
        return load_model(folder, args).tok_embeddings.weight


def attacked(load: Callable[[], Tensor], n_loads: int) -> list[Tensor]:
    """The results of those of `n_loads` loads that were not refused."""
    loaded = []
    for _ in range(n_loads):
        with contextlib.suppress(CheckpointError):
            loaded.append(load().clone())
    print(f"{n_loads} loads while links changed: {len(loaded)} loaded, {n_loads - len(loaded)} refused")
    return loaded


# ---- verified


@pytest.mark.parametrize("verify", ["auto", "always"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_another_one_while_it_was_loaded_is_refused(models, tmp_path, name, verify):
    folder = Path(shutil.copytree(models[0], tmp_path / "folder"))
    original, copy = (Path(shutil.copy2(folder / name, tmp_path / each)) for each in ("original", "copy"))
    (folder / name).unlink()
    point(folder / name, original)
    load(open_folder(folder), verify)
    opened = open_folder(folder)
    with pytest.raises(CheckpointError, match=f"{name} changed while.* or a link"), verified(opened, verify, opened.tokenizer):
        point(opened.path / name, copy)
        args = opened.read_args()
        opened.open_tokenizer(args)
        load_model(opened, args)
        point(opened.path / name, original)
    assert load(open_folder(folder), verify).numel()


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_reads_the_files_that_were_verified(models, tmp_path, name):
    folder = Path(shutil.copytree(models[0], tmp_path / "folder"))
    original, copy = (Path(shutil.copy2(folder / name, tmp_path / each)) for each in ("original", "copy"))
    (folder / name).unlink()
    point(folder / name, copy)
    source = Source.open(folder)
    point(folder / name, original)
    with pytest.raises(CheckpointError, match=f"{name} changed while.* or a link"), source.unchanged("always"):
        pass


def exchange(folder: Path, other: Path) -> None:
    """Give each of two folders the other's name."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    other.rename(folder)
    aside.rename(other)


def test_folders_that_are_renamed_to_and_fro_are_refused(models, tmp_path):
    """Afterwards, neither the path nor the files' times have changed."""
    folder, other = (Path(shutil.copytree(each, tmp_path / each.name)) for each in models)
    opened = open_folder(folder)
    with pytest.raises(CheckpointError, match=f"{SHARD} changed while"), verified(opened, "always"):
        args = opened.read_args()
        exchange(folder, other)
        load_model(opened, args)
        exchange(folder, other)


@pytest.mark.parametrize("is_listed", [False, True])
def test_added_tokens_that_come_or_go_for_a_moment_are_refused(models, tmp_path, is_listed):
    """They rename special tokens, so the number of tokens does not change."""
    renaming, plain = tmp_path / "renaming", tmp_path / "plain"
    shutil.copytree(models[0], renaming)
    shutil.copytree(renaming, plain, copy_function=os.link)  # all other files keep their inode and times
    (renaming / "added_tokens.json").write_text(json.dumps({"special": {"<|renamed|>": 300}}))
    write_sums(renaming, [*NAMES, "added_tokens.json"])
    folder, other = (renaming, plain) if is_listed else (plain, renaming)
    opened = open_folder(folder)
    load(opened, "always")
    with pytest.raises(CheckpointError, match="json appeared or vanished"), verified(opened, "always", opened.tokenizer):
        args = opened.read_args()
        exchange(folder, other)
        assert ("<|renamed|>" in opened.open_tokenizer(args).special_tokens) != is_listed
        exchange(folder, other)


@pytest.mark.attack
def test_no_flipped_link_to_a_file_lets_unverified_weights_in(models, tmp_path):
    folder = Path(shutil.copytree(models[0], tmp_path / "folder"))
    expected = load(open_folder(folder), "never").clone()
    with flipping(folder / SHARD, models[0] / SHARD, models[1] / SHARD):
        loaded = attacked(lambda: load(open_folder(folder), "always"), attempts(30))
    assert len(loaded) < attempts(30) and all(torch.equal(each, expected) for each in loaded)


@pytest.mark.attack
def test_no_flipped_link_to_a_folder_mixes_two_models(models, tmp_path):
    """Both have the same parameters and tokenizer, so only the weights differ."""
    expected = [load(open_folder(each), "never").clone() for each in models]
    with flipping(tmp_path / "link", *models):
        loaded = attacked(lambda: load(open_folder(tmp_path / "link"), "always"), attempts(30))
    assert all(any(torch.equal(each, one) for one in expected) for each in loaded)


# ---- without verification


@pytest.mark.attack
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_file_is_mapped_as_it_was_inspected(models, tmp_path, form):
    """Otherwise a shorter file would be mapped with the longer one's offsets."""
    small = tiny_folder(tmp_path / "small", dtype=torch.float16)
    large = tiny_folder(tmp_path / "large", dtype=torch.float32)
    if form == "safetensors":
        small, large = (to_hugging_face(each, tmp_path / f"{each.name} hf") for each in (small, large))
    files = [next(each.glob(f"*.{form}")) for each in (small, large)]
    read = {"pth": read_shard, "safetensors": map_safetensors}[form]
    expected = [read(file) for file in files]
    with flipping(tmp_path / "link", *files):
        for _ in range(attempts(100)):
            found = read(tmp_path / "link")
            like = expected[found[next(iter(found))].dtype == torch.float32]
            assert found.keys() == like.keys() and all(torch.equal(found[name], like[name]) for name in like)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(models, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with flipping(tmp_path / "link", models[0] / SHARD, tmp_path / "pipe"):
        loaded = attacked(lambda: read_shard(tmp_path / "link")["norm.weight"], 100)
    assert 0 < len(loaded) < 100
