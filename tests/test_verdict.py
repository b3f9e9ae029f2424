"""The first lines of every screen say what is wrong, what it holds up and what to type."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_adce
from test_alerts import note_cycle, note_drop
from test_queue import Desk

import adce

TEXT = """
retry: {max_attempts: 1}
sources: {league: {base_url: "http://127.0.0.1:9"}}
rate_limiting: {source_limits: {league: {requests_per_minute: 60}}}
datasets:
  games: {source: league, key: "games/{n}", url: "/{n}", partitions: {values: {n: ['1', '2', '3', '4', '5', '6']}}}
"""


class Lake:
    """A database whose runner works, with a few expected objects."""

    def __init__(self, desk: Desk, path: Path) -> None:
        self.desk, self.database, self.path = desk, desk.database, path
        self.clock, self.lock = desk.clock, adce.RunnerLock(desk.configuration.database)
        self.lock.acquire()
        now = int(self.clock.wall())
        os.utime(path, (now - 60, now - 60))
        self.write(
            "insert into runner (only_row, pid, version, started_at, beat_at) values (1, ?, '1', ?, ?)",
            (os.getpid(), now, now),
        )
        for number in "123456":
            desk.expect("games", n=number)

    def write(self, text: str, values: tuple[object, ...] = ()) -> None:
        with self.database.transaction() as sql:
            sql.execute(text, values)

    def verdict(self) -> adce.Section:
        return adce.verdict(self.database, self.desk.configuration, self.clock.wall())


@pytest.fixture
def lake(configure, database, clock, tmp_path):
    made = Lake(Desk(configure(TEXT), database, clock), tmp_path / "adce.yaml")
    yield made
    made.lock.release()


def pause(lake: Lake) -> None:
    with lake.database.transaction() as sql:
        adce.pause(sql, "league", 780, "HTTP 403 Access Denied", lake.clock.boot())


def answer_never(lake: Lake) -> None:
    for _ in range(6):
        lake.desk.end(lake.desk.claim(), adce.Outcome.NOT_YET)
    lake.write("update attempts set url = 'http://127.0.0.1:9/wrong'")


def crash(lake: Lake) -> None:
    lake.lock.release()


def stop(lake: Lake) -> None:
    lake.lock.release()
    lake.write("update runner set stopped_at = beat_at, note = 'SIGTERM'")


def lose_the_store(lake: Lake) -> None:
    lake.write("update facts set store_error = 'the store is not there'")


def lose_a_cycle(lake: Lake) -> None:
    with lake.database.transaction() as sql:
        note_cycle(sql, 1, lake.clock, "days: cannot list")


def drop_many(lake: Lake) -> None:
    with lake.database.transaction() as sql:
        note_cycle(sql, 1, lake.clock)
    note_drop(lake.desk, dropped=200, expected=100)


def break_a_channel(lake: Lake) -> None:
    waits = json.dumps([{"channel": "webhook", "error": "HTTP 500", "made_at": 1}])
    lake.write("insert into alerts values ('gave up', 'games', 1, '', 1, 1, 2, ?)", (waits,))


def give_up(lake: Lake) -> None:
    lake.desk.end(lake.desk.claim(), adce.Outcome.INVALID)


def ask_too_often(lake: Lake) -> None:
    """Each second of the six objects again, of which one a second is allowed."""
    games = lake.desk.configuration.datasets["games"]
    often = dataclasses.replace(games, freshness=adce.Freshness(refetch_every=1))
    lake.desk.configuration.datasets["games"] = often  # type: ignore[index]
    for _ in range(6):
        lake.desk.end(lake.desk.claim(), adce.Outcome.OK)
        lake.clock.advance(2)


def change_the_file(lake: Lake) -> None:
    os.utime(lake.path, (lake.clock.wall() + 60,) * 2)


GAVE_UP = "adce.py tasks --state gave_up --dataset games"
MISTAKE = "that is a mistake in adce.yaml, correct it: the next cycle expects them again"
SITUATIONS: dict[Callable[[Lake], None], tuple[str, str, str, int | None, str]] = {
    pause: ("x", "league", "paused for 13 min more: HTTP 403 Access Denied", 6, "adce.py resume league"),
    crash: ("x", "runner", "not running: exited unexpectedly", None, "adce.py start"),
    stop: ("!", "runner", "not running: SIGTERM", None, "adce.py start"),
    lose_the_store: ("x", "runner", "the store is not there", None, "adce.py check"),
    lose_a_cycle: (
        "!",
        "lake",
        "the last cycle could not look at everything: days: cannot list",
        None,
        "adce.py check",
    ),
    answer_never: (
        "!",
        "games",
        "6 attempts, never an object: http://127.0.0.1:9/wrong",
        None,
        "adce.py tasks --dataset games",
    ),
    drop_many: (
        "!",
        "lake",
        f"200 of 300 objects are no longer expected; if {MISTAKE}",
        None,
        "adce.py plan",
    ),
    ask_too_often: (
        "!",
        "league",
        "refetches need 21,600 requests an hour, and 3,600 are allowed: gaps wait",
        None,
        "adce.py explain freshness",
    ),
    break_a_channel: ("!", "webhook", "alerts cannot be sent: HTTP 500, 1 wait", None, "adce.py check"),
    give_up: (
        "!",
        "games",
        "1 gave up, last error: it was invalid",
        None,
        "adce.py tasks --state gave_up --dataset games",
    ),
    change_the_file: ("-", "adce.yaml", "has changed since the runner started", None, "adce.py restart"),
}


@pytest.mark.parametrize("cause", SITUATIONS, ids=lambda cause: cause.__name__)
def test_verdict_names_the_problem_what_it_holds_up_and_the_command(cause, lake):
    assert lake.verdict().rows == []
    cause(lake)
    found = lake.verdict()
    assert [tuple(row.values()) for row in found.rows] == [SITUATIONS[cause]]
    assert found.title.startswith("FILLING" if SITUATIONS[cause][0] == "-" else "ATTENTION")


def test_worst_comes_first(lake):
    for cause in (give_up, change_the_file, pause):
        cause(lake)
    assert [row[""] for row in lake.verdict().rows] == ["x", "!", "-"]
    assert lake.verdict().title == "ATTENTION  0.0 %  6 missing of 6  runner up 0.0 s"


def test_complete_lake_needs_nothing(lake):
    lake.write("update objects set task = null, state = 'present'")
    assert lake.verdict().title == "COMPLETE  100.0 %  all of 6  runner up 0.0 s"


@pytest.mark.parametrize(
    ("old", "new", "about", "hint"),
    [
        ("source_limits: {league: {requests_per_minute: 60}}", "enabled: false", "league", "explain rate_limiting"),
        (
            "retry:",
            "seasons: [{label: 2001-02, end: 2002, start: 2001-10-01, finish: 2002-06-30}]\nretry:",
            "seasons",
            "explain seasons",
        ),
    ],
)
def test_gaps_of_the_configuration_are_remarks(old, new, about, hint, lake, configure):
    changed = configure(TEXT.replace(old, new))
    os.utime(lake.path, (lake.clock.wall() - 60,) * 2)
    found = adce.verdict(lake.database, changed, lake.clock.wall())
    assert [(row[""], row["about"], row["try"]) for row in found.rows] == [("-", about, f"adce.py {hint}")]


def test_dataset_of_which_its_parents_name_no_object_is_a_remark_once_they_are_there(lake, configure):
    plays = 'plays: {source: league, key: "{id}", url: "/{id}", partitions: {from: games, regex: "(", as: id}}'
    changed = configure(f"{TEXT}  {plays.replace('(', '&quot;(.+)')}\n")
    os.utime(lake.path, (lake.clock.wall() - 60,) * 2)
    assert adce.verdict(lake.database, changed, lake.clock.wall()).rows == []
    lake.write("update objects set task = null, state = 'present'")
    (row,) = adce.verdict(lake.database, changed, lake.clock.wall()).rows
    assert (row[""], row["about"], row["try"]) == ("-", "games", "adce.py try games")
    assert "no object of plays is expected" in row["what"]


def test_status_fits_a_terminal_and_says_the_same_as_report(lake, tmp_path):
    for cause in (give_up, pause, lose_a_cycle, break_a_channel, change_the_file, crash, lose_the_store):
        cause(lake)
    shown = run_adce("status", folder=tmp_path, COLUMNS="80").stdout.splitlines()
    assert len(shown) <= 24
    (verdict,) = [json.loads(run_adce("report", "verdict", "--format", "json", folder=tmp_path).stdout)]
    assert len(verdict) >= 5
    for row in verdict[:5]:
        assert f"      {row['try']}" in shown
    status = json.loads(run_adce("status", "--format", "json", folder=tmp_path).stdout)
    assert [row["about"] for row in status["verdict"]] == [row["about"] for row in verdict]


def test_estimate_counts_limits_and_pauses(lake):
    def minutes() -> float:
        return adce.answers(lake.database, adce.PLAN, "sources")[0].rows[0]["least_minutes"]

    assert minutes() == 0.0  # 6 of 60 now
    lake.write("update windows set max_requests = 2")
    assert minutes() == 2.0  # 2 now, 2 after a minute, 2 after another
    lake.write("update scopes set paused_until = (select unixepoch() - wall_offset + 600 from facts)")
    assert minutes() == pytest.approx(12.0, abs=0.1)
