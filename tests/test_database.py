"""One safe door to the SQLite file."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, run_adce
from runners import fill_box, rows, write_box

import adce


def open_with_settings(path: Path) -> adce.Database:
    """A database with a table to try things on."""
    database = adce.open_database(path)
    with database.transaction() as sql:
        sql.execute("create table settings (name text primary key, value text) strict")
    return database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[adce.Database]:
    database = open_with_settings(tmp_path / "adce.db")
    yield database
    assert database.check() == []
    database.close()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_database_is_private_with_all_its_files(tmp_path):
    before = os.umask(0o022)
    try:
        database = open_with_settings(tmp_path / "adce.db")
        assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
            ("adce.db", "adce.db-wal", "adce.db-shm"), 0o600
        )
        database.close()
    finally:
        os.umask(before)


def test_every_table_is_strict_and_every_commit_durable(database):
    tables = database.read("select name, strict from pragma_table_list where schema = 'main' and type = 'table'")
    assert {row["name"] for row in tables if not row["strict"]} == {"sqlite_schema"}
    with database.transaction() as sql:
        settings = [
            sql.execute(f"pragma {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]


def test_definitions_in_the_file_are_not_trusted_and_pages_are_checked(database):
    with database.transaction() as sql:
        settings = [sql.execute(f"pragma {name}").fetchone()[0] for name in ("trusted_schema", "cell_size_check")]
    assert settings == [0, 1]


def make_linked(path: Path) -> None:
    adce.open_database(path.with_name("other.db")).close()
    path.symlink_to("other.db")


def make_foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table theirs (a)")
    connection.close()


def make_newer(path: Path, version: int = adce.SCHEMA_VERSION + 1) -> None:
    adce.open_database(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"pragma user_version = {version}")
    connection.close()


def make_broken(path: Path) -> None:
    adce.open_database(path).close()
    body = path.read_bytes()
    path.write_bytes(body[:5000])


def make_zeroed(path: Path) -> None:
    adce.open_database(path).close()
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_foreign, "is a database of another program"),
        (make_newer, f"has schema {adce.SCHEMA_VERSION + 1}, this ADCE needs {adce.SCHEMA_VERSION}"),
        (
            lambda path: make_newer(path, adce.SCHEMA_VERSION - 1),
            f"has schema {adce.SCHEMA_VERSION - 1}, this ADCE needs {adce.SCHEMA_VERSION}",
        ),
        (lambda path: make_newer(path, 0), f"has schema 0, this ADCE needs {adce.SCHEMA_VERSION}"),
        (make_broken, "malformed"),
        (make_zeroed, "malformed|is a database of another program|not a database"),
        (
            lambda path: path.write_text("just a text, and long enough to be read as a header " * 20),
            "is not a database",
        ),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: path.symlink_to("/dev/null"), "is not a regular file"),
        (make_linked, "is not a regular file"),
    ],
)
def test_what_is_not_ours_is_refused_and_left_as_it_is(make, message, tmp_path):
    path = tmp_path / "adce.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(adce.DatabaseError, match=message):
        adce.open_database(path)
    assert before is None or path.read_bytes() == before


def test_missing_database_is_told_where_one_is_needed(tmp_path):
    with pytest.raises(adce.NoDatabaseError, match="there is no database"):
        adce.open_database(tmp_path / "adce.db", must_exist=True)
    assert list(tmp_path.iterdir()) == []


def test_exception_rolls_the_whole_transaction_back(database):
    def fail() -> None:
        with database.transaction() as sql:
            sql.execute("insert into settings values ('a', 'b')")
            sql.execute("insert into settings values ('a', 'b')")

    with pytest.raises(adce.DatabaseError, match="UNIQUE constraint"):
        fail()
    assert database.value("select count(*) from settings where name = 'a'") == 0


def test_reader_cannot_write(database):
    with pytest.raises(adce.DatabaseError, match="readonly"):
        database.read("insert into settings values ('a', 'b')")


def test_reader_sees_what_is_committed_and_never_waits(database):
    with database.transaction() as sql:
        sql.execute("insert into settings values ('a', 'b')")
        assert database.value("select count(*) from settings where name = 'a'") == 0
    assert database.value("select count(*) from settings where name = 'a'") == 1


def test_threads_take_turns_and_lose_no_write(database):
    with database.transaction() as sql:
        sql.execute("insert into settings values ('n', '0')")

    def count() -> None:
        for _ in range(50):
            with database.transaction() as sql:
                n = int(sql.execute("select value from settings where name = 'n'").fetchone()[0])
                sql.execute("update settings set value = ? where name = 'n'", (str(n + 1),))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.value("select value from settings where name = 'n'") == "200"


def test_damage_is_found_and_named(tmp_path):
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        with database.transaction() as sql:
            sql.execute("insert into scopes (scope) values ('x')")
            sql.execute("insert into windows values ('x', 60, 1)")
        database._writer.execute("pragma foreign_keys = off")
        with database.transaction() as sql:
            sql.execute("delete from scopes")
        assert database.check() == ["a row of windows names a row of scopes that is gone"]


def test_full_disk_is_told_and_nothing_is_lost(database):
    with database.transaction() as sql:
        sql.execute("insert into settings values ('kept', 'x')")
        pages = sql.execute("pragma page_count").fetchone()[0]
    database._writer.execute(f"pragma max_page_count = {pages + 1}")

    def fill() -> None:
        with database.transaction() as sql:
            sql.executemany("insert into settings values (?, ?)", [(str(n), "x" * 500) for n in range(1000)])

    with pytest.raises(adce.DatabaseError, match="full") as caught:
        fill()
    assert "free some disk space" in caught.value.hint
    assert database.value("select value from settings where name = 'kept'") == "x"


def test_child_of_a_fork_cannot_use_the_connection(database):
    number = os.fork()
    if number == 0:
        try:
            database.read("select 1")
        except adce.DatabaseError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 7


def count_up(path: str, times: int) -> None:
    database = adce.open_database(Path(path))
    for _ in range(times):
        with database.transaction() as sql:
            sql.execute("update settings set value = cast(value as integer) + 1 where name = 'n'")
    database.close()


def test_processes_wait_for_one_another(database, tmp_path):
    with database.transaction() as sql:
        sql.execute("insert into settings values ('n', '0')")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_up, args=(str(tmp_path / "adce.db"), 100)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert database.value("select value from settings where name = 'n'") == "400"


def open_together(path: str, barrier: threading.Barrier) -> None:
    barrier.wait(30)
    adce.open_database(Path(path)).close()


def leave_as_is(path: Path) -> None:
    """There is no database yet."""


def make_older(path: Path) -> None:
    """A database whose views are those of another version."""
    database = adce.open_database(path)
    with database.transaction() as sql:
        sql.execute("drop view gaps")
        sql.execute("create view gaps as select 1 as old")
    database.close()


@pytest.mark.parametrize("make", [leave_as_is, make_older])
def test_processes_that_start_together_make_one_schema(make, tmp_path):
    make(tmp_path / "adce.db")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=open_together, args=(str(tmp_path / "adce.db"), barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        assert database.check() == []


def test_database_that_cannot_be_created_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(adce.DatabaseError, match=r"cannot create .* No space left on device"):
        adce.open_database(tmp_path / "adce.db")
    assert list(tmp_path.iterdir()) == []


def test_database_that_another_process_creates_first_is_the_one_in_use(tmp_path, monkeypatch):
    link = os.link

    def come_first(draft: Path, path: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        with contextlib.closing(adce.open_database(path)) as first, first.transaction() as sql:
            sql.execute("update facts set store = 'theirs'")
        link(draft, path)

    monkeypatch.setattr(os, "link", come_first)
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        assert database.value("select store from facts") == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["adce.db"]


def test_copy_is_independent(database):
    copy = database.copy()
    with copy.transaction() as sql:
        sql.execute("insert into settings values ('only', 'there')")
    assert copy.value("select value from settings where name = 'only'") == "there"
    assert database.value("select value from settings where name = 'only'") is None


@pytest.mark.parametrize("name", ["adce.db", "adce.db-wal"])
@pytest.mark.parametrize("disturb", [Path.unlink, lambda path: path.rename(path.with_name("moved.db"))])
def test_file_that_was_taken_away_is_noticed(disturb, name, tmp_path):
    database = adce.open_database(tmp_path / "adce.db")
    database.check_file()
    disturb(tmp_path / name)
    with pytest.raises(adce.NoDatabaseError, match="moved, replaced or deleted"):
        database.check_file()
    database.close()


HOLDER = """
import sys, pathlib; sys.path.insert(0, sys.argv[1])
import adce
lock = adce.RunnerLock(pathlib.Path(sys.argv[2])); lock.acquire()
print("held", flush=True); sys.stdin.read()
"""


def test_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path):
    path, lock = tmp_path / "adce.db", adce.RunnerLock(tmp_path / "adce.db")
    words = [sys.executable, "-c", HOLDER, str(ROOT), str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        assert lock.holder() == process.pid
        with pytest.raises(adce.LockedError, match=f"process {process.pid}"):
            lock.acquire()
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while lock.holder() is not None:
        assert time.monotonic() < deadline
    lock.acquire()
    lock.release()


def look_at(path: str, stop: threading.Event) -> None:
    while not stop.is_set():
        adce.RunnerLock(Path(path)).holder()


def test_look_at_the_holder_never_keeps_a_runner_out(tmp_path):
    path, context = tmp_path / "adce.db", multiprocessing.get_context("fork")
    stop, lock = context.Event(), adce.RunnerLock(path)
    onlookers = [context.Process(target=look_at, args=(str(path), stop)) for _ in range(2)]
    for onlooker in onlookers:
        onlooker.start()
    try:
        for _ in range(500):
            lock.acquire()
            lock.release()
    finally:
        stop.set()
        for onlooker in onlookers:
            onlooker.join()
    assert lock.holder() is None


def test_lock_file_is_private_and_tells_the_process(tmp_path):
    lock = adce.RunnerLock(tmp_path / "adce.db")
    lock.acquire()
    assert mode(lock.path) == 0o600
    assert (lock.path.read_text(), lock.holder()) == (str(os.getpid()), os.getpid())
    lock.release()


def test_views_are_made_anew_when_their_text_has_changed(tmp_path):
    database = adce.open_database(tmp_path / "adce.db")
    with database.transaction() as sql:
        sql.execute("drop view gaps")
        sql.execute("create view gaps as select 1 as old")
    database.close()
    again = adce.open_database(tmp_path / "adce.db")
    assert again.read("select * from gaps") == []
    again.close()


def test_database_of_another_schema_is_refused_in_two_lines_that_tell_how_it_is_rebuilt(tmp_path):
    fill_box(tmp_path, "A")
    write_box(tmp_path)
    make_newer(tmp_path / "adce.db", adce.SCHEMA_VERSION - 1)
    for words in (["run", "--once"], ["status"], ["reconcile"]):
        done = run_adce(*words, folder=tmp_path)
        path, told = (
            tmp_path / "adce.db",
            f"has schema {adce.SCHEMA_VERSION - 1}, this ADCE needs {adce.SCHEMA_VERSION}",
        )
        hint = f"move {path} away: the next run rebuilds it from the store, without its history"
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"adce.py: {path} {told}\nTry: {hint}\n"
    (tmp_path / "adce.db").rename(tmp_path / "away.db")
    assert run_adce("run", "--once", folder=tmp_path).returncode == 0
    assert rows(tmp_path, "select key, state from objects_now") == [("things/A", "present")]


def locks_on(path: Path) -> int:
    """How many parts of the file this process has locked (proc_locks(5))."""
    ending = f":{path.stat().st_ino}"
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sum(line[1] == "POSIX" and line[5].endswith(ending) and int(line[4]) == os.getpid() for line in lines)


def test_second_opening_in_a_process_drops_no_lock_of_the_first(tmp_path):
    """POSIX drops all locks of a process on a file when it closes any descriptor of it (fcntl_locking(2))."""
    path = tmp_path / "adce.db"
    with contextlib.closing(open_with_settings(path)) as first:
        first.read("select 1 from settings")
        before = locks_on(path)
        with contextlib.closing(adce.open_database(path)) as second:
            second.read("select 1 from settings")
        assert locks_on(path) == before > 0
