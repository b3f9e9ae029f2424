"""A whole collection by `run --once`, beside a script that keeps no state and knows no limits.

    python tests/benchmarks/collect.py                          1 kB and 200 kB objects into a folder
    python tests/benchmarks/collect.py --s3                     into a real S3 server
    python tests/benchmarks/collect.py --objects 5000 --sizes 1000 --rounds 3

Both ask a server on loopback with five connections. The script has five threads with a session of requests each; it
writes each object to a file that it syncs, renames, and whose folder it syncs, or puts it with boto3. Each run is a
process; the time and the CPU time of its start, with one object, are taken off. A ratio is that of one round; each
figure is the median of the rounds, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from queues import spread
from s3_server import BUCKET, S3Server
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent.parent
SERVER = """
import asyncio, sys

class Upstream(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.head = b""
    def data_received(self, data):
        self.head += data
        while b"\\r\\n\\r\\n" in self.head:
            request, _, self.head = self.head.partition(b"\\r\\n\\r\\n")
            self.transport.write(ANSWER)

async def serve():
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

size = int(sys.argv[1])
ANSWER = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % size + b"x" * size
asyncio.run(serve())
"""
SCRIPT = """
import concurrent.futures, os, pathlib, sys, threading
import requests

port, count, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
mine = threading.local()
if store.startswith("s3://"):
    import boto3
    bucket, client = store[5:].partition("/")[0], boto3.client("s3")

    def keep(name, body):
        client.put_object(Bucket=bucket, Key=f"script/{name}", Body=body)
else:
    folder = pathlib.Path(store)
    folder.mkdir()

    def keep(name, body):
        draft = folder / f".{name}"
        with draft.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(folder / name)
        opened = os.open(folder, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)

def collect(number):
    if not hasattr(mine, "session"):
        mine.session = requests.Session()
    response = mine.session.get(f"http://127.0.0.1:{port}/{number}", timeout=30)
    response.raise_for_status()
    keep(f"{number}.json", response.content)

with concurrent.futures.ThreadPoolExecutor(5) as pool:
    for _ in pool.map(collect, range(count)):
        pass
"""
CONFIGURATION = """
database: adce.db
store: {store}
sources: {{here: {{base_url: "http://127.0.0.1:{port}", max_concurrent: 5}}}}
datasets:
  all:
    source: here
    key: "adce/{{n}}{{m}}.json"
    url: "/{{n}}{{m}}"
    partitions: {{values: {{n: {tens}, m: {units}}}}}
"""


class Cost(NamedTuple):
    """Seconds and CPU seconds of a process."""

    seconds: float
    cpu: float


@contextlib.contextmanager
def upstream(size: int) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", SERVER, str(size)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield int(process.stdout.readline())
        process.kill()


def run(words: list[str], folder: Path, environment: dict[str, str], *, check: bool = True) -> Cost:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=folder, env={**os.environ, **environment}, check=check, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def collect(name: str, port: int, count: int, s3: S3Server | None) -> Cost:
    """The cost of a collection of so many objects, into a store that has none of them."""
    environment = s3.environment() if s3 else {}
    with tempfile.TemporaryDirectory() as folder:
        store = f"s3://{BUCKET}/{Path(folder).name}" if s3 else str(Path(folder, "lake"))
        if name == "script":
            words = [sys.executable, "-c", SCRIPT, str(port), str(count), store]
        else:
            tens, units = [f"{n:03}" for n in range(-(-count // 10))], [f"{n}" for n in range(min(count, 10))]
            text = CONFIGURATION.format(store=store, port=port, tens=tens, units=units)
            Path(folder, "adce.yaml").write_text(text, encoding="utf-8")
            words = [sys.executable, str(ROOT / "adce.py"), "-q", "run", "--once"]
        return run(words, Path(folder), environment)


def of_objects(name: str, port: int, count: int, s3: S3Server | None) -> Cost:
    """The cost of an object, without that of the start."""
    start, whole = collect(name, port, 1, s3), collect(name, port, count, s3)
    return Cost(*((a - b) / (count - 1) for a, b in zip(whole, start, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 200_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(S3Server()) if arguments.s3 else None
        for size in arguments.sizes:
            with upstream(size) as port:
                rounds = [
                    {name: of_objects(name, port, arguments.objects, s3) for name in ("script", "ADCE")}
                    for _ in range(arguments.rounds)
                ]
            rows += [
                {
                    "bytes": f"{size:,}",
                    "collector": name,
                    "objects/s": f"{1 / statistics.median(each[name].seconds for each in rounds):,.0f}",
                    "of script": spread([each["script"].seconds / each[name].seconds for each in rounds]),
                    "CPU ms": f"{1e3 * statistics.median(each[name].cpu for each in rounds):.2f}",
                    "CPU of script": spread([each[name].cpu / each["script"].cpu for each in rounds]),
                }
                for name in ("script", "ADCE")
            ]
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
