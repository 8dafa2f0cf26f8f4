"""batchgen lm-eval: lm-evaluation-harness with batchgen as a model that it knows."""

from typing import Annotated

import typer

from batchgen.errors import SetupError

PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}  # every word is lm_eval's


def lm_eval(
    words: Annotated[list[str], typer.Argument(metavar="WORDS...", help="Words of lm_eval's own command line.")],
) -> None:
    """Run lm-evaluation-harness, to which `--model batchgen` is known here: its extra lm-eval installs it.

    `batchgen lm-eval run --help` shows its options.

    Example: batchgen lm-eval --model batchgen --model_args model=124M,precision=int8 --tasks lambada_openai
    """
    try:
        from batchgen.jobs.harness import main
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "batchgen"):
            raise
        what = f"lm-evaluation-harness needs {missing}, which is not installed"
        raise SetupError(f"{what}; install it with: pip install lm_eval") from error
    main(words)
