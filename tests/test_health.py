"""The same answers over HTTP."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
import requests
from conftest import ManualClock, run_adce, start_adce
from lakes import league_text, write_league

import adce


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(wall=adce.Clock().wall())


@pytest.fixture
def served(configure, database, clock, tmp_path) -> Iterator[str]:
    """The address of a health server beside a database with a few gaps."""
    configuration = configure(league_text("http://127.0.0.1:9") + "health_check: {port: 0}\n")
    store = adce.open_store(configuration.store)
    store.sweep()
    with database.transaction() as sql:
        adce.declare_limits(sql, configuration, clock)
        adce.declare_datasets(sql, configuration, clock.wall())
        sql.execute("insert into runner values (1, 1, 'x', ?, ?, null, null)", (int(clock.wall()), int(clock.wall())))
    adce.run_cycle(adce.reconcile(database, configuration, store, clock))
    lock = adce.RunnerLock(tmp_path / "adce.db")
    server = adce.HealthServer(configuration, database, lock, clock)
    yield f"http://127.0.0.1:{server.start()}"
    server.stop()


def test_idle_runner_is_healthy(served):
    answer = requests.get(f"{served}/health", timeout=5)
    assert (answer.status_code, answer.json()["status"], answer.json()["problems"]) == (200, "healthy", [])


def test_loop_that_is_stuck_is_not(served, clock):
    clock.advance(600)
    answer = requests.get(f"{served}/health", timeout=5)
    assert answer.status_code == 503
    assert answer.json()["problems"][0].startswith("the main loop has been stuck for 10 min")


def test_store_that_fails_is_not(served, database, clock):
    with database.transaction() as sql:
        adce.pause(sql, "global", 60, "cannot write days/1.json: No space left on device", clock.boot())
    answer = requests.get(f"{served}/health", timeout=5)
    assert answer.status_code == 503
    assert "No space left" in answer.json()["problems"][0]


def test_status_tasks_and_metrics_answer(served):
    status = requests.get(f"{served}/status", timeout=5).json()
    assert status["lake"]["missing"] == 6
    assert len(requests.get(f"{served}/tasks?state=pending", timeout=5).json()) == 6
    assert requests.get(f"{served}/tasks?state=gave_up", timeout=5).json() == []
    assert 'adce_objects{dataset="days",state="missing"} 6' in requests.get(f"{served}/metrics", timeout=5).text
    assert requests.get(f"{served}/metrics?format=json", timeout=5).json()["lake"]["missing"] == 6


def test_page_is_one_document_that_asks_for_nothing(served):
    answer = requests.get(f"{served}/", timeout=5)
    assert "<title>ADCE: 6 gaps</title>" in answer.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not {"<script", "src=", "href="} & set(answer.text.split())


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/nothing", {}, 404),
        ("HEAD", "/health", {}, 200),
        ("POST", "/health", {}, 501),
        ("GET", "/health", {"Host": "evil.example"}, 403),
        ("GET", "/health", {"Host": "localhost:1"}, 200),
        ("GET", "/../../etc/passwd", {}, 404),
    ],
)
def test_only_reading_from_here_is_answered(served, method, path, headers, status):
    assert requests.request(method, served + path, headers=headers, timeout=5).status_code == status


def test_slow_client_holds_nobody_up(served):
    host, port = served.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    for one in slow:
        one.sendall(b"GET /health HT")
    assert requests.get(f"{served}/health", timeout=3).status_code == 200
    for one in slow:
        one.close()


def test_port_that_is_taken_is_told_and_the_run_goes_on(upstream, tmp_path):
    taken = socket.create_server(("127.0.0.1", 0))
    write_league(tmp_path, upstream.address)
    path = tmp_path / "adce.yaml"
    path.write_text(path.read_text() + f"health_check: {{port: {taken.getsockname()[1]}}}\n")
    done = run_adce("run", "--max-minutes", "0.01", folder=tmp_path)
    taken.close()
    assert done.returncode == 0
    assert "WARN  health" in done.stderr
    assert "health_check.port" in done.stderr


def test_runner_serves_while_it_runs(upstream, tmp_path):
    write_league(tmp_path, upstream.address)
    path = tmp_path / "adce.yaml"
    path.write_text(path.read_text() + "health_check: {port: 0}\n")
    process = start_adce("run", folder=tmp_path)
    assert process.stderr
    line = process.stderr.readline()
    address = line.rpartition("address=")[2].strip()
    assert requests.get(address + "health", timeout=5).status_code == 200
    assert json.loads(requests.get(address + "status", timeout=5).text)["runner"]["pid"] == process.pid
    process.terminate()
    process.communicate(timeout=10)
