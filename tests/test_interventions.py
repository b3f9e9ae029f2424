"""What a person changes by hand, against the simplest model of it: a word for each object."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ManualClock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from runners import do, rows, write_box
from test_queue import HELD, TEXT, Desk, result

import adce

TEAMS = "ABCDEFG"
MOST = 3  # attempts
AT_ONCE = 5  # of a source, when nothing else is said
OPEN = ("pending", "retry", "gave_up", "running")


class InterventionMachine(RuleBasedStateMachine):
    """Claims, endings, crashes, skips, retries, pauses: each task is where the model says."""

    teams = st.sampled_from(TEAMS)

    @initialize()
    def start(self) -> None:
        partitions = adce.Partitions(values={"team": tuple(TEAMS)})
        dataset = adce.Dataset("teams", "nba", adce.Template("{team}"), partitions, url=adce.Template("/{team}"))
        self.configuration = adce.Configuration(
            path=Path("x"),
            database=Path("x"),
            store="x",
            sources={"nba": adce.Source("nba")},
            datasets={"teams": dataset},
            retry=adce.Retry(max_attempts=MOST, initial_delay_seconds=60, max_delay_seconds=21600),
        )
        self.desk = Desk(self.configuration, adce.memory_database(), ManualClock())
        for team in TEAMS:
            self.desk.expect("teams", team=team)
        self.task_ids = dict(map(tuple, self.desk.database.read("select key, task_id from queue")))
        self.state = dict.fromkeys(TEAMS, "pending")
        self.failures, self.crashes, self.next_at = (dict.fromkeys(TEAMS, 0) for _ in range(3))
        self.skipped: set[str] = set()
        self.stored: set[str] = set()
        self.claims: dict[str, adce.Claim] = {}
        self.paused_until = 0.0

    def is_paused(self) -> bool:
        return self.paused_until > self.desk.clock.boot()

    @precondition(lambda self: not any(claimed.runs_exclusively for claimed in self.claims.values()))
    @rule()
    def claim(self) -> None:
        for team in TEAMS:
            if self.state[team] == "retry" and self.next_at[team] <= int(self.desk.clock.wall()):
                self.state[team] = "pending"
        claimed = self.desk.claim()
        can_be = "pending" in self.state.values() and not self.is_paused() and len(self.claims) < AT_ONCE
        suspects = {team for team in TEAMS if self.state[team] == "pending" and self.crashes[team] >= MOST - 1}
        if claimed or not (self.claims and suspects):  # else one of them may wait until it is alone
            assert (claimed is not None) == can_be
        if claimed:
            team = claimed.tasks[0].key
            assert claimed.runs_exclusively == (team in suspects) and not (claimed.runs_exclusively and self.claims)
            assert self.state[team] == "pending"
            self.state[team], self.claims[team] = "running", claimed

    @precondition(lambda self: self.claims)
    @rule(outcome=st.sampled_from([adce.Outcome.OK, adce.Outcome.INVALID, adce.Outcome.LOST]), data=st.data())
    def finish(self, outcome: adce.Outcome, data: st.DataObject) -> None:
        team = data.draw(st.sampled_from(sorted(self.claims)))
        ending = self.desk.end(self.claims.pop(team), outcome)
        self.crashes[team] = 0
        self.failures[team] += outcome is adce.Outcome.INVALID
        if outcome is adce.Outcome.OK:
            self.stored.add(team)
        if team in self.skipped:
            self.state[team] = "cancelled"
        elif outcome is adce.Outcome.INVALID:
            self.state[team] = "gave_up" if self.failures[team] >= MOST else "retry"
            self.next_at[team] = ending.task.next_at or 0
        else:
            self.state[team] = "done" if outcome is adce.Outcome.OK else "pending"

    @rule()
    def crash(self) -> None:
        with self.desk.database.transaction() as sql:
            assert adce.requeue_orphans(sql, self.configuration.retry) == len(self.claims)
        for team in self.claims:
            self.crashes[team] += 1
            state = "gave_up" if self.crashes[team] >= MOST else "pending"
            self.state[team] = "cancelled" if team in self.skipped else state
        self.claims.clear()
        self.desk.busy.clear()

    @rule(team=teams)
    def skip(self, team: str) -> None:
        with self.desk.database.transaction() as sql:
            ledger = adce.Ledger(sql, self.configuration, self.desk.clock.wall())
            skipped = adce.skip_tasks(ledger, [self.task_ids[team]], "by hand")
        is_open = self.state[team] in OPEN and team not in self.skipped
        assert skipped == [self.task_ids[team]] * is_open
        if is_open:
            self.skipped.add(team)
            if self.state[team] != "running":
                self.state[team] = "cancelled"

    def retry(self, task_ids: list[int]) -> int:
        filters = dict.fromkeys(("state", "source", "dataset", "error"))
        found = adce.tasks_to_retry(self.desk.database, filters, task_ids)
        with self.desk.database.transaction() as sql:
            count = adce.retry_tasks(adce.Ledger(sql, self.configuration, self.desk.clock.wall()), found)
        assert count == len(found)
        return count

    @rule(team=teams)
    def retry_one(self, team: str) -> None:
        can_be = self.state[team] in ("retry", "gave_up", "cancelled")
        assert self.retry([self.task_ids[team]]) == can_be
        if can_be:
            is_there = team in self.skipped & self.stored
            self.state[team], self.failures[team] = "done" if is_there else "pending", 0
            self.skipped.discard(team)

    @rule()
    def retry_all(self) -> None:
        waiting = [team for team in TEAMS if self.state[team] in ("retry", "gave_up")]
        assert self.retry([]) == len(waiting)
        for team in waiting:
            self.state[team], self.failures[team] = "pending", 0

    @rule(seconds=st.none() | st.integers(1, 5000))
    def pause(self, seconds: int | None) -> None:
        now = self.desk.clock.boot()
        with self.desk.database.transaction() as sql:
            adce.pause_source(sql, "nba", seconds, "", now)
        self.paused_until = now + (adce.UNTIL_RESUMED if seconds is None else seconds)

    @rule()
    def resume(self) -> None:
        with self.desk.database.transaction() as sql:
            assert adce.resume_source(sql, "nba", self.desk.clock.boot())[0] == self.is_paused()
        self.paused_until = 0.0
        for team in TEAMS:
            if self.state[team] == "retry":
                self.state[team] = "pending"

    @rule(seconds=st.integers(1, 30_000))
    def wait(self, seconds: int) -> None:
        self.desk.clock.advance(seconds)

    @invariant()
    def database_is_as_the_model(self) -> None:
        if not hasattr(self, "desk"):
            return
        database = self.desk.database
        stored = sorted(map(tuple, database.read("select key, task_id, state from queue")))
        are_open = [team for team in TEAMS if self.state[team] in OPEN]
        assert stored == [(team, self.task_ids[team], self.state[team]) for team in are_open]
        assert {row[0] for row in database.read("select key from objects_now where state = 'skipped'")} == self.skipped
        wanted = {team for team in TEAMS if team not in self.skipped and self.state[team] != "done"}
        assert {row[0] for row in database.read("select key from gaps")} == wanted
        for row in database.read("select expected, skipped from coverage"):
            assert tuple(row) == (len(TEAMS) - len(self.skipped), len(self.skipped))

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            assert self.desk.database.check() == []
            self.desk.database._writer.close()


InterventionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestInterventionMachine = InterventionMachine.TestCase


@pytest.fixture
def desk(configure, database, clock) -> Desk:
    return Desk(configure(TEXT), database, clock)


def resume(desk: Desk, scope: str) -> int:
    with desk.database.transaction() as sql:
        return adce.resume_source(sql, scope, desk.clock.boot())[1]


def retry(desk: Desk, number: int) -> None:
    with desk.database.transaction() as sql:
        assert adce.retry_tasks(adce.Ledger(sql, desk.configuration, desk.clock.wall()), [number]) == 1


def skip(desk: Desk, number: int) -> None:
    with desk.database.transaction() as sql:
        ledger = adce.Ledger(sql, desk.configuration, desk.clock.wall())
        assert adce.skip_tasks(ledger, [number], "enough") == [number]


def test_source_that_is_resumed_is_asked_by_all_workers_and_what_failed_there_is_tried(desk):
    for team in "AB":
        desk.expect("teams", team=team)
    desk.end(desk.claim(), adce.Outcome.THROTTLED)
    assert (resume(desk, "espn"), resume(desk, "nba")) == (0, 1)
    assert desk.claim()
    assert desk.claim()


def test_object_that_waits_to_be_final_is_not_tried_when_its_source_is_resumed(desk):
    desk.expect("days", date="2025-10-01")
    claimed = desk.claim()
    stored = result(claimed.tasks[0], adce.Outcome.OK, desk.clock)
    desk.finish(claimed, replace(stored, inspection=replace(HELD, settled=False)))
    assert (resume(desk, "espn"), desk.states()) == (0, {"retry": 1})


@pytest.mark.parametrize("is_skipped", [False, True])
def test_task_that_is_retried_has_all_its_attempts_before_it_and_keeps_its_age(is_skipped, desk):
    number, age = desk.expect("teams", team="A"), "select age_hours from queue"
    before = desk.database.value(age)
    desk.end(desk.claim(), adce.Outcome.INVALID)
    desk.clock.advance(adce.HOUR)
    if is_skipped:
        skip(desk, number)
    retry(desk, number)
    assert desk.database.value(age) == pytest.approx(before, abs=0.1)
    assert desk.end(desk.claim(), adce.Outcome.INVALID).task.failures == 1


def test_skipped_object_that_is_no_longer_declared_is_forgotten(tmp_path):
    write_box(tmp_path, names="A, B")
    do("reconcile", folder=tmp_path)
    ((number,),) = rows(tmp_path, "select task_id from queue where key = 'things/A'")
    assert do("skip", str(number), folder=tmp_path).returncode == 0
    write_box(tmp_path, names="B")
    do("reconcile", folder=tmp_path)
    assert rows(tmp_path, "select key from objects_now where state = 'skipped'") == []
    do("retry", str(number), folder=tmp_path)
    assert rows(tmp_path, "select key from gaps") == [("things/B",)]


def test_skipped_object_of_a_dataset_that_is_no_longer_declared_is_forgotten(tmp_path):
    write_box(tmp_path, names="A")
    do("reconcile", folder=tmp_path)
    ((number,),) = rows(tmp_path, "select task_id from queue where key = 'things/A'")
    assert do("skip", str(number), folder=tmp_path).returncode == 0
    assert rows(tmp_path, "select key from objects_now where state = 'skipped'") == [("things/A",)]
    path = tmp_path / "adce.yaml"
    path.write_text(path.read_text().replace("  things:", "  others:").replace('"things/', '"others/'))
    do("reconcile", folder=tmp_path)
    assert rows(tmp_path, "select key from objects_now where state = 'skipped'") == []
    assert rows(tmp_path, "select dataset, expected, skipped from coverage") == [("others", 1, 0)]


def test_task_that_was_skipped_before_a_crash_is_closed_by_the_next_start():
    machine = InterventionMachine()
    machine.start()
    machine.claim()
    (team,) = machine.claims
    machine.skip(team)
    machine.crash()
    still_open = {row["key"] for row in machine.desk.database.read("select key from queue")}
    machine.teardown()
    assert still_open == set(TEAMS) - {team}
