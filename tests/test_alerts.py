"""What people are told: once when it begins, once a day while it lasts, once when it is over; by every channel."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import ROOT, ManualClock
from runners import processes_of, wait_until
from test_queue import Desk

import adce

NUMBERS = [str(number) for number in range(1, 32)]
TEXT = f"""
retry: {{max_attempts: 99, initial_delay_seconds: 1, max_delay_seconds: 1}}
sources: {{league: {{base_url: "http://127.0.0.1:9"}}}}
datasets:
  games: {{source: league, key: "games/{{n}}", url: "/{{n}}", partitions: {{values: {{n: {json.dumps(NUMBERS)}}}}}}}
alerts:
"""


class Listener:
    """A web server that keeps what it is told, and may refuse to listen."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                outer.told.append((self.path, body))
                self.send_response(outer.status)
                self.end_headers()

            do_GET = do_POST  # noqa: N815  # as the standard library names them

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/secret-path"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def subjects(self) -> list[str]:
        return [json.loads(body)["text"].splitlines()[0].strip("*") for _, body in self.told if body]


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def alerter(configure, database, clock):
    def make(text: str, base: str = TEXT) -> adce.Alerter:
        configuration = configure(base + text)
        with database.transaction() as sql:
            adce.declare_limits(sql, configuration, clock)
            adce.declare_datasets(sql, configuration)
        return adce.Alerter(configuration, database, adce.Journal(io.StringIO(), clock=clock), clock)

    return make


def go_away(database: adce.Database, clock: ManualClock) -> None:
    """The source has not answered for long."""
    with database.transaction() as sql:
        sql.execute("update scopes set throttles = 5, reason = 'cannot be reached' where scope = 'league'")
        sql.execute("update runner set beat_at = ?", (int(clock.wall()),))


def come_back(database: adce.Database) -> None:
    with database.transaction() as sql:
        sql.execute("update scopes set throttles = 0, reason = null where scope = 'league'")


def note_cycle(sql: sqlite3.Connection, number: int, clock: ManualClock, error: str | None = None) -> None:
    sql.execute(
        """
        insert into reconciliations (cycle_id, started_at, seconds, listed, list_calls, expected, present, missing,
                                     stale, suspect, created, closed, error)
        values (?, ?, 2.5, 0, 7, 10, 10, 0, 0, 0, 0, 0, ?)
        """,
        (number, clock.wall(), error),
    )


def broken_channels(alerter: adce.Alerter) -> dict[str, str]:
    found = adce.conditions(alerter.database, alerter.configuration, alerter.clock.wall(), alerter.clock.wall())
    return {one.about: one.text for one in found if one.name == "channel"}


def live(alerter: adce.Alerter, clock: ManualClock, hours: float, minutes: int = 1) -> None:
    """So many minutes after the others."""
    for _ in range(round(hours * 60 / minutes)):
        clock.advance(60 * minutes)
        alerter.started_at = clock.wall()  # its loop beats
        alerter.work()


def test_outage_of_48_hours_is_told_once_reminded_of_each_day_and_ended_once(
    alerter, database, clock, listener, tmp_path
):
    out = tmp_path / "told"
    script = f"import sys; open({str(out)!r}, 'a').write(sys.argv[-2] + chr(10))"
    at_work = alerter(f"  webhook: {listener.address}\n  command: [{sys.executable}, -c, {json.dumps(script)}]\n")
    live(at_work, clock, 1)
    go_away(database, clock)
    live(at_work, clock, 47.9, minutes=6)
    come_back(database)
    live(at_work, clock, 30, minutes=6)
    expected = [
        "ADCE: source blocked, league",
        "ADCE: still source blocked, league",
        "ADCE: over: source blocked, league",
    ]
    assert listener.subjects() == expected
    assert out.read_text().splitlines() == expected
    assert database.read("select * from open_alerts") == []


def test_source_that_comes_back_for_a_moment_makes_no_new_alert(alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    for _ in range(5):
        go_away(database, clock)
        live(at_work, clock, 0.2)
        come_back(database)
        live(at_work, clock, 0.1)
    assert listener.subjects() == ["ADCE: source blocked, league"]


def test_broken_channel_is_shown_without_its_secret_and_gets_its_messages_later(
    alerter, database, clock, listener, monkeypatch
):
    monkeypatch.setenv("HOOK", listener.address)
    at_work = alerter("  webhook: $HOOK\n  ping: http://127.0.0.1:9/ping-secret\n")
    listener.status = 500
    go_away(database, clock)
    with database.transaction() as sql:
        note_cycle(sql, 1, clock)
    live(at_work, clock, 0.2)
    assert broken_channels(at_work) == {"webhook": "alerts cannot be sent: HTTP 500, 1 wait"}
    assert 'channel=ping error="cannot be reached' in at_work.journal.stream.getvalue()
    everything = "\n".join(database._writer.iterdump()) + at_work.journal.stream.getvalue()
    assert "secret" not in everything
    listener.status = 200
    live(at_work, clock, 3)
    assert set(listener.subjects()) == {"ADCE: source blocked, league"}
    assert broken_channels(at_work) == {}


def test_broken_channel_is_forgotten_when_it_is_no_longer_configured(alerter, database, clock, listener):
    at_work = alerter("  webhook: http://127.0.0.1:9\n")
    go_away(database, clock)
    live(at_work, clock, 0.1)
    assert list(broken_channels(at_work)) == ["webhook"]
    live(alerter(f"  ping: {listener.address}\n"), clock, 0.1)
    assert broken_channels(at_work) == {}


def test_state_survives_a_restart(alerter, database, clock, listener):
    text = f"  webhook: {listener.address}\n"
    go_away(database, clock)
    live(alerter(text), clock, 0.1)
    go_away(database, clock)
    live(alerter(text), clock, 0.1)
    assert listener.subjects() == ["ADCE: source blocked, league"]


def attempt(desk: Desk, outcome: adce.Outcome) -> None:
    """One attempt at the best task, a little later."""
    desk.clock.advance(2)
    desk.end(desk.claim(), outcome)


def note_cycles(desk: Desk, *numbers: int, error: str | None = None) -> None:
    for number in numbers:
        desk.clock.advance(60)
        with desk.database.transaction() as sql:
            note_cycle(sql, number, desk.clock, error)


def pause(desk: Desk, scope: str, reason: str = "") -> None:
    with desk.database.transaction() as sql:
        adce.pause(sql, scope, 1e9, reason, desk.clock.boot())


def be_away_for_a_while(desk: Desk, at_work: adce.Alerter) -> None:
    go_away(desk.database, desk.clock)
    live(at_work, desk.clock, 0.1)
    come_back(desk.database)
    live(at_work, desk.clock, 0.5)


def note_drop(desk: Desk, dropped: int, expected: int) -> None:
    """The last cycle has dropped so many objects, and expects so many."""
    with desk.database.transaction() as sql:
        sql.execute("update reconciliations set dropped = ?, expected = ?", (dropped, expected))


CALM = {
    "it is not final yet": lambda desk, _: [desk.end(desk.claim(), adce.Outcome.NOT_YET) for _ in "12"],
    "its source is paused": lambda desk, _: pause(desk, "league"),
    "all are paused": lambda desk, _: pause(desk, "global"),
    "another was good": lambda desk, _: attempt(desk, adce.Outcome.OK),
    "its source was away until just now": be_away_for_a_while,
    None: lambda *_: None,
}


@pytest.mark.parametrize("why", CALM)
def test_what_waits_for_a_good_reason_is_no_alert(why, alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    desk = Desk(at_work.configuration, database, clock)
    for number in "12":
        desk.expect("games", n=number)
    note_cycles(desk, 1)
    CALM[why](desk, at_work)
    note_cycles(desk, *range(2, 9))
    live(at_work, clock, 0.1)
    assert ("ADCE: nothing collected, lake" in listener.subjects()) == (why is None)


VANISHED = "days: 120 of 150 objects vanished at once"
CAUSES = {
    "store unusable": lambda desk: pause(desk, "global", "store: cannot write x: full"),
    "gave up": lambda desk: attempt(desk, adce.Outcome.INVALID),
    "critical gap": lambda desk: desk.clock.advance(25 * 3600),
    "errors": lambda desk: [attempt(desk, adce.Outcome.INVALID) for _ in range(25)],
    "cycles fail": lambda desk: note_cycles(desk, 9, 10, error="the store is not there"),
    "mass loss": lambda desk: note_cycles(desk, 9, error=VANISHED),
    "mass loss, and nothing else": lambda desk: note_cycles(desk, 9, 10, 11, error=VANISHED),
    "expected objects shrank": lambda desk: note_drop(desk, dropped=101, expected=908),
    "nothing collected": lambda desk: note_cycles(desk, *range(9, 17)),
}
BASES = {
    "gave up": TEXT.replace("max_attempts: 99", "max_attempts: 1"),
    "critical gap": TEXT.replace("{source: league,", "{source: league, priority: CRITICAL,"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_condition_is_noticed(cause, alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n", BASES.get(cause, TEXT))
    desk = Desk(at_work.configuration, database, clock)
    note_cycles(desk, *range(1, 9))
    if "mass loss" not in cause and cause != "cycles fail":
        for number in "12":
            desk.expect("games", n=number)
    live(at_work, clock, 0.1)
    assert listener.subjects() == []
    CAUSES[cause](desk)
    live(at_work, clock, 0.1)
    condition = cause.partition(",")[0]
    assert [subject.partition(",")[0] for subject in listener.subjects()] == [f"ADCE: {condition}"]


@pytest.mark.parametrize(("dropped", "expected"), [(100, 0), (101, 909)])
def test_few_objects_that_are_no_longer_expected_are_no_news(dropped, expected, alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    desk = Desk(at_work.configuration, database, clock)
    note_cycles(desk, 1)
    note_drop(desk, dropped, expected)
    live(at_work, clock, 0.1)
    assert listener.subjects() == []


def test_errors_that_are_over_are_no_news(alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    desk = Desk(at_work.configuration, database, clock)
    desk.expect("games", n="1")
    for _ in range(30):
        attempt(desk, adce.Outcome.INVALID)
    for number in NUMBERS[1:]:  # the first waits meanwhile
        desk.expect("games", n=number)
        desk.end(desk.claim(), adce.Outcome.OK)
    live(at_work, clock, 0.1)
    assert listener.subjects() == []
    attempt(desk, adce.Outcome.INVALID)
    live(at_work, clock, 0.1)
    assert listener.subjects() == ["ADCE: errors, attempts"]


def test_what_cannot_be_noted_is_told_once_all_the_same(alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    go_away(database, clock)
    database._writer.execute("pragma query_only = on")
    live(at_work, clock, 0.1)
    assert listener.subjects() == ["ADCE: source blocked, league"]
    assert database.read("select * from open_alerts") == []
    database._writer.execute("pragma query_only = off")
    live(at_work, clock, 0.1)
    assert len(database.read("select * from open_alerts")) == 1
    come_back(database)
    live(at_work, clock, 0.5)
    assert listener.subjects() == ["ADCE: source blocked, league", "ADCE: over: source blocked, league"]


def test_trouble_that_the_runner_has_with_its_database_is_told(alerter, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    at_work.journal.report_database_error(adce.DatabaseUnavailableError("the disk is full"))
    live(at_work, clock, 0.1)
    assert listener.subjects() == ["ADCE: database unusable, runner"]


def test_full_disk_is_told_by_itself(alerter, database, clock, listener, monkeypatch):
    at_work = alerter(f"  webhook: {listener.address}\n")
    at_work.journal.report_database_error(
        adce.DatabaseUnavailableError("adce.db: database or disk is full (SQLITE_FULL)")
    )
    monkeypatch.setattr(adce, "LEAST_FREE_BYTES", 1 << 60)
    live(at_work, clock, 0.1)
    monkeypatch.undo()
    at_work.journal.report_database_error(None)
    with database.transaction() as sql:
        adce.pause(sql, "global", 60, "store: cannot write days/1.json: No space left on device", clock.boot())
    live(at_work, clock, 0.1)
    assert listener.subjects() == ["ADCE: disk low, database"]


def test_alert_names_every_command_that_helps(alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    problem = "{0}: 120 of 150 objects vanished at once, no gap was opened; if so: reconcile --accept-loss {0}"
    with database.transaction() as sql:
        note_cycle(sql, 1, clock, "; ".join(problem.format(name) for name in ("days", "games", "plays")))
    live(at_work, clock, 0.1)
    assert "--accept-loss plays\nhost" in json.loads(listener.told[0][1])["text"]


def test_channel_that_redirects_has_taken_nothing(alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    listener.status = 302
    go_away(database, clock)
    live(at_work, clock, 0.1)
    assert broken_channels(at_work) == {"webhook": "alerts cannot be sent: HTTP 302, 1 wait"}


@pytest.fixture
def at_aws(aws, monkeypatch) -> None:
    for name, value in aws.environment().items():
        monkeypatch.setenv(name, value)


def test_alert_goes_through_sns_to_a_queue(at_aws, alerter, database, clock):
    sns, sqs = boto3.client("sns"), boto3.client("sqs")
    topic = sns.create_topic(Name="alerts")["TopicArn"]
    queue = sqs.create_queue(QueueName="inbox")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    at_work = alerter(f"  sns_topic: {topic}\n")
    go_away(database, clock)
    live(at_work, clock, 0.2)
    (message,) = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10)["Messages"]
    body: dict[str, Any] = json.loads(message["Body"])
    assert body["Subject"] == "ADCE: source blocked, league"
    assert "cannot be reached" in body["Message"] and "Try: adce.py status" in body["Message"]


def test_figures_of_each_cycle_are_put_once_into_cloudwatch_and_a_good_one_is_pinged(
    at_aws, alerter, database, clock, listener
):
    at_work = alerter(f"  cloudwatch: Lake/ADCE\n  ping: {listener.address}\n")
    for number, error in enumerate((None, "the store is not there", None), 1):
        with database.transaction() as sql:
            note_cycle(sql, number, clock, error)
        live(at_work, clock, 0.1)
    listed = boto3.client("cloudwatch").list_metrics(Namespace="Lake/ADCE")["Metrics"]
    assert {"missing", "present", "cycle", "list_calls"} <= {metric["MetricName"] for metric in listed}
    assert [path for path, _ in listener.told] == ["/secret-path"] * 2
    assert " channel " not in at_work.journal.stream.getvalue()


HURRIED = "import sys, adce; adce.LOOK_SECONDS = 0.1; sys.exit(adce.main(sys.argv[1:]))"
AWAY = """
health_check: {enabled: false}
retry: {max_attempts: 1}
sources: {box: {}}
datasets:
  things: {source: box, key: "things/{n}", command: ["false"], partitions: {values: {n: ["1"]}}}
alerts: {command: [sh, -c, "touch sent; exec sleep 300"]}
"""


def test_hanging_channel_delays_no_stop_and_leaves_no_process(tmp_path):
    (tmp_path / "adce.yaml").write_text(AWAY)
    process = subprocess.Popen(
        [sys.executable, "-c", HURRIED, "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "sent").exists)
    wait_until(lambda: "gave_up" in states(tmp_path))
    process.terminate()
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in said) == (0, False), said
    assert time.monotonic() - began < 15, said  # the channel would hang for 300 s
    wait_until(lambda: not processes_of(tmp_path))


def states(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "adce.db", timeout=10)) as sql:
        return [row[0] for row in sql.execute("select state from queue")]


def test_alert_that_is_over_is_kept_for_the_retention_time(alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    go_away(database, clock)
    live(at_work, clock, 0.1)
    come_back(database)
    ended = clock.wall()
    live(at_work, clock, 1)
    for before, left in ((ended - 3600, 1), (ended + 3600, 0)):
        with database.transaction() as sql:
            adce.forget(sql, before)
        assert database.value("select count(*) from alerts") == left


def test_broken_channel_gets_its_messages_in_order_and_none_that_is_a_day_old(alerter, database, clock, listener):
    at_work = alerter(f"  webhook: {listener.address}\n")
    listener.status = 500
    go_away(database, clock)
    live(at_work, clock, 23, minutes=6)
    tried = len(listener.told)
    assert 20 < tried < 40  # ever more rarely, but each hour
    come_back(database)
    live(at_work, clock, 0.9)
    listener.told.clear()
    listener.status = 200
    live(at_work, clock, 1.2)
    assert listener.subjects() == ["ADCE: over: source blocked, league"]  # its beginning is older than a day
    assert broken_channels(at_work) == {}


def test_channel_that_works_is_not_held_up_by_one_that_does_not(alerter, database, clock, listener, tmp_path):
    out = tmp_path / "sent"
    script = f"import sys; open({str(out)!r}, 'a').write(sys.argv[-2] + chr(10))"
    at_work = alerter(f"  webhook: http://127.0.0.1:9\n  command: [{sys.executable}, -c, {json.dumps(script)}]\n")
    go_away(database, clock)
    live(at_work, clock, 0.1)
    assert out.read_text().splitlines() == ["ADCE: source blocked, league"]
    assert list(broken_channels(at_work)) == ["webhook"]
