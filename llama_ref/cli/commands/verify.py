"""`llama-ref verify`."""

from typing import Annotated

from llama_ref.cli.outcome import EXIT_MISUSE, report_error
from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Jobs, Json
from llama_ref.errors import CheckpointError, FolderNotFound, RequestError


@command(Section.INSPECT)
def verify(
    name: Annotated[str | None, Flag("checkpoint folder, or release name such as Llama3.2-1B-Instruct")] = None,
    *,
    all: Annotated[bool, Flag("check every checkpoint under ~/.llama/checkpoints")] = False,
    quick: Annotated[
        bool,
        Flag(
            "check only sizes, archives, tensor names and shapes: takes seconds",
            short="q",
        ),
    ] = False,
    deep: Annotated[bool, Flag("also look for NaN, infinity and impossible numbers in every weight")] = False,
    jobs: Jobs = None,
    json: Json = False,
) -> int:
    """Check that a checkpoint is complete and undamaged.

    Names each damaged or missing file, the reason, and what to do. Exit code 0: complete,
    1: damaged or incomplete, 2: no files to check, or a model that is not supported, 3: no damage
    found, but some file has no checksum to compare with.
    """
    from llama_ref.checkpoint import integrity
    from llama_ref.checkpoint.folder import checkpoints_root, find_folder, list_folders
    from llama_ref.cli.views.verify import hashing_bars, print_reports

    if all and name is not None:
        raise RequestError(f"--all checks every checkpoint: leave out {name!r:.60}, or --all")
    if not all and name is None:
        raise RequestError("missing NAME, a checkpoint folder or release name; or give --all")
    try:
        folders = list_folders() if name is None else [find_folder(name)]
    except CheckpointError as error:
        return report_error(error, EXIT_MISUSE)
    if not folders:
        raise FolderNotFound(f"{checkpoints_root()} holds no checkpoints")
    with hashing_bars() as progress:
        reports = [integrity.verify(each, jobs=jobs, quick=quick, deep=deep, progress=progress) for each in folders]
    print_reports(reports, as_json=json, as_list=all)
    return min((report.exit_code for report in reports if not report.ok), default=0)  # 1 before 2 and 3
