"""`llama-ref diff`."""

from llama_ref.cli.outcome import EXIT_BAD, EXIT_MISUSE, report_error
from llama_ref.cli.parsing.flags import Section, command
from llama_ref.cli.shared.options import Json, Name
from llama_ref.errors import CheckpointError


@command(Section.INSPECT)
def diff(a: Name, b: Name, *, json: Json = False) -> int:
    """Compare two checkpoints tensor by tensor.

    Their number of shards and their format may differ. Exit code 0: identical, 1: different,
    2: not comparable.
    """
    from rich.progress import MofNCompleteColumn

    from llama_ref.checkpoint.diff import compare
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.verify import print_comparison

    try:
        with progress_bar("comparing", MofNCompleteColumn()) as progress:
            comparison = compare(a, b, progress)
    except CheckpointError as error:
        return report_error(error, EXIT_MISUSE)
    print_comparison(comparison, as_json=json)
    return 0 if comparison.identical else EXIT_BAD
