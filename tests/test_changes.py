"""However adce.yaml and the lake change, a database that has seen it all knows what a fresh one finds."""

from __future__ import annotations

import random

import pytest
from conftest import ManualClock
from test_reconcile import Desk, Lake

import adce

STEPS = 12


class Wishes:
    """Days name kids, kids and their twins lie under keys of their own, kids name grandchildren."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.names = {kind: kind for kind in ("days", "kids", "twins", "grand")}
        self.keys = {"kids": "kids", "twins": "twins"}
        self.field, self.ids, self.days = "id", "e", 5
        self.twins_are = "same_as"
        self.wanted = list(self.names)

    def change(self) -> None:
        """One of the edits that people make."""
        dice = self.dice
        match dice.choice(["name", "field", "key", "swap", "wanted", "ids", "twins", "order", "days"]):
            case "name":
                kind = dice.choice(list(self.names))
                self.names[kind] = f"{kind}{dice.randint(0, 2)}"
            case "field":
                self.field = dice.choice(["id", "x"])
            case "key":
                self.keys["kids"] = dice.choice([key for key in ("kids", "k2", "k3") if key != self.keys["twins"]])
            case "swap":
                self.keys = {"kids": self.keys["twins"], "twins": self.keys["kids"]}
            case "wanted":
                self.wanted = ["days", "kids", *(kind for kind in ("twins", "grand") if dice.random() < 0.7)]
            case "ids":
                self.ids = dice.choice(["e", "o"])
            case "twins":
                self.twins_are = dice.choice(["same_as", "from"])
            case "order":
                dice.shuffle(self.wanted)
            case "days":
                self.days = dice.choice([4, 5, 6])

    def text(self) -> str:
        days, kids = self.names["days"], self.names["kids"]
        named = f'{{from: {days}, ids: "{self.ids}", as: {self.field}}}'
        datasets = {
            "days": f'"days/{{date}}.json", partitions: {{dates: {{from: 2025-10-01, to: 2025-10-0{self.days}}}}}',
            "kids": f'"{self.keys["kids"]}/{{{self.field}}}.json", partitions: {named}',
            "twins": f'"{self.keys["twins"]}/{{{self.field}}}.json", partitions: '
            + (f"{{same_as: {kids}}}" if self.twins_are == "same_as" else named),
            "grand": f'"grand/{{{self.field}}}-{{g}}.json", partitions: {{from: {kids}, ids: "g", as: g}}',
        }
        lines = [f"  {self.names[kind]}: {{source: espn, url: /x, key: {datasets[kind]}}}" for kind in self.wanted]
        return "\n".join(['sources: {espn: {base_url: "http://localhost"}}', "datasets:", *lines])


def put_day(lake: Lake, dice: random.Random, day: int) -> None:
    lake.put_day(day, [])
    lake.put(
        f"days/2025-10-0{day}.json", {"e": dice.sample("abcdef", dice.randint(0, 4)), "o": dice.sample("abcdef", 2)}
    )


def put_kid(lake: Lake, dice: random.Random, key: str, kid: str) -> None:
    lake.put(f"{key}/{kid}.json", {"g": dice.sample("123", dice.randint(0, 3))})


def known_to(desk: Desk) -> list[list[tuple]]:
    questions = (
        "select dataset, key, kind from gaps order by key",
        "select dataset, sum(expected), sum(present) from coverage group by 1",
        "select key, fields, day, parent from objects_now where state != 'dropped' order by key",
    )
    return [[tuple(row) for row in desk.database.read(question)] for question in questions]


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(n, marks=pytest.mark.battery) for n in range(8, 200))])
def test_what_has_changed_comes_to_what_a_fresh_database_finds(seed, configure, database, lake, clock):
    dice = random.Random(seed)
    wishes = Wishes(dice)
    for day in range(1, 7):
        put_day(lake, dice, day)
    for kid in "abcdef":
        put_kid(lake, dice, "kids", kid)
    desk = Desk(configure(wishes.text()), database, lake, clock)
    for _ in range(STEPS):
        for _ in range(dice.randint(1, 4)):
            wishes.change()
        for _ in range(dice.randint(0, 2)):
            put_day(lake, dice, dice.randint(1, 6))
            put_kid(lake, dice, wishes.keys["kids"], dice.choice("abcdef"))
        configuration = configure(wishes.text())
        fresh = Desk(configuration, adce.memory_database(), lake, ManualClock())
        desk.declare(configuration)
        for one in (desk, fresh):
            row = one.cycle(accept_loss=tuple(configuration.datasets), is_full=True)
            assert row["error"] is None
        assert known_to(desk) == known_to(fresh)
        assert database.check() == []
        fresh.database.close()


@pytest.fixture
def lake(tmp_path) -> Lake:
    return Lake(tmp_path / "lake")
