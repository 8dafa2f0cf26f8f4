"""What can go wrong with a whole job, by exit code; a bad row is data, not one of these."""


class BatchgenError(Exception):
    """A job that could not run; its text is the one line that the user sees."""

    exit_code = 1


class UsageError(BatchgenError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class InputError(BatchgenError):
    """The input cannot be read as prompts at all."""


class OutputError(BatchgenError):
    """The output cannot be written where it was asked for."""


class ModelError(BatchgenError):
    """A model is missing, damaged, or not what it says it is."""


class SetupError(BatchgenError):
    """A package that batchgen needs is missing or does not work."""


class BusyError(BatchgenError):
    """Another run holds this output; nothing was touched."""

    exit_code = 75


class StoppedError(BatchgenError):
    """The time that was given is over; what is finished is kept, and the same command goes on."""

    exit_code = 75
