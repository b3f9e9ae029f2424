"""A day in minutes: cycles every few seconds, losses, faults of the source, operators and other programs. What a runner
holds must not grow with the time for which it runs."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import statistics
import subprocess
import time
from pathlib import Path

import pytest

import adce
from battery.scene import Scene, poll

MEBIBYTE = 1 << 20
Sample = dict[str, float]


def sample(scene: Scene, process: subprocess.Popen[str], keep_seconds: float) -> Sample:
    """What the runner holds now; of rows, those that should have been forgotten for as long as they are kept."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    with contextlib.closing(sqlite3.connect(f"file:{scene.database}?mode=ro", uri=True, timeout=10)) as sql:
        outlived = "select count(*) from {} where {} < unixepoch() - ?"
        rows = sum(
            sql.execute(outlived.format(*kept), (2 * keep_seconds,)).fetchone()[0] for kept in KEPT_FOR_A_TIME.items()
        )
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir()),
        "threads": int(status["Threads"]),
        "log of writes": scene.database.with_name("adce.db-wal").stat().st_size / MEBIBYTE,
        "rows that outlive their time": rows,
    }


# of requests an hour is always kept, which no soak outlasts
KEPT_FOR_A_TIME = {"attempts": "started_at", "reconciliations": "started_at"}
# how much the last third may be above the middle one: MiB, descriptors, threads, MiB, rows
MAY_GROW = {
    "memory": 6,
    "descriptors": 4,
    "threads": 3,
    "log of writes": 4,
    "rows that outlive their time": adce.FORGOTTEN_AT_ONCE,
}


def disturb(scene: Scene, dice: random.Random) -> None:
    """What somebody else does in a second of this day."""
    there = sorted(path for folder in ("days", "games") for path in (scene.store / folder).glob("*"))
    for place in dice.sample(there, len(there) // 20):
        place.unlink()
    what = dice.random()
    if what < 0.1:
        scene.run("pause", "league", "--for", "1s")
    elif what < 0.2:
        scene.run("reconcile", "-q")
    elif what < 0.3:
        with contextlib.closing(sqlite3.connect(scene.database, isolation_level=None, timeout=10)) as other:
            other.execute("begin immediate")
            time.sleep(0.3)


def soak(folder: Path, seconds: float, keep_days: float) -> None:
    """Rows are kept for a third of the time, so that their number has to stop growing."""
    dice, samples = random.Random(1), list[Sample]()
    with Scene(folder, days=30, fault_share=0.1, latency_seconds=(0, 0.05), per_second=40) as scene:
        path = scene.folder / "adce.yaml"
        text = path.read_text().replace(
            "timeout_seconds: 5", "timeout_seconds: 1\n    blocked_when: {pause_seconds: 1}"
        )
        path.write_text(f"retention_days: {keep_days:.6f}\nreconciliation_interval_minutes: 0.05\n{text}")
        process = scene.start("run", launcher=["-c", QUICK])
        poll(scene.is_complete, 120)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            disturb(scene, dice)
            time.sleep(1)
            samples.append(sample(scene, process, keep_days * 86400))
        process.terminate()
        assert scene.end(process, 30) == 0
        scene.upstream.fault_share = 0
        scene.recover()
    third = len(samples) // 3
    for what, allowed in MAY_GROW.items():
        middle, last = (
            statistics.median(one[what] for one in part) for part in (samples[third:-third], samples[-third:])
        )
        assert last <= middle + allowed, f"{what}: {middle:.0f}, later {last:.0f}"


QUICK = "import sys, adce; adce.BEAT_SECONDS = adce.FIRST_PAUSE_SECONDS = 1; sys.exit(adce.main(sys.argv[1:]))"


def test_what_a_runner_holds_stops_growing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent.parent))
    soak(tmp_path, 24, keep_days=8 / 86400)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_a_runner_holds_stops_growing_all_day(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent.parent))
    soak(tmp_path, 900, keep_days=120 / 86400)
