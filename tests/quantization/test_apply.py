"""Int8 and int4 weights: storing, computing, loading, saving, and memory use."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench_quality import log_probabilities, quality, texts
from fake_cuda import fake_cuda
from folders import PARAMS, tiny_folder
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.checkpoint.loading.first_load import verified
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.parallel.sharding import Share
from llama_ref.quantization import torch_int4
from llama_ref.quantization.apply import is_quantized, quantize_model, use_fast_kernels
from llama_ref.quantization.linear import Int4Linear, Int8Embedding, Int8Linear, QuantizedMatrix
from llama_ref.quantization.rounding import pack, unpack
from llama_ref.quantization.scheme import Scheme
from llama_ref.quantization.torch_int4 import TiledInt4Linear, faster
from make_random_checkpoint import make_random_checkpoint

SCHEMES = ["int8", "int4", "int4:group=32"]
ROWS = [(1,), (2, 3), (2, 100)]  # one token, a few, a prefill
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc reports how much memory is held")


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options) -> Transformer:
    opened = open_folder(folder)
    return load_model(opened, opened.read_args(), dtype=dtype, **options)


def numbers(model: Transformer) -> dict[str, Tensor]:
    return dict(model.named_buffers()) | dict(model.named_parameters())


def assert_same(model: Transformer, other: Transformer) -> None:
    ours, theirs = numbers(model), numbers(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """A matrix with more rows than a kernel's tile, and not a multiple of it."""
    return torch.randn(200, 256, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("plain") / "tiny")


# ---- schemes


@pytest.mark.parametrize(
    ("text", "scheme"),
    [("int8", Scheme(8)), ("int4", Scheme(4, 128)), ("int4:group=128", Scheme(4, 128)), ("int4:group=32", Scheme(4, 32))],
)
def test_schemes_are_read_and_written(text, scheme):
    assert Scheme.parse(text) == scheme
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.from_params(json.loads(json.dumps(scheme.to_params()))) == scheme


@pytest.mark.parametrize(
    "text", ["int2", "INT4", "int8:group=32", "int4:group=48", "int4:group=", "int4:group=99999999999", "", 4, None]
)
def test_unknown_schemes_are_refused_with_the_possible_ones(text):
    with pytest.raises(RequestError, match=r"int8, int4 or int4:group=N, with N one of 32, 64, 128, 256"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    "section",
    [
        None,
        [],
        "int4",
        {},
        {"scheme": ["int4"]},
        {"scheme": "int8", "group": 32},
        {"scheme": "int4"},
        {"scheme": "int4", "group": True},
    ],
)
def test_unknown_quantization_sections_are_refused(section):
    with pytest.raises(CheckpointError, match='"quantization" is'):
        Scheme.from_params(section)


def test_groups_shrink_until_they_divide_the_rows():
    assert Scheme.parse("int4").group_for("w", 576) == 64  # SmolLM2's dim
    with pytest.raises(RequestError, match=r"layers\.0\.attention\.wo\.weight has rows of 48, not divisible by a group"):
        Scheme.parse("int4").group_for("layers.0.attention.wo.weight", 48)


def test_norms_stay_and_the_vocabularys_matrices_have_eight_bits():
    scheme = Scheme.parse("int4")
    names = ["layers.0.attention_norm", "norm", "layers.0.attention.wq", "layers.9.feed_forward.w2", "tok_embeddings", "output"]
    assert [scheme.bits_of(f"{name}.weight") for name in names] == [None, None, 4, 4, 8, 8]


# ---- rounding


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([32, 64]), st.randoms(use_true_random=False))
def test_packing_loses_nothing(rows, n_groups, group, random):
    q = torch.tensor([random.randrange(16) for _ in range(rows * n_groups * group)], dtype=torch.uint8).view(
        rows, n_groups, group
    )
    packed = pack(q)
    assert packed.shape == (rows, n_groups * group // 2)
    assert torch.equal(unpack(packed, n_groups), q)


def test_sixteen_values_per_group_are_kept_exactly():
    steps = torch.randint(0, 16, (64, 8, 32), generator=torch.Generator().manual_seed(1))
    steps[..., :2] = torch.tensor([0, 15])
    weight = ((steps - 8) * 0.25 + 0.5).flatten(1)
    assert torch.equal(Int4Linear.from_weight(weight, 32).dequantize(), weight)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_scales_leave_less_error_than_stretching_steps_over_the_span(weight, group):
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    stretched = ((groups - low) / step).round() * step + low
    ours = relative_error(Int4Linear.from_weight(weight, group).dequantize(), weight)
    assert ours < 0.95 * relative_error(stretched.flatten(1), weight)
    assert relative_error(Int8Linear.from_weight(weight).dequantize(), weight) < 0.008


@pytest.mark.parametrize(
    "rows", [torch.zeros(3, 64), torch.full((3, 64), 0.3), torch.full((3, 64), -1e-38), torch.eye(64) * 1e4]
)
def test_strange_rows_come_back_nearly_as_they_were(rows):
    for module in (
        Int8Linear.from_weight(rows),
        Int4Linear.from_weight(rows, 32),
        faster(Int4Linear.from_weight(rows, 32), torch.bfloat16),
    ):
        assert (module.dequantize() - rows).abs().max() <= 0.005 * rows.abs().max() + 1e-29


def test_a_row_is_rounded_alike_alone_and_among_others(weight):
    many = weight.repeat(30, 4)  # more than one block
    whole, alone = Int4Linear.from_weight(many, 128), Int4Linear.from_weight(many[-7:], 128)
    assert torch.equal(whole.unpacked()[-7:], alone.unpacked())
    assert torch.equal(whole.scale[-7:], alone.scale)


# ---- modules


def modules_of(weight: Tensor, dtype: torch.dtype) -> list[QuantizedMatrix]:
    int4 = [Int4Linear.from_weight(weight, group) for group in (32, 64, 128, 256)]
    return [Int8Linear.from_weight(weight), *int4, *(faster(module, dtype) for module in int4)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_layers_multiply_by_what_they_dequantize_to(weight, rows):
    x = torch.randn(*rows, 256, generator=torch.Generator().manual_seed(2))
    for module in modules_of(weight, torch.float32):
        torch.testing.assert_close(module(x), x @ module.dequantize().T, rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        for module in modules_of(weight, dtype):
            out = module(x.to(dtype))
            assert out.dtype == dtype
            assert relative_error(out.float(), x.to(dtype).float() @ module.dequantize().T) < 0.005


def test_kernels_hold_the_same_numbers(weight):
    plain = Int4Linear.from_weight(weight, 64)
    tiled = faster(plain, torch.bfloat16)
    assert isinstance(tiled, TiledInt4Linear)
    assert torch.equal(tiled.unpacked(), plain.unpacked())
    assert torch.equal(tiled.unpacked(slice(70, 131)), plain.unpacked()[70:131])
    assert torch.equal(tiled.dequantize(), plain.dequantize())
    assert torch.equal(tiled.scale, plain.scale)
    assert torch.equal(tiled.zero, plain.zero)
    assert tiled.quantized_bytes < plain.quantized_bytes * 1.3  # 200 rows are padded to 256


def test_without_the_cpu_kernel_the_plain_layer_stays(weight, monkeypatch):
    monkeypatch.setattr(torch_int4, "_tile", lambda: None)
    plain = Int4Linear.from_weight(weight, 64)
    assert faster(plain, torch.bfloat16) is plain
    assert faster(plain, torch.float16) is plain


def test_an_embedding_looks_up_its_rows(weight):
    matrix = Int8Linear.from_weight(weight)
    tokens = torch.tensor([[0, 199], [7, 7]])
    for dtype in (torch.bfloat16, torch.float32):
        out = Int8Embedding(matrix.q, matrix.scale, dtype)(tokens)
        assert torch.equal(out, matrix.dequantize()[tokens].to(dtype))


# ---- models


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_computes_what_its_dequantized_matrices_would(folder, scheme):
    model, plain = load(folder, torch.float32, quantize=scheme), load(folder, torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedMatrix):
            plain.get_submodule(name).weight.data = module.dequantize()
    tokens = torch.arange(80)[None]
    cache = KVCache(model.args, 1, 81, dtype=torch.float32)
    use_fast_kernels(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-4)
        model(tokens[:, :-1], cache)
        torch.testing.assert_close(model(tokens[:, -1:], cache), plain(tokens)[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", [{}, {"shards": 2}, {"tied": True}], ids=str)
def test_all_ways_lead_to_the_same_numbers(tmp_path, scheme, options):
    """Quantize while loading, in memory and through a folder, in both checkpoint formats."""
    source = tiny_folder(tmp_path / "tiny", **options)
    model = load(source, quantize=scheme)
    assert is_quantized(model)
    afterwards = load(source)
    assert not is_quantized(afterwards)
    quantize_model(afterwards, scheme)
    assert_same(model, afterwards)
    assert_same(model, load(quantize_folder(source, tmp_path / "quantized", scheme, calibrate=False)))
    assert_same(
        model, load(quantize_folder(to_hugging_face(source, tmp_path / "hf"), tmp_path / "from_hf", scheme, calibrate=False))
    )
    assert model.output.q is model.tok_embeddings.q if options.get("tied") else model.output.shape == (512, 32)


def test_the_files_own_numbers_are_quantized_whatever_the_models_dtype(tmp_path):
    source = make_random_checkpoint(tmp_path / "float32", PARAMS, dtype=torch.float32)
    exact = load(source, torch.float32, quantize="int4")
    rounded = load(source, torch.bfloat16, quantize="int4")
    wq = "layers.0.attention.wq.packed"
    assert torch.equal(numbers(exact)[wq], numbers(rounded)[wq])
    assert rounded.norm.weight.dtype == rounded.tok_embeddings.dtype == torch.bfloat16


def test_a_matrix_without_groups_is_refused_by_name_before_anything_is_done(tmp_path):
    source = make_random_checkpoint(tmp_path / "odd", PARAMS | {"dim": 48, "n_heads": 4})
    with pytest.raises(RequestError, match=r"layers\.0\.attention\.wq\.weight has rows of 48, not divisible by a group"):
        load(source, quantize="int4")
    with pytest.raises(RequestError, match="has rows of 48"):
        quantize_folder(source, tmp_path / "out", "int4", calibrate=False)
    assert not (tmp_path / "out").exists()
    model = load(source)
    with pytest.raises(RequestError, match="has rows of 48"):
        quantize_model(model, "int4")
    assert not is_quantized(model)


@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_of_several_processes_add_up_to_the_whole(tmp_path, scheme, from_folder):
    params = PARAMS | {"dim": 128, "multiple_of": 128}
    source = make_random_checkpoint(tmp_path / "wide", params)
    scheme = "int4:group=64" if scheme == "int4" and from_folder else scheme  # half a row of 128 cannot be a group of 128
    options = {} if from_folder else {"quantize": scheme}
    read = quantize_folder(source, tmp_path / "quantized", scheme, calibrate=False) if from_folder else source
    whole = load(read, torch.float32, **options)
    parts = [load(read, torch.float32, share=Share(rank, 2), **options) for rank in range(2)]
    for name, dim in [("tok_embeddings", 0), ("output", 0), ("layers.1.attention.wk", 0), ("layers.1.attention.wo", 1)]:
        joined = torch.cat([part.get_submodule(name).dequantize() for part in parts], dim)
        expected = whole.get_submodule(name).dequantize()
        assert torch.equal(joined, expected) if from_folder or dim == 0 else relative_error(joined, expected) < 0.12


def test_stages_of_a_quantized_model_hold_their_own_layers(tmp_path):
    source = tiny_folder(tmp_path / "tiny", tied=True)
    read = quantize_folder(source, tmp_path / "quantized", "int8")
    for last in (load(source, share=Share(0, 1, 1, 2), quantize="int8"), load(read, share=Share(0, 1, 1, 2))):
        assert torch.equal(last.output.q, load(read).output.q)
        assert torch.equal(last.layers[0].attention.wq.q, load(read).layers[1].attention.wq.q)
        assert last.tok_embeddings.weight.is_meta


# ---- folders


@pytest.fixture
def quantized(folder, tmp_path) -> Path:
    return quantize_folder(folder, tmp_path / "quantized", "int4:group=32")


def test_a_quantized_folder_is_whole(folder, quantized):
    assert sorted(path.name for path in quantized.iterdir()) == [
        "checklist.chk",
        "model.safetensors",
        "params.json",
        "tokenizer.model",
    ]
    params = json.loads((quantized / "params.json").read_bytes())
    assert params == PARAMS | {"quantization": {"scheme": "int4", "group": 32}}
    opened = open_folder(quantized)
    assert opened.is_quantized
    assert not opened.is_hugging_face
    assert opened.open_tokenizer(opened.read_args()).n_words == 512
    with verified(opened, "always"):
        pass
    assert load(quantized, quantize="int4:group=32").layers[0].feed_forward.w1.group == 32


def test_four_bits_are_calibrated_on_a_text_unless_told_otherwise(folder, tmp_path, quantized):
    plain = load(quantize_folder(folder, tmp_path / "plain", "int4:group=32", calibrate=False))
    other = load(quantize_folder(folder, tmp_path / "other", "int4:group=32", calibrate="Quite another text."))
    name = "layers.1.feed_forward.w2.scale"
    assert len({tuple(numbers(model)[name].flatten().tolist()) for model in (load(quantized), plain, other)}) == 3


def test_calibrated_folders_are_the_same_from_all_kinds_of_files(folder, tmp_path, quantized):
    """Also if Meta's files contain each key/value head several times."""
    expected = load(quantized)
    hugging_face = to_hugging_face(folder, tmp_path / "hf")
    assert_same(expected, load(quantize_folder(hugging_face, tmp_path / "from_hf", "int4:group=32")))
    grouped = make_random_checkpoint(tmp_path / "grouped", PARAMS | {"n_kv_heads": 2}, tokenizer=folder / "tokenizer.model")
    many = to_meta(grouped, tmp_path / "many", shards=4)
    assert json.loads((many / "params.json").read_bytes())["n_kv_heads"] == 4
    model, other = (load(quantize_folder(each, tmp_path / f"{each.name}4", "int4:group=32")) for each in (grouped, many))
    assert_same(model, other)


def test_the_bar_of_a_calibrated_folder_goes_from_nothing_to_all(folder, tmp_path):
    seen = []
    quantize_folder(folder, tmp_path / "out", "int4:group=32", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert seen[0][0] < seen[0][1] / 10


def test_a_broken_off_calibration_leaves_nothing(folder, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "out" / "here", "int4:group=32", progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_calibration_needs_a_tokenizer(tmp_path):
    source = make_random_checkpoint(tmp_path / "bare", PARAMS)
    with pytest.raises(RequestError, match="has no tokenizer, which calibration needs"):
        quantize_folder(source, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()
    assert load(quantize_folder(source, tmp_path / "out", "int8")).output.shape == (512, 32)


def test_a_cpu_model_lies_in_the_files_pages(quantized):
    model = load(quantized)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for buffer in model.buffers():
        assert any(start <= buffer.data_ptr() < stop for start, stop in spans)


def test_what_is_quantized_is_not_quantized_again(quantized, tmp_path):
    with pytest.raises(RequestError, match="is already quantized to int4:group=32; leave quantize out"):
        load(quantized, quantize="int8")
    with pytest.raises(RequestError, match="is already quantized"):
        quantize_folder(quantized, tmp_path / "again", "int8")


def test_a_share_that_cuts_groups_is_refused(tmp_path):
    read = quantize_folder(
        make_random_checkpoint(tmp_path / "wide", PARAMS | {"dim": 128}), tmp_path / "quantized", "int4", calibrate=False
    )
    with pytest.raises(
        RequestError, match=r"layers\.0\.attention\.wo\.weight of .* has groups of 128 weights, which this number"
    ):
        load(read, share=Share(0, 2))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"scheme": "int4", "group": 7}, 'params.json: "quantization" is'),
        (None, "lacks config.json"),
        ({"scheme": "int8"}, r"layers.0.attention.wq.q is missing, expected shape \(32, 32\)"),
        ({"scheme": "int4", "group": 128}, None),  # groups that are halved to 32 anyway
    ],
)
def test_params_that_say_another_scheme_are_refused(quantized, section, message):
    params = json.loads((quantized / "params.json").read_bytes()) | {"quantization": section}
    (quantized / "params.json").write_text(json.dumps(params))
    if message is None:
        load(quantized)
        return
    with pytest.raises(CheckpointError, match=message):
        load(quantized)


def test_damaged_and_cut_short_files_are_refused(quantized):
    path = quantized / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"layers.1.attention.wq.zero", b"layers.1.attention.wq.zera"))
    with pytest.raises(CheckpointError, match=r"wq\.zero is missing, expected shape \(32, 1\)\n.*wq\.zera is unexpected"):
        load(quantized)
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(quantized)


# ---- memory

LARGE = PARAMS | {"dim": 1024, "n_layers": 4, "n_heads": 16, "n_kv_heads": 4, "vocab_size": 16384, "multiple_of": 256}
MEASURE = textwrap.dedent("""
    import os, sys, threading, time
    from pathlib import Path
    import torch
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.checkpoint.loading.loader import load_model
    from llama_ref.quantization.apply import quantize_model, quantized_bytes, use_fast_kernels

    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def load(path, scheme):
        folder = open_folder(path)
        model = load_model(folder, folder.read_args(), quantize=scheme)
        use_fast_kernels(model)
        return model

    def watch():
        global peak
        while True:
            peak = max(peak, anonymous())
            time.sleep(0.002)

    tiny, large, *schemes = sys.argv[1:]
    for scheme in schemes:
        if os.fork():
            os.wait()
            continue
        load(tiny, scheme)  # warm up the libraries, whose first use takes memory
        before = peak = anonymous()
        threading.Thread(target=watch, daemon=True).start()
        model = load(large, scheme)
        time.sleep(0.01)
        unquantized = sum(p.nbytes for p in model.parameters())
        print(peak - before, quantized_bytes(model) + unquantized, flush=True)
        os._exit(0)
""")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("memory") / "large", LARGE)


@on_linux
def test_quantizing_while_loading_takes_little_memory_beyond_the_quantized_weights(tmp_path, large):
    tiny = tiny_folder(tmp_path / "tiny")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, tiny, large, "int8", "int4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], env=environment)
    assert done.returncode == 0, done.stderr
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(measured) == 2, done.stderr
    largest = LARGE["vocab_size"] * LARGE["dim"]  # bytes in int8
    for taken, expected in measured:
        assert expected > 50 << 20
        assert 0.9 * expected < taken < expected + largest + (24 << 20)


@pytest.mark.parametrize(("scheme", "gigabytes"), [("int4", 4.8), ("int4:group=32", 5.45), ("int8", 8.1)])
def test_an_8b_fits_as_the_shapes_say(scheme, gigabytes):
    from llama_ref.checkpoint.quantized_reader import parts_of
    from llama_ref.checkpoint.releases import find_release
    from llama_ref.checkpoint.shapes import expected_shapes

    args = ModelArgs.from_dict(find_release("Llama3.1-8B").params)
    parts = [parts_of(Scheme.parse(scheme), name, shape).values() for name, shape in expected_shapes(args).items()]
    n_bytes = sum(torch.Size(shape).numel() * (dtype or torch.bfloat16).itemsize for some in parts for shape, dtype in some)
    assert n_bytes < gigabytes * 1e9


# ---- CUDA


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_cuda_everything_stays_on_the_device(scheme, dtype):
    with fake_cuda():
        model = model_without_memory(ModelArgs.from_dict(PARAMS | {"dim": 256}))
        weights = {name: torch.empty(p.shape, dtype=dtype, device="cuda") for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False)
        quantize_model(model, scheme)
        use_fast_kernels(model)
        if scheme != "int8":
            assert type(model.layers[0].attention.wq) is Int4Linear
        cache = KVCache(model.args, 1, 100, dtype=dtype, device="cuda")
        for n_tokens in (60, 1):
            tokens = torch.zeros(1, n_tokens, dtype=torch.long, device="cuda")
            logits = model(tokens, cache)
            assert logits.shape == (1, n_tokens, 512)
            assert logits.device.type == "cuda"
        assert model.layers[0].attention.wq.dequantize().shape == (256, 256)


# ---- quality


def test_real_text_loses_little(llama):
    """KL divergence on code, with a third of the layers, the embedding and the output quantized.

    Int4 costs such a small model much quality; calibration reduces the loss (test_gptq.py).
    """
    tokens = torch.tensor([llama.tokenizer.encode(texts()["code"], bos=True, eos=False)[:128]])
    expected = log_probabilities(llama.model, tokens)
    plain = quality(expected, tokens, expected)
    found = {}
    for scheme in SCHEMES:
        model = copy.deepcopy(llama.model, {id(p): p for p in llama.model.parameters()})  # copies the modules only
        layers = model.layers
        model.layers = layers[:10]  # the same blocks
        quantize_model(model, scheme)
        model.layers = layers
        found[scheme] = quality(log_probabilities(model, tokens), tokens, expected)
    assert plain.kl == 0
    assert 0 < found["int8"].kl < 0.0075
    assert found["int8"].agreement > 0.9
    assert found["int8"].perplexity == pytest.approx(plain.perplexity, rel=0.03)
    assert found["int4"].kl < 0.3
    assert found["int4:group=32"].kl < 0.005  # the weights had been quantized with these steps before
