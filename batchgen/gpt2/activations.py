"""The activation functions of an MLP, under transformers' names; each works in place, with scratch of x's shape.

An exponential may overflow to infinity; the quotient is then 0, which is correct.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Activation = Callable[[Array, Array], Array]


def gelu_tanh(x: Array, scratch: Array) -> Array:
    """x -> x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x**3): tanh's GELU (Hendrycks, 2016), rearranged.

    0.5 (1 + tanh u) = 1 / (1 + exp(-2u)).
    """
    t = np.multiply(x, x, out=scratch)
    t *= -2 * 0.7978845608028654 * 0.044715
    t -= 2 * 0.7978845608028654
    t *= x
    np.exp(t, out=t)
    t += 1.0
    return np.divide(x, t, out=x)


def gelu_erf(x: Array, scratch: Array) -> Array:
    """x -> x * P(X <= x) for a standard normal X, rearranged: max(x, 0) - |x| P(X > |x|).

    P(X > a) = erfc(a / sqrt(2)) / 2 = t (c1 + t (c2 + ...)) exp(-a**2 / 2) / 2 with t = 1 / (1 + p a), within 8e-8:
    Abramowitz and Stegun, 7.1.26.
    """
    a = np.abs(x)
    t = np.multiply(a, 0.3275911 / 2**0.5, out=scratch)
    t += 1.0
    np.divide(1.0, t, out=t)
    tail = t * (1.061405429 / 2)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += c / 2
        tail *= t
    tail *= a
    a *= a
    a *= -0.5
    tail *= np.exp(a, out=a)
    np.maximum(x, 0.0, out=x)
    return np.subtract(x, tail, out=x)


def _times_sigmoid(factor: float) -> Activation:
    """x -> x * sigmoid(factor * x)."""

    def activate(x: Array, scratch: Array) -> Array:
        t = np.multiply(x, -factor, out=scratch)
        np.exp(t, out=t)
        t += 1.0
        return np.divide(x, t, out=x)

    return activate


def relu(x: Array, scratch: Array) -> Array:
    return np.maximum(x, 0.0, out=x)


def relu_squared(x: Array, scratch: Array) -> Array:
    return np.square(np.maximum(x, 0.0, out=x), out=x)


def tanh(x: Array, scratch: Array) -> Array:
    return np.tanh(x, out=x)


ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": gelu_tanh,  # OpenAI's
    "gelu": gelu_erf,
    "quick_gelu": _times_sigmoid(1.702),
    "silu": _times_sigmoid(1.0),
    "relu": relu,
    "relu2": relu_squared,
    "tanh": tanh,
}
SYNONYMS = {  # transformers' other names of the same functions
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}
