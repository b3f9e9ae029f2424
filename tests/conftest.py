"""Real parts for the tests: files, sockets, processes, and a clock that is moved by hand."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import MotoServer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hypothesis import settings  # noqa: E402
from upstream import Upstream  # noqa: E402

settings.register_profile("desk", deadline=None)  # a busy machine is no finding
# a new example belongs on a desk, not in the way of a change
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")

import adce  # noqa: E402

for name in ("COLUMNS", "LINES", "NO_COLOR", "JOURNAL_STREAM", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
    os.environ.pop(name, None)  # they change what the program prints and to whom
found = [folder for folder in os.get_exec_path() if os.access(folder, os.X_OK)]
os.environ["PATH"] = os.pathsep.join(found)  # `su` leaves folders in it that the user may not search

# Under `nohup` and in the background of a script these signals are ignored, and children inherit that. Here they are
# caught instead: pytest and its workers live on, and each program under test starts with the default handlers.
IGNORED = "ADCE_TESTS_IGNORED_SIGNALS"
os.environ.setdefault(
    IGNORED, " ".join(str(int(n)) for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_IGN)
)
for number in os.environ[IGNORED].split():
    signal.signal(int(number), lambda *_: None)


class ManualClock(adce.Clock):
    """Time that passes only when told, or when somebody waits for it."""

    def __init__(self, wall: float = 1_760_000_000.0, boot: float = 50_000.0) -> None:
        self.seconds, self.offset, self.name = boot, wall - boot, "first boot"

    def wall(self) -> float:
        return self.seconds + self.offset

    def boot(self) -> float:
        return self.seconds

    def boot_id(self) -> str:
        return self.name

    def wait(self, wakeups: queue.SimpleQueue[str], seconds: float, *_: object) -> None:
        self.seconds += max(0.0, seconds)

    def advance(self, seconds: float) -> None:
        self.seconds += seconds

    def step_wall(self, seconds: float) -> None:
        self.offset += seconds

    def reboot(self, name: str = "second boot", uptime: float = 5.0) -> None:
        wall = self.wall()
        self.name, self.seconds = name, uptime
        self.offset = wall - uptime


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[adce.Database]:
    database = adce.open_database(tmp_path / "adce.db")
    yield database
    assert database.check() == []
    database.close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture(scope="session")
def aws() -> Iterator[MotoServer]:
    from s3_server import MotoServer  # moto takes half a second to load

    with MotoServer() as server:
        yield server


@pytest.fixture
def configure(tmp_path: Path) -> Callable[[str], adce.Configuration]:
    """Write a text as adce.yaml and load it."""

    def write(text: str) -> adce.Configuration:
        path = tmp_path / "adce.yaml"
        path.write_text(text, encoding="utf-8")
        return adce.load_configuration(path)

    return write


# As `adce.py run` starts itself: from the bytecode, which thousands of processes here need not make anew.
START = f"import os, sys; sys.path[0] = {str(ROOT)!r}; import adce; adce.leave(adce.main())"


def start_adce(*words: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the program itself in a folder, as a user would."""
    return subprocess.Popen(
        [sys.executable, "-c", START, *words],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_adce(*words: str, folder: Path, seconds: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program itself in a folder to its end."""
    process = start_adce(*words, folder=folder, **environment)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
