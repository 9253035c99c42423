"""Meta's reference, one process per file, loads our shards and computes what one process does."""

from pathlib import Path

import pytest
import torch

from jobs import torchrun
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.generation import Llama
from llama_ref.vocabulary import write_tokenizer_model
from make_random_checkpoint import make_random_checkpoint
from parity.meta_worker import TOKENS
from vocabularies import vocabulary

WORKER = Path(__file__).with_name("meta_worker.py")
SHAPE = {"dim": 48, "n_layers": 2, "vocab_size": 624, "multiple_of": 48, "norm_eps": 1e-5, "rope_theta": 500000.0}
SHAPES = {
    "as many key heads as files": SHAPE | {"n_heads": 12, "n_kv_heads": 2, "use_scaled_rope": True},
    "each key head in both files": SHAPE | {"n_heads": 4, "n_kv_heads": 1},
    "no groups": SHAPE | {"n_heads": 6, "n_kv_heads": 6},
}
FP8_SHAPE = SHAPE | {"n_heads": 4, "n_kv_heads": 2, "n_layers": 4}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    write_tokenizer_model(root, vocabulary(pairs=[bytes([97 + i // 16, 97 + i % 16]) for i in range(112)]))
    options = {"dtype": torch.float32, "tokenizer": root / "tokenizer.model"}
    return [make_random_checkpoint(root / name, shape, tied=name == "no groups", **options) for name, shape in SHAPES.items()]


def metas(warm: Path, tmp_path: Path, folders: list[Path], world_size: int) -> list[torch.Tensor]:
    done = torchrun(world_size, WORKER, tmp_path / "out.pt", *folders, warm=warm)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt")


@pytest.mark.parametrize("world_size", [1, 2])
def test_metas_reference_loads_the_file_of_its_number(warm, sources, tmp_path, world_size):
    written = []
    for source in sources:
        written.append(to_meta(source, tmp_path / source.name, shards=world_size))
        other_format = to_hugging_face(source, tmp_path / f"{source.name} hf")
        written.append(to_meta(other_format, tmp_path / f"{source.name} back", shards=world_size))
    ours = [Llama.build(source, max_seq_len=16, device="cpu", dtype="float32").model for source in sources]
    fp8 = make_random_checkpoint(tmp_path / "fp8", FP8_SHAPE, shards=world_size, dtype=torch.float32, kind=Kind.FP8)
    *found, of_fp8 = metas(warm, tmp_path, [*written, fp8], world_size)
    expected = Llama.build(fp8, sources[0] / "tokenizer.model", max_seq_len=16, device="cpu", dtype="float32").model(TOKENS)
    # The parts are summed in another order, which may round an input to another float8.
    assert (of_fp8 - expected).std() < 0.005 * expected.std()
    for model, *theirs in zip(ours, found[::2], found[1::2], strict=True):
        with torch.inference_mode():
            expected = model(TOKENS)
        for logits in theirs:
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
