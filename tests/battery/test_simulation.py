"""Weeks of a runner's life; and that the judge of them sees what is wrong."""

from __future__ import annotations

import pytest

import adce
from battery import simulation


@pytest.mark.parametrize("seed", range(8))
def test_week_keeps_every_promise(seed):
    world = simulation.simulate(seed)
    assert world.counts["attempts"] > 20


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousand_weeks_keep_every_promise():
    assert simulation.main(["--weeks", "1000"]) == 0


def test_seed_makes_up_the_same_week_each_time():
    one, other = simulation.simulate(7), simulation.simulate(7)
    assert one.history == other.history


def ask_always(sql, limiting, source, now, owner=""):
    return adce.Opening(now)


def requeue_nothing(sql, policy):
    return 0


APPRAISED = adce.Ledger.appraised


def close_no_task(ledger, known, **options):
    row = APPRAISED(ledger, known, **options)
    return row._replace(task="pending") if known.task and not row.task else row


def believe_whatever_is_fetched(dataset, fields, body, children=(), links=None):
    mentions = {adce.expression_of(child, dataset.name): () for child in children}
    return adce.Inspection(None, True, False, mentions)


def forget_open_tasks(sql, before):
    return sql.execute("update objects set task = null where task = 'retry' and attempts > 1").rowcount


def drop_nothing(cycle, datasets, last):
    return iter(())


def advance_nothing(ledger):
    return False


@pytest.mark.parametrize(
    ("place", "name", "mutant", "seeds", "found"),
    [
        (adce, "opening", ask_always, range(12), "was asked more than"),
        (adce, "requeue_orphans", requeue_nothing, range(12), "running|missing"),
        (adce.Ledger, "appraised", close_no_task, range(12), "open tasks without a gap|turns without end"),
        (adce, "inspect", believe_whatever_is_fetched, range(12), "is not whole|hardly anything|expected are"),
        (adce, "forget", forget_open_tasks, range(12), "gaps without a task|missing"),
        (adce, "advance", advance_nothing, range(12), "turns without end"),
        (adce, "_drop_unexpected", drop_nothing, range(12), "names .* expected are"),
    ],
)
def test_judge_sees_a_program_that_does_wrong(place, name, mutant, seeds, found, monkeypatch):
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises(Exception, match=found):  # noqa: PT012  # in whichever week
        for seed in seeds:
            simulation.simulate(seed)
