"""The groups of commands in --help; options name their group where they are declared."""

COMMANDS = {
    "Completions": ("plan", "generate", "complete"),
    "Looking at outputs": ("report", "verify"),
    "Models": ("fetch", "convert", "models"),
    "This machine": ("doctor",),
}


def panel_of(command: str) -> str:
    return next(panel for panel, commands in COMMANDS.items() if command in commands)
