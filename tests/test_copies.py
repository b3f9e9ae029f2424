"""Objects that are copies of other objects, and objects that a checksum proves whole."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
from conftest import run_adce
from runners import rows, wait_until
from upstream import Answer, Upstream

import adce

COPIES = """\
retry: {{max_attempts: 3, initial_delay_seconds: 0.1}}
sources: {{box: {{base_url: "{address}"}}}}
datasets:
  plays: {{source: box, key: "plays/{{id}}", url: "/{{id}}", partitions: {{values: {{id: [A, B]}}}}{more}}}
  boxes: {{source: box, key: "boxes/{{id}}.json", copy_of: plays, validate: {{not_contains: [empty]}}}}
"""


def write_copies(folder: Path, upstream: Upstream, more: str = "") -> None:
    (folder / "adce.yaml").write_text(COPIES.format(address=upstream.address, more=more))


def stored(folder: Path, *names: str) -> list[bytes]:
    return [(folder / "lake" / name).read_bytes() for name in names]


def test_copy_has_the_bytes_of_its_original_and_costs_no_request(upstream, tmp_path):
    upstream.answer("/A", Answer(b"plays of A"))
    write_copies(tmp_path, upstream)
    assert run_adce("run", "--once", folder=tmp_path).returncode == adce.ExitCode.GAPS_LEFT
    assert stored(tmp_path, "plays/A", "boxes/A.json") == [b"plays of A"] * 2
    assert rows(tmp_path, "select dataset, expected, present from coverage order by 1") == [
        ("boxes", 1, 1),
        ("plays", 2, 1),
    ]
    assert upstream.count() == 2
    assert rows(tmp_path, "select parent from objects_now where dataset = 'boxes'") == [("plays/A",)]


def test_copy_that_is_lost_is_copied_again_also_while_its_source_is_paused(upstream, tmp_path):
    for name in ("/A", "/B"):
        upstream.answer(name, Answer(b"plays"))
    write_copies(tmp_path, upstream)
    assert run_adce("run", "--once", folder=tmp_path).returncode == 0
    run_adce("pause", "box", folder=tmp_path)
    (tmp_path / "lake/boxes/B.json").unlink()
    assert run_adce("run", "--once", folder=tmp_path).returncode == 0
    assert stored(tmp_path, "boxes/B.json") == [b"plays"]
    assert upstream.count() == 2


def test_copy_follows_each_change_of_its_original_and_keeps_what_is_valid(upstream, tmp_path):
    upstream.answer("/A", Answer(b"first"), Answer(b"second"), Answer(b"empty"))
    upstream.answer("/B", Answer(b"same"))
    write_copies(tmp_path, upstream, ", freshness: {refetch_every: 1s}")
    found = []
    for _ in range(3):
        run_adce("run", "--once", folder=tmp_path)
        found.append(stored(tmp_path, "plays/A", "boxes/A.json"))
        wait_until(
            lambda: rows(tmp_path, "select 1 from (select max(modified_at) t from objects) where t < unixepoch() - 1")
        )
    assert found == [[b"first"] * 2, [b"second"] * 2, [b"empty", b"second"]]
    assert rows(tmp_path, "select last_error from queue where dataset = 'boxes' and key like '%A%'") == [
        ("contains 'empty'",)
    ]


def test_copy_is_made_when_another_program_stores_or_changes_the_original(upstream, tmp_path):
    write_copies(tmp_path, upstream)
    (tmp_path / "lake/plays").mkdir(parents=True)
    for text in (b"by hand", b"by hand, longer"):
        (tmp_path / "lake/plays/A").write_bytes(text)
        run_adce("run", "--once", folder=tmp_path)
        assert stored(tmp_path, "boxes/A.json") == [text]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("copy_of: play", 'copy_of: dataset "play" is not defined, did you mean "plays"?'),
        ("copy_of: boxes", "copy_of: cycle: boxes -> boxes"),
        ('copy_of: plays, url: "/x"', "needs exactly one of url, command, call and copy_of"),
    ],
)
def test_copy_of_nothing_is_no_configuration(upstream, change, problem, tmp_path):
    write_copies(tmp_path, upstream)
    text = (tmp_path / "adce.yaml").read_text().replace("copy_of: plays", change)
    (tmp_path / "adce.yaml").write_text(text)
    checked = run_adce("check", folder=tmp_path)
    assert (checked.returncode, problem in checked.stderr) == (adce.ExitCode.BAD_CONFIGURATION, True), checked.stderr


SUMS = """\
retry: {{max_attempts: 2, initial_delay_seconds: 0.1}}
sources: {{box: {{base_url: "{address}"}}}}
datasets:
  sums: {{source: box, key: SUMS, url: /SUMS, partitions: {{values: {{}}}}, freshness: {{refetch_every: 1s}}}}
  files: {{source: box, key: "files/{{file}}", url: "/{{file}}", validate: {{{kind}: "{{sum}}"}},
          partitions: {{from: sums, regex: '(?P<sum>\\S{{32,71}})  (?P<file>\\S+)'}}}}
"""


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_file_that_its_checksum_does_not_prove_is_not_stored_and_a_new_checksum_wants_a_new_file(
    kind, upstream, tmp_path
):
    first, second = (hashlib.new(kind, body).hexdigest() for body in (b"good", b"better"))
    upstream.answer("/SUMS", Answer(f"{first.upper()}  a.zip\n{kind.upper()}:{first}  b.zip\n".encode()))
    upstream.answer("/a.zip", Answer(b"good"))
    upstream.answer("/b.zip", Answer(b"cut"))
    (tmp_path / "adce.yaml").write_text(SUMS.format(address=upstream.address, kind=kind))
    run_adce("run", "--once", folder=tmp_path)
    assert stored(tmp_path, "files/a.zip") == [b"good"]
    assert not (tmp_path / "lake/files/b.zip").exists()
    assert rows(tmp_path, "select last_error from queue where key = 'files/b.zip'")[0][0].startswith(f"its {kind} is ")
    upstream.answer("/SUMS", Answer(f"{second}  a.zip\n{first}  b.zip\n".encode()))
    upstream.answer("/a.zip", Answer(b"better"))
    upstream.answer("/b.zip", Answer(b"good"))
    wait_until(lambda: rows(tmp_path, "select 1 from objects where key = 'SUMS' and modified_at < unixepoch() - 1"))
    run_adce("run", "--once", folder=tmp_path)
    assert stored(tmp_path, "files/a.zip", "files/b.zip") == [b"better", b"good"]


GZIP = gzip.compress(b"whole", mtime=0)


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (GZIP * 2, None),
        (GZIP[:-4], "its gzip stream ended early"),
        (b"plain", "incomplete gzip: Error -3"),
        (b"", "fewer than 1"),
    ],
    ids=["two streams", "a part", "plain", "nothing"],
)
def test_gzip_must_be_whole_when_that_is_declared(body, verdict):
    one = adce.Dataset("files", "box", adce.Template("x"), validate=adce.Validation(gzip=True))
    found = adce.inspect(one, {}, body)
    assert found.valid is (verdict is None)
    assert verdict is None or verdict in (found.verdict or "")
