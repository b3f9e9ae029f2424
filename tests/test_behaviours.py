"""Scrapers however they behave: each is judged, ends in time, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import run_adce
from runners import read_object, wait_until
from upstream import Upstream, json_answer

import adce

O = adce.Outcome  # noqa: E741  # a column of the tables
WHOLE = '{"id": "7"}'
KEY = "games/7.json"
WRITE = f"mkdir -p lake/games; echo '{WHOLE}' > lake/{KEY}"
LATE_SECONDS = 0.4  # the patience with those that never end by themselves
SLACK_SECONDS = 12  # of a busy machine; less than the patience with the others
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Scraper:
    """A scraper, what is to be said of it, and how soon."""

    script: str
    outcome: adce.Outcome
    reason: str = ""  # a part of it
    patience: float = 20  # its timeout_seconds
    within: float = SLACK_SECONDS  # seconds in which it is over
    output: str = "store"
    max_bytes: int = 256 * MEGABYTE
    words: tuple[str, ...] = ("/bin/sh", "scraper")
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # mode and content


def of(name: str, *arguments, marks=(), **settings):
    return pytest.param(Scraper(*arguments, **settings), id=name.replace(" ", "-"), marks=marks)


LENGTHY = pytest.mark.battery
LATE = {"patience": LATE_SECONDS}
STUBBORN = {"patience": LATE_SECONDS, "within": adce.TERMINATE_SECONDS + SLACK_SECONDS}
PRINTED = {"output": "stdout"}
PYTHON = f"{shlex.quote(sys.executable)} -I -S -c"
DAEMON = """
import os
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
open('away', 'w')
os.execvp('sleep', ['sleep', '300'])
"""
UNTIL_AWAY = "until [ -e away ]; do sleep 0.01; done"
ESCAPE = f"setsid sh -c 'touch away; exec sleep 300' & {UNTIL_AWAY}"
NOISY = """
import signal, time
signal.signal(15, lambda *_: print('not yet', flush=True))
while True:
    print('on', flush=True)
    time.sleep(.01)
"""

COMMANDS = [
    of("exit 0 with a whole object", WRITE, O.OK),
    of("whole object and exit 3", f"{WRITE}; exit 3", O.OK),
    of("exit 1 with words on stderr", "echo no luck >&2; exit 1", O.ERROR, "left no games/7.json (exit 1): no luck"),
    of("exit 255", "exit 255", O.ERROR, "left no games/7.json (exit 255): empty"),
    of("killed by SIGSEGV", "kill -SEGV $$", O.ERROR, "left no games/7.json (killed by SIGSEGV): empty"),
    of("killed by SIGKILL", "kill -KILL $$", O.ERROR, "left no games/7.json (killed by SIGKILL): empty"),
    of("killed by SIGTERM of its own", "kill $$", O.ERROR, "left no games/7.json (killed by SIGTERM): empty"),
    of("killed by a real-time signal", "kill -36 $$", O.ERROR, "left no games/7.json (killed by signal 36): empty"),
    of("killed with its whole group", "echo last words; kill -KILL 0", O.ERROR, "(killed by SIGKILL): last words"),
    of("silence without end", "exec sleep 300", O.TIMEOUT, "left no games/7.json (timed out): empty", **LATE),
    of("writes nothing", "true", O.ERROR, "left no games/7.json (exit 0): empty"),
    of(
        "writes the wrong key",
        "mkdir -p lake/games; echo 1 > lake/games/8.json",
        O.ERROR,
        "left no games/7.json (exit 0)",
    ),
    of("half an object", f"mkdir -p lake/games; printf '{WHOLE[:6]}' > lake/{KEY}", O.INVALID, "not JSON"),
    of("empty object", f"mkdir -p lake/games; : > lake/{KEY}", O.INVALID, "0 bytes, fewer than 1"),
    of("object of another id", f'{WRITE}; echo \'{{"id": "8"}}\' > lake/{KEY}', O.INVALID, "is not true: id =="),
    of("object is a folder", f"mkdir -p lake/{KEY}", O.ERROR, "left no games/7.json (exit 0)"),
    of("object is a pipe", f"mkdir -p lake/games; mkfifo lake/{KEY}", O.ERROR, "left no games/7.json (exit 0)"),
    of(
        "object is a link",
        f"mkdir -p lake/games; ln -s /etc/passwd lake/{KEY}",
        O.ERROR,
        "left no games/7.json (exit 0)",
    ),
    of(
        "object in the store that is too long",
        f"{WRITE}; head -c 2000 /dev/zero | tr '\\0' ' ' >> lake/{KEY}",
        O.INVALID,
        "longer than 1000 bytes",
        max_bytes=1000,
    ),
    of(
        "object in the store that fills the memory",
        f"mkdir -p lake/games; truncate -s 200M lake/{KEY}",
        O.INVALID,
        "longer than 1000 bytes",
        max_bytes=1000,
    ),
    of("writes, then hangs", f"{WRITE}; exec sleep 300", O.OK, **LATE),
    of("writes half, then hangs", f"{WRITE}; printf '{{' > lake/{KEY}; sleep 300", O.INVALID, "not JSON", **LATE),
    of("ignores TERM", "trap '' TERM; sleep 300 & wait; sleep 300", O.TIMEOUT, "(timed out)", **STUBBORN),
    of("goes on printing at TERM", f'exec {PYTHON} "{NOISY}"', O.TIMEOUT, "(timed out): ", marks=LENGTHY, **STUBBORN),
    of("stops itself", "kill -STOP $$", O.TIMEOUT, "left no games/7.json (timed out): empty", **STUBBORN),
    of("finishes at TERM", f"finish() {{ {WRITE}; exit; }}; trap finish TERM; sleep 300 & wait", O.OK, **LATE),
    of(
        "10 GB of output",
        "head -c 10G /dev/zero; exit 1",
        O.ERROR,
        "(exit 1): ????",
        marks=LENGTHY,
        patience=60,
        within=40,
    ),
    of("endless output", "exec yes", O.TIMEOUT, "(timed out): y y y", **LATE),
    of("binary output", r"printf '\377\376\000\001'; exit 1", O.ERROR, "(exit 1): \ufffd\ufffd??"),
    of("escapes and newlines", r"printf '\033[2J\033]0;x\007a\nb\r\nc'; exit 1", O.ERROR, "(exit 1): ?[2J?]0;x?a b c"),
    of("closes its output and goes on", f"exec >&- 2>&-; sleep 0.3; {WRITE}", O.OK),
    of("closes its output and hangs", "exec >&- 2>&-; exec sleep 300", O.TIMEOUT, "(timed out): empty", **LATE),
    of("reads its input", "cat; read line || echo nothing to read", O.ERROR, "(exit 0): nothing to read"),
    of("wants a secret", 'echo "key: ${A_SECRET:-not there}"', O.ERROR, "(exit 0): key: not there"),
    of("changes its folder", f'home=$PWD; cd /; cd "$home"; {WRITE}; cd /', O.OK),
    of("grandchild that holds its output", f"sleep 300 & {WRITE}", O.OK),
    of("grandchild in the background", f"sleep 300 >/dev/null 2>&1 & {WRITE}", O.OK),
    of("grandchild of one that hangs", "sleep 300 & sleep 300", O.TIMEOUT, "(timed out)", **LATE),
    of("grandchild that ignores TERM", f"(trap '' TERM; sleep 300) & {WRITE}", O.OK),
    of("grandchild that is stopped", f"sleep 300 & kill -STOP $!; {WRITE}", O.OK),
    of("grandchild in another session", f"{ESCAPE}; {WRITE}", O.OK),
    of("grandchild in another session of one that hangs", f"{ESCAPE}; sleep 300", O.TIMEOUT, **LATE),
    of("daemon that has forked twice", f'{PYTHON} "{DAEMON}"; {UNTIL_AWAY}; {WRITE}', O.OK),
    of("20 children with 20 of their own", f"for n in $(seq 20); do (sleep 300 & sleep 300) & done; {WRITE}", O.OK),
    of(
        "children in sessions that breed",
        f"echo 'sleep 0.05; setsid sh breed & exec sleep 300' > breed; setsid sh breed & {WRITE}",
        O.OK,
    ),
    of("no such program", "", O.ERROR, "cannot start no-such: No such file or directory", words=("no-such",)),
    of("file without permission", "", O.ERROR, "cannot start ./scraper: Permission denied", words=("./scraper",)),
    of("folder as a program", "", O.ERROR, "cannot start ./lake: Permission denied", words=("./lake",)),
    of(
        "interpreter that is not there",
        "",
        O.ERROR,
        "cannot start ./odd: No such file or directory",
        words=("./odd",),
        files={"odd": (0o755, "#!/no/such/interpreter\n")},
    ),
    of(
        "neither a script nor a binary",
        "",
        O.ERROR,
        "cannot start ./odd: Exec format error",
        words=("./odd",),
        files={"odd": (0o755, "echo no interpreter named\n")},
    ),
    of(
        "argument too long",
        "",
        O.ERROR,
        "cannot start /bin/echo: Argument list too long",
        words=("/bin/echo", "x" * 200_000),
    ),
    of("argument with NUL", "", O.ERROR, "cannot start /bin/echo: embedded null byte", words=("/bin/echo", "a\0b")),
    of("prints the object", f"echo '{WHOLE}'", O.OK, **PRINTED),
    of("prints the object and noise on stderr", f"echo noise >&2; echo '{WHOLE}'", O.OK, **PRINTED),
    of(
        "prints the object and exits with 1",
        f"echo '{WHOLE}'; exit 1",
        O.ERROR,
        "12 bytes, which are not taken (exit 1)",
        **PRINTED,
    ),
    of(
        "prints the object and is killed",
        f"echo '{WHOLE}'; kill -9 $$",
        O.ERROR,
        "not taken (killed by SIGKILL)",
        **PRINTED,
    ),
    of(
        "prints the object and hangs",
        f"echo '{WHOLE}'; sleep 300",
        O.TIMEOUT,
        "not taken (timed out)",
        **PRINTED,
        **LATE,
    ),
    of("prints too much", "exec yes", O.ERROR, "printed more than 1000 bytes", **PRINTED, max_bytes=1000),
    of(
        "prints too much and ignores TERM",
        "trap '' TERM PIPE; yes",
        O.ERROR,
        "printed more than 1000 bytes",
        **PRINTED,
        max_bytes=1000,
    ),
    of(
        "prints one byte too many",
        "head -c 1001 /dev/zero",
        O.ERROR,
        "printed more than 1000 bytes",
        **PRINTED,
        max_bytes=1000,
    ),
    of("prints nothing", "true", O.ERROR, "left no games/7.json (exit 0): empty", **PRINTED),
    of(
        "prints nothing but a complaint",
        "echo no luck >&2; exit 4",
        O.ERROR,
        "left no games/7.json (exit 4): no luck",
        **PRINTED,
    ),
    of("prints garbage", "echo garbage", O.INVALID, "not JSON", **PRINTED),
    of("prints half of it", f"printf '{WHOLE[:6]}'", O.INVALID, "not JSON", **PRINTED),
    of(
        "prints 10 GB on stderr",
        f"head -c 10G /dev/zero >&2; echo '{WHOLE}'",
        O.OK,
        marks=LENGTHY,
        **PRINTED,
        patience=60,
        within=40,
    ),
    of("prints 5 MB at once", f"printf '%5000000s' ''; echo '{WHOLE}'", O.OK, **PRINTED),
    of("hands over a file", f"echo '{WHOLE}' > $ADCE_OUTPUT", O.OK),
    of(
        "hands over a file and exits with 1",
        f"echo '{WHOLE}' > $ADCE_OUTPUT; exit 1",
        O.ERROR,
        "12 bytes, which are not taken (exit 1)",
    ),
    of(
        "hands over a file and hangs",
        f"echo '{WHOLE}' > $ADCE_OUTPUT; sleep 300",
        O.TIMEOUT,
        "not taken (timed out)",
        **LATE,
    ),
    of("hands over half of it", f"printf '{WHOLE[:6]}' > $ADCE_OUTPUT", O.INVALID, "not JSON"),
    of("hands over an empty file", ": > $ADCE_OUTPUT", O.ERROR, "left no games/7.json (exit 0)"),
    of("hands over a pipe", "mkfifo $ADCE_OUTPUT", O.ERROR, "left no games/7.json (exit 0)"),
    of(
        "hands over a link",
        f"echo '{WHOLE}' > real; ln -s $PWD/real $ADCE_OUTPUT",
        O.ERROR,
        "left no games/7.json (exit 0)",
    ),
    of(
        "hands over a folder",
        f"mkdir $ADCE_OUTPUT; echo '{WHOLE}' > $ADCE_OUTPUT/object",
        O.ERROR,
        "left no games/7.json (exit 0)",
    ),
    of("hands over too much", "truncate -s 10G $ADCE_OUTPUT", O.INVALID, "longer than 1000 bytes", max_bytes=1000),
    of("takes its place away", "rm -r $(dirname $ADCE_OUTPUT)", O.ERROR, "left no games/7.json (exit 0)"),
    of("takes away the folder of all places", "rm -r $ADCE_DB-output", O.ERROR, "left no games/7.json (exit 0)"),
    of(
        "leaves other files at its place",
        "echo 1 > $(dirname $ADCE_OUTPUT)/other",
        O.ERROR,
        "left no games/7.json (exit 0)",
    ),
]


def dataset_of(scraper: Scraper, **more) -> adce.Dataset:
    settings = {"command": tuple(map(adce.Template, scraper.words)), **more}
    return adce.Dataset(
        name="games",
        source="espn",
        key=adce.Template("games/{game_id}.json"),
        partitions=adce.Partitions(parents=("days",), id_field="game_id"),
        validate=adce.Validation(json=True, require=("id == '{game_id}'",), max_bytes=scraper.max_bytes),
        timeout_seconds=scraper.patience,
        output=scraper.output,
        **settings,
    )


def spec_of(folder: Path, dataset: adce.Dataset, targets: tuple[str, ...] = ("7",)) -> adce.Claim:
    environment = {
        "ADCE_CONFIG": str(folder / "adce.yaml"),
        "ADCE_DB": str(folder / "adce.db"),
        "ADCE_SOURCE": "espn",
        "ADCE_TASK": ",".join(targets),
    }
    wanted = tuple(
        adce.ObjectRow(key=f"games/{game}.json", fields_json=f'{{"game_id": "{game}"}}', state=adce.ObjectState.MISSING)
        for game in targets
    )
    return adce.Claim(dataset, adce.Source("espn"), wanted, environment=environment)


@pytest.fixture
def store(tmp_path) -> adce.FolderStore:
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    return store


def processes_of(folder: Path) -> dict[int, str]:
    """Those that live, and work in a folder or were begun with its name, but this one."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                traces = os.fsencode((entry / "cwd").readlink()) + b"\0" + (entry / "environ").read_bytes()
                if str(folder).encode() in traces:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def peak_memory() -> int:
    """The most that this process has held since forget_peak(), in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """No process, file, descriptor, thread, variable or memory of a scraper is there after the block."""
    adce.is_found_apart("", "a+", "a")  # the inspector stays for the next content
    inspectors = processes_of(folder).keys()  # if it was started here
    before = descriptors(), threading.active_count(), dict(os.environ), Path.cwd()
    held = forget_peak()
    yield
    assert peak_memory() - held < 60 * MEGABYTE
    assert (descriptors(), threading.active_count(), dict(os.environ), Path.cwd()) == before
    wait_until(lambda: processes_of(folder).keys() <= inspectors)
    output = adce.output_folder(folder / "adce.db")
    assert not output.exists() or not list(output.iterdir())
    assert not list((folder / "lake" / adce.STAGING).iterdir())


def judge(scraper: Scraper, result: adce.Result, seconds: float) -> None:
    assert (result.outcome, scraper.reason in (result.error or "")) == (scraper.outcome, True), result.error
    assert (result.error is None) == (result.outcome is O.OK)
    assert (result.error or "").isprintable() and len(result.error or "") < 300
    assert seconds < scraper.patience + scraper.within if scraper.outcome is O.TIMEOUT else seconds < scraper.within


@pytest.mark.parametrize("scraper", COMMANDS)
def test_command_is_judged_ends_in_time_and_leaves_nothing(scraper, store, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    (tmp_path / "scraper").write_text(scraper.script)
    for name, (mode, content) in scraper.files.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
    with nothing_left(tmp_path):
        started = time.monotonic()
        (result,) = adce.fetch(spec_of(tmp_path, dataset_of(scraper)), store, adce.Clock())
        seconds = time.monotonic() - started
    judge(scraper, result, seconds)
    if scraper.outcome is O.OK:
        assert (result.stored, read_object(store, KEY).strip()) == (store.find(KEY), WHOLE.encode())
    elif "lake" not in scraper.script:
        assert list(store.list("")) == []


def batch_of(script: str, folder: Path, games: str, **more) -> adce.Claim:
    (folder / "scraper").write_text(script)
    dataset = dataset_of(Scraper(script, O.OK, words=("/bin/sh", "scraper", "{game_ids}")))
    return spec_of(folder, replace(dataset, batch=adce.Batch("date"), **more), tuple(games))


EACH = "for game in $(echo $1 | tr , ' '); do"
WRITE_EACH = 'printf \'{"id": "%s"}\' $game >'
SOME = f"""
    [ $game = 4 ] || {WRITE_EACH} $PLACE/games/$game.json
    [ $game != 5 ] || echo '{{' > $PLACE/games/5.json
done
echo 4 is not there
"""
VERDICTS = [O.OK, O.OK, O.OK, O.ERROR, O.INVALID]


@pytest.mark.parametrize("place", ["lake", "$ADCE_OUTPUT"])
def test_batch_closes_what_it_brought_and_tells_of_each_of_the_others(place, store, tmp_path):
    script = f"PLACE={place}; mkdir -p $PLACE/games; {EACH} {SOME}"
    with nothing_left(tmp_path):
        results = adce.fetch(batch_of(script, tmp_path, "12345"), store, adce.Clock())
    assert [result.outcome for result in results] == VERDICTS
    assert results[3].error == "left no games/4.json (exit 0): 4 is not there"
    assert results[4].error and results[4].error.startswith("not JSON")
    assert [read_object(store, f"games/{game}.json") for game in "123"] == [
        b'{"id": "%s"}' % game for game in (b"1", b"2", b"3")
    ]
    if place != "lake":
        assert [stored.key for stored in store.list("")] == [f"games/{game}.json" for game in "123"]


BATCHES = [
    pytest.param(
        f"mkdir $ADCE_OUTPUT/games; {EACH} {WRITE_EACH} $ADCE_OUTPUT/games/$game.json; done; {end}", *verdict, id=name
    )
    for name, end, verdict in [
        ("exit-1", "exit 1", (O.ERROR, "11 bytes, which are not taken (exit 1)")),
        ("killed", "kill -9 $$", (O.ERROR, "11 bytes, which are not taken (killed by SIGKILL)")),
        ("hangs", "sleep 300", (O.TIMEOUT, "11 bytes, which are not taken (timed out)")),
    ]
]


@pytest.mark.parametrize(("script", "outcome", "reason"), BATCHES)
def test_files_of_a_batch_that_failed_are_not_taken(script, outcome, reason, store, tmp_path):
    with nothing_left(tmp_path):
        results = adce.fetch(batch_of(script, tmp_path, "123", timeout_seconds=LATE_SECONDS), store, adce.Clock())
    assert [result.outcome for result in results] == [outcome] * 3
    assert all(reason in (result.error or "") for result in results)
    assert list(store.list("")) == []


def test_objects_in_the_store_count_also_when_their_batch_failed(store, tmp_path):
    script = f"mkdir -p lake/games; {EACH} {WRITE_EACH} lake/games/$game.json; [ $game != 2 ] || exit 9; done"
    with nothing_left(tmp_path):
        results = adce.fetch(batch_of(script, tmp_path, "123"), store, adce.Clock())
    assert [result.outcome for result in results] == [O.OK, O.OK, O.ERROR]
    assert results[2].error == "left no games/3.json (exit 9): empty"


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        pytest.param("true", O.ERROR, "left games/7.json as it was", id="does-nothing"),
        pytest.param("exit 1", O.ERROR, "left games/7.json as it was", id="fails"),
        pytest.param(
            "sleep 300",
            O.TIMEOUT,
            "timed out",
            id="hangs",
        ),
        pytest.param(
            "echo no luck >&2; exit 1",
            O.ERROR,
            "(exit 1): no luck",
            id="fails-with-words",
        ),
        pytest.param(f"cat lake/{KEY} > /dev/null", O.ERROR, "left games/7.json as it was", id="reads-it"),
        pytest.param(WRITE, O.OK, "", id="writes-the-same-again"),
        pytest.param(f"rm lake/{KEY}", O.ERROR, "left no games/7.json (exit 0)", id="removes-it"),
        pytest.param(f"{WRITE}; echo '{{' > lake/{KEY}", O.INVALID, "not JSON", id="spoils-it"),
    ],
)
def test_object_that_was_there_before_is_no_success(script, outcome, reason, store, tmp_path):
    old = store.write(KEY, WHOLE.encode())
    (tmp_path / "scraper").write_text(script)
    spec = spec_of(tmp_path, dataset_of(Scraper(script, outcome, patience=LATE_SECONDS)))
    target = spec.tasks[0]._replace(state=adce.ObjectState.STALE, etag=old.etag, modified_at=old.modified_at)
    with nothing_left(tmp_path):
        (result,) = adce.fetch(replace(spec, tasks=(target,)), store, adce.Clock())
    assert (result.outcome, reason in (result.error or "")) == (outcome, True), result.error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_program_is_ended_also_by_a_process_with_very_many_open_files(store, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1500:
        pytest.skip("so many files may not be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    (tmp_path / "scraper").write_text(f"{ESCAPE}; {WRITE}")
    try:
        with nothing_left(tmp_path):
            (result,) = adce.fetch(spec_of(tmp_path, dataset_of(Scraper("", O.OK))), store, adce.Clock())
        assert (result.outcome, result.error) == (O.OK, None)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_program_without_any_trace_of_its_origin_is_not_waited_for(store, tmp_path):
    """It has left its group, its session and its environment, and holds the output: the one that survives."""
    (tmp_path / "scraper").write_text("setsid env -i /bin/sleep 300 & echo $! > shed; echo done")
    before, started = descriptors(), time.monotonic()
    (result,) = adce.fetch(spec_of(tmp_path, dataset_of(Scraper("", O.ERROR))), store, adce.Clock())
    os.kill(int((tmp_path / "shed").read_text()), signal.SIGKILL)
    assert result.error == "left no games/7.json (exit 0): done"
    assert (time.monotonic() - started < SLACK_SECONDS, descriptors()) == (True, before)


FUNCTIONS = f"""
import itertools, os, pathlib, sys, threading
WHOLE = b'{WHOLE}'
class Odd(Exception):
    def __str__(self): raise RuntimeError
def stored(): os.makedirs('lake/games', exist_ok=True); pathlib.Path('lake/{KEY}').write_bytes(WHOLE)
def linked(): pathlib.Path('body').write_bytes(WHOLE); return pathlib.Path('body')
def midway(): yield WHOLE[:6]; raise OSError('the line was cut')
def endless():
    for number in itertools.count():
        pathlib.Path('blocks').write_text(str(number)); yield bytes(100)
def raising(error): raise error
def recursing(): return recursing()
def nested(depth=0): return b'[' * 100_000
def spoiled(): stored(); pathlib.Path('lake/{KEY}').write_text('{{')
def stored_then_raised(): stored(); raise ValueError('after all')
def none_of_them(other): return WHOLE
def some(season, game_id): return WHOLE if (season, game_id) == ('2025', '7') else b''
def default(game_id, other='there'): return WHOLE if other == 'there' else b''
def positional(game_id, /): return WHOLE
def threads():
    threading.Thread(target=GATE.wait, args=(20,), name='of a scraper', daemon=True).start(); return WHOLE
GATE = threading.Event()
def environment(): os.environ['ADCE_TEST_CHANGED'] = 'yes'; return WHOLE
number = 7
"""


def call(name: str, body: str, outcome: adce.Outcome, reason: str = "", marks=(), **settings):
    return pytest.param(body, Scraper("", outcome, reason, **settings), id=name.replace(" ", "-"), marks=marks)


CALLS = [
    call("bytes", "return WHOLE", O.OK),
    call("bytearray", "return bytearray(WHOLE)", O.OK),
    call("memoryview", "return memoryview(WHOLE)", O.OK),
    call("empty bytes", "return b''", O.INVALID, "0 bytes, fewer than 1"),
    call("half of it", "return WHOLE[:6]", O.INVALID, "not JSON"),
    call("too many bytes", "return bytes(1001)", O.INVALID, "longer than 1000 bytes", max_bytes=1000),
    call("nested too deep", "return nested()", O.INVALID, "not JSON"),
    call("path", "return linked()", O.OK),
    call("path as text", "return str(linked())", O.OK),
    call("path that is not there", "return 'nowhere'", O.ERROR, "FileNotFoundError: [Errno 2] No such file"),
    call("path of a folder", "return '.'", O.ERROR, "IsADirectoryError: [Errno 21] Is a directory"),
    call("path of something endless", "return '/dev/zero'", O.INVALID, "longer than 1000 bytes", max_bytes=1000),
    call("iterator of bytes", "return iter([WHOLE[:6], b'', WHOLE[6:]])", O.OK),
    call("iterator that raises midway", "return midway()", O.ERROR, "OSError: the line was cut"),
    call("iterator without end", "return endless()", O.INVALID, "longer than 1000 bytes", max_bytes=1000),
    call("iterator of texts", "return iter(['x'])", O.ERROR, "TypeError: "),
    call("iterator of nothing", "return iter(())", O.INVALID, "0 bytes, fewer than 1"),
    call("list of bytes", "return [WHOLE]", O.ERROR, "returned list, not bytes, an iterator of bytes or a path"),
    call("dict", "return {'id': '7'}", O.ERROR, "returned dict, not bytes, an iterator of bytes or a path"),
    call("number", "return 7", O.ERROR, "returned int, not bytes, an iterator of bytes or a path"),
    call("None and the object is stored", "stored()", O.OK),
    call("None and half of it is stored", "spoiled()", O.INVALID, "not JSON"),
    call("None and nothing is stored", "pass", O.ERROR, "left no games/7.json (exit 0): empty"),
    call("Exception", "raise ValueError('no\\nluck')", O.ERROR, "ValueError: no luck"),
    call("SystemExit", "sys.exit(0)", O.ERROR, "SystemExit: 0"),
    call("KeyboardInterrupt", "raise KeyboardInterrupt", O.ERROR, "KeyboardInterrupt"),
    call("GeneratorExit", "raise GeneratorExit", O.ERROR, "GeneratorExit"),
    call("StopIteration", "raise StopIteration", O.ERROR, "StopIteration"),
    call("exception without words", "raise Odd", O.ERROR, "Odd"),
    call("exception of 100 MB", "raise ValueError('x' * 100_000_000)", O.ERROR, "ValueError: xxx"),
    call("exception with escapes", "raise ValueError('\\x1b[2J\\0')", O.ERROR, "ValueError: ?[2J?"),
    call("RecursionError", "recursing()", O.ERROR, "RecursionError: maximum recursion depth exceeded"),
    call("MemoryError", "bytes(1 << 62)", O.ERROR, "MemoryError"),
    call("object is stored and it raises", "stored_then_raised()", O.ERROR, "ValueError: after all"),
    call("takes other arguments", "none_of_them", O.ERROR, "TypeError: none_of_them() missing 1 required"),
    call("takes some of the fields", "some", O.OK),
    call("takes what has a default", "default", O.OK),
    call("takes its fields by position", "positional", O.ERROR, "TypeError: positional() got some positional-only"),
    call("is no function", "number", O.ERROR, "TypeError: "),
    call("is not there", "no_such", O.ERROR, "AttributeError: module 'a_scraper' has no attribute 'no_such'"),
]


@pytest.fixture
def scrapers(tmp_path, monkeypatch) -> Path:
    """The module a_scraper, beside adce.yaml and nowhere on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return tmp_path / "a_scraper.py"


def call_spec(folder: Path, scraper: Scraper, function: str) -> adce.Claim:
    spec = spec_of(folder, dataset_of(scraper, command=(), call=function))
    target = spec.tasks[0]._replace(fields_json='{"game_id": "7", "season": "2025"}')
    return replace(spec, tasks=(target,))


@pytest.mark.parametrize(("body", "scraper"), CALLS)
def test_call_is_judged_ends_in_time_and_leaves_nothing(body, scraper, scrapers, store, tmp_path):
    is_name = body.isidentifier() and body != "pass"
    scrapers.write_text(FUNCTIONS + ("" if is_name else f"def function(): {body}\n"))
    spec = call_spec(tmp_path, scraper, f"a_scraper:{body if is_name else 'function'}")
    with nothing_left(tmp_path):
        started = time.monotonic()
        (result,) = adce.fetch(spec, store, adce.Clock())
        seconds = time.monotonic() - started
    judge(scraper, result, seconds)
    if scraper.outcome is O.OK:
        assert read_object(store, KEY) == WHOLE.encode()
    elif "stored" not in body and "spoiled" not in body:
        assert list(store.list("")) == []


def test_endless_iterator_is_asked_for_no_more_than_the_object_may_be_long(scrapers, store, tmp_path):
    scrapers.write_text(FUNCTIONS)
    adce.fetch(call_spec(tmp_path, Scraper("", O.OK, max_bytes=1000), "a_scraper:endless"), store, adce.Clock())
    assert (tmp_path / "blocks").read_text() == "10"  # from 0: one more than fits


@pytest.mark.parametrize(
    ("function", "content", "reason"),
    [
        pytest.param("no_such_scraper:f", None, "ModuleNotFoundError: No module named 'no_such_scraper'", id="none"),
        pytest.param("bad_scraper:f", "def f(:", "SyntaxError: ", id="cannot be read"),
        pytest.param("bad_scraper:f", "raise SystemExit(3)", "SystemExit: 3", id="exits"),
        pytest.param(
            "bad_scraper:f", "import no_such_thing", "ModuleNotFoundError: No module named", id="lacks another"
        ),
    ],
)
def test_module_that_cannot_be_loaded_is_told(function, content, reason, scrapers, store, tmp_path):
    if content:
        (tmp_path / "bad_scraper.py").write_text(content)
    (result,) = adce.fetch(call_spec(tmp_path, Scraper("", O.ERROR), function), store, adce.Clock())
    assert (result.outcome, reason in (result.error or "")) == (O.ERROR, True), result.error


@pytest.mark.parametrize("is_daemon", [True, False])
def test_thread_that_a_call_leaves_holds_nobody_up(is_daemon, scrapers, store, tmp_path):
    scrapers.write_text(FUNCTIONS.replace("daemon=True", f"daemon={is_daemon}"))
    started = time.monotonic()
    with nothing_left(tmp_path):
        (result,) = adce.fetch(call_spec(tmp_path, Scraper("", O.OK), "a_scraper:threads"), store, adce.Clock())
    assert (result.outcome, time.monotonic() - started < SLACK_SECONDS) == (O.OK, True)


def test_variable_that_a_call_sets_reaches_nothing_else(scrapers, store, tmp_path):
    scrapers.write_text(FUNCTIONS)
    (result,) = adce.fetch(call_spec(tmp_path, Scraper("", O.OK), "a_scraper:environment"), store, adce.Clock())
    assert (result.outcome, "ADCE_TEST_CHANGED" in os.environ) == (O.OK, False)


def test_call_has_the_variables_of_its_runner_and_those_of_a_command(scrapers, store, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    scrapers.write_text("import os\ndef given(): assert os.environ['A_SECRET'] == 'hunter2'; print(sorted(os.environ))")
    (result,) = adce.fetch(call_spec(tmp_path, Scraper("", O.ERROR), "a_scraper:given"), store, adce.Clock())
    assert result.output
    assert all(f"'ADCE_{name}'" in result.output for name in ("CONFIG", "DB", "SOURCE", "TASK", "OUTPUT"))


def test_traceback_of_a_call_is_kept_with_its_attempt(scrapers, store, tmp_path):
    scrapers.write_text("def fail():\n    print('first words')\n    raise ValueError('no luck')\n")
    (result,) = adce.fetch(call_spec(tmp_path, Scraper("", O.ERROR), "a_scraper:fail"), store, adce.Clock())
    assert (result.outcome, result.error) == (O.ERROR, "ValueError: no luck")
    assert result.output and "first words" in result.output
    assert re.search(r'File ".*a_scraper.py", line 3, in fail', result.output)


def test_call_that_is_refused_a_permit_has_lost_nothing_but_time(scrapers, store, tmp_path):
    scrapers.write_text("import adce\ndef ask(): raise adce.RateLimitedError('espn cannot be asked', 90.5)\n")
    (result,) = adce.fetch(call_spec(tmp_path, Scraper("", O.LOST), "a_scraper:ask"), store, adce.Clock())
    assert (result.outcome, result.error, result.retry_after) == (O.LOST, "espn cannot be asked", 90.5)


def test_call_is_no_command_for_a_terminal(tmp_path):
    done = run_adce("call", "os:getcwd", folder=tmp_path)
    assert (done.returncode, "invalid choice: 'call'" in done.stderr) == (2, True)


def test_call_that_never_returns_is_killed_with_all_that_it_began(scrapers, store, tmp_path):
    hang = "subprocess.Popen(['sleep', '300'], start_new_session=True); print('begun'); threading.Event().wait()"
    scrapers.write_text(f"import subprocess, threading\ndef hang(): {hang}\n")
    spec = call_spec(tmp_path, Scraper("", O.TIMEOUT, patience=2), "a_scraper:hang")
    started = time.monotonic()
    with nothing_left(tmp_path):
        (result,) = adce.fetch(spec, store, adce.Clock())
    assert (result.outcome, result.error) == (O.TIMEOUT, "left no games/7.json (timed out): begun")
    assert time.monotonic() - started < 2 + SLACK_SECONDS


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        pytest.param("os.kill(os.getpid(), 9)", "left no games/7.json (killed by SIGKILL): empty", id="killed"),
        pytest.param("os._exit(3)", "left no games/7.json (exit 3): empty", id="exits-at-once"),
        pytest.param("open(os.environ['ADCE_OUTPUT'], 'w').write('half'); os._exit(3)", "4 bytes, which", id="half"),
    ],
)
def test_call_that_ends_its_process_is_an_error(ending, reason, scrapers, store, tmp_path):
    scrapers.write_text(f"import os\ndef end(): {ending}\n")
    (result,) = adce.fetch(call_spec(tmp_path, Scraper("", O.ERROR), "a_scraper:end"), store, adce.Clock())
    assert (result.outcome, reason in (result.error or "")) == (O.ERROR, True), result.error


ASKING = """
sources: {{shop: {{base_url: "{address}"}}}}
rate_limiting: {{source_limits: {{shop: {{requests_per_second: 4}}}}}}
datasets:
  given: {{source: shop, key: "given/{{n}}", call: "an_asker:given", partitions: {{values: {{n: ["1"]}}}}}}
  orders: {{source: shop, key: "{{n}}", call: "an_asker:ask", partitions: {{values: {{n: ["1", "2", "3", "4"]}}}}}}
"""
ASK = """
def ask(n, session):
    return b" ".join(session.get(f"/{part}?n={n}").content for part in ("head", "body"))
def given(**all_of_it):
    return " ".join(sorted(all_of_it)).encode()
"""


def test_requests_of_a_session_are_counted_under_the_limits_of_their_source(tmp_path):
    with Upstream(limits=[(4, 1.0)]) as upstream:
        for part in ("head", "body"):
            upstream.route(f"/{part}", lambda path, query: json_answer([path, query["n"]]))
        (tmp_path / "adce.yaml").write_text(ASKING.format(address=upstream.address))
        (tmp_path / "an_asker.py").write_text(ASK)
        done = run_adce("run", "--once", folder=tmp_path)
        assert (done.returncode, upstream.count(), upstream.violations) == (0, 8, 0), done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "lake").iterdir() if path.is_file()} == {
        n: f'["/head", "{n}"] ["/body", "{n}"]' for n in "1234"
    }
    assert (tmp_path / "lake" / "given" / "1").read_text() == "n session"
    database = adce.open_database(tmp_path / "adce.db")
    assert database.value("select count(*) from finished where scope = 'shop'") >= 4
    asked = "select dataset, sum(requests) from attempts join recent_attempts using (attempt_id)"
    assert dict(map(tuple, database.read(f"{asked} group by 1"))) == {"given": 0, "orders": 8}
    database.close()


ASKING_PROGRAM = """
sources: {{shop: {{base_url: "{address}"}}}}
datasets:
  orders:
    source: shop
    key: "{{n}}"
    command: ["{python}", -c, "import adce, sys; sys.stdout.write(adce.session('shop').get('/order').text)"]
    output: stdout
    environment: [PYTHONPATH]
    partitions: {{values: {{n: ["1", "2"]}}}}
"""


def test_requests_of_a_program_count_for_its_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(adce.__file__).parent))
    with Upstream() as upstream:
        upstream.route("/order", lambda path, query: json_answer([path]))
        (tmp_path / "adce.yaml").write_text(ASKING_PROGRAM.format(address=upstream.address, python=sys.executable))
        done = run_adce("run", "--once", folder=tmp_path)
        assert (done.returncode, upstream.count()) == (0, 2), done.stderr
    database = adce.open_database(tmp_path / "adce.db")
    assert [tuple(row) for row in database.read("select outcome, requests from attempts")] == [("ok", 1)] * 2
    database.close()
