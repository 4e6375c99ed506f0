"""One training loop for every stage: Muon and Adam, warm-up and cosine, a moving average of the weights,
states that resume.

Under `torchrun` every process takes part of each step: a loss function draws the clips of its `share()`, the
gradients are averaged and Muon's matrices are dealt out. The first process writes and speaks.

A state is a safetensors file: weights, their moving average, the optimiser's moments and the step. The loop
itself holds no random state; a loss function draws its batch from the step number, which makes a resumed
run equal to an uninterrupted one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.train.curve import Curve

_SAVE_S = 10.0


@dataclass(frozen=True)
class Plan:
    """How a stage is trained. `minutes` ends a run early (the state is saved); the schedule follows `steps`
    alone. The state is saved each `save_every` steps, but not so often that saving is what takes the time.
    """

    steps: int
    rate: float
    final_rate: float
    warmup_steps: int = 50
    average: float = 0.998
    clip: float = 1.0
    save_every: int = 50
    minutes: float = math.inf

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine from `rate` to `final_rate`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        done = min(1.0, step / max(1, self.steps))
        return warm * (self.final_rate + (self.rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


def processes() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) without `torchrun`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def together() -> Iterator[None]:
    """Whoever `torchrun` started trains with the others: none leaves before all are done, or what it still has to send
    would be lost."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # the first one may measure for hours at the end
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def share(step: int) -> int:
    """A number of its own for each process and step, to draw from."""
    rank, count = processes()
    return step * count + rank


def _sum_over_processes(tensors: list[Tensor], divide_by: int = 1) -> None:
    """Replace tensors by their sum over all processes, divided; one message for all of them."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.div_(divide_by).split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factors of matrices [...,m,n]: five Newton-Schulz steps with the coefficients published
    with Muon (K. Jordan).
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * (square @ square) - 4.7750 * square) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for weight matrices and kernels (as out x rest).

    Scaled so that an entry moves as far as under Adam: one rate serves both.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        rank, count = processes()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates = [torch.zeros_like(p) for p in params]
            # Matrices of one shape go together: one product for all of them costs far less than one for each.
            dealt: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for place, (p, update) in enumerate(zip(params, updates, strict=True)):
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                if place % count == rank:
                    blended = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                    dealt.setdefault(blended.shape, []).append((blended, update))
            for shape, pairs in dealt.items():
                made = orthogonal(torch.stack([blended for blended, _ in pairs])) * (0.2 * max(shape) ** 0.5)
                for one, (_, update) in zip(made, pairs, strict=True):
                    update.copy_(one.view_as(update))
            if count > 1:
                _sum_over_processes(updates)
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def _is_inner_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon suits a parameter: hidden matrices and kernels, not tables, first and last layers or
    adapters.
    """
    outer = ("embed", "shared", "relative_attention_bias", "final_layer", "adaLN", ".down.", ".ups.")
    return weight.ndim >= 2 and min(weight.flatten(1).shape) > 1 and not any(part in name + "." for part in outer)


class Training:
    """The parameters being trained (those that want a gradient), their average and the optimiser."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.step = 0
        self.weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        matrices = [p for name, p in self.weights.items() if _is_inner_matrix(name, p)]
        others = [p for name, p in self.weights.items() if not _is_inner_matrix(name, p)]
        self.optimisers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimisers.append(Muon(matrices, lr=plan.rate))
        if others:
            self.optimisers.append(torch.optim.Adam(others, lr=plan.rate, betas=(0.9, 0.98)))

    def update(self, loss: Tensor) -> float:
        """Backward and one step. Returns the gradient's norm; a step with a non-finite one is left out."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        count = processes()[1]
        if count > 1:
            _sum_over_processes([p.grad for p in self.weights.values() if p.grad is not None], divide_by=count)
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), self.plan.clip))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.plan.rate_at(self.step)
            if math.isfinite(norm):
                optimiser.step()
        self.step += 1
        self._follow()
        return norm

    @torch.no_grad()
    def _follow(self) -> None:
        # Early on the average is short, or it would stay near the random start.
        keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.weights.values()], 1 - keep)

    def save(self, file: Path) -> None:
        """Write the state under a temporary name, then move it into place. The first process does."""
        if processes()[0]:
            return
        tensors = {"step": torch.tensor(self.step)}
        for name, p in self.weights.items():
            tensors["weight." + name] = p.detach()
            tensors["average." + name] = self.average[name]
            for optimiser in self.optimisers:
                for key in {"exp_avg", "exp_avg_sq"} & optimiser.state.get(p, {}).keys():
                    tensors[f"{key}.{name}"] = optimiser.state[p][key]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in tensors.items()}, part)
        os.replace(part, file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Go on from a saved state."""
        tensors = load_file(file)
        self.step = int(tensors["step"])
        for name, p in self.weights.items():
            p.copy_(tensors["weight." + name])
            self.average[name].copy_(tensors["average." + name])
            keys = ("exp_avg", "exp_avg_sq")
            moments = {key: tensors[f"{key}.{name}"].to(p.device) for key in keys if f"{key}.{name}" in tensors}
            if moments:
                # Adam counts its steps; Muon does not mind.
                self._optimiser_of(p).state[p] = {"step": torch.tensor(float(self.step)), **moments}

    def _optimiser_of(self, weight: Tensor) -> torch.optim.Optimizer:
        groups = ((o, group) for o in self.optimisers for group in o.param_groups)
        return next(o for o, group in groups if any(p is weight for p in group["params"]))


@torch.no_grad()
def load_average(module: nn.Module, file: Path) -> int:
    """Give `module` the averaged weights of a state; returns the state's step."""
    wanted = dict(module.named_parameters())
    with safe_open(file, "pt") as state:
        for key in state.keys():  # noqa: SIM118  (not a dict)
            if key.startswith("average."):
                wanted[key.removeprefix("average.")].copy_(state.get_tensor(key))
        return int(state.get_tensor("step"))


class averaged:
    """Inside the block the trained parameters hold their average: `with averaged(training): evaluate()`."""

    def __init__(self, training: Training) -> None:
        self.training = training

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = {name: p.detach().clone() for name, p in self.training.weights.items()}
        for name, p in self.training.weights.items():
            p.copy_(self.training.average[name])

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for name, p in self.training.weights.items():
            p.copy_(self.kept[name])


def _over(started: float, minutes: float) -> bool:
    """Whether the time is up, the same answer in every process."""
    late = torch.tensor(float(time.monotonic() - started >= 60 * minutes))
    if dist.is_initialized():
        dist.broadcast(late, 0)
    return bool(late)


def train(
    training: Training,
    loss_of: Callable[[int], Tensor],
    state: Path | None,
    evaluate: Callable[[int], str] | None = None,
    evaluate_every: int = 500,
    log: Callable[[str], None] = print,
) -> None:
    """Run up to plan.steps steps or plan.minutes minutes. `loss_of(step)` draws the batch of that step and
    returns its loss; `evaluate(step)` measures the average and says what it found. The losses are drawn beside the
    state.
    """
    plan = training.plan
    curve = None if state is None or processes()[0] else Curve(state.with_suffix(".losses"), training.step)
    started, shown, losses = time.monotonic(), time.monotonic(), []
    saved = started
    while training.step < plan.steps and not _over(started, plan.minutes):
        loss = loss_of(training.step)
        norm = training.update(loss)
        losses.append(float(loss.detach()))
        if (training.step % 50 == 0 or training.step == plan.steps) and processes()[0] == 0:
            each_s = (time.monotonic() - shown) / len(losses)
            log(
                f"step {training.step}/{plan.steps} loss {sum(losses) / len(losses):.4f} norm {norm:.2f} "
                f"rate {plan.rate_at(training.step):.1e} {each_s:.2f} s/step "
                f"{(time.monotonic() - started) / 60:.1f} min, {(plan.steps - training.step) * each_s / 60:.1f} to go"
            )
            if curve is not None:
                curve.add(training.step, sum(losses) / len(losses))
            shown, losses = time.monotonic(), []
        if state is not None and training.step % plan.save_every == 0 and time.monotonic() - saved >= _SAVE_S:
            training.save(state)
            saved = time.monotonic()
        if evaluate is not None and training.step % evaluate_every == 0 and training.step < plan.steps:
            _evaluate(training, evaluate, log)
    if state is not None:
        training.save(state)
    if evaluate is not None:
        _evaluate(training, evaluate, log)


def _evaluate(training: Training, evaluate: Callable[[int], str], log: Callable[[str], None]) -> None:
    """In the first process; the others wait for it at their next step."""
    if processes()[0] == 0:
        with averaged(training), torch.no_grad():
            log(f"step {training.step} {evaluate(training.step)}")
