"""outlook.py: the time left is right from the first chunk on, for whatever rows a run has.

The engine really runs, on a small model; its clock is made of its steps, so that no test depends on this machine's.
"""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engine.sequence import Work
from batchgen.models.model import Model
from batchgen.planning import plan_chunks
from batchgen.types import SamplingParams, TokenizedRequest
from batchgen.workers.complete import complete_chunk, map_engine
from batchgen.workers.marker import RECORD, Marker, Phase, Sighting, _sighting
from batchgen.workers.outlook import Outlook
from tests.support.models import write_byte_model

ROWS, CHUNK_ROWS, WORKERS = 240, 30, 2


@dataclass
class Clocked(Marker):
    """A marker that notes what could be seen of it, and when: a step costs 100 ms, and a token 10 or 2.5 ms."""

    pid: int
    record: np.ndarray = field(default_factory=lambda: np.zeros(1, RECORD))
    seconds: float = 0.0
    seen: list[tuple[float, Sighting]] = field(default_factory=list)
    ends: list[tuple[float, int]] = field(default_factory=list)  # of chunks

    def begin_chunk(self, chunk: int) -> "Clocked":
        Marker.__init__(self, self.record, chunk)
        self.note()
        return self

    def note(self) -> None:
        self.seen.append((self.seconds, _sighting(self.pid, self.record[0])))

    def on_step(self, starting, running, reading) -> None:
        before = _sighting(self.pid, self.record[0]).work
        super().on_step(starting, running, reading)
        work = self._engine_work
        self.seconds += 0.1 + 0.01 * (work.generated - before.generated) + 0.0025 * (work.read - before.read)
        self.note()

    def end_chunk(self, chunk: int) -> None:
        self.finish()
        self.note()
        self.ends.append((self.seconds, chunk))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Model.open(str(write_byte_model(tmp_path_factory.mktemp("models") / "bytes")))


def rows_of(kind: str) -> list[TokenizedRequest]:
    """Prompts of very different lengths; with an end that about one token in 25 is, as models end their texts."""
    lengths = np.random.default_rng(1).permutation(np.geomspace(2, 80, ROWS).astype(int))
    stops = () if kind == "all of one length" else tuple(range(0, 250, 25))
    params = SamplingParams(max_tokens=40, temperature=1.5, stop_token_ids=stops)
    rows = []
    for row, length in enumerate(map(int, lengths)):
        text = chr(97 + row % 26) * length
        own = replace(params, n=1 + row % 4) if kind == "several samples" else params
        rows.append(TokenizedRequest(row, f"p:{row}", None, text, tuple(text.encode()), own))
    return rows


def run(model: Model, kind: str, first_chunk: int = 0) -> list[Clocked]:
    """What two workers do from a chunk on."""
    workers = [Clocked(100 + number) for number in range(WORKERS)]
    engines = [map_engine(model, model.load_tokenizer(), max_batch=16) for _ in workers]
    for chunk in list(plan_chunks(rows_of(kind), CHUNK_ROWS))[first_chunk:]:
        number = min(range(WORKERS), key=lambda number: workers[number].seconds)
        marker = workers[number].begin_chunk(chunk.index)
        complete_chunk(chunk, SamplingParams(), engines[number], model.load_tokenizer(), marker)
        marker.end_chunk(chunk.index)
    return workers


def looks(workers: list[Clocked], first_chunk: int = 0) -> tuple[float, list[tuple[float, float | None]]]:
    """The seconds of the run, and at a hundred moments what is left of them; chunks are committed a little late."""
    end = max(worker.seconds for worker in workers)
    outlook = Outlook(ROWS, first_chunk * CHUNK_ROWS)
    result = []
    for seconds in np.linspace(0, end, 101)[1:-1]:
        sightings = [w.seen[max(bisect_right([at for at, _ in w.seen], seconds) - 1, 0)][1] for w in workers]
        committed = {chunk for worker in workers for at, chunk in worker.ends if at < seconds - 0.1}
        committed |= set(range(first_chunk))
        result.append((seconds, outlook.look(sightings, committed, len(committed) * CHUNK_ROWS, seconds)))
    return end, result


@pytest.mark.parametrize("kind", ["all of one length", "early ends", "several samples"])
@pytest.mark.parametrize("first_chunk", [0, 3])
def test_time_left_is_within_a_quarter_after_a_tenth_of_a_run_and_of_a_resumed_one(model, kind, first_chunk):
    end, estimates = looks(run(model, kind, first_chunk), first_chunk)
    for seconds, left in estimates:
        if seconds < 0.02 * end:
            assert left is None or left > 0
        elif 0.1 * end < seconds < 0.8 * end:
            assert left is not None
            assert abs(left - (end - seconds)) < 0.25 * (end - seconds) + 0.02 * end, seconds / end


def test_time_left_does_not_rise_because_a_chunk_ended(model):
    """It is a little higher or lower if the next chunk is, and one look may be before a commit and the next after."""
    workers = run(model, "all of one length")
    _, estimates = looks(workers)
    ends = {at for worker in workers for at, _ in worker.ends[:-1]}
    for (before, more), (after, less) in pairwise(estimates):
        if more and less and any(before <= at <= after for at in ends):
            assert less < 1.05 * more


def test_no_time_is_left_when_all_is_done_and_none_is_known_before_the_first_tokens(model):
    workers = run(model, "early ends")
    outlook = Outlook(ROWS)
    assert outlook.look([], (), 0, 5.0) is None
    assert outlook.look([worker.seen[0][1] for worker in workers], (), 0, 10.0) is None
    for step in (1, len(workers[0].seen) // 2):
        outlook.look([worker.seen[min(step, len(worker.seen) - 1)][1] for worker in workers], (), 0, 10.0 + step)
    assert outlook.look([worker.seen[-1][1] for worker in workers], range(8), ROWS, 500.0) == 0.0


def test_a_cluster_has_no_markers_here_and_counts_rows():
    assert Outlook(90, resumed=10).look([], (), 30, 10.0) == 30.0  # 20 rows in 10 s, 60 to go


def test_a_worker_that_dies_takes_nothing_from_the_pace(model):
    workers = run(model, "all of one length")
    outlook = Outlook(ROWS)
    for step in range(1, 100):
        outlook.look([worker.seen[step][1] for worker in workers], (), 0, float(step))
    both = outlook.look([worker.seen[100][1] for worker in workers], (), 0, 100.0)
    one = outlook.look([workers[0].seen[101][1]], (), 0, 101.0)
    assert both
    assert one
    assert one > both


@given(st.lists(st.lists(st.integers(0, 50), min_size=13, max_size=13), min_size=1, max_size=4))
def test_numbers_that_do_not_agree_give_an_estimate_and_no_error(counts):
    """A marker may be read while its worker writes it."""
    outlook = Outlook(100)
    for seconds, numbers in enumerate(counts):
        sightings = [Sighting(pid, 0, Phase.ROWS, pid, 0, 0, 0, (), (), 10, 10, Work(*numbers)) for pid in range(2)]
        left = outlook.look(sightings, (), 0, 10.0 * seconds)
        assert left is None or left >= 0
