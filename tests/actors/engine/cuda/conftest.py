"""Triton kernels run in its interpreter where there is no GPU; it must know before anything imports Triton.

Corrections of the interpreter of Triton 3.6: it takes ``int()`` of scalars kept as arrays of one element, which numpy
2.4 refuses; it multiplies matrices of bfloat16 by their bits; and it cuts float32 to bfloat16 where hardware rounds.
And three quarters of its time are saved, which it spends on looking through Triton's language at every call of a
function, on types of shapes, on making a table of dtypes for each look at it, and on a second sum and product of every
two integers, to see overflows that tests of this size are far from.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.language as tl
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor
    _dot = interpreter.InterpreterBuilder.create_dot
    _convert = interpreter._convert_float

    _all = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    _of_fp8 = {
        tl.float32: _all.float().numpy(),
        tl.float16: _all.half().numpy(),
        tl.bfloat16: _all.bfloat16().view(torch.int16).numpy().view(np.uint16),
    }

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def _rounding_convert(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.array(data, np.float32))
            return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):  # as its own, which is slow
            return np.asarray(data).view(np.uint16).astype(np.uint32) << 16
        if source == tl.float8e4nv:  # likewise
            return _of_fp8[target][np.asarray(data).view(np.uint8)]
        return _convert(data, source, target, mode)

    def _float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = _rounding_convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def _dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return _dot(self, _float32(a), _float32(b), *rest)

    _look_up = interpreter._get_np_dtype
    _np_dtypes: dict[str, np.dtype] = {}

    def _np_dtype(dtype: Any) -> np.dtype:
        name = str(dtype.scalar)
        if name not in _np_dtypes:
            _np_dtypes[name] = _look_up(dtype)
        return _np_dtypes[name]

    _make_tuple = tl.core.tuple.__init__

    def _make_tuple_without_type(self: Any, values: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(values)
        else:
            _make_tuple(self, values, type)

    _type = functools.cached_property(lambda self: tl.core._type_for_tuple_values(self.values))
    _type.__set_name__(tl.core.tuple, "type")

    interpreter._patch_lang_tensor = _patch_with_index
    interpreter.InterpreterBuilder.create_dot = _dot_of_values
    interpreter._convert_float = _rounding_convert
    interpreter._get_np_dtype = _np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    tl.core.tuple.__init__ = _make_tuple_without_type
    tl.core.tuple.type = _type
    # For good: nothing is compiled here.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
