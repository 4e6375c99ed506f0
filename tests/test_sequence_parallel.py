"""A network split over processes computes what it computes in one, and is refused where it cannot be split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import BlockSparseConfig, DiTConfig
from model.dit import DiT
from model.errors import InputError
from model.quantize import choose_products_
from model.sampling import TextCondition, base_schedule, denoise
from model.sequence_parallel import split_sequence

CONFIG = DiTConfig(
    hidden_size=64, depth=2, num_heads=4, caption_channels=8, adaln_tembed_dim=16,
    bsa_params=BlockSparseConfig(sparsity=0.5), text_tokens_zero_pad=False,
)  # fmt: skip
SIZES = (2, 4)
NETWORKS = ("dense", "block_sparse", "int8", "uneven")
WORST_ERROR = 1e-4


def network(kind: str) -> DiT:
    """Random weights, the same in every process."""
    torch.manual_seed(3)
    dit = DiT(CONFIG, attention="block_sparse" if kind == "block_sparse" else "dense").requires_grad_(False)
    if kind == "int8":
        choose_products_(dit, "int8")
    return dit


def results(dit: DiT, kind: str) -> dict[str, Tensor]:
    """Forward passes with conditions in the sequence, cached and absent, and a guided loop with a batch of two."""
    generator = torch.Generator().manual_seed(1)
    # 6 tokens a frame do not divide by 4 (nor 5 frames of them).
    rows, columns, frames, cond = (4, 6, 5, 2) if kind == "uneven" else (8, 16, 8, 4)
    latents = torch.randn(1, 16, frames, rows, columns, generator=generator)
    text = torch.randn(2, 1, 5, 8, generator=generator)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    each = torch.tensor([[0.0] * cond + [400.0] * (frames - cond)]).expand(2, -1)
    cache, twice = dit.build_cond_cache(latents[:, :, :cond]), latents.expand(2, -1, -1, -1, -1)
    prompts = TextCondition(text[:1], mask[:1], text[1:], mask[1:])
    return {
        "plain": dit(latents, torch.tensor([500.0]), text[:1], mask[:1]),
        "in the sequence": dit(twice, each, text, mask, num_cond_latents=cond),
        "cached": dit(twice[:, :, cond:], torch.tensor([400.0, 400.0]), text, mask, cond_cache=cache),
        "guided": denoise(dit, latents, base_schedule(3, 1.0), prompts, guidance=4.0, num_cond_latents=cond),
    }


def member(rank: int, size: int, folder: str) -> None:
    """One process: its results of each network as a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", size), rank=rank, world_size=size)
    for kind in NETWORKS:
        dit = network(kind)
        split_sequence(dit, dist.group.WORLD)
        save_file(results(dit, kind), f"{folder}/{kind}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The number of processes, and the folder with what each of them computed."""
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(member, (request.param, str(folder)), nprocs=request.param)
    return request.param, folder


@pytest.mark.parametrize("kind", NETWORKS)
def test_processes_together_compute_what_one_computes(together: tuple[int, Path], kind: str) -> None:
    size, folder = together
    wanted = results(network(kind), kind)
    for rank in range(size):
        found = load_file(folder / f"{kind}-{rank}.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name] - tensor).abs().max() < WORST_ERROR, f"{name} on {rank}"
            assert tensor.std() > 0.1, "there is something to compute"


def test_every_process_has_the_same_bits(together: tuple[int, Path]) -> None:
    size, folder = together
    for kind in NETWORKS:
        first, *others = [load_file(folder / f"{kind}-{rank}.safetensors") for rank in range(size)]
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def group_of(size: int) -> dist.ProcessGroup:
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)  # type: ignore[return-value]


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 processes do not divide 4 heads; wanted one of \[1, 2, 4\]"):
        split_sequence(DiT(CONFIG), group_of(3))


def test_training_and_too_few_tokens_are_refused() -> None:
    dit = DiT(dataclasses.replace(CONFIG, depth=1))
    split_sequence(dit, group_of(4))
    call = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 1, 2, 8), torch.ones(1, 2)
    with pytest.raises(InputError, match="for inference"):
        dit(*call)
    with pytest.raises(InputError, match="2 tokens are too few"), torch.no_grad():
        dit(call[0][..., :2, :], *call[1:])


def test_weights_keep_their_names() -> None:
    dit = DiT(CONFIG)
    before = set(dit.state_dict())
    split_sequence(dit, group_of(2))
    assert set(dit.state_dict()) == before
