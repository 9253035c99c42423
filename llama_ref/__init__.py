"""A native Meta-checkpoint loader and pure-PyTorch reference implementation of Llama 3."""

from llama_ref.args import ModelArgs
from llama_ref.chat import ChatFormat, Dialog, Message
from llama_ref.errors import CheckpointError, LlamaRefError, RequestError
from llama_ref.generation import Llama
from llama_ref.model import KVCache, Transformer
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
