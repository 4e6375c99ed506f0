"""The image that every node runs, built from the root of the repository."""

from __future__ import annotations

from typing import Literal

from cluster.manifests.description import CACHE_FOLDER, USER_ID

Flavour = Literal["cuda", "cpu"]
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def dockerfile(flavour: Flavour) -> str:
    """A Dockerfile. `cuda`: PyTorch's wheels bring CUDA with them, the host brings the driver."""
    index = f" --extra-index-url {_CPU_INDEX}" if flavour == "cpu" else ""
    # A compiler and headers are for Triton, which compiles its launcher when a kernel is first used;
    # wget, bash and procps for KubeRay's probes and Ray's own commands; git and ssh are not needed.
    lines = [
        "FROM python:3.11-slim-bookworm",
        "RUN apt-get update \\",
        " && apt-get install -y --no-install-recommends bash gcc libc6-dev procps rsync wget \\",
        " && rm -rf /var/lib/apt/lists/*",
        f"RUN useradd --uid {USER_ID} --create-home --shell /bin/bash longtake \\",
        f" && install -d -o {USER_ID} -g {USER_ID} {CACHE_FOLDER} /film /weights",
        "COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md /opt/longtake/",
        *(f"COPY {room} /opt/longtake/{room}" for room in ("pipeline", "actors", "model", "kernels", "cluster")),
        f"RUN pip install --no-cache-dir --constraint /opt/longtake/constraints.txt{index} /opt/longtake",
        f"USER {USER_ID}",
        "WORKDIR /home/longtake",
        f"ENV XDG_CACHE_HOME={CACHE_FOLDER} RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0",
    ]
    if flavour == "cuda":
        lines.append("ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video")
    return "\n".join([*lines, 'CMD ["longtake", "--help"]', ""])
