"""Parse Meta's signed link, which contains its host and expiry date: no request is made.

A link is `https://HOST/*?Policy=…&Signature=…&Key-Pair-Id=…`. The `*` is replaced by a release's
folder and file; nothing else may change. Anyone with the query can download in its owner's name, so
it is treated like a password: it appears in no `repr`, message or file that this package writes.
"""

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from urllib.parse import SplitResult, urlsplit

from llama_ref.download.policy import Policy, read_policy
from llama_ref.download.requests.hosts import METAS_DOMAIN, check_host, is_metas, releases_of
from llama_ref.errors import RequestError
from llama_ref.formatting import span

FORM = f"https://HOST.{METAS_DOMAIN}/*?Policy=…&Signature=…&Key-Pair-Id=…"
WHERE = "https://www.llama.com/llama-downloads/"
COPY_AGAIN = "copy the whole link again, as plain text"
WRAPPING = " \t\r\n\ufeff'\"`<>()[]“”‘’«».,;"
QUERY = re.compile(r"[!#-&(-;=?-\[\]-~]+")  # ASCII without spaces, quotes, backslashes and angle brackets
KEYS = ("Policy", "Signature", "Key-Pair-Id")


@dataclass(frozen=True)
class SignedLink:
    """A parsed link. `host` includes the port if the link has one; `expires` is in UTC."""

    scheme: str
    host: str
    prefix: str
    expires: datetime
    _query: str = field(repr=False)

    def address(self, path: str) -> str:
        """A file's URL without the query, for messages and state files."""
        return f"{self.scheme}://{self.host}{self.prefix}{path}"

    def signed(self, path: str) -> str:
        """A file's URL with the query. Use it for the request only."""
        return f"{self.address(path)}?{self._query}"

    def has_ended(self, now: datetime | None = None) -> bool:
        return (now or _now()) >= self.expires

    def lifetime(self, now: datetime | None = None) -> str:
        """ "expired 3 hours ago (2026-11-28 06:00 UTC)", or how long the link is still valid."""
        seconds = (self.expires - (now or _now())).total_seconds()
        date = f"{self.expires:%Y-%m-%d %H:%M} UTC"
        return f"expired {span(-seconds)} ago ({date})" if seconds <= 0 else f"is good for {span(seconds)} (until {date})"

    def check_date(self) -> None:
        """Raise RequestError if the link has expired by this machine's clock."""
        if self.has_ended():
            raise RequestError(f"the link {self.lifetime()}: get a new one from {WHERE}; downloaded data is kept")

    def known_releases(self) -> str | None:
        """The releases that the link's host is known to serve; None if unknown."""
        return releases_of(self.host)


def parse_link(text: str, allowed_hosts: Collection[str] = ()) -> SignedLink:
    """Parse a pasted link, possibly with quotes, blanks, `&amp;`, a shell's backslashes or `%2A`.

    Raises RequestError for a damaged copy, saying what is wrong with it, and for hosts that are not
    allowed.
    """
    text = text.strip(WRAPPING).replace("\\", "")
    while "&amp;" in text:
        text = text.replace("&amp;", "&")
    _check_one(text)
    parts = _split(text)
    _check_form(parts, allowed_hosts)
    check_host(parts.scheme, parts.netloc, allowed_hosts)
    prefix = re.sub("%2a", "*", parts.path, flags=re.IGNORECASE)
    if prefix.count("*") != 1 or not prefix.endswith("/*"):
        stars = "lacks the *" if "*" not in prefix else "has a * in another place"
        raise RequestError(f"the link {stars} that is replaced by a file's path: expected {FORM}; {COPY_AGAIN}")
    policy = _policy_of(parts)
    return SignedLink(parts.scheme, parts.netloc, prefix.removesuffix("*"), policy.expires, parts.query)


def _check_one(text: str) -> None:
    """Raise RequestError unless the text is a single link."""
    n = len(re.findall(r"https?://", text, re.IGNORECASE))
    if not text:
        raise RequestError(f"the link is empty, expected {FORM}, as Meta's e-mail or page shows it ({WHERE})")
    if n > 1:
        raise RequestError(f"these are {n} links, expected one; each release family has its own link")
    if not re.match(r"https?://", text, re.IGNORECASE):
        raise RequestError(f"this does not begin with https://, expected a link of the form {FORM}")
    if re.search(r"\s", text):
        raise RequestError("the link contains blanks or line breaks, or text follows it: give only the link, on one line")


def _split(text: str) -> SplitResult:
    parts = None
    with suppress(ValueError):
        parts = urlsplit(text)
    if parts is None or not parts.netloc or "@" in parts.netloc:  # raised here: a ValueError may contain the text
        raise RequestError(f"the link's host cannot be read, expected {FORM}; {COPY_AGAIN}")
    return parts._replace(netloc=parts.netloc.lower())


def _check_form(parts: SplitResult, allowed_hosts: Collection[str]) -> None:
    """Raise RequestError for a page that redirects to the link, such as a mail program's."""
    if METAS_DOMAIN in parts.query and not is_metas(parts.netloc):
        raise RequestError(
            f"this is a page of {parts.netloc} that redirects to the link, not the link itself: copy the text that is "
            "shown, not the address behind it"
        )
    if "Policy" not in parts.query and parts.netloc not in allowed_hosts and not is_metas(parts.netloc):
        raise RequestError(f"this is a page of {parts.netloc}, not the signed link, which has the form {FORM}")


def _policy_of(parts: SplitResult) -> Policy:
    """The policy in a link's query. Raises RequestError if the query is damaged."""
    pairs = [pair.partition("=") for pair in parts.query.split("&")]
    found = {key: value for key, _, value in pairs if value}
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise RequestError(
            f"the link lacks {' and '.join(missing)}: was it cut off? A shell does so at an & outside quotes; {COPY_AGAIN}"
        )
    if len(pairs) != len({key for key, _, _ in pairs}) or not QUERY.fullmatch(parts.query) or parts.fragment:
        raise RequestError(f"the link's query is damaged (it has duplicate keys or unexpected characters); {COPY_AGAIN}")
    policy = read_policy(found["Policy"])
    if policy is None:
        raise RequestError(f"the link's Policy cannot be read, characters were lost or changed; {COPY_AGAIN}")
    if _host_of(policy.resource) not in ("", parts.netloc):
        raise RequestError(f"the link's host is {parts.netloc}, but its Policy names another: are these parts of two links?")
    return policy


def _host_of(resource: str) -> str:
    """The host in a policy's resource; empty if the policy allows any (`*`)."""
    match = re.match(r"https?\*?://([^/?]*)", resource, re.IGNORECASE)
    host = match[1].lower() if match else ""
    return "" if "*" in host else host


def _now() -> datetime:
    return datetime.now(timezone.utc)
