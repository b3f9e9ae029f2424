"""One source is away for two days of the runner's simulated life: people hear of that, and of nothing else."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_alerts import Listener, listener  # noqa: F401  # a fixture

import adce
from battery.simulation import START, Workers, World

HOUR = 3600.0


class Outage(World):
    """A week in which nothing happens but this."""

    kind_of_outage: str

    def schedule(self) -> None:
        self.is_calm = True
        self.at(self.now + 24 * HOUR, lambda: self.begin("league", self.kind_of_outage, 48 * HOUR))

    def watch(self, alerter: adce.Alerter) -> None:
        alerter.work()
        self.at(self.now + 300, lambda: self.watch(alerter))


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Where a week of commits takes seconds."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as made:
        yield Path(made)


@pytest.mark.parametrize("kind", ["away", "slow", "broken", "refuses"])
def test_outage_of_two_days_is_one_alert_a_reminder_a_day_and_one_end(kind, folder, listener, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Outage, "kind_of_outage", kind, raising=False)
    world = Outage(1, folder)
    monkeypatch.setattr(adce, "request", world.request)
    monkeypatch.setattr(adce, "run_command", world.run_command)
    with (folder / "adce.yaml").open("a") as file:
        file.write(f"alerts: {{webhook: {json.dumps(listener.address)}}}\n")
    configuration = adce.load_configuration(folder / "adce.yaml")
    adce.FolderStore(Path(configuration.store)).sweep()  # it is there, although another one is used
    database = adce.open_database(configuration.database)
    journal = adce.Journal(io.StringIO(), clock=world.clock)
    runner = adce.Runner(configuration, database, world.lake, journal)
    runner.pool = runner.listers = Workers(world)
    world.watch(adce.Alerter(configuration, database, journal, world.clock))
    runner.run(max_seconds=5 * 24 * HOUR)
    told = "source blocked, league"
    began, ended = database.read("select since, ended_at from alerts")[0]
    assert began - START < 25 * HOUR
    assert 71 * HOUR < ended - START < 77 * HOUR
    reminders = [f"ADCE: still {told}"] * int((ended - began) // (24 * HOUR))
    assert listener.subjects() == [f"ADCE: {told}", *reminders, f"ADCE: over: {told}"]
    database.close()
