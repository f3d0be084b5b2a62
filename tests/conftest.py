"""Fixtures of all tests, and the run that goes on beside them."""

import importlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# Compilers work beside the tests: a thread that waits for another must not spin on the core that
# they need. Read by the OpenMP that comes with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from targets import TARGETS

BESIDE = pytest.StashKey[dict[str, Future]]()  # what runs beside the tests
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def one_thread():
    """For tiny inputs: on a busy machine waking a second thread takes longer than all else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def example():
    """Imports one of examples/ by its name, with libraries that look for nothing on the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield importlib.import_module


@pytest.fixture
def in_double():
    """Float64 for whatever does not say what it is."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=INTERPRETED)
def bfloat16_rounds_as_on_a_gpu(monkeypatch):
    """The interpreter cuts float32 off where every GPU rounds to the nearest, ties to even."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_and_round(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_and_round)


@pytest.fixture(autouse=INTERPRETED, scope="session")
def the_interpreter_looks_once():
    """At each call of a device function it goes through all of triton.language for what it has to
    replace there, and for each operation it makes a table of dtypes anew, which takes as long as
    all else. Once a launch, and once for all, finds the same."""
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patch_lang, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    names, replaced, dtypes = {}, set(), {}

    def patch_builtin(package, builder, scope):
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_once_a_launch(function):
        of_function = {name for name in ("tl", "core") if name in function.__globals__}
        if replaced and of_function <= replaced:
            return interpreter._LangPatchScope()
        is_launch = not replaced
        scope = patch_lang(function)
        replaced.update(of_function)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    def known_np_dtype(dtype):
        scalar = dtype.scalar if dtype.is_block() else dtype
        if scalar.is_ptr():
            return np_dtype(scalar)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = np_dtype(scalar)
        return dtypes[scalar.name]

    with pytest.MonkeyPatch.context() as patch:
        known = list(inspect.signature(interpreter._patch_builtin).parameters)
        if known == ["pkg", "builder", "scope"]:  # else it is another Triton, and slow
            patch.setattr(interpreter, "_patch_builtin", patch_builtin)
            patch.setattr(interpreter, "_patch_lang", patch_once_a_launch)
            patch.setattr(interpreter, "_get_np_dtype", known_np_dtype)
        assert known_np_dtype(tl.float64) == np_dtype(tl.float64)
        yield


def pytest_collection_finish(session):
    """What takes compilers and the interpreter minutes of one core starts with the first test, one
    after the other, beside the tests."""
    config, items = session.config, session.items
    if config.option.collectonly or INTERPRETED:
        return
    asked = {name for item in items for name in item.fixturenames}
    has_triton = importlib.util.find_spec("triton") is not None
    pool = ThreadPoolExecutor(1)
    beside = config.stash[BESIDE] = {}
    if "built" in asked and TARGETS:
        from test_cuda import build_with_nvcc

        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        beside["built"] = pool.submit(build_with_nvcc, Path(folder.name))
    if "interpreter_run" in asked and has_triton:
        beside["interpreter"] = pool.submit(run_the_interpreter)
    if "compiled_for" in asked and has_triton:
        from test_triton import compile_for

        beside |= {target: pool.submit(compile_for, target) for target in TARGETS}
    pool.shutdown(wait=False)


def run_the_interpreter():
    tests = sorted(Path(__file__).parent.glob("test_triton*.py"))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@pytest.fixture
def beside(pytestconfig):
    """Futures of what goes on beside the tests."""
    return pytestconfig.stash[BESIDE]


def pytest_unconfigure(config):
    unfinished = [one for one in config.stash.get(BESIDE, {}).values() if not one.done()]
    for waiting in unfinished:
        waiting.cancel()
    if unfinished and shutil.which("pkill"):  # a run cut short does not wait for them
        subprocess.run(["pkill", "-P", str(os.getpid())])
