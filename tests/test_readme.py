"""The guide tells the truth: what it names exists, and what exists is named."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import adce

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = (ROOT / "adce.yaml").read_text(encoding="utf-8")


def test_every_key_that_the_guide_names_exists():
    paths = adce.all_settings()
    names = {name for path in paths for name in path.split(".")} | {"_minute", "_hour", "_day"}
    tables = re.findall(
        r"^\| (?:key|freshness|validate|partitions|pages)\b[^\n]*\n\| ---.*\n((?:\|.*\n)+)", README, re.MULTILINE
    )
    cells = [row.partition(" | ")[0] for table in tables for row in table.splitlines()]
    named = [word for cell in cells for code in re.findall(r"`([^`]+)`", cell) for word in re.findall(r"^\w+", code)]
    assert len(tables) == 9
    assert [name for name in named if name not in names] == []
    dotted = re.findall(r"`(\w+\.\w+)`", README)
    assert [path for path in dotted if path.partition(".")[0] in paths and path not in paths] == []


def test_every_key_has_a_kind_and_a_meaning():
    texts = [adce.explain(path).splitlines() for path in adce.all_settings()]
    assert len(texts) > 100
    assert [lines for lines in texts if len(lines) % 3 or not all(line.strip() for line in lines)] == []


def test_keys_of_the_shipped_configuration_can_be_explained():
    keys = set(re.findall(r"(?:^|[{,]) *([a-z_]+):(?= |$)", re.sub(r"#.*|\"[^\"]*\"", "", SHIPPED), re.MULTILINE))
    known = {name for path in adce.all_settings() for name in path.split(".")}
    sources = set(adce.load_configuration(ROOT / "adce.yaml").sources)
    datasets = set(adce.load_configuration(ROOT / "adce.yaml").datasets)
    assert keys - known - sources - datasets == {"measure", "month"}  # names of fields


LAKES = re.findall(r"^\*\*([\w ]+)\*\*[^\n]*\n\n```yaml\n(.+?)```", README, re.DOTALL | re.MULTILINE)
URLS = {
    "GH Archive": ["https://data.gharchive.org/2026-11-01-5.json.gz"],
    "EDGAR": [
        "https://www.sec.gov/Archives/edgar/daily-index/2026/QTR4/index.json",
        "https://www.sec.gov/Archives/edgar/daily-index/2026/QTR4/form.20261102.idx",
        "https://www.sec.gov/Archives/edgar/data/1001/a-26-1.txt",
    ],
    "arXiv": [
        "https://oaipmh.arxiv.org/oai?verb=ListRecords&metadataPrefix=arXivRaw&from=2026-11-01&until=2026-11-01",
        "https://oaipmh.arxiv.org/oai?verb=GetRecord&metadataPrefix=oai_dc&identifier=oai:arXiv.org:hep-th/9901001",
    ],
    "OpenAQ": [
        "https://api.openaq.org/v3/locations?iso=IS&limit=100&page=1",
        "https://api.openaq.org/v3/sensors/7/days?date_from=2026-11-01&date_to=2026-12-01&limit=100",
    ],
    "Binance": [
        "https://data.binance.vision/data/spot/daily/klines/BTCUSDT/1h/BTCUSDT-1h-2026-11-01.zip.CHECKSUM",
        "https://data.binance.vision/data/spot/daily/klines/BTCUSDT/1h/BTCUSDT-1h-2026-11-01.zip",
    ],
    "GitHub": ["https://api.github.com/repos/sqlite/sqlite/issues?state=all&per_page=100"],
    "Earthquakes": [
        "https://earthquake.usgs.gov/fdsnws/event/1/query?format=geojson&starttime=2026-11-01&endtime=2026-11-02",
        "https://earthquake.usgs.gov/fdsnws/event/1/query?eventid=us7&format=geojson",
    ],
    "Two leagues": [
        "https://statsapi.mlb.com/api/v1/schedule?sportId=1&date=2026-11-01",
        "https://statsapi.mlb.com/api/v1.1/game/7/feed/live",
        "https://site.api.espn.com/apis/site/v2/sports/basketball/nba/scoreboard?dates=20261101",
    ],
}
VALUES = {
    "date": "2026-11-01",
    "page": "1",
    "next": "",
    "season": "2026",
    "symbol": "BTCUSDT",
    "sensor": "7",
    "game": "7",
    "path": "data/1001/a-26-1.txt",
    "event": "us7",
    "id": "hep-th/9901001",
    "repository": "sqlite/sqlite",
}
FILES = {"EDGAR": "form.20261102.idx", "Binance": "BTCUSDT-1h-2026-11-01.zip"}


@pytest.mark.parametrize(("name", "text"), LAKES, ids=[name for name, _ in LAKES])
def test_small_lakes_of_the_guide_are_whole_and_ask_for_what_they_should(name, text, configure):
    configuration = configure(text)
    fields = {**VALUES, "file": FILES.get(name, "")}
    if name == "GH Archive":
        fields["date"] = "2026-11-01T05:00"
    datasets = configuration.datasets.values()
    asked = [adce.url_of(configuration.sources[one.source], one, fields) for one in datasets]
    assert asked == URLS[name]
    assert text.count("\n") <= 25
    assert {one.source for one in datasets} <= configuration.rate_limiting.scopes.keys()


def test_old_scraper_of_the_guide_fits_into_the_shipped_file(configure):
    found = re.search(r"```yaml\n(  box_scores_of_old:.+?)```", README, re.DOTALL)
    assert found
    assert configure(SHIPPED + found[1]).datasets["box_scores_of_old"].command


def test_there_are_eight_small_lakes():
    assert [name for name, _ in LAKES] == list(URLS)


def test_every_command_view_and_exit_code_is_in_the_guide():
    missing = [command for command in adce.commands() if f"`{command}" not in README]
    views = re.findall(r"create view (\w+)", adce.VIEWS)
    missing += [view for view in views if f"| `{view}` |" not in README]
    missing += [str(code.value) for code in adce.ExitCode if f"| {code.value} |" not in README]
    assert missing == []


def test_every_option_of_a_command_is_in_the_guide():
    names = [name for command in adce.commands().values() for names, _ in command.options for name in names]
    assert [name for name in names if name.startswith("--") and name not in README] == []


def test_commands_of_the_guide_are_accepted():
    parser = adce.build_parser()
    for line in re.findall(r"^    (?:\.venv/bin/python )?adce\.py (.+?)(?:  +#.*)?$", README, re.MULTILINE):
        assert parser.parse_args(shlex.split(line)).command


def test_configuration_of_the_guide_is_accepted(configure):
    text = re.search(r"```yaml\n(.+?)```", README, re.DOTALL)
    assert text
    assert list(configure(text[1]).datasets) == ["days", "orders"]


def test_map_of_the_guide_names_rooms_and_tests_that_exist():
    rooms = {
        room.strip()
        for line in re.findall(r"^ {4}(\w[\w ]+?)  +\w", adce.__doc__ or "", re.MULTILINE)
        for room in [line]
    }
    for row in re.findall(r"^\| [^|]+ \| ([^|]+) \| (`test_[^|]+) \|$", README, re.MULTILINE):
        for room in row[0].split(", "):
            assert any(name.startswith(room.strip()) for name in rooms), room
        for test in re.findall(r"test_\w+\.py", row[1]):
            assert (ROOT / "tests" / test).exists(), test


@pytest.mark.timeout(120)
def test_demo_fills_its_lake_and_breaks_no_limit(tmp_path):
    words = [sys.executable, str(ROOT / "tests/demo.py"), "--days", "12", "--keep", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "counted 0 beyond its limits" in done.stdout
    assert re.search(r"^present +(\d+)\nexpected +\1$", done.stdout, re.MULTILINE)
    shown = re.search(r"^```\n(COMPLETE .+?)```", README, re.DOTALL | re.MULTILINE)
    assert shown
    printed = [line.split() for line in done.stdout.splitlines()]
    for title, head in re.findall(r"^(\w.+)\n(\w.+)\n---", shown[1], re.MULTILINE):
        assert [title.split(), head.split()] in [printed[n : n + 2] for n in range(len(printed))], title
