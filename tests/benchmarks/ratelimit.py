"""Rate limiters side by side, before a judge that forgives nothing.

    python tests/benchmarks/ratelimit.py            every limiter, every scenario: eleven minutes
    python tests/benchmarks/ratelimit.py --short    ADCE and its nearest peer, one minute
    python tests/benchmarks/ratelimit.py --minute   how much of a limit of 60 in 60 s is reached: seven minutes

The judge is a server in a process of its own. A request is stamped after a random delay on its way up, so that
requests overtake one another as they do on a real network, and is a violation when it arrives less than W
after the N-th before it. `share` is W / mean(a[i] - a[i - N]) of the arrivals a: 100% is the allowed rate.
`cpu` is that of all client processes together, HTTP included; `waited` is how long a caller waited for a permit.
Times are those of one machine, and noisy: compare the rows of one table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import resource
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import requests
from tabulate import tabulate

import adce

HOUR_STEPS = ("+3600", "-3600")


@dataclass(frozen=True)
class Scenario:
    """What the clients do, and how the network is. Seconds and milliseconds."""

    name: str
    processes: int = 1
    threads: int = 5
    most: int = 60
    window: float = 3.0
    seconds: float = 12.0
    jitter_ms: float = 25.0  # up to so much up and so much down
    straggling: float = 0.0  # share of answers that take four seconds more
    steps_clock: bool = False
    restarts: bool = False


SCENARIOS = (
    Scenario("1 process of 5 threads, 1 to 50 ms"),
    Scenario("3 processes of 2 threads, 1 to 50 ms", processes=3, threads=2),
    Scenario("1 process of 16 threads, 1 to 400 ms", threads=16, jitter_ms=200.0),
    Scenario("3 processes of 6 threads, 1 to 400 ms", processes=3, threads=6, jitter_ms=200.0),
    Scenario("12 threads, one answer of a hundred 4 s late", threads=12, straggling=0.01),
    Scenario("wall clock an hour forth, two back", steps_clock=True),
    Scenario("restarted with a full window", window=4.0, seconds=9.0, restarts=True),
)
MINUTE = Scenario("60 in 60 s, 1 to 50 ms", window=60.0, seconds=200.0)


# --------------------------------------------------------------- the judge


class Judge:
    """Answers every GET late, and notes when it arrived."""

    def __init__(self, jitter_ms: float, straggling: float) -> None:
        self.jitter, self.straggling = jitter_ms / 1000, straggling
        self.arrivals: list[float] = []
        self.dice = random.Random(1)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request by request."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /arrivals"):
                    body = json.dumps(self.arrivals).encode()
                else:
                    await asyncio.sleep(self.dice.uniform(0.0005, self.jitter))
                    self.arrivals.append(time.monotonic())
                    late = 4.0 if self.dice.random() < self.straggling else 0.0
                    await asyncio.sleep(self.dice.uniform(0.0005, self.jitter) + late)
                    body = b"ok"
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()


async def judge_for_ever(port: int, jitter_ms: float, straggling: float) -> None:
    """The process of the judge."""
    server = await asyncio.start_server(Judge(jitter_ms, straggling).serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


@contextlib.contextmanager
def judged(scenario: Scenario) -> Iterator[str]:
    """A judge of a scenario, at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, __file__, "--judge", str(port), str(scenario.jitter_ms), str(scenario.straggling)]
    process = subprocess.Popen(words)
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


# --------------------------------------------------------------- the limiters

Ask = Callable[[requests.Session, str], float]  # sends one request; returns how long it waited for its permit


def adce_limiter(folder: Path, most: int, window: float) -> adce.Limiter:
    """ADCE's limiter for one source with one window."""
    limits = adce.RateLimiting(scopes={"judge": adce.ScopeLimits((adce.WindowLimit(most, window),))})
    configuration = adce.Configuration(
        folder / "adce.yaml", folder / "adce.db", "lake", rate_limiting=limits, sources={"judge": adce.Source("judge")}
    )
    return adce.Limiter(configuration, adce.open_database(configuration.database))


def asks_by_adce(folder: Path, most: int, window: float) -> Ask:
    """ADCE, as a program uses it that is not the runner."""
    limiter = adce_limiter(folder, most, window)

    def ask(session: requests.Session, url: str) -> float:
        start = time.perf_counter()
        with limiter.permit("judge"):
            waited = time.perf_counter() - start
            session.get(url, timeout=30)
        return waited

    return ask


def pyrate_bucket(folder: Path, most: int, window: float, *, durable: bool = False) -> Any:
    """pyrate-limiter's SQLite bucket with a file lock, the one for several processes."""
    from pyrate_limiter import Rate, SQLiteBucket

    rates = [Rate(most, round(window * 1000))]
    bucket = SQLiteBucket.init_from_file(rates, db_path=str(folder / "pyrate.db"), use_file_lock=True)
    if durable:
        bucket.conn.execute("pragma synchronous = full")
    return bucket


def asks_by_pyrate(bucket_of: Callable[[Path, int, float], Any]) -> Callable[[Path, int, float], Ask]:
    """pyrate-limiter with a bucket."""

    def asks(folder: Path, most: int, window: float) -> Ask:
        from pyrate_limiter import Limiter

        limiter = Limiter(bucket_of(folder, most, window))

        def ask(session: requests.Session, url: str) -> float:
            start = time.perf_counter()
            limiter.try_acquire("judge")
            waited = time.perf_counter() - start
            session.get(url, timeout=30)
            return waited

        return ask

    return asks


def pyrate_memory(_folder: Path, most: int, window: float) -> Any:
    """pyrate-limiter's own bucket in memory."""
    from pyrate_limiter import InMemoryBucket, Rate

    return InMemoryBucket([Rate(most, round(window * 1000))])


def asks_by_requests_ratelimiter(bucket_of: Callable[[Path, int, float], Any]) -> Callable[[Path, int, float], Ask]:
    """requests-ratelimiter: a session that limits itself, on pyrate-limiter."""

    def asks(folder: Path, most: int, window: float) -> Ask:
        from pyrate_limiter import Limiter
        from requests_ratelimiter import LimiterSession

        limiter = Limiter(bucket_of(folder, most, window))
        local = threading.local()

        def ask(_session: requests.Session, url: str) -> float:
            if not hasattr(local, "session"):
                local.session = LimiterSession(limiter=limiter, per_host=False)
            start = time.perf_counter()
            local.session.get(url, timeout=30)
            return time.perf_counter() - start  # its answer included: it does not tell them apart

        return ask

    return asks


def asks_by_limits(_folder: Path, most: int, window: float) -> Ask:
    """limits, moving window in memory; it does not wait by itself."""
    from limits import RateLimitItemPerSecond
    from limits.storage import MemoryStorage
    from limits.strategies import MovingWindowRateLimiter

    item = RateLimitItemPerSecond(most, round(window))
    limiter = MovingWindowRateLimiter(MemoryStorage())

    def ask(session: requests.Session, url: str) -> float:
        start = time.perf_counter()
        while not limiter.hit(item, "judge"):
            reset_at = limiter.get_window_stats(item, "judge").reset_time
            time.sleep(max(0.001, reset_at - time.time()))
        waited = time.perf_counter() - start
        session.get(url, timeout=30)
        return waited

    return ask


def asks_paced(_folder: Path, most: int, window: float) -> Ask:
    """No limiter: each thread sends at its share of the rate. What HTTP alone costs."""
    started = time.monotonic()
    numbers = iter(range(10**9))

    def ask(session: requests.Session, url: str) -> float:
        at = started + next(numbers) * window / most
        time.sleep(max(0.0, at - time.monotonic()))
        session.get(url, timeout=30)
        return 0.0

    return ask


LIMITERS: dict[str, Callable[[Path, int, float], Ask]] = {
    "no limiter, paced": asks_paced,
    "ADCE": asks_by_adce,
    "pyrate memory": asks_by_pyrate(pyrate_memory),
    "pyrate SQLite": asks_by_pyrate(pyrate_bucket),
    "requests-ratelimiter": asks_by_requests_ratelimiter(pyrate_memory),
    "requests-ratelimiter SQLite": asks_by_requests_ratelimiter(pyrate_bucket),
    "limits": asks_by_limits,
}
SHORT = ("ADCE", "pyrate SQLite")


# --------------------------------------------------------------- the clients


def run_client(name: str, folder: str, url: str, settings: str) -> None:
    """One client process: prints what each thread got, its CPU, and the waits."""
    scenario = Scenario(**json.loads(settings))
    ask = LIMITERS[name](Path(folder), scenario.most, scenario.window)
    served, waits = [0] * scenario.threads, []
    requests.Session().get(url.replace("/x", "/arrivals"), timeout=30)  # whatever is imported late
    cpu, end = time.process_time(), time.monotonic() + scenario.seconds

    def work(number: int) -> None:
        session = requests.Session()
        while time.monotonic() < end:
            waits.append(ask(session, url))
            served[number] += 1

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(scenario.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end + 0.5 - time.monotonic()))
    used = time.process_time() - cpu
    print(json.dumps({"served": served, "cpu": used, "waits": waits}), flush=True)
    os._exit(0)


def faketime(steps: Path) -> dict[str, str]:
    """The environment of a process whose wall clock follows a file."""
    found = find_spec("libfaketime")
    assert found and found.origin
    return {
        "LD_PRELOAD": str(next(Path(found.origin).parent.rglob("libfaketime.so.1"))),
        "FAKETIME_TIMESTAMP_FILE": str(steps),
        "FAKETIME_CACHE_DURATION": "1",  # seconds; to read the file at each call would be all that is measured
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def measure(scenario: Scenario, name: str) -> dict[str, Any]:
    """One run of one limiter."""
    with tempfile.TemporaryDirectory() as folder, judged(scenario) as address:
        steps = Path(folder) / "faketime"
        steps.write_text("+0")
        environment = {**os.environ, **(faketime(steps) if scenario.steps_clock else {})}

        def start(settings: Scenario) -> subprocess.Popen[str]:
            words = ["--client", name, folder, f"{address}/x", json.dumps(settings.__dict__)]
            return subprocess.Popen(
                [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, env=environment
            )

        results = []
        for _ in range(1 + scenario.restarts):  # a half of the time each
            seconds = scenario.seconds / (1 + scenario.restarts)
            clients = [start(replace(scenario, seconds=seconds)) for _ in range(scenario.processes)]
            for step in HOUR_STEPS if scenario.steps_clock else ():
                time.sleep(seconds / 3)
                steps.write_text(step)
            results += [json.loads(client.communicate()[0]) for client in clients]
        arrivals = requests.get(f"{address}/arrivals", timeout=30).json()
    return judge(scenario, name, arrivals, results)


def judge(scenario: Scenario, name: str, arrivals: list[float], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one run."""
    spans = [late - early for early, late in zip(arrivals, arrivals[scenario.most :], strict=False)]
    served = [count for result in results for count in result["served"]]
    waits = sorted(wait for result in results for wait in result["waits"])
    return {
        "limiter": name,
        "requests": len(arrivals),
        "violations": sum(span < scenario.window for span in spans),
        "share %": round(100 * scenario.window / statistics.mean(spans), 1) if spans else None,
        "longest gap s": round(max((b - a for a, b in itertools.pairwise(arrivals)), default=0), 2),
        "cpu s": round(sum(result["cpu"] for result in results), 3),
        "waited p50 s": round(waits[len(waits) // 2], 3),
        "waited p99 s": round(waits[len(waits) * 99 // 100], 3),
        "least/most served": f"{min(served)}/{max(served)}",
    }


# --------------------------------------------------------------- the cost of one permit


def measure_cost(rows: int = 5000, times: int = 2000) -> list[dict[str, Any]]:
    """Acquire and finish without waiting, with so many requests stored."""
    found = []
    for durable in (False, True):
        for name, prepare in (("ADCE", cost_by_adce), ("pyrate SQLite", cost_by_pyrate)):
            with tempfile.TemporaryDirectory() as folder:
                title = f"{name}, {'power cut safe' if durable else 'process crash safe'}"
                found.append(cost_of(title, prepare(Path(folder), durable=durable), rows, times))
    return found


def cost_by_adce(folder: Path, *, durable: bool) -> Callable[[], object]:
    """A permit taken and given back; if not durable, no commit waits for the disk."""
    limiter = adce_limiter(folder, 10**6, 3600.0)
    if not durable:
        transaction = limiter.database.transaction
        limiter.database.transaction = lambda durable=False: transaction(durable=False)  # type: ignore[method-assign]
    return lambda: limiter.release(limiter.acquire("judge"))


def cost_by_pyrate(folder: Path, *, durable: bool) -> Callable[[], object]:
    """A permit taken: pyrate-limiter knows no end of a request."""
    from pyrate_limiter import Limiter

    limiter = Limiter(pyrate_bucket(folder, 10**6, 3600.0, durable=durable))
    return lambda: limiter.try_acquire("judge")


def cost_of(name: str, once: Callable[[], object], rows: int, times: int) -> dict[str, Any]:
    """The spread of one call, in microseconds."""
    for _ in range(rows):
        once()
    taken = []
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(times):
        start = time.perf_counter()
        once()
        taken.append((time.perf_counter() - start) * 1e6)
    after = resource.getrusage(resource.RUSAGE_SELF)
    taken.sort()
    used = (after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime) / times * 1e6
    return {
        "limiter": name,
        "p50 us": round(taken[times // 2]),
        "p99 us": round(taken[times * 99 // 100]),
        "cpu us": round(used),
    }


# --------------------------------------------------------------- the command


def main(words: list[str]) -> int:
    """Print a table for each scenario; the exit code is 1 when ADCE broke a limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="ADCE and its nearest peer, one minute")
    parser.add_argument("--minute", action="store_true", help="only a window of a minute")
    parser.add_argument("--limiter", action="append", choices=LIMITERS, help="only this one")
    arguments = parser.parse_args(words)
    names = arguments.limiter or (SHORT if arguments.short or arguments.minute else tuple(LIMITERS))
    scenarios = (MINUTE,) if arguments.minute else SCENARIOS
    if arguments.short:
        scenarios = tuple(
            replace(scenario, seconds=scenario.seconds / 3, window=scenario.window / 3) for scenario in scenarios
        )
    print(f"SQLite {sqlite3.sqlite_version}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    violations = 0
    for scenario in scenarios:
        rows = [measure(scenario, name) for name in names]
        violations += sum(row["violations"] for row in rows if row["limiter"] == "ADCE")
        print(f"\n{scenario.name}: {scenario.most} in {scenario.window:g} s, for {scenario.seconds:g} s")
        print(tabulate(rows, headers="keys"), flush=True)
    if not arguments.minute:
        print("\nOne permit, nothing to wait for, 5,000 requests stored")
        print(tabulate(measure_cost(), headers="keys"))
    return 1 if violations else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--judge"]:
        asyncio.run(judge_for_ever(int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
    elif sys.argv[1:2] == ["--client"]:
        run_client(*sys.argv[2:6])
    else:
        sys.exit(main(sys.argv[1:]))
