"""The lake that most tests fill: a league's days and their games."""

from __future__ import annotations

from pathlib import Path

LEAGUE = """\
database: adce.db
store: lake
grace_seconds: {grace}
max_concurrent_scrapers: 5
retry: {{max_attempts: {attempts}, initial_delay_seconds: {delay}, max_delay_seconds: 60}}
{limits}
sources:
  league:
    base_url: {address}
    timeout_seconds: 5
    error_when: "code && message"
datasets:
  days:
    source: league
    key: "days/{{date:%Y%m%d}}.json"
    url: "/scoreboard?dates={{date:%Y%m%d}}"
    partitions: {{dates: {{from: 2025-01-01, to: 2025-01-{last:02}}}}}
    freshness: {{refetch_every: 6h, until: "length(events[?!status.type.completed]) == `0`"}}
    validate: {{json: true, min_bytes: 500, require: ["leagues[0].id == '46'"]}}
  games:
    source: league
    key: "games/{{game_id}}.json"
    url: "/summary?event={{game_id}}"
    partitions: {{from: days, ids: "events[?status.type.completed].id", as: game_id}}
    validate: {{json: true, require: ["header.id == '{{game_id}}'", "length(plays || `[]`) > `100`"]}}
"""


def league_text(
    address: str, *, last: int = 6, limits: str = "", attempts: int = 5, delay: float = 1, grace: float = 5
) -> str:
    """An adce.yaml for a league at an address."""
    return LEAGUE.format(address=address, last=last, limits=limits, attempts=attempts, delay=delay, grace=grace)


def write_league(folder: Path, address: str, **settings) -> None:
    (folder / "adce.yaml").write_text(league_text(address, **settings), encoding="utf-8")


def write_widely(folder: Path, address: str) -> str:
    """The same with a year of days before, of which the text that is returned expects none any more."""
    text = league_text(address)
    (folder / "adce.yaml").write_text(text.replace("from: 2025-01-01", "from: 2024-01-01"), encoding="utf-8")
    return text
