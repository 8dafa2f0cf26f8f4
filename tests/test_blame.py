"""blame.py: markers in, decisions out. No row fails that does not end its worker, and every run of losses ends."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import BatchgenError
from batchgen.types import Chunk, Rejected
from batchgen.workers.blame import (
    MAX_FAILED,
    MAX_LOSSES,
    STALL_SECONDS,
    ChunkLosses,
    History,
    Loss,
    StallDetector,
    Trial,
    find_culprits,
    find_gone,
    find_guilty,
    next_trial,
)
from batchgen.workers.marker import Sighting


def sighting(chunk: int = 0, suspects=(), running=(), *, pid: int = 7, rows: int = 0, **changes) -> Sighting:
    counts = {"pulse": 1, "working": True, "prompt_tokens": 0, "completion_tokens": 0}
    return Sighting(pid=pid, chunk=chunk, rows=rows, suspects=suspects, running=running, **counts | changes)


def died(chunk: int = 0, seen: Sighting | None = None) -> Loss:
    return Loss(chunk, "died (SIGKILL(-9))", sighting=seen)


def raised(chunk: int = 0, seen: Sighting | None = None) -> Loss:
    return Loss(chunk, "raised ValueError: no", has_died=False, sighting=seen)


def chunk_of(rows) -> Chunk:
    return Chunk(0, tuple(Rejected(row, f"p:{row}", None, None, "no") for row in rows))


# ---- whose worker ended

A, B, IDLE = sighting(0, pid=10), sighting(1, pid=11), sighting(2, pid=12, working=False)


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
        ([None], Trial(frozenset())),
        ([sighting(suspects=(3,), running=(1, 2))], Trial(frozenset({3}))),  # a single one to its end
        ([sighting(suspects=(3, 4), running=(1,))], Trial(frozenset({3, 4}), is_first_step=True)),
        ([sighting(running=(1, 2))], Trial(frozenset())),
        ([sighting(running=(1, 2)), sighting(suspects=(2,), running=(3,))], Trial(frozenset({2}))),
        ([None, sighting(running=(1, 2))], Trial(frozenset())),
        ([sighting(running=(1,))] * 3, Trial(frozenset(range(6)))),
        ([None] * 4, Trial(frozenset(range(6)))),
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
    history.add_progress()
    history.chunks[3] = ChunkLosses(2)
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


@pytest.mark.parametrize(
    ("losses", "guilty"),
    [
        ([], []),
        ([died(0, sighting(suspects=(1,)))], [1]),
        ([died(0, sighting(running=(1,)))], []),  # perhaps killed from outside
        ([died(0, sighting(running=(1,))), died(0, sighting(running=(2,)))], []),
        ([died(0, sighting(running=(1,))), died(0, sighting(running=(1,)))], [1]),
        ([raised(0, sighting(running=(1,)))], [1]),
        ([died(0, sighting(suspects=(1,))), raised(0, sighting(suspects=(2,), rows=1))], [1, 2]),
        ([died(0), died(0, sighting(suspects=(2,)))], [2]),
    ],
)
def test_a_row_is_guilty_if_it_ends_a_worker_of_its_own(losses, guilty):
    script = iter([*losses, None])
    assert [row for row, _ in find_guilty(History(), range(3), lambda _: next(script))] == guilty


def test_workers_that_end_twice_before_they_come_to_a_row_end_the_run():
    with pytest.raises(BatchgenError, match="2 workers were lost in a row before they came to a row, and no row"):
        list(find_guilty(History(), range(3), lambda _: died()))


def test_if_one_row_after_another_ends_its_worker_the_rows_are_not_guilty():
    history, tried = History(), []

    def first_one_ends(rows):
        tried.append(rows)
        return raised(0, sighting(suspects=(rows[0],)))

    with pytest.raises(BatchgenError, match="17 workers were lost in a row, last on input row 16 alone, and no row"):
        list(find_guilty(history, range(30), first_one_ends))
    assert len(tried) == MAX_FAILED + 1


@given(st.data(), st.integers(0, 8))
def test_a_search_always_ends(data, n):
    calls, history = 0, History()

    def anything(rows):
        nonlocal calls
        calls += 1
        if data.draw(st.booleans()):
            return None
        row = data.draw(st.sampled_from([None, *rows]))
        place = data.draw(st.sampled_from(["suspects", "running"]))
        seen = sighting(rows=data.draw(st.integers(0, 1)), **({} if row is None else {place: (row,)}))
        return Loss(0, "ended", data.draw(st.booleans()), seen)

    try:
        guilty = [row for row, _ in find_guilty(history, range(n), anything)]
        assert len(set(guilty)) == len(guilty)
    except BatchgenError:
        pass
    assert calls <= 2 * n + 2


# ---- a run in small: workers that do what rows and bystanders make them do

OK, MOMENTS = None, ("first", "middle", "last")


def work(rows, deeds, batch: int, *, is_first_step: bool = False) -> Loss | None:
    """A worker that completes rows in batches, of which some end it: {row: (moment, whether it dies)}."""
    rows, moments = list(rows), ("first", "last") if is_first_step else MOMENTS
    for start in range(0, len(rows), batch):
        together = rows[start : start + batch]
        for moment in moments:
            for row in together:
                deed = deeds.get(row)
                if deed is None or deed[0] != moment:
                    continue
                seen = {
                    "first": sighting(suspects=tuple(together), rows=start),
                    "middle": sighting(running=tuple(together), rows=start),
                    "last": sighting(suspects=(row,), rows=start),
                }[moment]
                return died(0, seen) if deed[1] else raised(0, seen)
    return None


class SmallRun:
    """One chunk, done again until it is done; counts what it costs."""

    def __init__(self, n: int, deeds, batch: int, kills=(), trial_kill: int | None = None) -> None:
        """kills: what workers of the chunk were doing when they were killed from outside; trial_kill: which trial's."""
        self.rows, self.deeds, self.batch, self.kills, self.trial_kill = range(n), deeds, batch, [*kills], trial_kill
        self.history, self.failed = History(), set()
        self.losses = self.trial_losses = self.trials = 0

    def try_rows(self, rows, trial: Trial) -> Loss | None:
        self.trials += 1
        loss = work(rows, self.deeds, 1, is_first_step=trial.is_first_step)
        if self.trials - 1 == self.trial_kill:
            loss = died(0, sighting(running=(rows[0],)))
        self.trial_losses += loss is not None
        return loss

    def next_loss(self) -> Loss | None:
        if self.kills:
            return died(0, self.kills.pop())
        return work([row for row in self.rows if row not in self.failed], self.deeds, self.batch)

    def finish(self) -> None:
        chunk = chunk_of(self.rows)
        while loss := self.next_loss():
            self.losses += 1
            self.history.losses += 1
            trial = next_trial(self.history, loss, chunk)
            rows = [row for row in self.rows if row in trial.rows - self.failed]
            guilty = {row for row, _ in find_guilty(self.history, rows, lambda rows, t=trial: self.try_rows(rows, t))}
            if guilty:
                self.failed |= guilty
                self.history.add_cause(0)
            self.history.check(loss)
        self.history.add_progress()


DEEDS = st.dictionaries(st.integers(0, 11), st.tuples(st.sampled_from(MOMENTS), st.booleans()), max_size=8)
MOMENTS_OF_A_KILL = st.one_of(
    st.none(),
    st.builds(lambda s, r: sighting(suspects=tuple(s), running=tuple(r - s)), *[st.sets(st.integers(0, 11))] * 2),
)


@given(DEEDS, st.integers(1, 12), st.one_of(st.none(), st.integers(0, 5)))
def test_exactly_the_rows_that_end_their_workers_fail(deeds, batch, trial_kill):
    run = SmallRun(12, deeds, batch, trial_kill=trial_kill)
    run.finish()
    assert run.failed == deeds.keys()
    assert run.losses <= 2 * len(deeds)
    assert run.trial_losses <= 2 * len(deeds) + 1


@given(DEEDS, st.integers(1, 12), st.lists(MOMENTS_OF_A_KILL, max_size=8))
def test_an_innocent_row_never_fails_for_kills_from_outside_and_the_run_ends(deeds, batch, kills):
    run = SmallRun(12, deeds, batch, kills)
    try:
        run.finish()
    except BatchgenError:
        assert len(kills) > 2
    else:
        assert run.failed == deeds.keys()
    assert run.failed <= deeds.keys()
    assert run.losses <= MAX_LOSSES * (len(deeds) + 1)
    assert run.trial_losses <= 2 * len(deeds)


# ---- what hangs


@pytest.mark.parametrize(
    "looks",
    [
        # seconds, pulse, rows in flight, process ids that hang; the limit is 5 s
        [
            (0, 1, (1,), []),
            (4, 1, (1,), []),
            (5, 2, (1,), []),
            (9.9, 2, (1,), []),
            (10.1, 2, (1,), [7]),
            (11, 3, (1,), []),
        ],
        [(0, 1, (1,), []), (3600, 1, (1,), []), (3604, 1, (1,), []), (3606, 1, (1,), [7])],  # we were stopped
        [(0, 1, (), []), (9, 1, (), []), (18, 1, (), []), (24, 1, (1,), [7])],
    ],
)
def test_a_worker_hangs_if_its_pulse_stops_while_rows_are_in_flight(looks):
    stall = StallDetector(5.0)
    for now, pulse, rows, stuck in looks:
        assert stall.look(now, [sighting(running=rows, pulse=pulse)]) == stuck


def test_a_worker_that_is_idle_loading_or_writing_has_longer():
    stall = StallDetector(5.0)
    seen = [sighting(), sighting(pid=8, working=False)]
    for now in range(int(STALL_SECONDS) + 1):
        assert stall.look(now, seen) == []
    assert stall.look(STALL_SECONDS + 1, seen) == [7]


def test_workers_of_which_none_begins_are_silent():
    stall, begun = StallDetector(5.0), [sighting()]
    for now in range(int(STALL_SECONDS) + 1):
        stall.look(now, [replace(begun[0], working=False)])
        assert not stall.is_silent
    stall.look(STALL_SECONDS + 1, [])
    assert stall.is_silent
    stall.look(STALL_SECONDS + 2, begun)
    assert not stall.is_silent
