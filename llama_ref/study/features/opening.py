"""Open a dictionary of features from its files, in any of the public formats."""

import os
from pathlib import Path

from llama_ref.errors import CheckpointError, RequestError
from llama_ref.numbers import is_whole
from llama_ref.study.features.activations import TopK
from llama_ref.study.features.cross_layer import CrossLayerTranscoder
from llama_ref.study.features.dictionary import Features
from llama_ref.study.features.formats import dictionary_learning, llama_scope, sparsify
from llama_ref.study.features.formats.dictionary_learning import read_dictionary_learning
from llama_ref.study.features.formats.goodfire import read_goodfire
from llama_ref.study.features.formats.llama_scope import read_llama_scope
from llama_ref.study.features.formats.sparsify import read_sparsify
from llama_ref.study.features.formats.transcoders import (
    CONFIG,
    ENCODER,
    LAYER,
    read_all_layers,
    read_cross_layer,
    read_transcoder,
)
from llama_ref.study.features.sites import Claims, claims_of

MOST_LISTED = 6
EXPECTED = (
    "expected hyperparams.json (Llama Scope), cfg.json (sparsify), a .pth (Goodfire), ae.pt (dictionary_learning), or"
    " layer_N.safetensors or W_enc_N.safetensors (circuit-tracer)"
)


def open_features(
    path: str | os.PathLike[str], *, layer: int | None = None, site: str | None = None, k: int | None = None
) -> Features:
    """Open a sparse autoencoder or a transcoder from a folder, or a file in it.

    Supported formats: Llama Scope, EleutherAI's sparsify, Goodfire, dictionary_learning (BatchTopK, TopK),
    and circuit-tracer's transcoders and cross-layer transcoders (one layer; `open_cross_layer` opens all).
    Matrices are memory-mapped, and only the parts that are used are read; nothing in a pickle is executed.

    `layer` and `site` (a key of sites.ENDINGS: "residual_post", "attention", "ffn", "transcoder", …)
    are needed if names and configs do not have them, and TopK's `k` if the files do not have it. Raises
    RequestError if they are missing, or contradict each other or the files; CheckpointError for files that
    are missing, damaged or of another format; UnsupportedModel for unsupported kinds of dictionaries.
    """
    features = _open(_existing(path), claims_of(layer, site), _positive(k))
    _check_used(k, features)
    return features


def _open(where: Path, claims: Claims, k: int | None) -> Features:
    folder = where if where.is_dir() else where.parent
    if (folder / llama_scope.CONFIG).exists():
        return read_llama_scope(folder, claims)
    if folder.name == "checkpoints" and (folder.parent / llama_scope.CONFIG).exists():
        return read_llama_scope(folder.parent, claims)
    if (folder / sparsify.CONFIG).exists():
        return read_sparsify(folder, claims)
    if (folder / dictionary_learning.FILE).exists():
        return read_dictionary_learning(folder, claims)
    pickles = [where] if not where.is_dir() and where.suffix in (".pth", ".pt") else _ending(where, (".pth", ".pt"))
    if len(pickles) == 1:
        return read_goodfire(pickles[0], claims)
    if named := (LAYER.fullmatch(where.name) or ENCODER.fullmatch(where.name)):
        claims.layers["the file's name"] = int(named[1])
    if _is_cross_layer(folder):
        return read_cross_layer(folder, claims, k)
    files = _ending(folder, (".safetensors",))
    if any(map(LAYER.fullmatch, (file.name for file in files))) or (folder / CONFIG).exists():
        return read_transcoder(folder, claims, k)
    raise CheckpointError(f"{where} has no features: {EXPECTED}{_inside(folder)}")


def open_cross_layer(path: str | os.PathLike[str], *, site: str | None = None, k: int | None = None) -> CrossLayerTranscoder:
    """Open all layers of a cross-layer transcoder: circuit-tracer's folder of W_enc_N and W_dec_N.safetensors.

    Matrices are memory-mapped, and only the parts that are used are read. `site` and `k` as for
    `open_features`. Raises RequestError if they are missing or contradict the files; CheckpointError for
    files that are missing or damaged, or layers whose shapes do not match.
    """
    claims_of(None, site)
    where = _existing(path)
    transcoder = read_all_layers(where if where.is_dir() else where.parent, site, _positive(k))
    _check_used(k, transcoder.layers[0])
    return transcoder


def open_dictionary(
    path: str | os.PathLike[str], *, layer: int | None = None, site: str | None = None, k: int | None = None
) -> Features | CrossLayerTranscoder:
    """Open like `open_features`, but open all layers of a cross-layer transcoder if no `layer` is given."""
    if layer is None and _is_cross_layer(_existing(path)):
        return open_cross_layer(path, site=site, k=k)
    return open_features(path, layer=layer, site=site, k=k)


def _positive(k: int | None) -> int | None:
    if k is None:
        return None
    if not is_whole(k) or k < 1:
        raise RequestError(f"k is {k!r:.40}, expected a positive whole number")
    return int(k)


def _check_used(k: int | None, features: Features) -> None:
    """Raise RequestError for a k that these features do not use."""
    kind = features.activation
    if k is None or (isinstance(kind, TopK) and kind.k == k):
        return
    says = f"the {kind.k} largest features of each token fire" if isinstance(kind, TopK) else "features fire above a threshold"
    raise RequestError(f"k is {k}, but in {features.path} {says}: leave k out")


def _is_cross_layer(folder: Path) -> bool:
    """Whether a path is a folder with the layers of a cross-layer transcoder."""
    return any(ENCODER.fullmatch(file.name) for file in _ending(folder, (".safetensors",)))


def _existing(path: str | os.PathLike[str]) -> Path:
    try:
        where = Path(path).expanduser().absolute()  # keeps the name of a link, which may contain the layer
        if not where.exists():
            raise CheckpointError(f"no features at {where}: there is no such folder or file")
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise RequestError(f"path is {path!r:.80}, expected a folder of features: {error}") from error
    return where


def _ending(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in endings) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error


def _inside(folder: Path) -> str:
    """A hint that lists subfolders with features; empty if there are none."""
    marks = (llama_scope.CONFIG, sparsify.CONFIG, dictionary_learning.FILE)
    found = sorted(each.name for each in folder.iterdir() if each.is_dir() and any((each / mark).exists() for mark in marks))
    more = ", …" if len(found) > MOST_LISTED else ""
    return f"; did you mean one of its folders {', '.join(found[:MOST_LISTED])}{more}?" if found else ""
