"""Collect activations of many prompts into a folder, with one shard in memory at a time.

    study.collect(llama, prompts, "layers.12.residual_post", to="activations")
    study.Collected("activations").select("layers.12.residual_post", positions=-1)

collection.py defines the folder's format, collected.py reads it.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_ref.checkpoint.formats.atomic import check_free_space
from llama_ref.checkpoint.formats.safetensors_writer import safetensors_pieces
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.parallel.division import division_of
from llama_ref.parallel.job import from_first
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.datasets.collected import Collected
from llama_ref.study.datasets.collection import DTYPES, INDEX, Collection, Shard, check_dtype, plan, read_index, row_shapes
from llama_ref.study.inputs import check_index, prompt_tokens
from llama_ref.study.model_digest import weights_digest
from llama_ref.study.passes.hooks import Pass, attached, check_part, edited_names
from llama_ref.study.passes.pass_size import split_passes
from llama_ref.study.report.output import write_output
from llama_ref.study.texts import Batch, as_texts

Prompt = str | Sequence[int] | Tensor
Positions = str | Sequence[int] | Callable[[list[int]], Sequence[int]]


@torch.no_grad()
def collect(
    model: Llama | Transformer,
    prompts: Sequence[Prompt],
    names: str | Sequence[str],
    *,
    to: str | Path,
    positions: Positions = "last",
    dtype: str | torch.dtype | None = None,
    special_tokens: bool = False,
    progress: Progress | None = None,
) -> Collected:
    """Store activations of prompts (texts or ids) in the folder `to`, and open it.

    `names` may be globs. `positions` is "last", "all", one list for all prompts (-1 is a prompt's last
    token), or a function of a prompt's ids that returns such a list. `dtype`: float32, bfloat16 or
    float16; default: the model's. Duplicate texts are run once. `special_tokens` as in
    `Llama.encode`. `progress` is called with (texts done, all texts).

    An interrupted run continues when it is called again with the same arguments; finished shards are
    not computed again. In a block of `patch`, `steer` or another edit, edited values are stored, in a new
    folder only: a folder that was collected or begun with edits is never continued, since they may differ.
    Raises RequestError for a folder that was written with other arguments, weights or edits, names or
    positions that do not exist, and files that cannot be written; CheckpointError for a full disk or a
    damaged folder. Under torchrun all processes must call it with the same arguments; rank 0 writes, and
    a folder must be continued with the same number of processes.
    """
    transformer = model.model if isinstance(model, Llama) else model
    check_part(transformer)
    division = division_of(transformer)
    job, shapes = division.job, row_shapes(division.args, names)
    stored = check_dtype(transformer.dtype if dtype is None else dtype)
    ids = _as_ids(model, prompts, special_tokens)
    kept = [_kept(positions, text.tolist(), i) for i, text in enumerate(ids)]
    collection, texts = plan(weights_digest(transformer), shapes, stored, ids, kept, edited_names(transformer))
    job.check_same("collecting activations", {"what is collected": json.dumps(collection.as_json())})
    folder, missing = from_first(job, partial(_prepare, to, collection))
    counter = ProgressCounter(len(texts), progress)
    counter.advance(len(texts) - sum(shard.end - shard.first for shard in missing))
    for shard in missing:
        # One expression: a variable would keep this shard's tensors alive while the next ones are computed.
        from_first(job, partial(_write, folder / shard.file, _run(transformer, collection, shard, texts, counter)))
    return from_first(job, partial(Collected, folder))


def _prepare(to: str | Path, collection: Collection) -> tuple[Path, list[Shard]]:
    """The folder, and the shards that it does not have yet. Raises RequestError, CheckpointError."""
    folder = _open(to, collection)
    missing = [shard for shard in collection.shards if not (folder / shard.file).exists()]
    check_free_space(folder, sum(map(collection.n_rows, missing)) * collection.row_bytes)
    return folder, missing


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    write_output(path, safetensors_pieces(tensors, {}))


def _run(
    model: Transformer, collection: Collection, shard: Shard, texts: Sequence[Tensor], counter: ProgressCounter
) -> dict[str, Tensor]:
    """Compute a shard's tensors, in memory that is allocated once."""
    n_rows, dtype = collection.n_rows(shard), DTYPES[collection.dtype]
    tensors = {name: torch.empty(n_rows, *shape, dtype=dtype, device="cpu") for name, shape in collection.names.items()}
    begin = 0
    for some in split_passes(collection.lengths[shard.first : shard.end]):
        own = slice(shard.first + some.start, shard.first + some.stop)
        picker = _Picker(tensors, begin, collection.positions[own])
        with attached(model, picker):
            Batch.from_texts(model, texts[own]).show(model)
        begin = picker.end
        counter.advance(len(some))
    numbers = range(shard.first, shard.end)
    return tensors | {"tokens": torch.cat([texts[i][collection.positions[i]] for i in numbers])}


class _Picker:
    """A visitor that copies the kept positions of one pass into a shard's tensors."""

    edits, in_path = False, False

    def __init__(self, tensors: dict[str, Tensor], begin: int, positions: list[list[int]]):
        self.tensors, self.start = tensors, begin
        self.rows = torch.tensor([row for row, own in enumerate(positions) for _ in own], device="cpu")
        self.columns = torch.tensor([position for own in positions for position in own], device="cpu")
        self.end = begin + len(self.rows)

    def wants(self, name: str) -> bool:
        return name in self.tensors

    def begin(self, run: Pass) -> None:
        self.rows, self.columns = self.rows.to(run.tokens.device), self.columns.to(run.tokens.device)

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor:
        target = self.tensors[name][self.start : self.end]
        target.copy_(value[self.rows, self.columns])
        if target.dtype == torch.float16 and not target.isfinite().all():
            raise RequestError(f"{name} has values that float16 cannot hold: choose dtype bfloat16 or float32")
        return value


# ---- checks


def _as_ids(model: Llama | Transformer, prompts: Sequence[Prompt], special_tokens: bool) -> list[Tensor]:
    """Every prompt's ids (T,) on the CPU. Raises RequestError with the number of the prompt."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise RequestError(f"prompts is {prompts!r:.60}, expected a list of texts, or of lists of ids")
    return [_ids_of(model, prompt, i, special_tokens) for i, prompt in enumerate(prompts)]


def _ids_of(model: Llama | Transformer, prompt: Prompt, number: int, special_tokens: bool) -> Tensor:
    transformer = model.model if isinstance(model, Llama) else model
    if isinstance(prompt, str):
        if not isinstance(model, Llama):
            raise RequestError(f"prompt {number} is a text, which needs a tokenizer: pass the Llama, or ids")
        prompt = prompt_tokens(model, prompt, f"prompt {number}", special_tokens=special_tokens)
    try:
        texts = as_texts(transformer, prompt)
    except RequestError as error:
        raise RequestError(f"prompt {number}: {error}") from error
    if len(texts) != 1:
        raise RequestError(f"prompt {number} is {len(texts)} texts, expected one")
    return texts[0]


def _kept(positions: Positions, ids: list[int], number: int) -> list[int]:
    """The positions of one prompt that are kept, counted from 0. Raises RequestError."""
    if isinstance(positions, str) and positions in ("last", "all"):
        return list(range(len(ids)))[-1 if positions == "last" else 0 :]
    wanted: object = positions(ids) if callable(positions) else positions
    if isinstance(wanted, Tensor | np.ndarray):
        wanted = wanted.tolist()
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not wanted:
        expected = 'expected "last", "all", a list of positions, or a function of ids that returns one'
        raise RequestError(f"positions of prompt {number} is {wanted!r:.60}, {expected}")
    return [check_index(f"position of prompt {number}", position, len(ids)) for position in wanted]


def _open(to: str | Path, collection: Collection) -> Path:
    """Create the folder with this index, or check the index that it has. Raises RequestError if it holds something else."""
    try:
        folder = Path(os.path.realpath(Path(to).expanduser()))
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"cannot use {to!r:.200} as a folder: {getattr(error, 'strerror', None) or error}") from error
    if INDEX in entries:
        obstacle = collection.obstacle(read_index(folder))
        if obstacle is not None:
            raise RequestError(f"{folder} {obstacle}: choose another folder, or remove it")
        return folder
    others = [name for name in entries if not name.startswith(".")]
    if others:
        raise RequestError(f"{folder} already holds {', '.join(others[:4])}: choose another folder")
    write_output(folder / INDEX, [json.dumps(collection.as_json()).encode()])
    return folder
