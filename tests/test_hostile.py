"""What a source, another account of the machine or a foreign configuration may try."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sqlite3
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import run_adce, start_adce
from runners import rows, stopped, wait_until, write_box
from upstream import Answer, Upstream, json_answer

import adce

SHIPPED = re.search(r"regex: '(data-stat[^\n]+?)', as", (Path(adce.__file__ or "").parent / "adce.yaml").read_text())
FAMILY = """\
retry: {{max_attempts: 2, initial_delay_seconds: 0.1}}
{more}
sources: {{box: {{base_url: "{address}"}}, other: {{base_url: "{address}"}}}}
datasets:
  page: {{source: box, key: page, url: /page, partitions: {{values: {{}}}}}}
  named: {{source: box, key: "named/{{id}}", {way}, partitions: {{from: page, {ids}, as: id}}}}
"""


def write_family(
    folder: Path, address: str, *, ids: str = "ids: ids", way: str = 'url: "/x/{id}"', more: str = ""
) -> None:
    (folder / "adce.yaml").write_text(FAMILY.format(address=address, ids=ids, way=way, more=more))


def test_page_that_a_regular_expression_searches_for_ever_stops_nothing(upstream, tmp_path):
    assert SHIPPED
    upstream.answer("/page", Answer(b'data-stat="box_score_text"' * 60_000))
    write_family(
        tmp_path, upstream.address, ids=f"regex: '{SHIPPED[1]}'", more="health_check: {enabled: true, port: 0}"
    )
    process = start_adce("run", folder=tmp_path)
    wait_until(upstream.count)
    (address,) = wait_for_address(tmp_path)
    longest, until = 0.0, time.monotonic() + 3
    while time.monotonic() < until:
        began = time.monotonic()
        urllib.request.urlopen(f"{address}health", timeout=30).read()
        longest = max(longest, time.monotonic() - began)
    assert longest < 1
    process.terminate()
    began = time.monotonic()
    assert stopped(process)[0] == 0
    assert time.monotonic() - began < 5
    assert rows(tmp_path, "select outcome from attempts order by 1") == [("lost",)]


def wait_for_address(folder: Path) -> tuple[str]:
    wait_until(lambda: rows(folder, "select address from runner where address is not null"))
    return rows(folder, "select address from runner")[0]


def test_content_that_takes_too_long_or_too_much_memory_is_invalid_and_the_next_is_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(adce, "APART_SECONDS", 1)
    monkeypatch.setattr(adce, "LEAST_MEMORY", 300 << 20)
    monkeypatch.setattr(adce, "MEMORY_FACTOR", 0)
    (tmp_path / "body").write_bytes(b"[" + b",".join([b"[]"] * 8_000_000) + b"]")
    page = adce.Dataset("page", "box", adce.Template("page"), validate=adce.Validation(json=True))
    with (tmp_path / "body").open("rb") as body:
        found = adce.inspect_apart(page, {}, body, (), None)
    assert found.verdict in ("its inspection takes more than 300 MB of memory", "its inspection takes more than 1 s")
    partitions = adce.Partitions(parents=("page",), regex="(a+)+b", id_field="id")
    child = adce.Dataset("named", "box", adce.Template("{id}"), partitions)
    parent, verdicts = adce.Dataset("page", "box", adce.Template("page")), []
    for text in (b"a" * 60, b"ab"):
        (tmp_path / "body").write_bytes(text)
        with (tmp_path / "body").open("rb") as body:
            found = adce.inspect_apart(parent, {}, body, (child,), None)
        verdicts.append((found.verdict, dict(found.mentions)))
    assert verdicts == [("its inspection takes more than 1 s", {}), (None, {"regex (a+)+b": ("a",)})]


def test_inspector_that_something_kills_is_started_again(tmp_path):
    for _ in range(3):
        assert adce.is_found_apart("", "a+", "ab")
        process = adce.inspector()._process
        assert process
        process.kill()


def test_slow_start_of_the_inspector_is_not_held_against_the_content(monkeypatch):
    adce.inspector().end()
    monkeypatch.setattr(adce, "APART_SECONDS", 1)
    monkeypatch.setattr(adce, "INSPECTOR", "import time; time.sleep(1.5); " + adce.INSPECTOR)
    assert adce.is_found_apart("", "a+", "ab")


def test_source_that_outlasts_the_inspector_gets_one_of_its_own_and_is_paused(monkeypatch, database):
    monkeypatch.setattr(adce, "APART_SECONDS", 1)
    costly, other = (adce.Source(name, blocked_when=adce.BlockedWhen(body="(a+)+b")) for name in ("costly", "other"))
    adce.inspector().costly.discard("costly")
    results = [adce.classify(costly, 200, {}, b"a" * 60) for _ in range(3)]
    assert {(one.outcome, one.error) for one in results} == {
        (adce.Outcome.INVALID, "its inspection takes more than 1 s")
    }
    held = threading.Thread(target=adce.classify, args=(costly, 200, {}, b"a" * 60))
    monkeypatch.setattr(adce, "APART_SECONDS", 5)
    held.start()
    began = time.monotonic()
    simple = adce.Source("simple", blocked_when=adce.BlockedWhen(body="(?i)too many"))
    assert adce.classify(other, 200, {}, b"ab").outcome is adce.Outcome.THROTTLED
    assert adce.classify(simple, 200, {}, b"Too many").outcome is adce.Outcome.THROTTLED
    assert (time.monotonic() - began < 4, held.is_alive()) == (True, True)
    adce.inspector("costly").end()
    held.join()
    with database.transaction() as sql:
        adce.declare_limits(sql, adce.Configuration(sources={"costly": costly}), adce.Clock())
        pauses = [adce.record_response(sql, costly, one, 1.0).pause_seconds for one in results]
    assert pauses == [None, None, adce.FIRST_PAUSE_SECONDS]


def test_body_that_is_searched_for_signs_of_a_block_for_ever_is_invalid(monkeypatch):
    monkeypatch.setattr(adce, "APART_SECONDS", 1)
    source = adce.Source("box", blocked_when=adce.BlockedWhen(body="(a+)+b"))
    result = adce.classify(source, 200, {}, b"a" * 60)
    assert (result.outcome, result.error) == (adce.Outcome.INVALID, "its inspection takes more than 1 s")
    assert adce.classify(source, 200, {}, b"ab").outcome is adce.Outcome.THROTTLED


PRIVATE = ["127.0.0.1", "2130706433", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "localhost"]


@pytest.mark.parametrize(("host", "end"), [*((host, "") for host in PRIVATE), ("127.0.0.1", "\\@{known}/..")])
def test_redirect_to_a_private_address_gets_no_request_under_any_name(host, end, upstream, tmp_path):
    with Upstream() as inner:
        place = inner.address.rpartition(":")[2] + end.format(known=upstream.address.removeprefix("http://"))
        upstream.answer("/A", Answer(b"", 302, {"Location": f"http://{host}:{place}/secret"}))
        write_box(tmp_path, address=upstream.address, more="retry: {max_attempts: 1}")
        assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
        assert inner.count() == 0
    error = rows(tmp_path, "select outcome, error from attempts")
    assert [(outcome, "a private address, which is refused" in text) for outcome, text in error] == [
        ("http_error", True)
    ]


def test_redirect_of_a_session_to_a_private_address_gets_no_request(upstream, tmp_path, monkeypatch):
    (tmp_path / "adce.yaml").write_text(f"sources: {{box: {{base_url: '{upstream.address}'}}}}\ndatasets: {{}}\n")
    monkeypatch.chdir(tmp_path)
    with Upstream() as inner, contextlib.closing(adce.shared_limiter().database), adce.session("box") as session:
        upstream.answer("/A", Answer(b"", 302, {"Location": f"{inner.address}/secret"}))
        upstream.answer("/B", Answer(b"", 302, {"Location": "/C"}))
        for _ in range(2):
            with pytest.raises(adce.Error, match="a private address, which is refused"):
                session.get("/A")
        assert inner.count() == 0
        assert session.get("/B").url == f"{upstream.address}/C"
        assert session.get(f"{inner.address}/secret").status_code == 404  # the program's own choice
    adce._limiter_of.cache_clear()


def test_address_that_stands_for_another_is_judged_by_that():
    public = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
    special = [
        "169.254.1.1",
        "100.64.0.1",
        "224.0.0.1",
        "fec0::1",
        "fe80::1%eth0",
        "fd00::1",
        "ff0e::1",
        "::1",
        "::7f00:1",
        "::ffff:7f00:1",
    ]
    special += [
        "fd00::1",
        "ff0e::1",
        "::1",
        "::7f00:1",
        "::ffff:7f00:1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::808:808",
        "2002:7f00:1::1",
    ]
    assert list(filter(adce._is_public, public + special)) == public


def test_redirect_to_a_host_of_the_configuration_is_followed_whatever_its_address(upstream, tmp_path):
    with Upstream() as other:
        other.answer("/here", Answer(b"whole"))
        upstream.answer("/A", Answer(b"", 302, {"Location": f"{other.address}/here"}))
        write_box(tmp_path, address=upstream.address)
        text = (tmp_path / "adce.yaml").read_text()
        more = f'sources: {{other: {{base_url: "{other.address}"}}, box:'
        (tmp_path / "adce.yaml").write_text(text.replace("sources: {box:", more))
        assert run_adce("run", "--once", folder=tmp_path).returncode == 0
        assert other.count("/here") == 1


IDS = ["-rf", "a,b", "good"]


@pytest.mark.parametrize(
    ("words", "good"), [(', "{id}"', ["a,b", "good"]), (', --, "{id}"', ["-rf", "a,b", "good"]), (', "--id={id}"', IDS)]
)
def test_id_that_would_be_an_option_is_refused_unless_a_word_says_otherwise(words, good, upstream, tmp_path):
    upstream.answer("/page", json_answer({"ids": IDS}))
    way = (
        "command: [python, -c, \"import os, sys; open(os.environ['ADCE_OUTPUT'], 'w').write(sys.argv[-1])\""
        + words
        + "]"
    )
    write_family(tmp_path, upstream.address, way=way)
    run_adce("run", "--once", folder=tmp_path)
    found = [row[0] for row in rows(tmp_path, "select key from objects_now where state = 'present'")]
    assert sorted(found) == sorted(["page", *(f"named/{one}" for one in good)])


BATCH = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["ADCE_OUTPUT"], "named", "x")
folder.mkdir(parents=True)
for name in sys.argv[1].split(","):
    (folder / name).write_text(name)
"""


def test_value_with_a_comma_is_never_one_of_several(upstream, tmp_path):
    upstream.answer("/page", json_answer({"ids": ["a,b", "c", "d"]}))
    (tmp_path / "batch.py").write_text(BATCH)
    way = 'command: [python, batch.py, "{ids}"], batch: {group_by: kind}'
    write_family(tmp_path, upstream.address, way=way)
    file = tmp_path / "adce.yaml"
    text = file.read_text().replace("from: page,", "values: {kind: [x]}, from: page,")
    file.write_text(text.replace('key: "named/{id}"', 'key: "named/{kind}/{id}"'))
    run_adce("run", "--once", folder=tmp_path)
    assert rows(tmp_path, "select key, task_state from gaps") == [("named/x/a,b", "retry")]
    assert "has a comma" in rows(tmp_path, "select last_error from queue")[0][0]


def test_no_cell_of_a_csv_is_a_formula_or_holds_an_escape(upstream, tmp_path):
    upstream.answer("/page", json_answer({"ids": ["=1+1", "@SUM(1)", "+1", "-1", "fine"]}))
    write_family(tmp_path, upstream.address)
    file = tmp_path / "adce.yaml"
    file.write_text(file.read_text().replace('key: "named/{id}"', 'key: "{id}"'))
    run_adce("run", "--once", folder=tmp_path)
    text = run_adce("--format", "csv", "tasks", folder=tmp_path).stdout
    keys = {row["key"] for row in csv.DictReader(io.StringIO(text))}
    assert keys == {"'=1+1", "'@SUM(1)", "'+1", "'-1", "fine"}
    assert adce.render([adce.Section("x", "X", [{"a": "\x1b[31mred", "b": -1}])], "csv") == "a,b\n?[31mred,-1"


def test_json_shows_no_control_characters_and_keeps_them():
    rows = [{"a": "\x9b31m\u202e\x1b\U000e0001ä\n"}]
    text = adce.render([adce.Section("x", "X", rows)], "json")
    assert (text.replace("\n", "").isprintable(), "ä" in text, json.loads(text)) == (True, True, rows)


@pytest.mark.parametrize("words", [["check"], ["--format", "json", "plan"]])
def test_message_about_a_configuration_holds_no_escape(words, tmp_path):
    write_box(tmp_path)
    with (tmp_path / "adce.yaml").open("a") as file:
        file.write('"\\e]0;evil\\a\\x9b31m\\u202e": 1\n')
    done = run_adce(*words, folder=tmp_path)
    assert (done.returncode, "evil" in done.stderr) == (adce.ExitCode.BAD_CONFIGURATION, True)
    assert done.stderr.replace("\n", "").isprintable()


def run_after(planted: str, folder: Path, address: str) -> subprocess.CompletedProcess[str]:
    """A second run, whose database another program has changed with SQL."""
    write_box(folder, address=address)
    run_adce("run", "--once", folder=folder)
    with sqlite3.connect(folder / "adce.db") as sql:
        sql.executescript(planted)
    return run_adce("run", "--once", folder=folder)


@pytest.mark.parametrize(
    "planted",
    [
        "create trigger evil after insert on attempts begin delete from counts; end",
        "drop trigger objects_counted_in; create trigger objects_counted_in after insert on facts begin select 1; end",
        "drop index objects_pending; create index objects_pending on objects (key)",
        "create index evil on attempts (abs(attempt_id))",
        "create table evil (a references objects on delete restrict)",
        """
        create index evil on attempts (abs(attempt_id));
        pragma writable_schema = on;
        update sqlite_schema set sql = cast(sql as blob) where name = 'evil'
        """,
    ],
)
def test_database_with_a_planted_definition_is_not_used(planted, upstream, tmp_path):
    done = run_after(planted, tmp_path, upstream.address)
    assert (done.returncode, "another program has changed the" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(
    "planted",
    [
        "delete from facts",
        "update facts set wanted_cycle = 'nope'",
        "update facts set wanted_cycle = '{\"evil\": 1}'",
        "update objects set task = 'pending', next_at = 0, fields = 'nope'",
        "update objects set task = 'pending', next_at = 0, fields = '[1]'",
        "update objects set task = 'pending', next_at = 0, fields = '{}'",
        "update objects set task = 'pending', next_at = 0, fields = '{\"name\": 5}'",
        "update objects set task = 'pending', next_at = 0, day = '99999-99-99'",
    ],
)
def test_content_that_cannot_be_read_is_an_error_of_the_database(planted, upstream, tmp_path):
    done = run_after(planted, tmp_path, upstream.address)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert re.search("adce.py: (.*/adce.db: |an object in the database has no name)", done.stderr)


@pytest.mark.parametrize("make", [os.mkfifo, lambda place: place.write_text("mine\n")])
def test_planted_name_of_a_log_is_no_option_and_no_pipe(make, upstream, tmp_path):
    write_box(tmp_path, address=upstream.address)
    run_adce("run", "--once", folder=tmp_path)
    with sqlite3.connect(tmp_path / "adce.db") as sql:
        sql.execute("update runner set log = '--version'")
    make(tmp_path / "--version")
    done = run_adce("logs", folder=tmp_path)
    assert done.stdout == "mine\n" or "kept no log" in done.stderr


def test_planted_view_is_replaced_and_a_view_of_the_user_stays(upstream, tmp_path):
    upstream.answer("/A", Answer(b"whole"))
    write_box(tmp_path, address=upstream.address)
    run_adce("run", "--once", folder=tmp_path)
    with sqlite3.connect(tmp_path / "adce.db") as sql:
        sql.executescript(
            "drop view coverage; create view coverage as select 1 as one; create view mine as select 2 as two"
        )
    assert json.loads(run_adce("--format", "json", "coverage", folder=tmp_path).stdout)[0]["present"] == 1
    assert rows(tmp_path, "select two from mine") == [(2,)]


def make_linked(place: Path) -> None:
    place.symlink_to("victim")


@pytest.mark.parametrize("ending", ["", ".lock", ".log", "-journal", "-wal", "-shm", "-output"])
@pytest.mark.parametrize("make", [make_linked, os.mkfifo, Path.mkdir])
def test_what_is_no_file_in_place_of_one_beside_the_database_is_refused_at_once(ending, make, tmp_path):
    write_box(tmp_path, address="http://127.0.0.1:1")
    (tmp_path / "victim").write_text("precious")
    place = tmp_path / f"adce.db{ending}"
    if ending == "-output":
        make = Path.touch if make is Path.mkdir else make
    make(place)
    what = "folder" if ending == "-output" else "regular file"
    for words in (["status"], ["run", "--once"], ["stop"]):
        done = run_adce(*words, folder=tmp_path)
        assert (done.returncode, f"{place} is not a {what}" in done.stderr) == (1, True), done.stderr
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("make", [make_linked, os.mkfifo, Path.mkdir])
def test_what_is_no_file_in_place_of_the_log_is_refused_at_once(make, tmp_path):
    write_box(tmp_path, address="http://127.0.0.1:1")
    (tmp_path / "victim").write_text("precious")
    make(tmp_path / "run.log")
    assert "cannot write to" in run_adce("run", "--once", "--log", "run.log", folder=tmp_path).stderr
    assert (tmp_path / "victim").read_text() == "precious"


def test_tree_that_is_deeper_than_any_key_ends_no_listing(upstream, tmp_path):
    upstream.answer("/A", Answer(b"whole"))
    write_box(tmp_path, address=upstream.address)
    run_adce("run", "--once", folder=tmp_path)
    here = os.open(tmp_path / "lake/things", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("a", dir_fd=here)
        below = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    done = run_adce("run", "--once", folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    os.system(f"rm -rf {tmp_path}/lake")  # too deep for shutil


def test_header_that_a_source_repeats_is_not_kept(upstream, tmp_path):
    upstream.route("/A", lambda *_: Answer(f"bad key {upstream.arrivals[-1].headers['Authorization']}".encode(), 403))
    write_box(tmp_path, address=upstream.address)
    text = (tmp_path / "adce.yaml").read_text()
    more = 'timeout_seconds: 60, headers: {Authorization: "Bearer C4N4RYhdr"}'
    (tmp_path / "adce.yaml").write_text(
        text.replace("timeout_seconds: 60", more).replace('url: "/{name}"', 'url: "/{name}?api_key=C4N4RYurl"')
    )
    upstream.route("/A", lambda *_: Answer(f"bad key {upstream.arrivals[-1].headers['Authorization']}".encode(), 403))
    told = run_adce("run", "--once", folder=tmp_path).stderr
    assert "bad key Bearer ***" in told
    assert not any(b"C4N4RY" in file.read_bytes() for file in tmp_path.glob("adce.db*"))


def test_address_on_another_host_that_a_parent_names_gets_no_request(upstream, tmp_path):
    with Upstream() as evil:
        links = [f"{evil.address}/a", f"{upstream.address}/b%20c", "../d"]
        upstream.answer("/page", json_answer({"ids": links}))
        upstream.answer("/b%20c", Answer(b"whole"))
        write_family(tmp_path, upstream.address, way='url: "{id:url}"')
        assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
        errors = rows(tmp_path, "select last_error from queue order by last_error")
        assert run_adce("try", "named", f"id={links[0]}", folder=tmp_path).returncode == adce.ExitCode.ERROR
        assert (evil.count(), upstream.count()) == (0, 2)
    host = evil.address.removeprefix("http://")
    assert [error for (error,) in errors] == [
        f"its parent names {host}, another host",
        "its parent names an address with . or .. in its path",
    ]
    assert rows(tmp_path, "select outcome from attempts where outcome = 'ok'") == [("ok",)] * 2


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("""s: {base_url: "ftp://u:C4N4RY@h/x"}""", "ftp://u:***@h/x"),
        ("""s: {headers: {Authorization: "Bearer C4N4RY"}, base_ur: x}""", 'Authorization: "***'),
        ("""s: {headers: {'X-Api-Key': C4N4RY}, base_ur: x}""", "'X-Api-Key': ***"),
        ("""s: {base_url: "https://h/x?token=C4N4RY#"}""", "token=***"),
        ("""s: {headers: {Authorization: "it's C4N4RY"}, base_ur: x}""", 'Authorization: "***"'),
        ("""s: {base_url: "ftp://u:a@C4N4RY@h/x"}""", "ftp://u:***@h/x"),
        ("""s: {base_url: "ftp://C4N4RY@h/x?key=C4N4RY&sig=C4N4RY"}""", "ftp://***@h/x?key=***&sig=***"),
    ],
)
def test_message_about_a_mistake_does_not_repeat_a_secret(line, shown, configure):
    with pytest.raises(adce.ConfigurationError) as raised:
        configure(f"sources:\n  {line}\n")
    assert "C4N4RY" not in str(raised.value)
    assert shown in str(raised.value)


@pytest.mark.parametrize("literal", ["`{id}`", "'{id}'", '"{id}"', '`"{id}"`', "{id}", "`[{id}]`[0]"])
def test_id_cannot_leave_the_literal_of_an_expression(literal):
    evil = ["1` || `true", "1' || '1", '1" || "x', *"\"`'\\", "\\'", "\\`", '\\"', "1 || x", "null", "true", "[]"]
    assert not [one for one in evil if adce.holds(f"id == {literal}", {"id": one}, {"id": "other", "x": 1})]
    is_json = literal in ("`{id}`", "`[{id}]`[0]")
    for value in ["abc"] if literal == "{id}" else ["7", "-7", "abc", "a`b", 'a"b', "1e5", "007"]:
        found = int(value) if is_json and value[-2:].lstrip("-") == "7" else value
        assert adce.holds(f"id == {literal}", {"id": value}, {"id": found, value: found}), value


@pytest.mark.parametrize("part", ["a", "token", "token='", '://a:"', "://a@", "pwd" + " " * 9, "?key=", ":", '"'])
def test_secrets_are_looked_for_in_a_time_that_grows_with_the_text(part):
    began = time.process_time()
    adce.masked(part * 50_000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("where", ["next", "redirect"])
def test_url_that_is_too_long_is_not_asked_for(where, upstream, tmp_path):
    path = "/" + "a" * adce.MAX_URL
    answer = json_answer({"next": path}) if where == "next" else Answer(b"", 302, {"Location": path})
    upstream.answer("/A", answer)
    write_box(tmp_path, address=upstream.address, more="retry: {max_attempts: 1}")
    text = (tmp_path / "adce.yaml").read_text()
    (tmp_path / "adce.yaml").write_text(
        text.replace('key: "things/{name}', 'pages: {next: next}, key: "things/{name}-{page}')
    )
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
    assert upstream.count() == 1


@pytest.mark.parametrize(
    ("key", "value"), [("database", '"a\\0b"'), ("store", '"a\\0b"'), ("store", "~nobodyatall/x"), ("store", '"a\\nb"')]
)
def test_path_that_no_file_can_have_is_a_mistake_in_the_configuration(key, value, configure):
    with pytest.raises(adce.ConfigurationError) as raised:
        configure(f"{key}: {value}\nsources: {{}}\n")
    assert f"{key}: " in str(raised.value)
