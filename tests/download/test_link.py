"""A signed link is parsed offline; the error for a damaged copy does not show the link."""

import base64
import json
import time
from datetime import datetime, timedelta, timezone

import pytest

from llama_ref.download.link import parse_link
from llama_ref.download.requests.hosts import check_host, releases_of
from llama_ref.errors import RequestError
from loopback import SIGNATURE, make_link, secrets_of

HOST = "llama3-1.llamameta.net"
LINK = make_link(HOST, scheme="https")


def test_host_date_and_addresses():
    until = int(time.time()) + 5000
    link = parse_link(make_link(HOST, until, scheme="https"))
    assert link.host == HOST and link.expires == datetime.fromtimestamp(until, timezone.utc)
    assert link.address("Llama-3.1-8B/params.json") == f"https://{HOST}/Llama-3.1-8B/params.json"
    assert link.signed("a/b") == f"https://{HOST}/a/b?" + make_link(HOST, until, scheme="https").partition("?")[2]
    assert link.known_releases() == "Llama 3.1"


def test_a_policy_as_cloudfront_writes_it():
    """Parse a policy with escaped slashes in its JSON and CloudFront's URL-safe base64."""
    text = '{"Statement":[{"unique_hash":"%s","Resource":"https:\\/\\/llama3-1.llamameta.net\\/*","Condition":'
    text += '{"DateLessThan":{"AWS:EpochTime":1731296826}}}]}'
    candidates = (base64.b64encode((text % ("~?>" * 4 + "x" * n)).encode()).decode() for n in range(9))
    encoded = next(each for each in candidates if all(sign in each for sign in "+="))
    for sign, other in zip("+=/", "-_~", strict=True):
        encoded = encoded.replace(sign, other)
    link = parse_link(f"https://{HOST}/*?Policy={encoded}&Signature=a~b&Key-Pair-Id=K")
    assert link.expires == datetime(2024, 11, 11, 3, 47, 6, tzinfo=timezone.utc)
    percents = encoded.replace("~", "%7E").replace("_", "%5F")
    assert parse_link(f"https://{HOST}/*?Policy={percents}&Signature=a&Key-Pair-Id=K").expires == link.expires


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (3600 * 26, "is good for 1 day (until 2024-11-11 03:47 UTC)"),
        (7300, "is good for 2 hours (until 2024-11-11 03:47 UTC)"),
        (61, "is good for 1 minute (until"),
        (1, "is good for 1 second (until"),
        (0, "expired 0 seconds ago"),
        (-3 * 3600 - 1, "expired 3 hours ago (2024-11-11 03:47 UTC)"),
        (-86400 * 700, "expired 700 days ago"),
    ],
)
def test_how_long_it_is_good(seconds, said):
    link = parse_link(make_link(HOST, 1731296826, scheme="https"))
    now = link.expires - timedelta(seconds=seconds)
    assert said in link.lifetime(now) and link.has_ended(now) == (seconds <= 0)


@pytest.mark.parametrize(
    "copy",
    [
        lambda link: f"  {link}\n",
        lambda link: f"'{link}'",
        lambda link: f'"{link}"',
        lambda link: f"“{link}”.",
        lambda link: f"<{link}>",
        lambda link: "\ufeff" + link,
        lambda link: link.replace("&", "&amp;"),
        lambda link: link.replace("&", "&amp;amp;"),
        lambda link: link.replace("*", "%2A"),
        lambda link: link.replace("&", "\\&").replace("?", "\\?").replace("*", "\\*"),
        lambda link: link.replace("https://llama3", "HTTPS://LLAMA3"),
    ],
)
def test_usual_damage_is_mended(copy):
    assert parse_link(copy(LINK)) == parse_link(LINK)


@pytest.mark.parametrize(
    ("copy", "reason"),
    [
        (lambda link: "", "the link is empty"),
        (lambda link: " \n", "the link is empty"),
        (lambda link: f"{link}\n{link}", "these are 2 links"),
        (lambda link: link + link, "these are 2 links"),
        (lambda link: "Your link: " + link, "does not begin with https://"),
        (lambda link: link.removeprefix("https://"), "does not begin with https://"),
        (lambda link: link[:200] + "\n" + link[200:], "blanks or line breaks"),
        (lambda link: link.replace("/*?", "/?"), r"lacks the \* that is replaced"),
        (lambda link: link.replace("/*?", "/Llama-3.1-8B/params.json?"), r"lacks the \*"),
        (lambda link: link.replace("/*?", "/*/x?"), r"has a \* in another place"),
        (lambda link: link.replace("/*?", "/*/*?"), r"has a \* in another place"),
        (lambda link: link.partition("&")[0], "lacks Signature and Key-Pair-Id: was it cut off"),
        (lambda link: link.partition("&Key")[0], "lacks Key-Pair-Id"),
        (lambda link: link.partition("?")[0], "lacks Policy and Signature"),
        (lambda link: link.replace("Policy=ey", "Policy=ex!"), "Policy cannot be read"),
        (lambda link: link.replace("Policy=", "Policy=A"), "Policy cannot be read"),
        (lambda link: link + "&Signature=twice", "duplicate keys"),
        (lambda link: link + "é", "unexpected characters"),
        (lambda link: link + "#part", "unexpected characters"),
        (lambda link: link.replace("https:", "http:"), "not encrypted, expected https"),
        (lambda link: link.replace(HOST, "llama3-3.llamameta.net"), "parts of two links"),
        (lambda link: link.replace(HOST, "me:password@" + HOST), "host cannot be read"),
        (lambda link: link.replace(HOST, "[::1"), "host cannot be read"),
        (lambda link: make_link("mirror.example.com", scheme="https"), "--allow_host mirror.example.com"),
        (lambda link: make_link("llamameta.net.example.com", scheme="https"), "not one of Meta's hosts"),
        (lambda link: make_link("evilllamameta.net", scheme="https"), "not one of Meta's hosts"),
        (
            lambda link: "https://l.example.com/l.php?u=" + link.replace(":", "%3A").replace("/", "%2F"),
            "a page of l.ex",
        ),
        (lambda link: "https://www.llama.com/llama-downloads/?x=1", "a page of www.llama.com, not the signed link"),
        (lambda link: make_link(HOST, scheme="https", resource="https://other.llamameta.net/*"), "parts of two links"),
    ],
)
def test_a_broken_copy_is_explained_and_not_shown(copy, reason):
    text = copy(LINK)
    with pytest.raises(RequestError, match=reason) as caught:
        parse_link(text)
    said = str(caught.value) + repr(caught.value.__context__) + repr(caught.value.__cause__)
    assert [secret for secret in secrets_of(LINK) if secret in said] == [] and "\n" not in said


@pytest.mark.parametrize(
    "policy",
    [
        [],
        {},
        {"Statement": []},
        {"Statement": [{}]},
        {"Statement": [{"Resource": "https://x/*", "Condition": {"DateLessThan": {"AWS:EpochTime": "soon"}}}]},
        {"Statement": [{"Resource": "https://x/*", "Condition": {"DateLessThan": {"AWS:EpochTime": True}}}]},
        {"Statement": [{"Resource": "https://x/*", "Condition": {"DateLessThan": {"AWS:EpochTime": 10**30}}}]},
        {"Statement": [{"Resource": 3, "Condition": {"DateLessThan": {"AWS:EpochTime": 1}}}]},
    ],
)
def test_a_policy_of_another_form_is_damage(policy):
    encoded = base64.b64encode(json.dumps(policy).encode()).decode().translate(str.maketrans("+=/", "-_~"))
    with pytest.raises(RequestError, match="Policy cannot be read"):
        parse_link(f"https://{HOST}/*?Policy={encoded}&Signature=s&Key-Pair-Id=K")


def test_no_form_of_a_link_shows_its_query():
    link = parse_link(LINK)
    for text in (repr(link), str(link), f"{link}", repr([link])):
        assert HOST in text and SIGNATURE not in text and "Policy" not in text


def test_hosts_that_may_be_asked():
    check_host("https", "download6.llamameta.net")
    check_host("https", "mirror.example.com:8443", ["mirror.example.com"])
    check_host("https", "mirror.example.com:8443", ["mirror.example.com:8443"])
    check_host("http", "localhost:80", ["localhost"])
    check_host("http", "[::1]:80", ["[::1]:80"])
    for scheme, host, allowed in (
        ("http", "mirror.example.com", ["mirror.example.com"]),
        ("http", "download6.llamameta.net", []),
        ("https", "mirror.example.com:1", ["mirror.example.com:2"]),
        ("https", "localhost", []),
        ("ftp", "localhost", ["localhost"]),
        ("https", "x@download6.llamameta.net", []),
    ):
        with pytest.raises(RequestError):
            check_host(scheme, host, allowed)


def test_what_is_known_of_hosts():
    assert releases_of("llama3-3.llamameta.net") == "Llama 3.3" and releases_of("llama9.llamameta.net") is None
    assert releases_of("llama3-3.example.com") is None
