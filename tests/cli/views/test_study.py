"""What the study commands print: tables of 80 columns, and JSON."""

import json
import re
from dataclasses import replace

import pytest
import torch

from folders import tiny_folder
from llama_ref.cli.views.study.attribution import print_attribution
from llama_ref.cli.views.study.lens import print_lens
from llama_ref.cli.views.study.residual import print_norms
from llama_ref.cli.views.study.rope import print_rope
from llama_ref.cli.views.study.weights import print_errors, print_spectra
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.study import attribute, logit_lens, quantization_errors, residual_stream, rope_waves, spectra
from llama_ref.study.analyses.residual import quartiles_of_others
from llama_ref.study.inputs import check_over

TOKENS = [256, 84, 104, 101, 33]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Llama:
    """A model of two layers and four heads; each token is a byte."""
    return Llama.build(tiny_folder(tmp_path_factory.mktemp("views") / "Tiny"), device="cpu", dtype="float32", max_seq_len=64)


@pytest.fixture
def rows(capsys):
    """Return the cells of rows that start with a prefix; check that lines fit 80 columns."""

    def rows(first: str) -> list[list[str]]:
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        return [re.split(r" {2,}", line.strip()) for line in lines if re.match(rf" *(?:{first})", line)]

    return rows


def test_the_stream_is_a_line_for_each_layer(tiny, rows, capsys):
    stream = residual_stream(tiny.model, TOKENS)
    print_norms(stream, tiny.tokenizer, as_json=False)
    above, below = capsys.readouterr().out.splitlines()[2:4]
    assert above.split() == ["first:"] * 3 + ["others:"] * 3 and below.split() == [
        "after",
        *["length", "drift", "to", "last"] * 2,
    ]
    print_norms(stream, tiny.tokenizer, as_json=False)
    shown = rows(r"embedding|layer \d")
    assert [row[0] for row in shown] == ["embedding", "layer 0", "layer 1"]
    for row, p in zip(shown, (0, 2, 4), strict=True):
        measured = [values[p] for values in (stream.norm, stream.drift, stream.to_last)]
        assert row[1:] == [f"{x:.2f}" for x in [*(v[0] for v in measured), *(v[1:].quantile(0.5) for v in measured)]]
    print_norms(residual_stream(tiny.model, TOKENS[:1]), tiny.tokenizer, as_json=False)
    assert rows("embedding")[0][4:] == ["–"] * 3, "there are no others"
    print_norms(stream, tiny.tokenizer, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [point["point"] for point in found["points"]] == stream.points and len(found["tokens"]) == 5
    assert torch.equal(torch.tensor([point["norm"] for point in found["points"]]), stream.norm)


def test_of_an_even_number_of_tokens_the_two_in_the_middle_share_the_median():
    values = torch.tensor([[100.0, 4, 1, 2, 8], [0, 1, 1, 1, torch.nan]])
    low, median, high = quartiles_of_others(values)
    assert (low[0], median[0], high[0]) == (1.75, 3, 5) and median[1].isnan()
    assert quartiles_of_others(values[:, :2])[:, 0].tolist() == [4, 4, 4]
    assert quartiles_of_others(values[:, :1]).isnan().all() and quartiles_of_others(values[:, :1]).shape == (3, 2)


def test_a_lens_within_layers_alone_shows_what_it_has(tiny, rows):
    lens = logit_lens(tiny.model, TOKENS, target=7, top=1, points=["layers.0.residual_mid", "layers.1.residual_mid"])
    print_lens(lens, tiny.tokenizer, as_json=False)
    assert [row[0] for row in rows("within")] == ["within layer 0", "within layer 1"]


def test_shares_of_a_lead_are_not_told_as_a_logits(tiny, capsys):
    for other, said in ((None, "a: logit {:.3f} = "), (98, "a ahead of b: by {:.3f} = ")):
        found = attribute(tiny.model, TOKENS, 97, other)
        print_attribution(found, tiny.tokenizer, as_json=False)
        assert said.format(found.logit) in capsys.readouterr().out


def test_waves_are_told_with_and_without_scaling(tiny, rows, capsys):
    args = replace(tiny.model.args, use_scaled_rope=True, rope_scaling_factor=8.0)
    print_rope(rope_waves(args), as_json=False)
    shown = rows(r"\d|pair|radians")
    assert shown[:2] == [
        ["radians", "tokens", "tokens per turn"],
        ["pair", "per token", "per turn", "before scaling", "slowed"],
    ]
    shown = shown[2:]
    assert [row[0] for row in shown] == ["0", "1", "2", "3"] and shown[0][4] == "1.00×" and shown[-1][4] == "8.00×"
    print_rope(rope_waves(tiny.model.args), as_json=False)
    assert rows("This model's RoPE is not scaled")
    print_rope(rope_waves(args), as_json=True)
    last = json.loads(capsys.readouterr().out)["pairs"][-1]
    assert last["slowed"] == pytest.approx(8) and last["wavelength"] == pytest.approx(8 * last["unscaled_wavelength"])


def test_matrices_have_their_ranks_and_errors(tiny, rows, capsys):
    wanted = list(spectra(tiny.model, "layers.1.*"))
    print_spectra(wanted, as_json=False)
    shown = rows("layers")
    assert [row[0] for row in shown] == [spectrum.name for spectrum in wanted] and len(shown) == 7
    assert shown[0][1:] == ["32×32", f"{wanted[0].values[0]:.3g}", *(f"{r:.1f}" for r in ranks(wanted[0]))]
    print_spectra(wanted, as_json=True)
    first = json.loads(capsys.readouterr().out)["matrices"][0]
    assert first["values"] == wanted[0].values.tolist() and first["shape"] == [32, 32]

    errors = list(quantization_errors(tiny.model, "int8", "layers.1.*"))
    print_errors(errors, "int8", as_json=False)
    assert rows("layers")[0][1:] == [
        f"{errors[0].bits_per_weight:.2f}",
        f"{errors[0].relative:.3%}",
        f"{errors[0].largest:.3g}",
    ]
    print_errors(errors, "int8", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["scheme"] == "int8" and [matrix["name"] for matrix in found["matrices"]] == [row[0] for row in shown]


def ranks(spectrum) -> tuple[float, float]:
    return spectrum.stable_rank, spectrum.effective_rank


@pytest.mark.parametrize("over", ["layer,head", "layer, head", "layer×head", "layer*head", "layer x head", " layer × head "])
def test_axes_may_be_spelled_in_several_ways(over):
    assert check_over(over) == "layer×head"


@pytest.mark.parametrize("over", ["head", "head,layer", "layer", "layer,head,position", "layerxhead", "", 3, None])
def test_axes_that_there_are_not_are_refused(over):
    with pytest.raises(RequestError, match="expected layer,position or layer,head"):
        check_over(over)
