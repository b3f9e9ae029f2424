"""What others do to the database of a runner: read and write for long, take it away, damage it, copy it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import adce
from battery import judge
from battery.scene import LAUNCHERS, Scene, poll

PATCHED = LAUNCHERS / "patched.py"
BEATS_OFTEN = [PATCHED, "adce.BEAT_SECONDS = 0.3"]
WRITES_MUCH = [PATCHED, "adce.BEAT_SECONDS = 0.001"]
SHORT_PAUSES = [PATCHED, "adce.FIRST_PAUSE_SECONDS = 1"]
IMPATIENT = [PATCHED, "adce.BUSY_SECONDS = adce.TROUBLE_SECONDS = 1"]
MEBIBYTE = 1 << 20


class Shell:
    """The sqlite3 program of another person."""

    def __init__(self, database: Path, *lines: str) -> None:
        program = shutil.which("sqlite3")
        if program is None:
            pytest.skip("the sqlite3 program is not installed")
        self.process = subprocess.Popen(
            [program, database], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdin and self.process.stdout
        for line in [".timeout 20000", *lines, "select 'ready';"]:
            self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for said in self.process.stdout:
            assert "rror" not in said, said
            if said == "ready\n":
                break

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(timeout=20)  # its end rolls back


def stop(scene: Scene, process: subprocess.Popen[str]) -> int:
    process.terminate()
    return scene.end(process, 20)


def test_log_of_writes_shrinks_after_a_long_reader_has_left(tmp_path):
    with Scene(tmp_path, days=8, latency_seconds=(0.1, 0.2)) as scene:
        process = scene.start("-v", "run", launcher=WRITES_MUCH)
        poll(lambda: len(scene.told()) >= 2)
        writes = scene.database.with_name("adce.db-wal")
        with Shell(scene.database, "begin;", "select count(*) from objects;"):
            poll(lambda: writes.stat().st_size > 9 * MEBIBYTE, 60, "a growing log of writes")
            poll(scene.is_complete)
        poll(lambda: writes.stat().st_size <= 8 * MEBIBYTE, 60, "a smaller log of writes")
        assert stop(scene, process) == 0
        assert "SQLITE" not in scene.said()
        scene.recover()


def test_long_writer_delays_and_nothing_fails_is_lost_or_asked_for_twice(tmp_path):
    with Scene(tmp_path, days=8, latency_seconds=(0.2, 0.3)) as scene:
        process = scene.start("-v", "run", launcher=IMPATIENT)
        poll(lambda: len(scene.told()) >= 2)
        before = len(scene.said().splitlines())
        with Shell(scene.database, "begin immediate;", "select 1;"):
            poll(lambda: "SQLITE_BUSY" in scene.said(), 20, "a word about it")
            time.sleep(3)  # what is measured is how little it says in these seconds
        told = [line for line in scene.said().splitlines()[before:] if "SQLITE_BUSY" in line]
        assert len(told) <= 10 and all("another program holds a transaction" in line for line in told)
        poll(scene.is_complete)
        assert stop(scene, process) == 0
        with judge.looking_at(scene.database) as sql:
            assert sql.execute("select max(failures) from objects").fetchone()[0] == 0
            assert {row[0] for row in sql.execute("select distinct outcome from attempts")} == {"ok"}
        asked = [event["path"] for event in scene.history.events("asked")]
        assert len(asked) == len(set(asked))
        scene.recover()


def delete(database: Path) -> None:
    database.unlink()


def move(database: Path) -> None:
    database.rename(database.with_name("moved.db"))


def replace(database: Path) -> None:
    os.replace(database.with_name("copy.db"), database)  # noqa: PTH105


@pytest.mark.parametrize("take", [delete, move, replace])
def test_database_that_is_taken_away_ends_the_runner_with_a_clear_line(take, tmp_path):
    with Scene(tmp_path, days=8, latency_seconds=(0.2, 0.3), per_second=30) as scene:
        process = scene.start("-v", "run", launcher=BEATS_OFTEN)
        poll(lambda: len(scene.told()) >= 2)
        assert scene.run("backup", str(tmp_path / "copy.db")) == 0
        poll(lambda: len(scene.told()) >= 6)
        take(scene.database)
        assert scene.end(process, 15) == 10
        assert "adce.db was moved, replaced or deleted while in use\nTry: start again" in scene.said()
        assert "Traceback" not in scene.said()
        scene.run("-v", "run", "--once")  # after a backup, its sources are still paused
        poll(lambda: scene.run("-v", "run", "--once") == 0 or "Traceback" in scene.said(), 20, "a complete lake")
        with judge.looking_at(scene.database) as sql:
            judge.judge_books(sql)
            judge.judge_objects(sql, scene.store, scene.history, scene.expected)
        judge.judge_requests(scene.history, scene.limits)
        assert scene.is_complete() and "Traceback" not in scene.said()


def test_backup_in_place_of_a_database_whose_runner_was_killed_is_not_damaged(tmp_path):
    """What the runner has written last lies in adce.db-wal, and does not belong to the backup."""
    with Scene(tmp_path, days=12, latency_seconds=(0.1, 0.2)) as scene:
        process = scene.start("-v", "run")
        poll(lambda: len(scene.told()) >= 3)
        assert scene.run("backup", str(tmp_path / "copy.db")) == 0
        poll(lambda: len(scene.told()) >= 12)
        with contextlib.closing(sqlite3.connect(scene.database)) as sql:  # as it happens every 1000 pages
            assert sql.execute("pragma wal_checkpoint(passive)").fetchone()[0] == 0
            poll(lambda: len(scene.told()) >= 20)
            scene.end(process)
            replace(scene.database)
        scene.run("run", "--once")
        with judge.looking_at(scene.database) as sql:
            judge.judge_books(sql)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Iterator[Scene]:
    """A lake that is complete, and its database in one file."""
    with Scene(tmp_path_factory.mktemp("filled")) as scene:
        scene.recover()
        with contextlib.closing(sqlite3.connect(scene.database)) as sql:
            sql.execute("pragma wal_checkpoint(truncate)")
        shutil.copyfile(scene.database, scene.folder / "kept.db")
        yield scene


@pytest.fixture
def lake(filled) -> Iterator[Scene]:
    """The same, to be damaged."""
    yield filled
    put(filled, (filled.folder / "kept.db").read_bytes())


def put(scene: Scene, body: bytes) -> None:
    for left in scene.folder.glob("adce.db*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    scene.database.write_bytes(body)
    scene.log.unlink(missing_ok=True)


def with_schema(version: int, body: bytes) -> bytes:
    """As another version of the program would have left it, as far as its number goes."""
    return body[:60] + version.to_bytes(4, "big") + body[64:]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda body: body[: len(body) // 2], "malformed"),
    "cut in its header": (lambda body: body[:50], "not a database|malformed"),
    "a text": (lambda _: b"This is my diary. " * 500, "is not a database"),
    "a newer schema": (partial(with_schema, adce.SCHEMA_VERSION + 1), f"has schema {adce.SCHEMA_VERSION + 1}, this"),
    "an older schema": (partial(with_schema, adce.SCHEMA_VERSION - 1), f"has schema {adce.SCHEMA_VERSION - 1}, this"),
    "zeros": (lambda body: bytes(len(body)), "not a database|another program|malformed"),
}


@pytest.mark.parametrize("command", [["run", "--once"], ["status"], ["report"], ["backup", "never.db"], ["reconcile"]])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_database_is_refused_with_a_reason_and_left_alone(damage, command, lake):
    change, message = DAMAGES[damage]
    body = change((lake.folder / "kept.db").read_bytes())
    put(lake, body)
    assert lake.run(*command) == 1, lake.said()
    assert re.search(f"^adce.py: .*({message})", lake.said(), re.MULTILINE), lake.said()
    assert "Traceback" not in lake.said()
    assert lake.database.read_bytes() == body
    assert not (lake.folder / "never.db").exists()


def test_database_with_broken_letters_in_its_schema_is_refused_with_a_reason(lake):
    body = (lake.folder / "kept.db").read_bytes()
    broken = body.replace(b"CREATE TABLE facts", b"CREATE \xa0ABLE facts", 1)
    assert broken != body
    put(lake, broken)
    assert lake.run("run", "--once") == 1
    assert "Traceback" not in lake.said()


def test_folder_in_place_of_the_database_is_refused(lake):
    put(lake, b"")
    lake.database.unlink()
    lake.database.mkdir()
    assert lake.run("run", "--once") == 1
    assert "adce.db is not a regular file" in lake.said()


def test_database_that_cannot_be_written_is_an_error_in_words(tmp_path):
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True, timeout=20)
    try:
        with Scene(tmp_path / "scene", database=disk / "adce.db") as scene:
            scene.recover()
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True, timeout=20)
            told = len(scene.said())
            assert scene.run("run", "--once") == 1
            assert re.search("adce.py: .*(readonly database|Read-only file system).*", scene.said()[told:])
            assert "Traceback" not in scene.said()
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True, timeout=20)
            scene.recover()
    finally:
        subprocess.run(["umount", "-l", disk], check=True, timeout=20)


def flip_bits(scene: Scene, seed: int) -> None:
    """Some bits of the database change; every command still ends in words and in time."""
    dice = random.Random(seed)
    body = bytearray((scene.folder / "kept.db").read_bytes())
    for _ in range(dice.choice([1, 8, 200])):
        body[dice.randrange(len(body))] ^= 1 << dice.randrange(8)
    put(scene, bytes(body))
    for command in (["check"], ["run", "--once"], ["report"]):
        code = scene.run(*command, seconds=30)
        assert code in (0, 1, 3, 4, 78), f"seed {seed}, {command}: {code}\n{scene.said()}"
        assert "Traceback" not in scene.said(), f"seed {seed}, {command}\n{scene.said()}"


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bits_never_end_in_a_traceback(seed, lake):
    flip_bits(lake, seed)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_flipped_bits_never_end_in_a_traceback(lake):
    problems = []
    for seed in range(100, 300):
        try:
            flip_bits(lake, seed)
        except AssertionError as problem:
            problems.append(str(problem))
    assert not problems, f"{len(problems)} of 200: {problems[:5]}"


def test_of_runners_that_start_together_one_works(tmp_path):
    with Scene(tmp_path, days=4, per_second=20, latency_seconds=(0.05, 0.1)) as scene:
        runners = [scene.start("-v", "run") for _ in range(4)]
        poll(lambda: sum(runner.poll() is not None for runner in runners) == 3)
        poll(scene.is_complete)
        codes = [runner.poll() if runner.poll() is not None else stop(scene, runner) for runner in runners]
        assert sorted(codes) == [0, 11, 11, 11]
        assert len(re.findall(r"another runner works on this database \(process \d+\)", scene.said())) == 3
        asked = [event["path"] for event in scene.history.events("asked")]
        assert len(asked) == len(set(asked))
        scene.recover()


def back_up_under_load(folder: Path, times: int) -> None:
    options = {"days": 12, "latency_seconds": (0.05, 0.3), "per_second": 20}
    with Scene(folder / "scene", **options) as scene:
        process = scene.start("-v", "run", launcher=WRITES_MUCH)
        poll(lambda: len(scene.told()) >= 2)
        copies = [folder / f"copy{number}.db" for number in range(times)]
        for copy in copies:
            told = scene.told()
            assert scene.run("-q", "backup", str(copy)) == 0, scene.said()
            assert copy.stat().st_mode & 0o777 == 0o600
            with judge.looking_at(copy) as sql:
                judge.judge_books(sql)
                judge.judge_told(sql, told)
        poll(scene.is_complete)
        assert stop(scene, process) == 0
        for copy in (copies[0], copies[-1]):
            put(scene, copy.read_bytes())
            for key in sorted(scene.expected)[::5]:
                (scene.store / key).unlink()
            process = scene.start("-v", "run")
            poll(lambda: "restored from a backup" in paused_for(scene.database))
            poll(scene.is_complete, 60)
            assert stop(scene, process) == 0
            scene.recover()


def paused_for(database: Path) -> str:
    with contextlib.suppress(sqlite3.OperationalError), judge.looking_at(database) as sql:
        return str(sql.execute("select group_concat(reason) from scopes").fetchone()[0])
    return ""


def test_backup_under_load_is_whole_and_a_runner_works_from_it(tmp_path):
    back_up_under_load(tmp_path, times=3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_forty_backups_under_load_are_whole(tmp_path):
    back_up_under_load(tmp_path, times=40)


def test_backup_to_a_bad_place_does_no_damage(lake, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    places = [taken, tmp_path, tmp_path / "link", taken / "below.db", Path("/proc/x.db"), lake.database]
    before = sorted(tmp_path.iterdir())
    for place in places:
        assert lake.run("backup", str(place)) == 1, place
    assert len(re.findall("^adce.py: ", lake.said(), re.MULTILINE)) == len(places)
    assert "Traceback" not in lake.said()
    assert (taken.read_text(), sorted(tmp_path.iterdir())) == ("precious", before)
    lake.recover()


def test_backup_to_a_full_disk_leaves_nothing_and_does_no_damage(lake, tmp_path):
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", tmp_path], check=True, timeout=20)
    try:
        assert lake.run("backup", str(tmp_path / "copy.db")) == 1
        assert re.search("^adce.py: .*full", lake.said(), re.MULTILINE)
        assert "Traceback" not in lake.said()
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True, timeout=20)
    lake.recover()


@pytest.mark.parametrize("limit", [32, 20, 12, 8])
def test_few_descriptors_do_no_damage(limit, tmp_path):
    with Scene(tmp_path, days=3) as scene:
        few = ["prlimit", f"--nofile={limit}"]
        process = scene.start("-v", "run", "--once", launcher=SHORT_PAUSES, before=few)
        code = scene.end(process, 60)
        assert "Traceback" not in scene.said(), scene.said()
        assert code == 0 if limit == 32 else code in (0, 1, 3, 12, 78), scene.said()
        time.sleep(1)  # the longest pause
        poll(lambda: scene.run("-v", "run", "--once") == 0, 30, "a complete lake")
        scene.recover()


def test_changes_by_hand_under_a_runner_are_honoured_or_refused(tmp_path):
    """Rows that change or go while their task is under way stop nobody."""
    with Scene(tmp_path, days=6, latency_seconds=(0.3, 0.4)) as scene:
        process = scene.start("-v", "run", launcher=BEATS_OFTEN)
        poll(lambda: len(scene.told()) >= 2)
        changes = (
            "update objects set task = null where task = 'running' and object_id % 2;",
            "delete from attempts where outcome = 'running' and attempt_id % 3 = 0;",
        )
        with Shell(scene.database, *changes):
            pass
        poll(lambda: len(scene.told()) >= 8)
        assert process.poll() is None
        assert stop(scene, process) == 0
        assert "Traceback" not in scene.said()
        assert scene.run("run", "--once") == 0
