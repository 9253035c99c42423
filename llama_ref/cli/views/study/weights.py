"""What `llama-ref spectra` prints."""

import json
from collections.abc import Iterable

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import finite, new_table, plain, say
from llama_ref.study.analyses.weights import QuantizationError, Spectrum


def print_spectra(spectra: Iterable[Spectrum], *, as_json: bool) -> None:
    """Print a line per matrix: largest singular value and ranks; as JSON, all singular values."""
    if as_json:
        print(json.dumps({"matrices": [_spectrum_json(spectrum) for spectrum in spectra]}, indent=2))
        return
    table = new_table("matrix", "shape", "largest", "stable", "effective")
    for found in spectra:
        table.add_row(
            found.name,
            "×".join(map(str, found.shape)),
            f"{found.values[0]:.3g}",
            f"{found.stable_rank:,.1f}",
            f"{found.effective_rank:,.1f}",
        )
    print_rich(table)
    say(
        "Largest: the largest singular value, σ₁. Stable rank: ‖W‖² / σ₁². Effective rank: exp of the entropy of all singular"
        " values, as shares of their sum."
    )


def print_errors(errors: Iterable[QuantizationError], scheme: str, *, as_json: bool) -> None:
    """Print a line per matrix: its quantization error."""
    if as_json:
        print(json.dumps(finite({"scheme": scheme, "matrices": [vars(error) for error in errors]}), indent=2))
        return
    table = new_table("matrix", "bits", "relative", "largest")
    for error in errors:
        table.add_row(error.name, f"{error.bits_per_weight:.2f}", f"{error.relative:.3%}", f"{error.largest:.3g}")
    print_rich(table)
    say(f"{scheme}: the relative error is ‖W - W'‖ / ‖W‖, the largest that of any one weight. Bits: per weight, with scales.")


def _spectrum_json(spectrum: Spectrum) -> dict:
    ranks = {"stable_rank": spectrum.stable_rank, "effective_rank": spectrum.effective_rank}
    return finite({"matrix": spectrum.name, "shape": list(spectrum.shape)} | ranks) | {"values": plain(spectrum.values)}
