"""lm-evaluation-harness scores our model the same as its own `hf` model, without a network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import bench_evaluate
from conftest import REPOSITORY, exit_code
from evaluation.harness_tasks import write_tasks
from folders import tiny_folder
from jobs import torchrun
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.evaluation.harness.adapter import LlamaRefLM
from llama_ref.evaluation.harness.run import EvaluationSettings, run_tasks
from llama_ref.generation import Llama

MAX_LENGTH = 48  # the longest page has two windows


@pytest.fixture(autouse=True)
def without_list_of_packages(monkeypatch) -> None:
    """Skip the harness's environment report (`pip list` and more): a second per result."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def short(shallow) -> Llama:
    return Llama(shallow.model, shallow.tokenizer, max_seq_len=MAX_LENGTH)


@pytest.fixture(scope="module")
def theirs(short, demo_folder, tmp_path_factory) -> Any:
    """The harness's own `hf` model, with the same weights."""
    from lm_eval.models.huggingface import HFLM

    native = tmp_path_factory.mktemp("native")
    params = json.loads((demo_folder / "params.json").read_text())
    (native / "params.json").write_text(json.dumps(params | {"n_layers": short.model.args.n_layers}))
    (native / "tokenizer.model").symlink_to(demo_folder / "tokenizer.model")
    torch.save(short.model.state_dict(), native / "consolidated.00.pth")
    folder = to_hugging_face(native, tmp_path_factory.mktemp("hf") / "demo")
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=MAX_LENGTH)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


# ---- the harness's own model


def test_scores_are_those_of_the_harness_own_model(short, theirs, tasks):
    names = ["choices", "pages", "sentences"]
    found = run_tasks(short, EvaluationSettings(tuple(names), str(tasks), batch=3))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs.add_bos_token = None
    expected = simple_evaluate(theirs, tasks=["choices", "sentences"], task_manager=manager, bootstrap_iters=1000)
    theirs.add_bos_token = False  # else it adds a second begin-of-text and scores it
    expected["results"] |= simple_evaluate(theirs, tasks=["pages"], task_manager=manager)["results"]
    for name in names:
        for metric, score in expected["results"][name].items():
            assert found["results"][name][metric] == (score if isinstance(score, str) else pytest.approx(score, rel=1e-4)), (
                metric
            )
    assert found["n-samples"]["choices"]["effective"] == 4


def test_every_answer_is_that_of_the_harness_own_model(short, theirs):
    theirs.add_bos_token = None
    pairs = [
        ("The capital of France is", " Paris"),
        ("The capital of France is", " a city of"),
        ("", "Hello world"),
        ("1 ", "+ 1"),
    ]
    ours = LlamaRefLM(short).loglikelihood(instances("loglikelihood", *pairs))
    for (logprob, is_greedy), expected in zip(ours, theirs.loglikelihood(instances("loglikelihood", *pairs)), strict=True):
        assert (logprob, is_greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_the_benchmark_finds_equal_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_evaluate, "PASSAGE", 4)
    found = bench_evaluate.main(tiny_folder(tmp_path / "Tiny"), documents=3, batch=3)
    assert set(found) == {0, 3}
    for each in found.values():
        assert each["llama_ref"]["scores"] == each["hf"]["scores"]
        assert min(each["llama_ref"]["seconds"], each["hf"]["seconds"]) > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["0 examples", "3 examples"]


# ---- without a reference model


@pytest.fixture
def tiny(peaked) -> LlamaRefLM:
    return LlamaRefLM(peaked, batch=2)


def test_texts_of_any_length_are_whole(peaked, tiny):
    """One window is one teacher-forced pass; with shorter ones, every token is scored once."""
    text = "A text of some sixty bytes, each of which is a token for it."
    ids = peaked.tokenizer.encode(text, bos=True, eos=False)
    logprobs = peaked.generate([ids], max_gen_len=0, echo=True, logprobs=True)[1][0]
    (found,) = tiny.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(sum(logprobs), abs=1e-3)
    short = LlamaRefLM(Llama(peaked.model, peaked.tokenizer, max_seq_len=16))
    assert sum(len(ids) - begin for ids, begin in short._windows(text)) == len(ids) - 1


def test_ragged_batches_generate_what_single_runs_do(peaked):
    options = {"until": ["zz"], "max_gen_toks": 6, "do_sample": False}
    requests = instances("generate_until", *((text, options) for text in ("abc", "a", "a longer text", "abcdefg")))
    alone = [LlamaRefLM(peaked, batch=1).generate_until([each])[0] for each in requests]
    assert LlamaRefLM(peaked, batch=3).generate_until(requests) == alone


def test_generated_texts_end_before_a_stop_string(llama):
    request = instances("generate_until", ("One, two, three, four,", {"until": [" six", ""], "max_gen_toks": 16}))
    assert LlamaRefLM(llama).generate_until(request) == [" five,"]


def test_temperature_samples_and_other_options_are_named(tiny):
    sampled = instances(
        "generate_until", *[("abc", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 20, "until": []})] * 2
    )
    one, two = tiny.generate_until(sampled)
    assert one != two
    with pytest.raises(RequestError, match="generation_kwargs has 'num_beams', expected until, max_gen_toks"):
        tiny.generate_until(instances("generate_until", ("abc", {"num_beams": 4})))
    with pytest.raises(RequestError, match="generates 4,000 tokens, but max_seq_len is 1,024"):
        tiny.generate_until(instances("generate_until", ("abc", {"max_gen_toks": 4000})))


def test_only_a_chat_has_special_tokens(llama):
    bos, eot = llama.tokenizer.bos_id, llama.tokenizer.eot_id
    text = "<|begin_of_text|>Hi<|eot_id|>"
    assert eot not in LlamaRefLM(llama).tok_encode(text)
    chat = LlamaRefLM(llama, chat=True)
    assert chat.tok_encode(text) == [bos, *llama.tokenizer.encode("Hi", bos=False, eos=False), eot]
    assert chat.tok_encode("Hi")[0] == bos and chat.tok_encode("Hi", add_special_tokens=False)[0] != bos


def test_a_chat_is_the_one_of_the_chat_format(llama):
    chat = LlamaRefLM(llama, chat=True)
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi! "}]
    assert chat.tok_encode(chat.apply_chat_template(dialog)) == llama.formatter.encode_dialog_prompt(dialog)
    begun = [*dialog, {"role": "assistant", "content": "The answer is"}]
    ids = chat.tok_encode(chat.apply_chat_template(begun, add_generation_prompt=False))
    assert ids == [
        *llama.formatter.encode_dialog_prompt(dialog),
        *llama.tokenizer.encode("The answer is", bos=False, eos=False),
    ]


def test_long_contexts_are_cut_on_the_left(peaked, caplog):
    lm = LlamaRefLM(Llama(peaked.model, peaked.tokenizer, max_seq_len=8))
    (long,) = lm.loglikelihood(instances("loglikelihood", ("x" * 30 + "abcdef", "ghi")))
    assert "1 contexts were truncated on the left to fit 8 tokens" in caplog.text
    ids = peaked.tokenizer.encode("abcdef", bos=False, eos=False)
    (expected,) = lm._loglikelihood_tokens([(("", ""), ids, peaked.tokenizer.encode("ghi", bos=False, eos=False))])
    assert long[0] == pytest.approx(expected[0], abs=1e-4)
    with pytest.raises(RequestError, match="a continuation has 9 tokens, but max_seq_len is 8"):
        lm.loglikelihood(instances("loglikelihood", ("a", "123456789")))


def test_kept_answers_are_not_computed_again(peaked, tasks, tmp_path, monkeypatch):
    settings = EvaluationSettings(("choices",), str(tasks), use_cache=str(tmp_path / "kept"))
    first = run_tasks(peaked, settings, identity="this model")
    monkeypatch.setattr(type(peaked.model), "hidden", lambda *_: pytest.fail("the model is asked again"))
    again = run_tasks(peaked, settings, identity="this model")
    assert again["results"] == first["results"]
    with pytest.raises(pytest.fail.Exception):
        run_tasks(peaked, settings, identity="another model")


def test_an_interrupted_run_goes_on(peaked, tasks, tmp_path, monkeypatch):
    """Answers computed before Ctrl-C are kept in the cache file."""
    settings = EvaluationSettings(("choices",), str(tasks), batch=1, use_cache=str(tmp_path / "kept"))

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(peaked, settings, progress=interrupt)
    calls: list[tuple[int, int]] = []
    run_tasks(peaked, settings, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 12) and calls[-1] == (12, 12)


# ---- what cannot be run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks choicse --include_path TASKS", "unknown task 'choicse'; did you mean choices"),
        ("--tasks , --include_path TASKS", "tasks is ',', expected names"),
        ("--tasks choices --include_path nowhere", "--include_path is nowhere, expected a folder"),
        ("--tasks nothing.yaml", "--tasks has nothing.yaml, but there is no such file"),
        ("--tasks choices --limit 0", "limit is 0, expected 1 or more"),
        ("--tasks choices --batch 0", "batch is 0, expected 1 or more"),
        ("--tasks choices --system_instruction Hi", "add --apply_chat_template"),
        ("--tasks choices --use_cache=", "use_cache is empty, expected the beginning"),
        ("", "missing --tasks"),
    ],
)
def test_misuse_is_one_line_and_2(words, message, demo_folder, tasks, capsys, monkeypatch):
    # Avoid listing the harness's own 14,000 tasks, which takes seconds.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks / "manager.py"))
    assert exit_code(["evaluate", str(demo_folder), *words.replace("TASKS", str(tasks)).split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.fixture
def offline(monkeypatch) -> Iterator[None]:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_data_that_only_the_hub_has_is_named(peaked, tmp_path):
    task = {"task": "far", "dataset_path": "nobody/nothing", "test_split": "test", "output_type": "multiple_choice"}
    (tmp_path / "far.yaml").write_text(json.dumps(task | {"doc_to_text": "x", "doc_to_target": 0, "doc_to_choice": "y"}))
    with pytest.raises(RequestError, match=r"the data of far is on Hugging Face's hub.*nobody/nothing.*--include_path"):
        run_tasks(peaked, EvaluationSettings(("far",), str(tmp_path)))


def test_what_fails_within_the_harness_is_one_line(peaked, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    settings = EvaluationSettings(("capitals",), str(REPOSITORY / "examples" / "tasks"), num_fewshot=99, limit=1)
    with pytest.raises(LlamaRefError, match="lm-evaluation-harness failed: ValueError"):
        run_tasks(peaked, settings)


def test_a_task_whose_file_is_gone_says_which(peaked, tmp_path):
    folder = write_tasks(tmp_path)
    (folder / "pages.jsonl").unlink()
    with pytest.raises(RequestError, match=r"cannot load pages: FileNotFoundError: .*pages.jsonl"):
        run_tasks(peaked, EvaluationSettings(("pages",), str(folder)))


def test_without_the_package_one_line_says_how_to_get_it(demo_folder, capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert exit_code(["evaluate", str(demo_folder), "--tasks", "x"]) == 2
    assert "pip install 'llama-ref[eval]'" in capsys.readouterr().err


def test_json_has_the_harness_names(tmp_path, tasks, capsys):
    folder = tiny_folder(tmp_path / "Tiny")
    words = ["--tasks", "choices", "--include_path", str(tasks), "--limit", "1", "--json", "--apply_chat_template"]
    found = run(["evaluate", str(folder), *words], capsys)
    assert found["results"]["choices"]["acc,none"] in (0.0, 1.0)
    assert found["model"] == "Tiny" and found["settings"]["limit"] == 1 and found["lm_eval"]
    assert found["n-samples"]["choices"]["effective"] == 1


def test_two_processes_score_as_one_does(warm, tmp_path, tasks, capsys):
    folder = str(tiny_folder(tmp_path / "Tiny", dtype=torch.float32))
    common = ["--dtype", "float32", "--json"]
    words = ["perplexity", folder, str(tasks / "pages.jsonl"), "--context", "64", *common]
    alone, together = run(words, capsys), run_together(warm, [*words, "--pipeline_parallel_size", "2"])
    assert together["results"][0]["perplexity"] == pytest.approx(alone["results"][0]["perplexity"], rel=1e-5)
    words = ["evaluate", folder, "--tasks", "pages,choices,sentences", "--include_path", str(tasks), *common]
    alone, together = run(words, capsys)["results"], run_together(warm, words)["results"]
    assert together["pages"]["bits_per_byte,none"] == pytest.approx(alone["pages"]["bits_per_byte,none"], rel=1e-5)
    assert together["choices"]["acc,none"] == alone["choices"]["acc,none"]


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert exit_code(words) == 0
    return json.loads(capsys.readouterr().out)


def run_together(warm: Path, words: list[str]) -> dict[str, Any]:
    """The output of a two-process job, in which only the first process prints."""
    done = torchrun(2, "-m", "llama_ref", *words, warm=warm)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
