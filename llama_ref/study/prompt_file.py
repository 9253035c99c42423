"""Prompts in a file: one a line, as plain text or as JSON."""

import json
from pathlib import Path

from llama_ref.errors import RequestError

LIMIT_BYTES = 1 << 30


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text; of a .jsonl, its texts or the "prompt" of its objects. Empty lines are left out.

    Raises RequestError for a file that cannot be read, is not UTF-8, or has no prompts.
    """
    try:
        if Path(path).stat().st_size > LIMIT_BYTES:
            raise RequestError(f"{path} is larger than {LIMIT_BYTES:,} bytes: collect it in parts")
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 ({error}): convert it first, as by `iconv -t UTF-8`") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise RequestError(f"{path} has no prompts, expected one a line")
    if Path(path).suffix == ".jsonl":
        return [_from_json(path, number, line) for number, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


def _from_json(path: str | Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise RequestError(f'{path}, line {number}: {line!r:.60}, expected a JSON text or {{"prompt": "…"}}')
    return prompt
