"""Messages about the other processes of a job: their names, and log records that any rank may show."""

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
    """Whether this rank logs the warning about absent ranks: the first rank that is present does."""
    return rank == min(set(range(world_size)) - set(absent))


def say(level: int, text: str) -> None:
    """Log a record that is shown for any rank; the command line shows other records of rank 0 only."""
    logger.log(level, "%s", text, extra={"any_rank": True})
