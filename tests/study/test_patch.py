"""Interventions: edits change exactly the activations that they name."""

import pytest
import torch
from torch import Tensor

from folders import tiny_folder
from llama_ref import study
from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.quantization.apply import quantize_model
from llama_ref.study.names import all_names, axes
from random_models import random_model

ARGS = ModelArgs.from_dict(
    {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 60, "multiple_of": 32, "norm_eps": 1e-5}
    | {"rope_theta": 500000.0, "use_scaled_rope": True}
)
NAMES = all_names(ARGS)
PATTERN, SCORES = "layers.1.attention.pattern", "layers.1.attention.scores"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS, seed=0)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(ARGS.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patching_a_trace_with_itself_changes_nothing(dtype, scheme):
    model = random_model(ARGS, seed=1).to(dtype)
    if scheme:
        quantize_model(model, scheme)
    expected = study.trace(model, ids(2, 7))
    for names in [*NAMES, "*"]:
        with study.patch(model, {names: study.swap_from(expected)}):
            assert torch.equal(model(ids(2, 7)), expected["logits"]), names
    with study.patch(model, {"*": lambda value: value}):
        found = study.trace(model, ids(2, 7))
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_in_the_path(model, name):
    """A patch of any name changes the logits; a trace within it sees the patched value."""
    text = ids(2, 6)
    put = study.trace(model, ids(2, 6, seed=1), name)
    with study.patch(model, {name: study.swap_from(put)}):
        found = study.trace(model, text, [name, "logits"])
    assert torch.equal(found[name], put[name])
    assert not torch.allclose(found["logits"], model(text), atol=1e-3)


@pytest.mark.parametrize("name", ["embedding", "layers.0.residual_mid", "layers.2.residual_post", "norm", "logits"])
def test_what_all_goes_through_makes_the_one_run_the_other(model, name):
    """If the whole stream is replaced by another text's, all later activations are that text's."""
    source = study.trace(model, ids(1, 6, seed=1))
    with study.patch(model, {name: study.swap_from(source)}):
        found = study.trace(model, ids(1, 6))
    later = NAMES[NAMES.index(name) :]
    assert all(torch.equal(found[other], source[other]) for other in later)


def test_zeroing_every_layers_additions_leaves_the_embedding(model):
    with study.patch(model, {"layers.*.attention.output": study.zero(), "layers.*.ffn.output": study.zero()}):
        found = study.trace(model, ids(1, 5))
    assert torch.equal(found["layers.2.residual_post"], found["embedding"])
    assert torch.equal(found["logits"], model.logits(model.norm(model.tok_embeddings(ids(1, 5)))))


def test_zeroed_heads_shares_are_what_the_output_lacks(model):
    plain = study.trace(model, ids(2, 5))
    for name in ("head_output", "head_result"):
        with study.patch(model, {f"layers.0.attention.{name}": study.zero().at(heads=[1, 6], positions=3)}):
            found = study.trace(model, ids(2, 5))["layers.0.attention.output"]
        expected = plain["layers.0.attention.output"].clone()
        expected[:, 3] -= plain["layers.0.attention.head_result"][:, 3, [1, 6]].sum(1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(found[:, [0, 1, 2, 4]], plain["layers.0.attention.output"][:, [0, 1, 2, 4]])


@pytest.mark.parametrize("name", [SCORES, PATTERN])
def test_a_patched_row_of_scores_sends_the_head_where_it_says(model, name):
    """Head 5 attends from token 4 only to token 2: its output is that token's value, and nothing else changes."""
    row = torch.full((6,), -torch.inf if name == SCORES else 0.0)
    row[2] = 1.0
    plain = study.trace(model, ids(2, 6))
    with study.patch(model, {name: study.set_to(row).at(heads=5, positions=4)}):
        found = study.trace(model, ids(2, 6))
    out, before = found["layers.1.attention.head_output"], plain["layers.1.attention.head_output"]
    torch.testing.assert_close(out[:, 4, 5], plain["layers.1.attention.v"][:, 2, 5 // 4], atol=1e-6, rtol=1e-5)
    assert found[PATTERN][:, 5, 4].tolist() == [[0, 0, 1, 0, 0, 0]] * 2
    out[:, 4, 5] = before[:, 4, 5]
    assert torch.equal(out, before)


def test_edited_scores_show_nobody_the_future(model):
    with study.patch(model, {"layers.*.attention.scores": study.zero()}):
        found = study.trace(model, ids(1, 4))
    expected = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(found[PATTERN][0, 0], expected)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (study.zero(), torch.zeros_like),
        (study.scale(-2), lambda value: value * -2),
        (study.set_to(3), lambda value: torch.full_like(value, 3)),
        (study.set_to(torch.arange(8.0)), lambda value: torch.arange(8.0).expand_as(value)),
        (study.mean(), lambda value: value.mean((0, 1), keepdim=True).expand_as(value)),
        (study.edit(torch.Tensor.neg_), torch.neg),
        (torch.neg, torch.neg),
    ],
)
def test_edits_make_what_they_are_called(model, edit, expected):
    name = "layers.1.attention.q"
    before = study.trace(model, ids(2, 4), name)[name]
    with study.patch(model, {name: edit}):
        torch.testing.assert_close(study.trace(model, ids(2, 4), name)[name], expected(before))


@pytest.mark.parametrize("name", ["layers.0.attention.v", "layers.0.attention.pattern", "layers.0.attention.head_result"])
def test_an_edit_acts_at_its_places_alone(model, name):
    edit = study.set_to(7).at(heads=[0, -1]).at(positions=[1, -1], rows=1)
    before = study.trace(model, ids(3, 5), name)[name]
    with study.patch(model, {name: edit}):
        after = study.trace(model, ids(3, 5), name)[name]
    position_first = axes(name)[1] == "position"
    after, before = (value if position_first else value.transpose(1, 2) for value in (after, before))
    expected = before.clone()
    for position in (1, 4):
        for head in (0, -1):
            expected[1, position, head] = 7
    assert torch.equal(after, expected)


def test_an_edit_in_place_reaches_no_other_name(model):
    plain = study.trace(model, ids(1, 4), "layers.0.residual_post")["layers.0.residual_post"]
    with study.patch(model, {"layers.1.residual_pre": torch.Tensor.zero_}):
        found = study.trace(model, ids(1, 4), "layers.[01].residual_p*")
    assert torch.equal(found["layers.0.residual_post"], plain) and not found["layers.1.residual_pre"].any()


def test_what_an_edit_gives_takes_the_models_dtype():
    model = random_model(ARGS, seed=2).bfloat16()
    with study.patch(model, {"layers.1.*": lambda value: value.double() * 2}):
        found = study.trace(model, ids(1, 4))
    wide = ("scores", "pattern", "logits")
    assert {value.dtype for name, value in found.items() if not name.endswith(wide)} == {torch.bfloat16}
    assert {value.dtype for name, value in found.items() if name.endswith(wide)} == {torch.float32}


def test_patches_within_patches_act_in_their_order_and_end_with_their_blocks(model):
    name = "layers.1.ffn.hidden"
    plain = study.trace(model, ids(1, 4), name)[name]
    with study.recording(model, name) as recorded, study.patch(model, {name: study.scale(2), "*.hidden": study.scale(3)}):
        with study.patch(model, {name: study.set_to(1)}):
            model(ids(1, 4))
        model(ids(1, 4))
    model(ids(1, 4))
    inner, outer = (trace[name] for trace in recorded.traces)
    assert (inner == 1).all()
    both = study.trace(model, ids(1, 4), name)[name]
    assert torch.equal(both, plain) and not torch.equal(outer, plain)


def test_with_a_cache_positions_are_the_texts_own(model):
    """An edit of keys at positions 2 and 5 has the same effect in several steps as in one pass."""
    text, edits = ids(2, 7), {"layers.1.attention.k": study.zero().at(positions=[2, 5]), "norm": study.scale(2).at(positions=6)}
    cache = new_cache(model, 2, 7)
    with study.patch(model, edits), study.recording(model, ["*.k", "logits"]) as recorded:
        expected = study.trace(model, text, ["*.k", "logits"])
        for piece in text.split([4, 1, 1, 1], dim=1):
            model(piece, cache)
    for name, value in recorded.traces[1].items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)
    assert [bool(k.any()) for k in expected["layers.1.attention.k"][0]] == [True, True, False, True, True, False, True]


def test_generation_goes_where_patches_send_it(tmp_path):
    llama = Llama.build(tiny_folder(tmp_path / "tiny"), max_seq_len=32, device="cpu", dtype="float32", verify="never")
    prompts, nine = [[5, 6, 7], [8]], 100 * torch.eye(512)[9]
    plain = llama.generate(prompts, max_gen_len=4, temperature=0)
    with study.patch(llama.model, {"logits": lambda logits: logits + nine}), study.recording(llama.model, "logits") as recorded:
        assert llama.generate(prompts, max_gen_len=4, temperature=0)[0] == [[9] * 4] * 2
    assert recorded.trace["logits"].argmax(-1)[0].tolist() == [9] * 6
    with study.patch(llama.model, {"layers.*.output": study.zero()}):  # only the last token counts
        again = llama.generate([[5, 6, 7], [7]], max_gen_len=4, temperature=0)[0]
    assert again[0] == again[1] != plain[0][0]
    at_one = {"logits": study.zero().at(positions=1)}
    with pytest.raises(RequestError, match="edit them without positions"), study.patch(llama.model, at_one):
        llama.generate(prompts, max_gen_len=4)
    assert llama.generate(prompts, max_gen_len=4, temperature=0) == plain


def test_a_traces_values_go_where_their_positions_are(model):
    """Swap a trace of one row, of only the text's beginning, into a batch with a cache."""
    source = study.trace(model, ids(1, 3, seed=1))
    text, cache = ids(2, 5), new_cache(model, 2, 5)
    names = ["layers.0.attention.v", "layers.0.attention.pattern"]
    plain = study.trace(model, text, names)
    with study.patch(model, {name: study.swap_from(source) for name in names}), study.recording(model, names) as recorded:
        for piece in text.split([2, 2, 1], dim=1):
            model(piece, cache)
    v, pattern = (recorded.trace[name] for name in names)
    assert torch.equal(v[:, :3], source[names[0]].expand(2, -1, -1, -1))
    torch.testing.assert_close(v[:, 3:], plain[names[0]][:, 3:])
    assert torch.equal(pattern[:, :, :3, :3], source[names[1]].expand(2, -1, -1, -1))
    torch.testing.assert_close(pattern[:, :, 3:], plain[names[1]][:, :, 3:])


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"layers.9.norm": study.zero()}, "layers 0 to 2"),
        ([study.zero()], "expected a dictionary"),
        ({"norm": 3}, "expected a function"),
        ({"norm": lambda value: None}, "returned a NoneType"),
        ({"norm": lambda value: value[0]}, r"returned a tensor \(5, 64\), expected a tensor \(2, 5, 64\)"),
        ({"norm": study.set_to(torch.zeros(3))}, r"tensor \(3,\)"),
        ({"norm": study.zero().at(heads=1)}, "norm has no heads"),
        ({PATTERN: study.zero().at(heads=8)}, "heads 0 to 7"),
        ({"layers.0.attention.v": study.zero().at(heads=[0, 2])}, "heads 0 to 1"),
        ({"norm": study.zero().at(rows=-3)}, "rows 0 to 1"),
        ({"norm": study.zero().at(positions=5)}, "the text has positions 0 to 4"),
        ({SCORES: study.mean()}, "has no mean"),
    ],
)
def test_edits_that_do_not_fit_are_refused(model, edits, message):
    with pytest.raises(RequestError, match=message), study.patch(model, edits):
        model(ids(2, 5))
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_what_makes_no_edit_is_refused(model):
    for make, message in [
        (lambda: study.zero().at(heads="1"), "heads is '1'"),
        (lambda: study.zero().at(positions=[1.0]), "positions is"),
        (lambda: study.scale("2"), "factor is '2'"),
        (lambda: study.set_to("x"), "expected a tensor or a number"),
        (lambda: study.edit(None), "expected a function"),
        (lambda: study.swap_from({}), "expected a Trace"),
    ]:
        with pytest.raises(RequestError, match=message):
            make()


def test_a_trace_that_does_not_fit_is_refused(model):
    short = study.trace(model, ids(1, 3), "norm")
    for edit, message in [
        (study.swap_from(study.trace(model, ids(1, 5), "embedding")), "'norm' was not traced"),
        (study.swap_from(short), "a trace of 3 tokens into a text of 5"),
        (study.swap_from(short).at(positions=[0, 4]), "a trace of 3 tokens into a text of 5"),
        (study.swap_from(study.trace(model, ids(3, 5), "norm")), "with as many rows, or with one"),
    ]:
        with pytest.raises(RequestError, match=message), study.patch(model, {"norm": edit}):
            model(ids(2, 5))
    with study.patch(model, {"norm": study.swap_from(short).at(positions=[0, 2])}):
        found = study.trace(model, ids(2, 5), "norm")["norm"]
    assert torch.equal(found[:, [0, 2]], short["norm"][:, [0, 2]].expand(2, -1, -1))


RAGGED = [[5, 6, 7, 8, 9], [1, 2], [11, 12, 13]]


@pytest.mark.parametrize(
    "edits",
    [
        {"layers.0.residual_mid": study.zero().at(positions=-1)},
        {"layers.1.attention.k": study.scale(3).at(positions=[0, -2])},
        {"layers.*.attention.scores": study.set_to(0)},
        {"layers.1.ffn.output": study.zero().at(positions=1), "norm": torch.neg},
    ],
)
def test_edits_of_texts_of_different_lengths_are_as_of_each_alone(model, edits):
    with study.patch(model, edits):
        together = study.trace(model, RAGGED)
        for i, text in enumerate(RAGGED):
            for name, value in study.trace(model, text).items():
                torch.testing.assert_close(together.row(i)[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_a_mean_leaves_padding_out(model):
    name = "layers.1.attention.head_output"
    values = [study.trace(model, text, name)[name][0] for text in RAGGED]
    with study.patch(model, {name: study.mean()}):
        found = study.trace(model, RAGGED, name)
    expected = torch.cat(values).mean(0)
    torch.testing.assert_close(found[name][found.positions >= 0], expected.expand(10, 8, 8), atol=1e-5, rtol=1e-4)


def test_texts_of_different_lengths_are_swapped_row_by_row(model):
    source = study.trace(model, [[9 + id for id in text] for text in RAGGED])
    with study.patch(model, {"layers.0.*": study.swap_from(source)}):
        found = study.trace(model, RAGGED, ["layers.0.*", "logits"])
    assert all(torch.equal(found[name], source[name]) for name in found if name != "logits")
    torch.testing.assert_close(found["logits"], source["logits"], atol=1e-4, rtol=1e-4)
    with (
        pytest.raises(RequestError, match="from a trace of 2 tokens into a text of 3"),
        study.patch(model, {"norm": study.swap_from(source)}),
    ):
        study.trace(model, [RAGGED[0], [1, 2, 3], RAGGED[2]])


# ---- generation: prompts of different lengths, in pieces, with guesses

PROMPTS = [[5, 9, 2, 7, 1, 3, 8, 8, 11], [4, 4, 8]]
LAST_ALONE = {
    "edit": lambda model: study.patch(model, {"layers.1.residual_post": study.scale(-3).at(positions=-1)}),
    "before the last": lambda model: study.patch(model, {"layers.0.ffn.output": study.scale(-9).at(positions=[-2])}),
    "cut": lambda model: study.cut(model, queries=-1, keys=[0, -2]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("patched"))


def continued(llama: Llama, prompts: list[list[int]]) -> list[list[int]]:
    return llama.generate(prompts, 12, temperature=0)[0]


@pytest.mark.parametrize("what", LAST_ALONE)
def test_the_last_token_of_a_prompt_is_its_own_in_a_batch_and_in_pieces(folder, what, monkeypatch):
    llama = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=64)
    plain = continued(llama, PROMPTS)
    with LAST_ALONE[what](llama.model):
        expected = [continued(llama, [prompt])[0] for prompt in PROMPTS]
        assert continued(llama, PROMPTS) == expected != plain
        monkeypatch.setattr("llama_ref.decoding.reading.PREFILL_TOKENS", 4)
        assert continued(llama, PROMPTS) == expected


@pytest.mark.parametrize("what", ["edit", "before the last"])
def test_guessed_tokens_are_edited_as_when_they_come_one_by_one(folder, what):
    plain, guessing = (
        Llama.build(folder, device="cpu", dtype="float32", max_seq_len=64, speculate=how) for how in (None, "ngram")
    )
    prompts = [[7, 8, 9, 7, 8, 9, 7, 8], [4, 4, 4, 4]]
    with LAST_ALONE[what](plain.model), LAST_ALONE[what](guessing.model):
        assert continued(guessing, prompts) == continued(plain, prompts)


def test_a_mean_in_generation_leaves_padding_out(folder):
    llama = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=64)
    name = "layers.0.ffn.output"
    values = torch.cat([study.trace(llama.model, prompt, name)[name][0] for prompt in PROMPTS])
    with study.patch(llama.model, {name: study.mean()}), study.recording(llama.model, name) as recorded:
        llama.generate(PROMPTS, 1, temperature=0)
    torch.testing.assert_close(recorded.trace[name][1, 0], values.mean(0))


# ---- logits of other tokens than a pass's


def test_predictions_and_lenses_read_through_edits_of_the_norm_and_the_logits(model):
    text = [5, 9, 2, 7]
    with study.patch(model, {"norm": lambda value: -value, "logits": study.scale(2)}):
        expected = study.trace(model, text, "logits")["logits"][0].softmax(-1)
        predicted, lens = study.predict(model, text, top=3), study.logit_lens(model, text, top=3)
        answer = study.log_likelihoods(model, [text[:2]], text[2:])
    torch.testing.assert_close(predicted.top_probabilities, expected.topk(3).values)
    torch.testing.assert_close(lens.top_probabilities[-1], expected.topk(3).values)
    assert answer.item() == pytest.approx((expected[1, 2].log() + expected[2, 7].log()).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["norm", "logits"])
@pytest.mark.parametrize("place", [{"rows": 0}, {"positions": -1}])
def test_edits_of_some_rows_or_positions_are_refused_where_other_tokens_are_read(model, name, place):
    with study.patch(model, {name: study.zero().at(**place)}):
        study.trace(model, [5, 9, 2], "logits")
        for read in (lambda: study.predict(model, [5, 9, 2]), lambda: study.logit_lens(model, [5, 9, 2])):
            with pytest.raises(RequestError, match=f"{name} is computed here for other tokens than those of a pass"):
                read()
