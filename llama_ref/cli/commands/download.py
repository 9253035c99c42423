"""`llama-ref download`."""

from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.linking import AllowHost, Link, LinkFile, Release, not_a_link, read_link
from llama_ref.cli.shared.options import Json
from llama_ref.errors import RequestError


@command(Section.INSPECT)
def download(
    name: Release,
    *,
    file: LinkFile = None,
    link: Link = None,
    only: Annotated[
        list[str] | tuple[()],
        Flag("fetch only this file; may be given several times", metavar="FILE", read=lambda words: _names(words), many=True),
    ] = (),
    repair: Annotated[bool, Flag("verify the folder, and fetch damaged and missing files again")] = False,
    jobs: Annotated[int, Flag("number of parallel requests")] = 4,
    allow_host: AllowHost = (),
    json: Json = False,
) -> int:
    """Download a release with the signed link from Meta's form.

    Writes to ~/.llama/checkpoints, where `list` looks. An interrupted download resumes where it
    stopped, even with a new link. Every file's checksum is compared with the release's
    checklist.chk. The command asks for the link, and never shows, logs or stores it. Exit code
    0: all files are whole, 1: some are not, 2: misuse, 3: the checklist lacks some file.

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
        raise RequestError("--repair and --only are given, expected one of them: --repair finds the files by itself")
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
    """Raise RequestError if httpx is not installed."""
    import importlib.util

    if importlib.util.find_spec("httpx") is None:
        raise RequestError("downloading needs the package httpx: pip install httpx")


def _names(words: str) -> list[str]:
    import json

    return [not_a_link(word) for word in json.loads(words)]
