"""The packages as they are today, each file by its digest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def pip(python: Path | str, *words: str | Path) -> str:
    command = [python, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.timeout(600)
def test_requirements_install_with_a_digest_for_every_file(tmp_path):
    report = tmp_path / "report.json"
    resolve = ("install", "--dry-run", "--ignore-installed", "-q", "--report", report)
    pip(sys.executable, *resolve, "-r", ROOT / "requirements.txt")
    lines = []
    for one in json.loads(report.read_text(encoding="utf-8"))["install"]:
        name, version = one["metadata"]["name"], one["metadata"]["version"]
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    (tmp_path / "locked.txt").write_text("\n".join(lines), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    pip(python, "install", "-q", "--require-hashes", "--no-deps", "-r", tmp_path / "locked.txt")
    pip(python, "check")
    words = [python, ROOT / "adce.py", "check", "-c", ROOT / "adce.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
