"""Perplexity equals that of transformers and llama.cpp, from their own loops and logits."""

import hashlib
import math

import pytest
import torch
from torch import Tensor

from conftest import REPOSITORY
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.evaluation.perplexity import Perplexity, perplexity
from llama_ref.evaluation.scoring import score_rows
from llama_ref.evaluation.texts import TextFile, read_texts
from llama_ref.evaluation.windows import Cut
from llama_ref.generation import Llama
from parity.oracles import hugging_faces_model

ENGLISH = REPOSITORY / "scripts" / "quality_texts" / "english.txt"
# Results of llama-cpp-python 0.3.36 for the demo in float32, from the loop in test_llama_cpp_itself.
LLAMA_CPP = {"context": 128, "perplexity": 30.9328}


@pytest.fixture(scope="module")
def english() -> TextFile:
    return read_texts([str(ENGLISH)])[0]


def text_of(words: str) -> TextFile:
    return TextFile("a text", words, len(words.encode()), "")


@pytest.fixture(scope="module")
def uniform(peaked) -> Llama:
    """A model that gives all tokens the same probability."""
    from llama_ref.model import Transformer

    model = Transformer(peaked.model.args).requires_grad_(False)
    model.output.weight.data.zero_()
    return Llama(model, peaked.tokenizer)


# ---- other implementations


@torch.no_grad()
def guides_loop(model, ids: Tensor, max_length: int, stride: int) -> float:
    """The loop of Hugging Face's guide "Perplexity of fixed-length models"."""
    total, count, last_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        inputs = ids[:, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - last_end)] = -100
        n_losses = int((labels != -100).sum()) - 1
        total += model(inputs, labels=labels).loss.item() * n_losses
        count, last_end = count + n_losses, end
        if end == ids.shape[1]:
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("context", "stride"), [(128, 128), (128, 80), (2048, 512)])
def test_as_hugging_faces_guide_computes_it(shallow, english, context, stride):
    english = text_of(english.text[:1800])
    ids = torch.tensor([shallow.tokenizer.encode(english.text, bos=True, eos=False)])
    expected = guides_loop(hugging_faces_model(shallow.model), ids, context, stride)
    found = perplexity(shallow, english, Cut("hf", context, stride))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


def test_as_llama_cpp_computed_it(llama, english):
    context = LLAMA_CPP["context"]
    found = perplexity(llama, english, Cut("llama.cpp", context, context))
    assert found.perplexity == pytest.approx(LLAMA_CPP["perplexity"], rel=1e-4)
    assert found.tokens == found.windows * (context // 2 - 1)


def test_llama_cpp_itself(demo_folder, llama, tmp_path):
    """llama.cpp's own logits, summed as in its tool over the second halves of chunks with a BOS."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from bench_quality import peer_reader
    from llama_ref.bench.peers.gguf import write_gguf
    from llama_ref.checkpoint.folder import open_folder

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    write_gguf(open_folder(demo_folder), tmp_path / "demo.gguf", torch.float32)
    read, context = peer_reader(tmp_path / "demo.gguf"), LLAMA_CPP["context"]
    ids = llama.tokenizer.encode(ENGLISH.read_text(encoding="utf-8").removesuffix("\n"), bos=True, eos=False)
    nll, count = 0.0, 0
    for chunk in range(len(ids) // context):
        tokens = torch.tensor(ids[chunk * context : (chunk + 1) * context])
        tokens[0] = llama.tokenizer.bos_id
        logprobs = read(tokens[None])[0].double()
        for j in range(context // 2, context - 1):
            nll -= logprobs[j, tokens[j + 1]].item()
            count += 1
    assert math.exp(nll / count) == pytest.approx(LLAMA_CPP["perplexity"], rel=1e-4)


# ---- identities


def test_a_uniform_model_chooses_among_all_words(uniform, english):
    vocab_size = uniform.model.args.vocab_size
    for cut in (Cut("hf", 256, 256), Cut("hf", 256, 64), Cut("llama.cpp", 256, 256)):
        assert perplexity(uniform, english, cut).perplexity == pytest.approx(vocab_size, rel=1e-6)


def test_bits_per_byte_are_the_same_nats_in_another_unit(shallow, english):
    found = perplexity(shallow, english, Cut("hf", 2048, 2048))
    assert found.n_bytes == len(english.text.encode())  # one window scores all of the text
    nats = math.log(found.perplexity) * found.tokens
    assert found.bits_per_byte == pytest.approx(nats / (found.n_bytes * math.log(2)))


def test_one_window_is_one_teacher_forced_pass(peaked, english):
    text = text_of(english.text[:300])
    ids = torch.tensor([peaked.tokenizer.encode(text.text, bos=True, eos=False)])
    logprobs = peaked.model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
    found = perplexity(peaked, text, Cut("hf", 1024, 1024))
    assert found.nll == pytest.approx(-logprobs.double().mean().item(), rel=1e-6)


def test_texts_longer_than_a_pass_are_read_in_pieces(peaked, monkeypatch):
    rows = [(list(range(65, 165)), 10), (list(range(70, 140)), 1), ([65, 66], 1)]
    expected = score_rows(peaked.model, rows)
    monkeypatch.setattr("llama_ref.decoding.reading.PREFILL_TOKENS", 21)  # seven positions a row
    monkeypatch.setattr("llama_ref.evaluation.scoring.LOGPROB_POSITIONS", 3)
    found = score_rows(peaked.model, rows)
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in expected], abs=1e-4)


def test_ragged_rows_score_as_they_do_alone(peaked):
    rows = [(list(range(65, 100)), 10), ([65, 80, 90], 1), (list(b"What is this?"), 4)]
    alone = [score_rows(peaked.model, [row])[0] for row in rows]
    assert [score.logprob for score in score_rows(peaked.model, rows)] == pytest.approx([s.logprob for s in alone], abs=1e-4)


def test_the_last_newline_does_not_count_for_llama_cpp(peaked):
    """llama.cpp's tool drops a final newline: two windows and a newline are two windows."""
    text = text_of("x" * 15)  # with begin-of-text, two windows of eight
    cut = Cut("llama.cpp", 8, 8)
    assert perplexity(peaked, text, cut) == perplexity(peaked, text_of(text.text + "\n"), cut)
    with pytest.raises(RequestError, match="a text: the text has 15 tokens"):
        perplexity(peaked, text_of("x" * 14 + "\n"), cut)


def test_progress_counts_scored_tokens(peaked, english):
    calls: list[tuple[int, int]] = []
    found = perplexity(peaked, text_of(english.text[:2000]), Cut("hf", 512, 256), lambda *call: calls.append(call))
    assert calls[0] == (0, found.tokens) and calls[-1] == (found.tokens, found.tokens) and len(calls) > 2


def test_weights_that_are_not_numbers_are_named(uniform, peaked, english):
    model = type(peaked.model)(peaked.model.args).requires_grad_(False)
    model.output.weight.data.fill_(math.nan)
    with pytest.raises(LlamaRefError, match=r"logits are not numbers \(NaN\)"):
        perplexity(Llama(model, peaked.tokenizer), text_of("some text"), Cut("hf", 16, 16))


# ---- texts


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(RequestError, match="empty is empty, expected a text"):
        read_texts([str(tmp_path / "empty")])


def test_a_file_is_named_by_its_size_and_hash_with_the_byte_order_mark(tmp_path):
    (tmp_path / "marked").write_bytes(data := "\ufeffHi".encode())
    [found] = read_texts([str(tmp_path / "marked")])
    assert (found.text, found.n_bytes, found.sha256) == ("Hi", 5, hashlib.sha256(data).hexdigest())


def test_figures_are_plain_numbers(peaked):
    found = perplexity(peaked, text_of("some text"), Cut("hf", 16, 16))
    assert found == Perplexity(found.perplexity, found.bits_per_byte, found.nll, 9, 9, 1)
