"""Variables of the environment in headers, urls and bodies: sent where they belong, and shown nowhere."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
import urllib.parse
from pathlib import Path
from unittest import mock

import pytest
import requests
from conftest import run_adce
from runners import rows, write_box
from upstream import Answer

import adce

CANARY = "canary-8d1f0c"
KEYED = """
sources:
  quotes: {{base_url: "{address}/$PLACE", headers: {{Authorization: "Bearer ${{QUOTES_KEY}}"}}}}
datasets:
  a:
    source: quotes
    key: "a/{{n}}"
    url: "/{{n}}?key=$QUOTES_KEY"
    partitions: {{values: {{n: [one]}}}}
    validate: {{json: true}}
"""
ENVIRONMENT = {"QUOTES_KEY": CANARY, "PLACE": "here"}


def test_configuration_with_several_variables_is_the_same_in_each_process(upstream, tmp_path):
    (tmp_path / "adce.yaml").write_text(KEYED.format(address=upstream.address))
    digests = []
    for seed in ("6", "7"):  # with other orders of a set
        run_adce("reconcile", folder=tmp_path, PYTHONHASHSEED=seed, **ENVIRONMENT)
        digests += rows(tmp_path, "select declaration, priorities from facts")
    assert len(set(digests)) == 1, digests


def leaks(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_variables_are_sent_and_shown_nowhere(upstream, tmp_path):
    (tmp_path / "adce.yaml").write_text(KEYED.format(address=upstream.address))
    path = f"/here/one?key={CANARY}"
    upstream.answer(path, Answer(f"you sent {CANARY}".encode(), 400))  # an upstream that echoes
    first = run_adce("run", "--once", "-v", folder=tmp_path, **ENVIRONMENT)
    upstream.answer(path, Answer(b"{}", headers={"ETag": '"1"'}))
    second = run_adce("run", "--once", "-v", folder=tmp_path, **ENVIRONMENT)
    shown = [
        run_adce(*words, folder=tmp_path, **ENVIRONMENT) for words in (("report",), ("try", "a"), ("task", "a/one"))
    ]
    assert upstream.arrivals[0].path == path
    assert upstream.arrivals[0].headers["Authorization"] == f"Bearer {CANARY}"
    assert (tmp_path / "lake/a/one").read_bytes() == b"{}"
    assert leaks(tmp_path) == []
    assert not any(CANARY in done.stdout + done.stderr for done in (first, second, *shown))
    assert "you sent $QUOTES_KEY" in first.stderr


FORMS = {
    "lower": str.lower,
    "url": lambda value: urllib.parse.quote(value, safe=""),
    "path": urllib.parse.quote,
    "form": urllib.parse.quote_plus,
    "lower url": lambda value: re.sub("%..", lambda code: code[0].lower(), urllib.parse.quote(value, safe="")),
    "requests": requests.utils.requote_uri,
    "html": html.escape,
    "html of a template": lambda value: html.escape(value).replace("&#x27;", "&#39;"),
    "json": lambda value: json.dumps(value)[1:-1],
    "json of PHP": lambda value: json.dumps(value)[1:-1].replace("/", "\\/"),
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_secret_is_known_in_each_form_that_a_source_gives_it(form, monkeypatch):
    value = "S3c/ret+'x\" <é> ~9"
    monkeypatch.setenv("A", value)
    monkeypatch.setenv("B", value + "longer")
    shown = adce.redacted(f"{FORMS[form](value)} {value}longer", ["A", "B"])
    assert shown.replace("=", "") == "$A $B"


def test_secret_is_hidden_before_a_text_is_cut(monkeypatch):
    monkeypatch.setenv("A", CANARY * 4)
    for length in range(60, 120):
        result = adce.classify(adce.Source("box"), 403, {}, (b"x" * length) + b" " + CANARY.encode() * 4, ["A"])
        assert "canary" not in (result.error or "")


@pytest.mark.parametrize("user", ["bob:$QUOTES_KEY", f"bob:{CANARY}"])
def test_password_and_headers_of_a_source_are_not_kept_when_it_repeats_them(user, upstream, tmp_path):
    sent = lambda: upstream.arrivals[-1].headers["Authorization"]  # noqa: E731
    upstream.route("/A", lambda *_: Answer(b"x", 200 if upstream.count() > 1 else 403, {"ETag": sent()}))
    upstream.route("/B", lambda *_: Answer(f"you sent {sent()}".encode(), 403))
    write_box(
        tmp_path, address=upstream.address.replace("//", f"//{user}@"), names="A, B", more="retry: {max_attempts: 2}"
    )
    done = run_adce("run", "--once", "-v", folder=tmp_path, **ENVIRONMENT)
    basic = base64.b64decode(sent().removeprefix("Basic ")).decode()
    assert (CANARY in basic, "you sent Basic" in done.stderr) == (True, True), done.stderr
    kept = done.stderr.encode() + b"".join(file.read_bytes() for file in tmp_path.glob("adce.db*"))
    assert sent().removeprefix("Basic ").rstrip("=").encode() not in kept
    assert b"validators" not in kept or b"If-None-Match" not in kept


@pytest.mark.parametrize(
    "way",
    [
        "environment: [QUOTES_KEY], command: [python, -c, \"import os; exit('x' * 95 + os.environ['QUOTES_KEY'])\"]",
        'environment: [QUOTES_KEY], command: [sh, -c, "echo xx$QUOTES_KEY >&2; exit 1"]',
        "call: scraper:bring",
    ],
)
def test_what_a_program_prints_or_raises_shows_no_secret(way, tmp_path):
    (tmp_path / "scraper.py").write_text(
        "import os\n\n\ndef bring():\n    print(os.environ['QUOTES_KEY'])\n"
        "    raise ValueError('x' * 95 + os.environ['QUOTES_KEY'])\n"
    )
    write_box(tmp_path, way=way, more="retry: {max_attempts: 1}")
    done = run_adce("run", "--once", "-v", folder=tmp_path, **ENVIRONMENT)
    shown = run_adce("task", "1", folder=tmp_path).stdout
    assert (leaks(tmp_path), CANARY in done.stderr + shown, "$QUOTES_KEY" in shown) == ([], False, True), shown
    assert "canary" not in done.stderr + shown


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "not in the environment: $PLACE, $QUOTES_KEY"),
        ({**ENVIRONMENT, "QUOTES_KEY": "a\u20ac"}, "the header Authorization of a holds"),
    ],
)
def test_variable_that_cannot_be_used_is_found_before_anything_starts(environment, message, upstream, tmp_path):
    (tmp_path / "adce.yaml").write_text(KEYED.format(address=upstream.address))
    done = run_adce("run", "--once", folder=tmp_path, **environment)
    assert (done.returncode, message in done.stderr) == (78, True)
    assert run_adce("check", folder=tmp_path, **environment).returncode == adce.ExitCode.ERROR
    assert upstream.count() == 0


def test_redirect_cannot_ask_for_a_variable(upstream, tmp_path):
    (tmp_path / "adce.yaml").write_text(KEYED.format(address=upstream.address))
    upstream.answer(f"/here/one?key={CANARY}", Answer(b"", 302, {"Location": "/stolen?x=$QUOTES_KEY"}))
    run_adce("run", "--once", folder=tmp_path, **ENVIRONMENT)
    assert upstream.arrivals[-1].path == "/stolen?x=$QUOTES_KEY"


def test_post_sends_a_body_with_fields_that_cannot_leave_their_place(upstream, tmp_path):
    (tmp_path / "adce.yaml").write_text(
        "sources: {box: {base_url: '" + upstream.address + "'}}\n"
        "datasets:\n  a:\n    source: box\n    key: 'a/{n}'\n    url: /graph\n    method: POST\n"
        '    headers: {X-Kind: test}\n    body: \'{"id": "{n}", "key": "$QUOTES_KEY", "query": "$id"}\'\n'
        "    partitions: {values: {n: ['x\", \"$PLACE']}}\n"
    )
    upstream.answer("/graph", Answer(b"{}"))
    assert run_adce("run", "--once", folder=tmp_path, **ENVIRONMENT).returncode == adce.ExitCode.DONE
    (arrival,) = upstream.arrivals
    assert (arrival.headers["Content-Type"], arrival.headers["X-Kind"]) == ("application/json", "test")
    assert arrival.body == b'{"id": "x\\", \\"$PLACE", "key": "' + CANARY.encode() + b'", "query": "$id"}'


def test_redirect_of_an_https_address_that_a_variable_holds_is_not_followed_to_http(monkeypatch):
    monkeypatch.setenv("API", "https://api.example.org")
    source = adce.Source("box", base_url="$API")
    partitions = adce.Partitions(values={"n": ("A",)})
    dataset = adce.Dataset("a", "box", adce.Template("{n}"), partitions, url=adce.Template("/{n}"))
    dataset = dataclasses.replace(dataset, secrets=frozenset({"API"}))
    claimed = adce.Claim(dataset, source, (adce.ObjectRow(fields_json='{"n": "A"}'),), url="$API/A")
    answer = mock.Mock(status_code=302, is_redirect=True, headers={"location": "http://api.example.org/A"})
    (result,) = adce._judge(claimed, answer, io.BytesIO(), mock.Mock(), mock.Mock())
    assert result.error == "redirected to http://api.example.org, which is refused"


@pytest.mark.parametrize(
    "line",
    [
        f"headers: {{'Authorization:': 'Bearer {CANARY}'}}",
        f'X-Token: "it\'s {CANARY}"',
        f"base_url: http://bob:a@{CANARY}@host/",
        f"url: /x?a=1&key={CANARY}&b=2",
        f"api_key = {CANARY}",
    ],
)
def test_line_of_a_mistake_is_shown_without_its_secret(line):
    assert CANARY not in adce.masked(line)
