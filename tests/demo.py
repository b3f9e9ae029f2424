"""Try ADCE without the internet: a made-up league on this machine, collected until the lake is complete.

    python tests/demo.py [--days N] [--keep FOLDER]

The upstream has real sockets, strict limits that answer 429 when broken, and some slow and failing answers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path

from upstream import League, Upstream

ADCE = Path(__file__).resolve().parent.parent / "adce.py"
FIRST_DAY = date(2025, 1, 1)
MOST_ROUNDS = 20
CONFIGURATION = """\
database: adce.db
store: lake
retry: {{max_attempts: 10, initial_delay_seconds: 1, max_delay_seconds: 5}}

rate_limiting:
  global_limits: {{requests_per_minute: 300}}
  source_limits:
    league: {{requests_per_second: 20, requests_per_minute: 300, burst_size: 20}}

sources:
  league:
    base_url: {address}
    headers: {{User-Agent: "adce-demo/1.0 (+https://example.org/adce)"}}
    timeout_seconds: 10
    error_when: "code && message"

datasets:
  schedules:
    source: league
    key: "schedules/{{date:%Y%m%d}}.json"
    url: "/scoreboard?dates={{date:%Y%m%d}}"
    partitions: {{dates: {{from: {first}, to: {last}}}}}
    freshness: {{refetch_every: 6h, until: "length(events[?!status.type.completed]) == `0`"}}
    validate: {{json: true, min_bytes: 500, require: ["leagues[0].id == '46'"]}}
  games:
    source: league
    key: "games/{{game_id}}.json"
    url: "/summary?event={{game_id}}"
    partitions: {{from: schedules, ids: "events[?status.type.completed].id", as: game_id}}
    validate: {{json: true, require: ["header.id == '{{game_id}}'", "length(plays || `[]`) > `100`"]}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--days", type=int, default=60, help="how long the league played (60)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave configuration, database and lake there")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        code = show(options.keep, options.days)
        say_what_next(options.keep, kept=True)
        return code
    with tempfile.TemporaryDirectory() as folder:
        code = show(Path(folder), options.days)
    say_what_next(Path(folder), kept=False)
    return code


def show(folder: Path, days: int) -> int:
    limits = [(20, 1.0), (300, 60.0)]
    with Upstream(limits=limits, latency_seconds=(0.01, 0.15), fault_share=0.03, seed=4) as upstream:
        League(FIRST_DAY, days).serve(upstream)
        last = FIRST_DAY + timedelta(days=days - 1)
        configuration = folder / "adce.yaml"
        configuration.write_text(CONFIGURATION.format(address=upstream.address, first=FIRST_DAY, last=last))
        code = fill(configuration)
        if code != 0:
            print(f"adce.py ended with {code}: the lake is not complete; see above", file=sys.stderr)
            return code
        subprocess.run([sys.executable, ADCE, "-c", configuration, "report"], check=True)
        objects = sum(1 for path in (folder / "lake").rglob("*.json"))
        print(f"\nThe lake holds {objects} objects. The source answered {upstream.count()} requests", end="")
        print(f" and counted {upstream.violations} beyond its limits of 20 a second and 300 a minute.")
    return code


def fill(configuration: Path) -> int:
    """Run until nothing expected is left open; each round attempts every open task once."""
    for _ in range(MOST_ROUNDS):
        code = subprocess.run([sys.executable, ADCE, "-c", configuration, "run", "--once"], check=False).returncode
        if code != 3:
            return code
        time.sleep(1)
    return code


def say_what_next(folder: Path, *, kept: bool) -> None:
    print("Look closer:" if kept else "Look closer, after another run with --keep demo:")
    place = folder if kept else Path("demo")
    python, adce = os.path.relpath(sys.executable), os.path.relpath(ADCE)
    for words in ("status", "coverage --dataset games", "task 1"):
        print(f"    {python} {adce} -c {place / 'adce.yaml'} {words}")
    print(f'    sqlite3 -readonly -box {place / "adce.db"} "select * from rates"')


if __name__ == "__main__":
    sys.exit(main())
