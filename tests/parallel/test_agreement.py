"""Jobs whose processes have different files or options: all processes raise the same error."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore

from folders import PARAMS, byte_tokenizer, tiny_folder
from jobs import torchrun
from llama_ref.errors import JobError
from llama_ref.parallel import agreement, heartbeat
from llama_ref.parallel.agreement import Agreement, differences, shown
from llama_ref.parallel.peers import named, speaks_for
from make_random_checkpoint import make_random_checkpoint

WORKER = Path(__file__).parents[1] / "differing_worker.py"
BUILDS = ("weights", "depth", "max_seq_len", "dtype")
CALLS = {
    "max_gen_len": [{"max_gen_len": 2}, {"max_gen_len": 3}],
    "prompt": [{"prompt_tokens": [[1, 2, 3]]}, {"prompt_tokens": [[1, 2, 4]]}],
    "temperature": [{"temperature": 0}, {"temperature": 0.5}],
    "stop": [{"stop": "a"}, {"stop": ["b"]}],
}


@pytest.fixture(scope="module")
def differing(warm, tmp_path_factory) -> tuple[list[dict], str]:
    """Run a job whose processes differ; returns what each rank recorded, and the job's stderr."""
    root = tmp_path_factory.mktemp("differing")
    base = str(tiny_folder(root / "base"))
    unlisted = tiny_folder(root / "unlisted", seed=1)
    (unlisted / "checklist.chk").unlink()  # so that only the weights themselves differ
    deep = make_random_checkpoint(root / "deep", PARAMS | {"n_layers": 3}, tokenizer=byte_tokenizer(root / "deep.model"))
    others = ({"ckpt_dir": str(unlisted)}, {"ckpt_dir": str(deep)}, {"max_seq_len": 32}, {"dtype": "bfloat16"})
    same = {"ckpt_dir": base}
    task = {
        "base": same,
        "builds": {name: [same, same | other] for name, other in zip(BUILDS, others, strict=True)},
        "calls": CALLS,
    }
    (root / "task.json").write_text(json.dumps(task))
    done = torchrun(2, WORKER, root / "task.json", root, warm=warm)
    assert (root / "1.json").exists(), done.stderr
    assert done.returncode != 0
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)], done.stderr


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("weights", ["before loading the model", "the digest of consolidated.00.pth is "]),
        ("depth", ["n_layers is 2 on rank 0", "3 on rank 1"]),
        ("max_seq_len", ["max_seq_len is 64 on rank 0", "32 on rank 1"]),
        ("dtype", ["dtype is float32 on rank 0", "bfloat16 on rank 1"]),
        ("max_gen_len", ["before generating", "max_gen_len is 2 on rank 0", "3 on rank 1"]),
        ("prompt", ["the prompt is 3 tokens (digest "]),
        ("temperature", ["temperature is 0 on rank 0", "0.5 on rank 1"]),
        ("stop", ['stop is ["a"] on rank 0', '["b"] on rank 1']),
        ("another step", ["the next step is generating on rank 0", "joining the job on rank 1"]),
    ],
)
def test_all_processes_refuse_a_difference_with_the_same_words(differing, case, says):
    first, second = (said[case] for said in differing[0])
    assert all(part in first for part in says), first
    assert "Start all of them with the same files and options" in first
    if case != "another step":  # there, each rank names its own step
        assert second == first


def test_seeds_may_differ(differing):
    assert [said["other seeds"] for said in differing[0]] == ["", ""]


def test_a_difference_ends_a_command_with_one_message(differing):
    stderr = differing[1]
    assert stderr.count("llama-ref: ") == 1
    assert "llama-ref: the processes of this job differ before generating: max_gen_len is 2 on rank 0" in stderr
    assert "exitcode  : 1 " in stderr
    assert "[rank" not in stderr, "a worker's own traceback"


def test_comparing_costs_nothing_beside_a_generation(differing):
    assert max(said["shortest"] for said in differing[0]) < 0.02  # under 1 ms on an idle machine


@pytest.fixture
def three(monkeypatch) -> Iterator[list[Agreement]]:
    """The agreements of three ranks, all in this process, on one store."""
    monkeypatch.setattr(agreement, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "LONGEST_INTERVAL_SECONDS", 0.05)
    store = HashStore()
    agreements = [Agreement(store, rank, 3) for rank in range(3)]
    yield agreements
    for each in agreements:
        each.heartbeat.leave()


def meet(agreements: list[Agreement], step: str, facts: list[dict]) -> list[str]:
    """The JobError message of each rank that has facts."""
    said = [""] * len(facts)

    def check(rank: int) -> None:
        try:
            agreements[rank].check(step, facts[rank])
        except JobError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_meetings_leave_nothing_in_the_store(three):
    meet(three, "one", [{"a": 1}] * 3)
    n_keys = three[0].store.num_keys()
    for _ in range(20):
        assert meet(three, "again", [{"a": 1}] * 3) == [""] * 3
    assert three[0].store.num_keys() == n_keys


def test_a_process_that_has_ended_is_not_waited_for(three):
    meet(three, "joining", [{}] * 3)
    three[2].heartbeat.leave()
    said = meet(three, "going on", [{}] * 2)
    ending = "ended before going on, so this process cannot continue"
    assert all(each.startswith("rank 2 (") and ending in each for each in said)


def test_waiting_says_for_whom_and_is_not_for_ever(three, monkeypatch, caplog):
    monkeypatch.setattr(agreement, "FIRST_WARNING_SECONDS", 0.04)
    monkeypatch.setattr(agreement, "JOIN_SECONDS", 0.5)
    said = meet(three, "joining the job", [{}] * 2)
    assert all(each.startswith("waited 0.5 s for rank 2 before joining the job: ") for each in said)
    words = [record for record in caplog.records if "waiting for rank 2 before joining the job" in record.message]
    assert 1 <= len(words) <= 5, "one of the two that wait, each time after twice as long"
    assert all(record.any_rank for record in words)


def test_only_facts_that_several_have_are_compared():
    facts = [{"a": "1", "b": "x"}, {"a": "1"}, {"a": "2", "c": "y"}]
    assert list(differences(facts, {0: "one", 1: "one", 2: "two"})) == ["a is 1 on ranks 0, 1 (one), 2 on rank 2 (two)"]


def test_long_values_stay_different_when_shortened():
    values = ["x" * 100 + end for end in "ab"]
    assert len({shown(value) for value in values}) == 2
    assert all(len(shown(value)) < 100 for value in values)
    assert shown({"b": 1, "a": 2}) == shown({"a": 2, "b": 1})
    assert "\x1b" not in shown("\x1b[2J")


def test_ranks_are_named_by_host():
    assert named({3, 0, 1}, {0: "a", 1: "a", 3: "b"}) == "ranks 0, 1 (a) and rank 3 (b)"
    assert named({5}, {}) == "rank 5"
    assert [speaks_for(rank, {0, 2}, 4) for rank in (1, 3)] == [True, False]
