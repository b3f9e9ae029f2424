"""The live screen of a run: what is done now comes first, and it never grows beyond the terminal."""

from __future__ import annotations

import io
import re

import pytest
from test_queue import Desk

import adce

DATASETS = 20
BOTH = "{values: {n: ['1', '2']}}"
TEXT = """\
sources: {league: {base_url: "http://127.0.0.1:9"}}
datasets:
""" + "".join(
    f"  set{n:02}: {{source: league, key: 'set{n:02}/{{n}}', url: '/{{n}}', partitions: {BOTH}}}\n"
    for n in range(DATASETS)
)


@pytest.fixture
def paint(configure, database, clock, monkeypatch):
    """Paint once on a terminal of so many lines; what it shows."""
    configuration = configure(TEXT)
    desk = Desk(configuration, database, clock)
    for name in configuration.datasets:
        for number in "12":
            desk.expect(name, n=number)

    def paint_on(lines: int) -> list[str]:
        monkeypatch.setenv("LINES", str(lines))
        monkeypatch.setenv("COLUMNS", "120")
        stream = io.StringIO()
        adce.LiveScreen(stream, database, configuration).paint(clock.wall(), ["set00/1"], 60)
        return stream.getvalue().removesuffix("\x1b[J").replace("\x1b[2K", "").splitlines()

    return paint_on


def test_high_terminal_shows_every_dataset(paint):
    shown = paint(60)
    assert sum(" set" in line and "league" in line for line in shown) == DATASETS
    assert shown[-1] == "workers set00/1"


def test_low_terminal_cuts_the_datasets_and_keeps_what_is_done_now(paint):
    shown = paint(16)
    assert len(shown) == 15
    assert shown[1] == "ATTENTION  0.0 %  40 missing of 40  runner never ran"
    assert shown[2] == "cycle   none yet"
    assert shown[3] == f"tasks   {2 * DATASETS} pending"
    assert re.fullmatch(r"\.\.\. and \d+ more", shown[-2])
    assert shown[-1] == "workers set00/1"
    assert len(paint(5)) == 4


def test_terminal_that_is_resized_is_cleared(paint, configure, database, clock, monkeypatch):
    paint(20)
    stream = io.StringIO()
    screen = adce.LiveScreen(stream, database, configure(TEXT))
    for columns in ("120", "60", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        screen.paint(clock.wall(), [], None)
    assert stream.getvalue().count("\x1b[H\x1b[2J") == 1


def test_limits_tell_how_long_the_open_tasks_last(paint, database):
    with database.transaction() as sql:
        sql.execute("insert into windows (scope, window_seconds, max_requests) values ('league', 60, 10)")
    assert paint(50)[3] == "tasks   40 pending, at least 3 min left"


def test_running_cycle_tells_how_far_it_is(paint, database, clock):
    with database.transaction() as sql:
        sql.execute(
            """
            insert into reconciliations (started_at, progress)
            values (?, 'listing, 10 objects, 1 a second, 30 to go, about 30 s')
            """,
            (clock.wall() - 10,),
        )
    assert paint(50)[2] == "cycle   1 listing, 10 objects, 1 a second, 30 to go, about 30 s"


def test_wide_letters_are_cut_by_the_columns_they_take():
    assert [adce.cut("a\u932f\u8aa4b", columns) for columns in range(7)] == [
        "",
        "a",
        "a",
        "a\u932f",
        "a\u932f",
        "a\u932f\u8aa4",
        "a\u932f\u8aa4b",
    ]
