"""What those who have started the runner are told: systemd over its socket and its journal, a person in a file."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runners import (
    HeldBucket,
    command_line,
    do,
    fill_box,
    has_begun,
    holder,
    processes_of,
    rows,
    stopped,
    wait_until,
    write_box,
)
from upstream import Answer, Upstream, json_answer

import adce


class Manager:
    """The service manager's end of a notification socket."""

    def __init__(self, address: str) -> None:
        self.address, self.heard = address, list[tuple[float, str]]()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(re.sub("^@", "\0", address))

    def hear(self, seconds: float = 20) -> str | None:
        """The next message, or None when none comes in time."""
        self._socket.settimeout(seconds)
        try:
            self.heard.append((time.monotonic(), self._socket.recv(4096).decode()))
        except TimeoutError:
            return None
        return self.heard[-1][1]

    def hear_until(self, text: str, seconds: float = 20) -> str:
        """The first message that begins so."""
        deadline = time.monotonic() + seconds
        while not (message := self.hear(max(0.001, deadline - time.monotonic())) or "").startswith(text):
            assert time.monotonic() < deadline, self.heard
        return message

    def hear_nothing_more(self) -> None:
        """Take what has come already."""
        while self.hear(0.05):
            pass

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path) -> Iterator[Manager]:
    name = f"@adce-tests-{os.getpid()}-{tmp_path.name}" if request.param == "abstract" else str(tmp_path / "notify")
    manager = Manager(name)
    yield manager
    manager.close()


@pytest.fixture
def one_manager(tmp_path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a runner; whatever is left of it at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str, stderr: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command_line(*(words or ("run",))),
            cwd=tmp_path,
            env={**os.environ, "FOLDER": str(tmp_path), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for number in processes_of(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    for process in started:
        process.communicate()


HEALTH = "health_check: {enabled: true, port: 0}"


def test_ready_is_told_when_lock_database_and_port_are_there(manager, start, tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path, names="A, B", more=HEALTH)
    process = start(NOTIFY_SOCKET=manager.address)
    assert manager.hear() == "READY=1"
    process.send_signal(signal.SIGSTOP)  # whatever is there now was there before the message, or as good as that
    assert holder(tmp_path) == process.pid
    ((number, address),) = rows(tmp_path, "select pid, address from runner where stopped_at is null")
    assert number == process.pid
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    process.send_signal(signal.SIGCONT)
    process.terminate()
    manager.hear_until("STOPPING=1")
    assert stopped(process)[0] == 0
    manager.hear_nothing_more()
    told = [message for _, message in manager.heard]
    assert told.count("READY=1") == told.count("STOPPING=1") == 1


def test_status_tells_the_lake_in_one_line(one_manager, start, tmp_path):
    fill_box(tmp_path, "A", "B")
    write_box(tmp_path, names="A, B, C")
    start(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC="300000")
    wait_until(lambda: has_begun(tmp_path))
    one_manager.hear_nothing_more()
    message = one_manager.hear_until("WATCHDOG=1\nSTATUS=")
    assert message == "WATCHDOG=1\nSTATUS=66.66 %  1 missing of 3"


def test_start_that_fails_is_never_ready(one_manager, start, tmp_path):
    write_box(tmp_path)
    (tmp_path / "lake").write_text("a file in its place")
    process = start(NOTIFY_SOCKET=one_manager.address)
    assert stopped(process)[0] == 12
    assert one_manager.hear(0.05) is None


def test_second_runner_tells_the_manager_nothing(one_manager, start, tmp_path):
    write_box(tmp_path)
    start()
    wait_until(lambda: has_begun(tmp_path))
    assert stopped(start(NOTIFY_SOCKET=one_manager.address))[0] == 11
    assert one_manager.hear(0.05) is None


@pytest.mark.parametrize("held", [[], ["list"]])
def test_sign_of_life_comes_at_least_once_in_each_span(held, one_manager, start, tmp_path):
    """Idle, and while a listing takes for ever: that is not in the way of the main loop."""
    seconds = 4.0
    with HeldBucket(held) as bucket:
        fill_box(tmp_path, "A")
        write_box(tmp_path, store="s3://lake" if held else "lake")
        microseconds = str(int(seconds * 1e6))
        start(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC=microseconds, **bucket.environment)
        one_manager.hear_until("READY=1")
        for _ in range(2):
            one_manager.hear_until("WATCHDOG=1")
    instants = [instant for instant, _ in one_manager.heard]
    spans = [after - before for before, after in itertools.pairwise(instants)]
    assert max(spans) < seconds


def test_stopped_loop_gives_no_sign_of_life(one_manager, start, tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    process = start(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC="300000")
    one_manager.hear_until("WATCHDOG=1")
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: " T " in Path(f"/proc/{process.pid}/stat").read_text())
    one_manager.hear_nothing_more()
    assert one_manager.hear(1) is None
    process.send_signal(signal.SIGCONT)
    one_manager.hear_until("WATCHDOG=1")


def test_loop_that_cannot_write_gives_no_sign_of_life_until_it_can(one_manager, start, tmp_path):
    """Its threads are well, its main loop is not."""
    fill_box(tmp_path, "A")
    write_box(tmp_path, more=HEALTH)
    start(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC="300000")
    wait_until(lambda: has_begun(tmp_path))
    connection = sqlite3.connect(tmp_path / "adce.db", isolation_level=None, timeout=10)
    connection.execute("begin immediate")
    one_manager.hear_nothing_more()
    assert one_manager.hear(1) is None
    connection.execute("rollback")
    connection.close()
    one_manager.hear_until("WATCHDOG=1")


def test_signs_of_life_go_on_while_attempts_may_finish(one_manager, start, tmp_path):
    (tmp_path / "a_scraper.py").write_text("import threading\ndef wait(name): threading.Event().wait()\n")
    write_box(tmp_path, way='call: "a_scraper:wait"', grace=60)
    process = start(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC="300000")
    wait_until(lambda: rows(tmp_path, "select 1 from queue where state = 'running'"))
    process.terminate()
    one_manager.hear_until("STOPPING=1")
    for _ in range(3):
        one_manager.hear_until("WATCHDOG=1")
    process.terminate()
    assert stopped(process)[0] == 130


def test_watchdog_of_another_process_does_not_hurry_this_one(one_manager, start, tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    start(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC="300000", WATCHDOG_PID="1")
    wait_until(lambda: has_begun(tmp_path))
    one_manager.hear_nothing_more()
    assert one_manager.hear(1) is None


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens-here", "relative", "@", "/" + "x" * 300])
def test_socket_that_is_not_there_is_harmless(address, tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    done = do("run", "--once", folder=tmp_path, NOTIFY_SOCKET=address, WATCHDOG_USEC="nonsense")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_socket_that_nobody_reads_is_harmless(start, tmp_path):
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as deaf:
        deaf.bind(str(tmp_path / "notify"))
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        fill_box(tmp_path, "A")
        write_box(tmp_path)
        process = start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="30000")
        wait_until(lambda: has_begun(tmp_path))
        process.terminate()
        assert stopped(process)[0] == 0


def test_commands_do_not_speak_for_the_runner(one_manager, start, tmp_path):
    """What a scraper inherits holds no socket of the service manager."""
    write_box(tmp_path, way='command: [sh, -c, "env > $ADCE_OUTPUT"]')
    process = start("run", "--once", NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC="9000000")
    assert stopped(process)[0] == 0
    told = (tmp_path / "lake/things/A").read_text()
    assert "ADCE_TASK=" in told
    assert not re.search("NOTIFY_SOCKET|WATCHDOG", told)


NASTY = "a\nb\x1b[31mred\x07\r<3>forged\u2028end"
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO |WARN |ERROR) [a-z_]+( [a-z_]+=(\"[^\n]*\"|\S+))*")
JOURNAL_LINE = re.compile(r"<[3467]>[a-z_]+( [a-z_]+=(\"[^\n]*\"|\S+))*")


def nasty_upstream(upstream: Upstream) -> None:
    """It answers with everything that could spoil a line."""
    upstream.answer("/A", Answer(NASTY.encode(), 500))
    upstream.answer("/B", Answer(NASTY.encode(), 429, {"Retry-After": "1"}))
    upstream.answer("/C", json_answer({"ids": [NASTY]}))


NASTY_CHILDREN = """
  children: {source: box, key: "children/{id}", url: "/{id}", partitions: {from: things, ids: "ids[]", as: id}}
"""


def test_journal_gets_levels_and_no_times(start, tmp_path):
    with Upstream() as upstream:
        upstream.answer("/A", Answer(b"trouble", 500))
        upstream.answer("/B", Answer(b"thing B"))
        write_box(tmp_path, address=upstream.address, names="A, B", more="retry: {max_attempts: 1}")
        inside, outside = os.pipe()
        status = os.fstat(outside)
        start("run", "--once", "-v", stderr=outside, JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}").wait(20)
        os.close(outside)
        with os.fdopen(inside) as pipe:
            lines = pipe.read().splitlines()
    assert [line for line in lines if not JOURNAL_LINE.fullmatch(line)] == []
    events = {re.match(r"<\d>[a-z_]+", line)[0] for line in lines}
    assert events >= {"<6>start", "<6>cycle", "<7>done", "<3>gave_up", "<6>stop"}


def test_journal_stream_of_somebody_else_changes_nothing(start, tmp_path):
    """A shell inside a service inherits $JOURNAL_STREAM, and sends stderr elsewhere."""
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    other = tmp_path.stat()
    process = start("run", "--once", JOURNAL_STREAM=f"{other.st_dev}:{other.st_ino}")
    code, err = stopped(process)
    assert (code, [line for line in err.splitlines() if not LINE.fullmatch(line)]) == (0, [])


@pytest.mark.parametrize("journal", [True, False])
@pytest.mark.parametrize("way", ["url", "command", "call"])
def test_no_answer_spoils_a_line(way, journal, start, tmp_path):
    (tmp_path / "a_scraper.py").write_text(f"def fail(name): raise ValueError({NASTY!r})\n")
    (tmp_path / "fail.sh").write_text("printf 'a\\nb\\033[31mred\\r<3>forged' >&2; exit 1")
    ways = {"url": 'url: "/{name}"', "command": 'command: [sh, fail.sh, "{name}"]', "call": 'call: "a_scraper:fail"'}
    with Upstream() as upstream:
        nasty_upstream(upstream)
        limits = "retry: {max_attempts: 1}\nmax_concurrent_scrapers: 1"
        write_box(tmp_path, way=ways[way], address=upstream.address, names="C, A, B", more=limits)
        if way == "url":
            with (tmp_path / "adce.yaml").open("a") as file:
                file.write(NASTY_CHILDREN)
        errors = (tmp_path / "stderr").open("w+b")
        status = os.fstat(errors.fileno())
        stream = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"} if journal else {}
        process = start("run", "--once", "-v", stderr=errors.fileno(), **stream)
        process.wait(20)
        errors.close()
    told = (tmp_path / "stderr").read_bytes()
    shape = JOURNAL_LINE if journal else LINE
    assert [line for line in told.decode().split("\n")[:-1] if not shape.fullmatch(line)] == []
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", told)
    assert b"forged" in told


def test_log_file_is_for_its_owner_only_and_has_a_line_for_each_event(tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    done = do("run", "--once", "--log", "events.log", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    log = tmp_path / "events.log"
    assert log.stat().st_mode & 0o777 == 0o600
    lines = [line for line in log.read_text().split("\n") if line]
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert [line.split()[2] for line in lines] == ["start", "cycle", "stop"]
    do("run", "--once", "--log", "events.log", folder=tmp_path)
    assert len([line for line in log.read_text().split("\n") if line]) == 2 * len(lines)  # it is kept, not begun anew


def test_log_file_has_no_empty_lines(tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    assert do("run", "--once", "--log", "events.log", folder=tmp_path).returncode == 0
    assert "" not in (tmp_path / "events.log").read_text().splitlines()


@pytest.fixture
def filled_log(tmp_path, monkeypatch) -> Path:
    """Far more events than a log of 4 kB holds, written through a real journal."""
    monkeypatch.setattr(adce, "LOG_BYTES", 4096)
    old = os.umask(0o022)
    path = tmp_path / "events.log"
    log = adce.log_file(path)
    journal = adce.Journal(log)
    for number in range(1000):
        journal.write("INFO", "event", number=number, text="x" * 40)
    log.close()
    os.umask(old)
    return path


def test_log_file_is_bounded_and_keeps_the_latest(filled_log):
    files = sorted(filled_log.parent.glob("events.log*"))
    assert [path.name for path in files] == ["events.log", "events.log.1"]
    assert max(path.stat().st_size for path in files) <= 4096
    numbers = [int(number) for path in reversed(files) for number in re.findall(r"number=(\d+)", path.read_text())]
    assert numbers == list(range(numbers[0], 1000))
    assert all(LINE.fullmatch(line) for path in files for line in path.read_text().split("\n") if line)


def test_log_file_that_follows_a_full_one_is_for_its_owner_only_too(filled_log):
    assert {path.stat().st_mode & 0o777 for path in filled_log.parent.glob("events.log*")} == {0o600}


def test_full_disk_under_the_log_stops_nothing(tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path, names="A")
    done = do("run", "--once", "--log", "/dev/full", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(tmp_path, "select present from coverage") == [(1,)]


def test_log_that_cannot_be_written_is_told(tmp_path):
    write_box(tmp_path)
    done = do("run", "--log", "nowhere/events.log", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"adce.py: cannot write to {tmp_path}/nowhere/events.log: No such file")
    assert holder(tmp_path) is None


def test_every_level_has_its_prefix(tmp_path, monkeypatch):
    stream = (tmp_path / "stream").open("w+")
    status = os.fstat(stream.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    journal = adce.Journal(stream, "DEBUG")
    for level in adce.LEVELS:
        journal.write(level, "event", text=NASTY, empty="", none=None, number=0.5)
    stream.close()
    lines = (tmp_path / "stream").read_text().split("\n")[:-1]
    text = json.dumps(NASTY)
    assert lines == [f'{prefix}event text={text} empty="" number=0.5' for prefix in ("<7>", "<6>", "<4>", "<3>")]
    assert not adce.Journal(io.StringIO()).is_journald
