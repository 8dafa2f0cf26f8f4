"""Fetch one of OpenAI's models: download its seven files, check them, convert them, then give the model its name.

<models>/fetched.json         {size/file: sha256} of first downloads; a later download must have the same hash
<models>/.downloads/124M/     downloaded files of a model that is not converted yet
<models>/.downloads/124M.lock one fetch of a model at a time
<models>/124M/                the model, put there by one rename
"""

import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from batchgen.errors import ModelError, UsageError
from batchgen.files import lock
from batchgen.models.convert import convert_tf_checkpoint, load_gpt2_params_from_tf_ckpt, read_hparams
from batchgen.models.download import MIRROR_VARIABLE, OTHER_MIRROR, Patience, Remote, Stopped, download, redact
from batchgen.models.model import Model
from batchgen.models.openai import BASE_URL, CONFIGS, DATA, FILES, FetchProgress, known_file
from batchgen.models.registry import models_dir
from batchgen.models.shards import MANIFEST, OnProgress, show
from batchgen.models.string_map import read_string_map, update_string_map
from batchgen.models.verify import record_verified
from batchgen.text.tokenizer import Tokenizer, get_encoder

logger = logging.getLogger(__name__)

FETCHED = "fetched.json"

_THREADS = 4
_SPARE = 64 * 2**20  # bytes, for the small files and the manifest

OnFetch = Callable[[FetchProgress], None]


def check_size(size: str) -> None:
    """Raise UsageError, with the four sizes, for any other."""
    if size not in CONFIGS:
        raise UsageError(f"OpenAI published no GPT-2 called {show(size)}; choose from {', '.join(CONFIGS)}")


def base_url(mirror: str | None = None) -> str:
    """The address above `{size}/{file}`: the mirror, $BATCHGEN_MIRROR, or OpenAI's own."""
    url = (mirror or os.environ.get(MIRROR_VARIABLE) or BASE_URL).rstrip("/")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError unless it is a number
        is_usable = parts.scheme in ("https", "http") and bool(parts.hostname) and not (parts.query or parts.fragment)
    except ValueError:
        is_usable = False
    if not is_usable or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(f"mirror {show(redact(url)) if is_usable else show(url)}: give it as https://host/path")
    return url


def remotes_of(size: str, base: str, recorded: Mapping[str, str]) -> dict[str, Remote]:
    """{file: Remote} of a model, the largest first. A hash of OpenAI's takes precedence over a recorded one."""
    hosts = frozenset(host for host in (urlsplit(BASE_URL).hostname, urlsplit(base).hostname) if host)
    remotes = {}
    for name in sorted(FILES, key=lambda name: name != DATA):
        length, sha256 = known_file(size, name)
        origin = "OpenAI's"
        if sha256 is None:
            sha256, origin = recorded.get(f"{size}/{name}"), f"recorded in {FETCHED} by the first fetch"
        remotes[name] = Remote(f"{base}/{size}/{name}", length, sha256, origin, hosts)
    return remotes


# ---- downloading


class _ByteCounter:
    """Adds up the bytes of files that are downloaded in parallel."""

    def __init__(self, totals: dict[str, int], on_progress: OnFetch) -> None:
        self.totals, self.on_progress = totals, on_progress
        self.done = dict.fromkeys(totals, 0)
        self.lock = threading.Lock()

    def update(self, name: str, done: int, total: int | None) -> None:
        with self.lock:
            self.done[name], self.totals[name] = done, total or self.totals[name]
            self.on_progress(FetchProgress("download", sum(self.done.values()), sum(self.totals.values())))


def _download_files(
    remotes: Mapping[str, Remote], directory: Path, patience: Patience | None, on_progress: OnFetch
) -> dict[str, str]:
    """Download the missing files, a few at a time; return {file: sha256}. The first failure stops the others."""
    counter = _ByteCounter({name: remote.size or 0 for name, remote in remotes.items()}, on_progress)
    stop = threading.Event()
    waiting, futures = iter(remotes), {name: Future[str]() for name in remotes}

    def work() -> None:
        while not stop.is_set() and (name := next(waiting, None)) is not None:
            on_bytes = partial(counter.update, name)
            try:
                sha256 = download(remotes[name], directory / name, patience=patience, on_bytes=on_bytes, stop=stop)
                futures[name].set_result(sha256)
            except BaseException as error:
                futures[name].set_exception(error)

    # Daemon threads, so that an exit does not wait for a silent server.
    threads = [threading.Thread(target=work, daemon=True, name=f"fetch-{i}") for i in range(_THREADS)]
    for thread in threads:
        thread.start()
    try:
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        errors = [error for future in futures.values() if future.done() and (error := future.exception())]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, Stopped))  # the cause, not a stop that it caused
    except BaseException as error:
        stop.set()
        if isinstance(error, Exception):  # no thread may write after this returns; an interrupt does not wait for them
            for thread in threads:
                thread.join()
        raise
    return {name: future.result() for name, future in futures.items()}


def _check_hparams(size: str, directory: Path) -> None:
    """Compare hparams.json with the published values; a file with others is removed."""
    path = directory / "hparams.json"
    found, expected = read_hparams(path), CONFIGS[size]
    if found != expected:
        path.unlink()
        raise ModelError(
            f"hparams.json of {size}: expected {expected.as_dict()}, found {found.as_dict()}; {OTHER_MIRROR}"
        )


def _check_disk(size: str, raw: Path) -> None:
    """Check, before the download, that the disk has room for the missing files and the shards."""
    data = known_file(size, DATA)[0] or 0
    config = CONFIGS[size]
    shards = data + 4 * config.n_vocab * config.n_embd  # wte is stored twice
    here = sum(path.stat().st_size for path in raw.iterdir() if path.is_file())
    needed, free = max(0, data - here) + shards + _SPARE, shutil.disk_usage(raw).free
    if free < needed:
        raise ModelError(
            f"{raw.parents[1]}: {size} needs {needed / 1e9:.1f} GB ({data / 1e9:.1f} to download, {shards / 1e9:.1f} "
            f"of shards), and {free / 1e9:.1f} GB are free; make room, or set BATCHGEN_MODELS to a folder elsewhere"
        )


def _make_private_folder(path: Path) -> Path:
    """Make a folder to which only this user may write, because the names of its files are predictable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be made ({error.strerror or error}); set BATCHGEN_MODELS elsewhere"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ModelError(f"{path}: is a link, belongs to another user, or is writable by others; remove it")
    return path


@contextmanager
def _fetch_lock(path: Path, size: str) -> Iterator[None]:
    """Hold the lock of one model's fetch; wait for another process that holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not lock(descriptor):
            logger.warning("another process is fetching %s; waiting for it", size)
            lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _removed_if_damaged(raw: Path, size: str) -> Iterator[None]:
    """Remove the downloaded files if one of them is the reason of an error, so that the next fetch downloads them."""
    try:
        yield
    except ModelError as error:
        if str(raw) not in str(error):
            raise
        shutil.rmtree(raw)
        text = str(error).replace(str(raw), size)  # the user knows the model, not our folder
        raise ModelError(f"{text} (the downloaded files are removed; run the same command again)") from error


def fetch_model(
    size: str,
    *,
    mirror: str | None = None,
    again: bool = False,
    keep_download: bool = False,
    on_progress: OnFetch | None = None,
    patience: Patience | None = None,
) -> Path:
    """Fetch OpenAI's model of a size (124M, 355M, 774M, 1558M) into the user's folder of models; return its directory.

    Resumes the downloads of an interrupted fetch, waits for one in another process, and does nothing if the model
    exists, unless `again`. mirror: another address with the same files; the default is $BATCHGEN_MIRROR.
    """
    check_size(size)
    base = base_url(mirror)
    models = models_dir()
    directory, private = models / size, _make_private_folder(models / ".downloads")
    report: OnFetch = on_progress or (lambda progress: None)
    on_shard: OnProgress = lambda done, total: report(FetchProgress("convert", done, total))  # noqa: E731
    with _fetch_lock(private / f"{size}.lock", size):
        if os.path.lexists(directory / MANIFEST) and not again:
            return directory
        raw = _make_private_folder(private / size)
        _check_disk(size, raw)
        remotes = remotes_of(size, base, read_string_map(models / FETCHED))
        hashes = _download_files(remotes, raw, patience, report)
        source = {"model": f"OpenAI's {size}", "from": redact(base), "data_sha256": hashes[DATA]}
        with _removed_if_damaged(raw, size):
            _check_hparams(size, raw)
            convert_tf_checkpoint(raw, directory, name=size, replace=again, source=source, on_progress=on_shard)
        # Recorded after TensorFlow has compared every tensor's checksum: these are the hashes of a complete model.
        update_string_map(models / FETCHED, {f"{size}/{name}": sha256 for name, sha256 in hashes.items()})
        if hashes[DATA] == known_file(size, DATA)[1]:
            record_verified(Model.load(directory))
        if not keep_download:
            shutil.rmtree(raw)
    return directory


# ---- picoGPT's functions


def download_gpt2_files(model_size: str, model_dir: str | Path) -> None:
    """Download a model's seven files into model_dir: picoGPT's function, which here resumes and checks them."""
    check_size(model_size)
    directory = Path(model_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _download_files(remotes_of(model_size, base_url(), {}), directory, None, lambda progress: None)


def load_encoder_hparams_and_params(
    model_size: str, models_dir: str | Path
) -> tuple[Tokenizer, dict[str, object], dict[str, object]]:
    """picoGPT's function, which downloads missing files; a model of shards is mapped instead, with the same keys."""
    check_size(model_size)
    directory = Path(models_dir) / model_size
    if os.path.lexists(directory / MANIFEST):
        model = Model.load(directory)
        params = {key: value for key, value in model.load_params().items() if key != "lm_head"}
        return model.load_tokenizer(), model.config.as_dict(), params
    if not os.path.lexists(directory / DATA):
        download_gpt2_files(model_size, directory)
    encoder = get_encoder(model_size, models_dir)
    hparams = read_hparams(directory / "hparams.json").as_dict()
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(str(directory / "model.ckpt"), hparams)
