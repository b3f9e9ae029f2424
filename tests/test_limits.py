"""What may be asked, and when: never one request too many."""

from __future__ import annotations

import heapq
import itertools
import multiprocessing
import sqlite3
import time
from pathlib import Path

import pytest
import requests
from conftest import ROOT, ManualClock
from hypothesis import example, given, settings
from hypothesis import strategies as st
from upstream import Answer, Upstream

import adce

SOURCES = ("espn", "nba")


def limiting(backoff: adce.Backoff | None = None, **scopes: adce.ScopeLimits) -> adce.RateLimiting:
    return adce.RateLimiting(scopes=scopes, backoff=backoff)


def windows(*pairs: tuple[int, float], **more) -> adce.ScopeLimits:
    return adce.ScopeLimits(tuple(adce.WindowLimit(*pair) for pair in pairs), **more)


def configuration(rates: adce.RateLimiting) -> adce.Configuration:
    sources = {name: adce.Source(name, timeout_seconds=20) for name in SOURCES}
    return adce.Configuration(Path("adce.yaml"), Path("adce.db"), "lake", rate_limiting=rates, sources=sources)


class Desk:
    """A limiter on a database in memory, whose time is moved by hand."""

    def __init__(self, rates: adce.RateLimiting) -> None:
        self.clock, self.rates = ManualClock(), rates
        self.database = adce.memory_database()
        self.declare()

    def declare(self) -> None:
        with self.database.transaction() as sql:
            adce.declare_limits(sql, configuration(self.rates), self.clock)

    def opening(self, source: str = "espn") -> adce.Opening:
        with self.database.transaction() as sql:
            adce.reap(sql, self.clock.boot())
            return adce.opening(sql, self.rates, source, self.clock.boot())

    def ask(self, source: str = "espn", timeout: float = 20) -> adce.Permit | None:
        """A permit, if the source can be asked now."""
        with self.database.transaction() as sql:
            now = self.clock.boot()
            adce.reap(sql, now)
            if adce.opening(sql, self.rates, source, now).at > now:
                return None
            return adce.grant(sql, self.rates, source, timeout, now)

    def release(self, permit: adce.Permit, *, used: bool = True) -> None:
        with self.database.transaction() as sql:
            adce.release(sql, permit, self.clock.boot(), used=used)

    def ask_and_release(self, source: str = "espn") -> bool:
        permit = self.ask(source)
        if permit:
            self.release(permit)
        return permit is not None

    def learn(self, outcome: adce.Outcome, retry_after: float | None = None, **source) -> adce.Pause | None:
        with self.database.transaction() as sql:
            described = adce.Source("espn", **source)
            return adce.learn(sql, described, outcome, "told so", self.clock.boot(), retry_after)[1]


def test_window_opens_when_a_finished_request_leaves_it():
    desk = Desk(limiting(espn=windows((2, 60))))
    assert [desk.ask_and_release() for _ in range(3)] == [True, True, False]
    assert desk.opening().at == desk.clock.boot() + 60
    desk.clock.advance(59.999)
    assert not desk.ask_and_release()
    desk.clock.advance(0.001)
    assert desk.ask_and_release()


def test_request_in_flight_counts_until_so_long_after_its_finish():
    desk = Desk(limiting(espn=windows((1, 60))))
    permit = desk.ask(timeout=500)
    desk.clock.advance(300)
    assert not desk.ask()
    assert permit
    desk.release(permit)
    desk.clock.advance(59)
    assert not desk.ask()
    desk.clock.advance(1)
    assert desk.ask()


def test_global_window_counts_all_sources_and_takes_nothing_from_one_that_must_wait():
    desk = Desk(limiting(espn=windows((1, 60)), **{"global": windows((2, 60))}))
    assert [desk.ask_and_release("espn"), desk.ask_and_release("espn")] == [True, False]
    assert [desk.ask_and_release("nba"), desk.ask_and_release("nba")] == [True, False]


def test_permit_that_was_not_used_counts_nowhere():
    desk = Desk(limiting(espn=windows((1, 60))))
    permit = desk.ask()
    assert permit
    desk.release(permit, used=False)
    assert desk.ask()


def test_bucket_lets_a_burst_through_and_then_its_rate():
    desk = Desk(limiting(espn=windows((60, 60), burst_size=3, refill_per_second=1)))
    assert [desk.ask_and_release() for _ in range(4)] == [True, True, True, False]
    assert desk.opening().at == pytest.approx(desk.clock.boot() + 1)
    desk.clock.advance(1)
    assert [desk.ask_and_release(), desk.ask_and_release()] == [True, False]


def test_dead_owner_counts_until_its_deadline_and_a_window_after_it():
    desk = Desk(limiting(espn=windows((1, 60))))
    permit = desk.ask()
    assert permit
    desk.clock.seconds = permit.deadline + 1
    assert not desk.ask()
    desk.clock.advance(59.9)
    assert not desk.ask()
    desk.clock.advance(0.1)
    assert desk.ask()


def test_changed_limit_applies_to_what_was_asked_before():
    desk = Desk(limiting(espn=windows((5, 60))))
    assert all(desk.ask_and_release() for _ in range(3))
    desk.rates = limiting(espn=windows((3, 60)))
    desk.declare()
    assert not desk.ask()


def test_steps_of_the_wall_clock_change_nothing():
    desk = Desk(limiting(espn=windows((1, 60))))
    assert desk.ask_and_release()
    for step in (3600, -7200, 10 * 365 * 86400):
        desk.clock.step_wall(step)
        assert desk.opening().at == desk.clock.boot() + 60


def test_reboot_makes_old_requests_count_from_the_new_start():
    desk = Desk(limiting(espn=windows((2, 60))))
    assert desk.ask_and_release()
    assert desk.ask()
    desk.clock.reboot(uptime=5)
    desk.declare()
    assert desk.opening().at == 60
    desk.clock.seconds = 60
    assert desk.ask()


def test_pause_survives_a_reboot_but_grows_no_longer():
    desk = Desk(limiting())
    assert desk.learn(adce.Outcome.THROTTLED, retry_after=100)
    desk.clock.advance(40)
    desk.clock.reboot(uptime=5)
    desk.declare()
    assert desk.opening().at == pytest.approx(65)


def test_pauses_are_merged_to_the_longest():
    desk = Desk(limiting())
    start = desk.clock.boot()
    for seconds in (100, 30, 300, 10):
        desk.learn(adce.Outcome.THROTTLED, retry_after=seconds)
    assert desk.opening() == adce.Opening(start + 300, "told so", is_pause=True)


@pytest.mark.parametrize(("asked", "paused"), [(-5, 0), (0, 0), (30, 30), (10 * 365 * 86400, 86400)])
def test_retry_after_is_obeyed_for_a_day_at_most(asked, paused):
    pause = Desk(limiting()).learn(adce.Outcome.THROTTLED, retry_after=asked)
    assert pause
    assert pause.seconds == paused


def test_pause_without_retry_after_doubles_until_a_good_answer():
    desk, lengths = Desk(limiting()), []
    for outcome in [adce.Outcome.THROTTLED] * 3 + [adce.Outcome.OK, adce.Outcome.THROTTLED]:
        pause = desk.learn(outcome)
        lengths.append(pause.seconds if pause else None)
        desk.clock.advance(10_000)
    assert lengths == [60, 120, 240, None, 60]


def test_answers_to_requests_from_before_a_pause_do_not_lengthen_it():
    desk = Desk(limiting())
    pauses = [desk.learn(adce.Outcome.UNREACHABLE) for _ in range(4)]
    assert [bool(pause) for pause in pauses] == [False, True, False, False]


def test_failures_in_a_row_pause_a_source_and_one_request_at_a_time_asks_whether_it_is_back():
    desk = Desk(limiting())
    pauses = [desk.learn(adce.Outcome.BROKEN) for _ in range(5)]
    assert [bool(pause) for pause in pauses] == [False, False, False, False, True]
    desk.clock.advance(60)
    probe = desk.ask()
    assert probe
    assert not desk.ask()
    desk.release(probe)
    desk.learn(adce.Outcome.OK)
    assert desk.ask()
    assert desk.ask()


def test_finished_requests_that_no_window_counts_are_removed_little_by_little():
    desk = Desk(limiting(espn=windows((5, 10))))
    for _ in range(200):
        assert desk.ask_and_release()
        desk.clock.advance(2)
    assert desk.database.value("select count(*) from requests") < 12


def test_saturated_window_is_used_up_and_never_exceeded():
    desk, granted = Desk(limiting(espn=windows((5, 10), (40, 100)))), []
    while desk.clock.boot() < 50_000 + 500:
        if desk.ask_and_release():
            granted.append(desk.clock.boot())
        desk.clock.advance(0.5)
    assert all(later - earlier >= 10 for earlier, later in zip(granted, granted[5:], strict=False))
    assert all(later - earlier >= 100 for earlier, later in zip(granted, granted[40:], strict=False))
    assert len(granted) >= 5 * 40


REAL = (60, 3000, 10), (30, 1000, 5), (20, 500, 3), (40, 2000, 8)  # a minute, an hour, burst


@pytest.mark.parametrize(("minute", "hour", "burst"), REAL)
def test_backoff_still_reaches_the_whole_quota(minute, hour, burst):
    """The plain rule, 1, 2, 4 ... 30 s past 80%, would end at 81% of it."""
    limits = windows((minute, 60), (hour, 3600), burst_size=burst, refill_per_second=minute / 60)
    desk, granted = Desk(limiting(adce.Backoff(), espn=limits)), 0
    start = desk.clock.boot()
    while desk.clock.boot() < start + 3 * 3600:
        if desk.ask_and_release():
            granted += desk.clock.boot() >= start + 3600  # without the first hour's burst
        desk.clock.seconds = max(desk.opening().at, desk.clock.seconds)
    assert granted >= 0.99 * 2 * min(hour, minute * 60)


def test_backoff_spaces_requests_past_the_threshold():
    desk = Desk(limiting(adce.Backoff(), espn=windows((10, 60))))
    assert all(desk.ask_and_release() for _ in range(8))
    waits = []
    for _ in range(2):
        waits.append(desk.opening().at - desk.clock.boot())
        desk.clock.advance(waits[-1])
        assert desk.ask_and_release()
    assert waits == [pytest.approx(1), pytest.approx(2)]


# --------------------------------------------------------------- no window is ever exceeded

limit_values = st.tuples(st.integers(1, 6), st.sampled_from([1.0, 3.0, 10.0, 60.0]))
scope_values = st.builds(
    lambda pairs, burst: windows(*pairs, burst_size=burst, refill_per_second=pairs[0][0] / pairs[0][1]),
    st.lists(limit_values, min_size=1, max_size=3, unique_by=lambda pair: pair[1]),
    st.none() | st.integers(1, 5),
)
rate_values = st.builds(
    lambda espn, nba, everyone, backoff: limiting(backoff, espn=espn, nba=nba, **{"global": everyone}),
    scope_values,
    scope_values,
    scope_values,
    st.none() | st.just(adce.Backoff()),
)
asks = st.tuples(st.just("ask"), st.sampled_from(SOURCES), st.floats(0, 25), st.floats(0, 1), st.booleans())
others = st.one_of(
    st.tuples(st.just("advance"), st.floats(0, 30)),
    st.tuples(st.just("until open"), st.sampled_from(SOURCES)),
    st.tuples(st.just("step"), st.sampled_from([3600.0, -3600.0])),
    st.tuples(st.just("reboot"), st.floats(0.1, 100)),
)


class World:
    """A limiter, its server, and true time, which no reboot resets."""

    def __init__(self, rates: adce.RateLimiting) -> None:
        self.desk, self.elapsed = Desk(rates), 0.0
        self.arrivals: dict[str, list[float]] = {name: [] for name in SOURCES}
        self.finishes: list[tuple[float, int, adce.Permit]] = []

    def advance(self, seconds: float) -> None:
        """Let time pass; requests finish at their instants."""
        end = self.elapsed + seconds
        while self.finishes and self.finishes[0][0] <= end:
            at, _, permit = heapq.heappop(self.finishes)
            self._move(at)
            self.desk.release(permit)
        self._move(end)

    def _move(self, to: float) -> None:
        self.desk.clock.advance(max(0.0, to - self.elapsed))
        self.elapsed = max(self.elapsed, to)

    def ask(self, source: str, latency: float, where: float, dies: bool) -> None:
        permit = self.desk.ask(source)
        if permit:
            self.arrivals[source].append(self.elapsed + latency * where)
            if not dies:
                heapq.heappush(self.finishes, (self.elapsed + latency, permit.request_id, permit))

    def reboot(self, uptime: float) -> None:
        """What was on its way has arrived or never will; the machine comes up a little later."""
        cut = self.elapsed
        self.arrivals = {name: [min(at, cut) for at in times] for name, times in self.arrivals.items()}
        self.finishes = []
        self.desk.clock.reboot(f"boot at {cut}", uptime)
        self.elapsed += uptime
        self.desk.declare()

    def excess(self, scope: str, limit: adce.WindowLimit) -> list[float]:
        names = SOURCES if scope == "global" else (scope,)
        times = sorted(itertools.chain(*(self.arrivals[name] for name in names)))
        spans = [later - earlier for earlier, later in zip(times, times[limit.max_requests :], strict=False)]
        return [span for span in spans if span < limit.seconds - 1e-6]


@settings(max_examples=150, deadline=None)
@given(rate_values, st.lists(asks | others, max_size=60))
@example(
    limiting(espn=windows((1, 1.0)), nba=windows((1, 1.0)), **{"global": windows((1, 1.0))}),
    [("ask", "espn", 25.0, 1.0, True)],
)
def test_no_window_is_ever_exceeded_at_the_server(rates, steps):
    world = World(rates)
    for step in steps:
        if step[0] == "ask":
            world.ask(*step[1:])
        elif step[0] == "advance":
            world.advance(step[1])
        elif step[0] == "until open":
            world.advance(world.desk.opening(step[1]).at - world.desk.clock.boot())
        elif step[0] == "step":
            world.desk.clock.step_wall(step[1])
        else:
            world.reboot(step[1])
    for scope, limits in rates.scopes.items():
        assert [world.excess(scope, limit) for limit in limits.windows] == [[] for _ in limits.windows]


@settings(max_examples=100, deadline=None)
@given(rate_values, st.integers(0, 30), st.sampled_from(SOURCES))
def test_idle_limiter_grants_at_the_very_instant_it_has_promised(rates, used, source):
    desk = Desk(rates)
    for _ in range(used):
        desk.ask_and_release()
    promised = desk.opening(source)
    desk.clock.seconds = max(desk.clock.seconds, promised.at)
    assert desk.ask(source)


def test_no_statement_scans_the_requests():
    desk = Desk(limiting(adce.Backoff(), espn=windows((5, 10), (50, 100)), **{"global": windows((60, 100))}))
    for _ in range(12):
        desk.ask_and_release()
        desk.clock.advance(1)
    statements: list[str] = []
    desk.database._writer.set_trace_callback(statements.append)
    desk.ask_and_release()
    desk.database._writer.set_trace_callback(None)
    plans = [
        row[3]
        for text in set(statements)
        if text.split()[0] in ("select", "update", "delete", "insert")
        for row in desk.database.read(f"explain query plan {text}")
    ]
    assert any("requests_by_source" in plan for plan in plans)
    assert [plan for plan in plans if plan.startswith("SCAN requests") and "INDEX" not in plan] == []


def ask_in_a_process(database: str, address: str, seconds: float) -> None:
    """One more process that shares the limits and asks as fast as it may."""
    clock, rates = adce.Clock(), shared_rates()
    opened, end = adce.open_database(Path(database)), time.monotonic() + seconds
    with requests.Session() as session:
        while time.monotonic() < end:
            with opened.transaction() as sql:
                now = clock.boot()
                opening = adce.opening(sql, rates, "espn", now)
                permit = adce.grant(sql, rates, "espn", 5, now) if opening.at <= now else None
            if permit is None:
                time.sleep(max(0.0, opening.at - clock.boot()))
                continue
            session.get(f"{address}/x", timeout=5)
            with opened.transaction() as sql:
                adce.release(sql, permit, clock.boot())


def shared_rates() -> adce.RateLimiting:
    return limiting(espn=windows((20, 1.0)), **{"global": windows((30, 2.0))})


def test_processes_that_share_a_database_share_its_limits(tmp_path):
    database = adce.open_database(tmp_path / "adce.db")
    with database.transaction() as sql:
        adce.declare_limits(sql, configuration(shared_rates()), adce.Clock())
    with Upstream(limits=[(20, 1.0), (30, 2.0)], latency_seconds=(0.0, 0.03)) as upstream:
        upstream.answer("/x", Answer(b"ok"))
        context = multiprocessing.get_context("spawn")
        arguments = (str(tmp_path / "adce.db"), upstream.address, 4.0)
        processes = [context.Process(target=ask_in_a_process, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert upstream.violations == 0
        assert upstream.count() >= 45


def test_shipped_limits_are_those_of_the_windows_table(tmp_path):
    shipped = adce.load_configuration(ROOT / "adce.yaml")
    with adce.memory_database().transaction() as sql:
        adce.declare_limits(sql, shipped, ManualClock())
        rows = sql.execute("select window_seconds, max_requests from windows where scope = 'espn'").fetchall()
    assert sorted(map(tuple, rows)) == [(60.0, 60), (3600.0, 3000)]
    assert isinstance(rows[0], sqlite3.Row)
