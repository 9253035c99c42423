"""Findings about a checkpoint's structure, and checks shared by both file formats."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama_ref.args import MOST_LAYERS, PARAMS_LIMIT_BYTES, WIDEST, ModelArgs
from llama_ref.checkpoint.formats.pth import TensorInfo
from llama_ref.checkpoint.formats.safetensors import HeldTensor
from llama_ref.checkpoint.hf.names import LAYER
from llama_ref.checkpoint.shapes import MOST_SHARDS, Shape, expected_shapes, is_ignored, shard_shape
from llama_ref.checkpoint.verify.report import STATE_OF_IMPOSTOR, State
from llama_ref.errors import CheckpointError
from llama_ref.files import read_head, read_small, what_is

TORN_VALUE = re.compile(r"(t|tr|tru|f|fa|fal|fals|n|nu|nul|-|\.|[eE][+-]?)?\s*")  # truncated
MOST_LISTED = 4  # problems shown in one detail


@dataclass(frozen=True)
class Finding:
    """A problem with the structure of one file.

    `if_altered` is the state to report if the checksum shows that the file was changed. `by_others`
    means that the file only contradicts other files, which may be the wrong ones.
    """

    state: State
    detail: str
    expected_size: int | None = None
    if_altered: State | None = None
    by_others: bool = False


@dataclass
class Structure:
    """The structure of a folder: findings by file name (none for a sound file) and tensors."""

    findings: dict[str, Finding] = field(default_factory=dict)
    pth: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)  # tensors by file, then name
    safetensors: dict[str, dict[str, HeldTensor]] = field(default_factory=dict)
    needed: list[str] = field(default_factory=list)  # weight files that must exist
    is_counted: bool = False  # whether tensors or an index say which weight files there are
    has_known_params: bool = False  # a release that comes without params.json and config.json
    surplus: dict[str, str] = field(default_factory=dict)  # weight file of another model -> reason
    notes: list[str] = field(default_factory=list)


def impostor_finding(path: Path) -> Finding | None:
    """A finding if the file is unreadable or clearly something else, such as a web page."""
    try:
        kind = what_is(read_head(path))
    except CheckpointError as error:
        return Finding(State.UNREADABLE, without_path(error, path))
    return Finding(STATE_OF_IMPOSTOR[kind], kind) if kind else None


def without_path(error: CheckpointError, path: Path) -> str:
    """An error's text without the path, for a report that already names the file."""
    text = str(error)
    for lead in (f"{path}: ", f"{path} cannot be used: ", f"{path} is ", f"{path} ", f"{path}, "):
        text = text.removeprefix(lead)
    return text


def how_json_broke(path: Path, limit_bytes: int = PARAMS_LIMIT_BYTES) -> State | None:
    """CUT_SHORT for the beginning of an object, LONGER for an object followed by something else.

    None if it is valid JSON, so that only the content can be wrong.
    """
    try:
        text = read_small(path, limit_bytes, "JSON").decode("utf-8", "replace")
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return State.LONGER
        in_a_string = error.msg.startswith("Unterminated") and not text.rstrip().endswith("}")
        if text.startswith("{") and (in_a_string or TORN_VALUE.fullmatch(text, error.pos)):
            return State.CUT_SHORT
        return State.DAMAGED
    except (CheckpointError, OSError, ValueError, RecursionError):
        return State.DAMAGED
    return None


def listed(problems: Sequence[str]) -> str:
    """The first few of possibly hundreds of problems."""
    more = f", and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
    return "; ".join(problems[:MOST_LISTED]) + more


def implied_model(parts: Mapping[str, Shape], n_shards: int | None = None) -> tuple[ModelArgs, int] | None:
    """The Llama and number of shards that one shard's tensor shapes imply; None if not a Llama.

    Names are Meta's. This tells a wrong params.json from wrong weights: weights that fit each other
    belong to some model. Shapes do not show how the width is divided into heads, so `n_heads` and
    `n_kv_heads` are any that give these shapes. If `n_shards` is unknown, it is the number that
    makes all heads together as wide as the model, or 1 if there is none.
    """
    layers = [int(match[1]) for name in parts if (match := LAYER.fullmatch(name)) and len(match[1]) < 9]
    try:
        (dim,), (words, _) = parts["norm.weight"], parts["tok_embeddings.weight"]
        (rows, _), (kv_rows, _) = (parts[f"layers.0.attention.{w}.weight"] for w in ("wq", "wk"))
        width, _ = parts["layers.0.feed_forward.w1.weight"]
    except (KeyError, ValueError):
        return None
    if not all((dim, words, rows, kv_rows, width)) or rows % kv_rows or max(layers) >= MOST_LAYERS:
        return None
    n_shards = n_shards or (1 if dim % rows else dim // rows)
    n_layers = max(layers) + 1
    if n_shards > MOST_SHARDS or max(dim, words, width, rows) * n_shards > WIDEST or len(parts) < n_layers:
        return None
    args = ModelArgs(  # one key/value head of the full width
        dim=dim,
        n_layers=n_layers,
        n_heads=rows // kv_rows,
        n_kv_heads=1,
        head_dim=kv_rows * n_shards,
        vocab_size=words * n_shards,
        hidden_dim=width * n_shards,
        norm_eps=1e-5,
        rope_theta=5e5,
    )
    expected = {name: shard_shape(name, whole, n_shards) for name, whole in expected_shapes(args).items()}
    found = {name: shape for name, shape in parts.items() if not is_ignored(name)}
    found.setdefault("output.weight", expected["output.weight"])  # may be missing if tied
    return (args, n_shards) if found == expected else None


def contradicted_params(weights: list[str], args: ModelArgs, implied: ModelArgs, names: Mapping[str, str]) -> Finding:
    """The finding for a params.json or config.json if all weights agree on another model.

    `names` maps ModelArgs' names to the keys of the file.
    """
    numbers = {
        names.get("dim", "dim"): (args.dim, implied.dim),
        names.get("n_layers", "n_layers"): (args.n_layers, implied.n_layers),
        names.get("vocab_size", "vocab_size"): (args.vocab_size, implied.vocab_size),
        names.get("hidden_dim", "the feed-forward width"): (args.ffn_dim, implied.ffn_dim),
        "the width of all query heads": (args.n_heads * args.head_dim, implied.n_heads * implied.head_dim),
        "the width of all key heads": (args.n_kv_heads * args.head_dim, implied.n_kv_heads * implied.head_dim),
    }
    differing = [f"{name} is {said:,}, in the weights {held:,}" for name, (said, held) in numbers.items() if said != held]
    whose = weights[0] if len(weights) == 1 else f"all {len(weights)} files of weights"
    return Finding(State.MISFIT, f"it and {whose} contradict each other: {'; '.join(differing)}")
