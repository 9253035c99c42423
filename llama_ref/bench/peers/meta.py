"""Run Meta's reference (llama-models) on the same weights, in one process, as in its example."""

from collections.abc import Iterator
from pathlib import Path

import torch
from fairscale.nn.model_parallel import initialize as model_parallel
from llama_models.llama3.args import ModelArgs as MetaArgs
from llama_models.llama3.model import Transformer as MetaTransformer

from llama_ref.bench.costs import kv_bytes, weight_bytes
from llama_ref.bench.settings import Settings
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.device import named_dtype

SAME = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta")


class Meta:
    """Meta's Transformer.

    Its RoPE factor is always 8: the speed of 3.2 1B and 3B is right, but not their output.
    """

    def __init__(self, settings: Settings, scratch: Path):
        folder, dtype = open_folder(settings.name), named_dtype(settings.dtype)
        args = folder.read_args()
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # exported, but not in __all__
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        model_parallel.initialize_model_parallel(1)
        torch.set_default_dtype(dtype)  # as in Meta's example; no other contestant runs in this process
        self.model = MetaTransformer(
            MetaArgs(
                **{name: getattr(args, name) for name in SAME},
                use_scaled_rope=args.use_scaled_rope,
                max_seq_len=settings.prompt_len + settings.gen_len,
                max_batch_size=max(settings.batches),
            )
        ).eval()
        self.model.load_state_dict(load_model(folder, args, dtype=dtype).state_dict())
        self.precision = settings.dtype
        self.weight_bytes = weight_bytes(self.model, self.model.tok_embeddings)
        self.kv_bytes = kv_bytes(args, dtype.itemsize)

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], gen_len: int) -> Iterator[list[int]]:
        tokens, start = torch.tensor(prompts), 0
        for _ in range(gen_len):
            logits = self.model(tokens, start)
            start += tokens.shape[1]
            tokens = logits[:, -1:].argmax(-1)
            yield tokens[:, 0].tolist()

    def matmul_seconds(self, batch: int, prompt_len: int) -> None:
        return None
