"""Size limits for a checkpoint's small files: a larger file is neither read nor hashed."""

from pathlib import Path

from llama_ref.args import PARAMS_LIMIT_BYTES
from llama_ref.checkpoint.folder import INDEX_LIMIT_BYTES
from llama_ref.checkpoint.hf.conventions import GENERATION_CONFIG, TEMPLATE_FILE, TEMPLATE_LIMIT_BYTES
from llama_ref.checkpoint.hf.tokenizer import MAX_FILE_BYTES as TOKENIZER_JSON_LIMIT_BYTES
from llama_ref.checkpoint.verify.checklist import CHECKLIST_LIMIT_BYTES, CHECKLIST_NAME
from llama_ref.checkpoint.verify.presence import INDEX_NAME, PREPROCESSOR_CONFIG
from llama_ref.files import check_size
from llama_ref.vocabulary import ADDED_TOKENS, MAX_FILE_BYTES

LIMIT_BYTES = {  # by name; weights have no limit
    "params.json": PARAMS_LIMIT_BYTES,
    "config.json": PARAMS_LIMIT_BYTES,
    "tokenizer.model": MAX_FILE_BYTES,
    "tokenizer.json": TOKENIZER_JSON_LIMIT_BYTES,
    ADDED_TOKENS: MAX_FILE_BYTES,
    GENERATION_CONFIG: MAX_FILE_BYTES,
    "tokenizer_config.json": MAX_FILE_BYTES,
    "special_tokens_map.json": MAX_FILE_BYTES,
    "chat_template.json": MAX_FILE_BYTES,
    PREPROCESSOR_CONFIG: MAX_FILE_BYTES,
    "processor_config.json": MAX_FILE_BYTES,
    TEMPLATE_FILE: TEMPLATE_LIMIT_BYTES,
    INDEX_NAME: INDEX_LIMIT_BYTES,
    CHECKLIST_NAME: CHECKLIST_LIMIT_BYTES,
}


def check_limit(path: Path, n_bytes: int) -> None:
    """Raise CheckpointError if a file of `n_bytes` is larger than its name allows."""
    if path.name in LIMIT_BYTES:
        check_size(path, n_bytes, LIMIT_BYTES[path.name], f"a {path.name}")
