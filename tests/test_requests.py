"""One request against bad manners: the right verdict, in time, and nothing half in the store."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runners import read_object
from upstream import BOMB, Answer, Upstream, json_answer

import adce

GOOD = b'{"id": "7", "plays": [1, 2, 3]}'
KEY = "games/7.json"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def store(tmp_path) -> adce.FolderStore:
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    return store


def specification(address: str, path: str = "/x", **source) -> adce.Claim:
    dataset = adce.Dataset(
        name="games",
        source="espn",
        key=adce.Template("games/{game_id}.json"),
        partitions=adce.Partitions(parents=("days",), id_field="game_id"),
        url=adce.Template(path),
        validate=adce.Validation(json=True, min_bytes=5, max_bytes=1 << 20, require=("id == '{game_id}'",)),
    )
    known = frozenset({address.rpartition("/")[2]})  # another source of the same configuration
    settings = {"base_url": address, "timeout_seconds": 1.0, "error_when": "code && message", "known_hosts": known}
    settings |= source
    target = adce.ObjectRow(key=KEY, fields_json='{"game_id": "7"}', state=adce.ObjectState.MISSING)
    return adce.Claim(dataset, adce.Source("espn", **settings), (target,), url=address + path)


def fetch(spec: adce.Claim, store: adce.Store) -> adce.Result:
    return adce.fetch(spec, store, adce.Clock())[0]


def files(store: adce.FolderStore) -> list[str]:
    """Everything in the folder, what is half written included."""
    return [path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file()]


O = adce.Outcome  # noqa: E741  # a column of the table
VERDICTS = {
    "a good answer": (Answer(GOOD), O.OK, None),
    "dropped": (Answer(behaviour="drop"), O.BROKEN, "127.0.0.1 connection closed by server"),
    "shorter than promised": (Answer(GOOD, behaviour="short"), O.BROKEN, "127.0.0.1"),
    "cut without a length": (Answer(GOOD, behaviour="no_length"), O.INVALID, "not JSON"),
    "cut in a chunk": (Answer(GOOD, behaviour="chunked_cut"), O.BROKEN, "127.0.0.1"),
    "no answer at all": (Answer(behaviour="hang"), O.TIMEOUT, "timed out after 0.5 s"),
    "headers for ever": (Answer(behaviour="drip_headers"), O.TIMEOUT, "timed out after 0.5 s"),
    "a byte now and then": (Answer(behaviour="drip_body"), O.TIMEOUT, "timed out after 0.5 s"),
    "a byte now and then, to the end": (
        Answer(headers={"Connection": "close"}, behaviour="drip_body"),
        O.TIMEOUT,
        "timed out after 0.5 s",
    ),
    "a late answer": (Answer(GOOD, delay_seconds=60), O.TIMEOUT, "timed out after 0.5 s"),
    "no end": (Answer(behaviour="endless_body"), O.INVALID, "longer than 1048576 bytes"),
    "a bomb": (Answer(behaviour="gzip_bomb"), O.INVALID, "longer than 1048576 bytes"),
    "broken encoding": (Answer(behaviour="garbage_gzip"), O.BROKEN, "its encoding is broken: incorrect header check"),
    "empty": (Answer(b""), O.INVALID, "0 bytes, fewer than 5"),
    "a page instead of data": (Answer(b"<html>sorry</html>"), O.INVALID, "not JSON"),
    "not a number": (Answer(b'{"id": NaN}'), O.INVALID, "NaN is not JSON"),
    "too deep": (Answer(b"[" * 10_000 + b"]" * 10_000), O.INVALID, "not JSON"),
    "infinite": (Answer(b'{"id": -Infinity}'), O.INVALID, "Infinity is not JSON"),
    "not text": (Answer(b'{"id": "7", "x": "\xff\xfe"}'), O.INVALID, "not JSON"),
    "too many headers": (Answer(GOOD, headers={f"X-{n}": "x" for n in range(150)}), O.BROKEN, "sent too many"),
    "another object": (Answer(b'{"id": "8"}'), O.INVALID, "require is not true: id == '{game_id}'"),
    "an error with 200": (json_answer({"code": 500, "message": "oops"}), O.HTTP_ERROR, "HTTP 200, an error"),
    "nothing there, with 200": (json_answer({"code": 404, "message": "none"}), O.NOT_YET, "HTTP 200"),
    "nothing there": (Answer(b"Not Found", 404), O.NOT_YET, "HTTP 404: Not Found"),
    "gone": (Answer(b"", 410), O.NOT_YET, "HTTP 410"),
    "no such object in a bucket": (
        Answer(b"<Error><Code>AccessDenied</Code></Error>", 403),
        O.NOT_YET,
        "HTTP 403: AccessDenied",
    ),
    "a signed url that has expired": (
        Answer(b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", 403),
        O.HTTP_ERROR,
        "Request has expired",
    ),
    "forbidden": (Answer(b"<html>Access Denied</html>", 403), O.HTTP_ERROR, "HTTP 403: Access Denied"),
    "bad request": (Answer(b"no", 400), O.HTTP_ERROR, "HTTP 400: no"),
    "trouble": (Answer(b"trouble", 500), O.HTTP_ERROR, "HTTP 500: trouble"),
    "a good answer with a bad status": (Answer(GOOD, 500), O.HTTP_ERROR, 'HTTP 500: {"id": "7"'),
    "a redirect to nowhere": (Answer(b"", 302), O.HTTP_ERROR, "HTTP 302"),
    "slow down": (Answer(b"slow down", 429), O.THROTTLED, "HTTP 429: slow down"),
    "away for a while": (Answer(b"back soon", 503), O.THROTTLED, "HTTP 503: back soon"),
    "no content": (Answer(b"", 204), O.NOT_YET, "HTTP 204"),
    "part of it": (Answer(GOOD, 206), O.HTTP_ERROR, "HTTP 206"),
    "not modified": (Answer(b"", 304), O.HTTP_ERROR, "HTTP 304"),
    "control characters": (Answer(b"\x1b[31mred\r\nnext", 500), O.HTTP_ERROR, "HTTP 500: ?[31mred next"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_answer_has_the_right_verdict_in_time(case, upstream, store):
    answer, outcome, reason = VERDICTS[case]
    upstream.answer("/x", answer)
    seconds = 0.5 if outcome is O.TIMEOUT else 10.0
    started = time.monotonic()
    result = fetch(specification(upstream.address, timeout_seconds=seconds), store)
    assert time.monotonic() - started < 8
    assert (result.outcome, upstream.count(), result.requests) == (outcome, 1, 1)
    assert (reason or "") in (result.error or "")
    assert files(store) == ([KEY] if outcome is O.OK else [])


@contextlib.contextmanager
def speaker(first: bytes, piece: bytes = b"", times: int = 600) -> Iterator[str]:
    """The address of a server that says these bytes, then a piece of more now and then; it knows no HTTP."""
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):  # the listener is closed, or a client has left
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(first)
                    for _ in range(times if piece else 0):
                        stopping.wait(0.05)
                        connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        stopping.set()
        listener.shutdown(socket.SHUT_RDWR)  # accept() returns
        thread.join()


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 20", b"0"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_dripping_server_is_left_at_the_deadline_whatever_it_promised(first, piece, store):
    started = time.monotonic()
    with speaker(first, piece) as address:
        result = fetch(specification(address, timeout_seconds=0.4), store)
    assert result.outcome is O.TIMEOUT
    assert time.monotonic() - started < 8
    assert files(store) == []


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", O.BROKEN),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 X\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + GOOD, O.OK),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}", O.BROKEN),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, O.BROKEN),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1f\r\n" + GOOD + b"\r\n0\r\n\r\n", O.BROKEN),
        (b"HTTP/1.1 99999 What\r\n\r\n", O.BROKEN),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n", O.HTTP_ERROR),
        (b"SSH-2.0-OpenSSH_9.2\r\n", O.BROKEN),
        (b"\x00\xff\xfe", O.BROKEN),
    ],
)
def test_server_that_hardly_speaks_http_gets_a_verdict(said, outcome, store):
    with speaker(said) as address:
        result = fetch(specification(address, timeout_seconds=10), store)
    assert result.outcome is outcome
    assert files(store) == ([KEY] if outcome is O.OK else [])


HEAD = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 302 \r\nLocation: ", b"HTTP/1.1 200 OK"]
)
LINE = st.sampled_from([b"Content-Length: ", b"Content-Encoding: gzip\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n"])
NOISE = st.binary(max_size=30) | st.integers(-5, 99).map(lambda number: b"%d\r\n" % number) | st.just(GOOD)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.builds(lambda head, parts: head + b"".join(parts), HEAD, st.lists(LINE | NOISE, max_size=8)))
def test_no_answer_raises_and_what_is_stored_is_valid(said, store):
    with speaker(said) as address:
        result = fetch(specification(address, timeout_seconds=5), store)
    assert result.outcome in (O.OK, O.BROKEN, O.INVALID, O.HTTP_ERROR, O.RUNNING)
    assert files(store) == ([KEY] if result.outcome is O.OK else [])
    (store.root / KEY).unlink(missing_ok=True)


def test_stored_object_is_what_was_sent_byte_for_byte(upstream, store):
    upstream.answer("/x", Answer(GOOD + b"  \r\n"))
    result = fetch(specification(upstream.address), store)
    assert read_object(store, KEY) == GOOD + b"  \r\n"
    assert result.stored == store.find(KEY)


TEXT = b"".join(b"%d\n" % (number * 7919 % 10007) for number in range(9000))


def bare_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


def members(body: bytes) -> bytes:
    return gzip.compress(body[:999]) + gzip.compress(body[999:])


ENCODINGS = {
    "plain": ("", bytes),
    "gzip": ("gzip", gzip.compress),
    "gzip members": ("x-gzip", members),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("Deflate", bare_deflate),
    "gzip of deflate": ("deflate, gzip", lambda body: gzip.compress(zlib.compress(body))),
}


def text_of(address: str, key: str = KEY, **source) -> adce.Claim:
    """A claim on a text of which each half would be valid too."""
    spec = specification(address, **{"timeout_seconds": 10.0, **source})
    validation = adce.Validation(min_bytes=0, max_bytes=1 << 20)
    return dataclasses.replace(
        spec,
        dataset=dataclasses.replace(spec.dataset, key=adce.Template(key), validate=validation),
        tasks=(spec.tasks[0]._replace(key=key),),
    )


def in_chunks(body: bytes, size: int = 5000, form: bytes = b"%x") -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(form % len(part) + b"\r\n" + part + b"\r\n" for part in [*parts, b""])


@pytest.mark.parametrize("percent", range(0, 101, 5))
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_body_that_is_cut_is_broken_and_never_stored(encoding, percent, store):
    name, encode = ENCODINGS[encoding]
    body = encode(TEXT)
    size = len(body) * percent // 100
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Encoding: %s\r\n" % name.encode()
    chunks, chunked = in_chunks(body), b"Transfer-Encoding: chunked\r\n\r\n"
    answers = [
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:size],
        head + chunked + chunks[: len(chunks) * percent // 100],
    ]
    if name:  # then the half is known by itself, though its length or its chunks are in order
        answers += [
            head + b"Content-Length: %d\r\n\r\n" % size + body[:size],
            head + chunked + in_chunks(body[:size]),
            head + b"\r\n" + body[:size],
        ]
    for answer in answers:
        with speaker(answer) as address:
            result = fetch(text_of(address), store)
        assert (result.outcome, result.http_status) == (O.OK if percent == 100 else O.BROKEN, 200), result.error
        assert files(store) == ([KEY] if percent == 100 else [])
        assert percent < 100 or read_object(store, KEY) == TEXT
        (store.root / KEY).unlink(missing_ok=True)


@pytest.mark.parametrize("cut", [*range(1, 12), *range(5008, 5024)])
def test_cut_in_a_padded_chunk_size_is_not_the_end(cut, store):
    with speaker(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + in_chunks(TEXT, form=b"%08x")[:cut]
    ) as address:
        assert fetch(text_of(address), store).outcome is O.BROKEN
    assert files(store) == []


@pytest.mark.parametrize("end", [b"0\r\n", b"0\r\n\r\n", b"0\r\nX-Sum: 7\r\n\r\n", b"0;name=x\r\nX-S"])
def test_chunks_are_whole_with_the_last_one(end, store):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with speaker(head + in_chunks(TEXT).removesuffix(b"0\r\n\r\n") + end) as address:
        assert fetch(text_of(address), store).outcome is O.OK
    assert read_object(store, KEY) == TEXT


def test_negative_chunk_size_is_broken(store):
    with speaker(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n" + TEXT + b"\r\n0\r\n\r\n") as address:
        assert fetch(text_of(address), store).outcome is O.BROKEN


@pytest.mark.parametrize(("rest", "outcome"), [(bytes(512), O.OK), (b"garbage", O.BROKEN), (b"\x1f", O.BROKEN)])
def test_after_the_end_of_gzip_come_zeros_or_another_member_only(rest, outcome, upstream, store):
    upstream.answer("/x", Answer(gzip.compress(TEXT) + rest, headers={"Content-Encoding": "gzip"}))
    assert fetch(text_of(upstream.address), store).outcome is outcome
    assert files(store) == ([KEY] if outcome is O.OK else [])


@pytest.mark.parametrize(
    ("asked", "coding", "error"),
    [
        (None, "br", "Content-Encoding br, which was not asked for"),
        (None, "zstd", "Content-Encoding zstd, which was not asked for"),
        ("gzip, br", "br", "Content-Encoding br, which cannot be undone"),
        ("identity", "gzip", "Content-Encoding gzip, which was not asked for"),
        ("gzip;q=0, deflate", "gzip", "Content-Encoding gzip, which was not asked for"),
        ("deflate;q=0, gzip;q=0.5", "gzip", None),
        (None, "identity", None),
        (None, "gzip" + ",gzip" * 9999, "Content-Encoding gzip, which cannot be undone"),
        (None, "\x1b[31mred", "Content-Encoding [31mred, which was not asked for"),
        ("*", "gzip", None),
    ],
)
def test_encoding_is_undone_only_when_it_was_asked_for(asked, coding, error, upstream, store):
    body = gzip.compress(TEXT) if coding == "gzip" else TEXT
    upstream.answer("/x", Answer(body, headers={"Content-Encoding": coding}))
    headers = {"accept-encoding": asked} if asked else {}
    result = fetch(text_of(upstream.address, headers=headers), store)
    sent = {name.lower(): text for name, text in upstream.arrivals[0].headers.items()}
    assert sent["accept-encoding"] == (asked or "gzip, deflate")
    assert (result.outcome, result.error) == (O.BROKEN if error else O.OK, error)
    assert read_object(store, KEY) == TEXT if error is None else files(store) == []


@pytest.mark.parametrize("key", ["a.csv.gz", "a.GZ", "a.zip", "a.zst", "a.bz2", "a.xz", "a.parquet"])
@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "gzip"}])
def test_compressed_file_is_asked_for_and_kept_as_it_is(key, headers, upstream, store):
    file = gzip.compress(TEXT)
    upstream.answer("/x", Answer(file, headers=headers))
    spec = text_of(upstream.address, key, headers={"accept-encoding": "gzip, br"})
    assert fetch(spec, store).outcome is O.OK
    sent = [(name.lower(), text) for name, text in upstream.arrivals[0].headers.items()]
    assert [text for name, text in sent if name == "accept-encoding"] == ["identity"]
    assert read_object(store, key) == file


@pytest.mark.parametrize(
    "body", [gzip.compress(TEXT)[:5000], b"<html>sorry</html>", b""], ids=["a part", "text", "none"]
)
def test_gz_file_that_does_not_unpack_is_not_stored(body, upstream, store):
    upstream.answer("/x", Answer(body))
    assert fetch(text_of(upstream.address, "a.gz"), store).outcome is O.BROKEN
    assert files(store) == []


def test_gz_file_that_unpacks_for_ever_is_left_at_the_deadline(upstream, store, monkeypatch):
    monkeypatch.setattr(adce, "unpack", lambda blocks, coding: iter(lambda: b"", None))
    upstream.answer("/x", Answer(gzip.compress(TEXT)))
    assert fetch(text_of(upstream.address, "a.gz", timeout_seconds=0.5), store).outcome is O.TIMEOUT
    assert files(store) == []


@pytest.mark.parametrize(("status", "outcome"), [(429, O.THROTTLED), (404, O.NOT_YET), (500, O.HTTP_ERROR)])
@pytest.mark.parametrize(("coding", "behaviour"), [("br", "whole"), ("gzip", "whole"), ("", "short")])
def test_status_counts_though_its_body_is_broken(status, outcome, coding, behaviour, upstream, store):
    headers = {"Content-Encoding": coding, "Retry-After": "77"}
    upstream.answer("/x", Answer(b"busy", status, headers, behaviour=behaviour))
    result = fetch(text_of(upstream.address), store)
    assert (result.outcome, result.http_status) == (outcome, status)
    assert result.retry_after == (77 if status == 429 else None)


def test_object_that_is_there_already_is_not_asked_for(upstream, store):
    store.write(KEY, GOOD)
    result = fetch(specification(upstream.address), store)
    assert (result.outcome, result.requests, upstream.count()) == (O.OK, 0, 0)


def test_broken_object_that_is_there_is_replaced(upstream, store):
    store.write(KEY, b"half an obj")
    upstream.answer("/x", Answer(GOOD))
    assert fetch(specification(upstream.address), store).outcome is O.OK
    assert read_object(store, KEY) == GOOD


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (NOWHERE, "127.0.0.1 cannot be reached: Connection refused"),
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
        ("0", None),
        ("-5", None),
        ("soon", None),
        (None, None),
        ("Wed, 21 Oct 2026 07:29:00 GMT", 60),
        ("Wed, 21 Oct 2026 07:27:00 GMT", None),
        ("99999999999999", None),
        ("1.5", 1.5),
        ("60, 120", 120),
        ("Wed Oct 21 07:29:00 2026", 60),
        ("Wednesday, 21-Oct-26 07:29:00 GMT", 60),
        ("315360000", 315_360_000),
        ("Wed, 32 Foo 9999 99:99:99 GMT", None),
        ("", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date_by_the_answers_own_clock(header, seconds):
    assert adce.parse_retry_after(header, "Wed, 21 Oct 2026 07:28:00 GMT") == seconds


def test_throttling_answer_hands_its_retry_after_on(upstream, store):
    upstream.answer("/x", Answer(b"wait", 429, {"Retry-After": "77"}))
    assert fetch(specification(upstream.address), store).retry_after == 77


@pytest.mark.parametrize("body", [b"denied", b"<Error><Code>AccessDenied</Code></Error>"])
def test_status_or_body_that_means_blocked_is_recognized(body, upstream, store):
    upstream.answer("/x", Answer(body, 403))
    signs = adce.BlockedWhen(status=(403,), body="(?i)too many requests")
    assert fetch(specification(upstream.address, blocked_when=signs), store).outcome is O.BLOCKED
    upstream.answer("/x", Answer(b"<h1>Too Many Requests</h1>"))
    assert fetch(specification(upstream.address, blocked_when=signs), store).outcome is O.THROTTLED


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


def test_redirect_to_letters_outside_ascii_is_read_as_utf_8(store):
    said = "HTTP/1.1 302 Found\r\nLocation: /caf\u00e9 x \r\nContent-Length: 0\r\n\r\n"
    with speaker(said.encode()) as address:
        assert fetch(specification(address), store).redirect == f"{address}/caf\u00e9 x"


@pytest.mark.parametrize("held", ["a\u20ac", "a\nb"])
def test_header_that_cannot_be_sent_is_no_request_and_its_value_is_not_told(held, upstream, store, monkeypatch):
    monkeypatch.setenv("TOKEN", held)
    result = fetch(specification(upstream.address, headers={"X-Token": "$TOKEN"}), store)
    assert (result.outcome, result.requests, upstream.count()) == (O.ERROR, 0, 0)
    assert (result.error or "").startswith("its header X-Token cannot be sent (")


def test_unpacking_has_the_deadline_of_its_request_whatever_the_key(upstream, store):
    upstream.answer("/x", Answer(BOMB * 100))
    spec = specification(upstream.address, timeout_seconds=0.5)
    rules = adce.Validation(gzip=True, max_bytes=1 << 30)
    began = time.monotonic()
    result = fetch(dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, validate=rules)), store)
    assert (result.outcome, time.monotonic() - began < 5) == (O.TIMEOUT, True)


def test_redirects_have_an_end(upstream, store):
    upstream.answer("/x", Answer(b"", 302, {"Location": "/x"}))
    spec = dataclasses.replace(specification(upstream.address), hops=adce.MAX_REDIRECTS)
    result = fetch(spec, store)
    assert (result.outcome, result.redirect) == (O.HTTP_ERROR, None)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://me:hunter2@example.org/?key=hunter2", "gopher://x"])
def test_redirect_to_another_kind_of_address_is_refused(location, upstream, store):
    upstream.answer("/x", Answer(b"", 302, {"Location": location}))
    result = fetch(specification(upstream.address), store)
    assert (result.outcome, result.redirect) == (O.HTTP_ERROR, None)
    assert "refused" in (result.error or "") and "hunter2" not in (result.error or "")


@pytest.fixture
def secure(tmp_path, monkeypatch) -> Iterator[Upstream]:
    """An upstream behind TLS, whose certificate the environment names."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("the openssl program is not installed")
    made = f"{program} req -x509 -newkey rsa:2048 -nodes -keyout key -out certificate -subj /CN=x -days 2"
    words = [*made.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "certificate"))
    server = Upstream()
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    server.address = server.address.replace("http:", "https:")
    with server:
        yield server


def test_tls_keeps_its_deadline_and_does_not_redirect_to_http(secure, store):
    secure.answer("/x", Answer(behaviour="drip_body"), Answer(b"", 302, {"Location": "http://127.0.0.1/x"}))
    spec = specification(secure.address, trust_env=True, timeout_seconds=1)
    assert fetch(spec, store).outcome is O.TIMEOUT
    result = fetch(specification(secure.address, trust_env=True, timeout_seconds=20), store)
    assert (result.outcome, result.redirect) == (O.HTTP_ERROR, None)
    assert result.error == "redirected to http://127.0.0.1, which is refused"


def test_certificate_of_an_unknown_authority_is_refused(secure, store):
    secure.answer("/x", Answer(GOOD))
    result = fetch(specification(secure.address, timeout_seconds=10), store)
    assert (result.outcome, secure.count()) == (O.UNREACHABLE, 0)
    assert "TLS failure: [SSL: CERTIFICATE_VERIFY_FAILED]" in (result.error or "")


def test_online_check_trusts_the_authorities_that_requests_trust(secure):
    assert adce._check_source(adce.Source("espn", base_url=secure.address, trust_env=True)) == "127.0.0.1 is reachable"
    with pytest.raises(adce.Error, match=r"127\.0\.0\.1 TLS failure: \[SSL: CERTIFICATE_VERIFY_FAILED\]"):
        adce._check_source(adce.Source("espn", base_url=secure.address))
    assert secure.count() == 0


def test_server_that_never_begins_tls_is_left_at_the_deadline(store):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}"
        assert fetch(specification(address, timeout_seconds=0.4), store).outcome is O.TIMEOUT


SECRETS = {"X-Api-Key": "hunter2", "Authorization": "Bearer hunter2", "Cookie": "a=hunter2", "User-Agent": "me"}


@pytest.mark.parametrize(("base_url", "is_sent"), [(None, True), ("http://example.org", False), (NOWHERE, False)])
def test_secret_header_is_sent_to_its_own_host_and_port_only(base_url, is_sent, upstream, store):
    upstream.answer("/x", Answer(GOOD))
    spec = specification(upstream.address, base_url=base_url or upstream.address, headers=SECRETS)
    assert fetch(dataclasses.replace(spec, hops=1), store).outcome is O.OK
    sent = upstream.arrivals[0].headers
    assert ("hunter2" in str(sent), sent["User-Agent"]) == (is_sent, "me")


def test_secret_header_of_a_source_without_base_url_follows_no_redirect_to_another_host(upstream, store):
    upstream.answer("/x", Answer(GOOD))
    spec = specification(upstream.address, base_url="", headers=SECRETS)
    dataset = dataclasses.replace(spec.dataset, url=adce.Template(f"{NOWHERE}/x"))
    assert fetch(dataclasses.replace(spec, dataset=dataset, hops=1), store).outcome is O.OK
    assert "hunter2" not in str(upstream.arrivals[0].headers)


@pytest.mark.parametrize("address", [NOWHERE, "http://no.invalid", "http://user:hunter2@127.0.0.1:9"])
def test_secret_of_the_address_is_in_no_error(address, store):
    result = fetch(specification(address, "/x?api_key=hunter2"), store)
    assert result.outcome is O.UNREACHABLE
    assert "hunter2" not in repr(result)


@pytest.mark.parametrize("behaviour", ["drop", "short", "hang", "garbage_gzip"])
def test_secret_of_the_address_is_not_told_when_an_answer_breaks(behaviour, upstream, store):
    upstream.answer("/x?api_key=hunter2", Answer(GOOD, behaviour=behaviour))
    result = fetch(specification(upstream.address, "/x?api_key=hunter2", timeout_seconds=0.5), store)
    assert upstream.count() == 1
    assert result.error and "hunter2" not in repr(result)


@pytest.fixture
def hostile_environment(monkeypatch, tmp_path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_proxy_and_netrc_of_the_environment_are_ignored(upstream, store, hostile_environment):
    upstream.answer("/x", Answer(GOOD))
    assert fetch(specification(upstream.address), store).outcome is O.OK
    assert "Authorization" not in upstream.arrivals[0].headers


def test_proxy_of_the_environment_is_used_when_it_is_trusted(upstream, store, hostile_environment):
    result = fetch(specification(upstream.address, trust_env=True), store)
    assert (result.outcome, upstream.count()) == (O.UNREACHABLE, 0)


def test_permit_that_ran_out_is_not_used(upstream, store):
    late = adce.Permit(1, send_before=adce.Clock().boot() - 1)
    spec = dataclasses.replace(specification(upstream.address), permit=late)
    result = fetch(spec, store)
    assert (result.outcome, result.requests, upstream.count()) == (O.LOST, 0, 0)


def test_store_that_takes_nothing_is_told(upstream, store):
    upstream.answer("/x", Answer(GOOD))
    spec = dataclasses.replace(specification(upstream.address), hops=1)  # then the store is not asked first
    (store.root / adce.STAGING).rmdir()
    result = fetch(spec, store)
    assert (result.outcome, result.error) == (
        O.STORE_ERROR,
        f"the store {store.root} cannot be written: No such file or directory",
    )
    assert upstream.count() == 0


def test_one_place_in_the_store_that_cannot_be_used_is_the_task_s_own_trouble(upstream, store):
    upstream.answer("/x", Answer(GOOD))
    (store.root / "games" / "7.json").mkdir(parents=True)
    result = fetch(specification(upstream.address), store)
    assert (result.outcome, result.error) == (O.UNSTORABLE, "cannot write games/7.json: Is a directory")
    store = adce.FolderStore(store.root.with_name("other"))
    store.sweep()
    store.write("games", b"a file where the folder should be")
    result = fetch(specification(upstream.address), store)
    assert (result.outcome, result.error) == (O.UNSTORABLE, "cannot look for games/7.json: Not a directory")


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


def fetch_anew(spec: adce.Claim, store: adce.FolderStore) -> adce.Result:
    (store.root / KEY).unlink(missing_ok=True)
    return fetch(spec, store)


@pytest.mark.parametrize("left", [GOOD, GOOD[:-1], None])
def test_condition_is_sent_only_for_an_object_that_is_still_in_the_store(left, upstream, store):
    upstream.answer("/x", Answer(GOOD))
    spec, stored = specification(upstream.address), store.write(KEY, GOOD)
    known = json.dumps({"url": spec.url, "headers": {"If-None-Match": '"1"'}})
    facts = {"state": adce.ObjectState.STALE, "size": stored.size, "etag": stored.etag, "validators": known}
    if left == GOOD:
        upstream.answer("/x", Answer(b"", 304))
    elif left:
        store.write(KEY, left)
    else:
        (store.root / KEY).unlink()
    assert fetch(dataclasses.replace(spec, tasks=(spec.tasks[0]._replace(**facts),)), store).outcome is O.OK
    assert ("If-None-Match" in upstream.arrivals[0].headers) == (left == GOOD)
    assert read_object(store, KEY) == GOOD


@pytest.mark.parametrize(("kept_seconds", "connections"), [(60, 1), (0, 3)])
def test_connection_is_used_again_for_a_moment(upstream, store, monkeypatch, kept_seconds, connections):
    monkeypatch.setattr(adce, "KEPT_SECONDS", kept_seconds)
    upstream.answer("/x", Answer(GOOD))
    spec = specification(upstream.address, timeout_seconds=10)
    assert [fetch_anew(spec, store).outcome for _ in range(3)] == [O.OK] * 3
    assert len({arrival.port for arrival in upstream.arrivals}) == connections


def test_second_request_of_a_connection_has_a_deadline_too(upstream, store, monkeypatch):
    monkeypatch.setattr(adce, "KEPT_SECONDS", 60)
    upstream.answer("/x", Answer(GOOD), Answer(behaviour="drip_body"))
    assert fetch_anew(specification(upstream.address, timeout_seconds=10), store).outcome is O.OK
    spec = specification(upstream.address, timeout_seconds=0.5)
    assert fetch_anew(spec, store).error == "timed out after 0.5 s"
    assert len({arrival.port for arrival in upstream.arrivals}) == 1


def test_second_request_of_a_connection_is_not_sent_after_its_permit_ran_out(upstream, store, monkeypatch):
    monkeypatch.setattr(adce, "KEPT_SECONDS", 60)
    upstream.answer("/x", Answer(GOOD))
    spec = specification(upstream.address, timeout_seconds=10)
    assert fetch_anew(spec, store).outcome is O.OK
    late = dataclasses.replace(spec, permit=adce.Permit(1, adce.Clock().boot() - 1))
    result = fetch_anew(late, store)
    assert (result.outcome, result.requests, upstream.count()) == (O.LOST, 0, 1)


@pytest.mark.parametrize("kind", ["upstream", "secure"])
def test_server_that_closes_a_used_connection_fails_no_task_and_gets_new_ones_from_then_on(
    kind, request, store, monkeypatch
):
    monkeypatch.setattr(adce, "KEPT_SECONDS", 60)
    server, drop = request.getfixturevalue(kind), Answer(behaviour="drop")
    server.answer("/x", drop, Answer(GOOD), drop, Answer(GOOD), Answer(GOOD), drop)
    spec = specification(server.address, timeout_seconds=10, trust_env=kind == "secure")
    results = [fetch_anew(spec, store) for _ in range(6)]
    assert [result.outcome for result in results] == [O.BROKEN, O.OK, O.LOST, O.OK, O.OK, O.BROKEN]
    assert {result.requests for result in results} == {1}
    assert len({arrival.port for arrival in server.arrivals}) == 5


def test_cookie_of_one_request_is_not_sent_with_the_next(upstream, store):
    upstream.answer("/x", Answer(GOOD, headers={"Set-Cookie": "who=me"}))
    for _ in range(2):
        assert fetch_anew(specification(upstream.address, timeout_seconds=10), store).outcome is O.OK
    assert [arrival.headers.get("Cookie") for arrival in upstream.arrivals] == [None, None]


@pytest.fixture
def raw_server() -> Iterator[Callable[[bytes], str]]:
    """A server that answers each request with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_all(connected: socket.socket, answer: bytes) -> None:
            with connected, contextlib.suppress(OSError):
                while connected.recv(65536):
                    connected.sendall(answer)

        def serve(answer: bytes) -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer_all, args=(server.accept()[0], answer), daemon=True).start()

        def start(answer: bytes) -> str:
            threading.Thread(target=serve, args=(answer,), daemon=True).start()
            return f"http://127.0.0.1:{server.getsockname()[1]}"

        yield start


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(GOOD)


def test_what_follows_a_body_is_not_taken_for_the_next_answer(raw_server, store):
    address = raw_server(HEAD + GOOD + HEAD + GOOD.replace(b"3", b"4"))
    for _ in range(3):
        assert fetch_anew(specification(address, timeout_seconds=10), store).outcome is O.OK
        assert read_object(store, KEY) == GOOD
