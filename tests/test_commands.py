"""The command line as a user types it."""

from __future__ import annotations

import configparser
import contextlib
import csv
import fcntl
import io
import json
import os
import plistlib
import pty
import re
import shlex
import shutil
import sqlite3
import struct
import subprocess
import sys
import termios
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, run_adce, start_adce
from lakes import write_league, write_widely
from upstream import Answer, League, Upstream

import adce

READING = ("report", "status", "health", "tasks", "coverage", "coverage --by-day", "check", "plan", "task 1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small lake with a gap, and its upstream gone."""
    folder = tmp_path_factory.mktemp("lake")
    with Upstream() as upstream:
        League(date(2025, 1, 1), 6, games_per_day=(1, 2), seed=5).serve(upstream)
        upstream.answer("/scoreboard?dates=20250104", Answer("trouble ü".encode(), 500))
        write_league(folder, upstream.address)
        assert run_adce("run", "--once", folder=folder).returncode == 3
    return folder


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("style", adce.FORMATS)
def test_every_command_that_prints_data_has_every_format(command, style, folder):
    command = "report cycles" if (command, style) == ("report", "csv") else command
    done = run_adce(*command.split(), "--format", style, folder=folder, LANG="C", COLUMNS="20", NO_COLOR="1")
    assert done.returncode == (4 if command in ("status", "health") else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.strip()
    if style == "json":
        assert json.loads(done.stdout) is not None
    if style == "csv":
        assert len(list(csv.reader(io.StringIO(done.stdout)))) > 1


def test_marks_have_colours_on_a_terminal_only(folder, monkeypatch):
    assert "\x1b[33mATTENTION\x1b[0m" in on_a_terminal("status", folder=folder, columns=100)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in on_a_terminal("status", folder=folder, columns=100)


def test_csv_of_several_tables_says_which_to_name(folder):
    done = run_adce("report", "--format", "csv", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search("report TABLE --format csv, of verdict, .*cycles", done.stderr)


def on_a_terminal(*words: str, folder: Path, columns: int, lines: int = 24) -> str:
    """What the program writes to a terminal of a size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "adce.py"), *words],
        cwd=folder,
        env={**environment, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while block := os.read(ours, 65536):
            written += block
    os.close(ours)
    process.wait()
    return written.decode().replace("\r\n", "\n")


def test_narrow_terminal_gets_no_line_that_wraps(folder):
    shown = on_a_terminal("tasks", folder=folder, columns=20).splitlines()
    assert max(map(len, shown)) == 20
    assert shown[0] == "1 open tasks"


def test_live_screen_fits_a_small_terminal(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    shown = on_a_terminal("run", "--max-minutes", "0.01", folder=tmp_path / "copy", columns=20, lines=6)
    painted, _, last = shown.rpartition("\x1b[J")
    assert max(len(line) for line in painted.replace("\x1b[J", "\n").split("\x1b[2K")) <= 20 + len("\n\n\x1b[5A")
    assert 'reason="--max-minutes reached"' in last
    assert "\x1b" not in last


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("option", ["-q", "-v", "--format=json", "--db=adce.db", "--config=adce.yaml"])
def test_option_stands_before_or_after_the_command(option, place, folder):
    done = run_adce(*((option, "tasks") if place == "before" else ("tasks", option)), folder=folder)
    assert (done.returncode, "days/20250104.json" in done.stdout) == (0, True)
    assert done.stdout.startswith("[") == (option == "--format=json")


def test_configuration_is_named_before_or_after_the_command(folder, tmp_path):
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
        ("run", "--yes"),
        ("reconcile", "--yes"),
        ("task",),
        ("tasks", "--state", "odd"),
        ("run", "--interval-minutes", "0"),
        ("report", "--since", "soon"),
        ("tasks", "--limit", "0"),
        ("plan", "--limit", "-1"),
        ("tasks", "--format", "xml"),
        ("report", "--conf", "adce.yaml"),
        ("example", "supervisord"),
    ],
)
def test_wrong_usage_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        adce.main(list(words))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("usage:")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("taks",), """invalid choice: 'taks', did you mean "tasks"?"""),
        (("tasks", "--state", "gaveup"), """invalid choice: 'gaveup', did you mean "gave_up"?"""),
        (("tasks", "--limt", "3"), "unrecognized arguments: --limt 3"),
        (("example", "sytemd"), """invalid choice: 'sytemd', did you mean "systemd"?"""),
        (("tasks", "--format", "xml"), "invalid choice: 'xml' (choose from table, json, csv, github, html)"),
        (("status", "--", "true"), "only acquire runs another program"),
        (("acquire", "league", "true", "--", "false"), "unrecognized arguments: true"),
    ],
)
def test_misspelt_word_is_answered_with_a_suggestion(words, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        adce.main(list(words))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.endswith(f"{problem}\n")


@pytest.mark.parametrize("command", ["report", "status", "tasks", "coverage", "task 1"])
def test_without_a_database_there_is_nothing_to_show(command, tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    done = run_adce(*command.split(), folder=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert "Try: adce.py run" in done.stderr


def test_unknown_name_is_no_empty_answer(folder):
    for words in (("tasks", "--dataset", "dayz"), ("coverage", "--dataset", "dayz")):
        done = run_adce(*words, folder=folder)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == 'adce.py: dataset "dayz" is not defined, did you mean "days"?\n'
    assert 'source "espn" is not defined' in run_adce("tasks", "--source", "espn", folder=folder).stderr


@pytest.mark.parametrize("text", ["", "- a list", "store: [lake", "stores: lake", "\t", "[" * 5000])
def test_bad_configuration_ends_with_78(text, tmp_path):
    (tmp_path / "adce.yaml").write_text(text)
    done = run_adce("run", folder=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("adce.yaml:1:")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adce.yaml"]


def test_runner_is_seen_by_status_and_keeps_others_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    runner = start_adce("run", folder=tmp_path / "copy")
    assert runner.stderr
    assert " start " in runner.stderr.readline()
    status = run_adce("status", "--format", "json", folder=tmp_path / "copy")
    assert (status.returncode, json.loads(status.stdout)["runner"]["pid"]) == (0, runner.pid)
    for words in (("run",), ("run", "--once"), ("start",)):
        refused = run_adce(*words, folder=tmp_path / "copy")
        assert (refused.returncode, f"(process {runner.pid})" in refused.stderr) == (11, True)
    assert "process" in run_adce("check", folder=tmp_path / "copy").stdout
    runner.terminate()
    runner.communicate(timeout=20)
    assert (runner.returncode, run_adce("status", folder=tmp_path / "copy").returncode) == (0, 4)


def test_task_that_does_not_exist_is_told(folder):
    done = run_adce("task", "4711", folder=folder)
    assert (done.returncode, done.stderr) == (1, "adce.py: there is no task 4711\nTry: adce.py tasks\n")


def test_report_tells_what_is_missing_and_what_to_do_next(folder):
    done = run_adce("report", folder=folder)
    assert "HTTP 500: trouble" in done.stdout
    assert "adce.py run --once" in done.stdout
    assert (done.stderr, run_adce("report", "-q", folder=folder).stderr) == ("", "")


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
        planned = run_adce("plan", "--limit", "50", "--format", "json", folder=tmp_path)
        assert planned.returncode == 0, planned.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["adce.yaml"]
        assert upstream.count() == 0
        assert run_adce("run", "--once", folder=tmp_path).returncode == 0
        asked = [arrival.path for arrival in upstream.arrivals if arrival.path.startswith("/scoreboard")]
    keys = [row["key"] for row in json.loads(planned.stdout)["first"]]
    assert keys == [f"days/{path.rpartition('=')[2]}.json" for path in sorted(asked)]


def test_dry_run_of_once_names_the_retries_that_it_would_not_wait_for(folder, tmp_path):
    text = (folder / "adce.yaml").read_text().replace("initial_delay_seconds: 1,", "initial_delay_seconds: 60,")
    assert "initial_delay_seconds: 60" in text
    (tmp_path / "adce.yaml").write_text(text)
    assert run_adce("run", "--once", folder=tmp_path).returncode == 3  # nobody answers: all is to be tried again
    states = {
        row["key"]: row["state"] for row in json.loads(run_adce("tasks", "--format", "json", folder=tmp_path).stdout)
    }
    assert "retry" in states.values()
    with contextlib.closing(sqlite3.connect(tmp_path / "adce.db")) as sql:
        sql.execute("update scopes set paused_until = 0")  # the pause is over
        sql.commit()
    pending = {key for key, state in states.items() if state == "pending"}  # not attempted before the pause began
    for words, expected in (((), pending), (("--once",), set(states))):
        done = run_adce("run", "--dry-run", *words, "--format", "json", folder=tmp_path)
        assert {row["key"] for row in json.loads(done.stdout)["first"]} == expected


def test_plan_tells_how_long_it_takes_at_the_tightest_limit_of_each_source(tmp_path):
    limits = "rate_limiting: {source_limits: {league: {requests_per_minute: 12, requests_per_hour: 60}}}"
    write_league(tmp_path, "http://127.0.0.1:9", last=30, limits=limits)
    for text, minutes in ((limits, 2.0), ("", None)):  # 12 now, 12 a minute later, and the last 6 after another
        yaml = (tmp_path / "adce.yaml").read_text().replace(limits, text)
        (tmp_path / "adce.yaml").write_text(yaml)
        done = run_adce("plan", "--format", "json", folder=tmp_path)
        assert json.loads(done.stdout)["sources"] == [{"source": "league", "tasks": 30, "least_minutes": minutes}]


def test_plan_that_could_not_look_says_so_even_when_quiet(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "lake").write_text("a file in its place")
    done = run_adce("plan", "-q", "--format", "json", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("adce.py: the cycle failed: the store ")
    assert "complete" not in done.stdout


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
    done = run_adce("reconcile", "--accept-loss", "dayz", folder=tmp_path)
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


def test_check_finds_a_page_that_is_damaged(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/adce.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        size = connection.execute("pragma page_size").fetchone()[0]
        roots = [row[0] for row in connection.execute("select rootpage from sqlite_schema where type = 'index'")]
        connection.execute("pragma wal_checkpoint(truncate)")
    written = path.read_bytes()
    cells = {root: int.from_bytes(written[(root - 1) * size :][3:5], "big") for root in roots}
    page = max(roots, key=lambda root: cells[root])
    with path.open("r+b") as file:
        file.seek((page - 1) * size + 100)
        file.write(b"\xff" * (size - 100))
    done = run_adce("check", "--format", "json", folder=tmp_path / "copy")
    (failed,) = [row for row in json.loads(done.stdout) if row["result"] == "FAIL"]
    assert (done.returncode, failed["what"]) == (1, "database")
    assert "put a backup in its place" in failed["details"]


def test_store_that_cannot_be_reached_is_told(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    path = tmp_path / "adce.yaml"
    path.write_text(path.read_text().replace("store: lake", "store: s3://bucket/prefix"))
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    checked = run_adce("check", folder=tmp_path, **nobody)
    assert (checked.returncode, bool(re.search("FAIL +store", checked.stdout))) == (1, True)
    done = run_adce("run", "--once", folder=tmp_path, **nobody)
    assert (done.returncode, "cannot use s3://bucket/prefix/" in done.stderr) == (12, True)


def test_reader_that_leaves_early_is_no_error(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    path = tmp_path / "adce.yaml"
    path.write_text(path.read_text().replace("from: 2025-01-01", "from: 2020-01-01"))  # far more than a pipe holds
    plan = shlex.join([sys.executable, str(ROOT / "adce.py"), "plan", "-q", "--limit", "2000", "--format", "json"])
    words = ["/bin/bash", "-c", f"{plan} | head -c 5; exit ${{PIPESTATUS[0]}}"]
    environment = {**os.environ, "LC_ALL": "C"}  # bash warns of a locale that is not installed
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '{\n  "', "")


def test_full_disk_under_the_output_is_told(folder):
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, str(ROOT / "adce.py"), "tasks"]
        done = subprocess.run(words, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "adce.py: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("style", adce.FORMATS)
def test_letters_that_a_terminal_does_not_know_are_replaced(style, folder):
    """The first answer's error text has letters beyond ASCII."""
    done = run_adce("tasks", "--format", style, folder=folder, PYTHONIOENCODING="ascii")
    assert (done.returncode, "HTTP 500: trouble ?" in done.stdout) == (0, True)


@pytest.mark.parametrize("name", ["cron", "systemd"])
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
    assert parser["Service"]["User"] == str(os.getuid() or "adce")
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        assert "adce.service" not in done.stderr, done.stderr
        judge = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(unit)]  # tenths of exposure
        done = subprocess.run(judge, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_unit_names_a_store_beside_its_folder_as_systemd_wants_it(tmp_path):
    (tmp_path / "here").mkdir()
    write_league(tmp_path / "here", "http://127.0.0.1:9")
    path = tmp_path / "here" / "adce.yaml"
    path.write_text(path.read_text().replace("store: lake", "store: ../lake"))
    unit = run_adce("example", "systemd", folder=tmp_path / "here").stdout
    assert f"ReadWritePaths={tmp_path}/here {tmp_path}/lake\n" in unit


def test_unit_and_crontab_take_any_folder(tmp_path):
    folder = tmp_path / 'my "lake", 5% of $HOME'
    folder.mkdir()
    write_league(folder, "http://127.0.0.1:9")
    unit = tmp_path / "adce.service"
    unit.write_text(run_adce("example", "systemd", folder=folder).stdout)
    assert r'my \"lake\", 5%% of $$HOME/adce.yaml" run' in unit.read_text()
    assert 'my "lake", 5%% of $HOME' in re.findall("WorkingDirectory=(.*)", unit.read_text())[0]
    command = run_adce("example", "cron", folder=folder).stdout.splitlines()[-1].split(None, 5)[5]
    assert re.sub(r"\\%", "", command).count("%") == 0
    words = shlex.split(command.replace(r"\%", "%"))  # as cron reads it before the shell does
    assert words[2:] == ["-c", str(folder / "adce.yaml"), "-q", "run", "--once", "--if-locked", "skip"]


def test_agent_is_a_property_list_that_launchd_takes(tmp_path):
    folder = tmp_path / 'my <lake> & "more"'
    folder.mkdir()
    write_league(folder, "http://127.0.0.1:9")
    agent = plistlib.loads(run_adce("example", "launchd", folder=folder).stdout.encode())
    command = [str(ROOT / "adce.py"), "-c", str(folder / "adce.yaml"), "run", "--log", str(folder / "adce.db.log")]
    assert agent["ProgramArguments"] == [sys.executable, *command]
    assert (agent["KeepAlive"], agent["WorkingDirectory"]) == ({"SuccessfulExit": False}, str(folder))


def test_check_says_what_the_first_run_makes_and_that_nobody_is_notified(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    shown = run_adce("check", folder=tmp_path).stdout
    assert shown.count("will be created on first run") == 2
    assert "no alert channel configured" in shown


def test_crontab_line_works_in_the_empty_environment_of_cron(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    line = run_adce("example", "cron", folder=tmp_path / "copy").stdout.splitlines()[-1]
    command = line.split(None, 5)[5]
    done = subprocess.run(
        ["/bin/sh", "-c", command], env={"PATH": "/usr/bin:/bin"}, cwd="/", capture_output=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr


def test_every_command_is_in_the_help(folder):
    text = run_adce("--help", folder=folder).stdout
    assert [command for command in adce.commands() if f"    {command} " not in text] == []
    assert os.environ.get("ADCE_CONFIG") is None
    assert isinstance(folder, Path)


def test_check_and_plan_see_that_the_store_of_before_is_gone(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    assert run_adce("reconcile", folder=tmp_path).returncode == 3
    assert run_adce("check", folder=tmp_path).returncode == 0
    (tmp_path / "lake" / ".adce").rmdir()
    for _ in range(2):
        checked, planned = run_adce("check", folder=tmp_path), run_adce("plan", folder=tmp_path)
        assert (checked.returncode, planned.returncode) == (1, 12)
        assert "is not there" in checked.stdout
        assert "is not there" in planned.stderr
        shutil.rmtree(tmp_path / "lake", ignore_errors=True)


def test_cycle_says_how_many_objects_are_no_longer_expected(tmp_path):
    narrow = write_widely(tmp_path, "http://127.0.0.1:9")
    assert run_adce("reconcile", folder=tmp_path).returncode == 3
    (tmp_path / "adce.yaml").write_text(narrow)
    done = run_adce("reconcile", "--format", "json", folder=tmp_path)
    told = json.loads(done.stdout)
    assert (done.returncode, told["dropped"], told["expected"], told["error"]) == (3, 366, 6, None)


def test_plan_knows_of_pauses(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    run_adce("reconcile", folder=tmp_path)
    for scope in ("league", "global"):
        run_adce("pause", scope, folder=tmp_path)
        plan = json.loads(run_adce("plan", "--format", "json", folder=tmp_path).stdout)
        assert [(row["now"], row["paused"]) for row in plan["datasets"]] == [(0, 6)]
        assert plan["first"] == []
        run_adce("resume", scope, folder=tmp_path)
    assert json.loads(run_adce("plan", "--format", "json", folder=tmp_path).stdout)["datasets"][0]["now"] == 6


@pytest.mark.parametrize(
    ("alerts", "told"),
    [
        ("webhook: nope", "webhook is not an http address"),
        ("webhook: $NOBODY_KNOWS", "$NOBODY_KNOWS is not in the environment"),
        ("ping: http://127.0.0.1:99999/secret", "ping is not an http address"),
        ("command: [no-such-program]", "program no-such-program not found"),
        ("webhook: http://127.0.0.1:9/secret", "webhook"),
    ],
)
def test_check_sees_channels_that_cannot_work_and_names_no_secret(alerts, told, tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    with (tmp_path / "adce.yaml").open("a") as file:
        file.write(f"alerts: {{{alerts}}}\n")
    done = run_adce("check", folder=tmp_path)
    rows = [line for line in done.stdout.splitlines() if re.search(" (alerts|programs) ", line)]
    assert told in "".join(rows)
    assert "secret" not in done.stdout
    assert done.returncode == (0 if told == "webhook" else 1)


def test_backup_makes_no_folder(folder, tmp_path):
    done = run_adce("backup", str(tmp_path / "disk" / "copy.db"), folder=folder)
    assert (done.returncode, (tmp_path / "disk").exists()) == (1, False)
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize("words", [("tasks", "--limit", "x"), ("run", "--max-minutes", "soon")])
def test_bad_number_is_told_in_words(words, tmp_path):
    done = run_adce(*words, folder=tmp_path)
    assert done.returncode == 2
    assert "is not a number" in done.stderr


def test_check_names_an_alert_channel_and_a_program_that_cannot_work(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    with (tmp_path / "adce.yaml").open("a") as file:
        file.write("alerts: {webhook: $NOT_SET_A, ping: $NOT_SET_B, command: [no-such-program]}\n")
    rows = json.loads(run_adce("check", "--format", "json", folder=tmp_path).stdout)
    failed = {row["what"]: row["details"] for row in rows if row["result"] == "FAIL"}
    assert set(failed) == {"alerts", "programs"}
    assert "$NOT_SET_A is not in the environment" in failed["alerts"]
    assert "no-such-program" in failed["programs"]


SCRAPERS = """
sources: {box: {}}
datasets:
  one: {source: box, key: "one/{n}", command: [no-such-program], partitions: {values: {n: ["1"]}}}
  three: {source: box, key: "three/{n}", command: [./here.sh], partitions: {values: {n: ["1"]}}}
"""


def test_check_looks_for_programs_and_runs_none(tmp_path):
    (tmp_path / "adce.yaml").write_text(SCRAPERS)
    (tmp_path / "here.sh").write_text("#!/bin/sh\ntouch was_run\n")
    (tmp_path / "here.sh").chmod(0o755)
    rows = json.loads(run_adce("check", "--format", "json", folder=tmp_path).stdout)
    (failed,) = [row for row in rows if row["result"] == "FAIL"]
    told = "program no-such-program not found"
    assert (failed["what"], failed["details"].partition("; see")[0]) == ("programs", told)
    assert not (tmp_path / "was_run").exists()


def test_empty_file_is_no_database_yet(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "adce.db").touch()
    assert run_adce("report", folder=tmp_path).returncode == 10
    assert run_adce("check", folder=tmp_path).returncode == 0
    assert run_adce("reconcile", folder=tmp_path).returncode == 3


def test_plan_tells_what_run_would_do(tmp_path):
    """Names that vanish make objects that are no longer expected."""
    games = {"events": [{"id": str(number), "status": {"type": {"completed": True}}} for number in range(300)]}
    league = {"leagues": [{"id": "46"}], "padding": "x" * 500}
    days = tmp_path / "lake" / "days"
    days.mkdir(parents=True)
    (days / "20250101.json").write_text(json.dumps({**league, **games}))
    write_league(tmp_path, "http://127.0.0.1:9", last=1)
    assert run_adce("reconcile", folder=tmp_path).returncode == 3
    (days / "20250101.json").write_text(json.dumps({**league, "events": games["events"][:7]}))
    plan = json.loads(run_adce("plan", "--format", "json", folder=tmp_path).stdout)
    assert plan["changes"] == [{"dataset": "games", "expected_now": 300, "expected_then": 7}]
    assert plan["datasets"][0]["now"] == 7
    done = json.loads(run_adce("reconcile", "--format", "json", folder=tmp_path).stdout)
    assert (done["dropped"], done["expected"], done["missing"]) == (293, 8, 7)


def test_backup_of_a_damaged_database_names_it(folder, tmp_path):
    for name in ("adce.yaml", "adce.db"):
        shutil.copy(folder / name, tmp_path / name)
    with (tmp_path / "adce.db").open("r+b") as file:
        file.truncate((tmp_path / "adce.db").stat().st_size // 2 // 4096 * 4096)
    done = run_adce("backup", "copy.db", folder=tmp_path)
    assert (done.returncode, "copy.db" in done.stderr, "Traceback" in done.stderr) == (1, False, False)
    assert f"{tmp_path}/adce.db" in done.stderr


def test_retry_of_nothing_asks_nothing(folder):
    done = run_adce("retry", "--error", "no such error", folder=folder)
    assert (done.returncode, done.stdout) == (0, "no task in state retry or gave_up matches\n")


def test_coverage_by_day_shows_each_day(folder):
    rows = json.loads(run_adce("coverage", "--by-day", "--format", "json", folder=folder).stdout)
    assert {row["day"] for row in rows if row["dataset"] == "days"} == {f"2025-01-0{day}" for day in range(1, 7)}


def test_example_of_a_configuration_can_be_used_as_it_is(tmp_path):
    """The shell has made an empty adce.yaml by then."""
    with (tmp_path / "adce.yaml").open("w") as file:
        words = [sys.executable, str(ROOT / "adce.py"), "example", "config"]
        assert subprocess.run(words, cwd=tmp_path, stdout=file, check=False).returncode == 0
    assert (tmp_path / "adce.yaml").read_text() == (ROOT / "adce.yaml").read_text()
    assert run_adce("check", folder=tmp_path).returncode == 0


def test_rules_for_prometheus_know_the_pace_and_the_port(tmp_path):
    write_league(tmp_path, "http://127.0.0.1:9")
    with (tmp_path / "adce.yaml").open("a") as file:
        file.write("reconciliation_interval_hours: 6\nhealth_check: {enabled: true, port: 9191}\n")
    rules = run_adce("example", "alerts", folder=tmp_path).stdout
    assert "> 86400" in rules
    assert "127.0.0.1:9191" in rules


DOUBTFUL = """
sources:
  open: {base_url: "http://127.0.0.1:9", headers: {X-Api-Key: s3cret}}
  polite: {base_url: "http://127.0.0.1:9", headers: {User-Agent: me, Authorization: "Bearer $KEY"}}
rate_limiting: {source_limits: {polite: {requests_per_minute: 1}}}
datasets:
  any: {source: open, key: "any/{n}", url: "/{n}", partitions: {values: {n: ["1"]}}}
  list: {source: polite, key: list, url: /list, partitions: {values: {}}}
  named: {source: polite, key: "{n}", url: "/{n}", partitions: {from: list, ids: "[]", as: n}, validate: {gzip: true}}
  same: {source: polite, key: "same/{m}", url: /same, partitions: {values: {m: [a, b]}}, validate: {gzip: true}}
  away: {source: polite, key: away, url: "http://127.0.0.2/x", partitions: {values: {}}, validate: {gzip: true}}
  months:
    source: polite
    key: "months/{date}"
    url: "/{date}"
    partitions: {dates: {from: 2024-01-01, every: month}}
    validate: {gzip: true}
  hours:
    source: polite
    key: "hours/{date:%Y-%m-%d-%H}"
    url: "/{date}"
    partitions: {dates: {from: 2024-01-01, every: hour}}
    validate: {gzip: true}
"""


def test_check_warns_of_what_may_do_harm_and_is_content_all_the_same(tmp_path):
    (tmp_path / "adce.yaml").write_text(DOUBTFUL)
    (tmp_path / "adce.yaml").chmod(0o666)
    checked = run_adce("check", "--format", "json", folder=tmp_path, KEY="k")
    warned = [
        (row["what"], row["details"].partition(";")[0]) for row in json.loads(checked.stdout) if row["result"] == "warn"
    ]
    assert checked.returncode == 0
    assert [one for one in warned if one[1] != "runs as root"] == [
        ("source open", "has no limits"),
        ("source open", "has no header User-Agent"),
        ("source open", "X-Api-Key is in the file"),
        ("dataset any", "has no validate: any response counts as its object, even a login page"),
        ("dataset same", "its url does not name {m}: objects that differ in it have the same content"),
        ("dataset away", "its url is not below base_url, but gets the headers of source polite"),
        ("dataset months", "its last step is fetched before it is over"),
        ("permissions", f"{tmp_path}/adce.yaml is writable for every account"),
    ]
    assert "s3cret" not in checked.stdout


COMPLETE = """source <("{python}" "{adce}" example completion)
COMP_WORDS=({words}); COMP_CWORD=$(({count} - 1)); _adce; echo "${{COMPREPLY[*]}}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("adce.py sk", "skip"),
        ("adce.py skip --rea", "--reason"),
        ("adce.py -c other.yaml tasks --da", "--dataset --day"),
        ("adce.py --format j", "json"),
        ("adce.py report --format c", "csv"),
        ("adce.py example comp", "completion completion-fish"),
        ("adce.py tasks --dataset ''", ""),
        ("adce.py --config ''", ""),
    ],
)
def test_shell_completes_commands_options_and_choices(words, found):
    script = COMPLETE.format(python=sys.executable, adce=adce.__file__, words=words, count=len(words.split()))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == found.split()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_is_accepted_by_other_shells(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    name = "completion-fish" if shell == "fish" else "completion"
    (tmp_path / "script").write_text(run_adce("example", name, folder=tmp_path).stdout)
    ask = "; complete -C 'adce.py sk'" if shell == "fish" else "; whence -w _adce"
    done = subprocess.run([shell, "-c", f". ./script{ask}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0].rstrip(":") == ("skip" if shell == "fish" else "_adce")
    assert done.stderr == ""
