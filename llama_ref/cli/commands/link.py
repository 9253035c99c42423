"""`llama-ref link`."""

from typing import Annotated

from llama_ref.cli.outcome import EXIT_BAD
from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.linking import AllowHost, Link, LinkFile, not_a_link, read_link
from llama_ref.cli.shared.options import Json


@command(Section.INSPECT)
def link(
    name: Annotated[str | None, Flag("also show this release's files and size", unset="none", read=not_a_link)] = None,
    *,
    file: LinkFile = None,
    link: Link = None,
    allow_host: AllowHost = (),
    json: Json = False,
) -> int:
    """Check Meta's signed link without contacting its server.

    Shows its host, when it expires, and which files and how much space a release takes. The command
    asks for the link and does not show it. Exit code 0: valid, 1: expired, 2: not a signed link.

      llama-ref link
      llama-ref link Llama3.2-1B-Instruct --file link.txt
    """
    from llama_ref.checkpoint.releases import find_release
    from llama_ref.cli.views.download import print_link

    release = None if name is None else find_release(name)
    found = read_link(file, link, allow_host)
    print_link(found, release, as_json=json)
    return EXIT_BAD if found.has_ended() else 0
