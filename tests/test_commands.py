"""The command line as a user types it."""

from __future__ import annotations

import configparser
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, run_adce
from lakes import write_league
from upstream import Answer, League, Upstream

import adce

READING = ("report", "status", "tasks", "coverage", "check", "plan", "task 1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small lake with a gap, and its upstream gone."""
    folder = tmp_path_factory.mktemp("lake")
    with Upstream() as upstream:
        League(date(2025, 1, 1), 6, games_per_day=(1, 2), seed=5).serve(upstream)
        upstream.answer("/scoreboard?dates=20250104", Answer(b"trouble", 500))
        write_league(folder, upstream.address)
        assert run_adce("run", "--once", folder=folder).returncode == 3
    return folder


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("style", adce.FORMATS)
def test_every_command_that_prints_data_has_every_format(command, style, folder):
    done = run_adce(*command.split(), "--format", style, folder=folder, LANG="C", COLUMNS="20", NO_COLOR="1")
    assert done.returncode == (4 if command == "status" else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    if style == "json":
        assert json.loads(done.stdout) is not None
    if style == "csv":
        assert len(list(csv.reader(io.StringIO(done.stdout)))) > 1


def test_options_stand_before_or_after_the_command(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for words in (("-c", str(folder / "adce.yaml"), "coverage"), ("coverage", "-c", str(folder / "adce.yaml"))):
        done = run_adce(*words, "--format", "json", folder=elsewhere)
        assert {row["dataset"] for row in json.loads(done.stdout)} == {"days", "games"}
    assert list(elsewhere.iterdir()) == []


def test_configuration_may_be_named_by_the_environment(folder, tmp_path):
    done = run_adce("status", folder=tmp_path, ADCE_CONFIG=str(folder / "adce.yaml"))
    assert done.returncode == 4
    assert str(folder) in done.stdout


def test_another_database_may_be_named(folder, tmp_path):
    done = run_adce("report", "--db", str(tmp_path / "other.db"), folder=folder)
    assert done.returncode == 10
    assert "there is no database" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("fly",),
        ("run", "--fast"),
        ("task",),
        ("task", "x"),
        ("tasks", "--state", "odd"),
        ("run", "--interval-minutes", "0"),
        ("report", "--since", "soon"),
    ],
)
def test_wrong_usage_ends_with_2(words, folder):
    done = run_adce(*words, folder=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage:")


@pytest.mark.parametrize("command", ["report", "status", "tasks", "coverage", "task 1"])
def test_without_a_database_there_is_nothing_to_show(command, tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    done = run_adce(*command.split(), folder=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert "Try: start with: adce.py run" in done.stderr


def test_task_that_does_not_exist_is_told(folder):
    done = run_adce("task", "4711", folder=folder)
    assert (done.returncode, done.stderr) == (1, "adce.py: there is no task 4711\nTry: see: adce.py tasks\n")


def test_report_tells_what_is_missing_and_what_to_do_next(folder):
    done = run_adce("report", folder=folder)
    assert "HTTP 500: trouble" in done.stdout
    assert "adce.py plan" in done.stderr
    assert run_adce("report", "-q", folder=folder).stderr == ""


def test_tasks_are_filtered(folder):
    for words, count in (
        (("--state", "retry"), 1),
        (("--state", "gave_up"), 0),
        (("--dataset", "games"), 0),
        (("--source", "league"), 1),
    ):
        done = run_adce("tasks", *words, "--format", "json", folder=folder)
        assert len(json.loads(done.stdout)) == count, words


def test_plan_writes_nothing_and_names_what_the_next_run_attempts(tmp_path):
    with Upstream() as upstream:
        league = League(date(2025, 1, 1), 6, games_per_day=(1, 1), seed=5)
        league.serve(upstream)
        write_league(tmp_path, upstream.address)
        planned = run_adce("plan", "--most", "50", "--format", "json", folder=tmp_path)
        assert planned.returncode == 0, planned.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["adce.yaml"]
        assert upstream.count() == 0
        assert run_adce("run", "--once", folder=tmp_path).returncode == 0
        asked = [arrival.path for arrival in upstream.arrivals if arrival.path.startswith("/scoreboard")]
    keys = [row["key"] for row in json.loads(planned.stdout)["first"]]
    assert keys == [f"days/{path.rpartition('=')[2]}.json" for path in sorted(asked)]


def test_plan_leaves_an_existing_database_as_it_is(folder):
    before = (folder / "adce.db").read_bytes()
    assert run_adce("run", "--dry-run", folder=folder).returncode == 0
    assert (folder / "adce.db").read_bytes() == before


def test_reconcile_tells_by_its_exit_code_whether_there_are_gaps(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9", last=1)
    assert run_adce("reconcile", folder=tmp_path).returncode == 3
    (tmp_path / "lake/days").mkdir()
    body = json.dumps({"leagues": [{"id": "46"}], "events": [], "padding": "x" * 500})
    (tmp_path / "lake/days/20250101.json").write_text(body)
    assert run_adce("reconcile", folder=tmp_path).returncode == 0
    done = run_adce("reconcile", "--believe", "dayz", folder=tmp_path)
    assert (done.returncode, 'did you mean "days"?' in done.stderr) == (1, True)


def test_unusable_store_ends_with_12(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "lake").write_text("a file in its place")
    done = run_adce("run", "--once", folder=tmp_path)
    assert done.returncode == 12
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_finds_a_broken_database_and_a_store_that_is_none(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    assert run_adce("check", folder=tmp_path).returncode == 0
    (tmp_path / "adce.db").write_text("not a database at all" * 100)
    (tmp_path / "lake").write_text("a file in its place")
    done = run_adce("check", "--online", "--format", "json", folder=tmp_path)
    failed = {row["what"] for row in json.loads(done.stdout) if row["result"] == "FAIL"}
    assert (done.returncode, failed) == (1, {"database", "store", "source league"})


def test_reader_that_leaves_early_is_no_error(folder):
    words = f"{sys.executable} {ROOT / 'adce.py'} tasks --format json | head -c 5; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", words], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(adce.EXAMPLES))
def test_example_names_real_paths(name, folder):
    done = run_adce("example", name, folder=folder)
    assert done.returncode == 0
    assert str(ROOT / "adce.py") in done.stdout
    assert str(folder / "adce.yaml") in done.stdout


def test_unit_is_one_that_systemd_takes(folder, tmp_path):
    unit = tmp_path / "adce.service"
    unit.write_text(run_adce("example", "systemd", folder=folder).stdout)
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    assert parser["Service"]["ExecStart"].endswith(" run")
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        assert "adce.service" not in done.stderr, done.stderr


def test_crontab_line_works_in_the_empty_environment_of_cron(folder):
    line = run_adce("example", "cron", folder=folder).stdout.splitlines()[-1]
    command = line.split(None, 5)[5]
    done = subprocess.run(
        ["/bin/sh", "-c", command], env={"PATH": "/usr/bin:/bin"}, cwd="/", capture_output=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr


def test_every_command_is_in_the_help(folder):
    text = run_adce("--help", folder=folder).stdout
    assert [command.name for command in adce.COMMANDS if f"    {command.name} " not in text] == []
    assert os.environ.get("ADCE_CONFIG") is None
    assert isinstance(folder, Path)
