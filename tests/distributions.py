"""The exact distribution for any filters, and a test whether drawn tokens follow it."""

import math

import numpy as np
import scipy.stats

from llama_ref.sampling import SamplingParams

INF = math.inf


def plain(**params) -> SamplingParams:
    """SamplingParams with only the given filters."""
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **params})


def exact(logits: np.ndarray, params: SamplingParams, seen=()) -> np.ndarray:
    """Each token's probability: float64 (V,)."""
    logits = logits.astype(np.float64)
    for token in set(seen):
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    weights = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-weights, kind="stable")
    probs = weights[order] / weights.sum()
    probs[params.top_k or len(probs) :] = 0
    probs /= probs.sum()
    probs[np.cumsum(probs) - probs > params.top_p] = 0
    probs[probs < params.min_p * probs[0]] = 0
    out = np.zeros_like(probs)
    out[order] = probs / probs.sum()
    return out


def assert_frequencies(counts: np.ndarray, probs: np.ndarray) -> None:
    """Chi-square test over bins of about 8 expected draws or more; rejects impossible tokens."""
    assert counts[probs == 0].sum() == 0
    order = np.argsort(-probs)
    order = order[probs[order] > 0]
    n_bins = counts.sum() // 8
    bins = np.minimum(np.cumsum(probs[order]) * n_bins, n_bins - 1).astype(int)
    bins = np.unique(bins, return_inverse=True)[1]
    observed = np.bincount(bins, weights=counts[order])
    expected = np.bincount(bins, weights=probs[order]) * counts.sum()
    if len(expected) > 1:
        # The seeds are fixed, so the result is too.
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def random_logits(vocab: int, spread: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)


PENALISED = {"repetition_penalty": 1.4, "logit_bias": {3: 2.5, 7: -INF, 11: -1.25}}
EACH = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "top_p": {"top_p": 0.8},
    "small top_p": {"top_p": 1e-6},
    "top_k": {"top_k": 6},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": 10**9},
    "min_p": {"min_p": 0.15},
    "min_p of one": {"min_p": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "repetition_bonus": {"repetition_penalty": 0.6},
    "logit_bias": {"logit_bias": {3: 2.5, 7: -INF, 11: -1.25}},
}
TOGETHER = {
    "as Meta's examples": {"temperature": 0.6, "top_p": 0.9},
    "top_k, top_p": {"top_k": 9, "top_p": 0.7},  # top_p is a fraction of what top_k left
    "top_k of all, top_p": {"top_k": 10**9, "top_p": 0.7},
    "top_p, min_p": {"temperature": 1.5, "top_p": 0.95, "min_p": 0.1},
    "top_k, min_p": {"top_k": 20, "min_p": 0.1},
    "penalties, top_p": {**PENALISED, "top_p": 0.8},
    "all": {**PENALISED, "temperature": 1.3, "top_k": 15, "top_p": 0.9, "min_p": 0.05},
}
