"""What should exist, what a whole object is, and how fresh it must be."""

from __future__ import annotations

import dataclasses
import datetime
import gzip
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import adce

SEASONS = (
    adce.Season("2023-24", 2024, datetime.date(2023, 10, 24), datetime.date(2024, 6, 17)),
    adce.Season("2024-25", 2025, datetime.date(2024, 10, 22), datetime.date(2025, 6, 22)),
)
HOUR, DAY = 3600, 86400
NOON = 1_736_942_400.0  # 2025-01-15 12:00 UTC


def dataset(**changes) -> adce.Dataset:
    given = {
        "name": "days",
        "source": "espn",
        "key": adce.Template("days/{date}.json"),
        "partitions": adce.Partitions(dates=adce.Dates(seasons=("all",))),
        "calendar": SEASONS,
    }
    given |= {"dates": (changes.get("partitions") or adce.Partitions()).dates or adce.Dates(), **changes}
    return adce.Dataset(**given)


def child(**partitions) -> adce.Dataset:
    parts = adce.Partitions(parents=("days",), id_field="game_id", **partitions)
    return dataset(name="games", key=adce.Template("games/{game_id}.json"), partitions=parts)


@example("..", "%2E%2E")
@example(".", "...")
@given(st.text(min_size=1), st.text(min_size=1))
def test_quoted_values_stay_different_and_inside_their_folder(one, other):
    try:
        first, second = adce.quote_for_key(one), adce.quote_for_key(other)
    except UnicodeEncodeError:  # a lone surrogate is refused, not stored
        return
    assert (first == second) == (one == other)
    assert not set(first) & set("/\0\n")
    assert first not in ("", ".", "..")


@given(st.text())
def test_value_in_a_url_adds_no_path_and_no_parameter(value):
    try:
        url = adce.Template("{value}").render({"value": value}, adce.quote_for_url)
        assert not set(url) & set("/?#&=+ \r\n")
    except UnicodeEncodeError:
        return


@given(st.text(st.characters(codec="utf-8", exclude_characters="\\")))
def test_value_in_an_expression_is_compared_as_it_is(value):
    assert adce.holds("id == '{game_id}'", {"game_id": value}, {"id": value})


@pytest.mark.parametrize("value", ["\\' || `true` || '", "7\\", "' || `true` || '"])
def test_value_cannot_break_out_of_an_expression(value):
    assert not adce.holds("id == '{game_id}'", {"game_id": value}, {"id": "7"})


def test_slashes_of_a_date_format_are_folders_and_those_of_a_value_are_not():
    dataset = dataclasses.replace(child(ids="ids"), key=adce.Template("games/{date:%Y/%m/%d}/{game_id}.json"))
    expected = adce.expected_object(dataset, {"game_id": "../7", "date": "2024-12-15"})
    assert expected.key == "games/2024/12/15/..%2F7.json"


@pytest.mark.parametrize("value", ["", " ", "a\nb", "a\0b", "x" * 300, "\u202edrow"])
def test_value_that_makes_no_key_is_refused(value):
    with pytest.raises(ValueError, match="games"):
        adce.expected_object(child(ids="ids"), {"game_id": value, "date": "2024-12-15"})


def test_days_of_all_seasons_end_yesterday_in_their_own_zone():
    just_after_midnight_utc = adce.instant_of(datetime.date(2024, 10, 25), datetime.time(1), "UTC")
    there = adce.Partitions(dates=adce.Dates(seasons=("all",), timezone="America/New_York"))
    here = adce.Partitions(dates=adce.Dates(seasons=("all",), last="today"))
    last = [
        list(adce.expand(dataset(partitions=partitions), just_after_midnight_utc))[-1]["date"]
        for partitions in (there, here)
    ]
    assert last == ["2024-10-23", "2024-10-25"]


def test_finished_season_has_all_its_days():
    fields = list(adce.expand(dataset(calendar=SEASONS[:1]), NOON))
    assert len(fields) == (SEASONS[0].finish - SEASONS[0].start).days + 1
    assert fields[0] == {"date": "2023-10-24", "season": "2023-24", "end": "2024"}


def test_season_that_has_not_begun_is_not_expected():
    partitions = adce.Partitions(seasons=("all",), values={"month": ("may", "june")})
    before = adce.instant_of(SEASONS[1].start, datetime.time(), "UTC") - 1
    fields = list(adce.expand(dataset(partitions=partitions), before))
    assert [(one["season"], one["end"], one["month"]) for one in fields] == [
        ("2023-24", "2024", "may"),
        ("2023-24", "2024", "june"),
    ]


def test_range_of_dates_stops_at_its_end_or_at_its_bound():
    first = datetime.date(2025, 1, 1)
    ranged = adce.Dates(first=first, last=datetime.date(2025, 1, 3))
    open_ended = adce.Dates(first=first, last=datetime.date(2025, 1, 2))
    counts = [
        len(list(adce.expand(dataset(partitions=adce.Partitions(dates=dates)), NOON))) for dates in (ranged, open_ended)
    ]
    assert counts == [3, 2]


@given(
    st.sampled_from([*adce.STEPS]),
    st.dates(datetime.date(2023, 1, 1), datetime.date(2025, 1, 14)),
    st.sampled_from(["yesterday", "today", "now", datetime.date(2024, 6, 30), datetime.date(2024, 2, 29)]),
    st.sets(st.sampled_from(adce.WEEKDAYS)),
    st.sets(st.dates(datetime.date(2024, 1, 1), datetime.date(2024, 3, 1)), max_size=3),
    st.lists(st.sampled_from("abc"), unique=True, min_size=1),
)
def test_expected_objects_are_every_combination_of_steps_and_values(every, first, last, weekdays, excluded, letters):
    dates = adce.Dates(first=first, last=last, every=every, weekdays=tuple(weekdays), excluded=tuple(excluded))
    partitions = adce.Partitions(dates=dates, seasons=("all",), values={"letter": tuple(letters)})
    found = [tuple(one.values()) for one in adce.expand(dataset(partitions=partitions, calendar=SEASONS[:2]), NOON)]
    names, now = (
        {"mon": 0, "tue": 1, "wed": 2, "thu": 3, "fri": 4, "sat": 5, "sun": 6},
        datetime.datetime(2025, 1, 15, 12),  # noqa: DTZ001
    )
    bound = {"yesterday": datetime.date(2025, 1, 14)}.get(str(last), now.date() if isinstance(last, str) else last)
    begins = {"month": lambda day: day.day == 1, "year": lambda day: (day.month, day.day) == (1, 1)}
    begins["quarter"] = lambda day: day.day == 1 and day.month in (1, 4, 7, 10)
    begins["week"] = lambda day: (day - first).days % 7 == 0
    back = {"month": first.replace(day=1), "year": first.replace(month=1, day=1)}
    back["quarter"] = first.replace(month=first.month - (first.month - 1) % 3, day=1)
    moment, steps = datetime.datetime.combine(back.get(every, first), datetime.time()), []
    while moment.date() <= bound:
        day, is_hour = moment.date(), every == "hour"
        is_begun = (
            begins.get(every, lambda _: True)(day)
            and (is_hour or moment.hour == 0)
            and (last != "now" or moment <= now)
        )
        if is_begun and day not in excluded and (not weekdays or day.weekday() in {names[one] for one in weekdays}):
            steps.append(moment.isoformat()[:16] if is_hour else day.isoformat())
        moment += datetime.timedelta(hours=1)
    seasons = [("2023-24", "2024"), ("2024-25", "2025")]
    assert found == [(step, *season, letter) for step in steps for season in seasons for letter in letters]


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("{date:%Y%m%d}", "20241231"),
        ("{date+1d:%Y%m%d}", "20250101"),
        ("{date-1w}", "2024-12-24"),
        ("{date+2m:%Y-%m-%d}", "2025-02-28"),
        ("{date-1y:%Y}", "2023"),
        ("{date:%Y}/q%q/{date:%-m}", None),
        ("{date:%Y}/Q{date:%q}", "2024/Q4"),
        ("{date+1m:%-m/%-d}", "1/31"),
        ("{place:path}", "a/b c/d%25"),
        ("{place}", "a%2Fb c%2Fd%25"),
        ("CIK{number:010}", "CIK0000320193"),
        ('{"after": {none:json}, "at": {name:json}}', '{"after": null, "at": "Beyonc\\u00e9 & \'co\'"}'),
        ("{padded:01}/{padded:03}/{zero:01}", "320193/320193/0"),
        ("{name}", "Beyonc\u00e9 & 'co'"),
    ],
)
def test_text_with_fields_is_rendered(text, rendered):
    fields = {"date": "2024-12-31", "place": "a/b c/d%", "name": "Beyonc\u00e9 & 'co'"}
    fields |= {"none": "", "number": "320193", "padded": "0000320193", "zero": "00"}
    assert adce.Template(text).render(fields, adce.quote_for_key) == (rendered or "2024/q%q/12")


def test_object_of_an_hour_is_available_after_the_end_of_its_hour():
    hours = adce.Partitions(dates=adce.Dates(first=datetime.date(2024, 1, 1), every="hour"))
    one = dataset(partitions=hours, available_after=600)
    expected = adce.expected_object(one, {"date": "2024-01-01T23:00"})
    assert (expected.day, adce.utc_text(expected.available_at)) == ("2024-01-01", "2024-01-02T00:10:00Z")


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
def test_day_that_nothing_can_be_added_to_is_refused(day):
    one = dataset(partitions=adce.Partitions(values={"date": (day,)}))
    with pytest.raises(ValueError, match="is not between 1000 and 2999"):
        adce.expected_object(one, {"date": day})


@pytest.mark.parametrize("shift", ["+999y", "-999y", "+999w", "-999m"])
@pytest.mark.parametrize("day", ["1000-01-01", "2999-12-31"])
def test_any_day_can_be_shifted_by_as_much_as_a_text_may_say(day, shift):
    assert adce.Template(f"{{date{shift}:%j}}").render({"date": day}, str).isdecimal()


def test_key_in_the_folder_that_is_adces_own_is_refused():
    one = dataset(key=adce.Template("{name}/x"), partitions=adce.Partitions(values={"name": (".adce",)}))
    with pytest.raises(ValueError, match="ADCE's own"):
        adce.expected_object(one, {"name": ".adce"})


def several(**partitions) -> adce.Dataset:
    """A child whose ids have several fields."""
    parts = adce.Partitions(parents=("days",), **partitions)
    return dataset(name="games", key=adce.Template("games/{cik}/{form}"), partitions=parts)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("value[?on].{id: a, name: b}", "id name"),
        ("value[?on == `true`].{id: a, name: b} || `[]`", "id name"),
        ("value[].{id: a, name: b} | [?name && length(name) > `3`]", "id name"),
        ("value[].{id: a} | [0]", "id"),
        ("value[1:].{id: a} | [:3]", "id"),
        ("value.*.[{id: a}][]", "id"),
        ("map(&{id: a}, value)", "id"),
        ("sort_by(value[].{id: a}, &id)", "id"),
        ("value && value[].{id: a}", "id"),
        ("value[].{id: a}.id", ""),
        ("value[].{id: a} | [].id", ""),
        ("value[?x == {id: a}].b", ""),
        ("value", ""),
        ("`[]`", ""),
    ],
)
def test_members_of_what_an_expression_makes_are_known_before_it_is_used(expression, names):
    assert adce.names_in_result(expression) == tuple(names.split())


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_members_of_the_objects_that_an_expression_makes_are_fields(pack):
    body = pack(b'{"games": [{"c": 7, "f": "10-K"}, {"c": 8, "f": null}]}')
    one = several(ids="games[].{cik: c, form: f}")
    parent = dataset(validate=adce.Validation(json=True, gzip=pack is not bytes))
    found = adce.inspect(parent, {}, body, [one])
    assert [json.loads(value) for value in found.mentions["games[].{cik: c, form: f}"]] == [
        {"cik": "7", "form": "10-K"}
    ]
    assert one.partitions.own_fields() == ("cik", "form")
    assert len(found.problems) == 1  # a null makes no field


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_named_groups_are_fields_and_entities_are_unescaped(pack):
    one = several(regex=r'href="(?P<cik>\d+)/(?P<form>[^"]+)"')
    body = pack(b'<a href="12/A&amp;B"> <a href="13/C">')
    (values,) = adce.inspect(dataset(), {}, body, [one]).mentions.values()
    assert [json.loads(value) for value in values] == [{"cik": "12", "form": "A&B"}, {"cik": "13", "form": "C"}]


@pytest.mark.parametrize(("size", "offsets"), [(None, "0 1 2"), (100, "0 100 200")])
def test_offset_of_a_page_counts_the_items_before_it_or_the_pages(size, offsets):
    pages = adce.Pages(last="total", size=size)
    one = dataset(url=adce.Template("/list?start={offset}"), pages=pages)
    asked = [adce.url_of(adce.Source("s", "http://x"), one, {"page": page, "next": ""}) for page in "123"]
    assert asked == [f"http://x/list?start={offset}" for offset in offsets.split()]


@pytest.mark.parametrize(
    ("value", "url", "problem"),
    [
        ("a%20b/c+d.csv?x=1&y=%2F", "http://own:8/api/a%20b/c+d.csv?x=1&y=%2F", None),
        ("http://own:8/else/50%25 \u00e9", "http://own:8/else/50%25%20%C3%A9", None),
        ("/a$KEY", "http://own:8/api/a%24KEY", None),
        ("//evil.example/a", "http://own:8/api/evil.example/a", None),
        ("HTTP://evil.example/a", "http://own:8/api/HTTP://evil.example/a", None),
        ("http://own/a", None, "another host"),
        ("https://own:8/a", None, "another host"),
        ("http://own:8@evil.example/a", None, "another host"),
        ("http://user:password@own:8/a", None, "another host"),
        ("http://own:8\\@evil.example/", None, "another host"),
        ("http://[own/a", None, "no address"),
        ("http://own:8/api/../admin", None, "or .."),
        ("a/%2E%2e/%2e./admin", None, "or .."),
        ("a/..?x", None, "or .."),
    ],
)
def test_address_that_a_parent_names_stays_as_it_is_and_on_its_host(value, url, problem):
    one, source = dataset(url=adce.Template("{link:url}")), adce.Source("s", "http://own:8/api")
    if problem:
        assert problem in (adce.address_problem(source, one, {"link": value}) or "")
    else:
        assert adce.address_problem(source, one, {"link": value}) is None
        assert adce.url_of(source, one, {"link": value}) == url


def test_path_that_climbs_is_no_id_of_a_url_with_paths():
    one = dataclasses.replace(child(ids="ids"), url=adce.Template("/{game_id:path}"))
    found = adce.inspect(dataset(), {}, b'{"ids": ["a/../../b", "a/b"]}', [one])
    assert (found.mentions["ids"], len(found.problems)) == (("a/b",), 1)


def test_values_are_combined():
    values = {"team": ("ATL", "BOS"), "kind": ("a", "b", "c")}
    assert len(list(adce.expand(dataset(partitions=adce.Partitions(values=values)), NOON))) == 6


def test_object_of_a_date_belongs_to_its_season():
    partitions = adce.Partitions(dates=adce.Dates(first=datetime.date(2024, 1, 1)))
    days = [adce.expected_object(dataset(partitions=partitions), {"date": day}) for day in ("2024-06-17", "2024-06-18")]
    assert [one.season for one in days] == ["2023-24", None]


@pytest.mark.parametrize(
    ("rule", "instant"),
    [
        (datetime.time(23, 30), "2024-12-16T04:30:00Z"),
        (3 * HOUR, "2024-12-16T08:00:00Z"),
    ],
)
def test_object_is_available_after_an_instant_of_its_own_zone(rule, instant):
    partitions = adce.Partitions(dates=adce.Dates(seasons=("all",), timezone="America/New_York"))
    wanted = adce.expected_object(dataset(partitions=partitions, available_after=rule), {"date": "2024-12-15"})
    assert adce.utc_text(wanted.available_at) == instant


@pytest.mark.parametrize(
    ("value", "is_true"),
    [
        (None, False),
        (False, False),
        ("", False),
        ([], False),
        ({}, False),
        (0, True),
        (True, True),
        ("x", True),
        ([0], True),
    ],
)
def test_truth_is_that_of_jmespath(value, is_true):
    assert adce.holds("value", {}, {"value": value}) is is_true


def test_function_of_null_is_null_and_one_of_another_kind_is_a_mistake():
    assert adce.search("starts_with(next, 'http')", {}, {"next": None}) is None
    with pytest.raises(ValueError, match=r"join\(\) needs .*: join\('', \['', results\[-1\].id\]\)"):
        adce.search("join('', ['', results[-1].id])", {}, {"results": [{"id": 7}]})
    assert not adce.holds("length(`7`)", {}, {})


@pytest.mark.parametrize(("state", "ids"), [("Final", ("0",)), ("Live", ())])
def test_condition_that_is_false_names_no_id(state, ids):
    one = child(ids="state == 'Final' && id")
    found = adce.inspect(dataset(), {}, json.dumps({"state": state, "id": 0}).encode(), [one])
    assert (found.mentions[one.partitions.ids], found.problems) == (ids, ())


def test_zip_makes_rows_of_columns():
    filings = b'{"recent": {"number": ["7", "8", "9"], "form": ["10-K", "8-K", "10-K"]}}'
    one = several(ids="recent.zip(number, form)[?[1] == '10-K'].{cik: [0], form: [1]}")
    (found,) = adce.inspect(dataset(), {}, filings, [one]).mentions.values()
    assert [json.loads(value)["cik"] for value in found] == ["7", "9"]
    assert adce.search("zip(`[1]`, nothing)", {}, {}) is None
    with pytest.raises(ValueError, match=r"zip\(\) needs array, has string"):
        adce.search("zip(`[1]`, 'a')", {}, {})


def test_next_page_and_ids_that_cannot_be_evaluated_are_no_end_and_no_emptiness():
    pages = adce.Pages(next="join('', [id])")
    paged = dataset(name="pages", pages=pages, key=adce.Template("{page}"), url=adce.Template("/list?after={next}"))
    found = adce.inspect(paged, dict(adce.FIRST_PAGE), b'{"id": 7}', [paged])
    assert found.verdict and found.verdict.startswith("join() needs")
    found = adce.inspect(dataset(), {}, b'{"id": 7}', [child(ids="join('', [id])")])
    assert [problem.partition(" needs")[0] for problem in found.problems] == ["games: join()"]


@pytest.mark.parametrize(
    ("expression", "is_true"),
    [("!game.over", False), ("!game.begun", True), ("!game.over || !game.begun", True), ("!(game.over)", False)],
)
def test_negation_reaches_over_the_whole_path(expression, is_true):
    """By the letter of JMESPath `!game.over` is (!game).over: null, whatever the document says."""
    assert adce.holds(expression, {}, {"game": {"over": True, "begun": False}}) is is_true
    assert len(adce.search(f"[?{expression}]", {}, [{"game": {"over": True, "begun": False}}])) == is_true


def test_expression_that_raises_is_not_true():
    assert not adce.holds("length(plays) > `100`", {}, {"no": "plays"})


WHOLE = b'{"id": "7", "plays": [1, 2]}'


@pytest.mark.parametrize(
    ("rules", "body", "verdict"),
    [
        ({}, b"x", None),
        ({}, b"", "0 bytes, fewer than 1"),
        ({"min_bytes": 100}, WHOLE, "28 bytes, fewer than 100"),
        ({"json": True}, WHOLE, None),
        ({"json": True}, b"<html>", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ({"json": True}, b'{"a": NaN}', "not JSON: NaN is not JSON"),
        (
            {"json": True},
            b"[" * 100_000,
            "not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
        ),
        ({"require": ("id == '{game_id}'",)}, WHOLE, None),
        ({"require": ("id == '8'",)}, WHOLE, "require is not true: id == '8'"),
        ({"require": ("id == '8' || no || plays",)}, WHOLE, None),
        ({"contains": ("plays", "{game_id}")}, WHOLE, None),
        ({"contains": ("goals",)}, WHOLE, "does not contain 'goals'"),
        ({"not_contains": ("plays",)}, WHOLE, "contains 'plays'"),
        ({"starts_with_hex": "7b", "ends_with_hex": "7d"}, WHOLE, None),
        ({"starts_with_hex": "50415231"}, WHOLE, "its first or last bytes are not those of its format"),
    ],
)
def test_body_is_judged_by_each_rule(rules, body, verdict):
    inspection = adce.inspect(dataset(validate=adce.Validation(**rules)), {"game_id": "7"}, body)
    assert (inspection.valid, inspection.verdict) == (verdict is None, verdict)


@pytest.mark.parametrize(
    ("key", "rules", "is_whole"),
    [
        ("a.json", {"json": True}, False),
        ("a.json", {"require": ("id == '7'",)}, False),
        ("a.json", {"json": True, "gzip": True}, True),
        ("a.json.GZ", {"json": True}, True),
        ("{game_id}", {"json": True}, True),
    ],
)
def test_gzip_is_json_only_where_gzip_is_expected(key, rules, is_whole):
    packed = dataset(key=adce.Template(key), validate=adce.Validation(**rules))
    assert adce.inspect(packed, {"game_id": "7.gz"}, gzip.compress(WHOLE)).valid == is_whole


def test_body_is_settled_when_its_until_holds():
    until = adce.Freshness(until="length(events[?!done]) == `0`")
    bodies = [b'{"events": [{"done": true}, {}]}', b'{"events": [{"done": true}]}', b'{"events": []}', b"[]"]
    assert [adce.inspect(dataset(freshness=until), {}, body).settled for body in bodies] == [False, True, True, False]


def test_ids_are_texts_without_repeats_and_nothing_else():
    body = json.dumps({"ids": ["7", 8, "7", "", None, True, 1.5, {}, ["9"], "0022400561"]}).encode()
    found = adce.inspect(dataset(), {}, body, [child(ids="ids")])
    assert list(found.mentions.values()) == [("7", "8", "0022400561")]


def test_ids_may_come_from_a_pattern_over_the_text():
    body = b'<a href="/box/201701010ATL.html"><a href="/box/201701010ATL.html"><a href="/other">'
    found = adce.inspect(dataset(), {}, body, [child(regex=r"/box/(\d{9}[A-Z]{3})\.html")])
    assert list(found.mentions.values()) == [("201701010ATL",)]


def test_expressions_may_name_fields_of_their_object_and_ids_those_of_the_parent():
    live = adce.Live("now == '{team}'", 60)
    one = dataset(freshness=adce.Freshness(until="over == '{date}'", live=live))
    body = b'{"now": "ATL", "over": "2024-12-15", "games": [{"day": "2024-12-15", "id": "7"}, {"day": "x", "id": "8"}]}'
    ids = "games[?day == '{date}'].id"
    found = adce.inspect(one, {"date": "2024-12-15", "team": "ATL"}, body, [child(ids=ids)])
    assert (found.settled, found.live, found.mentions) == (True, True, {ids: ("7",)})
    other = adce.inspect(one, {"date": "2024-12-16", "team": "BOS"}, body, [child(ids=ids)])
    assert (other.settled, other.live, other.mentions) == (False, False, {ids: ()})


def test_body_that_is_not_valid_names_no_children():
    rules = adce.Validation(json=True, require=("final",))
    assert adce.inspect(dataset(validate=rules), {}, b'{"ids": ["7"]}', [child(ids="ids")]).mentions == {}


def facts(**changes) -> adce.ObjectRow:
    given = {"size": 500, "etag": "a", "modified_at": int(NOON), "day": "2025-01-14", **changes}
    return adce.ObjectRow(fields_json=json.dumps({"date": given["day"]}), **given)


def state(one: adce.Dataset, known: adce.ObjectRow, now: float = NOON) -> adce.Appraisal:
    return adce.appraise(one, SEASONS[1], known, now)


def test_object_that_is_not_there_is_missing_once_it_is_available():
    known = adce.ObjectRow(available_at=int(NOON) + 60)
    assert state(dataset(), known) == adce.Appraisal(adce.ObjectState.AWAITED, next_at=int(NOON) + 60)
    assert state(dataset(), known, NOON + 60).state == "missing"


def test_object_that_nobody_looked_for_is_awaited():
    assert state(dataset(), adce.ObjectRow(proven=False)).state == "awaited"


def test_object_that_fails_its_validation_is_suspect_with_the_reason():
    known = facts(verdict="not JSON")
    assert (state(dataset(), known).state, state(dataset(), known).reason) == ("suspect", "not JSON")
    assert state(dataset(validate=adce.Validation(min_bytes=501)), facts()).state == "suspect"


def test_object_that_is_not_final_is_stale_until_it_is():
    one = dataset(freshness=adce.Freshness(refetch_every=6 * HOUR, until="done"))
    waiting = state(one, facts(settled=False))
    assert (waiting.state, waiting.next_at) == ("stale", int(NOON) + 6 * HOUR)
    assert state(one, facts(settled=True), NOON + 1000 * DAY).state == "present"


@given(st.integers(0, 30 * DAY))
def test_object_is_stale_from_the_very_second_its_refetch_is_due(age):
    one = dataset(freshness=adce.Freshness(refetch_every=7 * DAY))
    verdict = state(one, facts(), NOON + age)
    assert verdict.state == ("stale" if age >= 7 * DAY else "present")
    assert verdict.next_at == int(NOON) + 7 * DAY


def test_refetch_once_happens_once_so_long_after_the_end_of_its_day():
    one = dataset(freshness=adce.Freshness(refetch_once_after=(36 * HOUR,)))
    due = adce.instant_of(datetime.date(2025, 1, 15), datetime.time(), "UTC") + 36 * HOUR
    assert state(one, facts()).next_at == due
    assert state(one, facts(), due).state == "stale"
    assert state(one, facts(modified_at=due), due + 1) == adce.Appraisal(adce.ObjectState.PRESENT)


def test_refetches_of_a_list_happen_once_each_also_of_a_final_object():
    one = dataset(freshness=adce.Freshness(refetch_once_after=(36 * HOUR, 7 * DAY), until="final"))
    end = adce.instant_of(datetime.date(2025, 1, 15), datetime.time(), "UTC")
    last, looks = int(NOON), []
    while (next_at := state(one, facts(modified_at=last, settled=1)).next_at) is not None:
        looks.append(next_at - end)
        last = next_at
    assert looks == [36 * HOUR, 7 * DAY]


def test_object_of_a_past_season_that_was_fetched_before_its_end_is_fetched_again():
    one = dataset(freshness=adce.Freshness(current=DAY))
    over = adce.instant_of(datetime.date(2025, 6, 23), datetime.time(), "UTC")
    assert state(one, facts(modified_at=over - 1), over).state == "stale"
    assert state(one, facts(modified_at=over), over + 1000 * DAY).state == "present"


def test_object_without_season_and_day_is_not_refetched_by_the_season():
    one = dataset(freshness=adce.Freshness(current=DAY, past=7 * DAY))
    verdict = adce.appraise(one, None, facts(day=None), NOON + 1000 * DAY)
    assert verdict == adce.Appraisal(adce.ObjectState.PRESENT)


@pytest.mark.parametrize(
    ("day", "season", "priority"),
    [
        ("2025-01-10", "2024-25", "CRITICAL"),
        ("2025-01-07", "2024-25", "HIGH"),
        (None, "2024-25", "HIGH"),
        ("2024-01-10", "2023-24", "MEDIUM"),
        (None, "2019-20", "LOW"),
        (None, None, "LOW"),
    ],
)
def test_automatic_priority_follows_the_age_of_the_date_then_of_the_season(day, season, priority):
    row, today = adce.ObjectRow(day=day, season=season), datetime.date(2025, 1, 15)
    assert adce.priority_of(row, dataset(calendar=SEASONS), today, 7) == priority
    assert adce.priority_of(row, dataset(priority="LOW"), today, 7) == "LOW"


@pytest.mark.parametrize(("day", "can"), [("2025-01-08", True), ("2025-01-07", False), (None, True)])
def test_what_is_old_will_not_appear_any_more(day, can):
    assert adce.may_still_appear(dataset(), SEASONS[1], facts(day=day), NOON) is can
    assert not adce.may_still_appear(dataset(), SEASONS[0], facts(day=None), NOON)


def test_month_that_goes_on_may_still_appear():
    monthly = dataset(dates=adce.Dates(every="month"))
    assert adce.may_still_appear(monthly, None, facts(day="2025-01-01"), NOON)
    assert not adce.may_still_appear(monthly, None, facts(day="2024-12-01"), NOON)


@pytest.mark.parametrize(
    ("every", "date", "end"),
    [
        ("hour", "2025-01-15T23:00", "2025-01-16T05:00:00Z"),
        ("day", "2025-01-15", "2025-01-16T05:00:00Z"),
        ("week", "2025-01-13", "2025-01-20T05:00:00Z"),
        ("month", "2025-01-01", "2025-02-01T05:00:00Z"),
        ("quarter", "2025-01-01", "2025-04-01T04:00:00Z"),
        ("year", "2025-01-01", "2026-01-01T05:00:00Z"),
    ],
)
def test_object_is_as_old_as_the_end_of_its_step(every, date, end):
    one = dataset(dates=adce.Dates(every=every, timezone="America/New_York"))
    assert adce.utc_text(adce.end_of_step(one, {"date": date})) == end
    known = facts(day=date[:10])._replace(fields_json=json.dumps({"date": date}), modified_at=0)
    due = state(dataset(dates=one.dates, freshness=adce.Freshness(refetch_once_after=(HOUR,))), known, 0)
    assert due.next_at == adce.end_of_step(one, {"date": date}) + HOUR
