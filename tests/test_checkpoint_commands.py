"""`longtake checkpoint`: what a converted folder must hold for every storyboard to find its weights."""

from __future__ import annotations

from pathlib import Path

from cluster.checkpoints import convert_checkpoint, role_loras
from model.checkpoint import find_dit


def test_each_quality_finds_its_weights_in_a_converted_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> None:
    target = tmp_path / "converted"
    assert convert_checkpoint(tiny_checkpoint, target, "int8") == 0
    roles = role_loras(tiny_checkpoint)
    assert set(roles) == {"full", "draft", "refine"}
    for role, loras in roles.items():
        assert find_dit(target, loras) == (target / "roles" / role / "base_model_int8", [])
