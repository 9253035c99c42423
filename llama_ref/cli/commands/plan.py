"""`llama-ref plan`."""

from typing import Annotated

from llama_ref.cli.outcome import EXIT_BAD
from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import SHORT_DTYPES, Dtype, Json, MaxSeqLen, Quantize


@command(Section.INSPECT)
def plan(
    name: Annotated[str, Flag("release name such as Llama3.1-70B, downloaded or not; or a folder")],
    *,
    gpu_memory: Annotated[float, Flag("memory of one GPU in GB, as sold, such as 16, 24 or 80")] = 80.0,
    max_seq_len: MaxSeqLen = 8192,
    max_batch_size: Annotated[int, Flag("number of sequences at a time")] = 4,
    quantize: Quantize = None,
    dtype: Annotated[
        Dtype | None,
        Flag(
            "data type of weights and activations",
            unset="bfloat16, and float32 for the parts that are not quantized",
            aliases=SHORT_DTYPES,
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Show how many GPUs a model needs, and how to start it.

    Also shows what uses their memory. Exit code 0: it fits, 1: it does not fit on any number of
    these GPUs.

    Part of a card's memory is not available: with ECC, a T4 has 15 of its 16 GB, an A10 or L4 22.4
    of its 24.
    """
    from llama_ref.cli.views.plan import print_plan
    from llama_ref.plan import Workload, find_model

    workload = Workload(gpu_memory, max_seq_len, max_batch_size)
    fits = print_plan(find_model(name, quantize), workload, dtype, as_json=json)
    return 0 if fits else EXIT_BAD
