"""The whole runner stands still for longer than its permits live, as on a machine that is suspended, and goes on."""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from battery.scene import LAUNCHERS, Scene, poll

SHORT_PERMITS = "adce.SEND_WITHIN_SECONDS = adce.RELEASE_WITHIN_SECONDS = 1"
PATCHED = [LAUNCHERS / "patched.py", SHORT_PERMITS]
LIFE = 3.0  # of a permit: to be sent within 1 s, answered within 1 s, its end noted within 1 s
SEVERAL = {"days": 12, "per_second": 8, "latency_seconds": (0.0, 0.3)}


def with_short_waits(scene: Scene, pause: int) -> None:
    path = scene.folder / "adce.yaml"
    waits = f"timeout_seconds: 1\n    blocked_when: {{pause_seconds: {pause}}}"
    path.write_text(path.read_text().replace("timeout_seconds: 5", waits))


def ask_meanwhile(scene: Scene, seconds: float) -> subprocess.Popen[str]:
    """Another program that asks the same source as often as it may."""
    words = [sys.executable, ROOT / "tests" / "asker.py", scene.folder / "adce.yaml", "league", "2", str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)


def holds_nothing(database: Path) -> bool:
    """Whether others can write to the database."""
    with contextlib.closing(sqlite3.connect(database, timeout=0.1, isolation_level=None)) as sql:
        try:
            sql.execute("begin immediate")
        except sqlite3.OperationalError:
            return False
        return True


def stop_outside_a_transaction(scene: Scene, process: subprocess.Popen[str]) -> None:
    for _ in range(200):
        process.send_signal(signal.SIGSTOP)
        poll(lambda: is_stopped(process))
        if holds_nothing(scene.database):
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("it always holds a transaction")


def is_stopped(process: subprocess.Popen[str]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def finish(scene: Scene, process: subprocess.Popen[str]) -> None:
    poll(scene.is_complete, 60, "the lake is complete")
    process.terminate()
    assert scene.end(process, 20) == 0
    scene.recover()


def stand_still(scene: Scene, stops: int, seed: int) -> None:
    dice = random.Random(seed)
    with_short_waits(scene, pause=1)
    process = scene.start("-v", "run", launcher=PATCHED)
    for _ in range(stops):
        told = len(scene.told())
        poll(lambda told=told: len(scene.told()) > told or scene.is_complete())
        time.sleep(dice.uniform(0, 0.3))  # it stops at any moment
        stop_outside_a_transaction(scene, process)
        with ask_meanwhile(scene, LIFE + 0.5) as other:
            other.wait(30)
        process.send_signal(signal.SIGCONT)
    assert scene.upstream.count("/x") >= stops
    finish(scene, process)


def test_runner_that_stood_still_breaks_no_limit_and_loses_nothing(tmp_path):
    with Scene(tmp_path, **SEVERAL) as scene:
        stand_still(scene, stops=2, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2, 7))
def test_runner_that_stood_still_often_breaks_no_limit_and_loses_nothing(seed, tmp_path):
    with Scene(tmp_path, **{**SEVERAL, "days": 20, "seed": seed}) as scene:
        stand_still(scene, stops=8, seed=seed)


def test_request_whose_permit_ran_out_just_before_it_is_sent_is_not_sent(tmp_path):
    """By then others may have used what it would have: sent, it would be one too many."""
    with Scene(tmp_path, per_second=3) as scene:
        with_short_waits(scene, pause=1)
        path = scene.folder / "adce.yaml"
        path.write_text(path.read_text().replace("scrapers: 5", "scrapers: 1"))
        process = scene.start("-v", "run", launcher=[LAUNCHERS / "stopping.py"])
        poll(lambda: is_stopped(process))
        time.sleep(LIFE)
        process.send_signal(signal.SIGCONT)
        finish(scene, process)
        assert "the permit expired before the request was sent" in scene.said()
        assert len(scene.history.events("asked")) == len(scene.expected)
