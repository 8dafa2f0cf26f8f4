"""Messages on standard error: lines for people, or with --log-json one JSON object per line for machines."""

import json
import logging
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """{"time", "level", "message"} and the record's extra={"values": {...}}."""

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        return json.dumps(values | getattr(record, "values", {}))


def log_for_people() -> None:
    logging.basicConfig(format="batchgen: %(message)s", level=logging.WARNING)


def log_as_json(wanted: bool) -> None:
    """The callback of --log-json."""
    if wanted:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
        logging.getLogger("batchgen").setLevel(logging.INFO)
        logging.getLogger("jobs").setLevel(logging.INFO)


def is_json() -> bool:
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
