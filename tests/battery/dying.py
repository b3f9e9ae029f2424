"""The program, which ends itself at a named point of its work, as if it were killed there.

python tests/battery/dying.py N [words of adce.py]     ends with code 99 at the N-th point, after telling its name
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import adce

DIED = 99
COMMANDS = ("begin", "commit", "rollback", "vacuum")


class Points:
    """Counts the points that are passed, by any thread, and ends the process at the one that is meant."""

    def __init__(self, meant: int) -> None:
        self.meant, self.passed = meant, 0
        self._lock = threading.Lock()  # guards passed

    def __call__(self, name: str) -> None:
        with self._lock:
            self.passed += 1
            if self.passed == self.meant:
                os.write(2, f"died at point {self.passed}: {name}\n".encode())
                os._exit(DIED)

    def around(self, place: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
        """Points before and after each call of a function."""
        function = getattr(place, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if not when(*arguments, **options):
                return function(*arguments, **options)
            self(f"before {name}")
            result = function(*arguments, **options)
            self(f"after {name}")
            return result

        setattr(place, name, call)


def statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one."""
    statement = ""
    for line in script.splitlines(keepends=True):
        *whole, rest = line.split("; ") if line.count(";") > 1 else [line]
        for part in [*(one + ";" for one in whole), rest]:
            statement += part
            if statement.strip() and sqlite3.complete_statement(statement):
                yield statement.strip()
                statement = ""
    if statement.strip():
        yield statement.strip()


def connection_class(point: Points) -> type[sqlite3.Connection]:
    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            command = sql.split(maxsplit=1)[0]
            if command in COMMANDS:
                point(f"before {command}")
            cursor = super().execute(sql, *parameters)
            if command in COMMANDS:
                point(f"after {command}")
            return cursor

        def executescript(self, script: str) -> sqlite3.Cursor:
            cursor = self.cursor()
            for statement in statements(script):
                super().execute(statement).fetchall()
                point(f"after {statement[:60]!r}")
            return cursor

    return Connection


def steps_of(point: Points) -> Callable[..., Iterator[int]]:
    reconcile = adce.reconcile

    def stepwise(*arguments: Any) -> Iterator[int]:
        for step in reconcile(*arguments):
            if step:  # 0: it only waits
                point("a step of a cycle")
            yield step

    return stepwise


def main(meant: int, words: list[str]) -> int:
    point, connect = Points(meant), sqlite3.connect
    kind = connection_class(point)
    sqlite3.connect = lambda *arguments, **options: connect(*arguments, **{"factory": kind, **options})  # type: ignore[assignment]
    adce.reconcile = steps_of(point)
    point.around(adce, "fetch")
    for name in ("fsync", "rename", "link", "unlink", "mkdir"):
        point.around(os, name)
    point.around(os, "open", lambda _, flags, *__, **___: bool(flags & os.O_CREAT))
    code = adce.main(words)
    os.write(2, f"passed {point.passed} points\n".encode())
    return code


if __name__ == "__main__":
    status = main(int(sys.argv[1]), sys.argv[2:])
    sys.stderr.flush()
    os._exit(status)
