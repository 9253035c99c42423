"""Make a small example dictionary of features for a model, to try `llama-ref features`.

Each feature is the residual stream at one word of a text, minus the mean: an example, not a trained
autoencoder. The folder has EleutherAI sparsify's format.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama_ref import Llama, study

N_TEXTS, CONTEXT = 4, 128  # tokens of a text


def make_example_features(llama: Llama, layer: int, folder: Path, k: int = 8, n_texts: int = N_TEXTS) -> Path:
    """Write `folder`/layers.N with a feature for each token's first occurrence; return its path."""
    text = (files("llama_ref.quantization") / "calibration.txt").read_text(encoding="utf-8")
    ids = llama.encode(text)[1 : n_texts * CONTEXT + 1]
    texts = [[llama.tokenizer.bos_id, *ids[i : i + CONTEXT]] for i in range(0, len(ids), CONTEXT)]
    name = f"layers.{layer}.residual_post"
    rows = torch.cat([study.trace(llama.model, each, name)[name][0, 1:].float() for each in texts])
    first = {token: i for i, token in reversed(list(enumerate(ids)))}
    mean = rows.mean(0)
    decoder = torch.nn.functional.normalize(rows[sorted(first.values())] - mean)
    path = folder / f"layers.{layer}"
    path.mkdir(parents=True, exist_ok=True)
    tensors = {"encoder.weight": decoder, "encoder.bias": torch.zeros(len(decoder)), "W_dec": decoder.clone(), "b_dec": mean}
    save_file(tensors, path / "sae.safetensors")
    config = {"d_in": llama.model.args.dim, "num_latents": len(decoder), "k": k, "normalize_decoder": True, "signed": False}
    (path / "cfg.json").write_text(json.dumps(config | {"expansion_factor": 1}))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write layers.N into")
    options = parser.parse_args()
    print(make_example_features(Llama.build(options.checkpoint, dtype="float32"), options.layer, options.out))
