"""The runner fills a lake from a real upstream."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import queue
import random
import re
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from datetime import date

import pytest
from lakes import league_text
from runners import wait_until, write_box
from upstream import Answer, League, Upstream, json_answer

import adce


def make_runner(configuration: adce.Configuration, database: adce.Database) -> tuple[adce.Runner, io.StringIO]:
    lines = io.StringIO()
    journal = adce.Journal(lines, "DEBUG")
    return adce.Runner(configuration, database, adce.open_store(configuration.store), journal), lines


def run_once(configuration: adce.Configuration, database: adce.Database) -> tuple[adce.ExitCode, str]:
    """One run to its end, and what it wrote."""
    runner, lines = make_runner(configuration, database)
    return runner.run(once=True, max_seconds=60), lines.getvalue()


def outcomes(database: adce.Database) -> dict[str, int]:
    return {row[0]: row[1] for row in database.read("select outcome, count(*) from attempts group by outcome")}


ANOTHER_SOURCE = """\
  other: {{base_url: '{address}', max_concurrent: {workers}}}
datasets:
  others:
    source: other
    key: 'others/{{team}}.json'
    {runner}
    partitions: {{values: {{team: [A, B, C, D, E, F, G, H]}}}}
    priority: CRITICAL
"""


def with_another_source(text: str, address: str, runner: str = "url: '/other?team={team}'", workers: int = 5) -> str:
    """The league, and a source with eight objects that matter more."""
    return text.replace("datasets:\n", ANOTHER_SOURCE.format(address=address, runner=runner, workers=workers))


def gaps(database: adce.Database) -> dict[str, str]:
    return {row["key"]: row["kind"] for row in database.read("select * from gaps")}


@pytest.fixture
def league(upstream) -> League:
    league = League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3)
    league.serve(upstream)
    return league


def test_lake_is_filled_with_days_and_the_games_they_name(configure, database, upstream, league, tmp_path):
    code, _ = run_once(configure(league_text(upstream.address)), database)
    assert code == adce.ExitCode.DONE
    files = {path.relative_to(tmp_path / "lake").as_posix() for path in (tmp_path / "lake").rglob("*.json")}
    assert files == {f"days/2025010{day}.json" for day in range(1, 7)} | {f"games/{game}.json" for game in league.ids}
    assert upstream.count() == len(files)


def test_settled_lake_makes_no_request(configure, database, upstream, league):
    configuration = configure(league_text(upstream.address))
    run_once(configuration, database)
    before = upstream.count()
    assert run_once(configuration, database)[0] == adce.ExitCode.DONE
    assert upstream.count() == before


def test_days_that_are_not_final_stay_stale_and_the_next_run_collects_their_games(
    configure, database, upstream, league
):
    text = league_text(upstream.address).replace("refetch_every: 6h", "refetch_every: 1s")
    configuration, league.phase = configure(text), "early"
    assert run_once(configuration, database)[0] == adce.ExitCode.GAPS_LEFT
    assert set(gaps(database).values()) == {"stale"}
    league.phase = "final"
    wait_until(lambda: not database.value("select count(*) from objects where next_at > unixepoch()"))
    assert run_once(configuration, database)[0] == adce.ExitCode.DONE
    assert database.value("select sum(present) from coverage") == 6 + len(league.ids)


def test_failing_object_is_attempted_once_in_a_run_and_left_open(configure, database, upstream, league):
    upstream.answer("/scoreboard?dates=20250102", Answer(b"trouble", 500))
    code, lines = run_once(configure(league_text(upstream.address)), database)
    assert code == adce.ExitCode.GAPS_LEFT
    assert upstream.count("/scoreboard?dates=20250102") == 1
    assert gaps(database) == {"days/20250102.json": "missing"}
    assert (
        'WARN  retry dataset=days key=days/20250102.json outcome=http_error failures=1/5 error="HTTP 500: trouble"'
        in lines
    )


def test_run_waits_for_windows_and_breaks_none(configure, database):
    limits = "rate_limiting: {source_limits: {league: {requests_per_second: 8, burst_size: 8}}}"
    with Upstream(limits=[(8, 1.0)], latency_seconds=(0.0, 0.05)) as upstream:
        League(date(2025, 1, 1), 6, games_per_day=(3, 3)).serve(upstream)
        code, _ = run_once(configure(league_text(upstream.address, limits=limits)), database)
        assert (code, upstream.count(), upstream.violations) == (adce.ExitCode.DONE, 24, 0)


def test_faults_redirects_and_two_sources_together_break_no_global_limit(configure, database):
    limits = "rate_limiting: {global_limits: {requests_per_second: 20}}"
    with Upstream(limits=[(20, 1.0)], latency_seconds=(0.0, 0.1), fault_share=0.2, seed=7) as upstream:
        League(date(2025, 1, 1), 6, games_per_day=(3, 3)).serve(upstream)
        upstream.route("/other", lambda _, query: Answer(b"", 302, {"Location": f"/end?team={query['team']}"}))
        upstream.route("/end", lambda _, query: json_answer(query))
        run_once(
            configure(with_another_source(league_text(upstream.address, limits=limits), upstream.address)), database
        )
        assert upstream.count() > 25
        assert (upstream.violations, database.value("select sum(requests) from attempts")) == (0, upstream.count())


def test_run_does_not_wait_for_a_pause(configure, database, upstream, league):
    upstream.answer("/scoreboard?dates=20250106", Answer(b"wait", 429, {"Retry-After": "3000"}))
    code, lines = run_once(
        configure(league_text(upstream.address).replace("max_concurrent_scrapers: 5", "max_concurrent_scrapers: 1")),
        database,
    )
    assert code == adce.ExitCode.GAPS_LEFT
    assert "paused source=league" in lines
    assert 'reason="the remaining sources are paused"' in lines
    assert database.value("select blocked_until from rates where scope = 'league'")


def test_each_hop_of_a_redirect_is_counted(configure, database, upstream, league):
    for day in range(1, 7):
        upstream.answer(f"/scoreboard?dates=2025010{day}", Answer(b"", 302, {"Location": f"/moved?dates=2025010{day}"}))
    upstream.route("/moved", lambda _, query: league.scoreboard(query["dates"]))
    code, _ = run_once(configure(league_text(upstream.address)), database)
    assert code == adce.ExitCode.DONE
    assert database.value("select sum(requests) from attempts") == upstream.count() == 12 + len(league.ids)
    assert database.value("select count(*) from requests") == 0


def test_redirect_to_the_host_of_another_source_counts_in_its_limits(configure, database, upstream, league):
    with Upstream(limits=[(4, 1.0)]) as files:
        files.route("/other", lambda _, query: json_answer(query))
        files.route("/moved", lambda _, query: league.scoreboard(query["dates"]))
        for day in range(1, 7):
            target = f"{files.address}/moved?dates=2025010{day}"
            upstream.answer(f"/scoreboard?dates=2025010{day}", Answer(b"", 302, {"Location": target}))
        limits = "rate_limiting: {source_limits: {other: {requests_per_second: 4}}}"
        text = with_another_source(league_text(upstream.address, limits=limits), files.address)
        code, _ = run_once(configure(text), database)
        assert (code, files.count(), files.violations) == (adce.ExitCode.DONE, 14, 0)


def test_redirect_that_another_source_refuses_pauses_that_one(configure, database, upstream, league):
    with Upstream() as files:
        files.route("/other", lambda _, query: json_answer(query))
        files.answer("/moved", Answer(b"wait", 429, {"Retry-After": "3000"}))
        upstream.answer("/scoreboard?dates=20250106", Answer(b"", 302, {"Location": f"{files.address}/moved"}))
        run_once(configure(with_another_source(league_text(upstream.address), files.address)), database)
        assert [row["scope"] for row in database.read("select scope from rates where blocked_until > ''")] == ["other"]
        assert files.count("/moved") == 1


def test_redirects_for_ever_end_as_an_error(configure, database, upstream, league):
    upstream.answer("/scoreboard?dates=20250101", Answer(b"", 302, {"Location": "/scoreboard?dates=20250101"}))
    run_once(configure(league_text(upstream.address)), database)
    assert outcomes(database)["http_error"] == 1
    assert upstream.count("/scoreboard?dates=20250101") == adce.MAX_REDIRECTS + 1


def test_redirect_of_a_paused_source_does_not_keep_a_run_from_ending(configure, database, upstream, league):
    upstream.answer("/scoreboard?dates=20250101", Answer(b"", 302, {"Location": "/moved"}, delay_seconds=0.3))
    for day in range(2, 7):
        upstream.answer(f"/scoreboard?dates=2025010{day}", Answer(b"wait", 429, {"Retry-After": "3000"}))
    code, lines = run_once(configure(league_text(upstream.address)), database)
    assert code == adce.ExitCode.GAPS_LEFT
    assert "sources are paused" in lines
    assert upstream.count("/moved") == 0
    assert database.value("select count(*) from attempts where outcome = 'running'") == 0


def test_redirect_that_waits_for_a_window_leaves_the_workers_to_another_source(configure, database, upstream, league):
    limits = "rate_limiting: {source_limits: {other: {requests_per_minute: 5}}}"
    upstream.route("/other", lambda _, query: Answer(b"", 302, {"Location": "/end"}))
    text = with_another_source(league_text(upstream.address, limits=limits), upstream.address)
    runner, _ = make_runner(configure(text), database)
    upstream.route("/summary", once_all_are_asked(league, lambda: runner.stop("the games are here")))
    runner.run(once=True, max_seconds=60)
    assert database.value("select note from runner") == "the games are here"
    assert set(gaps(database)) == {f"others/{team}.json" for team in "ABCDEFGH"}
    assert upstream.count() == 5 + 6 + len(league.ids)


def test_source_that_is_down_is_paused_while_another_goes_on(configure, database, upstream, league):
    code, lines = run_once(
        configure(with_another_source(league_text(upstream.address), "http://127.0.0.1:9")), database
    )
    assert code == adce.ExitCode.GAPS_LEFT
    assert set(gaps(database)) == {f"others/{team}.json" for team in "ABCDEFGH"}
    assert "paused source=other" in lines
    assert "127.0.0.1 cannot be reached: Connection refused" in lines
    assert 2 <= outcomes(database)["unreachable"] <= 6


def test_source_that_hangs_holds_no_more_workers_than_it_may(configure, database, upstream, league):
    freed = threading.Event()

    def hang(_: str, query: dict[str, str]) -> Answer:
        return json_answer(query) if freed.wait(20) else Answer(b"the games never came", 500)

    upstream.route("/other", hang)
    upstream.route("/summary", once_all_are_asked(league, freed.set))
    code, _ = run_once(
        configure(with_another_source(league_text(upstream.address), upstream.address, workers=2)), database
    )
    assert code == adce.ExitCode.DONE
    assert outcomes(database) == {"ok": 8 + 6 + len(league.ids)}


def once_all_are_asked(league: League, act: Callable[[], None]) -> Callable[[str, dict[str, str]], Answer]:
    """The league's summaries; something is done when the last of them is asked for."""
    asked: set[str] = set()

    def summary(_: str, query: dict[str, str]) -> Answer:
        asked.add(query["event"])
        if asked == league.ids:
            act()
        return league.summary(query["event"])

    return summary


def test_object_that_is_not_there_yet_is_no_failure(configure, database, upstream, league):
    future = next(iter(league.games[date(2025, 1, 1)]))
    upstream.answer(f"/summary?event={future}", Answer(b'{"code": 404, "message": "no such event"}', 404))
    text = league_text(upstream.address).replace("as: game_id}\n", "as: game_id}\n    priority: HIGH\n")
    run_once(configure(text), database)
    row = database.read("select state, attempts, last_error from queue")[0]
    assert row["state"] == "retry"
    assert row["last_error"].startswith("HTTP 404")


def test_call_that_never_returns_holds_nobody_up(configure, database, upstream, league, tmp_path):
    (tmp_path / "endless.py").write_text("import threading\ndef wait(team): threading.Event().wait()\n")
    text = league_text(upstream.address) + (
        "  calls:\n    source: league\n    key: 'calls/{team}'\n    call: 'endless:wait'\n    timeout_seconds: 0.3\n"
        "    partitions: {values: {team: [A]}}\n    priority: CRITICAL\n"
    )
    code, lines = run_once(configure(text), database)
    assert (code, gaps(database)) == (adce.ExitCode.GAPS_LEFT, {"calls/A": "missing"})
    assert "left no calls/A (timed out)" in lines


def test_store_that_fails_pauses_everything_and_is_told(configure, database, upstream, league, tmp_path):
    def unmount(query: dict[str, str]) -> Answer:
        with contextlib.suppress(OSError):  # only the first does it
            (tmp_path / "lake").rename(tmp_path / "away")
        return league.scoreboard(query["dates"])

    upstream.route("/scoreboard", lambda _, query: unmount(query))
    code, lines = run_once(configure(league_text(upstream.address)), database)
    assert (code, upstream.count() <= 5) == (adce.ExitCode.GAPS_LEFT, True)
    assert re.search(r'paused source=global until=\S+ reason="store: the store \S+ is not there: it', lines), lines
    assert database.value("select count(*) from objects where failures > 0") == 0
    assert database.value("select blocked_until from rates where scope = 'global'")


def test_source_whose_functions_never_return_holds_its_own_workers_only(
    configure, database, upstream, league, tmp_path
):
    (tmp_path / "stuck.py").write_text("import threading\ndef wait(team): threading.Event().wait()\n")
    runner = "call: stuck:wait\n    timeout_seconds: 0.2"
    text = with_another_source(league_text(upstream.address), upstream.address, runner, workers=2)
    code, _ = run_once(configure(text), database)
    assert code == adce.ExitCode.GAPS_LEFT
    assert outcomes(database) == {"ok": 6 + len(league.ids), "timeout": 4}


BATCH = """\
store: lake
sources: {box: {}}
datasets:
  others:
    source: box
    key: 'others/{kind}-{team}.json'
    command:
        - sh
        - -c
        - |
          echo {teams} >> calls
          mkdir -p lake/others
          for team in $(echo {teams} | tr , ' '); do echo 1 > lake/others/{kind}-$team.json; done
    batch: {group_by: kind, max: 50}
    partitions: {values: {team: [A, B, C], kind: [x, y]}}
"""


def test_one_command_closes_the_gaps_of_a_batch(configure, database, tmp_path):
    code, _ = run_once(configure(BATCH), database)
    assert code == adce.ExitCode.DONE
    assert sorted((tmp_path / "calls").read_text().split()) == ["A,B,C", "A,B,C"]
    assert len(list((tmp_path / "lake" / "others").iterdir())) == 6


TEAMS = """\
max_concurrent_scrapers: 1
sources: {{league: {{base_url: '{address}'}}}}
datasets:
  teams: {{source: league, key: 'teams/{{team}}', {way}, partitions: {{values: {{team: [A, B, C]}}}}}}
"""


def test_each_object_is_asked_for_by_its_own_fields_and_kept_under_its_own_key(configure, database, upstream, tmp_path):
    upstream.route("/team", lambda _, query: Answer(f"team {query['name']}".encode()))
    code, _ = run_once(configure(TEAMS.format(address=upstream.address, way="url: '/team?name={team}'")), database)
    assert (code, upstream.count()) == (adce.ExitCode.DONE, 3)
    found = {place.name: place.read_text() for place in (tmp_path / "lake/teams").iterdir()}
    assert found == {team: f"team {team}" for team in "ABC"}


def test_object_that_somebody_else_wrote_since_the_cycle_is_not_asked_for(configure, database, upstream, tmp_path):
    def fill(*_: object) -> Answer:
        for team in "ABC":
            (tmp_path / "lake/teams").mkdir(exist_ok=True)
            (tmp_path / "lake/teams" / team).write_text("written by another")
        return Answer(b"asked for")

    upstream.route("/team", fill)
    code, _ = run_once(configure(TEAMS.format(address=upstream.address, way="url: '/team?name={team}'")), database)
    assert (code, upstream.count()) == (adce.ExitCode.DONE, 1)
    assert outcomes(database) == {"ok": 3}


def test_program_is_told_its_task_and_its_object(configure, database, tmp_path):
    script = 'mkdir -p lake/teams; echo "$ADCE_SOURCE $ADCE_TASK $ADCE_CONFIG $ADCE_DB" > lake/teams/{team}'
    way = f"command: [/bin/sh, -c, '{script}']"
    code, _ = run_once(configure(TEAMS.format(address="http://localhost", way=way)), database)
    assert code == adce.ExitCode.DONE
    told = {place.name: place.read_text().split() for place in (tmp_path / "lake/teams").iterdir()}
    tasks = {row["key"]: str(row["task_id"]) for row in database.read("select key, task_id from recent_attempts")}
    paths = [str(tmp_path / "adce.yaml"), str(tmp_path / "adce.db")]
    assert told == {team: ["league", tasks[f"teams/{team}"], *paths] for team in "ABC"}


def test_program_that_leaves_a_stale_object_as_it_was_has_not_fetched_it(configure, database, tmp_path):
    (tmp_path / "lake/teams").mkdir(parents=True)
    for team in "ABC":
        (tmp_path / "lake/teams" / team).write_text("old")
        os.utime(tmp_path / "lake/teams" / team, (1_700_000_000,) * 2)
    way = "command: [/bin/sh, -c, '[ {team} = A ] || touch lake/teams/{team}'], freshness: {refetch_every: 1h}"
    assert (
        run_once(configure(TEAMS.format(address="http://localhost", way=way)), database)[0] == adce.ExitCode.GAPS_LEFT
    )
    assert gaps(database) == {"teams/A": "stale"}
    errors = [row["error"] for row in database.read("select error from recent_attempts where error is not null")]
    assert errors == ["left teams/A as it was (exit 0): empty"]


def test_object_whose_refetch_is_due_does_not_wait_for_the_next_cycle(configure, database, upstream):
    def team(*_: object) -> Answer:
        if upstream.count("/team?name=A") > 2:
            runner.stop("it was fetched again, and again")
        return Answer(b"a team")

    upstream.route("/team", team)
    way = "url: '/team?name={team}', freshness: {refetch_every: 1s}"
    runner, _ = make_runner(configure(TEAMS.format(address=upstream.address, way=way)), database)
    assert runner.run(max_seconds=60) == adce.ExitCode.DONE
    assert upstream.count("/team?name=A") > 2
    assert database.value("select count(*) from cycles") == 1


DAYS = """\
sources: {{league: {{base_url: '{address}'}}}}
datasets:
  days:
    source: league
    key: 'days/{{date}}'
    url: '/{{date}}'
    partitions: {{dates: {{from: {first}, to: 2025-01-03}}}}
  games:
    source: league
    key: 'games/{{game}}'
    url: '/games/{{game}}?day={{date}}'
    partitions: {{from: days, ids: games, as: game}}
"""


@pytest.mark.parametrize("others_are_lost", [False, True])
def test_game_whose_first_day_is_no_longer_expected_is_asked_for_by_the_next_that_names_it(
    others_are_lost, configure, database, upstream, tmp_path
):
    """Also when that has vanished, and cannot be fetched: it names what it named."""
    for day in (1, 2):
        upstream.answer(f"/games/7?day=2025-01-0{day}", Answer(b"no", 400))
    (tmp_path / "lake/days").mkdir(parents=True)
    for day in (1, 2, 3):
        (tmp_path / f"lake/days/2025-01-0{day}").write_text('{"games": ["7"]}')
    for day in (1, 2):
        run_once(configure(DAYS.format(address=upstream.address, first=f"2025-01-0{day}")), database)
        games = [arrival.path for arrival in upstream.arrivals if arrival.path.startswith("/games")]
        assert (len(games), games[-1]) == (day, f"/games/7?day=2025-01-0{day}")
        for place in (tmp_path / "lake/days").iterdir() if others_are_lost else ():
            place.unlink()


def damage(value: object, dice: random.Random) -> object:
    """A document some parts of which are of another kind, or gone."""
    if dice.random() < 0.1:
        return dice.choice([None, True, 0, -1, 2**70, 1e300, "", "\ud800", "..", "a/b", [], {}, [[]]])
    if isinstance(value, dict):
        return {name: damage(part, dice) for name, part in value.items() if dice.random() > 0.03}
    return [damage(part, dice) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(10))
def test_damaged_answers_stop_nothing(seed, configure, database, upstream, league):
    dice = random.Random(seed)

    def damaged(answer: Answer) -> Answer:
        return json_answer(damage(json.loads(answer.body), dice))

    upstream.route("/scoreboard", lambda _, query: damaged(league.scoreboard(query["dates"])))
    upstream.route("/summary", lambda _, query: damaged(league.summary(query["event"])))
    _, lines = run_once(configure(league_text(upstream.address)), database)
    assert 'stop reason="every task was attempted"' in lines
    assert set(outcomes(database)) <= {"ok", "invalid", "not_yet", "http_error"}


def test_id_that_makes_no_key_is_told_when_its_parent_is_fetched(configure, database, upstream, league):
    def with_a_bad_id(answer: Answer) -> Answer:
        document = json.loads(answer.body)
        for event in document["events"][:1]:
            event["id"] = "x" * 400
        return json_answer(document)

    upstream.route("/scoreboard", lambda _, query: with_a_bad_id(league.scoreboard(query["dates"])))
    _, lines = run_once(configure(league_text(upstream.address)), database)
    assert re.search(r'WARN  children problem="days/\d+.json: .*too long', lines), lines


def test_run_whose_cycle_had_trouble_fails(configure, database, upstream, league, tmp_path):
    """It does not know what is missing, so nothing that it says of that can be relied on."""
    configuration = configure(league_text(upstream.address))
    assert run_once(configuration, database)[0] == adce.ExitCode.DONE
    for place in (tmp_path / "lake").glob("games/*"):
        place.unlink()
    code, lines = run_once(configuration, database)
    assert "vanished at once" in lines
    assert code == adce.ExitCode.ERROR


def test_store_that_is_no_longer_mounted_is_not_filled_anew(configure, database, upstream, league, tmp_path):
    configuration = configure(league_text(upstream.address))
    run_once(configuration, database)
    (tmp_path / "lake").rename(tmp_path / "disk")
    (tmp_path / "lake").mkdir()
    asked = upstream.count()
    with pytest.raises(adce.StoreError, match="is not there") as caught:
        run_once(configuration, database)
    assert (upstream.count(), list((tmp_path / "lake").iterdir())) == (asked, [])
    assert caught.value.exit_code == adce.ExitCode.STORE_UNUSABLE
    (tmp_path / "lake").rmdir()
    (tmp_path / "disk").rename(tmp_path / "lake")
    assert run_once(configuration, database)[0] == adce.ExitCode.DONE


def test_locked_database_is_shown_and_outlasted_and_no_answer_is_lost(
    configure, database, upstream, league, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    meddler = sqlite3.connect(tmp_path / "adce.db", isolation_level=None)
    configuration, shown = configure(league_text(upstream.address)), io.StringIO()
    runner, lines = make_runner(configuration, database)
    runner.journal.screen = adce.LiveScreen(shown, database, configuration)

    class Clock(adce.Clock):
        """Locks the database when something was asked, until that has been noticed."""

        def wait(self, wakeups: queue.SimpleQueue[str], seconds: float, *_: object) -> None:
            is_noticed = re.search(r"  x runner.*: .*database is locked \(SQLITE_BUSY\)", shown.getvalue())
            if meddler.in_transaction and is_noticed:
                meddler.rollback()
            elif upstream.count() and not is_noticed and not meddler.in_transaction:
                meddler.execute("begin immediate")
            super().wait(wakeups, min(seconds, 0.05))

    database.shorten_waits()
    runner.clock = Clock()
    upstream.route("/summary", once_all_are_asked(league, lambda: runner.stop("the games are here")))
    assert runner.run(max_seconds=60) == adce.ExitCode.DONE
    assert 'stop reason="the games are here"' in lines.getvalue()
    assert (gaps(database), outcomes(database)) == ({}, {"ok": upstream.count()})
    meddler.close()


def test_runner_whose_database_was_moved_away_ends_and_says_so(configure, upstream, league, tmp_path):
    database = adce.open_database(tmp_path / "other.db")
    (tmp_path / "other.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(adce.NoDatabaseError, match="moved, replaced or deleted while in use"):
        run_once(configure(league_text(upstream.address)), database)
    assert upstream.count() <= 5
    database.close()


def test_run_ends_at_its_time(configure, database, upstream, league):
    for day in range(1, 7):
        upstream.answer(f"/scoreboard?dates=2025010{day}", Answer(b"trouble", 500))
    runner, _ = make_runner(configure(league_text(upstream.address)), database)
    assert runner.run(max_seconds=0.5) == adce.ExitCode.DONE
    assert database.value("select note from runner") == "--max-minutes reached"


def test_values_in_a_line_are_quoted_when_they_need_it():
    lines = io.StringIO()
    journal = adce.Journal(lines, "INFO")
    journal.write("WARN", "x", plain="a/b.json", spaced="two words", evil="\x1b[31m\n", number=0.25, none=None)
    journal.write("DEBUG", "hidden")
    text = lines.getvalue()
    assert text.endswith('WARN  x plain=a/b.json spaced="two words" evil="\\u001b[31m\\n" number=0.25\n')
    assert text.count("\n") == 1


class AtOnce(Executor):
    """Does each execution when it is submitted, so that every turn of the loop finds all workers finished."""

    def submit(self, function, /, *arguments, **options):
        future: Future = Future()
        future.set_result(function(*arguments, **options))
        return future


def test_claim_and_finish_are_a_few_statements_and_pages_in_one_transaction_a_turn(tmp_path, upstream, monkeypatch):
    """What SQLite does for a task, in a turn that records five and claims five. Its triggers repeat the statement."""
    count, names = 100, [f"n{number}" for number in range(100)]
    for name in names:
        upstream.answer(f"/{name}", Answer(b"x"))
    limits = """
rate_limiting:
  global_limits: {requests_per_minute: 100000, requests_per_hour: 5000000}
  source_limits: {box: {requests_per_minute: 100000, requests_per_hour: 3000000, burst_size: 1000}}
  backoff: {threshold_percent: 80}
"""
    write_box(tmp_path, address=upstream.address, names=", ".join(names), more=limits)
    configuration = adce.load_configuration(tmp_path / "adce.yaml")
    with contextlib.closing(adce.open_database(configuration.database)) as database:
        runner = adce.Runner(configuration, database, adce.open_store(configuration.store), adce.Journal(io.StringIO()))
        runner.pool = AtOnce()
        database._writer.execute("pragma wal_autocheckpoint = 0")
        log, statements, sizes = tmp_path / "adce.db-wal", list[str](), list[int]()
        write = runner.journal.write

        def begin(level: str, event: str, **facts: object) -> None:
            if event == "cycle":
                sizes.append(log.stat().st_size)
                database._writer.set_trace_callback(statements.append)
            write(level, event, **facts)

        monkeypatch.setattr(runner.journal, "write", begin)
        assert runner.run(once=True) == adce.ExitCode.DONE
        database._writer.set_trace_callback(None)
        frames = (log.stat().st_size - sizes[0]) / (24 + database.value("pragma page_size"))
    own = [one for before, one in itertools.pairwise(["", *statements]) if one != before]
    assert len(own) / count <= 16
    assert frames / count <= 10


AGING = """
sources: {{box: {{base_url: "{address}"}}}}
retry: {{initial_delay_seconds: 3600}}
datasets:
  final:
    source: box
    key: "{{n}}.json"
    url: "/{{n}}"
    partitions: {{values: {{n: [waits, fails, absent]}}}}
    freshness: {{until: done, refetch_every: 6h}}
"""


def test_single_run_tries_what_has_failed_and_not_what_waits_for_its_time(configure, database, upstream):
    upstream.answer("/waits", json_answer({"done": False}))
    upstream.answer("/fails", Answer(b"no", 400))
    configuration = configure(AGING.format(address=upstream.address))
    for _ in range(3):
        assert run_once(configuration, database)[0] == adce.ExitCode.GAPS_LEFT
    assert [upstream.count(f"/{name}") for name in ("waits", "fails", "absent")] == [1, 3, 1]


@pytest.mark.parametrize(("max_wait", "asked"), [(60, 3), (2, 1)])
def test_single_run_waits_for_short_pauses(configure, database, upstream, max_wait, asked):
    for name in ("waits", "fails", "absent"):
        upstream.answer(f"/{name}", json_answer({"done": True}))
    upstream.answer("/absent", Answer(b"slow down", 429, {"Retry-After": "3"}))  # the first of them
    configuration = configure(AGING.format(address=upstream.address).replace('"}}', '", max_concurrent: 1}}', 1))
    runner = adce.Runner(configuration, database, adce.open_store(configuration.store), adce.Journal(io.StringIO()))
    assert runner.run(once=True, max_wait=max_wait, max_seconds=30) == adce.ExitCode.GAPS_LEFT
    assert upstream.count() == asked
