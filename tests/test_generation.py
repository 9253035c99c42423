"""Llama: Meta's interface, batches of any prompt lengths, sampling options, rejected arguments."""

import copy
import inspect
import math
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from folders import tiny_folder
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.decoding import loop, reading
from llama_ref.decoding.prompt_lookup import PromptLookup
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.generation import Llama, check_stream_options
from llama_ref.session import Session
from llama_ref.study import trace

CAPITAL = "The capital of France is"
NONE_GIVEN = inspect.Parameter.empty
SUM = [{"role": "user", "content": "What is 2+2?"}]  # answered with "2 + 2 = 4" and an end of turn
HI = [{"role": "user", "content": "Say hi."}]

META_PARAMETERS = {  # positional parameters of the `llama` package's methods
    "build": {
        "ckpt_dir": NONE_GIVEN,
        "tokenizer_path": None,
        "max_seq_len": 8192,
        "max_batch_size": 32,
        "model_parallel_size": None,
        "seed": 1,
    },
    "generate": {
        "prompt_tokens": NONE_GIVEN,
        "max_gen_len": None,
        "temperature": 0.6,
        "top_p": 0.9,
        "logprobs": False,
        "echo": False,
    },
    "text_completion": {
        "prompts": NONE_GIVEN,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_gen_len": None,
        "logprobs": False,
        "echo": False,
    },
    "chat_completion": {
        "dialogs": NONE_GIVEN,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_gen_len": None,
        "logprobs": False,
    },
}


@pytest.fixture(scope="module")
def prompts(llama) -> list[list[int]]:
    """Prompts of very different lengths, which end in different ways."""
    texts = [CAPITAL, "Once", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"]
    return [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts] + [llama.formatter.encode_dialog_prompt(SUM)]


@pytest.fixture(scope="module")
def of_many_lengths() -> list[list[int]]:
    """Prompts for `peaked`; three of them end near the boundary of pieces of 5 tokens."""
    some = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=some).tolist() for length in (6, 2, 40, 10, 11)]


@pytest.fixture(scope="module", params=["pth", "safetensors"])
def tiny_on_disk(request, tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("tiny") / "Tiny")
    if request.param == "safetensors":
        to_hugging_face(folder, folder.parent / "HF")
        return folder.parent / "HF"
    return folder


def with_context(llama: Llama, max_seq_len: int, **limits: int) -> Llama:
    return Llama(llama.model, llama.tokenizer, max_seq_len=max_seq_len, **limits)


def plain_logprobs(llama: Llama, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) of what follows each token, by one forward without a cache."""
    with torch.no_grad():
        return llama.model(torch.tensor([ids]))[0].log_softmax(-1)


# ---- Meta's interface


@pytest.mark.parametrize("method", META_PARAMETERS)
def test_a_call_written_for_metas_package_means_the_same(method):
    parameters = [p for p in inspect.signature(getattr(Llama, method)).parameters.values() if p.name != "self"]
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(META_PARAMETERS[method].items())


def test_build_takes_metas_positional_arguments(demo_folder):
    llama = Llama.build(str(demo_folder), str(demo_folder / "tokenizer.model"), 128, 4, 1, 7, device="cpu")
    assert (llama.max_seq_len, llama.max_batch_size) == (128, 4)
    assert llama.dtype == torch.bfloat16
    assert llama.model.args.vocab_size == llama.tokenizer.n_words
    assert llama.formatter.tokenizer is llama.tokenizer
    assert "Paris" in llama.text_completion([CAPITAL], 0.0, 0.9, 4)[0]["generation"]


def test_completions_have_metas_shape(llama):
    plain, other = llama.text_completion([CAPITAL, "Once upon a"], temperature=0, max_gen_len=3)
    assert plain == {"generation": " Paris.\n"}
    assert list(other) == ["generation"]

    [scored] = llama.text_completion([CAPITAL], temperature=0, max_gen_len=3, logprobs=True)
    assert scored["generation"] == " Paris.\n"
    assert scored["tokens"] == [" Paris", ".", "\n"]
    assert len(scored["logprobs"]) == 3 and all(isinstance(x, float) and x < 0 for x in scored["logprobs"])

    [echoed] = llama.text_completion([CAPITAL], temperature=0, max_gen_len=1, echo=True)
    assert echoed == {"generation": "<|begin_of_text|>The capital of France is Paris"}


def test_chat_answers_have_metas_shape(llama):
    plain, _ = llama.chat_completion([SUM, HI], temperature=0, max_gen_len=8)
    assert plain == {"generation": {"role": "assistant", "content": "2 + 2 = 4"}}
    [scored] = llama.chat_completion([SUM], temperature=0, max_gen_len=8, logprobs=True)
    assert scored["generation"] == plain["generation"]
    assert "".join(scored["tokens"]) == "2 + 2 = 4"
    assert len(scored["logprobs"]) == len(scored["tokens"])


@pytest.mark.parametrize(("prefill_tokens", "max_gen_len"), [(5, 3), (1024, 0)])
def test_logprobs_are_those_of_a_plain_forward(peaked, of_many_lengths, monkeypatch, prefill_tokens, max_gen_len):
    """Temperature and filters do not change them.

    The prompts end on both sides of a piece's boundary.
    """
    monkeypatch.setattr(reading, "PREFILL_TOKENS", prefill_tokens)
    monkeypatch.setattr(loop, "LOGPROB_POSITIONS", 3)
    some = of_many_lengths
    tokens, logprobs = peaked.generate(some, max_gen_len, 0.8, 0.9, True, True, seed=5)
    unechoed, new_logprobs = peaked.generate(some, max_gen_len, 0.8, 0.9, True, False, seed=5)
    for prompt, ids, found, new, new_found in zip(some, tokens, logprobs, unechoed, new_logprobs, strict=True):
        assert ids == prompt + new and len(found) == len(ids) <= len(prompt) + max_gen_len
        assert found[0] == 0.0
        assert found[len(prompt) :] == new_found
        wanted = plain_logprobs(peaked, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found[1:]), wanted, atol=1e-4, rtol=1e-4)


def test_the_stop_token_is_cut_off_and_ends_only_its_own_row(llama):
    dialogs = [llama.formatter.encode_dialog_prompt(dialog) for dialog in (SUM, HI)]
    tokens, logprobs = llama.generate(dialogs, 9, 0.0, logprobs=True)
    assert [len(ids) for ids in tokens] == [7, 9]  # as many as requested, or up to the end of turn
    assert [len(row) for row in logprobs] == [7, 9]
    assert not set(tokens[0]) & set(llama.tokenizer.stop_tokens)
    assert plain_logprobs(llama, dialogs[0] + tokens[0])[-1].argmax() == llama.tokenizer.eot_id


@pytest.mark.parametrize("stop", ["eos_id", "eom_id", "eot_id"])
def test_a_stop_token_at_once_leaves_nothing(llama, stop):
    token = getattr(llama.tokenizer, stop)
    assert llama.generate([[1, 2, 3]], 5, logprobs=True, logit_bias={token: 1e6}) == ([[]], [[]])


def test_without_a_limit_an_answer_fills_the_context(peaked, of_many_lengths):
    short, prompts = with_context(peaked, 12), of_many_lengths[:2]
    never = dict.fromkeys(peaked.tokenizer.stop_tokens, -math.inf)
    tokens, _ = short.generate(prompts, None, 0.0, logit_bias=never)
    assert [len(prompt) + len(new) for prompt, new in zip(prompts, tokens, strict=True)] == [12, 12]
    assert short.generate(prompts[:1], 1000, 0.0, logit_bias=never)[0] == tokens[:1]


@pytest.mark.parametrize("echo", [True, False])
def test_a_prompt_as_long_as_the_context_has_no_room_for_an_answer(peaked, of_many_lengths, echo):
    prompt = of_many_lengths[2]
    tokens, logprobs = with_context(peaked, len(prompt)).generate([prompt], None, 0.0, logprobs=True, echo=echo)
    assert tokens == [prompt if echo else []]
    assert len(logprobs[0]) == len(tokens[0])


# ---- batches


def test_greedy_tokens_are_the_likeliest_of_a_plain_forward(llama, prompts):
    [new], _ = llama.generate(prompts[:1], 8, 0.0)
    likeliest = plain_logprobs(llama, prompts[0] + new).argmax(-1)
    assert likeliest[len(prompts[0]) - 1 : -1].tolist() == new


@pytest.fixture(scope="module")
def alone(peaked, of_many_lengths) -> list[list[int]]:
    """Each prompt's result when it runs alone; all results differ."""
    return [peaked.generate([prompt], 8, 0.0)[0][0] for prompt in of_many_lengths]


def test_a_rule_of_ones_own_chooses_every_token(peaked, of_many_lengths):
    shapes = []

    def likeliest(logits):
        shapes.append((tuple(logits.shape), logits.dtype))
        return logits.argmax(-1)

    assert peaked.generate_by(of_many_lengths, likeliest, 12) == peaked.generate(of_many_lengths, 12, 0.0)[0]
    n = len(of_many_lengths)
    assert set(shapes) == {((n, peaked.model.args.vocab_size), torch.float32)}
    eot = peaked.tokenizer.eot_id
    assert peaked.generate_by(of_many_lengths, lambda logits: torch.full((n,), eot), 12) == [[]] * n
    with pytest.raises(RequestError, match="0 prompts"):
        peaked.generate_by([], likeliest)


def test_each_prompt_of_a_real_models_batch_gets_what_it_gets_alone(llama, prompts):
    """The last row ends at a stop token, the others at the limit."""
    batch = [prompts[i] for i in (2, 1, 3)]
    alone = [llama.generate([prompt], 8, 0.0)[0][0] for prompt in batch]
    assert [len(new) for new in alone] == [8, 8, 7]
    assert llama.generate(batch, 8, 0.0)[0] == alone


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 1), (2, 2, 1)])
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(peaked, of_many_lengths, alone, order):
    assert len({*map(tuple, alone)}) == len(alone)
    assert peaked.generate([of_many_lengths[i] for i in order], 8, 0.0)[0] == [alone[i] for i in order]


@pytest.mark.parametrize("room", [0, 1, 3])
def test_rows_go_on_while_another_has_filled_the_context(peaked, of_many_lengths, alone, room):
    longest = max(map(len, of_many_lengths))
    tight = with_context(peaked, longest + room)
    expected = [new[: longest + room - len(prompt)] for prompt, new in zip(of_many_lengths, alone, strict=True)]
    assert room in map(len, expected) and max(map(len, expected)) > room
    assert tight.generate(of_many_lengths, 8, 0.0)[0] == expected


@pytest.mark.parametrize("prefill_tokens", [4, 13])
def test_prompts_run_in_pieces_give_the_same(peaked, of_many_lengths, monkeypatch, prefill_tokens):
    whole, _ = peaked.generate(of_many_lengths, 8, 0.0)
    monkeypatch.setattr(reading, "PREFILL_TOKENS", prefill_tokens)
    assert peaked.generate(of_many_lengths, 8, 0.0)[0] == whole


def test_bfloat16_batches_part_from_single_prompts_only_at_near_ties(demo_folder, llama, prompts):
    rough = Llama.build(demo_folder, max_seq_len=128, device="cpu", dtype="bfloat16")
    batch, _ = rough.generate(prompts[:3], 8, 0.0)
    for prompt, together in zip(prompts[:3], batch, strict=True):
        [[single], _] = rough.generate([prompt], 8, 0.0)
        parting = next((i for i, (a, b) in enumerate(zip(together, single, strict=False)) if a != b), None)
        if parting is not None:
            logprobs = plain_logprobs(llama, prompt + single[:parting])[-1]
            assert abs(logprobs[together[parting]] - logprobs[single[parting]]) < 0.25


# ---- sampling


def test_a_seed_means_the_same_text(peaked):
    seeded = [peaked.generate([[1, 2, 3]], 8, 3.0, 1.0, seed=seed)[0] for seed in (3, 3, 4)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_the_seed_of_build_holds_for_a_series_of_calls(peaked):
    series = []
    for seed in (11, 11, 12):
        fresh = with_context(peaked, 64, seed=seed)
        series.append([fresh.generate([[1, 2, 3]], 6, 3.0, 1.0)[0] for _ in range(2)])
        assert series[-1][0] != series[-1][1], "every call began anew"
    assert series[0] == series[1] != series[2]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"temperature": 1e-9}])
def test_every_filter_at_its_limit_is_greedy(peaked, of_many_lengths, alone, options):
    hot = {"temperature": 2.0, "top_p": 1.0} | options
    assert peaked.generate(of_many_lengths[:1], 8, **hot)[0] == alone[:1]


def test_a_banned_token_gives_way_to_the_next(llama, prompts):
    logprobs = plain_logprobs(llama, prompts[0])[-1]
    likeliest = logprobs.argmax().item()
    logprobs[likeliest] = -math.inf
    [new], [found] = llama.generate(prompts[:1], 1, 0.0, logprobs=True, logit_bias={likeliest: -math.inf})
    assert new == [logprobs.argmax().item()]
    assert found == pytest.approx([logprobs.max().item()], abs=1e-4), "a bias does not change what is reported"


def test_a_repetition_penalty_counts_prompt_and_answer(shallow, prompts):
    prompt = prompts[2]
    [repeating], _ = shallow.generate([prompt], 8, 0.0)
    assert len(set(repeating)) < len(repeating) and set(repeating) & set(prompt), "it repeats nothing by itself"
    [new], _ = shallow.generate([prompt], 8, 0.0, repetition_penalty=1e6)
    assert len(set(new)) == len(new) == 8 and not set(new) & set(prompt)


# ---- rejected arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": []}, "0 prompts, expected at least one"),
        ({"prompt_tokens": [[1]] * 3}, "3 prompts, expected at most max_batch_size = 2: use several calls"),
        ({"prompt_tokens": [[1], []]}, "a prompt is empty"),
        ({"prompt_tokens": [[1] * 33]}, "the prompt has 33 tokens, but max_seq_len is 32"),
        ({"prompt_tokens": [[1], [49412]]}, "has token 49412; the vocabulary has 0 to 49411"),
        ({"prompt_tokens": [[-1]]}, "has token -1"),
        ({"prompt_tokens": [1, 2]}, "a prompt is 1, expected a list of token ids"),
        ({"prompt_tokens": ["text"]}, "a prompt is 'text', expected a list of token ids"),
        ({"prompt_tokens": [[1.5]]}, "expected a list of token ids"),
        ({"prompt_tokens": [[1]], "max_gen_len": -1}, "max_gen_len is -1"),
        ({"prompt_tokens": [[1]], "max_gen_len": True}, "max_gen_len is True"),
        ({"prompt_tokens": [[1]], "temperature": -0.1}, "temperature is -0.1"),
        ({"prompt_tokens": [[1]], "top_p": 0.0}, "top_p is 0.0"),
        ({"prompt_tokens": [[1]], "top_k": 2.0}, "top_k is 2.0"),
        ({"prompt_tokens": [[1]], "top_k": math.inf}, "top_k is inf"),
        ({"prompt_tokens": [[1]], "seed": 1.0}, "seed is 1.0"),
        ({"prompt_tokens": [[1]], "logit_bias": {49412: 1.0}}, "logit_bias names token 49412"),
        ({"prompt_tokens": [[1]], "logit_bias": {"5": 1.0}}, "logit_bias names token '5'"),
    ],
)
def test_what_cannot_be_done_is_refused(llama, arguments, message):
    with pytest.raises(RequestError) as caught:
        with_context(llama, 32, max_batch_size=2).generate(**arguments)
    assert message in str(caught.value)


def test_one_text_is_not_taken_for_a_list_of_its_letters(llama):
    with pytest.raises(RequestError, match="expected a list of texts"):
        llama.text_completion("Hi")


def test_too_large_a_cache_is_a_request_that_cannot_be_met(llama):
    with pytest.raises(RequestError, match="not enough memory for the keys and values of 1 × 1,000,000,000,000 tokens"):
        with_context(llama, 10**12).generate([[1, 2]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seq_len": 0}, RequestError, "max_seq_len is 0"),
        ({"max_batch_size": 1.5}, RequestError, "max_batch_size is 1.5"),
        ({"seed": -1}, RequestError, "seed is -1"),
        ({"dtype": "int8"}, RequestError, "dtype int8 is not one of"),
        ({"device": "gpu"}, RequestError, "unknown device gpu"),
        ({"model_parallel_size": 2}, RequestError, "model_parallel_size is 2, but there is 1 process"),
        ({"tokenizer_path": "/nowhere/tokenizer.model"}, CheckpointError, "cannot read /nowhere/tokenizer.model"),
    ],
)
def test_build_refuses_before_it_loads(demo_folder, options, error, message):
    def loaded(done: int, total: int) -> None:
        pytest.fail("weights were loaded")

    with pytest.raises(error) as caught:
        Llama.build(demo_folder, progress=loaded, **options)
    assert message in str(caught.value)


def test_another_models_tokenizer_is_refused(demo_folder, meta_tokenizer_path):
    with pytest.raises(CheckpointError, match=r"has 128,256 tokens, but params.json .* says vocab_size 49,412"):
        Llama.build(demo_folder, meta_tokenizer_path)


# ---- no side effects

LOOK_AROUND = """
import random, sys, torch, numpy

def state():
    return {
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(), "torch": torch.random.get_rng_state().tolist(), "python": random.getstate(),
        "numpy": str(numpy.random.get_state()), "precision": torch.get_float32_matmul_precision(),
        "streams": (id(sys.stdout), id(sys.stderr)), "distributed": torch.distributed.is_initialized(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }

before = state()
from llama_ref import Llama
assert state() == before, "the import changed something"
llama = Llama.build(sys.argv[1], max_seq_len=64, device="cpu")
assert state() == before, "the build changed something"
llama.text_completion(["One"], temperature=1.0, max_gen_len=2)
assert state() == before, "a generation changed something"
"""


def test_import_build_and_generation_change_nothing_global_and_print_nothing(demo_folder):
    done = subprocess.run([sys.executable, "-c", LOOK_AROUND, demo_folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- stop strings and log-probabilities, in every call


@pytest.mark.parametrize("speculation", [None, PromptLookup()], ids=["plain", "speculative"])
def test_stop_strings_end_each_row_of_a_batch_by_itself(peaked, speculation):
    """Each row equals what `stream` gives for it alone; rows without the string continue."""
    batch = Llama(peaked.model, peaked.tokenizer, max_seq_len=512, speculation=speculation)
    prompts = ["one", "two", "three"]
    letters = {i: -math.inf for i in range(peaked.tokenizer.n_words) if not 97 <= i < 123}
    options = {"max_gen_len": 16, "temperature": 0, "logit_bias": letters}
    whole = ["".join(peaked.stream(prompt, **options)) for prompt in prompts]
    options["stop"] = [whole[0][4:7], whole[1][1:4]]
    assert not any(stop in whole[2] for stop in options["stop"]), "the third row is to go on"

    found = batch.text_completion(prompts, logprobs=True, **options)
    for prompt, prediction in zip(prompts, found, strict=True):
        stream = peaked.stream(prompt, **options)
        assert prediction["generation"] == "".join(stream)
        assert "".join(prediction["tokens"]) == prediction["generation"]
        assert len(prediction["tokens"]) == len(prediction["logprobs"]) <= len(stream.tokens)
    assert [each["generation"] for each in found] == [whole[0][:4], whole[1][:1], whole[2]]

    ids = [peaked.encode(prompt) for prompt in prompts]
    tokens, _ = batch.generate(ids, **options)
    assert tokens == [peaked.tokenizer.encode(each["generation"], bos=False, eos=False) for each in found]
    echoed = batch.text_completion(prompts, echo=True, **options)
    assert [each["generation"] for each in echoed] == [
        peaked.tokenizer.decode(row) + each["generation"] for row, each in zip(ids, found, strict=True)
    ]


def test_a_stop_string_ends_an_answer_of_a_dialog(llama):
    [found] = llama.chat_completion([SUM], temperature=0, stop="= 4", logprobs=True)
    assert found["generation"] == {"role": "assistant", "content": "2 + 2 "}
    assert "".join(found["tokens"]) == "2 + 2"  # " =" is a token, which ends in the stop string
    assert len(found["logprobs"]) == len(found["tokens"])


def test_a_stream_has_the_log_probabilities_of_its_tokens(peaked):
    stream = peaked.stream(CAPITAL, 6, 0, logprobs=True)
    assert len("".join(stream)) > 0
    [tokens], [expected] = peaked.generate([peaked.encode(CAPITAL)], 6, 0, logprobs=True)
    assert stream.tokens == tokens and stream.logprobs == expected
    assert peaked.stream(CAPITAL, 6, 0).logprobs is None


@pytest.mark.parametrize(
    "call",
    [
        lambda llama, **options: llama.generate([[1]], **options),
        lambda llama, **options: llama.text_completion(["a"], **options),
        lambda llama, **options: llama.chat_completion([SUM], **options),
        lambda llama, **options: llama.stream("a", **options),
        lambda llama, **options: check_stream_options(**options),
    ],
    ids=["generate", "text_completion", "chat_completion", "stream", "check_stream_options"],
)
def test_an_unknown_option_is_a_request_error_in_every_call(llama, call):
    with pytest.raises(RequestError, match=r"unknown option 'min_pp': did you mean 'min_p'\?"):
        call(llama, min_pp=0.1)
    with pytest.raises(
        RequestError, match="unknown option 'beams': the options are max_gen_len, stop, logprobs, temperature, top_p"
    ):
        call(llama, beams=4)
    with pytest.raises(RequestError, match=r"unknown option 'max_gen_length': did you mean 'max_gen_len'\?"):
        call(llama, max_gen_length=4)


# ---- NumPy's and PyTorch's numbers


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda value: np.array(value)[()]], ids=["array", "tensor", "scalar"])
def test_numbers_of_numpy_and_tensors_are_taken_as_numbers(peaked, kind):
    plain = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 40,
        "min_p": 0.0,
        "repetition_penalty": 1.25,
        "seed": 3,
        "max_gen_len": 6,
    }
    same = {name: kind(value) for name, value in plain.items()}
    rows = [[5, 6, 7], [8, 9, 10]]
    expected, expected_logprobs = peaked.generate(rows, echo=True, logprobs=True, logit_bias={3: -1.0}, **plain)
    for prompts in (kind(rows), [kind(row) for row in rows], [[kind(token) for token in row] for row in rows]):
        tokens, logprobs = peaked.generate(prompts, echo=True, logprobs=True, logit_bias={np.int64(3): kind(-1.0)}, **same)
        assert tokens == expected and logprobs == expected_logprobs
        assert {type(token) for row in tokens for token in row} == {int}  # so that json can write them
    streams = [peaked.stream(prompt, **same) for prompt in (rows[0], kind(rows[0]))]
    assert "".join(streams[0]) == "".join(streams[1])
    check_stream_options(**same)
    llama = Llama(peaked.model, peaked.tokenizer, max_seq_len=kind(64), max_batch_size=kind(2), seed=kind(5))
    assert llama.generate(rows, 4) == with_context(peaked, 64, seed=5).generate(rows, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": torch.tensor([1, 2])}, "a prompt is 1, expected a list of token ids"),
        ({"prompt_tokens": torch.tensor([[0.5]])}, "a prompt is [0.5], expected a list of token ids"),
        ({"prompt_tokens": [[1]], "temperature": torch.tensor([0.5, 0.6])}, "temperature is tensor("),
        ({"prompt_tokens": [[1]], "top_k": np.float32(2)}, "top_k is 2.0"),
        ({"prompt_tokens": [[1]], "max_gen_len": np.bool_(True)}, "max_gen_len is "),
        ({"prompt_tokens": [[1]], "seed": 1 << 64}, "expected a whole number from 0 to 18446744073709551615"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(peaked, arguments, message):
    with pytest.raises(RequestError) as caught:
        peaked.generate(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("seed", [1 << 63, (1 << 64) - 1])
def test_the_largest_seeds_are_seeds(peaked, seed):
    first, again = (peaked.generate([[5, 6]], 8, seed=seed) for _ in range(2))
    assert first == again == with_context(peaked, 64, seed=seed).generate([[5, 6]], 8)


# ---- seeds, copies, default devices


def test_no_seed_is_another_seed_each_time(peaked):
    def text() -> str:
        fresh = Llama(peaked.model, peaked.tokenizer, max_seq_len=64, seed=None)
        return fresh.text_completion(["Once"], temperature=1.5, top_p=1.0, max_gen_len=8)[0]["generation"]

    assert len({text() for _ in range(4)}) > 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda llama: pickle.loads(pickle.dumps(llama))], ids=["copy", "pickle"])
def test_a_copy_generates_as_the_original(peaked, copied):
    """A copy of ALONE is another object: a check by identity would take it for a parallel job."""
    original = Llama(peaked.model, peaked.tokenizer, max_seq_len=64)
    twin = copied(original)
    prompts = [[1, 2, 3], [4]]
    assert twin.generate(prompts, 8, seed=3) == original.generate(prompts, 8, seed=3)
    session = Session(twin)
    assert "".join(session.say("a", max_gen_len=4, seed=1)) == "".join(Session(original).say("a", max_gen_len=4, seed=1))


def test_a_copy_continues_the_originals_random_numbers(peaked):
    original = Llama(peaked.model, peaked.tokenizer, max_seq_len=64)
    options = {"temperature": 3.0, "top_p": 1.0}
    first = original.generate([[1, 2, 3]], 8, **options)
    twin = pickle.loads(pickle.dumps(original))
    second = original.generate([[1, 2, 3]], 8, **options)
    assert twin.generate([[1, 2, 3]], 8, **options) == second != first


def test_spawned_workers_are_given_models_mapped_from_either_format(tmp_path):
    """`spawn` sends tensors' file descriptors when a worker starts; they must live until then."""
    native = tiny_folder(tmp_path / "tiny")
    folders = [native, to_hugging_face(native, tmp_path / "hf")]
    llamas = [Llama.build(folder, device="cpu", dtype="float32", max_seq_len=64) for folder in folders]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_send_completions, args=(llamas, sender))
    worker.start()
    sender.close()
    assert receiver.recv() == [llama.generate([[1, 2, 3]], 4) for llama in llamas]
    worker.join()


def _send_completions(llamas, sender) -> None:
    sender.send([llama.generate([[1, 2, 3]], 4) for llama in llamas])


@pytest.mark.parametrize("quantize", [None, "int8", "int4:group=32"])
def test_a_default_device_changes_nothing(tiny_on_disk, quantize):
    """ "meta" tensors have no data: anything that is put there by mistake fails."""

    def everything() -> list:
        llama = Llama.build(tiny_on_disk, device="cpu", dtype="float32", quantize=quantize, max_seq_len=64)
        guessing = Llama(llama.model, llama.tokenizer, max_seq_len=64, speculation=PromptLookup())
        options = {"max_gen_len": 8, "temperature": 0.8, "seed": 1, "repetition_penalty": 1.1}
        found = [each.generate([[1, 2, 3], [4]], logprobs=True, echo=True, **options) for each in (llama, guessing)]
        with torch.inference_mode():
            logits = trace(llama.model, [1, 2, 3], "logits")["logits"].tolist()
        return [*found, "".join(llama.stream([1, 2, 3], **options)), logits]

    expected = everything()
    with torch.device("meta"):  # as by set_default_device, which PyTorch 2.8 cannot take back
        assert everything() == expected
