"""Fixtures of all tests, and the run that goes on beside them."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETER = pytest.StashKey[subprocess.Popen]()
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
    """Triton's interpreter takes minutes of one core: it starts with the first test."""
    config = session.config
    asked_for = any(item.name == "test_under_the_interpreter" for item in session.items)
    if not asked_for or config.option.collectonly or INTERPRETED:
        return
    if importlib.util.find_spec("triton") is None:
        return
    folder = Path(__file__).parent
    tests = sorted(folder.glob("test_triton*.py"))
    config.stash[INTERPRETER] = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,  # a few kilobytes at most, which a pipe holds
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def interpreter_run(pytestconfig):
    return pytestconfig.stash[INTERPRETER]


def pytest_unconfigure(config):
    if process := config.stash.get(INTERPRETER, None):
        process.kill()
