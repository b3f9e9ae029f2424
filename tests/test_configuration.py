"""adce.yaml: what may stand in it, and what is said when it is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import date, time
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT, run_adce

import adce

BASE = """\
sources:
  espn: {base_url: "https://example.org"}
datasets:
  days:
    source: espn
    key: "days/{date}.json"
    url: "/days/{date}"
    partitions: {dates: {from: 2024-01-01}}
"""
CHILD = """\
  games:
    source: espn
    key: "games/{game_id}.json"
    url: "/games/{game_id}"
    partitions: {from: days, ids: "ids", as: game_id}
"""
SEASONS = 'seasons: [{label: "2023-24", end: 2024, start: 2023-10-24, finish: 2024-06-17}]\n'
FOUR_BLOCKS = """\
max_concurrent_scrapers: 5
reconciliation_interval_minutes: 15
priority_weighting:
  enabled: true
  base_scores: {CRITICAL: 1000, HIGH: 100, MEDIUM: 10, LOW: 1}
  age_weight: 0.5
  source_multipliers: {espn: 1.5, nba_api: 1.3, basketball_reference: 1.2, hoopr: 1.1}
  gap_size_weight: -0.1
  max_gap_size_penalty: 10
  success_rate_weight: 20
rate_limiting:
  enabled: true
  global_limits: {requests_per_minute: 100, requests_per_hour: 5000}
  source_limits:
    espn: {requests_per_minute: 60, requests_per_hour: 3000, burst_size: 10}
    nba_api: {requests_per_minute: 30, requests_per_hour: 1000, burst_size: 5}
    basketball_reference: {requests_per_minute: 20, requests_per_hour: 500, burst_size: 3, min_delay_seconds: 3}
    hoopr: {requests_per_minute: 40, requests_per_hour: 2000, burst_size: 8}
  backoff: {threshold_percent: 80, initial_delay_seconds: 1, max_delay_seconds: 30, exponential_factor: 2}
"""


def edited(old: str, new: str) -> str:
    assert old in BASE
    return BASE.replace(old, new)


COMMAND = edited('url: "/days/{date}"', 'command: [fetch, "{date}"]')
CALL = edited('url: "/days/{date}"', "call: module:function")
OF_SEASONS = SEASONS + COMMAND.replace("{from: 2024-01-01}", "{seasons: all}")

# case: (text, the problem lines that must be told, all of them, in order)
BROKEN = {
    "unknown key with a near miss": (
        "databse: x.db\n" + BASE,
        ['1:1: databse: unknown key, did you mean "database"?'],
    ),
    "unknown key": ("colour: red\n" + BASE, ["1:1: colour: unknown key"]),
    "duplicate key": (
        "store: a\nstore: b\n" + BASE,
        ["2:1: store: duplicate key, first set at line 1"],
    ),
    "two datasets of one name": (
        BASE + "  days: {source: espn}\n",
        ["9:3: datasets.days: duplicate key, first set at line 5"],
    ),
    "text for a number": (
        "max_concurrent_scrapers: five\n" + BASE,
        ["1:26: max_concurrent_scrapers: expected a whole number of 1 or more, found 'five' (text)"],
    ),
    "a list for a mapping": ("retry: [5]\n" + BASE, ["1:8: retry: expected a mapping, found a list"]),
    "nothing for a number": (
        "queue_check_seconds:\n" + BASE,
        ["1:21: queue_check_seconds: expected a number above 0, found nothing"],
    ),
    "a limit of zero": (
        "rate_limiting: {source_limits: {espn: {requests_per_minute: 0}}}\n" + BASE,
        [
            "1:61: rate_limiting.source_limits.espn.requests_per_minute: expected a whole number of 1 or more, found '0' (a number)"
        ],
    ),
    "half a request": (
        "rate_limiting: {global_limits: {requests_per_hour: 1.5}}\n" + BASE,
        [
            "1:52: rate_limiting.global_limits.requests_per_hour: expected a whole number of 1 or more, found '1.5' (a number)"
        ],
    ),
    "a bucket that nothing refills": (
        "rate_limiting: {source_limits: {espn: {burst_size: 5}}}\n" + BASE,
        ["1:39: rate_limiting.source_limits.espn: burst_size needs a limit such as requests_per_minute to refill it"],
    ),
    "a limit for a misspelt source": (
        "rate_limiting: {source_limits: {epsn: {requests_per_minute: 5}}}\n" + BASE,
        ['1:39: rate_limiting.source_limits.epsn: source "epsn" is not defined, did you mean "espn"?'],
    ),
    "a number that is too long": (
        "max_concurrent_scrapers: " + "9" * 400 + "\n" + BASE,
        [f"1:26: max_concurrent_scrapers: expected a whole number of 1 or more, found '{'9' * 400}' (a number)"],
    ),
    "a pool that is no scheduler": (
        "pool: http://h:8786\n" + BASE,
        ["1:7: pool: expected tcp://HOST:PORT or tls://HOST:PORT, found 'http://h:8786' (text)"],
    ),
    "a program in a pool whose requests are limited": (
        "pool: tcp://h:8786\nrate_limiting: {source_limits: {espn: {requests_per_minute: 5}}}\n" + CALL,
        [
            "9:11: datasets.days.call: source espn has limits, and a worker of `pool` gives no permits: name a source without limits"
        ],
    ),
    "a percentage above 100": (
        "rate_limiting: {backoff: {threshold_percent: 180}}\n" + BASE,
        ["1:46: rate_limiting.backoff.threshold_percent: expected a number from 0 to 100, found '180' (a number)"],
    ),
    "as often as possible": (
        BASE + "    freshness: {refetch_every: 0s}\n",
        [
            "9:32: datasets.days.freshness.refetch_every: expected a duration like 90s, 15m, 6h or 1d (or never), "
            "found '0s' (text)"
        ],
    ),
    "never as often": (
        BASE + "    freshness: {live: {while: a, every: never}}\n",
        ["9:41: datasets.days.freshness.live.every: expected a duration like 90s, 15m, 6h or 1d, found 'never' (text)"],
    ),
    "a url that prints": (
        BASE + "    output: stdout\n",
        ['9:13: datasets.days.output: has no effect without "command"'],
    ),
    "alternatives to require": (
        BASE + "    validate: {alternatives: [a]}\n",
        ["9:16: datasets.days.validate.alternatives: unknown key; remove it: combine conditions of require with ||"],
    ),
    "a port that is none": (
        "health_check: {port: 70000}\n" + BASE,
        ["1:22: health_check.port: expected a port from 0 to 65535, found '70000' (a number)"],
    ),
    "yes for a number of seconds": (
        "grace_seconds: yes\n" + BASE,
        ["1:16: grace_seconds: expected a number, found 'yes' (yes or no)"],
    ),
    "undefined source": (
        edited("source: espn", "source: epsn"),
        ['5:13: datasets.days.source: source "epsn" is not defined, did you mean "espn"?'],
    ),
    "a number beyond every use": (
        "retention_days: 1000000000001\n" + BASE,
        ["1:17: retention_days: 1000000000001 is beyond 1,000,000,000,000"],
    ),
    "a dot in a name": (
        edited("  days:\n", "  league.days:\n"),
        ["5:5: datasets.league.days: a name with a dot; write _ in its place"],
    ),
    "undefined parent": (
        BASE + CHILD.replace("from: days", "from: dayz"),
        ['13:24: datasets.games.partitions.from: dataset "dayz" is not defined, did you mean "days"?'],
    ),
    "undefined same_as": (
        BASE + CHILD.replace('{from: days, ids: "ids", as: game_id}', "{same_as: nobody}"),
        ['13:27: datasets.games.partitions.same_as: dataset "nobody" is not defined'],
    ),
    "a dataset below itself": (
        edited("{dates: {from: 2024-01-01}}", '{from: games, ids: "x", as: date}') + CHILD,
        [
            "8:24: datasets.days.partitions.from: cycle: days -> games -> days",
            "13:24: datasets.games.partitions.from: cycle: games -> days -> games",
        ],
    ),
    "the same as each other": (
        edited("{dates: {from: 2024-01-01}}", "{same_as: games}")
        + CHILD.replace('{from: days, ids: "ids", as: game_id}', "{same_as: days}"),
        [
            "8:27: datasets.days.partitions.same_as: cycle: days -> games -> days",
            "13:27: datasets.games.partitions.same_as: cycle: games -> days -> games",
        ],
    ),
    "bad JMESPath": (
        BASE + CHILD.replace('"ids"', '"events[?"'),
        ["13:35: datasets.games.partitions.ids: not a JMESPath expression at its character 9: events[?"],
    ),
    "bad regular expression": (
        BASE + CHILD.replace('ids: "ids"', 'regex: "(a"'),
        [
            "13:37: datasets.games.partitions.regex: "
            "not a regular expression: missing ), unterminated subpattern at position 0"
        ],
    ),
    "regular expression without a group": (
        BASE + CHILD.replace('ids: "ids"', 'regex: "a"'),
        ["13:37: datasets.games.partitions.regex: needs one group ( ) for the id, or named ones, has 0"],
    ),
    "undeclared field in a url": (
        edited('url: "/days/{date}"', 'url: "/days/{game_id}"'),
        ['7:10: datasets.days.url: no field "game_id" (there are: date)'],
    ),
    "undeclared field in an expression": (
        BASE + CHILD + """    validate: {require: ["id == '{gameid}'"]}\n""",
        [
            '14:26: datasets.games.validate.require.0: no field "gameid", did you mean "game_id"? '
            "(there are: date, game_id)"
        ],
    ),
    "format of a field that is no date": (
        BASE + CHILD.replace("/games/{game_id}", "/games/{game_id:%Y}"),
        [
            "12:10: datasets.games.url: {game_id:%Y}: a date takes a format like %Y%m%d, a number one like 010 (at least ten digits)"
        ],
    ),
    "form of a url in a key": (
        BASE + CHILD.replace("games/{game_id}.json", "games/{game_id:url}"),
        [
            "11:10: datasets.games.key: {game_id:url}: a date takes a format like %Y%m%d, a number one like 010 (at least ten digits)"
        ],
    ),
    "attribute access in a template": (
        edited("/days/{date}", "/days/{date.__class__}"),
        [
            "7:10: datasets.days.url: /days/{date.__class__}: a brace that is no {field}; a field is a name in small letters"
        ],
    ),
    "dates that end before they start": (
        edited("{from: 2024-01-01}", "{from: 2024-01-02, to: 2024-01-01}"),
        ["8:48: datasets.days.partitions.dates.to: 2024-01-01 is before from: 2024-01-02"],
    ),
    "a day that does not exist": (
        edited("2024-01-01", "2024-02-30"),
        [
            "8:32: datasets.days.partitions.dates.from: 2024-02-30 is not a calendar date",
        ],
    ),
    "a season that ends before it starts": (
        'seasons: [{label: "a", end: 2024, start: 2024-05-01, finish: 2024-04-01}]\n' + BASE,
        ["1:62: seasons.0.finish: 2024-04-01 is before its start 2024-05-01"],
    ),
    "seasons that are not declared": (
        edited("{dates: {from: 2024-01-01}}", "{dates: {seasons: all}}"),
        ['8:35: datasets.days.partitions.dates.seasons: season "all" is not declared'],
    ),
    "two datasets with the same key": (
        BASE + CHILD.replace("games/{game_id}.json", "days/{game_id}.json"),
        ['11:10: datasets.games.key: the same keys as dataset "days": two datasets cannot share objects'],
    ),
    "a key that does not tell its objects apart": (
        edited("days/{date}.json", "days/today.json"),
        ["6:10: datasets.days.key: does not name {date}: its objects would overwrite one another"],
    ),
    "a date format that loses the day": (
        edited("days/{date}.json", "days/{date:%Y-%m}.json"),
        ["6:10: datasets.days.key: its date format gives different days the same key"],
    ),
    "a key that climbs out": (
        edited("days/{date}.json", "../{date}.json"),
        ["6:10: datasets.days.key: ../{date}.json: a key has no empty, . or .. parts and does not start or end with /"],
    ),
    "a date format that leads out of the store": (
        edited("days/{date}.json", "{date:../%Y%m%d}.json"),
        [
            "6:10: datasets.days.key: {date:../%Y%m%d}.json: a key has no empty, . or .. parts and does not start or "
            "end with /"
        ],
    ),
    "YAML reads no as false": (
        edited("source: espn", "source: no"),
        ['5:13: datasets.days.source: no is read as false; write "no"'],
    ),
    "true is no name": (
        edited("{dates: {from: 2024-01-01}}", "{dates: {seasons: true}}"),
        ["8:35: datasets.days.partitions.dates.seasons: expected text, found 'true' (yes or no)"],
    ),
    "YAML reads 12:30 as 750": (
        BASE + "    available_after: 12:30\n",
        ['9:22: datasets.days.available_after: 12:30 is read as 750; write "12:30"'],
    ),
    "YAML reads 010 as 8": (
        "max_concurrent_scrapers: 010\n" + BASE,
        ["1:26: max_concurrent_scrapers: expected a whole number of 1 or more, found '010' (a number)"],
    ),
    "unquoted ids": (
        edited("{dates: {from: 2024-01-01}}", "{values: {date: [0022300001]}}"),
        ['8:34: datasets.days.partitions.values.date.0: 0022300001 is read as 4816897; write "0022300001"'],
    ),
    "no runner": (
        edited('    url: "/days/{date}"\n', ""),
        ["5:5: datasets.days: needs exactly one of url, command, call and copy_of, has none"],
    ),
    "two runners": (
        BASE + "    call: module:function\n",
        ["5:5: datasets.days: needs exactly one of url, command, call and copy_of, has url and call"],
    ),
    "a field of two kinds of partitions": (
        edited("{dates: {from: 2024-01-01}}", "{dates: {from: 2024-01-01}, values: {date: [a]}}"),
        ["8:17: datasets.days.partitions: the field date is set twice"],
    ),
    "a season set twice": (
        SEASONS + edited("{dates: {from: 2024-01-01}}", "{dates: {seasons: all}, seasons: all}"),
        ["9:17: datasets.days.partitions: the field season is set twice"],
    ),
    "no partitions": (
        edited("{dates: {from: 2024-01-01}}", "{}"),
        ["8:17: datasets.days.partitions: needs one or more of dates, seasons, values, from and same_as"],
    ),
    "a form of seasons": (
        SEASONS
        + edited("{dates: {from: 2024-01-01}}", "{dates: {from: 2024-01-01}, seasons: all, as: end}").replace(
            "days/{date}.json", "days/{date}-{end}.json"
        ),
        [
            '9:63: datasets.days.partitions.as: has no effect without "from"; '
            "{season} is a label, {end} the year of its end"
        ],
    ),
    "times": (
        edited("{dates: {from: 2024-01-01}}", "{dates: {from: 2024-01-01}, times: {half: [one, two]}}"),
        ["8:45: datasets.days.partitions.times: unknown key; write values: {half: [one, two]}"],
    ),
    "an unknown step": (
        edited("{from: 2024-01-01}", "{from: 2024-01-01, every: fortnight}"),
        [
            "8:51: datasets.days.partitions.dates.every: "
            "expected hour, day, week, month, quarter or year, found 'fortnight' (text)"
        ],
    ),
    "months with one key for two": (
        edited("{from: 2024-01-01}", "{from: 2024-01-01, every: month}").replace("days/{date}", "days/{date:%Y-%q}"),
        ["6:10: datasets.days.key: its date format gives different days the same key"],
    ),
    "a shift of a text": (
        BASE + CHILD.replace('"games/{game_id}.json"', '"games/{game_id+1d}.json"'),
        [
            "11:10: datasets.games.key: {game_id+1d}: a date takes a format like %Y%m%d, a number one like 010 (at least ten digits)"
        ],
    ),
    "a misspelt function": (
        BASE + "    freshness: {until: 'lenght(games) > `0`'}\n",
        ['9:24: datasets.days.freshness.until: JMESPath has no function lenght(), did you mean "length"?'],
    ),
    "a misspelt function that could be a regular expression": (
        edited('"days/{date}.json"', '"days/{date}-{page}.json"') + "    pages: {next: 'lenght(games)'}\n",
        ['9:19: datasets.days.pages.next: JMESPath has no function lenght(), did you mean "length"?'],
    ),
    "a condition that is no regular expression": (
        edited('"days/{date}.json"', '"days/{date}-{page}.json"') + "    pages: {next: 'length(@) == 10'}\n",
        ["9:19: datasets.days.pages.next: not a JMESPath expression at its character 14: length(@) == 10"],
    ),
    "a text in the quotes of a field": (
        BASE + """    freshness: {until: 'status == "Final"'}\n""",
        ["""9:24: datasets.days.freshness.until: "Final" is the name of a field; a text has single quotes: 'Final'"""],
    ),
    "a duration without a unit": (
        BASE + "    freshness: {refetch_every: 6}\n",
        [
            "9:32: datasets.days.freshness.refetch_every: "
            "expected a duration like 90s, 15m, 6h or 1d (or never), found '6' (a number)"
        ],
    ),
    "an unknown time zone": (
        edited("{from: 2024-01-01}", "{from: 2024-01-01, timezone: America/Gotham}"),
        [
            "8:54: datasets.days.partitions.dates.timezone: "
            "expected a time zone like America/New_York, found 'America/Gotham' (text)"
        ],
    ),
    "an address that is none": (
        edited("https://example.org", "ftp://example.org"),
        [
            "2:20: sources.espn.base_url: expected an http or https address, found 'ftp://example.org' (text)",
            "7:10: datasets.days.url: /days/{date} is no address: give source espn a base_url",
        ],
    ),
    "a header that smuggles another": (
        edited("{base_url", '{headers: {X-A: "a\\nB: c"}, base_url'),
        ["2:25: sources.espn.headers.X-A: expected plain ASCII text, found 'a\\nB: c' (text)"],
    ),
    "a source named global": (
        BASE.replace("espn", "global"),
        ["2:11: sources.global: a source cannot be named global"],
    ),
    "a store that is none": (
        "store: http://example.org/lake\n" + BASE,
        ["1:8: store: expected a folder or s3://bucket/prefix, found 'http://example.org/lake' (text)"],
    ),
    "hexadecimal that is none": (
        BASE + '    validate: {starts_with_hex: "5041x"}\n',
        ["9:33: datasets.days.validate.starts_with_hex: expected bytes in hexadecimal, found '5041x' (text)"],
    ),
    "a priority that is none": (
        BASE + "    priority: URGENT\n",
        ["9:15: datasets.days.priority: expected auto, CRITICAL, HIGH, MEDIUM or LOW, found 'URGENT' (text)"],
    ),
    "a batch of requests": (
        BASE + "    batch: {group_by: date}\n",
        ['9:12: datasets.days.batch: has no effect without "command"'],
    ),
    "an open quote": ('store: "lake\n', ["1:8: not YAML: found unexpected end of stream"]),
    "a tab": ("retry:\n\tmax_attempts: 5\n", ["2:1: not YAML: found character '\\t' that cannot start any token"]),
    "an empty file": ("# nothing\n", ["1:1: the file is empty"]),
    "brackets without end": ("store: " + "[" * 3000 + "\n", ["1:1: nested too deeply"]),
}


# Keys that are known, and have no effect or no meaning where they stand.
MISPLACED = {
    "ids beside dates": (
        edited("{dates: {from: 2024-01-01}}", '{dates: {from: 2024-01-01}, ids: "a"}'),
        ['8:50: datasets.days.partitions.ids: has no effect without "from"'],
    ),
    "a regular expression beside values": (
        edited("{dates: {from: 2024-01-01}}", '{values: {date: [a]}, regex: "(a)"}'),
        ['8:46: datasets.days.partitions.regex: has no effect without "from"'],
    ),
    "a form of dates": (
        edited("{dates: {from: 2024-01-01}}", "{dates: {from: 2024-01-01}, as: day}"),
        [
            '8:49: datasets.days.partitions.as: has no effect without "from"; '
            "{season} is a label, {end} the year of its end"
        ],
    ),
    "ids without the name of their field": (
        BASE + CHILD.replace(", as: game_id", ""),
        ['13:17: datasets.games.partitions: "as" is missing'],
    ),
    "values beside same_as": (
        BASE
        + CHILD
        + CHILD.replace("games", "boxes").replace(
            '{from: days, ids: "ids", as: game_id}', "{same_as: games, values: {half: ['1', '2']}}"
        ),
        [
            '18:27: datasets.boxes.partitions.same_as: has no effect beside "values"',
        ],
    ),
    "ids and a regular expression": (
        BASE + CHILD.replace('ids: "ids"', 'ids: "ids", regex: "(a)"'),
        ["13:17: datasets.games.partitions: needs exactly one of ids and regex, has ids and regex"],
    ),
    "all seasons and a first day": (
        SEASONS + edited("{from: 2024-01-01}", "{seasons: all, from: 2024-03-01}"),
        ["9:25: datasets.days.partitions.dates: needs exactly one of seasons and from, has seasons and from"],
    ),
    "a former end": (
        edited("{from: 2024-01-01}", "{from: 2024-01-01, until: today}"),
        ["8:44: datasets.days.partitions.dates.until: unknown key; write to: today"],
    ),
    "current without a season": (
        BASE + "    freshness: {current: 1d}\n",
        ["9:26: datasets.days.freshness.current: has no effect: its objects have no season"],
    ),
    "past without a season": (
        BASE + "    freshness: {past: never}\n",
        ["9:23: datasets.days.freshness.past: has no effect: its objects have no season"],
    ),
    "current beside until": (
        SEASONS + BASE + '    freshness: {until: "done", current: 1d}\n',
        ['10:41: datasets.days.freshness.current: has no effect beside "until"'],
    ),
    "available without a day": (
        BASE
        + CHILD.replace(
            '{from: days, ids: "ids", as: game_id}',
            '{values: {game_id: ["1"]}}\n    available_after: "9:30"'.replace("9:30", "09:30"),
        ),
        ["14:22: datasets.games.available_after: has no effect: its objects have no date"],
    ),
    "a timeout of a url": (
        BASE + "    timeout_seconds: 5\n",
        ['9:22: datasets.days.timeout_seconds: has no effect without "command" or "call"'],
    ),
    "an environment of a url": (
        BASE + "    environment: [HOME]\n",
        ['9:18: datasets.days.environment: has no effect without "command" or "call"'],
    ),
    "the output of a url": (
        BASE + "    output: store\n",
        ['9:13: datasets.days.output: has no effect without "command"'],
    ),
    "the output of a call": (
        CALL + "    output: stdout\n",
        ['9:13: datasets.days.output: has no effect without "command"'],
    ),
    "a batch of a call": (
        CALL + "    batch: {group_by: date}\n",
        ['9:12: datasets.days.batch: has no effect without "command"'],
    ),
    "a batch that prints": (
        OF_SEASONS + "    batch: {group_by: season}\n    output: stdout\n",
        ['11:13: datasets.days.output: has no effect beside "batch"'],
    ),
    "a batch by the field that differs": (
        COMMAND + "    batch: {group_by: date}\n",
        ["9:23: datasets.days.batch.group_by: has no effect: no two objects share a date"],
    ),
    "a batch of one": (
        OF_SEASONS + "    batch: {group_by: season, max: 1}\n",
        ["10:36: datasets.days.batch.max: expected a whole number of 2 or more, found '1' (a number)"],
    ),
    "an unknown code in a date": (
        edited("days/{date}.json", "days/{date:%Y-Q%Q-%m-%d}.json"),
        ["6:10: datasets.days.key: {date:%Y-Q%Q-%m-%d}: unsupported format code %Q"],
    ),
    "a date in seconds": (
        edited("/days/{date}", "/days/{date:%s}"),
        ["7:10: datasets.days.url: {date:%s}: unsupported format code %s"],
    ),
    "an interval in minutes and in hours": (
        "reconciliation_interval_minutes: 60\nreconciliation_interval_hours: 1\n" + BASE,
        ['2:32: reconciliation_interval_hours: has no effect beside "reconciliation_interval_minutes"'],
    ),
    "a multiplier of all others": (
        "priority_weighting: {source_multipliers: {default: 1.0}}\n" + BASE,
        ['1:52: priority_weighting.source_multipliers.default: source "default" is not defined'],
    ),
    "a limit of all others": (
        "rate_limiting: {source_limits: {default: {requests_per_minute: 5}}}\n" + BASE,
        ['1:42: rate_limiting.source_limits.default: source "default" is not defined'],
    ),
    "a first delay beyond the longest": (
        "retry: {initial_delay_seconds: 60, max_delay_seconds: 30}\n" + BASE,
        ["1:32: retry.initial_delay_seconds: 60 is more than max_delay_seconds"],
    ),
    "a bucket with one slash": (
        "store: s3:/bucket/x\n" + BASE,
        ["1:8: store: expected a folder or s3://bucket/prefix, found 's3:/bucket/x' (text)"],
    ),
    "a bucket without a name": (
        "store: s3:///x\n" + BASE,
        ["1:8: store: expected a folder or s3://bucket/prefix, found 's3:///x' (text)"],
    ),
    "no worker for a source": (
        edited("{base_url", "{max_concurrent: 0, base_url"),
        ["2:26: sources.espn.max_concurrent: expected a whole number of 1 or more, found '0' (a number)"],
    ),
    "no worker for a dataset": (
        BASE + "    max_concurrent: 0\n",
        ["9:21: datasets.days.max_concurrent: expected a whole number of 1 or more, found '0' (a number)"],
    ),
    "a field in ids that the parent has not": (
        BASE + CHILD.replace('"ids"', "\"games[?day == '{game_id}'].id\""),
        ['13:35: datasets.games.partitions.ids: no field "game_id" (there are: date)'],
    ),
    "an undeclared field in until": (
        BASE + """    freshness: {until: "day == '{day}'"}\n""",
        ['9:24: datasets.days.freshness.until: no field "day" (there are: date)'],
    ),
    "an undeclared field in live": (
        BASE + """    freshness: {live: {while: "day == '{dat}'", every: 1m}}\n""",
        ['9:31: datasets.days.freshness.live.while: no field "dat", did you mean "date"? (there are: date)'],
    ),
    "a field in error_when": (
        edited("{base_url", """{error_when: "id == '{date}'", base_url"""),
        ['2:22: sources.espn.error_when: no field "date" (there is none)'],
    ),
    "blocks in a block": (
        "task_processing: {priority_weighting: {age_weight: 1}, rate_limiting: {}}\n" + BASE,
        ["1:1: task_processing: unknown key; priority_weighting and rate_limiting in it belong at the top level"],
    ),
    "keys of the replaced system": (
        "retry_delay_seconds: 60\nmax_retries: 3\ndry_run: {enabled: false}\n" + BASE,
        [
            '1:1: retry_delay_seconds: unknown key, did you mean "retry.initial_delay_seconds"?',
            '2:1: max_retries: unknown key, did you mean "retry.max_attempts"?',
            '3:1: dry_run: unknown key; remove it: use "adce.py plan"',
        ],
    ),
    "a switch of the backoff": (
        "rate_limiting: {backoff: {enabled: true}}\n" + BASE,
        ["1:27: rate_limiting.backoff.enabled: unknown key; remove it: a block that is absent is off"],
    ),
    "limits of nothing": (
        "rate_limiting: {requests_per_minute: 5}\n" + BASE,
        [
            "1:17: rate_limiting.requests_per_minute: unknown key here; "
            "it belongs in rate_limiting.global_limits or in rate_limiting.source_limits.*"
        ],
    ),
    "freshness of a dataset": (
        BASE + "    refetch_every: 6h\n",
        ["9:5: datasets.days.refetch_every: unknown key here; it belongs in datasets.*.freshness"],
    ),
    "retries of a source": (
        edited("{base_url", "{retry: {max_attempts: 1}, base_url"),
        ["2:10: sources.espn.retry: unknown key here; it belongs at the top level"],
    ),
}
BROKEN |= MISPLACED


def problems_of(text: str, folder: Path) -> list[str]:
    """The problem lines of the message, without the lines that quote the file."""
    path = folder / "adce.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(adce.ConfigurationError) as caught:
        adce.load_configuration(path)
    lines = str(caught.value).splitlines()
    return [line.removeprefix("adce.yaml:") for line in lines if line.startswith("adce.yaml:")]


@pytest.mark.parametrize("case", BROKEN)
def test_broken_configuration_is_told_exactly(case, tmp_path):
    text, expected = BROKEN[case]
    assert sorted(problems_of(text, tmp_path)) == sorted(expected)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path):
    text = "databse: x\n" + edited("source: espn", "source: epsn") + "    priority: URGENT\n"
    places = [tuple(map(int, problem.split(":")[:2])) for problem in problems_of(text, tmp_path)]
    assert len(places) == 3
    assert places == sorted(places)


def test_message_shows_the_line_with_a_caret(tmp_path):
    path = tmp_path / "adce.yaml"
    path.write_text(edited("source: espn", "source: epsn"), encoding="utf-8")
    with pytest.raises(adce.ConfigurationError) as caught:
        adce.load_configuration(path)
    assert str(caught.value).splitlines() == [
        'adce.yaml:5:13: datasets.days.source: source "epsn" is not defined, did you mean "espn"?',
        "    5 |     source: epsn",
        "      |             ^",
        "1 problem; nothing was started",
    ]


def test_message_shows_a_part_of_a_long_line_and_the_first_of_very_many_problems(tmp_path):
    names = [f"x{number}" for number in range(400)]
    path = tmp_path / "adce.yaml"
    path.write_text(
        edited(
            "{dates: {from: 2024-01-01}}", f"{{values: {{date: [{', '.join(['1'] * 400)}]}}, {': 1, '.join(names)}: 1}}"
        )
    )
    with pytest.raises(adce.ConfigurationError) as caught:
        adce.load_configuration(path)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 155
    assert max(map(len, lines)) <= 160
    assert re.fullmatch(r"\.\.\. and \d+ more", lines[-2])
    for problem, line, caret in zip(lines[0:90:3], lines[1:90:3], lines[2:90:3], strict=True):
        assert line[caret.index("^")] in "1xd", (problem, line, caret)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        (b"a" * ((1 << 20) + 1), "larger than 1,048,576 bytes"),
        (b"a: &a [x]\nb: [" + b"*a, " * 40_000 + b"]\n" + BASE.encode(), "unknown key"),
    ],
)
def test_unreadable_file_is_refused_in_one_message(content, message, tmp_path):
    path = tmp_path / "adce.yaml"
    path.write_bytes(content)
    with pytest.raises(adce.ConfigurationError, match=message.replace("(", r"\(").replace(")", r"\)")):
        adce.load_configuration(path)


def test_alias_bomb_ends_at_a_bound(tmp_path):
    layers = ["a0: &a0 {x: [a, b]}"] + [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 40)]
    path = tmp_path / "adce.yaml"
    path.write_text("\n".join(layers) + "\nsources: *a39\n" + BASE.partition("\n")[2], encoding="utf-8")
    with pytest.raises(adce.ConfigurationError):
        adce.load_configuration(path)


@pytest.mark.parametrize("command", ["run", "report", "plan", "check"])
def test_program_says_it_with_exit_78_and_starts_nothing(command, tmp_path):
    (tmp_path / "adce.yaml").write_text("databse: x\n" + BASE, encoding="utf-8")
    done = run_adce(command, folder=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("adce.yaml:1:1: databse: unknown key")
    assert [path.name for path in tmp_path.iterdir()] == ["adce.yaml"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_missing_file_or_folder_is_named(make, tmp_path):
    make(tmp_path / "other.yaml")
    done = run_adce("-c", "other.yaml", "check", folder=tmp_path)
    assert done.returncode == 78
    assert "other.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_byte_order_mark_and_carriage_returns_are_accepted(tmp_path):
    path = tmp_path / "adce.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert list(adce.load_configuration(path).datasets) == ["days"]


def test_shipped_configuration_holds_four_sources_and_eighteen_datasets():
    configuration = adce.load_configuration(ROOT / "adce.yaml")
    assert list(configuration.sources) == ["espn", "nba_api", "basketball_reference", "hoopr"]
    assert len(configuration.datasets) == 18
    assert configuration.store == str(ROOT / "lake")


@pytest.mark.parametrize(
    ("date", "body", "is_valid"),
    [
        ("2002-12-25", {"header": {"id": "7"}, "plays": []}, True),
        ("2002-12-25", {"page": {"content": {"gamepackage": {"gmStrp": {}}}}}, True),
        ("2002-12-25", {"header": {"id": "8"}}, False),
        ("2024-12-25", {"header": {"id": "7"}, "plays": []}, False),
    ],
)
def test_shipped_play_by_play_may_be_empty_before_2003_only(date, body, is_valid):
    dataset = adce.load_configuration(ROOT / "adce.yaml").datasets["espn_play_by_play"]
    dataset = dataclasses.replace(dataset, validate=dataclasses.replace(dataset.validate, min_bytes=1))
    found = adce.inspect(dataset, {"game_id": "7", "date": date}, json.dumps(body).encode())
    assert found.valid is is_valid, found.verdict


def test_four_blocks_are_accepted_exactly_as_written(configure):
    configuration = configure(FOUR_BLOCKS + BASE)
    limits = configuration.rate_limiting.scopes["basketball_reference"]
    windows = [(limit.max_requests, limit.seconds) for limit in limits.windows]
    assert windows == [(1, 3.0), (20, 60.0), (500, 3600.0)]
    assert (limits.burst_size, limits.refill_per_second) == (3, 20 / 60)
    assert configuration.priority_weighting.source_multipliers["hoopr"] == 1.1
    assert configuration.rate_limiting.backoff == adce.Backoff(80, 1, 30, 2)


def test_every_block_may_be_absent(configure):
    configuration = configure(BASE)
    assert configuration.rate_limiting == adce.RateLimiting(enabled=False)
    assert configuration.priority_weighting == adce.PriorityWeighting()
    assert (configuration.interval_seconds, configuration.retry) == (900, adce.Retry())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("reconciliation_interval_hours: 2\n", 7200), ("reconciliation_interval_minutes: 0.5\n", 30), ("", 900)],
)
def test_interval_in_minutes_or_in_hours(text, seconds, configure):
    assert configure(text + BASE).interval_seconds == seconds


def test_switched_off_limits_are_no_limits(configure):
    text = FOUR_BLOCKS.replace("rate_limiting:\n  enabled: true", "rate_limiting:\n  enabled: false")
    assert configure(text + BASE).rate_limiting.scopes == {}


def test_limits_may_be_given_by_second_and_by_day(configure):
    limits = "rate_limiting: {global_limits: {requests_per_second: 2, requests_per_day: 900}}\n"
    windows = configure(limits + BASE).rate_limiting.scopes["global"].windows
    assert windows == (adce.WindowLimit(2, 1.0), adce.WindowLimit(900, 86400.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [('"23:30"', time(23, 30)), ("{hours: 3}", 10800)],
)
def test_both_forms_of_available_after(text, expected, configure):
    assert configure(BASE + f"    available_after: {text}\n").datasets["days"].available_after == expected


@pytest.mark.parametrize(
    ("partitions", "own"),
    [
        ("{dates: {from: 2024-01-01, to: 2024-02-01}}", ("date",)),
        ("{dates: {seasons: all, to: today, timezone: America/New_York}}", ("date",)),
        ("{seasons: all, values: {date: [a, b]}}", ("season", "date")),
        ("{dates: {from: 2024-01-01, every: month}, values: {n: [a]}, seasons: all}", ("date", "season", "n")),
        ("{values: {date: [a, b], team: [ATL, BOS]}}", ("date", "team")),
    ],
)
def test_every_kind_of_partition(partitions, own, configure):
    key = "days/" + "-".join(f"{{{name}}}" for name in own)
    text = edited("{dates: {from: 2024-01-01}}", partitions).replace("days/{date}.json", key)
    assert configure(SEASONS + text).datasets["days"].partitions.own_fields() == own


def test_child_inherits_the_fields_of_its_parent(configure):
    configuration = configure(BASE + CHILD.replace("/games/{game_id}", "/games/{date:%Y}/{game_id}"))
    assert configuration.fields_of("games") == {"date", "game_id"}
    assert [[dataset.name for dataset in level] for level in configuration.levels()] == [["days"], ["games"]]


def test_same_as_takes_the_partitions_of_the_other(configure):
    boxes = CHILD.replace("games", "boxes").replace('{from: days, ids: "ids", as: game_id}', "{same_as: games}")
    datasets = configure(BASE + CHILD + boxes).datasets
    assert datasets["boxes"].partitions == datasets["games"].partitions


def test_relative_paths_belong_to_the_file(configure, tmp_path):
    configuration = configure("database: state/a.db\nstore: ../lake\n" + BASE)
    assert configuration.database == tmp_path / "state/a.db"
    assert Path(configuration.store).resolve() == tmp_path.parent / "lake"


def test_which_file_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADCE_CONFIG", raising=False)
    assert adce.find_configuration(None) == ROOT / "adce.yaml"
    (tmp_path / "adce.yaml").touch()
    assert adce.find_configuration(None) == tmp_path / "adce.yaml"
    monkeypatch.setenv("ADCE_CONFIG", "by/environment.yaml")
    assert adce.find_configuration(None) == tmp_path / "by/environment.yaml"
    assert adce.find_configuration("given.yaml") == tmp_path / "given.yaml"


class SchemaLoader(yaml.SafeLoader):
    """Reads a date as text, as an editor does."""


SchemaLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in found if not tag.endswith("timestamp")]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# Mistakes that no schema can see: duplicate keys, the letters of YAML, references, expressions, two keys' values.
UNSEEN = """
    duplicate key, YAML reads 010 as 8, a bucket that nothing refills, a limit for a
    misspelt source, undefined source, undefined parent, undefined same_as, a dataset below itself, the same as
    each other, bad JMESPath, a misspelt function, a misspelt function
    that could be a regular expression, a condition that is no regular expression, a text in the
    quotes of a field, bad regular expression, regular expression without a
    group, undeclared field in a url, undeclared field in an expression, format of a field that is no date, attribute access in a template, form of a url in a key,
    dates that end before they start, a day that does not exist, a season that ends before it starts, seasons
    that are not declared, two datasets with the same key, a key that does not tell its objects apart, a date
    format that loses the day, a key that climbs out, a date format that leads out of the store, an unknown time
    zone, a source named global, current without a season, past without a season, available without a
    day, a batch by the field that differs, an unknown code in a date, a date in seconds, a multiplier of all
    others, a limit of all others, a first delay beyond the longest, a field in ids that the parent has not, an
    undeclared field in until, an undeclared field in live, a field in error_when, ids without the name of their field, a field of two kinds of
    partitions, a season set twice, a shift of a text, months with one key for two, a program in a pool whose requests are
    limited
"""


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(run_adce("explain", "--json-schema", folder=ROOT).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("text", [(ROOT / "adce.yaml").read_text(encoding="utf-8"), FOUR_BLOCKS + BASE + CHILD])
def test_schema_accepts_good_configurations(text, validator):
    assert [error.message for error in validator.iter_errors(yaml.load(text, SchemaLoader))] == []


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - {"a tab", "an open quote", "brackets without end"}))
def test_schema_refuses_what_a_schema_can_see(case, validator):
    unseen = " ".join(UNSEEN.split()).split(", ")
    assert validator.is_valid(yaml.load(BROKEN[case][0], SchemaLoader)) == (case in unseen)


REPLACED = """\
version: "1.0"
reconciliation_interval_minutes: 15
max_concurrent_scrapers: 5
rate_limiting:
  global_limits: {requests_per_minute: 100}
  backoff: {enabled: true, threshold_percent: 80}
task_queue_file: gaps.json
task_processing:
  max_tasks_per_run: 1000
  priority_weighting:
    base_scores: {CRITICAL: 1000, HIGH: 100, MEDIUM: 10, LOW: 1}
    source_multipliers: {espn: 1.5, default: 1.0}
health_check: {port: 8080, check_interval_seconds: 60}
max_retries: 3
retry_delay_seconds: 60
alerts: {enabled: true, channels: {email: {enabled: true}}}
"""


def test_hints_lead_from_the_replaced_system_to_a_working_file(configure, tmp_path):
    problems = problems_of(REPLACED, tmp_path)
    assert len(problems) == 9
    for problem in problems:
        assert re.search(r"; remove it|did you mean \"retry\.|belongs at the top level", problem), problem
    moved = REPLACED.replace("task_processing:\n  max_tasks_per_run: 1000\n", "").replace("  priority_w", "priority_w")
    moved = re.sub(r"^(version|task_queue_file|max_retries|retry_delay).*\n", "", moved, flags=re.MULTILINE)
    moved = re.sub(r"enabled: true, (threshold)|, check_interval_seconds: 60", r"\1", moved).partition("alerts:")[0]
    moved += "retry: {max_attempts: 3, initial_delay_seconds: 60}\n"
    assert problems_of(moved, tmp_path) == [
        '8:46: priority_weighting.source_multipliers.default: source "default" is not defined'
    ]
    assert configure(moved.replace(", default: 1.0", "")).retry.max_attempts == 3


@pytest.mark.parametrize(
    ("words", "key", "default"),
    [
        ("datasets.*.freshness.live.every", "datasets.*.freshness.live.every", "required"),
        ("datasets.days.batch.max", "datasets.*.batch.max", "50"),
        ("full_reconciliation_hours", "full_reconciliation_hours", "24"),
        ("trust_env", "sources.*.trust_env", "false"),
        ("base_scores", "priority_weighting.base_scores", '{"CRITICAL": 1000, "HIGH": 100, "MEDIUM": 10, "LOW": 1}'),
        ("store", "store", "lake"),
    ],
)
def test_explain_tells_the_default_of_a_key(words, key, default):
    path, facts, _ = adce.explain(words).splitlines()
    assert (path, facts.rpartition("; ")[2].removeprefix("default ")) == (key, default)


def test_explain_prints_a_block_with_the_keys_in_it():
    done = run_adce("explain", "retry", folder=ROOT)
    assert done.stdout.splitlines()[:6] == [
        "retry",
        "    a mapping",
        "    retries of failed tasks",
        "retry.max_attempts",
        "    a whole number of 1 or more; default 5",
        "    failures after which a task gives up",
    ]
    assert adce.explain("sources.espn").splitlines()[::3][:2] == ["sources.*.base_url", "sources.*.headers"]


def test_explain_needs_no_configuration(tmp_path):
    (tmp_path / "adce.yaml").write_text("databse: x\n")
    overview = run_adce("explain", folder=tmp_path).stdout.splitlines()
    assert overview[::3][:2] == ["database", "store"]
    done = run_adce("explain", "freshnes", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert 'unknown key "freshnes", did you mean "freshness"?' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adce.yaml"]


def test_two_mistakes_of_one_dataset_are_told_at_once(tmp_path):
    text = BASE + CHILD.replace('"ids"', '"a[?"').replace("/games/{game_id}", "/games/{game}") + "    priority: NONE\n"
    assert [problem.split(": ")[1] for problem in problems_of(text, tmp_path)] == [
        "datasets.games.url",
        "datasets.games.partitions.ids",
        "datasets.games.priority",
    ]


def test_seasons_are_sorted_and_dates_are_dates(configure):
    later = '{label: "b", end: 2025, start: 2024-10-01, finish: 2025-06-01}'
    earlier = '{label: "a", end: 2024, start: 2023-10-01, finish: 2024-06-01}'
    seasons = configure(f"seasons: [{later}, {earlier}]\n" + BASE).seasons
    assert [season.label for season in seasons] == ["a", "b"]
    assert seasons[0].start == date(2023, 10, 1)


def test_datasets_whose_parents_share_their_parents_load_at_once(tmp_path):
    """Each of 60 levels has two parents in the one above: there are 2 ** 59 ways from the last to the first."""
    text = 'sources: {web: {base_url: "https://example.org"}}\ndatasets:\n'
    for level in range(60):
        above = f'{{from: [a{level - 1}, b{level - 1}], ids: "[]", as: f{level}}}' if level else "{values: {f0: [x]}}"
        for name in (f"a{level}", f"b{level}"):
            key = f'key: "{name}/{{f{level}}}", url: "/{{f{level}}}/{{f0}}"'
            text += f"  {name}: {{source: web, {key}, partitions: {above}}}\n"
    (tmp_path / "adce.yaml").write_text(text, encoding="utf-8")
    levels = adce.load_configuration(tmp_path / "adce.yaml").levels()
    assert [sorted(one.name for one in level) for level in levels] == [[f"a{n}", f"b{n}"] for n in range(60)]
