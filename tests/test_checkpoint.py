"""Loading: shards, names and shapes, damaged and foreign files, LoRAs, memory; and the folder's digest."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_folders import write_checkpoint, write_dit, write_lora, write_vae, write_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_checkpoint
from torch import nn

import model.digest
from model import weights as weights_module
from model.checkpoint import load_dit, load_text, load_vae
from model.digest import checkpoint_files, digest, file_sha256, require_disk_space
from model.errors import CheckpointError
from model.lora import load_lora, merge_lora
from model.quantize import QuantLinear, choose_products_, quantize_
from model.shards import ShardWriter, iter_tensors, read_header
from model.weights import load_weights

CPU = {"device": "cpu", "dtype": torch.float32}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
FIRST, SECOND = (f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoint"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 2, bias=False)


def net_on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def net_state() -> dict[str, torch.Tensor]:
    return {name: torch.randn(tensor.shape) for name, tensor in Net().state_dict().items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_bit_for_bit_in_the_target_type(folder, shards, dtype):
    state = net_state()
    write_weights(folder, state, {}, shards)
    net = net_on_meta()
    load_weights(net, folder, device="cpu", dtype=dtype)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name].to(dtype))


def test_dit_and_vae_load_from_the_official_layout(folder):
    dit_state, vae_state = write_dit(folder), write_vae(folder)
    dit = load_dit(folder, **CPU, attention="block_sparse")
    assert dit.attention == "block_sparse"
    assert not any(parameter.requires_grad for parameter in dit.parameters())
    for network, state in ((dit, dit_state), (load_vae(folder, **CPU), vae_state)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    latents, text = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 1, 3, 32)
    assert dit(latents, torch.tensor([500.0]), text, torch.ones(1, 3)).shape == latents.shape


def test_every_missing_unexpected_and_misshapen_tensor_is_listed_in_one_error(folder):
    state = net_state()
    del state["first.bias"]
    state |= {"second.weight": torch.zeros(2, 4), "third.weight": torch.zeros(1), "old.scale": torch.zeros(2)}
    write_weights(folder, state, {}, 2)
    net = net_on_meta()
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, folder, **CPU)
    assert caught.value.problems == [
        "missing: first.bias [5]",
        "unexpected: old.scale [2]",
        "unexpected: third.weight [1]",
        "wrong shape: second.weight is [2, 4], wanted [2, 5]",
    ]
    assert all(parameter.is_meta for parameter in net.parameters())


def test_integer_weights_where_the_network_has_floats_are_refused(folder):
    state = net_state() | {"first.weight": torch.zeros(5, 3, dtype=torch.int8)}
    write_weights(folder, state, {})
    with pytest.raises(CheckpointError, match=r"wrong type: first\.weight"):
        load_weights(net_on_meta(), folder, **CPU)


def test_int8_folder_gives_int8_layers_with_their_own_types(folder):
    state = write_dit(folder)
    dit = load_dit(folder, **CPU)
    quantize_(dit)
    config = json.loads((folder / "dit" / "config.json").read_text())
    write_weights(folder / "int8" / "base_model_int8", dit.state_dict(), config, 2)
    loaded = load_dit(folder / "int8", device="cpu", dtype=torch.bfloat16)
    layer = loaded.get_submodule("blocks.0.attn.qkv")
    assert isinstance(layer, QuantLinear)
    assert layer.weight_scale.dtype == torch.float32
    assert loaded.final_layer.linear.weight.dtype == torch.bfloat16
    restored = layer.weight_int8.float() * layer.weight_scale[:, None]
    weight = state["blocks.0.attn.qkv.weight"]
    assert (restored - weight).abs().max() <= weight.abs().max() / 127


@pytest.mark.parametrize("stored", [["first.weight"], ["second.weight"], ["first.weight", "second.weight"]])
def test_tied_weights_load_from_either_name_and_stay_tied(folder, stored):
    with torch.device("meta"):
        net = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3, bias=False)})
    net["second"].weight = net["first"].weight
    weight = torch.randn(3, 3)
    write_weights(folder, {name: weight.clone() for name in stored}, {})
    load_weights(net, folder, **CPU)
    assert net["second"].weight is net["first"].weight
    assert torch.equal(net["first"].weight, weight)


# Damaged and foreign files


def test_shard_cut_short_is_refused_with_both_sizes(folder):
    write_dit(folder)
    shard = folder / "dit" / SECOND
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"{SECOND}: is cut short: {len(content) - 10} bytes"):
        load_dit(folder, **CPU)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x00" * 100, b"hello world, these are no weights"])
def test_file_that_is_no_safetensors_is_refused(folder, content):
    write_dit(folder)
    (folder / "dit" / FIRST).write_bytes(content)
    with pytest.raises(CheckpointError, match=FIRST):
        load_dit(folder, **CPU)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_file_passes_as_another_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    position = data.draw(st.integers(0, header_end - 1))
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        read_bytes = sum(tensor.nbytes for _, tensor in iter_tensors(read_header(path).values()))
    except CheckpointError as error:
        refusal = str(error)
        assert str(path) in refusal
    else:
        assert read_bytes == len(content) - header_end


def test_header_whose_length_looks_like_a_pickle_is_still_read(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (0x280, 0x380, 0x480, 0x580):  # little-endian 80 02, 80 03, ...: how pickles start
        entry = b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
        path.write_bytes(struct.pack("<Q", length) + entry.ljust(length) + b"\x07")
        assert [tensor.item() for _, tensor in iter_tensors(read_header(path).values())] == [7]


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_pickle_renamed_to_safetensors_is_refused_unopened(folder, save):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "sprung"),))

    write_vae(folder)
    save({"weight": Trap()}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"diffusion_pytorch_model.safetensors: is a pickle.*get the saf"
    ):
        load_vae(folder, **CPU)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_folder_with_a_pickle_is_refused_by_name(folder, name):
    write_vae(folder)
    (folder / "vae" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds pickles") as caught:
        load_vae(folder, **CPU)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{name}: a pickle could run code")


def test_text_encoder_loads_and_refuses_pickles(folder):
    make_checkpoint(folder)
    states, mask = load_text(folder, **CPU).encode(["a red circle"])
    assert states.shape[:3] == (1, 1, mask.shape[1])
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds pickles"):
        load_text(folder, **CPU)


def test_git_lfs_pointer_is_named_as_such(folder):
    write_vae(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_vae(folder, **CPU)


def test_missing_shard_and_tensor_in_the_wrong_shard_are_listed_together(folder):
    write_dit(folder)
    index = folder / "dit" / INDEX
    content = json.loads(index.read_text())
    moved = next(name for name, file in content["weight_map"].items() if file == FIRST)
    content["weight_map"][moved] = SECOND
    index.write_text(json.dumps(content))
    (folder / "dit" / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_dit(folder, **CPU)
    assert len(caught.value.problems) == 3
    assert any("00003-of-00003.safetensors: missing" in problem for problem in caught.value.problems)
    assert sum(moved in problem for problem in caught.value.problems) == 2


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}'])
def test_damaged_index_is_refused(folder, content):
    write_dit(folder)
    (folder / "dit" / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        load_dit(folder, **CPU)


def test_shards_without_index_are_refused(folder):
    write_dit(folder)
    (folder / "dit" / INDEX).unlink()
    with pytest.raises(CheckpointError, match="several shards but no"):
        load_dit(folder, **CPU)


def test_absent_parts_are_named(folder):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_dit(folder, **CPU)
    folder.mkdir()
    with pytest.raises(CheckpointError, match="neither dit/ nor base_model_int8/"):
        load_dit(folder, **CPU)
    with pytest.raises(CheckpointError, match=r"vae.config\.json: cannot be read"):
        load_vae(folder, **CPU)


# Writing


def test_written_shards_are_read_by_the_safetensors_library(tmp_path):
    tensors = {
        "odd": torch.arange(5, dtype=torch.int8),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3, 2).bfloat16(),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        assert not path.exists()
    for read in (
        load_file(path),
        {info.name: t.clone() for info, t in iter_tensors(read_header(path).values())},
    ):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_failed_write_leaves_no_file(tmp_path):
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(ValueError, match="never written: b"), ShardWriter(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="the layout says"), ShardWriter(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(3))
    assert list(tmp_path.iterdir()) == []


# LoRAs


def test_merging_while_loading_equals_merging_into_the_loaded_model(folder):
    write_checkpoint(folder)
    files = sorted((folder / "lora").iterdir())
    loras = [(files[0], 1.0), (files[1], 0.5)]
    merged = load_dit(folder, **CPU, loras=loras)
    plain = load_dit(folder, **CPU)
    assert not torch.equal(merged.final_layer.linear.weight, plain.final_layer.linear.weight)
    for file, strength in loras:
        merge_lora(plain, load_lora(file), strength)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.mark.parametrize("products", ["weight_only", "int8", "fp8"])
def test_weights_are_quantised_as_they_arrive_with_the_same_bits(folder, monkeypatch, products):
    write_checkpoint(folder)
    loras = [(sorted((folder / "lora").iterdir())[0], 1.0)]
    whole = load_dit(folder, **CPU, loras=loras)
    choose_products_(whole, products)
    wide: list[int] = []
    place = weights_module._place

    def watched(module, *more):
        place(module, *more)
        large = [m for path, m in module.named_modules() if isinstance(m, nn.Linear) and ".ffn." in path]
        wide.append(sum(not linear.weight.is_meta for linear in large))

    monkeypatch.setattr(weights_module, "_place", watched)
    loaded = load_dit(folder, **CPU, loras=loras, products=products)
    assert max(wide) == 1, "one wide weight at a time"
    assert loaded.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_lora_for_other_layers_is_refused_with_every_mismatch(folder):
    state = write_dit(folder)
    write_dit(folder / "other", seed=1)
    bad = {
        "blocks.0.attn.qkv.weight": torch.zeros(96, 64),
        **{k: v for k, v in state.items() if "0.attn.qkv" not in k},
    }
    write_lora(folder / "x.safetensors", bad, 0)
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        load_dit(folder, **CPU, loras=[(folder / "x.safetensors", 1.0)])
    assert caught.value.problems == ["blocks.0.attn.qkv: weight is [192, 64], the LoRA is for [96, 64]"]


def test_lora_on_int8_weights_is_refused_with_the_remedy(folder):
    state = write_dit(folder)
    write_lora(folder / "x.safetensors", state, 0)
    dit = load_dit(folder, **CPU)
    quantize_(dit)
    config = json.loads((folder / "dit" / "config.json").read_text())
    write_weights(folder / "int8" / "base_model_int8", dit.state_dict(), config)
    with pytest.raises(CheckpointError, match="is int8, convert the original weights with this LoRA"):
        load_dit(folder / "int8", **CPU, loras=[(folder / "x.safetensors", 1.0)])


def test_lora_of_another_tool_is_refused_with_the_formats_that_are_not_read(tmp_path):
    key = "transformer.blocks.0.attn.qkv.lora_A.weight"
    save_file({key: torch.zeros(2, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="diffusers, PEFT and kohya are not read") as caught:
        load_lora(tmp_path / "x.safetensors")
    assert key in str(caught.value)


def test_lora_that_is_a_pickle_is_refused(folder):
    write_dit(folder)
    torch.save({}, folder / "x.safetensors")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_dit(folder, **CPU, loras=[(folder / "x.safetensors", 1.0)])


# Memory

MEASURE = """
import sys, torch
from torch import nn
from model.weights import load_weights

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

with torch.device("meta"):
    net = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(16)])
dtype = getattr(torch, sys.argv[2])
before = status("VmRSS")
load_weights(net, sys.argv[1], device="cpu", dtype=dtype)
model = sum(p.nbytes for p in net.parameters())
assert float(net[15].weight[0, 0]) == 16
print(status("VmHWM") - before, model)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    state = {f"{i}.weight": torch.full((2048, 2048), i + 1.0) for i in range(16)}  # 268 MB
    write_weights(folder, state, {}, 3)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_the_memory_of_a_few_tensors_beyond_the_model(large, dtype):
    command = [sys.executable, "-c", MEASURE, str(large), dtype]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parent.parent
    )
    assert result.returncode == 0, result.stderr
    peak, model_size = map(int, result.stdout.split())
    tensor = 2048 * 2048 * 4
    assert model_size <= peak < model_size + 4 * tensor


# Digest


@pytest.fixture
def settled(folder) -> Path:
    """A checkpoint whose files are too old to change without their times showing it."""
    write_dit(folder)
    write_vae(folder)
    model.digest.SETTLED_S, kept = -1e9, model.digest.SETTLED_S
    yield folder
    model.digest.SETTLED_S = kept


def count_reads(monkeypatch) -> list[Path]:
    reads, read = [], model.digest._read_sha256
    monkeypatch.setattr(
        model.digest, "_read_sha256", lambda path, meter: reads.append(path) or read(path, meter)
    )
    return reads


def test_processes_that_want_a_digest_at_one_time_read_the_files_once(settled, monkeypatch):
    reads, both = [], threading.Barrier(2)

    def read(path, meter):
        reads.append(path.name)
        time.sleep(0.5)  # the others come meanwhile
        return "0" * 64

    monkeypatch.setattr(model.digest, "_read_sha256", read)

    def ask():
        both.wait()
        return digest(settled)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(ask), pool.submit(ask)
    assert one.result() == other.result()
    assert sorted(reads) == sorted(Path(name).name for name in checkpoint_files(settled))


def test_a_reader_that_hangs_is_not_waited_for_for_ever(settled, monkeypatch):
    monkeypatch.setattr(model.digest, "WAIT_S", 0.1)
    file = settled / checkpoint_files(settled)[0]
    with model.digest._turn(model.digest._entry(file), 0):
        assert len(model.digest.file_sha256(file)) == 64


def test_digest_depends_on_content_and_names_alone(folder, tmp_path):
    write_dit(folder)
    first = digest(folder)
    (folder / "README.md").write_text("words")
    (folder / "manifest.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    (folder / "dit" / "x.safetensors.partial").write_text("half")
    moved = folder.rename(tmp_path / "elsewhere")
    assert digest(moved) == first
    (moved / "dit" / FIRST).rename(moved / "dit" / "renamed.safetensors")
    assert digest(moved) != first
    (moved / "dit" / "renamed.safetensors").rename(moved / "dit" / FIRST)
    assert digest(moved) == first
    (moved / "render.json").write_text("{}")
    assert digest(moved) != first


def test_one_flipped_bit_changes_the_digest(folder):
    write_dit(folder)
    first = digest(folder)
    content = bytearray((folder / "dit" / FIRST).read_bytes())
    content[-1] ^= 1
    (folder / "dit" / FIRST).write_bytes(bytes(content))
    assert digest(folder) != first


def test_unchanged_files_are_not_read_again(settled, monkeypatch):
    reads = count_reads(monkeypatch)
    first = digest(settled)
    assert len(reads) == len(checkpoint_files(settled))
    assert digest(settled) == first
    assert len(reads) == len(checkpoint_files(settled))
    path = settled / "dit" / FIRST
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert digest(settled) != first
    assert reads[-1] == path


def test_file_changed_within_its_own_size_and_modification_time_is_read_again(settled):
    path = settled / "dit" / FIRST
    times = path.stat()
    first = file_sha256(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_sha256(path) != first


def test_fresh_file_is_not_remembered(folder, monkeypatch):
    write_vae(folder)
    reads = count_reads(monkeypatch)
    digest(folder)
    digest(folder)
    assert len(reads) == 2 * len(checkpoint_files(folder))


def test_digest_writes_nothing_into_the_folder(settled):
    before = sorted(settled.rglob("*"))
    digest(settled)
    assert sorted(settled.rglob("*")) == before


def test_digest_works_without_a_place_to_remember(settled, monkeypatch):
    first = digest(settled)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert digest(settled) == first


def test_digest_reports_progress_up_to_the_end(folder):
    write_dit(folder)
    calls = []
    digest(folder, progress=lambda *call: calls.append(call))
    total = sum((folder / name).stat().st_size for name in checkpoint_files(folder))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1:] == (total, total)


def test_digest_of_a_folder_that_is_no_checkpoint_is_refused(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is no checkpoint folder"):
        digest(folder)


def test_too_small_a_disk_is_refused_before_the_work(folder):
    with pytest.raises(CheckpointError, match=r"needs 1000000000\.0 GB.*free some"):
        require_disk_space(folder / "not" / "there" / "yet", 10**18)
    require_disk_space(folder, 1)
