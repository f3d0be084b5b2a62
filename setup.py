"""Builds the native part with ninja; pyproject.toml holds everything else.

Each instruction set's unit has flags of its own, which setuptools cannot express, so the build is
a small ninja file. A machine without a compiler still installs: the reason is kept in
``kdkernels/_build.json`` and shown by ``python -m kdkernels info``.

Environment:
    CXX: the C++ compiler (default: c++, g++ or clang++, whichever is found first).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ["bindings.cpp", "cpu/run.cpp", "cpu/parallel.cpp", "cpu/rows_portable.cpp"]
# The flags are those of the unit alone: AVX code anywhere else would crash machines without it.
X86_SETS = {
    "cpu/rows_avx2.cpp": "-mavx2 -mfma",
    "cpu/rows_avx512.cpp": (
        "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mprefer-vector-width=512"
    ),
}
# No -ffast-math, and no flag of that kind when linking, where it would flush denormals to zero for
# the whole process. Nothing here reads errno or the floating-point exception flags.
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-psabi -Wno-unknown-pragmas"
)


def find_compiler() -> str:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    for candidate in candidates:
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return candidate
    raise RuntimeError(f"no C++ compiler found (tried {', '.join(candidates)}; CXX names another)")


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return "ninja"


def ninja_file(target: Path, compiler: str) -> str:
    import pybind11

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = CXXFLAGS + (" -DKD_X86_SETS" if is_x86 else "")
    link = "-shared"
    if platform.system() == "Darwin":
        link = "-bundle -undefined dynamic_lookup"
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $set {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {link} $in -o $out -ldl -lpthread",
    ]
    units = dict.fromkeys(SOURCES, "") | (X86_SETS if is_x86 else {})
    objects = []
    for source, own_flags in units.items():
        objects.append(source.replace("/", "_").replace(".cpp", ".o"))
        lines += [
            f"build {objects[-1]}: compile {_escape(ROOT.resolve() / 'csrc' / source)}",
            f"  set = {own_flags}",
        ]
    lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # setuptools copies the module of an editable install into the source tree by itself.
        package = ROOT / "kdkernels" if self.inplace or self.editable_mode else target.parent
        for folder in {target.parent, package}:  # a stale module must not outlive a failed build
            (folder / target.name).unlink(missing_ok=True)
        reason = ""
        try:
            self._build(target)
        except (RuntimeError, OSError, ImportError) as error:
            reason = str(error)
            self.warn(f"kdkernels: the CPU kernels are not built, the reference serves: {reason}")
        (package / "_build.json").write_text(json.dumps({"cpu": reason}) + "\n")

    def _build(self, target: Path) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(target, find_compiler()), encoding="utf-8")
        run = subprocess.run(
            [find_ninja(), "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output = run.stdout.decode(errors="replace")
        print(output)
        if run.returncode:
            lines = output.splitlines() or ["no output"]
            first_error = next((line for line in lines if "error" in line), lines[0])
            raise RuntimeError(f"the compiler failed: {first_error}")


setup(
    ext_modules=[Extension("kdkernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
