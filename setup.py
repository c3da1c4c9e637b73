"""The kernels' library, where there is a C compiler; without one the package is installed too.

It knows neither Python nor torch: a wheel that has it serves every version of both.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_KERNELS = Path(__file__).parent / "dlp_plugin" / "kernels"
_spec = importlib.util.spec_from_file_location("building", _KERNELS / "building.py")
building = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(building)


class BuildLibrary(build_ext):
    """Compiles as at first use, and names the result without Python's version."""

    def get_ext_filename(self, fullname):
        """Name the file that a module becomes."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        """Compile it; where that fails, the build goes on, as it is optional."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        said = building.compile_to(target)
        if said:
            raise CompileError(f"no kernels are packaged, as {said}")


class Wheel(bdist_wheel):
    """For every Python: of one platform where the library is in it."""

    def get_tag(self):
        """Tell which Pythons and platforms the wheel is for."""
        built = any(Path(self.bdist_dir).rglob("_products.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


sources = [str(path.relative_to(Path(__file__).parent)) for path in building.sources()]
setup(
    ext_modules=[Extension("dlp_plugin.kernels._products", sources, optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
