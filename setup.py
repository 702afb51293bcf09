"""Compiles the CPU kernels into a wheel on x86 Linux; everything else stands in pyproject.toml.

An editable install compiles them at first use. So does a wheel that was built without g++ or on another machine.
"""

import platform
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))
from morphoquant_vllm.cpu import shipped
from morphoquant_vllm.cpu.compiler import BuildError, find_compiler

PLACE = Path("morphoquant_vllm", "cpu", "prebuilt")


def is_served() -> bool:
    """Whether kernels can run on the kind of machine that builds."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


class BuildWithKernels(build_py):
    """Adds the compiled kernels to the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or not is_served():
            return
        folder = Path(self.build_lib) / PLACE
        try:
            shipped.compile_all(folder, find_compiler())
        except BuildError as error:
            print(f"warning: the wheel brings no CPU kernels, they are compiled at first use: {error}", file=sys.stderr)


class KernelDistribution(Distribution):
    """Says that the package is compiled: its files then go to the folder of packages for one platform."""

    def has_ext_modules(self) -> bool:
        return is_served()


class KernelWheel(bdist_wheel):
    """Tags a wheel for every Python, since kernels are loaded with ctypes, and for its platform if it has kernels."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(distclass=KernelDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": KernelWheel})
