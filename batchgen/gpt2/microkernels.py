"""The inner loops of products, in LLVM IR: a tile of rows x columns held in registers over a whole chain of k.

An element of a float32 tile is one chain of fma over k; an element of an int8 tile is an exact integer. So the shape of
a tile, which is chosen by the vectors of the processor, changes no bit.

BATCHGEN_VECTORS="8,8,0", for tests only, limits the three numbers of `Vectors` further.
"""

import os
import re
from typing import NamedTuple

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from batchgen.gpt2.compiled import inline
from batchgen.gpt2.weights import GROUP

MOST_ROWS = 6  # of a tile
START, CONTINUE = 0, 1  # c = chain; c = the chain that c began, continued
LINE = 64  # bytes of a line of the caches

POINTER = ir.IntType(8).as_pointer()
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_IS_X86 = llvm.get_default_triple().startswith(("x86_64", "i686"))

_PROBE = """
define <16 x float> @floats(<16 x float> %x, <16 x float> %y, <16 x float> %z) {
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %y, <16 x float> %z)
  ret <16 x float> %r
}
define <32 x i16> @integers(<32 x i16> %x, <32 x i16> %y) {
  %r = mul <32 x i16> %x, %y
  ret <32 x i16> %r
}
define i32 @dot(<64 x i8> %x, <64 x i8> %y) {
  %u = zext <64 x i8> %x to <64 x i32>
  %s = sext <64 x i8> %y to <64 x i32>
  %m = mul <64 x i32> %u, %s
  %r = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %m)
  ret i32 %r
}
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare i32 @llvm.vector.reduce.add.v64i32(<64 x i32>)
"""


class Vectors(NamedTuple):
    """How many float32 or int32 an instruction takes."""

    fma: int  # 16, 8, 4; 0 if there is no fma and each element is a call of a function
    multiply: int  # int16 pairs to int32 (pmaddwd)
    dot: int  # bytes by fours to int32 (vpdpbusd); 0 if there is none


def _probe(cpu: str, features: str) -> Vectors:
    """Ask LLVM which instructions it selects for this processor: right for every name that it knows."""
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features)
    text = machine.emit_assembly(llvm.parse_assembly(_PROBE))

    def widest(instruction: str, otherwise: int) -> int:
        for register, width in (("zmm", 16), ("ymm", 8)):
            if re.search(f"{instruction}.*{register}", text):
                return width
        return otherwise

    return Vectors(widest("vfmadd", 4 if "fmla" in text else 0), widest("vpmullw", 4), widest("vpdpbusd", 0))


def target_vectors() -> Vectors:
    """The vectors of the processor that Numba compiles for: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, or this machine.

    A name without features means the narrower of the two: Numba adds this machine's features to any name.
    """
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    found = [_probe(cpu, features)]
    if "NUMBA_CPU_NAME" in os.environ:
        found.append(_probe(cpu, ""))
    if "BATCHGEN_VECTORS" in os.environ:
        found.append(Vectors(*map(int, os.environ["BATCHGEN_VECTORS"].split(","))))
    return Vectors(*map(min, zip(*found, strict=True)))


@inline
def address(array):
    return np.intp(array.ctypes.data)


def _splat(builder, value, width):
    vector = ir.VectorType(value.type, width)
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, width), [0] * width))


def load(builder, address, kind, align=4):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def at(builder, address, index, stride):
    """The address of the index-th of things that are `stride` bytes apart."""
    stride = I64(stride) if isinstance(stride, int) else stride
    index = I64(index) if isinstance(index, int) else index
    return builder.add(address, builder.mul(index, stride))


def call(builder, name, result, *arguments):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


class Float32:
    """float32 @ float32 (or @ bfloat16 as uint16, widened in registers); the chain goes to c."""

    x_bytes, prefetches = 4, False
    extra: types.Type = types.intp  # mode: START or CONTINUE

    def __init__(self, width, b_bytes=4):
        self.width, self.b_bytes = width, b_bytes
        self.vector = ir.VectorType(F32, width)

    def load_x(self, builder, pointer):
        return _splat(builder, load(builder, pointer, F32), self.width)

    def load_b(self, builder, pointer):
        if self.b_bytes == 4:
            return load(builder, pointer, self.vector)
        wide = ir.VectorType(I32, self.width)
        bits = builder.zext(load(builder, pointer, ir.VectorType(I16, self.width), align=2), wide)
        return builder.bitcast(builder.shl(bits, wide([16] * self.width)), self.vector)

    def begin(self, builder, c, mode):
        continues = builder.icmp_signed("==", mode, I64(CONTINUE))
        return builder.select(continues, load(builder, c, self.vector), self.vector([0.0] * self.width))

    def step(self, builder, total, x, b):
        return call(builder, f"llvm.fma.v{self.width}f32", self.vector, x, b, total)

    def columns_from(self, builder, j, mode):
        """The extra arguments of a tile whose first column is j."""
        return [mode]

    def finish(self, builder, total, r, v, mode):
        return total


class Float32Panel(Float32):
    """float32 @ a piece of a panel: c = residual + ((before + chain) + b)."""

    prefetches = True
    # before, residual (each, and bytes from a row to the next), b, what is next
    extra = types.UniTuple(types.intp, 6)

    def begin(self, builder, c, *_):
        return self.vector([0.0] * self.width)

    def columns_from(self, builder, j, before, before_step, residual, residual_step, b, ahead):
        before, residual, b = (at(builder, address, j, 4) for address in (before, residual, b))
        return [before, before_step, residual, residual_step, b, ahead]

    def finish(self, builder, total, r, v, before, before_step, residual, residual_step, b, ahead):
        column = 4 * self.width * v
        before, residual = at(builder, before, r, before_step), at(builder, residual, r, residual_step)
        before, residual, b = (load(builder, at(builder, p, column, 1), self.vector) for p in (before, residual, b))
        return builder.fadd(residual, builder.fadd(builder.fadd(before, total), b))


class Int8:
    """uint8 @ int8, four of each in a step of k, to an exact int32, then to float32 with the scales, b and residual."""

    x_bytes = b_bytes = GROUP
    prefetches = True
    # of rows: scale, zero, residual (and bytes from a row to the next); of columns: scale, sum, b; what is next
    extra = types.UniTuple(types.intp, 8)

    def __init__(self, width, dot):
        self.width, self.dot = width, dot
        self.vector, self.pairs = ir.VectorType(I32, width), ir.VectorType(I16, 2 * width)

    def load_x(self, builder, pointer):
        fours = _splat(builder, load(builder, pointer, I32, align=1), self.width)
        return fours if self.dot else self._halves(builder, fours, builder.lshr)

    def load_b(self, builder, pointer):
        fours = load(builder, pointer, self.vector)
        return fours if self.dot else self._halves(builder, fours, builder.ashr)

    def _halves(self, builder, fours, shift):
        """Bytes 0 and 2, and bytes 1 and 3, of each four as int16."""
        eight = self.pairs([8] * self.pairs.count)
        fours = builder.bitcast(fours, self.pairs)
        return shift(builder.shl(fours, eight), eight), shift(fours, eight)

    def begin(self, builder, c, *_):
        return self.vector([0] * self.width)

    def step(self, builder, total, x, b):
        if self.dot:
            return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * self.width}", self.vector, total, x, b)
        for left, right in zip(x, b, strict=True):
            total = builder.add(total, self._multiply_pairs(builder, left, right))
        return total

    def _multiply_pairs(self, builder, left, right):
        """left[2i] * right[2i] + left[2i + 1] * right[2i + 1], in int32."""
        if _IS_X86:
            name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[self.width]
            return call(builder, f"llvm.x86.{name}", self.vector, left, right)
        products = []
        for first in (0, 1):
            lanes = ir.Constant(ir.VectorType(I32, self.width), list(range(first, 2 * self.width, 2)))
            narrow = [builder.shuffle_vector(v, ir.Constant(self.pairs, ir.Undefined), lanes) for v in (left, right)]
            products.append(builder.mul(*(builder.sext(v, self.vector) for v in narrow)))
        return builder.add(*products)

    def columns_from(self, builder, j, scale, zero, residual, residual_step, column_scale, column_sum, b, ahead):
        residual, *columns = (at(builder, p, j, 4) for p in (residual, column_scale, column_sum, b))
        return [scale, zero, residual, residual_step, *columns, ahead]

    def finish(self, builder, total, r, v, *extra):
        """residual + (float32(total - zero * column_sum) * (scale * column_scale) + b)."""
        scale, zero, residual, residual_step, column_scale, column_sum, b, _ = extra
        floats, column = ir.VectorType(F32, self.width), v * self.width
        row_scale, row_zero = (
            _splat(builder, load(builder, at(builder, p, r, 4), kind), self.width)
            for p, kind in ((scale, F32), (zero, I32))
        )
        residual = at(builder, residual, r, residual_step)
        sums, scales, bias, before = (
            load(builder, at(builder, p, column, 4), kind)
            for p, kind in ((column_sum, self.vector), (column_scale, floats), (b, floats), (residual, floats))
        )
        exact = builder.sitofp(builder.sub(total, builder.mul(row_zero, sums)), floats)
        value = builder.fadd(builder.fmul(exact, builder.fmul(row_scale, scales)), bias)
        return builder.fadd(before, value)


def tile_function(module, write, kind, rows, vectors):
    """The function (x, ldx, b, ldb, c, ldc, n_k, *extra) for one tile; addresses, and bytes from a row to the next."""
    name = f"{write.__module__}_{type(kind).__name__}_{kind.b_bytes}_{rows}x{vectors}x{kind.width}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * (7 + getattr(kind.extra, "count", 1))), name)
    function.linkage = "internal"
    function.attributes.add("noinline")  # registers are given out for this loop alone
    write(function, kind, rows, vectors)
    return function


def write_tile(function, kind, rows, vectors):
    """The body of a tile whose sums stay in vector registers."""
    x, ldx, b, ldb, c, ldc, n_k, *extra = function.args
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))
    tile = [(r, v) for r in range(rows) for v in range(vectors)]

    builder = ir.IRBuilder(entry)
    places = [at(builder, at(builder, c, r, ldc), v, 4 * kind.width) for r, v in tile]
    begun = [kind.begin(builder, place, *extra) for place in places]
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(I64)
    totals = [builder.phi(kind.vector) for _ in tile]
    b_k, x_k = at(builder, b, k, ldb), at(builder, x, k, kind.x_bytes)
    if kind.prefetches:  # a line of memory that later tiles will read
        ahead = builder.inttoptr(at(builder, extra[-1], k, LINE), POINTER)
        call(builder, "llvm.prefetch.p0i8", ir.VoidType(), ahead, I32(0), I32(3), I32(1))
    bs = [kind.load_b(builder, at(builder, b_k, v, kind.width * kind.b_bytes)) for v in range(vectors)]
    xs = [kind.load_x(builder, at(builder, x_k, r, ldx)) for r in range(rows)]
    ends = [kind.step(builder, total, xs[r], bs[v]) for total, (r, v) in zip(totals, tile, strict=True)]
    next_k = builder.add(k, I64(1))
    for phi, first, following in zip([k, *totals], [I64(0), *begun], [next_k, *ends], strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", next_k, n_k), loop, done)

    builder.position_at_end(done)
    for (r, v), place, total in zip(tile, places, ends, strict=True):
        value = kind.finish(builder, total, r, v, *extra)
        builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=4)
    builder.ret_void()


def product(kind, most_rows, vectors, write=write_tile):
    """An intrinsic multiply(rows, columns, x, ldx, b, ldb, c, ldc, n_k, extra): c = x @ b for a few rows.

    1 <= rows <= most_rows; columns is a multiple of vectors * kind.width; n_k >= 1. x, b, c are addresses
    (array.ctypes.data), ldx, ldb, ldc the bytes from a row to the next; `extra` is described at the kind. `write`
    writes the body of the function for a tile.
    """

    @intrinsic
    def multiply(typing_context, rows, columns, x, ldx, b, ldb, c, ldc, n_k, extra):
        return types.void(*[types.intp] * 9, kind.extra), generate

    def generate(context, builder, signature, arguments):
        rows, columns, x, ldx, b, ldb, c, ldc, n_k, extra = arguments
        extra = [extra] if kind.extra == types.intp else cgutils.unpack_tuple(builder, extra)
        with cgutils.for_range_slice(builder, I64(0), columns, I64(vectors * kind.width)) as (j, _):
            b_j, c_j = at(builder, b, j, kind.b_bytes), at(builder, c, j, 4)
            tile = [x, ldx, b_j, ldb, c_j, ldc, n_k, *kind.columns_from(builder, j, *extra)]
            end = builder.append_basic_block("end")
            switch = builder.switch(rows, end)
            for r in range(1, most_rows + 1):
                block = builder.append_basic_block(f"rows_{r}")
                switch.add_case(I64(r), block)
                builder.position_at_end(block)
                builder.call(tile_function(builder.module, write, kind, r, vectors), tile)
                builder.branch(end)
            builder.position_at_end(end)
        return context.get_dummy_value()

    return multiply


def float32_product():
    """multiply for panels of float32, with the tile that suits the processor, and its most rows."""
    width = target_vectors().fma or 4
    return product(Float32Panel(width), MOST_ROWS, _vectors(width)), MOST_ROWS


def int8_product():
    """The same for int8. Without vpdpbusd, registers hold halves of bytes: 4 rows fit."""
    _, width, dot = target_vectors()
    rows = MOST_ROWS if dot else 4
    return product(Int8(dot or width, dot > 0), rows, _vectors(dot or width)), rows


def _vectors(width):
    """Of a row of a tile: 6 x 4 vectors fit into 32 registers (AVX-512, ARM), 6 x 2 into 16 (AVX2, SSE)."""
    return 2 if width < 16 and _IS_X86 else 4
