"""A week of a runner's life in a second: its clock, sources, store, commands, crashes and operators are made up by a
seed, and the same seed makes up the same week.

    python tests/battery/simulation.py --weeks 10000           many seeds, one after another, on all processors
    python tests/battery/simulation.py --seed 4711 --show      one of them, with its history

The runner is the real one, and so are its database (a file), its decisions and its appraisals. What answers it is not.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import heapq
import io
import json
import math
import queue
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import adce

CONFIGURATION = """\
reconciliation_interval_minutes: 60
queue_check_seconds: 1800
full_reconciliation_hours: 24
grace_seconds: 20
max_concurrent_scrapers: 4
retention_days: 2
health_check: {enabled: false}
retry: {max_attempts: 5, initial_delay_seconds: 60, max_delay_seconds: 14400}
rate_limiting:
  global_limits: {requests_per_minute: 18, requests_per_hour: 300}
  source_limits:
    league: {requests_per_minute: 12, requests_per_hour: 200, burst_size: 5}
    shop: {requests_per_minute: 4, min_delay_seconds: 3}
  backoff: {threshold_percent: 80}
sources:
  league: {base_url: "http://league.invalid", timeout_seconds: 30, max_concurrent: 3}
  shop: {base_url: "http://shop.invalid", timeout_seconds: 60, blocked_when: {status: [403], pause_seconds: 1200}}
datasets:
  days:
    source: league
    key: "days/{date:%Y/%m/%d}.json"
    url: "/day?date={date}"
    partitions: {dates: {from: 2026-02-20, to: today}}
    available_after: "18:00"
    freshness: {refetch_every: 3h, until: final, live: {while: "!final && games", every: 15m}}
    validate: {json: true, require: [date]}
  games:
    source: league
    key: "games/{game_id}.json"
    url: "/game?id={game_id}"
    partitions: {from: days, ids: games, as: game_id}
    validate: {json: true, require: ["id == '{game_id}'"]}
  summaries:
    source: league
    key: "summaries/{game_id}.json"
    url: "/game?id={game_id}"
    partitions: {same_as: games}
    validate: {json: true, require: ["id == '{game_id}'"]}
  teams:
    source: shop
    key: "teams/{team}.json"
    url: "/team?id={team}"
    partitions: {values: {team: [ATL, BOS, CHI, DEN]}}
    freshness: {refetch_every: 2d}
    validate: {json: true, require: ["id == '{team}'"]}
  boxes:
    source: shop
    key: "boxes/{game_id}.json"
    command: [boxes, "{game_ids}"]
    batch: {group_by: date, max: 3}
    partitions: {from: days, ids: games, as: game_id}
    validate: {json: true, require: ["id == '{game_id}'"]}
"""
START = 1_772_150_400.0  # 2026-02-27, UTC
WEEK = 7 * 86400.0
LIMITS = {"league": ((12, 60.0), (200, 3600.0)), "shop": ((4, 60.0), (1, 3.0)), "all": ((18, 60.0), (300, 3600.0))}
CALM = 0.7  # the share of the week in which nothing goes wrong any more: by its end all must be well again


class Crash(BaseException):
    """The process is gone."""


class BrokenPromiseError(AssertionError):
    """What ADCE promises did not hold."""


@dataclass(order=True)
class Event:
    """Something that happens at an instant of simulated time."""

    at: float
    number: int
    act: Callable[[], None] = field(compare=False)


class Clock(adce.Clock):
    """The time of a world. Whoever waits lets it go on."""

    def __init__(self, world: World) -> None:
        self.world = world

    def wall(self) -> float:
        return self.world.now + self.world.wall_offset

    def boot(self) -> float:
        return self.world.now - self.world.booted_at

    def boot_id(self) -> str:
        return f"boot {self.world.boots}"

    def wait(
        self,
        wakeups: queue.SimpleQueue[str],
        seconds: float,
        has_changed: Callable[[], bool] | None = None,
        every: float = adce.POLL_SECONDS,
    ) -> None:
        self.world.pass_time(seconds, lambda: not wakeups.empty() or self.world.has_changed)
        self.world.has_changed = False
        with contextlib.suppress(queue.Empty):
            while True:
                wakeups.get_nowait()


class Lake:
    """A store in memory that fails, and whose owner deletes something now and then."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.objects: dict[str, tuple[bytes, adce.StoredObject]] = {}
        self.calls = self.writes = 0

    def sweep(self) -> None:
        pass

    def require_mark(self) -> None:
        pass

    def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
        for place, key in enumerate(
            sorted(key for key in list(self.objects) if key.startswith(prefix) and key > after)
        ):
            self.calls += place % adce.CHUNK == 0
            self.world.fail("list", 0.0005 if place else 0.02)
            if key in self.objects:
                yield self.objects[key][1]

    def find(self, key: str) -> adce.StoredObject | None:
        if not self.world.is_asked:  # else it was looked for before the request, and found missing
            self.world.fail("find", 0.005)
        return self.objects[key][1] if key in self.objects else None

    def open(self, key: str) -> io.BytesIO:
        self.world.fail("read", 0.005)
        return io.BytesIO(self.objects[key][0])

    def spool(self) -> io.BytesIO:
        return io.BytesIO()

    def write(self, key: str, body: bytes | io.BytesIO) -> adce.StoredObject:
        self.world.fail("write", 0.02)
        body = body if isinstance(body, bytes) else body.getvalue()
        self.writes += 1
        etag = hashlib.sha256(body + str(self.writes).encode()).hexdigest()[:12]
        stored = adce.StoredObject(key, len(body), etag, int(self.world.clock.wall()))
        self.objects[key] = body, stored
        self.world.fail("written", 0.01)
        return stored


class Workers(Executor):
    """Does an execution at the instant at which it ends; everything else at once."""

    def __init__(self, world: World) -> None:
        self.world = world

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def act() -> None:
            try:
                future.set_result(function(*arguments, **options))
            except BaseException as error:  # noqa: BLE001  # as executors do
                future.set_exception(error)

        if function is adce.fetch:
            self.world.execute(arguments[0], act)
        else:
            act()
        return future


class Database(adce.Database):
    """One whose process may die before or after any commit."""

    world: World

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[Any]:
        self.world.may_crash(0.00004)
        with super().transaction(durable=durable) as sql:
            yield sql
        self.world.may_crash(0.00004)


class World:
    """All that outlives a process: time, the sources, the lake, what people do; and the judge of it all."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        self.now, self.wall_offset, self.booted_at, self.boots = 1000.0, START - 1000.0, 0.0, 1
        self.clock, self.lake = Clock(self), Lake(self)
        self.events: list[Event] = []
        self.numbers = iter(range(sys.maxsize))
        self.history: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.arrivals: dict[str, list[float]] = {name: [] for name in LIMITS}
        self.under_way: dict[str, float] = {}  # by key, until when
        self.trouble: dict[str, tuple[str, float]] = {}  # of a source, until when
        self.stood_still = 0
        self.has_changed = self.is_calm = self.is_doomed = False
        self.is_asked = False  # whether what ends now had sent its request
        self.runner: adce.Runner | None = None
        (folder / "adce.yaml").write_text(CONFIGURATION)
        self.configuration = adce.load_configuration(folder / "adce.yaml")
        self.other = adce.open_database(folder / "adce.db")
        with self.other.transaction() as sql:
            adce.declare_datasets(sql, self.configuration)
        self.schedule()

    # ------------------------------------------------------------ time

    def at(self, instant: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, Event(instant, next(self.numbers), act))

    def note(self, event: str, **more: Any) -> None:
        self.counts[event] += 1
        self.history.append(f"{self.now:.3f} {event} {more or ''}")

    def pass_time(self, seconds: float, is_awake: Callable[[], bool]) -> None:
        """Let events happen until somebody is woken or the time is over. The process may die meanwhile."""
        until = self.now + (max(seconds, 1e-6) if seconds > 0 else 0.0)  # less would be lost in rounding
        before = self.now
        while not is_awake():
            if not self.events or self.events[0].at > until:
                self.now = until
                break
            event = heapq.heappop(self.events)
            self.now = max(self.now, event.at)
            event.act()
            if self.is_doomed:
                break
        if self.is_doomed:
            raise Crash
        self.stood_still = self.stood_still + 1 if self.now == before else 0
        if self.stood_still > 2_000:
            raise BrokenPromiseError("the main loop turns without end")
        self.may_crash(0.0005)

    def may_crash(self, chance: float) -> None:
        """Once it is dead, nothing that it still does counts."""
        if self.runner and not self.is_calm and self.random.random() < chance:
            self.is_doomed = True
        if self.is_doomed:
            raise Crash

    def fail(self, what: str, chance: float) -> None:
        """The store fails, or the process dies while a worker is in it."""
        if self.is_calm:
            return
        dice = self.random.random()
        if dice < chance / 10:
            self.is_doomed = True  # workers cannot die alone
        if what != "written" and dice < chance:
            self.note("store fails", at=what)
            raise adce.StoreError(f"the store failed to {what}")

    # ------------------------------------------------------------ what happens by itself

    def schedule(self) -> None:
        """What people and sources will do in this week."""
        trouble_ends = self.now + WEEK * CALM
        for source in ("league", "shop"):
            instant = self.now
            while (instant := instant + self.random.expovariate(1 / 40_000)) < trouble_ends:
                kind = self.random.choice(
                    ["away", "broken", "slow", "refuses", "blocked", "garbage", "errors", "pages"]
                )
                seconds = self.random.expovariate(1 / 8000)
                self.at(instant, lambda source=source, kind=kind, seconds=seconds: self.begin(source, kind, seconds))
        for act, mean in (
            (self.delete_objects, 60_000),
            (self.operate, 25_000),
            (self.step_clock, 200_000),
            (self.stop_cleanly, 90_000),
            (self.ask_beside, 3_000),
        ):
            instant = self.now
            while (instant := instant + self.random.expovariate(1 / mean)) < trouble_ends:
                self.at(instant, act)
        self.at(trouble_ends, self.calm_down)

    def begin(self, source: str, kind: str, seconds: float) -> None:
        self.note("trouble", source=source, kind=kind, seconds=round(seconds))
        self.trouble[source] = kind, self.now + seconds

    def calm_down(self) -> None:
        """All is well from here on; an operator resumes and retries whatever has given up."""
        self.note("calm")
        self.is_calm = True
        self.trouble = {}
        with self.beside() as (database, ledger):
            for scope in ("league", "shop", adce.GLOBAL):
                adce.resume_source(ledger.sql, scope, self.clock.boot())
            unwanted = [row[0] for row in database.read("select task_id from objects_now where state = 'skipped'")]
            adce.retry_tasks(ledger, [row[0] for row in database.read("select task_id from queue")] + unwanted)

    @contextlib.contextmanager
    def beside(self) -> Iterator[tuple[adce.Database, adce.Ledger]]:
        """Another process on the same database."""
        with self.other.transaction() as sql:
            adce.declare_limits(sql, self.configuration, self.clock)
            yield self.other, adce.Ledger(sql, self.configuration, self.clock.wall())
        self.has_changed = True

    def delete_objects(self) -> None:
        for key in self.random.sample(sorted(self.lake.objects), k=min(3, len(self.lake.objects))):
            self.note("deleted", key=key)
            del self.lake.objects[key]

    def operate(self) -> None:
        what = self.random.choice(["pause", "resume", "retry", "skip", "cycle"])
        self.note("operator", what=what)
        with self.beside() as (database, ledger):
            scope = self.random.choice(["league", "shop", adce.GLOBAL])
            ids = [row[0] for row in database.read("select task_id from queue order by task_id")]
            some = self.random.sample(ids, k=min(2, len(ids)))
            if what == "pause":
                adce.pause_source(ledger.sql, scope, self.random.choice([600.0, 7200.0]), "", self.clock.boot())
            elif what == "resume":
                adce.resume_source(ledger.sql, scope, self.clock.boot())
            elif what == "retry":
                adce.retry_tasks(ledger, some)
            elif what == "skip":
                adce.skip_tasks(ledger, some, "the operator said so")
            else:
                adce.request_cycle(ledger.sql, adce.CycleOptions(is_full=True))

    def step_clock(self) -> None:
        seconds = self.random.choice([-3600, -60, 60, 3600, 5 * 3600])
        self.note("clock steps", seconds=seconds)
        self.wall_offset += seconds

    def stop_cleanly(self) -> None:
        if self.runner:
            self.note("stop")
            self.runner.stop("told to")

    def ask_beside(self) -> None:
        """Another program asks a source under the same limits."""
        source = self.random.choice(["league", "shop"])
        with self.beside() as (_, ledger):
            now = self.clock.boot()
            opens = adce.opening(ledger.sql, self.configuration.rate_limiting, source, now, "somebody")
            if opens.at > now:
                return
            permit = adce.grant(ledger.sql, source, 30, now)
        seconds = self.random.uniform(0.05, 20)
        self.arrive_within(seconds, source)
        boots = self.boots

        def end() -> None:
            if self.boots == boots:
                with self.beside() as (_, ledger):
                    adce.release(ledger.sql, permit, self.clock.boot())

        self.at(self.now + seconds, end)

    # ------------------------------------------------------------ the sources

    def execute(self, spec: adce.Claim, act: Callable[[], None]) -> None:
        """An execution begins now and ends later; its request arrives somewhere between."""
        keys = [target.key for target in spec.tasks]
        for key in keys:
            if self.under_way.get(key, -math.inf) > self.now:
                raise BrokenPromiseError(f"{key} is done by two workers at once")
        kind, until = self.trouble.get(spec.source.name, ("", 0.0))
        kind = kind if until > self.now else ""
        seconds = self.random.lognormvariate(-0.7, 0.8)
        if kind in ("away", "slow", "broken"):
            seconds = min(spec.source.timeout_seconds, seconds * 30)
        is_asked = bool(spec.url) and not (
            spec.tasks[0].state == adce.ObjectState.MISSING and keys[0] in self.lake.objects
        )
        if is_asked:
            self.arrive_within(seconds, spec.source.name)
        runner = self.runner
        for key in keys:
            self.under_way[key] = self.now + seconds

        def end() -> None:
            if self.runner is runner:  # else it died with its process
                self.kind, self.is_asked = kind, is_asked
                act()

        self.at(self.now + seconds, end)

    def arrive_within(self, seconds: float, source: str) -> None:
        """A request is on its way, also when its process dies; not when its machine does."""
        boots = self.boots
        self.at(
            self.now + self.random.uniform(0, seconds), lambda: self.arrive(source) if self.boots == boots else None
        )

    def arrive(self, source: str) -> None:
        """A request reaches the server, which counts."""
        for scope in (source, "all"):
            times = self.arrivals[scope]
            times.append(self.now)
            for most, seconds in LIMITS[scope]:
                if len(times) > most and times[-1] - times[-1 - most] < seconds:
                    raise BrokenPromiseError(f"{scope} was asked more than {most} times in {seconds:g} s")

    def request(self, spec: adce.Claim, store: adce.Store, clock: adce.Clock) -> list[adce.Result]:
        """Stands in for the network: what the source answers, judged by the program itself."""
        outcomes = {"away": adce.Outcome.UNREACHABLE, "broken": adce.Outcome.BROKEN, "slow": adce.Outcome.TIMEOUT}
        if self.kind in outcomes:
            result = adce.Result(outcomes[self.kind], f"{spec.source.name} is {self.kind}")
            return [dataclasses.replace(result, requests=not place) for place, _ in enumerate(spec.parts())]
        body, status, headers = self.document(spec.url), 200, {}
        dice = 1.0 if self.is_calm else self.random.random()
        if body is None or dice < 0.01:
            status, body = 404, b"not found"
        elif self.kind == "refuses":
            status, headers = 429, {"Retry-After": "120"} if self.random.random() < 0.5 else {}
        elif self.kind == "blocked":
            status = 403
        elif self.kind == "errors" or dice < 0.03:
            status, body = 500, b"sorry"
        elif self.kind == "garbage" or dice < 0.05:
            body = body[: len(body) // 2]
        elif self.kind == "pages":
            body = b"<html>down for maintenance</html>"
        elif dice < 0.07 and not spec.hops:
            status, headers = 302, {"location": spec.url + "&again=1"}
        answer = mock.Mock(status_code=status, headers=headers, links={}, is_redirect=status == 302)
        results = adce._judge(spec, answer, io.BytesIO(body), store, mock.Mock(passed=False))
        return [dataclasses.replace(result, requests=not place) for place, result in enumerate(results)]

    def document(self, url: str) -> bytes | None:
        """The truth at this instant. A day's two games end by the next morning; every third day has another second game
        by then."""
        what, _, value = url.partition("invalid/")[2].partition("?")
        value = value.partition("=")[2].partition("&")[0]
        if what == "day":
            day_ends = (time.mktime(time.strptime(value, "%Y-%m-%d")) - time.timezone) + 26 * 3600
            is_final = self.clock.wall() > day_ends
            letters = "ac" if is_final and int(value[-2:]) % 3 == 0 else "ab"
            games = [value.replace("-", "") + letter for letter in letters]
            return json.dumps({"date": value, "final": is_final, "games": games}).encode()
        return json.dumps({"id": value, "text": "x" * 50}).encode()

    def run_command(self, spec: adce.Claim, store: adce.Store) -> list[adce.Result]:
        """Stands in for a program that writes some of its objects to the store itself."""
        results, end = [], adce.ProgramEnd("exit 0")
        for target in spec.tasks:
            dice = 1.0 if self.is_calm else self.random.random()
            if self.kind in ("away", "broken", "errors") or dice < 0.05:
                results.append(adce._judge_end(spec, target, end, None, store))
                continue
            body = json.dumps({"id": target.fields["game_id"]}).encode()
            store.write(target.key, body[:9] if dice < 0.08 else body)
            results.append(adce._judge_end(spec, target, end, None, store))
        return results

    # ------------------------------------------------------------ a life

    def live(self) -> None:
        """A week: runners start, stop and die, and the next one goes on."""
        end = self.now + WEEK
        while self.now < end:
            database = adce.open_database(self.folder / "adce.db")
            database.__class__, database.world = Database, self  # type: ignore[attr-defined]
            journal = adce.Journal(io.StringIO(), clock=self.clock)
            self.runner = runner = adce.Runner(self.configuration, database, self.lake, journal)
            runner.pool = runner.listers = Workers(self)
            runner.beat_seconds, runner.rng = 3600.0, random.Random(self.random.random())
            self.note("start")
            try:
                runner.run(max_seconds=end - self.now)
                self.judge_stop(database)
            except Crash:
                self.note("crash")
            finally:
                self.runner, self.is_doomed, self.under_way = None, False, {}
                with contextlib.suppress(Crash):
                    database.close()
            self.pass_time(self.random.choice([0.1, 5, 600]), lambda: False)
            if not self.is_calm and self.random.random() < 0.2:
                self.note("reboot")
                self.boots, self.booted_at = self.boots + 1, self.now
                self.pass_time(60, lambda: False)
        self.judge_end()

    # ------------------------------------------------------------ the judge

    def judge_stop(self, database: adce.Database) -> None:
        """After a clean stop nothing runs, and the books are right."""
        books = {
            "tasks still running": "select count(*) from queue where state = 'running'",
            "attempts that no day counts": """
                select coalesce(sum(attempts), 0) < (select count(*) from attempts where outcome != 'running')
                from daily_totals""",
        }
        for what, sql in (books | adce.CONSISTENCY).items():
            if database.value(sql):
                raise BrokenPromiseError(what)
        self.judge_contents(database)

    def judge_contents(self, database: adce.Database) -> None:
        """What is called present is whole."""
        for key, etag in database.read("select key, etag from objects_now where state = 'present'"):
            body, stored = self.lake.objects.get(key, (b"", None))
            if stored and stored.etag == etag:
                try:
                    json.loads(body)
                except ValueError as error:
                    raise BrokenPromiseError(f"{key} is called present and is not whole") from error

    def judge_end(self) -> None:
        """The last third of the week was calm: by now the lake is complete."""
        with contextlib.closing(adce.open_database(self.folder / "adce.db")) as database:
            if problems := database.check():
                raise BrokenPromiseError("; ".join(problems))
            now = self.clock.wall()
            for row in database.read("select key, state, reason, since from objects where state != 'dropped'"):
                is_young = row["key"].startswith("days/") and row["since"] > now - 2 * 86400
                if row["state"] in ("missing", "suspect") and row["since"] < now - 6 * 3600:
                    raise BrokenPromiseError(f"{row['key']} is {row['state']} since {now - row['since']:.0f} s")
                if row["state"] == "stale" and not is_young and row["since"] < now - 6 * 3600:
                    raise BrokenPromiseError(f"{row['key']} is stale since {now - row['since']:.0f} s")
                if row["state"] == "present" and row["key"] not in self.lake.objects:
                    raise BrokenPromiseError(f"{row['key']} is called present and is not there")
            self.judge_expected(database)
            self.judge_contents(database)
            if not database.value("select count(*) from objects where state = 'present'") > 30:
                raise BrokenPromiseError("hardly anything was collected")
            self.counts["stored"] = database.value("select sum(attempts) from stats where outcome = 'ok'")
            self.counts["attempts"] = database.value("select count(*) from attempts")
        self.other.close()

    def judge_expected(self, database: adce.Database) -> None:
        """What is expected below the days is what the days in the lake name."""
        for key, (body, _) in self.lake.objects.items():
            if not key.startswith("days/"):
                continue
            day = key[5:15].replace("/", "")
            wanted = {f"{folder}/{game}.json" for game in json.loads(body)["games"] for folder in ("games", "boxes")}
            known = "select key from objects_now where state != 'dropped' and (key glob ? or key glob ?)"
            found = {row[0] for row in database.read(known, (f"games/{day}*", f"boxes/{day}*"))}
            if found != wanted:
                raise BrokenPromiseError(f"{key} names {sorted(wanted)}, expected are {sorted(found)}")


def simulate(seed: int) -> World:
    """One week. Raises BrokenPromiseError."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        world = World(seed, Path(folder))
        with (
            mock.patch.object(adce, "request", world.request),
            mock.patch.object(adce, "run_command", world.run_command),
        ):
            try:
                world.live()
            except Exception as error:
                error.add_note("\n".join(["", *world.history[-40:], f"seed {seed}"]))
                raise
        return world


def figures(seed: int) -> tuple[int, str, dict[str, int]]:
    """What a week came to; for a pool of processes."""
    try:
        return seed, "", dict(simulate(seed).counts)
    except Exception as error:  # noqa: BLE001  # whatever it is, its seed is told
        return seed, f"{type(error).__name__}: {error}", {}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weeks", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--show", action="store_true", help="its history")
    arguments = parser.parse_args(words)
    if arguments.seed is not None:
        world = simulate(arguments.seed)
        if arguments.show:
            print("\n".join(world.history))
        print(dict(world.counts), hashlib.sha256("\n".join(world.history).encode()).hexdigest()[:16])
        return 0
    total: collections.Counter[str] = collections.Counter()
    failed, began = [], time.monotonic()
    with ProcessPoolExecutor() as pool:
        seeds = range(arguments.first, arguments.first + arguments.weeks)
        for seed, error, counts in pool.map(figures, seeds, chunksize=4):
            total.update(counts)
            if error:
                failed.append(seed)
                print(f"seed {seed}: {error}", flush=True)
    print(f"{arguments.weeks} weeks in {time.monotonic() - began:.0f} s, {len(failed)} broken promises")
    print(", ".join(f"{name}: {count}" for name, count in sorted(total.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
