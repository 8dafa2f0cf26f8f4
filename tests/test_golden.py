"""golden.json: every job over the command line gives what it gave when that file was written."""

import pytest

from tests import golden


@pytest.fixture(scope="module")
def expected():
    return golden.read_golden()


@pytest.mark.parametrize("name", golden.JOBS)
def test_outcome_is_the_golden_one(name, expected, tmp_path):
    assert golden.compare(name, golden.run_job(golden.JOBS[name], tmp_path), expected) == []


def test_golden_file_has_these_jobs_and_no_others(expected):
    assert set(expected) == {name for name, job in golden.JOBS.items() if not job.like}
