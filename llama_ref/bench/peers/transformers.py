"""Run Hugging Face's LlamaForCausalLM, with its own cache and default attention."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no downloads; must be set before transformers is imported

import torch
from transformers import LlamaForCausalLM

from llama_ref.bench.costs import kv_bytes, weight_bytes
from llama_ref.bench.settings import Settings
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.device import named_dtype


class Transformers:
    def __init__(self, settings: Settings, scratch: Path):
        folder, dtype = open_folder(settings.name), named_dtype(settings.dtype)
        path = folder.path
        if not folder.is_hugging_face:
            path = to_hugging_face(settings.name, scratch / "transformers", verify="never")
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.precision = settings.dtype
        self.weight_bytes = weight_bytes(self.model, self.model.get_input_embeddings())
        self.kv_bytes = kv_bytes(folder.read_args(), dtype.itemsize)

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], gen_len: int) -> Iterator[list[int]]:
        tokens, cache = torch.tensor(prompts), None
        for _ in range(gen_len):
            out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield tokens[:, 0].tolist()

    def matmul_seconds(self, batch: int, prompt_len: int) -> None:
        return None
