# SPDX-License-Identifier: Apache-2.0
"""The launchers: read the environment, decide how many ranks start, become main.py or torchrun.

    python -m gptneox.launch paged SCRIPT [WEIGHT_DIR] [main.py's options]
    python -m gptneox.launch flash SCRIPT INPUT_DIR OUTPUT_DIR WORLD_SIZE [--recut] [TASK [options]]
    python -m gptneox.launch modeltest SCRIPT [arguments of tests/modeltest/run.sh]
    python -m gptneox.launch serve SCRIPT [WEIGHT_DIR] [main.py's options]
    python -m gptneox.launch ranks NAME [--cores 0,1] [--log_dir DIR] [main.py's options]

run_pa.sh, cut_model_and_run.sh, tests/modeltest/run.sh and serve.sh find a Python and start this
module in it; their headers explain the variables. `ranks` is how the service starts its engines.
SCRIPT is the name that messages begin with. The current folder stays the caller's. With --check as
the first argument nothing is started: what is wrong with the arguments and the environment is said,
and no package is needed for that.

Exit status: main.py's; 1 something is missing, 2 wrong usage, such as a path that is not there.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # neither this file's folder nor the current one, but the package's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import importlib.util
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass, field, replace
from types import FrameType

from gptneox.config.environment import set_variables, variables
from gptneox.config.errors import ConfigError, NoSuchPath, exit_status
from gptneox.config.places import CHECKOUT, shipped
from gptneox.config.settings import EMBEDDED_CHECKPOINT, ModelSection, parse_device_ids
from gptneox.devices.binding import bind, run_tool, threads_per_rank
from gptneox.devices.ranks import (
    DEFAULT_PORTS,
    PortLocks,
    Ranks,
    drop_foreign_ranks,
    is_count,
    prepare,
    read_nodes,
    read_ranks,
)
from gptneox.devices.switches import has_driver, set_deterministic, set_switches
from gptneox.files import is_unused
from gptneox.hub import is_model_id

FLASH_TASKS = ("inference", "precision", "performance")
MODELTEST_PORT = "12345"  # over several hosts, as its README says
HELP = {"-h", "--help"}


@dataclass
class Job:
    """A call of a launcher."""

    script: str
    environ: dict[str, str]
    ranks: Ranks = field(default_factory=Ranks)
    arguments: list[str] = field(default_factory=list)  # of main.py
    torchrun_options: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What messages begin with."""
        return self.script.rpartition("/")[2]

    def prepare(self, launcher: str) -> None:
        """Choose ranks and ports."""
        locks = PortLocks(self.environ, self.name)  # held to the end of this process
        self.ranks = prepare(self.environ, DEFAULT_PORTS[launcher], locks)
        self.drop_foreign_ranks()

    def drop_foreign_ranks(self) -> None:
        """Unset what others say of ranks."""
        if foreign := drop_foreign_ranks(self.environ):
            self.warn(
                f"not used:{foreign}; here TP_WORLD_SIZE or the devices listed, NNODES, NODE_RANK "
                "and MASTER_ADDR count"
            )

    def warn(self, text: object) -> None:
        """Say it on stderr."""
        sys.stderr.write(f"{self.name}: {text}\n")


def main(argv: list[str]) -> int:
    """Start a launcher's job, or only check it; returns the exit status."""
    only_check = argv[:1] == ["--check"]
    argv = argv[only_check:]
    if len(argv) < 2 or argv[0] not in (*_LAUNCHERS, "flash"):
        sys.stderr.write(f"{__doc__}")
        return 2
    launcher, script, *arguments = argv
    environ = dict(variables())
    job = Job(script, environ)
    try:
        if launcher == "flash":
            return _flash(job, arguments, only_check=only_check)
        _LAUNCHERS[launcher](job, arguments)
        return 0 if only_check else start(job)
    except (ConfigError, OSError, RuntimeError) as error:
        job.warn(error)
        return exit_status(error)


def _folder(path: str, what: str, remedy: str) -> str:
    """The absolute path of a folder that exists; a model's id on a hub stays as it is."""
    if is_model_id(path):
        return path
    if not path or not Path(path).is_dir():
        raise NoSuchPath(
            f"{what} '{path}' is not a folder that exists (seen from {Path.cwd()}); {remedy}"
        )
    return str(Path(path).resolve())


# -- run_pa.sh -----------------------------------------------------------------------------------


def _paged(job: Job, arguments: list[str]) -> None:
    if HELP & set(arguments):
        job.arguments = ["--help"]
        return
    model_path = _model_path(job, arguments)
    job.prepare("paged")
    job.arguments = ["--task", "inference", "--auto_attention", "paged", *model_path, *arguments]


def _model_path(job: Job, arguments: list[str]) -> list[str]:
    """--model_path from a first word that is no option, which is taken off the arguments."""
    if not arguments or arguments[0].startswith("-"):
        return []  # config.ini has it, or main.py's default counts
    remedy = f"give the folder with config.json and *.safetensors: bash {job.name} WEIGHT_DIR"
    return ["--model_path", _folder(arguments.pop(0), "weight path", remedy)]


# -- serve.sh ------------------------------------------------------------------------------------


def _serve(job: Job, arguments: list[str]) -> None:
    """The front, which starts the ranks by `_ranks`; on the other hosts of a run, the ranks."""
    if HELP & set(arguments):
        job.arguments = ["--help"]
        return
    options = [*_model_path(job, arguments), *arguments]
    if read_nodes(job.environ)[1] > 0:
        _ranks(job, [*options, "--server_socket", "-"])
        return
    read_ranks(job.environ)  # what is wrong with them is said now
    job.drop_foreign_ranks()
    job.arguments = ["--task", "serve", *options]


def _ranks(job: Job, arguments: list[str]) -> None:
    """The ranks of one engine of the service."""
    while arguments[:1] in (["--cores"], ["--log_dir"]):
        option, value, *arguments = arguments
        if option == "--cores":
            bind([int(core) for core in value.split(",")])
        else:  # else torchrun makes one, and leaves it behind
            job.torchrun_options = ["--log_dir", value]
    job.prepare("paged")
    job.arguments = ["--task", "serve", "--auto_attention", "paged", *arguments]


# -- cut_model_and_run.sh ------------------------------------------------------------------------


@dataclass
class Cut:
    """The parts that a run needs."""

    input_dir: str
    output_dir: str
    world_size: int
    recut: bool
    environ: dict[str, str]
    model: ModelSection  # with input_dir as its model_path, or with the id on a hub

    def is_needed(self) -> bool:
        """Whether there is no cut yet, or the one that is there shall be replaced."""
        return self.recut or is_unused(Path(self.output_dir))

    def command(self, *options: str) -> list[str]:
        """A call of cut_model_util.py."""
        program = [str(CHECKOUT / "cut_model_util.py")] if CHECKOUT else ["-m", "gptneox", "cut"]
        places = ["--input_path", self.input_dir, "--output_path", self.output_dir]
        sizes = ["--world_size", str(self.world_size)]
        return [_python(self.environ), *program, *places, *sizes, *options]

    def make(self) -> int:
        """Cut; returns the exit status."""
        options = ["--recut"] if self.recut else []
        return _wait_for(self.command(*options), self.environ)[0]

    def why_unfit(self, again: str) -> str:
        """Why the cut that is there cannot be run, with the remedy; empty: it can."""
        status, text = _wait_for(self.command("--check"), self.environ, stdout=subprocess.PIPE)
        if status == 0:
            return ""
        if status == 3:
            return f"{text}; to replace it: {again}"
        return text or f"{self.output_dir} cannot be checked"

    @property
    def model_options(self) -> list[str]:
        """Where main.py finds them: the flash path looks for part_model beside the weights."""
        own, parts = Path(self.input_dir, "part_model"), Path(self.output_dir)
        is_own = own.exists() and parts.samefile(own)
        folder = self.input_dir if is_own else str(parts.resolve())
        is_on_hub = is_model_id(self.model.model_path)  # a revision is for that alone
        return ["--model_path", folder, *(["--revision", ""] if is_on_hub else [])]


def _flash(job: Job, arguments: list[str], *, only_check: bool) -> int:
    input_dir, output_dir, world_size, *arguments = arguments
    recut = arguments[:1] == ["--recut"]
    task, *options = arguments[recut:] or [""]
    if task not in ("", *FLASH_TASKS):
        raise ConfigError(
            f"'{task}' is no task; use inference, precision or performance, or none to cut only"
        )
    if HELP & set(options):
        job.arguments = ["--help"]
        return 0 if only_check else start(job)
    cut = _read_cut(job, (input_dir, output_dir, world_size), options)
    cut.recut = recut
    if not only_check:
        cut.input_dir = _download(cut.model)
    is_needed = cut.is_needed()
    if task or not is_needed:  # it will run: wrong settings are found before the long cut
        _prepare_flash(job, cut.world_size)
    if only_check:
        return 0
    if is_needed:
        print("The gpt-neox-20b part model is not exists, Now begin to cut ...", flush=True)
        if status := cut.make():
            return status
        if not task:
            print(f"Next: bash {job.script} inference")
            return 0
    elif reason := cut.why_unfit(f"bash {job.script} --recut {task}"):
        raise RuntimeError(reason)
    stars = "*" * 22
    print(f"{stars}The gpt-neox-20b part model exists, Now begin to run ...{stars}", flush=True)
    job.arguments = ["--task", task or "inference", "--auto_attention", "flash", *options]
    job.arguments += cut.model_options
    return start(job)


def _read_cut(job: Job, given: tuple[str, str, str], options: list[str]) -> Cut:
    """What is cut, where to and in how many parts: the script's settings, else config.ini's.

    Options that are wrong are found here, before the long cut.

    Args:
        job: for its environment.
        given: the script's input_dir, output_dir and world_size_; each may be empty.
        options: main.py's; a --model_path among them goes before input_dir.
    """
    try:
        model, sources = _read_model(options)
    except (ValueError, OSError, SystemExit) as error:
        if isinstance(error, SystemExit):
            if not error.code:  # --version
                raise
        else:
            sys.stderr.write(f"error: {error}\n")
        raise ConfigError("the options or config.ini cannot be read; see above") from error
    input_dir, output_dir, world_size = given
    if not input_dir or sources["model_path"] == "flag":
        input_dir = str(
            Path(model.model_path).expanduser() if model.model_path else EMBEDDED_CHECKPOINT
        )
    if not world_size:
        num_devices = len(parse_device_ids(model.device_ids))
        world_size = str(num_devices if num_devices > 1 else 2)
    if not is_count(world_size):
        raise ConfigError(
            f"world_size_='{world_size}' is not a whole number from 1 on; use 2, 4 or 8"
        )
    remedy = "set input_dir, or [model] model_path in config.ini"
    folder = Path(_folder(input_dir, "input_dir", remedy))
    is_downloaded = is_model_id(input_dir)
    if folder.name == "part_model":
        folder = folder.parent
    # nothing is written into an installed package, nor into the cache of a hub
    is_installed = CHECKOUT is None and folder == EMBEDDED_CHECKPOINT
    place = Path() if is_installed or is_downloaded else folder
    output_dir = output_dir or str(place / "part_model")
    model = replace(model, model_path=str(folder))
    return Cut(str(folder), output_dir, int(world_size), False, job.environ, model)


def _prepare_flash(job: Job, world_size: int) -> None:
    """One rank per part; the list of devices, where there is one, has to agree."""
    num_nodes, _ = read_nodes(job.environ)
    if not job.environ.get("TP_WORLD_SIZE"):
        job.environ["TP_WORLD_SIZE"] = str(world_size // num_nodes)
    job.prepare("flash")
    if job.ranks.total != world_size:
        raise ConfigError(f"world_size_ is {world_size}, but {job.ranks.total} ranks would start")
    set_switches(job.environ)


# -- tests/modeltest/run.sh ----------------------------------------------------------------------


def _modeltest(job: Job, arguments: list[str]) -> None:
    from gptneox.evaluation.modeltest_plan import parse

    try:
        plan = parse(arguments)
    except (ValueError, OSError) as error:  # the second: of the checkpoint that they name
        raise ConfigError(" ".join(str(error).split())) from error
    hosts, environ = plan.hosts, job.environ
    if hosts.num_nodes > 1:
        environ |= {
            "NNODES": str(hosts.num_nodes),
            "NODE_RANK": str(hosts.node_rank),
            "MASTER_ADDR": hosts.master_addr,
            "RANK_TABLE_FILE": hosts.rank_table,
        }
        environ.setdefault("MASTER_PORT", MODELTEST_PORT)
    if "ASCEND_RT_VISIBLE_DEVICES" not in environ and has_driver():
        environ["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, range(hosts.local_world_size)))
    environ["TP_WORLD_SIZE"] = str(hosts.local_world_size)
    if not plan.mode.startswith("performance"):
        set_deterministic(environ)
    job.prepare("modeltest")
    set_switches(environ)
    job.arguments = ["--task", "modeltest", "--auto_attention", plan.attention]
    job.arguments += ["--model_path", str(plan.model_path), "--modeltest_arguments", *arguments]


_LAUNCHERS = {"paged": _paged, "serve": _serve, "ranks": _ranks, "modeltest": _modeltest}


# -- becoming main.py ----------------------------------------------------------------------------


def start(job: Job) -> int:
    """Become main.py, under torchrun where there are several ranks.

    Where the program that follows is Python's and this interpreter is the one to use, it goes on in
    this process, which saves a start of Python.
    """
    environ, local = job.environ, job.ranks.local
    if job.ranks.total > 1:  # once for this host, not once for each rank
        job.arguments = _with_download(job.arguments)
    _preload_libgomp(environ)
    if local > 1 and not environ.get("OMP_NUM_THREADS"):  # torchrun alone would set 1
        environ["OMP_NUM_THREADS"] = str(threads_per_rank(local))
    program = [str(CHECKOUT / "main.py")] if CHECKOUT else ["-m", "gptneox"]
    python = _python(environ)
    stays = python == sys.executable and environ.get("LD_PRELOAD") == variables().get("LD_PRELOAD")
    if job.ranks.total == 1:
        if not stays:
            return _become([python, *program, *job.arguments], job)
        from gptneox.__main__ import main as run_task

        set_variables(environ)
        sys.argv = [str(CHECKOUT / "main.py") if CHECKOUT else "gptneox", *job.arguments]
        return run_task(job.arguments)
    options = [
        *job.ranks.options,
        *job.torchrun_options,
        "--master_port",
        environ["MASTER_PORT"],
        *program,
        *job.arguments,
    ]
    if torchrun := _find_torchrun(environ, python):
        return _become([torchrun, *options], job)
    from gptneox import start_ranks

    if not stays:
        return _become([python, start_ranks.__file__, *options], job)
    set_variables(environ)
    return start_ranks.main(options)


def _read_model(options: list[str]) -> tuple[ModelSection, dict[str, str]]:
    """Section [model] of main.py's options and config.ini, and the sources of its values."""
    from gptneox.cli import make_parser, read_model_section

    args = make_parser().parse_args(options)
    model, sources, _ = read_model_section(args, shipped("config.ini"))
    return model, sources


def _download(model: ModelSection) -> str:
    """The folder of the checkpoint; one on a hub is downloaded, if it is not in the cache."""
    if not is_model_id(model.model_path):
        return model.model_path
    from gptneox.cli import place_of
    from gptneox.config.environment import Environment

    return place_of(model, Environment.read())


def _with_download(arguments: list[str]) -> list[str]:
    """main.py's arguments with the folder in place of a model's id."""
    if HELP & set(arguments):
        return arguments
    model, _ = _read_model(arguments)
    if not is_model_id(model.model_path):
        return arguments
    return [*arguments, "--model_path", _download(model), "--revision", ""]


def _python(environ: dict[str, str]) -> str:
    """The interpreter that the user chose, which may be a program around this one."""
    return environ.get("PYTHON") or sys.executable


def _become(command: list[str], job: Job) -> int:
    """Replace this process; returns only where that fails, with the status of a shell."""
    sys.stdout.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, job.environ)
    except OSError as error:
        job.warn(f"{command[0]} cannot be started: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126


def _wait_for(
    command: list[str], environ: dict[str, str], stdout: int | None = None
) -> tuple[int, str]:
    """Run a program to its end; returns its status as a shell's, and what it printed to a pipe.

    After Ctrl-C, which reaches both, the program says so and this process waits for its end.
    """

    def go_on(number: int, frame: FrameType | None) -> None:
        """Unlike SIG_IGN it is not inherited."""

    handler = signal.signal(signal.SIGINT, go_on)
    try:
        done = subprocess.run(command, env=environ, stdout=stdout, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    status = done.returncode if done.returncode >= 0 else 128 - done.returncode
    return status, (done.stdout or "").rstrip("\n")


def _find_torchrun(environ: dict[str, str], python: str) -> str:
    """TORCHRUN where the user set it, else a torchrun on PATH that is more than pip's script.

    Empty: `start_ranks`, which is pip's with less to say. The torchrun of another Python's folder
    is passed over.
    """
    if chosen := environ.get("TORCHRUN"):
        return chosen
    path = shutil.which("torchrun")
    if not path:
        return ""
    folder = Path(path).parent
    has_python = any(os.access(folder / name, os.X_OK) for name in ("python", "python3"))
    if has_python and not folder.samefile(Path(python).parent):
        return ""
    with Path(path).open("rb") as file:
        head = file.readline() + file.readline()
    # A console script of pip names its interpreter; "#!/usr/bin/env …" is a wrapper of the user's.
    is_of_pip = re.match(rb"#![^\n]*/python[^/\n]*\n", head) or b"'''exec'" in head
    return "" if is_of_pip else path


def _preload_libgomp(environ: dict[str, str]) -> None:
    """Load torch's own libgomp first on aarch64.

    One that is loaded late finds no room in static TLS ("cannot allocate memory in static TLS
    block").
    """
    preloaded = environ.get("LD_PRELOAD", "")
    if os.uname().machine != "aarch64" or "libgomp" in preloaded:
        return
    spec = importlib.util.find_spec("torch")
    if not spec or not spec.origin:
        return
    folder = Path(spec.origin).parent
    places = (folder.with_name(f"{folder.name}.libs"), folder / "lib")
    libraries = [str(path) for place in places for path in place.glob("libgomp*")]
    if not libraries:
        libraries = re.findall(r"libgomp\.so\.1 .*=> (.*)", run_tool("ldconfig", "-p"))[:1]
    if libraries:
        environ["LD_PRELOAD"] = ":".join([min(libraries), *filter(None, [preloaded])])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
