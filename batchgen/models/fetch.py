"""OpenAI's models from the network to shards: seven files, checked, converted, and only then under their name.

<models>/fetched.json         sha256 of every file at its first download; another one later is refused
<models>/.downloads/124M/     what has been downloaded of a model that is not converted yet
<models>/.downloads/124M.lock one fetch of a model at a time
<models>/124M/                the model, in one rename
"""

import fcntl
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from batchgen.errors import ModelError, UsageError
from batchgen.models.convert import convert_tf_checkpoint, load_gpt2_params_from_tf_ckpt, read_hparams
from batchgen.models.download import Patience, Remote, Stopped, download, shown
from batchgen.models.openai import BASE_URL, CONFIGS, DATA, FILES, FetchProgress, known_file
from batchgen.models.records import Records
from batchgen.models.registry import models_dir
from batchgen.models.shards import MANIFEST, load_manifest, load_params, read_json, short
from batchgen.models.verify import record_verified
from batchgen.text.tokenizer import Tokenizer, get_encoder

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "BATCHGEN_MIRROR"
FETCHED = "fetched.json"

_AT_ONCE = 4
_SPARE = 64 * 2**20  # the small files, the manifest, and some room


OnFetch = Callable[[FetchProgress], None]


def fetch_model(
    size: str,
    *,
    mirror: str | None = None,
    again: bool = False,
    keep_download: bool = False,
    on_progress: OnFetch | None = None,
    patience: Patience | None = None,
) -> Path:
    """Have OpenAI's model of that size (124M, 355M, 774M, 1558M) in the user's folder of models; return where.

    Goes on with what an interrupted fetch has downloaded, waits for another that runs, and does nothing where the
    model is there, unless `again`. mirror: another place with the same files, by default $BATCHGEN_MIRROR.
    Raises ModelError or UsageError with what to do; there is then no model, or the one that was there.
    """
    check_size(size)
    base = base_url(mirror)
    models = models_dir()
    directory, private = models / size, _own_folder(models / ".downloads")
    with _locked(private / f"{size}.lock", size):
        if os.path.lexists(directory / MANIFEST) and not again:
            return directory
        raw = _own_folder(private / size)
        _check_disk(size, raw)
        records = Records(models / FETCHED)
        found = _download_files(size, raw, base, records.read(), patience, on_progress)
        _check_hparams(size, raw)
        source = {"model": f"OpenAI's {size}", "from": shown(base), "data_sha256": found[DATA]}
        convert_tf_checkpoint(
            raw, directory, name=size, replace=again, source=source, on_progress=_converting(on_progress)
        )
        # Only now: TensorFlow has compared every tensor's checksum, so that these are the hashes of a whole model.
        records.update({f"{size}/{name}": sha256 for name, sha256 in found.items()})
        if found[DATA] == known_file(size, DATA)[1]:
            record_verified(load_manifest(directory))
        if not keep_download:
            shutil.rmtree(raw)
    return directory


def download_gpt2_files(model_size: str, model_dir: str | Path, mirror: str | None = None) -> None:
    """Download a model's seven files into model_dir: picoGPT's function; here resumed and checked."""
    check_size(model_size)
    directory = Path(model_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _download_files(model_size, directory, base_url(mirror), {}, None, None)


def load_encoder_hparams_and_params(
    model_size: str, models_dir: str | Path
) -> tuple[Tokenizer, dict[str, Any], dict[str, Any]]:
    """Return (encoder, hparams, params) of models_dir/model_size, downloading the files where they are absent.

    picoGPT's function; a model that was converted to shards is mapped instead, with the same keys.
    """
    check_size(model_size)
    directory = Path(models_dir) / model_size
    if os.path.lexists(directory / MANIFEST):
        manifest = load_manifest(directory)
        params = {key: value for key, value in load_params(directory, manifest).items() if key != "lm_head"}
        return get_encoder(model_size, models_dir), manifest.config.as_dict(), params
    if not os.path.lexists(directory / DATA):
        download_gpt2_files(model_size, directory)
    encoder = get_encoder(model_size, models_dir)
    hparams = read_hparams(directory / "hparams.json").as_dict()
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(str(directory / "model.ckpt"), hparams)


def check_size(size: str) -> str:
    """Return a size that OpenAI published; any other raises UsageError with the four."""
    if size not in CONFIGS:
        raise UsageError(f"OpenAI published no GPT-2 called {short(size)}; choose from {', '.join(CONFIGS)}")
    return size


def base_url(mirror: str | None = None) -> str:
    """The address above `{size}/{file}`: the mirror, $BATCHGEN_MIRROR, or OpenAI's own."""
    url = (mirror or os.environ.get(MIRROR_VARIABLE) or BASE_URL).rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("https", "http") and bool(parts.hostname) and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(f"mirror {short(shown(url)) if usable else short(url)}: give it as https://host/path")
    return url


# --- the files -----------------------------------------------------------------------------------------------


def remotes(size: str, base: str, recorded: Mapping[str, str]) -> dict[str, Remote]:
    """Every file of a model with its address and what is known of it; OpenAI's hashes come before recorded ones."""
    hosts = frozenset(host for host in (urlsplit(BASE_URL).hostname, urlsplit(base).hostname) if host)
    found = {}
    for name in sorted(FILES, key=lambda name: name != DATA):  # the large one first: it takes longest
        length, sha256 = known_file(size, name)
        origin = "OpenAI's"
        if sha256 is None:
            sha256, origin = recorded.get(f"{size}/{name}"), f"recorded in {FETCHED} when it was first fetched"
        found[name] = Remote(f"{base}/{size}/{name}", length, sha256, origin, hosts)
    return found


def _download_files(
    size: str,
    directory: Path,
    base: str,
    recorded: Mapping[str, str],
    patience: Patience | None,
    on_progress: OnFetch | None,
) -> dict[str, str]:
    """Download what is missing, a few files at once; returns every file's sha256. The first failure stops all."""
    wanted = remotes(size, base, recorded)
    count = _Count({name: remote.size or 0 for name, remote in wanted.items()}, on_progress)
    stop = threading.Event()

    waiting, futures = iter(wanted), {name: Future[str]() for name in wanted}

    def work() -> None:
        """One thread: a file after the other, until there are no more or one of them failed."""
        while not stop.is_set() and (name := next(waiting, None)) is not None:
            try:
                sha256 = download(wanted[name], directory / name, patience=patience, on_bytes=count.of(name), stop=stop)
                futures[name].set_result(sha256)
            except BaseException as error:
                futures[name].set_exception(error)

    # Daemons, which an exit does not wait for: a silent server would hold it up.
    threads = [threading.Thread(target=work, daemon=True, name=f"fetch-{i}") for i in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        _raise_first(futures.values())
    except Exception:
        stop.set()
        for thread in threads:  # none may still write when this returns; interrupted, nobody waits for them
            thread.join()
        raise
    except BaseException:
        stop.set()
        raise
    return {name: future.result() for name, future in futures.items()}


def _raise_first(futures: Iterable[Future[str]]) -> None:
    """Raise what went wrong, if anything did; not that others were stopped for it."""
    errors = [error for future in futures if future.done() and (error := future.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Stopped))


class _Count:
    """Adds up the bytes of files that are downloaded at once."""

    def __init__(self, totals: dict[str, int], on_progress: OnFetch | None) -> None:
        self.totals, self.on_progress = totals, on_progress
        self.done = dict.fromkeys(totals, 0)
        self.lock = threading.Lock()

    def of(self, name: str) -> Callable[[int, int | None], None]:
        def count(done: int, total: int | None) -> None:
            with self.lock:
                self.done[name], self.totals[name] = done, total or self.totals[name]
                if self.on_progress:
                    all_done, in_all = sum(self.done.values()), sum(self.totals.values())
                    self.on_progress(FetchProgress("download", all_done, in_all))

        return count


def _converting(on_progress: OnFetch | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(FetchProgress("convert", done, total))


def _check_hparams(size: str, directory: Path) -> None:
    path = directory / "hparams.json"
    if read_hparams(path) != CONFIGS[size]:
        values = read_json(path, limit=2**16)
        path.unlink()
        raise ModelError(
            f"hparams.json of {size}: expected {CONFIGS[size].as_dict()}, found {values}; another --mirror"
        )


def _check_disk(size: str, raw: Path) -> None:
    """See, before anything is downloaded, that the files and the shards both fit."""
    data = known_file(size, DATA)[0] or 0
    config = CONFIGS[size]
    shards = data + 4 * config.n_vocab * config.n_embd  # wte is there twice
    here = sum(path.stat().st_size for path in raw.iterdir() if path.is_file())
    needed, free = max(0, data - here) + shards + _SPARE, shutil.disk_usage(raw).free
    if free < needed:
        raise ModelError(
            f"{raw.parents[1]}: {size} needs {needed / 1e9:.1f} GB ({data / 1e9:.1f} to download, {shards / 1e9:.1f} "
            f"of shards), and {free / 1e9:.1f} GB are free; make room, or set BATCHGEN_MODELS to a folder elsewhere"
        )


def _own_folder(path: Path) -> Path:
    """Make a folder that only this user may write to: files in it have names that can be foretold."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be made ({error.strerror or error}); set BATCHGEN_MODELS elsewhere"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ModelError(f"{path}: is a link, another user's, or others may write to it; remove it")
    return path


@contextmanager
def _locked(path: Path, size: str) -> Iterator[None]:
    """Hold a lock; where another process does, wait for it: what it fetches is then there for this one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is fetching %s; waiting for it", size)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
