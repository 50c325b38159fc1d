"""Puts into the wheel what OpenMMLab's mim looks for; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_FILES = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Copies configs, tools and the model index to ``mmvig/.mim`` of what is built."""

    def run(self) -> None:
        """Build the package, then add the files; an editable install has them in the checkout."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'mmvig', '.mim')
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build in this folder
        target.mkdir(parents=True)
        for name in MIM_FILES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(source, target / name)


setup(cmdclass={'build_py': BuildWithMim})
