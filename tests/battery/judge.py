"""The judge of all faults. It believes a history that is written where no fault reaches: what the upstream was asked,
what it sent, and when runners lived."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from upstream import Answer, Upstream

import adce

Event = dict[str, Any]


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class History:
    """A file of events, one a line, in the order in which they happened. Only ever appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # guards the file
        path.touch()

    def note(self, what: str, **details: object) -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.monotonic(), "what": what, **details}) + "\n")

    def events(self, what: str | None = None) -> list[Event]:
        events = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [event for event in events if what in (None, event["what"])]


class Witness(Upstream):
    """An upstream that writes down what it was asked and what it sent."""

    def __init__(self, history: History, **options: Any) -> None:
        super().__init__(**options)
        self.history = history

    def receive(self, path: str, headers: Mapping[str, str], body: bytes = b"", port: int = 0) -> Answer:
        number = id(threading.current_thread())
        self.history.note("asked", path=path, number=number)
        answer = super().receive(path, headers, body, port)
        is_whole = answer.behaviour == "whole" and answer.status == 200
        sent = {"digest": digest_of(answer.body)} if is_whole else {}
        self.history.note("answered", path=path, number=number, status=answer.status, **sent)
        return answer


def path_of(key: str) -> str:
    """What the league's source is asked for an object."""
    folder, _, name = key.removesuffix(".json").partition("/")
    return f"/scoreboard?dates={name}" if folder == "days" else f"/summary?event={name}"


def judge_requests(history: History, limits: Sequence[tuple[int, float]]) -> None:
    """R: never more requests in a window than the limit. C: no object asked for twice at once by living runners."""
    asked = [event["at"] for event in history.events("asked")]
    for most, seconds in limits:
        for first, last in zip(asked, asked[most:], strict=False):
            assert last - first >= seconds, f"R: {most + 1} requests within {last - first:.3f} s of {seconds} s"
    under_way: dict[str, int] = {}
    alive = 0
    for event in history.events():
        if event["what"] == "started":
            alive += 1
        elif event["what"] == "ended":
            alive -= 1
            under_way.clear()  # whoever asked is gone
        elif event["what"] == "asked" and alive and "?" in event["path"]:  # else it is no object
            assert event["path"] not in under_way, f"C: {event['path']} was asked for twice at once"
            under_way[event["path"]] = event["number"]
        elif event["what"] == "answered" and under_way.get(event["path"]) == event["number"]:
            del under_way[event["path"]]


@contextlib.contextmanager
def looking_at(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that only reads."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)
    connection.row_factory = sqlite3.Row
    try:
        yield connection
    finally:
        connection.close()


def judge_books(sql: sqlite3.Connection) -> None:
    """I: the database is whole and agrees with itself."""
    problems = [row[0] for row in sql.execute("pragma integrity_check")]
    assert problems == ["ok"], f"I: {problems[:5]}"
    assert sql.execute("pragma foreign_key_check").fetchall() == [], "I: a row names one that is gone"
    found = {what: sql.execute(query).fetchone()[0] for what, query in adce.CONSISTENCY.items()}
    assert found == dict.fromkeys(adce.CONSISTENCY, 0), f"I: {found}"


OBJECTS = """
    select o.key, o.state, o.etag, q.state as task,
           exists (select 1 from recent_attempts a where a.key = o.key and a.outcome = 'ok') as done,
           coalesce(q.state in ('pending', 'retry', 'running') or q.state = 'gave_up' and q.last_error is not null, 0)
               as open
    from objects_now o
    left join queue q using (key)
"""


def judge_objects(sql: sqlite3.Connection, store: Path, history: History, expected: set[str]) -> None:
    """L: every object that is known is there, or has a task. A: what is recorded as done is whole in the store."""
    sent = defaultdict(set)
    for event in history.events("answered"):
        sent[event["path"]].add(event.get("digest"))
    known = {row["key"]: row for row in sql.execute(OBJECTS)}
    assert not set(known) - expected, f"L: nobody expects {set(known) - expected}"
    days = {key for key in expected if key.startswith("days/")}
    if days <= {key for key, row in known.items() if row["state"] == "present"}:
        assert expected == set(known), f"L: forgotten: {expected - set(known)}"
    for key, row in known.items():
        is_kept = row["state"] in ("present", "awaited") or row["open"]  # awaited: not looked for yet
        assert is_kept, f"L: {key} is {row['state']}, its task {row['task']}"
        if row["done"] or row["state"] == "present":
            path = store / key
            assert path.is_file(), f"A: {key} is recorded as done and not in the store"
            assert digest_of(path.read_bytes()) in sent[path_of(key)], f"A: {key} is not what was sent"
    for path in store.rglob("*.json"):
        key = path.relative_to(store).as_posix()
        assert digest_of(path.read_bytes()) in sent[path_of(key)], (
            f"A: {key} ({path.stat().st_size} bytes) is not whole"
        )


def judge_told(sql: sqlite3.Connection, told: set[str]) -> None:
    """A: what a runner has told as done, wherever it wrote that, is done."""
    done = {row["key"] for row in sql.execute(OBJECTS) if row["done"] and row["etag"] is not None}
    assert not told - done, f"A: told as done, and forgotten: {sorted(told - done)}"
