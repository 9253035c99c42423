"""Which hosts may be contacted for downloads, and which releases Meta's hosts serve."""

from collections.abc import Collection

from llama_ref.errors import RequestError

METAS_DOMAIN = "llamameta.net"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# The releases that users have reported downloading from a host. Meta publishes no such list.
KNOWN = {
    "download": "Llama 2 and Llama 3",
    "download5": "Llama 2 and Llama 3",
    "download6": "Llama 2 and Llama 3",
    "llama3-1": "Llama 3.1",
    "llama3-3": "Llama 3.3",
}


def check_host(scheme: str, host: str, allowed: Collection[str] = ()) -> None:
    """Raise RequestError unless a host may be contacted.

    `host` is its name and port as in a link. Meta's own hosts are allowed over https, others if
    `allowed` has their name, or name and port. Unencrypted http is allowed for this machine only.
    """
    name = host_name(host)
    if name not in allowed and host not in allowed and not is_metas(host):
        raise RequestError(
            f"{host} is not one of Meta's hosts (NAME.{METAS_DOMAIN}); if you trust this mirror, add --allow_host {host}"
        )
    if scheme != "https" and not (scheme == "http" and name in LOOPBACK):
        raise RequestError(f"{scheme}://{host} is not encrypted, expected https://; http:// is allowed for this machine only")


def is_metas(host: str) -> bool:
    """Whether this is one of Meta's hosts, on the default port."""
    return host.endswith(f".{METAS_DOMAIN}") and "@" not in host


def releases_of(host: str) -> str | None:
    """The releases that one of Meta's hosts is known to serve; None for other hosts."""
    return KNOWN.get(host.removesuffix(f".{METAS_DOMAIN}")) if is_metas(host) else None


def host_name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
