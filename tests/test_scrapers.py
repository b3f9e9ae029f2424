"""Commands and calls that bring objects."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from runners import wait_until

import adce

WHOLE = '{"id": "7"}'


@pytest.fixture
def store(tmp_path) -> adce.FolderStore:
    store = adce.FolderStore(tmp_path / "lake")
    store.sweep()
    return store


def specification(folder: Path, *words: str, targets: tuple[str, ...] = ("7",), **more) -> adce.Claim:
    settings = {"command": tuple(map(adce.Template, words)), "timeout_seconds": 5, **more}
    dataset = adce.Dataset(
        name="games",
        source="espn",
        key=adce.Template("games/{game_id}.json"),
        partitions=adce.Partitions(parents=("days",), id_field="game_id"),
        validate=adce.Validation(json=True, require=("id == '{game_id}'",)),
        **settings,
    )
    wanted = tuple(
        adce.ObjectRow(key=f"games/{game}.json", fields_json=f'{{"game_id": "{game}"}}', state=adce.ObjectState.MISSING)
        for game in targets
    )
    environment = {
        "ADCE_CONFIG": str(folder / "adce.yaml"),
        "ADCE_DB": str(folder / "adce.db"),
        "ADCE_SOURCE": "espn",
        "ADCE_TASK": "7",
    }
    return adce.Claim(dataset, adce.Source("espn"), wanted, environment=environment)


def run(spec: adce.Claim, store: adce.Store) -> list[adce.Result]:
    return adce.fetch(spec, store, adce.Clock())


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


WRITE = f"mkdir -p lake/games; echo '{WHOLE}' > lake/games/{{game_id}}.json"
O = adce.Outcome  # noqa: E741  # a column of the table


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        (WRITE, O.OK, None),
        (f"{WRITE}; exit 3", O.OK, None),
        ("echo nothing to do", O.ERROR, "left no games/7.json (exit 0): nothing to do"),
        ("echo broken >&2; exit 1", O.ERROR, "left no games/7.json (exit 1): broken"),
        ("kill -9 $$", O.ERROR, "left no games/7.json (killed by SIGKILL): empty"),
        ("mkdir -p lake/games; echo '{' > lake/games/7.json", O.INVALID, "not JSON"),
        ("sleep 60", O.TIMEOUT, "left no games/7.json (timed out)"),
        ("trap '' TERM; kill -STOP $$", O.TIMEOUT, "left no games/7.json (timed out)"),
    ],
)
def test_verdict_is_what_the_store_holds_afterwards(script, outcome, reason, store, tmp_path):
    seconds = 0.5 if outcome is O.TIMEOUT else 10.0
    started = time.monotonic()
    result = run(specification(tmp_path, *shell(script), timeout_seconds=seconds), store)[0]
    assert (result.outcome, result.requests) == (outcome, 0)
    assert (reason or "") in (result.error or "")
    assert time.monotonic() - started < 30


def test_object_counts_although_the_folder_of_its_program_cannot_be_removed(store, tmp_path, monkeypatch):
    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        result = run(specification(tmp_path, *shell(f"echo '{WHOLE}' > $ADCE_OUTPUT")), store)[0]
    assert (result.outcome, result.error) == (O.OK, None)
    assert [stored.key for stored in store.list("")] == ["games/7.json"]
    assert list(adce.output_folder(tmp_path / "adce.db").iterdir()) != []  # it was there indeed


def test_program_that_is_not_there_is_named(store, tmp_path):
    result = run(specification(tmp_path, "no-such-scraper", "{game_id}"), store)[0]
    assert (result.outcome, result.error) == (O.ERROR, "cannot start no-such-scraper: No such file or directory")


def test_grandchild_ends_with_its_group(store, tmp_path):
    script = "sleep 321 & echo $! > grandchild; wait"
    run(specification(tmp_path, *shell(script), timeout_seconds=0.5), store)
    wait_for_end(int((tmp_path / "grandchild").read_text()))


def test_grandchild_ends_when_its_program_ends_well(store, tmp_path):
    result = run(specification(tmp_path, *shell(f"sleep 321 & echo $! > grandchild; {WRITE}")), store)[0]
    assert result.outcome is O.OK
    wait_for_end(int((tmp_path / "grandchild").read_text()))


def test_program_that_left_its_group_is_found_and_ended(store, tmp_path):
    result = run(specification(tmp_path, *shell("setsid sleep 60 & echo $! > escaped; echo done")), store)[0]
    assert result.error == "left no games/7.json (exit 0): done"
    wait_for_end(int((tmp_path / "escaped").read_text()))


def test_program_that_has_shed_its_environment_and_holds_the_output_is_not_waited_for(store, tmp_path):
    started = time.monotonic()
    result = run(specification(tmp_path, *shell("setsid env -i /bin/sleep 60 & echo $! > shed; echo done")), store)[0]
    assert result.error == "left no games/7.json (exit 0): done"
    assert time.monotonic() - started < 30
    os.kill(int((tmp_path / "shed").read_text()), signal.SIGKILL)


def wait_for_end(number: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(number):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_endless_output_is_kept_to_its_end(store, tmp_path):
    result = run(specification(tmp_path, *shell("yes x | head -c 20000000; echo the end")), store)[0]
    assert result.error and result.error.endswith("the end")
    assert len(result.error) < 300


def test_output_without_end_fills_no_disk(store, tmp_path):
    """A limit on the size of files kills the program at once if what it prints goes to one."""
    script = "ulimit -f 1000; yes & sleep 0.5; kill $!; wait $!; echo killed by $(kill -l $?)"
    result = run(specification(tmp_path, *shell(script)), store)[0]
    assert result.error and result.error.endswith("killed by TERM")


def test_output_that_is_no_text_is_shown_as_such(store, tmp_path):
    result = run(specification(tmp_path, *shell(r"printf '\377\000\033[31m oops \n'; exit 1")), store)[0]
    assert result.error == "left no games/7.json (exit 1): \ufffd??[31m oops"


def test_environment_is_a_list_of_names(store, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    run(specification(tmp_path, *shell("env > environment")), store)
    lines = (tmp_path / "environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines} - {"PWD", "OLDPWD", "SHLVL", "_"}  # the shell's own
    assert names <= {*adce.INHERITED, "ADCE_CONFIG", "ADCE_DB", "ADCE_SOURCE", "ADCE_TASK", "ADCE_OUTPUT", "PYTHONPATH"}
    assert "ADCE_SOURCE=espn" in lines and names >= {"PATH"}


def test_command_finds_the_interpreter_and_the_module_of_the_runner(store, tmp_path):
    script = "import adce, sys; open('found', 'w').write(f'{adce.__file__} {sys.executable}')"
    run(specification(tmp_path, "python", "-c", script), store)
    module, interpreter = (tmp_path / "found").read_text().split()
    assert Path(module) == Path(str(adce.__file__)).resolve()
    assert Path(interpreter).parent == Path(sys.executable).parent


def test_program_inherits_nothing_open(store, tmp_path):
    with (tmp_path / "secret").open("w+") as file:
        os.set_inheritable(file.fileno(), True)
        own = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            run(specification(tmp_path, *shell("ls /proc/self/fd > open; readlink /proc/self/fd/0 >> open")), store)
        finally:
            os.dup2(own, 0)
            os.close(own)
    *numbers, standard_input = (tmp_path / "open").read_text().split()
    assert (set(numbers) <= {"0", "1", "2", "3"}, standard_input) == (True, "/dev/null")  # 3 is what ls reads


def test_process_of_its_group_is_ended_although_it_has_cleared_its_environment(store, tmp_path):
    script = "env -i sleep 60 & echo $! > number"
    run(specification(tmp_path, *shell(script)), store)
    state = Path("/proc", (tmp_path / "number").read_text().strip(), "stat")
    wait_until(lambda: not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX", 10)


def test_argument_is_one_word_whatever_is_in_it(store, tmp_path):
    spec = specification(
        tmp_path, "/bin/sh", "-c", 'echo "$1" > argument', "sh", "{game_id}", targets=("; rm -rf $HOME",)
    )
    run(spec, store)
    assert (tmp_path / "argument").read_text() == "; rm -rf $HOME\n"


def test_one_command_brings_many_objects_and_each_is_judged(store, tmp_path):
    script = r"""
        mkdir -p lake/games
        for game in $(echo {game_ids} | tr , ' '); do
            [ $game = 9 ] || printf '%s' "<\"id\": \"$game\">" | tr '<>' '\173\175' > lake/games/$game.json
        done
    """
    results = run(specification(tmp_path, *shell(script), targets=("7", "8", "9")), store)
    assert [result.outcome for result in results] == [O.OK, O.OK, O.ERROR]


SCRAPER = f"""
import pathlib, sys
def bytes_(game_id): return b'{WHOLE}'
def path(game_id):
    pathlib.Path('body').write_bytes(b'{WHOLE}'); return 'body'
def wrong(game_id): return {{}}
def raises(game_id): raise ValueError('no luck\\n')
def exits(game_id): sys.exit(3)
def recursion(game_id): return recursion(game_id)
def interrupted(game_id): raise KeyboardInterrupt
def generator(game_id): raise GeneratorExit
def long(game_id): raise ValueError('x' * 10_000_000)
def nothing(game_id): return None
def nowhere(game_id): return 'no-such-file'
def invalid(game_id): return b'{{}}'
class Odd(Exception):
    def __str__(self): raise RuntimeError
def odd(game_id): raise Odd
"""


@pytest.mark.parametrize(
    ("function", "outcome", "reason"),
    [
        ("bytes_", O.OK, None),
        ("path", O.OK, None),
        ("wrong", O.ERROR, "TypeError: returned dict, not bytes, an iterator of bytes or a path"),
        ("raises", O.ERROR, "ValueError: no luck"),
        ("exits", O.ERROR, "SystemExit: 3"),
        ("recursion", O.ERROR, "RecursionError: maximum recursion depth exceeded"),
        ("odd", O.ERROR, "Odd"),
        ("interrupted", O.ERROR, "KeyboardInterrupt:"),
        ("generator", O.ERROR, "GeneratorExit:"),
        ("long", O.ERROR, f"ValueError: {'x' * 108}"),
        ("nothing", O.ERROR, "left no games/7.json (exit 0): empty"),
        ("nowhere", O.ERROR, "FileNotFoundError: [Errno 2] No such file or directory: 'no-such-file'"),
        ("invalid", O.INVALID, "require is not true: id == '{game_id}'"),
        ("missing", O.ERROR, "AttributeError: module 'a_scraper' has no attribute 'missing'"),
    ],
)
def test_call_brings_bytes_or_a_path_or_fails_in_words(function, outcome, reason, store, tmp_path):
    (tmp_path / "a_scraper.py").write_text(SCRAPER)
    result = run(specification(tmp_path, command=(), call=f"a_scraper:{function}"), store)[0]
    assert (result.outcome, result.error) == (outcome, reason)
    assert [stored.key for stored in store.list("")] == (["games/7.json"] if outcome is O.OK else [])
