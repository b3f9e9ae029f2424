"""The limits for programs that use requests: every request counts, and none is one too many."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests
from conftest import ROOT
from requests.adapters import HTTPAdapter
from test_permits import shop_text
from upstream import Answer, Upstream, json_answer
from urllib3.util import Retry

import adce

REDIRECT = Answer(b"", 302, {"Location": "/b"})


@pytest.fixture
def shop(tmp_path, upstream):
    """A configuration for the upstream, and a function that counts what was asked of it."""

    class Shop:
        config = str(tmp_path / "adce.yaml")

        def write(self, limits: str = "{requests_per_minute: 50}", **source: object) -> None:
            (tmp_path / "adce.yaml").write_text(shop_text(upstream.address, limits, **source))

        def counted(self) -> tuple[int, int]:
            database = adce.shared_limiter(self.config).database
            row = database.read("select used, in_flight from rates where scope = 'shop'")[0]
            return row["used"], row["in_flight"]

    shop = Shop()
    shop.write()
    yield shop
    if adce._limiter_of.cache_info().currsize:
        adce.shared_limiter(shop.config).database.close()
    adce._limiter_of.cache_clear()


def test_session_asks_a_source_as_it_is_declared(shop, upstream):
    shop.write(headers={"User-Agent": "adce-test/1", "X-Key": "secret"})
    upstream.answer("/a?page=1", json_answer([1]))
    with adce.session("shop", shop.config) as session:
        assert session.get("/a", params={"page": 1}).json() == [1]
        assert session.get(f"{upstream.address}/a?page=1").json() == [1]
    assert [arrival.headers["User-Agent"] for arrival in upstream.arrivals] == ["adce-test/1"] * 2
    assert shop.counted() == (2, 0)


def test_own_headers_do_not_follow_a_redirect_to_another_host(shop, upstream):
    shop.write(headers={"User-Agent": "adce-test/1", "X-Key": "secret"})
    with Upstream() as other:
        text = Path(shop.config).read_text()
        Path(shop.config).write_text(text.replace("sources: {", f"sources: {{o: {{base_url: '{other.address}'}}, "))
        upstream.answer("/a", Answer(b"", 302, {"Location": f"{other.address}/b"}))
        other.answer("/b", Answer(b"ok"))
        assert adce.session("shop", shop.config).get("/a").text == "ok"
        assert upstream.arrivals[0].headers["X-Key"] == "secret"
        assert "X-Key" not in other.arrivals[0].headers
        assert other.arrivals[0].headers["User-Agent"] == "adce-test/1"
    assert shop.counted() == (2, 0)


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ({"/a": [Answer(b"ok")]}, 1),
        ({"/a": [REDIRECT], "/b": [Answer(b"", 301, {"Location": "/c"})], "/c": [Answer(b"ok")]}, 3),
        ({"/a": [Answer(b"no", 500), Answer(b"no", 502), Answer(b"ok")]}, 3),  # retried by the user's adapter
        ({"/a": [Answer(behaviour="drop"), Answer(b"ok")]}, 2),
        ({"/a": [Answer(b"no", 500)]}, 4),  # in vain
        ({"/a": [Answer(behaviour="drop")]}, 4),
        ({"/a": [Answer(b"no", 404)]}, 1),
        ({"/a": [Answer(behaviour="hang")]}, 4),
        ({"/a": [Answer(behaviour="short")]}, 1),
        ({"/a": [REDIRECT], "/b": [Answer(b"", 302, {"Location": "/a"})]}, 31),  # requests gives up
    ],
)
def test_every_request_of_a_session_that_exists_is_counted_and_finished(shop, upstream, answers, asked):
    shop.write(blocked_when={"timeouts_in_a_row": 100})
    for path, scripted in answers.items():
        upstream.answer(path, *scripted)
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=Retry(3, status_forcelist=[500, 502], backoff_factor=0)))
    assert adce.limit(session, "shop", shop.config) is session
    with contextlib.suppress(requests.RequestException):
        session.get(f"{upstream.address}/a", timeout=0.3 if answers["/a"][0].behaviour == "hang" else 20)
    assert upstream.count() == asked
    assert shop.counted() == (asked, 0)


def test_session_waits_for_its_window(shop, upstream):
    shop.write("{requests_per_second: 2}")
    upstream.answer("/a", Answer(b"ok"))
    session = adce.session("shop", shop.config)
    for _ in range(5):
        session.get("/a")
    times = [arrival.at for arrival in upstream.arrivals]
    assert all(later - earlier >= 1 for earlier, later in zip(times, times[2:], strict=False))


def test_session_that_many_threads_share_counts_each_request_once(shop, upstream):
    upstream.answer("/a", Answer(b"ok"))
    for _ in range(5):
        session, barrier = adce.session("shop", shop.config), threading.Barrier(8)

        def get(session=session, barrier=barrier) -> None:
            barrier.wait(20)
            session.get("/a")

        threads = [threading.Thread(target=get) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        session.close()
    assert (upstream.count(), shop.counted()) == (40, (40, 0))


def test_connection_that_the_server_dropped_during_the_wait_is_made_anew(shop, upstream):
    """A server that keeps connections open for less long than a limit makes its client wait."""
    shop.write("{requests_per_second: 1}")
    upstream.answer("/a", Answer(b"ok"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseHTTPRequestHandler, "timeout", 0.2)
        session = adce.session("shop", shop.config)
        assert [session.get("/a").text for _ in range(3)] == ["ok"] * 3
    assert shop.counted()[1] == 0


def test_throttling_answer_pauses_the_source_for_everybody(shop, upstream):
    upstream.answer("/a", Answer(b"slow down", 429, {"Retry-After": "120"}))
    assert adce.session("shop", shop.config).get("/a").status_code == 429
    with (
        pytest.raises(adce.RateLimitedError, match="shop cannot be asked for another 2 min: HTTP 429"),
        adce.permit("shop", shop.config, wait=10),
    ):
        pass
    row = adce.shared_limiter(shop.config).database.read("select * from rates where scope = 'shop'")[0]
    assert row["blocked_until"] and row["reason"] == "HTTP 429"


def test_timeouts_in_a_row_pause_the_source(shop, upstream):
    shop.write(blocked_when={"timeouts_in_a_row": 2, "pause_seconds": 300})
    upstream.answer("/a", Answer(behaviour="hang"))
    session = adce.session("shop", shop.config)
    for _ in range(2):
        with pytest.raises(requests.Timeout):
            session.get("/a", timeout=0.1)
    with pytest.raises(adce.RateLimitedError, match="5 min: timed out"):
        adce.shared_limiter(shop.config).acquire("shop", 10)


def test_session_belongs_to_one_source(shop, upstream):
    (text,) = shop_text(upstream.address).splitlines()[:1]
    other = text.replace("sources: {shop:", "sources: {other: {base_url: 'http://x'}, shop:")
    Path(shop.config).write_text(f"{other}\ndatasets: {{}}\n")
    session = adce.session("shop", shop.config)
    assert adce.limit(session, "shop", shop.config) is session
    with pytest.raises(adce.Error, match='limited for source "shop" already'):
        adce.limit(session, "other", shop.config)
    with pytest.raises(adce.Error, match='source "sohp" is not defined, did you mean "shop"'):
        adce.session("sohp", shop.config)


def test_limits_are_not_lost_on_the_way_to_another_process(shop):
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(adce.session("shop", shop.config))
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(adce.limit(requests.Session(), "shop", shop.config))


NBA_EXAMPLE = """
import sys
sys.path[:0] = [{root!r}]
import adce
import requests
from nba_api.library.http import NBAHTTP
from nba_api.stats.library.http import NBAStatsHTTP

NBAStatsHTTP.base_url = {address!r} + "/stats/{{endpoint}}"
NBAHTTP.set_session(adce.limit(requests.Session(), "nba_api", {config!r}))

from nba_api.stats.endpoints import commonallplayers
for _ in range(3):
    print(commonallplayers.CommonAllPlayers(timeout=5).get_dict()["resource"])
"""


@pytest.mark.battery
def test_nba_api_asks_under_the_limits_when_its_session_is_replaced(tmp_path, upstream):
    players = {"name": "CommonAllPlayers", "headers": ["PERSON_ID"], "rowSet": [[1]]}
    answer = {"resource": "commonallplayers", "parameters": {}, "resultSets": [players]}
    upstream.route("/stats/commonallplayers", lambda *_: json_answer(answer))
    limits = "rate_limiting: {source_limits: {nba_api: {requests_per_second: 2}}}"
    config = tmp_path / "adce.yaml"
    config.write_text(f"sources: {{nba_api: {{base_url: {upstream.address}}}}}\n{limits}\ndatasets: {{}}\n")
    script = NBA_EXAMPLE.format(root=str(ROOT), address=upstream.address, config=str(config))
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["commonallplayers"] * 3
    times = [arrival.at for arrival in upstream.arrivals]
    assert len(times) == 3
    assert times[2] - times[0] >= 1
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        assert database.value("select count(*) from finished where scope = 'global'") == 3
