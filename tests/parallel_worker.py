"""A process of tests/parallel/test_tensor.py: loads every folder, computes; rank 0 writes results.

torchrun --nproc_per_node W parallel_worker.py TASK.json OUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ref.checkpoint import reader
from llama_ref.generation import Llama
from llama_ref.parallel.job import end_process


def main(task_file: str, out: str) -> None:
    task = json.loads(Path(task_file).read_text())
    opened = _note_opened_shards()
    results = {}
    for name, folder in task["folders"].items():
        opened.clear()
        llama = Llama.build(folder, task["tokenizer"], max_seq_len=64, device="cpu", verify="never", **task["build"])
        results[name] = _logits(llama, torch.tensor(task["tokens"])) | {"opened": _of_all(sorted(opened))}
        if name not in task.get("without_text", []):
            results[name] |= _text(llama, task["tokens"], task["n_tokens"], task["n_sampled"])
        if task.get("images"):
            looked = llama.generate(task["prompts"], task["n_tokens"], 0.0, logprobs=True, echo=True, images=task["images"])
            results[name] |= {"looked": looked}
    if dist.get_rank() == 0:
        torch.save(results, out)
    end_process(0)


def _logits(llama: Llama, tokens: Tensor) -> dict:
    """Logits of one pass, and whether they are the same in all processes."""
    with torch.inference_mode():
        logits = llama.model(tokens)
    n_parameters = _of_all(sum(parameter.numel() for parameter in llama.model.parameters()))
    return {"logits": logits, "equal": _of_all(bool((_from_first(logits) == logits).all())), "n_parameters": n_parameters}


def _text(llama: Llama, tokens: list[list[int]], n_tokens: int, n_sampled: int) -> dict:
    """Greedy, sampled and streamed text, step by step."""
    ragged = [tokens[0], tokens[1][:3]]
    greedy, logprobs = llama.generate(ragged, n_tokens, temperature=0, logprobs=True, echo=True)
    options = {"temperature": 1.5, "top_p": 0.99, "seed": dist.get_rank()}  # the first one's seed must win
    sampled, _ = llama.generate(ragged, n_sampled, **options)
    streamed = llama.stream(tokens[0], n_sampled, temperature=0)
    list(streamed)
    return {"greedy": greedy, "logprobs": logprobs, "sampled": _of_all(sampled), "streamed": streamed.tokens}


def _from_first(tensor: Tensor) -> Tensor:
    theirs = tensor.clone()
    dist.broadcast(theirs, src=0)
    return theirs


def _of_all(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _note_opened_shards() -> list[str]:
    opened, read = [], reader.read_shard

    def noting(path: Path) -> dict[str, Tensor]:
        opened.append(path.name)
        return read(path)

    reader.read_shard = noting
    return opened


if __name__ == "__main__":
    main(*sys.argv[1:])
