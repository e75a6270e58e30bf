# SPDX-License-Identifier: Apache-2.0
"""Serve from a Ray cluster: on many machines, behind one address.

    gptneox ray deploy [WEIGHT_DIR] [options] [serve.sh's options]    deploy, or change what is
    gptneox ray config [WEIGHT_DIR] [options] [serve.sh's options]    YAML for `serve deploy`
    gptneox ray delete [--name NAME] [--address ADDRESS]              take it down
    gptneox ray shutdown [--address ADDRESS]                          take Ray Serve down with all

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from gptneox.cli import make_parser
from gptneox.cluster.plan import ServicePlan, need_ray
from gptneox.config.errors import ConfigError, exit_status
from gptneox.config.places import CHECKOUT
from gptneox.devices.ranks import CLUSTER_RESOURCES
from gptneox.files import prepare_streams

ROUTES_S = 30.0
SHUTDOWN_S = 600.0  # that replicas may take for the requests that they have
PROGRAM = "main.py ray" if CHECKOUT else "gptneox ray"
SERVE = "serve"  # the namespace of Ray Serve's actors


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    args, options = parse(argv)
    try:
        prepare_streams()
        if args.command in ("delete", "shutdown"):
            return _delete(args) if args.command == "delete" else _shutdown(args)
        plan = plan_of(args, options)
        if args.command == "config":
            sys.stdout.write(config_yaml(args, plan))
            return 0
        return _deploy(args, plan)
    except (ValueError, OSError, RuntimeError) as error:  # Ray's own errors are among them
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return exit_status(error)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of serve.sh, which are checked later."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Serve from a Ray cluster. Further options are those of serve.sh.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("deploy", "config", "delete", "shutdown"):
        sub = commands.add_parser(command, allow_abbrev=False)
        add = sub.add_argument
        if command != "shutdown":
            add("--name", default="gptneox", help="the application's; default: gptneox")
        if command != "config":
            add("--address", default="auto", help="of the cluster; default: RAY_ADDRESS, or "
                "the one on this host")  # fmt: skip
        if command in ("deploy", "config"):
            _add_options(sub)
    args, rest = parser.parse_known_args(argv)
    if args.command in ("delete", "shutdown") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="that Ray's proxies listen at; default: 127.0.0.1")
    add("--port", type=int, default=8000, help="that they listen at; default: 8000")
    add("--route_prefix", default="/", help="path that the service is below; default: /")
    add("--replicas", type=int, default=1, help="engines, each with its own weights; default: 1")
    add("--min_replicas", type=int, help="with --max_replicas: as many as the load needs")
    add("--max_replicas", type=int, help="the most of them")
    add("--target_requests", type=float,
        help="running requests of each that are enough; default: max_batch_size")  # fmt: skip
    add("--downscale_delay_s", type=float, default=600.0,
        help="seconds of less load before one ends; default: 600")  # fmt: skip
    add("--tp", type=int, default=1, help="ranks of a replica; default: 1")
    add("--hosts", type=int, default=1, help="hosts that they are spread over; default: 1")
    add("--cpus", type=int, default=1, help="cores of each rank; default: 1")
    add("--on", choices=sorted(CLUSTER_RESOURCES), default="cpu",
        help="what each rank takes one of; cpu: cores alone")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME=VALUE",
        help="variable for the processes of every host; may be repeated")  # fmt: skip


def plan_of(args: argparse.Namespace, options: list[str]) -> ServicePlan:
    """What is deployed.

    Raises:
        ConfigError: an option is wrong.
    """
    if options and not options[0].startswith("-"):
        options = ["--model_path", *options]
    path = make_parser().parse_args(options).model_path
    if path and Path(path).exists():  # else it is a model's id, or a folder of the other hosts
        whole = str(Path(path).resolve())
        changed = {path: whole, f"--model_path={path}": f"--model_path={whole}"}
        options = [changed.get(word, word) for word in options]
    scaling: dict[str, Any] = {}
    if (args.min_replicas is None) != (args.max_replicas is None):
        raise ConfigError("--min_replicas and --max_replicas go together; give both")
    if args.min_replicas is not None:
        scaling = {"min_replicas": args.min_replicas, "max_replicas": args.max_replicas}
        scaling["downscale_delay_s"] = args.downscale_delay_s
        if args.target_requests:
            scaling["target_ongoing_requests"] = args.target_requests
    env = dict(pair.partition("=")[::2] for pair in args.env)
    if not all("=" in pair for pair in args.env):
        raise ConfigError(f"--env {' '.join(args.env)}: NAME=VALUE is expected")
    return ServicePlan.read(
        {
            "options": tuple(options),
            "tp": args.tp,
            "hosts": args.hosts,
            "cpus": args.cpus,
            "device": args.on,
            "replicas": args.replicas,
            "autoscaling": scaling,
            "env": env,
        }
    )


def config_yaml(args: argparse.Namespace, plan: ServicePlan) -> str:
    """The YAML for `serve deploy` and `serve run`."""
    import yaml  # a requirement of Ray

    application: dict[str, Any] = {
        "name": args.name,
        "route_prefix": args.route_prefix,
        "import_path": "gptneox.cluster.deployment:build",
        "args": plan.args(),
    }
    if CHECKOUT:  # `build` runs in the cluster, too
        application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(CHECKOUT)}}
    whole = {
        "proxy_location": "EveryNode",
        "http_options": {"host": args.host, "port": args.port},
        "applications": [application],
    }
    text: str = yaml.safe_dump(whole, sort_keys=False)
    return text


def _deploy(args: argparse.Namespace, plan: ServicePlan) -> int:
    need_ray()
    from gptneox.cluster import connection

    connection.connect(args.address)
    connection.warn_without_room(plan.shape, plan.autoscaling.get("min_replicas", plan.replicas))
    from ray import serve

    from gptneox.cluster.deployment import application

    serve.start(proxy_location="EveryNode", http_options={"host": args.host, "port": args.port})
    serve.run(application(plan), name=args.name, route_prefix=args.route_prefix)
    _check_address(args)
    prefix = args.route_prefix.rstrip("/")
    print(f"{args.name} is ready at http://{args.host}:{args.port}{prefix}")
    return 0


def _check_address(args: argparse.Namespace) -> None:
    """Raise RuntimeError where Ray's proxies do not listen there: they keep their first address."""
    end = time.monotonic() + ROUTES_S  # a proxy that has just started does not know its routes yet
    while not _has_route(args):
        if time.monotonic() > end:
            raise RuntimeError(
                f"{args.name} is deployed, but not at {args.host} port {args.port}: Ray Serve has "
                "run with another --host or --port before, and keeps it; to change it, take all "
                f"of its applications down with: {PROGRAM} shutdown"
            )
        time.sleep(0.5)


def _has_route(args: argparse.Namespace) -> bool:
    host = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
    try:
        with urllib.request.urlopen(f"http://{host}:{args.port}/-/routes", timeout=10) as answer:
            return args.route_prefix in json.load(answer)
    except (OSError, ValueError):
        return False


def _delete(args: argparse.Namespace) -> int:
    need_ray()
    from gptneox.cluster import connection

    connection.connect(args.address)
    from ray import serve

    known = serve.status().applications
    if args.name not in known:
        raise RuntimeError(
            f"no application '{args.name}' runs in this cluster; give --name with one of: "
            f"{', '.join(sorted(known)) or '(none runs)'}"
        )
    serve.delete(args.name)
    print(f"{args.name} is deleted")
    return 0


def _shutdown(args: argparse.Namespace) -> int:
    need_ray()
    from gptneox.cluster import connection

    connection.connect(args.address)
    import ray
    from ray import serve

    serve.shutdown()
    end = time.monotonic() + SHUTDOWN_S
    while SERVE in {each["namespace"] for each in ray.util.list_named_actors(all_namespaces=True)}:
        if time.monotonic() > end:
            raise RuntimeError(f"Ray Serve has not ended after {SHUTDOWN_S:.0f} s; see its logs")
        time.sleep(0.5)
    print("Ray Serve has ended")
    return 0
