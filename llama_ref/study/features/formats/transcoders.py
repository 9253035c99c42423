"""circuit-tracer's transcoders: config.yaml with layer_N.safetensors, or W_enc_N and W_dec_N for a cross-layer transcoder.

The first kind has a separate transcoder for each layer. A layer of a cross-layer transcoder writes to its own and
all later layers: `W_dec_N` is (S, layers left, D); W_enc_N.safetensors also has the biases of the features and of
layer N's output.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import BadValue, read_small
from llama_ref.study.features.activations import Activation, Threshold, TopK, relu
from llama_ref.study.features.cross_layer import CrossLayerTranscoder
from llama_ref.study.features.dictionary import Features, Weights
from llama_ref.study.features.sites import Claims, Site, claims_of
from llama_ref.study.features.stored import CONFIG_LIMIT_BYTES, Stored, check_k, refuse

CONFIG = "config.yaml"
ENCODER = re.compile(r"W_enc_(\d{1,3})\.safetensors")
LAYER = re.compile(r"layer_(\d{1,3})\.safetensors")
ENTRY = re.compile(r"([A-Za-z_]\w*):[ \t]+(?:\"([^\"]*)\"|'([^']*)'|([^\s#][^#]*?))[ \t]*(?:#.*)?")


def read_transcoder(folder: Path, claims: Claims, k: int | None = None) -> Features:
    """Read the transcoder of the layer that the claims name. Raises CheckpointError, RequestError."""
    config = read_config(folder)
    _claim_hooks(folder, config, claims)
    if not claims.layers:
        raise RequestError(f"{folder} has transcoders of many layers: pass layer=…")
    site = claims.settle(folder)
    stored = Stored(folder / f"layer_{site.layer}.safetensors")
    encoder = stored.matrix("W_enc")
    n_features, dim = encoder.shape
    weights = Weights(
        encoder,
        stored.vector("b_enc", n_features),
        stored.shaped("W_dec", (n_features, dim)),
        stored.vector("b_dec", dim),
        skip=stored.shaped("W_skip", (dim, dim)) if "W_skip" in stored else None,
    )
    activation = _activation(config, stored, n_features, k, "")
    return Features(weights, activation, site, path=stored.path, form="circuit-tracer")


def read_cross_layer(folder: Path, claims: Claims, k: int | None = None) -> Features:
    """Read one layer of a cross-layer transcoder, without the layers' output biases. Raises CheckpointError, RequestError."""
    config = read_config(folder)
    _claim_hooks(folder, config, claims)
    if not claims.layers:
        raise RequestError(
            f"{folder} has a cross-layer transcoder: pass layer=… to read one layer's features, or use open_cross_layer for all"
        )
    return _cross_layer(folder, config, claims.settle(folder), k)[0]


def read_all_layers(folder: Path, site: str | None = None, k: int | None = None) -> CrossLayerTranscoder:
    """Read all layers of a cross-layer transcoder. Raises CheckpointError, RequestError."""
    config = read_config(folder)
    try:
        names = [file.name for file in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
    numbers = [int(found[1]) for found in map(ENCODER.fullmatch, names) if found]
    if not numbers:
        raise CheckpointError(f"{folder} has no cross-layer transcoder: expected W_enc_0.safetensors and W_dec_0.safetensors")
    layers, biases = [], []
    for n in range(max(numbers) + 1):
        claims = claims_of(n, site)
        _claim_hooks(folder, config, claims)
        own = claims.settle(folder)
        if not own.kind.startswith("transcoder"):
            raise RequestError(f"the site of {folder} is {own.kind}, expected transcoder: it must read a feed-forward's input")
        layer, bias = _cross_layer(folder, config, own, k)
        layers.append(layer)
        biases.append(bias)
    for layer in layers:
        _check_width(layer, len(layers), layers[0].dim)
    return CrossLayerTranscoder(layers, biases, path=folder)


def _cross_layer(folder: Path, config: dict[str, str], site: Site, k: int | None) -> tuple[Features, Tensor | None]:
    """Read one layer's features, and the bias (D,) of its feed-forward's output."""
    n = site.layer
    first, second = Stored(folder / f"W_enc_{n}.safetensors"), Stored(folder / f"W_dec_{n}.safetensors")
    if f"W_skip_{n}" in first or f"W_skip_{n}" in second:
        raise refuse(f"{folder}: W_skip_{n} of a cross-layer transcoder")
    encoder = first.matrix(f"W_enc_{n}")
    n_features, dim = encoder.shape
    decoder = second.matrix(f"W_dec_{n}", 3)
    if decoder.shape[::2] != (n_features, dim):
        raise CheckpointError(
            f"{second.path}: W_dec_{n} is {tuple(decoder.shape)}, expected ({n_features}, layers left, {dim})"
        )
    weights = Weights(encoder, first.vector(f"b_enc_{n}", n_features), decoder)
    activation = _activation(config, first, n_features, k, f"_{n}")
    bias = first.vector(f"b_dec_{n}", dim) if f"b_dec_{n}" in first else None
    return Features(weights, activation, site, path=first.path, form="circuit-tracer, cross-layer"), bias


def _check_width(layer: Features, n_layers: int, dim: int) -> None:
    """Raise CheckpointError unless the layer writes to itself and all later ones."""
    n, shape = layer.site.layer, tuple(layer.weights.decoder.shape)
    if shape[1:] != (n_layers - n, dim):
        raise CheckpointError(
            f"{layer.path.with_name(f'W_dec_{n}.safetensors')}: W_dec_{n} is {shape}, expected"
            f" ({shape[0]}, {n_layers - n}, {dim}), as there are {n_layers} layers; are files missing?"
        )


def read_config(folder: Path) -> dict[str, str]:
    """The top-level strings and numbers of config.yaml, as strings; {} without the file.

    This needs no YAML library. Raises CheckpointError for a file that is not UTF-8 text, or too large.
    """
    path = folder / CONFIG
    if not path.exists():
        return {}
    try:
        text = read_small(path, CONFIG_LIMIT_BYTES, "config.yaml of transcoders").decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}); fetch it again") from error
    found = {}
    for line in text.splitlines():
        entry = ENTRY.fullmatch(line)
        if entry:
            found[entry[1]] = next(word for word in entry.groups()[1:] if word is not None)
    return found


def _claim_hooks(folder: Path, config: dict[str, str], claims: Claims) -> None:
    reads, writes = config.get("feature_input_hook"), config.get("feature_output_hook")
    if reads is not None and writes is not None:
        claims.hooks(str(folder / CONFIG), reads, writes)


def _activation(config: dict[str, str], stored: Stored, n_features: int, k: int | None, suffix: str) -> Activation:
    """The activation function that the config names; without a name, the one that matches the file's tensors."""
    given = config.get("activation")
    names = [name for name in (f"threshold{suffix}", f"activation_function.threshold{suffix}") if name in stored]
    if given == "topk":
        return TopK(_k(config, stored, n_features, k))
    if given not in (None, "relu", "jump_relu", "jumprelu"):
        raise refuse(f"{stored.path}: activation is {given!r:.40}")
    if given == "relu" or not names:
        if given in ("jump_relu", "jumprelu"):
            raise CheckpointError(f"{stored.path} lacks threshold{suffix}, but {CONFIG} says {given}")
        return relu()
    values = stored.tensors[names[0]]
    if values.numel() not in (1, n_features):
        raise CheckpointError(f"{stored.path}: {names[0]} is {tuple(values.shape)}, expected one, or ({n_features},)")
    return Threshold(stored.finite(names[0], values.reshape(() if values.numel() == 1 else (-1,)).to(torch.float32)))


def _k(config: dict[str, str], stored: Stored, n_features: int, k: int | None) -> int:
    said = config.get("k", "")
    found = int(said) if said.isdecimal() else int(stored.scalar("k")) if "k" in stored else k
    if found is None or found < 1:
        raise RequestError(f"{stored.path} does not say how many features fire at a token: pass k=…")
    try:
        return check_k(found, n_features)
    except BadValue as error:
        raise CheckpointError(f"{stored.path}: {error}") from None
