"""Converting to role-merged weights, and verifying folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import random_state, write_checkpoint, write_weights
from safetensors.torch import load_file, save_file

import model.convert
from model.checkpoint import find_dit, load_dit, load_vae
from model.config import DiTConfig
from model.convert import convert
from model.digest import digest
from model.dit import DiT
from model.errors import CheckpointError, InputError
from model.lora import load_lora, merge_lora
from model.manifest import is_checkpoint, read_manifest
from model.quantize import QuantLinear, quantize_
from model.verify import verify

CPU = {"device": "cpu", "dtype": torch.float32}
BF16 = {"device": "cpu", "dtype": torch.bfloat16}
ROOT = Path(__file__).parent.parent
SECOND = "diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def source(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "source")


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"


def loras_of(folder: Path) -> dict[str, list[tuple[Path, float]]]:
    distilled, refinement = (
        folder / "lora" / "cfg_step_lora.safetensors",
        folder / "lora" / "refinement_lora.safetensors",
    )
    return {"base": [], "distilled": [(distilled, 1.0)], "both": [(distilled, 1.0), (refinement, 0.5)]}


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_converted_roles_load_as_merging_at_load_time(source, target, name, dtype):
    convert(source, target, role_loras=loras_of(source), dtype=name)
    for role, loras in loras_of(source).items():
        merged = load_dit(source, device="cpu", dtype=dtype, loras=loras)
        assert_same(
            load_dit(target, device="cpu", dtype=dtype, loras=loras_of(target)[role], role=role), merged
        )
    stored = load_file(target / "roles" / "both" / "dit" / SECOND)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert_same(load_vae(target, **CPU), load_vae(source, **CPU))


def test_int8_roles_hold_the_quantised_merged_weights(source, target):
    loras = loras_of(source)
    convert(source, target, role_loras=loras, dtype="int8")
    loaded = load_dit(target, **BF16, loras=loras["both"], role="both")
    network = load_dit(source, **CPU)
    for file, strength in loras["both"]:
        merge_lora(network, load_lora(file), strength)
    quantize_(network)
    state = network.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert isinstance(loaded.get_submodule("blocks.1.ffn.w2"), QuantLinear)
    files = (target / "roles" / "both" / "base_model_int8").glob("*.safetensors")
    assert not list((target / "roles" / "both").glob("dit"))
    assert sum(file.stat().st_size for file in files) < 0.3 * sum(
        t.nbytes for t in load_dit(source, **CPU).parameters()
    )


def test_manifest_says_what_was_made_of_what(source, target):
    manifest = convert(source, target, role_loras=loras_of(source))
    assert manifest == read_manifest(target)
    assert manifest.dtype == "bf16"
    assert manifest.source == {"digest": digest(source), "folder": "source"}
    assert [(lora.file, lora.strength) for lora in manifest.roles["both"]] == [
        ("lora/cfg_step_lora.safetensors", 1.0),
        ("lora/refinement_lora.safetensors", 0.5),
    ]
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert there == {*manifest.files, "manifest.json"}
    assert {"LICENSE", "render.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"} <= there


def test_unchanged_parts_take_no_space_on_the_same_disk(source, target):
    convert(source, target, role_loras={"base": []})
    for name in ("vae/diffusion_pytorch_model.safetensors", "lora/cfg_step_lora.safetensors"):
        assert os.path.samefile(source / name, target / name)


def test_parts_are_copied_where_links_are_impossible(source, target, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    convert(source, target, role_loras={"base": []})
    assert not os.path.samefile(source / "render.json", target / "render.json")
    assert verify(target).manifest is not None


def test_single_file_source_gives_single_file_roles(source, target):
    state = random_state(load_dit(source, **CPU), 7)
    config = json.loads((source / "dit" / "config.json").read_text())
    shutil.rmtree(source / "dit")
    write_weights(source / "dit", state, config)
    convert(source, target, role_loras={"base": []}, dtype="fp32")
    names = {path.name for path in (target / "roles" / "base" / "dit").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert_same(load_dit(target, **CPU, role="base"), load_dit(source, **CPU))


# Choosing a role


def test_the_role_is_found_by_its_loras_whatever_its_name(source, target):
    loras = loras_of(source)
    convert(source, target, role_loras=loras, dtype="fp32")
    distilled, refinement = loras["both"]
    for wanted, role, remaining in [
        ([], "base", []),
        ([distilled], "distilled", []),
        ([distilled, refinement], "both", []),
        ([distilled, (refinement[0], 0.7)], "distilled", [(refinement[0], 0.7)]),
        ([refinement], "base", [refinement]),
        ([(distilled[0], 0.9)], "base", [(distilled[0], 0.9)]),
    ]:
        assert find_dit(target, wanted, "chain") == (target / "roles" / role / "dit", remaining)
        assert_same(load_dit(target, **CPU, loras=wanted), load_dit(source, **CPU, loras=wanted))


def test_role_name_decides_between_equal_weights(source, target):
    convert(source, target, role_loras={"chain": [], "refine": []})
    for role in ("chain", "refine"):
        assert find_dit(target, [], role)[0] == target / "roles" / role / "dit"


def test_weights_with_unwanted_loras_are_refused_with_what_is_there(source, target):
    loras = loras_of(source)
    convert(source, target, role_loras={"distilled": loras["distilled"]})
    with pytest.raises(
        CheckpointError, match=r"distilled \(lora/cfg_step_lora.safetensors x 1\).*serve no LoRA"
    ):
        load_dit(target, **BF16)


# Interruption


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_file_gets_its_name_only_after_its_bytes_are_on_the_disk(source, target, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def record_replace(old: Path, new: Path) -> None:
        steps.append(("rename", str(old)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    convert(source, target, role_loras={"base": []})
    written = [path for kind, path in steps if kind == "rename" and "roles" in path]
    assert len(written) == 5
    for path in written:
        place = steps.index(("rename", path))
        assert ("fsync", path) in steps[:place]
        assert steps[place + 1] == ("fsync", str(Path(path).parent))
    assert steps[-2] == ("rename", str(target / "manifest.json.partial"))


class Stop(Exception):
    pass


def stop_at(shard: str):
    def progress(what: str, done: int, total: int) -> None:
        if what == shard and done < total:
            raise Stop

    return progress


def converted_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_interrupted_conversion_goes_on_after_the_last_finished_shard(source, target, tmp_path, monkeypatch):
    loras = loras_of(source)
    convert(source, tmp_path / "whole", role_loras=loras)
    remembered = model.convert.digest(source)
    monkeypatch.setattr(model.convert, "digest", lambda *_, **__: remembered)
    with pytest.raises(Stop):
        convert(source, target, role_loras=loras, progress=stop_at(SECOND))
    assert not list(target.rglob("*.partial"))
    assert not (target / "manifest.json").exists()
    first = target / "roles" / "both" / "dit" / SECOND.replace("00002", "00001")
    written = first.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="conversion was not finished"):
        load_dit(target, **BF16, loras=loras["both"], role="both")
    convert(source, target, role_loras=loras)
    assert first.stat().st_mtime_ns == written
    assert converted_bytes(target) == converted_bytes(tmp_path / "whole")


def test_leftovers_of_a_killed_conversion_do_no_harm(source, target, tmp_path):
    convert(source, tmp_path / "whole", role_loras={"base": []})
    code = """
import os, sys
import model.shards
from model.convert import convert
replace, count = os.replace, 0
def die(*args):
    global count
    count += "roles" in str(args[0])
    os._exit(9) if count == 2 else replace(*args)
model.shards.os.replace = die
convert(sys.argv[1], sys.argv[2], role_loras={"base": []})
"""
    command = [sys.executable, "-c", code, str(source), str(target)]
    result = subprocess.run(command, capture_output=True, timeout=240, cwd=ROOT)
    assert result.returncode == 9, result.stderr
    assert list(target.rglob("*.partial"))
    assert not (target / "manifest.json").exists()
    convert(source, target, role_loras={"base": []})
    assert converted_bytes(target) == converted_bytes(tmp_path / "whole")


def test_finished_conversion_is_not_repeated(source, target):
    first = convert(source, target, role_loras={"base": []})
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert convert(source, target, role_loras={"base": []}) == first
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == times
    (target / "roles" / "base" / "dit" / SECOND).unlink()
    with pytest.raises(CheckpointError, match="files are damaged"):
        convert(source, target, role_loras={"base": []})


def test_target_with_something_else_is_left_alone(source, target, monkeypatch):
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(source, target, role_loras={"base": []})
    (target / "thesis.txt").unlink()
    convert(source, target, role_loras={"base": []})
    with pytest.raises(CheckpointError, match="holds another conversion"):
        convert(source, target, role_loras={"base": []}, dtype="fp32")
    (target / "manifest.json").unlink()
    (target / ".convert.json").write_text('{"job": {}, "files": {}}')
    with pytest.raises(CheckpointError, match="unfinished conversion with other arguments"):
        convert(source, target, role_loras={"base": []})


def test_write_error_is_one_clear_message(source, target, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(target / "x"))

    monkeypatch.setattr(model.convert, "write_text", full)
    with pytest.raises(CheckpointError, match=r"x: cannot be written \(No space left on device\); run again"):
        convert(source, target, role_loras={"base": []})


def test_too_small_a_disk_stops_the_conversion_before_it_starts(source, target, monkeypatch):
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs .* GB, its disk has 0\.0 GB free"):
        convert(source, target, role_loras={"base": []})
    assert not target.exists()


# Bad requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role_loras": {}}, "no role"),
        ({"role_loras": {"../x": []}}, "is no role name"),
        ({"role_loras": {"base": []}, "dtype": "fp8"}, "'fp8' is none of bf16, fp16, fp32, int8"),
    ],
)
def test_bad_arguments_are_refused(source, target, arguments, message):
    with pytest.raises(InputError, match=message):
        convert(source, target, **arguments)
    with pytest.raises(InputError, match="lies in the source"):
        convert(source, source / "converted", role_loras={"base": []})


def test_converting_a_converted_folder_or_none_is_refused(source, target, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        convert(tmp_path / "nowhere", target, role_loras={"base": []})
    convert(source, target, role_loras={"base": []})
    with pytest.raises(CheckpointError, match="is converted already"):
        convert(target, tmp_path / "again", role_loras={"base": []})


def test_incomplete_source_and_foreign_lora_are_refused_before_anything_is_written(source, target, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not a LoRA file"):
        convert(source, target, role_loras={"base": [(tmp_path / "x.safetensors", 1.0)]})
    (source / "dit" / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND}: missing"):
        convert(source, target, role_loras={"base": []})
    assert not target.exists()


def test_progress_of_the_conversion_reaches_the_end(source, target):
    calls = []
    convert(source, target, role_loras=loras_of(source), progress=lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2] > 0


# Verifying


def test_good_folders_pass(source, target):
    found = verify(source, values=True)
    assert (found.manifest, found.digest) == (None, None)
    assert found.files > 8
    convert(source, target, role_loras=loras_of(source))
    assert verify(target, values=True).digest == digest(target)


def test_a_checkpoint_is_known_again_without_reading_it_unless_it_was_changed(source, target, monkeypatch):
    convert(source, target, role_loras=loras_of(source))
    planned, weights = digest(target), next(target.glob("roles/*/dit/*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr("model.manifest.file_hashes", lambda folder, names: dict.fromkeys(names, "read"))
        patch.setattr("model.manifest.digest", lambda folder: "read")
        assert is_checkpoint(target, planned), "as its manifest says"
    assert not is_checkpoint(target, "0" * 64)
    times, whole = weights.stat(), weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not is_checkpoint(target, planned), "younger than the manifest, so it is read"
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert is_checkpoint(target, digest(target)), "the bytes decide where the manifest is of other ones"


def test_flipped_bit_is_found_by_the_manifest(source, target):
    convert(source, target, role_loras={"base": []}, dtype="int8")
    name = f"roles/base/base_model_int8/{SECOND}"
    content = bytearray((target / name).read_bytes())
    content[-1] ^= 1
    stamp = (target / name).stat()
    (target / name).write_bytes(bytes(content))
    os.utime(target / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(CheckpointError, match="is damaged or incomplete") as caught:
        verify(target)
    assert caught.value.problems == [f"{name}: is damaged, its sha256 is not the manifest's"]


def test_missing_resized_and_added_files_are_all_listed(source, target):
    convert(source, target, role_loras={"base": []})
    (target / "scheduler" / "scheduler_config.json").unlink()
    (target / "render.json").write_text("{}")
    (target / "tokenizer" / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        verify(target)
    assert sorted(caught.value.problems) == [
        "render.json: has 2 bytes, wanted 14",
        "render.json: is damaged, its sha256 is not the manifest's",
        "scheduler/scheduler_config.json: missing",
        "tokenizer/extra.json: is not in the manifest",
    ]


def test_structure_is_checked_without_a_manifest(source):
    vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    vae["extra"] = vae.pop("quant_conv.bias")
    save_file(vae, source / "vae" / "diffusion_pytorch_model.safetensors")
    (source / "dit" / SECOND).unlink()
    text = load_file(source / "text_encoder" / "model.safetensors")
    text["shared.weight"] = text["shared.weight"][:-1].clone()
    save_file(text, source / "text_encoder" / "model.safetensors")
    shutil.rmtree(source / "tokenizer")
    with pytest.raises(CheckpointError) as caught:
        verify(source)
    assert [problem.split(" [")[0] for problem in sorted(caught.value.problems)] == [
        f"dit: {SECOND}: missing, diffusion_pytorch_model.safetensors.index.json lists it",
        "text_encoder: wrong shape: shared.weight is",
        "tokenizer/: missing",
        "vae: missing: quant_conv.bias",
        "vae: unexpected: extra",
    ]


def test_lora_for_another_network_is_found(source):
    file = source / "lora" / "refinement_lora.safetensors"
    tensors = {name.replace("ffn", "mlp"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        verify(source)
    assert caught.value.problems == [f"{file.relative_to(source)}: blocks.1.mlp.w2: no such weight"]


def test_nan_is_found_on_request(source):
    file = source / "dit" / SECOND
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file)
    verify(source)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        verify(source, values=True)


# Memory

MEASURE = """
import sys
from pathlib import Path
import torch
from model.convert import convert
from model.quantize import quantize_

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

with torch.device("meta"):
    quantize_(torch.nn.Sequential(torch.nn.Linear(2, 2)))  # brings in what torch loads when first needed
before = status("VmRSS")
convert(sys.argv[1], sys.argv[2], role_loras={"base": [], "other": []}, dtype="int8")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_converting_needs_the_memory_of_a_few_tensors(tmp_path):
    config = {"hidden_size": 1024, "depth": 4, "num_heads": 8, "caption_channels": 64, "adaln_tembed_dim": 64}
    with torch.device("meta"):
        network = DiT(DiTConfig.from_json(config))
    state = {name: torch.full(tensor.shape, 0.5) for name, tensor in network.state_dict().items()}
    write_weights(tmp_path / "source" / "dit", state, config, 2)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / "target")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    largest = max(tensor.nbytes for tensor in state.values())
    assert sum(tensor.nbytes for tensor in state.values()) > 20 * largest
    assert int(result.stdout) < 10 * largest
