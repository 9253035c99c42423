"""Texts that matplotlib can draw: a font for every character, or an escape if no font has it.

No single font has the characters of all tokens, and matplotlib draws a box where a glyph is missing
and reads `$…$` as mathematics. So every text is drawn with `style(text)`, which names the fonts that
it needs and turns mathematics off. A character that no installed font has is escaped: `\\ud55c`.
A text with these escapes is called "drawable".
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
UNUSABLE = re.compile(r"\.?Last ?Resort|cm[a-z]+10$")  # fonts of boxes only, and TeX's fonts with their own encoding
LIKE_BASE = re.compile(r"Sans|Gothic|CJK", re.IGNORECASE)
LONGEST, LONGEST_IN_TEXT = 7.0, 12.0  # em: maximum length of a token's label, on an axis and in a sentence
SHOWN = 240  # characters of a text in a caption
LEFT_TO_RIGHT = "\u200e"  # the zero-width left-to-right mark
INVISIBLE = f" \n{LEFT_TO_RIGHT}"  # allowed in a drawable text without a visible glyph
EM = 64  # pixels: size at which glyphs are measured


def token_label(tokenizer: Tokenizer, token: int, longest: float = LONGEST) -> str:
    """A token's label as tables show it, drawable and cut to `longest` em."""
    return _left_to_right(cut(drawable(label(tokenizer, token)), longest))


def quoted(tokenizer: Tokenizer, token: int) -> str:
    """A token's label in quotes, for a sentence."""
    return f"“{token_label(tokenizer, token, LONGEST_IN_TEXT)}”"


def prompt(tokenizer: Tokenizer, *texts: Sequence[int], names: Sequence[str] = ("Text",)) -> str:
    """A line for each text, its tokens separated by │; a long text is cut at the front.

    A last line explains escaped characters, if there are any.
    """
    lines = [f"{name}: {_separated(tokenizer, tokens)}" for name, tokens in zip(names, texts, strict=True)]
    chars = {char for tokens in texts for token in set(tokens) for char in label(tokenizer, token)}
    if any(_family_of(char) is None for char in chars):
        lines.append("\\u…: a character that no installed font has.")
    return "\n".join(lines)


def _separated(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    shown: list[str] = []
    for token in reversed(tokens):
        shown.insert(0, token_label(tokenizer, token, LONGEST_IN_TEXT))
        if sum(map(len, shown)) > SHOWN:
            break
    return "│".join(["…", *shown] if len(shown) < len(tokens) else shown)


def drawable(text: str) -> str:
    """Escape characters that no font has; put a dotted circle before a leading combining mark."""
    out = "".join(char if _family_of(char) else char.encode("unicode_escape").decode() for char in text)
    return f"◌{out}" if out and unicodedata.category(out[0]).startswith("M") else out


def _left_to_right(text: str) -> str:
    """Put marks around right-to-left letters, so that they do not swap places with their neighbours."""
    out, was_rtl = "", False
    for char in text:
        kind = unicodedata.bidirectional(char)
        is_rtl = was_rtl if kind == "NSM" else kind in ("R", "AL", "AN")  # a combining mark follows its letter
        out += (LEFT_TO_RIGHT if is_rtl != was_rtl else "") + char
        was_rtl = is_rtl
    return out + LEFT_TO_RIGHT if was_rtl else out


def style(text: str) -> dict[str, Any]:
    """Keyword arguments that make matplotlib draw a drawable text literally."""
    return {"family": _families(text), "parse_math": False}


def em(text: str) -> float:
    """Width of a drawable text's longest line, in em."""
    return max(sum(_advance(char, _family_of(char) or BASE) for char in line) for line in text.split("\n"))


def cut(text: str, longest: float) -> str:
    """Cut each line of a drawable text to `longest` em, with … at the end."""
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
    """Wrap a text to lines of at most `longest` em, at spaces and between tokens."""
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
    """Silence matplotlib's warnings about font weights: a bold font is better than none."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _families(text: str) -> list[str]:
    """Fonts for the characters of a text, in the order in which matplotlib should try them."""
    return list(dict.fromkeys([BASE, *(_family_of(char) or BASE for char in text)]))


def _family_of(char: str) -> str | None:
    """A font that can draw a character, or None."""
    from matplotlib.font_manager import fontManager

    return BASE if char in INVISIBLE else _find_family(char, len(fontManager.ttflist))


@lru_cache(maxsize=1 << 14)
def _find_family(char: str, n_fonts: int) -> str | None:
    """Find the best font for a character; `n_fonts` invalidates the cache when fonts are added."""
    from matplotlib.font_manager import fontManager

    names = {font.name for font in fontManager.ttflist if not UNUSABLE.match(font.name)}
    regular = {font.name for font in fontManager.ttflist if font.weight == 400 and font.style == "normal"}
    ordered = sorted(names, key=lambda name: (name != BASE, name not in regular, not LIKE_BASE.search(name), name))
    return next((name for name in ordered if ord(char) in _characters(_file(name)) and _has_ink(char, _file(name))), None)


def _file(family: str) -> str:
    """The file that matplotlib itself uses for a family."""
    from matplotlib.font_manager import FontProperties, fontManager

    return fontManager.findfont(FontProperties(family=[family]), fallback_to_default=True)


@lru_cache(maxsize=4096)
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):  # a removed or broken font
        return frozenset()


def _has_ink(char: str, file: str) -> bool:
    """Whether a glyph has an outline: some glyphs are blank, and coloured emoji have no outlines."""
    from matplotlib.font_manager import get_font

    font = get_font(file)
    font.set_size(EM, 72)
    font.load_char(ord(char))
    return len(font.get_path()[0]) > 0


@lru_cache(maxsize=1 << 14)
def _advance(char: str, family: str) -> float:
    """Advance width of a character, in em."""
    from matplotlib.font_manager import get_font

    if char == LEFT_TO_RIGHT:
        return 0.0
    font = get_font(_file(family))
    font.set_size(EM, 72)
    return font.load_char(ord(char)).linearHoriAdvance / (EM << 16)  # in 65536ths of a pixel
