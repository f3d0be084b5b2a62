"""The short way of small calls: it takes what is plain, refuses the rest, and changes no result."""

import gc
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdkernels import FusedKDLoss, backends, kd_loss

N, C = 6, 5
PLAIN = backends.PLAIN_CPU
pytestmark = pytest.mark.skipif(
    not PLAIN.serves(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)),
    reason="this torch does not describe its tensors to native code (before 2.10)",
)


def inputs(*leading, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shape = leading or (N,)
    s = torch.randn(*shape, C, generator=generator).to(dtype)
    t = torch.randn(*shape, C, generator=generator).to(dtype)
    return s, t, torch.randint(0, C, shape, generator=generator)


def through(way, *arguments, **options):
    """Loss and gradient by the long way or the short one, and which one it was."""
    student, *others = arguments
    student = student.detach().requires_grad_()
    ways = []

    def spy(backend):
        def run(*args):
            ways.append(backend)
            return type(backend).run(backend, *args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for backend in (PLAIN, backends.BACKENDS["cpu"]):
            patch.setattr(backend, "run", spy(backend), raising=False)
        if way == "long":
            patch.setattr(PLAIN, "serves", lambda *_: False, raising=False)
        loss = kd_loss(student, *others, **options)
        loss.sum().backward()
    assert ways == [PLAIN if way == "short" else backends.BACKENDS["cpu"]]
    return loss.detach(), student.grad


@pytest.mark.parametrize("leading", [(N,), (2, 3), (), (1,)], ids=str)
@pytest.mark.parametrize("student", backends.native.DTYPE_CODES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_short_way_has_the_bits_of_the_long_one(leading, student, reduction):
    s, t, y = inputs(*leading)
    if not leading:
        s, t, y = s[0], t[0], y[0]
    s = s.to(student)
    for teacher in (t, t.to(torch.bfloat16), t.double()):
        for labels in (y, y.int(), torch.full_like(y, -100)):
            options = {"reduction": reduction, "temperature": 3.0, "label_smoothing": 0.1}
            short = through("short", s, teacher, labels, **options)
            long = through("long", s, teacher, labels, **options)
            for a, b in zip(short, long, strict=True):
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                assert torch.equal(a, b)


class Subclass(torch.Tensor):
    pass


class AddressSpace(torch.Tensor):
    """Elements that are not where a pointer says they are."""

    @staticmethod
    def __new__(cls, elements):
        return torch.Tensor._make_wrapper_subclass(cls, elements.shape, dtype=elements.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def freed():
    x = torch.zeros(N, C)
    x.untyped_storage().resize_(0)
    return x


def fake():
    with FakeTensorMode():
        return torch.zeros(N, C)


NOT_PLAIN = {
    "no tensor": lambda: [0.0],
    "nothing": lambda: None,
    "transposed": lambda: torch.zeros(C, N).t(),
    "strided": lambda: torch.zeros(N, 2 * C)[:, ::2],
    "rows apart": lambda: torch.zeros(N, C + 1)[:, :C],
    "expanded": lambda: torch.zeros(C).expand(N, C),
    "negated": lambda: torch._neg_view(torch.zeros(N, C)),
    "another shape": lambda: torch.zeros(N + 1, C),
    "fewer dimensions": lambda: torch.zeros(C),
    "no rows": lambda: torch.zeros(0, C),
    "integers": lambda: torch.zeros(N, C, dtype=torch.int32),
    "complex": lambda: torch.zeros(N, C, dtype=torch.complex64),
    "float8": lambda: torch.zeros(N, C).to(torch.float8_e4m3fn),
    "another device": lambda: torch.zeros(N, C, device="meta"),
    "sparse": lambda: torch.zeros(N, C).to_sparse(),
    "a subclass": lambda: torch.zeros(N, C).as_subclass(Subclass),
    "a wrapper": lambda: AddressSpace(torch.zeros(N, C)),
    "freed": freed,
    "fake": fake,
}
LABELS_NOT_PLAIN = {
    "nothing": lambda: None,
    "16 bits": lambda: torch.zeros(N, dtype=torch.int16),
    "unsigned": lambda: torch.zeros(N, dtype=torch.uint8),
    "booleans": lambda: torch.zeros(N, dtype=torch.bool),
    "fractions": lambda: torch.zeros(N),
    "strided": lambda: torch.zeros(2 * N, dtype=torch.long)[::2],
    "another shape": lambda: torch.zeros(N, 1, dtype=torch.long),
    "too few": lambda: torch.zeros(N - 1, dtype=torch.long),
    "negated": lambda: torch._neg_view(torch.zeros(N, dtype=torch.long)),
}


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_logits_that_are_not_plain_take_the_long_way(make):
    s, t, y = inputs()
    assert PLAIN.serves(s, t, y)
    assert not PLAIN.serves(make(), t, y)
    assert not PLAIN.serves(s, make(), y)


@pytest.mark.parametrize("make", LABELS_NOT_PLAIN.values(), ids=LABELS_NOT_PLAIN)
def test_labels_that_are_not_plain_take_the_long_way(make):
    s, t, _ = inputs()
    assert not PLAIN.serves(s, t, make())


def test_under_a_transform_nothing_is_plain():
    s, t, y = inputs()
    seen = []

    def look(x):
        seen.append(PLAIN.serves(x, t, y))
        return x.sum()

    torch.func.grad(look)(s)
    torch.func.functionalize(look)(s)
    torch.func.vmap(look)(s.expand(3, N, C))
    assert seen == [False] * 3


@pytest.mark.parametrize("special", ["weight", "return_terms", "inplace", "backend"])
def test_what_the_short_way_does_not_know_takes_the_long_one(special):
    s, t, y = inputs()
    option = {"weight": torch.ones(C), "backend": "reference"}.get(special, True)
    student = s.clone().requires_grad_() * 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLAIN, "run", None, raising=False)
        kd_loss(student, t, y, **{special: option})


def test_native_code_refuses_outputs_that_do_not_fit():
    native = backends.cpu._cpu
    s, t, y = inputs()
    options = native.Options(4.0, 0.9, -100, 0.0, 0, False, 4.0, 16.0, [])
    grad, loss = torch.zeros(N, C), torch.zeros(())
    for wrong_grad in (torch.zeros(N, C - 1), torch.zeros(N, C).double(), torch.zeros(C, N).t()):
        with pytest.raises(ValueError, match="fit each other"):
            native.run_plain(options, s, t, y, wrong_grad, loss, 1)
    for wrong_loss in (torch.zeros(2), torch.zeros((), dtype=torch.float64), None):
        with pytest.raises(ValueError, match="fit each other"):
            native.run_plain(options, s, t, y, grad, wrong_loss, 1)
    assert grad.eq(0).all()
    assert loss == 0


def test_a_call_keeps_no_tensor_alive():
    loss_fn = FusedKDLoss()
    s, t, y = inputs()
    gc.collect()
    before = sum(type(o) is torch.Tensor for o in gc.get_objects())
    for _ in range(5):
        loss_fn(s.detach().requires_grad_(), t.clone(), y.clone()).backward()
    gc.collect()
    assert sum(type(o) is torch.Tensor for o in gc.get_objects()) == before


TABLES = {
    "none": "del torch.Tensor.__dlpack_c_exchange_api__",
    "a number": "torch.Tensor.__dlpack_c_exchange_api__ = 140000",
    "of another version": """
import ctypes
header = (ctypes.c_uint32 * 32)(2, 0)  # DLPack 2
make = ctypes.pythonapi.PyCapsule_New
make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
name = b"dlpack_exchange_api"
torch.Tensor.__dlpack_c_exchange_api__ = make(ctypes.addressof(header), name, None)
""",
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_a_torch_that_describes_its_tensors_otherwise_takes_the_long_way(change):
    script = f"""
import torch
{change}
from kdkernels import backends, kd_loss
s, t, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.zeros(3, dtype=torch.long)
assert not backends.PLAIN_CPU.serves(s, t, y)
kd_loss(s, t, y, backend="cpu").backward()
assert s.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
