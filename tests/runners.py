"""A runner in a folder of its own, and what others see of it: its database, its lock, its processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import START

import adce

NOWHERE = "http://127.0.0.1:9"
BOX = """\
grace_seconds: {grace}
store: {store}
{more}
sources: {{box: {{base_url: "{address}", timeout_seconds: 60}}}}
datasets:
  things: {{source: box, key: "things/{{name}}", {way}, partitions: {{values: {{name: [{names}]}}}}}}
"""


def write_box(
    folder: Path,
    *,
    way: str = 'url: "/{name}"',
    address: str = NOWHERE,
    store: str = "lake",
    grace: float = 0.3,
    names: str = "A",
    more: str = "",
) -> None:
    """An adce.yaml for a few things that are brought in some way."""
    text = BOX.format(way=way, address=address, store=store, grace=grace, names=names, more=more)
    (folder / "adce.yaml").write_text(text, encoding="utf-8")


def fill_box(folder: Path, *names: str) -> None:
    """Things that are in the store already."""
    (folder / "lake/things").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / "lake/things" / name).write_text(f"thing {name}")


def command_line(*words: str) -> list[str]:
    return [sys.executable, "-c", START, *words]


def read_object(store: adce.Store, key: str) -> bytes:
    with store.open(key) as file:
        return file.read()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def rows(folder: Path, sql: str) -> list[tuple]:
    """What a reader of the database sees; nothing before there is one with its views."""
    try:
        connection = sqlite3.connect(f"file:{folder / 'adce.db'}?mode=ro", uri=True, timeout=10)
    except sqlite3.OperationalError:
        return []
    with contextlib.closing(connection):
        try:
            return connection.execute(sql).fetchall()
        except sqlite3.OperationalError:
            if connection.execute("select 1 from sqlite_schema limit 1").fetchone():
                raise
            return []


def has_begun(folder: Path) -> bool:
    """A runner is there and its first cycle is over."""
    return holder(folder) is not None and bool(
        rows(folder, "select 1 from reconciliations, runner where seconds is not null and stopped_at is null")
    )


def holder(folder: Path, database: str = "adce.db") -> int | None:
    return adce.RunnerLock(folder / database).holder()


def processes_of(folder: Path) -> list[int]:
    """The living processes whose first environment names the folder: the runner's commands, or a runner that was
    told of it by $FOLDER."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def stopped(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """The exit code of a process that ends, and what it wrote to stderr."""
    _, err = process.communicate(timeout=seconds)
    return process.returncode, err


def do(
    *words: str, folder: Path, stdin: str | None = None, seconds: float = 100, **environment: str
) -> subprocess.CompletedProcess[str]:
    """One command line to its end."""
    return subprocess.run(
        command_line(*words),
        cwd=folder,
        env={**os.environ, **environment},
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


class HeldBucket:
    """As much of an S3 server as a runner needs; one kind of request it takes and never answers."""

    def __init__(self, held: Sequence[str] = ()) -> None:
        self.held, self.seen, self.stopping = set(held), list[str](), threading.Event()
        handler = type("BoundHandler", (_BucketHandler,), {"bucket": self})
        self._server = _BucketServer(("127.0.0.1", 0), handler)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> HeldBucket:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def release(self) -> None:
        """From now on everything is answered, what was held too."""
        self.held.clear()
        self.stopping.set()

    def meet(self, kind: str) -> None:
        self.seen.append(kind)
        if kind in self.held:
            self.stopping.wait()


class _BucketServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _BucketHandler(BaseHTTPRequestHandler):
    bucket: HeldBucket
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        is_bucket = "/" not in self.path.strip("/")
        self.bucket.meet("use" if is_bucket else "find")
        self._send(200 if is_bucket else 404, b"")

    def do_GET(self) -> None:
        self.bucket.meet("list")
        self._send(200, b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>")

    def do_PUT(self) -> None:
        self.bucket.meet("put")
        self.close_connection = True
        self._send(500, b"")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """What was seen is the log."""
