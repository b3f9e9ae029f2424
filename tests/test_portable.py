"""A system without the facilities of Linux: everything works, some of it slower."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from runners import fill_box, processes_of, rows, wait_until, write_box

import adce

ELSEWHERE = "adce.PROC = adce.Path('/no/proc'); del adce.time.CLOCK_BOOTTIME"
ESCAPE = "setsid sleep 300 & echo $$ > running; sleep 300"

pytestmark = pytest.mark.skipif(not shutil.which("ps"), reason="there is no program ps")


@pytest.fixture(autouse=True)
def _clear(tmp_path) -> Iterator[None]:
    yield
    for number in processes_of(tmp_path):
        os.kill(number, signal.SIGKILL)


def begin(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The program as on another system."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/battery/patched.py"), ELSEWHERE, *words],
        cwd=folder,
        env={**os.environ, "FOLDER": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=20)
    return process.returncode, out + err


def write_escape(folder: Path, grace: float = 60) -> None:
    (folder / "escape.sh").write_text(ESCAPE)
    write_box(folder, way='command: [sh, escape.sh, "{name}"]', grace=grace)


def test_escaped_process_is_found_by_its_variables_also_with_spaces_in_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(adce, "PROC", tmp_path / "no proc")
    database = tmp_path / "a lake" / "adce.db"
    variables = {"ADCE_DB": str(database), "ADCE_TASK": "7"}
    with subprocess.Popen(["sleep", "300"], env=variables, start_new_session=True) as mine:
        assert adce.end_processes(str(database), "8") == 0
        assert adce.end_processes(str(tmp_path / "adce.db"), "7") == 0
        assert adce.end_processes(str(database), "7") == 1
        assert mine.wait(30) == -signal.SIGKILL


def test_orphans_of_a_killed_runner_are_ended_at_the_next_start(tmp_path):
    write_escape(tmp_path)
    first = begin(tmp_path, "run")
    wait_until((tmp_path / "running").exists)
    first.kill()
    end(first)
    left = processes_of(tmp_path)
    assert len(left) == 3
    fill_box(tmp_path, "A")
    second = begin(tmp_path, "run", "--once")
    code, said = end(second)
    assert (code, "ended=3" in said) == (0, True), said
    assert processes_of(tmp_path) == []


def test_second_signal_leaves_no_process(tmp_path):
    write_escape(tmp_path)
    process = begin(tmp_path, "run")
    wait_until((tmp_path / "running").exists)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: " stopping " in process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130
    wait_until(lambda: not processes_of(tmp_path))


def test_call_and_limits_work(tmp_path):
    (tmp_path / "a_scraper.py").write_text("import adce\ndef bring(name):\n    with adce.permit('box'): return b'x'\n")
    limits = "rate_limiting: {source_limits: {box: {requests_per_second: 2}}}"
    write_box(tmp_path, way='call: "a_scraper:bring"', names="A, B, C", more=limits)
    code, said = end(begin(tmp_path, "run", "--once"))
    assert (code, rows(tmp_path, "select outcome from recent_attempts")) == (0, [("ok",)] * 3), said


def test_check_says_what_is_weaker(tmp_path):
    write_box(tmp_path)
    code, said = end(begin(tmp_path, "check", "--format", "json"))
    found = {row["what"]: row for row in json.loads(said)}
    assert (code, "found by ps" in found["system"]["details"]) == (0, True)
    assert "unknown file system" in found["disk"]["details"]


def test_unit_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.setattr(adce, "PROC", tmp_path / "no proc")
    assert adce.own_unit() is None
