"""The first lines of every screen say what is wrong, what it holds up and what to type."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_adce
from test_alerts import VANISHED, note_cycle, note_drop
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


def test_runner_that_starts_beside_the_row_of_an_earlier_one_is_not_stuck(lake):
    lake.clock.advance(3600)
    assert [row["about"] for row in lake.verdict().rows if "stuck for" in row["what"]] == ["runner"]
    lake.write("update runner set pid = pid + 1")
    judged = lake.verdict()
    assert judged.title.endswith("runner starting")
    assert not [row for row in judged.rows if row["about"] == "runner"]


@pytest.fixture
def lake(configure, database, clock, tmp_path):
    made = Lake(Desk(configure(TEXT), database, clock), tmp_path / "adce.yaml")
    yield made
    made.lock.release()


def pause(lake: Lake) -> None:
    with lake.database.transaction() as sql:
        adce.pause(sql, "league", 780, "HTTP 403 Access Denied", lake.clock.boot())


def answer_never(lake: Lake) -> None:
    """Some of its tasks have given up, which is the same problem."""
    for _ in range(6):
        lake.desk.end(lake.desk.claim(), adce.Outcome.NOT_YET)
    lake.write("update objects set task = 'gave_up'")
    lake.write("update attempts set url = 'http://127.0.0.1:9/wrong'")


def crash(lake: Lake) -> None:
    lake.lock.release()
    lake.write("update runner set beat_at = beat_at - 120")


def stop(lake: Lake) -> None:
    lake.lock.release()
    lake.write("update runner set stopped_at = beat_at, note = 'SIGTERM'")


def end_once(lake: Lake) -> None:
    stop(lake)
    lake.write("update runner set note = ?", (adce.ENDS_OF_ONCE[0],))


def lose_the_pool(lake: Lake) -> None:
    lake.write("update runner set note = 'no scheduler answers'")


def lose_the_store(lake: Lake) -> None:
    lake.write("update facts set store_error = 'the store is not there'")


def lose_a_cycle(lake: Lake) -> None:
    with lake.database.transaction() as sql:
        note_cycle(sql, 1, lake.clock, "days: cannot list")


def lose_many(lake: Lake) -> None:
    with lake.database.transaction() as sql:
        note_cycle(sql, 1, lake.clock, VANISHED)


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
    """Each second each of the six objects, though none is there yet, of which one a second is allowed."""
    games = lake.desk.configuration.datasets["games"]
    often = dataclasses.replace(games, freshness=adce.Freshness(refetch_every=1))
    lake.desk.configuration.datasets["games"] = often  # type: ignore[index]


def change_the_file(lake: Lake) -> None:
    os.utime(lake.path, (lake.clock.wall() + 60,) * 2)


def break_the_file(lake: Lake) -> None:
    lake.path.write_text(TEXT.replace("source: league", "source: leage"))
    change_the_file(lake)


GAVE_UP = "adce.py tasks --state gave_up --dataset games"
MISTAKE = "that is a mistake in adce.yaml, correct it: the next cycle expects them again"
SITUATIONS: dict[Callable[[Lake], None], tuple[str, str, str, int | None, str]] = {
    pause: ("x", "league", "paused for 13 min more: HTTP 403 Access Denied", 6, "adce.py resume league"),
    crash: ("x", "runner", "not running: exited unexpectedly, 2 min ago", 6, "adce.py start"),
    stop: ("!", "runner", "not running: SIGTERM, 0.0 s ago", None, "adce.py start"),
    end_once: ("!", "runner", "not running: every task was attempted, 0.0 s ago", None, "adce.py run --once"),
    lose_the_pool: ("x", "pool", "no scheduler answers", 6, "adce.py explain pool"),
    lose_the_store: ("x", "runner", "the store is not there", 6, "adce.py check"),
    lose_a_cycle: (
        "!",
        "lake",
        "the last cycle was incomplete: days: cannot list",
        None,
        "adce.py check",
    ),
    lose_many: (
        "x",
        "lake",
        VANISHED,
        None,
        "adce.py reconcile --accept-loss DATASET  # if the loss is real",
    ),
    answer_never: (
        "!",
        "games",
        "6 attempts, never an object: http://127.0.0.1:9/wrong, it was not_yet",
        None,
        "adce.py try games",
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
    break_the_file: (
        "!",
        "adce.yaml",
        'cannot be used: adce.yaml:6:19: datasets.games.source: source "leage" is not defined, did you mean "league"?',
        None,
        "adce.py check",
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
    assert [row["mark"] for row in lake.verdict().rows] == ["x", "!", "-"]
    assert lake.verdict().title == "ATTENTION  0.0 %  6 missing of 6  runner up 0.0 s"


def test_pause_of_all_sources_comes_before_that_of_one(lake):
    for scope in ("league", "global"):
        with lake.database.transaction() as sql:
            adce.pause(sql, scope, 780, "HTTP 403", lake.clock.boot())
    assert [(row["about"], row["holds_up"]) for row in lake.verdict().rows] == [("global", 6), ("league", 6)]


def test_complete_lake_needs_nothing(lake, tmp_path):
    lake.write("update objects set task = null, state = 'present'")
    assert lake.verdict().title == "COMPLETE  100.0 %  all of 6  runner up 0.0 s"
    for words in ((), ("--by-day",)):
        assert run_adce("coverage", "--gaps", *words, folder=tmp_path).stdout.splitlines()[1:] == ["no gaps"]
    end_once(lake)
    assert (lake.verdict().title, lake.verdict().rows) == ("COMPLETE  100.0 %  all of 6  runner not running", [])


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
    assert [(row["mark"], row["about"], row["try"]) for row in found.rows] == [("-", about, f"adce.py {hint}")]


def test_dataset_of_which_its_parents_name_no_object_is_a_remark_once_they_are_there(lake, configure):
    plays = 'plays: {source: league, key: "{id}", url: "/{id}", partitions: {from: games, regex: "(", as: id}}'
    changed = configure(f"{TEXT}  {plays.replace('(', '&quot;(.+)')}\n")
    os.utime(lake.path, (lake.clock.wall() - 60,) * 2)
    assert adce.verdict(lake.database, changed, lake.clock.wall()).rows == []
    lake.write("update objects set task = null, state = 'present'")
    (row,) = adce.verdict(lake.database, changed, lake.clock.wall()).rows
    assert (row["mark"], row["about"], row["try"]) == ("-", "games", "adce.py try games")
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


def test_check_warns_of_refetches_above_the_limits(lake, tmp_path):
    text = lake.path.read_text()
    for freshness, count in (("", 0), ("freshness: {refetch_every: 1s}, ", 1)):
        lake.path.write_text(text.replace("partitions:", f"{freshness}partitions:"))
        assert run_adce("check", folder=tmp_path).stdout.count("refetches need 21,600 requests an hour") == count


def test_estimate_counts_limits_and_pauses(lake):
    def minutes() -> float | None:
        return adce.minutes_left(lake.database, lake.desk.configuration)

    assert minutes() == 0.0  # 6 of 60 now
    lake.write("update windows set max_requests = 2")
    assert minutes() == 2.0  # 2 now, 2 after a minute, 2 after another
    lake.write("update scopes set paused_until = (select unixepoch() - wall_offset + 600 from facts)")
    assert minutes() == pytest.approx(12.0, abs=0.1)


def test_pause_until_resumed_has_no_end_in_years(lake):
    with lake.database.transaction() as sql:
        adce.pause_source(sql, "global", None, "", lake.clock.boot())
    assert adce.minutes_left(lake.database, lake.desk.configuration) is None
    adce.Journal(stream := io.StringIO(), clock=lake.clock).report_pauses(lake.database)
    assert stream.getvalue().endswith(' paused source=global reason="by the operator, until it is resumed"\n')


@pytest.mark.parametrize("limits", ["", "rate_limiting: {source_limits: {league: {requests_per_minute: 60}}}"])
def test_estimate_follows_the_observed_pace_of_the_workers(limits, lake, configure):
    configuration = configure("max_concurrent_scrapers: 2\n" + re.sub("rate_limiting.*", limits, TEXT))
    with lake.database.transaction() as sql:
        adce.declare_limits(sql, configuration, lake.clock)
    assert adce.minutes_left(lake.database, configuration) == (0.0 if limits else None)
    for seconds in (40, 80):
        claimed = lake.desk.claim()
        lake.clock.advance(seconds)
        lake.desk.end(claimed, adce.Outcome.OK)
    assert adce.minutes_left(lake.database, configuration) == 2.0  # 4 tasks of a minute by 2 workers
