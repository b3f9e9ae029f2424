"""An evening of games, simulated: each is in the lake within a minute of its end, and no limit is broken."""

from __future__ import annotations

import datetime
import io
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from zoneinfo import ZoneInfo

from conftest import ManualClock
from upstream import Answer, Upstream, json_answer

import adce

DAY = datetime.date(2026, 1, 15)
EASTERN = ZoneInfo("America/New_York")
CONFIGURATION = """\
queue_check_seconds: 600
rate_limiting:
  source_limits: {{espn: {{requests_per_minute: 30, requests_per_hour: 400, burst_size: 10}}}}
  backoff: {{threshold_percent: 80}}
sources: {{espn: {{base_url: "{address}"}}}}
datasets:
  schedules:
    source: espn
    key: "schedules/{{date:%Y%m%d}}.json"
    url: "/scoreboard?dates={{date:%Y%m%d}}"
    partitions: {{dates: {{from: 2026-01-15, to: today, timezone: America/New_York}}}}
    available_after: "18:00"
    freshness:
      refetch_every: 6h
      until: "length(events[?!status.type.completed]) == `0`"
      live: {{while: "events[?status.type.state != 'post']", every: 45s}}
    validate: {{json: true}}
  games:
    source: espn
    key: "games/{{game_id}}.json"
    url: "/summary?event={{game_id}}"
    partitions: {{from: schedules, ids: "events[?status.type.completed].id", as: game_id}}
    validate: {{json: true, require: ["final"]}}
"""


def eastern(hour: int, minute: int, days: int = 0) -> float:
    local = datetime.datetime.combine(DAY, datetime.time(hour, minute), EASTERN)
    return (local + datetime.timedelta(days=days)).timestamp()


class Evening:
    """Fifteen games that end between 21:00 and 01:30, as a source tells of them at any instant."""

    def __init__(self, clock: ManualClock, upstream: Upstream) -> None:
        first, last = eastern(21, 0), eastern(1, 30, days=1)
        self.clock = clock
        self.ends = {f"40{number:02}": first + (last - first) * number / 14 for number in range(15)}
        self.asked: list[float] = []
        self.collected: dict[str, float] = {}
        upstream.route("/scoreboard", self.scoreboard)
        upstream.route("/summary", self.summary)

    def scoreboard(self, _path: str, query: dict[str, str]) -> Answer:
        now = self.clock.wall()
        self.asked.append(self.clock.boot())
        if query["dates"] != f"{DAY:%Y%m%d}":
            return json_answer({"events": []})
        states = {
            game: "post" if now >= end else "in" if now >= end - 9000 else "pre" for game, end in self.ends.items()
        }
        events = [
            {"id": game, "status": {"type": {"completed": state == "post", "state": state}}}
            for game, state in states.items()
        ]
        return json_answer({"events": events})

    def summary(self, _path: str, query: dict[str, str]) -> Answer:
        self.asked.append(self.clock.boot())
        self.collected.setdefault(query["event"], self.clock.wall())
        return json_answer({"final": self.clock.wall() >= self.ends[query["event"]]})


class Shelf(adce.FolderStore):
    """A folder whose files are as old as simulated time says."""

    def __init__(self, root: Path, clock: ManualClock) -> None:
        super().__init__(root)
        self.clock = clock

    def write(self, key: str, body: bytes) -> adce.StoredObject:
        super().write(key, body)
        os.utime(self.root / key, (self.clock.wall(), self.clock.wall()))
        stored = self.find(key)
        assert stored
        return stored


class Inline(Executor):
    """Does at once what it is given, so that simulated time stands still meanwhile."""

    def submit(self, function: Callable, /, *arguments, **options) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        return future


def test_each_game_is_in_the_lake_within_a_minute_of_its_end(tmp_path, upstream):
    clock = ManualClock(wall=eastern(20, 30))
    evening = Evening(clock, upstream)
    (tmp_path / "adce.yaml").write_text(CONFIGURATION.format(address=upstream.address))
    configuration = adce.load_configuration(tmp_path / "adce.yaml")
    database, store = adce.open_database(configuration.database), Shelf(tmp_path / "lake", clock)
    runner = adce.Runner(configuration, database, store, adce.Journal(io.StringIO(), clock=clock))
    runner.pool = runner.listers = Inline()
    runner.run(max_seconds=5.5 * 3600)
    assert sorted(evening.collected) == sorted(evening.ends)
    late = {game: evening.collected[game] - end for game, end in evening.ends.items()}
    assert min(late.values()) >= 0
    assert max(late.values()) <= 60
    assert {one.key for one in store.list("games/")} == {f"games/{game}.json" for game in evening.ends}
    assert len(evening.asked) < 1000
    for most, seconds in ((30, 60), (400, 3600)):
        pairs = zip(evening.asked, evening.asked[most:], strict=False)
        assert all(later - earlier >= seconds for earlier, later in pairs)
    assert database.value("select state from objects_now where key = 'schedules/20260115.json'") == "present"
    database.close()


def test_day_that_is_not_live_is_asked_again_as_rarely_as_ever(configure, database, clock):
    text = CONFIGURATION.format(address="http://127.0.0.1:9")
    dataset = configure(text).datasets["schedules"]
    facts = adce.ObjectRow(etag="e", modified_at=int(clock.wall()), settled=False, live=False)
    assert adce.appraise(dataset, None, facts, clock.wall()).next_at == int(clock.wall()) + 6 * 3600
    live = adce.appraise(dataset, None, facts._replace(live=True), clock.wall())
    assert (live.reason, live.next_at) == ("live", int(clock.wall()) + 45)


def test_live_object_without_an_end_is_stale_on_its_cadence_and_fresh_afterwards(configure, clock):
    text = CONFIGURATION.format(address="http://127.0.0.1:9")
    text = text.replace('      until: "length(events[?!status.type.completed]) == `0`"\n', "")
    text = text.replace("      refetch_every: 6h\n", "")
    dataset = configure(text).datasets["schedules"]
    now = int(clock.wall())
    facts = adce.ObjectRow(etag="e", modified_at=now, settled=True, live=True)
    assert adce.appraise(dataset, None, facts, now) == adce.Appraisal(adce.ObjectState.PRESENT, next_at=now + 45)
    assert adce.appraise(dataset, None, facts, now + 45).state is adce.ObjectState.STALE
    over = facts._replace(live=False)
    assert adce.appraise(dataset, None, over, now + 10**6) == adce.Appraisal(adce.ObjectState.PRESENT)
