"""Dense attention without a GPU: what the public call means, and what it takes where. On a Hopper card:
tests/test_kernels_hopper.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from kernels.attention import api
from kernels.dispatch import has_gluon

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton for this system"
)


def rows(queries: int = 256, keys: int = 256, size: int = 128, **options: object) -> list[torch.Tensor]:
    """q, k and v [2,3,N,D] as views of [2,N,3,D], on the meta device and in bf16 unless it is said otherwise."""
    options = {"device": "meta", "dtype": torch.bfloat16} | options
    return [torch.empty(2, n, 3, size, **options).transpose(1, 2) for n in (queries, keys, keys)]  # type: ignore[call-overload]


def test_it_is_softmax_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator, dtype=torch.float64) for n in (5, 9, 9))
    assert api.backend(q, k, v) == "torch"
    wanted = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    torch.testing.assert_close(api.attend(q, k, v, logit_bound=20.0), wanted)


@needs_triton
def test_on_a_hopper_card_it_is_our_kernel_and_its_rows_lie_as_the_projection_reads_them():
    q, k, v = rows(130, 4097)
    assert api.backend(q, k, v) == "gluon"
    out = api.attend(q, k, v)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()


@needs_triton
@pytest.mark.parametrize(
    "other",
    [{"queries": 127}, {"keys": 127}, {"size": 32}, {"dtype": torch.half}, {"dtype": torch.float}, {"device": "cpu"}],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_left_to_torch(other: dict[str, object]):
    assert api.backend(*rows(**other)) == "torch"  # type: ignore[arg-type]


@needs_triton
def test_rows_that_are_none_are_left_to_torch():
    q, k, v = rows()
    assert api.backend(q, k[:, :, :1].expand(k.shape), v) == "torch"
    assert api.backend(q[:0], k[:0], v[:0]) == "torch"


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, :2], v[:, :2]),
        lambda q, k, v: (q, k, v[:, :, :200]),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q[..., :64], k, v),
        lambda q, k, v: (q, k, torch.empty(v.shape, dtype=v.dtype)),
    ],
    ids=["heads", "values", "batch", "head size", "device"],
)
def test_tensors_that_do_not_belong_together_are_refused(change: Callable[..., tuple[torch.Tensor, ...]]):
    """A kernel would read what lies beside them, and give numbers."""
    with pytest.raises(ValueError, match="wanted the same batch, heads, head size and device"):
        api.attend(*change(*rows()))


@needs_triton
def test_gradients_are_left_to_torch():
    q, k, v = rows()
    v.requires_grad_()
    assert api.backend(q, k, v) == "torch"
    with torch.no_grad():
        assert api.backend(q, k, v) == "gluon"


@needs_triton
def test_other_cards_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    assert [card for card in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)) if has_gluon(card)] == [(9, 0)]
    monkeypatch.setattr(api, "capability", lambda x: (10, 0))
    assert api.backend(*rows()) == "torch"
