"""Check that a key of config.json has a value that a Llama 3 has."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_ref.errors import UnsupportedModel
from llama_ref.formatting import short


def expect(found: Mapping[str, Any], key: str, allowed: Sequence[Any], why: str, within: str = "") -> None:
    """Raise UnsupportedModel unless the key is absent, null or an allowed value; 1 is not true.

    `within` is the section that the error names before the key.
    """
    value = found.get(key)
    if value is None or any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed):
        return
    raise UnsupportedModel(f'"{within}{key}" is {short(value)}, expected {" or ".join(map(json.dumps, allowed))}: {why}')
