"""Keep a judged text from passing for other parts of the guard's prompt: its markers, and other turns."""

import re
import unicodedata

UNSEEN = "\u200b"  # stands for any character that shows nothing
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufe00\ufe01\ufe0e\ufe0f"  # such characters that are not called formats
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
GAP = rf"[\s_{UNSEEN}]*"
ORNAMENT = rf"(?:[^\S{LINE_ENDS}]|[{UNSEEN}*_~`#|\"'+-])*"  # before a role: blanks, bullets, bold type


def _spread(*words: str) -> str:
    """A pattern of words, with unseen characters among their letters."""
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
    """A text, stripped, in which nothing reads as the end of the conversation or as another turn.

    `<END CONVERSATION>` becomes `(END CONVERSATION)`, and so do its relatives and Guard 2's `[/INST]`; a
    line that begins with `User:`, `Agent:` or `Assistant:` is quoted with `> `. So is what looks alike
    by full-width letters and signs, or by characters that show nothing. The words stay: they are judged.
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
    """A text of the same length in plain letters: full-width ones as usual, unseen ones all alike."""
    return text.translate({ord(letter): _plain(letter) for letter in set(text)})


def _plain(letter: str) -> str:
    if unicodedata.category(letter) == "Cf" or letter in BLANK:
        return UNSEEN
    usual = unicodedata.normalize("NFKC", letter)
    return usual if len(usual) == 1 else letter
