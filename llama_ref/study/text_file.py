"""Read a file of text that a study is given."""

from pathlib import Path

from llama_ref.errors import RequestError

LIMIT_BYTES = 1 << 30


def read_text(path: str | Path, too_large: str) -> str:
    """A file's text; `too_large` says what to do with one above LIMIT_BYTES.

    Raises RequestError for a file that is larger, cannot be read, or is not UTF-8.
    """
    try:
        if Path(path).stat().st_size > LIMIT_BYTES:
            raise RequestError(f"{path} is larger than {LIMIT_BYTES:,} bytes: {too_large}")
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 ({error}): convert it first, as by `iconv -t UTF-8`") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
