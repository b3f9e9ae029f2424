"""One request against bad manners: the right verdict, in time, and nothing half in the store."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from upstream import Answer, json_answer

import adce

GOOD = b'{"id": "7", "plays": [1, 2, 3]}'
KEY = "games/7.json"


@pytest.fixture
def store(tmp_path) -> adce.FolderStore:
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    return store


def specification(address: str, path: str = "/x", **source) -> adce.FetchSpec:
    dataset = adce.Dataset(
        name="games",
        source="espn",
        key=adce.Template("games/{game_id}.json"),
        partitions=adce.Partitions(parent="days", names="game_id"),
        url=adce.Template(path),
        validate=adce.Validation(json=True, min_bytes=5, max_bytes=1 << 20, require=("id == '{game_id}'",)),
    )
    settings = {"base_url": address, "timeout_seconds": 1.0, "error_when": "code && message", **source}
    target = adce.Target(KEY, {"game_id": "7"}, is_missing=True)
    return adce.FetchSpec(dataset, adce.Source("espn", **settings), (), (target,), url=address + path)


def fetch(spec: adce.FetchSpec, store: adce.Store) -> adce.Result:
    return adce.fetch(spec, store, adce.Clock())[0]


O = adce.Outcome  # noqa: E741  # a column of the table
VERDICTS = {
    "a good answer": (Answer(GOOD), O.OK, None),
    "dropped": (Answer(behaviour="drop"), O.BROKEN, "the connection to 127.0.0.1 broke"),
    "shorter than promised": (Answer(GOOD, behaviour="short"), O.BROKEN, "127.0.0.1"),
    "cut without a length": (Answer(GOOD, behaviour="no_length"), O.INVALID, "not JSON"),
    "cut in a chunk": (Answer(GOOD, behaviour="chunked_cut"), O.BROKEN, "127.0.0.1"),
    "no answer at all": (Answer(behaviour="hang"), O.TIMEOUT, "no whole answer within 1 s"),
    "headers for ever": (Answer(behaviour="drip_headers"), O.TIMEOUT, "no whole answer within 1 s"),
    "a byte now and then": (Answer(behaviour="drip_body"), O.TIMEOUT, "no whole answer within 1 s"),
    "a byte now and then, to the end": (
        Answer(headers={"Connection": "close"}, behaviour="drip_body"),
        O.TIMEOUT,
        "no whole answer within 1 s",
    ),
    "a late answer": (Answer(GOOD, delay_seconds=3), O.TIMEOUT, "no whole answer within 1 s"),
    "no end": (Answer(behaviour="endless_body"), O.INVALID, "longer than 1048576 bytes"),
    "a bomb": (Answer(behaviour="gzip_bomb"), O.INVALID, "longer than 1048576 bytes"),
    "broken encoding": (Answer(behaviour="garbage_gzip"), O.INVALID, "its encoding is broken"),
    "empty": (Answer(b""), O.INVALID, "0 bytes, fewer than 5"),
    "a page instead of data": (Answer(b"<html>sorry</html>"), O.INVALID, "not JSON"),
    "not a number": (Answer(b'{"id": NaN}'), O.INVALID, "NaN is not JSON"),
    "too deep": (Answer(b"[" * 50_000), O.INVALID, "not JSON"),
    "another object": (Answer(b'{"id": "8"}'), O.INVALID, "not true: id == '{game_id}'"),
    "an error with 200": (json_answer({"code": 500, "message": "oops"}), O.HTTP_ERROR, "HTTP 200, an error"),
    "nothing there, with 200": (json_answer({"code": 404, "message": "none"}), O.NOT_YET, "HTTP 200"),
    "nothing there": (Answer(b"Not Found", 404), O.NOT_YET, "HTTP 404: Not Found"),
    "gone": (Answer(b"", 410), O.NOT_YET, "HTTP 410: empty"),
    "no such object in a bucket": (
        Answer(b"<Error><Code>AccessDenied</Code></Error>", 403),
        O.NOT_YET,
        "no such object",
    ),
    "forbidden": (Answer(b"<html>Access Denied</html>", 403), O.HTTP_ERROR, "HTTP 403: Access Denied"),
    "bad request": (Answer(b"no", 400), O.HTTP_ERROR, "HTTP 400: no"),
    "trouble": (Answer(b"trouble", 500), O.HTTP_ERROR, "HTTP 500: trouble"),
    "slow down": (Answer(b"slow down", 429), O.THROTTLED, "HTTP 429: slow down"),
    "away for a while": (Answer(b"back soon", 503), O.THROTTLED, "HTTP 503: back soon"),
    "no content": (Answer(b"", 204), O.HTTP_ERROR, "HTTP 204"),
    "part of it": (Answer(GOOD, 206), O.HTTP_ERROR, "HTTP 206"),
    "not modified": (Answer(b"", 304), O.HTTP_ERROR, "HTTP 304"),
    "control characters": (Answer(b"\x1b[31mred\r\nnext", 500), O.HTTP_ERROR, "HTTP 500: ?[31mred next"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_answer_has_the_right_verdict_in_time(case, upstream, store):
    answer, outcome, reason = VERDICTS[case]
    upstream.answer("/x", answer)
    started = time.monotonic()
    result = fetch(specification(upstream.address), store)
    assert time.monotonic() - started < 4
    assert result.outcome == outcome
    assert (reason or "") in (result.error or "")
    assert (upstream.count(), result.requests) == (1, 1)
    assert [stored.key for stored in store.list("")] == ([KEY] if outcome is O.OK else [])


def test_stored_object_is_what_was_sent_byte_for_byte(upstream, store):
    upstream.answer("/x", Answer(GOOD + b"  \r\n"))
    result = fetch(specification(upstream.address), store)
    assert store.read(KEY) == GOOD + b"  \r\n"
    assert result.stored == store.find(KEY)


def test_object_that_is_there_already_is_not_asked_for(upstream, store):
    store.write(KEY, GOOD)
    result = fetch(specification(upstream.address), store)
    assert (result.outcome, result.requests, upstream.count()) == (O.OK, 0, 0)


def test_broken_object_that_is_there_is_replaced(upstream, store):
    store.write(KEY, b"half an obj")
    upstream.answer("/x", Answer(GOOD))
    assert fetch(specification(upstream.address), store).outcome is O.OK
    assert store.read(KEY) == GOOD


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:9", "127.0.0.1 cannot be reached: Connection refused"),
        ("http://no.invalid", "no.invalid cannot be"),
    ],
)
def test_source_without_a_server_is_unreachable(address, reason, store):
    result = fetch(specification(address), store)
    assert result.outcome is O.UNREACHABLE
    assert reason in (result.error or "")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        ("-5", None),
        ("soon", None),
        (None, None),
        ("Wed, 21 Oct 2026 07:29:00 GMT", 60),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0),
        ("99999999999999", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date_by_the_answers_own_clock(header, seconds):
    assert adce.parse_retry_after(header, "Wed, 21 Oct 2026 07:28:00 GMT") == seconds


def test_throttling_answer_hands_its_retry_after_on(upstream, store):
    upstream.answer("/x", Answer(b"wait", 429, {"Retry-After": "77"}))
    assert fetch(specification(upstream.address), store).retry_after == 77


def test_status_that_means_blocked_pauses_for_as_long_as_configured(upstream, store):
    upstream.answer("/x", Answer(b"denied", 403))
    spec = specification(upstream.address, blocked_when=adce.BlockedWhen(status=(403,), pause_seconds=1800))
    result = fetch(spec, store)
    assert (result.outcome, result.retry_after) == (O.THROTTLED, 1800)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/y?a=1", "{}/y?a=1"),
        ("//127.0.0.1:9/z", "http://127.0.0.1:9/z"),
        ("http://other.invalid/", "http://other.invalid/"),
    ],
)
def test_redirect_is_handed_back_and_not_followed(location, target, upstream, store):
    upstream.answer("/x", Answer(b"", 302, {"Location": location}))
    result = fetch(specification(upstream.address), store)
    assert result.redirect == target.format(upstream.address)
    assert upstream.count() == 1


def test_redirects_have_an_end(upstream, store):
    upstream.answer("/x", Answer(b"", 302, {"Location": "/x"}))
    spec = adce.dataclasses.replace(specification(upstream.address), hops=adce.MAX_REDIRECTS)
    result = fetch(spec, store)
    assert (result.outcome, result.redirect) == (O.HTTP_ERROR, None)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://example.org/", "gopher://x"])
def test_redirect_to_another_kind_of_address_is_refused(location, upstream, store):
    upstream.answer("/x", Answer(b"", 302, {"Location": location}))
    result = fetch(specification(upstream.address), store)
    assert (result.outcome, result.redirect) == (O.HTTP_ERROR, None)
    assert "refused" in (result.error or "")


def test_secret_header_is_not_sent_to_another_host(upstream, store):
    upstream.answer("/x", Answer(GOOD))
    headers = {"X-Api-Key": "secret", "Authorization": "Bearer secret", "User-Agent": "me"}
    spec = specification(upstream.address, base_url="http://example.org", headers=headers)
    fetch(spec, store)
    fetch(
        adce.dataclasses.replace(spec, source=adce.dataclasses.replace(spec.source, base_url=upstream.address), hops=1),
        store,
    )
    sent = [arrival.headers for arrival in upstream.arrivals]
    assert ("secret" in str(sent[0]), sent[0]["User-Agent"]) == (False, "me")
    assert "secret" in str(sent[1])


def test_secret_of_the_address_is_in_no_error(store):
    for address in ("http://127.0.0.1:9", "http://no.invalid", "http://user:hunter2@127.0.0.1:9"):
        result = fetch(specification(address, "/x?api_key=hunter2"), store)
        assert "hunter2" not in repr(result)


def test_proxy_and_netrc_of_the_environment_are_ignored(upstream, store, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    upstream.answer("/x", Answer(GOOD))
    assert fetch(specification(upstream.address), store).outcome is O.OK
    assert "Authorization" not in upstream.arrivals[0].headers


def test_permit_that_ran_out_is_not_used(upstream, store):
    spec = adce.dataclasses.replace(specification(upstream.address), send_before=adce.Clock().boot() - 1)
    result = fetch(spec, store)
    assert (result.outcome, result.requests, upstream.count()) == (O.LOST, 0, 0)


def test_store_that_takes_nothing_is_told(upstream, store):
    upstream.answer("/x", Answer(GOOD))
    store.write("games", b"a file where the folder should be")
    result = fetch(specification(upstream.address), store)
    assert result.outcome is O.STORE_ERROR


BOMB_VICTIM = """
import sys; sys.path[:0] = sys.argv[1:3]
import resource, pathlib, adce, requests
from test_requests import specification
store = adce.FolderStore(pathlib.Path(sys.argv[3])); store.sweep()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(adce.fetch(specification(sys.argv[4]), store, adce.Clock())[0].outcome)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bomb_takes_little_memory(upstream, tmp_path):
    upstream.answer("/x", Answer(behaviour="gzip_bomb"))
    words = [sys.executable, "-c", BOMB_VICTIM, str(ROOT), str(Path(__file__).parent), str(tmp_path), upstream.address]
    outcome, kilobytes = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert outcome == "invalid"
    assert int(kilobytes) < 50_000
    assert resource.getpagesize() > 0
