"""The categories of unsafe content that each guard was trained on, and files with custom ones.

Prompts contain the short names that the models were trained with; reports show the long names of
Meta's model cards.
"""

import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_ref.errors import RequestError
from llama_ref.files import named_in_request, read_small

CODE = re.compile(r"[A-Z]\d+")
LINE = re.compile(r"([A-Z]\d+)\s*:\s*(\S.*)")
FILE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Category:
    """One category. The prompt contains `code`, `name` and, if there is one, `description`.

    `long_name` is for reports; "" means the same as `name`. Raises RequestError for a code that is
    not a capital letter and a number (the form that is recognised in answers), and for a name that
    is empty or has several lines.
    """

    code: str
    name: str
    description: str = ""
    long_name: str = ""

    def __post_init__(self) -> None:
        if not CODE.fullmatch(self.code):
            raise RequestError(f"a category's code is {self.code!r:.60}, expected a capital letter and a number, such as S1")
        if len(self.name.splitlines()) != 1 or not self.name.strip():
            raise RequestError(f"the name of category {self.code} is {self.name!r:.60}, expected one line of text")

    @property
    def title(self) -> str:
        """The category's name in reports."""
        return self.long_name or self.name


def _numbered(*names: str) -> tuple[Category, ...]:
    return tuple(Category(f"S{i}", name, long_name=LONG_NAMES.get(name, "")) for i, name in enumerate(names, 1))


LONG_NAMES = {
    "Sex Crimes": "Sex-Related Crimes",
    "Child Exploitation": "Child Sexual Exploitation",
    "Self-Harm": "Suicide & Self-Harm",
}
GUARD_3_8B = _numbered(
    "Violent Crimes",
    "Non-Violent Crimes",
    "Sex Crimes",
    "Child Exploitation",
    "Defamation",
    "Specialized Advice",
    "Privacy",
    "Intellectual Property",
    "Indiscriminate Weapons",
    "Hate",
    "Self-Harm",
    "Sexual Content",
    "Elections",
    "Code Interpreter Abuse",
)
GUARD_3 = GUARD_3_8B[:13]
GUARD_2 = _numbered(*(category.name for category in GUARD_3[:12] if category.name != "Defamation"))


def read_categories(path: str | Path) -> tuple[Category, ...]:
    """Read categories from a file: lines "S1: Name", each with an optional indented description.

    Empty lines, and lines that begin with "#", are ignored. Raises RequestError for a file that
    cannot be read, has a different format, or has no categories.
    """
    with named_in_request(path, "the categories") as file:
        text = read_small(file, FILE_LIMIT_BYTES, "a list of categories").decode()
    found: list[tuple[str, str, list[str]]] = []  # code, name, lines of the description
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line[0].isspace() and found:
            found[-1][2].append(line)
        elif match := LINE.fullmatch(line.rstrip()):
            found.append((match[1], match[2], []))
        else:
            raise RequestError(f'line {number} of {path} is {line!r:.60}, expected "S1: Name", or an indented description')
    categories = [Category(code, name, textwrap.dedent("\n".join(lines))) for code, name, lines in found]
    return checked(categories, str(path))


def checked(categories: Sequence[Category], where: str = "the list") -> tuple[Category, ...]:
    """Check a list of categories and return it.

    Raises RequestError for an empty list or a duplicate code.
    """
    codes = [category.code for category in categories]
    if not codes:
        raise RequestError(f'{where} has no categories, expected lines such as "S1: Violent Crimes"')
    if twice := next((code for code in codes if codes.count(code) > 1), None):
        raise RequestError(f"{where} has the category {twice} twice, expected each code once")
    return tuple(categories)


def without(categories: Sequence[Category], codes: Collection[str]) -> tuple[Category, ...]:
    """The categories without those with these codes; codes are not renumbered.

    Raises RequestError for an unknown code.
    """
    known = [category.code for category in categories]
    if unknown := [code for code in codes if code not in known]:
        raise RequestError(f"there is no category {unknown[0]!r:.60} to exclude, expected some of {', '.join(known)}")
    return checked([category for category in categories if category.code not in codes], "after exclusions, the list")
