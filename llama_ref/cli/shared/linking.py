"""Shared by `link` and `download`: read Meta's signed link without showing or storing it."""

import getpass
import os
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.terminal import note
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.download.link import SignedLink

VARIABLE = "LLAMA_REF_LINK"
LINK_LIMIT_BYTES = 1 << 16  # a link has about 700
WAYS = f"at the prompt in a terminal, with --file FILE, or in the environment variable {VARIABLE}"


def not_a_link(word: str) -> str:
    """Read a release's name or a file. Raises RequestError for the link itself, without showing it."""
    if "://" in word or "Policy=" in word:
        raise RequestError(
            f"this is the link itself, which the shell's history now keeps: remove it there, and give the link {WAYS}"
        )
    return word


Release = Annotated[str, Flag("release, such as Llama3.2-1B-Instruct", read=not_a_link)]
LinkFile = Annotated[
    str | None,
    Flag(
        "file that holds the signed link; - is standard input",
        metavar="FILE",
        unset=f"${VARIABLE}, or a prompt",
        read=not_a_link,
    ),
]
Link = Annotated[
    str | None,
    Flag("the link itself, in quotes; the shell's history keeps it, and other users see it in the process list", metavar="URL"),
]
AllowHost = Annotated[
    list[str] | tuple[()],
    Flag(
        "also allow this host besides Meta's, such as a mirror; may be given several times",
        metavar="HOST[:PORT]",
        read=lambda words: _hosts(words),
        many=True,
    ),
]


def read_link(file: str | None, link: str | None, allowed_hosts: Collection[str]) -> "SignedLink":
    """Read the signed link from flag, file, environment or prompt. Raises RequestError."""
    from llama_ref.download.link import parse_link

    if file is not None and link is not None:
        raise RequestError("--file and --link are given, expected one of them")
    if link is not None:
        note("the shell's history keeps this link: remove it there, and next time give it with --file or at the prompt")
        return parse_link(link, allowed_hosts)
    return parse_link(_text(file), allowed_hosts)


def _text(file: str | None) -> str:
    if file == "-":
        return sys.stdin.read(LINK_LIMIT_BYTES)
    if file is not None:
        return _text_of(file)
    if value := os.environ.get(VARIABLE):
        return value
    if not sys.stdin.isatty():
        raise RequestError(f"missing the signed link: give it {WAYS}")
    return getpass.getpass("Meta's signed link (it is not shown): ", stream=sys.stderr)


def _text_of(file: str) -> str:
    from llama_ref.files import named_in_request, read_limited

    with named_in_request(file, "the link") as path:
        return read_limited(path, LINK_LIMIT_BYTES, "a signed link").decode("utf-8", "replace")


def _hosts(words: str) -> list[str]:
    """Read host names. Raises RequestError for anything but a name and a port."""
    import json

    hosts = [word.lower() for word in json.loads(words)]
    for host in hosts:
        if not host or any(sign in host for sign in "/?@* "):
            raise RequestError(f"--allow_host is {host[:40]!r}, expected HOST or HOST:PORT")
    return hosts
