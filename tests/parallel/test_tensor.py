"""Any number of shards on any number of processes gives the same results as one process."""

import base64
import shutil
from pathlib import Path

import pytest
import torch

from jobs import run_worker, torchrun
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.parallel.job import join_job
from llama_ref.parallel.sharding import Share, kv_heads, places, split_dim, wanted_ranges
from make_random_checkpoint import make_random_checkpoint

NEAR_TIE = 0.25  # two steps of bfloat16, where logits are around 20
TOKENS = [[5, 9, 2, 7, 1, 3], [4, 4, 8, 0, 6, 2]]

SHAPE = {"dim": 48, "n_layers": 3, "vocab_size": 600, "multiple_of": 24, "norm_eps": 1e-5, "rope_theta": 500000.0}
SHAPES = {
    "groups of 4": SHAPE | {"n_heads": 8, "n_kv_heads": 2},  # 4 or more processes exceed the key heads
    "groups of 3": SHAPE | {"n_heads": 12, "n_kv_heads": 4, "use_scaled_rope": True, "head_dim": 12},
    "no groups": SHAPE | {"n_heads": 24, "n_kv_heads": 24},
}
# 256 bytes, 88 pairs and 256 special tokens make 600, which is divisible by 2, 3, 4 and 8.
RANKS = [bytes([byte]) for byte in range(256)] + [bytes([97 + i // 10, 97 + i % 10]) for i in range(88)]
# Text is generated only for the largest number of shards per shape; logits are compared for all.
FOLDERS = [("groups of 4", 1), ("groups of 4", 2), ("groups of 3", 1), ("groups of 3", 4), ("no groups", 3), ("no groups", 8)]


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(RANKS)))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer) -> dict[str, Path]:
    """Folders by "shape / shards".

    "groups of 3 / hf" is in Hugging Face's format, "groups of 3 / int8" in int8.
    """
    root = tmp_path_factory.mktemp("parallel")
    options = {"dtype": torch.float32, "tokenizer": small_tokenizer}
    made = {
        f"{shape} / {shards}": make_random_checkpoint(
            root / f"{shape} {shards}", SHAPES[shape], shards=shards, tied=shape == "groups of 4", **options
        )
        for shape, shards in FOLDERS
    }
    converted = to_hugging_face(made["groups of 3 / 4"], root / "hf", max_shard_bytes=100_000)
    rounded = quantize_folder(made["groups of 3 / 1"], root / "int8", "int8")
    return made | {"groups of 3 / hf": converted, "groups of 3 / int8": rounded}


@pytest.fixture(scope="module")
def alone(folders, small_tokenizer) -> dict[str, Llama]:
    options = {"max_seq_len": 64, "device": "cpu", "dtype": "float32", "verify": "never"}
    return {name: Llama.build(folder, small_tokenizer, **options) for name, folder in folders.items()}


def divides(world_size: int, name: str) -> bool:
    return SHAPES[name.split(" / ")[0]]["n_heads"] % world_size == 0


# (parts of each matrix, stages)
JOBS = {"2 processes": (2, 1), "3 processes": (3, 1), "8 processes": (8, 1)}
PIPELINES = {"2 stages": (1, 2), "2 parts in 2 stages": (2, 2)}


@pytest.fixture(scope="module", params=(JOBS | PIPELINES).values(), ids=(JOBS | PIPELINES).keys())
def together(request, warm, folders, small_tokenizer, tmp_path_factory) -> tuple[int, int, dict]:
    """(parts of each matrix, stages, results of the processes by folder)."""
    place = tmp_path_factory.mktemp("job")
    n_parts, n_stages = request.param
    task = {
        "folders": {name: str(folder) for name, folder in folders.items() if divides(n_parts, name)},
        "tokenizer": str(small_tokenizer),
        "build": {"dtype": "float32", "pipeline_parallel_size": n_stages},
        "tokens": TOKENS,
        "n_tokens": 4,
        "n_sampled": 3,
        "without_text": ["groups of 4 / 1", "groups of 3 / 1", "groups of 3 / hf", "no groups / 3"],
    }
    return n_parts, n_stages, run_worker(warm, place, n_parts * n_stages, task)


def test_logits_are_those_of_one_process_and_the_same_on_all(together, alone):
    results = together[-1]
    assert results
    for name, result in results.items():
        expected = alone[name].model(torch.tensor(TOKENS))
        torch.testing.assert_close(result["logits"], expected, atol=1e-4, rtol=0, msg=name)
        assert all(result["equal"]), name


def with_text(results: dict[str, dict]) -> dict[str, dict]:
    return {name: result for name, result in results.items() if "greedy" in result}


def test_text_logprobs_and_streams_are_those_of_one_process(together, alone):
    assert with_text(together[-1])
    for name, result in with_text(together[-1]).items():
        ragged = [TOKENS[0], TOKENS[1][:3]]
        greedy, logprobs = alone[name].generate(ragged, 4, temperature=0, logprobs=True, echo=True)
        assert result["greedy"] == greedy, name
        for ours, theirs in zip(result["logprobs"], logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), name
        assert result["streamed"] == greedy[0][len(TOKENS[0]) :][:3], name


def test_all_processes_sample_the_same_even_with_different_seeds(together, alone):
    for name, result in with_text(together[-1]).items():
        expected, _ = alone[name].generate([TOKENS[0], TOKENS[1][:3]], 3, temperature=1.5, top_p=0.99, seed=0)
        assert all(sampled == result["sampled"][0] for sampled in result["sampled"])
        assert [len(row) for row in result["sampled"][0]] == [len(row) for row in expected]


@torch.inference_mode()
def test_in_bfloat16_three_processes_choose_as_one_does_up_to_near_ties(warm, demo_folder, tmp_path):
    """Rounded partial sums change tokens only at near-ties, with real weights."""
    task = {
        "folders": {"demo": str(demo_folder)},
        "tokenizer": None,
        "build": {"dtype": "bfloat16"},
        "tokens": [[17000, 504, 3575, 282, 4649, 314], [504, 3575, 282, 4649, 314, 260]],
        "n_tokens": 12,
        "n_sampled": 1,
    }
    result = run_worker(warm, tmp_path, 3, task)["demo"]
    one = Llama.build(demo_folder, max_seq_len=64, device="cpu", dtype="bfloat16", verify="never")
    agreed = []
    for tokens, prompt in zip(result["greedy"], (task["tokens"][0], task["tokens"][1][:3]), strict=True):
        logits = one.model(torch.tensor([tokens]))[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(logits)), torch.tensor(tokens[len(prompt) :])]
        assert behind.max() <= NEAR_TIE
        agreed += (behind == 0).tolist()
    assert len(agreed) > 20 and sum(agreed) >= 0.9 * len(agreed)


def test_each_process_holds_its_part_and_opens_no_shard_without_something_of_its(together):
    world_size, n_stages, results = together
    for name, result in results.items():
        shape, shards = name.split(" / ")
        whole = ModelArgs.from_dict(SHAPES[shape])
        assert len(set(result["n_parameters"])) <= 2 * n_stages  # may differ by one if the vocabulary is not divisible
        if shards.isdigit():  # in other formats files hold whole tensors, and every process reads from all files
            n_needed = -(-int(shards) // world_size) + (int(shards) % world_size > 0)
            for rank, opened in enumerate(result["opened"]):
                assert 1 <= len(opened) <= max(n_needed, 1), (name, rank, opened)
        limit = 1.2 * _n_parameters(whole, tied=shape == "groups of 4") / world_size + 40_000
        assert max(result["n_parameters"]) < limit if n_stages == 1 else sum(result["n_parameters"]) < limit * n_stages


def _n_parameters(args: ModelArgs, tied: bool) -> int:
    layer = args.dim * (args.n_heads * 2 + args.n_kv_heads * 2) * args.head_dim + 3 * args.dim * args.ffn_dim + 2 * args.dim
    return args.n_layers * layer + args.dim + args.vocab_size * args.dim * (1 if tied else 2)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_every_query_head_looks_through_its_own_key_head(n_kv_heads, world_size):
    args = ModelArgs.from_dict(SHAPE | {"n_heads": 12, "n_kv_heads": n_kv_heads})
    of_query_head = []
    for rank in range(world_size):
        mine = kv_heads(args, Share(rank, world_size))
        of_query_head += [head for head in mine for _ in range(12 // world_size // len(mine))]
    assert of_query_head == [head * n_kv_heads // 12 for head in range(12)]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", ["wq", "wk", "wo", "w1", "w2", "output"])
def test_the_shares_of_a_tensor_are_all_of_it_once_and_in_order(name, shards):
    args = ModelArgs.from_dict(SHAPES["groups of 3"] | {"vocab_size": 1200})
    sizes = {"wq": 144, "wo": 144, "wk": 48, "w1": args.ffn_dim, "w2": args.ffn_dim, "output": 1200}
    found = []
    for rank in range(4):
        ranges = wanted_ranges(f"layers.0.{name}.weight", args, Share(rank, 4))
        for shard, within in places(ranges, sizes[name] // shards) if sizes[name] % shards == 0 else ():
            found += [shard * (sizes[name] // shards) + i for i in within]
    assert found == (list(range(sizes[name])) if sizes[name] % shards == 0 else [])


@pytest.mark.parametrize(("shards", "world_size"), [(16, 8), (4, 16), (16, 16), (8, 1), (1, 16)])
def test_many_shards_on_many_processes_hold_all_of_the_model_between_them(shards, world_size, tmp_path):
    params = SHAPE | {"n_heads": 16, "n_kv_heads": max(4, shards), "dim": 64, "vocab_size": 640, "multiple_of": 64}
    folder = open_folder(make_random_checkpoint(tmp_path / "model", params, shards=shards, dtype=torch.float32))
    args = folder.read_args()
    whole = load_model(folder, args, dtype=torch.float32)
    parts = [load_model(folder, args, dtype=torch.float32, share=Share(rank, world_size)) for rank in range(world_size)]
    for name, expected in whole.named_parameters():
        dim = split_dim(name)
        found = [part.get_parameter(name) for part in parts]
        if name.split(".")[-2] in ("wk", "wv"):  # heads shared by processes are on each of them
            heads = [head for rank in range(world_size) for head in kv_heads(args, Share(rank, world_size))]
            expected = torch.cat([expected.unflatten(0, (-1, args.head_dim))[head] for head in heads])
        assert torch.equal(found[0] if dim is None else torch.cat(found, dim), expected), name


def test_a_share_of_one_shard_is_mapped_not_copied(folders):
    folder = open_folder(folders["groups of 3 / 1"])
    args = ModelArgs.from_json(folder.params)
    model = load_model(folder, args, dtype=torch.float32, share=Share(1, 4))
    shard_size = folder.shards[0].stat().st_size
    mapped = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder.shards[0]) in line}
    spans = [tuple(int(end, 16) for end in span.split("-")) for span in mapped]
    assert any(start <= model.output.weight.data_ptr() < stop and stop - start >= shard_size for start, stop in spans)


def test_a_number_of_processes_that_does_not_divide_the_heads_is_refused_with_those_that_do(warm, folders, small_tokenizer):
    script = Path(__file__).parents[2] / "scripts" / "text_completion.py"
    done = torchrun(5, script, "--ckpt_dir", folders["groups of 4 / 1"], "--tokenizer_path", small_tokenizer, warm=warm)
    assert done.returncode != 0
    assert "5 processes cannot hold equal parts of 8 query heads; start one of 1, 2, 4, 8 processes" in done.stderr
    assert done.stderr.count("cannot hold equal parts") == 1


def test_only_the_first_process_prints_and_warns(warm, folders, small_tokenizer, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "text_completion.py"
    folder = shutil.copytree(folders["groups of 4 / 2"], tmp_path / "unlisted")
    (folder / "checklist.chk").unlink()
    done = torchrun(2, script, "--ckpt_dir", folder, "--tokenizer_path", small_tokenizer, "--max_gen_len", "4", warm=warm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("I believe the meaning of life is") == 1
    assert done.stderr.count("has no checklist.chk") == 1


def test_meta_s_scripts_may_say_how_many_processes_they_are():
    join_job(1, 1, torch.device("cpu"))
    with pytest.raises(RequestError, match="model_parallel_size is 8, but there is 1 process"):
        join_job(8, 1, torch.device("cpu"))
