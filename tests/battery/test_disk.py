"""Disks that are full, slow or broken: told, borne, and forgotten when they are well again."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from battery.scene import LAUNCHERS, Scene, children_of, poll

SHORT_WAITS = "adce.TROUBLE_SECONDS = adce.BEAT_SECONDS = adce.FIRST_PAUSE_SECONDS = 1"
LAUNCHER = [LAUNCHERS / "patched.py", SHORT_WAITS]
FULL_SECONDS = 5
SLOW_ANSWERS = {"days": 8, "latency_seconds": (0.3, 0.4)}


class SmallDisk:
    """A file system in memory, and a ballast that fills it."""

    def __init__(self, root: Path, size: str) -> None:
        self.root, self.ballast = root, root / "ballast"
        root.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root], check=True, timeout=20)

    def fill(self) -> None:
        with contextlib.suppress(OSError), self.ballast.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    disk = SmallDisk(tmp_path / "disk", "4m")
    yield disk
    subprocess.run(["umount", "-l", disk.root], check=True, timeout=20)


def lines_within(scene: Scene, disk: SmallDisk, reason: str) -> list[str]:
    """What is told while the disk is full: the reason among it, again and again."""
    before = len(scene.said().splitlines())
    disk.fill()
    poll(lambda: disk.fill() or re.search(reason, scene.said()), 20, f"{reason!r} in the log")
    until = time.monotonic() + FULL_SECONDS
    while time.monotonic() < until:
        disk.fill()  # what was given free meanwhile
        time.sleep(0.1)
    return scene.said().splitlines()[before:]


def stop(scene: Scene, process: subprocess.Popen[str]) -> int:
    process.terminate()
    return scene.end(process, 20)


def test_full_disk_of_the_database_is_told_seldom_and_work_goes_on_when_there_is_room(disk, tmp_path):
    with Scene(tmp_path / "scene", database=disk.root / "adce.db", **SLOW_ANSWERS) as scene:
        process = scene.start("-v", "run", launcher=LAUNCHER)
        poll(lambda: len(scene.told()) >= 2)
        lines = lines_within(scene, disk, "SQLITE_FULL")
        troubles = [line for line in lines if "SQLITE_FULL" in line]
        assert all("free some disk space" in line for line in troubles)
        assert len(troubles) <= 4 * FULL_SECONDS, troubles
        poll(lambda: disk.fill() or scene.run("health") == 4, 20, "health says that the disk is full")
        assert "adce.db: database or disk is full (SQLITE_FULL)" in scene.said()
        assert not scene.is_complete()
        disk.free()
        poll(scene.is_complete, 30, "the lake is complete")
        assert stop(scene, process) == 0
        assert "Traceback" not in scene.said()
        scene.recover()


def test_runner_on_a_full_disk_stops_in_time_and_the_next_goes_on(disk, tmp_path):
    with Scene(tmp_path / "scene", database=disk.root / "adce.db", **SLOW_ANSWERS) as scene:
        process = scene.start("-v", "run", launcher=LAUNCHER)
        poll(lambda: len(scene.told()) >= 2)
        lines_within(scene, disk, "SQLITE_FULL")
        started = time.monotonic()
        stop(scene, process)
        assert time.monotonic() - started < 8
        assert "Traceback" not in scene.said()
        disk.free()
        scene.recover()


def test_first_start_on_a_full_disk_is_an_error_in_words_and_the_next_goes_on(disk, tmp_path):
    with Scene(tmp_path / "scene", database=disk.root / "adce.db") as scene:
        disk.fill()
        assert scene.run("run", "--once") == 1
        assert re.search(
            r"adce.py: .*adce.db: database or disk is full .SQLITE_FULL.\nTry: free some disk space", scene.said()
        )
        assert "Traceback" not in scene.said()
        disk.free()
        scene.recover()


def test_full_disk_of_the_store_is_told_seldom_and_work_goes_on_when_there_is_room(disk, tmp_path):
    with Scene(tmp_path / "scene", store=disk.root / "lake", **SLOW_ANSWERS) as scene:
        process = scene.start("-v", "run", launcher=LAUNCHER)
        poll(lambda: len(scene.told()) >= 2)
        lines = lines_within(scene, disk, r"paused source=global .*cannot be written: No space left on device")
        assert len(lines) <= 10 * FULL_SECONDS, lines
        asked = scene.upstream.count()
        assert asked <= len(scene.expected) * 2
        disk.free()
        poll(scene.is_complete, 60, "the lake is complete")
        assert stop(scene, process) == 0
        scene.recover()


def test_full_disk_of_the_log_stops_nothing_and_later_lines_are_whole(disk, tmp_path):
    log = disk.root / "adce.log"
    with Scene(tmp_path / "scene", **SLOW_ANSWERS) as scene:
        process = scene.start("-v", "run", "--log", str(log), launcher=LAUNCHER)
        poll(lambda: log.exists() and " done " in log.read_text())
        disk.fill()
        poll(scene.is_complete, 30, "the lake is complete")
        disk.free()
        assert stop(scene, process) == 0
        assert re.search(r"^\S+ INFO  stop reason=SIGTERM$", log.read_text(), re.MULTILINE)
        assert scene.said() == ""
        scene.recover()


FAULTS = [("pwrite64", "EIO"), ("pwrite64", "ENOSPC"), ("fsync", "EIO"), ("fdatasync", "EIO"), ("write", "ENOSPC")]


def fail_at(folder: Path, call: str, error: str, number: int) -> bool:
    """The n-th of some system calls of each thread fails; the program bears it, or says what is wrong and ends.
    Returns whether it went on by itself."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    fault = f"inject={call}:error={error}:when={number}"
    with Scene(folder, latency_seconds=(0.0, 0.02)) as scene:
        before = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", fault]
        process = scene.start("-v", "run", launcher=LAUNCHER, before=before)
        poll(lambda: scene.is_complete() or process.poll() is not None, 40, f"{fault}: the lake is complete or an end")
        went_on = process.poll() is None
        for child in children_of(process.pid):
            os.kill(child, signal.SIGTERM)
        code = scene.end(process, 30)
        said = scene.said()
        assert "Traceback" not in said, f"{fault}\n{said[-3000:]}"
        assert (
            went_on
            or (code not in (0, 99) and f"{os.strerror(getattr(errno, error))}" in said)
            or (code != 0 and re.search(r"adce.py: .*(disk I/O error|disk is full)", said))
        ), f"{fault}: exit code {code}\n{said[-3000:]}"
        try:
            scene.recover()
        except AssertionError as problem:
            raise AssertionError(fault) from problem
    shutil.rmtree(folder)
    return went_on


@pytest.mark.parametrize(("call", "error"), FAULTS)
def test_fault_of_the_disk_loses_nothing(call, error, tmp_path):
    numbers = {"pwrite64": (210, 250), "fsync": (2, 3), "fdatasync": (9, 15), "write": (1, 3)}[call]
    assert [fail_at(tmp_path / str(number), call, error, number) for number in numbers].count(True)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("call", "error"), FAULTS)
def test_no_fault_of_the_disk_loses_anything(call, error, tmp_path):
    numbers = {"pwrite64": range(1, 310, 6), "fsync": range(1, 12), "fdatasync": range(1, 30, 2), "write": range(1, 20)}
    for number in numbers[call]:
        fail_at(tmp_path / str(number), call, error, number)


def test_slow_disk_makes_nobody_fail(tmp_path):
    """Each sync takes a fifth of a second, while others ask for permits."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    calls = "fsync,fdatasync"
    slow = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={calls}",
        "-e",
        f"inject={calls}:delay_enter=200000",
    ]
    with Scene(tmp_path, days=3, per_second=20) as scene:
        runner = scene.start("-v", "run", "--once", before=slow)
        poll(scene.told)
        others = [scene.start("acquire", "league", "--wait", "30s", "--", "true", before=slow) for _ in range(4)]
        codes = [scene.end(process, 60) for process in [*others, runner]]
        assert codes == [0] * 5, scene.said()
        assert not re.search("BUSY|locked|Traceback", scene.said())
        scene.recover()
