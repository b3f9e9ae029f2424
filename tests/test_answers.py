"""The meaning of an answer for its object, its task and its source, and bodies that are larger than memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_adce, start_adce
from runners import read_object, rows, stopped, wait_until, write_box
from upstream import Answer, Upstream

import adce

NUMBERS = ", ".join(f'"{number:03}"' for number in range(60))
OF_BOX = "select {} from rates where scope = 'box'"


def write_blocking(folder: Path, upstream: Upstream, more: str = "") -> None:
    """Sixty objects of a source that may forbid some."""
    retry = "retry: {max_attempts: 3, initial_delay_seconds: 0.1}"
    write_box(folder, address=upstream.address, names=NUMBERS, more=retry)
    text = (folder / "adce.yaml").read_text()
    (folder / "adce.yaml").write_text(text.replace("timeout_seconds: 60", f"blocked_when: {{status: [403]}}{more}"))


def test_forbidden_object_between_good_answers_does_not_stop_its_source(upstream, tmp_path):
    for number in range(60):
        upstream.answer(f"/{number:03}", Answer(b"not this one", 403) if number % 10 == 5 else Answer(b"{}"))
    write_blocking(tmp_path, upstream)
    process = start_adce("run", folder=tmp_path)
    wait_until(lambda: rows(tmp_path, "select state, count(*) from queue group by state") == [("gave_up", 6)])
    process.terminate()
    stopped(process)
    assert rows(tmp_path, "select present from coverage") == [(54,)]
    assert rows(tmp_path, "select outcome, count(*) from attempts group by outcome") == [("blocked", 18), ("ok", 54)]
    assert rows(tmp_path, OF_BOX.format("blocked_until")) == [(None,)]


def test_source_that_forbids_two_objects_in_a_row_is_paused(upstream, tmp_path):
    for number in range(60):
        upstream.answer(f"/{number:03}", Answer(b"Access Denied", 403))
    write_blocking(tmp_path, upstream, ", max_concurrent: 1")
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
    assert upstream.count() == 2
    assert rows(tmp_path, OF_BOX.format("why")) == [("paused: HTTP 403: Access Denied",)]
    assert rows(tmp_path, "select sum(failures) from objects") == [(1,)]


@pytest.mark.parametrize("header", ["0", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_retry_after_that_names_no_future_instant_does_not_shorten_the_pause(upstream, tmp_path, header):
    upstream.answer("/A", Answer(b"slow down", 429, {"Retry-After": header}))
    write_box(tmp_path, address=upstream.address)
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
    ((left,),) = rows(tmp_path, OF_BOX.format("unixepoch(blocked_until) - unixepoch()"))
    assert 30 < left <= adce.FIRST_PAUSE_SECONDS


def test_unchanged_object_is_fresh_again_and_its_bytes_stay(upstream, tmp_path):
    validators = {"ETag": '"1"', "Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
    upstream.answer("/A", Answer(b"first", headers=validators), Answer(b"", 304))
    write_box(tmp_path, address=upstream.address, way='url: "/{name}", freshness: {refetch_every: 1s}')
    run_adce("run", "--once", folder=tmp_path)
    place = tmp_path / "lake/things/A"
    stored_at = place.stat().st_mtime_ns
    wait_until(lambda: rows(tmp_path, "select 1 from objects where modified_at < unixepoch() - 1"))
    run_adce("run", "--once", folder=tmp_path)
    asked = upstream.arrivals[-1].headers
    assert (asked["If-None-Match"], asked["If-Modified-Since"]) == ('"1"', "Wed, 21 Oct 2026 07:28:00 GMT")
    assert rows(tmp_path, "select outcome, http_status from recent_attempts limit 1") == [("ok", 304)]
    assert (place.read_bytes(), place.stat().st_mtime_ns) == (b"first", stored_at)
    assert rows(tmp_path, "select modified_at >= unixepoch() - 20, state from objects") == [(1, "present")]


def test_object_that_another_program_has_changed_is_asked_for_without_conditions(upstream, tmp_path):
    upstream.answer("/A", Answer(b"first", headers={"ETag": '"1"'}), Answer(b"second"))
    write_box(tmp_path, address=upstream.address, way='url: "/{name}", freshness: {refetch_every: 1s}')
    run_adce("run", "--once", folder=tmp_path)
    (tmp_path / "lake/things/A").write_bytes(b"changed")
    os.utime(tmp_path / "lake/things/A", (0, 0))
    run_adce("run", "--once", folder=tmp_path)
    assert "If-None-Match" not in upstream.arrivals[-1].headers
    assert (tmp_path / "lake/things/A").read_bytes() == b"second"


def test_cookies_of_a_redirect_go_with_the_next_hop(upstream, tmp_path):
    upstream.answer("/A", Answer(b"", 302, {"Location": "/A", "Set-Cookie": "seen=1; Path=/"}), Answer(b"whole"))
    write_box(tmp_path, address=upstream.address)
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.DONE
    assert [arrival.headers.get("Cookie") for arrival in upstream.arrivals] == [None, "seen=1"]


PEAK = """
import pathlib, re, sys
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of the process that has made this one is no part of it
sys.path.insert(0, sys.argv[1])
import adce
adce.main(["run", "--once", "-q"])
print(int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) >> 10)
"""


@pytest.mark.parametrize("address", ["lake", "s3://lake/large"])
def test_large_objects_are_streamed_and_stored_as_sent(upstream, tmp_path, request, address):
    body = os.urandom(1 << 20) * 50
    for name in "ABCD":
        upstream.answer(f"/{name}", Answer(body))
    ends = f"starts_with_hex: '{body[:4].hex()}', ends_with_hex: '{body[-4:].hex()}'"
    rules = f"validate: {{{ends}, not_contains: [no such text]}}"
    write_box(tmp_path, address=upstream.address, way=f'url: "/{{name}}", {rules}', names="A, B, C, D", store=address)
    environment = request.getfixturevalue("aws").environment() if "://" in address else {}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(ROOT)],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert int(done.stdout) < (160 if environment else 90), done.stderr  # MB; the bodies have 200
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        store = adce.open_store(address if environment else str(tmp_path / address))
        assert all(read_object(store, f"things/{name}") == body for name in "ABCD")


SHARED = """
sources: {{box: {{base_url: "{address}"}}}}
datasets:
  plays: {{source: box, key: "plays/{{n}}.json", url: "/game/{{n}}", partitions: {{values: {{n: [A, B]}}}}}}
  boxes:
    source: box
    key: "boxes/{{n}}.json"
    url: "/game/{{n}}"
    partitions: {{same_as: plays}}
    validate: {{contains: [players]}}
  teams: {{source: box, key: "teams/{{n}}.json", url: "/game/{{n}}", partitions: {{same_as: plays}}}}
"""


def test_one_response_brings_the_objects_of_all_datasets_with_its_url(upstream, tmp_path):
    upstream.answer("/game/A", Answer(b'{"players": 10}'))
    upstream.answer("/game/B", Answer(b"{}"))
    (tmp_path / "adce.yaml").write_text(SHARED.format(address=upstream.address))
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
    assert upstream.count() == 2
    ended = rows(tmp_path, "select dataset, outcome, count(*) from recent_attempts group by 1, 2 order by 1, 2")
    assert ended == [("boxes", "invalid", 1), ("boxes", "ok", 1), ("plays", "ok", 2), ("teams", "ok", 2)]
    assert rows(tmp_path, "select sum(requests) from attempts") == [(2,)]
    stored = {path.name: path.read_bytes() for path in (tmp_path / "lake/teams").iterdir()}
    assert stored == {"A.json": b'{"players": 10}', "B.json": b"{}"}


def test_object_whose_url_is_shared_is_asked_for_alone_when_the_others_are_there(upstream, tmp_path):
    upstream.answer("/game/A", Answer(b'{"players": 10}'))
    upstream.answer("/game/B", Answer(b'{"players": 11}'))
    (tmp_path / "adce.yaml").write_text(SHARED.format(address=upstream.address))
    run_adce("run", "--once", folder=tmp_path)
    (tmp_path / "lake/boxes/A.json").unlink()
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.DONE
    assert upstream.count() == 3
    assert rows(tmp_path, "select dataset from recent_attempts limit 1") == [("boxes",)]


HOLES = """
max_concurrent_scrapers: 1
sources: {{box: {{base_url: "{address}"}}}}
datasets:
  days:
    source: box
    key: "{{date}}"
    url: "/{{date}}"
    partitions: {{dates: {{from: 2024-01-01, to: 2024-01-04}}}}
    absent_after: 7d
    at_least: 5
    except: {{date: ["2024-01-02"]}}
"""


def states(folder: Path) -> dict[str, str]:
    return dict(rows(folder, "select key, state from objects_now"))


def test_step_that_goes_on_is_never_absent(upstream, tmp_path):
    text = HOLES.format(address=upstream.address).replace('except: {date: ["2024-01-02"]}', "max_concurrent: 1")
    text = text.replace("to: 2024-01-04", "to: today, every: year")
    (tmp_path / "adce.yaml").write_text(text)
    upstream.answer("/2024-01-01", Answer(b"first"))
    for _ in range(2):
        run_adce("run", "--once", folder=tmp_path)
    year = f"{adce.day_of(time.time()).year}-01-01"
    found = states(tmp_path)
    assert found.pop(year) == "missing"
    assert found.pop("2024-01-01") == "present"
    assert set(found.values()) <= {"absent"}


def test_old_object_that_the_source_has_not_is_absent_once_others_are_there(upstream, tmp_path):
    (tmp_path / "adce.yaml").write_text(HOLES.format(address=upstream.address))
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
    assert set(states(tmp_path).values()) == {"missing"}  # its url may be wrong
    upstream.answer("/2024-01-01", Answer(b"first"))
    assert run_adce("retry", "--dataset", "days", "--yes", folder=tmp_path).returncode == adce.ExitCode.DONE
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.DONE
    assert states(tmp_path) == {"2024-01-01": "present", "2024-01-03": "absent", "2024-01-04": "absent"}
    assert rows(tmp_path, "select expected, percent, absent from coverage") == [(1, 100.0, 2)]
    before = upstream.count()
    run_adce("run", "--once", folder=tmp_path)
    assert upstream.count() == before
    ((number,),) = rows(tmp_path, "select task_id from objects_now where key = '2024-01-03'")
    assert run_adce("retry", str(number), folder=tmp_path).returncode == adce.ExitCode.DONE
    upstream.answer("/2024-01-03", Answer(b"late"))
    run_adce("run", "--once", folder=tmp_path)
    assert states(tmp_path)["2024-01-03"] == "present"
    assert "1 object is expected" not in run_adce("status", folder=tmp_path).stdout
    assert "2 objects are expected, fewer than the 5 of at_least" in run_adce("status", folder=tmp_path).stdout


def test_id_that_makes_no_key_ends_every_single_run_with_the_same_code(upstream, tmp_path):
    upstream.answer("/list", Answer(b'{"ids": [" ", "one"]}'))
    upstream.answer("/one", Answer(b"{}"))
    (tmp_path / "adce.yaml").write_text(
        f"sources: {{box: {{base_url: '{upstream.address}'}}}}\n"
        "datasets:\n"
        "  list: {source: box, key: list, url: /list, partitions: {values: {}}}\n"
        "  each: {source: box, key: 'each/{id}', url: '/{id}', partitions: {from: list, ids: ids, as: id}}\n"
    )
    codes = [run_adce("run", "--once", folder=tmp_path).returncode for _ in range(2)]
    assert codes == [adce.ExitCode.ERROR] * 2
    assert (tmp_path / "lake/each/one").read_bytes() == b"{}"
