"""Lists that a source sends in pages: every page is an object, and every item on them is found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_adce, start_adce
from runners import rows, stopped, wait_until
from upstream import Answer, Upstream, json_answer

import adce

SIZE = 3
WAYS = {
    "header": 'url: "/header?kind={kind}", pages: {next: link}',
    "address": 'url: "/address?kind={kind}", pages: {next: links.next}',
    "cursor": 'url: "/cursor?kind={kind}&from={next}", pages: {next: cursor}',
    "standing": 'url: "/standing?kind={kind}", pages: {next: cursor, url: "/standing?kind={kind}&from_cursor={next}"}',
    "token": 'url: "/token?kind={kind}", pages: {next: "<token[^>]*>([^<]+)<", url: "/token?resume={next}"}',
    "number": f'url: "/number?kind={{kind}}&page={{page}}", pages: {{last: total, size: {SIZE}}}',
    "offset": f'url: "/offset?kind={{kind}}&start={{offset}}", pages: {{last: total, size: {SIZE}}}',
    "offset_until_empty": f"""url: "/offset_until_empty?kind={{kind}}", pages: {{next: items, size: {SIZE},
           url: "/offset_until_empty?kind={{kind}}&start={{offset}}"}}""",
    "until_empty": 'url: "/until_empty?kind={kind}&page={page}", pages: {next: items}',
    "posted": """url: "/posted", method: POST, pages: {next: cursor},
           body: '{"kind": "{kind}", "after": {next:json}}'""",
}
LAKE = """\
retry: {{max_attempts: 3, initial_delay_seconds: 0.1, max_delay_seconds: 0.2}}
sources: {{box: {{base_url: "{address}", headers: {{X-Key: $BOX_KEY}}}}}}
datasets:
  lists: {{source: box, key: "lists/{{kind}}/{{page}}.json", {way}, partitions: {{values: {{kind: [a, b]}}}}{more}}}
  items: {{source: box, key: "items/{{id}}.json", url: "/item?id={{id}}",
          partitions: {{from: lists, regex: '"id": "(\\w+)"', as: id}}}}
"""


class Source:
    """Lists of items, in pages, in all the ways of naming the next one."""

    def __init__(self, upstream: Upstream, count: int = 7) -> None:
        self.upstream, self.count, self.generation = upstream, count, 0
        self.tokens: dict[str, tuple[str, int]] = {}
        self.standing: dict[str, int] = {}  # pages that a cursor has brought, which is the same all the time
        self.before_page: Callable[[int], None] = lambda page: None
        for way in WAYS:
            upstream.route(f"/{way}", lambda path, query: self.page(path[1:], query))
        upstream.route("/item", lambda _, query: json_answer({"item": query["id"]}))

    def page(self, way: str, query: dict[str, str]) -> Answer:
        if way == "posted":
            asked = json.loads(self.upstream.arrivals[-1].body)
            query = {"kind": asked["kind"], "from": asked["after"]}
        if "resume" in query and query["resume"] not in self.tokens:
            return Answer(b"<error>this token has expired</error>", 400)
        kind, page = self.tokens[query["resume"]] if "resume" in query else (query["kind"], int(query.get("page", 1)))
        page = int(query["from"]) // SIZE + 1 if query.get("from") else page
        page = int(query["start"]) // SIZE + 1 if query.get("start") else page
        if way == "standing":
            page = self.standing[kind] = self.standing.get(kind, 0) + 1 if "from_cursor" in query else 1
        self.before_page(page)
        found = [{"id": f"{kind}{number}"} for number in range(self.count)][SIZE * page - SIZE : SIZE * page]
        is_last = SIZE * page >= self.count
        following = f"/{way}?kind={kind}&page={page + 1}"
        body: dict[str, object] = {"items": found}
        if way == "header":
            address = f"{self.upstream.address}{following}"
            links = (
                {} if is_last else {"Link": f'<{address}>; rel="Next last", <{self.upstream.address}/>; rel="first"'}
            )
            return Answer(json.dumps(body).encode(), headers=links)
        if way == "token":
            token = f"{kind}|{page + 1}|{self.generation}"
            self.tokens |= {} if is_last else {token: (kind, page + 1)}
            more = "" if is_last else f"<token left='?'>{token}</token>"
            return Answer(f"{json.dumps(body)}{more}".encode())
        cursor = "standing" if way == "standing" else SIZE * page
        total = {"total": self.count}
        body |= {
            "address": {"links": {"next": None if is_last else following}},
            "number": total,
            "offset": total,
        }.get(way, {"cursor": None if is_last else cursor})
        return json_answer(body)

    def expire(self) -> None:
        """No token of before is known any more."""
        self.generation += 1
        self.tokens.clear()


@pytest.fixture
def source(upstream) -> Source:
    return Source(upstream)


def write_lake(folder: Path, upstream: Upstream, way: str, more: str = "") -> None:
    text = LAKE.format(address=upstream.address, way=WAYS.get(way, way), more=more)
    (folder / "adce.yaml").write_text(text, encoding="utf-8")


def run(folder: Path) -> int:
    return run_adce("run", "--once", folder=folder, BOX_KEY="s3cret").returncode


def run_to_the_end(folder: Path, asked_again: int = 8) -> int:
    """Runs until nothing is left to retry."""
    code = run(folder)
    for _ in range(asked_again):
        if not rows(folder, "select 1 from queue where state = 'retry'"):
            break
        wait_until(lambda: not rows(folder, "select 1 from objects where task = 'retry' and next_at > unixepoch()"))
        code = run(folder)
    return code


def run_when_due(folder: Path) -> None:
    """Runs when every page that is fetched again each second is due."""
    latest = "select 1 from (select max(modified_at) as last from objects) where last < unixepoch() - 1"
    wait_until(lambda: rows(folder, latest))
    run(folder)


def expected(folder: Path, dataset: str) -> list[str]:
    found = rows(folder, f"select key from objects_now where state = 'present' and dataset = '{dataset}'")
    return sorted(key.partition("/")[2].removesuffix(".json") for (key,) in found)


def pages_of(count: int, way: str = "") -> list[str]:
    most = max(1, -(-count // SIZE)) + (way.endswith("until_empty") and count > 0)
    return [f"{kind}/{page}" for kind in "ab" for page in range(1, most + 1)]


def items_of(count: int) -> list[str]:
    return [f"{kind}{number}" for kind in "ab" for number in range(count)]


@pytest.mark.parametrize("way", WAYS)
def test_every_page_and_every_item_is_found_and_nothing_is_asked_for_twice(source, way, tmp_path):
    write_lake(tmp_path, source.upstream, way)
    assert run(tmp_path) == 0
    assert (expected(tmp_path, "lists"), expected(tmp_path, "items")) == (pages_of(7, way), items_of(7))
    asked = source.upstream.count()
    assert asked == len(pages_of(7, way)) + len(items_of(7))
    assert run(tmp_path) == 0
    assert source.upstream.count() == asked


@pytest.mark.parametrize("way", WAYS)
def test_new_database_finds_the_pages_in_the_store_but_for_links_that_were_headers(source, way, tmp_path):
    write_lake(tmp_path, source.upstream, way)
    assert run(tmp_path) == 0
    for file in tmp_path.glob("adce.db*"):
        file.unlink()
    asked = source.upstream.count()
    assert run(tmp_path) == 0
    assert (expected(tmp_path, "lists"), expected(tmp_path, "items")) == (pages_of(7, way), items_of(7))
    assert source.upstream.count() - asked == (len(pages_of(7)) if way == "header" else 0)


QUICK = {("header", 2), ("cursor", 10), ("number", 4), ("token", 4), ("until_empty", 0)}
SIZES = [
    pytest.param(way, count, marks=() if (way, count) in QUICK else pytest.mark.battery)
    for way in WAYS
    for count in (2, 4, 10, 0)
]


@pytest.mark.parametrize(("way", "count"), SIZES)
def test_list_that_grows_or_shrinks_is_followed_when_its_first_page_is_due(source, way, count, tmp_path):
    write_lake(tmp_path, source.upstream, way, ", freshness: {refetch_every: 1s}")
    run(tmp_path)
    source.count = count
    source.expire()
    run_when_due(tmp_path)
    run_adce("reconcile", folder=tmp_path)
    now = rows(tmp_path, "select key, state from objects_now where dataset = 'lists' and state != 'dropped' order by 1")
    assert [key for key, _ in now] == [f"lists/{page}.json" for page in pages_of(count, way)]
    named = rows(tmp_path, "select count(*) from objects_now where dataset = 'items' and state != 'dropped'")
    assert named == [(len(items_of(count)),)]


def test_full_page_that_is_unchanged_but_links_to_another_now_is_followed(source, tmp_path):
    def page(path: str, query: dict[str, str]) -> Answer:
        answer = source.page(path[1:], query)
        etag = f'"{hashlib.sha256(answer.body).hexdigest()}"'
        is_known = any(arrival.headers.get("If-None-Match") == etag for arrival in source.upstream.arrivals)
        headers = {"Link": '</>; rel="first"', **answer.headers, "ETag": etag}
        return Answer(b"" if is_known else answer.body, 304 if is_known else 200, headers)

    source.count = 6
    source.upstream.route("/header", page)
    write_lake(tmp_path, source.upstream, "header", ", freshness: {refetch_every: 1s}")
    run(tmp_path)
    for source.count in (7, 6):
        run_when_due(tmp_path)
        run_adce("reconcile", folder=tmp_path)
        listed = rows(tmp_path, "select key from objects_now where dataset = 'lists' and state != 'dropped' order by 1")
        assert [key for (key,) in listed] == [f"lists/{page}.json" for page in pages_of(source.count)]


def test_token_that_has_expired_starts_the_list_again(source, tmp_path):
    write_lake(tmp_path, source.upstream, "token")
    source.before_page = lambda page: source.expire() if page == 2 and source.generation == 0 else None
    assert run_to_the_end(tmp_path) == 0
    assert (expected(tmp_path, "lists"), expected(tmp_path, "items")) == (pages_of(7), items_of(7))
    assert source.generation == 1


def test_list_whose_total_changes_while_it_is_read_is_read_again(source, tmp_path):
    def shorten(page: int) -> None:
        source.count = 6 if page == 2 else source.count

    write_lake(tmp_path, source.upstream, "number")
    source.before_page = shorten
    assert run_to_the_end(tmp_path) == 0
    assert (expected(tmp_path, "lists"), expected(tmp_path, "items")) == (pages_of(6), items_of(6))


def test_pages_whose_fields_are_declared_anew_are_dropped_and_others_take_their_place(source, tmp_path):
    write_lake(tmp_path, source.upstream, "number")
    assert run(tmp_path) == 0
    text = (tmp_path / "adce.yaml").read_text().replace("{kind}", "{sort}").replace("{kind:", "{sort:")
    (tmp_path / "adce.yaml").write_text(text.replace('"lists/', '"sorts/'))
    assert run(tmp_path) == 0
    assert expected(tmp_path, "lists") == pages_of(7)
    assert rows(tmp_path, "select count(*) from objects_now where state = 'dropped'") == [(len(pages_of(7)),)]


@pytest.mark.parametrize(
    ("way", "following", "error"),
    [
        ("address", "/address?kind={kind}&page=2", "the page before it names page 2 again"),
        ("address", "http://127.0.0.2/address", "the page before it names 127.0.0.2, another host"),
        ("address", "//evil.example/$BOX_KEY", "the page before it names evil.example, another host"),
        (
            'url: "/address?kind={kind}", pages: {next: links.next, most: 2}',
            "/address?kind={kind}&page={more}",
            "more than 2",
        ),
    ],
)
def test_page_that_is_not_followed_is_missing_and_says_why(source, way, following, error, tmp_path):
    def page(_: str, query: dict[str, str]) -> Answer:
        more = int(query.get("page", 1)) + 1
        return json_answer({"links": {"next": following.format(kind=query["kind"], more=more)}})

    source.upstream.route("/address", page)
    write_lake(tmp_path, source.upstream, way)
    assert run_to_the_end(tmp_path) == 3
    found = rows(tmp_path, "select state, last_error, kind from queue join gaps using (task_id)")
    assert [(state, kind) for state, _, kind in found] == [("gave_up", "missing")] * 2
    assert all(error in text for _, text, _ in found)
    assert source.upstream.count() <= 6


@pytest.mark.parametrize("named", ["http://[x", "http://\u2100.example/"])
def test_page_that_names_the_next_by_no_address_is_invalid(named):
    one = adce.Dataset("l", "s", adce.Template("{page}"), url=adce.Template("/"), pages=adce.Pages(next="next"))
    assert not adce.inspect(one, adce.FIRST_PAGE, json.dumps({"next": named}).encode(), [one]).valid


@pytest.mark.parametrize("way", ["header", "token", "number"])
def test_killed_runner_loses_no_page(source, way, tmp_path):
    source.count = 40
    write_lake(tmp_path, source.upstream, way)
    file = tmp_path / "adce.yaml"  # a task that runs during three crashes may be their cause
    file.write_text(file.read_text().replace("max_attempts: 3", "max_attempts: 9"))
    for _ in range(4):
        asked = source.upstream.count()
        process = start_adce("run", folder=tmp_path, BOX_KEY="k")
        wait_until(lambda asked=asked: source.upstream.count() >= asked + 5)
        os.kill(process.pid, signal.SIGKILL)
        stopped(process)
    assert run_to_the_end(tmp_path) == 0
    assert (expected(tmp_path, "lists"), expected(tmp_path, "items")) == (sorted(pages_of(40)), sorted(items_of(40)))


@pytest.mark.parametrize("replaced", [(1,), (1, 2)])
def test_first_page_that_another_program_replaces_starts_the_list_again(source, replaced, tmp_path):
    write_lake(tmp_path, source.upstream, "cursor")
    assert run(tmp_path) == 0
    asked = source.upstream.count()
    for number in replaced:
        page = tmp_path / f"lake/lists/a/{number}.json"
        page.write_text(page.read_text() + " ")
    assert run(tmp_path) == 0
    assert source.upstream.count() - asked == 2  # the pages after it


def test_key_of_the_source_is_not_stored_when_a_page_repeats_it(source, tmp_path):
    def page(_: str, query: dict[str, str]) -> Answer:
        following = "/address?kind={kind}&key={key}&page=2".format(**query)
        return json_answer({"links": {"next": None if query.get("page") else following}})

    source.upstream.route("/address", page)
    way = 'url: "/address?kind={kind}&key=$BOX_KEY", pages: {next: links.next}'
    write_lake(tmp_path, source.upstream, way)
    assert run(tmp_path) == 0
    assert expected(tmp_path, "lists") == ["a/1", "a/2", "b/1", "b/2"]
    assert {"key=s3cret" in arrival.path for arrival in source.upstream.arrivals} == {True}
    assert not any(b"s3cret" in file.read_bytes() for file in tmp_path.glob("adce.db*"))


@pytest.mark.parametrize(
    ("way", "problem"),
    [
        (WAYS["number"].replace("&page={page}", ""), "pages.last: no request names {page}"),
        (WAYS["cursor"].replace("next: cursor", "next: '[a'"), "datasets.lists.pages.next: not a JMESPath expression"),
        (WAYS["cursor"].replace("{next: cursor", "{next: cursor, last: total"), "has next and last"),
        (WAYS["cursor"].replace("{next: cursor", "{next: cursor, size: 5"), 'pages.size: has no effect without "last"'),
        (WAYS["number"].replace("last: total", """last: "[?a == '{offset}']\""""), 'pages.last: no field "offset"'),
        ('url: "/posted", method: POST, body: "{offset}"', 'body: no field "offset"'),
        (WAYS["cursor"] + ", key: 'lists/{kind}.json'", "does not name {page}"),
        (WAYS["cursor"] + ", key: 'lists/{kind}/{page}/{next}.json'", 'key: no field "next"'),
        ('command: ["true"], pages: {next: link}', 'pages: has no effect without "url"'),
    ],
)
def test_pages_that_cannot_be_followed_are_no_configuration(upstream, way, problem, tmp_path):
    write_lake(tmp_path, upstream, way)
    file = tmp_path / "adce.yaml"
    if "key:" in way:
        file.write_text(file.read_text().replace('key: "lists/{kind}/{page}.json", ', ""))
    checked = run_adce("check", folder=tmp_path)
    assert checked.returncode == adce.ExitCode.BAD_CONFIGURATION
    assert problem in checked.stderr


def test_items_on_the_pages_of_two_lists_are_one_object_each(source, tmp_path):
    write_lake(tmp_path, source.upstream, "cursor")
    second = WAYS["number"].replace("/number?kind={kind}", "/number?kind=a")
    file = tmp_path / "adce.yaml"
    text = file.read_text().replace("from: lists", "from: [lists, others]")
    file.write_text(
        f'{text}  others: {{source: box, key: "others/{{page}}.json", {second}, partitions: {{values: {{}}}}}}\n'
    )
    assert run(tmp_path) == 0
    assert expected(tmp_path, "items") == items_of(7)
    assert expected(tmp_path, "others") == ["1", "2", "3"]
    shutil.rmtree(tmp_path / "lake/lists")
    file.write_text(
        file.read_text().replace("partitions: {values: {kind: [a, b]}}", "partitions: {values: {kind: [b]}}")
    )
    run_adce("reconcile", "--full", "--accept-loss", "lists", folder=tmp_path)
    named = rows(tmp_path, "select count(*) from objects_now where dataset = 'items' and state != 'dropped'")
    assert named == [(14,)]  # those of `a` by the other list


def test_field_named_page_is_an_ordinary_one_where_there_are_no_pages(upstream, tmp_path):
    upstream.answer("/lists", json_answer({"pages": ["one", "two"]}))
    upstream.route("/x", lambda path, query: Answer(query["page"].encode()))
    text = f"""sources: {{box: {{base_url: "{upstream.address}"}}}}
datasets:
  lists: {{source: box, key: lists, url: /lists, partitions: {{values: {{}}}}}}
  parts: {{source: box, key: "{{page}}", url: "/x?page={{page}}", partitions: {{from: lists, ids: pages, as: page}}}}
  below: {{source: box, key: "below/{{page}}/{{id}}", url: "/x?page={{page}}",
          partitions: {{from: parts, regex: "(.+)", as: id}}}}
"""
    (tmp_path / "adce.yaml").write_text(text)
    assert run(tmp_path) == 0
    assert sorted(key for (key,) in rows(tmp_path, "select key from objects_now")) == [
        "below/one/one",
        "below/two/two",
        "lists",
        "one",
        "two",
    ]
