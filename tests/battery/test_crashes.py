"""The program dies at every point of its work, and the next one goes on from there."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from battery import dying, judge
from battery.scene import LAUNCHERS, Scene

LAUNCHER = LAUNCHERS / "dying.py"
RATE = 60


def die_at(scene: Scene, number: int, *words: str) -> str | None:
    """Let the program die at its n-th point. Returns the name of the point, or None when it has ended before."""
    code = scene.run(*words, launcher=[LAUNCHER, str(number)])
    if code == dying.DIED:
        return re.findall(r"died at point \d+: (.*)", scene.said())[-1]
    assert code == 0, scene.said()[-2000:]
    return None


def points_to_try(every: int, least: int, start: Callable[[int], str | None]) -> Iterator[tuple[int, str]]:
    """Each `every`-th point, until the program ends by itself; some of them at least."""
    number, tried = 1, 0
    while name := start(number):
        yield number, name
        number, tried = number + every, tried + 1
    assert tried >= least, f"the program passed only {number} points"


def check_death(scene: Scene) -> None:
    """At once after it has died, before anything was mended."""
    if scene.database.exists() and scene.database.stat().st_size:
        with judge.looking_at(scene.database) as sql:
            if sql.execute("select count(*) from sqlite_schema where name = 'objects_now'").fetchone()[0]:
                judge.judge_books(sql)
                judge.judge_objects(sql, scene.store, scene.history, scene.expected)
                judge.judge_told(sql, scene.told())


def die_everywhere_in_a_run(folder: Path, every: int, least: int) -> None:
    def start(number: int) -> str | None:
        scenes.append(stack.enter_context(Scene(folder / str(number), per_second=RATE)))
        return die_at(scenes[-1], number, "-v", "run", "--once")

    scenes: list[Scene] = []
    with contextlib.ExitStack() as stack:
        for number, name in points_to_try(every, least, start):
            try:
                check_death(scenes[-1])
                scenes[-1].recover()
            except (AssertionError, sqlite3.Error) as error:
                raise AssertionError(f"died at point {number}, {name}") from error
            stack.close()
            shutil.rmtree(folder / str(number))


def test_run_that_dies_at_some_points_loses_nothing(tmp_path):
    die_everywhere_in_a_run(tmp_path, every=13, least=15)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_run_that_dies_at_every_point_loses_nothing(tmp_path):
    die_everywhere_in_a_run(tmp_path, every=1, least=250)


def die_again_and_again(folder: Path, deaths: int, seed: int) -> None:
    """Every start dies somewhere, while a third of the answers are errors."""
    dice = random.Random(seed)
    with Scene(folder, days=6, per_second=RATE, fault_share=0.3, latency_seconds=(0, 0.05), seed=seed) as scene:
        for death in range(deaths):
            number = dice.randint(1, 250)
            name = die_at(scene, number, "-v", "run", "--max-minutes", "0.05")
            try:
                check_death(scene)
            except (AssertionError, sqlite3.Error) as error:
                raise AssertionError(f"seed {seed}, death {death}, point {number}, {name}") from error
        scene.upstream.fault_share = 0
        scene.recover()


def test_runs_that_die_one_after_another_lose_nothing(tmp_path):
    die_again_and_again(tmp_path, deaths=8, seed=5)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10, 14))
def test_runs_that_die_fifty_times_lose_nothing(seed, tmp_path):
    die_again_and_again(tmp_path, deaths=50, seed=seed)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Iterator[Scene]:
    """A lake that is complete."""
    with Scene(tmp_path_factory.mktemp("filled")) as scene:
        scene.recover()
        yield scene


def die_everywhere_in_a_backup(filled: Scene, every: int, least: int) -> None:
    target = filled.folder / "copy.db"

    def back_up(number: int) -> str | None:
        target.unlink(missing_ok=True)
        return die_at(filled, number, "backup", str(target))

    for number, name in points_to_try(every, least, back_up):
        if target.exists():
            assert target.stat().st_mode & 0o777 == 0o600
            with judge.looking_at(target) as sql:
                judge.judge_books(sql)
        check_death(filled)
        target.unlink(missing_ok=True)
        assert filled.run("backup", str(target)) == 0, f"after a death at point {number}, {name}"
    filled.recover()


def test_backup_that_dies_leaves_a_whole_copy_or_none(filled):
    die_everywhere_in_a_backup(filled, every=3, least=5)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_backup_that_dies_at_every_point_leaves_a_whole_copy_or_none(filled):
    die_everywhere_in_a_backup(filled, every=1, least=15)
