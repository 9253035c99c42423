"""`llama-ref spectra`."""

from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, Weights
from llama_ref.cli.shared.studying import open_to_study


@command(Section.STUDY)
def spectra(
    name: Name,
    *,
    matrices: Annotated[
        str, Flag('names of matrices: "layers.*.attention.wq.weight", "*" for all', metavar="GLOB")
    ] = "layers.0.*",
    to: Annotated[
        str | None,
        Flag("show the error of rounding to int8, int4 or int4:group=N instead", metavar="SCHEME"),
    ] = None,
    json: Json = False,
    loading: Weights,
) -> None:
    """Show each weight matrix's effective rank or quantization error.

    --json has all singular values.
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.weights import print_errors, print_spectra
    from llama_ref.quantization.scheme import Scheme
    from llama_ref.study.analyses import weights

    scheme = None if to is None else Scheme.parse(to, "--to")
    llama = open_to_study(name, loading)
    with progress_bar("measuring") as progress:
        if scheme is None:
            ranks = list(weights.spectra(llama.model, matrices, progress))
        else:
            errors = list(weights.quantization_errors(llama.model, scheme, matrices, progress))
    if scheme is None:
        print_spectra(ranks, as_json=json)
    else:
        print_errors(errors, scheme=str(scheme), as_json=json)
