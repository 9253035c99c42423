"""`llama-ref download`."""

from typing import Annotated

from llama_ref.cli.flags import Flag, Section, command
from llama_ref.cli.linking import AllowHost, Link, LinkFile, Release, not_a_link, read_link
from llama_ref.cli.options import Json
from llama_ref.errors import RequestError


@command(Section.INSPECT)
def download(
    name: Release,
    *,
    file: LinkFile = None,
    link: Link = None,
    only: Annotated[
        list[str] | tuple[()],
        Flag("fetch this file alone; may be given several times", metavar="FILE", read=lambda words: _names(words), many=True),
    ] = (),
    repair: Annotated[bool, Flag("verify the folder, and fetch again what is wrong in it")] = False,
    jobs: Annotated[int, Flag("number of requests at a time")] = 4,
    allow_host: AllowHost = (),
    json: Json = False,
) -> int:
    """Download a release from Meta with the signed link of its form.

    Into ~/.llama/checkpoints, where `list` looks. A download that broke off goes on where it stopped, with
    a new link too. Every sum is compared with the release's checklist.chk. The link is asked for and
    never shown, logged or stored. Exit code 0: every file is whole, else 1; 2: misuse.

      llama-ref download Llama3.2-1B-Instruct
      llama-ref download Llama3.1-8B --file link.txt --only tokenizer.model
      llama-ref download --repair Llama3.1-8B
    """
    from llama_ref.checkpoint.folder import checkpoints_root
    from llama_ref.checkpoint.releases import find_release
    from llama_ref.cli.terminal import check_one_writer
    from llama_ref.cli.views.download import download_bars, print_outcome

    check_one_writer()
    if repair and only:
        raise RequestError("--repair and --only are given, expected one of them: --repair finds what is wrong by itself")
    release = find_release(name)
    _check_library()
    from llama_ref.download import release as of_release

    folder = checkpoints_root() / release.folder
    of_release.wanted_files(release, only)
    if repair:
        with download_bars() as (progress, hashing):
            outcome = of_release.repair(
                release,
                folder,
                lambda: read_link(file, link, allow_host),
                jobs=jobs,
                allowed_hosts=allow_host,
                progress=progress,
                hashing=hashing,
            )
    else:
        given = read_link(file, link, allow_host)
        with download_bars() as (progress, hashing):
            outcome = of_release.download(
                release,
                given,
                folder,
                only=only,
                jobs=jobs,
                allowed_hosts=allow_host,
                progress=progress,
                hashing=hashing,
            )
    print_outcome(outcome, as_json=json)
    return 0 if outcome.report.ok else outcome.report.exit_code


def _check_library() -> None:
    """Raise RequestError without the package that speaks HTTP."""
    import importlib.util

    if importlib.util.find_spec("httpx") is None:
        raise RequestError("downloading needs the package httpx: pip install httpx")


def _names(words: str) -> list[str]:
    import json

    return [not_a_link(word) for word in json.loads(words)]
