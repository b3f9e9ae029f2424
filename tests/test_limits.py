"""What may be asked, and when: never one request too many."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import multiprocessing
import re
import sqlite3
import time
from collections.abc import Iterable
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


def configuration(rates: adce.RateLimiting, names: Iterable[str] = SOURCES) -> adce.Configuration:
    sources = {name: adce.Source(name) for name in names}
    return adce.Configuration(Path("adce.yaml"), Path("adce.db"), "lake", rate_limiting=rates, sources=sources)


class Desk:
    """A limiter on a database in memory, whose time is moved by hand."""

    def __init__(self, rates: adce.RateLimiting, *sources: str) -> None:
        self.clock, self.rates = ManualClock(), rates
        self.sources = sources or SOURCES
        self.database = adce.memory_database()
        self.declare()

    def declare(self) -> None:
        with self.database.transaction() as sql:
            adce.declare_limits(sql, configuration(self.rates, self.sources), self.clock)

    def opening(self, source: str = "espn") -> adce.Opening:
        with self.database.transaction() as sql:
            return adce.opening(sql, self.rates, source, self.clock.boot())

    def ask(self, source: str = "espn", timeout: float = 20) -> adce.Permit | None:
        """A permit, if the source can be asked now."""
        with self.database.transaction() as sql:
            now = self.clock.boot()
            if adce.opening(sql, self.rates, source, now).at > now:
                return None
            return adce.grant(sql, source, timeout, now)

    def deadline(self) -> float:
        """When the only request in flight counts as finished."""
        return self.database.value("select deadline from requests")

    def release(self, permit: adce.Permit, *, used: bool = True) -> None:
        with self.database.transaction() as sql:
            adce.release(sql, permit, self.clock.boot(), used=used)

    def ask_and_release(self, source: str = "espn") -> bool:
        permit = self.ask(source)
        if permit:
            self.release(permit)
        return permit is not None

    def respond(
        self, outcome: adce.Outcome, retry_after: float | None = None, status: int | None = None, **source
    ) -> float | None:
        """The seconds of the pause that this response causes."""
        with self.database.transaction() as sql:
            described = adce.Source("espn", **source)
            answer = adce.Result(outcome, "told so", status, retry_after=retry_after)
            return adce.record_response(sql, described, answer, self.clock.boot()).pause_seconds


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


def test_bucket_that_is_declared_later_starts_without_debt():
    desk = Desk(limiting())
    for _ in range(500):
        assert desk.ask_and_release()
        desk.clock.advance(0.1)
    desk.rates = limiting(espn=windows((600, 60), burst_size=3, refill_per_second=10))
    desk.declare()
    desk.clock.advance(0.1)
    assert desk.ask()


def test_request_may_take_until_its_deadline_and_counts_as_long():
    desk = Desk(limiting(espn=windows((1, 1))))
    permit = desk.ask(timeout=20)
    assert permit and desk.deadline() >= permit.send_before + 20
    for before in (20, 5, 0):
        desk.clock.seconds = desk.deadline() - before
        assert not desk.ask()


def test_dead_owner_counts_until_its_deadline_and_a_window_after_it():
    desk = Desk(limiting(espn=windows((1, 60))))
    assert desk.ask()
    desk.clock.seconds = desk.deadline() + 1
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


def test_history_counts_again_after_limits_were_switched_off():
    desk = Desk(limiting(espn=windows((3, 60))))
    assert all(desk.ask_and_release() for _ in range(3))
    for rates in (adce.RateLimiting(enabled=False), limiting(espn=windows((5, 60)))):
        desk.rates = rates
        desk.declare()
        assert desk.ask_and_release()
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


def test_boot_without_a_name_is_noticed_when_its_time_has_gone_back():
    desk = Desk(limiting(espn=windows((2, 60))))
    assert desk.ask_and_release()
    assert desk.ask()
    desk.clock.reboot(name=desk.clock.boot_id(), uptime=5)
    desk.declare()
    assert desk.opening().at == 60


def test_boot_without_a_name_that_is_not_noticed_grants_nothing_too_early():
    """The machine has been up for longer than before its reboot: the old request ends in the new time, so later."""
    desk = Desk(limiting(espn=windows((1, 60))))
    assert desk.ask_and_release()
    finished_at = desk.clock.boot()
    desk.clock.reboot(name=desk.clock.boot_id(), uptime=finished_at + 10)
    desk.declare()
    assert desk.opening().at == finished_at + 60


def test_pause_survives_a_boot_without_a_name():
    desk = Desk(limiting(espn=windows((1, 60))))
    desk.respond(adce.Outcome.THROTTLED, retry_after=3000)
    desk.clock.reboot(name=desk.clock.boot_id(), uptime=20)
    desk.declare()
    assert 2900 <= desk.opening().at <= 3000


@pytest.mark.parametrize("step", [-36000, -1, 1, 36000])
def test_clock_that_is_set_forgets_nothing_of_a_boot_without_a_name(step):
    desk = Desk(limiting(espn=windows((1, 60))))
    desk.respond(adce.Outcome.THROTTLED, retry_after=3000)
    assert desk.ask_and_release("nba")
    before = desk.opening().at
    desk.clock.step_wall(step)
    desk.declare()
    assert desk.opening().at == before


def test_bucket_is_empty_when_the_machine_starts_and_fills_from_then_on():
    desk = Desk(limiting(espn=windows((60, 60), burst_size=2, refill_per_second=1)))
    assert desk.ask_and_release()
    desk.clock.reboot(uptime=0.25)
    desk.declare()
    assert desk.opening().at == pytest.approx(1)
    desk.clock.seconds = 2
    assert [desk.ask_and_release() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(("step", "left"), [(0, 60), (-36000, 100), (36000, 0)])
def test_pause_survives_a_reboot_but_grows_no_longer_whatever_the_wall_clock_says(step, left):
    desk = Desk(limiting())
    desk.respond(adce.Outcome.THROTTLED, retry_after=100)
    desk.clock.advance(40)
    desk.clock.reboot(uptime=0)
    desk.clock.step_wall(step)
    desk.declare()
    assert desk.opening().at == pytest.approx(left)


def test_pauses_are_merged_to_the_longest():
    desk = Desk(limiting())
    start = desk.clock.boot()
    for seconds in (100, 30, 300, 10):
        desk.respond(adce.Outcome.THROTTLED, retry_after=seconds)
    assert desk.opening() == adce.Opening(start + 300, "told so", "espn", is_pause=True)


@pytest.mark.parametrize(("asked", "paused"), [(0, 0), (30, 30), (10 * 365 * 86400, 86400)])
def test_retry_after_is_obeyed_for_a_day_at_most(asked, paused):
    pause = Desk(limiting()).respond(adce.Outcome.THROTTLED, retry_after=asked)
    assert pause == paused


def test_pause_without_retry_after_doubles_until_a_good_answer():
    desk, lengths = Desk(limiting()), []
    for outcome in [adce.Outcome.THROTTLED] * 3 + [adce.Outcome.OK, adce.Outcome.THROTTLED]:
        lengths.append(desk.respond(outcome))
        desk.clock.advance(10_000)
    assert lengths == [60, 120, 240, None, 60]


def test_answers_to_requests_from_before_a_pause_do_not_lengthen_it():
    desk = Desk(limiting())
    pauses = [desk.respond(adce.Outcome.UNREACHABLE) for _ in range(4)]
    assert [bool(pause) for pause in pauses] == [False, True, False, False]


def test_good_answer_to_a_request_from_before_a_pause_does_not_say_that_the_source_is_back():
    desk, lengths = Desk(limiting()), []
    for _ in range(3):
        lengths.append(desk.respond(adce.Outcome.THROTTLED))
        desk.respond(adce.Outcome.OK)
        desk.clock.advance(1000)
    assert lengths == [60, 120, 240]


def test_five_workers_that_are_told_to_wait_at_once_make_one_pause():
    desk = Desk(limiting())
    for _ in range(5):
        desk.respond(adce.Outcome.THROTTLED, retry_after=5)
    desk.clock.advance(6)
    assert desk.respond(adce.Outcome.THROTTLED) == 120


@pytest.mark.parametrize(
    ("outcome", "times"),
    [
        (adce.Outcome.UNREACHABLE, 2),
        (adce.Outcome.BROKEN, 5),
        (adce.Outcome.TIMEOUT, 3),
        (adce.Outcome.ERROR, 10),
    ],
)
def test_so_many_failures_in_a_row_pause_a_source_and_a_good_answer_between_them_prevents_it(outcome, times):
    desk = Desk(limiting())
    for _ in range(3):
        assert [desk.respond(outcome) for _ in range(times - 1)] == [None] * (times - 1)
        desk.respond(adce.Outcome.OK)
    assert [bool(desk.respond(outcome)) for _ in range(times)] == [False] * (times - 1) + [True]


@pytest.mark.parametrize(("status", "is_away"), [(500, True), (599, True), (499, False), (404, False), (None, False)])
@pytest.mark.parametrize("times", [10, 3])
def test_so_many_server_errors_in_a_row_pause_a_source_and_no_other_status_does(status, is_away, times):
    desk, blocked = Desk(limiting()), adce.BlockedWhen(failures_in_a_row=times)
    pauses = [desk.respond(adce.Outcome.HTTP_ERROR, status=status, blocked_when=blocked) for _ in range(times)]
    assert pauses == [None] * (times - 1) + [60 if is_away else None]


@pytest.mark.parametrize("outcome", [adce.Outcome.LOST, adce.Outcome.STORE_ERROR, adce.Outcome.UNSTORABLE])
def test_what_says_nothing_of_the_source_changes_nothing_of_it(outcome):
    desk = Desk(limiting())
    desk.respond(adce.Outcome.UNREACHABLE)
    assert desk.respond(outcome) is None
    assert desk.respond(adce.Outcome.UNREACHABLE)


def test_bodies_that_end_early_pause_no_source():
    desk = Desk(limiting())
    assert [desk.respond(adce.Outcome.BROKEN, status=200) for _ in range(20)] == [None] * 20


def test_failures_in_a_row_pause_a_source_and_one_request_at_a_time_asks_whether_it_is_back():
    desk = Desk(limiting())
    pauses = [desk.respond(adce.Outcome.BROKEN) for _ in range(5)]
    assert [bool(pause) for pause in pauses] == [False, False, False, False, True]
    desk.clock.advance(60)
    probe = desk.ask()
    assert probe
    assert not desk.ask()
    desk.release(probe)
    desk.respond(adce.Outcome.OK)
    assert desk.ask()
    assert desk.ask()


def test_requests_stay_as_long_as_a_window_counts_them_and_little_longer():
    desk = Desk(limiting(espn=windows((5, 10), (1000, 7200)), nba=windows((50, 60))))
    asked = []
    for number in range(900):
        assert desk.ask_and_release(SOURCES[number % 2])
        asked.append(desk.clock.boot())
        desk.clock.advance(20)
    counted = [at for at in asked if at > asked[-1] - 7200]
    kept = [
        row[0] for row in desk.database.read("select finished_at from finished where scope = 'global' order by 1 desc")
    ]
    assert kept[: len(counted)] == counted[::-1]
    assert len(kept) <= len(counted) + 5


def test_saturated_window_is_used_up_and_never_exceeded():
    desk, granted = Desk(limiting(espn=windows((5, 10), (40, 100)))), []
    while desk.clock.boot() < 50_000 + 500:
        if desk.ask_and_release():
            granted.append(desk.clock.boot())
        desk.clock.advance(0.5)
    assert all(later - earlier >= 10 for earlier, later in zip(granted, granted[5:], strict=False))
    assert all(later - earlier >= 100 for earlier, later in zip(granted, granted[40:], strict=False))
    assert len(granted) >= 5 * 40


@pytest.mark.parametrize(("strict", "least", "most"), [(False, 0.99, 1.01), (True, 0.78, 0.92)])
@pytest.mark.parametrize("source", ["espn", "nba_api", "basketball_reference", "hoopr"])
def test_backoff_reaches_the_whole_quota_of_the_shipped_limits_unless_it_is_strict(source, strict, least, most):
    """To the letter, 1, 2, 4 ... 30 s past 80%, 10 to 20% of it is lost."""
    shipped = adce.load_configuration(ROOT / "adce.yaml")
    of_a_minute = {
        scope: dataclasses.replace(
            limits, windows=tuple(limit for limit in limits.windows if limit.seconds <= adce.MINUTE)
        )
        for scope, limits in shipped.rate_limiting.scopes.items()
    }
    assert shipped.rate_limiting.backoff
    backoff = dataclasses.replace(shipped.rate_limiting.backoff, strict=strict)
    desk, granted = Desk(adce.RateLimiting(scopes=of_a_minute, backoff=backoff), source), 0
    end = desk.clock.boot() + 2 * adce.HOUR
    while desk.clock.boot() < end:
        granted += desk.ask_and_release(source)
        desk.clock.seconds = max(desk.opening(source).at, desk.clock.seconds)
    assert least <= granted / (120 * of_a_minute[source].windows[-1].max_requests) <= most


def may_ask(asked: list[float], at: float, most: int, backoff: adce.Backoff) -> bool:
    """The rule in the simplest words, for one window of a minute and requests that finish at once."""
    used = [earlier for earlier in asked if earlier > at - 60]
    if len(used) >= most or len(used) < most * backoff.threshold_percent / 100:
        return len(used) < most
    delay = min(2.0 ** (len(used) - math.ceil(most * backoff.threshold_percent / 100)), backoff.max_delay_seconds)
    if not backoff.strict:
        delay = min(delay, (used[0] + 60 - asked[-1]) / (most - len(used) + 1))
    return not asked or at >= asked[-1] + delay


@settings(deadline=None)
@given(
    st.integers(2, 20),
    st.floats(10, 100),
    st.floats(1, 60),
    st.booleans(),
    st.lists(st.floats(0, 5), min_size=1, max_size=40),
)
def test_backoff_is_a_function_of_what_was_asked(most, percent, longest, strict, gaps):
    backoff = adce.Backoff(threshold_percent=percent, max_delay_seconds=longest, strict=strict)
    desk, asked = Desk(limiting(backoff, espn=windows((most, 60)))), []
    for gap in gaps:
        if desk.ask_and_release():
            asked.append(desk.clock.boot())
        opens = desk.opening().at
        leaves = any(abs(earlier + 60 - opens) < 1e-3 for earlier in asked)  # then the delay is another one
        assert leaves or may_ask(asked, opens + 1e-6, most, backoff)
        assert opens == desk.clock.boot() or not may_ask(asked, opens - 1e-3, most, backoff)
        desk.clock.advance(gap)


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

LONGEST_ANSWER = 29.0  # as the source's timeout is 20, and it may be sent 10 late
SPANS = [1.0, 3.0, 10.0, 60.0, 3600.0, 86400.0]
scope_values = st.builds(
    lambda pairs, burst, least: windows(
        *([(1, least)] if least else []), *pairs, burst_size=burst, refill_per_second=pairs[0][0] / pairs[0][1]
    ),
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from(SPANS)), min_size=1, max_size=4, unique_by=lambda pair: pair[1]
    ),
    st.none() | st.integers(1, 5),
    st.none() | st.sampled_from([0.5, 2.5]),  # min_delay_seconds
)
rate_values = st.builds(
    lambda espn, nba, everyone, backoff: limiting(backoff, espn=espn, nba=nba, **{"global": everyone}),
    scope_values,
    scope_values,
    scope_values,
    st.sampled_from([None, adce.Backoff(), adce.Backoff(strict=True)]),
)
steps = st.one_of(
    st.tuples(
        st.just("ask"),
        st.sampled_from(SOURCES),
        st.just(LONGEST_ANSWER) | st.floats(0, LONGEST_ANSWER),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.booleans(),
    ),
    st.tuples(st.just("advance"), st.sampled_from([0.5, 5.0, 20.0, 45.0]) | st.floats(0, 60)),
    st.tuples(st.just("until_open"), st.sampled_from(SOURCES)),
    st.tuples(st.just("step_wall"), st.sampled_from([3600.0, -3600.0])),
    st.tuples(st.just("reboot"), st.floats(0.1, 100)),
    st.tuples(st.just("change"), rate_values),
)


@dataclasses.dataclass
class Asked:
    """A request with its true times, and the limits that were in force when it was granted."""

    source: str
    arrives: float
    rates: adce.RateLimiting
    remembered: float  # no window longer than this could know all that went before


class World:
    """A limiter, its server, and true time, which no reboot resets."""

    def __init__(self, rates: adce.RateLimiting) -> None:
        self.desk, self.elapsed = Desk(rates), 0.0
        self.asked: list[Asked] = []
        self.finishes: list[tuple[float, int, adce.Permit]] = []
        self.remembered = self.longest(rates)

    @staticmethod
    def longest(rates: adce.RateLimiting) -> float:
        return max([3600.0, *(limit.seconds for limits in rates.scopes.values() for limit in limits.windows)])

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

    def until_open(self, source: str) -> None:
        self.advance(max(0.0, self.desk.opening(source).at - self.desk.clock.boot()))

    def ask(self, source: str, latency: float, where: float, dies: bool) -> None:
        permit = self.desk.ask(source)
        if permit:
            self.asked.append(Asked(source, self.elapsed + latency * where, self.desk.rates, self.remembered))
            if not dies:
                heapq.heappush(self.finishes, (self.elapsed + latency, permit.request_id, permit))

    def step_wall(self, seconds: float) -> None:
        self.desk.clock.step_wall(seconds)

    def change(self, rates: adce.RateLimiting) -> None:
        self.remembered = min(self.remembered, self.longest(rates))
        self.desk.rates = rates
        self.desk.declare()

    def reboot(self, uptime: float) -> None:
        """What was on its way has arrived or never will; the machine comes up a little later."""
        for asked in self.asked:
            asked.arrives = min(asked.arrives, self.elapsed)
        self.finishes = []
        self.desk.clock.reboot(f"boot at {self.elapsed}", uptime)
        self.elapsed += uptime
        self.desk.declare()

    def violations(self) -> list[str]:
        """Every request that was one too many at the server, by its arrival among all granted before it."""
        return [
            f"request {number} of {scope}: more than {limit}"
            for number, asked in enumerate(self.asked)
            for scope in (asked.source, "global")
            for limit in asked.rates.scopes[scope].windows
            if limit.seconds <= asked.remembered and self._is_too_many(number, scope, limit)
        ]

    def _is_too_many(self, number: int, scope: str, limit: adce.WindowLimit) -> bool:
        asked = self.asked[: number + 1]
        times = sorted(one.arrives for one in asked if scope in ("global", one.source))
        place = times.index(asked[-1].arrives)
        runs = zip(times, times[limit.max_requests :], strict=False)
        around = itertools.islice(runs, max(0, place - limit.max_requests), place + 1)
        return any(last - first < limit.seconds - 1e-6 for first, last in around)


@settings(max_examples=300, deadline=None)
@given(rate_values, st.lists(steps, max_size=60))
@example(
    limiting(espn=windows((1, 1.0)), nba=windows((1, 1.0)), **{"global": windows((1, 1.0))}),
    [("ask", "espn", 25.0, 1.0, True)],
)
def test_no_window_is_ever_exceeded_at_the_server(rates, steps):
    world = World(rates)
    for name, *values in steps:
        getattr(world, name)(*values)
    assert world.violations() == []


@settings(max_examples=100, deadline=None)
@given(rate_values, st.integers(0, 30), st.sampled_from(SOURCES))
@example(  # the delay of backoff ends 1e-11 s after the promised instant
    limiting(adce.Backoff(), espn=windows((2, 1.0)), nba=windows((1, 1.0)), **{"global": windows((1, 0.5), (5, 3.0))}),
    9,
    "espn",
)
def test_idle_limiter_grants_at_the_very_instant_it_has_promised_and_no_sooner(rates, used, source):
    desk = Desk(rates)
    for _ in range(used):
        desk.ask_and_release(source)
        desk.clock.advance(0.3)
    promised = desk.opening(source)
    if promised.at > desk.clock.boot():
        if promised.reason.endswith(" s used up"):  # a window, not a bucket or a backoff
            desk.clock.seconds = promised.at - 0.001
            assert not desk.ask(source)
        desk.clock.seconds = promised.at
    assert desk.ask(source)


def test_no_statement_scans_the_finished_requests():
    desk = Desk(limiting(adce.Backoff(), espn=windows((5, 10), (50, 100)), **{"global": windows((60, 100))}))
    statements: list[str] = []
    desk.database._writer.set_trace_callback(statements.append)
    for number in range(12):
        permit = desk.ask()
        if permit and number % 3:  # one of three is released unused, one never
            desk.release(permit, used=number % 3 == 1)
        desk.clock.advance(5)
    desk.database._writer.set_trace_callback(None)
    texts = {text for text in statements if text.split()[0] in ("select", "update", "delete", "insert")}
    plans = {row[3] for text in texts for row in desk.database.read(f"explain query plan {text}")}
    assert any(plan.startswith("SEARCH f USING PRIMARY KEY") for plan in plans)
    # the requests in flight are as many as there are workers
    assert [plan for plan in plans if re.match(r"SCAN (f|finished)\b", plan)] == []


def ask_in_a_process(database: str, address: str, seconds: float) -> None:
    """One more process that shares the limits and asks as fast as it may."""
    clock, rates = adce.Clock(), shared_rates()
    opened, end = adce.open_database(Path(database)), time.monotonic() + seconds
    with requests.Session() as session:
        while time.monotonic() < end:
            with opened.transaction() as sql:
                now = clock.boot()
                opening = adce.opening(sql, rates, "espn", now)
                permit = adce.grant(sql, "espn", 5, now) if opening.at <= now else None
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
        arguments = (str(tmp_path / "adce.db"), upstream.address, 3.0)
        processes = [context.Process(target=ask_in_a_process, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert upstream.violations == 0
        assert upstream.count() >= 20


def test_shipped_limits_are_those_of_the_windows_table(tmp_path):
    shipped = adce.load_configuration(ROOT / "adce.yaml")
    with adce.memory_database().transaction() as sql:
        adce.declare_limits(sql, shipped, ManualClock())
        rows = sql.execute("select window_seconds, max_requests from windows where scope = 'espn'").fetchall()
    assert sorted(map(tuple, rows)) == [(60.0, 60), (3600.0, 3000)]
    assert isinstance(rows[0], sqlite3.Row)
