"""Work on a cluster of dask.distributed, whose processes are killed, frozen and started again."""

from __future__ import annotations

import collections
import contextlib
import json
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_adce, start_adce
from runners import rows, wait_until
from s3_server import BUCKET, S3Server
from upstream import Answer, Upstream

import adce

from .engine import Engine

TEXT = """\
database: adce.db
store: {store}
max_concurrent_scrapers: 20
pool: {pool}
grace_seconds: 5
retry: {{initial_delay_seconds: 1, max_delay_seconds: 5, max_attempts: 20}}
rate_limiting:
  enabled: true
  source_limits: {{web: {{requests_per_second: {limit}}}}}
sources:
  web: {{base_url: "{address}", timeout_seconds: 3, max_concurrent: 20}}
datasets:
  things:
    source: web
    key: "things/{{n}}.txt"
    url: "/things/{{n}}"
    partitions: {{values: {{n: {names}}}}}
"""


class Web:
    """Things, of which each tenth is behind a redirect. Notes which are asked for twice at the same time."""

    def __init__(self, upstream: Upstream, names: list[str], seconds: float = 0.05) -> None:
        self.upstream, self.seconds, self.doubled = upstream, seconds, 0
        self._lock, self._asked = threading.Lock(), collections.Counter[str]()
        for name in names:
            place = f"/moved/{name}" if int(name) % 10 == 0 else f"/things/{name}"
            if place.startswith("/moved"):
                upstream.answer(f"/things/{name}", Answer(status=302, headers={"Location": place}))
            upstream.route(place, self.thing)

    def thing(self, path: str, _: dict[str, str]) -> Answer:
        with self._lock:
            self.doubled += self._asked[path] > 0
            self._asked[path] += 1
        self.upstream.stopping.wait(self.seconds)
        with self._lock:
            self._asked[path] -= 1
        return Answer(f"the content of {path}".encode())


@contextlib.contextmanager
def running(folder: Path, **environment: str) -> Iterator[None]:
    process = start_adce("run", folder=folder, **environment)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        (folder / "run.log").write_text(out + err)
    assert process.returncode == 0, err[-2000:]
    assert "Traceback" not in err


def present(folder: Path) -> int:
    return sum(count for (count,) in rows(folder, "select count(*) from objects where state = 'present'"))


def declare(folder: Path, engine: Engine, upstream: Upstream, names: list[str], **values: object) -> None:
    values = {"store": "lake", "limit": 60, **values}
    text = TEXT.format(pool=engine.address, address=upstream.address, names=json.dumps(names), **values)
    (folder / "adce.yaml").write_text(text)


@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
@pytest.mark.timeout(400)
def test_a_lake_is_whole_though_workers_and_the_scheduler_are_killed_and_frozen(tmp_path, count):
    names = [f"{number}" for number in range(count)]
    with S3Server() as s3, Upstream(limits=[(60, 1.0)]) as upstream:
        web = Web(upstream, names)
        with Engine(tmp_path, environment=s3.environment()) as engine:
            declare(tmp_path, engine, upstream, names, store=f"s3://{BUCKET}/lake")
            with running(tmp_path, **s3.environment()):
                wait_until(lambda: present(tmp_path) > count / 10, 60 + count / 10)
                engine.kill("w0")
                engine.signal("w1", signal.SIGSTOP)
                wait_until(lambda: present(tmp_path) > count / 4, 100 + count / 10)
                engine.start_worker("w0")
                wait_until(lambda: rows(tmp_path, "select 1 from attempts where worker = 'w1' and outcome = 'lost'"))
                engine.signal("w1", signal.SIGCONT)
                wait_until(lambda: present(tmp_path) > count / 2, 100 + count / 10)
                engine.signal("scheduler", signal.SIGSTOP)
                wait_until(lambda: rows(tmp_path, "select note from runner where note is not null"), 40)
                engine.signal("scheduler", signal.SIGCONT)
                wait_until(lambda: rows(tmp_path, "select 1 from runner where note is null"), 40)
                engine.signal("w2", signal.SIGSTOP)
                engine.kill("scheduler")
                wait_until(lambda: rows(tmp_path, "select note from runner where note is not null"), 20)
                engine.signal("w2", signal.SIGCONT)
                engine.kill(*engine.names)
                engine.start_scheduler()
                for name in engine.names:
                    engine.start_worker(name)
                wait_until(lambda: present(tmp_path) == count, count / 5 + 120)
            log = (tmp_path / "run.log").read_text()
        kept = {one["Key"] for page in pages(s3) for one in page.get("Contents", [])}
    assert kept == {f"lake/things/{name}.txt" for name in names}
    assert (upstream.violations, web.doubled) == (0, 0)
    assert rows(tmp_path, "select count(*) from attempts where outcome = 'running'") == [(0,)]
    assert rows(tmp_path, "select count(*) from objects where task is not null") == [(0,)]
    assert {name for (name,) in rows(tmp_path, "select distinct worker from recent_attempts")} >= {*engine.names}
    shown = json.loads(run_adce("report", "attempts", "--format", "json", folder=tmp_path).stdout)
    total = "select outcome, worker, count(*) from attempts group by 1, 2"
    assert {(row["outcome"], row["worker"], row["attempts"]) for row in shown} == set(rows(tmp_path, total))
    assert "WARN  pool" in log, log


def pages(s3: S3Server) -> Iterator[dict]:
    return s3.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="lake/")


def test_a_frozen_worker_costs_one_deadline_and_its_late_result_changes_nothing(tmp_path, upstream):
    names = [f"{number}" for number in range(1, 7)]
    web = Web(upstream, names, seconds=2)
    with Engine(tmp_path, workers=1, threads=6) as engine:
        declare(tmp_path, engine, upstream, names)
        with running(tmp_path):
            wait_until(lambda: upstream.count() == 6, 60)
            engine.signal("w0", signal.SIGSTOP)
            began = time.monotonic()
            engine.start_worker("w1")
            wait_until(lambda: present(tmp_path) == 6, 100)
            seconds = time.monotonic() - began
            engine.signal("w0", signal.SIGCONT)
            wait_until(lambda: rows(tmp_path, "select 1 from runner where note is null"), 20)
    assert seconds < 45  # 10 until it counts as lost, and the deadline of a permit: 10 + 3 + 10
    ended = "select outcome, worker, count(*) from attempts group by 1, 2 order by 1"
    assert rows(tmp_path, ended) == [("lost", "w0", 6), ("ok", "w1", 6)]
    assert rows(tmp_path, "select sum(failures), max(attempts) from objects") == [(0, 2)]
    assert web.doubled == 0


def test_an_attempt_that_has_not_begun_in_time_never_does(tmp_path, upstream, aws):
    names = [f"{number}" for number in range(1, 40) if number % 10]
    web = Web(upstream, names)
    with Engine(tmp_path, workers=1, threads=4, environment=aws.environment()) as engine:
        declare(tmp_path, engine, upstream, names[:1], limit=4, store=f"s3://{BUCKET}/begun")
        assert run_adce("run", "--once", folder=tmp_path, **aws.environment()).returncode == 0
        engine.signal("w0", signal.SIGSTOP)
        declare(tmp_path, engine, upstream, names, limit=4, store=f"s3://{BUCKET}/begun")
        with running(tmp_path, **aws.environment()):
            wait_until(lambda: rows(tmp_path, "select count(*) from attempts where outcome = 'lost'")[0][0] >= 4, 60)
            engine.start_worker("w1")
            wait_until(lambda: present(tmp_path) > 4, 60)
            engine.signal("w0", signal.SIGCONT)
            wait_until(lambda: present(tmp_path) == len(names), 60)
    assert rows(tmp_path, "select count(*) from attempts where worker = 'w0' and outcome = 'ok'")[0][0] > 1
    assert rows(tmp_path, "select distinct requests, error from attempts where outcome = 'lost'") == [
        (0, adce.NOT_BEGUN)
    ]
    assert (upstream.count(), web.doubled) == (len(names), 0)


def test_calls_run_on_the_workers_and_get_no_permits_there(tmp_path, upstream):
    module = """
        def double(n):
            return f"{2 * int(n)}".encode()

        def ask(n, session):
            return session.get("http://127.0.0.1:1/").content
    """
    (tmp_path / "scraper.py").write_text("\n".join(line[8:] for line in module.splitlines()))
    text = """
  {name}:
    source: machine
    key: "{name}/{{n}}.txt"
    call: scraper:{name}
    partitions: {{values: {{n: ["1", "2"]}}}}
"""
    with Engine(tmp_path, workers=1) as engine:
        declare(tmp_path, engine, upstream, [])
        path = tmp_path / "adce.yaml"
        start = path.read_text().partition("  things:")[0].replace("sources:\n", "sources:\n  machine: {}\n")
        path.write_text(start + text.format(name="double") + text.format(name="ask"))
        assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
    assert [(tmp_path / f"lake/double/{n}.txt").read_bytes() for n in (1, 2)] == [b"2", b"4"]
    ended = rows(tmp_path, "select dataset, worker, outcome, error from recent_attempts order by key desc")
    assert ended[:2] == [("double", "w0", "ok", None)] * 2
    assert ended[2][:3] == ("ask", "w0", "error")
    assert "worker w0 of a pool can give no permit" in ended[2][3]


def test_a_worker_whose_folder_is_not_that_of_the_lake_stores_nothing(tmp_path, upstream):
    names = ["1", "2"]
    Web(upstream, names)
    engine = Engine(tmp_path, workers=0)
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    with engine:
        declare(tmp_path, engine, upstream, names)
        (tmp_path / "lake").mkdir()
        hide = f'mount -t tmpfs none {shlex.quote(str(tmp_path / "lake"))} && exec "$@"'
        engine.start_worker("w0", "unshare", "-m", "sh", "-c", hide, "sh")
        ended = run_adce("run", "--once", "--max-wait", "5s", folder=tmp_path)
        assert ended.returncode == adce.ExitCode.GAPS_LEFT
        assert "has no folder .adce (on worker w0)" in ended.stderr
        assert "has no folder .adce (on worker w0)" in run_adce("status", folder=tmp_path).stdout
    assert upstream.count() == 0


def test_a_variable_that_a_worker_has_not_is_an_error_of_the_attempt_and_never_leaves_the_runner(tmp_path, upstream):
    with Engine(tmp_path, workers=1) as engine:
        declare(tmp_path, engine, upstream, ["1"])
        path = tmp_path / "adce.yaml"
        path.write_text(
            path.read_text().replace("timeout_seconds: 3,", "timeout_seconds: 3, headers: {X-Key: $A_KEY},")
        )
        assert run_adce("run", "--once", folder=tmp_path, A_KEY="a-canary").returncode == adce.ExitCode.GAPS_LEFT
        left = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert rows(tmp_path, "select distinct error from attempts") == [("$A_KEY is not set on worker w0",)]
    assert upstream.count() == 0
    assert not any(b"a-canary" in text for text in left)


def test_a_scheduler_that_is_not_there_is_a_reported_problem_and_ends_a_run_once(tmp_path, upstream):
    engine = Engine(tmp_path)
    declare(tmp_path, engine, upstream, ["1"])
    ended = run_adce("run", "--once", "--max-wait", "1s", folder=tmp_path)
    assert ended.returncode == adce.ExitCode.ERROR
    assert f"pool: {engine.address} does not answer" in ended.stderr
    assert "Traceback" not in ended.stderr
    with socket.create_server(("127.0.0.1", engine.port)):  # which is something else
        checked = run_adce("check", folder=tmp_path, seconds=40)
    assert f"{engine.address} does not answer" in checked.stdout
    path, text = tmp_path / "adce.yaml", (tmp_path / "adce.yaml").read_text()
    path.write_text(text.replace("tcp:", "tls:"))
    assert "cannot be used: " in run_adce("check", folder=tmp_path, seconds=40).stdout
    path.write_text(text)
    with running(tmp_path):
        wait_until(lambda: rows(tmp_path, "select note from runner where note is not null and stopped_at is null"), 60)
        status = run_adce("status", folder=tmp_path).stdout
        assert "x pool" in status and f": {engine.address} does not answer" in status
        assert (" pending" in status, " left" in status) == (True, False)  # no estimate while nothing can begin
        engine.start_scheduler()
        engine.start_worker("w0")
        wait_until(lambda: rows(tmp_path, "select count(*) from runner where note is null") == [(1,)], 60)
        engine.kill("scheduler", "w0")


def test_a_scheduler_that_stays_away_costs_no_threads(monkeypatch):
    monkeypatch.setattr(adce, "BEGIN_SECONDS", 0.2)
    monkeypatch.setattr(adce, "POOL_SECONDS", 0.01)
    tries, connect = [], adce.Cluster._connect
    monkeypatch.setattr(adce.Cluster, "_connect", lambda cluster: tries.append(1) or connect(cluster))
    cluster = adce.Cluster("tcp://127.0.0.1:9", "lake", adce.Clock(), lambda: None)
    threads = threading.active_count()
    wait_until(lambda: len(tries) > 5)
    assert threading.active_count() <= threads
    cluster.shutdown()
