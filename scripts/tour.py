"""Show docs/tour.md in the terminal and run its code, on the demo or another Llama checkpoint.

    python scripts/tour.py [FOLDER] [--prompt TEXT --other TEXT] [--pause]
    python scripts/tour.py --write

docs/tour.md is the only source: prose, and blocks of Python, each with its output for the demo.
In a pipe this prints the document with the outputs for the given folder. `--write` updates the
outputs in docs/tour.md and makes docs/tour.ipynb from it (with nbformat, from the extra `dev`).

Prose that is true only for the demo and its prompt is marked, with a replacement for other tours:
`<!--demo-->It says Paris.<!--else It says something.-->`. Markdown wants such comments within a line
or on lines of their own.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from llama_ref.cli.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # during the imports below, which take seconds

from rich.markdown import Markdown
from rich.padding import Padding
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from llama_ref.checkpoint.folder import find_folder, open_folder
from llama_ref.cli.console import SafeConsole
from llama_ref.cli.parsing.parser import configure_stdio, guarded
from llama_ref.errors import FolderNotFound, RequestError
from llama_ref.study.inputs import check_not_empty, check_one_process

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
SOURCE, NOTEBOOK = REPOSITORY / "docs" / "tour.md", REPOSITORY / "docs" / "tour.ipynb"
MOST_TOKENS = 64  # of a prompt: every activation is kept, and tables have a column per token

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
SETTING = re.compile(r'^(folder|prompt|other) = "([^"\n]*)"', re.MULTILINE)
DEMO_ONLY = re.compile(r"<!--demo-->(.*?)<!--else(.*?)-->", re.DOTALL)
NOTE = "> *The outputs here are of {folder}. Text that is true only for the demo and its prompt is left out.*\n\n"
FROM_THE_ROOT = """import os
from pathlib import Path

if Path.cwd().name == "docs":  # the notebook's folder; paths are from the repository's root
    os.chdir("..")
"""


@dataclass(frozen=True)
class Part:
    """Prose, or a block of Python with its output ("": none)."""

    text: str
    is_code: bool = False
    output: str = ""

    @property
    def markdown(self) -> str:
        if not self.is_code:
            return self.text
        return f"```python\n{self.text}```\n" + (f"\n```text\n{self.output}```\n" if self.output else "")


def parse(document: str) -> list[Part]:
    """Split a document into parts; their `markdown` joined is the document."""
    parts, end = [], 0
    for block in BLOCK.finditer(document):
        parts += [Part(document[end : block.start()]), Part(block[1], True, block[2] or "")]
        end = block.end()
    return [*parts, Part(document[end:])]


def with_settings(parts: Sequence[Part], settings: dict[str, str]) -> list[Part]:
    """The parts with other values of `folder`, `prompt` and `other` in the code."""

    def setting(found: re.Match[str]) -> str:
        return f"{found[1]} = {_literal(settings[found[1]])}" if found[1] in settings else found[0]

    return [replace(part, text=SETTING.sub(setting, part.text)) if part.is_code else part for part in parts]


def _literal(text: str) -> str:
    """A text as a Python literal, lone surrogates (bytes of a file's name) escaped."""
    return json.dumps(text, ensure_ascii=any("\ud800" <= char <= "\udfff" for char in text))


def with_prose(parts: Sequence[Part], is_demo: bool) -> list[Part]:
    """The parts with the prose for the demo and its prompt, or with the prose for other tours."""
    texts = (DEMO_ONLY.sub(r"\1" if is_demo else r"\2", part.text) for part in parts)
    one_blank_line = (re.sub(r"(\A|\n)\n{2,}", r"\1\n", text) for text in texts)
    return [part if part.is_code else replace(part, text=text) for part, text in zip(parts, one_blank_line, strict=True)]


class Interpreter:
    """Runs one block after another, as a notebook does."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "tour"}

    def run(self, code: str) -> str:
        """Run a block and return its output."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, SOURCE.name, "exec", dont_inherit=True), self.names)
        return printed.getvalue()


def run(parts: Sequence[Part]) -> Iterator[Part]:
    """Run all parts and yield them with their new outputs."""
    interpreter = Interpreter()
    for part in parts:
        yield replace(part, output=interpreter.run(part.text)) if part.is_code else part


# ---- to a terminal, or through a pipe


class Shown(Protocol):
    """Where the tour is shown."""

    def prose(self, text: str) -> None: ...

    def code(self, code: str) -> None: ...

    def output(self, text: str) -> None: ...


class InTerminal:
    """Shows Markdown, highlighted code, and output after a bar."""

    def __init__(self, pause: bool) -> None:
        self.console = SafeConsole(theme=Theme({"markdown.code": "bold cyan"}))  # no black boxes on white
        self.pause = pause and sys.stdin.isatty()

    def prose(self, text: str) -> None:
        for section in re.split(r"^(?=## )", text, flags=re.MULTILINE):
            if section.startswith("## ") and self.pause:
                self.console.input("[dim]Enter continues, Ctrl-C leaves. [/dim]")
            if section.startswith("## "):
                heading, _, section = section.partition("\n")
                self.console.print_safely(Rule(Text(heading.removeprefix("## "), style="bold"), align="left"))
                self.console.print_safely("")
            if section.strip():
                self.console.print_safely(Markdown(LINK.sub(_link_text, section), code_theme="ansi_dark"))
            self.console.print_safely("")

    def code(self, code: str) -> None:
        syntax = Syntax(code.rstrip(), "python", theme="ansi_dark", background_color="default", word_wrap=True)
        self.console.print_safely(Padding(syntax, (0, 0, 0, 2)))

    def output(self, text: str) -> None:
        self.console.print_safely("")
        for line in text.splitlines():
            self.console.print_safely(Text(f"│ {line}", style="green"), soft_wrap=True)
        if text:
            self.console.print_safely("")


def _link_text(link: re.Match[str]) -> str:
    """A link as text, `rotate` (llama_ref/model.py): a terminal cannot follow it."""
    name, path = link[1], link[2].removeprefix("../")
    return f"`{path}`" if path.endswith(name.strip("`/")) else f"{name} ({path})"


class InPipe:
    """Prints the document as Markdown."""

    def __init__(self) -> None:
        self._code = ""  # printed together with its output

    def prose(self, text: str) -> None:
        print(text, end="", flush=True)

    def code(self, code: str) -> None:
        self._code = code

    def output(self, text: str) -> None:
        print(Part(self._code, True, text).markdown, end="", flush=True)


def show(parts: Sequence[Part], where: Shown) -> None:
    """Show all parts; code is shown before it runs."""
    interpreter = Interpreter()
    for part in parts:
        if part.is_code:
            where.code(part.text)
            where.output(interpreter.run(part.text))
        else:
            where.prose(part.text)


# ---- the notebook


def notebook(parts: Sequence[Part], name: str = "tour", first_cell: str = FROM_THE_ROOT) -> str:
    """Make a reproducible notebook with outputs from a document; `name` starts its cells' ids.

    Raises RequestError.
    """
    nb = _nbformat()
    cells = [nb.new_code_cell(first_cell.rstrip(), execution_count=1)]
    for part in with_prose(parts, is_demo=True):
        if part.is_code:
            printed = [nb.new_output("stream", name="stdout", text=part.output)] if part.output else []
            count = 1 + sum(cell.cell_type == "code" for cell in cells)
            cells.append(nb.new_code_cell(part.text.rstrip(), execution_count=count, outputs=printed))
        elif part.text.strip():
            cells.append(nb.new_markdown_cell(part.text.strip()))
    cells[0], cells[1] = cells[1], cells[0]  # the title first
    for number, cell in enumerate(cells):
        cell.id = f"{name}-{number:02d}"
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nb.writes(nb.new_notebook(cells=cells, metadata=python | {"language_info": {"name": "python"}})) + "\n"


def _nbformat() -> ModuleType:
    try:
        import nbformat.v4
    except ImportError:
        raise RequestError("the notebook is written with nbformat, which is not installed: pip install nbformat") from None
    return nbformat.v4


def write() -> None:
    """Update the outputs in docs/tour.md, and docs/tour.ipynb."""
    _nbformat()  # raises now, not after the work
    document = parse(SOURCE.read_text(encoding="utf-8"))
    settings = settings_of(document, None, None, None)
    outputs = [part.output for part in run(with_settings(document, settings))]
    document = [replace(part, output=output) for part, output in zip(document, outputs, strict=True)]
    texts = {SOURCE: "".join(part.markdown for part in document), NOTEBOOK: notebook(document)}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


# ---- the command


def settings_of(document: Sequence[Part], folder: str | None, prompt: str | None, other: str | None) -> dict[str, str]:
    """The document's settings. Raises RequestError, FolderNotFound or CheckpointError."""
    check_one_process()
    if (prompt is None) != (other is None):
        raise RequestError("--prompt and --other go together: the tour compares two prompts of the same number of tokens")
    check_not_empty(**{"--prompt": prompt, "--other": other})
    path = find_folder(folder) if folder else _demo()
    found = dict(SETTING.findall("".join(part.text for part in document if part.is_code)))
    found |= {"folder": str(path) if folder else os.path.relpath(path)}
    if prompt is not None:
        found |= {"prompt": prompt, "other": other}
    _check_prompts(path, found["prompt"], found["other"])
    return found


def _demo() -> Path:
    if not (DEMO / "params.json").exists():
        raise FolderNotFound(
            f"the demo is missing ({DEMO}): make it with `bash scripts/demo.sh`, or, if its packages are installed, with "
            "`llama-ref demo --out checkpoints/SmolLM2-135M-Instruct`; or name another folder"
        )
    return DEMO


def _check_prompts(path: Path, prompt: str, other: str) -> None:
    """Raise for a checkpoint or prompts with which the tour would fail later."""
    folder = open_folder(path)
    args = folder.read_args()
    tokenizer = folder.open_tokenizer(args)
    if folder.is_quantized:
        raise RequestError(f"{path} is quantized, but the tour needs the original matrices: name the folder it was made from")
    n_prompt, n_other = (len(tokenizer.encode(text, bos=True, eos=False)) for text in (prompt, other))
    if n_prompt != n_other:
        raise RequestError(
            f"{prompt!r:.80} has {n_prompt} tokens and {other!r:.80} has {n_other}, but the tour compares them token by token: "
            "give two of the same length with --prompt and --other"
        )
    if n_prompt > MOST_TOKENS:
        raise RequestError(f"the prompts have {n_prompt:,} tokens, but the tour's tables hold only {MOST_TOKENS}: shorten them")


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    out = argparse.ArgumentParser(description="Walk a prompt through a model: docs/tour.md, with its code run here.")
    out.add_argument("folder", nargs="?", help="a checkpoint's folder or release name (default: the demo's)")
    out.add_argument("--prompt", help="text instead of the document's; needs --other")
    out.add_argument("--other", help="text with as many tokens but another word, for the comparison in section 8")
    out.add_argument("--pause", action="store_true", help="wait for Enter before each section, at a terminal")
    out.add_argument("--write", action="store_true", help="update docs/tour.md and docs/tour.ipynb, on the demo")
    return out


def tour(words: argparse.Namespace) -> None:
    """Show the tour, or update the documents with --write."""
    if words.write:
        if words.folder or words.prompt or words.other:
            raise RequestError("--write uses the demo and the document's own prompts: give no other arguments with it")
        write()
        return
    document = parse(SOURCE.read_text(encoding="utf-8"))
    settings = settings_of(document, words.folder, words.prompt, words.other)
    where = InTerminal(words.pause) if sys.stdout.isatty() else InPipe()
    is_demo = not words.folder and not words.prompt
    if not is_demo:
        where.prose(NOTE.format(folder=settings["folder"]))
    show(with_prose(with_settings(document, settings), is_demo), where)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 fine, 1 a bad checkpoint, 2 misuse."""
    words = parser().parse_args(argv)
    configure_stdio()
    return guarded(lambda: tour(words))


if __name__ == "__main__":
    sys.exit(main())
