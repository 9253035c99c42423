"""The ways a request can fail, by what the caller should do."""

from llama_ref.errors import DownloadError


class Transient(Exception):
    """Retry, after `pause` seconds if the server gave a number."""

    def __init__(self, message: str, pause: float | None = None):
        super().__init__(message)
        self.pause = pause


class Changed(Exception):
    """Start again: the file has changed, or the server no longer answers range requests."""


class Stopped(Exception):
    """Stop, because another thread failed or was interrupted."""


class Refused(DownloadError):
    """The server refused the request. Other files of the same link would be refused too."""
