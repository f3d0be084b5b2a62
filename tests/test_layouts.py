"""Any memory layout: the bits of the contiguous copy's result, no copy where rows are walkable,
and not a byte written outside the gradient.
"""

import contextlib

import pytest
import torch
from oracle import oracle
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import kd_loss
from kdkernels.backends import cpu, native

LOSS_BOUND, GRAD_BOUND = 2e-6, 2e-6
named_backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
LABEL_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype)


def labels_for(logits):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)


def offset(x, by):
    """The values of x, ``by`` elements into a buffer that is aligned to 64 bytes."""
    buffer = torch.zeros(x.numel() + by, dtype=x.dtype)
    return buffer[by:].view(x.shape).copy_(x)


# Each makes a view of fresh memory. 37 classes: no whole number of vectors, so that every row but
# the first starts unaligned. Rows are walked in place where the classes are neighbours and the
# leading strides fold into two.
C = 37
WALKED = {
    "contiguous": lambda **k: randn(6, C, **k),
    "one row": lambda **k: randn(1, C, **k),
    "no row": lambda **k: randn(0, C, **k),
    "no row in the middle": lambda **k: randn(3, 0, C, **k),
    "vector (C,)": lambda **k: randn(C, **k),
    "one class": lambda **k: randn(6, 1, **k),
    "one class of many": lambda **k: randn(6, C, **k)[:, 5:6],
    "one class with a stride": lambda **k: randn(6, C, **k)[:, 5::C],
    "(B, L, C)": lambda **k: randn(2, 3, C, **k),
    "(N, H, W, C)": lambda **k: randn(2, 2, 3, C, **k),
    "every other row": lambda **k: randn(12, C, **k)[::2],
    "padded vocabulary": lambda **k: randn(6, C + 27, **k)[:, :C],
    "columns from the middle": lambda **k: randn(6, C + 27, **k)[:, 9:-18],
    "padded vector": lambda **k: randn(C + 9, **k)[4:-5],
    "causal shift": lambda **k: randn(3, 5, C, **k)[:, :-1],
    "causal shift of a padded vocabulary": lambda **k: randn(3, 5, C + 3, **k)[:, 1:, :C],
    "(L, B, C) as (B, L, C)": lambda **k: randn(4, 3, C, **k).transpose(0, 1),
    "one position of each sequence": lambda **k: randn(6, 4, C, **k)[:, 2],
    "crop that folds": lambda **k: randn(2, 5, 3, C, **k)[:, 1:4],
    "offset by 1": lambda **k: offset(randn(6, C, **k), 1),
    "offset by 3": lambda **k: offset(randn(6, C, **k), 3),
    "a row for all": lambda **k: randn(1, C, **k).expand(6, C),
    "a row for all, three-dimensional": lambda **k: randn(C, **k).expand(2, 3, C),
    "a row for each batch": lambda **k: randn(3, 1, C, **k).expand(3, 4, C),
    "a sequence for all": lambda **k: randn(1, 4, C, **k).expand(3, 4, C),
    "overlapping rows": lambda **k: randn(6 + C, **k).as_strided((6, C), (1, 1)),
    "axes of one": lambda **k: randn(1, 12, 1, C, **k)[:, ::2],
}
COPIED = {
    "transposed": lambda **k: randn(C, 6, **k).t(),
    "transposed and sliced": lambda **k: randn(C + 4, 9, **k)[2:-2, ::2].t(),
    "every other class": lambda **k: randn(6, 2 * C, **k)[:, ::2],
    "(N, C, H, W) as (N, H, W, C)": lambda **k: randn(2, C, 2, 3, **k).permute(0, 2, 3, 1),
    "all axes reversed": lambda **k: randn(C, 3, 2, 2, **k).permute(3, 2, 1, 0),
    "a vector with steps": lambda **k: randn(3 * C, **k)[1::3],
    "a class for all": lambda **k: randn(6, 1, **k).expand(6, C),
    "one number for all": lambda **k: randn(1, 1, **k).expand(6, C),
    "crop": lambda **k: randn(2, 5, 5, C, **k)[:, 1:3, 1:4],
    "three strides": lambda **k: randn(2, 3, 2, C, **k).permute(2, 1, 0, 3),
}
LAYOUTS = WALKED | COPIED
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
walked = pytest.mark.parametrize("layout", WALKED.values(), ids=WALKED)
copied = pytest.mark.parametrize("layout", COPIED.values(), ids=COPIED)


def value_and_grad(student, teacher, labels, **options):
    """Everything the call yields, with a gradient taken with respect to the logits themselves."""
    student = student.detach().requires_grad_()  # detach keeps the layout
    terms = kd_loss(student, teacher, labels, return_terms=True, **options)
    (grad,) = torch.autograd.grad(terms.loss.sum(), student)
    return *(x.detach() for x in terms), grad


def assert_same_bits(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@named_backends
@dtypes
@layouts
def test_the_layout_of_student_and_teacher_changes_no_bit(layout, dtype, backend):
    s, t = layout(dtype=dtype, seed=1), layout(dtype=dtype, seed=2)
    dense_s, dense_t, y = (
        s.clone(memory_format=torch.contiguous_format),
        t.contiguous(),
        labels_for(s),
    )
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "backend": backend, "temperature": 2.0}
        expected = value_and_grad(dense_s, dense_t, y, **options)
        assert expected[-1].shape == s.shape
        for student, teacher in ((s, t), (s, dense_t), (dense_s, t)):
            assert_same_bits(value_and_grad(student, teacher, y, **options), expected)
            # Without a gradient another path is taken, which sums the same numbers.
            loss = kd_loss(student, teacher, y, **options)
            assert torch.equal(loss, kd_loss(dense_s, dense_t, y, **options))


@layouts
def test_every_layout_is_right_and_not_only_consistent(layout):
    s, t = layout(seed=1), layout(seed=2)
    y = labels_for(s)
    for reduction in ("mean", "none"):
        got = value_and_grad(s, t, y, reduction=reduction)
        expected = oracle(s, t, y, reduction=reduction)
        for term, want in zip(got[:3], expected[:3], strict=True):
            assert term.shape == want.shape
            assert ((term.double() - want).abs() <= LOSS_BOUND * (1 + want.abs())).all()
        assert (got[3].double() - expected[3]).norm() <= GRAD_BOUND * expected[3].norm()


@pytest.mark.parametrize("by", range(16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_alignment_of_the_data_changes_no_bit(dtype, by):
    """Every remainder of the address that a 64-byte vector can meet; 2100: more than a block."""
    for classes in (16, 37, 2100):
        s, t = randn(2, classes, seed=1, dtype=dtype), randn(2, classes, seed=2, dtype=dtype)
        y = labels_for(s)
        expected = value_and_grad(s, t, y)
        unaligned = offset(s, by)
        assert unaligned.data_ptr() % 64 == by * s.element_size() % 64
        assert_same_bits(value_and_grad(unaligned, t, y), expected)
        assert_same_bits(value_and_grad(s, offset(t, by), y), expected)


@pytest.mark.parametrize(
    "teacher_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
@pytest.mark.parametrize(
    "student_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
def test_student_and_teacher_differ_in_dtype_and_layout(student_dtype, teacher_dtype):
    for student_layout, teacher_layout in [
        (lambda **k: randn(6, C + 27, **k)[:, :C], lambda **k: randn(C, 6, **k).t()),
        (lambda **k: randn(C, 6, **k).t(), lambda **k: randn(1, C, **k).expand(6, C)),
        (lambda **k: randn(12, C, **k)[::2], lambda **k: offset(randn(6, C, **k), 1)),
    ]:
        s, t = (
            student_layout(dtype=student_dtype, seed=1),
            teacher_layout(dtype=teacher_dtype, seed=2),
        )
        y = labels_for(s)
        got = value_and_grad(s, t, y)
        assert_same_bits(got, value_and_grad(s.contiguous(), t.contiguous(), y))
        assert got[-1].dtype == student_dtype
        expected = oracle(s, t, y)[0]
        assert abs(got[0].double() - expected) <= LOSS_BOUND * (1 + expected)


def misaligned(y):
    """The labels at an address that is no multiple of their size."""
    size = y.element_size()
    memory = bytearray(y.numel() * size + size)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    at = next(k for k in range(1, size + 1) if (start + k) % size == size // 2)
    return torch.frombuffer(memory, dtype=y.dtype, count=y.numel(), offset=at).copy_(y)


LABEL_LAYOUTS = {
    "contiguous": lambda y: y,
    "every other": lambda y: torch.stack([y, torch.full_like(y, 126)], -1)[..., 0],
    "transposed": lambda y: y.view(3, 4).t().contiguous().t(),
    "offset by 1": lambda y: torch.cat([y.new_tensor([126]), y.flatten()])[1:].view(3, 4),
    "column": lambda y: torch.stack([y] * 3, -2)[:, 1],
}


@named_backends
@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@pytest.mark.parametrize("layout", LABEL_LAYOUTS.values(), ids=LABEL_LAYOUTS)
def test_labels_of_any_integer_type_and_layout(backend, dtype, layout):
    s, t = randn(3, 4, C, seed=1), randn(3, 4, C, seed=2)
    y = labels_for(s)
    if dtype != torch.uint8:
        y[1, 2] = y[2, 3] = -100
    expected = value_and_grad(s, t, y, backend=backend)
    made = layout(y.to(dtype))
    assert made.shape == y.shape
    assert_same_bits(value_and_grad(s, t, made, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_labels_that_are_not_aligned_to_their_size(dtype):
    s, t = randn(12, C, seed=1), randn(12, C, seed=2)
    y = labels_for(s)
    made = misaligned(y.to(dtype))
    assert made.data_ptr() % made.element_size() != 0
    assert_same_bits(value_and_grad(s, t, made), value_and_grad(s, t, y))


@named_backends
def test_labels_of_a_vector_of_logits_are_a_single_number(backend):
    s, t, y = randn(C, seed=1), randn(C, seed=2), torch.tensor(5)
    for reduction, shape in (("mean", ()), ("none", ())):
        loss, _, _, grad = value_and_grad(s, t, y, reduction=reduction, backend=backend)
        batch = value_and_grad(s[None], t[None], y[None], reduction="mean", backend=backend)
        assert loss.shape == shape
        assert torch.equal(loss, batch[0])
        assert torch.equal(grad, batch[3][0])


@named_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_and_layout(backend, dtype):
    s, t = randn(6, C, seed=1), randn(6, C, seed=2)
    y = labels_for(s)
    w = (torch.rand(2 * C, generator=torch.Generator().manual_seed(3)) + 0.5).to(dtype)
    for made in (w[:C], w[::2], w[1::2], w[1 : C + 1], w[:1].expand(C)):
        got = value_and_grad(s, t, y, weight=made, backend=backend)
        same = made.clone(memory_format=torch.contiguous_format)
        assert_same_bits(got, value_and_grad(s, t, y, weight=same, backend=backend))
        expected = oracle(s, t, y, weight=made)[0]
        assert abs(got[0].double() - expected) <= LOSS_BOUND * (1 + expected)


def whole_memory(x):
    """All the bytes of the storage that x is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


@named_backends
@dtypes
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.uint8])
@layouts
def test_inputs_are_never_modified(layout, dtype, labels_dtype, backend):
    """float32 above all: its .float() is the same tensor, and its .contiguous() may be."""
    s, t = layout(dtype=dtype, seed=1), layout(dtype=dtype, seed=2)
    y = labels_for(s).to(labels_dtype)
    w = torch.rand(2 * s.shape[-1], dtype=torch.float64)[::2] + 0.5
    tensors = (s, t, y, w)
    before = [(whole_memory(x).clone(), x._version) for x in tensors]
    x = s.detach().requires_grad_()
    for reduction in ("mean", "none"):
        loss = kd_loss(x, t, y, weight=w, reduction=reduction, backend=backend)
        loss.backward(torch.full_like(loss, 3.0))
        with torch.no_grad():
            kd_loss(x, t, y, weight=w, reduction=reduction, backend=backend, inplace=False)
        kd_loss(s, t, y, weight=w, reduction=reduction, backend=backend, return_terms=True)
    for x, (memory, version) in zip(tensors, before, strict=True):
        assert torch.equal(whole_memory(x), memory)
        assert x._version == version


class Operations(TorchDispatchMode):
    """Counts what torch does with at least ``size`` elements, and what it allocates."""

    def __init__(self, size):
        super().__init__()
        self.size, self.copies, self.allocated = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.copies += name in ("clone", "copy_", "_to_copy", "contiguous", "copy")
            self.allocated += name.startswith(("empty", "zeros", "new_"))
        return result


@contextlib.contextmanager
def native_arguments(monkeypatch):
    """The addresses of the logits in the native calls made in the block."""
    calls = []

    class Spy:
        is_plain = staticmethod(cpu._cpu.is_plain)
        Options = cpu._cpu.Options

        @staticmethod
        def run(options, student, teacher, *others):
            calls.append((student, teacher))
            return module.run(options, student, teacher, *others)

        @staticmethod
        def run_plain(options, student, teacher, *others):
            calls.append((student.data_ptr(), teacher.data_ptr()))
            return module.run_plain(options, student, teacher, *others)

    module = cpu._cpu
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_cpu", Spy)
        yield calls


@dtypes
@walked
def test_rows_with_unit_class_stride_are_not_copied(layout, dtype, monkeypatch):
    s, t = layout(dtype=dtype, seed=1), layout(dtype=dtype, seed=2)
    assert native.laid_out(s)[0] is s
    y = labels_for(s)
    x = s.detach().requires_grad_()
    with native_arguments(monkeypatch) as calls, Operations(max(s.numel(), 2)) as operations:
        kd_loss(x, t, y, reduction="sum")  # its loss and its labels are smaller than the logits
    assert calls == [(x.data_ptr(), t.data_ptr())]
    assert operations.copies == 0
    assert operations.allocated == (s.numel() >= 2)  # the gradient, and nothing else


@copied
def test_other_layouts_are_copied_once_each(layout, monkeypatch):
    s, t = layout(seed=1), layout(seed=2)
    y = labels_for(s)
    x = s.detach().requires_grad_()
    for student, teacher, copies in ((x, t, 2), (x, t.contiguous(), 1), (x.contiguous(), t, 1)):
        student = student.detach().requires_grad_()
        with native_arguments(monkeypatch) as calls, Operations(s.numel()) as operations:
            kd_loss(student, teacher, y)
        assert operations.copies == copies
        assert (calls[0][0] == student.data_ptr()) == student.is_contiguous()
        assert (calls[0][1] == teacher.data_ptr()) == teacher.is_contiguous()


@dtypes
@layouts
def test_rows_are_found_where_torch_has_them(layout, dtype):
    x = layout(dtype=dtype, seed=1)
    source, (inner, outer, step) = native.laid_out(x)
    row_width = x.shape[-1]
    rows = [
        source.as_strided(
            (row_width,), (1,), source.storage_offset() + (i // inner) * outer + (i % inner) * step
        )
        for i in range(x.numel() // row_width)
    ]
    for row, expected in zip(rows, x.reshape(-1, row_width), strict=True):
        assert torch.equal(row, expected)


# What a layout is made of, so that its gradient can be asked for where the memory is.
LEAVES = {
    "transposed": ((C, 6), lambda x: x.t()),
    "(N, C, H, W) as (N, H, W, C)": ((2, C, 2, 3), lambda x: x.permute(0, 2, 3, 1)),
    "all axes reversed": ((C, 3, 2, 2), lambda x: x.permute(3, 2, 1, 0)),
    "causal shift": ((3, 5, C), lambda x: x[:, :-1]),
    "padded vocabulary": ((6, C + 27), lambda x: x[:, :C]),
    "every other row": ((12, C), lambda x: x[::2]),
    "every other class": ((6, 2 * C), lambda x: x[:, ::2]),
    "a vector with steps": ((3 * C,), lambda x: x[1::3]),
    "a row for all": ((1, C), lambda x: x.expand(6, C)),
    "a sequence for all": ((1, 4, C), lambda x: x.expand(3, 4, C)),
    "no row": ((0, C), lambda x: x[:, 1:]),
}


@named_backends
@pytest.mark.parametrize(("shape", "view"), LEAVES.values(), ids=LEAVES)
def test_the_gradient_reaches_the_leaf_behind_a_view(backend, shape, view):
    leaf = randn(*shape, seed=1, dtype=torch.float64).requires_grad_()
    s = view(leaf)
    t = randn(*s.shape, seed=2, dtype=torch.float64)
    y = labels_for(s)
    kd_loss(s, t, y, backend=backend).backward()
    expected = torch.autograd.grad(view(leaf), leaf, oracle(s, t, y)[3])[0]
    assert leaf.grad.shape == leaf.shape
    assert (leaf.grad - expected).norm() <= GRAD_BOUND * expected.norm() + 1e-30


@named_backends
@dtypes
def test_a_leaf_that_is_itself_transposed(backend, dtype):
    leaf = randn(C, 6, seed=1, dtype=dtype).t().requires_grad_()
    assert leaf.is_leaf
    assert not leaf.is_contiguous()
    t = randn(6, C, seed=2, dtype=dtype)
    y = labels_for(leaf)
    kd_loss(leaf, t, y, backend=backend).backward()
    assert leaf.grad.shape == leaf.shape
    expected = value_and_grad(leaf.detach().contiguous(), t, y, backend=backend)[3]
    assert torch.equal(leaf.grad, expected)


# Views of which the gradient takes the place, and whose memory has gaps that are not theirs.
INPLACE = {
    "contiguous": ((6, C), lambda x: x),
    "reshaped": ((6, C), lambda x: x.view(2, 3, C)),
    "padded vocabulary": ((6, C + 27), lambda x: x[:, :C]),
    "columns from the middle": ((6, C + 27), lambda x: x[:, 9:-18]),
    "every other row": ((12, C), lambda x: x[::2]),
    "causal shift": ((3, 5, C), lambda x: x[:, :-1]),
    "causal shift of a padded vocabulary": ((3, 5, C + 3), lambda x: x[:, 1:, :C]),
    "crop": ((2, 5, 5, C + 1), lambda x: x[:, 1:3, 1:4, 1:]),
    "transposed": ((C, 6), lambda x: x.t()),
    "transposed and sliced": ((C + 4, 9), lambda x: x[2:-2, ::2].t()),
    "(N, C, H, W) as (N, H, W, C)": ((2, C, 2, 3), lambda x: x.permute(0, 2, 3, 1)),
    "every other class": ((6, 2 * C), lambda x: x[:, ::2]),
    "padded vector": ((C + 9,), lambda x: x[4:-5]),
    "a vector with steps": ((3 * C,), lambda x: x[1::3]),
    "offset by 1": ((6 * C + 1,), lambda x: x[1:].view(6, C)),
    "no row": ((0, C), lambda x: x[:, 1:]),
}
inplace_views = pytest.mark.parametrize(("shape", "view"), INPLACE.values(), ids=INPLACE)


@named_backends
@dtypes
@inplace_views
def test_inplace_writes_the_gradient_over_the_student_and_nowhere_else(shape, view, dtype, backend):
    leaf = randn(*shape, seed=1, dtype=dtype).requires_grad_()
    base = leaf * 1.0
    student = view(base)
    t, y = randn(*student.shape, seed=2, dtype=dtype), labels_for(student)
    loss, soft, hard, grad = value_and_grad(student, t, y, backend=backend)
    memory = base.detach().clone()
    pointer, version = student.data_ptr(), student._version

    terms = kd_loss(student, t, y, inplace=True, return_terms=True, backend=backend)
    assert_same_bits([x.detach() for x in terms], (loss, soft, hard))
    assert student.data_ptr() == pointer
    assert student._version > version  # whoever saved the logits for a backward is told
    assert torch.equal(student.detach(), grad)
    # In the same memory, nothing but the view's own elements has changed.
    view(memory).copy_(grad)
    assert torch.equal(base.detach(), memory)

    terms.loss.backward()
    expected = torch.zeros_like(leaf)
    view(expected).copy_(grad)
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@inplace_views
def test_inplace_allocates_no_second_gradient(shape, view, dtype):
    base = randn(*shape, seed=1, dtype=dtype).requires_grad_() * 1.0
    student = view(base)
    t, y = randn(*student.shape, seed=2, dtype=dtype), labels_for(student)
    is_copied = native.laid_out(student)[0] is not student
    with Operations(max(student.numel(), 2)) as operations:
        kd_loss(student, t, y, inplace=True, reduction="sum")
    assert operations.allocated == 0
    assert operations.copies == 2 * is_copied  # to walk the rows, and back


@named_backends
def test_inplace_on_rows_that_are_large_enough_for_threads(backend):
    """Neighbouring rows are written by different threads, with other data between them."""
    torch.set_num_threads(2)
    leaf = randn(300, 300 + 5, seed=1).requires_grad_()
    base = leaf * 1.0
    student = base[:, 2:-3]
    t, y = randn(300, 300, seed=2), labels_for(student)
    expected = leaf.detach().clone()
    expected[:, 2:-3] = value_and_grad(student, t, y, backend=backend)[3]
    kd_loss(student, t, y, inplace=True, backend=backend)
    assert torch.equal(base.detach(), expected)


def test_a_lazy_minus_sign_is_not_overlooked():
    """A conjugate's imaginary part is a view of memory that holds the opposite sign."""
    plain, other = randn(6, C), randn(6, C, seed=1)
    labels, lazy = labels_for(plain), torch._neg_view(-plain)
    assert lazy.is_neg()
    assert torch.equal(kd_loss(lazy, other, labels), kd_loss(plain, other, labels))
    assert torch.equal(kd_loss(other, lazy, labels), kd_loss(other, plain, labels))
    weight, negative = torch.rand(C) + 0.5, torch._neg_view(-labels)
    expected = kd_loss(plain, other, labels, weight=weight, reduction="sum")
    lazy_weight = torch._neg_view(-weight.double())
    got = kd_loss(plain, other, negative, weight=lazy_weight, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    x, z = plain.clone().requires_grad_(), (-plain).requires_grad_()
    kd_loss(x, other, labels).backward()
    for inplace in (False, True):
        (grad,) = torch.autograd.grad(
            kd_loss(torch._neg_view(z * 1), other, labels, inplace=inplace), z
        )
        assert torch.equal(grad, -x.grad)
