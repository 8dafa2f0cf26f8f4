"""marker.py: what a worker writes of itself, another process reads."""

import errno
import os
from pathlib import Path

from batchgen.engine.limits import LARGEST_BATCH
from batchgen.engine.sequence import Work
from batchgen.workers.marker import Marker, Phase, read_sightings


def refuse(*_: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_marker_shows_what_its_worker_does(tmp_path):
    marker = Marker.open(tmp_path, 4)
    marker.add(1, 20)
    marker.set_completion_tokens(300)
    marker.set_in_flight([7, 8], [1, 2, 3])
    [seen] = read_sightings(tmp_path)
    assert (seen.pid, seen.chunk) == (os.getpid(), 4)
    assert (seen.rows, seen.prompt_tokens, seen.completion_tokens) == (1, 20, 300)
    assert (seen.suspects, seen.running, seen.in_flight) == ((7, 8), (1, 2, 3), (7, 8, 1, 2, 3))
    marker.set_in_flight([1])
    assert read_sightings(tmp_path)[0].pulse > seen.pulse
    assert read_sightings(tmp_path)[0].in_flight == (1,)
    assert read_sightings(tmp_path)[0].phase
    marker.finish()
    [seen] = read_sightings(tmp_path)
    assert (seen.phase, seen.rows, seen.in_flight) == (Phase.IDLE, 1, ())


def test_a_marker_shows_its_phase_and_the_step_of_a_row_alone(tmp_path):
    marker = Marker.open(tmp_path, 4)
    shown = []
    for act in (
        lambda: None,
        lambda: marker.on_step([], []),  # a prompt that is read in several passes
        lambda: marker.on_step([7], []),
        lambda: marker.on_step([], [7]),
        lambda: marker.set_in_flight([7]),
        lambda: marker.on_step([8], []),
        lambda: marker.finish(Phase.WRITING),
        lambda: marker.finish(),
        lambda: Marker.open(tmp_path, 5),
    ):
        act()
        [seen] = read_sightings(tmp_path)
        shown.append((seen.phase, seen.in_flight, seen.step if seen.in_flight else 0))
    assert shown == [
        (Phase.STARTING, (), 0),
        (Phase.ROWS, (), 0),
        *[(Phase.ROWS, (7,), step) for step in (1, 2, 3)],
        (Phase.ROWS, (8,), 1),
        (Phase.WRITING, (), 0),
        (Phase.IDLE, (), 0),
        (Phase.STARTING, (), 0),
    ]


def test_what_cannot_be_read_now_is_left_out(tmp_path, monkeypatch):
    """A network drive that does not answer: the thread that looks at the workers goes on."""
    Marker.open(tmp_path, 4)
    for owner, name in ((Path, "read_bytes"), (os, "scandir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            assert read_sightings(tmp_path) == []
    assert len(read_sightings(tmp_path)) == 1


def test_the_next_chunk_counts_from_zero_and_the_pulse_continues(tmp_path):
    marker = Marker.open(tmp_path, 4)
    marker.add(1, 20)
    marker.set_completion_tokens(300)
    before = read_sightings(tmp_path)[0].pulse
    Marker.open(tmp_path, 5)
    [seen] = read_sightings(tmp_path)
    assert (seen.chunk, seen.rows, seen.completion_tokens) == (5, 0, 0)
    assert seen.pulse > before


def test_a_marker_holds_as_many_rows_as_can_be_in_flight(tmp_path):
    marker = Marker.open(tmp_path, 0)
    marker.set_in_flight(range(LARGEST_BATCH), range(LARGEST_BATCH, 3 * LARGEST_BATCH))
    assert read_sightings(tmp_path)[0].in_flight == tuple(range(2 * LARGEST_BATCH))


def test_an_incomplete_marker_is_ignored(tmp_path):
    (tmp_path / "worker-1").touch()
    (tmp_path / "worker-2").write_bytes(bytes(16))
    assert read_sightings(tmp_path) == []


def test_only_markers_are_sightings(tmp_path):
    Path(tmp_path, "worker-3.example-17-ab").mkdir()  # of someone else
    Path(tmp_path, "worker-17").write_bytes(b"")  # just being made
    assert read_sightings(tmp_path) == []


def test_an_abandoned_chunk_counts_for_nothing(tmp_path):
    marker = Marker.open(tmp_path, 4)
    marker.on_step([7], [8])
    marker.add(1, 20)
    sighting = marker.abandon()
    assert (sighting.rows, sighting.completion_tokens, sighting.suspects, sighting.running) == (1, 2, (7,), (8,))
    [seen] = read_sightings(tmp_path)
    assert (seen.phase, seen.chunk, seen.rows, seen.completion_tokens, seen.in_flight) == (Phase.IDLE, 4, 0, 0, ())


def test_a_marker_shows_the_work_of_the_engine_and_the_rows_of_chunks_from_their_first_step_on(tmp_path):
    work = Work(sequences=3, max_tokens=30, prompt_tokens=12)
    marker = Marker.open(tmp_path, 4)
    marker.begin(5, work)
    assert read_sightings(tmp_path)[0].rows_begun == 0
    marker.on_step([7], [])
    work.read, work.started, work.generated = 4, 1, 1
    marker.on_step([8], [7])
    [seen] = read_sightings(tmp_path)
    assert (seen.chunk_rows, seen.rows_begun, seen.work) == (5, 5, work)
    marker.finish()
    marker = Marker.open(tmp_path, 5)
    marker.begin(2, work)
    assert (read_sightings(tmp_path)[0].chunk_rows, read_sightings(tmp_path)[0].rows_begun) == (0, 5)
    marker.on_step([9], [])
    assert (read_sightings(tmp_path)[0].chunk_rows, read_sightings(tmp_path)[0].rows_begun) == (2, 7)
