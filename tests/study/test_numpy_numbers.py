"""NumPy's whole numbers are whole numbers, everywhere in `study`: the same results, and True is still refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_ref import study
from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.study.analyses.attention import repeated_tokens
from random_models import grouped_model
from study import feature_folders

CLEAN, CORRUPTED = [1, 2, 3, 4], [1, 5, 3, 4]
TARGET = study.logit_difference(7, 8)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return grouped_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """A dictionary of features and collected activations."""
    folder = tmp_path_factory.mktemp("numbers")
    feature_folders.sparsify(folder, model.args.dim, 2 * model.args.dim)
    study.collect(model, [CLEAN, CORRUPTED], "layers.0.residual_post", to=folder / "collected", positions="all")
    return folder


def steered(model: Transformer, layers: Any) -> torch.Tensor:
    with study.steer(model, torch.ones(model.args.dim), layers=layers):
        return model(torch.tensor([CLEAN]))


def set_feature(model: Transformer, folder: Path, feature: Any) -> torch.Tensor:
    edits = study.ablate_features(study.open_features(folder / "layers.1"), feature)
    with study.patch(model, edits):
        return model(torch.tensor([CLEAN]))


def written(folder: Path, layer: Any) -> torch.Tensor:
    study.write_control_vector(folder / "vector.gguf", {layer: torch.ones(8)})
    return study.read_control_vector(folder / "vector.gguf")[1]


def resampled(model: Transformer, seed: Any) -> torch.Tensor:
    with study.patch(model, {"layers.0.ffn.output": study.resample(seed)}):
        return model(torch.tensor([CLEAN]))


def windows(model: Transformer, width: Any) -> torch.Tensor:
    return study.cut_windows(model, CLEAN, TARGET, queries=-1, keys=[0, 1], width=width).values


def contexts(model: Transformer, folder: Path, n: Any) -> list[Any]:
    found = study.top_contexts(study.open_features(folder / "layers.1"), n, [CLEAN], model=model, n=n, before=n, after=n)
    return [[each.value, each.tokens] for each in found[1]]


def curve(model: Transformer, size: Any) -> list[Any]:
    scores = study.attribute_edges(model, CLEAN, CORRUPTED, TARGET)
    found = study.circuit_curve(model, CLEAN, CORRUPTED, TARGET, scores, [size])
    return [found.sizes, found.kept]


CALLS: dict[str, Callable[[Transformer, Path, Any], Any]] = {
    "steer": lambda m, at, n: steered(m, n),
    "logit_difference": lambda m, at, n: study.patch_grid(m, CLEAN, CORRUPTED, study.logit_difference(7, n)).values,
    "probability": lambda m, at, n: study.patch_grid(m, CLEAN, CORRUPTED, study.probability(n)).values,
    "log_probability": lambda m, at, n: study.patch_grid(m, CLEAN, CORRUPTED, study.log_probability(n)).values,
    "attribution_patch": lambda m, at, n: study.attribution_patch(m, CLEAN, CORRUPTED, TARGET, steps=n).values,
    "attribute_edges": lambda m, at, n: study.attribute_edges(m, CLEAN, CORRUPTED, TARGET, steps=n).scores,
    "keep_nodes": lambda m, at, n: study.attribute_edges(m, CLEAN, CORRUPTED, TARGET).keep_nodes(n),
    "circuit_curve": lambda m, at, n: curve(m, n),
    "cut_windows": lambda m, at, n: windows(m, n),
    "top_contexts": lambda m, at, n: contexts(m, at, n),
    "saliency": lambda m, at, n: study.saliency(m, CLEAN, 7, steps=n).shares,
    "logit_lens": lambda m, at, n: study.logit_lens(m, CLEAN, top=n).top_ids,
    "predict": lambda m, at, n: study.predict(m, CLEAN, n).top_ids,
    "repeated_tokens": lambda m, at, n: repeated_tokens(m, n + 1, seed=n),
    "resample": lambda m, at, n: resampled(m, n),
    "sweep": lambda m, at, n: study.sweep(m, [CLEAN], "units", n_exact=n, controls=n, seed=n).controls.losses,
    "ablate_together": lambda m, at, n: study.ablate_together(m, [CLEAN], "layers.0.heads.1", controls=n, seed=n).controls,
    "principal_components": lambda m, at, n: study.principal_components(torch.eye(4), n).directions,
    "write_control_vector": lambda m, at, n: written(at, n),
    "composition": lambda m, at, n: study.composition(m, distance=n).q.nan_to_num(),
    "attention_scores": lambda m, at, n: study.HeadCircuit(m, 0, 1).attention_scores([1, 2], [3], n),
    "ablate_features": lambda m, at, n: set_feature(m, at, n),
    "open_features": lambda m, at, n: len(study.open_features(at / "layers.1", layer=n)),
    "select": lambda m, at, n: study.Collected(at / "collected").select("layers.0.residual_post", positions=n),
    "TunedLens.fit": lambda m, at, n: study.TunedLens.fit(m, [CLEAN] * 4, steps=n, tokens_per_step=n, seed=n).weights,
}
LARGER = {"cut_windows": 2, "attribution_patch": 3}  # than 1; an unsigned byte has no -2 and no 256


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8])
def test_a_whole_number_of_numpy_is_one(model, folder, call, whole):
    n = LARGER.get(call, 1)
    torch.testing.assert_close(CALLS[call](model, folder, whole(n)), CALLS[call](model, folder, n), rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
def test_true_is_not_a_number(model, folder, call):
    with pytest.raises(RequestError, match="True"):
        CALLS[call](model, folder, True)
