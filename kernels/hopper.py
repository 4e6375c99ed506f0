"""What the kernels in Gluon share: programs of two groups of four warps that compute and warps that only copy, for
cards of compute capability 9.0. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.dispatch import launch_options

GROUPS = 2
# Registers of a thread: those that compute and those that copy share the 504 that three groups may have.
REGISTERS = {"COMPUTING": 240, "COPYING": 24}
OPTIONS = launch_options(warps=4, stages=1)

# Newer versions of Triton know them by these names alone.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def tile_layout(rows: int, columns: int, element: gl.dtype = gl.bfloat16) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)


def descriptor(
    tensor: Tensor, shape: Sequence[int], row_stride: int, tile: tuple[int, int], element: gl.dtype = gl.bfloat16
) -> TensorDescriptor:
    """TMA descriptor of tiles of a tensor that is read as `shape`, rows and columns."""
    return TensorDescriptor(tensor, list(shape), [row_stride, 1], list(tile), tile_layout(*tile, element))
