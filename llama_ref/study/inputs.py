"""What is to be studied: a prompt's ids, a token by its text, a layer and a head; and how tokens are shown."""

import os
import re
from collections.abc import Sequence
from numbers import Integral

from torch import Tensor

from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.study.hooks import check_model
from llama_ref.study.trace import as_tokens
from llama_ref.tokenizer import Tokenizer

MOST_SHOWN = 8  # tokens of a text in a message


def one_row(model: Transformer, tokens: Sequence[int] | Tensor) -> Tensor:
    """A single sequence of ids, (T,) or (1, T), as (1, T) on the model's device. Raises RequestError for what is none."""
    check_model(model)
    rows = as_tokens(model, tokens)
    if len(rows) != 1:
        raise RequestError(f"tokens are {len(rows)} sequences, expected one: study them in turn")
    return rows


def check_token(model: Transformer, token: int) -> int:
    """The same id. Raises RequestError for one outside the model's vocabulary."""
    if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < model.args.vocab_size:
        raise RequestError(f"token {token!r:.40} is not in the vocabulary, which has ids 0 to {model.args.vocab_size - 1}")
    return int(token)


def check_index(what: str, index: int, count: int) -> int:
    """The index of one of `count` things; from the end where it is negative. Raises RequestError for one that is not there."""
    if isinstance(index, bool) or not isinstance(index, Integral) or not -count <= index < count:
        there = f"0 to {count - 1}" if count > 1 else "only 0"
        raise RequestError(f"{what} is {index!r:.40}, expected a whole number: there is {there}")
    return int(index) % count


def refuse_empty(**texts: str | None) -> None:
    """Raise RequestError for a text that has nothing to study: before a long load, say."""
    for name, text in texts.items():
        if text == "":
            example = '" Paris"' if name.lstrip("-") in ("target", "other") else '"The capital of France is"'
            raise RequestError(f"{name} is an empty text, expected one to study, such as {example}")


def refuse_divided(pipeline_parallel_size: int = 1) -> None:
    """Raise RequestError where several processes were started, or asked for, to share a model."""
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes != "1" or pipeline_parallel_size != 1:
        found = f"{n_processes} processes" if n_processes != "1" else f"--pipeline_parallel_size {pipeline_parallel_size}"
        raise RequestError(f"{found}: a model is studied whole, in one process; start it without torchrun and that flag")


def prompt_tokens(llama: Llama, prompt: str, name: str = "prompt") -> list[int]:
    """Ids of a prompt, begin-of-text in front. Raises RequestError for one that is empty or longer than max_seq_len."""
    refuse_empty(**{name: prompt})
    tokens = llama.encode(prompt)
    if len(tokens) > llama.max_seq_len:
        raise RequestError(
            f"the {name} has {len(tokens):,} tokens, but max_seq_len is {llama.max_seq_len:,}: shorten it, or ask for more"
        )
    return tokens


def first_token(tokenizer: Tokenizer, text: str, name: str = "target") -> tuple[int, str | None]:
    """(id of a text's first token, what to tell of that where there are more). Raises RequestError for an empty text."""
    refuse_empty(**{name: text})
    tokens = tokenizer.encode(text, bos=False, eos=False)
    if len(tokens) == 1:
        return tokens[0], None
    first, cut = label(tokenizer, tokens[0]), "│".join(label(tokenizer, token) for token in tokens[:MOST_SHOWN])
    more = "│…" if len(tokens) > MOST_SHOWN else ""
    return tokens[0], f"{name} is {len(tokens)} tokens, {cut}{more}: the first, {first}, is taken"


def check_over(over: str, expected: str = "layer,position or layer,head") -> str:
    """The axes of a grid, "layer,head", "layer*head" or "layer x head", as "layer×head".

    Raises RequestError for axes that there are not; `expected` says how a caller spells those that there are.
    """
    axes = "×".join(part.strip() for part in re.split(r"[,*×]|\sx\s", str(over)))
    if axes not in ("layer×position", "layer×head"):
        raise RequestError(f"over is {over!r:.60}, expected {expected}")
    return axes


def check_same_length(tokenizer: Tokenizer, clean: list[int], corrupted: list[int]) -> None:
    """Raise RequestError for two texts whose tokens do not stand side by side."""
    if len(clean) != len(corrupted):
        shown = ["│".join(label(tokenizer, token) for token in tokens) for tokens in (clean, corrupted)]
        raise RequestError(
            f"clean has {len(clean)} tokens, {shown[0]:.200}, but corrupted has {len(corrupted)}, {shown[1]:.200}: word them so"
            " that both have as many"
        )


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as a person may read it on one line: `␣Paris`, `\\n`, `한`, `<0xEC>` for bytes that are no whole character."""
    if token >= tokenizer.n_words:  # a row of the model's that the tokenizer has no text for
        return f"<id {token}>"
    return readable(tokenizer.token_bytes(token))


def readable(text: bytes) -> str:
    """UTF-8 with spaces shown, what no terminal prints escaped, and bytes that are no character as <0xEC>."""
    return "".join(map(_readable, text.decode("utf-8", errors="surrogateescape")))


def _readable(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # how `surrogateescape` keeps a byte that is no character's
        return f"<0x{ord(char) - 0xDC00:02X}>"
    if char == " ":
        return "␣"
    return char if char.isprintable() else char.encode("unicode_escape").decode()
