"""What is told is true, in every format."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter

import pytest
from lakes import league_text
from test_schema import lived  # noqa: F401  # a fixture

import adce

DAY = 86400
GAPS = ("missing", "stale", "suspect")


def section(sections: list[adce.Section], name: str) -> adce.Rows:
    return next(one.rows for one in sections if one.name == name)


def coverage(database: adce.Database, question: adce.Section = adce.COVERAGE, **filters: str) -> list[adce.Section]:
    return adce.answers(database, (question,), **{"source": None, "dataset": None, "year": None, "gaps": 0, **filters})


def report(database: adce.Database, seconds: float, now: float) -> list[adce.Section]:
    return adce.answers(database, adce.REPORT, since=now - seconds, span="1 d")


def objects_by(database: adce.Database, *columns: str) -> Counter[tuple[str, ...]]:
    """Objects counted by some columns, one by one, without the counts that are kept."""
    sql = "select * from objects_now where state not in ('awaited', 'dropped')"
    return Counter(tuple(row[column] for column in columns) for row in database.read(sql))


def tasks_by(database: adce.Database, *columns: str) -> Counter[tuple[str, ...]]:
    return Counter(tuple(row[column] for column in columns) for row in database.read("select * from queue"))


def test_coverage_counts_the_objects(lived):  # noqa: F811
    counts, gave_up = objects_by(lived, "dataset", "season", "state"), tasks_by(lived, "dataset", "state")
    rows = section(coverage(lived), "coverage")
    for row in rows:
        told = {state: row[state] for state in ("present", *GAPS)}
        assert told == {state: counts[row["dataset"], row["season"], state] for state in told}
        assert row["expected"] == sum(told.values())
        assert row["gave_up"] == gave_up[row["dataset"], "gave_up"]
        assert row["percent"] == row["present"] * 10000 // row["expected"] / 100
    assert sum(row["expected"] for row in rows) == counts.total() > 0


def test_coverage_of_one_source_or_dataset_is_a_part_of_it(lived):  # noqa: F811
    every = section(coverage(lived), "coverage")
    assert section(coverage(lived, source="league"), "coverage") == every
    daily = section(coverage(lived, adce.BY_DAY), "coverage")
    assert sum(row["expected"] for row in daily) == sum(row["expected"] for row in every)
    assert [row["day"] for row in daily if row["dataset"] == "days"] == sorted(
        {row["day"] for row in daily}, reverse=True
    )
    assert section(coverage(lived, dataset="games"), "coverage") == [row for row in every if row["dataset"] == "games"]


def test_every_figure_of_the_report_is_a_count_of_the_tables(lived):  # noqa: F811
    sections = report(lived, DAY, adce.Clock().wall())
    by_state, by_dataset = objects_by(lived, "state"), objects_by(lived, "dataset", "state")
    for row in section(sections, "coverage"):
        assert [row[state] for state in GAPS] == [by_dataset[row["dataset"], state] for state in GAPS]
    total = section(sections, "total")[0]
    assert (total["expected"], total["present"]) == (by_state.total(), by_state["present",])
    assert [total[state] for state in GAPS] == [by_state[state,] for state in GAPS]
    reasons = section(sections, "reasons")
    assert sum(row["objects"] for row in reasons) == sum(by_state[state,] for state in GAPS)
    by_priority = tasks_by(lived, "priority", "state")
    for row in section(sections, "queue"):
        for state in ("pending", "retry", "running", "gave_up"):
            assert row[state] == by_priority[row["priority"], state]
    assert section(sections, "cycles")[0]["cycle_id"] == lived.value("select max(cycle_id) from reconciliations")


def test_attempts_of_the_report_are_sums_of_the_table(lived):  # noqa: F811
    told = section(report(lived, DAY, adce.Clock().wall()), "attempts")
    kept = lived.read("select * from attempts")
    for column in ("requests", "bytes"):
        assert sum(row[column] or 0 for row in told) == sum(attempt[column] or 0 for attempt in kept)
    assert sum(row["attempts"] for row in told) == len(kept)
    assert max(row["longest"] for row in told) == pytest.approx(max(one["seconds"] for one in kept), abs=0.001)
    assert {row["outcome"] for row in told} == {attempt["outcome"] for attempt in kept}


def test_attempts_before_the_span_do_not_count(lived):  # noqa: F811
    assert section(report(lived, 1, adce.Clock().wall() + DAY), "attempts") == []


def test_every_figure_of_the_status_is_a_count_of_the_tables(lived, configure):  # noqa: F811
    configuration = configure(league_text("http://127.0.0.1:9"))
    configuration.database.touch()
    sections = adce.status_sections(lived, configuration, adce.Clock().wall())
    by_state, tasks = objects_by(lived, "state"), tasks_by(lived, "state")
    lake = section(sections, "lake")[0]
    assert {state: lake[state] for state in ("present", *GAPS)} == {s: by_state[s,] for s in ("present", *GAPS)}
    assert (lake["expected"], lake["percent"]) == (
        by_state.total(),
        by_state["present",] * 10000 // by_state.total() / 100,
    )
    told = section(sections, "tasks")[0]
    assert [told[state] for state in ("pending", "running", "retry", "gave_up")] == [
        tasks[state,] for state in ("pending", "running", "retry", "gave_up")
    ]
    assert section(sections, "runner")[0]["runner"] == "not running"


def test_tasks_are_all_that_are_open(lived):  # noqa: F811
    (told,) = adce.tasks_sections(lived, {"state": None, "dataset": None, "source": None}, 1000)
    live = lived.read("select task_id from gaps")  # each has one
    assert {row["task_id"] for row in told.rows} == {row["task_id"] for row in live}
    assert told.title == f"{len(live)} open tasks"
    (told,) = adce.tasks_sections(lived, {"state": "gave_up", "dataset": "games", "source": None}, 1)
    assert told.title.endswith("the first 1; to open them again: adce.py retry --state=gave_up --dataset=games")


def test_tasks_are_shown_the_most_urgent_first(database):
    now = int(adce.Clock().wall())
    objects = """
        insert into objects (object_id, dataset_id, key, fields, state, since, proven,
                             task, priority, detected_at, gap_size, rank, slope)
        values (?, 1, ?, '{}', 'missing', ?, 1, 'pending', 'LOW', ?, 1, ?, 0.0)
    """
    with database.transaction() as sql:
        sql.execute("insert into datasets (dataset_id, dataset, source, active) values (1, 'days', 'league', 1)")
        for number, rank in enumerate((10.0, 30.0, 20.0, 30.0), start=1):
            sql.execute(objects, (number, f"{number}.json", now, now, rank))
    (told,) = adce.tasks_sections(database, {"state": None, "dataset": None, "source": None}, 3)
    assert [row["task_id"] for row in told.rows] == [2, 4, 3]
    first = section(adce.answers(database, adce.PLAN, most=3, before="{}", workers="{}"), "first")
    assert [row["key"] for row in first] == ["2.json", "4.json", "3.json"]


def test_tasks_that_are_left_out_are_told(lived):  # noqa: F811
    (told,) = adce.tasks_sections(lived, {"state": None, "dataset": None, "source": None}, 1)
    assert len(told.rows) == 1
    assert re.fullmatch(r"\d+ open tasks, the first 1", told.title)


def test_task_is_shown_with_all_its_attempts(lived):  # noqa: F811
    task_id = lived.value("select task_id from queue where state = 'gave_up' and last_error like '%500%'")
    task, attempts = adce.task_sections(lived, str(task_id))
    assert task.rows[0]["last_error"] == "HTTP 500: trouble"
    assert len(attempts.rows) == task.rows[0]["attempts"]
    with pytest.raises(adce.Error, match="there is no task 99999"):
        adce.task_sections(lived, "99999")


def test_lock_of_another_process_is_not_taken_for_the_last_run(database, tmp_path):
    lock = adce.RunnerLock(tmp_path / "adce.db")
    with database.transaction() as sql:
        sql.execute(
            "insert into runner (only_row, pid, version, started_at, beat_at) values (1, 4711, '0.9', 100, 200)"
        )
    assert adce.runner_state(database, lock, 300)["note"] == "exited unexpectedly"
    lock.acquire()
    state = adce.runner_state(database, adce.RunnerLock(tmp_path / "adce.db"), 300)
    assert (state["runner"], state["pid"]) == ("starting", int((tmp_path / "adce.db.lock").read_text()))
    assert "uptime" not in state
    lock.release()


ROWS = [
    {"key": "20200407_2", "game": "0022300001", "ratio": 1.10, "note": "a\x1b[31m\nb"},
    {"key": "1.10", "game": None, "ratio": 2.0, "note": "<b>|\u202e\x9b"},
]
SECTIONS = [adce.Section("things", "Things", ROWS)]


@pytest.mark.parametrize("style", adce.FORMATS)
@pytest.mark.parametrize("word", ["20200407_2", "0022300001", "1.10"])
def test_ids_stand_unchanged(style, word):
    assert re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.])", adce.render(SECTIONS, style))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1234567.0, "1234567"), (86400.0, "86400"), (0.5, "0.5"), (99.99, "99.99"), (172905, "172905")],
)
def test_number_is_written_out(value, text):
    assert adce.render([adce.Section("x", "", [{"n": value}])], "table").split()[-1] == text


@pytest.mark.parametrize("style", ["table", "github", "html"])
def test_control_characters_are_shown_and_not_obeyed(style):
    text = adce.render(SECTIONS, style)
    assert "a?[31m?b" in text
    assert [letter for letter in text if not letter.isprintable() and letter != "\n"] == []


def test_bar_in_a_value_makes_no_column_on_github():
    lines = adce.render(SECTIONS, "github").splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")} == {5}


def test_markup_is_escaped_in_html():
    text = adce.render([adce.Section("x", "<i>", ROWS)], "html")
    assert "&lt;b&gt;" in text
    assert "<b>" not in text


def test_json_is_one_document():
    assert json.loads(adce.render(SECTIONS, "json")) == ROWS
    assert json.loads(adce.render([*SECTIONS, adce.Section("more", "", [])], "json")) == {"things": ROWS, "more": []}


def test_one_thing_in_json_is_an_object_or_null():
    one, none = adce.Section("one", "", ROWS[:1], is_one=True), adce.Section("none", "", [], is_one=True)
    assert json.loads(adce.render([one, none], "json")) == {"one": ROWS[0], "none": None}


def test_csv_gives_back_what_was_put_in():
    rows = list(csv.DictReader(io.StringIO(adce.render(SECTIONS, "csv"))))
    assert [row["note"] for row in rows] == ["a?[31m\nb", "<b>|??"]  # no order to a terminal
    assert [row["key"] for row in rows] == [row["key"] for row in ROWS]


def test_table_is_cut_to_the_width_of_a_terminal():
    lines = adce.render(SECTIONS, "table", width=20).splitlines()
    assert max(map(len, lines)) == 20


WIDE_ROWS = [
    {
        "id": n,
        "source": "league",
        "key": f"raw/a-rather-long-folder/{n}.json",
        "stale": 0,
        "n": n,
        "error": "HTTP 500 " * 5,
    }
    for n in (1, 2)
]


def test_texts_of_a_wide_table_are_wrapped_and_numbers_are_not():
    lines = adce.render([adce.Section("x", "", WIDE_ROWS)], "table", width=40).splitlines()
    assert lines[0].split() == ["id", "source", "key", "n", "error"]
    assert lines[2].split() == ["1", "league", "raw/a-", "1", "HTTP", "500"]
    assert max(map(len, lines)) <= 40
    for row in WIDE_ROWS:
        assert "".join(line[12:23].strip() for line in lines).count(row["key"]) == 1
    numbers = [{"number_of_requests": 123456789012, "text": "x" * 20}]
    lines = adce.render([adce.Section("x", "", numbers)], "table", width=22).splitlines()
    assert [line.split() for line in lines[:3]] == [["number", "of", "text"], ["requests"], ["-" * 12, "-" * 8]]
    assert lines[3].split() == ["123456789012", "x" * 8]


def test_too_wide_table_says_once_what_all_rows_share_and_has_the_last_text_below():
    rows = [{**row, "key": f"{row['n']}", "error": "-HTTP 404" * (row["n"] - 1)} for row in WIDE_ROWS]
    assert adce.render([adce.Section("x", "", rows)], "table", width=24).splitlines() == [
        "source league",
        "id  key  n",
        "--  ---  -",
        " 1  1    1",
        " 2  2    2",
        "    -HTTP 404",
    ]
    one = adce.render([adce.Section("x", "", rows[1:])], "table", width=24).splitlines()
    assert one[-1] == "    -HTTP 404"  # nothing to share
    for width in range(1, 12):
        for part in (rows, [{"line": "HTTP 404"}], [{"n": 123456789}], [{"n": 1, "text": None}]):
            assert adce.render([adce.Section("x", "", part)], "table", width=width)


def test_columns_of_zeros_are_left_out_for_people_alone():
    for style, is_shown in (("table", False), ("csv", True), ("github", True), ("html", True), ("json", True)):
        assert ("stale" in adce.render([adce.Section("x", "", WIDE_ROWS)], style)) == is_shown
    assert adce.render([adce.Section("x", "", [{"n": 0}])], "table") == "n\n-\n0"
    for name in ("percent", "expected_then"):
        assert name in adce.render([adce.Section("x", "", [{"n": 1, name: 0.0}])], "table")


def test_nothing_is_said_in_words():
    assert adce.render([adce.Section("x", "Things", [], empty="none so far")], "table") == "Things\nnone so far"


SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (-?[0-9.]+(?:e[+-]?[0-9]+)?)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
Labels = tuple[tuple[str, str], ...]


def parse_metrics(text: str) -> dict[tuple[str, Labels], float]:
    """The samples of a text in Prometheus's format 0.0.4; each after the HELP and TYPE of its own family."""
    samples: dict[tuple[str, Labels], float] = {}
    words: list[str] = []
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# "):
            words = [*words, *line.split(" ", 3)[1:3]] if line.startswith("# TYPE") else line.split(" ", 3)[1:3]
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert words == ["HELP", match[1], "TYPE", match[1]], line
        labels = match[2] or ""
        assert LABEL.sub("", labels) == "", line
        plain = {
            name: re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value)
            for name, value in LABEL.findall(labels)
        }
        sample = match[1], tuple(plain.items())
        assert sample not in samples, line
        samples[sample] = float(match[3])
    return samples


def test_metrics_agree_with_the_tables(lived):  # noqa: F811
    samples = parse_metrics(adce.metrics_text(lived))
    for (dataset, state), count in objects_by(lived, "dataset", "state").items():
        assert samples["adce_objects", (("dataset", dataset), ("state", state))] == count
    for (dataset, state), count in tasks_by(lived, "dataset", "state").items():
        assert samples["adce_tasks", (("dataset", dataset), ("state", state))] == count
    attempts = sum(value for (name, _), value in samples.items() if name == "adce_attempts_total")
    assert attempts == lived.value("select count(*) from attempts")
    assert samples["adce_cycles_total", ()] == lived.value("select count(*) from reconciliations")


def test_metrics_are_named_by_their_kind(lived):  # noqa: F811
    kinds = re.findall(r"^# TYPE (\w+) (\w+)$", adce.metrics_text(lived), re.MULTILINE)
    assert {name for name, _ in kinds} == {one.name for one in adce.METRICS}
    for name, kind in kinds:
        assert name.startswith("adce_")
        assert name.endswith("_total") == (kind == "counter")


def test_metrics_of_an_empty_database_are_valid(database):
    samples = parse_metrics(adce.metrics_text(database))
    assert samples == {("adce_cycles_total", ()): 0, ("adce_open_alerts", ()): 0}


def test_labels_are_escaped(database):
    name = 'odd "name" with \\ and\nnewline, {x}'
    with database.transaction() as sql:
        sql.execute("insert into datasets (dataset_id, dataset, source, active) values (1, ?, 'league', 1)", (name,))
        sql.execute("insert into daily_totals values ('2025-01-01', 1, 'LOW', 'ok', 3, 1.5, 10)")
    samples = parse_metrics(adce.metrics_text(database))
    assert samples["adce_attempts_total", (("dataset", name), ("outcome", "ok"))] == 3


def test_tasks_are_found_by_day_by_key_and_by_error(lived):  # noqa: F811
    every = adce.tasks_sections(lived, {}, 1000)[0].rows
    of_day = {row["task_id"] for row in lived.read("select task_id from objects_now where day = '2025-01-01'")}
    for name, value, expected in (
        ("day", "2025-01-01", lambda row: row["task_id"] in of_day),
        ("key", "2025010", lambda row: "2025010" in row["key"]),
        ("key", "days/*1.json", lambda row: row["key"].endswith("1.json") and row["key"].startswith("days/")),
        ("error", "trouble", lambda row: "trouble" in (row["last_error"] or "")),
    ):
        found = adce.tasks_sections(lived, {name: value}, 1000)[0].rows
        assert {row["task_id"] for row in found} == {row["task_id"] for row in every if expected(row)}
