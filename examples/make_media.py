"""Draws the media that the example storyboards start from: `python examples/make_media.py`. Repeatable.

examples/media/red_circle.png    a red circle on a clear day
examples/media/clip.mp4          three seconds of a red circle moving to the right, at 24 frames/s
examples/media/soundtrack.wav    eight seconds of four soft chords
"""

from __future__ import annotations

import sys
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import world  # noqa: E402
from pipeline.media import FrameEncoder, Frames, find_ffmpeg  # noqa: E402
from pipeline.params import CodecParams  # noqa: E402

HEIGHT_PX, WIDTH_PX = 256, 384
CLIP_FPS, CLIP_FRAMES = Fraction(24), 72
CLIP_CODEC: CodecParams = {"codec": "h264", "pix_fmt": "yuv420p", "crf": 12, "container": "mp4"}

SOUND_HZ, CHORD_S = 48_000, 2.0
CHORDS_HZ = (
    (220.0, 277.18, 329.63),
    (174.61, 220.0, 261.63),
    (196.0, 246.94, 293.66),
    (164.81, 207.65, 246.94),
)

CIRCLE = world.Mover("circle", "red", "right", "slowly", radius=0.2, x=0.45, y=0.45)
DAY = world.Film(world.Scene("day", (CIRCLE,)), detail=11)


def draw(frames: int) -> Frames:
    """The first frames of the film, uint8 [n,h,w,3]."""
    times_s = world.frame_times(frames, float(CLIP_FPS))
    drawn, _ = world.render(DAY, times_s, HEIGHT_PX, WIDTH_PX)
    levels = ((drawn + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def write_clip(path: Path) -> None:
    """The moving circle as an H.264 film."""
    with FrameEncoder(
        path, height_px=HEIGHT_PX, width_px=WIDTH_PX, fps=CLIP_FPS, codec=CLIP_CODEC, ffmpeg=find_ffmpeg()
    ) as encoder:
        encoder.write(draw(CLIP_FRAMES))
        encoder.close()


def chord(notes_hz: tuple[float, ...]) -> np.ndarray:
    """A chord of sines that swells and dies away, int16 [samples]."""
    t = np.arange(round(CHORD_S * SOUND_HZ)) / SOUND_HZ
    swell = np.sin(np.pi * t / CHORD_S) ** 2
    tones = sum(np.sin(2 * np.pi * hz * t) for hz in notes_hz)
    return np.round(6000 * swell * tones / len(notes_hz)).astype("<i2")


def write_soundtrack(path: Path) -> None:
    """The chords, one after the other, as a mono WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_HZ)
        file.writeframes(b"".join(chord(notes).tobytes() for notes in CHORDS_HZ))


def main() -> None:
    folder = ROOT / "examples" / "media"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(1)[0]).save(folder / "red_circle.png")
    write_clip(folder / "clip.mp4")
    write_soundtrack(folder / "soundtrack.wav")
    print(f"wrote red_circle.png, clip.mp4 and soundtrack.wav into {folder}")


if __name__ == "__main__":
    main()
