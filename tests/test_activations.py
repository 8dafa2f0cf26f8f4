"""gpt2/activations.py against each function's formula in float64, written in tests/support/reference.py."""

import numpy as np
import pytest

from batchgen.gpt2.activations import ACTIVATIONS, SYNONYMS
from tests.support import reference


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_its_formula_and_survives_any_float(name: str) -> None:
    large = [] if name == "relu2" else [-3e38, 1e12, 3e38]
    x = np.array([*large, -100, -9, -1e-30, 0, 1e-30, 100, *np.linspace(-8, 8, 4001)], np.float32)
    expected = np.array([reference.ACTIVATIONS[name](float(value)) for value in x])
    with np.errstate(over="ignore"):
        found = ACTIVATIONS[name](x.copy(), np.empty_like(x))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1.2e-6 if name == "gelu_new" else 3e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_a_number_does_not_depend_on_its_neighbours(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((7, 33)).astype(np.float32) * 3
    together = ACTIVATIONS[name](x.copy(), np.empty_like(x))
    for row, whole in zip(x, together, strict=True):
        assert (ACTIVATIONS[name](row[None].copy(), np.empty((1, 33), np.float32)) == whole).all()


def test_every_synonym_names_an_activation() -> None:
    assert set(SYNONYMS.values()) <= set(ACTIVATIONS)
