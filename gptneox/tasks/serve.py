# SPDX-License-Identifier: Apache-2.0
"""`--task serve`: the HTTP service. The front starts the ranks with the same command line."""

from __future__ import annotations

import sys

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError

NO_FRONT = "-"  # --server_socket of the ranks on other hosts


def run(settings: Settings) -> int:
    """Serve until a signal comes; returns the exit status.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    if settings.model.attention == "flash":
        raise ConfigError("the service runs on the paged path alone; leave --attention out")
    if settings.args.server_socket:
        _run_rank(settings)
        return 0
    if not settings.args.load_tokenizer:
        raise ConfigError("the service needs the tokenizer; leave --load_tokenizer out")
    if settings.environment.world_size > 1:
        raise ConfigError(
            "--task serve starts its ranks itself; start it without torchrun: bash serve.sh"
        )
    try:
        from gptneox.server import front
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the service needs the package {error.name}; type: bash serve.sh, which installs it, "
            f"or: {sys.executable} -m pip install fastapi uvicorn prometheus_client"
        ) from error
    return front.run(settings)


def _run_rank(settings: Settings) -> None:
    """Be one of the ranks."""
    from gptneox.engine.paged import PagedEngine
    from gptneox.parallel import leave_group
    from gptneox.server.worker import FrontLink, serve
    from gptneox.session import load_engine, start

    path, link = settings.args.server_socket, None
    if path != NO_FRONT:
        link = FrontLink(path, settings.environment.rank)
    device, group = start(settings)
    engine = load_engine(settings, device, group)
    assert isinstance(engine, PagedEngine)
    serve(engine, link)
    leave_group()
