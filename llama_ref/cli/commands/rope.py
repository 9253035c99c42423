"""`llama-ref rope`."""

from llama_ref.cli.parsing.flags import Section, command
from llama_ref.cli.shared.options import Json, Name


@command(Section.STUDY)
def rope(name: Name, *, json: Json = False) -> None:
    """Show the RoPE frequencies before and after Llama 3.1's scaling.

    Loads no weights.
    """
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.views.study.rope import print_rope
    from llama_ref.study.analyses.rope import rope_waves

    print_rope(rope_waves(open_folder(name).read_args()), as_json=json)
