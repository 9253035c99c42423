"""How often the attacks are tried: `ATTEMPTS=30 pytest -m attack -s` tries each thirty times as often as usual."""

import os


def attempts(usual: int) -> int:
    return usual * int(os.environ.get("ATTEMPTS", "1"))
