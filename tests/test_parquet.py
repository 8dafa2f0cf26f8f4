"""parquet.py: every record is one row, for every type of its columns."""

import hashlib
import math
import uuid
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import parquet as parquet_format
from batchgen.input.kept import kept_columns
from batchgen.input.parameters import LOGPROBS
from batchgen.types import Rejected, Request, SamplingParams
from tests.support.inputs import CASES, PARAMS, chunks, facts, not_utf8, open_prompts, parquet, read, refusal, scan

# ---- rows


BIASES = pa.map_(pa.int32(), pa.decimal128(4, 1))  # as DuckDB writes map{5: -1.5}
TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.binary()),
]
UUID = "62b70add-29f5-42b2-b880-0b0d3b608b92"


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_arrow_text_type_is_a_prompt(tmp_path: Path, kind: pa.DataType) -> None:
    path = parquet(tmp_path, {"prompt": pa.array(["Once", None, "", "é\0"]).cast(kind), "other": [1, 2, 3, 4]})
    open_prompts(path)
    rows = read(path)
    assert [row.prompt for row in rows] == ["Once", None, "", "é\0"]
    assert rows[0] == Request(0, "p.parquet:row 0", None, "Once", PARAMS)
    assert rows[1] == Rejected(
        1, "p.parquet:row 1", None, None, "p.parquet:row 1: the prompt is null; make it a string"
    )


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (pa.array([1, None], pa.uint64()), ["1", None]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([7, 7]).dictionary_encode(), ["7", "7"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.nulls(2), [None, None]),
        (pa.array([0, 1], pa.date32()), ["1970-01-01", "1970-01-02"]),
        (pa.array([7.0, 2.0**53]), ["7", "9007199254740992"]),
        (pa.array([7.5, None], pa.float32()), ["7.5", None]),
        (pa.array([7.0, 1e300], pa.float32()).cast(pa.float16(), safe=False)[:1].take([0, 0]), ["7", "7"]),
        (pa.array([Decimal("4"), None], pa.decimal128(10, 0)), ["4", None]),
        (pa.array([b"a", None], pa.large_binary()), ["a", None]),
        (pa.array([b"ab", b"\xc3\xbc"], pa.binary(2)), ["ab", "ü"]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.array([uuid.UUID(UUID).bytes, None], pa.binary(16)).cast(pa.uuid()), [UUID, None]),
    ],
)
def test_ids_become_strings(tmp_path: Path, ids: pa.Array, texts: list[str | None]) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b"], "id": ids})
    open_prompts(path)
    assert [row.id for row in read(path)] == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_text_that_is_not_utf8_is_rejected_by_row(tmp_path: Path, kind: pa.DataType) -> None:
    rows = read(parquet(tmp_path, {"prompt": not_utf8(kind), "id": not_utf8(kind).take(pa.array([3, 0, 1, 1]))}))
    assert [(type(row), row.id, row.prompt) for row in rows] == [
        (Request, "b", "a"),
        (Rejected, "a", None),
        (Rejected, None, None),
        (Rejected, None, "b"),
    ]
    assert [row.error.split(": ")[1].split(";")[0] for row in rows if isinstance(row, Rejected)] == [
        "the prompt is not UTF-8",
        "the prompt is null",
        "the id is not UTF-8",
    ]


def test_a_uuid_id_is_its_text() -> None:
    open_prompts(CASES / "uuid_id.parquet")
    assert [row.id for row in read(CASES / "uuid_id.parquet")] == [UUID, "c2acfc77-7102-48b2-a2c1-1262f3016888"]


def test_numeric_types_are_parameters() -> None:
    for row in read(CASES / "decimal_parameters.parquet"):
        assert isinstance(row, Request)
        assert (row.params.temperature, row.params.max_tokens) == (0.8, 4)
        assert type(row.params.max_tokens) is int


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_tokens": pa.array([4.0, None])}, {"max_tokens": 4}),
        ({"seed": pa.array([4, None], pa.uint8())}, {"seed": 4}),
        ({"stop": pa.array([b"x", None])}, {"stop": ("x",)}),
        ({"stop": pa.array([[b"x"], None], pa.large_list(pa.binary_view()))}, {"stop": ("x",)}),
        ({"stop": pa.array(["x", None]).dictionary_encode()}, {"stop": ("x",)}),
        ({"temperature": pa.array([0.5, None], pa.float32()).cast(pa.float16())}, {"temperature": 0.5}),
        ({"temperature": pa.nulls(2)}, {}),
        (
            {"params": pa.array([{"temperature": Decimal("0.5"), "seed": Decimal(4)}, None])},
            {"temperature": 0.5, "seed": 4},
        ),
        ({"logit_bias": pa.array([[(5, Decimal("-1.5"))], None], BIASES)}, {"logit_bias": ((5, -1.5),)}),
        ({"seed": pa.array([1, None], pa.timestamp("ns"))}, None),
        ({"seed": pa.array([2**62, None], pa.timestamp("us"))}, None),
        ({"seed": pa.array([{"a": 1}, None])}, None),
        ({"stop": pa.array([b"\xff", None])}, None),
    ],
)
def test_a_parameter_of_any_type_is_read_or_rejects_its_row(
    tmp_path: Path, values: dict[str, pa.Array], expected: dict[str, object] | None
) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b"], **values})
    open_prompts(path)
    first, second = read(path)
    assert isinstance(second, Request)
    if expected is None:
        assert isinstance(first, Rejected)
        assert next(iter(values)) in first.error
    else:
        assert isinstance(first, Request)
        assert first.params == replace(PARAMS, **expected)  # type: ignore[arg-type]


def test_shards_that_are_empty_or_all_null_stop_nothing(tmp_path: Path) -> None:
    shards = [
        {"prompt": pa.array([], pa.float64()), "id": pa.array([], pa.list_(pa.int8()))},
        {"other": pa.array([], pa.int8())},
        {"prompt": pa.nulls(1), "id": pa.nulls(1), "seed": pa.nulls(1)},
        {"prompt": ["a"], "id": ["x"], "seed": [1]},
        {"prompt": pa.array(["b"], pa.large_string()), "id": [7.0]},
    ]
    for number, columns in enumerate(shards):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    open_prompts(tmp_path)
    assert scan(tmp_path).rows == 3
    assert [(row.row, row.id, row.prompt) for row in read(tmp_path)] == [(0, None, None), (1, "x", "a"), (2, "7", "b")]


def test_a_path_leads_into_structs_and_a_flat_column_wins(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"a": [{"b": {"c": "x"}, "id": 1}, {"b": None, "id": None}, None]})
    open_prompts(path, "a.b.c", "a.id")
    assert [(row.id, row.prompt) for row in read(path, prompt_column="a.b.c", id_column="a.id")] == [
        ("1", "x"),
        (None, None),
        (None, None),
    ]
    assert "no column 'a.b.d'" in refusal(path, "a.b.d")
    path = parquet(tmp_path, {"a": [{"b": "nested", "c.d": "deep"}], "a.b": ["flat"]})
    open_prompts(path, "a.b")
    assert [row.prompt for row in read(path, prompt_column="a.b")] == ["flat"]
    assert [row.prompt for row in read(path, prompt_column="a.c.d")] == ["deep"]


def test_rows_keep_their_numbers_over_batches_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_format, "BATCH_ROWS", 7)
    path = parquet(tmp_path, {"prompt": [str(row) for row in range(100)]}, row_group_size=30)
    assert [(row.row, row.place, row.prompt) for row in read(path)] == [
        (row, f"p.parquet:row {row}", str(row)) for row in range(100)
    ]


def test_a_batch_is_bounded_by_the_text_of_its_rows_not_by_what_the_file_has_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_format, "BATCH_BYTES", 100_000)
    path = parquet(tmp_path, {"prompt": ["word " * 1_000] * 1_000, "stop": [["s" * 900]] * 1_000})
    assert path.stat().st_size < 10_000
    prompts = open_prompts(path)
    batches = list(prompts._read(PARAMS, pa.schema([])))
    assert sum(len(batch.items) for batch in batches) == 1_000
    assert max(sum(batch.sizes) for batch in batches) <= 100_000


WORDS = ["x" * (row % 7) if row % 5 else None for row in range(40)]
LISTS = [None if word is None else [word, "yy"] for word in WORDS]
MAPS = [None if word is None else [("a", word)] for word in WORDS]
STRUCTS = [None if word is None else {"a": word, "b": [word]} for word in WORDS]


@pytest.mark.parametrize(
    ("array", "total"),
    [
        *[(pa.array(WORDS).cast(kind), 414) for kind in TEXT_TYPES],
        (pa.ExtensionArray.from_storage(pa.json_(), pa.array(WORDS)), 414),
        (pa.array(LISTS), 40 * 8 + 94 + 32 * (8 + 8 + 2)),
        (pa.array(LISTS, pa.list_view(pa.string_view())), 40 * 8 + 94 + 32 * (8 + 8 + 2)),
        (pa.array(MAPS, pa.map_(pa.string(), pa.string())), 40 * 8 + 94 + 32 * (8 + 8 + 8 + 1)),
        (pa.array(STRUCTS), 40 * 8 * 3 + 2 * 94 + 32 * 8),
        (pa.array(range(40)), 320),
        (pa.nulls(40), 320),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_the_bytes_of_a_value_do_not_depend_on_the_batch(array: pa.Array, total: int) -> None:
    whole = parquet_format.count_bytes(array)
    pieces = [parquet_format.count_bytes(array.slice(*piece)).tolist() for piece in ((0, 7), (7, 1), (8, 30), (38, 2))]
    assert sum(pieces, []) == whole.tolist()
    assert whole.sum() == total


def test_one_column_can_be_prompt_and_id(tmp_path: Path) -> None:
    (row,) = read(parquet(tmp_path, {"text": ["a"]}), prompt_column="text", id_column="text")
    assert (row.id, row.prompt) == ("a", "a")


def test_a_parquet_scan_counts_and_hashes(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": ["a", None, "b"]})
    data = path.read_bytes()
    assert scan(path) == facts(3, hashlib.sha256(data).hexdigest(), len(data), "parquet")


def test_zero_parquet_rows_are_fine(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": pa.array([], pa.string())})
    open_prompts(path)
    assert (read(path), scan(path).rows) == ([], 0)


def test_a_flipped_bit_in_parquet_is_an_input_error(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": ["Once upon a time"] * 9}, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"upon a")] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^p\.parquet:row 0: the Parquet data is damaged here or later"):
        read(path)


def test_every_row_group_is_read_and_the_rows_are_as_many_as_the_file_says(tmp_path: Path) -> None:
    """Dictionaries of two row groups cannot be joined within a list, and each group has its own."""
    words = pa.array([["a"], ["b"], None, ["c", "a"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    path = parquet(tmp_path, {"prompt": ["1", "2", "3", "4"], "words": words}, row_group_size=1)
    (chunk,) = chunks(open_prompts(path, keep=("words",)))
    assert kept_columns(chunk, ())["words"].type == words.type
    assert [item.prompt for item in chunk.items] == ["1", "2", "3", "4"]

    data, four, five = path.read_bytes(), bytes([0x16, 8, 0x19]), bytes([0x16, 10, 0x19])  # rows, before row groups
    assert data.count(four) == 1
    path.write_bytes(data.replace(four, five))
    with pytest.raises(InputError, match=r"p\.parquet:row 4: the Parquet data is damaged .*its footer says 5 rows"):
        read(path)


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_parquet_file_is_read_or_named(tmp_path: Path, at: int, byte: int, cut: bool) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b", None] * 20, "id": list(range(60))}, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] = byte
    path.write_bytes(data[:at] if cut else data)
    try:
        open_prompts(path)
        scan(path)
        read(path)
    except InputError as error:
        assert str(error).startswith((f"{path}: ", "p.parquet:row "))  # noqa: PT017  # both outcomes are lawful
        assert "\n" not in str(error)  # noqa: PT017


# ---- files that are refused


def test_parquet_columns_that_cannot_be_prompts_are_refused(tmp_path: Path) -> None:
    assert "no column 'prompt'; the columns are 'text'" in refusal(parquet(tmp_path, {"text": ["a"]}))
    assert "'prompt' is of type int64; cast it to string" in refusal(parquet(tmp_path, {"prompt": [1]}))
    assert "'prompt' is of type list<element: string>; cast it" in refusal(parquet(tmp_path, {"prompt": [["a"]]}))
    error = refusal(parquet(tmp_path, {"prompt": [{"n": 1, "a": "b"}]}))
    assert error.endswith(
        "is of type struct<n: int64, a: string>; name a string in it, such as --prompt-column prompt.a"
    )


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (pa.array([b"\xff", None]), "the id is not UTF-8; write the column as UTF-8 strings"),
        (pa.array([["a"], None]), "the id is of type list<element: string>; cast it to string, or name another with"),
        (pa.array([{"a": 1}, None]), "the id is of type struct<a: int64>; cast it to string"),
        (pa.array([math.nan, None]), "the id is nan; make it a whole number, a string or null"),
    ],
)
def test_an_optional_column_never_stops_a_run_an_id_that_is_no_text_rejects_its_row(
    tmp_path: Path, ids: pa.Array, reason: str
) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b"], "id": ids})
    open_prompts(path)
    bad, good = read(path)
    assert isinstance(bad, Rejected)
    assert bad.error.startswith(f"p.parquet:row 0: {reason}")
    assert (bad.id, bad.prompt, good) == (None, "a", Request(1, "p.parquet:row 1", None, "b", PARAMS))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    assert "2 columns are called 'prompt'" in refusal(path)
    twins = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], ["b", "b"])
    assert "2 columns are called 'a.b'" in refusal(parquet(tmp_path, {"prompt": ["a"], "a": twins}), keep=("a.b",))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"prompt,id", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(data)
    assert "not a Parquet file, or a damaged one" in refusal(path)


def test_parameter_columns_may_be_broken_text_but_not_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = pa.table({"prompt": ["a", "b"], "stop": not_utf8(pa.string())[:2]})
    pq.write_table(table, path)
    assert all(isinstance(item, (Request, Rejected)) for item in read(path))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["prompt", "n", "n"])
    pq.write_table(twice, path)
    with pytest.raises(InputError, match="2 columns are called 'n'"):
        open_prompts(path)


@pytest.mark.parametrize(
    "make_column",
    [
        lambda name: pa.array([{"max_new_tokens": 3, name: 2}, None, {"max_new_tokens": None, name: 0}]),
        lambda name: pa.array(
            [[("max_new_tokens", 3), (name, 2)], None, [(name, 0)]], pa.map_(pa.string(), pa.int64())
        ),
        lambda name: pa.array([f'{{"max_new_tokens": 3, "{name}": 2}}', None, f'{{"{name}": 0}}']),
        lambda name: pa.array([f'{{"max_new_tokens": 3, "{name}": 2}}', None, f'{{"{name}": 0}}']).dictionary_encode(),
    ],
    ids=["struct", "map", "text", "dictionary"],
)
@pytest.mark.parametrize("name", LOGPROBS)
def test_nested_parameters(tmp_path: Path, make_column: Callable[[str], pa.Array], name: str) -> None:
    column = make_column(name)
    path = parquet(tmp_path, {"prompt": ["a", "b", "c"], "sampling_params": column})
    prompts = open_prompts(path)
    asked = [item.params for item in prompts.requests(SamplingParams()) if isinstance(item, Request)]
    two, none = {"max_tokens": 3, name: 2}, {name: 0}
    assert asked == [SamplingParams(**two), SamplingParams(), SamplingParams(**none)]  # type: ignore[arg-type]
    assert prompts.scan().asks == {name}
    assert prompts.row_parameters.taken == {"sampling_params": 2}


def test_what_is_null_in_a_struct_is_left_out_as_in_the_rows_that_it_was_made_of(tmp_path: Path) -> None:
    schemas = [
        {"const": 5},
        {"properties": {"a": {"type": "null"}}},
        {"title": "x"},
        {"properties": {"b": {"minimum": 1}}},
    ]
    rows = [{"prompt": "a", "json_schema": schema, "structured_outputs": {"json": schema}} for schema in schemas]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    asked = [item.params for item in open_prompts(tmp_path / "prompts.parquet").requests(SamplingParams())]  # type: ignore[union-attr]
    assert asked == [SamplingParams(json_schema=schema) for schema in schemas]  # type: ignore[arg-type]
