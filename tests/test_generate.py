"""Segments and refinement windows from requests, with small random networks."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint

from model.clip import main
from model.config import BlockSparseConfig, DiTConfig, VAEConfig
from model.dit import DiT
from model.errors import InputError, Interrupted
from model.generate import (
    Models,
    RefineLayout,
    RefineRequest,
    SegmentRequest,
    decode_frames,
    generate_segment,
    load_models,
    mix_noise,
    refine_layout,
    refine_window,
)
from model.noise import draw_noise
from model.offload import Turns
from model.pixels import encode_frames, frames_to_video, resample_frames, video_to_frames
from model.sampling import OnStep, base_schedule, distilled_schedule, refinement_schedule
from model.vae import VAE

DIT = DiTConfig(hidden_size=32, depth=1, num_heads=1, caption_channels=8, adaln_tembed_dim=16)
VAE_CONFIG = VAEConfig((0.1,) * 16, (0.9,) * 16, base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)


@pytest.fixture(scope="module")
def models() -> Models:
    torch.manual_seed(0)
    dit = DiT(DIT).eval().requires_grad_(False)
    vae = VAE(VAE_CONFIG).eval().requires_grad_(False)
    return Models(dit, vae, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def refiner(models) -> Models:
    bsa = BlockSparseConfig(sparsity=0.5)
    dit = DiT(dataclasses.replace(DIT, bsa_params=bsa), "block_sparse").eval().requires_grad_(False)
    dit.load_state_dict(models.dit.state_dict())
    return dataclasses.replace(models, dit=dit)


def text_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(seed)), torch.ones(
        6, dtype=torch.long
    )


def segment(**changes: object) -> SegmentRequest:
    text, mask = text_of(1)
    request = SegmentRequest(
        text=text,
        text_mask=mask,
        height_px=32,
        width_px=48,
        segment_frames=17,
        noise_seeds=[11, 12, 13, 14, 15],
        schedule=distilled_schedule(2, 12),
        guidance=1,
    )
    return dataclasses.replace(request, **changes)


def random_frames(count: int, height: int = 32, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def window(**changes: object) -> RefineRequest:
    text, mask = text_of(2)
    request = RefineRequest(
        stage_one=random_frames(7),
        times=[min(frame / 2, 6.0) for frame in range(13)],
        height_px=64,
        width_px=128,
        noise_seeds=[1, 2, 3, 4],
        text=text,
        text_mask=mask,
        schedule=refinement_schedule(50, 0.5, 12),
    )
    return dataclasses.replace(request, **changes)


@pytest.mark.parametrize("cond_frames", [0, 1, 5, 13])
def test_one_request_serves_text_image_and_continuation(models, cond_frames):
    frames = random_frames(cond_frames) if cond_frames else None
    latents = generate_segment(models, segment(cond_frames=frames))
    assert latents.shape == (16, 5, 4, 6)
    assert latents.dtype == torch.float32
    if frames is not None:
        conditions = encode_frames(models.vae, frames)
        assert torch.equal(latents[:, : conditions.shape[1]], conditions)


def test_condition_latents_follow_those_of_the_frames_as_they_are(models):
    before = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    frame = random_frames(1)
    latents = generate_segment(models, segment(cond_frames=frame, cond_latents=before))
    assert torch.equal(latents[:, :1], encode_frames(models.vae, frame))
    assert torch.equal(latents[:, 1:3], before)
    assert not torch.allclose(latents[:, 3:], generate_segment(models, segment())[:, 3:], atol=1e-4)


def test_a_continuation_is_the_same_whether_its_conditions_come_as_frames_or_as_their_latents(models):
    frames = random_frames(9)
    by_frames = generate_segment(models, segment(cond_frames=frames))
    assert torch.equal(generate_segment(models, segment(cond_latents=encode_frames(models.vae, frames))), by_frames)


def owners(module: torch.nn.Module) -> list[weakref.ref[torch.UntypedStorage]]:
    return [weakref.ref(tensor.untyped_storage()) for tensor in (*module.parameters(), *module.buffers())]


def held(storages: list[weakref.ref[torch.UntypedStorage]]) -> bool:
    """Whether the memory is in use: by all of them, or by none."""
    (answer,) = {storage() is not None for storage in storages}
    return answer


@pytest.mark.parametrize("stage", ["segment", "window"])
def test_networks_that_take_turns_leave_the_device_and_change_no_bit(models, refiner, stage):
    def make(with_models: Models, on_step: OnStep | None) -> torch.Tensor:
        if stage == "segment":
            return generate_segment(with_models, segment(cond_frames=random_frames(5), on_step=on_step))
        return refine_window(with_models, window(on_step=on_step)).latents

    together = copy.deepcopy(models if stage == "segment" else refiner)
    wanted = make(together, None)
    device = torch.device("cpu")
    turns = Turns(together.dit, together.vae, device)
    in_turn = dataclasses.replace(together, turns=turns, cache_on_host=True)
    resting = owners(in_turn.vae)
    denoising: list[weakref.ref[torch.UntypedStorage]] = []

    def look(steps_done: int, latents: torch.Tensor) -> None:
        assert not held(resting), "the VAE is elsewhere while the transformer works"
        denoising.extend(owners(in_turn.dit))

    assert held(resting)
    assert torch.equal(make(in_turn, look), wanted)
    assert denoising and not held(denoising), "and the transformer afterwards"


def test_turns_end_when_denoising_is_stopped(models):
    def stop(steps_done: int, latents: torch.Tensor) -> None:
        raise Interrupted(steps_done, latents)

    stopped = copy.deepcopy(models)
    in_turn = dataclasses.replace(stopped, turns=Turns(stopped.dit, stopped.vae, torch.device("cpu")))
    with pytest.raises(Interrupted):
        generate_segment(in_turn, segment(on_step=stop))
    assert torch.equal(generate_segment(in_turn, segment()), generate_segment(models, segment()))


def test_result_depends_on_seeds_text_and_conditions(models):
    base = generate_segment(models, segment())
    assert torch.equal(generate_segment(models, segment()), base)
    other_text, mask = text_of(9)
    for changes in (
        {"noise_seeds": [11, 12, 13, 14, 16]},
        {"text": other_text, "text_mask": mask},
        {"cond_frames": random_frames(1)},
        {"cond_latents": torch.zeros(16, 1, 4, 6)},
    ):
        assert not torch.allclose(generate_segment(models, segment(**changes))[:, 1:], base[:, 1:], atol=1e-4)


def test_segment_resumes_bit_for_bit_after_an_interruption(models):
    negative, negative_mask = text_of(3)
    request = segment(
        schedule=base_schedule(4, 12),
        guidance=4.0,
        negative_text=negative,
        negative_mask=negative_mask,
        cond_frames=random_frames(1),
        cond_latents=torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(0)),
    )
    whole = generate_segment(models, request)

    def stop(steps_done: int, latents: torch.Tensor) -> None:
        if steps_done == 2:
            raise Interrupted(steps_done, latents)

    with pytest.raises(Interrupted) as caught:
        generate_segment(models, dataclasses.replace(request, on_step=stop))
    state = caught.value
    rest = dataclasses.replace(request, start_step=state.steps_done, resume=state.latents)
    assert torch.equal(generate_segment(models, rest), whole)


def test_frames_are_rounded_not_truncated():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(video_to_frames(frames_to_video(frames)), frames)
    nearly = frames_to_video(frames) - 0.4 / 127.5
    assert torch.equal(video_to_frames(nearly), frames)
    assert video_to_frames(torch.full((1, 3, 1, 1, 1), 1.2)).unique().tolist() == [255]


def test_decoding_drops_leading_frames(models):
    latents = generate_segment(models, segment())
    whole = torch.cat(list(decode_frames(models.vae, latents)))
    assert whole.shape == (17, 32, 48, 3)
    assert whole.dtype == torch.uint8
    assert torch.equal(torch.cat(list(decode_frames(models.vae, latents, drop_first=6))), whole[6:])


def test_large_clips_go_through_the_vae_in_pieces_with_the_same_result(models, monkeypatch):
    frames = random_frames(21)
    latents = encode_frames(models.vae, frames)
    pieces = list(decode_frames(models.vae, latents))
    assert len(pieces) == 1
    monkeypatch.setattr("model.pixels._PIXELS_AT_ONCE", 32 * 48 * 8)
    torch.testing.assert_close(encode_frames(models.vae, frames), latents, atol=1e-5, rtol=0)
    small = list(decode_frames(models.vae, latents))
    assert [len(piece) for piece in small] == [5, 8, 8]
    assert (torch.cat(small).int() - pieces[0].int()).abs().max() <= 1


def test_resampling_is_linear_in_time_and_aligns_corners_in_space():
    frames = random_frames(4, 8, 8)
    video = resample_frames(frames, [0.0, 1.0, 1.25, 3.0], 8, 8)
    exact = frames_to_video(frames)
    torch.testing.assert_close(video[:, :, [0, 1, 3]], exact[:, :, [0, 1, 3]], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        video[:, :, 2], 0.75 * exact[:, :, 1] + 0.25 * exact[:, :, 2], atol=1e-6, rtol=0
    )
    large = resample_frames(frames, [0.0], 15, 15)
    torch.testing.assert_close(large[0, :, 0, ::2, ::2], exact[0, :, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        large[0, :, 0, 1::2, ::2], (exact[0, :, 0, 1:] + exact[0, :, 0, :-1]) / 2, atol=1e-6, rtol=0
    )


def test_resampling_outside_the_clip_is_refused():
    for times in ([0.0, 3.5], [-0.5], []):
        with pytest.raises(InputError, match="times"):
            resample_frames(random_frames(4, 8, 8), times, 8, 8)


@pytest.mark.parametrize(
    ("frames", "cond", "wanted"),
    [
        (189, 0, RefineLayout(0, 48, 0, 0)),
        (186, 0, RefineLayout(0, 48, 0, 3)),
        (186, 26, RefineLayout(8, 40, 3, 0)),
        (14, 6, RefineLayout(4, 4, 7, 8)),
        (189, 1, RefineLayout(4, 48, 12, 4)),
        (93, 13, RefineLayout(4, 20, 0, 0)),
        (14, 0, RefineLayout(0, 8, 0, 15)),
        (1, 0, RefineLayout(0, 4, 0, 12)),
    ],
)
def test_windows_are_padded_to_blocks_of_four_latents(frames, cond, wanted):
    layout = refine_layout(frames, cond)
    assert layout == wanted
    assert 1 + 4 * (layout.latents - 1) == layout.front_frames + frames + layout.back_frames


def test_window_is_refined_to_padded_latents(refiner):
    refined = refine_window(refiner, window())
    assert refined.latents.shape == (16, 4, 8, 16)
    assert (refined.front_frames, refined.back_frames) == (0, 0)
    assert torch.equal(refine_window(refiner, window()).latents, refined.latents)


def test_refinement_starts_from_the_encoded_frames_and_named_noise(refiner):
    seen = []
    request = window()
    refine_window(refiner, dataclasses.replace(request, on_step=lambda done, latents: seen.append(latents)))
    video = resample_frames(request.stage_one, request.times, 64, 128)
    start = mix_noise(refiner.vae.encode(video), draw_noise([1, 2, 3, 4], 16, 8, 16), 0.5)
    text, mask = request.text[None], request.text_mask[None]
    step = refiner.dit(start, torch.tensor([500.0]), text, mask)
    sigmas = request.schedule.sigmas
    torch.testing.assert_close(seen[0], start + (sigmas[0] - sigmas[1]) * step, atol=1e-5, rtol=0)


def test_refined_conditions_come_first_with_their_padding(refiner):
    image = random_frames(1, 64, 128)
    refined = refine_window(refiner, window(cond_frames=image, noise_seeds=range(8)))
    assert refined.latents.shape == (16, 8, 8, 16)
    assert (refined.front_frames, refined.back_frames) == (12, 4)
    wanted = encode_frames(refiner.vae, image.expand(13, -1, -1, -1))
    torch.testing.assert_close(refined.latents[:, :4], wanted, atol=1e-6, rtol=0)


def test_spatial_refinement_keeps_the_frame_rate(refiner):
    frames = random_frames(13)
    request = window(stage_one=frames, times=[float(i) for i in range(13)], spatial_only=True)
    assert refine_window(refiner, request).latents.shape == (16, 4, 8, 16)
    with pytest.raises(InputError, match="times: must be whole"):
        refine_window(refiner, window(spatial_only=True))


def test_window_resumes_bit_for_bit(refiner):
    states = {}
    request = window(on_step=lambda done, latents: states.update({done: latents}))
    whole = refine_window(refiner, request).latents
    rest = dataclasses.replace(request, start_step=3, resume=states[3])
    assert torch.equal(refine_window(refiner, rest).latents, whole)


def test_requests_that_do_not_fit_are_refused(models, refiner):
    for changes, message in (
        ({"segment_frames": 18}, "segment_frames: 18 is not 1 plus a multiple of 4"),
        ({"noise_seeds": [1]}, "noise_seeds: 1 seeds for 5 latent frames"),
        ({"height_px": 40}, "height_px: 40 is no positive multiple of 16"),
        ({"cond_frames": random_frames(2)}, "cond_frames: 2 is not 1 plus a multiple of 4"),
        ({"cond_frames": random_frames(1, 16, 48)}, r"cond_frames: torch.uint8 \(1, 16, 48, 3\)"),
        ({"cond_latents": torch.zeros(16, 1, 4, 5)}, r"cond_latents: \(16, 1, 4, 5\), wanted \[16,k,4,6\]"),
        ({"cond_frames": random_frames(1), "cond_latents": torch.zeros(16, 4, 4, 6)}, "5 latents leave nothing of 5"),
        ({"resume": torch.zeros(1, 16, 4, 4, 6)}, r"resume: latents \(1, 16, 4, 4, 6\)"),
        ({"text": torch.zeros(1, 1, 6, 8)}, "text: states"),
        ({"guidance": 4.0}, "guidance: 4.0 needs a negative prompt"),
    ):
        with pytest.raises(InputError, match=message):
            generate_segment(models, segment(**changes))
    with pytest.raises(InputError, match="noise_seeds: 5 seeds for 4"):
        refine_window(refiner, window(noise_seeds=range(5)))
    with pytest.raises(InputError, match="does not divide"):
        refine_window(refiner, window(height_px=80))
    with pytest.raises(InputError, match="do not leave a rest"):
        refine_layout(13, 13)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_models_load_from_a_checkpoint_folder_with_their_loras(checkpoint):
    plain = load_models(checkpoint, device="cpu", dtype=torch.float32)
    file = checkpoint / "lora" / "cfg_step_lora.safetensors"
    adapted = load_models(checkpoint, role_loras=[(file, 1.0)], device="cpu", dtype=torch.float32)
    name = "blocks.0.attn.proj.weight"
    assert not torch.equal(plain.dit.get_parameter(name), adapted.dit.get_parameter(name))


def command(checkpoint: Path, image: Path, out: Path) -> list[str]:
    inputs = ["--checkpoint", str(checkpoint), "--prompt", "a red circle", "--image", str(image)]
    size = ["--height", "32", "--width", "64", "--frames", "17", "--steps", "2"]
    return [*inputs, *size, "--device", "cpu", "--out", str(out)]


def test_command_makes_a_refined_clip_from_an_image(checkpoint, tmp_path):
    image, out = tmp_path / "start.png", tmp_path / "clip.mp4"
    Image.fromarray(np.full((50, 90, 3), 200, dtype=np.uint8)).save(image)
    assert main([*command(checkpoint, image, out), "--refine", "128x64"]) == 0
    reader = imageio_ffmpeg.read_frames(str(out))
    about = next(reader)
    assert (about["size"], about["fps"]) == ((128, 64), 30)
    assert len(list(reader)) == 34


def test_command_names_what_is_wrong(checkpoint, tmp_path, capsys):
    assert main(command(checkpoint, tmp_path / "none.png", tmp_path / "clip.mp4")) == 1
    assert capsys.readouterr().err.startswith("error: image: ")
    assert not (tmp_path / "clip.mp4").exists()
