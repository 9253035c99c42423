"""The version of Llama Guard is inferred from a folder's name and shape."""

import pytest

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.releases import RELEASES
from llama_ref.errors import RequestError
from llama_ref.guard.versions import VERSIONS, find_version, version_of

BY_RELEASE = {
    "Llama-Guard-2-8B": "2",
    "Llama-Guard-3-1B": "3-1B",
    "Llama-Guard-3-8B": "3-8B",
    "Llama-Guard-3-8B:int8": "3-8B",
    "Llama-Guard-3-11B-Vision": "3-11B",
}
ARGS = {name: ModelArgs.from_dict(release.params) for name, release in RELEASES.items() if "int4" not in name}


@pytest.mark.parametrize(("release", "version"), BY_RELEASE.items())
def test_every_release_is_known_by_its_names(release, version):
    known = RELEASES[release]
    for name in (release, known.folder, known.huggingface_repo, release.lower(), f"{known.folder}-int4"):
        assert version_of(ARGS[release], name).name == version


@pytest.mark.parametrize(
    ("name", "like", "version"),
    [
        ("llama-guard-2", "Llama-Guard-2-8B", "2"),
        ("Meta-Llama-Guard-2-8B", "Llama-Guard-2-8B", "2"),
        ("LlamaGuard3", "Llama-Guard-3-8B", "3-8B"),
        ("my-guard", "Llama-Guard-3-1B", "3-1B"),
        ("my-guard", "Llama-Guard-3-11B-Vision", "3-11B"),
        ("Llama-Guard-3-1B", "Llama3.2-3B", "3-1B"),
        (None, "Llama-Guard-3-1B", "3-1B"),
    ],
)
def test_other_names_are_completed_by_the_shape(name, like, version):
    assert version_of(ARGS[like], name).name == version


@pytest.mark.parametrize(
    ("name", "like", "says"),
    [
        ("my-guard", "Llama-Guard-3-8B", "may be Guard 2 or Guard 3"),
        (None, "Llama-Guard-3-8B", "the model may be Guard 2 or Guard 3"),
        ("Llama3.2-1B-Instruct", "Llama3.2-1B-Instruct", "is not a known Llama Guard"),
        ("Llama3.1-8B", "Llama3.1-8B", "is not a known Llama Guard"),
        ("Llama-Guard-4-12B", "Llama3.2-3B", "is not a known Llama Guard"),
        ("guard-3b", "Llama3.2-3B", "is not a known Llama Guard"),
    ],
)
def test_what_cannot_be_told_names_the_flag(name, like, says):
    with pytest.raises(RequestError, match=rf"{says}.*--guard_version 2\|3-1B\|3-8B\|3-11B"):
        version_of(ARGS[like], name)


def test_a_version_is_found_by_its_name():
    assert find_version("3-8B") is VERSIONS["3-8B"]
    with pytest.raises(RequestError, match="expected one of 2, 3-1B, 3-8B, 3-11B"):
        find_version("3")
