"""GPTQ rounding: errors of the outputs, unusual inputs, and the quality of a real model."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bench_quality import log_probabilities, quality, texts
from folders import tiny_folder
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.errors import RequestError
from llama_ref.model import Transformer
from llama_ref.modules import replace_module
from llama_ref.quantization.apply import quantized
from llama_ref.quantization.calibration import SAME_INPUT, calibration_text, round_layers
from llama_ref.quantization.gptq import round_int4
from llama_ref.quantization.linear import Int4Linear
from llama_ref.quantization.rounding import int4_scales, to_int4
from llama_ref.quantization.scheme import Scheme

COLUMNS = 128


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n_rows: int, mixing: float) -> Tensor:
    """Inputs (n_rows, 128) with correlated columns."""
    return random(n_rows, COLUMNS, seed=1) @ (torch.eye(COLUMNS) + mixing * random(COLUMNS, COLUMNS, seed=2))


def error(x: Tensor, weight: Tensor, rounded: Int4Linear) -> float:
    return (x @ (weight - rounded.dequantize()).T).square().sum().item()


def weighted(weight: Tensor, group: int, importance: Tensor) -> Int4Linear:
    """Round to nearest, with scales that weight errors by their columns' importance."""
    scales = int4_scales(weight, group, importance)
    return Int4Linear(to_int4(weight, *scales), *scales)


def gptq(weight: Tensor, x: Tensor, group: int) -> Int4Linear:
    return Int4Linear(*round_int4(weight, x.T @ x, group))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("mixing", "share"), [(0.1, 0.75), (1, 0.6)])
def test_outputs_are_off_by_less_than_those_of_rounding_to_nearest(group, mixing, share):
    """Stronger correlations between inputs give larger gains, also on unseen inputs."""
    weight, x = random(100, COLUMNS, seed=3), inputs(1500, mixing)
    seen, unseen = x[:1000], x[1000:]
    rounded, nearest = gptq(weight, seen, group), weighted(weight, group, seen.square().mean(0))
    assert error(seen, weight, rounded) < share * error(seen, weight, nearest)
    assert error(unseen, weight, rounded) < (share + 0.06) * error(unseen, weight, nearest)


def test_inputs_that_do_not_go_together_lead_to_the_nearest():
    weight, squares = random(50, COLUMNS, seed=4), torch.rand(COLUMNS, generator=torch.Generator().manual_seed(5)) + 0.1
    rounded, nearest = Int4Linear(*round_int4(weight, squares.diag(), 32)), weighted(weight, 32, squares)
    assert torch.equal(rounded.packed, nearest.packed)
    assert all(buffer.is_contiguous() for buffer in rounded.buffers())
    torch.testing.assert_close(rounded.dequantize(), nearest.dequantize(), rtol=0.01, atol=0.005)  # bfloat16 rounding may flip


def test_each_rows_numbers_hang_on_that_row_alone():
    weight, x = random(64, COLUMNS, seed=6), inputs(400, 0.1)
    whole, some = gptq(weight, x, 64), gptq(weight[20:30], x, 64)
    assert (whole.unpacked()[20:30] != some.unpacked()).float().mean() < 0.01


def test_important_columns_are_spared():
    weight, used = random(100, COLUMNS, seed=9), torch.ones(COLUMNS)
    used[::8] = 100
    x = random(64, COLUMNS, seed=3) * used.sqrt()
    plain, spared = Int4Linear.from_weight(weight, 64), weighted(weight, 64, used)
    assert error(x, weight, spared) < 0.64 * error(x, weight, plain)
    assert error(torch.eye(COLUMNS), weight, spared) > error(torch.eye(COLUMNS), weight, plain)


@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(COLUMNS, COLUMNS),
        torch.ones(COLUMNS, COLUMNS),
        torch.eye(COLUMNS) * 1e-38,
        torch.eye(COLUMNS) * 1e30,
        torch.diag(torch.tensor([1e12] + [1e-3] * 63 + [0.0] * 64)),
    ],
    ids=["nothing", "one input", "tiny", "huge", "dead"],
)
def test_strange_inputs_do_no_harm(hessian):
    weight = random(20, COLUMNS, seed=7)
    rounded = Int4Linear(*round_int4(weight, hessian, 32)).dequantize()
    assert (rounded - weight).norm() < 0.5 * weight.norm()


def test_few_tokens_are_enough_for_all_columns():
    """With fewer rows than columns, some errors have no effect on the text.

    They must stay small anyway.
    """
    weight, x = random(30, COLUMNS, seed=8), inputs(9, 0.3)
    rounded, nearest = gptq(weight, x, 32), Int4Linear.from_weight(weight, 32)
    assert error(x, weight, rounded) < 0.3 * error(x, weight, nearest)
    assert (rounded.dequantize() - weight).norm() < 0.2 * weight.norm()


# ---- models


@pytest.fixture
def model(tmp_path) -> Transformer:
    folder = open_folder(tiny_folder(tmp_path / "tiny"))
    return load_model(folder, folder.read_args())


def test_every_matrix_of_the_layers_is_replaced_and_nothing_else(model):
    told = []
    round_layers(model, Scheme.parse("int4:group=32"), range(300), told.append)
    assert told == [f"layers.{layer}.{name}" for layer in range(2) for names in SAME_INPUT for name in names]
    assert {name for name, module in model.named_modules() if isinstance(module, Int4Linear)} == set(told)
    assert not any(isinstance(module, nn.Linear) for module in model.layers.modules())
    assert type(model.tok_embeddings) is nn.Embedding
    assert type(model.output) is nn.Linear
    assert model(torch.arange(40)[None]).isfinite().all()


def test_a_text_that_says_nothing_is_refused(model):
    with pytest.raises(RequestError, match="the calibration text is empty"):
        round_layers(model, Scheme.parse("int4:group=32"), [])
    model.tok_embeddings.weight.data[7] = float("inf")
    with pytest.raises(RequestError, match=r"the inputs of layers\.0\.attention\.wq\.weight overflow float32"):
        round_layers(model, Scheme.parse("int4:group=32"), [7, 8, 9])


def test_a_real_model_stays_near_itself_on_texts_that_it_was_not_rounded_by(llama):
    """Compare on English, code and Korean, with a tenth of the small model's layers."""
    tokenizer = llama.tokenizer
    tokens = {kind: torch.tensor([tokenizer.encode(text, bos=True, eos=False)[:64]]) for kind, text in texts().items()}
    expected = {kind: log_probabilities(llama.model, ids) for kind, ids in tokens.items()}
    read = tokenizer.encode(calibration_text(), bos=True, eos=False)[:1024]
    scheme, kl = Scheme.parse("int4"), {}
    for name in ("nearest", "by the text"):
        model = copy.deepcopy(llama.model, {id(p): p for p in llama.model.parameters()})  # copies the modules only
        layers = model.layers
        model.layers = layers[:3]  # the same blocks
        if name == "nearest":
            for path, linear in [(p, m) for p, m in model.layers.named_modules() if isinstance(m, nn.Linear)]:
                replace_module(model.layers, path, quantized(scheme, f"{path}.weight", linear.weight, torch.float32))
        else:
            round_layers(model, scheme, read)
        model.layers = layers
        kl[name] = {kind: quality(log_probabilities(model, ids), ids, expected[kind]).kl for kind, ids in tokens.items()}
    assert all(kl["by the text"][kind] < 0.6 * kl["nearest"][kind] for kind in tokens), kl
