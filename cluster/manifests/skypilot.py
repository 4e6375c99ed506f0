"""SkyPilot: one render as a managed job (`sky jobs launch`), on the cheapest cloud that has the GPUs.

A SkyPilot task has nodes of one kind, so here the head is the first of them and computes too. When a spot
node is taken, SkyPilot starts the job again elsewhere and the render goes on from the store.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from cluster.manifests.description import (
    CACHE_FOLDER,
    LOGGING,
    MARKET_TYPE,
    RAY_PORT,
    SPOT,
    STABLE,
    STORYBOARD_PATH,
    Description,
    needed,
    plan_groups,
)

RESUMABLE_CODES = [75]
"""A render that was stopped and goes on when the same command is run again. SkyPilot does so without end, so 130, that
of `longtake cancel`, is left to `max_restarts_on_errors`."""


def sky_task(description: Description, film: Path) -> dict[str, Any]:
    """The task's YAML. Raises SettingError."""
    store = needed(description.store, "--store", "the film's state outlives the machines there")
    groups = plan_groups(description, ())
    nodes = groups.stable_nodes + groups.spot_nodes
    is_spot = groups.spot_nodes > 0
    return {
        "name": description.name,
        "num_nodes": nodes,
        "resources": {
            "accelerators": {description.hardware.skypilot: groups.gpus_per_node},
            # At least. The cheapest machine with one L4 has 4 CPUs and 16 GiB, which the weights do not fit.
            "cpus": f"{description.hardware.cpus_per_gpu * groups.gpus_per_node}+",
            "memory": f"{description.hardware.memory_gib(groups.gpus_per_node)}+",
            "use_spot": is_spot,
            "image_id": f"docker:{description.image}",
            "disk_size": 500,
            "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": RESUMABLE_CODES},
        },
        "envs": {"RAY_AUTH_MODE": "token", "XDG_CACHE_HOME": CACHE_FOLDER, **LOGGING},
        # No value: `sky jobs launch --secret RAY_AUTH_TOKEN` takes it from the environment there.
        "secrets": {"RAY_AUTH_TOKEN": None},
        "file_mounts": {STORYBOARD_PATH: str(film)},
        "run": _script(store, description.gpus, SPOT if is_spot else STABLE),
    }


def _script(store: str, gpus: int, market: str) -> str:
    """The first node is the head and renders; the others are there until its Ray is gone.

    SkyPilot runs a Ray of its own on other ports, which `ray stop` would end too.
    """
    render = shlex.join(
        ["longtake", "render", STORYBOARD_PATH, "--store", store, "--address", f"127.0.0.1:{RAY_PORT}",
         "--device", "cuda", "--workers", str(gpus)]
    )  # fmt: skip
    label = f"--labels={MARKET_TYPE}={market}"
    return "\n".join(
        [
            "set -u",
            'head=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
            'if [ "$SKYPILOT_NODE_RANK" = 0 ]; then',
            f"  ray start --head --port={RAY_PORT} --dashboard-host=127.0.0.1 {label} --block &",
            "  ray_pid=$!",
            f"  until ray health-check --address 127.0.0.1:{RAY_PORT} > /dev/null 2>&1; do sleep 2; done",
            f"  {render}",
            "  code=$?",
            "  kill $ray_pid",
            "  exit $code",
            "fi",
            f'until ray health-check --address "$head:{RAY_PORT}" > /dev/null 2>&1; do sleep 2; done',
            f'ray start --address="$head:{RAY_PORT}" {label} --block || true',
            "",
        ]
    )
