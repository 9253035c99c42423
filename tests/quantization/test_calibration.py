"""The calibration text is frozen, long enough, and distinct from bench_quality.py's texts."""

import hashlib

from bench_quality import texts
from llama_ref.quantization.calibration import N_TOKENS, calibration_text

# A change of the text changes every int4 folder written afterwards: measure the quality table again.
CALIBRATION_SHA256 = "43d8ca283edf8dc993da57dce379cc7ddf62ce3b31701f49d9c24c3ac30ad8f5"
EVALUATION_SHA256 = {
    "English": "d56775cc34cee54ae5e75bee399029d08390bfb052870e780d0aac6484df7f0b",
    "code": "26d665614e5628ecd440b8d048328f001af94f4bfc36702bd4c0f8533b692f70",
    "Korean": "16f000e83cb47f338b1a88c28a4ce0ec9661e2a8529119d84898bd023410fcd3",
}
SHARED_WORDS = 8  # in a row, longer than any idiom


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + SHARED_WORDS]) for start in range(len(words) - SHARED_WORDS + 1)}


def test_the_texts_are_frozen():
    assert sha256(calibration_text()) == CALIBRATION_SHA256
    assert {kind: sha256(text) for kind, text in texts().items()} == EVALUATION_SHA256


def test_the_calibration_text_fills_the_tokens_that_are_read(tokenizer):
    """Counted with Llama 3's vocabulary, which needs the fewest tokens for a text."""
    assert len(tokenizer.encode(calibration_text(), bos=True, eos=False)) >= N_TOKENS


def test_evaluation_texts_fill_the_default_windows(tokenizer):
    for text in texts().values():
        assert len(tokenizer.encode(text, bos=False, eos=False)) >= 2 * 512


def test_nothing_is_evaluated_that_calibration_has_read():
    read = runs_of_words(calibration_text())
    assert len(read) > 3000
    for kind, text in texts().items():
        assert not read & runs_of_words(text), kind
