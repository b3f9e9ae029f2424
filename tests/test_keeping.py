"""What is kept, for how long, what a backup holds, and which damage is found."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from conftest import run_adce
from test_queue import Desk

import adce

TEXT = """\
retention_days: 10
rate_limiting: {source_limits: {shop: {requests_per_minute: 30, requests_per_hour: 600}}}
sources: {shop: {base_url: "http://127.0.0.1:9"}}
datasets:
  teams:
    source: shop
    key: "teams/{team}.json"
    url: "/{team}"
    partitions: {values: {team: [A, B, C, D]}}
"""
DAY = 86400


@pytest.fixture
def desk(configure, database, clock) -> Desk:
    return Desk(configure(TEXT), database, clock)


def forget(desk: Desk, days: float) -> int:
    with desk.database.transaction() as sql:
        return adce.forget(sql, desk.clock.wall() - days * DAY)


def attempts(desk: Desk) -> list[str]:
    return [row[0] for row in desk.database.read("select outcome from attempts order by attempt_id")]


def sums(desk: Desk) -> int:
    return desk.database.value("select sum(attempts) from stats")


def test_old_attempts_go_and_their_sums_stay(desk):
    for team in "AB":
        desk.expect("teams", team=team)
    desk.end(desk.claim(), adce.Outcome.OK)
    desk.end(desk.claim(), adce.Outcome.INVALID)
    assert (forget(desk, 10), attempts(desk), sums(desk)) == (0, ["ok", "invalid"], 2)
    desk.clock.advance(11 * DAY)
    assert forget(desk, 10) == 2
    assert (attempts(desk), sums(desk), desk.states()) == ([], 2, {"done": 1, "retry": 1})
    assert desk.end(desk.claim(), adce.Outcome.OK).state == "done"


def test_objects_that_are_no_longer_expected_are_forgotten_after_a_while(desk):
    first, second = (desk.expect("teams", team=team) for team in "AB")
    desk.end(desk.claim(), adce.Outcome.INVALID)
    desk.drop(first)
    desk.clock.advance(9 * DAY)
    desk.drop(second)
    assert (forget(desk, 10), desk.states()) == (0, {"cancelled": 2})
    desk.clock.advance(2 * DAY)
    assert (forget(desk, 10), desk.states()) == (2, {"cancelled": 1})  # with its attempt
    assert desk.database.value("select key from objects_now") == "teams/B.json"


def test_attempt_that_still_runs_and_what_is_younger_stay(desk):
    for team in "AB":
        desk.expect("teams", team=team)
    running = desk.claim()
    desk.clock.advance(11 * DAY)
    desk.end(desk.claim(), adce.Outcome.OK)
    assert (forget(desk, 10), attempts(desk)) == (0, ["running", "ok"])
    assert running and desk.end(running, adce.Outcome.OK).state == "done"


def test_little_is_removed_at_a_time(desk, monkeypatch):
    monkeypatch.setattr(adce, "FORGOTTEN_AT_ONCE", 3)
    desk.expect("teams", team="A")
    for _ in range(7):
        desk.end(desk.claim(), adce.Outcome.LOST)
    desk.clock.advance(11 * DAY)
    assert [forget(desk, 10) for _ in range(4)] == [3, 3, 1, 0]


def test_last_cycle_and_what_undoes_a_skip_are_kept(desk, tmp_path):
    desk.expect("teams", team="A")
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    for _ in range(3):
        adce.run_cycle(adce.reconcile(desk.database, desk.configuration, store, desk.clock))
    with desk.database.transaction() as sql:
        assert adce.skip_tasks(adce.Ledger(sql, desk.configuration, desk.clock.wall()), [1], "no such team") == [1]
    desk.clock.advance(11 * DAY)
    forget(desk, 10)
    assert desk.database.value("select group_concat(cycle_id) from cycles") == "3"
    with desk.database.transaction() as sql:
        assert adce.retry_tasks(adce.Ledger(sql, desk.configuration, desk.clock.wall()), [1]) == 1
    assert desk.database.value("select kind from gaps where key = 'teams/A.json'") == "missing"


def test_backup_of_a_busy_database_is_whole_and_nobody_elses(desk, tmp_path):
    for team in "ABCD":
        desk.expect("teams", team=team)
    is_over = threading.Event()

    def write() -> None:
        with adce.open_database(tmp_path / "adce.db").transaction() as sql:
            sql.execute("update facts set looked_up_to = 0")
        other = adce.open_database(tmp_path / "adce.db")
        while not is_over.is_set():
            with other.transaction(durable=False) as sql:
                sql.execute("update facts set looked_up_to = looked_up_to + 1")
        other.close()

    writer = threading.Thread(target=write)
    writer.start()
    for number in range(20):
        adce.back_up(tmp_path / "adce.db", tmp_path / f"{number}.db")
    is_over.set()
    writer.join()
    for number in range(20):
        path = tmp_path / f"{number}.db"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes()[18:20] == b"\x01\x01"  # it has no write-ahead log
        copy = adce.open_database(path, must_exist=True)
        assert (copy.check(), copy.value("select count(*) from queue")) == ([], 4)
        copy.close()
    assert not list(tmp_path.glob(".*"))


def test_backup_overwrites_nothing_and_leaves_nothing_when_it_fails(desk, tmp_path):
    (tmp_path / "there").write_text("precious")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "there", tmp_path / "file" / "x.db"):
        with pytest.raises(adce.DatabaseError):
            adce.back_up(tmp_path / "adce.db", path)
    assert (tmp_path / "there").read_text() == "precious"
    assert not list(tmp_path.rglob(".*"))


def test_backup_is_on_the_disk_before_it_has_its_name(desk, tmp_path, monkeypatch):
    synced, fsync, link = [], os.fsync, os.link

    def note_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_link(draft: Path, path: Path) -> None:
        synced.append("link")
        link(draft, path)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "link", note_link)
    adce.back_up(tmp_path / "adce.db", tmp_path / "copy.db")
    assert synced == [(tmp_path / "copy.db").stat().st_ino, "link", tmp_path.stat().st_ino]


def test_file_that_comes_during_a_backup_is_not_replaced(desk, tmp_path, monkeypatch):
    link = os.link

    def come_first(draft: Path, path: Path) -> None:
        path.write_text("precious")
        link(draft, path)

    monkeypatch.setattr(os, "link", come_first)
    with pytest.raises(adce.DatabaseError, match="File exists"):
        adce.back_up(tmp_path / "adce.db", tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_text() == "precious"
    assert not list(tmp_path.glob(".*"))


def test_restored_database_asks_nobody_until_what_it_does_not_know_has_left_the_windows(desk, tmp_path):
    adce.back_up(tmp_path / "adce.db", tmp_path / "copy.db")
    copy = adce.open_database(tmp_path / "copy.db")
    for _ in range(2):  # at the first start only
        with copy.transaction() as sql:
            adce.declare_limits(sql, desk.configuration, desk.clock)
            opens = adce.opening(sql, desk.configuration.rate_limiting, "shop", desk.clock.boot())
        assert (opens.at, "restored" in opens.reason) == (50_000.0 + 3600, True)
        desk.clock.advance(60)
    copy.close()


def test_restored_database_keeps_a_pause_that_lasts_longer(desk, tmp_path):
    with desk.database.transaction() as sql:
        adce.pause(sql, "shop", 7200, "asked to", desk.clock.boot())
    adce.back_up(tmp_path / "adce.db", tmp_path / "copy.db")
    copy = adce.open_database(tmp_path / "copy.db")
    with copy.transaction() as sql:
        adce.declare_limits(sql, desk.configuration, desk.clock)
        opens = adce.opening(sql, desk.configuration.rate_limiting, "shop", desk.clock.boot())
    copy.close()
    assert opens.at == 50_000.0 + 7200


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("update objects set task = null where object_id = 1", "1 gaps without a task or"),
        ("update objects set state = 'present' where object_id = 2", "1 gaps without a task or"),
        ("update counts set objects = objects + 2 where state = 'missing'", "2 objects counted wrongly"),
        ("update objects set task = 'running' where object_id = 1", "1 running tasks without an attempt"),
        ("pragma foreign_keys = off; delete from datasets", "names a row of datasets that is gone"),
    ],
)
def test_check_names_what_is_wrong_in_the_database(damage, words, tmp_path):
    (tmp_path / "adce.yaml").write_text(TEXT)
    run_adce("reconcile", folder=tmp_path)
    assert run_adce("check", folder=tmp_path).returncode == 0
    with sqlite3.connect(tmp_path / "adce.db") as connection:
        connection.executescript(damage)
    connection.close()
    done = run_adce("check", "--format", "json", folder=tmp_path)
    found = {row["what"]: row for row in json.loads(done.stdout)}["database"]
    assert (done.returncode, found["result"]) == (1, "FAIL")
    assert words in found["details"]


def test_command_backs_up_beside_whatever_works(tmp_path):
    (tmp_path / "adce.yaml").write_text(TEXT)
    run_adce("reconcile", folder=tmp_path)
    done = run_adce("backup", "copy.db", folder=tmp_path)
    assert (done.returncode, "copy.db holds" in done.stdout) == (0, True)
    again = run_adce("backup", "copy.db", folder=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
    assert run_adce("coverage", "--db", "copy.db", folder=tmp_path).stdout.count("teams") == 1
