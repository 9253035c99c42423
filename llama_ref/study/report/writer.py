"""A text and what the model makes of it, as one HTML file: `llama-ref lens NAME "…" --out report.html`.

The page (page/) is complete in itself: no library, no network. Its policy, which a browser enforces, allows the one style sheet
and the one script whose SHA-256 stands in it, and nothing else: no request, no inline handler, no other script. What comes from
the model or the prompt is data in JSON and comes onto the page as text alone.
"""

import base64
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from llama_ref.errors import RequestError
from llama_ref.study.overview import Overview
from llama_ref.study.report.data import packed_layers, page_data, to_json
from llama_ref.study.report.output import write_output
from llama_ref.tokenizer import Tokenizer

ENDINGS = (".html", ".htm")
SCRIPTS = ("base", "charts", "paper", "grids", "tokens", "lens", "attention", "attribution", "norms", "main")  # in this order


def check_report(path: str | Path) -> None:
    """Raise RequestError where no report could be written: better before a model is loaded than after."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise RequestError(f"out is {path!r:.60}, expected a file that ends in {' or '.join(ENDINGS)}")
    try:
        problem = _problem(_target(path))
    except (OSError, RuntimeError) as error:  # a name that is too long; a home that nobody has
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        problem = f"where nothing can be written: {reason}; choose another folder or name"
    if problem:
        raise RequestError(f"out is {str(path)!r:.200}, {problem}")


def _problem(target: Path) -> str | None:
    """What would keep a report from being written there, where no OSError tells."""
    if target.suffix.lower() not in ENDINGS:
        return f"expected a file that ends in {' or '.join(ENDINGS)}"
    if not target.parent.is_dir():
        return f"but there is no folder {target.parent}: make it first"
    effective = os.access in os.supports_effective_ids
    if not os.access(target.parent, os.W_OK | os.X_OK, effective_ids=effective):
        return f"but nothing may be written into {target.parent}: choose another folder"
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(target.stat().st_mode):
            return "which is a folder: name a file in it"
    return None


def write_report(found: Overview, tokenizer: Tokenizer, path: str | Path, *, model_name: str) -> None:
    """Write the page, whole or not at all; a file that is there is replaced. Raises RequestError where it cannot be written."""
    check_report(path)
    page = _page(found, tokenizer, model_name)
    write_output(_target(path), (piece.encode() for piece in page))


def _target(path: str | Path) -> Path:
    """The file itself, where a link leads to it."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _page(found: Overview, tokenizer: Tokenizer, model_name: str) -> Iterator[str]:
    """The page in pieces: its frame, with what belongs there in place of each {{name}}. Its sources are all read at once."""
    frame, style = _source("report.html"), _source("report.css")
    script = '"use strict";\n' + "\n".join(_source(f"{name}.js") for name in SCRIPTS)
    inserted = {
        "policy": [_policy(style, script)],
        "style": [style],
        "script": [script],
        "data": [to_json(page_data(found, tokenizer, model_name))],
        "patterns": _blocks(packed_layers(found)),
    }
    pieces = enumerate(re.split(r"\{\{(\w+)\}\}", frame))
    return (text for i, piece in pieces for text in (inserted[piece] if i % 2 else [piece]))


def _blocks(layers: Iterable[str]) -> Iterator[str]:
    """Data that no browser runs, a block for each layer: so that no more is decoded than is looked at."""
    for layer, heads in enumerate(layers):
        yield f'<script type="text/plain" id="layer-{layer}">{heads}</script>\n'


def _policy(style: str, script: str) -> str:
    """What the page may do, in the words of Content-Security-Policy. Text between tags is hashed as it stands there."""
    return (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _source(name: str) -> str:
    return (files("llama_ref.study.report") / "page" / name).read_text(encoding="utf-8")
