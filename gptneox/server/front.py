# SPDX-License-Identifier: Apache-2.0
"""The front: one process that listens, starts the engines, and ends when it is told or they die.

It is no rank, so it can say that the model is being loaded, and that an engine has died. Nothing
here imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

import gptneox
from gptneox.chat_templates import ChatTemplateError, find_template
from gptneox.cli import Settings
from gptneox.config.environment import variables
from gptneox.config.errors import ConfigError
from gptneox.config.files import read_text
from gptneox.config.model import ModelConfig
from gptneox.config.settings import ServerSection
from gptneox.devices.ranks import split_host
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.server import wire
from gptneox.server.app import Application
from gptneox.server.asgi import MAX_HEAD_BYTES
from gptneox.server.connection import Connection
from gptneox.server.dialects.base import Context
from gptneox.server.errors import Kind, ServiceError
from gptneox.server.group import EngineGroup
from gptneox.server.metrics import EngineState, Metrics
from gptneox.server.service import Service
from gptneox.server.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 5
# After the last answer is complete, clients get so long to read it.
LAST_READ_S = 5
FIRST_FREE_PORT = 1024  # those below are privileged; Source: ip(7)
MAX_SOCKET_PATH = 100  # of 107 that Linux takes; Source: unix(7)


def run(settings: Settings) -> int:
    """Serve until a signal comes or an engine dies; returns the exit status.

    Everything that can be wrong is found before the weights are read.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    own = settings.server
    check_tls(own)
    keys = read_keys(own)
    if not keys and own.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(
            "anyone who reaches %s can use the service; set GPTNEOX_API_KEY or --api_key_file",
            own.host,
        )
    listener = listen(own.host, own.port)
    with listener, socket_folder() as folder:
        front = Front(settings, folder)
        vocabulary, context = open_model(settings, front.service)
        application = Application(context, keys)
        try:
            return asyncio.run(front.run(listener, application))
        finally:
            vocabulary.close()


# -- what is looked at before anything starts -----------------------------------------------------


def read_keys(own: ServerSection) -> list[str]:
    """The keys of [server] api_key and of api_key_file.

    Raises:
        ConfigError, OSError: the file has none, or cannot be read.
    """
    keys = [key.strip() for key in own.api_key.split(",") if key.strip()]
    if own.api_key_file:
        path = Path(own.api_key_file).expanduser()
        lines = [line.strip() for line in read_text(path).splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"[server] api_key_file {path} has no key; write one a line")
        warn_if_readable(path)
        keys += found
    return keys


def warn_if_readable(path: Path) -> None:
    """Say that every user of this host can read a secret."""
    if path.stat().st_mode & stat.S_IROTH:
        logger.warning("%s can be read by every user of this host; type: chmod 600 %s", path, path)


def check_tls(own: ServerSection) -> None:
    """Load certificate and key once, so that a wrong one is found now.

    Raises:
        ConfigError: they cannot be used.
    """
    if not own.ssl_certfile:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(own.ssl_certfile, own.ssl_keyfile, password=_no_password)
        if own.ssl_ca_certs:
            context.load_verify_locations(own.ssl_ca_certs)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        names = ", ".join(filter(None, (own.ssl_certfile, own.ssl_keyfile, own.ssl_ca_certs)))
        raise ConfigError(f"TLS with {names} is not possible: {error}") from error
    warn_if_readable(Path(own.ssl_keyfile))


def _no_password() -> str:
    raise ValueError("the key is encrypted; store it without a password")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: the address cannot be used, with the reason.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        remedy = "choose another with --host and --port"
        if isinstance(error, PermissionError) and port < FIRST_FREE_PORT:
            remedy = (
                f"ports below {FIRST_FREE_PORT} are for root alone; choose a higher one with "
                "--port, and let a proxy listen at this one"
            )
        raise OSError(
            f"{host} port {port} cannot be listened at: {error.strerror or error}; {remedy}"
        ) from error
    listener.setblocking(False)
    return listener


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A new folder for the sockets, which only this user can enter; removed in the end.

    Raises:
        OSError: there is no place for it.
    """
    folder = Path(tempfile.mkdtemp(prefix="gptneox-"))  # mode 0700
    try:
        if len(str(folder)) > MAX_SOCKET_PATH:
            raise OSError(
                f"the path {folder} is too long for a socket; set TMPDIR to a shorter folder"
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def count_devices(device: str, environ: Mapping[str, str]) -> int:
    """How many devices the ranks would see; 0: they would compute on the CPU.

    A process of its own tells it, because that needs torch.

    Args:
        device: [model] device.
        environ: of the ranks.

    Raises:
        RuntimeError: it is not known.
    """
    if device == "cpu":
        return 0
    code = "import sys, gptneox.devices as d; print(d.select(sys.argv[1]).count())"
    done = subprocess.run(
        [sys.executable, "-c", code, device],
        cwd=Path(gptneox.__file__).parents[1],
        env=dict(environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise RuntimeError(
            f"the devices for the replicas cannot be counted ({reason}); list them in "
            "ASCEND_RT_VISIBLE_DEVICES, as many for each"
        )
    return int(done.stdout.split()[-1])


def open_model(settings: Settings, service: Service) -> tuple[Vocabulary, Context]:
    """What the front needs of the checkpoint: its limits and its tokenizer, no weights.

    Raises:
        ValueError, OSError: the files are wrong.
    """
    path = settings.model_path
    if not (path / "config.json").is_file() and (path / "0" / "config.json").is_file():
        path = path / "0"  # of a cut checkpoint
    config = ModelConfig.from_pretrained(path)
    tokenizer = load_tokenizer(
        path, config.vocab_size, trust_remote_code=settings.args.trust_remote_code
    )
    positions = config.positions(settings.engine.max_position_embeddings)
    vocabulary = Vocabulary(tokenizer, config.vocab_size, positions)
    template, why_no_chat = None, ""
    try:
        template = find_template(settings.args.chat_template, tokenizer)
    except ChatTemplateError as error:
        if settings.args.chat_template:
            raise
        why_no_chat = str(error)
    context = Context(
        service=service,
        vocabulary=vocabulary,
        settings=settings.server,
        model_names=model_names(settings),
        created=int(time.time()),
        tokenizer_info=tokenizer_info(tokenizer),
        chat_template=template,
        why_no_chat=why_no_chat,
    )
    return vocabulary, context


def model_names(settings: Settings) -> tuple[str, ...]:
    """Names that requests may give as model."""
    names = [name.strip() for name in settings.server.served_model_name.split(",")]
    return tuple(filter(None, names)) or (settings.model_path.resolve().name,)


def tokenizer_info(tokenizer: Any) -> dict[str, Any]:
    """The special tokens by their roles, as tokenizer_config.json writes them."""
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = {role: getattr(tokenizer, role, None) for role in roles}
    return {role: str(token) for role, token in found.items() if token is not None}


# -- the process ---------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


class Front:
    """The engines, the HTTP server, and the order in which they end."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.own = settings, settings.server
        self.status = 0
        self._folder = folder
        environ = dict(variables())
        environ.pop("GPTNEOX_API_KEY", None)  # the ranks need none
        device = settings.model.device
        self._shares = split_host(
            environ, self.own.replicas, lambda: count_devices(device, environ)
        )
        self._stopping = asyncio.Event()
        self._signals = 0
        self._ends_engines = False  # from then on it is no loss that they go
        metrics = Metrics(self.own.metrics_prefix, model_names(settings)[0], self._engine_states)
        self.groups = [
            EngineGroup(
                str(index),
                folder / f"{index}.sock",
                heartbeat_timeout_s=self.own.heartbeat_timeout_s,
                on_lost=self._on_lost,
                on_step=metrics.step,
            )
            for index in range(self.own.replicas)
        ]
        self.service = Service(self.own, self.groups, metrics)

    async def run(self, listener: socket.socket, application: Application) -> int:
        """Serve until a signal comes or an engine dies; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        server = _Server(self._uvicorn_config(application))
        try:
            await self._start_engines()
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            scheme = "https" if self.own.ssl_certfile else "http"
            address, port = listener.getsockname()[:2]
            host = f"[{address}]" if ":" in address else address
            logger.info(
                "%s at %s://%s:%d%s; the model is being loaded",
                ", ".join(application.context.model_names),
                scheme,
                host,
                port,
                self.own.root_path,
            )
            await self._stopping.wait()
            await self._drain()
            self._ends_engines = True
            server.should_exit = True
            await serving
        finally:
            self._ends_engines = True
            await asyncio.gather(*(group.stop() for group in self.groups))
        logger.info("the service has ended")
        return self.status

    def _uvicorn_config(self, application: Application) -> uvicorn.Config:
        own = self.own
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # `Guard` logs what happens
        return uvicorn.Config(
            application.asgi,
            http=Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_READ_S,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ssl_certfile=own.ssl_certfile or None,
            ssl_keyfile=own.ssl_keyfile or None,
            ssl_ca_certs=own.ssl_ca_certs or None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if own.ssl_ca_certs else ssl.CERT_NONE,
        )

    async def _start_engines(self) -> None:
        for group, share in zip(self.groups, self._shares, strict=True):
            command = rank_command(self.settings.argv, group.path, share.cores)
            await group.start(command, share.environ)

    def _engine_states(self) -> list[EngineState]:
        return [group.state() for group in self.groups if group.limits]

    def _on_lost(self, group: EngineGroup) -> None:
        """An engine has gone. Unless the service is ending, that is its end."""
        if self._ends_engines:
            return
        logger.error("%s; the service ends", group.lost)
        # a signal to the whole process group ends idle engines, too: that is no failure
        if not self._stopping.is_set() or self.service.num_running:
            self.status = 2 if group.status == 2 and group.limits is None else 1
        self.service.lose(group, group.lost)
        group.kill()
        self._stopping.set()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals == 1:
            logger.info("%s: running requests are finished", signal.Signals(number).name)
            self._stopping.set()
            return
        for group in self.groups:
            group.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(128 + number)

    async def _drain(self) -> None:
        """Let running requests finish; new ones are refused."""
        self.service.is_draining = True
        end = time.monotonic() + self.own.shutdown_grace_s
        while self.service.num_running and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.service.fail_all(ServiceError(Kind.UNAVAILABLE, "the service is ending"))


def rank_command(argv: Seq[str], path: Path, cores: Seq[int]) -> list[str]:
    """The command that starts an engine: the launcher decides how many ranks, and where they meet.

    Args:
        argv: the command line of the front.
        path: the socket.
        cores: logical processors to stay on; none: any.
    """
    launcher = Path(gptneox.__file__).with_name("launch.py")
    own = ["--log_dir", str(wire.log_dir(path))]
    if cores:
        own += ["--cores", ",".join(map(str, cores))]
    options = [*argv, "--server_socket", str(path)]
    return [sys.executable, str(launcher), "ranks", "serve", *own, *options]
