"""Databases as older versions left them."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import adce

TO_VERSION_1 = """
drop trigger objects_counted_in;
drop trigger objects_counted_out;
drop trigger objects_recounted;
drop table counts;
drop index if exists objects_open;
alter table objects drop column live;
drop index if exists objects_skipped;
drop index if exists closed_tasks;
alter table objects drop column skipped;
drop index if exists open_tasks;
drop index if exists gave_up_tasks;
drop index objects_by_state;
create index objects_by_state on objects (dataset_id, season, state);
drop trigger if exists tasks_counted_in;
drop trigger if exists tasks_counted_out;
drop trigger if exists tasks_recounted;
drop table if exists task_counts;
drop table if exists notices;
drop table if exists alerts;
drop table if exists channels;
alter table tasks drop column deaths;
alter table attempts drop column output;
drop table orders;
alter table runner drop column address;
alter table runner drop column unit;
alter table runner drop column log;
alter table reconciliations drop column looked;
drop table waiters;
alter table scopes add column finished integer not null default 7;
alter table scopes drop column burst_size;
alter table scopes drop column refill_per_second;
delete from settings where name = 'views';
pragma user_version = 1;
"""
NEWEST = len(adce.MIGRATIONS) + 1


def make_version_1(path: Path) -> None:
    """Turn a database of today into one of schema 1 that knows the same."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        views = [name for (name,) in old.execute("select name from sqlite_schema where type = 'view'")]
        old.executescript("begin;" + "".join(f"drop view {name};" for name in views) + TO_VERSION_1 + "commit;")


def shape_of(path: Path) -> tuple[int, dict[str, list[str]]]:
    """The version of a schema, and the names of all columns; comments and their order do not count."""
    with contextlib.closing(sqlite3.connect(path)) as sql:
        version = sql.execute("pragma user_version").fetchone()[0]
        parts = sql.execute("select name from sqlite_schema order by name").fetchall()
        tables = sql.execute("select name from sqlite_schema where type in ('table', 'view')").fetchall()
        columns = {name: sorted(row[1] for row in sql.execute(f"pragma table_info({name})")) for (name,) in tables}
    return version, {**{name: [] for (name,) in parts}, **columns}
