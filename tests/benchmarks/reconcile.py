"""What a reconciliation costs, beside plain listings of the same keys.

    python tests/benchmarks/reconcile.py                      10,000 and 172,905 objects on a real S3 server
    python tests/benchmarks/reconcile.py --keys 1000000       against a generated listing, without a server
    python tests/benchmarks/reconcile.py --keys 10000000      the same; a quarter of an hour
    python tests/benchmarks/reconcile.py --keys 1000000 --tasks    an empty store, then other weights for all tasks

Every figure is of a process of its own, and the median of `--repeat` of them. `above MB` is the peak of memory over
that of the idle process just before. `longest step` is how long a claim may have to wait for the cycle.
Times are those of one machine, and noisy: compare the rows of one table.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import os
import queue
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from s3_server import BUCKET, S3Server
from tabulate import tabulate

import adce

FIRST_DAY = date(1990, 1, 1)
BODY = b'{"made": "up"}'


@dataclass(frozen=True)
class Lake:
    """So many datasets of so many days, with so many objects a day."""

    datasets: int
    days: int
    times: int = 1

    @property
    def keys(self) -> int:
        """All objects."""
        return self.datasets * self.days * self.times

    def prefix(self, number: int) -> str:
        """Where a dataset's objects lie."""
        return f"lake/p{number:02}/"

    def below(self, number: int) -> Iterator[str]:
        """The keys of a dataset, in order."""
        for day in range(self.days):
            for n in range(self.times):
                yield f"{self.prefix(number)}{FIRST_DAY + timedelta(days=day):%Y%m%d}-{n:02}.json"

    def configure(self, folder: Path, store: str, age_weight: float = 0.5) -> adce.Configuration:
        """The declaration of this lake."""
        last = FIRST_DAY + timedelta(days=self.days - 1)
        times = ", ".join(f'"{n:02}"' for n in range(self.times))
        datasets = "".join(
            f'  p{number:02}:\n    source: web\n    key: "{self.prefix(number)}{{date:%Y%m%d}}-{{n}}.json"\n'
            f'    url: "/{{date}}-{{n}}"\n'
            f"    partitions: {{dates: {{from: {FIRST_DAY}, to: {last}}}, values: {{n: [{times}]}}}}\n"
            for number in range(self.datasets)
        )
        text = f"store: {store}\npriority_weighting: {{age_weight: {age_weight}}}\n"
        text += f"sources: {{web: {{base_url: 'http://127.0.0.1:9'}}}}\ndatasets:\n{datasets}"
        (folder / "adce.yaml").write_text(text)
        return adce.load_configuration(folder / "adce.yaml")


LAKES = {
    10_000: Lake(10, 1000),
    172_905: Lake(15, 11_527),
    1_000_080: Lake(15, 11_112, 6),
    10_000_800: Lake(15, 11_112, 60),
}


class Generated:
    """A store that only claims to hold a lake: what a listing costs here is the making of its entries."""

    def __init__(self, lake: Lake, changed: int) -> None:
        self.lake, self.changed, self.calls = lake, changed, 0

    def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
        """Each hundredth object has another etag when `changed`. What is before `after` costs no call."""
        number = next(number for number in range(self.lake.datasets) if self.lake.prefix(number) == prefix)
        for place, key in enumerate(self.lake.below(number)):
            if key <= after:
                continue
            self.calls += place % adce.CHUNK == 0
            yield adce.StoredObject(key, 14, "new" if self.changed and place % 100 == 0 else "old", 1_700_000_000)


class Empty:
    """A store that holds nothing: every expected object is a gap."""

    calls = 0

    def list(self, prefix: str, after: str = "") -> Iterator[adce.StoredObject]:
        """Nothing."""
        yield from ()


EMPTY, WEIGHTED = "every object is a gap", "every task gets another rank"

# --------------------------------------------------------------- what is measured, each in a process of its own


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cycle(lake: Lake, folder: Path, store_name: str, kind: str) -> dict[str, Any]:
    """One cycle as the runner does it, between claims."""
    configuration = lake.configure(folder, store_name, 0.25 if kind == WEIGHTED else 0.5)
    store: Any = Empty() if kind in (EMPTY, WEIGHTED) else Generated(lake, kind == "1% changed")
    if store_name.startswith("s3:"):
        store = adce.open_store(store_name)
    is_full = kind != "usual: a share"
    database, clock = adce.open_database(configuration.database), adce.Clock()
    with database.transaction() as sql:
        adce.declare_limits(sql, configuration, clock)
        adce.declare_datasets(sql, configuration)
    if isinstance(store, adce.S3Store):
        store.sweep()  # the runner does that at its start: boto3 is loaded
    gc.collect()
    idle, changes, start, cpu = peak_mb(), database._writer.total_changes, time.perf_counter(), time.process_time()
    wakeups: queue.SimpleQueue[str] = queue.SimpleQueue()
    steps = []
    with ThreadPoolExecutor(adce.LISTED_AT_ONCE) as listers:
        ahead = adce.Prefetch(listers, lambda: wakeups.put("page"))
        before = time.perf_counter()
        for step in adce.reconcile(database, configuration, store, clock, adce.CycleOptions(is_full=is_full), ahead):
            steps.append(time.perf_counter() - before)
            if step == 0:
                wakeups.get(timeout=60)
            before = time.perf_counter()
    seconds = time.perf_counter() - start
    row = dict(database.read("select * from cycles order by cycle_id desc limit 1")[0])
    assert row["error"] is None, row["error"]
    assert row["listed"] == row["looked"] or isinstance(store, Empty)
    assert row["looked"] == row["expected"] == lake.keys or not is_full, row
    steps.sort()
    return {
        "seconds": seconds,
        "cpu": time.process_time() - cpu,
        "above MB": peak_mb() - idle,
        "list calls": row["list_calls"],
        "rows written": database._writer.total_changes - changes,
        "p99 step ms": steps[len(steps) * 99 // 100] * 1000,
        "longest step ms": steps[-1] * 1000,
    }


def paginator(lake: Lake) -> dict[str, Any]:
    """boto3 as everybody uses it."""
    import boto3

    client = boto3.client("s3")
    idle, start, calls, keys = peak_mb(), time.perf_counter(), 0, 0
    for number in range(lake.datasets):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=lake.prefix(number)):
            calls += 1
            keys += len(page.get("Contents", ()))
    assert keys == lake.keys
    return {"seconds": time.perf_counter() - start, "above MB": peak_mb() - idle, "list calls": calls}


def rclone() -> dict[str, Any]:
    """rclone, listing all of the bucket; its own process is measured."""
    environment = {
        **os.environ,
        "RCLONE_CONFIG_S_TYPE": "s3",
        "RCLONE_CONFIG_S_PROVIDER": "Other",
        "RCLONE_CONFIG_S_ENV_AUTH": "true",
        "RCLONE_CONFIG_S_ENDPOINT": os.environ["AWS_ENDPOINT_URL"],
    }
    words = [
        str(Path(sysconfig.get_path("scripts"), "rclone")),
        "lsf",
        "-R",
        "--files-only",
        "--fast-list",
        f"s:{BUCKET}",
    ]
    start = time.perf_counter()
    subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "above MB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


def sets(lake: Lake, folder: Path, store_name: str) -> dict[str, Any]:
    """What is known and what is listed as two Python sets of keys, from the same database and the same listing."""
    store: Any = adce.open_store(store_name) if store_name.startswith("s3:") else Generated(lake, changed=0)
    database = adce.open_database(folder / "adce.db")
    if isinstance(store, adce.S3Store):
        store.sweep()
    idle, start = peak_mb(), time.perf_counter()
    known = {row[0] for row in database.read("select key from objects")}
    listed = {entry.key for number in range(lake.datasets) for entry in store.list(lake.prefix(number))}
    assert known == listed
    return {"seconds": time.perf_counter() - start, "above MB": peak_mb() - idle, "list calls": store.calls}


def measure(kind: str, keys: int, folder: str, store_name: str) -> dict[str, Any]:
    """One figure, in this process."""
    lake = LAKES[keys]
    if kind == "plain boto3 paginator":
        return paginator(lake)
    if kind == "rclone lsf":
        return rclone()
    if kind == "two Python sets":
        return sets(lake, Path(folder), store_name)
    return cycle(lake, Path(folder), store_name, kind)


# --------------------------------------------------------------- the command


def fill(server: S3Server, lake: Lake) -> None:
    """Put the objects of a lake into the bucket, by the server's own door."""

    def put(number: int) -> None:
        address = urlsplit(server.filer)
        connection = http.client.HTTPConnection(address.netloc)
        for key in lake.below(number):
            connection.request("PUT", f"{address.path}/{key}", BODY)
            connection.getresponse().read()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(lake.datasets)))


def touch(server: S3Server, lake: Lake, round_number: int) -> None:
    """Write each hundredth object anew."""
    address = urlsplit(server.filer)
    connection = http.client.HTTPConnection(address.netloc)
    for number in range(lake.datasets):
        for place, key in enumerate(lake.below(number)):
            if place % 100 == 0:
                connection.request("PUT", f"{address.path}/{key}", BODY + b" " * round_number)
                connection.getresponse().read()


def run(kind: str, keys: int, folder: str, store_name: str, environment: dict[str, str]) -> dict[str, Any]:
    """One figure of a new process."""
    words = [sys.executable, __file__, "--measure", kind, str(keys), folder, store_name]
    done = subprocess.run(words, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def table(keys: int, repeat: int, server: S3Server | None, *, tasks: bool = False) -> list[dict[str, Any]]:
    """All figures of one size."""
    lake, environment = LAKES[keys], server.environment() if server else {}
    store_name = f"s3://{BUCKET}" if server else "generated"
    kinds = ["cold: everything is new", "steady: nothing changed", "usual: a share", "1% changed", "two Python sets"]
    kinds += ["plain boto3 paginator", "rclone lsf"] if server else []
    kinds = [EMPTY, WEIGHTED] if tasks else kinds
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            for kind in kinds:
                if kind == "1% changed" and server:
                    touch(server, lake, number + 1)
                found[kind].append(run(kind, keys, folder, store_name, environment))
    return [
        {"what": kind, **{name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}}
        for kind, rows in found.items()
    ]


def main(words: list[str]) -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--keys", type=int, action="append", help="about so many objects: 10000, 172905, 1000000, 10000000"
    )
    parser.add_argument("--generated", action="store_true", help="no server, whatever the size")
    parser.add_argument("--tasks", action="store_true", help="an empty store, and changed weights")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args(words)
    for wanted in arguments.keys or [10_000, 172_905]:
        keys = min(LAKES, key=lambda size, wanted=wanted: abs(size - wanted))
        if keys <= 172_905 and not (arguments.generated or arguments.tasks):
            with S3Server() as server:
                fill(server, LAKES[keys])
                rows = table(keys, arguments.repeat, server)
        else:
            rows = table(keys, arguments.repeat, None, tasks=arguments.tasks)
        print(f"\n{keys:,} objects, medians of {arguments.repeat}")
        print(tabulate(rows, headers="keys"), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])))
    else:
        main(sys.argv[1:])
