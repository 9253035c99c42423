"""Compare the speed of `llama-ref evaluate` with the harness's own `hf` model on one task.

    python scripts/bench_evaluate.py [--folder checkpoints/SmolLM2-135M-Instruct] [--documents 24]

The task is made from scripts/quality_texts/english.txt: which of four texts continues a passage? It
is asked with no examples and with three, in float32, with the same batch size for both models,
after a warm-up round. The scores must be equal. Only the models' log-likelihoods are timed, not the
harness's own work. Needs lm-eval, accelerate and transformers.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import LlamaRefError
from llama_ref.evaluation.harness.adapter import LlamaRefLM, silence_bars
from llama_ref.evaluation.harness.tasks import find_tasks
from llama_ref.generation import Llama

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = REPOSITORY / "scripts" / "quality_texts" / "english.txt"
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
PASSAGE, ENDING = 40, 8  # words
SHOTS = (0, 3)
TASK = """
task: passages
output_type: multiple_choice
doc_to_text: "Passage: {{passage}}\\nIt goes on:"
doc_to_choice: "{{endings}}"
doc_to_target: answer
dataset_path: json
test_split: test
fewshot_split: examples
fewshot_config: {sampler: first_n}
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def main(folder: str | Path = DEMO, documents: int = 24, batch: int = 8, device: str = "cpu") -> dict[str, Any]:
    """Print the seconds and scores of both, and their ratio. Raises SystemExit if scores differ."""
    silence_bars()
    with TemporaryDirectory() as scratch:
        write_task(Path(scratch), documents)
        converted = to_hugging_face(folder, Path(scratch) / "hf")
        llama = Llama.build(folder, device=device, dtype="float32", max_seq_len=2048)
        ours = LlamaRefLM(llama, batch=batch)
        theirs = HFLM(pretrained=str(converted), device=device, dtype="float32", batch_size=batch, max_length=2048)
        found = {}
        for shots in SHOTS:
            found[shots] = {"llama_ref": measure(ours, Path(scratch), shots), "hf": measure(theirs, Path(scratch), shots)}
            print(report(shots, found[shots]), flush=True)
            if found[shots]["llama_ref"]["scores"] != found[shots]["hf"]["scores"]:
                raise SystemExit(f"bench_evaluate: the scores differ: {found[shots]}")
    return found


def measure(model: Any, folder: Path, shots: int) -> dict[str, Any]:
    """Scores, and seconds of the model's log-likelihoods, after a warm-up round."""
    tasks = find_tasks(["passages"], str(folder))
    options = {"tasks": ["passages"], "task_manager": tasks, "num_fewshot": shots, "bootstrap_iters": 0, "log_samples": False}
    simple_evaluate(model, limit=2, **options)
    plain, seconds = model.loglikelihood, []
    model.loglikelihood = timed(plain, seconds)
    results = simple_evaluate(model, **options)["results"]["passages"]
    model.loglikelihood = plain
    return {"seconds": sum(seconds), "scores": {name: results[f"{name},none"] for name in ("acc", "acc_norm")}}


def timed(function: Callable, seconds: list[float]) -> Callable:
    def call(*arguments: Any) -> Any:
        begin = time.perf_counter()
        answer = function(*arguments)
        seconds.append(time.perf_counter() - begin)
        return answer

    return call


def report(shots: int, found: dict[str, Any]) -> str:
    ours, theirs = found["llama_ref"]["seconds"], found["hf"]["seconds"]
    scores = ", ".join(f"{name} {score:.4f}" for name, score in found["llama_ref"]["scores"].items())
    return f"{shots} examples: llama_ref {ours:.2f} s, hf {theirs:.2f} s, {theirs / ours:.2f} × as long; {scores}"


def write_task(folder: Path, documents: int) -> None:
    """Write the task's YAML and data: passages, each with its ending among those of others."""
    words = TEXT.read_text(encoding="utf-8").split()
    n = documents + max(SHOTS)
    step = (len(words) - PASSAGE - ENDING) // n
    if step < 1:
        raise SystemExit(
            f"bench_evaluate: documents is {documents}, expected at most {len(words) - PASSAGE - ENDING - max(SHOTS)}"
        )
    starts = [i * step for i in range(n)]
    endings = [" ".join(words[start + PASSAGE : start + PASSAGE + ENDING]) for start in starts]
    rows = []
    for i, start in enumerate(starts):
        choices = [endings[(i + 7 * k) % n] for k in range(4)]
        answer = i % 4
        choices[0], choices[answer] = choices[answer], choices[0]
        rows.append({"passage": " ".join(words[start : start + PASSAGE]), "endings": choices, "answer": answer})
    files = {"examples": rows[: max(SHOTS)], "test": rows[max(SHOTS) :]}
    for name, part in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    places = {name: str(folder / f"{name}.jsonl") for name in files}
    (folder / "passages.yaml").write_text(f"{TASK.strip()}\ndataset_kwargs: {json.dumps({'data_files': places})}\n")


if __name__ == "__main__":
    try:
        fire.Fire(main, serialize=lambda result: None)
    except LlamaRefError as error:
        raise SystemExit(f"bench_evaluate: {error}") from None
