"""The small files that a conversion copies unchanged: each is checked as it would be for loading.

An untrusted folder may have a link to a private file under such a name. Everyone could read the
copy, and the new checklist would confirm it.
"""

from pathlib import Path

from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.hf.conventions import TEMPLATE_FILE
from llama_ref.checkpoint.size_limits import LIMIT_BYTES
from llama_ref.checkpoint.verify.presence import HUGGING_FACE, INDEX_NAME, META, cannot_be_opened, names_in
from llama_ref.errors import CheckpointError
from llama_ref.files import parse_json, read_limited
from llama_ref.vocabulary import ADDED_TOKENS

SETTINGS = {*META.others, *HUGGING_FACE.others} - {INDEX_NAME}


def carried_files(folder: CheckpointFolder) -> list[Path]:
    """The existing files that a conversion copies: parameters, tokenizers and settings."""
    if folder.is_hugging_face:
        names = {*SETTINGS, *HUGGING_FACE.tokenizers}
    elif folder.tokenizer and folder.tokenizer.suffix != ".json":
        names = {*META.others, folder.tokenizer.name}
    else:
        names = {*META.others, "tokenizer.json"} - {ADDED_TOKENS}
    params = [folder.params] if folder.params.exists() else []
    return [*params, *(folder.path / name for name in sorted(names.intersection(names_in(folder.path))))]


def copy_carried(path: Path, target: Path) -> None:
    """Copy the file into the folder `target`; raises as `read_carried` does."""
    (target / path.name).write_bytes(read_carried(path))  # copying by name could follow a link that has changed


def read_carried(path: Path) -> bytes:
    """The unchanged bytes of one of `carried_files`.

    Raises CheckpointError for a device or a pipe, for a file beyond its limit, for JSON that is not an
    object and for a template that is not text. The content of settings is not checked, so their links
    may not lead out of the folder, except into the blobs of a Hugging Face cache. Parameters and
    tokenizers are parsed, which fails for any other file.
    """
    if path.name in SETTINGS and (fault := cannot_be_opened(path.parent, path.name)):
        what = fault.detail or "it does not exist"
        raise CheckpointError(f"cannot copy {path}: {what}; put the file itself there, or remove it")
    limit = LIMIT_BYTES[path.name]
    if path.name == TEMPLATE_FILE:
        data = read_limited(path, limit, "a chat template")
        _check_text(path, data)
    elif path.suffix == ".json":
        data = read_limited(path, limit, "a JSON object")
        if not isinstance(parse_json(path, data, "a JSON object"), dict):
            raise CheckpointError(f"{path} is not a JSON object; fetch it again, or remove it")
    else:
        data = read_limited(path, limit, "a tokenizer")
    return data


def _check_text(path: Path, data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8 ({error.reason}); fetch it again, or remove it") from None
