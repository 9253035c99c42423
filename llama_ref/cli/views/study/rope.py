"""What `llama-ref rope` prints."""

import json

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import finite, new_table, say
from llama_ref.study.rope import RopeWaves


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
    table = new_table("pair", "radians\nper token", "tokens\nper turn", "tokens per turn\nas first trained", "slowed")
    for pair, (_, frequency, unscaled, wavelength, slowed) in rows:
        table.add_row(str(pair), f"{frequency:.3g}", f"{wavelength:,.1f}", f"{unscaled:,.1f}", f"{slowed:.2f}×")
    print_rich(table)
    is_scaled = bool((waves.slowed != 1).any())
    say(
        "Short waves, which tell neighbours apart, are as they were first trained. Long ones are slowed: the angle between"
        " tokens far apart is then one that nearer tokens had in the first training."
        if is_scaled
        else "This model's waves are as they were first trained: its params.json asks for no scaling."
    )
