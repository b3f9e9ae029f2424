"""Looking closer: one request tried, one task by its key, what no dataset expects, a part of a lake."""

from __future__ import annotations

import gzip
import json
from datetime import date

import pytest
from conftest import run_adce
from lakes import write_league
from runners import rows, write_box
from upstream import Answer, League, json_answer

import adce


def test_try_sends_one_request_and_stores_nothing(upstream, tmp_path):
    League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3).serve(upstream)
    write_league(tmp_path, upstream.address)
    done = run_adce("try", "days", "date=2025-01-03", "--format", "json", folder=tmp_path)
    shown = json.loads(done.stdout)
    assert (shown["answer"]["key"], shown["answer"]["outcome"]) == ("days/20250103.json", "ok")
    assert shown["ids"][0]["ids"] > 0
    assert [arrival.path for arrival in upstream.arrivals] == ["/scoreboard?dates=20250103"]
    assert not (tmp_path / "lake").exists()
    assert rows(tmp_path, "select count(*) from finished where scope = 'league'") == [(1,)]


def test_try_says_why_an_answer_is_not_the_object(upstream, tmp_path):
    upstream.answer("/summary?event=7", json_answer({"header": {"id": "8"}}))
    write_league(tmp_path, upstream.address)
    done = run_adce("try", "games", "game_id=7", "date=2025-01-03", "--format", "json", folder=tmp_path)
    assert json.loads(done.stdout)["answer"]["error"].startswith("require is not true: header.id == ")
    done = run_adce("try", "games", folder=tmp_path)
    assert (done.returncode, "no value for date, game_id" in done.stderr) == (adce.ExitCode.ERROR, True)


def test_try_sends_one_request_also_when_it_is_redirected(upstream, tmp_path):
    upstream.answer("/scoreboard?dates=20250103", Answer(b"", 302, {"Location": "/elsewhere"}))
    write_league(tmp_path, upstream.address)
    shown = json.loads(run_adce("try", "days", "date=2025-01-03", "--format", "json", folder=tmp_path).stdout)
    assert (shown["answer"]["status"], upstream.count()) == (302, 1)
    assert {"header": "Location", "value": "/elsewhere"} in shown["headers"]


@pytest.mark.parametrize(
    ("key", "answer", "told"),
    [
        ("{name}", Answer(behaviour="drip_body"), "timed out after 1 s"),
        (
            "{name}",
            Answer(gzip.compress(b"x" * 99)[:-9], headers={"Content-Encoding": "gzip"}),
            "its gzip stream ended early",
        ),
        ("{name}.gz", Answer(gzip.compress(b"x"), headers={"Content-Encoding": "gzip"}), None),
        ("{name}", Answer(b"", 302, {"Location": "http://[::1"}), None),
    ],
)
def test_try_reads_an_answer_as_a_run_does(key, answer, told, upstream, tmp_path):
    upstream.answer("/A", answer)
    write_box(tmp_path, address=upstream.address)
    text = (tmp_path / "adce.yaml").read_text().replace("timeout_seconds: 60", "timeout_seconds: 1")
    (tmp_path / "adce.yaml").write_text(text.replace("things/{name}", f"things/{key}"))
    done = run_adce("try", "things", folder=tmp_path, seconds=20)
    assert (done.returncode, "Traceback" in done.stderr) == (int(told is not None), False)
    assert (told or "") in done.stderr


@pytest.mark.parametrize("words", [("try", "days", "date=nonsense"), ("tasks", "--day", "nonsense")])
def test_day_that_is_none_is_one_clear_line(upstream, tmp_path, words):
    write_league(tmp_path, upstream.address)
    done = run_adce(*words, folder=tmp_path)
    assert done.returncode in (adce.ExitCode.ERROR, adce.ExitCode.USAGE)
    assert "nonsense" in done.stderr and "Traceback" not in done.stderr
    assert upstream.count() == 0


def test_part_of_a_lake_is_filled(upstream, tmp_path):
    League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3).serve(upstream)
    write_league(tmp_path, upstream.address)
    assert run_adce("run", "--once", "--dataset", "days", folder=tmp_path).returncode == adce.ExitCode.DONE
    assert {arrival.path.partition("?")[0] for arrival in upstream.arrivals} == {"/scoreboard"}
    assert rows(tmp_path, "select kind from gaps where dataset = 'games'")


def test_objects_that_no_dataset_expects_are_listed(upstream, tmp_path):
    upstream.answer("/x", Answer(b""))
    write_league(tmp_path, upstream.address)
    run_adce("reconcile", folder=tmp_path)
    for key in ("days/20250101.json", "notes/readme.txt"):
        (tmp_path / "lake" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lake" / key).write_text("mine")
    done = run_adce("reconcile", "--unexpected", "--format", "json", folder=tmp_path)
    assert [row["key"] for row in json.loads(done.stdout)] == ["notes/readme.txt"]


def test_task_is_found_by_its_key(upstream, tmp_path):
    write_league(tmp_path, upstream.address)
    run_adce("reconcile", folder=tmp_path)
    shown = json.loads(run_adce("task", "days/20250101.json", "--format", "json", folder=tmp_path).stdout)["task"]
    assert shown["key"] == "days/20250101.json"
    assert run_adce("task", "nothing", folder=tmp_path).returncode == adce.ExitCode.ERROR


def test_coverage_shows_only_what_is_not_complete(upstream, tmp_path):
    League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3).serve(upstream)
    write_league(tmp_path, upstream.address)
    run_adce("run", "--once", "--dataset", "days", folder=tmp_path)
    shown = json.loads(run_adce("coverage", "--gaps", "--format", "json", folder=tmp_path).stdout)
    assert {row["dataset"] for row in shown} == {"games"}
