"""Hugging Face's hub, which has the data of the harness's own tasks: fail at once without it."""

import os
import socket
import threading
from urllib.parse import urlparse
from urllib.request import getproxies

SECONDS = 3.0
HUB = "https://huggingface.co"


def offline_without_hub() -> None:
    """Set the libraries' flag for it, before they are imported, if the hub does not answer.

    Else each data set that is not in the cache costs half a minute of retries.
    """
    if "HF_HUB_OFFLINE" not in os.environ and not getproxies() and not is_reachable(os.environ.get("HF_ENDPOINT") or HUB):
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_reachable(address: str) -> bool:
    """Whether a server answers within some seconds; looking its name up may take any time."""
    place = urlparse(address)
    answered = threading.Event()

    def connect() -> None:
        try:
            port = place.port or (80 if place.scheme == "http" else 443)
            socket.create_connection((place.hostname or "", port), SECONDS).close()
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()
