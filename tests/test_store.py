"""A folder and a bucket: the same promises."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from urllib.parse import unquote_plus

import boto3
import botocore.parsers
import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from conftest import ROOT
from runners import read_object, wait_until
from s3_server import MotoServer, S3Server
from upstream import Answer

import adce

KEYS = ["a-b", "a.b", "a/b", "a/c/c d+e%20.json", "b/'quoted\" & <x>.json", "b/ä🏀.json", "c/0.json"]


SERVERS = ["moto", pytest.param("seaweedfs", marks=pytest.mark.battery)]


@pytest.fixture(scope="session")
def moto(aws) -> MotoServer:
    return aws


@pytest.fixture(scope="session")
def seaweedfs():
    with S3Server() as server:
        yield server


@pytest.fixture(params=SERVERS)
def s3_server(request, monkeypatch) -> MotoServer | S3Server:
    """A server, with credentials where boto3 looks."""
    return _use(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture
def bucket(s3_server) -> str:
    """An empty prefix of a bucket."""
    return _prefix()


@pytest.fixture(params=["folder", *SERVERS])
def store(request, tmp_path, monkeypatch) -> adce.Store:
    if request.param != "folder":
        _use(request.getfixturevalue(request.param), monkeypatch)
    store = adce.open_store(str(tmp_path / "lake") if request.param == "folder" else _prefix())
    store.sweep()
    return store


def _use(server: MotoServer | S3Server, monkeypatch: pytest.MonkeyPatch) -> MotoServer | S3Server:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


def _prefix() -> str:
    return f"s3://lake/{secrets.token_hex(4)}"


def test_written_object_is_listed_found_and_read_as_it_was(store):
    written = {key: store.write(key, f"body of {key}".encode()) for key in KEYS}
    assert sorted(stored.key for stored in store.list("")) == sorted(written)
    for stored in store.list(""):
        assert (stored.size, stored.etag) == (written[stored.key].size, written[stored.key].etag)
        assert store.find(stored.key) == stored
        assert read_object(store, stored.key) == f"body of {stored.key}".encode()


def test_prefix_selects_by_the_start_of_the_key(store):
    for key in ("days/20240101.json", "days/20240102.json", "days/2025.json", "daysx/1.json", "other/1.json"):
        store.write(key, b"x")
    assert [stored.key for stored in store.list("days/2024")] == ["days/20240101.json", "days/20240102.json"]
    assert len(list(store.list("days/"))) == 3
    assert list(store.list("nothing/")) == []


def test_listing_after_a_key_is_the_rest_of_the_listing(store, request):
    is_exact = "seaweedfs" not in request.node.name  # SeaweedFS lists a/b before a-b
    for key in ("a/b/c", "a/b/d", "a/c", "b/1", "b/2", *(("a-b", "a.b", "a0") if is_exact else ())):
        store.write(key, b"x")
    for prefix in ("", "a", "a/", "a/b/") if is_exact else ("a/", "a/b/"):
        whole = [stored.key for stored in store.list(prefix)]
        for after in ("", "a", "a/", "a/b", "a/b/", "a/b/c", "a/b/cc", "a/b\U0010ffff", "a0", "b/1", "z"):
            if not is_exact and (after == "a/b" or not (after.startswith(prefix) or after <= prefix)):
                continue
            expected = whole if after <= prefix else [key for key in whole if key > after]
            assert [stored.key for stored in store.list(prefix, after)] == expected, (prefix, after)


def test_missing_object_is_not_found(store):
    assert store.find("no/such.json") is None
    with pytest.raises(KeyError):
        read_object(store, "no/such.json")


def test_overwritten_object_has_another_etag(store):
    first = store.write("a/b.json", b"one")
    second = store.write("a/b.json", b"two")
    assert first.etag != second.etag
    assert read_object(store, "a/b.json") == b"two"


def test_empty_object_is_listed_with_no_bytes(store):
    store.write("empty.json", b"")
    assert [(stored.key, stored.size) for stored in store.list("")] == [("empty.json", 0)]


def test_more_than_a_page_is_listed_once_and_in_order(bucket):
    store = adce.open_store(bucket)
    assert isinstance(store, adce.S3Store)
    store._client.meta.events.register(
        "before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=10)
    )
    for number in range(23):
        store.write(f"many/{number:05}.json", b"x")
    keys = [stored.key for stored in store.list("many/")]
    assert keys == [f"many/{number:05}.json" for number in range(23)]
    assert store.calls == 3


def test_wrong_secret_is_told_without_showing_it(bucket, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(adce.StoreError) as caught:
        list(adce.open_store(bucket).list(""))
    assert "not-the-secret" not in str(caught.value) + caught.value.hint
    assert s3_server.access_key not in str(caught.value)
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


def test_missing_bucket_and_missing_server_are_told(bucket, monkeypatch):
    with pytest.raises(adce.StoreError, match="there is no bucket nosuchbucket"):
        adce.open_store("s3://nosuchbucket").sweep()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(adce.StoreError, match="cannot use s3://lake/"):
        adce.open_store("s3://lake").sweep()


def test_key_that_a_bucket_refuses_is_trouble_of_that_place_unless_it_refuses_the_others_too(moto, monkeypatch):
    _use(moto, monkeypatch)
    store = adce.open_store(_prefix())

    def refuse(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        raw = io.BytesIO()
        raw.stream = lambda **_: iter([b"<Error><Code>AccessDenied</Code></Error>"])
        return AWSResponse(request.url, 403, {}, raw)

    store._client.meta.events.register("before-send.s3.PutObject", refuse)
    with pytest.raises(adce.UnusablePathError, match=r"cannot write .*/a: .*AccessDenied"):
        store.write("a", b"x")
    assert list(store.list("")) == []
    uploads = moto.client().list_multipart_uploads(Bucket="lake", Prefix=store.above)
    assert uploads.get("Uploads", []) == []
    store._client.meta.events.register("before-send.s3.CreateMultipartUpload", refuse)
    with pytest.raises(adce.StoreError, match=r"cannot write .*/a: .*AccessDenied") as caught:
        store.write("a", b"x")
    assert not isinstance(caught.value, adce.UnusablePathError)


def test_page_of_a_proxy_is_no_empty_listing(upstream, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", upstream.address)
    upstream.route("/lake", lambda *_: Answer(b"<html/>"))
    with pytest.raises(adce.StoreError, match=r"cannot list s3://lake/.*the response is not a listing"):
        list(adce.open_store("s3://lake").list(""))


def test_error_of_a_bucket_that_repeats_a_secret_does_not_show_it(upstream, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "canary/8d1f0c")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", upstream.address)
    told = b"<Error><Code>InvalidToken</Code><Message>canary/8d1f0c is malformed</Message></Error>"
    upstream.route("/lake", lambda *_: Answer(told, 400))
    with pytest.raises(adce.StoreError, match=r"\$AWS_S\w+ is malformed"):
        list(adce.open_store("s3://lake").list(""))


def test_prefix_of_the_address_stays_out_of_the_keys(bucket, s3_server):
    adce.open_store(bucket).write("a/b.json", b"x")
    name = bucket.removeprefix("s3://lake/")
    listed = s3_server.client().list_objects_v2(Bucket="lake", Prefix=name)["Contents"]
    assert [entry["Key"] for entry in listed] == [f"{name}/a/b.json"]
    assert isinstance(boto3.__version__, str)


def test_upload_has_a_checksum_that_the_server_verifies_and_keeps(moto, monkeypatch):
    _use(moto, monkeypatch)
    address = _prefix()
    adce.open_store(address).write("a", b"whole")
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    head = moto.client().head_object(Bucket=bucket, Key=f"{prefix}/a", ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"] == base64.b64encode(hashlib.sha256(b"whole").digest()).decode()


@pytest.fixture
def folder(tmp_path) -> adce.FolderStore:
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    return store


def test_folder_is_listed_in_the_order_of_s3(folder):
    for key in ("a-b", "a.b", "a/b", "a0", "b/c/d", "b/c-d", "B"):
        folder.write(key, b"x")
    keys = [stored.key for stored in folder.list("")]
    assert keys == sorted(keys)
    assert len(keys) == 7


def test_part_of_a_folder_is_listed_in_order(folder):
    keys = [f"many/{number * 37 % 101:03}{ending}" for number in range(101) for ending in (".json", "/x.json", "-ä🏀")]
    for key in keys:
        folder.write(key, b"x")
    assert [stored.key for stored in folder.list("")] == sorted(keys)
    assert [stored.key for stored in folder.list("many/05")] == sorted(key for key in keys if key[5:7] == "05")


def test_unfinished_files_are_not_listed_and_are_swept(folder):
    leftover = folder.root / adce.STAGING / "0123456789abcdef"
    leftover.write_bytes(b"half")
    folder.write("a.json", b"whole")
    assert [stored.key for stored in folder.list("")] == ["a.json"]
    folder.sweep()
    assert list((folder.root / adce.STAGING).iterdir()) == []


def test_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_bytes(b"secret")
    (folder.root / "days").symlink_to(outside)
    for attempt in (lambda: folder.write("days/1.json", b"x"), lambda: read_object(folder, "days/secret.json")):
        with pytest.raises(adce.StoreError):
            attempt()
    assert list(folder.list("")) == []
    assert [path.name for path in outside.iterdir()] == ["secret.json"]


@pytest.mark.parametrize("key", ["/abs", "../x", "a/../../x", "a//x", "./x", "a/.", ".adce/x", "", "a/", "a\0b"])
def test_key_that_leads_out_of_the_store_is_refused(key, folder):
    before = list(folder.root.parent.rglob("*"))
    for attempt in (folder.find, folder.open, lambda key: folder.write(key, b"x")):
        with pytest.raises(adce.UnusablePathError, match="cannot be a file of the store"):
            attempt(key)
    assert list(folder.root.parent.rglob("*")) == before


def test_folder_that_becomes_a_link_during_a_write_is_not_followed(folder, tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()

    def swap_and_rename(*words, rename=os.rename, **more):
        rename(folder.root / "days", folder.root / "moved")
        (folder.root / "days").symlink_to(tmp_path / "outside")
        rename(*words, **more)

    monkeypatch.setattr(os, "rename", swap_and_rename)
    folder.write("days/1.json", b"x")
    assert list((tmp_path / "outside").iterdir()) == []
    assert (folder.root / "moved/1.json").read_bytes() == b"x"


def test_planted_link_in_place_of_an_object_is_replaced_and_not_written_through(folder, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (folder.root / "a.json").symlink_to(target)
    assert folder.find("a.json") is None
    with pytest.raises(adce.StoreError):
        read_object(folder, "a.json")
    folder.write("a.json", b"new")
    assert target.read_bytes() == b"precious"
    assert read_object(folder, "a.json") == b"new"


def test_link_in_place_of_the_staging_folder_is_refused_and_not_followed(folder, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (folder.root / adce.STAGING).rmdir()
    (folder.root / adce.STAGING).symlink_to(home)
    for attempt in (folder.sweep, folder.require_mark, lambda: folder.write("a.json", b"x")):
        with pytest.raises(adce.StoreError, match="is a link"):
            attempt()
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]


def test_only_files_that_adce_has_written_are_swept(folder):
    (folder.root / adce.STAGING / "0123456789abcdef").write_text("half an object")
    (folder.root / adce.STAGING / "notes.txt").write_text("not ADCE's")
    folder.sweep()
    assert [path.name for path in (folder.root / adce.STAGING).iterdir()] == ["notes.txt"]


def test_file_where_a_folder_is_needed_is_told(folder):
    folder.write("days", b"a file")
    with pytest.raises(adce.StoreError, match=r"cannot write days/1\.json"):
        folder.write("days/1.json", b"x")
    assert list((folder.root / adce.STAGING).iterdir()) == []


def test_write_that_fails_at_its_end_leaves_no_unfinished_file(folder):
    (folder.root / "a.json").mkdir()
    with pytest.raises(adce.StoreError, match=r"cannot write a\.json: Is a directory"):
        folder.write("a.json", b"x")
    assert list((folder.root / adce.STAGING).iterdir()) == []


def test_folder_that_is_not_there_is_no_empty_store(tmp_path):
    with pytest.raises(adce.StoreError, match="is not there"):
        list(adce.FolderStore(tmp_path / "unmounted").list(""))
    for attempt in (adce.FolderStore.find, adce.FolderStore.open):
        with pytest.raises(adce.StoreError, match="is not there"):
            attempt(adce.FolderStore(tmp_path / "unmounted"), "a.json")


WRITER = """
import sys; sys.path.insert(0, sys.argv[1])
import adce, pathlib
store = adce.FolderStore(pathlib.Path(sys.argv[2])); store.sweep()
print("ready", flush=True)
for number in range(10**9):
    store.write(f"days/{number % 50}.json", bytes([number % 256]) * 300_000)
"""


def test_killed_writer_leaves_only_whole_objects(folder):
    for _ in range(3):
        words = [sys.executable, "-c", WRITER, str(ROOT), str(folder.root)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline()
            wait_until(lambda: list(folder.list("")))
            time.sleep(secrets.randbelow(100) / 1000)
            process.kill()
        bodies = [read_object(folder, stored.key) for stored in folder.list("")]
        assert bodies
        assert all(len(body) == 300_000 and len(set(body)) == 1 for body in bodies)


def test_out_of_order_listing_is_refused_or_sorted(folder, monkeypatch):
    entries = [adce.StoredObject(key, 1, "e", 0) for key in ("a", "a/b", "a-b", "b")]
    monkeypatch.setattr(folder, "list", lambda prefix, after="": iter(entries))
    with pytest.raises(adce.StoreError, match="listed a-b after a/b"):
        next(adce.Listing(folder, "", adce.ALL_KEYS, adce.Prefetch(), is_ordered=True).pages())
    was_ascending, listing = adce.sort_listing(iter(entries))
    assert (was_ascending, [entry.key for entry in listing]) == (False, ["a", "a-b", "a/b", "b"])
    assert adce.sort_listing(iter(sorted(entries, key=lambda entry: entry.key)))[0]


def test_new_object_is_readable_by_its_group_as_umask_says(folder):
    folder.write("a.json", b"x")
    assert (folder.root / "a.json").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


PAGE = b"""<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>lake</Name><Prefix></Prefix>
<EncodingType>url</EncodingType><KeyCount>3</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>true</IsTruncated>
<NextContinuationToken>more</NextContinuationToken>
<Contents><Key>a%26b+c%2Bd.json</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified>
<ETag>&quot;0123&quot;</ETag><Size>12</Size><StorageClass>STANDARD</StorageClass></Contents>
<Contents><Size>0</Size><ETag>&#34;abc-2&#34;</ETag><LastModified>2026-01-02T03:04:05+00:00</LastModified>
<Owner><ID>x</ID></Owner><Key>&lt;x&gt;/%C3%A4.json</Key></Contents>
<Contents>
  <Key>plain</Key><LastModified>2026-01-02T03:04:06Z</LastModified><ETag>"d"</ETag><Size>5368709120</Size>
</Contents></ListBucketResult>"""


@pytest.fixture
def answered(monkeypatch) -> Callable[..., adce.S3Store]:
    """A bucket whose server answers each listing with the next of these bodies."""
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)

    def bucket_of(*bodies: bytes) -> adce.S3Store:
        store, left = adce.S3Store("lake", ""), list(bodies)

        def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
            raw = io.BytesIO(left.pop(0) if len(left) > 1 else left[0])  # again when it is retried
            raw.stream = lambda **_: iter([raw.read()])
            return AWSResponse(request.url, 200, {}, raw)

        store._client.meta.events.register("before-send.s3.ListObjectsV2", answer)
        return store

    return bucket_of


LAST = PAGE.replace(b"<IsTruncated>true</IsTruncated>", b"<IsTruncated>false</IsTruncated>")


def test_listing_in_which_an_element_comes_twice_is_an_error_of_the_store(answered):
    body = LAST.replace(b"<IsTruncated>", b"<KeyCount>1</KeyCount><KeyCount>2</KeyCount><IsTruncated>")
    with pytest.raises(adce.StoreError, match="cannot list"):
        list(answered(body).list(""))


@pytest.mark.parametrize("quoted", [True, False])
def test_entries_of_a_page_are_those_that_botocore_would_parse(quoted, answered):
    """Entities, quoting, any order of fields, no quoting at all."""
    body = LAST if quoted else LAST.replace(b"<EncodingType>url</EncodingType>", b"")
    store = answered(body)
    stock = botocore.parsers.create_parser("rest-xml").parse(
        {"body": body, "headers": {}, "status_code": 200},
        store._client.meta.service_model.operation_model("ListObjectsV2").output_shape,
    )
    unquote = unquote_plus if quoted else str
    assert [(one.key, one.size, one.etag, one.modified_at) for one in store.list("")] == [
        (unquote(one["Key"]), one["Size"], one["ETag"].strip('"'), int(one["LastModified"].timestamp()))
        for one in stock["Contents"]
    ]


def test_listing_goes_on_where_its_page_says(answered):
    assert len(list(answered(PAGE, PAGE.replace(b">more<", b">still more<"), LAST).list(""))) == 9


@pytest.mark.parametrize(
    ("bodies", "words"),
    [
        pytest.param([PAGE, PAGE], "same next token was received twice", id="same-token-twice"),
        pytest.param(
            [PAGE.replace(b"NextContinuationToken", b"Next")], "truncated and has no continuation token", id="no-token"
        ),
        pytest.param([b"<html><body>Welcome</body></html>"], "the response is not a listing", id="a-page"),
        pytest.param([b""], "the response is not a listing", id="nothing"),
        pytest.param([b"<!doctype html><p>Welcome"], "cannot list", id="no-xml"),
        pytest.param([PAGE[:700]], "cannot list", id="half-a-page"),
        pytest.param([b"<Contents>" * 20_000], "cannot list", id="entries-that-never-close"),
        pytest.param([PAGE.replace(b"<Size>12</Size>", b"")], "cannot list", id="entry-without-size"),
        pytest.param([PAGE.replace(b"<Key>plain</Key>", b"")], "has no key, no ETag", id="entry-without-key"),
        pytest.param([PAGE.replace(b"<Size>12<", b"<Size>many<")], "cannot list", id="size-is-no-number"),
        pytest.param([PAGE.replace(b">12<", b">9223372036854775808<")], "no usable size", id="size-too-large"),
        pytest.param([PAGE.replace(b">12<", b">-1<")], "no usable size", id="size-below-nothing"),
        pytest.param([PAGE.replace(b"<KeyC", b"<a>" * 5000 + b"</a>" * 5000 + b"<KeyC")], "recursion", id="deep"),
        pytest.param(
            [
                re.sub(b"<Contents>.*</Contents>", b"", PAGE, flags=re.DOTALL).replace(b"more", b"%d" % n)
                for n in range(9)
            ],
            "truncated and has no continuation token",
            id="no-end",
        ),
        pytest.param([PAGE.replace(b"2026-01-02T03:04:06Z", b"now")], "cannot list", id="instant-is-none"),
    ],
)
def test_page_that_is_no_whole_listing_is_an_error_and_not_a_smaller_lake(bodies, words, answered, monkeypatch):
    monkeypatch.setattr(adce, "EMPTY_PAGES", 5)
    with pytest.raises(adce.StoreError, match=words):
        list(answered(*bodies).list(""))


def test_known_store_that_has_lost_its_mark_is_not_made_anew(folder):
    (folder.root / adce.STAGING).rmdir()
    with pytest.raises(adce.StoreError, match="is not there: it has no folder") as caught:
        adce.FolderStore(folder.root).require_mark()
    assert "is its disk mounted?" in caught.value.hint
    folder.root.rmdir()
    with pytest.raises(adce.StoreError):
        adce.FolderStore(folder.root).require_mark()
    assert not folder.root.exists()


def test_link_to_nothing_is_told(tmp_path):
    (tmp_path / "lake").symlink_to(tmp_path / "nowhere")
    with pytest.raises(adce.StoreError, match="cannot be written"):
        adce.FolderStore(tmp_path / "lake").sweep()
    assert not (tmp_path / "nowhere").exists()


def test_folder_or_file_in_the_wrong_place_is_trouble_of_that_place_only(folder):
    folder.write("games/1.json", b"x")
    (folder.root / "games" / "2.json").mkdir()
    with pytest.raises(adce.UnusablePathError, match=r"cannot write games/2\.json: Is a directory"):
        folder.write("games/2.json", b"x")
    with pytest.raises(adce.UnusablePathError, match=r"cannot read games/1\.json/3: Not a directory"):
        read_object(folder, "games/1.json/3")
    assert [entry.key for entry in folder.list("")] == ["games/1.json"]


@pytest.mark.parametrize(("proven", "attempts", "looks"), [(1, 0, 0), (1, 1, 1), (2, 0, 1)])
def test_bucket_that_the_cycle_has_searched_is_not_asked_again_before_the_first_attempt(
    bucket, upstream, proven, attempts, looks
):
    store, heads = adce.open_store(bucket), []
    assert isinstance(store, adce.S3Store)
    store._client.meta.events.register("before-call.s3.HeadObject", lambda **_: heads.append("asked"))
    upstream.answer("/x", Answer(b"whole"))
    dataset = adce.Dataset("box", "box", adce.Template("a"), url=adce.Template("/x"))
    row = adce.ObjectRow(key="a", state=adce.ObjectState.MISSING, proven=proven, attempts=attempts)
    claimed = adce.Claim(dataset, adce.Source("box"), (row,), url=f"{upstream.address}/x")
    (result,) = adce.fetch(claimed, store, adce.Clock())
    assert (result.outcome, len(heads)) == (adce.Outcome.OK, looks)


def test_small_body_in_memory_is_inspected_by_another_process_too(store):
    by_id = adce.Partitions(parents=("box",), regex=r"id=(\d+)", id_field="id")
    child = adce.Dataset("child", "box", adce.Template("{id}"), by_id)
    with store.spool() as body:
        content = b"id=7 id=8" + bytes(range(256)) * 1000
        adce.fill(body, content)
        body.seek(0)
        assert body.read(2) == b"id"
        found = adce.inspect_apart(adce.Dataset("box", "box", adce.Template("a")), {}, body, (child,), None)
        body.seek(0)
        assert body.read(10_000) + body.read() == content  # the process has not moved what follows
    assert list(found.mentions.values()) == [("7", "8")]


def test_disk_that_goes_away_under_a_body_is_an_error_of_the_store(tmp_path):
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    with store.spool() as body:
        adce.fill(body, b"content")
        shutil.rmtree(tmp_path / "lake" / adce.STAGING)
        (tmp_path / "lake" / adce.STAGING).touch()  # nothing below it can be removed, either
        with pytest.raises(adce.StoreError, match="cannot be written"):
            store.write("a.txt", body)
