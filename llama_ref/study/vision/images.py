"""Images in studied texts: check them, cut them into tiles, and encode them for a pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from llama_ref.chat import NO_IMAGES
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.image_prompts import show_images
from llama_ref.decoding.row import Row
from llama_ref.errors import RequestError
from llama_ref.images import Tiles, load_tiles
from llama_ref.kv_cache import ImageKeys, KVCache
from llama_ref.model import Transformer
from llama_ref.vision import VisionTransformer

if TYPE_CHECKING:
    from llama_ref.images import ImageSource

Images: TypeAlias = Sequence["ImageSource"] | Sequence[Sequence["ImageSource"]]  # of one text, or of each

EXPECTED = "expected a list of paths, files' bytes or Pillow images; for several texts, one such list for each"


def tiles_of_texts(model: Transformer, texts: Sequence[Tensor], images: Images | None) -> list[list[Tiles]]:
    """Each text's images, cut into tiles. Raises RequestError unless there is one for each image place in its ids."""
    rows = _rows(images, len(texts))
    if not any(rows) and not isinstance(model, VisionTransformer):
        return [[] for _ in texts]
    model = check_reads_images(model)
    for i, (text, own) in enumerate(zip(texts, rows, strict=True)):
        n_places = int((text == model.image_id).sum())
        if n_places != len(own):
            where = f"text {i} has" if len(texts) > 1 else "tokens has"
            raise RequestError(
                f"{where} {n_places} places for images (id {model.image_id}), but {len(own)} images: give one for each, as"
                " llama.encode(text, n_images=1) does"
            )
    args = model.args
    assert args.vision_chunk_size is not None
    return [[load_tiles(image, args.vision_chunk_size, args.vision_max_num_chunks) for image in own] for own in rows]


def check_reads_images(model: Transformer) -> VisionTransformer:
    """Return the model. Raises RequestError if it cannot read images."""
    if not isinstance(model, VisionTransformer):
        raise RequestError(NO_IMAGES)
    return model


def cache_showing(model: Transformer, texts: Sequence[Tensor], images: Sequence[Sequence[Tiles]]) -> KVCache | None:
    """An empty cache for the texts, with the keys and values of their encoded images; None if there are no images."""
    if not any(images):
        return None
    rows = [Row(text.tolist(), 0, own) for text, own in zip(texts, images, strict=True)]
    cache = new_cache(model, len(texts), max(map(len, texts)))
    kept = _kept.get()
    cache.images = next((one.keys for one in kept or [] if one.is_of(model, rows)), None)
    if cache.images is None:
        show_images(model, rows, cache, 0)
        if kept is not None and cache.images is not None:
            kept.append(_Encoded(model, rows, cache.images))
    return cache


@contextmanager
def encoding_once() -> Iterator[None]:
    """In the block, encode images only once for repeated studies of the same texts and images.

    The model must not change in the block.
    """
    kept = _kept.get()
    token = _kept.set([] if kept is None else kept)
    try:
        yield
    finally:
        _kept.reset(token)


@dataclass(frozen=True)
class _Encoded:
    """Texts with their images already encoded."""

    model: Transformer
    rows: Sequence[Row]
    keys: ImageKeys

    def is_of(self, model: Transformer, rows: Sequence[Row]) -> bool:
        return model is self.model and len(rows) == len(self.rows) and all(map(_are_same, rows, self.rows))


_kept: ContextVar[list[_Encoded] | None] = ContextVar("_kept", default=None)


def _are_same(a: Row, b: Row) -> bool:
    """Whether two rows have the same text and images."""
    images = zip(a.images, b.images, strict=False)
    return (
        a.prompt == b.prompt
        and len(a.images) == len(b.images)
        and all(one.grid == other.grid and torch.equal(one.pixels, other.pixels) for one, other in images)
    )


def _rows(images: Images | None, n_texts: int) -> "list[list[ImageSource]]":
    """The images of each text."""
    if images is None:
        return [[] for _ in range(n_texts)]
    if not isinstance(images, Sequence) or isinstance(images, str | bytes | Tiles):
        raise RequestError(f"images is {images!r:.60}, {EXPECTED}")
    are_lists = [isinstance(each, Sequence) and not isinstance(each, str | bytes | Tiles) for each in images]
    rows = list(images) if any(are_lists) else [images]
    if len(rows) != n_texts or not (all(are_lists) or rows == [images]):
        raise RequestError(f"images has {len(images)} values for {n_texts} texts, {EXPECTED}")
    return [list(row) for row in rows]  # type: ignore[arg-type]  # each is a sequence, as checked
