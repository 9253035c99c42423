"""Ranges cover a file exactly once, and inconsistent Content-Range headers are rejected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.download.ranges import ContentRange, Segment, arrived, cut, prefix, read_content_range


@pytest.fixture(autouse=True, scope="module")
def short_times() -> None:
    """Overrides the small ranges of the other tests with the real sizes."""


@given(total=st.integers(1, 10**12), jobs=st.integers(1, 64))
def test_ranges_follow_each_other(total, jobs):
    segments = cut(total, jobs)
    assert [each.start for each in segments] == [0, *(each.stop for each in segments[:-1])]
    assert segments[-1].stop == total and all(0 < each.rest <= 10**9 for each in segments)


def test_a_request_holds_at_most_a_gigabyte():
    assert len(cut(2_470_000_000, 4)) == 64
    assert len(cut(15_000_000, 4)) == 1
    assert len(cut(101_470_976_045, 4)) == 102


def test_the_prefix_ends_at_the_first_gap():
    segments = [Segment(0, 10, 10), Segment(10, 20, 3), Segment(20, 30, 10)]
    assert (prefix(segments), arrived(segments)) == (13, 23)
    segments[1].done = 10
    assert prefix(segments) == 30 and prefix([]) == 0


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes 0-0/5", ContentRange(0, 1, 5)),
        (" bytes 3-4/5 ", ContentRange(3, 5, 5)),
        ("bytes 0-5/5", None),
        ("bytes 4-3/5", None),
        ("bytes 0-4/*", None),
        ("bytes */5", None),
        ("bytes 0-4", None),
        ("octets 0-4/5", None),
        ("bytes -1-4/5", None),
        ("bytes 0-4/" + "9" * 30, None),
        ("", None),
        (None, None),
    ],
)
def test_content_ranges(header, found):
    assert read_content_range(header) == found
