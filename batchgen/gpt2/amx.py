"""int8 products by AMX, 16 rows x 64 columns of sums and 64 bytes of k at a time (tdpbusd). Off unless asked for.

Written to Intel's manual; its bits were compared in an emulator and on one processor, its speed on a small model alone.
BATCHGEN_AMX=1 turns it on.
A panel is stored as the instruction wants it: 16 groups of k of 16 columns are 16 rows of 64 bytes, 256 bytes apart.
"""

import llvmlite.ir as ir
from numba.core import cgutils

from batchgen.gpt2.microkernels import I64, POINTER, Int8, at, call, load, product
from batchgen.gpt2.weights import GROUP, PANEL

ROWS, GROUPS = 16, 16  # of a tile; GROUPS of k are 64 bytes
SUMS, U, COLUMNS = range(4), 4, (5, 6, 7)  # tile registers: 4 x 16 columns of sums, u, columns of the panel
VOID, I8 = ir.VoidType(), ir.IntType(8)


def _configure(builder, shapes, rows, groups):
    """Shapes of the registers: SUMS rows x 64 bytes, U rows x groups, COLUMNS groups x 64 bytes. Clears them.

    Byte 0 is 1; from byte 16, two bytes are the length of a register's rows, and from byte 48, one byte their number.
    """
    lengths = builder.or_(builder.mul(groups, I64(GROUP)), I64(0x0040004000400000))  # of registers 4 to 7
    numbers = builder.or_(builder.mul(groups, I64(0x0101010000000000)), I64(rows * 0x0000000101010101))
    words = [I64(1), I64(0), I64(0x0040004000400040), lengths, I64(0), I64(0), numbers, I64(0)]
    for i, word in enumerate(words):
        builder.store(word, builder.inttoptr(at(builder, shapes, i, 8), I64.as_pointer()))
    call(builder, "llvm.x86.ldtilecfg", VOID, builder.inttoptr(shapes, POINTER))


def _move(builder, direction, register, address, step):
    """Load a tile register from memory, or store it; its rows are `step` bytes apart."""
    call(builder, f"llvm.x86.tile{direction}d64", VOID, I8(register), builder.inttoptr(address, POINTER), step)


def _move_sums(builder, direction, sums):
    """Load the sums from memory [ROWS, PANEL], or store them."""
    for v in SUMS:
        _move(builder, direction, v, at(builder, sums, v, 64), I64(4 * PANEL))


def _add_step(builder, x, ldx, b, ldb):
    """Add the products of up to GROUPS groups of k."""
    _move(builder, "load", U, x, ldx)
    for v in SUMS:
        columns = COLUMNS[v % len(COLUMNS)]
        _move(builder, "load", columns, at(builder, b, v, 64), ldb)
        call(builder, "llvm.x86.tdpbusd", VOID, I8(v), I8(U), I8(columns))


def write_tile(function, kind, rows, _):
    """The body of a tile of PANEL columns, as microkernels.write_tile."""
    x, ldx, b, ldb, c, ldc, n_k, *extra = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    shapes, sums = (builder.alloca(I64, n // 8) for n in (64, 4 * ROWS * PANEL))
    shapes, sums = (builder.ptrtoint(memory, I64) for memory in (shapes, sums))

    _configure(builder, shapes, rows, I64(GROUPS))  # the sums are zeros
    whole, rest = builder.sdiv(n_k, I64(GROUPS)), builder.srem(n_k, I64(GROUPS))
    with cgutils.for_range(builder, whole) as loop:
        step = builder.mul(loop.index, I64(GROUPS))
        _add_step(builder, at(builder, x, step, GROUP), ldx, at(builder, b, step, ldb), ldb)
    _move_sums(builder, "store", sums)
    with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
        step = builder.mul(whole, I64(GROUPS))
        _configure(builder, shapes, rows, rest)
        _move_sums(builder, "load", sums)
        _add_step(builder, at(builder, x, step, GROUP), ldx, at(builder, b, step, ldb), ldb)
        _move_sums(builder, "store", sums)
    call(builder, "llvm.x86.tilerelease", VOID)

    with cgutils.for_range(builder, I64(rows)) as loop:
        row = at(builder, c, loop.index, ldc)
        for v in SUMS:
            place = at(builder, row, v, 64)
            total = load(builder, at(builder, at(builder, sums, loop.index, 4 * PANEL), v, 64), kind.vector)
            value = kind.finish(builder, total, loop.index, v, *extra)
            builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=4)
    builder.ret_void()


def amx_product():
    """As microkernels.int8_product."""
    return product(Int8(16, True), ROWS, len(SUMS), write_tile), ROWS
