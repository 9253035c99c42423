"""Write an overview of one text as an HTML page: `llama-ref lens NAME "…" --out report.html`.

The page (page/) is self-contained: no library, no network. Its Content-Security-Policy, which the
browser enforces, allows one style sheet and one script, by their SHA-256, and nothing else: no
requests, no inline handlers. Data of the model or the prompt is JSON and shown only as text.
"""

import base64
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.resources import files
from itertools import chain
from pathlib import Path

from llama_ref.errors import RequestError
from llama_ref.study.analyses.overview import Overview
from llama_ref.study.report.data import packed_layers, page_data, to_json
from llama_ref.study.report.image_packing import pack_image
from llama_ref.study.report.output import write_output
from llama_ref.tokenizer import Tokenizer

ENDINGS = (".html", ".htm")
SCRIPTS = (
    "base",
    "charts",
    "paper",
    "grids",
    "tokens",
    "lens",
    "attention",
    "image",
    "attribution",
    "features",
    "saliency",
    "patching",
    "norms",
    "main",
)  # concatenated in this order


def check_report(path: str | Path) -> None:
    """Raise RequestError if a report cannot be written; call it before a model is loaded."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise RequestError(f"out is {path!r:.60}, expected a file that ends in {' or '.join(ENDINGS)}")
    try:
        problem = _problem(_target(path))
    except (OSError, RuntimeError) as error:  # RuntimeError: an unknown home directory
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        problem = f"but nothing can be written there: {reason}; choose another folder or name"
    if problem:
        raise RequestError(f"out is {str(path)!r:.200}, {problem}")


def _problem(target: Path) -> str | None:
    """Why a report cannot be written there, or None; raises OSError for some reasons."""
    if target.suffix.lower() not in ENDINGS:
        return f"expected a file that ends in {' or '.join(ENDINGS)}"
    if not target.parent.is_dir():
        return f"but there is no folder {target.parent}: make it first"
    effective = os.access in os.supports_effective_ids
    if not os.access(target.parent, os.W_OK | os.X_OK, effective_ids=effective):
        return f"but {target.parent} is not writable: choose another folder"
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(target.stat().st_mode):
            return "which is a folder: name a file in it"
    return None


def write_report(found: Overview, tokenizer: Tokenizer, path: str | Path, *, model_name: str) -> None:
    """Write or replace the page, atomically.

    Raises RequestError if it cannot be written, or if features, saliency or grids belong to another text.
    """
    check_report(path)
    if found.features is not None and found.features.tokens != found.tokens:
        raise RequestError("the features have other tokens than the overview: measure both on the same text")
    if found.saliency is not None and found.saliency.tokens != found.tokens:
        raise RequestError("the saliency has other tokens than the overview: measure both on the same text")
    if found.patched is not None and list(found.patched.clean) != found.tokens:
        raise RequestError("the grids' clean text has other tokens than the overview: measure both on the same text")
    page = _page(found, tokenizer, model_name)
    write_output(_target(path), (piece.encode() for piece in page))


def _target(path: str | Path) -> Path:
    """The path with ~ and links resolved."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _page(found: Overview, tokenizer: Tokenizer, model_name: str) -> Iterator[str]:
    """The page in pieces: report.html with each {{name}} filled in. Sources are read before the first piece."""
    frame, style = _source("report.html"), _source("report.css")
    script = '"use strict";\n' + "\n".join(_source(f"{name}.js") for name in SCRIPTS)
    image = None if found.image is None else pack_image(found.image)
    inserted = {
        "policy": [_policy(style, script)],
        "style": [style],
        "script": [script],
        "data": [to_json(page_data(found, tokenizer, model_name, image))],
        "patterns": _blocks(chain(packed_layers(found), () if image is None else image.blocks())),
    }
    pieces = enumerate(re.split(r"\{\{(\w+)\}\}", frame))
    return (text for i, piece in pieces for text in (inserted[piece] if i % 2 else [piece]))


def _blocks(blocks: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield data blocks from (id, base64), one per layer, so that the page decodes only the layers that are viewed."""
    for name, packed in blocks:
        yield f'<script type="text/plain" id="{name}">{packed}</script>\n'


def _policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy. The hashes are of the exact text between the tags."""
    return (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _source(name: str) -> str:
    return (files("llama_ref.study.report") / "page" / name).read_text(encoding="utf-8")
