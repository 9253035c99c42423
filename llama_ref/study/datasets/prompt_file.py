"""Read prompts from a file: one per line, as plain text or JSON."""

import json
from pathlib import Path

from llama_ref.errors import RequestError
from llama_ref.text_file import read_text


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file, or the strings or objects' "prompt" values of a .jsonl file, without empty lines.

    Raises RequestError for a file that cannot be read, is not UTF-8, or has no prompts.
    """
    text = read_text(path, "collect it in parts")
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
