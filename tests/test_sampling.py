"""Schedules and the denoising loop: golden loops, guidance, conditions, resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import DiTConfig
from model.dit import DiT
from model.errors import InputError, Interrupted, NumericsError
from model.sampling import (
    Schedule,
    TextCondition,
    base_schedule,
    cfg_zero,
    denoise,
    distilled_schedule,
    enhance_hf_schedule,
    refinement_schedule,
)

GOLDEN = Path(__file__).parent / "golden"
ONE_LOOP = 5e-5


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dit.safetensors")


@pytest.fixture
def dit(weights) -> DiT:
    model = DiT(DiTConfig.from_json(GOLDEN / "dit_config.json"))
    model.load_state_dict(weights)
    return model


def text_of(cases: dict[str, torch.Tensor], case: str) -> TextCondition:
    names = ("prompt_embeds", "prompt_mask", "negative_embeds", "negative_mask")
    return TextCondition(*(cases.get(f"{case}.{name}") for name in names))


def assert_close_to_fp32(values: tuple[float, ...], wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(values), wanted, atol=1.5e-7, rtol=2e-7)


@pytest.mark.parametrize("shift", [1, 12])
@pytest.mark.parametrize(("steps", "kind"), [(8, "base"), (50, "base"), (16, "distill")])
def test_schedules_match_golden(cases, shift, steps, kind):
    make = base_schedule if kind == "base" else distilled_schedule
    schedule = make(steps, shift)
    assert_close_to_fp32(schedule.sigmas, cases[f"sched.shift{shift}.{steps}.{kind}.sigmas"])
    assert_close_to_fp32(schedule.timesteps, cases[f"sched.shift{shift}.{steps}.{kind}.timesteps"])


def test_detail_and_refinement_schedules_match_golden(cases):
    assert_close_to_fp32(enhance_hf_schedule(12, 12).sigmas, cases["vc_kv_hf.sigmas"])
    assert enhance_hf_schedule(50, 12).steps == 56
    assert_close_to_fp32(refinement_schedule(50, 0.5, 12).timesteps, cases["refine_first.timesteps"])


@pytest.mark.parametrize(
    ("case", "schedule", "guidance", "num_cond", "cached"),
    [
        ("t2v", base_schedule(6, 12), 4.0, 0, False),
        ("t2v_distill", distilled_schedule(4, 12), 1.0, 0, False),
        ("i2v", base_schedule(5, 12), 3.0, 1, False),
        ("vc", base_schedule(5, 12), 4.0, 2, False),
        ("vc_kv", base_schedule(5, 12), 4.0, 2, True),
        ("vc_kv_hf", enhance_hf_schedule(12, 12), 4.0, 2, True),
    ],
)
def test_denoising_matches_golden(cases, dit, case, schedule, guidance, num_cond, cached):
    start = cases[f"{case}.initial_latents"]
    out = denoise(
        dit,
        start,
        schedule,
        text_of(cases, case),
        guidance=guidance,
        num_cond_latents=num_cond,
        use_cond_cache=cached,
    )
    assert (out - cases[f"{case}.final_latents"]).abs().max() < ONE_LOOP
    assert torch.equal(out[:, :, :num_cond], start[:, :, :num_cond])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("case", "num_cond"), [("refine_first", 0), ("refine_next", 4), ("refine_spatial", 0)]
)
def test_refinement_matches_golden(cases, dit, case, num_cond, cached):
    dit.attention = "block_sparse"
    out = denoise(
        dit,
        cases[f"{case}.initial_latents"],
        refinement_schedule(50, 0.5, 12),
        text_of(cases, case),
        guidance=1,
        num_cond_latents=num_cond,
        use_cond_cache=cached,
    )
    assert (out - cases[f"{case}.final_latents"]).abs().max() < ONE_LOOP


def test_stopped_loop_goes_on_bit_for_bit(cases, dit):
    text, schedule = text_of(cases, "vc_kv"), base_schedule(5, 12)
    kwargs = {"guidance": 4.0, "num_cond_latents": 2}
    whole = denoise(dit, cases["vc_kv.initial_latents"], schedule, text, **kwargs)

    def stop_after_three(steps_done: int, latents: torch.Tensor) -> None:
        if steps_done == 3:
            raise Interrupted(steps_done, latents)

    with pytest.raises(Interrupted) as caught:
        denoise(dit, cases["vc_kv.initial_latents"], schedule, text, on_step=stop_after_three, **kwargs)
    assert caught.value.steps_done == 3
    rest = denoise(dit, caught.value.latents, schedule, text, start_step=3, **kwargs)
    assert torch.equal(rest, whole)


def test_callback_sees_every_step_once_and_conditions_unchanged(cases, dit):
    start, seen = cases["vc.initial_latents"], []

    def note(steps_done: int, latents: torch.Tensor) -> None:
        assert torch.equal(latents[:, :, :2], start[:, :, :2])
        seen.append(steps_done)

    denoise(
        dit,
        start,
        distilled_schedule(4, 12),
        text_of(cases, "vc"),
        guidance=1,
        num_cond_latents=2,
        on_step=note,
    )
    assert seen == [1, 2, 3, 4]


def test_guidance_of_equal_predictions_changes_nothing_and_scale_is_a_projection():
    a = torch.randn(2, 3, 4)
    torch.testing.assert_close(cfg_zero(a, a, 4.0), a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cfg_zero(a, 2 * a, 4.0), a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cfg_zero(a, torch.zeros_like(a), 3.0), 3 * a)


def test_nan_is_an_error(cases, dit):
    with torch.no_grad():
        dit.get_parameter("final_layer.linear.bias")[0] = float("nan")
    with pytest.raises(NumericsError):
        denoise(
            dit, cases["t2v.initial_latents"], distilled_schedule(1, 12), text_of(cases, "t2v"), guidance=1
        )


def test_impossible_requests_are_refused(cases, dit):
    start, text = cases["t2v.initial_latents"], text_of(cases, "t2v")
    plain = TextCondition(text.text, text.mask)
    schedule = distilled_schedule(4, 12)
    with pytest.raises(InputError, match="negative prompt"):
        denoise(dit, start, schedule, plain, guidance=4.0)
    with pytest.raises(InputError, match="num_cond_latents: 3"):
        denoise(dit, start, schedule, plain, guidance=1, num_cond_latents=3)
    with pytest.raises(InputError, match="start_step: 5"):
        denoise(dit, start, schedule, plain, guidance=1, start_step=5)
    for bad in (
        lambda: base_schedule(1, 12),
        lambda: distilled_schedule(51, 12),
        lambda: refinement_schedule(50, 1.0, 12),
        lambda: Schedule((1.0, 0.0), ()),
    ):
        with pytest.raises(InputError):
            bad()
