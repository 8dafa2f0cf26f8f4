"""gpt2/pico.py against the float64 reference and against the fast forward pass."""

import numpy as np

from batchgen.gpt2 import pico
from tests.support import reference
from tests.support.logits import gpt2
from tests.support.models import TINY, sharp_params, sharp_tensors


def test_pico_equals_the_float64_reference():
    tensors = sharp_tensors(TINY)
    del tensors["lm_head"]
    ids = list(range(40))
    params = {key: value for key, value in sharp_params(TINY).items() if key != "lm_head"}
    expected = reference.logits(ids, tensors, TINY.n_head)
    found = pico.gpt2(ids, **params, n_head=TINY.n_head)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def test_pico_generates_the_argmax_of_the_fast_pass():
    params = sharp_params(TINY)
    ids = [1, 2, 3]
    for _ in range(12):
        ids.append(int(gpt2(ids, **params, n_head=TINY.n_head)[-1].argmax()))
    small = {key: value for key, value in params.items() if key != "lm_head"}
    assert pico.generate([1, 2, 3], small, TINY.n_head, 12) == ids[3:]
