"""A signal at any moment: how the runner ends, how soon, and what it leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from runners import (
    HeldBucket,
    command_line,
    fill_box,
    has_begun,
    holder,
    processes_of,
    rows,
    stopped,
    wait_until,
    write_box,
)
from upstream import Answer, Upstream

PHASES = ("idle", "listing", "fetching", "storing", "in a command", "in a call")
BUSY = PHASES[2:]  # an attempt runs
MARGIN = 20  # seconds beyond the grace time
SOON = 15  # seconds, where nothing at all has to be waited for
LINGER = """\
trap '' TERM
setsid sleep 600 &
echo $$ > running
sleep 600
"""


def begin(folder: Path, *words: str, before: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """A runner that can be recognised by its environment."""
    return subprocess.Popen(
        [*before, *command_line(*(words or ("run",)))],
        cwd=folder,
        env={**os.environ, "FOLDER": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class Scene:
    """A folder whose runner comes to a phase and stays there."""

    phase: str
    folder: Path
    upstream: Upstream
    bucket: HeldBucket

    def begin(self) -> subprocess.Popen[str]:
        return begin(self.folder, **self.bucket.environment)

    def is_reached(self) -> bool:
        """Whether the runner has come as far as it can."""
        there = {
            "idle": has_begun(self.folder),
            "listing": "list" in self.bucket.seen,
            "fetching": self.upstream.count("/A"),
            "storing": "put" in self.bucket.seen,
        }
        return bool(there.get(self.phase, (self.folder / "running").exists()))


@contextlib.contextmanager
def prepared(phase: str, folder: Path, grace: float) -> Iterator[Scene]:
    (folder / "linger.sh").write_text(LINGER)
    (folder / "a_scraper.py").write_text(
        "import pathlib, threading\n"
        "def wait(name):\n    pathlib.Path('running').touch()\n    threading.Event().wait()\n"
    )
    held = {"listing": ["list"], "storing": ["put"]}.get(phase, [])
    ways = {"in a command": 'command: [sh, linger.sh, "{name}"]', "in a call": 'call: "a_scraper:wait"'}
    with Upstream() as upstream, HeldBucket(held) as bucket:
        upstream.answer("/A", Answer(b"thing A", behaviour="hang" if phase == "fetching" else "whole"))
        way, store = ways.get(phase, 'url: "/{name}"'), "s3://lake" if held else "lake"
        write_box(folder, way=way, address=upstream.address, store=store, grace=grace)
        if phase == "idle":
            fill_box(folder, "A")
        yield Scene(phase, folder, upstream, bucket)


@contextlib.contextmanager
def running(phase: str, folder: Path, grace: float = 0.3) -> Iterator[subprocess.Popen[str]]:
    """A runner in a phase; whatever is left of it at the end is killed."""
    with prepared(phase, folder, grace) as scene:
        process = scene.begin()
        try:
            wait_until(lambda: scene.is_reached() or process.poll() is not None)
            assert process.poll() is None, stopped(process)
            yield process
        finally:
            clear_away(folder)
            process.communicate()


def clear_away(folder: Path) -> None:
    for number in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def what_is_left(folder: Path) -> dict[str, object]:
    """Everything that a clean stop must not leave."""
    wait_until(lambda: not processes_of(folder), MARGIN)
    return {
        "running tasks": rows(folder, "select count(*) from queue where state = 'running'")[0][0],
        "running attempts": rows(folder, "select count(*) from attempts where outcome = 'running'")[0][0],
        "open requests": rows(folder, "select count(*) from requests")[0][0],
        "open cycles": rows(folder, "select count(*) from reconciliations where seconds is null")[0][0],
        "holder": holder(folder),
        "damage": rows(folder, "pragma integrity_check"),
        "output": list((folder / "adce.db-output").glob("*")),
    }


NOTHING = {
    "running tasks": 0,
    "running attempts": 0,
    "open requests": 0,
    "open cycles": 0,
    "holder": None,
    "damage": [("ok",)],
    "output": [],
}


OTHERS = ("idle", "fetching", "in a command", "in a call")


@pytest.mark.parametrize(
    ("phase", "number"),
    [(phase, signal.SIGTERM) for phase in PHASES]
    + [(phase, number) for phase in OTHERS for number in (signal.SIGINT, signal.SIGHUP)],
)
def test_first_signal_stops_cleanly_within_the_grace_time(phase, number, tmp_path):
    with running(phase, tmp_path) as process:
        started = time.monotonic()
        process.send_signal(number)
        code, err = stopped(process, 0.3 + MARGIN)
        assert (code, "Traceback" in err) == (0, False), err
        assert time.monotonic() - started < 0.3 + MARGIN
        assert f"stop reason={number.name}" in err
        assert what_is_left(tmp_path) == NOTHING
        assert rows(tmp_path, "select note, stopped_at >= started_at from runner") == [(number.name, 1)]
        if phase in BUSY:  # the stop is nobody's failure
            told = "select o.task, o.failures, a.outcome from objects o join attempts a using (object_id)"
            assert rows(tmp_path, told) == [("pending", 0, "lost")]


@pytest.mark.parametrize(
    ("phase", "number"), [*((phase, signal.SIGTERM) for phase in BUSY), ("in a command", signal.SIGINT)]
)
def test_second_signal_ends_it_at_once(phase, number, tmp_path):
    with running(phase, tmp_path, grace=60) as process:
        process.send_signal(number)
        wait_until(lambda: " stopping " in process.stderr.readline())
        process.send_signal(number)
        assert process.wait(MARGIN) == 130
        wait_until(lambda: not processes_of(tmp_path), MARGIN)
        assert holder(tmp_path) is None
        assert rows(tmp_path, "select state from queue") == [("running",)]  # until the next start


def test_signals_of_two_kinds_count_as_two(tmp_path):
    with running("in a call", tmp_path, grace=60) as process:
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: " stopping " in process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(MARGIN) == 130


@pytest.mark.parametrize("phase", PHASES)
def test_after_kill_the_next_start_requeues(phase, tmp_path):
    with prepared(phase, tmp_path, 0.3) as scene:
        first = scene.begin()
        try:
            wait_until(scene.is_reached)
            first.kill()
            assert stopped(first)[0] == -signal.SIGKILL
            assert holder(tmp_path) is None
            left = processes_of(tmp_path)
            assert bool(left) == phase.startswith("in a ")
            second = scene.begin()
            line = second.stderr.readline()
            assert " start " in line, line
            assert ("requeued=1" in line) == (phase in BUSY)
            assert ("ended=" in line) == bool(left)
            wait_until(lambda: not set(left) & set(processes_of(tmp_path)))
            lost = [("lost", "the runner crashed")] if phase in BUSY else []
            assert rows(tmp_path, "select outcome, error from attempts where outcome != 'running'") == lost
            wait_until(lambda: rows(tmp_path, "select count(*) > 1 from reconciliations") == [(1,)])
            second.terminate()
            assert stopped(second, 0.3 + MARGIN)[0] == 0
            asked = phase in ("fetching", "storing")  # a request of the dead counts until its time is over
            assert what_is_left(tmp_path) == {**NOTHING, "open requests": int(asked)}
        finally:
            clear_away(tmp_path)


def test_under_nohup_a_hangup_stays_ignored(tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    process = begin(tmp_path, before=["nohup"])
    try:
        wait_until(lambda: has_begun(tmp_path))
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)  # were the first one taken, this would be the second
        assert stopped(process)[0] == 0
        assert rows(tmp_path, "select note from runner") == [("SIGTERM",)]
    finally:
        clear_away(tmp_path)


def test_attempt_that_ends_in_the_grace_time_is_kept(tmp_path):
    (tmp_path / "slow.sh").write_text('touch running; sleep 0.5; echo thing > "$ADCE_OUTPUT"')
    write_box(tmp_path, way='command: [sh, slow.sh, "{name}"]', grace=30)
    process = begin(tmp_path)
    try:
        wait_until((tmp_path / "running").exists)
        process.terminate()
        assert stopped(process)[0] == 0
        assert rows(tmp_path, "select state from objects_now") == [("present",)]
        assert (tmp_path / "lake/things/A").read_text() == "thing\n"
        assert what_is_left(tmp_path) == NOTHING
    finally:
        clear_away(tmp_path)


def test_signal_stops_a_start_that_waits_for_the_store(tmp_path):
    """A store that takes the first question and never answers."""
    with HeldBucket(["use"]) as bucket:
        write_box(tmp_path, store="s3://lake")
        process = begin(tmp_path, **bucket.environment)
        try:
            wait_until(lambda: "use" in bucket.seen)
            process.terminate()
            assert process.wait(SOON) == 0
        finally:
            clear_away(tmp_path)
            process.communicate()


@contextlib.contextmanager
def somebody_writing(folder: Path) -> Iterator[None]:
    """Another program begins a transaction and does not end it."""
    connection = sqlite3.connect(folder / "adce.db", isolation_level=None, timeout=10)
    connection.execute("begin immediate")
    try:
        yield
    finally:
        connection.execute("rollback")
        connection.close()


@pytest.mark.parametrize("is_second", [False, True])
def test_signal_while_another_program_holds_the_database(is_second, tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path, more="queue_check_seconds: 0.05")
    process = begin(tmp_path)
    try:
        wait_until(lambda: has_begun(tmp_path))
        with somebody_writing(tmp_path):
            process.terminate()
            if is_second:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)  # or else the kernel may make one of both
                process.send_signal(signal.SIGINT)
            assert process.wait(SOON) == (130 if is_second else 0)
    finally:
        clear_away(tmp_path)
        process.communicate()


def test_first_signal_after_the_time_was_up_still_lets_attempts_finish(tmp_path):
    """`run --max-minutes` is in its grace time; nobody has sent a signal yet."""
    (tmp_path / "slow.sh").write_text('touch running; sleep 1.5; echo thing > "$ADCE_OUTPUT"')
    write_box(tmp_path, way='command: [sh, slow.sh, "{name}"]', grace=30)
    process = begin(tmp_path, "run", "--max-minutes", "0.01")
    try:
        wait_until(lambda: " stopping " in process.stderr.readline())
        process.terminate()
        assert process.wait(20) == 0
        assert rows(tmp_path, "select state from objects_now") == [("present",)]
    finally:
        clear_away(tmp_path)
        process.communicate()


def test_interrupted_cycle_is_no_complete_one(tmp_path):
    """Ctrl-C in the middle of a listing: nobody knows what is missing."""
    with HeldBucket(["list"]) as bucket:
        write_box(tmp_path, store="s3://lake")
        process = begin(tmp_path, "reconcile", **bucket.environment)
        try:
            wait_until(lambda: "list" in bucket.seen)
            process.send_signal(signal.SIGINT)
            code, err = stopped(process)
            assert (code, "Traceback" in err) == (130, False)
            assert rows(tmp_path, "select count(*) from cycles where error is null") == [(0,)]
        finally:
            clear_away(tmp_path)
