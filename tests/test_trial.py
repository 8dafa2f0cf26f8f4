"""trial.py: why a pattern cannot be read depends on the pattern alone."""

import os
import signal
import threading
from pathlib import Path

import pytest

from batchgen.errors import BatchgenError
from batchgen.text.guided import _to_grammar
from batchgen.text.trial import _Reader

GOOD = _to_grammar("grammar", 'start: "a"', "")
DEEP = _to_grammar("grammar", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4500)) + '\na4500: "x"', "")


@pytest.fixture
def reader():
    reader = _Reader()
    yield reader
    reader.close()


def test_a_process_that_is_killed_from_outside_is_not_the_patterns_fault(reader: _Reader) -> None:
    assert reader.read(GOOD) is None
    os.kill(reader._process.pid, signal.SIGKILL)
    assert reader.read(GOOD) is None
    assert reader.read(DEEP) == "it is nested too deeply, or too large"
    assert reader.read(GOOD) is None


def test_a_process_that_does_not_start_is_an_error_of_the_job(reader: _Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(BatchgenError, match="^the process that reads patterns ended twice with exit code 1"):
        reader.read(GOOD)


def test_modules_beside_the_prompts_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("json", "resource", "llguidance"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    reader = _Reader()
    assert reader.read(GOOD) is None
    reader.close()


def test_an_interrupted_answer_is_not_taken_for_the_next_one(reader: _Reader) -> None:
    assert reader.read(GOOD) is None

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    os.kill(reader._process.pid, signal.SIGSTOP)  # so that it does not answer before
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        reader.read(GOOD)
    signal.signal(signal.SIGUSR1, before)
    assert reader.read(DEEP) == "it is nested too deeply, or too large"


def test_threads_and_forked_processes_get_their_own_answers(reader: _Reader) -> None:
    os.register_at_fork(after_in_child=reader.forget)
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda i=i: found.append(reader.read((GOOD, DEEP)[i % 2]))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.count(None) == 3
    assert reader.read(GOOD) is None
    if not (child := os.fork()):
        os._exit(reader.read(DEEP) is None or reader.read(GOOD) is not None)
    assert reader.read(GOOD) is None
    assert os.waitpid(child, 0)[1] == 0
