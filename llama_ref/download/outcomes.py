"""How a request may fail, by what is to be done then."""

from llama_ref.errors import DownloadError


class Transient(Exception):
    """Try again, after `pause` seconds if the server named them."""

    def __init__(self, message: str, pause: float | None = None):
        super().__init__(message)
        self.pause = pause


class Changed(Exception):
    """The file is another one than before, or the server no longer sends parts: begin it again."""


class Stopped(Exception):
    """Another thread has failed or was interrupted."""


class Refused(DownloadError):
    """The server says no. Other files of the same link would fare no better."""
