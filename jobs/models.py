"""batchgen models: list the models that are here, and those that can be fetched."""

import typer

from batchgen.models.openai import SIZES
from batchgen.models.registry import ModelInfo, list_models

HEADER = ("NAME", "PARAMETERS", "CONTEXT", "SIZE", "SOURCE", "VERIFIED", "WHERE")


def models() -> None:
    """List the models that --model can name: parameters, context, size, source, day of verification, and folder.

    Example: batchgen models
    """
    found = list_models()
    rows = [HEADER, *(_row(info) for info in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    for row in rows:
        line = [*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]
        typer.echo("  ".join(line).rstrip())
    absent = [name for name in SIZES if name not in {info.name for info in found}]
    if absent:
        typer.echo(f"Not here: {', '.join(absent)} (OpenAI). To get one: batchgen fetch {absent[0]}")


def _row(info: ModelInfo) -> tuple[str, ...]:
    if info.config is None or info.parameters is None or info.bytes is None:
        return info.name, "broken", "", "", "", "", info.error or str(info.path)
    return (
        info.name,
        f"{info.parameters / 1e6:,.1f}M",
        str(info.config.n_ctx),
        f"{info.bytes / 1e6:,.1f} MB",
        _source(info.source or {}),
        info.verified or "no",
        str(info.path),
    )


def _source(source: dict[str, str]) -> str:
    """The owner of the model if the manifest names one, else the format it was converted from."""
    known = (source[key] for key in ("model", "called", "format", "kind") if key in source)
    return next(known, "unknown")[:40]
