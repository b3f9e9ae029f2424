"""What is to be done, in which order, and what becomes of it."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from conftest import ManualClock
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import adce

TEXT = """\
retry: {max_attempts: 3, initial_delay_seconds: 60, max_delay_seconds: 600}
rate_limiting: {source_limits: {espn: {requests_per_minute: 3}}}
sources:
  espn: {base_url: "http://localhost", max_concurrent: 2}
  nba: {base_url: "http://localhost", max_concurrent: 5}
datasets:
  days:
    source: espn
    key: "days/{date}.json"
    url: "/{date}"
    partitions: {dates: {from: 2025-09-01}}
    freshness: {refetch_every: 6h, until: "done"}
    validate: {json: true}
    priority: HIGH
  teams:
    source: nba
    key: "teams/{team}.json"
    url: "/{team}"
    partitions: {values: {team: [A, B, C, D, E, F, G]}}
    priority: LOW
  files:
    source: nba
    key: "files/{season}/{name}.json"
    command: [fetch, "{season}", "{names}"]
    batch: {group_by: season, max: 3}
    partitions: {values: {season: [S1, S2], name: [a, b, c, d]}}
    priority: MEDIUM
"""
HELD = adce.Inspection(settled=True, live=False, mentions={})


class Desk:
    """A queue on a real database, driven by hand."""

    def __init__(self, configuration: adce.Configuration, database: adce.Database, clock: ManualClock) -> None:
        self.configuration, self.database, self.clock = configuration, database, clock
        self.dice = random.Random(1)
        self.busy: Counter[str] = Counter()
        with database.transaction() as sql:
            adce.declare_limits(sql, configuration, clock)
            adce.declare_datasets(sql, configuration)
            sql.execute(adce.WANTED)
            sql.execute("update datasets set expansion = 'by hand'")

    def expect(self, name: str, /, **fields: str) -> int:
        """Expect an object that is not in the store; returns the number of its task."""
        dataset = self.configuration.datasets[name]
        key = adce.expected_object(dataset, fields).key
        with self.database.transaction() as sql:
            sql.execute("delete from wanted")
            ledger = adce.Ledger(sql, self.configuration, self.clock.wall())
            adce.expect(ledger, dataset, [(fields, None)])
            new = [(*row, int(ledger.now)) for row in adce.new_objects(ledger, [name], "", adce.LAST_KEY)]
            sql.executemany(adce.UPSERT_OBJECT, new)
            row = ledger.objects("o.key = :key", {"key": key})[0]
            return ledger.note(row, proven=1).object_id

    def drop(self, object_id: int) -> None:
        with self.database.transaction() as sql:
            adce.Ledger(sql, self.configuration, self.clock.wall()).drop("o.object_id = :id", {"id": object_id})

    def claim(self) -> adce.Claim | None:
        with self.database.transaction() as sql:
            adce.advance(adce.Ledger(sql, self.configuration, self.clock.wall()))
            free = self.configuration.max_concurrent_scrapers - self.busy.total()
            claimed = adce.claim(sql, self.configuration, self.clock, self.busy, free)[0]
        if claimed:
            self.busy[claimed.dataset.name] += 1
        return claimed

    def finish(self, claimed: adce.Claim, *results: adce.Result) -> list[adce.Ending]:
        self.busy[claimed.dataset.name] -= 1
        with self.database.transaction() as sql:
            ledger = adce.Ledger(sql, self.configuration, self.clock.wall(), 1)
            return adce.finish(ledger, claimed, results, self.clock, self.dice)

    def end(self, claimed: adce.Claim, outcome: adce.Outcome) -> adce.Ending:
        """Finish a claim of one task with an outcome; OK stores its object."""
        return self.finish(claimed, result(claimed.tasks[0], outcome, self.clock))[0]

    def states(self) -> dict[str, int]:
        """How many objects there are by the state of their task, or by what has become of it."""
        closed = {"present": "done", "dropped": "cancelled", "skipped": "cancelled"}
        tasks = dict(map(tuple, self.database.read("select key, state from queue")))
        objects = self.database.read("select key, state from objects_now")
        return dict(Counter(tasks.get(row["key"]) or closed[row["state"]] for row in objects))


def result(task: adce.ObjectRow, outcome: adce.Outcome, clock: ManualClock) -> adce.Result:
    if outcome is not adce.Outcome.OK:
        return adce.Result(outcome, f"it was {outcome}", requests=1)
    stored = adce.StoredObject(task.key, 9, f"etag at {clock.boot()}", int(clock.wall()))
    return adce.Result(outcome, stored=stored, inspection=HELD, requests=1)


@pytest.fixture
def desk(configure, database, clock) -> Desk:
    return Desk(configure(TEXT), database, clock)


def test_best_score_whose_source_can_be_asked_is_claimed(desk):
    desk.expect("teams", team="A")
    desk.expect("days", date="2025-10-01")
    keys = [claimed.tasks[0].key for claimed in (desk.claim(), desk.claim()) if claimed]
    assert keys == ["days/2025-10-01.json", "teams/A.json"]


def test_source_that_waits_for_its_window_holds_nobody_up(desk):
    for day in range(1, 9):
        desk.expect("days", date=f"2025-10-0{day}")
    desk.expect("teams", team="A")
    for _ in range(3):
        desk.end(desk.claim(), adce.Outcome.OK)
    claimed = desk.claim()
    assert claimed and claimed.source.name == "nba"
    assert desk.claim() is None
    desk.clock.advance(60)
    claimed = desk.claim()
    assert claimed and claimed.source.name == "espn"


def test_source_that_is_paused_holds_nobody_up(desk):
    desk.expect("days", date="2025-10-01")
    desk.expect("teams", team="A")
    with desk.database.transaction() as sql:
        adce.pause(sql, "espn", 300, "asked to", desk.clock.boot())
        claimed, openings = adce.claim(sql, desk.configuration, desk.clock, {}, 5)
    assert claimed and claimed.source.name == "nba"
    assert openings["espn"] == adce.Opening(desk.clock.boot() + 300, "asked to", "espn", is_pause=True)


def test_source_has_at_most_its_own_number_of_workers(desk):
    for day in range(1, 5):
        desk.expect("days", date=f"2025-10-0{day}")
    first, second = desk.claim(), desk.claim()
    assert first and second
    assert desk.claim() is None
    desk.end(first, adce.Outcome.OK)
    assert desk.claim()


def test_dataset_has_at_most_its_own_number_of_workers(configure, database, clock):
    desk = Desk(configure(TEXT.replace('url: "/{team}"', 'url: "/{team}"\n    max_concurrent: 2')), database, clock)
    for team in "ABC":
        desk.expect("teams", team=team)
    first, second = desk.claim(), desk.claim()
    assert first and second
    assert desk.claim() is None
    desk.end(first, adce.Outcome.OK)
    assert desk.claim()


def test_last_worker_is_left_to_a_source_that_has_none_whatever_matters_more(configure, database, clock):
    text = TEXT.replace("priority: LOW", "priority: CRITICAL").replace("priority: HIGH", "priority: LOW")
    desk = Desk(configure(text), database, clock)
    for team in "ABCDEF":
        desk.expect("teams", team=team)
    desk.expect("days", date="2025-10-01")
    assert [desk.claim().dataset.name for _ in range(5)] == ["teams"] * 4 + ["days"]


def test_no_worker_is_left_to_a_source_that_is_paused(desk):
    for team in "ABCDE":
        desk.expect("teams", team=team)
    desk.expect("days", date="2025-10-01")
    with desk.database.transaction() as sql:
        adce.pause(sql, "espn", 300, "asked to", desk.clock.boot())
    assert [desk.claim().dataset.name for _ in range(5)] == ["teams"] * 5


def test_one_program_at_a_time_asks_whether_its_source_is_back(desk):
    for season in ("S1", "S2"):
        desk.expect("files", season=season, name="a")
    desk.end(desk.claim(), adce.Outcome.THROTTLED)
    desk.clock.advance(adce.HOUR)
    first = desk.claim()
    assert first
    assert desk.claim() is None
    desk.end(first, adce.Outcome.OK)
    assert desk.claim()


def test_task_that_has_seen_runners_die_waits_until_it_is_alone_and_nothing_overtakes_it(desk):
    desk.expect("files", season="S1", name="a")
    for _ in range(2):
        assert desk.claim()
        lose_all(desk)
    desk.expect("days", date="2025-10-01")
    desk.expect("teams", team="A")
    other = desk.claim()
    assert other.dataset.name == "days"
    assert desk.claim() is None
    desk.end(other, adce.Outcome.OK)
    suspect = desk.claim()
    assert (suspect.dataset.name, suspect.runs_exclusively) == ("files", True)
    desk.end(suspect, adce.Outcome.OK)
    assert desk.claim().dataset.name == "teams"


def test_task_that_has_seen_runners_die_is_in_no_batch(desk):
    def claimed() -> list[str]:
        held = desk.claim()
        names = [task.fields["name"] for task in held.tasks]
        desk.finish(held, *(result(task, adce.Outcome.OK, desk.clock) for task in held.tasks))
        return names

    desk.expect("files", season="S1", name="a")
    desk.end(desk.claim(), adce.Outcome.INVALID)
    desk.expect("files", season="S1", name="b")
    for _ in range(2):
        assert len(desk.claim().tasks) == 1
        lose_all(desk)
    desk.clock.advance(adce.HOUR)
    desk.expect("files", season="S1", name="c")
    desk.expect("files", season="S1", name="d")
    desk.expect("files", season="S1", name="e")
    assert [claimed() for _ in range(3)] == [["a", "c", "d"], ["b"], ["e"]]


def test_only_runners_that_die_in_a_row_make_a_task_suspect(desk):
    desk.expect("teams", team="A")
    for _ in range(3):
        assert not desk.claim().runs_exclusively
        lose_all(desk)
        assert desk.database.value("select last_error from queue") == "the runner crashed"
        desk.end(desk.claim(), adce.Outcome.LOST)


def lose_all(desk: Desk) -> None:
    """The runner dies and starts again."""
    with desk.database.transaction() as sql:
        adce.requeue_orphans(sql, desk.configuration.retry)
    desk.busy.clear()


def test_what_a_clock_that_was_ahead_has_left_is_due_now(desk):
    desk.clock.step_wall(1500 * adce.DAY)
    for team in "AB":
        desk.expect("teams", team=team)
    desk.end(desk.claim(), adce.Outcome.HTTP_ERROR)
    desk.end(desk.claim(), adce.Outcome.OK)
    desk.clock.step_wall(-1500 * adce.DAY)
    assert desk.claim() is None
    with desk.database.transaction() as sql:
        adce.correct_instants(sql, desk.configuration.retry, desk.clock.wall())
    newest = desk.database.read("select max(modified_at), max(next_at) from objects")[0]
    assert tuple(newest) == (int(desk.clock.wall()), 0)
    assert desk.claim()


def test_among_equals_the_oldest_goes_first(desk):
    for team in "CAB":
        desk.expect("teams", team=team)
        desk.clock.advance(60)
    claims = [desk.claim() for _ in range(3)]
    assert [claimed.tasks[0].fields["team"] for claimed in claims if claimed] == ["C", "A", "B"]


def test_without_weighting_priority_decides_and_then_age_across_datasets(configure, database, clock):
    desk = Desk(configure("priority_weighting: {enabled: false}\n" + TEXT.replace("HIGH", "LOW")), database, clock)
    desk.drop(desk.expect("days", date="2025-10-01"))
    for name, fields in (
        ("teams", {"team": "A"}),
        ("days", {"date": "2025-10-01"}),
        ("teams", {"team": "B"}),
        ("files", {"season": "S1", "name": "a"}),
    ):
        desk.expect(name, **fields)
        clock.advance(60)
    keys = [claimed.tasks[0].key for claimed in iter(desk.claim, None)]
    assert keys == ["files/S1/a.json", "teams/A.json", "days/2025-10-01.json", "teams/B.json"]


def test_rolled_back_claim_leaves_neither_task_nor_permit(desk):
    desk.expect("days", date="2025-10-01")
    with pytest.raises(ZeroDivisionError), desk.database.transaction() as sql:
        adce.claim(sql, desk.configuration, desk.clock, {}, 5)[0].tasks[0].object_id / 0
    assert desk.states() == {"pending": 1}
    assert desk.database.value("select count(*) from requests") == 0
    assert desk.database.value("select count(*) from attempts") == 0


@pytest.mark.parametrize(
    ("outcome", "state", "failures"),
    [
        (adce.Outcome.OK, "done", 0),
        (adce.Outcome.NOT_YET, "retry", 0),
        (adce.Outcome.INVALID, "retry", 1),
        (adce.Outcome.HTTP_ERROR, "retry", 1),
        (adce.Outcome.ERROR, "retry", 1),
        (adce.Outcome.THROTTLED, "retry", 0),
        (adce.Outcome.TIMEOUT, "retry", 1),
        (adce.Outcome.BROKEN, "retry", 1),
        (adce.Outcome.UNREACHABLE, "retry", 1),
        (adce.Outcome.STORE_ERROR, "retry", 0),
        (adce.Outcome.UNSTORABLE, "retry", 1),
        (adce.Outcome.LOST, "pending", 0),
    ],
)
def test_outcome_decides_the_next_state(desk, outcome, state, failures):
    desk.expect("teams", team="A")
    ending = desk.end(desk.claim(), outcome)
    assert (ending.state, ending.task.failures) == (state, failures)
    assert desk.states() == {state: 1}
    row = desk.database.read("select outcome, error, requests from attempts")[0]
    assert (row["outcome"], row["requests"]) == (outcome, 1)


def test_task_gives_up_after_so_many_failures_and_stays_visible(desk):
    desk.expect("teams", team="A")
    delays = []
    for _ in range(3):
        ending = desk.end(desk.claim(), adce.Outcome.HTTP_ERROR)
        delays.append(ending.task.next_at and ending.task.next_at - desk.clock.wall())
        desk.clock.advance(3600)
    assert ending.state == "gave_up"
    assert 45 <= delays[0] <= 77
    assert 89 <= delays[1] <= 152
    assert desk.claim() is None
    row = desk.database.read("select attempts, last_error from queue where state = 'gave_up'")[0]
    assert tuple(row) == (3, "it was http_error")


@pytest.mark.parametrize(("day", "failures"), [("2025-10-02", 0), ("2025-10-01", 1)])
def test_object_that_is_not_there_is_a_failure_once_its_day_is_a_week_ago(desk, day, failures):
    desk.expect("days", date=day)
    assert desk.end(desk.claim(), adce.Outcome.NOT_YET).task.failures == failures


def test_retries_wake_by_the_chunk(desk, monkeypatch):
    monkeypatch.setattr(adce, "CHUNK", 2)
    for team in "ABCDE":
        desk.expect("teams", team=team)
        desk.end(desk.claim(), adce.Outcome.INVALID)
    with desk.database.transaction() as sql:
        ledger = adce.Ledger(sql, desk.configuration, desk.clock.wall() + adce.HOUR)
        assert [adce.advance(ledger) for _ in range(3)] == [True, True, False]
    assert desk.states() == {"pending": 5}


def test_object_that_is_not_final_waits_and_its_good_attempts_do_not_lengthen_a_later_wait(desk):
    desk.expect("days", date="2025-10-01")
    for _ in range(3):
        desk.end(desk.claim(), adce.Outcome.THROTTLED)
        desk.clock.advance(adce.HOUR)
    unsettled = dataclasses.replace(HELD, settled=False)
    for _ in range(8):
        claimed = desk.claim()
        good = dataclasses.replace(result(claimed.tasks[0], adce.Outcome.OK, desk.clock), inspection=unsettled)
        ending = desk.finish(claimed, good)[0]
        assert (ending.state, ending.task.next_at) == ("retry", desk.clock.wall() + 6 * adce.HOUR)
        desk.clock.advance(6 * adce.HOUR)
    ending = desk.end(desk.claim(), adce.Outcome.THROTTLED)
    assert 45 <= ending.task.next_at - desk.clock.wall() <= 77


def test_object_that_is_not_final_is_claimed_again_when_it_is_due_and_not_before(desk):
    desk.expect("days", date="2025-10-01")
    claimed = desk.claim()
    stored = result(claimed.tasks[0], adce.Outcome.OK, desk.clock)
    desk.finish(claimed, dataclasses.replace(stored, inspection=dataclasses.replace(HELD, settled=False)))
    due = adce.utc_text(desk.clock.wall() + 6 * adce.HOUR)
    assert [tuple(row) for row in desk.database.read("select state, next_at from queue")] == [("retry", due)]
    desk.clock.advance(6 * adce.HOUR - 1)
    assert desk.claim() is None
    desk.clock.advance(1)
    assert desk.claim()


@pytest.mark.parametrize(("size", "age"), [(9, 6 * adce.HOUR), (9, 7 * adce.HOUR), (1 << 40, 0)])
def test_object_that_is_a_gap_when_it_was_just_stored_is_not_fetched_again_at_once(desk, size, age):
    """The clock of the store is wrong, or the size that it tells."""
    desk.expect("days", date="2025-10-01")
    claimed = desk.claim()
    stored = adce.StoredObject(claimed.tasks[0].key, size, "etag", int(desk.clock.wall() - age))
    unsettled = dataclasses.replace(HELD, settled=False)
    ending = desk.finish(claimed, adce.Result(adce.Outcome.OK, stored=stored, inspection=unsettled, requests=1))[0]
    assert (ending.state, ending.task.next_at) == ("retry", desk.clock.wall() + 61)


def test_object_without_a_day_is_fetched_once_more_and_not_again(configure, database, clock):
    text = TEXT.replace('url: "/{team}"', 'url: "/{team}"\n    freshness: {refetch_once_after: 1h}')
    desk = Desk(configure(text), database, clock)
    desk.expect("teams", team="A")
    for _ in range(2):
        desk.end(desk.claim(), adce.Outcome.OK)
        clock.advance(adce.HOUR)
        with database.transaction() as sql:
            adce.advance(adce.Ledger(sql, desk.configuration, clock.wall()))
    assert desk.claim() is None


def test_good_attempt_clears_the_failures_before_it(desk):
    desk.expect("days", date="2025-10-01")
    desk.end(desk.claim(), adce.Outcome.HTTP_ERROR)
    desk.clock.advance(adce.HOUR)
    claimed = desk.claim()
    good = dataclasses.replace(
        result(claimed.tasks[0], adce.Outcome.OK, desk.clock), inspection=dataclasses.replace(HELD, settled=False)
    )
    assert desk.finish(claimed, good)[0].task.failures == 0
    desk.clock.advance(6 * adce.HOUR)
    assert desk.end(desk.claim(), adce.Outcome.HTTP_ERROR).task.failures == 1


def test_task_of_a_paused_source_waits_at_least_as_long_as_its_source(desk):
    desk.expect("teams", team="A")
    claimed = desk.claim()
    told = dataclasses.replace(result(claimed.tasks[0], adce.Outcome.THROTTLED, desk.clock), retry_after=500.0)
    ending = desk.finish(claimed, told)[0]
    assert 501 <= ending.task.next_at - desk.clock.wall() <= 502


@pytest.mark.parametrize("fraction", [0, 0.5, 0.999])
def test_first_request_after_a_pause_is_for_another_object(desk, fraction):
    desk.clock.advance(fraction)
    for team in "AB":
        desk.expect("teams", team=team)
    claimed = desk.claim()
    told = dataclasses.replace(result(claimed.tasks[0], adce.Outcome.THROTTLED, desk.clock), retry_after=500.0)
    desk.finish(claimed, told)
    desk.clock.advance(500)
    assert [task.fields["team"] for task in desk.claim().tasks] == ["B"]


def test_wait_of_a_task_grows_with_its_own_attempts_and_not_with_those_of_others(desk):
    def wait_of(team: str) -> float:
        claimed = desk.claim()
        assert claimed.tasks[0].fields["team"] == team
        told = dataclasses.replace(result(claimed.tasks[0], adce.Outcome.THROTTLED, desk.clock), retry_after=0.0)
        return desk.finish(claimed, told)[0].task.next_at - desk.clock.wall()

    for team in "ABCD":
        desk.expect("teams", team=team)
        assert 45 <= wait_of(team) <= 77
    desk.clock.advance(adce.HOUR)
    assert 89 <= wait_of("A") <= 152


def test_lost_attempts_do_not_lengthen_a_later_wait(desk):
    desk.expect("teams", team="A")
    for _ in range(3):
        desk.end(desk.claim(), adce.Outcome.LOST)
    assert 45 <= desk.end(desk.claim(), adce.Outcome.THROTTLED).task.next_at - desk.clock.wall() <= 77


@pytest.mark.parametrize("outcome", [adce.Outcome.THROTTLED, adce.Outcome.STORE_ERROR])
def test_failure_that_is_not_the_tasks_own_never_gives_it_up(desk, outcome):
    desk.expect("teams", team="A")
    for _ in range(8):
        ending = desk.end(desk.claim(), outcome)
        assert (ending.state, ending.task.failures) == ("retry", 0)
        desk.clock.advance(2 * adce.HOUR)


def test_second_failure_in_a_row_of_a_source_blames_the_source_and_not_the_task(desk):
    for team in "ABCDE":
        desk.expect("teams", team=team)
    claims = [desk.claim() for _ in range(4)]
    endings = [desk.end(claimed, adce.Outcome.UNREACHABLE) for claimed in claims if claimed]
    assert [ending.task.failures for ending in endings] == [1, 0, 0, 0]
    assert desk.claim() is None
    assert desk.database.value("select reason from scopes where scope = 'nba'") == "it was unreachable"


def test_attempts_that_sent_no_request_are_failures_of_their_tasks_and_never_of_the_source(desk):
    for number in range(11):
        desk.expect("teams", team=str(number))
        claimed = desk.claim()
        ending = desk.finish(claimed, adce.Result(adce.Outcome.ERROR, "its fields make no address", requests=0))[0]
        assert (ending.counted, ending.task.failures) == (True, 1)


def test_ten_answers_in_a_row_that_say_server_error_pause_the_source(desk):
    for number in range(11):
        desk.expect("teams", team=str(number))
    for _ in range(10):
        claimed = desk.claim()
        broken = dataclasses.replace(result(claimed.tasks[0], adce.Outcome.HTTP_ERROR, desk.clock), http_status=500)
        desk.finish(claimed, broken)
    assert desk.claim() is None
    desk.clock.advance(59.9)
    assert desk.claim() is None
    desk.clock.advance(0.1)
    assert desk.claim()


def test_claim_that_is_given_back_unasked_uses_up_no_limit(desk):
    desk.expect("days", date="2025-10-01")
    for _ in range(5):  # of 3 a minute
        claimed = desk.claim()
        assert claimed
        desk.finish(claimed, adce.Result(adce.Outcome.LOST, requests=0))


def test_store_failure_pauses_everything(desk):
    desk.expect("teams", team="A")
    desk.expect("days", date="2025-10-01")
    desk.end(desk.claim(), adce.Outcome.STORE_ERROR)
    assert desk.claim() is None
    desk.clock.advance(61)
    assert desk.claim()


def test_object_that_a_program_left_and_that_is_invalid_is_suspect_at_once(desk):
    desk.expect("files", season="S1", name="a")
    claimed = desk.claim()
    left = result(claimed.tasks[0], adce.Outcome.OK, desk.clock)
    wrong = adce.Inspection(verdict="not JSON", settled=False, live=False, mentions={})
    desk.finish(claimed, dataclasses.replace(left, outcome=adce.Outcome.INVALID, inspection=wrong))
    assert [tuple(row) for row in desk.database.read("select kind, reason, task_state from gaps")] == [
        ("suspect", "not JSON", "retry")
    ]


def test_task_whose_permit_was_refused_waits_until_it_is_possible(desk):
    desk.expect("files", season="S1", name="a")
    ending = desk.finish(desk.claim(), adce.Result(adce.Outcome.LOST, "no permit", retry_after=300.0))[0]
    assert (ending.state, ending.task.next_at, ending.task.failures) == ("retry", desk.clock.wall() + 301, 0)


def test_late_finish_of_a_lost_attempt_changes_nothing(desk):
    desk.expect("teams", team="A")
    lost = desk.claim()
    with desk.database.transaction() as sql:
        assert adce.requeue_orphans(sql, desk.configuration.retry) == 1
    again = desk.claim()
    assert lost and again
    assert desk.finish(lost, result(lost.tasks[0], adce.Outcome.OK, desk.clock)) == []
    assert desk.states() == {"running": 1}
    assert desk.end(again, adce.Outcome.OK).state == "done"
    outcomes = [row[0] for row in desk.database.read("select outcome from attempts order by attempt_id")]
    assert outcomes == ["lost", "ok"]


def test_object_that_was_dropped_meanwhile_cancels_its_task(desk):
    object_id = desk.expect("teams", team="A")
    claimed = desk.claim()
    desk.drop(object_id)
    assert desk.end(claimed, adce.Outcome.OK).state == "cancelled"
    assert desk.states() == {"cancelled": 1}


def test_batch_takes_the_tasks_that_share_a_field(desk):
    for season in ("S1", "S2"):
        for name in "abcd":
            desk.expect("files", season=season, name=name)
    sizes = [sorted(task.key for task in claimed.tasks) for claimed in iter(desk.claim, None)]
    assert [len(keys) for keys in sizes] == [3, 1, 3, 1] or [len(keys) for keys in sizes] == [3, 3, 1, 1]
    assert all(len({key.split("/")[1] for key in keys}) == 1 for keys in sizes)


def test_gap_size_of_a_batch_is_its_number(desk, tmp_path):
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    adce.run_cycle(adce.reconcile(desk.database, desk.configuration, store, desk.clock))
    sizes = desk.database.read("select distinct gap_size from queue where dataset = 'files'")
    assert [row[0] for row in sizes] == [3]


@given(st.integers(1, 100), st.integers(0, 1000))
def test_delay_doubles_with_a_quarter_of_chance_and_has_a_longest(times, seed):
    policy = adce.Retry(max_attempts=5, initial_delay_seconds=60, max_delay_seconds=21600)
    delay, plain = adce.retry_delay(policy, times, random.Random(seed)), 60 * 2.0 ** min(times - 1, 40)
    assert min(plain * 0.75, 21600) <= delay <= min(plain * 1.25, 21600)


def test_success_rate_follows_the_latest_attempts(desk):
    for team in "AB":
        desk.expect("teams", team=team)
    desk.end(desk.claim(), adce.Outcome.HTTP_ERROR)
    rate, bonus = desk.database.read("select success_rate, bonus from datasets where dataset = 'teams'")[0]
    assert (rate, bonus) == (pytest.approx(0.9), pytest.approx(18))
    desk.end(desk.claim(), adce.Outcome.LOST)
    desk.end(desk.claim(), adce.Outcome.OK)
    assert desk.database.value("select success_rate from datasets where dataset = 'teams'") == pytest.approx(0.91)


def test_daily_totals_are_the_sums_of_the_attempts_lost_ones_included(desk):
    for team in "ABCDE":
        desk.expect("teams", team=team)
    for outcome in (adce.Outcome.OK, adce.Outcome.OK, adce.Outcome.INVALID, adce.Outcome.LOST):
        claimed = desk.claim()
        desk.clock.advance(2)
        desk.end(claimed, outcome)
    desk.claim()
    desk.claim()
    with desk.database.transaction() as sql:
        adce.requeue_orphans(sql, desk.configuration.retry)
    totals = {row["outcome"]: (row["attempts"], row["seconds"]) for row in desk.database.read("select * from stats")}
    assert totals == {"ok": (2, 4.0), "invalid": (1, 2.0), "lost": (3, 2.0)}


def test_daily_totals_tell_the_priority_of_what_is_done(desk):
    desk.expect("days", date="2025-10-01")
    desk.end(desk.claim(), adce.Outcome.OK)
    assert desk.database.value("select priority from stats") == "HIGH"


def fill(desk: Desk, count: int) -> None:
    """So many pending tasks, all for one dataset, the last one the best."""
    with desk.database.transaction() as sql:
        sql.execute(
            """
            with recursive n(i) as (select 1 union all select i + 1 from n where i < ?)
            insert into objects (dataset_id, key, fields, state, since, proven, task, priority, detected_at, gap_size,
                                 rank, slope)
            select dataset_id, 'teams/' || i, '{"team": "x"}', 'missing', 0, 1, 'pending', 'LOW', 0, 1, i, 0
            from n, datasets where dataset = 'teams'
            """,
            (count,),
        )


def test_claim_and_finish_are_served_by_indexes_whatever_the_size(desk):
    fill(desk, 100_000)
    statements: list[str] = []
    desk.database._writer.set_trace_callback(statements.append)
    claimed = desk.claim()
    desk.end(claimed, adce.Outcome.OK)
    desk.database._writer.set_trace_callback(None)
    assert claimed.tasks[0].key == "teams/100000"
    texts = {text for text in statements if text.split()[0] in ("select", "update", "insert", "delete")}
    plans = {row[3] for text in texts for row in desk.database.read(f"explain query plan {text}")}
    assert any("objects_pending" in plan for plan in plans)
    # datasets and sources are few, as are requests in flight, those that one grant removes, and who waits
    scans = {plan.split()[1] for plan in plans if plan.startswith("SCAN") and "requests_in_flight" not in plan}
    assert scans <= {"d", "datasets", "(subquery-1)", "waiters", "json_each"}


def test_cost_of_claim_and_finish_does_not_grow_with_the_queue(configure, clock):
    """Counted in steps of SQLite's machine, which no other load changes."""
    costs = []
    for size in (100, 20_000):
        desk, steps = Desk(configure(TEXT), adce.memory_database(), clock), Counter[str]()
        fill(desk, size)
        desk.database._writer.set_progress_handler(lambda steps=steps: steps.update(["step"]), 1)
        for _ in range(3):
            desk.end(desk.claim(), adce.Outcome.OK)
        costs.append(steps["step"])
    assert costs[1] < costs[0] * 1.2


class QueueMachine(RuleBasedStateMachine):
    """Any mixture of work, time, crashes and losses keeps every task accounted for."""

    outcomes = st.sampled_from([outcome for outcome in adce.Outcome if outcome is not adce.Outcome.RUNNING])

    @initialize()
    def start(self) -> None:
        partitions = adce.Partitions(values={"team": tuple("ABCDEF")})
        dataset = adce.Dataset("teams", "nba", adce.Template("{team}"), partitions, url=adce.Template("/{team}"))
        self.configuration = adce.Configuration(
            path=adce.Path("x"),
            database=adce.Path("x"),
            store="x",
            sources={"nba": adce.Source("nba")},
            datasets={"teams": dataset},
        )
        self.desk = Desk(self.configuration, adce.memory_database(), ManualClock())
        self.claims: list[adce.Claim] = []
        self.ids: dict[str, int] = {}
        self.whole: set[str] = set()
        self.dropped: set[str] = set()

    @rule(team=st.sampled_from("ABCDEF"))
    def expect(self, team: str) -> None:
        self.ids[team] = self.desk.expect("teams", team=team)
        self.dropped.discard(team)

    @rule()
    def claim(self) -> None:
        if claimed := self.desk.claim():
            self.claims.append(claimed)

    @precondition(lambda self: self.claims)
    @rule(outcome=outcomes, data=st.data())
    def finish(self, outcome: adce.Outcome, data: st.DataObject) -> None:
        claimed = self.claims.pop(data.draw(st.integers(0, len(self.claims) - 1)))
        team = claimed.tasks[0].fields["team"]
        ending = self.desk.end(claimed, outcome)
        if outcome is adce.Outcome.OK and team not in self.dropped:
            self.whole.add(team)
        assert (ending.state == "done") == (outcome is adce.Outcome.OK and team not in self.dropped)

    @rule()
    def crash(self) -> None:
        with self.desk.database.transaction() as sql:
            assert adce.requeue_orphans(sql, self.configuration.retry) == len(self.claims)
        self.claims.clear()
        self.desk.busy.clear()

    @rule(seconds=st.integers(1, 5000))
    def pause(self, seconds: int) -> None:
        with self.desk.database.transaction() as sql:
            adce.pause(sql, "nba", seconds, "asked to", self.desk.clock.boot())
        assert self.desk.claim() is None

    @rule(seconds=st.integers(1, 30_000))
    def wait(self, seconds: int) -> None:
        self.desk.clock.advance(seconds)

    @rule(team=st.sampled_from("ABCDEF"))
    def drop(self, team: str) -> None:
        if team in self.ids:
            self.desk.drop(self.ids[team])
            self.dropped.add(team)

    @invariant()
    def every_gap_has_one_live_task_and_nothing_else_has(self) -> None:
        if not hasattr(self, "desk"):
            return
        rows = self.desk.database.read("select key, state from queue")
        working = {claimed.tasks[0].fields["team"] for claimed in self.claims}
        wanted = set(self.ids) - self.dropped - self.whole
        assert sorted(row[0] for row in rows) == sorted(wanted | working)
        assert {row[0] for row in rows if row[1] == "running"} == working


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestQueueMachine = QueueMachine.TestCase
