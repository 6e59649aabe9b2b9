"""Triton's interpreter without what it repeats, which took half of an interpreted run, with a GPU's rounding, and with a watch on
memory.

Before every call of a kernel, and of a function within one, it replaces what triton.language has for a GPU, and afterwards puts
it back. Here it stays replaced. Programs of a launch run in no order on a GPU: here, one that touches memory outside of its
arguments, or what another program has written, or writes what another has read, is an error.
"""

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from samerge_ext.kernels import launch
from triton.runtime import interpreter

_replace = interpreter._patch_lang


@functools.cache
def _replace_once(kernel):
    scope = _replace(kernel)
    scope._changes.clear()  # nothing to put back
    return scope


interpreter._patch_lang = _replace_once

_convert = interpreter._convert_float


def _convert_as_a_gpu(numbers, source, target, rounding_mode):
    """fp32 to bf16 to the nearest, ties to even; the interpreter cuts off, or loses the carry."""
    if not (source.is_fp32() and target.is_bf16()):
        return _convert(numbers, source, target, rounding_mode)
    rounded = torch.from_numpy(np.array(numbers, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = _convert_as_a_gpu

NO_ONE, SEVERAL = 0, -1


@dataclass
class Memory:
    """A tensor's storage in one launch, and which program has read and written the number that begins at each byte."""

    begin: int
    bytes: int
    read: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)

    def __post_init__(self):
        self.read, self.written = np.zeros((2, self.bytes), np.int32)


_memories: list[Memory] = []  # of the launch that runs
_by_address: list = []  # tensors that kernels find by their addresses


def _watch(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if hasattr(t, "data_ptr")}
    _memories[:] = [Memory(begin, nbytes) for begin, nbytes in storages.items() if nbytes]


def _touch(pointers, mask, writes: bool):
    places = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)].astype(np.int64)
    size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
    x, y, z = interpreter.interpreter_builder.grid_idx
    program = 1 + x + 100_000 * (y + 1_000 * z)
    for memory in _memories:
        offsets = places - memory.begin
        inside = (offsets >= 0) & (offsets + size <= memory.bytes)
        touched, places = offsets[inside], places[~inside]
        if not len(touched):
            continue
        assert not (touched % size).any(), f"program {x, y, z}: misaligned"
        written, read = memory.written[touched], memory.read[touched]
        assert ((written == NO_ONE) | (written == program)).all(), f"program {x, y, z} touches what another has written"
        read = (read == NO_ONE) | (read == program)
        if writes:
            assert read.all(), f"program {x, y, z} writes what another has read"
            assert len(np.unique(touched)) == len(touched), f"program {x, y, z} writes one place twice at once"
            memory.written[touched] = program
        else:
            memory.read[touched] = np.where(read, program, SEVERAL)
    assert not len(places), f"program {x, y, z}: {len(places)} of {mask.data.size} places are outside of the kernel's arguments"


def _before(function, act):
    @functools.wraps(function)
    def wrapped(self, *arguments, **options):
        act(*arguments)
        return function(self, *arguments, **options)

    return wrapped


def _remembered(matrices, addresses=launch.addresses):
    _by_address[:] = [*_by_address, *matrices][-256:]
    return addresses(matrices)


launch.addresses = _remembered
Builder, Grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
Builder.create_masked_load = _before(Builder.create_masked_load, lambda at, mask, *_: _touch(at, mask, writes=False))
Builder.create_masked_store = _before(Builder.create_masked_store, lambda at, value, mask, *_: _touch(at, mask, writes=True))
Grid.__call__ = _before(Grid.__call__, lambda *arguments: _watch([*arguments, *_by_address]))
