"""What `llama-ref rope` prints."""

import json

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import finite, new_table, say
from llama_ref.study.analyses.rope import RopeWaves


def print_rope(waves: RopeWaves, *, as_json: bool) -> None:
    """Print each pair's wavelength in tokens, before and after the model's RoPE scaling."""
    columns = (waves.unscaled, waves.frequencies, waves.unscaled_wavelengths, waves.wavelengths, waves.slowed)
    rows = list(enumerate(zip(*(column.tolist() for column in columns), strict=True)))
    if as_json:
        names = ("unscaled_frequency", "frequency", "unscaled_wavelength", "wavelength", "slowed")
        print(
            json.dumps(finite({"pairs": [{"pair": pair} | dict(zip(names, row, strict=True)) for pair, row in rows]}), indent=2)
        )
        return
    table = new_table("pair", "radians\nper token", "tokens\nper turn", "tokens per turn\nbefore scaling", "slowed")
    for pair, (_, frequency, unscaled, wavelength, slowed) in rows:
        table.add_row(str(pair), f"{frequency:.3g}", f"{wavelength:,.1f}", f"{unscaled:,.1f}", f"{slowed:.2f}×")
    print_rich(table)
    is_scaled = bool((waves.slowed != 1).any())
    say(
        "Short waves are not scaled. Long ones are slowed, so that the angles between distant tokens stay in the range that"
        " the model was first trained on."
        if is_scaled
        else "This model's RoPE is not scaled: params.json does not ask for it."
    )
