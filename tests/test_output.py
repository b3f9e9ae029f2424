"""What each command prints is fit for pipes, narrow terminals and old encodings."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, run_adce
from lakes import write_league
from upstream import League

SHOWING = [
    "plan",
    "report",
    "report --since 90d",
    "status",
    "health",
    "tasks",
    "task 1",
    "coverage",
    "coverage --by-day",
    "check",
]
TEXTS = [
    "example systemd",
    "example cron",
    "example alerts",
    "example grafana",
    "example launchd",
    "example config",
    "--help",
    "run --help",
]


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Path:
    from upstream import Upstream

    folder = tmp_path_factory.mktemp("lake")
    with Upstream() as upstream:
        League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3).serve(upstream)
        write_league(folder, upstream.address)
        assert run_adce("run", "--once", "-q", folder=folder).returncode == 0
    (folder / "lake" / "days" / "20250102.json").unlink()
    run_adce("reconcile", "-q", folder=folder)
    return folder


C_LOCALE = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "80"}


@pytest.mark.parametrize(
    ("line", "settings"),
    [*((line, C_LOCALE) for line in SHOWING + TEXTS), *((line, {"TERM": "xterm"}) for line in ("report", "--help"))],
)
def test_output_in_a_pipe_has_no_control_characters_in_any_locale(line, settings, lake):
    done = run_adce(*line.split(), folder=lake, **settings)
    assert done.returncode in (0, 1, 4), done.stderr
    assert [letter for letter in done.stdout if not letter.isprintable() and letter != "\n"] == [], line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", ["status", "task 1", "example grafana", "--help"])
def test_reader_that_has_seen_enough_is_no_error(line, lake):
    command = [sys.executable, str(ROOT / "adce.py"), *line.split()]
    writer = subprocess.Popen(command, cwd=lake, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
    assert writer.stdout and writer.stderr
    writer.stdout.readline()
    writer.stdout.close()
    with writer.stderr:
        assert b"Traceback" not in writer.stderr.read()
    assert writer.wait(20) in (0, 1, 4)
