"""A few hostile inputs for every door; `python -m tests.fuzz --inputs 100000` feeds more."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputFileError
from pipeline.media_read import sniff
from tests.fuzz import DISGUISES, bomb, run_all, take_picture


def test_hostile_input_is_taken_or_refused_and_nothing_else() -> None:
    found = run_all(1000)
    assert found["storyboards"][0] >= 300
    assert all(inputs > taken for inputs, taken in found.values()), "some were refused at every door"
    assert found["storyboards"][1] and found["names"][1] and found["pictures"][1], "some were taken"


@pytest.mark.parametrize("number", range(len(DISGUISES)))
def test_what_would_open_another_file_is_refused_whatever_its_name(tmp_path: Path, number: int) -> None:
    for name in ("film.mp4", "film.mkv", "sound.wav", "picture.png"):
        (tmp_path / name).write_bytes(DISGUISES[number])
        with pytest.raises(InputFileError):
            sniff(tmp_path / name)


def test_a_picture_that_says_it_is_huge_is_refused(tmp_path: Path) -> None:
    assert not take_picture(bomb(60_000, 60_000), tmp_path)
