"""A plan's memory is what a process uses; and the layouts that fit."""

import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bounds import fused_attention, peak_bytes
from folders import PARAMS, byte_tokenizer, tiny_folder
from llama_ref import plan
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.checkpoint.shapes import expected_shapes
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.compiled import caches
from llama_ref.decoding import loop, reading
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.parallel.sharding import WHOLE, Share, kv_heads, split_dim, wanted_ranges
from llama_ref.plan import Layout, Workload, find_model, layouts, longest, smaller_workload, smallest
from llama_ref.quantization import linear
from llama_ref.quantization.apply import quantize_model, quantized_bytes, use_fast_kernels
from llama_ref.tokenizer import Tokenizer
from llama_ref.vision import VisionTransformer
from make_random_checkpoint import make_random_checkpoint
from vision_folders import noise

SIZE = {torch.bfloat16: 2, torch.float32: 4}


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def vision(draw, n_layers: int) -> dict:
    """No parameters, or those that add vision to a model."""
    if not draw(st.booleans()):
        return {}
    return {
        "vision_chunk_size": 14 * draw(st.integers(1, 2)),
        "vision_max_num_chunks": draw(st.integers(1, 3)),
        "vision_num_cross_attention_layers": draw(st.integers(1, n_layers)),
        "vision_dim": 16 * draw(st.integers(1, 2)),
        "vision_n_layers": 2,
        "vision_n_global_layers": 1,
        "vision_kept_layers": draw(st.sampled_from([[], [1]])),
    }


@st.composite
def shapes(draw) -> dict:
    n_heads = draw(st.sampled_from([1, 2, 3, 6, 8, 12]))
    n_layers = draw(st.integers(1, 5))
    return {
        **draw(vision(n_layers)),
        "dim": n_heads * draw(st.sampled_from([2, 4])),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": draw(st.sampled_from(divisors(n_heads))),
        "vocab_size": draw(st.integers(12, 40)),
        "hidden_dim": draw(st.integers(12, 40)),
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
    }


@st.composite
def cases(draw) -> tuple[dict, Share]:
    """A shape and the share of one of its processes."""
    params = draw(shapes())
    tensor = draw(st.sampled_from(divisors(params["n_heads"])))
    stages = draw(st.integers(1, params["n_layers"]))
    return params, Share(draw(st.integers(0, tensor - 1)), tensor, draw(st.integers(0, stages - 1)), stages)


# ---- one process


@settings(max_examples=40)
@given(cases(), st.booleans(), st.integers(1, 3), st.integers(1, 9))
def test_weights_and_cache_are_those_of_the_loaded_model(tmp_path_factory, case, tied, batch_size, length):
    params, share = case
    args = ModelArgs.from_dict(params)
    folder = make_random_checkpoint(tmp_path_factory.mktemp("plan") / "model", params, tied=tied)
    model = load_model(open_folder(folder), args, share=share)
    # A matrix under two names counts once; what lives in other stages is a shape without memory.
    held = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
    shutil.rmtree(folder)
    assert plan.count_parameters(args, tied, share) == held
    cache = caches.new_cache(model, batch_size, length)
    workload = Workload(1, length, batch_size)
    block = caches.CUDA_CACHE_BLOCK if batch_size == 1 else caches.CACHE_BLOCK
    room = -(-length // block) * block
    held = (cache.keys.nbytes + cache.values.nbytes) * room // cache.max_seq_len
    held += batch_size * plan.image_bytes(args, share, 2)
    assert plan.kv_cache_bytes(args, share, workload, 2) == held


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    """Plan for a CPU's cache of one sequence, which has no coarser blocks than those of several."""
    monkeypatch.setattr(plan, "CUDA_CACHE_BLOCK", plan.CACHE_BLOCK)


SCHEMES = ["int8", "int4", "int4:group=32"]


@st.composite
def quantizable(draw) -> tuple[dict, Share]:
    """A case whose rows are divisible by some group sizes and not by others."""
    params, share = draw(cases())
    width = draw(st.sampled_from([32, 64] if params["n_heads"] == 1 else [16, 32]))
    hidden_dim = draw(st.sampled_from([64, 96, 128]))
    return params | {"dim": params["n_heads"] * width, "hidden_dim": hidden_dim}, share


@settings(max_examples=25)
@given(quantizable(), st.booleans(), st.sampled_from(SCHEMES), st.booleans(), st.sampled_from([*SIZE]))
def test_quantized_weights_are_those_of_the_loaded_model(tmp_path_factory, case, tied, scheme, is_quantized, dtype):
    params, share = case
    source = make_random_checkpoint(tmp_path_factory.mktemp("plan") / "model", params, tied=tied)
    options = {"quantize": scheme}
    try:
        if is_quantized:
            source, options = quantize_folder(source, source.with_name("quantized"), scheme, calibrate=False), {}
        folder = open_folder(source)
        model = load_model(folder, folder.read_args(), share=share, dtype=dtype, **options)
    except RequestError:
        held = None
    else:
        norms = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
        held = quantized_bytes(model) + norms
    planned = find_model(str(source), options.get("quantize"))
    shutil.rmtree(source.parent)
    if held is None:
        with pytest.raises(RequestError, match=r"divisible|split groups"):
            plan.weight_bytes(planned, share, SIZE[dtype])
    else:
        assert plan.weight_bytes(planned, share, SIZE[dtype]) == held


@given(cases())
def test_weights_are_the_ranges_that_a_share_wants(case):
    args, share = ModelArgs.from_dict(case[0]), replace(case[1], stage=0, n_stages=1)
    total = 0
    for name, shape in expected_shapes(args).items():
        dim = split_dim(name)
        ranges = wanted_ranges(name, args, share)
        wanted = None if dim is None else shape[dim] if ranges is None else sum(map(len, ranges))
        total += math.prod(wanted if axis == dim else size for axis, size in enumerate(shape))
    assert plan.count_parameters(args, False, share) == total
    assert plan.local_kv_heads(args, share) == len(kv_heads(args, share))


# The vision releases': of Meta's module at full size.
PUBLISHED_VISION = {"11B-Vision": 10_616_650_275, "11B-Vision-Instruct": 10_629_184_035, "90B-Vision": 88_552_318_523}
PUBLISHED = {"1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}


@pytest.mark.parametrize("name", ["Llama3.2-1B", "Llama3.2-3B", "Llama3.1-8B", "Llama3.1-70B", "Llama3.1-405B"])
def test_parameters_are_the_published_numbers(name):
    model = find_model(name)
    assert plan.count_parameters(model.args, model.tied, Share()) == PUBLISHED[name.split("-")[1]]


@pytest.mark.parametrize(("size", "expected"), PUBLISHED_VISION.items())
def test_parameters_of_vision_releases_are_those_of_metas_module(size, expected):
    assert plan.count_parameters(find_model(f"Llama3.2-{size}").args, False, Share()) == expected


def test_the_constants_are_those_of_the_loop():
    assert plan.PREFILL_TOKENS == reading.PREFILL_TOKENS
    assert plan.MASKLESS_PREFILL_TOKENS == reading.MASKLESS_PREFILL_TOKENS
    assert plan.LOGPROB_POSITIONS == loop.LOGPROB_POSITIONS
    assert (plan.CACHE_BLOCK, plan.CUDA_CACHE_BLOCK) == (caches.CACHE_BLOCK, caches.CUDA_CACHE_BLOCK)
    assert plan.BLOCK_WEIGHTS == linear.BLOCK_WEIGHTS


SHAPE = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 4096, "norm_eps": 1e-5, "rope_theta": 5e5}
LARGE_VOCABULARY = {"vocab_size": 60000, "dim": 64, "hidden_dim": 64}
ENDS = {"dim": 512, "n_layers": 1, "n_kv_heads": 1, "hidden_dim": 64}
VISION = {
    "vision_chunk_size": 224,
    "vision_num_cross_attention_layers": 1,
    "vision_dim": 64,
    "vision_n_layers": 3,
    "vision_n_global_layers": 1,
    "vision_kept_layers": [1, 2],
}
PIXELS = VISION | {"vision_chunk_size": 448, "vision_dim": 16, "vision_kept_layers": [], "dim": 64}
MANY_STATES = VISION | {"vision_n_layers": 20, "vision_kept_layers": list(range(20)), "dim": 64}
MANY_CROSS = VISION | {"n_layers": 8, "vision_num_cross_attention_layers": 8, "n_kv_heads": 8}
HOT = {"temperature": 5.0, "top_p": 0.999}  # nothing is left out of the sort
GENERATIONS = {  # differences from SHAPE, prompt lengths, max_seq_len, options
    "a long prompt": ({}, [2990], 2994, {}),
    "an odd length": ({}, [3006], 3011, {}),
    "a head of its own for each query head": ({"n_kv_heads": 8}, [2990], 2994, {}),
    "ragged prompts": ({}, [1490, 700, 300, 20], 1494, {}),
    "a prompt's end in every piece": (ENDS, [32 * i + 4 for i in range(1, 33)], 1032, {}),
    "a prompt of one piece": ({}, [500], 504, {}),
    "a wide feed-forward layer": ({"hidden_dim": 4096}, [1000], 1004, {}),
    "a large vocabulary": (LARGE_VOCABULARY, [5] * 16, 8, HOT),
    "penalties": (LARGE_VOCABULARY, [5] * 16, 8, {**HOT, "repetition_penalty": 1.3, "min_p": 1e-3, "logit_bias": {3: 1.0}}),
    "log-probabilities of the prompt": (LARGE_VOCABULARY, [500], 504, {"logprobs": True, "echo": True}),
    "an image and a long prompt": (VISION, [1000], 1004, {"images": [[noise(400, 400)]]}),
    "an image for many layers": (MANY_CROSS, [9], 13, {"images": [[noise(400, 400)]]}),
    "an image of more pixels than states": (PIXELS, [9], 13, {"images": [[noise(900, 900)]]}),
    "an image of many kept states": (MANY_STATES, [9], 13, {"images": [[noise(400, 400)]]}),
    "a large image and a short prompt": (VISION | {"vision_chunk_size": 448}, [9], 13, {"images": [[noise(900, 900)]]}),
}


@pytest.fixture(scope="module")
def tokenizer_of_bytes(tmp_path_factory) -> Tokenizer:
    return Tokenizer(byte_tokenizer(tmp_path_factory.mktemp("plan") / "tokenizer.model"))


@fused_attention
@pytest.mark.parametrize("dtype", SIZE, ids=str)
@pytest.mark.parametrize("case", GENERATIONS)
def test_generation_takes_no_more_than_planned_and_not_far_less(case, dtype, tokenizer_of_bytes, on_a_cpu):
    taken, planned = taken_and_planned(case, dtype, tokenizer_of_bytes)
    assert planned / 3 < taken <= planned


@fused_attention
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("case", ["a long prompt", "a wide feed-forward layer", "log-probabilities of the prompt"])
def test_so_it_does_with_quantized_weights(case, scheme, tokenizer_of_bytes, on_a_cpu):
    taken, planned = taken_and_planned(case, torch.bfloat16, tokenizer_of_bytes, scheme)
    assert planned / 3 < taken <= planned


def taken_and_planned(
    case: str, dtype: torch.dtype, tokenizer_of_bytes: Tokenizer, scheme: str | None = None
) -> tuple[int, int]:
    """Peak bytes of activations in generation."""
    changes, lengths, max_seq_len, options = GENERATIONS[case]
    args = ModelArgs.from_dict(SHAPE | {"hidden_dim": 704} | changes)
    torch.manual_seed(0)
    model = (VisionTransformer if args.has_vision else Transformer)(args).to(dtype).eval().requires_grad_(False)
    if scheme:
        quantize_model(model, scheme)
        use_fast_kernels(model)
    llama = Llama(model, tokenizer_of_bytes, max_seq_len=max_seq_len, max_batch_size=len(lengths))
    prompts = [torch.randint(args.vocab_size, (length,)).tolist() for length in lengths]
    if "images" in options:  # cut into tiles beforehand
        options = options | {"images": [[llama.load_tiles(image) for image in own] for own in options["images"]]}
    for prompt, images in zip(prompts, options.get("images", []), strict=False):
        prompt[1 : 1 + len(images)] = [args.vocab_size] * len(images)
    taken = peak_bytes(lambda: llama.generate(prompts, max_seq_len - max(lengths), **options))
    workload = Workload(1, max_seq_len, len(lengths))
    beside_the_cache = taken - plan.kv_cache_bytes(args, Share(), workload, SIZE[dtype])
    return beside_the_cache, plan.activation_bytes(args, Share(), workload, SIZE[dtype], is_quantized=scheme is not None)


# ---- a whole job


@pytest.mark.parametrize(
    ("name", "gpu_memory", "expected"),
    [
        ("Llama3.1-8B", 24, Layout(1)),
        ("Llama3.1-8B", 16, Layout(2)),
        ("Llama3.1-70B", 80, Layout(2)),
        ("Llama3.1-70B", 24, Layout(8)),
        ("Llama3.1-405B", 80, Layout(8)),  # in fp8
        ("Llama3.1-405B", 141, Layout(4)),
        ("Llama3.1-405B:bf16-mp8", 80, Layout(8, 2)),  # and not 16, on two nodes
        ("Llama3.1-405B:bf16-mp8", 141, Layout(8)),
        ("Llama3.2-3B", 8, Layout(2)),
        ("Llama3.1-405B", 4, None),
    ],
)
def test_the_smallest_layout(name, gpu_memory, expected):
    best = smallest(plan.plan(find_model(name), Workload(gpu_memory, 8192, 4)))
    assert (best and best.layout) == expected
    assert not best or best.dtype == "bfloat16"


def test_only_layouts_with_whole_groups_are_planned():
    model = find_model("Llama3.1-8B", "int4:group=256")
    assert {placement.layout.tensor for placement in plan.plan(model, Workload(80, 8192, 4))} == {1, 2, 4, 8, 16}
    narrow = replace(model, is_quantized=True)  # 14336 / 16 is not a multiple of 256
    assert {placement.layout.tensor for placement in plan.plan(narrow, Workload(80, 8192, 4))} == {1, 2, 4, 8}
    odd = replace(model, args=ModelArgs.from_dict({**SHAPE, "hidden_dim": 48}))
    with pytest.raises(RequestError, match="not divisible by a group of"):
        plan.plan(odd, Workload(80, 8192, 4))


def test_a_quantized_folder_is_planned_as_it_is(tmp_path):
    folder = str(quantize_folder(tiny_folder(tmp_path / "mine"), tmp_path / "small", "int4:group=32", calibrate=False))
    assert str(find_model(folder).scheme) == "int4:group=32"
    assert find_model(folder, "int4:group=32") == find_model(folder)
    with pytest.raises(RequestError, match="is already quantized to int4:group=32"):
        find_model(folder, "int8")


def test_three_processes_where_the_heads_divide_by_three():
    tensor = {layout.tensor for layout in layouts(find_model("Llama3.2-3B").args)}
    assert tensor == {1, 2, 3, 4, 6, 8, 12}


def test_stages_are_no_more_than_layers():
    args = ModelArgs.from_dict(PARAMS)
    assert {layout.stages for layout in layouts(args)} == {1, 2}


@pytest.mark.parametrize(
    ("layout", "nodes"),
    [
        (Layout(8), (1, 8)),
        (Layout(2, 4), (1, 8)),
        (Layout(8, 2), (2, 8)),
        (Layout(4, 8), (4, 8)),
        (Layout(16), (2, 8)),
        (Layout(12), (2, 6)),
        (Layout(6, 4), (4, 6)),  # 3 nodes of 8 would split stages
        (Layout(3, 4), (2, 6)),
        (Layout(11), (11, 1)),
    ],
)
def test_nodes_hold_whole_stages(layout, nodes):
    assert layout.nodes == nodes


def test_the_process_that_holds_most_decides():
    model = find_model("Llama3.1-8B")  # the first stage has the embedding, the last the output
    workload = Workload(24, 100, 1)
    (placed,) = [p for p in plan.plan(model, workload, ["bfloat16"]) if p.layout == Layout(1, 8)]
    held = [2 * plan.count_parameters(model.args, False, share) for share in Layout(1, 8).shares()]
    assert placed.need.weights == max(held) > min(held)
    assert sum(held) == 2 * PUBLISHED["8B"]


@pytest.mark.parametrize("name", ["Llama3.1-8B", "Llama3.2-1B"])
def test_longest_is_the_last_length_that_fits(name):
    model, workload = find_model(name), Workload(24, 512, 8)
    for placement in plan.plan(model, workload)[:4]:
        most = longest(model, workload, placement)
        lengths = {most: True, most + 1: False} if most < model.context else {most: True}
        for length, fits in lengths.items():
            placed = plan.plan(model, replace(workload, max_seq_len=length), [placement.dtype])
            assert [p.fits for p in placed if p.layout == placement.layout] == [fits]


def test_less_work_is_found_where_there_is_some_that_fits():
    model = find_model("Llama3.1-8B")
    workload = Workload(3, 131072, 32)
    assert smallest(plan.plan(model, workload)) is None
    smaller = smaller_workload(model, workload, ["bfloat16"])
    assert smallest(plan.plan(model, smaller))
    assert smaller.max_batch_size < 32 and smaller.gpu_memory == 3
    assert smaller_workload(model, Workload(1, 8192, 4), ["bfloat16"]) is None


@pytest.mark.parametrize(
    "wrong",
    [
        *({"gpu_memory": memory} for memory in (0, -1, True, "80GB", math.inf, math.nan, None, 10**400)),
        *({"max_seq_len": length} for length in (0, -5, 1.5, "8k", True, 10**400)),
        *({"max_batch_size": size} for size in (0, None, 2.0)),
    ],
    ids=lambda wrong: str(wrong)[:30],
)
def test_a_workload_of_no_sense_is_refused(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Workload(**({"gpu_memory": 80, "max_seq_len": 8192, "max_batch_size": 4} | wrong))


# ---- find the model


@pytest.mark.parametrize("name", [name for name, release in RELEASES.items() if release.weights == "bf16"])
def test_a_release_is_planned_without_any_file(name):
    release = RELEASES[name]
    model = find_model(name)
    assert model == find_model(release.folder)
    assert (model.name, model.tied, model.context) == (name, release.tied, release.max_seq_len)


@pytest.mark.parametrize(
    ("name", "quantization", "GB"),
    [
        ("Llama3.1-405B", "fp8", 487.1),
        ("Llama3.2-1B-Instruct-int4-qlora-eo8", "int4 (QLoRA, rank 16), groups of 32", 1.157),
        ("Llama3.2-3B-Instruct:int4-spinquant-eo8", "int4 (SpinQuant), groups of 32", 2.551),
        ("Llama-Guard-3-8B:int8", "int8", 9.085),
    ],
)
def test_a_quantized_release_is_planned_as_it_is_loaded(name, quantization, GB):
    model = find_model(name)
    assert model.quantization == quantization
    assert plan.weight_bytes(model, WHOLE, 2) / 1e9 == pytest.approx(GB, rel=1e-3)
    with pytest.raises(RequestError, match=rf"quantized already \({re.escape(quantization)}\): leave --quantize out"):
        find_model(name, "int4")


def test_the_pruned_guard_is_a_program():
    with pytest.raises(RequestError, match="is an ExecuTorch program, which PyTorch cannot read; Llama-Guard-3-1B is the"):
        find_model("Llama-Guard-3-1B:int4")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """An empty folder of releases."""
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_by_path(tmp_path, tied):
    model = find_model(str(tiny_folder(tmp_path / "mine", tied=tied)))
    assert (model.name, model.tied, model.context) == ("mine", tied, 8192)
    assert model.args == ModelArgs.from_dict(PARAMS)


def test_a_download_is_planned_as_its_own_files_say(root):
    release = RELEASES["Llama3.2-1B"]
    small = {"n_layers": 1, "dim": 64, "n_heads": 2, "n_kv_heads": 1}
    make_random_checkpoint(root / "Llama3.2-1B", release.params | small, tied=True)
    assert find_model("Llama3.2-1B").args.dim == 64
    full = find_model("Llama3.2-1B-Instruct")
    (root / "Llama3.2-1B" / "params.json").unlink()  # a broken one falls back to the release
    assert find_model("Llama3.2-1B") == replace(full, name="Llama3.2-1B", ckpt_dir="Llama3.2-1B")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nonsense", RequestError, "no checkpoint at nonsense, and unknown Llama 3 release 'nonsense'"),
        ("Llama3.1-8c", RequestError, r"did you mean Llama3\.1-8B"),
        ("./nonsense", CheckpointError, "no checkpoint at nonsense"),
        ("", CheckpointError, "is empty"),
    ],
)
def test_a_name_of_nothing(root, name, error, message):
    with pytest.raises(error, match=message):
        find_model(name)


def test_planning_a_release_imports_no_torch():
    code = (
        "import sys; from llama_ref.plan import *; from llama_ref.cli.views import plan as plan_view; "
        "plan(find_model('Llama3.1-405B'), Workload(80, 8192, 4)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
