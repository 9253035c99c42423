"""The sdist and the wheel have the right files, and the wheel works without the repository."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY
from folders import tiny_folder

BUILT_FROM = ("llama_ref", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
NOT_PACKED = shutil.ignore_patterns("__pycache__", "*.egg-info")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def call(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", timeout=300, check=False, **options)


def build(what: str, source: Path, target: Path) -> Path:
    """Run the build backend in a folder, as pip and build do; `what` is build_sdist or build_wheel."""
    target.mkdir()
    done = call(sys.executable, "-c", BUILD, what, target, cwd=source)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy: the build backend writes into the folder it builds."""
    scratch = tmp_path_factory.mktemp("sdist")
    source = scratch / "source"
    source.mkdir()
    for name in BUILT_FROM:
        path = REPOSITORY / name
        shutil.copytree(path, source / name, ignore=NOT_PACKED) if path.is_dir() else shutil.copy(path, source)
    return build("build_sdist", source, scratch / "dist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, so that files that the sdist lacks are missing here too."""
    scratch = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    (source,) = scratch.iterdir()
    return build("build_wheel", source, scratch / "dist")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel, and dependencies from the tests'."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q"]
    done = call(*pip, wheel, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    assert done.returncode == 0, done.stderr
    (own,) = folder.glob("lib/python*/site-packages")
    # Only now, or pip would find the llama-ref that is installed there. Python does not run the
    # .pth files of a folder that a .pth file names, so an editable install there has no effect.
    (own / "dependencies.pth").write_text("\n".join(path for path in sys.path if "-packages" in path) + "\n")
    return folder / "bin"


@pytest.fixture
def run(installed, tmp_path):
    """Run a program of that environment outside the repository, without the tests' variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLAMA", "PYTEST"))}
    (tmp_path / "home").mkdir()
    environment = kept | {"HOME": str(tmp_path / "home"), "PYTHONNOUSERSITE": "1", "COLUMNS": "100"}

    def run(name: str, *words: str | Path) -> str:
        done = call(installed / name, *words, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def package_files() -> set[str]:
    """Every file of the package in the repository, as a wheel names it."""
    paths = (path for path in (REPOSITORY / "llama_ref").rglob("*") if path.is_file())
    return {path.relative_to(REPOSITORY).as_posix() for path in paths if path.suffix != ".pyc"}


# ---- contents


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {"llama_ref/py.typed", "llama_ref/study/report/page/report.html"} <= names


def test_the_sdist_has_what_a_wheel_is_built_from(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(path))
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert wheel.name.endswith("-py3-none-any.whl") and metadata["Name"] == "llama-ref"
    assert metadata["Requires-Python"] == ">=3.10"
    always = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {re.match(r"[\w-]+", line)[0] for line in always} >= {"torch", "tiktoken", "numpy"}
    assert metadata.get_payload(decode=True).decode().startswith("# llama_ref")


# ---- the wheel in use


def test_it_is_the_wheel_that_runs(run, installed):
    code = "import llama_ref as it, importlib.metadata as m; print(it.__file__, it.__version__, m.version('llama-ref'))"
    file, version, packaged = run("python", "-c", code).split()
    assert Path(file).is_relative_to(installed.parent)
    assert version == packaged


def test_list_and_complete(run, demo_folder, tmp_path):
    checkpoints = tmp_path / "home" / ".llama" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "Demo").symlink_to(demo_folder)
    assert "Demo" in run("llama-ref", "list")
    words = ("--max_gen_len", "8", "--temperature", "0", "--verify", "never")
    assert "Paris" in run("llama-ref", "complete", "Demo", "The capital of France is", *words)


def test_a_report_is_written_from_the_page_in_the_wheel(run, tmp_path):
    folder = tiny_folder(tmp_path / "Tiny")
    run("llama-ref", "lens", folder, "hello", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "{{" not in page  # every place is filled
    for name in ("report.css", "main.js"):
        source = (REPOSITORY / "llama_ref/study/report/page" / name).read_text(encoding="utf-8")
        assert max(source.splitlines(), key=len).strip() in page
