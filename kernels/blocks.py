"""Building blocks of the Triton kernels.

Every product goes through `product`: the interpreter multiplies bf16 bit patterns instead of values, so there operands
are raised to the accumulator's type first (``UPCAST``). The accumulator's type is an argument of each kernel: in
float64 the same source agrees with a float64 reference to rounding, which tests its logic apart from its precision.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b for tiles [M, K], [K, N], [M, N]; the result has the type of `acc` (fp32, or float64 in tests).

    Args:
        UPCAST: True under the interpreter.
        PRECISION: "ieee" or "tf32", for fp32 operands.
    """
    if UPCAST:
        return acc + tl.dot(a.to(acc.dtype), b.to(acc.dtype), input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
