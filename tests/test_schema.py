"""The views are the contract: their columns, their times, their figures."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shutil
import subprocess
import time
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakes import league_text
from upstream import Answer, League, Upstream

import adce

COLUMNS = {
    "queue": "task_id state score priority source dataset key gap_size age_hours reason attempts next_at last_error",
    "gaps": "dataset key kind since priority",
    "coverage": "source dataset season expected present missing stale suspect gave_up percent",
    "coverage_by_day": "source dataset day expected present missing stale suspect",
    "rates": "scope window_seconds max_requests used in_flight blocked_until",
    "recent_attempts": "attempt_id task_id source dataset key url started_at seconds outcome http_status bytes worker "
    "error",
    "stats": "day source dataset priority outcome attempts seconds bytes",
    "cycles": "cycle_id started_at seconds listed expected present missing stale suspect created closed dropped "
    "list_calls error",
    "objects_now": "dataset key state size fetched_at due_at parent",
}
TIMES = ("since", "next_at", "blocked_until", "started_at", "fetched_at", "due_at")
LIMITS = "rate_limiting: {global_limits: {requests_per_hour: 500}, source_limits: {league: {requests_per_minute: 100}}}"


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A database with some life: done, failed, gave up, not final, paused."""
    folder = tmp_path_factory.mktemp("lived")
    with Upstream() as upstream:
        league = League(date(2025, 1, 1), 6, games_per_day=(2, 3), seed=5)
        league.serve(upstream)
        games = sorted(league.ids)
        upstream.answer(f"/summary?event={games[0]}", Answer(b"trouble <script>\n", 500))
        upstream.answer(f"/summary?event={games[1]}", Answer(b'{"code": 404, "message": "no"}', 404))
        league_early = League(date(2025, 1, 1), 6, games_per_day=(2, 3), seed=5)
        league_early.phase = "early"
        upstream.answer("/scoreboard?dates=20250106", league_early.scoreboard("20250106"))
        text = league_text(upstream.address, limits=LIMITS, attempts=1)
        (folder / "adce.yaml").write_text(text)
        configuration = adce.load_configuration(folder / "adce.yaml")
        database = adce.open_database(folder / "adce.db")
        store = adce.open_store(configuration.store)
        for _ in range(2):
            adce.Runner(configuration, database, store, adce.Journal(io.StringIO())).run(once=True)
        with database.transaction() as sql:
            adce.pause(sql, "league", 500, "asked to", adce.Clock().boot())
        yield database
        database.close()


@pytest.mark.parametrize("view", COLUMNS)
def test_view_has_its_columns_and_answers(view, lived):
    names = COLUMNS[view].split()
    rows = lived.read(f"select * from {view}")
    assert rows, view
    assert [name for name in names if name not in dict(rows[0])] == []


@pytest.mark.parametrize("view", COLUMNS)
def test_times_are_text_in_utc(view, lived):
    for row in lived.read(f"select * from {view}"):
        for name in set(TIMES) & set(dict(row)):
            assert row[name] is None or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row[name])


def test_coverage_sums_to_the_objects(lived):
    totals = lived.read(
        "select sum(expected), sum(present), sum(missing), sum(stale), sum(suspect), sum(gave_up) from coverage"
    )
    counts = lived.read(
        """
        select count(*), sum(state = 'present'), sum(state = 'missing'), sum(state = 'stale'), sum(state = 'suspect'),
               (select count(*) from queue where state = 'gave_up')
        from objects_now where state in ('present', 'missing', 'stale', 'suspect')
        """
    )
    assert tuple(totals[0]) == tuple(counts[0])
    assert totals[0][5] == 2


def test_coverage_by_day_sums_to_the_same(lived):
    sums = "select dataset, sum(expected), sum(present), sum(missing), sum(stale), sum(suspect) from {} group by 1"
    assert [tuple(row) for row in lived.read(sums.format("coverage_by_day"))] == [
        tuple(row) for row in lived.read(sums.format("coverage"))
    ]
    assert lived.value("select count(distinct day) from coverage_by_day") == 6


@pytest.mark.parametrize(("missing", "percent"), [(0, 100), (1, 99.99), (30_000, 0)])
def test_percent_is_100_only_when_nothing_is_missing(missing, percent):
    with contextlib.closing(adce.memory_database()) as database:
        with database.transaction() as sql:
            sql.execute("insert into datasets (dataset_id, dataset, source, active) values (1, 'd', 's', 1)")
            sql.execute(
                """
                with recursive n(i) as (select 1 union all select i + 1 from n where i < 30000)
                insert into objects (dataset_id, key, fields, state, since, proven)
                select 1, i, '{}', iif(i <= ?, 'missing', 'present'), 0, 1 from n
                """,
                (missing,),
            )
        assert database.value("select percent from coverage") == percent


def test_used_is_what_was_asked_within_the_window(lived):
    asked = lived.value("select count(*) from finished where scope = 'global'")
    used = {
        row["scope"]: (row["max_requests"], row["used"], row["in_flight"]) for row in lived.read("select * from rates")
    }
    assert used == {"league": (100, asked, 0), "global": (500, asked, 0)}


SQLITE = shutil.which("sqlite3")


@pytest.mark.skipif(not SQLITE, reason="no sqlite3 program here")
@pytest.mark.parametrize("view", COLUMNS)
def test_view_answers_the_sqlite3_program_while_a_transaction_is_open(view, lived):
    with lived.transaction() as sql:
        sql.execute("update runner set note = note")
        words = [SQLITE, "-readonly", "-header", "-separator", " ", lived.path, f"select * from {view}"]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    lines = answer.stdout.splitlines()
    assert set(COLUMNS[view].split()) <= set(lines[0].split())
    assert len(lines) > 1


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.booleans(), st.floats(0, 200)), max_size=12),
    st.lists(st.sampled_from([10.0, 60.0, 100.0]), min_size=1, unique=True),
)
@settings(max_examples=50, deadline=None)
def test_used_is_what_is_in_flight_or_finished_within_the_window(asked, spans):
    clock, limits = adce.Clock(), tuple(adce.WindowLimit(50, span) for span in spans)
    rates = adce.RateLimiting(scopes={"a": adce.ScopeLimits(limits), "global": adce.ScopeLimits(limits)})
    sources = {name: adce.Source(name) for name in "ab"}
    paths = Path("adce.yaml"), Path("adce.db"), "lake"
    with contextlib.closing(adce.memory_database()) as database:
        with database.transaction() as sql:
            adce.declare_limits(sql, adce.Configuration(*paths, rate_limiting=rates, sources=sources), clock)
            for source, is_over, age in sorted(asked, key=lambda one: -one[2]):
                permit = adce.grant(sql, source, 500, clock.boot() - age)
                if is_over:
                    adce.release(sql, permit, clock.boot() - age)
        rows = {(row["scope"], row["window_seconds"]): row for row in database.read("select * from rates")}
    for scope, span in itertools.product(("a", "global"), spans):
        mine = [(is_over, age) for source, is_over, age in asked if scope in ("global", source)]
        assert rows[scope, span]["in_flight"] == sum(not is_over for is_over, _ in mine)
        counted = [not is_over or age < span for is_over, age in mine if not (is_over and abs(age - span) < 1)]
        assert sum(counted) <= rows[scope, span]["used"] <= sum(counted) + len(mine) - len(counted)


def test_source_without_limits_is_shown_for_its_pauses():
    configuration = adce.Configuration(Path("adce.yaml"), Path("adce.db"), "lake", sources={"a": adce.Source("a")})
    with contextlib.closing(adce.memory_database()) as database:
        with database.transaction() as sql:
            adce.declare_limits(sql, configuration, adce.Clock())
        rows = [tuple(row) for row in database.read("select scope, window_seconds, max_requests from rates")]
    assert sorted(rows) == [("a", None, None), ("global", None, None)]


def test_score_of_the_view_is_the_formula(lived):
    weighting, now = adce.PriorityWeighting(), time.time()
    rows = lived.read(
        "select q.*, o.detected_at, d.bonus from queue q join objects o using (key) join datasets d using (dataset)"
    )
    for row in rows:
        age = (now - row["detected_at"]) / adce.HOUR
        expected = weighting.base_scores[row["priority"]] + weighting.age_weight * age
        expected += max(weighting.gap_size_weight * row["gap_size"], -weighting.max_gap_size_penalty) + row["bonus"]
        assert row["score"] == pytest.approx(expected, abs=0.05)
        assert row["age_hours"] == pytest.approx(age, abs=0.05)
    assert rows


def test_pause_is_seen_with_its_reason(lived):
    row = lived.read("select blocked_until, reason from rates where scope = 'league'")[0]
    assert row["blocked_until"] > adce.utc_text(adce.Clock().wall())
    assert row["reason"] == "asked to"


def test_every_gap_has_a_task_and_every_open_task_a_gap(lived):
    assert lived.value("select count(*) from gaps where task_id is null") == 0
    assert lived.value("select count(*) from queue where key not in (select key from gaps)") == 0


def test_stats_are_the_sums_of_the_attempts(lived):
    attempts = lived.read("select outcome, count(*), round(sum(seconds), 3) from attempts group by outcome")
    stats = lived.read("select outcome, sum(attempts), round(sum(seconds), 3) from stats group by outcome")
    assert {tuple(row)[:2] for row in attempts} == {tuple(row)[:2] for row in stats}
    assert {"ok", "http_error", "not_yet"} == {row["outcome"] for row in attempts}
