"""Variants that pass the code gate or break one of its rules each; compiled in a process without the interpreter."""

import torch
import triton
import triton.language as tl

from efftrain_ds.kernels.blocks import product
from efftrain_ds.kernels.gate import GateCase, recorded
from efftrain_ds.kernels.runtime import interpreted


@triton.jit
def matmul(
    a, b, c, k, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr
):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), ACC)
    for start in range(0, k, K):
        left = tl.load(
            a + rows[:, None] * stride + (start + inner)[None, :], mask=(start + inner)[None, :] < k, other=0.0
        )
        right = tl.load(
            b + (start + inner)[:, None] * N + columns[None, :], mask=(start + inner)[:, None] < k, other=0.0
        )
        total = product(left, right, total, UPCAST, "ieee")
    total = tl.exp2(total)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty))


def case(name, m=64, n=64, k=64, **more):
    constants = {"M": m, "N": n, "K": k, "ACC": tl.float32, "UPCAST": False}
    signature = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "k": "i32", "stride": "i32:16"}
    return GateCase(name, matmul, more.pop("signature", signature), constants, **more)


def from_launch():
    """The case of a launch, equal to "good": 72 is no multiple of 16, the stride is."""
    a, b, c = (torch.empty(64, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))

    def launch():
        matmul[(1,)](a, b, c, 72, 64, M=64, N=64, K=64, ACC=tl.float32, UPCAST=False, num_warps=4, num_stages=2)

    ((kernel, signature, constants, options),) = recorded(launch)
    return GateCase("recorded", kernel, signature, constants, quick=True, **options)


def gate_cases():
    more = [] if interpreted() else [from_launch()]
    return [
        case("good", exp2=True, quick=True),
        *more,
        case("mma instead of wgmma", m=32, quick=True),
        case("spilling", m=64, n=128, k=16, num_warps=1, wgmma=False, quick=True),
        case("shared", m=16, n=128, k=128, num_stages=4, capability=89, wgmma=False, quick=True),
        case("ampere", capability=80, wgmma=False, quick=True),
        case("unknown argument", signature={"a": "*bf16", "bb": "*bf16"}, quick=True),
        case("for the long tests", num_warps=8),
    ]
