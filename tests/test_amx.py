"""Tests of batchgen/gpt2/amx.py on any machine: the instructions are functions here, written to Intel's manual."""

import ctypes
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numba
import numpy as np
import pytest

from batchgen.gpt2 import amx, machine_code, microkernels
from batchgen.gpt2.amx import ROWS, amx_product, write_tile
from batchgen.gpt2.machine_code import prepare_kernels, uses_amx
from batchgen.gpt2.microkernels import Int8, call, target_vectors, tile_function
from batchgen.gpt2.weights import PANEL, to_int8

INSTRUCTIONS = ["ldtilecfg", "tileloadd", "tilestored", "tdpbusd", "tilerelease"]
N_TILE, ADDRESS, REGISTER = 8, ctypes.c_size_t, ctypes.c_uint8


def _module() -> str:
    target_vectors()  # which prepares LLVM
    module = ir.Module()
    module.triple = llvm.get_default_triple()
    for rows in range(1, ROWS + 1):
        tile_function(module, write_tile, Int8(16, True), rows, 4).linkage = "external"
    return str(module)


class Tiles:
    """The registers of AMX and what its instructions do to them, from Intel's manual (palette 1)."""

    def __init__(self) -> None:
        self.tiles: list[np.ndarray] = []  # [rows, bytes] uint8; empty: not configured
        self.problems: list[str] = []

    def ldtilecfg(self, address: int) -> None:
        shapes = ctypes.string_at(address, 64)
        lengths, rows = np.frombuffer(shapes, np.uint16, 8, offset=16), shapes[48 : 48 + N_TILE]
        if shapes[0] != 1 or any(shapes[1:16]) or any(shapes[32:48]) or any(shapes[56:]):
            self.problems.append("reserved bytes")
        if max(lengths) > 64 or max(rows) > 16 or not all(lengths) or not all(rows):
            self.problems.append("a shape that no register has")
        self.tiles = [np.zeros(shape, np.uint8) for shape in zip(rows, lengths, strict=True)]

    def _rows(self, register: int, address: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
        return ((row, address + r * stride) for r, row in enumerate(self.tiles[register]))

    def tileloadd64(self, register: int, address: int, stride: int) -> None:
        for row, place in self._rows(register, address, stride):
            row[:] = np.frombuffer(ctypes.string_at(place, row.size), np.uint8)

    def tilestored64(self, register: int, address: int, stride: int) -> None:
        for row, place in self._rows(register, address, stride):
            ctypes.memmove(place, row.tobytes(), row.size)

    def tdpbusd(self, sums: int, left: int, right: int) -> None:
        c, a, b = self.tiles[sums].view(np.int32), self.tiles[left], self.tiles[right].view(np.int8)
        if (len(a), a.shape[1], b.shape[1]) != (len(c), 4 * len(b), 4 * c.shape[1]):
            self.problems.append("shapes that do not fit")
            return
        b = (
            b.reshape(len(b), -1, 4).transpose(0, 2, 1).reshape(a.shape[1], -1)
        )  # four rows of b are one of the register
        c += a.astype(np.int32) @ b.astype(np.int32)

    def tilerelease(self) -> None:
        self.tiles = []


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    return Tiles()


@pytest.fixture(scope="module")
def multiply(tiles: Tiles) -> Iterator[Any]:
    """The intrinsic in a function that takes arrays, with the instructions of `tiles`."""
    types = {
        "ldtilecfg": [ADDRESS],
        "tileloadd64": [REGISTER, ADDRESS, ADDRESS],
        "tilestored64": [REGISTER, ADDRESS, ADDRESS],
        "tdpbusd": [REGISTER] * 3,
        "tilerelease": [],
    }
    functions = [ctypes.CFUNCTYPE(None, *arguments)(getattr(tiles, name)) for name, arguments in types.items()]
    for name, function in zip(types, functions, strict=True):
        llvm.add_symbol(f"manual.{name}", ctypes.cast(function, ctypes.c_void_p).value)
    intrinsic, most_rows = amx_product()
    assert most_rows == ROWS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx, "call", lambda b, name, *rest: call(b, name.replace("llvm.x86.", "manual."), *rest))

        @numba.njit("u1[:, ::1], i1[:, :, ::1], f4[:, ::1], f4[::1], i4[::1], f4[:, ::1], f4[::1], i4[::1], f4[::1]")
        def run(u, panel, c, scale, zero, residual, column_scale, column_sum, b):  # type: ignore[no-untyped-def]
            rows = np.intp(scale.ctypes.data), np.intp(zero.ctypes.data), np.intp(residual.ctypes.data), 4 * PANEL
            columns = np.intp(column_scale.ctypes.data), np.intp(column_sum.ctypes.data), np.intp(b.ctypes.data)
            u_0, panel_0, ldc = u.ctypes.data, panel.ctypes.data, 4 * c.shape[1]
            intrinsic(
                len(u),
                PANEL,
                u_0,
                u.shape[1],
                panel_0,
                256,
                c.ctypes.data,
                ldc,
                len(panel),
                rows + columns + (panel_0,),
            )

    yield run
    assert functions  # they are alive for as long as the code


@pytest.mark.parametrize("n_group", [1, 5, 15, 16, 17, 48, 50])
def test_a_tile_is_exact_and_reads_and_writes_nothing_else(multiply, tiles: Tiles, n_group: int) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4 * n_group, PANEL), dtype=np.float32)
    linear = to_int8(w, rng.standard_normal(PANEL, dtype=np.float32))
    panel = linear.panels[0]
    for n_row in (1, 5, 16):
        u = rng.integers(0, 256, (n_row, 4 * n_group), dtype=np.uint8)
        u[0] = 255
        scale, zero = rng.random(n_row, np.float32), rng.integers(0, 256, n_row, dtype=np.int32)
        exact = u.astype(np.int64) @ panel.transpose(0, 2, 1).reshape(4 * n_group, PANEL)
        value = (exact - zero[:, None] * linear.column_sum).astype(np.float32)
        value = value * (scale[:, None] * linear.scale) + linear.b
        c = rng.standard_normal((n_row + 1, PANEL + 8), dtype=np.float32)
        expected = c.copy()
        residual = rng.standard_normal((n_row, PANEL), dtype=np.float32)
        expected[:n_row, :PANEL] = residual + value
        multiply(u, panel, c, scale, zero, residual, linear.scale, linear.column_sum, linear.b)
        assert tiles.problems == []
        assert tiles.tiles == []
        assert (c == expected).all()


@pytest.mark.skipif(not microkernels._IS_X86, reason="instructions of x86")
def test_llvm_selects_the_instructions_for_a_processor_that_has_them() -> None:
    machine = llvm.Target.from_default_triple().create_target_machine(cpu="sapphirerapids", features="")
    text = machine.emit_assembly(llvm.parse_assembly(_module()))
    assert [name for name in INSTRUCTIONS if f"\t{name}" not in text] == []


@pytest.mark.parametrize(
    ("asked", "features", "answer", "expected"),
    [
        ("1", "+amx-tile,+amx-int8", 0, True),
        ("1", "+amx-tile,+amx-int8", -1, False),
        ("1", "-amx-tile,-amx-int8", 0, False),
        ("0", "+amx-tile,+amx-int8", 0, False),
        (None, "+amx-tile,+amx-int8", 0, False),
    ],
)
def test_amx_is_used_if_it_is_asked_for_there_and_permitted(monkeypatch, asked, features, answer, expected) -> None:
    calls: list[tuple[int, ...]] = []

    class System:
        def __init__(self, _: None) -> None: ...

        def syscall(self, *arguments: int) -> int:
            calls.append(arguments)
            return answer

    monkeypatch.setattr(ctypes, "CDLL", System)
    monkeypatch.setattr(machine_code, "target", lambda: ("some-cpu", features))
    if asked:
        monkeypatch.setenv("BATCHGEN_AMX", asked)
    assert uses_amx.__wrapped__() is expected
    assert calls == ([(158, 0x1023, 18)] if asked == "1" and "+amx-int8" in features else [])


def test_code_with_amx_has_another_name(monkeypatch) -> None:
    without = machine_code.setting.__wrapped__()
    monkeypatch.setattr(machine_code, "uses_amx", lambda: True)
    assert machine_code.setting.__wrapped__() != without


def test_amx_that_is_asked_for_and_not_there_is_one_warning(monkeypatch, caplog) -> None:
    monkeypatch.setattr(machine_code, "uses_amx", lambda: False)
    monkeypatch.setattr(machine_code.CACHE, "completed", list)
    prepare_kernels.__wrapped__()
    assert "AMX" not in caplog.text
    monkeypatch.setenv("BATCHGEN_AMX", "1")
    prepare_kernels.__wrapped__()
    (message,) = [text for record in caplog.records if "AMX" in (text := record.getMessage())]
    assert "other instructions are used" in message
