"""batchgen models: what is here, and what can be had."""

import typer

from batchgen.models.registry import OPENAI_MODELS, ModelInfo, list_models

HEADER = ("NAME", "PARAMETERS", "CONTEXT", "SIZE", "SOURCE", "VERIFIED", "WHERE")


def models() -> None:
    """List the models that --model can name: parameters, context, size, source, when verified, and folder.

    Example: batchgen models
    """
    found = list_models()
    rows = [HEADER, *(_row(info) for info in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    for row in rows:
        line = [*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]
        typer.echo("  ".join(line).rstrip())
    absent = [name for name in OPENAI_MODELS if name not in {info.name for info in found}]
    if absent:
        typer.echo(f"Not here: {', '.join(absent)} (OpenAI). To have one: batchgen fetch {absent[0]}")


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
    """Whose model it is if that is known, else what it was made from."""
    known = (source[key] for key in ("model", "called", "format", "kind") if key in source)
    return next(known, "unknown")[:40]
