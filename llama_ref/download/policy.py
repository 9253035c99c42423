"""Decode the policy in a signed link: which files it allows, and until when."""

import base64
import binascii
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote

BASE64 = str.maketrans("-_~", "+=/")  # CloudFront's URL-safe alphabet to the usual one


@dataclass(frozen=True)
class Policy:
    """The rules that CloudFront checks a request against: the allowed URLs and the expiry date."""

    resource: str
    expires: datetime


def read_policy(encoded: str) -> Policy | None:
    """Decode the policy of a link's query; None if it is damaged.

    No exception leaves this function, because a decoder's error would contain the secret text.
    """
    try:
        content = json.loads(base64.b64decode(unquote(encoded).translate(BASE64), validate=True))
        (statement,) = content["Statement"]
        return Policy(_text(statement["Resource"]), _date(statement["Condition"]["DateLessThan"]["AWS:EpochTime"]))
    except (binascii.Error, ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _date(value: Any) -> datetime:
    if type(value) is not int:
        raise TypeError
    return datetime.fromtimestamp(value, timezone.utc)
