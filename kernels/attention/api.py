"""The public call of dense attention, and what it takes.

Shapes: B batch, H heads, Nq and Nk queries and keys, D head size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.dispatch import capability, has_gluon, needs_gradients, takes_kernel

_SIZES = (64, 128)
_LEAST_ROWS = 128  # a tile of the kernel


def attend(q: Tensor, k: Tensor, v: Tensor, *, logit_bound: float | None = None) -> Tensor:
    """softmax(q k^T D^-1/2) v: q [B,H,Nq,D], k and v [B,H,Nk,D] -> [B,H,Nq,D].

    Any strides with D innermost, such as slices of a fused projection [B,N,3,H,D], are read where they lie.
    `logit_bound` is a promise that no |q.k| D^-1/2 exceeds it (after RMSNorm: D^1/2 max|w_q| max|w_k|) and lets the
    kernel do without a running maximum; torch needs no such promise. ValueError where the three do not belong together.
    """
    alike = k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not (alike and q.device == k.device == v.device):
        told = ", ".join(f"{name} {tuple(x.shape)} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{told}: wanted the same batch, heads, head size and device, and as many values as keys")
    return _attend(q, k, v, logit_bound) if backend(q, k, v) == "gluon" else reference.attend(q, k, v)


def backend(q: Tensor, k: Tensor, v: Tensor) -> Literal["gluon", "torch"]:
    """What runs for these tensors: the kernel, or what torch takes.

    The kernel needs compute capability 9.0, bf16, heads of 64 or 128, at least 128 queries and 128 keys, and nothing
    that wants gradients. Rows that TMA cannot read (they are not aligned to 16 bytes) are copied.
    """
    fits = (
        takes_kernel(q, k, v)
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and has_gluon(capability(q))
        and q.shape[3] in _SIZES
        and min(q.shape[2], k.shape[2]) >= _LEAST_ROWS
        and q.shape[0] * q.shape[1] > 0
        and all(x.stride(2) > 0 for x in (q, k, v))  # one row shown as many is none that TMA can read
        and not needs_gradients(q, k, v)
    )
    return "gluon" if fits else "torch"


@torch.library.custom_op("longtake::attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, logit_bound: float | None) -> Tensor:
    from kernels.attention import gluon_impl

    return gluon_impl.attend(q, k, v, logit_bound)


@_attend.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2)
