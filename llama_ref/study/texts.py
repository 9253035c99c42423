"""Token ids of texts: checked, and padded so that texts of different lengths run in one pass.

Padding is on the right, where causal attention never looks. It repeats a text's last id, so that its
values are finite if the text's are: a NaN spreads even where it is masked.
"""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.images import Tiles
from llama_ref.kv_cache import KVCache
from llama_ref.model import Cache, Transformer
from llama_ref.study.passes.hooks import Pass, attached
from llama_ref.study.vision.images import Images, cache_showing, tiles_of_texts
from llama_ref.vision import VisionTransformer

Text = Sequence[int] | Tensor
Texts = Text | Sequence[Text]

EXPECTED = "expected token ids: a list, a list of lists, or a LongTensor (T,) or (B, T)"


@dataclass(frozen=True)
class Batch:
    """Texts as ids (B, T) on the model's device, with the length and the images of each."""

    ids: Tensor
    lengths: list[int]
    images: list[list[Tiles]]

    @classmethod
    def from_texts(cls, model: Transformer, texts: Sequence[Tensor], images: Images | None = None) -> "Batch":
        """Pad texts, such as `as_texts` returns. Raises RequestError if the images do not match them."""
        lengths = [len(text) for text in texts]
        places = torch.arange(max(lengths), device="cpu")
        padded = torch.stack([text[places.clamp(max=len(text) - 1)] for text in texts])
        return cls(padded.to(model.device), lengths, tiles_of_texts(model, texts, images))

    @property
    def padding(self) -> Tensor | None:
        """Which positions are padding: bool (B, T), or None if none are."""
        T = self.ids.shape[1]
        if min(self.lengths) == T:
            return None
        lengths = torch.tensor(self.lengths, device="cpu").to(self.ids.device)
        return torch.arange(T, device=self.ids.device) >= lengths[:, None]

    def hidden(self, model: Transformer, cache: Cache | None = None) -> Tensor:
        """Run all texts and return the final norm (B, T, D); its values at padding have no meaning.

        Images are read from a cache, so texts with images get a new one.
        """
        padding = self.padding
        return self._run(model, cache, None if padding is None else _Marker(padding))

    def show(self, model: Transformer, cache: Cache | None = None) -> None:
        """Run all texts only for visitors; without a cache, layers after the last watched one are not run."""
        self._run(model, cache, _Marker(self.padding, is_read=False))

    def _run(self, model: Transformer, cache: Cache | None, marker: "_Marker | None") -> Tensor:
        if isinstance(cache, KVCache):
            cache.prompt_ends = None  # the tokens are a text of their own, not what a model adds to a prompt
        if any(self.images):
            texts = [row[:length] for row, length in zip(self.ids, self.lengths, strict=True)]
            cache = cache_showing(model, texts, self.images)
        with attached(model, marker) if marker else nullcontext():
            return model.hidden(self.ids, cache)

    def last(self, values: Tensor) -> Tensor:
        """The values of each text's last token: (B, T, …) -> (B, …)."""
        rows = torch.arange(len(self.lengths), device=values.device)
        return values[rows, torch.tensor(self.lengths, device="cpu").to(values.device) - 1]


class _Marker:
    """A visitor that marks the padding of a pass, and whether its output is read."""

    edits, in_path = False, False

    def __init__(self, padding: Tensor | None, *, is_read: bool = True):
        self.padding, self.is_read = padding, is_read

    def wants(self, name: str) -> bool:
        return False

    def begin(self, run: Pass) -> None:
        if self.padding is not None:
            run.mark_padding(self.padding)
        run.is_read = self.is_read

    def visit(self, name: str, value: Tensor, run: Pass | None) -> Tensor:
        return value


# ---- checks


def as_texts(model: Transformer, tokens: Texts) -> list[Tensor]:
    """Each text's ids (T,), on the CPU. Raises RequestError for ids outside the vocabulary."""
    texts = [_ids(text, tokens) for text in _separate(tokens)]
    for i, text in enumerate(texts):
        if not len(text):
            what = "tokens is" if len(texts) == 1 else f"text {i} of tokens is"
            raise RequestError(f"{what} empty; a pass needs at least one token, such as begin-of-text")
        n_ids = model.args.vocab_size + isinstance(model, VisionTransformer)  # the last is an image's place
        unknown = [id for id in (int(text.min()), int(text.max())) if not 0 <= id < n_ids]
        if unknown:
            raise RequestError(f"tokens contains {unknown[0]}; the vocabulary has 0 to {model.args.vocab_size - 1}")
    return texts


def _separate(tokens: Texts) -> Sequence[Text]:
    """A list of texts, from one text or several."""
    if isinstance(tokens, Tensor):
        tokens = tokens.cpu()
        return [tokens] if tokens.dim() != 2 else list(tokens) or [tokens.flatten()]
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise RequestError(f"tokens is {tokens!r:.60}, {EXPECTED}")
    are_texts = any(isinstance(part, Sequence | Tensor) for part in tokens)
    return tokens if are_texts else [tokens]  # type: ignore[return-value, list-item]  # checked above


def _ids(text: Text, tokens: Texts) -> Tensor:
    """One text as a LongTensor (T,) on the CPU."""
    if isinstance(text, Tensor):
        is_whole = not (text.is_floating_point() or text.is_complex() or text.dtype == torch.bool)
        if text.dim() != 1 or not is_whole:
            raise RequestError(f"tokens is a tensor {tuple(text.shape)} of {text.dtype}, {EXPECTED}")
        return text.to("cpu", torch.long)
    is_list = isinstance(text, Sequence) and not isinstance(text, str)
    if is_list and all(isinstance(id, Integral) and not isinstance(id, bool) for id in text):
        with suppress(OverflowError, RuntimeError, ValueError):  # an integer of more than 64 bits
            return torch.tensor(text, dtype=torch.long, device="cpu")
    raise RequestError(f"tokens is {tokens!r:.60}, {EXPECTED}")
