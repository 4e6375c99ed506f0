"""The door to ffmpeg and Pillow: reading what users bring, encoding units, joining them into films.

    media_child    the ffmpeg binary, and running it as a timed child without a user's names
    media_read     probe, pictures, frames of a film at given moments, sizing
    media_encode   frames into one unit, streamed
    media_film     units into a film: stream copy, sound, recipe, AI-generated mark

Frames are uint8 [n,h,w,3] RGB everywhere. A user's file that cannot be used is an InputFileError, a missing
ffmpeg or encoder a SettingError, and an ffmpeg that fails, hangs or writes a short file a MediaError.
"""

from pipeline.media_child import Ffmpeg, find_ffmpeg
from pipeline.media_encode import ENCODER_THREADS, FrameEncoder, Unit, choose_encoder
from pipeline.media_film import AI_MARK, concatenate, film_so_far, read_recipe, read_tags, strip
from pipeline.media_read import (
    Frames,
    MediaInfo,
    decode_sound,
    fit,
    probe,
    read_image,
    read_video_at,
    tail_times_s,
    verify_video,
)

__all__ = [
    "AI_MARK",
    "ENCODER_THREADS",
    "Ffmpeg",
    "FrameEncoder",
    "Frames",
    "MediaInfo",
    "Unit",
    "choose_encoder",
    "concatenate",
    "decode_sound",
    "film_so_far",
    "find_ffmpeg",
    "fit",
    "probe",
    "read_image",
    "read_recipe",
    "read_tags",
    "read_video_at",
    "strip",
    "tail_times_s",
    "verify_video",
]
