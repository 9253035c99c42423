"""`llama-ref checksum`."""

from typing import Annotated, Literal

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Jobs, Name


@command(Section.INSPECT)
def checksum(
    name: Name,
    *,
    algorithm: Annotated[Literal["md5", "sha256"], Flag("kind of checksum")] = "md5",
    force: Annotated[bool, Flag("replace an existing checklist.chk", short="f")] = False,
    jobs: Jobs = None,
) -> None:
    """Write checklist.chk for a folder that has none.

    The file has the form that `md5sum -c` reads.
    """
    from llama_ref.checkpoint.folder import find_folder
    from llama_ref.checkpoint.integrity import write_checklist
    from llama_ref.cli.terminal import check_one_writer, print_path
    from llama_ref.cli.views.verify import hashing_bars

    check_one_writer()
    with hashing_bars() as progress:
        path = write_checklist(find_folder(name), algorithm, force, jobs, progress)
    print_path(path)
