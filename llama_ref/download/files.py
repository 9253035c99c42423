"""The folders, names and sizes of a release's files on Meta's server."""

import re

from llama_ref.checkpoint.folder import shard_name
from llama_ref.checkpoint.meta_quantized.kinds import scales_name
from llama_ref.checkpoint.releases import Release
from llama_ref.checkpoint.spelling import META
from llama_ref.checkpoint.verify.checklist import CHECKLIST_NAME

WEIGHTS = re.compile(r".*\.(pth|pt|pte|safetensors)")
# Releases whose folder is not named like their repository on Hugging Face.
FOLDERS = {
    "Llama-3-8B": ("Llama-3-8B", "8b_pre_trained"),  # from Meta's list of 2024, and from its Llama 3 script
    "Llama-3-8B-Instruct": ("Llama-3-8B-Instruct", "8b_instruction_tuned"),
    "Llama-3-70B": ("Llama-3-70B", "70b_pre_trained"),
    "Llama-3-70B-Instruct": ("Llama-3-70B-Instruct", "70b_instruction_tuned"),
    "Llama-Guard-2-8B": ("llama-guard-2",),
    "Llama-Guard-3-8B:int8": ("Llama-Guard-3-8B-INT8-HF",),
}
LAYOUTS = {"": "", ":bf16-mp8": "-MP8", ":bf16-mp16": "-MP16"}  # for the 405B; the folder without a suffix is fp8
SHARD_BYTES = {"": 60_903_742_309, ":bf16-mp8": 101_470_976_045, ":bf16-mp16": 51_268_302_389}
SMALL_FILES = (CHECKLIST_NAME, "params.json", "tokenizer.model")
OTHER_FILES = {
    "Llama-Guard-3-1B:int4": (*SMALL_FILES, "example-prompt.txt", "llama_guard_3_1b_pruned_xnnpack.pte"),
    "Llama-Guard-3-8B:int8": (
        CHECKLIST_NAME,
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ),
}


def remote_folders(release: Release) -> tuple[str, ...]:
    """The folders where the server may keep a release, most likely first."""
    if _is_405b(release):
        base, _, layout = release.name.partition(":")
        return (base.replace("Llama3", "Llama-3") + LAYOUTS[layout and f":{layout}"],)
    return FOLDERS.get(release.name, (release.huggingface_repo.removeprefix(META),))


def file_names(release: Release) -> tuple[str, ...]:
    """The names of a release's files: checklist.chk, then other small files, then the weights."""
    if release.name in OTHER_FILES:
        return OTHER_FILES[release.name]
    scales = [scales_name(rank) for rank in range(release.shards)] if release.weights == "fp8-mixed" else []
    return (*SMALL_FILES, *scales, *map(shard_name, range(release.shards)))


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name.

    Weights are fetched after the small files are checked.
    """
    return WEIGHTS.fullmatch(name) is not None


def estimated_bytes(release: Release) -> int | None:
    """Estimated size of a release on disk, from Meta's table or from its shape; None if unknown."""
    from llama_ref.parallel.sharding import WHOLE
    from llama_ref.plan import model_of_release, weight_bytes

    if _is_405b(release):
        _, _, layout = release.name.partition(":")
        return release.shards * SHARD_BYTES[layout and f":{layout}"]
    if release.name in OTHER_FILES and release.weights == "int4":
        return None
    return weight_bytes(model_of_release(release), WHOLE, 2)


def _is_405b(release: Release) -> bool:
    return release.name.startswith("Llama3.1-405B")
