"""Mends Triton 3.6's interpreter where it is wrong or unbearably slow; kernels stay as they are.

- a scalar from NumPy 2.4's one-element arrays is no longer an index: loop bounds need one;
- ``tl.dot`` of bf16 multiplies the bit patterns;
- fp32 to bf16 cuts bits off where a GPU rounds to nearest, so that 0.9999999 becomes 0.996;
- fp32 to e4m3 rounds ties away from zero and loses the carry; e4m3 to fp32 takes bits for numbers;
- ``tl.minimum`` and ``tl.maximum`` give no number for it and another, where a GPU gives the other;
- ``xor_sum``, on which ``tl.sort`` rests, is a Python loop over elements;
- whether an integer overflows is computed at every operation, and not looked at;
- every call of one jit function by another patches the whole language anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def apply() -> None:
    """Idempotent; to be called before a kernel runs."""
    if getattr(interpreter, "_mended", False):
        return
    interpreter._mended = True
    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot
    cast_impl = interpreter.InterpreterBuilder.cast_impl
    fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp
    reduce = interpreter.ReduceOps.apply_impl

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def wide(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar == tl.float8e4nv:
            bits = torch.from_numpy(np.ascontiguousarray(x.data))
            data = bits.view(torch.float8_e4m3fn).float().numpy()
            return interpreter.TensorHandle(data, tl.float32)
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def between_widths(
        self: Any, src: interpreter.TensorHandle, to: Any, rounding: Any
    ) -> interpreter.TensorHandle:
        if to.scalar == tl.float8e4nv and src.dtype.scalar == tl.float32:
            x = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
            return interpreter.TensorHandle(x.view(torch.uint8).numpy(), to.scalar)
        if to.scalar == tl.float32 and src.dtype.scalar == tl.float8e4nv:
            return wide(src)
        return fp_to_fp(self, src, to, rounding)

    def dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return create_dot(self, wide(a), wide(b), *args)

    def cast(self: Any, src: interpreter.TensorHandle, to: Any) -> interpreter.TensorHandle:
        if src.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast_impl(self, src, to)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        nearest = np.where(np.isnan(src.data), np.uint32(0x7FC0), nearest)
        return interpreter.TensorHandle(nearest.astype(np.uint16), to.scalar)

    def fast_reduce(self: Any, inputs: Any) -> Any:
        if self.combine_fn != tl.standard._xor_combine:
            return reduce(self, inputs)
        (x,) = inputs
        data = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, x.dtype)

    def number(function: Any) -> Any:
        return lambda self, x, y: self.binary_op(x, y, function)

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # of the launch under way, which restores what it patched at its end

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch_lang(fn)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpreterBuilder.create_fp_to_fp = between_widths
    interpreter.ReduceOps.apply_impl = fast_reduce
    interpreter.InterpreterBuilder.create_minnumf = number(np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = number(np.fmax)
