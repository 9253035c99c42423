"""Read a folder's own end-of-text ids and chat template.

Hugging Face's folders have them in generation_config.json, config.json and tokenizer_config.json.
Folders in Meta's format have no such files, unless they were converted from a folder that had: then
generation_config.json and chat_template.jinja keep whatever is not Llama 3's.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ref.errors import CheckpointError
from llama_ref.files import read_json, read_small
from llama_ref.formatting import printable, short
from llama_ref.vocabulary import MAX_FILE_BYTES, Vocabulary

GENERATION_CONFIG, TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
TEMPLATE_LIMIT_BYTES = 1 << 20  # Llama 3.1's has 4 kB

logger = logging.getLogger(__name__)


def end_ids(folder: Path, vocabulary: Vocabulary) -> list[int]:
    """The ids that end a text, according to the folder's files; empty if they name none.

    config.json is often left over from the base model: beside a generation_config.json, its ids
    count only if they are special or added tokens, because transformers' default, 2, is "#" here.
    """
    generation = _eos_ids(folder / GENERATION_CONFIG, vocabulary)
    config = _eos_ids(folder / "config.json", vocabulary)
    if generation:
        ordinary = set(vocabulary.ranks.values())
        config = [i for i in config if i not in ordinary]
    return list(dict.fromkeys(generation + config + _eos_token(folder / "tokenizer_config.json", vocabulary)))


def _eos_ids(path: Path, vocabulary: Vocabulary) -> list[int]:
    settings = read_settings(path)
    text_config = settings.get("text_config")  # of a vision model's config.json
    value = settings.get("eos_token_id", text_config.get("eos_token_id") if isinstance(text_config, dict) else None)
    values = value if isinstance(value, list) else [] if value is None else [value]
    ids = [i for i in values if type(i) is int and 0 <= i < vocabulary.n_words]
    if len(ids) < len(values):
        logger.warning(
            "%s: eos_token_id is %s, expected ids from 0 to %d: others are ignored",
            printable(str(path)),
            printable(short(value)),
            vocabulary.n_words - 1,
        )
    return ids


def _eos_token(path: Path, vocabulary: Vocabulary) -> list[int]:
    """The id of tokenizer_config.json's eos_token, a text or an object that holds it."""
    token = read_settings(path).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    ids = vocabulary.special | vocabulary.added
    return [ids[text]] if isinstance(text, str) and text in ids else []


def chat_template_of(folder: Path) -> str | None:
    """The text of the folder's chat template; None if it has none. It is never executed."""
    path = folder / TEMPLATE_FILE
    if path.exists():
        try:
            return read_small(path, TEMPLATE_LIMIT_BYTES, "a chat template").decode("utf-8-sig", "replace")
        except CheckpointError as error:
            logger.warning("%s; the chat template is ignored", printable(str(error)))
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_settings(folder / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default", next(iter(named.values()), None))
        if isinstance(template, str):
            return template
    return None


def foreign_template(folder: Path) -> str | None:
    """A warning if the folder's chat template does not write Llama 3's format; else None."""
    from llama_ref.checkpoint.hf.chat_template import is_llama_3_template  # slow: it needs tiktoken

    template = chat_template_of(folder)
    if template is None or is_llama_3_template(template):
        return None
    return (
        f"{printable(str(folder))} has a chat template that is not Llama 3's, and templates are not executed here: dialogs "
        "are written in Llama 3's format, which this model may not know; for its own format, write the prompt yourself "
        "with its special tokens (llama-ref complete --special_tokens, text_completion(…, special_tokens=True)), or use "
        "transformers"
    )


def read_settings(path: Path) -> Mapping[str, Any]:
    """The object in an optional JSON file; empty, with a warning, if it cannot be read."""
    if not path.exists():
        return {}
    try:
        content = read_json(path, MAX_FILE_BYTES, "a JSON object")
    except CheckpointError as error:
        logger.warning("%s; the file is ignored", printable(str(error)))
        return {}
    return content if isinstance(content, dict) else {}
