# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: files of the repository's top level go into the package.

Users find the embedded checkpoint, the settings and the modeling file at the top level. An
installed package has copies in gptneox/shipped, where gptneox/config/places.py looks for them.
setuptools takes data files from the folders of packages alone, so they are copied at build time.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ("config.ini", "modeling_gpt_neox_ascend.py", "weights/neox-mini")


class BuildPackage(build_py):
    """The package and what is shipped with it."""

    def run(self) -> None:
        """Build; an editable installation uses the files of the checkout."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "gptneox", "shipped")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for name in SHIPPED:
            source = ROOT / name
            files = [path for path in sorted(source.rglob("*")) if path.is_file()] or [source]
            for path in files:
                if "part_model" not in path.parts:  # a cut that a user made in the checkout
                    self.mkpath(str((target / path.relative_to(ROOT)).parent))
                    self.copy_file(str(path), str(target / path.relative_to(ROOT)))


setup(cmdclass={"build_py": BuildPackage})
