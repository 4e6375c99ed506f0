"""The command line without a cluster: help, plan, schema, status, verify, and every kind of bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.preflight import check_precision
from cluster.probe import OFFICIAL
from cluster.render import RenderRequest, prepare
from pipeline.errors import SettingError, StoreError
from pipeline.media_child import find_ffmpeg
from pipeline.spec import Memory
from pipeline.store import LocalStore, StoredFile
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def storyboard(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    shot = {"id": "one", "duration": "2s", "prompt": "a red circle moves left"}
    return {"title": "Test", "checkpoint": str(checkpoint), "shots": [shot], **changes}


def write(content: object, path: Path = Path("film.yaml")) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


LIGHT = [
    "--help", "plan film.yaml", "schema", "manifest kuberay --gpus 8", "manifest dockerfile",
    "schedule list", "schedule tick",
    *(f"{name} film.yaml" for name in ("status", "verify", "logs", "pause", "cancel", "retry", "gc", "lock")),
]  # fmt: skip


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_load_neither_torch_nor_ray(here: Path, tiny_checkpoint: Path, command: str) -> None:
    write(storyboard(tiny_checkpoint))
    script = (
        "import sys\nfrom cluster.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'transformers'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "LOADED", done.stdout + done.stderr


def test_plan_names_every_task_and_the_expected_time(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", write(storyboard(tiny_checkpoint))]) == 0
    text = capsys.readouterr().out
    assert main(["plan", "film.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [task["kind"] for task in plan["tasks"]].count("segment") == 1
    assert all(task["id"] in text for task in plan["tasks"])
    assert "expected" in text
    assert not Path("renders").exists()


def test_plan_until_stage_one_has_no_refinement(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", write(storyboard(tiny_checkpoint)), "--until", "stage-one", "--json"]) == 0
    assert "window" not in {task["kind"] for task in json.loads(capsys.readouterr().out)["tasks"]}


def test_schema_describes_a_storyboard(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "shots" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize("command", ["status", "verify", "logs", "pause", "cancel", "retry", "gc"])
def test_a_place_without_a_render_is_named(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(here / "nothing")]) == 2
    assert str(here / "nothing") in capsys.readouterr().err
    assert main([command, "/dev/null"]) == 2
    assert "Not a directory (got '/dev/null')" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "render", "status", "verify"])
def test_a_store_without_a_name_is_refused_and_not_taken_for_the_default(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    write(storyboard(tiny_checkpoint))
    assert main([command, "film.yaml", "--store", ""]) == 2
    assert "--store: is empty (got '')" in capsys.readouterr().err
    assert not (here / "renders").exists()


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["render"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["render", "film.yaml", "--workers", "0"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["render", "film.yaml", "--workers", "all"])
    assert "--workers: all is no whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["render", "film.yaml", "--deadline", "soon"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "film.yaml", "--deadline", "45f"], "--deadline: 45f are frames"),
        (["resume", "film-1", "--deadline", "0s"], "--deadline: 0s is no time at all"),
        (["resume", "film-1", "--max-cost", "nan"], "--max-cost: nan is no amount of money"),
        (["farm", "start", "--price", "-1"], "--price: -1 is no amount of money"),
        (["farm", "start", "--workers", "0"], "--workers: 0 is no whole number"),
        (["farm", "start", "--idle", "soon"], "--idle: soon is not a duration"),
    ],
)
def test_words_that_no_farm_can_go_by_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_command_that_waits_for_a_store_says_so(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    film = write(storyboard(tiny_checkpoint))
    prepared = prepare(RenderRequest(Path(film)))
    prepared.recipe.put(prepared.store)
    silences = [StoreError("connection refused")]

    def listed(store: LocalStore, prefix: str = "") -> list[StoredFile]:
        if silences:
            raise silences.pop()
        return []

    monkeypatch.setattr(LocalStore, "list", listed)
    assert main(["status", film]) == 0
    assert "waiting: the store does not answer (connection refused)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--redo", "3:40"], "--redo"),
        (["--redo", "9:00-9:10"], "--redo"),
        (["--refine-only"], "--refine-only"),
        (["--takes", "2"], "--takes"),
        (["--redo", "0:00-0:01", "--fresh"], "--fresh"),
    ],
)
def test_flags_that_mean_nothing_are_named_before_anything_runs(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str], field: str
) -> None:
    assert main(["render", write(storyboard(tiny_checkpoint)), *flags]) == 2
    assert field in capsys.readouterr().err
    assert not Path("renders").exists()


def test_plan_says_what_memory_each_role_needs_and_what_helps_a_small_card(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = write(storyboard(OFFICIAL))
    assert main(["plan", film, "--card-gb", "24"]) == 0
    text = capsys.readouterr().out
    assert "(estimated)" in text
    assert "refine: card 38.2 GB (weights 27.2 GB, vae 254 MB" in text
    assert "warning: refine does not fit on a card of 24 GB" in text
    least = ["--precision", "weight_only", "--networks", "in_turn", "--condition-cache", "host"]
    assert main(["plan", film, "--card-gb", "24", "--json", *least]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["too_small"] == []
    assert {role["role"] for role in memory["roles"]} == {"text", "chain", "refine", "media"}


def test_plan_gives_the_memory_of_a_small_checkpoint_in_units_that_say_something(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", write(storyboard(tiny_checkpoint)), "--condition-cache", "host"]) == 0
    lines = capsys.readouterr().out.splitlines()
    roles = [line for line in lines if line.startswith(("  text:", "  chain:", "  refine:", "  media:"))]
    assert len(roles) == 4
    assert not any("GB" in line or " 0 kB" in line for line in roles), roles


def test_the_command_line_takes_what_the_storyboard_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = write(storyboard(OFFICIAL, memory={"precision": "weight_only"}))

    def weights(*flags: str) -> int:
        assert main(["plan", film, "--json", *flags]) == 0
        roles = json.loads(capsys.readouterr().out)["memory"]["roles"]
        return next(role["weights"] for role in roles if role["role"] == "chain")

    assert weights("--networks", "in_turn") == weights() < weights("--precision", "stored") / 1.9
    for name, field in Memory.model_fields.items():
        for value in get_args(field.annotation):
            weights(f"--{name.replace('_', '-')}", value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--gpus", "9" * 20), ("--gpus", "9" * 5000), ("--gpus", "²"), ("--takes", "4097"), ("--gpu-type", "ü")],
)
def test_numbers_and_names_beyond_sense_are_refused_at_once(
    here: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "film.yaml", flag, value])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and flag in error and value in error


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1e300", "24GB"])
def test_a_card_of_no_size_is_refused(here: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", write(storyboard(OFFICIAL)), f"--card-gb={size}"])
    assert caught.value.code == 2
    assert "no size of a card in GB, such as 24" in capsys.readouterr().err


def test_int8_weights_cannot_become_fp8(tmp_path: Path) -> None:
    (tmp_path / "roles/draft/base_model_int8").mkdir(parents=True)
    with pytest.raises(SettingError, match=r"memory\.precision: the weights are int8 already"):
        check_precision(tmp_path, Memory(precision="fp8"))
    check_precision(tmp_path, Memory(precision="int8"))
    (tmp_path / "roles/draft/base_model_int8").rename(tmp_path / "roles/draft/dit")
    check_precision(tmp_path, Memory(precision="fp8"))


def test_plan_says_what_space_is_needed_and_free(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", write(storyboard(tiny_checkpoint))]) == 0
    assert "are needed" in capsys.readouterr().out.splitlines()[-1]
    assert main(["plan", "film.yaml", "--json"]) == 0
    space = json.loads(capsys.readouterr().out)["space"]
    assert 0 < space["needed_bytes"] < space["free_bytes"]


def test_an_unforeseen_error_is_one_line_and_a_log(
    here: Path, private_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("the moon is in the way")

    monkeypatch.setattr("cluster.show.print_plan", broken)
    assert main(["plan", "film.yaml"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "the moon is in the way" in error
    log = Path(error.rsplit("details in ", 1)[1].strip().rstrip(")"))
    assert "Traceback" in log.read_text()


# Bad input: each case writes what it needs into the working folder and gives the storyboard.

Case = Callable[[Path], dict[str, Any] | str]


def _shot(**changes: Any) -> dict[str, Any]:
    return {"shots": [{"id": "one", "duration": "2s", "prompt": "a red circle", **changes}]}


def _corrupt_image(checkpoint: Path) -> dict[str, Any]:
    Image.new("RGB", (64, 32), "red").save("start.png")
    data = Path("start.png").read_bytes()
    Path("start.png").write_bytes(data[:60] + b"\x00" * 8)
    return storyboard(checkpoint, **_shot(image="start.png"))


def _unreadable_video(checkpoint: Path) -> dict[str, Any]:
    Path("before.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom" + b"\x00" * 500)
    return storyboard(checkpoint, **_shot(video="before.mp4"))


def _playlist_as_video(checkpoint: Path) -> dict[str, Any]:
    Path("before.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    return storyboard(checkpoint, **_shot(video="before.mp4"))


def _changed_checkpoint(change: Callable[[Path], None]) -> Case:
    def case(checkpoint: Path) -> dict[str, Any]:
        shutil.copytree(checkpoint, "weights")
        change(Path("weights"))
        return storyboard(Path("weights"))

    return case


def _drop_tensor(folder: Path) -> None:
    file = folder / "dit/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["blocks.0.attn.proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def _reshape_tensor(folder: Path) -> None:
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "post_quant_conv.bias"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, {"format": "pt"})


def _leave_pickle(folder: Path) -> None:
    (folder / "dit/diffusion_pytorch_model.safetensors").unlink()
    (folder / "dit/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def _damaged_lora(checkpoint: Path) -> dict[str, Any]:
    whole = (checkpoint / "lora/refinement_lora.safetensors").read_bytes()
    Path("short.safetensors").write_bytes(whole[:-1])
    return storyboard(checkpoint, loras=[{"file": "short.safetensors"}])


def _pipe_as_lora(checkpoint: Path) -> dict[str, Any]:
    os.mkfifo("pipe.safetensors")
    return storyboard(checkpoint, loras=[{"file": "pipe.safetensors"}])


def _foreign_lora(checkpoint: Path) -> dict[str, Any]:
    tensors = load_file(checkpoint / "lora/refinement_lora.safetensors")
    downs = {name: value[:, 1:].clone() for name, value in tensors.items() if name.endswith("lora_down.weight")}
    save_file(tensors | downs, "other.safetensors")
    return storyboard(checkpoint, loras=[{"file": "other.safetensors"}])


def _over_its_sound(checkpoint: Path) -> dict[str, Any]:
    with wave.open("take.mp4", "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    Path("film.mp4").symlink_to("take.mp4")
    return storyboard(checkpoint, output={"path": "./take.mp4", "soundtrack": "film.mp4"})


def _sound_of_ten_channels(checkpoint: Path) -> dict[str, Any]:
    with wave.open("ten.wav", "wb") as file:
        file.setparams((10, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(160000))
    return storyboard(checkpoint, output={"soundtrack": "ten.wav"})


def _film(name: str, *sound: str) -> str:
    picture = ("-f", "lavfi", "-i", "testsrc2=size=64x32:rate=10:duration=2")
    command = [find_ffmpeg().path, "-v", "error", *picture, *sound, "-c:v", "ffv1", name]
    subprocess.run(command, check=True, timeout=60)
    return name


def _film_of_damaged_sound(checkpoint: Path) -> dict[str, Any]:
    noise = ("-f", "lavfi", "-i", "sine=duration=2", "-c:a", "aac", "-bsf:a", r"noise=amount=if(gt(n\,50)\,20\,0)")
    return storyboard(checkpoint, output={"soundtrack": _film("noise.mkv", *noise)})


def _silent_film_as_sound_too(checkpoint: Path) -> dict[str, Any]:
    film = _film("silent.mkv")
    return storyboard(checkpoint, **_shot(video=film), output={"soundtrack": film})


def _pipe() -> str:
    os.mkfifo("start.png")
    return "start.png"


def _output(**output: Any) -> Case:
    return lambda checkpoint: storyboard(checkpoint, output=output)


BAD_INPUT: dict[str, tuple[Case, list[str]]] = {
    "unknown field": (lambda c: storyboard(c, colour="red"), ["colour"]),
    "negative duration": (lambda c: storyboard(c, **_shot(duration="-2s")), ["duration", "-2s", "negative"]),
    "no yaml": (lambda c: "shots: [", ["film.yaml"]),
    "missing image": (lambda c: storyboard(c, **_shot(image="nowhere.png")), ["shots[0].image: nowhere.png cannot"]),
    "corrupt image": (_corrupt_image, ["shots[0].image: start.png", "damaged"]),
    "unreadable video": (_unreadable_video, ["shots[0].video: before.mp4", "(ffmpeg exited with"]),
    "missing soundtrack": (lambda c: storyboard(c, output={"soundtrack": "no.wav"}), ["output.soundtrack: no.wav"]),
    "sound of ten channels": (_sound_of_ten_channels, ["output.soundtrack: ten.wav", "-ac 2"]),
    "damaged sound of a film": (_film_of_damaged_sound, ["output.soundtrack: noise.mkv", "cannot be decoded"]),
    "silent film as sound, too": (_silent_film_as_sound_too, ["output.soundtrack: silent.mkv", "is not a sound"]),
    "pipe as image": (lambda c: storyboard(c, **_shot(image=_pipe())), ["shots[0].image: start.png", "a pipe"]),
    "missing LoRA": (lambda c: storyboard(c, loras=[{"file": "no.safetensors"}]), ["loras[0].file", "no.safetensors"]),
    "pipe as a LoRA": (_pipe_as_lora, ["loras[0].file", "pipe.safetensors", "a pipe"]),
    "damaged LoRA": (_damaged_lora, ["loras[0].file: short.safetensors", "cut short"]),
    "LoRA of other weights": (_foreign_lora, ["loras[0].file: other.safetensors", "blocks.0.attn.proj"]),
    "playlist as video": (_playlist_as_video, ["before.mp4", "whatever its name says"]),
    "image as video": (lambda c: storyboard(c, **_shot(video=_picture())), ["start.png", "video"]),
    "no such checkpoint": (lambda c: storyboard(Path("nowhere")), ["checkpoint", "nowhere"]),
    "missing tensor": (_changed_checkpoint(_drop_tensor), ["blocks.0.attn.proj.weight", "missing"]),
    "wrong shape": (_changed_checkpoint(_reshape_tensor), ["post_quant_conv.bias", "[15]", "[16]"]),
    "pickle": (_changed_checkpoint(_leave_pickle), ["diffusion_pytorch_model.bin: a pickle could run code"]),
    "unwritable output": (_output(path="film.yaml/film.mp4"), ["output.path", "film.yaml/film.mp4"]),
    "output is a folder": (_output(path="folder.mp4"), ["output.path", "folder.mp4"]),
    "output of a long name": (_output(path="x" * 236 + ".mp4"), ["output.path", "name too long"]),
    "output is an input": (_over_its_sound, ["output.path", "take.mp4", "is made from"]),
    "unwritable store": (lambda c: storyboard(c), ["--store", "film.yaml/render"]),
    "store where no folder can be": (lambda c: storyboard(c), ["--store: no folder", "/proc/render"]),
    "store without a bucket": (lambda c: storyboard(c), ["--store: names no bucket", "s3://BUCKET/FOLDER"]),
    "unknown shot": (lambda c: storyboard(c), ["--shots", "two", "one"]),
}


def _picture() -> str:
    Image.new("RGB", (64, 32), "red").save("start.png")
    return "start.png"


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_fails_before_rendering_with_one_clear_message(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make_case, words = BAD_INPUT[name]
    (here / "folder.mp4").mkdir()
    write(make_case(tiny_checkpoint))
    options = {
        "unknown shot": ["--shots", "two"],
        "unwritable store": ["--store", "film.yaml/render"],
        "store where no folder can be": ["--store", "/proc/render"],
        "store without a bucket": ["--store", "s3://"],
    }
    assert main(["render", "film.yaml", *options.get(name, [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for word in words:
        assert word in captured.err, captured.err
    assert all(line.startswith("  ") for line in captured.err.splitlines()[1:]), "one message, and its list"
    assert not list(here.glob("renders/*/attempts")), "nothing may have run"


def test_paths_may_begin_in_the_home_folder(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "home").mkdir()
    Path(_picture()).rename("home/start.png")
    written = storyboard(tiny_checkpoint, **_shot(image="~/start.png"), output={"path": "~/films/out.mp4"})
    assert main(["plan", write(written)]) == 0
    assert f"-> {here}/home/films/out.mp4" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["nan", "inf", "0", "-1", "two"])
def test_chains_of_no_length_are_refused(capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", f"--minutes={minutes}"])
    assert caught.value.code == 2
    assert f"{minutes} is no number of minutes" in capsys.readouterr().err


def test_a_missing_ffmpeg_is_a_setting_error(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGTAKE_FFMPEG", "/nowhere/ffmpeg")
    assert main(["render", write(storyboard(tiny_checkpoint))]) == 2
    error = capsys.readouterr().err
    assert "LONGTAKE_FFMPEG" in error
    assert "/nowhere/ffmpeg" in error


def test_a_disk_that_is_too_small_is_refused_before_rendering(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.LocalStore.free_bytes", lambda store: 1_000_000)
    assert main(["render", write(storyboard(tiny_checkpoint))]) == 1
    error = capsys.readouterr().err
    assert "1 MB are free" in error
    assert "renders/test" in error


def test_a_cluster_that_is_not_loopback_needs_a_token(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    film = write(storyboard(tiny_checkpoint))
    assert main(["render", film, "--address", "203.0.113.9:6379"]) == 2
    error = capsys.readouterr().err
    assert "--address" in error
    assert "RAY_AUTH_MODE" in error


def test_checkpoint_verify_lists_what_is_wrong(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(here / "weights")
    assert main(["checkpoint", "verify", str(folder)]) == 0
    _drop_tensor(folder)
    assert main(["checkpoint", "verify", str(folder)]) == 2
    assert "blocks.0.attn.proj.weight" in capsys.readouterr().err


def test_doctor_says_which_dense_attention_a_gpu_gets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the versions of CUDA and cuDNN it may be one of two thirds of the speed."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr("kernels.dispatch.dense_attention", lambda device, dtype: f"cudnn for {device}, {dtype}")
    main(["doctor"])
    assert "GPUs: NVIDIA H100; dense attention: cudnn for cuda, torch.bfloat16" in capsys.readouterr().out

    def full(device: str, dtype: object) -> str:
        raise RuntimeError("CUDA error: out of memory\nmore about it")

    monkeypatch.setattr("kernels.dispatch.dense_attention", full)
    assert main(["doctor"]) == 1
    found = capsys.readouterr().out
    assert re.search(r"BAD +devices +torch \S+ cannot compute on NVIDIA H100: CUDA error: out of memory$", found, re.M)


def test_doctor_names_a_gpu_that_torch_cannot_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver may be older than torch's CUDA, or torch the one for CPUs: the render would end for it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("cluster.doctor.GPU_DEVICE", Path("/nowhere/nvidia0"))
    main(["doctor"])
    assert "GPUs: none" in capsys.readouterr().out
    monkeypatch.setattr("cluster.doctor.GPU_DEVICE", Path("/dev/null"))
    assert main(["doctor"]) == 1
    assert re.search(r"BAD +devices +there is a GPU that torch \S+ cannot use: \w", capsys.readouterr().out)
