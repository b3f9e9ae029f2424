"""How soon a runner works again after kill -9, with very many tasks in its database.

python tests/benchmarks/recovery.py [--tasks 1000000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
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
    side = math.isqrt(arguments.tasks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adce.yaml").write_text(CONFIGURATION.format(values=[f"v{number}" for number in range(side)]))
        began = time.monotonic()
        subprocess.run(
            [sys.executable, ROOT / "adce.py", "-q", "reconcile"], cwd=folder, check=False, stdout=subprocess.DEVNULL
        )
        print(f"{side * side:,} tasks noted in {time.monotonic() - began:.0f} s")
        times = [first_claim(folder) for _ in range(arguments.rounds)]
        print(f"first attempt after a start: median {statistics.median(times):.2f} s, longest {max(times):.2f} s")


if __name__ == "__main__":
    main()
