"""Folders, files and sizes of every release agree with Meta's own list."""

import pytest

from llama_ref.checkpoint.releases import RELEASES
from llama_ref.download.files import SHARD_BYTES, estimated_bytes, file_names, is_weights, remote_folders

sku_list = pytest.importorskip("llama_models.sku_list")
META = {model.descriptor(): sku_list.llama_meta_net_info(model) for model in sku_list.all_registered_models()}


@pytest.mark.parametrize("name", RELEASES)
def test_folder_and_files_are_metas(name):
    release, metas = RELEASES[name], META[name]
    assert remote_folders(release)[0] == metas.folder
    assert set(file_names(release)) == set(metas.files) and len(file_names(release)) == len(metas.files)


@pytest.mark.parametrize("name", RELEASES)
def test_small_files_come_first(name):
    names = file_names(RELEASES[name])
    assert names[0] == "checklist.chk"
    kinds = [is_weights(each) for each in names]
    assert kinds == sorted(kinds) and any(kinds) and not all(kinds)


def test_metas_sizes_of_the_405b():
    sizes = {name: info.pth_size for name, info in META.items() if info.pth_size and name in RELEASES}
    assert len(sizes) == 6
    for name, size in sizes.items():
        assert SHARD_BYTES[":" + name.partition(":")[2] if ":" in name else ""] == size
        assert estimated_bytes(RELEASES[name]) == size * RELEASES[name].shards


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Llama3.2-1B", 2.47), ("Llama3.1-8B", 16.06), ("Llama3.1-70B", 141.1), ("Llama3.2-11B-Vision", 21.3)],
)
def test_estimates_are_near_what_people_downloaded(name, gigabytes):
    assert estimated_bytes(RELEASES[name]) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_an_executorch_program_has_no_estimate():
    assert estimated_bytes(RELEASES["Llama-Guard-3-1B:int4"]) is None
    assert all(estimated_bytes(each) for name, each in RELEASES.items() if name != "Llama-Guard-3-1B:int4")
