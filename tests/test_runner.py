"""The runner fills a lake from a real upstream."""

from __future__ import annotations

import importlib
import io
from datetime import date

import pytest
from lakes import league_text
from upstream import Answer, League, Upstream

import adce


def run_once(
    configuration: adce.Configuration, database: adce.Database, *, level: str = "DEBUG"
) -> tuple[adce.ExitCode, str]:
    """One run to its end, and what it wrote."""
    lines = io.StringIO()
    store = adce.open_store(configuration.store)
    runner = adce.Runner(configuration, database, store, adce.Journal(lines, level))
    return runner.run(once=True, max_seconds=60), lines.getvalue()


def outcomes(database: adce.Database) -> dict[str, int]:
    return {row[0]: row[1] for row in database.read("select outcome, count(*) from attempts group by outcome")}


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
    configuration, league.phase = configure(league_text(upstream.address)), "early"
    assert run_once(configuration, database)[0] == adce.ExitCode.GAPS_LEFT
    assert set(gaps(database).values()) == {"stale"}
    league.phase = "final"
    assert run_once(configuration, database)[0] == adce.ExitCode.DONE
    assert database.value("select count(*) from objects where state = 'present'") == 6 + len(league.ids)


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


def test_run_does_not_wait_for_a_pause(configure, database, upstream, league):
    upstream.answer("/scoreboard?dates=20250106", Answer(b"wait", 429, {"Retry-After": "3000"}))
    code, lines = run_once(
        configure(league_text(upstream.address).replace("max_concurrent_scrapers: 5", "max_concurrent_scrapers: 1")),
        database,
    )
    assert code == adce.ExitCode.GAPS_LEFT
    assert "paused source=league" in lines
    assert 'reason="what is left belongs to paused sources"' in lines
    assert database.value("select blocked_until from rates where scope = 'league'")


def test_each_hop_of_a_redirect_is_counted(configure, database, upstream, league):
    for day in range(1, 7):
        upstream.answer(f"/scoreboard?dates=2025010{day}", Answer(b"", 302, {"Location": f"/moved?dates=2025010{day}"}))
    upstream.route("/moved", lambda _, query: league.scoreboard(query["dates"]))
    code, _ = run_once(configure(league_text(upstream.address)), database)
    assert code == adce.ExitCode.DONE
    assert database.value("select sum(requests) from attempts") == upstream.count() == 12 + len(league.ids)
    assert database.value("select count(*) from requests where finished_at is null") == 0


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
    assert "paused sources" in lines
    assert upstream.count("/moved") == 0
    assert database.value("select count(*) from attempts where outcome = 'running'") == 0


def test_source_that_is_down_is_paused_while_another_goes_on(configure, database, upstream, league):
    text = league_text(upstream.address).replace(
        "datasets:\n",
        "  away: {base_url: 'http://127.0.0.1:9'}\n"
        "datasets:\n"
        "  others:\n"
        "    source: away\n"
        "    key: 'others/{team}.json'\n"
        "    url: '/{team}'\n"
        "    partitions: {values: {team: [A, B, C, D, E, F, G, H]}}\n",
    )
    code, lines = run_once(configure(text), database)
    assert code == adce.ExitCode.GAPS_LEFT
    assert set(gaps(database)) == {f"others/{team}.json" for team in "ABCDEFGH"}
    assert "paused source=away" in lines
    assert "127.0.0.1 cannot be reached: Connection refused" in lines
    assert 2 <= outcomes(database)["unreachable"] <= 6


def test_object_that_is_not_there_yet_is_no_failure(configure, database, upstream, league):
    future = next(iter(league.games[date(2025, 1, 1)]))
    upstream.answer(f"/summary?event={future}", Answer(b'{"code": 404, "message": "no such event"}', 404))
    text = league_text(upstream.address).replace("as: game_id}\n", "as: game_id}\n    priority: HIGH\n")
    run_once(configure(text), database)
    row = database.read("select state, attempts, last_error from queue")[0]
    assert row["state"] == "retry"
    assert row["last_error"].startswith("HTTP 404")


def test_call_that_never_returns_holds_nobody_up(configure, database, upstream, league, tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import threading\nend = threading.Event()\ndef wait(team): end.wait()\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = league_text(upstream.address) + (
        "  calls:\n    source: league\n    key: 'calls/{team}'\n    call: 'endless:wait'\n    timeout_seconds: 0.3\n"
        "    partitions: {values: {team: [A]}}\n    priority: CRITICAL\n"
    )
    code, lines = run_once(configure(text), database)
    importlib.import_module("endless").end.set()
    assert (code, gaps(database)) == (adce.ExitCode.GAPS_LEFT, {"calls/A": "missing"})
    assert "endless:wait did not return within 0.3 s" in lines


def test_store_that_fails_pauses_everything_and_is_told(configure, database, upstream, league, tmp_path):
    class Full(adce.FolderStore):
        def write(self, key: str, body: bytes) -> adce.StoredObject:
            raise adce.StoreError(f"cannot write {key}: No space left on device")

    configuration, lines = configure(league_text(upstream.address)), io.StringIO()
    runner = adce.Runner(configuration, database, Full(tmp_path / "lake"), adce.Journal(lines))
    assert runner.run(once=True, max_seconds=30) == adce.ExitCode.GAPS_LEFT
    assert "paused source=global" in lines.getvalue()
    assert upstream.count() <= 5
    assert database.value("select count(*) from tasks where failures > 0") == 0


def test_run_ends_at_its_time(configure, database, upstream, league):
    for day in range(1, 7):
        upstream.answer(f"/scoreboard?dates=2025010{day}", Answer(b"trouble", 500))
    runner = adce.Runner(
        configure(league_text(upstream.address)),
        database,
        adce.FolderStore(adce.Path("x")),
        adce.Journal(io.StringIO()),
    )
    runner.store = adce.open_store(runner.configuration.store)
    assert runner.run(max_seconds=0.5) == adce.ExitCode.DONE
    assert database.value("select note from runner") == "its time was up"


def test_values_in_a_line_are_quoted_when_they_need_it():
    lines = io.StringIO()
    journal = adce.Journal(lines, "INFO")
    journal.write("WARN", "x", plain="a/b.json", spaced="two words", evil="\x1b[31m\n", number=0.25, none=None)
    journal.write("DEBUG", "hidden")
    text = lines.getvalue()
    assert text.endswith('WARN  x plain=a/b.json spaced="two words" evil="\\u001b[31m\\n" number=0.25\n')
    assert text.count("\n") == 1
