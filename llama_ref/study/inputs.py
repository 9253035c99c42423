"""Check a study's arguments (tokens, layers, heads, prompts), and show tokens as text."""

import os
import re
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.numbers import is_whole
from llama_ref.study.passes.hooks import check_part
from llama_ref.study.texts import Text, as_texts
from llama_ref.tokenizer import Tokenizer

T = TypeVar("T")

MOST_SHOWN = 8  # tokens of a text in a message


def one_row(model: Transformer, tokens: Text) -> Tensor:
    """One sequence of ids, (T,) or (1, T), as (1, T) on the model's device. Raises RequestError."""
    check_part(model)
    texts = as_texts(model, tokens)
    if len(texts) != 1:
        raise RequestError(
            f"tokens are {len(texts)} sequences, expected one: study them one by one (trace, logit_lenses and patch_grids take"
            " several)"
        )
    return texts[0][None].to(model.device)


def check_token(model: Transformer, token: int) -> int:
    """Return the id. Raises RequestError if it is outside the model's vocabulary."""
    if not is_whole(token) or not 0 <= token < model.args.vocab_size:
        raise RequestError(f"token {token!r:.40} is not in the vocabulary, which has ids 0 to {model.args.vocab_size - 1}")
    return int(token)


def check_index(what: str, index: int, count: int) -> int:
    """Return the index, counted from 0. Raises RequestError unless -count <= index < count."""
    if not is_whole(index) or not -count <= index < count:
        expected = f"a whole number from 0 to {count - 1}" if count > 1 else "0"
        raise RequestError(f"{what} is {index!r:.40}, expected {expected}")
    return int(index) % count


def check_count(what: str, given: int, least: int = 0) -> int:
    """Return the number. Raises RequestError unless it is a whole number of at least `least`."""
    if not is_whole(given) or given < least:
        raise RequestError(f"{what} is {given!r:.40}, expected a whole number from {least}")
    return int(given)


def seeded(seed: int) -> torch.Generator:
    """A random number generator on the CPU. Raises RequestError unless `seed` is a whole number of at most 64 bits."""
    if not is_whole(seed) or not -(1 << 63) <= int(seed) < 1 << 64:
        raise RequestError(f"seed is {seed!r:.40}, expected a whole number of at most 64 bits")
    return torch.Generator("cpu").manual_seed(int(seed))


def one_each(what: str, given: T | Sequence[T], n: int) -> list[T]:
    """One value for each of n texts: as given, or the same for all. Raises RequestError."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [given] * n
    if len(given) != n:
        raise RequestError(f"{what} has {len(given)} values, expected one for each of the {n} texts, or one for all")
    return list(given)


def check_not_empty(**texts: str | None) -> None:
    """Raise RequestError for an empty text, before a model is loaded."""
    for name, text in texts.items():
        if text == "":
            example = '" Paris"' if name.lstrip("-") in ("target", "other", "answer") else '"The capital of France is"'
            raise RequestError(f"{name} is empty, expected a text such as {example}")


def check_one_process() -> None:
    """Raise RequestError if torchrun started several processes."""
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes != "1":
        raise RequestError(
            f"{n_processes} processes: a study needs the whole model in one; start it without torchrun, or call study.trace"
            " in a script"
        )


def prompt_tokens(
    llama: Llama, prompt: str, name: str = "prompt", *, special_tokens: bool = False, has_image: bool = False
) -> list[int]:
    """Ids of a prompt, after begin-of-text; `special_tokens` as in `Llama.encode`.

    With `has_image`, an image's place is after begin-of-text, or where the prompt has the special
    token <|image|>. Raises RequestError if the prompt is empty or too long.
    """
    check_not_empty(**{name: prompt})
    tokens = llama.encode(prompt, special_tokens=special_tokens, n_images=int(has_image))
    n_places = tokens.count(llama.image_id) if has_image and llama.image_id is not None else 0
    if n_places > 1:
        raise RequestError(f"the prompt has <|image|> {n_places} times, expected one place for the image")
    if len(tokens) > llama.max_seq_len:
        raise RequestError(
            f"the {name} has {len(tokens):,} tokens, but max_seq_len is {llama.max_seq_len:,}: shorten it, or raise max_seq_len"
        )
    return tokens


def first_token(tokenizer: Tokenizer, text: str, name: str = "target") -> tuple[int, str | None]:
    """The id of a text's first token, and a remark if there are more tokens. Raises RequestError if the text is empty."""
    check_not_empty(**{name: text})
    tokens = tokenizer.encode(text, bos=False, eos=False)
    if len(tokens) == 1:
        return tokens[0], None
    first, cut = label(tokenizer, tokens[0]), "│".join(label(tokenizer, token) for token in tokens[:MOST_SHOWN])
    more = "│…" if len(tokens) > MOST_SHOWN else ""
    return tokens[0], f"{name} is {len(tokens)} tokens, {cut}{more}: only the first, {first}, is used"


GRIDS = ("layer×position", "layer×head", "layer×position×head")


def check_over(over: str) -> str:
    """Normalize the axes of a grid: "layer,head", "layer*head" and "layer x head" to "layer×head".

    Raises RequestError for unknown axes.
    """
    axes = "×".join(part.strip() for part in re.split(r"[,*×]|\sx\s", str(over)))
    if axes not in GRIDS:
        words = [grid.replace("×", ",") for grid in GRIDS]
        raise RequestError(f"over is {over!r:.60}, expected {' or '.join(words)}{did_you_mean(axes.replace('×', ','), words)}")
    return axes


def check_same_length(tokenizer: Tokenizer, clean: list[int], corrupted: list[int]) -> None:
    """Raise RequestError unless both texts have the same number of tokens."""
    if len(clean) != len(corrupted):
        shown = ["│".join(label(tokenizer, token) for token in tokens) for tokens in (clean, corrupted)]
        raise RequestError(
            f"clean has {len(clean)} tokens, {shown[0]:.200}, but corrupted has {len(corrupted)}, {shown[1]:.200}: reword one"
            " so that both have the same number"
        )


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as text on one line: `␣Paris`, `\\n`, `한`, `<0xEC>` for part of a character.

    In a vision release the id after the tokenizer's last one marks an image's place.
    """
    if token == tokenizer.n_words:
        return "<|image|>"
    if token >= tokenizer.n_words:  # the model's vocabulary may be larger than the tokenizer's
        return f"<id {token}>"
    return readable(tokenizer.token_bytes(token))


def readable(text: bytes) -> str:
    """Decode UTF-8: spaces as ␣, unprintable characters escaped, invalid bytes as <0xEC>."""
    return "".join(map(_readable, text.decode("utf-8", errors="surrogateescape")))


def _readable(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # an invalid byte, as `surrogateescape` keeps it
        return f"<0x{ord(char) - 0xDC00:02X}>"
    if char == " ":
        return "␣"
    return char if char.isprintable() else char.encode("unicode_escape").decode()
