"""Which hosts may be asked for files, and what is known of Meta's."""

from collections.abc import Collection

from llama_ref.errors import RequestError

METAS_DOMAIN = "llamameta.net"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# The releases that people were seen to download from a host. Meta publishes no such list.
KNOWN = {
    "download": "Llama 2 and Llama 3",
    "download5": "Llama 2 and Llama 3",
    "download6": "Llama 2 and Llama 3",
    "llama3-1": "Llama 3.1",
    "llama3-3": "Llama 3.3",
}


def check_host(scheme: str, host: str, allowed: Collection[str] = ()) -> None:
    """Raise RequestError unless a host may be asked.

    `host` is its name and port as in a link. Meta's own hosts are asked over https, others if they
    are `allowed` by their name, or name and port. Without TLS only this machine is asked.
    """
    name = host_name(host)
    if name not in allowed and host not in allowed and not is_metas(host):
        raise RequestError(
            f"{host} is not a host of Meta's (NAME.{METAS_DOMAIN}); if it is a mirror that you trust, add --allow_host {host}"
        )
    if scheme != "https" and not (scheme == "http" and name in LOOPBACK):
        raise RequestError(f"{scheme}://{host} is not encrypted, expected https://; http:// is for this machine alone")


def is_metas(host: str) -> bool:
    """Whether it is a host of Meta's, at the usual port."""
    return host.endswith(f".{METAS_DOMAIN}") and "@" not in host


def releases_of(host: str) -> str | None:
    """The releases that a host of Meta's is known for; None for other hosts."""
    return KNOWN.get(host.removesuffix(f".{METAS_DOMAIN}")) if is_metas(host) else None


def host_name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
