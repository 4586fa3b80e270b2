"""Triton's interpreter as the kernels' tests need it: bf16 that is right, and quicker calls.

Triton's own (3.6 to 3.9) keeps bf16 as bits in uint16 and computes with these: products, sums and
comparisons are garbage, and casts truncate. Here they are numbers of ml_dtypes' type, rounded to
nearest even by each operation as on a GPU, and multiplied in fp32 by `tl.dot`.
"""

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

BF16 = np.dtype(ml_dtypes.bfloat16)
_own_dtype, _own_memory = interpreter._get_np_dtype, interpreter._interpreter
_own_cast, _own_dot = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    return BF16 if dtype.scalar == tl.bfloat16 else _own_dtype(dtype)


class _Memory:
    """Loads and stores, which know bits alone."""

    def __getattr__(self, name):
        return getattr(_own_memory, name)

    def load(self, pointers, mask, other, dtype):
        if dtype != BF16:
            return _own_memory.load(pointers, mask, other, dtype)
        other = other.astype(BF16).view(np.uint16)
        return _own_memory.load(pointers, mask, other, np.dtype(np.uint16)).view(BF16)

    def store(self, pointers, values, mask):
        bits = values.view(np.uint16) if values.dtype == BF16 else values
        return _own_memory.store(pointers, bits, mask)


def _cast(self, x, dtype):
    return TensorHandle(x.data.astype(_numpy_dtype(dtype)), dtype.scalar)


def _cast_floats(self, x, dtype, rounding):
    if tl.bfloat16 in (x.dtype.scalar, dtype.scalar):
        return _cast(self, x, dtype)
    return _own_cast(self, x, dtype, rounding)


def _dot(self, a, b, *rest):
    a, b = (_cast(self, x, tl.float32) if x.data.dtype == BF16 else x for x in (a, b))
    return _own_dot(self, a, b, *rest)


_patched = set()


def _call(self, *args, **kwargs):
    """A device function's call. Triton's own looks through its language for what is to be patched
    at every call, though a kernel's launch has just done so; what that leaves,
    `triton.language.core` under `tl.sum` and its like, stays patched."""
    if self.fn.__module__ not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def mend() -> None:
    """From here on, in this process."""
    interpreter._get_np_dtype, interpreter._interpreter = _numpy_dtype, _Memory()
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = _cast, _cast_floats
    InterpreterBuilder.create_dot = _dot
    InterpretedFunction.__call__ = _call
