"""Whatever comes from outside, in any shape: a mistake is a message, and nothing else breaks.

The long form takes ten minutes for each reader: `pytest -n 0 -m long tests/battery/test_fuzz.py`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import random
import re
import socket
import time
from collections.abc import Iterator

import pytest
import requests
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from conftest import ROOT, ManualClock
from test_health import serving

import adce

SECONDS = [
    pytest.param(3, id="short"),
    pytest.param(600, id="long", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
]
every_reader = pytest.mark.parametrize("seconds", SECONDS)
WORDS = """
~ null -1 0 1e400 0000-00-00 2025-02-30 9999-12-31 yes NaN .inf 1d 0s 99999999999d from to now dates values regex pages
[] {} [[[[ {date {date:%Q} {a}{b} {{ } *x &x !!python/object:os.system freshness copy_of ../../etc .adce/x /abs
~nobody/x $HOME ${X file:///etc/passwd -rf (a+)+b (?P<x `[` ' "
"""
ODD = [*WORDS.split(), "", "<<: *x", "9" * 400, "a" * 5000, "\x00", "\u202e", "\U0001f3c0", "\xed\xa0\x80"]


def mutated(text: str, rng: random.Random) -> str:
    """The text after some edits: by words, by lines and by characters."""
    for _ in range(rng.randint(1, 6)):
        lines = text.split("\n")
        here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            del lines[here]
        elif kind == 1:
            lines.insert(here, lines[there])
        elif kind == 2:
            lines[here] = "  " * rng.randint(0, 3) + lines[here].lstrip()
        elif kind == 3 and (words := list(re.finditer(r"[^\s:,\[\]{}]+", lines[here]))):
            word = rng.choice(words)
            lines[here] = lines[here][: word.start()] + rng.choice(ODD) + lines[here][word.end() :]
        elif kind == 4 and (keys := re.findall(r"\w+(?=:)", text)):
            lines[here] = re.sub(r"\w+(?=:)", rng.choice(keys), lines[here], count=1)
        else:
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(ODD) + text[place + rng.randint(0, 9) :]
            continue
        text = "\n".join(lines)
    return text


def attempts(seconds: float) -> Iterator[random.Random]:
    """A source of chance for each attempt, with the seed that repeats it, until the time is over."""
    until = time.monotonic() + seconds
    for seed in itertools.count():
        if time.monotonic() > until:
            return
        rng = random.Random(seed)
        try:
            yield rng
        except GeneratorExit:
            print(f"seed {seed}")
            raise


@every_reader
@pytest.mark.filterwarnings("ignore")  # of jmespath and re, about expressions
def test_configuration_is_read_or_its_problems_are_named(seconds, tmp_path):
    lakes = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    texts, path = [lake for lake in lakes if "datasets:" in lake], tmp_path / "adce.yaml"
    texts.append((ROOT / "adce.yaml").read_text(encoding="utf-8"))
    now = ManualClock().wall()
    for rng in attempts(seconds):
        path.write_text(mutated(rng.choice(texts), rng), encoding="utf-8", errors="surrogatepass")
        began = time.monotonic()
        with contextlib.suppress(adce.ConfigurationError):
            configuration = adce.load_configuration(path)
            for dataset in (one for one in configuration.datasets.values() if not one.partitions.parents):
                for fields in itertools.islice(adce.expand(dataset, now), 20):
                    with contextlib.suppress(ValueError):  # it is one of the cycle's problems
                        key = adce.expected_object(dataset, fields).key
                        assert not key.startswith((adce.STAGING, "/"))
                        assert ".." not in key.split("/")
            assert all(text for _, text in adce.warnings_about(configuration))
        assert time.monotonic() < began + 5


BODIES = [
    b'{"events": [{"id": "7", "status": {"done": true}}, {"id": 8, "status": null}], "total": 2}',
    b'<a href="/boxscores/200512250SAC.html">x</a> <a href="/boxscores/a b&amp;c.html">y</a>',
    b'[{"i": 1e400}, {"i": -0.0}, {"i": "\\ud800"}, {"i": [[[[]]]]}]',
    b"\xff\xfe{\x00}\x00",
    b"d41d8cd98f00b204e9800998ecf8427e  x.tgz\n",
]


@every_reader
def test_body_is_judged_and_names_only_ids_that_make_keys(seconds):
    ids = adce.Partitions(parents=("page",), ids="events[].id || [].i", id_field="id")
    by_regex = adce.Partitions(parents=("page",), regex=r'href="/boxscores/([^"]+)\.html"', id_field="id")
    children = [adce.Dataset(str(n), "box", adce.Template("c/{id}"), one) for n, one in enumerate((ids, by_regex))]
    page = adce.Dataset("page", "box", adce.Template("page"))
    for rng in attempts(seconds):
        body = bytearray(rng.choice(BODIES))
        for _ in range(rng.randint(0, 8)):
            place = rng.randrange(len(body) + 1)
            body[place : place + rng.randint(0, 3)] = rng.choice(
                [rng.randbytes(2), *(odd.encode() for odd in ODD[:20])]
            )
        found = adce.inspect(page, {}, io.BytesIO(bytes(body)), tuple(children), None)
        for child, (_, values) in itertools.product(children, found.mentions.items()):
            for value in values:
                key = child.key.render({"id": value}, adce.quote_for_key)
                assert key.startswith("c/"), key
                assert ".." not in key.split("/")


@every_reader
def test_retry_after_is_no_instant_or_one_to_come(seconds):
    texts = [
        "120",
        "-1",
        "1e9",
        "Wed, 21 Oct 2026 07:28:00 GMT",
        "Wed, 21 Oct 0001 07:28:00 -9900",
        "inf",
        "\u0661\u0662",
    ]
    for rng in attempts(seconds):
        text = mutated(rng.choice(texts), rng)
        answer = adce.classify(adce.Source("box"), rng.choice([200, 429, 503]), {"Retry-After": text}, b"{}")
        assert answer.retry_after is None or 0 <= answer.retry_after < math.inf


LISTING = """<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>lake</Name>
<IsTruncated>false</IsTruncated><KeyCount>1</KeyCount><EncodingType>url</EncodingType>
<Contents><Key>a%20b</Key><LastModified>2026-01-02T03:04:06Z</LastModified><ETag>"d"</ETag><Size>53</Size></Contents>
</ListBucketResult>"""


@every_reader
def test_listing_of_a_bucket_is_read_or_a_store_error(seconds, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    store, body = adce.S3Store("lake", ""), b""

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        raw = io.BytesIO(body)
        raw.stream = lambda **_: iter([raw.read()])
        return AWSResponse(request.url, 200, {}, raw)

    store._client.meta.events.register("before-send.s3.ListObjectsV2", answer)
    for rng in attempts(seconds):
        body = mutated(LISTING, rng).encode("utf-8", "surrogatepass")
        with contextlib.suppress(adce.StoreError):
            for entry in itertools.islice(store.list(""), 100):
                assert entry.key
                assert entry.etag


REQUEST = "GET /tasks?limit=5&state=pending HTTP/1.1\nHost: localhost\nAccept: */*\nContent-Length: 0\n\n"


@every_reader
def test_server_answers_the_next_request_after_any_other(seconds, tmp_path):
    with serving(tmp_path, ManualClock(wall=adce.Clock().wall())) as address:
        host, port = address.removeprefix("http://").strip("/").split(":")
        for rng in attempts(seconds):
            text = mutated(REQUEST, rng).replace("\n", "\r\n").encode("utf-8", "surrogatepass")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(text)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65536)
            assert b"Traceback" not in answer
            assert requests.get(f"{address}/health", timeout=10).status_code in (200, 503)
