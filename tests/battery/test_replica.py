"""The database replicated by Litestream to a real S3 server: the disk is lost, and the work goes on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from conftest import run_adce
from lakes import write_league
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from upstream import League

import adce

LITESTREAM = Path(sysconfig.get_path("scripts"), "litestream")
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def settings(folder: Path, server: S3Server) -> Path:
    """What the guide shows, with an S3 server of our own."""
    path = folder / "litestream.yml"
    replica = {"type": "s3", "bucket": BUCKET, "path": "adce.db", "endpoint": server.endpoint, "region": "us-east-1"}
    replica |= {"force-path-style": True, "sync-interval": "100ms"}
    replica |= {"access-key-id": ACCESS_KEY, "secret-access-key": SECRET_KEY}
    path.write_text(json.dumps({"dbs": [{"path": str(folder / "adce.db"), "replica": replica}]}))  # JSON is YAML
    return path


@contextlib.contextmanager
def replicating(config: Path) -> Iterator[None]:
    with (config.parent / "litestream.log").open("wb") as log:
        process = subprocess.Popen(
            [LITESTREAM, "replicate", "-config", config], stdout=log, stderr=log, env=ENVIRONMENT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


def restore(config: Path, path: Path) -> bool:
    words = [LITESTREAM, "restore", "-config", config, "-o", path, config.parent / "adce.db"]
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0


def facts(path: Path) -> list[tuple]:
    with contextlib.closing(adce.open_database(path, must_exist=True)) as database:
        assert database.check() == []
        return [tuple(row) for row in database.read("select key, state, etag from objects order by key")]


@pytest.mark.timeout(180)
def test_disk_is_lost_and_the_work_goes_on_from_the_replica(upstream, tmp_path):
    League(date(2025, 1, 1), 6, games_per_day=(1, 3), seed=3).serve(upstream)
    write_league(tmp_path, upstream.address)
    with S3Server() as server:
        config = settings(tmp_path, server)
        run_adce("reconcile", folder=tmp_path)
        with replicating(config):
            assert run_adce("run", "--once", folder=tmp_path).returncode in (0, 3)
            before, deadline = facts(tmp_path / "adce.db"), time.monotonic() + 60
            tries = (tmp_path / f"try{number}.db" for number in range(1000))
            while not (restore(config, copy := next(tries)) and facts(copy) == before):
                assert time.monotonic() < deadline, (tmp_path / "litestream.log").read_text()[-2000:]
                time.sleep(0.2)
        asked = upstream.count()
        for lost in tmp_path.glob("adce.db*"):
            if lost.is_file():
                lost.unlink()
        assert restore(config, tmp_path / "adce.db")
        (tmp_path / "adce.db").chmod(0o600)
    assert run_adce("check", folder=tmp_path).returncode == 0
    assert facts(tmp_path / "adce.db") == before
    assert run_adce("run", "--once", folder=tmp_path).returncode in (0, 3)
    assert upstream.count() == asked  # nothing is fetched again
