"""How soon a runner does what other processes ask for, and what its waiting costs.

    python tests/benchmarks/latency.py [--tasks 200] [--idle 60]

A task waits for its retry; another process wants it now; the source sees the request. Counted from the commit of the
other process, and from the start of `adce.py retry ID`. Then the processor's time of the runner when nothing happens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tabulate import tabulate

import adce

CONFIGURATION = """\
queue_check_seconds: 10
retry: {{initial_delay_seconds: 36000, max_delay_seconds: 36000}}
sources:
  shop: {{base_url: "http://127.0.0.1:{port}"}}
datasets:
  things:
    source: shop
    key: "things/{{number}}"
    url: "/{{number}}"
    partitions: {{values: {{number: [{numbers}]}}}}
"""


class Upstream(BaseHTTPRequestHandler):
    """Has nothing, and knows when it was asked for what."""

    asked: ClassVar[dict[str, float]] = {}
    came = threading.Event()

    def do_GET(self) -> None:
        self.asked[self.path] = time.monotonic()
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.came.set()

    def log_message(self, *_: object) -> None:
        pass


def wait_for(path: str) -> float:
    """When the source was asked for it."""
    while path not in Upstream.asked:
        Upstream.came.wait(10)
        Upstream.came.clear()
    return Upstream.asked[path]


def seconds_of_processor(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--idle", type=float, default=60, metavar="SECONDS")
    arguments = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(arguments.tasks)
        text = CONFIGURATION.format(port=server.server_address[1], numbers=", ".join(f'"{n}"' for n in numbers))
        config = Path(folder, "adce.yaml")
        config.write_text(text)
        command = [sys.executable, adce.__file__, "-c", str(config)]
        runner = subprocess.Popen([*command, "-q", "run"])
        for number in numbers:
            wait_for(f"/{number}")
        configuration = adce.load_configuration(config)
        database = adce.open_database(configuration.database)
        while database.value("select count(*) from queue where state = 'retry'") < len(numbers):
            time.sleep(0.1)
        rows = []
        for what in ("commit of another process", "start of adce.py retry"):
            latencies = []
            for number in numbers[: 50 if "adce.py" in what else None]:
                task_id = database.value("select task_id from queue where key = ?", (f"things/{number}",))
                Upstream.asked.pop(f"/{number}")
                if "adce.py" in what:
                    begun = time.monotonic()
                    subprocess.run([*command, "-q", "retry", str(task_id)], check=True)
                else:
                    with database.transaction() as sql:
                        adce.retry_tasks(adce.Ledger(sql, configuration, time.time()), [task_id])
                    begun = time.monotonic()
                latencies.append(wait_for(f"/{number}") - begun)
                while database.value("select state from queue where task_id = ?", (task_id,)) != "retry":
                    time.sleep(0.01)
                time.sleep(0.037)  # so that it meets the runner at different moments of its sleep
            cuts = statistics.quantiles(latencies, n=100)
            rows.append((what, len(latencies), *(1000 * value for value in (cuts[49], cuts[98], max(latencies)))))
        print(tabulate(rows, ["from", "times", "p50 ms", "p99 ms", "longest ms"], floatfmt=".0f"))
        before = seconds_of_processor(runner)
        time.sleep(arguments.idle)
        share = (seconds_of_processor(runner) - before) / arguments.idle
        print(f"waiting for {arguments.idle:g} s takes {share:.2%} of a processor")
        runner.terminate()
        runner.wait()


if __name__ == "__main__":
    main()
