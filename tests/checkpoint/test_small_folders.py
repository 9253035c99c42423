"""A small folder that claims a large model is refused in little time and memory."""

import json
import subprocess
import sys

import pytest

from folders import tiny_folder
from llama_ref.checkpoint.writing.convert import to_hugging_face

BUILD = """
import resource, sys, time
from llama_ref.errors import CheckpointError
from llama_ref.generation import Llama

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
before, begun = peak(), time.process_time()
for folder in sys.argv[1:]:
    try:
        Llama.build(folder, device="cpu", verify="never")
    except CheckpointError as error:
        print(len(str(error)), round(time.process_time() - begun, 1), peak() - before)
        begun = time.process_time()
"""
CLAIMS = [{"n_layers": 10_000}, {"vocab_size": 2_000_000}, {"vocab_size": 1 << 24}, {"hidden": 1 << 24}]
HF_NAMES = {"n_layers": "num_hidden_layers", "hidden": "intermediate_size"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory use as Linux counts it")
def test_claims_are_compared_with_the_headers_before_anything_is_built(warm, tmp_path):
    meta = tiny_folder(tmp_path / "meta")
    hf = to_hugging_face(meta, tmp_path / "hf")
    folders = []
    for n, claim in enumerate(CLAIMS):
        for source, params in ((meta, "params.json"), (hf, "config.json")):
            [(key, value)] = claim.items()
            name = HF_NAMES.get(key, key) if source is hf else {"hidden": "hidden_dim"}.get(key, key)
            folders.append(tmp_path / f"{source.name}{n}")
            folders[-1].mkdir()
            for path in source.iterdir():
                (folders[-1] / path.name).symlink_to(path)
            (folders[-1] / params).unlink()
            (folders[-1] / params).write_text(json.dumps(json.loads((source / params).read_text()) | {name: value}))
    ran = subprocess.run([warm / "python", "-c", BUILD, *folders], capture_output=True, text=True, check=True)
    figures = [list(map(float, line.split())) for line in ran.stdout.splitlines()]
    assert len(figures) == len(folders), "each of them was refused"
    for length, seconds, megabytes in figures:
        assert length < 3000 and seconds < 5 and megabytes < 500, figures
