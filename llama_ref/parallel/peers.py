"""Messages about other processes of a job: their names, and logging from any rank."""

import logging
from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)


def named(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """{0, 1, 2} -> "rank 0 (host-a) and ranks 1, 2 (host-b)"; unknown hosts are left out."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts.get(rank, ""), []).append(rank)
    return " and ".join(
        f"rank{'s' if len(group) > 1 else ''} {', '.join(map(str, group))}{host and f' ({host})'}"
        for host, group in by_host.items()
    )


def speaks_for(rank: int, absent: Iterable[int], world_size: int) -> bool:
    """Whether this rank logs warnings about absent ranks: the first present one does."""
    return rank == min(set(range(world_size)) - set(absent))


def say(level: int, text: str) -> None:
    """Log a record that is shown for any rank.

    The command line shows other records of rank 0 only.
    """
    logger.log(level, "%s", text, extra={"any_rank": True})
