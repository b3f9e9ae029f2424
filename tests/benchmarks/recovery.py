"""How soon a runner works again after kill -9, with very many tasks in its database.

python tests/benchmarks/recovery.py [--tasks 1000000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import ROOT, fill


def attempts(folder: Path) -> int:
    """How many were begun so far."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'adce.db'}?mode=ro", uri=True, timeout=30)) as sql:
        return sql.execute("select coalesce(max(attempt_id), 0) from attempts").fetchone()[0]


def first_claim(folder: Path) -> float:
    """Seconds from the start of the program to its first attempt; then it is killed."""
    before, began = attempts(folder), time.monotonic()
    process = subprocess.Popen([sys.executable, ROOT / "adce.py", "-q", "run"], cwd=folder)
    while attempts(folder) == before:
        time.sleep(0.01)
    seconds = time.monotonic() - began
    time.sleep(1)  # in the middle of its first cycle
    process.send_signal(signal.SIGKILL)
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{fill(folder, arguments.tasks):,} tasks")
        times = [first_claim(folder) for _ in range(arguments.rounds)]
        print(f"first attempt after a start: median {statistics.median(times):.2f} s, longest {max(times):.2f} s")


if __name__ == "__main__":
    main()
