"""`llama-ref link`."""

from typing import Annotated

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.linking import AllowHost, Link, LinkFile, not_a_link, read_link
from llama_ref.cli.options import Json
from llama_ref.cli.outcome import EXIT_BAD


@command(Section.INSPECT)
def link(
    name: Annotated[str | None, Flag("show what this release would bring", unset="none", read=not_a_link)] = None,
    *,
    file: LinkFile = None,
    link: Link = None,
    allow_host: AllowHost = (),
    json: Json = False,
) -> int:
    """Say what Meta's signed link is good for, without asking its server.

    Its host, until when it is good, and which files and how much space a release takes. The link is
    asked for and not shown. Exit code 0: good, 1: it has ended, 2: it is no such link.

      llama-ref link
      llama-ref link Llama3.2-1B-Instruct --file link.txt
    """
    from llama_ref.checkpoint.releases import find_release
    from llama_ref.cli.views.download import print_link

    release = None if name is None else find_release(name)
    found = read_link(file, link, allow_host)
    print_link(found, release, as_json=json)
    return EXIT_BAD if found.has_ended() else 0
