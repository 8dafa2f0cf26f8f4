"""Inputs as programs and people write them, a few of each kind; more: python -m tests.support.fuzz_inputs 100000."""

import pytest

from tests.support.fuzz_inputs import KINDS, fuzz

N = 40


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_that_others_read_or_one_is_rejected(kind: str) -> None:
    assert fuzz(N, kinds=[kind]).total() == N
