"""The drawn world that the bundled checkpoint learns from: coloured shapes that move over a backdrop, with
captions.

A film is a continuous description (positions in picture heights, times in seconds), so the same film can be
drawn at any size and frame rate; coarse and refined pairs come from one description. The world is a torus:
a shape that leaves on one side comes back on the other, so a film never ends. Everything is drawn
analytically, antialiased, for all frames at once.

A film may change once: from `change_s` on, directions, speeds, colours and the backdrop go over to those of
`after`. That is what teaches a model to follow a prompt that changes in the middle of a take.

Combinations of kind, colour and direction that `is_held_out` names never occur in training films; they are
for measuring.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.98, 0.90, 0.16),
    "green": (0.08, 0.62, 0.18),
    "blue": (0.08, 0.22, 0.88),
    "purple": (0.52, 0.12, 0.70),
    "pink": (1.00, 0.50, 0.74),
    "white": (0.98, 0.98, 0.98),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slowly": 0.16, "quickly": 0.48}  # picture heights per second
BACKDROPS = ("day", "sunset", "night", "snow")
ASPECT = 1.5  # width of the world in picture heights
FADE_S = 1.0  # how long a change of colour or backdrop takes

_PLACE = {
    "day": ("on a clear day", "on a sunny day", "in a blue day sky"),
    "sunset": ("at sunset", "in front of a sunset", "in the evening light of a sunset"),
    "night": ("at night", "in a starry night sky", "on a dark night"),
    "snow": ("in the snow", "while snow falls", "over a snowy field"),
}
_TEMPLATES = (
    "{shapes} {place}",
    "{shapes} {place}",
    "{place}, {shapes}",
    "a film of {shapes} {place}",
    "{shapes}, {place}, one long take",
)


@dataclass(frozen=True)
class Mover:
    """One shape. `x`, `y`, `radius` in picture heights, `x`, `y` at time 0."""

    kind: str
    colour: str
    direction: str
    speed: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a caption describes: shapes over a backdrop."""

    backdrop: str
    movers: tuple[Mover, ...]


@dataclass(frozen=True)
class Film:
    """A scene for ever, or until `change_s`, when `after` begins. `detail` seeds clouds, stars and flakes."""

    scene: Scene
    detail: int
    change_s: float | None = None
    after: Scene | None = None


def is_held_out(mover: Mover) -> bool:
    """Whether this combination of kind, colour and direction is kept out of training films (16 of 128)."""
    kind, colour = KINDS.index(mover.kind), list(COLOURS).index(mover.colour)
    return (colour + 2 * kind + 3 * list(DIRECTIONS).index(mover.direction)) % 8 == 0


def draw_mover(rng: random.Random, held_out: bool) -> Mover:
    """A random shape, of a combination that is held out or of one that is not."""
    while True:
        mover = Mover(
            kind=rng.choice(KINDS),
            colour=rng.choice(list(COLOURS)),
            direction=rng.choice(list(DIRECTIONS)),
            speed=rng.choice(list(SPEEDS)),
            radius=rng.uniform(0.15, 0.25),
            x=rng.uniform(0.0, ASPECT),
            y=rng.uniform(0.0, 1.0),
        )
        if is_held_out(mover) == held_out:
            return _in_view(mover)


def _in_view(mover: Mover) -> Mover:
    """The mover on a path that does not run along the torus's seam, where it would be seen in halves for ever."""
    if DIRECTIONS[mover.direction][0]:
        return replace(mover, y=0.25 + 0.5 * mover.y)
    return replace(mover, x=0.25 + (ASPECT - 0.5) / ASPECT * mover.x)


def draw_film(seed: int, *, held_out: bool = False, two_shapes: float = 0.3, change_s: float | None = None) -> Film:
    """The film of a seed. `two_shapes`: how likely a second shape is. `change_s`: when the film changes, if it
    does.
    """
    rng = random.Random(seed)
    movers = [draw_mover(rng, held_out)]
    if rng.random() < two_shapes:
        movers.append(_second_mover(rng, movers[0], held_out))
    film = Film(Scene(rng.choice(BACKDROPS), tuple(movers)), rng.randrange(1 << 30))
    if change_s is None:
        return film
    return replace(film, change_s=change_s, after=_changed(rng, film.scene, held_out))


def _second_mover(rng: random.Random, first: Mover, held_out: bool) -> Mover:
    """A shape of another colour that starts on the other side of the torus."""
    while True:
        other = draw_mover(rng, held_out)
        if other.colour != first.colour and other.kind != first.kind:
            x, y = (first.x + 0.75) % ASPECT, (first.y + 0.5) % 1.0
            return _in_view(replace(other, x=x, y=y, radius=min(other.radius, 0.2)))


def _changed(rng: random.Random, scene: Scene, held_out: bool) -> Scene:
    """The scene with the direction and speed, the colour or the backdrop of one part made new."""
    what = rng.choice(("motion", "motion", "colour", "backdrop"))
    if what == "backdrop":
        return replace(scene, backdrop=rng.choice([b for b in BACKDROPS if b != scene.backdrop]))
    index = rng.randrange(len(scene.movers))
    while True:
        drawn = draw_mover(rng, held_out)
        if what == "motion":
            mover = replace(scene.movers[index], direction=drawn.direction, speed=drawn.speed)
        else:
            mover = replace(scene.movers[index], colour=drawn.colour)
        colours = {m.colour for i, m in enumerate(scene.movers) if i != index}
        if mover != scene.movers[index] and is_held_out(mover) == held_out and mover.colour not in colours:
            return replace(scene, movers=(*scene.movers[:index], mover, *scene.movers[index + 1 :]))


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words; with a generator in one of many wordings, without in the plain one."""
    phrases = [_phrase(mover, rng) for mover in scene.movers]
    shapes = " and ".join(phrases)
    if rng is None:
        return f"{shapes} {_PLACE[scene.backdrop][0]}"
    words = rng.choice(_TEMPLATES).format(shapes=shapes, place=rng.choice(_PLACE[scene.backdrop]))
    words = words[0].upper() + words[1:] if rng.random() < 0.5 else words
    return words + "." if rng.random() < 0.5 else words


def _phrase(mover: Mover, rng: random.Random | None) -> str:
    article = "an" if mover.colour[0] in "aeiou" else "a"
    name = f"{article} {mover.colour} {mover.kind}"
    plain = f"{name} moving {mover.speed} {_heading(mover.direction)}"
    if rng is None:
        return plain
    pace = {"slowly": ("slowly", "gently"), "quickly": ("quickly", "fast")}[mover.speed]
    return rng.choice(
        (
            plain,
            f"{name} moves {mover.direction} {rng.choice(pace)}",
            f"{name} {rng.choice(pace)} moving {_heading(mover.direction)}",
            f"{name} travelling {mover.direction} {rng.choice(pace)}",
        )
    )


def _heading(direction: str) -> str:
    return f"to the {direction}" if direction in ("left", "right") else direction


def frame_times(frames: int, fps: float, start_s: float = 0.0) -> Tensor:
    """[F] seconds of consecutive frames."""
    return start_s + torch.arange(frames, dtype=torch.float64) / fps


def render(film: Film, times_s: Tensor, height_px: int, width_px: int) -> tuple[Tensor, Tensor]:
    """Frames [F,3,h,w] in [-1,1] and masks [F,h,w] in [0,1] (how much of a pixel shapes cover) at the given
    times.
    """
    change_s = math.inf if film.change_s is None else film.change_s
    after = film.after or film.scene
    fade = ((times_s - change_s) / FADE_S).clamp(0.0, 1.0).float().view(-1, 1, 1, 1)
    frames = _backdrop(film.scene.backdrop, film.detail, times_s, height_px, width_px)
    if after.backdrop != film.scene.backdrop and bool(fade.any()):
        frames = torch.lerp(frames, _backdrop(after.backdrop, film.detail, times_s, height_px, width_px), fade)
    frames = frames.expand(len(times_s), 3, height_px, width_px)
    mask = torch.zeros(len(times_s), height_px, width_px)
    for mover, later in zip(film.scene.movers, after.movers, strict=True):
        cover, paint = _draw_mover(mover, later, times_s, change_s, fade, height_px, width_px)
        frames = torch.lerp(frames, paint, cover.unsqueeze(1))
        mask = torch.maximum(mask, cover)
    return frames * 2.0 - 1.0, mask


def _draw_mover(
    mover: Mover, later: Mover, times_s: Tensor, change_s: float, fade: Tensor, height_px: int, width_px: int
) -> tuple[Tensor, Tensor]:
    """Coverage [F,h,w] and colour [F,3,h,w] of one shape."""
    dx, dy = _offsets(mover, later, times_s, change_s, height_px, width_px)
    distance = _distance(mover.kind, dx, dy, mover.radius)
    cover = (0.5 - distance * height_px).clamp(0.0, 1.0)
    base = torch.tensor(COLOURS[mover.colour]).view(1, 3, 1, 1)
    base = torch.lerp(base, torch.tensor(COLOURS[later.colour]).view(1, 3, 1, 1), fade)
    # A darker rim keeps every colour apart from every backdrop.
    rim = ((distance + 0.025) * 40.0).clamp(0.0, 1.0).unsqueeze(1)
    return cover, base * (1.0 - 0.45 * rim)


def _offsets(
    mover: Mover, later: Mover, times_s: Tensor, change_s: float, height_px: int, width_px: int
) -> tuple[Tensor, Tensor]:
    """Offsets of the pixel centres from the shape's centre, the short way round the torus: [F,1,w] and
    [F,h,1].
    """
    before_s, after_s = times_s.clamp_max(change_s), (times_s - change_s).clamp_min(0.0)
    axes = []
    for axis, (start, size, pixels) in enumerate(((mover.x, ASPECT, width_px), (mover.y, 1.0, height_px))):
        first = DIRECTIONS[mover.direction][axis] * SPEEDS[mover.speed]
        then = DIRECTIONS[later.direction][axis] * SPEEDS[later.speed]
        centre = start + first * before_s + then * after_s
        grid = (torch.arange(pixels, dtype=torch.float64) + 0.5) * (size / pixels)
        axes.append(((grid - centre[:, None] + size / 2) % size - size / 2).float())
    return axes[0][:, None, :], axes[1][:, :, None]


def _distance(kind: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Signed distance to the outline, negative inside. Squares and triangles are scaled to look as large as
    circles.
    """
    if kind == "circle":
        return torch.sqrt(dx * dx + dy * dy) - radius
    if kind == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.86 * radius
    if kind == "triangle":
        low, slope = dy - 0.55 * radius, math.sqrt(3.0) / 2
        return torch.maximum(low, slope * dx.abs() - 0.5 * dy - 0.55 * radius)
    return _star_distance(dx, dy, 1.2 * radius)


def _star_distance(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Five points, the inner corners at 0.45 of the radius: distance to the edge of the sector a point lies
    in.
    """
    length = torch.sqrt(dx * dx + dy * dy)
    sector = 2.0 * math.pi / 5
    angle = torch.atan2(dx, -dy)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    px, py = length * torch.sin(angle), length * torch.cos(angle)
    inner = 0.45 * radius
    ex, ey = inner * math.sin(sector / 2), inner * math.cos(sector / 2) - radius
    norm = math.hypot(ex, ey)
    return (-ey * px + ex * (py - radius)) / norm


def _backdrop(name: str, detail: int, times_s: Tensor, height_px: int, width_px: int) -> Tensor:
    """[1 or F,3,h,w] in [0,1]."""
    rng = random.Random(detail)
    x = (torch.arange(width_px) + 0.5) * (ASPECT / width_px)
    y = (torch.arange(height_px) + 0.5) / height_px
    sky_top, sky_low, ground = _PALETTES[name]
    picture = _mix(_rgb(sky_top), _rgb(sky_low), y.view(1, 1, -1, 1)).expand(1, 3, height_px, width_px)
    light_x, light_y = rng.uniform(0.3, 1.2), rng.uniform(0.14, 0.3)
    for cx, cy, size, colour, edge in _lights(name, light_x, light_y, rng):
        distance = torch.sqrt((x[None, :] - cx) ** 2 + (y[:, None] - cy) ** 2) - size
        picture = _mix(picture, _rgb(colour), (0.5 - distance / edge).clamp(0.0, 1.0))
    if name == "night":
        picture = _mix(picture, _rgb((1.0, 1.0, 0.9)), _dots(x, y, _places(rng, 12, 0.6), 0.012)[None] * 0.8)
    hill = 0.82 + 0.035 * torch.sin(2 * math.pi * x / ASPECT * rng.choice((1, 2)) + rng.uniform(0, 6.28))
    picture = _mix(picture, _rgb(ground), ((y[:, None] - hill[None, :]) * 48 + 0.5).clamp(0.0, 1.0))
    if name == "snow":
        flakes = _falling(x, y, _places(rng, 10, 1.0), times_s)
        picture = _mix(picture, _rgb((1.0, 1.0, 1.0)), flakes.unsqueeze(1) * 0.85)
    return picture


_PALETTES = {
    "day": ((0.36, 0.68, 0.95), (0.74, 0.90, 0.98), (0.42, 0.70, 0.30)),
    "sunset": ((0.34, 0.20, 0.46), (0.99, 0.58, 0.34), (0.22, 0.14, 0.18)),
    "night": ((0.02, 0.03, 0.12), (0.10, 0.12, 0.30), (0.04, 0.08, 0.08)),
    "snow": ((0.50, 0.58, 0.68), (0.72, 0.78, 0.84), (0.92, 0.94, 0.97)),
}


def _lights(
    name: str, x: float, y: float, rng: random.Random
) -> list[tuple[float, float, float, tuple[float, float, float], float]]:
    """Sun, moon or clouds: centre, radius, colour and softness of the edge, in picture heights."""
    if name == "day":
        return [(x, y, 0.07, (1.0, 0.96, 0.62), 0.03)]
    if name == "sunset":
        return [(x, 0.62 + y / 3, 0.22, (1.0, 0.72, 0.36), 0.16), (x, 0.62 + y / 3, 0.12, (1.0, 0.90, 0.55), 0.03)]
    if name == "night":
        return [(x, y, 0.08, (0.90, 0.91, 0.82), 0.03)]
    return []


def _places(rng: random.Random, count: int, depth: float) -> Tensor:
    """[count,2] random points, x over the world and y down to `depth`."""
    return torch.tensor([(rng.uniform(0, ASPECT), rng.uniform(0, depth)) for _ in range(count)])


def _dots(x: Tensor, y: Tensor, places: Tensor, size: float) -> Tensor:
    """[h,w] soft dots."""
    columns = torch.exp(-(((x[None] - places[:, :1]) / size) ** 2))
    rows = torch.exp(-(((y[None] - places[:, 1:]) / size) ** 2))
    return torch.einsum("nh,nw->hw", rows, columns).clamp_max(1.0)


def _falling(x: Tensor, y: Tensor, places: Tensor, times_s: Tensor, size: float = 0.022) -> Tensor:
    """[F,h,w] flakes that fall for ever at 0.2 heights a second."""
    columns = torch.exp(-(((x[None] - places[:, :1]) / size) ** 2))
    fallen = (places[None, :, 1:] + 0.2 * times_s[:, None, None]) % 1.0
    away = ((y - fallen + 0.5) % 1.0 - 0.5).float()
    return torch.einsum("fnh,nw->fhw", torch.exp(-((away / size) ** 2)), columns).clamp_max(1.0)


def _rgb(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1)


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + (b - a) * share
