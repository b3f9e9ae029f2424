"""The program itself: real signals, kill -9, a second runner, a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, run_adce, start_adce
from lakes import write_league, write_widely
from runners import command_line, rows, wait_until
from upstream import Answer, League, Upstream

NOWHERE = "http://127.0.0.1:9"


def end(process: subprocess.Popen[str], seconds: float = 60) -> tuple[str, str]:
    out, err = process.communicate(timeout=seconds)
    return out, err


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the program; what still runs at the end of the test is killed."""
    started = []

    def begin(*words: str, **environment: str) -> subprocess.Popen[str]:
        started.append(start_adce(*words, folder=tmp_path, **environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def league(upstream, tmp_path) -> League:
    league = League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3)
    league.serve(upstream)
    write_league(tmp_path, upstream.address)
    return league


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_attempts_finish_and_ends_with_0(number, upstream, league, tmp_path, start):
    upstream.latency_seconds = (0.4, 0.5)
    process = start("run")
    wait_until(lambda: upstream.count() >= 3)
    process.send_signal(number)
    _, err = end(process)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert rows(tmp_path, "select count(*) from queue where state = 'running'") == [(0,)]
    assert rows(tmp_path, "select count(*) from attempts where outcome != 'ok'") == [(0,)]
    assert rows(tmp_path, "select note from runner") == [(number.name,)]


def test_attempt_that_outlasts_the_grace_time_goes_back_to_the_queue(upstream, league, tmp_path, start):
    write_league(tmp_path, upstream.address, grace=0.3)
    upstream.answer("/scoreboard?dates=20250103", Answer(behaviour="hang"))
    process = start("run")
    wait_until(lambda: upstream.count("/scoreboard?dates=20250103"))
    started = time.monotonic()
    process.terminate()
    end(process)
    assert process.returncode == 0
    assert time.monotonic() - started < 30
    lost = "select failures, task, outcome from objects join attempts using (object_id) where outcome = 'lost'"
    assert rows(tmp_path, lost) == [(0, "pending", "lost")]


STUCK = """
grace_seconds: 0.2
sources: {box: {}}
datasets:
  stuck: {source: box, key: "{team}", call: "a_scraper:wait", partitions: {values: {team: [A]}}}
"""


def test_function_that_never_returns_does_not_hold_the_program(tmp_path, start):
    (tmp_path / "a_scraper.py").write_text("import threading\ndef wait(team): threading.Event().wait()\n")
    (tmp_path / "adce.yaml").write_text(STUCK)
    process = start("run", "--max-minutes", "0.01", PYTHONPATH=str(tmp_path))
    assert process.wait(20) == 0
    assert rows(tmp_path, "select task, failures, last_error from objects") == [("pending", 0, "the runner stopped")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_it_at_once_and_the_next_start_requeues(number, upstream, league, tmp_path, start):
    write_league(tmp_path, upstream.address, grace=30)
    upstream.answer("/scoreboard?dates=20250103", Answer(behaviour="hang"), league.scoreboard("20250103"))
    process = start("run")
    wait_until(lambda: upstream.count("/scoreboard?dates=20250103"))
    process.send_signal(number)
    wait_until(lambda: "stopping" in process.stderr.readline())
    process.send_signal(number)
    assert process.wait(20) == 130  # the grace time is 30 s
    assert rows(tmp_path, "select count(*) > 0 from queue where state = 'running'") == [(1,)]
    done = run_adce("run", "--once", folder=tmp_path)
    assert (done.returncode, rows(tmp_path, "select count(*) from gaps")) == (0, [(0,)])


def test_second_runner_is_refused_with_the_process_of_the_first(upstream, league, tmp_path, start):
    upstream.latency_seconds = (0.2, 0.3)
    first = start("run")
    wait_until(upstream.count)
    second = run_adce("run", folder=tmp_path)
    assert second.returncode == 11
    assert f"process {first.pid}" in second.stderr
    assert run_adce("status", folder=tmp_path).returncode == 0
    first.kill()
    first.wait()
    assert run_adce("run", "--once", folder=tmp_path).returncode == 0


def kill_rounds(folder: Path, count: int, seed: int) -> None:
    """Start and kill the runner at random moments while a faulty upstream answers; then let one run finish."""
    dice = random.Random(seed)
    with Upstream(limits=[(40, 1.0)], latency_seconds=(0.0, 0.1), fault_share=0.2, seed=seed) as faulty:
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
        assert (done.returncode, done.stdout, faulty.violations) == (0, "", 0), done.stderr
        objects = {
            path.relative_to(folder / "lake").as_posix(): path.read_bytes()
            for path in (folder / "lake").rglob("*.json")
        }
        wanted = {f"games/{game}.json": league.summary(game).body for game in league.ids}
        wanted |= {f"days/{day:%Y%m%d}.json": league.scoreboard(f"{day:%Y%m%d}").body for day in league.games}
        assert objects == wanted
    assert rows(folder, "pragma integrity_check") == [("ok",)]
    assert rows(folder, "select distinct state from objects_now") == [("present",)]
    assert rows(folder, "select count(*), sum(outcome = 'running') from attempts")[0][1] == 0


LIMITS = "rate_limiting: {source_limits: {league: {requests_per_second: 40}}}"


def test_killed_at_any_moment_nothing_is_lost(tmp_path):
    kill_rounds(tmp_path, count=6, seed=1)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_fifty_times_nothing_is_lost(seed, tmp_path):
    kill_rounds(tmp_path, count=50, seed=seed)


OTHER_SOURCE = """\
  other: {base_url: "http://no.invalid"}
datasets:
  others: {source: other, key: "others/{team}.json", url: "/{team}", partitions: {values: {team: [A, B, C]}}}
"""


@pytest.fixture
def unreachable(tmp_path, start) -> subprocess.Popen[str]:
    """A runner that has found out that neither of its sources can be reached."""
    write_league(tmp_path, NOWHERE)
    text = (tmp_path / "adce.yaml").read_text().replace("datasets:\n", OTHER_SOURCE)
    (tmp_path / "adce.yaml").write_text(text)
    process = start("run")
    wait_until(lambda: paused(tmp_path) == ["league", "other"])
    return process


def paused(folder: Path) -> list[str]:
    try:
        return [
            row[0] for row in rows(folder, "select scope from rates where blocked_until is not null order by scope")
        ]
    except sqlite3.OperationalError:  # the schema is not there yet
        return []


def test_unreachable_sources_are_told_and_paused_and_their_tasks_kept(unreachable, tmp_path):
    started = time.monotonic()
    unreachable.send_signal(signal.SIGINT)
    _, err = end(unreachable)
    assert (unreachable.returncode, time.monotonic() - started < 15) == (0, True)
    assert re.search(r'paused source=league until=\S+ reason="127.0.0.1 cannot be reached: Connection refused"', err)
    assert re.search(r'paused source=other until=\S+ reason="no.invalid cannot be reached: ', err)
    assert rows(tmp_path, "select count(*), max(failures) from objects where task in ('pending', 'retry')") == [(9, 1)]
    assert run_adce("run", "--once", folder=tmp_path).returncode == 3


def test_runner_that_waits_uses_almost_no_time_of_the_processor(unreachable):
    before = processor_seconds(unreachable.pid)
    time.sleep(3)  # what is measured is how little it does in these seconds
    assert processor_seconds(unreachable.pid) - before < 0.3


def processor_seconds(number: int) -> float:
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_views_answer_in_the_sqlite3_program_while_it_runs(upstream, league, tmp_path, start):
    program = shutil.which("sqlite3")
    if program is None:
        pytest.skip("the sqlite3 program is not installed")
    upstream.latency_seconds = (0.2, 0.3)
    start("run")
    wait_until(lambda: upstream.count() > 2)
    for view in ("queue", "gaps", "coverage", "rates", "recent_attempts", "stats", "cycles"):
        words = [program, "-readonly", "-header", "adce.db", f"select * from {view}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), view


def test_quiet_run_prints_nothing_when_all_is_well(upstream, league, tmp_path):
    done = run_adce("run", "--once", "-q", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_quiet_run_still_tells_what_gave_up(upstream, league, tmp_path):
    write_league(tmp_path, upstream.address, attempts=1)
    upstream.answer("/scoreboard?dates=20250101", Answer(b"trouble", 500))
    done = run_adce("-q", "run", "--once", folder=tmp_path)
    assert done.returncode == 3
    assert re.fullmatch(r"\S+ ERROR gave_up dataset=days key=days/20250101.json .*\n", done.stderr)


@pytest.mark.parametrize("words", [("--interval-minutes", "0.002"), ("--interval-hours", "0.00005")])
def test_run_begins_a_cycle_each_interval(words, league, tmp_path, start):
    process = start("run", "-q", *words)
    wait_until(lambda: rows(tmp_path, "select count(*) > 2 from cycles") == [(1,)])
    process.terminate()
    end(process)
    assert process.returncode == 0


def test_run_ends_after_so_many_minutes(league, tmp_path):
    done = run_adce("run", "--max-minutes", "0.015", "--interval-hours", "1", folder=tmp_path)
    assert done.returncode == 0
    assert 'reason="--max-minutes reached"' in done.stderr
    assert rows(tmp_path, "select count(*) from cycles") == [(1,)]


def in_a_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `adce` is the program; the line ends with the program's own exit code."""
    program = f'adce() {{ {shlex.join(command_line())} "$@"; }}'
    words = ["bash", "-c", f"{program}; {line}; exit ${{PIPESTATUS[0]}}"]
    environment = {**os.environ, "LC_ALL": "C"}  # bash warns of a locale that is not installed
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("elsewhere", ["2>&-", ">&- 2>&- <&-", "2>&1 | head -1", "2> /dev/full", "> /dev/full"])
def test_run_goes_on_when_nobody_listens(elsewhere, league, tmp_path):
    done = in_a_shell(f"adce run --once {elsewhere}", tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert rows(tmp_path, "select count(*) from gaps") == [(0,)]


@pytest.mark.parametrize("command", ["report", "coverage --format json", "tasks --format csv", "plan"])
def test_reader_that_has_seen_enough_is_no_error(command, tmp_path):
    write_league(tmp_path, NOWHERE, last=31)
    run_adce("reconcile", folder=tmp_path)
    done = in_a_shell(f"adce {command} | head -1", tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert not re.search("Traceback|Broken pipe|Exception ignored", done.stderr)


def test_full_disk_behind_standard_output_is_an_error_in_words(tmp_path):
    write_league(tmp_path, NOWHERE)
    run_adce("reconcile", folder=tmp_path)
    done = in_a_shell("adce report -q > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, "adce.py: [Errno 28] No space left on device\n")


class Terminal:
    """The program on a terminal of its own, and all that it has drawn."""

    def __init__(self, folder: Path, *words: str, size: tuple[int, int] = (40, 120), term: str = "xterm") -> None:
        self.file, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        session = [sys.executable, "-c", BECOME_FOREMOST, sys.executable, str(ROOT / "adce.py"), *words]
        environment = {**os.environ, "TERM": term}
        files = {"stdin": inside, "stdout": inside, "stderr": inside}
        self.process = subprocess.Popen(session, cwd=folder, env=environment, start_new_session=True, **files)
        os.close(inside)
        self.shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while block := os.read(self.file, 65536):
                self.shown += block
        except OSError:  # the last process has closed the other side
            return

    def end(self) -> str:
        """Wait for the program; everything it has drawn."""
        self.process.wait(60)
        self._reader.join(20)
        os.close(self.file)
        return self.shown.decode()


BECOME_FOREMOST = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_terminal_shows_the_live_screen_and_a_pipe_none_of_it(league, tmp_path):
    terminal = Terminal(tmp_path, "run", "--once")
    shown = terminal.end()
    assert terminal.process.returncode == 0
    assert "\x1b[" in shown and "Ctrl-C stops cleanly" in shown
    assert re.search(r"league +games +100 +(\d+) +\1\s", shown)
    again = run_adce("run", "--once", folder=tmp_path)
    assert "\x1b" not in again.stdout + again.stderr


def test_screen_tells_that_it_stops_while_attempts_may_finish(upstream, league, tmp_path):
    upstream.latency_seconds = (2, 2)
    terminal = Terminal(tmp_path, "run")
    wait_until(lambda: b"workers days/" in terminal.shown)
    os.write(terminal.file, b"\x03")
    wait_until(lambda: b"stopping running=" in terminal.shown)
    assert b"stop reason=" not in terminal.shown
    after = terminal.end().rpartition("^C")[2]
    assert re.match(r"\x1b\[\d+F", after)  # drawn anew from the first column


def test_ctrl_c_on_a_terminal_stops_cleanly(league, tmp_path):
    terminal = Terminal(tmp_path, "run")
    wait_until(lambda: b"workers idle" in terminal.shown)
    os.write(terminal.file, b"\x03")
    shown = terminal.end()
    assert terminal.process.returncode == 0
    assert "stop reason=SIGINT" in shown and "Traceback" not in shown


@pytest.mark.parametrize("size", [(5, 20), (2, 2), (0, 0)])
def test_small_terminal_is_never_overfull(size, league, tmp_path):
    terminal = Terminal(tmp_path, "run", "--once", size=size)
    screens = terminal.end().rpartition("\x1b[J")[0].split("\x1b[J")
    height, width = size if all(size) else (24, 80)
    plain = [re.sub(r"\x1b\[\d*[A-Z]", "", screen).splitlines() for screen in screens]
    assert terminal.process.returncode == 0
    assert max(len(lines) for lines in plain) <= max(2, height)
    assert max(len(line) for lines in plain for line in lines) <= width


def test_dumb_terminal_gets_plain_lines(league, tmp_path):
    assert "\x1b" not in Terminal(tmp_path, "run", "--once", term="dumb").end()


def test_configuration_that_expects_far_less_is_shown_by_plan_and_drops_the_rest_until_it_is_corrected(tmp_path):
    narrow = write_widely(tmp_path, "http://127.0.0.1:9")
    assert run_adce("reconcile", folder=tmp_path).returncode == 3
    wide = (tmp_path / "adce.yaml").read_text()
    (tmp_path / "adce.yaml").write_text(narrow)
    plan = json.loads(run_adce("plan", "--format", "json", folder=tmp_path).stdout)
    assert plan["changes"] == [{"dataset": "days", "expected_now": 372, "expected_then": 6}]
    for text, gaps in ((wide, 372), (narrow, 6), (wide, 372)):
        (tmp_path / "adce.yaml").write_text(text)
        assert run_adce("reconcile", folder=tmp_path).returncode == 3
        assert rows(tmp_path, "select count(*) from gaps") == [(gaps,)]
    cycles = rows(tmp_path, "select dropped, expected, error from cycles")
    assert cycles == [(0, 372, None), (0, 372, None), (366, 6, None), (0, 372, None)]


def test_run_asks_for_nothing_that_is_no_longer_expected_and_leaves_the_stored_object_alone(upstream, tmp_path):
    League(date(2025, 1, 1), 6).serve(upstream)
    narrow, old = write_widely(tmp_path, upstream.address), tmp_path / "lake/days/20240101.json"
    old.parent.mkdir(parents=True)
    old.write_text("x" * 500)
    assert run_adce("reconcile", folder=tmp_path).returncode == 3
    (tmp_path / "adce.yaml").write_text(narrow)
    assert run_adce("run", "--once", folder=tmp_path).returncode == 0
    asked = {arrival.path.rpartition("=")[2] for arrival in upstream.arrivals if "/scoreboard" in arrival.path}
    assert (asked, old.read_text()) == ({f"2025010{day}" for day in range(1, 7)}, "x" * 500)


def test_once_ends_although_objects_get_old_faster_than_they_are_fetched(upstream, tmp_path):
    League(date(2025, 1, 1), 6).serve(upstream)
    limits = "rate_limiting: {source_limits: {league: {requests_per_second: 6}}}"
    write_league(tmp_path, upstream.address, limits=limits)
    text = (tmp_path / "adce.yaml").read_text()
    (tmp_path / "adce.yaml").write_text(re.sub(r"freshness: .*", "freshness: {refetch_every: 1s}", text))
    assert run_adce("run", "--once", folder=tmp_path).returncode in (0, 3)
    paths = [arrival.path for arrival in upstream.arrivals]
    assert len(paths) == len(set(paths)) > 6
