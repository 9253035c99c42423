"""Downloads from a faulty server: the result is complete, or the error is one clear line."""

import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from download.conftest import NAME, REMOTE, SHARD
from folders import PARAMS, byte_tokenizer
from llama_ref.checkpoint.releases import find_release
from llama_ref.download import part as parts
from llama_ref.download import release as releases
from llama_ref.download.link import parse_link
from llama_ref.download.release import repair, wanted_files
from llama_ref.errors import CheckpointError, DownloadError, RequestError
from loopback import (
    SIGNATURE,
    compressed,
    cut,
    damaged,
    expires,
    files_of,
    ignores_range,
    make_link,
    replaced,
    says,
    serve,
    silent,
    stall,
    status,
)
from make_random_checkpoint import make_random_checkpoint

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


def test_a_release_is_fetched_small_files_first_and_verified(downloads, loopback):
    outcome = downloads.run()
    downloads.check_whole()
    assert outcome.report.exit_code == 0 and outcome.report.ok
    assert set(outcome.fetched) == set(wanted_files(find_release(NAME)))
    assert outcome.fetched_bytes == sum(map(len, loopback.files.values()))
    order = list(dict.fromkeys(each.name.partition("/")[2] for each in loopback.asked))
    assert order == ["checklist.chk", "params.json", "tokenizer.model", SHARD]
    assert len(loopback.weights_asked()) == 4


def test_the_links_query_arrives_unchanged(downloads, loopback):
    downloads.run()
    query = loopback.link.partition("?")[2]
    assert {each.query for each in loopback.asked} == {query} and "~%7E" in query
    assert {each.headers["accept-encoding"] for each in loopback.asked} == {"identity"}


def test_every_sum_is_compared_and_nothing_is_hashed_twice(downloads, monkeypatch):
    hashed = []
    monkeypatch.setattr("llama_ref.checkpoint.integrity.hash_files", lambda wanted, *_: hashed.extend(wanted) or {})
    outcome = downloads.run()
    assert hashed == []
    assert all(file.found_sum == file.expected_sum for file in outcome.report.files)


# ---- server faults: (how it fails, how often)

CURED = {
    "cut": (SHARD, cut(5000), 3, False),
    "cut before the first byte": (SHARD, cut(0), 3, False),
    "cut in each range": (SHARD, cut(9000), 8, False),
    "stalled": (SHARD, stall(5000), 1, False),
    "silent": (SHARD, silent(), 1, False),
    "500": (SHARD, status(500), 3, False),
    "503 with a page": (SHARD, status(503, PAGE, Content_Type="text/html"), 2, False),
    "429": (SHARD, status(429, Retry_After="0"), 3, False),
    "429 with a date": (SHARD, status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), 1, False),
    "500 at the look-up": (SHARD, status(500), 3, True),
    "cut small file": ("checklist.chk", cut(10), 2, False),
    "ignores ranges": (SHARD, ignores_range, 99, False),
    "ignores ranges from the look-up on": (SHARD, ignores_range, 99, True),
    "ignores one range": (SHARD, ignores_range, 1, False),
    "416": (SHARD, status(416, Content_Range="bytes */5"), 1, False),
    "another range once": (SHARD, says("bytes {other}-{last}/{total}"), 2, False),
    "no range at all": (SHARD, says("whatever"), 2, False),
    "a shorter range": (SHARD, says("bytes {start}-{last}/{total}", 700), 5, False),
    "another length": (SHARD, says("bytes {start}-{last}/999999999"), 1, False),
}


@pytest.mark.parametrize("fault", CURED.values(), ids=CURED)
def test_what_passes_ends_whole(fault, downloads, loopback):
    name, act, times, look_ups = fault
    loopback.fail(name, act, times, look_ups=look_ups)
    if act is ignores_range and look_ups:
        loopback.fail(name, ignores_range, 99)
    outcome = downloads.run()
    downloads.check_whole()
    assert outcome.report.ok


FINAL = {
    "403": (SHARD, status(403), r"refused \(403\): the link is good for .* not for this release"),
    "401": (SHARD, status(401), r"refused \(401\)"),
    "404": (SHARD, status(404), r"refused \(404\).* there is no such file"),
    "410": ("params.json", status(410), r"refused \(410\)"),
    "500 for ever": (SHARD, status(500), r"the server answered 500, 6 times in a row; .* continues from here"),
    "cut for ever": (SHARD, cut(0), r"6 times in a row"),
    "429 for an hour": (SHARD, status(429, Retry_After="3600"), r"asks to wait for 3,600 seconds"),
    "418": (SHARD, status(418), r"answered 418, expected 206 or 200"),
    "a page with 200": (SHARD, status(200, PAGE, Content_Type="text/html; charset=utf-8"), "a web page instead of the file"),
    "XML with 200": (SHARD, status(200, b"<Error/>", Content_Type="application/xml"), "a web page instead of the file"),
    "a page that calls itself bytes": ("tokenizer.model", status(200, PAGE), "is an HTML page instead of the file"),
    "gzip": (SHARD, compressed, r"was sent with an encoding \(gzip\)"),
    "another range for ever": (SHARD, says("bytes {other}-{last}/{total}"), "sent other bytes than requested"),
    "another range at the look-up": (SHARD, says("bytes 7-7/{total}"), "sent other bytes than requested"),
    "other bytes": (SHARD, damaged, r"has the checksum \w+, checklist.chk says \w+; the partial file was removed"),
    "a list that is none": ("checklist.chk", status(200, b"Not a list of sums.\n"), "is not a list of checksums"),
    "an empty file": (SHARD, status(416, Content_Range="bytes */0"), "is empty on the server"),
    "a redirect to a login": (
        SHARD,
        status(302, Location="https://www.example.com/login?x=1"),
        "redirects to https://www.example.com",
    ),
    "a redirect to nowhere": (SHARD, status(302), "redirects to nowhere"),
}


AFTER_LOOK_UPS = ("other bytes", "another range for ever")  # faults that start after a correct look-up


@pytest.mark.parametrize("kind", FINAL)
def test_what_does_not_pass_ends_with_one_line(kind, downloads, loopback):
    name, act, line = FINAL[kind]
    loopback.fail(name, act, 10**6)
    if kind not in AFTER_LOOK_UPS:
        loopback.fail(name, act, 10**6, look_ups=True)
    said = downloads.fails(line)
    assert f"http://{loopback.host}/{REMOTE}/" in said
    downloads.check_names()
    assert not (downloads.folder / name).exists()


def test_a_link_that_ends_meanwhile_says_so_and_a_new_one_goes_on(downloads, loopback, monkeypatch):
    loopback.fail(SHARD, expires(5000))
    soon = make_link(loopback.host, time.time() + 1)
    monkeypatch.setattr("llama_ref.download.link.SignedLink.check_date", lambda self: None)
    monkeypatch.setattr("llama_ref.download.link.SignedLink.has_ended", lambda self, now=None: loopback.is_expired)
    downloads.fails(r"refused \(403\): the link .* Get a new one from https.* continues from here", link=soon, jobs=1)
    sent, here = loopback.sent, [json.loads(path.read_text()) for path in downloads.folder.glob("*.part.json")]
    assert sum(done for state in here for _, _, done in state["segments"]) >= 5000
    loopback.is_expired = False
    outcome = downloads.run()
    downloads.check_whole()
    assert outcome.fetched_bytes + 5000 <= len(loopback.files[f"{REMOTE}/{SHARD}"])
    assert loopback.sent - sent <= outcome.fetched_bytes + 1, "nothing was fetched twice, but for the look-up"


def test_a_link_that_has_ended_asks_for_nothing(downloads, loopback):
    downloads.fails("the link expired 3 hours ago", link=make_link(loopback.host, time.time() - 3 * 3600 - 5))
    assert loopback.asked == [] and not downloads.folder.exists()


def test_redirects_to_allowed_hosts_are_followed(downloads, loopback, tiny):
    with serve(files_of(tiny, REMOTE)) as other:
        location = f"http://{other.host}/{REMOTE}/{SHARD}?Signature={SIGNATURE}"
        for look_ups in (False, True):
            loopback.fail(SHARD, status(302, Location=location), 99, look_ups=look_ups)
        downloads.fails("redirects to http://127.0.0.1:\\d+, which is not followed")
        outcome = releases.download(
            find_release(NAME),
            parse_link(loopback.link, [loopback.host]),
            downloads.folder,
            allowed_hosts=[loopback.host, other.host],
        )
        assert outcome.report.ok and other.weights_asked()
    downloads.check_whole()


def test_a_circle_of_redirects_ends(downloads, loopback):
    location = f"http://{loopback.host}/{REMOTE}/params.json?Signature={SIGNATURE}"
    loopback.fail("params.json", status(302, Location=location), 99, look_ups=True)
    downloads.fails("redirected 4 times")


# ---- resuming


def interrupted(downloads, loopback, after=9000) -> None:
    """A download that was interrupted in the middle of a range."""
    loopback.fail(SHARD, cut(after), 4)
    loopback.fail(SHARD, status(403), 10**6)
    downloads.fails("403", jobs=1)
    loopback.faults.clear()
    loopback.asked.clear()


def test_a_second_run_fetches_only_the_rest(downloads, loopback):
    interrupted(downloads, loopback)
    here = json.loads((downloads.folder / f"{SHARD}.part.json").read_text())
    assert sum(done for _, _, done in here["segments"]) >= 9000
    outcome = downloads.run()
    downloads.check_whole()
    total = len(loopback.files[f"{REMOTE}/{SHARD}"])
    assert outcome.fetched_bytes == total - sum(done for _, _, done in here["segments"])
    etag = loopback.etag(f"{REMOTE}/{SHARD}")
    assert all(each.headers["if-range"] == etag for each in loopback.weights_asked())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: "{",
        lambda state: "[]",
        lambda state: json.dumps(state | {"version": 2}),
        lambda state: json.dumps(state | {"segments": state["segments"][1:]}),
        lambda state: json.dumps(state | {"segments": [[0, state["total"], state["total"] + 1]]}),
        lambda state: json.dumps(state | {"segments": [[0, state["total"], True]]}),
        lambda state: json.dumps(state | {"segments": []}),
        lambda state: json.dumps(state | {"etag": '"other"'}),
        lambda state: json.dumps(state | {"address": "http://127.0.0.1/elsewhere"}),
    ],
)
def test_a_state_that_cannot_be_trusted_begins_again(spoil, downloads, loopback):
    interrupted(downloads, loopback)
    path = downloads.folder / f"{SHARD}.part.json"
    path.write_text(spoil(json.loads(path.read_text())))
    outcome = downloads.run()
    downloads.check_whole()
    assert outcome.fetched_bytes == len(loopback.files[f"{REMOTE}/{SHARD}"])


def test_a_part_that_was_changed_is_not_named(downloads, loopback):
    interrupted(downloads, loopback)
    part = downloads.folder / f"{SHARD}.part"
    data = bytearray(part.read_bytes())
    state = json.loads((downloads.folder / f"{SHARD}.part.json").read_text())
    data[next(start for start, _, done in state["segments"] if done)] ^= 1
    part.write_bytes(data)
    downloads.fails("has the checksum")
    assert not part.exists() and not (downloads.folder / SHARD).exists()
    assert downloads.run().report.ok
    downloads.check_whole()


def test_a_file_that_changes_between_two_runs_is_begun_again(downloads, loopback):
    interrupted(downloads, loopback)
    loopback.etags[f"{REMOTE}/{SHARD}"] = '"another"'
    outcome = downloads.run()
    assert outcome.fetched_bytes == len(loopback.files[f"{REMOTE}/{SHARD}"])
    downloads.check_whole()


def test_a_file_that_changes_meanwhile_is_never_mixed(downloads, loopback):
    name = f"{REMOTE}/{SHARD}"
    right = loopback.files[name]
    loopback.files[name] = bytes(len(right))
    loopback.fail(SHARD, replaced(right, 7000))
    assert downloads.run().report.ok
    downloads.check_whole()


def test_a_file_that_never_stops_changing_ends_with_a_line(downloads, loopback):
    right = loopback.files[f"{REMOTE}/{SHARD}"]
    for n in range(200):
        loopback.fail(SHARD, replaced(right + bytes(n + 1), 100))
    downloads.fails("changes on the server while it is fetched|has the checksum")
    assert not (downloads.folder / SHARD).exists()


def test_without_an_etag_the_sum_decides(downloads, loopback, monkeypatch):
    weak = 'W/"weak"'
    loopback.etags[f"{REMOTE}/{SHARD}"] = weak
    loopback.fail(SHARD, cut(5000), 2)
    assert downloads.run().report.ok
    assert all("if-range" not in each.headers for each in loopback.weights_asked())
    downloads.check_whole()


def test_a_failure_of_one_file_keeps_what_arrived_of_others(downloads, loopback):
    loopback.fail(SHARD, status(403), 10**6)
    downloads.fails("403")
    assert {path.name for path in downloads.folder.iterdir() if ".part" not in path.name} == {
        "checklist.chk",
        "params.json",
        "tokenizer.model",
    }


# ---- the disk


def test_space_is_checked_before_the_first_weights(downloads, loopback, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 12\d kB and 1 kB are free there"):
        downloads.run()
    assert loopback.weights_asked() == []


def test_what_has_arrived_counts_for_the_space(downloads, loopback, monkeypatch):
    interrupted(downloads, loopback, after=20_000)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000))
    assert downloads.run().report.ok


def test_a_disk_that_fills_up_ends_with_a_line_and_goes_on_later(downloads, loopback, monkeypatch):
    real, full = parts.os.pwrite, threading.Event()

    def pwrite(file, data, position):
        if full.is_set() or position > 40_000:
            full.set()
            raise OSError(28, "No space left on device")
        return real(file, data, position)

    monkeypatch.setattr(parts.os, "pwrite", pwrite)
    downloads.fails(r"cannot write .*\.part: No space left on device; free some space there")
    monkeypatch.setattr(parts.os, "pwrite", real)
    assert downloads.run().report.ok
    downloads.check_whole()


def test_a_folder_that_cannot_be_made_is_a_line(downloads, tmp_path):
    (tmp_path / "home").write_text("a file")
    downloads.fails("cannot write into .*Not a directory")


# ---- subsets of files, and repairs


def test_only_some_files(downloads, loopback):
    outcome = downloads.run(only=["tokenizer.model"])
    assert outcome.report.ok and [file.name for file in outcome.report.files] == ["tokenizer.model"]
    assert {path.name for path in downloads.folder.iterdir()} == {"checklist.chk", "tokenizer.model"}
    with pytest.raises(RequestError, match="has no file 'tokenizer'"):
        downloads.run(only=["tokenizer"])


def test_what_is_there_is_not_fetched_again(downloads, loopback, tiny):
    shutil.copytree(tiny, downloads.folder)
    outcome = downloads.run()
    assert outcome.report.ok and loopback.asked == [] and not outcome.fetched


def run_repair(downloads, loopback):
    host = [loopback.host]
    return repair(find_release(NAME), downloads.folder, lambda: parse_link(loopback.link, host), allowed_hosts=host)


def test_repair_fetches_what_is_wrong_and_nothing_else(downloads, loopback, tiny, settled):
    shutil.copytree(tiny, downloads.folder)
    shard = downloads.folder / SHARD
    shard.write_bytes(shard.read_bytes()[:5000])
    (downloads.folder / "tokenizer.model").unlink()
    outcome = run_repair(downloads, loopback)
    assert set(outcome.fetched) == {SHARD, "tokenizer.model"} and outcome.report.ok
    downloads.check_whole()


def test_repair_begins_with_a_list_that_is_wrong(downloads, loopback, tiny, settled):
    shutil.copytree(tiny, downloads.folder)
    (downloads.folder / "checklist.chk").write_bytes(PAGE)
    (downloads.folder / "params.json").write_text("{}")
    outcome = run_repair(downloads, loopback)
    assert set(outcome.fetched) == {"checklist.chk", "params.json"} and outcome.report.ok
    downloads.check_whole()


def test_repair_of_a_whole_folder_asks_for_no_link(downloads, loopback, tiny):
    shutil.copytree(tiny, downloads.folder)

    def no_link():
        raise AssertionError("asked")

    assert repair(find_release(NAME), downloads.folder, no_link).report.ok and loopback.asked == []


def test_a_wrong_file_stays_until_the_new_one_is_whole(downloads, loopback, tiny, settled):
    shutil.copytree(tiny, downloads.folder)
    (downloads.folder / "params.json").write_text("{}")
    loopback.fail("params.json", status(403), 99, look_ups=True)
    with pytest.raises(DownloadError, match="403"):
        run_repair(downloads, loopback)
    assert (downloads.folder / "params.json").read_text() == "{}"


# ---- other layouts


def test_a_release_of_several_shards(tmp_path, monkeypatch):
    params = PARAMS | {"n_heads": 8, "n_kv_heads": 8, "dim": 64}
    made = make_random_checkpoint(tmp_path / "Made", params, shards=8, tokenizer=byte_tokenizer(tmp_path / "made.model"))
    folder = tmp_path / "Llama3.1-70B"
    with serve(files_of(made, "Llama-3.1-70B")) as loopback:
        for _ in range(8):
            loopback.fail(r"consolidated", cut(3000))
        host = [loopback.host]
        outcome = releases.download(find_release("Llama3.1-70B"), parse_link(loopback.link, host), folder, allowed_hosts=host)
    assert outcome.report.ok and len(outcome.fetched) == 11
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in made.iterdir()
    }


def test_a_folder_that_the_server_calls_otherwise(tiny, tmp_path):
    with serve(files_of(tiny, "8b_instruction_tuned")) as loopback:
        host = [loopback.host]
        folder = tmp_path / "Llama-3-8B-Instruct"
        link = parse_link(loopback.link, host)
        assert releases.download(find_release("Llama-3-8B-Instruct"), link, folder, allowed_hosts=host).report.ok


def test_what_cannot_be_loaded_has_its_sums_compared(tmp_path):
    release = find_release("Llama-Guard-3-1B:int4")
    content = {name: name.encode() for name in wanted_files(release)[1:]}
    lines = "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in content.items())
    files = {f"Llama-Guard-3-1B-INT4/{name}": data for name, data in (content | {"checklist.chk": lines.encode()}).items()}
    with serve(files) as loopback:
        host = [loopback.host]
        outcome = releases.download(release, parse_link(loopback.link, host), tmp_path / "Guard", allowed_hosts=host)
    assert outcome.report.ok and len(outcome.report.files) == 4


# ---- concurrent downloads


def test_two_at_once_fetch_each_file_once(downloads, loopback, caplog):
    loopback.fail(SHARD, stall(100))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(downloads.run)
        assert loopback.reached.wait(10)
        second = pool.submit(downloads.run)
        while "is downloading into" not in caplog.text:
            assert not second.done()
            time.sleep(0.01)
        loopback.go.set()
        assert first.result().report.ok and second.result().report.ok
    assert second.result().fetched == {}
    assert f"waiting for process {os.getpid()}, which is downloading into" in caplog.text
    downloads.check_whole()
