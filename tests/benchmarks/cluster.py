"""Calls that need CPU on one worker of a cluster and on several: how many times the rate, and the CPU of the runner.

python tests/benchmarks/cluster.py [--workers 3] [--calls 24] [--seconds 0.5]

Each worker has one thread. More workers than cores gain nothing; on two cores the most is 2.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from battery.engine import Engine  # noqa: E402
from conftest import run_adce  # noqa: E402

TEXT = """\
max_concurrent_scrapers: 100
{pool}
sources: {{machine: {{max_concurrent: 100}}}}
datasets:
  work:
    source: machine
    key: "work/{{n}}.txt"
    call: work:burn
    partitions: {{values: {{n: {names}}}}}
"""
WORK = """\
import time

def burn(n):
    until = time.process_time() + {seconds}
    while time.process_time() < until:
        pass
    return n.encode()
"""


def measure(workers: int, calls: int, seconds: float) -> tuple[float, float]:
    """Calls a second, and seconds of CPU of the runner for each."""
    with tempfile.TemporaryDirectory() as name, Engine(Path(name), workers=workers, threads=1) as engine:
        folder = Path(name)
        text = TEXT.format(pool=f"pool: {engine.address}", names=json.dumps([f"{n}" for n in range(calls)]))
        (folder / "adce.yaml").write_text(text)
        (folder / "work.py").write_text(WORK.format(seconds=seconds))
        while f", {workers} threads" not in run_adce("check", folder=folder).stdout:
            time.sleep(0.2)
        before, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = run_adce("run", "--once", folder=folder, seconds=1000)
        assert ended.returncode == 0, ended.stderr
        took, now = time.monotonic() - before, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        return calls / took, cpu / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--calls", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    one = measure(1, arguments.calls, arguments.seconds)
    several = measure(arguments.workers, arguments.calls, arguments.seconds)
    print(f"{os.cpu_count()} cores, {arguments.calls} calls of {arguments.seconds} s of CPU")
    for workers, (rate, cpu) in ((1, one), (arguments.workers, several)):
        print(f"{workers} workers: {rate:.2f} calls a second, {1000 * cpu:.0f} ms of CPU of the runner for each")
    print(f"ratio {several[0] / one[0]:.2f}")


if __name__ == "__main__":
    main()
