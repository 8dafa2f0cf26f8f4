"""models/tokenizer_files.py against the package tokenizers: the same ids, or refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from typer.testing import CliRunner

from batchgen.errors import InputError, ModelError, UsageError
from batchgen.generator import Generator
from batchgen.job import Job, Policy, WorkOptions
from batchgen.jobs.cli import app
from batchgen.jobs.report import summary_lines
from batchgen.models.convert import convert_checkpoint
from batchgen.models.model import Model
from batchgen.models.tokenizer_files import write_vocabulary
from batchgen.review.replay import replay
from batchgen.run import run_job
from batchgen.text.special_tokens import SPACES
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Request, SamplingParams
from tests.support.hf_checkpoint import write_hf_model
from tests.support.jobs import make_job
from tests.support.models import BYTES, write_byte_model

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
N_VOCAB = 400  # of the model

WORDS = ["the ", "theat", "  ", "\n", "<|end|>", "<|start|>", "<s>", "</s>", "über", "grüne Wiese", "Wiese", "x", " x"]
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])  # the two know Unicodes of different age
PIECES = st.one_of(st.sampled_from([*WORDS, "[PAD]", "the", "A", "é", "7 12"]), st.text(CHARACTERS, max_size=4))
TEXTS = st.lists(PIECES).map("".join)
EXAMPLES = [
    "",
    "the theatre",
    "<|start|>Once <|end|> \n x<|end|>",
    "aüber über, übers\tüber",
    " grüne Wiese  x",
    "     x \n\n x\n",
    "7 x 12",
]


def byte_bpe(without: str = "", **options: Any) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer with three merges."""
    letters = [letter for letter in ALPHABET if letter not in without]
    vocabulary = {token: i for i, token in enumerate([*letters, "th", "the", "Ġthe"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    if "unk_token" in options:
        vocabulary[options["unk_token"]] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def with_tokens(*tokens: AddedToken, special: tuple[str | AddedToken, ...] = ()) -> tokenizers.Tokenizer:
    made = byte_bpe()
    made.add_special_tokens(list(special))
    made.add_tokens(list(tokens))
    return made


def with_part(name: str, value: object, **options: Any) -> tokenizers.Tokenizer:
    made = with_tokens(special=("<s>", "</s>")) if not options else byte_bpe(**options)
    setattr(made, name, value)
    return made


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 259), ("</s>", 260)])


HONOURED: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "plain": byte_bpe,
    "special": lambda: with_tokens(special=("<|start|>", "<|end|>")),
    "words": lambda: with_tokens(AddedToken("über"), AddedToken("grüne Wiese"), AddedToken("Wiese"), AddedToken("x")),
    "spaces in tokens": lambda: with_tokens(AddedToken(" x"), AddedToken("  "), AddedToken("\n")),
    "overlapping": lambda: with_tokens(AddedToken("the th"), AddedToken("the"), AddedToken("eat"), AddedToken("theat")),
    "lstrip": lambda: with_tokens(AddedToken("<|end|>", lstrip=True, special=True), AddedToken("x", lstrip=True)),
    "rstrip": lambda: with_tokens(AddedToken("<|end|>", rstrip=True), AddedToken(" x"), AddedToken("\n", rstrip=True)),
    "both strips": lambda: with_tokens(AddedToken("<|end|>", lstrip=True, rstrip=True), AddedToken("  ")),
    "spaces that strip": lambda: with_tokens(
        AddedToken("  ", lstrip=True, rstrip=True), AddedToken("\n", lstrip=True, rstrip=True), AddedToken("x")
    ),
    "single_word": lambda: with_tokens(AddedToken("über", single_word=True), AddedToken("x", single_word=True)),
    "normalized": lambda: with_tokens(AddedToken("the x", normalized=True), AddedToken("x", normalized=False)),
    "prefix space": lambda: with_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "bos by template": lambda: with_part("post_processor", template("<s> $A")),
    "two tokens before": lambda: with_part("post_processor", template("<s> </s> $A")),
    "bos in a sequence": lambda: with_part(
        "post_processor", processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<s> $A")])
    ),
    "byte level processor": lambda: with_part("post_processor", processors.ByteLevel(trim_offsets=True)),
    "sequence of one": lambda: with_part(
        "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "no normalizers": lambda: with_part("normalizer", normalizers.Sequence([])),
    "unknown bytes": lambda: byte_bpe(without="é7Ŀ", unk_token="<unk>"),
    "missing bytes": lambda: byte_bpe(without="é7Ŀ"),
    "a token of the vocabulary": lambda: with_tokens(AddedToken("the"), AddedToken("A"), AddedToken("ü")),
    "empty prefixes": lambda: byte_bpe(continuing_subword_prefix="", end_of_word_suffix=""),
    "many": lambda: with_tokens(*(AddedToken(f"w{n}") for n in range(40)), special=("<|end|>", "[PAD]")),
}

REFUSED: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "lowercase": (lambda: with_part("normalizer", normalizers.Lowercase()), "normalizer is"),
    "nfc": (lambda: with_part("normalizer", normalizers.NFC()), "normalizer is"),
    "no splitter": (lambda: with_part("pre_tokenizer", None), "pre_tokenizer is None"),
    "digits": (
        lambda: with_part(
            "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
        ),
        r"pre_tokenizer is 'Digits \+ ByteLevel'",
    ),
    "whitespace": (
        lambda: with_part("pre_tokenizer", pre_tokenizers.Whitespace()),
        "pre_tokenizer.type is 'Whitespace'",
    ),
    "no regex": (lambda: with_part("pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)), "use_regex is False"),
    "eos after": (lambda: with_part("post_processor", template("<s> $A </s>")), "post_processor.single is"),
    "bert": (lambda: with_part("post_processor", processors.BertProcessing(("</s>", 260), ("<s>", 259))), "post_proc"),
    "decoder": (lambda: with_part("decoder", decoders.WordPiece()), "decoder.type is 'WordPiece'"),
    "dropout": (lambda: byte_bpe(dropout=0.1), "model.dropout is 0.1"),
    "byte fallback": (lambda: byte_bpe(byte_fallback=True), "model.byte_fallback is True"),
    "ignore merges": (lambda: byte_bpe(ignore_merges=True), "model.ignore_merges is True"),
    "fused unknown": (lambda: byte_bpe(without="é", unk_token="<unk>", fuse_unk=True), "model.unk_token is '<unk>'"),
    "word piece": (
        lambda: tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a")),
        "model.type is 'WordPiece'",
    ),
    "unigram": (lambda: tokenizers.Tokenizer(models.Unigram([("a", 0.0)])), "model.type is 'Unigram'"),
    "word level": (
        lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        "model.type is 'WordLevel'",
    ),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tokenizers.Tokenizer, Tokenizer]]:
    """name: (theirs, ours), read from the same tokenizer.json."""
    pairs = {}
    for number, (name, make) in enumerate(HONOURED.items()):
        src, private = tmp_path_factory.mktemp(f"src{number}"), tmp_path_factory.mktemp(f"dst{number}")
        made = make()
        made.save(str(src / "tokenizer.json"))
        write_vocabulary(src, private, N_VOCAB)
        pairs[name] = tokenizers.Tokenizer.from_file(str(src / "tokenizer.json")), Tokenizer.load(private)
    return pairs


def assert_same_ids(theirs: tokenizers.Tokenizer, ours: Tokenizer, text: str) -> None:
    for reading in ("auto", "parse", "text"):
        theirs.encode_special_tokens = reading == "text"
        try:
            ids = ours.encode(text, reading)  # type: ignore[arg-type]  # one of the three
        except InputError as error:
            if "the vocabulary has no token for byte" not in str(error):  # `tokenizers` leaves it out in silence
                raise
            continue
        assert ids == theirs.encode(text).ids, (reading, text)


@pytest.mark.parametrize("name", HONOURED)
def test_every_honoured_tokenizer_gives_the_ids_of_tokenizers(name: str, converted: dict[str, Any]) -> None:
    for text in EXAMPLES:
        assert_same_ids(*converted[name], text)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([*HONOURED]), text=TEXTS)
def test_no_text_gives_other_ids_than_tokenizers(name: str, text: str, converted: dict[str, Any]) -> None:
    assert_same_ids(*converted[name], text)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("beside", [True, False])
def test_cases_tokenizer_not_gpt2s_is_refused_by_name_also_beside_vocab_json(
    name: str, beside: bool, tmp_path: Path
) -> None:
    make, message = REFUSED[name]
    write_hf_model(tmp_path / "src")
    if not beside:
        (tmp_path / "src/vocab.json").unlink()
    make().save(str(tmp_path / "src/tokenizer.json"))
    with pytest.raises(ModelError, match=rf"tokenizer\.json: .*{message}"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", name="dst")
    assert not (tmp_path / "dst").exists()


def test_spaces_are_those_of_tokenizers() -> None:
    made = with_tokens(AddedToken("<|end|>", lstrip=True))
    every = [chr(code) for code in range(0x3100) if chr(code) != "<"]
    assert [c for c in every if len(made.encode(f"{c}<|end|>").ids) == 1] == sorted(SPACES)


# ---- the files beside tokenizer.json


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A Hugging Face model of 257 tokens and three rows more."""
    return write_hf_model(tmp_path / "src", replace(BYTES, n_vocab=260))


def put(src: Path, name: str, values: Any) -> None:
    path = src / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def load(src: Path) -> Tokenizer:
    convert_checkpoint(src, src.parent / "dst", name="dst", replace=True)
    return Model.open(str(src.parent / "dst")).load_tokenizer()


def test_cases_special_tokens_in_prompts_are_one_id(src: Path) -> None:
    put(src, "added_tokens.json", {"<|startoftext|>": 257})
    put(src, "special_tokens_map.json", {"bos_token": "<|startoftext|>"})
    tokenizer = load(src)
    assert tokenizer.encode("<|startoftext|>Once") == [257, *b"Once"]
    assert tokenizer.encode("<|startoftext|>", "text") == [*b"<|startoftext|>"]
    assert tokenizer.encode("a<|endoftext|>") == [*b"a", 256]  # as GPT2Tokenizer does
    assert tokenizer.special.start == 257


def test_an_umlaut_token_decodes_to_itself(src: Path) -> None:
    put(src, "added_tokens.json", {"grüne Wiese": 257, "über": 258})
    tokenizer = load(src)
    assert tokenizer.encode("über grüne Wiese") == [258, *b" ", 257]
    assert tokenizer.decode([258, 32, 257]) == "über grüne Wiese"
    assert tokenizer.encode("über", "text") == [258]  # a word, and no mark


def test_flags_of_tokenizer_config_are_heeded(src: Path) -> None:
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    put(src, "tokenizer_config.json", {"added_tokens_decoder": {"257": mask | {"special": True}}})
    assert load(src).encode("a  <mask> b") == [*b"a", 257, *b" b"]


@pytest.mark.parametrize("value", [True, False])
def test_add_bos_token_puts_one_before_every_prompt(value: bool, src: Path) -> None:
    put(src, "tokenizer_config.json", {"add_bos_token": value})
    assert load(src).encode("ab") == [256, *b"ab"] if value else [*b"ab"]


def test_add_prefix_space_is_heeded(src: Path) -> None:
    put(src, "tokenizer_config.json", {"add_prefix_space": True})
    tokenizer = load(src)
    assert (tokenizer.encode("ab"), tokenizer.encode(" ab")) == ([*b" ab"], [*b" ab"])


def test_split_special_tokens_makes_text_the_default(src: Path) -> None:
    put(src, "tokenizer_config.json", {"split_special_tokens": True})
    tokenizer = load(src)
    assert tokenizer.encode("<|endoftext|>") == [*b"<|endoftext|>"]
    assert tokenizer.encode("<|endoftext|>", "parse") == [256]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class is 'RobertaTokenizer'"),
        ({"do_lower_case": True}, "do_lower_case is True"),
        ({"add_eos_token": True}, "add_eos_token is True"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map is an object of 1"),
        ({"add_prefix_space": "yes"}, "add_prefix_space is 'yes'"),
        ({"add_bos_token": True, "bos_token": None}, "add_bos_token is True; no bos_token"),
        ({"added_tokens_decoder": {"257": {"content": "th", "lstrip": 1}}}, "lstrip of the added token 'th' is 1"),
        ({"added_tokens_decoder": {"257": {"content": "a"}}}, "make the files agree"),
        ({"added_tokens_decoder": {"x": {"content": "th"}}}, "the id of the added token 'th' is 'x'"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is a list of 1"),
        ({"bos_token": {"content": 3}}, "an added token has no content"),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused_by_name(values: Any, message: str, src: Path) -> None:
    put(src, "tokenizer_config.json", values)
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: .*{message}"):
        load(src)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"add_prefix_space": True}, "add_prefix_space is True"),
        ({"add_prefix_space": False}, "add_prefix_space is False"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "add_prefix_space is False"),  # transformers' class says so
        ({"add_bos_token": True}, "puts no token before a text"),
    ],
)
def test_two_files_that_disagree_are_refused(values: Any, message: str, src: Path) -> None:
    made = byte_bpe()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="is False" in message)
    made.save(str(src / "tokenizer.json"))
    put(src, "tokenizer_config.json", values)
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: .*{message}.*agree"):
        load(src)


def test_an_id_that_tokenizers_would_change_is_refused(src: Path) -> None:
    values = json.loads(byte_bpe().to_str())
    values["added_tokens"] = [{"id": 300, "content": "<|pad|>", "special": True}]
    (src / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"'<\|pad\|>' has id 300, and tokenizers reads it as 259"):
        load(src)


def test_a_token_that_the_weights_lack_rejects_only_prompts_that_hold_it(src: Path) -> None:
    put(src, "added_tokens.json", {"<|pad|>": 260})
    tokenizer = load(src)
    assert (tokenizer.n_vocab, tokenizer.encode("ab")) == (257, [*b"ab"])
    with pytest.raises(InputError, match=r"'<\|pad\|>' is token 260, which has no weights in the model"):
        tokenizer.encode("a<|pad|>")


@pytest.mark.parametrize(("name", "kind"), [("vocab.txt", "WordPiece"), ("tokenizer.model", "SentencePiece")])
def test_another_kind_of_vocabulary_is_named(name: str, kind: str, src: Path) -> None:
    (src / "vocab.json").rename(src / name)
    with pytest.raises(ModelError, match=f"{name}: is a {kind} vocabulary"):
        load(src)


def test_a_tokenizer_class_in_config_json_counts_if_tokenizer_config_names_none(src: Path) -> None:
    put(src, "config.json", {"tokenizer_class": "BertTokenizer"})  # as gpt2-chinese has it
    with pytest.raises(ModelError, match=r"/config\.json: tokenizer_class is 'BertTokenizer'"):
        load(src)
    put(src, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert load(src).encode("ab") == [*b"ab"]


@pytest.mark.parametrize("merges", ["a b\n", "a b c\n", "#version: 0.2\n\na b\n", "\xff"])
def test_a_vocabulary_that_cannot_be_loaded_is_never_converted(merges: str, src: Path) -> None:
    (src / "merges.txt").write_text(merges, encoding="latin-1")
    with pytest.raises(ModelError):
        load(src)
    assert not (src.parent / "dst").exists()


# ---- end tokens


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (256,)),
        ({"config.json": {"eos_token_id": 3}}, (3, 256)),
        ({"config.json": {"eos_token_id": [3, 256]}}, (3, 256)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [5, 7]}}, (5, 7, 256)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {}}, (3, 256)),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|im_end|>": 257}}, (257,)),
        ({"config.json": {"eos_token_id": 50256}}, (256,)),
        ({"tokenizer_config.json": {"eos_token": "<|end|>"}, "added_tokens.json": {"<|end|>": 260}}, (256,)),
    ],
)
def test_cases_end_tokens_are_those_that_the_files_name(files: Any, ends: tuple[int, ...], src: Path) -> None:
    for name, values in files.items():
        put(src, name, values)
    assert load(src).special.end == ends


@pytest.mark.parametrize("value", ["</s>", -1, [3, "a"], True, 2.0])
def test_an_end_token_that_is_no_id_is_refused(value: Any, src: Path) -> None:
    put(src, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id is .*, not a token id"):
        load(src)


def test_an_end_token_without_a_row_is_logged(src: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(src, "config.json", {"eos_token_id": [3, 50256]})
    load(src)
    assert "eos_token_id 50256 is no token of the vocabulary; it is left out" in caplog.text


def test_an_eos_token_without_a_row_is_logged(src: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(src, "tokenizer_config.json", {"eos_token": "<|end|>"})
    put(src, "added_tokens.json", {"<|end|>": 260})
    load(src)
    assert "eos_token '<|end|>' is token 260, which has no weights in the model" in caplog.text


def test_settings_of_generation_config_are_named_and_not_taken(src: Path, caplog: pytest.LogCaptureFixture) -> None:
    usual = {"_from_model_config": True, "bos_token_id": 256, "pad_token_id": 0, "transformers_version": "4.40.0"}
    put(src, "generation_config.json", usual | {"do_sample": False, "suppress_tokens": None, "use_cache": True})
    load(src)
    assert not caplog.text
    put(src, "generation_config.json", {"bad_words_ids": [[3]], "forced_eos_token_id": 256, "temperature": 0.7})
    load(src)
    assert "not taken: 'bad_words_ids', 'forced_eos_token_id', 'temperature'; give a job" in caplog.text


def test_an_end_token_ends_a_completion_with_stop_unless_it_is_ignored(src: Path) -> None:
    put(src, "generation_config.json", {"eos_token_id": [3, 7]})
    load(src)
    generator = Generator(src.parent / "dst")
    for token in (3, 7, 256):
        biased = SamplingParams(max_tokens=5, logit_bias=((token, 100.0),))
        [row] = generator.generate(["ab"], biased)
        assert (row.finish_reason, row.completion_tokens) == ("stop", 0)
        [row] = generator.generate(["ab"], replace(biased, ignore_eos=True))
        assert (row.finish_reason, row.completion_token_ids) == ("length", (token,) * 5)
        [row] = generator.generate(["ab"], replace(biased, min_tokens=2))
        assert (row.finish_reason, row.completion_tokens) == ("stop", 2)


# ---- what comes out


def test_skipped_special_tokens_stay_in_the_ids(src: Path) -> None:
    put(src, "added_tokens.json", {"<|end|>": 257, "word": 258})
    put(src, "tokenizer_config.json", {"additional_special_tokens": ["<|end|>"]})
    load(src)
    generator = Generator(src.parent / "dst")
    for token, text, skipped in ((257, "<|end|><|end|>", ""), (258, "wordword", "wordword")):
        params = SamplingParams(max_tokens=2, logit_bias=((token, 100.0),))
        skipping = replace(params, skip_special_tokens=True)
        [kept], [row] = generator.generate(["ab"], params), generator.generate(["ab"], skipping)
        assert (kept.completion, row.completion) == (text, skipped)
        assert row.completion_token_ids == kept.completion_token_ids == (token, token)
        assert "".join(generator.stream("ab", skipping)) == skipped


def test_a_stop_string_in_a_skipped_token_does_not_stop(src: Path) -> None:
    load(src)
    generator = Generator(src.parent / "dst")
    params = SamplingParams(max_tokens=3, logit_bias=((256, 100.0),), ignore_eos=True, stop=("endof",))
    [kept], [row] = (generator.generate(["ab"], replace(params, skip_special_tokens=skip)) for skip in (False, True))
    assert (kept.completion, kept.stop_reason, kept.completion_tokens) == ("<|", "endof", 1)
    assert (row.completion, row.stop_reason, row.completion_tokens) == ("", None, 3)


def test_a_job_that_skips_special_tokens_changes_its_texts_alone(src: Path) -> None:
    """Of a run or of a row; the answers to OpenAI's requests have the same texts."""
    load(src)
    model, folder = str(src.parent / "dst"), src.parent
    rows = [{"prompt": "ab"}, {"prompt": "ab", "skip_special_tokens": False}, {"prompt": "<|endoftext|>", "echo": True}]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = SamplingParams(max_tokens=3, logit_bias=((256, 100.0),), ignore_eos=True, logprobs=1)
    found = []
    for name, skip in (("kept", False), ("skipped", True)):
        sampling, out = replace(params, skip_special_tokens=skip), folder / f"{name}.parquet"
        run_job(make_job(folder / "p.jsonl", out, model, sampling, token_ids=True, jobs=1))
        assert not replay(out, 3, model=model).differences
        found.append(pq.read_table(out).drop_columns(["completion", "parameters"]).to_pylist())
        texts = pq.read_table(out)["completion"].to_pylist()
        ends = "<|endoftext|>" * 3
        assert texts == (["", ends, "<|endoftext|>"] if skip else [ends, ends, f"<|endoftext|>{ends}"])
    assert found[0] == found[1]
    body = {"model": "m", "prompt": "ab", "logprobs": 1, "skip_special_tokens": True}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (folder / "batch.jsonl").write_text(json.dumps(line) + "\n")
    run_job(make_job(folder / "batch.jsonl", folder / "answers.jsonl", model, replace(params, logprobs=None), jobs=1))
    (choice,) = json.loads((folder / "answers.jsonl").read_text())["response"]["body"]["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("", ["<|endoftext|>"] * 3)
    assert choice["logprobs"]["text_offset"] == [0, 0, 0]


def test_a_bad_word_that_is_a_special_token_bans_its_id(src: Path) -> None:
    load(src)
    params = SamplingParams(max_tokens=1, logit_bias=((256, 100.0),), ignore_eos=True, bad_words=("<|endoftext|>",))
    [row] = Generator(src.parent / "dst").generate(["ab"], params)
    assert row.completion_token_ids != (256,)


# ---- a whole job


def test_openais_special_tokens_are_text_and_counted_unless_asked(tmp_path: Path) -> None:
    model = str(write_byte_model(tmp_path / "bytes"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a<|endoftext|>"}\n{"prompt": "b"}\n')
    tokens, counts = {}, {}
    for reading in ("auto", "text", "parse"):
        output = tmp_path / f"{reading}.parquet"
        policy = Policy(special_tokens=reading)  # type: ignore[arg-type]  # one of the three
        job = Job(tmp_path / "prompts.jsonl", output, model, SamplingParams(max_tokens=1), policy, WorkOptions(jobs=1))
        summary = run_job(job)
        counts[reading] = summary.special_texts
        tokens[reading] = pq.read_table(output)["prompt_tokens"].to_pylist()
        assert replay(output, 2, seed=0, model=model).differences == ()
        notes = [line for line in summary_lines(summary) if "--special-tokens parse" in line]
        assert len(notes) == summary.special_texts
    assert counts == {"auto": 1, "text": 0, "parse": 0}
    assert tokens == {"auto": [14, 1], "text": [14, 1], "parse": [2, 1]}


def test_the_conversion_says_where_completions_end_and_how_prompts_begin(src: Path) -> None:
    put(src, "generation_config.json", {"eos_token_id": [3]})
    put(src, "tokenizer_config.json", {"add_bos_token": True})
    result = CliRunner().invoke(app, ["convert", str(src), str(src.parent / "dst")])
    assert "completions end at \\x03 (id 3) or <|endoftext|> (id 256)\n" in result.stdout
    assert "every prompt begins with <|endoftext|> (id 256)\n" in result.stdout


def test_truncation_from_the_left_keeps_the_token_before_the_prompt(src: Path) -> None:
    put(src, "tokenizer_config.json", {"add_bos_token": True})
    load(src)
    generator = Generator(src.parent / "dst")
    request = Request(0, "p", None, "a" * 300, SamplingParams(max_tokens=8))
    item = generator._check(request, Policy(on_too_long="truncate-left"))
    assert item.prompt_token_ids == (256, *b"a" * (BYTES.n_ctx - 9))
    with pytest.raises(UsageError, match="the prompt is empty"):
        generator.generate([""])
    assert generator.generate([""], max_tokens=1, empty_prompt="unconditional")[0].prompt_tokens == 1
