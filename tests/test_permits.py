"""The limits for other threads and processes: exact, fair, and free again whoever dies."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, ManualClock, run_adce, start_adce
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lakes import write_league
from test_limits import configuration, limiting, windows
from upstream import Answer, League, Upstream

import adce

LIMITS = "{requests_per_second: 40, requests_per_minute: 900}"


def shop_text(address: str, limits: str = LIMITS, **source: object) -> str:
    described = json.dumps({"base_url": address, "timeout_seconds": 2, **source})
    return f"sources: {{shop: {described}}}\nrate_limiting: {{source_limits: {{shop: {limits}}}}}\ndatasets: {{}}\n"


@pytest.fixture
def limiter(tmp_path):
    """A limiter for one a minute on a real file, whose time is moved by hand."""
    clock = ManualClock()
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        yield adce.Limiter(configuration(limiting(espn=windows((1, 60)))), database, clock)


def lift_limits(limiter: adce.Limiter) -> None:
    limiter.configuration = configuration(adce.RateLimiting())
    with limiter.database.transaction() as sql:
        adce.declare_limits(sql, limiter.configuration, limiter.clock)


# --------------------------------------------------------------- one limiter


def test_permit_counts_until_its_block_ends_however_it_ends(limiter):
    in_flight = "select in_flight from rates where scope = 'espn'"
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        try:
            with limiter.permit("espn"):
                assert limiter.database.value(in_flight) == 1
                raise error  # noqa: TRY301
        except error:
            assert limiter.database.value(in_flight) == 0


def test_wait_is_as_long_as_computed(limiter):
    with limiter.permit("espn"):
        start = limiter.clock.boot()
    with limiter.permit("espn"):
        assert limiter.clock.boot() == pytest.approx(start + 60)
    assert limiter.database.value("select count(*) from waiters") == 0


def test_whoever_would_wait_for_too_long_is_told_so_at_once(limiter):
    with limiter.permit("espn"):
        pass
    start = limiter.clock.boot()
    for wait in (0, 59):
        with (
            pytest.raises(adce.RateLimitedError, match="another 1 min: espn: 1 in 60 s used up"),
            limiter.permit("espn", wait),
        ):
            pass
    assert limiter.clock.boot() == start
    with limiter.permit("espn", 60):
        pass


def test_unknown_source_is_told_with_the_likely_one(limiter):
    with pytest.raises(adce.Error, match='source "espm" is not defined, did you mean "espn"'), limiter.permit("espm"):
        pass


def until(holds, seconds: float = 60) -> None:
    """Wait for what other threads or processes must bring about."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_permit_of_a_process_that_was_suspended_is_not_used(limiter):
    """Between the grant and the return more time passes than a permit may wait for its request."""
    grants: list[adce.Permit] = []
    take = adce.grant

    def slow_grant(*arguments) -> adce.Permit:
        grants.append(take(*arguments))
        if len(grants) == 1:
            limiter.clock.advance(adce.SEND_WITHIN_SECONDS + 1)
        return grants[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adce, "grant", slow_grant)
        held = limiter.acquire("espn")
    assert held.permit == grants[1]
    assert held.permit.send_before > limiter.clock.boot()


@pytest.mark.parametrize(
    ("status", "headers", "times", "paused"),
    [
        (200, {}, 1, 0),
        (404, {}, 1, 0),
        (429, {"Retry-After": "30"}, 1, 30),
        (429, {"Retry-After": "0"}, 1, 60),
        (503, {}, 1, 60),
        (403, {}, 1, 0),
        (403, {}, 2, 900),
    ],
)
def test_answer_that_asks_for_a_pause_makes_everybody_wait(limiter, status, headers, times, paused):
    lift_limits(limiter)
    blocked = adce.BlockedWhen(status=(403,), timeouts_in_a_row=3, pause_seconds=900)
    limiter.configuration.sources["espn"] = adce.Source("espn", blocked_when=blocked)
    for _ in range(times):
        with limiter.permit("espn") as held:
            held.answered(status, headers)
    start = limiter.clock.boot()
    with limiter.permit("espn"):
        assert limiter.clock.boot() == pytest.approx(start + paused)


# --------------------------------------------------------------- the line


class Crowd:
    """Many who ask one limiter, each at the instants that it was told, in time that is moved by hand."""

    def __init__(self, rates: adce.RateLimiting) -> None:
        self.clock, self.rates = ManualClock(), rates
        self.database = adce.memory_database()
        with self.database.transaction() as sql:
            adce.declare_limits(sql, configuration(rates), self.clock)
        self.events: list[tuple[float, str, str, adce.Permit | None]] = []
        self.served: list[tuple[str, str, float]] = []
        self.looks = 0

    def arrive(self, owner: str, source: str, at: float) -> None:
        self.events.append((self.clock.boot() + at, owner, source, None))

    def run(self, latency: float, dies: str = "") -> None:
        """Until everybody was served, or died in the line."""
        while self.events:
            event = min(self.events, key=lambda one: one[0])
            self.events.remove(event)
            at, owner, source, permit = event
            self.clock.seconds = max(self.clock.seconds, at)
            with self.database.transaction() as sql:
                if permit:
                    adce.release(sql, permit, self.clock.boot())
                    continue
                self._look(sql, owner, source, latency, dies)

    def _look(self, sql, owner: str, source: str, latency: float, dies: str) -> None:
        now = self.clock.boot()
        self.looks += 1
        opens = adce.opening(sql, self.rates, source, now, owner)
        if opens.at <= now:
            permit = adce.grant(sql, source, 30, now, owner)
            self.served.append((source, owner, now))
            self.events.append((now + latency, owner, source, permit))
            return
        looks_at = min(opens.at, now + adce.LOOK_AGAIN_SECONDS)
        adce.update_waiters(sql, owner, {source: opens}, now, adce.LOOK_AGAIN_SECONDS)
        if owner != dies:
            self.events.append((looks_at, owner, source, None))


arrivals = st.lists(st.tuples(st.sampled_from(["espn", "nba"]), st.floats(0, 20)), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@example((2, 1.0), (4, 15.0), None, None, 0.0, [("espn", 0.0), *[("nba", 0.0)] * 3, ("nba", 1.0)])
@given(
    st.tuples(st.integers(1, 5), st.sampled_from([1.0, 10.0])),
    st.tuples(st.integers(1, 8), st.sampled_from([1.0, 15.0])),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, adce.Backoff(), adce.Backoff(strict=True)]),
    st.floats(0, 5),
    arrivals,
)
def test_everybody_is_served_in_the_order_of_arrival_at_each_source(window, everyone, burst, backoff, latency, comers):
    scope = windows(window, burst_size=burst, refill_per_second=window[0] / window[1])
    crowd = Crowd(limiting(backoff, espn=scope, nba=scope, **{"global": windows(everyone)}))
    for number, (source, at) in enumerate(sorted(comers, key=lambda one: one[1])):
        crowd.arrive(f"{number:03}", source, at)
    crowd.run(latency)
    for source in ("espn", "nba"):
        served = sorted((owner, at) for asked, owner, at in crowd.served if asked == source)
        assert [at for _, at in served] == sorted(at for _, at in served)
    assert len(crowd.served) == len(comers)


def test_a_line_of_a_hundred_is_no_herd():
    """One look for a grant, one for each place further on that has freed meanwhile, one now and then."""
    crowd = Crowd(limiting(espn=windows((10, 1.0))))
    for number in range(100):
        crowd.arrive(f"{number:03}", "espn", 0)
    crowd.run(0.1)
    assert len(crowd.served) == 100
    assert crowd.looks <= 400


def test_whoever_dies_in_the_line_holds_the_others_up_for_seconds_only():
    crowd = Crowd(limiting(espn=windows((1, 10))))
    for number in range(3):
        crowd.arrive(f"{number:03}", "espn", number)
    start = crowd.clock.boot()
    crowd.run(0, dies="001")
    assert [owner for _, owner, _ in crowd.served] == ["000", "002"]
    assert crowd.clock.boot() - start <= 10 + adce.LOOK_AGAIN_SECONDS + adce.LATE_SECONDS


def test_source_that_waits_for_itself_holds_no_place_of_another():
    """espn has used up its own minute; nba may have all of the global one meanwhile."""
    crowd = Crowd(limiting(espn=windows((1, 60)), **{"global": windows((5, 10))}))
    for number in range(4):
        crowd.arrive(f"espn {number}", "espn", 0)
    for number in range(8):
        crowd.arrive(f"nba {number}", "nba", 1)
    crowd.run(0)
    assert [source for source, _, _ in crowd.served[:9]] == ["espn"] + ["nba"] * 8


def test_runner_stands_in_line_like_anybody_else_and_only_for_what_it_waits_for(limiter):
    held = limiter.acquire("espn")
    opens = adce.Opening(limiter.clock.boot() + 60, "used up", "espn")
    with limiter.database.transaction() as sql:
        assert adce.update_waiters(sql, adce.RUNNER, {"espn": opens}, limiter.clock.boot(), 60)
    limiter.release(held)
    limiter.clock.advance(60)
    with limiter.database.transaction() as sql:
        now, rates = limiter.clock.boot(), limiter.configuration.rate_limiting
        assert adce.opening(sql, rates, "espn", now, adce.RUNNER).at == now
        assert adce.opening(sql, rates, "espn", now).at > now  # the runner comes first
        assert not adce.update_waiters(sql, adce.RUNNER, {}, now)
    with limiter.permit("espn", 0):
        pass


# --------------------------------------------------------------- many processes


def start_asker(
    folder: Path, threads: int, seconds: float, source: str = "shop", **environment: str
) -> subprocess.Popen[str]:
    words = [sys.executable, str(ROOT / "tests" / "asker.py"), "adce.yaml", source, str(threads), str(seconds)]
    return subprocess.Popen(words, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


@pytest.mark.battery
def test_contention_is_fair_between_threads_and_processes(tmp_path):
    with Upstream(limits=[(40, 1.0), (900, 60.0)], latency_seconds=(0.0, 0.05)) as upstream:
        upstream.answer("/x", Answer(b"ok"))
        (tmp_path / "adce.yaml").write_text(shop_text(upstream.address))
        askers = [start_asker(tmp_path, threads, 10) for threads in (1, 3, 8)]
        served = [count for asker in askers for count in json.loads(asker.communicate(timeout=60)[0])]
        assert upstream.violations == 0
    assert max(served) <= 3 * min(served)
    assert sum(served) >= 0.9 * 40 * 9


def kill_and_restart(folder: Path, rounds: int, seconds: float, processes: int, threads: int) -> None:
    """Each so many seconds one of the processes is killed, another takes its place; at last they go on alone."""
    askers = [start_asker(folder, threads, 600) for _ in range(processes)]
    try:
        for number in range(rounds):
            time.sleep(seconds)
            victim = askers[number % processes]
            victim.kill()
            victim.communicate()
            askers[number % processes] = start_asker(folder, threads, 600)
        time.sleep(adce.SEND_WITHIN_SECONDS + 2 + adce.RELEASE_WITHIN_SECONDS + 6)
    finally:
        for asker in askers:
            asker.kill()
            asker.communicate()


@pytest.mark.parametrize(
    ("rounds", "seconds", "threads"),
    [
        pytest.param(2, 2, 4, id="short", marks=pytest.mark.battery),
        pytest.param(24, 5, 8, id="long", marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(300)
def test_killed_processes_break_no_limit_and_lose_no_permit_for_ever(tmp_path, rounds, seconds, threads):
    limits = "{requests_per_second: 30, requests_per_minute: 1800}"
    with Upstream(limits=[(30, 1.0), (1800, 60.0)], latency_seconds=(0.0, 0.05)) as upstream:
        upstream.answer("/x", Answer(b"ok"))
        (tmp_path / "adce.yaml").write_text(shop_text(upstream.address, limits))
        kill_and_restart(tmp_path, rounds, seconds, processes=4, threads=threads)
        end = upstream.arrivals[-1].at
        last = [arrival.at for arrival in upstream.arrivals if arrival.at > end - 4]
        assert upstream.violations == 0
    assert len(last) >= 0.9 * 4 * 30
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        boot = adce.Clock().boot()
        assert database.value("select count(*) from requests where deadline < ?", [boot]) == 0
        assert database.check() == []


def test_runner_and_other_programs_share_one_limit_and_both_get_on(tmp_path):
    limits = "rate_limiting: {source_limits: {league: {requests_per_second: 15}}}"
    with Upstream(limits=[(15, 1.0)], latency_seconds=(0.0, 0.03)) as upstream:
        league = League(date(2025, 1, 1), 6, games_per_day=(4, 6), seed=3)
        league.serve(upstream)
        upstream.answer("/x", Answer(b"ok"))
        write_league(tmp_path, upstream.address, limits=limits)
        asker = start_asker(tmp_path, 3, 600, source="league")
        until(lambda: upstream.count("/x") > 20)
        done = run_adce("run", "--once", folder=tmp_path)
        asker.kill()
        asker.communicate()
        assert upstream.violations == 0
        assert done.returncode == 0, done.stderr
        asked = [arrival.path for arrival in upstream.arrivals]
    mine = [path != "/x" for path in asked]
    between = mine[mine.index(True) : len(mine) - mine[::-1].index(True)]
    assert sum(between) == 6 + len(league.ids)
    assert sum(between) / len(between) >= 1 / (3 + 1) / 3  # a fair share is one in four
    assert sum(between) / len(between) <= 3 / (3 + 1)


def faketime_library() -> str:
    found = find_spec("libfaketime")
    assert found and found.origin
    return str(next(Path(found.origin).parent.rglob("libfaketime.so.1")))


@pytest.mark.battery
def test_steps_of_the_wall_clock_grant_nothing_and_stall_nothing(tmp_path):
    """One process lives with a clock that jumps an hour forth, two back, one forth; the other with a true one."""
    steps, limits = tmp_path / "faketime", "{requests_per_second: 20, requests_per_minute: 900}"
    steps.write_text("+0")
    fake = {
        "LD_PRELOAD": faketime_library(),
        "FAKETIME_TIMESTAMP_FILE": str(steps),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # nor the boot time: a step of the wall clock moves neither
    }
    with Upstream(limits=[(20, 1.0)], latency_seconds=(0.0, 0.02)) as upstream:
        upstream.answer("/x", Answer(b"ok"))
        (tmp_path / "adce.yaml").write_text(shop_text(upstream.address, limits))
        askers = [start_asker(tmp_path, 2, 9, **fake), start_asker(tmp_path, 2, 9)]
        for step in ("+3600", "-3600", "+0"):
            time.sleep(2)
            steps.write_text(step)
        served = [json.loads(asker.communicate(timeout=60)[0]) for asker in askers]
        times = [arrival.at for arrival in upstream.arrivals]
        assert upstream.violations == 0
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 2
    assert min(map(sum, served)) >= 0.2 * 20 * 6


# --------------------------------------------------------------- python adce.py acquire


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "adce.yaml").write_text(shop_text("http://127.0.0.1:1", "{requests_per_minute: 1}"))
    return tmp_path


def in_flight(folder: Path) -> int | None:
    with contextlib.closing(adce.open_database(folder / "adce.db")) as database:
        return database.value("select in_flight from rates where scope = 'shop'")


def test_acquire_runs_a_command_with_its_words_untouched_and_ends_as_it_ends(shop):
    done = run_adce("acquire", "shop", "-q", "--", "sh", "-c", 'echo "$0" "$@"; exit 7', "-v", "--", "-c", folder=shop)
    assert (done.returncode, done.stdout, done.stderr) == (7, "-v -- -c\n", "")
    assert in_flight(shop) == 0
    again = run_adce("acquire", "shop", "--wait", "5s", "--", "true", folder=shop)
    assert again.returncode == 1
    assert "adce.py: shop cannot be asked for another" in again.stderr


def test_acquire_counts_a_request_while_its_command_runs_and_passes_signals_on(shop):
    process = start_adce(
        "acquire", "shop", "--", "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done", folder=shop
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert in_flight(shop) == 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 9
    assert in_flight(shop) == 0


def test_acquire_tells_the_signal_that_ended_its_command(shop):
    assert run_adce("acquire", "shop", "--", "sh", "-c", "kill -KILL $$", folder=shop).returncode == 128 + 9


def test_acquire_without_a_command_counts_until_the_deadline(shop):
    done = run_adce("acquire", "shop", folder=shop)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "shop: one request is permitted within 10 s\n"
    assert in_flight(shop) == 1


def test_command_that_cannot_start_has_asked_nothing(shop):
    done = run_adce("acquire", "shop", "--", "no-such-program", folder=shop)
    assert (done.returncode, done.stderr) == (1, "adce.py: cannot start no-such-program: No such file or directory\n")
    assert run_adce("acquire", "shop", "--wait", "1s", "--", "true", folder=shop).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["acquire", "shpo", "--", "true"], 1, 'source "shpo" is not defined, did you mean "shop"?'),
        (["acquire", "shop", "--wait", "soon"], 2, "write 90s, 15m, 6h or 1d"),
        (["report", "--", "true"], 2, "only acquire runs another program"),
        (["acquire"], 2, "required: SOURCE"),
        (["acquire", "shop", "more", "--", "true"], 2, "unrecognized arguments: more"),
        (["acquire", "shop", "--wait", "9" * 400 + "s"], 2, "write 90s, 15m, 6h or 1d"),
    ],
)
def test_wrong_words_are_told(shop, words, code, message):
    done = run_adce(*words, folder=shop)
    assert done.returncode == code
    assert message in done.stderr


def test_waiting_is_seen_in_rates_with_its_instant_and_its_reason(shop):
    assert run_adce("acquire", "shop", "--", "true", folder=shop).returncode == 0
    process = start_adce("acquire", "shop", "--", "true", folder=shop)
    try:
        rates: list[dict] = []

        def waits() -> bool:
            rates[:] = json.loads(run_adce("report", "--format", "json", folder=shop).stdout)["rates"]
            return rates[0]["waiting"] == 1

        until(waits)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == adce.ExitCode.INTERRUPTED
    shown = Counter(row["scope"] for row in rates)
    assert shown == {"shop": 1, "global": 1}
    assert (rates[0]["used"], rates[0]["max_requests"], rates[0]["in_flight"]) == (1, 1, 0)
    assert rates[0]["why"] == "shop: 1 in 60 s used up"
    assert rates[0]["free_at"] > str(adce.utc_text(time.time()))
    until(lambda: json.loads(run_adce("status", "--format", "json", folder=shop).stdout)["sources"][0]["waiting"] == 0)


# --------------------------------------------------------------- what interrupts and forks leave behind


def test_interrupt_while_a_lock_is_awaited_leaves_no_transaction_open(limiter):
    """Ctrl-C comes while another program holds the database."""
    path = limiter.database.path
    holding = f"""
import sqlite3, sys
held = sqlite3.connect({path!r}, isolation_level=None)
held.execute("begin immediate"); print("held", flush=True); sys.stdin.read(); held.execute("rollback")
"""

    def interrupt(*_: object) -> None:
        assert other.stdin
        other.stdin.close()  # the other program gives way, after the interrupt
        raise KeyboardInterrupt

    with subprocess.Popen([sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                limiter.acquire("espn")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert not limiter.database._writer.in_transaction
    with limiter.permit("espn"):
        pass


def test_forked_process_gets_an_error_and_no_permit(tmp_path):
    (tmp_path / "adce.yaml").write_text(shop_text("http://127.0.0.1:1"))
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import adce
with adce.permit("shop"): pass
if os.fork() == 0:
    try:
        adce.permit("shop").__enter__()
    except adce.DatabaseError as error:
        print(error, error.hint, flush=True)
    os._exit(0)
os.wait()
with adce.permit("shop"): pass
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "was opened before this process was forked" in done.stdout
    assert "spawn" in done.stdout


def test_database_that_was_replaced_is_told(limiter):
    Path(limiter.database.path).rename(f"{limiter.database.path}.old")
    with pytest.raises(adce.NoDatabaseError, match="moved, replaced or deleted"):
        limiter.acquire("espn")


def test_good_end_of_a_block_is_a_good_answer(limiter):
    lift_limits(limiter)
    with limiter.permit("espn") as held:
        held.answered(429, {"Retry-After": "1"})
    with limiter.permit("espn"):
        pass
    assert limiter.database.value("select throttles from scopes where scope = 'espn'") == 0
