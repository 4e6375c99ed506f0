"""Compare this code with golden tensors: `python -m model.parity DIR`.

DIR holds `cases.safetensors` (inputs and wanted outputs), `cases.json` (settings of the cases) and the
networks they were made with: `dit.safetensors` + `dit_config.json`, `vae.safetensors` + `vae_config.json`,
`lora.safetensors`. Every case in DIR is run in fp32 on the CPU, whatever its sizes (decoded video also in
fp64, see check_vae). Prints a table of case, largest absolute error (timesteps count in units of sigma),
tolerance and verdict. Exit code: 0 if all pass, 1 if one does not or is unknown, 2 if DIR cannot be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kernels.block_sparse_attention.api import Grid, block_sparse_attention
from kernels.norm_rope.reference import rotate
from model.config import DiTConfig, VAEConfig, read_json
from model.dit import Attention, DiT, rotary_table
from model.errors import CheckpointError
from model.generate import mix_noise, refine_layout
from model.lora import load_lora, merge_lora
from model.pixels import frames_to_video, resample_frames
from model.quantize import QuantLinear, quantize_weight
from model.sampling import (
    Schedule,
    TextCondition,
    base_schedule,
    denoise,
    distilled_schedule,
    enhance_hf_schedule,
    refinement_schedule,
)
from model.vae import VAE

ONE_FORWARD = 5e-6
ONE_LOOP = 5e-5

_SHIFT = 12.0
_TRAINING_STEPS = 1000
_PIXEL_STEP = 4


@dataclasses.dataclass(frozen=True)
class Finding:
    """One compared tensor of a case."""

    case: str
    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


class Golden:
    """A golden folder: `tensors` by name, `settings` by case, and the networks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _read_tensors(folder / "cases.safetensors")
        self.settings: dict[str, dict[str, Any]] = read_json(folder / "cases.json")

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}/cases.safetensors: has no tensor {name}") from None

    def case_names(self) -> list[str]:
        """The cases that have tensors, in a stable order."""
        return sorted({_case_of(name) for name in self.tensors} - {""})

    def dit(self, attention: Attention = "dense", **changes: Any) -> DiT:
        config = DiTConfig.from_json(self.folder / "dit_config.json")
        model = DiT(dataclasses.replace(config, **changes), attention)
        _load(model, self.folder / "dit.safetensors")
        return model

    def vae(self) -> VAE:
        model = VAE(VAEConfig.from_json(self.folder / "vae_config.json"))
        _load(model, self.folder / "vae.safetensors")
        return model

    def text(self, case: str) -> TextCondition:
        names = ("negative_embeds", "negative_mask")
        negative = [self.tensors.get(f"{case}.{name}") for name in names]
        return TextCondition(self[f"{case}.prompt_embeds"], self[f"{case}.prompt_mask"], *negative)

    def one_prompt(self) -> tuple[Tensor, Tensor]:
        """The prompt that cases without one of their own share."""
        return self["dense.y"][:1], self["dense.mask"][:1]


Check = Callable[[Golden, str], Iterator[Finding]]


def run_parity(folder: str | Path) -> list[Finding]:
    """Run every case of a golden folder. A case that this code does not know is a finding that fails."""
    golden = Golden(Path(folder))
    findings: list[Finding] = []
    with torch.no_grad():
        for case in golden.case_names():
            check = _check_for(golden, case)
            if check is None:
                findings.append(Finding(case, "unknown case", float("inf"), 0.0))
            else:
                findings += _run(check, golden, case)
    return findings


def _run(check: Check, golden: Golden, case: str) -> list[Finding]:
    try:
        return list(check(golden, case))
    except KeyError as error:
        raise CheckpointError(f"{golden.folder}/cases.json: case {case} lacks the setting {error}") from None


def check_rope(golden: Golden, case: str) -> Iterator[Finding]:
    q = golden["rope.q"]
    t, h, w = golden.settings[case]["grid_thw"]
    table = rotary_table(0, t, h, w, q.shape[-1], q.device)
    yield _compare(case, "q", rotate(q, table), golden["rope.q_out"])
    yield _compare(case, "k", rotate(golden["rope.k"], table), golden["rope.k_out"])


def check_dense(golden: Golden, case: str) -> Iterator[Finding]:
    inputs = [golden[f"dense.{name}"] for name in ("x", "t", "y", "mask")]
    dit = golden.dit()
    yield _compare(case, "out", dit(*inputs), golden["dense.out"])
    other = golden.dit(text_tokens_zero_pad=not dit.config.text_tokens_zero_pad)
    yield _compare(case, "out_other_text_padding", other(*inputs), golden["dense.out_other_text_padding"])


def check_conditions(golden: Golden, case: str) -> Iterator[Finding]:
    n = golden.settings[case]["num_cond_latents"]
    out = golden.dit()(golden["cond.x"], golden["cond.t"], *golden.one_prompt(), num_cond_latents=n)
    yield _compare(case, "out", out, golden["cond.out"])


def check_cache(golden: Golden, case: str) -> Iterator[Finding]:
    dit, conditions = golden.dit(), golden["kv.cond_x"]
    alone = dit(
        conditions,
        torch.zeros(1),
        *golden.one_prompt(),
        num_cond_latents=golden.settings[case]["num_cond_latents"],
    )
    yield _compare(case, "cond_out", alone, golden["kv.cond_out"])
    cache = dit.build_cond_cache(conditions)
    # The golden keys are those before rotary, which changes no length: errors stay what they are.
    table = rotary_table(0, *cache.grid, dit.config.head_dim, conditions.device)
    for i, layer in enumerate(cache.layers):
        yield _compare(case, f"k.{i} rotated", layer.keys, rotate(golden[f"kv.k.{i}"], table))
        yield _compare(case, f"v.{i}", layer.values, golden[f"kv.v.{i}"])
    out = dit(golden["kv.x"], golden["kv.t"], golden["dense.y"], golden["dense.mask"], cond_cache=cache)
    yield _compare(case, "out", out, golden["kv.out"])


def check_block_sparse(golden: Golden, case: str) -> Iterator[Finding]:
    settings = golden.settings[case]
    q, k, v = (golden[f"bsa.{name}"] for name in "qkv")
    grid_k = _grid(settings.get("k_shape") or settings["latent_shape"])
    grid_q = _grid(settings.get("q_shape") or settings["latent_shape"])
    chunk = _grid(settings.get("chunk", (4, 4, 4)))
    out = block_sparse_attention(
        q[:, :, : grid_q[0] * grid_q[1] * grid_q[2]],
        k,
        v,
        grid_q,
        grid_k,
        sparsity=settings.get("sparsity"),
        cdf_threshold=settings.get("cdf_threshold"),
        chunk_q=chunk,
        chunk_k=chunk,
    )
    yield _compare(case, "out", out, golden[f"{case}.out"])


def check_block_sparse_model(golden: Golden, case: str) -> Iterator[Finding]:
    n = golden.settings.get(case, {}).get("num_cond_latents", 0)
    dit = golden.dit("block_sparse")
    out = dit(golden["model_bsa.x"], golden[f"{case}.t"], *golden.one_prompt(), num_cond_latents=n)
    yield _compare(case, "out", out, golden[f"{case}.out"])


def check_lora(golden: Golden, case: str) -> Iterator[Finding]:
    dit = golden.dit()
    merge_lora(dit, load_lora(golden.folder / "lora.safetensors"), golden.settings[case]["multiplier"])
    out = dit(*(golden[f"dense.{name}"] for name in ("x", "t", "y", "mask")))
    yield _compare(case, "out", out, golden["lora.out"])


def check_int8(golden: Golden, case: str) -> Iterator[Finding]:
    path = golden.settings[case]["layer"]
    linear = golden.dit().get_submodule(path)
    weight_int8, scale = quantize_weight(linear.get_parameter("weight"))
    yield _compare(case, "weight_int8", weight_int8, golden["int8.weight_int8"], tolerance=0.0)
    yield _compare(case, "weight_scale", scale, golden["int8.weight_scale"])
    bias = linear.get_parameter("bias").to(torch.bfloat16)
    layer = QuantLinear(golden["int8.weight_int8"], golden["int8.weight_scale"], bias)
    yield _compare(case, "out", layer(golden["int8.x"]), golden["int8.out"])


def check_schedule(golden: Golden, case: str) -> Iterator[Finding]:
    _, *shift, steps, kind = case.split(".")
    make = distilled_schedule if kind == "distill" else base_schedule
    yield from _compare_schedule(golden, case, make(int(steps), float(".".join(shift).removeprefix("shift"))))


def check_vae(golden: Golden, case: str) -> Iterator[Finding]:
    vae = golden.vae()
    mean, logvar = vae.encode_moments(golden["vae.video"])
    yield _compare(case, "mean", mean, golden["vae.mean"])
    yield _compare(case, "logvar", logvar, golden["vae.logvar"])
    yield _compare(case, "normalized_mean", vae.normalise(mean), golden["vae.normalized_mean"])
    # Decoding amplifies rounding: official fp32 results are themselves up to 4e-6 off exact arithmetic, so
    # two fp32 implementations may differ by more than the tolerance. Hence the largest error is that of this
    # code in fp64, and fp32 is held to the same tolerance in the root mean square.
    exact = golden.vae().double()
    for name, wanted in (("vae.mean", "decoded"), ("vae.latent5", "latent5_decoded")):
        latents, target = exact.normalise(golden[name].double()), golden[f"vae.{wanted}"]
        streamed = torch.cat(list(exact.decode_stream(latents)), dim=2)
        yield _compare(case, f"{wanted} fp64", exact.decode(latents), target)
        yield _compare(case, f"{wanted} fp64 streamed", streamed, target)
        error = vae.decode(vae.normalise(golden[name])) - target
        yield Finding(case, f"{wanted} fp32 rms", float(error.square().mean().sqrt()), ONE_FORWARD)


def check_loop(golden: Golden, case: str) -> Iterator[Finding]:
    settings = golden.settings[case]
    make = distilled_schedule if settings.get("distill") else base_schedule
    if settings.get("enhance_hf"):
        make = enhance_hf_schedule
    schedule = make(settings["steps"], _SHIFT)
    yield from _compare_schedule(golden, case, schedule)
    out = denoise(
        golden.dit(),
        golden[f"{case}.initial_latents"],
        schedule,
        golden.text(case),
        guidance=settings["guidance"],
        num_cond_latents=settings.get("num_cond_latents", 0),
        use_cond_cache=settings.get("kv_cache", False),
    )
    yield _compare(case, "final_latents", out, golden[f"{case}.final_latents"], ONE_LOOP)


def check_refinement(golden: Golden, case: str) -> Iterator[Finding]:
    settings, noise = golden.settings[case], golden[f"{case}.noise"]
    schedule = refinement_schedule(settings["steps"], settings["t_thresh"], _SHIFT)
    yield from _compare_schedule(golden, case, schedule)
    vae, stage_one = golden.vae(), golden[f"{case}.stage1_video"]
    times, size = _official_times(settings, len(stage_one)), (settings["height"], settings["width"])
    padded = _padded_window(golden, case, times, settings["num_cond_frames"])
    video = resample_frames(stage_one, padded, *size)
    name = "upsampled_padded_video_every_4th_pixel"
    yield _compare(
        case, "upsampled video", video[..., ::_PIXEL_STEP, ::_PIXEL_STEP], golden[f"{case}.{name}"]
    )
    whole = 1 + vae.temporal_factor * (noise.shape[2] - 1)
    encoded = vae.encode(video[:, :, :whole])
    yield _compare(case, "encoded", encoded, golden[f"{case}.encoded"])
    start = mix_noise(encoded, noise, schedule.sigmas[0])
    num_cond = 0
    if settings["num_cond_frames"]:
        layout = refine_layout(len(times), settings["num_cond_frames"], vae.temporal_factor)
        num_cond, frames = layout.cond_latents, golden[f"{case}.cond_video"]
        conditions = frames_to_video(torch.cat([frames[:1].expand(layout.front_frames, -1, -1, -1), frames]))
        wanted = golden[f"{case}.cond_padded_video_every_4th_pixel"]
        yield _compare(case, "condition video", conditions[..., ::_PIXEL_STEP, ::_PIXEL_STEP], wanted)
        start[:, :, :num_cond] = vae.encode(conditions)
    yield _compare(case, "initial_latents", start, golden[f"{case}.initial_latents"])
    dit = golden.dit("block_sparse")
    out = denoise(
        dit,
        golden[f"{case}.initial_latents"],
        schedule,
        golden.text(case),
        guidance=1,
        num_cond_latents=num_cond,
    )
    yield _compare(case, "final_latents", out, golden[f"{case}.final_latents"], ONE_LOOP)


def _official_times(settings: Mapping[str, Any], frames: int) -> list[float]:
    """The grid of a single window: ends aligned, twice the frames unless only the size is refined."""
    count = frames if settings["spatial_refine_only"] else 2 * frames
    return [i * (frames - 1) / (count - 1) for i in range(count)]


def _padded_window(golden: Golden, case: str, times: list[float], num_cond_frames: int) -> list[float]:
    """Times of the padded window. Its length is the golden's: without conditions refine_layout differs."""
    total = golden[f"{case}.upsampled_padded_video_every_4th_pixel"].shape[2]
    front = refine_layout(len(times), num_cond_frames).front_frames if num_cond_frames else 0
    return [times[0]] * front + times + [times[-1]] * (total - front - len(times))


_CHECKS: dict[str, Check] = {
    "rope": check_rope,
    "dense": check_dense,
    "cond": check_conditions,
    "kv": check_cache,
    "lora": check_lora,
    "int8": check_int8,
    "vae": check_vae,
}


def _check_for(golden: Golden, case: str) -> Check | None:
    """How to run a case: by name, or by what it consists of."""
    if case in _CHECKS:
        return _CHECKS[case]
    for prefix, check in (
        ("bsa.", check_block_sparse),
        ("sched.", check_schedule),
        ("model_bsa", check_block_sparse_model),
    ):
        if case.startswith(prefix):
            return check
    if f"{case}.stage1_video" in golden.tensors:
        return check_refinement
    return check_loop if f"{case}.initial_latents" in golden.tensors else None


def _case_of(name: str) -> str:
    """The case of a tensor: `bsa.topk.out` -> `bsa.topk`, `kv.k.0` -> `kv`; none for shared `bsa` inputs."""
    parts = name.split(".")
    if parts[0] == "bsa":
        return ".".join(parts[:2]) if len(parts) == 3 else ""
    # Schedules are named after their numbers, which may have a decimal point.
    return ".".join(parts[:-1]) if parts[0] == "sched" else parts[0]


def _compare_schedule(golden: Golden, case: str, schedule: Schedule) -> Iterator[Finding]:
    yield _compare(case, "sigmas", torch.tensor(schedule.sigmas), golden[f"{case}.sigmas"])
    timesteps = torch.tensor(schedule.timesteps) / _TRAINING_STEPS
    yield _compare(case, "timesteps", timesteps, golden[f"{case}.timesteps"] / _TRAINING_STEPS)


def _compare(case: str, what: str, out: Tensor, wanted: Tensor, tolerance: float = ONE_FORWARD) -> Finding:
    if out.shape != wanted.shape:
        return Finding(
            case, f"{what}: {tuple(out.shape)}, wanted {tuple(wanted.shape)}", float("inf"), tolerance
        )
    return Finding(case, what, float((out.double() - wanted.double()).abs().max()), tolerance)


def _grid(values: Any) -> Grid:
    t, h, w = values
    return (t, h, w)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def _load(model: torch.nn.Module, file: Path) -> None:
    report = model.load_state_dict(_read_tensors(file), strict=False)
    if report.missing_keys or report.unexpected_keys:
        problems = [f"{name}: missing" for name in report.missing_keys]
        problems += [f"{name}: unexpected" for name in report.unexpected_keys]
        raise CheckpointError(f"{file}: does not fit its configuration", problems)


def print_table(findings: list[Finding]) -> None:
    """One line for each compared tensor."""
    width = max((len(f"{finding.case} {finding.what}") for finding in findings), default=4)
    print(f"{'case':<{width}}  max error  tolerance  verdict")
    for finding in findings:
        name = f"{finding.case} {finding.what}"
        verdict = "pass" if finding.passed else "FAIL"
        print(f"{name:<{width}}  {finding.error:9.1e}  {finding.tolerance:9.1e}  {verdict}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model.parity", description="Compare this code with golden tensors."
    )
    parser.add_argument("folder", type=Path, help="golden folder")
    folder = parser.parse_args(arguments).folder
    try:
        findings = run_parity(folder)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(findings)
    failed = sum(not finding.passed for finding in findings)
    print(f"{len(findings)} tensors compared, {failed} beyond tolerance")
    return 1 if failed or not findings else 0


if __name__ == "__main__":
    sys.exit(main())
