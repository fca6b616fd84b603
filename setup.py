"""Compile every pyx/NAME.pyx to kvblocks/NAME.*.so; all metadata is in pyproject.toml.

KVBLOCKS_CHECKED_BUILD=1 compiles with bounds checks and C assertions: the build the tests also run under.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

CHECKED = os.environ.get("KVBLOCKS_CHECKED_BUILD") == "1"

extensions = [
    Extension(
        f"kvblocks.{source.stem}",
        [source.as_posix()],
        # An sdist takes in `depends`; without them it would drop the .pyx files and build an empty wheel.
        depends=[source.as_posix(), f"kvblocks/{source.stem}.pxd", f"kvblocks/{source.stem}.pyi"],
        extra_compile_args=["-O3", "-g1"] + (["-UNDEBUG"] if CHECKED else ["-DNDEBUG"]),
    )
    for source in sorted(Path("pyx").glob("*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        force=True,  # Cython does not see a change to a .pxd in another folder
        compiler_directives={
            "language_level": 3,
            "binding": True,
            "embedsignature": False,
            "boundscheck": CHECKED,
            "wraparound": False,
            "initializedcheck": CHECKED,
            "cdivision": True,
        },
        compile_time_env=None,
        nthreads=0,
    ),
)
