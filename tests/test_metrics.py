"""What Prometheus, its rules and Grafana make of the figures."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from datetime import date
from pathlib import Path

import pytest
from conftest import run_adce
from lakes import write_league
from runners import command_line, wait_until
from s3_server import free_ports
from upstream import League

import adce

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="needs: apt-get install prometheus"
)


@pytest.fixture
def lake(tmp_path, upstream) -> Path:
    League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3).serve(upstream)
    write_league(tmp_path, upstream.address)
    assert run_adce("run", "--once", "-q", folder=tmp_path).returncode == 0
    return tmp_path


@needs_prometheus
@pytest.mark.battery
def test_promtool_finds_nothing_to_say_of_the_metrics(lake):
    with contextlib.closing(adce.open_database(lake / "adce.db")) as database:
        text = adce.metrics_text(database)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_prometheus
@pytest.mark.battery
def test_promtool_accepts_the_rules(lake):
    done = run_adce("example", "alerts", folder=lake)
    (lake / "rules.yml").write_text(done.stdout)
    told = subprocess.run(
        ["promtool", "check", "rules", lake / "rules.yml"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert "6 rules found" in told.stdout


# a source that refuses is paused for 15 minutes, asked once, and paused again
BLOCKED = """
rule_files: [rules.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'up{{job="adce", instance="a"}}', values: '1x120'}}
      - series: 'adce_paused_until_timestamp_seconds{{job="adce", instance="a", scope="{scope}"}}'
        values: '{values}'
    alert_rule_test:
      - {{eval_time: 20m, alertname: ADCESourceIsPaused}}
      - eval_time: 100m
        alertname: ADCESourceIsPaused
        exp_alerts: {alerts}
"""


@needs_prometheus
@pytest.mark.battery
@pytest.mark.parametrize("scope", ["espn", "nba_api", "basketball_reference", "hoopr"])
@pytest.mark.parametrize("is_blocked", [True, False])
def test_promtool_sees_the_alert_of_a_source_that_is_blocked_for_an_hour(scope, is_blocked, lake):
    (lake / "rules.yml").write_text(run_adce("example", "alerts", folder=lake).stdout)
    values = " ".join(["5x14", "_"] * 8) if is_blocked else " ".join(["5x14", "_x60"] * 2)
    labels = f"{{job: adce, instance: a, scope: {scope}}}"
    fired = f"[{{exp_labels: {labels}, exp_annotations: {{summary: {scope} has been paused for an hour}}}}]"
    text = BLOCKED.format(scope=scope, values=values, alerts=fired if is_blocked else "[]")
    (lake / "test.yml").write_text(text)
    told = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=lake, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_rules_and_panels_ask_for_metrics_that_exist(lake):
    rules = run_adce("example", "alerts", folder=lake).stdout
    dashboard = json.loads(run_adce("example", "grafana", folder=lake).stdout)
    names = {one.name for one in adce.METRICS}
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert all(any(name in expression for name in names) for expression in asked)
    assert names == {name for name in names if any(name in expression for expression in asked)}
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in dashboard["panels"])
    assert {
        word for word in rules.replace("(", " ").replace("{", " ").replace("[", " ").split() if word[:5] == "adce_"
    } <= names
    assert "__inputs" not in dashboard
    assert [(one["name"], one["type"]) for one in dashboard["templating"]["list"]] == [("datasource", "datasource")]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"${datasource}"}


@needs_prometheus
@pytest.mark.battery
def test_prometheus_scrapes_the_runner(lake, upstream):
    port, own = free_ports(2)
    text = (lake / "adce.yaml").read_text()
    (lake / "adce.yaml").write_text(f"health_check: {{enabled: true, port: {port}}}\n{text}")
    (lake / "prometheus.yml").write_text(
        "scrape_configs: [{job_name: adce, scrape_interval: 1s, scrape_timeout: 1s, "
        f"static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address=127.0.0.1:{own}"]

    def value(expression: str) -> str | None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            address = f"http://127.0.0.1:{own}/api/v1/query?query={expression}"
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.loads(answer.read())["data"]["result"][0]["value"][1]
        return None

    quiet = {"cwd": lake, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(words, **quiet) for words in (command_line("-q", "run"), command)]
    try:
        wait_until(lambda: value("up") == "1", 40)
        wait_until(lambda: value("sum(adce_objects)") is not None, 20)
        days_and_games = len(list((lake / "lake").glob("*/*")))
        assert value("sum(adce_objects)") == str(days_and_games)
        assert float(value("adce_runner_last_beat_timestamp_seconds") or 0) > time.time() - 60
    finally:
        for process in processes:
            process.terminate()
            process.wait(30)
