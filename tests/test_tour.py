"""docs/tour.md: blocks print what is shown, links and numbers hold; scripts/tour.py, notebook."""

import ast
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import tour
from conftest import REPOSITORY, exit_code
from folders import tiny_folder
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.demo import NAME

DOCUMENT = tour.parse(tour.SOURCE.read_text(encoding="utf-8"))
PROSE = "".join(part.text for part in DOCUMENT if not part.is_code)
COLUMNS = 78  # of code and output: a terminal has 80, and both are indented by two


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Two layers with random weights and one token per byte."""
    return tiny_folder(tmp_path_factory.mktemp("tour") / "Tiny", tied=True)


# ---- the document


def test_by_hand_is_as_in_the_model():
    outputs = "".join(part.output for part in DOCUMENT)
    assert outputs.count("the same\n") == 17 and "DIFFERENT" not in outputs


def test_code_and_outputs_fit_a_terminal():
    blocks = [block.splitlines() for part in DOCUMENT if part.is_code for block in (part.text, part.output)]
    assert [line for block in blocks for line in block if len(line) > COLUMNS] == []
    assert max(map(len, blocks)) <= 20


def test_every_link_leads_to_a_file_that_has_what_it_names():
    links = tour.LINK.findall(PROSE)
    assert len(links) > 30
    for text, target in links:
        path = (tour.SOURCE.parent / target).resolve()
        assert path.exists() and path.is_relative_to(REPOSITORY), target
        name = text.strip("`")
        if text.startswith("`") and not target.rstrip("/").endswith(name.rstrip("/")):
            assert name in definitions(path), f"{name} is not in {target}"


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods of a file by name: `Attention`, `Attention.forward`."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    methods = {f"{node.name}.{inner.name}" for node in found for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return methods | {node.name for node in found}


def test_every_number_of_the_text_stands_in_an_output_or_in_code():
    sections = re.split(r"^(?=## )", tour.SOURCE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    stray, n_numbers = [], 0
    for section in sections:
        blocks = re.findall(r"^```.*?^```", section, re.MULTILINE | re.DOTALL)
        text = re.sub(r"^```.*?^```", "", section, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"^[#|].*", "", text, flags=re.MULTILINE)  # headings, and the table of sections
        text = re.sub(r"[Ss]ections? \d( and \d)*|Llama 3|SmolLM2-135M|\]\([^)]*\)", "", text)
        numbers = re.findall(r"(?<![\w.])\d(?:[\d,.]*\d)?%?", text)
        n_numbers += len(numbers)
        stray += [n for n in numbers if not re.search(rf"(?<![\d,.]){re.escape(n)}(?!\d)", "".join(blocks))]
    assert stray == [] and n_numbers > 10


def test_the_commands_find_what_the_document_says(demo_folder, capsys):
    sessions = re.findall(r"^\$ llama-ref ((?:.*\\\n)*.*)\n((?:.*\n)*?)(?=```)", PROSE, re.MULTILINE)
    assert len(sessions) == 2
    for command, expected in sessions:
        words = shlex.split(command.replace("\\\n", " ").replace("DEMO", shlex.quote(str(demo_folder))))
        assert exit_code(words) == 0
        pattern = re.escape(expected.strip()).replace("…", ".*")
        assert re.fullmatch(pattern, capsys.readouterr().out.strip(), re.DOTALL), command


def test_the_demo_of_the_document_is_the_demo():
    assert tour.DEMO == REPOSITORY / "checkpoints" / NAME
    assert f'folder = "checkpoints/{NAME}"' in DOCUMENT[1].text


def test_prose_for_the_demo_alone_is_marked_and_has_another_for_others():
    marked = tour.DEMO_ONLY.findall(PROSE)
    assert len(marked) == PROSE.count("<!--demo") == PROSE.count("<!--else") > 10
    assert re.findall(r"^<!--demo-->.|^<!--else(?!-->$).", PROSE, re.MULTILINE) == []  # Markdown would take the line as HTML
    for is_demo in (True, False):
        prose = "---".join(part.text for part in tour.with_prose(DOCUMENT, is_demo) if not part.is_code)
        found = re.findall(r"country|capital|France|Paris|Ital|Rome|cold|\b[1-9]\d?%", prose)
        assert "<!--" not in prose and "\n\n\n" not in prose and bool(found) == is_demo, found


# ---- the notebook


def test_the_notebook_is_the_document():
    assert tour.NOTEBOOK.read_text(encoding="utf-8") == tour.notebook(DOCUMENT)
    assert "".join(part.markdown for part in DOCUMENT) == tour.SOURCE.read_text(encoding="utf-8")


def test_the_notebook_runs_to_the_same_outputs(warm, demo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(warm / "python"))  # the kernel's
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    shown = nbformat.read(tour.NOTEBOOK, as_version=4)
    nbformat.validate(shown)
    resources = {"metadata": {"path": str(tour.NOTEBOOK.parent)}}
    done = NotebookClient(nbformat.from_dict(shown), kernel_name="python3", timeout=120, resources=resources).execute()
    assert [printed(cell) for cell in done.cells] == [printed(cell) for cell in shown.cells]
    assert sum(map(bool, map(printed, done.cells))) > 30


def printed(cell: nbformat.NotebookNode) -> str:
    """A cell's output on both streams, joined."""
    return "".join(output.get("text", str(output)) for output in cell.get("outputs", []))


# ---- the script


def test_another_checkpoint_is_toured_through_a_pipe(tiny, capsys):
    assert tour.main([str(tiny), "--prompt", "ein Baum", "--other", 'ein "aum']) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"> *The outputs here are of {tiny}.")
    parts = tour.parse(out)
    assert [part.is_code for part in parts] == [part.is_code for part in DOCUMENT]
    assert not re.search("country|capital|France|Paris|Rome|<!--", "".join(part.text for part in parts if not part.is_code))
    assert 'prompt = "ein Baum"\nother = "ein \\"aum"' in parts[1].text
    outputs = "".join(part.output for part in parts)
    assert outputs.count("the same\n") == 17 and "DIFFERENT" not in outputs
    assert "layers.1.residual_post           (1, 9, 32)       the same" in outputs
    assert "rows that are the same in tok_embeddings: 512 of 512" in outputs


@pytest.mark.parametrize("columns", [80, 120])
def test_in_a_terminal_it_fits_and_shows_links_as_files(tiny, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    settings = {"folder": str(tiny), "prompt": "ein Baum", "other": "ein Raum"}
    tour.show(tour.with_settings(DOCUMENT[:12], settings), tour.InTerminal(pause=True))  # no terminal to wait at
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "\n1. Text becomes ids ──" in out and "\n│     98  b\n" not in out and "\n│     66  B\n" in out
    assert "Tokenizer.encode (llama_ref/tokenizer.py)" in " ".join(out.split()) and "../" not in out


def test_what_is_no_unicode_can_be_toured(tiny, capsys):
    assert tour.main([str(tiny), "--prompt", "a\udce9", "--other", "bé"]) == 2  # a replacement character has three bytes
    assert "has 5 tokens" in capsys.readouterr().err
    assert tour.main([str(tiny), "--prompt", "a\udce9", "--other", "a\udcea"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["/nowhere"], 2, "no checkpoint at /nowhere"),
        (["TINY"], 2, "'The capital of France is' has 25 tokens and 'The capital of Italy is' has 24"),
        (["TINY", "--prompt", "a"], 2, "--prompt and --other go together"),
        (["TINY", "--prompt", "", "--other", "a"], 2, "--prompt is empty"),
        (["TINY", "--prompt", "a" * 64, "--other", "b" * 64], 2, "the prompts have 65 tokens"),
        (["QUANTIZED"], 2, "is quantized"),
        (["BARE"], 1, "lacks tokenizer.model"),
        (["EMPTY"], 1, "is empty"),
        (["--write", "TINY"], 2, "--write uses the demo"),
    ],
)
def test_a_wrong_turn_is_one_line(words, code, said, tiny, tmp_path, capsys):
    folders = {"TINY": tiny, "BARE": tmp_path / "bare", "EMPTY": tmp_path / "empty", "QUANTIZED": tmp_path / "quantized"}
    folders["EMPTY"].mkdir()
    if "BARE" in words:
        (tiny_folder(folders["BARE"]) / "tokenizer.model").unlink()
    if "QUANTIZED" in words:
        quantize_folder(tiny, folders["QUANTIZED"], "int8", calibrate=False)
    assert tour.main([str(folders.get(word, word)) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llama-ref: ") and err.count("\n") == 1 and said in err


def test_without_the_demo_it_says_how_to_make_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tour, "DEMO", tmp_path / "demo")
    assert tour.main([]) == tour.main(["--write"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("scripts/demo.sh") == err.count("llama-ref demo") == err.count("\n") == 2


def test_without_nbformat_nothing_is_written(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbformat.v4", None)
    before = [path.read_bytes() for path in (tour.SOURCE, tour.NOTEBOOK)]
    assert tour.main(["--write"]) == 2
    assert "pip install nbformat" in capsys.readouterr().err
    assert [path.read_bytes() for path in (tour.SOURCE, tour.NOTEBOOK)] == before
