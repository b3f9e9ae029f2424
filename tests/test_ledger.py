"""The score, and objects kept in step with their tasks."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adce

HOUR = 3600
TEXT = """\
seasons: [{label: "2025-26", end: 2026, start: 2025-10-01, finish: 2026-06-19}]
priority_weighting:
  source_multipliers: {espn: 1.5}
sources: {espn: {base_url: "http://localhost"}}
datasets:
  days:
    source: espn
    key: "days/{date}.json"
    url: "/{date}"
    partitions: {dates: {from: 2025-09-01}}
    priority: CRITICAL
"""
weightings = st.builds(
    adce.PriorityWeighting,
    age_weight=st.floats(0, 10),
    source_multipliers=st.fixed_dictionaries({"espn": st.floats(0.1, 5)}),
    gap_size_weight=st.floats(-2, 1),
    max_gap_size_penalty=st.floats(0, 50),
    success_rate_weight=st.floats(0, 100),
)


def formula(weighting: adce.PriorityWeighting, priority: str, age_hours: float, gap_size: int, rate: float) -> float:
    """The score as the user wrote it."""
    score = weighting.base_scores[priority] + weighting.age_weight * age_hours
    score *= weighting.source_multipliers["espn"]
    score += max(weighting.gap_size_weight * gap_size, -weighting.max_gap_size_penalty)
    return score + weighting.success_rate_weight * rate


@given(weightings, st.sampled_from(list(adce.Priority)), st.integers(0, 10**6), st.integers(1, 1000), st.floats(0, 1))
def test_score_equals_the_formula_at_any_age(weighting, priority, age_seconds, gap_size, rate):
    detected = 1_760_000_000
    rank, slope = adce.rank_of(weighting, "espn", priority, gap_size, detected)
    score = rank + slope * (detected + age_seconds) / HOUR + weighting.success_rate_weight * rate
    assert score == pytest.approx(formula(weighting, priority, age_seconds / HOUR, gap_size, rate), abs=0.01)


tasks = st.tuples(st.sampled_from(list(adce.Priority)), st.integers(1, 100), st.integers(0, 10**6))


@given(weightings, tasks, tasks, st.integers(0, 10**7))
def test_order_by_rank_is_the_order_by_score_for_ever(weighting, one, other, later):
    now = 1_761_000_000 + later
    ranks = [adce.rank_of(weighting, "espn", priority, size, 1_760_000_000 + at) for priority, size, at in (one, other)]
    scores = [
        formula(weighting, priority, (now - 1_760_000_000 - at) / HOUR, size, 1.0)
        for priority, size, at in (one, other)
    ]
    assert (ranks[0][0] - ranks[1][0]) == pytest.approx(scores[0] - scores[1], abs=0.01)


def test_without_weights_priority_alone_counts():
    weighting = adce.PriorityWeighting(enabled=False)
    ranks = [adce.rank_of(weighting, "espn", priority, 50, 1_760_000_000) for priority in adce.Priority]
    assert ranks == [(1000, 0.0), (100, 0.0), (10, 0.0), (1, 0.0)]


@pytest.fixture
def configuration(configure) -> adce.Configuration:
    return configure(TEXT)


def expect(database: adce.Database, configuration: adce.Configuration, now: float, day: str = "2025-10-09") -> int:
    """One expected object that is not in the store."""
    with database.transaction() as sql:
        adce.declare_datasets(sql, configuration)
        sql.execute(adce.WANTED)
        sql.execute("delete from wanted")
        ledger = adce.Ledger(sql, configuration, now)
        adce.expect(ledger, configuration.datasets["days"], [({"date": day}, None)])
        new = [(*row, int(now)) for row in adce.new_objects(ledger, configuration.datasets, "", adce.LAST_KEY)]
        sql.executemany(adce.UPSERT_OBJECT, new)
        row = ledger.objects("o.key = :key", {"key": f"days/{day}.json"})[0]
        return ledger.note(row, proven=1).object_id


def note(
    database: adce.Database, configuration: adce.Configuration, now: float, object_id: int, **facts
) -> adce.Ledger:
    with database.transaction() as sql:
        ledger = adce.Ledger(sql, configuration, now)
        ledger.note(ledger.some([object_id])[0], **facts)
    return ledger


def test_critical_gap_of_two_hours_has_the_score_of_the_example(database, configuration):
    now = adce.Clock().wall()
    expect(database, configuration, now - 2 * HOUR)
    row = database.read("select * from queue")[0]
    assert (row["score"], row["priority"], row["age_hours"]) == (pytest.approx(1521.4, abs=0.01), "CRITICAL", 2)


@settings(max_examples=20, deadline=None)
@given(weightings, st.integers(0, 10**6), st.floats(0, 1))
def test_view_shows_the_score_of_the_formula(weighting, age_seconds, rate):
    database, now = adce.memory_database(), adce.Clock().wall()
    source = adce.Source("espn")
    partitions = adce.Partitions(dates=adce.Dates(first=datetime.date(2025, 1, 1)))
    days = adce.Dataset("days", "espn", adce.Template("days/{date}.json"), partitions, priority="HIGH")
    configuration = adce.Configuration(
        Path("x"), Path("x"), "x", priority_weighting=weighting, sources={"espn": source}, datasets={"days": days}
    )
    expect(database, configuration, now - age_seconds)
    with database.transaction() as sql:
        sql.execute("update datasets set success_rate = ?", (rate,))
        adce.declare_datasets(sql, configuration)
    seen = database.value("select score from queue")
    assert seen == pytest.approx(formula(weighting, "HIGH", age_seconds / HOUR, 1, rate), rel=1e-6, abs=0.1)


def test_gap_that_persists_keeps_its_task_and_its_age(database, configuration):
    now = int(adce.Clock().wall())
    object_id = expect(database, configuration, now - 5 * HOUR)
    assert note(database, configuration, now, object_id).created == 0
    rows = database.read("select task_id, age_hours, state from queue")
    assert [tuple(row) for row in rows] == [(object_id, 5, "pending")]


def test_object_that_is_there_closes_its_task(database, configuration):
    object_id = expect(database, configuration, 1_760_000_000)
    ledger = note(database, configuration, 1_760_000_100, object_id, size=9, etag="a", modified_at=1_760_000_050)
    assert ledger.closed == 1
    assert [database.value(f"select count(*) from {view}") for view in ("queue", "gaps")] == [0, 0]


def test_dropped_object_loses_its_task_and_returns_with_a_new_one(database, configuration):
    now = int(adce.Clock().wall())
    object_id = expect(database, configuration, now - 5 * HOUR)
    with database.transaction() as sql:
        adce.Ledger(sql, configuration, now).drop("o.object_id = :id", {"id": object_id})
    assert database.read("select * from queue") == []
    assert expect(database, configuration, now - HOUR) == object_id
    assert [tuple(row) for row in database.read("select age_hours, attempts from queue")] == [(1, 0)]


def test_only_the_season_before_the_current_one_is_of_medium_priority(database, configure):
    row = '{{label: "{}-{}", end: 20{}, start: {}-10-20, finish: 20{}-06-20}}'
    seasons = [row.format(year, year - 1999, year - 1999, year, year - 1999) for year in (2022, 2023, 2024)]
    text = TEXT.replace("seasons: [", f"seasons: [{', '.join(seasons)}, ").replace("    priority: CRITICAL\n", "")
    for year in (2023, 2024, 2025):
        expect(database, configure(text.replace("2025-09-01", "2022-10-20")), 1_770_000_000, f"{year}-01-15")
    found = database.read("select priority from queue order by key")
    assert [row["priority"] for row in found] == ["LOW", "LOW", "MEDIUM"]
