"""Every Llama 3 release that Meta published: name, files, shape.

The table is for listing, planning and making folders like a release. A folder's own params.json
always takes precedence.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_ref.checkpoint.spelling import META, name_key
from llama_ref.errors import RequestError


@dataclass(frozen=True)
class Release:
    """One release: `params` is its params.json, `weights` is bf16, fp8-mixed, int4 or int8.

    `max_seq_len` counts tokens. `rope_scaling_factor` is None if RoPE is not scaled. `tied`: output
    and embedding are one matrix.
    """

    name: str
    huggingface_repo: str
    shards: int
    weights: str
    max_seq_len: int
    rope_scaling_factor: int | None
    tied: bool
    params: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The folder that Meta's downloader makes."""
        return self.name.replace(":", "-")


def _shape(dim: int, n_layers: int, n_heads: int, ffn_dim_multiplier: float, multiple_of: int) -> dict[str, Any]:
    return {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": ffn_dim_multiplier,
        "multiple_of": multiple_of,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }


SHAPES = {
    "1B": _shape(2048, 16, 32, 1.5, 256),
    "3B": _shape(3072, 28, 24, 1.0, 256),
    "8B": _shape(4096, 32, 32, 1.3, 1024),
    "70B": _shape(8192, 80, 64, 1.3, 4096),
    "405B": _shape(16384, 126, 128, 1.2, 4096),
}
SHARDS = {"1B": 1, "3B": 1, "8B": 1, "70B": 8, "405B": 8}
TIED = {"1B", "3B"}
ROPE_FACTORS = {"1B": 32, "3B": 32, "8B": 8, "70B": 8, "405B": 8}  # not in any of Meta's files

# Meta's list says 256, but the file sizes and the model card imply groups of 32.
INT4 = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32}
SPINQUANT = {"quantization_args": {**INT4, "spinquant": True}}
QLORA = {"quantization_args": INT4, "lora_args": {"rank": 16, "scale": 2.0}}


def _vision(chunk_size: int, cross_attention_layers: int) -> dict[str, int]:
    return {
        "vision_chunk_size": chunk_size,
        "vision_max_num_chunks": 4,
        "vision_num_cross_attention_layers": cross_attention_layers,
    }


def _release(
    name: str,
    size: str,
    params: Mapping[str, Any] | None = None,
    *,
    repo: str | None = None,
    weights: str = "bf16",
    shards: int | None = None,
    max_seq_len: int = 131072,
    use_scaled_rope: bool | None = True,
) -> Release:
    """A release of a size; `params` adds to its shape; `use_scaled_rope` None omits that key."""
    scaling = {} if use_scaled_rope is None else {"use_scaled_rope": use_scaled_rope}
    return Release(
        name=name,
        huggingface_repo="meta-llama/" + (repo or name.replace("Llama3", "Llama-3")),
        shards=shards or SHARDS[size],
        weights=weights,
        max_seq_len=max_seq_len,
        rope_scaling_factor=ROPE_FACTORS[size] if use_scaled_rope else None,
        tied=size in TIED,
        params={**SHAPES[size], **scaling, **(params or {})},
    )


def _llama_3(name: str, size: str) -> Release:
    return _release(name, size, max_seq_len=8192, use_scaled_rope=None)


def _405b(name: str) -> list[Release]:
    repo = name.replace("Llama3", "Llama-3")
    return [
        _release(f"{name}:bf16-mp8", "405B", repo=repo),
        _release(name, "405B", repo=f"{repo}-FP8", weights="fp8-mixed"),
        # 16 processes need a KV head each, so these files hold each of the 8 twice.
        _release(f"{name}:bf16-mp16", "405B", {"n_kv_heads": 16}, repo=repo, shards=16),
    ]


def _int4(name: str, size: str) -> list[Release]:
    repo = name.replace("Llama3", "Llama-3")
    qlora, spinquant = f"{repo}-QLORA_INT4_EO8", f"{repo}-SpinQuant_INT4_EO8"
    return [
        _release(f"{name}:int4-qlora-eo8", size, QLORA, repo=qlora, weights="int4", max_seq_len=8192),
        _release(f"{name}:int4-spinquant-eo8", size, SPINQUANT, repo=spinquant, weights="int4", max_seq_len=8192),
    ]


# A pruned 1B. Its entry in Meta's list (llama_models.sku_list) has other names for the FFN's width
# and RoPE's base, and no keys for the FFN formula.
PRUNED_GUARD = Release(
    name="Llama-Guard-3-1B:int4",
    huggingface_repo="meta-llama/Llama-Guard-3-1B-INT4",
    shards=1,
    weights="int4",
    max_seq_len=131072,
    rope_scaling_factor=ROPE_FACTORS["1B"],
    tied=True,
    params={
        **{key: SHAPES["1B"][key] for key in ("dim", "n_heads", "n_kv_heads", "vocab_size", "norm_eps")},
        "n_layers": 12,
        "hidden_dim": 6400,
        "rope_freq_base": 500000.0,
        "use_scaled_rope": True,
    },
)

RELEASES: dict[str, Release] = {
    release.name: release
    for release in (
        _llama_3("Llama-3-8B", "8B"),
        _llama_3("Llama-3-8B-Instruct", "8B"),
        _llama_3("Llama-3-70B", "70B"),
        _llama_3("Llama-3-70B-Instruct", "70B"),
        _release("Llama3.1-8B", "8B"),
        _release("Llama3.1-8B-Instruct", "8B"),
        _release("Llama3.1-70B", "70B"),
        _release("Llama3.1-70B-Instruct", "70B"),
        *_405b("Llama3.1-405B"),
        *_405b("Llama3.1-405B-Instruct"),
        _release("Llama3.2-1B", "1B"),
        _release("Llama3.2-1B-Instruct", "1B"),
        *_int4("Llama3.2-1B-Instruct", "1B"),
        _release("Llama3.2-3B", "3B"),
        _release("Llama3.2-3B-Instruct", "3B"),
        *_int4("Llama3.2-3B-Instruct", "3B"),
        _release("Llama3.2-11B-Vision", "8B", _vision(448, 8)),  # text part: an 8B, or a 70B
        _release("Llama3.2-11B-Vision-Instruct", "8B", _vision(560, 8)),
        _release("Llama3.2-90B-Vision", "70B", _vision(560, 20)),
        _release("Llama3.2-90B-Vision-Instruct", "70B", _vision(560, 20)),
        _release("Llama3.3-70B-Instruct", "70B"),
        # Meta's list has Llama 2's vocabulary of 32,000 and multiple_of 256 here. But this is a
        # fine-tuned Llama 3 8B: its vocabulary is 128,256, and its FFN's width is 14,336 with
        # either value of multiple_of.
        _release("Llama-Guard-2-8B", "8B", max_seq_len=4096, use_scaled_rope=None),
        _release("Llama-Guard-3-1B", "1B"),
        PRUNED_GUARD,
        _release("Llama-Guard-3-8B", "8B", use_scaled_rope=False),
        _release("Llama-Guard-3-8B:int8", "8B", repo="Llama-Guard-3-8B-INT8", weights="int8", use_scaled_rope=False),
        _release("Llama-Guard-3-11B-Vision", "8B", _vision(560, 8)),
    )
}


def find_release(name: str) -> Release:
    """Find a release by its name in any spelling, with `:` or with `-` as in folder names.

    "meta-llama/Llama-3.1-405B" is the first release in that repository. Raises RequestError with
    the closest names.
    """
    for release in RELEASES.values():
        official = (release.huggingface_repo,) if name.startswith(META) else (release.name, release.folder)
        if name_key(name) in map(name_key, official):
            return release
    by_lower = {candidate.lower(): candidate for candidate in RELEASES}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)]
    close = close or [by_lower[each] for each in by_lower if len(name) > 1 and name.lower() in each]  # "8B"
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(RELEASES)}"
    raise RequestError(f"unknown Llama 3 release {name!r}; {hint}")
