"""Keep a judged text from imitating the markers and other turns of the guard's prompt."""

import re
import unicodedata

UNSEEN = "\u200b"  # replaces every invisible character
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufe00\ufe01\ufe0e\ufe0f"  # invisible, but not in the category Cf
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
GAP = rf"[\s_{UNSEEN}]*"
ORNAMENT = rf"(?:[^\S{LINE_ENDS}]|[{UNSEEN}*_~`#|\"'+-])*"  # around a role: blanks, bullets, Markdown


def _spread(*words: str) -> str:
    """A pattern of words, with invisible characters allowed between letters."""
    return GAP.join(f"{UNSEEN}*".join(word) for word in words)


MARKERS = re.compile(
    rf"<{GAP}(?:/{GAP})?(?:{_spread('BEGIN')}|{_spread('END')}){GAP}"
    rf"(?:{_spread('UNSAFE', 'CONTENT', 'CATEGORIES')}|{_spread('CONVERSATION')}){GAP}>"
    rf"|\[{GAP}(?:/{GAP})?{_spread('INST')}{GAP}\]",
    re.IGNORECASE,
)
ROLES = "|".join(map(_spread, ("user", "agent", "assistant")))
FORGED_TURN = re.compile(rf"(?<=[{LINE_ENDS}])(?={ORNAMENT}(?:{ROLES}){ORNAMENT}:)", re.IGNORECASE)


def as_text(text: str) -> str:
    """Strip a text and change parts that read as the end of the conversation or another turn.

    `<END CONVERSATION>` becomes `(END CONVERSATION)`; other markers and Guard 2's `[/INST]` are
    changed in the same way. A line that begins with `User:`, `Agent:` or `Assistant:` is quoted
    with `> `. Lookalikes with full-width or invisible characters are changed too. All words are
    kept, because they are what is judged.
    """
    text = text.strip()
    plain = _skeleton(text)
    letters = list(text)
    for match in MARKERS.finditer(plain):
        letters[match.start()], letters[match.end() - 1] = "()"
    for match in FORGED_TURN.finditer(plain):
        letters[match.start()] = f"> {letters[match.start()]}"
    return "".join(letters)


def _skeleton(text: str) -> str:
    """Normalize each letter of a text: full-width ones to ASCII, invisible ones to UNSEEN."""
    return text.translate({ord(letter): _plain(letter) for letter in set(text)})


def _plain(letter: str) -> str:
    if unicodedata.category(letter) == "Cf" or letter in BLANK:
        return UNSEEN
    usual = unicodedata.normalize("NFKC", letter)
    return usual if len(usual) == 1 else letter
