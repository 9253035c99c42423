"""`llama-ref info`."""

from llama_ref.cli.parsing.flags import Section, command
from llama_ref.cli.shared.options import Json, Name


@command(Section.INSPECT)
def info(name: Name, *, json: Json = False) -> None:
    """Show a checkpoint's shape, its parameters, and the memory it needs.

    Reads no weights.
    """
    from llama_ref.checkpoint.describe import describe
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.views.info import print_info

    print_info(describe(open_folder(name)), as_json=json)
