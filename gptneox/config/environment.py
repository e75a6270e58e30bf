# SPDX-License-Identifier: Apache-2.0
"""The environment variables of a run. No other Python file reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gptneox.config.errors import ConfigError, one_of

HCCL_BASE_PORT = 60000  # HCCL's own default
USER_FOLDER = "gptneox-ascend"  # in the folders where a user's programs keep their files


@dataclass(frozen=True)
class Environment:
    """The variables that are no config.ini keys: rank, benchmark file, debugging dumps."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this machine, which share its cores
    is_quant: bool = False
    benchmark_enabled: bool = False
    benchmark_path: str = ""
    log_level: str = "INFO"
    omp_num_threads: int = 0
    cpu_binding_num: int = 0  # CPU_BINDING_NUM: cores per device; 0: an even share of the node
    visible_devices: str = ""  # ASCEND_RT_VISIBLE_DEVICES
    ascend_home: str = ""  # ASCEND_HOME_PATH, which CANN's set_env.sh sets
    master_addr: str = ""  # MASTER_ADDR: where the ranks meet
    master_port: int = 0  # MASTER_PORT; 0: the launcher's own
    hccl_base_port: int = HCCL_BASE_PORT  # HCCL_IF_BASE_PORT: first of 16 host ports
    hccl_port_range: str = ""  # HCCL_HOST_SOCKET_PORT_RANGE, which goes before it
    timeit: bool = False  # TIMEIT: `perf_mode = detail` splits each step into its parts
    modeltest_data_dir: str = ""  # MODELTEST_DATA_DIR; empty: tests/modeltest/data
    modeltest_output_dir: str = ""  # MODELTEST_OUTPUT_DIR; empty: tests/modeltest/outputs
    modeltest_log_to_file: bool = False  # MODELTEST_LOG_TO_FILE: also log under outputs/logs
    cpu_kernels: str = "auto"  # GPTNEOX_CPU_KERNELS: on refuses to go without, off is plain torch
    cache_home: str = ""  # XDG_CACHE_HOME; empty: .cache in the home folder
    state_home: str = ""  # XDG_STATE_HOME; empty: .local/state in the home folder
    home: str = ""  # HOME; empty: as the system's list of users says
    cxx: str = ""  # CXX: the compiler of the CPU kernels

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        """Read os.environ.

        Raises:
            ConfigError: a value has the wrong form, or torchrun's set of variables is incomplete.
        """
        environ = os.environ if environ is None else environ

        def integer(name: str, default: int = 0) -> int:
            text = environ.get(name, "") or str(default)
            if not re.fullmatch(r"\d+", text):
                raise ConfigError(f"{name} is {text!r}; a non-negative integer is expected")
            return int(text)

        launched = [n for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if environ.get(n)]
        if launched and len(launched) < 3:
            missing = sorted({"RANK", "LOCAL_RANK", "WORLD_SIZE"} - set(launched))
            raise ConfigError(
                f"{', '.join(launched)} set without {', '.join(missing)}; "
                "start through run_pa.sh or torchrun, or unset them"
            )
        rank, world_size = integer("RANK"), integer("WORLD_SIZE", 1)
        if world_size < 1 or rank >= world_size:
            raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {world_size}")
        local_rank = integer("LOCAL_RANK")
        local_world_size = integer("LOCAL_WORLD_SIZE", world_size) if launched else 1
        if not local_rank < local_world_size <= world_size or local_rank > rank:
            raise ConfigError(
                f"LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_world_size} cannot be RANK "
                f"{rank} of WORLD_SIZE {world_size}; start through run_pa.sh or torchrun, or unset "
                "all four"
            )
        level = (environ.get("MINDIE_LOG_LEVEL") or "INFO").upper()
        one_of("environment", "MINDIE_LOG_LEVEL", level, ("DEBUG", "INFO", "WARNING", "ERROR"))
        kernels = environ.get("GPTNEOX_CPU_KERNELS") or "auto"
        one_of("environment", "GPTNEOX_CPU_KERNELS", kernels, ("auto", "on", "off"))
        return cls(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
            is_quant=integer("IS_QUANT") == 1,
            benchmark_enabled=integer("ATB_LLM_BENCHMARK_ENABLE") == 1,
            benchmark_path=environ.get("ATB_LLM_BENCHMARK_FILEPATH", ""),
            log_level=level,
            omp_num_threads=_outer_threads(environ.get("OMP_NUM_THREADS", "")),
            cpu_binding_num=integer("CPU_BINDING_NUM"),
            visible_devices=environ.get("ASCEND_RT_VISIBLE_DEVICES", ""),
            ascend_home=environ.get("ASCEND_HOME_PATH", ""),
            master_addr=environ.get("MASTER_ADDR", ""),
            master_port=integer("MASTER_PORT"),
            hccl_base_port=integer("HCCL_IF_BASE_PORT", HCCL_BASE_PORT),
            hccl_port_range=environ.get("HCCL_HOST_SOCKET_PORT_RANGE", ""),
            timeit=integer("TIMEIT") == 1,
            modeltest_data_dir=environ.get("MODELTEST_DATA_DIR", ""),
            modeltest_output_dir=environ.get("MODELTEST_OUTPUT_DIR", ""),
            modeltest_log_to_file=integer("MODELTEST_LOG_TO_FILE") == 1,
            cpu_kernels=kernels,
            cache_home=environ.get("XDG_CACHE_HOME", ""),
            home=environ.get("HOME", ""),
            state_home=environ.get("XDG_STATE_HOME", ""),
            cxx=environ.get("CXX", ""),
        )


def _outer_threads(text: str) -> int:
    """OMP_NUM_THREADS is a list, one number for each level of nesting; ours is the outermost.

    Source: OpenMP API 5.2, section 21.2.
    """
    if not re.fullmatch(r"\s*(\d+\s*(,\s*\d+\s*)*)?", text, re.ASCII):
        raise ConfigError(
            f"OMP_NUM_THREADS is {text!r}; a number, or a list such as 4,2, is expected"
        )
    return int(text.split(",")[0] or 0) if text.strip() else 0


def load_devices_by_hand() -> None:
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
