"""The autoencoder: golden tensors, diffusers as the oracle, and the equality of its two ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.bench import diffusers_twin
from model.config import VAEConfig
from model.errors import InputError
from model.vae import VAE

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden_vae() -> VAE:
    vae = VAE(VAEConfig.from_json(GOLDEN / "vae_config.json"))
    vae.load_state_dict(load_file(GOLDEN / "vae.safetensors"))
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / "cases.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("vae.")}


@pytest.fixture(scope="module")
def small_vae() -> VAE:
    torch.manual_seed(1)
    mean, std = tuple(i / 10 for i in range(16)), tuple(1 + i / 10 for i in range(16))
    return VAE(VAEConfig(latents_mean=mean, latents_std=std, base_dim=8, num_res_blocks=1)).requires_grad_(False)


def assert_within(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance


def test_encoding_matches_the_golden_tensors(golden_vae: VAE, cases: dict[str, torch.Tensor]) -> None:
    mean, logvar = golden_vae.encode_moments(cases["vae.video"])
    assert_within(mean, cases["vae.mean"], 5e-6)
    assert_within(logvar, cases["vae.logvar"], 5e-6)
    assert_within(golden_vae.encode(cases["vae.video"]), cases["vae.normalized_mean"], 5e-6)


@pytest.mark.parametrize(("latent", "video"), [("mean", "decoded"), ("latent5", "latent5_decoded")])
def test_decoding_matches_the_golden_tensors(
    golden_vae: VAE, cases: dict[str, torch.Tensor], latent: str, video: str
) -> None:
    # These weights amplify rounding: the golden video itself is 4e-6 away from exact arithmetic. So the formula is held
    # to the golden tensor in double precision, and single precision to that.
    exact = VAE(golden_vae.config).double().requires_grad_(False)
    exact.load_state_dict(golden_vae.state_dict())
    latents = golden_vae.normalise(cases[f"vae.{latent}"])
    wanted = exact.decode(exact.normalise(cases[f"vae.{latent}"].double()))
    assert_within(wanted, cases[f"vae.{video}"].double(), 5e-6)
    assert_within(golden_vae.decode(latents).double(), wanted, 1e-5)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_decoding_agrees_with_diffusers(frames: int) -> None:
    torch.manual_seed(frames)
    vae = VAE(VAEConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, base_dim=8, num_res_blocks=2))
    latents = torch.randn(2, 16, (frames - 1) // 4 + 1, 4, 6)
    with torch.no_grad():
        assert_within(vae.decode(latents), diffusers_twin(vae)(latents), 2e-5)


def test_encoding_agrees_with_diffusers() -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(3)
    vae = VAE(VAEConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, base_dim=8)).requires_grad_(False)
    oracle = AutoencoderKLWan(base_dim=8)
    oracle.load_state_dict(vae.state_dict())
    video = torch.rand(1, 3, 13, 32, 48) * 2 - 1
    with torch.no_grad():
        posterior = oracle.encode(video).latent_dist
    mean, logvar = vae.encode_moments(video)
    assert_within(mean, posterior.mean, 2e-5)
    assert_within(logvar, posterior.logvar, 2e-5)


@pytest.mark.parametrize("pieces", [[1] * 6, [2, 3, 1], [6]])
def test_streaming_decode_equals_whole_clip(small_vae: VAE, pieces: list[int]) -> None:
    latents = torch.randn(1, 16, 6, 4, 6)
    whole = small_vae.decode(latents)
    streamed = list(small_vae.decode_stream(latents.split(pieces, dim=2)))
    assert [s.shape[2] for s in streamed] == [4 * p - (i == 0) * 3 for i, p in enumerate(pieces)]
    assert_within(torch.cat(streamed, 2), whole, 5e-5)


@pytest.mark.parametrize("chunks", [[1, 4, 4, 4], [9, 4], [1, 12], [5, 8]])
def test_streaming_encode_equals_whole_clip(small_vae: VAE, chunks: list[int]) -> None:
    video = torch.rand(1, 3, 13, 32, 48) * 2 - 1
    streamed = torch.cat(list(small_vae.encode_stream(video.split(chunks, dim=2))), 2)
    assert_within(streamed, small_vae.encode(video), 1e-5)


def test_later_frames_never_change_earlier_latents(small_vae: VAE) -> None:
    video = torch.rand(1, 3, 13, 32, 48) * 2 - 1
    short = small_vae.encode(video[:, :, :9])
    assert_within(small_vae.encode(video)[:, :, :3], short, 1e-5)


def test_streaming_remembers_the_same_amount_for_any_length(small_vae: VAE) -> None:
    def remembered(frames: int) -> int:
        memory: dict = {}
        for piece in torch.randn(1, 16, frames, 2, 2).split(1, 2):
            small_vae._decode(piece, memory)
        return sum(t.untyped_storage().nbytes() for t in memory.values())

    assert remembered(3) == remembered(12) > 0


def test_results_do_not_depend_on_whether_a_gradient_is_wanted(small_vae: VAE) -> None:
    video = torch.rand(1, 3, 25, 64, 96) * 2 - 1
    latents = small_vae.encode(video)
    with torch.no_grad():
        assert_within(small_vae.encode(video), latents, 1e-5)
        pieces = small_vae.decode(latents)
    assert_within(pieces, small_vae.decode(latents), 5e-5)


def test_decode_is_differentiable(small_vae: VAE) -> None:
    latents = torch.randn(1, 16, 2, 2, 2, requires_grad=True)
    small_vae.decode(latents).square().mean().backward()
    assert latents.grad is not None and bool(latents.grad.abs().sum() > 0)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 3, 4, 32, 48), "4 frames"), ((1, 3, 5, 30, 48), "30x48"), ((3, 5, 32, 48), "expected")],
)
def test_impossible_videos_are_refused(small_vae: VAE, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        small_vae.encode(torch.zeros(shape))


def test_latents_of_another_width_are_refused(small_vae: VAE) -> None:
    with pytest.raises(InputError, match="16"):
        small_vae.decode(torch.zeros(1, 4, 2, 2, 2))
