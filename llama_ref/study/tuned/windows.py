"""Split a long text into windows for fitting a lens; each begins with begin-of-text."""

from pathlib import Path

from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.numbers import is_whole
from llama_ref.text_file import read_text


def read_long_text(path: str | Path) -> str:
    """A file's text. Raises RequestError for one that cannot be read, is not UTF-8, or is empty."""
    text = read_text(path, "fit to a part of it")
    if not text.strip():
        raise RequestError(f"{path} is empty, expected a text to fit to")
    return text


def windows_of(llama: Llama, text: str, context: int) -> list[list[int]]:
    """The text's ids in windows of `context` tokens: begin-of-text, then the next `context` - 1.

    A shorter rest is left out, unless it is the whole text. Raises RequestError for windows that are
    longer than the model allows.
    """
    if not is_whole(context) or not 2 <= context <= llama.max_seq_len:
        raise RequestError(f"context is {context!r:.40}, expected 2 to {llama.max_seq_len:,} (max_seq_len) tokens")
    bos, *ids = llama.encode(text)
    step = int(context) - 1
    return [[bos, *ids[start : start + step]] for start in range(0, max(1, len(ids) - step + 1), step)]
