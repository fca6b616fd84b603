"""Compile every pyx/NAME.pyx to kvblocks/NAME.*.so; all metadata is in pyproject.toml.

KVBLOCKS_CHECKED_BUILD=1 compiles with bounds checks, assertions and hooks for tests: the build that the tests also
run under. KVBLOCKS_CHECKED is another variable, which is read at run time.
CFLAGS replaces the optimisation flags below.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as setuptools_build_ext

CHECKED = os.environ.get("KVBLOCKS_CHECKED_BUILD") == "1"


class build_ext(setuptools_build_ext):
    """Cythonizes when extensions are built and not before, so that asking for metadata or an sdist compiles nothing."""

    def build_extensions(self):
        from Cython.Build import cythonize

        directives = {
            "language_level": 3,
            "binding": True,
            "embedsignature": False,
            "boundscheck": CHECKED,
            "wraparound": False,
            "initializedcheck": CHECKED,
            "cdivision": True,
        }
        self.force = True  # an object compiled under the other setting of the switch looks up to date
        for extension in self.extensions:
            # force: Cython does not see a change to a .pxd in another folder.
            [compiled] = cythonize(
                [extension],
                force=True,
                build_dir=self.build_temp,
                include_path=[".", "pyx", f"pyx/hooks/{'checked' if CHECKED else 'release'}"],
                compiler_directives=directives,
                quiet=True,
            )
            extension.sources = compiled.sources
        self.parallel = self.parallel or os.cpu_count()
        super().build_extensions()


def extension(source):
    others = [
        *Path("kvblocks").glob("*.pxd"),
        *(path for path in Path("pyx").rglob("*.*") if path.suffix in (".pxd", ".pxi", ".h")),
    ]
    return Extension(
        f"kvblocks.{source.stem}",
        [source.as_posix()],
        # What an sdist takes in besides: without the source itself it would hold only the .c file made from it.
        depends=sorted(path.as_posix() for path in [source, *others]),
        include_dirs=["pyx"],
        extra_compile_args=[
            *([] if "CFLAGS" in os.environ else ["-O3", "-g1"]),
            # Runs of 3 blocks in the checked build, so that small tests see where one ends.
            *(["-UNDEBUG", "-DKVB_RUN=3", "-DKVB_PAGE=1"] if CHECKED else ["-DNDEBUG"]),
        ],
    )


setup(
    cmdclass={"build_ext": build_ext},
    ext_modules=[extension(source) for source in sorted(Path("pyx").glob("*.pyx"))],
)
