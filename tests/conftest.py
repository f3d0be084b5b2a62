"""Fixtures of all tests, and the run that goes on beside them."""

import importlib.util
import inspect
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

INTERPRETER = pytest.StashKey[subprocess.Popen]()
COMPILED = pytest.StashKey[dict[str, Future]]()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def one_thread():
    """For tiny inputs: on a busy machine waking a second thread takes longer than all else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    replace there, which takes as long as all else: by name it finds the same."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names = {}

    def patch_builtin(package, builder, scope):
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        known = list(inspect.signature(interpreter._patch_builtin).parameters)
        if known == ["pkg", "builder", "scope"]:  # else it is another Triton, and slow
            patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


def pytest_collection_finish(session):
    """What takes Triton minutes of one core starts with the first test, one after the other."""
    config, items = session.config, session.items
    if config.option.collectonly or INTERPRETED or importlib.util.find_spec("triton") is None:
        return
    pool = ThreadPoolExecutor(1)
    if any(item.name == "test_under_the_interpreter" for item in items):
        config.stash[INTERPRETER] = process = start_the_interpreter()
        pool.submit(process.wait)
    if any("compiled_for" in item.fixturenames for item in items):
        from test_triton import TARGETS, compile_for

        config.stash[COMPILED] = {t: pool.submit(compile_for, t) for t in TARGETS}
    pool.shutdown(wait=False)


def start_the_interpreter():
    tests = sorted(Path(__file__).parent.glob("test_triton*.py"))
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,  # a few kilobytes at most, which a pipe holds
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def compiled_for(pytestconfig):
    """What became of Triton's kernels for a target."""
    return lambda target: pytestconfig.stash[COMPILED][target].result()


@pytest.fixture
def interpreter_run(pytestconfig):
    return pytestconfig.stash[INTERPRETER]


def pytest_unconfigure(config):
    if process := config.stash.get(INTERPRETER, None):
        process.kill()
    for compiling in config.stash.get(COMPILED, {}).values():
        compiling.cancel()
