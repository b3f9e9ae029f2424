"""The page as a browser shows it: Debian's chromium, and axe-core from npm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from conftest import run_adce
from lakes import league_text, write_league
from runners import rows
from upstream import League

import adce

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs: apt-get install chromium")


@pytest.fixture
def lake(tmp_path, upstream) -> Path:
    League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3).serve(upstream)
    write_league(tmp_path, upstream.address, limits="rate_limiting: {global_limits: {requests_per_minute: 500}}")
    assert run_adce("run", "--once", "-q", folder=tmp_path).returncode == 0
    (tmp_path / "lake" / "days" / "20250102.json").unlink()
    run_adce("reconcile", "-q", folder=tmp_path)
    return tmp_path


@pytest.fixture
def address(lake) -> Iterator[str]:
    configuration = adce.load_configuration(lake / "adce.yaml")
    with contextlib.closing(adce.open_database(lake / "adce.db")) as database:
        object.__setattr__(configuration, "health_check", adce.HealthCheck(enabled=True, port=0))
        server = adce.HealthServer(configuration, database, adce.Clock())
        yield f"http://127.0.0.1:{server.start()}/"
        server.stop()


@needs_chromium
@pytest.mark.battery
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 1120, 1920])
def test_page_is_one_quiet_response_that_fits_its_window(width, scheme, address, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    said: list[str] = []
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{address}?year=2025")
        assert "1 missing of " in tab.title()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if width > 320:  # then the command that helps is seen without scrolling
            assert tab.evaluate("(box => box.scrollWidth <= box.clientWidth)(document.querySelector('.wide'))")
        tab.screenshot(path=os.environ.get("SCREENSHOT", str(tmp_path / "page.png")), full_page=True)
        tab.goto(f"{address}task/days/20250101.json")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert (said, asked) == ([], [f"{address}?year=2025", f"{address}task/days/20250101.json"])


@pytest.fixture(scope="module")
def axe_core(tmp_path_factory) -> str:
    """The script of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm"):
        words = ["npm", "install", "--silent", "--prefix", str(folder), "axe-core@4"]
        subprocess.run(words, check=False, capture_output=True, timeout=100)
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        pytest.skip("needs: npm install axe-core")
    return script.read_text(encoding="utf-8")


@needs_chromium
@pytest.mark.battery
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme, address, axe_core):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme=scheme)
        tab.goto(f"{address}?year=2025")
        tab.evaluate(axe_core)
        found = tab.evaluate("axe.run()")["violations"]
        browser.close()
    assert [(one["id"], one["help"]) for one in found if one["impact"] in ("serious", "critical")] == []


def test_page_says_what_the_tables_hold(lake, address):
    with urllib.request.urlopen(f"{address}?year=2025", timeout=10) as answer:
        text = answer.read().decode()
    ((games,),) = rows(lake, "select count(*) from objects_now where key glob 'games/*' and state = 'present'")
    assert f"games: {games} of {games} in 2025" in text
    assert "days: 5 of 6 in 2025" in text
    assert "<title>Thu 2025-01-02: 0 of 1</title>" in text
    assert text.count('class="all"') >= 5
    ((cycles,),) = rows(lake, "select count(*) from reconciliations")
    assert len(re.findall(r"<tr><td[^>]*> *\d+</td>", text.partition("The last cycles")[2])) == cycles
    assert "days/20250102.json" in text


def test_report_as_html_is_the_page(lake):
    done = run_adce("report", "--format", "html", folder=lake)
    assert "Coverage by day, 2025" in done.stdout
    assert done.stdout.startswith("<!doctype html>")
    assert "href" not in done.stdout  # a file has no server to follow a link to
    assert re.search(r"<title>ADCE: ATTENTION, [\d.]+ %, 1 missing of \d+, ", done.stdout)


def test_each_number_is_the_same_wherever_it_is_told(lake, address):
    """In the views, the report, the metrics and the page."""
    raw = dict(
        rows(lake, "select state, count(*) from objects_now where state not in ('awaited', 'dropped') group by 1")
    )
    ((attempts,),) = rows(lake, "select count(*) from attempts")
    ((cycles,),) = rows(lake, "select count(*) from reconciliations")
    ((open_tasks,),) = rows(lake, "select count(*) from queue")
    ((stored,),) = rows(lake, "select sum(bytes) from attempts")
    expected, present, missing = sum(raw.values()), raw["present"], raw["missing"]

    assert rows(lake, "select sum(expected), sum(present), sum(missing) from coverage") == [
        (expected, present, missing)
    ]
    assert rows(lake, "select count(*) from gaps") == [(open_tasks,)]
    assert rows(lake, "select count(*) from recent_attempts") == rows(lake, "select sum(attempts) from stats")
    assert rows(lake, "select count(*) from cycles") == [(cycles,)]

    report = json.loads(run_adce("report", "--format", "json", folder=lake).stdout)
    for name in ("sources", "coverage"):
        assert sum(row["expected"] for row in report[name]) == expected
        assert sum(row["missing"] for row in report[name]) == missing
    assert (report["total"]["present"], len(report["cycles"])) == (present, cycles)
    assert sum(row["attempts"] for row in report["datasets"]) == attempts
    assert sum(row["attempts"] for row in report["attempts"]) == attempts
    assert sum(row["bytes"] for row in report["datasets"]) == stored
    assert sum(row["objects"] for row in report["reasons"]) == open_tasks
    assert sum(row["pending"] + row["retry"] + row["gave_up"] for row in report["queue"]) == open_tasks

    with urllib.request.urlopen(f"{address}metrics", timeout=10) as answer:
        samples = re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", answer.read().decode(), re.MULTILINE)

    def sample(name: str, label: str = "") -> float:
        return sum(float(value) for one, labels, value in samples if one == name and label in labels)

    assert (sample("adce_objects"), sample("adce_objects", 'state="missing"')) == (expected, missing)
    assert (sample("adce_tasks"), sample("adce_attempts_total")) == (open_tasks, attempts)
    assert (sample("adce_cycles_total"), sample("adce_stored_bytes_total")) == (cycles, stored)

    with urllib.request.urlopen(address, timeout=10) as answer:
        text = re.sub(r"</t[dh]>\s*", "|", answer.read().decode())
    assert f"ADCE: ATTENTION, {present * 10000 // expected / 100} %, {missing} missing of {expected}," in text
    tables = [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row.split("|")] for row in text.split("<tr>")]
    head = next(row for row in tables if row[:3] == ["source", "dataset", "percent"])
    coverage = [
        dict(zip(head, row, strict=True)) for row in tables if row[:1] == ["league"] and row[1] in ("days", "games")
    ]
    assert sum(int(row["expected"]) for row in coverage) == expected
    assert sum(int(row["missing"]) for row in coverage) == missing


def test_small_lines_show_how_figures_went_and_say_it_in_words(lake, address):
    with contextlib.closing(adce.open_database(lake / "adce.db")) as database, database.transaction() as sql:
        for missing in (9, 4):
            columns = "started_at, seconds, expected, missing"
            sql.execute(
                f"insert into reconciliations ({columns}) values (unixepoch() - ?, 1, 20, ?)", (missing, missing)
            )
    text = urllib.request.urlopen(address).read().decode()
    titles = re.findall(r"<figure>.*?<title>(.*?)</title>.*?</figure>", text)
    assert any(re.fullmatch(r"open gaps, 24 hours, .*: from \d+ to 9, now \d", title) for title in titles), titles
    assert text.count("<polyline points=") == len(titles)


DAY_STATES = {
    "01": (["present", "present"], None, 'class="all"', "2 of 2"),
    "02": (["present", "stale"], None, 'class="stale"', "1 of 2, 1 stale"),
    "03": (["present", "missing"], None, 'class="part"', "1 of 2"),
    "04": (["missing", "missing"], None, 'class="gap"', "0 of 2"),
    "05": (["present", "missing"], "gave_up", 'class="gave_up"', "1 of 2, 1 gave up"),
    "06": (["absent"], None, 'class="absent"', "0 of 0, 1 absent"),
}


def test_cell_of_a_day_shows_its_state(configure, database, clock):
    configuration = configure(league_text("http://127.0.0.1:9"))
    insert = """
        insert into objects (dataset_id, key, fields, state, since, proven, day, task, priority, detected_at,
                             gap_size, rank, slope, last_error)
        values ((select dataset_id from datasets where dataset = 'days'), ?, '{}', ?, 0, 1, ?, ?, ?, 0, 1, 0, 0, 'none')
    """
    with database.transaction() as sql:
        adce.declare_limits(sql, configuration, clock)
        adce.declare_datasets(sql, configuration)
        for day, (states, task, *_) in DAY_STATES.items():
            for number, state in enumerate(states):
                has_task = state in adce.GAPS
                values = (f"{day}/{number}", state, f"2025-01-{day}", (task or "pending") if has_task else None)
                sql.execute(insert, (*values, "LOW" if has_task else None))
    text = adce.page(database, configuration, clock.wall(), year=2025)
    for day, (*_, kind, words) in DAY_STATES.items():
        assert re.search(rf"<rect {kind} [^>]*><title>\w+ 2025-01-{day}: {words}</title>", text), day
