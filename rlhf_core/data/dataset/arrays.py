"""Arrow arrays without pandas, which pyarrow imports at its first `array` or `to_numpy`: 0.7 s of
processor time in each process.

From Arrow to numpy, `np.from_dlpack` needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def array_of(values: Sequence[Any], kind: Any) -> Any:
    """As `pyarrow.array(values, kind)`.

    Args:
        values: numbers, truth values, texts or None, bytes, or numpy arrays of numbers or truth
            values for a list type.
        kind: the pyarrow type.
    """
    import numpy as np
    import pyarrow as pa

    if pa.types.is_list(kind):
        ends = _buffer(np.array(list(accumulate(map(len, values), initial=0)), np.int32))
        flat = array_of(np.concatenate(values) if len(values) else [], kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [None, ends], children=[flat])
    if pa.types.is_boolean(kind):
        bits = np.packbits(np.asarray(values, bool), bitorder="little")
        return pa.Array.from_buffers(kind, len(values), [None, _buffer(bits)])
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        there = [value is not None for value in values]
        parts = [v.encode() if isinstance(v, str) else v or b"" for v in values]
        ends = _buffer(np.array(list(accumulate(map(len, parts), initial=0)), np.int32))
        valid = None if all(there) else _buffer(np.packbits(there, bitorder="little"))
        return pa.Array.from_buffers(kind, len(parts), [valid, ends, pa.py_buffer(b"".join(parts))])
    numbers = np.asarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(numbers), [None, _buffer(numbers)])


def _buffer(values: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    return pa.py_buffer(np.ascontiguousarray(values))
