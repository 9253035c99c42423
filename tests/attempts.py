"""How often attacks are tried: `ATTEMPTS=30 pytest -m attack -s` tries each 30 times as often."""

import os


def attempts(usual: int) -> int:
    return usual * int(os.environ.get("ATTEMPTS", "1"))
