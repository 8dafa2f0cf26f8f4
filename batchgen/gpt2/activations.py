"""The activation functions of an MLP, by transformers' names; kernels.py computes them by their number here."""

ACTIVATIONS = (
    "gelu_new",  # OpenAI's, with tanh
    "gelu",  # with erf
    "quick_gelu",
    "silu",
    "relu",
    "relu2",
    "tanh",
)
SYNONYMS = {  # transformers' other names of the same functions
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}
