"""Check a server's answer: the requested bytes, an error worth a retry, or a refusal."""

from llama_ref.download.link import WHERE, SignedLink
from llama_ref.download.ranges import ContentRange, read_content_range
from llama_ref.download.requests.outcomes import Changed, Refused, Transient
from llama_ref.download.requests.retries import retry_after
from llama_ref.download.requests.server import Answer
from llama_ref.download.state import Remote
from llama_ref.errors import DownloadError
from llama_ref.files import what_is

OK, PARTIAL, RANGE_NOT_SATISFIABLE = 200, 206, 416
PASSING = (408, 425, 429)  # temporary errors, as are all codes from 500 on
REFUSALS = (401, 403, 404, 410)
PAGES = ("text/html", "application/xhtml", "text/xml", "application/xml")
ERROR_BODIES = ("an HTML page", "an XML error body", "a JSON error body")


def read_remote(answer: Answer, link: SignedLink) -> Remote:
    """A file's length and version, from the answer to a request for its first byte.

    Raises Transient, Refused or DownloadError if the answer is unusable.
    """
    check_status(answer, link)
    if answer.status == RANGE_NOT_SATISFIABLE:
        raise DownloadError(f"{answer.address} is empty on the server")
    etag = answer.headers.get("etag")
    strong = None if etag is None or etag.startswith("W/") else etag
    if answer.status == OK:
        length = answer.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit() and int(length[:18]) > 0):
            raise DownloadError(f"{answer.address}: the server does not report the file's length")
        return Remote(answer.address, int(length[:18]), strong, is_ranged=False)
    found = read_content_range(answer.headers.get("content-range"))
    if found is None or found.start != 0:
        raise Transient(f"{answer.address}: the server sent other bytes than requested")
    return Remote(answer.address, found.total, strong)


def check_answer(answer: Answer, link: SignedLink, remote: Remote, start: int, stop: int) -> int:
    """Check the answer to a request for bytes `start` to `stop` of a known file.

    Returns where its bytes end.
    Raises Changed if it belongs to another version of the file, else the same errors as
    `read_remote`.
    """
    check_status(answer, link)
    if answer.status == RANGE_NOT_SATISFIABLE:
        raise Changed
    etag = answer.headers.get("etag")
    if remote.etag is not None and etag is not None and etag != remote.etag:
        raise Changed
    if answer.status == OK:
        if remote.is_ranged or answer.headers.get("content-length") != str(remote.total):
            raise Changed
        return stop
    found = read_content_range(answer.headers.get("content-range"))
    if found is not None and found.total != remote.total:
        raise Changed
    if found is None or not _begins_as_asked(found, start, stop):
        raise Transient(f"{answer.address}: the server sent other bytes than requested")
    return found.stop


def check_status(answer: Answer, link: SignedLink) -> None:
    """Raise Transient, Refused or DownloadError unless an answer has a file's plain bytes."""
    status = answer.status
    if status in REFUSALS:
        raise Refused(f"{answer.address} was refused ({status}): {_why(answer, link)}")
    if status in PASSING or status >= 500:
        raise Transient(f"{answer.address}: the server answered {status}", retry_after(answer.headers))
    if status == RANGE_NOT_SATISFIABLE:
        return
    if status not in (OK, PARTIAL):
        raise DownloadError(f"{answer.address}: the server answered {status}, expected {PARTIAL} or {OK}")
    if answer.headers.get("content-type", "").lower().startswith(PAGES):
        raise Refused(f"{answer.address} is a web page instead of the file: a login page? Is it the right link?")
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        encoding = answer.headers["content-encoding"]
        raise DownloadError(
            f"{answer.address} was sent with an encoding ({encoding:.20}) that was not requested: is a proxy in between?"
        )


def check_first_bytes(chunk: bytes, address: str) -> None:
    """Raise Refused if a file begins like an error page."""
    kind = what_is(chunk[:512])
    if kind in ERROR_BODIES:
        raise Refused(f"{address} is {kind} instead of the file; is it the right link?")


def _begins_as_asked(found: ContentRange, start: int, stop: int) -> bool:
    return found.start == start and found.stop <= stop


def _why(answer: Answer, link: SignedLink) -> str:
    """The possible reasons for a refusal, and what to do."""
    if link.has_ended():
        return f"the link {link.lifetime()}. Get a new one from {WHERE} and run the command again: it continues from here"
    known = link.known_releases()
    other = f"it is not for this release (this host is known for {known})" if known else "it is not for this release"
    missing = "there is no such file, or " if answer.status in (404, 410) else ""
    return (
        f"the link {link.lifetime()}, so {missing}{other}, its download limit is reached, or Meta does not serve this "
        f"account or network. With a new link from {WHERE} the download continues from here"
    )
