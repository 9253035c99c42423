"""A process of test_meta_shards.py: Meta's model on the shard of its rank, as in Meta's scripts.

torchrun --nproc_per_node W meta_worker.py OUT FOLDER …
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as model_parallel
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for torchrun
from parity.meta_quantized import metas_fp8_model

TOKENS = torch.tensor([[5, 9, 2, 7, 1, 3, 600], [4, 4, 8, 0, 6, 2, 623]])


@torch.inference_mode()
def logits_of(folder: Path) -> Tensor:
    rank = model_parallel.get_model_parallel_rank()
    if (folder / "fp8_scales_0.pt").exists():
        return metas_fp8_model(folder, rank)(TOKENS, 0)
    params = json.loads((folder / "params.json").read_text())
    model = Transformer(ModelArgs(max_seq_len=16, max_batch_size=2, **params))
    shard = folder / f"consolidated.{rank:02d}.pth"
    model.load_state_dict(torch.load(shard, weights_only=True), strict=True)
    return model(TOKENS, 0)


def main(out: str, *folders: str) -> None:
    dist.init_process_group("gloo")
    model_parallel.initialize_model_parallel(dist.get_world_size())
    logits = [logits_of(Path(folder)) for folder in folders]
    if dist.get_rank() == 0:
        torch.save(logits, out)
    dist.barrier()
    os._exit(0)  # Gloo's threads abort some interpreters in a normal shutdown


if __name__ == "__main__":
    main(*sys.argv[1:])
