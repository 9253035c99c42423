"""Speculative decoding gives ordinary decoding's tokens or distribution, for any guesses."""

import base64
import itertools
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distributions import EACH, INF, TOGETHER, assert_frequencies, exact, plain, random_logits
from fake_cuda import fake_cuda
from folders import PARAMS
from jobs import run_worker
from llama_ref.args import ModelArgs
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding import drafting
from llama_ref.decoding.draft_model import DraftModel
from llama_ref.decoding.drafting import MEASURED, AcceptanceRate, Draft, PassTime, Speculation
from llama_ref.decoding.loop import steps
from llama_ref.decoding.prompt_lookup import PromptLookup, PromptLookupDrafter
from llama_ref.decoding.row import Row
from llama_ref.decoding.speculative import speculative_steps
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.parallel.job import Job
from llama_ref.quantization.apply import quantize_model, use_fast_kernels
from llama_ref.sampling import Sampler, distribution
from llama_ref.session import Session
from make_random_checkpoint import make_random_checkpoint
from random_models import random_model

ARGS_OF_32 = ModelArgs.from_dict(PARAMS)
ARGS = ModelArgs.from_dict(
    {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6, "multiple_of": 8, "norm_eps": 1e-5}
    | {"rope_theta": 10000.0}
)
MODEL, OTHER = random_model(ARGS, 0), random_model(replace(ARGS, n_layers=1), 1)
# With more or fewer repetitions.
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [4, 4], [0], [5, 3, 5, 1, 0, 5, 3]]

COUNT = "Count: 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3,"
COPY = "red = 1\ngreen = 2\nblue = 3\nyellow = 4\n\nred = 1\ngreen = 2\n"
TEXTS = [COUNT, "The capital of France is", COPY, "Once"]


class Guesses:
    """Drafts given by `foretell(text, n)`: the n tokens that follow."""

    def __init__(self, foretell):
        self.foretell = foretell

    @contextmanager
    def drafting(self, rows):
        yield [self for _ in rows]

    def draft(self, row, at_most, sampler):
        return Draft(self.foretell(row.prompt + row.generated, min(at_most, 5)))


NEXT: dict[tuple[int, ...], int] = {}  # the likeliest token after a text


def greedily(text: list[int], n: int) -> list[int]:
    """The continuation by ordinary decoding, computed once for each text."""
    text, begin = tuple(text), len(text)
    while len(text) < begin + n:
        if text not in NEXT:
            [tokens] = ordinary([list(text)], n, plain(temperature=0))[0]
            NEXT.update({(*text, *tokens[:i]): token for i, token in enumerate(tokens)})
        text = (*text, NEXT[text])
    return list(text[begin:])


SPECULATIONS = {
    "n-grams": PromptLookup,
    "another model": lambda: DraftModel(OTHER, MODEL),
    "the same model": lambda: DraftModel(MODEL, MODEL),
    "always right when greedy": lambda: Guesses(greedily),
    "always wrong when greedy": lambda: Guesses(lambda text, n: [(token + 1) % 6 for token in greedily(text, n)]),
    "right but for the third": lambda: Guesses(lambda text, n: [*greedily(text, n)[:2], 5, 5][:n]),
}


ORDINARY: dict[str, list[Row]] = {}


def ordinary(prompts, max_gen_len, params, *, stop_tokens=(), seed=0):
    """Tokens, and the rows; computed once for all tests that compare with them."""
    asked = repr((prompts, max_gen_len, params, stop_tokens, seed))
    if asked not in ORDINARY:
        ORDINARY[asked] = [Row(prompt, max_gen_len) for prompt in prompts]
        sampler = Sampler(params, torch.Generator().manual_seed(seed), prompts, ARGS.vocab_size)
        list(steps(MODEL, ORDINARY[asked], sampler, stop_tokens))
    return [row.generated for row in ORDINARY[asked]], ORDINARY[asked]


def speculated(prompts, max_gen_len, params, speculation: Speculation, *, stop_tokens=(), seed=0, model=MODEL):
    """Tokens, and the rows."""
    rows = [Row(prompt, max_gen_len) for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    samplers = [Sampler(params, generator, [prompt], ARGS.vocab_size) for prompt in prompts]
    list(speculative_steps(model, rows, samplers, stop_tokens, speculation))
    return [row.generated for row in rows], rows


def with_speculation(llama: Llama, speculation: Speculation | None, **limits: int) -> Llama:
    return Llama(llama.model, llama.tokenizer, **{"max_seq_len": llama.max_seq_len} | limits, speculation=speculation)


# ---- greedy


@pytest.mark.parametrize("name", SPECULATIONS)
@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.3, "logit_bias": {2: -INF, 4: 0.5}}], ids=["plain", "biased"])
@pytest.mark.parametrize(("stop_tokens", "max_gen_len"), [((), 1), ((0, 5), 2), ((), 30), ((3,), 30)])
def test_greedy_text_is_the_same_in_every_row_of_a_batch(name, params, stop_tokens, max_gen_len):
    params = plain(temperature=0, **params)
    expected, plain_rows = ordinary(PROMPTS, max_gen_len, params, stop_tokens=stop_tokens)
    found, rows = speculated(PROMPTS, max_gen_len, params, SPECULATIONS[name](), stop_tokens=stop_tokens)
    assert found == expected
    for row, plain_row in zip(rows, plain_rows, strict=True):
        assert (row.finish_reason, row.stop_token) == (plain_row.finish_reason, plain_row.stop_token)
        assert row.logprobs == pytest.approx(plain_row.logprobs, abs=1e-4)


@pytest.mark.parametrize(("name", "accepted"), [("always right when greedy", 25), ("always wrong when greedy", 0)])
def test_what_was_drafted_and_accepted_is_counted(name, accepted):
    """A right draft of 5 gives 6 tokens per pass (the prompt's pass: 1), a wrong one 1."""
    _, [row] = speculated(PROMPTS[:1], 31, plain(temperature=0), SPECULATIONS[name]())
    assert row.accepted == accepted
    assert row.passes == 31 - accepted
    assert row.drafted == 25 if accepted else row.drafted == 5 * 25 + 4 + 3 + 2 + 1  # never beyond the end


def test_the_same_model_guesses_right_every_time():
    for params in (plain(temperature=0), plain(temperature=1.3, repetition_penalty=1.5, top_p=0.9)):
        _, [row] = speculated(PROMPTS[:1], 40, params, DraftModel(MODEL, MODEL))
        assert 0 < row.accepted == row.drafted


@pytest.mark.parametrize("name", SPECULATIONS)
def test_at_every_rest_the_cache_holds_what_a_forward_pass_would_and_no_more_than_the_text(name):
    row = Row(PROMPTS[0], 20)
    cache = new_cache(MODEL, 1, row.total_len)
    sampler = Sampler(plain(temperature=0), torch.Generator(), [row.prompt], ARGS.vocab_size)
    for made, _ in enumerate(speculative_steps(MODEL, [row], [sampler], (), SPECULATIONS[name](), cache=cache), 1):
        text = row.prompt + row.generated
        assert len(row.generated) == made  # one token per step
        assert cache.longest == int(cache.lengths) == len(text) - 1
        fresh = new_cache(MODEL, 1, len(text))
        MODEL(torch.tensor([text[:-1]]), fresh)
        for ours, theirs in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
            torch.testing.assert_close(ours[..., : len(text) - 1, :], theirs[..., : len(text) - 1, :], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("which", "options", "n"),
    [
        ("llama", {"temperature": 0}, 16),
        ("shallow", {"temperature": 0}, 24),
        ("shallow", {"temperature": 0.8, "top_p": 0.95, "seed": 7}, 24),
    ],
    ids=["greedy", "greedy, often wrong", "seed"],
)
def test_a_real_models_text_is_the_same_with_n_grams_sampled_ones_too(which, options, n, request):
    """In float32; deterministic guesses do not change the draws: a seed gives the same text."""
    llama = request.getfixturevalue(which)
    stream, plain_stream = (each.stream(COUNT, n, **options) for each in (with_speculation(llama, PromptLookup()), llama))
    assert "".join(stream) == "".join(plain_stream)
    assert stream.tokens == plain_stream.tokens and stream.finish_reason == plain_stream.finish_reason
    assert stream.row.logprobs == pytest.approx(plain_stream.row.logprobs, abs=1e-3)
    assert stream.row.accepted > 0 and plain_stream.row.passes == n
    if which == "llama":
        assert stream.row.passes <= n / 2
    else:
        assert stream.row.accepted < stream.row.drafted


def test_a_real_models_batch_is_the_same_with_echo_and_logprobs(shallow):
    prompts = [shallow.encode(text) for text in TEXTS]
    tokens, logprobs = shallow.generate(prompts, 8, 0.0, 0.9, True, True)
    found, found_logprobs = with_speculation(shallow, PromptLookup()).generate(prompts, 8, 0.0, 0.9, True, True)
    assert found == tokens
    for ours, theirs in zip(found_logprobs, logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_bfloat16_text_is_the_likeliest_but_for_near_ties(demo_folder):
    """Several positions round differently from one: texts diverge only where tokens nearly tie."""
    quick = Llama.build(demo_folder, device="cpu", dtype="bfloat16", speculate="ngram", max_seq_len=512)
    for text in (COUNT, COPY):
        stream = quick.stream(text, 16, temperature=0)
        list(stream)
        ids = stream.row.prompt + stream.tokens
        with torch.inference_mode():
            logits = quick.model(torch.tensor([ids]))[0, len(stream.row.prompt) - 1 : -1]
        taken = logits.gather(1, torch.tensor(stream.tokens)[:, None])[:, 0]
        assert float((logits.amax(-1) - taken).max()) <= 0.25  # two steps of bfloat16, where logits are around 20
        assert stream.row.accepted > 0


# ---- sampled


@pytest.mark.parametrize("params", (EACH | TOGETHER).values(), ids=EACH | TOGETHER)
@pytest.mark.parametrize("likeness", [0.0, 0.5, 1.0], ids=["unlike", "alike", "the same"])
def test_guesses_kept_or_replaced_have_the_exact_distribution(params, likeness):
    params, n, seen = plain(**params), 10_000, [0, 5, 5, 17]
    logits, others = random_logits(40, 2), random_logits(40, 2, seed=1)
    others = likeness * logits + (1 - likeness) * others
    sampler = Sampler(params, torch.Generator().manual_seed(3), [seen] * n, 40)
    guessed, drawn_from = sampler.fork().guess(torch.from_numpy(others).expand(n, -1))
    chosen = sampler.accept_or_resample(torch.from_numpy(logits).expand(n, -1), guessed, drawn_from)
    expected = exact(logits, params, seen)
    assert_frequencies(np.bincount(chosen, minlength=40), expected)
    common = np.minimum(expected, exact(others, params, seen)).sum()  # the best that any rule can do
    assert float((chosen == guessed).double().mean()) == pytest.approx(common, abs=0.02)


SAMPLED = {name: {"temperature": 1.4} | params for name, params in {
    "temperature": {},
    "top_p": {"top_p": 0.8},
    "top_k, min_p": {"top_k": 4, "min_p": 0.2},
    "penalty": {"repetition_penalty": 1.8},
    "all": {"repetition_penalty": 1.4, "logit_bias": {2: 0.7, 4: -INF}, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
}.items()}  # fmt: skip


def exact_continuations(prompt: list[int], n: int, params) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of n tokens, by one plain forward per prefix."""
    found = {(): 1.0}
    for _ in range(n):
        longer = {}
        for made, probability in found.items():
            logits = MODEL(torch.tensor([[*prompt, *made]]))[0, -1].numpy()
            next_probs = exact(logits, params, [*prompt, *made])
            longer |= {(*made, token): probability * p for token, p in enumerate(next_probs.tolist()) if p}
        found = longer
    return found


@pytest.mark.parametrize(
    ("name", "options"),  # the first token is tested with every option above
    [
        ("n-grams", "all"),
        ("another model", "temperature"),
        ("another model", "all"),
        ("always wrong when greedy", "all"),
    ],
)
def test_continuations_have_the_exact_distribution(name, options):
    """Texts of three tokens after the first: accepted guesses must not affect later tokens."""
    params, prompt, n = plain(**SAMPLED[options]), PROMPTS[0], 600
    expected = exact_continuations(prompt, 3, params)
    tokens, rows = speculated([prompt] * n, 3, params, SPECULATIONS[name](), seed=11)
    assert sum(row.drafted for row in rows) > n / 4
    counts = Counter(map(tuple, tokens))
    every = list(itertools.product(range(6), repeat=3))
    assert_frequencies(np.array([counts[each] for each in every]), np.array([expected.get(each, 0) for each in every]))


@pytest.mark.parametrize("name", ["n-grams", "another model"])
def test_a_seed_means_the_same_text_every_time(name):
    params = plain(temperature=1.2, top_p=0.95, repetition_penalty=1.1)
    once, again, other = (speculated(PROMPTS, 30, params, SPECULATIONS[name](), seed=seed)[0] for seed in (1, 1, 2))
    assert once == again != other


@pytest.mark.parametrize("params", SAMPLED.values(), ids=SAMPLED)
@pytest.mark.parametrize("name", ["n-grams", "right but for the third"])
def test_certain_guesses_leave_a_seeds_text_as_it_is(name, params):
    for prompt in PROMPTS:
        assert speculated([prompt], 30, plain(**params), SPECULATIONS[name]())[0] == ordinary([prompt], 30, plain(**params))[0]


def test_a_guess_drawn_from_the_very_distribution_is_never_replaced():
    logits = torch.from_numpy(random_logits(40, 3)).expand(5000, -1)
    sampler = Sampler(plain(top_p=0.9), torch.Generator().manual_seed(1), [[0]] * 5000, 40)
    guessed, drawn_from = sampler.guess(logits)
    assert torch.equal(sampler.accept_or_resample(logits, guessed, drawn_from), guessed)
    torch.testing.assert_close(drawn_from, distribution(logits, plain(top_p=0.9)))


@pytest.mark.parametrize("params", [{}, TOGETHER["all"]], ids=["plain", "all"])
def test_guessing_and_judging_stay_on_the_device(params):
    with fake_cuda():
        sampler = Sampler(plain(**params), torch.Generator(), prompts=[[1, 2]], vocab_size=128256, device="cuda")
        guessed, drawn_from = sampler.fork().guess(torch.empty(1, 128256, device="cuda"))
        chosen = sampler.accept_or_resample(torch.empty(1, 128256, device="cuda"), guessed, drawn_from)
        assert {tensor.device.type for tensor in (guessed, drawn_from, chosen)} == {"cuda"}


# ---- the ends


@pytest.mark.parametrize("name", SPECULATIONS)
@pytest.mark.parametrize("lengths", [(2, 9, 25), (25, 2, 9), (1, 1, 30)])
def test_rows_of_a_batch_end_where_they_must_and_no_draft_goes_beyond(name, lengths):
    """The longest row fills the cache; the others continue to draft after it has ended."""
    rows = [Row(prompt, n) for prompt, n in zip(PROMPTS, lengths, strict=False)]
    samplers = [Sampler(plain(temperature=0), torch.Generator(), [row.prompt], ARGS.vocab_size) for row in rows]
    list(speculative_steps(MODEL, rows, samplers, (), SPECULATIONS[name]()))
    assert [row.generated for row in rows] == [
        ordinary([row.prompt], row.max_gen_len, plain(temperature=0))[0][0] for row in rows
    ]


def test_rows_draft_on_when_the_longest_has_ended():
    """It filled the cache to its end; its slots are given up."""
    rows = [Row([1, 2, 3, 4] * 8, 1), Row([2], 31)]
    samplers = [Sampler(plain(temperature=0), torch.Generator(), [row.prompt], ARGS.vocab_size) for row in rows]
    list(speculative_steps(MODEL, rows, samplers, (), SPECULATIONS["always right when greedy"]()))
    assert (rows[1].drafted, rows[1].accepted, rows[1].passes) == (25, 25, 6)


def test_a_draft_ends_with_its_first_stop_token():
    always_2 = plain(temperature=0, logit_bias={2: 1e3})
    _, [row] = speculated([[1]], 10, always_2, Guesses(lambda text, n: [2, 3, 2, 2][:n]), stop_tokens=(3,))
    assert row.generated == [2] * 10
    assert (row.drafted, row.accepted) == (
        8,
        4,
    )  # the prompt's pass gave one, four passes two each, and the last had no room


@pytest.mark.parametrize("stop", [", and, and", ["5", "(  a"], "never"])
def test_stop_strings_end_it_at_the_same_token(shallow, stop):
    """Also within an accepted draft, whose later tokens then do not count."""
    quick = with_speculation(shallow, PromptLookup())
    stream, plain_stream = (which.stream(COUNT, 24, 0.0, stop=stop) for which in (quick, shallow))
    assert list(stream) == list(plain_stream)
    assert (stream.tokens, stream.finish_reason) == (plain_stream.tokens, plain_stream.finish_reason)
    assert (stream.finish_reason == "stop") == (stop != "never")
    assert (stream.row.accepted > 0) == (type(stop) is str)


@pytest.mark.parametrize("room", [1, 2, 12])
def test_text_goes_to_the_contexts_end(shallow, room):
    n = len(shallow.encode(COUNT))
    short = with_speculation(shallow, None, max_seq_len=n + room)
    [expected] = short.generate([shallow.encode(COUNT)], temperature=0)[0]
    [found] = with_speculation(short, PromptLookup()).generate([shallow.encode(COUNT)], temperature=0)[0]
    assert found == expected and len(found) == room


@pytest.mark.parametrize(
    "new", [lambda _: PromptLookup(), lambda model: DraftModel(model, model)], ids=["n-grams", "draft model"]
)
def test_a_conversation_is_the_same_and_an_answer_left_amid_a_draft_is_no_harm(shallow, new):
    quick, slow = (Session(with_speculation(shallow, each, max_seq_len=200)) for each in (new(shallow.model), None))
    for text, n_pieces in (("Say: one two one two one two one two one two", 4), ("Again.", 9), ("Again.", 30)):
        streams = [session.say(text, temperature=0, max_gen_len=16) for session in (quick, slow)]
        pieces, plain_pieces = (list(itertools.islice(stream, n_pieces)) for stream in streams)
        assert pieces == plain_pieces
        assert quick.dialog == slow.dialog
        assert quick.cached_tokens == slow.cached_tokens


def test_a_draft_model_keeps_what_it_knows_of_a_conversation(monkeypatch):
    speculation = DraftModel(OTHER, MODEL)
    seen, hidden = [], Transformer.hidden

    def noting(model: Transformer, tokens: torch.Tensor, cache=None) -> torch.Tensor:
        seen.append((model, tokens.shape[1]))
        return hidden(model, tokens, cache)

    monkeypatch.setattr(Transformer, "hidden", noting)
    first = Row([1, 2, 3] * 10, 40)
    for row in (first, Row([*first.prompt, 4, 4], 20)):
        seen.clear()
        sampler = Sampler(plain(temperature=0), torch.Generator(), [row.prompt], ARGS.vocab_size)
        list(speculative_steps(MODEL, [row], [sampler], (), speculation))
        drafted = [n for model, n in seen if model is OTHER]
        assert drafted[0] == (31 if row is first else 3)
    assert row.generated == ordinary([row.prompt], 20, plain(temperature=0))[0][0]


def test_texts_that_share_a_draft_model_do_not_disturb_each_other():
    """Two streams at once, as when one is abandoned and another started."""
    speculation = DraftModel(MODEL, MODEL)
    rows = [Row(prompt, 25) for prompt in (PROMPTS[0], PROMPTS[3], PROMPTS[0][:5])]
    samplers = [Sampler(plain(temperature=0), torch.Generator(), [row.prompt], ARGS.vocab_size) for row in rows]
    making = [speculative_steps(MODEL, [row], [sampler], (), speculation) for row, sampler in zip(rows, samplers, strict=True)]
    for _ in zip(*making, strict=False):
        pass
    assert [row.generated for row in rows] == [ordinary([row.prompt], 25, plain(temperature=0))[0][0] for row in rows]
    assert all(0 < row.accepted == row.drafted for row in rows)


# ---- draft lengths


def test_text_that_repeats_is_guessed_and_no_longer_when_it_ceases_to():
    def read(next_token) -> list[int]:
        """The draft length at each position."""
        lengths = []
        for _ in range(40):
            lengths.append(len(drafter.draft(row, 100, None).tokens))
            row.generated.append(next_token(row.prompt + row.generated))
        return lengths

    def unlike_before(text: list[int]) -> int:
        found = PromptLookupDrafter(PassTime()).draft(Row(text, 100), 1, None).tokens
        return found[0] % 5 + 1 if found else 1

    drafter, row = PromptLookupDrafter(PassTime()), Row([1, 2, 3, 4, 5] * 2, 1000)
    lengths = read(lambda text: text[-5])
    assert 0 < lengths[0] < lengths[-1] == drafting.LONGEST_DRAFT
    assert set(read(unlike_before)[-20:]) == {0}
    # And again, since every token shows whether its guess would have been right.
    assert read(lambda text: text[-5])[-1] > 0


def test_the_latest_of_the_longest_matches_is_gone_on_from_and_may_run_into_itself():
    def guess(text: list[int]) -> list[int]:
        return PromptLookupDrafter(PassTime()).draft(Row(text, 50), 4, None).tokens

    assert guess([1, 2, 3, 9, 8, 7, 1, 2, 3])[:2] == [9, 8]
    # Three equal tokens before two, the latest first.
    assert guess([1, 2, 3, 9, 1, 2, 3, 7, 5, 2, 3, 6, 1, 2, 3])[:2] == [7, 5]
    assert guess([7, 7, 7, 7]) == [7, 7, 7, 7][: len(guess([7, 7, 7, 7]))] != []
    assert guess([1, 2, 3]) == []


@pytest.mark.parametrize(("right", "length"), [(0.0, 0), (0.3, 0), (0.6, range(3, 7)), (0.9, range(9, 13)), (1.0, 12)])
def test_as_many_are_guessed_as_pay(right, length):
    assert AcceptanceRate(right).best_length(100, PassTime()) in (length if isinstance(length, range) else [length])
    assert AcceptanceRate(right).best_length(1, PassTime()) <= 1
    assert AcceptanceRate(right).best_length(100, PassTime(several=1.0, each=0.0)) == (12 if right else 0)
    assert (
        AcceptanceRate(right).best_length(100, PassTime(), cost=1.0) == 0
    )  # a draft model as slow as the model cannot pay off


@pytest.mark.parametrize("scheme", [None, "int8", "int4:group=32"])
def test_what_passes_take_is_known_by_what_a_model_is(scheme):
    model = random_model(ARGS_OF_32, 0)
    if scheme:
        quantize_model(model, scheme)
        use_fast_kernels(model)
    kind = ("float32" if scheme is None else scheme[:4], False)
    assert PassTime.for_model(model) == DraftModel(MODEL, model).pass_time == PassTime(*MEASURED[kind])


def test_every_kind_of_model_was_measured_and_a_step_is_the_least_that_a_pass_takes():
    assert {*MEASURED} == {*itertools.product(("bfloat16", "float32", "int8", "int4"), (False, True))}
    # Float16 counts as bfloat16.
    assert PassTime.for_model(random_model(ARGS, 0).half()) == PassTime(*MEASURED["bfloat16", False])
    assert all(PassTime(*numbers).with_guesses(n) >= 1 for numbers in MEASURED.values() for n in range(13))


# ---- rejected arguments


@pytest.mark.parametrize("broken", ["model", "draft model"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_end_it(broken, temperature):
    model, small = random_model(ARGS, seed=0), random_model(ARGS, seed=1)
    row = Row(PROMPTS[0], 20)
    sampler = Sampler(plain(temperature=temperature), torch.Generator(), [row.prompt], ARGS.vocab_size)
    making = speculative_steps(model, [row], [sampler], (), DraftModel(small, model))
    next(making)
    (model if broken == "model" else small).norm.weight.fill_(float("nan"))
    with pytest.raises(LlamaRefError, match=rf"^the {broken}'s logits are not numbers \(NaN\)"):
        list(making)
    assert len(row.generated) < 20


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    """A model, a smaller one of its family, and two of other families."""
    root = tmp_path_factory.mktemp("family")

    def folder(name: str, tokens: list[bytes], **changes: int) -> Path:
        tokenizer = root / f"{name}.model"
        tokenizer.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
        return make_random_checkpoint(root / name, PARAMS | changes, tokenizer=tokenizer, dtype=torch.float32, seed=len(name))

    in_order = [bytes([byte]) for byte in range(256)]
    return {
        "big": folder("big", in_order),
        "small": folder("small", in_order, n_layers=1),
        "wider": folder("wider", [*in_order, b"ab"], vocab_size=513),
        "swapped": folder("swapped", in_order[::-1]),
    }


def test_a_draft_is_built_with_the_model(family):
    options = {"device": "cpu", "dtype": "float32", "max_seq_len": 64}
    alone, helped = (Llama.build(family["big"], **options, draft=draft) for draft in (None, family["small"]))
    assert alone.speculation is None
    assert 0 < helped.speculation.cost < 1
    assert helped.speculation.model.args.n_layers == 1
    prompts = [alone.encode(text) for text in ("abcabcabc", "x")]
    assert helped.generate(prompts, 20, temperature=0) == alone.generate(prompts, 20, temperature=0)


@pytest.mark.parametrize(
    ("other", "found"), [("wider", r"\(513 tokens, expected 512\)"), ("swapped", r"\(also 512 tokens, but different\)")]
)
def test_a_draft_of_another_vocabulary_is_refused(family, other, found):
    with pytest.raises(RequestError, match=f"draft model .* has another vocabulary than .*{found}: use one of the same family"):
        Llama.build(family["big"], device="cpu", draft=family[other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculate": "magic"}, """speculate is 'magic', expected "ngram" or None"""),
        ({"speculate": "ngram", "draft": "small"}, "speculate is 'ngram' and draft is 'small': choose one"),
    ],
)
def test_a_bad_choice_is_named(family, options, message):
    with pytest.raises(RequestError, match=message):
        Llama.build(family["big"], device="cpu", **options)


def test_several_processes_draft_alike(warm, family, tmp_path):
    """Different seeds, one text: all processes use rank 0's seed and drafts."""
    build = {"dtype": "float32", "speculate": "ngram"}
    tokens = [[97, 98, 99, 97, 98, 99, 97, 98], [98, 98, 98, 98, 98, 98, 98, 98]]
    task = {"folders": {"big": str(family["big"])}, "tokenizer": None, "build": build, "tokens": tokens}
    task |= {"n_tokens": 24, "n_sampled": 8}
    result = run_worker(warm, tmp_path, 2, task)["big"]
    alone = Llama.build(family["big"], device="cpu", dtype="float32", max_seq_len=64)
    greedy, logprobs = alone.generate([tokens[0], tokens[1][:3]], 24, temperature=0, logprobs=True, echo=True)
    assert result["greedy"] == greedy
    assert result["logprobs"][0] == pytest.approx(logprobs[0], abs=1e-4)
    assert result["sampled"][0] == result["sampled"][1]


def test_a_draft_model_is_refused_in_a_job_of_several(monkeypatch, family):
    monkeypatch.setattr("llama_ref.generation.join_job", lambda *_: Job(tensor_group=object()))
    with pytest.raises(RequestError, match="a draft model works in one process only"):
        Llama.build(family["big"], device="cpu", draft=family["small"])
