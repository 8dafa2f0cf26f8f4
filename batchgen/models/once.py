"""What is made once of a model, by the first process that needs it: panels of an older model, weights in int8.

It goes into the model's own directory, or, if that cannot be written, into the user's folder of models:

    <models>/.packed/<model hash>/         the packed form of an older model
    <models>/.packed/<model hash>/int8/    weights in int8
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from batchgen.errors import ModelError
from batchgen.files import locked
from batchgen.limits import reason_of
from batchgen.models.registry import MODELS_VARIABLE, user_roots
from batchgen.models.shards import MANIFEST, REMEDY, Manifest, load_manifest, model_hash, other_remedy, pack_model

logger = logging.getLogger(__name__)

T = TypeVar("T")


def places_beside_models(digest: str) -> list[Path]:
    """The user's own places for what belongs to the model of this hash."""
    return [root / ".packed" / digest for root in user_roots()]


def make_once(places: Sequence[Path], find: Callable[[Path], T | None], make: Callable[[Path], None], what: str) -> T:
    """What `find` returns of the first place that has it; else it is made in the first place that can be written.

    make: raises OSError if the place cannot be written. Of several processes, one makes it and the others wait.
    """
    for place in places:
        if (found := find(place)) is not None:
            return found
    problems: list[str] = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with locked(place.parent):
                if (found := find(place)) is None:
                    if not problems:
                        logger.warning("%s, once", what)
                    make(place)
                    found = find(place)
            if found is not None:
                return found
        except OSError as error:
            problems.append(f"{place}: {reason_of(error)}")
    remedy = f"make room, or set {MODELS_VARIABLE} to a folder that you may write to"
    raise ModelError(f"{what}: there is no place to write ({'; '.join(problems)}); {remedy}")


# ---- packing


def packed_directory(directory: Path, manifest: Manifest) -> Path:
    """The directory in which the model is stored in panels; an older model is packed first."""
    if manifest.is_packed:
        return directory
    source, digest = Path(os.path.realpath(directory)), model_hash(manifest)

    def find(place: Path) -> Path | None:
        if not os.path.lexists(place / MANIFEST):
            return None
        with other_remedy(REMEDY if place == source else f"remove {place}: it is made again"):
            found = load_manifest(place)
        return place if found.is_packed and model_hash(found) == digest else None

    what = f"packing the weights of {manifest.name}"
    return make_once([source, *places_beside_models(digest)], find, partial(pack_model, source, manifest), what)
