"""Commands that start, stop and change what a runner does, beside a runner that works."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from lakes import write_widely
from runners import (
    NOWHERE,
    HeldBucket,
    command_line,
    do,
    fill_box,
    has_begun,
    holder,
    processes_of,
    rows,
    wait_until,
    write_box,
)
from upstream import Answer, Upstream

HEALTH = "health_check: {enabled: true, port: 0}"
SOON = 30  # a generous bound for what should happen at once


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder; every process that has been started for it is gone in the end."""
    monkeypatch.setenv("FOLDER", str(tmp_path))
    yield tmp_path
    for number in processes_of(tmp_path):
        if number != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    wait_until(lambda: holder(tmp_path) is None)


@pytest.fixture
def start(folder) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a runner in the foreground and waits until its first cycle is over."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command_line(*(words or ("run", "-q"))),
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        wait_until(lambda: has_begun(folder) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def failing(upstream, folder) -> Upstream:
    """Three things whose source answers with an error; an hour passes before one is tried again."""
    for name in "ABC":
        upstream.answer(f"/{name}", Answer(b"trouble", 400 if name == "C" else 500))
    patience = "retry: {max_attempts: 1}"
    write_box(folder, address=upstream.address, names="A, B, C", more=patience)
    text = (folder / "adce.yaml").read_text()
    (folder / "adce.yaml").write_text(text.replace("timeout_seconds: 60", "blocked_when: {failures_in_a_row: 99}"))
    return upstream


def task_of(folder: Path, name: str) -> int:
    """The open task for a thing."""
    ((number,),) = rows(folder, f"select task_id from queue where key = 'things/{name}'")
    return number


def states(folder: Path) -> list[str]:
    """Of the open tasks."""
    return [row[0] for row in rows(folder, "select state from queue order by task_id")]


def present(folder: Path) -> int:
    return rows(folder, "select sum(present) from coverage")[0][0]


def change(folder: Path, sql: str) -> None:
    """A change by the sqlite3 program, as a person would make it."""
    program = shutil.which("sqlite3")
    if program is None:
        pytest.skip("the sqlite3 program is not installed")
    words = [program, "-cmd", ".timeout 10000", "adce.db", sql]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=30)


# ---- start, stop, restart, health, logs


def test_start_works_in_the_background_until_stop(folder):
    fill_box(folder, "A")
    write_box(folder, more=HEALTH)
    assert do("health", folder=folder).returncode == 10  # there is no database yet
    begun = do("start", folder=folder)
    assert (begun.returncode, begun.stderr) == (0, "")
    words = rf"process (\d+) started, log {folder}/adce\.db\.log, serving (http://127\.0\.0\.1:\d+/)\n"
    number, address = re.fullmatch(words, begun.stdout).groups()
    assert holder(folder) == int(number)
    assert os.getsid(int(number)) == int(number)  # no terminal that goes away takes it along
    assert requests.get(address + "health", timeout=10).status_code == 200
    status = do("status", "--format", "json", folder=folder)
    told = json.loads(status.stdout)["runner"]
    assert (status.returncode, told["pid"], told["address"]) == (0, int(number), address)
    assert do("health", folder=folder).returncode == 0
    again = do("start", folder=folder)
    assert (again.returncode, f"(process {number})" in again.stderr, again.stdout) == (11, True, "")
    ended = do("stop", folder=folder)
    assert (ended.returncode, ended.stdout) == (0, f"process {number} stopped\n")
    assert holder(folder) is None
    assert rows(folder, "select note from runner") == [("SIGTERM",)]
    assert (folder / "adce.db.log").stat().st_mode & 0o777 == 0o600
    for command in ("stop", "status", "health"):
        assert do(command, folder=folder).returncode == 4, command


def test_start_with_a_bad_configuration_starts_nothing(folder):
    (folder / "adce.yaml").write_text("store: [")
    done = do("start", folder=folder)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("adce.yaml:1:")
    assert [path.name for path in folder.iterdir()] == ["adce.yaml"]


def test_start_that_fails_at_once_is_told_in_its_own_words(folder):
    write_box(folder)
    (folder / "lake").write_text("a file in its place")
    for _ in range(2):  # what the log held before is not told again
        done = do("start", folder=folder)
        assert done.returncode != 0
        assert "exited at once with exit code 12" in done.stderr
        assert done.stderr.count(f"the store {folder}/lake cannot be written") == 1
        assert "Traceback" not in done.stderr
    assert holder(folder) is None


def test_start_does_not_write_its_log_into_the_database(folder):
    fill_box(folder, "A")
    write_box(folder, more="database: lake.log")
    begun = do("start", folder=folder)
    do("stop", folder=folder)
    assert f"log {folder}/lake.log.log" in begun.stdout


def test_two_starts_at_once_start_one_runner(folder):
    fill_box(folder, "A")
    write_box(folder)
    both = [
        subprocess.Popen(command_line("start"), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = sorted((process.communicate(timeout=60), process.returncode) for process in both)
    (refused, bad), (started, good) = ends
    assert good == 0
    assert bad in (1, 11)
    assert "runner works on this database" in refused[1]
    assert f"process {holder(folder)} started," in started[0]
    assert len([number for number in processes_of(folder) if number != os.getpid()]) == 1


def test_stop_tells_of_a_stuck_runner(folder, start):
    fill_box(folder, "A")
    write_box(folder)
    runner = start()
    runner.send_signal(signal.SIGSTOP)
    done = do("stop", "--timeout", "1s", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"adce.py: process {runner.pid} did not stop within 1.0 s\nTry: ")
    runner.send_signal(signal.SIGCONT)
    assert runner.wait(20) == 0


def test_stop_with_no_patience_does_not_wait(folder, start):
    fill_box(folder, "A")
    write_box(folder, grace=300)
    start().send_signal(signal.SIGSTOP)
    done = do("stop", "--timeout", "0s", folder=folder, seconds=60)
    assert done.returncode == 1


def test_health_tells_of_a_loop_that_is_stuck(folder, start):
    fill_box(folder, "A")
    write_box(folder)
    runner = start()
    runner.send_signal(signal.SIGSTOP)
    change(folder, "update runner set beat_at = beat_at - 600")  # as if that were ten minutes ago
    done = do("health", "--format", "json", folder=folder)
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert told["status"] == "unhealthy"
    assert "the main loop has been stuck for 10 min" in told["problems"]


def test_restart_takes_the_new_configuration(folder):
    fill_box(folder, "A", "B")
    write_box(folder)
    first = do("restart", folder=folder)  # none runs: it is a start
    assert (first.returncode, " started, log " in first.stdout) == (0, True)
    before = holder(folder)
    write_box(folder, names="A, B")
    second = do("restart", folder=folder)
    assert second.returncode == 0
    assert holder(folder) not in (None, before)
    wait_until(lambda: present(folder) == 2)
    (folder / "adce.yaml").write_text("nonsense: 1")
    between = holder(folder)
    assert do("restart", folder=folder).returncode == 78
    assert holder(folder) == between  # what cannot be started is not stopped


def test_restart_with_a_configuration_that_expects_less_drops_the_rest_and_tells_it(folder):
    narrow = write_widely(folder, NOWHERE)
    assert do("start", folder=folder).returncode == 0
    wait_until(lambda: rows(folder, "select count(*) from cycles where seconds is not null") == [(1,)])
    before = holder(folder)
    wide = (folder / "adce.yaml").read_text()
    ends = "select dropped, expected, error from cycles where cycle_id = {} and seconds is not null"
    for cycle, (text, end) in enumerate([(narrow, (366, 6, None)), (wide, (0, 372, None))], start=2):
        (folder / "adce.yaml").write_text(text)
        done = do("restart", folder=folder)
        assert (done.returncode, holder(folder) == before) == (0, False)
        wait_until(lambda: rows(folder, ends.format(cycle)))  # noqa: B023
        assert rows(folder, ends.format(cycle)) == [end]
        assert rows(folder, "select count(*) from gaps") == [(end[1],)]
        before = holder(folder)


def test_start_works_without_a_port(folder):
    fill_box(folder, "A")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        write_box(folder, more=f"health_check: {{enabled: true, port: {port}}}\n")
        begun = do("start", folder=folder)
    assert (begun.returncode, " started, log " in begun.stdout) == (0, True)
    assert "serving" not in begun.stdout


@pytest.mark.parametrize("mistake", ["sorces: {}\n", "store: [\n"])
def test_mistake_in_the_configuration_hides_no_runner_that_works(mistake, folder):
    fill_box(folder, "A")
    write_box(folder, more="database: 'here.db'\n")
    do("start", folder=folder)
    wait_until(lambda: holder(folder, "here.db"))
    with (folder / "adce.yaml").open("a") as file:
        file.write(mistake)
    for words in (["status"], ["health"], ["logs"], ["backup", "copy.db"], ["stop"]):
        done = do(*words, folder=folder)
        told = f"adce.py: {folder}/adce.yaml cannot be used (see adce.py check); using {folder}/here.db\n"
        assert (done.returncode, done.stderr) == (0, told), words
        assert done.stdout
        if words == ["status"]:
            assert "! adce.yaml: cannot be used: adce.yaml:" in done.stdout
            assert done.stdout.splitlines()[-1] == f"database {folder}/here.db"  # the store is not known
    assert holder(folder, "here.db") is None
    assert do("report", folder=folder).returncode == 78
    assert do("--db", "elsewhere.db", "status", folder=folder).returncode == 78  # nothing is there


def test_logs_shows_the_last_events_and_follows(folder):
    fill_box(folder, "A")
    write_box(folder)
    assert do("logs", folder=folder).returncode == 10
    do("start", folder=folder)
    wait_until(lambda: has_begun(folder))
    assert " start " in do("logs", folder=folder).stdout
    with (folder / "followed").open("w") as seen:
        following = subprocess.Popen(command_line("logs", "--follow"), cwd=folder, stdout=seen)
    try:
        wait_until(lambda: " start " in (folder / "followed").read_text())
        do("stop", folder=folder)
        wait_until(lambda: " stop " in (folder / "followed").read_text())
    finally:
        following.kill()
        following.communicate()


def test_logs_shows_as_many_events_as_were_asked_for(folder):
    fill_box(folder, "A")
    write_box(folder)
    assert do("run", "--once", "--log", "events.log", folder=folder).returncode == 0
    done = do("logs", "--tail", "2", folder=folder)
    assert [line.split()[2] for line in done.stdout.splitlines() if line] == ["cycle", "stop"]


def test_logs_that_nobody_kept_are_told(folder):
    fill_box(folder, "A")
    write_box(folder)
    assert do("run", "--once", "-q", folder=folder).returncode == 0
    done = do("logs", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("adce.py: the last runner kept no log\nTry: ")


def test_run_that_finds_another_may_skip(folder, start):
    fill_box(folder, "A")
    write_box(folder)
    start()
    done = do("run", "--once", "--if-locked", "skip", folder=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert do("run", "--once", folder=folder).returncode == 11


def test_quiet_run_prints_nothing_on_success(upstream, folder):
    upstream.answer("/A", Answer(b"thing A"))
    write_box(folder, address=upstream.address)
    done = do("run", "--once", "-q", folder=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "lake/things/A").read_bytes() == b"thing A"


# ---- pause, resume


@pytest.mark.parametrize("scope", ["box", "global"])
def test_pause_holds_a_live_runner_until_it_is_resumed(scope, upstream, folder, start):
    upstream.answer("/A", Answer(b"thing A"))
    fill_box(folder, "A")
    write_box(folder, address=upstream.address)
    start()
    paused = do("pause", scope, "--reason", "they asked", folder=folder)
    assert paused.returncode == 0
    assert paused.stdout == f"{scope} is paused until it is resumed; running attempts may finish\n"
    (told,) = [
        row
        for row in json.loads(do("status", "--format", "json", folder=folder).stdout)["sources"]
        if row["scope"] == scope
    ]
    assert told["why"] == "paused: by the operator, until it is resumed: they asked"
    (folder / "lake/things/A").unlink()
    assert do("reconcile", "--full", folder=folder).returncode == 3
    assert states(folder) == ["pending"]
    time.sleep(1)  # what is proven is that nothing happens
    assert upstream.count() == 0
    resumed = do("resume", scope, folder=folder)
    assert (resumed.returncode, resumed.stdout) == (0, f"{scope} resumed\n")
    wait_until(upstream.count, SOON)
    again = do("resume", scope, folder=folder)
    assert (again.returncode, "was not paused" in again.stdout) == (0, True)


def test_pause_for_some_time_tells_until_when(folder):
    write_box(folder)
    done = do("pause", "box", "--for", "2h", folder=folder)
    until = re.fullmatch(r"box is paused until (\S+Z); running attempts may finish\n", done.stdout)[1]
    ((told, left),) = rows(
        folder, "select blocked_until, unixepoch(blocked_until) - unixepoch() from rates where scope = 'box'"
    )
    assert told == until
    assert 7100 < left <= 7200
    assert do("pause", "box", "--for", "1h", folder=folder).returncode == 0  # instead of that
    ((left,),) = rows(folder, "select unixepoch(blocked_until) - unixepoch() from rates where scope = 'box'")
    assert 3500 < left <= 3600
    change(folder, "update scopes set reason = 'HTTP 429' where scope = 'box'")
    do("pause", "box", "--for", "1m", folder=folder)  # what the source has asked for stays
    ((left,),) = rows(folder, "select unixepoch(blocked_until) - unixepoch() from rates where scope = 'box'")
    assert 3400 < left <= 3600


def test_pause_for_ages_is_shown(folder):
    write_box(folder)
    done = do("pause", "box", "--for", "999999999d", folder=folder)
    assert "None" not in done.stdout
    assert rows(folder, "select blocked_until is not null from rates where scope = 'box'") == [(1,)]


def test_pause_for_no_time_is_not_told_as_endless(folder):
    write_box(folder)
    done = do("pause", "box", "--for", "0s", folder=folder)
    assert "until it is resumed" not in done.stdout


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_source_that_does_not_exist_is_named_with_a_suggestion(command, folder):
    write_box(folder)
    done = do(command, "bix", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'adce.py: source "bix" is not defined, did you mean "box"?\n'


def test_resume_tries_at_once_what_has_failed(upstream, folder, start):
    upstream.answer("/A", Answer(b"trouble", 500), Answer(b"thing A"))
    write_box(folder, address=upstream.address, more="retry: {initial_delay_seconds: 3600}")
    start()
    wait_until(lambda: states(folder) == ["retry"])
    assert do("resume", "box", folder=folder).returncode == 0
    wait_until(lambda: present(folder) == 1, SOON)


# ---- retry


def test_retry_with_ids_reaches_a_live_runner_at_once(failing, folder, start):
    start()
    wait_until(lambda: states(folder) == ["gave_up"] * 3)
    failing.answer("/A", Answer(b"thing A"))
    number = str(task_of(folder, "A"))
    done = do("retry", number, folder=folder)
    assert (done.returncode, done.stdout) == (0, "1 task will be retried as soon as possible\n")
    wait_until((folder / "lake/things/A").exists, SOON)
    wait_until(lambda: states(folder) == ["gave_up"] * 2, SOON)
    assert failing.count("/B") == failing.count("/C") == 1
    unknown = do("retry", "4711", folder=folder)
    assert (unknown.returncode, "not in state retry or gave_up: 4711" in unknown.stderr) == (1, True)
    closed = do("retry", number, str(task_of(folder, "B")), folder=folder)
    assert closed.returncode == 1
    assert failing.count("/B") == 1  # one that cannot be: none


def test_retry_by_filters_asks_and_obeys(failing, folder):
    assert do("run", "--once", "-q", folder=folder).returncode == 3
    for words, count in (
        ((), 3),
        (("--error", "http 400"), 1),
        (("--error", "trouble"), 3),
        (("--state", "gave_up", "--source", "box", "--dataset", "things"), 3),
    ):
        done = do("retry", *words, folder=folder)
        assert (done.returncode, f"{count} tasks match; nothing was done" in done.stderr) == (2, True), words
    assert do("retry", "--state", "retry", folder=folder).returncode == 0
    unsure = do("retry", "--error", "http 400", folder=folder)
    assert (unsure.returncode, unsure.stdout) == (2, "")
    assert "1 tasks match; nothing was done" in unsure.stderr
    assert states(folder) == ["gave_up"] * 3
    sure = do("retry", "--error", "http 400", "--yes", folder=folder)
    assert (sure.returncode, sure.stdout) == (0, "1 task will be retried as soon as possible\n")
    assert sorted(states(folder)) == ["gave_up", "gave_up", "pending"]
    misspelt = do("retry", "--dataset", "thing", "--yes", folder=folder)
    assert (misspelt.returncode, 'did you mean "things"?' in misspelt.stderr) == (1, True)


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 2, 3), ("\n", 2, 3), ("\x04", 2, 3)])
def test_retry_on_a_terminal_asks(answer, code, left, failing, folder):
    do("run", "--once", "-q", folder=folder)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command_line("retry"), cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while b"Retry 3 tasks now? [y/N]" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, answer.encode())
        with contextlib.suppress(OSError):  # the program has ended
            while block := os.read(ours, 4096):
                shown += block
        assert process.wait(20) == code
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert states(folder).count("gave_up") == left


# ---- skip


def test_skipped_object_is_no_gap_until_it_is_retried(failing, folder, start):
    start("run", "-q", "--interval-minutes", "0.005")
    wait_until(lambda: states(folder) == ["gave_up"] * 3)
    number = task_of(folder, "A")
    change(folder, f"update objects set detected_at = 1760000000 where object_id = {number}")
    done = do("skip", str(number), "--reason", "never\x1bplayed", folder=folder)
    assert (done.returncode, done.stdout) == (0, "1 object excluded; undo with: adce.py retry ID\n")
    assert rows(folder, "select key from gaps order by key") == [("things/B",), ("things/C",)]
    assert rows(folder, "select key, reason, task_id from objects_now where state = 'skipped'") == [
        ("things/A", "never\x1bplayed", number)
    ]
    (told,) = json.loads(do("coverage", "--format", "json", folder=folder).stdout)
    assert (told["expected"], told["missing"], told["skipped"]) == (2, 2, 1)
    shown = do("task", str(number), folder=folder).stdout
    assert "never" in shown
    assert "\x1b" not in shown
    ((cycle,),) = rows(folder, "select max(cycle_id) from cycles")
    wait_until(lambda: rows(folder, "select max(cycle_id) from cycles")[0][0] >= cycle + 3)
    assert rows(folder, "select count(*) from gaps") == [(2,)]
    assert failing.count("/A") == 1
    twice = do("skip", str(number), folder=folder)
    assert (twice.returncode, f"not open: {number}\n" in twice.stderr) == (1, True)
    failing.answer("/A", Answer(b"thing A"))
    undone = do("retry", str(number), folder=folder)
    assert (undone.returncode, undone.stdout) == (0, "1 task will be retried as soon as possible\n")
    kept = json.loads(do("task", str(number), "--format", "json", folder=folder).stdout)["task"]
    assert kept["detected_at"] == "2025-10-09T08:53:20Z"  # the same task, with its age
    wait_until((folder / "lake/things/A").exists, SOON)
    assert "things/A" in do("task", str(number), folder=folder).stdout  # the same, with its age
    assert rows(folder, "select count(*) from objects_now where state = 'skipped'") == [(0,)]


def test_skipped_object_stays_skipped_over_restarts_and_full_cycles(failing, folder):
    do("run", "--once", "-q", folder=folder)
    assert do("skip", *(str(task_of(folder, name)) for name in "AB"), folder=folder).returncode == 0
    do("reconcile", "--full", folder=folder)
    do("run", "--once", "-q", folder=folder)
    assert rows(folder, "select key from gaps") == [("things/C",)]
    assert (failing.count("/A"), failing.count("/B")) == (1, 1)


def test_skip_refuses_all_when_one_is_not_open(failing, folder):
    do("run", "--once", "-q", folder=folder)
    for words in (["4711"], [str(task_of(folder, "A")), "4711"]):
        done = do("skip", *words, folder=folder)
        assert (done.returncode, done.stdout) == (1, "")
        assert "adce.py: not open: 4711\n" in done.stderr
    assert rows(folder, "select count(*) from gaps") == [(3,)]
    assert do("skip", folder=folder).returncode == 2
    named_twice = do("skip", str(task_of(folder, "A")), str(task_of(folder, "A")), folder=folder)
    assert (named_twice.returncode, named_twice.stdout.startswith("1 object ")) == (0, True)


def test_skipping_a_running_task_lets_it_end_and_wants_it_no_more(folder, start):
    (folder / "slow.sh").write_text('until [ -e go ]; do sleep 0.02; done; echo thing > "$ADCE_OUTPUT"')
    write_box(folder, way='command: [sh, slow.sh, "{name}"]')
    start()
    wait_until(lambda: states(folder) == ["running"])
    number = str(task_of(folder, "A"))
    assert do("skip", number, folder=folder).returncode == 0
    assert states(folder) == ["running"]
    (folder / "go").touch()
    wait_until(lambda: states(folder) == [], SOON)
    assert rows(folder, "select count(*) from gaps") == [(0,)]
    assert rows(folder, "select key from objects_now where state = 'skipped'") == [("things/A",)]
    assert do("retry", number, folder=folder).returncode == 0
    wait_until(lambda: present(folder) == 1, SOON)


def test_coverage_shows_a_dataset_of_which_everything_is_skipped(failing, folder):
    do("run", "--once", "-q", folder=folder)
    assert do("skip", *(str(task_of(folder, name)) for name in "ABC"), folder=folder).returncode == 0
    told = json.loads(do("coverage", "--format", "json", folder=folder).stdout)
    assert [row["skipped"] for row in told] == [3]


# ---- reconcile


def test_reconcile_beside_a_runner_is_done_by_the_runner(folder, start):
    fill_box(folder, "A", "B")
    write_box(folder, names="A, B")
    start()
    (folder / "lake/things/B").unlink()
    ((before,),) = rows(folder, "select max(cycle_id) from cycles")
    begun = time.monotonic()
    done = do("reconcile", "--full", "--format", "json", folder=folder)
    assert time.monotonic() - begun < SOON
    told = json.loads(done.stdout)
    assert (done.returncode, told["cycle_id"], told["present"], told["missing"]) == (3, before + 1, 1, 1)
    assert f"The runner (process {holder(folder)}) runs it" in done.stderr
    assert rows(folder, "select wanted_cycle from facts") == [(None,)]


def test_believed_loss_beside_a_runner_opens_its_gaps(folder, start):
    names = [f"N{number}" for number in range(12)]
    fill_box(folder, *names)
    write_box(folder, names=", ".join(names))
    start()
    shutil.rmtree(folder / "lake/things")
    doubted = do("reconcile", "--full", "--format", "json", folder=folder)
    assert (doubted.returncode, "vanished at once" in doubted.stdout) == (1, True)
    assert rows(folder, "select count(*) from gaps") == [(0,)]
    believed = do("reconcile", "--full", "--accept-loss", "things", folder=folder)
    assert believed.returncode == 3, believed.stdout
    assert rows(folder, "select missing from cycles order by cycle_id desc limit 1") == [(12,)]
    misspelt = do("reconcile", "--accept-loss", "thing", folder=folder)
    assert (misspelt.returncode, 'did you mean "things"?' in misspelt.stderr) == (1, True)


def test_several_reconciles_at_once_are_all_answered(folder, start):
    fill_box(folder, "A")
    write_box(folder)
    start()
    words = command_line("reconcile", "--format", "json")
    several = [
        subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)
    ]
    for process in several:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, "Traceback" in err) == (0, False), err
        assert json.loads(out)
    assert rows(folder, "select wanted_cycle from facts") == [(None,)]


def test_reconcile_tells_when_the_runner_crashes_meanwhile(folder, start):
    with HeldBucket() as bucket:
        write_box(folder, store="s3://lake")
        runner = start(**bucket.environment)
        bucket.held.add("list")
        asking = subprocess.Popen(
            command_line("reconcile"),
            cwd=folder,
            env={**os.environ, **bucket.environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        wait_until(lambda: rows(folder, "select 1 from cycles where cycle_id = 2 and seconds is null"))
        runner.kill()
        out, err = asking.communicate(timeout=20)
    assert (asking.returncode, out) == (1, "")
    assert "the runner exited before the cycle ended" in err


def test_reconcile_beside_a_reconcile(folder):
    """There is no runner that could do it: it is refused, or done after the other."""
    with HeldBucket(["list"]) as bucket:
        write_box(folder, store="s3://lake")
        environment = {**os.environ, **bucket.environment}
        pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        first = subprocess.Popen(command_line("reconcile"), cwd=folder, env=environment, **pipes)
        wait_until(lambda: "list" in bucket.seen)
        second = subprocess.Popen(command_line("reconcile"), cwd=folder, env=environment, **pipes)
        wait_until(
            lambda: second.poll() is not None or rows(folder, "select 1 from facts where wanted_cycle is not null")
        )
        bucket.release()
        first.communicate(timeout=20)
        _, err = second.communicate(timeout=20)
    assert first.returncode == 3
    assert second.returncode in (3, 11), err


def test_request_that_was_left_over_holds_for_the_next_cycle(folder):
    names = [f"N{number}" for number in range(12)]
    fill_box(folder, *names)
    write_box(folder, names=", ".join(names))
    assert do("reconcile", folder=folder).returncode == 0
    change(folder, """update facts set wanted_cycle = '{"is_full": true, "accept_loss": ["things"]}'""")
    shutil.rmtree(folder / "lake/things")
    assert do("reconcile", folder=folder).returncode == 3
    assert rows(folder, "select missing, error from cycles where cycle_id = 2") == [(12, None)]
    assert rows(folder, "select wanted_cycle from facts") == [(None,)]


# ---- what others write, and several at once


def test_row_that_the_sqlite3_program_writes_is_taken_up(failing, folder, start):
    start()
    wait_until(lambda: states(folder) == ["gave_up"] * 3)
    for name in "ABC":
        failing.answer(f"/{name}", Answer(b"a thing"))
    change(folder, f"update objects set task = 'pending', failures = 0 where object_id = {task_of(folder, 'A')}")
    wait_until((folder / "lake/things/A").exists, SOON)
    change(folder, """update facts set wanted_cycle = '{"is_full": true}'""")
    wait_until(lambda: rows(folder, "select max(cycle_id) from cycles") == [(2,)], SOON)
    assert failing.count("/B") == 1


def test_many_command_lines_at_once_harm_nothing(failing, folder, start):
    start("run", "-q", "--interval-minutes", "0.005")
    wait_until(lambda: states(folder) == ["gave_up"] * 3)
    lines = (
        ["retry", "--yes"],
        ["pause", "box", "--for", "1s"],
        ["resume", "box"],
        ["status", "--format", "json"],
        ["tasks", "--format", "json"],
        ["reconcile", "--format", "json"],
        ["retry", "--yes"],
        ["coverage", "--format", "json"],
    )
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    several = [subprocess.Popen(command_line(*words), cwd=folder, **pipes) for words in lines]
    for process, words in zip(several, lines, strict=True):
        out, err = process.communicate(timeout=60)
        assert (process.returncode in (0, 3), "Traceback" in err) == (True, False), (words, err)
        assert "json" not in words or json.loads(out) is not None
    assert rows(folder, "pragma integrity_check") == [("ok",)]
    assert holder(folder) is not None


READING = ("status", "health", "coverage", "tasks", "report", "check", "task 1", "plan", "reconcile")
CHANGING = ("pause box", "resume box", "skip 1", "retry 1", "start", "restart", "stop")


def test_everything_that_shows_something_can_be_read_as_json(failing, folder, start):
    start()
    wait_until(lambda: states(folder) == ["gave_up"] * 3)
    for line in READING:
        done = do(*line.split(), "--format", "json", folder=folder)
        assert json.loads(done.stdout) is not None, line


def test_what_a_changing_command_prints_can_be_read_as_json(failing, folder):
    do("run", "--once", "-q", folder=folder)
    for line in CHANGING:
        done = do(*line.split(), "--format", "json", folder=folder)
        assert done.returncode == 0, line
        assert isinstance(json.loads(done.stdout), dict), line


def test_quiet_commands_print_nothing(failing, folder):
    do("run", "--once", "-q", folder=folder)
    for line in CHANGING:
        done = do(*line.split(), "-q", folder=folder)
        assert (done.returncode, done.stdout) == (0, ""), line


def test_nothing_to_stop_before_there_is_a_database(folder):
    write_box(folder, address=NOWHERE)
    done = do("stop", folder=folder)
    assert (done.returncode, done.stdout) == (4, "no runner works on this database\n")
    assert [path.name for path in folder.iterdir()] == ["adce.yaml"]
