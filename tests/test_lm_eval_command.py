"""jobs/lm_eval.py: without lm-evaluation-harness the command says what to install."""

import sys

from typer.testing import CliRunner

from batchgen.errors import SetupError
from batchgen.jobs.cli import app


def test_without_the_harness_the_extra_is_named(monkeypatch):
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "lm_eval" or name == "batchgen.jobs.harness"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["lm-eval", "--model", "batchgen"])
    assert isinstance(done.exception, SetupError)
    assert str(done.exception).startswith("lm-evaluation-harness needs lm_eval, which is not installed")
    assert "pip install lm_eval" in str(done.exception)
