"""Check whether Hugging Face's hub, which has the data of the harness's tasks, is reachable."""

import os
import socket
import threading
from urllib.parse import urlparse
from urllib.request import getproxies

SECONDS = 3.0
HUB = "https://huggingface.co"


def offline_without_hub() -> None:
    """Set the libraries' offline flag if the hub does not answer; call it before they are imported.

    Otherwise each data set that is not cached costs half a minute of retries.
    """
    if "HF_HUB_OFFLINE" not in os.environ and not getproxies() and not is_reachable(os.environ.get("HF_ENDPOINT") or HUB):
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_reachable(address: str) -> bool:
    """Whether a server accepts a connection within SECONDS, DNS lookup included."""
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
