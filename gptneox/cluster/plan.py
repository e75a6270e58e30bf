# SPDX-License-Identifier: Apache-2.0
"""What a replica takes of a cluster, and how its hosts are started. Nothing here imports Ray."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from gptneox.cli import Settings, read_settings
from gptneox.config.errors import ConfigError
from gptneox.config.places import CHECKOUT, shipped
from gptneox.config.schema import settings_of
from gptneox.devices.ranks import CLUSTER_RESOURCES
from gptneox.hub import is_model_id

CORES = CLUSTER_RESOURCES["cpu"]


@dataclass(frozen=True)
class Shape:
    """One replica: a group of tensor-parallel ranks on one host, or evenly on several."""

    tp: int = 1  # ranks
    hosts: int = 1
    cpus: int = 1  # cores for each rank
    device: str = "cpu"  # a key of CLUSTER_RESOURCES; each rank takes one of these

    def __post_init__(self) -> None:
        for name in ("tp", "hosts", "cpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; 1 or more is expected")
        if self.tp % self.hosts:
            raise ConfigError(
                f"{self.tp} ranks cannot be shared evenly by {self.hosts} hosts; give a multiple"
            )
        if self.device not in CLUSTER_RESOURCES:
            raise ConfigError(
                f"device is '{self.device}'; use one of {', '.join(CLUSTER_RESOURCES)}"
            )

    @property
    def ranks_per_host(self) -> int:
        """Ranks on each host."""
        return self.tp // self.hosts

    @property
    def bundle(self) -> dict[str, float]:
        """What one host gives, in Ray's units."""
        found = {CORES: float(self.cpus * self.ranks_per_host)}
        if self.device != "cpu":
            found[CLUSTER_RESOURCES[self.device]] = float(self.ranks_per_host)
        return found

    @property
    def actor_options(self) -> dict[str, Any]:
        """The same, as the options of an actor: it takes a whole bundle."""
        others = dict(self.bundle)
        options: dict[str, Any] = {"num_cpus": others.pop(CORES)}
        if "GPU" in others:
            options["num_gpus"] = others.pop("GPU")
        return options | ({"resources": others} if others else {})

    @property
    def placement(self) -> dict[str, Any]:
        """The placement group of a replica: one bundle for each host."""
        strategy = "STRICT_SPREAD" if self.hosts > 1 else "PACK"
        return {"bundles": [self.bundle] * self.hosts, "strategy": strategy}

    def environ(
        self, own: Mapping[str, str], node_rank: int, address: str, port: int
    ) -> dict[str, str]:
        """The variables that our launcher reads on one host.

        Args:
            own: the environment of the actor there, in which Ray has listed its devices.
            node_rank: number of the host in the group.
            address: of host 0.
            port: where ranks of several hosts meet.
        """
        environ = {name: value for name, value in own.items() if name not in _REPLACED}
        for name in _LISTS:
            if not environ.get(name, "-"):  # no devices: that is no list for the launcher
                del environ[name]
        environ["TP_WORLD_SIZE"] = str(self.ranks_per_host)
        environ["OMP_NUM_THREADS"] = str(self.cpus)
        if self.device == "cpu":  # Ray counts cores; which ones are free is the system's to say
            environ["BIND_CPU"] = "0"
        if self.hosts > 1:
            environ |= {"NNODES": str(self.hosts), "NODE_RANK": str(node_rank)}
            environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        return environ


_REPLACED = ("TP_WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
_LISTS = ("ASCEND_RT_VISIBLE_DEVICES",)


@dataclass(frozen=True)
class ServicePlan:
    """What `gptneox ray deploy` deploys: the `args` of a YAML for `serve deploy`."""

    options: tuple[str, ...] = ()  # of serve.sh
    tp: int = 1
    hosts: int = 1
    cpus: int = 1
    device: str = "cpu"
    replicas: int = 1
    autoscaling: Mapping[str, Any] = field(default_factory=dict)  # Ray Serve's; replicas is unused
    env: Mapping[str, str] = field(default_factory=dict)  # for the processes of every host
    start_timeout_s: float = 1800.0  # from the start of a replica until it is ready

    @classmethod
    def read(cls, args: Mapping[str, Any]) -> ServicePlan:
        """Check the `args` of a YAML.

        Raises:
            ConfigError: one of them is wrong.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(args.keys() - known):
            raise ConfigError(f"args: unknown {', '.join(unknown)}; use {', '.join(sorted(known))}")
        plan = cls(**{**args, "options": tuple(map(str, args.get("options", ())))})
        plan.settings()
        return plan

    def args(self) -> dict[str, Any]:
        """What a YAML says of it: what `read` takes."""
        given = asdict(self) | {"options": list(self.options)}
        del given["replicas" if self.autoscaling else "autoscaling"]
        return given

    @property
    def shape(self) -> Shape:
        """What one replica takes."""
        return Shape(self.tp, self.hosts, self.cpus, self.device)

    def settings(self) -> Settings:
        """The settings of a replica's service.

        Raises:
            ConfigError: they are wrong, or are not a replica's to choose.
        """
        _ = self.shape
        settings = read_settings(["--task", "serve", *self.options], shipped("config.ini"))
        refused = [f"--{name}" for name in _NOT_A_REPLICAS if settings.given.get(name)]
        if settings.server.ssl_certfile:
            refused.append("ssl_certfile")
        if refused:
            raise ConfigError(
                f"{', '.join(refused)}: not of a replica; Ray's proxies listen, and TLS ends "
                "before them"
            )
        return settings

    def deployment_options(self) -> dict[str, Any]:
        """The options of the deployment."""
        settings, shape = self.settings(), self.shape
        most = settings.server.max_concurrent_requests
        options: dict[str, Any] = {
            "ray_actor_options": {**shape.actor_options, "runtime_env": runtime_env(self.env)},
            "placement_group_bundles": shape.placement["bundles"],
            "placement_group_strategy": shape.placement["strategy"],
            "max_ongoing_requests": most,  # Ray's default of 5 would starve a batch
            "max_queued_requests": most,
            "health_check_period_s": 5.0,
            "health_check_timeout_s": 30.0,
            "graceful_shutdown_wait_loop_s": 0.5,
            "graceful_shutdown_timeout_s": settings.server.shutdown_grace_s + END_S,
        }
        if not self.autoscaling:
            return options | {"num_replicas": self.replicas}
        # a replica is full when its batch is
        target = {"target_ongoing_requests": settings.engine.max_batch_size}
        return options | {"autoscaling_config": target | dict(self.autoscaling)}

    def replica_arguments(self) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
        """The arguments of `gptneox.cluster.deployment.Replica`."""
        server = self.settings().server
        limits = {
            "grace_s": server.shutdown_grace_s,
            "max_body_bytes": server.max_body_bytes,
            "start_timeout_s": self.start_timeout_s,
        }
        return asdict(self.shape), list(self.options), limits


def need_ray() -> None:
    """Raise ConfigError where Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError(f"Ray is missing; type: {sys.executable} -m pip install {RAY}")


RAY = "'ray[serve,data]>=2.60'"
END_S = 30.0  # beyond the grace of its requests, that the processes of a replica get to end
_NOT_A_REPLICAS = ("host", "port", "replicas", "root_path", "tp", "server_socket")


def runtime_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime environment of our actors, which find the package of a checkout by it."""
    own = {"PYTHONPATH": str(CHECKOUT)} if CHECKOUT else {}
    return {"env_vars": {**own, **env}}


def num_fitting(shape: Shape, nodes: Seq[Mapping[str, float]], most: int) -> int:
    """How many replicas have room on nodes with these resources, `most` at the most."""
    counts = [
        min(int(node.get(name, 0.0) // amount) for name, amount in shape.bundle.items())
        for node in nodes
    ]
    for number in range(most, 0, -1):  # the bundles of a replica lie on different nodes
        if sum(min(count, number) for count in counts) >= number * shape.hosts:
            return number
    return 0


def engine_options(settings: Settings) -> list[str]:
    """The flags that give an engine elsewhere the model and the [engine] section of this run.

    A model that was named by its id on a hub keeps that name, for each host has a cache of its own.
    """
    named = settings.given.get("model_path", "")
    is_on_hub = is_model_id(named)
    path = named if is_on_hub else str(settings.model_path.resolve())
    options = [f"--model_path={path}"]
    for section in (settings.model, settings.engine):
        for each in settings_of(type(section)):
            value = getattr(section, each.name)
            is_for_hub = each.name == "revision" and not is_on_hub
            if each.flag and each.name != "model_path" and value != "" and not is_for_hub:
                options.append(f"{each.flag}={value}")
    options += ["--trust_remote_code"] if settings.args.trust_remote_code else []
    return options + ([] if settings.args.load_tokenizer else ["--load_tokenizer=False"])
