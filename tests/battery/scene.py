"""A lake, the league that fills it, and its runners, each of which is noted in the history."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from conftest import ROOT
from lakes import league_text
from upstream import League

import adce
from battery import judge

LAUNCHERS = Path(__file__).resolve().parent
NO_SERVER = "health_check: {enabled: false}\n"


def poll(condition: Callable[[], object], seconds: float = 30, what: str = "it") -> None:
    """Wait until something holds, but not for ever."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def children_of(number: int) -> list[int]:
    """The processes that a process, such as strace, has started."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return []


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started: strace would leave them alone."""
    for child in children_of(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.kill()


class Scene:
    """`place` holds the database and the store, `folder` what no fault reaches: configuration, history, log."""

    def __init__(
        self,
        folder: Path,
        *,
        database: Path | None = None,
        store: Path | None = None,
        days: int = 2,
        per_second: int = 0,
        latency_seconds: tuple[float, float] = (0.0, 0.0),
        fault_share: float = 0.0,
        seed: int = 1,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database, self.store = database or folder / "adce.db", store or folder / "lake"
        self.history = judge.History(folder / "history.jsonl")
        self.log = folder / "log.txt"
        self.limits = [(per_second, 1.0)] if per_second else []
        limits = f"rate_limiting: {{source_limits: {{league: {{requests_per_second: {per_second}}}}}}}\n"
        self.league = League(date(2025, 1, 1), days, games_per_day=(2, 3), seed=seed)
        self.upstream = judge.Witness(self.history, latency_seconds=latency_seconds, fault_share=fault_share, seed=seed)
        self.league.serve(self.upstream)
        settings = {"last": days, "attempts": 1000, "delay": 0.2, "grace": 2, **settings}
        text = league_text(self.upstream.address, limits=NO_SERVER + limits * bool(per_second), **settings)
        text = text.replace("database: adce.db\nstore: lake", f"database: {self.database}\nstore: {self.store}")
        (folder / "adce.yaml").write_text(text, encoding="utf-8")
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Scene:
        self.upstream.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        for process in self.processes:
            self.end(process)
        self.upstream.__exit__(*problem)

    @property
    def expected(self) -> set[str]:
        days = {f"days/{day:%Y%m%d}.json" for day in self.league.games}
        return days | {f"games/{game}.json" for game in self.league.ids}

    def start(self, *words: str, launcher: Sequence[str | Path] = (), before: Sequence[str] = ()) -> Any:
        """Start the program, or one of the launchers that disturbs it. What it tells goes to the log."""
        program = [str(word) for word in launcher] or [str(ROOT / "adce.py")]
        self.history.note("started")
        with self.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*before, sys.executable, *program, *words],
                cwd=self.folder,
                env={**os.environ, "TERM": "dumb"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    def end(self, process: subprocess.Popen[str], seconds: float | None = None) -> int:
        """Kill it, or give it some seconds to end by itself. Returns its exit code."""
        if process not in self.processes:
            return process.returncode
        try:
            if seconds is None:
                kill(process)
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            process.wait()
            raise
        self.processes.remove(process)
        self.history.note("ended", code=code)
        return code

    def run(self, *words: str, seconds: float = 60, launcher: Sequence[str | Path] = ()) -> int:
        return self.end(self.start(*words, launcher=launcher), seconds)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def told(self) -> set[str]:
        """The objects that a runner has told as done; with -v it tells each."""
        return set(re.findall(r" done +dataset=\S+ key=(\S+)", self.said()))

    def is_complete(self) -> bool:
        """Whether every expected object is in the store."""
        return all((self.store / key).is_file() for key in self.expected)

    def judge(self) -> None:
        judge.judge_requests(self.history, self.limits)
        with judge.looking_at(self.database) as sql:
            judge.judge_books(sql)
            judge.judge_objects(sql, self.store, self.history, self.expected)
            judge.judge_told(sql, self.told())

    def recover(self, seconds: float = 60) -> None:
        """T: one more run does the rest without a hand; then the judge judges."""
        code = self.run("-v", "run", "--once", seconds=seconds)
        assert code == 0, f"T: exit code {code}\n{self.said()[-2000:]}"
        assert self.is_complete(), f"T: not complete\n{self.said()[-2000:]}"
        assert not list((self.store / adce.STAGING).iterdir()), "T: unfinished files stay"
        self.judge()
