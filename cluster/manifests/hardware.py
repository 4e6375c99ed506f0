"""Which machines carry which GPUs: the names that clouds, Kubernetes and SkyPilot have for them. Pure data.

Sizes are what a worker of this renderer needs beside its GPU: the weights of a role pass through host memory
while they are loaded, and ffmpeg encodes where frames are decoded. On cards of 24 GB a chained window keeps 39.6 GB in
host memory (docs/settings.md), which 41 GiB and the node's share hold together with the worker's own process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.pace import GpuType

NODE_MEMORY_GIB = 4
"""Once for a node: Ray's own processes, and files on their way through the page cache."""


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU. Machines: number of GPUs in one -> its name in that cloud."""

    product: str
    """What NVIDIA's GPU feature discovery writes into the node label `nvidia.com/gpu.product`."""
    skypilot: str
    aws: Mapping[int, str]
    gcp: Mapping[int, str]
    cpus_per_gpu: int
    memory_gib_per_gpu: int

    def memory_gib(self, gpus: int) -> int:
        """Of a node's host memory, for so many GPUs."""
        return NODE_MEMORY_GIB + self.memory_gib_per_gpu * gpus


HARDWARE: Mapping[GpuType, Hardware] = {
    "h200": Hardware("NVIDIA-H200", "H200", {8: "p5en.48xlarge"}, {8: "a3-ultragpu-8g"}, 10, 120),
    "h100": Hardware(
        "NVIDIA-H100-80GB-HBM3",
        "H100",
        {1: "p5.4xlarge", 8: "p5.48xlarge"},
        {1: "a3-highgpu-1g", 2: "a3-highgpu-2g", 4: "a3-highgpu-4g", 8: "a3-highgpu-8g"},
        10,
        120,
    ),
    # Those in China: no cloud of the two has them.
    "h800": Hardware("NVIDIA-H800", "H800", {}, {}, 10, 120),
    "b200": Hardware("NVIDIA-B200", "B200", {8: "p6-b200.48xlarge"}, {8: "a4-highgpu-8g"}, 10, 120),
    "a100": Hardware(
        "NVIDIA-A100-SXM4-80GB",
        "A100-80GB",
        {8: "p4de.24xlarge"},
        {1: "a2-ultragpu-1g", 2: "a2-ultragpu-2g", 4: "a2-ultragpu-4g", 8: "a2-ultragpu-8g"},
        8,
        100,
    ),
    "l40s": Hardware("NVIDIA-L40S", "L40S", {1: "g6e.4xlarge", 4: "g6e.24xlarge", 8: "g6e.48xlarge"}, {}, 10, 64),
    "l4": Hardware(
        "NVIDIA-L4",
        "L4",
        {1: "g6.4xlarge", 4: "g6.24xlarge", 8: "g6.48xlarge"},
        {1: "g2-standard-16", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"},
        8,
        41,
    ),
    "a10g": Hardware("NVIDIA-A10G", "A10G", {1: "g5.4xlarge", 4: "g5.24xlarge", 8: "g5.48xlarge"}, {}, 8, 41),
}
HEAD_MACHINES = {"aws": "m7i.2xlarge", "gcp": "n2-standard-8"}
"""The head has no GPU and no Ray CPUs: it runs Ray's own services and the orchestrator."""
