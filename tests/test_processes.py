"""The program itself: real signals, kill -9, a second runner, a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, run_adce, start_adce
from lakes import write_league
from upstream import Answer, League, Upstream

NOWHERE = "http://127.0.0.1:9"


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def rows(folder: Path, sql: str) -> list[tuple]:
    connection = sqlite3.connect(f"file:{folder / 'adce.db'}?mode=ro", uri=True)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def end(process: subprocess.Popen[str], seconds: float = 20) -> tuple[str, str]:
    out, err = process.communicate(timeout=seconds)
    return out, err


@pytest.fixture
def league(upstream, tmp_path) -> League:
    league = League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3)
    league.serve(upstream)
    write_league(tmp_path, upstream.address)
    return league


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_attempts_finish_and_ends_with_0(number, upstream, league, tmp_path):
    upstream.answer("/scoreboard?dates=20250106", league.scoreboard("20250106"))
    upstream.latency_seconds = (0.4, 0.5)
    process = start_adce("run", folder=tmp_path)
    wait_until(lambda: upstream.count() >= 3)
    process.send_signal(number)
    _, err = end(process)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert rows(tmp_path, "select count(*) from tasks where state = 'running'") == [(0,)]
    assert rows(tmp_path, "select count(*) from attempts where outcome != 'ok'") == [(0,)]
    assert rows(tmp_path, "select note from runner") == [(number.name,)]


def test_attempt_that_outlasts_the_grace_time_goes_back_to_the_queue(upstream, league, tmp_path):
    write_league(tmp_path, upstream.address, grace=0.3)
    upstream.answer("/scoreboard?dates=20250103", Answer(behaviour="hang"))
    process = start_adce("run", folder=tmp_path)
    wait_until(lambda: upstream.count("/scoreboard?dates=20250103"))
    started = time.monotonic()
    process.terminate()
    end(process)
    assert process.returncode == 0
    assert time.monotonic() - started < 4
    lost = "select t.failures, t.state, a.outcome from tasks t join attempts a using (task_id) where a.outcome = 'lost'"
    assert rows(tmp_path, lost) == [(0, "pending", "lost")]


def test_second_signal_ends_it_at_once_and_the_next_start_requeues(upstream, league, tmp_path):
    write_league(tmp_path, upstream.address, grace=30)
    upstream.answer("/scoreboard?dates=20250103", Answer(behaviour="hang"), league.scoreboard("20250103"))
    process = start_adce("run", folder=tmp_path)
    wait_until(lambda: upstream.count("/scoreboard?dates=20250103"))
    process.send_signal(signal.SIGINT)
    wait_until(lambda: process.poll() is not None or b"stopping" in os.read(process.stderr.fileno(), 65536))
    process.send_signal(signal.SIGINT)
    process.wait(5)
    process.stdout.close()
    process.stderr.close()
    assert process.returncode == 130
    done = run_adce("run", "--once", folder=tmp_path)
    assert (done.returncode, rows(tmp_path, "select count(*) from gaps")) == (0, [(0,)])


def test_second_runner_is_refused_with_the_process_of_the_first(upstream, league, tmp_path):
    upstream.latency_seconds = (0.2, 0.3)
    first = start_adce("run", folder=tmp_path)
    wait_until(upstream.count)
    second = run_adce("run", folder=tmp_path)
    assert second.returncode == 11
    assert f"process {first.pid}" in second.stderr
    assert run_adce("status", folder=tmp_path).returncode == 0
    first.kill()
    end(first)
    assert run_adce("run", "--once", folder=tmp_path).returncode == 0


def kill_rounds(folder: Path, count: int, seed: int) -> None:
    """Start and kill the runner at random moments while a faulty upstream answers; then let one run finish."""
    dice = random.Random(seed)
    with Upstream(latency_seconds=(0.0, 0.1), fault_share=0.2, seed=seed) as faulty:
        league = League(date(2025, 1, 1), 28, games_per_day=(1, 3), seed=seed)
        league.serve(faulty)
        write_league(folder, faulty.address, last=28, attempts=1000, delay=0.2, limits=LIMITS)
        for _ in range(count):
            process = start_adce("run", folder=folder)
            time.sleep(dice.uniform(0.25, 0.9))
            process.kill()
            end(process)
        faulty.fault_share = 0.0
        done = run_adce("run", "--once", folder=folder)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        objects = {
            path.relative_to(folder / "lake").as_posix(): path.read_bytes()
            for path in (folder / "lake").rglob("*.json")
        }
        wanted = {f"games/{game}.json": league.summary(game).body for game in league.ids}
        wanted |= {f"days/{day:%Y%m%d}.json": league.scoreboard(f"{day:%Y%m%d}").body for day in league.games}
        assert objects == wanted
    assert rows(folder, "pragma integrity_check") == [("ok",)]
    assert rows(folder, "select distinct state from tasks") == [("done",)]
    assert rows(folder, "select count(*), sum(outcome = 'running') from attempts")[0][1] == 0


LIMITS = "rate_limiting: {source_limits: {league: {requests_per_second: 40}}}"


def test_killed_at_any_moment_nothing_is_lost(tmp_path):
    kill_rounds(tmp_path, count=6, seed=1)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_fifty_times_nothing_is_lost(seed, tmp_path):
    kill_rounds(tmp_path, count=50, seed=seed)


def test_unreachable_source_is_told_paused_and_left_with_its_tasks(tmp_path):
    write_league(tmp_path, NOWHERE)
    process = start_adce("run", folder=tmp_path)
    wait_until(lambda: is_paused(tmp_path))
    before = os.times().children_user + os.times().children_system
    time.sleep(3)  # what is measured is how little it does in these seconds
    ticks = (Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]).split()
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = end(process)
    assert (process.returncode, time.monotonic() - started < 2) == (0, True)
    assert "paused source=league" in err
    assert "127.0.0.1 cannot be reached: Connection refused" in err
    assert rows(tmp_path, "select count(*), max(failures) from tasks where state in ('pending', 'retry')") == [(6, 1)]
    assert (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK") < 1.5  # seconds, the start included
    assert before >= 0
    assert run_adce("run", "--once", folder=tmp_path).returncode == 3


def is_paused(folder: Path) -> bool:
    try:
        return bool(rows(folder, "select 1 from scopes where reason is not null"))
    except sqlite3.OperationalError:  # the schema is not there yet
        return False


def test_views_answer_in_the_sqlite3_program_while_it_runs(upstream, league, tmp_path):
    program = shutil.which("sqlite3")
    if program is None:
        pytest.skip("the sqlite3 program is not installed")
    upstream.latency_seconds = (0.2, 0.3)
    process = start_adce("run", folder=tmp_path)
    wait_until(lambda: upstream.count() > 2)
    for view in ("queue", "gaps", "coverage", "rates", "recent_attempts", "stats", "cycles"):
        words = [program, "-readonly", "-header", "adce.db", f"select * from {view}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), view
    process.terminate()
    end(process)


def test_quiet_run_prints_nothing_when_all_is_well(upstream, league, tmp_path):
    done = run_adce("run", "--once", "-q", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_quiet_run_still_tells_what_gave_up(upstream, league, tmp_path):
    write_league(tmp_path, upstream.address, attempts=1)
    upstream.answer("/scoreboard?dates=20250101", Answer(b"trouble", 500))
    done = run_adce("-q", "run", "--once", folder=tmp_path)
    assert done.returncode == 3
    assert re.fullmatch(r"\S+ ERROR gave_up dataset=days key=days/20250101.json .*\n", done.stderr)


def test_run_ends_after_so_many_minutes(upstream, league, tmp_path):
    done = run_adce("run", "--max-minutes", "0.02", "--interval-hours", "1", folder=tmp_path)
    assert done.returncode == 0
    assert 'reason="its time was up"' in done.stderr


def test_closed_standard_error_stops_nothing(upstream, league, tmp_path):
    words = f"{sys.executable} {ROOT / 'adce.py'} run --once 2>&-"
    assert subprocess.run(words, shell=True, cwd=tmp_path, check=False).returncode == 0
    assert rows(tmp_path, "select count(*) from gaps") == [(0,)]


def test_terminal_shows_the_live_screen_and_a_pipe_none_of_it(upstream, league, tmp_path):
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    words = [sys.executable, str(ROOT / "adce.py"), "run", "--once"]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside, env={**os.environ, "TERM": "xterm"}
    )
    os.close(inside)
    shown = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # the last process has closed the other side
            break
        if not block:
            break
        shown += block
    os.close(terminal)
    assert process.wait() == 0
    assert b"\x1b[" in shown
    assert b"Ctrl-C stops cleanly" in shown
    assert b"100" in shown
    again = run_adce("run", "--once", folder=tmp_path)
    assert "\x1b" not in again.stdout + again.stderr
