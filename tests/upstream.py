"""A local HTTP upstream: scripted answers, bad manners, strict limits, and a made-up league.

python tests/upstream.py          serves the league by hand and prints its address
"""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

Behaviour = Literal[
    "whole",
    "drop",  # close without an answer
    "short",  # Content-Length promises more than comes
    "no_length",  # no Content-Length, closed half way
    "chunked_cut",  # closed in the middle of a chunk
    "hang",  # never an answer
    "drip_headers",  # a header now and then, for ever
    "drip_body",  # a byte now and then
    "endless_body",
    "gzip_bomb",  # a little gzip, a lot of zeros
    "garbage_gzip",
]
DRIP_SECONDS = 0.1
BOMB = gzip.compress(bytes(64 << 20))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the upstream answers to one request."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    behaviour: Behaviour = "whole"


def json_answer(document: object, status: int = 200) -> Answer:
    return Answer(json.dumps(document).encode(), status, {"Content-Type": "application/json"})


NOT_FOUND = json_answer({"code": 404, "message": "not found"}, 404)
Route = Callable[[str, dict[str, str]], Answer]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as the upstream saw it."""

    at: float  # monotonic seconds
    path: str  # with its query
    headers: Mapping[str, str]
    body: bytes = b""
    port: int = 0  # of the client's end of the connection


class Upstream:
    """Serves on a free port of 127.0.0.1 while its `with` block lasts, and judges its client's manners."""

    def __init__(
        self,
        *,
        limits: Sequence[tuple[int, float]] = (),
        latency_seconds: tuple[float, float] = (0.0, 0.0),
        fault_share: float = 0.0,
        seed: int = 0,
        port: int = 0,
    ) -> None:
        self.limits, self.latency_seconds, self.fault_share = limits, latency_seconds, fault_share
        self.arrivals: list[Arrival] = []
        self.violations = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()  # guards arrivals, violations, answers and dice
        self._dice = random.Random(seed)
        self._answers: dict[str, list[Answer]] = defaultdict(list)
        self._routes: dict[str, Route] = {}
        handler = type("BoundHandler", (_Handler,), {"upstream": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, path: str, *answers: Answer) -> None:
        """Successive requests for a path get successive answers; the last one stays."""
        with self._lock:
            self._answers[path] = list(answers)

    def route(self, path: str, function: Route) -> None:
        """Answers for a path, whatever its query, made by a function."""
        self._routes[path] = function

    def count(self, path: str | None = None) -> int:
        with self._lock:
            return sum(path is None or arrival.path == path for arrival in self.arrivals)

    def __enter__(self) -> Upstream:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def receive(self, path: str, headers: Mapping[str, str], body: bytes = b"", port: int = 0) -> Answer:
        """Note a request, judge it by its arrival, and decide the answer."""
        with self._lock:
            now = time.monotonic()
            self.arrivals.append(Arrival(now, path, headers, body, port))
            wait = max((self._excess(now, *limit) for limit in self.limits), default=0.0)
            delay = self._dice.uniform(*self.latency_seconds)
            is_fault = self._dice.random() < self.fault_share
            kind = self._dice.choice(["error", "drop"])
            scripted = self._answers.get(path, [])
            answer = scripted.pop(0) if len(scripted) > 1 else scripted[0] if scripted else None
            if wait:
                self.violations += 1
        if wait:
            return Answer(b"slow down", 429, {"Retry-After": str(int(wait) + 1)})
        self.stopping.wait(delay)
        if is_fault:
            return Answer(b"trouble", 500) if kind == "error" else Answer(behaviour="drop")
        if answer:
            return answer
        url = urlsplit(path)
        route = self._routes.get(url.path)
        return route(url.path, dict(parse_qsl(url.query))) if route else NOT_FOUND

    def _excess(self, now: float, most: int, seconds: float) -> float:
        """Seconds until this arrival would have been allowed, if it is one too many."""
        if len(self.arrivals) <= most:
            return 0.0
        return max(0.0, seconds - (now - self.arrivals[-1 - most].at))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves early is no news."""


class _Handler(BaseHTTPRequestHandler):
    upstream: Upstream
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.upstream.receive(self.path, dict(self.headers), body, self.client_address[1])
        self.upstream.stopping.wait(answer.delay_seconds)
        send = getattr(self, f"_send_{answer.behaviour}", None)
        if send is None:
            self._start(answer, length=len(answer.body))
            self.wfile.write(answer.body)
            return
        self.close_connection = True
        send(answer)
        self.wfile.flush()

    do_POST = do_GET  # noqa: N815

    def _start(self, answer: Answer, length: int | None = None, **headers: str) -> None:
        self.send_response(answer.status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {**answer.headers, **named}.items():
            self.send_header(name, value)
        if length is not None and answer.status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_drop(self, answer: Answer) -> None:
        pass

    def _send_short(self, answer: Answer) -> None:
        self._start(answer, length=len(answer.body) + 100)
        self.wfile.write(answer.body)

    def _send_no_length(self, answer: Answer) -> None:
        self._start(answer, Connection="close")
        self.wfile.write(answer.body[: len(answer.body) // 2])

    def _send_chunked_cut(self, answer: Answer) -> None:
        self._start(answer, Transfer_Encoding="chunked")
        self.wfile.write(b"%x\r\n" % len(answer.body) + answer.body[: len(answer.body) // 2])

    def _send_hang(self, answer: Answer) -> None:
        self.upstream.stopping.wait()

    def _send_drip_headers(self, answer: Answer) -> None:
        self.send_response(200)
        self.flush_headers()
        while not self.upstream.stopping.wait(DRIP_SECONDS):
            self.wfile.write(b"X-More: x\r\n")
            self.wfile.flush()

    def _send_drip_body(self, answer: Answer) -> None:
        self._start(answer, length=1000)
        while not self.upstream.stopping.wait(DRIP_SECONDS):
            self.wfile.write(b"x")
            self.wfile.flush()

    def _send_endless_body(self, answer: Answer) -> None:
        self._start(answer, Connection="close")
        while not self.upstream.stopping.is_set():
            self.wfile.write(bytes(64 << 10))

    def _send_gzip_bomb(self, answer: Answer) -> None:
        self._start(answer, length=len(BOMB), Content_Encoding="gzip")
        self.wfile.write(BOMB)

    def _send_garbage_gzip(self, answer: Answer) -> None:
        self._start(answer, length=len(b"not gzip"), Content_Encoding="gzip")
        self.wfile.write(b"not gzip")

    def log_message(self, *_: object) -> None:
        """The arrivals are the log."""


class League:
    """A made-up league in the shape of ESPN's answers: scoreboards of days, summaries of games."""

    def __init__(self, start: date, days: int, games_per_day: tuple[int, int] = (0, 4), seed: int = 0) -> None:
        dice = random.Random(seed)
        self.phase: Literal["early", "final"] = "final"
        self.games: dict[date, list[str]] = {}
        for number in range(days):
            count = dice.randint(*games_per_day)
            self.games[start + timedelta(days=number)] = [
                f"{700_000_000 + number * 100 + game}" for game in range(count)
            ]
        self.ids = {game for games in self.games.values() for game in games}

    def serve(self, upstream: Upstream) -> None:
        upstream.route("/scoreboard", lambda _, query: self.scoreboard(query.get("dates", "")))
        upstream.route("/summary", lambda _, query: self.summary(query.get("event", "")))

    def scoreboard(self, text: str) -> Answer:
        try:
            day = date.fromisoformat(f"{text[:4]}-{text[4:6]}-{text[6:]}")
        except ValueError:
            return json_answer({"code": 400, "message": "bad dates"}, 400)
        calendar = [f"{other}T08:00Z" for other, games in self.games.items() if games]
        events = [
            {"id": game, "date": f"{day}T23:30Z", "status": {"type": self._status()}}
            for game in self.games.get(day, [])
        ]
        notes = "This league, its teams and its scores are made up. " * 12
        return json_answer({"leagues": [{"id": "46", "calendar": calendar, "notes": notes}], "events": events})

    def summary(self, game: str) -> Answer:
        if game not in self.ids:
            return NOT_FOUND
        teams = [{"homeAway": side, "team": {"id": str(number)}} for number, side in enumerate(("home", "away"))]
        plays = [
            {"id": f"{game}{number}", "text": f"Player {number % 10} scores", "scoreValue": 2} for number in range(150)
        ]
        competition = {"status": {"type": self._status()}, "competitors": teams}
        document = {"header": {"id": game, "competitions": [competition]}, "boxscore": {"teams": teams}}
        return json_answer(document if self.phase == "early" else {**document, "plays": plays})

    def _status(self) -> dict[str, object]:
        if self.phase == "early":
            return {"name": "STATUS_SCHEDULED", "state": "pre", "completed": False}
        return {"name": "STATUS_FINAL", "state": "post", "completed": True}


if __name__ == "__main__":
    with Upstream() as server:
        League(date(2025, 1, 1), 30).serve(server)
        print(server.address, flush=True)
        threading.Event().wait()
