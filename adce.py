#!/usr/bin/env python3
"""ADCE keeps a data lake complete by itself.

You declare in adce.yaml what the lake should hold: datasets of objects, from rate-limited web sources.
ADCE compares that with what the lake does hold, turns every gap into a scored task, and fills the gaps
with a few workers, never asking a source more often than it allows, through crashes and restarts:

    configuration -> expected objects - stored objects = gaps -> tasks -> limits -> fetch -> store

    python adce.py check          is everything in order?
    python adce.py run            keep the lake complete until told to stop
    python adce.py report         what is there, what is missing, and why

All state is one SQLite file and the lake itself. The module reads from top to bottom; each room below
rests only on the rooms above it (`grep -n '^# ---' adce.py` prints where they are):

    Words                       the vocabulary: states, outcomes, exit codes, errors
    Time                        instants and durations; the only reader of the clock
    Schema                      the tables: the centre of the design
    Side tables                 what the limits, the runner and the alerts remember
    Migrations                  to it, from those of older versions
    Views                       what people read of them
    Database                    one safe door to the SQLite file
    Opening                     how it is made and opened
    Backups                     a copy while others work
    Templates                   texts with fields in them
    Kinds                       what a value in adce.yaml can be
    Reader                      YAML to records, all mistakes at once
    Settings                    every key of adce.yaml, declared once
    Datasets                    those of datasets
    Reading                     what must hold between them
    Expressions                 JMESPath over the bodies of objects
    Objects                     what should exist, and what a whole object is
    Store                       what does exist
    Folder                      on a disk
    Bucket                      or in S3
    Limits                      what may be asked, and when
    Pauses                      what the answers of a source say about it
    Permits                     the limits for other threads and processes
    Score                       which gap matters most
    Ledger                      objects and their tasks, kept in step
    Children                    objects that others name
    Upkeep                      what a new configuration and passing days change
    Queue                       what is to be done, and in which order
    Endings                     what becomes of a task when an attempt ends
    Listing                     the store, page by page
    Ranges                      which of it to look at
    Cycles                      one reconciliation as it goes on
    Contents                    what objects say that something else wrote
    Reconcile                   notices: expected against present
    Executions                  what one execution is, and what it leaves
    Requests                    one HTTP request
    Sessions                    the limits for programs that use requests
    Processes                   a program of the user's, from start to end
    Scrapers                    a command or a call instead
    Fetch                       does one execution
    Tables                      rows as text
    Coverage                    what is expected and what is there
    Report                      tells: questions in SQL, answers as rows
    Plan                        what a run would do
    Page                        the whole picture in a browser
    Metrics                     the figures for Prometheus
    Health                      serves the same answers over HTTP
    Screen                      what a person sees while it runs
    Conditions                  what people should look at
    Alerts                      what people are told, once, wherever they are
    Interventions               what a person changes by hand
    Workers                     who does the executions
    Supervision                 who has started the runner, and is told
    Runner                      keeps going until told to stop
    Examples                    texts for the programs around ADCE
    Checks                      is everything in order?
    Background                  the runner as a process
    Trials                      what a new configuration would change
    Answers                     one function for each command that shows
    Commands                    obeys: one function for each that does
    Command table               every command and its options
    Command line                from words to an exit code
"""

from __future__ import annotations

import argparse
import array
import bisect
import collections
import contextlib
import contextvars
import csv
import dataclasses
import datetime
import difflib
import email.utils
import enum
import errno
import fcntl
import functools
import gzip
import hashlib
import html
import http.client
import http.server
import importlib
import importlib.machinery
import io
import itertools
import json
import math
import os
import pwd
import queue
import random
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
import unicodedata
import urllib.parse
import weakref
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Protocol, TextIO, TypeVar, cast

__version__ = "1.0.0"
__all__ = [
    "Clock",
    "Configuration",
    "Database",
    "Error",
    "FetchSpec",
    "Limiter",
    "Runner",
    "fetch",
    "limit",
    "load_configuration",
    "main",
    "open_database",
    "open_store",
    "permit",
    "reconcile",
    "session",
]

# A scraper that imports adce must meet these very classes, also when this file runs as a script.
sys.modules.setdefault("adce", sys.modules[__name__])


# ---------------------------------------------------------------- Words
# The vocabulary. Every state and outcome is stored as the word that people read. Headline: Error.


class ObjectState(enum.StrEnum):
    """What is known of an object. Missing, stale and suspect are gaps."""

    AWAITED = "awaited"  # not expected yet: its `available_after` has not come
    MISSING = "missing"
    STALE = "stale"  # older than its freshness allows, or not final yet
    SUSPECT = "suspect"  # there, but fails its validation
    PRESENT = "present"
    DROPPED = "dropped"  # no longer expected; what lies in the store is left alone


GAPS = (ObjectState.MISSING, ObjectState.STALE, ObjectState.SUSPECT)


class TaskState(enum.StrEnum):
    """The life of a task. Only `gave_up` is a final bad state."""

    PENDING = "pending"  # may be claimed
    RETRY = "retry"  # waits until next_at
    RUNNING = "running"
    DONE = "done"
    GAVE_UP = "gave_up"
    CANCELLED = "cancelled"  # its object is no longer expected


class Priority(enum.StrEnum):
    """How much a gap matters, from most to least."""

    CRITICAL = "CRITICAL"
    HIGH = "HIGH"
    MEDIUM = "MEDIUM"
    LOW = "LOW"


class Outcome(enum.StrEnum):
    """How an attempt ended."""

    RUNNING = "running"
    OK = "ok"
    NOT_YET = "not_yet"  # the source says there is no such thing (yet)
    INVALID = "invalid"  # an answer that is not the object
    HTTP_ERROR = "http_error"
    THROTTLED = "throttled"  # 429, 503, or a status that means blocked: the source is paused
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"  # no connection could be made
    BROKEN = "broken"  # the connection broke before the whole answer was there
    STORE_ERROR = "store_error"  # fetched, but the store would not take it
    ERROR = "error"  # a scraper failed
    LOST = "lost"  # the runner stopped or died before the end


# An attempt counts towards `retry.max_attempts` only when the task itself is to blame.
COUNTED_FAILURES = (Outcome.INVALID, Outcome.HTTP_ERROR, Outcome.ERROR)
# What tells how reliable a dataset is; a pause, an outage or a stop says nothing about it.
RELIABILITY = (Outcome.OK, *COUNTED_FAILURES)
# So many of these in a row mean that the source itself is away; for others see blocked_when.
SOURCE_FAILURES = {Outcome.UNREACHABLE: 2, Outcome.BROKEN: 5}


class ExitCode(enum.IntEnum):
    """What a command's exit status means. Treat an unknown one as a failure."""

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
    """Something the user can act on: what is wrong, and what to try."""

    exit_code: int = ExitCode.ERROR

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigurationError(Error):
    """adce.yaml cannot be used; the message lists every problem."""

    exit_code = ExitCode.BAD_CONFIGURATION


class MassDropError(ConfigurationError):
    """adce.yaml expects far less than before, and nobody has said that this is meant."""


class DatabaseError(Error):
    """The database is unusable, or not ADCE's."""


class DatabaseTroubleError(DatabaseError):
    """The database cannot be used now and may be later: it is locked, or its disk is full."""


class NoDatabaseError(DatabaseError):
    """There is no database where one is needed."""

    exit_code = ExitCode.NO_DATABASE


class RateLimitedError(Error):
    """A source cannot be asked within the time that was given, but `seconds` from now."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class LockedError(Error):
    """Another runner holds this database."""

    exit_code = ExitCode.LOCKED


class StoreError(Error):
    """The store cannot be listed, read or written."""

    exit_code = ExitCode.STORE_UNUSABLE


class UnusablePlaceError(StoreError):
    """One object or folder of the store cannot be used; the others can."""


class OutOfOrderError(StoreError):
    """A store listed its objects in another order than that of their keys."""


# ---------------------------------------------------------------- Time
# Instants and durations. Wall time is for people and for ages in hours; limits use boot time, which no
# clock change moves and which all processes of the machine share. Headline: Clock.

MINUTE, HOUR, DAY = 60, 3600, 86400
NEWS_SECONDS = 0.1
DURATION_UNITS = {"s": 1, "m": MINUTE, "h": HOUR, "d": DAY}


class Clock:
    """The only reader of time. A simulation passes its own."""

    def wall(self) -> float:
        """Seconds since 1970, UTC. May step."""
        return time.time()

    def boot(self) -> float:
        """Seconds since the machine started, suspended time included. Never steps."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        """The name of this boot: boot times of two boots must not be compared."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    def wait(self, wakeups: queue.SimpleQueue[str], seconds: float, has_news: Callable[[], bool] | None = None) -> None:
        """Sleep until something is put into `wakeups`, until there are news, or for `seconds`; empties `wakeups`.

        News are what cannot wake anybody, and so are asked for every now and then."""
        until, is_awake = time.monotonic() + seconds, False
        while not is_awake:
            left = max(0.0, until - time.monotonic())
            with contextlib.suppress(queue.Empty):
                wakeups.get(timeout=min(left, NEWS_SECONDS) if has_news else left)
                is_awake = True
            is_awake = is_awake or time.monotonic() >= until or (has_news is not None and has_news())
        with contextlib.suppress(queue.Empty):
            while True:
                wakeups.get_nowait()


def parse_duration(text: str) -> int:
    """Seconds of a duration such as 90s, 15m, 6h or 1d. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})\s*([smhd])", text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a duration; write 90s, 15m, 6h or 1d")
    return int(match[1]) * DURATION_UNITS[match[2]]


def format_duration(seconds: float) -> str:
    """A duration in at most two units, for people: 42 s, 3 min 12 s, 6 h, 4 d 2 h."""
    whole = round(seconds)
    for size, name, smaller, smaller_name in (
        (DAY, "d", HOUR, "h"),
        (HOUR, "h", MINUTE, "min"),
        (MINUTE, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name} {rest} {smaller_name}" if rest else f"{whole // size} {name}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def utc_text(instant: float | None) -> str | None:
    """2026-11-23T14:24:25Z, the form of the views; None stays None."""
    if instant is None:
        return None
    return datetime.datetime.fromtimestamp(int(instant), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def instant_of(day: datetime.date, at: datetime.time, timezone: str) -> int:
    """The instant of a local time of day, in seconds since 1970."""
    return int(datetime.datetime.combine(day, at, zoneinfo.ZoneInfo(timezone)).timestamp())


def day_of(instant: float, timezone: str = "UTC") -> datetime.date:
    """The calendar day that holds an instant."""
    return datetime.datetime.fromtimestamp(instant, zoneinfo.ZoneInfo(timezone)).date()


# ---------------------------------------------------------------- Schema
# The centre of the design: what ADCE remembers. Instants are whole seconds since 1970 (UTC) unless the
# remark says boot: those count from the start of the machine. Headline: LAKE_TABLES.

APPLICATION_ID = 0x41444345  # "ADCE"
LAKE_TABLES = """
create table settings (
    -- Small facts about the file itself and about the last run.
    name         text    primary key,
    value        text    not null
) strict, without rowid;

create table runner (
    -- The one process that works on this database: the last one that did, when none runs.
    only_row     integer primary key check (only_row = 1),
    pid          integer not null,
    version      text    not null,
    started_at   integer not null,
    beat_at      integer not null,   -- the loop's last sign of life
    stopped_at   integer,
    note         text,               -- why it stopped
    address      text,               -- where it answers over HTTP, if it does
    unit         text,               -- of systemd, if that started it
    log          text,               -- the file that it writes its events to, if it does
    lost_workers integer not null default 0 -- functions that have not returned in time, and may never
) strict;

create table orders (
    -- What other processes ask the runner for: a cycle.
    order_id     integer primary key,
    asked_at     integer not null,
    is_full      integer not null,   -- 1: it looks at everything
    may_lose     text    not null,   -- JSON: the datasets whose mass loss is real
    cycle_id     integer             -- the cycle that obeyed; null: not yet begun
) strict;

create table datasets (
    -- One row for each dataset that adce.yaml declares, or once declared.
    dataset_id   integer primary key,
    dataset      text    not null unique,
    source       text    not null,
    active       integer not null,   -- 0: no longer declared
    definition   text    not null,   -- digest of its declaration
    expansion    text    not null,   -- digest of what its expected objects were derived from
    success_rate real    not null,   -- 0 to 1, recent attempts weigh more
    bonus        real    not null    -- points of score for it
) strict;

create table objects (
    -- One row for each object that should exist, with what is known of it. Objects that exist but
    -- that nobody expects have no row.
    object_id    integer primary key,
    dataset_id   integer not null references datasets,
    key          text    not null unique,
    fields       text    not null,   -- JSON: the values of its partition
    season       text,               -- label of its season
    day          text,               -- its date
    state        text    not null
                 check (state in ('awaited', 'missing', 'stale', 'suspect', 'present', 'dropped')),
    reason       text,               -- of a gap
    since        integer not null,   -- when it came into this state
    due_at       integer,            -- when time alone will change the state
    available_at integer,            -- not expected before
    seen_at      integer,            -- first known to exist
    size         integer,            -- bytes; null: not in the store
    etag         text,
    modified_at  integer,
    read_etag    text,               -- the version whose content was looked at; what was found:
    valid        integer,            -- 1: passes its validation
    settled      integer,            -- 1: final, its `until` holds
    live         integer,            -- 1: it changes all the time, its `live.while` holds
    verdict      text,               -- why it is not valid
    skipped      text,               -- why nobody wants it, in the words of who said so
    proven       integer not null,   -- 0: nobody has looked for it in the store yet
    cycle_id     integer             -- the cycle in or after which ADCE last wrote it
) strict;
-- the objects of a dataset in a state, by day
create index objects_by_state on objects (dataset_id, season, state, day);
-- what time alone has changed
create index objects_due on objects (due_at) where due_at is not null;
-- what is in the store but was never looked at
create index objects_unread on objects (dataset_id, key) where etag is not read_etag;
-- what each cycle looks for
create index objects_open on objects (key)
where state in ('missing', 'stale', 'suspect') or (proven = 0 and state != 'dropped');
-- what people do not want
create index objects_skipped on objects (dataset_id, season) where skipped is not null;

create table counts (
    -- How many objects are in each state: kept by the triggers below, because counting takes long.
    dataset_id   integer not null references datasets,
    season       text    not null,   -- '': of no season
    state        text    not null,
    objects      integer not null,
    primary key (dataset_id, season, state)
) strict, without rowid;
create trigger objects_counted_in after insert on objects begin
    insert into counts values (new.dataset_id, coalesce(new.season, ''), new.state, 1)
    on conflict do update set objects = objects + 1;
end;
create trigger objects_counted_out after delete on objects begin
    update counts set objects = objects - 1
    where dataset_id = old.dataset_id and season = coalesce(old.season, '') and state = old.state;
end;
create trigger objects_recounted after update of state, season, dataset_id on objects
when (old.state, old.season, old.dataset_id) is not (new.state, new.season, new.dataset_id) begin
    update counts set objects = objects - 1
    where dataset_id = old.dataset_id and season = coalesce(old.season, '') and state = old.state;
    insert into counts values (new.dataset_id, coalesce(new.season, ''), new.state, 1)
    on conflict do update set objects = objects + 1;
end;

create table links (
    -- Which parent object names which child object.
    parent_id    integer not null references objects,
    child_id     integer not null references objects,
    primary key (parent_id, child_id)
) strict, without rowid;
create index links_by_child on links (child_id);

create table tasks (
    -- The work that closes one gap. A gap that persists keeps its task, and so its age.
    task_id      integer primary key,
    object_id    integer not null references objects,
    dataset_id   integer not null references datasets,
    state        text    not null
                 check (state in ('pending', 'retry', 'running', 'done', 'gave_up', 'cancelled')),
    priority     text    not null check (priority in ('CRITICAL', 'HIGH', 'MEDIUM', 'LOW')),
    detected_at  integer not null,   -- age counts from here
    gap_size     integer not null,   -- objects that one execution would bring
    rank         real    not null,   -- the score it would have had in 1970, without its dataset's bonus
    slope        real    not null,   -- points that it gains in an hour
    next_at      integer,            -- retry: not before
    attempts     integer not null,   -- all of them
    failures     integer not null,   -- those that count towards retry.max_attempts
    attempt_id   integer,            -- the one that is running
    last_error   text,
    closed_at    integer,
    deaths       integer not null default 0  -- of runners in a row, while they worked at it
) strict;
-- one live task for an object
create unique index live_tasks on tasks (object_id) where state in ('pending', 'retry', 'running', 'gave_up');
-- the head of each dataset's queue
create index pending_tasks on tasks (dataset_id, rank desc, task_id) where state = 'pending';
-- retries that are due
create index waiting_tasks on tasks (next_at) where state = 'retry';
-- what may be forgotten
create index closed_tasks on tasks (closed_at) where closed_at is not null;
-- what is running, what gave up
create index tasks_by_state on tasks (state, dataset_id) where state in ('running', 'gave_up', 'retry');

create table attempts (
    -- One execution of a task. A retry adds a row and never edits one.
    attempt_id   integer primary key,
    task_id      integer not null references tasks,
    started_at   real    not null,
    seconds      real,
    outcome      text    not null,
    http_status  integer,
    bytes        integer,
    requests     integer not null,   -- HTTP requests made, redirects included
    error        text,
    output       text                -- the end of what a command printed
) strict;
create index attempts_by_task on attempts (task_id);

create table daily_totals (
    -- Sums of attempts by day, kept when old attempts are removed.
    day          text    not null,
    dataset_id   integer not null references datasets,
    priority     text    not null,
    outcome      text    not null,
    attempts     integer not null,
    seconds      real    not null,
    bytes        integer not null,
    primary key (day, dataset_id, priority, outcome)
) strict, without rowid;

create table reconciliations (
    -- One row for each cycle: what it looked at, what it found, what it did.
    cycle_id     integer primary key,
    started_at   real    not null,
    seconds      real,               -- null: not finished
    listed       integer not null,   -- objects seen in the store
    looked       integer not null default 0, -- expected objects that were looked for: all, or a share of them
    unexpected   integer not null,   -- of them, objects that no dataset expects
    list_calls   integer not null,
    expected     integer not null,
    present      integer not null,
    missing      integer not null,
    stale        integer not null,
    suspect      integer not null,
    created      integer not null,   -- tasks opened
    closed       integer not null,   -- tasks closed because their gap was gone
    error        text                -- what was not proven, and why
) strict;
"""


# ---------------------------------------------------------------- Side tables
# What the runner, the limits and the alerts remember, and counts that triggers keep. Headline: SIDE_TABLES.

SIDE_TABLES = """
create table boot (
    -- The boot that the boot times below belong to.
    only_row     integer primary key check (only_row = 1),
    boot_id      text    not null,
    wall_offset  real    not null    -- wall time minus boot time, for display only
) strict;

create table scopes (
    -- One row for each source, and one named global: what its limits remember.
    scope        text    primary key,
    granted_at   real    not null,   -- boot: the last grant
    tokens       real    not null,   -- in the bucket, at tokens_at
    tokens_at    real    not null,   -- boot
    paused_until real    not null,   -- boot
    paused_for   real    not null,   -- seconds, as first asked
    reason       text,               -- of the pause
    failures     integer not null,   -- failures in a row that blame the source
    throttles    integer not null,   -- pauses in a row without a good answer
    burst_size   integer,            -- tokens that its bucket can hold; null: it has none
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
    -- Every HTTP request that still matters to a window. One row serves all windows of both scopes.
    request_id    integer primary key,
    source        text    not null references scopes,
    granted_at    real    not null,  -- boot
    deadline      real    not null,  -- boot: over by then, whatever became of its owner
    finished_at   real,              -- boot; null: in flight
    source_number integer,           -- the n-th finished of its source
    global_number integer            -- the n-th finished of all
) strict;
create index requests_in_flight on requests (source, deadline) where finished_at is null;
create unique index requests_by_source on requests (source, source_number) where source_number is not null;
create unique index requests_by_number on requests (global_number) where global_number is not null;

create table waiters (
    -- Who waits for a permit, the longest first. Boot times.
    waiter_id    integer primary key,
    source       text    not null references scopes,
    owner        text    not null,   -- the runner, or a thread of another process
    ready_at     real    not null,   -- its source's own limits are no longer in the way
    opens_at     real    not null,   -- nothing is
    reason       text    not null,   -- what is in the way until then
    expires_at   real    not null,   -- gone, if it has not looked again by then
    unique (source, owner)
) strict;

create index open_tasks on tasks (priority, detected_at)
where state in ('pending', 'retry', 'running', 'gave_up');
create index gave_up_tasks on tasks (dataset_id) where state = 'gave_up';

create table task_counts (
    -- How many tasks there are, kept by triggers.
    dataset_id   integer not null references datasets,
    priority     text    not null,
    state        text    not null,
    tasks        integer not null,
    primary key (dataset_id, priority, state)
) strict, without rowid;
create trigger tasks_counted_in after insert on tasks begin
    insert into task_counts values (new.dataset_id, new.priority, new.state, 1)
    on conflict do update set tasks = tasks + 1;
end;
create trigger tasks_counted_out after delete on tasks begin
    update task_counts set tasks = tasks - 1
    where dataset_id = old.dataset_id and priority = old.priority and state = old.state;
end;
create trigger tasks_recounted after update of state, priority, dataset_id on tasks
when (old.state, old.priority, old.dataset_id) is not (new.state, new.priority, new.dataset_id) begin
    update task_counts set tasks = tasks - 1
    where dataset_id = old.dataset_id and priority = old.priority and state = old.state;
    insert into task_counts values (new.dataset_id, new.priority, new.state, 1)
    on conflict do update set tasks = tasks + 1;
end;

create table alerts (
    -- What people were told of; one row for each time that it lasted.
    alert_id     integer primary key,
    condition    text    not null,
    about        text    not null,
    text         text    not null,
    since        integer not null,
    seen_at      integer not null,   -- it held then
    told_at      integer not null,   -- for the last time so far
    ended_at     integer
) strict;
create unique index open_alert on alerts (condition, about) where ended_at is null;

create table notices (
    -- What each channel has to send, or has sent.
    notice_id    integer primary key,
    alert_id     integer references alerts,
    channel      text    not null,
    subject      text    not null,
    text         text    not null,
    made_at      integer not null,
    try_at       integer not null,   -- not before
    tries        integer not null default 0,
    sent_at      integer
) strict;
create index unsent_notices on notices (notice_id) where sent_at is null;

create table channels (
    -- The channels that do not work.
    channel      text    primary key,
    error        text    not null,
    since        integer not null
) strict, without rowid;
"""


# ---------------------------------------------------------------- Migrations
# From the schemas of older versions to this one, as they were written then. Only ever appended to.

MIGRATIONS: tuple[str, ...] = (  # MIGRATIONS[n] leads from user_version n + 1 to n + 2
    """
    alter table scopes drop column finished;
    alter table scopes add column burst_size integer;
    alter table scopes add column refill_per_second real not null default 0;
    create table waiters (
        waiter_id    integer primary key,
        source       text    not null references scopes,
        owner        text    not null,
        ready_at     real    not null,
        opens_at     real    not null,
        reason       text    not null,
        expires_at   real    not null,
        unique (source, owner)
    ) strict;
    """,
    """
    create table counts (
        dataset_id   integer not null references datasets,
        season       text    not null,
        state        text    not null,
        objects      integer not null,
        primary key (dataset_id, season, state)
    ) strict, without rowid;
    create trigger objects_counted_in after insert on objects begin
        insert into counts values (new.dataset_id, coalesce(new.season, ''), new.state, 1)
        on conflict do update set objects = objects + 1;
    end;
    create trigger objects_counted_out after delete on objects begin
        update counts set objects = objects - 1
        where dataset_id = old.dataset_id and season = coalesce(old.season, '') and state = old.state;
    end;
    create trigger objects_recounted after update of state, season, dataset_id on objects
    when (old.state, old.season, old.dataset_id) is not (new.state, new.season, new.dataset_id) begin
        update counts set objects = objects - 1
        where dataset_id = old.dataset_id and season = coalesce(old.season, '') and state = old.state;
        insert into counts values (new.dataset_id, coalesce(new.season, ''), new.state, 1)
        on conflict do update set objects = objects + 1;
    end;
    insert into counts
    select dataset_id, coalesce(season, ''), state, count(*) from objects group by 1, 2, 3;
    alter table objects add column live integer;
    alter table reconciliations add column looked integer not null default 0;
    create index objects_open on objects (key)
    where state in ('missing', 'stale', 'suspect') or (proven = 0 and state != 'dropped');
    """,
    """
    alter table attempts add column output text;
    alter table objects add column skipped text;
    create index objects_skipped on objects (dataset_id, season) where skipped is not null;
    create index closed_tasks on tasks (closed_at) where closed_at is not null;
    alter table runner add column address text;
    alter table runner add column unit text;
    alter table runner add column log text;
    alter table runner add column lost_workers integer not null default 0;
    create table orders (
        order_id     integer primary key,
        asked_at     integer not null,
        is_full      integer not null,
        may_lose     text    not null,
        cycle_id     integer
    ) strict;
    """,
    """
    alter table tasks add column deaths integer not null default 0;
    create table task_counts (
        dataset_id   integer not null references datasets,
        priority     text    not null,
        state        text    not null,
        tasks        integer not null,
        primary key (dataset_id, priority, state)
    ) strict, without rowid;
    create trigger tasks_counted_in after insert on tasks begin
        insert into task_counts values (new.dataset_id, new.priority, new.state, 1)
        on conflict do update set tasks = tasks + 1;
    end;
    create trigger tasks_counted_out after delete on tasks begin
        update task_counts set tasks = tasks - 1
        where dataset_id = old.dataset_id and priority = old.priority and state = old.state;
    end;
    create trigger tasks_recounted after update of state, priority, dataset_id on tasks
    when (old.state, old.priority, old.dataset_id) is not (new.state, new.priority, new.dataset_id) begin
        update task_counts set tasks = tasks - 1
        where dataset_id = old.dataset_id and priority = old.priority and state = old.state;
        insert into task_counts values (new.dataset_id, new.priority, new.state, 1)
        on conflict do update set tasks = tasks + 1;
    end;
    insert into task_counts select dataset_id, priority, state, count(*) from tasks group by 1, 2, 3;
    create index open_tasks on tasks (priority, detected_at)
    where state in ('pending', 'retry', 'running', 'gave_up');
    create index gave_up_tasks on tasks (dataset_id) where state = 'gave_up';
    create index objects_by_day on objects (day, dataset_id, state) where day is not null;
    create table alerts (
        alert_id     integer primary key,
        condition    text    not null,
        about        text    not null,
        text         text    not null,
        since        integer not null,
        seen_at      integer not null,
        told_at      integer not null,
        ended_at     integer
    ) strict;
    create unique index open_alert on alerts (condition, about) where ended_at is null;
    create table notices (
        notice_id    integer primary key,
        alert_id     integer references alerts,
        channel      text    not null,
        subject      text    not null,
        text         text    not null,
        made_at      integer not null,
        try_at       integer not null,
        tries        integer not null default 0,
        sent_at      integer
    ) strict;
    create index unsent_notices on notices (notice_id) where sent_at is null;
    create table channels (
        channel      text    primary key,
        error        text    not null,
        since        integer not null
    ) strict, without rowid;
    """,
    """
    drop index objects_by_day;
    drop index objects_by_state;
    create index objects_by_state on objects (dataset_id, season, state, day);
    """,
)


# ---------------------------------------------------------------- Views
# What people read, with plain names and UTC times as text; the score is live. Made anew in a database
# whenever this text changes. Headline: VIEWS.

VIEWS = """
create view queue as
    -- Every task that is not closed. The score is live.
    select t.task_id,
           t.state,
           round(t.rank + t.slope * unixepoch() / 3600.0 + d.bonus, 2) as score,
           t.priority,
           d.source,
           d.dataset,
           o.key,
           t.gap_size,
           round((unixepoch() - t.detected_at) / 3600.0, 2) as age_hours,
           coalesce(o.state || ': ' || o.reason, o.state) as reason,
           t.attempts,
           strftime('%Y-%m-%dT%H:%M:%SZ', t.next_at, 'unixepoch') as next_at,
           t.last_error
    from tasks t
    join datasets d using (dataset_id)
    join objects o using (object_id)
    where t.state in ('pending', 'retry', 'running', 'gave_up');

create view gaps as
    -- Every expected object that is missing, stale or suspect.
    select d.dataset,
           o.key,
           o.state as kind,
           strftime('%Y-%m-%dT%H:%M:%SZ', o.since, 'unixepoch') as since,
           t.priority,
           o.season,
           o.reason,
           t.state as task_state,
           t.task_id
    from objects o
    join datasets d using (dataset_id)
    left join tasks t on t.object_id = o.object_id and t.state in ('pending', 'retry', 'running', 'gave_up')
    where o.state in ('missing', 'stale', 'suspect');

create view coverage as
    -- What is expected and what is there, by dataset and season. 100 percent means all of it.
    with summed as (
        select dataset_id,
               nullif(season, '') as season,
               coalesce(sum(objects) filter (where state in ('present', 'missing', 'stale', 'suspect')), 0) as expected,
               coalesce(sum(objects) filter (where state = 'present'), 0) as present,
               coalesce(sum(objects) filter (where state = 'missing'), 0) as missing,
               coalesce(sum(objects) filter (where state = 'stale'), 0) as stale,
               coalesce(sum(objects) filter (where state = 'suspect'), 0) as suspect
        from counts
        group by dataset_id, season
    ), lost as (
        select t.dataset_id, o.season, count(*) as gave_up
        from tasks t
        join objects o using (object_id)
        where t.state = 'gave_up'
        group by t.dataset_id, o.season
    ), unwanted as (
        select dataset_id, season, count(*) as skipped
        from objects
        where skipped is not null and reason is not null
        group by dataset_id, season
    )
    select d.source,
           d.dataset,
           c.season,
           c.expected,
           c.present,
           c.missing,
           c.stale,
           c.suspect,
           coalesce(l.gave_up, 0) as gave_up,
           c.present * 10000 / nullif(c.expected, 0) / 100.0 as percent,
           coalesce(u.skipped, 0) as skipped
    from summed c
    join datasets d using (dataset_id)
    left join lost l on l.dataset_id = c.dataset_id and l.season is c.season
    left join unwanted u on u.dataset_id = c.dataset_id and u.season is c.season
    where c.expected > 0 or u.skipped > 0;

create view skipped as
    -- What nobody wants any more: `retry ID` of its task wants it again.
    select d.dataset,
           o.key,
           o.skipped as reason,
           strftime('%Y-%m-%dT%H:%M:%SZ', o.since, 'unixepoch') as since,
           o.season,
           (select max(t.task_id) from tasks t where t.object_id = o.object_id) as task_id
    from objects o
    join datasets d using (dataset_id)
    where o.skipped is not null and o.reason is not null;

create view coverage_by_day as
    -- The same of what has a day, by day.
    select d.source,
           d.dataset,
           o.day,
           count(*) as expected,
           sum(o.state = 'present') as present,
           sum(o.state = 'missing') as missing,
           sum(o.state = 'stale') as stale,
           sum(o.state = 'suspect') as suspect
    from objects o
    join datasets d using (dataset_id)
    where o.state in ('present', 'missing', 'stale', 'suspect') and o.day is not null
    group by d.source, d.dataset, o.day;

create view rates as
    -- Each limit and how much of it is used now. The next request is granted at free_at, null for now, and not
    -- before because of why. A scope without limits has one row, for its pauses.
    with now as (
        select (julianday('now') - 2440587.5) * 86400.0 - wall_offset as at, wall_offset from boot
    ), counted as (
        select s.*,
               w.window_seconds,
               w.max_requests,
               n.at,
               n.wall_offset,
               (select count(*) from requests r
                 where (s.scope = 'global' or r.source = s.scope)
                   and (r.finished_at is null or r.finished_at > n.at - w.window_seconds)) as used,
               (select count(*) from requests r
                 where r.finished_at is null and (s.scope = 'global' or r.source = s.scope)) as in_flight,
               (select count(*) from waiters l
                 where l.expires_at >= n.at and (s.scope = 'global' or l.source = s.scope)) as waiting,
               (select max(iif(s.scope = 'global', r.global_number, r.source_number)) from requests r
                 where s.scope = 'global' or r.source = s.scope) as finished,
               (select min(l.waiter_id) from waiters l
                 where l.expires_at >= n.at and l.opens_at > n.at and l.source = s.scope) as first_waiter
        from scopes s
        join now n
        left join windows w using (scope)
    ), judged as (
        select c.*,
               -- the place that comes free next is that of the (max_requests - in_flight)-th last to finish
               case when c.used < c.max_requests then null
                    when c.in_flight >= c.max_requests then c.at + c.window_seconds
                    when c.scope = 'global' then c.window_seconds + (
                        select finished_at from requests
                        where global_number = c.finished - c.max_requests + c.in_flight + 1)
                    else c.window_seconds + (
                        select finished_at from requests
                        where source = c.scope
                          and source_number = c.finished - c.max_requests + c.in_flight + 1)
               end as window_at,
               iif(c.burst_size > 0, c.tokens_at + (1 - c.tokens) / c.refill_per_second, null) as bucket_at
        from counted c
    ), explained as (
        select j.*,
               iif(j.paused_until > j.at, j.reason, null) as pause_reason,
               case when j.paused_until > j.at then j.paused_until
                    when l.waiter_id then l.opens_at
                    when j.window_at > j.at then j.window_at
                    when j.bucket_at > j.at then j.bucket_at end as opens_at,
               case when j.paused_until > j.at then 'paused: ' || j.reason
                    when l.waiter_id then l.reason
                    when j.window_at > j.at then 'used up'
                    when j.bucket_at > j.at then 'bucket of ' || j.burst_size || ' empty' end as why
        from judged j
        left join waiters l on l.waiter_id = j.first_waiter
    )
    select scope,
           window_seconds,
           max_requests,
           used,
           in_flight,
           waiting,
           strftime('%Y-%m-%dT%H:%M:%SZ', iif(paused_until > at, paused_until + wall_offset, null), 'unixepoch')
               as blocked_until,
           pause_reason as reason,
           -- the second in which it is free, and the next one if that began before
           strftime('%Y-%m-%dT%H:%M:%SZ', cast(opens_at + wall_offset + 0.999 as integer), 'unixepoch') as free_at,
           why
    from explained;

create view recent_attempts as
    -- Every attempt that is still kept, the latest first.
    select a.attempt_id,
           a.task_id,
           d.source,
           d.dataset,
           o.key,
           strftime('%Y-%m-%dT%H:%M:%SZ', a.started_at, 'unixepoch') as started_at,
           round(a.seconds, 3) as seconds,
           a.outcome,
           a.http_status,
           a.bytes,
           a.error
    from attempts a
    join tasks t using (task_id)
    join datasets d using (dataset_id)
    join objects o using (object_id)
    order by a.attempt_id desc;

create view open_alerts as
    -- What people have been told of and is not over.
    select condition, about, text,
           strftime('%Y-%m-%dT%H:%M:%SZ', since, 'unixepoch') as since,
           strftime('%Y-%m-%dT%H:%M:%SZ', told_at, 'unixepoch') as told_at
    from alerts
    where ended_at is null
    order by since;

create view broken_channels as
    -- Channels for alerts and figures that do not work now, with the messages that wait for them.
    select channel, error, strftime('%Y-%m-%dT%H:%M:%SZ', since, 'unixepoch') as since,
           (select count(*) from notices n where n.channel = channels.channel and sent_at is null) as waiting
    from channels
    order by channel;

create view stats as
    -- Attempts by day, kept for ever.
    select s.day, d.source, d.dataset, s.priority, s.outcome, s.attempts, round(s.seconds, 3) as seconds, s.bytes
    from daily_totals s
    join datasets d using (dataset_id);

create view cycles as
    -- Every reconciliation: "0 gaps" and "did not look" are different.
    select cycle_id,
           strftime('%Y-%m-%dT%H:%M:%SZ', started_at, 'unixepoch') as started_at,
           round(seconds, 3) as seconds,
           listed, looked, expected, present, missing, stale, suspect, created, closed, list_calls, error
    from reconciliations;
"""

# ---------------------------------------------------------------- Database
# One safe door to the file: one writing connection behind a lock, one that can only read. Nothing slow
# happens inside a transaction, and nothing else in this process ever opens the file, because closing it
# would drop SQLite's locks. Headline: Database.

BUSY_SECONDS = 30  # for which another program may hold its transaction
BUSY_STEP_SECONDS = 0.25  # meanwhile signals are obeyed so often
HURRIED_SECONDS = 1
DAMAGE_HINT = (
    "put a backup in its place, and remove the files whose names end with -wal and -shm, or move all three away: "
    "a new one is filled from the store, without its history"
)
TROUBLE_SECONDS = 10  # before a database that cannot be used now is tried again
CONNECTION_SETTINGS = """
pragma foreign_keys = on;
pragma trusted_schema = off;
pragma cell_size_check = on;
"""


SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # it names damaged things as it finds them


class Database:
    """The open database. Safe to share between threads, useless after a fork."""

    def __init__(self, path: str, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self.path = path
        self._writer, self._reader = writer, reader
        self._writing = threading.Lock()  # guards _writer: whoever wants a transaction waits here, in turn
        self._durable = True  # guarded by _writing, too: what the writer is set to
        self._patience = float(BUSY_SECONDS)
        writer.execute(f"pragma busy_timeout = {BUSY_STEP_SECONDS * 1000:.0f}")
        self._version = -1  # and what it last saw of the others
        self._reading = threading.Lock()  # guards _reader
        self._pid = os.getpid()
        self._identity = _identity(path)
        self._translation = _Translation(path)

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One `begin immediate` transaction: committed at the end, rolled back on any exception.

        One that need not be durable is faster, and all see it, but a power cut may undo it. Raises
        DatabaseError when SQLite cannot do it, for instance because the disk is full."""
        self._check_process()
        with self._writing, self._translation:
            try:
                if durable != self._durable:
                    self._writer.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
                    self._durable = durable
                self._begin()
                yield self._writer
                self._writer.execute("commit")
            finally:  # whatever interrupted it, and wherever
                if self._writer.in_transaction:
                    self._writer.execute("rollback")

    def _begin(self) -> None:
        waited = 0.0
        while True:
            try:
                self._writer.execute("begin immediate")
            except sqlite3.OperationalError as error:
                waited += BUSY_STEP_SECONDS  # in SQLite, where no signal is obeyed
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or waited >= self._patience:
                    raise
            else:
                return

    def hurry(self) -> None:
        """From now on, do not wait long for other programs."""
        self._patience = HURRIED_SECONDS

    def read(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query, as of one moment. Never waits for a writer."""
        self._check_process()
        with self._reading, self._translation:
            return self._reader.execute(sql, parameters).fetchall()

    def value(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> Any:
        """The first column of the first row, or None."""
        rows = self.read(sql, parameters)
        return rows[0][0] if rows else None

    def has_news(self) -> bool:
        """Whether another connection, of whatever process, has written since this was last asked. Takes some
        microseconds: SQLite keeps count (pragma data_version)."""
        self._check_process()
        with self._writing, self._translation:
            version: int = self._writer.execute("pragma data_version").fetchone()[0]
            known, self._version = self._version, version
        return version != known

    def check(self) -> list[str]:
        """Every damage that can be found, in words; empty when all is well."""
        problems = [row[0] for row in self.read("pragma integrity_check") if row[0] != "ok"]
        problems += [
            f"a row of {row[0]} names a row of {row[2]} that is gone" for row in self.read("pragma foreign_key_check")
        ]
        return problems

    def check_place(self) -> None:
        """Raises NoDatabaseError when the file was moved, replaced or deleted: SQLite would go on writing to it."""
        if self._identity and _identity(self.path) != self._identity:
            raise NoDatabaseError(f"{self.path} was moved, replaced or deleted while in use", "start again")

    def copy(self) -> Database:
        """The same contents in memory: what is tried there changes nothing here."""
        self._check_process()
        memory = _connect(":memory:")
        with self._reading, self._translation:
            self._reader.backup(memory)
        return Database(self.path, memory, memory)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """The reader, which sees all as of one moment, whatever others write meanwhile."""
        self._check_process()
        with self._reading, self._translation:
            self._reader.execute("begin")
            try:
                self._reader.execute("select count(*) from sqlite_schema").fetchone()
                yield self._reader
            finally:
                self._reader.execute("rollback")

    def close(self) -> None:
        """Close both connections, when no other thread is at work with them: SQLite would crash."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise DatabaseError(
                f"{self.path} was opened before this process was forked",
                "start the other process anew; multiprocessing: use the method spawn",
            )


class _Translation:
    """Turns the errors of SQLite into a DatabaseError with a hint."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, SQLITE_ERRORS):
            raise _translated(self.path, error) from error


def _translated(path: str, error: BaseException) -> DatabaseError:
    if isinstance(error, UnicodeDecodeError):
        return DatabaseError(f"{path}: database disk image is malformed", _database_hint("SQLITE_CORRUPT"))
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    passes = name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR"))
    kind = DatabaseTroubleError if passes else DatabaseError
    return kind(f"{path}: {error} ({name})", _database_hint(name))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _database_hint(name: str) -> str:
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR_WRITE")):
        return "free some disk space; nothing is lost meanwhile"
    if name.startswith("SQLITE_BUSY"):
        return "another program holds a transaction on this file; close it"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return DAMAGE_HINT
    return ""


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=path.startswith("file:")
    )
    connection.row_factory = sqlite3.Row
    connection.executescript(CONNECTION_SETTINGS)
    return connection


# ---------------------------------------------------------------- Opening
# How a database is made, brought up to date and opened, and the lock of its one runner. Headlines:
# open_database(), RunnerLock.


def open_database(path: Path, *, must_exist: bool = False) -> Database:
    """Open the database, make or migrate its schema.

    Raises NoDatabaseError when `must_exist` and it does not, DatabaseError when it is not usable."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise DatabaseError(f"{path} is not a regular file", "name the database file itself in `database:`")
    if must_exist and not (path.exists() and path.stat().st_size):
        raise NoDatabaseError(f"there is no database at {path}", "start with: adce.py run")
    if not path.exists():
        _create_file(path)
    writer = None
    try:
        with _alone_in(path.parent):
            writer = _connect(str(path))
            _migrate(writer, path)
        reader = _connect(str(path))
        reader.execute("pragma query_only = on")
    except SQLITE_ERRORS as error:
        if writer:
            writer.close()
        raise _translated(str(path), error) from error
    return Database(str(path), writer, reader)


def memory_database() -> Database:
    """An empty database that is gone when it is closed."""
    connection = _connect(":memory:")
    _migrate(connection, Path(":memory:"))
    return Database(":memory:", connection, connection)


def _create_file(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise DatabaseError(f"cannot create {path}: {error.strerror}", "see `database:` in adce.yaml") from error


def set_foreign_log_aside(path: Path) -> None:
    """What a runner has written last may still lie in its write-ahead log. SQLite would play that into a backup
    that was put in the database's place, and damage it. For a process that has not opened the database yet:
    closing the file would drop its locks.

    A backup says of itself that it has no such log (https://sqlite.org/fileformat2.html, 1.3.3); one that is newer
    than the file may be another program's, which has just begun to use it."""
    log = path.with_name(f"{path.name}-wal")
    with _alone_in(path.parent), contextlib.suppress(OSError), path.open("rb") as file:
        has_log = file.read(20)[18:] != b"\x01\x01"
        if not has_log and log.stat().st_size and log.stat().st_mtime_ns <= os.fstat(file.fileno()).st_ctime_ns:
            log.rename(f"{log}.{int(log.stat().st_mtime)}")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Of all processes that open a database in a folder, one at a time makes or changes a schema."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be listed, a file system without locks
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    application_id = connection.execute("pragma application_id").fetchone()[0]
    version = connection.execute("pragma user_version").fetchone()[0]
    newest = len(MIGRATIONS) + 1
    is_empty = connection.execute("select count(*) from sqlite_schema").fetchone()[0] == 0
    if application_id != APPLICATION_ID and not is_empty:
        raise DatabaseError(f"{path} is a database of another program", "name another file in `database:`")
    if version > newest:
        raise DatabaseError(
            f"{path} was written by a newer ADCE (schema {version}, this one knows {newest})", "update adce.py"
        )
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute(f"pragma journal_size_limit = {8 << 20}")
    digest = hashlib.sha256(VIEWS.encode()).hexdigest()
    if version == newest:
        known = connection.execute("select value from settings where name = 'views'").fetchone()
        if known and known[0] == digest:
            return
    steps = "".join(MIGRATIONS[version - 1 :]) if version else LAKE_TABLES + SIDE_TABLES
    old_views = connection.execute("select name from sqlite_schema where type = 'view'").fetchall()
    script = [
        "begin immediate;",
        *(f"drop view {name};" for (name,) in old_views),
        steps,
        VIEWS,
        f"insert or replace into settings values ('views', '{digest}');",  # noqa: S608  # hexadecimal digits
        f"pragma application_id = {APPLICATION_ID}; pragma user_version = {newest};",
        "commit;",
    ]
    try:
        connection.executescript("\n".join(script))
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("rollback")
        raise


class RunnerLock:
    """Only one process may work on a database. The kernel frees the lock when its holder dies."""

    def __init__(self, database_path: Path) -> None:
        self.path = database_path.with_name(database_path.name + ".lock")
        self._file: TextIO | None = None

    def holder(self) -> int | None:
        """The process id of the living holder, or None."""
        if not self.path.exists():
            return None
        with self.path.open(encoding="ascii", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                return int(text) if text.isdigit() else 0
        return None

    def acquire(self) -> None:
        """Take the lock for the life of this process. Raises LockedError."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DatabaseError(
                f"cannot write {self.path}: {error.strerror}", "the folder of the database must be writable"
            ) from error
        file = os.fdopen(descriptor, "r+", encoding="ascii", errors="replace")
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            holder = self.holder()
            if holder is not None:  # else another process only looked whether there is one
                file.close()
                raise LockedError(
                    f"another runner works on this database (process {holder or 'unknown'})",
                    "look at it with: adce.py status",
                )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back."""
        if self._file:
            self._file.close()
            self._file = None


# ---------------------------------------------------------------- Backups
# A copy of the database while others work on it, and what a copy cannot know. Headline: back_up().

BACKUP_PAGES = 1000  # copied at a time


def back_up(database: Database, path: Path, progress: Callable[[int, int], None]) -> None:
    """Write all that is committed now into a new file, mode 0600. It is checked, and it is there whole or not at
    all. `progress` is told the pages left and all. Raises DatabaseError, also when something is at `path` already."""
    if path.exists() or path.is_symlink():
        raise DatabaseError(f"{path} exists already", "name a new file; nothing was written")
    if not path.parent.is_dir():  # it may be a disk that is not mounted
        raise DatabaseError(f"there is no folder {path.parent}", "make it first; nothing was written")
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    _create_file(draft)
    try:
        with _Translation(str(draft)), contextlib.closing(_connect(str(draft))) as copy:
            with database.snapshot() as source:  # or else each write of others would begin it anew
                try:
                    source.backup(copy, pages=BACKUP_PAGES, progress=lambda _, left, total: progress(left, total))
                except sqlite3.DatabaseError as error:
                    is_source = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
                    raise _translated(database.path if is_source else str(draft), error) from error
            copy.execute("pragma journal_mode = delete")
            copy.execute("insert or replace into settings values ('is a backup', '1')")
            if copy.execute("pragma integrity_check").fetchone()[0] != "ok":
                raise DatabaseError(f"the copy of {database.path} is damaged", "adce.py check")
        _publish(draft, path)
    except OSError as error:
        raise DatabaseError(f"cannot write {path}: {error.strerror}", "name another file") from error
    finally:
        with contextlib.suppress(OSError):  # what failed first is what is told
            draft.unlink(missing_ok=True)


def _publish(draft: Path, path: Path) -> None:
    """Give a finished file its name for good, unless somebody has taken that name meanwhile."""
    for place in (draft, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if place == draft:
            os.link(draft, path)


def distrust_backup(sql: sqlite3.Connection, now: float) -> None:
    """A backup does not know what was asked since it was made: at its first use each source is left alone until
    that has left its windows. `now` is boot time."""
    if sql.execute("delete from settings where name = 'is a backup'").rowcount:
        sql.execute(
            """
            update scopes
            set paused_until = max(paused_until, :now + longest), paused_for = max(paused_for, longest),
                reason = 'restored from a backup: what was asked since it was made is not known'
            from (select scope as limited, max(window_seconds) as longest from windows group by scope)
            where scope = limited
            """,
            {"now": now},
        )


# ---------------------------------------------------------------- Templates
# Texts with fields in them: keys, urls, words of commands, expressions. Headline: Template.

Fields = Mapping[str, str]  # the values of a partition by name; dates as 2024-12-15

FIELD_IN_TEXT = re.compile(r"\{([a-z_][a-z0-9_]*)(?::([^{}]+))?\}")
FIELD_IN_EXPRESSION = re.compile(r"\{([a-z_][a-z0-9_]*)(?::((?:%[A-Za-z]|[-_./ ])+))?\}")


@dataclass(frozen=True, slots=True)
class Template:
    """Text with {field} or {date:%Y%m%d} in it."""

    text: str
    pattern: re.Pattern[str] = FIELD_IN_TEXT

    def fields(self) -> list[str]:
        """The names of the fields in it, in order."""
        return [match[1] for match in self.pattern.finditer(self.text)]

    def shape(self) -> str:
        """The text with every field blanked: templates of one shape may produce the same text."""
        return self.pattern.sub("{}", self.text)

    def render(self, fields: Fields, quote: Callable[[str], str]) -> str:
        """The text with every field replaced by its quoted value; the slashes of a date's format stay."""
        words = list(_split(self.pattern, self.text))  # text, field, format, text, field, format, text
        for place in range(1, len(words), 3):
            value, form = fields[words[place]], words[place + 1]
            if form:
                day = datetime.date.fromisoformat(value).strftime(form)
                words[place], words[place + 1] = "/".join(map(quote, day.split("/"))), ""
            else:
                words[place], words[place + 1] = quote(value), ""
        return "".join(words)


@functools.cache
def _split(pattern: re.Pattern[str], text: str) -> list[str]:
    return pattern.split(text)


# ---------------------------------------------------------------- Kinds
# The kinds of values in adce.yaml: how a YAML node becomes a value, and what messages and the reference call it.
# YAML's own traps (12:30, no, 010) are named. A kind stands in the annotation of a field: Annotated[int, Kind(...)].
# Headline: Kind.


class MistakeError(ValueError):
    """Why a value is not of its kind."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of single values. `convert` makes one of a node or raises ValueError."""

    expected: str
    convert: Callable[[Any], Any]
    json: str = '{"type": "string"}'  # its JSON Schema
    may_repeat: bool = False  # in a list


@dataclass(frozen=True, slots=True)
class AvailableAfter:
    """Not expected before this time of its day, or this long after the end of its day."""

    time: datetime.time | None = None
    seconds: int = 0


def _tag(node: Any) -> str:
    return node.tag.rpartition(":")[2] if node.id == "scalar" else cast(str, node.id)


def _plain(node: Any, *tags: str) -> str:
    if node.id != "scalar" or (tags and _tag(node) not in tags):
        raise ValueError(node.id)
    return cast(str, node.value)


def _text(node: Any) -> str:
    if _tag(node) in ("str", "null", "sequence", "mapping"):
        return _plain(node, "str")
    import yaml

    read = yaml.safe_load(node.value)
    number = "the number " if isinstance(read, int | float) and not isinstance(read, bool) else ""
    raise MistakeError(f'{node.value} is read as {number}{json.dumps(read, default=str)}; write "{node.value}"')


def _expression(node: Any) -> str:
    import jmespath.exceptions

    text = _text(node)
    try:
        jmespath.compile(FIELD_IN_EXPRESSION.sub("x", text))
    except (jmespath.exceptions.JMESPathError, ValueError) as error:
        column = getattr(error, "lex_position", None)
        where = f" at its character {column + 1}" if column is not None and column >= 0 else ""
        raise MistakeError(f"not a JMESPath expression{where}: {text}") from None
    return text


def _regex(node: Any) -> str:
    text = _text(node)
    try:
        groups = re.compile(text).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise MistakeError(f"not a regular expression: {error}") from None
    if groups != 1:
        raise MistakeError(f"needs one group ( ) for the id, has {groups}")
    return text


def _store(node: Any) -> str:
    text = _text(node)
    if text.lower().startswith("s3:") and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", text):
        raise MistakeError(f"{text} is not s3://bucket/prefix")
    if "://" in text and not text.startswith("s3://"):
        raise MistakeError(f"{text}: a store is a folder or s3://bucket/prefix")
    return text


def _timezone(node: Any) -> str:
    try:
        return zoneinfo.ZoneInfo(_plain(node)).key
    except (zoneinfo.ZoneInfoNotFoundError, OSError) as error:
        raise ValueError(str(error)) from None


def _number(node: Any) -> float:
    text = _plain(node, "int", "float")
    if not re.fullmatch(r"[-+]?(0|[1-9]\d{0,14})(\.\d+)?", text):  # more digits overflow a float
        raise ValueError(text)
    return float(text) if "." in text else int(text)


def _available(node: Any) -> AvailableAfter:
    if node.id != "mapping":
        return AvailableAfter(time=datetime.time.fromisoformat(_text(node)))
    ((name, hours),) = [(key.value, _number(value)) for key, value in node.value]
    if name != "hours" or hours < 0:
        raise ValueError(name)
    return AvailableAfter(seconds=round(hours * HOUR))


def _day(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise MistakeError(f"{text} is no day of the calendar") from None


def _numbers(expected: str, bounds: str = "", *, is_whole: bool = False) -> Kind:
    """Numbers within bounds, which are written as in a JSON Schema."""
    limits = json.loads(f"{{{bounds}}}")

    def convert(node: Any) -> float:
        number = _number(node)
        least = limits.get("minimum", math.nextafter(limits.get("exclusiveMinimum", -math.inf), math.inf))
        if least <= number <= limits.get("maximum", math.inf) and (isinstance(number, int) or not is_whole):
            return number
        raise ValueError(expected) if "maximum" in limits else MistakeError(f"{node.value} is not {expected}")

    return Kind(expected, convert, json.dumps({"type": "integer" if is_whole else "number", **limits}))


def _matching(expected: str, pattern: str, convert: Callable[[str], Any] = str, *tags: str) -> Kind:
    """Texts that match a pattern as a whole."""

    def convert_node(node: Any) -> Any:
        if not re.fullmatch(pattern, text := _plain(node, *tags)):
            raise ValueError(text)
        return convert(text)

    return Kind(expected, convert_node, json.dumps({"type": "string", "pattern": f"^({pattern})$"}))


def _one_of(expected: str, *words: str) -> Kind:
    return Kind(expected, lambda node: words[words.index(_plain(node))], json.dumps({"enum": words}))


def _durations(never: float | None) -> Kind:
    """Seconds, with a value of its own for `never`."""
    expected, pattern = "a duration like 90s, 15m, 6h or 1d (or never)", r"never|\s*\d*[1-9]\d*\s*[smhd]\s*"
    return _matching(expected, pattern, lambda text: never if text == "never" else parse_duration(text))


ISO_DATE, TRUE = r"\d{4}-\d\d-\d\d", ("true", "yes", "on")
Text = Annotated[str, Kind("text", _text)]
Word = Annotated[str, Kind("text", _text, may_repeat=True)]
File = Annotated[Path, Kind("the path of a file", lambda node: Path(_text(node)))]
Lake = Annotated[str, Kind("a folder or s3://bucket/prefix", _store)]
Address = Annotated[str, Kind("an http or https address", lambda node: _text(node).rstrip("/"))]
FieldText = Annotated[Template, Kind("text with {fields}", lambda node: Template(_text(node)), may_repeat=True)]
Expression = Annotated[str, Kind("a JMESPath expression", _expression)]
Regex = Annotated[str, Kind("a regular expression with one group", _regex)]
Callee = Annotated[str, _matching("module:function", r"[\w.]+:\w+")]
Switch = Annotated[
    bool, Kind("true or false", lambda node: _plain(node, "bool").lower() in TRUE, '{"type": "boolean"}')
]
Number = Annotated[float, _numbers("a number")]
Positive = Annotated[float, _numbers("a number above 0", '"exclusiveMinimum": 0')]
Percent = Annotated[float, _numbers("a number from 0 to 100", '"minimum": 0, "maximum": 100')]
Count = Annotated[int, _numbers("a whole number of 1 or more", '"minimum": 1', is_whole=True)]
Port = Annotated[int, _numbers("a port from 0 to 65535", '"minimum": 0, "maximum": 65535', is_whole=True)]
Status = Annotated[int, _numbers("an HTTP status", '"minimum": 100, "maximum": 599', is_whole=True)]
Date = Annotated[datetime.date, _matching("a date like 2024-10-22", ISO_DATE, _day)]
LastDay = Annotated[
    str | datetime.date,
    _matching(
        "yesterday, today or a date like 2024-10-22",
        rf"yesterday|today|{ISO_DATE}",
        lambda text: text if text[0] in "yt" else _day(text),
    ),
]
All = Annotated[bool, _matching("the word all", "all", bool)]
Duration = Annotated[int, _durations(None)]
Period = Annotated[float, _durations(math.inf)]
Timezone = Annotated[str, Kind("a time zone like America/New_York", _timezone)]
Urgency = Annotated[str, _one_of("auto, CRITICAL, HIGH, MEDIUM or LOW", "auto", *Priority)]
Output = Annotated[str, _one_of("store or stdout", "store", "stdout")]
Hex = Annotated[str, _matching("bytes in hexadecimal, in quotes", r"\s*([0-9A-Fa-f]{2}\s*)+", str, "str")]
Available = Annotated[AvailableAfter, Kind('"HH:MM" or {hours: N}', _available, '{"type": ["string", "object"]}')]


# ---------------------------------------------------------------- Reader
# Declares the keys of a block as the fields of a record, and reads a YAML mapping into one. Problems are collected,
# each with its place, so that all are reported at once. Headlines: setting(), Reader.

MAX_NODES = 20_000
NEEDED = dataclasses.MISSING  # the default of a required key, and the value of a node that is not of its kind
Problems = Iterator[tuple[str, str]]  # the key, and what is wrong with it


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a block."""

    name: str
    meaning: str
    beside: tuple[str, ...] = ()  # it has an effect only beside one of these keys
    against: tuple[str, ...] = ()  # and none beside one of these
    reason: str = ""  # why, where that needs other words
    unit: int = 1  # the record has the value in a unit that is so much smaller
    attribute: str = ""  # of the record
    declared: Any = None  # the annotation of the field
    default: Any = None


def setting(meaning: str, default: Any = NEEDED, **more: Any) -> Any:
    """A field of a record that a key of adce.yaml sets; its annotation says which values it takes. `more`: as of
    Setting, its `name` where the key has another than the field, and `older`: a second key for the field."""
    older = more.pop("older", ())
    given = {"default_factory" if callable(default) else "default": default} if default is not NEEDED else {}
    return field(metadata={"settings": (Setting(more.pop("name", ""), meaning, **more), *older)}, **given)


@functools.cache
def settings_of(record: type) -> Mapping[str, Setting]:
    """The keys of a block by name."""
    found, annotations = {}, typing.get_type_hints(record, include_extras=True)
    for part in dataclasses.fields(record):
        default = part.default if part.default_factory is NEEDED else part.default_factory()
        for one in part.metadata.get("settings", ()):
            about = {"attribute": part.name, "declared": annotations[part.name], "default": default}
            found[one.name or part.name] = dataclasses.replace(one, name=one.name or part.name, **about)
    return found


def shape_of(declared: Any) -> tuple[str, Any]:
    """What an annotation declares: a block of a record, a list of an item, a mapping of a name and an item, or a value
    of a Kind. What a record changes after it was read is Annotated with that as it is read."""
    while typing.get_origin(declared) in (types.UnionType, typing.Union):
        declared = typing.get_args(declared)[0]  # the other one is None
    if dataclasses.is_dataclass(declared):
        return "block", declared
    if typing.get_origin(declared) is Annotated:
        (inner,) = declared.__metadata__
        return ("value", inner) if isinstance(inner, Kind) else shape_of(inner)
    parts = typing.get_args(declared)
    return ("list", parts[0]) if typing.get_origin(declared) is tuple else ("mapping", parts)


def suggest(word: str, known: Iterable[str]) -> str:
    """`, did you mean "x"?`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f', did you mean "{near[0]}"?' if near else ""


def join_path(path: str, name: str) -> str:
    """The path of a key in a block; an empty name stands for the block itself."""
    return f"{path}.{name}" if path and name else path or name


def _describe(node: Any) -> str:
    kinds = {"sequence": "a list", "mapping": "a mapping", "null": "nothing"}
    texts = {"str": "text", "int": "a number", "float": "a number", "bool": "yes or no"}
    return kinds.get(_tag(node)) or f"{node.value!r} ({texts.get(_tag(node), 'a date')})"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake and its place; lines and columns count from 1."""

    line: int
    column: int
    path: str
    text: str


class Reader:
    """The problems of one file, and the place of every path in it."""

    def __init__(self, hint: Callable[[str, Any, Iterable[str]], str]) -> None:
        """`hint` completes the message about an unknown key: of its path, its value and the keys known beside it."""
        self.problems: list[Problem] = []
        self.places: dict[str, tuple[int, int]] = {}
        self.hint = hint
        self._nodes_left = MAX_NODES

    def complain(self, path: str, text: str) -> None:
        """Note a problem at the place of `path`, or of the nearest block around it."""
        place = path
        while place not in self.places and place:
            place = place.rpartition(".")[0]
        self.problems.append(Problem(*self.places.get(place, (1, 1)), path, text))

    def is_sound(self, path: str, *apart: str) -> bool:
        """Whether nothing is wrong in a block, apart from some of its keys."""
        wrong = {problem.path for problem in self.problems if f"{problem.path}.".startswith(f"{path}.")}
        return wrong <= {f"{path}.{name}" for name in apart}

    def parse(self, declared: Any, node: Any, path: str) -> Any:
        """The value of a node as it is declared; NEEDED, and a problem, when it is not of its kind.

        Raises ConfigurationError after MAX_NODES values."""
        self.places[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise ConfigurationError(f"more than {MAX_NODES:,} values", "is an alias repeated?")
        shape, inner = shape_of(declared)
        if shape == "value":
            return self._scalar(inner, node, path)
        if shape == "list":
            return self._list(inner, node, path)
        if node.id != "mapping":
            self.complain(path, f"expected a mapping, found {_describe(node)}")
            return NEEDED
        return self._record(inner, node, path) if shape == "block" else self._mapping(inner, node, path)

    def _scalar(self, kind: Kind, node: Any, path: str) -> Any:
        try:
            return kind.convert(node)
        except MistakeError as error:
            self.complain(path, str(error))
        except (ValueError, TypeError, AttributeError):  # also of a list or a mapping
            self.complain(path, f"expected {kind.expected}, found {_describe(node)}")
        return NEEDED

    def _list(self, item: Any, node: Any, path: str) -> Any:
        if node.id != "sequence" or not node.value:
            found = "an empty one" if node.id == "sequence" else _describe(node)
            self.complain(path, f"expected a list, found {found}")
            return NEEDED
        values = [self.parse(item, one, f"{path}.{number}") for number, one in enumerate(node.value)]
        good = tuple(value for value in values if value is not NEEDED)
        if len(set(map(str, good))) < len(good) and not getattr(shape_of(item)[1], "may_repeat", False):
            self.complain(path, "the same value stands twice")
        return good

    def _pairs(self, node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
        """The keys of a mapping, with their paths and values."""
        for name_node, value_node in node.value:
            name = name_node.value if name_node.id == "scalar" else "?"
            here, place = join_path(path, name), (name_node.start_mark.line + 1, name_node.start_mark.column + 1)
            if here in self.places:
                text = f"duplicate key, first set at line {self.places[here][0]}"
                self.problems.append(Problem(*place, here, text))
            else:
                self.places[here] = place
                yield name, here, value_node

    def _mapping(self, declared: tuple[Any, Any], node: Any, path: str) -> Any:
        (names, item), values = declared, {}
        for name, here, value_node in self._pairs(node, path):
            if names is not str and name not in list(names):
                self.complain(here, f"unknown key{suggest(name, names)}")
            elif (value := self.parse(item, value_node, here)) is not NEEDED:
                values[name] = value
        return values

    def _record(self, record: Any, node: Any, path: str) -> Any:
        """A wrong value has its default; without a required one there is no record.

        A record may have `problems()`: which of its keys do not fit together, and why; and `of(**values)`, where its
        shape is not that of its block."""
        known, given = settings_of(record), list[str]()
        values: dict[str, Any] = {"name": path.rpartition(".")[2]} if "name" in record.__slots__ else {}
        for name, here, value_node in self._pairs(node, path):
            if name not in known:
                self.complain(here, f"unknown key{self.hint(here, value_node, known)}")
                continue
            given.append(name)
            if (value := self.parse(known[name].declared, value_node, here)) is not NEEDED:
                values[known[name].attribute] = value * known[name].unit if known[name].unit > 1 else value
        for name, text in conflicts(record, given):
            self.complain(join_path(path, name), text)
        if any(one.default is NEEDED and one.attribute not in values for one in known.values()):
            return NEEDED
        made = getattr(record, "of", record)(**values)
        for name, text in made.problems() if hasattr(made, "problems") else ():
            if not name or name.partition(".")[0] in given:  # else it is no mistake of the file's
                self.complain(join_path(path, name), text)
        return made


def conflicts(record: type, given: Sequence[str]) -> Problems:
    """Keys that are missing, that exclude one another, or that have no effect beside the others.

    A record may have ONE_OF: pairs of a key, or an empty text, and of a group of which exactly one must stand in the
    block when that key does."""
    known = settings_of(record)
    yield from (("", f'"{name}" is missing') for name in known if known[name].default is NEEDED and name not in given)
    for when, names in getattr(record, "ONE_OF", ()):
        has = [name for name in names if name in given]
        if len(has) != 1 and (not when or when in given):
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            yield "", f"needs exactly one of {listed}, has {' and '.join(has) or 'none'}"
    for number, name in enumerate(given):
        one = known[name]
        if one.beside and not set(one.beside) & set(given):
            others = " or ".join(f'"{other}"' for other in one.beside)
            yield name, one.reason or f"has no effect without {others}"
        yield from ((name, f'has no effect beside "{other}"') for other in one.against if other in given)
        twins = (other for other in given[:number] if known[other].attribute == one.attribute)
        yield from ((name, f'sets the same as "{other}"; give one of them') for other in twins)


# ---------------------------------------------------------------- Settings
# Everything that may stand in adce.yaml: a record for each block, a field for each key with its kind, its meaning
# and its default. Records say what must hold between their fields. Headlines: RateLimiting, Source.

STAGING = ".adce"  # the folder of a folder store where objects are written before they are whole
LIMIT_SECONDS = {
    f"requests_per_{unit}": seconds
    for unit, seconds in (("second", 1), ("minute", MINUTE), ("hour", HOUR), ("day", DAY))
}


@dataclass(frozen=True, slots=True)
class Season:
    """A span of days with a name."""

    label: Text = setting("its name, such as 2024-25")
    end: Count = setting("the year in which it ends")
    start: Date = setting("its first day")
    finish: Date = setting("its last day")

    def problems(self) -> Problems:
        """A season ends after it has begun."""
        if self.finish < self.start:
            yield "finish", f"{self.finish} is before its start {self.start}"


@dataclass(frozen=True, slots=True)
class WindowLimit:
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
        windows = {float(seconds): count for name, seconds in LIMIT_SECONDS.items() if (count := getattr(self, name))}
        span = MINUTE if MINUTE in windows else min(windows, default=1)
        refill = windows.get(span, 0) / span
        if self.min_delay_seconds:
            delay = float(self.min_delay_seconds)
            windows = {delay: 1, **{seconds: count for seconds, count in windows.items() if seconds != delay}}
        return ScopeLimits(tuple(WindowLimit(n, seconds) for seconds, n in windows.items()), self.burst_size, refill)

    def problems(self) -> Problems:
        """A bucket is refilled by a limit."""
        if self.burst_size and not any(getattr(self, name) for name in LIMIT_SECONDS):
            yield "", "burst_size needs a limit such as requests_per_minute to refill it"


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
    source_limits: Mapping[str, Limits] = setting("limits by source", dict)

    @classmethod
    def of(cls, **values: Any) -> RateLimiting:
        """With the scopes of the limits; none when they are disabled."""
        made = cls(**values) if values.get("enabled", True) else cls(enabled=False)
        limits = {**made.source_limits, "global": made.global_limits} if made.enabled else {}
        return dataclasses.replace(made, scopes={name: one.scope() for name, one in limits.items()})


def _base_scores() -> dict[str, float]:
    return dict(zip(map(str, Priority), (1000, 100, 10, 1), strict=True))


@dataclass(frozen=True, slots=True)
class PriorityWeighting:
    """Weights of the score, which orders the queue."""

    enabled: Switch = setting("false: by priority alone, oldest first", True)
    base_scores: Annotated[Mapping[str, float], Mapping[Priority, Number]] = setting("points by priority", _base_scores)
    age_weight: Number = setting("points an hour since the gap was found", 0.5)
    source_multipliers: Mapping[str, Number] = setting("factors for base score and age by source; default 1", dict)
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
    """Alert channels and thresholds. An address may be $NAME, a variable of the environment."""

    webhook: Text | None = setting("URL of a Slack-compatible webhook, or $NAME", None)
    sns_topic: Text | None = setting("ARN of an SNS topic, or $NAME", None)
    command: tuple[Word, ...] = setting("program to run; subject and text become its last arguments", ())
    ping: Text | None = setting("URL requested after each good cycle, or $NAME", None)
    cloudwatch: Text | None = setting("CloudWatch namespace for the figures of each cycle", None)
    remind_seconds: Period = setting("interval of reminders while a condition lasts", DAY, name="remind_every")
    error_percent: Percent = setting("maximum share of failures in the last 200 attempts", 10)
    quiet_cycles: Count = setting("cycles without a good attempt, though tasks are due, before an alert", 8)
    critical_gap_hours: Positive = setting("age of a CRITICAL gap that raises an alert", 24)


@dataclass(frozen=True, slots=True)
class Retry:
    """Retries of a failed task."""

    max_attempts: Count = setting("failures after which a task gives up", 5)
    initial_delay_seconds: Positive = setting("delay after the first failure, doubled after each further one", 60)
    max_delay_seconds: Positive = setting("the longest delay", 21600)

    def deadly(self) -> int:
        """A task that has seen so many runners die will be given one more chance, alone."""
        return max(1, self.max_attempts - 1)

    def problems(self) -> Problems:
        """The first delay is no longer than the longest."""
        if self.initial_delay_seconds > self.max_delay_seconds:
            yield "initial_delay_seconds", f"{self.initial_delay_seconds} is more than max_delay_seconds"


@dataclass(frozen=True, slots=True)
class BlockedWhen:
    """Signs that a source blocks its clients, and the length of the pause."""

    status: tuple[Status, ...] = setting("HTTP statuses that mean a block", ())
    timeouts_in_a_row: Count = setting("consecutive timeouts that mean a block", 3)
    failures_in_a_row: Count = setting("consecutive 5xx responses or scraper failures that mean a block", 10)
    pause_seconds: Positive = setting("length of the pause, in seconds", 900)


@dataclass(frozen=True, slots=True)
class Source:
    """An upstream with limits of its own."""

    name: str
    base_url: Address = setting("prefix of the `url` of each dataset", "")
    headers: Mapping[str, Text] = setting("request headers; only harmless ones follow a redirect to another host", dict)
    timeout_seconds: Positive = setting("limit for a whole request, body included", 30)
    max_concurrent: Count = setting("maximum workers on this source", 5)
    error_when: Expression | None = setting("condition on a body that makes it an error, whatever the status", None)
    blocked_when: BlockedWhen = setting("signs of a block, and the pause that follows", BlockedWhen())
    trust_env: Switch = setting("use proxies, netrc and certificates of the environment", False)

    def problems(self) -> Problems:
        """Its address and headers can be sent."""
        if self.name == "global":
            yield "", "a source cannot be named global"
        if self.base_url and not re.match(r"https?://[^/\s?#]+[^\s?#]*$", self.base_url):
            yield "base_url", f"{self.base_url} is not an http or https address"
        for header, text in self.headers.items():
            if not re.fullmatch(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+", header) or not re.fullmatch(r"[\x20-\x7e]*", text):
                yield f"headers.{header}", "not a header: names are letters and hyphens, values are plain ASCII"


# ---------------------------------------------------------------- Datasets
# The same for the datasets, and for all of adce.yaml. Headlines: Dataset, Configuration.

NamedValues = Annotated[tuple[tuple[str, tuple[str, ...]], ...], Mapping[str, tuple[Text, ...]]]


@dataclass(frozen=True, slots=True)
class Dates:
    """One object a day: the days of all seasons, or of a range."""

    ONE_OF: ClassVar = (("", ("seasons", "from")),)

    seasons: All | None = setting("the days of all seasons", None)
    first: Date | None = setting("first day of a range", None, name="from")
    last: Date | None = setting("last day of a range", None, name="to", beside=("from",))
    until: LastDay = setting("last day to expect now", "yesterday")
    timezone: Timezone = setting("time zone of the days", "UTC")

    def problems(self) -> Problems:
        """A range begins before it ends, and has one end."""
        for name, end in (("to", self.last), ("until", self.until)):
            if self.first and isinstance(end, datetime.date) and end < self.first:
                yield name, f"{end} is before from: {self.first}"
        if self.last and isinstance(self.until, datetime.date):
            yield "until", 'is a second end beside "to"; give one of them'


@dataclass(frozen=True, slots=True)
class Partitions:
    """The partitions of a dataset: one object each. One of dates, seasons_as, values or parent is set."""

    BASES: ClassVar = ("dates", "seasons", "values", "from")
    ONE_OF: ClassVar = (("", (*BASES, "same_as")), ("from", ("ids", "regex")))

    dates: Dates | None = setting("one object a day", None)
    seasons_as: Annotated[str, All] | None = setting("one object for each season that has begun", None, name="seasons")
    values: NamedValues = setting("one object for each combination of field values", ())
    parent: Text | None = setting("one object for each id in the objects of this parent dataset", None, name="from")
    ids: Expression | None = setting("finds ids in JSON; {field} is a field of the parent", None, beside=("from",))
    regex: Regex | None = setting("finds ids in any text", None, beside=("from",))
    names: Text = setting(
        "with from: the field of an id; with seasons: label or end", "", name="as", beside=("from", "seasons")
    )
    times: NamedValues = setting("further fields, as in values", (), beside=BASES)
    same_as: Text | None = setting("use the partitions of this dataset", None)

    @classmethod
    def of(cls, **values: Any) -> Partitions:
        """`as` beside `seasons` is the form of a season; named values are pairs."""
        values.update({name: tuple(values[name].items()) for name in ("values", "times") if name in values})
        if "seasons_as" in values:
            values["seasons_as"] = values.pop("names", "label")
        return cls(**values)

    def own_fields(self) -> tuple[str, ...]:
        """The fields whose values distinguish its objects."""
        own = ["date"] * bool(self.dates) + ["season"] * bool(self.seasons_as) + [self.names] * bool(self.parent)
        return (*own, *(name for name, _ in self.values + self.times))

    def problems(self) -> Problems:
        """A season has a form, an id has a name."""
        if self.seasons_as not in (None, "label", "end"):
            yield "as", f"expected label or end, found {self.seasons_as!r}"
        if self.parent and not re.fullmatch(r"[a-z_][a-z0-9_]*", self.names):
            yield "as" if self.names else "", "needs `as: NAME` with a name of small letters"


@dataclass(frozen=True, slots=True)
class Live:
    """An object that changes all the time for a while, such as a day with games in progress."""

    expression: Expression = setting("condition on the body of an object in progress", name="while")
    every: Annotated[int, Period] = setting("refetch interval while the condition holds")

    def problems(self) -> Problems:
        """The interval is finite."""
        if self.every == math.inf:
            yield "every", "how often? give a duration"


@dataclass(frozen=True, slots=True)
class Freshness:
    """Refetch rules of objects in the store. Durations in seconds; None is never."""

    refetch_every: Duration | None = setting("maximum age; with `until`, the interval until it holds (1h)", None)
    until: Expression | None = setting("condition on the body that makes an object final", None)
    refetch_once_after: Duration | None = setting(
        "one refetch, this long after the end of its day", None, against=("until",)
    )
    current: Duration | None = setting("maximum age during its season", None, against=("until",))
    past: Duration | None = setting("maximum age after its season", None, against=("until",))
    live: Live | None = setting("short intervals while an object changes", None)


@dataclass(frozen=True, slots=True)
class Validation:
    """Rules that a body must pass. JMESPath expressions may name fields."""

    json: Switch = setting("the body must be JSON", False)
    min_bytes: Count = setting("minimum size", 1)
    max_bytes: Count = setting("maximum size", 256 << 20)
    require: tuple[Expression, ...] = setting("conditions, all of which must hold: not null, false or empty", ())
    alternatives: tuple[Expression, ...] = setting(
        "conditions, one of which is enough instead of `require`",
        (),
        beside=("require",),
        reason='they are alternatives to "require", which is missing',
    )
    contains: tuple[Text, ...] = setting("texts that must be in the body; {field} is allowed", ())
    not_contains: tuple[Text, ...] = setting("texts that must not be in the body; {field} is allowed", ())
    starts_with_hex: Hex = setting("first bytes of the body", "")
    ends_with_hex: Hex = setting("last bytes of the body", "")

    def needs_content(self) -> bool:
        """Whether a size alone cannot settle it."""
        texts = self.require + self.alternatives + self.contains + self.not_contains
        return self.json or bool(texts or self.starts_with_hex or self.ends_with_hex)

    def problems(self) -> Problems:
        """The sizes allow a body."""
        if self.max_bytes < self.min_bytes:
            yield "max_bytes", f"{self.max_bytes} is less than min_bytes"


@dataclass(frozen=True, slots=True)
class Batch:
    """Objects that one command fetches together: they share the field `by`."""

    by: Text = setting("the field that the objects of a batch share")
    max: Count = setting("maximum objects of a batch", 50)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A family of objects of one source."""

    ONE_OF: ClassVar = (("", ("url", "command", "call")),)
    PROGRAM: ClassVar = ("command", "call")

    name: str
    source: Text = setting("name of the source")
    key: FieldText = setting("name of an object in the store; it names each field of the partitions")
    partitions: Partitions = setting("the objects of the dataset")
    url: FieldText | None = setting("URL of a GET request, relative to base_url", None)
    command: tuple[FieldText, ...] = setting("program that fetches objects", ())
    call: Callee | None = setting("Python function that fetches an object", None)
    output: Output = setting("stdout: the command prints the object; store: it writes it", "store", beside=("command",))
    environment: tuple[Text, ...] = setting("further environment variables of the program", (), beside=PROGRAM)
    batch: Batch | None = setting(
        "one command for several objects; {game_ids} lists all values of game_id, with commas",
        None,
        beside=("command",),
        reason="only a command can bring many objects",
    )
    timeout_seconds: Positive = setting("limit for a command or a call", 600, beside=PROGRAM)
    max_concurrent: Count | None = setting("maximum workers on this dataset", None)
    freshness: Freshness = setting("refetch rules", Freshness())
    validate: Validation = setting("rules that a body must pass", Validation())
    available_after: Available | None = setting("earliest time to expect an object: on its day, or after its end", None)
    priority: Urgency = setting("auto: from the age of its date or season", "auto")

    def problems(self) -> Problems:
        """A batch has several objects; stdout holds one."""
        if self.batch and self.batch.max == 1:
            yield "batch.max", "has no effect: a batch holds more than 1 object"
        if self.batch and self.output == "stdout":
            yield "output", "only a command for one object can print it"


@dataclass(frozen=True, slots=True)
class Configuration:
    """All of adce.yaml. Paths are absolute."""

    path: Path = Path("adce.yaml")
    database: File = setting("SQLite file with all state", Path("adce.db"))
    store: Lake = setting("location of the lake", "lake")
    interval_seconds: Positive = setting(
        "time between the starts of two cycles",
        15 * MINUTE,
        name="reconciliation_interval_minutes",
        unit=MINUTE,
        older=(Setting("reconciliation_interval_hours", "the older form of the same", unit=HOUR),),
    )
    full_seconds: Positive = setting(
        "time to list the whole store once", DAY, name="full_reconciliation_hours", unit=HOUR
    )
    queue_check_seconds: Positive = setting("maximum sleep of the main loop", 10)
    max_concurrent_scrapers: Count = setting("number of workers", 5)
    grace_seconds: Number = setting("time that a stop grants running attempts", 30)
    retention_seconds: Positive = setting(
        "age of attempts and cycles to delete", 90 * DAY, name="retention_days", unit=DAY
    )
    priority_weighting: PriorityWeighting = setting("the score, which orders the queue", PriorityWeighting())
    rate_limiting: RateLimiting = setting("rate limits; absent: none", RateLimiting(enabled=False))
    health_check: HealthCheck = setting("HTTP server; absent: none", HealthCheck(enabled=False))
    alerts: Alerts = setting("alert channels and thresholds", Alerts())
    retry: Retry = setting("retries of failed tasks", Retry())
    seasons: tuple[Season, ...] = setting("the seasons of `seasons: all`", ())
    sources: Mapping[str, Source] = setting("upstreams with their own limits, by name", dict)
    datasets: Mapping[str, Dataset] = setting("families of objects, by name", dict)

    def children_of(self, name: str) -> list[Dataset]:
        """The datasets whose partitions come from the bodies of this one."""
        return [dataset for dataset in self.datasets.values() if dataset.partitions.parent == name]

    def ancestors_of(self, name: str) -> list[str]:
        """The datasets that it descends from, the nearest first, up to one that is not there or there again."""
        line = [name]
        while line[-1] in self.datasets and line[-1] not in line[:-1]:
            if not (parent := self.datasets[line[-1]].partitions.parent):
                break
            line.append(parent)
        return line[1:]

    def levels(self) -> list[list[Dataset]]:
        """The datasets in levels, parents before their children."""
        levels: dict[int, list[Dataset]] = {}
        for dataset in self.datasets.values():
            levels.setdefault(len(self.ancestors_of(dataset.name)), []).append(dataset)
        return [levels[number] for number in sorted(levels)]

    def fields_of(self, name: str) -> set[str]:
        """Every field that templates of this dataset may name."""
        line = [self.datasets[one].partitions for one in (name, *self.ancestors_of(name))]
        declared = {own for partitions in line for own in partitions.own_fields()}
        return declared | ({"season", "end"} if any(one.dates and one.dates.seasons for one in line) else set())


# ---------------------------------------------------------------- Reading
# From a file to a configuration: all that must hold between the records, and every mistake with its line and a
# hint. The reference of all keys. Headlines: load_configuration(), explain(), json_schema().

MAX_FILE_BYTES = 1 << 20
DEFAULT_NAME, DEFAULT_DATABASE = "adce.yaml", "adce.db"
DATE_CODES = "aAbBcCdDeFgGhHIjmMpRSTuUVwWxXyY"  # of strftime: those that a date has and every platform knows
# Keys of the system that ADCE replaces: the key that took their place, or what to do instead.
FORMER = {
    "alerts.alert_on": "each condition is an alert",
    "alerts.channels": "set alerts.sns_topic and alerts.webhook",
    "alerts.enabled": "without a channel nothing is sent",
    "dry_run": 'use "adce.py plan"',
    "exponential_backoff": "delays always grow",
    "health_check.alert_thresholds": "set alerts.error_percent and alerts.critical_gap_hours",
    "logging": 'use "adce.py run --log FILE"',
    "maintenance": 'use "adce.py pause SOURCE --for 2h"',
    "max_orchestrator_runtime_minutes": 'use "adce.py run --max-minutes N"',
    "max_retries": "retry.max_attempts",
    "rate_limiting.backoff.enabled": "without backoff there is none",
    "retry_delay_seconds": "retry.initial_delay_seconds",
    "scheduled_tasks": "declare datasets",
    "task_processing": "the score orders all open tasks",
    "task_queue_file": "the queue is in the database",
    "test_mode": 'use "adce.py run --once"',
    **dict.fromkeys(("enabled", "last_updated", "metadata", "version"), "it had no effect"),
    **dict.fromkeys(("fallback_to_sample", "use_aws_inventory"), "the store itself is listed"),
    **dict.fromkeys(("health_check.check_interval_seconds", "min_tasks_to_trigger"), "not needed"),
    **dict.fromkeys(("integration", "performance", "resource_limits"), "not supported"),
}


@functools.cache
def all_settings() -> Mapping[str, Setting]:
    """Every key of adce.yaml by its path, in which `*` is any name or number."""
    return dict(_walk(Configuration, ""))


def _walk(declared: Any, path: str) -> Iterator[tuple[str, Setting]]:
    shape, inner = shape_of(declared)
    if shape in ("list", "mapping"):
        yield from _walk(inner if shape == "list" else inner[1], f"{path}.*")
    for name, one in settings_of(inner).items() if shape == "block" else ():
        yield join_path(path, name), one
        yield from _walk(one.declared, join_path(path, name))


def _hint(path: str, node: Any, known: Iterable[str]) -> str:
    """The end of the message about an unknown key: where it belongs, or what it may mean."""
    name, paths = path.rpartition(".")[2], all_settings()
    inner = [key.value for key, _ in node.value if str(key.value) in paths] if node.id == "mapping" else []
    if inner and "." not in path:
        return f"; {' and '.join(inner)} in it {'belong' if inner[1:] else 'belongs'} at the top level"
    if advice := FORMER.get(path):
        return f', did you mean "{advice}"?' if advice in paths else f"; remove it: {advice}"
    homes = [one.rpartition(".")[0] for one in paths if one.rpartition(".")[2] == name]
    if 0 < len(homes) <= 2:
        return f" here; it belongs {' or '.join(f'in {home}' if home else 'at the top level' for home in homes)}"
    return suggest(name, known)


def _check_all(reader: Reader, configuration: Configuration) -> None:
    """Note all that does not hold between the records."""
    for path, text in _name_problems(configuration):
        reader.complain(path, text)
    for source in configuration.sources.values():
        for _, text in _field_problems("", Template(source.error_when or "", FIELD_IN_EXPRESSION), set()):
            reader.complain(f"sources.{source.name}.error_when", text)
    for dataset in configuration.datasets.values():
        for name, text in _dataset_problems(reader, configuration, dataset):
            if (path := f"datasets.{dataset.name}.{name}") in reader.places:  # else `same_as` has it from another
                reader.complain(path, text)


def _check_seasons(reader: Reader, seasons: Sequence[Season]) -> None:
    if not reader.is_sound("seasons"):  # one that is wrong is left out, so that the numbers are not those of the file
        return
    for (_, season), (number, other) in itertools.combinations(enumerate(seasons), 2):
        if season.label == other.label or season.end == other.end:
            reader.complain(f"seasons.{number}", f"season {season.label} is declared twice")
        if season.start <= other.finish and other.start <= season.finish:
            reader.complain(f"seasons.{number}.start", f"season {other.label} overlaps season {season.label}")


def _name_problems(configuration: Configuration) -> Problems:
    """A limit or multiplier of an undeclared source is harmless, unless it is a misspelt one."""
    tables: dict[str, Mapping[str, Any]] = {
        "priority_weighting.source_multipliers": configuration.priority_weighting.source_multipliers,
        "rate_limiting.source_limits": configuration.rate_limiting.source_limits,
    }
    for path, names in tables.items():
        unused = [source for source in configuration.sources if source not in names]
        for name in names:
            if name == "global":
                yield f"{path}.{name}", "a source cannot be named global; use global_limits"
            elif name not in configuration.sources and (hint := suggest(name, unused)):
                yield f"{path}.{name}", f'source "{name}" is not defined{hint}'
            elif name == "default" and name not in configuration.sources:
                yield f"{path}.{name}", 'has no effect: no source is named "default"'


def _dataset_problems(reader: Reader, configuration: Configuration, dataset: Dataset) -> Problems:
    names, sources = configuration.datasets, configuration.sources
    line = [dataset.name, *configuration.ancestors_of(dataset.name)]
    if dataset.source not in sources and f"sources.{dataset.source}" not in reader.places:
        yield "source", f'source "{dataset.source}" is not defined{suggest(dataset.source, sources)}'
    if line[-1] in line[:-1]:
        yield "partitions.from", "cycle: " + " -> ".join(line)
    elif line[-1] not in names and len(line) == 2 and f"datasets.{line[-1]}" not in reader.places:
        yield "partitions.from", f'dataset "{line[-1]}" is not defined{suggest(line[-1], names)}'
    elif line[-1] in names and all(reader.is_sound(f"datasets.{one}.partitions", "ids", "regex") for one in line):
        yield from _effect_problems(configuration, dataset)
        yield from _key_problems(configuration, dataset)
        yield from _request_problems(configuration, dataset)
        yield from _expression_problems(configuration, dataset)


def _effect_problems(configuration: Configuration, dataset: Dataset) -> Problems:
    """Keys without effect for the objects that there are."""
    declared, own = configuration.fields_of(dataset.name), dataset.partitions.own_fields()
    if not configuration.seasons:
        yield from ((f"partitions.{name}seasons", "no seasons are declared") for name in ("", "dates."))
    if not declared & {"season", *(["date"] if configuration.seasons else [])}:
        yield from ((f"freshness.{name}", "has no effect: its objects have no season") for name in ("current", "past"))
    if "date" not in declared:
        yield "available_after", "has no effect: its objects have no date"
    if dataset.batch and dataset.batch.by not in declared:
        yield "batch.by", f'no field "{dataset.batch.by}"{suggest(dataset.batch.by, declared)}'
    elif dataset.batch and dataset.command and own == (dataset.batch.by,):
        yield "batch.by", f"has no effect: no two objects share a {dataset.batch.by}"


def _template_problems(path: str, template: Template, declared: set[str]) -> Problems:
    if set("{}") & set(template.shape().replace("{}", "")):
        yield path, f"{template.text}: a brace that is no {{field}}; a field is a name in small letters"
    else:
        yield from _field_problems(path, template, declared)


def _field_problems(path: str, template: Template, declared: set[str]) -> Problems:
    for match in template.pattern.finditer(template.text):
        codes = re.findall(r"%(.?)", match[2] or "", re.DOTALL)
        if match[1] not in declared:
            there = f"(there {'are: ' + ', '.join(sorted(declared)) if declared else 'is none'})"
            yield path, f'no field "{match[1]}"{suggest(match[1], declared)} {there}'
        elif match[2] and (match[1] != "date" or not all(map(str.isalpha, codes))):
            yield path, f"{match[0]}: only a date has a format, made of codes like %Y%m%d"
        elif unknown := [code for code in codes if code not in DATE_CODES]:
            yield path, f"{match[0]}: unsupported format code %{unknown[0]}"


def _key_problems(configuration: Configuration, dataset: Dataset) -> Problems:
    template, declared = dataset.key, configuration.fields_of(dataset.name)
    if broken := list(_template_problems("key", template, declared)):
        yield from broken
        return

    def key_of(day: str) -> str:
        return template.render({**dict.fromkeys(declared, "1"), "date": day}, str)

    if {"", ".", "..", STAGING} & {*key_of("2024-01-01").split("/")} or re.search(r"[\x00-\x1f\x7f]", template.text):
        yield "key", f"{template.text}: a key has no empty, . or .. parts and does not start or end with /"
    missing = [name for name in dataset.partitions.own_fields() if name not in template.fields()]
    for name in missing:
        yield "key", f"does not name {{{name}}}: its objects would overwrite one another"
    days = ("2024-01-01", "2024-01-02", "2024-02-01", "2025-01-01")
    if dataset.partitions.dates and not missing and len({*map(key_of, days)}) < len(days):
        yield "key", "its date format gives different days the same key"
    for other in itertools.takewhile(lambda one: one.name != dataset.name, configuration.datasets.values()):
        if other.key.shape() == template.shape():
            yield "key", f'the same keys as dataset "{other.name}": two datasets cannot share objects'


def _request_problems(configuration: Configuration, dataset: Dataset) -> Problems:
    declared = configuration.fields_of(dataset.name)
    if dataset.url:
        yield from _template_problems("url", dataset.url, declared)
        source = configuration.sources.get(dataset.source)
        if source and not (address := source.base_url + dataset.url.text).startswith(("http://", "https://")):
            yield "url", f"{address} is no address: give source {dataset.source} a base_url"
    if dataset.batch:
        declared |= {f"{name}s" for name in dataset.partitions.own_fields()}
    for number, word in enumerate(dataset.command):
        yield from _template_problems(f"command.{number}", word, declared)


def _expression_problems(configuration: Configuration, dataset: Dataset) -> Problems:
    declared, partitions, freshness = configuration.fields_of(dataset.name), dataset.partitions, dataset.freshness
    above = configuration.fields_of(partitions.parent) if partitions.parent else set()
    texts = [("partitions.ids", partitions.ids, above), ("freshness.until", freshness.until, declared)]
    texts.append(("freshness.live.while", freshness.live.expression if freshness.live else None, declared))
    for name in ("require", "alternatives", "contains", "not_contains"):
        rules = enumerate(getattr(dataset.validate, name))
        texts += [(f"validate.{name}.{number}", text, declared) for number, text in rules]
    for path, text, fields in texts:
        yield from _field_problems(path, Template(text or "", FIELD_IN_EXPRESSION), fields)


def _resolve(reader: Reader, read: Configuration) -> Configuration:
    """With absolute paths, sorted seasons, and for `same_as` the partitions of the other dataset."""
    folder, datasets = read.path.parent, {}
    for name, dataset in read.datasets.items():
        line, partitions = [name], dataset.partitions
        while (other := partitions.same_as) and other in read.datasets and other not in line:
            line.append(other)
            partitions = read.datasets[other].partitions
        if other in line:
            reader.complain(f"datasets.{name}.partitions.same_as", "cycle: " + " -> ".join([*line, other]))
        elif other and f"datasets.{other}" not in reader.places:
            text = f'dataset "{other}" is not defined{suggest(other, read.datasets)}'
            reader.complain(f"datasets.{line[-1]}.partitions.same_as", text)
        if not other and all(reader.is_sound(f"datasets.{one}.partitions", "ids", "regex") for one in line[1:]):
            datasets[name] = dataclasses.replace(dataset, partitions=partitions)
    store = read.store.rstrip("/") if "://" in read.store else str(folder / Path(read.store).expanduser())
    seasons = tuple(sorted(read.seasons, key=lambda season: season.start))
    return dataclasses.replace(read, database=folder / read.database, store=store, datasets=datasets, seasons=seasons)


def find_configuration(given: str | None) -> Path:
    """Which file: the given one, $ADCE_CONFIG, adce.yaml here, else the one beside this module."""
    chosen = given or os.environ.get("ADCE_CONFIG")
    if chosen:
        return Path(chosen).absolute()
    here = Path(DEFAULT_NAME).absolute()
    return here if here.exists() else Path(__file__).resolve().with_name(DEFAULT_NAME)


def load_configuration(path: Path) -> Configuration:
    """Read adce.yaml. Raises ConfigurationError, which lists every problem with its place."""
    text, reader, configuration = _read_text_file(path), Reader(_hint), None
    try:
        node = _compose(text, reader)
        read = NEEDED if node is None else reader.parse(Configuration, node, "")
        if read is not NEEDED:
            _check_seasons(reader, read.seasons)
            configuration = _resolve(reader, dataclasses.replace(read, path=path.absolute()))
            _check_all(reader, configuration)
    except RecursionError:
        reader.complain("", "nested too deeply")
    if reader.problems or configuration is None:
        raise ConfigurationError(render_problems(path, text, sorted(set(reader.problems))))
    return configuration


def database_named_in(path: Path) -> Path:
    """The database of a configuration that cannot be used otherwise."""
    text = ""
    with contextlib.suppress(ConfigurationError):
        text = _read_text_file(path)
    named = re.search(r"""^["']?database["']?:[ \t]*("[^"]+"|'[^']+'|[^\s#]+)""", text, re.MULTILINE)
    return path.parent / (named[1].strip("\"'") if named else DEFAULT_DATABASE)


def render_problems(path: Path, text: str, problems: Sequence[Problem]) -> str:
    """Every problem with its line and a caret under its place."""
    lines = text.splitlines()
    blocks = []
    for problem in problems:
        name = f"{problem.path}: " if problem.path else ""
        blocks.append(f"{path.name}:{problem.line}:{problem.column}: {name}{problem.text}")
        if problem.line <= len(lines) and lines[problem.line - 1].strip():
            source = lines[problem.line - 1].replace("\t", " ")[:200]
            blocks.append(f"{problem.line:5} | {source}\n      | {' ' * (problem.column - 1)}^")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([*blocks, f"{count}; nothing was started"])


def _read_text_file(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes", "is it the right file?")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigurationError(f"there is no configuration at {path}", "name one with -c FILE") from None
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}", "name another file with -c FILE") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error


def _compose(text: str, reader: Reader) -> Any:
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.context_mark if error.context and "quoted scalar" in error.context else error.problem_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        reader.problems.append(Problem(*place, "", f"not YAML: {error.problem or error.context}"))
        return None
    except yaml.YAMLError as error:
        reader.problems.append(Problem(1, 1, "", f"not YAML: {' '.join(str(error).split())}"))
        return None
    if node is None:
        reader.problems.append(Problem(1, 1, "", "the file is empty"))
    return node


def explain(wanted: str | None) -> list[dict[str, Any]]:
    """A row for the key that `wanted` names, by its path or the end of it, and for each key in it; else for each block.

    Raises Error for an unknown key."""
    settings, words = all_settings(), (wanted or "").split(".")

    def is_in(path: str) -> bool:
        parts = path.split(".")[: len(words)]
        return all(part in ("*", word) for part, word in itertools.zip_longest(parts, words))

    found = [path for path in settings if (is_in(path) if wanted else "." not in path)]
    if not found:
        ends = tuple(f"{path}." for path in settings if path.endswith(f".{wanted}"))
        found = [path for path in settings if f"{path}.".startswith(ends)]
    if not found:
        names = [*settings, *(path.rpartition(".")[2] for path in settings)]
        raise Error(f'unknown key "{wanted}"{suggest(wanted or "", names)}', '"adce.py explain" lists the blocks')
    return [_explained(path, settings[path]) for path in found]


def _explained(path: str, one: Setting) -> dict[str, Any]:
    default, text = one.default, None
    if default is NEEDED:
        text = "required"
    elif one.declared == Period:
        text = f"{default // DAY}d"
    elif isinstance(default, int | float) and one.unit > 1:
        text = f"{default / one.unit:g}"
    elif isinstance(default, int | float | str | Path | dict) and default not in ("", {}):
        text = json.dumps(default, default=str).strip('"')
    beside = " or ".join(one.beside)
    return {"key": path, "kind": _kind_name(one.declared), "default": text, "beside": beside, "meaning": one.meaning}


def _kind_name(declared: Any) -> str:
    shape, inner = shape_of(declared)
    if shape == "value":
        return cast(str, inner.expected)
    if shape == "list":
        return f"a list, each {_kind_name(inner)}"
    return f"a mapping, each {_kind_name(inner[1])}" if shape == "mapping" else "a mapping"


def explained_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of explain() for people."""
    lines = []
    for row in rows:
        default = row["default"] and (row["default"] if row["default"] == "required" else f"default {row['default']}")
        facts = [row["kind"], default, row["beside"] and f"only beside {row['beside']}"]
        lines += [row["key"], f"    {'; '.join(filter(None, facts))}", f"    {row['meaning']}"]
    return "\n".join(lines)


def json_schema(declared: Any = Configuration) -> dict[str, Any]:
    """The JSON Schema (Draft 2020-12) of adce.yaml, or of a part of it. What must hold between blocks is not in it."""
    shape, inner = shape_of(declared)
    if shape == "value":
        return cast(dict[str, Any], json.loads(inner.json))
    if shape == "list":
        is_unique = not getattr(shape_of(inner)[1], "may_repeat", False)
        return {"type": "array", "minItems": 1, "uniqueItems": is_unique, "items": json_schema(inner)}
    if shape == "mapping":
        names = {} if inner[0] is str else {"propertyNames": {"enum": list(inner[0])}}
        return {"type": "object", "additionalProperties": json_schema(inner[1]), **names}
    known = settings_of(inner)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"} if inner is Configuration else {}
    return {
        **head,
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, one in known.items() if one.default is NEEDED],
        "properties": {name: {"description": one.meaning, **json_schema(one.declared)} for name, one in known.items()},
        "allOf": [{}, *_schema_rules(inner, known)],
    }


def _schema_rules(record: Any, known: Mapping[str, Setting]) -> Iterator[dict[str, Any]]:
    """As conflicts()."""
    for when, group in getattr(record, "ONE_OF", ()):
        exactly = {"oneOf": [{"required": [name]} for name in group]}
        yield {"if": {"required": [when]}, "then": exactly} if when else exactly
    for name, one in known.items():
        if one.beside:
            others = {"anyOf": [{"required": [other]} for other in one.beside]}
            yield {"if": {"required": [name]}, "then": others}
        twins = [other for other in known if other < name and known[other].attribute == one.attribute]
        yield from ({"not": {"required": [name, other]}} for other in (*one.against, *twins))


# ---------------------------------------------------------------- Expressions
# JMESPath over the bodies of objects: conditions that hold or do not, ids that are found. Headlines:
# search(), holds().


def quote_for_expression(value: str) -> str:
    """A value inside a JMESPath 'raw string'. Raises ValueError for what such a string cannot hold."""
    if re.search(r"(?<!\\)\\(\\\\)*('|\Z)", value):  # it would quote what ends the string
        raise ValueError(f"{value!r} cannot be compared")
    return value.replace("'", "\\'")


@functools.lru_cache(maxsize=1024)
def _compile(expression: str) -> Any:
    """A JMESPath expression in which `!a.b` means not a.b. By the letter it is (!a).b, which is always null
    because a truth has no fields, so nothing that means something changes its meaning."""
    import jmespath
    import jmespath.parser

    return jmespath.parser.ParsedResult(expression, _negate_whole(jmespath.compile(expression).parsed))


def _negate_whole(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    first, *others = children = [_negate_whole(child) for child in node["children"]] or [None]
    if node["type"] in ("subexpression", "index_expression") and first["type"] == "not_expression":
        whole = {**node, "children": [*first["children"], *others]}
        return {"type": "not_expression", "children": [whole]}
    return {**node, "children": children if node["children"] else []}


def search(expression: str, fields: Fields, document: Any) -> Any:
    """The value of a JMESPath expression that may name fields; None when it cannot be evaluated."""
    import jmespath.exceptions

    try:
        return _compile(Template(expression, FIELD_IN_EXPRESSION).render(fields, quote_for_expression)).search(document)
    except (jmespath.exceptions.JMESPathError, TypeError, ValueError, RecursionError):
        return None


def holds(expression: str, fields: Fields, document: Any) -> bool:
    """Whether an expression is true: neither false, null nor empty. One that raises is not."""
    value = search(expression, fields, document)
    return value not in (None, False, "", [], {}) or (value == 0 and not isinstance(value, bool))


# ---------------------------------------------------------------- Objects
# What should exist, what a whole object is, and how fresh it must be. Decisions only: values in, values
# out, no clock, no disk, no SQL. Headlines: expand(), inspect(), appraise().

MAX_KEY_BYTES = 1000  # S3 takes 1,024
SAFE_IN_KEYS = "-_~@+=,() "  # and letters, digits and inner dots
FIELDS_AS_JSON = json.JSONEncoder(sort_keys=True)  # json.dumps would make one for each object


@dataclass(frozen=True, slots=True)
class ExpectedObject:
    """One object that a dataset wants in the store."""

    key: str
    fields: Fields
    season: str | None
    day: str | None
    available_at: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the content of an object says."""

    valid: bool
    verdict: str | None  # why it is not valid
    settled: bool  # final: its `until` holds
    live: bool  # its `live.while` holds
    children: Mapping[str, tuple[str, ...]]  # ids by dataset
    no_ids: tuple[str, ...] = ()  # what was found in their place, and is none


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an expected object. Instants in seconds since 1970."""

    available_at: int | None = None
    proven: bool = True  # False: nobody has looked in the store
    seen_at: int | None = None
    size: int | None = None
    etag: str | None = None  # None: not in the store
    modified_at: int | None = None
    valid: bool | None = None  # None: its content was not looked at
    settled: bool | None = None
    live: bool | None = None
    verdict: str | None = None
    skipped: str | None = None  # why nobody wants it


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What follows from the facts now."""

    state: ObjectState
    reason: str | None = None
    due_at: int | None = None  # when time alone will change it
    ask_at: int | None = None  # of a gap: no use to ask before


@functools.lru_cache(4096)  # a date is a part of many keys
def quote_for_key(value: str) -> str:
    """A value as a part of a key. Different values stay different, and none can name a folder above."""
    quoted = urllib.parse.quote(value, safe=SAFE_IN_KEYS)
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


def quote_for_url(value: str) -> str:
    """A value as a part of a url: it can add no path and no parameter."""
    return urllib.parse.quote(value, safe="")


def season_at(seasons: Sequence[Season], day: datetime.date) -> Season | None:
    """The last season that has begun by a day."""
    started = [season for season in seasons if season.start <= day]
    return started[-1] if started else None


def expected_object(dataset: Dataset, fields: Fields, seasons: Sequence[Season]) -> ExpectedObject:
    """The object of one partition. Raises ValueError when its values make no usable key."""
    for name in dataset.partitions.own_fields():
        is_step = bool(dataset.url) and fields[name] in (".", "..")  # which no url can hold, quoted or not (RFC 3986)
        if not fields[name].strip() or not fields[name].isprintable() or is_step:
            raise ValueError(f"{dataset.name}: {name} {fields[name]!r} makes no key")
    key = dataset.key.render(fields, quote_for_key)
    size = len(key.encode())
    if size > MAX_KEY_BYTES or (size > 255 and any(len(part.encode()) > 255 for part in key.split("/"))):
        raise ValueError(f"{dataset.name}: the key {key[:60]}... is too long")
    season = next((season.label for season in seasons if fields.get("season") in (season.label, str(season.end))), None)
    day = fields.get("date")
    if season is None and day:
        found = season_at(seasons, datetime.date.fromisoformat(day))
        season = found.label if found and day <= found.finish.isoformat() else None
    return ExpectedObject(key, fields, season, day, _available_at(dataset, day))


def makes_key(dataset: Dataset, fields: Fields, key: str) -> bool:
    """Whether these fields make this key, as the dataset is declared now."""
    needed = {*dataset.partitions.own_fields(), *dataset.key.fields()}
    return needed <= fields.keys() and dataset.key.render(fields, quote_for_key) == key


def _available_at(dataset: Dataset, day: str | None) -> int | None:
    rule = dataset.available_after
    if rule is None or day is None:
        return None
    date, timezone = datetime.date.fromisoformat(day), timezone_of(dataset)
    if rule.time:
        return instant_of(date, rule.time, timezone)
    return instant_of(date + datetime.timedelta(days=1), datetime.time(), timezone) + rule.seconds


def timezone_of(dataset: Dataset) -> str:
    """Whose days its dates are."""
    return dataset.partitions.dates.timezone if dataset.partitions.dates else "UTC"


def expand(dataset: Dataset, seasons: Sequence[Season], now: float) -> Iterator[dict[str, str]]:
    """The fields of every object of a dataset that does not depend on other objects, as of now."""
    partitions = dataset.partitions
    bases: Iterable[dict[str, str]] = [{}]
    if partitions.dates:
        bases = _expand_dates(partitions.dates, seasons, now)
    elif partitions.seasons_as:
        today = day_of(now)
        bases = (_season_fields(season, partitions.seasons_as) for season in seasons if season.start <= today)
    for base in bases:
        yield from multiply(base, partitions)


def _season_fields(season: Season, form: str) -> dict[str, str]:
    return {"season": season.label if form == "label" else str(season.end), "end": str(season.end)}


def _expand_dates(dates: Dates, seasons: Sequence[Season], now: float) -> Iterator[dict[str, str]]:
    today = day_of(now, dates.timezone)
    bound = {"today": today, "yesterday": today - datetime.timedelta(days=1)}.get(str(dates.until), dates.until)
    assert isinstance(bound, datetime.date)
    spans: list[tuple[datetime.date, datetime.date, dict[str, str]]] = []
    if dates.seasons:
        spans = [(season.start, season.finish, _season_fields(season, "label")) for season in seasons]
    elif dates.first:
        spans = [(dates.first, dates.last or bound, {})]
    for first, last, fields in spans:
        for number in range((min(last, bound) - first).days + 1):
            yield {"date": (first + datetime.timedelta(days=number)).isoformat(), **fields}


def multiply(base: Mapping[str, str], partitions: Partitions) -> Iterator[dict[str, str]]:
    """`values` and `times`: every combination of fixed values beside the fields of `base`."""
    fixed = partitions.values + partitions.times
    for combination in itertools.product(*(values for _, values in fixed)):
        yield {**base, **{name: value for (name, _), value in zip(fixed, combination, strict=True)}}


def children_of_parent(child: Dataset, parent_fields: Fields, ids: Iterable[str]) -> Iterator[dict[str, str]]:
    """The fields of the objects that a parent names; they inherit the parent's fields."""
    for identity in ids:
        yield from multiply({**parent_fields, child.partitions.names: identity}, child.partitions)


def inspect(dataset: Dataset, fields: Fields, body: bytes, children: Sequence[Dataset] = ()) -> Inspection:
    """Look at the content of an object: is it whole, is it final, and which children does it name?"""
    freshness = dataset.freshness
    is_asked = bool(freshness.until or freshness.live or any(child.partitions.ids for child in children))
    document, verdict = _verdict(dataset.validate, fields, body, is_json=is_asked)
    if verdict:
        return Inspection(False, verdict, False, False, {})
    settled = freshness.until is None or holds(freshness.until, fields, document)
    live = freshness.live is not None and holds(freshness.live.expression, fields, document)
    found = {child.name: _ids(child, fields, document, body) for child in children}
    ids = {
        name: tuple(dict.fromkeys(str(value) for value in values if _is_id(value))) for name, values in found.items()
    }
    odd = [(name, value) for name, values in found.items() for value in values if not _is_id(value)]
    return Inspection(
        True, None, settled, live, ids, tuple(f"{name}: {str(value)[:60]} is no id" for name, value in odd)
    )


def _verdict(validation: Validation, fields: Fields, body: bytes, *, is_json: bool) -> tuple[Any, str | None]:
    """The parsed JSON, if an expression asks for it, and why the body is not the object, or None."""
    if len(body) < validation.min_bytes:
        return None, f"{len(body)} bytes, fewer than {validation.min_bytes}"
    if not body.startswith(bytes.fromhex(validation.starts_with_hex)) or not body.endswith(
        bytes.fromhex(validation.ends_with_hex)
    ):
        return None, "its first or last bytes are not those of its format"
    if validation.contains or validation.not_contains:
        text = body.decode("utf-8", "replace")
        for part in validation.contains:
            wanted = Template(part, FIELD_IN_EXPRESSION).render(fields, str)
            if wanted not in text:
                return None, f"does not contain {wanted!r}"
        for part in validation.not_contains:
            if Template(part, FIELD_IN_EXPRESSION).render(fields, str) in text:
                return None, f"contains {part!r}"
    if not (is_json or validation.json or validation.require or validation.alternatives):
        return None, None
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {str(error)[:100]}"
    failed = next((expression for expression in validation.require if not holds(expression, fields, document)), None)
    if failed and not any(holds(expression, fields, document) for expression in validation.alternatives):
        return document, f"not true: {failed}"
    return document, None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _ids(child: Dataset, fields: Fields, document: Any, body: bytes) -> list[Any]:
    """What a parent's body has where ids of a dataset are looked for; null and an empty text are nothing."""
    partitions = child.partitions
    if partitions.regex:
        found: Any = re.findall(partitions.regex, body.decode("utf-8", "replace"))
    else:
        found = search(partitions.ids or "", fields, document)
    return [value for value in (found if isinstance(found, list) else [found]) if value not in (None, "")]


def _is_id(value: Any) -> bool:
    """Texts and whole numbers are; numbers become text."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def appraise(dataset: Dataset, season: Season | None, day: str | None, facts: Facts, now: float) -> Appraisal:
    """The state of an object, from the facts alone."""
    if facts.skipped is not None:
        return Appraisal(ObjectState.DROPPED, f"skipped: {facts.skipped}")
    if facts.etag is None:
        if not facts.proven:
            return Appraisal(ObjectState.AWAITED)
        if facts.available_at is not None and now < facts.available_at:
            return Appraisal(ObjectState.AWAITED, due_at=facts.available_at)
        return Appraisal(ObjectState.MISSING)
    if facts.valid is False:
        return Appraisal(ObjectState.SUSPECT, facts.verdict)
    if facts.size is not None and facts.size < dataset.validate.min_bytes:
        return Appraisal(ObjectState.SUSPECT, f"{facts.size} bytes, fewer than {dataset.validate.min_bytes}")
    if facts.size is not None and facts.size > dataset.validate.max_bytes:
        return Appraisal(ObjectState.SUSPECT, f"{facts.size} bytes, more than {dataset.validate.max_bytes}")
    freshness, modified = dataset.freshness, facts.modified_at or 0
    if freshness.until:
        if facts.settled is not False:
            return Appraisal(ObjectState.PRESENT)
        if freshness.live and facts.live:
            return Appraisal(ObjectState.STALE, "live", ask_at=modified + freshness.live.every)
        return Appraisal(ObjectState.STALE, "not final yet", ask_at=modified + (freshness.refetch_every or HOUR))
    due_at = min(_refetch_instants(dataset, season, day, facts), default=None)
    if due_at is not None and due_at <= now:
        return Appraisal(ObjectState.STALE, f"last fetched {utc_text(modified)}", ask_at=due_at)
    return Appraisal(ObjectState.PRESENT, due_at=due_at)


def _refetch_instants(dataset: Dataset, season: Season | None, day: str | None, facts: Facts) -> Iterator[int]:
    """When an object that is there and valid must be fetched again. A rule that is met gives no instant."""
    freshness, modified = dataset.freshness, facts.modified_at or 0
    if freshness.live and facts.live:
        yield modified + freshness.live.every
    if freshness.refetch_every:
        yield modified + freshness.refetch_every
    if freshness.refetch_once_after:
        if day:
            following = datetime.date.fromisoformat(day) + datetime.timedelta(days=1)
            once = instant_of(following, datetime.time(), timezone_of(dataset)) + freshness.refetch_once_after
        else:
            once = (facts.seen_at or modified) + freshness.refetch_once_after
        if modified < once:
            yield once
    if season and (freshness.current or freshness.past):
        over = instant_of(season.finish + datetime.timedelta(days=1), datetime.time(), "UTC")
        if modified < over:  # fetched while its season went on: not before the season's end for good
            yield min(modified + freshness.current, over) if freshness.current else over
        elif freshness.past:
            yield modified + freshness.past


def may_still_appear(season: Season | None, day: str | None, now: float) -> bool:
    """Whether a source that does not have an object today may have it tomorrow: its season goes on, or
    its day is less than a week ago, or nothing tells its age."""
    today = day_of(now)
    if day:
        return (today - datetime.date.fromisoformat(day)).days <= 7
    return season is None or today <= season.finish + datetime.timedelta(days=30)


# ---------------------------------------------------------------- Store
# What does exist, behind the same few calls wherever it is. An object is there whole or not at all.
# Headline: Store.


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object as the store lists it."""

    key: str
    size: int  # bytes
    etag: str  # changes whenever the content does
    modified_at: int  # seconds since 1970


PAGE = 1000  # objects compared, sorted or noted in one transaction
Item = TypeVar("Item")


def chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most `size`."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def ascending(listing: Iterator[StoredObject]) -> Iterator[StoredObject]:
    """A listing that must be in key order. Raises OutOfOrderError at the first object that is not."""
    last = ""
    for entry in listing:
        if entry.key <= last:
            raise OutOfOrderError(f"the store listed {entry.key} after {last}", "the next cycle sorts first")
        last = entry.key
        yield entry


def _scratch() -> sqlite3.Connection:
    """A temporary database that spills to disk. Its rows may be taken by one thread after another."""
    scratch = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    scratch.execute("pragma cache_size = -256")  # KiB: several are at work at once
    return scratch


def sort_listing(listing: Iterator[StoredObject]) -> tuple[bool, Iterator[StoredObject]]:
    """Whether a whole listing was in key order, and the listing in that order, by way of a temporary file."""
    scratch = _scratch()
    scratch.execute("create table listing (key text primary key, size, etag, modified_at) without rowid")
    was_ascending, last = True, ""
    for page in chunks(listing, PAGE):
        for entry in page:
            was_ascending, last = was_ascending and entry.key > last, entry.key
        rows = [dataclasses.astuple(entry) for entry in page]
        scratch.executemany("insert or replace into listing values (?, ?, ?, ?)", rows)
    return was_ascending, (StoredObject(*row) for row in scratch.execute("select * from listing order by key"))


class Store(Protocol):
    """What ADCE needs of a store. Every call raises StoreError when the store fails."""

    calls: int  # list requests made so far

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """Every object whose key starts with the prefix, as a stream, in key order where the store has one;
        with `after`, those that come after it in that order."""

    def find(self, key: str) -> StoredObject | None:
        """One object as it would be listed."""

    def read(self, key: str) -> bytes:
        """The content of an object. Raises KeyError when there is none."""

    def write(self, key: str, body: bytes) -> StoredObject:
        """Put an object whole or not at all; durable when this returns."""

    def sweep(self, *, is_known: bool = False) -> None:
        """Make the store usable, and remove what a crash has left half written. One that `is_known` is not made."""


# ---------------------------------------------------------------- Folder
# A store on a disk. Headline: FolderStore.


SORTED_IN_MEMORY = 50_000  # names; a folder of more is sorted on the disk


def sort_names(names: Iterator[str]) -> Iterator[str]:
    """The names in order, without holding them all."""
    first = list(itertools.islice(names, SORTED_IN_MEMORY))
    if len(first) < SORTED_IN_MEMORY:
        yield from sorted(first)
        return
    with contextlib.closing(_scratch()) as scratch:
        scratch.execute("create table names (name text primary key) without rowid")
        for chunk in itertools.chain([first], chunks(names, PAGE)):
            scratch.executemany("insert or ignore into names values (?)", ((name,) for name in chunk))
        for (name,) in scratch.execute("select name from names order by name"):
            yield name


# What such an error says about one place in the store; others are about its disk.
OF_ONE_PLACE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


def _store_error(action: str, error: OSError) -> StoreError:
    kind = UnusablePlaceError if error.errno in OF_ONE_PLACE else StoreError
    return kind(f"cannot {action}: {error.strerror}")


class FolderStore:
    """A folder. Every part of a key is a folder below it; links are never followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls = 0
        self.is_swept = False
        self._counting = threading.Lock()  # guards calls

    def sweep(self, *, is_known: bool = False) -> None:
        """Make the root and its staging folder; remove unfinished files. Where the staging folder of a known store
        is gone, so may be the disk that was mounted there."""
        try:
            staging = self.root / STAGING
            if is_known:
                self.require_mark()
            if self.root.is_symlink() and not self.root.exists():
                raise StoreError(f"the store {self.root} is a link to nothing", "is its disk mounted?")
            staging.mkdir(parents=True, exist_ok=True)
            for leftover in staging.iterdir():
                leftover.unlink()
            (staging / "probe").touch()  # all of it was there already, and may be mounted to be read only
            (staging / "probe").unlink()
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written: {error.strerror}", "see `store:` in adce.yaml"
            ) from error
        self.is_swept = True

    def require_mark(self) -> None:
        """Raises StoreError when this is not the folder that it was."""
        staging = self.root / STAGING
        if not staging.is_dir():
            hint = f"is its disk mounted? if all of it is lost, fill it anew: mkdir -p {staging}"
            raise StoreError(f"the store {self.root} is no longer there: it has no folder {STAGING}", hint)

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """Folder by folder, sorted as S3 sorts: a folder counts as its name with a slash."""
        if not (self.root / STAGING if self.is_swept else self.root).is_dir():
            raise self._gone()
        folder, _, start = prefix.rpartition("/")
        above = f"{folder}/" if folder else ""
        if (self.root / folder).is_dir():
            yield from self._walk(above, start, after)

    def _walk(self, above: str, start: str, after: str) -> Iterator[StoredObject]:
        with self._counting:
            self.calls += 1
        try:
            for name in sort_names(self._names(above, start)):
                key = above + name
                if key <= after and not after.startswith(key):
                    continue
                if name.endswith("/"):
                    yield from self._walk(key, "", after)
                elif key > after:
                    with contextlib.suppress(FileNotFoundError):
                        yield self._stored(key, (self.root / key).lstat())
        except FileNotFoundError:
            return
        except OSError as error:
            raise _store_error(f"list {self.root / above}", error) from error

    def _names(self, above: str, start: str) -> Iterator[str]:
        """The files of one folder, and the folders in it with a slash."""
        with os.scandir(self.root / above) as scan:
            for entry in scan:
                is_folder = entry.is_dir(follow_symlinks=False)
                name = entry.name + "/" * is_folder
                if not (name.startswith(start) or start.startswith(name)) or not name.isprintable():
                    continue
                if (is_folder and (above or entry.name != STAGING)) or entry.is_file(follow_symlinks=False):
                    yield name

    def find(self, key: str) -> StoredObject | None:
        """One file as it would be listed."""
        *folders, name = key.split("/")
        try:
            with self._folder(folders, create=False) as parent:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _store_error(f"look for {key}", error) from error
        return self._stored(key, status) if stat.S_ISREG(status.st_mode) else None

    def read(self, key: str) -> bytes:
        """The content of a file. Raises KeyError when there is none."""
        *folders, name = key.split("/")
        try:
            with self._folder(folders, create=False) as parent:
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                with os.fdopen(descriptor, "rb") as file:
                    return file.read()
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            raise _store_error(f"read {key}", error) from error

    def write(self, key: str, body: bytes) -> StoredObject:
        """Write aside, fsync, rename, fsync the folder: a power cut leaves the old object or the new one."""
        *folders, name = key.split("/")
        temporary = f"{STAGING}/{secrets.token_hex(8)}"
        try:
            with self._folder([], create=False) as root, self._folder(folders, create=True) as parent:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=root)
                try:
                    with os.fdopen(descriptor, "wb") as file:
                        file.write(body)
                        file.flush()
                        os.fsync(file.fileno())
                        status = os.fstat(file.fileno())
                    os.rename(temporary, name, src_dir_fd=root, dst_dir_fd=parent)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=root)
                    raise
                os.fsync(parent)
        except OSError as error:
            raise _store_error(f"write {key}", error) from error
        return self._stored(key, status)

    @contextlib.contextmanager
    def _folder(self, folders: Sequence[str], *, create: bool) -> Iterator[int]:
        """A descriptor of a folder below the root, reached without following a link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            current = os.open(self.root, flags)
        except FileNotFoundError:
            raise self._gone() from None
        try:
            for folder in folders:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=current)
                        os.fsync(current)
                following = os.open(folder, flags | os.O_NOFOLLOW, dir_fd=current)
                os.close(current)
                current = following
            yield current
        finally:
            os.close(current)

    def _gone(self) -> StoreError:
        return StoreError(f"the store {self.root} is not there", "is its disk mounted?")

    @staticmethod
    def _stored(key: str, status: os.stat_result) -> StoredObject:
        return StoredObject(key, status.st_size, f"{status.st_mtime_ns}-{status.st_size}", status.st_mtime_ns // 10**9)


# ---------------------------------------------------------------- Bucket
# A store in S3, and the choice between the two. Headlines: S3Store, open_store().

S3_ENTRY = re.compile(rb"<Contents>(.*?)</Contents>", re.DOTALL)
S3_FIELDS = ("Key", "Size", "ETag", "LastModified")
S3_FIELD = re.compile(f"<({'|'.join(S3_FIELDS)})>([^<]*)</".encode())


def _take_entries(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the entries out of a page before botocore parses it: most of its time went into dates. Keys come
    quoted as for a url when the server obeys boto3's wish for that."""
    body = response_dict["body"]
    if response_dict.get("status_code") == 200 and b"ListBucketResult" not in body:
        raise ValueError("the answer is no listing")
    unquote = urllib.parse.unquote_plus if b"<EncodingType>url</EncodingType>" in body else str
    entries = []
    for match in S3_ENTRY.finditer(body):
        found = dict(S3_FIELD.findall(match[1]))
        if len(found) < len(S3_FIELDS):
            raise ValueError(f"a listed object without {' or '.join(S3_FIELDS)}")
        entries.append(
            StoredObject(
                unquote(html.unescape(found[b"Key"].decode())),
                int(found[b"Size"]),
                html.unescape(found[b"ETag"].decode()).strip('"'),
                int(datetime.datetime.fromisoformat(found[b"LastModified"].decode()).timestamp()),
            )
        )
    customized_response_dict["Entries"] = entries
    response_dict["body"] = S3_ENTRY.sub(b"", body)


class S3Store:
    """A bucket, or what lies below a prefix in one. Credentials and endpoint come from where boto3 looks."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.above = bucket, f"{prefix}/" if prefix else ""
        self.calls = 0
        self._counting = threading.Lock()  # guards calls, and the making of the client

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        import botocore.config

        timeouts = botocore.config.Config(
            connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 3}
        )
        with self._translated("use"):
            client = boto3.session.Session().client("s3", config=timeouts)
        client.meta.events.register("before-parse.s3.ListObjectsV2", _take_entries)
        return client

    def sweep(self, *, is_known: bool = False) -> None:  # noqa: ARG002  # a bucket is never made
        """See that the bucket is there. S3 keeps nothing half written."""
        with self._translated("use"):
            self._client.head_bucket(Bucket=self.bucket)

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """Page by page, a thousand keys a request."""
        more: dict[str, str] = {"StartAfter": self.above + after} if after > prefix else {}
        while True:
            with self._counting:
                self.calls += 1
                client = self._client
            with self._translated("list"):
                page = client.list_objects_v2(Bucket=self.bucket, Prefix=self.above + prefix, **more)
            for entry in page["Entries"]:
                yield StoredObject(entry.key.removeprefix(self.above), entry.size, entry.etag, entry.modified_at)
            if not page.get("IsTruncated"):
                return
            if "NextContinuationToken" not in page:
                raise StoreError(f"s3://{self.bucket} says that its listing goes on, and not where", "try again")
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def find(self, key: str) -> StoredObject | None:
        """One object as it would be listed."""
        try:
            with self._translated(f"look for {key} in"):
                head = self._client.head_object(Bucket=self.bucket, Key=self.above + key)
        except KeyError:
            return None
        return StoredObject(key, head["ContentLength"], head["ETag"].strip('"'), int(head["LastModified"].timestamp()))

    def read(self, key: str) -> bytes:
        """The content of an object. Raises KeyError when there is none."""
        with self._translated(f"read {key} in"):
            return cast(bytes, self._client.get_object(Bucket=self.bucket, Key=self.above + key)["Body"].read())

    def write(self, key: str, body: bytes) -> StoredObject:
        """One PUT, which S3 takes whole or not at all, with a checksum that S3 verifies."""
        with self._translated(f"write {key} to"):
            answer = self._client.put_object(
                Bucket=self.bucket, Key=self.above + key, Body=body, ChecksumAlgorithm="SHA256"
            )
        modified = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return StoredObject(key, len(body), answer["ETag"].strip('"'), int(modified.timestamp()))

    @contextlib.contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        import boto3.exceptions
        import botocore.exceptions

        try:
            yield
        except (
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            boto3.exceptions.Boto3Error,
            ValueError,
        ) as error:
            answer = getattr(error, "response", None) or {}
            if " " not in action and answer.get("Error", {}).get("Code") in ("NoSuchBucket", "404"):
                raise StoreError(f"there is no bucket {self.bucket}", "see `store:` in adce.yaml") from error
            if answer.get("Error", {}).get("Code") in ("NoSuchKey", "404") and " " in action:
                raise KeyError(action) from None
            hint = "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL, or ~/.aws"
            raise StoreError(f"cannot {action} s3://{self.bucket}/{self.above}: {error}", hint) from error


def is_store_known(database: Database, configuration: Configuration) -> bool:
    """Whether this database has been kept for this store before."""
    return bool(database.value("select value from settings where name = 'store'") == configuration.store)


def prepare_store(database: Database, configuration: Configuration, store: Store) -> None:
    """Make the store usable. The one for which this database has been kept before must still be there."""
    database.check_place()
    store.sweep(is_known=is_store_known(database, configuration))
    with database.transaction() as sql:
        sql.execute("insert or replace into settings values ('store', ?)", (configuration.store,))


def open_store(address: str) -> Store:
    """The store at a folder or at s3://bucket/prefix. Nothing is touched yet."""
    if address.startswith("s3://"):
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix.strip("/"))
    return FolderStore(Path(address))


# ---------------------------------------------------------------- Limits
# What may be asked, and when. A request is granted only if, in every window of its source and of all
# together, (in flight) + (finished less than W ago) < N. A request reaches the server between its grant
# and its finish, so no server sees N + 1 of them inside W, whatever the latency. Whoever cannot be granted
# at once stands in line, and later ones are granted only what is left when all before them had theirs.
# Nothing here sleeps, and every function works inside the caller's transaction with a boot time read after
# the transaction began. Headlines: opening(), grant(), release().

GLOBAL = "global"
SEND_WITHIN_SECONDS = 10  # a permit that is not used by then is void
RELEASE_WITHIN_SECONDS = 10  # after the end of the request, before its owner counts as dead
EXPIRE_EVERY = 4  # grants
EXPIRED_AT_ONCE = 16
SETTLING_ROUNDS = 64  # of asking whether at the instant when one limit opens another is in the way


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to send one HTTP request. Boot times."""

    request_id: int
    source: str
    send_before: float
    deadline: float  # counts as finished by then


@dataclass(frozen=True, slots=True)
class Opening:
    """The first instant at which a source can be asked, and what it waits for."""

    at: float  # boot
    reason: str = ""
    is_pause: bool = False
    ready_at: float = field(default=0.0, compare=False)  # boot: its own limits are no longer in the way


# What a source, and all together, have under way, and how many wait longer for it: they are served first.
OBSERVATION = """
    select s.*,
           iif(s.scope = 'global',
               (select coalesce(max(global_number), 0) from requests where global_number is not null),
               (select coalesce(max(source_number), 0) from requests
                 where source = s.scope and source_number is not null)) as finished,
           (select count(*)
              from requests indexed by requests_in_flight
             where finished_at is null and (s.scope = 'global' or source = s.scope)) as in_flight,
           (select min(deadline)
              from requests indexed by requests_in_flight
             where finished_at is null and (s.scope = 'global' or source = s.scope)) as deadline,
           (select count(*)
              from waiters
             where expires_at >= :now
               and iif(s.scope = 'global', ready_at <= :now, source = s.scope)
               and waiter_id < coalesce(
                   (select waiter_id from waiters where source = :source and owner = :owner),
                   9223372036854775807)) as ahead
    from scopes s
    where s.scope in (:source, 'global')
"""


@dataclass(frozen=True, slots=True)
class _Scope:
    """A source, or all together: its limits, and its row of OBSERVATION."""

    name: str
    limits: ScopeLimits
    row: sqlite3.Row

    def finished_at(self, sql: sqlite3.Connection, number: int) -> float:
        """Boot time at which its n-th finished request finished; long ago if its row is gone."""
        if self.name == GLOBAL:
            row = sql.execute("select finished_at from requests where global_number = ?", (number,)).fetchone()
        else:
            row = sql.execute(
                "select finished_at from requests where source = ? and source_number = ?", (self.name, number)
            ).fetchone()
        return cast(float, row[0]) if row else -math.inf

    def tokens(self, now: float) -> float:
        """What is in its bucket."""
        refilled: float = self.row["tokens"] + (now - self.row["tokens_at"]) * self.limits.refill_per_second
        return min(float(self.limits.burst_size or 0), refilled)


def declare_limits(sql: sqlite3.Connection, configuration: Configuration, clock: Clock) -> None:
    """Make the stored limits those of the configuration. What was asked before keeps counting."""
    boot_id, offset = clock.boot_id(), clock.wall() - clock.boot()
    known = sql.execute("select boot_id, wall_offset from boot").fetchone()
    if known and known["boot_id"] != boot_id:
        _carry_over_reboot(sql, known["wall_offset"] - offset)
    sql.execute("insert or replace into boot values (1, ?, ?)", (boot_id, offset))
    sql.execute("delete from windows")
    for scope in (*configuration.sources, GLOBAL):
        limits = configuration.rate_limiting.scopes.get(scope, ScopeLimits())
        sql.execute(
            """
            insert into scopes (scope, granted_at, tokens, tokens_at, paused_until, paused_for, failures, throttles,
                                burst_size, refill_per_second)
            values (?1, 0, coalesce(?2, 0), ?4, 0, 0, 0, 0, ?2, ?3)
            on conflict do update set burst_size = ?2, refill_per_second = ?3
            """,
            (scope, limits.burst_size, limits.refill_per_second, clock.boot()),
        )
        sql.executemany(
            "insert into windows values (?, ?, ?)",
            [(scope, limit.seconds, limit.max_requests) for limit in limits.windows],
        )
    distrust_backup(sql, clock.boot())


def _carry_over_reboot(sql: sqlite3.Connection, shift: float) -> None:
    """Boot times start again at 0: all that was asked before counts as finished at that instant, which
    is later than the truth and so never grants too early. `shift` is the old wall offset less the new one."""
    in_flight = sql.execute("select request_id, source from requests where finished_at is null").fetchall()
    for request_id, source in in_flight:
        _finish(sql, request_id, source, 0.0)
    sql.execute("update requests set granted_at = 0, finished_at = 0, deadline = 0")
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
    """When this source can be asked: `at <= now` means now. Nothing makes it earlier but that a permit is given
    back unused, a place in line given up, or a limit or a pause changed. O(log n) in the stored requests.

    Whoever stood in line before `owner` comes first, and everybody who stands there if `owner` does not."""
    scopes = _observe(sql, limiting, source, now, owner)
    latest, ready_at = Opening(now), now
    for _ in range(SETTLING_ROUNDS):
        at = latest.at
        for scope in scopes:
            for candidate in _openings(sql, scope, limiting.backoff, now, at):
                latest = candidate if candidate.at > latest.at else latest
                ready_at = candidate.at if candidate.at > ready_at and scope.name == source else ready_at
        if latest.at <= at or any(scope.row["ahead"] for scope in scopes):
            break  # by then nothing else is in the way, or nobody knows what the others will have done
    return Opening(latest.at, latest.reason, latest.is_pause, ready_at)


def _observe(
    sql: sqlite3.Connection, limiting: RateLimiting, source: str, now: float, owner: str
) -> tuple[_Scope, ...]:
    """The source and the global scope as they are."""
    rows = sql.execute(OBSERVATION, {"source": source, "owner": owner, "now": now}).fetchall()
    if any((row["deadline"] or now) < now for row in rows):
        _reap(sql, now)
        return _observe(sql, limiting, source, now, owner)
    return tuple(_Scope(row["scope"], limiting.scopes.get(row["scope"], ScopeLimits()), row) for row in rows)


def _openings(
    sql: sqlite3.Connection, scope: _Scope, backoff: Backoff | None, now: float, at: float
) -> Iterator[Opening]:
    """What a scope has against a request at the instant `at`, as far as can be known `now`."""
    if scope.row["paused_until"] > at:
        yield Opening(scope.row["paused_until"], scope.row["reason"] or "paused", is_pause=True)
    if scope.row["throttles"] and scope.row["in_flight"] + scope.row["ahead"]:
        yield Opening(now + 1, "waits for the answer that tells whether it is back")
    for limit in scope.limits.windows:
        name = f"{scope.name}: {limit.max_requests} in {limit.seconds:g} s"
        yield Opening(_window_opens_at(sql, scope, limit, now), f"{name} used up")
        if backoff and limit.max_requests > 1:
            yield Opening(_backoff_ends_at(sql, scope, limit, backoff, now, at), f"{name} nearly used up")
    if scope.limits.burst_size:
        lacking = 1 + scope.row["ahead"] - scope.tokens(now)
        opens_at = now if lacking <= 1e-9 else now + lacking / scope.limits.refill_per_second
        yield Opening(opens_at, f"{scope.name}: bucket of {scope.limits.burst_size} empty")


def _window_opens_at(sql: sqlite3.Connection, scope: _Scope, limit: WindowLimit, now: float) -> float:
    """The rule. With u in flight and k ahead, the (N - u - k)-th last finish must be W ago.

    Some of them may still be to come. The first u of those come now at the earliest, each other one only W
    after the N-th before it, because that is when the rule lets it begin."""
    most, in_flight, finished = limit.max_requests, scope.row["in_flight"], scope.row["finished"]
    to_come: int = in_flight + scope.row["ahead"] - most + 1
    if to_come <= 0:
        return scope.finished_at(sql, finished + to_come) + limit.seconds
    rounds, place = divmod(to_come - 1, most)
    first = now
    if place >= in_flight:
        first = max(now, scope.finished_at(sql, finished + place + 1 - most) + limit.seconds)
    return first + (rounds + 1) * limit.seconds


def _backoff_ends_at(
    sql: sqlite3.Connection, scope: _Scope, limit: WindowLimit, backoff: Backoff, now: float, at: float
) -> float:
    """Past the threshold the delay since the last grant grows with each further request of the window, but
    unless it is strict it is never longer than spreading the rest of the quota evenly over the rest of the
    window asks for: the plain rule leaves 10 to 20% of the quota unused."""
    most, ahead, finished = limit.max_requests, scope.row["ahead"], scope.row["finished"]
    in_flight = scope.row["in_flight"] if at < now + limit.seconds else 0  # by then they may have gone
    numbers = range(max(1, finished - most + 1), finished + 1)
    threshold = math.ceil(most * backoff.threshold_percent / 100)
    if in_flight + len(numbers) + ahead < threshold:
        return at
    position = bisect.bisect_right(numbers, at - limit.seconds, key=lambda number: scope.finished_at(sql, number))
    used = in_flight + len(numbers) - position
    if not threshold <= used + ahead < most:  # nothing to slow down, or nothing left
        return at
    last: float = scope.row["granted_at"] if used >= threshold else at  # those before the threshold go at once
    slowed_ahead = ahead - max(0, threshold - used)
    used = max(used, threshold)
    makes_room_at: float = (
        scope.finished_at(sql, numbers[position]) if position < len(numbers) else now
    ) + limit.seconds
    delay = backoff.initial_delay_seconds * backoff.exponential_factor ** min(used - threshold, 64)
    delay = min(delay, backoff.max_delay_seconds)
    if not backoff.strict:
        delay = min(delay, max(0.0, makes_room_at - last) / (most - used + 1))
    # when the oldest leaves the window there may be less to slow down
    slowed_until: float = max(last + delay, at) + delay * slowed_ahead
    return min(slowed_until, makes_room_at)


def grant(sql: sqlite3.Connection, limiting: RateLimiting, source: str, timeout_seconds: float, now: float) -> Permit:
    """Take the permit that `opening` has promised in this transaction."""
    send_before = now + SEND_WITHIN_SECONDS
    deadline = send_before + timeout_seconds + RELEASE_WITHIN_SECONDS
    if limiting.backoff or any(limits.burst_size for limits in limiting.scopes.values()):
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
    inserted = sql.execute(
        "insert into requests (source, granted_at, deadline) values (?, ?, ?)", (source, now, deadline)
    )
    request_id = cast(int, inserted.lastrowid)
    if request_id % EXPIRE_EVERY == 0:
        _expire(sql, limiting, now)
    return Permit(request_id, source, send_before, deadline)


def release(sql: sqlite3.Connection, permit: Permit, now: float, *, used: bool = True) -> None:
    """The request of a permit is over, or was never sent."""
    if used:
        _finish(sql, permit.request_id, permit.source, now)
    else:
        sql.execute("delete from requests where request_id = ? and finished_at is null", (permit.request_id,))


def _reap(sql: sqlite3.Connection, now: float) -> None:
    """Requests past their deadline have lost their owner: they finish now, not when they were granted."""
    overdue = "select * from requests indexed by requests_in_flight where finished_at is null and deadline < ?"
    for request_id, source, *_ in sql.execute(overdue, (now,)).fetchall():
        _finish(sql, request_id, source, now)


def _finish(sql: sqlite3.Connection, request_id: int, source: str, now: float) -> None:
    sql.execute(
        """
        update requests
        set finished_at = :now,
            source_number = (
                select coalesce(max(source_number), 0) + 1 from requests
                where source = :source and source_number is not null),
            global_number = (
                select coalesce(max(global_number), 0) + 1 from requests where global_number is not null)
        where request_id = :request_id and finished_at is null
        """,
        {"now": now, "source": source, "request_id": request_id},
    )


def _expire(sql: sqlite3.Connection, limiting: RateLimiting, now: float) -> None:
    """Remove a few of the oldest finished requests that no window can count any more. An hour is always kept,
    for limits that are declared, or switched on again, later."""
    horizon = max([HOUR, *(limit.seconds for limits in limiting.scopes.values() for limit in limits.windows)])
    sql.execute(
        """
        delete from requests where request_id in (
            select request_id from (
                select request_id, finished_at
                from requests
                where global_number is not null
                order by global_number
                limit :few
            ) where finished_at <= :before
        )
        """,
        {"few": EXPIRED_AT_ONCE, "before": now - horizon},
    )


# ---------------------------------------------------------------- Pauses
# What the answers of a source say about the source itself. A pause is a pause, whoever asked for it: a
# Retry-After, a block, failures in a row, a person. Headlines: pause(), learn().

LONGEST_RETRY_AFTER = DAY
FIRST_PAUSE_SECONDS = 60
STORE_TROUBLE = "store: "  # how the reason of a pause begins that the store has caused


@dataclass(frozen=True, slots=True)
class Pause:
    """A source is left alone for some time."""

    source: str
    seconds: float
    reason: str


def is_throttling(source: Source, status: int) -> bool:
    """This HTTP status asks to be left alone."""
    return status in (429, 503) or status in source.blocked_when.status


def asked_pause(source: Source, status: int, headers: Mapping[str, str]) -> float | None:
    """Seconds for which such an answer asks; None when it does not say."""
    seconds = parse_retry_after(headers.get("Retry-After"), headers.get("Date"))
    return source.blocked_when.pause_seconds if seconds is None and status in source.blocked_when.status else seconds


def parse_retry_after(text: str | None, date: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3): a number, or a date less the answer's own Date,
    which needs no agreement of clocks. None when it says nothing usable."""
    if text is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}\s*", text):
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text)
        since = email.utils.parsedate_to_datetime(date) if date else datetime.datetime.now(datetime.UTC)
        return max(0.0, (until - since).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def pause(sql: sqlite3.Connection, scope: str, seconds: float, reason: str, now: float) -> None:
    """Leave a source alone; an earlier, longer pause stays."""
    sql.execute(
        """
        update scopes
        set paused_until = :until, paused_for = :seconds, reason = :reason
        where scope = :scope and paused_until < :until
        """,
        {"scope": scope, "until": now + seconds, "seconds": seconds, "reason": reason},
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """How asking a source ended."""

    outcome: Outcome
    text: str = ""
    http_status: int | None = None
    retry_after: float | None = None  # seconds, when it named them


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an answer says about its source."""

    is_source: bool = False  # the source is to blame, and not what it was asked for
    pause: Pause | None = None


def _patience(source: Source, answer: Answer) -> int | None:
    """After how many such answers in a row a source is taken to be away; None: it tells nothing of the kind."""
    if answer.outcome is Outcome.TIMEOUT:
        return source.blocked_when.timeouts_in_a_row
    if answer.outcome is Outcome.ERROR or (answer.outcome is Outcome.HTTP_ERROR and (answer.http_status or 0) >= 500):
        return source.blocked_when.failures_in_a_row
    return SOURCE_FAILURES.get(answer.outcome)


def learn(sql: sqlite3.Connection, source: Source, answer: Answer, now: float) -> Lesson:
    """Note what an answer says about its source; pause it when it is away or asks for that.

    A pause after failures in a row, or for a 429 or 503 without Retry-After, doubles each time until the
    source gives a good answer; meanwhile one request at a time asks whether it is back."""
    scope = sql.execute(
        "select failures, throttles, paused_until from scopes where scope = ?", (source.name,)
    ).fetchone()
    failures, throttles, longest = scope["failures"], scope["throttles"], source.blocked_when.pause_seconds
    growing = min(FIRST_PAUSE_SECONDS * 2.0 ** min(throttles, 30), max(longest, FIRST_PAUSE_SECONDS))
    is_paused = scope["paused_until"] > now  # then this request was granted before that and tells nothing new
    patience, seconds = _patience(source, answer), None
    if answer.outcome is Outcome.THROTTLED:
        seconds, failures = growing, 0
        if answer.retry_after is not None:
            seconds = min(max(answer.retry_after, 0.0), LONGEST_RETRY_AFTER)
    elif patience is not None:
        failures += 1
        if failures >= patience:
            seconds = longest if answer.outcome is Outcome.TIMEOUT else growing
    elif answer.outcome not in (Outcome.LOST, Outcome.STORE_ERROR) and not is_paused:
        failures = throttles = 0
    if answer.retry_after is None and is_paused:
        seconds = None
    if seconds is not None:
        throttles += not (is_paused and throttles)
        pause(sql, source.name, seconds, answer.text, now)
    if (failures, throttles) != (scope["failures"], scope["throttles"]):
        sql.execute("update scopes set failures = ?, throttles = ? where scope = ?", (failures, throttles, source.name))
    # a scraper or a page that fails may be to blame itself; no answer at all twice in a row is not its fault
    doubt = patience if answer.outcome in COUNTED_FAILURES else 2
    return Lesson(
        is_source=patience is not None and failures >= cast(int, doubt),
        pause=None if seconds is None else Pause(source.name, seconds, answer.text),
    )


# ---------------------------------------------------------------- Permits
# The limits for everybody: other threads and processes ask the same sources under the same limits. Whoever
# must wait computes the instant, takes a place in line and sleeps until then, outside every lock.
# Headlines: Limiter, permit().

RUNNER = "runner"  # the owner of the main loop's places in line
LOOK_AGAIN_SECONDS = 5  # the longest sleep: meanwhile a pause may be lifted, a limit raised, a place given up
LATE_SECONDS = 2  # whoever stands in line and has not looked again by then has gone
KEEP_ALIVE_SECONDS = 5
# source and tasks of the attempt for which this thread calls a function; a command has them in its environment
SERVED = contextvars.ContextVar("served", default=("", ""))


def served() -> tuple[str, str]:
    """The source, and the tasks, for which a runner has started what asks; else empty."""
    return SERVED.get() if SERVED.get()[0] else (os.environ.get("ADCE_SOURCE", ""), os.environ.get("ADCE_TASK", ""))


def count_request(sql: sqlite3.Connection, tasks: str) -> None:
    """Another request of the attempt that is running; of a batch, of its first."""
    running = "update attempts set requests = requests + 1 where task_id = cast(? as integer) and outcome = 'running'"
    sql.execute(running, (tasks.partition(",")[0],))


def stand_in_line(sql: sqlite3.Connection, source: str, owner: str, opens: Opening, looks_at: float) -> None:
    """Take a place at the end of the line, or keep the one there is, until its owner looks again."""
    sql.execute(
        """
        insert into waiters (source, owner, ready_at, opens_at, reason, expires_at)
        values (:source, :owner, :ready_at, :opens_at, :reason, :expires_at)
        on conflict do update set
            ready_at = :ready_at, opens_at = :opens_at, reason = :reason, expires_at = :expires_at
        """,
        {
            "source": source,
            "owner": owner,
            "ready_at": opens.ready_at,
            "opens_at": opens.at,
            "reason": opens.reason,
            "expires_at": looks_at + LATE_SECONDS,
        },
    )


def leave_line(sql: sqlite3.Connection, owner: str, now: float, stay: Iterable[str] = ()) -> None:
    """Give up the owner's places, but those for the sources in `stay`; forget who has long gone."""
    sql.execute(
        """
        delete from waiters
        where (owner = :owner and source not in (select value from json_each(:stay)))
           or expires_at < :long_ago
        """,
        {"owner": owner, "stay": json.dumps(list(stay)), "long_ago": now - MINUTE},
    )


def extend(sql: sqlite3.Connection, permit: Permit, deadline: float) -> None:
    """The owner of a permit lives and needs it longer."""
    sql.execute(
        "update requests set deadline = ? where request_id = ? and finished_at is null", (deadline, permit.request_id)
    )


class Held:
    """A permit in use. Tell it how the request ended, and a 429 pauses the source for everybody."""

    def __init__(self, permit: Permit, source: Source) -> None:
        self.permit, self.source = permit, source
        self.answer: Answer | None = None

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        """The source answered with this HTTP status and these headers."""
        outcome, retry_after = Outcome.HTTP_ERROR if status >= 500 else Outcome.OK, None
        if is_throttling(self.source, status):
            outcome, retry_after = Outcome.THROTTLED, asked_pause(self.source, status, headers)
        self.answer = Answer(outcome, f"HTTP {status}", status, retry_after)

    def failed(self, outcome: Outcome, text: str) -> None:
        """No answer came: TIMEOUT, UNREACHABLE or BROKEN, and why."""
        self.answer = Answer(outcome, text)


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in line, and the boot time at which its owner looks again."""

    owner: str
    looks_at: float


class Limiter:
    """The limits of one configuration, shared by the threads of this process and by all processes."""

    def __init__(self, configuration: Configuration, database: Database, clock: Clock | None = None) -> None:
        self.configuration, self.database, self.clock = configuration, database, clock or Clock()
        self._name, self._places = f"{os.getpid()}.{secrets.token_hex(2)}", itertools.count(1)
        self._guard = threading.Lock()  # guards what follows
        self._sleepers: set[queue.SimpleQueue[str]] = set()
        # with its deadline; one that its owner has lost, interrupted, is not kept alive for ever
        self._held: weakref.WeakKeyDictionary[Held, float] = weakref.WeakKeyDictionary()
        self._keeper: threading.Thread | None = None
        self._closed = threading.Event()
        with database.transaction() as sql:
            declare_limits(sql, configuration, self.clock)

    def source(self, name: str) -> Source:
        """The source of that name. Raises Error when there is none."""
        if name not in self.configuration.sources:
            raise Error(f'source "{name}" is not defined{suggest(name, self.configuration.sources)}')
        return self.configuration.sources[name]

    @contextlib.contextmanager
    def permit(self, source: str, wait: float | None = None) -> Iterator[Held]:
        """The right to send one HTTP request: waits until the source can be asked, `wait` seconds at most.

        The request counts as under way until the block ends, however it ends. A block that ends without an
        exception got a good answer, unless it says otherwise. Raises RateLimitedError as soon as `wait` is
        too short as things are, and Error for an unknown source or when closed."""
        held = self.acquire(source, wait)
        try:
            yield held
            if held.answer is None:
                held.answered(200, {})
        finally:
            self.release(held)

    def acquire(self, source: str, wait: float | None = None) -> Held:
        """The same without a block: the caller must release() what it gets."""
        described = self.source(source)
        owner = ""  # of a place in line
        give_up_at = math.inf if wait is None else self.clock.boot() + wait
        try:
            while True:
                granted = self._try(described, owner, give_up_at)
                if isinstance(granted, _Place):
                    owner = granted.owner
                    self._sleep(granted.looks_at)
                elif self.clock.boot() <= granted.send_before:
                    return self._hold(Held(granted, described))
                else:  # this process was suspended, or the disk took very long
                    self.release(Held(granted, described), used=False)
        except BaseException:
            with contextlib.suppress(DatabaseError), self.database.transaction(durable=False) as sql:
                leave_line(sql, owner, self.clock.boot())
            raise

    def _try(self, source: Source, owner: str, give_up_at: float) -> Permit | _Place:
        """A permit, or a place in line."""
        limiting = self.configuration.rate_limiting
        self.database.check_place()
        with self.database.transaction() as sql:
            now = self.clock.boot()
            opens = opening(sql, limiting, source.name, now, owner)
            if opens.at <= now:
                if owner:
                    leave_line(sql, owner, now)
                return grant(sql, limiting, source.name, source.timeout_seconds, now)
            if opens.at > give_up_at:
                wait = format_duration(opens.at - now)
                text = f"{source.name} cannot be asked for another {wait}: {opens.reason}"
                raise RateLimitedError(text, opens.at - now)
            place = _Place(owner or f"{self._name}.{next(self._places)}", min(opens.at, now + LOOK_AGAIN_SECONDS))
            stand_in_line(sql, source.name, place.owner, opens, place.looks_at)
            return place

    def _sleep(self, until: float) -> None:
        wakeups: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._guard:
            self._sleepers.add(wakeups)
        if not self._closed.is_set():
            self.clock.wait(wakeups, until - self.clock.boot())
        with self._guard:
            self._sleepers.discard(wakeups)
        if self._closed.is_set():
            raise Error("the limiter was closed")

    def _hold(self, held: Held) -> Held:
        with self._guard:
            self._held[held] = held.permit.deadline
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep_alive, name="adce-permits", daemon=True)
                self._keeper.start()
        return held

    def _keep_alive(self) -> None:
        """A request that takes longer than its source's timeout goes on counting while this process lives."""
        while not self._closed.wait(KEEP_ALIVE_SECONDS):
            with contextlib.suppress(DatabaseError):
                self._extend_deadlines(self.clock.boot())

    def _extend_deadlines(self, now: float) -> None:
        later = now + 4 * KEEP_ALIVE_SECONDS
        with self._guard:
            due = [held for held, deadline in self._held.items() if deadline - now < 2 * KEEP_ALIVE_SECONDS]
        if due:
            with self.database.transaction(durable=False) as sql:
                for held in due:
                    extend(sql, held.permit, later)
            with self._guard:
                self._held.update({held: later for held in due if held in self._held})

    def release(self, held: Held, *, used: bool = True) -> None:
        """The request is over, or was never sent. What cannot be written now counts until its deadline: that
        is safe.

        Whether an answer is any good is known when the attempt ends that it belongs to, and counts then."""
        with self._guard:
            self._held.pop(held, None)
        is_news = held.answer is not None and held.answer.outcome is not Outcome.OK
        with contextlib.suppress(DatabaseError), self.database.transaction(durable=is_news) as sql:
            now = self.clock.boot()
            release(sql, held.permit, now, used=used)
            source, tasks = served()
            if used and tasks:
                count_request(sql, tasks)
            is_judged_later = held.source.name == source
            if held.answer and not (is_judged_later and held.answer.outcome in (Outcome.OK, Outcome.HTTP_ERROR)):
                learn(sql, held.source, held.answer, now)

    def close(self) -> None:
        """Whoever waits for a permit gets an Error at once. The database stays open."""
        self._closed.set()
        with self._guard:
            for wakeups in self._sleepers:
                wakeups.put("closed")


@functools.cache
def _limiter_of(path: Path, database: Path | None) -> Limiter:
    """One for each process; in one that was forked from it, every use of it is an error."""
    configuration = load_configuration(path)
    return Limiter(configuration, open_database(database or configuration.database))


def shared_limiter(config: str | os.PathLike[str] | None = None) -> Limiter:
    """The limiter of a configuration file: the given one, $ADCE_CONFIG, adce.yaml here, or beside the module.

    Its database is $ADCE_DB when that is set, else the configured one."""
    database = os.environ.get("ADCE_DB")
    path = find_configuration(os.fspath(config) if config is not None else None)
    return _limiter_of(path, Path(database).absolute() if database else None)


def permit(
    source: str, config: str | os.PathLike[str] | None = None, wait: float | None = None
) -> contextlib.AbstractContextManager[Held]:
    """`with adce.permit("espn"): ...` around one HTTP request by any means. See Limiter.permit()."""
    return shared_limiter(config).permit(source, wait)


# ---------------------------------------------------------------- Score
# Which gap matters most. The formula is here and nowhere else: SQL only adds. Headline: rank_of().


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


def bonus_of(weighting: PriorityWeighting, success_rate: float) -> float:
    """The points that all tasks of a dataset have for its success rate."""
    return weighting.success_rate_weight * success_rate if weighting.enabled else 0.0


def score_at(rank: float, slope: float, bonus: float, now: float) -> float:
    """The live score; the view `queue` computes the same."""
    return rank + slope * now / HOUR + bonus


def priority_of(
    dataset: Dataset, season: str | None, day: str | None, today: datetime.date, configuration: Configuration
) -> Priority:
    """How much its gap matters. `auto`: by the age of its date, then of its season."""
    if dataset.priority != "auto":
        return Priority(dataset.priority)
    days = configuration.priority_weighting.critical_within_days
    if day and abs((today - datetime.date.fromisoformat(day)).days) <= days:
        return Priority.CRITICAL
    labels = [season.label for season in configuration.seasons if season.start <= today]
    if season in labels[-1:]:
        return Priority.HIGH
    return Priority.MEDIUM if season in labels[-2:] else Priority.LOW


# ---------------------------------------------------------------- Ledger
# Objects and their tasks, kept in step: whoever learns something of an object notes it here, and its task
# opens, stays or closes in the same transaction. Headline: Ledger.


@dataclass(frozen=True, slots=True)
class KnownObject:
    """A row of objects."""

    object_id: int
    dataset: str
    key: str
    fields_json: str
    season: str | None
    day: str | None
    state: ObjectState
    reason: str | None
    facts: Facts
    read_etag: str | None
    cycle_id: int | None

    @property
    def fields(self) -> Fields:
        """The values of its partition."""
        return cast(Fields, json.loads(self.fields_json))


class Ledger:
    """Objects and tasks as one transaction sees and changes them: no state without its task."""

    def __init__(
        self, sql: sqlite3.Connection, configuration: Configuration, now: float, cycle_id: int | None = None
    ) -> None:
        self.sql, self.configuration, self.now, self.cycle_id = sql, configuration, now, cycle_id
        self.created = self.closed = 0
        self.problems: list[str] = []  # what was named, and cannot be expected
        self.differing: set[int] = set()  # children that may have other fields now; see inherit_fields()
        self.ids: dict[str, int] = dict(sql.execute("select dataset, dataset_id from datasets").fetchall())
        self._names = {number: name for name, number in self.ids.items()}
        self._seasons = {season.label: season for season in configuration.seasons}

    def objects(self, condition: str, parameters: Mapping[str, Any]) -> list[KnownObject]:
        """The objects that meet a condition in SQL."""
        rows = self.sql.execute(f"select * from objects where {condition}", parameters).fetchall()  # noqa: S608
        return [self._known(row) for row in rows]

    def _known(self, row: sqlite3.Row) -> KnownObject:
        facts = Facts(
            available_at=row["available_at"],
            proven=bool(row["proven"]),
            seen_at=row["seen_at"],
            size=row["size"],
            etag=row["etag"],
            modified_at=row["modified_at"],
            valid=None if row["valid"] is None else bool(row["valid"]),
            settled=None if row["settled"] is None else bool(row["settled"]),
            live=None if row["live"] is None else bool(row["live"]),
            verdict=row["verdict"],
            skipped=row["skipped"],
        )
        return KnownObject(
            object_id=row["object_id"],
            dataset=self._names[row["dataset_id"]],
            key=row["key"],
            fields_json=row["fields"],
            season=row["season"],
            day=row["day"],
            state=ObjectState(row["state"]),
            reason=row["reason"],
            facts=facts,
            read_etag=row["read_etag"],
            cycle_id=row["cycle_id"],
        )

    def expect(self, dataset: Dataset, wanted: ExpectedObject, *, proven: bool) -> int:
        """Note that an object should exist, and return its id. Raises ValueError when another has its key."""
        object_id = self._expect_first(dataset, wanted, proven=proven)
        if object_id is not None:
            return object_id
        known = self.objects("key = :key", {"key": wanted.key})[0]
        fields, own = known.fields, dataset.partitions.own_fields()
        is_other = known.dataset != dataset.name or any(fields.get(name) != wanted.fields[name] for name in own)
        if known.state is not ObjectState.DROPPED:
            owner = self.configuration.datasets.get(known.dataset)
            if is_other and owner and makes_key(owner, fields, known.key):
                text = f"{wanted.key} is already the key of another object of {known.dataset}"
                raise ValueError(f"{dataset.name}: {text}; give each a key of its own")
            if not is_other and known.facts.available_at == wanted.available_at and (known.facts.proven or not proven):
                if fields != wanted.fields:
                    self.differing.add(known.object_id)
                return known.object_id
        facts = dataclasses.replace(known.facts, available_at=wanted.available_at, proven=known.facts.proven or proven)
        if known.dataset != dataset.name:  # that has been declared otherwise since
            self.hand_over(known.object_id, dataset.name)
            facts = dataclasses.replace(facts, valid=None, settled=None, live=None, verdict=None)
        self.expect_otherwise(known, dataset, wanted, facts)
        return known.object_id

    def expect_otherwise(self, known: KnownObject, dataset: Dataset, wanted: ExpectedObject, facts: Facts) -> None:
        """An object is expected otherwise than before."""
        self.sql.execute(
            "update objects set fields = ?, season = ?, day = ? where object_id = ?",
            (FIELDS_AS_JSON.encode(wanted.fields), wanted.season, wanted.day, known.object_id),
        )
        self.note(dataclasses.replace(known, dataset=dataset.name, season=wanted.season, day=wanted.day), facts)

    def _expect_first(self, dataset: Dataset, wanted: ExpectedObject, *, proven: bool) -> int | None:
        """The id of an object that nobody has expected before, or None."""
        facts = Facts(available_at=wanted.available_at, proven=proven)
        verdict = appraise(dataset, self._seasons.get(wanted.season or ""), wanted.day, facts, self.now)
        inserted = self.sql.execute(
            """
            insert into objects (dataset_id, key, fields, season, day, state, reason, since, due_at, available_at,
                                 proven)
            values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            on conflict do nothing
            """,
            (
                self.ids[dataset.name],
                wanted.key,
                FIELDS_AS_JSON.encode(wanted.fields),
                wanted.season,
                wanted.day,
                verdict.state,
                verdict.reason,
                int(self.now),
                verdict.due_at,
                wanted.available_at,
                proven,
            ),
        )
        if not inserted.rowcount:
            return None
        object_id = cast(int, inserted.lastrowid)
        if verdict.state in GAPS:
            known = self.objects("object_id = :object_id", {"object_id": object_id})[0]
            self._open_task(known, dataset, verdict)
        return object_id

    def hand_over(self, object_id: int, dataset: str) -> None:
        """Note that an object and its task are those of another dataset, which may judge its content otherwise."""
        self.sql.execute(
            """
            update objects
            set dataset_id = ?, read_etag = null, valid = null, settled = null, live = null, verdict = null,
                due_at = iif(etag is null or state = 'dropped', due_at, 0)
            where object_id = ?
            """,
            (self.ids[dataset], object_id),
        )
        self.sql.execute(
            """
            update tasks set dataset_id = ?
            where object_id = ? and state in ('pending', 'retry', 'running', 'gave_up')
            """,
            (self.ids[dataset], object_id),
        )
        relatives = {child.name for child in self.configuration.children_of(dataset)}
        relatives.add(self.configuration.datasets[dataset].partitions.parent or "")
        links = """
            select parent_id, child_id, dataset
            from links
            join objects on object_id = iif(parent_id = :one, child_id, parent_id)
            join datasets using (dataset_id)
            where parent_id = :one or child_id = :one
        """
        for parent_id, child_id, name in self.sql.execute(links, {"one": object_id}).fetchall():
            if name in self.configuration.datasets and name not in relatives:  # else it may be handed over, too
                self.unlink(parent_id, child_id, keeps=object_id)

    def unlink(self, parent_id: int, child_id: int, keeps: int = 0) -> None:
        """Note that a parent names a child no longer, which is dropped unless another does or it `keeps` its place."""
        self.sql.execute("delete from links where parent_id = ? and child_id = ?", (parent_id, child_id))
        others = """
            select 1
            from links join objects parent on parent.object_id = parent_id
            where child_id = ? and (parent.state != 'dropped' or parent.reason is not null)
        """
        if child_id == keeps or self.sql.execute(others, (child_id,)).fetchone():
            self.differing.add(child_id)
        else:
            self.drop(child_id)

    def drop(self, object_id: int) -> None:
        """Note that an object is no longer expected, nor what it alone has named; what lies in the store is
        left alone. Expected again, it is read again, and skipped if it was."""
        self.sql.execute(
            """
            update objects
            set state = 'dropped', reason = null, due_at = null, read_etag = null, proven = 0, since = ?
            where object_id = ?
            """,
            (int(self.now), object_id),
        )
        self.close_task(object_id, TaskState.CANCELLED)
        orphans = """
            select l.child_id
            from links l
            join objects child on child.object_id = l.child_id
            where l.parent_id = ?
              and (child.state != 'dropped' or child.reason is not null)
              and not exists (
                  select 1
                  from links other
                  join objects parent on parent.object_id = other.parent_id
                  where other.child_id = l.child_id and (parent.state != 'dropped' or parent.reason is not null))
        """
        for (child_id,) in self.sql.execute(orphans, (object_id,)).fetchall():
            self.drop(child_id)
        shared = (
            "select child_id from links join objects on object_id = child_id where parent_id = ? and state != 'dropped'"
        )
        self.differing |= {row[0] for row in self.sql.execute(shared, (object_id,))}

    def note(self, known: KnownObject, facts: Facts, read_etag: str | None = None) -> Appraisal:
        """Write what is now known of an object; open, keep or close its task accordingly."""
        dataset = self.configuration.datasets[known.dataset]
        verdict = appraise(dataset, self._seasons.get(known.season or ""), known.day, facts, self.now)
        self.sql.execute(
            """
            update objects
            set state = :state, reason = :reason, due_at = :due_at,
                since = case when state = :state then since else :now end,
                available_at = :available_at, proven = :proven, seen_at = coalesce(seen_at, :seen_at),
                size = :size, etag = :etag, modified_at = :modified_at,
                read_etag = coalesce(:read_etag, read_etag), valid = :valid, settled = :settled, live = :live,
                verdict = :verdict, skipped = :skipped,
                cycle_id = coalesce(:cycle_id, cycle_id)
            where object_id = :object_id
            """,
            {
                **{name: getattr(facts, name) for name in Facts.__dataclass_fields__},
                "state": verdict.state,
                "reason": verdict.reason,
                "due_at": verdict.due_at,
                "now": int(self.now),
                "seen_at": None if facts.etag is None else int(self.now),
                "read_etag": read_etag,
                "cycle_id": self.cycle_id if read_etag else None,
                "object_id": known.object_id,
            },
        )
        if verdict.state in GAPS:
            self._open_task(known, dataset, verdict)
        elif known.state in GAPS:
            is_dropped = verdict.state is ObjectState.DROPPED
            self.close_task(known.object_id, TaskState.CANCELLED if is_dropped else TaskState.DONE)
        return verdict

    def count_as_unread(self, object_id: int) -> None:
        """Let a cycle look at the content of an object once more."""
        self.sql.execute("update objects set read_etag = null where object_id = ?", (object_id,))

    def _open_task(self, known: KnownObject, dataset: Dataset, verdict: Appraisal) -> None:
        """A gap that has a live task keeps it; only one that changed its kind may be tried at once."""
        waits = verdict.ask_at is not None and verdict.ask_at > self.now
        priority = priority_of(dataset, known.season, known.day, day_of(self.now), self.configuration)
        rank, slope = rank_of(self.configuration.priority_weighting, dataset.source, priority, 1, int(self.now))
        opened = self.sql.execute(
            """
            insert into tasks (object_id, dataset_id, state, priority, detected_at, gap_size, rank, slope, next_at,
                               attempts, failures)
            values (?, ?, ?, ?, ?, 1, ?, ?, ?, 0, 0)
            on conflict do nothing
            """,
            (
                known.object_id,
                self.ids[dataset.name],
                TaskState.RETRY if waits else TaskState.PENDING,
                priority,
                int(self.now),
                rank,
                slope,
                verdict.ask_at if waits else None,
            ),
        )
        self.created += opened.rowcount
        if not opened.rowcount and known.state in GAPS and known.state is not verdict.state and not waits:
            self.sql.execute(
                """
                update tasks set state = 'pending', next_at = null
                where object_id = ? and state in ('pending', 'retry', 'running', 'gave_up')
                  and state = 'retry' and failures = 0
                """,
                (known.object_id,),
            )

    def close_task(self, object_id: int, state: TaskState) -> None:
        """The live task of an object, unless it is running, has nothing left to do."""
        closed = self.sql.execute(
            """
            update tasks
            set state = ?, closed_at = ?, next_at = null
            where object_id = ? and state in ('pending', 'retry', 'running', 'gave_up') and state != 'running'
            """,  # with the very words of the index live_tasks, which else is not used
            (state, int(self.now), object_id),
        )
        self.closed += closed.rowcount


# ---------------------------------------------------------------- Children
# Which objects are expected because others name them. Headlines: add_children(), drop_children().


def add_children(ledger: Ledger, parent: KnownObject, found: Inspection, *, proven: bool) -> set[int]:
    """Expect what the body of a parent names. Returns which of its children it names no longer: none, as long as
    it names something that cannot be expected, and may stand for one of them."""
    named, problems = set(), list(found.no_ids)
    for name, identities in found.children.items():
        dataset = ledger.configuration.datasets[name]
        for fields in children_of_parent(dataset, parent.fields, identities):
            try:
                wanted = expected_object(dataset, fields, ledger.configuration.seasons)
                named.add(ledger.expect(dataset, wanted, proven=proven))
            except ValueError as error:
                problems.append(str(error))
    ledger.problems += [f"{parent.key}: {problem}" for problem in problems]
    linked = {
        row[0] for row in ledger.sql.execute("select child_id from links where parent_id = ?", (parent.object_id,))
    }
    ledger.sql.executemany("insert into links values (?, ?)", [(parent.object_id, child) for child in named - linked])
    shared = """
        select child_id
        from links
        where child_id in (select value from json_each(?))
        group by child_id
        having count(*) > 1
    """
    ledger.differing |= {row[0] for row in ledger.sql.execute(shared, (json.dumps(list(named - linked)),))}
    inherit_fields(ledger)
    return set() if problems else linked - named


def drop_children(ledger: Ledger, parent_id: int, children: Iterable[int]) -> None:
    """A parent names these no longer: drop those that no other names."""
    for child in children:
        ledger.unlink(parent_id, child)
    inherit_fields(ledger)


def inherit_fields(ledger: Ledger) -> None:
    """Give children whose parents have changed the fields of those that they have now."""
    while ledger.differing:
        _inherit(ledger, ledger.differing.pop())


def _inherit(ledger: Ledger, child_id: int) -> None:
    """Give a child, and its children, the fields, such as the day, of the first of the parents that name it."""
    child = ledger.objects("object_id = :child", {"child": child_id})[0]
    dataset = ledger.configuration.datasets.get(child.dataset)
    first = """
        object_id in (select parent_id from links where child_id = :child)
        and (state != 'dropped' or reason is not null)
        order by key limit 1
    """
    parents = ledger.objects(first, {"child": child_id})
    if parents and dataset:
        own = child.fields.keys() & dataset.partitions.own_fields()
        fields = {**parents[0].fields, **{name: child.fields[name] for name in own}}
        if makes_key(dataset, fields, child.key) and fields != child.fields:
            wanted = expected_object(dataset, fields, ledger.configuration.seasons)
            ledger.expect_otherwise(child, dataset, wanted, child.facts)
            for (heir,) in ledger.sql.execute("select child_id from links where parent_id = ?", (child_id,)).fetchall():
                _inherit(ledger, heir)


# ---------------------------------------------------------------- Upkeep
# What a changed configuration, and time alone, mean for what is stored. Headlines: declare_datasets(),
# note_due_objects().


DROPPED_OBJECTS, DROPPED_SHARE = 100, 0.5  # more than both at once needs a word of the operator


def is_mass_drop(before: int, after: int) -> bool:
    """Whether so much less is expected than before that an error in adce.yaml is more likely than a wish."""
    return before - after > max(DROPPED_OBJECTS, DROPPED_SHARE * before)


EXPECTED = """
    select coalesce(sum(objects), 0)
           + (select count(*) from objects where skipped is not null and reason is not null)
    from counts
    where state != 'dropped'
"""
NOT_EXPECTED = """
    select coalesce(sum(objects), 0)
           - (select count(*) from objects where skipped is not null and reason is not null)
    from counts
    where state = 'dropped'
"""
DECLARED = "select group_concat(definition, ' ') from (select definition from datasets where active order by dataset)"
IS_CHANGED = f"select coalesce((select value from settings where name = 'declared'), '') is not ({DECLARED})"  # noqa: S608


def note_good_cycle(sql: sqlite3.Connection) -> None:
    """What is declared, expected and not expected now is what later changes are measured by."""
    for name, query in (("declared", DECLARED), ("expected", EXPECTED), ("not expected", NOT_EXPECTED)):
        value = sql.execute(query).fetchone()[0]
        sql.execute("insert or replace into settings values (?, ?)", (name, str(value)))


def is_changed(sql: sqlite3.Connection) -> bool:
    """Whether the datasets are declared otherwise than at the last good cycle."""
    return bool(sql.execute(IS_CHANGED).fetchone()[0])


@contextlib.contextmanager
def guarded_drops(sql: sqlite3.Connection, *, consents: bool) -> Iterator[None]:
    """Raises MassDropError, so that all is rolled back, when a changed configuration expects far less after the block
    than at the last good cycle, or before the block: a change may take several steps."""

    def noted(name: str, query: str) -> int:
        last = sql.execute("select cast(value as integer) from settings where name = ?", (name,)).fetchone()
        return cast(int, (last or sql.execute(query).fetchone())[0])

    before, not_expected = noted("expected", EXPECTED), noted("not expected", NOT_EXPECTED)
    yield
    if not is_changed(sql):
        return  # days have passed, or the source names other things: adce.yaml is not to blame
    dropped = sql.execute(NOT_EXPECTED).fetchone()[0] - not_expected
    if is_mass_drop(before, before - dropped) and not consents:
        raise MassDropError(
            f"adce.yaml no longer expects {dropped:,} of the {before:,} objects that it did",
            "see the difference with: adce.py plan; if it is meant, say --yes",
        )


def may_be_refused(database: Database) -> bool:
    """Whether the first cycle with a changed configuration has yet to see how much that drops, and what fields its
    objects have now."""
    has_been_good = database.value("select exists (select 1 from settings where name = 'declared')")
    return bool(has_been_good and database.value(IS_CHANGED))


def declare_datasets(
    sql: sqlite3.Connection, configuration: Configuration, now: float, *, consents: bool = False
) -> None:
    """Make the stored datasets those of the configuration; cancel what is no longer declared.

    Raises MassDropError when that is most of what was expected, and the operator has not consented."""
    weighting = configuration.priority_weighting
    were_active = {row[0] for row in sql.execute("select dataset from datasets where active").fetchall()}
    changed: list[Dataset] = []
    sql.execute("update datasets set active = 0")
    for dataset in configuration.datasets.values():
        parts: tuple[Any, ...] = (dataset.key.text, dataset.partitions, dataset.freshness, dataset.validate)
        parts += (dataset.available_after, configuration.seasons)
        definition = hashlib.sha256(repr(parts).encode()).hexdigest()
        known = sql.execute("select * from datasets where dataset = ?", (dataset.name,)).fetchone()
        if known is None:
            sql.execute(
                "insert into datasets values (null, ?, ?, 1, ?, '', 1.0, 0)", (dataset.name, dataset.source, definition)
            )
        if known is None or known["definition"] != definition or dataset.name not in were_active:
            _forget_readings(sql, dataset)
            changed.append(dataset)
        sql.execute(
            "update datasets set active = 1, source = ?, definition = ? where dataset = ?",
            (dataset.source, definition, dataset.name),
        )
    for row in sql.execute("select dataset_id, success_rate from datasets").fetchall():
        sql.execute("update datasets set bonus = ? where dataset_id = ?", (bonus_of(weighting, row[1]), row[0]))
    heirs = [dataset for dataset in configuration.datasets.values() if dataset.name not in were_active]
    ledger = Ledger(sql, configuration, now)
    with guarded_drops(sql, consents=consents):
        _dissolve_datasets(ledger, heirs)
        _unlink_strangers(ledger, changed)
        inherit_fields(ledger)


def _dissolve_datasets(ledger: Ledger, heirs: Sequence[Dataset]) -> None:
    """What is left of datasets that are declared no longer goes to those that make the same keys, as when only the
    name has changed, or is dropped."""
    rows = ledger.sql.execute(
        """
        select object_id, key, fields, exists (select 1 from links where child_id = object_id) as is_child
        from objects join datasets using (dataset_id)
        where not active and (state != 'dropped' or reason is not null)
        """
    ).fetchall()
    without_heir = []
    for object_id, key, fields_json, is_child in rows:
        fields = json.loads(fields_json)
        alike = (heir for heir in heirs if is_child == bool(heir.partitions.parent) and makes_key(heir, fields, key))
        if heir := next(alike, None):
            ledger.hand_over(object_id, heir.name)
        else:
            without_heir.append(object_id)
    for object_id in without_heir:
        ledger.drop(object_id)


def _unlink_strangers(ledger: Ledger, changed: Iterable[Dataset]) -> None:
    """What was named by the objects of another dataset than the one that names it now."""
    strange = """
        select parent_id, child_id
        from objects child
        join links on child_id = child.object_id
        join objects parent on parent.object_id = parent_id
        where child.dataset_id = ? and parent.dataset_id is not ?
    """
    for dataset in changed:
        parent = ledger.ids.get(dataset.partitions.parent or "")
        for link in ledger.sql.execute(strange, (ledger.ids[dataset.name], parent)).fetchall():
            ledger.unlink(*link)


def _forget_readings(sql: sqlite3.Connection, dataset: Dataset) -> None:
    """A new or changed declaration: look at its objects, and at the parents that name them, once more."""
    sql.execute("update datasets set expansion = '' where dataset = ?", (dataset.name,))
    sql.execute(
        """
        update objects
        set read_etag = null, valid = null, settled = null, live = null,
            due_at = iif(etag is null or state = 'dropped', due_at, 0)
        where dataset_id = (select dataset_id from datasets where dataset = ?)
        """,
        (dataset.name,),
    )
    sql.execute(
        "update objects set read_etag = null where dataset_id = (select dataset_id from datasets where dataset = ?)",
        (dataset.partitions.parent,),
    )


class Ids:
    """A set of ids, a bit for each: those of ten million objects take little more than a megabyte."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def update(self, numbers: Sequence[int]) -> None:
        """Put some in."""
        self._bits.extend(bytes(max(0, (max(numbers, default=-1) >> 3) + 1 - len(self._bits))))
        for number in numbers:
            self._bits[number >> 3] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        return number >> 3 < len(self._bits) and bool(self._bits[number >> 3] >> (number & 7) & 1)

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()


def no_longer_expected(database: Database, dataset: str, wanted: Ids) -> Iterator[int]:
    """The objects of a dataset that are not `wanted`."""
    known = database.value(
        """
        select (
            select coalesce(sum(objects), 0)
            from counts
            where counts.dataset_id = datasets.dataset_id and state != 'dropped')
        + (
            select count(*)
            from objects
            where objects.dataset_id = datasets.dataset_id and skipped is not null and reason is not null)
        from datasets
        where dataset = ?
        """,
        (dataset,),
    )
    if known == len(wanted):
        return  # all of them
    after = 0
    page = """
        select object_id
        from objects join datasets using (dataset_id)
        where dataset = ? and (state != 'dropped' or reason is not null) and object_id > ?
        order by object_id
        limit ?
    """
    while rows := database.read(page, (dataset, after, PAGE)):
        after = rows[-1][0]
        yield from (row[0] for row in rows if row[0] not in wanted)


def reprioritise(sql: sqlite3.Connection, configuration: Configuration, now: float) -> None:
    """Priority and rank of every live task, as of now: days pass, weights and batches change."""
    rows = sql.execute(
        """
        select t.task_id, t.priority, t.detected_at, t.gap_size, t.rank, t.slope, o.season, o.day, o.fields, d.dataset
        from tasks t
        join objects o using (object_id)
        join datasets d on d.dataset_id = t.dataset_id
        where t.state in ('pending', 'retry', 'running', 'gave_up') and d.active
        """
    ).fetchall()
    groups: dict[tuple[str, str], int] = {}
    for row in rows:
        if batch := configuration.datasets[row["dataset"]].batch:
            group = (row["dataset"], json.loads(row["fields"])[batch.by])
            groups[group] = min(groups.get(group, 0) + 1, batch.max)
    changes = []
    for row in rows:
        dataset = configuration.datasets[row["dataset"]]
        size = groups[row["dataset"], json.loads(row["fields"])[dataset.batch.by]] if dataset.batch else 1
        priority = priority_of(dataset, row["season"], row["day"], day_of(now), configuration)
        rank, slope = rank_of(configuration.priority_weighting, dataset.source, priority, size, row["detected_at"])
        if (priority, size, rank, slope) != (row["priority"], row["gap_size"], row["rank"], row["slope"]):
            changes.append((priority, size, rank, slope, row["task_id"]))
    sql.executemany("update tasks set priority = ?, gap_size = ?, rank = ?, slope = ? where task_id = ?", changes)


FORGOTTEN_AT_ONCE = 500  # rows of a kind


def forget(sql: sqlite3.Connection, before: float) -> int:
    """Remove some of the attempts, closed tasks and cycles from before an instant; the sums of the days stay, and
    so does the last cycle. Returns how many rows: FORGOTTEN_AT_ONCE or more mean that there may be more."""
    oldest = "select attempt_id, started_at, outcome from attempts order by attempt_id limit ?"
    attempts = itertools.takewhile(
        lambda row: row["started_at"] < before, sql.execute(oldest, (FORGOTTEN_AT_ONCE,)).fetchall()
    )
    ended = [(row["attempt_id"],) for row in attempts if row["outcome"] != Outcome.RUNNING]
    sql.executemany("delete from attempts where attempt_id = ?", ended)
    tasks = """
        delete from tasks where task_id in (
            select task_id from tasks t
            where closed_at < :before
              and not exists (select 1 from attempts a where a.task_id = t.task_id)
              and object_id not in (select object_id from objects where skipped is not null)
            limit :most)
    """
    cycles = """
        delete from reconciliations where cycle_id in (
            select cycle_id from reconciliations
            where started_at < :before and cycle_id < (select max(cycle_id) from reconciliations)
            order by cycle_id limit :most)
    """
    limits = {"before": int(before), "most": FORGOTTEN_AT_ONCE}
    sql.execute("delete from orders where asked_at < ? and cycle_id is not null", (int(before),))
    sql.execute("delete from notices where made_at < ?", (int(before),))
    sql.execute(
        "delete from alerts where ended_at < ? and alert_id not in (select alert_id from notices)", (int(before),)
    )
    return len(ended) + sql.execute(tasks, limits).rowcount + sql.execute(cycles, limits).rowcount


def note_due_objects(database: Database, configuration: Configuration, clock: Clock) -> int:
    """Appraise up to a page of objects whose instant has come. Returns how many."""
    with database.transaction() as sql:
        ledger = Ledger(sql, configuration, clock.wall())
        due = ledger.objects(
            "due_at is not null and due_at <= :now order by due_at limit :page",
            {"now": int(clock.wall()), "page": PAGE},
        )
        for target in due:
            ledger.note(target, target.facts)
    return len(due)


# ---------------------------------------------------------------- Queue
# What is to be done, and in which order: the best task whose source can be asked now is taken together
# with its permit. Headline: claim().

SUCCESS_MEMORY = 0.1  # weight of the latest attempt in a dataset's success rate


@dataclass(frozen=True, slots=True)
class ClaimedTask:
    """One task of a claim, and the attempt at it."""

    task_id: int
    attempt_id: int
    priority: str
    target: KnownObject


@dataclass(frozen=True, slots=True)
class Claim:
    """What one execution has to do: one task, or several for a batch."""

    dataset: Dataset
    source: Source
    tasks: tuple[ClaimedTask, ...]
    permit: Permit | None  # commands and calls ask for their own
    is_alone: bool = False  # nothing else may run beside it


@dataclass(frozen=True, slots=True)
class Result:
    """How the attempt at one object ended."""

    outcome: Outcome
    error: str | None = None
    http_status: int | None = None
    stored: StoredObject | None = None
    inspection: Inspection | None = None
    requests: int = 0
    retry_after: float | None = None  # seconds, when a throttling source named them, or a permit was refused
    redirect: str | None = None  # the answer was: ask there
    output: str | None = None  # the end of what a command printed


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of a task."""

    task: ClaimedTask
    result: Result
    state: TaskState
    failures: int
    next_at: int | None
    counted: bool  # the attempt counts towards retry.max_attempts


def wake_retries(sql: sqlite3.Connection, before: float) -> None:
    """Retries whose instant has come may be claimed again."""
    sql.execute(
        "update tasks set state = 'pending', next_at = null where state = 'retry' and next_at <= ?", (int(before),)
    )


def claim(
    sql: sqlite3.Connection,
    configuration: Configuration,
    clock: Clock,
    busy: Mapping[str, int],
    free: int,
) -> tuple[Claim | None, dict[str, Opening]]:
    """Take the best task whose source can be asked now, with its permit; else, what each source waits for.

    One head per dataset is compared, so the cost does not grow with the queue. `busy` counts what runs
    now, by dataset; `free` are the workers that have nothing to do.

    A task that has seen nearly `max_attempts` runners die may be what kills them, or may only have been at
    work beside that one: it waits until nothing else runs, and runs alone."""
    now, workers = clock.boot(), configuration.max_concurrent_scrapers
    heads = sql.execute(
        """
        select t.task_id, t.rank, t.slope, t.detected_at, t.deaths, d.dataset, d.dataset_id, d.source, d.bonus,
               s.throttles > 0 as is_probed, s.paused_until > ? as is_paused
        from datasets d
        join tasks t on t.task_id = (
            select task_id from tasks
            where dataset_id = d.dataset_id and state = 'pending'
            order by rank desc, task_id
            limit 1)
        join scopes s on s.scope = d.source
        where d.active
        """,
        (now,),
    ).fetchall()
    wall = clock.wall()
    heads.sort(key=lambda h: (-score_at(h["rank"], h["slope"], h["bonus"], wall), h["detected_at"], h["task_id"]))
    wanted = {head["source"] for head in heads if not head["is_paused"]}
    held = collections.Counter[str]()  # workers, by source
    for name, count in busy.items():
        held[configuration.datasets[name].source] += count
    openings: dict[str, Opening] = {}
    claimed = None
    for head in heads:
        source, dataset = configuration.sources[head["source"]], configuration.datasets[head["dataset"]]
        most = 1 if head["is_probed"] else source.max_concurrent
        if held[source.name] >= most or busy.get(dataset.name, 0) >= (dataset.max_concurrent or most):
            continue
        if held[source.name] and free <= _workers_for_others(dataset, wanted, held):
            continue
        if source.name not in openings:
            openings[source.name] = opening(sql, configuration.rate_limiting, source.name, now, RUNNER)
        if openings[source.name].at <= now:
            is_alone = head["deaths"] >= configuration.retry.deadly()
            if is_alone and free < workers:
                del openings[source.name]
                break
            granted = None
            if dataset.url:
                granted = grant(sql, configuration.rate_limiting, source.name, source.timeout_seconds, now)
            claimed = Claim(dataset, source, _take(sql, configuration, dataset, head, wall), granted, is_alone)
            break
    await_openings(sql, configuration, openings, now)
    return claimed, openings


def _workers_for_others(dataset: Dataset, wanted: set[str], held: Mapping[str, int]) -> int:
    """How many workers are left to other sources that have work and none: one, and one for each by programs and
    functions, because what has died holds its workers until a timeout, and theirs are long."""
    rivals = sum(not held[name] for name in wanted - {dataset.source})
    return min(rivals, 1) if dataset.url else rivals


def await_openings(
    sql: sqlite3.Connection, configuration: Configuration, openings: Mapping[str, Opening], now: float
) -> None:
    """The runner stands in line, among other processes, for the sources that it waits for and for no others."""
    awaited = {source: opens for source, opens in openings.items() if opens.at > now}
    for source, opens in awaited.items():
        stand_in_line(sql, source, RUNNER, opens, min(opens.at, now + configuration.queue_check_seconds))
    leave_line(sql, RUNNER, now, awaited)


def _take(
    sql: sqlite3.Connection, configuration: Configuration, dataset: Dataset, head: sqlite3.Row, wall: float
) -> tuple[ClaimedTask, ...]:
    """Start an attempt at the head of a dataset's queue, and at those that go with it in a batch."""
    by, most = (dataset.batch.by, dataset.batch.max) if dataset.batch else ("", 1)
    deadly = configuration.retry.deadly()
    if head["deaths"] >= deadly:
        most = 1
    rows = sql.execute(
        """
        select t.task_id, t.priority, t.object_id
        from tasks t join objects o using (object_id)
        where t.dataset_id = :dataset_id and t.state = 'pending'
          and (t.task_id = :head
               or (t.deaths < :deadly and o.fields ->> :by = (
                   select h.fields ->> :by from objects h join tasks using (object_id) where task_id = :head)))
        order by t.task_id != :head, t.rank desc, t.task_id
        limit :most
        """
        if most > 1
        else "select task_id, priority, object_id from tasks where task_id = :head",
        {"dataset_id": head["dataset_id"], "head": head["task_id"], "by": by, "most": most, "deadly": deadly},
    ).fetchall()
    ledger, taken = Ledger(sql, configuration, wall), []
    for row in rows:
        begin = "insert into attempts (task_id, started_at, outcome, requests) values (?, ?, 'running', 0)"
        attempt_id = cast(int, sql.execute(begin, (row["task_id"], wall)).lastrowid)
        sql.execute(
            """
            update tasks set state = 'running', attempt_id = ?, attempts = attempts + 1, next_at = null
            where task_id = ?
            """,
            (attempt_id, row["task_id"]),
        )
        target = ledger.objects("object_id = :object_id", {"object_id": row["object_id"]})[0]
        taken.append(ClaimedTask(row["task_id"], attempt_id, row["priority"], target))
    return tuple(taken)


# ---------------------------------------------------------------- Endings
# What becomes of a task when an attempt at it ends: its next state, its attempt, the sums of its day.
# Headlines: finish(), requeue_orphans().


def retry_delay(policy: Retry, times: int, dice: random.Random) -> float:
    """Seconds before the next attempt, after so many: doubled each time, a quarter more or less by chance."""
    growing = policy.initial_delay_seconds * 2.0 ** min(times - 1, 40)
    return min(growing * dice.uniform(0.75, 1.25), policy.max_delay_seconds)


def finish(
    ledger: Ledger, claimed: Claim, results: Sequence[Result], clock: Clock, dice: random.Random
) -> tuple[list[Ending], Pause | None]:
    """Record how a claim ended: requests, attempts, objects, tasks, all in the caller's transaction.

    An attempt that is no longer the one its task waits for changes nothing but its own row."""
    now = clock.boot()
    sql, lesson = ledger.sql, Lesson()
    telling = min(results, key=_news)  # of a batch
    if claimed.permit:
        release(sql, claimed.permit, now, used=any(result.requests for result in results))
    if not claimed.dataset.url or any(result.requests for result in results):
        text = telling.error or telling.outcome
        answer = Answer(telling.outcome, text, telling.http_status, telling.retry_after)
        lesson = learn(sql, claimed.source, answer, now)
    pausing = lesson.pause
    if telling.outcome is Outcome.STORE_ERROR:
        pausing = Pause(GLOBAL, FIRST_PAUSE_SECONDS, f"{STORE_TROUBLE}{telling.error}")
        pause(sql, GLOBAL, pausing.seconds, pausing.reason, now)
    least = pausing.seconds if pausing else 0.0

    def delay(times: int) -> float:
        return max(least, retry_delay(ledger.configuration.retry, times, dice))

    endings = []
    for task, result in zip(claimed.tasks, results, strict=True):
        _record_attempt(ledger, claimed.dataset, task, result)
        row = sql.execute(
            "select * from tasks where task_id = ? and state = 'running' and attempt_id = ?",
            (task.task_id, task.attempt_id),
        ).fetchone()
        if row is not None:
            endings.append(_settle(ledger, task, result, row, lesson, delay))
    return endings, pausing


def _news(result: Result) -> int:
    """What one result of a batch tells of all: that the store fails, that the source works, anything else."""
    return (Outcome.STORE_ERROR, Outcome.OK, result.outcome).index(result.outcome)


def _settle(
    ledger: Ledger,
    task: ClaimedTask,
    result: Result,
    row: sqlite3.Row,
    lesson: Lesson,
    delay: Callable[[int], float],
) -> Ending:
    """The next state of a task. It is done only when its object is whole in the store and no longer a gap."""
    sql = ledger.sql
    known = ledger.objects("object_id = :object_id", {"object_id": task.target.object_id})[0]
    season = next((season for season in ledger.configuration.seasons if season.label == known.season), None)
    counted = (not lesson.is_source and result.outcome in (*COUNTED_FAILURES, *SOURCE_FAILURES, Outcome.TIMEOUT)) or (
        result.outcome is Outcome.NOT_YET and not may_still_appear(season, known.day, ledger.now)
    )
    failures = 0 if result.outcome is Outcome.OK else row["failures"] + counted
    next_at: int | None = None
    if known.state is ObjectState.DROPPED:
        state = TaskState.CANCELLED
    elif result.retry_after is not None and result.outcome is Outcome.LOST:
        state, next_at = TaskState.RETRY, int(ledger.now + result.retry_after) + 1
    elif result.outcome is Outcome.OK or result.outcome is Outcome.LOST:
        state = TaskState.PENDING
    elif failures >= ledger.configuration.retry.max_attempts:
        state = TaskState.GAVE_UP
    else:
        state = TaskState.RETRY
        next_at = int(ledger.now + delay(failures if counted else _fruitless(sql, task) - failures)) + 1
    closed_at = int(ledger.now) if state is TaskState.CANCELLED else None
    sql.execute(
        """
        update tasks
        set state = ?, failures = ?, deaths = 0, next_at = ?, last_error = ?, attempt_id = null, closed_at = ?
        where task_id = ?
        """,
        (state, failures, next_at, result.error, closed_at, task.task_id),
    )
    if result.outcome is Outcome.OK and result.stored and state is TaskState.PENDING:
        state, next_at = _note_stored(ledger, known, result, task.task_id)
    return Ending(task, result, state, failures, next_at, counted)


def _fruitless(sql: sqlite3.Connection, task: ClaimedTask) -> int:
    """How many attempts at a task have failed since one last brought its object; a stop is no failure."""
    query = """
        select count(*) from attempts
        where task_id = :id and outcome != 'lost'
          and attempt_id > (select coalesce(max(attempt_id), 0) from attempts where task_id = :id and outcome = 'ok')
    """
    return cast(int, sql.execute(query, {"id": task.task_id}).fetchone()[0])


def _note_stored(ledger: Ledger, known: KnownObject, result: Result, task_id: int) -> tuple[TaskState, int | None]:
    """The object is in the store. The task closes, or waits when the object is not final yet."""
    stored, inspection = result.stored, result.inspection
    assert stored and inspection
    facts = dataclasses.replace(
        known.facts,
        proven=True,
        size=stored.size,
        etag=stored.etag,
        modified_at=stored.modified_at,
        valid=inspection.valid,
        settled=inspection.settled,
        live=inspection.live,
        verdict=inspection.verdict,
    )
    verdict = ledger.note(known, facts, read_etag=stored.etag)
    told = len(ledger.problems)
    if add_children(ledger, known, inspection, proven=True) or len(ledger.problems) > told:
        ledger.count_as_unread(known.object_id)  # a cycle drops what is named no longer, if that can be believed
    if verdict.state not in GAPS:
        ledger.close_task(known.object_id, TaskState.DONE)  # also when it was no gap any more before
        return TaskState.DONE, None
    ledger.sql.execute("update tasks set state = 'retry', next_at = ? where task_id = ?", (verdict.ask_at, task_id))
    return TaskState.RETRY, verdict.ask_at


def _record_attempt(ledger: Ledger, dataset: Dataset, task: ClaimedTask, result: Result) -> None:
    sql = ledger.sql
    size = result.stored.size if result.stored else None
    ended = sql.execute(
        """
        update attempts
        set outcome = :outcome, seconds = max(0, :now - started_at), http_status = :http_status, bytes = :bytes,
            requests = requests + :requests, error = :error, output = :output
        where attempt_id = :attempt_id and outcome = 'running'
        """,
        {
            "outcome": result.outcome,
            "now": ledger.now,
            "http_status": result.http_status,
            "bytes": size,
            "requests": result.requests,
            "error": result.error,
            "output": result.output or None,
            "attempt_id": task.attempt_id,
        },
    )
    if not ended.rowcount:
        return
    _add_to_totals(sql, task.attempt_id)
    if result.outcome in RELIABILITY:
        rate = sql.execute("select success_rate from datasets where dataset = ?", (dataset.name,)).fetchone()[0]
        rate += SUCCESS_MEMORY * ((result.outcome is Outcome.OK) - rate)
        bonus = bonus_of(ledger.configuration.priority_weighting, rate)
        sql.execute("update datasets set success_rate = ?, bonus = ? where dataset = ?", (rate, bonus, dataset.name))


def _add_to_totals(sql: sqlite3.Connection, attempt_id: int) -> None:
    """An attempt has ended: add it to the sums of its day."""
    sql.execute(
        """
        insert into daily_totals
        select date(started_at + seconds, 'unixepoch'), dataset_id, priority, outcome, 1, seconds, coalesce(bytes, 0)
        from attempts a join tasks using (task_id)
        where a.attempt_id = ?
        on conflict do update set
            attempts = attempts + 1, seconds = seconds + excluded.seconds, bytes = bytes + excluded.bytes
        """,
        (attempt_id,),
    )


RUNNER_DIED = "the runner died"


def requeue_orphans(sql: sqlite3.Connection, policy: Retry, now: float) -> int:
    """After a crash: what was running is pending again, and its attempt is lost. Returns how many.

    A task that has seen `max_attempts` runners die in a row may be what kills them, and has given up."""
    lose = "update attempts set outcome = 'lost', seconds = 0, error = ? where outcome = 'running' returning attempt_id"
    for row in sql.execute(lose, (RUNNER_DIED,)).fetchall():
        _add_to_totals(sql, row[0])
    requeue = """
        update tasks
        set attempt_id = null,
            deaths = deaths + 1,
            state = case
                when object_id in (select object_id from objects where state = 'dropped') then 'cancelled'
                when deaths + 1 >= :most then 'gave_up'
                else 'pending' end,
            closed_at = iif(object_id in (select object_id from objects where state = 'dropped'), :now, null),
            last_error = :died
        where state = 'running'
    """
    return sql.execute(requeue, {"most": policy.max_attempts, "died": RUNNER_DIED, "now": int(now)}).rowcount


# ---------------------------------------------------------------- Listing
# What the store holds, page by page and in key order, read ahead by other threads: the main loop never
# waits for a store. Headline: Listing.


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The keys from `low` to `high`, both included."""

    low: str
    high: str


LAST_KEY = "\U0010ffff"  # sorts after every key
ALL_KEYS, NO_KEYS = KeyRange("", LAST_KEY), KeyRange(LAST_KEY, "")


def prefixes(datasets: Iterable[Dataset]) -> list[str]:
    """What to list for these datasets: the fixed starts of their keys, none within another."""
    starts = sorted({dataset.key.text.partition("{")[0] for dataset in datasets})
    return [
        start for number, start in enumerate(starts) if not any(start.startswith(other) for other in starts[:number])
    ]


def range_of(prefix: str) -> KeyRange:
    """All keys that start with it."""
    return KeyRange(prefix, prefix + LAST_KEY)


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """Other threads that ask the store, and what to call when one of them has its answer."""

    executor: Executor
    wake: Callable[[], None]

    def submit(self, function: Callable[..., Item], *arguments: Any) -> Future[Item]:
        """Have it done."""
        future = self.executor.submit(function, *arguments)
        future.add_done_callback(lambda _: self.wake())
        return future


class Listing:
    """The objects of a range below a prefix as pages. A store that was out of order here, or was never listed
    here, is sorted first, and all of the prefix with it. Without `ahead` each page is made when it is asked for."""

    def __init__(self, store: Store, prefix: str, keys: KeyRange, ahead: ReadAhead | None, *, is_ordered: bool) -> None:
        self.prefix, self.is_ordered, self.was_ascending = prefix, is_ordered, is_ordered
        self.keys = keys if is_ordered else range_of(prefix)
        self._ahead = ahead
        self._pages = chunks(self._entries(store), PAGE)
        self._next: Future[list[StoredObject] | None] | None = None

    def _entries(self, store: Store) -> Iterator[StoredObject]:
        if self.is_ordered:
            for entry in ascending(store.list(self.prefix, self.keys.low[:-1])):
                if entry.key > self.keys.high:
                    return
                if entry.key >= self.keys.low:
                    yield entry
            return
        self.was_ascending, entries = sort_listing(store.list(self.prefix))
        yield from entries

    def start(self) -> None:
        """Begin to make the next page."""
        if self._ahead and self._next is None:
            self._next = self._ahead.submit(next, self._pages, None)

    def is_ready(self) -> bool:
        """Whether take() would not have to wait."""
        self.start()
        return self._next is None or self._next.done()

    def take(self) -> list[StoredObject] | None:
        """The next page; None after the last. Raises StoreError, and OutOfOrderError where order was promised."""
        if not self._ahead:
            return next(self._pages, None)
        self.start()
        assert self._next
        page, self._next = self._next.result(), None
        if page is not None:
            self.start()
        return page


# ---------------------------------------------------------------- Ranges
# Which keys a cycle looks at: those of objects that somebody else may have brought meanwhile, and a share
# of all others, so that in a day everything is looked at once, at a steady cost. Headlines: share_of_keys(),
# ranges_to_list().

LEAST_SHARE = 4000  # keys, of a cycle; a lake that is not larger is listed whole each time
SINGLE_RANGES = 200  # open objects below a prefix; with more than that, all of it is listed


def share_of_keys(database: Database, configuration: Configuration, now: float) -> KeyRange:
    """The next part of all keys, as large as the time since the last cycle asks for."""
    total = database.value("select coalesce(sum(objects), 0) from counts where state != 'dropped'")
    last = database.value("select max(started_at) from reconciliations where seconds is not null")
    elapsed = max(0.0, now - last) if last is not None else math.inf
    size = max(LEAST_SHARE, math.ceil(total * min(1.0, elapsed / configuration.full_seconds)))
    if size >= total:
        return ALL_KEYS
    looked_up_to = database.value("select value from settings where name = 'looked up to'") or ""
    last_of_share = "select key from objects where key > ? and state != 'dropped' order by key limit 1 offset ?"
    high = database.value(last_of_share, (looked_up_to, size - 1)) or LAST_KEY
    return KeyRange(looked_up_to + "\0" if looked_up_to else "", high)


def ranges_to_list(database: Database, prefix: str, share: KeyRange) -> list[KeyRange]:
    """What to list below a prefix: its part of the share, and where its open objects are."""
    whole = range_of(prefix)
    found = [KeyRange(max(share.low, whole.low), min(share.high, whole.high))]
    open_keys = database.read(
        """
        select key
        from objects indexed by objects_open
        where key >= ? and key <= ?
          and (state in ('missing', 'stale', 'suspect') or (proven = 0 and state != 'dropped'))
        order by key
        limit ?
        """,
        (whole.low, whole.high, SINGLE_RANGES + 1),
    )
    if len(open_keys) > SINGLE_RANGES:
        return [whole]
    found += [KeyRange(key, key) for (key,) in open_keys]
    joined: list[KeyRange] = []
    for one in sorted((one for one in found if one.low <= one.high), key=lambda one: (one.low, one.high)):
        if joined and (one.low <= joined[-1].high or _are_near(database, joined[-1].high, one.low)):
            joined[-1] = KeyRange(joined[-1].low, max(joined[-1].high, one.high))
        else:
            joined.append(one)
    return joined


def _are_near(database: Database, low: str, high: str) -> bool:
    """Less than a page apart: one request lists what lies between as well."""
    between = "select count(*) from (select 1 from objects where key > ? and key < ? limit ?)"
    return cast(int, database.value(between, (low, high, PAGE))) < PAGE


# ---------------------------------------------------------------- Cycles
# One reconciliation as it goes on: what it has seen, done and could not prove. Headline: Cycle.

MOST_PROBLEMS = 5  # told of one cycle
STOPPED_EARLY = "stopped before its end"
VANISHED = "vanished at once"  # by which a mass loss is known
STORE_FAILS = "store fails"  # a setting: what ended the last cycles
SAVED_EVERY_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Orders:
    """What the operator has said of a cycle."""

    is_full: bool = False  # list everything
    may_drop: bool = False  # that far less is expected than before is meant
    may_lose: frozenset[str] = frozenset()  # the mass loss of these datasets is real
    order_id: int = 0  # the last of the orders of other processes among them


def expected_by_dataset(database: Database) -> dict[str, int]:
    """How many objects each dataset expects now, or will when they are available."""
    sql = """
        select dataset, sum(objects)
        from counts join datasets using (dataset_id)
        where state != 'dropped'
        group by dataset
    """
    return dict(map(tuple, database.read(sql)))


class Cycle:
    """What one cycle has seen and done so far; its row in the database."""

    def __init__(
        self, database: Database, configuration: Configuration, store: Store, clock: Clock, orders: Orders
    ) -> None:
        self.database, self.configuration, self.store = database, configuration, store
        self.clock, self.orders = clock, orders
        self.share = ALL_KEYS if orders.is_full else share_of_keys(database, configuration, clock.wall())
        self.listed = self.looked = self.unexpected = self.created = self.closed = 0
        self.is_braked = False
        self.there: collections.Counter[int] = collections.Counter()  # objects that were known to be, by dataset
        self.ahead: ReadAhead | None = None
        self.compared: set[str] = set()  # prefixes
        self.losses: dict[int, array.array[int]] = {}  # objects that were there, by dataset
        self.expected = expected_by_dataset(database)  # by dataset, at its beginning
        self.unnamed: dict[int, tuple[str | None, set[int]]] = {}  # by parent: its etag, whom it names no longer
        self.problems: list[str] = []
        self.started, self.calls_before = clock.boot(), store.calls
        self.saves_at = self.started + SAVED_EVERY_SECONDS
        with database.transaction() as sql:
            sql.execute("update reconciliations set error = 'the runner died', seconds = 0 where seconds is null")
            begun = sql.execute(
                """
                insert into reconciliations (started_at, listed, looked, unexpected, list_calls, expected, present,
                                             missing, stale, suspect, created, closed)
                values (?, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
                """,
                (clock.wall(),),
            )
            self.cycle_id = cast(int, begun.lastrowid)
            obey = "update orders set cycle_id = ? where cycle_id is null and order_id <= ?"
            sql.execute(obey, (self.cycle_id, orders.order_id))

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """A transaction, whose opened and closed tasks count for this cycle. What a power cut undoes of it, the next
        cycle finds again."""
        with self.database.transaction(durable=False) as sql:
            ledger = Ledger(sql, self.configuration, self.clock.wall(), self.cycle_id)
            yield ledger
            inherit_fields(ledger)
        self.problems += ledger.problems
        self.created += ledger.created
        self.closed += ledger.closed

    def save_progress(self) -> None:
        """Now and then, what was looked at so far."""
        if self.clock.boot() >= self.saves_at:
            self.saves_at = self.clock.boot() + SAVED_EVERY_SECONDS
            with self.database.transaction(durable=False) as sql:
                progress = (self.listed, self.looked, self.cycle_id)
                sql.execute("update reconciliations set listed = ?, looked = ? where cycle_id = ?", progress)

    def remember(self, name: str, value: str) -> None:
        """A small fact for later cycles."""
        with self.database.transaction() as sql:
            sql.execute("insert or replace into settings values (?, ?)", (name, value))

    def note_store_failure(self, text: str) -> None:
        """A store that ends two cycles in a row is unusable, and no longer so after the next that it does not."""
        before = "select error from reconciliations where cycle_id < ? order by cycle_id desc limit 1"
        if self.database.value(before, (self.cycle_id,)):
            self.remember(STORE_FAILS, text)

    def end(self) -> None:
        """Record the cycle."""
        counts = {
            row[0]: row[1]
            for row in self.database.read(
                "select state, sum(objects) from counts where state not in ('awaited', 'dropped') group by state"
            )
        }
        with self.database.transaction() as sql:
            sql.execute(
                """
                update reconciliations
                set seconds = :seconds, listed = :listed, unexpected = :unexpected, list_calls = :list_calls,
                    expected = :expected, present = :present, missing = :missing, stale = :stale, suspect = :suspect,
                    created = :created, closed = :closed, error = :error, looked = :looked
                where cycle_id = :cycle_id
                """,
                {
                    **{str(state): counts.get(state, 0) for state in (ObjectState.PRESENT, *GAPS)},
                    "expected": sum(counts.values()),
                    "seconds": self.clock.boot() - self.started,
                    "listed": self.listed,
                    "looked": self.looked,
                    "unexpected": self.unexpected,
                    "list_calls": self.store.calls - self.calls_before,
                    "created": self.created,
                    "closed": self.closed,
                    "error": "; ".join(self.problems[:MOST_PROBLEMS]) or None,
                    "cycle_id": self.cycle_id,
                },
            )


# ---------------------------------------------------------------- Contents
# What the objects say that something else wrote: whether they are valid and final, and which others they name. Each
# version of one is read once. Headline: read_contents().

READS_IN_A_TRANSACTION = 20
READS_IN_A_CYCLE = 1000  # of objects that name no others and that something else wrote
STILL_UNREAD = "object_id = :object_id and etag = :etag and etag is not read_etag and state != 'dropped'"


def read_contents(cycle: Cycle, level: Sequence[Dataset]) -> Iterator[bool | None]:
    """Look once at the content of each version of an object that something else wrote: is it valid, is
    it final, which children does it name? Yields True when it waits for the store."""
    for dataset in level:
        children = cycle.configuration.children_of(dataset.name)
        says_more = children or dataset.freshness.until or dataset.freshness.live
        if not (says_more or dataset.validate.needs_content()):
            continue
        left = math.inf if says_more or cycle.orders.is_full else READS_IN_A_CYCLE
        after = ""
        while left > 0 and (unread := _unread(cycle, dataset, after)):
            look = functools.partial(_inspect, cycle, children=children)
            if cycle.ahead:
                reading = [cycle.ahead.submit(look, target) for target in unread]
                while not all(future.done() for future in reading):
                    yield True
                found = [future.result() for future in reading]
            else:
                found = [look(target) for target in unread]
            with cycle.ledger() as ledger:
                for target, inspection in zip(unread, found, strict=True):
                    if inspection:
                        _note_content(cycle, ledger, target, inspection)
            after = unread[-1].key
            left -= len(unread)
            yield None


def _unread(cycle: Cycle, dataset: Dataset, after: str) -> list[KnownObject]:
    with cycle.database.transaction() as sql:
        return Ledger(sql, cycle.configuration, 0).objects(
            """
            dataset_id = (select dataset_id from datasets where dataset = :dataset)
            and etag is not read_etag and etag is not null and key > :after and state != 'dropped'
            order by key limit :few
            """,
            {"dataset": dataset.name, "after": after, "few": READS_IN_A_TRANSACTION},
        )


def _inspect(cycle: Cycle, target: KnownObject, children: Sequence[Dataset]) -> Inspection | None:
    dataset = cycle.configuration.datasets[target.dataset]
    if not makes_key(dataset, target.fields, target.key):
        return None  # of an older declaration, which this cycle will find
    try:
        body = cycle.store.read(target.key)
    except KeyError:
        return None  # gone since it was listed: the next cycle sees that
    except UnusablePlaceError as error:
        cycle.problems.append(str(error))
        return None
    return inspect(dataset, target.fields, body, children)


def _note_content(cycle: Cycle, ledger: Ledger, target: KnownObject, found: Inspection) -> None:
    """What names fewer than before counts as unread until they are dropped: a cycle may end before that. So does what
    names something that cannot be expected, as far as it is told: it is told again."""
    if not ledger.objects(STILL_UNREAD, {"object_id": target.object_id, "etag": target.facts.etag}):
        return  # fetched anew, or dropped, while it was read
    facts = dataclasses.replace(
        target.facts, valid=found.valid, settled=found.settled, live=found.live, verdict=found.verdict
    )
    told = len(ledger.problems)
    unnamed = add_children(ledger, target, found, proven=False) if found.valid else set()
    if unnamed:
        cycle.unnamed[target.object_id] = target.facts.etag, unnamed
    is_told_again = len(ledger.problems) > told and len(cycle.problems) + told < MOST_PROBLEMS
    ledger.note(target, facts, read_etag=None if unnamed or is_told_again else target.facts.etag)


def drop_unnamed(cycle: Cycle) -> Iterator[None]:
    """What parents name no longer is not expected any more; unless that is so much that adce.yaml or, if that is
    unchanged, whoever wrote the parents is more likely at fault."""
    if not cycle.unnamed:
        return
    with cycle.ledger() as ledger, guarded_drops(ledger.sql, consents=cycle.orders.may_drop):
        doubtful = set() if is_changed(ledger.sql) else _doubtful(cycle, ledger)
        for parent_id, (etag, children) in cycle.unnamed.items():
            if ledger.objects(STILL_UNREAD, {"object_id": parent_id, "etag": etag}):  # else it was fetched anew
                drop_children(ledger, parent_id, children - doubtful)
                if not children & doubtful:  # else it counts as unread, and is read again
                    ledger.sql.execute("update objects set read_etag = etag where object_id = ?", (parent_id,))
    yield


def _doubtful(cycle: Cycle, ledger: Ledger) -> set[int]:
    """Those that are named no longer, of datasets of which that is too much to be believed."""
    doubtful: set[int] = set()
    by_dataset: dict[str, set[int]] = {}
    unnamed = sorted(set().union(*(children for _, children in cycle.unnamed.values())))
    of_dataset = """
        select dataset, object_id from objects join datasets using (dataset_id)
        where object_id in (select value from json_each(?))
    """
    for name, object_id in ledger.sql.execute(of_dataset, (json.dumps(unnamed),)).fetchall():
        by_dataset.setdefault(name, set()).add(object_id)
    for name, ids in by_dataset.items():
        expected = cycle.expected.get(name, 0)
        if is_mass_drop(expected, expected - len(ids)) and name not in cycle.orders.may_lose:
            doubtful |= ids
            cycle.is_braked = True
            text = f"{name}: the names of {len(ids)} of {expected} objects {VANISHED}, none is dropped"
            cycle.problems.append(f"{text}; if that is real: adce.py reconcile --believe {name}")
    return doubtful


# ---------------------------------------------------------------- Reconcile
# Notices: expected against present. A cycle is a row of short steps, so that the runner keeps claiming in
# between: expand what should exist, list what does, read what names other objects, note the differences.
# It derives everything from state, so a missed event costs nothing. Headline: reconcile().

LISTED_AT_ONCE = 4  # prefixes
NOTED_AT_ONCE = 300  # objects, in one transaction: claims wait no longer than that takes
BRAKE_OBJECTS, BRAKE_SHARE, BRAKE_EMPTY = 100, 0.10, 10


def reconcile(
    database: Database,
    configuration: Configuration,
    store: Store,
    clock: Clock,
    orders: Orders = Orders(),
    ahead: ReadAhead | None = None,
) -> Iterator[int]:
    """One cycle, as steps: each `next()` does a little and yields the cycle's id, or 0 when it waits for the
    store; the last step records what was found. Errors of the store end the cycle and stand in its row.
    Raises MassDropError when far less is expected than before, without the operator's consent."""
    cycle = Cycle(database, configuration, store, clock, orders)
    cycle.ahead = ahead
    try:
        yield cycle.cycle_id
        for level in configuration.levels():
            for waits in itertools.chain(_expand(cycle, level), _compare(cycle, level), read_contents(cycle, level)):
                cycle.save_progress()
                yield 0 if waits else cycle.cycle_id
        for _ in itertools.chain(drop_unnamed(cycle), _apply_losses(cycle), _age(cycle)):
            yield cycle.cycle_id
        if not cycle.is_braked:  # else the same is looked at, and told, once more
            cycle.remember("looked up to", "" if cycle.share.high == LAST_KEY else cycle.share.high)
        with database.transaction() as sql:
            note_good_cycle(sql)
        if database.value("select value from settings where name = ?", (STORE_FAILS,)):
            cycle.remember(STORE_FAILS, "")
    except StoreError as error:
        cycle.problems.append(f"{error}: {error.hint}" if error.hint else str(error))
        cycle.note_store_failure(str(error))
    except BaseException as error:  # refused, stopped, interrupted, or an error of the program's own
        cycle.problems.append(str(error) if isinstance(error, MassDropError) else STOPPED_EARLY)
        raise
    finally:
        cycle.end()


def run_cycle(steps: Iterator[int]) -> int:
    """Do all steps of a cycle; returns its id."""
    return max(steps)


def _expand(cycle: Cycle, level: Sequence[Dataset]) -> Iterator[None]:
    """Make the expected objects of datasets that depend on no others those of today."""
    dropped: list[int] = []
    digests: list[tuple[str, str]] = []
    expanded: dict[str, Ids] = {}
    for dataset in level:
        now = cycle.clock.wall()
        today = day_of(now, timezone_of(dataset))
        inputs = (dataset.partitions, dataset.key.text, cycle.configuration.seasons, today)
        digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
        known = "select expansion from datasets where dataset = ?"
        if dataset.partitions.parent or cycle.database.value(known, (dataset.name,)) == digest:
            continue
        wanted, problems_before = Ids(), len(cycle.problems)
        for chunk in chunks(expand(dataset, cycle.configuration.seasons, now), NOTED_AT_ONCE):
            found = []
            with cycle.ledger() as ledger:
                for fields in chunk:
                    try:
                        expected = expected_object(dataset, fields, cycle.configuration.seasons)
                        found.append(ledger.expect(dataset, expected, proven=False))
                    except ValueError as error:
                        cycle.problems.append(str(error))
            wanted.update(found)
            yield
        if len(cycle.problems) == problems_before:  # else it is tried, and told, again
            digests.append((digest, dataset.name))
        expanded[dataset.name] = wanted
    for name, wanted in expanded.items():  # when each has what is its own now
        dropped += no_longer_expected(cycle.database, name, wanted)
    if dropped or digests:
        with cycle.ledger() as ledger, guarded_drops(ledger.sql, consents=cycle.orders.may_drop):
            for object_id in dropped:
                ledger.drop(object_id)
            ledger.sql.executemany("update datasets set expansion = ? where dataset = ?", digests)
    yield


def _compare(cycle: Cycle, level: Sequence[Dataset]) -> Iterator[bool | None]:
    """List the store and note what differs from what is known. Each page proves its own range of keys
    and nothing beyond it; below a prefix that was compared before only what is open is looked for again. Yields True
    when it waits for the store."""
    ordered = "select 1 from settings where name = ? and value = 'ascending'"
    listings, failed = list[Listing](), set[str]()
    for prefix in prefixes(level):
        is_ordered = cycle.database.value(ordered, (f"order of {prefix}",)) == 1
        share = NO_KEYS if prefix.startswith(tuple(cycle.compared)) else cycle.share
        ranges = ranges_to_list(cycle.database, prefix, share) if is_ordered else [range_of(prefix)]
        listings += [Listing(cycle.store, prefix, keys, cycle.ahead, is_ordered=is_ordered) for keys in ranges]
    for number, listing in enumerate(listings):
        for following in listings[number : number + LISTED_AT_ONCE]:
            following.start()
        try:
            yield from _compare_listing(cycle, listing)
        except UnusablePlaceError as error:  # nothing is proven from there on; the other listings go on
            cycle.problems.append(str(error))
            failed.add(listing.prefix)
    cycle.compared |= {listing.prefix for listing in listings} - failed


def _compare_listing(cycle: Cycle, listing: Listing) -> Iterator[bool | None]:
    low = listing.keys.low
    while True:
        while not listing.is_ready():
            yield True
        try:
            page = listing.take()
        except OutOfOrderError:
            listing.was_ascending = False
            _remember_order(cycle, listing)
            raise
        if page is None:
            break
        yield from _compare_range(cycle, page, KeyRange(low, page[-1].key))
        low = page[-1].key + "\0"
    _remember_order(cycle, listing)
    yield from _compare_range(cycle, [], KeyRange(low, listing.keys.high))


def _remember_order(cycle: Cycle, listing: Listing) -> None:
    if listing.was_ascending is not listing.is_ordered:
        cycle.remember(f"order of {listing.prefix}", "ascending" if listing.was_ascending else "out of order")


def _compare_range(cycle: Cycle, page: Sequence[StoredObject], keys: KeyRange) -> Iterator[None]:
    """What is listed of a range of keys against what is known of it, which may be much more."""
    listed, low = {entry.key: entry for entry in page}, keys.low
    cycle.listed += len(page)
    cycle.unexpected += len(page)
    while True:
        known = cycle.database.read(
            """
            select object_id, key, etag, proven, dataset_id, cycle_id is ? as is_news
            from objects
            where key >= ? and key <= ? and state != 'dropped'
            order by key
            limit ?
            """,
            (cycle.cycle_id, low, keys.high, PAGE),
        )
        differing = []
        for object_id, key, etag, proven, dataset_id, is_news in known:
            entry = listed.get(key)
            cycle.unexpected -= entry is not None
            cycle.there[dataset_id] += etag is not None
            if is_news:
                continue  # written since this listing may have begun
            if entry is None and etag is not None:
                cycle.losses.setdefault(dataset_id, array.array("q")).append(object_id)
            elif not proven or (entry is not None and entry.etag != etag):
                differing.append(object_id)
        cycle.looked += len(known)
        yield from _note_differences(cycle, differing, listed)
        yield
        if len(known) < PAGE:
            return
        low = known[-1]["key"] + "\0"


def _note_differences(cycle: Cycle, object_ids: Sequence[int], listed: Mapping[str, StoredObject]) -> Iterator[None]:
    for chunk in chunks(iter(object_ids), NOTED_AT_ONCE):
        with cycle.ledger() as ledger:
            for target in ledger.objects(
                "object_id in (select value from json_each(:ids)) and state != 'dropped'", {"ids": json.dumps(chunk)}
            ):
                if target.cycle_id == cycle.cycle_id:
                    continue  # fetched since it was compared
                entry = listed.get(target.key)
                facts = _seen(target, entry, ledger.now) if entry else dataclasses.replace(target.facts, proven=True)
                ledger.note(target, facts)
        yield


def _apply_losses(cycle: Cycle) -> Iterator[None]:
    """What was there and is no longer listed is missing, unless so much is gone that the listing or the
    mount is more likely at fault."""
    total = sum(map(len, cycle.losses.values()))
    names = {row[0]: row[1] for row in cycle.database.read("select dataset_id, dataset from datasets")}
    for dataset_id, lost in cycle.losses.items():
        there = cycle.there[dataset_id]
        many = len(lost) > BRAKE_OBJECTS and len(lost) > BRAKE_SHARE * there
        everything = (len(lost) == there and there > BRAKE_EMPTY) or (cycle.listed == 0 and total > BRAKE_EMPTY)
        name = names[dataset_id]
        if name not in cycle.orders.may_lose and (many or everything):
            cycle.is_braked = True
            text = f"{name}: {len(lost)} of {there} objects {VANISHED}, none is taken for missing"
            cycle.problems.append(f"{text}; if the loss is real: adce.py reconcile --believe {name}")
            continue
        for chunk in chunks(iter(lost), NOTED_AT_ONCE):
            with cycle.ledger() as ledger:
                for target in ledger.objects(
                    "object_id in (select value from json_each(:ids)) and state != 'dropped'",
                    {"ids": json.dumps(chunk)},
                ):
                    if target.cycle_id != cycle.cycle_id:
                        ledger.note(target, Facts(available_at=target.facts.available_at, seen_at=target.facts.seen_at))
                        ledger.count_as_unread(target.object_id)
            yield


def _age(cycle: Cycle) -> Iterator[None]:
    """What time alone has changed; and once a day, or when the weights did, the priorities."""
    while note_due_objects(cycle.database, cycle.configuration, cycle.clock):
        yield
    today, wishes = day_of(cycle.clock.wall()), cycle.configuration
    datasets = [(one.name, one.source, one.priority, one.batch) for one in wishes.datasets.values()]
    inputs = repr((today, wishes.priority_weighting, wishes.seasons, datasets))
    with cycle.database.transaction() as sql:
        known = sql.execute("select value from settings where name = 'priorities'").fetchone()
        if any(batch for *_, batch in datasets) or not known or known[0] != inputs:
            reprioritise(sql, cycle.configuration, cycle.clock.wall())
            sql.execute("insert or replace into settings values ('priorities', ?)", (inputs,))
    yield


def _seen(target: KnownObject, entry: StoredObject, now: float) -> Facts:
    """The facts of an object that is listed with an etag not known yet: its content counts as unread. No clock but
    ours says how old it is: one that is ahead would keep it fresh for longer."""
    is_read = target.read_etag == entry.etag or target.state in GAPS  # a gap stays one until it is read
    unread = {} if is_read else {"valid": None, "settled": None, "live": None, "verdict": None}
    modified_at = min(entry.modified_at, int(now))
    return dataclasses.replace(
        target.facts, proven=True, size=entry.size, etag=entry.etag, modified_at=modified_at, **unread
    )


# ---------------------------------------------------------------- Executions
# What one execution is, as plain data that can travel to another process, and what it leaves: an object
# that is validated before it is stored. Headlines: FetchSpec, keep(), look().


@dataclass(frozen=True, slots=True)
class Target:
    """One object that an execution should bring."""

    key: str
    fields: Fields
    is_missing: bool  # then the store is asked first
    version: tuple[str | None, int | None] = (None, None)  # etag and instant of what is there


@dataclass(frozen=True, slots=True)
class FetchSpec:
    """All that an execution needs to know. Plain data: it can travel to another process."""

    dataset: Dataset
    source: Source
    children: tuple[Dataset, ...]
    targets: tuple[Target, ...]
    url: str = ""
    hops: int = 0
    send_before: float = math.inf  # boot
    environment: Mapping[str, str] = field(default_factory=dict)


def specify(configuration: Configuration, claimed: Claim) -> FetchSpec:
    """The plain data of a claim."""
    dataset = claimed.dataset
    targets = tuple(
        Target(
            key=task.target.key,
            fields=task.target.fields,
            is_missing=task.target.state is ObjectState.MISSING,
            version=(task.target.facts.etag, task.target.facts.modified_at),
        )
        for task in claimed.tasks
    )
    url = ""
    if dataset.url and set(dataset.url.fields()) <= targets[0].fields.keys():
        url = claimed.source.base_url + dataset.url.render(targets[0].fields, quote_for_url)
    environment = {
        "ADCE_CONFIG": str(configuration.path),
        "ADCE_DB": str(configuration.database.resolve()),  # the next start may come by another path
        "ADCE_SOURCE": claimed.source.name,
        "ADCE_TASK": ",".join(str(task.task_id) for task in claimed.tasks),
    }
    return FetchSpec(
        dataset=dataset,
        source=claimed.source,
        children=tuple(configuration.children_of(dataset.name)),
        targets=targets,
        url=url,
        send_before=claimed.permit.send_before if claimed.permit else math.inf,
        environment=environment,
    )


def look(spec: FetchSpec, target: Target, store: Store) -> Result | None:
    """What the store holds under a key, judged; None when there is nothing."""
    stored = store.find(target.key)
    if stored is None:
        return None
    most = spec.dataset.validate.max_bytes
    if stored.size > most:
        return Result(Outcome.INVALID, f"longer than {most} bytes", stored=stored)
    try:
        inspection = inspect(spec.dataset, target.fields, store.read(target.key), spec.children)
    except KeyError:
        return None
    outcome = Outcome.OK if inspection.valid else Outcome.INVALID
    return Result(outcome, inspection.verdict, stored=stored, inspection=inspection)


def _refused(error: StoreError) -> Result:
    """A store that fails says nothing about the task; one place in it that cannot be used does."""
    is_local = isinstance(error, UnusablePlaceError)
    return Result(Outcome.ERROR if is_local else Outcome.STORE_ERROR, str(error))


def keep(spec: FetchSpec, target: Target, body: bytes, store: Store, http_status: int | None = None) -> Result:
    """Validate a body, then store it. `requests` counts the HTTP request that brought it."""
    requests = 0 if http_status is None else 1
    if len(body) > spec.dataset.validate.max_bytes:
        return Result(Outcome.INVALID, f"longer than {spec.dataset.validate.max_bytes} bytes", requests=requests)
    inspection = inspect(spec.dataset, target.fields, body, spec.children)
    if not inspection.valid:
        return Result(Outcome.INVALID, inspection.verdict, http_status, requests=requests)
    try:
        stored = store.write(target.key, body)
    except StoreError as error:
        return dataclasses.replace(_refused(error), http_status=http_status, requests=requests)
    return Result(Outcome.OK, None, http_status, stored, inspection, requests)


def excerpt(body: bytes, most: int = 120) -> str:
    """The start of a body, fit for one line of at most so many letters."""
    text = body[: 3 * most].decode("utf-8", "replace")
    plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    return "".join(letter if letter.isprintable() else "?" for letter in plain)[:most] or "empty"


def describe(error: BaseException) -> str:
    """An exception in one line, whatever it is."""
    try:
        return excerpt(f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
    except Exception:  # noqa: BLE001  # its own __str__ failed
        return type(error).__name__


# ---------------------------------------------------------------- Requests
# One HTTP request: a deadline for all of it, a cap on its size, no hidden retries. A redirect is handed
# back, because each hop needs a permit of its own. Headline: request().

CONNECT_SECONDS = 10
STANDSTILL_SECONDS = 5  # a timeout that is noticed so late says nothing about the source
BLOCK_BYTES = 64 << 10
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
KEPT_ON_OTHER_HOSTS = ("user-agent", "accept", "accept-language", "accept-encoding")


class _TooLargeError(Exception):
    pass


class _TooLateError(Exception):
    pass


def request(spec: FetchSpec, store: Store, clock: Clock) -> Result:
    """One HTTP request with a deadline for all of it, at most max_bytes long."""
    import requests
    import urllib3

    begun, deadline = clock.boot(), _Deadline(spec.source.timeout_seconds)

    def about_to_send() -> None:
        if clock.boot() > spec.send_before:
            raise _TooLateError

    try:
        with deadline, requests.Session() as opened:
            about_to_send()
            opened.trust_env = spec.source.trust_env
            for scheme in ("http://", "https://"):
                opened.mount(scheme, _adapter(deadline, about_to_send))
            with opened.get(
                spec.url,
                headers=_headers(spec),
                timeout=(min(CONNECT_SECONDS, spec.source.timeout_seconds), spec.source.timeout_seconds),
                stream=True,
                allow_redirects=False,
            ) as response:
                body = _read_body(response, spec.dataset.validate.max_bytes)
                if deadline.passed:  # a socket that we closed looks like one that has no more to say
                    raise requests.Timeout
                return _judge(spec, response, body, store)
    except _TooLateError:
        return Result(Outcome.LOST, "its permit ran out before it was sent")
    except _TooLargeError:
        return Result(Outcome.INVALID, f"longer than {spec.dataset.validate.max_bytes} bytes", requests=1)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        if clock.boot() > begun + spec.source.timeout_seconds + STANDSTILL_SECONDS:
            return Result(Outcome.LOST, "this program stood still meanwhile", requests=1)
        if deadline.passed or isinstance(error, requests.Timeout):
            return Result(Outcome.TIMEOUT, f"no whole answer within {spec.source.timeout_seconds:g} s", requests=1)
        if isinstance(error, requests.exceptions.ContentDecodingError):
            return Result(Outcome.INVALID, "its encoding is broken", requests=1)
        outcome, text = _no_answer(error)
        return Result(outcome, f"{_host(spec.url)} {text}", requests=1)


def _no_answer(error: BaseException) -> tuple[Outcome, str]:
    """What an exception of urllib3, or of requests around one, says about the source."""
    import urllib3

    unconnected = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProxyError)
    if any(isinstance(cause, unconnected) for cause in _causes(error)):
        return Outcome.UNREACHABLE, f"cannot be reached: {_words(error)}"
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return Outcome.TIMEOUT, "did not answer in time"
    return Outcome.BROKEN, f"broke the connection: {_words(error)}"


class _Deadline:
    """Ends a request when its time is over, by shutting its socket from a watching thread: a server that
    sends a byte now and then never trips a timeout for a single read."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()  # guards _sockets
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def watch(self, connected: socket.socket) -> None:
        """By a second handle: TLS and http.client let go of the first while the answer is still coming."""
        with self._lock:
            self._sockets.append(connected.dup())
        if self.passed:
            self._end()

    def _end(self) -> None:
        self.passed = True
        with self._lock:
            for handle in self._sockets:
                with contextlib.suppress(OSError):  # it is closed already
                    handle.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            while self._sockets:
                self._sockets.pop().close()


def _adapter(deadline: _Deadline, about_to_send: Callable[[], None]) -> Any:
    """A transport without retries whose sockets the deadline watches, and that asks once more when one is ready."""
    import requests.adapters

    class Adapter(requests.adapters.HTTPAdapter):
        def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> Any:
            pool: Any = super().get_connection_with_tls_context(*arguments, **options)
            kind = pool.ConnectionCls

            def open_socket(connection: Any) -> Any:
                connected = kind._new_conn(connection)  # noqa: SLF001  # the one place where sockets begin
                deadline.watch(connected)
                return connected

            def connect(connection: Any) -> None:
                kind.connect(connection)  # TLS included
                about_to_send()

            pool.ConnectionCls = type(kind.__name__, (kind,), {"_new_conn": open_socket, "connect": connect})
            return pool

    return Adapter(pool_connections=1, pool_maxsize=1)


def _headers(spec: FetchSpec) -> dict[str, str]:
    """Secrets for one host are not sent to another."""
    headers = dict(spec.source.headers)
    if _origin(spec.url) != _origin(spec.source.base_url or spec.url):
        headers = {name: text for name, text in headers.items() if name.lower() in KEPT_ON_OTHER_HOSTS}
    return headers


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or "?"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what lies behind it, the innermost last."""
    inner: Any = error
    while isinstance(inner, BaseException):
        yield inner
        inner = getattr(inner, "reason", None) or inner.__cause__ or inner.__context__


def _words(error: BaseException) -> str:
    """The innermost reason in its own words: not the address, which may hold a key."""
    *_, innermost = _causes(error)
    text = innermost.strerror if isinstance(innermost, OSError) and innermost.strerror else type(innermost).__name__
    return text[:100]


def _read_body(response: Any, most: int) -> bytes:
    blocks, size = [], 0
    for block in response.iter_content(BLOCK_BYTES):
        size += len(block)
        if size > most:
            raise _TooLargeError
        blocks.append(block)
    return b"".join(blocks)


def _judge(spec: FetchSpec, response: Any, body: bytes, store: Store) -> Result:
    """What an answer means. Errors can come with status 200, and "not there yet" with 403."""
    status = response.status_code
    if status in REDIRECTS and "location" in response.headers:
        return _redirected(spec, response)
    failure = classify(spec.source, status, body)
    if failure is None:
        return keep(spec, spec.targets[0], body, store, status)
    outcome, error = failure
    retry_after = asked_pause(spec.source, status, response.headers) if outcome is Outcome.THROTTLED else None
    return Result(outcome, error, status, requests=1, retry_after=retry_after)


def _redirected(spec: FetchSpec, response: Any) -> Result:
    target = urllib.parse.urljoin(spec.url, response.headers["location"])
    parts, status = urllib.parse.urlsplit(target), response.status_code
    if spec.hops >= MAX_REDIRECTS:
        return Result(Outcome.HTTP_ERROR, f"more than {MAX_REDIRECTS} redirects", status, requests=1)
    if parts.scheme not in ("http", "https") or (parts.scheme == "http" and spec.url.startswith("https:")):
        return Result(
            Outcome.HTTP_ERROR, f"redirected to {parts.scheme}://{parts.hostname}, which is refused", status, requests=1
        )
    return Result(Outcome.RUNNING, None, status, requests=1, redirect=target)


def classify(source: Source, status: int, body: bytes) -> tuple[Outcome, str] | None:
    """Why an answer is no object, or None when it may be one."""
    if status == 403 and re.search(rb"<Code>(AccessDenied|NoSuchKey)</Code>", body[:2000]):
        return Outcome.NOT_YET, "HTTP 403: no such object"
    if is_throttling(source, status):
        return Outcome.THROTTLED, f"HTTP {status}: {excerpt(body)}"
    document: Any = None
    if source.error_when:
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(body)
    is_error = source.error_when is not None and document is not None and holds(source.error_when, {}, document)
    code = document.get("code") if is_error and isinstance(document, dict) else None
    if status in (404, 410) or (is_error and code in (404, "404")):
        return Outcome.NOT_YET, f"HTTP {status}: {excerpt(body)}"
    if is_error and status < 500:
        return Outcome.HTTP_ERROR, f"HTTP {status}, an error: {excerpt(body)}"
    if status != 200:
        return Outcome.HTTP_ERROR, f"HTTP {status}: {excerpt(body)}"
    return None


# ---------------------------------------------------------------- Sessions
# The same limits for programs that use requests, and for libraries built on it: every request that a
# session sends has a permit of its own, be it a redirect or a retry. Headlines: session(), limit().


def session(source: str, config: str | os.PathLike[str] | None = None, wait: float | None = None) -> Any:
    """A requests.Session that asks a source as adce.yaml declares it: under its limits, with its headers and
    its timeout. A path such as "/scoreboard" is appended to its base_url. Raises Error for an unknown source.

    Its requests wait for their permits, `wait` seconds at most each; then they raise RateLimitedError."""
    import requests

    described = shared_limiter(config).source(source)

    class SourceSession(requests.Session):
        def request(self, method: Any, url: Any, *arguments: Any, **options: Any) -> Any:
            options.setdefault("timeout", described.timeout_seconds)
            url = described.base_url + url if str(url).startswith("/") else url
            return super().request(method, url, *arguments, **options)

        def rebuild_auth(self, prepared_request: Any, response: Any) -> None:
            super().rebuild_auth(prepared_request, response)  # type: ignore[no-untyped-call]
            if _origin(prepared_request.url) != _origin(response.request.url):
                for name in described.headers:
                    if name.lower() not in KEPT_ON_OTHER_HOSTS:
                        prepared_request.headers.pop(name, None)

    opened = SourceSession()
    opened.headers.update(described.headers)
    opened.trust_env = described.trust_env
    return limit(opened, source, config, wait)


def limit(session: Any, source: str, config: str | os.PathLike[str] | None = None, wait: float | None = None) -> Any:
    """Put a requests.Session that exists under the limits of a source, and return it.

    Its adapters stay, with their retries; one that is mounted later is not limited. Raises Error for an
    unknown source, and when an adapter is limited for another source already."""
    limiter = shared_limiter(config)
    limiter.source(source)

    def ask() -> contextlib.AbstractContextManager[Held]:
        return limiter.permit(source, wait)

    for prefix, adapter in session.adapters.items():
        session.adapters[prefix] = _limited(adapter, source, ask)
    return session


def _limited(adapter: Any, source: str, ask: Callable[[], contextlib.AbstractContextManager[Held]]) -> Any:
    """An adapter whose every HTTP request has a permit."""
    import requests.adapters

    owner = getattr(adapter, "adce_source", source)
    if owner != source:
        raise Error(f'this session is limited for source "{owner}" already', "give each source a session of its own")
    if hasattr(adapter, "adce_source"):
        return adapter

    class LimitedAdapter(requests.adapters.BaseAdapter):
        adce_source = source

        def send(self, *arguments: Any, **options: Any) -> Any:
            if isinstance(adapter, requests.adapters.HTTPAdapter):  # its pools ask for permits
                return adapter.send(*arguments, **options)
            with ask():
                return adapter.send(*arguments, **options)

        def close(self) -> None:
            adapter.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(adapter, name)

    if isinstance(adapter, requests.adapters.HTTPAdapter):
        connect = adapter.get_connection_with_tls_context
        limiting = threading.Lock()  # of a pool that several threads want at once

        def connect_limited(*arguments: Any, **options: Any) -> Any:
            pool = connect(*arguments, **options)
            with limiting:
                _limit_pool(pool, source, ask)
            return pool

        adapter.get_connection_with_tls_context = connect_limited  # type: ignore[method-assign]
        adapter.adce_source = source  # type: ignore[attr-defined]  # also for another session that shares it
    return LimitedAdapter()


def _limit_pool(pool: Any, source: str, ask: Callable[[], contextlib.AbstractContextManager[Held]]) -> None:
    """urllib3 retries and redirects inside one call; this is the place where each of its requests passes."""
    import urllib3

    if hasattr(pool, "adce_source"):
        return
    make_request = pool._make_request  # noqa: SLF001

    def make_limited_request(connection: Any, *arguments: Any, **options: Any) -> Any:
        with ask() as held:
            if connection.sock and urllib3.util.connection.is_connection_dropped(connection):
                connection.close()  # the server has not waited for us; it connects again
                if pool.proxy is not None and pool.scheme == "https":
                    pool._prepare_proxy(connection)  # noqa: SLF001  # which has forgotten its tunnel
            try:
                response = make_request(connection, *arguments, **options)
            except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
                held.failed(*_no_answer(error))
                raise
            held.answered(response.status, response.headers)
            return response

    pool._make_request, pool.adce_source = make_limited_request, source  # noqa: SLF001


# ---------------------------------------------------------------- Processes
# A program of the user's, in a process group of its own: however it behaves, it ends in time, it fills no
# memory and no disk with what it prints, and nothing of it is left. Headlines: run_program(),
# end_processes().

TAIL_BYTES = 2000  # of what a program printed, kept with its attempt
PIPE_BLOCKS = 16  # a pipe holds no more
TERMINATE_SECONDS = 5  # between SIGTERM and SIGKILL
KILLING_ROUNDS = 100
INHERITED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Program:
    """A program to run. Its environment is `environment` and the variables named in INHERITED."""

    words: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str]
    seconds: float  # for all of it
    max_bytes: int | None = None  # its standard output is wanted, if it is not longer


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How a program ended."""

    text: str  # exit 1, killed by SIGSEGV, timed out, printed more than 10 bytes
    tail: bytes  # the end of what it printed
    body: bytes = b""  # its standard output, when that was wanted

    def is_good(self) -> bool:
        """It has said itself that it succeeded."""
        return self.text == "exit 0"

    def is_late(self) -> bool:
        """It was ended because its time was over."""
        return self.text == "timed out"


class _Pipe:
    """What comes out of a program: the end of it, or all of it up to a limit."""

    def __init__(self, pipe: IO[bytes], limit: int | None = None) -> None:
        self.pipe, self.limit = pipe, limit
        self.kept = bytearray()
        os.set_blocking(pipe.fileno(), False)

    def read(self) -> bool:
        """Take a block; False when there is none, or no more ever."""
        try:
            block = os.read(self.pipe.fileno(), BLOCK_BYTES)
        except BlockingIOError:
            return False
        self.kept += block
        if self.limit is None:
            del self.kept[:-TAIL_BYTES]
        return bool(block)

    def is_too_long(self) -> bool:
        return self.limit is not None and len(self.kept) > self.limit

    def close(self) -> None:
        """Take what is in it still. Nobody waits for one who has escaped and holds it open."""
        for _ in range(PIPE_BLOCKS):
            if self.is_too_long() or not self.read():
                break
        self.pipe.close()


def run_program(program: Program, clock: Clock) -> ProgramEnd:
    """Run a program to its end, or end it. Raises OSError when it cannot be started."""
    is_wanted = program.max_bytes is not None
    process = subprocess.Popen(  # noqa: S603  # the user's own program, without a shell
        program.words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if is_wanted else subprocess.STDOUT,
        env={name: os.environ[name] for name in INHERITED if name in os.environ} | dict(program.environment),
        cwd=program.folder,
        start_new_session=True,
    )
    printed = _Pipe(cast(IO[bytes], process.stdout), program.max_bytes)
    pipes = [printed, _Pipe(cast(IO[bytes], process.stderr))] if is_wanted else [printed]
    try:
        text = _watch(process, pipes, program.seconds, clock) or "timed out"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGCONT)  # one that stands still cannot hear it
            _watch(process, pipes, TERMINATE_SECONDS, clock)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end_processes(program.environment["ADCE_DB"], program.environment["ADCE_TASK"])
        for pipe in pipes:
            pipe.close()
    if printed.is_too_long():
        text = f"printed more than {program.max_bytes} bytes"
    return ProgramEnd(text, bytes(pipes[-1].kept), bytes(printed.kept) if is_wanted else b"")


def _watch(process: subprocess.Popen[bytes], pipes: Sequence[_Pipe], seconds: float, clock: Clock) -> str | None:
    """Read what a program prints until it ends, and tell how. None: its time is over, or it printed too much."""
    until = clock.boot() + seconds
    ended = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            for pipe in pipes:
                selector.register(pipe.pipe, selectors.EVENT_READ, pipe)
            while (left := until - clock.boot()) > 0:
                for key, _ in selector.select(left):
                    if key.data is None:
                        return _end_of(process.wait())
                    if key.data.is_too_long():
                        return None
                    if not key.data.read():
                        selector.unregister(key.fileobj)
    finally:
        os.close(ended)
    return None


def _end_of(code: int) -> str:
    if code >= 0:
        return f"exit {code}"
    names = {member.value: member.name for member in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def end_processes(database: str, tasks: str = "") -> int:
    """Kill what commands have left behind, those for these tasks or all of this database, in whatever group it is:
    each process of this user that began with their variables. Returns how many there were."""
    marks = [f"\0ADCE_DB={database}\0".encode(), f"\0ADCE_TASK={tasks}{tasks and chr(0)}".encode()]
    ended: set[int] = set()
    for _ in range(KILLING_ROUNDS):  # one that forks meanwhile has left a child
        found = {number for number in _processes() if _kill_marked(number, marks)}
        if not found:
            break
        ended |= found
    return len(ended)


def _processes() -> list[int]:
    with contextlib.suppress(OSError):  # no descriptor is left: the next start does it
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]  # noqa: PTH208
    return []


def _kill_marked(number: int, marks: Sequence[bytes]) -> bool:
    """Kill a living process whose first environment holds all marks, and wait until it is dead."""
    try:
        handle = os.pidfd_open(number)  # now the number cannot become another's
    except OSError:
        return False
    try:
        environment = b"\0" + Path(f"/proc/{number}/environ").read_bytes()
        if not all(mark in environment for mark in marks):
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        poller.poll(1000)
    except OSError:  # it has ended, or is another user's
        return False
    finally:
        os.close(handle)
    return True


# ---------------------------------------------------------------- Scrapers
# Other ways to bring an object: a program in any language, or a function. Headlines: run_command(),
# call_function().


def output_folder(database: Path) -> Path:
    """Where commands may leave objects for ADCE to store; what a crash left in it is swept at each start."""
    return database.with_name(f"{database.name}-output")


def run_command(spec: FetchSpec, store: Store, clock: Clock) -> list[Result]:
    """Run a program; it has succeeded for each object that is whole in the store afterwards.

    What it prints (`output: stdout`) or leaves at $ADCE_OUTPUT is put there for it, if it exits with 0: a part
    of an object can look whole."""
    database = Path(spec.environment["ADCE_DB"])
    output_folder(database).mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_folder(database), ignore_cleanup_errors=True) as folder:
        place = Path(folder) if spec.dataset.batch else Path(folder, "object")
        program = Program(
            words=_command_words(spec),
            folder=Path(spec.environment["ADCE_CONFIG"]).parent,
            environment={
                **{name: os.environ[name] for name in spec.dataset.environment if name in os.environ},
                **spec.environment,
                "ADCE_OUTPUT": str(place),
            },
            seconds=spec.dataset.timeout_seconds,
            max_bytes=spec.dataset.validate.max_bytes if spec.dataset.output == "stdout" else None,
        )
        try:
            end = run_program(program, clock)
        except (OSError, ValueError) as error:
            text = f"cannot start {program.words[0]}: {getattr(error, 'strerror', None) or error}"
            return [Result(Outcome.ERROR, text)] * len(spec.targets)
        results = []
        for target in spec.targets:
            handed = place / target.key if spec.dataset.batch else place
            body = end.body if spec.dataset.output == "stdout" else _read_file(handed, spec.dataset.validate.max_bytes)
            result = _judge_end(spec, target, end, body, store)
            results.append(dataclasses.replace(result, output=end.tail.decode("utf-8", "replace")))
        return results


def _command_words(spec: FetchSpec) -> tuple[str, ...]:
    fields: dict[str, str] = dict(spec.targets[0].fields)
    for name in spec.dataset.partitions.own_fields():
        fields[f"{name}s"] = ",".join(target.fields[name] for target in spec.targets)
    return tuple(word.render(fields, str) for word in spec.dataset.command)


def _judge_end(spec: FetchSpec, target: Target, end: ProgramEnd, body: bytes | None, store: Store) -> Result:
    """What a program has done for one object."""
    outcome = Outcome.TIMEOUT if end.is_late() else Outcome.ERROR
    told = f"({end.text}): {excerpt(end.tail[-120:])}"
    if body and end.is_good():
        return keep(spec, target, body, store)
    if body:
        return Result(outcome, f"handed over {len(body)} bytes, which are not taken {told}")
    return _look_again(spec, target, store, Result(outcome, told))


def _look_again(spec: FetchSpec, target: Target, store: Store, otherwise: Result) -> Result:
    """What a scraper that writes to the store has left there; what was there before does not count."""
    found = look(spec, target, store)
    if found is None:
        return dataclasses.replace(otherwise, error=f"left no object {otherwise.error}")
    if found.stored and (found.stored.etag, found.stored.modified_at) == target.version:
        return dataclasses.replace(otherwise, error=f"left the object as it was {otherwise.error}")
    return found


def _read_file(place: Path, most: int) -> bytes | None:
    """A plain file that a program has left, one byte more than `most` at most. Anything else is none."""
    try:
        with open(place, "rb", opener=_open_plainly) as file:  # closes also what it refuses
            return file.read(most + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None


def _open_plainly(place: str, flags: int) -> int:
    return os.open(place, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def call_function(spec: FetchSpec, store: Store) -> Result:
    """Call module:function with the fields that it names, and `session` if it does: a session under its source's
    limits. It returns the object's bytes, their iterator or a path to them, or None when it has stored the
    object itself. The module may lie beside adce.yaml."""
    module, _, name = (spec.dataset.call or "").partition(":")
    target, most = spec.targets[0], spec.dataset.validate.max_bytes
    folder = str(Path(spec.environment["ADCE_CONFIG"]).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    function = getattr(importlib.import_module(module), name)
    arguments: dict[str, Any] = {name: text for name, text in target.fields.items() if _taken_by(function, name)}
    if _taken_by(function, "session"):
        config = spec.environment["ADCE_CONFIG"]
        arguments["session"] = session(spec.source.name, config, spec.dataset.timeout_seconds)
    serving = SERVED.set((spec.environment["ADCE_SOURCE"], spec.environment["ADCE_TASK"]))
    try:
        value = function(**arguments)
        if value is None:
            return _look_again(spec, target, store, Result(Outcome.ERROR, "(returned None)"))
        body = _body_of(value, most)
    except RateLimitedError as error:
        return Result(Outcome.LOST, str(error), retry_after=error.seconds)  # nobody's fault
    finally:
        SERVED.reset(serving)
    if body is None:
        text = f"{spec.dataset.call} returned {type(value).__name__}: not bytes, an iterator of bytes or a path"
        return Result(Outcome.ERROR, text)
    return keep(spec, target, body, store)


def _taken_by(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name, or takes any."""
    parameters = signature(function).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _body_of(value: Any, most: int) -> bytes | None:
    """The bytes that a function has returned, one block more than `most` at most; None: it returned none."""
    if isinstance(value, str | Path):
        with Path(value).open("rb") as file:
            return file.read(most + 1)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, Iterator):
        return None
    body = bytearray()
    for block in value:
        body += block
        if len(body) > most:
            break
    return bytes(body)


# ---------------------------------------------------------------- Fetch
# Does one execution, whatever its kind, without the database. Headline: fetch().


def fetch(spec: FetchSpec, store: Store, clock: Clock) -> list[Result]:
    """Bring the objects of a spec into the store. One result for each target; never raises.

    An object that is in the store already, and whole, is not asked for again."""
    try:
        if len(spec.targets) == 1 and spec.targets[0].is_missing and not spec.hops:
            found = look(spec, spec.targets[0], store)
            if found and found.outcome is Outcome.OK:
                return [found]
        if spec.dataset.command:
            return run_command(spec, store, clock)
        if spec.dataset.call:
            return [call_function(spec, store)]
        if not spec.url:
            return [Result(Outcome.ERROR, "its fields are those of an older adce.yaml, see `reconcile`")]
        return [request(spec, store, clock)]
    except StoreError as error:
        return [_refused(error)] * len(spec.targets)
    except BaseException as error:  # noqa: BLE001  # whatever a scraper raises is the attempt's error
        return [Result(Outcome.ERROR, describe(error))] * len(spec.targets)


# ---------------------------------------------------------------- Tables
# Rows as text: for a person, for a program, for a page. Headline: render().

FORMATS = ("table", "json", "csv", "github", "html")
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Section:
    """A titled table. `name` is its key in JSON."""

    name: str
    title: str
    rows: Rows
    is_one: bool = False  # one thing with many properties, rather than many things
    empty: str = "none"


def query(database: Database, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> Rows:
    """Rows as dictionaries, in the order of the columns."""
    return [dict(row) for row in database.read(sql, parameters)]


def render(sections: Sequence[Section], style: str, width: int | None = None) -> str:
    """Sections as text. JSON is one document; a table is cut to `width` columns when one is given."""
    if style == "json":
        values = {
            section.name: next(iter(section.rows), None) if section.is_one else section.rows for section in sections
        }
        document = next(iter(values.values())) if len(values) == 1 else values
        return json.dumps(document, indent=2, ensure_ascii=False, default=str)
    if style == "csv":
        return "\n".join(_csv(section) for section in sections).rstrip("\n")
    blocks = []
    for section in sections:
        rows = (
            [{"what": name, "value": value} for row in section.rows for name, value in row.items()]
            if section.is_one
            else section.rows
        )
        body = _table(rows, style, width) if rows else section.empty
        title = {"html": f"<h2>{html.escape(section.title)}</h2>", "github": f"### {section.title}\n"}.get(
            style, section.title
        )
        blocks.append(f"{title}\n{body}" if section.title else body)
    return "\n\n".join(blocks)


def _csv(section: Section) -> str:
    text = io.StringIO()
    if section.rows:
        writer = csv.DictWriter(text, fieldnames=list(section.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(section.rows)
    return text.getvalue()


def cut(line: str, columns: int) -> str:
    """As much of a line as fits: wide letters take two columns."""
    widths = (1 + (unicodedata.east_asian_width(letter) in "WF") for letter in line)
    return "".join(letter for letter, end in zip(line, itertools.accumulate(widths), strict=True) if end <= columns)


def _table(rows: Rows, style: str, width: int | None) -> str:
    import tabulate

    numeric = [all(isinstance(row[name], int | float | None) for row in rows) for name in rows[0]]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    if style == "html":
        cells = [[html.escape(cell) for cell in row] for row in cells]
    elif style == "github":
        cells = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    text = tabulate.tabulate(
        cells,
        headers=[name.replace("_", " ") for name in rows[0]] if style == "html" else list(rows[0]),
        tablefmt={"table": "simple", "github": "github", "html": "unsafehtml"}[style],
        disable_numparse=True,
        colalign=["right" if is_number else "left" for is_number in numeric],
    )
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line if not width or line == cut(line, width) else f"{cut(line, width - 1)}…" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---------------------------------------------------------------- Coverage
# What is expected and what is there, in sums and by day. Headline: coverage_sections().


def coverage_sections(
    database: Database,
    source: str | None = None,
    dataset: str | None = None,
    *,
    by_day: bool = False,
    year: int | None = None,
) -> list[Section]:
    """What is expected and what is there, by dataset and season, or of what has a day by that, the latest first, and
    of a `year` alone if it is given."""
    wanted = "where (:source is null or source = :source) and (:dataset is null or dataset = :dataset)"
    by_season = f"select * from coverage {wanted} order by source, dataset, season"  # noqa: S608  # fixed words
    of_year = "and (:year is null or day glob :year || '-*')"
    daily = f"select * from coverage_by_day {wanted} {of_year} order by source, dataset, day desc"  # noqa: S608
    names = {"source": source, "dataset": dataset, "year": year}
    rows = query(database, daily if by_day else by_season, names)
    title = "Coverage by dataset and day" if by_day else "Coverage by dataset and season"
    nothing = f"nothing of {year}" if by_day and year else "nothing is expected yet; run a cycle: adce.py reconcile"
    return [Section("coverage", title, rows, empty=nothing)]


def strip_section(database: Database, year: int | None, now: float) -> Section:
    """A year in a line for each dataset that has days: a letter for each week."""
    year = year or latest_year(database, now)
    weeks: dict[str, list[tuple[int, int]]] = {}
    for name, day, expected, present in database.read(CALENDAR, {"first": f"{year}-01-01", "last": f"{year}-12-31"}):
        strip = weeks.setdefault(name, [(0, 0)] * 53)
        week = (datetime.date.fromisoformat(day).timetuple().tm_yday - 1) // 7
        strip[week] = strip[week][0] + expected, strip[week][1] + present
    rows = [
        {"dataset": name, "weeks": "".join(_letter(*week) for week in strip)} for name, strip in sorted(weeks.items())
    ]
    title = f"The weeks of {year}: # all there, + a part, x nothing, . nothing expected"
    return Section("weeks", title, rows, empty="no dataset has days in it")


def _letter(expected: int, present: int) -> str:
    return "." if not expected else "#" if present == expected else "+" if present else "x"


def latest_year(database: Database, now: float) -> int:
    """The last year, up to now, that has days."""
    today = day_of(now).isoformat()
    latest = database.value(f"select max(last) from ({DAYS})", {"until": today})  # noqa: S608  # fixed words
    return int((latest or today)[:4])


# for each of what is counted, its first and last day
DAYS = """
    select (select min(o.day) from objects o
            where o.dataset_id = c.dataset_id and o.season is nullif(c.season, '') and o.state = c.state) as first,
           (select max(o.day) from objects o
            where o.dataset_id = c.dataset_id and o.season is nullif(c.season, '') and o.state = c.state
              and o.day <= :until) as last
    from counts c
    where c.objects > 0
"""
CALENDAR = """
    select d.dataset, o.day, count(*) as expected, sum(o.state = 'present') as present
    from counts c
    cross join objects o indexed by objects_by_state
        on o.dataset_id = c.dataset_id and o.season is nullif(c.season, '') and o.state = c.state
    join datasets d on d.dataset_id = c.dataset_id
    where c.state in ('present', 'missing', 'stale', 'suspect') and c.objects > 0 and o.day between :first and :last
    group by d.dataset, o.day
"""
COVERAGE_BY_DATASET = """
    select source, dataset, sum(expected) as expected, sum(present) as present, sum(missing) as missing,
           sum(stale) as stale, sum(suspect) as suspect, sum(gave_up) as gave_up,
           sum(present) * 10000 / sum(expected) / 100.0 as percent
    from coverage
    group by source, dataset
"""
COVERAGE_BY_SOURCE = """
    select source, sum(expected) as expected, sum(present) as present, sum(missing) as missing,
           sum(stale) as stale, sum(suspect) as suspect, sum(gave_up) as gave_up,
           sum(present) * 10000 / sum(expected) / 100.0 as percent
    from coverage
    group by source
"""
COVERAGE_IN_ALL = """
    select sum(expected) as expected, sum(present) as present, sum(missing) as missing,
           sum(stale) as stale, sum(suspect) as suspect, sum(gave_up) as gave_up,
           sum(present) * 10000 / sum(expected) / 100.0 as percent
    from coverage
    having sum(expected) > 0
"""


# ---------------------------------------------------------------- Report
# Tells: questions in SQL, answers as sections of rows. Nothing here changes anything. Headlines: the
# functions named *_sections.


def report_sections(database: Database, scrapers: Mapping[str, str], since_seconds: float, now: float) -> list[Section]:
    """The whole picture: coverage, queue, attempts, limits, cycles, what is wrong. `scrapers` are those of the
    datasets."""
    since = {"since": now - since_seconds, "now": now}
    span = format_duration(since_seconds)
    attempts = query(database, ATTEMPTS_BY_DATASET, since)
    return [
        Section("sources", "Coverage by source", query(database, COVERAGE_BY_SOURCE)),
        Section("coverage", "Coverage by dataset", query(database, COVERAGE_BY_DATASET)),
        Section("total", "In all", query(database, COVERAGE_IN_ALL), is_one=True, empty="nothing is expected yet"),
        Section("queue", "Open tasks by priority", query(database, QUEUE_BY_PRIORITY)),
        Section("reasons", "Why objects are missing, stale or suspect", query(database, GAPS_BY_REASON)),
        Section("datasets", f"Attempts of the last {span}", attempts),
        Section("scrapers", "By scraper", by_scraper(attempts, scrapers)),
        Section("attempts", f"How attempts of the last {span} ended", query(database, ATTEMPTS_BY_OUTCOME, since)),
        Section("rates", "Rate limits", query(database, RATES)),
        Section("cycles", "The last cycles", query(database, "select * from cycles order by cycle_id desc limit 5")),
        Section("listing", f"Cycles of the last {span}", query(database, CYCLES, since), is_one=True),
    ]


def scraper_of(dataset: Dataset) -> str:
    """What brings its objects, without what differs between them; several datasets may share it."""
    if dataset.url:
        return f"GET {dataset.url.text.partition('?')[0].partition('{')[0]}"
    words = [template.text for template in dataset.command]
    return dataset.call or " ".join(itertools.takewhile(lambda word: "{" not in word, words))


def by_scraper(attempts: Rows, scrapers: Mapping[str, str]) -> Rows:
    """The attempts of datasets, summed over those that one scraper brings."""
    sums: dict[str, collections.Counter[str]] = {}
    for row in attempts:
        told = sums.setdefault(scrapers.get(row["dataset"], "no longer declared"), collections.Counter())
        told.update({name: row[name] or 0 for name in ("attempts", "failed", "requests", "bytes")}, datasets=1)
    return [
        {
            "scraper": scraper,
            "datasets": told["datasets"],
            "attempts": told["attempts"],
            "failed": told["failed"],
            "error_percent": round(100 * told["failed"] / told["attempts"], 1),
            "requests": told["requests"],
            "bytes": told["bytes"],
        }
        for scraper, told in sorted(sums.items())
    ]


QUEUE_BY_PRIORITY = """
    select priority,
           coalesce(sum(tasks) filter (where state = 'pending'), 0) as pending,
           coalesce(sum(tasks) filter (where state = 'retry'), 0) as retry,
           coalesce(sum(tasks) filter (where state = 'running'), 0) as running,
           coalesce(sum(tasks) filter (where state = 'gave_up'), 0) as gave_up,
           round((unixepoch() - (
               select min(detected_at)
               from tasks t
               where t.priority = c.priority and t.state in ('pending', 'retry', 'running', 'gave_up'))) / 3600.0, 2
           ) as oldest_hours
    from task_counts c
    group by priority
    having oldest_hours is not null
    order by min(case priority when 'CRITICAL' then 1 when 'HIGH' then 2 when 'MEDIUM' then 3 else 4 end)
"""
GAPS_BY_REASON = """
    with reasons as (
        select t.dataset_id, o.state as kind, t.state as task, count(*) as objects,
               coalesce(max(t.last_error), max(o.reason)) as example, min(o.since) as oldest
        from tasks t cross join objects o using (object_id)
        where t.state in ('pending', 'retry', 'running', 'gave_up')
        group by t.dataset_id, o.state, t.state, substr(coalesce(t.last_error, o.reason), 1, 24)
    )
    select dataset, kind, task, objects, example, strftime('%Y-%m-%dT%H:%M:%SZ', oldest, 'unixepoch') as oldest
    from reasons join datasets using (dataset_id)
    order by objects desc
    limit 20
"""
ATTEMPTS_BY_OUTCOME = """
    select d.dataset, a.outcome, count(*) as attempts, sum(a.requests) as requests,
           round(avg(a.seconds), 3) as mean_seconds, round(max(a.seconds), 3) as longest, sum(a.bytes) as bytes
    from attempts a
    join tasks t using (task_id)
    join datasets d using (dataset_id)
    where a.started_at >= :since
    group by d.dataset, a.outcome
    order by d.dataset, attempts desc
"""
ATTEMPTS_BY_DATASET = """
    with ended as (
        select d.source, d.dataset, a.outcome, a.seconds, a.requests, a.bytes,
               row_number() over (partition by t.dataset_id order by a.seconds) as place,
               count(*) over (partition by t.dataset_id) as attempts
        from attempts a
        join tasks t using (task_id)
        join datasets d using (dataset_id)
        where a.started_at >= :since and a.outcome != 'running'
    )
    select source, dataset, count(*) as attempts,
           sum(outcome not in ('ok', 'not_yet', 'lost')) as failed,
           round(100.0 * sum(outcome not in ('ok', 'not_yet', 'lost')) / count(*), 1) as error_percent,
           -- of what they took in seconds: half was faster than p50
           round(min(seconds) filter (where place >= 0.50 * attempts), 3) as p50,
           round(min(seconds) filter (where place >= 0.95 * attempts), 3) as p95,
           round(min(seconds) filter (where place >= 0.99 * attempts), 3) as p99,
           sum(requests) as requests, sum(bytes) as bytes
    from ended
    group by source, dataset
    order by source, dataset
"""
CYCLES = """
    select count(*) as cycles,
           round((max(started_at) - min(started_at)) / 60 / nullif(count(*) - 1, 0), 1) as minutes_between,
           round(avg(seconds), 3) as mean_seconds, round(max(seconds), 3) as longest, count(error) as with_trouble,
           sum(created) as created, sum(closed) as closed, sum(list_calls) as list_calls,
           -- what S3 asks for them: 0.005 USD for 1,000
           round(sum(list_calls) * 0.005 / 1000, 4) as s3_list_usd
    from reconciliations
    where started_at >= :since
    having count(*) > 0
"""
RATES = """
    select scope, window_seconds, max_requests, used, in_flight, waiting, blocked_until, free_at, why
    from rates
    order by scope = 'global', scope, window_seconds
"""


# how long the tasks of each source take at its limits, with a request for each
WAITING_BY_SOURCE = """
    with waiting as (
        select source, sum(tasks) as tasks
        from task_counts join datasets using (dataset_id)
        where state = 'pending' and active
        group by source
        having sum(tasks) > 0
    )
    select source, tasks, round(max(tasks * window_seconds / max_requests) / 60, 1) as least_minutes
    from waiting left join windows on scope = source
    group by source
"""


def next_steps(database: Database) -> list[str]:
    """Commands that answer the questions which the figures raise."""
    steps = []
    if database.value("select 1 from tasks where state = 'gave_up' limit 1"):
        steps.append("adce.py tasks --state gave_up     what gave up, and why")
    if database.value("select 1 from objects where state in ('missing', 'stale', 'suspect') limit 1"):
        steps.append("adce.py plan                      what the next run would do")
    if database.value("select error from cycles order by cycle_id desc limit 1"):
        steps.append("adce.py check                     is everything in order?")
    return steps


def runner_state(database: Database, lock: RunnerLock, now: float) -> dict[str, Any]:
    """Whether a runner works, and its last signs of life."""
    rows = query(database, "select * from runner")
    holder = lock.holder()
    if holder is not None and (not rows or rows[0]["pid"] != holder):  # it has said nothing of itself yet
        return {"runner": "running", "pid": holder or None}
    if not rows:
        return {"runner": "never ran"}
    row = rows[0]
    if holder is not None:
        return {
            "runner": "running",
            "pid": holder,
            "version": row["version"],
            "started_at": utc_text(row["started_at"]),
            "last_sign_of_life": utc_text(row["beat_at"]),
            "uptime": format_duration(now - row["started_at"]),
            "lost_workers": row["lost_workers"] or None,
            "address": row["address"],
            "unit": row["unit"],
            "log": row["log"],
        }
    ended = (
        {"stopped_at": utc_text(row["stopped_at"]), "note": row["note"]}
        if row["stopped_at"]
        else {"note": "ended without a word"}
    )
    return {"runner": "not running", "last_sign_of_life": utc_text(row["beat_at"]), **ended}


def status_sections(database: Database, configuration: Configuration, lock: RunnerLock, now: float) -> list[Section]:
    """In one screen: is it running, is the lake complete, what is under way, which sources can be asked."""
    cycle = query(database, "select * from cycles order by cycle_id desc limit 1")
    counts = query(
        database, "select state, sum(objects) as n from counts where state not in ('awaited', 'dropped') group by state"
    )
    by_state = {row["state"]: row["n"] for row in counts}
    tasks = query(
        database,
        """
        select coalesce(sum(tasks) filter (where state = 'pending'), 0) as pending,
               coalesce(sum(tasks) filter (where state = 'running'), 0) as running,
               coalesce(sum(tasks) filter (where state = 'retry'), 0) as retry,
               coalesce(sum(tasks) filter (where state = 'gave_up'), 0) as gave_up,
               (select strftime('%Y-%m-%dT%H:%M:%SZ', min(next_at), 'unixepoch')
                from tasks where state = 'retry') as next_retry
        from task_counts
        """,
    )
    expected = sum(by_state.values())
    coverage = {
        "expected": expected,
        **{str(state): by_state.get(state, 0) for state in (ObjectState.PRESENT, *GAPS)},
        "percent": by_state.get("present", 0) * 10000 // expected / 100 if expected else None,
    }
    log = configuration.database.with_name(f"{configuration.database.name}-wal")
    overview = {
        **runner_state(database, lock, now),
        "database": str(configuration.database),
        "store": configuration.store or None,
        "database_bytes": configuration.database.stat().st_size + (log.stat().st_size if log.exists() else 0),
        "disk_free_bytes": shutil.disk_usage(configuration.database.parent).free,
    }
    return [
        Section("runner", "Runner", [overview], is_one=True),
        Section("lake", "Lake", [coverage], is_one=True),
        Section("tasks", "Tasks", tasks, is_one=True),
        Section("cycle", "Last cycle", cycle, is_one=True, empty="no cycle yet"),
        Section("sources", "Sources", query(database, RATES)),
        Section("alerts", "Alerts", query(database, "select * from open_alerts")),
        Section("broken_channels", "Channels that do not work", query(database, "select * from broken_channels")),
    ]


def tasks_sections(database: Database, filters: Mapping[str, str | None], most: int) -> list[Section]:
    """The open tasks that match, the most urgent first; those that gave up come last."""
    sql = """
        from queue
        where (:state is null or state = :state)
          and (:dataset is null or dataset = :dataset)
          and (:source is null or source = :source)
    """
    count = database.value(f"select count(*) {sql}", filters)
    rows = query(
        database,
        f"select * {sql} order by state = 'gave_up', score desc, task_id limit :most",
        {**filters, "most": most},
    )
    title = f"{count} open tasks" + (f", the first {most}" if count > most else "")
    return [Section("tasks", title, rows)]


def task_sections(database: Database, task_id: int) -> list[Section]:
    """One task with all that is known of it. Raises Error when there is none."""
    sql = """
        select t.task_id, t.state, t.priority, d.source, d.dataset, o.key, o.state as object, o.reason, o.fields,
               strftime('%Y-%m-%dT%H:%M:%SZ', t.detected_at, 'unixepoch') as detected_at,
               round(t.rank + t.slope * unixepoch() / 3600.0 + d.bonus, 2) as score,
               t.gap_size, t.attempts, t.failures,
               strftime('%Y-%m-%dT%H:%M:%SZ', t.next_at, 'unixepoch') as next_at,
               strftime('%Y-%m-%dT%H:%M:%SZ', t.closed_at, 'unixepoch') as closed_at,
               t.last_error, o.size, o.etag
        from tasks t join datasets d using (dataset_id) join objects o using (object_id)
        where t.task_id = ?
    """
    rows = query(database, sql, (task_id,))
    if not rows:
        raise Error(f"there is no task {task_id}", "see: adce.py tasks")
    attempts = """
        select attempt_id, started_at, seconds, outcome, http_status, bytes, error
        from recent_attempts where task_id = ?
    """
    output = query(
        database,
        """
        select attempt_id, output from attempts
        where task_id = ? and output is not null
        order by attempt_id desc limit 1
        """,
        (task_id,),
    )
    return [
        Section("task", f"Task {task_id}", rows, is_one=True),
        Section("attempts", "Attempts, the latest first", query(database, attempts, (task_id,))),
        *(
            Section("output", f"Printed by attempt {row['attempt_id']}", [{"line": line} for line in lines])
            for row in output
            if (lines := row["output"].splitlines())
        ),
    ]


# ---------------------------------------------------------------- Plan
# What a run would do, of a cycle on a copy of the database. Headline: plan_sections().


# sources that nobody may ask now
PAUSED = """
    with paused as (
        select source from datasets
        where exists (select 1 from rates where scope in (source, 'global') and blocked_until is not null)
    )
"""


def plan_sections(database: Database, before: Mapping[str, int], most: int) -> list[Section]:
    """What a run would do with the queue as it is; what was expected `before` the configuration was read."""
    after = expected_by_dataset(database)
    changes = [
        {"dataset": name, "expected_now": before.get(name, 0), "expected_then": after.get(name, 0)}
        for name in sorted(before.keys() | after.keys())
        if before.get(name, 0) != after.get(name, 0)
    ]
    sql = """
        select dataset,
               sum(state = 'pending' and source not in paused) as now,
               sum(state = 'pending' and source in paused) as paused,
               sum(state = 'retry') as later, sum(state = 'gave_up') as gave_up,
               min(case when state = 'retry' then next_at end) as next_retry, max(last_error) as last_error
        from queue
        group by dataset
        order by dataset
    """
    first = """
        select score, priority, dataset, key, reason, attempts
        from queue where state = 'pending' and source not in paused
        order by score desc, task_id limit ?
    """
    return [
        Section("changes", "What would be expected", changes, empty="the same as now"),
        Section("datasets", "What would be asked for", query(database, PAUSED + sql), empty="nothing"),
        Section("sources", "How long that takes, with a request for each task", query(database, WAITING_BY_SOURCE)),
        Section(
            "first",
            f"First of them (at most {most})",
            query(database, PAUSED + first, (most,)),
            empty="nothing can start now",
        ),
    ]


# ---------------------------------------------------------------- Page
# The whole picture as one HTML document: no script, no request to anywhere, colours that are also said in words.
# Headline: page().

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PAGE_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; --line: #8886; --none: #8883;
        --all: #1b4f9c; --part: #7fb2e5; --gap: #d9822b; --lost: #b3261e; }
body { max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } p { overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; } h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: 0; }
.cards div { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem; }
.cards dt { font-size: .85rem; } .cards dd { margin: 0; font-size: 1.2rem; }
.wide { overflow-x: auto; } svg { display: block; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
.all { fill: var(--all); } .part { fill: var(--part); } .gap { fill: var(--gap); } .lost { fill: var(--lost); }
.none { fill: var(--none); }
"""
QUEUE_HEAD = """
    -- the score in its parts: what it was when the gap was found, what it has gained by age, and its dataset's bonus
    select o.key, t.priority, d.source,
           round(t.rank + t.slope * t.detected_at / 3600.0, 1) as at_first,
           round(t.slope * (unixepoch() - t.detected_at) / 3600.0, 1) as for_age,
           round(d.bonus, 1) as for_reliability,
           round(t.rank + t.slope * unixepoch() / 3600.0 + d.bonus, 1) as score,
           coalesce(t.last_error, o.reason, o.state) as reason
    from datasets d
    join tasks t on t.task_id in (
        select task_id from tasks
        where dataset_id = d.dataset_id and state = 'pending'
        order by rank desc, task_id
        limit 10)
    join objects o using (object_id)
    where d.active
    order by score desc
    limit 10
"""
RUNNING = """
    select o.key, d.source, t.attempts as attempt,
           round(max(0, (julianday('now') - 2440587.5) * 86400 - a.started_at), 1) as seconds
    from attempts a join tasks t using (attempt_id) join datasets d using (dataset_id) join objects o using (object_id)
    where a.outcome = 'running'
"""
PRIORITIES = """
    select priority, sum(tasks) as open
    from task_counts
    where state in ('pending', 'retry', 'running', 'gave_up')
    group by priority
    having open > 0
"""
CELL = 11  # pixels
LAST_CYCLES = 96


def page(database: Database, status: Sequence[Section], now: float, year: int | None = None) -> str:
    """One HTML document; `status` are the sections of status_sections()."""
    facts = {section.name: section.rows[0] if section.rows else {} for section in status}
    gaps = sum(facts["lake"][kind] or 0 for kind in GAPS)
    verdict = "complete" if facts["lake"]["expected"] else "nothing expected yet"
    if gaps:
        verdict = f"{gaps:,} gap{'s' if gaps > 1 else ''}"
    elif facts["cycle"].get("error"):
        verdict = "not known: the last cycle could not look at everything"
    if alerts := query(database, "select * from open_alerts"):
        verdict += f", {len(alerts)} alert{'s' if len(alerts) > 1 else ''}"
    year = year or latest_year(database, now)
    news = [
        Section("alerts", "Alerts", alerts),
        Section("channels", "Channels that do not work", query(database, "select * from broken_channels")),
    ]
    tables = [
        Section("queue", "First in the queue", query(database, QUEUE_HEAD), empty="nothing is open"),
        Section("priorities", "Open tasks by priority", query(database, PRIORITIES), empty="none"),
        Section("rates", "Rate limits", query(database, RATES)),
        Section("running", "Running now", query(database, RUNNING), empty="nothing"),
        Section("attempts", "The last attempts", query(database, "select * from recent_attempts limit 20")),
    ]
    coverage = Section("coverage", "Coverage by dataset", query(database, COVERAGE_BY_DATASET))
    title = html.escape(f"ADCE: {verdict}")
    steps = html.escape("\n".join(next_steps(database)))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{PAGE_STYLE}</style></head>
<body><main><h1>{title}</h1><p>{html.escape(str(facts["runner"].get("store")))}, {utc_text(now)}</p>
{_cards(facts)}
{_blocks([section for section in news if section.rows])}
{f"<h2>What to do next</h2>{WIDE}<pre>{steps}</pre></div>" if steps else ""}
{_blocks([coverage])}
<h2>Coverage by day, {year}</h2>{_years(database, year)}
<p>A square is a day: dark blue when all of it is there, light blue when a part is, orange when nothing is, grey when
nothing is expected.</p>{_calendars(database, year)}
<h2>The last cycles</h2>{_cycle_bars(database)}
{_blocks(tables)}</main></body></html>
"""


WIDE = '<div class="wide" tabindex="0">'  # scrolls by itself, also by keyboard


def _blocks(sections: Sequence[Section]) -> str:
    return "".join(f"{WIDE}{render([section], 'html')}</div>" for section in sections)


def _cards(facts: Mapping[str, Mapping[str, Any]]) -> str:
    lake, tasks, cycle = facts["lake"], facts["tasks"], facts["cycle"]
    cards = {
        "runner": facts["runner"]["runner"],
        "coverage": f"{lake['percent']} %" if lake["percent"] is not None else "-",
        **{str(kind): f"{lake[kind] or 0:,}" for kind in GAPS},
        "open tasks": f"{(tasks['pending'] or 0) + (tasks['retry'] or 0) + (tasks['running'] or 0):,}",
        "gave up": f"{tasks['gave_up'] or 0:,}",
        "last cycle": cycle.get("started_at", "none"),
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in cards.items())
    return f'<dl class="cards">{shown}</dl>'


def _years(database: Database, year: int) -> str:
    """A link for each year that has days."""
    ends = f"select min(first), max(last) from ({DAYS})"  # noqa: S608  # fixed words
    first, last = database.read(ends, {"until": "9999"})[0]
    if first is None:
        return "<p>nothing has a day yet</p>"
    years = range(int(first[:4]), int(last[:4]) + 1)
    links = [f"<b>{one}</b>" if one == year else f'<a href="?year={one}">{one}</a>' for one in years]
    return f"<nav aria-label='Years'>{' '.join(links)}</nav>"


def _calendars(database: Database, year: int) -> str:
    """A year of days for each dataset: a column is a week, a cell a day, its title says what its colour does."""
    by_dataset: dict[str, dict[str, tuple[int, int]]] = {}
    for name, day, expected, present in database.read(CALENDAR, {"first": f"{year}-01-01", "last": f"{year}-12-31"}):
        by_dataset.setdefault(name, {})[day] = expected, present
    return "".join(_calendar(name, year, days) for name, days in sorted(by_dataset.items()))


def _calendar(dataset: str, year: int, days: Mapping[str, tuple[int, int]]) -> str:
    first, cells = datetime.date(year, 1, 1), []
    for number in range((datetime.date(year + 1, 1, 1) - first).days):
        day = first + datetime.timedelta(days=number)
        expected, present = days.get(day.isoformat(), (0, 0))
        kind = "none" if not expected else "all" if present == expected else "part" if present else "gap"
        week, weekday = divmod(number + first.weekday(), 7)
        told = f"{present} of {expected}" if expected else "nothing expected"
        place = f'x="{week * CELL}" y="{weekday * CELL}" width="{CELL - 2}" height="{CELL - 2}"'
        cells.append(f'<rect class="{kind}" {place}><title>{day:%a} {day}: {told}</title></rect>')
    expected, present = (sum(pair[place] for pair in days.values()) for place in (0, 1))
    told = html.escape(f"{dataset}: {present:,} of {expected:,} in {year}")
    incomplete = [f"{day} ({there} of {wanted})" for day, (wanted, there) in sorted(days.items()) if there < wanted]
    words = html.escape(", ".join(incomplete[:50]) + (" ..." if len(incomplete) > 50 else ""))
    details = f"<details><summary>{len(incomplete)} days are not complete</summary><p>{words}</p></details>"
    size = f'width="{54 * CELL}" height="{7 * CELL}"'
    svg = f'<svg role="img" aria-label="{told}" {size}>{"".join(cells)}</svg>'
    return f"<h3>{told}</h3>{WIDE}{svg}</div>{details if incomplete else ''}"


def _cycle_bars(database: Database) -> str:
    """A bar for each cycle, as high as it took long; one that had trouble says so."""
    sql = """
        select * from (
            select cycle_id, started_at, seconds, list_calls, missing + stale + suspect as gaps, error
            from reconciliations where seconds is not null
            order by cycle_id desc limit ?)
        order by cycle_id
    """
    rows = query(database, sql, (LAST_CYCLES,))
    if not rows:
        return "<p>none yet</p>"
    longest = max(row["seconds"] for row in rows) or 1
    bars = []
    for number, row in enumerate(rows):
        height = 4 + round(56 * row["seconds"] / longest)
        told = f"cycle {row['cycle_id']}, {utc_text(row['started_at'])}: {row['seconds']:.1f} s, {row['gaps']:,} gaps"
        told += f", {row['error']}" if row["error"] else ""
        place = f'x="{number * 10}" y="{60 - height}" width="8" height="{height}"'
        bars.append(
            f'<rect class="{"lost" if row["error"] else "all"}" {place}><title>{html.escape(told)}</title></rect>'
        )
    troubled = sum(row["error"] is not None for row in rows)
    label = f"{len(rows)} cycles, {troubled} with trouble, the longest took {longest:.1f} s"
    svg = f'<svg role="img" aria-label="{label}" width="{len(rows) * 10}" height="60">{"".join(bars)}</svg>'
    return f"<p>{label}</p>{WIDE}{svg}</div>"


# ---------------------------------------------------------------- Metrics
# The figures for Prometheus, by its rules for names and units. Headline: METRICS.

PROMETHEUS_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
# name, kind, meaning, query whose last column is the value and whose others are labels
METRICS = (
    (
        "adce_objects",
        "gauge",
        "Expected objects by state.",
        """
        select dataset, state, sum(objects) as value
        from counts join datasets using (dataset_id)
        where state not in ('awaited', 'dropped')
        group by dataset, state
        having value > 0
        """,
    ),
    (
        "adce_tasks",
        "gauge",
        "Open tasks.",
        """
        select dataset, state, sum(tasks) as value
        from task_counts join datasets using (dataset_id)
        where state in ('pending', 'retry', 'running', 'gave_up')
        group by dataset, state
        having value > 0
        """,
    ),
    (
        "adce_attempts_total",
        "counter",
        "Attempts that ended.",
        "select dataset, outcome, sum(attempts) as value from stats group by 1, 2",
    ),
    (
        "adce_attempt_seconds_total",
        "counter",
        "Time spent in attempts.",
        "select dataset, sum(seconds) as value from stats group by 1",
    ),
    (
        "adce_stored_bytes_total",
        "counter",
        "Bytes put into the store.",
        "select dataset, sum(bytes) as value from stats group by 1",
    ),
    ("adce_open_alerts", "gauge", "Conditions that people were told of.", "select count(*) as value from open_alerts"),
    (
        "adce_cycles_total",
        "counter",
        "Cycles begun.",
        "select coalesce(max(cycle_id), 0) as value from reconciliations",
    ),
    (
        "adce_cycle_duration_seconds",
        "gauge",
        "How long the last cycle took.",
        "select seconds as value from reconciliations where seconds is not null order by cycle_id desc limit 1",
    ),
    (
        "adce_window_used_requests",
        "gauge",
        "Requests in a window of a rate limit.",
        "select scope, cast(window_seconds as integer) as seconds, used as value from rates where max_requests",
    ),
    (
        "adce_window_limit_requests",
        "gauge",
        "Requests that a window of a rate limit allows.",
        "select scope, cast(window_seconds as integer) as seconds, max_requests as value from rates where max_requests",
    ),
    (
        "adce_paused_until_timestamp_seconds",
        "gauge",
        "When a paused source may be asked again.",
        """
        select scope, paused_until + wall_offset as value
        from scopes, boot
        where paused_until + wall_offset > unixepoch()
        """,
    ),
    (
        "adce_runner_last_beat_timestamp_seconds",
        "gauge",
        "The last sign of life of the main loop.",
        "select beat_at as value from runner",
    ),
    (
        "adce_cycle_last_success_timestamp_seconds",
        "gauge",
        "End of the last cycle without an error.",
        "select max(started_at + seconds) as value from reconciliations where error is null having value is not null",
    ),
)


def metrics_text(database: Database) -> str:
    """The figures in the text format of Prometheus, version 0.0.4."""
    lines = []
    for name, kind, meaning, sql in METRICS:
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        for row in query(database, sql):
            value = row.pop("value")
            marks = ",".join(f'{label}="{str(text).translate(PROMETHEUS_ESCAPES)}"' for label, text in row.items())
            lines.append(f"{name}{{{marks}}} {value}" if marks else f"{name} {value}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- Health
# Serves the same answers over HTTP on 127.0.0.1: read-only, a few threads, a few seconds each. It only
# reads the database. Headline: HealthServer.

BEAT_SECONDS = 10  # between two signs of life of the main loop
LEAST_FREE_BYTES = 100 << 20
HTTP_THREADS = 32
HTTP_SECONDS = 10  # for a whole connection


COMPONENTS = {"database": "database unusable", "store": "store unusable", "loop": "loop stuck"}  # and their problems


def problems(
    database: Database, configuration: Configuration, now: float, since: float, trouble: str | None = None
) -> dict[str, str]:
    """What makes a runner that has worked `since` then unhealthy, by its name: being idle does not. It may know a
    `trouble` with its database itself."""
    if trouble:
        return {"database unusable": trouble}
    try:
        beat = database.value("select beat_at from runner") or 0
        reason = database.value(
            "select reason from rates where scope = 'global' and glob(?, reason)", (f"{STORE_TROUBLE}*",)
        )
        fails = database.value("select value from settings where name = ?", (STORE_FAILS,))
        store = open_store(configuration.store)
        if isinstance(store, FolderStore) and is_store_known(database, configuration):
            store.require_mark()
    except DatabaseError as error:
        return {"database unusable": str(error)}
    except StoreError as error:
        fails = str(error)
    bad_store = reason.removeprefix(STORE_TROUBLE) if reason else fails
    found = {"store unusable": bad_store} if bad_store else {}
    silent = now - max(beat, since)  # the last beat may be that of an earlier run
    if silent > 2 * max(configuration.queue_check_seconds, BEAT_SECONDS) + MINUTE:
        found["loop stuck"] = f"the main loop has been stuck for {format_duration(silent)}"
    return found


OPEN_BY_SOURCE = """
    select source, sum(tasks) as tasks
    from task_counts join datasets using (dataset_id)
    where state in ('pending', 'retry', 'running', 'gave_up') and active
    group by source
    having sum(tasks) > 0
"""


def tasks_document(database: Database, filters: Mapping[str, str | None], most: int) -> dict[str, Any]:
    """How many tasks are open, what waits and how long that takes, and the most urgent of those that match."""
    by_priority = query(database, QUEUE_BY_PRIORITY)
    waiting = query(database, WAITING_BY_SOURCE)
    return {
        "total_tasks": sum(row[state] for row in by_priority for state in ("pending", "retry", "running", "gave_up")),
        "by_priority": {row["priority"]: row for row in by_priority},
        "by_source": {row["source"]: row["tasks"] for row in query(database, OPEN_BY_SOURCE)},
        "estimated_total_minutes": max((row["least_minutes"] or 0 for row in waiting), default=0),
        "tasks": tasks_sections(database, filters, most)[0].rows,
    }


class HealthServer:
    """GET /health, /status, /tasks, /metrics and / for one database, until stopped."""

    def __init__(
        self,
        configuration: Configuration,
        database: Database,
        lock: RunnerLock,
        clock: Clock,
        trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.configuration, self.database, self.lock, self.clock = configuration, database, lock, clock
        self.started_at, self.trouble = clock.wall(), trouble
        self._server: http.server.ThreadingHTTPServer | None = None

    def start(self) -> int:
        """Listen, and return the port. Raises Error when the port is taken."""
        outer = self

        class Handler(_Handler):
            health = outer

        try:
            self._server = _Server(("127.0.0.1", self.configuration.health_check.port), Handler, self.clock)
        except OSError as error:
            port = self.configuration.health_check.port
            raise Error(
                f"cannot listen on 127.0.0.1:{port}: {error.strerror}", "see health_check.port in adce.yaml"
            ) from error
        threading.Thread(target=self._server.serve_forever, name="adce-health", daemon=True).start()
        return self._server.server_address[1]

    def stop(self) -> None:
        """Stop listening."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, query_text: str) -> tuple[int, str, str]:
        """Status, content type and body of a path."""
        now = self.clock.wall()
        options = dict(urllib.parse.parse_qsl(query_text))
        if path == "/health":
            found = problems(self.database, self.configuration, now, self.started_at, self.trouble())
            body = {
                "status": "unhealthy" if found else "healthy",
                "timestamp": utc_text(now),
                "problems": [*found.values()],
                "components": {
                    name: {"status": "unhealthy" if problem in found else "healthy", "message": found.get(problem, "")}
                    for name, problem in COMPONENTS.items()
                },
            }
            return (503 if found else 200), "application/json", json.dumps(body)
        if path == "/metrics" and options.get("format") != "json":
            return 200, "text/plain; version=0.0.4; charset=utf-8", metrics_text(self.database)
        if path in ("/status", "/metrics"):
            sections = status_sections(self.database, self.configuration, self.lock, now)
            return 200, "application/json", render(sections, "json")
        if path == "/tasks":
            filters = {name: options.get(name) for name in ("state", "dataset", "source")}
            return 200, "application/json", json.dumps(tasks_document(self.database, filters, 100))
        if path == "/":
            status = status_sections(self.database, self.configuration, self.lock, now)
            year = int(options["year"]) if re.fullmatch(r"[12]\d{3}", options.get("year", "")) else None
            return 200, "text/html; charset=utf-8", page(self.database, status, now, year)
        return 404, "text/plain; charset=utf-8", "try /health /status /tasks /metrics or /\n"


class _Server(http.server.ThreadingHTTPServer):
    """A thread for each connection, for a few seconds; when there are many, the oldest makes room."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[_Handler], clock: Clock) -> None:
        super().__init__(address, handler)
        self._clock = clock
        self._open: dict[Any, float] = {}  # connections, the oldest first, and since when

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= HTTP_THREADS:
            for oldest in list(self._open)[:1]:
                self._cut(oldest)
        self._open[request] = self._clock.boot()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        for request, since in list(self._open.items()):
            if self._clock.boot() - since > HTTP_SECONDS:
                self._cut(request)

    def _cut(self, request: Any) -> None:
        self._open.pop(request, None)
        with contextlib.suppress(OSError):  # it has just ended by itself
            request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    health: ClassVar[HealthServer]
    timeout = HTTP_SECONDS
    server_version = f"adce/{__version__}"
    sys_version = ""

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in ("localhost", "127.0.0.1", "[::1]"):
            self._send(403, "text/plain; charset=utf-8", "this server answers to localhost only\n")
            return
        path, _, query_text = self.path.partition("?")
        try:
            answer = self.health.answer(path, query_text)
        except (DatabaseError, OSError) as error:
            answer = 503, "text/plain; charset=utf-8", f"{error}\n"
        self._send(*answer)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 5)
            self.send_header("Content-Encoding", "gzip")
        for name, value in (
            ("Content-Type", kind),
            ("Vary", "Accept-Encoding"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", PAGE_POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


# ---------------------------------------------------------------- Screen
# What a person sees while it runs: one line for each event that matters, or on a terminal a few lines
# that are painted over. Headlines: Journal, LiveScreen.

SCREEN_SECONDS = 0.5
LEVELS = {"DEBUG": "<7>", "INFO": "<6>", "WARN": "<4>", "ERROR": "<3>"}
LOG_BYTES = 10 << 20


class Journal:
    """One line for each event that matters, on stderr, into a file or into the live screen."""

    def __init__(self, stream: TextIO, level: str = "INFO", clock: Clock | None = None) -> None:
        self.stream, self.level, self.clock = stream, level, clock or Clock()
        self.is_journald = _is_journald(stream)
        self.trouble: str | None = None  # with the database, as last told
        self.paused: set[str] = set()  # sources, as last told
        self.screen: LiveScreen | None = None
        self.next_paint_at = -math.inf  # boot

    def paint(self, running: Sequence[str], next_cycle_at: float) -> None:
        """Bring the live screen, if there is one, up to date now and then; a cycle at infinity will not come."""
        now = self.clock.boot()
        if self.screen and now >= self.next_paint_at:
            self.next_paint_at = now + SCREEN_SECONDS
            self.screen.paint(self.clock.wall(), running, next_cycle_at - now if next_cycle_at < math.inf else None)

    def write(self, level: str, event: str, **fields: Any) -> None:
        """`2026-11-23T14:24:25Z INFO  cycle missing=3`; fields without a value are left out. The journal of systemd
        has the time and takes the level from a prefix (sd-daemon(3))."""
        words = [f"{name}={_logged(value)}" for name, value in fields.items() if value is not None]
        first = [f"{LEVELS[level]}{event}"] if self.is_journald else [utc_text(self.clock.wall()), f"{level:5}", event]
        line = " ".join([*cast(list[str], first), *words])
        if list(LEVELS).index(level) < list(LEVELS).index(self.level):
            return
        if self.screen:
            self.screen.note(line)
        else:
            with contextlib.suppress(OSError, ValueError):
                print(line, file=self.stream, flush=True)

    def tell_trouble(self, error: Error | None) -> None:
        """What is wrong with the database now, or None: each trouble is told once, and its end."""
        before, self.trouble = self.trouble, str(error) if error else None
        if error and self.trouble != before:
            self.write("ERROR", "database", error=self.trouble, hint=error.hint)
        elif before and not error:
            self.write("INFO", "database", works="again")

    def tell_resumed(self, database: Database) -> None:
        """Which sources that were paused are so no more."""
        paused = {row[0] for row in database.read("select scope from rates where blocked_until is not null")}
        for scope in sorted(self.paused - paused):
            self.write("INFO", "resumed", source=scope)
        self.paused = paused


def _logged(value: Any) -> str:
    text = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return text if re.fullmatch(r"[!#-<>-~]+", text) else json.dumps(text)


def _is_journald(stream: TextIO) -> bool:
    """Whether systemd reads what is written here ($JOURNAL_STREAM alone is inherited by too many)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LogFile(io.TextIOBase):
    """A file of lines that does not outgrow LOG_BYTES: then it is renamed, and the one before it is gone."""

    def __init__(self, path: Path) -> None:
        from logging.handlers import RotatingFileHandler

        class Handler(RotatingFileHandler):
            def handleError(self, record: Any) -> None:  # noqa: N802  # its name for it
                """A full disk stops nothing."""

            def _open(self) -> Any:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")

        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
            self._handler = Handler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
        except OSError as error:
            raise Error(f"cannot write to {path}: {error.strerror}", "name another file with --log FILE") from error

    def write(self, text: str) -> int:
        """Lines go to the file one by one."""
        import logging

        for line in filter(None, text.splitlines()):
            self._handler.emit(logging.makeLogRecord({"msg": line}))
        return len(text)


def announce_cycle(journal: Journal, database: Database) -> None:
    """One line for the cycle that has just ended."""
    row = query(database, "select * from cycles order by cycle_id desc limit 1")[0]
    shown = (
        "expected",
        "present",
        "missing",
        "stale",
        "suspect",
        "created",
        "closed",
        "listed",
        "seconds",
        "error",
    )
    journal.write(
        "ERROR" if row["error"] else "INFO", "cycle", id=row["cycle_id"], **{name: row[name] for name in shown}
    )


def announce_progress(journal: Journal, database: Database, configuration: Configuration) -> None:
    """One line for a cycle that takes long: what it has looked for, and what it has still to read."""
    rows = database.read(
        "select cycle_id, looked, started_at from reconciliations where seconds is null and started_at <= ?",
        (journal.clock.wall() - SAVED_EVERY_SECONDS,),
    )
    for cycle_id, looked, started_at in rows[-1:]:
        known = _known_objects(database)
        left = _seconds_left(looked, known, journal.clock.wall() - started_at)
        readers = [
            dataset.name
            for dataset in configuration.datasets.values()
            if configuration.children_of(dataset.name) or dataset.freshness.until or dataset.freshness.live
        ]
        to_read = database.value(
            """
            select count(*)
            from objects join datasets using (dataset_id)
            where etag is not read_etag and etag is not null and dataset in (select value from json_each(?))
            """,
            (json.dumps(readers),),
        )
        journal.write(
            "INFO",
            "progress",
            id=cycle_id,
            looked=looked,
            known=known,
            to_read=to_read,
            left=left and format_duration(left),
        )


def _known_objects(database: Database) -> int:
    return database.value("select sum(objects) from counts where state != 'dropped'") or 0


def _seconds_left(looked: int, known: int, elapsed: float) -> float | None:
    return (known - looked) * elapsed / looked if 0 < looked < known else None


def announce_ending(journal: Journal, claimed: Claim, ending: Ending, max_attempts: int) -> None:
    """One line for what became of a task."""
    result = ending.result
    level = {TaskState.GAVE_UP: "ERROR", TaskState.DONE: "DEBUG"}.get(ending.state, "WARN")
    if level == "WARN" and not ending.counted:
        level = "DEBUG"
    journal.write(
        level,
        ending.state,
        dataset=claimed.dataset.name,
        key=ending.task.target.key,
        outcome=result.outcome,
        failures=f"{ending.failures}/{max_attempts}" if ending.failures else None,
        bytes=result.stored.size if result.stored else None,
        error=result.error,
        next=utc_text(ending.next_at),
        task=ending.task.task_id,
    )


def status_line(database: Database) -> str:
    """How things are, in a line for the service manager."""
    rows = database.read("select state, sum(objects) from counts where state not in ('awaited', 'dropped') group by 1")
    counts = {row[0]: row[1] for row in rows if row[1]}
    running = database.value("select coalesce(sum(tasks), 0) from task_counts where state = 'running'")
    gaps = ", ".join(f"{counts[gap]} {gap}" for gap in GAPS if gap in counts)
    return (
        f"{counts.get('present', 0)} of {sum(counts.values())} objects{', ' if gaps else ''}{gaps}, {running} running"
    )


def show_progress(steps: Iterator[int], database: Database, clock: Clock) -> Iterator[int]:
    """The steps of a cycle; once a second a terminal is told how far it is, in the place where it was told before."""
    began = shown = clock.boot()
    for step in steps:
        yield step
        now = clock.boot()
        if now < shown + 1 or not sys.stderr.isatty():
            continue
        shown = now
        known = _known_objects(database)
        looked = database.value("select looked from reconciliations where seconds is null") or 0
        left = _seconds_left(looked, known, now - began)
        told = f", {looked / (now - began):,.0f} a second, {format_duration(left)} left" if left else ""
        print(f"\r\x1b[K{looked:,} of {known:,} objects{told}", end="", file=sys.stderr, flush=True)
    if shown > began:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


LEAST_TABLE_LINES = 4  # two of them are its head


class LiveScreen:
    """A few lines on a terminal, repainted in place; the last state stays in the scrollback."""

    def __init__(self, stream: TextIO, database: Database, configuration: Configuration) -> None:
        self.stream, self.database, self.configuration = stream, database, configuration
        self.last_lines: list[str] = []
        self._height = 0

    def note(self, line: str) -> None:
        """Keep an event for the foot of the screen."""
        self.last_lines = [*self.last_lines[-4:], line]

    def paint(self, now: float, running: Sequence[str], next_cycle_in: float | None) -> None:
        """Draw the present state over the one before."""
        size = shutil.get_terminal_size()
        head, table, foot = live_lines(self.database, self.configuration, now, running, next_cycle_in)
        foot += self.last_lines
        room = max(0, size.lines - 1 - len(head) - len(foot))
        if len(table) > room:
            table = [*table[: room - 1], f"... and {len(table) - room + 1} more"] if room > LEAST_TABLE_LINES else []
        shown = [cut(line, size.columns - 1) for line in [*head, *table, *foot]][: max(2, size.lines - 1)]
        up = f"\x1b[{self._height}F" if self._height else ""  # to the first column: Ctrl-C has written ^C
        self._height = len(shown)
        with contextlib.suppress(OSError):  # the terminal is gone, the work is not
            self.stream.write(up + "".join(f"\x1b[2K{line}\n" for line in shown) + "\x1b[J")
            self.stream.flush()


def live_lines(
    database: Database, configuration: Configuration, now: float, running: Sequence[str], next_cycle_in: float | None
) -> tuple[list[str], list[str], list[str]]:
    """The live screen as text: what is done now, the datasets, and what holds it up."""
    coverage = query(database, COVERAGE_BY_DATASET)
    pauses = query(database, "select distinct scope, blocked_until, reason from rates where blocked_until is not null")
    used = ", ".join(
        f"{row['scope']} {row['used']}/{row['max_requests']} in {row['window_seconds']:g} s"
        for row in query(database, RATES)
        if row["used"] and row["max_requests"]
    )
    head = [
        f"ADCE {__version__}  {utc_text(now)}  Ctrl-C stops cleanly  store {configuration.store}",
        f"cycle   {_cycle_now(database, now, next_cycle_in)}",
        f"tasks   {_tasks_now(database, now)}",
    ]
    foot = [
        f"asked   {used or 'nothing lately'}",
        *(f"paused  {row['scope']} until {row['blocked_until']}: {row['reason']}" for row in pauses),
        f"workers {', '.join(running) or 'idle'}",
    ]
    return head, _table(coverage, "table", None).splitlines() if coverage else ["nothing is expected yet"], foot


def _cycle_now(database: Database, now: float, next_cycle_in: float | None) -> str:
    rows = query(database, "select * from reconciliations order by cycle_id desc limit 1")
    if not rows:
        return "none yet"
    cycle = rows[0]
    if cycle["seconds"] is not None:
        following = "" if next_cycle_in is None else f", the next in {format_duration(max(0, next_cycle_in))}"
        return f"{cycle['cycle_id']} done{following}"
    known, looked = _known_objects(database), cycle["looked"]
    left = _seconds_left(looked, known, now - cycle["started_at"])
    return f"{cycle['cycle_id']}: {looked:,} of {known:,} objects" + (f", {format_duration(left)} left" if left else "")


def _tasks_now(database: Database, now: float) -> str:
    """How many are open, how many ended in the last minute, and how long they last at that rate."""
    begun = database.value("select started_at from runner") or 0
    span = min(MINUTE, max(1, now - begun))
    ended = database.value("select count(*) from tasks where closed_at > ?", (now - span,))
    waiting = database.value(
        "select coalesce(sum(tasks), 0) from task_counts where state in ('pending', 'retry', 'running')"
    )
    rate = f", {ended:,} ended in the last {'minute' if span == MINUTE else format_duration(span)}" if ended else ""
    return f"{waiting:,} open{rate}" + (
        f", {format_duration(waiting * span / ended)} left" if ended and waiting else ""
    )


# ---------------------------------------------------------------- Conditions
# What people should look at, each as a question in SQL. One cause is one condition: what a blocked source holds up
# is told by that alone. Headline: CONDITIONS.

BLOCKED_PAUSES, BLOCKED_SECONDS = 3, 30 * MINUTE  # in a row, or so long: then a source is blocked
LAST_ATTEMPTS, FEW_ATTEMPTS = 200, 20  # whose errors count, and how few tell nothing
# what a blocked source has held up counts from the end of that
BLOCKS = """
    with blocks as (
        select about as source, max(coalesce(ended_at, :now)) as over_at
        from alerts
        where condition = 'source blocked'
        group by about
    )
"""
# condition: a query, by way of an index, for what it concerns and a sentence about that; see also problems()
CONDITIONS = {
    "source blocked": """
        select scope as about, 'left alone until ' || strftime('%Y-%m-%dT%H:%M:%SZ', paused_until + wall_offset,
               'unixepoch') || ': ' || reason as text
        from scopes, boot
        where scope != 'global'
          and (throttles >= :blocked_pauses or (throttles > 0 and paused_for >= :blocked_seconds))
    """,
    "gave up": """
        select dataset as about, count(*) || ' objects gave up, the last error was: ' || max(last_error) as text
        from tasks join datasets using (dataset_id)
        where state = 'gave_up'
        group by dataset
    """,
    "critical gap": """
        select dataset as about, 'a CRITICAL object has been missing since '
               || strftime('%Y-%m-%dT%H:%M:%SZ', min(detected_at), 'unixepoch') as text
        from tasks indexed by open_tasks join datasets using (dataset_id) left join blocks using (source)
        where priority = 'CRITICAL' and state in ('pending', 'retry', 'running', 'gave_up') and state != 'gave_up'
          and detected_at < :now - :critical_gap_seconds
          and coalesce(over_at, 0) < :now - :critical_gap_seconds
        group by dataset
    """,
    "errors": """
        select 'attempts' as about, sum(failed) || ' of the last ' || count(*) || ' attempts failed' as text
        from (
            select outcome not in ('ok', 'not_yet', 'lost', 'store_error') as failed,
                   a.attempt_id > (select max(attempt_id) from attempts) - :few_attempts as is_late
            from attempts a
            join tasks using (task_id)
            join datasets using (dataset_id)
            join scopes s on s.scope = source and s.failures = 0 and s.throttles = 0  -- else it may be away
            left join blocks using (source)
            where outcome != 'running' and started_at > max(:now - :day, coalesce(over_at, 0))
              and a.attempt_id > (select max(attempt_id) from attempts) - :last_attempts)
        having count(*) >= :few_attempts and sum(failed) * 100 > count(*) * :error_percent
           and max(failed and is_late)  -- else that is over
    """,
    "nothing collected": """
        select 'lake' as about, 'nothing was collected in ' || cycles || ' cycles, though tasks of '
               || group_concat(dataset, ', ') || ' could be done' as text
        from (
            select min(started_at) as began, count(*) as cycles
            from (select * from reconciliations where seconds is not null order by cycle_id desc limit :quiet_cycles)
        )
        cross join datasets d
        join scopes on scope = d.source
        join boot
        left join blocks using (source)
        where cycles = :quiet_cycles and coalesce(over_at, 0) < began
          and max(paused_until, (select paused_until from scopes where scope = 'global')) + wall_offset < began
          -- what waits for its time alone, such as a day that is not final, has not failed
          and (exists (select 1 from tasks t
                       where t.dataset_id = d.dataset_id and t.state = 'pending' and t.detected_at < began)
               or exists (select 1 from tasks t
                          where t.dataset_id = d.dataset_id and t.state = 'retry' and t.failures > 0
                            and t.detected_at < began))
          and not exists (
              select 1 from attempts
              where outcome = 'ok' and started_at + seconds > began
                and attempt_id > (select max(attempt_id) from attempts) - :last_attempts)
        having count(*) > 0
    """,
    "mass loss": """
        select 'lake' as about, error as text
        from (select error from reconciliations where seconds is not null order by cycle_id desc limit 1)
        where instr(error, :vanished)
    """,
    "cycles fail": """
        select 'lake' as about, max(error) as text
        from (select error from reconciliations where seconds is not null order by cycle_id desc limit 2)
        having count(error) = 2
    """,
}


# ---------------------------------------------------------------- Alerts
# What people should look at: told once when it begins, once a day while it lasts, and once when it is over. A
# thread of its own looks and sends, so that a broken channel delays nothing. Headline: Alerter.

LOOK_SECONDS = 30
CALM_SECONDS = 15 * MINUTE  # what comes back before that was never over
SEND_SECONDS = 15  # for one message
MOST_LETTERS = 1000  # of a text
FULL = f"SQLITE_FULL|{os.strerror(errno.ENOSPC)}"  # what else a full disk makes unusable
MOST_TRIES_SECONDS = DAY  # then a message is too old to be sent


class Alerter:
    """Looks now and then, notes what begins and ends, and sends it; what cannot be sent is tried again."""

    def __init__(
        self,
        configuration: Configuration,
        database: Database,
        journal: Journal,
        clock: Clock,
        *,
        is_once: bool = False,
    ) -> None:
        self.configuration, self.database, self.journal, self.clock = configuration, database, journal, clock
        self.wishes, self.is_once, self.started_at = configuration.alerts, is_once, clock.wall()
        self._stopped = threading.Event()
        self.told: set[tuple[str, str]] = set()  # what could not be noted

    def __enter__(self) -> None:
        if not self.is_once:
            threading.Thread(target=self._work, name="adce-alerts", daemon=True).start()

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        """Look no more, and do not wait for what is being sent; or look once, at the end of a run."""
        self._stopped.set()
        if self.is_once and error is None:
            self.work()

    def _work(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self.work()

    def work(self) -> None:
        """Look once, and send what waits."""
        try:
            self.look()
            self.send()
            self.tell_cycle()
        except (DatabaseError, OSError) as error:
            self.journal.write("WARN", "alerts", error=str(error))

    def conditions(self) -> dict[tuple[str, str], str]:
        """What holds now: condition and what it concerns, and a sentence about it."""
        now, wishes = self.clock.wall(), self.wishes
        facts = {
            "now": now,
            "critical_gap_seconds": wishes.critical_gap_hours * HOUR,
            "error_percent": wishes.error_percent,
            "quiet_cycles": wishes.quiet_cycles,
            "blocked_pauses": BLOCKED_PAUSES,
            "blocked_seconds": BLOCKED_SECONDS,
            "day": DAY,
            "last_attempts": LAST_ATTEMPTS,
            "few_attempts": FEW_ATTEMPTS,
            "vanished": VANISHED,
        }
        troubles = problems(self.database, self.configuration, now, self.started_at, self.journal.trouble)
        found = {(name, "runner"): text for name, text in troubles.items()}
        was_low = None
        with contextlib.suppress(DatabaseError):  # that is one of its problems
            was_low = self.database.value("select 1 from alerts where condition = 'disk low' and ended_at is null")
            for name, sql in CONDITIONS.items():
                found |= {(name, row["about"]): row["text"] for row in self.database.read(BLOCKS + sql, facts)}
        if {name for name, _ in found} & {"mass loss", "store unusable"}:
            found.pop(("cycles fail", "lake"), None)  # for that reason
        found = {key: excerpt(text.encode(), MOST_LETTERS) for key, text in found.items()}
        free = shutil.disk_usage(self.configuration.database.parent).free
        if free < LEAST_FREE_BYTES:
            found["disk low", "database"] = f"{free >> 20} MB left beside {self.configuration.database.name}"
        if was_low or ("disk low", "database") in found:
            found = {key: text for key, text in found.items() if not re.search(FULL, text)}
        return found

    def look(self) -> None:
        """Note what begins, lasts for another day, or is over."""
        found = self.conditions()
        try:
            self._note(found)
        except DatabaseError:  # its disk may be full
            for key in found.keys() - self.told:
                self._tell_at_once(key, found[key])
            raise

    def _tell_at_once(self, key: tuple[str, str], text: str) -> None:
        """Send what cannot be noted, so that it is not told again when it can."""
        notice = {"subject": f"ADCE: {key[0]}, {key[1]}", "text": self._body(text)}
        self.journal.write("WARN", "alert", subject=f"{key[0]}, {key[1]}", text=text)
        for channel in self._channels():
            with contextlib.suppress(Exception):  # tried again at the next look
                SENDERS[channel](self.configuration, notice)
                self.told.add(key)

    def _note(self, found: Mapping[tuple[str, str], str]) -> None:
        now = int(self.clock.wall())
        known = {
            (row["condition"], row["about"]): row
            for row in self.database.read("select * from alerts where ended_at is null")
        }
        if not (found or known):
            return
        with self.database.transaction() as sql:
            for (condition, about), text in found.items():
                row = known.get((condition, about))
                if row is None:
                    begin = (
                        "insert into alerts (condition, about, text, since, seen_at, told_at) values (?, ?, ?, ?, ?, ?)"
                    )
                    alert_id = sql.execute(begin, (condition, about, text, now, now, now)).lastrowid
                    if (condition, about) not in self.told:
                        self._notice(sql, alert_id, f"ADCE: {condition}, {about}", text)
                    continue
                sql.execute("update alerts set text = ?, seen_at = ? where alert_id = ?", (text, now, row["alert_id"]))
                if now - row["told_at"] >= self.wishes.remind_seconds:
                    sql.execute("update alerts set told_at = ? where alert_id = ?", (now, row["alert_id"]))
                    lasts = format_duration(now - row["since"])
                    self._notice(sql, row["alert_id"], f"ADCE: still {condition}, {about}", f"for {lasts}: {text}")
            for key, row in known.items():
                if key not in found and now - row["seen_at"] >= CALM_SECONDS:
                    sql.execute("update alerts set ended_at = ? where alert_id = ?", (row["seen_at"], row["alert_id"]))
                    lasted = format_duration(row["seen_at"] - row["since"])
                    self._notice(sql, row["alert_id"], f"ADCE: over: {key[0]}, {key[1]}", f"it lasted {lasted}")
        self.told.clear()

    def _notice(self, sql: sqlite3.Connection, alert_id: int | None, subject: str, text: str) -> None:
        """To be sent by every channel, whatever becomes of this process."""
        self.journal.write("WARN", "alert", subject=subject.removeprefix("ADCE: "), text=text)
        put = "insert into notices (alert_id, channel, subject, text, made_at, try_at) values (?, ?, ?, ?, ?, ?)"
        now = int(self.clock.wall())
        for channel in self._channels():
            sql.execute(put, (alert_id, channel, subject, self._body(text), now, now))

    def _body(self, text: str) -> str:
        return f"{text}\nhost {socket.gethostname()}, {self.configuration.database}\nTry: adce.py status"

    def _channels(self) -> list[str]:
        return [channel for channel in SENDERS if getattr(self.wishes, channel)]

    def send(self) -> None:
        """Send what waits; what fails is tried again, ever more rarely, for a day."""
        now = self.clock.wall()
        due = "select * from notices where sent_at is null and try_at <= ? and made_at > ? order by notice_id limit 20"
        for row in self.database.read(due, (now, now - MOST_TRIES_SECONDS)):
            error = self._try(row["channel"], functools.partial(SENDERS[row["channel"]], self.configuration, row))
            with self.database.transaction() as sql:
                sql.execute(
                    "update notices set tries = tries + 1, sent_at = ?, try_at = ? where notice_id = ?",
                    (None if error else int(now), int(now + MINUTE * 2.0 ** min(row["tries"], 6)), row["notice_id"]),
                )

    def tell_cycle(self) -> None:
        """After each cycle: its figures to CloudWatch and, when it was good, a sign of life to `ping`."""
        rows = self.database.read(
            "select * from reconciliations where seconds is not null order by cycle_id desc limit 1"
        )
        told = self.database.value("select value from settings where name = 'cycle told'")
        if not rows or str(rows[0]["cycle_id"]) == told or not (self.wishes.ping or self.wishes.cloudwatch):
            return
        if self.wishes.cloudwatch:
            self._try("cloudwatch", functools.partial(put_metrics, self.wishes.cloudwatch, self.database, rows[0]))
        if self.wishes.ping and rows[0]["error"] is None:
            self._try("ping", functools.partial(_http, "GET", self.wishes.ping))
        with self.database.transaction(durable=False) as sql:
            sql.execute("insert or replace into settings values ('cycle told', ?)", (str(rows[0]["cycle_id"]),))

    def _try(self, channel: str, send: Callable[[], None]) -> str | None:
        """Use a channel. Returns what went wrong, which is kept until it works again."""
        error = None
        try:
            send()
        except Exception as problem:  # noqa: BLE001  # whatever a library raises is the channel's trouble
            error = str(problem) if isinstance(problem, Error) else type(problem).__name__  # it may name the address
            self.journal.write("WARN", "channel", channel=channel, error=error)
        with self.database.transaction(durable=False) as sql:
            if error:
                sql.execute("insert or ignore into channels values (?, ?, ?)", (channel, error, int(self.clock.wall())))
            else:
                sql.execute("delete from channels where channel = ?", (channel,))
        return error


Notice = Mapping[str, str] | sqlite3.Row  # with a subject and a text


def revealed(text: str) -> str:
    """A text that may be $NAME. Raises Error when there is no such variable."""
    if not text.startswith("$"):
        return text
    if text[1:] not in os.environ:
        raise Error(f"{text} is not in the environment")
    return os.environ[text[1:]].strip()


def _http(method: str, address: str, **options: Any) -> None:
    """Ask an address that may be a secret: no error names it. Raises Error."""
    import requests

    try:
        answer = requests.request(
            method, revealed(address), timeout=SEND_SECONDS, allow_redirects=False, **options
        )  # a redirect would lose what is posted
    except requests.RequestException as error:
        raise Error(_no_answer(error)[1]) from None
    if answer.status_code >= 300:
        raise Error(f"HTTP {answer.status_code}")


def _send_to_webhook(configuration: Configuration, notice: Notice) -> None:
    """In the format of Slack, which many others take."""
    _http("POST", cast(str, configuration.alerts.webhook), json={"text": f"*{notice['subject']}*\n{notice['text']}"})


def _send_to_sns(configuration: Configuration, notice: Notice) -> None:
    topic = cast(str, configuration.alerts.sns_topic)
    client = _aws_client("sns", topic.split(":")[3] if topic.count(":") >= 5 else None)
    client.publish(TopicArn=topic, Subject=notice["subject"][:100], Message=notice["text"])


def _send_to_command(configuration: Configuration, notice: Notice) -> None:
    """Subject and text are its last arguments."""
    program = Program(
        words=(*configuration.alerts.command, notice["subject"], notice["text"]),
        folder=configuration.path.parent,
        environment={"ADCE_DB": str(configuration.database.resolve()), "ADCE_TASK": "alert"},
        seconds=SEND_SECONDS,
    )
    try:
        end = run_program(program, Clock())
    except (OSError, ValueError) as error:
        raise Error(f"cannot start {program.words[0]}: {getattr(error, 'strerror', None) or error}") from None
    if not end.is_good():
        raise Error(f"{end.text}: {excerpt(end.tail[-120:])}" if end.tail else end.text)


SENDERS: Mapping[str, Callable[[Configuration, Notice], None]] = {
    "webhook": _send_to_webhook,
    "sns_topic": _send_to_sns,
    "command": _send_to_command,
}


def _aws_client(service: str, region: str | None = None) -> Any:
    import boto3
    import botocore.config

    limits = botocore.config.Config(connect_timeout=5, read_timeout=SEND_SECONDS, retries={"total_max_attempts": 2})
    return boto3.session.Session().client(service, region_name=region, config=limits)


def put_metrics(namespace: str, database: Database, cycle: sqlite3.Row) -> None:
    """The figures of a cycle and the open tasks of now, in one call to CloudWatch."""
    when = datetime.datetime.fromtimestamp(cycle["started_at"] + cycle["seconds"], datetime.UTC)
    figures = {name: cycle[name] for name in ("expected", "present", "missing", "stale", "suspect", "list_calls")}
    figures |= {f"tasks_{row[0]}": row[1] for row in database.read("select state, count(*) from queue group by state")}
    metrics = [
        {"MetricName": name, "Timestamp": when, "Value": value, "Unit": "Count"} for name, value in figures.items()
    ]
    metrics.append({"MetricName": "cycle", "Timestamp": when, "Value": cycle["seconds"], "Unit": "Seconds"})
    _aws_client("cloudwatch").put_metric_data(Namespace=namespace, MetricData=metrics)


# ---------------------------------------------------------------- Interventions
# What a person changes by hand, also while the runner works: it finds it in the database. Headlines:
# pause_source(), resume_source(), retry_tasks(), skip_tasks().

UNTIL_RESUMED = 3650 * DAY
BY_HAND = "by hand"


def pause_source(sql: sqlite3.Connection, scope: str, seconds: float | None, reason: str, now: float) -> None:
    """Leave a source alone for some seconds, or until it is resumed, instead of an earlier pause by hand. A longer one
    that the source has caused stays."""
    is_endless = seconds is None or seconds >= UNTIL_RESUMED
    told = f"{BY_HAND}{', until it is resumed' * is_endless}" + (f": {reason}" if reason else "")
    sql.execute("update scopes set paused_until = 0 where scope = ? and reason glob ?", (scope, f"{BY_HAND}*"))
    pause(sql, scope, UNTIL_RESUMED if seconds is None or is_endless else seconds, told, now)


def resume_source(sql: sqlite3.Connection, scope: str, now: float) -> tuple[bool, int]:
    """Lift a pause, whoever asked for it, and try again at once what has failed and not given up. Returns whether there
    was a pause, and how many tasks that are."""
    was_paused = sql.execute("select paused_until > ? from scopes where scope = ?", (now, scope)).fetchone()[0]
    sql.execute(
        "update scopes set paused_until = 0, reason = null, failures = 0, throttles = 0 where scope = ?", (scope,)
    )
    woken = sql.execute(
        """
        update tasks set state = 'pending', next_at = null
        where state = 'retry' and last_error is not null
          and dataset_id in (select dataset_id from datasets where :scope in (source, 'global'))
        """,
        {"scope": scope},
    )
    return bool(was_paused), woken.rowcount


def tasks_to_retry(database: Database, filters: Mapping[str, str | None], task_ids: Sequence[int]) -> list[int]:
    """The tasks that wait or gave up and meet the filters; those that were skipped only by their ids."""
    rows = database.read(
        """
        select t.task_id
        from tasks t
        join datasets d using (dataset_id)
        join objects o using (object_id)
        where (
              t.state in ('retry', 'gave_up')
              or (t.state = 'cancelled' and o.skipped is not null and :has_ids))
          and (not :has_ids or t.task_id in (select value from json_each(:ids)))
          and (:state is null or t.state = :state)
          and (:source is null or d.source = :source)
          and (:dataset is null or d.dataset = :dataset)
          and (:error is null or instr(lower(t.last_error), lower(:error)))
        order by t.task_id
        """,
        {**filters, "has_ids": bool(task_ids), "ids": json.dumps(task_ids)},
    )
    return [row["task_id"] for row in rows]


def rows_of_tasks(database: Database, task_ids: Sequence[int]) -> Rows:
    """What to show of some tasks."""
    sql = """
        select t.task_id, t.state, t.priority, d.source, d.dataset, o.key, t.attempts, t.last_error
        from tasks t join datasets d using (dataset_id) join objects o using (object_id)
        where t.task_id in (select value from json_each(?))
        order by t.task_id
    """
    return query(database, sql, (json.dumps(task_ids),))


def retry_tasks(ledger: Ledger, task_ids: Iterable[int]) -> int:
    """Try tasks again at once, with all their attempts before them; want again what was skipped. Returns how many."""
    ids = json.dumps(list(task_ids))
    woken = """
        update tasks set state = 'pending', next_at = null, failures = 0
        where state in ('retry', 'gave_up') and task_id in (select value from json_each(?))
    """
    count = ledger.sql.execute(woken, (ids,)).rowcount
    skipped = """
        skipped is not null and object_id in (
            select object_id from tasks where task_id in (select value from json_each(:ids)))
    """
    reopened = """
        update tasks set state = 'pending', closed_at = null, failures = 0
        where task_id = (select max(task_id) from tasks where object_id = ?) and state = 'cancelled'
    """
    for known in ledger.objects(skipped, {"ids": ids}):
        count += 1
        if known.reason is None:  # not expected now, but wanted when it is
            ledger.sql.execute("update objects set skipped = null where object_id = ?", (known.object_id,))
            continue
        ledger.sql.execute(reopened, (known.object_id,))
        if ledger.note(known, dataclasses.replace(known.facts, skipped=None)).state not in GAPS:
            ledger.close_task(known.object_id, TaskState.CANCELLED)
    return count


def skip_tasks(ledger: Ledger, task_ids: Iterable[int], reason: str) -> list[int]:
    """Want the objects of open tasks no more, until they are retried. Returns which tasks were open."""
    are_open = """
        select task_id, object_id
        from tasks t join objects o using (object_id)
        where t.state in ('pending', 'retry', 'running', 'gave_up') and o.state != 'dropped'
          and task_id in (select value from json_each(?))
    """
    found = dict(ledger.sql.execute(are_open, (json.dumps(list(task_ids)),)).fetchall())
    is_theirs = "object_id in (select value from json_each(:ids))"
    for known in ledger.objects(is_theirs, {"ids": json.dumps(list(found.values()))}):
        ledger.note(known, dataclasses.replace(known.facts, skipped=reason))
    return list(found)


# ---------------------------------------------------------------- Workers
# Who does the executions: a pool of a few. A program always ends in time; a function that never returns costs
# its worker, which is replaced. Headline: Workers.


@dataclass(frozen=True, slots=True)
class Execution:
    """What a worker is doing, or what waits for the permit of its next hop."""

    claimed: Claim
    spec: FetchSpec
    overdue_at: float = math.inf  # boot; nothing can end a function that never returns


class Workers:
    """A pool, and what it is doing."""

    def __init__(self, configuration: Configuration, store: Store, clock: Clock, wake: Callable[[], None]) -> None:
        self.count, self.store, self.clock, self.wake = configuration.max_concurrent_scrapers, store, clock, wake
        self.pool: Executor = ThreadPoolExecutor(self.count, "adce-worker")
        self.running: dict[Future[list[Result]], Execution] = {}
        self.lost: dict[Future[list[Result]], Execution] = {}

    def free(self) -> int:
        """How many have nothing to do, and may have."""
        if any(execution.claimed.is_alone for execution in self.running.values()):
            return 0
        return self.count - len(self.running)

    def keys(self) -> list[str]:
        """What they are bringing."""
        return [execution.claimed.tasks[0].target.key for execution in self.running.values()]

    def at_work(self) -> collections.Counter[str]:
        """How many executions there are of each dataset, those that never return included."""
        executions = [*self.running.values(), *self.lost.values()]
        return collections.Counter(execution.claimed.dataset.name for execution in executions)

    def submit(self, execution: Execution) -> None:
        """Have it done."""
        future = self.pool.submit(fetch, execution.spec, self.store, self.clock)
        if execution.spec.dataset.call:
            overdue_at = self.clock.boot() + execution.spec.dataset.timeout_seconds
            execution = dataclasses.replace(execution, overdue_at=overdue_at)
        self.running[future] = execution
        future.add_done_callback(lambda _: self.wake())

    def finished(self) -> Iterator[tuple[Execution, list[Result]]]:
        """What has ended since this was last asked, or should have."""
        self.lost = {future: execution for future, execution in self.lost.items() if not future.done()}
        for future, execution in list(self.running.items()):
            if future.done() or self.clock.boot() >= execution.overdue_at:
                del self.running[future]
                yield execution, self._results(future, execution)

    def _results(self, future: Future[list[Result]], execution: Execution) -> list[Result]:
        dataset = execution.spec.dataset
        try:
            return future.result(0)
        except TimeoutError:  # others take over, and its source has one fewer until it returns
            self.lost[future] = execution
            self.pool.shutdown(wait=False)
            self.pool = ThreadPoolExecutor(self.count, "adce-worker")
            text = f"{dataset.call} did not return within {dataset.timeout_seconds:g} s"
            return [Result(Outcome.TIMEOUT, f"{text}; its worker was replaced")]
        except BaseException as error:  # noqa: BLE001  # a broken pool
            return [Result(Outcome.LOST, describe(error))] * len(execution.claimed.tasks)

    def next_overdue_at(self) -> float:
        """The instant in boot time at which the first of them is too late."""
        return min((execution.overdue_at for execution in self.running.values()), default=math.inf)

    def stop(self) -> list[Execution]:
        """Take no more. Returns what has not ended."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        left = list(self.running.values())
        self.running.clear()
        return left


# ---------------------------------------------------------------- Supervision
# Who has started the runner, and what they are told: systemd over its socket, and other processes of ADCE
# through the database. Headlines: notify(), next_orders().


@dataclass(frozen=True, slots=True)
class Presence:
    """What a runner tells of itself, for those who look for it."""

    address: str | None = None  # where it answers over HTTP
    log: Path | None = None


def notify(*lines: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if not lines:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(1)
        sender.sendto("\n".join(lines).encode(), re.sub("^@", "\0", address))


def watchdog_seconds() -> float:
    """How often systemd wants a sign of life; without end when it wants none (sd_watchdog_enabled(3))."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    is_meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 1e6 if microseconds.isdigit() and int(microseconds) and is_meant else math.inf


def sign_of_life() -> list[str]:
    """What systemd's watchdog wants to hear, if it listens."""
    return ["WATCHDOG=1"] if watchdog_seconds() < math.inf else []


def systemd_unit() -> str | None:
    """The control group of the unit that this process is the main process of, such as /system.slice/adce.service."""
    if os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()):
        return None
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith(("0::", "1:name=systemd:")):
                return line.rpartition(":")[2]
    return None


def register_runner(sql: sqlite3.Connection, presence: Presence, now: float) -> None:
    """This process works on the database now."""
    sql.execute(
        """
        insert or replace into runner (only_row, pid, version, started_at, beat_at, address, unit, log)
        values (1, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            os.getpid(),
            __version__,
            int(now),
            int(now),
            presence.address,
            systemd_unit(),
            str(presence.log) if presence.log else None,
        ),
    )


def ask_for_cycle(sql: sqlite3.Connection, orders: Orders, now: float) -> int:
    """Ask the runner for a cycle. Returns the number of the order."""
    order = "insert into orders (asked_at, is_full, may_lose) values (?, ?, ?)"
    may_lose = json.dumps(sorted(orders.may_lose))
    return cast(int, sql.execute(order, (int(now), orders.is_full, may_lose)).lastrowid)


def next_orders(database: Database) -> Orders | None:
    """What others have asked for since the last cycle began, in one."""
    rows = database.read("select order_id, is_full, may_lose from orders where cycle_id is null")
    if not rows:
        return None
    return Orders(
        is_full=any(row["is_full"] for row in rows),
        may_lose=frozenset(name for row in rows for name in json.loads(row["may_lose"])),
        order_id=max(row["order_id"] for row in rows),
    )


# ---------------------------------------------------------------- Runner
# Keeps going until told to stop. The main thread makes every decision (claim, finish, reconcile) and is
# the only writer; workers run fetch() on plain data; health threads only read. It sleeps until the next
# event: a finished attempt, a due task, a free window, a cycle, a signal. Headline: Runner.


class Runner:
    """One run on one database: `run()` returns when it is told to stop, or when `once` is done."""

    def __init__(
        self,
        configuration: Configuration,
        database: Database,
        store: Store,
        journal: Journal,
        clock: Clock | None = None,
    ) -> None:
        self.configuration, self.database, self.store, self.journal = configuration, database, store, journal
        self.clock = clock or journal.clock
        self.dice = random.Random()  # noqa: S311  # spreads retries, guards nothing
        self.wakeups: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.workers = Workers(configuration, store, self.clock, lambda: self.wakeups.put("finished"))
        self.listers: Executor = ThreadPoolExecutor(LISTED_AT_ONCE, "adce-lister")
        self.beat_seconds = min(BEAT_SECONDS, watchdog_seconds() / 3)
        self.hops: list[Execution] = []
        self.unrecorded: list[tuple[Execution, list[Result]]] = []
        self.steps: Iterator[int] | None = None
        self.cycle_id: int | None = None
        self.next_cycle_at = self.next_beat_at = -math.inf
        self.orders, self.stop_at = Orders(), math.inf
        self.stop_reason: str | None = None
        self.once = self.in_line = self.cycle_waits = False

    def stop(self, reason: str) -> None:
        """Ask the loop to end; safe from a signal handler and from other threads."""
        self.stop_reason = self.stop_reason or reason
        self.database.hurry()
        self.wakeups.put("stop")

    def run(
        self,
        *,
        once: bool = False,
        max_seconds: float = math.inf,
        orders: Orders = Orders(),
        presence: Presence = Presence(),
    ) -> ExitCode:
        """Work until stopped. With `once`: one cycle, then one attempt at every open task."""
        self.once, self.orders, self.stop_at = once, orders, self.clock.boot() + max_seconds
        self._start(presence)
        try:
            while not self.stop_reason:
                try:
                    self._turn()
                    if not self.unrecorded:
                        self.journal.tell_trouble(None)
                except DatabaseTroubleError as error:
                    self.database.check_place()
                    if once and not self.stop_reason:
                        raise
                    self.journal.tell_trouble(error)
                    self.clock.wait(self.wakeups, TROUBLE_SECONDS)
        finally:
            self._finish_running()
            self._say_goodbye()
        if not once:
            return ExitCode.DONE
        trouble = self.database.value("select error from reconciliations where cycle_id = ?", (self.cycle_id,))
        if trouble and trouble != STOPPED_EARLY:
            return ExitCode.ERROR
        left = self.database.value("select count(*) from objects where state in ('missing', 'stale', 'suspect')")
        return ExitCode.GAPS_LEFT if left else ExitCode.DONE

    def _start(self, presence: Presence) -> None:
        ended = self._sweep()
        ahead = ReadAhead(self.listers, lambda: self.wakeups.put("prepared"))
        preparing = ahead.submit(prepare_store, self.database, self.configuration, self.store)
        while not preparing.done():
            self.clock.wait(self.wakeups, MINUTE)
            if self.stop_reason:
                return
        preparing.result()
        now = self.clock.wall()
        with self.database.transaction() as sql:
            declare_limits(sql, self.configuration, self.clock)
            declare_datasets(sql, self.configuration, now, consents=self.orders.may_drop)
            orphans = requeue_orphans(sql, self.configuration.retry, now)
            register_runner(sql, presence, now)
        self.journal.write(
            "INFO",
            "start",
            version=__version__,
            pid=os.getpid(),
            config=self.configuration.path,
            database=self.configuration.database,
            store=self.configuration.store,
            workers=self.configuration.max_concurrent_scrapers,
            requeued=orphans or None,
            ended=ended or None,
        )
        notify("READY=1")

    def _sweep(self) -> int:
        """End what commands have left: processes, which are counted, and files."""
        shutil.rmtree(output_folder(self.configuration.database), ignore_errors=True)
        return end_processes(str(self.configuration.database.resolve()))

    def _turn(self) -> None:
        """One turn of the main loop."""
        self._collect()
        self._advance_cycle()
        openings = self._dispatch()
        self._beat()
        wait = self._seconds_to_next_event(openings)
        is_idle = self.steps is None and not (self.workers.running or self.unrecorded)
        if self.clock.boot() >= self.stop_at:
            self.stop("its time was up")
        elif self.once and is_idle and all(opening.is_pause for opening in openings.values()):
            self.stop("what is left belongs to paused sources" if openings else "all was attempted")
        if not self.stop_reason:
            self.clock.wait(self.wakeups, wait, self.database.has_news)

    def _advance_cycle(self) -> None:
        """Begin a cycle when it is time, or do the next step of the one that runs."""
        now = self.clock.boot()
        asked = None if self.steps else next_orders(self.database)
        if self.steps is None and (asked or now >= self.next_cycle_at):
            self.next_cycle_at = math.inf if self.once else now + self.configuration.interval_seconds
            ahead = ReadAhead(self.listers, lambda: self.wakeups.put("page"))
            orders = dataclasses.replace(asked, may_drop=self.orders.may_drop) if asked else self.orders
            self.steps = reconcile(self.database, self.configuration, self.store, self.clock, orders, ahead)
        if self.steps is None:
            while not self.once and note_due_objects(self.database, self.configuration, self.clock):
                pass  # once: what gets old while others are fetched is for the next run, or this would never end
            return
        try:
            step = next(self.steps)
            self.cycle_id, self.cycle_waits = step or self.cycle_id, step == 0
        except DatabaseError:
            self.steps, self.next_cycle_at = None, now
            raise
        except StopIteration:
            self.steps = None
            announce_cycle(self.journal, self.database)
            if self.once:
                with self.database.transaction() as sql:
                    wake_retries(sql, sys.maxsize)

    def _dispatch(self) -> dict[str, Opening]:
        """Give every free worker the best thing to do. Returns what the sources wait for, if any worker is free."""
        if self.steps is not None and (self.once or may_be_refused(self.database)):
            return {}
        awaited = self._dispatch_hops()
        while self.workers.free() > 0:
            busy = self.workers.at_work()
            busy.update(execution.claimed.dataset.name for execution in self.hops)
            with self.database.transaction() as sql:
                if not self.once:
                    wake_retries(sql, self.clock.wall())
                claimed, openings = claim(sql, self.configuration, self.clock, busy, self.workers.free())
            self.in_line = any(opens.at > self.clock.boot() for opens in openings.values())
            if claimed is None:
                return awaited | openings
            self.workers.submit(Execution(claimed, specify(self.configuration, claimed)))
        if self.in_line:  # nobody shall wait for one who has no worker free
            self.in_line = False
            with self.database.transaction(durable=False) as sql:
                await_openings(sql, self.configuration, {}, self.clock.boot())
        return {}

    def _dispatch_hops(self) -> dict[str, Opening]:
        """A redirect is followed with a permit of its own, and holds no worker while it waits for that."""
        awaited: dict[str, Opening] = {}
        for execution in list(self.hops):
            source, limiting = execution.claimed.source, self.configuration.rate_limiting
            if self.workers.free() <= 0:
                break
            with self.database.transaction() as sql:
                now = self.clock.boot()
                opens = opening(sql, limiting, source.name, now, RUNNER)
                if opens.at > now:
                    awaited[source.name] = opens
                    continue
                granted = grant(sql, limiting, source.name, source.timeout_seconds, now)
            self.hops.remove(execution)
            spec = dataclasses.replace(execution.spec, send_before=granted.send_before)
            self.workers.submit(Execution(dataclasses.replace(execution.claimed, permit=granted), spec))
        return awaited

    def _collect(self) -> None:
        """Record what has finished. What the database will not take now is kept and tried again."""
        self.unrecorded += self.workers.finished()
        while self.unrecorded:
            execution, results = self.unrecorded[0]
            try:
                self._record(execution, results)
            except DatabaseError as error:
                self.journal.tell_trouble(error)
                return
            del self.unrecorded[0]

    def _record(self, execution: Execution, results: list[Result]) -> None:
        claimed, spec = execution.claimed, execution.spec
        if results[0].redirect and claimed.permit and not self.stop_reason:
            with self.database.transaction() as sql:
                release(sql, claimed.permit, self.clock.boot())
            self.hops.append(
                Execution(
                    dataclasses.replace(claimed, permit=None),
                    dataclasses.replace(spec, url=results[0].redirect, hops=spec.hops + 1),
                )
            )
            return
        results = [dataclasses.replace(result, requests=result.requests + spec.hops) for result in results]
        if results[0].redirect:
            results = [Result(Outcome.LOST, "stopped before the redirect was followed", requests=results[0].requests)]
        with self.database.transaction() as sql:
            ledger = Ledger(sql, self.configuration, self.clock.wall(), self.cycle_id)
            endings, pausing = finish(ledger, claimed, results, self.clock, self.dice)
        for problem in ledger.problems[:MOST_PROBLEMS]:
            self.journal.write("WARN", "children", problem=problem)
        for ending in endings:
            announce_ending(self.journal, claimed, ending, self.configuration.retry.max_attempts)
        if pausing:
            until = utc_text(self.clock.wall() + pausing.seconds)
            self.journal.write("WARN", "paused", source=pausing.source, until=until, reason=pausing.reason)

    def _beat(self) -> None:
        now = self.clock.boot()
        if now >= self.next_beat_at:
            self.next_beat_at = now + self.beat_seconds
            self.database.check_place()
            announce_progress(self.journal, self.database, self.configuration)
            self.journal.tell_resumed(self.database)
            with self.database.transaction() as sql:
                beat = "update runner set beat_at = ?, lost_workers = ?"
                sql.execute(beat, (int(self.clock.wall()), len(self.workers.lost)))
                sql.execute("update boot set wall_offset = ?", (self.clock.wall() - now,))
                forget(sql, self.clock.wall() - self.configuration.retention_seconds)
            notify(*sign_of_life(), f"STATUS={status_line(self.database)}")
        self.journal.paint(self.workers.keys(), self.next_cycle_at)

    def _seconds_to_next_event(self, openings: Mapping[str, Opening]) -> float:
        """How long nothing can happen; while a cycle goes on there is always something to do."""
        if self.steps is not None and not self.cycle_waits:
            return 0.0
        now, wall = self.clock.boot(), self.clock.wall()
        instants = [self.next_cycle_at, self.next_beat_at, self.stop_at, now + self.configuration.queue_check_seconds]
        instants += [opening.at for opening in openings.values()]
        instants.append(self.workers.next_overdue_at())
        if self.journal.screen:
            instants.append(self.journal.next_paint_at)
        if self.unrecorded:
            instants.append(now + 1)
        due = retry = None
        if self.steps is None and not self.once:  # else it is noted after the cycle
            due = self.database.value("select min(due_at) from objects where due_at is not null")
        if self.workers.free() and not self.once:  # else it is for the next who is
            retry = self.database.value("select min(next_at) from tasks where state = 'retry'")
        instants += [now + instant - wall for instant in (due, retry) if instant is not None]
        return max(0.0, min(instants) - now)

    def _finish_running(self) -> None:
        """Let running attempts finish within the grace time; the rest return to the queue."""
        limit = self.clock.boot() + self.configuration.grace_seconds
        notify("STOPPING=1")
        if self.steps is not None:
            with contextlib.suppress(DatabaseError):  # what failed first is what is told
                cast(Any, self.steps).close()
        if running := len(self.workers.running):
            self.journal.write("INFO", "stopping", running=running, grace=self.configuration.grace_seconds)
        while self.workers.running and self.clock.boot() < limit:
            self.journal.paint(self.workers.keys(), math.inf)
            self.clock.wait(self.wakeups, min(1.0, limit - self.clock.boot()))
            self._collect()
            notify(*sign_of_life())
        self.listers.shutdown(wait=False, cancel_futures=True)
        for execution in [*self.workers.stop(), *self.hops]:
            was_asked = bool(execution.spec.url) and execution not in self.hops
            lost = Result(Outcome.LOST, "the runner stopped", requests=int(was_asked))
            self.unrecorded.append((execution, [lost] * len(execution.claimed.tasks)))
        self._sweep()
        self._collect()

    def _say_goodbye(self) -> None:
        reason, left = self.stop_reason or "an error", dict[str, int]()
        with contextlib.suppress(DatabaseError):
            with self.database.transaction() as sql:
                sql.execute("update runner set stopped_at = ?, note = ?", (int(self.clock.wall()), reason))
            left = dict(map(tuple, self.database.read("select state, count(*) from queue group by state")))
            if self.journal.screen:
                self.journal.screen.paint(self.clock.wall(), [], None)
        self.journal.screen = None
        self.journal.write(
            "INFO", "stop", reason=reason, **{name: left.get(name) for name in ("pending", "retry", "gave_up")}
        )


# ---------------------------------------------------------------- Examples
# Texts for the programs around ADCE, printed by `adce.py example NAME`. Headline: EXAMPLES.

EXAMPLES = {
    "systemd": """\
# Save as /etc/systemd/system/adce.service with a user and paths of your own, then: systemctl enable --now adce
# The folders of ReadWritePaths must exist. What a scraper of yours needs beyond this, give it here: more of them,
# or MemoryDenyWriteExecute=no for browsers and node, or EnvironmentFile=FILE for what $NAME in adce.yaml stands for.
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
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
PrivateUsers=yes
ProtectHostname=yes
ProtectClock=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
KeyringMode=private
DevicePolicy=closed

[Install]
WantedBy=multi-user.target
""",
    "alerts": """\
# Rules for Prometheus: name this file in rule_files of prometheus.yml. Its scrape_configs need
# - {job_name: adce, static_configs: [{targets: ["127.0.0.1:8080"]}]}
groups:
  - name: adce
    rules:
      - alert: ADCEIsGone
        expr: up{job="adce"} == 0 or absent(up{job="adce"})
        for: 5m
        annotations: {summary: "ADCE does not answer"}
      - alert: ADCELoopIsStuck
        expr: time() - adce_runner_last_beat_timestamp_seconds > 180
        annotations: {summary: "the main loop of ADCE gives no sign of life"}
      - alert: ADCECyclesFail
        expr: time() - adce_cycle_last_success_timestamp_seconds > 3600
        annotations: {summary: "no cycle has gone well for long"}
      - alert: ADCETasksGaveUp
        expr: sum by (dataset) (adce_tasks{state="gave_up"}) > 0
        annotations: {summary: "{{ $value }} objects of {{ $labels.dataset }} gave up"}
      - alert: ADCEAttemptsFail
        expr: >-
          sum(rate(adce_attempts_total{outcome!~"ok|not_yet|lost"}[1h]))
          > 0.1 * sum(rate(adce_attempts_total[1h]))
        for: 15m
        annotations: {summary: "over a tenth of all attempts fail"}
      - alert: ADCESourceIsPaused
        expr: adce_paused_until_timestamp_seconds - time() > 1800
        annotations: {summary: "{{ $labels.scope }} is left alone for half an hour and more"}
""",
    "cron": """\
# For `crontab -e`: cron sends a mail when something is printed. One that still works is left alone. Lines NAME=value
# above it say what $NAME in adce.yaml stands for.
*/15 * * * * {command} -q run --once --if-locked skip
""",
}


def grafana_dashboard() -> str:
    """A dashboard with a panel for each metric. It names no data source of its own: one is chosen above it."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = []
    for number, (name, kind, meaning, _) in enumerate(METRICS):
        expression, title = name, meaning.rstrip(".")
        if kind == "counter":
            expression = f"rate({name}[5m])"
        elif name.endswith("_timestamp_seconds"):
            expression, title = f"time() - {name}", f"Seconds since: {title}"
        panels.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
                "targets": [{"refId": "A", "datasource": source, "expr": expression}],
            }
        )
    choice = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    dashboard = {
        "uid": "adce",
        "title": "ADCE",
        "schemaVersion": 39,
        "time": {"from": "now-24h", "to": "now"},
        "refresh": "1m",
        "templating": {"list": [choice]},
        "panels": panels,
    }
    return json.dumps(dashboard, indent=2) + "\n"


def example(name: str, configuration: Configuration) -> str:
    """The text for another program, with the paths of this installation in it."""
    if name == "grafana":
        return grafana_dashboard()
    if name == "alerts":
        patience = max(HOUR, 4 * round(configuration.interval_seconds))
        return EXAMPLES[name].replace(":8080", f":{configuration.health_check.port}").replace("> 3600", f"> {patience}")
    quote = quote_for_cron if name == "cron" else quote_for_systemd
    words = (sys.executable, str(Path(__file__).resolve()), "-c", str(configuration.path))
    folders = {Path(os.path.normpath(configuration.database.parent))}
    if not configuration.store.startswith("s3://"):
        store = Path(os.path.normpath(configuration.store))
        folders |= {store} if folders.isdisjoint(store.parents) else set()
    return EXAMPLES[name].format(
        command=" ".join(quote(word) for word in words),
        folder=str(configuration.path.parent).replace("%", "%%"),
        writable=" ".join(quote_for_systemd(str(folder)) for folder in sorted(folders)),
        user=pwd.getpwuid(os.getuid()).pw_name if os.getuid() else "adce",
        stop_seconds=round(configuration.grace_seconds) + 60,
    )


def quote_for_systemd(word: str) -> str:
    """A word of a command line in a unit."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if re.search(r"[^\w%$/.:=+@,-]", text) else text


def quote_for_cron(word: str) -> str:
    """A word of a command line in a crontab, where a bare percent sign begins another line."""
    return shlex.quote(word).replace("%", r"\%")


# ---------------------------------------------------------------- Checks
# Is everything in order? One row for each part, with what to do when it is not. Headline: check_rows().


# What must hold in every database, and how many times it does not.
CONSISTENCY = {
    "gaps without a task": """
        select count(*) from objects o
        where state in ('missing', 'stale', 'suspect') and not exists (
            select 1 from tasks t
            where t.object_id = o.object_id and t.state in ('pending', 'retry', 'running', 'gave_up'))
    """,
    "open tasks without a gap": """
        select count(*) from tasks t join objects o using (object_id)
        where t.state in ('pending', 'retry', 'gave_up') and o.state not in ('missing', 'stale', 'suspect')
    """,
    "running tasks without an attempt": """
        select count(*) from tasks t left join attempts a using (attempt_id)
        where t.state = 'running' and a.outcome is not 'running'
    """,
    "running attempts without a task": """
        select count(*) from attempts a
        where a.outcome = 'running' and not exists (select 1 from tasks t where t.attempt_id = a.attempt_id)
    """,
    "tasks counted wrongly": """
        select coalesce(sum(abs(n)), 0) from (
            select sum(n) as n from (
                select dataset_id, priority, state, count(*) as n from tasks group by 1, 2, 3
                union all
                select dataset_id, priority, state, -tasks from task_counts)
            group by dataset_id, priority, state)
    """,
    "objects counted wrongly": """
        select coalesce(sum(abs(n)), 0) from (
            select sum(n) as n from (
                select dataset_id, coalesce(season, '') as season, state, count(*) as n
                from objects group by 1, 2, 3
                union all
                select dataset_id, season, state, -objects from counts)
            group by dataset_id, season, state)
    """,
}
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "glusterfs", "sshfs")


def check_rows(configuration: Configuration, *, online: bool) -> Rows:
    """What was checked and how it went; `online` asks for connections to the sources too."""
    checks: dict[str, Callable[[Configuration], str]] = {
        "configuration": _check_configuration,
        "permissions": _check_permissions,
        "disk": _check_disk,
        "database": _check_database,
        "store": _check_store,
        "runner": _check_runner,
        "alerts": _check_alerts,
        "scrapers": _check_scrapers,
    }
    rows = [_check(what, functools.partial(check, configuration)) for what, check in checks.items()]
    if online:
        sources = configuration.sources.values()
        rows += [_check(f"source {source.name}", functools.partial(_check_source, source)) for source in sources]
    return rows


def _check(what: str, check: Callable[[], str]) -> dict[str, str]:
    try:
        return {"result": "ok", "what": what, "details": check()}
    except Error as error:
        return {"result": "FAIL", "what": what, "details": f"{error}; {error.hint}" if error.hint else str(error)}


def _check_configuration(configuration: Configuration) -> str:
    return f"{configuration.path}, {len(configuration.sources)} sources, {len(configuration.datasets)} datasets"


def _check_permissions(configuration: Configuration) -> str:
    """Whoever can write the configuration or the program can run programs as its user."""
    paths = (Path(__file__).resolve(), configuration.path, configuration.database)
    for path in [path for path in paths if path.exists()]:
        if path.stat().st_mode & stat.S_IWOTH:
            raise Error(f"anybody can write {path}", f"chmod o-w {path}")
    return "nobody but its owner and group can write the program, the configuration or the database"


def _check_disk(configuration: Configuration) -> str:
    folder = configuration.database.parent
    kind = _file_system_of(folder)
    if kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse."):
        raise Error(
            f"{folder} is on {kind}, where the locks of SQLite may not hold", "keep the database on a local disk"
        )
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise Error(f"{folder} has {free >> 20} MB left", "free some disk space")
    return f"{folder}, {kind}, {free >> 20} MB free"


def _file_system_of(folder: Path) -> str:
    """The type of the file system that holds a folder (proc(5), mountinfo)."""
    found, longest = "unknown file system", -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            left, _, right = line.partition(" - ")
            place = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), left.split()[4])
            if folder.resolve().is_relative_to(place) and len(place) >= longest:
                found, longest = right.split()[0], len(place)
    return found


def _check_runner(configuration: Configuration) -> str:
    holder = RunnerLock(configuration.database).holder()
    return "none" if holder is None else f"process {holder}"


def _check_alerts(configuration: Configuration) -> str:
    """Whether what is to be told could be sent; nothing is, and no address is named."""
    wishes, wrong = configuration.alerts, []
    for channel in ("webhook", "ping"):
        if (address := getattr(wishes, channel)) is not None:
            try:
                parts = urllib.parse.urlsplit(revealed(address))
                is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
                wrong += [] if is_good else [f"{channel} is no http address"]
            except ValueError:
                wrong.append(f"{channel} is no http address")
            except Error as error:
                wrong.append(f"{channel}: {error}")
    if wishes.command and not shutil.which(wishes.command[0]):
        wrong.append(f"there is no program {wishes.command[0]}")
    if wrong:
        raise Error("; ".join(wrong), "see `alerts:` in adce.yaml")
    channels = ("webhook", "ping", "sns_topic", "command", "cloudwatch")
    return ", ".join(channel for channel in channels if getattr(wishes, channel)) or "nobody is told"


def _check_scrapers(configuration: Configuration) -> str:
    """Whether the programs and modules of scrapers are there; no line of theirs is run."""
    count, wrong = 0, []
    folder = configuration.path.parent
    for dataset in configuration.datasets.values():
        count += not dataset.url
        program = dataset.command[0].text if dataset.command else ""
        if program and "{" not in program and not shutil.which(folder / program if "/" in program else program):
            wrong.append(f"{dataset.name}: there is no program {program}")
        module = (dataset.call or "").partition(":")[0]
        if module and not importlib.machinery.PathFinder.find_spec(module.partition(".")[0], [*sys.path, str(folder)]):
            wrong.append(f"{dataset.name}: there is no module {module}")
    if wrong:
        raise Error("; ".join(wrong), "see `command` and `call` in adce.yaml")
    return f"{count} datasets have their own"


def _check_database(configuration: Configuration) -> str:
    if not configuration.database.exists() or not configuration.database.stat().st_size:
        return f"{configuration.database}, to be made by the first run"
    with contextlib.closing(open_database(configuration.database, must_exist=True)) as database:
        found = [*database.check(), *_foreign_parts(database)]
        found += [f"{count} {what}" for what, sql in CONSISTENCY.items() if (count := database.value(sql))]
        if found:
            raise DatabaseError("; ".join(found[:5]), DAMAGE_HINT)
    return f"{configuration.database}, whole, SQLite {sqlite3.sqlite_version}"


def _foreign_parts(database: Database) -> list[str]:
    """Tables, indexes, triggers and views that are not those of this version. Litestream brings two of its own."""
    parts = "select type, name from sqlite_schema where name not glob 'sqlite_*' and name not glob '_litestream_*'"
    with contextlib.closing(memory_database()) as model:
        wanted, there = ({tuple(row) for row in one.read(parts)} for one in (model, database))
    return [f"the {kind} {name} is gone" for kind, name in sorted(wanted - there)] + [
        f"the {kind} {name} is not ADCE's" for kind, name in sorted(there - wanted)
    ]


def _check_store(configuration: Configuration) -> str:
    store = open_store(configuration.store)
    if isinstance(store, FolderStore):
        with (
            contextlib.suppress(DatabaseError),  # that has a row of its own
            contextlib.closing(open_database(configuration.database, must_exist=True)) as database,
        ):
            if is_store_known(database, configuration):
                store.require_mark()
        there = next(folder for folder in (store.root, *store.root.parents) if folder.exists() or folder.is_symlink())
        if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
            raise StoreError(f"{there} is no folder that can be written", "see `store:` in adce.yaml")
        if there != store.root:
            return f"{configuration.store}, to be made by the first run"
    first = next(iter(store.list("")), None)
    return f"{configuration.store}, {'not empty' if first else 'empty'}"


def _check_source(source: Source) -> str:
    """Whether a connection to a source can be made; no request is sent."""
    parts = urllib.parse.urlsplit(source.base_url)
    if not parts.hostname:
        return "no base_url"
    try:
        socket.create_connection(
            (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout=5
        ).close()
    except OSError as error:
        raise Error(f"{parts.hostname} cannot be reached: {error.strerror or error}") from error
    return f"{parts.hostname} can be reached"


# ---------------------------------------------------------------- Background
# The runner as a process: started without a terminal, stopped, and where it writes. Headlines:
# start_runner(), stop_runner().

START_SECONDS = 60


def start_runner(configuration: Configuration, words: Sequence[str], log: Path) -> int:
    """Start `adce.py run` in the background and return its process id once it works. Raises Error with what it
    said when it does not."""
    LogFile(log)  # whether it can be written
    lock, clock, said_before = RunnerLock(configuration.database), Clock(), log.stat().st_size
    if (holder := lock.holder()) is not None:
        raise LockedError(f"a runner works on this database already (process {holder or 'unknown'})", "adce.py status")
    command = [sys.executable, str(Path(__file__).resolve()), "-c", str(configuration.path)]
    command += ["--db", str(configuration.database), "run", "--log", str(log), *words]
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # this very program
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    until = clock.boot() + START_SECONDS
    while not _is_at_work(configuration, process.pid):
        if process.poll() is not None:
            said = log.read_bytes()[said_before:].decode("utf-8", "replace").strip()
            failure = Error(f"the runner has ended at once with exit code {process.returncode}\n{said}".rstrip())
            failure.exit_code = process.returncode if process.returncode > 0 else ExitCode.ERROR
            raise failure
        if clock.boot() > until and lock.holder() == process.pid:
            break  # its first cycle takes long
        if clock.boot() > until:
            raise Error(f"the runner (process {process.pid}) is not ready after {START_SECONDS} s", f"look into {log}")
        clock.wait(queue.SimpleQueue(), NEWS_SECONDS)
    return process.pid


def _is_at_work(configuration: Configuration, number: int) -> bool:
    """Whether this process has begun its work on the database, and does not refuse a changed configuration."""
    if RunnerLock(configuration.database).holder() != number:
        return False
    with contextlib.closing(open_database(configuration.database)) as database:
        has_begun = database.value("select pid = ? from runner where stopped_at is null", (number,))
        return bool(has_begun) and not may_be_refused(database)


def stop_runner(lock: RunnerLock, seconds: float) -> int | None:
    """Ask the runner to stop and wait until it has. Returns its process id, or None when there is none. Raises
    Error when it cannot be asked, or has not stopped in time."""
    holder, clock = lock.holder(), Clock()
    if holder is None:
        return None
    if not holder:
        raise Error(f"{lock.path} does not say which process holds it", "stop it by hand")
    try:
        os.kill(holder, signal.SIGTERM)
    except ProcessLookupError:
        return holder
    except PermissionError as error:
        raise Error(f"process {holder} belongs to another user", "stop it as that user") from error
    until = clock.boot() + seconds
    while lock.holder() == holder:
        if clock.boot() > until:
            raise Error(
                f"process {holder} has not stopped within {format_duration(seconds)}",
                "ask again: a second signal ends it at once",
            )
        clock.wait(queue.SimpleQueue(), NEWS_SECONDS)
    return holder


def log_words(database: Database, most: int, *, follow: bool) -> list[str]:
    """The command that shows what the last runner has written. Raises Error when nobody has kept it."""
    row = next(iter(database.read("select unit, log from runner")), None)
    if row and row["log"] and Path(row["log"]).exists():
        return ["tail", "-n", str(most), *(["-F"] if follow else []), row["log"]]
    if row and row["unit"]:
        kind = "--user-unit" if "/user@" in row["unit"] else "--unit"
        unit = row["unit"].rpartition("/")[2]
        return ["journalctl", "--no-pager", kind, unit, "--lines", str(most), *(["--follow"] if follow else [])]
    raise Error(
        "nobody has kept what the last runner wrote",
        "`adce.py start` keeps it in a file, systemd in its journal, `run --log FILE` where you say",
    )


# ---------------------------------------------------------------- Trials
# What a configuration would change, tried on a copy of the database. Headlines: trial(), rehearse().


@contextlib.contextmanager
def trial(configuration: Configuration) -> Iterator[tuple[Database, Store]]:
    """A copy of the database, to try on what becomes of it, and the store, which is only read."""
    store = open_store(configuration.store)
    with contextlib.ExitStack() as stack:
        if configuration.database.exists():
            database = stack.enter_context(contextlib.closing(open_database(configuration.database))).copy()
        else:
            database = memory_database()
        if isinstance(store, FolderStore):
            if is_store_known(database, configuration):
                store.require_mark()
            elif not store.root.exists():  # the first run makes it
                store = FolderStore(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        yield database, store


def declare(database: Database, configuration: Configuration, clock: Clock, orders: Orders) -> None:
    """Make the limits and datasets of a database those of the configuration. Raises MassDropError."""
    with database.transaction() as sql:
        declare_limits(sql, configuration, clock)
        declare_datasets(sql, configuration, clock.wall(), consents=orders.may_drop)


def rehearse(configuration: Configuration) -> None:
    """Raises MassDropError when a changed configuration would be refused, and StoreError when its store would be."""
    with trial(configuration) as (database, store):
        clock, orders = Clock(), Orders()
        if not is_store_known(database, configuration):
            open_store(configuration.store).sweep()  # makes it, as the next start would
        declare(database, configuration, clock, orders)
        with database.transaction() as sql:
            has_changed = is_changed(sql)
        if has_changed:
            run_cycle(show_progress(reconcile(database, configuration, store, clock, orders), database, clock))


# ---------------------------------------------------------------- Answers
# One function for each command that only shows something. Data go to stdout, everything else to stderr.

Arguments = argparse.Namespace


def _existing(configuration: Configuration) -> Database:
    return open_database(configuration.database, must_exist=True)


def _known(what: str, name: str | None, names: Iterable[str]) -> str | None:
    """A name that was typed. A misspelt one must not look like one that has nothing to show."""
    if name is not None and name not in names:
        raise Error(f'{what} "{name}" is not defined{suggest(name, names)}')
    return name


def _filters(arguments: Arguments, configuration: Configuration) -> dict[str, str | None]:
    return {
        "source": _known("source", arguments.source, configuration.sources),
        "dataset": _known("dataset", arguments.dataset, configuration.datasets),
    }


def _print(arguments: Arguments, sections: Sequence[Section], notes: Iterable[str] = ()) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(render(sections, arguments.format, width))
    if arguments.format == "table" and not arguments.quiet:
        for note in notes:
            print(note, file=sys.stderr)


def _tell(arguments: Arguments, text: str, **facts: Any) -> None:
    """What a command has done: in a sentence, or its facts in the format that was asked for."""
    if not arguments.quiet:
        print(text if arguments.format == "table" else render([Section("done", "", [facts], True)], arguments.format))


def command_plan(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show what a run would do: a cycle on a copy of the database, which is thrown away."""
    notes = ["", "Nothing was written and nothing was asked; the store was only listed and read."]
    try:
        return _show_plan(arguments, configuration, Orders(is_full=True), notes)
    except MassDropError as error:
        refused = ["", f"{error}: run and reconcile refuse it unless they are told --yes, and would do this then."]
        return _show_plan(arguments, configuration, Orders(is_full=True, may_drop=True), refused + notes)


def _show_plan(arguments: Arguments, configuration: Configuration, orders: Orders, notes: Sequence[str]) -> ExitCode:
    clock = Clock()
    with trial(configuration) as (database, store):
        before = expected_by_dataset(database)
        declare(database, configuration, clock, orders)
        cycle_id = run_cycle(show_progress(reconcile(database, configuration, store, clock, orders), database, clock))
        is_once = getattr(arguments, "once", False)  # that does not wait for retries, it tries them all
        with database.transaction() as sql:
            if RunnerLock(configuration.database).holder() is None:
                requeue_orphans(sql, configuration.retry, clock.wall())
            wake_retries(sql, sys.maxsize if is_once else clock.wall())
    error = database.value("select error from cycles where cycle_id = ?", (cycle_id,))
    _print(arguments, plan_sections(database, before, arguments.most), notes)
    if error:
        print(f"adce.py: the cycle had trouble: {error}", file=sys.stderr)
    return ExitCode.ERROR if error else ExitCode.DONE


def command_report(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show coverage, queue, attempts, limits and cycles."""
    database, now = _existing(configuration), Clock().wall()
    if arguments.format == "html":
        print(page(database, status_sections(database, configuration, RunnerLock(configuration.database), now), now))
        return ExitCode.DONE
    scrapers = {dataset.name: scraper_of(dataset) for dataset in configuration.datasets.values()}
    _print(arguments, report_sections(database, scrapers, arguments.since, now), ["", *next_steps(database)])
    return ExitCode.DONE


def command_status(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show in one screen how things are; exit 4 when no runner works."""
    database, lock = _existing(configuration), RunnerLock(configuration.database)
    _print(arguments, status_sections(database, configuration, lock, Clock().wall()))
    return ExitCode.DONE if lock.holder() is not None else ExitCode.NOT_RUNNING


def command_health(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show whether the runner does its work; exit 4 when there is none, or when it is stuck."""
    database, lock, now = _existing(configuration), RunnerLock(configuration.database), Clock().wall()
    found = problems(database, configuration, now, now - HOUR)
    if lock.holder() is None:
        found = {"not running": "no runner works on this database"}
    state = {
        "status": "unhealthy" if found else "healthy",
        "timestamp": utc_text(now),
        "problems": "; ".join(found.values()),
    }
    _print(arguments, [Section("health", "", [state], is_one=True)])
    return ExitCode.NOT_RUNNING if found else ExitCode.DONE


def command_logs(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show the last events of the runner, or follow them."""
    words = log_words(_existing(configuration), arguments.tail, follow=arguments.follow)
    sys.stdout.flush()
    try:
        os.execvp(words[0], words)  # noqa: S606  # it shows and follows files better than we could
    except OSError as error:
        raise Error(f"cannot start {words[0]}: {error.strerror}") from error


def command_tasks(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """List the open tasks, the most urgent first."""
    filters = {"state": arguments.state, **_filters(arguments, configuration)}
    _print(arguments, tasks_sections(_existing(configuration), filters, arguments.most))
    return ExitCode.DONE


def command_task(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show one task with all its attempts."""
    _print(arguments, task_sections(_existing(configuration), arguments.task_id))
    return ExitCode.DONE


def command_coverage(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Show what is expected and what is there, by dataset and season."""
    filters = _filters(arguments, configuration)
    database = _existing(configuration)
    sections = coverage_sections(database, by_day=arguments.by_day, year=arguments.year, **filters)
    if arguments.format == "table" and not arguments.by_day:
        sections.append(strip_section(database, arguments.year, Clock().wall()))
    _print(arguments, sections)
    return ExitCode.DONE


def command_check(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Check the configuration, the database, the store and, with --online, the sources."""
    rows = check_rows(configuration, online=arguments.online)
    _print(arguments, [Section("checks", "", rows)])
    return ExitCode.ERROR if any(row["result"] == "FAIL" for row in rows) else ExitCode.DONE


def command_explain(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Print what the keys of adce.yaml mean, or a JSON Schema of them."""
    del configuration  # it may be missing or wrong
    if arguments.json_schema:
        print(json.dumps(json_schema(), indent=2))
        return ExitCode.DONE
    rows = explain(arguments.key)
    if arguments.format == "table":
        print(explained_text(rows))
    else:
        _print(arguments, [Section("keys", "", rows)])
    return ExitCode.DONE


def command_example(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Print a ready text for another program."""
    print(example(arguments.name, configuration), end="")
    return ExitCode.DONE


# ---------------------------------------------------------------- Commands
# Obeys: one function for each command that does something.


def command_run(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Keep the lake complete until told to stop."""
    minutes = arguments.interval_minutes or (arguments.interval_hours or 0) * 60
    if minutes:
        configuration = dataclasses.replace(configuration, interval_seconds=minutes * MINUTE)
    if arguments.dry_run:
        return command_plan(arguments, configuration)
    database, lock = open_database(configuration.database), RunnerLock(configuration.database)
    try:
        lock.acquire()
    except LockedError:
        if arguments.if_locked == "skip":
            return ExitCode.DONE
        raise
    stream: TextIO = sys.stderr if arguments.log is None else cast(TextIO, LogFile(arguments.log))
    journal = Journal(stream, "ERROR" if arguments.quiet else "DEBUG" if arguments.verbose else "INFO")
    # whatever uses adce.session() in this process means this configuration
    os.environ.update(ADCE_CONFIG=str(configuration.path), ADCE_DB=str(configuration.database))
    runner = Runner(configuration, database, open_store(configuration.store), journal)
    if stream.isatty() and not arguments.quiet and os.environ.get("TERM") != "dumb":
        journal.screen = LiveScreen(sys.stderr, database, configuration)
    _obey_signals(runner)
    with contextlib.ExitStack() as stack:
        address = None
        if configuration.health_check.enabled and not arguments.once:
            health = HealthServer(configuration, database, lock, runner.clock, lambda: journal.trouble)
            address = stack.enter_context(_serving(health, journal))
        stack.enter_context(Alerter(configuration, database, journal, runner.clock, is_once=arguments.once))
        code = runner.run(
            once=arguments.once,
            max_seconds=(arguments.max_minutes or math.inf) * MINUTE,
            orders=Orders(may_drop=arguments.yes),
            presence=Presence(address, arguments.log),
        )
    database.close()
    return code


def _obey_signals(runner: Runner) -> None:
    """The first signal stops cleanly, the second at once; the next start requeues what ran."""
    seen: list[int] = []

    def obey(number: int, _frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            end_processes(str(runner.configuration.database))
            os._exit(ExitCode.INTERRUPTED)
        runner.stop(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, obey)


@contextlib.contextmanager
def _serving(health: HealthServer, journal: Journal) -> Iterator[str | None]:
    """Answer over HTTP meanwhile, at an address. A port that is taken is told, and stops nothing."""
    address = None
    try:
        address = f"http://127.0.0.1:{health.start()}/"
        journal.write("INFO", "health", address=address)
    except Error as error:
        journal.write("WARN", "health", error=str(error), hint=error.hint)
    try:
        yield address
    finally:
        health.stop()


def command_reconcile(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Run one cycle, or have the runner do it, and show what it found; nothing is fetched."""
    for name in arguments.believe:
        _known("dataset", name, configuration.datasets)
    database, lock = open_database(configuration.database), RunnerLock(configuration.database)
    orders = Orders(arguments.full, arguments.yes, frozenset(arguments.believe))
    try:
        lock.acquire()
        cycle_id = _own_cycle(database, configuration, orders)
    except LockedError:
        if lock.holder() != database.value("select pid from runner where stopped_at is null"):
            raise  # another reconcile
        cycle_id = _cycle_of_runner(database, configuration, lock, orders)
    rows = query(database, "select * from cycles where cycle_id = ?", (cycle_id,))
    _print(arguments, [Section("cycle", "Cycle", rows, is_one=True)], next_steps(database))
    if rows[0]["error"]:
        return ExitCode.ERROR
    return ExitCode.GAPS_LEFT if any(rows[0][kind] for kind in GAPS) else ExitCode.DONE


def _own_cycle(database: Database, configuration: Configuration, orders: Orders) -> int:
    clock, store = Clock(), open_store(configuration.store)
    prepare_store(database, configuration, store)
    declare(database, configuration, clock, orders)
    return run_cycle(show_progress(reconcile(database, configuration, store, clock, orders), database, clock))


def _cycle_of_runner(database: Database, configuration: Configuration, lock: RunnerLock, orders: Orders) -> int:
    """Ask the runner for a cycle and wait for its end. Raises Error when the runner ends before, or is stuck."""
    clock, holder = Clock(), lock.holder()
    since = clock.wall()
    with database.transaction() as sql:
        order_id = ask_for_cycle(sql, orders, clock.wall())
    print(f"The runner (process {holder}) does it, with the configuration it has started with.", file=sys.stderr)
    ended = """
        select cycle_id from orders join reconciliations using (cycle_id)
        where order_id = ? and seconds is not null
    """
    while (cycle_id := database.value(ended, (order_id,))) is None:
        if lock.holder() is None:
            raise Error("the runner has ended before the cycle did", "ask again; the next runner begins with a cycle")
        if stuck := problems(database, configuration, clock.wall(), since).get("loop stuck"):
            raise Error(stuck, "look into it with: adce.py logs")
        clock.wait(queue.SimpleQueue(), 1, database.has_news)
    return cast(int, cycle_id)


def command_backup(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Copy the database while others work on it."""
    is_shown = sys.stderr.isatty() and not arguments.quiet

    def show(left: int, total: int) -> None:
        if is_shown:
            print(f"\r{100 * (total - left) // max(total, 1)}%", end="" if left else "\n", file=sys.stderr, flush=True)

    back_up(_existing(configuration), arguments.file, show)
    size = arguments.file.stat().st_size
    _tell(arguments, f"{arguments.file} holds {size:,} bytes and was checked", file=str(arguments.file), bytes=size)
    return ExitCode.DONE


def command_start(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Start the runner in the background."""
    _report_start(arguments, configuration)
    return ExitCode.DONE


def _report_start(arguments: Arguments, configuration: Configuration) -> None:
    log = configuration.database.with_name(f"{configuration.database.name}.log")
    words = [word for word, given in (("--yes", arguments.yes), ("--verbose", arguments.verbose)) if given]
    number = start_runner(configuration, words, log)
    address = _existing(configuration).value("select address from runner")
    text = f"started process {number}, which writes to {log}" + (f" and answers at {address}" if address else "")
    _tell(arguments, text, started=number, log=str(log), address=address)
    if configuration.health_check.enabled and not address:
        port = configuration.health_check.port
        print(f"adce.py: nothing answers over HTTP, because port {port} cannot be used", file=sys.stderr)


def command_stop(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Stop the runner and wait until it has ended; exit 4 when there is none."""
    number = stop_runner(RunnerLock(configuration.database), _patience_of(arguments, configuration))
    told = "no runner works on this database" if number is None else f"process {number} has stopped"
    _tell(arguments, told, stopped=number)
    return ExitCode.NOT_RUNNING if number is None else ExitCode.DONE


def _patience_of(arguments: Arguments, configuration: Configuration) -> float:
    return configuration.grace_seconds + 15 if arguments.timeout is None else cast(float, arguments.timeout)


def command_restart(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Stop the runner, if there is one, and start it with the configuration as it is now."""
    lock = RunnerLock(configuration.database)
    if lock.holder() is not None:
        unit = _existing(configuration).value("select unit from runner")
        if unit:
            name = unit.rpartition("/")[2]
            raise Error(f"the runner belongs to the unit {name} of systemd", f"systemctl restart {name}")
        if not arguments.yes:
            rehearse(configuration)
        stop_runner(lock, _patience_of(arguments, configuration))
    _report_start(arguments, configuration)
    return ExitCode.DONE


def _scope_of(arguments: Arguments, configuration: Configuration) -> str:
    return cast(str, _known("source", arguments.source, [*configuration.sources, GLOBAL]))


def command_pause(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Ask a source no more, for some time or until it is resumed."""
    database, clock, scope = open_database(configuration.database), Clock(), _scope_of(arguments, configuration)
    with database.transaction() as sql:
        declare_limits(sql, configuration, clock)
        pause_source(sql, scope, arguments.seconds, arguments.reason, clock.boot())
    until = database.value("select blocked_until from rates where scope = ?", (scope,)) or utc_text(clock.wall())
    told = "it is resumed" if arguments.seconds is None else until
    facts = {"paused": scope, "until": None if arguments.seconds is None else until}
    _tell(arguments, f"{scope} is paused until {told}; what runs may end", **facts)
    return ExitCode.DONE


def command_resume(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Ask a source again, whoever has paused it, and try at once what has failed."""
    database, clock, scope = open_database(configuration.database), Clock(), _scope_of(arguments, configuration)
    with database.transaction() as sql:
        declare_limits(sql, configuration, clock)
        was_paused, count = resume_source(sql, scope, clock.boot())
    begun = f"{scope} is asked again" if was_paused else f"{scope} was not paused"
    text = f"{begun}; {count} {'task that waits is' if count == 1 else 'tasks that wait are'} tried again now"
    _tell(arguments, text if count else begun, resumed=scope, was_paused=was_paused, retried=count)
    return ExitCode.DONE


def command_retry(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Try tasks again now that wait or gave up: those named, or all that meet the filters."""
    database = _existing(configuration)
    filters = {"state": arguments.state, "error": arguments.error, **_filters(arguments, configuration)}
    task_ids = tasks_to_retry(database, filters, arguments.task_ids)
    if missing := sorted(set(arguments.task_ids) - set(task_ids)):
        raise Error(f"not waiting and not given up: {', '.join(map(str, missing))}", "see: adce.py task ID")
    task_ids = task_ids[: arguments.most]
    if not (task_ids or arguments.dry_run):
        _tell(arguments, "no task that waits or gave up matches", retried=0)
        return ExitCode.DONE
    if arguments.dry_run:
        _print(arguments, [Section("tasks", f"{len(task_ids)} tasks", rows_of_tasks(database, task_ids))])
        return ExitCode.DONE
    if not (arguments.task_ids or arguments.yes or _is_meant(f"Try {len(task_ids)} tasks again now?")):
        print(f"adce.py: {len(task_ids)} tasks match; nothing was done", file=sys.stderr)
        print("Try: the same with --yes, or with -n to see them", file=sys.stderr)
        return ExitCode.USAGE
    with database.transaction() as sql:
        count = retry_tasks(Ledger(sql, configuration, Clock().wall()), task_ids)
    _tell(arguments, f"{count} {'task is' if count == 1 else 'tasks are'} tried again now", retried=count)
    if not arguments.quiet:
        _tell_obstacles(database, configuration)
    return ExitCode.DONE


def _is_meant(question: str) -> bool:
    """What a person at a terminal answers; nobody there means no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _tell_obstacles(database: Database, configuration: Configuration) -> None:
    if RunnerLock(configuration.database).holder() is None:
        print("No runner works now; the next one will know.", file=sys.stderr)
    for row in query(database, "select distinct scope, reason from rates where blocked_until is not null"):
        print(f"{row['scope']} is paused: {row['reason']} (adce.py resume {row['scope']})", file=sys.stderr)


def command_skip(arguments: Arguments, configuration: Configuration) -> ExitCode:
    """Want the objects of these tasks no more, until they are retried."""
    database = _existing(configuration)
    with database.transaction() as sql:
        skipped = skip_tasks(Ledger(sql, configuration, Clock().wall()), arguments.task_ids, arguments.reason)
        if missing := sorted(set(arguments.task_ids) - set(skipped)):
            raise Error(f"not open: {', '.join(map(str, missing))}", "see: adce.py tasks")
    count = len(skipped)
    what = "object is" if count == 1 else "objects are"
    _tell(arguments, f"{count} {what} not wanted any more; `adce.py retry ID` undoes it", skipped=count)
    return ExitCode.DONE


def command_acquire(arguments: Arguments, configuration: Configuration) -> int:
    """Wait until a source can be asked once more, then run the command that asks it; its exit code is ours."""
    limiter = Limiter(configuration, open_database(configuration.database))
    held = limiter.acquire(arguments.source, arguments.wait)
    if not arguments.words:
        if not arguments.quiet:
            counted = format_duration(held.permit.deadline - limiter.clock.boot())
            print(
                f"{arguments.source} may be asked once, within {SEND_WITHIN_SECONDS} s. Nobody will tell when that is "
                f"over, so it counts as under way for {counted}.",
                file=sys.stderr,
            )
        return ExitCode.DONE
    return _run_held(limiter, held, arguments.words)


def _run_held(limiter: Limiter, held: Held, words: Sequence[str]) -> int:
    """Run a command that uses a permit. SIGTERM and SIGHUP are passed on to it, SIGINT reaches it anyhow."""
    early: list[int] = []  # signals that came before there was anybody to pass them on to
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


# ---------------------------------------------------------------- Command table
# Every command and its options, as argparse takes them. Headline: COMMANDS.


@dataclass(frozen=True, slots=True)
class Option:
    """One argument of a command, as argparse takes it."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its name, what it does, its options, and the function that does it."""

    name: str
    meaning: str
    act: Callable[[Arguments, Configuration], int]
    options: tuple[Option, ...] = ()
    needs_declarations: bool = True  # else the database is enough, and a mistake in adce.yaml no obstacle


def _option(*names: str, **settings: Any) -> Option:
    return Option(names, settings)


def _positive(text: str) -> float:
    value = 0.0
    with contextlib.suppress(ValueError):
        value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _count(text: str) -> int:
    value = int(text) if re.fullmatch(r"\d{1,19}", text) else 0
    if not 0 < value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return value


def _path(text: str) -> Path:
    return Path(text).absolute()


def _year(text: str) -> int:
    if not re.fullmatch(r"[12]\d{3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a year")
    return int(text)


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


FILTERS = (_option("--source", help="only this source"), _option("--dataset", help="only this dataset"))
SOURCE = _option("source", metavar="SOURCE", help="a source, or global for all")
TIMEOUT = _option("--timeout", type=_duration, metavar="45s", help="how long to wait for its end (grace_seconds + 15)")
YES = _option("--yes", action="store_true", help="adce.yaml is meant to expect far less than before")
MOST = _option("--most", type=_count, default=20, metavar="N", help="at most so many rows (20)")
COMMANDS = (
    Command(
        "run",
        "keep the lake complete until told to stop",
        command_run,
        (
            _option(
                "--once",
                action="store_true",
                help="one cycle, then one attempt at every open task; exit 3 if something is left",
            ),
            _option("--dry-run", action="store_true", help="the same as plan"),
            _option("--interval-minutes", type=_positive, metavar="N", help="between cycles"),
            _option("--interval-hours", type=_positive, metavar="N", help="the older form of the same"),
            _option("--max-minutes", type=_positive, metavar="N", help="stop cleanly after so long"),
            _option(
                "--if-locked", choices=("fail", "skip"), default="fail", help="skip: exit 0, silent, while another runs"
            ),
            _option("--log", type=_path, metavar="FILE", help="write events there, 20 MB at most, not to stderr"),
            YES,
            MOST,
        ),
    ),
    Command("plan", "show what a run would do, without doing it", command_plan, (MOST,)),
    Command(
        "reconcile",
        "run one cycle: compare what should be there with what is",
        command_reconcile,
        (
            _option("--full", action="store_true", help="look at everything, not only at a share of it"),
            _option(
                "--believe", action="append", default=[], metavar="DATASET", help="its mass loss is real: open its gaps"
            ),
            YES,
        ),
    ),
    Command(
        "report",
        "show coverage, queue, attempts, limits and cycles",
        command_report,
        (_option("--since", type=_duration, default=DAY, metavar="24h", help="how far back attempts count"),),
    ),
    Command(
        "status",
        "show in one screen how things are; exit 4 when no runner works",
        command_status,
        needs_declarations=False,
    ),
    Command(
        "health",
        "show whether the runner does its work; exit 4 when it does not",
        command_health,
        needs_declarations=False,
    ),
    Command(
        "logs",
        "show what the runner has written",
        command_logs,
        (
            _option("--tail", type=_count, default=50, metavar="N", help="the last so many lines (50)"),
            _option("--follow", action="store_true", help="and what follows"),
        ),
        needs_declarations=False,
    ),
    Command(
        "backup",
        "copy the database while others work on it",
        command_backup,
        (_option("file", type=_path, metavar="FILE", help="a file that does not exist yet"),),
        needs_declarations=False,
    ),
    Command("start", "start the runner in the background", command_start, (YES,)),
    Command("stop", "stop the runner and wait until it has ended", command_stop, (TIMEOUT,), needs_declarations=False),
    Command("restart", "stop the runner and start it anew", command_restart, (TIMEOUT, YES)),
    Command(
        "pause",
        "ask a source no more, for some time or until it is resumed",
        command_pause,
        (
            SOURCE,
            _option("--for", dest="seconds", type=_duration, metavar="2h", help="else until it is resumed"),
            _option("--reason", default="", metavar="TEXT", help="for those who wonder"),
        ),
    ),
    Command("resume", "ask a source again and try what has failed", command_resume, (SOURCE,)),
    Command(
        "retry",
        "try tasks again now that wait or gave up",
        command_retry,
        (
            _option("task_ids", type=_count, nargs="*", metavar="ID"),
            _option("--state", choices=(TaskState.RETRY.value, TaskState.GAVE_UP.value)),
            *FILTERS,
            _option("--error", metavar="TEXT", help="only those whose last error contains this"),
            _option("-n", "--dry-run", action="store_true", help="only show which"),
            _option("--yes", action="store_true", help="do not ask"),
            _option("--most", type=_count, metavar="N", help="at most so many of them"),
        ),
    ),
    Command(
        "skip",
        "want the objects of these tasks no more",
        command_skip,
        (
            _option("task_ids", type=_count, nargs="+", metavar="ID"),
            _option("--reason", default="by hand", metavar="TEXT", help="for those who wonder"),
        ),
    ),
    Command(
        "tasks",
        "list the open tasks, the most urgent first",
        command_tasks,
        (_option("--state", choices=["pending", "retry", "running", "gave_up"]), *FILTERS, MOST),
    ),
    Command(
        "task", "show one task with all its attempts", command_task, (_option("task_id", type=_count, metavar="ID"),)
    ),
    Command(
        "coverage",
        "show what is expected and what is there, by dataset and season",
        command_coverage,
        (
            *FILTERS,
            _option("--by-day", action="store_true", help="by dataset and day instead"),
            _option("--year", type=_year, help="of the days, or of the weeks that are drawn"),
        ),
    ),
    Command(
        "check",
        "check configuration, database and store",
        command_check,
        (_option("--online", action="store_true", help="the sources too"),),
    ),
    Command(
        "explain",
        "show what the keys of adce.yaml mean",
        command_explain,
        (
            _option("key", nargs="?", metavar="KEY", help="a path, or the end of one; without it, all blocks"),
            _option("--json-schema", action="store_true", help="a JSON Schema of adce.yaml, for editors"),
        ),
        needs_declarations=False,
    ),
    Command(
        "acquire",
        "wait until a source can be asked, then run a command that sends it one request",
        command_acquire,
        (
            _option("source", metavar="SOURCE"),
            _option("--wait", type=_duration, metavar="90s", help="at most so long, else exit 1"),
            _option("words", nargs="*", metavar="-- COMMAND", help="its exit code is that of acquire"),
        ),
    ),
    Command(
        "example",
        "print a ready text for another program",
        command_example,
        (_option("name", choices=sorted([*EXAMPLES, "grafana"])),),
    ),
)


# ---------------------------------------------------------------- Command line
# From words to an exit code. Headline: main().


def build_parser() -> argparse.ArgumentParser:
    """The parser of COMMANDS; the common options may stand before or after the command."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="the configuration (else $ADCE_CONFIG, ./adce.yaml, the one beside adce.py)",
    )
    common.add_argument("--db", metavar="FILE", help="the database (else $ADCE_DB, the configured one)")
    common.add_argument("--format", choices=FORMATS, help="of data on stdout (table)")
    common.add_argument("-q", "--quiet", action="store_true", help="nothing but data and errors")
    common.add_argument("-v", "--verbose", action="store_true", help="every attempt")
    parser = argparse.ArgumentParser(
        prog="adce.py", description=(__doc__ or "").partition("\n")[0], parents=[common], allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ADCE {__version__}, SQLite {sqlite3.sqlite_version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name, help=command.meaning, description=command.meaning, parents=[common], allow_abbrev=False
        )
        for option in command.options:
            sub.add_argument(*option.names, **option.settings)
        sub.set_defaults(act=command.act, needs_declarations=command.needs_declarations)
    return parser


def parse_arguments(words: Sequence[str]) -> Arguments:
    """What was typed. All that follows `--` belongs to another program and is not looked at. May exit."""
    end = words.index("--") if "--" in words else len(words)
    defaults = Arguments(config=None, db=None, format="table", quiet=False, verbose=False)
    parser = build_parser()
    arguments = parser.parse_args(words[:end], defaults)
    if words[end + 1 :]:
        if arguments.command != "acquire":
            parser.error("only acquire runs another command")
        if arguments.words:
            parser.error(f"the command begins after --, so what is {' '.join(arguments.words)}?")
        arguments.words = words[end + 1 :]
    return arguments


def _open_standard_files() -> None:
    """A standard file that came closed would lend its number to the database, and errors be written there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a letter that this terminal does not know: ?


def _configuration_for(arguments: Arguments) -> Configuration:
    if arguments.act is command_explain:  # needs no file, and must explain one that is wrong
        return Configuration()
    path, given = find_configuration(arguments.config), arguments.db or os.environ.get("ADCE_DB")
    database = Path(given).absolute() if given else None
    try:
        configuration = load_configuration(path)
    except ConfigurationError:
        database = database or database_named_in(path)
        if arguments.needs_declarations or not database.exists():
            raise
        print(f"adce.py: {path} cannot be used (adce.py check tells why); this is about {database}", file=sys.stderr)
        configuration = Configuration(path, database, store="")
    return dataclasses.replace(configuration, database=database) if database else configuration


def main(words: Sequence[str] | None = None) -> int:
    """Obey one command line and return its exit code."""
    _open_standard_files()
    arguments = parse_arguments(sys.argv[1:] if words is None else words)
    try:
        configuration = _configuration_for(arguments)
        if arguments.act is not command_explain:
            set_foreign_log_aside(configuration.database)
        code: int = arguments.act(arguments, configuration)
        sys.stdout.flush()
    except Error as error:
        with contextlib.suppress(OSError):  # whether anybody reads it or not
            print(f"adce.py: {error}" if not isinstance(error, ConfigurationError) else error, file=sys.stderr)
            if error.hint:
                print(f"Try: {error.hint}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left to flush goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
            return ExitCode.DONE
        print(f"adce.py: {error}", file=sys.stderr)
        return ExitCode.ERROR
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return code


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # sys.exit would wait for a function that never returns
