"""What is told is true, in every format."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from test_schema import lived  # noqa: F401  # a fixture

import adce

DAY = 86400


def section(sections: list[adce.Section], name: str) -> adce.Rows:
    return next(one.rows for one in sections if one.name == name)


def test_every_figure_of_the_report_is_a_count_of_the_tables(lived):  # noqa: F811
    sections = adce.report_sections(lived, DAY, adce.Clock().wall())
    objects = lived.value("select count(*) from objects where state not in ('awaited', 'dropped')")
    present = lived.value("select count(*) from objects where state = 'present'")
    total = section(sections, "total")[0]
    assert (total["expected"], total["present"]) == (objects, present)
    assert sum(row["expected"] for row in section(sections, "coverage")) == objects
    assert sum(row["objects"] for row in section(sections, "reasons")) == objects - present
    assert sum(row["attempts"] for row in section(sections, "attempts")) == lived.value("select count(*) from attempts")
    by_priority = section(sections, "queue")
    assert sum(row["gave_up"] for row in by_priority) == lived.value(
        "select count(*) from tasks where state = 'gave_up'"
    )
    assert sum(row["retry"] for row in by_priority) == lived.value("select count(*) from tasks where state = 'retry'")
    assert section(sections, "cycles")[0]["cycle_id"] == lived.value("select max(cycle_id) from reconciliations")


def test_attempts_before_the_span_do_not_count(lived):  # noqa: F811
    assert section(adce.report_sections(lived, 1, adce.Clock().wall() + DAY), "attempts") == []


def test_task_is_shown_with_all_its_attempts(lived):  # noqa: F811
    task_id = lived.value("select task_id from tasks where state = 'gave_up' and last_error like '%500%'")
    task, attempts = adce.task_sections(lived, task_id)
    assert task.rows[0]["last_error"] == "HTTP 500: trouble"
    assert len(attempts.rows) == task.rows[0]["attempts"]
    with pytest.raises(adce.Error, match="there is no task 99999"):
        adce.task_sections(lived, 99999)


ROWS = [
    {"key": "20200407_2", "game": "0022300001", "ratio": 1.10, "note": "a\x1b[31m\nb"},
    {"key": "1.10", "game": None, "ratio": 2.0, "note": "<b>"},
]
SECTIONS = [adce.Section("things", "Things", ROWS)]


def test_ids_stand_unchanged_in_a_table():
    text = adce.render(SECTIONS, "table")
    assert "20200407_2" in text
    assert "0022300001" in text
    assert re.search(r"^1\.10 ", text, re.MULTILINE)


def test_control_characters_are_shown_and_not_obeyed():
    assert "a?[31m?b" in adce.render(SECTIONS, "table")
    assert "\x1b" not in adce.render(SECTIONS, "table")


def test_markup_is_escaped_in_html():
    text = adce.render([adce.Section("x", "<i>", ROWS)], "html")
    assert "&lt;b&gt;" in text
    assert "<b>" not in text + adce.page(SECTIONS, "<b>", 0)


def test_json_is_one_document_and_csv_has_a_header():
    assert json.loads(adce.render(SECTIONS, "json"))[0]["game"] == "0022300001"
    assert json.loads(adce.render([*SECTIONS, adce.Section("more", "", [])], "json"))["things"] == ROWS
    assert next(csv.DictReader(io.StringIO(adce.render(SECTIONS, "csv"))))["key"] == "20200407_2"


def test_table_is_cut_to_the_width_of_a_terminal():
    lines = adce.render(SECTIONS, "table", width=20).splitlines()
    assert max(map(len, lines)) == 20


def test_nothing_is_said_in_words():
    assert adce.render([adce.Section("x", "Things", [], empty="none so far")], "table") == "Things\nnone so far"


METRIC = re.compile(r'([a-z_]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\.)*",?)*\})? (-?[0-9.e+]+)')


def test_metrics_are_in_the_format_of_prometheus(lived):  # noqa: F811
    described: set[str] = set()
    for line in adce.metrics_text(lived).splitlines():
        if line.startswith("#"):
            described.add(line.split()[2])
        else:
            match = METRIC.fullmatch(line)
            assert match, line
            assert match[1] in described
    assert "adce_attempts_total" in described


def test_metrics_agree_with_the_tables(lived):  # noqa: F811
    text = adce.metrics_text(lived)
    present = lived.value(
        "select count(*) from objects join datasets using (dataset_id) where dataset = 'days' and state = 'present'"
    )
    assert f'adce_objects{{dataset="days",state="present"}} {present}' in text
    assert f"adce_cycles_total {lived.value('select count(*) from reconciliations')}" in text
