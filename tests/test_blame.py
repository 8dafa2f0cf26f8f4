"""blame.py: markers in, decisions out. No row fails that does not end its worker, and every run of losses ends."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen.errors import BatchgenError
from batchgen.types import Chunk, Rejected
from batchgen.workers.blame import (
    MAX_ALONE,
    MAX_FAILED,
    MAX_LOSSES,
    SAME_STEP,
    STALL_SECONDS,
    UNSEEN,
    History,
    Loss,
    StallDetector,
    Trial,
    find_culprits,
    find_gone,
    find_guilty,
    next_trial,
)
from batchgen.workers.marker import Phase, Sighting


def sighting(chunk: int = 0, suspects=(), running=(), *, pid: int = 7, rows: int = 0, **changes) -> Sighting:
    values = {"pulse": 1, "phase": Phase.ROWS, "prompt_tokens": 0, "completion_tokens": 0}
    return Sighting(pid=pid, chunk=chunk, rows=rows, suspects=suspects, running=running, **values | changes)


def died(chunk: int = 0, seen: Sighting = UNSEEN) -> Loss:
    return Loss(chunk, "died (SIGKILL(-9))", sighting=seen)


def raised(chunk: int = 0, seen: Sighting = UNSEEN) -> Loss:
    return Loss(chunk, "raised ValueError: no", has_died=False, sighting=seen)


def chunk_of(rows) -> Chunk:
    return Chunk(0, tuple(Rejected(row, f"p:{row}", None, None, "no") for row in rows))


# ---- whose worker ended

A, B, IDLE = sighting(0, pid=10), sighting(1, pid=11), sighting(2, pid=12, phase=Phase.IDLE)


@pytest.mark.parametrize(
    ("losses", "sightings", "dead", "culprits", "gone"),
    [
        ([died(0), died(1)], [A, B], {10}, [died(0, A)], [A, B]),  # loky killed the second
        ([died(0), died(1)], [A, B], {10, 11}, [died(0, A), died(1, B)], [A, B]),
        ([died(0), died(1)], [A, B], set(), [], [A, B]),
        ([died(0), died(1)], [A, IDLE], {10}, [died(0, A)], [A]),
        ([died(0)], [A, B], set(), [died(0, A)], [A]),  # nobody else can have died; the other works on
        ([died(0)], [B, IDLE], set(), [], []),  # it had not begun
        ([died(2)], [IDLE], {12}, [], []),
        ([raised(0, A)], [A, B], set(), [raised(0, A)], []),
        ([raised(0)], [], set(), [raised(0)], []),
        ([raised(0, A), died(1)], [B], {11}, [raised(0, A), died(1, B)], [B]),
    ],
)
def test_a_loss_is_blamed_on_the_worker_that_ended_by_itself(losses, sightings, dead, culprits, gone):
    assert find_culprits(losses, sightings, dead) == culprits
    assert list(find_gone(losses, sightings)) == gone


# ---- what is tried


@pytest.mark.parametrize(
    ("sightings", "trial"),
    [
        ([UNSEEN], Trial(frozenset())),
        ([sighting(suspects=(3,), running=(1, 2))], Trial(frozenset({3}))),  # a single one to its end
        ([sighting(suspects=(3, 4), running=(1,))], Trial(frozenset({3, 4}), is_first_step=True)),
        ([sighting(running=(1, 2))], Trial(frozenset())),
        ([sighting(running=(1, 2)), sighting(suspects=(2,), running=(3,))], Trial(frozenset({2}))),
        ([UNSEEN, sighting(running=(1, 2))], Trial(frozenset())),
        ([sighting(running=(1,))] * 3, Trial(frozenset(range(6)))),
        ([sighting(running=(1,)), sighting(phase=Phase.WRITING)], Trial(frozenset())),  # all rows were complete
        ([sighting(phase=Phase.WRITING)] * 4, Trial(frozenset())),
        ([UNSEEN] * 4, Trial(frozenset(range(6)))),
    ],
)
def test_each_loss_of_a_chunk_has_its_suspects(sightings, trial):
    history = History()
    for seen in sightings:
        last = next_trial(history, died(0, seen), chunk_of(range(6)))
    assert last == trial
    assert history.is_short_of_memory == (len(sightings) >= 3)


@given(st.lists(st.sets(st.integers(0, 5)), max_size=MAX_LOSSES))
def test_the_fifth_loss_of_a_chunk_ends_the_run(in_flight):
    history, losses = History(), [died(0, sighting(running=tuple(rows))) for rows in in_flight]
    for loss in losses[: MAX_LOSSES - 1]:
        assert next_trial(history, loss, chunk_of(range(6))).rows <= set(range(6))
    if len(losses) == MAX_LOSSES:
        with pytest.raises(BatchgenError, match="5 workers were lost in a row on input rows 0 to 5, and no row was"):
            next_trial(history, losses[-1], chunk_of(range(6)))


def test_five_losses_in_a_row_end_the_run_and_a_chunk_or_a_cause_between_them_does_not():
    history = History()
    for _ in range(MAX_LOSSES - 1):
        history.losses += 1
        history.check(died())
    history.add_progress(ok=1)
    history.chunks[3] = [set(), set()]
    for _ in range(MAX_LOSSES - 1):
        history.losses += 1
        history.check(died())
    history.add_cause(3)
    assert (history.losses, history.chunks) == (0, {})
    history.losses = MAX_LOSSES
    with pytest.raises(
        BatchgenError, match=r"^5 workers were lost in a row, .*; the last died .* lower --jobs\. Finish"
    ):
        history.check(died())


# ---- who is guilty


def at(row: int, step: int, **changes) -> Sighting:
    """A row alone, at a step."""
    return sighting(running=(row,), step=step, **changes)


EARLY, WRITING = died(0, sighting(phase=Phase.STARTING)), died(0, sighting(phase=Phase.WRITING))


@pytest.mark.parametrize(
    ("losses", "guilty"),
    [
        ([], []),
        ([died(0, at(1, 5))] * SAME_STEP, [1]),
        ([raised(0, at(1, 5))] * SAME_STEP, [1]),
        ([died(0, at(1, 5))] * (SAME_STEP - 1), []),  # as many kills from outside, even at one step
        ([died(0, at(1, step)) for step in range(MAX_ALONE - 1)], []),
        ([died(0, at(1, step)) for step in (5, 6) * SAME_STEP], []),  # not in a row
        ([died(0, at(1, step)) for step in (5, 5, 6, *[5] * SAME_STEP)], [1]),
        ([died(0, at(row, 1)) for row in sorted([1, 2] * SAME_STEP)], [1, 2]),
        ([died(0, at(1, 1)), *[EARLY] * 4, *[died(0, at(1, 1)), died()] * (SAME_STEP - 1)], [1]),
        ([died(0, at(1, 1)), died(0, at(1, 1)), WRITING], []),  # it lived
        ([WRITING], []),
        ([raised(0, sighting(phase=Phase.WRITING))], []),
        ([died(0, sighting())] * SAME_STEP, [0]),  # a prompt read in several passes; the first is tried, and it is it
        ([died(0, sighting()), None, died(0, sighting()), None], []),
    ],
)
def test_a_row_is_guilty_if_it_ends_workers_of_its_own_at_the_same_step_again_and_again(losses, guilty):
    script = iter([*losses, *[None] * 4])
    assert [row for row, _ in find_guilty(History(), range(3), lambda _: next(script))] == guilty


def test_workers_that_end_again_and_again_before_they_come_to_a_row_end_the_run():
    with pytest.raises(BatchgenError, match="5 workers were lost in a row before they came to a row, and no row"):
        list(find_guilty(History(), range(3), lambda _: EARLY))


def test_workers_that_end_again_and_again_at_different_steps_of_a_row_end_the_run():
    steps = iter(range(100))
    with pytest.raises(
        BatchgenError, match="18 workers were lost in a row on input row 2 alone, at different steps, and"
    ):
        list(find_guilty(History(), range(3), lambda _: died(0, at(2, next(steps)))))
    assert next(steps) == MAX_ALONE


def test_if_one_row_after_another_ends_its_workers_the_rows_are_not_guilty_even_in_many_chunks():
    history, tried = History(), []

    def first_one_ends(rows):
        tried.append(rows)
        return raised(0, at(rows[0], 1))

    for chunk in ([0, 1], [2, 3]):
        assert [row for row, _ in find_guilty(history, chunk, first_one_ends)] == chunk
        history.add_progress(ok=0)
    with pytest.raises(BatchgenError, match="5 workers .* on each of 17 rows, the last of them input row 16, and no"):
        list(find_guilty(history, range(4, 30), first_one_ends))
    assert len(tried) == (MAX_FAILED + 1) * SAME_STEP


# ---- a run in small: workers that do what rows and bystanders make them do


def moments(rows, batch: int, *, is_first_step: bool) -> Iterator[tuple[str, Sighting]]:
    """What the marker of a worker shows in turn, if it completes rows in batches."""
    yield "start", sighting(phase=Phase.STARTING)
    for start in range(0, len(rows), batch):
        together = tuple(rows[start : start + batch])
        steps = ["first"] if is_first_step else ["first", "second", "third"]
        yield "first", sighting(suspects=together, rows=start)
        for step, moment in enumerate(steps[1:], start=2):
            yield moment, sighting(running=together, rows=start, step=step)
        for row in together:
            yield "last", sighting(suspects=(row,), rows=start, step=len(steps) + 1 if len(together) == 1 else 1)
    yield "writing", sighting(rows=len(rows), phase=Phase.WRITING)


class SmallRun:
    """One chunk, done again until it is done; counts what it costs."""

    def __init__(self, n: int, deeds, batch: int, kills: Mapping[int, int]) -> None:
        """deeds: {row: (the moments at which it ends its worker, in turn; whether it kills it)}.

        kills: {a worker, those of trials too, in the order of their starts: the moment of a kill from outside}.
        """
        self.rows, self.deeds, self.batch, self.kills = range(n), deeds, batch, kills
        self.history, self.failed = History(), set()
        self.deaths = Counter()  # by the deeds of a row
        self.hits = Counter()  # kills in trials, by row and step
        self.workers = 0

    def work(self, rows, trial: Trial | None = None) -> Loss | None:
        kill = self.kills.get(self.workers)
        self.workers += 1
        shown = list(moments(rows, 1 if trial else self.batch, is_first_step=bool(trial and trial.is_first_step)))
        for n, (moment, seen) in enumerate(shown):
            if kill is not None and n == kill % len(shown):
                self.hits.update((row, seen.step) for row in seen.in_flight if trial)
                return died(0, seen)
            for row in seen.in_flight:
                its_moments, dies = self.deeds.get(row, ([""], False))
                if its_moments[self.deaths[row] % len(its_moments)] == moment:
                    self.deaths[row] += 1
                    return died(0, seen) if dies else raised(0, seen)
        return None

    def finish(self) -> None:
        while loss := self.work([row for row in self.rows if row not in self.failed]):
            self.history.losses += 1
            trial = next_trial(self.history, loss, chunk_of(self.rows))
            suspects = [row for row in self.rows if row in trial.rows - self.failed]
            guilty = {row for row, _ in find_guilty(self.history, suspects, lambda rows, t=trial: self.work(rows, t))}
            if guilty:
                self.failed |= guilty
                self.history.add_cause(0)
            self.history.check(loss)


MOMENTS = ("first", "second", "third", "last")
ROW = st.integers(0, 7)
POISON = st.dictionaries(ROW, st.tuples(st.sampled_from([[moment] for moment in MOMENTS]), st.booleans()), max_size=5)
FICKLE = st.dictionaries(ROW, st.tuples(st.lists(st.sampled_from(MOMENTS), min_size=1), st.booleans()), max_size=5)


def kills(most: int) -> st.SearchStrategy[dict[int, int]]:
    return st.dictionaries(st.integers(0, 4 * most), st.integers(0, 40), max_size=most)


@given(POISON, st.integers(1, 8))
def test_exactly_the_rows_that_end_their_workers_fail(deeds, batch):
    run = SmallRun(8, deeds, batch, {})
    run.finish()
    assert run.failed == deeds.keys()
    assert all(n <= SAME_STEP + 2 for n in run.deaths.values())


@example({0: (["last"], False)}, 1, {3: 1, 6: 1})
@given(POISON, st.integers(1, 8), kills(2))
def test_two_kills_from_outside_change_nothing(deeds, batch, kills):
    run = SmallRun(8, deeds, batch, kills)
    run.finish()
    assert run.failed == deeds.keys()


@example({0: (["first"], False), 1: ([*["first"] * 4, "last", "second"], False)}, 2, {})
@given(FICKLE, st.integers(1, 8), kills(30))
def test_an_innocent_row_fails_only_if_kills_from_outside_hit_it_again_and_again_and_the_run_ends(deeds, batch, kills):
    run = SmallRun(8, deeds, batch, kills)
    with suppress(BatchgenError):
        run.finish()
        assert run.failed >= deeds.keys()
    for innocent in run.failed - deeds.keys():
        assert max(n for (row, _), n in run.hits.items() if row == innocent) >= SAME_STEP
    again = len(run.failed)  # after each row that fails, its chunk is done again
    assert all(n <= MAX_LOSSES + MAX_ALONE + 1 + again for n in run.deaths.values())
    assert run.workers <= 2 * (run.deaths.total() + len(kills)) + 1


def test_300_kills_at_random_moments_fail_no_innocent_row():
    rng, killed = random.Random(5), 0
    while killed < 300:
        kills = {worker: rng.randrange(40) for worker in range(MAX_LOSSES - 1)}
        run = SmallRun(8, {}, rng.randint(1, 8), kills)
        run.finish()
        assert not run.failed
        killed += min(run.workers, len(kills))


# ---- what hangs


def looks(stall: StallDetector, seconds: float, seen: Sighting, waiting=(), now: float = 0.0) -> float | None:
    """Look every half second; the first time at which the worker hangs."""
    for tick in range(int(2 * seconds) + 1):
        if stall.look(now + tick / 2, [seen], waiting):
            return now + tick / 2
    return None


ON_ROWS, IDLE = sighting(running=(1,)), sighting(phase=Phase.IDLE)


@pytest.mark.parametrize("limit", [0.1, 2.0, 5.0, 60.0, 1000.0])
def test_a_worker_hangs_if_its_pulse_stops_while_it_is_at_rows_and_no_sooner(limit):
    assert limit < looks(StallDetector(limit), 2000, ON_ROWS) <= limit + 2.5


@pytest.mark.parametrize("limit", [2.0, 1000.0])
@pytest.mark.parametrize(
    ("seen", "waiting"),
    [(sighting(phase=Phase.STARTING), []), (sighting(phase=Phase.WRITING), []), (ON_ROWS, [7])],
)
def test_a_start_the_writing_of_a_part_and_a_wait_for_the_disk_are_no_work_on_rows(limit, seen, waiting):
    assert max(limit, STALL_SECONDS) < looks(StallDetector(limit), 2000, seen, waiting) < 1010
    assert looks(StallDetector(limit), 2000, IDLE) is None


def test_time_at_the_disk_is_not_added_to_time_at_rows():
    stall = StallDetector(2.0)
    assert looks(stall, 1.5, ON_ROWS) is None
    assert looks(stall, 500, ON_ROWS, waiting=[7], now=2.0) is None
    assert looks(stall, 10, ON_ROWS, now=502.5) <= 503.5


@given(st.floats(0.1, 1000.0), st.lists(st.floats(0, 1e6)))
def test_a_pause_of_all_processes_or_of_the_one_that_looks_makes_no_worker_hang(limit, pauses):
    stall, now = StallDetector(limit), 0.0
    for pulse, seconds in enumerate(pauses):
        assert stall.look(now, [replace(ON_ROWS, pulse=pulse)]) == []
        now += seconds
        assert stall.look(now, [replace(ON_ROWS, pulse=pulse)]) == []
        assert not stall.is_silent
        now += 0.5


def test_workers_of_which_none_begins_are_silent():
    stall = StallDetector(5.0)
    assert looks(stall, STALL_SECONDS, IDLE) is None
    assert not stall.is_silent
    stall.look(1e9, [])  # a pause
    assert stall.is_silent
    stall.look(2e9, [ON_ROWS])
    assert not stall.is_silent
