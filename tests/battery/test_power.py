"""The power fails while the program works: what it has told as done is there afterwards, whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from battery.scene import LAUNCHERS, Scene, poll

SHUT_DOWN = 0x8004587D  # the ioctl that cuts a file system off from its disk
WITHOUT_FLUSH = struct.pack("I", 2)
WRITER = """
import sqlite3, sys
sql = sqlite3.connect(sys.argv[1], isolation_level=None)
sql.execute("pragma journal_mode = wal")
sql.execute("pragma synchronous = " + sys.argv[2])
sql.execute("create table told (number integer primary key)")
while True:
    print(sql.execute("insert into told default values").lastrowid, flush=True)
"""
FORMATS = {"ext4": (64, ["mkfs.ext4", "-q", "-F"]), "xfs": (400, ["mkfs.xfs", "-q", "-f"])}


def obey(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def why_not(kind: str) -> str | None:
    """Why there can be no such disk on this machine."""
    if os.geteuid():
        return "only root can mount a file system"
    if not os.path.exists("/dev/loop-control"):  # noqa: PTH110
        return "this machine has no loop devices"
    if not shutil.which(FORMATS[kind][1][0]):
        return f"{FORMATS[kind][1][0]} is not installed"
    return None


class Disk:
    """A file system in a file, whose power can be cut."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.image, self.root = folder / f"{kind}.img", folder / f"{kind}.mounted"
        self.root.mkdir()
        self.is_mounted = False
        megabytes, words = FORMATS[kind]
        with self.image.open("wb") as file:
            file.truncate(megabytes << 20)
        obey(*words, self.image)

    def mount(self) -> None:
        obey("mount", "-o", "loop", self.image, self.root)
        self.is_mounted = True

    def unmount(self) -> None:
        if self.is_mounted:
            obey("umount", self.root)
        self.is_mounted = False

    def cut(self, process: subprocess.Popen[str]) -> None:
        """From now on nothing reaches the disk, and what is only in memory is lost. The program that writes to it
        stands still by then: an fsync that such a cut meets on its way succeeds, and has saved nothing."""
        process.send_signal(signal.SIGSTOP)
        poll(lambda: thread_states(process.pid) <= {"T"}, what="the stop of each thread")
        place = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(place, SHUT_DOWN, WITHOUT_FLUSH)
        finally:
            os.close(place)


def thread_states(number: int) -> set[str]:
    """T is stopped: a thread in the middle of an fsync is so only after it. None of a process that has ended."""
    found = set()
    for place in Path(f"/proc/{number}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended
            found.add(place.read_text().rpartition(")")[2].split()[0])
    return found - {"X", "Z"}


@pytest.fixture
def disk(request, tmp_path) -> Iterator[Disk]:
    if reason := why_not(request.param):
        pytest.skip(reason)
    disk = Disk(tmp_path, request.param)
    disk.mount()
    yield disk
    disk.unmount()


def cut_power_often(disk: Disk, folder: Path, cuts: int, seed: int, launcher: Sequence[str | Path] = ()) -> int:
    """Each time the power fails while a new lake fills. Returns how many objects had been told as done."""
    dice, told = random.Random(seed), 0
    for cut in range(cuts):
        place = disk.root / str(cut)
        place.mkdir()
        os.sync()
        options = {"days": 8, "latency_seconds": (0.0, 0.05), "seed": seed + cut}
        with Scene(folder / str(cut), database=place / "adce.db", store=place / "lake", **options) as scene:
            process = scene.start("-v", "run", launcher=launcher)
            wait_for_told(scene, process, dice.randint(0, 14))
            time.sleep(dice.uniform(0, 0.05))  # the power fails at any moment
            disk.cut(process)
            scene.end(process)
            disk.unmount()
            disk.mount()
            told += len(scene.told())
            try:
                if scene.database.exists():
                    check_disk_after_cut(scene)
                scene.recover()
            except Exception as error:
                raise AssertionError(f"seed {seed}, cut {cut}, {len(scene.told())} told as done") from error
        shutil.rmtree(place)
    return told


def wait_for_told(scene: Scene, process: subprocess.Popen[str], wanted: int) -> None:
    with contextlib.suppress(AssertionError):  # there may never be so many
        poll(lambda: len(scene.told()) >= wanted or process.poll() is not None, 5)


def check_disk_after_cut(scene: Scene) -> None:
    """Before anything was mended: the database may be as young as its first moment, never less than what was told."""
    empty = [path for path in scene.store.rglob("*.json") if not path.stat().st_size]
    assert not empty, f"empty objects: {empty}"
    if scene.told():
        scene.judge()


def lost_commits(disk: Disk, log: Path, synchronous: str, seed: int) -> int:
    """How many of the commits that a program has told of, which does nothing else, one power cut takes."""
    dice, database = random.Random(seed), disk.root / f"{seed}.db"
    os.sync()
    with log.open("w", encoding="utf-8") as out:
        words = [sys.executable, "-c", WRITER, str(database), synchronous]
        process = subprocess.Popen(words, stdout=out, text=True)
    try:
        poll(log.read_text)
        time.sleep(dice.uniform(0, 0.05))
        disk.cut(process)
    finally:
        process.kill()
        process.wait()
    disk.unmount()
    disk.mount()
    told = int(log.read_text().split()[-1])
    return max(0, told - last_commit(database))  # there may be one that is not told yet


def last_commit(database: Path) -> int:
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(database)) as sql:
        return sql.execute("select max(number) from told").fetchone()[0] or 0
    return 0


@pytest.mark.parametrize("disk", FORMATS, indirect=True)
def test_power_cut_as_it_is_made_here_takes_only_what_is_not_synced(disk, tmp_path):
    """Without the program: where this fails, the other tests of this file prove nothing."""
    assert [lost_commits(disk, tmp_path / "told", "full", seed) for seed in range(10)] == [0] * 10
    assert lost_commits(disk, tmp_path / "told", "off", seed=10) > 0


@pytest.mark.parametrize("disk", FORMATS, indirect=True)
def test_power_cut_takes_nothing_that_was_told_as_done(disk, tmp_path):
    assert cut_power_often(disk, tmp_path, cuts=2, seed=1) > 0


@pytest.mark.parametrize("disk", FORMATS, indirect=True)
def test_power_cut_takes_objects_from_a_program_that_does_not_sync(disk, tmp_path):
    launcher = [LAUNCHERS / "patched.py", "os.fsync = lambda _: None"]
    with pytest.raises(AssertionError, match="told as done") as caught:
        cut_power_often(disk, tmp_path, cuts=5, seed=1, launcher=launcher)
    assert "A: " in str(caught.value.__cause__) or "empty objects" in str(caught.value.__cause__)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("disk", FORMATS, indirect=True)
def test_twenty_power_cuts_take_nothing_that_was_told_as_done(disk, tmp_path):
    assert cut_power_often(disk, tmp_path, cuts=20, seed=100) > 20
