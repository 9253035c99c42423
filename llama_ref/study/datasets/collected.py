"""Read what `collect` stored, by prompt, position or name, from memory-mapped files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_ref.checkpoint.formats.safetensors import REFETCH, map_safetensors
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.numbers import plain_number
from llama_ref.study.datasets.collection import DTYPES, Shard, read_index
from llama_ref.study.inputs import check_index


class Collected:
    """Activations of prompts in a folder; `len` is the number of prompts.

    `names` are the names of the activations, in the model's order. Shards are memory-mapped: a value is
    read from disk when it is used. Raises CheckpointError for a folder that is damaged or incomplete.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self._index = read_index(self.folder)
        missing = [shard for shard in self._index.shards if not (self.folder / shard.file).exists()]
        if missing:
            n_shards = len(self._index.shards)
            can_continue = self._index.edited == []
            advice = "collect again, with the same arguments, to continue" if can_continue else "remove it and collect again"
            raise CheckpointError(f"{self.folder} is incomplete: {len(missing)} of {n_shards} shards are missing; {advice}")
        self._mapped: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._index.names)

    @property
    def n_texts(self) -> int:
        """Number of distinct prompts."""
        return len(self._index.texts)

    @property
    def n_rows(self) -> int:
        """Number of kept positions in all distinct prompts."""
        return self._index.offsets[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all activations."""
        return self.n_rows * self._index.row_bytes

    def __len__(self) -> int:
        return len(self._index.prompts)

    def __repr__(self) -> str:
        return f"Collected({len(self.names)} activations of {len(self)} prompts)"

    def positions(self, prompt: int) -> list[int]:
        """The kept positions of a prompt."""
        return self._index.positions[self._text(prompt)]

    def tokens(self, prompt: int) -> Tensor:
        """The ids at the kept positions of a prompt."""
        shard, rows = self._index.rows_of(self._text(prompt))
        return self._map(shard)["tokens"][rows]

    def prompt(self, prompt: int) -> dict[str, Tensor]:
        """All activations of one prompt, (kept positions, …) each, as views of the file."""
        return {name: self._values(name, self._text(prompt)) for name in self.names}

    def select(
        self, name: str, prompts: Sequence[int] | slice | None = None, positions: int | Sequence[int] | None = None
    ) -> Tensor:
        """One activation of some prompts (default: all), one after the other: (rows, …).

        `positions` in each prompt's text (default: all kept ones); -1 is its last token. Only the
        requested values are read. Raises RequestError for values that were not collected.
        """
        chosen = range(len(self))[prompts] if isinstance(prompts, slice) else prompts
        chosen = range(len(self)) if chosen is None else chosen
        shape = self._shape(name)
        texts = [self._text(prompt) for prompt in chosen]
        rows = [self._rows(text, positions) for text in texts]
        out = torch.empty(sum(map(len, rows)), *shape, dtype=DTYPES[self._index.dtype], device="cpu")
        begin = 0
        for text, own in zip(texts, rows, strict=True):
            out[begin : begin + len(own)] = self._values(name, text)[own]
            begin += len(own)
        return out

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One activation of every distinct text, shard by shard: views (rows, …)."""
        self._shape(name)
        for shard in self._index.shards:
            yield self._map(shard)[name]

    # ---- files

    def _values(self, name: str, text: int) -> Tensor:
        shard, rows = self._index.rows_of(text)
        return self._map(shard)[name][rows]

    def _map(self, shard: Shard) -> dict[str, Tensor]:
        """A shard's tensors. Raises CheckpointError if they do not match the index."""
        if shard.file not in self._mapped:
            path = self.folder / shard.file
            try:
                tensors = map_safetensors(path)
            except CheckpointError as error:
                raise CheckpointError(f"{str(error).removesuffix(REFETCH)}: remove it and collect again") from error
            n_rows = self._index.n_rows(shard)
            shapes = {name: (n_rows, *shape) for name, shape in self._index.names.items()} | {"tokens": (n_rows,)}
            if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
                raise CheckpointError(f"{path} has other tensors than the index says: remove it and collect again")
            self._mapped[shard.file] = tensors
        return self._mapped[shard.file]

    # ---- checks

    def _shape(self, name: str) -> list[int]:
        if name not in self._index.names:
            raise RequestError(f"{name!r:.80} was not collected; {self.folder} has {', '.join(self.names[:4])}, …")
        return self._index.names[name]

    def _text(self, prompt: int) -> int:
        return self._index.prompts[check_index("prompt", prompt, len(self))]

    def _rows(self, text: int, positions: int | Sequence[int] | None) -> list[int]:
        """Which of a text's rows are at these positions."""
        kept, length = self._index.positions[text], self._index.lengths[text]
        if positions is None:
            return list(range(len(kept)))
        given = plain_number(positions)
        wanted = [given] if isinstance(given, int) else given
        each = [check_index("position", position, length) for position in wanted]
        absent = [position for position in each if position not in kept]
        if absent:
            raise RequestError(f"position {absent[0]} of a text of {length} tokens was not collected")
        return [kept.index(position) for position in each]
