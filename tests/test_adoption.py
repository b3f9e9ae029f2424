"""A lake that others filled: its parents are read once, in both of their shapes, whatever stops the reading."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import pytest
from conftest import ROOT, run_adce

import adce

CONFIGURATION = """\
store: lake
sources: {{espn: {{base_url: "http://127.0.0.1:9"}}}}
datasets:
  espn_schedules:
    source: espn
    key: "espn_schedules/{{date:%Y%m%d}}.json"
    url: "/scoreboard?dates={{date:%Y%m%d}}"
    partitions: {{dates: {{from: 1970-01-01, to: {last}}}}}
    freshness: {{refetch_every: 6h, until: "events || page.content.events"}}
    validate: {{json: true, require: ["events || page.content.events"]}}
  espn_play_by_play:
    source: espn
    key: "espn_play_by_play/{{game_id}}.json"
    url: "/summary?event={{game_id}}"
    partitions:
      from: espn_schedules
      ids: "{ids}"
      as: game_id
"""
# A reader that writes down what it reads, then does one cycle as the runner does.
READER = """
import queue, sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import adce
class Watched(adce.FolderStore):
    def open(self, key):
        with Path("reads").open("a") as file:
            file.write(key + "\\n")
        return super().open(key)
configuration = adce.load_configuration(Path("adce.yaml"))
database, clock, wakeups = adce.open_database(configuration.database), adce.Clock(), queue.SimpleQueue()
with database.transaction() as sql:
    adce.declare_limits(sql, configuration, clock)
    adce.declare_datasets(sql, configuration)
with ThreadPoolExecutor(4) as executor:
    prefetch = adce.Prefetch(executor, lambda: wakeups.put(""))
    for step in adce.reconcile(database, configuration, Watched(Path("lake")), clock, prefetch=prefetch):
        if not step:
            wakeups.get(timeout=60)
"""


def fill(folder: Path, days: int) -> set[str]:
    """Schedules of both shapes; returns the ids of the games that they call completed."""
    games = set()
    (folder / "lake" / "espn_schedules").mkdir(parents=True)
    for number in range(days):
        day = date(1970, 1, 1) + timedelta(days=number)
        events = [
            {"id": f"{number}1", "done": True},
            {"id": f"{number}2", "done": False},
            {"id": f"{number}3", "done": True},
        ]
        games |= {event["id"] for event in events if event["done"]}
        if number % 3:
            shape = [{"id": one["id"], "status": {"type": {"completed": one["done"]}}} for one in events]
            document: object = {"events": shape}
        else:
            listed = [{"id": one["id"], "completed": one["done"]} for one in events]
            document = {"page": {"content": {"events": {f"{day:%Y%m%d}": listed} if number % 2 else listed}}}
        (folder / "lake" / "espn_schedules" / f"{day:%Y%m%d}.json").write_text(json.dumps(document))
    return games


@pytest.mark.parametrize("days", [1500, pytest.param(20_000, marks=pytest.mark.long)])
def test_lake_of_both_shapes_is_adopted_whole_however_often_it_is_killed(tmp_path, days):
    shipped = adce.load_configuration(ROOT / "adce.yaml").datasets["espn_play_by_play"]
    last = date(1970, 1, 1) + timedelta(days=days - 1)
    (tmp_path / "adce.yaml").write_text(CONFIGURATION.format(last=last, ids=shipped.partitions.ids))
    games, kills = fill(tmp_path, days), 3
    words = [sys.executable, "-c", READER, str(ROOT)]
    for kill in range(kills):
        process = subprocess.Popen(words, cwd=tmp_path)
        while process.poll() is None and read_count(tmp_path) < days * (kill + 1) // 5:
            time.sleep(0.01)
        assert process.poll() is None
        process.kill()
        process.wait()
    assert subprocess.run(words, cwd=tmp_path, timeout=100, check=True).returncode == 0
    reads = Counter((tmp_path / "reads").read_text().split())
    assert len(reads) == days
    assert sum(reads.values()) - days <= kills * adce.READ_AT_ONCE  # what was not committed yet
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        keys = {row["key"] for row in database.read("select key from gaps")}
        assert keys == {f"espn_play_by_play/{game}.json" for game in games}
        assert database.check() == []


def read_count(folder: Path) -> int:
    """How many objects have been read so far."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "reads").read_bytes().count(b"\n")
    return 0


SUSPECTS = """
verify_per_cycle: {verified}
sources: {{box: {{base_url: "http://127.0.0.1:9"}}}}
datasets:
  a:
    source: box
    key: "a/{{n}}"
    url: "/a{{n}}"
    partitions: {{values: {{n: [A, B, C]}}}}
    validate: {{contains: [x]}}
  b: {{source: box, key: "b/{{n}}", url: "/b{{n}}", partitions: {{same_as: a}}, validate: {{contains: [x]}}}}
"""


@pytest.mark.parametrize("verified", [0, 2, 4])
def test_contents_read_for_their_validation_are_limited_for_all_datasets_together(tmp_path, verified):
    (tmp_path / "adce.yaml").write_text(SUSPECTS.format(verified=verified))
    for key in ("a/A", "a/B", "a/C", "b/A", "b/B", "b/C"):
        place = tmp_path / "lake" / key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("no good")
    (tmp_path / "lake/.adce").mkdir()
    for cycle in (1, 2):
        run_adce("reconcile", folder=tmp_path)
        suspects = json.loads(run_adce("report", "total", "--format", "json", folder=tmp_path).stdout)["suspect"]
        assert suspects == min(6, cycle * verified)
