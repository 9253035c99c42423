"""`llama-ref list`."""

from llama_ref.cli.parsing.flags import Section, command
from llama_ref.cli.shared.options import Json


@command(Section.INSPECT)
def list_(*, json: Json = False) -> None:
    """List the checkpoints on this machine.

    Looks under ~/.llama/checkpoints, or under $LLAMA_MODELS_CONFIG_DIR/checkpoints.
    """
    from llama_ref.cli.views.list import print_list

    print_list(as_json=json)
