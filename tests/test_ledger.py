"""The score, and objects kept in step with their tasks."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from conftest import ManualClock
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
    score = adce.score_at(rank, slope, adce.bonus_of(weighting, rate), detected + age_seconds)
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
    assert adce.bonus_of(weighting, 1.0) == 0


@pytest.fixture
def configuration(configure) -> adce.Configuration:
    return configure(TEXT)


def expect(database: adce.Database, configuration: adce.Configuration, now: float, day: str = "2025-10-09") -> int:
    """One expected object that is not in the store."""
    with database.transaction() as sql:
        adce.declare_datasets(sql, configuration, now)
        dataset = configuration.datasets["days"]
        wanted = adce.expected_object(dataset, {"date": day}, configuration.seasons)
        return adce.Ledger(sql, configuration, now).expect(dataset, wanted, proven=True)


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
        adce.declare_datasets(sql, configuration, now)
    seen = database.value("select score from queue")
    assert seen == pytest.approx(formula(weighting, "HIGH", age_seconds / HOUR, 1, rate), rel=1e-6, abs=0.1)


def test_gap_that_persists_keeps_its_task_and_its_age(database, configuration):
    now = 1_760_000_000
    object_id = expect(database, configuration, now)
    with database.transaction() as sql:
        ledger = adce.Ledger(sql, configuration, now + 5 * HOUR)
        known = ledger.objects("object_id = :id", {"id": object_id})[0]
        ledger.note(known, known.facts)
    rows = database.read("select task_id, detected_at, state from tasks")
    assert [tuple(row) for row in rows] == [(1, now, "pending")]


def test_object_that_is_there_closes_its_task(database, configuration):
    object_id = expect(database, configuration, 1_760_000_000)
    with database.transaction() as sql:
        ledger = adce.Ledger(sql, configuration, 1_760_000_100)
        known = ledger.objects("object_id = :id", {"id": object_id})[0]
        ledger.note(known, adce.Facts(size=9, etag="a", modified_at=1_760_000_050))
        assert ledger.closed == 1
    assert database.value("select state from tasks") == "done"
    assert database.value("select count(*) from gaps") == 0


def test_dropped_object_cancels_its_task_and_returns_with_a_new_one(database, configuration):
    object_id = expect(database, configuration, 1_760_000_000)
    with database.transaction() as sql:
        adce.Ledger(sql, configuration, 1_760_000_100).drop(object_id)
    assert expect(database, configuration, 1_760_000_200) == object_id
    assert [row[0] for row in database.read("select state from tasks order by task_id")] == ["cancelled", "pending"]


def test_key_of_another_object_is_refused(database, configuration):
    expect(database, configuration, 1_760_000_000)
    dataset = configuration.datasets["days"]
    twin = adce.ExpectedObject("days/2025-10-09.json", {"date": "2025-10-10"}, None, None, None)
    with database.transaction() as sql, pytest.raises(ValueError, match="already the key of another object"):
        adce.Ledger(sql, configuration, 1_760_000_000).expect(dataset, twin, proven=True)


def test_priority_of_an_open_task_falls_as_days_pass(database, configure, clock: ManualClock):
    configuration = configure(TEXT.replace("    priority: CRITICAL\n", ""))
    expect(database, configuration, clock.wall())
    seen = []
    for days in (0, 10, 400):
        with database.transaction() as sql:
            adce.reprioritise(sql, configuration, clock.wall() + days * 86400)
        seen.append(tuple(database.read("select priority, slope from tasks")[0]))
    assert seen == [("CRITICAL", 0.75), ("HIGH", 0.75), ("HIGH", 0.75)]


def test_only_the_season_before_the_current_one_is_of_medium_priority(database, configure):
    row = '{{label: "{}-{}", end: 20{}, start: {}-10-20, finish: 20{}-06-20}}'
    seasons = [row.format(year, year - 1999, year - 1999, year, year - 1999) for year in (2022, 2023, 2024)]
    text = TEXT.replace("seasons: [", f"seasons: [{', '.join(seasons)}, ").replace("    priority: CRITICAL\n", "")
    for year in (2023, 2024, 2025):
        expect(database, configure(text.replace("2025-09-01", "2022-10-20")), 1_770_000_000, f"{year}-01-15")
    found = database.read("select priority from queue order by key")
    assert [row["priority"] for row in found] == ["LOW", "LOW", "MEDIUM"]


GAMES = """\
  games:
    source: espn
    key: "games/{game_id}.json"
    url: "/games/{game_id}"
    partitions: {from: days, ids: "games", as: game_id}
"""


@pytest.mark.parametrize("others", [{}, {"2025-10-10": "8"}])
def test_dropped_parent_takes_along_what_it_alone_has_named_and_nothing_else(database, configure, others):
    configuration, now = configure(TEXT + GAMES), 1_760_000_000
    ids = {day: expect(database, configuration, now, day) for day in ("2025-10-09", *others)}
    with database.transaction() as sql:
        ledger = adce.Ledger(sql, configuration, now)
        for day, game in {"2025-10-09": "7", **others}.items():
            parent = ledger.objects("object_id = :id", {"id": ids[day]})[0]
            found = adce.Inspection(valid=True, verdict=None, settled=True, live=False, children={"games": [game]})
            adce.add_children(ledger, parent, found, proven=True)
    assert len(database.read("select * from queue")) == 2 * len(ids)
    with database.transaction() as sql:
        ledger = adce.Ledger(sql, configuration, now)
        ledger.drop(ids["2025-10-09"])
        assert ledger.closed == 2
    left = {f"days/{day}.json" for day in others} | {f"games/{game}.json" for game in others.values()}
    for view in ("queue", "gaps"):
        assert {row["key"] for row in database.read(f"select key from {view}")} == left


def test_dataset_that_is_no_longer_declared_is_cancelled(database, configuration, configure):
    expect(database, configuration, 1_760_000_000)
    smaller = configure(TEXT.replace("  days:", "  nights:").replace("days/", "nights/"))
    with database.transaction() as sql:
        adce.declare_datasets(sql, smaller, 1_760_000_100)
    assert database.value("select state from tasks") == "cancelled"
    assert database.value("select state from objects") == "dropped"
