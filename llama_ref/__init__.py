"""A native Meta-checkpoint loader and pure-PyTorch reference implementation of Llama 3."""

import importlib

TYPE_CHECKING = False  # not typing's: importing that would take most of the time of this module
if TYPE_CHECKING:
    from typing import Any

    from llama_ref.args import ModelArgs
    from llama_ref.chat import ChatFormat, Dialog, Message
    from llama_ref.errors import CheckpointError, LlamaRefError, RequestError
    from llama_ref.generation import Llama
    from llama_ref.kv_cache import KVCache
    from llama_ref.model import Transformer
    from llama_ref.sampling import SamplingParams
    from llama_ref.session import Session
    from llama_ref.tokenizer import Tokenizer

__all__ = [
    "ChatFormat",
    "CheckpointError",
    "Dialog",
    "KVCache",
    "Llama",
    "LlamaRefError",
    "Message",
    "ModelArgs",
    "RequestError",
    "SamplingParams",
    "Session",
    "Tokenizer",
    "Transformer",
]
__version__ = "0.1.0"

MODULES = {
    "args": ("ModelArgs",),
    "chat": ("ChatFormat", "Dialog", "Message"),
    "errors": ("CheckpointError", "LlamaRefError", "RequestError"),
    "generation": ("Llama",),
    "kv_cache": ("KVCache",),
    "model": ("Transformer",),
    "sampling": ("SamplingParams",),
    "session": ("Session",),
    "tokenizer": ("Tokenizer",),
}


def __getattr__(name: str) -> "Any":
    """Import a public name on first use: commands that do not need torch do not wait for its import."""
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"llama_ref.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
