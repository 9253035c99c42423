"""Llama Scope (arXiv 2410.20526): hyperparams.json and checkpoints/final.safetensors.

JumpReLU with one threshold for all features. Activations are scaled to a mean length of √D, and the
decoder's output is scaled back to the output's mean length. The threshold was chosen after these
scales and the norms of the decoder's rows had been folded into the weights, which the files do not
have. Transcoders read the normed input before the norm's weights.
"""

import re
from pathlib import Path
from typing import Any

import torch

from llama_ref.files import BadValue, json_object, require_keys
from llama_ref.study.features.activations import Activation, Scaling, Threshold, TopK, relu
from llama_ref.study.features.dictionary import Features, Weights
from llama_ref.study.features.sites import Claims, Site
from llama_ref.study.features.stored import CONFIG_LIMIT_BYTES, Stored, check_k, count, number, refuse, switch, word

CONFIG = "hyperparams.json"
FILE = "checkpoints/final.safetensors"
NAME = re.compile(r".*\bL(\d{1,3})(R|A|M|TC)-\d+x", re.IGNORECASE)
KINDS = {"R": "residual_post", "A": "attention", "M": "ffn", "TC": "transcoder_unscaled"}


def read_llama_scope(folder: Path, claims: Claims) -> Features:
    """Read a Llama Scope folder. Raises CheckpointError for invalid files, RequestError for an unclear site."""
    _claim_name(folder, claims)
    with json_object(folder / CONFIG, "hyperparams.json of Llama Scope", "d_model, d_sae", CONFIG_LIMIT_BYTES) as config:
        require_keys(config, ("d_model", "act_fn", "hook_point_in"))
        dim, reads = count(config, "d_model"), word(config, "hook_point_in")
        claims.hooks(CONFIG, reads, word(config, "hook_point_out", reads))
        site = claims.settle(folder)
        stored = Stored(folder / FILE)
        weights = _weights(stored, config, dim)
        scaling = _scaling(config, site, dim)
        activation = _activation(config, len(weights.encoder), scaling)
        return Features(weights, activation, site, scaling, path=folder, form="Llama Scope")


def _claim_name(folder: Path, claims: Claims) -> None:
    found = NAME.fullmatch(folder.name)
    if found:
        claims.layers["the folder's name"] = int(found[1])
        claims.kinds["the folder's name"] = KINDS[found[2].upper()]


def _weights(stored: Stored, config: dict[str, Any], dim: int) -> Weights:
    if switch(config, "use_glu_encoder", False):
        raise refuse("use_glu_encoder is true")
    encoder = stored.matrix("encoder.weight")
    n_features = config.get("d_sae") or count(config, "expansion_factor") * dim
    if tuple(encoder.shape) != (n_features, dim):
        raise BadValue(f"says {n_features} features of {dim} dimensions, but encoder.weight is {tuple(encoder.shape)}")
    bias = stored.vector("decoder.bias", dim) if switch(config, "use_decoder_bias", True) else None
    return Weights(
        encoder,
        stored.vector("encoder.bias", n_features),
        stored.shaped("decoder.weight", (dim, n_features)).T,
        bias,
        bias if switch(config, "apply_decoder_bias_to_pre_encoder", False) else None,
    )


def _activation(config: dict[str, Any], n_features: int, scaling: Scaling) -> Activation:
    by_norm = switch(config, "sparsity_include_decoder_norm", True)
    match config["act_fn"]:
        case "jumprelu":
            threshold = config.get("jump_relu_threshold")
            if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < float("inf"):
                raise BadValue(f"jump_relu_threshold is {threshold!r:.40}, expected a number from 0")
            # value × ‖decoder row‖ × scaling.out is what the file's threshold is compared with.
            least = threshold / scaling.out if by_norm else threshold
            return Threshold(torch.tensor(float(least), device="cpu"), by_norm)
        case "relu":
            return relu()
        case "topk" if not by_norm:
            return TopK(check_k(count(config, "top_k"), n_features))
    raise refuse(f"act_fn is {config['act_fn']!r:.40}{' with sparsity_include_decoder_norm' if by_norm else ''}")


def _scaling(config: dict[str, Any], site: Site, dim: int) -> Scaling:
    match word(config, "norm_activation", "dataset-wise"):
        case "dataset-wise":
            norms = config.get("dataset_average_activation_norm")
            if not isinstance(norms, dict):
                raise BadValue('lacks dataset_average_activation_norm, expected such as {"in": 6.3, "out": 6.3}')
            return Scaling(dim**0.5 / number(norms, "in"), number(norms, "out") / dim**0.5)
        case "inference":  # folded into the weights
            return Scaling()
        case "token-wise" if site.reads == site.writes:
            return Scaling(by_token=True)
        case other:
            raise refuse(f"norm_activation is {other!r:.40}")
