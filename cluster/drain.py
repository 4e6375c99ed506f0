"""Which nodes may be taken away, and which Ray is about to: the preemption notice.

Ray 2.60 has no public function for it; this is the one place that asks the state that Ray's own libraries ask.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import state

MARKET_LABEL = "ray.io/market-type"
"""Ray's own label: `spot` or `on-demand`."""


def is_spot(node: Mapping[str, Any]) -> bool:
    """Whether a node of `ray.nodes()` may be taken away at any time."""
    return bool(node.get("Labels", {}).get(MARKET_LABEL) == "spot")


def spot_nodes() -> set[str]:
    """Hex ids of the nodes that may be taken away. Raises what Ray raises when the head does not answer."""
    return {node["NodeID"] for node in ray.nodes() if is_spot(node)}


def draining_nodes() -> dict[str, float | None]:
    """Hex ids of the nodes being drained, with the seconds they have left; None if no deadline is known.

    Takes a round trip to the cluster's head. Raises what Ray raises when that does not answer.
    """
    now_ms = time.time() * 1000
    found: dict[str, int] = state.get_draining_nodes()
    return {
        node_id: max(0.0, (deadline_ms - now_ms) / 1000) if deadline_ms else None
        for node_id, deadline_ms in found.items()
    }
