"""Expected against present: gaps are exactly those of what was proven."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from conftest import ManualClock
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from runners import read_object

import adce

TEXT = """\
sources: {espn: {base_url: "http://localhost"}}
datasets:
  days:
    source: espn
    key: "days/{date}.json"
    url: "/{date}"
    partitions: {dates: {from: 2025-10-01, to: 2025-10-05}}
    freshness: {refetch_every: 6h, until: "final"}
    validate: {json: true, min_bytes: 10}
  games:
    source: espn
    key: "games/{game_id}.json"
    url: "/games/{game_id}"
    partitions: {from: days, ids: "games", as: game_id}
    validate: {json: true, require: ["id == '{game_id}'"]}
"""


class Lake:
    """A folder store with a few words for what tests do to it."""

    def __init__(self, root) -> None:
        self.store = adce.FolderStore(root)
        self.store.sweep()

    def put_day(self, day: int, games: list[str], *, final: bool = True) -> None:
        self.put(f"days/2025-10-0{day}.json", {"final": final, "games": games})

    def put_game(self, game: str) -> None:
        self.put(f"games/{game}.json", {"id": game})

    def put(self, key: str, document: object) -> None:
        self.store.write(key, json.dumps(document).encode())

    def delete(self, key: str) -> None:
        (self.store.root / key).unlink()


class Desk:
    """A lake, a configuration, and cycles between them."""

    def __init__(
        self, configuration: adce.Configuration, database: adce.Database, lake: Lake, clock: ManualClock
    ) -> None:
        self.configuration, self.database, self.lake, self.clock = configuration, database, lake, clock
        self.prefetch = adce.Prefetch()
        self.declare(configuration)

    def declare(self, configuration: adce.Configuration) -> None:
        self.configuration = configuration
        with self.database.transaction() as sql:
            adce.declare_limits(sql, configuration, self.clock)
            adce.declare_datasets(sql, configuration)

    def cycle(
        self,
        store: adce.Store | None = None,
        accept_loss: tuple[str, ...] = (),
        *,
        is_full: bool = False,
    ) -> dict:
        self.clock.advance(60)
        store = store or self.lake.store
        options = adce.CycleOptions(is_full, accept_loss)
        steps = adce.reconcile(self.database, self.configuration, store, self.clock, options, self.prefetch)
        return dict(self.database.read("select * from cycles where cycle_id = ?", (adce.run_cycle(steps),))[0])

    def gaps(self) -> dict[str, str]:
        return {row["key"]: row["kind"] for row in self.database.read("select key, kind from gaps")}

    def live_tasks(self) -> dict[str, tuple[int, int]]:
        """Task and detection by key."""
        rows = self.database.read("select key, object_id, detected_at from objects where task is not null")
        return {row["key"]: (row["object_id"], row["detected_at"]) for row in rows}


@pytest.fixture
def lake(tmp_path) -> Lake:
    return Lake(tmp_path / "lake")


@pytest.fixture
def desk(configure, database, lake, clock) -> Desk:
    return Desk(configure(TEXT), database, lake, clock)


def test_first_cycle_opens_a_task_for_each_missing_object(desk):
    row = desk.cycle()
    assert (row["expected"], row["missing"], row["created"], row["error"]) == (5, 5, 5, None)
    assert set(desk.gaps()) == set(desk.live_tasks())


def test_existing_lake_is_adopted_without_a_task_for_what_is_there(desk, lake):
    for day in range(1, 6):
        lake.put_day(day, [f"{day}1", f"{day}2"])
    for game in ("11", "12", "21"):
        lake.put_game(game)
    row = desk.cycle()
    assert (row["expected"], row["present"], row["missing"], row["listed"], row["looked"]) == (15, 8, 7, 8, 15)
    assert row["created"] == desk.database.value("select count(*) from queue") == 7


def test_settled_lake_changes_nothing_in_a_cycle(desk, lake):
    for day in range(1, 6):
        lake.put_day(day, [])
    desk.cycle()
    before = desk.database.read("select * from objects_now")
    row = desk.cycle()
    assert (row["created"], row["closed"], row["present"]) == (0, 0, 5)
    assert [tuple(one) for one in desk.database.read("select * from objects_now")] == [tuple(one) for one in before]


def test_gap_that_persists_keeps_its_task_and_its_age(desk):
    desk.cycle()
    before = desk.live_tasks()
    for _ in range(5):
        desk.clock.advance(3600)
        assert desk.cycle()["created"] == 0
    assert desk.live_tasks() == before


def test_object_that_somebody_else_wrote_closes_its_gap_without_an_attempt(desk, lake):
    desk.cycle()
    lake.put_day(1, [])
    row = desk.cycle()
    assert (row["closed"], row["present"]) == (1, 1)
    assert desk.database.value("select count(*) from recent_attempts") == 0


def test_object_that_vanished_is_missing_again_with_a_task_of_its_own(desk, lake):
    desk.cycle()
    answer(desk, adce.Outcome.INVALID)
    lake.put_day(1, [])
    desk.cycle()
    lake.delete("days/2025-10-01.json")
    desk.cycle()
    assert desk.gaps()["days/2025-10-01.json"] == "missing"
    task = "select state, attempts, last_error from queue where key = 'days/2025-10-01.json'"
    assert tuple(desk.database.read(task)[0]) == ("pending", 0, None)


@pytest.mark.parametrize("body", [b"<html>error page</html>", b"", b'{"a": 1}'])
def test_object_with_wrong_content_is_suspect(desk, lake, body):
    lake.store.write("days/2025-10-01.json", body)
    desk.cycle()
    assert desk.gaps()["days/2025-10-01.json"] == "suspect"


def test_object_that_is_not_final_is_stale_and_waits_for_its_refetch(desk, lake):
    lake.put_day(1, [], final=False)
    desk.cycle()
    row = desk.database.read("select * from queue where key = 'days/2025-10-01.json'")[0]
    stored = lake.store.find("days/2025-10-01.json")
    assert desk.gaps()["days/2025-10-01.json"] == "stale"
    assert (row["state"], row["next_at"]) == (
        "retry",
        adce.utc_text(min(stored.modified_at, desk.clock.wall()) + 6 * 3600),
    )
    lake.put_day(1, [], final=True)
    desk.cycle()
    assert "days/2025-10-01.json" not in desk.gaps()


def test_only_the_gap_that_changed_its_kind_is_tried_at_once(desk, lake):
    for day in range(1, 6):
        lake.put_day(day, [], final=False)
    desk.cycle()
    assert {row["state"] for row in desk.database.read("select state from queue")} == {"retry"}
    lake.delete("days/2025-10-01.json")
    desk.cycle()
    states = [row["state"] for row in desk.database.read("select state from queue order by key")]
    assert states == ["pending", *["retry"] * 4]


def test_gap_whose_kind_stays_waits_on_whatever_else_changes(configure, database, lake, clock):
    text = "retry: {initial_delay_seconds: 3600}\n" + TEXT
    desk = Desk(configure(text), database, lake, clock)
    desk.cycle()
    answer(desk, adce.Outcome.NOT_YET)
    before = waits(desk)
    assert [state for state, _ in before] == ["retry"] * 5
    desk.declare(configure("priority_weighting: {age_weight: 7}\n" + text))
    desk.cycle()
    assert waits(desk) == before


def test_gap_that_changes_its_kind_after_a_failure_waits_on(configure, database, lake, clock):
    desk = Desk(configure("retry: {initial_delay_seconds: 3600}\n" + TEXT), database, lake, clock)
    lake.store.write("days/2025-10-01.json", b"<html>sorry, be back soon</html>")
    desk.cycle()
    answer(desk, adce.Outcome.INVALID)
    before = waits(desk)
    lake.delete("days/2025-10-01.json")
    desk.cycle()
    assert set(desk.gaps().values()) == {"missing"}
    assert waits(desk) == before


def waits(desk: Desk) -> list[tuple]:
    return [tuple(row) for row in desk.database.read("select state, next_at from queue order by key")]


def answer(desk: Desk, outcome: adce.Outcome) -> None:
    """Every pending task is attempted once, with this outcome."""
    with desk.database.transaction() as sql:
        while claimed := adce.claim(sql, desk.configuration, desk.clock, {}, 5)[0]:
            ledger, results = (
                adce.Ledger(sql, desk.configuration, desk.clock.wall()),
                [adce.Result(outcome, requests=1)],
            )
            adce.finish(ledger, claimed, results, desk.clock, random.Random(1))


def test_parent_is_read_once_for_each_version(desk, lake):
    lake.put_day(1, ["7"])
    reads: list[str] = []

    class Watched(adce.FolderStore):
        def open(self, key: str) -> BinaryIO:
            reads.append(key)
            return super().open(key)

    store = Watched(lake.store.root)
    desk.cycle(store)
    desk.cycle(store)
    lake.put_day(1, ["7", "8"])
    desk.cycle(store)
    assert reads == ["days/2025-10-01.json"] * 2
    assert {"games/7.json", "games/8.json"} <= set(desk.gaps())


def test_child_that_no_parent_names_any_more_is_dropped(desk, lake):
    lake.put_day(1, ["7", "8", "9"])
    lake.put_day(2, ["8"])
    lake.put_game("9")
    desk.cycle()
    lake.put_day(1, [])
    row = desk.cycle()
    assert {key for key in desk.gaps() if key.startswith("games/")} == {"games/8.json"}
    assert (row["closed"], row["dropped"]) == (1, 2)


def test_parents_that_name_more_than_a_page_are_followed_to_the_end(desk, lake, monkeypatch):
    monkeypatch.setattr(adce, "WRITTEN_AT_ONCE", 2)
    lake.put_day(1, list("12345"))
    lake.put_day(2, ["5", "6"])
    desk.cycle()
    assert {key for key in desk.gaps() if key.startswith("games/")} == {f"games/{game}.json" for game in "123456"}


def test_new_day_is_expected_when_it_begins_where_its_games_are_played(configure, database, lake, clock):
    dates = "from: 2025-10-08, to: today, timezone: Asia/Tokyo"
    desk = Desk(configure(TEXT.replace("from: 2025-10-01, to: 2025-10-05", dates)), database, lake, clock)
    assert desk.cycle()["expected"] == 2
    clock.advance(7 * adce.HOUR)  # the 10th there, the 9th in UTC
    assert desk.cycle()["expected"] == 3


def test_game_that_two_days_name_is_one_object(desk, lake):
    lake.put_day(1, ["7"])
    lake.put_day(2, ["7"])
    desk.cycle()
    rows = desk.database.read("select parent from objects_now where key = 'games/7.json'")
    assert [row["parent"] for row in rows] == ["days/2025-10-01.json"]


def test_id_that_makes_no_key_is_told_and_harms_nobody(desk, lake):
    lake.put_day(1, ["../../etc/passwd", "x" * 400, "7"])
    row = desk.cycle()
    games = {key for key in desk.gaps() if key.startswith("games/")}
    assert games == {"games/..%2F..%2Fetc%2Fpasswd.json", "games/7.json"}
    assert "is too long" in row["error"]


class FailingStore(adce.FolderStore):
    """Lists some objects, then breaks."""

    good = 2

    def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
        for number, stored in enumerate(super().list(prefix, after)):
            if number == self.good:
                raise adce.StoreError("the connection broke")
            yield stored


@pytest.mark.parametrize("is_known", [True, False])
def test_listing_that_fails_half_way_opens_and_closes_nothing(desk, lake, is_known):
    for day in range(1, 6):
        lake.put_day(day, [])
    if is_known:
        desk.cycle()
    row = desk.cycle(FailingStore(lake.store.root))
    assert row["error"] == "the connection broke"
    assert desk.gaps() == {}
    assert desk.cycle()["present"] == 5


class ShuffledStore(adce.FolderStore):
    """Has no order, as some stores."""

    def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
        yield from reversed(list(super().list(prefix, after)))


def test_store_without_order_is_compared_rightly(desk, lake):
    for day in range(1, 5):
        lake.put_day(day, [])
    for _ in range(2):
        row = desk.cycle(ShuffledStore(lake.store.root))
        assert (row["present"], row["missing"], row["error"]) == (4, 1, None)


def test_store_that_loses_its_order_is_told_and_sorted_from_then_on(desk, lake):
    for day in range(1, 6):
        lake.put_day(day, [])
    desk.cycle()
    row = desk.cycle(ShuffledStore(lake.store.root))
    assert "listed" in row["error"]
    assert desk.gaps() == {}
    assert desk.cycle(ShuffledStore(lake.store.root))["error"] is None


MANY = TEXT.replace("to: 2025-10-05", "to: 2025-10-05").replace("from: 2025-10-01", "from: 2025-05-01")


def fill_days(desk: Desk, lake: Lake) -> list[str]:
    desk.cycle()
    keys = sorted(desk.gaps())
    for key in keys:
        lake.put(key, {"final": True, "games": []})
    desk.cycle()
    return keys


def test_mass_loss_opens_no_gap_until_it_is_believed(configure, database, lake, clock):
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    for key in keys[:120]:
        lake.delete(key)
    row = desk.cycle()
    assert f"days: 120 of {len(keys)} objects vanished at once" in row["error"]
    assert (row["missing"], desk.live_tasks()) == (0, {})
    assert desk.cycle(accept_loss=("days",))["missing"] == 120


def test_unmounted_or_empty_store_opens_no_gap(configure, database, lake, clock, tmp_path):
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    for key in keys[30:]:
        lake.delete(key)
    desk.cycle(accept_loss=("days",))
    lake.store.root.rename(tmp_path / "elsewhere")
    assert "is not there" in desk.cycle()["error"]
    lake.store.sweep()
    assert "vanished at once" in desk.cycle()["error"]
    assert desk.database.value("select sum(present) from coverage") == 30


def test_dataset_of_which_everything_is_gone_opens_no_gap_while_the_others_are_there(desk, lake):
    games = [f"4000000{number:02}" for number in range(12)]
    for day in range(1, 6):
        lake.put_day(day, games if day == 1 else [])
    for game in games:
        lake.put_game(game)
    desk.cycle()
    for game in games:
        lake.delete(f"games/{game}.json")
    assert "games: 12 of 12 objects vanished at once" in desk.cycle()["error"]
    assert desk.gaps() == {}
    assert desk.cycle(accept_loss=("games",))["missing"] == 12


@pytest.mark.parametrize(("games", "missing"), [(10, 10), (11, 0)])
def test_dataset_of_which_ten_objects_were_all_is_believed_to_be_gone(games, missing, desk, lake):
    for day in range(1, 6):
        lake.put_day(day, [str(game) for game in range(games)])
    for game in range(games):
        lake.put_game(str(game))
    desk.cycle()
    for game in range(games):
        lake.delete(f"games/{game}.json")
    assert desk.cycle()["missing"] == missing


@pytest.mark.parametrize(("lost", "missing"), [(15, 15), (16, 0)])
def test_many_losses_are_believed_up_to_a_tenth(lost, missing, configure, database, lake, clock, monkeypatch):
    monkeypatch.setattr(adce, "BRAKE_OBJECTS", 5)
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    assert len(keys) == 158
    for key in keys[:lost]:
        lake.delete(key)
    assert desk.cycle()["missing"] == missing


def test_store_that_lists_nothing_at_all_is_not_believed_however_small_its_datasets(desk, lake):
    for day in range(1, 6):
        lake.put_day(day, list("123456"))
    for game in "123456":
        lake.put_game(game)
    desk.cycle()
    for key in [entry.key for entry in lake.store.list("")]:
        lake.delete(key)
    assert desk.cycle()["missing"] == 0


def test_changed_freshness_holds_for_what_was_there_before(configure, database, lake, clock):
    desk = Desk(configure(TEAMS), database, lake, clock)
    lake.put("teams/ATL", {})
    desk.cycle()
    clock.advance(adce.HOUR)
    desk.declare(configure(TEAMS.replace('url: "/{team}",', 'url: "/{team}", freshness: {refetch_every: 1h},')))
    desk.cycle()
    assert desk.gaps()["teams/ATL"] == "stale"


class LockedStore(adce.FolderStore):
    """One of its folders cannot be listed, and one of its objects not be read."""

    def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
        if prefix == "games/":
            raise adce.UnusablePathError("cannot list games: Permission denied")
        yield from super().list(prefix, after)

    def open(self, key: str) -> BinaryIO:
        if key == "days/2025-10-01.json":
            raise adce.UnusablePathError(f"cannot read {key}: Permission denied")
        return super().open(key)


def test_one_folder_or_object_that_cannot_be_used_does_not_hold_up_the_others(desk, lake):
    for day in range(1, 5):
        lake.put_day(day, [f"40000000{day}"])
    row = desk.cycle(LockedStore(lake.store.root))
    assert "cannot list games: Permission denied" in row["error"]
    assert "cannot read days/2025-10-01.json: Permission denied" in row["error"]
    assert desk.gaps() == {"days/2025-10-05.json": "missing"}
    row = desk.cycle()
    assert (row["error"], row["missing"]) == (None, 5)


@pytest.mark.parametrize(("lost", "missing"), [(99, 99), (100, 100), (101, 0)])
def test_losses_are_gaps_at_once_up_to_a_hundred(lost, missing, configure, database, lake, clock):
    desk = Desk(configure(MANY), database, lake, clock)
    for key in fill_days(desk, lake)[:lost]:
        lake.delete(key)
    row = desk.cycle()
    assert (row["missing"], bool(row["error"])) == (missing, not missing)


def note_stored(ledger: adce.Ledger, lake: Lake, key: str) -> None:
    """What a runner does with an object that it has just stored, and that is final."""
    known, stored = ledger.objects("o.key = :key", {"key": key})[0], lake.store.find(key)
    assert stored
    found = adce.Inspection(settled=True, live=False, mentions={})
    ledger.write([ledger.appraised(ledger.stored(known, stored, found))])


@pytest.mark.parametrize(("before", "listing"), [("stale", "days/"), ("missing", "days/"), ("lost", "games/")])
def test_object_that_is_stored_during_a_cycle_is_not_taken_for_what_was_listed(before, listing, desk, lake):
    """Before its own listing is compared, or before what is lost is noted."""
    key = "days/2025-10-01.json"

    class Overtaken(adce.FolderStore):
        def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
            entries = list(super().list(prefix, after))
            if prefix == listing:
                lake.put_day(1, ["7"])
                number = desk.database.value("select max(cycle_id) from cycles")
                with desk.database.transaction() as sql:
                    note_stored(adce.Ledger(sql, desk.configuration, desk.clock.wall(), number), lake, key)
            yield from entries

    if before != "missing":
        lake.put_day(1, [], final=False)
    desk.cycle()
    if before == "lost":
        lake.delete(key)
    desk.cycle(Overtaken(lake.store.root))
    assert key not in desk.gaps()
    assert desk.database.value("select etag from objects_now where key = ?", (key,)) == lake.store.find(key).etag


def test_object_that_is_fetched_anew_while_a_cycle_reads_it_keeps_what_was_fetched(desk, lake):
    key = "days/2025-10-01.json"
    lake.put_day(1, ["7"], final=False)

    class Overtaken(adce.FolderStore):
        def open(self, key: str) -> BinaryIO:
            body = super().open(key)
            lake.put_day(1, ["7", "8"])
            with desk.database.transaction() as sql:
                note_stored(adce.Ledger(sql, desk.configuration, desk.clock.wall(), 1), lake, key)
            return body

    desk.cycle(Overtaken(lake.store.root))
    assert key not in desk.gaps()
    assert desk.database.value("select etag from objects_now where key = ?", (key,)) == lake.store.find(key).etag


def test_new_declaration_expects_more_and_cancels_less(desk, configure, lake):
    desk.cycle()
    desk.declare(configure(TEXT.replace("from: 2025-10-01, to: 2025-10-05", "from: 2025-10-03, to: 2025-10-08")))
    row = desk.cycle()
    assert sorted(desk.gaps()) == [f"days/2025-10-0{day}.json" for day in range(3, 9)]
    assert row["created"] == 3


def test_day_that_is_no_longer_expected_takes_its_games_along_and_brings_them_back(desk, configure, lake):
    lake.put_day(1, ["7", "8"])
    lake.put_day(2, ["8"])
    desk.cycle()
    assert {"games/7.json", "games/8.json"} <= set(desk.live_tasks())
    desk.declare(configure(TEXT.replace("from: 2025-10-01", "from: 2025-10-02")))
    desk.cycle()
    assert {key for key in desk.live_tasks() if key.startswith("games/")} == {"games/8.json"}
    desk.declare(configure(TEXT))
    desk.cycle()
    assert {key for key in desk.live_tasks() if key.startswith("games/")} == {"games/7.json", "games/8.json"}


WIDE = TEXT.replace("from: 2025-10-01", "from: 2025-05-01")


@pytest.mark.parametrize(
    ("text", "expected", "dropped"),
    [
        (WIDE.replace("from: 2025-05-01", "from: 2025-10-01"), 5, 153),
        (
            WIDE.replace("  days:", "  other:").replace("from: days", "from: other").replace('"days/', '"other/'),
            158,
            158,
        ),
        (TEXT.replace('"days/', '"other/'), 5, 158),
    ],
)
def test_mistake_in_the_declaration_is_undone_by_the_next_cycle(
    configure, database, lake, clock, text, expected, dropped
):
    desk = Desk(configure(WIDE), database, lake, clock)
    for day in range(1, 6):
        lake.put_day(day, ["7", "8"])
    lake.put_game("7")
    desk.cycle()
    before = database.read("select dataset, key, state, etag, parent from objects_now")
    desk.declare(configure(text))
    row = desk.cycle()
    assert (row["expected"], row["dropped"], row["error"]) == (
        expected + 2 * (expected == 5 and "other" not in text),
        dropped + 2 * ("other" in text),
        None,
    )
    desk.declare(configure(WIDE))
    assert desk.cycle()["error"] is None
    after = database.read("select dataset, key, state, etag, parent from objects_now where state != 'dropped'")
    assert list(map(tuple, after)) == list(map(tuple, before))


def test_what_people_skip_counts_as_expected(configure, database, lake, clock):
    desk = Desk(configure(WIDE), database, lake, clock)
    desk.cycle()
    with database.transaction() as sql:
        ledger = adce.Ledger(sql, desk.configuration, clock.wall())
        adce.skip_tasks(ledger, [row[0] for row in database.read("select task_id from queue limit 140")], "enough")
    desk.declare(configure(WIDE))
    row = desk.cycle()
    assert (row["expected"], row["dropped"], database.value("select sum(skipped) from coverage")) == (18, 0, 140)


def test_ids_that_name_far_less_are_followed_and_brought_back(configure, database, lake, clock):
    desk, games = Desk(configure(TEXT), database, lake, clock), [f"g{number}" for number in range(200)]
    lake.put("days/2025-10-01.json", {"final": True, "games": games, "other": games[:20]})
    assert desk.cycle()["expected"] == 205
    desk.declare(configure(TEXT.replace('ids: "games"', 'ids: "other"')))
    row = desk.cycle()
    assert (row["expected"], row["dropped"], row["error"]) == (25, 180, None)
    desk.declare(configure(TEXT))
    assert desk.cycle()["expected"] == 205


def test_parents_that_name_far_less_are_followed_and_counted(configure, database, lake, clock):
    desk, games = Desk(configure(TEXT), database, lake, clock), [f"g{number}" for number in range(200)]
    lake.put_day(1, games)
    assert desk.cycle()["expected"] == 205
    lake.put_day(1, games[:20])
    row = desk.cycle()
    assert (row["expected"], row["dropped"], row["error"]) == (25, 180, None)
    assert desk.cycle()["dropped"] == 0


def fetch(desk: Desk, lake: Lake, key: str, document: object) -> None:
    """What a runner does with a task: claims it, stores the object, records that."""
    with desk.database.transaction() as sql:
        desk.clock.advance(60)
        ledger = adce.Ledger(sql, desk.configuration, desk.clock.wall())
        known = ledger.objects("o.key = :key", {"key": key})[0]
        body = json.dumps(document).encode()
        children = desk.configuration.children_of(known.dataset)
        found = adce.inspect(desk.configuration.datasets[known.dataset], known.fields, body, children)
        result = adce.Result(adce.Outcome.OK, stored=lake.store.write(key, body), inspection=found)
        adce._settle(ledger, known, result, adce.SourceHealth(), random.Random(1))


def test_children_that_a_refetched_parent_names_no_more_are_dropped_by_the_next_cycle(desk, lake):
    lake.put_day(1, ["7", "8"])
    desk.cycle()
    fetch(desk, lake, "days/2025-10-01.json", {"final": True, "games": ["8", "9"]})
    assert {"games/7.json", "games/8.json", "games/9.json"} <= desk.gaps().keys()
    desk.cycle()
    assert {key for key in desk.gaps() if key.startswith("games/")} == {"games/8.json", "games/9.json"}


def test_what_a_fetched_parent_names_is_decided_by_the_next_cycle_when_it_is_not_new_or_no_key(desk, lake):
    def parent() -> str:
        return desk.database.value("select parent from objects_now where key = 'games/7.json'")

    lake.put_day(2, ["7"])
    desk.cycle()
    fetch(desk, lake, "days/2025-10-01.json", {"final": True, "games": ["7"]})
    assert parent() == "days/2025-10-02.json"
    assert desk.cycle()["error"] is None
    assert parent() == "days/2025-10-01.json"
    fetch(desk, lake, "days/2025-10-01.json", {"final": True, "games": ["7", "x" * 400]})
    assert desk.cycle()["error"].startswith("days/2025-10-01.json: games: the key games/xxx")


def test_game_that_a_later_day_names_first_while_a_cycle_lists_has_the_first_day_after_the_next(desk, lake):
    class Overtaken(adce.FolderStore):
        def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
            if prefix == "games/":
                fetch(desk, lake, "days/2025-10-02.json", {"final": True, "games": ["7"]})
            yield from super().list(prefix, after)

    desk.cycle()
    lake.put_day(1, ["7"])
    desk.cycle(Overtaken(lake.store.root))
    desk.cycle()
    assert desk.database.value("select parent from objects_now where key = 'games/7.json'") == "days/2025-10-01.json"


def test_game_that_a_day_names_when_its_page_is_past_is_not_dropped(desk, lake):
    lake.put_day(2, ["7"])
    is_named, wanted = False, "select count(*) from wanted where key like 'games/%'"
    for _ in adce.reconcile(desk.database, desk.configuration, lake.store, desk.clock):
        with desk.database.transaction() as sql:
            is_past = sql.execute(wanted).fetchone()[0]
        if is_past and not is_named:
            is_named = True
            fetch(desk, lake, "days/2025-10-01.json", {"final": True, "games": ["9"]})
    known = "select state from objects_now where key = 'games/9.json'"
    assert (is_named, desk.database.value(known)) == (True, "missing")
    desk.cycle()
    assert desk.database.value(known) == "missing"


def test_what_is_expected_is_computed_anew_only_when_it_may_have_changed(desk, lake, monkeypatch):
    lake.put_day(1, ["7"])
    desk.cycle()
    for name in ("expand", "ids_of_parents"):
        monkeypatch.setattr(adce, name, lambda *_, name=name: pytest.fail(name))
    assert desk.cycle()["expected"] == 6


@pytest.mark.parametrize(("was_there", "state"), [(False, "missing"), (True, "awaited")])
def test_game_that_a_fetched_day_names_again_is_expected_at_once(was_there, state, desk, lake):
    """What is in the store of it, the next cycle says."""
    lake.put_day(1, ["7"])
    if was_there:
        lake.put_game("7")
    desk.cycle()
    lake.put_day(1, [])
    desk.cycle()
    fetch(desk, lake, "days/2025-10-01.json", {"final": True, "games": ["7"]})
    assert desk.database.value("select state from objects_now where key = 'games/7.json'") == state


MORE = """\
  tickets:
    {source: espn, key: "tickets/{id}", url: "/{id}", partitions: {from: days, ids: "tickets", as: id}}
  extra:
    {source: espn, key: "days/extra/{date}.json", url: /x, partitions: {dates: {from: 2025-10-01, to: 2025-10-01}}}
  bills:
    {source: espn, key: "bills/{id}", url: "/{id}", partitions: {from: extra, ids: "games", as: id}}
"""


def test_each_dataset_has_the_ids_of_its_own_parents_and_expression(configure, database, lake, clock):
    desk = Desk(configure(TEXT + MORE), database, lake, clock)
    lake.put("days/2025-10-01.json", {"final": True, "games": ["1"], "tickets": ["2"]})
    lake.put("days/extra/2025-10-01.json", {"games": ["3"]})
    desk.cycle()
    fetch(desk, lake, "days/2025-10-02.json", {"final": True, "games": ["4"], "tickets": ["5"]})
    named = {key for key in desk.gaps() if not key.startswith("days/")}
    assert named == {"games/1.json", "tickets/2", "bills/3", "games/4.json", "tickets/5"}


def test_every_object_is_looked_through_whatever_the_number_at_once(desk, configure, lake, monkeypatch):
    monkeypatch.setattr(adce, "CHUNK", 2)
    for day in range(1, 6):
        lake.put_day(day, [])
    desk.cycle()
    strict = TEXT.replace("{json: true, min_bytes: 10}", '{json: true, require: ["more"]}')
    desk.declare(configure(strict))
    desk.cycle()
    assert desk.gaps() == {f"days/2025-10-0{day}.json": "suspect" for day in range(1, 6)}
    desk.declare(configure(strict.replace("to: 2025-10-05", "to: 2025-10-01")))
    desk.cycle()
    assert desk.gaps() == {"days/2025-10-01.json": "suspect"}


def test_refetched_parent_that_names_far_less_is_followed_by_the_next_cycle(configure, database, lake, clock):
    desk, games = Desk(configure(TEXT), database, lake, clock), [f"g{number}" for number in range(200)]
    lake.put_day(1, games)
    desk.cycle()
    fetch(desk, lake, "days/2025-10-01.json", {"final": True, "games": ["g1"]})
    row = desk.cycle()
    assert (row["expected"], row["dropped"], row["error"]) == (6, 199, None)


def test_names_that_make_no_key_are_told_in_every_cycle_and_drop_no_child(desk, lake):
    lake.put_day(1, ["7", "8"])
    desk.cycle()
    lake.put_day(1, [" ", "8"])
    for _ in range(2):
        row = desk.cycle()
        assert "days/2025-10-01.json: games: game_id ' ' makes no key" in row["error"]
        assert {"games/7.json", "games/8.json"} <= desk.gaps().keys()
    fetch(desk, lake, "days/2025-10-01.json", {"final": True, "games": [" ", "8"]})
    assert "makes no key" in desk.cycle()["error"]
    lake.put_day(1, ["8"])
    assert desk.cycle()["error"] is None
    assert "games/7.json" not in desk.gaps()


def test_parent_that_is_not_json_is_suspect_and_keeps_its_children(configure, database, lake, clock):
    text = TEXT.replace(
        '    freshness: {refetch_every: 6h, until: "final"}\n    validate: {json: true, min_bytes: 10}\n', ""
    )
    desk = Desk(configure(text), database, lake, clock)
    lake.put_day(1, ["7", "8"])
    desk.cycle()
    lake.store.write("days/2025-10-01.json", b"<html>sorry, be back soon</html>")
    desk.cycle()
    assert desk.gaps()["days/2025-10-01.json"] == "suspect"
    assert {"games/7.json", "games/8.json"} <= desk.gaps().keys()


def test_datasets_that_only_change_their_names_keep_all(configure, database, lake, clock):
    desk, games = Desk(configure(TEXT), database, lake, clock), [f"g{number}" for number in range(200)]
    lake.put_day(1, games)
    lake.put_game("g7")
    desk.cycle()
    open_before = desk.live_tasks()
    desk.declare(
        configure(TEXT.replace("days:", "boards:").replace("from: days", "from: boards").replace("games:", "matches:"))
    )
    row = desk.cycle()
    assert (row["expected"], row["created"], row["closed"], row["error"]) == (205, 0, 0, None)
    assert desk.live_tasks() == open_before
    found = database.read("select dataset, expected, present from coverage order by 1")
    assert list(map(tuple, found)) == [("boards", 5, 1), ("matches", 200, 1)]
    assert {row[0] for row in database.read("select dataset from queue")} == {"boards", "matches"}


PLAYS = """\
  plays:
    source: espn
    key: "plays/{game_id}-{play}.json"
    url: "/plays/{game_id}/{play}"
    partitions: {from: games, ids: "plays", as: play}
"""


def test_game_that_is_named_no_more_takes_its_plays_along_and_brings_them_back(configure, database, lake, clock):
    desk = Desk(configure(TEXT + PLAYS), database, lake, clock)
    lake.put("games/7.json", {"id": "7", "plays": ["1", "2"]})
    for games, expected in ((["7"], 8), ([], 5), (["7"], 8)):
        lake.put_day(1, games)
        assert desk.cycle()["expected"] == expected


def test_renamed_field_reaches_the_children_of_children(configure, database, lake, clock):
    """Objects of an older declaration, whose fields have other names, are not asked for the names of others."""
    desk = Desk(configure(TEXT + PLAYS), database, lake, clock)
    lake.put_day(1, ["7", "8"])
    for game in "78":
        lake.put(f"games/{game}.json", {"id": game, "plays": ["1", "2"]})
        lake.put(f"clubs/{game}.json", {"id": game, "plays": ["1", "2"]})
    assert desk.cycle()["expected"] == 11
    desk.declare(configure((TEXT + PLAYS).replace("game_id", "club").replace('"games/{club}', '"clubs/{club}')))
    row = desk.cycle()
    assert (row["expected"], row["error"]) == (11, None)
    assert {key for key in desk.gaps() if "days" not in key} == {
        f"plays/{game}-{play}.json" for game in "78" for play in "12"
    }


def test_child_of_several_parents_has_the_day_of_the_first_that_names_it(configure, database, lake, clock):
    desk = Desk(configure(TEXT.replace("/games/{game_id}", "/games/{game_id}?{date}")), database, lake, clock)

    def day() -> str:
        return database.value("select fields ->> 'date' || ' ' || day from objects_now where key = 'games/7.json'")

    for number in (3, 2, 1):
        lake.put_day(number, ["7"])
        desk.cycle()
        assert day() == f"2025-10-0{number} 2025-10-0{number}"
    task = desk.live_tasks()["games/7.json"]
    for number in (1, 2):
        lake.put_day(number, [])
        desk.cycle()
        assert day() == f"2025-10-0{number + 1} 2025-10-0{number + 1}"
    assert desk.live_tasks()["games/7.json"] == task


def test_priorities_follow_the_days(configure, database, lake, clock):
    """Each day by a cycle, though nothing else has changed."""
    season = 'seasons: [{label: "2025-26", end: 2026, start: 2025-10-01, finish: 2026-06-19}]\n'
    desk = Desk(configure(season + TEXT), database, lake, clock)

    def priorities() -> set[str]:
        return {row["priority"] for row in database.read("select priority from queue")}

    desk.cycle()
    assert priorities() == {"HIGH", "CRITICAL"}
    clock.advance(10 * 86400)
    desk.cycle()
    assert priorities() == {"HIGH"}


def test_gap_size_of_a_batch_follows_every_cycle(configure, database, lake, clock):
    batch = """\
  clubs:
    source: espn
    key: "clubs/{kind}/{club}"
    command: ["true"]
    batch: {group_by: kind, max: 10}
    partitions: {values: {kind: [x, y], club: [ATL, BOS, CHI]}}
"""
    desk = Desk(configure(TEXT + batch), database, lake, clock)

    def sizes() -> dict[str, int]:
        return dict(map(tuple, database.read("select key, gap_size from queue where dataset = 'clubs'")))

    desk.cycle()
    assert set(sizes().values()) == {3}
    lake.put("clubs/x/ATL", {})
    desk.cycle()
    assert sizes() == {f"clubs/{key}": 3 - (key < "y") for key in ("x/BOS", "x/CHI", "y/ATL", "y/BOS", "y/CHI")}


def test_what_is_no_id_is_told_and_drops_no_child(desk, lake):
    lake.put_day(1, ["7", "8"])
    desk.cycle()
    lake.put("days/2025-10-01.json", {"final": True, "games": [{"id": "7"}, None, ""]})
    for _ in range(2):
        assert desk.cycle()["error"] == "days/2025-10-01.json: games: {'id': '7'} is not an id"
    assert {"games/7.json", "games/8.json"} <= desk.gaps().keys()


def test_keys_that_swap_between_values_and_names_are_all_expected(configure, database, lake, clock):
    clubs = (
        '  clubs: {source: espn, key: "clubs/{club}.json", url: "/{club}", partitions: {values: {club: ["7", "8"]}}}\n'
    )
    desk = Desk(configure(TEXT + clubs), database, lake, clock)
    lake.put_day(1, ["7", "8"])
    assert desk.cycle()["expected"] == 9
    swapped = (TEXT + clubs).replace('"games/', '"x/').replace('"clubs/', '"games/').replace('"x/', '"clubs/')
    for text in (swapped, TEXT + clubs):
        desk.declare(configure(text))
        for _ in range(2):
            assert desk.cycle()["expected"] == 9


def test_children_of_the_parents_of_before_are_expected_no_more(configure, database, lake, clock):
    events = TEXT.partition("  games:")[0].partition("datasets:\n")[2].replace("days", "events")
    desk = Desk(configure(TEXT + events), database, lake, clock)
    lake.put_day(1, ["7", "8"])
    lake.put("events/2025-10-01.json", {"final": True, "games": ["9"]})
    assert desk.cycle()["expected"] == 12
    desk.declare(configure((TEXT + events).replace("from: days", "from: events")))
    assert desk.cycle()["expected"] == 11
    assert {key for key in desk.gaps() if key.startswith("games/")} == {"games/9.json"}


def test_gap_that_another_version_leaves_open_keeps_its_task_and_its_beginning(desk, lake):
    def since() -> int:
        return desk.database.value("select unixepoch(since) from gaps where key = 'games/7.json'")

    lake.put_day(1, ["7"])
    lake.put("games/7.json", {"id": "another"})
    desk.cycle()
    before, began = desk.live_tasks()["games/7.json"], since()
    for wrong in ("yet another", "and another"):
        lake.put("games/7.json", {"id": wrong})
        desk.cycle()
        assert (desk.live_tasks()["games/7.json"], since()) == (before, began)
    lake.delete("games/7.json")
    desk.cycle()
    assert (desk.live_tasks()["games/7.json"], since()) == (before, began + 180)
    lake.put_game("7")
    desk.cycle()
    assert "games/7.json" not in desk.gaps()


@pytest.mark.parametrize("name", [".", ".."])
def test_id_that_a_url_cannot_hold_is_told(name, desk, lake):
    lake.put_day(1, [name, "7"])
    assert f"game_id '{name}' makes no key" in desk.cycle()["error"]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_object_that_was_skipped_stays_so_when_it_is_expected_again(meanwhile, desk, configure, lake):
    def retry() -> int:
        with desk.database.transaction() as sql:
            return adce.retry_tasks(adce.Ledger(sql, desk.configuration, desk.clock.wall()), [number])

    lake.put_day(1, ["7", "8"])
    desk.cycle()
    number = desk.live_tasks()["games/7.json"][0]
    with desk.database.transaction() as sql:
        adce.skip_tasks(adce.Ledger(sql, desk.configuration, desk.clock.wall()), [number], "never played")
    lake.put_day(1, ["8"])
    desk.cycle()
    assert desk.database.read("select * from objects_now where state = 'skipped'") == []
    assert not meanwhile or retry() == 1
    desk.cycle()
    assert "games/7.json" not in desk.gaps()
    lake.put_day(1, ["7", "8"])
    desk.cycle()
    if not meanwhile:
        assert "games/7.json" not in desk.gaps()
        assert [row["reason"] for row in desk.database.read("select * from objects_now where state = 'skipped'")] == [
            "never played"
        ]
        assert retry() == 1
        desk.cycle()
    assert desk.gaps()["games/7.json"] == "missing"


TEAMS = """\
sources: {espn: {base_url: "http://localhost"}}
datasets:
  teams: {source: espn, key: "teams/{team}", url: "/{team}", partitions: {values: {team: [ATL, BOS]}}}
  clubs: {source: espn, key: "clubs/{club}", url: "/{club}", partitions: {values: {club: [ATL, BOS, CHI]}}}
"""


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        (TEXT, TEXT.replace("as: game_id", "as: id").replace("{game_id}", "{id}"), {"days": 5, "games": 2}),
        (TEAMS, TEAMS.replace("{team}", "{name}").replace("{team:", "{name:"), {"teams": 2, "clubs": 3}),
        (
            TEAMS,
            TEAMS.replace('"teams/', '"x/').replace('"clubs/', '"teams/').replace('"x/', '"clubs/'),
            {"teams": 2, "clubs": 3},
        ),
        (
            TEAMS,
            TEAMS.replace('"teams/', '"moved/') + TEAMS.splitlines()[2].replace("teams:", "heirs:") + "\n",
            {"teams": 2, "clubs": 3, "heirs": 2},
        ),
    ],
)
@pytest.mark.parametrize("stored", [True, False])
def test_objects_follow_a_declaration_that_names_them_otherwise(
    before, after, counts, stored, configure, database, lake, clock
):
    desk = Desk(configure(before), database, lake, clock)
    lake.put_day(1, ["7", "8"])
    if stored:
        for name in ("teams/ATL", "teams/BOS", "clubs/ATL", "games/7.json"):
            lake.put(name, {"id": "7"})
    desk.cycle()
    desk.declare(configure(after))
    for _ in range(2):
        row = desk.cycle()
        assert row["error"] is None
        found = database.read("select dataset, sum(expected) as expected from coverage group by 1")
        assert dict(map(tuple, found)) == counts
        present = {row[0] for row in database.read("select key from objects_now where state = 'present'")}
        assert present == {row[0] for row in database.read("select key from objects_now where state != 'dropped'")} & {
            entry.key for entry in lake.store.list("")
        }
    assert database.check() == []


def test_key_that_two_datasets_claim_is_told_until_that_is_solved(configure, database, lake, clock):
    claimed = TEAMS.replace('"clubs/{club}"', '"teams/{club}L"').replace("[ATL, BOS, CHI]", "[AT, CH]")
    desk = Desk(configure(claimed), database, lake, clock)
    for _ in range(3):
        row = desk.cycle()
        assert "teams/ATL is already the key of another object of teams" in row["error"]
        assert row["expected"] == 3
    desk.declare(configure(TEAMS))
    assert desk.cycle()["expected"] == 5


def test_cycle_that_ends_early_forgets_no_child_that_is_named_no_more(desk, lake):
    lake.put_day(1, ["7", "8"])
    desk.cycle()
    lake.put_day(1, ["8"])
    desk.clock.advance(60)
    seen: list[str] = []

    class Watched(adce.FolderStore):
        def open(self, key: str) -> BinaryIO:
            seen.append("reads")
            return super().open(key)

    steps = adce.reconcile(desk.database, desk.configuration, Watched(lake.store.root), desk.clock)
    while "reads" not in seen:
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert "games/7.json" in desk.gaps()
    desk.cycle()
    assert "games/7.json" not in desk.gaps()
    assert "games/8.json" in desk.gaps()


@pytest.mark.parametrize("folder", ["games", "days/games"])
def test_object_that_is_lost_and_named_no_more_in_the_same_cycle_is_no_gap(folder, configure, database, lake, clock):
    """Also when it is listed, and lost, before the day that named it is read."""
    desk = Desk(configure(TEXT.replace('"games/', f'"{folder}/')), database, lake, clock)
    lake.put_day(1, ["7", "8"])
    for game in "78":
        lake.put(f"{folder}/{game}.json", {"id": game})
    desk.cycle()
    assert f"{folder}/7.json" not in desk.gaps()
    lake.put_day(1, ["8"])
    lake.delete(f"{folder}/7.json")
    desk.cycle()
    assert f"{folder}/7.json" not in desk.gaps()
    assert database.value("select state from objects_now where key = ?", (f"{folder}/7.json",)) == "dropped"


def test_clock_that_is_ahead_makes_no_object_fresher(configure, database, lake, clock):
    desk = Desk(configure(TEXT.replace(', until: "final"', "")), database, lake, clock)
    lake.put_day(1, [])
    key = "days/2025-10-01.json"
    os.utime(lake.store.root / key, (clock.wall() + 10 * 86400,) * 2)
    desk.cycle()
    assert key not in desk.gaps()
    desk.clock.advance(6 * 3600)
    desk.cycle()
    assert desk.gaps()[key] == "stale"


def test_object_without_a_day_that_another_program_brings_again_is_due_no_more(configure, database, lake, clock):
    once = TEAMS.replace('url: "/{team}",', 'url: "/{team}", freshness: {refetch_once_after: 1h},')
    desk = Desk(configure(once), database, lake, clock)
    for number in range(2):
        lake.put("teams/ATL", number)
        os.utime(lake.store.root / "teams/ATL", (clock.wall(),) * 2)
        desk.cycle()
        clock.advance(adce.HOUR)
    desk.cycle()
    assert "teams/ATL" not in desk.gaps()


BILLS = """\
  bills:
    source: espn
    key: "bills/{game_id}.json"
    url: "/bill?id={game_id}"
    partitions: {same_as: games}
"""


def test_dataset_that_is_added_or_comes_back_finds_its_ids_in_parents_that_were_read_before(desk, configure, lake):
    lake.put_day(1, ["7", "8"])
    desk.cycle()
    for text, bills in ((TEXT + BILLS, 2), (TEXT, 0), (TEXT + BILLS, 2)):
        desk.declare(configure(text))
        desk.cycle()
        assert len([key for key in desk.gaps() if key.startswith("bills/")]) == bills


def test_changed_size_holds_for_what_was_there_before(desk, configure, lake):
    for day in range(1, 6):
        lake.put_day(day, [])
    desk.cycle()
    desk.clock.advance(86400)
    assert desk.gaps() == {}
    desk.declare(configure(TEXT.replace("min_bytes: 10}", "min_bytes: 2, max_bytes: 5}")))
    desk.cycle()
    assert set(desk.gaps().values()) == {"suspect"}


def test_cycle_that_an_interrupt_ends_is_no_good_cycle(desk, lake):
    steps = adce.reconcile(desk.database, desk.configuration, lake.store, desk.clock)
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert desk.database.value("select error from cycles") == "stopped before its end"


def test_changed_ids_are_looked_for_in_parents_that_were_read_before(desk, configure, lake):
    lake.put("days/2025-10-01.json", {"final": True, "games": ["7"], "other": ["8"]})
    desk.cycle()
    desk.declare(configure(TEXT.replace('ids: "games"', 'ids: "other"')))
    desk.cycle()
    assert {key for key in desk.gaps() if key.startswith("games/")} == {"games/8.json"}


def test_changed_validation_is_applied_to_what_was_read_before(desk, configure, lake):
    lake.put_day(1, [])
    desk.cycle()
    desk.declare(configure(TEXT.replace("{json: true, min_bytes: 10}", '{json: true, require: ["more"]}')))
    desk.cycle()
    assert desk.gaps()["days/2025-10-01.json"] == "suspect"


def test_object_that_no_dataset_expects_is_left_alone(desk, lake):
    lake.store.write("days/notes.txt", b"mine")
    row = desk.cycle()
    assert row["listed"] == 1
    assert read_object(lake.store, "days/notes.txt") == b"mine"


def test_object_is_not_expected_before_it_is_available(configure, database, lake, clock):
    text = TEXT.replace(
        "    freshness: {refetch_every", "    available_after: {hours: 240}\n    freshness: {refetch_every"
    )
    desk = Desk(configure(text), database, lake, clock)
    assert desk.cycle()["expected"] == 0
    available = desk.database.value("select unixepoch(min(due_at)) from objects_now")
    clock.advance(available - clock.wall())
    with database.transaction() as sql:
        adce.advance(adce.Ledger(sql, desk.configuration, clock.wall()))
    assert sorted(desk.gaps()) == ["days/2025-10-01.json"]


def test_nothing_is_claimed_between_a_changed_declaration_and_its_cycle(desk, configure):
    def can_claim() -> bool:
        with desk.database.transaction() as sql:
            return adce.claim(sql, desk.configuration, desk.clock, {}, 5)[0] is not None

    desk.cycle()
    desk.declare(configure(TEXT))
    assert can_claim()
    desk.declare(configure(TEXT.replace("from: 2025-10-01", "from: 2025-10-03")))
    assert not can_claim()
    desk.cycle()
    assert can_claim()


def test_season_and_hours_that_are_declared_later_hold_for_known_objects(desk, configure):
    desk.cycle()
    season = 'seasons: [{label: "2025-26", end: 2026, start: 2025-10-01, finish: 2026-06-19}]\n'
    desk.declare(configure(season + TEXT))
    desk.cycle()
    assert {row["season"] for row in desk.database.read("select season from gaps")} == {"2025-26"}
    later = TEXT.replace("    freshness:", "    available_after: {hours: 240}\n    freshness:")
    desk.declare(configure(season + later))
    assert (desk.cycle()["expected"], desk.gaps()) == (0, {})


def test_object_that_is_expected_no_more_has_no_state_of_its_own_and_is_never_due(configure, database, lake, clock):
    text = TEXT.replace(', until: "final"', "")
    desk = Desk(configure(text), database, lake, clock)
    for day in range(1, 6):
        lake.put_day(day, [])
    lake.store.write("days/2025-10-02.json", b"nonsense")
    desk.cycle()
    desk.declare(configure(text.replace("from: 2025-10-01", "from: 2025-10-03")))
    desk.cycle()
    left = database.read("select state, reason, due_at from objects_now where state != 'present'")
    assert list(map(tuple, left)) == [("dropped", None, None)] * 2
    clock.advance(6 * adce.HOUR)
    desk.cycle()
    assert sorted(desk.gaps()) == [f"days/2025-10-0{day}.json" for day in (3, 4, 5)]


def test_task_whose_object_came_before_a_crash_is_closed_and_the_object_is_due_as_any_other(
    configure, database, lake, clock
):
    desk, key = Desk(configure(TEXT.replace(', until: "final"', "")), database, lake, clock), "days/2025-10-02.json"
    desk.cycle()
    with database.transaction() as sql:
        assert adce.claim(sql, desk.configuration, clock, {}, 5)[0].tasks[0].key == key
    lake.put_day(2, [])
    desk.cycle()
    with database.transaction() as sql:
        assert adce.requeue_orphans(sql, desk.configuration.retry) == 1
    assert key not in {row["key"] for row in database.read("select key from queue")}
    desk.cycle()
    clock.advance(6 * adce.HOUR)
    desk.cycle()
    assert desk.gaps()[key] == "stale"


def test_day_that_is_forgotten_takes_along_what_it_named(desk, configure, lake):
    lake.put_day(1, ["7"])
    desk.cycle()
    desk.declare(configure(TEXT.replace("from: 2025-10-01", "from: 2025-10-02")))
    desk.cycle()
    with desk.database.transaction() as sql:
        assert adce.forget(sql, desk.clock.wall() + adce.DAY) == 3  # both objects, and the first cycle
    assert desk.database.check() == []
    assert desk.database.value("select count(*) from objects_now") == 4


def test_interrupted_cycle_says_so(desk):
    steps = adce.reconcile(desk.database, desk.configuration, desk.lake.store, desk.clock)
    next(steps)
    steps.close()
    assert desk.database.value("select error from cycles") == "stopped before its end"


def test_copy_of_a_database_can_be_tried_on(desk):
    copy = desk.database.copy()
    tried = Desk(desk.configuration, copy, desk.lake, desk.clock)
    assert tried.cycle()["created"] == 5
    assert desk.database.value("select count(*) from queue") == 0


def nobody_sleeps() -> None:
    """There is nobody to wake when a page is ready."""


@pytest.fixture
def shares(monkeypatch):
    """A lake of a few objects is listed in shares, as a large one is."""
    monkeypatch.setattr(adce, "LEAST_SHARE", 20)
    monkeypatch.setattr(adce, "CHUNK", 10)


def test_shares_of_a_day_look_at_everything_once(configure, database, lake, clock, shares):
    """All but a few open objects is looked at in turn, so that a day costs one listing of it all."""
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    lost = [keys[number] for number in (3, 50, 100, len(keys) - 1)]
    for key in lost:
        lake.delete(key)
    looked = [desk.cycle()["looked"] for _ in range(math.ceil(len(keys) / 20) + 1)]
    assert max(looked) <= 20 + len(lost) + 2 * adce.CHUNK  # and what lies between, where that costs nothing
    assert len(keys) <= sum(looked)
    assert sorted(desk.gaps()) == sorted(lost)


@pytest.mark.parametrize("is_known", [True, False])
def test_crash_at_any_step_leaves_only_true_gaps_and_the_next_cycle_finds_them_all(
    configure, database, lake, clock, monkeypatch, is_known
):
    """What is copied at a step is what a kill at that step leaves behind."""
    monkeypatch.setattr(adce, "CHUNK", 2)
    desk = Desk(configure(TEXT), database, lake, clock)
    for day in range(1, 6):
        lake.put_day(day, [str(day)])
        lake.put_game(str(day))
    if is_known:
        desk.cycle()
    lake.delete("days/2025-10-02.json")
    lake.put_day(3, ["3", "8"], final=False)
    lake.put("games/4.json", {"id": "another"})
    truth = {"days/2025-10-02.json": "missing", "days/2025-10-03.json": "stale", "games/8.json": "missing"}
    truth |= {"games/4.json": "suspect"}
    steps = adce.reconcile(database, desk.configuration, lake.store, clock)
    count = 0
    for _ in steps:
        count += 1
        left = Desk(desk.configuration, database.copy(), lake, clock)
        assert left.gaps().items() <= truth.items()
        left.cycle(is_full=True)
        assert left.gaps() == truth
        left.database.close()
    assert count > 10
    assert desk.gaps() == truth


def test_long_cycle_tells_how_far_it_is(configure, database, lake, clock, shares):
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    for key in keys[:30]:
        lake.put(key, {"final": True, "games": ["7"]})
    told, progress = list[str](), "select progress from reconciliations where seconds is null and progress is not null"
    options = adce.CycleOptions(is_full=True)
    for _ in adce.reconcile(database, desk.configuration, lake.store, clock, options):
        clock.advance(6)
        told += [row[0] for row in database.read(progress)]
    assert database.read(progress) == []  # no cycle is going on
    told = re.findall(r"([a-z]+), (\d+) objects, [\d,]+ a second(.*)", "\n".join(told))
    assert {phase for phase, *_ in told} == {"expanding", "listing", "reading", "ageing"}
    compared = [int(count) for phase, count, _ in told if phase == "listing"]
    assert max(compared) == len(keys)
    left = [rest for phase, _, rest in told if phase == "listing" and rest]
    assert left
    assert all(re.fullmatch(r", \d+ to go, about .*", rest) for rest in left)


def test_share_grows_with_the_time_since_the_last_cycle(configure, database, lake, clock, shares):
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    clock.advance(12 * 3600)
    assert len(keys) / 2 <= desk.cycle()["looked"] <= len(keys) / 2 + 2
    clock.advance(30 * 3600)
    assert desk.cycle()["looked"] == len(keys)
    assert desk.cycle(is_full=True)["looked"] == len(keys)


def test_open_objects_are_looked_for_in_every_cycle(configure, database, lake, clock, shares):
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    for key in (keys[30], keys[-1]):
        lake.delete(key)
    desk.cycle(is_full=True)
    assert sorted(desk.gaps()) == [keys[30], keys[-1]]
    lake.put(keys[-1], {"final": True, "games": []})
    lake.put(keys[30], {"final": True, "games": []})
    row = desk.cycle()
    assert (desk.gaps(), row["closed"], row["looked"] < len(keys) / 2) == ({}, 2, True)


def test_share_that_vanished_is_looked_at_and_told_until_it_is_believed(configure, database, lake, clock, shares):
    desk = Desk(configure(MANY), database, lake, clock)
    keys = fill_days(desk, lake)
    clock.advance(20 * 3600)
    for key in keys[:125]:
        lake.delete(key)
    for _ in range(2):
        clock.advance(20 * 3600)
        row = desk.cycle()
        assert "vanished at once" in row["error"]
        assert desk.gaps() == {}
    clock.advance(20 * 3600)
    assert desk.cycle(accept_loss=("days",))["missing"] > 100
    for _ in range(2):
        clock.advance(20 * 3600)
        row = desk.cycle()
    assert row["missing"] == 125


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.sampled_from([f"days/2025-10-0{day}.json" for day in range(1, 6)])),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_ranges_hold_every_open_object_and_the_share_and_nothing_twice(present, least, page):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "adce.yaml").write_text(TEXT)
        lake = Lake(path / "lake")
        desk = Desk(adce.load_configuration(path / "adce.yaml"), adce.memory_database(), lake, ManualClock())
        for key in present:
            lake.put(key, {"final": True, "games": []})
        desk.cycle()
        patch.setattr(adce, "LEAST_SHARE", least)
        patch.setattr(adce, "CHUNK", page)
        share = adce.share_of_keys(desk.database, desk.configuration, desk.clock.wall())
        ranges = adce.ranges_to_list(desk.database, "days/", share)
        keys = [f"days/2025-10-0{day}.json" for day in range(1, 6)]
        held = [sum(one.low <= key <= one.high for one in ranges) for key in keys]
        assert max(held) <= 1
        for key, times in zip(keys, held, strict=True):
            assert times or (key in present and not share.low <= key <= share.high)
        assert all(one.high < other.low for one, other in itertools.pairwise(ranges))


def recount(database: adce.Database) -> dict[tuple, int]:
    rows = database.read(
        """
        select dataset_id, coalesce(season, ''), state, coalesce(task, ''), coalesce(priority, ''), count(*)
        from objects group by 1, 2, 3, 4, 5
        """
    )
    return {tuple(row)[:5]: row[5] for row in rows}


def test_prefix_within_another_is_listed_once_but_for_what_is_open(configure, database, lake, clock):
    nested = TEXT.replace('"games/', '"days/games/')
    desk = Desk(configure(nested), database, lake, clock)
    for day in range(1, 6):
        lake.put_day(day, [str(day)])
        lake.put(f"days/games/{day}.json", {"id": str(day)})
    desk.cycle()
    row = desk.cycle(is_full=True)
    assert (row["listed"], row["looked"], desk.gaps()) == (10, 10, {})
    lake.delete("days/games/3.json")
    lake.put_day(4, ["4", "6"])
    assert desk.cycle()["missing"] == 2
    lake.put("days/games/6.json", {"id": "6"})
    lake.put_day(5, ["5", "7"])
    lake.put("days/games/7.json", {"id": "7"})
    row = desk.cycle()
    assert (desk.gaps(), row["error"]) == ({"days/games/3.json": "missing"}, None)


def test_slow_store_keeps_nobody_waiting(desk, lake):
    """Steps go on, and say that they wait, while another thread lists."""
    for day in range(1, 6):
        lake.put_day(day, [])
    gate, woken = threading.Event(), threading.Event()

    class Slow(adce.FolderStore):
        def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
            assert gate.wait(20)
            yield from super().list(prefix, after)

    with ThreadPoolExecutor(4) as executor:
        prefetch = adce.Prefetch(executor, woken.set)
        store = Slow(lake.store.root)
        steps = adce.reconcile(desk.database, desk.configuration, store, desk.clock, prefetch=prefetch)
        assert list(itertools.islice(steps, 100))[-50:] == [0] * 50
        assert not woken.is_set()
        gate.set()
        assert woken.wait(20)
        adce.run_cycle(steps)
    assert desk.database.value("select present from cycles") == 5


def test_slow_reading_keeps_nobody_waiting(desk, lake):
    """Steps go on, and say that they wait, while other threads read bodies."""
    for day in range(1, 6):
        lake.put_day(day, ["7"])
    asked, gate = threading.Event(), threading.Event()

    class Slow(adce.FolderStore):
        def open(self, key: str) -> BinaryIO:
            asked.set()
            assert gate.wait(20)
            return super().open(key)

    with ThreadPoolExecutor(4) as executor:
        prefetch = adce.Prefetch(executor, nobody_sleeps)
        steps = adce.reconcile(desk.database, desk.configuration, Slow(lake.store.root), desk.clock, prefetch=prefetch)
        while not asked.is_set():
            next(steps)
        assert list(itertools.islice(steps, 50)) == [0] * 50
        gate.set()
        adce.run_cycle(steps)
    assert desk.gaps() == {"games/7.json": "missing"}


def test_four_prefixes_are_listed_at_once(configure, database, tmp_path):
    """By a runner: no listing has its answer before four are asked for."""
    one = '  {0}: {{source: espn, key: "{0}/{{name}}", url: "/{{name}}", partitions: {{values: {{name: [A]}}}}}}\n'
    text = TEXT.partition("datasets:\n")[0] + "datasets:\n" + "".join(map(one.format, "abcd"))
    together = threading.Barrier(4)

    class Slow(adce.FolderStore):
        def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
            together.wait(20)
            yield from super().list(prefix, after)

    lake = Lake(tmp_path / "lake")
    for name in "abcd":
        lake.put(f"{name}/A", {})
    runner = adce.Runner(configure(text), database, Slow(lake.store.root), adce.Journal(io.StringIO()))
    assert runner.run(once=True, max_seconds=60) == adce.ExitCode.DONE
    assert database.value("select sum(present) from coverage") == 4


def test_listing_that_is_stopped_in_the_middle_leaves_no_thread_behind(desk, lake):
    lake.put_day(1, [])
    with ThreadPoolExecutor(4) as executor:
        prefetch = adce.Prefetch(executor, nobody_sleeps)
        steps = adce.reconcile(desk.database, desk.configuration, lake.store, desk.clock, prefetch=prefetch)
        for _ in range(4):
            next(steps)
        steps.close()
    assert desk.database.value("select error from cycles") == "stopped before its end"


def test_counts_follow_whatever_is_done_to_the_objects(desk, lake):
    lake.put_day(1, ["7"])
    desk.cycle()
    with desk.database.transaction() as sql:
        sql.execute("delete from objects where key = 'games/7.json'")
        sql.execute("update objects set priority = 'LOW', task = 'gave_up' where key like '%03.json'")
        sql.execute("update objects set season = '2025-26' where key like '%02.json'")
        sql.execute("update objects set priority = 'HIGH' where key like '%04.json'")
        sql.execute("delete from objects where key like '%05.json'")
    counts = desk.database.read("select * from counts where objects != 0")
    assert {tuple(row)[:5]: row[5] for row in counts} == recount(desk.database)


class LyingStore(adce.FolderStore):
    """Its listings break off, repeat, shuffle, leave out or lack everything, and it knows what it has hidden."""

    kind, place = "breaks off", 0

    def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
        entries = list(super().list(prefix, after))
        told = {
            "breaks off": entries[: self.place],
            "repeats": entries[: self.place] + entries[max(0, self.place - 2) :],
            "shuffles": entries[self.place :] + entries[: self.place],
            "leaves out": entries[: self.place] + entries[self.place + 2 :],
            "lacks everything": [],
        }[self.kind]
        self.hidden = getattr(self, "hidden", set()) | {entry.key for entry in entries if entry not in told}
        yield from told
        if self.kind == "breaks off":
            raise adce.StoreError("the connection broke")


class LakeMachine(RuleBasedStateMachine):
    """Whatever is done to the lake, a full cycle finds exactly the gaps that a few lines of model find."""

    days = st.integers(1, 5)
    games = st.lists(st.sampled_from("789"), unique=True)

    @initialize(data=st.data())
    def start(self, data) -> None:
        self.place = tempfile.TemporaryDirectory()
        folder = Path(self.place.name)
        (folder / "adce.yaml").write_text(TEXT)
        self.lake = Lake(folder / "lake")
        configuration = adce.load_configuration(folder / "adce.yaml")
        self.desk = Desk(configuration, adce.memory_database(), self.lake, ManualClock())
        self.model: dict[str, object] = {}
        self.executor = ThreadPoolExecutor(2)
        if data.draw(st.booleans()):
            self.desk.prefetch = adce.Prefetch(self.executor, nobody_sleeps)
        self.page, adce.CHUNK = adce.CHUNK, data.draw(st.sampled_from([1, 2, 1000]))

    def teardown(self) -> None:
        if hasattr(self, "page"):
            adce.CHUNK = self.page
            self.executor.shutdown()
            self.place.cleanup()

    def put(self, key: str, document: object) -> None:
        self.lake.put(key, document)
        self.model[key] = document

    @rule(day=days, games=games, final=st.booleans())
    def put_day(self, day: int, games: list[str], final: bool) -> None:
        self.put(f"days/2025-10-0{day}.json", {"final": final, "games": games})

    @rule(game=st.sampled_from("789"), is_right=st.booleans())
    def put_game(self, game: str, is_right: bool) -> None:
        self.put(f"games/{game}.json", {"id": game if is_right else "another"})

    @rule(data=st.data())
    def delete(self, data) -> None:
        if self.model:
            key = data.draw(st.sampled_from(sorted(self.model)))
            self.lake.delete(key)
            del self.model[key]

    @rule(
        kind=st.sampled_from(["breaks off", "repeats", "shuffles", "leaves out", "lacks everything"]),
        place=st.integers(0, 4),
    )
    def cycle_of_a_store_that_lies(self, kind: str, place: int) -> None:
        """What is there and was not hidden opens no gap; a listing that broke off hides nothing for sure."""
        store = LyingStore(self.lake.store.root)
        store.kind, store.place = kind, place
        before = self.desk.gaps()
        self.desk.cycle(store, is_full=True)
        self.note_what_was_read()
        opened = {key for key, state in self.desk.gaps().items() if state == "missing" and key not in before}
        wrong = {key for key in opened if key in self.model}
        assert wrong <= (set() if kind == "breaks off" else store.hidden)

    @rule(times=st.integers(1, 3))
    def cycles_that_look_at_a_share(self, times: int) -> None:
        """Whatever they find, a full cycle comes to the same."""
        adce.LEAST_SHARE, least = 2, adce.LEAST_SHARE
        for _ in range(times):
            assert self.desk.cycle()["error"] is None
        adce.LEAST_SHARE = least
        self.note_what_was_read()

    def note_what_was_read(self) -> None:
        """Of the model: a day that was read names its games, also when it has vanished since."""
        read = self.desk.database.read("select key, etag from objects where read_etag is etag and etag is not null")
        for key, etag in read:
            if key.startswith("days/") and key in self.model and self.lake.store.find(key).etag == etag:
                self.named_by[key] = self.model[key]["games"]

    @rule()
    def cycle(self) -> None:
        row = self.desk.cycle(is_full=True)
        assert row["error"] is None
        expected = {f"days/2025-10-0{day}.json": "missing" for day in range(1, 6)}
        for key, document in self.model.items():
            if key in expected:
                expected[key] = "present" if document["final"] else "stale"
                self.named_by[key] = document["games"]
        for game in {game for games in self.named_by.values() for game in games}:
            document = self.model.get(f"games/{game}.json")
            right = document == {"id": game}
            expected[f"games/{game}.json"] = "missing" if document is None else "present" if right else "suspect"
        gaps = {key: state for key, state in expected.items() if state != "present"}
        assert self.desk.gaps() == gaps
        assert set(self.desk.live_tasks()) == set(gaps)
        assert (row["expected"], row["present"]) == (len(expected), len(expected) - len(gaps))
        counts = self.desk.database.read("select * from counts where objects != 0")
        assert {tuple(one)[:5]: one[5] for one in counts} == recount(self.desk.database)

    @property
    def named_by(self) -> dict[str, list[str]]:
        """What each day named when it was last read: a day that vanished still says what it said."""
        if not hasattr(self, "_named_by"):
            self._named_by: dict[str, list[str]] = {}
        return self._named_by


LakeMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestLakeMachine = LakeMachine.TestCase
