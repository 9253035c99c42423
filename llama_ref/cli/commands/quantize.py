"""`llama-ref quantize`."""

from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Force, Source, Target, Threads, Verify


@command(Section.REWRITE)
def quantize(
    src: Source,
    dst: Target,
    *,
    to: Annotated[
        str,
        Flag(
            "int8, int4, or int4:group=N with N = 32, 64, 128 or 256 weights per scale",
            metavar="SCHEME",
        ),
    ],
    calibrate: Annotated[
        bool,
        Flag("for int4, measure activations on a text and round accordingly; takes minutes"),
    ] = True,
    force: Force = False,
    verify: Verify = "auto",
    threads: Threads = None,
) -> None:
    """Quantize a checkpoint to int8 or int4 and save it.

    The new folder loads without quantizing again, and takes less disk space and memory.
    """
    from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
    from llama_ref.cli.terminal import byte_bar, check_one_writer, print_path
    from llama_ref.device import use_threads
    from llama_ref.quantization.scheme import Scheme

    check_one_writer()
    scheme = Scheme.parse(to, "--to")
    use_threads(threads)
    with byte_bar("writing") as progress:
        path = quantize_folder(
            src,
            dst,
            scheme,
            calibrate=calibrate,
            force=force,
            verify=verify,
            progress=progress,
        )
    print_path(path)
