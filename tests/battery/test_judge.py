"""The judge sees a program that does wrong."""

from __future__ import annotations

import pytest

from battery import judge
from battery.scene import LAUNCHERS, Scene

TELLS_TOO_EARLY = """
def keep(self, key, body, write=adce.FolderStore.write):
    stored = write(self, key, body)
    place = self.root / key
    place.write_bytes(place.read_bytes()[:100] if "CUT" in HOW else b"")
    return stored
adce.FolderStore.write = keep
"""
FORGETS = """
def forget(ledger, task, result):
    ledger.sql.execute("delete from attempts where attempt_id = ?", (task.attempt_id,))
adce._record_attempt = forget
"""
ASKS_ALWAYS = "adce.opening = lambda sql, limiting, source, now, owner='': adce.Opening(now)"


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (TELLS_TOO_EARLY.replace("HOW", "'CUT'"), "^A: .* is not what was sent"),
        (TELLS_TOO_EARLY.replace("HOW", "''"), "^A: .* is not what was sent"),
        ("adce.FolderStore.write = lambda *_: adce.StoredObject('x', 1, 'x', 1)", "^A: .* not in the store"),
        (ASKS_ALWAYS, "^R: "),
        (FORGETS, "^A: told as done, and forgotten"),
    ],
)
def test_judge_sees_a_program_that_does_wrong(wrong, found, tmp_path):
    with Scene(tmp_path, per_second=10, days=6) as scene:
        scene.run("-v", "run", "--once", launcher=[LAUNCHERS / "patched.py", wrong])
        with pytest.raises(AssertionError, match=found):
            scene.judge()


@pytest.mark.parametrize(
    ("events", "found"),
    [
        (["started", "asked", "asked"], "^C: /x.* was asked for twice"),
        (["started", "asked", "ended", "started", "asked"], None),
        (["started", "asked", "answered", "asked"], None),
        (["asked", "started", "asked"], None),
    ],
)
def test_judge_sees_two_who_ask_for_the_same(events, found, tmp_path):
    history = judge.History(tmp_path / "history")
    for event in events:
        history.note(event, path="/x?a=1", number=1)
    if found is None:
        judge.judge_requests(history, [(5, 1.0)])
        return
    with pytest.raises(AssertionError, match=found):
        judge.judge_requests(history, [])
