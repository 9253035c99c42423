"""A process of tests/parallel/test_study.py: studies every folder; rank 0 writes the results.

torchrun --nproc_per_node W study_worker.py TASK.json OUT
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ref import study
from llama_ref.compiled.caches import new_cache
from llama_ref.errors import LlamaRefError
from llama_ref.generation import Llama
from llama_ref.parallel.agreement import digest
from llama_ref.parallel.job import end_process

TEXTS = [[5, 9, 2, 7, 1, 3], [4, 4, 8]]


def main(task_file: str, out: str) -> None:
    task = json.loads(Path(task_file).read_text())
    found = {}
    for name, folder in task["folders"].items():
        llama = build(folder, task["pipeline_parallel_size"])
        if name == "demo":
            found[name] = trace_briefly(llama)
            continue
        found[name] = measure(llama, Path(task["to"], name), task["texts"][name], task["images"].get(name))
        found[name]["equal"] = _are_equal(found[name]["values"])
        found[name]["refused"] = refused(llama)
        found[name]["differing"] = _message(lambda llama=llama: study.trace(llama.model, [[1, 2 + dist.get_rank()]]))
    if dist.get_rank() == 0:
        torch.save(found, out)
    end_process(0)


def build(folder: str | Path, pipeline_parallel_size: int = 1) -> Llama:
    options = {"device": "cpu", "dtype": "float32", "pipeline_parallel_size": pipeline_parallel_size}
    return Llama.build(folder, max_seq_len=64, verify="never", **options)


def measure(llama: Llama, to: Path, texts: list, images: list | None = None) -> dict[str, Any]:
    """Everything that works with one process and with several: tensors by name, and text."""
    model, row = llama.model, texts[0]
    traced = study.trace(model, texts, images=images)
    values = dict(traced) | {"tokens": traced.tokens, "positions": traced.positions}
    if images:
        texts, row, images = TEXTS, texts[0], images[0]
    with study.recording(model, "*") as recorded:
        answer, _ = llama.generate([TEXTS[0]], 3, temperature=0)
    values |= {f"generated {name}": value for name, value in recorded.trace.items()}
    cache = new_cache(model, 1, 64)
    for some in (row[:2], row[2:]) if not images else ():
        values |= {f"cached {len(some)} {name}": value for name, value in study.trace(model, some, cache=cache).items()}
    lens = study.logit_lens(model, row, target=3, images=images)
    predicted = study.predict(model, row, images=images)
    heads = study.summarize_attention(model, row, images=images)
    values |= {"entropy": lens.entropy, "kl": lens.kl, "followed": lens.target_probability, "rank": lens.target_rank}
    values |= {"predicted": predicted.probability, "likely": predicted.top_ids, "likeliest": predicted.top_probabilities}
    values |= {
        "sink": heads.sink,
        "induction": heads.induction,
        "norm of stream": study.residual_stream(model, row, images=images).norm,
    }
    values["pattern"] = study.attention_pattern(model, row, 2, 1, images=images)
    collected = study.collect(model, TEXTS, ["layers.*.attention.k", "layers.2.ffn.hidden", "norm"], to=to)
    values |= {f"collected {name}": collected.select(name, positions=-1) for name in collected.names}
    return {"values": values, "answer": answer, "args": traced.model_args}


def trace_briefly(llama: Llama) -> dict[str, Tensor]:
    """Some values of a large model."""
    names = [f"layers.{layer}.{part}" for layer in (0, 29) for part in ("attention.*", "ffn.*", "residual_post")]
    likely = study.predict(llama.model, TEXTS[0]).top_probabilities
    return dict(study.trace(llama.model, TEXTS, [*names, "logits"])) | {"likely": likely}


def refused(llama: Llama) -> list[str]:
    """The error messages of what does not work with several processes."""
    model, row = llama.model, TEXTS[0]
    calls: list[Callable[[], Any]] = [
        lambda: study.trace(model, row, requires_grad=True),
        lambda: study.patch(model, {"embedding": lambda value: value}).__enter__(),
        lambda: study.steer(model, torch.ones(model.args.dim), layers=0).__enter__(),
        lambda: study.attribute(model, row, 3),
        lambda: study.saliency(model, row, 3),
    ]
    return [_message(call) for call in calls]


def _message(call: Callable[[], Any]) -> str:
    """The message of the error that the call raises; empty if there is none."""
    try:
        call()
    except LlamaRefError as error:
        return str(error)
    return ""


def _are_equal(values: dict[str, Tensor]) -> bool:
    """Whether all processes have the same values, bit for bit."""
    sums = [""] * dist.get_world_size()
    dist.all_gather_object(sums, digest(b"".join(values[name].contiguous().numpy().tobytes() for name in values)))
    return len(set(sums)) == 1


if __name__ == "__main__":
    main(*sys.argv[1:])
