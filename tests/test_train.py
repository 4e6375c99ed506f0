"""Training: a few steps of each stage at toy sizes; an interrupted run equals an uninterrupted one."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_dit, load_text, load_vae
from model.lora import load_lora
from model.train import __main__ as stages
from model.train import adapters, flags
from model.train.ahead import Ahead
from model.train.dit import Generator, Part, Shape, new_generator, sample, train_dit
from model.train.films import Cache, build_cache
from model.train.loop import Plan, Training, load_average, train
from model.train.pack import write_dit, write_vae
from model.train.vae import (
    draw_batch,
    new_vae,
    psnr_db,
    train_clips,
    train_images,
    with_measured_latents,
)

ROOT = Path(__file__).resolve().parent.parent


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def vae():
    return with_measured_latents(new_vae(4, 0), films=2).requires_grad_(False)


@pytest.fixture(scope="module")
def cache(vae, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    build_cache(vae, folder, seed=3, clips=6, frames=21)
    return folder


def weights(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file)


def assert_same_state(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_new_vae_holds_the_last_frame_of_each_group() -> None:
    vae = new_vae(4, 0)
    video, _ = draw_batch(0, 1, 9, 32, 48, 15.0)
    changed = video.clone()
    changed[:, :, 1:4] = 0.0  # only frames 4 and 8 may matter, each being the last of its group
    changed[:, :, 5:8] = 0.0
    torch.testing.assert_close(vae.encode(video), vae.encode(changed))
    decoded = vae.decode(vae.encode(video))
    torch.testing.assert_close(decoded[:, :, 1:5], decoded[:, :, 4:5].expand(-1, -1, 4, -1, -1))


def test_vae_training_lowers_the_error_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    short = Plan(steps=4, rate=1e-3, final_rate=1e-4, warmup_steps=1)
    train_images(whole, short, 4, 1, quiet, measured=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train_images(
                parted,
                Plan(steps=4, rate=1e-3, final_rate=1e-4, warmup_steps=1, save_every=2),
                4,
                1,
                quiet,
                measured=False,
            )
    train_images(parted, short, 4, 1, quiet, measured=False)
    assert_same_state(whole / "vae_images.safetensors", parted / "vae_images.safetensors")
    vae = train_clips(whole, Plan(steps=1, rate=1e-4, final_rate=1e-4), 4, 1, quiet, measured=False)
    assert not any(bool(p.isnan().any()) for p in vae.parameters())


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Saves happen after a step; the step after `steps` is interrupted."""
    update = Training.update

    def interrupted(self: Training, loss: torch.Tensor) -> float:
        if self.step >= steps:
            raise KeyboardInterrupt
        return update(self, loss)

    patch.setattr(Training, "update", interrupted)


def test_dit_training_resumes_exactly_and_packs(
    vae, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = [Part(cache, Shape(clips=2, latent_frames=6)), Part(cache, Shape(clips=4, latent_frames=1))]
    settings = {"width": 64, "depth": 1, "seed": 5, "log": quiet}
    run = Plan(steps=4, rate=1e-3, final_rate=1e-4, warmup_steps=1, save_every=2)
    whole = train_dit(tmp_path, "whole", mix, run, **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train_dit(tmp_path, "parted", mix, run, **settings)
    train_dit(tmp_path, "parted", mix, run, **settings)
    assert_same_state(tmp_path / "whole.safetensors", tmp_path / "parted.safetensors")

    load_average(whole, tmp_path / "whole.safetensors")
    write_vae(vae, tmp_path / "folder")
    write_dit(whole, tmp_path / "folder")
    dit = load_dit(tmp_path / "folder", device="cpu", dtype=torch.float32)
    load_vae(tmp_path / "folder", device="cpu", dtype=torch.float32)
    states, mask = load_text(tmp_path / "folder", device="cpu", dtype=torch.float32).encode(["a red circle"])
    latents, at = torch.randn(1, 16, 3, 8, 12), torch.tensor([500.0])
    own_states, own_mask = whole.prompter(["a red circle"])
    valid = int(own_mask.sum())
    torch.testing.assert_close(states[:, :, :valid], own_states[:, :, :valid], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(
        dit(latents, at, states, mask), whole.dit(latents, at, own_states, own_mask), atol=2e-2, rtol=2e-2
    )


def test_samples_keep_their_conditions(cache: Path) -> None:
    generator = new_generator(64, 1, 0)
    clean = Cache(cache).clip(0, 4).unsqueeze(0)
    out = sample(generator, ["a red circle"], 6, seed=1, steps=2, conditions=clean)
    assert torch.equal(out[:, :, :4], clean)
    assert out.shape == (1, 16, 6, 8, 12)


def awake(generator: Generator) -> Generator:
    """With its gates open: at the very start they are shut, and nothing behind them would learn."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in generator.dit.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return generator


def test_distillation_and_refinement_write_lora_files(vae, cache: Path, tmp_path: Path) -> None:
    teacher, student, refiner = (awake(new_generator(64, 1, 2)) for _ in range(3))
    run = Plan(steps=2, rate=1e-3, final_rate=1e-3, warmup_steps=1)
    adapters.train_distilled(
        tmp_path, student, teacher, Cache(cache), run, Shape(2, 6), guidance=3.0, jump=0.1, rank=4, seed=1, log=quiet
    )
    adapters.build_pairs(vae, tmp_path / "pairs", seed=1, clips=2, latent_frames=4)
    adapters.train_refinement(tmp_path, refiner, [tmp_path / "pairs"], run, tokens=400, rank=4, seed=1, log=quiet)
    for name in ("cfg_step_lora", "refinement_lora"):
        lora = load_lora(tmp_path / "lora" / f"{name}.safetensors")
        assert any(bool(up.any()) for layer in lora.layers.values() for up in layer.ups), name


def test_refined_time_is_half_the_frame_number() -> None:
    coarse = torch.arange(5.0).view(1, 5, 1, 1).expand(3, 5, 4, 6)
    fine = adapters.on_half_grid(coarse, 11, (8, 12))
    assert fine[0, :, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4, 4]


def test_psnr_inside_a_mask_counts_only_the_mask() -> None:
    a, b = torch.zeros(1, 3, 1, 2, 2), torch.zeros(1, 3, 1, 2, 2)
    b[..., 0, 0] = 2.0
    mask = torch.zeros(1, 1, 1, 2, 2)
    mask[..., 0, 0] = 1.0
    assert psnr_db(a, b, mask) == pytest.approx(0.0)
    assert psnr_db(a, b) == pytest.approx(6.0206, abs=1e-3)


def test_training_state_average_follows_the_weights() -> None:
    layer = torch.nn.Linear(2, 1)
    training = Training(layer, Plan(steps=3, rate=0.01, final_rate=0.01, warmup_steps=0))
    start = layer.weight.detach().clone()
    train(training, lambda step: layer(torch.ones(1, 2)).square().mean(), None, log=quiet)
    moved, followed = (layer.weight - start).norm(), (training.average["weight"] - start).norm()
    assert 0 < followed < moved


SHARED_STEPS = """
import sys
from pathlib import Path
import torch
from model.train.loop import Plan, Training, share, together, train

torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
training = Training(module, Plan(steps=3, rate=1e-2, final_rate=1e-2, warmup_steps=1))

def loss_of_share(number):
    return module(torch.randn(5, 6, generator=torch.Generator().manual_seed(number))).square().mean()

def loss_of(step):
    if len(sys.argv) > 2:
        return loss_of_share(share(step))
    return (loss_of_share(2 * step) + loss_of_share(2 * step + 1)) / 2

with together():
    train(training, loss_of, Path(sys.argv[1]))
"""


def test_two_processes_train_as_one_with_both_their_batches(tmp_path: Path) -> None:
    script = tmp_path / "shared_steps.py"
    script.write_text(SHARED_STEPS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in (
        [str(script), str(tmp_path / "one.safetensors")],
        [*torchrun, str(script), str(tmp_path / "two.safetensors"), "shared"],
    ):
        run = subprocess.run(
            [sys.executable, *command], env=environment, timeout=120, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-4000:]
    one, two = weights(tmp_path / "one.safetensors"), weights(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-3, rtol=1e-2)  # Muon's products are bf16


def test_batches_drawn_ahead_by_other_processes_come_in_order() -> None:
    ahead = Ahead(lambda step: (step, os.getpid()), range(5, 25), "cuda")
    drawn = [ahead.take(step) for step in range(5, 25)]
    assert [step for step, _ in drawn] == list(range(5, 25))
    assert os.getpid() not in {process for _, process in drawn}
    with pytest.raises(ValueError, match="comes next"):
        ahead.take(3)


def test_an_autoencoder_goes_on_from_a_checkpoints_weights(vae, tmp_path) -> None:
    write_vae(vae, tmp_path)
    run = Plan(steps=0, rate=1e-3, final_rate=1e-4)
    begun = train_clips(tmp_path, run, 4, 9, log=quiet, measured=False, clips=1, start_from=tmp_path)
    for name, weight in load_vae(tmp_path, device="cpu", dtype=torch.float32).state_dict().items():
        assert torch.equal(begun.state_dict()[name], weight), name


def test_a_cache_of_films_is_the_same_clips_in_however_many_shards(vae, tmp_path, monkeypatch) -> None:
    build_cache(vae, tmp_path / "whole", seed=3, clips=7, frames=93, size=(16, 24))
    monkeypatch.setattr("model.train.films.SHARD", 3)
    build_cache(vae, tmp_path / "parts", seed=3, clips=7, frames=93, size=(16, 24))
    whole, parts = Cache(tmp_path / "whole"), Cache(tmp_path / "parts")
    assert len(whole) == len(parts) == 7 and whole.texts == parts.texts
    torch.testing.assert_close(whole.latents, parts.latents, atol=2e-3, rtol=0)
    assert torch.equal(whole.covers, parts.covers)


def test_each_stage_takes_the_flags_that_it_reads_and_no_others() -> None:
    tree = ast.parse(inspect.getsource(stages))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def reads(name: str) -> set[str]:
        nodes = list(ast.walk(functions[name]))
        fields = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
        own = {found.attr for found in fields if ast.unparse(found.value) == "args"}
        called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        return own.union(*(reads(other) for other in called & set(functions)))

    assert set(flags.STAGES) == set(stages.STAGES)
    for stage, wanted in flags.STAGES.items():
        taken = {flag.replace("-", "_") for flag in wanted.names}
        assert reads(stages.STAGES[stage].__name__) - {"folder", "seed", "device"} == taken, stage
