"""batchgen models: what is here, and what can be had."""

import typer

from batchgen.checkpoint.registry import OPENAI_MODELS, ModelInfo, list_models


def models() -> None:
    """List the models that --model can name: parameters, context, size, source and folder.

    Example: batchgen models
    """
    found = list_models()
    rows = [("NAME", "PARAMETERS", "CONTEXT", "SIZE", "WHERE"), *(_row(info) for info in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        typer.echo("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]).rstrip())
    absent = [name for name in OPENAI_MODELS if name not in {info.name for info in found}]
    if absent:
        typer.echo(
            f"Not here: {', '.join(absent)} (OpenAI). From a downloaded checkpoint: batchgen convert SRC {absent[0]}"
        )


def _row(info: ModelInfo) -> tuple[str, str, str, str, str]:
    if info.config is None or info.parameters is None or info.bytes is None:
        return info.name, "broken", "", "", info.error or str(info.path)
    return (
        info.name,
        f"{info.parameters / 1e6:,.1f}M",
        str(info.config.n_ctx),
        f"{info.bytes / 1e6:,.1f} MB",
        str(info.path),
    )
