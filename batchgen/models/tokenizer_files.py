"""The tokenizer of a Hugging Face GPT-2 directory: read from its files, computed exactly or refused by name.

tokenizer.json is the tokenizer if it is there; otherwise vocab.json and merges.txt are, with GPT2Tokenizer's defaults.
tokenizer_config.json, special_tokens_map.json and added_tokens.json add tokens to either.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeAlias

from batchgen.errors import ModelError
from batchgen.models.shards import TOKENIZER_FILES, listed, open_file, read_json, show
from batchgen.text.special_tokens import SPECIAL_TOKENS, AddedToken, SpecialTokens
from batchgen.text.tokenizer import CHARACTER_TO_BYTE, END_OF_TEXT, VOCABULARY_FILES, Tokenizer

logger = logging.getLogger(__name__)

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_CONFIGS = (_GENERATION, _CONFIG)  # the first that names a token counts
_NO_SETTINGS = ("_from_model_config", "transformers_version", "use_cache")  # of generation_config.json
_MAX_JSON = 64 * 2**20
_REMEDY = "download the model again, or check which model this is"
_ONLY = "batchgen has only GPT-2's byte-level BPE"
_ONE_ANSWER = f"make {TOKENIZER} and {TOKENIZER_CONFIG} agree"
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")
_FLAGS = tuple(one.name for one in fields(AddedToken)[2:])
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NAMED_LISTS = ("additional_special_tokens", "extra_special_tokens")
_OTHER_KINDS = {"vocab.txt": "WordPiece", "tokenizer.model": "SentencePiece", "spiece.model": "SentencePiece"}

Values: TypeAlias = Mapping[str, object]


@dataclass(slots=True)
class _Files:
    """What the files say, while it is put together."""

    src: Path
    vocabulary: dict[str, object]
    merges: bytes
    added: dict[str, AddedToken] = field(default_factory=dict)  # by content
    begin: tuple[int, ...] = ()
    prefix_space: bool = False
    unknown: str | None = None

    def id_of(self, content: str) -> int | None:
        """The id of a token; one that is in the vocabulary keeps its id there."""
        found = self.vocabulary.get(content, self.added[content].id if content in self.added else None)
        return found if type(found) is int else None

    def next_id(self) -> int:
        """The id that `tokenizers` gives to a token without one."""
        highest = max((token.id for token in self.added.values()), default=-1)
        return highest + 1 if highest >= len(self.vocabulary) else len(self.vocabulary)


# ---- values


def _refuse(path: Path, name: str, found: object, remedy: str = _ONLY) -> None:
    raise ModelError(f"{path}: {name} is {show(found)}; {remedy}")


def _expect(path: Path, name: str, found: object, expected: object) -> None:
    if found != expected or type(found) is not type(expected):
        _refuse(path, name, found, f"{_ONLY} ({json.dumps(expected)})")


def _read(path: Path) -> dict[str, object]:
    return read_json(path, _MAX_JSON) if os.path.lexists(path) else {}


def _as_object(path: Path, name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ModelError(f"{path}: {name} is {show(value)}, not an object; {_REMEDY}")
    return value


def _added_token(path: Path, entry: Values, token_id: object) -> AddedToken:
    """A token from {"content": ..., "lstrip": ...}; flags that are not there are false."""
    content, special = entry.get("content"), entry.get("special", False)
    if not isinstance(content, str) or not content:
        raise ModelError(f"{path}: an added token has no content; {_REMEDY}")
    if type(token_id) is not int or token_id < 0:
        raise ModelError(f"{path}: the id of the added token {show(content)} is {show(token_id)}; {_REMEDY}")
    flags = {"special": special, "normalized": not special} | {name: entry[name] for name in _FLAGS if name in entry}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ModelError(f"{path}: {flag} of the added token {show(content)} is {show(value)}; {_REMEDY}")
    return AddedToken(token_id, content, **flags)  # type: ignore[arg-type]  # they are booleans


# ---- tokenizer.json


def _merge_line(path: Path, merge: object) -> str:
    """A merge as a line of merges.txt: "t h" or ["t", "h"] -> "t h"."""
    if isinstance(merge, str):
        return merge
    if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
        raise ModelError(f"{path}: {show(merge)} in merges is not a pair of strings; {_REMEDY}")
    return " ".join(merge)


def _read_tokenizer(path: Path) -> _Files:
    """tokenizer.json; ModelError names the first part that is not GPT-2's byte-level BPE."""
    values = read_json(path, _MAX_JSON)
    model = _as_object(path, "model", values.get("model"))
    _expect(path, "model.type", model.get("type"), "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            _expect(path, f"model.{name}", model[name], None)
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise ModelError(f"{path}: model has no vocab and merges; {_REMEDY}")
    lines = "".join(f"{line}\n" for line in ["#version: 0.2", *(_merge_line(path, merge) for merge in merges)])
    files = _Files(path.parent, vocabulary, lines.encode(errors="replace"))  # a lone surrogate then matches no token
    _expect(path, "normalizer", _only(values.get("normalizer"), "normalizers"), None)
    files.prefix_space = _read_splitter(path, _only(values.get("pre_tokenizer"), "pretokenizers"))
    decoder = _only(values.get("decoder"), "decoders")
    if decoder is not None:
        _expect(path, "decoder.type", _as_object(path, "decoder", decoder).get("type"), "ByteLevel")
    files.unknown = _read_unknown(path, model)
    for entry in _as_list(path, "added_tokens", values.get("added_tokens") or []):
        _add_as_tokenizers(path, files, _as_object(path, "an entry of added_tokens", entry))
    files.begin = _read_begin(path, values.get("post_processor"))
    return files


def _as_list(path: Path, name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise ModelError(f"{path}: {name} is {show(value)}, not a list; {_REMEDY}")
    return value


def _only(value: object, name: str) -> object:
    """The part of a sequence of one; None of an empty one."""
    if not isinstance(value, dict) or value.get("type") != "Sequence" or not isinstance(value.get(name), list):
        return value
    parts: list[object] = value[name]
    return parts[0] if len(parts) == 1 else value if parts else None


def _read_splitter(path: Path, value: object) -> bool:
    """Whether a text that does not begin with a space gets one; ModelError for another pre_tokenizer than GPT-2's."""
    if value is None:
        _refuse(path, "pre_tokenizer", None)
    splitter = _as_object(path, "pre_tokenizer", value)
    if splitter.get("type") == "Sequence":
        parts = [part.get("type") for part in _as_list(path, "pre_tokenizer", splitter.get("pretokenizers"))]  # type: ignore[attr-defined]
        _refuse(path, "pre_tokenizer", " + ".join(map(str, parts)))
    _expect(path, "pre_tokenizer.type", splitter.get("type"), "ByteLevel")
    _expect(path, "pre_tokenizer.use_regex", splitter.get("use_regex", True), True)
    prefix_space = splitter.get("add_prefix_space", True)
    if not isinstance(prefix_space, bool):
        _refuse(path, "pre_tokenizer.add_prefix_space", prefix_space, _REMEDY)
    return prefix_space is True


def _read_unknown(path: Path, model: Values) -> str | None:
    """The token for bytes that the vocabulary lacks; None if it lacks none."""
    unknown, vocabulary = model.get("unk_token"), _as_object(path, "model.vocab", model["vocab"])
    if unknown is None or CHARACTER_TO_BYTE.keys() <= vocabulary.keys():
        return None
    if model.get("fuse_unk") or unknown not in vocabulary:
        _refuse(path, "model.unk_token", unknown, "it is used (the vocabulary lacks bytes), and must be a single token")
    return str(unknown)


def _add_as_tokenizers(path: Path, files: _Files, entry: Values) -> None:
    """Add a token of tokenizer.json, which `tokenizers` numbers anew whatever id is written there."""
    token = _added_token(path, entry, entry.get("id"))
    found = files.id_of(token.content)
    number = files.next_id() if found is None else found
    if number != token.id:
        text = f"the added token {show(token.content)} has id {token.id}, and tokenizers reads it as {number}"
        raise ModelError(f"{path}: {text}; number added tokens from {len(files.vocabulary)} on, without gaps")
    files.added[token.content] = token


def _read_begin(path: Path, value: object) -> tuple[int, ...]:
    """The tokens that a post-processor puts before a text; ModelError if it puts some after it."""
    if value is None:
        return ()
    processor = _as_object(path, "post_processor", value)
    kind = processor.get("type")
    if kind == "Sequence":
        parts = _as_list(path, "post_processor", processor.get("processors"))
        return tuple(token for part in reversed(parts) for token in _read_begin(path, part))  # the last is outermost
    if kind == "ByteLevel":  # it changes only offsets
        return ()
    if kind != "TemplateProcessing":
        _refuse(path, "post_processor.type", kind, "batchgen computes only ByteLevel and TemplateProcessing")
    steps = [_as_object(path, "post_processor", step) for step in _as_list(path, "single", processor.get("single"))]
    names = [next(iter(step), None) for step in steps]
    if names.count("Sequence") != 1 or names[-1] != "Sequence" or set(names) > {"Sequence", "SpecialToken"}:
        _refuse(path, "post_processor.single", names, "batchgen computes only tokens before the text, none after it")
    known, ids = _as_object(path, "post_processor.special_tokens", processor.get("special_tokens")), list[object]()
    for step in steps[:-1]:
        token = _as_object(path, "SpecialToken", step["SpecialToken"]).get("id")
        entry = _as_object(path, f"post_processor: {show(token)}", known.get(str(token)))
        ids += _as_list(path, "ids", entry.get("ids"))
    return tuple(_check_id(path, "post_processor", token) for token in ids)


def _check_id(path: Path, name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise ModelError(f"{path}: {name} is {show(value)}, not a token id; {_REMEDY}")
    return value


# ---- the files beside it


def _find_pair(src: Path) -> tuple[Path, Path] | None:
    pairs = [(src / vocabulary, src / merges) for vocabulary, merges in reversed(VOCABULARY_FILES)]
    return next((pair for pair in pairs if all(map(os.path.lexists, pair))), None)


def _read_pair(src: Path, config: Values) -> _Files:
    """vocab.json and merges.txt, read as GPT2Tokenizer does."""
    pair = _find_pair(src)
    if pair is None:
        for name, other in _OTHER_KINDS.items():
            if os.path.lexists(src / name):
                raise ModelError(f"{src / name}: is a {other} vocabulary; {_ONLY}")
        raise ModelError(f"{src}: has neither vocab.json and merges.txt nor {TOKENIZER}; put the vocabulary there")
    for path, values in ((src / TOKENIZER_CONFIG, config), (src / _CONFIG, _read(src / _CONFIG))):
        if (kind := values.get("tokenizer_class")) is not None:  # the first that names one counts
            if kind not in _CLASSES:
                _refuse(path, "tokenizer_class", kind, f"{_ONLY} ({_CLASSES[0]}), or needs {TOKENIZER}")
            break
    with open_file(pair[1]) as file:
        return _Files(src, read_json(pair[0], _MAX_JSON), file.read(_MAX_JSON))


def _named_tokens(path: Path, values: Values) -> Iterator[Values]:
    """The special tokens that are named: {"bos_token": "<s>", ...} -> {"content": "<s>"}, ..."""
    for name in (*_NAMED, *_NAMED_LISTS):
        value = values.get(name)
        if isinstance(value, dict) and name in _NAMED_LISTS:
            value = [*value.values()]
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str):
                yield {"content": entry}
            elif entry is not None:
                yield _as_object(path, name, entry)


def _name_of(values: Values, name: str) -> str | None:
    value = values.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _add_from_config(files: _Files, config: Values) -> None:
    """The tokens of tokenizer_config.json and added_tokens.json; ModelError if two files differ about one."""
    path = files.src / TOKENIZER_CONFIG
    entries = _as_object(path, "added_tokens_decoder", config.get("added_tokens_decoder") or {})
    listed = [_added_token(path, _as_object(path, name, entry), _number(name)) for name, entry in entries.items()]
    for token in listed:
        mine = files.added.get(token.content)
        found = files.id_of(token.content)
        if (mine is not None and mine != token) or found not in (None, token.id):
            what = mine or f"id {found}"
            raise ModelError(f"{path}: {token} is {what} in {TOKENIZER} or the vocabulary; make the files agree")
        files.added[token.content] = token
    old = files.src / _ADDED
    for content, token_id in _read(old).items():
        if files.id_of(content) is None:
            files.added[content] = _added_token(old, {"content": content}, token_id)


def _number(text: str) -> object:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text


def _add_named(files: _Files, config: Values) -> None:
    """Special tokens named in the configuration are special, and those without an id get the next one."""
    path = files.src / TOKENIZER_CONFIG
    for entry in _named_tokens(path, config):
        found = files.id_of(str(entry.get("content")))
        token = _added_token(path, {**entry, "special": True}, files.next_id() if found is None else found)
        mine = files.added.get(token.content)
        files.added[token.content] = token if mine is None else replace(mine, special=True)


def _check_config(files: _Files, config: Values, has_tokenizer: bool) -> None:
    """Apply the options of tokenizer_config.json that change ids, or refuse the model."""
    path = files.src / TOKENIZER_CONFIG
    for name in ("auto_map", "do_lower_case", "add_eos_token"):
        if config.get(name):
            _refuse(path, name, config[name])
    for name in ("add_prefix_space", "add_bos_token", "split_special_tokens"):
        if not isinstance(config.get(name, False), bool):
            _refuse(path, name, config[name], "it must be true or false")
    of_class = False if config.get("tokenizer_class") in _CLASSES else None  # whatever tokenizer.json says
    prefix_space, begins = config.get("add_prefix_space", of_class), config.get("add_bos_token")
    if not has_tokenizer:
        files.prefix_space = prefix_space is True
        bos = files.id_of(_name_of(config, "bos_token") or "")
        if begins and bos is None:
            _refuse(path, "add_bos_token", begins, "no bos_token is in the vocabulary")
        files.begin = (bos,) if begins and bos is not None else ()
    elif prefix_space not in (None, files.prefix_space):
        _refuse(path, "add_prefix_space", prefix_space, f"{TOKENIZER} says {files.prefix_space}; {_ONE_ANSWER}")
    elif begins not in (None, bool(files.begin)):
        what = "puts tokens before a text" if files.begin else "puts no token before a text"
        _refuse(path, "add_bos_token", begins, f"the post_processor of {TOKENIZER} {what}; {_ONE_ANSWER}")


# ---- where completions start and end


def _read_ids(src: Path, name: str) -> tuple[Path, list[int]] | None:
    """The file that says name (eos_token_id), and the ids: a number or a list."""
    for path in (src / file for file in _CONFIGS):
        value = _read(path).get(name)
        if value is not None:
            return path, [_check_id(path, name, token) for token in (value if isinstance(value, list) else [value])]
    return None


def _find_ends(files: _Files, config: Values, known: set[int]) -> tuple[int, ...]:
    """The tokens that end a completion: the configuration's, and the tokenizer's eos_token."""
    path, ids = _read_ids(files.src, "eos_token_id") or (files.src, [])
    for token in ids:
        if token not in known:
            logger.warning("%s: eos_token_id %d is no token of the vocabulary; it is left out", path, token)
    name = _name_of(config, "eos_token") or END_OF_TEXT
    named, usual = files.id_of(name), files.id_of(END_OF_TEXT)
    if named is not None and named not in known:
        logger.warning("%s: eos_token %s is token %d, which has no weights in the model", files.src, show(name), named)
    ends = [token for token in (*ids, named) if token in known] or [token for token in (usual,) if token in known]
    return tuple(dict.fromkeys(token for token in ends if token is not None))


def _find_start(files: _Files, config: Values, known: set[int]) -> int | None:
    """The token from which a completion without a prompt starts."""
    _, ids = _read_ids(files.src, "bos_token_id") or (files.src, [])
    named = (files.id_of(_name_of(config, "bos_token") or END_OF_TEXT), files.id_of(END_OF_TEXT))
    return next((token for token in (*ids, *named) if token in known), None)


def log_settings(src: Path) -> None:
    """Say which settings of generation_config.json a job does not have unless it is given them."""
    names = [name for name, value in _read(src / _GENERATION).items() if value not in (None, False, [])]
    asked = [name for name in names if not name.endswith("_token_id") and name not in _NO_SETTINGS]
    asked += [name for name in names if name.startswith("forced_")]
    if asked:
        logger.warning("%s: not taken: %s; give a job parameters for them", src / _GENERATION, listed(asked))


# ---- the whole


def write_vocabulary(src: Path, private: Path, n_vocab: int) -> Tokenizer:
    """Write encoder.json, vocab.bpe and special_tokens.json of a Hugging Face directory into private, and load them."""
    config = _read(src / _SPECIAL_MAP) | _read(src / TOKENIZER_CONFIG)
    has_tokenizer = os.path.lexists(src / TOKENIZER)
    files = _read_tokenizer(src / TOKENIZER) if has_tokenizer else _read_pair(src, config)
    if not has_tokenizer and END_OF_TEXT in files.vocabulary:  # GPT2Tokenizer's defaults
        config = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT} | config
    _add_from_config(files, config)
    _add_named(files, config)
    _check_config(files, config, has_tokenizer)
    _check_added(files)
    new = [token for token in files.added.values() if token.content not in files.vocabulary]
    vocabulary = files.vocabulary | {token.content: token.id for token in new if token.id < n_vocab}
    known = {token for token in vocabulary.values() if type(token) is int}
    special = SpecialTokens(
        added=tuple(files.added.values()),
        begin=files.begin,
        end=_find_ends(files, config, known),
        start=_find_start(files, config, known),
        unknown=None if files.unknown is None else files.id_of(files.unknown),
        prefix_space=files.prefix_space,
        parse=not config.get("split_special_tokens", False),
    )
    vocabulary_name, merges_name = TOKENIZER_FILES.values()  # an error quotes these names
    (private / vocabulary_name).write_text(json.dumps(vocabulary))
    (private / merges_name).write_bytes(files.merges)
    (private / SPECIAL_TOKENS).write_text(special.to_json())
    return load_vocabulary(private, n_vocab, src)


def _check_added(files: _Files) -> None:
    """ModelError for an added token that is a letter of the byte alphabet and no byte of this vocabulary."""
    for content in files.added.keys() - files.vocabulary.keys():
        if content in CHARACTER_TO_BYTE:
            what = f"the added token {show(content)} is also the letter of byte 0x{CHARACTER_TO_BYTE[content]:02X}"
            raise ModelError(f"{files.src}: {what} in GPT-2's alphabet, which the vocabulary lacks; add that byte")


def load_vocabulary(directory: Path, n_vocab: int, src: Path) -> Tokenizer:
    """Load the vocabulary in a directory, which was made of src; ModelError if it is damaged or another model's."""
    try:
        tokenizer = Tokenizer.load(directory)
    except ModelError as error:
        if directory == src:
            raise
        reason = str(error).replace(f"{directory}{os.sep}", "")  # without the names of temporary files
        raise ModelError(f"{src}: the vocabulary made from it is not GPT-2's: {reason}") from error
    check_ids(tokenizer, n_vocab, src)
    return tokenizer


def check_ids(tokenizer: Tokenizer, n_vocab: int, place: Path) -> None:
    """ModelError unless every id that the tokenizer may give is a token's, and a row of the model's wte."""
    if tokenizer.n_vocab > n_vocab:
        last = tokenizer.n_vocab - 1
        raise ModelError(f"{place}: the vocabulary has ids up to {last}, the model {n_vocab} rows of wte; {_REMEDY}")
    special = tokenizer.special
    for token in (*special.begin, *special.end, special.start, special.unknown):
        if token is not None and not tokenizer.has_id(token):
            what = "begins prompts, ends completions, or stands for unknown bytes"
            raise ModelError(f"{place}: token id {token} {what}, and is not in the vocabulary; {_REMEDY}")
