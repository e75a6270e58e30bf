# SPDX-License-Identifier: Apache-2.0
"""The environment variables of a run. No other Python file reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptneox.config.errors import ConfigError, one_of
from gptneox.config.schema import Setting, setting, settings_of

HCCL_BASE_PORT = 60000  # HCCL's own default
USER_FOLDER = "gptneox-ascend"  # in the folders where a user's programs keep their files


# The launchers read these before they start main.py; a value that the user exported is kept.
LAUNCHER_VARIABLES = {
    "TP_WORLD_SIZE": "Processes on this host; 1: without torchrun. Unset: one per device listed.",
    "NNODES, NODE_RANK": "A run over several hosts: their number, and the number of this one.",
    "PYTHON, TORCHRUN": "The interpreter and the launcher of several processes to use.",
    "input_dir, output_dir, world_size_": "What cut_model_and_run.sh cuts, where to, and into how "
    "many parts. They also stand at the top of the script.",
    "INF_NAN_MODE_ENABLE": "0: overflow in fp16 saturates. Unset: 0 on a 300I DUO; Atlas A2 "
    "refuses 0.",
    "PYTORCH_NPU_ALLOC_CONF, TASK_QUEUE_ENABLE, HCCL_BUFFSIZE, HCCL_OP_BASE_FFTS_MODE_ENABLE, "
    "ATB_LAUNCH_KERNEL_WITH_TILING, ATB_LAYER_INTERNAL_TENSOR_REUSE, ATB_OPERATION_EXECUTE_ASYNC, "
    "ATB_USE_TILING_COPY_STREAM": "Switches of CANN and ATB. cut_model_and_run.sh sets those that "
    "are unset; off an NPU they have no effect.",
}


def outer_threads(text: str) -> int:
    """OMP_NUM_THREADS is a list, one number for each level of nesting; ours is the outermost.

    Source: OpenMP API 5.2, section 21.2.
    """
    if not re.fullmatch(r"\s*(\d+\s*(,\s*\d+\s*)*)?", text, re.ASCII):
        raise ConfigError(
            f"OMP_NUM_THREADS is {text!r}; a number, or a list such as 4,2, is expected"
        )
    return int(text.split(",")[0] or 0) if text.strip() else 0


@dataclass(frozen=True)
class Environment:
    """Variables without a key in config.ini. An empty variable counts as unset."""

    rank: int = setting(0, "Set by torchrun: number of this process.", env="RANK")
    local_rank: int = setting(
        0, "Set by torchrun: number of this process on this host.", env="LOCAL_RANK"
    )
    world_size: int = setting(1, "Set by torchrun: number of processes.", env="WORLD_SIZE")
    local_world_size: int = setting(
        1,
        "Set by torchrun: number of processes on this host, which share its cores. Unset: all.",
        env="LOCAL_WORLD_SIZE",
    )
    master_addr: str = setting(
        "", "Address of the host where the processes meet.", env="MASTER_ADDR"
    )
    master_port: int = setting(
        0,
        "Port where they meet. 0: the launcher's, 20014 or 20001 or the next free one.",
        env="MASTER_PORT",
    )
    visible_devices: str = setting(
        "",
        "Devices, such as 0,1; the launchers start one process on each.",
        env="ASCEND_RT_VISIBLE_DEVICES",
    )
    omp_num_threads: int = setting(
        0,
        "Threads of a process. 0: on a CPU one per physical core of its share, no more than a "
        "container's CPU quota.",
        parse=outer_threads,
        env="OMP_NUM_THREADS",
    )
    cpu_binding_num: int = setting(
        0,
        "Cores that a process is bound to. 0: an even share of its NUMA node.",
        env="CPU_BINDING_NUM",
    )
    is_quant: bool = setting(
        False,
        "1: the weights must be quantized, float ones are an error. Nothing is converted.",
        env="IS_QUANT",
    )
    use_modelscope: bool = setting(
        False,
        "1 takes models named OWNER/NAME from ModelScope instead of Hugging Face.",
        env="USE_MODELSCOPE",
    )
    benchmark_enabled: bool = setting(
        False, "1 writes the times of the steps to a CSV file.", env="ATB_LLM_BENCHMARK_ENABLE"
    )
    benchmark_path: str = setting(
        "",
        "That CSV file, which is replaced. Unset: one more row in benchmark_result/benchmark.csv.",
        env="ATB_LLM_BENCHMARK_FILEPATH",
    )
    timeit: bool = setting(
        False, "1 lets perf_mode = detail split each step into its parts.", env="TIMEIT"
    )
    log_level: str = setting(
        "INFO",
        "Least serious message that is logged.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        parse=str.upper,
        env="MINDIE_LOG_LEVEL",
    )
    cpu_kernels: str = setting(
        "auto",
        "Compiled CPU kernels. on: no run without them; off: plain torch.",
        choices=("auto", "on", "off"),
        env="GPTNEOX_CPU_KERNELS",
    )
    cxx: str = setting("", "Compiler of the CPU kernels. Unset: c++.", env="CXX")
    hccl_base_port: int = setting(
        HCCL_BASE_PORT,
        "First of the 16 host ports that NPU processes meet on. Unset: the launchers take the next "
        f"16 free ones from {HCCL_BASE_PORT} on.",
        env="HCCL_IF_BASE_PORT",
    )
    hccl_port_range: str = setting(
        "",
        "Host ports that HCCL chooses from, instead of HCCL_IF_BASE_PORT.",
        env="HCCL_HOST_SOCKET_PORT_RANGE",
    )
    ascend_home: str = setting(
        "", "Set by CANN's set_env.sh: where CANN is.", env="ASCEND_HOME_PATH"
    )
    modeltest_data_dir: str = setting(
        "", "Question sets. Unset: tests/modeltest/data.", env="MODELTEST_DATA_DIR"
    )
    modeltest_output_dir: str = setting(
        "", "Results. Unset: tests/modeltest/outputs.", env="MODELTEST_OUTPUT_DIR"
    )
    modeltest_log_to_file: bool = setting(
        False, "1 also logs below the results, in logs.", env="MODELTEST_LOG_TO_FILE"
    )
    cache_home: str = setting(
        "", "Holds the compiled kernels. Unset: .cache in the home folder.", env="XDG_CACHE_HOME"
    )
    state_home: str = setting(
        "",
        "Holds the history of the prompt loop. Unset: .local/state in the home folder.",
        env="XDG_STATE_HOME",
    )
    home: str = setting("", "Home folder. Unset: as the system's list of users says.", env="HOME")

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        """Read os.environ.

        Raises:
            ConfigError: a value has the wrong form, or torchrun's set of variables is incomplete.
        """
        environ = os.environ if environ is None else environ
        launched = [n for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if environ.get(n)]
        if launched and len(launched) < 3:
            missing = sorted({"RANK", "LOCAL_RANK", "WORLD_SIZE"} - set(launched))
            raise ConfigError(
                f"{', '.join(launched)} set without {', '.join(missing)}; "
                "start through run_pa.sh or torchrun, or unset them"
            )
        here = (environ.get("LOCAL_WORLD_SIZE") or environ["WORLD_SIZE"]) if launched else ""
        values = {**environ, "LOCAL_WORLD_SIZE": here}
        read = cls(
            **{each.name: _value(each, values.get(each.env, "")) for each in settings_of(cls)}
        )
        if read.world_size < 1 or read.rank >= read.world_size:
            raise ConfigError(f"RANK {read.rank} is not below WORLD_SIZE {read.world_size}")
        possible = read.local_rank < read.local_world_size <= read.world_size
        if not possible or read.local_rank > read.rank:
            raise ConfigError(
                f"LOCAL_RANK {read.local_rank} of LOCAL_WORLD_SIZE {read.local_world_size} cannot "
                f"be RANK {read.rank} of WORLD_SIZE {read.world_size}; start through run_pa.sh or "
                "torchrun, or unset all four"
            )
        return read


def _value(each: Setting, text: str) -> Any:
    """A variable's text as a value of the field's type; the default for an empty text."""
    value: Any = text or each.default
    if text and each.parse:
        value = each.parse(text)
    elif text and isinstance(each.default, int):
        if not re.fullmatch(r"\d+", text):
            raise ConfigError(f"{each.env} is {text!r}; a non-negative integer is expected")
        value = int(text) == 1 if isinstance(each.default, bool) else int(text)
    if each.choices:
        one_of("environment", each.env, value, each.choices)
    return value


def disable_device_autoload() -> None:
    """Keep `import torch` from importing device packages, whose failure would end the program.

    Each device imports its own and can say what is missing.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def variables() -> Mapping[str, str]:
    """All environment variables."""
    return os.environ


def set_variables(environ: Mapping[str, str]) -> None:
    """Make `environ` the environment of this process and of those that it starts."""
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ.update(environ)
