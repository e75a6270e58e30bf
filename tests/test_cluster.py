# SPDX-License-Identifier: Apache-2.0
"""gptneox/cluster without Ray: what a replica takes, the command line, and the files in deploy/."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes import REPO, run_here

from gptneox.cli import make_parser, read_settings
from gptneox.cluster.plan import ServicePlan, Shape, engine_options, num_fitting
from gptneox.config.errors import ConfigError
from gptneox.config.places import CHECKOUT
from gptneox.tasks import ray as task

DEPLOY = REPO / "deploy"


# -- a replica -----------------------------------------------------------------------------------


def test_a_rank_takes_cores_or_a_device_and_cores() -> None:
    assert Shape(tp=4, hosts=2, cpus=3).bundle == {"CPU": 6.0}
    shape = Shape(tp=16, hosts=2, cpus=2, device="npu")
    assert shape.bundle == {"CPU": 16.0, "NPU": 8.0}
    assert shape.actor_options == {"num_cpus": 16.0, "resources": {"NPU": 8.0}}
    assert shape.placement == {"bundles": [shape.bundle] * 2, "strategy": "STRICT_SPREAD"}
    assert Shape(tp=2, device="cuda").actor_options == {"num_cpus": 2.0, "num_gpus": 2.0}
    with pytest.raises(ConfigError, match="3 ranks cannot be shared evenly by 2 hosts"):
        Shape(tp=3, hosts=2)
    with pytest.raises(ConfigError, match="tp is 0"):
        Shape(tp=0)
    with pytest.raises(ConfigError, match="use one of npu, cuda, cpu"):
        Shape(device="gpu")


def test_the_launcher_is_told_where_its_ranks_meet() -> None:
    own = {"HOME": "/h", "NNODES": "9", "MASTER_PORT": "1", "ASCEND_RT_VISIBLE_DEVICES": ""}
    alone = Shape(tp=2, cpus=3).environ(own, 0, "", 0)
    assert alone == {
        "HOME": "/h",
        "TP_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "3",
        "BIND_CPU": "0",
    }
    own["ASCEND_RT_VISIBLE_DEVICES"] = "4,5"
    second = Shape(tp=4, hosts=2, device="npu").environ(own, 1, "10.0.0.1", 4321)
    assert second == {
        "HOME": "/h",
        "ASCEND_RT_VISIBLE_DEVICES": "4,5",
        "TP_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4321",
    }


def test_room_is_counted_by_hosts() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0}, {"CPU": 64.0, "NPU": 1.0}]
    assert num_fitting(Shape(tp=2), nodes, 99) == 2 + 1 + 32
    assert num_fitting(Shape(tp=2), nodes, 5) == 5
    assert num_fitting(Shape(tp=4, hosts=2), nodes, 9) == 3  # never two bundles on one host
    assert num_fitting(Shape(tp=8, hosts=4), nodes, 9) == 0
    assert num_fitting(Shape(device="npu"), nodes, 9) == 1


def test_an_engine_elsewhere_gets_this_runs_settings(tmp_path: Path) -> None:
    argv = ["--task", "precision", "--ray", "2", "--tp", "2", "--block_size", "16"]
    argv += ["--dtype", "float32", "--model_path", "weights/neox-mini", "--max_batch_size", "3"]
    settings = read_settings(argv, tmp_path / "none.ini")
    assert settings.attention == "paged"
    options = engine_options(settings)
    assert f"--model_path={REPO / 'weights' / 'neox-mini'}" in options
    there = read_settings(["--task", "serve", *options], tmp_path / "none.ini")
    assert there.engine == settings.engine, "the service's own defaults do not count"
    assert there.model.dtype == "float32"
    by_id = read_settings(["--ray", "1", "--model_path", "a/b", "--revision", "v1"], tmp_path / "x")
    assert {"--model_path=a/b", "--revision=v1"} <= set(engine_options(by_id))


def test_an_engine_elsewhere_needs_no_tokenizer_for_ids(tmp_path: Path) -> None:
    ids = ["--load_tokenizer", "False", "--input_ids", "1"]
    there = [
        "--task",
        "serve",
        *engine_options(read_settings(["--ray", "1", *ids], tmp_path / "x")),
    ]
    rank = read_settings([*there, "--server_socket", "s"], tmp_path / "x")
    assert not rank.args.load_tokenizer
    with pytest.raises(ConfigError, match="--load_tokenizer False works on ids alone"):
        read_settings(there, tmp_path / "x")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "serve", "--ray", "2"], "--ray 2 with --task serve"),
        (["--ray", "-1"], "1 or more replicas"),
        (["--ray", "2", "--attention", "flash"], "paged path alone"),
        (["--ray", "2", "--interactive"], "--interactive"),
    ],
)
def test_what_cannot_be_spread_is_refused(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_settings(argv, tmp_path / "none.ini")


# -- the service's plan --------------------------------------------------------------------------


def test_a_deployment_has_room_for_a_whole_batch() -> None:
    plan = ServicePlan.read({"tp": 2, "hosts": 2, "replicas": 3, "env": {"A": "b"}})
    options = plan.deployment_options()
    assert options["num_replicas"] == 3
    assert options["max_ongoing_requests"] == 128
    assert options["placement_group_bundles"] == [{"CPU": 1.0}] * 2
    assert options["ray_actor_options"]["runtime_env"]["env_vars"] == {
        "PYTHONPATH": str(CHECKOUT),
        "A": "b",
    }
    scaled = ServicePlan.read({"autoscaling": {"min_replicas": 1, "max_replicas": 4}})
    assert scaled.deployment_options()["autoscaling_config"] == {
        "target_ongoing_requests": 32,
        "min_replicas": 1,
        "max_replicas": 4,
    }
    assert "num_replicas" not in scaled.deployment_options()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tpp": 2}, "unknown tpp"),
        ({"options": ["--port", "1"]}, "--port"),
        ({"options": ["--ssl_certfile", "a", "--ssl_keyfile", "b"]}, "ssl_certfile"),
        ({"tp": 3, "hosts": 2}, "evenly"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServicePlan.read(args)


# -- the command line ----------------------------------------------------------------------------


def test_the_printed_yaml_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["weights/neox-mini", "--tp", "2", "--cpus", "3", "--dtype", "float32"]
    assert task.main(["config", *argv, "--env", "X=1=2", "--port", "81"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["http_options"] == {"host": "127.0.0.1", "port": 81}
    (application,) = found["applications"]
    assert application["import_path"] == "gptneox.cluster.deployment:build"
    plan = ServicePlan.read(application["args"])
    assert (plan.tp, plan.cpus, plan.env) == (2, 3, {"X": "1=2"})
    assert plan.settings().model_path == (REPO / "weights" / "neox-mini")
    assert plan.options.count("--model_path") == 1
    assert plan == task.plan_of(*task.parse(["config", *argv, "--env", "X=1=2"]))


@pytest.mark.parametrize(
    "argv",
    [["--min_replicas", "1"], ["--env", "X"], ["--no_such_flag"], ["--tp", "3", "--hosts", "2"]],
)
def test_wrong_usage_has_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = task.main(["config", *argv])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("argv", [["precision", "--ray", "1"], ["ray", "deploy"]])
def test_without_ray_every_command_says_so_with_status_2(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gptneox.cluster.plan.find_spec", lambda name: None)
    assert run_here(*argv) == 2
    assert "Ray is missing; type: " in capsys.readouterr().err.splitlines()[-1]


# -- the files and the docs ----------------------------------------------------------------------


def test_the_yaml_for_serve_deploy_is_a_plan() -> None:
    found = yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text("utf-8"))
    (application,) = found["applications"]
    plan = ServicePlan.read(application["args"])
    assert plan.shape.bundle == {"CPU": 32.0, "NPU": 8.0}
    assert plan.deployment_options()["autoscaling_config"]["max_replicas"] == 4


def test_the_manifest_starts_the_launcher_on_every_host() -> None:
    text = (DEPLOY / "leaderworkerset.yaml").read_text("utf-8")
    workload, service = yaml.safe_load_all(text)
    template = workload["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    (leader,), (worker,) = (
        template[name]["spec"]["containers"] for name in ("leaderTemplate", "workerTemplate")
    )
    variables = {each["name"]: each["value"] for each in leader["env"]}
    assert variables["NNODES"] == "$(LWS_GROUP_SIZE)"
    assert variables["NODE_RANK"] == "$(LWS_WORKER_INDEX)"
    assert variables["MASTER_ADDR"] == "$(LWS_LEADER_ADDRESS)"
    assert worker["env"] == leader["env"]
    assert worker["resources"] == leader["resources"]
    paths = {name: leader[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")}
    assert paths == {"liveness": "/health", "readiness": "/ready"}
    for container in (leader, worker):  # what the image's entry point gets
        read_settings(["--task", "serve", "--model_path", *container["args"]], Path("none"))
    labels = template["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert "metadata" not in template["workerTemplate"], "no requests for the others"


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.ascend"])
def test_images_start_what_the_package_has(name: str) -> None:
    text = (DEPLOY / name).read_text("utf-8")
    assert re.search(r"^ARG BASE_IMAGE", text, re.MULTILINE)
    assert "gptneox.launch" in re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1]
    extras = re.search(r"^ARG EXTRAS=(\w+)$", text, re.MULTILINE)[1]
    project = (REPO / "pyproject.toml").read_text("utf-8")
    assert re.search(rf"^{extras} = \[", project, re.MULTILINE)
    if hadolint := shutil.which("hadolint"):
        subprocess.run([hadolint, str(DEPLOY / name)], check=True)


def commands(text: str) -> list[list[str]]:
    """The commands of ours in the blocks of a page."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["gptneox"]:
                found.append(list(itertools.takewhile(lambda word: word != ">", words[1:])))
    return found


def test_commands_of_the_page_parse(tmp_path: Path) -> None:
    """So do those of the READMEs' paragraph."""
    pages = [REPO / "docs" / "cluster.md", REPO / "README.md", REPO / "README.zh.md"]
    found = [words for page in pages for words in commands(page.read_text("utf-8"))]
    own = [words[1:] for words in found if words[0] == "ray"]
    assert {words[0] for words in own} == {"deploy", "config", "delete", "shutdown"}
    for words in own:
        args, rest = task.parse(words)
        assert isinstance(args, argparse.Namespace)
        if args.command in ("deploy", "config"):
            task.plan_of(args, rest)
    others = [words for words in found if words[0] in ("precision", "inference")]
    assert len(others) >= 2
    for words in others:
        make_parser().parse_args(["--task", *words])
        read_settings(["--task", *words], tmp_path / "none.ini")


def test_the_page_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPO / "docs" / "cluster.md").read_text("utf-8")
    table = [line for line in text.splitlines() if line.startswith("| `--")]
    named = {flag for line in table for flag in re.findall(r"--\w+", line.split("|")[1])}
    with pytest.raises(SystemExit):
        task.parse(["deploy", "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert known - {"--help"} == named
