"""A cluster of dask.distributed on loopback: a scheduler and workers, each a process that can be killed or frozen."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from s3_server import free_ports

READY_SECONDS = 60


class Engine:
    """Runs while its `with` block lasts. Its workers do not know the folder of the module."""

    def __init__(self, folder: Path, workers: int = 3, threads: int = 2, environment: Mapping[str, str] = {}) -> None:
        self.folder, self.names, self.threads = folder, [f"w{number}" for number in range(workers)], threads
        self.environment = {**os.environ, **environment, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
        (self.port,) = free_ports(1)
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def _start(self, name: str, module: str, *words: str, before: Sequence[str] = ()) -> None:
        start = [*before, sys.executable, "-m", f"distributed.cli.{module}", *words, "--no-dashboard"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                start, cwd=self.folder, stdout=log, stderr=log, env=self.environment
            )

    def start_scheduler(self) -> None:
        self._start("scheduler", "dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port))
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError((self.folder / "scheduler.log").read_text())

    def start_worker(self, name: str, *before: str) -> None:
        place = ["--local-directory", str(self.folder / name), "--name", name]
        threads = ["--nthreads", str(self.threads), "--no-nanny"]
        self._start(name, "dask_worker", self.address, *place, *threads, before=before)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def kill(self, *names: str) -> None:
        for name in names:
            self.processes[name].kill()
            self.processes[name].wait()

    def __enter__(self) -> Engine:
        self.start_scheduler()
        for name in self.names:
            self.start_worker(name)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(*self.processes)
