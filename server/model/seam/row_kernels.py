"""CPU kernels over encoded rows: LLVM code made for one encoding and one width, compiled in this process.

Codes, scales and zero points are converted in vector registers on their way from memory to multiplication. Invariant:
the values are those of `expert_store.rows.decode_rows`, and they are added in an order that the code fixes, so a row's
product depends neither on the other rows nor on the number of threads. Threads take chunks of the work from a counter,
until none is left.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
from llvmlite import binding, ir
from torch import Tensor

from expert_store.encoding import RowEncoding

CHUNK_ROWS = 32
"""Output rows that a thread takes at a time."""
LANES = 32
"""Partial sums of a product, in as many vector registers as this machine needs for them."""
TURN_COLUMNS = 64
"""Most columns of one turn of the inner loop: whole groups, or a part of one."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_POINTER = ir.PointerType()
_parallel: Any = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
"""The call by which compilers run a function on OpenMP's threads. Torch loads the library, so the threads are those
that torch's own products use; without it, a kernel runs on one thread."""


class Run(NamedTuple):
    """Rows that are multiplied by one matrix: `num_rows` of x from `start` on, into as many of out from `to` on."""

    start: int
    to: int
    num_rows: int
    slot: int


class RowKernels:
    """The kernels for one encoding and one width, which are thread-safe. `row_kernels` makes them.

    Args:
        engine: owns the compiled code.
        columns: N.
    """

    def __init__(self, engine: binding.ExecutionEngine, columns: int) -> None:
        self._engine, self._columns = engine, columns
        self._multiply, self._decode = map(engine.get_function_address, ("multiply", "decode"))

    def multiply(self, x: Tensor, matrices: Sequence[Tensor], runs: Sequence[Run], out: Tensor) -> None:
        """For each run, out rows = x rows · valuesᵀ; a row's bits do not depend on the others.

        Args:
            x: float32 [.., N], contiguous.
            matrices: for each slot uint8 [O, row bytes], contiguous.
            out: float32 [.., O], contiguous; written at the runs' rows.
        """
        num_rows = out.shape[1]
        run_chunks = -(-num_rows // CHUNK_ROWS)
        table = [word for run in runs for word in (matrices[run.slot].data_ptr(), *run[:3])]
        words = (ctypes.c_int64 * len(table))(*table)
        addresses = x.data_ptr(), out.data_ptr(), ctypes.addressof(words)
        _launch(self._multiply, run_chunks * len(runs), run_chunks, num_rows, *addresses)

    def decode(self, matrix: Tensor) -> Tensor:
        """The values of a matrix, uint8 [O, row bytes], as float32 [O, N]."""
        values = torch.empty(len(matrix), self._columns)
        chunks = -(-len(matrix) // CHUNK_ROWS)
        _launch(self._decode, chunks, len(matrix), matrix.data_ptr(), values.data_ptr())
        return values


@cache
def row_kernels(encoding: RowEncoding, columns: int) -> RowKernels | None:
    """Compile the kernels for rows of `columns` values, which takes some tenths of a second.

    None where the CPU does not convert half precision and multiply vectors in hardware, as all with AVX2 and all ARM64
    do.
    """
    features = binding.get_host_cpu_features()
    is_arm = binding.get_process_triple().startswith(("aarch64", "arm64"))
    if not is_arm and not all(features.get(name, False) for name in ("avx2", "f16c", "fma")):
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = ir.Module()
    module.triple = binding.get_process_triple()
    _multiply(module, encoding, columns)
    _decode(module, encoding, columns)
    machine = binding.Target.from_triple(module.triple).create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3, jit=True
    )
    compiled = binding.parse_assembly(str(module))
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(compiled, passes)
    engine = binding.create_mcjit_compiler(compiled, machine)
    engine.finalize_object()
    return RowKernels(engine, columns)


def _launch(kernel: int, num_chunks: int, *more: int) -> None:
    """Run a kernel on torch's threads; its argument is the address of words: counter, number of chunks, `more`."""
    words = (ctypes.c_int64 * (2 + len(more)))(0, num_chunks, *more)
    num_threads = min(torch.get_num_threads(), num_chunks)
    if _parallel is None or num_threads == 1:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)(ctypes.addressof(words))
    else:
        _parallel(ctypes.c_void_p(kernel), words, num_threads, 0)


# -- the two functions; their words are those of `_launch` ------------------------------------------------------------


def _multiply(module: ir.Module, encoding: RowEncoding, columns: int) -> None:
    builder, words = _function(module, "multiply")
    num_chunks, run_chunks, num_rows, x, out, runs = (_load(builder, words, at) for at in range(1, 7))
    with _chunks(builder, words, num_chunks) as chunk:
        run = _at(builder, runs, builder.udiv(chunk, run_chunks), 32)
        rows, x_first, out_first, count = (_load(builder, run, at) for at in range(4))
        with _loop(builder, *_rows_of_chunk(builder, builder.urem(chunk, run_chunks), num_rows)) as output:
            row = _at(builder, rows, output, encoding.row_bytes(columns))
            with _loop(builder, _word(0), count) as number:
                factors = _at(builder, x, builder.add(x_first, number), 4 * columns)
                product = _product(builder, encoding, columns, row, factors)
                at = builder.add(builder.mul(builder.add(out_first, number), num_rows), output)
                builder.store(product, builder.inttoptr(_at(builder, out, at, 4), _POINTER))
    builder.ret_void()


def _decode(module: ir.Module, encoding: RowEncoding, columns: int) -> None:
    builder, words = _function(module, "decode")
    num_chunks, num_rows, rows, out = (_load(builder, words, at) for at in range(1, 5))
    with _chunks(builder, words, num_chunks) as chunk:
        with _loop(builder, *_rows_of_chunk(builder, chunk, num_rows)) as output:
            row = _at(builder, rows, output, encoding.row_bytes(columns))
            to = _at(builder, out, output, 4 * columns)
            for column, values in _row_values(builder, encoding, columns, row):
                builder.store(values, builder.inttoptr(_at(builder, to, column, 4), _POINTER), align=4)
    builder.ret_void()


def _product(builder: ir.IRBuilder, encoding: RowEncoding, columns: int, row: ir.Value, factors: ir.Value) -> ir.Value:
    """Sum of a row's values times the factors, in LANES partial sums that are added in pairs at the end."""
    lanes = gcd(encoding.group, LANES)
    kind = ir.VectorType(_FLOAT, lanes)
    sums = [_variable(builder, _same(_FLOAT, 0.0, lanes)) for _ in range(LANES // lanes)]
    multiply_add = ir.Function(builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fmuladd.v{lanes}f32")
    for number, (column, values) in enumerate(_row_values(builder, encoding, columns, row)):
        others = _load_vector(builder, _at(builder, factors, column, 4), _FLOAT, lanes)
        sum_ = sums[number % len(sums)]
        builder.store(builder.call(multiply_add, [values, others, builder.load(sum_, typ=kind)]), sum_)
    parts = [builder.load(sum_, typ=kind) for sum_ in sums]
    while len(parts) > 1:
        parts = [builder.fadd(*pair) for pair in zip(parts[0::2], parts[1::2], strict=True)]
    (total,) = parts
    while lanes > 1:
        lanes //= 2
        total = builder.fadd(*(_lanes_of(builder, total, range(start, start + lanes)) for start in (0, lanes)))
    return builder.extract_element(total, ir.Constant(_I32, 0))


# -- values of a row ---------------------------------------------------------------------------------------------------


def _row_values(
    builder: ir.IRBuilder, encoding: RowEncoding, columns: int, row: ir.Value
) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Emits a loop over a row; gives the first column and the values of each vector in it, to be used at once."""
    lanes, group = gcd(encoding.group, LANES), encoding.group
    turn = max((n * group for n in range(1, TURN_COLUMNS // group + 1) if columns % (n * group) == 0), default=0)
    turn = turn or gcd(group, TURN_COLUMNS)
    with _loop(builder, _word(0), _word(columns), turn) as start:
        for offset in range(0, turn, lanes):
            column = builder.add(start, _word(offset))
            if offset % group == 0:
                scale, zero = _group_numbers(builder, encoding, columns, row, column)
                scale, zero = (_lanes_of(builder, number, [0] * lanes) for number in (scale, zero))
            yield column, builder.fmul(_code_values(builder, encoding, row, column, zero, lanes), scale)


def _group_numbers(
    builder: ir.IRBuilder, encoding: RowEncoding, columns: int, row: ir.Value, column: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Scale (float [1]) and zero point (int32 [1]) of the group of a column. The scale makes good the power of two by
    which `_code_values` reads floating point codes too small."""
    fields = encoding.fields(columns)
    group = builder.udiv(column, _word(encoding.group))

    def number(name: str, kind: ir.Type, size: int) -> ir.Value:
        return _load_vector(builder, _at(builder, builder.add(row, _word(fields[name][0])), group, size), kind, 1)

    power = {"fp8": 8, "fp4": 14}.get(encoding.codes, 0)
    one_float, one_integer = ir.VectorType(_FLOAT, 1), ir.VectorType(_I32, 1)
    match encoding.scales:
        case "F32":
            scale = number("scales", _FLOAT, 4)
        case "F16":
            scale = builder.fpext(number("scales", _HALF, 2), one_float)
        case "BF16":
            wide = builder.zext(number("scales", _I16, 2), one_integer)
            scale = builder.bitcast(builder.shl(wide, _same(_I32, 16, 1)), one_float)
        case "F8_E4M3":
            scale = builder.fmul(_e4m3(builder, number("scales", _I8, 1), 1), _same(_FLOAT, 2.0**8, 1))
        case "F8_E8M0":  # an exponent; the sum is that of a normal number where the scale is too small for one
            exponent = builder.add(builder.zext(number("scales", _I8, 1), one_integer), _same(_I32, power, 1))
            scale, power = builder.bitcast(builder.shl(exponent, _same(_I32, 23, 1)), one_float), 0
    if encoding.overall is not None:
        overall = _load_vector(builder, builder.add(row, _word(fields["overall"][0])), _FLOAT, 1)
        scale = builder.fmul(scale, overall) if encoding.overall == "factor" else builder.fdiv(scale, overall)
    scale = builder.fmul(scale, _same(_FLOAT, 2.0**power, 1))
    match encoding.zeros:
        case "U8":
            return scale, builder.zext(number("zeros", _I8, 1), one_integer)
        case "I16":
            return scale, builder.sext(number("zeros", _I16, 2), one_integer)
        case None:
            return scale, _same(_I32, encoding.middle, 1)


def _code_values(
    builder: ir.IRBuilder, encoding: RowEncoding, row: ir.Value, column: ir.Value, zero: ir.Value, lanes: int
) -> ir.Value:
    """float [lanes]: the codes from `column` on, less their zero points; fp8 times 2^-8, fp4 times 2^-14."""
    if encoding.codes in ("fp8", "int8"):
        codes = _load_vector(builder, builder.add(row, column), _I8, lanes)
    else:
        pairs = _load_vector(builder, builder.add(row, builder.udiv(column, _word(2))), _I8, lanes // 2)
        low, high = builder.and_(pairs, _same(_I8, 15, lanes // 2)), builder.lshr(pairs, _same(_I8, 4, lanes // 2))
        order = [number // 2 + number % 2 * (lanes // 2) for number in range(lanes)]
        codes = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, lanes), order))
    if encoding.codes == "fp8":
        return _e4m3(builder, codes, lanes)
    if encoding.codes == "fp4":
        return _e2m1(builder, codes, lanes)
    whole = builder.sub(builder.zext(codes, ir.VectorType(_I32, lanes)), zero)
    return builder.sitofp(whole, ir.VectorType(_FLOAT, lanes))


def _e4m3(builder: ir.IRBuilder, codes: ir.Value, lanes: int) -> ir.Value:
    """float [lanes]: E4M3 numbers times 2^-8. Read as half precision, whose exponent has a bit and a bias of 8 more,
    which takes subnormal numbers too. The two codes of "not a number" become 480."""
    wide = builder.shl(builder.sext(codes, ir.VectorType(_I16, lanes)), _same(_I16, 7, lanes))
    return _from_half(builder, builder.and_(wide, _same(_I16, 0xBFFF, lanes)), lanes)


def _e2m1(builder: ir.IRBuilder, codes: ir.Value, lanes: int) -> ir.Value:
    """float [lanes]: E2M1 numbers in the low nibbles times 2^-14, read as half precision like E4M3."""
    sign = builder.shl(builder.and_(codes, _same(_I8, 8, lanes)), _same(_I8, 4, lanes))
    rest = builder.shl(builder.and_(codes, _same(_I8, 7, lanes)), _same(_I8, 1, lanes))
    wide = builder.zext(builder.or_(sign, rest), ir.VectorType(_I16, lanes))
    return _from_half(builder, builder.shl(wide, _same(_I16, 8, lanes)), lanes)


def _from_half(builder: ir.IRBuilder, bits: ir.Value, lanes: int) -> ir.Value:
    return builder.fpext(builder.bitcast(bits, ir.VectorType(_HALF, lanes)), ir.VectorType(_FLOAT, lanes))


# -- LLVM: addresses are int64 until they are used --------------------------------------------------------------------


def _function(module: ir.Module, name: str) -> tuple[ir.IRBuilder, ir.Value]:
    """A function of one pointer, and its address."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    builder = ir.IRBuilder(function.append_basic_block())
    return builder, builder.ptrtoint(function.args[0], _I64)


@contextmanager
def _chunks(builder: ir.IRBuilder, counter: ir.Value, num_chunks: ir.Value) -> Iterator[ir.Value]:
    """Emits a loop over the chunks that this thread takes from the counter."""
    head, body, end = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    chunk = builder.atomic_rmw("add", builder.inttoptr(counter, _POINTER), _word(1), "monotonic")
    builder.cbranch(builder.icmp_unsigned("<", chunk, num_chunks), body, end)
    builder.position_at_end(body)
    yield chunk
    builder.branch(head)
    builder.position_at_end(end)


@contextmanager
def _loop(builder: ir.IRBuilder, first: ir.Value, end: ir.Value, step: int = 1) -> Iterator[ir.Value]:
    """Emits a loop over first, first + step, … while less than end."""
    variable = _variable(builder, first)
    head, body, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    number = builder.load(variable, typ=_I64)
    builder.cbranch(builder.icmp_signed("<", number, end), body, after)
    builder.position_at_end(body)
    yield number
    builder.store(builder.add(number, _word(step)), variable)
    builder.branch(head)
    builder.position_at_end(after)


def _rows_of_chunk(builder: ir.IRBuilder, chunk: ir.Value, num_rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    first = builder.mul(chunk, _word(CHUNK_ROWS))
    end = builder.add(first, _word(CHUNK_ROWS))
    return first, builder.select(builder.icmp_signed("<", end, num_rows), end, num_rows)


def _variable(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A variable with a first value. It lies in the entry block, so that a loop does not allocate it again."""
    with builder.goto_entry_block():
        variable = builder.alloca(value.type)
    builder.store(value, variable)
    return variable


def _at(builder: ir.IRBuilder, address: ir.Value, number: ir.Value, size: int) -> ir.Value:
    return builder.add(address, builder.mul(number, _word(size)))


def _load(builder: ir.IRBuilder, address: ir.Value, number: int) -> ir.Value:
    """The int64 at a number of words from an address."""
    return builder.load(builder.inttoptr(builder.add(address, _word(8 * number)), _POINTER), typ=_I64)


def _load_vector(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, lanes: int) -> ir.Value:
    return builder.load(builder.inttoptr(address, _POINTER), align=1, typ=ir.VectorType(kind, lanes))


def _lanes_of(builder: ir.IRBuilder, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
    order = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, vector, order)


def _same(kind: ir.Type, value: float, lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def _word(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)
