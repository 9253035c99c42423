"""Dequantized matrices match the formats' formulas bit for bit; errors name broken files."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import scipy.linalg
import torch
from torch import Tensor, nn

from folders import PARAMS, tiny_folder
from llama_ref.args import ModelArgs
from llama_ref.checkpoint.describe import describe
from llama_ref.checkpoint.diff import compare
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.integrity import verify, write_checklist
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.checkpoint.meta_quantized.kinds import Int4Params
from llama_ref.checkpoint.verify.report import State
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.plan import find_model
from llama_ref.quantization.apply import quantized_bytes
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.study.analyses.weights import spectra
from quantized_folders import QLORA, SPINQUANT, fp8_folder, int8_folder, quantized_folder

pytestmark = pytest.mark.usefixtures("settled")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
SHARD = "consolidated.00.pth"


def spinquant_folder(path: Path) -> Path:
    return quantized_folder(path, SPINQUANT)


def qlora_folder(path: Path) -> Path:
    return quantized_folder(path, QLORA)


KINDS: dict[str, Callable[[Path], Path]] = {
    "SpinQuant": spinquant_folder,
    "QLoRA": qlora_folder,
    "fp8": fp8_folder,
    "int8": int8_folder,
}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path) -> Path:
    return KINDS[request.param](tmp_path / request.param)


def loaded(folder: Path, **options) -> Transformer:
    opened = open_folder(folder)
    return load_model(opened, opened.read_args(), **{"dtype": torch.float32} | options)


def weights(model: Transformer) -> dict[str, Tensor]:
    """Every matrix by its name, dequantized."""
    found = {
        f"{name}.weight": module.dequantize() for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)
    }
    own = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    return own | {
        name: matrix
        for name, matrix in found.items()
        if not name.endswith((".matrix.weight", "blocks.0.weight", "blocks.1.weight"))
    }


def refusal(folder: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(folder, **options)
    return str(caught.value)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object], name: str = SHARD) -> None:
    """Save a file with other tensors."""
    tensors = torch.load(folder / name, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / name)


def change_params(folder: Path, section: str, **values) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {section: params[section] | values}))


# ---- formulas


def int4_formula(tensors: dict[str, Tensor], stem: str) -> Tensor:
    return tensors[f"{stem}.weight"] * tensors[f"{stem}.scales"].repeat_interleave(32, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spinquants_matrices(tmp_path, dtype):
    folder = spinquant_folder(tmp_path / "folder")
    tensors, found = torch.load(folder / SHARD), weights(loaded(folder, dtype=dtype))
    assert len(found) == 4 * 7 + 2
    for name, matrix in found.items():
        stem = name.removesuffix(".weight")
        if stem in ("tok_embeddings", "output"):
            assert torch.equal(matrix, tensors[name] * tensors[f"{stem}.scales"])
        elif stem.endswith("w2"):
            n = matrix.shape[1]
            rotation = torch.tensor(scipy.linalg.hadamard(n)).double() / n**0.5
            expected = int4_formula(tensors, stem).double() @ rotation
            torch.testing.assert_close(matrix.double(), expected, atol=1e-6, rtol=0)
        else:
            assert torch.equal(matrix, int4_formula(tensors, stem))


def test_qloras_matrices(tmp_path):
    folder = qlora_folder(tmp_path / "folder")
    tensors, found = torch.load(folder / SHARD), weights(loaded(folder))
    for name, matrix in found.items():
        stem = name.removesuffix(".weight")
        if stem not in ("tok_embeddings", "output"):
            a, b = (tensors[f"{stem}.adaptor.{factor}.weight"].float() for factor in "AB")
            torch.testing.assert_close(matrix, int4_formula(tensors, stem) + 2 * (b @ a), atol=1e-6, rtol=0)


def test_zero_points_are_subtracted(tmp_path):
    folder, stem = spinquant_folder(tmp_path / "folder"), "layers.1.attention.wk"
    zeros = torch.randint(-3, 4, (32, 2)).float()
    changed(folder, lambda tensors: tensors.update({f"{stem}.zeros": zeros}))
    tensors = torch.load(folder / SHARD)
    expected = (tensors[f"{stem}.weight"] - zeros.repeat_interleave(32, 1)) * tensors[f"{stem}.scales"].repeat_interleave(32, 1)
    torch.testing.assert_close(weights(loaded(folder))[f"{stem}.weight"], expected)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_fp8_matrices_have_each_shards_own_scales(tmp_path, shards):
    folder = fp8_folder(tmp_path / "folder", shards)
    files = [torch.load(folder / f"consolidated.{rank:02d}.pth") for rank in range(shards)]
    scales = [torch.load(folder / f"fp8_scales_{rank}.pt") for rank in range(shards)]
    found = weights(loaded(folder))
    for layer in (1, 2):
        for kind, dim in (("w1", 0), ("w2", 1), ("w3", 0)):
            name = f"layers.{layer}.feed_forward.{kind}.weight"
            assert files[0][name].dtype == torch.float8_e4m3fn
            parts = [
                files[rank][name].float() * scales[rank][f"{layer}_feed_forward.{kind}_{rank}"][:, None]
                for rank in range(shards)
            ]
            assert torch.equal(found[name], torch.cat(parts, dim))
    assert files[0]["layers.3.feed_forward.w1.weight"].dtype == files[0]["layers.1.attention.wq.weight"].dtype == torch.bfloat16


def test_int8_matrices_are_those_of_bitsandbytes(tmp_path):
    folder = int8_folder(tmp_path / "folder")
    tensors, found = safetensors.torch.load_file(folder / "model.safetensors"), weights(loaded(folder))
    for name, stem in (
        ("feed_forward.w2", "mlp.down_proj"),
        ("attention.wv", "self_attn.v_proj"),
        ("attention.wq", "self_attn.q_proj"),
    ):
        q, largest = tensors[f"model.layers.2.{stem}.weight"], tensors[f"model.layers.2.{stem}.SCB"]
        expected = q * (largest / 127)[:, None]
        if name.endswith("wq"):  # from RoPE pairs in two halves to neighbouring rows
            expected = expected.unflatten(0, (4, 2, 8)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(found[f"layers.2.{name}.weight"], expected)


# ---- in memory


def test_four_bits_take_half_a_byte_and_a_scale(tmp_path):
    model = loaded(spinquant_folder(tmp_path / "folder"))
    numbers = sum(matrix.numel() for name, matrix in weights(model).items() if name.startswith("layers"))
    tables = 2 * 512 * (64 + 4)
    assert quantized_bytes(model) == numbers // 2 + 4 * numbers // 32 + tables


def test_info_and_plan_say_what_a_model_takes(folder):
    model = loaded(folder, dtype=torch.bfloat16)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    [(quantization, n_bytes)] = describe(open_folder(folder)).weight_bytes.items()
    assert n_bytes == held and quantization == find_model(str(folder)).quantization


def test_equal_tables_are_held_once(tmp_path):
    folder = qlora_folder(tmp_path / "folder")
    apart = loaded(folder)
    assert apart.output.q.data_ptr() != apart.tok_embeddings.q.data_ptr()
    changed(
        folder,
        lambda tensors: tensors.update({f"output.{part}": tensors[f"tok_embeddings.{part}"] for part in ("weight", "scales")}),
    )
    model = loaded(folder)
    assert model.output.q.data_ptr() == model.tok_embeddings.q.data_ptr()


def test_a_private_copy_outlives_its_files(folder):
    model, copy = loaded(folder), loaded(folder, in_memory=True)
    expected = model(IDS)
    for path in open_folder(folder).weights:
        path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(copy(IDS), expected)


# ---- the tools


def test_verify_says_whole_in_every_way(folder):
    for options in ({}, {"quick": True}, {"deep": True}):
        report = verify(folder, **options)
        assert not report.bad and not report.problem, report.summary()
    (folder / "checklist.chk").unlink()
    write_checklist(folder)
    assert not verify(folder).bad


@pytest.mark.parametrize("shards", [1, 2])
def test_a_converted_folder_computes_the_same_without_rounding(folder, tmp_path, shards):
    target = to_meta(folder, tmp_path / "bf16", shards=shards, dtype=torch.float32)
    assert not verify(target, deep=True).bad
    params = json.loads((target / "params.json").read_text())
    assert not params.keys() & {"quantization_args", "lora_args"}
    options = {} if folder.name == "int8" else {"activations": "full"}
    torch.testing.assert_close(loaded(target)(IDS), loaded(folder, **options)(IDS), atol=2e-4, rtol=0)
    assert torch.load(to_meta(folder, tmp_path / "plain") / SHARD)["layers.1.feed_forward.w1.weight"].dtype == torch.bfloat16
    other = to_hugging_face(folder, tmp_path / "hf", dtype=torch.float32)
    assert "quantization_config" not in json.loads((other / "config.json").read_text())
    torch.testing.assert_close(loaded(other)(IDS), loaded(target)(IDS), atol=2e-4, rtol=0)


def test_diff_compares_what_is_stored_or_what_it_means(folder, tmp_path):
    assert compare(folder, folder).identical
    target = to_meta(folder, tmp_path / "bf16")
    found = compare(folder, target)
    assert found.tensors and all(tensor.relative_norm < 0.003 for tensor in found.tensors)


def test_diff_sees_other_scales(tmp_path):
    a, b = (fp8_folder(tmp_path / name) for name in "ab")
    key = "1_feed_forward.w2_1"
    changed(b, lambda scales: scales.update({key: scales[key] * 2}), "fp8_scales_1.pt")
    assert [tensor.name for tensor in compare(a, b).tensors] == ["layers.1.feed_forward.w2.weight"]


def test_a_release_is_not_quantized_again(folder, tmp_path):
    with pytest.raises(RequestError, match=r"is quantized already .*convert it to bf16 first"):
        loaded(folder, quantize="int8")
    with pytest.raises(RequestError, match=r"is quantized already .*convert it to bf16 first"):
        quantize_folder(folder, tmp_path / "int4", "int4")


@pytest.mark.parametrize("value", ["exact", 1, True])
def test_an_arithmetic_that_does_not_exist_is_refused(tmp_path, value):
    with pytest.raises(RequestError, match=r"activations is .*expected reference or full"):
        loaded(qlora_folder(tmp_path / "folder"), activations=value)


def test_folders_that_round_nothing_have_no_arithmetic_to_choose(tmp_path):
    with pytest.raises(RequestError, match=r"is for Meta's int4 and fp8 releases, and .* is not one: leave it out"):
        loaded(int8_folder(tmp_path / "folder"), activations="full")


def test_every_matrix_is_studied_once(folder):
    names = [spectrum.name for spectrum in spectra(loaded(folder))]
    assert len(names) == len(set(names)) == 4 * 7 + 2
    assert {"layers.1.attention.wq.weight", "layers.2.feed_forward.w2.weight"} < set(names)


def test_text_is_generated(folder):
    llama = Llama.build(folder, max_seq_len=64, device="cpu")
    [found] = llama.text_completion(["Hello"], temperature=0, max_gen_len=8, logprobs=True)
    assert len(found["tokens"]) == 8


# ---- broken files


def without(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def with_value(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


BROKEN = {
    "no scales of one matrix": (without("layers.2.attention.wo.scales"), r"layers\.2\.attention\.wo\.scales is missing"),
    "no scales at all": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".scales")],
        "no matrix has its scales here: fetch the weights again",
    ),
    "negative": (with_value("layers.1.attention.wv.scales", -1), r"wv\.scales holds -1, expected finite positive numbers"),
    "no output": (without("output.weight"), r"output\.weight is missing"),
    "scales in a row": (
        lambda tensors: tensors.update({"layers.0.attention.wq.scales": tensors["layers.0.attention.wq.scales"].flatten()}),
        r"wq\.scales has shape \(128,\), expected \(64, 2\)",
    ),
    "a NaN": (
        with_value("layers.0.feed_forward.w1.scales", float("nan")),
        r"w1\.scales holds a NaN, expected finite positive numbers",
    ),
    "infinite": (with_value("output.scales", float("inf")), r"output\.scales holds an infinite number, expected finite"),
    "more than four bits": (
        with_value("layers.3.attention.wq.weight", 9),
        r"wq\.weight holds numbers from -\d to 9, expected four",
    ),
    "another dtype": (
        lambda tensors: tensors.update({"layers.0.attention.wq.weight": tensors["layers.0.attention.wq.weight"].float()}),
        "layers.0.attention.wq.weight is float32, expected int8",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_int4_files_is_named(tmp_path, case):
    change, message = BROKEN[case]
    folder = spinquant_folder(tmp_path / "folder")
    changed(folder, change)
    assert re.search(message, refusal(folder))
    (folder / "checklist.chk").unlink()
    report = verify(folder, deep=True)
    assert report.bad


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("quantization_args", {"group_size": 64}, '"group_size" 64, but the scales are those of groups of 32'),
        ("quantization_args", {"group_size": 0.5}, '"group_size" 0.5, expected an even number'),
        (
            "quantization_args",
            {"group_size": 48},
            '"group_size" 48, expected a divisor of the matrices\' inputs (64, 192)',
        ),
        ("quantization_args", {"scheme": "int2"}, "\"scheme\" 'int2', expected int4_weight_int8_dynamic_activation"),
        ("quantization_args", {"spinquant": "yes"}, "\"spinquant\" 'yes', expected true or false"),
        ("lora_args", {"rank": 0}, '"rank" 0, expected a whole number from 1 to 64'),
        ("lora_args", {"scale": None}, '"scale" None, expected a number of at most 1,000,000'),
        ("lora_args", {"scale": float("inf")}, '"scale" inf, expected a number of at most 1,000,000'),
        ("lora_args", {"scale": 10**400}, "expected a number of at most 1,000,000"),
        ("quantization_args", {"spinquant": {}}, '"spinquant" {}, expected true or false'),
        ("quantization_args", {"group_size": 0}, '"group_size" 0, expected an even number'),
        ("quantization_args", {"group_size": 10**300}, "expected a divisor of the matrices' inputs"),
        ("lora_args", {"rank": 8}, r"adaptor.A.weight has shape (16, 64), expected (8, 64)"),
    ],
)
def test_what_is_wrong_with_params_is_named(tmp_path, section, values, message):
    folder = qlora_folder(tmp_path / "folder")
    change_params(folder, section, **values)
    assert message in refusal(folder)
    report = verify(folder, quick=True)
    assert any(message in file.detail for file in report.bad), report.summary()


def test_adaptors_without_their_section_are_named(tmp_path):
    folder = qlora_folder(tmp_path / "folder")
    params = json.loads((folder / "params.json").read_text())
    del params["lora_args"]
    (folder / "params.json").write_text(json.dumps(params))
    assert "it holds adaptors of low rank (QLoRA), but params.json has no lora_args" in refusal(folder)
    (folder / "checklist.chk").unlink()
    [bad] = verify(folder).bad
    assert bad.name == "params.json" and "has no lora_args" in bad.detail


@pytest.mark.parametrize("section", [{"quantization_args": {"group_size": 32}}, {"lora_args": {"rank": 4, "scale": 1.0}}])
def test_a_plain_folder_with_a_section_of_an_int4_release(tmp_path, section):
    folder = tiny_folder(tmp_path / "folder")
    (folder / "params.json").write_text(json.dumps(PARAMS | section))
    (folder / "checklist.chk").unlink()
    message = f"params.json has {next(iter(section))}, as Meta's int4 releases do, but no matrix has its scales here"
    assert message in refusal(folder)
    [bad] = verify(folder).bad
    assert bad.name == "params.json" and message in bad.detail


def test_strided_tables_are_read(tmp_path):
    folder = spinquant_folder(tmp_path / "folder")
    expected = loaded(folder)(IDS)
    changed(
        folder,
        lambda tensors: tensors.update(
            {name: tensors[name].repeat_interleave(2)[::2] for name in ("tok_embeddings.scales", "output.scales")}
        ),
    )
    assert torch.load(folder / SHARD)["output.scales"].stride() == (2,)
    assert torch.equal(loaded(folder)(IDS), expected)


@pytest.mark.parametrize("stray", ["fp8_scales_x.pt", "fp8_scales_0.pt.part", "fp8_scales_old/"])
def test_files_with_like_names_are_no_scales(tmp_path, stray):
    for folder in (tiny_folder(tmp_path / "plain"), fp8_folder(tmp_path / "fp8")):
        if stray.endswith("/"):
            (folder / stray).mkdir()
        else:
            (folder / stray).write_bytes(b"half")
        loaded(folder)
        report = verify(folder)
        assert not report.bad and stray not in {file.name for file in report.files}


def test_scales_of_no_shard_are_extra(tmp_path):
    folder = fp8_folder(tmp_path / "folder")
    (folder / "checklist.chk").unlink()
    (folder / "fp8_scales_2.pt").write_bytes((folder / "fp8_scales_0.pt").read_bytes())
    [extra] = [file for file in verify(folder).files if file.state is State.EXTRA]
    assert extra.name == "fp8_scales_2.pt" and extra.detail == "there are 2 shards"


def test_scales_beside_a_plain_model_are_named(tmp_path):
    fp8 = fp8_folder(tmp_path / "fp8")
    plain = to_meta(fp8, tmp_path / "plain")
    (plain / "fp8_scales_0.pt").write_bytes((fp8 / "fp8_scales_0.pt").read_bytes())
    assert "it holds no float8 matrices, but files with their scales are here" in refusal(plain)


def test_missing_keys_are_those_of_the_releases():
    args = ModelArgs.from_dict(
        {key: value for key, value in SPINQUANT.items() if key != "quantization_args"} | {"quantization_args": {"more": 1}}
    )
    assert Int4Params.from_args(args) == Int4Params(group=32, rotates=False, rank=0, low_rank_scale=0.0)


def test_a_rotation_of_another_width_is_refused(tmp_path):
    folder = qlora_folder(tmp_path / "folder")
    change_params(folder, "quantization_args", spinquant=True)
    assert "which must be a power of two for that, but is 192" in refusal(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: (folder / "fp8_scales_1.pt").unlink(),
            r"lacks fp8_scales_1\.pt, the scales of consolidated\.01\.pth; fetch it",
        ),
        (
            lambda folder: [(folder / f"fp8_scales_{rank}.pt").unlink() for rank in (0, 1)],
            r"consolidated\.00\.pth: it holds float8 matrices.*fetch fp8_scales_0\.pt and so on",
        ),
        (
            lambda folder: (folder / "fp8_scales_1.pt").write_bytes((folder / "fp8_scales_0.pt").read_bytes()),
            r"fp8_scales_1\.pt: it holds the scales of shard 0, expected those of shard 1; fetch it again under its own name",
        ),
        (
            lambda folder: changed(folder, with_value("1_feed_forward.w1_0", float("nan")), "fp8_scales_0.pt"),
            r"fp8_scales_0\.pt: 1_feed_forward\.w1_0 holds a NaN, expected positive numbers",
        ),
        (
            lambda folder: changed(folder, with_value("2_feed_forward.w2_0", -1), "fp8_scales_0.pt"),
            r"2_feed_forward\.w2_0 holds -1, expected positive",
        ),
        (
            lambda folder: changed(folder, without("2_feed_forward.w3_1"), "fp8_scales_1.pt"),
            r"fp8_scales_1\.pt: 2_feed_forward\.w3_1 is missing, expected shape",
        ),
        (
            lambda folder: (folder / "fp8_scales_1.pt").write_text("<!DOCTYPE html>"),
            r"fp8_scales_1\.pt is an HTML page",
        ),
    ],
    ids=["one is missing", "all are missing", "of another shard", "a NaN", "negative", "a scale is missing", "a web page"],
)
def test_what_is_wrong_with_fp8_files_is_named(tmp_path, break_it, message):
    folder = fp8_folder(tmp_path / "folder")
    break_it(folder)
    assert re.search(message, refusal(folder))
    assert verify(folder).bad
    (folder / "checklist.chk").unlink()
    assert verify(folder, deep=True).bad
    if "holds" not in message or "shard" in message:  # only --deep looks at values
        assert verify(folder, quick=True).bad


def test_other_layouts_of_bitsandbytes_are_refused(tmp_path):
    folder = int8_folder(tmp_path / "folder")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path)
    assert "bitsandbytes' weight_format 2" in refusal(folder)
    del tensors["model.layers.0.mlp.up_proj.weight_format"]
    tensors["model.layers.2.self_attn.k_proj.SCB"][3] = -1
    safetensors.torch.save_file(tensors, path)
    assert "layers.2.attention.wk.SCB holds -1, expected finite positive numbers" in refusal(folder)
    (folder / "checklist.chk").unlink()
    [bad] = verify(folder, deep=True).bad
    assert bad.detail == "model.layers.2.self_attn.k_proj.SCB: 1 impossible number"
    del tensors["model.layers.1.self_attn.q_proj.SCB"]
    safetensors.torch.save_file(tensors, path)
    assert "model.layers.1.self_attn.q_proj.SCB is missing" in refusal(folder)
    assert [file.state for file in verify(folder, quick=True).bad] == [State.MISFIT]
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("SCB")}, path)
    assert "holds int8 matrices without their scales (….SCB)" in refusal(folder)


def test_the_guards_download_needs_no_config(tmp_path):
    """Meta's folder in its real shape: 9 GB of zeros in sparse files."""
    from llama_ref.checkpoint.hf.bitsandbytes import guard_args, name_in_files
    from llama_ref.checkpoint.meta_quantized.kinds import Kind, tensors_of

    short, header, at = {"int8": "I8", "float32": "F32", "bfloat16": "BF16"}, {}, 0
    for name, (shape, dtypes, is_optional, *_) in tensors_of(guard_args(), Kind.INT8).items():
        if not is_optional:
            shape = shape[:1] if name.endswith(".SCB") else shape
            size = torch.Size(shape).numel() * getattr(torch, dtypes[0]).itemsize
            header[name_in_files(name)] = {"dtype": short[dtypes[0]], "shape": shape, "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    model = loaded(tmp_path, dtype=torch.bfloat16)
    assert model.args.n_layers == 32 and not model.args.use_scaled_rope
    assert 6.9e9 < quantized_bytes(model) < 7.0e9
    assert [file.name for file in verify(tmp_path, quick=True).bad] == ["tokenizer.json"]


def test_the_pruned_guard_is_refused_by_name(tmp_path):
    (tmp_path / "llama_guard_3_1b_pruned_xnnpack.pte").write_bytes(b"....ET12")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"ExecuTorch program \(\.pte\).*PyTorch cannot read it; fetch Llama-Guard-3-1B"):
        open_folder(tmp_path)
    assert "is an ExecuTorch program, which PyTorch cannot read: fetch Llama-Guard-3-1B" in verify(tmp_path).notes[-1]
