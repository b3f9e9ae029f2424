"""Many attempts, few workers: none is lost, none is one too many, and what dies or hangs holds up nobody."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import queue
import re
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import run_adce, start_adce
from runners import wait_until
from upstream import Answer

import adce


def rows(folder: Path, sql: str) -> list[tuple]:
    try:
        connection = sqlite3.connect(f"file:{folder / 'adce.db'}?mode=ro", uri=True)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()
    except sqlite3.OperationalError:  # it is not there yet
        return []


def living(folder: Path) -> list[str]:
    """The command lines of what works in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the program; what still runs at the end of the test is killed."""
    started = []

    def begin(*words: str, **environment: str) -> subprocess.Popen[str]:
        started.append(start_adce(*words, folder=tmp_path, **environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    adce.end_processes(str(tmp_path / "adce.db"))


@pytest.fixture
def scraper(tmp_path) -> Callable[[str], Path]:
    """Writes a program for `sh scraper` beside adce.yaml, and gives the folder."""

    def write(text: str) -> Path:
        (tmp_path / "scraper").write_text(text)
        return tmp_path

    return write


def run(
    configuration: adce.Configuration, database: adce.Database, clock: HurriedClock | None = None, **settings
) -> tuple[adce.Runner, str]:
    """A runner of this process to its end, and what it wrote."""
    lines = io.StringIO()
    journal = adce.Journal(lines, "DEBUG", clock or adce.Clock())
    runner = adce.Runner(configuration, database, adce.open_store(configuration.store), journal)
    if clock:
        clock.runner = runner
    runner.run(**{"once": True, "max_seconds": 60, **settings})
    return runner, lines.getvalue()


def numbers(count: int) -> str:
    return json.dumps([str(number) for number in range(count)])


MANY = """
retry: {{max_attempts: 2, initial_delay_seconds: 3600, max_delay_seconds: 3600}}
sources: {{box: {{blocked_when: {{failures_in_a_row: 1000000}}}}}}
datasets:
  few: {{source: box, key: "few/{{a}}/{{b}}", COMMAND, partitions: {{values: {{a: {few}, b: {b}}}}}}}
  more: {{source: box, key: "more/{{a}}/{{b}}", COMMAND, partitions: {{values: {{a: {more}, b: {b}}}}}}}
""".replace("COMMAND", 'command: [/bin/sh, -c, "[ $((({{a}} + {{b}}) % 4)) != 0 ] && echo x"], output: stdout')


def states_of(folder: Path) -> dict[str, int]:
    """How many objects have an open task in each state, or else are in a state themselves."""
    sql = "select coalesce(q.state, o.state), count(*) from objects_now o left join queue q using (key) group by 1"
    return dict(rows(folder, sql))


def no_count_is_lost(folder: Path, tens: int) -> None:
    """A fourth of them fails: a tenth of all twice, the others once."""
    first = MANY.format(few=numbers(tens), more='["0"]', b=numbers(20))
    for text in (first, MANY.format(few=numbers(tens), more=numbers(9 * tens), b=numbers(20))):
        (folder / "adce.yaml").write_text(text)
        done = run_adce("run", "--once", "-q", folder=folder, seconds=500)
        assert done.returncode == 3, done.stderr
    total = 10 * tens * 20
    states = dict(rows(folder, "select state, count(*) from queue group by 1"))
    states["done"] = rows(folder, "select sum(present) from coverage")[0][0]
    assert states == {"done": total * 3 // 4, "gave_up": tens * 5 + 5, "retry": 9 * tens * 5 - 5}
    outcomes = dict(rows(folder, "select outcome, count(*) from attempts group by 1"))
    assert outcomes == {"ok": total * 3 // 4, "error": states["retry"] + 2 * states["gave_up"]}
    assert dict(rows(folder, "select outcome, sum(attempts) from daily_totals group by 1")) == outcomes
    assert rows(folder, "select distinct state, attempts from queue order by 1") == [("gave_up", 2), ("retry", 1)]
    report = json.loads(run_adce("report", "--format", "json", folder=folder).stdout)
    told = Counter()
    for row in report["attempts"]:
        told[row["outcome"]] += row["attempts"]
    assert told == outcomes
    assert sum(row["present"] for row in report["coverage"]) == states["done"]
    assert sum(row["missing"] for row in report["coverage"]) == states["retry"] + states["gave_up"]
    assert sum(row["gave_up"] for row in report["coverage"]) == states["gave_up"]
    assert sum(path.is_file() for path in (folder / "lake").rglob("*")) == states["done"]


@pytest.mark.battery
def test_no_attempt_of_two_thousand_is_lost(tmp_path):
    no_count_is_lost(tmp_path, tens=10)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_attempt_of_ten_thousand_is_lost(tmp_path):
    no_count_is_lost(tmp_path, tens=50)


POOL = """
max_concurrent_scrapers: {workers}
retry: {{max_attempts: 1}}
sources: {{box: {{max_concurrent: {source}}}, other: {{}}}}
datasets:
  games:
    source: box
    key: "games/{{n}}"
    command: [/bin/sh, scraper, "{{n}}"]
    output: stdout
    partitions: {{values: {{n: {numbers}}}}}
    {more}
"""
WORK = """
mkdir -p now && touch now/$1
set -- $1 $(ls now | wc -l) $(date +%s)
echo $2 >> seen
until [ -e together ]; do
    [ $(ls now | wc -l) -lt {together} ] || touch together
    [ $(($(date +%s) - $3)) -lt {patience} ] || {{ echo it was not so many >&2; rm now/$1; exit 1; }}
    sleep 0.02
done
sleep 0.1
rm now/$1
echo x
"""


def most_together(folder: Path) -> int:
    """As many programs as ever saw one another."""
    return max(map(int, (folder / "seen").read_text().split()))


@pytest.mark.parametrize(
    ("workers", "source", "more", "most"),
    [
        pytest.param(5, 5, "", 5, id="five-workers"),
        pytest.param(5, 9, "", 5, id="a-source-that-would-have-more-workers"),
        pytest.param(5, 2, "", 2, id="max-concurrent-of-the-source"),
        pytest.param(5, 5, "max_concurrent: 3", 3, id="max-concurrent-of-the-dataset"),
        pytest.param(5, 2, "max_concurrent: 3", 2, id="the-smaller-of-both"),
        pytest.param(9, 9, "", 9, id="nine-workers"),
    ],
)
def test_so_many_work_at_once_and_never_one_more(workers, source, more, most, configure, database, scraper):
    """None goes on until so many have come together."""
    text = POOL.format(workers=workers, source=source, more=more, numbers=numbers(4 * most))
    folder = scraper(WORK.format(together=most, patience=20))
    run(configure(text), database)
    assert [row[0] for row in database.read("select distinct outcome from attempts")] == ["ok"]
    assert most_together(folder) == most
    assert database.value("select sum(present) from coverage") == 4 * most


def test_barrier_for_six_never_opens_for_five_workers(configure, database, scraper):
    folder = scraper(WORK.format(together=6, patience=1))
    run(configure(POOL.format(workers=5, source=9, more="", numbers=numbers(9))), database)
    assert database.value("select count(*) from attempts where error like '%it was not so many'") == 9
    assert most_together(folder) <= 5


DEAD = """
max_concurrent_scrapers: 5
grace_seconds: 5
sources: {{alive: {{}}, {sources}}}
datasets:
  living:
    source: alive
    key: "living/{{n}}"
    command: [/bin/sh, -c, "touch alive-{{n}}; echo x"]
    output: stdout
    priority: LOW
    partitions: {{values: {{n: {n}}}}}
  {datasets}
"""
DEAD_DATASET = """{0}:
    source: {0}
    key: "{0}/{{n}}"
    command: [/bin/sh, scraper]
    output: stdout
    priority: CRITICAL
    partitions: {{values: {{n: {1}}}}}
"""
HANG = """
until [ $(ls alive-* 2> /dev/null | wc -l) = 8 ]; do
    [ $(($(date +%s) - ${{begun:=$(date +%s)}})) -lt {patience} ] || {{ echo the other had no worker >&2; exit 1; }}
    sleep 0.02
done
echo x
"""


@pytest.mark.parametrize(
    "dead",
    [
        pytest.param(["dead"], id="one"),
        pytest.param(["dead", "gone"], id="two"),
    ],
)
def test_dead_source_never_holds_the_last_worker_while_another_has_work(dead, configure, database, scraper):
    """What hangs goes on only when all the work of the living source is done."""
    scraper(HANG.format(patience=15 if len(dead) == 1 else 2))
    datasets = "\n  ".join(DEAD_DATASET.format(name, numbers(8)) for name in dead)
    text = DEAD.format(sources=", ".join(f"{name}: {{}}" for name in dead), datasets=datasets, n=numbers(8))
    run(configure(text), database)
    assert [row[0] for row in database.read("select distinct outcome from attempts")] == ["ok"]


ENDLESS = """
max_concurrent_scrapers: 2
grace_seconds: 0.2
retry: {{max_attempts: 3, initial_delay_seconds: 3600, max_delay_seconds: 3600}}
sources: {{box: {{max_concurrent: 5}}, other: {{}}}}
datasets:
  stuck:
    source: box
    key: "stuck/{{n}}"
    call: "a_scraper:wait"
    timeout_seconds: 0.3
    priority: CRITICAL
    partitions: {{values: {{n: {n}}}}}
  good: {{source: other, key: "good/{{n}}", call: "a_scraper:good", priority: LOW, partitions: {{values: {{n: {n}}}}}}}
"""
STUCK = "import threading\ndef wait(n): threading.Event().wait()\ndef good(n): return b'x'\n"


def test_function_that_never_returns_is_killed_and_its_worker_goes_on(tmp_path):
    (tmp_path / "a_scraper.py").write_text(STUCK)
    (tmp_path / "adce.yaml").write_text(ENDLESS.format(n=numbers(2)))
    started = time.monotonic()
    done = run_adce("run", "--once", folder=tmp_path)
    assert (done.returncode, time.monotonic() - started < 50) == (3, True), done.stderr
    assert rows(tmp_path, "select sum(present), sum(missing) from coverage") == [(2, 2)]
    stuck = rows(tmp_path, "select state, key, last_error from queue")
    assert stuck == [("retry", key, f"left no {key} (timed out): empty") for _, key, _ in stuck] and len(stuck) == 2
    assert living(tmp_path) == []


COMMAND = """
grace_seconds: 0.3
sources: {box: {}}
datasets:
  games: {source: box, key: "games/{n}", command: [/bin/sh, scraper, "{n}"], partitions: {values: {n: ["1", "2"]}}}
"""
HIDE = """
if [ -e lake/quick ]; then mkdir -p lake/games; echo x > lake/games/$1; exit; fi
trap '' TERM
setsid sleep 300 &
sleep 300 &
while :; do sleep 300; done
"""


def sleeping(folder: Path) -> int:
    return living(folder).count("sleep 300 ")


@pytest.fixture
def stubborn(tmp_path, start) -> subprocess.Popen[str]:
    """A runner whose two commands ignore SIGTERM and have children in two sessions each."""
    (tmp_path / "adce.yaml").write_text(COMMAND)
    (tmp_path / "scraper").write_text(HIDE)
    process = start("run")
    wait_until(lambda: sleeping(tmp_path) == 6)
    return process


def test_orphans_of_a_killed_runner_are_ended_at_the_next_start(stubborn, tmp_path):
    stubborn.kill()
    stubborn.communicate()
    assert sleeping(tmp_path) == 6
    (tmp_path / "lake" / "quick").touch()
    done = run_adce("run", "--once", folder=tmp_path)
    assert (done.returncode, living(tmp_path)) == (0, []), done.stderr
    assert "requeued=2 ended=8" in done.stderr
    assert not adce.output_folder(tmp_path / "adce.db").exists()


def test_orphans_are_ended_also_when_the_next_start_comes_by_another_path(stubborn, tmp_path, tmp_path_factory):
    stubborn.kill()
    stubborn.communicate()
    (tmp_path / "lake" / "quick").touch()
    link = tmp_path_factory.mktemp("other") / "link"
    link.symlink_to(tmp_path)
    done = run_adce("run", "--once", "-c", str(link / "adce.yaml"), folder=tmp_path)
    assert (done.returncode, living(tmp_path)) == (0, []), done.stderr


def test_stop_past_the_grace_time_leaves_no_process(stubborn, tmp_path):
    started = time.monotonic()
    stubborn.terminate()
    stubborn.communicate(timeout=60)
    assert (stubborn.returncode, time.monotonic() - started < 30) == (0, True)
    wait_until(lambda: living(tmp_path) == [])
    assert rows(tmp_path, "select state from queue") == [("pending",)] * 2


def test_second_signal_leaves_no_process(stubborn, tmp_path):
    (tmp_path / "adce.yaml").write_text(COMMAND.replace("0.3", "300"))
    stubborn.kill()
    stubborn.communicate()
    adce.end_processes(str(tmp_path / "adce.db"))
    process = start_adce("run", folder=tmp_path)
    try:
        wait_until(lambda: sleeping(tmp_path) == 6)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: living(tmp_path) == [])


KILLER = """
retry: {max_attempts: 3}
sources: {box: {}, other: {}}
datasets:
  killer:
    source: box
    key: "killer/{n}"
    command: [/bin/sh, scraper, kill]
    output: stdout
    priority: CRITICAL
    partitions: {values: {n: ["1"]}}
  good:
    source: other
    key: "good/{n}"
    command: [/bin/sh, scraper, "{n}"]
    output: stdout
    partitions: {values: {n: ["1", "2", "3", "4"]}}
"""
KILL = """
[ $1 = kill ] || { echo x; exit; }
until [ $(ls lake/good | wc -l) = 4 ]; do sleep 0.01; done
sleep 0.5  # until their attempts are written down
kill -9 $PPID
"""
SLOW = """
if [ ! -e calm ]; then
    touch here-$1
    until [ $(ls here-* | wc -l) = 5 ]; do sleep 0.01; done
    [ $1 = kill ] || sleep 20
fi
[ $1 = kill ] && kill -9 $PPID
echo x
"""


def killed_runs(folder: Path) -> int:
    """How often the program must be started until it lives to its end."""
    for count in range(10):
        done = run_adce("run", "--once", folder=folder)
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 3, done.stderr
            return count
    pytest.fail("the same task kills it again and again")


def test_task_that_kills_its_runner_gives_up_and_the_others_proceed(tmp_path):
    (tmp_path / "scraper").write_text(KILL)
    (tmp_path / "adce.yaml").write_text(KILLER)
    assert killed_runs(tmp_path) == 3
    tasks = rows(tmp_path, "select priority, state, attempts, last_error from queue")
    assert tasks == [("CRITICAL", "gave_up", 3, "the runner crashed")]
    assert rows(tmp_path, "select sum(present) from coverage") == [(4,)]
    died = rows(tmp_path, "select distinct outcome from attempts where error = 'the runner crashed'")
    assert died == [("lost",)]
    shown = run_adce("tasks", "--state", "gave_up", folder=tmp_path).stdout
    assert "killer" in shown and "the runner crashed" in shown


def test_tasks_beside_one_that_kills_its_runner_do_not_give_up_with_it(tmp_path):
    (tmp_path / "scraper").write_text(SLOW)
    (tmp_path / "adce.yaml").write_text(KILLER)
    for _ in range(2):
        for here in tmp_path.glob("here-*"):
            here.unlink()
        assert run_adce("run", "--once", folder=tmp_path).returncode == -signal.SIGKILL
    (tmp_path / "calm").touch()
    assert run_adce("run", "--once", folder=tmp_path).returncode == -signal.SIGKILL, "it is tried alone once more"
    assert run_adce("run", "--once", folder=tmp_path).returncode == 3
    assert rows(tmp_path, "select sum(present), sum(gave_up) from coverage") == [(4, 1)]


BESIDE = """
[ $1 = kill ] || { touch other; echo x; exit; }
[ -e calm ] || kill -9 $PPID
sleep 1
[ -e other ] && printf 'beside another' || printf alone
"""


def test_nothing_is_begun_beside_a_task_that_has_seen_runners_die(tmp_path):
    (tmp_path / "scraper").write_text(BESIDE)
    (tmp_path / "adce.yaml").write_text(KILLER.partition("  good:")[0])
    for _ in range(2):
        assert run_adce("run", "--once", folder=tmp_path).returncode == -signal.SIGKILL
    (tmp_path / "calm").touch()
    (tmp_path / "adce.yaml").write_text(KILLER)
    assert run_adce("run", "--once", folder=tmp_path).returncode == 0
    assert (tmp_path / "lake/killer/1").read_text() == "alone"
    assert len(list((tmp_path / "lake/good").iterdir())) == 4


AWAY = """
queue_check_seconds: 5
retry: {max_attempts: 3, initial_delay_seconds: 1, max_delay_seconds: 2}
sources: {box: {blocked_when: {pause_seconds: 60}}}
datasets:
  games:
    source: box
    key: "games/{n}"
    RUNNER
    partitions: {values: {n: NUMBERS}}
"""


def test_ten_failures_in_a_row_pause_their_source_and_say_why(tmp_path, start):
    text = AWAY.replace("RUNNER", 'command: [/bin/sh, -c, "echo the line is cut >&2; exit 1"]')
    (tmp_path / "adce.yaml").write_text(text.replace("NUMBERS", numbers(30)))
    process = start("run")
    wait_until(lambda: rows(tmp_path, "select why from rates where blocked_until is not null"))
    ((why,),) = rows(tmp_path, "select replace(why, 'paused: ', '') from rates where blocked_until is not null")
    assert re.fullmatch(r"left no games/\d+ \(exit 1\): the line is cut", why)
    wait_until(lambda: rows(tmp_path, "select count(*) from queue where state = 'running'") == [(0,)])
    assert why in run_adce("status", folder=tmp_path).stdout
    attempts = rows(tmp_path, "select count(*) from attempts")[0][0]
    assert 10 <= attempts <= 14  # those that were at work when the tenth failed
    assert rows(tmp_path, "select sum(failures), max(failures) from objects") == [(9, 1)]
    assert rows(tmp_path, "select count(*) from queue where state in ('pending', 'retry')") == [(30,)]
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert err.count(" paused source=box ") == 1 and f'reason="{why}"' in err


class HurriedClock(adce.Clock):
    """Real time, but nobody waits long for it: it is set forward instead."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.ahead, self.is_over = 0.0, is_over
        self.runner: adce.Runner | None = None

    def wall(self) -> float:
        return super().wall() + self.ahead

    def boot(self) -> float:
        return super().boot() + self.ahead

    def wait(self, wakeups: queue.SimpleQueue[str], seconds: float, *_: object) -> None:
        try:
            wakeups.get(timeout=min(seconds, 0.03))
        except queue.Empty:
            self.ahead += seconds
        if self.runner and self.is_over():
            self.runner.stop("it is over")


PROBED = """
number=1
until mkdir call-$number 2> /dev/null; do number=$((number + 1)); done
mkdir -p now
touch now/$1
ls now | wc -l > call-$number/together
last=5
[ $number -le 5 ] || last=10
[ $number -gt 10 ] || until [ $(ls call-*/together | wc -l) -ge $last ]; do sleep 0.01; done  # five at once
rm now/$1
[ $number -gt 18 ] || { echo the line is cut >&2; exit 1; }
echo x
"""


def test_one_at_a_time_asks_whether_a_source_is_back_and_a_good_answer_ends_the_pause(configure, database, scraper):
    folder = scraper(PROBED)
    text = AWAY.replace(
        "RUNNER", "command: [/bin/sh, scraper, '{n}']\n    output: stdout\n    timeout_seconds: 1000000"
    )
    clock = HurriedClock(lambda: database.value("select sum(present) from coverage") == 30)
    _, lines = run(
        configure(text.replace("NUMBERS", numbers(30))), database, once=False, max_seconds=50_000, clock=clock
    )
    together = [int((folder / f"call-{number}/together").read_text()) for number in range(1, 20)]
    assert max(together) <= 5
    assert together[14:19] == [1] * 5  # at most four were at work when the tenth failed
    assert lines.count(" paused source=box ") >= 5
    assert database.value("select count(*) from queue") == 0
    assert database.value("select count(*) from attempts where outcome = 'error'") == 18
    assert tuple(database.read("select failures, throttles from scopes where scope = 'box'")[0]) == (0, 0)
    assert "gave_up" not in lines


ASKED = """
max_concurrent_scrapers: 1
sources: {{box: {{base_url: "{address}"}}}}
datasets:
  games: {{source: box, key: "games/{{n}}", call: "a_scraper:ask", partitions: {{values: {{n: {n}}}}}}}
"""
ASK_AND_JUDGE = """
def ask(n, session):
    answer = session.get("/page")
    answer.raise_for_status()
    raise ValueError("nothing of use in it")
"""


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(
            Answer(b"trouble", 500),
            id="an-error",
        ),
        pytest.param(
            Answer(b"a page without the object"),
            id="a-useless-page",
        ),
    ],
)
def test_ten_calls_that_fail_with_their_session_pause_their_source(answer, upstream, tmp_path):
    upstream.answer("/page", answer)
    (tmp_path / "a_scraper.py").write_text(ASK_AND_JUDGE)
    (tmp_path / "adce.yaml").write_text(ASKED.format(address=upstream.address, n=numbers(20)))
    done = run_adce("run", "--once", folder=tmp_path)
    assert (done.returncode, rows(tmp_path, "select count(*) from attempts")) == (3, [(10,)]), done.stderr
    assert " paused source=box " in done.stderr


IMPATIENT = """
sources: {box: {}, other: {}}
rate_limiting: {source_limits: {other: {requests_per_hour: 1}}}
datasets:
  games: {source: box, key: "games/{n}", call: "a_scraper:ask", partitions: {values: {n: ["1", "2"]}}}
"""
ASK = """
import adce
def ask(n):
    with adce.permit("other", wait=0):
        return b"x"
"""


def test_call_that_is_refused_a_permit_of_another_source_is_attempted_once_in_a_run(tmp_path):
    (tmp_path / "a_scraper.py").write_text(ASK)
    (tmp_path / "adce.yaml").write_text(IMPATIENT)
    done = run_adce("run", "--once", "--max-minutes", "0.05", folder=tmp_path)
    assert (done.returncode, rows(tmp_path, "select count(*) from attempts")) == (3, [(2,)])


REFETCHED = """
retry: {max_attempts: 3, initial_delay_seconds: 0.2, max_delay_seconds: 0.3}
sources: {box: {blocked_when: {failures_in_a_row: 1000}}}
datasets:
  games:
    source: box
    key: "games/{n}"
    command: [/bin/sh, scraper, "lake/games/{n}"]
    freshness: {refetch_every: 1s}
    partitions: {values: {n: ["1"]}}
"""


def test_refetch_that_leaves_the_object_as_it_was_is_an_error_and_gives_up(tmp_path, start):
    (tmp_path / "adce.yaml").write_text(REFETCHED)
    (tmp_path / "scraper").write_text("[ -e $1 ] && exit; mkdir -p lake/games; echo x > $1")
    start("run", "--interval-minutes", "0.01")
    wait_until(
        lambda: (
            ("gave_up", 3, "left games/1 as it was (exit 0): empty")
            in rows(tmp_path, "select state, attempts, last_error from queue")
        )
    )
    assert rows(tmp_path, "select outcome, count(*) from attempts group by 1 order by 1") == [("error", 3), ("ok", 1)]
    assert (tmp_path / "lake" / "games" / "1").read_text() == "x\n"


def test_a_pool_without_its_package_says_what_to_install(configure, monkeypatch):
    configuration = configure("pool: tcp://127.0.0.1:1\nsources: {web: {}}\ndatasets: {}\n")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "distributed" else find(name))
    (row,) = [row for row in adce.check_rows(configuration, online=False) if row["what"] == "pool"]
    assert row == {
        "result": "FAIL",
        "what": "pool",
        "details": "pool: needs the package distributed; pip install distributed",
    }


def test_an_attempt_begins_once_and_only_while_its_runner_looks():
    async def begun(register: adce.Register, *attempts: int) -> list[bool]:
        return [await register.begin(attempt) for attempt in attempts]

    register = adce.Register()
    assert asyncio.run(begun(register, 1, 2, 1)) == [True, True, False]
    assert register.look(1, [2, 3]) == {3}  # which has not begun, and never does
    assert asyncio.run(begun(register, 3, 4)) == [False, True]
    register.look(5, [])
    assert asyncio.run(begun(register, 1, 4, 5)) == [False, False, True]
    register.looked_at -= adce.BEGIN_SECONDS
    assert asyncio.run(begun(register, 6)) == [False]
