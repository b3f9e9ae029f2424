"""A program of its own that asks a source as often as it may, under the limits of an adce.yaml.

python tests/asker.py CONFIG SOURCE THREADS SECONDS     prints how many answers each thread got, as JSON
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import requests

import adce


def keep_asking(config: str, source: str, served: list[int], number: int) -> None:
    """For ever, whatever the answers are; every other thread without a session of ours."""
    session, by_hand = adce.session(source, config), requests.Session()
    url = adce.shared_limiter(config).source(source).base_url + "/x"
    while True:
        with contextlib.suppress(requests.RequestException):
            if number % 2:
                with adce.permit(source, config) as held:
                    answer = by_hand.get(url, timeout=2)
                    held.answered(answer.status_code, answer.headers)
            else:
                session.get("/x")
            served[number] += 1


def main(config: str, source: str, threads: int, seconds: float) -> None:
    adce.shared_limiter(config)
    served = [0] * threads
    for number in range(threads):
        threading.Thread(target=keep_asking, args=(config, source, served, number), daemon=True).start()
    time.sleep(seconds)
    print(json.dumps(served), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
