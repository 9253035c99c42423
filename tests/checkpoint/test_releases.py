"""The table of releases against Meta's own list."""

import pytest

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.releases import INT4, RELEASES, find_release
from llama_ref.checkpoint.spelling import name_key
from llama_ref.errors import RequestError

sku_list = pytest.importorskip("llama_models.sku_list")

LLAMA_3 = {"llama3", "llama3_1", "llama3_2", "llama3_3", "safety"}
META = {
    model.descriptor(): model
    for model in sku_list.all_registered_models()
    if model.model_family.value in LLAMA_3 and model.arch_args  # a Llama 4 guard has none
}
# Errors in Meta's list, corrected.
CORRECTED: dict[str, dict] = {"Llama-Guard-2-8B": {"vocab_size": 128256, "multiple_of": 1024}}
for size in ("1B", "3B"):  # file sizes and model card imply groups of 32; the list has no scheme
    CORRECTED[f"Llama3.2-{size}-Instruct:int4-qlora-eo8"] = {"quantization_args": INT4}
    CORRECTED[f"Llama3.2-{size}-Instruct:int4-spinquant-eo8"] = {"quantization_args": INT4 | {"spinquant": True}}


def test_every_release_is_there_and_no_other():
    assert set(RELEASES) == set(META)


@pytest.mark.parametrize("name", META)
def test_agrees_with_metas_list(name):
    ours, metas = RELEASES[name], META[name]
    assert ours.shards == metas.pth_file_count
    assert ours.huggingface_repo == metas.huggingface_repo
    assert ours.weights == metas.quantization_format.value.replace("_", "-")
    assert ours.max_seq_len == metas.max_seq_length
    expected = metas.arch_args | CORRECTED.get(name, {})
    assert {"use_scaled_rope": False, **ours.params} == expected  # Llama 3.0's files have no such key


@pytest.mark.parametrize("name", RELEASES)
def test_params_are_read_as_the_table_says(name):
    release = RELEASES[name]
    args = ModelArgs.from_dict(release.params)
    assert args.rope_scaling_factor == (release.rope_scaling_factor or 1)
    assert not args.extra
    widths = {2048: 8192, 3072: 8192, 4096: 14336, 8192: 28672, 16384: 53248}
    assert args.ffn_dim == (6400 if "hidden_dim" in release.params else widths[args.dim])


@pytest.mark.parametrize("name", META)
def test_folder_is_the_one_metas_downloader_makes(name):
    assert RELEASES[name].folder == META[name].descriptor().replace(":", "-")
    assert find_release(name) is find_release(RELEASES[name].folder) is RELEASES[name]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("Llama3.2-1B-instrct", "Llama3.2-1B-Instruct"), ("llama3.1-8", "Llama3.1-8B"), ("Llama-3.1-70", "Llama3.1-70B")],
)
def test_a_wrong_name_leads_to_the_closest(wrong, right):
    with pytest.raises(RequestError, match=f"{wrong}.*did you mean .*{right}"):
        find_release(wrong)


def test_a_name_like_none_lists_all():
    with pytest.raises(RequestError, match=r"Llama3\.3-70B-Instruct"):
        find_release("gpt2")


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("Llama-3.1-8B", "Llama3.1-8B"),
        ("llama3.2-1b-instruct", "Llama3.2-1B-Instruct"),
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama3.2-1B-Instruct"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "Llama3.1-70B-Instruct"),
        ("meta-llama/Llama-3.1-405B", "Llama3.1-405B:bf16-mp8"),
        ("meta-llama/Llama-3.1-405B-FP8", "Llama3.1-405B"),
        ("Llama3.1-405B", "Llama3.1-405B"),
        ("Llama3.1-405B:bf16-mp16", "Llama3.1-405B:bf16-mp16"),
    ],
)
def test_a_release_is_known_by_every_spelling(name, release):
    assert find_release(name).name == release


def test_no_two_releases_have_one_spelling():
    assert len({name_key(name) for name in RELEASES}) == len(RELEASES)
