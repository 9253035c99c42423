"""`--help` and `--version`: complete, on stdout, exit code 0, at most 80 columns, fast."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench_cuda
import text_completion
from conftest import exit_code
from folders import tiny_folder
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.cli import commands
from llama_ref.cli.parsing.parser import run

NAMES = commands.names()


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["--", "--help"]], ids=" ".join)
def test_the_program_lists_every_command_with_its_summary(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code(words) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80
    for name in NAMES:
        assert re.search(rf"^  {name} +{re.escape(commands.load(name).summary)}$", out, re.M), name
    assert "usage: llama-ref COMMAND" in out and "--version" in out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [80, 40, 200])
def test_a_command_shows_types_defaults_choices_and_short_flags(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert exit_code([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    if columns >= 80:
        assert max(map(len, out.splitlines())) <= 100
    if columns == 80:
        assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    assert f"usage: llama-ref {name}" in words
    for each in commands.load(name).parameters.values():
        if each.positional:
            assert re.search(rf"^  {each.label} +\S", out, re.M)
            continue
        short = f"-{each.flag.short}, " if each.flag.short else ""
        no = "[no-]" if each.is_switch and each.default is not False else ""
        assert f"{short}--{no}{each.name}" in words
        assert " ".join(each.flag.help.split()) in words
        if not each.is_switch:
            assert f"--{each.name} {each.metavar}" in words
            assert each.is_required or each.default in (None, ()) or f"(default: {each.default}" in words


@pytest.mark.parametrize(
    "words",
    [["complete", "-h"], ["help", "complete"], ["--help", "complete"], ["complete", "x", "--help"],
     ["complete", "--prompt", "--help"], ["complete", "--", "--help"], ["complete", "--bogus", "-h"]],
    ids=" ".join,
)  # fmt: skip
def test_help_is_found_wherever_it_is_asked_for(words, capsys):
    assert exit_code(words) == 0
    assert "usage: llama-ref complete NAME [PROMPT] [flags]" in capsys.readouterr().out


def test_what_the_help_of_complete_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code(["complete", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Continue a text, printing tokens as they are generated.\n\n")
    for line in (
        "  NAME    checkpoint folder, or release name such as Llama3.2-1B-Instruct",
        "  -e, --echo                print the prompt first",
        "  -t, --temperature NUMBER  0 always takes the most likely token; higher is more",
        "      --verify auto|always|never",
        "Sampling",
        "Loading",
    ):
        assert f"\n{line}\n" in out
    assert 'llama-ref complete Llama3.2-1B "Once upon a time" --max_gen_len 64\n' in out


@pytest.mark.parametrize(
    ("main", "script", "shown"),
    [
        (text_completion.main, "text_completion.py", ["CKPT_DIR  checkpoint", "(default: 64)"]),
        (bench_cuda.main, "bench_cuda.py", ["--rehearse", "--total NUMBER", "(default: 470.0)"]),
    ],
    ids=["text_completion", "bench_cuda"],
)
def test_scripts_have_the_same_help(main, script, shown, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"scripts/{script}"])
    assert run(main, ["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"usage: {script}" in out
    assert [text for text in shown if text not in out] == []


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_one_line(flag, capsys):
    import torch

    import llama_ref

    assert exit_code([flag]) == 0
    version, _, build = torch.__version__.partition("+")  # installed from an index, the package has no build's name
    expected = rf"llama-ref {re.escape(llama_ref.__version__)} \(torch {re.escape(version)}(\+{build})?, Python 3\."
    assert re.match(expected, capsys.readouterr().out)


IMPORTS = """
import sys
from llama_ref.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "rich", "fire", "tiktoken", "numpy"} & set(sys.modules)
sys.exit(f"imports {sorted(heavy)}" if heavy else code)
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["complete", "--help"], ["--version"], ["completion", "--help"], ["bogus"]],
    ids=" ".join,
)
def test_help_and_misuse_import_nothing_heavy(words):
    command = [sys.executable, "-c", IMPORTS, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "imports" not in done.stderr
    assert done.returncode == (2 if words == ["bogus"] else 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder for LLAMA_MODELS_CONFIG_DIR, with a checkpoint in each format."""
    root = tmp_path_factory.mktemp("llama")
    (root / "checkpoints").mkdir()
    native = tiny_folder(root / "checkpoints" / "native")
    to_hugging_face(native, root / "checkpoints" / "hf")
    return root


@pytest.mark.parametrize("words", ["list", "verify native", "verify -q native", "verify hf", "checksum -f native"])
def test_what_only_looks_at_files_waits_for_no_torch(folders, monkeypatch, words):
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(folders))
    script = IMPORTS.replace('"rich", "fire", ', "")
    command = [sys.executable, "-c", script, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_new_command_is_one_file(tmp_path, monkeypatch, capsys):
    """A new file in commands/ is enough to add a command to help, parsing and completion."""
    (tmp_path / "greet.py").write_text(
        '"""`llama-ref greet`."""\n'
        "from typing import Annotated\n"
        "from llama_ref.cli.parsing.flags import Flag, command\n"
        "@command()\n"
        'def greet(*, who: Annotated[str, Flag("whom to greet", short="w")] = "you") -> None:\n'
        '    """Greet somebody."""\n'
        '    print(f"hello {who}")\n'
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llama_ref.cli.commands.greet", raising=False)
    assert exit_code(["greet", "-w", "42"]) == 0
    assert capsys.readouterr().out == "hello 42\n"
    assert exit_code(["--help"]) == 0
    assert "greet       Greet somebody\n" in capsys.readouterr().out
    assert exit_code(["gret"]) == 2
    assert "did you mean greet?" in capsys.readouterr().err
    assert exit_code(["completion", "bash"]) == 0
    assert "\"greet -\"*) words='--who --help' ;;" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "llama_ref.cli.commands.greet")


def test_the_package_has_one_file_for_each_command():
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(NAMES) and len(files) >= 20
