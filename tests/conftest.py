"""Fixtures that several test files share.

Nothing but pytest and PyTorch is imported before a fixture needs it, so that `pytest -m cuda` runs on a machine with a GPU and
little else: there, a file that imports a package the machine lacks is skipped.
"""

import contextlib
import gc
import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait take 7 times as long on busy cores
# As for a user, whose programs flush at exit: errors occur there.
os.environ.pop("PYTHONUNBUFFERED", None)

import pytest
import torch

gc.disable()  # while the tests are collected, which leaves little garbage
# In a shell's background job, where children ignore Ctrl-C too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from llama_ref.generation import Llama
    from llama_ref.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
OWN = {"llama_ref", "scripts", *(path.stem for folder in ("tests", "scripts") for path in (REPOSITORY / folder).glob("*"))}

with contextlib.suppress(ImportError):
    from hypothesis import settings

    # No failures from load or chance.
    settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """With `-m cuda`, skip files that import a missing package; otherwise that is an error."""
    report = yield
    if report.failed and collector.config.option.markexpr == "cuda":
        missing = re.search(r"No module named '(\w+)", str(report.longrepr))
        if missing and missing[1] not in OWN:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


def pytest_collection_finish() -> None:
    """Exempt the tests and modules loaded so far from garbage collection: 5 % of the time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Put stamps of verified files here, not into the user's cache; subprocesses inherit it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Iterator[Path]:
    """A folder with `python`, `llama-ref` and `torchrun` that need not import torch first."""
    from warm import warm_commands

    with warm_commands(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The real small model in Meta's layout; built on first use, in about ten seconds."""
    from llama_ref.demo import NAME, make_demo_checkpoint

    return make_demo_checkpoint(REPOSITORY / "checkpoints" / NAME)


@pytest.fixture(scope="session")
def llama(demo_folder) -> "Llama":
    """The real small model in float32: greedy text does not depend on the batch."""
    from llama_ref.generation import Llama

    return Llama.build(demo_folder, max_seq_len=512, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def shallow(llama) -> "Llama":
    """Only its first layers, in a quarter of the time: for tests that hold for any text."""
    from llama_ref.checkpoint.loading.empty_model import model_without_memory
    from llama_ref.generation import Llama

    model = model_without_memory(replace(llama.model.args, n_layers=4))
    kept = {name: value for name, value in llama.model.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(kept, assign=True)
    return Llama(model.requires_grad_(False), llama.tokenizer, max_seq_len=512)


@pytest.fixture(scope="session")
def peaked(tmp_path_factory) -> "Llama":
    """Two layers of four heads, a token per byte; weights large enough to choose between tokens."""
    from folders import tiny_folder
    from llama_ref.generation import Llama

    folder = tiny_folder(tmp_path_factory.mktemp("peaked") / "Tiny")
    llama = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=1024)
    for name, parameter in llama.model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(10)
    return llama


@pytest.fixture(scope="session")
def one_process_group() -> Iterator[None]:
    """Set up what Meta's reference model needs before it can be built."""
    from fairscale.nn.model_parallel import initialize as model_parallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model_parallel.initialize_model_parallel(1)
    yield
    model_parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def meta_tokenizer_path() -> Path:
    """The real Llama 3 tokenizer.model, from Meta's package."""
    import llama_models

    return Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(meta_tokenizer_path) -> "Tokenizer":
    """Our tokenizer, on the real file."""
    from llama_ref.tokenizer import Tokenizer

    return Tokenizer(meta_tokenizer_path)


@pytest.fixture(scope="session")
def shorter_tokenizer_path(tmp_path_factory, meta_tokenizer_path) -> Path:
    """The first part of Llama 3's tokenizer.model, enough for a Llama Guard; opens faster."""
    from guard_folders import N_RANKS

    path = tmp_path_factory.mktemp("shorter") / "tokenizer.model"
    path.write_bytes(b"".join(meta_tokenizer_path.read_bytes().splitlines(keepends=True)[:N_RANKS]))
    return path


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list[str]:
    """Names of the files that verified loading hashes, recorded with a cache of this test's own."""
    from llama_ref.checkpoint.loading import first_load
    from llama_ref.checkpoint.verify.hashing import hash_open_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = []

    def spy(file, *args, **options):
        names.append(Path(file.name).name)
        return hash_open_file(file, *args, **options)

    monkeypatch.setattr(first_load, "hash_open_file", spy)
    return names


@pytest.fixture
def settled(monkeypatch) -> None:
    """Do not wait to see whether new files grow, in tests where none does."""
    monkeypatch.setattr("llama_ref.checkpoint.integrity.GROWTH_WAIT_SECONDS", 0)


@pytest.fixture
def unprivileged_folder() -> Iterator[Path]:
    """An empty folder of a user whom permissions bind: root runs the test as nobody."""
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except PermissionError:
        pytest.skip("root cannot become another user here")
    finally:
        if is_root:
            os.seteuid(0)


def exit_code(words: Sequence[str]) -> int:
    """Run a command line in this process. Any exception but SystemExit would be a traceback."""
    from llama_ref.cli import main

    try:
        return main(list(words))
    except SystemExit as exit:
        return exit.code


def parsed(text: str) -> Any:
    """Parse strict JSON, without NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)
