"""`llama-ref bench`."""

import sys
from dataclasses import asdict, dataclass
from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Compile, Json, Name, Weights


@dataclass(frozen=True)
class Measured(Weights):
    """Flags of the model that is measured."""

    compile: Compile = False


@command(Section.RUN)
def bench(
    name: Name,
    *,
    prompt_len: Annotated[int, Flag("tokens in the prompt")] = 512,
    gen_len: Annotated[int, Flag("tokens to generate")] = 128,
    batch: Annotated[str, Flag("batch sizes to measure", metavar="N,N,...")] = "1,8",
    context: Annotated[
        str | None,
        Flag(
            "also decode one sequence after contexts of this many random tokens, such as 8192,32768",
            metavar="N,N,...",
        ),
    ] = None,
    against: Annotated[
        str | None,
        Flag(
            "also measure installed programs: any of transformers,llama.cpp,meta",
            metavar="PEER,...",
        ),
    ] = None,
    rounds: Annotated[int, Flag("number of measurements; medians are shown")] = 5,
    png: Annotated[str | None, Flag("file to draw the roofline into (needs matplotlib)", metavar="FILE")] = None,
    json: Json = False,
    loading: Measured,
) -> None:
    """Benchmark prefill and decode, optionally beside other programs.

    Shows tokens per second and how much of the memory bandwidth that uses.
    """
    from llama_ref.bench.roofline import check_picture, draw_roofline
    from llama_ref.bench.runner import compare
    from llama_ref.bench.settings import Settings
    from llama_ref.cli.terminal import note
    from llama_ref.cli.views.bench import print_report

    if png is not None:
        check_picture(png)
    settings = Settings.parse(
        name,
        prompt_len=prompt_len,
        gen_len=gen_len,
        batch=batch,
        context=context,
        against=against,
        rounds=rounds,
        **asdict(loading),
    )
    report = compare(settings, note if sys.stderr.isatty() else lambda text: None)
    if png is not None:
        draw_roofline(report, png)
    print_report(report, as_json=json)
