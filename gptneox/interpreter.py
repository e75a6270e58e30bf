# SPDX-License-Identifier: Apache-2.0
"""Has this interpreter what a run needs, and if not, which one has?

main.py and the other entries ask about themselves. scripts/env.sh asks every interpreter it looks
at, by running the text of this file there. So it has to run on any Python, version 2 as well: no
annotations and no f-strings.
"""

import os
import re
import sys


def lacking(requirements):
    # type: (list[str]) -> list[str]
    """Those of `requirements` ("torch>=2.7") that are not met.

    Metadata is read and nothing imported: torch alone would cost 1.5 s.
    """
    if sys.version_info < (3, 10):
        return ["Python >= 3.10 (it is %d.%d)" % sys.version_info[:2]]
    return [text for text in requirements if not _is_met(text)]


def _is_met(requirement):
    # type: (str) -> bool
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    name = re.split("[=<>]", requirement)[0]
    try:
        if name.isidentifier() and find_spec(name) is None:
            return False
        found = _release(version(name))
    except (PackageNotFoundError, AttributeError, TypeError, ValueError):
        return False
    compare = {"==": tuple.__eq__, ">=": tuple.__ge__, "<": tuple.__lt__}
    limits = re.findall(r"(==|>=|<)([0-9.]+)", requirement)
    return all(compare[operator](found, _release(limit)) for operator, limit in limits)


def _release(text):
    # type: (str) -> tuple[int, ...]
    numbers = [int(n) for n in re.findall("[0-9]+", text.split("+")[0])[:6]]
    return tuple(numbers + [0] * (6 - len(numbers)))


def require(command, packages=True):
    # type: (list[str], bool) -> None
    """Return where this interpreter has what a run needs, else go on in another or end.

    The other one is that which scripts/env.sh would choose for the launchers. Nothing is installed.

    Args:
        command: what to run there: a file of the checkout, or -m and a module, and the arguments.
        packages: False looks at the version of Python alone.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    project = os.path.join(root, "pyproject.toml")
    if not os.path.isfile(project) or os.path.isdir(os.path.join(root, "gptneox", "shipped")):
        return  # installed by pip, which has looked at the requirements
    missing = lacking(_needed(project) if packages else [])
    if not missing:
        return
    sys.stdout.flush()
    chooser = os.path.join(root, "scripts", "python.sh")
    if not command[0].startswith("-"):
        command = [os.path.join(root, command[0])] + command[1:]
    try:
        os.execvp("bash", ["bash", chooser, sys.executable, " ".join(missing)] + command)
    except OSError:
        sys.exit(
            "error: %s lacks %s; install that there, or start this with an interpreter that has it"
            % (sys.executable, " ".join(missing))
        )


def _needed(project):
    # type: (str) -> list[str]
    """The dependencies of pyproject.toml. Old tokenizers alone take sentencepiece."""
    with open(project) as file:
        block = file.read().split("\ndependencies = [\n")[1].split("\n]")[0]
    return [text for text in re.findall('"(.+)"', block) if text != "sentencepiece"]


def main():
    # type: () -> None
    """For env.sh: print what is lacking of the arguments; exit status 3 when there is any."""
    sys.path[:] = [folder for folder in sys.path if folder]  # a folder ./torch is not torch
    missing = lacking(sys.argv[1:])
    sys.stdout.write(" ".join(missing) + "\n")
    sys.exit(3 if missing else 0)


if __name__ == "__main__":
    main()
