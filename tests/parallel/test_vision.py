"""Vision folders of 1, 2 and 8 shards compute the same on two processes as on one."""

import pytest
import torch

from jobs import run_worker
from llama_ref.generation import Llama
from vision_folders import IMAGE_ID, noise, vision_folder

TOKENS = [[5, 9, 2, 7, 1, 3], [4, 4, 8, 0, 6, 2]]
PROMPTS = [[256, IMAGE_ID, 70, IMAGE_ID, 71], [256, 70, 71, 72], [256, 5, IMAGE_ID]]
N_NEW = 4


@pytest.mark.parametrize("n_stages", [1, 2])
def test_two_processes_compute_what_one_does(warm, tmp_path, n_stages):
    files = [str(tmp_path / f"{n}.png") for n in range(3)]
    for file, size in zip(files, [(100, 40), (50, 50), (60, 200)], strict=True):
        noise(*size).save(file)
    images = [files[:2], [], files[2:]]
    folders = {n: vision_folder(tmp_path / f"of {n}", shards=n, dtype=torch.float32) for n in (1, 2, 8)}
    task = {
        "folders": {str(n): str(folder) for n, folder in folders.items()},
        "tokenizer": None,
        "build": {"dtype": "float32", "pipeline_parallel_size": n_stages},
        "tokens": TOKENS,
        "n_tokens": N_NEW,
        "n_sampled": 1,
        "prompts": PROMPTS,
        "images": images,
    }
    alone = Llama.build(folders[1], max_seq_len=64, device="cpu", dtype="float32")
    tokens, scores = alone.generate(PROMPTS, N_NEW, 0.0, logprobs=True, echo=True, images=images)
    logits = alone.model(torch.tensor(TOKENS))
    for name, result in run_worker(warm, tmp_path, 2, task).items():
        found, found_scores = result["looked"]
        assert found == tokens, name
        for ours, theirs in zip(found_scores, scores, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), name
        assert (result["logits"] - logits).abs().max() < 1e-4
        assert all(result["equal"]), name
