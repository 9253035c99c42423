"""`llama-ref convert`."""

from typing import Annotated, Literal

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import SHORT_DTYPES, Dtype, Force, Source, Target, Threads, Verify
from llama_ref.errors import RequestError


@command(Section.REWRITE)
def convert(
    src: Source,
    dst: Target,
    *,
    to: Annotated[Literal["hf", "meta"], Flag("format to write: Hugging Face's, or Meta's")],
    dtype: Annotated[
        Dtype | None,
        Flag("data type of the weights", unset="as stored", aliases=SHORT_DTYPES),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        Flag("largest safetensors file, such as 500MB (with --to hf)", metavar="SIZE", unset="5GB"),
    ] = None,
    shards: Annotated[
        int | None,
        Flag(
            "number of consolidated.NN.pth files (with --to meta)",
            unset="as many as SRC has; 1 from Hugging Face's format",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        Flag(
            "write a chat template (with --to hf)",
            unset="on, unless SRC is a base model",
        ),
    ] = None,
    force: Force = False,
    verify: Verify = "auto",
    threads: Threads = None,
) -> None:
    """Convert a checkpoint between Meta's and Hugging Face's format.

    Hugging Face's format is a folder with safetensors files, as `transformers` reads it. Other
    commands do not need a conversion: they read Hugging Face folders as they are.
    """
    from llama_ref.checkpoint.writing.convert import (
        MAX_SHARD_BYTES,
        parse_bytes,
        to_hugging_face,
        to_meta,
    )
    from llama_ref.cli.terminal import byte_bar, check_one_writer, print_path
    from llama_ref.device import named_dtype, use_threads

    check_one_writer()
    if to == "hf" and shards is not None:
        raise RequestError("--shards needs --to meta; with --to hf, use --max_shard_size")
    if to == "meta" and (max_shard_size is not None or chat is not None):
        flag = "--chat" if max_shard_size is None else "--max_shard_size"
        raise RequestError(f"{flag} needs --to hf")
    cast = None if dtype is None else named_dtype(dtype)
    limit = MAX_SHARD_BYTES if max_shard_size is None else parse_bytes(max_shard_size)
    use_threads(threads)
    with byte_bar("writing") as progress:
        if to == "meta":
            path = to_meta(src, dst, shards=shards, dtype=cast, force=force, verify=verify, progress=progress)
        else:
            path = to_hugging_face(
                src,
                dst,
                max_shard_bytes=limit,
                chat=chat,
                dtype=cast,
                force=force,
                verify=verify,
                progress=progress,
            )
    print_path(path)
