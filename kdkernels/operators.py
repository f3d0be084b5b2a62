"""The loss as operators of PyTorch: what torch.compile, torch.export and torch.func see of it.

A compiler cannot look into native code, so it gets nodes of known shapes; eager calls take the
shorter way of functional.py. What is asked for travels as text, which an exported program keeps.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import PLAIN_CPU, Backend
from kdkernels.backends.base import traced_as_constant
from kdkernels.backends.cpu import CPUBackend
from kdkernels.call import Call
from kdkernels.checks import check_tensors
from kdkernels.dispatch import features_of, form_of, is_learned, one_per_row, select
from kdkernels.divergences import PerRow, Term
from kdkernels.intra_class import IntraClass, compiled, with_added
from kdkernels.learnable_temperature import rate_of
from kdkernels.means import with_items
from kdkernels.options import Options, prepare, split_tensors
from kdkernels.reference import KDMetrics, KDTerms, accumulation_dtype, kd_terms
from kdkernels.teachers import Teacher, TopKTeacher, logits_of, tensors_of


class Request(NamedTuple):
    """What is asked of one call, beside its tensors."""

    options: Options
    backend: str | None
    terms: bool
    names: tuple[str, ...]  # of the options that are tensors
    form: str  # of the teacher: "one", "several" or the tail of its k largest
    form_temperature: float  # of the k largest
    learned: bool  # whether the temperature gets a gradient

    def teacher(self, tensors: Sequence[Tensor]) -> Teacher:
        if self.form == "one":
            return tensors[0]
        if self.form == "several":
            return tuple(tensors)
        values, indices = tensors
        return TopKTeacher(values, indices, self.form, self.form_temperature)


def _encode(request: Request) -> str:
    usual = Options._field_defaults  # what nothing is asked for by
    asked = {k: v for k, v in request.options._asdict().items() if k not in usual or v != usual[k]}
    return json.dumps(request._replace(options=asked)._asdict())  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _decode(text: str) -> Request:
    fields = json.loads(text)
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields["options"].items()
    }
    if "divergence" in given:
        given["divergence"] = tuple(Term(*term) for term in given["divergence"])
    return Request(**fields | {"options": Options(**given), "names": tuple(fields["names"])})


def _backend(
    text: str, device: torch.device, student: torch.dtype, teacher: tuple[torch.dtype, ...]
) -> Backend:
    r = _decode(text)
    kind = {"one": Tensor, "several": tuple}.get(r.form, TopKTeacher)
    features = r.options.features | features_of(kind, r.names, r.options, r.learned)
    return select(device, student, teacher, features, r.backend)


@functools.lru_cache(maxsize=256)
def _is_special(options: Options) -> bool:
    return options.special


# ---- what runs -----------------------------------------------------------------------------------


@torch.library.custom_op("kdkernels::loss", mutates_args=())
def _loss(
    student: Tensor,
    teacher: Sequence[Tensor],
    labels: Tensor | None,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    request: str,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, soft, hard, metrics, the gradient times a scale, that scale, and the temperature's."""
    r = _decode(request)
    form, per_row = r.teacher(teacher), dict(zip(r.names, tensors, strict=True))
    check_tensors(student, form, labels, weight, r.options, per_row)
    per_row = dict(one_per_row(per_row, student))
    dtypes = tuple(t.dtype for t in logits_of(form))
    chosen = _backend(request, student.device, student.dtype, dtypes)
    result = chosen.run(
        student, form, labels, weight, r.options, r.terms, want_grad, False, per_row
    )
    nothing = student.new_empty(0, dtype=accumulation_dtype(student.dtype))
    rate = nothing
    if r.learned and r.options.alpha > 0:
        call = Call(form, labels, weight, r.options, chosen, False, False, per_row)
        rate = rate_of(per_row["temperature"], student, call)
    scale = result.grad_scale
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=nothing.dtype, device=student.device)
    return (
        result.loss,
        nothing if result.soft is None else result.soft,
        nothing.clone() if result.hard is None else result.hard,
        torch.stack(result.metrics) if result.metrics else nothing.clone(),
        student.new_empty(0) if result.grad is None else result.grad,
        scale.to(nothing.dtype),
        rate.clone() if rate is nothing else rate,
    )


@_loss.register_fake
def _(
    student: Tensor,
    teacher: Sequence[Tensor],
    labels: Tensor | None,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    request: str,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r = _decode(request)
    form, per_row = r.teacher(teacher), dict(zip(r.names, tensors, strict=True))
    check_tensors(student, form, labels, weight, r.options, per_row, look=False)
    dtype = accumulation_dtype(student.dtype)
    shape = student.shape[:-1] if r.options.reduction == "none" else ()
    of_terms, none = shape if r.terms else (0,), student.new_empty(0, dtype=dtype)
    learned = r.learned and r.options.alpha > 0
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty(of_terms, dtype=dtype),
        student.new_empty(of_terms, dtype=dtype),
        student.new_empty((4, *shape) if r.options.metrics else (0,), dtype=dtype),
        student.new_empty(student.shape if want_grad else (0,)),
        student.new_empty((), dtype=dtype),
        student.new_empty(student.shape[:-1], dtype=torch.float64) if learned else none,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, teacher, _, _, tensors, request, ctx.want_grad = inputs
    ctx.request, ctx.teachers, ctx.shapes = request, len(teacher), [t.shape for t in tensors]
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])


def _check_is_possible(ctx: Any) -> None:
    """What the saved gradient knows nothing of must not come out as none."""
    if torch.is_grad_enabled():
        raise RuntimeError("no second derivative (create_graph=True) of a loss that was compiled")
    if ctx.needs_input_grad[0] and not ctx.want_grad:
        raise RuntimeError(
            "no gradient: the loss was compiled or exported with student_logits that need none"
        )


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    factor = factor.unsqueeze(-1) if factor.dim() else factor
    # 0 * inf: what has no gradient, such as an ignored row, has none whatever comes in.
    return torch.where(grad == 0, 0.0, grad * factor).to(grad.dtype)


def _scaled(ctx: Any, incoming: Tensor, *_: Any) -> tuple[Any, ...]:
    _check_is_possible(ctx)
    grad, scale, rate = ctx.saved_tensors
    of_student, r = None, _decode(ctx.request)
    of_tensors: list[Tensor | None] = [None] * len(r.names)
    if ctx.want_grad:
        of_student = _times(grad, incoming / scale)
    if r.learned and r.options.alpha > 0:
        of_row, at = incoming * rate, r.names.index("temperature")
        of_tensors[at] = of_row if ctx.shapes[at] else of_row.sum()
    return of_student, [None] * ctx.teachers, None, None, of_tensors, None, None


_loss.register_autograd(_scaled, setup_context=_keep)


# The same of what is asked for most: no lists, no terms. With torch.library.custom_op it would take
# a third more of a small batch's time.
torch.library.define(
    "kdkernels::plain_loss",
    "(Tensor student, Tensor teacher, Tensor? labels, str request, bool want_grad) "
    "-> (Tensor, Tensor)",
)


def run_plain_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, request: str, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    options, backend, *_ = _decode(request)
    chosen: Backend = PLAIN_CPU
    plain = backend in (None, "cpu") and not _is_special(options)
    if not (plain and PLAIN_CPU.serves(student, teacher, labels)):
        check_tensors(student, teacher, labels, None, options, {})
        chosen = _backend(request, student.device, student.dtype, (teacher.dtype,))
    loss, _, _, grad, *_ = chosen.run(
        student, teacher, labels, None, options, False, want_grad, False, {}
    )
    return loss, student.new_empty(0) if grad is None else grad


torch.library.impl("kdkernels::plain_loss", "CompositeExplicitAutograd", run_plain_loss)


@torch.library.register_fake("kdkernels::plain_loss")  # type: ignore[untyped-decorator]
def _(
    student: Tensor, teacher: Tensor, labels: Tensor | None, request: str, want_grad: bool
) -> tuple[Tensor, Tensor]:
    options = _decode(request).options
    check_tensors(student, teacher, labels, None, options, {}, look=False)
    shape = student.shape[:-1] if options.reduction == "none" else ()
    loss = student.new_empty(shape, dtype=accumulation_dtype(student.dtype))
    return loss, student.new_empty(student.shape if want_grad else (0,))


class _PlainLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            loss, grad = _plain_loss(*arguments)
        ctx.want_grad = arguments[4]
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(grad)
        return loss, grad

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        _check_is_possible(ctx)
        (grad,) = ctx.saved_tensors
        return _times(grad, incoming), None, None, None, None


def _differentiate(
    student: Tensor, teacher: Tensor, labels: Tensor | None, request: str, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """What torch.library.register_autograd makes of a gradient, and a short way for a compiled
    graph: there nothing is tracked nor traced, and a second trip through the dispatcher would take
    as long as the loss of a small batch."""
    if torch.is_grad_enabled() and student.requires_grad:
        return _PlainLoss.apply(student, teacher, labels, request, want_grad)  # type: ignore[no-any-return]
    if type(student) is Tensor and torch._C._len_torch_dispatch_stack() == 0:
        return run_plain_loss(student, teacher, labels, request, want_grad)
    with torch._C._AutoDispatchBelowAutograd():
        return _plain_loss(student, teacher, labels, request, want_grad)  # type: ignore[no-any-return]


torch.library.impl("kdkernels::plain_loss", "Autograd", _differentiate)
_plain_loss = torch.ops.kdkernels.plain_loss.default


@torch.library.custom_op("kdkernels::intra_class", mutates_args=())
def _intra_class(
    student: Tensor, teacher: Tensor, active: Tensor, request: str, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """DIST's part across the batch, by the CPU's kernel, and its gradient."""
    call = IntraClass(teacher, None, _decode(request).options, {})
    value, grad = compiled(student, call, active, want_grad)
    return value, value.new_empty(0) if grad is None else grad


@_intra_class.register_fake
def _(
    student: Tensor, teacher: Tensor, active: Tensor, request: str, want_grad: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student.dtype)
    shape = student.shape if want_grad else (0,)
    return student.new_empty((), dtype=dtype), student.new_empty(shape, dtype=dtype)


def _keep_columns(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype, ctx.want_grad = inputs[0].dtype, inputs[4]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _scaled_columns(ctx: Any, incoming: Tensor, _: Any) -> tuple[Any, ...]:
    _check_is_possible(ctx)
    (grad,) = ctx.saved_tensors
    return (grad * incoming).to(ctx.dtype), None, None, None, None


_intra_class.register_autograd(_scaled_columns, setup_context=_keep_columns)


# ---- what is traced ------------------------------------------------------------------------------


def _number(value: Any) -> Any:
    """A number that changed between calls is a symbol to the compiler: what groupby has compared is
    a number again, and the graph is one for that number."""
    if isinstance(value, (tuple, list)):
        return tuple([_number(each) for each in value])
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return next(iter(itertools.groupby((value,))))[0]
    return value


@traced_as_constant
def _request(given: tuple[Any, ...], *others: Any) -> str:
    options, _, _, _, _, return_terms, backend = prepare(dict(given))
    return _encode(Request(options, backend, bool(return_terms), *others))


@traced_as_constant
def _terms(request: str) -> bool:
    return _decode(request).terms


@traced_as_constant
def _options(request: str) -> Options:
    return _decode(request).options


@traced_as_constant
def _served_by(request: str, *kinds: Any) -> tuple[bool, bool]:
    """Whether the reference serves, and whether the CPU's kernels do."""
    chosen = _backend(request, *kinds)
    return chosen.name == "reference", isinstance(chosen, CPUBackend)


def _by_operator(
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    weight: Tensor | None,
    tensors: PerRow,
    request: str,
    want_grad: bool,
) -> KDTerms | KDMetrics:
    plain = weight is None and not tensors and not _terms(request) and isinstance(teacher, Tensor)
    if plain and student.dtype != torch.float16:  # whose gradient comes with a scale
        loss, _ = _plain_loss(student, teacher, labels, request, want_grad)
        return KDTerms(loss, loss, loss)
    of_teacher, of_options = list(tensors_of(teacher)), list(tensors.values())
    loss, soft, hard, metrics, *_ = _loss(
        student, of_teacher, labels, weight, of_options, request, want_grad
    )
    terms = KDTerms(loss, soft.detach(), hard.detach())
    return KDMetrics(*terms, *metrics.detach().unbind(0)) if _options(request).metrics else terms


def _check_transformed(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise RuntimeError(
            f"backend {backend!r} cannot run: torch.func transforms the reference alone"
        )


def traced_loss(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    num_items: Any,
    group: Any,
    given: dict[str, Any],
) -> Tensor | KDTerms | KDMetrics:
    """:func:`kdkernels.kd_loss` where nothing may depend on a value.

    A compiler gets the operator. A transform of torch.func gets the reference, which it can look
    into and differentiate as often as it likes.
    """
    if given["inplace"]:
        raise RuntimeError("inplace=True can be neither compiled nor transformed by torch.func")
    transformed = not torch.compiler.is_compiling()
    tensors: PerRow = split_tensors(given)
    if sample_weight is not None:
        tensors = {**tensors, "sample_weight": sample_weight}
    teacher = form_of(teacher, student)
    form, form_temperature = "several" if isinstance(teacher, tuple) else "one", 1.0
    if isinstance(teacher, TopKTeacher):
        form, form_temperature = teacher.tail, float(teacher.temperature)
    tracked = torch.is_grad_enabled()
    want_grad = tracked and student.requires_grad
    learned = tracked and is_learned(tensors)
    items = tuple([(name, _number(value)) for name, value in given.items()])
    names = tuple(tensors) if num_items is None and group is None else (*tensors, "num_items")
    request = _request(items, names, form, _number(form_temperature), learned)
    options = _options(request)
    dtypes = tuple([t.dtype for t in logits_of(teacher)])
    by_reference, by_cpu = _served_by(request, student.device, student.dtype, dtypes)
    if transformed:
        _check_transformed(given["backend"])
        check_tensors(student, teacher, labels, weight, options, tensors, look=False)
        by_reference, by_cpu = True, False
    if num_items is not None or group is not None:
        tensors = with_items(tensors, num_items, group, student, labels, weight, options)
    if by_reference:
        result: Any = kd_terms(
            student, teacher, labels, options, weight, one_per_row(tensors, student)
        )
    else:
        result = _by_operator(student, teacher, labels, weight, tensors, request, want_grad)
    if not given["return_terms"]:
        result = result.loss
    if options.intra_class > 0 and options.alpha > 0:
        call = IntraClass(teacher, labels, options, tensors)
        if by_cpu and call.is_plain(student):
            added, _ = _intra_class(student, teacher, call.active(student), request, want_grad)
        else:
            added = call.by_autograd(student)
        result = with_added(result, added, options)
    return result  # type: ignore[no-any-return]


def _let_programs_be_saved() -> None:
    """torch.export.save refuses named tuples among the outputs that it has not been told of."""
    for named in (KDTerms, KDMetrics):
        register = getattr(torch.utils._pytree, "_register_namedtuple", None)
        if register is not None:  # which torch has no public name for
            register(named, serialized_type_name=f"kdkernels.{named.__name__}")


_let_programs_be_saved()
