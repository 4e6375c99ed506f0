"""Where the Triton kernels run: on CUDA, and on any device in Triton's interpreter (TRITON_INTERPRET=1). On the meta
device nothing runs; there a call has the results, in shape and size, that it has on CUDA.

Everything here can be traced by torch.compile, so that the choice between a kernel and its reference breaks no
graph.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

_FOUND = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter computes bf16 wrongly, and says nothing.
_TYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16, torch.float32)


def backend_of(device: str) -> str:
    """What kernels are on a type of device, for records of numerics: "triton", "triton interpreted" or "torch"."""
    if not _FOUND or not (device == "cuda" or INTERPRETED):
        return "torch"
    return "triton interpreted" if INTERPRETED else "triton"


def dense_attention(device: str, dtype: torch.dtype) -> str:
    """What computes dense attention on a type of device for heads of 128: "gluon", this project's kernel, or one of
    torch's own ways."""
    instead = dense_of_torch(device, dtype)  # this also finds out whether the device computes at all
    ours = device == "cuda" and dtype == torch.bfloat16 and has_gluon(torch.cuda.get_device_capability())
    return "gluon" if ours else instead


def dense_of_torch(device: str, dtype: torch.dtype) -> str:
    """Which of its attentions torch takes: "cudnn", "flash", "efficient", "math". It goes by the card, by cuDNN's
    version and by TORCH_CUDNN_SDPA_DEPRIORITIZED."""
    q = torch.empty(1, 1, 128, 128, device=device, dtype=dtype)
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.removesuffix("_ATTENTION").lower()


def takes_kernel(*tensors: Tensor | None, makes: torch.dtype | None = None) -> bool:
    """Whether a Triton kernel can read these tensors, the first of which is the activation (device, type, and rows
    whose values lie side by side), and write the type that it `makes`, if that is another one."""
    if INTERPRETED and makes == torch.float8_e4m3fn:
        return False  # the interpreter forgets the carry where rounding reaches the next power of two
    present = [tensor for tensor in tensors if tensor is not None]
    x = present[0]
    if not (_FOUND and (x.is_cuda or x.is_meta or INTERPRETED) and x.dtype in _TYPES):
        return False
    return all(tensor.stride(-1) == 1 for tensor in present)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether the result of these tensors is to be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors if tensor is not None)


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the device of x; what a Hopper card has, in the interpreter and on the meta device."""
    if INTERPRETED or x.is_meta:
        return (9, 0)
    properties = torch.cuda.get_device_properties(x.device)
    return properties.major, properties.minor


def has_descriptors(x: Tensor) -> bool:
    """Whether the device of x moves tiles by TMA."""
    return capability(x) >= (9, 0)


def has_gluon(capability: tuple[int, int]) -> bool:
    """Whether kernels in Gluon run on a card of this compute capability: those of this project are for Hopper's own
    products, and Triton's interpreter does not know the language."""
    return _FOUND and not INTERPRETED and capability == (9, 0) and torch.version.hip is None


def launch_options(*, warps: int, stages: int) -> dict[str, int]:
    """Options of a Triton launch. That a product and a sum may be fused is said in each: it changes bits, Triton 3.10
    turns its default round, and TRITON_DEFAULT_FP_FUSION would turn it for one process."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
