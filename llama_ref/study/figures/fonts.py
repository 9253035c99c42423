"""Tokens as a picture can show them: in fonts that have their letters, which no one font does, or escaped.

matplotlib takes `$…$` for mathematics and draws a box where a font has no glyph: every text says that it is none, and names
the fonts that have its characters. What no installed font has is written as Python does, `\\ud55c`.
"""

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from llama_ref.study.inputs import label
from llama_ref.tokenizer import Tokenizer

BASE = "DejaVu Sans"  # comes with matplotlib
NO_LETTERS = re.compile(r"\.?Last ?Resort|cm[a-z]+10$")  # a box for every character; TeX's fonts, whose codes are their own
LIKE_BASE = re.compile(r"Sans|Gothic|CJK", re.IGNORECASE)
LONGEST, LONGEST_IN_TEXT = 7.0, 12.0  # em: of a token's label
SHOWN = 240  # characters of a text in a caption
LEFT_TO_RIGHT = "\u200e"  # a mark of no width
UNSEEN = f" \n{LEFT_TO_RIGHT}"  # what may stand in a drawable text without a glyph to see
EM = 64  # pixels that glyphs are measured at


def token_label(tokenizer: Tokenizer, token: int, longest: float = LONGEST) -> str:
    """A token as tables show it, drawable and cut to so many em."""
    return _left_to_right(cut(drawable(label(tokenizer, token)), longest))


def quoted(tokenizer: Tokenizer, token: int) -> str:
    """A token within a sentence."""
    return f"“{token_label(tokenizer, token, LONGEST_IN_TEXT)}”"


def prompt(tokenizer: Tokenizer, *texts: Sequence[int], names: Sequence[str] = ("Text",)) -> str:
    """A line for each text, its tokens with their borders; of a long one its end, from which the model goes on.

    Another, where there is need, on why some characters are escaped.
    """
    lines = [f"{name}: {_bordered(tokenizer, tokens)}" for name, tokens in zip(names, texts, strict=True)]
    chars = {char for tokens in texts for token in set(tokens) for char in label(tokenizer, token)}
    if any(_family_of(char) is None for char in chars):
        lines.append("\\u…: a character that no installed font has.")
    return "\n".join(lines)


def _bordered(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    shown: list[str] = []
    for token in reversed(tokens):
        shown.insert(0, token_label(tokenizer, token, LONGEST_IN_TEXT))
        if sum(map(len, shown)) > SHOWN:
            break
    return "│".join(["…"] * (len(shown) < len(tokens)) + shown)


def drawable(text: str) -> str:
    """The same text, escaped where no font has a character; a mark that would hang on nothing gets a circle to hang on."""
    out = "".join(char if _family_of(char) else char.encode("unicode_escape").decode() for char in text)
    return f"◌{out}" if out and unicodedata.category(out[0]).startswith("M") else out


def _left_to_right(text: str) -> str:
    """The same between marks where its letters run to the left: else what stands beside them would change places with them."""
    out, was_left = "", False
    for char in text:
        kind = unicodedata.bidirectional(char)
        is_left = was_left if kind == "NSM" else kind in ("R", "AL", "AN")  # a mark goes with its letter
        out += (LEFT_TO_RIGHT if is_left != was_left else "") + char
        was_left = is_left
    return out + LEFT_TO_RIGHT * was_left


def style(text: str) -> dict[str, Any]:
    """What matplotlib has to be told to draw a drawable text as it is."""
    return {"family": _families(text), "parse_math": False}


def em(text: str) -> float:
    """The width of a drawable text's longest line, in sizes of its font."""
    return max(sum(_advance(char, _family_of(char) or BASE) for char in line) for line in text.split("\n"))


def cut(text: str, longest: float) -> str:
    """As much of each line of a drawable text as so many em hold, and a sign that there was more."""
    if "\n" in text:
        return "\n".join(cut(line, longest) for line in text.split("\n"))
    if em(text) <= longest:
        return text
    room = longest - em("…")
    for end, char in enumerate(text):
        room -= em(char)
        if room < 0:
            return text[:end] + "…"
    return text


def wrapped(text: str, longest: float) -> str:
    """Lines of so many em at most, broken at spaces and at borders of tokens."""
    lines = [""]
    for piece in re.split(r"(?<=[ │\n])", text):
        if lines[-1] and em(lines[-1].rstrip() + piece.rstrip()) > longest:
            lines.append("")
        lines[-1] += piece.rstrip("\n")
        if piece.endswith("\n"):
            lines.append("")
    return "\n".join(line.rstrip(" ") for line in lines)


@contextmanager
def any_weight() -> Iterator[None]:
    """A light or bold font that has a letter is better than none: while the block lasts matplotlib does not tell of it."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _families(text: str) -> list[str]:
    """The fonts to look for each character in, one after another."""
    return list(dict.fromkeys([BASE, *(_family_of(char) or BASE for char in text)]))


def _family_of(char: str) -> str | None:
    """The font that draws a character, None where none does."""
    from matplotlib.font_manager import fontManager

    return BASE if char in UNSEEN else _find_family(char, len(fontManager.ttflist))


@lru_cache(maxsize=1 << 14)
def _find_family(char: str, n_fonts: int) -> str | None:
    """`n_fonts` is there for the cache: fonts may be added while a program runs."""
    from matplotlib.font_manager import fontManager

    names = {font.name for font in fontManager.ttflist if not NO_LETTERS.match(font.name)}
    regular = {font.name for font in fontManager.ttflist if font.weight == 400 and font.style == "normal"}
    ordered = sorted(names, key=lambda name: (name != BASE, name not in regular, not LIKE_BASE.search(name), name))
    return next((name for name in ordered if ord(char) in _characters(_file(name)) and _has_ink(char, _file(name))), None)


def _file(family: str) -> str:
    """What matplotlib itself takes for a family."""
    from matplotlib.font_manager import FontProperties, fontManager

    return fontManager.findfont(FontProperties(family=[family]), fallback_to_default=True)


@lru_cache(maxsize=4096)
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):  # a font that was removed, or is none
        return frozenset()


def _has_ink(char: str, file: str) -> bool:
    """Whether there is something to see: some glyphs are blank, and those of coloured emoji have no outline."""
    from matplotlib.font_manager import get_font

    font = get_font(file)
    font.set_size(EM, 72)
    font.load_char(ord(char))
    return len(font.get_path()[0]) > 0


@lru_cache(maxsize=1 << 14)
def _advance(char: str, family: str) -> float:
    """How far a character moves the pen, in em."""
    from matplotlib.font_manager import get_font

    if char == LEFT_TO_RIGHT:
        return 0.0
    font = get_font(_file(family))
    font.set_size(EM, 72)
    return font.load_char(ord(char)).linearHoriAdvance / (EM << 16)  # in 65536ths of a pixel
