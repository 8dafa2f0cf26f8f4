"""gpt2/activations.py and the functions in kernels.py against each formula in float64 (tests/support/reference.py)."""

import numpy as np
import pytest

from batchgen.gpt2.activations import ACTIVATIONS, SYNONYMS
from batchgen.gpt2.kernels import activate
from tests.support import reference


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_its_formula_and_survives_any_float(name: str) -> None:
    large = [] if name == "relu2" else [-3e38, 1e12, 3e38]
    x = np.array([*large, -100, -9, -1e-30, 0, 1e-30, 100, *np.linspace(-8, 8, 4001)], np.float32)
    expected = np.array([reference.ACTIVATIONS[name](float(value)) for value in x])
    activate(x, ACTIVATIONS.index(name))
    np.testing.assert_allclose(x, expected, rtol=3e-7, atol=1.2e-6 if name == "gelu_new" else 3e-7)


def test_tanh_of_a_small_number_is_exact_to_its_last_bits() -> None:
    x = np.geomspace(1e-20, 1, 2001).astype(np.float32)
    expected = np.tanh(x.astype(np.float64))
    activate(x, ACTIVATIONS.index("tanh"))
    np.testing.assert_allclose(x, expected, rtol=2e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_a_number_does_not_depend_on_its_neighbours(name: str) -> None:
    together = np.random.default_rng(0).standard_normal(231).astype(np.float32) * 3
    alone = together.copy()
    activate(together, ACTIVATIONS.index(name))
    for i in range(len(alone)):
        activate(alone[i : i + 1], ACTIVATIONS.index(name))
    assert (alone == together).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name: str) -> None:
    x = np.array([1, np.nan, 2], np.float32)
    activate(x, ACTIVATIONS.index(name))
    assert np.isnan(x).tolist() == [False, True, False]


def test_every_synonym_names_an_activation() -> None:
    assert set(SYNONYMS.values()) <= set(ACTIVATIONS)
