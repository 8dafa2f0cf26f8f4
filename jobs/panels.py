"""How --help groups the commands and their options: one table, so that a group is seen as a whole."""

from typing import Any

from typer.core import TyperCommand

COMMANDS = {
    "Completions": ("plan", "generate", "complete"),
    "Looking at outputs": ("report", "verify"),
    "Models": ("fetch", "convert", "models"),
    "This machine": ("doctor",),
}

OPTIONS = {
    "Input, model, output": (
        "output", "input_format", "model", "fetch", "prompt_column", "id_column", "keep", "output_token_ids",
        "logprobs", "output_format", "work_dir", "html_report",
    ),
    "Sampling": (
        "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "n", "seed", "row_params",
    ),
    "Where a completion ends": ("stop", "include_stop", "stop_token_ids", "ignore_eos", "stop_loops", "echo"),
    "Prompts": ("on_too_long", "empty_prompt", "trim"),
    "Work": ("jobs", "batch_size", "chunk_rows", "kv_memory", "share_prefixes", "require_invariant", "time"),
    "Cluster": ("backend", "scheduler", "address", "model_cache"),
    "Run": (
        "restart", "retry_failed", "time_limit", "row_timeout", "progress", "status", "log_json", "quiet", "show",
    ),
}  # fmt: skip


MANY_OPTIONS = ("plan", "generate", "complete")


def command_class(name: str) -> type[TyperCommand]:
    return PanelledCommand if name in MANY_OPTIONS else TyperCommand


def panel_of(name: str, panels: dict[str, tuple[str, ...]]) -> str | None:
    return next((panel for panel, names in panels.items() if name in names), None)


class PanelledCommand(TyperCommand):
    """A command of many options, which stand in their panels; what has none stands under Options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            parameter.rich_help_panel = panel_of(parameter.name or "", OPTIONS)  # type: ignore[attr-defined]
