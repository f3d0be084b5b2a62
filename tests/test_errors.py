"""What bad input gets: an exception that names the argument, what was expected and what came.

And nothing else: not one bit of an input has changed, inplace=True included.
"""

import contextlib
import math

import numpy as np
import pytest
import torch

from kdkernels import FusedKDLoss, backends, kd_loss
from kdkernels.backends import cpu
from kdkernels.options import Options
from kdkernels.reference import kd_terms

N, C = 4, 5


def inputs(*shape, dtype=torch.float32):
    shape = shape or (N, C)
    torch.manual_seed(0)
    s, t = torch.randn(shape), torch.randn(shape)
    return s.to(dtype), t.to(dtype), torch.randint(shape[-1], shape[:-1])


def through_the_module(s, t, y=None, **options):
    return FusedKDLoss(**options)(s, t, y)


def set_on_the_module(s, t, y=None, **options):
    """Options are attributes that may be changed between steps: a bad one is found at the call."""
    module = FusedKDLoss()
    for name, value in options.items():
        setattr(module, name, value)
    return module(s, t, y)


pytestmark = pytest.mark.usefixtures("one_thread")


losses = pytest.mark.parametrize("loss", [kd_loss, through_the_module], ids=["function", "module"])
named_backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


@contextlib.contextmanager
def refused(error, match, *tensors):
    """The block raises ``error``; no element of ``tensors`` has changed, and none has a .grad."""
    tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    before = [(x.detach().clone(), x._version) for x in tensors]
    with pytest.raises(error, match=match):
        yield
    for x, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, values)
        assert x._version == version
        assert not (x.is_leaf and x.grad is not None)


OPTIONS = [
    *(
        ({"temperature": value}, ValueError, rf"temperature .*finite number > 0, got {value}")
        for value in (0.0, -0.0, -1.0, math.nan, math.inf, -math.inf)
    ),
    *(
        ({"temperature": value}, ValueError, f"temperature .*1e-06 and 1000000.0, got {shown}")
        for value, shown in ((1e-39, "1e-39"), (1e200, r"1e\+200"))
    ),
    *(
        ({name: value}, ValueError, rf"{name} .*\[0, 1\], got {value}")
        for name in ("alpha", "label_smoothing")
        for value in (-0.1, -1e-9, 1.0000001, 2.0, math.nan, math.inf, -math.inf)
    ),
    # A tensor, even of one element, would make a GPU's host wait; True is 1 to Python.
    *(
        ({name: value}, TypeError, rf"{name} .*number .*, got {type(value).__name__}")
        for name in ("alpha", "label_smoothing")
        for value in ("1", None, True, False, torch.tensor(1.0), [1.0], 1j, np.ones(2))
    ),
    *(
        ({"temperature": value}, TypeError, r"temperature .*number .*, got")
        for value in ("1", True, False, 1j, np.ones(2), [True], ["2"], [[2.0]], {2.0})
    ),
    ({"temperature": []}, ValueError, "temperature must name at least one"),
    ({"temperature": (2.0, -1.0)}, ValueError, "temperature .*finite number > 0, got -1.0"),
    *(
        ({"reduction": value}, ValueError, f"reduction .*'mean', 'sum', 'none'.*got {shown}")
        for value, shown in [
            ("batchmean", "'batchmean'"),
            ("Mean", "'Mean'"),
            ("", "''"),
            (None, "None"),
            (1, "1"),
            (["mean"], r"\['mean'\]"),
        ]
    ),
    *(
        ({"ignore_index": value}, TypeError, f"ignore_index .*int, got {type(value).__name__}")
        for value in (-100.0, "-100", None, True, [0], torch.tensor(-100))
    ),
    *(  # no label of any integer type can have this value, and no int64 can hold it
        ({"ignore_index": value}, (TypeError, ValueError), f"ignore_index .*{value}")
        for value in (2**63, -(2**63) - 1)
    ),
    *(
        ({name: value}, TypeError, f"{name} must be True or False, got {value!r}")
        for name in ("distill_ignored", "inplace", "standardize", "scale_by_t2")
        for value in ("no", 1, None)
    ),
    *(
        ({"return_terms": value}, TypeError, f'True, False or "metrics", got {value!r}')
        for value in ("no", 1, None)
    ),
    *(
        ({"backend": value}, ValueError, f"backend .*None .*'cpu', .*'reference'.*got {shown}")
        for value, shown in [("gpu", "'gpu'"), ("CPU", "'CPU'"), (3, "3"), (["cpu"], r"\['cpu'\]")]
    ),
]
option_ids = [f"{k}={v!r}".replace("\n", "") for o, _, _ in OPTIONS for k, v in o.items()]


@pytest.mark.parametrize(("bad", "error", "match"), OPTIONS, ids=option_ids)
@pytest.mark.parametrize(
    "loss", [kd_loss, set_on_the_module], ids=["function", "changed attribute"]
)
def test_a_bad_option_is_named_at_the_call(loss, bad, error, match):
    s, t, y = inputs()
    s.requires_grad_()
    with refused(error, match, s, t, y):
        loss(s, t, y, **bad)


@pytest.mark.parametrize(("bad", "error", "match"), OPTIONS, ids=option_ids)
def test_a_bad_option_is_named_when_the_module_is_made(bad, error, match):
    with pytest.raises(error, match=match):
        FusedKDLoss(**bad)


@losses
@pytest.mark.parametrize("name", ["temperature", "alpha", "label_smoothing", "ignore_index"])
def test_a_bad_option_is_refused_after_a_good_one_that_equals_it(loss, name):
    """Checked options are cached, and True == 1 == 1.0."""
    for good in (1, 0) if name != "temperature" else (1,):
        loss(*inputs(), **{name: good})
        for _ in range(2):
            with pytest.raises(TypeError, match=f"{name} .*bool"):
                loss(*inputs(), **{name: bool(good)})


@losses
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1 - 2.0**-53])
def test_labels_are_needed_when_alpha_is_below_1(loss, alpha):
    s, t, _ = inputs()
    with refused(ValueError, f"labels .*missing.*alpha .*1 .*got {alpha}", s, t):
        loss(s, t, alpha=alpha)


def meta(x):
    return x.to("meta")


# What is put in place of the argument, the exception, and what its message says in this order.
TENSORS = [
    # Shapes. (1, C) and (C,) would broadcast.
    ("teacher", lambda t: t[:, :-1], ValueError, r"teacher_logits .*\(4, 5\).*\(4, 4\)"),
    ("teacher", lambda t: t[:-1], ValueError, r"teacher_logits .*\(4, 5\).*\(3, 5\)"),
    ("teacher", lambda t: t[:1], ValueError, r"teacher_logits .*\(4, 5\).*\(1, 5\)"),
    ("teacher", lambda t: t[0], ValueError, r"teacher_logits .*\(4, 5\).*\(5,\)"),
    ("teacher", lambda t: t.view(2, 2, C), ValueError, r"teacher_logits .*\(4, 5\).*\(2, 2, 5\)"),
    ("teacher", lambda t: t[0, 0], ValueError, r"teacher_logits .*\(4, 5\).*\(\)"),
    ("student", lambda s: s.t(), ValueError, r"student_logits.*\(5, 4\).*\(4, 5\)"),
    ("both", lambda x: x[0, 0], ValueError, r"student_logits .*\(\.\.\., C\).*got \(\)"),
    ("both", lambda x: x[:, :0], ValueError, r"student_logits .*C >= 1.*got \(4, 0\)"),
    ("both", lambda x: x[:0, :0], ValueError, r"student_logits .*C >= 1.*got \(0, 0\)"),
    ("labels", lambda y: y[:-1], ValueError, r"labels .*\(4,\).*\(3,\)"),
    ("labels", lambda y: y[:1], ValueError, r"labels .*\(4,\).*\(1,\)"),
    ("labels", lambda y: y[:, None], ValueError, r"labels .*\(4,\).*\(4, 1\)"),
    ("labels", lambda y: y[0], ValueError, r"labels .*\(4,\).*\(\)"),
    ("labels", lambda y: y.view(2, 2), ValueError, r"labels .*\(4,\).*\(2, 2\)"),
    ("labels", lambda y: y.new_zeros(N, C), ValueError, r"labels .*\(4,\).*\(4, 5\)"),
    ("weight", lambda w: w[:-1], ValueError, r"weight .*\(5,\).*\(4,\)"),
    ("weight", lambda w: w[:1], ValueError, r"weight .*\(5,\).*\(1,\)"),
    ("weight", lambda w: w[0], ValueError, r"weight .*\(5,\).*\(\)"),
    ("weight", lambda w: w[:, None], ValueError, r"weight .*\(5,\).*\(5, 1\)"),
    ("weight", lambda w: w.expand(N, C), ValueError, r"weight .*\(5,\).*\(4, 5\)"),
    # Dtypes.
    *(
        (who, lambda x, to=to: x.to(to), TypeError, f"{name} .*floating point, got {to}")
        for who, name in [
            ("student", "student_logits"),
            ("teacher", "teacher_logits"),
            ("weight", "weight"),
        ]
        for to in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    ),
    *(
        ("labels", lambda y, to=to: y.to(to), TypeError, f"labels .*integers.*, got {to}")
        for to in (torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64)
    ),
    # Devices.
    ("student", meta, ValueError, r"teacher_logits .*device of student_logits, meta, got cpu"),
    ("teacher", meta, ValueError, r"teacher_logits .*device of student_logits, cpu, got meta"),
    ("labels", meta, ValueError, r"labels .*device of student_logits, cpu, got meta"),
    ("weight", meta, ValueError, r"weight .*device of student_logits, cpu, got meta"),
    # Not tensors, or not such as have rows in memory.
    *(
        (who, lambda x, make=make: make(x), TypeError, f"{name} .*Tensor.*, got {came}")
        for who, name in [
            ("student", "student_logits"),
            ("teacher", "teacher_logits"),
            ("labels", "labels"),
            ("weight", "weight"),
        ]
        for make, came in [
            (lambda x: x.numpy(), "ndarray"),
            (lambda x: {"logits": x}, "dict"),
            (lambda x: 1.0, "float"),
        ]
    ),
    ("student", lambda s: None, TypeError, r"student_logits .*Tensor, got NoneType"),
    ("teacher", lambda t: None, TypeError, r"teacher_logits .*Tensor, got NoneType"),
    *(
        (who, lambda x: x.to_sparse(), (TypeError, ValueError), f"{name} .*sparse")
        for who, name in [
            ("student", "student_logits"),
            ("teacher", "teacher_logits"),
            ("labels", "labels"),
            ("weight", "weight"),
        ]
    ),
    ("weight", lambda w: w.requires_grad_(), ValueError, r"weight must not require grad"),
]


@losses
@pytest.mark.parametrize(
    ("who", "change", "error", "match"), TENSORS, ids=[match for _, _, _, match in TENSORS]
)
def test_a_bad_tensor_is_named(loss, who, change, error, match):
    s, t, y = inputs()
    w = torch.rand(C)
    if who in ("student", "both"):
        s = change(s)
    if who in ("teacher", "both"):
        t = change(t)
    if who == "labels":
        y = change(y)
    if who == "weight":
        w = change(w)
    dense = (x for x in (s, t, y, w) if getattr(x, "layout", None) == torch.strided)
    with refused(error, match, *dense):
        loss(s, t, y, weight=w)


@losses
def test_a_named_backend_that_cannot_serve_these_tensors_says_why(loss):
    s, t, y = inputs()
    with refused(RuntimeError, r"'cpu' cannot run.*CPU tensors.*meta", s, t, y):
        loss(meta(s), meta(t), meta(y), backend="cpu")
    small = t.to(torch.float8_e4m3fn)
    with refused(RuntimeError, r"'cpu' cannot run.*kernel for torch.float8_e4m3fn", s, y):
        loss(s, small, y, backend="cpu")
    with refused(RuntimeError, r"'cpu' cannot run.*kernel for torch.float8_e4m3fn", t, y):
        loss(small, t, y, backend="cpu")


@losses
def test_a_named_backend_that_was_not_built_says_why(loss, monkeypatch):
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_import_error", "no such module", raising=False)
    backends.select.cache_clear()  # it remembers what could run
    s, t, y = inputs()
    try:
        with refused(RuntimeError, r"'cpu' cannot run.*(not built|no such module)", s, t, y):
            loss(s, t, y, backend="cpu")
    finally:
        backends.select.cache_clear()


# The ends of each type; 2**32 + 1 is a class when cut to 32 bits, 156 is -100 in 8.
BAD_LABELS = [
    *((torch.int64, bad) for bad in (-1, C, -99, -101, 2**32 + 1, -(2**63), 2**63 - 1)),
    *((torch.int32, bad) for bad in (-1, C, -(2**31), 2**31 - 1)),
    *((torch.int16, bad) for bad in (-1, C, -(2**15), 2**15 - 1)),
    *((torch.int8, bad) for bad in (-1, C, -128, 127)),
    *((torch.uint8, bad) for bad in (C, 156, 255)),
]


@named_backends
@losses
@pytest.mark.parametrize(("dtype", "bad"), BAD_LABELS)
def test_a_label_outside_the_classes_is_an_index_error(backend, loss, dtype, bad):
    s, t, y = inputs()
    y = y.to(dtype)
    y[2] = bad
    s.requires_grad_()
    for alpha in (0.0, 0.5, 1.0):  # at 1 the label is no part of the loss, and wrong all the same
        for options in ({}, {"weight": torch.rand(C)}, {"distill_ignored": True}):
            with refused(IndexError, rf"labels\[2\] is {bad}: .*0 <= label < {C}.*-100", s, t, y):
                loss(s, t, y, alpha=alpha, backend=backend, **options)


@named_backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_ignore_index_moves_and_the_default_is_then_no_label(backend, dtype):
    s, t, y = inputs()
    y = y.to(dtype)
    y[1] = -100
    kd_loss(s, t, y, backend=backend)
    with refused(IndexError, r"labels\[1\] is -100: .*-1$", s, t, y):
        kd_loss(s, t, y, ignore_index=-1, backend=backend)
    lowest = torch.iinfo(dtype).min
    y[1] = lowest
    kd_loss(s, t, y, ignore_index=lowest, backend=backend)
    if dtype != torch.int64:  # equal to the label in its lower bits alone
        with refused(IndexError, rf"labels\[1\] is {lowest}: ", s, t, y):
            kd_loss(s, t, y, ignore_index=-lowest, backend=backend)


@named_backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("classes", [128, 200, 256, 300, 40000])
def test_a_class_is_accepted_whether_or_not_the_dtype_holds_their_number(backend, dtype, classes):
    """C itself does not fit: 300 is 44 in 8 bits, 40000 is negative in 16."""
    s, t, y = inputs(2, classes)
    y[:] = torch.tensor([min(classes - 1, torch.iinfo(dtype).max), 100])
    got = kd_loss(s, t, y.to(dtype), backend=backend)
    assert torch.equal(got, kd_loss(s, t, y, backend=backend))


@named_backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_bad_label_deep_in_a_parallel_batch_leaves_every_bit(backend, dtype, inplace):
    torch.set_num_threads(2)
    rows, classes = 20_000, 20  # ten times what wakes the second thread
    s, t, y = inputs(rows, classes)
    y = y.to(dtype)
    y[rows - 3] = classes
    leaf = s.clone().requires_grad_()
    logits = leaf * 1.0
    with refused(IndexError, rf"labels\[{rows - 3}\] is {classes}: ", logits, leaf, t, y):
        kd_loss(logits, t, y, inplace=inplace, backend=backend)
    # Autograd was not told of an overwriting that did not come: the logits are as good as before.
    assert logits.grad_fn.name() == "MulBackward0"
    logits.square().sum().backward()
    assert torch.equal(leaf.grad, 2 * s)


VIEWS = {
    "rows": lambda x: x[1:],
    "columns": lambda x: x[:, 1:],
    "every other class": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
}


@named_backends
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_bad_label_leaves_inplace_views_as_they_were(backend, view):
    s, _, _ = inputs()
    base = s.requires_grad_() * 1.0
    logits = view(base)
    t = torch.zeros(logits.shape)
    y = torch.zeros(len(logits), dtype=torch.long)
    y[-1] = logits.shape[1]
    with refused(IndexError, rf"labels\[{len(y) - 1}\] is", base, logits, t, y):
        kd_loss(logits, t, y, inplace=True, backend=backend)


@named_backends
@pytest.mark.parametrize("place", [lambda x: x, lambda x: torch.cat([x, x])[N:]])
def test_inplace_refuses_a_leaf_that_requires_grad(backend, place):
    s, t, y = inputs()
    s = place(s).requires_grad_()  # on its own, or in a larger buffer
    with refused(ValueError, r"inplace=True .*student_logits.*leaf", s, t, y):
        kd_loss(s, t, y, inplace=True, backend=backend)


@named_backends
@pytest.mark.parametrize(
    "view",
    [lambda x: x[:2], lambda x: x.view(2, 2, C), lambda x: x.t().t(), lambda x: x[:, 1:][:2]],
    ids=["rows", "reshaped", "transposed twice", "view of a view"],
)
def test_inplace_refuses_a_view_of_a_leaf_that_requires_grad(backend, view):
    """Its memory is the leaf's: a parameter would be overwritten by a gradient."""
    leaf, t, y = inputs()
    leaf.requires_grad_()
    student = view(leaf)
    t = torch.zeros_like(student)
    y = torch.zeros(student.shape[:-1], dtype=torch.long)
    with refused(ValueError, r"inplace=True .*student_logits.*leaf", leaf, t, y):
        kd_loss(student, t, y, inplace=True, backend=backend)


OVERLAPPING = {
    "a row for all": lambda x: x[:1].expand(N, C),
    "a column for all": lambda x: x[:, :1].expand(N, C),
    "one number for all": lambda x: x[:1, :1].expand(N, C),
    "sliding window": lambda x: x.as_strided((N, C), (1, 1)),
    "rows that share their ends": lambda x: x.as_strided((N, C), (C - 1, 1)),
    "a batch for all": lambda x: x.expand(3, N, C),
}


@named_backends
@pytest.mark.parametrize("view", OVERLAPPING.values(), ids=OVERLAPPING)
def test_inplace_refuses_logits_that_overlap_themselves(backend, view):
    s, _, _ = inputs()
    student = view(s.requires_grad_() * 1.0)
    t = torch.zeros(student.shape)
    y = torch.zeros(student.shape[:-1], dtype=torch.long)
    with refused(ValueError, r"inplace=True .*student_logits .*overlap.*strides", student, t, y):
        kd_loss(student, t, y, inplace=True, backend=backend)


SHARED = {
    "the same tensor": lambda x: (x, x.detach()),
    "shifted by a row": lambda x: (x[1:], x.detach()[:-1]),
    "shifted by a class": lambda x: (x[:, 1:], x.detach()[:, :-1]),
    "the last row alone": lambda x: (x[:2], x.detach()[1:3]),
    "transposed": lambda x: (x[:, :4], x.detach()[:, :4].t()),
    "a row for all": lambda x: (x, x.detach()[2].expand(N, C)),
}


@named_backends
@pytest.mark.parametrize("split", SHARED.values(), ids=SHARED)
def test_inplace_refuses_a_teacher_in_the_memory_of_the_student(backend, split):
    s, _, _ = inputs()
    student, teacher = split(s.requires_grad_() * 1.0)
    y = torch.zeros(student.shape[:-1], dtype=torch.long)
    with refused(ValueError, r"inplace=True .*teacher_logits .*memory", student, teacher, y):
        kd_loss(student, teacher, y, inplace=True, backend=backend)


def test_inplace_refuses_a_weight_in_the_memory_of_the_student():
    """float64 weights are read where they lie, while the gradient is written."""
    s, t, y = inputs(dtype=torch.float64)
    student = s.requires_grad_() * 1.0
    weight = student.detach()[1]
    with refused(ValueError, r"inplace=True .*weight .*memory", student, t, y):
        kd_loss(student, t, y, weight=weight, inplace=True)


@named_backends
def test_inplace_takes_neighbours_in_one_buffer(backend):
    """The check is of memory shared, not of one storage: two halves of a buffer are apart."""
    s, t, y = inputs()
    both = torch.cat([s, t])
    student = (both.clone().requires_grad_() * 1.0)[:N]
    teacher = student._base.detach()[N:]
    loss = kd_loss(student, teacher, y, inplace=True, backend=backend)
    assert torch.equal(loss, kd_loss(s, t, y, backend=backend))
    assert torch.equal(teacher, t)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "labels", "weight"])
def test_a_tensor_without_memory_is_named(name):
    """FSDP frees storages; fake tensors never had any. A null pointer would end the process."""
    s, t, y = inputs()
    arguments = {"student_logits": s, "teacher_logits": t, "labels": y}
    arguments["weight"] = torch.ones(C, dtype=torch.float64)
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} holds no memory"):
        kd_loss(**arguments, backend="cpu")


def test_the_reference_never_indexes_with_a_label_out_of_range():
    """On a GPU no check may wait for the device, and a bad index would end the process: NaN."""
    s, t, y = inputs()
    y[1], y[2] = C, -1
    options = Options(2.0, 0.5, -100, 0.0, "none", False)
    terms = kd_terms(s, t, y, options, torch.ones(C))
    assert torch.isnan(terms.loss).tolist() == [False, True, True, False]
