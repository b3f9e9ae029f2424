"""Instants and durations."""

from __future__ import annotations

import datetime
import queue
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adce


@given(st.integers(1, 9999), st.sampled_from("smhd"))
def test_duration_is_read_with_its_unit(number, unit):
    assert adce.parse_duration(f"{number}{unit}") == number * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]


@pytest.mark.parametrize("text", ["", "6", "h", "-1h", "1.5h", "6 weeks", "1h30m"])
def test_anything_else_is_no_duration(text):
    with pytest.raises(ValueError, match="is not a duration"):
        adce.parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (42, "42 s"), (192, "3 min 12 s"), (3600, "1 h"), (352_800, "4 d 2 h"), (86_400 * 7, "7 d")],
)
def test_duration_is_written_in_at_most_two_units(seconds, text):
    assert adce.format_duration(seconds) == text


def test_instant_is_written_in_utc():
    assert adce.utc_text(1_763_900_000.9) == "2025-11-23T12:13:20Z"
    assert adce.utc_text(None) is None
    assert (adce.utc_text(-(2**62)), adce.utc_text(2**62)) == (adce.utc_text(-62135596800), "9999-12-31T23:59:59Z")


@pytest.mark.parametrize(("day", "hours"), [("2025-03-09", 23), ("2025-11-02", 25), ("2025-07-01", 24)])
def test_days_of_a_zone_have_their_true_length(day, hours):
    first = datetime.date.fromisoformat(day)
    zone, midnight = "America/New_York", datetime.time()
    following = first + datetime.timedelta(days=1)
    assert adce.instant_of(following, midnight, zone) - adce.instant_of(first, midnight, zone) == hours * 3600


def test_evening_in_new_york_is_the_next_day_in_utc():
    instant = adce.instant_of(datetime.date(2024, 12, 15), datetime.time(22, 30), "America/New_York")
    assert adce.day_of(instant) == datetime.date(2024, 12, 16)
    assert adce.day_of(instant, "America/New_York") == datetime.date(2024, 12, 15)


def test_waiting_ends_at_once_when_somebody_wakes():
    wakeups: queue.SimpleQueue[str] = queue.SimpleQueue()
    wakeups.put("now")
    wakeups.put("again")
    started = time.monotonic()
    adce.Clock().wait(wakeups, 30)
    assert time.monotonic() - started < 20
    assert wakeups.empty()


def test_boot_time_is_shared_and_does_not_go_back():
    clock = adce.Clock()
    first, second = clock.boot(), clock.boot()
    assert first <= second
    assert len(clock.boot_id()) > 10


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> adce.Clock:
    """A clock on a system that has neither CLOCK_BOOTTIME nor /proc."""
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    monkeypatch.setattr(adce, "PROC", tmp_path / "no proc")
    return adce.Clock()


def test_boot_time_without_the_clock_of_linux_goes_on_and_is_that_of_all_processes(elsewhere):
    first = elsewhere.boot()
    words = [sys.executable, "-c", "import time; print(time.monotonic())"]
    other = float(subprocess.run(words, capture_output=True, check=True).stdout)
    assert first <= other <= elsewhere.boot()


def test_boot_without_a_name_has_the_same_one_whatever_the_wall_clock_says(elsewhere, monkeypatch):
    before = elsewhere.boot_id()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert elsewhere.boot_id() == before
