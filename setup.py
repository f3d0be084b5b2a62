"""Builds the native parts with ninja; pyproject.toml holds everything else.

Each unit has flags of its own, which setuptools cannot express, so the builds are small ninja
files. A machine without a compiler, or without CUDA, still installs: the reason is kept in
``kdkernels/_build.json`` and shown by ``python -m kdkernels info``.

Environment:
    CXX: the C++ compiler (default: c++, g++ or clang++, whichever is found first).
    KDKERNELS_CUDA: 1 builds the CUDA kernels although no GPU is visible, 0 never does.
    KDKERNELS_CUDA_ARCHS: what for, such as "80;90" (default: the GPUs that are visible; without
        one, 80 and 90, and PTX for later ones).
    NVCC: CUDA's compiler (default: of CUDA_HOME, else nvcc on the PATH).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = [
    "bindings.cpp",
    "cpu/run.cpp",
    "cpu/columns.cpp",
    "cpu/memory.cpp",
    "cpu/parallel.cpp",
    "cpu/pieces.cpp",
    "cpu/sets.cpp",
    "cpu/rows_portable.cpp",
]
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
CUDA_SOURCES = [
    "rows_bf16.cu",
    "rows_f16.cu",
    "rows_f32.cu",
    "rows_f64.cu",
    "general.cu",
    "run.cu",
]
# No contraction: a*x - b*y has to be 0 where both products are the same.
NVCCFLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden --cudart=static"


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


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("NVCC")
    candidates = [named] if named else [home and str(Path(home) / "bin" / "nvcc"), "nvcc"]
    for candidate in filter(None, candidates):
        if found := shutil.which(candidate):
            return found
    raise RuntimeError(f"no nvcc found ({named or 'on the PATH, in CUDA_HOME, or named by NVCC'})")


def visible_architectures() -> list[str]:
    """Compute capabilities of this machine's GPUs that the kernels can run on, such as ["90"]."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode:
        return []
    found = {line.strip().replace(".", "") for line in answer.stdout.splitlines()}
    return sorted((each for each in found if each.isdigit() and int(each) >= 80), key=int)


def cuda_architectures() -> tuple[list[str], bool]:
    """What to build for, and whether PTX for later GPUs goes with it.

    Raises:
        RuntimeError: the CUDA kernels are not to be built, and why.
    """
    wanted = os.environ.get("KDKERNELS_CUDA", "")
    if wanted == "0":
        raise RuntimeError("KDKERNELS_CUDA=0")
    named = os.environ.get("KDKERNELS_CUDA_ARCHS", "").replace(",", ";")
    visible = visible_architectures()
    if not visible and wanted != "1":
        raise RuntimeError(
            "no NVIDIA GPU of sm_80 or later was visible (KDKERNELS_CUDA=1 builds all the same)"
        )
    if named:
        parts = [part.strip().removeprefix("sm_") for part in named.split(";") if part.strip()]
        for part in parts:
            if not re.fullmatch(r"\d{2,3}[a-z]?", part):
                raise RuntimeError(f"KDKERNELS_CUDA_ARCHS names {part!r}: expected such as 80;90")
        return parts, False
    return (visible, False) if visible else (["80", "90"], True)


def cuda_ninja_file(target: Path, compiler: str) -> str:
    import pybind11

    architectures, with_ptx = cuda_architectures()
    nvcc = find_nvcc()
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    if with_ptx:
        codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    named = ", ".join(f"sm_{a}" for a in architectures) + (" and PTX" if with_ptx else "")
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    folder = ROOT.resolve() / "csrc" / "cuda"
    lines = [
        "rule cuda",
        f"  command = {nvcc} {NVCCFLAGS} {' '.join(codes)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile",
        f"  command = {compiler} {CXXFLAGS} '-DKD_ARCHITECTURES=\"{named}\"' {includes} -MMD "
        "-MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {nvcc} -shared --cudart=static $in -o $out",
    ]
    objects = [f"{source}.o" for source in CUDA_SOURCES]
    lines += [f"build {s}.o: cuda {_escape(folder / s)}" for s in CUDA_SOURCES]
    lines.append(f"build bindings.o: compile {_escape(folder / 'bindings.cpp')}")
    lines.append(f"build {_escape(target)}: link {' '.join(objects)} bindings.o")
    return "\n".join(lines) + "\n"


def ninja_file(target: Path, compiler: str) -> str:
    import pybind11

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = CXXFLAGS + (" -DKD_X86_SETS" if is_x86 else "")
    link = "-shared"
    if platform.system() == "Darwin":
        link = "-bundle -undefined dynamic_lookup"
    # Of the bindings alone: an isolated build has pybind11 somewhere else each time, and what does
    # not need it need not be compiled again.
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $set -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {link} $in -o $out -ldl -lpthread",
    ]
    units = dict.fromkeys(SOURCES, "") | (X86_SETS if is_x86 else {})
    units["bindings.cpp"] = includes
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


def _identity(compilers: list[str]) -> str:
    """Of the compilers behind these names, so that others compile everything anew."""
    commands = [[*shlex.split(compiler), "--version"] for compiler in compilers]
    said = b"".join(subprocess.run(c, stdout=subprocess.PIPE).stdout for c in commands)
    return hashlib.sha256(said).hexdigest()[:8]


class NinjaBuild(build_ext):
    def run(self) -> None:
        self.reasons: dict[str, str] = {}
        super().run()
        # Beside the modules: setuptools has moved them into the source tree, if that was asked for.
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        record = package / "kdkernels" / "_build.json"
        record.write_text(json.dumps(self.reasons) + "\n")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # setuptools copies the module of an editable install into the source tree by itself.
        package = ROOT / "kdkernels" if self.inplace or self.editable_mode else target.parent
        for folder in {target.parent, package}:  # a stale module must not outlive a failed build
            (folder / target.name).unlink(missing_ok=True)
        module = ext.name.removeprefix("kdkernels._")
        describe = {"cpu": ninja_file, "cuda": cuda_ninja_file}[module]
        self.reasons[module] = ""
        try:
            description = describe(target, find_compiler())
            compilers = [find_compiler()] + ([find_nvcc()] if module == "cuda" else [])
            # Not setuptools' folder, which is a new one each time: ninja knows what has changed.
            folder = ROOT.resolve() / "build" / f"{target.name}-{_identity(compilers)}"
            self._build(folder, description)
        except (RuntimeError, OSError, ImportError) as error:
            self.reasons[module] = str(error)
            if module == "cpu":
                self.warn(f"the CPU kernels are not built, the slower reference serves: {error}")
            else:
                print(f"kdkernels: the CUDA kernels are not built: {error}")

    def _build(self, folder: Path, description: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(description, encoding="utf-8")
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
    ext_modules=[
        Extension("kdkernels._cpu", sources=[], optional=True),
        Extension("kdkernels._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
