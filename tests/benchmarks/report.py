"""What it takes to tell how things are, with very many tasks and attempts in the database.

python tests/benchmarks/report.py [--tasks 1000000] [--attempts 1000000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import adce  # noqa: E402

CONFIGURATION = """
health_check: {{enabled: false}}
sources: {{box: {{}}}}
datasets:
  things:
    source: box
    key: "{{a}}/{{b}}"
    command: [sleep, "60"]
    partitions: {{values: {{a: {values}, b: {values}}}}}
"""
ATTEMPTS = """
    with recursive n(i) as (select 1 union all select i + 1 from n where i < :attempts)
    insert into attempts (object_id, started_at, outcome, seconds, http_status, bytes, requests)
    select 1 + i % :tasks, unixepoch() - (:attempts - i) * 7776000.0 / :attempts,
           case when i % 13 = 0 then 'timeout' when i % 17 = 0 then 'http_error' else 'ok' end,
           i % 997 / 300.0, 200, i % 5000, 1
    from n
"""


def fill(folder: Path, tasks: int) -> int:
    """A lake of which everything is missing. Returns how many tasks it has."""
    side = math.isqrt(tasks)
    (folder / "adce.yaml").write_text(CONFIGURATION.format(values=[f"v{number}" for number in range(side)]))
    command = [sys.executable, ROOT / "adce.py", "-q", "reconcile"]
    subprocess.run(command, cwd=folder, check=False, stdout=subprocess.DEVNULL)
    return side * side


def note_attempts(folder: Path, tasks: int, attempts: int) -> None:
    """Attempts of ninety days."""
    with contextlib.closing(sqlite3.connect(folder / "adce.db")) as sql:
        sql.execute(ATTEMPTS, {"tasks": tasks, "attempts": attempts})
        sql.commit()


def median_of(rounds: int, act: Callable[[], object]) -> float:
    """Seconds that it takes."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = fill(folder, arguments.tasks)
        note_attempts(folder, tasks, arguments.attempts)
        print(f"{tasks:,} tasks, {arguments.attempts:,} attempts, medians of {arguments.rounds}")
        configuration = adce.load_configuration(folder / "adce.yaml")
        with contextlib.closing(adce.open_database(configuration.database)) as database:
            now = time.time()

            def page() -> str:
                return adce.page(database, configuration, now)

            for what, act in {
                "/": page,
                "/metrics": lambda: adce.metrics_text(database),
                "/status": lambda: adce.status_sections(database, configuration, now),
            }.items():
                print(f"{what:12} {median_of(arguments.rounds, act) * 1000:7.1f} ms")
        for command in ("report", "status", "coverage", "tasks"):
            words = [sys.executable, str(ROOT / "adce.py"), command]

            def run(words: list[str] = words) -> None:
                subprocess.run(words, cwd=folder, check=False, capture_output=True)

            print(f"{command:12} {median_of(arguments.rounds, run) * 1000:7.1f} ms")


if __name__ == "__main__":
    main()
