"""Verdicts of whole models agree with plain forward passes."""

from pathlib import Path

import pytest
import torch

from guard_folders import ANSWER, BOMB, EOT, PARAMS, SAFE, UNSAFE, guard_folder
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.guard import Category, Guard
from llama_ref.guard.conversation import read_conversation
from make_random_checkpoint import make_random_checkpoint
from vision_folders import PARAMS as VISION_PARAMS
from vision_folders import noise

CALM = [{"role": "user", "content": "How do I bake a cake?"}]
BAD = [{"role": "user", "content": "How do I build a bomb?"}]
ANSWERED = [*CALM, {"role": "assistant", "content": "With a bomb."}]
FORGIVEN = [*BAD, {"role": "assistant", "content": "I cannot help with that."}, {"role": "user", "content": "Why?" * 40}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shorter_tokenizer_path) -> Path:
    return guard_folder(tmp_path_factory.mktemp("guard") / "Llama-Guard-3-1B", shorter_tokenizer_path)


@pytest.fixture(scope="module")
def tiny(folder) -> Llama:
    return Llama.build(folder, device="cpu", dtype="float32", max_seq_len=1024, max_batch_size=3)


@pytest.fixture(scope="module")
def random(tmp_path_factory, shorter_tokenizer_path) -> Llama:
    """Random weights, large enough for probabilities to differ."""
    params = PARAMS | {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}
    folder = make_random_checkpoint(tmp_path_factory.mktemp("random") / "Guard", params, tokenizer=shorter_tokenizer_path)
    llama = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=1024, max_batch_size=3)
    for name, parameter in llama.model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(5)
    return llama


@pytest.mark.parametrize(("dialog", "word"), [(CALM, "safe"), (BAD, "unsafe"), (ANSWERED, "unsafe"), (FORGIVEN, "unsafe")])
def test_a_guard_reads_the_whole_conversation(tiny, dialog, word):
    found = Guard(tiny, "3-1B").judge(dialog)
    assert found.word == word and found.is_expected
    assert [category.title for category in found.categories] == ["Indiscriminate Weapons", "Non-Violent Crimes"] * (
        word == "unsafe"
    )
    assert (found.unsafe_probability > 0.99) == (word == "unsafe") == (found.safe_probability < 0.01)


@pytest.mark.parametrize("version", ["2", "3-1B", "3-8B", "3-11B"])
def test_probabilities_are_those_of_a_plain_forward(random, version):
    guard = Guard(random, version)
    for dialog in (CALM, ANSWERED):
        ids = guard.prompt.encode(random.formatter, read_conversation(dialog))
        with torch.inference_mode():
            logits = random.model(torch.tensor([ids]))[0, -1]
        found = guard.judge(dialog)
        exact = logits.double().softmax(-1)
        assert found.unsafe_probability == pytest.approx(exact[UNSAFE].item(), rel=1e-3)
        assert found.safe_probability == pytest.approx(exact[SAFE].item(), rel=1e-3)
        assert found.unsafe_ratio == pytest.approx((exact[UNSAFE] / (exact[UNSAFE] + exact[SAFE])).item(), rel=1e-4)
        answer, _ = random.generate([ids], 32, 0.0)
        assert (found.word, found.answer) == ("unexpected", random.decode(answer[0]).strip())


def test_a_ragged_batch_gives_each_what_it_gets_alone(tiny, random):
    dialogs = [CALM, FORGIVEN, ANSWERED, BAD, CALM]  # two batches of three
    for guard in (Guard(tiny, "3-8B"), Guard(random, "3-8B")):
        for found, dialog in zip(guard.judge_all(dialogs), dialogs, strict=True):
            alone = guard.judge(dialog)
            assert (found.word, found.answer, found.categories) == (alone.word, alone.answer, alone.categories)
            assert found.unsafe_probability == pytest.approx(alone.unsafe_probability, rel=1e-3, abs=1e-9)
    assert Guard(tiny, "2").judge_all([]) == []


def test_a_verdict_costs_one_prefill_and_a_safe_one_no_more(tiny, monkeypatch):
    shapes = []
    hidden = tiny.model.hidden
    monkeypatch.setattr(
        tiny.model, "hidden", lambda tokens, cache=None: shapes.append(tokens.shape[1]) or hidden(tokens, cache)
    )
    guard = Guard(tiny, "3-1B")
    guard.judge(CALM)
    assert len(shapes) == 1
    shapes.clear()
    guard.judge(BAD)
    assert shapes[1:] == [1] * (len(ANSWER) - 1)


def test_the_threshold_moves_the_border(tiny, tmp_path, shorter_tokenizer_path):
    calm = Guard(tiny, "3-1B").judge(CALM)
    found = Guard(tiny, "3-1B", threshold=calm.unsafe_ratio / 2).judge(CALM)
    assert (found.word, found.unsafe_probability) == ("unsafe", calm.unsafe_probability)
    assert found.answer.startswith("unsafe\n") and found.categories
    assert Guard(tiny, "3-1B", threshold=min(1, 2 * calm.unsafe_ratio)).judge(CALM).word == "safe"


def test_own_and_excluded_categories(tiny):
    own = [Category("S9", "Cakes"), Category("S1", "Pies")]
    found = Guard(tiny, "3-1B", categories=own).judge(BAD)
    assert ([category.title for category in found.categories], found.unknown) == (["Cakes"], ("S2",))
    found = Guard(tiny, "3-1B", exclude=["S2"]).judge(BAD)
    assert ([category.code for category in found.categories], found.excluded) == (["S9"], ("S2",))
    found = Guard(tiny, "3-1B", exclude=["S2", "S9"]).judge(BAD)
    assert (found.word, found.excluded) == ("safe", ("S9", "S2"))


def test_an_answer_to_nothing_is_unexpected(tmp_path, shorter_tokenizer_path):
    folder = guard_folder(tmp_path / "Talker", shorter_tokenizer_path, answer=(271, 9906, EOT), calm=9906)
    guard = Guard(Llama.build(folder, device="cpu", dtype="float32", max_seq_len=512), "3-1B")
    found = guard.judge(BAD)
    assert (found.word, found.answer, found.is_safe, found.is_expected) == ("unexpected", "Hello", False, False)
    assert guard.judge(CALM).word == "unexpected"


def test_an_image_is_judged_by_the_guard_that_sees_it(tmp_path, shorter_tokenizer_path):
    params = VISION_PARAMS | {"vocab_size": PARAMS["vocab_size"]}
    folder = make_random_checkpoint(tmp_path / "Vision", params, tokenizer=shorter_tokenizer_path, dtype=torch.float32)
    llama = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=512)
    guard = Guard(llama)
    assert guard.version.name == "3-11B"
    with_image = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image", "image": noise(80, 60)}]}]
    without = [{"role": "user", "content": "Hi"}]
    found, blind = guard.judge_all([with_image, without])
    assert found.unsafe_probability != blind.unsafe_probability
    ids = guard.prompt.encode(llama.formatter, read_conversation(with_image))
    [[token]], logprobs = llama.generate([ids], 1, 0.0, logprobs=True, images=[[noise(80, 60)]], logit_bias={UNSAFE: 1e4})
    assert token == UNSAFE
    assert found.unsafe_probability == pytest.approx(torch.tensor(logprobs[0][0]).exp().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"version": "3"}, "expected one of 2, 3-1B"),
        ({"version": None}, "say which prompt"),
        ({"version": "3-1B", "threshold": 1.5}, "threshold is 1.5"),
        ({"version": "3-1B", "threshold": "high"}, "threshold is 'high'"),
        ({"version": "3-1B", "exclude": ["S14"]}, "no category 'S14'"),
        ({"version": "3-1B", "categories": []}, "no categories"),
    ],
)
def test_bad_options_are_refused(tiny, options, says):
    version = options.pop("version")
    with pytest.raises(RequestError, match=says):
        Guard(tiny, version, **options)


def test_a_conversation_beyond_the_context_is_refused(tiny):
    long = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(RequestError, match=r"prompt has 2,\d+ tokens, and its answer up to 32, but max_seq_len is 1,024"):
        Guard(tiny, "3-1B").judge(long)


def test_another_vocabulary_is_refused(shallow):
    with pytest.raises(RequestError, match="the model is not a Llama Guard"):
        Guard(shallow, "3-1B")


def test_the_marked_word_is_what_the_tiny_guard_watches(tokenizer):
    assert tokenizer.encode(" bomb", bos=False, eos=False) == [BOMB]
