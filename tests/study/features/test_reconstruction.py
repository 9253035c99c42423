"""How well a dictionary reconstructs an activation, compared with the papers' definitions."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from random_models import random_model
from study import feature_folders
from study.drawn import FEW, ids_of, models

ARGS = ModelArgs.from_dict(
    {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": False}
)
N = 96


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0, tied=True)


def texts(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(ARGS.vocab_size, (n,), generator=random).tolist() for n in lengths]


def run(model: Transformer, text: list[int], layer: int, kind: str, replace, skip: int) -> Tensor:
    """The model's loop with one activation replaced from position `skip` on: losses of the tokens after that."""
    seen: list[Tensor] = []

    def put(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        read = output if kind == "residual" else inputs[0]
        seen.append(read)
        new = replace(read) if replace else output
        return torch.cat([output[:, :skip], new[:, skip:]], 1)

    module = model.layers[layer] if kind == "residual" else model.layers[layer].feed_forward
    hook = module.register_forward_hook(put)
    try:
        logits = model(torch.tensor([text]))[0]
    finally:
        hook.remove()
    return F.cross_entropy(logits[skip:-1].double(), torch.tensor(text[skip + 1 :]), reduction="none")


@FEW
@given(models(least_layers=2), st.sampled_from(["residual", "transcoder"]), st.integers(2, 6), st.integers(0, 99))
def test_losses_of_drawn_shapes(model, kind, length, seed):
    maker = feature_folders.llama_scope if kind == "residual" else feature_folders.transcoders
    with TemporaryDirectory() as folder:
        written = maker(Path(folder), model.args.dim, 4 * model.args.dim)
        text = ids_of(model, length, seed)[0].tolist()
        found = study.measure_reconstruction(model, study.open_features(written.path), [text], skip=0)

        def reconstruct(read: Tensor) -> Tensor:
            x = read[0].double().numpy()
            return torch.from_numpy(written.decode(written.encode(x), x))[None].float()

        for name, way in {"loss": None, "loss_reconstructed": reconstruct, "loss_zero": torch.zeros_like}.items():
            expected = float(run(model, text, 1, kind, way, 0).mean())
            assert getattr(found, name) == pytest.approx(expected, rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("kind", ["residual", "transcoder"])
def test_losses_variance_and_sparsity(model, kind, skip, tmp_path):
    maker = feature_folders.llama_scope if kind == "residual" else feature_folders.transcoders
    written = maker(tmp_path, ARGS.dim, N)
    features = study.open_features(written.path)
    some = texts(7, 4, 9)
    found = study.measure_reconstruction(model, features, some, skip=skip)

    def reconstruct(read: Tensor) -> Tensor:
        x = read[0].double().numpy()
        return torch.from_numpy(written.decode(written.encode(x), x))[None].float()

    ways = {"loss": None, "loss_reconstructed": reconstruct, "loss_zero": torch.zeros_like}
    for name, way in ways.items():
        expected = torch.cat([run(model, text, 1, kind, way, skip) for text in some]).mean()
        assert getattr(found, name) == pytest.approx(float(expected), abs=1e-4), name
    expected = (found.loss_zero - found.loss_reconstructed) / (found.loss_zero - found.loss)
    assert found.loss_recovered == pytest.approx(expected)
    seen = [study.trace(model, text, [features.reads, *features.writes]) for text in some]
    x = torch.cat([each[features.reads][0, skip:] for each in seen]).double()
    y = torch.cat([each[features.writes[0]][0, skip:] for each in seen]).double()
    f = written.encode(x.numpy())
    error = (y - torch.from_numpy(written.decode(f, x.numpy()))).square().sum()
    assert found.unexplained == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-4)
    assert found.l0 == pytest.approx((f != 0).sum(1).mean())
    assert (found.alive, found.n_tokens) == (int((f != 0).any(0).sum()), sum(len(text) - skip for text in some))


def test_a_perfect_dictionary_recovers_everything(model, tmp_path):
    """ReLU of x and of −x, decoded with opposite signs, give x."""
    eye, file = torch.eye(ARGS.dim), tmp_path / "perfect-SAE-l0.pth"
    tensors = {"encoder_linear.weight": torch.cat([eye, -eye]), "encoder_linear.bias": torch.zeros(2 * ARGS.dim)}
    tensors |= {"decoder_linear.weight": torch.cat([eye, -eye]).T.contiguous(), "decoder_linear.bias": torch.zeros(ARGS.dim)}
    torch.save(tensors, file)
    progress = []
    found = study.measure_reconstruction(
        model, study.open_features(file), texts(5, 8), progress=lambda done, total: progress.append((done, total))
    )
    assert found.loss_recovered == pytest.approx(1, abs=1e-6) and found.unexplained < 1e-9
    assert found.l0 == ARGS.dim and found.loss_zero == pytest.approx(math.log(ARGS.vocab_size), abs=0.5)
    assert progress[-1] == (2, 2)


def test_misuse(model, tmp_path):
    features = study.open_features(feature_folders.sparsify(tmp_path, ARGS.dim, N).path)
    with pytest.raises(RequestError, match="a text has 1 tokens, expected 2 or more"):
        study.measure_reconstruction(model, features, texts(4, 1))
    with pytest.raises(RequestError, match="skip is -1"):
        study.measure_reconstruction(model, features, texts(4), skip=-1)
    layer = study.open_features(feature_folders.cross_layer(tmp_path, ARGS.dim, N, 2).path, layer=0)
    with pytest.raises(RequestError, match="one layer of it is not a whole reconstruction"):
        study.measure_reconstruction(model, layer, texts(4))
