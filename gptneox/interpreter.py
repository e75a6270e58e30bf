# SPDX-License-Identifier: Apache-2.0
"""Has this interpreter what a run needs, and if not, which one has?

main.py and the other entries ask about themselves. scripts/env.sh asks every interpreter it looks
at, by running the text of this file there. So it has to run on any Python, version 2 as well: no
annotations and no f-strings.
"""

import os
import re
import sys

_NAME = re.compile("[A-Za-z0-9_.-]+(?=[=<>]|$)")  # of a requirement
# A container's torch_npu goes with one release of torch: the oldest pair that serves.
_OLDEST_NPU = ["torch==2.5.1", "torch_npu==2.5.1"]


def lacking(requirements):
    # type: (list[str]) -> list[str]
    """Those of `requirements` ("torch>=2.5") that are not met.

    Metadata is read and nothing imported: torch alone would cost 1.5 s.
    """
    if sys.version_info < (3, 10):
        return ["Python >= 3.10 (it is %d.%d)" % sys.version_info[:2]]
    return [text for text in requirements if not _is_met(text) or _refused_torch(text)]


def explain(missing):
    # type: (list[str]) -> str
    """What `lacking` returned, each with the release that is there."""
    words = []
    for text in missing:
        found = installed(text) if _NAME.match(text) else ""
        refused = _refused_torch(text) if found else ""
        there = "%s is there" % found + (", which takes %s" % refused if refused else "")
        words.append("%s (%s)" % (text, there) if found else text)
    return " ".join(words)


def to_install(missing):
    # type: (list[str]) -> str
    """What to write behind `pip install` for what `lacking` returned, quoted for a shell.

    Empty where pip cannot help. Beside a torch before 2.6 that is a transformers which takes it:
    transformers 5 does not.
    """
    if not all(_NAME.match(text) for text in missing):
        return ""
    wanted = list(missing)
    lacks_torch = "torch" in [_name(text) for text in missing]
    is_old = bool(installed("torch")) and not lacks_torch and not _is_met("torch>=2.6")
    if lacks_torch and installed("torch_npu"):
        is_old = True
        rest = [text for text in missing if _name(text) not in ("torch", "torch_npu")]
        wanted = _OLDEST_NPU + rest
    if is_old:
        wanted = [re.sub("^(transformers.*)<6$", r"\1<5", text) for text in wanted]
    return " ".join("'%s'" % text for text in wanted)


def installed(requirement):
    # type: (str) -> str
    """The release of a requirement's package; empty: it is not there."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    name = _name(requirement)
    try:
        if not name.isidentifier() or find_spec(name) is not None:
            return version(name)
    except (PackageNotFoundError, AttributeError, TypeError, ValueError):
        pass
    return ""


def _name(requirement):
    # type: (str) -> str
    return re.split("[=<>]", requirement)[0]


def _is_met(requirement):
    # type: (str) -> bool
    found = installed(requirement)
    if not found:
        return False
    compare = {"==": tuple.__eq__, ">=": tuple.__ge__, "<": tuple.__lt__}
    limits = re.findall(r"(==|>=|<)([0-9.]+)", requirement)
    return all(compare[operator](_release(found), _release(limit)) for operator, limit in limits)


def _refused_torch(requirement):
    # type: (str) -> str
    """Of transformers: what it takes for torch ("torch>=2.6"), where that is not what is there.

    pip does not look at it, and transformers then acts as if there were no torch.
    """
    from importlib.metadata import requires

    if _name(requirement) != "transformers" or not (
        installed("transformers") and installed("torch")
    ):
        return ""
    lines = "\n".join(requires("transformers") or [])
    taken = ["torch>=" + limit for limit in re.findall("^torch *>=([0-9.]+)", lines, re.M)]
    refused = [text for text in taken if not _is_met(text)]
    return refused[0] if refused else ""


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
    if not _project(root):
        return  # installed by pip, which has looked at the requirements
    missing = lacking(needed() if packages else [])
    if not missing:
        return
    sys.stdout.flush()
    chooser = os.path.join(root, "scripts", "python.sh")
    if not command[0].startswith("-"):
        command = [os.path.join(root, command[0])] + command[1:]
    try:
        os.execvp("bash", ["bash", chooser, sys.executable, explain(missing)] + command)
    except OSError:
        sys.exit(
            "error: %s lacks %s; install that there, or start this with an interpreter that has it"
            % (sys.executable, explain(missing))
        )


def _project(root):
    # type: (str) -> str
    """pyproject.toml of a checkout; empty for an installed package."""
    path = os.path.join(root, "pyproject.toml")
    shipped = os.path.join(root, "gptneox", "shipped")
    return path if os.path.isfile(path) and not os.path.isdir(shipped) else ""


def needed():
    # type: () -> list[str]
    """What a run needs: the dependencies of pyproject.toml, or those of the installed package.

    Old tokenizers alone take sentencepiece.
    """
    project = _project(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if project:
        with open(project) as file:
            block = file.read().split("\ndependencies = [\n")[1].split("\n]")[0]
        found = re.findall('"(.+)"', block)
    else:
        from importlib.metadata import requires

        found = [text for text in requires("gptneox-ascend") or [] if ";" not in text]
    return [text for text in found if text != "sentencepiece"]


def main():
    # type: () -> None
    """For env.sh: print what is lacking of the arguments, and below it what pip has to install.

    Exit status 3 when there is any.
    """
    sys.path[:] = [folder for folder in sys.path if folder]  # a folder ./torch is not torch
    missing = lacking(sys.argv[1:])
    sys.stdout.write(explain(missing) + "\n" + to_install(missing) + "\n")
    sys.exit(3 if missing else 0)


if __name__ == "__main__":
    main()
