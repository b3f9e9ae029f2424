#!/usr/bin/env python3
"""ADCE keeps a data lake complete by itself.

You declare in adce.yaml what the lake should hold: datasets of objects, from rate-limited web sources.
ADCE compares that with what the lake does hold, turns every gap into a scored task, and fills the gaps
with a few workers, never asking a source more often than it allows, through crashes and restarts:

    configuration -> expected objects - stored objects = gaps -> tasks -> limits -> fetch -> store

    python adce.py check          is everything in order?
    python adce.py run            keep the lake complete until stopped
    python adce.py report         what is there, what is missing, and why

All state is one SQLite file and the lake itself. The module reads from top to bottom; each room below
rests only on the rooms above it (`grep -n '^# ---' adce.py` prints where they are):

    Vocabulary                  states, outcomes, exit codes, errors; the only reader of the clock
    Schema                      the tables, the centre of the design, and the views of them
    Database                    the SQLite file, its lock and its backups
    Values                      texts with fields, JMESPath, kinds of values in adce.yaml
    Settings                    every key of adce.yaml, declared once: seasons, limits, sources
    Datasets                    datasets, and the file as a whole
    Reading                     YAML to settings, all mistakes at once
    Objects                     what should exist, and where it is asked for
    Contents                    what a whole object is, what it names, how fresh it must be
    Inspector                   the same in a subprocess with limits on time and memory
    Store                       the objects that exist: in a folder, or in S3
    Limits                      which requests are possible, and when
    Permits                     what a response means; the limits for other threads and processes
    Object states               facts, and the state, task and score that follow
    Expectations                the expected objects, as one computed set
    Queue                       the best task whose source can be asked
    Results                     a body judged and stored, the end of an attempt; pause, resume, retry, skip
    Cycles                      one reconciliation in progress: parts to list, contents to read
    Reconcile                   expected against present
    Requests                    one HTTP request
    Programs                    sessions under the limits; commands and calls; one execution of any kind
    Cluster                     the same on the workers of other machines
    Report                      questions in SQL, one renderer
    Conditions                  what needs attention
    Page                        the same in a browser, for Prometheus and over HTTP
    Events                      the log, the live screen, and alerts
    Supervision                 the runner as a process: systemd, signals, start, stop
    Runner                      keeps going until stopped
    Examples                    the reference of adce.yaml, texts for the programs around ADCE
    Checks                      is everything in order, and what would a run do?
    Command line                parsing and exit codes
    Commands                    one function per command
"""

from __future__ import annotations

import argparse
import array
import atexit
import base64
import calendar
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import difflib
import enum
import errno
import fcntl
import functools
import gc
import graphlib
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import typing
import unicodedata
import urllib.parse
import zlib
import zoneinfo
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, NoReturn, Self, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future
    from multiprocessing.connection import Connection
    from typing import BinaryIO

__version__ = "1.0.0"
__all__ = ["RateLimitedError", "limit", "permit", "session"]  # what README.md promises to other programs

# A scraper that imports adce must meet these very classes, also when this file runs as a script.
sys.modules.setdefault("adce", sys.modules[__name__])


# ---------------------------------------------------------------- Vocabulary
# States, outcomes, priorities, exit codes and errors: every word is stored as it is shown. Then instants and durations:
# wall time is for people and for ages in hours; limits use boot time, which no clock change moves and which all
# processes of the machine share. Headlines: Outcome, Error, Clock.


class ObjectState(enum.StrEnum):
    """The state of an object. Missing, stale and suspect are gaps."""

    AWAITED = "awaited"  # `available_after` is still to come, or the store was not searched yet
    MISSING = "missing"
    STALE = "stale"  # older than its freshness allows, or not final yet
    SUSPECT = "suspect"  # present, but fails its validation
    PRESENT = "present"
    SKIPPED = "skipped"  # excluded by the operator
    ABSENT = "absent"  # the source says that there is none, and `absent_after` is over
    DROPPED = "dropped"  # no longer expected; the stored object is left alone


GAPS = (ObjectState.MISSING, ObjectState.STALE, ObjectState.SUSPECT)


class TaskState(enum.StrEnum):
    """The state of the open work on a gap. Only `gave_up` is a final bad state."""

    PENDING = "pending"  # can be claimed
    RETRY = "retry"  # waits until next_at
    RUNNING = "running"
    GAVE_UP = "gave_up"
    # A closed task leaves no row; these two are only logged.
    DONE = "done"
    CANCELLED = "cancelled"  # the object is no longer expected


class Priority(enum.StrEnum):
    """The weight of a gap, from highest to lowest."""

    CRITICAL = "CRITICAL"
    HIGH = "HIGH"
    MEDIUM = "MEDIUM"
    LOW = "LOW"


@dataclass(frozen=True, slots=True)
class Traits:
    """The consequences of an outcome."""

    counts: bool = False  # towards `retry.max_attempts`, unless the source is to blame
    rated: bool = False  # in the success rate of the dataset
    passing: bool = False  # the request says nothing about the source
    source_after: int = 0  # so many in a row mean that the source is down; 0: never
    setting: str = ""  # the key of `blocked_when` that holds that number instead


class Outcome(enum.StrEnum):
    """The result of an attempt, with its consequences."""

    traits: Traits

    def __new__(cls, word: str, traits: Traits = Traits()) -> Self:
        member = str.__new__(cls, word)
        member._value_, member.traits = word, traits
        return member

    RUNNING = "running"
    OK = "ok", Traits(rated=True)
    NOT_YET = "not_yet"  # the source has no such object (yet)
    INVALID = "invalid", Traits(counts=True, rated=True)  # the response is not the object
    HTTP_ERROR = "http_error", Traits(counts=True, rated=True)
    THROTTLED = "throttled"  # 429, 503, or a body that means blocked: the source is paused
    BLOCKED = "blocked", Traits(counts=True, source_after=2)  # a status that means blocked
    TIMEOUT = "timeout", Traits(counts=True, setting="timeouts_in_a_row")
    UNREACHABLE = "unreachable", Traits(counts=True, source_after=2)  # no connection
    BROKEN = "broken", Traits(counts=True, source_after=5)  # the response ended early
    STORE_ERROR = "store_error", Traits(passing=True)  # fetched, but not stored
    UNSTORABLE = "unstorable", Traits(counts=True, passing=True)  # its place in the store cannot be used
    ERROR = "error", Traits(counts=True, rated=True, setting="failures_in_a_row")  # a command or call failed
    LOST = "lost", Traits(passing=True)  # it says nothing: the runner or a used connection ended first


class ExitCode(enum.IntEnum):
    """The exit status of a command. Treat an unknown one as a failure."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    GAPS_LEFT = 3
    NOT_RUNNING = 4
    NO_DATABASE = 10
    LOCKED = 11
    STORE_UNUSABLE = 12
    BAD_CONFIGURATION = 78
    INTERRUPTED = 130


class Error(Exception):
    """A problem that the user can solve, and a hint how."""

    exit_code: int = ExitCode.ERROR

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigurationError(Error):
    """adce.yaml cannot be used; the message lists every problem."""

    exit_code = ExitCode.BAD_CONFIGURATION


class DatabaseError(Error):
    """The database is unusable, or not ADCE's."""


class DatabaseUnavailableError(DatabaseError):
    """The database cannot be used now but may be later: it is locked, or its disk is full."""


class NoDatabaseError(DatabaseError):
    """The database does not exist."""

    exit_code = ExitCode.NO_DATABASE


class RateLimitedError(Error):
    """A source cannot be asked within the time given; it can be in `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class LockedError(Error):
    """Another runner holds this database."""

    exit_code = ExitCode.LOCKED


class StoreError(Error):
    """The store cannot be listed, read or written."""

    exit_code = ExitCode.STORE_UNUSABLE


class UnusablePathError(StoreError):
    """One object or folder of the store cannot be used; the others can."""


MINUTE, HOUR, DAY = 60, 3600, 86400
POLL_SECONDS, IDLE_POLL_SECONDS = 0.1, 1.0
PROC = Path("/proc")  # where there is one


class Clock:
    """The only reader of time. A simulation passes its own."""

    def wall(self) -> float:
        """Seconds since 1970, UTC. May step."""
        return time.time()

    def boot(self) -> float:
        """Seconds since the machine started, the same for all of its processes. Never steps.

        Suspended time is included on Linux. Elsewhere it may not be: then a limit lasts longer, never shorter."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def boot_id(self) -> str:
        """The name of this boot; boot times of two boots must not be compared. "unknown" where there is none: then only
        a boot time smaller than before proves another boot. Wall time gives no name, because it may be set."""
        with contextlib.suppress(OSError):
            return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return "unknown"

    def wait(
        self,
        wakeups: queue.SimpleQueue[str],
        seconds: float,
        has_changed: Callable[[], bool] | None = None,
        every: float = POLL_SECONDS,
    ) -> None:
        """Sleep for `seconds`, until something is put into `wakeups`, or until `has_changed`, which is asked `every` so
        many seconds because other processes cannot wake this one; empty `wakeups`."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                wakeups.get(timeout=min(left, every) if has_changed else left)
                break
            if has_changed and has_changed():
                break
        while not wakeups.empty():
            wakeups.get_nowait()


def parse_duration(text: str) -> int:
    """Seconds of a duration such as 90s, 15m, 6h or 1d. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})\s*([smhd])", text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a duration; write 90s, 15m, 6h or 1d")
    return int(match[1]) * {"s": 1, "m": MINUTE, "h": HOUR, "d": DAY}[match[2]]


def format_duration(seconds: float) -> str:
    """A duration in at most two units, for people: 42 s, 3 min 12 s, 6 h, 4 d 2 h."""
    whole = round(seconds)
    for size, name, part, part_name in ((DAY, "d", HOUR, "h"), (HOUR, "h", MINUTE, "min"), (MINUTE, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name} {rest} {part_name}" if rest else f"{whole // size} {name}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def utc_text(instant: float | None) -> str | None:
    """2026-11-23T14:24:25Z, the form of the views; None stays None."""
    if instant is None:
        return None
    within = min(max(int(instant), -62135596800), 253402300799)  # the years 1 to 9999: a store may list any
    return datetime.datetime.fromtimestamp(within, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def printable(text: str, instead: Callable[[str], str] = lambda _: "?") -> str:
    """A text in which nothing is an order to a terminal, or changes the direction of writing."""
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else instead(found[0]), text)


def http_date(text: str) -> datetime.datetime:
    """The instant of a header such as Date. Raises ValueError, TypeError or OverflowError."""
    from email.utils import parsedate_to_datetime

    instant = parsedate_to_datetime(text)  # without a zone in the form of asctime()
    return instant if instant.tzinfo else instant.replace(tzinfo=datetime.UTC)


def instant_of(day: datetime.date, at: datetime.time, timezone: str) -> int:
    """The instant of a local time of day, in seconds since 1970."""
    return int(datetime.datetime.combine(day, at, zoneinfo.ZoneInfo(timezone)).timestamp())


def day_of(instant: float, timezone: str = "UTC") -> datetime.date:
    """The calendar day that holds an instant."""
    return datetime.datetime.fromtimestamp(instant, zoneinfo.ZoneInfo(timezone)).date()


# ---------------------------------------------------------------- Schema
# The tables: the centre of the design. One row of `objects` is an object and its open task. Instants are seconds
# since 1970 (UTC); boot times, so marked, are seconds since the machine started. The views are the contract for
# readers: plain names, UTC times as text, live scores; created anew when their text changes. Headlines: TABLES, VIEWS.

APPLICATION_ID = 0x41444345  # "ADCE"
SCHEMA_VERSION = 18
TABLES = """
create table facts (
    -- Facts about this file and the last cycles, in one row.
    only_row     integer primary key check (only_row = 1),
    store        text,               -- that the database belongs to
    store_error  text,               -- that ended the last cycles
    is_backup    integer not null default 0,
    boot_id      text,               -- of the boot times below
    wall_offset  real    not null default 0, -- wall time minus boot time, for display
    declaration  text,               -- digest of the datasets and seasons that the next cycle follows
    priorities   text,               -- the day and a digest of the weights of the ranks; '': datasets have changed
    ordered      text    not null default '{}', -- JSON: prefixes that the store lists in key order
    looked_up_to text    not null default '',   -- last key of the last share of a cycle; '': none
    looked_at    real,               -- start of the cycle that looked so far
    wanted_cycle text                -- JSON: options of a cycle that another process requested
) strict;

create table runner (
    -- The process that works on this database, or the last one that did.
    only_row     integer primary key check (only_row = 1),
    pid          integer not null,
    version      text    not null,
    started_at   integer not null,
    beat_at      integer not null,   -- last heartbeat of the main loop
    address      text,               -- of its HTTP server
    unit         text,               -- of systemd
    log          text,               -- its log file
    stopped_at   integer,
    note         text                -- why it stopped, or why it cannot begin anything
) strict;

create table datasets (
    -- One row for each dataset that adce.yaml declares, or once declared.
    dataset_id   integer primary key,
    dataset      text    not null unique,
    source       text    not null,
    active       integer not null,   -- 0: no longer declared
    ready        integer not null default 1,  -- 0: adce.yaml has changed, and no cycle has followed yet
    expansion    text    not null default '', -- inputs of its expected objects; '': to be computed
    reading      text    not null default '', -- digest of the rules by which contents were judged
    changed      integer not null default 0,  -- grows with every change of its objects or of their mentions
    success_rate real    not null default 1,  -- 0 to 1, moving average
    rate_weight  real    not null default 0,  -- points of score for a success rate of 1
    bonus        real    as (rate_weight * success_rate)
) strict;

create table objects (
    -- One row for each expected object, and its open task. Objects in the store that no dataset expects have no row.
    object_id    integer primary key,
    dataset_id   integer not null references datasets,
    key          text    not null unique,
    fields       text    not null,   -- JSON: the values of its partition
    season       text,
    day          text,
    available_at integer,            -- not expected before
    parent_id    integer,            -- the first object that names it
    state        text    not null    -- with `in`, SQLite would build the list of a check anew for each row
                 check (state = 'awaited' or state = 'missing' or state = 'stale' or state = 'suspect'
                        or state = 'present' or state = 'skipped' or state = 'absent' or state = 'dropped'),
    reason       text,               -- of a gap
    since        integer not null,   -- start of this state
    next_at      integer,            -- when time alone will change the state or the task
    proven       integer not null,   -- 1: the store was searched for it; 0: not yet; 2: its parent has just named it
    cycle_id     integer,            -- the cycle in or after which ADCE last stored it
    seen_at      integer,            -- first seen in the store
    etag         text,               -- null: not in the store
    size         integer,            -- bytes
    modified_at  integer,            -- or a later instant at which the source said that it has not changed
    validators   text,               -- JSON: the url and conditions of the next request for it
    read_etag    text,               -- the version whose content was judged, and the verdict:
    verdict      text,               -- why it is invalid; null: valid
    settled      integer,            -- 1: final, `until` holds
    live         integer,            -- 1: `live.while` holds
    skipped      text,               -- reason given when the operator excluded it
    absent_at    integer,            -- the source said that there is none, when `absent_after` was over
    outdated     text,               -- why it must be fetched again, such as a page after one that was
    task         text                -- null: nothing to do
                 check (task = 'pending' or task = 'retry' or task = 'running' or task = 'gave_up'),
    priority     text check (priority = 'CRITICAL' or priority = 'HIGH' or priority = 'MEDIUM' or priority = 'LOW'),
    detected_at  integer,            -- age counts from here
    gap_size     integer,            -- objects that one execution would bring
    rank         real,               -- the score in 1970, without the bonus of the dataset
    slope        real,               -- points gained in an hour
    attempts     integer not null default 0,
    failures     integer not null default 0, -- that count towards retry.max_attempts
    fruitless    integer not null default 0, -- attempts since the last good one, lost ones excluded
    crashes      integer not null default 0, -- of runners in a row, during its attempts
    attempt_id   integer,            -- the running attempt
    last_error   text
) strict;
create index objects_by_state on objects (dataset_id, season, state, day);
create index objects_in_time on objects (next_at) where next_at is not null;
create index objects_unread on objects (dataset_id, key) where etag is not read_etag;
create index objects_to_find on objects (key) where (task is not null or proven = 0) and state != 'dropped';
create index objects_dropped on objects (since) where state = 'dropped';
create index objects_pending on objects (dataset_id, rank desc, object_id) where task = 'pending';
create index objects_by_task on objects (task, dataset_id) where task != 'pending';
create index objects_by_age on objects (priority, detected_at) where task is not null;

create table counts (
    -- Objects by state and task, kept by the triggers below: counting them would take long.
    dataset_id   integer not null references datasets,
    season       text    not null,   -- '': none
    state        text    not null,
    task         text    not null,   -- '': none
    priority     text    not null,   -- '': never a task
    objects      integer not null,
    primary key (dataset_id, season, state, task, priority)
) strict, without rowid;
create trigger objects_counted_in after insert on objects begin
    insert into counts
    values (new.dataset_id, ifnull(new.season, ''), new.state, ifnull(new.task, ''), ifnull(new.priority, ''), 1)
    on conflict do update set objects = objects + 1;
end;
create trigger objects_counted_out after delete on objects begin
    insert into counts
    values (old.dataset_id, ifnull(old.season, ''), old.state, ifnull(old.task, ''), ifnull(old.priority, ''), -1)
    on conflict do update set objects = objects - 1;
end;
create trigger objects_recounted after update of dataset_id, season, state, task, priority on objects
when (old.state, old.task, old.priority, old.season, old.dataset_id)
     is not (new.state, new.task, new.priority, new.season, new.dataset_id) begin
    insert into counts
    values (old.dataset_id, ifnull(old.season, ''), old.state, ifnull(old.task, ''), ifnull(old.priority, ''), -1),
           (new.dataset_id, ifnull(new.season, ''), new.state, ifnull(new.task, ''), ifnull(new.priority, ''), 1)
    on conflict do update set objects = objects + excluded.objects;
end;

create table mentions (
    -- The ids that the content of an object names: facts, from which expected objects are computed.
    object_id    integer not null references objects on delete cascade,
    expression   text    not null,   -- that found it
    value        text    not null,
    primary key (object_id, expression, value)
) strict, without rowid;

create table attempts (
    -- One execution of a task. A retry is a new row.
    attempt_id   integer primary key,
    object_id    integer not null references objects,
    started_at   real    not null,
    seconds      real,
    outcome      text    not null,
    http_status  integer,
    bytes        integer,
    requests     integer not null,   -- HTTP requests, redirects included
    url          text,
    error        text,
    output       text,               -- the end of the output of a command
    worker       text                -- of a cluster
) strict;
create index attempts_by_object on attempts (object_id);

create table daily_totals (
    -- Attempts by day, kept when old attempts are removed: the trigger below adds each attempt as it ends.
    day          text    not null,
    dataset_id   integer not null references datasets,
    priority     text    not null,
    outcome      text    not null,
    attempts     integer not null,
    seconds      real    not null,
    bytes        integer not null,
    primary key (day, dataset_id, priority, outcome)
) strict, without rowid;
create trigger attempts_totalled after update of outcome on attempts when old.outcome = 'running' begin
    insert into daily_totals
    select date(new.started_at + new.seconds, 'unixepoch'), dataset_id, coalesce(priority, 'LOW'), new.outcome, 1,
           new.seconds, coalesce(new.bytes, 0)
    from objects where object_id = new.object_id
    on conflict do update set
        attempts = attempts + 1, seconds = seconds + excluded.seconds, bytes = bytes + excluded.bytes;
end;

create table reconciliations (
    -- One row for each cycle.
    cycle_id     integer primary key,
    started_at   real    not null,
    seconds      real,               -- null: not finished
    listed       integer not null default 0, -- objects listed by the store
    looked       integer not null default 0, -- expected objects compared with that: all, or a share
    list_calls   integer not null default 0,
    expected     integer not null default 0,
    present      integer not null default 0,
    missing      integer not null default 0,
    stale        integer not null default 0,
    suspect      integer not null default 0,
    created      integer not null default 0, -- tasks opened
    closed       integer not null default 0, -- tasks closed because their gap was gone
    dropped      integer not null default 0, -- objects no longer expected
    progress     text,               -- while it goes on: how far it is
    error        text
) strict;

create table scopes (
    -- The limiter's state: one row for each source, and one named global. Boot times.
    scope        text    primary key,
    granted_at   real    not null default 0, -- the last permit
    tokens       real    not null default 0, -- in the bucket at tokens_at
    tokens_at    real    not null default 0,
    paused_until real    not null default 0,
    paused_for   real    not null default 0, -- seconds, as requested
    reason       text,               -- of the pause
    failures     integer not null default 0, -- in a row that blame the source
    throttles    integer not null default 0, -- pauses in a row without a good response
    burst_size   integer,            -- capacity of the bucket; null: no bucket
    refill_per_second real not null default 0
) strict, without rowid;

create table windows (
    -- The limits in force: at most max_requests in any window_seconds.
    scope          text    not null references scopes,
    window_seconds real    not null,
    max_requests   integer not null,
    primary key (scope, window_seconds)
) strict, without rowid;

create table requests (
    -- HTTP requests in flight. Boot times.
    request_id   integer primary key, -- random: none is used again
    source       text    not null references scopes,
    deadline     real    not null    -- counts as finished then, whatever became of its client
) strict;

create table finished (
    -- HTTP requests that still count in a window: each in its source and in global. Boot times.
    scope        text    not null references scopes,
    finished_at  real    not null,
    number       integer not null,   -- the n-th of its scope
    primary key (scope, finished_at, number)
) strict, without rowid;

create table waiters (
    -- Clients that wait for a permit, in order of arrival. Boot times.
    waiter_id    integer primary key,
    source       text    not null references scopes,
    owner        text    not null,   -- the runner, or a thread of another process
    waits_for    text    not null,   -- the scope that is in the way: the source, or global
    opens_at     real    not null,   -- the next look is worth it then
    reason       text    not null,
    expires_at   real    not null,   -- gone unless it looks again by then
    unique (source, owner)
) strict;

create table alerts (
    -- Conditions that were reported; one row for each time that one lasted.
    condition    text    not null,
    about        text    not null,
    since        integer not null,
    text         text    not null,
    seen_at      integer not null,   -- it held then
    notified_at  integer not null,   -- the last message was made then
    ended_at     integer,
    unsent       text    not null,   -- JSON: the messages that channels have still to take
    primary key (condition, about, since)
) strict, without rowid;

insert into facts (only_row) values (1);
"""

VIEWS = """
create view queue as
    -- Every open task.
    select o.object_id as task_id, o.task as state,
           round(o.rank + o.slope * unixepoch() / 3600.0 + d.bonus, 2) as score,
           o.priority, d.source, d.dataset, o.key, o.gap_size,
           round((unixepoch() - o.detected_at) / 3600.0, 2) as age_hours,
           coalesce(o.state || ': ' || o.reason, o.state) as reason, o.attempts,
           strftime('%Y-%m-%dT%H:%M:%SZ', o.next_at, 'unixepoch') as next_at, o.last_error
    from objects o join datasets d using (dataset_id)
    where o.task is not null;

create view gaps as
    -- Every expected object that is missing, stale or suspect.
    select d.dataset, o.key, o.state as kind, strftime('%Y-%m-%dT%H:%M:%SZ', o.since, 'unixepoch') as since,
           o.priority, o.season, o.reason, o.task as task_state, o.object_id as task_id
    from objects o join datasets d using (dataset_id)
    where o.state in ('missing', 'stale', 'suspect');

create view coverage as
    -- Expected and present objects by dataset and season. 100 percent means all of them.
    with summed as (
        select dataset_id, nullif(season, '') as season,
               sum(objects * (state in ('present', 'missing', 'stale', 'suspect'))) as expected,
               sum(objects * (state = 'present')) as present, sum(objects * (state = 'missing')) as missing,
               sum(objects * (state = 'stale')) as stale, sum(objects * (state = 'suspect')) as suspect,
               sum(objects * (state = 'skipped')) as skipped, sum(objects * (state = 'absent')) as absent,
               sum(objects * (task = 'gave_up')) as gave_up
        from counts
        group by dataset_id, season
    )
    select d.source, d.dataset, c.season, c.expected, c.present, c.missing, c.stale, c.suspect, c.gave_up,
           c.present * 10000 / nullif(c.expected, 0) / 100.0 as percent, c.skipped, c.absent
    from summed c join datasets d using (dataset_id)
    where c.expected > 0 or c.skipped > 0 or c.absent > 0;

create view coverage_by_day as
    -- The same for objects with a day, by day.
    select d.source, d.dataset, o.day, count(*) as expected, sum(o.state = 'present') as present,
           sum(o.state = 'missing') as missing, sum(o.state = 'stale') as stale, sum(o.state = 'suspect') as suspect
    from objects o join datasets d using (dataset_id)
    where o.state in ('present', 'missing', 'stale', 'suspect') and o.day is not null
    group by d.source, d.dataset, o.day;

create view objects_now as
    -- Every object that is expected, or once was and is still remembered.
    select d.dataset, o.key, o.state, o.size,
           strftime('%Y-%m-%dT%H:%M:%SZ', o.modified_at, 'unixepoch') as fetched_at,
           strftime('%Y-%m-%dT%H:%M:%SZ', o.next_at, 'unixepoch') as due_at,
           p.key as parent, o.season, o.day, o.fields, o.etag, coalesce(o.skipped, o.reason) as reason,
           o.object_id as task_id
    from objects o join datasets d using (dataset_id)
    left join objects p on p.object_id = o.parent_id;

create view rates as
    -- Each limit and its use. A client that waits sees why, and at free_at the next permit is possible; null: now.
    -- A scope without limits has one row, for its pauses.
    with now as (
        select (julianday('now') - 2440587.5) * 86400.0 - wall_offset as at, wall_offset from facts
    ), waiting as (
        select scope, count(*) as waiting, min(iif(opens_at > at and source = scope, waiter_id, null)) as first
        from now join waiters on expires_at >= at join scopes on scope in (source, 'global')
        group by scope
    )
    select s.scope, w.window_seconds, w.max_requests,
           (select count(*) from requests r where s.scope in (r.source, 'global'))
           + (select count(*) from finished f
               where f.scope = s.scope and f.finished_at > n.at - w.window_seconds) as used,
           (select count(*) from requests r where s.scope in (r.source, 'global')) as in_flight,
           coalesce(a.waiting, 0) as waiting,
           strftime('%Y-%m-%dT%H:%M:%SZ', p.paused_until + n.wall_offset, 'unixepoch') as blocked_until, p.reason,
           strftime('%Y-%m-%dT%H:%M:%SZ', cast(  -- rounded up to a whole second
               coalesce(p.paused_until, l.opens_at) + n.wall_offset + 0.999 as integer), 'unixepoch') as free_at,
           coalesce('paused: ' || p.reason, l.reason) as why
    from scopes s
    join now n
    left join scopes p on p.scope = s.scope and p.paused_until > n.at
    left join windows w on w.scope = s.scope
    left join waiting a on a.scope = s.scope
    left join waiters l on l.waiter_id = a.first;

create view recent_attempts as
    -- Every attempt that is still kept, the latest first.
    select a.attempt_id, a.object_id as task_id, d.source, d.dataset, o.key, a.url,
           strftime('%Y-%m-%dT%H:%M:%SZ', a.started_at, 'unixepoch') as started_at, round(a.seconds, 3) as seconds,
           a.outcome, a.http_status, a.bytes, a.worker, a.error
    from attempts a join objects o using (object_id) join datasets d using (dataset_id)
    order by a.attempt_id desc;

create view open_alerts as
    -- Conditions that were reported and are not over.
    select condition, about, text,
           strftime('%Y-%m-%dT%H:%M:%SZ', since, 'unixepoch') as since,
           strftime('%Y-%m-%dT%H:%M:%SZ', notified_at, 'unixepoch') as notified_at
    from alerts
    where ended_at is null
    order by alerts.since;

create view stats as
    -- Attempts by day, kept for ever.
    select s.day, d.source, d.dataset, s.priority, s.outcome, s.attempts, round(s.seconds, 3) as seconds, s.bytes
    from daily_totals s join datasets d using (dataset_id);

create view cycles as
    -- Every reconciliation: "0 gaps" and "did not look" are different.
    select cycle_id, strftime('%Y-%m-%dT%H:%M:%SZ', started_at, 'unixepoch') as started_at,
           round(seconds, 3) as seconds, listed, looked, expected, present, missing, stale, suspect, created, closed,
           dropped, list_calls, error
    from reconciliations;
"""


# ---------------------------------------------------------------- Database
# The SQLite file: one connection that writes, behind a lock, and one that can only read. Nothing slow happens inside
# a transaction, and nothing else in this process opens the file, because closing it would drop SQLite's locks.
# Headlines: Database, open_database(), RunnerLock, back_up().

BUSY_SECONDS = 30  # for which another program may hold its transaction
BUSY_STEP_SECONDS = 0.25  # of waiting inside SQLite, where Python runs no signal handler
TROUBLE_SECONDS = 10  # before a database that cannot be used now is tried again
CONNECTION_SETTINGS = """
pragma synchronous = full;
pragma journal_size_limit = 8388608;
pragma foreign_keys = on;
pragma trusted_schema = off;
pragma cell_size_check = on;
"""
DAMAGE_HINT = (
    "put a backup in its place, and remove the files whose names end with -wal and -shm, or move all three away: "
    "a new one is filled from the store, without its history"
)
HINTS = {
    "SQLITE_FULL": "free some disk space; nothing is lost meanwhile",
    "SQLITE_IOERR_WRITE": "free some disk space; nothing is lost meanwhile",
    "SQLITE_BUSY": "another program holds a transaction on this file; close it",
    "SQLITE_CORRUPT": DAMAGE_HINT,
    "SQLITE_NOTADB": DAMAGE_HINT,
    "UnicodeDecodeError": DAMAGE_HINT,  # in the name of a table
}


class Database:
    """The open database. Threads may share it; after a fork it is useless."""

    def __init__(self, path: str, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self.path = path
        self._writer, self._reader = writer, reader
        self._writing, self._reading = threading.Lock(), threading.Lock()  # guard the connections
        self._data_version = -1  # last seen by the writer
        self._wait_seconds = float(BUSY_SECONDS)
        self._pid, self._inodes = os.getpid(), dict.fromkeys((path, f"{path}-wal"), 0)  # as first seen
        self.check_file()
        writer.execute(f"pragma busy_timeout = {BUSY_STEP_SECONDS * 1000:.0f}")

    @contextlib.contextmanager
    def _hold(self, lock: threading.Lock) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise DatabaseError(
                f"{self.path} was opened before this process was forked",
                "start the other process anew; multiprocessing: use the method spawn",
            )
        with lock, _translation(self.path):
            yield

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One `begin immediate` transaction: committed at the end, rolled back on any exception. One that is not
        durable is faster, but a power cut may undo it. Raises DatabaseError, for instance when the disk is full."""
        with self._hold(self._writing):
            try:
                self._writer.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
                self._begin()
                yield self._writer
                self._writer.execute("commit")
            finally:  # also after an interrupt
                if self._writer.in_transaction:
                    self._writer.execute("rollback")

    def _begin(self) -> None:
        started = time.monotonic()
        while not self._writer.in_transaction:
            try:
                self._writer.execute("begin immediate")
            except sqlite3.OperationalError as error:
                is_over = time.monotonic() - started > self._wait_seconds
                if is_over or not error.sqlite_errorname.startswith("SQLITE_BUSY"):
                    raise

    def shorten_waits(self) -> None:
        """From now on, do not wait long for other programs."""
        self._wait_seconds = 1

    def read(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query, as of one moment. Never waits for a writer."""
        with self._hold(self._reading):
            return self._reader.execute(sql, parameters).fetchall()

    def value(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> Any:
        """The first column of the first row, or None."""
        rows = self.read(sql, parameters)
        return rows[0][0] if rows else None

    def has_changed(self) -> bool:
        """Whether another connection, of any process, has written since the last call. Takes some microseconds."""
        with self._hold(self._writing):
            known = self._data_version
            self._data_version = self._writer.execute("pragma data_version").fetchone()[0]
        return self._data_version != known

    def check(self) -> list[str]:
        """Every damage that can be found, in words; empty when all is well."""
        damages = [row[0] for row in self.read("pragma integrity_check") if row[0] != "ok"]
        orphans = self.read("pragma foreign_key_check")
        return damages + [f"a row of {row[0]} names a row of {row[2]} that is gone" for row in orphans]

    def check_file(self) -> None:
        """Raises NoDatabaseError when the file was moved, replaced or deleted: SQLite would go on writing to it."""
        for path, known in self._inodes.items():
            found = 0
            with contextlib.suppress(OSError):
                found = Path(path).stat().st_ino
            if known not in (0, found):
                raise NoDatabaseError(f"{path} was moved, replaced or deleted while in use", "start again")
            self._inodes[path] = found

    def copy(self) -> Database:
        """The same contents in memory: what is tried there changes nothing here."""
        memory = _connect(":memory:")
        with self._hold(self._reading):
            self._reader.backup(memory)
        return Database(self.path, memory, memory)

    def close(self) -> None:
        """Close both connections, after waiting for the threads that use them: else SQLite would crash."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()


@contextlib.contextmanager
def _translation(context: str) -> Iterator[None]:
    """Raise errors of SQLite as a DatabaseError with a hint."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        passes = name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR"))
        hint = next((hint for start, hint in HINTS.items() if name.startswith(start)), "")
        raise (DatabaseUnavailableError if passes else DatabaseError)(f"{context}: {error} ({name})", hint) from error


def _connect(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.executescript(CONNECTION_SETTINGS)
    return connection


def require_own_files(path: Path) -> None:
    """Raises DatabaseError for a link, a pipe or another kind of file in place of the database or of what ADCE keeps
    beside it: to open it could reach another file, or wait for ever."""
    for ending in ("", "-journal", "-wal", "-shm", "-output", ".lock", ".log"):
        place, what = Path(f"{path}{ending}"), "folder" if ending == "-output" else "regular file"
        is_right = place.is_dir() if what == "folder" else place.is_file()
        if place.is_symlink() or (place.exists() and not is_right):
            raise DatabaseError(f"{place} is not a {what}", "remove it; `database:` names the database file itself")


def open_database(path: Path, *, must_exist: bool = False) -> Database:
    """Open the database; create it when there is none, or raise NoDatabaseError when it `must_exist`."""
    require_own_files(path)
    is_there = path.exists() and path.stat().st_size
    if must_exist and not is_there:
        raise NoDatabaseError(f"there is no database at {path}", "adce.py run")
    with _translation(str(path)), contextlib.ExitStack() as opened:
        if not is_there:
            _create(path)
        writer, reader = (opened.enter_context(contextlib.closing(_connect(path))) for _ in range(2))
        _check_schema(writer, path)
        writer.execute("pragma journal_mode = wal")  # of a backup, too
        reader.execute("pragma query_only = on")
        opened.pop_all()
    return Database(str(path), writer, reader)


def memory_database() -> Database:
    """An empty database that is gone when it is closed."""
    connection = _connect(":memory:")
    _create_tables(connection)
    return Database(":memory:", connection, connection)


def _create(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.stat().st_size:
            path.unlink()
        with _new_file(path) as draft, contextlib.closing(_connect(draft)) as made:
            _create_tables(made)
    except FileExistsError:
        return  # another process was faster
    except OSError as error:
        raise DatabaseError(f"cannot create {path}: {error.strerror}", "see `database:` in adce.yaml") from error


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A draft, mode 0600, that gets the name `path` at the end, when it is on the disk. Raises FileExistsError."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        draft.touch(0o600)
        yield draft
        _sync(draft)
        os.link(draft, path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path | str, folder: int | None = None) -> BinaryIO:
    """A regular file, in an open folder. Raises OSError for a link, a folder or a pipe."""
    safe = os.O_NOFOLLOW | os.O_NONBLOCK
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | safe, dir_fd=folder))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file")


def _create_tables(connection: sqlite3.Connection) -> None:
    numbers = f"pragma application_id = {APPLICATION_ID}; pragma user_version = {SCHEMA_VERSION};"
    connection.executescript(f"pragma journal_mode = wal; begin; {numbers} {TABLES} {VIEWS} commit;")


def _definitions(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """The kind, the name and the text of each table, index, trigger and view, without its comments and line breaks."""
    as_text = "cast(type as text), cast(name as text), cast(sql as text)"  # another program may have put bytes there
    rows = connection.execute(f"select {as_text} from sqlite_schema where sql is not null").fetchall()  # noqa: S608
    return {(kind, name, " ".join(re.sub("--[^\n]*", "", text).split())) for kind, name, text in rows}


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Recreate the views when their text differs. Raises DatabaseError for the file of another program or version, and
    when another program has changed a table, an index or a trigger, or added one that acts at each write."""
    if connection.execute("pragma application_id").fetchone()[0] != APPLICATION_ID:
        raise DatabaseError(f"{path} is a database of another program", "name another file in `database:`")
    version = connection.execute("pragma user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        message = f"{path} has schema {version}, this ADCE needs {SCHEMA_VERSION}"
        hint = f"move {path} away: the next run rebuilds it from the store, without its history"
        raise DatabaseError(message, hint)
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.executescript(TABLES + VIEWS)
        wanted = _definitions(made)
    found, harmless = _definitions(connection), re.compile(r"create (table|view) (?!.*\breferences\b)", re.IGNORECASE)
    if any(kind == "view" for kind, *_ in wanted - found):
        drops = "".join(f"drop view if exists {name}; " for name in re.findall(r"create view (\w+)", VIEWS))
        renewal = f"begin immediate; {drops}{VIEWS} commit;"
        connection.executescript(renewal)
    added = {one for one in found - wanted if not harmless.match(one[2])}
    if changed := sorted(added | {one for one in wanted - found if one[0] != "view"}):
        kind, name, _ = changed[0]
        raise DatabaseError(f"another program has changed the {kind} {name[:40]} of {path}", DAMAGE_HINT)


def quarantine_stale_wal(path: Path) -> None:
    """Rename a WAL that was left by a killed process: it would be replayed into a restored backup. To be called before
    this process opens the database, because it closes the file."""
    # The header of a backup says that it has no WAL (https://sqlite.org/fileformat2.html, 1.3.3). Processes check one
    # after the other, the header last: one that has checked changes the header before it makes a WAL of its own.
    wal = path.with_name(f"{path.name}-wal")
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if wal.exists() and file.read(20)[18:] == b"\x01\x01":
            wal.rename(f"{wal}.{int(wal.stat().st_mtime)}")


class RunnerLock:
    """Only one process may work on a database. The kernel frees the lock when its holder dies."""

    def __init__(self, database_path: Path) -> None:
        self.path = database_path.with_name(database_path.name + ".lock")
        self._file: TextIO | None = None

    def holder(self) -> int | None:
        """The process id of the living holder, or None; 0 when it is unknown."""
        with contextlib.suppress(FileNotFoundError), self.path.open(encoding="ascii", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                return int(text) if text.isdigit() else 0
        return None

    def acquire(self) -> None:
        """Take the lock for the life of this process. Raises LockedError, and OSError when it cannot be opened."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        file = os.fdopen(descriptor, "r+", encoding="ascii", errors="replace")
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if (holder := self.holder()) is not None:  # else another process looked for the holder just now
                file.close()
                text = f"another runner works on this database (process {holder or 'unknown'})"
                raise LockedError(text, "look at it with: adce.py status")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back."""
        if self._file:
            self._file.close()
            self._file = None


def back_up(path: Path, copy: Path) -> None:
    """Copy the database at `path`, as of one moment, into a new file: whole, checked and on the disk, or not at all.
    Raises DatabaseError, also when `copy` exists."""
    if copy.exists() or copy.is_symlink():
        raise DatabaseError(f"{copy} exists already", "name a new file; nothing was written")
    try:
        with _translation(f"cannot copy {path}"), _new_file(copy) as draft:
            with contextlib.closing(_connect(path)) as source:
                source.execute("vacuum into ?", (str(draft),))
            with contextlib.closing(_connect(draft)) as made:
                made.execute("update facts set is_backup = 1")
                if made.execute("pragma integrity_check").fetchone()[0] != "ok":
                    raise DatabaseError(f"the copy of {path} is damaged", "adce.py check")
    except OSError as error:
        raise DatabaseError(f"cannot write {copy}: {error.strerror}", "name another file") from error


# ---------------------------------------------------------------- Values
# Texts with fields in them (keys, urls, words of commands), JMESPath over the bodies of objects, the kinds of values
# in adce.yaml, and how the field of a record declares a key. Headlines: Template, search(), holds(), Kind, setting().

Fields = Mapping[str, str]  # the values of a partition by name; dates as 2024-12-15

FIELD = r"\{([a-z_][a-z0-9_]*)([+-]\d{1,3}[hdwmy])?"  # its name, and for a date what is added
FIELD_IN_TEXT = re.compile(FIELD + r"(?::([^{}]+))?\}")
DIGITS = r"0[1-9]\d?"  # the form of a number: so many digits at least
FIELD_IN_EXPRESSION = re.compile(FIELD + rf"(?::((?:%-?[A-Za-z]|[-_./ ])+|{DIGITS}|json))?\}}")
SPLIT = functools.cache(re.Pattern[str].split)
IN_URLS = "!#%&'()*+,/:;=?@[]"  # beside letters, digits and -._~ (RFC 3986); $ would begin the name of a variable


@dataclass(frozen=True, slots=True)
class Template:
    """Text with {field}, {date:%Y%m%d}, {date+1d:%Y%m%d}, {field:010}, {field:path}, {field:url} or {field:json}."""

    text: str
    pattern: re.Pattern[str] = FIELD_IN_TEXT

    def shape(self) -> str:
        """The text with every field blanked: templates of one shape may produce the same text."""
        return self.pattern.sub("{}", self.text)

    def render(self, fields: Fields, quote: Callable[[str], str]) -> str:
        """The text with every field replaced by its quoted value; the slashes of a date's format and of a path stay. A
        part of a url is quoted already, but for what can be in no url."""
        words = list(SPLIT(self.pattern, self.text))  # text, field, shift, format, text, field, shift, format, text
        for place in range(1, len(words), 4):
            name, shift, form = words[place : place + 3]
            if (value := fields.get(name)) is None:
                raise DatabaseError(f"an object in the database has no {name} among its fields", DAMAGE_HINT)
            parts, quoted = [value], quote
            if form == "url":
                quoted = functools.partial(urllib.parse.quote, safe=IN_URLS)
            elif form == "path":
                parts = value.split("/")
            elif form == "json":
                quoted = lambda text: json.dumps(text) if text else "null"  # noqa: E731
            elif re.fullmatch(DIGITS, form or ""):
                parts = [value.lstrip("0").zfill(int(form))]
            elif form or shift:
                parts = _format_date(value, shift or "", form or "%Y-%m-%d")
            words[place : place + 3] = "/".join(map(quoted, parts)), "", ""
        return "".join(words)


STEPS = {"hour": "1h", "day": "1d", "week": "1w", "month": "1m", "quarter": "3m", "year": "12m"}  # of a date, as shifts


def shifted(moment: datetime.datetime, shift: str) -> datetime.datetime:
    """A moment and so many hours, days, weeks, months or years. The day is at most the last of its month."""
    count, unit = int(shift[:-1]), shift[-1]
    if hours := {"h": 1, "d": 24, "w": 168}.get(unit):
        return moment + datetime.timedelta(hours=hours * count)
    year, month = divmod(moment.year * 12 + moment.month - 1 + count * {"m": 1, "y": 12}[unit], 12)
    return moment.replace(year, month + 1, min(moment.day, calendar.monthrange(year, month + 1)[1]))


@functools.lru_cache(4096)  # a date is a part of many keys
def _format_date(date: str, shift: str, form: str) -> list[str]:
    moment = datetime.datetime.fromisoformat(date)
    moment = shifted(moment, shift) if shift else moment
    return moment.strftime(form.replace("%q", str((moment.month + 2) // 3))).split("/")


UNSENDABLE = re.compile(r"^\s|[^\t -~\x80-\xff]")  # in the value of a header
VARIABLE = re.compile(r"\$(?:\{([A-Z_][A-Z0-9_]*)\}|([A-Z_][A-Z0-9_]*))")  # capitals: $id is GraphQL's


def variables_in(*texts: str) -> set[str]:
    """The variables of the environment that some texts name."""
    return {match[1] or match[2] for text in texts for match in VARIABLE.finditer(text)}


def from_environment(text: str, known: Container[str] | None = None) -> str:
    """A text with the values of its variables, or of the `known` ones. Raises Error when one is not there."""
    names = {name for name in variables_in(text) if known is None or name in known}
    if missing := sorted(names - os.environ.keys()):
        raise Error(f"${missing[0]} is not in the environment")
    value = lambda match: os.environ[name].strip() if (name := match[1] or match[2]) in names else match[0]  # noqa: E731
    return VARIABLE.sub(value, text)


LITERAL = re.compile(r"""('(?:[^'\\]|\\.)*'|`(?:[^`\\]|\\.)*`|"(?:[^"\\]|\\.)*")""", re.DOTALL)  # of JMESPath


def quote_for_expression(literal: str, value: str) -> str:
    """A value as a part of a literal of JMESPath, or of none. Raises ValueError for what that cannot hold."""
    mark, escaped = literal[:1], json.dumps(value)
    if mark == '"':
        return escaped[1:-1]
    if mark == "`":  # JSON: a number, or a text, which has quotes already if there is more in it
        is_whole = not re.search(r'[\w"]', FIELD_IN_EXPRESSION.sub("", literal))
        is_number = is_whole and re.fullmatch(r"-?(0|[1-9]\d{0,99})(\.\d{1,99})?", value)
        return value if is_number else (escaped if is_whole else escaped[1:-1]).replace("`", "\\`")
    # a backslash would quote what ends the string
    if re.search(r"(?<!\\)\\(\\\\)*('|\Z)", value) or (not mark and not re.fullmatch(r"-?\w+", value)):
        raise ValueError(f"{value!r} cannot be compared")
    return value.replace("'", "\\'")


@functools.lru_cache(maxsize=1024)
def _compile(expression: str) -> Any:
    """A JMESPath expression in which `!a.b` means not a.b. By the grammar it is (!a).b, which is always null."""
    import jmespath.parser

    parser = jmespath.parser.Parser()
    powers = {**parser.BINDING_POWER, "not": parser.BINDING_POWER["dot"] - 1}
    vars(parser).update(BINDING_POWER=powers, _CACHE={})  # the cache of the class is for its own grammar
    return parser.parse(expression)


@functools.cache
def _functions() -> Any:
    """The functions of JMESPath, and zip(a, b): rows of columns, for sources that send one array for each column."""
    import jmespath.functions

    class Functions(jmespath.functions.Functions):  # type: ignore[misc]
        @jmespath.functions.signature(*[{"types": ["array"], "variadic": True}] * 2)  # type: ignore[untyped-decorator]
        def _func_zip(self, *columns: Sequence[Any]) -> list[list[Any]]:
            return [list(row) for row in zip(*columns, strict=False)]

    return Functions()


def search(expression: str, fields: Fields, document: Any) -> Any:
    """The value of a JMESPath expression that may name fields; None where a function is given null. Raises ValueError
    when it cannot be evaluated."""
    import jmespath.exceptions

    try:
        for place, part in enumerate(parts := list(SPLIT(LITERAL, expression))):
            quote = functools.partial(quote_for_expression, part if place % 2 else "")
            parts[place] = Template(part, FIELD_IN_EXPRESSION).render(fields, quote)
        return _compile("".join(parts)).search(document, jmespath.Options(custom_functions=_functions()))
    except jmespath.exceptions.JMESPathTypeError as error:
        if error.current_value is None:
            return None
        needed = " or ".join(error.expected_types)
        raise ValueError(f"{error.function_name}() needs {needed}, has {error.actual_type}: {expression}") from None
    except (jmespath.exceptions.JMESPathError, TypeError, RecursionError) as error:
        raise ValueError(f"{error}: {expression}") from None


def holds(expression: str, fields: Fields, document: Any) -> bool:
    """Whether an expression is true: neither false, null nor empty. 0 is true, an expression that raises is not."""
    try:
        value = search(expression, fields, document)
    except ValueError:
        return False
    return value is not None and value is not False and value not in ("", [], {})


MOST = 10**12  # of any number: no unit makes it too large for SQLite or a clock
NEEDED = dataclasses.MISSING  # the default of a required key, and the value of a node that is not of its kind


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A kind of single values, checked by its JSON Schema. Text with a pattern needs no quotes."""

    expected: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    make: Callable[[Any], Any] = lambda value: value  # of a text, a number, or the keys and nodes of a mapping
    fields: re.Pattern[str] | None = None  # how it names {fields}, if it may

    def convert(self, node: Any) -> Any:
        """The value of a YAML node. Raises ConfigurationError with a message, or an error of the conversion."""
        rule, tag, value = self.schema, tag_of(node), node.value
        is_good: object
        if "pattern" in rule or "enum" in rule:
            is_good = tag != "null" and re.fullmatch(rule.get("pattern") or "|".join(rule["enum"]), value)
        elif rule["type"] in ("integer", "number"):
            form = r"[-+]?(0|[1-9]\d{0,14})" + r"(\.\d+)?" * (rule["type"] == "number")  # more digits overflow a float
            is_good = tag in ("int", "float") and re.fullmatch(form, value)
            value = float(value) if "." in value else int(value)
            if is_good and abs(value) > MOST:
                raise ConfigurationError(f"{node.value} is beyond {MOST:,}")
            is_good = is_good and rule.get("minimum", value) <= value <= rule.get("maximum", value)
            is_good = is_good and value > rule.get("exclusiveMinimum", -math.inf)
        elif tag == "mapping":
            is_good, value = "object" in rule["type"], [(key.value, part) for key, part in value]
        else:
            is_good = tag == ("bool" if rule["type"] == "boolean" else "str")
            if rule["type"] != "boolean" and tag in ("bool", "int", "float", "timestamp"):
                import yaml

                read = json.dumps(yaml.safe_load(value), default=str)
                if tag != "bool" or read != value:  # else another kind of value is meant
                    raise ConfigurationError(f'{value} is read as {read}; write "{value}"')
        if not is_good:
            raise ValueError(value)
        return self.make(value)


def tag_of(node: Any) -> str:
    """The YAML type of a node: str, int, float, bool, null, timestamp, sequence or mapping."""
    return cast(str, node.tag.rpartition(":")[2] if node.id == "scalar" else node.id)


def _expression(text: str) -> str:
    import jmespath.exceptions

    try:
        _compile(FIELD_IN_EXPRESSION.sub("x", text))
    except (jmespath.exceptions.JMESPathError, ValueError) as error:
        column = getattr(error, "lex_position", None)
        where = f" at its character {column + 1}" if column is not None and column >= 0 else ""
        raise ConfigurationError(f"not a JMESPath expression{where}: {text}") from None
    known = _functions().FUNCTION_TABLE
    if unknown := sorted({*re.findall(r"(\w+)\(", LITERAL.sub("", text))} - known.keys()):
        raise ConfigurationError(f"JMESPath has no function {unknown[0]}(){suggest(unknown[0], known)}")
    if quoted := re.search(r'[=<>]\s*"([^"]+)"', LITERAL.sub(lambda one: one[0] if one[0][0] == '"' else "", text)):
        raise ConfigurationError(f"\"{quoted[1]}\" is the name of a field; a text has single quotes: '{quoted[1]}'")
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigurationError(f"not a regular expression: {error}") from None
    return text


def _regex(text: str) -> str:
    pattern = re.compile(_pattern(text))
    if pattern.groups != (len(pattern.groupindex) or 1):
        raise ConfigurationError(f"needs one group ( ) for the id, or named ones, has {pattern.groups}")
    return text


def _next_page(text: str) -> str:
    try:
        return text if text == LINK else _expression(text)
    except ConfigurationError as error:
        if not str(error).startswith("not a JMESPath") or re.search(r"^(length|join|contains)\(|\s[=!<>]=\s", text):
            raise
        with contextlib.suppress(re.error):
            if re.compile(text).groups == 1:
                return text
        raise ConfigurationError(f"{error}, and no regular expression with one group ( )") from None


def _day(text: str) -> str | datetime.date:
    try:
        return text if text in LAST_DAYS else datetime.date.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(f"{text} is not a calendar date") from None


def _available(given: str | list[tuple[str, Any]]) -> datetime.time | int:
    if isinstance(given, str):
        return datetime.time.fromisoformat(given)
    ((name, node),) = given
    if name != "hours":
        raise ValueError(name)
    hours: float = Kind("hours", {"type": "number", "minimum": 0}).convert(node)
    return round(hours * HOUR)


def _like(pattern: str) -> Mapping[str, Any]:
    return {"type": "string", "pattern": f"^({pattern})$"}


def _address(text: str) -> str:
    if urllib.parse.urlsplit(text).port == 0:  # raises ValueError for what is no host or port
        raise ValueError(text)
    return text.rstrip("/")


def _lake(text: str) -> str:
    try:
        return text if "://" in text else str(Path(text).expanduser())
    except RuntimeError:
        raise ConfigurationError(f"there is no user {text.partition('/')[0]}") from None


def _duration(text: str) -> int | None:
    return None if text == "never" else parse_duration(text)


WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
BUCKET_OR_FOLDER = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?|(?![sS]3:)((?!://)[^\x00-\x1f\x7f])+"
# any date of these years can be shifted by as much as a text may say
DATE_FORM, DURATION_FORM = r"[12]\d{3}-\d\d-\d\d", r"\s*\d*[1-9]\d*\s*[smhd]\s*"
ADDRESS_FORM = r"(https?://[^/\s?#]+|\$\{?[A-Z_][A-Z0-9_]*\}?)[^\s?#]*"
DURATION_WORDS = "a duration like 90s, 15m, 6h or 1d"

Text = Annotated[str, Kind("text")]
File = Annotated[Path, Kind("the path of a file", _like(r"[^\x00-\x1f\x7f]+"), Path)]
Lake = Annotated[str, Kind("a folder or s3://bucket/prefix", _like(BUCKET_OR_FOLDER), _lake)]
Address = Annotated[str, Kind("an http or https address", _like(ADDRESS_FORM), _address)]
Header = Annotated[str, Kind("plain ASCII text", _like(r"[\x20-\x7e]*"))]
FieldText = Annotated[Template, Kind("text with {fields}", make=Template, fields=FIELD_IN_TEXT)]
SearchText = Annotated[str, Kind("text", fields=FIELD_IN_EXPRESSION)]
Expression = Annotated[str, Kind("a JMESPath expression", make=_expression, fields=FIELD_IN_EXPRESSION)]
Pattern = Annotated[str, Kind("a regular expression", make=_pattern)]
Regex = Annotated[str, Kind("a regular expression with one group, or named ones", make=_regex)]
LINK = "link"  # the header Link (RFC 8288)
NextPage = Annotated[str, Kind("link, a JMESPath expression or a regular expression with one group", make=_next_page)]
Timezone = Annotated[str, Kind("a time zone like America/New_York", make=lambda text: zoneinfo.ZoneInfo(text).key)]
FieldName = Annotated[str, Kind("a lowercase name", _like("[a-z_][a-z0-9_]*"))]
Callee = Annotated[str, Kind("module:function", _like(r"[\w.]+:\w+"))]
Hex = Annotated[str, Kind("bytes in hexadecimal", _like(r"\s*([0-9A-Fa-f]{2}\s*)+"))]
Date = Annotated[datetime.date, Kind("a date like 2024-10-22", _like(DATE_FORM), _day)]
LAST_DAYS = ("yesterday", "today", "now")
LastDay = Annotated[
    str | datetime.date,
    Kind("yesterday, today, now or a date like 2024-10-22", _like("|".join([*LAST_DAYS, DATE_FORM])), _day),
]
Step = Annotated[str, Kind("hour, day, week, month, quarter or year", {"enum": [*STEPS]})]
Weekday = Annotated[str, Kind("mon, tue, wed, thu, fri, sat or sun", {"enum": [*WEEKDAYS]})]
Interval = Annotated[int, Kind(DURATION_WORDS, _like(DURATION_FORM), _duration)]
Duration = Annotated[int | None, Kind(f"{DURATION_WORDS} (or never)", _like(f"never|{DURATION_FORM}"), _duration)]
Number = Annotated[float, Kind("a number", {"type": "number"})]
Positive = Annotated[float, Kind("a number above 0", {"type": "number", "exclusiveMinimum": 0})]
Percent = Annotated[float, Kind("a number from 0 to 100", {"type": "number", "minimum": 0, "maximum": 100})]
Count = Annotated[int, Kind("a whole number of 1 or more", {"type": "integer", "minimum": 1})]
Amount = Annotated[int, Kind("a whole number of 0 or more", {"type": "integer", "minimum": 0})]
Several = Annotated[int, Kind("a whole number of 2 or more", {"type": "integer", "minimum": 2})]
Port = Annotated[int, Kind("a port from 0 to 65535", {"type": "integer", "minimum": 0, "maximum": 65535})]
Status = Annotated[int, Kind("an HTTP status", {"type": "integer", "minimum": 100, "maximum": 599})]
Urgency = Annotated[str, Kind("auto, CRITICAL, HIGH, MEDIUM or LOW", {"enum": ["auto", *Priority]})]
Method = Annotated[str, Kind("GET or POST", {"enum": ["GET", "POST"]})]
Scheduler = Annotated[str, Kind("tcp://HOST:PORT or tls://HOST:PORT", _like(r"(tcp|tls)://[^\s/]+:\d+"))]
Output = Annotated[str, Kind("store or stdout", {"enum": ["store", "stdout"]})]
Switch = Annotated[bool, Kind("true or false", {"type": "boolean"}, lambda text: text.lower() in ("true", "yes", "on"))]
# a time of its day, or so many seconds after its end
Available = Annotated[datetime.time | int, Kind('"HH:MM" or {hours: N}', {"type": ["string", "object"]}, _available)]


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a block."""

    name: str
    meaning: str
    default: Any = NEEDED  # as in adce.yaml
    beside: tuple[str, ...] = ()  # it has an effect only beside one of these keys,
    against: tuple[str, ...] = ()  # and none beside any of these
    instead: str = ""  # of it where it has none
    needs: str = ""  # and none on objects without this field
    unit: int = 1  # the record has the value in a unit that is so much smaller
    attribute: str = ""  # of the record
    declared: Any = None  # the annotation of the field


def setting(meaning: str, default: Any = NEEDED, **more: Any) -> Any:
    """A field of a record that a key of adce.yaml sets. Its annotation says which values it takes; `more` is as in
    Setting, with a `name` when the key has another one than the field."""
    one = Setting(more.pop("name", ""), meaning, default, **more)
    if isinstance(default, dict):
        return field(default_factory=default.copy, hash=False, metadata={"setting": one})
    return field(default=default * one.unit if one.unit > 1 else default, metadata={"setting": one})


@functools.cache
def settings_of(record: type) -> Mapping[str, Setting]:
    """The keys of a block by name."""
    found, annotations = {}, typing.get_type_hints(record, include_extras=True)
    for part in dataclasses.fields(record):
        if one := part.metadata.get("setting"):
            name = one.name or part.name
            found[name] = dataclasses.replace(one, name=name, attribute=part.name, declared=annotations[part.name])
    return found


ONE_OR_MORE = object()  # marks a list in whose place a single item may stand


@functools.cache
def shape_of(declared: Any) -> tuple[str, Any, Any]:
    """The shape that an annotation declares: a block, list, mapping or value; the names in a mapping, or ONE_OR_MORE of
    a list; and the record, item or Kind. A field that is converted after reading is Annotated with its form in YAML."""
    while typing.get_origin(declared) in (types.UnionType, typing.Union):
        declared = typing.get_args(declared)[0]  # the other one is None
    if dataclasses.is_dataclass(declared):
        return "block", None, declared
    if typing.get_origin(declared) is Annotated:
        (inner,) = declared.__metadata__
        if inner is ONE_OR_MORE:
            shape, _, item = shape_of(declared.__origin__)
            return shape, inner, item
        return ("value", None, inner) if isinstance(inner, Kind) else shape_of(inner)
    parts = typing.get_args(declared)
    return ("list", None, parts[0]) if typing.get_origin(declared) is tuple else ("mapping", *parts)


def suggest(word: str, known: Iterable[str]) -> str:
    """`, did you mean "x"?`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f', did you mean "{near[0]}"?' if near else ""


# ---------------------------------------------------------------- Settings
# Everything that may stand in adce.yaml: a record for each block, a field for each key with its kind, its meaning
# and its default. Here are seasons, limits, weights and sources. Headlines: Season, RateLimiting, Source.

DEFAULT_NAME, DEFAULT_DATABASE = "adce.yaml", "adce.db"


@dataclass(frozen=True, slots=True)
class Season:
    """A span of days with a name."""

    label: Text = setting("its name, such as 2024-25")
    end: Count = setting("the year in which it ends")
    start: Date = setting("its first day")
    finish: Date = setting("its last day")
    calendar: str = ""  # its name, where there are several

    def over(self) -> int:
        """The instant at which it is over."""
        return instant_of(self.finish + datetime.timedelta(days=1), datetime.time(), "UTC")


def chosen(seasons: Iterable[Season], names: Sequence[str]) -> list[Season]:
    """Those that are named: by `all`, by their calendar or by their labels."""
    return [one for one in seasons if not {"all", one.calendar, one.label}.isdisjoint(names)]


Names = Annotated[tuple[Text, ...], ONE_OR_MORE]


class WindowLimit(NamedTuple):
    """At most max_requests in any `seconds`."""

    max_requests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ScopeLimits:
    """The limits of a source, or of all sources together, as the limiter uses them."""

    windows: tuple[WindowLimit, ...] = ()  # min_delay_seconds is the window "1 in that many seconds"
    burst_size: int | None = None
    refill_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a source, or of all sources together, as adce.yaml declares them."""

    requests_per_second: Count | None = setting("maximum requests in any second", None)
    requests_per_minute: Count | None = setting("maximum requests in any 60 seconds", None)
    requests_per_hour: Count | None = setting("maximum requests in any 60 minutes", None)
    requests_per_day: Count | None = setting("maximum requests in any 24 hours", None)
    burst_size: Count | None = setting("maximum requests in a burst; refilled at the rate of the minute limit", None)
    min_delay_seconds: Positive | None = setting("minimum delay between two requests", None)

    def scope(self) -> ScopeLimits:
        """The windows, and the rate of the bucket: that of the limit a minute, else of the shortest."""
        counts = (self.requests_per_second, self.requests_per_minute, self.requests_per_hour, self.requests_per_day)
        spans = {float(span): n for span, n in zip((1, MINUTE, HOUR, DAY), counts, strict=True) if n}
        span = MINUTE if MINUTE in spans else min(spans, default=1)
        delay = {float(self.min_delay_seconds): 1} if self.min_delay_seconds else {}
        windows = tuple(WindowLimit(n, seconds) for seconds, n in sorted((spans | delay).items()))
        return ScopeLimits(windows, self.burst_size, spans.get(span, 0) / span)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays between requests when a window is nearly full."""

    threshold_percent: Percent = setting("share of a window from which delays grow", 80)
    initial_delay_seconds: Number = setting("the first delay", 1)
    max_delay_seconds: Number = setting("the longest delay", 30)
    exponential_factor: Positive = setting("growth of each further delay", 2)
    strict: Switch = setting("exact delays, at the price of 10 to 20% of the quota", False)


@dataclass(frozen=True, slots=True)
class RateLimiting:
    """Rate limits of all sources."""

    enabled: Switch = setting("false: no limits; pauses still hold", True)
    scopes: Mapping[str, ScopeLimits] = field(default_factory=dict)  # by source, and `global`
    backoff: Backoff | None = setting("delays before a window is full", None)
    global_limits: Limits = setting("limits of all sources together", Limits())
    source_limits: Mapping[str, Limits] = setting("limits by source", {})

    def limits(self, source: str) -> bool:
        """Whether any window limits a source."""
        return any(self.scopes[name].windows for name in (source, "global") if name in self.scopes)


@dataclass(frozen=True, slots=True)
class PriorityWeighting:
    """Weights of the score, which orders the queue."""

    enabled: Switch = setting("false: by priority alone, oldest first", True)
    base_scores: Annotated[Mapping[str, float], Mapping[Priority, Number]] = setting(
        "points by priority", {"CRITICAL": 1000, "HIGH": 100, "MEDIUM": 10, "LOW": 1}
    )
    age_weight: Number = setting("points an hour since the gap was found", 0.5)
    source_multipliers: Mapping[str, Number] = setting("factors for base score and age by source; default 1", {})
    gap_size_weight: Number = setting("points for each object of the task", -0.1)
    max_gap_size_penalty: Number = setting("maximum points deducted for gap size", 10)
    success_rate_weight: Number = setting("points at a success rate of 100%", 20)
    critical_within_days: Count = setting("age up to which `priority: auto` means CRITICAL", 7)


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """The HTTP server of the runner."""

    enabled: Switch = setting("serve status and metrics on 127.0.0.1", True)
    port: Port = setting("TCP port; 0 for any free one", 8080)


@dataclass(frozen=True, slots=True)
class Alerts:
    """Alert channels. An address may be $NAME, a variable of the environment."""

    webhook: Text | None = setting("URL of a Slack-compatible webhook, or $NAME", None)
    sns_topic: Text | None = setting("ARN of an SNS topic, or $NAME", None)
    command: tuple[Text, ...] = setting("program to run; subject and text become its last arguments", ())
    ping: Text | None = setting("URL requested after each good cycle, or $NAME", None)
    cloudwatch: Text | None = setting("CloudWatch namespace for the figures of each cycle", None)


@dataclass(frozen=True, slots=True)
class Retry:
    """Retries of a failed task."""

    max_attempts: Count = setting("failures after which a task gives up", 5)
    initial_delay_seconds: Positive = setting("delay after the first failure, doubled after each further one", 60)
    max_delay_seconds: Positive = setting("the longest delay", 21600)

    def crash_limit(self) -> int:
        """Crashes of runners after which a task gets one more attempt, alone."""
        return max(1, self.max_attempts - 1)


@dataclass(frozen=True, slots=True)
class BlockedWhen:
    """Signs that a source blocks its clients, and the length of the pause."""

    status: tuple[Status, ...] = setting("HTTP statuses that mean a block, from the second object in a row on", ())
    body: Pattern | None = setting("regular expression in the first MiB of a body that means a block", None)
    timeouts_in_a_row: Count = setting("consecutive timeouts that mean a block", 3)
    failures_in_a_row: Count = setting("consecutive 5xx responses or scraper failures that mean a block", 10)
    pause_seconds: Positive = setting("length of the pause, in seconds", 900)


@dataclass(frozen=True, slots=True)
class Source:
    """An upstream with limits of its own."""

    name: str
    base_url: Address = setting("prefix of the `url` of each dataset; $NAME is a variable of the environment", "")
    headers: Mapping[str, Header] = setting("request headers, with $NAME; another host gets harmless ones", {})
    timeout_seconds: Positive = setting("limit for a whole request, body included", 30)
    max_concurrent: Count = setting("maximum workers on this source", 5)
    error_when: Expression | None = setting("condition on a body that makes it an error, whatever the status", None)
    blocked_when: BlockedWhen = setting("signs of a block, and the pause that follows", BlockedWhen())
    trust_env: Switch = setting("use proxies, netrc and certificates of the environment", False)
    known_hosts: frozenset[str] = frozenset()  # of all sources: a redirect may lead there


def find_configuration(given: str | None) -> Path:
    """Which file: the given one, $ADCE_CONFIG, adce.yaml here, else the one beside this module."""
    if chosen := given or os.environ.get("ADCE_CONFIG"):
        return Path(chosen).absolute()
    here = Path(DEFAULT_NAME).absolute()
    return here if here.exists() else Path(__file__).resolve().with_name(DEFAULT_NAME)


def _members(node: Any, given: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The members of the objects that come out of a part of an expression, of those that come in."""
    kind, parts = node["type"], node["children"]
    if kind == "multi_select_dict":
        return tuple(pair["value"] for pair in parts)
    if kind in ("identity", "current", "index", "slice"):
        return given
    if kind in ("or_expression", "and_expression", "multi_select_list", "function_expression"):
        return next((found for part in parts if (found := _members(part, given))), ())
    for part in parts[:2]:  # the third of a filter is its condition
        given = _members(part, given)
    return given if parts else ()


@functools.cache
def names_in_result(expression: str) -> tuple[str, ...]:
    """The members of the objects that a JMESPath expression makes, such as `games[].{home: h, away: a}`."""
    return _members(_compile(FIELD_IN_EXPRESSION.sub("x", expression)).parsed)


# ---------------------------------------------------------------- Datasets
# The records of what a lake consists of, and of the file as a whole. A key is added to its block's record, what must
# hold between it and others in problems_in(), and to reading_rules() when contents must be read again after its change.
# Headlines: Partitions, Pages, Dataset, Configuration, problems_in().

STAGING = ".adce"  # the folder of a folder store where objects are written before they are whole
NamedValues = Mapping[str, tuple[Text, ...]]
Problems = Iterator[tuple[str, str]]  # the path of a key, and what is wrong with it


@dataclass(frozen=True, slots=True)
class Dates:
    """One object a step: those of all seasons, or of a range. `date` is the first day of a step, or its hour."""

    ONE_OF: ClassVar = (("", ("seasons", "from")),)
    seasons: Names = setting("the days of seasons: all, the name of a calendar, or labels", ())
    first: Date | None = setting("first day of a range", None, name="from")
    last: LastDay = setting("last day; now: up to this hour", "yesterday", name="to")
    every: Step = setting("length of a step", "day")
    timezone: Timezone = setting("time zone of the days", "UTC")
    weekdays: tuple[Weekday, ...] = setting("only the steps that begin on these days", ())
    excluded: tuple[Date, ...] = setting("days without steps", (), name="except")


@dataclass(frozen=True, slots=True)
class Partitions:
    """The partitions of a dataset, one object each: all combinations of dates, seasons, values and ids of a parent."""

    BASES: ClassVar = ("dates", "seasons", "values", "from")
    ANY_OF: ClassVar = (*BASES, "same_as")
    ONE_OF: ClassVar = (("from", ("ids", "regex")),)
    dates: Dates | None = setting("one object a step of time", None)
    seasons: Names = setting("one object for each that has begun: all, the name of a calendar, or labels", ())
    values: NamedValues = setting("one object for each combination of field values", {})
    parents: Names = setting("one object for each id in the objects of a parent dataset, or several", (), name="from")
    ids: Expression | None = setting("ids in JSON, or objects of fields; {field}: the parent's", None, beside=("from",))
    regex: Regex | None = setting("ids, or fields by named groups, in text; HTML is unescaped", None, beside=("from",))
    id_field: FieldName = setting(
        "field of an id", "", name="as", beside=("from",), instead="{season} is a label, {end} the year of its end"
    )
    same_as: Text | None = setting("use the partitions of this dataset", None, against=BASES)

    def id_fields(self) -> tuple[str, ...]:
        """The fields that an id of the parent sets: the one named by `as`, or several."""
        if self.id_field or not self.parents:
            return (self.id_field,) if self.id_field else ()
        return tuple(re.compile(self.regex).groupindex) if self.regex else names_in_result(self.ids or "x")

    def own_fields(self) -> tuple[str, ...]:
        """The fields whose values distinguish its objects."""
        own = ["date"] * bool(self.dates) + ["season"] * bool(self.seasons) + [*self.id_fields()]
        return (*own, *self.values)


PAGES = "pages"  # in place of an expression
PAGE_FIELDS = ("page", "next")  # the number of a page from 1, and what the page before it says of it
OFFSET = "offset"  # a field of requests alone: the items before a page, or without their number the pages
NAMED_BY = "named by"  # no name of a field: a digest of the page before it
FIRST_PAGE: Fields = types.MappingProxyType(dict(zip(PAGE_FIELDS, ("1", ""), strict=True)))


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of an answer, one object each. A page names the next one, or the first says how many there are."""

    ONE_OF: ClassVar = (("", ("next", "last")),)
    next: NextPage | None = setting(
        "link, the header; else finds a url or {next}; beside {page} or {offset} in `url`, any true value", None
    )
    last: Expression | None = setting("number of the last page, or with `size` of the items", None)
    size: Count | None = setting("items on a page: {offset} are those before it; without it, the pages before it", None)
    url: FieldText | None = setting("URL of each page after the first", None, beside=("next",))
    most: Count = setting("pages that are followed; more are reported", 10_000)

    def is_expression(self) -> bool:
        """Whether the next page is found in JSON, not by the header or a regular expression."""
        with contextlib.suppress(ConfigurationError):
            return self.next != LINK and bool(_expression(self.next or self.last or ""))
        return False


@dataclass(frozen=True, slots=True)
class Live:
    """An object that changes all the time for a while, such as a day with games in progress."""

    expression: Expression = setting("condition on the body of an object in progress", name="while")
    every: Interval = setting("refetch interval while the condition holds")


@dataclass(frozen=True, slots=True)
class Freshness:
    """Refetch rules of objects in the store. Durations in seconds; None is never."""

    refetch_every: Duration = setting("maximum age; with `until`, the interval until it holds (1h)", None)
    until: Expression | None = setting("condition on the body that makes an object final", None)
    refetch_once_after: Annotated[tuple[Interval, ...], ONE_OR_MORE] = setting(
        "one refetch each, this long after its day ends, also of a final object", ()
    )
    current: Duration = setting("maximum age during its season", None, against=("until",), needs="season")
    past: Duration = setting("maximum age after its season", None, against=("until",), needs="season")
    live: Live | None = setting("short intervals while an object changes", None)


@dataclass(frozen=True, slots=True)
class Validation:
    """Rules that a body must pass. JMESPath expressions may name fields."""

    json: Switch = setting("the body must be JSON", False)
    min_bytes: Count = setting("minimum size", 1)
    max_bytes: Count | None = setting("maximum size; 64 MiB of what is parsed, else 256 MiB", None)
    is_parsed: bool = False  # as JSON, or by a regular expression
    require: tuple[Expression, ...] = setting("conditions, all of which must hold: not null, false or empty", ())
    contains: tuple[SearchText, ...] = setting("texts that must be in the body; {field} is allowed", ())
    not_contains: tuple[SearchText, ...] = setting("texts that must not be in the body; {field} is allowed", ())
    starts_with_hex: Hex = setting("first bytes of the body", "")
    ends_with_hex: Hex = setting("last bytes of the body", "")
    gzip: Switch = setting("the body must be gzip, whole to its end", False)
    sha256: SearchText = setting("SHA-256 of the body in hexadecimal, such as a {field} of its parent", "")
    md5: SearchText = setting("MD5 of the body in hexadecimal", "")

    def most(self) -> int:
        """The maximum size in bytes."""
        return self.max_bytes or (64 if self.is_parsed or self.json or self.require else 256) << 20

    def needs_content(self) -> bool:
        """Whether a size alone cannot settle it."""
        texts = [*self.require, *self.contains, *self.not_contains, self.sha256, self.md5]
        return self.json or self.gzip or any([*texts, self.starts_with_hex, self.ends_with_hex])


def fields_in(*texts: str) -> set[str]:
    """The fields that some texts name."""
    return {match[1] for text in texts for match in FIELD_IN_TEXT.finditer(text)}


@dataclass(frozen=True, slots=True)
class Batch:
    """Objects that one command fetches together: they share the field `group_by`."""

    group_by: Text = setting("the field that the objects of a batch share")
    max: Several = setting("maximum objects of a batch", 50)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A family of objects of one source."""

    ONE_OF: ClassVar = (("", ("url", "command", "call", "copy_of")),)
    ANY_OF: ClassVar = ("partitions", "copy_of")
    PROGRAM: ClassVar = ("command", "call")
    name: str
    source: Text = setting("name of the source")
    key: FieldText = setting("name of an object in the store; it names each field of the partitions")
    partitions: Partitions = setting("the objects of the dataset; those of the original of a copy", Partitions())
    url: FieldText | None = setting("URL of a request, relative to base_url; {field:url} is encoded already", None)
    method: Method = setting("GET or POST", "GET", beside=("url",))
    headers: Mapping[str, Header] = setting("request headers besides those of the source", {}, beside=("url",))
    body: SearchText = setting("body of a POST, with fields; its type is JSON or that of a form", "", beside=("url",))
    command: tuple[FieldText, ...] = setting("program that fetches objects", ())
    call: Callee | None = setting("Python function that fetches an object", None)
    copy_of: Text | None = setting("dataset whose stored objects are copied, without a request", None)
    original: Template | None = None  # the key of what is copied
    calendar: tuple[Season, ...] = ()  # of its days
    dates: Dates = Dates()  # its own, or those of its next parent with dates
    secrets: frozenset[str] = field(default=frozenset(), repr=False)  # variables of its requests, and plain secrets
    pages: Pages | None = setting("pages of an answer, each an object with {page} in its key", None, beside=("url",))
    output: Output = setting("store: it writes; stdout: it prints", "store", beside=("command",), against=("batch",))
    environment: tuple[Text, ...] = setting("further environment variables of the program", (), beside=PROGRAM)
    batch: Batch | None = setting("one command for several; {game_ids} lists each game_id", None, beside=("command",))
    timeout_seconds: Positive = setting("limit for a command or a call", 600, beside=PROGRAM)
    max_concurrent: Count | None = setting("maximum workers on this dataset", None)
    freshness: Freshness = setting("refetch rules", Freshness())
    validate: Validation = setting("rules that a body must pass", Validation())
    available_after: Available | None = setting("not expected before: on its day, or after its end", None, needs="date")
    absent_after: Interval | None = setting("age from which `not found` means that there is no such object", None)
    excluded: NamedValues = setting("known holes: values of fields whose objects are not expected", {}, name="except")
    at_least: Count | None = setting(
        "expected objects, of each season that is over, else of the dataset; fewer are reported", None
    )
    priority: Urgency = setting("auto: from the age of its date or season", "auto")

    def request(self) -> tuple[Any, ...]:
        """The parts of its HTTP requests: equal ones have equal answers."""
        return self.source, self.url, self.method, self.headers, self.body, self.pages

    def page_values(self) -> set[str]:
        """Which of the fields of a page its requests name. With none of them, the next page is named by its url."""
        texts = [part.text for part in (self.url, self.pages and self.pages.url) if part] + [self.body]
        named = fields_in(*texts) & {*PAGE_FIELDS, OFFSET}
        return set() if self.pages and self.pages.next == LINK else named


@dataclass(frozen=True, slots=True)
class Configuration:
    """All of adce.yaml. Paths are absolute."""

    path: Path = Path("adce.yaml")
    database: File = setting("SQLite file with all state", Path("adce.db"))
    store: Lake = setting("location of the lake", "lake")
    interval_seconds: Positive = setting("between cycles", 15, name="reconciliation_interval_minutes", unit=MINUTE)
    interval_hours: Positive | None = setting(
        "older form", None, name="reconciliation_interval_hours", against=("reconciliation_interval_minutes",)
    )
    full_seconds: Positive = setting("time to list the whole store", 24, name="full_reconciliation_hours", unit=HOUR)
    verify_per_cycle: Amount = setting("stored contents that a cycle reads for their validation alone", 1000)
    queue_check_seconds: Positive = setting("maximum sleep of the main loop", 10)
    max_concurrent_scrapers: Count = setting("number of workers", 5)
    pool: Scheduler | None = setting("scheduler of a dask.distributed cluster to work on; absent: threads", None)
    grace_seconds: Number = setting("time that a stop grants running attempts", 30)
    retention_seconds: Positive = setting("age of attempts and cycles to delete", 90, name="retention_days", unit=DAY)
    priority_weighting: PriorityWeighting = setting("the score, which orders the queue", PriorityWeighting())
    rate_limiting: RateLimiting = setting("rate limits; absent: none", RateLimiting(enabled=False))
    health_check: HealthCheck = setting("HTTP server; absent: none", HealthCheck(enabled=False))
    alerts: Alerts = setting("alert channels", Alerts())
    retry: Retry = setting("retries of failed tasks", Retry())
    seasons: Annotated[tuple[Season, ...], Annotated[Mapping[str, tuple[Season, ...]], ONE_OR_MORE]] = setting(
        "the seasons, or several calendars of them by name", ()
    )
    sources: Mapping[str, Source] = setting("upstreams with their own limits, by name", {})
    datasets: Mapping[str, Dataset] = setting("families of objects, by name", {})

    def children_of(self, name: str) -> list[Dataset]:
        """The datasets whose objects follow from the contents of this one: it is one itself if it has pages."""
        own = self.datasets[name]
        return [one for one in self.datasets.values() if name in one.partitions.parents or (one is own and own.pages)]

    def source_at(self, url: str, asked: Source) -> Source:
        """Whose limits a redirect to a url counts in: those of the source that has its host, else of the one asked."""
        there = urllib.parse.urlsplit(url).netloc
        hosts = ((urllib.parse.urlsplit(one.base_url).netloc, one) for one in (asked, *self.sources.values()))
        return next((one for host, one in hosts if host.rpartition("@")[2] == there), asked)

    def own_fields_of(self, name: str) -> tuple[str, ...]:
        """The fields whose values distinguish the objects of a dataset."""
        dataset = self.datasets[name]
        if dataset.copy_of:
            return self.own_fields_of(dataset.copy_of)
        return (*dataset.partitions.own_fields(), *["page"] * bool(dataset.pages))

    def lines_of(self, name: str) -> Iterator[list[str]]:
        """Lines of parents, with every dataset above one. Each ends with one without parents, one that is not there, or
        one of a line before, or of its own: a cycle."""
        lines, followed = [[name]], set[str]()
        while lines:
            line = lines.pop()
            above = self.datasets.get(line[-1])
            if above and above.partitions.parents and line[-1] not in followed:
                followed.add(line[-1])
                lines += [[*line, parent] for parent in above.partitions.parents]
            else:
                yield line

    def season_names(self, name: str) -> set[str]:
        """The seasons that a dataset, or one that it descends from, names; else those of the only calendar."""
        parts = [self.datasets[one].partitions for line in self.lines_of(name) for one in line if one in self.datasets]
        found = {one for part in parts for one in (*part.seasons, *(part.dates.seasons if part.dates else ()))}
        return found or ({"all"} if len({season.calendar for season in self.seasons}) == 1 else set())

    def levels(self) -> list[list[Dataset]]:
        """The datasets in levels, parents before their children."""
        parents, depths = {one.name: one.partitions.parents for one in self.datasets.values()}, dict[str, int]()
        for name in graphlib.TopologicalSorter(parents).static_order():
            depths[name] = max((depths[parent] + 1 for parent in parents[name]), default=0)
        by_depth = itertools.groupby(sorted(self.datasets, key=depths.__getitem__), depths.__getitem__)
        return [[self.datasets[name] for name in names] for _, names in by_depth]

    def fields_of(self, name: str, known: dict[str, set[str]] | None = None) -> set[str]:
        """Every field that templates of this dataset may name: its own, and those above it, which may be `known`."""
        dataset, partitions = self.datasets[name], self.datasets[name].partitions
        is_seasonal = partitions.seasons or (partitions.dates and partitions.dates.seasons)
        own = [*partitions.own_fields(), *["season", "end"] * bool(is_seasonal), *PAGE_FIELDS * bool(dataset.pages)]
        return {*own, *self.fields_above(name, known)}

    def fields_above(self, name: str, known: dict[str, set[str]] | None = None) -> set[str]:
        """The fields that a dataset has from each of its parents."""
        dataset, above, known = self.datasets[name], list[set[str]](), {} if known is None else known
        for parent in dataset.partitions.parents if name not in known else ():
            is_paged = self.datasets[parent].pages and not dataset.copy_of
            above.append(self.fields_of(parent, known) - set(PAGE_FIELDS * bool(is_paged)))
        return known.setdefault(name, set.intersection(*above) if above else set())


SECRET_NAME = re.compile("authorization|cookie|token|secret|key", re.IGNORECASE)  # of a header
SENSITIVE = r"(?:authorization|cookie|token|secret|passw(?:or)?d|pwd|signature|api-?_?key)[\w-]{0,60}['\"\s]{0,9}[:=]"
SECRET_IN_TEXT = re.compile(  # in time that grows with the text: a source may have chosen that
    rf"""(://(?:[^/\s:@'"]*:)?)[^/\s'"]+(?=@)|((?:{SENSITIVE}|[?&](?:key|sig|auth)=)['":=\s]{{0,9}})"""
    r"""(?:(?<=")(?:[^"\\]|\\.)*|(?<=')[^']*|(?<!['"])[^'",}&]+)""",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """A text without passwords in urls, and without the values of headers and parameters with names of secrets."""
    return SECRET_IN_TEXT.sub(r"\1\2***", text)


def plain_secrets(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers with names of secrets whose values are no variables."""
    return {name: text for name, text in headers.items() if SECRET_NAME.search(name) and not variables_in(text)}


def secrets_of(source: Source, dataset: Dataset) -> set[str]:
    """The variables of the environment that the requests of a dataset hold, and what is secret in plain text."""
    urls = [one.text for one in (dataset.url, dataset.pages and dataset.pages.url) if one]
    headers = [*source.headers.values(), *dataset.headers.values()]
    found = variables_in(source.base_url, dataset.body, *urls, *headers)
    user = urllib.parse.urlsplit(source.base_url).netloc.rpartition("@")[0]
    pair = [user, user.partition(":")[2]] if user else []
    plain = [*plain_secrets(source.headers).values(), *plain_secrets(dataset.headers).values()]
    words = [word for text in plain for word in re.split(r"[\s;,]+", text) if len(word) > 7]
    return found | {f"={word}" for word in [*words, *pair]}


@functools.lru_cache(256)
def _forms(value: str) -> set[str]:
    """A secret as a source may repeat it: as a host, or encoded for a url, for HTML, JSON or Basic authentication."""
    plain, quoted = urllib.parse.unquote(value), {urllib.parse.quote_plus(value)}
    quoted |= {urllib.parse.quote(value, safe=safe) for safe in ("", "/", "!#$%&'()*+,/:;=?@[]~")}
    forms = {value, plain, value.lower(), html.escape(value, quote=False), *quoted}
    forms |= {re.sub("%..", lambda code: code[0].lower(), one) for one in quoted}
    forms |= {html.escape(value).replace("&#x27;", mark) for mark in ("&#x27;", "&#39;")}
    for text in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
        forms |= {text, text.replace("/", "\\/")}
    forms.add(base64.b64encode(plain.encode("utf-8", "replace")).decode().rstrip("="))
    return {form for form in forms if len(form) > 3}


def redacted(text: str, names: Iterable[str]) -> str:
    """A text with the names of variables in place of their values. A name that begins with = is a secret itself."""
    shown = dict[str, str]()
    for name in names:
        is_plain = name.startswith("=")
        value = from_environment(name[1:], os.environ) if is_plain else os.environ.get(name, "").strip()
        if len(value) > 3:
            shown |= dict.fromkeys(_forms(value), "***" if is_plain else f"${name}")
    for form in sorted(shown, key=len, reverse=True):  # one may be a part of another
        text = text.replace(form, shown[form])
    return text


def hidden_names(dataset: Dataset) -> set[str]:
    """What no result of a dataset may show, for redacted(): a call can read every variable."""
    read = {name for name in os.environ if SECRET_NAME.search(name)} if dataset.call else set[str]()
    return {*dataset.secrets, *dataset.environment, *read}


def problems_in(block: object) -> Problems:
    """Contradictions between the values of a block."""
    match block:
        case Season() if block.finish < block.start:
            yield "finish", f"{block.finish} is before its start {block.start}"
        case Limits() if block.burst_size and not block.scope().refill_per_second:
            yield "", "burst_size needs a limit such as requests_per_minute to refill it"
        case Retry() if block.initial_delay_seconds > block.max_delay_seconds:
            yield "initial_delay_seconds", f"{block.initial_delay_seconds} is more than max_delay_seconds"
        case Dates() if block.first and isinstance(block.last, datetime.date) and block.last < block.first:
            yield "to", f"{block.last} is before from: {block.first}"
        case Partitions():
            if block.parents and (block.ids or block.regex) and not block.id_fields():
                yield "", '"as" is missing'
            fields, seasonal = block.own_fields(), ("season", "end") if block.dates and block.dates.seasons else ()
            for name in {name for name in fields if (*fields, *seasonal).count(name) > 1}:
                yield "", f"the field {name} is set twice"
        case Dataset() if block.body and block.method != "POST":
            yield "body", "has no effect without method: POST"
        case Validation() if block.most() < block.min_bytes:
            yield "max_bytes", f"{block.most()} is less than min_bytes"


def conflicts(record: type, given: Sequence[str]) -> Problems:
    """Keys that are missing, that exclude one another, or that have no effect beside the others. ONE_OF of a record
    has pairs of a key, or an empty text, and of a group of which exactly one must stand beside that key."""
    for when, names in getattr(record, "ONE_OF", ()):
        has = [name for name in names if name in given]
        if len(has) != 1 and (not when or when in given):
            yield "", f"needs exactly one of {', '.join(names[:-1])} and {names[-1]}, has {' and '.join(has) or 'none'}"
    if (names := getattr(record, "ANY_OF", ())) and not set(names) & set(given):
        yield "", f"needs one or more of {', '.join(names[:-1])} and {names[-1]}"
    for name, one in settings_of(record).items():
        if name not in given:
            yield from [("", f'"{name}" is missing')] * (one.default is NEEDED)
        elif one.beside and not set(one.beside) & set(given):
            words = "has no effect without " + " or ".join(f'"{other}"' for other in one.beside)
            yield name, f"{words}; {one.instead}" if one.instead else words
        yield from ((name, f'has no effect beside "{other}"') for other in one.against if {name, other} <= set(given))


# ---------------------------------------------------------------- Reading
# From a file to a configuration, with every mistake, its line and a hint. Headlines: Reader, load_configuration().

MAX_FILE_BYTES = 1 << 20
SHOWN_PROBLEMS, SHOWN_COLUMNS = 50, 140  # of them, and of their lines
DATE_CODES = "aAbBcCdDeFgGhHIjmMpqRSTuUVwWxXyY"  # of strftime, those that every platform knows, and q: the quarter
SUCCESSORS = {"partitions.times": "values", "dates.until": "to", "batch.by": "group_by"}
# Keys of the system that ADCE replaces, and former ones: the key that took their place, or what to do instead.
FORMER = {
    "alternatives": "combine conditions of require with ||",
    "channels": "set alerts.webhook, alerts.sns_topic or alerts.command",
    "check_interval_seconds": "health is checked at each request",
    "dry_run": 'use "adce.py plan"',
    "enabled": "a block that is absent is off",
    "logging": 'use "adce.py run --log FILE"',
    "maintenance": 'use "adce.py pause SOURCE --for 2h"',
    "max_orchestrator_runtime_minutes": 'use "adce.py run --max-minutes N"',
    "max_retries": "retry.max_attempts",
    "retry_delay_seconds": "retry.initial_delay_seconds",
    "scheduled_tasks": "declare datasets",
    "task_processing": "the score orders all open tasks",
    "task_queue_file": "the queue is in the database",
    "test_mode": 'use "adce.py run --once"',
    "version": "it has no effect",
}


@functools.cache
def all_settings(declared: Any = Configuration, path: str = "") -> Mapping[str, Setting]:
    """Every key of adce.yaml, or of a part of it, by its path, in which `*` is any name or number."""
    shape, _, inner = shape_of(declared)
    if shape != "block":
        return {} if shape == "value" else all_settings(inner, f"{path}.*".strip("."))
    found: dict[str, Setting] = {}
    for name, one in settings_of(inner).items():
        here = f"{path}.{name}".strip(".")
        found |= {here: one, **all_settings(one.declared, here)}
    return found


def _hint(path: str, node: Any, known: Iterable[str], text: str) -> str:
    """The end of the message about an unknown key: where it belongs, or what it may mean."""
    name, paths = path.rpartition(".")[2], all_settings()
    inner = [key.value for key, _ in node.value if str(key.value) in paths] if node.id == "mapping" else []
    if inner and "." not in path:
        return f"; {' and '.join(inner)} in it {'belong' if inner[1:] else 'belongs'} at the top level"
    for former, successor in SUCCESSORS.items():
        if path.endswith(f".{former}"):
            return f"; write {successor}: {' '.join(text[node.start_mark.index : node.end_mark.index].split())}"
    if advice := FORMER.get(name):
        return f', did you mean "{advice}"?' if advice in paths else f"; remove it: {advice}"
    homes = [one.rpartition(".")[0] for one in paths if one.rpartition(".")[2] == name]
    if 0 < len(homes) <= 2:
        return f" here; it belongs {' or '.join(f'in {home}' if home else 'at the top level' for home in homes)}"
    return suggest(name, known)


class Reader:
    """The problems of one file, the place of every path in it, and the texts that may name fields."""

    def __init__(self) -> None:
        self.problems = set[tuple[int, int, str, str]]()  # line and column from 1, path of the key, what is wrong
        self.places: dict[str, tuple[int, int]] = {}
        self.templates = collections.defaultdict[str, dict[str, Template]](dict)  # by source or dataset
        self.text = ""

    def complain(self, path: str, text: str) -> None:
        """Note a problem at the place of `path`, or of the nearest block around it."""
        place = path = path.strip(".")
        while place not in self.places and place:
            place = place.rpartition(".")[0]
        self.problems.add((*self.places.get(place, (1, 1)), path, text))

    def parse(self, declared: Any, node: Any, path: str = "") -> Any:
        """The value of a node as it is declared; NEEDED, and a problem, when it is not of its kind."""
        self.places[path] = _place(node.start_mark)
        shape, names, inner = shape_of(declared)
        if shape == "value":
            return self._value(inner, node, path)
        if names is ONE_OR_MORE and node.id != ("sequence" if shape == "list" else "mapping"):
            value = self.parse(inner, node, path)
            return value if value is NEEDED else (value,) if shape == "list" else {"": value}
        if node.id != ("sequence" if shape == "list" else "mapping") or (shape == "list" and not node.value):
            self.complain(path, f"expected a {'list' if shape == 'list' else 'mapping'}, found {_describe(node)}")
            return NEEDED
        if shape == "block":
            return self._record(inner, node, path)
        if shape == "mapping":
            return self._values({} if names in (str, ONE_OR_MORE) else dict.fromkeys(names, inner), inner, node, path)
        values = [self.parse(inner, one, f"{path}.{number}") for number, one in enumerate(node.value)]
        return tuple(value for value in values if value is not NEEDED)

    def _value(self, kind: Kind, node: Any, path: str) -> Any:
        try:
            value = kind.convert(node)
        except ConfigurationError as error:
            self.complain(path, str(error))
            return NEEDED
        except (ValueError, TypeError, AttributeError, LookupError, OSError):  # also of a list or a mapping
            self.complain(path, f"expected {kind.expected}, found {_describe(node)}")
            return NEEDED
        if kind.fields:
            block, name, rest = path.split(".", 2)
            self.templates[f"{block}.{name}"][rest] = Template(node.value, kind.fields)
        return value

    def _values(self, known: Mapping[str, Any], other: Any, node: Any, path: str) -> dict[str, Any]:
        """The good values of a mapping, declared by name in `known`, or all as `other`."""
        found = {}
        for name_node, value_node in node.value:
            name = name_node.value if name_node.id == "scalar" else "?"
            here, place = f"{path}.{name}".strip("."), _place(name_node.start_mark)
            if here in self.places:
                self.problems.add((*place, here, f"duplicate key, first set at line {self.places[here][0]}"))
                continue
            self.places[here] = place
            if not (declared := known.get(name) if known else other):
                self.complain(here, f"unknown key{_hint(here, value_node, known, self.text)}")
            elif (value := self.parse(declared, value_node, here)) is not NEEDED:
                found[name] = value
        return found

    def _record(self, record: Any, node: Any, path: str) -> Any:
        """A wrong value has its default; without a required one there is no record."""
        known = settings_of(record)
        found = self._values({name: one.declared for name, one in known.items()}, None, node, path)
        given = [name for name in known if f"{path}.{name}".strip(".") in self.places]
        for name, text in conflicts(record, given):
            self.complain(f"{path}.{name}", text)
        if any(one.default is NEEDED and name not in found for name, one in known.items()):
            return NEEDED
        values: dict[str, Any] = {}
        if "name" in record.__slots__:
            values["name"] = path.partition(".")[2]
            if "." in values["name"]:
                self.complain(path, "a name with a dot; write _ in its place")
                return NEEDED
        for one, value in ((known[name], value) for name, value in found.items()):
            values[one.attribute] = value * one.unit if one.unit > 1 else value
        made = record(**values)
        for name, text in problems_in(made):
            if not name or name in given:  # else it is no mistake of the file's
                self.complain(f"{path}.{name}", text)
        return made


def _place(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _describe(node: Any) -> str:
    words = {"sequence": "a list" if node.value else "an empty list", "mapping": "a mapping", "null": "nothing"}
    texts = {"str": "text", "int": "a number", "float": "a number", "bool": "yes or no"}
    return words.get(tag_of(node)) or f"{node.value!r} ({texts.get(tag_of(node), 'a date')})"


def _problems(reader: Reader, read: Configuration, configuration: Configuration) -> Problems:
    """Contradictions between blocks."""
    sources: Mapping[str, Any] = configuration.sources
    for name, listed in cast(Any, read.seasons or {}).items():
        for (_, one), (place, other) in itertools.combinations(enumerate(listed), 2):
            is_one_time = one.start <= other.finish and other.start <= one.finish
            if is_one_time or one.label == other.label or one.end == other.end:
                path = f"seasons.{name}.{place}".replace("..", ".")
                yield path, f"season {other.label} repeats or overlaps season {one.label}"
    if "global" in sources:
        yield "sources.global", "a source cannot be named global"
    shapes = dict[str, str]()  # datasets by the shape of their keys
    for path in (f"sources.{name}" for name in sources):
        for key, template in reader.templates[path].items():
            yield from ((f"{path}.{key}", text) for text in _text_problems(template, set()))
    for path in ("priority_weighting.source_multipliers", "rate_limiting.source_limits"):
        names: Mapping[str, Any] = functools.reduce(getattr, path.split("."), cast(Any, read))
        for name in names.keys() - sources.keys():  # no harm, unless it is misspelt or stands for others
            hint = "; use global_limits" if name == "global" else suggest(name, sources.keys() - names.keys())
            if hint or name == "default":
                yield f"{path}.{name}", f'source "{name}" is not defined{hint}'
    for name, dataset in read.datasets.items():
        path, source, lines = f"datasets.{name}", dataset.source, [*configuration.lines_of(name)]
        if source not in sources and f"sources.{source}" not in reader.places:
            yield f"{path}.source", f'source "{source}" is not defined{suggest(source, sources)}'
        limits = configuration.rate_limiting.scopes.get(source)
        if read.pool and limits and limits.windows and (dataset.command or dataset.call):
            why = f"source {source} has limits, and a worker of `pool` gives no permits: name a source without limits"
            yield f"{path}.{'command' if dataset.command else 'call'}", why
        if broken := [text for line in lines if (text := _broken_reference(reader, line, read.datasets))]:
            yield f"{path}.{'copy_of' if dataset.copy_of else 'partitions.from'}", broken[0]
        elif {name, *(line[-1] for line in lines)} <= configuration.datasets.keys():
            problems = _object_problems(configuration, configuration.datasets[name], reader.templates[path])
            yield from ((f"{path}.{key}", text) for key, text in problems)
            if (first := shapes.setdefault(dataset.key.shape(), name)) != name:
                yield f"{path}.key", f'the same keys as dataset "{first}": two datasets cannot share objects'


def _broken_reference(reader: Reader, line: Sequence[str], known: Iterable[str]) -> str | None:
    """The first mistake in a chain of datasets, each of which names the next."""
    if line[-1] in line[:-1]:
        return "cycle: " + " -> ".join(line)
    if len(line) == 2 and f"datasets.{line[1]}" not in reader.places:
        return f'dataset "{line[1]}" is not defined{suggest(line[1], known)}'
    return None


def _text_problems(template: Template, declared: set[str], name: str = "") -> Iterator[str]:
    if template.pattern is FIELD_IN_TEXT and set("{}") & set(VARIABLE.sub("", template.shape()).replace("{}", "")):
        yield f"{template.text}: a brace that is no {{field}}; a field is a name in small letters"
        return
    for match in template.pattern.finditer(template.text):
        codes, own = re.findall(r"%-?(.?)", match[3] or "", re.DOTALL), (("url", "url"), ("json", "body"))
        is_form = match[3] == "path" or (match[3], name) in own or re.fullmatch(DIGITS, match[3] or "")
        if match[1] not in declared:
            there = f"(there {'are: ' + ', '.join(sorted(declared)) if declared else 'is none'})"
            yield f'no field "{match[1]}"{suggest(match[1], declared)} {there}'
        elif is_form and not match[2]:
            continue
        elif (match[2] or match[3]) and (match[1] != "date" or not all(map(str.isalpha, codes))):
            yield f"{match[0]}: a date takes a format like %Y%m%d, a number one like 010 (at least ten digits)"
        elif unknown := [code for code in codes if code not in DATE_CODES]:
            yield f"{match[0]}: unsupported format code %{unknown[0]}"


def _object_problems(configuration: Configuration, dataset: Dataset, texts: Mapping[str, Template]) -> Problems:
    """Fields that are not there, names that objects cannot have, and keys without effect, wherever these stand."""
    key, declared, own = dataset.key, configuration.fields_of(dataset.name), configuration.own_fields_of(dataset.name)
    fields = dict.fromkeys(settings_of(Dataset), declared)
    fields |= dict.fromkeys(("url", "body", "pages.url"), declared | ({OFFSET} if dataset.pages else set()))
    fields["partitions"] = configuration.fields_above(dataset.name)
    fields["key"] = declared - ({"next"} if dataset.pages else set())  # it is another one each time
    fields["command"] = declared | ({f"{name}s" for name in own} if dataset.batch else set())
    for name, template in texts.items():
        if (block := name.partition(".")[0]) in fields:
            yield from ((name, text) for text in _text_problems(template, fields.get(name, fields[block]), name))
    dates, calendars = dataset.partitions.dates, {season.calendar for season in configuration.seasons}
    labels = [*(season.label for season in configuration.seasons), *calendars, *["all"] * len(calendars)]
    for path, names in (("", dataset.partitions.seasons), ("dates.", dates.seasons if dates else ())):
        for name in (name for name in names if labels.count(name) != 1):
            which = f"is in several calendars: name {' or '.join(sorted(calendars))}"
            text = which if name in labels else f"is not declared{suggest(name, labels)}"
            yield f"partitions.{path}seasons", f'season "{name}" {text}'
    has = {"", *declared, *(["season"] if dataset.calendar and "date" in declared else [])}
    lacking = ((path, one.needs) for path, one in all_settings(Dataset).items() if one.needs not in has)
    yield from ((path, f"has no effect: its objects have no {name}") for path, name in lacking)
    places = [(f"except.{name}", name) for name in dataset.excluded]
    places += [("batch.group_by", dataset.batch.group_by)] if dataset.batch else []
    yield from ((path, f'no field "{name}"{suggest(name, declared)}') for path, name in places if name not in declared)
    if dataset.batch and dataset.command and own == (dataset.batch.group_by,):
        yield "batch.group_by", f"has no effect: no two objects share a {dataset.batch.group_by}"
    if pages := dataset.pages:
        if pages.last and {"page", OFFSET}.isdisjoint(dataset.page_values()):
            yield "pages.last", "no request names {page} or {offset}: each page would be the first"
        if pages.size and not pages.last and OFFSET not in dataset.page_values():
            yield "pages.size", 'has no effect without "last" or {offset} in a request'
        if twice := {*PAGE_FIELDS, OFFSET} & {*fields["partitions"], *dataset.partitions.own_fields()}:
            yield "pages", f"the field {min(twice)} is set twice"
    source = configuration.sources.get(dataset.source)
    if source and dataset.url and not (source.base_url or dataset.url.text.startswith(("http://", "https://"))):
        yield "url", f"{dataset.url.text} is no address: give source {dataset.source} a base_url"
    if any(_text_problems(key, fields["key"])):
        return
    start, steps = datetime.datetime(2024, 1, 1), [*STEPS]  # noqa: DTZ001  # of any time zone
    every = dataset.partitions.dates.every if dataset.partitions.dates else "day"
    days = {start, *(shifted(start, STEPS[one]) for one in steps[steps.index(every) :])}
    keys = [key.render({**dict.fromkeys(declared, "1"), "date": day.isoformat()}, str) for day in sorted(days)]
    if {"", ".", "..", STAGING} & {*keys[0].split("/")} or re.search(r"[\x00-\x1f\x7f]", key.text):
        yield "key", f"{key.text}: a key has no empty, . or .. parts and does not start or end with /"
    named = {match[1] for match in key.pattern.finditer(key.text)}
    known = named | ({"season"} if "end" in named else set())
    if not named.isdisjoint(ids := dataset.partitions.id_fields()):
        known |= {*ids}  # the others say more of an object, such as its checksum
    missing = [name for name in own if name not in known]
    yield from (("key", f"does not name {{{name}}}: its objects would overwrite one another") for name in missing)
    if dataset.partitions.dates and not missing and len({*keys}) < len(days):
        yield "key", "its date format gives different days the same key"


def _resolve(reader: Reader, read: Configuration) -> Configuration:
    """With all that follows from other keys, and without datasets whose partitions are unknown."""
    datasets, of_partitions = {}, re.compile(r"datasets\.([^.]*)\.partitions\b(?!\.(?:ids|regex)$)")
    unknown = {found[1] for *_, where, _ in reader.problems if (found := of_partitions.match(where))}
    for name, dataset in read.datasets.items():
        line, partitions = [name], dataset.partitions
        while partitions.same_as and line[-1] not in line[:-1]:
            line.append(partitions.same_as)
            partitions = read.datasets[line[-1]].partitions if line[-1] in read.datasets else Partitions()
        if text := _broken_reference(reader, line, read.datasets):
            reader.complain(f"datasets.{name}.partitions.same_as", text)
        elif line[-1] in read.datasets and unknown.isdisjoint(line):
            partitions = Partitions(parents=(dataset.copy_of,)) if dataset.copy_of else partitions
            datasets[name] = dataclasses.replace(dataset, partitions=partitions)
    calendars: Mapping[str, Sequence[Season]] = cast(Any, read.seasons) or {}
    seasons = [dataclasses.replace(one, calendar=name) for name, listed in calendars.items() for one in listed]
    seasons.sort(key=lambda season: season.start)
    limiting = read.rate_limiting
    scopes = {name: one.scope() for name, one in {**limiting.source_limits, "global": limiting.global_limits}.items()}
    urls = [one.base_url for one in read.sources.values()] + [one.url.text for one in datasets.values() if one.url]
    places = {re.sub(r"^https?://([^/?#]*@)?|[/?#].*", "", url.lower()) for url in urls if "://" in url}
    hosts = frozenset(places | {place.partition(":")[0] for place in places})  # also by another scheme
    configuration = dataclasses.replace(
        read,
        database=read.path.parent / read.database,
        store=read.store.rstrip("/") if "://" in read.store else str(read.path.parent / read.store),
        interval_seconds=read.interval_hours * HOUR if read.interval_hours else read.interval_seconds,
        rate_limiting=dataclasses.replace(limiting, scopes=scopes) if limiting.enabled else RateLimiting(enabled=False),
        seasons=tuple(seasons),
        sources={name: dataclasses.replace(one, known_hosts=hosts) for name, one in read.sources.items()},
        datasets=datasets,
    )
    searched = {name for one in datasets.values() if not one.copy_of for name in one.partitions.parents}
    for name, one in datasets.items():
        lines = itertools.chain.from_iterable(configuration.lines_of(name))
        above = (datasets[line].partitions.dates for line in lines if line in datasets)
        rules, is_paged = one.freshness, one.pages is not None and one.pages.next != LINK
        is_parsed = bool(rules.until or rules.live or is_paged or name in searched)
        source, original = read.sources.get(one.source, Source("")), read.datasets.get(one.copy_of or "")
        datasets[name] = dataclasses.replace(
            one,
            dates=next(filter(None, above), Dates()),
            calendar=tuple(chosen(seasons, [*configuration.season_names(name)])),
            validate=dataclasses.replace(one.validate, is_parsed=is_parsed),
            original=original.key if original else None,
            secrets=frozenset(secrets_of(source, one)),
        )
    return configuration


def load_configuration(path: Path) -> Configuration:
    """Read adce.yaml. Raises ConfigurationError, which lists every problem with its place."""
    import yaml

    reader, configuration = Reader(), None
    gc.disable()  # nothing that is made here is garbage: looking for it takes a third of the time
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes", "is it the right file?")
        reader.text = text = path.read_text(encoding="utf-8-sig")
        try:
            node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:  # this one says better what is wrong
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            reader.complain("", "the file is empty")
        elif (read := reader.parse(Configuration, node)) is not NEEDED:
            configuration = _resolve(reader, dataclasses.replace(read, path=path.absolute()))
            for where, what in _problems(reader, read, configuration):
                if where in reader.places:  # else `same_as` has it from another dataset
                    reader.complain(where, what)
    except yaml.YAMLError as error:
        mark = getattr(error, "context_mark" if "quoted scalar" in str(error) else "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        reader.problems.add((*_place(mark), "", f"not YAML: {what}"))
    except RecursionError:
        reader.complain("", "nested too deeply")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}", "name another file with -c FILE") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    finally:
        gc.enable()
    if not reader.problems and configuration:
        return configuration
    lines, blocks, problems = text.splitlines(), [], sorted(reader.problems)
    for number, column, where, what in problems[:SHOWN_PROBLEMS]:
        blocks.append(f"{path.name}:{number}:{column}: {f'{where}: ' if where else ''}{masked(what)}")
        if number <= len(lines) and lines[number - 1].strip():
            source, left = masked(lines[number - 1].replace("\t", " ")), max(0, column - 100)
            blocks.append(f"{number:5} | {source[left : left + SHOWN_COLUMNS]}\n      | {' ' * (column - 1 - left)}^")
    if len(problems) > SHOWN_PROBLEMS:
        blocks.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigurationError("\n".join([*blocks, f"{count}; nothing was started"]))


def database_named_in(path: Path) -> Path:
    """The database of a configuration that cannot be used otherwise."""
    text = ""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace")
    named = re.search(r"""^["']?database["']?:[ \t]*("[^"]+"|'[^']+'|[^\s#]+)""", text, re.MULTILINE)
    return path.parent / (named[1].strip("\"'") if named else DEFAULT_DATABASE)


# ---------------------------------------------------------------- Objects
# Expected objects, their keys and their urls. Decisions only, as in the next room: values in, values
# out, no clock, no disk, no SQL. Headlines: ObjectRow, expected_object(), expand().

MAX_KEY_BYTES = 1000  # S3 takes 1,024
MAX_URL = 4000  # characters of one that a source has chosen
BLOCK_BYTES = 64 << 10  # of a body, read at once
FIELDS_AS_JSON = json.JSONEncoder(sort_keys=True)  # json.dumps would make one for each object
Links = Mapping[str, str] | None  # of the header Link, by relation; None: not known


class ExpectedObject(NamedTuple):
    """One object that a dataset expects in the store."""

    key: str
    season: str | None
    day: str | None
    available_at: int | None


class ObjectRow(NamedTuple):
    """A row of objects: facts, the state that follows, and the open task. Instants are seconds since 1970."""

    object_id: int = 0
    dataset: str = ""
    key: str = ""
    fields_json: str = "{}"
    season: str | None = None
    day: str | None = None
    available_at: int | None = None
    state: str = ObjectState.AWAITED
    reason: str | None = None
    since: int = 0
    next_at: int | None = None
    proven: int = 1  # as in the table
    cycle_id: int | None = None
    seen_at: int | None = None
    etag: str | None = None  # None: not in the store
    size: int | None = None
    modified_at: int | None = None
    validators: str | None = None  # JSON
    read_etag: str | None = None
    verdict: str | None = None  # why the content is invalid
    settled: int | None = None  # None: the content was not judged
    live: int | None = None
    skipped: str | None = None
    absent_at: int | None = None
    outdated: str | None = None  # why it must be fetched again
    task: str | None = None
    priority: str | None = None
    detected_at: int | None = None
    gap_size: int | None = None
    rank: float | None = None
    slope: float | None = None
    attempts: int = 0
    failures: int = 0
    fruitless: int = 0
    crashes: int = 0
    attempt_id: int | None = None
    last_error: str | None = None

    @property
    def fields(self) -> Fields:
        """The values of its partition."""
        return cast(Fields, json.loads(self.fields_json))

    @property
    def links(self) -> Links:
        """Those of the response with which it came."""
        return cast(Links, json.loads(self.validators or "{}").get("links"))


class Appraisal(NamedTuple):
    """The state that follows from the facts now."""

    state: ObjectState
    reason: str | None = None
    next_at: int | None = None  # when time alone changes it; of a gap: when the next request is worth it


def quote_for_url(value: str) -> str:
    """A value as a part of a url: it can add no path and no parameter."""
    return urllib.parse.quote(value, safe="")


def sent_fields(dataset: Dataset, fields: Fields) -> Fields:
    """The fields that a request may name: those of the object, and for a page its offset."""
    pages = dataset.pages
    return {**fields, OFFSET: str((int(fields["page"]) - 1) * (pages.size or 1))} if pages else fields


def url_of(source: Source, dataset: Dataset, fields: Fields) -> str:
    """The url of an object: below base_url, with one slash between, unless it is whole by itself. That of a page after
    the first may be what the page before it names."""
    later = dataset.pages if dataset.pages and fields["page"] != "1" else None
    template = cast(Template, (later and later.url) or dataset.url)
    url = template.render(sent_fields(dataset, fields), quote_for_url)
    is_whole = not source.base_url or url.startswith(("http://", "https://"))
    url = url if is_whole else f"{source.base_url}{url if url[:1] == '?' else '/' + url.lstrip('/')}"
    return urllib.parse.urljoin(url, fields["next"]) if later and not dataset.page_values() else url


def origin_of(url: str) -> tuple[str, str]:
    """The server of a url: its scheme, and its host with its port."""
    return urllib.parse.urlsplit(url)[:2]


def address_problem(source: Source, dataset: Dataset, fields: Fields) -> str | None:
    """Why a url is not asked for: a value of the form {field:url} leads to another host than without it, or up."""
    text = dataset.url.text if dataset.url else ""
    if ":url}" not in text:
        return None
    url, plain = url_of(source, dataset, fields), dataclasses.replace(dataset, url=Template(text.replace(":url}", "}")))
    try:
        if origin_of(url) != origin_of(from_environment(url_of(source, plain, fields), dataset.secrets)):
            return f"its parent names {urllib.parse.urlsplit(url).netloc}, another host"
        steps = urllib.parse.unquote(urllib.parse.urlsplit(url).path).split("/")
    except ValueError as error:
        return f"its parent names no address: {error}"
    return None if {".", ".."}.isdisjoint(steps) else "its parent names an address with . or .. in its path"


@functools.lru_cache(4096)  # a date is a part of many keys
def quote_for_key(value: str) -> str:
    """A value as a part of a key. Different values stay different, and none names a folder above; all else is kept."""
    quoted = re.sub(r"[/%\x00-\x1f\x7f]", lambda match: f"%{ord(match[0]):02X}", value)
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


def expected_object(dataset: Dataset, fields: Fields) -> ExpectedObject:
    """The object of one partition. Raises ValueError when its values make no usable key."""
    for name in dataset.partitions.own_fields():
        if problem := part_problem(dataset, name, fields[name]):
            raise ValueError(problem)
    key = dataset.key.render(fields, quote_for_key)
    size = len(key.encode())
    if size > MAX_KEY_BYTES or (size > 255 and any(len(part.encode()) > 255 for part in key.split("/"))):
        raise ValueError(f"{dataset.name}: the key {key[:60]}... is too long")
    if key.partition("/")[0] == STAGING:
        raise ValueError(f"{dataset.name}: the key {key} is in the folder {STAGING}, which is ADCE's own")
    season = next((one.label for one in dataset.calendar if one.label == fields.get("season")), None)
    if "date" not in fields:
        return ExpectedObject(key, season, None, None)
    moment = datetime.datetime.fromisoformat(fields["date"])
    if not 1000 <= moment.year < 3000:
        raise ValueError(f"{dataset.name}: the year of {fields['date']} is not between 1000 and 2999")
    date, rule, available_at = moment.date(), dataset.available_after, None
    season = season or next((one.label for one in dataset.calendar if one.start <= date <= one.finish), None)
    if isinstance(rule, datetime.time):
        available_at = instant_of(date, rule, dataset.dates.timezone)
    elif rule is not None:
        available_at = end_of_step(dataset, fields) + rule
    return ExpectedObject(key, season, date.isoformat(), available_at)


def end_of_step(dataset: Dataset, fields: Fields) -> int:
    """The instant at which the day of an object is over, or its hour, week, month, quarter or year."""
    end = shifted(datetime.datetime.fromisoformat(fields["date"]), STEPS[dataset.dates.every])
    return instant_of(end.date(), end.time(), dataset.dates.timezone)


def expand(dataset: Dataset, now: float, base: Fields | None = None) -> Iterator[dict[str, str]]:
    """The fields of every object of a dataset as of now: all combinations of its kinds of partitions, and of `base`:
    the fields of an object of its parent, and an id in it."""
    partitions, kinds = dataset.partitions, list[Iterable[Fields]]([[base or {}]])
    if partitions.dates:
        kinds.append(_expand_dates(partitions.dates, dataset.calendar, now))
    if partitions.seasons:
        begun = [one for one in chosen(dataset.calendar, partitions.seasons) if one.start <= day_of(now)]
        kinds.append(map(_season_fields, begun))
    kinds += [[{name: value} for value in values] for name, values in partitions.values.items()]
    kinds += [[FIRST_PAGE]] if dataset.pages else []
    for combination in itertools.product(*kinds):
        yield {name: value for part in combination for name, value in part.items()}


def _season_fields(season: Season) -> dict[str, str]:
    return {"season": season.label, "end": str(season.end)}


def _expand_dates(dates: Dates, seasons: Sequence[Season], now: float) -> Iterator[dict[str, str]]:
    here = datetime.datetime.fromtimestamp(now, zoneinfo.ZoneInfo(dates.timezone)).replace(tzinfo=None)
    last = here.date() if isinstance(dates.last, str) else dates.last
    last -= datetime.timedelta(days=dates.last == "yesterday")
    spans = [(one.start, one.finish, _season_fields(one)) for one in chosen(seasons, dates.seasons)]
    spans += [(dates.first, last, {})] if dates.first else []
    for first, finish, fields in spans:
        moment = datetime.datetime.combine(first, datetime.time())
        if months := {"month": 1, "quarter": 3, "year": 12}.get(dates.every):
            moment = moment.replace(day=1, month=first.month - (first.month - 1) % months)
        while moment.date() <= min(finish, last) and (dates.last != "now" or moment <= here):
            is_chosen = not dates.weekdays or WEEKDAYS[moment.weekday()] in dates.weekdays
            if is_chosen and moment.date() not in dates.excluded:
                text = moment.isoformat(timespec="minutes") if dates.every == "hour" else moment.date().isoformat()
                yield {"date": text, **fields}
            moment = shifted(moment, STEPS[dates.every])


def expand_named(child: Dataset, parent: Dataset, fields: Fields, value: str, now: float) -> Iterator[dict[str, str]]:
    """The fields of every object that a value in the content of a parent makes. A copy has those of its original."""
    if child.name == parent.name:
        yield {**fields, **json.loads(value)}
    elif child.copy_of:
        yield {**fields}
    else:
        inherited = {name: fields[name] for name in fields.keys() - ({*PAGE_FIELDS, NAMED_BY} if parent.pages else ())}
        named = {child.partitions.id_field: value} if child.partitions.id_field else json.loads(value)
        yield from expand(child, now, {**inherited, **named})


def expression_of(child: Dataset, parent: str) -> str:
    """The expression that finds the ids of a dataset in the content of a parent; a word for its pages and copies."""
    if child.name == parent:
        return PAGES
    return "copy" if child.copy_of else child.partitions.ids or f"regex {child.partitions.regex}"


def part_problem(dataset: Dataset, name: str, value: str) -> str | None:
    """Why a value can be no part of a key, or None. No url can hold a dot segment, quoted or not (RFC 3986)."""
    steps = value.split("/") if dataset.url and ":path}" in dataset.url.text else [value]
    is_step = dataset.url and not {".", ".."}.isdisjoint(steps)
    is_usable = value.strip() and value.isprintable() and not is_step
    return None if is_usable else f"{dataset.name}: {name} {value!r} makes no key"


# ---------------------------------------------------------------- Contents
# Meaning of the content of an object: whether it is whole, whether it is final, and which other objects it names; and
# from all facts about an object, its state. Headlines: inspect(), appraise().

GZIP_MAGIC = b"\x1f\x8b"
COMPRESSED = (".gz", ".zip", ".zst", ".bz2", ".xz", ".parquet")  # keys of files that are stored as sent


@dataclass(frozen=True, slots=True)
class Inspection:
    """The findings in the content of an object."""

    verdict: str | None = None  # why it is invalid
    settled: bool = False  # final: its `until` holds
    live: bool = False  # its `live.while` holds
    mentions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # ids by expression
    problems: tuple[str, ...] = ()  # values in the place of ids that can be none
    outdated: str | None = None  # why it must be fetched again all the same

    @property
    def valid(self) -> bool:
        """Whether the content is the object."""
        return self.verdict is None

    def facts(self, etag: str | None) -> dict[str, Any]:
        """Its columns in a row of objects. Content with unusable ids counts as unread: each cycle reports it."""
        read_etag = None if self.problems else etag
        return {"verdict": self.verdict, "settled": self.settled, "live": self.live, "read_etag": read_etag}


def needs_json(dataset: Dataset, children: Sequence[Dataset]) -> bool:
    """Whether the content must be JSON, also because an expression is applied to it."""
    rules, freshness, pages = dataset.validate, dataset.freshness, dataset.pages
    is_asked = freshness.until or freshness.live or any(child.partitions.ids for child in children)
    return bool(rules.json or rules.require or is_asked or (pages and pages.is_expression()))


def inspect(
    dataset: Dataset, fields: Fields, body: bytes | BinaryIO, children: Sequence[Dataset] = (), links: Links = None
) -> Inspection:
    """Judge the content of an object: whether it is whole and final, and which ids of `children` it names. Only JSON,
    and texts in which ids are looked for, are in memory whole."""
    freshness, rules, is_json = dataset.freshness, dataset.validate, needs_json(dataset, children)
    file = io.BytesIO(body) if isinstance(body, bytes) else body
    file.seek(0)
    is_read = is_json or children or rules.contains or rules.not_contains
    key = dataset.key.render(fields, str) if dataset.key.text.endswith("}") else dataset.key.text
    is_plain = (rules.json or rules.require) and not rules.gzip and not key.lower().endswith(COMPRESSED)
    is_packed = is_read and not is_plain and file.read(2) == GZIP_MAGIC
    content = _gunzipped(file, rules.most()) if is_packed else file
    if flaw := next(_flaws(rules, fields, file, content), None):
        return Inspection(flaw)
    document: Any = None
    if is_json:
        try:
            content.seek(0)
            document = json.load(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            return Inspection(f"not JSON: {str(error)[:100]}")
    if failed := next((expression for expression in rules.require if not holds(expression, fields, document)), None):
        return Inspection(f"require is not true: {failed}")
    settled = freshness.until is None or holds(freshness.until, fields, document)
    live = freshness.live is not None and holds(freshness.live.expression, fields, document)
    mentions, problems, outdated = dict[str, tuple[str, ...]](), list[str](), None
    for child in children:
        if child.name != dataset.name:
            ids = ["copy"] if child.copy_of else _ids(child, fields, document, content, problems)
        elif links is None and cast(Pages, dataset.pages).next == LINK:
            outdated = "its header Link is not known"
            continue
        else:
            try:
                ids = list(_pages_named(dataset, fields, document, content, links or {}))
            except ValueError as error:
                return Inspection(str(error))
        mentions[expression_of(child, dataset.name)] = tuple(dict.fromkeys(ids))
    return Inspection(None, settled, live, mentions, tuple(problems), outdated)


def _pages_named(
    dataset: Dataset, fields: Fields, document: Any, file: BinaryIO, links: Mapping[str, str]
) -> Iterator[str]:
    """The fields, in JSON, of the next page, or from the first of all others. Raises ValueError for what is no page."""
    pages, page = cast(Pages, dataset.pages), int(fields["page"])
    if pages.last:
        total = str(search(pages.last, fields, document))
        is_number = re.fullmatch(r"\d{1,15}", total)
        if page == 1 and not is_number:
            raise ValueError(f"{pages.last} is not a number: {total[:1000]}")
        if page > 1 and is_number and total != fields["next"]:
            raise ValueError(f"{pages.last} is {total}, but was {fields['next']} on the first page")
        last = min(-(-int(total) // (pages.size or 1)), pages.most + 1) if page == 1 else 0
        yield from (FIELDS_AS_JSON.encode({"page": str(number), "next": total}) for number in range(2, last + 1))
        return
    if pages.next == LINK:
        value: Any = links.get("next")
    elif pages.is_expression():
        value = search(cast(str, pages.next), fields, document)
    else:
        file.seek(0)
        found = re.search(cast(str, pages.next), file.read().decode("utf-8", "replace"))
        value = found and html.unescape(found[1])
    if value:
        named = dataset.page_values()
        text = "" if named and "next" not in named else str(value).strip()
        is_url = isinstance(value, str | int) and text.isprintable() and len(text) <= MAX_URL
        if text and (not is_url or isinstance(value, bool)):
            raise ValueError(f"{text[:1000]!r} names no page")
        urllib.parse.urlsplit("" if named else text)  # raises ValueError for what is no address
        file.seek(0)
        digest = hashlib.file_digest(cast(io.BytesIO, file), "sha256").hexdigest()[:32]
        yield FIELDS_AS_JSON.encode({"page": str(page + 1), "next": text} | ({NAMED_BY: digest} if text else {}))


def _gunzipped(file: BinaryIO, most: int) -> BinaryIO:
    """The content of a gzip file, `most` bytes of it at most; nothing when it is broken."""
    import gzip

    file.seek(0)
    with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(file) as unpacked:
        return io.BytesIO(unpacked.read(most))
    return io.BytesIO()


def unpack(blocks: Iterable[bytes], coding: str) -> Iterator[bytes]:
    """Undo gzip or deflate, at most a block at a time. Raises zlib.error unless the stream is whole: urllib3 accepts
    half of one. After its end another stream may follow, or zeros, as gzip(1) has it."""
    stream = None
    for block in blocks:
        rest = block
        while rest := rest.lstrip(b"\0") if stream and stream.eof else rest:
            if stream is None or stream.eof:
                is_raw = rest[0] & 0x8F != 8  # deflate without the header of zlib, as some servers send it
                stream = zlib.decompressobj(31 if coding == "gzip" else -15 if is_raw else 15)
            yield stream.decompress(rest, BLOCK_BYTES)
            rest = stream.unconsumed_tail or stream.unused_data
    if stream and not stream.eof:
        yield stream.flush()
    if not (stream and stream.eof):
        raise zlib.error(f"its {coding} stream ended early")


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
    """A file from its start, a block at a time."""
    file.seek(0)
    return iter(functools.partial(file.read, BLOCK_BYTES), b"")


def checksums(validation: Validation, fields: Fields) -> dict[str, str]:
    """The checksums that a body must have, by algorithm. Some sources write them as md5:..."""
    texts = {"sha256": validation.sha256, "md5": validation.md5}
    wanted = {name: Template(text, FIELD_IN_EXPRESSION).render(fields, str) for name, text in texts.items() if text}
    return {name: text.strip().lower().removeprefix(f"{name}:") for name, text in wanted.items()}


def _size_problem(validation: Validation, size: int) -> str | None:
    if size < validation.min_bytes:
        return f"{size} bytes, fewer than {validation.min_bytes}"
    return f"{size} bytes, more than {validation.most()}" if size > validation.most() else None


def _flaws(validation: Validation, fields: Fields, file: BinaryIO, content: BinaryIO) -> Iterator[str]:
    """Why a body is not the object, whatever its JSON says. `content` is what a gzip file holds."""
    size = file.seek(0, io.SEEK_END)
    if problem := _size_problem(validation, size):
        yield problem
    starts, ends = bytes.fromhex(validation.starts_with_hex), bytes.fromhex(validation.ends_with_hex)
    for place, expected in ((0, starts), (max(0, size - len(ends)), ends)):
        file.seek(place)
        if file.read(len(expected)) != expected:
            yield "its first or last bytes are not those of its format"
    try:
        for _ in unpack(blocks_of(file), "gzip") if validation.gzip else ():
            pass
    except zlib.error as error:
        yield f"incomplete gzip: {error}"
    for name, checksum in checksums(validation, fields).items():
        file.seek(0)
        algorithm = functools.partial(hashlib.new, name, usedforsecurity=False)
        actual = hashlib.file_digest(cast(io.BytesIO, file), algorithm).hexdigest()
        if actual != checksum:
            yield f"its {name} is {actual}, not {checksum[:64]}"
    wanted, unwanted = (
        [Template(part, FIELD_IN_EXPRESSION).render(fields, str) for part in parts]
        for parts in (validation.contains, validation.not_contains)
    )
    found = _texts_in(content, {*wanted, *unwanted})
    yield from (f"does not contain {text!r}" for text in wanted if text not in found)
    yield from (f"contains {text!r}" for text in unwanted if text in found)


def _texts_in(file: BinaryIO, texts: Collection[str]) -> set[str]:
    """Those of some texts that are in a file, of which a block at a time is read."""
    wanted, found, end = {text: text.encode() for text in texts}, set[str](), b""
    file.seek(0)
    while len(found) < len(wanted) and (block := file.read(BLOCK_BYTES)):
        window = end + block
        found |= {text for text in wanted.keys() - found if wanted[text] in window}
        end = window[-max(map(len, wanted.values())) :]
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _ids(child: Dataset, fields: Fields, document: Any, file: BinaryIO, problems: list[str]) -> Iterator[str]:
    """The ids of a dataset in a parent's body, several fields of one as JSON. Texts and whole numbers can be ids; null,
    false (of `over && id`) and empty texts are none; any other value is added to the problems."""
    partitions, names = child.partitions, child.partitions.id_fields()
    if partitions.regex:
        file.seek(0)
        text = html.unescape(file.read().decode("utf-8", "replace"))
        found: Any = [match.groupdict() or match[1] for match in re.finditer(partitions.regex, text)]
    else:
        try:
            found = search(partitions.ids or "", fields, document)
        except ValueError as error:
            problems.append(f"{child.name}: {error}")
            return
    for value in found if isinstance(found, list) else [found]:
        if value in (None, "") or value is False:
            continue
        members = {names[0]: value} if partitions.id_field else value
        parts = [members.get(name) for name in names] if isinstance(members, dict) else []
        usable = [isinstance(part, str | int) and not isinstance(part, bool) for part in parts]
        if not usable or not all(usable):
            which = f": its {names[usable.index(False)]} is none" if usable and names[1:] else ""
            problems.append(f"{child.name}: {str(value)[:1000]} is not an id{which}")
            continue
        texts = dict(zip(names, map(str, parts), strict=True))
        if problem := next(filter(None, (part_problem(child, *part) for part in texts.items())), None):
            problems.append(problem)
        else:
            yield texts[names[0]] if partitions.id_field else FIELDS_AS_JSON.encode(texts)


def appraise(dataset: Dataset, season: Season | None, known: ObjectRow, now: float) -> Appraisal:
    """The state of an object, from its facts alone."""
    if known.skipped is not None:
        return Appraisal(ObjectState.SKIPPED)
    if known.etag is None:
        if not known.proven:
            return Appraisal(ObjectState.AWAITED)
        if known.available_at is not None and now < known.available_at:
            return Appraisal(ObjectState.AWAITED, next_at=known.available_at)
        is_absent = known.absent_at is not None and dataset.absent_after is not None
        return Appraisal(ObjectState.ABSENT if is_absent else ObjectState.MISSING)
    if problem := known.verdict or (known.size is not None and _size_problem(dataset.validate, known.size)) or None:
        return Appraisal(ObjectState.SUSPECT, problem)
    if known.outdated:
        return Appraisal(ObjectState.STALE, known.outdated)
    if dataset.copy_of or (dataset.pages and known.fields["page"] != "1"):
        return Appraisal(ObjectState.PRESENT)  # as fresh as its original, or its first page
    freshness, modified = dataset.freshness, known.modified_at or 0
    if freshness.until and known.settled == 0:  # judged, and not final
        if freshness.live and known.live:
            return Appraisal(ObjectState.STALE, "live", modified + freshness.live.every)
        return Appraisal(ObjectState.STALE, "not final yet", modified + (freshness.refetch_every or HOUR))
    due_at = min(_refetch_instants(dataset, season, known), default=None)
    if due_at is not None and due_at <= now:
        return Appraisal(ObjectState.STALE, f"last fetched {utc_text(modified)}", due_at)
    return Appraisal(ObjectState.PRESENT, next_at=due_at)


def _refetch_instants(dataset: Dataset, season: Season | None, known: ObjectRow) -> Iterator[int]:
    """When a present, valid object must be fetched again. A rule that is met gives no instant."""
    freshness, modified = dataset.freshness, known.modified_at or 0
    if freshness.live and known.live and not freshness.until:
        yield modified + freshness.live.every
    if freshness.refetch_every and not freshness.until:
        yield modified + freshness.refetch_every
    if freshness.refetch_once_after:
        since = known.seen_at or modified
        if known.day:
            since = end_of_step(dataset, known.fields)
        yield from (since + after for after in freshness.refetch_once_after if modified < since + after)
    if season and (freshness.current or freshness.past):
        over = season.over()
        if modified < over:  # fetched during its season: refetched once more when that is over
            yield min(modified + freshness.current, over) if freshness.current else over
        elif freshness.past:
            yield modified + freshness.past


def may_still_appear(dataset: Dataset, season: Season | None, known: ObjectRow, now: float) -> bool:
    """Whether a source may have an object later that it does not have now: it is recent, or its age is unknown."""
    if known.day:
        return now < end_of_step(dataset, known.fields) + 7 * DAY
    return season is None or day_of(now) <= season.finish + datetime.timedelta(days=30)


# ---------------------------------------------------------------- Inspector
# A source chooses how long a regular expression takes over its content, and how much memory a document. Both are left
# to a process that can be ended, which is started when first needed. Headlines: inspect_apart(), is_found_apart().

APART_BYTES = 256 << 10  # of content, above which JSON is read apart
APART_SECONDS = 10
READY_SECONDS = 60  # for the process to take a call
INSPECTOR = "import sys; sys.path.insert(0, sys.argv[1]); import adce; adce.serve_inspections(int(sys.argv[2]))"
LEAST_MEMORY = 1 << 30  # that the process may use; more for a dataset that takes larger objects
MEMORY_FACTOR = 8  # JSON in memory is so many times larger
COSTLY = "its inspection takes more than "
SHOWN = 300  # characters of a finding
STOPPING_SECONDS = 2  # for the last result when the runner stops
INHERITED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR")


def inherited() -> dict[str, str]:
    """The variables that every program of ADCE gets."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


class TooCostlyError(Error):
    """A call took more time or memory than it may."""


class Inspector:
    """Calls functions in another process, one at a time."""

    ends_at: ClassVar[float] = math.inf  # monotonic seconds: the runner stops, and no call goes on or begins

    def __init__(self) -> None:
        self.costly = set[str]()  # sources whose content has kept the others waiting
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def call(self, memory: int, function: Callable[..., Any], file: BinaryIO | None = None) -> Any:
        """The result of a function of this module; a file becomes its last argument.

        Raises TooCostlyError, StoreError when there can be no process now, or Error when the runner stops."""
        with self._lock:
            for _ in range(2):  # something else may have ended the process: a call that does so again is the cause
                with contextlib.suppress(EOFError, OSError):
                    return self._call(memory, function, file)
                self.end()
        raise TooCostlyError(f"{COSTLY}{memory >> 20} MB of memory")

    def _call(self, memory: int, function: Callable[..., Any], file: BinaryIO | None) -> Any:
        from multiprocessing.connection import Connection

        if self._process is None or self._process.poll() is not None:
            self._start()
        channel = cast(socket.socket, self._socket)
        with Connection(os.dup(channel.fileno())) as connection:
            connection.send((memory, function, file is not None))
            if file:
                descriptor = file.fileno()  # which may bring it from memory to the disk
                file.seek(0, io.SEEK_END)  # nothing stays in its buffer: the process moves the place of both
                socket.send_fds(channel, [b"f"], [descriptor])
            # A busy machine starts a process slowly: that is not the content's fault.
            self._receive(connection, READY_SECONDS, StoreError("the process for its content does not start"))
            return self._receive(connection, APART_SECONDS, TooCostlyError(f"{COSTLY}{APART_SECONDS} s"))

    def _receive(self, connection: Connection, seconds: float, error: Error) -> Any:
        until = time.monotonic() + seconds
        while not connection.poll(POLL_SECONDS / 2):
            if time.monotonic() > min(until, self.ends_at):
                self.end()
                raise Error("the runner stops") if time.monotonic() > self.ends_at else error
        return connection.recv()

    def _start(self) -> None:
        self.end()
        here = str(Path(__file__).resolve().parent)
        self._socket, theirs = socket.socketpair()
        database = os.path.realpath(os.environ.get("ADCE_DB", ""))  # of the runner, which finds it in a sweep
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603  # this very program
                    [sys.executable, "-c", INSPECTOR, here, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    cwd="/",  # it keeps no folder busy
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=inherited() | {"ADCE_DB": database, "ADCE_TASK": "inspection"},
                    start_new_session=True,
                )
            except OSError as error:
                raise StoreError(f"cannot start a process for its content: {error.strerror}") from error

    def end(self) -> None:
        """End the process, and with it the call that it is at."""
        if self._process and self._socket:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._process = None


@functools.cache
def inspector(source: str = "") -> Inspector:  # noqa: ARG001  # by which it is found again
    """The inspector of this process that the sources share, or the one of a costly source."""
    made = Inspector()
    atexit.register(made.end)
    return made


def _call_apart(source: str, memory: int, function: Callable[..., Any], file: BinaryIO | None = None) -> Any:
    shared = inspector()
    try:
        return (inspector(source) if source in shared.costly else shared).call(memory, function, file)
    except TooCostlyError:
        shared.costly.add(source)
        raise


def serve_inspections(descriptor: int) -> None:
    """The process of an inspector: calls until its socket is closed, or one takes too much memory."""
    import resource
    from multiprocessing.connection import Connection

    sys.modules["__main__"] = sys.modules[__name__]  # the runner may be a script
    connection, channel = Connection(os.dup(descriptor)), socket.socket(fileno=descriptor)
    with contextlib.suppress(EOFError, MemoryError):
        while True:
            memory, function, has_file = connection.recv()
            connection.send("taken")
            seconds = math.ceil(time.process_time()) + 2 * APART_SECONDS  # if the runner was killed
            for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
                hard = resource.getrlimit(kind)[1]
                resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
            if has_file:
                with os.fdopen(socket.recv_fds(channel, 1, 1)[1][0], "rb") as file:
                    connection.send(function(file))
            else:
                connection.send(function())


def inspect_apart(
    dataset: Dataset, fields: Fields, body: BinaryIO, children: Sequence[Dataset], links: Links
) -> Inspection:
    """inspect(), in another process when the source may choose what it costs."""
    pages, rules = dataset.pages, dataset.validate
    has_regex = any(child.partitions.regex for child in children)
    has_regex = has_regex or bool(pages and pages.next not in (None, LINK) and not pages.is_expression())
    body.seek(0)
    is_packed, size, is_json = body.read(2) == GZIP_MAGIC, body.seek(0, io.SEEK_END), needs_json(dataset, children)
    is_unpacked = is_packed and (is_json or rules.contains or rules.not_contains)
    if not (has_regex or is_unpacked or (is_json and size > APART_BYTES)):
        found = inspect(dataset, fields, body, children, links)
    else:
        memory = max(LEAST_MEMORY, MEMORY_FACTOR * rules.most())
        judge = functools.partial(inspect, dataset, fields, children=tuple(children), links=links)
        with contextlib.ExitStack() as opened:
            if isinstance(body, io.BytesIO):
                file = cast("BinaryIO", opened.enter_context(tempfile.TemporaryFile()))
                file.write(body.getbuffer())
                body = file
            try:
                found = _call_apart(dataset.source, memory, judge, body)
            except TooCostlyError as error:
                return Inspection(str(error))
    mentions, names = dict(found.mentions), hidden_names(dataset)
    if named := mentions.get(PAGES):
        mentions[PAGES] = tuple(redacted("\n".join(named), dataset.secrets).split("\n"))  # of JSON
    verdict = found.verdict and redacted(found.verdict, names)[:SHOWN]
    problems = tuple(redacted(text, names)[:SHOWN] for text in found.problems[:10])
    return dataclasses.replace(found, mentions=mentions, verdict=verdict, problems=problems)


def is_found_apart(source: str, pattern: str, text: str) -> bool:
    """Whether a regular expression is found; one that repeats nothing takes no time. Raises TooCostlyError."""
    search_it = functools.partial(_is_found, pattern, text)
    is_simple = not re.search("[*+?{]", pattern)
    return search_it() if is_simple else cast(bool, _call_apart(source, LEAST_MEMORY, search_it))


def _is_found(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


# ---------------------------------------------------------------- Store
# The objects that exist, in a folder or in S3, behind the same few calls. An object is stored whole or not at all.
# Headlines: Store, FolderStore, S3Store, open_store().


class StoredObject(NamedTuple):
    """One object as the store lists it."""

    key: str
    size: int  # bytes
    etag: str  # changes whenever the content does
    modified_at: int  # seconds since 1970


SPOOL_NAME = "[0-9a-f]{16}"  # of files in the staging folder; no other file there is ADCE's


def fill(file: BinaryIO, body: Any) -> None:
    """Write bytes, or all of another file, into a file of spool(). Raises StoreError."""
    try:
        if isinstance(body, bytes):
            file.write(body)
        else:
            shutil.copyfileobj(body, file)
        file.flush()
    except OSError as error:
        raise StoreError(f"cannot write a body: {error.strerror}") from error


class FolderStore:
    """A folder. Every part of a key is a folder below it; a link below it is never followed.

    Every call raises StoreError when the store fails, or UnusablePathError when one place in it does."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.is_swept = root, 0, False

    def sweep(self) -> None:
        """Make the store usable, and remove unfinished files of a crash."""
        with self._translated():
            staging = self._staging()
            staging.mkdir(parents=True, exist_ok=True)
            for leftover in staging.iterdir():
                if re.fullmatch(SPOOL_NAME, leftover.name):
                    leftover.unlink()
            tempfile.TemporaryFile(dir=staging).close()  # what was there already may be mounted to be read only
        self.is_swept = True

    @contextlib.contextmanager
    def _translated(self, action: str = "") -> Iterator[None]:
        """Raises StoreError for an OSError; an action that fails in one place only is an UnusablePathError."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOENT and not self.root.is_dir():
                raise self._gone() from error
            of_one_place = IsADirectoryError | NotADirectoryError | FileExistsError | PermissionError
            is_local = isinstance(error, of_one_place) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
            text = f"cannot {action}" if action else f"the store {self.root} cannot be written"
            kind = UnusablePathError if action and is_local else StoreError
            raise kind(f"{text}: {error.strerror}", "see `store:` in adce.yaml") from error

    def _staging(self) -> Path:
        """The staging folder. Raises StoreError for a link, which could lead anywhere."""
        staging = self.root / STAGING
        if staging.is_symlink():
            raise StoreError(f"{staging} is a link", "remove it; a folder takes its place")
        return staging

    def require_mark(self) -> None:
        """Raises StoreError when the staging folder is gone, as on a disk that is not mounted."""
        if not self._staging().is_dir():
            raise self._gone()

    def _gone(self) -> StoreError:
        hint = f"is its disk mounted? if all of it is lost, fill it anew: mkdir -p {self.root / STAGING}"
        return StoreError(f"the store {self.root} is not there: it has no folder {STAGING}", hint)

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """Every object whose key starts with the prefix and comes after another key, folder by folder, sorted as S3
        sorts: a folder counts as its name with a slash."""
        if self.is_swept:
            self.require_mark()
        yield from self._walk(prefix[: prefix.rfind("/") + 1], prefix, after)

    def _walk(self, above: str, prefix: str, after: str) -> Iterator[StoredObject]:
        self.calls += 1
        with self._translated(f"list {self.root / above}"), contextlib.suppress(FileNotFoundError):
            with self._folder(f"{above}*") as (folder, _), os.scandir(folder) as scan:
                found = (above + entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in scan)
                keys = sorted(key for key in found if key.startswith(prefix) and key.isprintable())
            for key in keys:
                if key.endswith("/"):
                    is_usable = key != f"{STAGING}/" and len(key) <= MAX_KEY_BYTES  # no key is longer
                    if is_usable and (key > after or after.startswith(key)):
                        yield from self._walk(key, prefix, after)
                elif key > after:
                    with contextlib.suppress(FileNotFoundError):
                        status = (self.root / key).lstat()
                        if stat.S_ISREG(status.st_mode):
                            yield self._stored(key, status)

    def find(self, key: str) -> StoredObject | None:
        """One object as it would be listed."""
        with self._translated(f"look for {key}"), contextlib.suppress(FileNotFoundError):
            with self._folder(key) as (folder, name):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            return self._stored(key, status) if stat.S_ISREG(status.st_mode) else None
        return None

    def open(self, key: str) -> BinaryIO:
        """The content of an object, to be read and sought in. Raises KeyError when there is none."""
        with self._translated(f"read {key}"), contextlib.suppress(FileNotFoundError), self._folder(key) as (here, name):
            return open_regular(name, here)
        raise KeyError(key)

    @contextlib.contextmanager
    def spool(self) -> Iterator[BinaryIO]:
        """A file for a body that may become an object; else it is removed. Raises StoreError on a full disk."""
        with self._translated():
            staging = self._staging()
            disk = os.statvfs(staging)
            if disk.f_blocks and not disk.f_bavail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            path = staging / secrets.token_hex(8)
            file = path.open("x+b")
        try:
            yield file
        finally:
            for undo in (file.close, path.unlink):
                with contextlib.suppress(OSError):  # it is an object now, or its disk is full or read-only
                    undo()

    def write(self, key: str, body: bytes | BinaryIO) -> StoredObject:
        """Put an object whole or not at all, durably. A file of spool() is moved, the first time.

        Write aside, fsync, rename, fsync the folder: a power cut leaves the old object or the new one."""
        path = Path(str(getattr(body, "name", "")))
        if isinstance(body, bytes) or path.parent != self._staging() or not path.exists():
            with self.spool() as copied:
                fill(copied, body)
                return self.write(key, copied)
        with self._translated():
            body.flush()
            os.fsync(body.fileno())
        with self._translated(f"write {key}"):
            with self._folder(key, make=True) as (folder, name):
                os.rename(path, name, dst_dir_fd=folder)
                os.fsync(folder)
            return self._stored(key, os.fstat(body.fileno()))

    @contextlib.contextmanager
    def _folder(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder of a key, and the name in it: no link that is put there meanwhile is followed. Raises OSError
        for a link, UnusablePathError for a key that leads out of the store, which a foreign database may hold."""
        *folders, name = parts = key.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or parts[0] == STAGING or "\0" in key:
            raise UnusablePathError(f"{key!r} cannot be a file of the store: an empty name, . or .. is in it")
        if not self.root.is_dir():
            raise self._gone()
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, here := os.open(self.root, os.O_DIRECTORY))
            for part in folders:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=here)
                        os.fsync(here)
                opened.callback(os.close, here := os.open(part, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here))
            yield here, name

    @staticmethod
    def _stored(key: str, status: os.stat_result) -> StoredObject:
        return StoredObject(key, status.st_size, f"{status.st_mtime_ns}-{status.st_size}", status.st_mtime_ns // 10**9)


LISTED = ("Key", "Size", "ETag", "LastModified")
SPOOLED_BYTES = 1 << 20  # of a body, held in memory
MULTIPART_BYTES = 8 << 20  # an object that is larger is uploaded in parts
EMPTY_PAGES = 1000  # of a listing; more in a row are an error


class S3Store:
    """A bucket, or what lies below a prefix in one. Credentials and endpoint come from where boto3 looks."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.above, self.calls, self._taken = bucket, f"{prefix}/" if prefix else "", 0, STAGING

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        import botocore.config

        retries = {"mode": "standard", "max_attempts": 3}
        config = botocore.config.Config(connect_timeout=10, read_timeout=60, retries=retries)
        with self._translated("use"):
            client = boto3.session.Session().client("s3", config=config)
        client.meta.events.register("before-parse.s3.ListObjectsV2", self._take_entries)
        return client

    def sweep(self) -> None:
        """See that the bucket is there. S3 keeps nothing half written."""
        with self._translated("use"):
            self._client.head_bucket(Bucket=self.bucket)

    def require_mark(self) -> None:
        """A bucket is never made, so it cannot be another one."""

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """Page by page, a thousand keys a request."""
        start = {"StartAfter": self.above + after} if after > prefix else {}
        pages, empty = self._client.get_paginator("list_objects_v2"), 0
        with self._translated("list"):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.above + prefix, **start):
                self.calls += 1
                if "IsTruncated" not in page:
                    raise ValueError("the response is not a listing")
                empty = 0 if page.get("Entries") else empty + 1
                if page["IsTruncated"] and ("NextContinuationToken" not in page or empty > EMPTY_PAGES):
                    raise ValueError("the listing is truncated and has no continuation token")
                yield from page.get("Entries", ())

    def _take_entries(self, response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
        """Parse the objects of a page before botocore does, which takes seven times as long."""
        from xml.etree import ElementTree

        with contextlib.suppress(ElementTree.ParseError):  # botocore has a message for it
            page = ElementTree.fromstring(response_dict["body"])  # noqa: S314  # expat limits what entities expand to
            namespace = page.tag.removesuffix("ListBucketResult")
            unquote = urllib.parse.unquote_plus if page.findtext(f"{namespace}EncodingType") == "url" else str
            names, entries = [namespace + name for name in LISTED], list[StoredObject]()
            for element in page.findall(f"{namespace}Contents"):
                key, size, etag, modified = (element.findtext(name, "") for name in names)
                if not (key and etag and 0 <= int(size) < 1 << 63):
                    raise ValueError("a listed object has no key, no ETag or no usable size")
                modified_at = int(datetime.datetime.fromisoformat(modified).timestamp())
                key = unquote(key).removeprefix(self.above)
                entries.append(StoredObject(key, int(size), etag.strip('"'), modified_at))
                page.remove(element)
            customized_response_dict["Entries"] = entries
            response_dict["body"] = ElementTree.tostring(page)

    def find(self, key: str) -> StoredObject | None:
        """One object as it would be listed."""
        with contextlib.suppress(KeyError), self._translated("find", key):
            head = self._client.head_object(Bucket=self.bucket, Key=self.above + key)
            modified_at = int(head["LastModified"].timestamp())
            return StoredObject(key, head["ContentLength"], head["ETag"].strip('"'), modified_at)
        return None

    def open(self, key: str) -> BinaryIO:
        """A copy of the content of an object. Raises KeyError when there is none."""
        with self._translated("read", key), contextlib.ExitStack() as opened:
            copied = opened.enter_context(self.spool())
            fill(copied, self._client.get_object(Bucket=self.bucket, Key=self.above + key)["Body"])
            copied.seek(0)
            opened.pop_all()
            return copied

    def spool(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file without a name, in memory while it is small."""
        return tempfile.SpooledTemporaryFile(SPOOLED_BYTES, dir=os.environ.get("TMPDIR", "/var/tmp"))  # type: ignore[return-value]  # noqa: S108

    def write(self, key: str, body: bytes | BinaryIO) -> StoredObject:
        """A PUT, or a multipart upload, which S3 takes whole or not at all, with checksums that S3 verifies."""
        file = io.BytesIO(body) if isinstance(body, bytes) else body
        size, place = file.seek(0, io.SEEK_END), {"Bucket": self.bucket, "Key": self.above + key}
        file.seek(0)
        with self._translated("write", key):
            if size > MULTIPART_BYTES:
                from boto3.s3.transfer import TransferConfig

                with_checksum = {"ChecksumAlgorithm": "SHA256"}
                in_turn = TransferConfig(multipart_threshold=MULTIPART_BYTES, use_threads=False)  # a part in memory
                self._client.upload_fileobj(file, **place, ExtraArgs=with_checksum, Config=in_turn)
                return cast(StoredObject, self.find(key))
            answer = self._client.put_object(**place, Body=file, ChecksumAlgorithm="SHA256")
        self._taken = key
        modified_at = http_date(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return StoredObject(key, size, answer["ETag"].strip('"'), int(modified_at.timestamp()))

    @contextlib.contextmanager
    def _translated(self, action: str, key: str = "") -> Iterator[None]:
        """Errors of boto3 are StoreErrors; a missing object is a KeyError."""
        import boto3.exceptions
        import botocore.exceptions

        libraries = botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, boto3.exceptions.Boto3Error
        try:
            yield
        except (*libraries, LookupError, RecursionError, TypeError, ValueError) as error:  # of what is no answer of S3
            answer = getattr(error, "response", {})
            code, status = answer.get("Error", {}).get("Code"), answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if key and code in ("NoSuchKey", "404"):
                raise KeyError(key) from None
            if code in ("NoSuchBucket", "404"):
                raise StoreError(f"there is no bucket {self.bucket}", "see `store:` in adce.yaml") from error
            hint = "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL, or ~/.aws"
            is_local = action == "write" and 400 <= (status or 0) < 500 and self._takes_others()
            text = redacted(str(error), ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
            kind = UnusablePathError if is_local else StoreError
            raise kind(f"cannot {action} s3://{self.bucket}/{self.above}{key}: {text}", hint) from error

    def _takes_others(self) -> bool:
        """Whether an upload can begin where the last object was put. It is given up at once."""
        place, upload = {"Bucket": self.bucket, "Key": self.above + self._taken}, None
        with contextlib.suppress(Exception):  # then all of the store refuses
            upload = self._client.create_multipart_upload(**place)
            self._client.abort_multipart_upload(**place, UploadId=upload.get("UploadId"))
        return upload is not None


Store = FolderStore | S3Store


def require_known_store(database: Database, configuration: Configuration, store: Store) -> None:
    """Raises StoreError when the store that this database was used with is gone, such as a disk that is not mounted."""
    if database.value("select store from facts") == configuration.store:
        store.require_mark()


def prepare_store(database: Database, configuration: Configuration, store: Store) -> None:
    """Make the store usable. Raises StoreError."""
    database.check_file()
    require_known_store(database, configuration, store)
    store.sweep()
    with database.transaction() as sql:
        sql.execute("update facts set store = ?", (configuration.store,))


def open_store(address: str) -> Store:
    """The store at a folder or at s3://bucket/prefix. Nothing is touched yet."""
    if address.startswith("s3://"):
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix.strip("/"))
    return FolderStore(Path(address))


# ---------------------------------------------------------------- Limits
# A request is granted only if, in every window of its source and of global, (in flight) + (finished less
# than W ago) < N. It reaches the server between grant and finish, so no server sees N + 1 requests inside
# W, whatever the latency. Clients are served in order of arrival by one rule: earlier waiters count as in
# flight. Nothing here sleeps; every function works inside the caller's transaction, with a boot time read
# after it began. Headlines: opening(), grant(), release(), pause().

GLOBAL = "global"
SEND_WITHIN_SECONDS = 10  # an unused permit is void then
RELEASE_WITHIN_SECONDS = 10  # after the end of a request; then its client counts as dead
LATE_SECONDS = 2  # a waiter that does not look again by then is gone


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to send one HTTP request. Boot times."""

    request_id: int
    send_before: float


@dataclass(frozen=True, slots=True)
class Opening:
    """The instant at which asking for a permit is worth it, and what is in the way until then."""

    at: float  # boot
    reason: str = ""
    scope: str = ""  # that is in the way
    is_pause: bool = False


# One row for each window of a source and of global: the requests in flight, the waiters before `owner`, and the
# requests that finished within the window.
OBSERVATION = """
    with observed as materialized (
        select s.*,
               (select count(*) from requests r where s.scope in (r.source, 'global')) as in_flight,
               (select min(deadline) from requests) as deadline,
               (select count(*)
                  from waiters
                 where expires_at >= :now
                   and iif(s.scope = 'global', waits_for = 'global' or opens_at <= :now, source = s.scope)
                   and waiter_id < coalesce(
                       (select waiter_id from waiters where source = :source and owner = :owner),
                       9223372036854775807)) as queue_position,
               (select min(finished_at) from finished f where f.scope = s.scope) as oldest,
               (select number from finished f where f.scope = s.scope order by finished_at desc, number desc limit 1)
                   as last_number
        from scopes s
        where s.scope in (:source, 'global')
    )
    select o.*, w.window_seconds, w.max_requests,
           coalesce(1 + last_number - (
               select number from finished f
               where f.scope = o.scope and f.finished_at > :now - w.window_seconds
               order by finished_at, number limit 1), 0) as used
    from observed o
    left join windows w using (scope)
"""


def declare_limits(sql: sqlite3.Connection, configuration: Configuration, clock: Clock) -> None:
    """Make the stored limits those of the configuration. Earlier requests keep counting."""
    now, boot_id = clock.boot(), clock.boot_id()
    offset = clock.wall() - now
    known = sql.execute("select boot_id, wall_offset from facts").fetchone()
    latest = sql.execute("select max(max(granted_at, paused_until - paused_for)) from scopes").fetchone()[0] or 0
    # A boot may have no name: then one is noticed when the latest grant or pause lies in the future, by more than
    # rounding. One that is not noticed makes limits last longer.
    if known["boot_id"] is not None and (known["boot_id"] != boot_id or latest > now + 1):
        _carry_over_reboot(sql, known["wall_offset"] - offset)
    sql.execute("update facts set boot_id = ?, wall_offset = ?", (boot_id, offset))
    sql.execute("delete from windows")
    for scope in (*configuration.sources, GLOBAL):
        limits = configuration.rate_limiting.scopes.get(scope, ScopeLimits())
        sql.execute(
            """
            insert into scopes (scope, tokens, tokens_at, burst_size, refill_per_second)
            values (?1, coalesce(?2, 0), ?4, ?2, ?3)
            on conflict do update set burst_size = ?2, refill_per_second = ?3
            """,
            (scope, limits.burst_size, limits.refill_per_second, now),
        )
        rows = [(scope, limit.seconds, limit.max_requests) for limit in limits.windows]
        sql.executemany("insert into windows values (?, ?, ?)", rows)
    if sql.execute("update facts set is_backup = 0 where is_backup").rowcount:
        text = "restored from a backup: what was asked since it was made is not known"
        longest = "select scope, max(window_seconds) from windows group by scope"
        for scope, seconds in sql.execute(longest).fetchall():
            pause(sql, scope, seconds, text, now)


def _carry_over_reboot(sql: sqlite3.Connection, shift: float) -> None:
    """Boot times start again at 0. All earlier requests count as finished at that instant, which is later than the
    truth and so never grants too early. `shift` is the old wall offset less the new one."""
    sql.execute("update finished set finished_at = 0")
    _count(sql, sql.execute("delete from requests returning source").fetchall(), 0.0)
    sql.execute("delete from waiters")
    sql.execute(
        """
        update scopes
        set granted_at = 0, tokens = 0, tokens_at = 0,
            paused_until = max(0, min(paused_for, paused_until + :shift))
        """,
        {"shift": shift},
    )


def opening(sql: sqlite3.Connection, limiting: RateLimiting, source: str, now: float, owner: str = "") -> Opening:
    """When this source can be asked: `at <= now` means now. O(log n) in the stored requests.

    Waiters that arrived before `owner` come first, and all of them if `owner` does not wait yet."""
    rows = sql.execute(OBSERVATION, {"source": source, "owner": owner, "now": now}).fetchall()
    # an hour is always kept, for limits that are declared or enabled later
    counts_from = now - max([HOUR, *(limit.seconds for one in limiting.scopes.values() for limit in one.windows)])
    if any((row["deadline"] or now) < now or (row["oldest"] or now) < counts_from - MINUTE for row in rows):
        # The clients of overdue requests are dead. The requests finish now, not when they were granted.
        _count(sql, sql.execute("delete from requests where deadline < ? returning source", (now,)).fetchall(), now)
        sql.execute("delete from finished where scope in (?, 'global') and finished_at <= ?", (source, counts_from))
        return opening(sql, limiting, source, now, owner)
    candidates = (candidate for row in rows for candidate in _openings(sql, row, limiting.backoff, now))
    return max(candidates, key=lambda candidate: candidate.at, default=Opening(now))


def _openings(sql: sqlite3.Connection, row: sqlite3.Row, backoff: Backoff | None, now: float) -> Iterator[Opening]:
    """The obstacles that one window and its scope put in the way now."""
    scope, position = row["scope"], row["queue_position"]
    if row["paused_until"] > now:
        yield Opening(row["paused_until"], row["reason"] or "paused", scope, is_pause=True)
    if row["throttles"] and row["in_flight"] + position:
        yield Opening(now + 1, "waits for the response that shows whether it is back", scope)
    if row["burst_size"]:
        tokens = row["tokens"] + (now - row["tokens_at"]) * row["refill_per_second"]
        lacking = 1 + position - min(float(row["burst_size"]), tokens)
        if lacking > 1e-9:
            opens_at = now + lacking / row["refill_per_second"]
            yield Opening(opens_at, f"{scope}: bucket of {row['burst_size']} empty", scope)
    if (most := row["max_requests"]) is None:
        return
    name, taken = f"{scope}: {most} in {row['window_seconds']:g} s", row["used"] + row["in_flight"] + position
    if taken >= most:
        yield Opening(_leaves_at(sql, row, taken - most, now), f"{name} used up", scope)
    elif backoff and most > 1 and (past := taken - math.ceil(most * backoff.threshold_percent / 100)) >= 0:
        leaves_at = _leaves_at(sql, row, 0, now)  # then there may be less to slow down
        last: float = now if position else row["granted_at"]  # those before it come first, now or later
        growing = backoff.initial_delay_seconds * backoff.exponential_factor ** min(past, 64)
        delay = min(growing, backoff.max_delay_seconds)
        if not backoff.strict:  # longer than the rest spread evenly, it would leave 10 to 20% of the quota unused
            delay = min(delay, max(0.0, leaves_at - last) / (most - taken + 1))
        if min(leaves_at, last + delay) > now + 1e-6:  # less is rounding
            yield Opening(min(leaves_at, last + delay), f"{name} nearly used up", scope)


def _leaves_at(sql: sqlite3.Connection, row: sqlite3.Row, index: int, now: float) -> float:
    """When this one of the requests in a window, the oldest first, leaves it. Those that are still to finish take one
    window for each N of them, at the least."""
    seconds: float = row["window_seconds"]
    counted = """
        select finished_at from finished
        where scope = ? and finished_at > ?
        order by finished_at, number limit 1 offset ?
    """
    for (finished_at,) in sql.execute(counted, (row["scope"], now - seconds, index)).fetchall():
        leaves_at: float = finished_at + seconds
        return leaves_at if leaves_at - seconds >= finished_at else math.nextafter(leaves_at, math.inf)  # by rounding
    rounds: int = (row["in_flight"] + row["queue_position"]) // row["max_requests"]
    return now + seconds * max(1, rounds)


def grant(sql: sqlite3.Connection, source: str, timeout_seconds: float, now: float, owner: str = "") -> Permit:
    """Take a permit, and with it the place of `owner` among the waiters. `opening` has just allowed it."""
    if owner:
        sql.execute("delete from waiters where source = ? and owner = ?", (source, owner))
    sql.execute(
        """
        update scopes
        set granted_at = :now,
            -- without a bucket there is no debt either
            tokens = max(0, min(coalesce(burst_size, 0), tokens + (:now - tokens_at) * refill_per_second) - 1),
            tokens_at = :now
        where scope in (:source, 'global')
        """,
        {"now": now, "source": source},
    )
    deadline = now + SEND_WITHIN_SECONDS + timeout_seconds + RELEASE_WITHIN_SECONDS
    inserted = sql.execute("insert into requests values (random(), ?, ?)", (source, deadline))
    return Permit(cast(int, inserted.lastrowid), now + SEND_WITHIN_SECONDS)


def release(sql: sqlite3.Connection, permit: Permit, now: float, *, used: bool = True) -> None:
    """The request of a permit is over, or was never sent."""
    over = sql.execute("delete from requests where request_id = ? returning source", (permit.request_id,)).fetchall()
    if used:
        _count(sql, over, now)


def _count(sql: sqlite3.Connection, requests: Iterable[sqlite3.Row], now: float) -> None:
    """Count requests that were in flight as finished now."""
    sql.executemany(
        """
        insert into finished
        select scope, :now, 1 + coalesce((
                   select number from finished f
                   where f.scope = s.scope
                   order by finished_at desc, number desc limit 1), 0)
        from scopes s
        where scope in (:source, 'global')
        """,
        [{"source": request["source"], "now": now} for request in requests],
    )


def update_waiters(
    sql: sqlite3.Connection, owner: str, openings: Mapping[str, Opening], now: float, seconds: float = 0
) -> bool:
    """Make an owner wait for these sources, and for no others; it keeps its places. Returns whether it waits. It looks
    again after `seconds` at the latest."""
    waiting = {source: opens for source, opens in openings.items() if opens.at > now}
    sql.execute(
        """
        delete from waiters
        where owner = ? and source not in (select value from json_each(?)) or expires_at < ?
        """,
        (owner, json.dumps([*waiting]), now - MINUTE),
    )
    sql.executemany(
        """
        insert into waiters (source, owner, waits_for, opens_at, reason, expires_at)
        values (?1, ?2, ?3, ?4, ?5, ?6)
        on conflict do update set waits_for = ?3, opens_at = ?4, reason = ?5, expires_at = ?6
        """,
        [
            (source, owner, opens.scope, opens.at, opens.reason, min(opens.at, now + seconds) + LATE_SECONDS)
            for source, opens in waiting.items()
        ],
    )
    return bool(waiting)


def pause(sql: sqlite3.Connection, scope: str, seconds: float, reason: str, now: float) -> None:
    """Pause a source; an earlier, longer pause stays."""
    sql.execute(
        """
        update scopes
        set paused_until = :until, paused_for = :seconds, reason = :reason
        where scope = :scope and paused_until < :until
        """,
        {"scope": scope, "until": now + seconds, "seconds": seconds, "reason": reason},
    )


# ---------------------------------------------------------------- Permits
# The meaning of a response: one function turns it into an outcome, one records its consequences for the source. A pause
# is a pause, whatever its cause. Then the limits for other threads and processes: a client that must wait joins the
# waiters and sleeps, outside every lock, until its next look is worth it. Headlines: classify(), record_response(),
# Limiter, permit().

FIRST_PAUSE_SECONDS = 60
STORE_TROUBLE = "store: "  # prefix of the reason of a pause that the store caused
LOOK_AGAIN_SECONDS = 5  # the longest sleep: meanwhile a pause may be lifted, a limit raised, a place given up


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one request, or of an attempt at one object."""

    outcome: Outcome
    error: str | None = None
    http_status: int | None = None
    stored: StoredObject | None = None
    inspection: Inspection | None = None
    requests: int = 0
    retry_after: float | None = None  # seconds; from the source, or until a refused permit is possible
    redirect: str | None = None  # the url to ask instead,
    cookies: Any = None  # with these
    headers: Mapping[str, str] | None = None  # of a response that came whole
    validators: str | None = None  # of the stored object, for the next request
    output: str | None = None  # the end of the output of a command
    worker: str | None = None  # of a cluster


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """The consequences of a response for its source."""

    is_source: bool = False  # the source is to blame, not the task
    pause_seconds: float | None = None  # it is not asked for so long


def excerpt(body: bytes, most: int = 120, names: Iterable[str] = ()) -> str:
    """The start of a body in one line of at most `most` characters; half a secret would not be known as one."""
    text = redacted(body[: 3 * most + BLOCK_BYTES].decode("utf-8", "replace"), names)[: 3 * most]
    plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    return printable(plain)[:most] or "empty"


def parse_retry_after(text: str | None, date: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3): a number, the largest of several, or a date less the
    response's own Date, which needs no agreement of clocks. None when it names no instant in the future."""
    seconds, parts = 0.0, (text or "").split(",")
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if all(re.fullmatch(r"\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*", part) for part in parts):
            seconds = max(map(float, parts))
        elif text:
            since = http_date(date) if date else datetime.datetime.now(datetime.UTC)
            seconds = (http_date(text) - since).total_seconds()
    return seconds if seconds > 0 else None


def classify(
    source: Source, status: int, headers: Mapping[str, str], body: bytes = b"", names: Iterable[str] = ()
) -> Result:
    """The meaning of an HTTP response with its start, of which the secrets with these names are not shown. Errors can
    come with status 200, a missing object with 403."""
    shown, blocked = excerpt(body, names=names), source.blocked_when
    text = f"HTTP {status}: {shown}" if body else f"HTTP {status}"
    retry_after = parse_retry_after(headers.get("Retry-After"), headers.get("Date"))
    try:
        is_blocked = blocked.body and is_found_apart(source.name, blocked.body, body.decode("utf-8", "replace"))
    except TooCostlyError as error:
        return Result(Outcome.INVALID, str(error), status)
    if status in (429, 503) or is_blocked:
        longest = blocked.pause_seconds if status in blocked.status else None
        return Result(Outcome.THROTTLED, text, status, retry_after=retry_after or longest)
    if status in blocked.status:
        return Result(Outcome.BLOCKED, text, status, retry_after=retry_after)
    is_error, document = False, None
    if source.error_when:
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(body)
            is_error = document is not None and holds(source.error_when, {}, document)
    code = document.get("code") if is_error and isinstance(document, dict) else None
    unlisted = status == 403 and re.search(rb"<Code>(AccessDenied|NoSuchKey)</Code>", body[:2000])  # S3's
    is_unknown = unlisted and b"Request has expired" not in body[:2000]  # a signed url
    if status in (204, 404, 410) or is_unknown or code in (404, "404"):
        return Result(Outcome.NOT_YET, text, status)
    if is_error and status < 500:
        return Result(Outcome.HTTP_ERROR, f"HTTP {status}, an error: {shown}", status)
    return Result(Outcome.OK if status == 200 else Outcome.HTTP_ERROR, text, status)


def connection_error(error: BaseException) -> tuple[Outcome, str]:
    """The meaning of an exception of urllib3, or of requests around one, for the source. Its text is the innermost
    reason, without the address, which may hold a key."""
    import urllib3

    causes, inner = list[BaseException](), cast(Any, error)
    while isinstance(inner, BaseException):
        causes.append(inner)
        inner = getattr(inner, "reason", None) or inner.__cause__ or inner.__context__
    words = (getattr(causes[-1], "strerror", None) or type(causes[-1]).__name__)[:100]
    if any(isinstance(cause, urllib3.exceptions.SSLError) for cause in causes):
        return Outcome.UNREACHABLE, f"TLS failure: {words}"
    unconnected = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProxyError)
    if any(isinstance(cause, unconnected) for cause in causes):
        return Outcome.UNREACHABLE, f"cannot be reached: {words}"
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return Outcome.TIMEOUT, "timed out"
    if words == "HTTPException":  # the only use of it itself in http.client
        return Outcome.BROKEN, "sent too many headers"
    return Outcome.BROKEN, f"connection closed by server ({words})"


class PrivateAddressError(Error):
    """A redirect leads to an address that only this machine or its network has, or out of TLS."""


def _is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet; one that stands for an IPv4 address is if that is (RFC 6890)."""
    import ipaddress

    found: Any = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6:
        number, ends = int(found), (0, 0xFFFF, 0x64FF9B << 64)  # compatible, mapped, NAT64
        found = found.sixtofour or (ipaddress.IPv4Address(number & 0xFFFFFFFF) if number >> 32 in ends else found)
        if number >> 80 == 0x64FF9B0001 or (found.version == 6 and found.is_site_local):
            return False
    return bool(found.is_global and not found.is_multicast)


def require_public(source: Source, connection: Any, connected: socket.socket) -> None:
    """Raises PrivateAddressError for a connection to a special address, under whatever name; hosts of adce.yaml may
    have one. A proxy answers for what it connects to."""
    host, peer = connection.host, connected.getpeername()[0]
    place = f"[{host}]" if ":" in host else host
    place = place if connection.port == connection.default_port else f"{place}:{connection.port}"
    is_by_proxy = connection.proxy or hasattr(connection, "_socks_options")
    if not (is_by_proxy or place in source.known_hosts or _is_public(peer)):
        raise PrivateAddressError(f"redirected to {place}, which is {peer}: a private address, which is refused")


def record_response(
    sql: sqlite3.Connection, source: Source, answer: Result, now: float, *, is_repeated: bool = False
) -> SourceHealth:
    """Record what a response says about its source; pause it when it is down or asks for a pause.

    A pause after failures in a row, or for a 429 or 503 without Retry-After, doubles each time until a good response.
    Meanwhile one request at a time probes the source. A status that means blocked, or an error in a body, may concern
    one object only: it blames the source when it comes for several objects in a row. One whose object has failed
    before (`is_repeated`) shows nothing new. A content that cannot be judged in time is like a timeout."""
    traits, outcome, status = answer.outcome.traits, answer.outcome, answer.http_status or 0
    is_throttled, is_error_body = outcome is Outcome.THROTTLED, outcome is Outcome.HTTP_ERROR and 200 <= status < 300
    is_costly = outcome is Outcome.INVALID and (answer.error or "").startswith(COSTLY)
    if traits.passing or (is_repeated and (outcome is Outcome.BLOCKED or is_error_body or is_costly)):
        return SourceHealth()
    is_server_error = is_error_body or (outcome is Outcome.HTTP_ERROR and status >= 500)
    setting = "timeouts_in_a_row" if is_costly else "failures_in_a_row" if is_server_error else traits.setting
    threshold = getattr(source.blocked_when, setting) if setting else traits.source_after
    if outcome is Outcome.BROKEN and status:  # the body ended early: the object's own trouble
        threshold = 0
    if not threshold and not is_throttled:  # a request from before a pause shows nothing new
        works = """
            update scopes set failures = 0, throttles = 0
            where scope = ? and paused_until <= ? and (failures or throttles)
        """
        sql.execute(works, (source.name, now))
        return SourceHealth()
    state = "select failures, throttles, paused_until from scopes where scope = ?"
    failures, throttles, paused_until = sql.execute(state, (source.name,)).fetchone()
    failures = 0 if is_throttled else failures + 1
    longest, is_paused, seconds = source.blocked_when.pause_seconds, paused_until > now, None
    if answer.retry_after is not None:
        seconds = min(answer.retry_after, DAY)
    elif not is_paused and outcome in (Outcome.TIMEOUT, Outcome.BLOCKED) and failures >= threshold:
        seconds = longest
    elif not is_paused and (is_throttled or failures >= threshold):
        seconds = min(FIRST_PAUSE_SECONDS * 2.0 ** min(throttles, 30), max(longest, FIRST_PAUSE_SECONDS))
    if seconds is not None:
        throttles += not (is_paused and throttles)
        pause(sql, source.name, seconds, answer.error or outcome, now)
    sql.execute("update scopes set failures = ?, throttles = ? where scope = ?", (failures, throttles, source.name))
    # a scraper or a page that fails may be to blame itself; twice in a row no response at all is not its fault
    is_source = not is_throttled and failures >= (threshold if traits.rated else 2)
    return SourceHealth(is_source, seconds)


class ActivePermit:
    """A permit in use. Report how the request ended, and a 429 pauses the source for every client."""

    def __init__(self, permit: Permit, source: Source) -> None:
        self.permit, self.source = permit, source
        self.answer: Result | None = None

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        """The source answered with this HTTP status and these headers."""
        self.answer = classify(self.source, status, headers)

    def failed(self, outcome: Outcome, text: str) -> None:
        """No response came: TIMEOUT, UNREACHABLE or BROKEN, and why."""
        self.answer = Result(outcome, text)


class Limiter:
    """The limits of one configuration, shared by the threads of this process and by all processes."""

    def __init__(self, configuration: Configuration, database: Database, clock: Clock | None = None) -> None:
        self.configuration, self.database, self.clock = configuration, database, clock or Clock()
        with database.transaction() as sql:
            declare_limits(sql, configuration, self.clock)

    def source(self, name: str) -> Source:
        """The source of that name. Raises Error when there is none."""
        if name not in self.configuration.sources:
            raise Error(f'source "{name}" is not defined{suggest(name, self.configuration.sources)}')
        return self.configuration.sources[name]

    @contextlib.contextmanager
    def permit(self, source: str, wait: float | None = None) -> Iterator[ActivePermit]:
        """The right to send one HTTP request: waits until the source can be asked, `wait` seconds at most.

        The request counts as in flight until the block ends. A block that ends without an exception got a good
        response, unless it says otherwise. Raises RateLimitedError as soon as `wait` is too short as things are, and
        Error for an unknown source."""
        held = self.acquire(source, wait)
        try:
            yield held
            held.answer = held.answer or Result(Outcome.OK)
        finally:
            self.release(held)

    def acquire(self, source: str, wait: float | None = None) -> ActivePermit:
        """The same without a block: the caller must release() what it gets."""
        described, owner = self.source(source), secrets.token_hex(8)
        give_up_at = math.inf if wait is None else self.clock.boot() + wait
        try:
            while True:
                granted = self._try(described, owner, give_up_at)
                if isinstance(granted, float):
                    self.clock.wait(queue.SimpleQueue(), granted - self.clock.boot())
                elif self.clock.boot() <= granted.send_before:
                    return ActivePermit(granted, described)
                else:  # this process was suspended, or the disk took very long
                    self.release(ActivePermit(granted, described), used=False)
        except BaseException:
            with contextlib.suppress(DatabaseError), self.database.transaction(durable=False) as sql:
                update_waiters(sql, owner, {}, self.clock.boot())
            raise

    def _try(self, source: Source, owner: str, give_up_at: float) -> Permit | float:
        """A permit, or the boot time of the next look."""
        self.database.check_file()
        with self.database.transaction() as sql:
            now, limiting = self.clock.boot(), self.configuration.rate_limiting
            opens = opening(sql, limiting, source.name, now, owner)
            if opens.at <= now:
                return grant(sql, source.name, source.timeout_seconds, now, owner)
            if opens.at > give_up_at:
                wait = opens.at - now
                text = f"{source.name} cannot be asked for another {format_duration(wait)}: {opens.reason}"
                raise RateLimitedError(text, wait)
            update_waiters(sql, owner, {source.name: opens}, now, LOOK_AGAIN_SECONDS)
            return float(min(opens.at, now + LOOK_AGAIN_SECONDS))

    def release(self, held: ActivePermit, *, used: bool = True) -> None:
        """The request is over, or was never sent. If that cannot be written now, it counts until its deadline: that is
        safe. Whether a response is good is known, and counts, when the attempt ends that it belongs to."""
        is_newer = held.answer is not None and held.answer.outcome is not Outcome.OK
        with contextlib.suppress(DatabaseError), self.database.transaction(durable=is_newer) as sql:
            now = self.clock.boot()
            release(sql, held.permit, now, used=used)
            if used and (task := os.environ.get("ADCE_TASK", "").partition(",")[0]):  # of a batch, its first
                count = "update attempts set requests = requests + 1 where object_id = ? and outcome = 'running'"
                sql.execute(count, (task,))
            is_judged_later = held.source.name == os.environ.get("ADCE_SOURCE")
            responses = (Outcome.OK, Outcome.HTTP_ERROR, Outcome.NOT_YET)
            if held.answer and not (is_judged_later and held.answer.outcome in responses):
                record_response(sql, held.source, held.answer, now)


@functools.cache
def _limiter_of(path: Path, database: Path | None) -> Limiter:
    """One for each process; in a fork of it, every use is an error."""
    configuration = load_configuration(path)
    return Limiter(configuration, open_database(database or configuration.database))


def shared_limiter(config: str | os.PathLike[str] | None = None) -> Limiter:
    """The limiter of a configuration file: the given one, $ADCE_CONFIG, adce.yaml here, or beside the module.

    Its database is $ADCE_DB when that is set, else the configured one."""
    if worker := os.environ.get("ADCE_WORKER"):
        raise Error(f"worker {worker} of a pool can give no permit", "programs that send requests need `pool:` absent")
    database = os.environ.get("ADCE_DB")
    path = find_configuration(os.fspath(config) if config is not None else None)
    return _limiter_of(path, Path(database).absolute() if database else None)


def permit(
    source: str, config: str | os.PathLike[str] | None = None, wait: float | None = None
) -> contextlib.AbstractContextManager[ActivePermit]:
    """`with adce.permit("espn"): ...` around one HTTP request by any means. See Limiter.permit()."""
    return shared_limiter(config).permit(source, wait)


# ---------------------------------------------------------------- Object states
# The one way in which the state of an object and its task change: facts go in, the row that follows from them is
# written. The formula of the score is here; SQL only adds. Headlines: rank_of(), Ledger.


def rank_of(
    weighting: PriorityWeighting, source: str, priority: str, gap_size: int, detected_at: float
) -> tuple[float, float]:
    """The time-free rank of a task and its slope in points an hour.

    score = (base + age_weight * age_hours) * multiplier + max(gap_size_weight * gap_size, -max_penalty) + bonus
    is a line in time. The rank is its value at 1970, without the bonus: tasks of one dataset have one slope
    and one bonus, so their order by rank is their order by score, for ever."""
    base = weighting.base_scores.get(priority, 0.0)
    if not weighting.enabled:
        return base, 0.0
    multiplier = weighting.source_multipliers.get(source, 1.0)
    slope = weighting.age_weight * multiplier
    penalty = max(weighting.gap_size_weight * gap_size, -weighting.max_gap_size_penalty)
    return base * multiplier + penalty - slope * detected_at / HOUR, slope


def priority_of(row: ObjectRow, dataset: Dataset, today: datetime.date, critical_days: int) -> str:
    """How much a gap matters. `auto`: by the age of its date, then of its season."""
    if dataset.priority != "auto":
        return dataset.priority
    if row.day and abs((today - datetime.date.fromisoformat(row.day)).days) <= critical_days:
        return Priority.CRITICAL
    begun = [season.label for season in dataset.calendar if season.start <= today]
    if row.season in begun[-1:]:
        return Priority.HIGH
    return Priority.MEDIUM if row.season in begun[-2:] else Priority.LOW


# An object whose content is not known, and one that is not in the store.
UNREAD: Mapping[str, Any] = dict.fromkeys(("read_etag", "verdict", "settled", "live"))
GONE: Mapping[str, Any] = dict.fromkeys(("etag", "size", "modified_at", "validators", "absent_at", "outdated", *UNREAD))
NEW_TASK: Mapping[str, Any] = {"gap_size": 1, "attempts": 0, "failures": 0, "fruitless": 0, "crashes": 0}
SELECT_OBJECTS = f"""
    select o.object_id, d.dataset, o.key, o.fields, {", ".join(f"o.{name}" for name in ObjectRow._fields[4:])}
    from objects o
    join datasets d using (dataset_id)
"""  # noqa: S608  # names of columns
WRITTEN = ObjectRow._fields[ObjectRow._fields.index("state") :]  # the columns before that belong to its declaration
UPDATE_OBJECT = f"""
    update objects
    set ({", ".join(WRITTEN)}) = ({", ".join("?" for _ in WRITTEN)})
    where object_id = ?
"""  # noqa: S608  # names of columns
INSERT_OBJECTS = f"""
    insert into objects (dataset_id, parent_id, key, fields, {", ".join(ObjectRow._fields[4:])})
    values {{rows}}
    on conflict (key) do nothing
"""  # noqa: S608  # names of columns
ROW = f"({', '.join('?' for _ in ObjectRow._fields)})"


def season_of(dataset: Dataset, label: str | None) -> Season | None:
    """The season with this label in the calendar of a dataset."""
    return next((season for season in dataset.calendar if season.label == label), None)


class Ledger:
    """The rows of objects as one transaction sees and changes them: no gap without a task."""

    def __init__(
        self, sql: sqlite3.Connection, configuration: Configuration, now: float, cycle_id: int | None = None
    ) -> None:
        self.sql, self.configuration, self.now, self.cycle_id = sql, configuration, now, cycle_id
        self.created = self.closed = self.dropped = 0
        self.problems: list[str] = []
        self.today = day_of(now)

    def objects(self, condition: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[ObjectRow]:
        """The objects `o` that meet a condition in SQL."""
        cursor = self.sql.cursor()
        cursor.row_factory = None
        rows = cursor.execute(f"{SELECT_OBJECTS} where {condition}", parameters)  # noqa: S608, RUF100  # constants
        return list(map(ObjectRow._make, rows))

    def some(self, object_ids: Iterable[int]) -> list[ObjectRow]:
        """The objects with these ids that are expected."""
        condition = "o.object_id in (select value from json_each(:ids)) and o.state != 'dropped'"
        return self.objects(condition, {"ids": json.dumps(list(object_ids))})

    def appraised(self, known: ObjectRow, *, is_fetched: bool = False) -> ObjectRow:
        """The row that follows from the facts now; `known.state` is the state until now.

        A gap that persists keeps its task, and so its age. A task waits as long as its freshness says when the gap is
        new, when the object has just been fetched, or when a gap without failures has become one of another kind."""
        dataset = self.configuration.datasets[known.dataset]
        state, reason, next_at = appraise(dataset, season_of(dataset, known.season), known, self.now)
        task, facts = known.task, dict[str, Any](state=state, reason=reason)
        facts["since"] = known.since if state == known.state else int(self.now)
        if task == TaskState.RUNNING:
            return known._replace(**facts, next_at=None)
        if state not in GAPS:
            self.closed += task is not None
            return known._replace(**facts, next_at=next_at, task=None)
        if is_fetched and (next_at is None or next_at <= self.now):  # the size or the clock of the store is wrong
            next_at = int(self.now + self.configuration.retry.initial_delay_seconds) + 1
        waits = next_at is not None and next_at > self.now
        has_changed = task == TaskState.RETRY and not known.failures and state != known.state and not waits
        if task is None or is_fetched or has_changed:
            facts.update(task=TaskState.RETRY if waits else TaskState.PENDING, next_at=next_at if waits else None)
        if task is not None:
            return known._replace(**facts)
        self.created += 1
        return self.ranked(known._replace(**facts, **NEW_TASK, detected_at=int(self.now), last_error=None))

    def ranked(self, row: ObjectRow) -> ObjectRow:
        """The row with the priority, rank and slope of its task as of today."""
        dataset, weighting = self.configuration.datasets[row.dataset], self.configuration.priority_weighting
        priority = priority_of(row, dataset, self.today, weighting.critical_within_days)
        rank, slope = rank_of(weighting, dataset.source, priority, row.gap_size or 1, row.detected_at or 0)
        return row._replace(priority=priority, rank=rank, slope=slope)

    def write(self, rows: Iterable[ObjectRow]) -> None:
        """Store rows as they are."""
        self.sql.executemany(UPDATE_OBJECT, [(*row[-len(WRITTEN) :], row.object_id) for row in rows])

    def note(self, known: ObjectRow, **facts: Any) -> ObjectRow:
        """Store facts, and the state and task that follow from them. Returns the new row."""
        row = self.appraised(known._replace(**facts))
        self.write([row])
        return row

    def drop(self, condition: str, parameters: Mapping[str, Any] | Sequence[Any]) -> None:
        """Expect objects `o`, and the pages after them, no longer. All that is known of them is kept; if they are
        expected again, the store is searched for them."""
        rows = dict[int, ObjectRow]()
        for first in self.objects(f"({condition}) and o.state != 'dropped'", parameters):
            row: ObjectRow | None = first
            while row and row.object_id not in rows:
                rows[row.object_id] = row
                row = self.page(row, int(row.fields.get("page", 1)) + 1)
        for row in rows.values():
            task = row.task if row.task == TaskState.RUNNING else None
            self.closed += task != row.task
            gone = row._replace(state=ObjectState.DROPPED, reason=None, since=int(self.now), next_at=None)
            self.write([gone._replace(proven=0, task=task)])
        for name in {row.dataset for row in rows.values()}:
            self.touch(name)
        self.dropped += len(rows)

    def page(self, page: ObjectRow, number: int) -> ObjectRow | None:
        """The page of this number of the same answer, if it is expected; None for an object that is no page."""
        dataset, fields = self.configuration.datasets.get(page.dataset), {**page.fields, "page": str(number)}
        if not dataset or not dataset.pages:
            return None
        if any(match[1] not in fields for match in FIELD_IN_TEXT.finditer(dataset.key.text)):  # declared otherwise then
            return None
        key = dataset.key.render(fields, quote_for_key)
        found = self.objects("o.key = ? and d.dataset = ? and o.state != 'dropped'", (key, page.dataset))
        return next(iter(found), None)

    def touch(self, dataset: str) -> None:
        """Objects of this dataset, or their mentions, have changed: the next cycle computes their children anew."""
        self.sql.execute("update datasets set changed = changed + 1 where dataset = ?", (dataset,))

    def stored(
        self, known: ObjectRow, entry: StoredObject, found: Inspection, validators: str | None = None
    ) -> ObjectRow:
        """The row of an object that ADCE has just stored, before its appraisal."""
        row = known._replace(etag=entry.etag, size=entry.size, modified_at=entry.modified_at, validators=validators)
        cycle_id, seen_at = self.cycle_id or known.cycle_id, known.seen_at or int(self.now)
        return row._replace(**found.facts(entry.etag), proven=1, cycle_id=cycle_id, seen_at=seen_at)

    def renew(self, row: ObjectRow, reason: str) -> None:
        """An object must be fetched again; a task that gave up gets another chance."""
        if row.task == TaskState.GAVE_UP:
            row = row._replace(task=TaskState.PENDING, failures=0, fruitless=0)
        self.note(row, proven=1 if row.etag else 2, outdated=reason if row.etag else None)


# ---------------------------------------------------------------- Expectations
# The expected objects are computed as one set and compared with the known ones by key: what is new, renamed
# or changed is one upsert, the rest is one drop. Mentions are facts; which objects they make follows from
# adce.yaml. Headlines: declare_datasets(), expect(), note_mentions().

CHUNK = 1000  # objects read or compared at once
WRITTEN_AT_ONCE = 300  # objects, in one transaction: a claim waits no longer than that takes
LAST_KEY = "\U0010ffff"  # sorts after every key
WANTED = """
create temp table if not exists wanted (
    -- The keys that the datasets under expansion expect. The first dataset to expect a key has it.
    key          text    primary key,
    dataset_id   integer not null,
    fields       text,               -- null: not new
    season       text,
    day          text,
    available_at integer,
    parent_id    integer
) strict, without rowid
"""
UPSERT_OBJECT = """
    insert into objects (key, dataset_id, fields, season, day, available_at, parent_id, since, state, proven)
    values (?, ?, ?, ?, ?, ?, ?, ?, 'awaited', 0)
    on conflict (key) do update set
        dataset_id = excluded.dataset_id,
        fields = excluded.fields,
        season = excluded.season,
        day = excluded.day,
        available_at = excluded.available_at,
        parent_id = excluded.parent_id,
        -- the content is judged by the rules of its new dataset, and for its new fields
        read_etag = iif(
            (select reading from datasets d where d.dataset_id = objects.dataset_id)
                = (select reading from datasets d where d.dataset_id = excluded.dataset_id)
            and fields = excluded.fields, read_etag, null),
        since = iif(state = 'dropped', excluded.since, since),
        state = iif(state = 'dropped', 'awaited', state),
        proven = 0
"""


class WantedRow(NamedTuple):
    """An expected object: a row of `wanted`, and the declared columns of a row of `objects`."""

    key: str
    dataset_id: int
    fields_json: str | None
    season: str | None
    day: str | None
    available_at: int | None
    parent_id: int | None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def reading_rules(configuration: Configuration, dataset: Dataset) -> str:
    """A digest of the rules by which the contents of a dataset are judged, and of the ids looked for in them."""
    expressions = sorted(expression_of(child, dataset.name) for child in configuration.children_of(dataset.name))
    return _digest(dataset.validate, dataset.freshness.until, dataset.freshness.live, dataset.pages, expressions)


def declare_datasets(sql: sqlite3.Connection, configuration: Configuration) -> None:
    """Make the stored datasets those of the configuration. The next cycle follows with their objects and states; until
    then no task of a known dataset is claimed."""
    weighting = configuration.priority_weighting
    weight = weighting.success_rate_weight if weighting.enabled else 0.0
    sql.execute("update datasets set active = 0, rate_weight = ?", (weight,))
    sql.executemany(
        """
        insert into datasets (dataset, source, active, rate_weight) values (?1, ?2, 1, ?3)
        on conflict (dataset) do update set source = ?2, active = 1
        """,
        [(one.name, one.source, weight) for one in configuration.datasets.values()],
    )
    declaration = _digest(configuration.datasets, configuration.seasons)
    changed = "update facts set declaration = ?1, priorities = '' where declaration is not ?1"
    if sql.execute(changed, (declaration,)).rowcount:
        sql.execute("update datasets set expansion = '', ready = not exists (select 1 from objects)")


def declare(database: Database, configuration: Configuration, clock: Clock) -> None:
    """Make the limits and datasets of a database those of the configuration."""
    with database.transaction() as sql:
        declare_limits(sql, configuration, clock)
        declare_datasets(sql, configuration)


def expansion_inputs(sql: sqlite3.Connection, dataset: Dataset, now: float) -> str:
    """The inputs of the expected objects of a dataset, besides adce.yaml: the state of its parents, and the day."""
    names = [*dataset.partitions.parents, *([dataset.name] if dataset.pages else [])]
    parents = "select changed from datasets where dataset in (select value from json_each(?)) order by dataset_id"
    changed = [row[0] for row in sql.execute(parents, (json.dumps(names),))]
    is_by_hour = dataset.partitions.dates and dataset.partitions.dates.last == "now"
    return f"{changed} {now // HOUR if is_by_hour else day_of(now, dataset.dates.timezone)}"


def ids_of_parents(database: Database, child: Dataset, parent: Dataset, after: tuple[str, str]) -> list[sqlite3.Row]:
    """Some of the ids that the objects of a parent name, in the order of their keys."""
    prefix = parent.key.text.partition("{")[0]
    return database.read(
        """
        select p.object_id, p.key, p.fields, m.value
        from objects p
        cross join mentions m using (object_id)
        where p.key >= ?1 and p.key >= ?3 and p.key <= ?4 and (p.key > ?1 or m.value > ?2)
          and p.dataset_id = (select dataset_id from datasets where dataset = ?5) and p.state != 'dropped'
          and m.expression = ?6
        order by p.key, m.value
        limit ?7
        """,
        (*after, prefix, prefix + LAST_KEY, parent.name, expression_of(child, parent.name), WRITTEN_AT_ONCE),
    )


Partition = tuple[Fields, int | None]  # the values that make one object, and the parent that names it


def rows_of(ledger: Ledger, dataset: Dataset, partitions: Iterable[Partition]) -> list[WantedRow]:
    """The expected objects of these partitions. Values that make no key are noted as problems."""
    rows = []
    number = ledger.sql.execute("select dataset_id from datasets where dataset = ?", (dataset.name,)).fetchone()[0]
    excluded = {name: frozenset(values) for name, values in dataset.excluded.items()}
    for fields, parent_id in partitions:
        if excluded and any(fields.get(name) in values for name, values in excluded.items()):
            continue
        try:
            key, season, day, available_at = expected_object(dataset, fields)
        except ValueError as error:
            parent = ledger.sql.execute("select key from objects where object_id = ?", (parent_id,)).fetchone()
            ledger.problems.append(f"{parent[0]}: {error}" if parent else str(error))
        else:
            rows.append(WantedRow(key, number, FIELDS_AS_JSON.encode(fields), season, day, available_at, parent_id))
    return rows


def expect(ledger: Ledger, dataset: Dataset, partitions: Iterable[Partition]) -> tuple[int, int]:
    """Expect objects of a dataset under expansion. Known ones are stored as they are declared now; new ones wait in
    `wanted` until the store has been searched for them. Returns how many of the known and of the new are its own.

    A key that an earlier dataset expects too is a problem; one that several parents name is the first one's."""
    sql, rows = ledger.sql, rows_of(ledger, dataset, partitions)
    declared = """
        select key, dataset_id, fields, season, day, available_at, parent_id, state != 'dropped'
        from objects where key in (select value from json_each(?))
    """
    keys = json.dumps([row.key for row in rows])
    known = {row[0]: tuple(row) for row in sql.execute(declared, (keys,))}
    movable = {row[0] for row in sql.execute("select dataset_id from datasets where not active or expansion = ''")}
    earlier = "select key, dataset_id from wanted where key in (select value from json_each(?))"
    wanted = dict(sql.execute(earlier, (keys,)).fetchall())
    changed, counts, held = [], [0, 0], list[tuple[Any, ...]]()
    for row in rows:
        before, is_first = known.get(row.key), row.key not in wanted
        owner = wanted.setdefault(row.key, row.dataset_id)
        if is_first:
            held.append(row if before is None else (row.key, row.dataset_id, None, None, None, None, None))
            if before and before[-1] and before[1] not in movable:
                owner = before[1]
        if owner != row.dataset_id:
            other = sql.execute("select dataset from datasets where dataset_id = ?", (owner,)).fetchone()[0]
            text = f"{dataset.name}: {row.key} is already the key of another object of {other}"
            ledger.problems.append(f"{text}; give each a key of its own")
        elif is_first:
            counts[before is None] += 1
            if before is not None and before != (*row, 1):
                changed.append((*row, int(ledger.now)))
    sql.executemany("insert into wanted values (?, ?, ?, ?, ?, ?, ?)", held)
    sql.executemany(UPSERT_OBJECT, changed)
    if changed:
        ledger.touch(dataset.name)
    return counts[0], counts[1]


def new_objects(ledger: Ledger, datasets: Iterable[str], low: str, high: str) -> list[sqlite3.Row]:
    """A chunk of the new objects of some datasets between two keys, in order. The caller inserts them."""
    page = """
        select * from wanted where fields is not null and key >= ? and key <= ?
          and dataset_id in (select dataset_id from datasets where dataset in (select value from json_each(?)))
        order by key limit ?
    """
    parameters = (low, high, json.dumps(list(datasets)), WRITTEN_AT_ONCE)
    return ledger.sql.execute(page, parameters).fetchall()


def note_mentions(ledger: Ledger, parent: ObjectRow, found: Inspection) -> set[tuple[str, str]]:
    """Store the ids that the content of an object names, by expression. Returns those it did not name before.

    Content with an unusable id may stand for any other, so it removes none."""
    sql, named = ledger.sql, {(expression, value) for expression, values in found.mentions.items() for value in values}
    known = set(map(tuple, sql.execute("select expression, value from mentions where object_id = ?", parent[:1])))
    removed = set() if found.problems or found.outdated else known - named
    put = "insert into mentions values (?, ?, ?)"
    sql.executemany(put, [(parent.object_id, *mention) for mention in named - known])
    cut_out = "delete from mentions where object_id = ? and expression = ? and value = ?"
    sql.executemany(cut_out, [(parent.object_id, *mention) for mention in removed])
    ledger.problems += [f"{parent.key}: {problem}" for problem in found.problems]
    if removed:
        ledger.touch(parent.dataset)
    return named - known


def expect_children(
    ledger: Ledger, parent: ObjectRow, named: set[tuple[str, str]], *, is_fetched: bool, is_changed: bool
) -> None:
    """Expect the objects that a parent names for the first time. The next page is fetched after each fetch of a page,
    and an object is copied after each change. If another parent names one too, or none does any more, the next cycle
    decides."""
    dataset = ledger.configuration.datasets[parent.dataset]
    for child in ledger.configuration.children_of(parent.dataset):
        expression, is_page = expression_of(child, parent.dataset), child.name == parent.dataset
        is_renewed = is_fetched if is_page else bool(child.copy_of) and is_changed
        values = sorted(value for one, value in named if one == expression)
        if is_renewed:  # a 304 names nothing
            known = "select value from mentions where object_id = ? and expression = ?"
            values = [row[0] for row in ledger.sql.execute(known, (parent.object_id, expression))]
        before = len(ledger.problems)
        partitions = (
            (fields, parent.object_id)
            for value in values
            for fields in expand_named(child, dataset, parent.fields, value, ledger.now)
        )
        _insert_children(ledger, child, parent, rows_of(ledger, child, partitions), is_renewed=is_renewed)
        if len(ledger.problems) > before:
            ledger.touch(parent.dataset)
        elif is_page and is_renewed:
            number, is_numbered = int(parent.fields["page"]), dataset.pages and dataset.pages.last
            beyond = ledger.page(parent, number + len(values) + 1)
            if beyond and (number == 1 if is_numbered else not values):
                ledger.drop("o.object_id = ?", (beyond.object_id,))


def _insert_children(
    ledger: Ledger, child: Dataset, parent: ObjectRow, rows: Sequence[WantedRow], *, is_renewed: bool
) -> None:
    keys = json.dumps([row.key for row in rows])
    owners = """
        select key, dataset from objects join datasets using (dataset_id)
        where key in (select value from json_each(?)) and state != 'dropped'
    """
    taken = {key: is_renewed and name == child.name for key, name in ledger.sql.execute(owners, (keys,))}
    expanding = "select expansion = '' from datasets where dataset = ?"
    is_expanding = rows and ledger.sql.execute(expanding, (child.name,)).fetchone()[0]  # from before this parent
    if not all(taken.values()) or is_expanding:
        ledger.touch(parent.dataset)
    own = [(*row, int(ledger.now)) for row in reversed(rows) if taken.get(row.key, True)]  # the first of a key stays
    ledger.sql.executemany(UPSERT_OBJECT, own)
    for row in ledger.objects("o.key in (select value from json_each(?)) and not o.proven", (keys,)):
        if is_renewed:
            ledger.renew(row, f"{parent.key} was fetched {utc_text(ledger.now)}")
        elif row.state == ObjectState.AWAITED and row.etag is None:
            ledger.note(row, proven=2)
    if not is_renewed and not is_expanding and (child.validate.sha256 or child.validate.md5):
        _renew_changed(ledger, child, parent, {row.key: row.fields_json or "{}" for row in reversed(rows)})


def _renew_changed(ledger: Ledger, child: Dataset, parent: ObjectRow, declared: Mapping[str, str]) -> None:
    """Fetch the objects again of which their parent names another checksum now: the content has the one of before."""
    own = """
        o.key in (select value from json_each(?)) and o.parent_id = ? and d.dataset = ?
        and o.task is not 'running' and o.state != 'dropped' and o.read_etag is o.etag
    """
    named = "select 1 from mentions where object_id = ? and expression = ? and value = ?"
    for row in ledger.objects(own, (json.dumps([*declared]), parent.object_id, child.name)):
        before, now = (checksums(child.validate, json.loads(one)) for one in (row.fields_json, declared[row.key]))
        value = FIELDS_AS_JSON.encode({name: row.fields[name] for name in child.partitions.id_fields()})
        mention = parent.object_id, expression_of(child, parent.dataset), value
        if before != now and not ledger.sql.execute(named, mention).fetchone():
            change = "update objects set fields = ? where object_id = ?"
            ledger.sql.execute(change, (declared[row.key], row.object_id))
            name = next(name for name in now if now[name] != before[name])
            verdict = row.verdict or f"its {name} is {before[name][:64]}, not {now[name][:64]}"
            ledger.renew(row._replace(verdict=verdict if row.etag else None), f"{parent.key} names another {name}")


# ---------------------------------------------------------------- Queue
# The best task whose source can be asked now is claimed together with its permit. Headline: claim().

RUNNER = "runner"  # the owner of the main loop's places among the waiters


@dataclass(frozen=True, slots=True)
class Claim:
    """The work of one execution: one task, or several for a batch. All that a worker needs to know."""

    dataset: Dataset
    source: Source
    tasks: tuple[ObjectRow, ...]
    children: tuple[Dataset, ...] = ()  # whose ids the objects name
    beside: tuple[Claim, ...] = ()  # on objects of other datasets, which the same response brings
    url: str = ""
    hops: int = 0  # redirects that were followed,
    cookies: Any = None  # and the cookies that they have set
    permit: Permit | None = None  # commands and calls ask for their own
    environment: Mapping[str, str] = field(default_factory=dict)  # of its program
    runs_exclusively: bool = False  # nothing else may run beside it
    refusal: str | None = None  # why nothing is asked for

    def parts(self) -> list[tuple[Claim, ObjectRow]]:
        """Each task with the claim that has its dataset, in the order of the results."""
        return [(self, task) for task in self.tasks] + [part for one in self.beside for part in one.parts()]

    def results(self, result: Result) -> list[Result]:
        """The same result for each task; the first counts the requests."""
        return [result, *[dataclasses.replace(result, requests=0)] * (len(self.parts()) - 1)]


class Ending(NamedTuple):
    """The result of an attempt, and the task after it."""

    task: ObjectRow
    state: TaskState
    result: Result
    counted: bool  # the attempt counts towards retry.max_attempts


HEADS = """
    select d.dataset, d.source, head.object_id, head.crashes,
           s.throttles > 0 as is_probed, s.paused_until > :boot as is_paused,
           exists (select 1 from waiters w where w.source = d.source and w.owner = 'runner') as is_waiting
    from datasets d
    join objects head on head.object_id = (
        select object_id from objects
        where dataset_id = d.dataset_id and task = 'pending'
        order by rank desc, object_id
        limit 1)
    join scopes s on s.scope = d.source
    where d.active and d.ready
    order by rank + slope * :wall / 3600.0 + bonus desc, detected_at, head.object_id
"""


def claim(
    sql: sqlite3.Connection,
    configuration: Configuration,
    clock: Clock,
    busy: Mapping[str, int],
    free: int,
    datasets: Container[str] | None = None,
) -> tuple[Claim | None, dict[str, Opening]]:
    """Claim the best task whose source can be asked now, with its permit; else return what the sources wait for. `busy`
    counts running executions by dataset; `free` is the number of idle workers.

    One head for each of the `datasets`, or of all, is compared, so the cost does not grow with the queue. A task during
    which nearly `max_attempts` runners have crashed may be the cause, or only have run beside it: it runs alone."""
    now, wall = clock.boot(), clock.wall()
    heads = sql.execute(HEADS, {"boot": now, "wall": wall}).fetchall()
    heads = [head for head in heads if datasets is None or head["dataset"] in datasets]
    with_work = {head["source"] for head in heads if not head["is_paused"]}
    held = collections.Counter[str]()  # workers, by source
    for name, count in busy.items():
        held[configuration.datasets[name].source] += count
    openings: dict[str, Opening] = {}
    for head in heads:
        source, dataset = configuration.sources[head["source"]], configuration.datasets[head["dataset"]]
        most = 1 if head["is_probed"] else source.max_concurrent
        if held[source.name] >= most or busy.get(dataset.name, 0) >= (dataset.max_concurrent or most):
            continue
        # Others with work and no worker are left one worker, or one each beside programs: these have long timeouts, and
        # a source that is down holds its workers until then.
        rivals = sum(not held[name] for name in with_work - {source.name})
        if held[source.name] and free <= (min(rivals, 1) if dataset.url else rivals):
            continue
        if source.name not in openings and not dataset.original:
            openings[source.name] = opening(sql, configuration.rate_limiting, source.name, now, RUNNER)
        if not dataset.original and openings[source.name].at > now:
            continue
        is_exclusive = head["crashes"] >= configuration.retry.crash_limit()
        if is_exclusive and any(busy.values()):
            openings.pop(source.name, None)
            break
        granted = None
        if dataset.url:
            owner = RUNNER if head["is_waiting"] else ""
            granted = grant(sql, source.name, source.timeout_seconds, now, owner)
        return _begin_all(Ledger(sql, configuration, wall), head, granted, is_exclusive=is_exclusive), openings
    return None, openings


def _begin_all(ledger: Ledger, head: sqlite3.Row, permit: Permit | None, *, is_exclusive: bool) -> Claim:
    """Begin a task, and with it the others of its batch, or those that the same response brings, unless it has to run
    alone."""
    (first,) = ledger.objects("o.object_id = ?", (head["object_id"],))
    configuration, dataset = ledger.configuration, ledger.configuration.datasets[first.dataset]
    source, rows, beside = configuration.sources[dataset.source], [first], list[tuple[Dataset, ObjectRow]]()
    url = url_of(source, dataset, first.fields) if dataset.url else ""
    if not is_exclusive:
        rows += _others_in_batch(ledger, first, dataset.batch) if dataset.batch else []
        beside += _objects_of_same_url(ledger, first) if url else []

    def begun(one: Dataset, tasks: Sequence[ObjectRow], **more: Any) -> Claim:
        children = tuple(configuration.children_of(one.name))
        return Claim(one, source, tuple(_begin(ledger, row, url) for row in tasks), children, url=url, **more)

    return begun(
        dataset,
        rows,
        permit=permit,
        beside=tuple(begun(one, [row]) for one, row in beside),
        environment={} if url else _environment(configuration, source, rows),
        runs_exclusively=is_exclusive,
        refusal=address_problem(source, dataset, first.fields) or _page_problem(ledger, first, url),
    )


def _page_problem(ledger: Ledger, page: ObjectRow, url: str) -> str | None:
    """Why a page is not asked for: it is beyond the most, on another host, or named as one before it was by the same
    answer. Each is compared with the one at the last power of two, which finds every loop (R. P. Brent, An Improved
    Monte Carlo Factorization Algorithm, 1980). A token alone may stay the same from page to page."""
    dataset = ledger.configuration.datasets[page.dataset]
    if not dataset.pages or (number := int(page.fields["page"])) == 1:
        return None
    if number > dataset.pages.most:
        return f"there are more than {dataset.pages.most} pages, see pages.most"
    first = {**page.fields, **FIRST_PAGE}
    if origin_of(url) != origin_of(url_of(ledger.configuration.sources[dataset.source], dataset, first)):
        return f"the page before it names {urllib.parse.urlsplit(url).netloc}, another host"
    before = ledger.page(page, 1 << ((number - 1).bit_length() - 1))
    named = page.fields["next"], page.fields.get(NAMED_BY)
    is_named_twice = before and all(named) and named == (before.fields["next"], before.fields.get(NAMED_BY))
    return f"the page before it names page {before.fields['page']} again" if before and is_named_twice else None


def _objects_of_same_url(ledger: Ledger, first: ObjectRow) -> Iterator[tuple[Dataset, ObjectRow]]:
    """The pending objects of other datasets that one response brings together with the first."""
    own, fields = ledger.configuration.datasets[first.dataset], first.fields
    for other in ledger.configuration.datasets.values():
        if own.pages or other.name == own.name or other.request() != own.request():
            continue
        key = other.key.render(fields, quote_for_key) if set(other.partitions.own_fields()) <= fields.keys() else ""
        pending = "o.key = ? and d.dataset = ? and o.task = 'pending' and d.active and d.ready"
        if Path(key).suffix == Path(first.key).suffix:
            yield from ((other, row) for row in ledger.objects(pending, (key, other.name)))


def _environment(configuration: Configuration, source: Source, rows: Iterable[ObjectRow]) -> dict[str, str]:
    """The variables by which a program finds its limits, and by which its processes are found."""
    return {
        "ADCE_CONFIG": str(configuration.path),
        "ADCE_DB": str(configuration.database.resolve()),  # the next start may come by another path
        "ADCE_SOURCE": source.name,
        "ADCE_TASK": ",".join(str(row.object_id) for row in rows),
    }


def _others_in_batch(ledger: Ledger, first: ObjectRow, batch: Batch) -> list[ObjectRow]:
    """The best pending tasks that share the field of the batch with the first."""
    configuration = ledger.configuration
    others = """
        d.dataset = ? and o.task = 'pending' and o.object_id != ? and o.crashes < ? and o.fields ->> ? = ?
        order by o.rank desc, o.object_id
        limit ?
    """
    shared = (configuration.retry.crash_limit(), batch.group_by, first.fields[batch.group_by], batch.max - 1)
    rows = ledger.objects(others, (first.dataset, first.object_id, *shared))
    names = configuration.datasets[first.dataset].partitions.own_fields()
    return [row for row in rows if not any("," in row.fields[name] for name in names)]  # it would be several values


def _begin(ledger: Ledger, row: ObjectRow, url: str) -> ObjectRow:
    begin = "insert into attempts (object_id, started_at, outcome, requests, url) values (?, ?, 'running', 0, ?)"
    shown = re.sub(r"^(https?://)[^/?#]*@", r"\1", url)  # without a user name and a password
    number = ledger.sql.execute(begin, (row.object_id, ledger.now, masked(shown) or None)).lastrowid
    run = "task = 'running', attempt_id = ?, attempts = attempts + 1, next_at = null"
    ledger.sql.execute(f"update objects set {run} where object_id = ?", (number, row.object_id))  # noqa: S608
    return row._replace(task=TaskState.RUNNING, attempt_id=number)


def wake(sql: sqlite3.Connection, condition: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> int:
    """Make the retries that meet a condition pending. Returns how many."""
    woken = f"update objects set task = 'pending', next_at = null where task = 'retry' and {condition}"  # noqa: S608
    return sql.execute(woken, parameters).rowcount


def wake_failed(sql: sqlite3.Connection) -> None:
    """Make failed tasks pending, except those that wait for freshness or for an object that is not there yet."""
    last = "select outcome from attempts a where a.object_id = objects.object_id order by attempt_id desc limit 1"
    wake(sql, f"fruitless > 0 and 'not_yet' is not ({last})")


def advance(ledger: Ledger) -> bool:
    """Note what time alone has changed, of up to a chunk of objects: retries that are due are pending, other objects
    are appraised. Returns whether there may be more."""
    condition = "o.next_at <= ? and (o.task is null or o.task = 'retry') order by o.next_at limit ?"
    due = ledger.objects(condition, (int(ledger.now), CHUNK))
    for row in due:
        if row.task is None and row.dataset in ledger.configuration.datasets:
            ledger.note(row)
        else:
            ledger.write([row._replace(task=row.task and TaskState.PENDING, next_at=None)])
    return len(due) == CHUNK


# ---------------------------------------------------------------- Results
# A body is judged and stored. Then the end of an attempt: the next state of the task, the attempt itself, the totals of
# the day. Then the changes that an operator makes, also while the runner works: it finds them in the database.
# Headlines: finish(), requeue_orphans(), pause_source(), resume_source(), retry_tasks(), skip_tasks().

SUCCESS_MEMORY = 0.1  # weight of the latest attempt in the success rate of a dataset
RUNNER_CRASHED = "the runner crashed"
FORGOTTEN_AT_ONCE = 500  # rows of a kind
UNTIL_RESUMED = 3650 * DAY
BY_OPERATOR = "by the operator"


def _store_failure(error: StoreError) -> Result:
    """A store that fails says nothing about the task; one place in it that cannot be used does."""
    is_local = isinstance(error, UnusablePathError)
    return Result(Outcome.UNSTORABLE if is_local else Outcome.STORE_ERROR, str(error))


def validate_and_store(
    claimed: Claim, target: ObjectRow, body: BinaryIO, store: Store, http_status: int | None = None, links: Links = None
) -> Result:
    """Validate a body, then store it."""
    most = claimed.dataset.validate.most()
    if body.seek(0, io.SEEK_END) > most:
        return Result(Outcome.INVALID, f"longer than {most} bytes", http_status)
    inspection = inspect_apart(claimed.dataset, target.fields, body, claimed.children, links)
    if not inspection.valid:
        return Result(Outcome.INVALID, inspection.verdict, http_status)
    try:
        body.seek(0)
        return Result(Outcome.OK, None, http_status, store.write(target.key, body), inspection)
    except StoreError as error:
        return dataclasses.replace(_store_failure(error), http_status=http_status)


def inspect_stored(claimed: Claim, target: ObjectRow, store: Store) -> Result | None:
    """The object that the store holds under a key, judged; None when there is none."""
    stored, most = store.find(target.key), claimed.dataset.validate.most()
    if stored and stored.size > most:
        return Result(Outcome.INVALID, f"longer than {most} bytes", stored=stored)
    found = inspect_content(claimed.dataset, target, claimed.children, store) if stored else None
    outcome = Outcome.OK if found and found.valid else Outcome.INVALID
    return Result(outcome, found.verdict, stored=stored, inspection=found) if found else None


def inspect_content(
    dataset: Dataset, target: ObjectRow, children: Sequence[Dataset], store: Store
) -> Inspection | None:
    """The findings in the content of a stored object; None when there is none."""
    try:
        with store.open(target.key) as body:
            return inspect_apart(dataset, target.fields, body, children, target.links)
    except KeyError:
        return None


def retry_delay(policy: Retry, times: int, rng: random.Random) -> float:
    """Seconds before the next attempt after so many: doubled each time, varied by a quarter."""
    growing = policy.initial_delay_seconds * 2.0 ** min(times - 1, 40)
    return min(growing * rng.uniform(0.75, 1.25), policy.max_delay_seconds)


def finish(ledger: Ledger, claimed: Claim, results: Sequence[Result], clock: Clock, rng: random.Random) -> list[Ending]:
    """Record the results of a claim: requests, attempts, objects and tasks, in the caller's transaction.

    An attempt that is no longer the running one of its task changes nothing but its own row."""
    now, sql, health = clock.boot(), ledger.sql, SourceHealth()
    # one result of a batch stands for all: a failing store, a working source, any other
    decisive = min(results, key=lambda one: (one.outcome is not Outcome.STORE_ERROR, one.outcome is not Outcome.OK))
    was_sent = any(result.requests for result in results)
    if claimed.permit:
        release(sql, claimed.permit, now, used=was_sent)
    if was_sent or claimed.dataset.command or claimed.dataset.call:
        has_failed = claimed.tasks[0].failures > 0
        answered_by = ledger.configuration.source_at(claimed.url, claimed.source) if claimed.hops else claimed.source
        health = record_response(sql, answered_by, decisive, now, is_repeated=has_failed)
    if decisive.outcome is Outcome.STORE_ERROR:
        health = SourceHealth(pause_seconds=FIRST_PAUSE_SECONDS)
        pause(sql, GLOBAL, FIRST_PAUSE_SECONDS, f"{STORE_TROUBLE}{decisive.error}", now)
    endings: list[Ending] = []
    for (_, task), result in zip(claimed.parts(), results, strict=True):
        _record_attempt(ledger, task, result)
        running = "o.object_id = ? and o.task = 'running' and o.attempt_id = ?"
        rows = ledger.objects(running, (task.object_id, task.attempt_id))
        endings += [_settle(ledger, row, result, health, rng, task.outdated) for row in rows]
    return endings


def _settle(
    ledger: Ledger,
    row: ObjectRow,
    result: Result,
    health: SourceHealth,
    rng: random.Random,
    outdated: str | None = None,
) -> Ending:
    """The next state of a task, whose object was `outdated` when it began. It is done only when its object is whole in
    the store and no gap any more."""
    outcome, is_ok = result.outcome, result.outcome is Outcome.OK
    dataset = ledger.configuration.datasets[row.dataset]
    season = season_of(dataset, row.season)
    counted = (outcome.traits.counts and not health.is_source) or (
        outcome is Outcome.NOT_YET and not may_still_appear(dataset, season, row, ledger.now)
    )
    failures = 0 if is_ok else row.failures + counted
    fruitless = 0 if is_ok else row.fruitless + (outcome is not Outcome.LOST)
    row = row._replace(attempt_id=None, failures=failures, fruitless=fruitless, crashes=0, last_error=result.error)
    if row.state == ObjectState.DROPPED:
        row = row._replace(task=None)
    else:
        row = row._replace(task=TaskState.PENDING)
        if result.stored and result.inspection:  # a program may have left an invalid object
            row = ledger.stored(row, result.stored, result.inspection, result.validators)
        elif result.http_status == 304:
            row = row._replace(modified_at=int(ledger.now), validators=result.validators or row.validators)
        if is_ok and row.outdated == outdated:  # else it was outdated meanwhile
            row = row._replace(outdated=None)
        if outcome is Outcome.NOT_YET and _may_be_absent(ledger, row):
            row = row._replace(absent_at=int(ledger.now))
        row = ledger.appraised(row, is_fetched=is_ok)
        if row.task and not is_ok:
            times = failures if counted else fruitless - failures
            row = _after_failure(ledger, row, result, health, retry_delay(ledger.configuration.retry, times, rng))
    ledger.write([row])
    if is_ok and ledger.configuration.children_of(row.dataset) and row.state != ObjectState.DROPPED:
        named = note_mentions(ledger, row, result.inspection) if result.inspection else set()
        is_fetched, is_changed = result.http_status is not None, result.stored is not None
        expect_children(ledger, row, named, is_fetched=is_fetched, is_changed=is_changed)
    elif row.task in (TaskState.PENDING, TaskState.RETRY) and not health.is_source:
        _restart_pages(ledger, row, result)
    closed = TaskState.DONE if row.state == ObjectState.PRESENT else TaskState.CANCELLED
    return Ending(row, TaskState(row.task or closed), result, counted)


def _restart_pages(ledger: Ledger, row: ObjectRow, result: Result) -> None:
    """A source that refuses a page may no longer know what the page before it named: the first is asked for again."""
    status = result.http_status or 0
    is_refused = 400 <= status < 500 or (status and result.outcome is Outcome.INVALID)
    first = ledger.page(row, 1) if is_refused else None
    if first and first.etag and first.object_id != row.object_id:
        ledger.renew(first, f"its page {row.fields['page']}: {result.error}")


def _may_be_absent(ledger: Ledger, row: ObjectRow) -> bool:
    """Whether an object is so old that a source without it has none. One that never had any may have a wrong url."""
    dataset, since = ledger.configuration.datasets[row.dataset], row.detected_at or 0
    if row.day:
        since = end_of_step(dataset, row.fields)
    elif season := season_of(dataset, row.season):
        since = max(since, season.over())
    if dataset.absent_after is None or ledger.now < since + dataset.absent_after:
        return False
    good = """select 1 from counts join datasets using (dataset_id)
              where dataset = ? and state in ('present', 'stale', 'suspect') and objects > 0"""
    return ledger.sql.execute(good, (row.dataset,)).fetchone() is not None


def _after_failure(ledger: Ledger, row: ObjectRow, result: Result, health: SourceHealth, delay: float) -> ObjectRow:
    """The row of a task whose attempt brought nothing: one that was lost counts for nothing, and is pending again."""
    seconds = result.retry_after  # until a permit that was refused is possible
    if result.outcome is not Outcome.LOST:
        if row.failures >= ledger.configuration.retry.max_attempts:
            return row._replace(task=TaskState.GAVE_UP)
        # a second later than the probe, which takes another object if there is one
        seconds = max(delay, health.pause_seconds + 1 if health.pause_seconds else 0)
    return row if seconds is None else row._replace(task=TaskState.RETRY, next_at=int(ledger.now + seconds) + 1)


def _record_attempt(ledger: Ledger, task: ObjectRow, result: Result) -> None:
    end = """
        update attempts
        set outcome = ?, seconds = max(0, ? - started_at), http_status = ?, bytes = ?, requests = requests + ?,
            error = ?, output = ?, worker = ?
        where attempt_id = ? and outcome = 'running'
    """
    size = result.stored.size if result.stored else None
    facts = (result.outcome, ledger.now, result.http_status, size, result.requests, result.error)
    ended = ledger.sql.execute(end, (*facts, result.output or None, result.worker, task.attempt_id))
    if ended.rowcount and result.outcome.traits.rated:
        average = "update datasets set success_rate = success_rate + ? * (? - success_rate) where dataset = ?"
        ledger.sql.execute(average, (SUCCESS_MEMORY, result.outcome is Outcome.OK, task.dataset))


def requeue_orphans(sql: sqlite3.Connection, policy: Retry) -> int:
    """After a crash: running tasks are pending again, and their attempts are lost. Returns how many.

    A task during which `max_attempts` runners in a row have crashed may be the cause, and gave up."""
    lose = "update attempts set outcome = 'lost', seconds = 0, error = ? where outcome = 'running'"
    sql.execute(lose, (RUNNER_CRASHED,))
    requeue = """
        update objects
        set attempt_id = null,
            crashes = crashes + 1,
            last_error = :crashed,
            task = case
                when state not in ('missing', 'stale', 'suspect') then null
                when crashes + 1 >= :most then 'gave_up'
                else 'pending' end,
            -- to be appraised anew
            next_at = iif(state in ('awaited', 'present'), 0, null)
        where task = 'running'
    """
    return sql.execute(requeue, {"most": policy.max_attempts, "crashed": RUNNER_CRASHED}).rowcount


def correct_instants(sql: sqlite3.Connection, policy: Retry, now: float) -> None:
    """After a run whose clock was fast: what it stored is as old as this instant, and what it would retry is due."""
    correct = """
        update objects
        set next_at = iif(task is null or task = 'retry', 0, null), since = min(since, :now),
            modified_at = min(modified_at, :now)
        where max(coalesce(modified_at, 0), iif(task = 'retry', max(since, iif(fruitless, next_at, 0)), 0))
              > :now + :longest
    """
    sql.execute(correct, {"now": int(now), "longest": DAY + policy.max_delay_seconds})


def forget(sql: sqlite3.Connection, before: float) -> int:
    """Remove some attempts, cycles (but the last) and dropped objects from before an instant. Returns how many rows."""
    attempts = """
        delete from attempts where attempt_id in (
            select attempt_id from (select * from attempts order by attempt_id limit :most)
            where started_at < :before and outcome != 'running')
    """
    dropped = """
        delete from objects where object_id in (
            select object_id from objects o
            where state = 'dropped' and since < :before and task is null
              and not exists (select 1 from attempts a where a.object_id = o.object_id)
            limit :most)
    """
    cycles = """
        delete from reconciliations where cycle_id in (
            select cycle_id from reconciliations
            where started_at < :before and cycle_id < (select max(cycle_id) from reconciliations)
            order by cycle_id limit :most)
    """
    alerts = "delete from alerts where ended_at < :before and unsent = '[]'"
    limits = {"before": int(before), "most": FORGOTTEN_AT_ONCE}
    return sum(sql.execute(delete, limits).rowcount for delete in (attempts, dropped, cycles, alerts))


def pause_source(sql: sqlite3.Connection, scope: str, seconds: float | None, reason: str, now: float) -> None:
    """Pause a source for some seconds, or until it is resumed, in place of an earlier pause by the operator. A longer
    one that the source has caused stays."""
    seconds = min(UNTIL_RESUMED if seconds is None else seconds, UNTIL_RESUMED)
    text = BY_OPERATOR + ", until it is resumed" * (seconds == UNTIL_RESUMED) + (f": {reason}" if reason else "")
    sql.execute("update scopes set paused_until = 0 where scope = ? and reason glob ?", (scope, f"{BY_OPERATOR}*"))
    pause(sql, scope, seconds, text, now)


def resume_source(sql: sqlite3.Connection, scope: str, now: float) -> tuple[bool, int]:
    """End a pause, whatever its cause, and retry at once what has failed and not given up. Returns whether there was a
    pause, and the number of tasks."""
    was_paused = sql.execute("select paused_until > ? from scopes where scope = ?", (now, scope)).fetchone()[0]
    sql.execute(
        "update scopes set paused_until = 0, reason = null, failures = 0, throttles = 0 where scope = ?", (scope,)
    )
    own = "dataset_id in (select dataset_id from datasets where ? in (source, 'global'))"
    return bool(was_paused), wake(sql, f"last_error is not null and {own}", (scope,))


def tasks_to_retry(database: Database, filters: Mapping[str, str | None], task_ids: Sequence[int]) -> list[int]:
    """The ids of the tasks that wait or gave up and match the filters; skipped and absent ones only by their ids."""
    rows = database.read(
        """
        select o.object_id
        from objects o
        join datasets d using (dataset_id)
        where (o.task in ('retry', 'gave_up')
               or (o.task is null and coalesce(o.skipped, o.absent_at) is not null and :has_ids))
          and (not :has_ids or o.object_id in (select value from json_each(:ids)))
          and (:state is null or o.task = :state)
          and (:source is null or d.source = :source)
          and (:dataset is null or d.dataset = :dataset)
          and (:error is null or instr(lower(o.last_error), lower(:error)))
          and (:day is null or o.day = :day)
        order by o.object_id
        """,
        {"day": None, **filters, "has_ids": bool(task_ids), "ids": json.dumps(task_ids)},
    )
    return [row[0] for row in rows]


def retry_tasks(ledger: Ledger, task_ids: Iterable[int]) -> int:
    """Retry tasks at once, with all their attempts before them; include skipped and absent objects again. Returns how
    many."""
    ids = json.dumps(list(task_ids))
    woken = """
        update objects set task = 'pending', next_at = null, failures = 0, fruitless = 0
        where task in ('retry', 'gave_up') and object_id in (select value from json_each(?))
    """
    count = ledger.sql.execute(woken, (ids,)).rowcount
    skipped = "coalesce(o.skipped, o.absent_at) is not null and o.object_id in (select value from json_each(:ids))"
    for row in ledger.objects(skipped, {"ids": ids}):
        count += 1
        if row.state == ObjectState.DROPPED:  # not expected now, but included when it is
            ledger.write([row._replace(skipped=None, absent_at=None)])
        else:  # its task has kept its age
            task = row.task or (TaskState.PENDING if row.detected_at else None)
            ledger.note(row._replace(task=task, failures=0, fruitless=0), skipped=None, absent_at=None)
    return count


def skip_tasks(ledger: Ledger, task_ids: Iterable[int], reason: str) -> list[int]:
    """Exclude the objects of open tasks until they are retried. Returns which tasks were open."""
    rows = [row for row in ledger.some(task_ids) if row.task is not None and row.skipped is None]
    for row in rows:
        ledger.note(row, skipped=reason)
    return [row.object_id for row in rows]


# ---------------------------------------------------------------- Cycles
# One reconciliation in progress: its row, the parts of the store that it lists, the contents that it reads. It lists
# the keys of open objects and a share of all others: everything once in a day, at a steady cost. Other threads ask the
# store, so the main loop never waits for it. Headlines: Cycle, ranges_to_list(), read_contents().

LEAST_SHARE = 4000  # keys, of a cycle; a lake that is not larger is listed whole each time
SINGLE_RANGES = 200  # open objects below a prefix; with more than that, all of it is listed
READ_AT_ONCE = 20
SAVED_EVERY_SECONDS = 5
MOST_PROBLEMS = 5  # reported of one cycle
STOPPED_EARLY = "stopped before its end"
VANISHED = "vanished at once"  # marks a mass loss
KNOWN_OBJECTS = "select coalesce(sum(objects), 0) from counts where state != 'dropped'"
Item = TypeVar("Item")
Change = Callable[[Ledger, ObjectRow], ObjectRow]


def chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most `size`."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk


class KeyRange(NamedTuple):
    """The keys from `low` to `high`, both included."""

    low: str
    high: str


ALL_KEYS, NO_KEYS = KeyRange("", LAST_KEY), KeyRange(LAST_KEY, "")


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Asks the store in other threads, and calls `wake` after each answer; without threads, asks at once."""

    executor: Executor | None = None
    wake: Callable[[], None] = lambda: None

    def submit(self, function: Callable[..., Item], *arguments: Any) -> Future[Item]:
        """The future result of a call."""
        from concurrent.futures import Future

        future: Future[Item] = self.executor.submit(function, *arguments) if self.executor else Future()
        if not self.executor:
            try:
                future.set_result(function(*arguments))
            except Exception as error:  # noqa: BLE001  # raised again by result()
                future.set_exception(error)
        future.add_done_callback(lambda _: self.wake())
        return future


def sort_listing(listing: Iterator[StoredObject]) -> tuple[bool, Iterator[StoredObject]]:
    """Whether a whole listing was in key order, and the listing in that order, by way of a temporary file."""
    scratch = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # pages are taken by several threads
    scratch.execute("pragma cache_size = -256")  # KiB: several are at work at once
    scratch.execute("create table listing (key text primary key, size, etag, modified_at) without rowid")
    was_ascending, last = True, ""
    for page in chunks(listing, CHUNK):
        for entry in page:
            was_ascending, last = was_ascending and entry.key > last, entry.key
        scratch.executemany("insert or replace into listing values (?, ?, ?, ?)", page)
    return was_ascending, map(StoredObject._make, scratch.execute("select * from listing order by key"))


class Listing:
    """The objects of a range below a prefix, as pages. A prefix that was out of order, or was never listed, is sorted
    first; its range is all of it."""

    def __init__(self, store: Store, prefix: str, keys: KeyRange, prefetch: Prefetch, *, is_ordered: bool) -> None:
        self.prefix, self.keys, self.is_ordered, self.was_ascending = prefix, keys, is_ordered, is_ordered
        self._prefetch, self._made = prefetch, chunks(self._entries(store), CHUNK)
        self._next: Future[list[StoredObject] | None] | None = None

    def _entries(self, store: Store) -> Iterator[StoredObject]:
        entries, last = store.list(self.prefix, self.keys.low[:-1]), ""
        if not self.is_ordered:
            self.was_ascending, entries = sort_listing(entries)
        for entry in entries:
            if entry.key <= last:
                self.was_ascending = False
                raise StoreError(f"the store listed {entry.key} after {last}", "the next cycle sorts first")
            last = entry.key
            if last > self.keys.high:
                return
            if last >= self.keys.low:
                yield entry

    def start(self) -> Future[list[StoredObject] | None]:
        """Begin to make the next page, unless that has begun."""
        self._next = self._next or self._prefetch.submit(next, self._made, None)
        return self._next

    def pages(self) -> Iterator[list[StoredObject] | None]:
        """Each page, and None while the next is not ready. Raises StoreError."""
        while True:
            future = self.start()
            while not future.done():
                yield None
            self._next, page = None, future.result()
            if page is None:
                return
            self.start()
            yield page


def share_of_keys(database: Database, configuration: Configuration, now: float) -> KeyRange:
    """The next part of all keys, as large as the time since the last cycle asks for."""
    total = database.value(KNOWN_OBJECTS)
    looked_up_to, last = database.read("select looked_up_to, looked_at from facts")[0]
    elapsed = max(0.0, now - last) if last is not None else math.inf
    size = max(LEAST_SHARE, math.ceil(total * min(1.0, elapsed / configuration.full_seconds)))
    if size >= total:
        return ALL_KEYS
    last_of_share = "select key from objects where key > ? and state != 'dropped' order by key limit 1 offset ?"
    high = database.value(last_of_share, (looked_up_to, size - 1)) or LAST_KEY
    return KeyRange(looked_up_to + "\0" if looked_up_to else "", high)


def ranges_to_list(database: Database, prefix: str, share: KeyRange) -> list[KeyRange]:
    """The ranges to list below a prefix: its part of the share, and those of its open and its new objects. Ranges less
    than a page apart are one: one request lists what lies between as well."""
    whole = KeyRange(prefix, prefix + LAST_KEY)
    with database.transaction(durable=False) as sql:  # which alone sees the table `wanted`
        to_find = sql.execute(
            """
            select key from objects indexed by objects_to_find
            where key >= ?1 and key <= ?2 and (task is not null or proven = 0) and state != 'dropped'
            union all
            select key from wanted where key >= ?1 and key <= ?2 and fields is not null
            limit ?3
            """,
            (*whole, SINGLE_RANGES + 1),
        ).fetchall()
    if len(to_find) > SINGLE_RANGES:
        return [whole]
    part = KeyRange(max(share.low, whole.low), min(share.high, whole.high))
    found = [part, *(KeyRange(key, key) for (key,) in to_find)]
    between = "select count(*) from (select 1 from objects where key > ? and key < ? limit ?)"
    joined: list[KeyRange] = []
    for low, high in sorted(one for one in found if one.low <= one.high):
        end = joined[-1].high if joined else ""
        if joined and (low <= end or database.value(between, (end, low, CHUNK)) < CHUNK):
            joined[-1] = KeyRange(joined[-1].low, max(end, high))
        else:
            joined.append(KeyRange(low, high))
    return joined


@dataclass(frozen=True, slots=True)
class CycleOptions:
    """The operator's options for a cycle."""

    is_full: bool = False  # list everything
    accept_loss: Sequence[str] = ()  # datasets whose mass loss is real

    def merged(self, wanted: str | None) -> CycleOptions:
        """These options and those of a requested cycle, in JSON."""
        other = CycleOptions(**json.loads(wanted or "{}"))
        return CycleOptions(self.is_full or other.is_full, [*self.accept_loss, *other.accept_loss])


def request_cycle(sql: sqlite3.Connection, options: CycleOptions) -> int:
    """Request a cycle from the runner. Returns the id that it will have: the next cycle follows every request."""
    requested = "select wanted_cycle, (select coalesce(max(cycle_id), 0) from reconciliations) from facts"
    wanted, last = sql.execute(requested).fetchone()
    sql.execute("update facts set wanted_cycle = ?", (json.dumps(dataclasses.asdict(options.merged(wanted))),))
    return cast(int, last) + 1


class Cycle:
    """The progress of one cycle, and its row in the database."""

    def __init__(
        self,
        database: Database,
        configuration: Configuration,
        store: Store,
        clock: Clock,
        options: CycleOptions,
        prefetch: Prefetch,
    ) -> None:
        self.database, self.configuration, self.store, self.clock = database, configuration, store, clock
        self.prefetch = prefetch
        self.listed = self.looked = self.created = self.closed = self.dropped = 0
        self.is_complete = self.is_braked = False
        self.store_error: str | None = None
        self.compared = set[str]()  # prefixes
        self.expanded: dict[str, str] = {}  # inputs of datasets whose new objects are not inserted yet
        self.new = 0  # objects that wait for their insertion
        self.has_new_pages = False  # stored pages have named others
        self.present = collections.Counter[int]()  # objects in the store until now, by dataset
        self.losses: dict[int, array.array[int]] = {}  # those that are no longer listed
        self.problems: list[str] = []
        self.readers = {  # the datasets of which a content says more than its size
            name
            for name, one in configuration.datasets.items()
            if any(
                (one.freshness.until, one.freshness.live, one.validate.needs_content(), configuration.children_of(name))
            )
        }
        self.started_at, self.started, self.calls_before = clock.wall(), clock.boot(), store.calls
        self.saves_at = self.started + SAVED_EVERY_SECONDS
        self.ranked_by = f"{day_of(self.started_at)} {_digest(configuration.priority_weighting)}"
        self.enter("expanding")
        with database.transaction() as sql:
            sql.execute("update reconciliations set error = ?, seconds = 0 where seconds is null", (RUNNER_CRASHED,))
            begun = sql.execute("insert into reconciliations (started_at) values (?)", (self.started_at,))
            self.cycle_id = cast(int, begun.lastrowid)
            self.options = options.merged(sql.execute("select wanted_cycle from facts").fetchone()[0])
            sql.execute("update facts set wanted_cycle = null")
            sql.execute(WANTED)
            sql.execute("delete from wanted")
            self.datasets = dict(sql.execute("select dataset_id, dataset from datasets where active").fetchall())
        self.share = ALL_KEYS if self.options.is_full else share_of_keys(database, configuration, clock.wall())
        self.may_verify = math.inf if self.options.is_full else configuration.verify_per_cycle  # contents

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """A transaction whose changes count for this cycle. The next cycle finds again whatever a power cut undoes."""
        with self.database.transaction(durable=False) as sql:
            ledger = Ledger(sql, self.configuration, self.clock.wall(), self.cycle_id)
            yield ledger
        self.problems += ledger.problems
        self.created += ledger.created
        self.closed += ledger.closed
        self.dropped += ledger.dropped

    def last_id(self) -> int:
        """The highest of all objects known now."""
        return self.database.value("select max(object_id) from objects") or 0

    def scan(self, last: int, change: Callable[[Ledger, dict[str, Any]], object]) -> Iterator[None]:
        """Change the objects up to an id, a chunk of ids at once: `change` takes `after` and `last` of each."""
        for after in range(0, last, CHUNK):
            with self.ledger() as ledger:
                change(ledger, {"after": after, "last": min(after + CHUNK, last)})
            yield

    def rewrite(self, object_ids: Iterable[int], change: Change, at_once: int = WRITTEN_AT_ONCE) -> Iterator[None]:
        """Store objects as `change` makes them, some `at_once`; not those stored since the cycle began."""
        for chunk in chunks(iter(object_ids), at_once):
            with self.ledger() as ledger:
                ledger.write([change(ledger, row) for row in ledger.some(chunk) if row.cycle_id != self.cycle_id])
            yield

    def enter(self, phase: str) -> None:
        """Begin a phase, whose progress is counted in `done`."""
        self.phase, self.phase_began, self.done = phase, self.clock.boot(), 0

    def save_progress(self) -> None:
        """Store how far the phase is, now and then."""
        now, left = self.clock.boot(), 0
        if now < self.saves_at:
            return
        self.saves_at, seconds = now + SAVED_EVERY_SECONDS, max(1e-3, now - self.phase_began)
        if self.phase == "reading":
            left = self.database.value("select count(*) from objects where etag is not read_etag and etag is not null")
        elif self.phase == "listing" and self.share == ALL_KEYS:
            left = self.database.value(KNOWN_OBJECTS) + self.new - self.looked
        text = f"{self.phase}, {self.done:,} objects, {self.done / seconds:,.0f} a second"
        if left > 0 and self.done:
            text += f", {left:,} to go, about {format_duration(left * seconds / self.done)}"
        with self.database.transaction(durable=False) as sql:
            save = "update reconciliations set listed = ?, looked = ?, progress = ? where cycle_id = ?"
            sql.execute(save, (self.listed, self.looked, text, self.cycle_id))

    def end(self) -> None:
        """Record the cycle. A store that ends two cycles in a row is unusable until the next that is complete."""
        row = {
            **vars(self),
            "seconds": self.clock.boot() - self.started,
            "list_calls": self.store.calls - self.calls_before,
            "error": "; ".join(self.problems[:MOST_PROBLEMS]) or None,
            "looked_up_to": "" if self.share.high == LAST_KEY else self.share.high,
        }
        with self.database.transaction() as sql:
            states = dict(sql.execute("select state, sum(objects) from counts group by state").fetchall())
            row |= {state: states.get(state, 0) for state in ("present", *GAPS)}
            sql.execute(
                """
                update reconciliations
                set seconds = :seconds, listed = :listed, looked = :looked, list_calls = :list_calls,
                    expected = :present + :missing + :stale + :suspect,
                    present = :present, missing = :missing, stale = :stale, suspect = :suspect,
                    created = :created, closed = :closed, dropped = :dropped, progress = null, error = :error
                where cycle_id = :cycle_id
                """,
                row,
            )
            before = "select error from reconciliations where cycle_id < :cycle_id order by cycle_id desc limit 1"
            if self.is_complete or (self.store_error and (sql.execute(before, row).fetchone() or [None])[0]):
                sql.execute("update facts set store_error = :store_error where store_error is not :store_error", row)
            if self.is_complete and not self.is_braked:  # else the same keys are listed, and the loss reported, again
                sql.execute("update facts set looked_up_to = :looked_up_to, looked_at = :started_at", row)


def read_contents(cycle: Cycle, level: Sequence[Dataset]) -> Iterator[bool | None]:
    """Read each version of an object that another program stored. Yields True while it waits for the store."""
    for dataset in level:
        if dataset.name not in cycle.readers:
            continue
        children = cycle.configuration.children_of(dataset.name)
        freshness, after = dataset.freshness, ""
        is_validated_only = not (children or freshness.until or freshness.live)
        few: float = READ_AT_ONCE
        while unread := _unread(cycle, dataset, after, min(few, cycle.may_verify) if is_validated_only else few):
            reading = {row.object_id: cycle.prefetch.submit(_inspect, cycle, dataset, children, row) for row in unread}
            while not all(future.done() for future in reading.values()):
                yield True
            found = {number: inspection for number, future in reading.items() if (inspection := future.result())}
            yield from cycle.rewrite(found, functools.partial(_judged, cycle, found), 1)  # one may change others
            after = unread[-1].key
            cycle.done += len(unread)
            cycle.may_verify -= len(unread) * is_validated_only


def _unread(cycle: Cycle, dataset: Dataset, after: str, few: float) -> list[ObjectRow]:
    with cycle.ledger() as ledger:
        return ledger.objects(
            """
            o.dataset_id = (select dataset_id from datasets where dataset = :dataset)
            and o.etag is not o.read_etag and o.etag is not null and o.key > :after and o.state != 'dropped'
            order by o.key limit :few
            """,
            {"dataset": dataset.name, "after": after, "few": few},
        )


def _inspect(cycle: Cycle, dataset: Dataset, children: Sequence[Dataset], target: ObjectRow) -> Inspection | None:
    """None also for an object that is gone since it was listed: the next cycle sees that."""
    try:
        return inspect_content(dataset, target, children, cycle.store)
    except UnusablePathError as error:
        cycle.problems.append(str(error))
        return None


def _judged(cycle: Cycle, found: Mapping[int, Inspection], ledger: Ledger, row: ObjectRow) -> ObjectRow:
    inspection = found[row.object_id]
    if inspection.valid and (named := note_mentions(ledger, row, inspection)):
        ledger.touch(row.dataset)
        cycle.has_new_pages |= PAGES in {expression for expression, _ in named}
    if inspection.valid and row.read_etag not in (None, row.etag):  # another program, or a runner that crashed
        expect_children(ledger, row, set(), is_fetched=True, is_changed=True)
    outdated = inspection.outdated or row.outdated
    return ledger.appraised(row._replace(**inspection.facts(row.etag), outdated=outdated))


# ---------------------------------------------------------------- Reconcile
# Expected against present. A cycle is a row of short steps, so that the runner can claim in between: compute
# the expected objects, list the store, note the differences, read contents. It derives everything from
# state, so a missed event costs nothing. Headline: reconcile().

LISTED_AT_ONCE = 4  # prefixes
BRAKE_OBJECTS, BRAKE_SHARE, BRAKE_EMPTY = 100, 0.10, 10


def reconcile(
    database: Database,
    configuration: Configuration,
    store: Store,
    clock: Clock,
    options: CycleOptions = CycleOptions(),
    prefetch: Prefetch = Prefetch(),
) -> Iterator[int]:
    """One cycle, as steps: each `next()` does a little and yields the cycle's id, or 0 while it waits for the store;
    the last step records the result. An error of the store ends the cycle and is recorded in its row."""
    cycle = Cycle(database, configuration, store, clock, options, prefetch)
    try:
        yield cycle.cycle_id
        for waits in _steps(cycle):
            cycle.save_progress()
            yield 0 if waits else cycle.cycle_id
        cycle.is_complete = True
    except StoreError as error:
        cycle.store_error = str(error)
        cycle.problems.append(f"{error}: {error.hint}" if error.hint else str(error))
    except BaseException:  # stopped, interrupted, or an error of the program's own
        cycle.problems.append(STOPPED_EARLY)
        raise
    finally:
        cycle.end()


def run_cycle(steps: Iterator[int]) -> int:
    """Do all steps of a cycle; returns its id."""
    return max(steps)


def _steps(cycle: Cycle) -> Iterator[bool | None]:
    """Yields True while it waits for the store."""
    if not cycle.last_id():  # what follows is appraised and ranked as of today
        with cycle.database.transaction() as sql:
            sql.execute("update facts set priorities = ?", (cycle.ranked_by,))
    _forget_readings(cycle)
    for level in cycle.configuration.levels():
        cycle.has_new_pages = True
        while cycle.has_new_pages:
            cycle.has_new_pages = False
            cycle.enter("expanding")
            yield from _expand(cycle, level)
            cycle.enter("listing")
            yield from _compare(cycle, level)
            _end_expansion(cycle)
            if cycle.listed:  # else the store may be empty, or another one
                yield from _apply_losses(cycle)
            cycle.enter("reading")
            yield from read_contents(cycle, level)
    # datasets that are no longer declared, with objects that no other dataset has taken over
    undeclared = """
        select dataset from datasets
        where not active and dataset_id in (select dataset_id from counts where state != 'dropped' and objects > 0)
    """
    cycle.enter("ageing")
    yield from _drop_unexpected(cycle, [row[0] for row in cycle.database.read(undeclared)], cycle.last_id())
    yield from _apply_losses(cycle)
    yield from _age(cycle)


def _forget_readings(cycle: Cycle) -> None:
    """Contents that were judged by other rules are read once more."""
    change = "update datasets set reading = ?1 where dataset = ?2 and reading != ?1 returning dataset_id"
    forget = "update objects set read_etag = null where read_etag is not null and dataset_id = ?"
    with cycle.ledger() as ledger:
        for dataset in cycle.configuration.datasets.values():
            rules = reading_rules(cycle.configuration, dataset)
            ledger.sql.executemany(forget, ledger.sql.execute(change, (rules, dataset.name)).fetchall())


def _expand(cycle: Cycle, level: Sequence[Dataset]) -> Iterator[None]:
    """Make the expected objects of datasets those of now. A dataset whose inputs are unchanged is skipped."""
    with cycle.ledger() as ledger:
        expansions = dict(ledger.sql.execute("select dataset, expansion from datasets").fetchall())
        inputs = {one: expansion_inputs(ledger.sql, one, ledger.now) for one in level}
        changed = {one: now for one, now in inputs.items() if expansions[one.name] != now}
        begin = "update datasets set expansion = '' where dataset = ?"
        ledger.sql.executemany(begin, [(one.name,) for one in changed])
    kept, last = dict.fromkeys(changed, 0), cycle.last_id()
    for dataset in changed:
        problems_before = len(cycle.problems)
        for page in _partitions(cycle, dataset):
            with cycle.ledger() as ledger:
                known, new = expect(ledger, dataset, page)
            kept[dataset] += known
            cycle.new += new
            cycle.done += known + new
            yield
        if len(cycle.problems) > problems_before:
            changed[dataset] = "with problems"  # the next cycle expands it, and reports them, again
    live = "select sum(objects) from counts join datasets using (dataset_id) where dataset = ? and state != 'dropped'"
    shrunk = [one.name for one, count in kept.items() if (cycle.database.value(live, (one.name,)) or 0) != count]
    yield from _drop_unexpected(cycle, shrunk, last)
    with cycle.ledger() as ledger:
        ledger.sql.executemany("update datasets set ready = 1 where dataset = ?", [(one.name,) for one in level])
    cycle.expanded = {one.name: now for one, now in changed.items()}


def _partitions(cycle: Cycle, dataset: Dataset) -> Iterator[Iterable[Partition]]:
    """The partitions of a dataset, some at a time: those that it declares, or those that its parents name, and the
    pages that its pages name."""
    configuration, now = cycle.configuration, cycle.clock.wall()
    parents = [configuration.datasets[name] for name in dataset.partitions.parents]
    if not parents:
        declared = expand(dataset, now)
        yield from chunks(((fields, None) for fields in declared), WRITTEN_AT_ONCE)
    for parent in [*parents, *([dataset] if dataset.pages else [])]:
        after = ("", "")
        while rows := ids_of_parents(cycle.database, dataset, parent, after):
            yield (
                (fields, row["object_id"])
                for row in rows
                for fields in expand_named(dataset, parent, json.loads(row["fields"]), row["value"], now)
            )
            after = rows[-1]["key"], rows[-1]["value"]


def _end_expansion(cycle: Cycle) -> None:
    """A level that still has new objects is expanded again by the next cycle: they lie where the store could not be
    listed, or a parent that was fetched meanwhile has named them, and may not be the first that does."""
    if not cycle.new:
        with cycle.ledger() as ledger:
            done = "update datasets set expansion = ? where dataset = ?"
            ledger.sql.executemany(done, [(inputs, name) for name, inputs in cycle.expanded.items()])
    cycle.new = 0


def _drop_unexpected(cycle: Cycle, datasets: Sequence[str], last: int) -> Iterator[None]:
    """Drop the objects of expanded datasets that are not wanted, up to the last that was known before."""
    unwanted = """
        o.object_id > :after and o.object_id <= :last
        and d.dataset in (select value from json_each(:datasets))
        and not exists (select 1 from wanted w where w.key = o.key)
    """
    names = json.dumps(datasets)
    yield from cycle.scan(
        last if datasets else 0, lambda ledger, page: ledger.drop(unwanted, {**page, "datasets": names})
    )


def _compare(cycle: Cycle, level: Sequence[Dataset]) -> Iterator[bool | None]:
    """List the store and note what differs from what is known. Each page proves its own range of keys
    and nothing beyond it; below a prefix that was compared before only open objects are searched again. Yields True
    while it waits for the store."""
    ordered = json.loads(cycle.database.value("select ordered from facts"))
    prefixes = sorted({dataset.key.text.partition("{")[0] for dataset in level})
    listings, failed = list[Listing](), set[str]()
    for number, prefix in enumerate(prefixes):
        if prefix.startswith(tuple(prefixes[:number])):
            continue  # it is within another
        share = NO_KEYS if prefix.startswith(tuple(cycle.compared)) else cycle.share
        ranges = ranges_to_list(cycle.database, prefix, share if prefix in ordered else ALL_KEYS)
        listings += [
            Listing(cycle.store, prefix, keys, cycle.prefetch, is_ordered=prefix in ordered) for keys in ranges
        ]
    for number, listing in enumerate(listings):
        for following in listings[number : number + LISTED_AT_ONCE]:
            following.start()
        try:
            yield from _compare_listing(cycle, listing)
        except UnusablePathError as error:  # nothing is proven from there on; the other listings go on
            cycle.problems.append(str(error))
            failed.add(listing.prefix)
    cycle.compared |= {listing.prefix for listing in listings} - failed


def _compare_listing(cycle: Cycle, listing: Listing) -> Iterator[bool | None]:
    low = listing.keys.low
    try:
        for page in listing.pages():
            if page is None:
                yield True
                continue
            yield from _compare_range(cycle, page, KeyRange(low, page[-1].key))
            low = page[-1].key + "\0"
        yield from _compare_range(cycle, [], KeyRange(low, listing.keys.high))
    finally:
        if listing.was_ascending is not listing.is_ordered:
            order = json.dumps({listing.prefix: 1 if listing.was_ascending else None})
            with cycle.database.transaction() as sql:
                sql.execute("update facts set ordered = json_patch(ordered, ?)", (order,))


def _compare_range(cycle: Cycle, page: Sequence[StoredObject], keys: KeyRange) -> Iterator[None]:
    """Compare the listed part of a range of keys with the known objects there, which may be many more."""
    listed, low = {entry.key: entry for entry in page}, keys.low
    cycle.listed += len(page)
    while True:
        known = cycle.database.read(
            """
            select object_id, key, etag, proven, dataset_id, cycle_id is ? as is_newer
            from objects
            where key >= ? and key <= ? and state != 'dropped'
            order by key
            limit ?
            """,
            (cycle.cycle_id, low, keys.high, CHUNK),
        )
        differing = []
        for object_id, key, etag, proven, dataset_id, is_newer in known:
            entry = listed.get(key)
            cycle.present[dataset_id] += etag is not None
            if is_newer or dataset_id not in cycle.datasets:
                continue  # stored since this listing may have begun, or to be dropped
            if entry is None and etag is not None:
                cycle.losses.setdefault(dataset_id, array.array("q")).append(object_id)
            elif proven != 1 or (entry is not None and entry.etag != etag):
                differing.append(object_id)
        cycle.looked += len(known)
        cycle.done += len(known)
        yield from cycle.rewrite(differing, lambda ledger, row: _searched(cycle, ledger, row, listed.get(row.key)))
        yield
        if len(known) < CHUNK:
            break
        low = known[-1]["key"] + "\0"
    yield from _insert_new(cycle, keys, listed)


def _insert_new(cycle: Cycle, keys: KeyRange, listed: Mapping[str, StoredObject]) -> Iterator[None]:
    """Insert the new objects in a range of keys with the state that the listing shows."""
    low, count = keys.low, WRITTEN_AT_ONCE if cycle.new else 0
    while count >= WRITTEN_AT_ONCE:
        with cycle.ledger() as ledger:
            wanted, rows, now = new_objects(ledger, cycle.expanded, low, keys.high), [], int(ledger.now)
            for key, number, fields, season, day, available_at, parent_id in wanted:
                row = ObjectRow(0, cycle.datasets[number], key, fields or "", season, day, available_at, since=now)
                rows.append((number, parent_id, *_searched(cycle, ledger, row, listed.get(key))[2:]))
            # one statement: for each, SQLite may write a journal to a file, because a trigger follows its rows
            insert = INSERT_OBJECTS.format(rows=", ".join([ROW] * len(rows)))
            inserted = ledger.sql.execute(insert, [value for row in rows for value in row]).rowcount if rows else 0
        cycle.new -= inserted
        cycle.looked += inserted
        cycle.done += inserted
        count, low = len(wanted), wanted[-1]["key"] + "\0" if wanted else ""
        yield


def _searched(cycle: Cycle, ledger: Ledger, row: ObjectRow, entry: StoredObject | None) -> ObjectRow:
    """The row of an object for which the store was searched. Content of another version counts as unread. No clock but
    ours says how old it is: one that is fast would keep it fresh for longer."""
    if not entry:
        return ledger.appraised(row._replace(proven=1))
    now = int(ledger.now)
    facts: dict[str, Any] = {"proven": 1, "seen_at": row.seen_at or now, "etag": entry.etag, "size": entry.size}
    if entry.etag != row.etag:  # else the source may have said later that it has not changed
        facts.update(modified_at=min(entry.modified_at, now), validators=None)
    if row.dataset not in cycle.readers:
        facts.update(UNREAD, read_etag=entry.etag)
    elif row.read_etag != entry.etag and row.state not in GAPS:  # a gap stays one until it is read
        facts.update(UNREAD, read_etag=row.read_etag)
    return ledger.appraised(row._replace(**facts))


def _apply_losses(cycle: Cycle) -> Iterator[None]:
    """An object that was present and is no longer listed is missing, unless so many are gone that the listing or the
    mount is more likely at fault."""
    total = sum(map(len, cycle.losses.values()))
    for dataset_id in cycle.losses.keys() & cycle.datasets.keys():
        lost, present, name = cycle.losses.pop(dataset_id), cycle.present[dataset_id], cycle.datasets[dataset_id]
        many = len(lost) > BRAKE_OBJECTS and len(lost) > BRAKE_SHARE * present
        everything = (len(lost) == present and present > BRAKE_EMPTY) or (cycle.listed == 0 and total > BRAKE_EMPTY)
        if name not in cycle.options.accept_loss and (many or everything):
            cycle.is_braked = True
            text = f"{name}: {len(lost)} of {present} objects {VANISHED}, no gap was opened"
            cycle.problems.append(f"{text}; if the loss is real: adce.py reconcile --accept-loss {name}")
            continue
        yield from cycle.rewrite(lost, lambda ledger, row: ledger.appraised(row._replace(proven=1, **GONE)))


def _age(cycle: Cycle) -> Iterator[None]:
    """Note the changes that time alone makes. Each day, and by other weights, tasks are ranked anew; after a change of
    datasets everything is appraised as well."""
    has_more = True
    while has_more:
        with cycle.ledger() as ledger:
            has_more = advance(ledger)
        yield
    for dataset in cycle.configuration.datasets.values():
        if dataset.batch:
            yield from _resize_gaps(cycle, dataset, dataset.batch)
    ranked_by = cycle.database.value("select priorities from facts")
    if ranked_by != cycle.ranked_by:
        condition = "o.state != 'dropped' and d.active" + (" and o.task is not null" if ranked_by else "")
        yield from cycle.scan(cycle.last_id(), functools.partial(_review, cycle, condition))
        with cycle.database.transaction() as sql:
            sql.execute("update facts set priorities = ?", (cycle.ranked_by,))


def _review(cycle: Cycle, condition: str, ledger: Ledger, ids: dict[str, Any]) -> None:
    """Appraise and rank objects by the rules of today."""
    for row in ledger.objects(f"{condition} and o.object_id > :after and o.object_id <= :last", ids):
        new = row
        if row.etag is not None and row.dataset not in cycle.readers:
            new = row._replace(**{**UNREAD, "read_etag": row.etag})
        new = ledger.appraised(new)
        if new.task and not cycle.configuration.datasets[row.dataset].batch:
            new = new._replace(gap_size=1)
        new = ledger.ranked(new) if new.task else new
        if new != row:
            ledger.write([new])


def _resize_gaps(cycle: Cycle, dataset: Dataset, batch: Batch) -> Iterator[None]:
    """The size of a gap is the number of objects that one batch would bring."""
    resized = cycle.database.read(
        """
        select object_id, size
        from (
            select object_id, gap_size, min(?, count(*) over (partition by fields ->> ?)) as size
            from objects
            where dataset_id = (select dataset_id from datasets where dataset = ?) and task is not null
              and state != 'dropped'
        )
        where size != gap_size
        """,
        (batch.max, batch.group_by, dataset.name),
    )
    sizes = dict(map(tuple, resized))
    yield from cycle.rewrite(sizes, lambda ledger, row: ledger.ranked(row._replace(gap_size=sizes[row.object_id])))


# ---------------------------------------------------------------- Requests
# One HTTP request: a deadline for all of it, a cap on its size, no hidden retries. A redirect is handed back, because
# each hop needs a permit of its own. Headlines: validate_and_store(), request().

CONNECT_SECONDS = 10
KEPT_SECONDS = 1  # an idle connection
STANDSTILL_SECONDS = 5  # a timeout that is noticed so late says nothing about the source
MAX_REDIRECTS = 5
CLASSIFIED_BYTES = 1 << 20  # of a body, in which its meaning is looked for
KEPT_ON_OTHER_HOSTS = ("user-agent", "accept", "accept-language", "accept-encoding")


def request(claimed: Claim, store: Store, clock: Clock) -> list[Result]:
    """One HTTP request with a deadline for all of it, and a result for each object. Reads at most a block more than
    max_bytes.

    Raises StoreError when there is no place for the body; then nothing was sent."""
    import requests
    import urllib3

    conditions, status = _conditions(claimed, store), None
    headers = {**_headers(claimed), **conditions}
    most = max(one.dataset.validate.most() for one, _ in claimed.parts())
    with store.spool() as body:
        deadline = Deadline(claimed, clock)
        try:
            with responded(deadline, headers) as (response, cookies):
                status = response.status_code
                try:
                    for block in _decoded(claimed.tasks[0].key, response):
                        fill(body, block)
                        if body.tell() > (most if status == 200 else CLASSIFIED_BYTES) or deadline.passed:
                            break
                except (zlib.error, urllib3.exceptions.HTTPError):
                    if status == 200:  # any other status counts without its body
                        raise
                if deadline.passed:
                    raise requests.Timeout
                if status == 304 and conditions:
                    results = _unchanged(claimed, response, store)
                else:
                    results = _judge(claimed, response, body, store, deadline)
                first = dataclasses.replace(results[0], requests=1, cookies=cookies, headers=response.headers)
                return [first, *results[1:]]
        except (Error, urllib3.exceptions.HTTPError, OSError, ValueError, zlib.error) as error:  # OSError: of requests
            return claimed.results(_failure(error, deadline, headers, status))


@contextlib.contextmanager
def responded(deadline: Deadline, headers: Mapping[str, str]) -> Iterator[tuple[Any, Any]]:
    """The response to a request, whose body is read until its deadline, and the cookies after it."""
    import requests

    claimed, seconds = deadline.claimed, deadline.claimed.source.timeout_seconds
    with SESSIONS.opened(deadline) as opened:
        opened.trust_env = claimed.source.trust_env
        opened.cookies = claimed.cookies or requests.cookies.RequestsCookieJar()  # none of an earlier request
        options: Any = {"timeout": (min(CONNECT_SECONDS, seconds), seconds), "stream": True, "allow_redirects": False}
        options |= {"data": _sent_body(claimed)} if claimed.dataset.body else {}
        with opened.request(claimed.dataset.method, _sent_url(claimed), headers=headers, **options) as response:
            yield response, opened.cookies


def _failure(error: Exception, deadline: Deadline, headers: Mapping[str, str], status: int | None) -> Result:
    """The result of a request that an exception has ended, after its response had begun with a status, or before."""
    import requests
    import urllib3

    claimed, seconds = deadline.claimed, deadline.claimed.source.timeout_seconds
    if isinstance(error, StoreError):
        return dataclasses.replace(_store_failure(error), http_status=status, requests=1)
    if isinstance(error, PrivateAddressError):
        return Result(Outcome.HTTP_ERROR, str(error))
    if isinstance(error, Error):  # before it was sent, or when the runner stopped after the response
        return Result(Outcome.LOST, str(error), requests=int(status is not None))
    unfit = [f"header {name}" for name, text in headers.items() if UNSENDABLE.search(text)]
    unfit += [] if deadline.is_connected else ["address"]
    if isinstance(error, ValueError) and unfit:  # nothing was sent
        return Result(Outcome.ERROR, f"its {unfit[0]} cannot be sent ({type(error).__name__})")
    if deadline.clock.boot() > deadline.begun + seconds + STANDSTILL_SECONDS:
        return Result(Outcome.LOST, "this process was suspended during the request", requests=1)
    if deadline.passed or isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return Result(Outcome.TIMEOUT, f"timed out after {seconds:g} s", requests=1)
    if isinstance(error, zlib.error):
        text = re.sub(r"^Error -\d+ while decompressing data", "its encoding is broken", str(error))
        return Result(Outcome.BROKEN, text, status, requests=1)
    outcome, text = connection_error(error)
    if outcome is Outcome.BROKEN and status is None and deadline.reuses:  # its next attempt gets a new one
        SESSIONS.closers[deadline.reuses] = time.monotonic()
        outcome, text = Outcome.LOST, f"{text} that was used again"
    host = urllib.parse.urlsplit(claimed.url).hostname or claimed.source.name
    return Result(outcome, f"{host} {text}", status, requests=1)


def _decoded(key: str, response: Any) -> Iterator[bytes]:
    """The body of a response in blocks, without its Content-Encoding. Raises zlib.error when that cannot be undone."""
    if response.raw.chunked and (file := response.raw._fp.fp):  # noqa: SLF001
        # urllib3 takes half of a chunk size, "0" of "00ff", for the end, and reads on and on for a negative one
        whole = lambda size: line if (line := file.readline(size))[-1:] in b"\n" and line[:1] != b"-" else b"?"  # noqa: E731
        response.raw._fp.fp = types.SimpleNamespace(read=file.read, readline=whole, close=file.close, flush=file.flush)  # noqa: SLF001
    transfer = response.headers.get("Transfer-Encoding", "").strip().lower()
    if transfer not in ("", "chunked", "identity"):
        raise zlib.error(f"Transfer-Encoding {transfer}, which was not asked for")
    blocks: Iterator[bytes] = response.raw.stream(BLOCK_BYTES, decode_content=False)
    if key.lower().endswith(COMPRESSED):  # servers label the file itself
        return blocks
    asked = response.request.headers.get("Accept-Encoding", "").lower().split(",")
    accepted = {part.partition(";")[0].strip() for part in asked if not re.search(r"q=0[.0\s]*$", part)}
    codings = re.findall(r"[!-+\--~]{1,40}", response.headers.get("Content-Encoding", "").lower())
    for coding in reversed([coding for coding in codings if coding != "identity"]):
        name = coding.removeprefix("x-")
        is_asked = accepted & {name, coding, "*"}
        if not is_asked or name not in ("gzip", "deflate") or len(codings) > 5:  # urllib3 undoes five at most, too
            problem = "cannot be undone" if is_asked else "was not asked for"
            raise zlib.error(f"Content-Encoding {coding}, which {problem}")
        blocks = unpack(blocks, name)
    return blocks


class Deadline:
    """The end of the time for a request, whatever the server does."""

    def __init__(self, claimed: Claim, clock: Clock) -> None:
        self.claimed, self.clock, self.begun = claimed, clock, clock.boot()
        self.ends_at = time.monotonic() + claimed.source.timeout_seconds
        self.is_connected = False
        self.reuses: tuple[str, int] | None = None  # a connection of an earlier request

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.ends_at

    def limit(self, connected: socket.socket) -> None:
        """Give the next operation of a socket the time that is left. Raises TimeoutError when there is none."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connected.settimeout(left)

    def watch(self, connection: Any, connected: socket.socket) -> None:
        """A socket of the request is ready, before TLS. Raises PrivateAddressError for one of a refused redirect."""
        self.is_connected = True
        self.check_permit()
        self.limit(connected)
        if self.claimed.hops:
            require_public(self.claimed.source, connection, connected)

    def check_permit(self) -> None:
        """Once more, when the connection is ready."""
        if self.claimed.permit and self.clock.boot() > self.claimed.permit.send_before:
            raise Error("the permit expired before the request was sent")


class TimedReader(io.RawIOBase):
    """The bytes that a socket receives until a deadline: a server that sends one now and then never trips the timeout
    of a single read."""

    def __init__(self, received: Any, connected: socket.socket, deadline: Deadline) -> None:
        self.received, self.connected, self.deadline = received, connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.deadline.limit(self.connected)
        size: int | None = self.received.readinto(buffer)
        return size

    def close(self) -> None:
        self.received.close()
        super().close()


class Sessions:
    """Sessions of requests, each for one request at a time. The next request uses the same connections for a moment:
    a server may close an idle one at any time, also while a request is being sent."""

    def __init__(self) -> None:
        self._idle = list[Any]()
        self.closers: dict[tuple[str, int], float] = {}  # servers that close kept connections, and since when

    @contextlib.contextmanager
    def opened(self, deadline: Deadline) -> Iterator[Any]:
        """A session for a request with a deadline."""
        try:
            session = self._idle.pop()
        except IndexError:
            session = self._new()
        session.deadline = deadline
        try:
            yield session
        except BaseException:
            session.close()
            raise
        self._idle.append(session)

    def _new(self) -> Any:
        import requests

        session: Any = requests.Session()
        session.get_redirect_target = lambda _: None  # _judge() reads it; requests would load the body first
        for adapter in session.adapters.values():  # none of them retries
            _on_pools(adapter, functools.partial(_watch_pool, session))
        return session


SESSIONS = Sessions()


def _on_pools(adapter: Any, prepare: Callable[[Any], None]) -> None:
    """Prepare each connection pool of an adapter of requests before a use of it, also when it is prepared already."""
    connect = type(adapter).get_connection_with_tls_context

    def connect_prepared(*arguments: Any, **options: Any) -> Any:
        pool = connect(adapter, *arguments, **options)
        prepare(pool)
        return pool

    adapter.get_connection_with_tls_context = connect_prepared
    # a copy in another process would not be prepared: it cannot be pickled
    adapter.__attrs__ = [*type(adapter).__attrs__, "get_connection_with_tls_context"]


def _watch_pool(session: Any, pool: Any) -> None:
    """The deadline of the session's present request watches each socket of a pool."""
    kind = pool.ConnectionCls
    if hasattr(kind, "used_at"):
        return

    class Response(kind.response_class):  # type: ignore[name-defined,misc]
        def __init__(self, connected: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(connected, *arguments, **options)
            self.fp: Any = io.BufferedReader(TimedReader(self.fp.detach(), connected, session.deadline))

        def _read_status(self) -> tuple[str, int, str]:
            version, status, reason = super()._read_status()
            return version, 100 if 102 <= status < 200 else status, reason  # http.client skips 100 only

    class Watched(kind):  # type: ignore[valid-type,misc]
        response_class, used_at = Response, -math.inf

        def _new_conn(self) -> Any:  # the one place where sockets begin
            with contextlib.ExitStack() as opened:
                connected = opened.enter_context(super()._new_conn())
                session.deadline.watch(self, connected)
                opened.pop_all()
            return connected

        def connect(self) -> None:
            super().connect()  # TLS included
            session.deadline.check_permit()

        def request(self, *arguments: Any, **options: Any) -> Any:
            self.used_at, deadline = time.monotonic(), session.deadline
            if self.sock:  # connected for an earlier request, perhaps
                deadline.reuses = None if deadline.is_connected else (self.host, self.port)
                deadline.watch(self, self.sock)
            return super().request(*arguments, **options)

        @property
        def is_connected(self) -> bool:
            now, closed_at = time.monotonic(), SESSIONS.closers.get((self.host, self.port), -math.inf)
            is_fresh = now < self.used_at + KEPT_SECONDS and now > closed_at + HOUR
            return is_fresh and bool(super().is_connected)

    pool.ConnectionCls = Watched


def _validators(claimed: Claim, response: Any, links: Links) -> str | None:
    """The conditions of the next request for a url (RFC 9110, 13.1), as JSON, and the links of the header; None when
    the response has no validators."""
    names, secrets = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}, claimed.dataset.secrets
    found = {name: response.headers.get(header, "") for name, header in names.items()}
    given = {name: text for name, text in found.items() if text and redacted(text, secrets) == text}
    if not (given or _has_links(claimed)):
        return None
    known = {"url": redacted(claimed.url, secrets), "headers": given}
    return json.dumps({**known, "links": links} if _has_links(claimed) else known)


def _conditions(claimed: Claim, store: Store) -> dict[str, str]:
    """The headers that ask for an object only if it is another than the one that is still in the store."""
    target = claimed.tasks[0]
    is_known = target.state == ObjectState.STALE and not claimed.beside and claimed.dataset.method == "GET"
    known = json.loads(target.validators or "{}") if is_known else {}
    if not known.get("headers") or known.get("url") != claimed.url:
        return {}
    stored = store.find(target.key)
    return known["headers"] if stored and (stored.etag, stored.size) == (target.etag, target.size) else {}


def _headers(claimed: Claim) -> dict[str, str]:
    """Secrets for one host are not sent to another, to which it redirects. Only what can be undone is asked for."""
    own_url = url_of(claimed.source, claimed.dataset, claimed.tasks[0].fields) if claimed.hops else ""
    is_own = not claimed.hops or origin_of(claimed.url) == origin_of(from_environment(own_url, claimed.dataset.secrets))
    headers = {**claimed.source.headers, **claimed.dataset.headers}.items()
    sent = {name: from_environment(text) for name, text in headers if is_own or name.lower() in KEPT_ON_OTHER_HOSTS}
    if claimed.dataset.body:
        kind = "application/json" if claimed.dataset.body.lstrip()[:1] in "{[" else "application/x-www-form-urlencoded"
        sent = {"Content-Type": kind, **sent}
    encodings = "gzip, deflate"
    if claimed.tasks[0].key.lower().endswith(COMPRESSED):
        encodings, sent = "identity", {name: sent[name] for name in sent if name.lower() != "accept-encoding"}
    return {"Accept-Encoding": encodings, **sent}


def _sent_body(claimed: Claim) -> bytes:
    """The body of a POST. Values of fields cannot leave the text, or the parameter, that they are in."""
    text = claimed.dataset.body
    quote = (lambda value: json.dumps(value)[1:-1]) if text.lstrip()[:1] in ("{", "[") else quote_for_url
    # in this order: a field may hold a $ that the source has chosen
    template = Template(from_environment(text), FIELD_IN_EXPRESSION)
    return template.render(sent_fields(claimed.dataset, claimed.tasks[0].fields), quote).encode()


def _sent_url(claimed: Claim) -> str:
    """The url with the values of its variables. One that the source has chosen, by a redirect or as the next page, has
    no others."""
    return claimed.url if claimed.hops else from_environment(claimed.url, claimed.dataset.secrets)


def _next_link(claimed: Claim, response: Any) -> dict[str, str]:
    urls = [at["url"] for at in response.links.values() if "next" in at.get("rel", at.get("REL", "")).lower().split()]
    return {"next": redacted(urls[0], claimed.dataset.secrets)} if urls else {}


def _has_links(claimed: Claim) -> bool:
    return bool(claimed.dataset.pages and claimed.dataset.pages.next == LINK)


def _unchanged(claimed: Claim, response: Any, store: Store) -> list[Result]:
    """The result of a 304. A full page is the same when another page, which its header names, follows it now."""
    target, links, answer = claimed.tasks[0], _next_link(claimed, response), Result(Outcome.OK, None, 304)
    if _has_links(claimed) and response.links and links != target.links:
        known = json.dumps({**json.loads(target.validators or "{}"), "links": links})
        found = inspect_stored(claimed, target._replace(validators=known), store)
        if found and found.outcome is Outcome.OK:
            answer = dataclasses.replace(answer, inspection=found.inspection, validators=known)
    return [answer]


def _judge(claimed: Claim, response: Any, body: BinaryIO, store: Store, deadline: Deadline) -> list[Result]:
    """The meaning of a response for each object. A redirect is the next request to make."""
    status, target, parts = response.status_code, claimed.tasks[0], claimed.parts()
    if not response.is_redirect:
        size, links = body.seek(0, io.SEEK_END), _next_link(claimed, response)
        body.seek(0)
        start = body.read(CLASSIFIED_BYTES)
        answer = classify(claimed.source, status, response.headers, start, claimed.dataset.secrets)
        if answer.outcome is not Outcome.OK:
            return claimed.results(answer)
        is_file = target.key.lower().endswith(".gz")  # half of one can have the whole Content-Length
        if (is_file or claimed.dataset.validate.gzip) and size <= claimed.dataset.validate.most():
            with contextlib.suppress(*[] if is_file else [zlib.error]):  # else it is invalid
                for _ in unpack(blocks_of(body), "gzip"):
                    if deadline.passed:
                        raise TimeoutError
        results = [validate_and_store(one, task, body, store, status, links) for one, task in parts]
        validators = _validators(claimed, response, links)
        return [dataclasses.replace(result, validators=validators) for result in results]
    location = response.headers["location"].strip()
    with contextlib.suppress(UnicodeError):  # http.client takes UTF-8 for Latin-1
        location = location.encode("latin-1").decode()
    try:
        url = urllib.parse.urljoin(_sent_url(claimed), location)
        to = urllib.parse.urlsplit(url)
    except ValueError:
        return claimed.results(Result(Outcome.HTTP_ERROR, f"HTTP {status} to an address that cannot be read", status))
    if claimed.dataset.method == "POST":
        problem = "a redirect of a POST, which is refused"
    elif len(url) > MAX_URL:
        problem = f"redirected to a url of {len(url)} characters, which is refused"
    elif claimed.hops >= MAX_REDIRECTS:
        problem = f"more than {MAX_REDIRECTS} redirects"
    elif to.scheme not in ("http", "https") or (to.scheme == "http" and _sent_url(claimed).startswith("https:")):
        problem = f"redirected to {to.scheme}://{to.hostname}, which is refused"
    else:
        return [Result(Outcome.RUNNING, None, status, redirect=url)] * len(parts)
    return [Result(Outcome.HTTP_ERROR, problem, status)] * len(parts)


# ---------------------------------------------------------------- Programs
# The same limits for programs that use requests, and for libraries built on it: every request that a session sends has
# a permit of its own, be it a redirect or a retry. A command or a call brings its objects as a program in a process
# group of its own: it ends in time, what it prints fills neither memory nor disk, and no process of it is left. fetch()
# does one execution of any kind. Headlines: session(), limit(), run_program(), run_command(), fetch().

TAIL_BYTES = 2000  # of the output, kept with the attempt
TERMINATE_SECONDS = 5  # between SIGTERM and SIGKILL
DRAIN_SECONDS = 0.5  # for the rest of the output: a process that has escaped may hold the pipe open
SIGNALS = {member.value: member.name for member in signal.Signals}
FAILURE = "failure"  # the file in which a call reports an exception


def session(source: str, config: str | os.PathLike[str] | None = None, wait: float | None = None) -> Any:
    """A requests.Session that asks a source as adce.yaml declares it: under its limits, with its headers and
    its timeout. A path such as "/scoreboard" is appended to its base_url. Raises Error for an unknown source.

    Its requests wait for their permits, `wait` seconds at most each; then they raise RateLimitedError."""
    import requests

    described, present = shared_limiter(config).source(source), threading.local()

    class SourceSession(requests.Session):
        def request(self, method: Any, url: Any, *arguments: Any, **options: Any) -> Any:
            options.setdefault("timeout", described.timeout_seconds)
            url = from_environment(described.base_url) + url if str(url).startswith("/") else url
            return super().request(method, url, *arguments, **options)

        def send(self, request: Any, **options: Any) -> Any:
            before = getattr(request, "redirected_by", "")
            present.is_hop = bool(before)
            if before.startswith("https:") and request.url.startswith("http:"):
                raise PrivateAddressError(f"redirected to http://{origin_of(request.url)[1]}, which is refused")
            return super().send(request, **options)

        def rebuild_auth(self, prepared_request: Any, response: Any) -> None:
            super().rebuild_auth(prepared_request, response)  # type: ignore[no-untyped-call]
            prepared_request.redirected_by = response.request.url
            if origin_of(prepared_request.url) != origin_of(response.request.url):
                for name in described.headers:
                    if name.lower() not in KEPT_ON_OTHER_HOSTS:
                        prepared_request.headers.pop(name, None)

        def adce_check(self, connection: Any) -> None:
            if getattr(present, "is_hop", False):
                connection.sock or connection.connect()
                require_public(described, connection, connection.sock)

    opened = SourceSession()
    opened.headers.update({name: from_environment(text) for name, text in described.headers.items()})
    opened.trust_env = described.trust_env
    return limit(opened, source, config, wait)


def limit(session: Any, source: str, config: str | os.PathLike[str] | None = None, wait: float | None = None) -> Any:
    """Put a requests.Session that exists under the limits of a source, and return it.

    Its adapters stay, with their retries, and must be HTTPAdapters; one that is mounted later is not limited. Raises
    Error for an unknown source, and when an adapter is limited for another source already."""
    limiter = shared_limiter(config)
    limiter.source(source)
    for adapter in session.adapters.values():
        owner = getattr(adapter, "adce_source", source)  # sessions may share an adapter
        if owner != source:
            raise Error(f'this session is limited for source "{owner}" already', "give each source its own session")
        adapter.adce_source = source
        ask, check = functools.partial(limiter.permit, source, wait), getattr(session, "adce_check", lambda _: None)
        _on_pools(adapter, functools.partial(_limit_pool, ask, check))
    return session


def _limit_pool(
    ask: Callable[[], contextlib.AbstractContextManager[ActivePermit]], check: Callable[[Any], None], pool: Any
) -> None:
    """Give every request of a connection pool a permit, also those that urllib3 repeats."""
    from http.client import HTTPException

    import urllib3

    make_request = type(pool)._make_request  # noqa: SLF001  # which each of them passes

    def make_limited_request(connection: Any, *arguments: Any, **options: Any) -> Any:
        with ask() as held:
            if connection.sock and urllib3.util.connection.is_connection_dropped(connection):
                connection.close()  # by the server, during the wait; it connects again
                if pool.proxy is not None and pool.scheme == "https":
                    pool._prepare_proxy(connection)  # noqa: SLF001  # which has forgotten its tunnel
            try:
                check(connection)
                response = make_request(pool, connection, *arguments, **options)
            except (urllib3.exceptions.HTTPError, HTTPException, OSError) as error:
                held.failed(*connection_error(error))
                raise
            held.answered(response.status, response.headers)
            return response

    pool._make_request = make_limited_request  # noqa: SLF001


class ProgramEnd(NamedTuple):
    """How a program ended."""

    text: str  # exit 1, killed by SIGSEGV, timed out, printed more than 10 bytes
    tail: bytes = b""  # the end of its output
    body: bytes = b""  # its standard output, when that was wanted


def run_program(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float, max_bytes: int | None = None
) -> ProgramEnd:
    """Run a program to its end, for `seconds` at most. With `max_bytes` its standard output is kept up to that length.

    It gets `environment` and the variables named in INHERITED. Raises OSError or ValueError when it cannot start."""
    tail, body, text = bytearray(), bytearray(), ""
    with subprocess.Popen(  # noqa: S603  # the user's own program, without a shell
        words,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if max_bytes is None else subprocess.PIPE,
        env=inherited() | dict(environment),
        cwd=folder,
        start_new_session=True,
    ) as process:
        outputs = [(process.stdout, tail if max_bytes is None else body, max_bytes)]
        outputs += [(process.stderr, tail, None)] if process.stderr else []
        readers = [threading.Thread(target=_read_output, args=output, daemon=True) for output in outputs]
        try:
            for reader in readers:
                reader.start()
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            text = "timed out"
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGCONT)  # a stopped process cannot handle SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERMINATE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing but zombies is left
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            end_processes(environment["ADCE_DB"], environment["ADCE_TASK"])
        for reader in readers:
            reader.join(DRAIN_SECONDS)
    if max_bytes is not None and len(body) > max_bytes:
        text = f"printed more than {max_bytes} bytes"
    ended = f"exit {code}" if code >= 0 else f"killed by {SIGNALS.get(-code, f'signal {-code}')}"
    return ProgramEnd(text or ended, bytes(tail), bytes(body))


def _read_output(pipe: Any, kept: bytearray, max_bytes: int | None = None) -> None:
    """Keep the end of what a program prints, or with `max_bytes` its start: past that, SIGPIPE ends the program."""
    with pipe, contextlib.suppress(OSError, ValueError):  # closed, because a process that has escaped holds it
        while block := pipe.read(BLOCK_BYTES):
            kept += block
            if max_bytes is None:
                del kept[: -2 * TAIL_BYTES]  # the first half is cut off when the secrets are out of it
            elif len(kept) > max_bytes:
                break


def end_processes(database: str, tasks: str = "") -> int:
    """Kill each process of this user that began with the variables of a program of this database, or of these tasks
    only, in whatever group it is. Returns how many there were."""
    marks = [f" ADCE_DB={os.path.realpath(database)} ", f" ADCE_TASK={tasks}{tasks and ' '}"]
    ended: set[int] = set()
    for _ in range(100):  # a process that forks meanwhile leaves a child for the next round
        found = {number for number, text in _environments() if all(mark in text for mark in marks)} - {os.getpid()}
        if not found:
            break
        for number in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        ended |= found
        time.sleep(0.002)  # until they are dead
    return len(ended)


def _environments() -> Iterator[tuple[int, str]]:
    """The processes of this machine, with a space around each variable that they began with."""
    with contextlib.suppress(OSError):  # no descriptor is left, or there is no ps: the next start repeats it
        if not (PROC / "self/environ").exists():
            words = ["ps", "-axEww" if sys.platform == "darwin" else "axeww", "-o", "pid=,command="]
            for line in subprocess.run(words, capture_output=True, check=False).stdout.splitlines():  # noqa: S603
                number, _, text = os.fsdecode(line.strip()).partition(" ")
                yield int(number), f"{text} "
            return
        for name in filter(str.isdigit, os.listdir(PROC)):  # noqa: PTH208  # names only
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                variables = os.fsdecode((PROC / name / "environ").read_bytes())
                yield int(name), f" {variables} ".replace("\0", " ")


def output_folder(database: Path) -> Path:
    """The folder in which programs leave objects for ADCE to store; swept at each start."""
    return database.with_name(f"{database.name}-output")


def run_command(claimed: Claim, store: Store) -> list[Result]:
    """Run the program of a command or a call; it has succeeded for each object that is whole in the store afterwards.

    A body that it prints (`output: stdout`) or leaves at $ADCE_OUTPUT is stored for it after exit code 0 only: a part
    of an object can look whole."""
    dataset, outputs = claimed.dataset, output_folder(Path(claimed.environment["ADCE_DB"]))
    is_printed = dataset.output == "stdout"
    most = dataset.validate.most() if is_printed else None
    try:
        words, environment = _command_line(claimed)
    except ValueError as error:
        return claimed.results(Result(Outcome.INVALID, str(error)))
    outputs.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=outputs, ignore_cleanup_errors=True) as folder:
        place = Path(folder) if dataset.batch else Path(folder, "object")
        environment["ADCE_OUTPUT"], beside = str(place), Path(environment["ADCE_CONFIG"]).parent
        try:
            end = run_program(words, beside, environment, dataset.timeout_seconds, most)
        except (OSError, ValueError) as error:
            text = f"cannot start {words[0]}: {getattr(error, 'strerror', None) or error}"
            return claimed.results(Result(Outcome.ERROR, text))
        output, results = redacted(end.tail.decode("utf-8", "replace"), hidden_names(dataset))[-TAIL_BYTES:], []
        if dataset.call:
            with contextlib.suppress(OSError), open_regular(Path(folder, FAILURE)) as failure:
                outcome, text, retry_after = json.load(failure)
                text = excerpt(text.encode("utf-8", "replace"), names=hidden_names(dataset))
                return [Result(Outcome(outcome), text, retry_after=retry_after, output=output)]
        for target in claimed.tasks:
            body, handed = None, place / target.key if dataset.batch else place
            with contextlib.ExitStack() as opened:
                with contextlib.suppress(OSError):
                    body = opened.enter_context(io.BytesIO(end.body) if is_printed else open_regular(handed))
                result = _judge_end(claimed, target, end._replace(tail=output.encode()), body, store)
            results.append(dataclasses.replace(result, output=output))
        return results


def _command_line(claimed: Claim) -> tuple[list[str], dict[str, str]]:
    """The words and the variables of a program. A command gets the variables that its dataset names, and finds this
    interpreter as `python` and this module as `adce`; a call gets all variables, as a part of this program.

    Raises ValueError for a value, which a source may have chosen, that would be an option or several values."""
    dataset, fields = claimed.dataset, dict(claimed.tasks[0].fields)
    if dataset.call:  # -u: the output of one that is killed is complete
        words = [sys.executable, "-u", str(Path(__file__).resolve()), "call", dataset.call, json.dumps(fields)]
        limits = {"ADCE_MAX_BYTES": str(dataset.validate.most()), "ADCE_WAIT": str(dataset.timeout_seconds)}
        return words, {**os.environ, **limits, **claimed.environment}
    for name in dataset.partitions.own_fields():
        values = [target.fields[name] for target in claimed.tasks]
        fields[f"{name}s"] = ",".join(values)
        if any("," in value for value in values) and f"{{{name}s}}" in "".join(word.text for word in dataset.command):
            raise ValueError(f"a {name} has a comma, which is between the values of {{{name}s}}: {fields[name][:60]}")
    inherited = {name: os.environ[name] for name in dataset.environment if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    own = {"PATH": path, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    words = [word.render(fields, str) for word in dataset.command]
    for place, word in enumerate(words):
        if word.startswith("-") and dataset.command[place].text.startswith("{") and "--" not in words[:place]:
            raise ValueError(f"{word[:60]} would be an option; write -- before {dataset.command[place].text}")
    return words, {**own, **inherited, **claimed.environment}


def describe(error: BaseException, most: int = 120, names: Iterable[str] = ()) -> str:
    """An exception in one line, whatever it is."""
    try:
        return excerpt(f"{type(error).__name__}: {error}".encode("utf-8", "replace"), most, names)
    except Exception:  # noqa: BLE001  # its own __str__ failed
        return type(error).__name__


def _judge_end(claimed: Claim, target: ObjectRow, end: ProgramEnd, body: BinaryIO | None, store: Store) -> Result:
    """The result of a program for one object: what it handed over, or what it left in the store. An object that was
    there before does not count, and a command that leaves no bytes has brought nothing."""
    size = body.seek(0, io.SEEK_END) if body else 0
    if body and end.text == "exit 0" and (size or claimed.dataset.call):
        return validate_and_store(claimed, target, body, store)
    if size:
        done = f"handed over {size} bytes, which are not taken"
    else:
        before, found = (target.etag, target.modified_at), inspect_stored(claimed, target, store)
        if found and found.stored and (found.stored.etag, found.stored.modified_at) != before:
            return found
        done = f"left {target.key} as it was" if found else f"left no {target.key}"
    outcome = Outcome.TIMEOUT if end.text == "timed out" else Outcome.ERROR
    return Result(outcome, f"{done} ({end.text}): {excerpt(end.tail[-120:])}")


def call_function(words: Sequence[str]) -> ExitCode:
    """The program of a call: MODULE:FUNCTION and the fields as JSON. Calls the function with the fields that it names,
    and with `session` if it names that: a session under the limits of its source.

    The bytes, the iterator of bytes or the file that it returns go to $ADCE_OUTPUT, an exception beside it."""
    place, most = Path(os.environ["ADCE_OUTPUT"]), int(os.environ["ADCE_MAX_BYTES"])
    sys.path.append(str(Path(os.environ["ADCE_CONFIG"]).parent))
    module, _, name = words[0].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        parameters = signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        fields = {field: text for field, text in json.loads(words[1]).items() if takes_all or field in parameters}
        if takes_all or "session" in parameters:
            fields["session"] = session(os.environ["ADCE_SOURCE"], wait=float(os.environ["ADCE_WAIT"]))
        value = function(**fields)
        if value is not None:
            with place.open("xb") as file:
                for block in _returned_blocks(value):
                    if file.write(block) and file.tell() > most:
                        break
    except BaseException as error:  # noqa: BLE001  # SystemExit too is the attempt's error
        traceback.print_exc()
        failure: tuple[Outcome, str, float | None] = (Outcome.ERROR, describe(error, TAIL_BYTES), None)
        if isinstance(error, RateLimitedError):  # neither the task nor the source has failed
            failure = (Outcome.LOST, str(error), error.seconds)
        place.with_name(FAILURE).write_text(json.dumps(failure), encoding="utf-8")
        return ExitCode.ERROR
    return ExitCode.DONE


def _returned_blocks(value: Any) -> Iterator[bytes]:
    """The bytes that a function has returned. Raises TypeError when it has returned anything else."""
    if isinstance(value, str | Path):
        with Path(value).open("rb") as file:
            yield from blocks_of(file)
    elif isinstance(value, bytes | bytearray | memoryview):
        yield bytes(value)
    elif isinstance(value, Iterator):
        yield from value
    else:
        raise TypeError(f"returned {type(value).__name__}, not bytes, an iterator of bytes or a path")


def _copy(claimed: Claim, store: Store, original: str) -> Result:
    try:
        with store.open(original) as body, store.spool() as copy:
            fill(copy, body)
            return validate_and_store(claimed, claimed.tasks[0], copy, store)
    except KeyError:
        return Result(Outcome.NOT_YET, f"{original} is not in the store")


def fetch(claimed: Claim, store: Store, clock: Clock) -> list[Result]:
    """Bring the objects of a claim into the store. One result for each task, without secrets; never raises.

    An object that is in the store already, and whole, is not asked for again."""
    names = hidden_names(claimed.dataset)
    results = _fetch(claimed, store, clock)
    return [dataclasses.replace(one, error=redacted(one.error, names)) if one.error else one for one in results]


def _fetch(claimed: Claim, store: Store, clock: Clock) -> list[Result]:
    try:
        parts = claimed.parts()
        if claimed.refusal:
            return claimed.results(Result(Outcome.INVALID, claimed.refusal))
        is_missing = len(claimed.tasks) == 1 and all(row.state == ObjectState.MISSING for _, row in parts)
        # a request to the bucket, in which the last cycle has found nothing, and nothing was tried since
        is_remote = isinstance(store, S3Store) and claimed.url
        is_searched = is_remote and all(row.proven == 1 and not row.attempts for _, row in parts)
        if is_missing and not is_searched and not claimed.hops:
            found = [inspect_stored(one, row, store) for one, row in parts]
            judged = [one for one in found if one and one.inspection and not one.inspection.outdated]
            if whole := [one for one in judged if one.outcome is Outcome.OK]:
                unasked = Result(Outcome.LOST, "not asked for: an object of the same url is in the store")
                return [one if one in whole else unasked for one in found]
        if claimed.dataset.original:
            return [_copy(claimed, store, claimed.dataset.original.render(claimed.tasks[0].fields, quote_for_key))]
        return request(claimed, store, clock) if claimed.url else run_command(claimed, store)
    except StoreError as error:
        return claimed.results(_store_failure(error))
    except Error as error:
        return claimed.results(Result(Outcome.LOST, str(error)))
    except BaseException as error:  # noqa: BLE001  # whatever a scraper raises is the attempt's error
        text = describe(error, names=hidden_names(claimed.dataset))
        return claimed.results(Result(Outcome.ERROR, text, requests=int(bool(claimed.url))))  # it may be sent


# ---------------------------------------------------------------- Cluster
# Workers on other machines: a cluster of dask.distributed. An attempt has its permit before it is sent, and begins at
# most once: its worker asks a register in the scheduler, where the runner cancels what has not begun. An attempt whose
# worker is lost ends when no request of it can be under way. Headlines: Cluster, run_on_worker().

POOL_SECONDS = 1  # between two looks at the workers
BEGIN_SECONDS = 5  # for an attempt to begin after it was sent, and then to send its request
UNSEEN_SECONDS = 10  # without a heartbeat; then a worker counts as lost
NOT_BEGUN = "not started in time"


class Register:
    """The attempts of one connection that have begun, kept in the process of the scheduler."""

    def __init__(self) -> None:
        self.begun, self.least, self.looked_at = set[int](), 0, time.monotonic()

    async def begin(self, attempt: int) -> bool:
        """Whether an attempt may begin: once, and only while its runner looks."""
        is_over = attempt < self.least or attempt in self.begun
        self.begun.add(attempt)
        return not is_over and time.monotonic() < self.looked_at + BEGIN_SECONDS

    def look(self, least: int, late: Collection[int]) -> set[int]:
        """Cancel the attempts that are `late`, if they have not begun: these are returned. None before `least` is
        under way."""
        self.looked_at, self.least = time.monotonic(), least
        cancelled = {*late} - self.begun
        self.begun = {attempt for attempt in self.begun | cancelled if attempt >= least}
        return cancelled


class Worker(NamedTuple):
    """A worker of the cluster."""

    name: str
    threads: int
    unseen_seconds: float  # since its last heartbeat


def look_at_cluster(
    name: str, least: int, late: Collection[int], dask_scheduler: Any
) -> tuple[dict[str, Worker], set[int]]:
    """Runs in the scheduler: its workers by address, and the attempts that Register.look() has cancelled."""
    register = dask_scheduler.extensions.setdefault(name, Register())
    dask_scheduler.handlers[name] = register.begin
    found, now = {}, time.time()
    for one in dask_scheduler.workers.values():
        threads = one.nthreads if one.status.name == "running" else 0
        found[one.address] = Worker(str(one.name), threads, now - one.last_seen)
    return found, register.look(least, late)


@functools.cache
def _store_of_worker(address: str) -> Store:
    """The store, as the runner has prepared it. Raises StoreError."""
    store = open_store(address)
    if isinstance(store, S3Store):
        store.sweep()  # one client for all attempts
    return store


def _seconds(claimed: Claim) -> float:
    """The most that an execution takes until its body is there."""
    return claimed.source.timeout_seconds if claimed.url else claimed.dataset.timeout_seconds


def run_on_worker(register: str, attempt: int, claimed: Claim, address: str) -> list[Result]:
    """Runs in a worker: fetch(), if the attempt may begin. It stores nothing so late that the runner may have given it
    up. The worker has credentials of its own for the store, another clock, and no database."""
    from distributed import get_worker
    from distributed.utils import sync

    clock, worker = Clock(), get_worker()
    begun_at, name = clock.boot(), str(worker.name)
    if not sync(worker.loop, getattr(worker.scheduler, register), attempt=attempt, callback_timeout=BEGIN_SECONDS):
        return claimed.results(Result(Outcome.LOST, NOT_BEGUN, worker=name))
    if missing := [one for one in claimed.dataset.secrets - os.environ.keys() if not one.startswith("=")]:
        return claimed.results(Result(Outcome.ERROR, f"${min(missing)} is not set on worker {name}", worker=name))
    try:
        store = copy.copy(_store_of_worker(address))
        store.require_mark()
    except StoreError as error:
        return claimed.results(Result(Outcome.STORE_ERROR, f"{error} (on worker {name})", worker=name))
    write, until = store.write, begun_at + _seconds(claimed) + BEGIN_SECONDS

    def write_in_time(key: str, body: bytes | BinaryIO) -> StoredObject:
        if clock.boot() > until:
            raise Error(f"worker {name} was suspended during the attempt")
        return write(key, body)

    store.write = write_in_time  # type: ignore[method-assign]
    permit = claimed.permit and dataclasses.replace(claimed.permit, send_before=begun_at + BEGIN_SECONDS)
    variables = {"ADCE_DB": f"{worker.local_directory}/adce.db", "ADCE_WORKER": name}
    environment = {**claimed.environment, **variables} if claimed.environment else {}
    results = fetch(dataclasses.replace(claimed, permit=permit, environment=environment), store, clock)
    return [dataclasses.replace(one, worker=name) for one in results]


class Sent(NamedTuple):
    """An attempt on its way. Boot times."""

    register: str
    attempt: int
    claimed: Claim
    execution: Future[list[Result]]  # of the engine
    address: str  # of its worker,
    worker: str  # and its name
    at: float


class Cluster:
    """The workers of a cluster. Each future that submit() returns ends with results, also when the worker is lost.

    A thread keeps the connection, looks at the workers, and connects again when the scheduler is lost."""

    def __init__(self, address: str, store: str, clock: Clock, wake: Callable[[], None]) -> None:
        """Raises Error when the package is not installed."""
        if importlib.util.find_spec("distributed") is None:
            raise Error("pool: needs the package distributed", "pip install distributed")
        self.address, self.store, self.clock, self.wake = address, store, clock, wake
        self.problem: str | None = None  # why nothing can begin
        self._register = ""  # its name: each connection has its own
        self._lock, self._ended, self._submitted = threading.Lock(), threading.Event(), 0
        self._client: Any = None
        self._loop: Any = None  # of all its clients
        self._workers = dict[str, Worker]()
        self._sent = dict[Any, Sent]()  # by the future that the runner has
        self._places = dict[Any, str]()  # of executions, also of attempts that were given up: the worker's address
        self._check()
        self._thread = threading.Thread(target=self._work, name="adce-cluster", daemon=True)
        self._thread.start()

    def free_threads(self) -> int:
        """How many more attempts can begin at once."""
        with self._lock:
            return sum(self._free().values())

    def _seen(self) -> dict[str, Worker]:
        return {at: one for at, one in self._workers.items() if one.unseen_seconds < UNSEEN_SECONDS}

    def _free(self) -> dict[str, int]:
        busy = collections.Counter(self._places.values())
        return {at: max(0, one.threads - busy[at]) for at, one in self._seen().items()}

    def submit(self, claimed: Claim) -> Future[list[Result]]:
        """fetch() on the worker with the most free threads."""
        from concurrent.futures import Future

        future, execution = Future[list[Result]](), None
        with self._lock:
            free, client, now = self._free(), self._client, self.clock.boot()
            address = max(free, key=free.__getitem__, default=None)
            if client and address:
                pinned = client.get_executor(pure=False, retries=0, workers=[address], allow_other_workers=False)
                self._submitted += 1
                attempt = self._register, self._submitted, claimed
                execution = pinned.submit(run_on_worker, *attempt, self.store)
                self._sent[future] = Sent(*attempt, execution, address, self._workers[address].name, now)
                self._places[execution] = address
        if execution:
            execution.add_done_callback(functools.partial(self._pass_on, future))
        else:
            future.set_result(claimed.results(Result(Outcome.LOST, "its worker was lost")))
        return future

    def _pass_on(self, future: Future[list[Result]], execution: Future[list[Result]]) -> None:
        """The results of an execution that is done. An error is the engine's: the attempt may have begun."""
        with self._lock:
            self._places.pop(execution, None)
            is_good = not execution.cancelled() and not execution.exception()
            is_awaited = is_good and bool(self._sent.pop(future, None))
        if is_awaited:
            future.set_result(execution.result())
        else:
            self.wake()  # a thread is free

    def _work(self) -> None:
        while not self._ended.wait(POOL_SECONDS):
            before = self.problem, self._seen().keys()
            self._check()
            self._end_lost()
            if before != (self.problem, self._seen().keys()):
                self.wake()
        with contextlib.suppress(Exception):
            self._ask_register(self._submitted + 1, [])  # none may begin any more
        self._disconnect()

    def _check(self) -> None:
        try:
            self._client = self._client or self._connect()
            self._look()
            self.problem = None if self._seen() else f"no worker of {self.address} answers"
        except Exception as error:  # noqa: BLE001  # whatever the engine raises
            is_away = isinstance(error, OSError)  # a timeout, a closed connection, a name without an address
            self.problem = f"{self.address} {'does not answer' if is_away else f'cannot be used: {describe(error)}'}"
            self._disconnect()

    def _connect(self) -> Any:
        import asyncio

        import dask

        loggers = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
        dask.config.set({"logging": dict.fromkeys(loggers, "critical")})  # the runner logs what there is to do
        from distributed import Client
        from distributed.diagnostics.plugin import SchedulerUploadFile, UploadFile
        from distributed.utils import LoopRunner, sync

        if not self._loop:  # a client that cannot connect leaves the thread of a loop that it has made
            self._loop = cast(Any, LoopRunner)()
            self._loop.start()
        self._register = f"adce_{secrets.token_hex(8)}"
        loop = self._loop.loop

        async def connect() -> Any:  # in the loop: one made outside waits for ever for a server of another kind
            client = cast(Any, Client)(self.address, timeout=BEGIN_SECONDS, set_as_default=False, loop=loop)
            try:
                return await asyncio.wait_for(client, BEGIN_SECONDS)
            except BaseException:
                await client.close(timeout=0)
                raise

        client = sync(loop, connect, callback_timeout=3 * BEGIN_SECONDS)
        # This module, in the scheduler and in its workers, also in those that join later; but not in place of itself,
        # which would take the classes of attempts under way.
        name = f"adce {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
        for place, kind in (("scheduler", SchedulerUploadFile), ("workers", UploadFile)):
            plugin = kind(__file__)
            plugin.idempotent = True
            try:
                sync(client.loop, client.register_plugin, plugin, f"{name}, {place}", callback_timeout=BEGIN_SECONDS)
            except TimeoutError:
                if place == "scheduler":  # else a frozen worker has not answered; all others have it
                    client.close(timeout=0)
                    raise
        return client

    def _disconnect(self) -> None:
        with self._lock:
            client, self._client = self._client, None
            self._workers, self._places = {}, {}
        with contextlib.suppress(Exception):
            client.close(timeout=0)

    def _ask_register(self, least: int, late: Collection[int]) -> Any:
        question = self._register, least, late
        return self._client.run_on_scheduler(look_at_cluster, *question, callback_timeout=BEGIN_SECONDS)

    def _look(self) -> None:
        """See which workers are there, and cancel the attempts that have not begun in time."""
        with self._lock:
            now, sent = self.clock.boot(), list(self._sent.items())
            least = min((one.attempt for _, one in sent), default=self._submitted + 1)
        own = [one for _, one in sent if one.register == self._register]  # only that knows whether they have begun
        workers, cancelled = self._ask_register(least, [one.attempt for one in own if now > one.at + BEGIN_SECONDS])
        with self._lock:
            self._workers = workers
            gone = [one for one, address in self._places.items() if address not in workers]
        self._give_up([future for future, one in sent if one.attempt in cancelled], NOT_BEGUN, requests=0)
        for execution in gone:
            execution.cancel()  # else the engine waits for another worker at that address

    def _end_lost(self) -> None:
        """End the attempts that the engine or their workers have lost, once that is safe."""
        with self._lock:
            now, seen, sent = self.clock.boot(), self._seen(), list(self._sent.items())
        gone = [(future, one) for future, one in sent if one.address not in seen or one.execution.done()]
        most = SEND_WITHIN_SECONDS + RELEASE_WITHIN_SECONDS  # then no request of it can be under way
        lost = [future for future, one in gone if now > one.at + most + _seconds(one.claimed)]
        self._give_up(lost, "its worker was lost", requests=1)

    def _give_up(self, futures: Iterable[Any], error: str, requests: int) -> None:
        for future in futures:
            with self._lock:
                one = self._sent.pop(future, None)
            if one:
                requests_sent = requests * bool(one.claimed.url)
                lost = Result(Outcome.LOST, error, requests=requests_sent, worker=one.worker)
                future.set_result(one.claimed.results(lost))

    def shutdown(self) -> None:
        """Let no more attempt begin. Those that have begun end on their own."""
        self._ended.set()
        self._thread.join(BEGIN_SECONDS)


# ---------------------------------------------------------------- Report
# Every figure is a question in SQL, every screen a few questions; one renderer for all formats. Nothing here changes
# anything. Headlines: REPORT, answers(), render().

FORMATS = ("table", "json", "csv", "github", "html")
SHOWN_ZEROS = ("percent", "expected_now", "expected_then")  # that a table does not leave out
TASK_FILTERS = ("state", "source", "dataset", "day", "key", "error")
NARROWEST = 8  # characters of a column on a terminal
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Section:
    """A titled table: the answer to a question in SQL, or its rows. `name` is its key in JSON."""

    name: str
    title: str
    rows: Rows
    is_one: bool = False  # one thing with many properties, rather than many things
    empty: str = "none"
    sql: str = ""


# Fragments of the questions below. Percents are rounded down: 100 means all.
FRAGMENTS = {
    "SUMS": "sum(present) * 10000 / nullif(sum(expected), 0) / 100.0 as percent, "
    + ", ".join(f"ifnull(sum({name}), 0) as {name}" for name in (*GAPS, "gave_up", "present", "expected")),
    "OPEN": ", ".join(
        f"ifnull(sum(objects * (task = '{state}')), 0) as {state}"
        for state in ("pending", "retry", "running", "gave_up")
    ),
    "BY_TASK": "task != 'pending'",  # lets SQLite use the index objects_by_task
    "FAILED": "outcome not in ('ok', 'not_yet', 'lost', 'running')",
    "FILTER": "(:source is null or source = :source) and (:dataset is null or dataset = :dataset)",
    "TASKS": """(:state is null or state = :state)
        and (:day is null or task_id in (select object_id from objects where day = :day))
        and (:key is null or key glob :key or instr(key, :key))
        and (:error is null or instr(lower(last_error), lower(:error)))""",
    "ATTEMPTS": """attempts a join objects o using (object_id) join datasets d using (dataset_id)
        where a.started_at >= :since and a.attempt_id > ifnull((
            select attempt_id from attempts where started_at < :since order by attempt_id desc limit 1), 0)""",
    "EXPECTED": """select dataset, sum(objects) as n from counts join datasets using (dataset_id)
        where state not in ('dropped', 'skipped', 'absent') group by dataset""",
    "RATES": """select scope, window_seconds, max_requests, used, in_flight, waiting, blocked_until, free_at, why
        from rates order by scope = 'global', scope, window_seconds""",
    # the first pending tasks of each dataset, and so of all
    "FIRST": """datasets d join objects o on o.object_id in (
        select object_id from objects
        where dataset_id = d.dataset_id and task = 'pending' order by rank desc, object_id limit :most)""",
    # the objects that are one row c of counts
    "OF_COUNT": """from objects o
        where o.dataset_id = c.dataset_id and o.season is nullif(c.season, '') and o.state = c.state""",
    # of a source d.source that cannot be asked now: until when, and why
    "PAUSE": """(
        select iif(julianday(blocked_until) > julianday() + 366, '', 'until ' || blocked_until || ', ') || reason
        from rates where scope in (d.source, 'global') and blocked_until is not null
        order by blocked_until desc limit 1)""",
    # sources that cannot be asked now
    "PAUSED": """with paused as (
        select source from datasets
        where exists (select 1 from rates where scope in (source, 'global') and blocked_until is not null))""",
}


def questions(text: str) -> tuple[Section, ...]:
    """The questions of a screen: for each `name: title | text when there is nothing`, and indented SQL that may hold
    {FRAGMENTS}; `name!` is one thing."""
    for name, sql in FRAGMENTS.items():
        text = text.replace(f"{{{name}}}", sql)
    found = re.findall(r"^([a-z][\w ]*)(!?): ([^|\n]*?)(?: \| (.+))?\n((?: +.*\n)+)", text, re.MULTILINE)
    return tuple(Section(name, title, [], bool(one), empty or "none", sql) for name, one, title, empty, sql in found)


def query(database: Database, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> Rows:
    """Rows as dictionaries, in the order of the columns."""
    return [dict(row) for row in database.read(sql, parameters)]


def answers(database: Database, screen: Sequence[Section], *names: str, **values: Any) -> list[Section]:
    """The sections of a screen, or those named, with their rows. Titles and SQL may name `values`."""
    return [
        dataclasses.replace(one, title=one.title.format(**values), rows=query(database, one.sql, values))
        for one in screen
        if not names or one.name in names
    ]


REPORT = questions("""
sources: Coverage by source
    select source, {SUMS} from coverage group by source
coverage: Coverage by dataset
    select source, dataset, {SUMS} from coverage group by source, dataset
total!: Total | nothing is expected yet
    select {SUMS} from coverage having sum(expected) > 0
queue: Open tasks by priority
    select priority, {OPEN},
           round((unixepoch() - (select min(detected_at) from objects o
                                 where o.priority = c.priority and o.task is not null)) / 3600.0, 2) as oldest_hours
    from counts c where task != ''
    group by priority having sum(objects) > 0
    order by instr('CRITICAL HIGH MEDIUM LOW', priority)
reasons: Why objects are missing, stale or suspect
    with said as (
        select dataset_id, state, task, count(*) as objects, coalesce(max(last_error), max(reason)) as example
        from objects not indexed where task is not null and coalesce(last_error, reason) is not null
        group by dataset_id, state, task, substr(coalesce(last_error, reason), 1, 24)),
    counted as (  -- the others, which may be very many
        select dataset_id, state, task, objects from counts where task != ''
        union all select dataset_id, state, task, -objects from said),
    reasons as (
        select * from said
        union all select dataset_id, state, task, sum(objects) as objects, null from counted
                  group by dataset_id, state, task having sum(objects) > 0)
    select dataset, state as kind, task, objects, example
    from reasons join datasets using (dataset_id)
    order by objects desc limit 20
datasets: Attempts of the last {span}
    select source, dataset, count(*) as attempts, sum(outcome = 'ok') as ok, sum(outcome = 'not_yet') as not_yet,
           sum({FAILED}) as failed,
           round(100.0 * sum({FAILED}) / count(*), 1) as error_percent,
           sum(requests) as requests, sum(bytes) as bytes,
           round(min(seconds) filter (where place >= 0.50 * number), 3) as p50,
           round(min(seconds) filter (where place >= 0.95 * number), 3) as p95,
           round(min(seconds) filter (where place >= 0.99 * number), 3) as p99
    from (select d.source, d.dataset, outcome, seconds, requests, bytes,
                 row_number() over (partition by o.dataset_id order by seconds) as place,  -- the fastest first
                 count(*) over (partition by o.dataset_id) as number
          from {ATTEMPTS} and outcome != 'running')
    group by source, dataset
attempts: How attempts of the last {span} ended
    select d.dataset, outcome, worker, count(*) as attempts, sum(requests) as requests,
           round(avg(seconds), 3) as mean_seconds, round(max(seconds), 3) as longest, sum(bytes) as bytes
    from {ATTEMPTS} group by d.dataset, outcome, worker order by d.dataset, attempts desc
rates: Rate limits
    {RATES}
cycles: The last cycles
    select * from cycles order by cycle_id desc limit 5
""")
STATUS = questions("""
lake!: Lake
    select {SUMS} from coverage
tasks!: Tasks
    select {OPEN} from counts
cycle!: Last cycle | no cycle yet
    select * from cycles order by cycle_id desc limit 1
sources: Sources
    {RATES}
alerts: Alerts
    select * from open_alerts
""")
COVERAGE, BY_DAY = questions("""
coverage: Coverage by dataset and season | nothing is expected yet; run a cycle: adce.py reconcile
    select source, dataset, season, percent, missing, stale, suspect, gave_up, present, expected, skipped
    from coverage where {FILTER} and (not :gaps or present < expected) order by source, dataset, season
coverage: Coverage by dataset and day | no object has such a day
    select * from coverage_by_day where {FILTER} and (not :gaps or present < expected)
    order by source, dataset, day desc
""")
PLAN = questions("""
changes: What would be expected | the same as now
    with after as ({EXPECTED})
    select dataset, coalesce(value, 0) as expected_now, coalesce(n, 0) as expected_then
    from (select dataset from after union select key from json_each(:before))
    left join after using (dataset) left join json_each(:before) on key = dataset
    where expected_now != expected_then
datasets: What would be asked for | nothing
    {PAUSED}
    select dataset, sum(state = 'pending' and source not in paused) as now,
           sum(state = 'pending' and source in paused) as paused,
           sum(state = 'retry') as later, sum(state = 'gave_up') as gave_up,
           min(case when state = 'retry' then next_at end) as next_retry, max(last_error) as last_error
    from queue group by dataset
sources: How long that takes at least, by the limits and the pace of the last attempts, with a request for each task
    with pending as (
        select source, sum(objects) as tasks from counts join datasets using (dataset_id)
        where task = 'pending' and active group by source having sum(objects) > 0),
    paces as (
        select source, sum(seconds) / sum(attempts) as pace from daily_totals join datasets using (dataset_id)
        where day >= (select date(max(day), '-1 day') from daily_totals) group by source),
    needs as (
        select p.source, tasks, iif(scope = 'global', sum(tasks) over (partition by scope, window_seconds), tasks) as n,
               window_seconds, max_requests, used, unixepoch(blocked_until) - unixepoch() as paused
        from pending p left join rates on scope in (p.source, 'global')),
    times as (
        -- a request that a window does not allow now waits for one more of these windows, or for several
        select source, tasks, paused, (max(0, n - max(0, max_requests - used)) + max_requests - 1) / max_requests
                                      * window_seconds as seconds
        from needs
        union all
        select source, tasks, 0, max(tasks * pace / value, sum(tasks * pace) over () / (:workers ->> 'global'))
        from pending join paces using (source) join json_each(:workers) on key = source)
    select source, tasks, iif(max(paused) > 31536000, null,  -- paused until it is resumed
                              round((max(0, ifnull(max(paused), 0)) + max(seconds)) / 60, 1)) as least_minutes
    from times group by source
first: First of them (at most {most}) | nothing can start now
    {PAUSED}
    select score, priority, dataset, key, reason, attempts
    from queue where task_id in (select object_id from {FIRST}) and source not in paused
    order by score desc, task_id limit :most
""")
TASK_COUNT, FIRST_TASKS = questions("""
count: Open tasks
    select ifnull(sum(objects), 0) from counts join datasets using (dataset_id)
    where task != '' and (:state is null or task = :state) and {FILTER}
first: First of them, and all that are not pending
    select object_id from {FIRST} union select object_id from objects where {BY_TASK}
""")
TASK = questions("""
task!: Task {task_id}
    select o.object_id as task_id, coalesce(o.task, o.state) as state, o.priority, d.source, d.dataset, o.key,
           o.state as object, coalesce(o.skipped, o.reason) as reason, o.fields,
           strftime('%Y-%m-%dT%H:%M:%SZ', o.detected_at, 'unixepoch') as detected_at,
           (select score from queue where queue.task_id = o.object_id) as score,
           iif(o.task is null, null, {PAUSE}) as source_paused, o.gap_size, o.attempts, o.failures,
           strftime('%Y-%m-%dT%H:%M:%SZ', o.next_at, 'unixepoch') as next_at, o.last_error, o.size, o.etag
    from objects o join datasets d using (dataset_id) where o.object_id = :task_id
attempts: Attempts, the latest first
    select attempt_id, started_at, seconds, outcome, http_status, bytes, url, worker, error
    from recent_attempts where task_id = :task_id
""")


def render(sections: Sequence[Section], style: str, width: int | None = None) -> str:
    """Sections as text. JSON is one document; a table is cut to `width` columns when one is given."""
    if style == "json":
        values = {part.name: next(iter(part.rows), None) if part.is_one else part.rows for part in sections}
        document = next(iter(values.values())) if len(values) == 1 else values
        text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
        return printable(text, lambda letter: json.dumps(letter)[1:-1])
    if style == "csv":
        return "\n\n".join(_csv(part.rows) for part in sections if part.rows)
    title = {"html": "<h2>{}</h2>\n", "github": "### {}\n\n", "table": "{}\n"}[style]
    blocks = []
    for part in sections:
        rows = part.rows
        if part.is_one:
            rows = [{"what": name, "value": value} for row in rows for name, value in row.items()]
        head = title.format(html.escape(part.title) if style == "html" else part.title) if part.title else ""
        blocks.append(head + (_table(rows, style, width) if rows else part.empty))
    return "\n\n".join(blocks)


def _csv(rows: Rows) -> str:
    """A table whose texts no spreadsheet takes for a formula and no terminal for an order."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        cells = (printable(cell) if isinstance(cell, str) else cell for cell in row.values())
        writer.writerow(re.sub("^(?=[=+@-])", "'", cell) if isinstance(cell, str) else cell for cell in cells)
    return table.getvalue().rstrip("\n")


def _table(rows: Rows, style: str, width: int | None) -> str:
    """A table; on a terminal without columns of nothing but zeros, and cut to its width."""
    kept = [name for name in rows[0] if name in SHOWN_ZEROS or any(row[name] not in (0, None) for row in rows)]
    names = kept if kept and style == "table" else list(rows[0])
    columns = {name: [_cell(row[name], style) for row in rows] for name in names}
    numbers = {name for name in names if all(isinstance(row[name], int | float | None) for row in rows)}
    if style == "table":
        return "\n".join(_fitted(columns, numbers, width or sys.maxsize))
    import tabulate

    heads = [name.replace("_", " ") if style == "html" else name for name in names]
    sides = ["right" if name in numbers else "left" for name in names]
    return tabulate.tabulate(columns, headers=heads, tablefmt=style, disable_numparse=True, colalign=sides)


def _fitted(columns: dict[str, list[str]], numbers: Collection[str], width: int) -> Iterator[str]:
    """The lines of a table. If it is too wide although its texts are wrapped, what all rows have in common stands
    above it, and the last text of each row below that row."""
    below = list[str]()
    widths = _widths(columns, numbers, width)
    if sum(widths) + 2 * len(widths) - 2 > width:
        *_, last = columns
        below = [] if last in numbers or len(columns) == 1 else columns.pop(last)
        same = {name: cells[0] for name, cells in columns.items() if len({*cells}) == 1 < len(cells)}
        yield from textwrap.wrap(", ".join(f"{name} {cell}" for name, cell in same.items()), width)
        columns = {name: cells for name, cells in columns.items() if name not in same} or columns
        widths = _widths(columns, numbers, width)
    heads = [name if len(name) <= n else name.replace("_", " ") for name, n in zip(columns, widths, strict=True)]
    rows = [heads, ["-" * n for n in widths], *zip(*columns.values(), strict=True)]
    for row, text in itertools.zip_longest(rows, ["", "", *below], fillvalue=""):
        cells = ([cell] if len(cell) <= n else textwrap.wrap(cell, n) for cell, n in zip(row, widths, strict=True))
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            aligned = zip(columns, parts, widths, strict=True)
            line = "  ".join(part.rjust(n) if name in numbers else part.ljust(n) for name, part, n in aligned).rstrip()
            yield line if line == cut(line, width) else f"{cut(line, width - 1)}…"
        yield from textwrap.wrap("" if text == "-" else text, width, initial_indent="    ", subsequent_indent="    ")


def _widths(columns: Mapping[str, list[str]], numbers: Collection[str], width: int) -> list[int]:
    """The widths of columns; the longest texts get less, so that the table fits if it can."""
    sizes = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    unbroken = {name: max(map(len, cells)) if name in numbers else 0 for name, cells in columns.items()}
    for most in range(max(NARROWEST, *sizes.values()), NARROWEST - 1, -1):
        widths = [max(min(size, most), unbroken[name]) for name, size in sizes.items()]
        if sum(widths) + 2 * len(widths) - 2 <= width:
            break
    return widths


def _cell(value: Any, style: str) -> str:
    text = "-" if value is None else f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)
    text = printable(text).replace("\n", "?")
    return text.replace("|", r"\|") if style == "github" else text


def cut(line: str, columns: int) -> str:
    """As much of a line as fits: wide letters take two columns."""
    if 2 * len(line) <= columns:
        return line
    widths = (1 + (unicodedata.east_asian_width(letter) in "WF") for letter in line)
    return "".join(letter for letter, end in zip(line, itertools.accumulate(widths), strict=True) if end <= columns)


def tasks_sections(database: Database, filters: Mapping[str, str | None], most: int) -> list[Section]:
    """The open tasks that match, the most urgent first; those that gave up come last."""
    values = {**dict.fromkeys(TASK_FILTERS), **filters, "most": most}
    sql = f"from queue where {FRAGMENTS['TASKS']} and {FRAGMENTS['FILTER']}"
    if values["day"] or values["key"] or values["error"]:
        count = database.value(f"select count(*) {sql}", values)
    else:  # indexes know the number and the first of very many
        count = database.value(TASK_COUNT.sql, values)
        sql += f" and task_id in ({FIRST_TASKS.sql})"
    rows = query(database, f"select * {sql} order by state = 'gave_up', score desc, task_id limit :most", values)
    title = f"{count} open tasks" + (f", the first {most}" if count > most else "")
    if count and values["state"] == TaskState.GAVE_UP and not values["key"]:
        chosen = [f"--{name}={value}" for name, value in filters.items() if name in TASK_FILTERS and value]
        title += f"; to open them again: {shlex.join(['adce.py', 'retry', *chosen])}"
    return [Section("tasks", title, rows)]


def task_sections(database: Database, wanted: str) -> list[Section]:
    """One task, named by its id or its key, with all that is known of it. Raises Error when there is none."""
    by_id = "select object_id from objects where object_id = ? or key = ? order by key = ? limit 1"
    task_id = database.value(by_id, (int(wanted) if wanted.isdecimal() and len(wanted) < 19 else -1, wanted, wanted))
    if task_id is None:
        raise Error(f"there is no task {wanted}", "adce.py tasks")
    sections = answers(database, TASK, task_id=task_id)
    sql = "select attempt_id, output from attempts where object_id = ? and output > '' order by 1 desc limit 1"
    for attempt_id, output in database.read(sql, (task_id,)):
        lines = [{"line": line} for line in output.splitlines()]
        sections.append(Section("output", f"Printed by attempt {attempt_id}", lines))
    return sections


def tasks_by_source(database: Database) -> dict[str, int]:
    """How many tasks of each source are open."""
    sql = """select source, sum(objects) from counts join datasets using (dataset_id)
             where task != '' and objects > 0 group by source"""
    return dict(map(tuple, database.read(sql)))


def workers_json(configuration: Configuration) -> str:
    """The most workers of each source, and of all, for the question of how long the tasks take."""
    most = {one.name: one.max_concurrent for one in configuration.sources.values()}
    return json.dumps({**most, GLOBAL: configuration.max_concurrent_scrapers})


def minutes_left(database: Database, configuration: Configuration) -> float | None:
    """The least time until no task is pending; None: not known, or a source is paused until it is resumed."""
    rows = answers(database, PLAN, "sources", workers=workers_json(configuration))[0].rows
    minutes = [row["least_minutes"] for row in rows]
    return None if None in minutes else max(minutes, default=0.0)


def cycle_text(database: Database, now: float, next_cycle_in: float | None = None) -> str:
    """The last cycle: how far it is, or when it ended."""
    sql = "select cycle_id, progress, :now - started_at - seconds from reconciliations order by cycle_id desc limit 1"
    for number, progress, ago in database.read(sql, {"now": now}):
        if ago is None:
            return f"{number} {progress or 'begins'}"
        following = "" if next_cycle_in is None else f", the next in {format_duration(max(0, next_cycle_in))}"
        return f"{number} done {format_duration(ago)} ago{following}"
    return "none yet"


# ---------------------------------------------------------------- Conditions
# Conditions that need attention, each a query with an index. One cause is one condition: tasks held up by a blocked
# source are none of their own. Headlines: CONDITIONS, problems(), verdict().

CRASHED, STUCK = "exited unexpectedly", "loop stuck"
ENDS_OF_ONCE = ("every task was attempted", "the remaining sources are paused")  # of `run --once`
AT_WORK = ("running", "starting")  # states of a runner
BEAT_SECONDS = 10  # between two heartbeats of the main loop
LEAST_FREE_BYTES = 100 << 20
COMPONENTS = {"database": "database unusable", "store": "store unusable", "loop": STUCK}  # and their problems


class Condition(NamedTuple):
    """Something that needs attention, and the command that helps."""

    name: str
    about: str
    mark: str  # x: work stands still, !: something is wrong, -: a remark, which is never sent
    text: str
    hint: str
    is_quiet: bool = False  # shown on screens, and not sent as an alert


# For the questions below. Objects that a blocked source has held up count from the end of that pause.
LATEST = """
    with last as (select * from reconciliations where seconds is not null order by cycle_id desc limit 1),
    late as (select * from attempts where attempt_id > (select max(attempt_id) from attempts) - 200),
    blocks as (
        select about as source, max(coalesce(ended_at, :now)) as over_at
        from alerts where condition = 'source blocked' group by about),
    never as (  -- the datasets without any object
        select dataset_id, sum(attempts) as attempts from datasets cross join daily_totals using (dataset_id)
        where active and dataset_id not in (select dataset_id from counts where state = 'present' and objects > 0)
        group by dataset_id
        having (sum(attempts) >= 5 and min(outcome) = 'not_yet' and max(outcome) = 'not_yet')
            or (min(outcome in ('not_yet', 'invalid', 'http_error', 'error'))  -- and nothing tries again by itself
                and exists (select 1 from runner where stopped_at is not null)))
"""
# condition: its mark and the command that helps; its subjects, a sentence about each, and whether it is quiet
CONDITIONS = questions("""
source blocked: x adce.py resume {about}
    select scope as about, iif(seconds > 0, 'paused' || iif(seconds < 172800, ' for ' || ((seconds + 59) / 60) ||
           ' min more', '') || ': ', 'probed with one task at a time, after: ') || coalesce(reason, '') as text,
           scope = 'global' or not lasts as is_quiet
    from (select *, cast(paused_until + wall_offset - :now as integer) as seconds,
                 throttles >= 3 or (throttles > 0 and paused_for >= 1800) as lasts  -- half an hour at once
          from scopes, facts)
    where (seconds > 0 or lasts) and not glob(:store, coalesce(reason, ''))
gave up: ! adce.py tasks --state gave_up --dataset {about}
    select dataset as about, sum(objects) || ' gave up, last error: ' || coalesce((
               select last_error from objects o
               where o.dataset_id = c.dataset_id and o.task = 'gave_up' and o.{BY_TASK}), 'unknown') as text
    from counts c join datasets using (dataset_id)
    where task = 'gave_up' and dataset_id not in (select dataset_id from never)
    group by dataset having sum(objects) > 0
never answered: ! adce.py try {about}
    select dataset as about, attempts || ' attempts, never an object: '
           || coalesce((select url || coalesce(', ' || error, '') from late join objects o using (object_id)
                        where o.dataset_id = n.dataset_id and url is not null order by late.attempt_id desc limit 1),
                       'see its url') as text
    from never n join datasets using (dataset_id)
critical gap: ! adce.py tasks --dataset {about}
    select dataset as about, 'a CRITICAL object has been missing since '
           || strftime('%Y-%m-%dT%H:%M:%SZ', min(detected_at), 'unixepoch') as text
    from objects indexed by objects_by_age join datasets using (dataset_id) left join blocks using (source)
    where priority = 'CRITICAL' and task is not null and task != 'gave_up'
      and detected_at < :now - 86400 and coalesce(over_at, 0) < :now - 86400
    group by dataset
errors: ! adce.py report
    select 'attempts' as about, sum(failed) || ' of the last ' || count(*) || ' failed, most of ' || (
               select dataset || ': ' || coalesce(error, outcome)
               from late join objects using (object_id) join datasets using (dataset_id)
               where {FAILED} and outcome != 'store_error'
               group by dataset, substr(error, 1, 24) order by count(*) desc limit 1) as text
    from (select {FAILED} and outcome != 'store_error' as failed,
                 late.attempt_id > (select max(attempt_id) from attempts) - 20 as is_latest
          from late join objects using (object_id) join datasets using (dataset_id)
          join scopes s on s.scope = source and s.failures = 0 and s.throttles = 0  -- else it may be away
          left join blocks using (source)
          where outcome != 'running' and started_at > max(:now - 86400, coalesce(over_at, 0)))
    having count(*) >= 20 and sum(failed) * 10 > count(*) and max(failed and is_latest)  -- else that is over
nothing collected: x adce.py logs
    select 'lake' as about, 'nothing was collected in ' || cycles || ' cycles, though tasks of '
           || group_concat(dataset, ', ') || ' were ready' as text
    from (select min(started_at) as began, count(*) as cycles
          from (select * from reconciliations where seconds is not null order by cycle_id desc limit 8))
    cross join datasets d join scopes on scope = d.source join facts left join blocks using (source)
    where cycles = 8 and coalesce(over_at, 0) < began
      and max(paused_until, (select paused_until from scopes where scope = 'global')) + wall_offset < began
      and exists (select 1 from objects o
                  where o.dataset_id = d.dataset_id and o.task = 'pending' and o.detected_at < began)
      and not exists (select 1 from late where outcome = 'ok' and started_at + seconds > began)
    having count(*) > 0
mass loss: x adce.py reconcile --accept-loss DATASET  # if the loss is real
    select 'lake' as about, error as text from last where instr(error, :vanished)
cycles fail: ! adce.py check
    select 'lake' as about, 'the last cycle was incomplete: ' || error as text,
           (select error from reconciliations r where seconds is not null and r.cycle_id < last.cycle_id
            order by cycle_id desc limit 1) is null as is_quiet
    from last where error is not null and not instr(error, :vanished) and :unusable is null
too few: ! adce.py coverage --dataset {about}
    select dataset as about, sum(expected) || iif(sum(expected) = 1, ' object is', ' objects are') || ' expected'
           || coalesce(' of season ' || season, '') || ', fewer than the ' || value || ' of at_least' as text
    from json_each(:at_least) join coverage on dataset = key
    where season is null or season in (
        select value ->> 'label' from json_each(:seasons) where value ->> 'finish' < date(:now, 'unixepoch'))
    group by dataset, season having sum(expected) < value
expected objects shrank: ! adce.py plan
    select 'lake' as about, dropped || ' of ' || (expected + dropped) || ' objects are no longer expected; if that is '
           || 'a mistake in adce.yaml, correct it: the next cycle expects them again' as text
    from last where dropped > 100 and dropped * 10 > expected + dropped
channel: ! adce.py check
    select json_extract(value, '$.channel') as about, 'alerts cannot be sent: ' || max(json_extract(value, '$.error'))
           || ', ' || count(*) || ' wait' as text, 1 as is_quiet
    from alerts join json_each(unsent) group by about having max(json_extract(value, '$.error')) is not null
demand above limit: ! adce.py explain freshness
    select key as about, value as text from json_each(:demand)
no workers: x adce.py explain pool
    select 'pool' as about, note as text from runner
    where stopped_at is null and note is not null and beat_at > :now - 120  -- else no runner looks
names nothing: - adce.py try {about}
    select value ->> 0 as about, 'is there, and yet no object of ' || key || ' is expected: does its ids or regex '
           || 'find any?' as text
    from json_each(:parents)
    where (select max(state = 'present') and not max(state in ('missing', 'suspect'))
           from counts join datasets using (dataset_id)
           where objects > 0 and dataset in (select p.value from json_each(json_each.value) p))
      and not exists (select 1 from counts join datasets using (dataset_id) where dataset = key and objects > 0)
no limits: - adce.py explain rate_limiting
    select value as about, 'has no limits' as text from json_each(:unlimited)
changed: - adce.py restart
    select :file as about, 'has changed since the runner started' as text where :has_changed and :broken is null
broken file: ! adce.py check
    select :file as about, 'cannot be used: ' || :broken as text, 1 as is_quiet where :broken is not null
seasons over: - adce.py explain seasons
    select iif(value ->> 'calendar' = '', 'seasons', value ->> 'calendar') as about,
           'all have ended; add the next one' as text
    from json_each(:seasons) group by about having max(value ->> 'finish') < date(:now, 'unixepoch')
""")


def write_problem(database: Database, clock: Clock) -> dict[str, str]:
    """The problem of a database that cannot be written, as problems() names it: reading works on a full disk."""
    try:
        with database.transaction(durable=False) as sql:
            sql.execute("update facts set wall_offset = ?", (clock.wall() - clock.boot(),))
    except DatabaseUnavailableError as error:
        return {"database unusable": str(error)}
    return {}


def problems(
    database: Database, configuration: Configuration, now: float, since: float, error: str | None = None
) -> dict[str, str]:
    """The problems, by name, of a runner that has worked `since` then, and may know an `error` of its database."""
    if error:
        return {"database unusable": error}
    found, store = dict[str, str](), open_store(configuration.store)
    try:
        database.check_file()
        beat = database.value("select beat_at from runner") or 0
        sql = """select coalesce((select substr(reason, length(:prefix) + 1) from rates
                                  where scope = 'global' and glob(:prefix || '*', reason)), store_error) from facts"""
        if fails := database.value(sql, {"prefix": STORE_TROUBLE}):
            found["store unusable"] = fails
        else:
            require_known_store(database, configuration, store)
    except DatabaseError as problem:
        return {"database unusable": str(problem)}
    except StoreError as problem:
        found["store unusable"] = str(problem)
    silent = now - max(beat, since)  # the last beat may be that of an earlier run
    if silent > 3 * BEAT_SECONDS and (unusable := write_problem(database, Clock())):
        return unusable
    if silent > 2 * max(configuration.queue_check_seconds, BEAT_SECONDS) + MINUTE:
        found[STUCK] = f"the main loop has been stuck for {format_duration(silent)}"
    return found


def demand_above_limits(database: Database, configuration: Configuration, now: float) -> dict[str, str]:
    """The sources whose refetches alone will need all the requests that their limits allow, and the explanation."""
    expected = """
        select dataset, nullif(season, ''), sum(objects) from counts join datasets using (dataset_id)
        where active and state in ('present', 'missing', 'stale', 'suspect') group by dataset, season
    """
    at_once = """
        select count(*) from objects where state = 'stale' and live and season is ?
          and dataset_id = (select dataset_id from datasets where dataset = ?)
    """
    hourly, asked = dict.fromkeys(configuration.sources, 0.0), set[tuple[str, str | None]]()
    for name, label, count in database.read(expected):
        one = configuration.datasets.get(name)
        if not one or not one.url or (str(one.request()), label) in asked:
            continue
        asked.add((str(one.request()), label))  # one response for all of them
        rules, season = one.freshness, season_of(one, label)
        every = rules.refetch_every if not rules.until else None
        if season and not every:
            every = rules.past if season.finish < day_of(now) else rules.current
        hourly[one.source] += count * HOUR / every if every else 0
        hourly[one.source] += database.value(at_once, (label, name)) * HOUR / rules.live.every if rules.live else 0
    found = {}
    for source, needed in hourly.items():
        windows = configuration.rate_limiting.scopes.get(source, ScopeLimits()).windows
        allowed = min((limit.max_requests * HOUR / limit.seconds for limit in windows), default=math.inf)
        if needed >= allowed:
            found[source] = f"refetches need {needed:,.0f} requests an hour, and {allowed:,.0f} are allowed: gaps wait"
    return found


@functools.lru_cache(1)
def file_error(path: Path, _: float) -> str | None:
    """The first mistake in adce.yaml since its last change, in one line."""
    try:
        load_configuration(path)
    except ConfigurationError as error:
        return str(error).partition("\n")[0]
    return None


def conditions(
    database: Database, configuration: Configuration, now: float, since: float, error: str | None = None
) -> list[Condition]:
    """The conditions that hold now."""
    ill = problems(database, configuration, now, since, error)
    found = [Condition(name, "runner", "x", text, "adce.py check") for name, text in ill.items()]
    if (free := shutil.disk_usage(configuration.database.parent).free) < LEAST_FREE_BYTES:
        text = f"{free >> 20} MB left beside {configuration.database.name}"
        found.append(Condition("disk low", "database", "x", text, "df -h"))
    path, datasets = configuration.path, configuration.datasets.values()
    facts = {
        "unlimited": [name for name in configuration.sources if not configuration.rate_limiting.limits(name)],
        "seasons": [dataclasses.asdict(season) for season in configuration.seasons],
        "at_least": {one.name: one.at_least for one in datasets if one.at_least},
        "parents": {one.name: one.partitions.parents for one in datasets if one.partitions.parents},
    }
    values: dict[str, Any] = {name: json.dumps(fact, default=str) for name, fact in facts.items()}
    values |= {"now": now, "vanished": VANISHED, "store": f"{STORE_TROUBLE}*", "file": path.name}
    values["unusable"] = ill.get("store unusable")
    changed_at = path.stat().st_mtime if path.exists() else 0
    with contextlib.suppress(DatabaseError):  # that is one of its problems
        has_changed = database.value("select ? > started_at + 1 from runner where stopped_at is null", (changed_at,))
        is_doubtful = has_changed or not configuration.store  # a command goes on without what it cannot read
        values |= {"has_changed": has_changed, "broken": file_error(path, changed_at) if is_doubtful else None}
        values["demand"] = json.dumps(demand_above_limits(database, configuration, now))
        for one in CONDITIONS:
            mark, _, hint = one.title.partition(" ")
            for about, text, *quiet in database.read(LATEST + one.sql, values):
                words = excerpt(text.encode(), 1000), hint.format(about=about)
                found.append(Condition(one.name, about, mark, *words, is_quiet=any(quiet) or mark == "-"))
    return found


def runner_state(database: Database, lock: RunnerLock, now: float) -> dict[str, Any]:
    """Whether a runner works, and its last heartbeat."""
    row, holder = next(iter(query(database, "select * from runner")), None), lock.holder()
    if row is None or holder not in (None, row["pid"]):  # the present one has not registered itself yet
        return {"runner": "never ran"} if holder is None else {"runner": "starting", "pid": holder or None}
    started_at, beat_at, stopped_at = (utc_text(row[name]) for name in ("started_at", "beat_at", "stopped_at"))
    if holder is None:
        ended = {"stopped_at": stopped_at, "note": row["note"]} if stopped_at else {"note": CRASHED}
        return {"runner": "not running", "last_sign_of_life": beat_at, **ended}
    times = {"started_at": started_at, "last_sign_of_life": beat_at, "uptime": format_duration(now - row["started_at"])}
    return {"runner": "running", **{name: row[name] for name in ("pid", "version", "address", "unit", "log")}, **times}


def lake_text(database: Database) -> str:
    """How much of the lake is there, and how many gaps of which kind are left."""
    (lake,) = answers(database, STATUS, "lake")[0].rows
    gaps = ", ".join(f"{lake[kind]:,} {kind}" for kind in GAPS if lake[kind])
    return f"{lake['percent']} %  {gaps or 'all'} of {lake['expected']:,}" if lake["expected"] else "nothing expected"


def verdict(database: Database, configuration: Configuration, now: float, error: str | None = None) -> Section:
    """The problems, worst first, with the tasks held up and the command that helps; the title is the headline."""
    state = runner_state(database, RunnerLock(configuration.database), now)
    found = conditions(database, configuration, now, now - HOUR if state["runner"] == "running" else now, error)
    tasks, note = tasks_by_source(database), state.get("note")  # no gap is without a task
    if state["runner"] not in AT_WORK and (tasks or note not in ENDS_OF_ONCE):
        mark = "x" if note == CRASHED else "!" if tasks else "-"
        ago = now - (database.value("select coalesce(stopped_at, beat_at) from runner") or now)
        text = f"{state['runner']}: {note}, {format_duration(ago)} ago" if note else state["runner"]
        hint = "adce.py run --once" if note in ENDS_OF_ONCE else "adce.py start"
        found.append(Condition("no runner", "runner", mark, text, hint))
    held = {**dict.fromkeys(("runner", "pool", GLOBAL), sum(tasks.values()) or None), **tasks}
    rows: Rows = [
        {"mark": mark, "about": about, "what": text, "holds_up": held.get(about) if mark == "x" else None, "try": hint}
        for _, about, mark, text, hint, _ in found
    ]
    rows.sort(key=lambda row: ("x!-".index(row["mark"]), -(row["holds_up"] or 0), row["about"] != GLOBAL))
    word = "ATTENTION" if rows and rows[0]["mark"] != "-" else "FILLING" if tasks else "COMPLETE"
    up = f"up {state['uptime']}" if "uptime" in state else state["runner"]
    return Section("verdict", f"{word}  {lake_text(database)}  runner {up}", rows, empty="")


def tasks_text(database: Database, configuration: Configuration, judged: Section) -> str:
    """The open tasks by state, and how long the pending ones take at least unless all work stands still."""
    (tasks,) = answers(database, STATUS, "tasks")[0].rows
    counts = [f"{count:,} {state}" for state, count in tasks.items() if count]
    stands = any(row["mark"] == "x" and row["about"] in ("runner", "pool") for row in judged.rows)
    if (minutes := minutes_left(database, configuration)) and not stands:
        counts.append(f"at least {format_duration(minutes * MINUTE)} left")
    return ", ".join(counts) or "none open"


def status_sections(database: Database, configuration: Configuration, now: float) -> list[Section]:
    """In one screen: is it running, is the lake complete, what is under way, which sources can be asked."""
    state = runner_state(database, RunnerLock(configuration.database), now)
    overview = {**state, "database": str(configuration.database), "store": configuration.store or None}
    judged = verdict(database, configuration, now)
    return [judged, Section("runner", "Runner", [overview], is_one=True), *answers(database, STATUS)]


# ---------------------------------------------------------------- Page
# The whole picture as one HTML document, the figures for Prometheus, and the HTTP server of both on 127.0.0.1:
# read-only, a few threads, a few seconds each. Headlines: page(), METRICS, HealthServer.

NONCE = secrets.token_hex(16)  # of this process: only the script below runs in the page
REFRESH = """
setInterval(async () => {
  if (document.hidden) return;
  const text = await (await fetch(location.href)).text(), fresh = new DOMParser().parseFromString(text, "text/html");
  document.title = fresh.title;
  document.querySelector("main").replaceWith(fresh.querySelector("main"));
}, 30000);
"""
PAGE_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 110rem; margin: 1.5rem auto; padding: 0 1rem; background: Canvas; }
p, pre { overflow-wrap: anywhere; } pre { white-space: pre-wrap; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; } h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
.wide { overflow-x: auto; } svg { display: block; } table { border-collapse: collapse; }
th, td { padding: .2rem min(.8rem, 1.5vw) .2rem 0; text-align: left; vertical-align: top; }
td { min-width: 4.5rem; overflow-wrap: anywhere; } th, td { border-bottom: 1px solid #8886; }
td:first-child, td[style*=right] { min-width: 0; white-space: nowrap; }
rect { stroke: CanvasText; stroke-opacity: .6; } .none { fill: none; stroke-opacity: .25; }
.all { fill: #1b4f9c; } .part { fill: #7fb2e5; stroke-dasharray: 2 1; } .gap { fill: #d9822b; stroke-width: 2; }
.stale { fill: #6f5aa8; stroke-dasharray: 4 2; } .gave_up { fill: #a31515; stroke-width: 3; }
.absent { fill: #8884; stroke-dasharray: 1 2; }
svg text { font: 9px system-ui, sans-serif; fill: CanvasText; }
.swatch { display: inline-block; vertical-align: -1px; margin-left: .8rem; }
.lines { display: flex; flex-wrap: wrap; gap: .4rem 1rem; margin: 1rem 0; } figure { margin: 0; min-width: 15rem; }
figcaption { font-size: .8rem; }
figure svg { width: 180px; height: 32px; overflow: visible; }
polyline { fill: none; stroke: #3574c8; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
"""
SWATCH = """<svg class="swatch" width="11" height="11" aria-hidden="true">
<rect class="{}" x="1" y="1" width="9" height="9"/></svg> {}"""
MEANINGS = {"all": "all is there", "stale": "all, and some stale", "part": "a part", "gap": "nothing"}
MEANINGS |= {"gave_up": "some gave up", "absent": "the source has none", "none": "nothing is expected"}
WEB = questions("""
queue: First in the queue | nothing can start now
    -- the score in its parts: when the gap was found, gained by age since, and for the success rate of the dataset
    select o.key, o.priority, d.source, round(o.rank + o.slope * o.detected_at / 3600.0, 1) as base,
           round(o.slope * (unixepoch() - o.detected_at) / 3600.0, 1) as age, round(d.bonus, 1) as success_rate,
           (select round(score, 1) from queue where queue.task_id = o.object_id) as score,
           coalesce(o.last_error, o.reason, o.state) as reason, {PAUSE} as source_paused
    from {FIRST} where d.active order by score desc limit :most
running: Running now | nothing
    select o.key, d.source, o.attempts as attempt,
           round(max(0, (julianday('now') - 2440587.5) * 86400 - a.started_at), 1) as seconds
    from objects o join attempts a using (attempt_id) join datasets d using (dataset_id)
    where o.task = 'running' and o.{BY_TASK}
attempts: The last attempts
    select started_at, dataset, key, outcome, error, seconds, bytes, url from recent_attempts limit 20
""")
OF_DAY = questions("""
objects: Objects | nothing is expected
    select o.object_id as task_id, o.key, o.state, o.task, o.attempts, coalesce(o.last_error, o.reason) as reason
    from objects o join datasets d using (dataset_id)
    where d.dataset = :dataset and o.day = :day and o.state != 'dropped' order by o.state = 'present', o.key
""")
DAYS, YEARS = questions("""
days: For each state and season in `counts`, an index leads to the days of a year; another to what gave up
    with failed as (
        select dataset_id, day, count(*) as gave_up from objects where task = 'gave_up' and {BY_TASK}
        group by dataset_id, day)
    select dataset, o.day, sum(o.state != 'absent') as expected, sum(o.state = 'present') as present,
           sum(o.state = 'stale') as stale, sum(o.state = 'absent') as absent, ifnull(max(gave_up), 0) as gave_up
    from (select distinct dataset_id, season, state from counts where state not in ('dropped', 'skipped', 'awaited')) c
    cross join objects o on o.dataset_id = c.dataset_id and o.season is nullif(c.season, '') and o.state = c.state
    join datasets on datasets.dataset_id = o.dataset_id
    left join failed f on f.dataset_id = o.dataset_id and f.day = o.day
    where o.day between :year || '-01-01' and :year || '-12-31'
    group by dataset, o.day order by dataset, o.day
years: The first and the last day of all
    select coalesce(min((select min(day) {OF_COUNT})), :today), coalesce(max((select max(day) {OF_COUNT})), :today)
    from counts c where state != 'dropped'
""")
LINES = f"""
    with recent as (
        select source, day, sum(attempts) as attempts, sum(seconds) / sum(attempts) as seconds,
               sum(attempts * ({FRAGMENTS["FAILED"]})) as failed
        from daily_totals join datasets using (dataset_id)
        where day > date(:now - 2592000, 'unixepoch') group by source, day
    )
    select 1 as place, 'open gaps, 24 hours' as title, strftime('%H:%M', started_at, 'unixepoch') as at,
           missing + stale + suspect as value, started_at as moment
    from reconciliations where seconds is not null and started_at > :now - 86400
    union all
    select 2, 'coverage in percent, 30 days', date(started_at, 'unixepoch'), max(present * 100.0 / expected), started_at
    from reconciliations where expected > 0 and started_at > :now - 2592000 group by date(started_at, 'unixepoch')
    union all select 3, source || ': attempts a day, 30 days', day, attempts, day from recent
    union all select 4, source || ': failed a day, 30 days', day, failed, day from recent
    union all select 5, source || ': mean seconds, 30 days', day, round(seconds, 2), day from recent
    order by place, title, moment
"""  # noqa: S608  # a constant
CELL, LEFT, TOP = 11, 26, 12
WIDE = '<div class="wide" tabindex="0">{}</div>'  # scrolls by itself, also by keyboard


def document(title: str, body: str, *, is_fresh: bool = False) -> str:
    """One HTML document; one that `is_fresh` asks for itself again now and then."""
    script = f'<script nonce="{NONCE}">{REFRESH}</script>' if is_fresh else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{PAGE_STYLE}</style>{script}</head>
<body><main><h1>{html.escape(title)}</h1>{body}</main></body></html>
"""


def tables(sections: Iterable[Section]) -> str:
    """Sections in HTML, each in a box that scrolls; those without rows and words are left out."""
    return "".join(WIDE.format(render([part], "html")) for part in sections if part.rows or part.empty)


def page(
    database: Database, configuration: Configuration, now: float, year: int | None = None, *, is_file: bool = True
) -> str:
    """The whole picture; without a `year` that of the latest day. A file has no links and is not renewed."""
    judged = verdict(database, configuration, now)
    above = [dataclasses.replace(judged, title=""), *answers(database, REPORT, "coverage")]
    below = [*answers(database, WEB, most=10), *answers(database, REPORT, "queue", "rates", "cycles")]
    today = day_of(now)
    first, last = (int(day[:4]) for day in database.read(YEARS.sql, {"today": today.isoformat()})[0])
    year = year or min(last, today.year)
    days = itertools.groupby(database.read(DAYS.sql, {"year": year}), key=lambda row: row["dataset"])
    years = () if is_file else range(max(first, year - 5), min(last, year + 1) + 1)
    links = (f'<a href="?year={one}">{one}</a>' if one != year else f"<b>{one}</b>" for one in years)
    words = cycle_text(database, now), tasks_text(database, configuration, judged), configuration.store
    body = f"""<p>{html.escape("Cycle {}. Tasks: {}. Store {}".format(*words))}, {utc_text(now)}</p>
{tables(above)}
<div class="lines">{_lines(database.read(LINES, {"now": now}))}</div>
<h2>Coverage by day, {year}</h2><nav aria-label="Years">{" ".join(links)}</nav>
<p>A square is a day: {" ".join(SWATCH.format(*meaning) for meaning in MEANINGS.items())}</p>
{"".join(_calendar(name, year, list(rows), has_links=not is_file) for name, rows in days)}
{tables(below)}"""
    return document(f"ADCE: {judged.title}".replace("  ", ", "), body, is_fresh=not is_file)


def day_page(database: Database, dataset: str, day: str) -> str:
    """The objects of a day, with what is wrong with each."""
    sections = answers(database, OF_DAY, dataset=dataset, day=day)
    links = (f'<a href="/task/{row["task_id"]}">{html.escape(row["key"])}</a>' for row in sections[0].rows)
    return document(f"{dataset}, {day}", f"{tables(sections)}<p>{', '.join(links)}</p>")


def task_page(database: Database, wanted: str) -> str:
    """One task, its attempts, and commands to copy. Raises Error when there is none."""
    sections = task_sections(database, wanted)
    task, attempts = sections[0].rows[0], sections[1].rows
    words = ["retry"] * (task["state"] in ("retry", "gave_up", "skipped", "absent"))  # of others it is refused
    lines = [f"adce.py {word} {task['task_id']}" for word in [*words, *["skip"] * (task["score"] is not None), "task"]]
    lines += [f"curl -sS {shlex.quote(attempts[0]['url'])}"] if attempts and attempts[0]["url"] else []
    commands = html.escape("\n".join(lines))
    return document(f"Task {task['task_id']}", f"{tables(sections)}<h2>Commands</h2><pre>{commands}</pre>")


def _lines(rows: Sequence[sqlite3.Row]) -> str:
    """A small line for each figure that has changed; its title says from when to when, and how far it went."""
    figures = []
    for title, points in itertools.groupby(rows, key=lambda row: row["title"]):
        listed = list(points)
        values = [row["value"] for row in listed]
        low, high = min(values), max(values)
        if low == high:
            continue
        dots = " ".join(f"{n},{high - one:g}" for n, one in enumerate(values))
        span = f"{listed[0]['at']} to {listed[-1]['at']}: from {low:g} to {high:g}, now {values[-1]:g}"
        name, box = html.escape(title), f'viewBox="0 0 {len(values) - 1} {high - low:g}" preserveAspectRatio="none"'
        picture = f'<svg role="img" {box}><title>{name}, {span}</title><polyline points="{dots}"/></svg>'
        figures.append(f"<figure>{picture}<figcaption>{name}: {values[-1]:g}</figcaption></figure>")
    return "".join(figures)


def _state_of_day(row: sqlite3.Row) -> tuple[str, str]:
    """The class of the cell of a day, and its state in words."""
    _, _, expected, present, stale, absent, gave_up = row
    counts = {"stale": stale, "gave up": gave_up, "absent": absent}
    text = ", ".join([f"{present} of {expected}", *(f"{count} {state}" for state, count in counts.items() if count)])
    if gave_up or not expected:
        return "gave_up" if gave_up else "absent", text
    if present + stale == expected:
        return "stale" if stale else "all", text
    return "part" if present + stale else "gap", text


def _calendar(dataset: str, year: int, rows: Sequence[sqlite3.Row], *, has_links: bool) -> str:
    """A year of days: a column is a week, a cell a day, its title says what its colour does."""
    days, first, cells = {row["day"]: row for row in rows}, datetime.date(year, 1, 1), []
    for number in range((datetime.date(year + 1, 1, 1) - first).days):
        day, kind, text = first + datetime.timedelta(days=number), "none", "nothing expected"
        if row := days.get(day.isoformat()):
            kind, text = _state_of_day(row)
        week, weekday = divmod(number + first.weekday(), 7)
        if day.day == 1:
            cells.append(f'<text x="{LEFT + week * CELL}" y="8">{day:%b}</text>')
        box = f'x="{LEFT + week * CELL}" y="{TOP + weekday * CELL}" width="{CELL - 2}" height="{CELL - 2}"'
        cell = f'<rect class="{kind}" {box}><title>{day:%a} {day}: {text}</title></rect>'
        query_text = html.escape(urllib.parse.urlencode({"dataset": dataset, "day": day}))
        link = f'<a href="/day?{query_text}" aria-label="{day}: {text}">{cell}</a>'
        cells.append(link if row and has_links else cell)
    cells += [f'<text x="0" y="{TOP + 8 + n * CELL}">{name}</text>' for n, name in ((0, "Mon"), (2, "Wed"), (4, "Fri"))]
    expected, present = (sum(row[name] for row in rows) for name in ("expected", "present"))
    label = html.escape(f"{dataset}: {present:,} of {expected:,} in {year}")
    size = f'width="{LEFT + 54 * CELL}" height="{TOP + 7 * CELL}"'
    svg = f'<svg role="{"group" if has_links else "img"}" aria-label="{label}" {size}>{"".join(cells)}</svg>'
    gaps = [f"{row['day']} ({row['present']} of {row['expected']})" for row in rows if row["present"] < row["expected"]]
    words = ", ".join(gaps[:50]) + " ..." * (len(gaps) > 50)
    details = f"<details><summary>{len(gaps)} days are not complete</summary><p>{words}</p></details>" if gaps else ""
    return f"<h3>{label}</h3>{WIDE.format(svg)}{details}"


# Each metric has its name, ! for a counter, and its meaning. The last column is the value, the others are labels.
METRICS = questions("""
adce_objects: Expected objects by state.
    select dataset, state, sum(objects) as n from counts join datasets using (dataset_id)
    where state in ('present', 'missing', 'stale', 'suspect') group by dataset, state having n > 0
adce_tasks: Open tasks.
    select dataset, task as state, sum(objects) as n from counts join datasets using (dataset_id)
    where task != '' group by dataset, task having n > 0
adce_attempts_total!: Attempts that ended.
    select dataset, outcome, sum(attempts) from stats group by 1, 2
adce_attempt_seconds_total!: Time spent in attempts.
    select dataset, sum(seconds) from stats group by 1
adce_stored_bytes_total!: Bytes put into the store.
    select dataset, sum(bytes) from stats group by 1
adce_open_alerts: Conditions that were reported and are not over.
    select count(*) from open_alerts
adce_cycles_total!: Cycles begun.
    select coalesce(max(cycle_id), 0) from reconciliations
adce_cycle_duration_seconds: How long the last cycle took.
    select seconds from reconciliations where seconds is not null order by cycle_id desc limit 1
adce_window_used_requests: Requests in a window of a rate limit.
    select scope, cast(window_seconds as integer) as seconds, used from rates where max_requests
adce_window_limit_requests: Requests that a window of a rate limit allows.
    select scope, cast(window_seconds as integer) as seconds, max_requests from rates where max_requests
adce_paused_until_timestamp_seconds: When the pause of a source ends.
    select scope, paused_until + wall_offset as until from scopes, facts where until > unixepoch()
adce_runner_last_beat_timestamp_seconds: The last heartbeat of the main loop.
    select beat_at from runner
adce_cycle_last_success_timestamp_seconds: End of the last cycle without an error.
    select max(started_at + seconds) as at from reconciliations where error is null having at is not null
""")
PROMETHEUS_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def metrics_text(database: Database) -> str:
    """The figures in the text format of Prometheus, version 0.0.4."""
    lines = []
    for one, rows in ((one, query(database, one.sql)) for one in METRICS):
        lines += [f"# HELP {one.name} {one.title}", f"# TYPE {one.name} {'counter' if one.is_one else 'gauge'}"]
        for *labels, (_, value) in (row.items() for row in rows):
            marks = ",".join(f'{label}="{str(text).translate(PROMETHEUS_ESCAPES)}"' for label, text in labels)
            lines.append(f"{one.name}{{{marks}}} {value}" if marks else f"{one.name} {value}")
    return "\n".join(lines) + "\n"


HTTP_THREADS = 32
HTTP_SECONDS = 10  # for a whole connection
JSON, TEXT, HTML = "application/json", "text/plain; charset=utf-8", "text/html; charset=utf-8"
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{NONCE}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Allow": "GET, HEAD",
}


def _http_server(port: int, answer: Callable[[str, dict[str, str]], tuple[int, str, str]], clock: Clock) -> Any:
    """A server on loopback, to whose clients `answer` gives status, content type and body. Each connection has a thread
    for a few seconds; when there are many, the oldest is closed."""
    import http.server

    connections: dict[Any, float] = {}  # the oldest first, and since when

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = HTTP_SECONDS
        server_version, sys_version = f"adce/{__version__}", ""

        def do_GET(self) -> None:
            given, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            host, (path, _, options) = given.rpartition(":")[0] or given, self.path.partition("?")
            try:
                if self.command not in ("GET", "HEAD"):
                    status, kind, text = 405, TEXT, "this server is only read\n"
                elif host in ("localhost", "127.0.0.1", "[::1]") and origin in (None, f"http://{given}"):
                    status, kind, text = answer(path, dict(urllib.parse.parse_qsl(options)))
                else:  # the name of another site may point here
                    status, kind, text = 403, TEXT, "this server answers to localhost only\n"
            except (DatabaseError, OSError) as error:
                status, kind, text = 503, TEXT, f"{error}\n"
            body = text.encode()
            self.send_response(status)
            for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Requests are not logged."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def process_request(self, request: Any, client_address: Any) -> None:
            connections[request] = clock.boot()
            super().process_request(request, client_address)

        def service_actions(self) -> None:
            """Close the connections that are too many or too old: a timeout for each read would let a client drip."""
            for request in [one for one in connections if one.fileno() < 0]:
                del connections[request]
            for place, (request, since) in enumerate(reversed(connections.items())):
                if place >= HTTP_THREADS or clock.boot() - since > HTTP_SECONDS:
                    with contextlib.suppress(OSError):  # it has just ended by itself
                        request.shutdown(socket.SHUT_RDWR)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that leaves early is not reported."""
            if not isinstance(sys.exc_info()[1], OSError):
                super().handle_error(request, client_address)

    return Server(("127.0.0.1", port), Handler)


class HealthServer:
    """Answers GET for one database, until stopped. Raises Error when the port is taken."""

    def __init__(
        self, configuration: Configuration, database: Database, clock: Clock, error: Callable[[], str | None] = str
    ) -> None:
        self.configuration, self.database, self.clock = configuration, database, clock
        self.started_at, self.error, port = clock.wall(), error, configuration.health_check.port
        try:
            self._server = _http_server(port, self.answer, clock)
        except OSError as problem:
            text = f"cannot listen on 127.0.0.1:{port}: {problem.strerror}"
            raise Error(text, "see health_check.port in adce.yaml") from problem

    def start(self) -> int:
        """Answer in threads, and return the port."""
        threading.Thread(target=self._server.serve_forever, name="adce-health", daemon=True).start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, options: Mapping[str, str]) -> tuple[int, str, str]:
        """Status, content type and body of a path."""
        now = self.clock.wall()
        if path == "/health":
            found = problems(self.database, self.configuration, now, self.started_at, self.error())
            components = {
                name: {"status": "unhealthy" if problem in found else "healthy", "message": found.get(problem, "")}
                for name, problem in COMPONENTS.items()
            }
            body = {"status": "unhealthy" if found else "healthy", "timestamp": utc_text(now)}
            text = json.dumps({**body, "problems": [*found.values()], "components": components})
            return (503 if found else 200), JSON, text
        if path == "/favicon.ico":  # every browser asks for one
            return 204, TEXT, ""
        self.database.check_file()
        if path == "/metrics" and options.get("format") != "json":
            return 200, TEXT.replace(";", "; version=0.0.4;"), metrics_text(self.database)
        if path in ("/status", "/metrics"):
            return 200, JSON, render(status_sections(self.database, self.configuration, now), "json")
        if path == "/tasks":
            by_source = tasks_by_source(self.database)
            tasks: dict[str, Any] = {
                "total_tasks": sum(by_source.values()),
                "by_priority": {row["priority"]: row for row in answers(self.database, REPORT, "queue")[0].rows},
                "by_source": by_source,
                "estimated_total_minutes": minutes_left(self.database, self.configuration),
                "tasks": tasks_sections(self.database, options, 100)[0].rows,
            }
            return 200, JSON, json.dumps(tasks)
        if path == "/":
            year = int(options["year"]) if re.fullmatch(r"[12]\d{3}", options.get("year", "")) else None
            return 200, HTML, page(self.database, self.configuration, now, year, is_file=False)
        if path == "/day":
            return 200, HTML, day_page(self.database, options.get("dataset", ""), options.get("day", ""))
        if path.startswith("/task/"):
            with contextlib.suppress(Error):
                return 200, HTML, task_page(self.database, urllib.parse.unquote(path.removeprefix("/task/")))
        return 404, TEXT, "try /health /status /tasks /metrics /day /task/ID or /\n"


# ---------------------------------------------------------------- Events
# The log: one line for each event. On a terminal, a live screen instead. A condition is reported by every channel once
# when it begins, once a day while it lasts and once when it is over; a thread of its own looks and sends, so that a
# broken channel delays nothing. Headlines: Journal, LiveScreen, Alerter.

SCREEN_SECONDS = 0.5
MOST_FINDINGS = 5  # of a verdict, and most sources, on one screen
LEVELS = {"DEBUG": "<7>", "INFO": "<6>", "WARN": "<4>", "ERROR": "<3>"}
LOG_BYTES = 10 << 20


class Journal:
    """One line for each event, on stderr, into a file or into the live screen."""

    def __init__(
        self, stream: TextIO | logging.StreamHandler[Any], level: str = "INFO", clock: Clock | None = None
    ) -> None:
        logging.raiseExceptions = False  # a closed terminal or a full disk stops nothing
        self.clock = clock or Clock()
        self.handler = stream if isinstance(stream, logging.StreamHandler) else logging.StreamHandler(stream)
        self.handler.setLevel(level)
        self.stream, self.is_journald = self.handler.stream, False
        with contextlib.suppress(OSError, ValueError):  # $JOURNAL_STREAM alone is inherited by too many
            status = os.fstat(self.stream.fileno())
            self.is_journald = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        self.database_error: str | None = None  # as last reported
        self.paused: dict[str, float] = {}  # until when, by source, as last reported
        self.screen: LiveScreen | None = None
        self.next_paint_at = -math.inf  # boot

    def paint(self, running: Iterable[Claim], next_cycle_at: float) -> None:
        """Refresh the live screen, if there is one, every SCREEN_SECONDS; a cycle at infinity will not come."""
        now = self.clock.boot()
        if self.screen and now >= self.next_paint_at:
            self.next_paint_at = now + SCREEN_SECONDS
            following = next_cycle_at - now if next_cycle_at < math.inf else None
            with contextlib.suppress(DatabaseError):
                keys = [claimed.tasks[0].key for claimed in running]
                self.screen.paint(self.clock.wall(), keys, following, self.database_error)

    def write(self, level: str, event: str, **fields: Any) -> None:
        """Log an event; fields without a value are left out. The journal of systemd has the time, and takes the level
        from a prefix (sd-daemon(3))."""
        number = getattr(logging, level)
        if number < self.handler.level:
            return
        head = LEVELS[level] if self.is_journald else f"{utc_text(self.clock.wall())} {level:5} "
        words = [f" {name}={_logged(value)}" for name, value in fields.items() if value is not None]
        line = f"{head}{event}{''.join(words)}"
        if self.screen:
            self.screen.last_lines = [*self.screen.last_lines[-4:], line]
        else:
            self.handler.handle(logging.makeLogRecord({"levelno": number, "msg": line}))

    def report_database_error(self, error: Error | None) -> None:
        """Log an error of the database once, and once its end (None)."""
        before, self.database_error = self.database_error, str(error) if error else None
        if error and self.database_error != before:
            self.write("ERROR", "database", error=self.database_error, hint=error.hint)
        elif before and not error:
            self.write("INFO", "database", status="recovered")

    def report_pauses(self, database: Database) -> None:
        """Log the pauses of sources that have begun since the last call, and those that are over."""
        now, paused = self.clock.boot(), dict[str, float]()
        sql = "select scope, paused_until, paused_for, reason from scopes where paused_until > ?"
        for scope, until, seconds, reason in database.read(sql, (now,)):
            paused[scope] = until
            if self.paused.get(scope) != until:
                at = utc_text(self.clock.wall() + until - now) if seconds < UNTIL_RESUMED else None  # as reason says
                self.write("WARN", "paused", source=scope, until=at, reason=reason)
        for scope in sorted(self.paused.keys() - paused.keys()):
            self.write("INFO", "resumed", source=scope)
        self.paused = paused


def _logged(value: Any) -> str:
    text = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return text if re.fullmatch(r"[!#-<>-~]+", text) else json.dumps(text)


def log_file(path: Path) -> logging.StreamHandler[Any]:
    """A log that only its owner can read; at LOG_BYTES it becomes FILE.1. Raises Error when it cannot be written."""
    from logging.handlers import RotatingFileHandler

    class Handler(RotatingFileHandler):
        def _open(self) -> Any:
            opener = lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)  # noqa: E731
            return open(self.baseFilename, "a", encoding="utf-8", opener=opener)

    try:
        return Handler(path, maxBytes=LOG_BYTES, backupCount=1)
    except OSError as error:
        raise Error(f"cannot write to {path}: {error.strerror}", "name another file with --log FILE") from error


def log_ending(journal: Journal, ending: Ending, max_attempts: int) -> None:
    """One line for the end of an attempt."""
    task, result = ending.task, ending.result
    level = {TaskState.GAVE_UP: "ERROR", TaskState.DONE: "DEBUG"}.get(ending.state, "WARN")
    fields: dict[str, Any] = {"dataset": task.dataset, "key": task.key, "outcome": result.outcome}
    fields |= {"failures": f"{task.failures}/{max_attempts}" if task.failures else None}
    fields |= {"bytes": result.stored.size if result.stored else None, "error": result.error}
    fields |= {"next": utc_text(task.next_at if task.task else None), "task": task.object_id}
    journal.write("DEBUG" if level == "WARN" and not ending.counted else level, ending.state, **fields)


def show_progress(steps: Iterator[int], database: Database, clock: Clock) -> Iterator[int]:
    """The steps of a cycle; on a terminal, with a line about it every few seconds."""
    shown = clock.boot()
    for step in steps:
        yield step
        if sys.stderr.isatty() and clock.boot() >= shown + SAVED_EVERY_SECONDS:
            shown = clock.boot()
            print(f"cycle {cycle_text(database, clock.wall())}", file=sys.stderr)


def status_lines(
    database: Database,
    configuration: Configuration,
    now: float,
    next_cycle_in: float | None = None,
    error: str | None = None,
) -> list[str]:
    """The state of the lake for a terminal: the headline, the cycle and the tasks, then the verdict and the sources."""
    judged = verdict(database, configuration, now, error)
    lines = [judged.title, f"cycle   {cycle_text(database, now, next_cycle_in)}"]
    lines.append(f"tasks   {tasks_text(database, configuration, judged)}")
    for row in judged.rows[:MOST_FINDINGS]:
        held = f" holds up {row['holds_up']:,} task{'s' * (row['holds_up'] > 1)}" if row["holds_up"] else ""
        lines += [f"  {row['mark']} {row['about']}{held}: {row['what']}", f"      {row['try']}"]
    if len(judged.rows) > MOST_FINDINGS:
        lines.append(f"  ... and {len(judged.rows) - MOST_FINDINGS} more: adce.py report verdict")
    tightest = """
        select scope, used, max_requests, window_seconds, max(1.0 * used / max_requests) as share
        from rates where max_requests group by scope order by scope = 'global', share desc, scope
    """
    for scope, used, most, seconds, share in database.read(tightest)[:MOST_FINDINGS]:
        bar = ("#" * round(20 * min(1, share))).ljust(20, "-")
        lines.append(f"  {scope:20} [{bar}] {used:,} of {most:,} in {format_duration(seconds)}")
    store = f"store {configuration.store}, " if configuration.store else ""
    return [*lines, f"{store}database {configuration.database}"]


class LiveScreen:
    """A few lines on a terminal, repainted in place; the last state stays in the scrollback."""

    def __init__(self, stream: TextIO, database: Database, configuration: Configuration) -> None:
        self.stream, self.database, self.configuration = stream, database, configuration
        self.last_lines: list[str] = []  # events, at the foot
        self._height, self._size = 0, shutil.get_terminal_size()

    def paint(self, now: float, running: Sequence[str], next_cycle_in: float | None, error: str | None = None) -> None:
        """Draw the present state over the last one."""
        width, height = size = shutil.get_terminal_size()
        lines = [f"ADCE {__version__}  {utc_text(now)}  Ctrl-C stops cleanly"]
        lines += status_lines(self.database, self.configuration, now, next_cycle_in, error)
        coverage = answers(self.database, REPORT, "coverage")
        lines += render(coverage, "table", width - 1).splitlines()[1:] if coverage[0].rows else []
        foot = [f"workers {', '.join(running) or 'idle'}", *self.last_lines]
        room = max(2, height - 1 - len(foot))
        if len(lines) > room:
            lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more"]
        shown = [cut(line, width - 1) for line in [*lines, *foot]][: max(2, height - 1)]
        up = f"\x1b[{self._height}F" if self._height else ""  # to the first column: Ctrl-C has written ^C
        up = up if size == self._size else "\x1b[H\x1b[2J"  # whose lines the terminal has broken anew
        self._height, self._size = len(shown), size
        with contextlib.suppress(OSError):  # the terminal is gone, the work is not
            self.stream.write(up + "".join(f"\x1b[2K{line}\n" for line in shown) + "\x1b[J")
            self.stream.flush()


LOOK_SECONDS = 30
CALM_SECONDS = 15 * MINUTE  # a condition that returns sooner was never over
SEND_SECONDS = 15  # for one message
CHANNELS = ("webhook", "sns_topic", "command")  # of alerts; `ping` and `cloudwatch` get each cycle
FIGURES = ("expected", "present", "missing", "stale", "suspect", "list_calls")  # for CloudWatch, and the open tasks
FULL = f"SQLITE_FULL|{os.strerror(errno.ENOSPC)}"  # other effects of a full disk


class Alerter:
    """Looks for conditions, and sends messages until every channel has taken them. The rows of `alerts` are kept here
    too: on a full disk nothing is stored, and yet everything is sent once."""

    def __init__(self, configuration: Configuration, database: Database, journal: Journal, clock: Clock) -> None:
        self.configuration, self.database, self.journal, self.clock = configuration, database, journal, clock
        self.settings, self.started_at, self._stopped = configuration.alerts, clock.wall(), threading.Event()
        self._in_use = ""  # the channel
        unfinished = query(database, "select * from alerts where ended_at is null or unsent != '[]'")
        self.alerts: list[dict[str, Any]] = [{**row, "unsent": json.loads(row["unsent"])} for row in unfinished]
        self.cycle_id = database.value("select max(cycle_id) from cycles where seconds is not null")

    def start(self) -> None:
        """Work every LOOK_SECONDS, in a thread."""

        def work() -> None:
            while not self._stopped.wait(LOOK_SECONDS):
                self.work()

        threading.Thread(target=work, name="adce-alerts", daemon=True).start()

    def stop(self) -> None:
        """Stop without waiting for a channel. No program of one runs on, and none begins."""
        self._stopped.set()
        while self._in_use == "command":
            end_processes(str(self.configuration.database), "alert")
            time.sleep(POLL_SECONDS)

    def work(self) -> None:
        """Look once, and send what is due."""
        try:
            self.look()
            self.send()
            self.report_cycle()
        except (DatabaseError, OSError) as error:
            self.journal.write("WARN", "alerts", error=str(error))

    def look(self) -> None:
        """Begin, continue and end alerts."""
        now, error = int(self.clock.wall()), self.journal.database_error
        holds = conditions(self.database, self.configuration, self.clock.wall(), self.started_at, error)
        found = {(one.name, one.about): one.text for one in holds if not one.is_quiet}
        lasting = {(alert["condition"], alert["about"]): alert for alert in self.alerts if alert["ended_at"] is None}
        if "disk low" in {name for name, _ in [*found, *lasting]}:
            found = {key: text for key, text in found.items() if not re.search(FULL, text)}
        for key, text in found.items():
            if key not in lasting:
                times = {"since": now, "notified_at": now, "ended_at": None}
                lasting[key] = {"condition": key[0], "about": key[1], "unsent": [], **times}
                self.alerts.append(lasting[key])
                self._notify(lasting[key], "", text)
            elif now - lasting[key]["notified_at"] >= DAY:
                lasting[key]["notified_at"] = now
                self._notify(lasting[key], "still ", f"for {format_duration(now - lasting[key]['since'])}: {text}")
            lasting[key] |= {"text": text, "seen_at": now}
        for key, alert in lasting.items():
            if key not in found and now - alert["seen_at"] >= CALM_SECONDS:
                alert["ended_at"] = alert["seen_at"]
                self._notify(alert, "over: ", f"it lasted {format_duration(alert['seen_at'] - alert['since'])}")
        self._save()

    def _notify(self, alert: dict[str, Any], prefix: str, text: str) -> None:
        """Log a message, and leave it to every channel."""
        subject = f"{prefix}{alert['condition']}, {alert['about']}"
        self.journal.write("WARN", "alert", subject=subject, text=text)
        body = f"{text}\nhost {socket.gethostname()}, {self.configuration.database}\nTry: adce.py status"
        message = {"subject": f"ADCE: {subject}", "text": body, "made_at": self.clock.wall(), "next_age": 0}
        alert["unsent"] += [{"channel": channel, **message} for channel in CHANNELS if getattr(self.settings, channel)]

    def _save(self) -> None:
        """Store the alerts; those that are over and sent are then no longer kept here. Until it succeeds, all are."""
        row = "(:condition, :about, :since, :text, :seen_at, :notified_at, :ended_at, :unsent)"
        rows = [{**alert, "unsent": json.dumps(alert["unsent"])} for alert in self.alerts]
        try:
            if rows:
                with self.database.transaction() as sql:
                    sql.executemany(f"insert or replace into alerts values {row}", rows)  # noqa: S608
        except DatabaseError as error:
            self.journal.write("WARN", "alerts", error=str(error))
        else:
            self.alerts = [alert for alert in self.alerts if alert["ended_at"] is None or alert["unsent"]]

    def send(self) -> None:
        """Send waiting messages, in order. A channel that fails is tried again after as long as its first message has
        waited, at least a minute and at most an hour, and gets nothing that is older than a day."""
        for channel in CHANNELS:
            waiting = [(alert, one) for alert in self.alerts for one in alert["unsent"] if one["channel"] == channel]
            for alert, message in sorted(waiting, key=lambda pair: pair[1]["made_at"]):
                age = self.clock.wall() - message["made_at"]
                if age < min(message["next_age"], DAY):
                    break
                error = self._use(channel, message) if age < DAY else None
                if error:
                    message |= {"error": error, "next_age": age + min(max(age, MINUTE), HOUR)}
                else:
                    alert["unsent"].remove(message)
                self._save()
                if error:
                    break

    def report_cycle(self) -> None:
        """Report each cycle once: its figures to CloudWatch and, when it was good, a request to `ping`."""
        for cycle in query(self.database, "select * from cycles where seconds is not null order by 1 desc limit 1"):
            if cycle["cycle_id"] != self.cycle_id:
                self.cycle_id = cycle["cycle_id"]
                tasks = self.database.read("select 'tasks_' || state, count(*) from queue group by state")
                self._use("cloudwatch", cycle | dict(map(tuple, tasks)))
                if cycle["error"] is None:
                    self._use("ping", cycle)

    def _use(self, channel: str, message: Mapping[str, Any]) -> str | None:
        """Use a channel, if it is configured. Returns its error."""
        self._in_use = channel
        try:
            if self._stopped.is_set():
                return "the runner stops"
            if getattr(self.settings, channel):
                deliver(channel, self.configuration, message)
        except Exception as problem:  # noqa: BLE001  # whatever a library raises is an error of the channel
            error = str(problem) if isinstance(problem, Error | OSError) else type(problem).__name__  # no address
            self.journal.write("WARN", "channel", channel=channel, error=error)
            return error
        finally:
            self._in_use = ""
        return None


def deliver(channel: str, configuration: Configuration, message: Mapping[str, Any]) -> None:
    """Send the subject and text of an alert; to `ping` and `cloudwatch`, a cycle and the number of open tasks."""
    settings = configuration.alerts
    if channel == "webhook":  # in the format of Slack, which many others take
        _http("POST", str(settings.webhook), json={"text": f"*{message['subject']}*\n{message['text']}"})
    elif channel == "ping":
        _http("GET", str(settings.ping))
    elif channel == "command":  # subject and text are its last arguments
        words = (*settings.command, message["subject"], message["text"])
        environment = {"ADCE_DB": str(configuration.database.resolve()), "ADCE_TASK": "alert"}
        end = run_program(words, configuration.path.parent, environment, SEND_SECONDS)
        if end.text != "exit 0":
            tail = redacted(end.tail.decode("utf-8", "replace"), filter(SECRET_NAME.search, os.environ))[-120:]
            raise Error(f"{end.text}: {excerpt(tail.encode())}" if tail else end.text)
    elif channel == "sns_topic":
        topic = str(settings.sns_topic)
        client = _aws_client("sns", topic.split(":")[3] if topic.count(":") >= 5 else None)
        client.publish(TopicArn=topic, Subject=message["subject"][:100], Message=message["text"])
    elif channel == "cloudwatch":
        started_at, seconds = datetime.datetime.fromisoformat(message["started_at"]), message["seconds"]
        common = {"Timestamp": started_at + datetime.timedelta(seconds=seconds), "Unit": "Count"}
        names = (name for name in message if name in FIGURES or name.startswith("tasks_"))
        metrics = [{"MetricName": name, "Value": message[name], **common} for name in names]
        metrics.append({**common, "MetricName": "cycle", "Value": seconds, "Unit": "Seconds"})
        _aws_client("cloudwatch").put_metric_data(Namespace=settings.cloudwatch, MetricData=metrics)


def _http(method: str, address: str, **options: Any) -> None:
    """Send a request to an address that may be a secret. Raises Error, which does not name it."""
    import requests

    options |= {"allow_redirects": False}  # a redirect would lose the body
    try:
        answer = requests.request(method, from_environment(address), timeout=SEND_SECONDS, **options)
    except requests.RequestException as error:
        raise Error(connection_error(error)[1]) from None
    if answer.status_code >= 300:
        raise Error(f"HTTP {answer.status_code}")


def _aws_client(service: str, region: str | None = None) -> Any:
    import boto3
    import botocore.config

    limits = botocore.config.Config(connect_timeout=5, read_timeout=SEND_SECONDS, retries={"total_max_attempts": 2})
    return boto3.session.Session().client(service, region_name=region, config=limits)


# ---------------------------------------------------------------- Supervision
# The runner as a process: systemd, signals, its start in the background, its end and its log; a command under a permit.
# Headlines: notify(), obey_signals(), start_runner(), stop_runner(), run_held().

START_SECONDS = 60


def notify(*lines: str) -> None:
    """Send a state to the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1)
            sender.sendto("\n".join(lines).encode(), re.sub("^@", "\0", address))


def watchdog_seconds() -> float:
    """The longest time between two signs of life; infinite without a watchdog (sd_watchdog_enabled(3))."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    is_mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 1e6 if microseconds.isdigit() and int(microseconds) and is_mine else math.inf


def own_unit() -> str | None:
    """The control group of the unit that this process is the main process of, such as /system.slice/adce.service."""
    found = None
    if os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()):
        with contextlib.suppress(OSError):
            groups = (PROC / "self/cgroup").read_text(encoding="utf-8")
            found = re.search("^(?:0:|1:name=systemd):(.+)$", groups, re.MULTILINE)
    return found and found[1]


def obey_signals(database: Path, stop: Callable[[str], None]) -> None:
    """The first signal stops the runner cleanly, the second at once; the next start requeues what ran."""
    seen: list[int] = []

    def obey(number: int, _frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            end_processes(str(database))
            os._exit(ExitCode.INTERRUPTED)
        stop(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, obey)


def own_command(configuration: Configuration) -> list[str]:
    """The words that start this program with this configuration."""
    return [sys.executable, str(Path(__file__).resolve()), "-c", str(configuration.path)]


def start_runner(configuration: Configuration, words: Sequence[str], log: Path) -> int:
    """Start `adce.py run` in the background; return its process id. Raises Error with its output when it exits."""
    log_file(log).close()
    lock, clock, said_before = RunnerLock(configuration.database), Clock(), log.stat().st_size
    command = [*own_command(configuration), "--db", str(configuration.database), "run", "--log", str(log), *words]
    until, registered = clock.boot() + START_SECONDS, "select pid from runner where stopped_at is null"
    with contextlib.closing(open_database(configuration.database)) as database, log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # this very program
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        while lock.holder() != process.pid or database.value(registered) != process.pid:
            if process.poll() is not None:
                said = log.read_bytes()[said_before:].decode("utf-8", "replace").strip()
                failure = Error(f"the runner exited at once with exit code {process.returncode}\n{said}".rstrip())
                failure.exit_code = process.returncode if process.returncode > 0 else ExitCode.ERROR
                raise failure
            if clock.boot() > until:
                raise Error(f"the runner (process {process.pid}) is not ready after {START_SECONDS} s", f"see {log}")
            time.sleep(POLL_SECONDS)
    return process.pid


def stop_runner(configuration: Configuration, seconds: float | None) -> int | None:
    """Stop the runner and wait for its end, `seconds` or 15 more than its grace time. Returns its process id, or None
    when there is none. Raises Error when it does not stop in time, OSError when it belongs to another user."""
    lock, clock = RunnerLock(configuration.database), Clock()
    if (holder := lock.holder()) is None:
        return None
    if holder == 0:
        raise Error(f"{lock.path} does not name the process that holds it", "stop that process yourself")
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder, signal.SIGTERM)
    seconds = configuration.grace_seconds + 15 if seconds is None else seconds
    until = clock.boot() + seconds
    while lock.holder() == holder:
        if clock.boot() > until:
            text = f"process {holder} did not stop within {format_duration(seconds)}"
            raise Error(text, "run stop again: a second signal ends it at once")
        time.sleep(POLL_SECONDS)
    return holder


def run_held(limiter: Limiter, held: ActivePermit, words: Sequence[str]) -> int:
    """Run a command that uses a permit and return its exit code. SIGTERM and SIGHUP are passed on to it; SIGINT reaches
    it from the terminal."""
    early: list[int] = []  # signals before there is a process to pass them on to
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: early.append(number))
    try:
        process = subprocess.Popen(words)  # noqa: S603  # the user's own words, without a shell
    except OSError as error:
        limiter.release(held, used=False)
        raise Error(f"cannot start {words[0]}: {error.strerror}") from error
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: process.send_signal(number))
    signal.signal(signal.SIGINT, lambda *_: None)
    for missed in early:
        process.send_signal(missed)
    code = process.wait()
    if code == 0:
        held.answered(200, {})
    limiter.release(held)
    return code if code >= 0 else 128 - code


def show_log(database: Database, most: int, *, follow: bool) -> None:
    """Become the program that shows the log of the last runner. Raises Error when there is none."""
    row = next(iter(database.read("select unit, log from runner")), None)
    if row and row["log"] and Path(row["log"]).is_file():
        words = ["tail", "-n", str(most), *(["-F"] if follow else []), "--", row["log"]]
    elif row and row["unit"]:
        kind, unit = "--user-unit" if "/user@" in row["unit"] else "--unit", row["unit"].rpartition("/")[2]
        words = ["journalctl", "--no-pager", kind, unit, "--lines", str(most), *(["--follow"] if follow else [])]
    else:
        hint = "`adce.py start` logs to a file, `run --log FILE` to FILE, a unit of systemd to the journal"
        raise Error("the last runner kept no log", hint)
    sys.stdout.flush()
    os.execvp(words[0], words)  # noqa: S606  # the system's own programs


def cycle_of_runner(database: Database, configuration: Configuration, lock: RunnerLock, options: CycleOptions) -> int:
    """Ask the runner for a cycle and wait for its end. Raises Error when the runner ends before, or is stuck."""
    clock, holder = Clock(), lock.holder()
    since = clock.wall()
    with database.transaction() as sql:
        cycle_id = request_cycle(sql, options)
    print(f"The runner (process {holder}) runs it, with the configuration it started with.", file=sys.stderr)
    ended = "select 1 from reconciliations where cycle_id = ? and seconds is not null"
    while database.value(ended, (cycle_id,)) is None:
        if lock.holder() is None:
            raise Error("the runner exited before the cycle ended", "try again; a new runner starts with a cycle")
        if stuck := problems(database, configuration, clock.wall(), since).get("loop stuck"):
            raise Error(stuck, "adce.py logs")
        clock.wait(queue.SimpleQueue(), 1, database.has_changed)
    return cycle_id


# ---------------------------------------------------------------- Runner
# Works until it is stopped. The main thread makes every decision (claim, finish, reconcile) and writes all
# tasks; workers run fetch() on plain data; health threads only read. It sleeps until the next event: a
# finished attempt, a due task, a free window, a cycle, a signal. Headline: Runner.


def _return_free_memory() -> None:
    """To the system: what compiling and importing needed."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


class Runner:
    """One run on one database: `run()` returns when it is stopped, or when `once` is done."""

    def __init__(self, configuration: Configuration, database: Database, store: Store, journal: Journal) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.configuration, self.database, self.store, self.journal = configuration, database, store, journal
        self.clock = journal.clock
        self.rng = random.Random()  # noqa: S311  # spreads retries, guards nothing
        self.wakeups: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.pool: Executor = ThreadPoolExecutor(configuration.max_concurrent_scrapers, "adce-worker")
        self.cluster: Cluster | None = None
        self.trouble: str | None = None  # of the cluster,
        self.trouble_at = math.inf  # since this boot time
        if configuration.pool:
            woken = functools.partial(self.wakeups.put, "cluster")
            self.cluster = Cluster(configuration.pool, configuration.store, self.clock, woken)
        self.running: dict[Future[list[Result]], Claim] = {}
        self.listers: Executor = ThreadPoolExecutor(LISTED_AT_ONCE, "adce-lister")
        self.beat_seconds = min(BEAT_SECONDS, watchdog_seconds() / 3)
        self.hops: list[Claim] = []  # redirects, which hold no worker while they wait for a permit of their own
        self.unrecorded: list[tuple[Claim, list[Result]]] = []
        self.steps: Iterator[int] | None = None
        self.cycle_id: int | None = None
        self.next_cycle_at = self.next_beat_at = -math.inf
        self.stop_at, self.stop_reason = math.inf, ""
        self.once = self.is_waiting = self.cycle_waits = self.has_problems = False
        self.max_wait = 0.0
        self.datasets: Collection[str] = configuration.datasets  # whose tasks are claimed

    def stop(self, reason: str) -> None:
        """Ask the loop to end; safe from a signal handler and from other threads."""
        self.stop_reason = self.stop_reason or reason
        self.database.shorten_waits()
        self.wakeups.put("stop")

    def run(
        self,
        *,
        once: bool = False,
        max_seconds: float = math.inf,
        max_wait: float = MINUTE,
        address: str | None = None,
        log: Path | None = None,
    ) -> ExitCode:
        """Work until stopped. With `once`: one cycle, then one attempt at every task that is due or has failed, but
        without a wait for pauses of more than `max_wait` seconds. `address` and `log` are stored for other commands."""
        self.once, self.max_wait, self.stop_at = once, max_wait, self.clock.boot() + max_seconds
        self._start(address, log)
        try:
            while not self.stop_reason:
                try:
                    self._turn()
                    self.journal.report_database_error(None)
                except DatabaseUnavailableError as error:
                    self.database.check_file()
                    if once and not self.stop_reason:
                        raise
                    self.journal.report_database_error(error)
                    self.journal.paint(self.running.values(), self.next_cycle_at)
                    self.clock.wait(self.wakeups, TROUBLE_SECONDS)
        finally:
            self._finish()
        if not once:
            return ExitCode.DONE
        failure = self.database.value("select error from reconciliations where cycle_id = ?", (self.cycle_id,))
        if self.has_problems or (failure and failure != STOPPED_EARLY):
            return ExitCode.ERROR
        gaps = "select sum(expected - present) from coverage where dataset in (select value from json_each(?))"
        return ExitCode.GAPS_LEFT if self.database.value(gaps, (json.dumps([*self.datasets]),)) else ExitCode.DONE

    def _start(self, address: str | None, log: Path | None) -> None:
        """End the programs of a crashed runner, prepare the store, and register this process as the runner."""
        ended, configuration = self._sweep(), self.configuration
        prefetch = Prefetch(self.listers, lambda: self.wakeups.put("prepared"))
        preparing = prefetch.submit(prepare_store, self.database, configuration, self.store)
        while not preparing.done():
            self.clock.wait(self.wakeups, MINUTE)
            if self.stop_reason:
                return
        preparing.result()
        declare(self.database, configuration, self.clock)
        now = int(self.clock.wall())
        row = (os.getpid(), __version__, now, now, address, own_unit(), str(log) if log else None)
        with self.database.transaction() as sql:
            orphans = requeue_orphans(sql, configuration.retry)
            correct_instants(sql, configuration.retry, now)
            sql.execute("insert or replace into runner values (1, ?, ?, ?, ?, ?, ?, ?, null, null)", row)
        facts = {"version": __version__, "pid": os.getpid(), "config": configuration.path}
        facts |= {"database": configuration.database, "store": configuration.store}
        self.journal.write("INFO", "start", **facts, requeued=orphans or None, ended=ended or None)
        _return_free_memory()
        notify("READY=1")

    def _sweep(self) -> int:
        """Remove the files of programs and kill their processes. Returns the number of processes."""
        shutil.rmtree(output_folder(self.configuration.database), ignore_errors=True)
        return end_processes(str(self.configuration.database.resolve()))

    def _turn(self) -> None:
        """One turn of the main loop. All that has finished and all that is claimed is one transaction."""
        self._advance_cycle()
        openings = self._work(may_claim=self.steps is None or not self.once)
        self.journal.report_pauses(self.database)
        self._beat()
        wait = self._seconds_to_next_event(openings)
        is_idle = self.steps is None and not self.running and not self.trouble
        too_late = self.clock.boot() + self.max_wait - 1  # a pause that has just begun counts in full
        if self.clock.boot() >= self.stop_at:
            self.stop("--max-minutes reached")
        elif self.once and is_idle and all(one.is_pause and one.at > too_late for one in openings.values()):
            self.stop(ENDS_OF_ONCE[bool(openings)])
        if not self.stop_reason:
            every = IDLE_POLL_SECONDS if is_idle and not openings else POLL_SECONDS
            self.clock.wait(self.wakeups, wait, self.database.has_changed, every)

    def _advance_cycle(self) -> None:
        """Begin a cycle when it is time, or do the next step of the one that runs."""
        now = self.clock.boot()
        if self.steps is None:
            is_wanted = self.database.value("select wanted_cycle is not null from facts")
            if not is_wanted and now < self.next_cycle_at:
                return
            self.next_cycle_at = math.inf if self.once else now + self.configuration.interval_seconds
            prefetch = Prefetch(self.listers, lambda: self.wakeups.put("page"))
            self.steps = reconcile(self.database, self.configuration, self.store, self.clock, CycleOptions(), prefetch)
        try:
            step = next(self.steps)
            self.cycle_id, self.cycle_waits = step or self.cycle_id, step == 0
        except DatabaseError:
            self.steps, self.next_cycle_at = None, now
            raise
        except StopIteration:
            self.steps, self.cycle_waits = None, False
            (row,) = answers(self.database, STATUS, "cycle")[0].rows
            self.journal.write("ERROR" if row["error"] else "INFO", "cycle", **row)
            if self.once:
                with self.database.transaction() as sql:
                    wake_failed(sql)

    def _free_workers(self) -> int:
        is_exclusive = any(claimed.runs_exclusively for claimed in self.running.values())
        free = 0 if is_exclusive else self.configuration.max_concurrent_scrapers - len(self.running)
        return min(free, self.cluster.free_threads()) if self.cluster else free

    def _work(self, *, may_claim: bool) -> dict[str, Opening]:
        """Record the finished executions and claim the best tasks for the free workers, in one transaction; if that
        fails, the next one records them. Returns when sources can be asked that a free worker waits for."""
        for future in [future for future in self.running if future.done()]:
            self.unrecorded.append((self.running.pop(future), future.result()))
        if not (self.unrecorded or self.is_waiting or (may_claim and self._free_workers() > 0)):
            return {}
        log: list[Callable[[], None]] = []
        hops, openings, begun = list(self.hops), dict[str, Opening](), list[Claim]()
        with self.database.transaction() as sql:
            for claimed, results in self.unrecorded:
                if (target := results[0].redirect) and claimed.permit:
                    release(sql, claimed.permit, self.clock.boot())
                    hop = dataclasses.replace(claimed, permit=None, url=target, cookies=results[0].cookies)
                    hops.append(dataclasses.replace(hop, hops=claimed.hops + 1))
                else:
                    log += self._record(sql, claimed, results)
            if may_claim:
                openings = self._claim(sql, hops, begun)
            if openings or self.is_waiting:
                seconds = self.configuration.queue_check_seconds
                self.is_waiting = update_waiters(sql, RUNNER, openings, self.clock.boot(), seconds)
        self.unrecorded, self.hops = [], hops
        for claimed in begun:
            if self.cluster:
                future = self.cluster.submit(claimed)
            else:
                future = self.pool.submit(fetch, claimed, self.store, self.clock)
            self.running[future] = claimed
            future.add_done_callback(lambda _: self.wakeups.put("finished"))
        for write in log:
            write()
        return openings

    def _claim(self, sql: sqlite3.Connection, hops: list[Claim], begun: list[Claim]) -> dict[str, Opening]:
        """Claim for every free worker: first the redirects, then the best tasks."""
        openings = dict[str, Opening]()
        limiting, free = self.configuration.rate_limiting, self._free_workers()
        for hop in list(hops):
            source, now = self.configuration.source_at(hop.url, hop.source), self.clock.boot()
            opens = opening(sql, limiting, source.name, now, RUNNER)
            if opens.at > now:
                openings[source.name] = opens
            elif free > len(begun):
                granted = grant(sql, source.name, source.timeout_seconds, now, RUNNER)
                hops.remove(hop)
                begun.append(dataclasses.replace(hop, permit=granted))
        if not self.once:
            advance(Ledger(sql, self.configuration, self.clock.wall()))
        busy = collections.Counter(one.dataset.name for one in [*self.running.values(), *hops, *begun])
        while free > len(begun) and not any(one.runs_exclusively for one in [*hops, *begun]):
            claimed, waits = claim(sql, self.configuration, self.clock, busy, free - len(begun), self.datasets)
            if claimed is None:
                return openings | waits
            busy[claimed.dataset.name] += 1
            begun.append(claimed)
        return openings if free > len(begun) else {}

    def _record(self, sql: sqlite3.Connection, claimed: Claim, results: Sequence[Result]) -> list[Callable[[], None]]:
        """Record an execution that has finished. Returns the log lines to write after the commit."""
        first, *others = results  # which counts the requests
        results = [dataclasses.replace(first, requests=first.requests + claimed.hops), *others]
        ledger = Ledger(sql, self.configuration, self.clock.wall(), self.cycle_id)
        endings = finish(ledger, claimed, results, self.clock, self.rng)
        journal, most = self.journal, self.configuration.retry.max_attempts
        problems = ledger.problems[:MOST_PROBLEMS]
        self.has_problems |= bool(problems)
        log = [functools.partial(journal.write, "WARN", "children", problem=problem) for problem in problems]
        return [*log, *(functools.partial(log_ending, journal, ending, most) for ending in endings)]

    def _collect(self) -> None:
        """Record the finished executions, if the database can be written now."""
        try:
            self._work(may_claim=False)
        except DatabaseError as error:
            self.journal.report_database_error(error)

    def _beat(self) -> None:
        """Sign of life, upkeep, and the trouble of the cluster. Raises Error when `once` has waited enough for that."""
        now, wall = self.clock.boot(), self.clock.wall()
        if self.trouble and self.once and now > self.trouble_at + self.max_wait:
            raise Error(f"pool: {self.trouble}")
        if self.cluster and self.cluster.problem != self.trouble:
            problem = self.cluster.problem
            with self.database.transaction() as sql:
                sql.execute("update runner set note = ?", (problem,))
            self.trouble, self.trouble_at = problem, min(self.trouble_at, now) if problem else math.inf
            self.journal.write("WARN" if problem else "INFO", "pool", problem=problem, is_back=not problem or None)
        if now >= self.next_beat_at:
            self.next_beat_at = now + self.beat_seconds
            self.database.check_file()
            progress = "select cycle_id, progress from reconciliations where seconds is null and progress is not null"
            for number, doing in self.database.read(progress):
                self.journal.write("INFO", "progress", cycle=number, doing=doing)
            with self.database.transaction() as sql:
                sql.execute("update runner set beat_at = ?", (int(wall),))
                sql.execute("update facts set wall_offset = ?", (wall - now,))
                forget(sql, wall - self.configuration.retention_seconds)
            notify("WATCHDOG=1", f"STATUS={lake_text(self.database)}")
        self.journal.paint(self.running.values(), self.next_cycle_at)

    def _seconds_to_next_event(self, openings: Mapping[str, Opening]) -> float:
        """How long nothing can happen; while a cycle goes on there is always something to do."""
        if self.steps is not None and not self.cycle_waits:
            return 0.0
        now, wall = self.clock.boot(), self.clock.wall()
        instants = [self.next_cycle_at, self.next_beat_at, self.stop_at, now + self.configuration.queue_check_seconds]
        instants += [opening.at for opening in openings.values()]
        if self.journal.screen:
            instants.append(self.journal.next_paint_at)
        if self._free_workers() and not self.once:  # else the next free worker looks
            next_at = self.database.value("select min(next_at) from objects where next_at is not null")
            instants += [] if next_at is None else [now + next_at - wall]
        return max(0.0, min(instants) - now)

    def _finish(self) -> None:
        """Let running attempts finish within the grace time; the rest return to the queue. Then log the end."""
        self.stop_reason = self.stop_reason or "an error"
        Inspector.ends_at = time.monotonic() + STOPPING_SECONDS
        limit = self.clock.boot() + self.configuration.grace_seconds
        notify("STOPPING=1")
        if self.steps is not None:
            with contextlib.suppress(DatabaseError):  # the first error is reported
                cast(Any, self.steps).close()
        if self.running:
            facts = {"running": len(self.running), "grace": self.configuration.grace_seconds}
            self.journal.write("INFO", "stopping", **facts, hint="a second signal, or Ctrl-C, ends at once")
        while self.running and self.clock.boot() < limit:
            self.journal.paint(self.running.values(), math.inf)
            self.clock.wait(self.wakeups, min(1.0, limit - self.clock.boot()))
            self._collect()
            notify("WATCHDOG=1")
        for pool in (self.listers, self.pool):
            pool.shutdown(wait=False, cancel_futures=True)
        if self.cluster:
            self.cluster.shutdown()
        for claimed in [*self.running.values(), *self.hops]:
            lost = Result(Outcome.LOST, "the runner stopped", requests=int(claimed.permit is not None))
            # An attempt of a cluster goes on: its permit ends with its deadline.
            ended = dataclasses.replace(claimed, permit=None) if self.cluster else claimed
            self.unrecorded.append((ended, claimed.results(lost)))
        self.running.clear()
        self._sweep()
        self._collect()
        Inspector.ends_at = math.inf
        with contextlib.suppress(DatabaseError):
            with self.database.transaction() as sql:
                update = "update runner set stopped_at = ?, note = ? where pid = ? and stopped_at is null"
                sql.execute(update, (int(self.clock.wall()), self.stop_reason, os.getpid()))
            if self.journal.screen:
                self.journal.screen.paint(self.clock.wall(), [], None)
        self.journal.screen = None
        self.journal.write("INFO", "stop", reason=self.stop_reason)


# ---------------------------------------------------------------- Examples
# The reference of all keys, for people and as a JSON Schema, and texts for other programs, printed by `adce.py example
# NAME`. Headlines: explain(), json_schema(), EXAMPLES.

SYSTEMD_UNIT = """\
# Save as /etc/systemd/system/adce.service with a user and paths of your own, then: systemctl enable --now adce
# The folders of ReadWritePaths must exist. A scraper may need more: further ReadWritePaths, MemoryDenyWriteExecute=no
# for browsers and node, EnvironmentFile=FILE for the variables $NAME of adce.yaml.
[Unit]
Description=ADCE keeps the data lake complete
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=600
StartLimitBurst=10

[Service]
Type=notify
User={user}
WorkingDirectory={folder}
ExecStart={command} run
ReadWritePaths={writable}
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2 78
WatchdogSec=120
TimeoutStartSec=15min
TimeoutStopSec={stop_seconds}
KillMode=mixed
UMask=0077
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
KeyringMode=private
DevicePolicy=closed
{restrictions}

[Install]
WantedBy=multi-user.target
"""
RESTRICTIONS = """
    LockPersonality MemoryDenyWriteExecute NoNewPrivileges PrivateDevices PrivateTmp PrivateUsers ProtectClock
    ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables RemoveIPC
    RestrictNamespaces RestrictRealtime RestrictSUIDSGID
"""

# Rules for alerts: name, how long the condition lasts, summary, condition. The pauses of a source that is blocked are
# short and follow one another: it is paused for most of half an hour, twice in a row.
RULES = """
ADCEIsGone | 5m | ADCE does not answer | up{job="adce"} == 0 or absent(up{job="adce"})
ADCELoopIsStuck | 0m | the main loop of ADCE is stuck | time() - adce_runner_last_beat_timestamp_seconds > 180
ADCECyclesFail | 0m | no cycle has succeeded for a long time | \
time() - adce_cycle_last_success_timestamp_seconds > PATIENCE
ADCETasksGaveUp | 0m | {{ $value }} objects of {{ $labels.dataset }} gave up | \
sum by (dataset) (adce_tasks{state="gave_up"}) > 0
ADCEAttemptsFail | 15m | more than 10% of the attempts fail | \
sum(rate(adce_attempts_total{outcome!~"ok|not_yet|lost"}[1h])) > 0.1 * sum(rate(adce_attempts_total[1h]))
ADCESourceIsPaused | 30m | {{ $labels.scope }} has been paused for an hour | \
count_over_time(adce_paused_until_timestamp_seconds[30m]) \
> on (job, instance) group_left () 0.8 * count_over_time(up{job="adce"}[30m])
"""


def explain(wanted: str | None) -> str:
    """Kind, default and meaning of the key that `wanted` names, by its path or the end of it, and of those in it; else
    of each block. Raises Error for an unknown key."""
    settings, found = all_settings(), list[str]()
    path_of = r"\.".join(rf"({re.escape(word)}|\*)" for word in (wanted or "").split("."))
    for pattern in (rf"{path_of}(\.|$)", rf".+\.{re.escape(wanted)}(\.|$)") if wanted else (r"[^.]+$",):
        found = found or [path for path in settings if re.match(pattern, path)]
    if not found:
        names = [*settings, *(path.rpartition(".")[2] for path in settings)]
        raise Error(f'unknown key "{wanted}"{suggest(wanted or "", names)}', '"adce.py explain" lists the blocks')
    lines = []
    for path in found:
        one = settings[path]
        facts = [json_schema(one.declared)["title"]]
        if one.default is NEEDED:
            facts.append("required")
        elif isinstance(one.default, int | float | str | Path | dict) and one.default not in ("", {}):
            default = json.dumps(one.default, default=str).strip('"')
            facts.append(f"default {default}")
        if one.beside:
            facts.append(f"only beside {' or '.join(one.beside)}")
        lines += [path, f"    {'; '.join(facts)}", f"    {one.meaning}"]
    return "\n".join(lines)


def json_schema(declared: Any = Configuration) -> dict[str, Any]:
    """The JSON Schema (Draft 2020-12) of adce.yaml, or of a part of it. Rules between blocks are not in it."""
    shape, names, inner = shape_of(declared)
    if shape == "value":
        most = {"maximum": MOST} if inner.schema.get("type") in ("integer", "number") else {}
        return {"title": inner.expected, **most, **inner.schema}
    if shape != "block":
        item = json_schema(inner)
        title = f"a {shape}, each {item['title']}"
        several = {"title": title, "type": "array", "minItems": 1, "items": item}
        if shape == "mapping":
            several = {"title": title, "type": "object", "additionalProperties": item}
            if names not in (str, ONE_OR_MORE):
                several["propertyNames"] = {"enum": list(names)}
            elif "name" in (getattr(inner, "__slots__", ()) or ()):
                several["propertyNames"] = {"pattern": "^[^.]*$"}
        one_or_more = {"title": f"{item['title']}, or {title}", "anyOf": [item, several]}
        return one_or_more if names is ONE_OR_MORE else several

    def needs(when: Sequence[str], how: str, others: Sequence[str]) -> dict[str, Any]:
        return {"if": {"required": when}, "then": {how: [{"required": [name]} for name in others]}}

    known = settings_of(inner)
    rules = [needs([when] if when else [], "oneOf", group) for when, group in getattr(inner, "ONE_OF", ())]
    rules += [needs([], "anyOf", group) for group in [getattr(inner, "ANY_OF", ())] if group]
    rules += [needs([name], "anyOf", one.beside) for name, one in known.items() if one.beside]
    rules += [{"not": {"required": [name, other]}} for name, one in known.items() for other in one.against]
    return {
        **({"$schema": "https://json-schema.org/draft/2020-12/schema"} if inner is Configuration else {}),
        "title": "a mapping",
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, one in known.items() if one.default is NEEDED],
        "properties": {name: {**json_schema(one.declared), "description": one.meaning} for name, one in known.items()},
        "allOf": [{}, *rules],
    }


# Panels of the dashboard: title, unit, and expressions with the legends of their lines. Without one it is a number.
PANELS = """
Coverage | percentunit | sum(adce_objects{state="present"}) / sum(adce_objects) =>
Gave up | short | sum(adce_tasks{state="gave_up"}) or vector(0) =>
Conditions | short | adce_open_alerts =>
Since the last good cycle | s | time() - adce_cycle_last_success_timestamp_seconds =>
Since the last heartbeat | s | time() - adce_runner_last_beat_timestamp_seconds =>
Coverage by dataset | percentunit | sum by (dataset) (adce_objects{state="present"}) / \
sum by (dataset) (adce_objects) => {{dataset}}
Open tasks | short | sum by (dataset, state) (adce_tasks) => {{dataset}} {{state}}
Use of each limit | percentunit | adce_window_used_requests / adce_window_limit_requests => {{scope}} in {{seconds}} s
Remaining pause | s | adce_paused_until_timestamp_seconds - time() => {{scope}}
Attempts | cpm | sum by (outcome) (60 * rate(adce_attempts_total[15m])) => {{outcome}}
Seconds per attempt | s | rate(adce_attempt_seconds_total[15m]) / on (dataset) \
sum by (dataset) (rate(adce_attempts_total[15m])) => {{dataset}}
Stored | Bps | sum by (dataset) (rate(adce_stored_bytes_total[15m])) => {{dataset}}
Cycles | s | adce_cycle_duration_seconds => duration | rate(adce_cycles_total[1h]) * 3600 => per hour
"""


def grafana_dashboard(_: Configuration) -> str:
    """A dashboard of PANELS, three in a row; its data source is chosen at the top of the page."""
    source, panels = {"type": "prometheus", "uid": "${datasource}"}, []
    for number, text in enumerate(PANELS.strip().splitlines()):
        title, unit, *lines = text.split(" | ")
        targets = [
            {"refId": chr(65 + n), "datasource": source, "expr": expression, "legendFormat": legend.strip()}
            for n, (expression, _, legend) in enumerate(line.partition(" =>") for line in lines)
        ]
        kind = "stat" if text.endswith("=>") else "timeseries"
        panel = {"id": number + 1, "type": kind, "title": title, "datasource": source, "targets": targets}
        place = {"h": 8, "w": 8, "x": number % 3 * 8, "y": number // 3 * 8}
        defaults = {"unit": unit, "min": 0}
        panels.append({**panel, "gridPos": place, "fieldConfig": {"defaults": defaults, "overrides": []}})
    choice = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    dashboard = {"uid": "adce", "title": "ADCE", "schemaVersion": 39, "refresh": "1m", "panels": panels}
    shown = {"time": {"from": "now-24h", "to": "now"}, "templating": {"list": [choice]}}
    return json.dumps({**dashboard, **shown}, indent=2) + "\n"


def prometheus_rules(configuration: Configuration) -> str:
    """RULES, with the port and the pace of this installation."""
    import yaml

    patience = max(HOUR, 4 * round(configuration.interval_seconds))
    rules = [
        {"alert": name, "expr": condition, "for": duration, "annotations": {"summary": summary}}
        for name, duration, summary, condition in (line.split(" | ") for line in RULES.strip().splitlines())
    ]
    groups = yaml.safe_dump({"groups": [{"name": "adce", "rules": rules}]}, sort_keys=False, width=1000)
    return f"""\
# Rules for Prometheus: name this file in rule_files of prometheus.yml. Its scrape_configs need
# - {{job_name: adce, static_configs: [{{targets: ["127.0.0.1:{configuration.health_check.port}"]}}]}}
{groups.replace("PATIENCE", str(patience))}"""


def launchd_agent(configuration: Configuration) -> str:
    """A property list that makes macOS start the runner at login, and again when it fails."""
    import plistlib

    agent = {
        "Label": "adce",
        "ProgramArguments": [*own_command(configuration), "run", "--log", f"{configuration.database}.log"],
        "WorkingDirectory": str(configuration.path.parent),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ExitTimeOut": round(configuration.grace_seconds) + 60,
        "ProcessType": "Background",
        "Umask": 0o077,
    }
    path = "~/Library/LaunchAgents/adce.plist"
    hint = f"<!-- Save as {path}, then: launchctl bootstrap gui/$UID {path} -->"
    text = plistlib.dumps(agent, sort_keys=False).decode().expandtabs(2)
    return text.replace("\n", f"\n{hint}\n", 1)


def crontab_line(configuration: Configuration) -> str:
    """A line for crontab, quoted for the shell and for cron."""
    command = shlex.join(own_command(configuration)).replace("%", r"\%")
    return f"""\
# For `crontab -e`: cron mails what is printed. While a run still works, the next one exits at once. Lines NAME=value
# above it set the variables $NAME of adce.yaml.
*/15 * * * * {command} -q run --once --if-locked skip
"""


def systemd_unit(configuration: Configuration) -> str:
    """SYSTEMD_UNIT, with the user and the paths of this installation."""

    def quoted(word: str) -> str:
        text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        return f'"{text}"' if re.search(r"[^\w%$/.:=+@,-]", text) else text

    folders = {Path(os.path.normpath(configuration.database.parent))}
    if not configuration.store.startswith("s3://"):
        store = Path(os.path.normpath(configuration.store))
        folders |= {store} if folders.isdisjoint(store.parents) else set()
    return SYSTEMD_UNIT.format(
        command=" ".join(map(quoted, own_command(configuration))),
        folder=str(configuration.path.parent).replace("%", "%%"),
        writable=" ".join(quoted(str(folder)) for folder in sorted(folders)),
        user=os.getuid() or "adce",  # which may have no name
        stop_seconds=round(configuration.grace_seconds) + 60,
        restrictions="\n".join(f"{name}=yes" for name in RESTRICTIONS.split()),
    )


EXAMPLES = {
    "alerts": prometheus_rules,
    "cron": crontab_line,
    "grafana": grafana_dashboard,
    "launchd": launchd_agent,
    "systemd": systemd_unit,
}


# ---------------------------------------------------------------- Checks
# Is everything in order, and what would a run do? Headlines: check_rows(), trial().

# Faults of a database, and how many times each occurs.
CONSISTENCY = {
    "gaps without a task or open tasks without a gap": """
        select count(*) from objects
        where (state in ('missing', 'stale', 'suspect')) != (task is not null) and task is not 'running'
    """,
    "running tasks without an attempt": """
        select count(*) from objects o left join attempts a using (attempt_id)
        where o.task = 'running' and a.outcome is not 'running'
    """,
    "running attempts without a task": """
        select count(*) from attempts a
        where a.outcome = 'running' and not exists (select 1 from objects o where o.attempt_id = a.attempt_id)
    """,
    "objects with unreadable fields or an impossible day": """
        select count(*) from objects o
        where json_type(fields) != 'object' or exists (select 1 from json_each(o.fields) where type != 'text')
           or day is not date(day)
    """,
    "facts that are gone": "select 1 - count(*) from facts",
    "requested cycles with unknown options": """
        select count(*) from facts, json_each(wanted_cycle) option
        where (option.key, option.type) not in (
            values ('is_full', 'true'), ('is_full', 'false'), ('accept_loss', 'array')
        )
    """,
    "objects counted wrongly": """
        select coalesce(sum(abs(n)), 0) from (
            select sum(n) as n from (
                select dataset_id, coalesce(season, '') as season, state, coalesce(task, '') as task,
                       coalesce(priority, '') as priority, count(*) as n
                from objects group by 1, 2, 3, 4, 5
                union all
                select dataset_id, season, state, task, priority, -objects from counts)
            group by dataset_id, season, state, task, priority)
    """,
}
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "glusterfs", "sshfs")


def check_rows(configuration: Configuration, *, online: bool) -> Rows:
    """A row for each check, its result and details; `online` also connects to the sources."""
    sources, datasets = configuration.sources.values(), configuration.datasets
    pid = RunnerLock(configuration.database).holder()
    checks: dict[str, Callable[[], str]] = {
        "configuration": lambda: f"{configuration.path}, {len(sources)} sources, {len(datasets)} datasets",
        "disk": lambda: _check_disk(configuration.database.parent),
        "database": lambda: _check_database(configuration.database),
        "store": lambda: _check_store(configuration),
        "runner": lambda: "none" if pid is None else f"process {pid}",
        "programs": lambda: _check_programs(configuration),
        "environment": lambda: check_environment(configuration),
        "alerts": lambda: _check_alerts(configuration.alerts),
        "system": _check_system,
    }
    if configuration.pool:
        checks["pool"] = functools.partial(_check_pool, configuration.pool, configuration.store)
    if online:
        checks |= {f"source {one.name}": functools.partial(_check_source, one) for one in sources}
    rows = []
    for what, check in checks.items():
        try:
            rows.append({"result": "ok", "what": what, "details": check()})
        except (Error, OSError) as error:
            details = f"{error}; {hint}" if (hint := getattr(error, "hint", "")) else str(error)
            rows.append({"result": "FAIL", "what": what, "details": details})
    warnings = [*warnings_about(configuration)]
    with (
        contextlib.suppress(DatabaseError),  # that has a row of its own
        contextlib.closing(open_database(configuration.database, must_exist=True)) as database,
    ):
        demand = demand_above_limits(database, configuration, Clock().wall())
        warnings += [(f"source {name}", text) for name, text in demand.items()]
    return rows + [{"result": "warn", "what": what, "details": text} for what, text in warnings]


def _check_pool(address: str, store: str) -> str:
    cluster = Cluster(address, store, Clock(), lambda: None)
    text = f"{address}, {cluster.free_threads()} threads"
    cluster.shutdown()
    if cluster.problem:
        raise Error(cluster.problem, "see: adce.py explain pool")
    return text


def warnings_about(configuration: Configuration) -> Iterator[tuple[str, str]]:
    """Settings that are valid and may do harm: the subject, and the remedy."""
    for source in configuration.sources.values():
        about, headers = f"source {source.name}", {name.lower() for name in source.headers}
        if not configuration.rate_limiting.limits(source.name):
            yield about, "has no limits; see: adce.py explain rate_limiting"
        if source.base_url and "user-agent" not in headers:
            yield about, "has no header User-Agent; say who you are"
    blocks: list[Source | Dataset] = [*configuration.sources.values(), *configuration.datasets.values()]
    for block in blocks:
        about = f"{type(block).__name__.lower()} {block.name}"
        for name in plain_secrets(block.headers):
            yield about, f"{name} is in the file; put it into a variable, and $NAME in its place"
    for dataset in configuration.datasets.values():
        about, source = f"dataset {dataset.name}", configuration.sources[dataset.source]
        rules, children = dataset.validate, configuration.children_of(dataset.name)
        if dataset.url and not (needs_json(dataset, children) or rules.needs_content() or rules.min_bytes > 1):
            yield about, "has no validate: any response counts as its object, even a login page"
        for name in _unnamed_fields(dataset):
            yield about, f"its url does not name {{{name}}}: objects that differ in it have the same content"
        url = dataset.url.text if dataset.url and source.base_url and source.headers else ""
        if url.startswith("http") and origin_of(url) != origin_of(source.base_url):
            yield about, f"its url is not below base_url, but gets the headers of source {source.name}"
        if _has_unfinished_step(dataset):
            yield about, "its last step is fetched before it is over; see available_after and refetch_once_after"
    for place in (configuration.path, configuration.path.parent, Path(__file__).resolve(), configuration.database):
        with contextlib.suppress(OSError):
            mode = place.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                yield "permissions", f"{place} is writable for every account; chmod o-w {place}"
    if os.geteuid() == 0:
        yield "permissions", "runs as root; a dedicated user is enough"


def _has_unfinished_step(dataset: Dataset) -> bool:
    """Whether a step may be fetched before it is over, and never again."""
    dates, is_settled = dataset.partitions.dates, dataset.available_after or dataset.freshness != Freshness()
    if not dates or is_settled or isinstance(dates.last, datetime.date):
        return False
    return dates.last != "yesterday" or dates.every not in ("hour", "day")


def _unnamed_fields(dataset: Dataset) -> list[str]:
    """The fields that distinguish objects of a dataset, but not their requests."""
    if not dataset.url:
        return []
    parts, named = dataset.partitions, fields_in(dataset.url.text, dataset.body)
    groups = [["date"] * bool(parts.dates), ["season", "end"] * bool(parts.seasons), [*parts.id_fields()]]
    groups += [[name] for name, values in parts.values.items() if len(values) > 1]
    return [group[0] for group in groups if group and named.isdisjoint(group)]


def _check_disk(folder: Path) -> str:
    kind, real = "unknown file system", folder.resolve()
    with contextlib.suppress(OSError, ValueError):  # no /proc, or no such mount in it
        mounts = [line.split() for line in (PROC / "self/mounts").read_text(errors="replace").splitlines()]
        kind = max((len(place), name) for _, place, name, *_ in mounts if real.is_relative_to(place))[1]
    if kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse."):
        raise Error(f"{folder} is on {kind}, where SQLite's locks may not work", "keep the database on a local disk")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise Error(f"{folder} has {free >> 20} MB left", "free some disk space")
    return f"{folder}, {kind}, {free >> 20} MB free"


def _check_database(path: Path) -> str:
    if not path.exists() or not path.stat().st_size:
        return f"{path}, will be created on first run"
    with contextlib.closing(open_database(path, must_exist=True)) as database:
        found = database.check()
        found += [f"{count} {what}" for what, sql in CONSISTENCY.items() if (count := database.value(sql))]
        if found:
            raise DatabaseError(f"{path}: {'; '.join(found[:5])}", DAMAGE_HINT)
    return f"{path}, intact, SQLite {sqlite3.sqlite_version}"


@contextlib.contextmanager
def blaming_contents(path: Path) -> Iterator[None]:
    """An error that comes of what another program has written into the database says so."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        _check_database(path)
        raise  # a mistake of ADCE


def _check_store(configuration: Configuration) -> str:
    store = open_store(configuration.store)
    if isinstance(store, FolderStore):
        with (
            contextlib.suppress(DatabaseError),  # that has a row of its own
            contextlib.closing(open_database(configuration.database, must_exist=True)) as database,
        ):
            require_known_store(database, configuration, store)
        there = next(folder for folder in (store.root, *store.root.parents) if folder.exists() or folder.is_symlink())
        if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
            raise StoreError(f"{there} is not a writable folder", "see `store:` in adce.yaml")
        if there != store.root:
            return f"{configuration.store}, will be created on first run"
    first = next(iter(store.list("")), None)
    return f"{configuration.store}, {'not empty' if first else 'empty'}"


def _check_programs(configuration: Configuration) -> str:
    """Whether the programs of each `command` exist; none is run."""
    words = {dataset.command[0].text for dataset in configuration.datasets.values() if dataset.command}
    words |= set(configuration.alerts.command[:1])
    for word in sorted(word for word in words if "{" not in word):
        if not shutil.which(configuration.path.parent / word if "/" in word else word):
            raise Error(f"program {word} not found", "see `command` in adce.yaml")
    return ", ".join(sorted(words)) or "none"


def check_environment(configuration: Configuration) -> str:
    """Whether the variables that requests hold are there. Raises ConfigurationError."""
    held = frozenset[str]().union(*(one.secrets for one in configuration.datasets.values()))
    names = sorted(name for name in held if not name.startswith("="))
    if missing := [f"${name}" for name in names if name not in os.environ]:
        raise ConfigurationError(f"not in the environment: {', '.join(missing)}", "set it where the runner starts")
    for dataset in configuration.datasets.values():
        for name, text in {**configuration.sources[dataset.source].headers, **dataset.headers}.items():
            if UNSENDABLE.search(from_environment(text)):
                problem = f"the header {name} of {dataset.name} holds a character that cannot be sent"
                raise ConfigurationError(problem, "only letters of ASCII and Latin-1 can be in a header, in one line")
    return ", ".join(f"${name}" for name in names) or "no variable is needed"


def _check_alerts(alerts: Alerts) -> str:
    """Whether the channels have addresses; nothing is sent, and no address is shown."""
    for channel in ("webhook", "ping"):
        try:
            parts = urllib.parse.urlsplit(from_environment(getattr(alerts, channel) or "http://none"))
            is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_http = False
        if not is_http:
            raise Error(f"{channel} is not an http address", "see `alerts:` in adce.yaml")
    return ", ".join(name for name in settings_of(Alerts) if getattr(alerts, name)) or "no alert channel configured"


def _check_system() -> str:
    """Which facilities of Linux are replaced here, and how well."""
    substitutes = {
        "limits do not see suspended time and last longer": hasattr(time, "CLOCK_BOOTTIME"),
        "a reboot is noticed by its boot time only": (PROC / "sys/kernel/random/boot_id").exists(),
        "programs left behind are found by ps": (PROC / "self/environ").exists(),
        "file systems are not known": (PROC / "self/mounts").exists(),
    }
    return "; ".join([sys.platform, *(text for text, is_native in substitutes.items() if not is_native)])


def _check_source(source: Source) -> str:
    """Whether a source accepts a connection, with TLS as a request begins it; no request is sent."""
    import ssl

    import requests

    parts = urllib.parse.urlsplit(from_environment(source.base_url))
    if not parts.hostname:
        return "no base_url"
    opened = requests.Session()
    opened.trust_env = source.trust_env
    try:
        with socket.create_connection((parts.hostname, parts.port or parts.scheme), timeout=5) as connection:
            if parts.scheme == "https":
                chosen: Any = opened.merge_environment_settings(parts.geturl(), {}, None, None, None)["verify"]
                known = Path(requests.utils.DEFAULT_CA_BUNDLE_PATH if chosen is True else chosen)
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.load_verify_locations(*((None, known) if known.is_dir() else (known,)))
                context.wrap_socket(connection, server_hostname=parts.hostname).close()
    except OSError as error:
        problem = "TLS failure" if isinstance(error, ssl.SSLError) else "cannot be reached"
        raise Error(f"{parts.hostname} {problem}: {error.strerror or error}") from error
    return f"{parts.hostname} is reachable"


def example_fields(database: Database, configuration: Configuration, dataset: Dataset, given: Fields) -> dict[str, str]:
    """The fields of an object of a dataset: the given ones, else those of a known object. Raises Error for none."""
    known = """select fields from objects join datasets using (dataset_id)
               where dataset = ? and state != 'dropped' order by etag is null, task is null limit 1"""
    fields = json.loads(database.value(known, (dataset.name,)) or "{}")
    if not fields and not dataset.partitions.parents:
        fields = next(expand(dataset, Clock().wall()), fields)
    fields = {**(FIRST_PAGE if dataset.pages else {}), **fields, **given}
    if lacking := sorted(configuration.fields_of(dataset.name) - fields.keys()):
        raise Error(f"no value for {', '.join(lacking)}", f"adce.py try {dataset.name} {lacking[0]}=VALUE")
    return cast(dict[str, str], fields)


def try_request(configuration: Configuration, dataset: Dataset, fields: Fields) -> list[Section]:
    """The answer to one request of a dataset, sent under its limits, and its meaning. Nothing is kept."""
    if not dataset.url:
        raise Error(f"{dataset.name} has no url", "run its program by itself")
    source = configuration.sources[dataset.source]
    try:
        key = expected_object(dataset, fields).key
    except ValueError as error:
        raise Error(str(error), f"adce.py try {dataset.name} FIELD=VALUE") from error
    if problem := address_problem(source, dataset, fields):
        raise Error(problem)
    task, children = ObjectRow(key=key, fields_json=json.dumps(fields)), configuration.children_of(dataset.name)
    claimed = Claim(dataset, source, (task,), tuple(children), url=url_of(source, dataset, fields))
    with tempfile.TemporaryDirectory() as folder, permit(source.name) as held:
        store = FolderStore(Path(folder))
        store.sweep()
        result = request(claimed, store, Clock())[0]
        if result.http_status:
            held.answered(result.http_status, result.headers or {})
        else:
            held.failed(result.outcome, result.error or "")
    if result.headers is None:
        raise Error(f"{dataset.name}: {result.error}", "adce.py check --online")
    outcome = Outcome.HTTP_ERROR if result.redirect else result.outcome
    found, size = result.inspection or Inspection(), result.stored.size if result.stored else None
    facts = {"key": key, "url": claimed.url, "status": result.http_status, "bytes": size, "outcome": outcome}
    facts |= {"is_final": found.settled, "error": result.error}
    ids = [{"expression": one, "ids": len(ids), "first": next(iter(ids), None)} for one, ids in found.mentions.items()]
    headers = [{"header": name, "value": redacted(text, dataset.secrets)} for name, text in result.headers.items()]
    return [
        Section("answer", "Answer", [facts], is_one=True),
        Section("ids", "Ids that it names", ids),
        Section("headers", "Headers", headers),
    ]


def unexpected_objects(store: Store, database: Database) -> Iterator[dict[str, Any]]:
    """The stored objects that no dataset expects."""
    known = "select key from objects where key in (select value from json_each(?)) and state != 'dropped'"
    for page in chunks(store.list(""), CHUNK):
        expected = {row[0] for row in database.read(known, (json.dumps([entry.key for entry in page]),))}
        for entry in page:
            if entry.key not in expected:
                yield {"key": entry.key, "bytes": entry.size, "modified_at": utc_text(entry.modified_at)}


@contextlib.contextmanager
def trial(configuration: Configuration) -> Iterator[tuple[Database, Store]]:
    """A copy of the database, to try on what becomes of it, and the store, which is only read."""
    store = open_store(configuration.store)
    with contextlib.ExitStack() as stack:
        if configuration.database.exists():
            database = stack.enter_context(contextlib.closing(open_database(configuration.database))).copy()
        else:
            database = memory_database()
        require_known_store(database, configuration, store)
        if isinstance(store, FolderStore) and not store.root.exists():  # the first run makes it
            store = FolderStore(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        yield database, store


# ---------------------------------------------------------------- Command line
# From words to a command, and to an exit code. Headlines: command(), main().

Arguments = argparse.Namespace
Act = Callable[[Arguments, Configuration], int | None]  # returns an exit code; None: done
Option = tuple[tuple[str, ...], Mapping[str, Any]]  # as add_argument() takes it


class Command(NamedTuple):
    """One command: the function that does it, whose docstring is the help, and its options."""

    name: str
    act: Act
    options: tuple[Option, ...]
    needs: str  # "configuration", "database" (works in spite of a mistake in adce.yaml) or "nothing"


def option(*names: str, **settings: Any) -> Option:
    """Declare one argument of a command."""
    return names, settings


def command(*options: Option, needs: str = "configuration") -> Callable[[Act], Command]:
    """Make a function `command_NAME` the command NAME."""
    return lambda act: Command(act.__name__.removeprefix("command_"), act, options, needs)


def commands() -> dict[str, Command]:
    """The commands of this module by name, in the order of their definition."""
    return {value.name: value for value in globals().values() if isinstance(value, Command)}


def _kind(name: str, read: Callable[[str], Any], is_good: Callable[[Any], bool] = lambda _: True) -> Any:
    """The type of an argument: what `read` makes of a text, if it is good."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = read(text)
            if is_good(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}")

    return parse


POSITIVE = _kind("a number above 0", float, lambda value: 0 < value < math.inf)
COUNT = _kind("a number from 1 up", int, lambda value: 0 < value < 1 << 63)
DURATION = _kind("a duration; write 90s, 15m, 6h or 1d", parse_duration)
PATH = _kind("a path", lambda text: Path(text).absolute())
EVERYWHERE = (
    option("-c", "--config", metavar="FILE", help="else $ADCE_CONFIG, ./adce.yaml, the adce.yaml beside adce.py"),
    option("--db", metavar="FILE", help="else $ADCE_DB, the configured database"),
    option("--format", choices=FORMATS, help="of data on stdout (table)"),
    option("-q", "--quiet", action="store_true", help="print only data and errors"),
    option("-v", "--verbose", action="store_true", help="log every attempt"),
)
FILTERS = (option("--source", help="only this source"), option("--dataset", help="only this dataset"))
A_DAY = _kind("a day; write 2024-12-15", lambda text: datetime.date.fromisoformat(text).isoformat())
TASK_OPTIONS = (
    *FILTERS,
    option("--day", type=A_DAY, metavar="2024-12-15", help="only objects of this day"),
    option("--error", metavar="TEXT", help="only those whose last error contains TEXT"),
)
SCOPE = option("scope", metavar="SOURCE", help="a source, or global for all")
TIMEOUT = option("--timeout", type=DURATION, metavar="45s", help="how long to wait for its end (grace_seconds + 15)")
LIMIT = option("--limit", type=COUNT, default=20, metavar="N", help="at most N rows (20)")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests the nearest choice, as Python 3.14 does."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = suggest(value, action.choices) or f" (choose from {', '.join(action.choices)})"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{near}")


def build_parser(words: Sequence[str] = ()) -> Parser:
    """The parser of the commands among `words`, or of all; the common options may stand before or after a command."""
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for names, settings in EVERYWHERE:
        common.add_argument(*names, **settings)
    description = (__doc__ or "").partition("\n")[0]
    parser = Parser(prog="adce.py", description=description, parents=[common], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ADCE {__version__}, SQLite {sqlite3.sqlite_version}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    known = commands()
    for name in known.keys() & words or known:
        each, meaning = known[name], (known[name].act.__doc__ or "").removesuffix(".")
        sub = subparsers.add_parser(name, help=meaning, description=meaning, parents=[common], allow_abbrev=False)
        for names, settings in each.options:
            sub.add_argument(*names, **settings)
        sub.set_defaults(chosen=each)
    return parser


COMPLETIONS = {
    "completion": """\
# For bash and zsh: source <(adce.py example completion)
if [ -n "$ZSH_VERSION" ]; then
    whence compdef > /dev/null || {{ autoload -U compinit && compinit -C; }}
    autoload -U bashcompinit && bashcompinit
fi
_adce() {{
    COMPREPLY=($({program} complete "${{COMP_WORDS[@]:1:COMP_CWORD}}"))
}}
complete -o default -F _adce adce.py
""",
    "completion-fish": """\
# For fish: adce.py example completion-fish > ~/.config/fish/completions/adce.py.fish
function _adce
    {program} complete (commandline -opc)[2..] (commandline -ct)
end
complete -c adce.py -a '(_adce)'
""",
}


def completions(words: Sequence[str]) -> list[str]:
    """The commands, or the options and choices of the command or option before it, that begin like the last word."""
    *before, last = words
    chosen = next((each for name, each in commands().items() if name in before), None)
    options = [*EVERYWHERE, *(chosen.options if chosen else ())]
    valued = {names[-1]: settings for names, settings in options if settings.get("action") != "store_true"}
    found: Iterable[str] = commands()
    if before and before[-1].startswith("-") and before[-1] in valued:
        found = valued[before[-1]].get("choices", ())
    elif chosen:
        positional = [choice for names, more in options if names[0][0] != "-" for choice in more.get("choices", ())]
        found = [*positional, *(names[-1] for names, _ in options if names[-1].startswith("-"))]
    return [word for word in found if word.startswith(last)]


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Parse a command line; `--` begins the program of acquire, which is not parsed. Exits on wrong usage."""
    end = words.index("--") if "--" in words else len(words)
    parser = build_parser(words[:end])
    defaults = Arguments(config=None, db=None, format="table", quiet=False, verbose=False)
    arguments = parser.parse_args(words[:end], defaults)
    arguments.program = words[end + 1 :]
    if arguments.program and arguments.command != "acquire":
        parser.error("only acquire runs another program")
    return arguments


def _existing(configuration: Configuration) -> Database:
    return open_database(configuration.database, must_exist=True)


RED, GREEN, YELLOW = 31, 32, 33  # of SGR, ECMA-48
COLOURS = {"x": RED, "!": YELLOW, "ATTENTION": YELLOW, "FILLING": YELLOW, "COMPLETE": GREEN}


def coloured(text: str) -> str:
    """A text with its marks in colour, for a terminal that wants that (https://no-color.org)."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    marks = f"^ *({'|'.join(COLOURS)})(?= )"
    return re.sub(marks, lambda found: f"\x1b[{COLOURS[found[1]]}m{found[0]}\x1b[0m", text, flags=re.MULTILINE)


def _print(arguments: Arguments, sections: Sequence[Section]) -> None:
    if arguments.format == "csv" and hasattr(arguments, "table") and len(sections) > 1:
        names = ", ".join(part.name for part in sections)
        raise Error("csv holds one table", f"adce.py report TABLE --format csv, of {names}")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    text = render(sections, arguments.format, width)
    print(coloured(text) if arguments.format == "table" else text)


def print_result(arguments: Arguments, text: str, **facts: Any) -> None:
    """The result of a command: a sentence, or its facts in the chosen format."""
    if not arguments.quiet:
        print(text if arguments.format == "table" else render([Section("done", "", [facts], True)], arguments.format))


def configured(arguments: Arguments, needs: str = "configuration") -> Configuration:
    """The configuration of a command line, with the database that it names. When the database is all that it needs,
    a mistake in adce.yaml does no harm."""
    path, given = find_configuration(arguments.config), arguments.db or os.environ.get("ADCE_DB")
    database = Path(given).absolute() if given else None
    try:
        configuration = load_configuration(path)
    except ConfigurationError:
        database = database or database_named_in(path)
        if needs != "database" or not database.exists():
            raise
        print(f"adce.py: {path} cannot be used (see adce.py check); using {database}", file=sys.stderr)
        configuration = Configuration(path, store="")
    return dataclasses.replace(configuration, database=database or configuration.database)


def _check_names(arguments: Arguments, configuration: Configuration) -> None:
    """A misspelt name must not look like one that has nothing to show."""
    sources, datasets = configuration.sources, configuration.datasets
    known = {"scope": {*sources, GLOBAL}, "source": sources, "dataset": datasets, "accept_loss": datasets}
    for place, names in known.items():
        given = getattr(arguments, place, None) or []
        for name in [given] if isinstance(given, str) else given:
            if name not in names:
                what = "dataset" if names is datasets else "source"
                raise Error(f'{what} "{name}" is not defined{suggest(name, names)}')


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it came closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal's encoding lacks becomes ?
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["call"] and "ADCE_OUTPUT" in os.environ:  # internal: the program of a dataset's call
        return call_function(words[1:])
    if words[:1] == ["complete"]:  # internal: for the shell
        print("\n".join(completions(words[1:] or [""])))
        return ExitCode.DONE
    arguments = parse_arguments(words)
    try:
        configuration = Configuration()
        if arguments.chosen.needs != "nothing":
            configuration = configured(arguments, arguments.chosen.needs)
            require_own_files(configuration.database)
            quarantine_stale_wal(configuration.database)
            _check_names(arguments, configuration)
        with blaming_contents(configuration.database):
            code = arguments.chosen.act(arguments, configuration) or ExitCode.DONE
        sys.stdout.flush()
    except Error as error:
        with contextlib.suppress(OSError):  # stderr may be closed
            text = f"{'' if isinstance(error, ConfigurationError) else 'adce.py: '}{error}"
            hint = f"Try: {error.hint}".replace("Try: see ", "See ")
            print(printable(f"{text}\n{hint}" if error.hint else text), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        with contextlib.suppress(OSError):  # the final flush must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            return ExitCode.DONE
        print(printable(f"adce.py: {error}"), file=sys.stderr)
        return ExitCode.ERROR
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return code


def leave(status: int) -> NoReturn:
    """End the process; sys.exit() would wait for requests that outlast the grace time."""
    sys.stderr.flush()
    os._exit(status)


# ---------------------------------------------------------------- Commands
# One function for each command. Data go to stdout, everything else to stderr.


@command(LIMIT)
def command_plan(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show what a run would do: a cycle on a copy of the database, which is thrown away."""
    clock = Clock()
    with trial(configuration) as (database, store):
        before = dict(map(tuple, database.read(FRAGMENTS["EXPECTED"])))
        declare(database, configuration, clock)
        options = CycleOptions(is_full=True)
        cycle_id = run_cycle(show_progress(reconcile(database, configuration, store, clock, options), database, clock))
        is_once, most = getattr(arguments, "once", False), getattr(arguments, "limit", 20)  # run has no --limit
        with database.transaction() as sql:
            if RunnerLock(configuration.database).holder() is None:
                requeue_orphans(sql, configuration.retry)
            while advance(Ledger(sql, configuration, clock.wall())):
                pass
            if is_once:
                wake_failed(sql)
    error = database.value("select error from cycles where cycle_id = ?", (cycle_id,))
    workers = workers_json(configuration)
    _print(arguments, answers(database, PLAN, most=most, before=json.dumps(before), workers=workers))
    if error:
        print(printable(f"adce.py: the cycle failed: {error}"), file=sys.stderr)
    return ExitCode.ERROR if error else ExitCode.DONE


@command(
    option("--once", action="store_true", help="one cycle, one attempt at each task that is due; exit 3: gaps left"),
    option("--dry-run", action="store_true", help="the same as plan"),
    option("--interval-minutes", type=POSITIVE, metavar="N", help="between cycles"),
    option("--interval-hours", type=POSITIVE, metavar="N", help="older form of --interval-minutes"),
    option("--max-minutes", type=POSITIVE, metavar="N", help="stop cleanly after N minutes"),
    option("--max-wait", type=DURATION, default=MINUTE, metavar="60s", help="the longest pause --once waits for"),
    *FILTERS,
    option("--if-locked", choices=("fail", "skip"), default="fail", help="skip: exit 0, silent, if another runs"),
    option("--log", type=PATH, metavar="FILE", help="log to FILE, 20 MB at most, instead of stderr"),
)
def command_run(arguments: Arguments, configuration: Configuration) -> int | None:
    """Keep the lake complete until stopped."""
    minutes = arguments.interval_minutes or (arguments.interval_hours or 0) * 60
    if minutes:
        configuration = dataclasses.replace(configuration, interval_seconds=minutes * MINUTE)
    if arguments.dry_run:
        return command_plan.act(arguments, configuration)
    check_environment(configuration)
    database, lock = open_database(configuration.database), RunnerLock(configuration.database)
    try:
        lock.acquire()
    except LockedError:
        if arguments.if_locked == "skip":
            return ExitCode.DONE
        raise
    level = "ERROR" if arguments.quiet else "DEBUG" if arguments.verbose else "INFO"
    journal = Journal(log_file(arguments.log) if arguments.log else sys.stderr, level)
    # adce.session() in this process and its children uses this configuration
    os.environ.update(ADCE_CONFIG=str(configuration.path), ADCE_DB=str(configuration.database))
    runner = Runner(configuration, database, open_store(configuration.store), journal)
    if not (arguments.log or arguments.quiet) and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        journal.screen = LiveScreen(sys.stderr, database, configuration)
    runner.datasets = [
        one.name
        for one in configuration.datasets.values()
        if arguments.dataset in (None, one.name) and arguments.source in (None, one.source)
    ]
    obey_signals(configuration.database, runner.stop)
    with contextlib.ExitStack() as stack:
        address = None
        if configuration.health_check.enabled and not arguments.once:
            try:
                health = HealthServer(configuration, database, runner.clock, lambda: journal.database_error)
                address = f"http://127.0.0.1:{health.start()}/"
                stack.callback(health.stop)
                journal.write("INFO", "health", address=address)
            except Error as error:  # the port is taken
                journal.write("WARN", "health", error=str(error), hint=error.hint)
        alerter = Alerter(configuration, database, journal, runner.clock)
        if not arguments.once:
            alerter.start()
        stack.callback(alerter.stop)
        code = runner.run(
            once=arguments.once,
            max_seconds=(arguments.max_minutes or math.inf) * MINUTE,
            max_wait=arguments.max_wait,
            address=address,
            log=arguments.log,
        )
        if arguments.once:
            alerter.work()
    database.close()
    return code


@command(
    option("--full", action="store_true", help="list the whole store, not only a share of it"),
    option("--accept-loss", action="append", default=[], metavar="DATASET", help="open the gaps of a mass loss"),
    option("--unexpected", action="store_true", help="only list the objects that no dataset expects"),
)
def command_reconcile(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Run one cycle, by the runner if one works, and show what it found; nothing is fetched."""
    if arguments.unexpected:
        rows = list(unexpected_objects(open_store(configuration.store), _existing(configuration)))
        _print(arguments, [Section("unexpected", "Objects that no dataset expects", rows)])
        return ExitCode.DONE
    database, lock = open_database(configuration.database), RunnerLock(configuration.database)
    options = CycleOptions(arguments.full, arguments.accept_loss)
    try:
        lock.acquire()
        clock, store = Clock(), open_store(configuration.store)
        prepare_store(database, configuration, store)
        declare(database, configuration, clock)
        cycle_id = run_cycle(show_progress(reconcile(database, configuration, store, clock, options), database, clock))
    except LockedError:
        if lock.holder() != database.value("select pid from runner where stopped_at is null"):
            raise  # another reconcile
        cycle_id = cycle_of_runner(database, configuration, lock, options)
    rows = query(database, "select * from cycles where cycle_id = ?", (cycle_id,))
    _print(arguments, [Section("cycle", "Cycle", rows, is_one=True)])
    if rows[0]["error"]:
        return ExitCode.ERROR
    return ExitCode.GAPS_LEFT if any(rows[0][kind] for kind in GAPS) else ExitCode.DONE


@command(option("file", type=PATH, metavar="FILE", help="a new file"), needs="database")
def command_backup(arguments: Arguments, configuration: Configuration) -> None:
    """Copy the database, also while the runner works."""
    with contextlib.closing(_existing(configuration)):
        back_up(configuration.database, arguments.file)
    facts = {"file": str(arguments.file), "bytes": arguments.file.stat().st_size}
    print_result(arguments, f"{arguments.file} holds {facts['bytes']:,} bytes and was checked", **facts)


@command()
def command_start(arguments: Arguments, configuration: Configuration) -> None:
    """Start the runner in the background."""
    log = configuration.database.with_name(f"{configuration.database.name}.log")
    number = start_runner(configuration, ["--verbose"] if arguments.verbose else [], log)
    address = _existing(configuration).value("select address from runner")
    text = f"process {number} started, log {log}" + (f", serving {address}" if address else "")
    print_result(arguments, text, started=number, log=str(log), address=address)


@command(TIMEOUT, needs="database")
def command_stop(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Stop the runner and wait for its end; exit 4 when there is none."""
    number = stop_runner(configuration, arguments.timeout)
    text = "no runner works on this database" if number is None else f"process {number} stopped"
    print_result(arguments, text, stopped=number)
    return ExitCode.NOT_RUNNING if number is None else ExitCode.DONE


@command(TIMEOUT)
def command_restart(arguments: Arguments, configuration: Configuration) -> None:
    """Stop the runner, if there is one, and start it with the current configuration."""
    if RunnerLock(configuration.database).holder() is not None:
        unit = _existing(configuration).value("select unit from runner")
        if unit:
            name = unit.rpartition("/")[2]
            raise Error(f"the runner belongs to the unit {name} of systemd", f"systemctl restart {name}")
        stop_runner(configuration, arguments.timeout)
    command_start.act(arguments, configuration)


@command(
    SCOPE,
    option("--for", dest="seconds", type=DURATION, metavar="2h", help="else until it is resumed"),
    option("--reason", default="", metavar="TEXT", help="shown in status"),
)
def command_pause(arguments: Arguments, configuration: Configuration) -> None:
    """Pause a source for some time, or until it is resumed."""
    database, clock, scope = open_database(configuration.database), Clock(), arguments.scope
    with database.transaction() as sql:
        declare_limits(sql, configuration, clock)
        pause_source(sql, scope, arguments.seconds, arguments.reason, clock.boot())
    until = database.value("select blocked_until from rates where scope = ?", (scope,)) or utc_text(clock.wall())
    facts = {"paused": scope, "until": None if arguments.seconds is None else until}
    text = f"{scope} is paused until {facts['until'] or 'it is resumed'}; running attempts may finish"
    print_result(arguments, text, **facts)


@command(SCOPE)
def command_resume(arguments: Arguments, configuration: Configuration) -> None:
    """Lift a pause, whatever its cause, and retry at once what has failed."""
    database, clock, scope = open_database(configuration.database), Clock(), arguments.scope
    with database.transaction() as sql:
        declare_limits(sql, configuration, clock)
        was_paused, count = resume_source(sql, scope, clock.boot())
    text = f"{scope} resumed" if was_paused else f"{scope} was not paused"
    text += f"; {count} waiting task{'s' * (count != 1)} will be retried now" if count else ""
    print_result(arguments, text, resumed=scope, was_paused=was_paused, retried=count)


@command(
    option("task_ids", type=COUNT, nargs="*", metavar="ID"),
    option("--state", choices=(TaskState.RETRY.value, TaskState.GAVE_UP.value)),
    *TASK_OPTIONS,
    option("--yes", action="store_true", help="do not ask for confirmation"),
)
def command_retry(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Retry waiting and given-up tasks now: those named, or all that match the filters."""
    database = _existing(configuration)
    tasks = tasks_to_retry(database, vars(arguments), arguments.task_ids)
    if missing := sorted({*arguments.task_ids} - {*tasks}):
        raise Error(f"not in state retry or gave_up: {', '.join(map(str, missing))}", "adce.py task ID")
    if not tasks:
        print_result(arguments, "no task in state retry or gave_up matches", retried=0)
        return ExitCode.DONE
    is_wanted = arguments.task_ids or arguments.yes
    if not is_wanted and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"Retry {len(tasks)} tasks now? [y/N] ", end="", file=sys.stderr, flush=True)
        is_wanted = sys.stdin.readline().strip().lower() in ("y", "yes")
    if not is_wanted:
        print(f"adce.py: {len(tasks)} tasks match; nothing was done\nTry: --yes", file=sys.stderr)
        return ExitCode.USAGE
    with database.transaction() as sql:
        count = retry_tasks(Ledger(sql, configuration, Clock().wall()), tasks)
    text = f"{count} task{'s' * (count != 1)} will be retried as soon as possible"
    print_result(arguments, text, retried=count)
    return ExitCode.DONE


@command(
    option("task_ids", type=COUNT, nargs="+", metavar="ID"),
    option("--reason", default="excluded by the operator", metavar="TEXT", help="shown in the view objects_now"),
)
def command_skip(arguments: Arguments, configuration: Configuration) -> None:
    """Exclude the objects of these tasks until they are retried."""
    database = _existing(configuration)
    with database.transaction() as sql:
        skipped = skip_tasks(Ledger(sql, configuration, Clock().wall()), arguments.task_ids, arguments.reason)
        if missing := sorted(set(arguments.task_ids) - set(skipped)):
            raise Error(f"not open: {', '.join(map(str, missing))}", "adce.py tasks")
    what = "1 object" if len(skipped) == 1 else f"{len(skipped)} objects"
    print_result(arguments, f"{what} excluded; undo with: adce.py retry ID", skipped=len(skipped))


@command(
    option("source", metavar="SOURCE"),
    option("--wait", type=DURATION, metavar="90s", help="give up after this time with exit 1"),
)
def command_acquire(arguments: Arguments, configuration: Configuration) -> int:
    """Wait until a source can be asked once, then run the program after `--`, which sends the request."""
    limiter = Limiter(configuration, open_database(configuration.database))
    held = limiter.acquire(arguments.source, arguments.wait)
    if not (arguments.program or arguments.quiet):
        print(f"{arguments.source}: one request is permitted within {SEND_WITHIN_SECONDS} s", file=sys.stderr)
    return run_held(limiter, held, arguments.program) if arguments.program else ExitCode.DONE


@command(
    option("table", nargs="?", choices=["verdict", *(one.name for one in REPORT)], help="only this table"),
    option("--since", type=DURATION, default=DAY, metavar="24h", help="how far back attempts count"),
)
def command_report(arguments: Arguments, configuration: Configuration) -> None:
    """Show what is wrong, coverage, queue, attempts, limits and cycles."""
    database, now = _existing(configuration), Clock().wall()
    if arguments.format == "html" and not arguments.table:
        print(page(database, configuration, now))
        return
    report = answers(database, REPORT, since=now - arguments.since, span=format_duration(arguments.since))
    sections = [verdict(database, configuration, now), *report]
    _print(arguments, [part for part in sections if arguments.table in (None, part.name)])


@command(needs="database")
def command_status(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show the state of runner, lake, tasks and sources; exit 4 when no runner works."""
    database, lock = _existing(configuration), RunnerLock(configuration.database)
    if arguments.format == "table":
        lines = status_lines(database, configuration, Clock().wall())
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        print(coloured("\n".join(cut(line, width) for line in lines)))
    else:
        _print(arguments, status_sections(database, configuration, Clock().wall()))
    return ExitCode.DONE if lock.holder() is not None else ExitCode.NOT_RUNNING


@command(needs="database")
def command_health(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show whether the runner is healthy; exit 4 when it is unhealthy, or when there is none."""
    database, clock, found = _existing(configuration), Clock(), {"not running": "no runner works on this database"}
    state = runner_state(database, RunnerLock(configuration.database), now := clock.wall())["runner"]
    if state in AT_WORK:
        since = now - HOUR if state == "running" else now
        found = write_problem(database, clock) or problems(database, configuration, now, since)
    judged = {"status": "unhealthy" if found else "healthy", "timestamp": utc_text(now)}
    _print(arguments, [Section("health", "", [{**judged, "problems": "; ".join(found.values())}], is_one=True)])
    return ExitCode.NOT_RUNNING if found else ExitCode.DONE


@command(
    option("--tail", type=COUNT, default=50, metavar="N", help="the last N lines (50)"),
    option("--follow", action="store_true", help="and new ones as they come"),
    needs="database",
)
def command_logs(arguments: Arguments, configuration: Configuration) -> None:
    """Show the last log lines of the runner, or follow them."""
    show_log(_existing(configuration), arguments.tail, follow=arguments.follow)


@command(
    option("--state", choices=["pending", "retry", "running", "gave_up"]),
    *TASK_OPTIONS,
    option("--key", metavar="KEY", help="only those whose key contains KEY, or matches it with * and ?"),
    LIMIT,
)
def command_tasks(arguments: Arguments, configuration: Configuration) -> None:
    """List the open tasks, the most urgent first."""
    _print(arguments, tasks_sections(_existing(configuration), vars(arguments), arguments.limit))


@command(option("task", metavar="ID|KEY"))
def command_task(arguments: Arguments, configuration: Configuration) -> None:
    """Show one task with all its attempts."""
    _print(arguments, task_sections(_existing(configuration), arguments.task))


@command(
    *FILTERS,
    option("--by-day", action="store_true", help="by dataset and day"),
    option("--gaps", action="store_true", help="only what is not complete"),
)
def command_coverage(arguments: Arguments, configuration: Configuration) -> None:
    """Show what is expected and what is there, by dataset and season."""
    database = _existing(configuration)
    (part,) = answers(database, (BY_DAY if arguments.by_day else COVERAGE,), **vars(arguments))
    is_known = arguments.gaps and database.value("select 1 from coverage")
    _print(arguments, [dataclasses.replace(part, empty="no gaps") if is_known else part])


@command(
    option("dataset", metavar="DATASET"),
    option("fields", nargs="*", metavar="FIELD=VALUE", help="of the object; else those of a known one"),
)
def command_try(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Send one request of a dataset under its limits and show what the answer means; nothing is stored."""
    database, dataset = open_database(configuration.database), configuration.datasets[arguments.dataset]
    given = dict(text.partition("=")[::2] for text in arguments.fields)
    os.environ.update(ADCE_CONFIG=str(configuration.path), ADCE_DB=str(configuration.database))  # for the session
    _print(arguments, try_request(configuration, dataset, example_fields(database, configuration, dataset, given)))
    return ExitCode.DONE


@command(option("--online", action="store_true", help="also connect to the sources"))
def command_check(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Check the configuration, the database, the store and, with --online, the sources."""
    rows = check_rows(configuration, online=arguments.online)
    _print(arguments, [Section("checks", "", rows)])
    return ExitCode.ERROR if any(row["result"] == "FAIL" for row in rows) else ExitCode.DONE


@command(
    option("key", nargs="?", metavar="KEY", help="such as retry.max_attempts"),
    option("--json-schema", action="store_true", help="a JSON Schema for editors instead"),
    needs="nothing",
)
def command_explain(arguments: Arguments, _: Configuration) -> None:
    """Print the meaning of the keys of adce.yaml, or a JSON Schema of them."""
    print(json.dumps(json_schema(), indent=2) if arguments.json_schema else explain(arguments.key))


@command(option("name", choices=sorted(["config", *COMPLETIONS, *EXAMPLES])), needs="nothing")
def command_example(arguments: Arguments, _: Configuration) -> None:
    """Print a configuration, a text for systemd, launchd, cron, Grafana or Prometheus, or the completion of a shell."""
    if arguments.name in COMPLETIONS:
        program = shlex.join([sys.executable, str(Path(__file__).resolve())])
        print(COMPLETIONS[arguments.name].format(program=program), end="")
    elif arguments.name == "config":
        print(Path(__file__).with_name(DEFAULT_NAME).read_text(encoding="utf-8"), end="")
    else:
        print(EXAMPLES[arguments.name](configured(arguments)), end="")


if __name__ == "__main__":
    script = Path(__file__).resolve()
    if script.name == "adce.py" and "run" in sys.argv:
        # Python keeps the syntax tree of a script, 20 MB, until it ends; and workers of a pool know only a module.
        start = f"import os, sys; sys.path[0] = os.path.dirname({str(script)!r}); import adce; adce.leave(adce.main())"
        os.execv(sys.executable, [sys.executable, "-c", start, *sys.argv[1:]])  # noqa: S606  # this very program
    leave(main())
