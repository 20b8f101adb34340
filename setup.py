"""Builds the native kernels on the way; all metadata is in setup.cfg."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution


class BuildWithKernels(build_py):
    """Compile csrc into the package before its files are collected."""

    def run(self) -> None:
        """Build, then collect."""
        script = Path(__file__).resolve().parent / "csrc" / "build.py"
        runpy.run_path(str(script))["main"]()
        super().run()


class Binary(Distribution):
    """A distribution with machine code in it: its wheel is for one platform."""

    def has_ext_modules(self) -> bool:
        """Yes."""
        return True


class AnyPython(bdist_wheel):
    """The machine code knows no Python: one wheel for all versions of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI, platform."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython}, distclass=Binary)
