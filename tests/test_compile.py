"""torch.compile and torch.export: one graph without a break, and the values of an eager call."""

import math

import pytest
import torch
from test_numerics import inputs
from torch import nn

from kdkernels import FusedKDLoss, TopKTeacher, kd_loss, operators
from kdkernels.modules import _DEFAULTS
from kdkernels.options import OPTION_NAMES

USUAL = {name: _DEFAULTS[name] for name in OPTION_NAMES}
pytestmark = pytest.mark.filterwarnings("ignore:kdkernels uses the slower reference")
ROWS, CLASSES = 6, 33


@pytest.fixture(autouse=True)
def start_anew():
    torch._dynamo.reset()


def value_and_grads(loss_fn, s, *others):
    """Loss, other terms and the gradient of the logits."""
    x = s.clone().requires_grad_()
    result = loss_fn(x, *others)
    terms = [result] if isinstance(result, torch.Tensor) else list(result)
    (grad,) = torch.autograd.grad(terms[0].sum(), x)
    assert not any(term.requires_grad for term in terms[1:])
    return [*(term.detach() for term in terms), grad]


def assert_as_eager(loss_fn, *arguments, backend="aot_eager", **compiling):
    compiled = torch.compile(loss_fn, fullgraph=True, backend=backend, **compiling)
    got, expected = value_and_grads(compiled, *arguments), value_and_grads(loss_fn, *arguments)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


OPTIONS = [
    {},
    {"temperature": 2.5, "alpha": 0.3, "label_smoothing": 0.1, "reduction": "sum"},
    {"weight": torch.linspace(0.5, 1.5, CLASSES), "reduction": "none"},
    {"return_terms": True},
    {"return_terms": "metrics"},
    {"return_terms": "metrics", "reduction": "none"},
    {"divergence": "jsd", "beta": torch.linspace(0, 1, ROWS)},
    {"divergence": {"forward_kl": 0.5, "reverse_kl": torch.linspace(0, 1, ROWS)}},
    {"divergence": "dkd", "dkd_beta": 2.0},
    {"divergence": "dist", "reduction": "sum"},
    {"divergence": "dist", "logit_scale": 0.5},
    {"divergence": "nkd", "return_terms": True},
    {"standardize": True, "z_loss": 1e-3},
    {"temperature": [1.0, 2.0, 4.0], "temperature_reduction": "sum"},
    {"temperature": torch.linspace(1, 4, ROWS)},
    {"logit_bias": (None, torch.linspace(0, 1, CLASSES)), "logit_scale": [1.0, 0.5]},
    {"num_classes": 20, "logit_softcap": 9.0},
    {"taid": 0.5, "agreement": 0.1, "agreement_reduction": "sum"},
    {"backend": "reference"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: str(o)[:60])
def test_every_option_in_one_graph(options):
    s, t, y = inputs(ROWS, CLASSES)
    y = y.clamp(max=19)
    y[2] = -100
    assert_as_eager(lambda *logits: kd_loss(*logits, **options), s, t, y)
    sample_weight = torch.linspace(0, 2, ROWS)
    if options.get("divergence") != "dist":
        assert_as_eager(FusedKDLoss(**options), s, t, y, sample_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    s, t, y = inputs(ROWS, CLASSES, dtype=dtype)
    assert_as_eager(FusedKDLoss(), s, t, y)


def test_every_form_of_a_teacher():
    s, t, y = inputs(ROWS, CLASSES)
    other = t.flip(0)
    assert_as_eager(
        lambda s, t, u, y: kd_loss(s, [t, u], y, teacher_weights=[1, 2]), s, t, other, y
    )
    assert_as_eager(FusedKDLoss(), s, torch.stack((t, other)), y)
    for tail in ("renormalize", "bucket", "zero"):
        k = TopKTeacher.from_logits(t, 5, tail, 2.0)

        def loss_fn(s, values, indices, y, tail=tail):
            return kd_loss(s, TopKTeacher(values, indices, tail, 2.0), y, temperature=2.0)

        assert_as_eager(loss_fn, s, k.values, k.indices, y)
    assert_as_eager(lambda s, t: kd_loss(s, t, alpha=1.0), s, t)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)
        self.loss_fn = FusedKDLoss(temperature=2.0)

    def forward(self, x, y):
        with torch.no_grad():
            teacher = self.teacher(x)
        return self.loss_fn(self.student(x), teacher, y)


def test_a_training_step_has_no_break_and_new_sizes_do_not_compile_again():
    model, frames = Model(), []

    def counting(graph, example):
        frames.append(graph)
        return graph.forward

    step = torch.compile(model, backend=counting, dynamic=True, fullgraph=True)
    for rows in (4, 9, 16):
        x, y = torch.randn(rows, 8), torch.randint(CLASSES, (rows,))
        torch.testing.assert_close(step(x, y), model(x, y))
    assert len(frames) == 1
    explained = torch._dynamo.explain(model)(torch.randn(4, 8), torch.randint(CLASSES, (4,)))
    assert explained.graph_break_count == 0


def test_by_inductor_with_dynamic_shapes():
    model = Model()
    step = torch.compile(model, dynamic=True, fullgraph=True)
    for rows in (4, 7):
        x, y = torch.randn(rows, 8), torch.randint(CLASSES, (rows,))
        grads = []
        for one in (step, model):
            model.zero_grad()
            (3 * one(x, y)).backward()
            grads.append(model.student.weight.grad)
        torch.testing.assert_close(*grads)


def test_an_option_that_changes_is_seen():
    s, t, y = inputs(ROWS, CLASSES)
    loss_fn = FusedKDLoss()
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    for temperature in (4.0, 2.0):
        loss_fn.temperature = temperature
        torch.testing.assert_close(compiled(s, t, y), kd_loss(s, t, y, temperature=temperature))


def test_a_learned_temperature():
    s, t, y = inputs(ROWS, CLASSES)
    for first in (torch.tensor(2.0), torch.linspace(1, 4, ROWS)):
        rates = []
        for compiling in (True, False):
            T = first.clone().requires_grad_()

            def loss_fn(s, t, y, T):
                return kd_loss(s, t, y, temperature=T)

            one = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
            (one if compiling else loss_fn)(s, t, y, T).backward()
            rates.append(T.grad)
        torch.testing.assert_close(*rates)


def test_under_autocast_half_logits_are_taken_as_they_are():
    """The graph holds no copy of them in float32."""
    model, graphs = Model(), []

    def looking(graph, example):
        graphs.append(graph)
        return graph.forward

    x, y = torch.randn(4, 8), torch.randint(CLASSES, (4,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(model, backend=looking, fullgraph=True)(x, y)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, model(x, y))
    (node,) = [
        n for n in graphs[0].graph.nodes if n.target is torch.ops.kdkernels.plain_loss.default
    ]
    values = [argument.meta["example_value"] for argument in node.args[:2]]
    assert [value.dtype for value in values] == [torch.bfloat16] * 2


def test_checkpointed_activations():
    """The logits are computed again for the backward."""
    model = Model()
    x, y = torch.randn(4, 8), torch.randint(CLASSES, (4,))

    def step(x, y):
        return torch.utils.checkpoint.checkpoint(model, x, y, use_reentrant=False)

    grads = []
    for one in (torch.compile(step, backend="aot_eager", fullgraph=True), step, model):
        model.zero_grad()
        one(x, y).backward()
        grads.append(model.student.weight.grad)
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[2])


@pytest.mark.parametrize("options", [{}, {"divergence": "dist"}, {"temperature": [1.0, 2.0]}])
def test_an_exported_program_computes_the_loss(options, tmp_path):
    loss_fn = FusedKDLoss(return_terms=True, **options)
    s, t, y = inputs(ROWS, CLASSES)
    rows = torch.export.Dim("rows", min=2)
    shapes = {"student_logits": {0: rows}, "teacher_logits": {0: rows}, "labels": {0: rows}}
    shapes["sample_weight"] = None
    program = torch.export.export(loss_fn, (s, t, y, None), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    for n in (ROWS, 11):
        s, t, y = inputs(n, CLASSES)
        for got, expected in zip(loaded(s, t, y, None), loss_fn(s, t, y), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_program_says_which_derivatives_it_has_not():
    s, t, y = inputs(ROWS, CLASSES)
    x = s.clone().requires_grad_()
    for options in ({}, {"divergence": "dist"}):
        loss_fn = FusedKDLoss(**options)
        program = torch.export.export(loss_fn, (x, t, y)).module()
        (grad,) = torch.autograd.grad(program(x, t, y), x)
        torch.testing.assert_close(grad, torch.autograd.grad(loss_fn(x, t, y), x)[0])
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(program(x, t, y), x, create_graph=True)
        without = torch.export.export(loss_fn, (s, t, y)).module()
        with pytest.raises(RuntimeError, match="with student_logits that need none"):
            torch.autograd.grad(without(x, t, y), x)


def test_ignored_rows_that_hold_nan_have_no_gradient_whatever_comes_in():
    s, t, y = inputs(ROWS, CLASSES)
    y[1], s[1] = -100, math.nan
    compiled = torch.compile(kd_loss, backend="aot_eager", fullgraph=True)
    x = s.clone().requires_grad_()
    (compiled(x, t, y) * math.inf).backward()
    assert x.grad[1].eq(0).all()


WRONG = [
    (lambda s, t, y: kd_loss(s, t, y, temperature=-1.0), "temperature must be"),
    (lambda s, t, y: kd_loss(s, t[:, :5], y), "teacher_logits must have the shape"),
    (lambda s, t, y: kd_loss(s, t, y.float()), "labels must be integers"),
    (lambda s, t, y: kd_loss(s, t, y, inplace=True), "inplace=True can be neither compiled"),
    (lambda s, t, y: kd_loss(s, t, y, backend="cuda"), "backend 'cuda' cannot run"),
    (lambda s, t, y: kd_loss(s, t), "labels are missing"),
]


@pytest.mark.parametrize(("loss_fn", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_is_wrong_is_named(loss_fn, message):
    s, t, y = inputs(ROWS, CLASSES)
    with pytest.raises(Exception, match=message):
        torch.compile(loss_fn, backend="aot_eager", fullgraph=True)(s, t, y)


def test_a_label_out_of_range_raises_when_the_graph_runs():
    s, t, y = inputs(ROWS, CLASSES)
    compiled = torch.compile(kd_loss, backend="aot_eager", fullgraph=True)
    compiled(s, t, y)
    y[3] = CLASSES
    with pytest.raises(IndexError, match=r"labels\[3\] is 33"):
        compiled(s, t, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learned", [False, True])
def test_the_operator_keeps_its_word(reduction, learned):
    """Its schema, its shapes without values, its gradient: what PyTorch checks of an operator."""
    s, t, y = inputs(ROWS, CLASSES)
    T = torch.linspace(1, 4, ROWS).requires_grad_(learned)
    options = {"reduction": reduction, "alpha": 0.9, "temperature": 1.0, "return_terms": True}
    given = USUAL | options
    text = operators._request(tuple(given.items()), ("temperature",), "one", 1.0, learned)
    arguments = (s.requires_grad_(), [t], y, None, [T], text, True)
    torch.library.opcheck(operators._loss, arguments)
    text = operators._request(
        tuple((USUAL | {"reduction": reduction}).items()), (), "one", 1.0, False
    )
    torch.library.opcheck(operators._plain_loss, (s, t, y, text, True))
    given |= {"divergence": "dist", "reduction": "mean"}
    dist = operators._request(tuple(given.items()), (), "one", 1.0, False)
    torch.library.opcheck(operators._intra_class, (s, t, y != 3, dist, True))
