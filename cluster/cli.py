"""`longtake ...`: the door. Parses arguments, calls one function for each command, turns errors into one line
and an exit code.

Exit codes: 0 done, 1 failed, 2 usage or input, 4 quality gate, 75 stopped by SIGTERM, 130 stopped by Ctrl-C
(both resumable). Commands import what they need when they run: help, plan, verify, status and schema load
neither torch nor ray.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli_deploy import add_manifest, add_schedule_commands
from cluster.cli_farm import add_cluster, add_farm_commands, cluster_of, dashboard_of, is_farmed, run_there
from cluster.cli_values import count, gigabytes, gpu_type, minutes, name_list, positive, seconds
from pipeline.errors import LongtakeError, SettingError
from pipeline.pace import GPUS

if TYPE_CHECKING:
    from cluster.render import RenderRequest

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    command: Command = options.command
    try:
        if (dashboard := dashboard_of(options)) is not None:
            return run_there(dashboard, options, words)
        return command(options)
    except LongtakeError as error:
        print(f"longtake: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("longtake: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`longtake plan film.yaml | head`); nothing is wrong with the
        # film.
        sys.stderr.close()
        return 0
    except Exception as error:
        from cluster.crash import record_crash

        print(f"longtake: unexpected {type(error).__name__}: {record_crash(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longtake", description="Render minutes-long AI video from a storyboard, resumable bit for bit."
    )
    parser.add_argument("--version", action="version", version=f"longtake {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_render(commands)
    _add_status(commands)
    _add_logs(commands)
    _add_requests(commands)
    _add_versions(commands)
    _add_gc(commands)
    _add_verify(commands)
    _add_inspect(commands)
    schema = commands.add_parser("schema", help="print the JSON schema of a storyboard")
    schema.set_defaults(command=_schema)
    _add_doctor(commands)
    _add_checkpoint(commands)
    _add_evaluate(commands)
    _add_calibrate(commands)
    add_manifest(commands)
    add_schedule_commands(commands)
    add_farm_commands(commands)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("longtake")
    except PackageNotFoundError:
        return "(not installed)"


def _add_selection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("storyboard", type=Path, metavar="FILM", help="a storyboard (.yaml) or a film longtake made")
    add("--until", choices=("film", "stage-one"), default="film", help="stop before refinement: stage-one")
    add("--shots", type=name_list, default=None, metavar="A,B", help="render these shots only")
    add("--takes", type=positive, default=1, metavar="N", help="with --shots: N takes of them, to pick from")
    add("--redo", action="append", default=[], metavar="FROM-TO", help="make a stretch of the film again: 3:20-3:40")
    add("--refine-only", action="store_true", help="with --redo: the refinement alone")
    add("--store", default=None, metavar="PLACE", help="folder or s3://, gs://, az:// address of the render")
    add("--json", action="store_true", help="machine-readable output on stdout")
    # The storyboard's `memory`; see docs/settings.md.
    add("--precision", choices=("stored", "weight_only", "int8", "fp8"), help="of the transformer's Linears")
    add("--networks", choices=("together", "in_turn"), help="transformer and VAE on the card at once or not")
    add("--condition-cache", choices=("card", "host"), help="keys and values of the given frames")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plan", help="print every task of a render without rendering")
    _add_selection(parser)
    gpu_types = f"{', '.join(GPUS)}, or one that was calibrated (default with --gpus: h200)"
    add = parser.add_argument
    add("--checkpoint", default=None, metavar="NAME", help="plan for another one than the storyboard's")
    add("--gpus", type=positive, default=None, metavar="N", help="show the render on a cluster of N GPUs")
    add("--gpu-type", type=gpu_type, default=None, metavar="TYPE", help=gpu_types)
    add("--deadline", dest="deadline_s", type=seconds, default=None, metavar="2h", help="how many GPUs make it")
    add("--prices", type=Path, default=None, metavar="FILE", help="YAML: dollars for a GPU and hour by GPU type")
    add("--gpus-per-node", type=positive, default=8, metavar="N", help="with --gpus (default: %(default)s)")
    add("--stable-gpus", type=count, default=None, metavar="N", help="the rest is on spot nodes (default: all)")
    add("--spot-life", type=seconds, default=None, metavar="6h", help="of a spot node, on average (default: 6h)")
    add("--card-gb", type=gigabytes, default=None, metavar="N", help="say what does not fit (default: --gpu-type's)")
    parser.set_defaults(command=_plan)


def _add_render(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("render", help="render a storyboard; the same command again continues")
    _add_selection(parser)
    add = parser.add_argument
    add("--fresh", action="store_true", help="start over: forget everything committed")
    add("--strip", action="store_true", help="leave the recipe out of the film's metadata")
    add("--allow-mixed", action="store_true", help="continue under another numerics record, and report it")
    add(
        "--workers",
        type=positive,
        default=None,
        metavar="N",
        help="how many (default: one a GPU or CPU core)",
    )
    add("--threads", type=positive, default=None, metavar="N", help="compute threads of a worker (CPU: 1)")
    add("--gang", type=positive, default=1, metavar="N", help="workers that compute each segment together")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what the workers compute on")
    add("--address", default=None, metavar="HOST:PORT", help="join a running Ray cluster")
    add("--insecure", action="store_true", help="join it even if anyone who reaches it can run code there")
    add("--deadline", dest="deadline_s", type=seconds, default=None, metavar="8h", help="save and stop after that")
    parser.set_defaults(command=_render)


def _add_place(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("place", metavar="RENDER", help="a storyboard, or the folder or address of its render")
    add("--store", default=None, metavar="PLACE", help="where the storyboard's render lies, if elsewhere")
    add("--json", action="store_true", help="machine-readable output on stdout")


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("status", help="how far a render is, running or not")
    _add_place(parser)
    add_cluster(parser)
    parser.set_defaults(command=_status)


def _add_logs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("logs", help="what was tried for each task, where, and the workers' full logs")
    _add_place(parser)
    add_cluster(parser)
    parser.add_argument("task", nargs="?", default=None, metavar="TASK", help="a task's id or label: its full logs")
    parser.set_defaults(command=_logs)


def _add_requests(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, command, text in (
        ("pause", _pause, "have a running render save its work and stop"),
        ("cancel", _cancel, "stop a render at once; what is committed is kept"),
        ("retry", _retry, "give failed tasks a new budget"),
    ):
        parser = commands.add_parser(name, help=text)
        _add_place(parser)
        if name != "retry":
            add_cluster(parser)
        parser.set_defaults(command=command)


def _add_versions(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, command, text in (
        ("pick", _pick, "choose which take of a shot the film shows"),
        ("lock", _lock, "keep a finished shot as it is, whatever code and checkpoint come"),
        ("unlock", _unlock, "plan a locked shot like any other again"),
    ):
        parser = commands.add_parser(name, help=text)
        _add_place(parser)
        parser.add_argument("shot", metavar="SHOT", help="the shot's id, as `longtake plan` prints it")
        if name == "pick":
            parser.add_argument("take", type=positive, metavar="TAKE", help="its number, from 1")
        parser.set_defaults(command=command)


def _add_gc(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("gc", help="delete what nothing needs any more")
    _add_place(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what may be deleted")
    parser.add_argument("--orphans", action="store_true", help="finished tasks that no present plan needs, too")
    parser.set_defaults(command=_gc)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("verify", help="check every committed byte of a render")
    _add_place(parser)
    parser.set_defaults(command=_verify)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("inspect", help="measure drift, seams and faults of a film or a render")
    add = parser.add_argument
    add("place", metavar="FILM|RENDER", help="any film file, or a storyboard, folder or address of a render")
    add("--store", default=None, metavar="PLACE", help="where the storyboard's render lies, if elsewhere")
    add("--out", type=Path, default=None, metavar="FOLDER", help="where JSON, Parquet and page go")
    add("--json", action="store_true", help="machine-readable output on stdout")
    parser.set_defaults(command=_inspect)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="check this machine and the bundled checkpoint")
    parser.set_defaults(command=_doctor)


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("checkpoint", help="convert, verify or pull model weights")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    convert = actions.add_parser("convert", help="merge LoRAs by role and store as bf16 or int8")
    convert.add_argument("source", type=Path, help="checkpoint folder")
    convert.add_argument("target", type=Path, help="folder to write")
    convert.add_argument("--dtype", choices=("bf16", "int8"), default="bf16", help="of weights (default: %(default)s)")
    convert.set_defaults(command=_checkpoint_convert)
    verify = actions.add_parser("verify", help="check names, shapes and digests of a checkpoint folder")
    verify.add_argument("folder", type=Path, help="checkpoint folder")
    verify.set_defaults(command=_checkpoint_verify)
    pull = actions.add_parser("pull", help="download a checkpoint from the hub; continues where it stopped")
    pull.add_argument("name", metavar="ORG/NAME")
    where = "default: ~/.cache/longtake/checkpoints/ORG--NAME, where storyboards look for ORG/NAME"
    pull.add_argument("--to", type=Path, default=None, metavar="FOLDER", help=where)
    pull.set_defaults(command=_checkpoint_pull)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("evaluate", help="measure what a checkpoint of the drawn world draws")
    add = parser.add_argument
    add("checkpoint", nargs="?", default="pocket", help="checkpoint folder (default: %(default)s)")
    add("--clips", type=positive, default=64, metavar="N", help="films of each kind (default: %(default)s, all)")
    add("--chains", type=count, default=4, metavar="N", help="long chains (default: %(default)s; 0: none)")
    add("--minutes", type=minutes, default=5.0, metavar="M", help="length of a chain (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--out", type=Path, default=None, metavar="FOLDER", help="where sheets and JSON go")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to compute on")
    add("--json", action="store_true", help="machine-readable output on stdout")
    parser.set_defaults(command=_evaluate)


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("calibrate", help="measure task times on this hardware, for `plan`")
    add = parser.add_argument
    add("--checkpoint", default="pocket", metavar="NAME", help="checkpoint folder or name (default: %(default)s)")
    add("--workers", type=positive, default=None, metavar="N", help="how many at once (default: as `render`)")
    add("--threads", type=positive, default=None, metavar="N", help="compute threads of a worker (CPU: 1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what the workers compute on")
    add("--json", action="store_true", help="machine-readable output on stdout")
    parser.set_defaults(command=_calibrate)


def _plan(options: argparse.Namespace) -> int:
    from cluster.outlook import LEAST_SPOT_LIFE_S, SPOT_LIFE_S, Cluster
    from cluster.show import print_plan

    cluster, has_spot = None, options.stable_gpus is not None
    if has_spot and options.gpus is not None and options.stable_gpus > options.gpus:
        remedy = "They are some of --gpus."
        raise SettingError("are more than there are", field="--stable-gpus", value=options.stable_gpus, remedy=remedy)
    if options.spot_life is not None and (not has_spot or options.spot_life < LEAST_SPOT_LIFE_S):
        remedy = f"It goes with --stable-gpus and is at least {LEAST_SPOT_LIFE_S / 60:.0f}m."
        raise SettingError("cannot be used", field="--spot-life", value=f"{options.spot_life / 60:g}m", remedy=remedy)
    if options.gpus or options.gpu_type or options.deadline_s or options.prices or has_spot:
        cluster = Cluster(
            options.gpus,
            options.gpu_type or "h200",
            options.deadline_s,
            options.prices,
            options.stable_gpus,
            options.spot_life or SPOT_LIFE_S,
            options.gpus_per_node,
        )
    gpu_type = cluster.gpu_type if cluster else None
    request = _selected(options, checkpoint=options.checkpoint, gpu_type=gpu_type, plan_only=True)
    return print_plan(request, cluster, options.card_gb)


def _selected(options: argparse.Namespace, **more: Any) -> RenderRequest:
    """What `plan` and `render` are asked for alike."""
    from cluster.render import RenderRequest
    from pipeline.spec import Memory

    return RenderRequest(
        storyboard=options.storyboard,
        store=options.store,
        until=options.until,
        shots=options.shots,
        takes=options.takes,
        redo=tuple(options.redo),
        refine_only=options.refine_only,
        as_json=options.json,
        memory={name: value for name in Memory.model_fields if (value := getattr(options, name)) is not None},
        **more,
    )


def _render(options: argparse.Namespace) -> int:
    from cluster.render import render

    names = ("fresh", "strip", "allow_mixed", "workers", "threads", "gang", "device", "address", "insecure")
    chosen = {name: getattr(options, name) for name in names}
    return render(_selected(options, deadline_s=options.deadline_s, **chosen))


def _status(options: argparse.Namespace) -> int:
    from cluster.show import print_status

    if is_farmed(options):
        from cluster.farm_commands import print_farm_status

        return print_farm_status(options.place, cluster_of(options), as_json=options.json)
    return print_status(options.place, options.store, as_json=options.json)


def _logs(options: argparse.Namespace) -> int:
    from cluster.logs import print_logs

    place = options.place
    if is_farmed(options):
        from cluster.farm_commands import place_of

        place = place_of(place, cluster_of(options))
    return print_logs(place, options.store, options.task, as_json=options.json)


def _pause(options: argparse.Namespace) -> int:
    from cluster.ask import print_pause

    if is_farmed(options):
        from cluster.farm_commands import change

        return change(options.place, "paused", cluster_of(options), as_json=options.json)
    return print_pause(options.place, options.store, as_json=options.json)


def _cancel(options: argparse.Namespace) -> int:
    from cluster.ask import print_cancel

    if is_farmed(options):
        from cluster.farm_commands import change

        return change(options.place, "cancelled", cluster_of(options), as_json=options.json)
    return print_cancel(options.place, options.store, as_json=options.json)


def _retry(options: argparse.Namespace) -> int:
    from cluster.ask import print_retry

    return print_retry(options.place, options.store, as_json=options.json)


def _pick(options: argparse.Namespace) -> int:
    from cluster.versions import print_pick

    return print_pick(options.place, options.store, options.shot, options.take, as_json=options.json)


def _lock(options: argparse.Namespace) -> int:
    from cluster.versions import print_lock

    return print_lock(options.place, options.store, options.shot, as_json=options.json)


def _unlock(options: argparse.Namespace) -> int:
    from cluster.versions import print_unlock

    return print_unlock(options.place, options.store, options.shot, as_json=options.json)


def _gc(options: argparse.Namespace) -> int:
    from cluster.collect import print_collection

    chosen = {"dry_run": options.dry_run, "orphans": options.orphans}
    return print_collection(options.place, options.store, **chosen, as_json=options.json)


def _verify(options: argparse.Namespace) -> int:
    from cluster.show import print_verification

    return print_verification(options.place, options.store, as_json=options.json)


def _inspect(options: argparse.Namespace) -> int:
    from cluster.inspect import print_inspection

    return print_inspection(options.place, options.store, options.out, as_json=options.json)


def _schema(options: argparse.Namespace) -> int:
    import json

    from pipeline.spec import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from cluster.doctor import print_diagnosis

    return print_diagnosis()


def _checkpoint_convert(options: argparse.Namespace) -> int:
    from cluster.checkpoints import convert_checkpoint

    return convert_checkpoint(options.source, options.target, options.dtype)


def _checkpoint_verify(options: argparse.Namespace) -> int:
    from cluster.checkpoints import verify_checkpoint

    return verify_checkpoint(options.folder)


def _checkpoint_pull(options: argparse.Namespace) -> int:
    from cluster.checkpoints import pull_checkpoint

    return pull_checkpoint(options.name, options.to)


def _evaluate(options: argparse.Namespace) -> int:
    from cluster.evaluate import print_evaluation

    return print_evaluation(
        options.checkpoint,
        clips=options.clips,
        chains=options.chains,
        minutes=options.minutes,
        seed=options.seed,
        out=options.out,
        device=options.device,
        as_json=options.json,
    )


def _calibrate(options: argparse.Namespace) -> int:
    from cluster.calibrate import CalibrateRequest, print_calibration

    names = ("checkpoint", "device", "workers", "threads")
    chosen = {name: getattr(options, name) for name in names}
    return print_calibration(CalibrateRequest(**chosen, as_json=options.json))


if __name__ == "__main__":
    sys.exit(main())
