"""The program, which stops itself (SIGSTOP) once, when it is connected and its first request is about to be sent.

python tests/battery/stopping.py [words of adce.py]
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import adce

if __name__ == "__main__":
    numbers, watch = itertools.count(), adce.Deadline.watch

    def stop_and_go_on(*arguments: Any) -> None:
        if next(numbers) == 0:
            until = time.monotonic() + 1
            os.kill(os.getpid(), signal.SIGSTOP)
            while time.monotonic() < until:  # this thread may run on for a moment
                time.sleep(0.001)
        watch(*arguments)

    adce.Deadline.watch = stop_and_go_on
    adce.SEND_WITHIN_SECONDS = adce.RELEASE_WITHIN_SECONDS = 1
    status = adce.main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)
