"""dictionary_learning's config.json and ae.pt: BatchTopK, which fires above one threshold, and TopK."""

import re
from pathlib import Path
from typing import Any

from llama_ref.files import BadValue, json_object, require_keys
from llama_ref.study.features.activations import Activation, Threshold, TopK
from llama_ref.study.features.dictionary import Features, Weights
from llama_ref.study.features.sites import Claims
from llama_ref.study.features.stored import CONFIG_LIMIT_BYTES, Stored, check_k, count, refuse, word

CONFIG = "config.json"
FILE = "ae.pt"
SUBMODULE = re.compile(r"(resid_post|attention_out|attn_out|mlp_out)_layer_(\d{1,3})")
KINDS = {"resid_post": "residual_post", "attention_out": "attention", "attn_out": "attention", "mlp_out": "ffn"}


def read_dictionary_learning(folder: Path, claims: Claims) -> Features:
    """Read a folder of dictionary_learning. Raises CheckpointError for invalid files, RequestError for an unclear site."""
    with json_object(folder / CONFIG, "config.json of dictionary_learning", "trainer", CONFIG_LIMIT_BYTES) as whole:
        require_keys(whole, ("trainer",))
        config = whole["trainer"]
        if not isinstance(config, dict):
            raise BadValue(f"trainer is {config!r:.40}, expected an object")
        require_keys(config, ("dict_class",))
        _claim(config, claims)
        site = claims.settle(folder)
        stored = Stored(folder / FILE)
        activation = _activation(config, stored)
        return Features(_weights(stored, config), activation, site, path=folder, form="dictionary_learning")


def _claim(config: dict[str, Any], claims: Claims) -> None:
    if config.get("layer") is not None:
        layer = config["layer"]
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise BadValue(f"layer is {layer!r:.40}, expected a whole number from 0")
        claims.layers[CONFIG] = layer
    found = SUBMODULE.fullmatch(word(config, "submodule_name", "")) if config.get("submodule_name") else None
    if found:
        claims.layers["its submodule_name"] = int(found[2])
        claims.kinds["its submodule_name"] = KINDS[found[1]]


def _activation(config: dict[str, Any], stored: Stored) -> Activation:
    match config["dict_class"]:
        case "BatchTopKSAE":
            return Threshold(stored.scalar("threshold").clamp(min=0))
        case "AutoEncoderTopK":
            return TopK(_k(config, stored))
    raise refuse(f"dict_class is {config['dict_class']!r:.40}")


def _k(config: dict[str, Any], stored: Stored) -> int:
    """The file's k, which the config must not contradict; the file's threshold is only for training."""
    found = int(stored.scalar("k")) if "k" in stored else count(config, "k")
    if config.get("k") not in (None, found):
        raise BadValue(f"k is {config['k']!r:.40}, but {FILE} says {found}")
    if found < 1:
        raise BadValue(f"k of {FILE} is {found}, expected a positive whole number")
    return check_k(found, len(stored.matrix("encoder.weight")))


def _weights(stored: Stored, config: dict[str, Any]) -> Weights:
    encoder = stored.matrix("encoder.weight")
    n_features, dim = encoder.shape
    said = {"activation_dim": dim, "dict_size": n_features}
    for key, size in said.items():
        if config.get(key) not in (None, size):
            raise BadValue(f"{key} is {config[key]!r:.40}, but encoder.weight is {tuple(encoder.shape)}")
    bias = stored.vector("b_dec", dim)
    return Weights(
        encoder,
        stored.vector("encoder.bias", n_features),
        stored.shaped("decoder.weight", (dim, n_features)).T,
        bias,
        bias,
    )
