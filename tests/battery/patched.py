"""The program with some of its constants changed, so that a test need not wait a minute.

python tests/battery/patched.py STATEMENTS [words of adce.py]      such as 'adce.TROUBLE_SECONDS = 1'
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import adce

if __name__ == "__main__":
    exec(sys.argv[1], {"adce": adce, "os": os})
    status = adce.main(sys.argv[2:])
    sys.stderr.flush()
    os._exit(status)
