"""What a runner needs while it has nothing to do, and what commands cost.

    python tests/benchmarks/idle.py [--seconds 30] [--rounds 5]

`resident` is that of the process a while after its start, before its first request. CPU times are user and system.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from collect import run
from queues import spread
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGURATION = """
database: adce.db
store: lake
sources: {here: {base_url: "http://127.0.0.1:9"}}
datasets: {one: {source: here, key: "{n}", url: "/{n}", partitions: {values: {n: [A]}}}}
"""


def cpu_of(pid: int) -> float:
    """Its CPU seconds until now."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """Its resident memory now, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cycles_done(folder: Path) -> int:
    """How many cycles its database has that have ended."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{folder / 'adce.db'}?mode=ro", uri=True)) as sql,
    ):
        return sql.execute("select count(seconds) from cycles").fetchone()[0]
    return 0


def idle(folder: Path, seconds: float) -> tuple[float, float]:
    """Resident MB of an idle runner, and its share of a core in percent."""
    process = subprocess.Popen([sys.executable, ROOT / "adce.py", "-q", "run"], cwd=folder)
    try:
        while not cycles_done(folder):
            time.sleep(0.1)
        before = cpu_of(process.pid)
        time.sleep(seconds)
        return resident(process.pid), 100 * (cpu_of(process.pid) - before) / seconds
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adce.yaml").write_text(CONFIGURATION, encoding="utf-8")
        (folder / "lake").mkdir()
        (folder / "lake" / "A").write_text("whole", encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            memory, share = idle(folder, arguments.seconds)
            print(f"idle runner: {memory:.0f} MB resident, {share:.2f} % of a core")
        rows = []
        for command in ("--help", "status", "report", "check"):
            words = [sys.executable, str(ROOT / "adce.py"), command]
            costs = [1e3 * run(words, folder, {}, check=False).cpu for _ in range(arguments.rounds)]
            rows.append({"command": command, "CPU ms": spread(costs, ".0f")})
        print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
