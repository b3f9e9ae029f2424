"""The same answers over HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from conftest import ManualClock, run_adce, start_adce
from lakes import league_text, write_league

import adce


@contextlib.contextmanager
def serving(folder: Path, clock: ManualClock) -> Iterator[str]:
    """The address of a health server beside a database with a few gaps."""
    path = folder / "adce.yaml"
    path.write_text(league_text("http://127.0.0.1:9") + "health_check: {port: 0}\n")
    configuration = adce.load_configuration(path)
    store, database = adce.open_store(configuration.store), adce.open_database(configuration.database)
    store.sweep()
    with database.transaction() as sql:
        adce.declare_limits(sql, configuration, clock)
        adce.declare_datasets(sql, configuration)
        sql.execute(
            "insert into runner (only_row, pid, version, started_at, beat_at) values (1, 1, 'x', ?, ?)",
            (int(clock.wall()), int(clock.wall())),
        )
    adce.run_cycle(adce.reconcile(database, configuration, store, clock))
    server = adce.HealthServer(configuration, database, clock)
    yield f"http://127.0.0.1:{server.start()}"
    server.stop()
    database.close()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(wall=adce.Clock().wall())


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[str]:
    """A server that nobody changes anything about."""
    with serving(tmp_path_factory.mktemp("served"), ManualClock(wall=adce.Clock().wall())) as address:
        yield address


@pytest.fixture
def own(tmp_path, clock) -> Iterator[str]:
    """A server of one's own."""
    with serving(tmp_path, clock) as address:
        yield address


@pytest.fixture
def database(own, tmp_path) -> Iterator[adce.Database]:
    """The database behind `own`."""
    with contextlib.closing(adce.open_database(tmp_path / "adce.db")) as database:
        yield database


def get(address: str, **options) -> requests.Response:
    return requests.get(address, timeout=10, **options)


def say(address: str, text: bytes) -> socket.socket:
    """A connection to a server that has been told so much."""
    host, port = address.removeprefix("http://").strip("/").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(text)
    return connection


def is_cut_off(connection: socket.socket) -> bool:
    """Before the server's own patience with one read would end."""
    connection.settimeout(adce.HTTP_SECONDS / 2)
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def threads_of(process: subprocess.Popen[str]) -> int:
    return sum(1 for _ in Path(f"/proc/{process.pid}/task").iterdir())


def test_idle_runner_is_healthy(served):
    answer = get(f"{served}/health")
    assert (answer.status_code, answer.json()["status"], answer.json()["problems"]) == (200, "healthy", [])


def test_loop_that_is_stuck_is_not(own, clock):
    clock.advance(600)
    answer = get(f"{own}/health")
    assert answer.status_code == 503
    assert answer.json()["problems"][0].startswith("the main loop has been stuck for 10 min")


def test_beat_of_an_earlier_run_is_not_that_of_a_loop_that_is_stuck(own, database, clock):
    with database.transaction() as sql:
        sql.execute("update runner set beat_at = beat_at - 86400")
    assert get(f"{own}/health").status_code == 200
    clock.advance(600)
    assert get(f"{own}/health").json()["problems"] == ["the main loop has been stuck for 10 min"]


def test_store_that_fails_is_not(own, database, clock):
    with database.transaction() as sql:
        adce.pause(sql, "global", 60, "store: cannot write days/1.json: No space left on device", clock.boot())
    answer = get(f"{own}/health")
    assert answer.status_code == 503
    assert "No space left" in answer.json()["problems"][0]
    components = answer.json()["components"]
    assert [name for name in components if components[name]["status"] == "unhealthy"] == ["store"]
    assert "No space left" in components["store"]["message"]


def test_store_that_ends_two_cycles_in_a_row_is_unusable_until_it_is_back(own, configure, database, clock, tmp_path):
    configuration = configure(league_text("http://127.0.0.1:9"))
    store = adce.FolderStore(tmp_path / "gone")
    answers = []
    for is_there in (False, False, True):
        if is_there:
            store.sweep()
        clock.advance(900)
        adce.run_cycle(adce.reconcile(database, configuration, store, clock))
        answers.append(adce.problems(database, configuration, clock.wall(), clock.wall()))
    assert answers[0] == answers[2] == {}
    assert "is not there" in answers[1]["store unusable"]


def test_folder_that_is_gone_is_told_before_the_next_cycle(own, configure, database, clock, tmp_path):
    configuration = configure(league_text("http://127.0.0.1:9"))
    store = adce.FolderStore(tmp_path / "lake")
    adce.prepare_store(database, configuration, store)
    assert get(f"{own}/health").status_code == 200
    (tmp_path / "lake").rename(tmp_path / "elsewhere")
    answer = get(f"{own}/health")
    assert (answer.status_code, "is not there" in answer.json()["problems"][0]) == (503, True)
    (tmp_path / "elsewhere").rename(tmp_path / "lake")
    assert get(f"{own}/health").status_code == 200


def test_page_does_not_call_complete_what_nobody_could_look_at(own, configure, database, clock, tmp_path):
    configuration = configure(league_text("http://127.0.0.1:9"))
    adce.run_cycle(adce.reconcile(database, configuration, adce.FolderStore(tmp_path / "gone"), clock))
    with database.transaction() as sql:
        sql.execute("update objects set state = 'present'")
        sql.execute("insert into alerts values ('cycles fail', 'lake', 1, '', 1, 1, null, '[]')")
    text = get(f"{own}/").text
    assert "<h1>ADCE: ATTENTION, 100.0 %, all of 6, " in text
    assert "the last cycle was incomplete: " in text


def test_status_tasks_and_metrics_answer(served):
    assert get(f"{served}/status").json()["lake"]["missing"] == 6
    tasks = get(f"{served}/tasks?state=pending").json()
    assert (len(tasks["tasks"]), tasks["total_tasks"], tasks["by_source"]) == (6, 6, {"league": 6})
    assert sum(row["pending"] for row in tasks["by_priority"].values()) == 6
    assert get(f"{served}/tasks?state=gave_up").json()["tasks"] == []
    metrics = get(f"{served}/metrics")
    assert metrics.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'adce_objects{dataset="days",state="missing"} 6' in metrics.text
    assert get(f"{served}/metrics?format=json").json()["lake"]["missing"] == 6


def test_database_that_is_gone_is_told(own, tmp_path):
    (tmp_path / "adce.db").rename(tmp_path / "moved.db")
    answers = [get(f"{own}{path}") for path in ("/status", "/health", "/")]
    (tmp_path / "moved.db").rename(tmp_path / "adce.db")
    assert [answer.status_code for answer in answers] == [503] * 3
    assert all("was moved, replaced or deleted" in answer.text for answer in answers)


def test_page_is_one_document_that_asks_only_for_itself(served):
    answer = get(f"{served}/")
    assert "<title>ADCE: ATTENTION, 0.0 %, 6 missing of 6, runner not running</title>" in answer.text
    assert re.findall(r"src=|url\(|@import|javascript:|http-equiv", answer.text) == []
    (nonce,) = re.findall(r'<script nonce="(\w+)">', answer.text)
    assert f"script-src 'nonce-{nonce}'; connect-src 'self';" in answer.headers["Content-Security-Policy"]
    assert all(link.startswith(("?year=", "/day?")) for link in re.findall(r'href="([^"]*)"', answer.text))
    assert re.findall(r'href="(\?year=\d+)"', get(f"{served}/?year=2024").text) == ["?year=2025"]  # no day is in others
    assert re.search(r"<p>Cycle 1 done .* ago\. Tasks: 6 pending", answer.text)
    assert get(f"{served}/favicon.ico").status_code == 204


def test_day_leads_to_its_objects_and_these_to_their_tasks(served):
    day = next(link for link in re.findall(r'href="([^"]*)"', get(f"{served}/").text) if link.startswith("/day?"))
    text = get(served + day.replace("&amp;", "&")).text
    assert "<title>days, 2025-01-0" in text and "missing" in text
    (task,) = re.findall(r'href="(/task/\d+)"', text)
    text = get(served + task).text
    assert "Attempts, the latest first" in text and f"adce.py skip {task.rpartition('/')[2]}" in text
    assert get(f"{served}/task/days/20250101.json").status_code == 200
    assert get(f"{served}/task/99999").status_code == 404


def test_task_offers_what_is_not_refused_and_tells_of_the_pause_of_its_source(own, database):
    for state, is_offered in (("pending", False), ("gave_up", True)):
        with database.transaction() as sql:
            sql.execute("update objects set task = ?, state = 'missing', last_error = 'it failed'", (state,))
        text = get(f"{own}/task/1").text
        assert ("adce.py retry 1" in text, "adce.py skip 1" in text) == (is_offered, True)
        assert ("nothing can start now" in get(f"{own}/").text) == is_offered
        assert "until 20" not in text
    for until, words in (("3600", "until 20"), ("315360000", ", until it is resumed")):
        with database.transaction() as sql:
            sql.execute(
                "update scopes set paused_until = (select unixepoch() - wall_offset + ? from facts), reason = ?",
                (float(until), f"by the operator{words * words.startswith(',')}"),
            )
            sql.execute("update objects set task = 'pending'")
        assert words in get(f"{own}/task/1").text
        assert words in get(f"{own}/").text.partition("First in the queue")[2]


def test_markup_from_upstream_is_only_shown(own, database):
    with database.transaction() as sql:
        sql.execute("update objects set last_error = '<script>alert(1)</script>\"&'")
    text = get(f"{own}/").text
    assert text.count("<script") == 1  # its own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@pytest.mark.parametrize("path", ["/", "/health", "/status", "/tasks", "/metrics", "/nothing"])
def test_every_answer_forbids_scripts_and_caches(served, path):
    answer = get(served + path)
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/nothing", "127.0.0.1", 404),
        ("HEAD", "/health", "127.0.0.1", 200),
        ("HEAD", "/nothing", "127.0.0.1", 404),
        ("POST", "/health", "127.0.0.1", 405),
        ("PUT", "/tasks", "127.0.0.1", 405),
        ("DELETE", "/tasks", "127.0.0.1", 405),
        ("OPTIONS", "/", "127.0.0.1", 405),
        ("TRACE", "/", "127.0.0.1", 405),
        ("CONNECT", "localhost:80", "127.0.0.1", 405),
        ("GET", "/tasks", "localhost\r\nOrigin: http://evil.example", 403),
        ("GET", "/tasks", "localhost\r\nOrigin: null", 403),
        ("GET", "/tasks", "localhost:1\r\nOrigin: http://localhost:1", 200),
        ("GET", "/health", "evil.example", 403),
        ("GET", "/health", "evil.example:80", 403),
        ("GET", "/health", "127.0.0.1.evil.example", 403),
        ("GET", "/health", "localhost:1", 200),
        ("GET", "/health", "localhost", 200),
        ("GET", "/../../etc/passwd", "127.0.0.1", 404),
        ("GET", "//[", "127.0.0.1", 404),
        ("GET", "http://[/health", "127.0.0.1", 404),
        ("GET", "/tasks?state=%ff&dataset=%00", "127.0.0.1", 200),
        ("GET", "/" + "a" * 70_000, "127.0.0.1", 414),
    ],
)
def test_only_reading_from_here_is_answered(served, method, path, host, status):
    request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
    with contextlib.closing(say(served, request.encode())) as connection:
        answer = connection.makefile("rb").read()
    assert answer.startswith(f"HTTP/1.0 {status} ".encode())
    assert (method == "HEAD") == answer.endswith(b"\r\n\r\n")


def test_it_listens_on_loopback_only(served):
    port = int(served.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=10)


@pytest.mark.parametrize("page", ["/day?dataset={}&day={}", "/day?dataset=days&day=2025-01-01", "/task/1", "/"])
def test_no_name_from_outside_becomes_a_part_of_a_page(page, own, database):
    mark = "<img src=x onerror=alert(1)>"
    with database.transaction() as sql:
        sql.execute("update objects set key = key || ?, last_error = ?, reason = ?", (mark, mark, mark))
        sql.execute("update attempts set error = ?, url = ?", (mark, mark))
    text = get(own + page.format(mark, mark)).text
    assert "<img" not in text
    assert "&lt;img" in text


def test_head_tells_the_length_of_the_answer(served):
    head = requests.head(f"{served}/tasks", timeout=10, headers={"Accept-Encoding": "identity"})
    plain = get(f"{served}/tasks", headers={"Accept-Encoding": "identity"})
    assert int(head.headers["Content-Length"]) == len(plain.content) > 0


def test_slow_clients_hold_nobody_up(served):
    slow = [say(served, b"GET /health HT") for _ in range(3 * adce.HTTP_THREADS)]
    assert get(f"{served}/health").status_code == 200
    assert is_cut_off(slow[0])
    for one in slow:
        one.close()


def test_client_that_drips_is_cut_off_when_its_time_is_over(own, clock):
    dripping = say(own, b"GET /health HT")
    assert get(f"{own}/health").status_code == 200  # so the other one was accepted before
    clock.advance(adce.HTTP_SECONDS + 1)
    assert is_cut_off(dripping)
    dripping.close()


def test_many_answers_at_once_are_all_given(served):
    asked = [say(served, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(adce.HTTP_THREADS)]
    assert {one.recv(15) for one in asked} == {b"HTTP/1.0 200 OK"}
    for one in asked:
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


@pytest.fixture
def runner(upstream, tmp_path) -> Iterator[subprocess.Popen[str]]:
    write_league(tmp_path, upstream.address)
    path = tmp_path / "adce.yaml"
    path.write_text(path.read_text() + "health_check: {port: 0}\n")
    process = start_adce("run", folder=tmp_path)
    yield process
    process.kill()
    process.communicate()


def address_of(runner: subprocess.Popen[str]) -> str:
    assert runner.stderr
    return runner.stderr.readline().rpartition("address=")[2].strip()


def test_runner_serves_while_it_runs(runner):
    address = address_of(runner)
    assert get(address + "health").status_code == 200
    assert json.loads(get(address + "status").text)["runner"]["pid"] == runner.pid


def test_bad_clients_leave_no_word_and_no_thread_behind(runner):
    address = address_of(runner)
    assert until(lambda: get(address + "status").json()["tasks"]["retry"] == 6)  # all workers have begun
    few = threads_of(runner)
    for number in range(100):
        client = say(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" if number % 2 else b"GET / HT")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))  # reset, not closed
        client.close()
    assert until(lambda: threads_of(runner) <= few + 1)
    runner.terminate()
    _, told = runner.communicate(timeout=20)
    assert [line for line in told.splitlines() if not re.match(r"20\S+Z (INFO|WARN) ", line)] == []
