"""`llama-ref reshard`."""

from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Force, Source, Target, Threads, Verify


@command(Section.REWRITE)
def reshard(
    src: Source,
    dst: Target,
    *,
    shards: Annotated[
        int,
        Flag("number of shards; must divide query heads, feed-forward width and vocabulary"),
    ],
    force: Force = False,
    verify: Verify = "auto",
    threads: Threads = None,
) -> None:
    """Rewrite a checkpoint with a different number of shards.

    Writes consolidated.NN.pth, params.json, tokenizer.model and checklist.chk. The weights stay the
    same, bit for bit. Loading does not need this: any number of shards loads on any number of
    processes.
    """
    from llama_ref.checkpoint.writing.convert import to_meta
    from llama_ref.cli.terminal import byte_bar, check_one_writer, print_path
    from llama_ref.device import use_threads

    check_one_writer()
    use_threads(threads)
    with byte_bar("writing") as progress:
        path = to_meta(src, dst, shards=shards, force=force, verify=verify, progress=progress)
    print_path(path)
