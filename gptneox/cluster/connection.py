# SPDX-License-Identifier: Apache-2.0
"""The cluster that a command works on."""

from __future__ import annotations

import logging
import socket

import ray

from gptneox.cluster.plan import Shape, num_fitting, runtime_env
from gptneox.devices.ranks import CLUSTER_RESOURCES

logger = logging.getLogger(__name__)

REACH_S = 10.0  # that the head node may take to answer


def connect(address: str) -> None:
    """Join a cluster that runs.

    Raises:
        RuntimeError: there is none.
    """
    if ray.is_initialized():
        return
    host, _, port = address.rpartition(":")
    try:
        if host and "//" not in host:  # Ray would try for a minute
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
        ray.init(
            address=address,
            runtime_env=runtime_env({}),
            logging_level=logging.WARNING,
            log_to_driver=logger.isEnabledFor(logging.DEBUG),
        )
    except (OSError, ValueError) as error:  # a ConnectionError, also of Ray's, is the first
        raise RuntimeError(
            f"no Ray cluster at '{address}' ({' '.join(str(error).split())[:200]}); start one "
            "with: ray start --head, or name its address"
        ) from error


def resources() -> list[dict[str, float]]:
    """Of every node that is there."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def device_of(chosen: str) -> str:
    """The device that a run takes of the cluster, where `chosen` is "auto": the first it has."""
    if chosen != "auto":
        return chosen
    nodes = resources()
    return next(
        (
            name
            for name, resource in CLUSTER_RESOURCES.items()
            if any(node.get(resource) for node in nodes)
        ),
        "cpu",
    )


def warn_without_room(shape: Shape, replicas: int) -> None:
    """Say where the cluster has no room for all replicas: Ray waits for more nodes then."""
    nodes = resources()
    if (found := num_fitting(shape, nodes, replicas)) < replicas:
        logger.warning(
            "the cluster has room for %d of %d replicas of %d host(s) with %s each; waiting for "
            "more",
            found,
            replicas,
            shape.hosts,
            ", ".join(f"{name} {amount:g}" for name, amount in shape.bundle.items()),
        )
