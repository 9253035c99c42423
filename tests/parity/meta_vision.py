"""Meta's own vision model and image transform, on a CPU."""

from functools import partial
from unittest import mock

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from llama_models.llama3.args import ModelArgs as MetaArgs
from llama_models.llama3.chat_format import create_vision_mask
from PIL import Image
from torch import Tensor

from llama_ref.checkpoint.shapes import name_in_shards
from llama_ref.vision import VisionTransformer
from metas_vision import VariableSizeImageTransform
from metas_vision import model as metas


def metas_tiles(image: Image.Image, tile: int, most_tiles: int) -> tuple[Tensor, tuple[int, int]]:
    """Pixels (n, 3, S, S) and grid by Meta's transform."""
    return VariableSizeImageTransform(size=tile)(image, max_num_chunks=most_tiles)


class MetasVisionModel:
    """Meta's model with our model's weights, whose encoder has any width but Meta's depth."""

    def __init__(self, model: VisionTransformer, max_seq_len: int, max_batch_size: int):
        args = model.args
        same = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
        vision = ("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")
        given = {name: getattr(args, name) for name in (*same, *vision, "rope_theta", "use_scaled_rope")}
        with mock.patch.object(metas, "VisionEncoder", partial(metas.VisionEncoder, width=args.vision_dim)):
            self.model = metas.CrossAttentionTransformer(
                MetaArgs(**given, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            )
        projection = ColumnParallelLinear(6 * args.vision_dim, args.dim, bias=True, init_method=lambda x: x)
        self.model.vision_model.vision_projection = projection
        self.model.load_state_dict({name_in_shards(name, args): tensor for name, tensor in model.state_dict().items()})
        self.model.setup_cache(max_batch_size, torch.device("cpu"), torch.float32)
        self.args, self.image_id = args, model.image_id

    @torch.inference_mode()
    def encoded(self, image: Image.Image) -> Tensor:
        """The encoder's output for all tiles of an image: (4, P, 6 · W)."""
        size = self.args.vision_chunk_size
        pixels, grid = metas_tiles(image, size, self.args.vision_max_num_chunks)
        stacked, _ = metas._stack_images([[pixels]], self.args.vision_max_num_chunks, size, 1)
        return self.model.vision_model.vision_encoder(stacked, torch.tensor([[list(grid)]]))[0, 0]

    @torch.inference_mode()
    def logits(self, rows: list[list[int]], images: list[list[Image.Image]], spans: list[list[list[int]]]) -> Tensor:
        """Logits (B, T, V) of ids (B, T) in one pass, rows of equal length.

        `spans`: see `metas_spans`.
        """
        total = len(rows[0])
        keys, mask, rows_mask = self.model.compute_vision_tokens_masks(
            images, [[list(span) for span in row] for row in spans], total, torch.device("cpu")
        )
        positions = torch.arange(total)
        return self.model(positions, torch.tensor(rows), mask, rows_mask, keys, text_only_inference=not any(images))


def metas_spans(prompt: list[int], image_id: int) -> list[list[int]]:
    """Begin and end of the positions that see each image of a prompt; end -1: up to the end."""
    return create_vision_mask(prompt, image_id)
