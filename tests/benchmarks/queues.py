"""Claim and finish, five tasks in flight, beside a bare SQLite loop and other queues.

    pip install huey litequeue persist-queue
    python tests/benchmarks/queues.py                          1,000, 100,000 and 1,000,000 pending tasks, five rounds
    python tests/benchmarks/queues.py --pending 1000 --folder /dev/shm

All have synchronous=FULL and keep a task whose worker is killed, but huey, which deletes a task when it is claimed.
`bare` is one thread with two commits a task: one for the claim, by an index, and one for the finish. ADCE does what its
runner does: the finished and the next tasks of a turn in one transaction, with limits, attempts, totals and scores.
A ratio is that of two rates in one round, and of CPU times in one round; each figure is the median of the rounds,
with the lowest and the highest. A queue that is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tabulate import tabulate

import adce

IN_FLIGHT = 5
DATASETS = 12
CONFIGURATION = """
database: {folder}/adce.db
store: {folder}/lake
sources: {{here: {{base_url: "http://localhost", max_concurrent: 5}}}}
datasets:
"""
DATASET = """
  set{number:02}:
    source: here
    key: "set{number:02}/{{n}}/{{m}}.json"
    url: "/{number}/{{n}}/{{m}}"
    partitions: {{values: {{n: {n}, m: {m}}}}}
"""


class Queue:
    """A queue with pending tasks: `step()` claims what there is room for, and finishes it in the next step."""

    in_one_step = 1

    def step(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Bare(Queue):
    """What SQLite itself needs: an indexed claim and a finish, each in a transaction."""

    def __init__(self, folder: Path, pending: int) -> None:
        self.sql = sqlite3.connect(folder / "bare.db", isolation_level=None)
        self.sql.executescript("""
            pragma journal_mode = wal;
            pragma synchronous = full;
            create table tasks (id integer primary key, state text not null, score integer not null, body text);
            create index pending on tasks (score desc, id) where state = 'pending';
        """)
        rng = random.Random(1)
        with self.sql:
            rows = ((rng.randrange(1000), f"task {number}") for number in range(pending))
            self.sql.execute("begin")
            self.sql.executemany("insert into tasks (state, score, body) values ('pending', ?, ?)", rows)
            self.sql.execute("commit")
        self.sql.execute("pragma wal_checkpoint(truncate)")

    def step(self) -> None:
        self.sql.execute("begin immediate")
        best = "select id from tasks where state = 'pending' order by score desc, id limit 1"
        (number,) = self.sql.execute(best).fetchone()
        self.sql.execute("update tasks set state = 'running' where id = ?", (number,))
        self.sql.execute("commit")
        self.sql.execute("begin immediate")
        self.sql.execute("update tasks set state = 'done' where id = ?", (number,))
        self.sql.execute("commit")

    def close(self) -> None:
        self.sql.close()


class Adce(Queue):
    """The turns of a runner, without its requests."""

    in_one_step = IN_FLIGHT

    def __init__(self, folder: Path, pending: int) -> None:
        text, values = CONFIGURATION.format(folder=folder), range(math.isqrt(pending // DATASETS) + 1)
        for number in range(DATASETS):
            text += DATASET.format(number=number, n=[f"n{n}" for n in values], m=[f"m{m}" for m in values])
        (folder / "adce.yaml").write_text(text, encoding="utf-8")
        (folder / "lake").mkdir()
        self.configuration = adce.load_configuration(folder / "adce.yaml")
        self.database, self.clock, self.rng = adce.open_database(folder / "adce.db"), adce.Clock(), random.Random(1)
        store = adce.open_store(self.configuration.store)
        adce.prepare_store(self.database, self.configuration, store)
        adce.declare(self.database, self.configuration, self.clock)
        adce.run_cycle(adce.reconcile(self.database, self.configuration, store, self.clock))
        self.claimed: list[adce.Claim] = []

    def step(self) -> None:
        with self.database.transaction() as sql:
            for claimed in self.claimed:
                key = claimed.tasks[0].key
                stored = adce.StoredObject(key, 1000, f"{key} in version 1", int(self.clock.wall()))
                found = adce.Inspection(settled=False, live=False, mentions={})
                result = adce.Result(adce.Outcome.OK, http_status=200, stored=stored, inspection=found, requests=1)
                ledger = adce.Ledger(sql, self.configuration, self.clock.wall(), 1)
                adce.finish(ledger, claimed, [result], self.clock, self.rng)
            self.claimed, busy = [], Counter[str]()
            while len(self.claimed) < IN_FLIGHT:
                free = IN_FLIGHT - len(self.claimed)
                begun, _ = adce.claim(sql, self.configuration, self.clock, busy, free)
                assert begun
                busy[begun.dataset.name] += 1
                self.claimed.append(begun)

    def close(self) -> None:
        self.database.close()


class Huey(Queue):
    """Two commits: taking a task deletes it, its result is stored."""

    def __init__(self, folder: Path, pending: int) -> None:
        from huey import SqliteHuey

        self.huey = SqliteHuey(filename=str(folder / "huey.db"), fsync=True)
        self.huey.task()(print)
        storage = self.huey.storage
        with storage.db(commit=True) as sql:
            rows = ((storage.name, f"task {number}".encode(), number % 1000) for number in range(pending))
            sql.executemany("insert into task (queue, data, priority) values (?, ?, ?)", rows)

    def step(self) -> None:
        body = self.huey.storage.dequeue()
        assert body
        self.huey.storage.put_data(body.decode(), b"done")

    def close(self) -> None:
        self.huey.storage.close()


class LiteQueue(Queue):
    """First in, first out."""

    def __init__(self, folder: Path, pending: int) -> None:
        from litequeue import LiteQueue as Lite

        self.queue = Lite(str(folder / "lite.db"))
        self.queue.conn.execute("pragma synchronous = full")
        with self.queue.transaction():
            for number in range(pending):
                self.queue.put(f"task {number}")

    def step(self) -> None:
        task = self.queue.pop()
        assert task
        self.queue.done(task.message_id)

    def close(self) -> None:
        self.queue.conn.close()


class PersistQueue(Queue):
    """First in, first out."""

    def __init__(self, folder: Path, pending: int) -> None:
        import pickle

        from persistqueue import SQLiteAckQueue

        self.queue = SQLiteAckQueue(str(folder / "persist"), auto_commit=True)
        rows = ((pickle.dumps(f"task {number}"), 0, 1) for number in range(pending))
        with self.queue._putter as sql:
            sql.executemany("insert into ack_queue_default (data, timestamp, status) values (?, ?, ?)", rows)
        for sql in (self.queue._getter, self.queue._putter):
            sql.execute("pragma synchronous = full")
        self.queue.resume_unack_tasks()

    def step(self) -> None:
        self.queue.ack(self.queue.get(block=False))

    def close(self) -> None:
        self.queue.close()


QUEUES: dict[str, Callable[[Path, int], Queue]] = {
    "bare": Bare,
    "ADCE": Adce,
    "huey": Huey,
    "litequeue": LiteQueue,
    "persist-queue": PersistQueue,
}


@contextlib.contextmanager
def opened(name: str, folder: Path, pending: int) -> Iterator[Queue | None]:
    """A filled queue, or None when its package is not installed."""
    (folder / name).mkdir()
    try:
        queue = QUEUES[name](folder / name, pending)
    except ImportError:
        yield None
        return
    with contextlib.closing(queue):
        queue.step()
        yield queue


def measured(queue: Queue, tasks: int) -> tuple[float, float, float]:
    """Seconds a task, CPU seconds a task, and the 99th percentile of a step."""
    steps = list[float]()
    began, cpu = time.perf_counter(), time.process_time()
    while len(steps) * queue.in_one_step < tasks:
        at = time.perf_counter()
        queue.step()
        steps.append(time.perf_counter() - at)
    done = len(steps) * queue.in_one_step
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    return seconds / done, used / done, statistics.quantiles(steps, n=100)[98]


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pending", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=500, help="finished by each queue in a round")
    parser.add_argument("--only", choices=QUEUES, nargs="+", default=[*QUEUES])
    parser.add_argument("--folder", help="on the file system to measure")
    arguments = parser.parse_args()
    rows = []
    for pending in arguments.pending:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name, contextlib.ExitStack() as stack:
            filled = pending + arguments.rounds * arguments.tasks
            queues = {one: stack.enter_context(opened(one, Path(name), filled)) for one in arguments.only}
            there = {one: queue for one, queue in queues.items() if queue}
            rounds = [
                {one: measured(queue, arguments.tasks) for one, queue in there.items()} for _ in range(arguments.rounds)
            ]
        for one in there:
            seconds, cpu, slow = zip(*(each[one] for each in rounds), strict=True)
            bare_seconds, bare_cpu, _ = zip(*(each["bare"] for each in rounds), strict=True)
            rows.append(
                {
                    "pending": f"{pending:,}",
                    "queue": one,
                    "tasks/s": f"{1 / statistics.median(seconds):,.0f}",
                    "of bare": spread([b / a for a, b in zip(seconds, bare_seconds, strict=True)]),
                    "CPU us": f"{1e6 * statistics.median(cpu):,.0f}",
                    "CPU of bare": spread([a / b for a, b in zip(cpu, bare_cpu, strict=True)], ".1f"),
                    "p99 ms of a step": f"{1e3 * statistics.median(slow):.2f}",
                }
            )
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
