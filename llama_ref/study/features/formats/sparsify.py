"""EleutherAI's sparsify: cfg.json and sae.safetensors. TopK; an autoencoder subtracts its bias first."""

import re
from pathlib import Path
from typing import Any

from llama_ref.files import BadValue, json_object, require_keys
from llama_ref.study.features.activations import TopK
from llama_ref.study.features.dictionary import Features, Weights
from llama_ref.study.features.sites import Claims
from llama_ref.study.features.stored import CONFIG_LIMIT_BYTES, Stored, check_k, count, refuse, switch, word

CONFIG = "cfg.json"
FILE = "sae.safetensors"
NAME = re.compile(r"(?:model\.)?(?:layers\.|layer_)(\d{1,3})(?:\.(mlp|self_attn|attention))?")
KINDS = {None: "residual_post", "mlp": "ffn", "self_attn": "attention", "attention": "attention"}


def read_sparsify(folder: Path, claims: Claims) -> Features:
    """Read a sparsify folder. Raises CheckpointError for invalid files, RequestError for an unclear site."""
    with json_object(folder / CONFIG, "cfg.json of sparsify", "d_in, k, expansion_factor", CONFIG_LIMIT_BYTES) as config:
        require_keys(config, ("d_in", "k"))
        transcodes = switch(config, "transcode", False)
        if word(config, "activation", "topk") != "topk":
            raise refuse(f"activation is {config['activation']!r:.40}")
        _claim_name(folder, claims, transcodes)
        site = claims.settle(folder)
        weights = _weights(Stored(folder / FILE), config, transcodes)
        top = TopK(check_k(count(config, "k"), len(weights.encoder)), switch(config, "signed", False))
        return Features(weights, top, site, path=folder, form="sparsify")


def _claim_name(folder: Path, claims: Claims, transcodes: bool) -> None:
    found = NAME.fullmatch(folder.name)
    if found:
        claims.layers["the folder's name"] = int(found[1])
        kind = KINDS[found[2]]
        claims.kinds["the folder's name"] = "transcoder" if transcodes and kind == "ffn" else kind


def _weights(stored: Stored, config: dict[str, Any], transcodes: bool) -> Weights:
    dim = count(config, "d_in")
    n_features = config.get("num_latents") or dim * count(config, "expansion_factor")
    encoder = stored.matrix("encoder.weight")
    if tuple(encoder.shape) != (n_features, dim):
        raise BadValue(f"says {n_features} features of {dim} dimensions, but encoder.weight is {tuple(encoder.shape)}")
    bias = stored.vector("b_dec", dim)
    return Weights(
        encoder,
        stored.vector("encoder.bias", n_features),
        stored.shaped("W_dec", (n_features, dim)),
        bias,
        None if transcodes else bias,
        stored.shaped("W_skip", (dim, dim)) if "W_skip" in stored else None,
    )
