"""Goodfire's autoencoders: one .pth or .pt with two linear layers, ReLU; the layer is in the file's name."""

import re
from pathlib import Path

from llama_ref.study.features.activations import relu
from llama_ref.study.features.dictionary import Features, Weights
from llama_ref.study.features.sites import Claims
from llama_ref.study.features.stored import Stored

NAME = re.compile(r".*SAE-l(\d{1,3})")


def read_goodfire(file: Path, claims: Claims) -> Features:
    """Read a Goodfire file. Raises CheckpointError for an invalid file, RequestError for an unclear site."""
    found = NAME.fullmatch(file.stem)
    if found:
        claims.layers["the file's name"] = int(found[1])
    if not claims.kinds:
        claims.kinds["Goodfire's format"] = "residual_post"
    stored = Stored(file)
    encoder = stored.matrix("encoder_linear.weight")
    n_features, dim = encoder.shape
    weights = Weights(
        encoder,
        stored.vector("encoder_linear.bias", n_features),
        stored.shaped("decoder_linear.weight", (dim, n_features)).T,
        stored.vector("decoder_linear.bias", dim),
    )
    return Features(weights, relu(), claims.settle(file), path=file, form="Goodfire")
