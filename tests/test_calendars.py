"""Lakes of several leagues, each with seasons of its own."""

from __future__ import annotations

import datetime

import pytest

import adce

LAKE = """\
sources: {box: {base_url: "http://127.0.0.1:9"}}
seasons:
  nba:
    - {label: 2024-25, end: 2025, start: 2024-10-22, finish: 2025-06-22}
    - {label: 2025-26, end: 2026, start: 2025-10-21, finish: 2026-06-21}
  mlb: [{label: "2025", end: 2025, start: 2025-03-18, finish: 2025-11-01}]
  wnba: [{label: "2025", end: 2025, start: 2025-05-16, finish: 2025-10-10}]
datasets:
  days: {source: box, key: "days/{season}/{date}.json", url: "/{date}", partitions: {dates: {seasons: nba}}}
  games: {source: box, key: "games/{id}.json", url: "/{id}", partitions: {from: days, ids: "[]", as: id},
          freshness: {current: 1d}}
  teams: {source: box, key: "teams/{season}.json", url: "/{season}", partitions: {seasons: mlb}}
  years: {source: box, key: "years/{season}.json", url: "/{end}", partitions: {seasons: [2024-25]}}
  open: {source: box, key: "open/{date}.json", url: "/{date}", partitions: {dates: {from: 2025-06-01, to: 2025-06-02}}}
"""
NOON = datetime.datetime(2025, 12, 1, 12, tzinfo=datetime.UTC).timestamp()


def expected(configuration: adce.Configuration, name: str) -> list[adce.ExpectedObject]:
    dataset = configuration.datasets[name]
    fields = adce.expand(dataset, NOON)
    return [adce.expected_object(dataset, one) for one in fields]


def test_each_dataset_has_the_seasons_that_it_names(configure):
    configuration = configure(LAKE)
    days = expected(configuration, "days")
    assert {one.season for one in days} == {"2024-25", "2025-26"}
    assert (days[0].key, days[-1].key) == ("days/2024-25/2024-10-22.json", "days/2025-26/2025-11-30.json")
    assert [one.key for one in expected(configuration, "teams")] == ["teams/2025.json"]
    assert [one.key for one in expected(configuration, "years")] == ["years/2024-25.json"]
    assert [one.season for one in expected(configuration, "open")] == [None, None]  # of which league?


def test_objects_below_a_dataset_have_its_calendar(configure):
    games = configure(LAKE).datasets["games"]
    assert [season.label for season in games.calendar] == ["2024-25", "2025-26"]
    assert adce.expected_object(games, {"id": "7", "date": "2025-05-20"}).season == "2024-25"


def test_urgency_follows_the_seasons_of_the_same_league(configure):
    configuration, today = configure(LAKE), datetime.date(2025, 12, 1)
    for name, season, priority in (
        ("days", "2025-26", "HIGH"),
        ("days", "2024-25", "MEDIUM"),
        ("teams", "2025", "HIGH"),
    ):
        dataset = configuration.datasets[name]
        assert adce.priority_of(adce.ObjectRow(season=season), dataset, today, 7) == priority


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("seasons: mlb", "seasons: all", 'datasets.teams.partitions.seasons: season "all" is in several calendars'),
        ("seasons: mlb", 'seasons: "2025"', 'datasets.teams.partitions.seasons: season "2025" is in several calendars'),
        ("seasons: mlb", "seasons: mbl", 'season "mbl" is not declared, did you mean "mlb"?'),
        ("seasons: mlb", "seasons: {}", "datasets.teams.partitions.seasons: expected text, found a mapping"),
        ("start: 2025-10-21", "start: 2025-06-01", "seasons.nba.1: season 2025-26 repeats or overlaps season 2024-25"),
        ("  wnba: [", "  wnba: 1\n  more: [", "seasons.wnba: expected a list, found '1' (a number)"),
    ],
)
def test_seasons_that_are_not_clear_are_a_problem(old, new, problem, configure):
    with pytest.raises(adce.ConfigurationError) as raised:
        configure(LAKE.replace(old, new, 1))
    assert problem in str(raised.value)


def test_seasons_of_one_league_need_no_name(configure):
    text = LAKE.partition("  mlb")[0].replace("  nba:\n", "") + "datasets:\n" + LAKE.partition("datasets:\n")[2]
    text = text.replace("seasons: nba", "seasons: all").replace("seasons: mlb", "seasons: [2025-26]")
    configuration = configure(text)
    assert [one.key for one in expected(configuration, "teams")] == ["teams/2025-26.json"]
    assert [one.season for one in expected(configuration, "open")] == ["2024-25", "2024-25"]
