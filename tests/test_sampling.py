"""Drawn tokens follow the exact distribution, computed here by sorting all, in float64."""

import ast
import math
from pathlib import Path

import llama_models
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributions import EACH, INF, TOGETHER, assert_frequencies, exact, plain, random_logits
from llama_ref import sampling
from llama_ref.errors import RequestError
from llama_ref.sampling import PREFILTER, Sampler, SamplingParams, candidates, sample

LLAMA_3_VOCAB = 128_256


def kept(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution that is drawn from, spread over the vocabulary: float64 (B, V)."""
    probs, ids = candidates(logits, params)
    dense = probs if ids is None else torch.zeros_like(logits).scatter_(1, ids, probs)
    return (dense.double() / dense.double().sum(-1, keepdim=True)).numpy()


def draw(logits: np.ndarray, params: SamplingParams, n: int, seed: int = 0, prompt=(), rows: int = 20_000) -> np.ndarray:
    """How often each token occurs in `n` draws: counts (V,)."""
    counts = np.zeros(len(logits), dtype=int)
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, n, rows):
        size = min(rows, n - begin)
        sampler = Sampler(params, generator, [list(prompt)] * size, len(logits))
        chosen = sampler(torch.from_numpy(logits).float().expand(size, -1))
        assert chosen.shape == (size,) and chosen.dtype == torch.long
        counts += np.bincount(chosen, minlength=len(logits))
    return counts


@pytest.mark.parametrize("params", (EACH | TOGETHER).values(), ids=EACH | TOGETHER)
@pytest.mark.parametrize("spread", [0.5, 3])
def test_frequencies_are_those_of_the_exact_distribution(params, spread):
    logits, params, prompt = random_logits(40, spread), plain(**params), [0, 5, 5, 17]
    assert_frequencies(draw(logits, params, 40_000, prompt=prompt), exact(logits, params, prompt))


@pytest.mark.parametrize("params", TOGETHER.values(), ids=TOGETHER)
def test_frequencies_over_llama_3s_vocabulary(params):
    spread = (0.01, 2.5, 6)[list(TOGETHER.values()).index(params) % 3]  # flat, middling or peaked
    logits, params = random_logits(LLAMA_3_VOCAB, spread), plain(**params)
    prompt = np.argsort(-logits)[:20:3].tolist()  # if it makes a difference
    assert_frequencies(draw(logits, params, 96, prompt=prompt, rows=48), exact(logits, params, prompt))


FILTERS_ALONE = {
    name: params for name, params in (EACH | TOGETHER).items() if not {*params} & {"repetition_penalty", "logit_bias"}
}


@pytest.mark.parametrize("spread", [0.01, 1, 2.5, 4, 6, 40])
@pytest.mark.parametrize("params", FILTERS_ALONE.values(), ids=FILTERS_ALONE)
@pytest.mark.parametrize("vocab", [1, 2, 40, PREFILTER, PREFILTER + 1, LLAMA_3_VOCAB])
def test_what_is_drawn_from_is_the_exact_distribution(params, vocab, spread):
    logits, params = random_logits(vocab, spread), plain(**params)
    drawn_from = kept(torch.from_numpy(logits)[None], params)[0]
    assert np.abs(drawn_from - exact(logits, params)).sum() < 1e-4  # float32 may put a last token on the other side


@pytest.mark.parametrize(("spread", "width"), [(0.01, LLAMA_3_VOCAB), (6, PREFILTER)], ids=["flat", "peaked"])
def test_the_vocabulary_is_sorted_whole_only_where_its_likeliest_tokens_do_not_hold_top_p(spread, width):
    logits = torch.from_numpy(random_logits(LLAMA_3_VOCAB, spread))[None]
    probs, _ = candidates(logits, plain(top_p=0.9))
    assert probs.shape == (1, width)


def test_rows_of_a_batch_keep_their_own_distributions():
    """A flat row's fallback to sorting everything must not affect a peaked row in the batch."""
    vocab = 3 * PREFILTER
    rows = [random_logits(vocab, spread, seed) for seed, spread in enumerate((0.01, 6, 1, 3, 0.01))]
    params, n = plain(temperature=0.8, top_p=0.9), 400
    logits = torch.from_numpy(np.stack(rows))
    assert np.abs(kept(logits, params) - np.stack([exact(row, params) for row in rows])).sum() < 1e-4
    chosen = Sampler(params, torch.Generator().manual_seed(1), [[0]] * 5 * n, vocab)(logits.repeat(n, 1))
    for row, ids in zip(rows, chosen.view(n, 5).T, strict=True):
        assert_frequencies(np.bincount(ids, minlength=len(row)), exact(row, params))


@pytest.mark.parametrize("params", FILTERS_ALONE.values(), ids=FILTERS_ALONE)
def test_evenly_spread_numbers_give_every_token_its_share_to_within_one(params):
    logits, params, n = random_logits(40, 2), plain(**params), 10_000
    uniform = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    counts = np.bincount(sample(torch.from_numpy(logits).expand(n, -1), params, uniform), minlength=40)
    assert np.abs(counts - n * exact(logits, params)).max() < 1.01


def test_a_seed_means_the_same_tokens_and_another_seed_others():
    logits, params = random_logits(LLAMA_3_VOCAB, 2), plain(temperature=0.8, top_p=0.95)
    one, again, other = (draw(logits, params, 16, seed) for seed in (1, 1, 2))
    assert (one == again).all() and not (one == other).all()


def test_a_row_draws_one_number_a_step_whatever_the_parameters():
    """So that a seed's later tokens do not depend on the sampler's internals."""
    logits = torch.from_numpy(random_logits(2000, 3)).expand(3, -1)
    for params in (plain(), plain(top_p=0.9), plain(top_k=5), plain(min_p=0.1)):
        generator, reference = (torch.Generator().manual_seed(5) for _ in range(2))
        Sampler(params, generator, [[0]] * 3, 2000)(logits)
        torch.rand(3, generator=reference, dtype=torch.float64)
        assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.9}])
def test_greedy_takes_the_likeliest_and_draws_nothing(filters):
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    logits = torch.from_numpy(np.stack([random_logits(2000, 3, seed) for seed in range(8)]))
    sampler = Sampler(plain(temperature=0, **filters), generator, [[0]] * 8, 2000)
    assert torch.equal(sampler(logits), logits.argmax(-1))
    assert torch.equal(generator.get_state(), state)


def test_greedy_heeds_penalty_and_bias():
    logits, generator = torch.tensor([[5.0, 4.0, 3.0, -1.0]]), torch.Generator()
    steps = Sampler(plain(temperature=0, repetition_penalty=2.0), generator, [[3]], 4)
    assert [int(steps(logits)) for _ in range(4)] == [0, 1, 2, 0]  # 5, 4, 3, then 2.5 beats 2 and 1.5; each counts once
    assert int(Sampler(plain(temperature=0, logit_bias={0: -INF, 2: 1.5}), generator, [[0]], 4)(logits)) == 2


def test_a_penalty_counts_each_rows_own_prompt():
    logits = torch.tensor([[2.0, 1.5], [2.0, 1.5], [-1.0, -1.5], [-1.0, -1.5]])
    chosen = Sampler(plain(temperature=0, repetition_penalty=1.9), torch.Generator(), [[0], [1], [0], []], 2)(logits)
    assert chosen.tolist() == [1, 0, 1, 0]  # a negative logit is multiplied: dividing it would reward it


def test_the_callers_logits_stay_as_they_are():
    logits = torch.from_numpy(random_logits(40, 2)).expand(2, -1).clone()
    before = logits.clone()
    Sampler(plain(**TOGETHER["all"]), torch.Generator(), [[0], [1]], 40)(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("logits", [[3.0, 3.5, -INF, -2.0], [-1e30, 1e30, 0.0, -INF], [-2e30, -1e30, -INF, -3e30]])
def test_tiny_temperatures_take_the_likeliest(temperature, logits):
    counts = draw(np.array(logits, dtype=np.float32), plain(temperature=temperature), 500)
    assert counts[np.argmax(logits)] == 500


@pytest.mark.parametrize("temperature", [1e-6, 1e-12, 1e-25])
def test_tiny_temperatures_still_weigh_tiny_differences(temperature):
    logits = np.array([0, -0.5, -1, -2], dtype=np.float32) * np.float32(temperature)
    assert_frequencies(draw(logits, plain(temperature=temperature), 5000), exact(logits, plain(temperature=temperature)))


@pytest.mark.parametrize("temperature", [1e5, 1e30])
def test_huge_temperatures_make_all_but_the_impossible_equal(temperature):
    logits = np.array([3.0, -5.0, -INF, 0.0], dtype=np.float32)
    assert_frequencies(draw(logits, plain(temperature=temperature), 3000), np.array([1, 1, 0, 1]) / 3)


@pytest.mark.parametrize(("params", "n_kept"), [({"top_p": 0.35}, 4), ({"top_k": 3}, 3), ({"min_p": 1.0}, 10), ({}, 10)])
def test_among_ties_the_right_number_is_kept_with_equal_chances(params, n_kept):
    counts = draw(np.zeros(10, dtype=np.float32), plain(**params), 4000)
    assert np.count_nonzero(counts) == n_kept
    assert scipy.stats.chisquare(counts[counts > 0]).pvalue > 1e-3


def test_ties_beyond_the_prefilter_do_not_widen_top_p():
    drawn_from = kept(torch.zeros(1, 4 * PREFILTER), plain(top_p=0.1))[0]
    assert abs(np.count_nonzero(drawn_from) - 0.1 * 4 * PREFILTER) <= 1


@pytest.fixture(scope="module")
def metas_top_p():
    """What Meta's sample_top_p draws from, sorted; extracted from a file that needs torchvision."""

    class Torch:
        handed_over: torch.Tensor

        def __getattr__(self, name):
            return getattr(torch, name)

        def multinomial(self, probs, num_samples):  # the last thing that the function does
            self.handed_over = probs
            return torch.multinomial(probs, num_samples)

    source = (Path(llama_models.__file__).parent / "llama3" / "generation.py").read_text()
    function = next(node for node in ast.parse(source).body if getattr(node, "name", None) == "sample_top_p")
    namespace = {"torch": Torch()}
    exec(compile(ast.Module([function], []), "generation.py", "exec"), namespace)

    def drawn_from(probs: torch.Tensor, top_p: float) -> np.ndarray:
        namespace["sample_top_p"](probs, top_p)
        return namespace["torch"].handed_over.numpy()

    return drawn_from


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("vocab", "spread"), [(50, 2), (5000, 1), (5000, 4), (LLAMA_3_VOCAB, 0.1), (LLAMA_3_VOCAB, 5)])
def test_top_p_keeps_what_metas_reference_keeps(metas_top_p, vocab, spread, top_p):
    logits = torch.from_numpy(np.stack([random_logits(vocab, spread, seed) for seed in range(4)]))
    metas = metas_top_p(torch.softmax(logits, dim=-1), top_p)
    ours = -np.sort(-kept(logits, plain(top_p=top_p)))
    assert ((ours > 0) == (metas > 0)).all()  # the same number of the likeliest: the same set
    np.testing.assert_allclose(ours, metas, rtol=1e-4, atol=1e-9)


NUMBERS = {
    "temperature": [-0.1, INF, 1e31, 10**400],
    "top_p": [0, -0.5, 1.01, INF],
    "min_p": [-0.01, 1.01, INF],
    "repetition_penalty": [0, -1.0, INF, 1e-31, 1e31],
    "top_k": [0, -1, 2.0, 0.5, INF],
    "seed": [-1, 1.0, 1 << 64, INF],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in NUMBERS.items() for value in [*values, math.nan, "1", True, [1], 1j]]
    + [(name, None) for name in ("temperature", "top_p", "min_p", "repetition_penalty")]
    + [("logit_bias", value) for value in ([1], "3", 5, True)],
)
def test_a_bad_parameter_is_named(name, value):
    with pytest.raises(RequestError, match=rf"^{name} is .*, expected "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("bias", [INF, math.nan, 1e31, -1e31, 10**400, "1", None, True])
def test_a_bad_bias_is_named_with_its_token(bias):
    with pytest.raises(RequestError, match=r"^logit_bias\[5\] is .*, expected a number from -1e\+30 to 1e\+30, or -inf"):
        SamplingParams(logit_bias={4: 1.0, 5: bias})


@pytest.mark.parametrize("token", [-1, 10, "5", 5.0, True, None, (1,)])
def test_a_bias_for_a_token_that_is_not_there_is_refused(token):
    with pytest.raises(RequestError, match=r"logit_bias names token .*; the vocabulary has 0 to 9"):
        Sampler(SamplingParams(logit_bias={4: 1.0, token: 1.0}), torch.Generator(), [[0]], 10)


def test_banning_every_token_is_refused():
    with pytest.raises(RequestError, match="logit_bias bans every token"):
        Sampler(SamplingParams(logit_bias=dict.fromkeys(range(10), -INF)), torch.Generator(), [[0]], 10)
    last = Sampler(plain(logit_bias=dict.fromkeys(range(9), -INF)), torch.Generator(), [[0]], 10)
    assert last(torch.zeros(1, 10)).tolist() == [9]


@pytest.mark.parametrize(
    "extreme", [{"repetition_penalty": 1e-30}, {"repetition_penalty": 1e30}, {"logit_bias": {1: 1e30, 2: -1e30}}]
)
def test_extreme_values_within_the_limits_overflow_nothing(extreme):
    logits = np.array([30.0, 20.0, 10.0, -40.0], dtype=np.float32)
    params = plain(temperature=0.5, **extreme)
    assert_frequencies(draw(logits, params, 300, prompt=[1, 3]), exact(logits, params, [1, 3]))


FINITE = st.floats(-1e4, 1e4, width=32)


@st.composite
def requests(draw):
    """Logits, some of them impossible, and any filters."""
    logits = draw(st.lists(FINITE | st.floats(-3, 3, width=32) | st.just(-INF), min_size=1, max_size=30))
    logits[draw(st.integers(0, len(logits) - 1))] = draw(FINITE)
    share = st.floats(1e-6, 1)
    params = plain(
        temperature=draw(st.sampled_from([1e-9, 0.1, 1.0, 1.5, 100.0])),
        top_p=draw(share | st.just(1.0)),
        top_k=draw(st.none() | st.integers(1, 40)),
        min_p=draw(share | st.just(0.0)),
    )
    return np.array(logits, dtype=np.float32), params


def possible(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Tokens that may be drawn, those within float32's rounding of a boundary included: bool (V,)."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    probs = weights / weights.sum()
    falling = -np.sort(-probs)
    in_top_k = probs >= falling[min(params.top_k or len(probs), len(probs)) - 1]
    probs = np.where(in_top_k, probs, 0)
    likelier = np.array([probs[probs > p * 1.00001].sum() for p in probs]) / falling[: params.top_k].sum()
    return (probs > 0) & (likelier <= params.top_p + 1e-5) & (probs >= params.min_p * probs.max() * 0.9999)


@given(requests(), st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 1 - 2**-53]))
@settings(max_examples=200)
def test_no_token_of_probability_0_is_ever_drawn(request, uniform):
    logits, params = request
    chosen = sample(torch.from_numpy(logits)[None], params, torch.tensor([[uniform]], dtype=torch.float64))
    assert possible(logits, params)[int(chosen)]


@pytest.mark.parametrize("params", [plain(), plain(top_p=0.9), plain(top_k=6), plain(min_p=0.1)])
def test_a_number_that_rounds_up_to_1_still_draws_a_possible_token(monkeypatch, params):
    """On a device without float64 the cumulative distribution is float32, where 1 − 2⁻⁵³ is 1."""
    monkeypatch.setattr(sampling, "_widest", lambda device: torch.float32)
    logits = np.array([0.0, 1.0, -INF, 2.0, -INF, 0.5, -INF, -INF], dtype=np.float32)
    chosen = sample(torch.from_numpy(logits)[None], params, torch.tensor([[1 - 2**-53]], dtype=torch.float64))
    assert exact(logits, params)[int(chosen)] > 0
