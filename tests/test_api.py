"""The promises of ``kd_loss``, ``FusedKDLoss`` and ``kdkernels info`` to whoever calls them."""

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle

import kdkernels
from kdkernels import FusedKDLoss, KDTerms, backends, kd_loss
from kdkernels.__main__ import main
from kdkernels.backends import cpu

DEFAULTS = {
    "temperature": None,
    "alpha": 0.9,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "weight": None,
    "reduction": "mean",
    "distill_ignored": False,
    "inplace": False,
    "return_terms": False,
    "backend": None,
    "divergence": "forward_kl",
    "beta": 0.5,
    "skew": 0.1,
    "divergence_alpha": 0.5,
    "dkd_alpha": 1.0,
    "dkd_beta": 8.0,
    "nkd_gamma": 1.5,
    "wsld_alpha": 2.25,
    "dist_beta": 1.0,
    "dist_gamma": 1.0,
    "teacher_temperature": None,
    "temperature_reduction": "mean",
    "scale_by_t2": True,
    "standardize": False,
    "taid": None,
    "agreement": 0.0,
    "entropy_gap": 0.0,
    "agreement_reduction": None,
    "teacher_weights": None,
    "ensemble": "probs",
    "logit_softcap": None,
    "logit_scale": 1.0,
    "logit_bias": None,
    "z_loss": 0.0,
    "num_classes": None,
}
OF_CALLS = {"group": None, "shift": 0, "vocab_parallel": None}


pytestmark = pytest.mark.usefixtures("one_thread")


named_backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


def inputs(n=8, c=10, dtype=torch.float32, seed=0):
    """Logits, and labels of which some are -100 and some are 1."""
    generator = torch.Generator().manual_seed(seed)
    s, t = 3 * torch.randn(2, n, c, generator=generator)
    y = torch.randint(c, (n,), generator=generator)
    y[1::4], y[::4] = -100, 1
    return s.to(dtype), t.to(dtype), y


def weights(c=10):
    return torch.rand(c, generator=torch.Generator().manual_seed(9)) + 0.5


def value_and_grad(loss_fn, s, t, y=None, **options):
    x = s.clone().requires_grad_()
    loss = loss_fn(x, t, y, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


def close(got, expected):
    return ((got.detach().double() - expected).abs() <= 2e-6 * (1 + expected.abs())).all()


def close_gradient(got, expected):
    return (got.double() - expected).norm() <= 2e-6 * expected.norm()


def test_the_signature_of_kd_loss():
    parameters = inspect.signature(kd_loss).parameters
    positional = {k: p.default for k, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
    keywords = {k: p.default for k, p in parameters.items() if p.kind == p.KEYWORD_ONLY}
    assert list(positional) == ["student_logits", "teacher_logits", "labels"]
    assert positional["labels"] is None
    assert positional["student_logits"] is positional["teacher_logits"] is inspect.Parameter.empty
    expected = DEFAULTS | {"sample_weight": None, "num_items": None} | OF_CALLS
    assert list(keywords.items()) == [*expected.items()]
    assert len(parameters) == len(positional) + len(keywords)


def test_the_module_takes_the_options_of_the_function():
    parameters = inspect.signature(FusedKDLoss).parameters
    assert {name: p.default for name, p in parameters.items()} == DEFAULTS | OF_CALLS
    forward = inspect.signature(FusedKDLoss().forward).parameters
    logits = ["student_logits", "teacher_logits", "labels"]
    assert list(forward) == [*logits, "sample_weight", "num_items"]
    module = FusedKDLoss()
    expected = DEFAULTS | {"temperature": 4.0}
    assert {name: getattr(module, name) for name in DEFAULTS} == expected
    assert FusedKDLoss(divergence="nkd").temperature == 1.0


def test_what_the_package_exports():
    assert set(kdkernels.__all__) == {
        "FusedKDLoss",
        "KDMetrics",
        "KDTerms",
        "TopKTeacher",
        "VocabParallel",
        "__version__",
        "empty_cache",
        "kd_loss",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", kdkernels.__version__)


# One change of each option that has another meaning than the default, on labels with -100 and 1.
CHANGES = {
    "temperature": 2.5,
    "alpha": 0.4,
    "ignore_index": 1,
    "label_smoothing": 0.2,
    "weight": weights(),
    "reduction": "sum",
    "distill_ignored": True,
}


@named_backends
@pytest.mark.parametrize("name", CHANGES)
def test_each_option_takes_effect_on_value_and_gradient(name, backend):
    """An option accepted and unused is a bug that nobody sees (Liger-Kernel #974)."""
    s, t, y = inputs(dtype=torch.float64)
    if name == "ignore_index":
        y[y == -100] = 2
    module = FusedKDLoss(backend=backend)
    before = value_and_grad(module, s, t, y)
    setattr(module, name, CHANGES[name])
    after = value_and_grad(module, s, t, y)
    loss, _, _, grad = oracle(s, t, y, **{name: CHANGES[name]})
    assert close(after[0], loss)
    assert close_gradient(after[1], grad)
    # The change is beyond what the bounds would let pass.
    assert not close(before[0], loss)
    assert not close_gradient(before[1], grad)
    # Made with the option, and as a function: the same bits as changed in passing.
    for loss_fn in (FusedKDLoss(backend=backend, **{name: CHANGES[name]}), module):
        for got, expected in zip(value_and_grad(loss_fn, s, t, y), after, strict=True):
            assert torch.equal(got, expected)
    for got, expected in zip(
        value_and_grad(kd_loss, s, t, y, backend=backend, **{name: CHANGES[name]}),
        after,
        strict=True,
    ):
        assert torch.equal(got, expected)
    # And back again: nothing is remembered.
    setattr(module, name, DEFAULTS[name])
    assert torch.equal(value_and_grad(module, s, t, y)[1], before[1])


def test_reduction_none_takes_effect():
    s, t, y = inputs()
    module = FusedKDLoss()
    assert module(s, t, y).shape == ()
    module.reduction = "none"
    assert module(s, t, y).shape == y.shape
    assert close(module(s, t, y), oracle(s, t, y, reduction="none")[0])


def test_return_terms_takes_effect():
    s, t, y = inputs()
    module = FusedKDLoss()
    assert type(module(s, t, y)) is torch.Tensor
    module.return_terms = True
    assert type(module(s, t, y)) is KDTerms


@named_backends
def test_inplace_takes_effect(backend):
    s, t, y = inputs()
    module = FusedKDLoss(backend=backend)
    _, grad = value_and_grad(module, s, t, y)
    x = s.clone().requires_grad_() * 1.0
    module(x, t, y)
    assert torch.equal(x, s)
    module.inplace = True
    module(x, t, y)
    assert torch.equal(x, grad)


@named_backends
@pytest.mark.parametrize("as_attribute", [False, True])
def test_the_named_backend_is_the_one_that_runs(backend, as_attribute, monkeypatch):
    ran = []
    for name, instance in (*backends.BACKENDS.items(), ("cpu", backends.PLAIN_CPU)):

        def run(*arguments, name=name, real=instance.run):
            ran.append(name)
            return real(*arguments)

        monkeypatch.setattr(instance, "run", run, raising=False)
    s, t, y = inputs()
    module = FusedKDLoss() if as_attribute else FusedKDLoss(backend=backend)
    if as_attribute:
        module.backend = backend
    module(s, t, y)
    kd_loss(s.requires_grad_(), t, y, backend=backend).backward()
    assert ran == [backend, backend]


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_module_and_function_give_the_same_bits(alpha):
    s, t, y = inputs()
    options = {
        "temperature": 1.7,
        "alpha": alpha,
        "ignore_index": 1,
        "label_smoothing": 0.1,
        "weight": weights(),
        "reduction": "none",
        "distill_ignored": True,
    }
    y[y == -100] = 3
    got = value_and_grad(FusedKDLoss(**options), s, t, y)
    for x, expected in zip(got, value_and_grad(kd_loss, s, t, y, **options), strict=True):
        assert torch.equal(x, expected)


def test_a_schedule_of_more_temperatures_than_any_cache_holds():
    s, t, y = inputs(2, 5, torch.float64)
    module = FusedKDLoss()
    for step in range(300):
        module.temperature = 8.0 / (1 + 0.01 * step)
        assert close(module(s, t, y), oracle(s, t, y, temperature=module.temperature)[0])


def test_repr_shows_the_usual_options_and_those_that_were_changed():
    assert repr(FusedKDLoss()) == "FusedKDLoss(temperature=4.0, alpha=0.9, reduction='mean')"
    module = FusedKDLoss(2.0, 0.5, label_smoothing=0.1, backend="cpu")
    module.reduction = "sum"
    module.distill_ignored = True
    module.ignore_index = 7
    text = repr(module)
    for shown in (
        "temperature=2.0",
        "alpha=0.5",
        "label_smoothing=0.1",
        "reduction='sum'",
        "ignore_index=7",
        "distill_ignored=True",
        "backend='cpu'",
    ):
        assert shown in text
    assert "inplace" not in text
    assert "FusedKDLoss(temperature=2.0" in repr(torch.nn.Sequential(module))


def test_the_weight_is_a_buffer():
    w = weights()
    module = FusedKDLoss(weight=w)
    assert dict(module.named_buffers())["weight"] is w
    assert not list(module.parameters())
    assert list(module.state_dict()) == ["weight"]
    assert not FusedKDLoss().state_dict()  # as nn.CrossEntropyLoss has it
    other = FusedKDLoss(weight=torch.ones(10))
    other.load_state_dict(module.state_dict())
    s, t, y = inputs()
    assert torch.equal(other(s, t, y), module(s, t, y))
    assert close(other(s, t, y), oracle(s, t, y, weight=w)[0])


def test_the_weight_follows_the_module_to_a_dtype_and_a_device():
    module = FusedKDLoss(weight=weights())
    assert module.to(torch.float64).weight.dtype == torch.float64
    assert module.half().weight.dtype == torch.float16
    s, t, y = inputs()
    assert close(module(s, t, y), oracle(s, t, y, weight=weights().half())[0])
    assert module.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(copied):
    module = FusedKDLoss(3.0, 0.5, 1, 0.1, weights(), "none", True, False, True, "cpu")
    module.eval()
    other = copied(module)
    assert vars(other).keys() == vars(module).keys()
    for name in DEFAULTS.keys() - {"weight"}:
        assert getattr(other, name) == getattr(module, name)
    s, t, y = inputs()
    y[y == -100] = 3
    for got, expected in zip(other(s, t, y), module(s, t, y), strict=True):
        assert torch.equal(got, expected)
    other.weight.zero_()
    other.temperature = 9.0
    assert torch.equal(module.weight, weights())
    assert module.temperature == 3.0


def test_a_module_can_be_saved_and_loaded():
    module = FusedKDLoss(3.0, weight=weights())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    s, t, y = inputs()
    assert torch.equal(torch.load(file, weights_only=False)(s, t, y), module(s, t, y))


def test_train_and_eval_are_the_same_loss():
    s, t, y = inputs()
    module = FusedKDLoss()
    assert torch.equal(module.train()(s, t, y), module.eval()(s, t, y))


@named_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 1, 255])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_alpha_0_is_torchs_cross_entropy(
    backend, reduction, ignore_index, label_smoothing, weighted
):
    s, t, y = inputs(dtype=torch.float64)
    y[y == -100] = ignore_index
    weight = weights().double() if weighted else None
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "weight": weight,
        "reduction": reduction,
    }
    x = s.clone().requires_grad_()
    expected = F.cross_entropy(x, y, **options)
    expected.sum().backward()
    loss, grad = value_and_grad(kd_loss, s, t, y, alpha=0.0, backend=backend, **options)
    assert loss.shape == expected.shape
    assert close(loss, expected.detach())
    assert close_gradient(grad, x.grad)
    # float32 against the same truth, its logits having been float32 all along
    if backend == "cpu":
        loss, grad = value_and_grad(kd_loss, s.float(), t.float(), y, alpha=0.0, **options)
        assert close(loss, expected.detach())
        assert close_gradient(grad, x.grad)


@named_backends
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
def test_alpha_1_is_the_batch_mean_of_torchs_divergence_times_t_squared(backend, temperature):
    """'batchmean', not 'mean', which divides by C as well (deit #61); T² (keras-io #869)."""
    s, t, _ = inputs(dtype=torch.float64)
    log_q = F.log_softmax(s / temperature, dim=-1)
    p = F.softmax(t / temperature, dim=-1)
    expected = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    loss = kd_loss(s, t, alpha=1.0, temperature=temperature, backend=backend)
    assert close(loss, expected)
    assert not close(loss, F.kl_div(log_q, p, reduction="none").mean() * temperature**2)
    if temperature != 1:
        assert not close(loss, expected / temperature**2)
    # The teacher's distribution weighs the logarithms, not the student's.
    assert not close(kd_loss(t, s, alpha=1.0, temperature=temperature, backend=backend), expected)
    rows = kd_loss(s, t, alpha=1.0, temperature=temperature, reduction="none", backend=backend)
    assert close(rows, F.kl_div(log_q, p, reduction="none").sum(-1) * temperature**2)


@named_backends
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_return_terms_is_a_named_tuple_whose_terms_are_detached(backend, alpha, reduction):
    s, t, y = inputs()
    options = {"alpha": alpha, "reduction": reduction, "backend": backend}
    s.requires_grad_()
    terms = kd_loss(s, t, y, return_terms=True, **options)
    assert isinstance(terms, KDTerms)
    assert terms._fields == ("loss", "soft", "hard")
    assert terms.loss.requires_grad
    assert not terms.soft.requires_grad
    assert not terms.hard.requires_grad
    assert terms.soft.shape == terms.hard.shape == terms.loss.shape
    # Both terms are told even where one has no share in the loss.
    expected = oracle(s, t, y, alpha=alpha, reduction=reduction)
    if backend == "cpu":
        for got, want in zip(terms, expected[:3], strict=True):
            assert close(got, want)
    assert close(terms.loss, (alpha * terms.soft + (1 - alpha) * terms.hard).double())
    # Asking for the terms changes not one bit of the loss or of its gradient.
    plain, grad = value_and_grad(kd_loss, s.detach(), t, y, **options)
    assert torch.equal(plain, terms.loss)
    terms.loss.sum().backward()
    assert torch.equal(s.grad, grad)


@named_backends
def test_without_labels_the_hard_term_is_zero_and_every_row_counts(backend):
    s, t, _ = inputs(dtype=torch.float64)
    for reduction in ("mean", "none"):
        terms = kd_loss(s, t, alpha=1.0, return_terms=True, reduction=reduction, backend=backend)
        assert close(terms.loss, oracle(s, t, alpha=1.0, reduction=reduction)[0])
        assert torch.equal(terms.loss, terms.soft)
        assert (terms.hard == 0).all()


@named_backends
@pytest.mark.parametrize(
    "teacher_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_is_float32_and_float64_for_a_float64_student(backend, dtype, teacher_dtype):
    s, t, y = inputs(dtype=dtype)
    x = s.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        terms = kd_loss(
            x,
            t.to(teacher_dtype),
            y,
            weight=weights().double(),
            reduction=reduction,
            return_terms=True,
            backend=backend,
        )
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert [v.dtype for v in terms] == [expected] * 3
        terms.loss.sum().backward()
        assert x.grad.dtype == dtype


@named_backends
@pytest.mark.parametrize("student_needs_grad", [False, True])
def test_no_gradient_flows_to_the_teacher(backend, student_needs_grad):
    s, t, y = inputs()
    teacher = torch.nn.Linear(10, 10)
    logits = teacher(t)
    logits.retain_grad()
    s.requires_grad_(student_needs_grad)
    loss = kd_loss(s, logits, y, backend=backend)
    assert loss.requires_grad == student_needs_grad
    if student_needs_grad:
        loss.backward()
        assert s.grad is not None
    assert logits.grad is None
    assert teacher.weight.grad is None


@named_backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_grad_and_inference_mode_give_the_value_alone(backend, mode, inplace):
    s, t, y = inputs()
    x = s.clone().requires_grad_() * 1.0
    expected = kd_loss(x, t, y, backend=backend)
    with mode():
        terms = kd_loss(x, t, y, backend=backend, return_terms=True, inplace=inplace)
        made_here = (x * 1.0, t * 1.0, y.clone())
        assert torch.equal(kd_loss(*made_here, backend=backend, inplace=inplace), expected)
    assert torch.equal(terms.loss, expected)
    assert not terms.loss.requires_grad
    assert torch.equal(x, s)  # nothing asked for a gradient: there is none to write in place
    assert torch.equal(made_here[0], s)


@named_backends
@pytest.mark.parametrize("inplace", [False, True])
def test_the_teacher_may_come_from_inference_mode(backend, inplace):
    """PyTorch's own softmax(t / T), kl_div and cross_entropy take such a teacher."""
    s, t, y = inputs()
    expected = value_and_grad(kd_loss, s, t, y, backend=backend)
    with torch.inference_mode():
        teacher_logits = t.clone()
    x = s.clone().requires_grad_()
    loss = kd_loss(x * 1.0, teacher_logits, y, inplace=inplace, backend=backend)
    loss.backward()
    assert torch.equal(loss, expected[0])
    assert torch.equal(x.grad, expected[1])


@named_backends
def test_the_default_label_of_ignored_rows_is_minus_100(backend):
    s, t, y = inputs(dtype=torch.float64)
    assert (y == -100).any()
    kept = y != -100
    loss, grad = value_and_grad(kd_loss, s, t, y, backend=backend)
    expected = oracle(s[kept], t[kept], y[kept])
    assert close(loss, expected[0])
    assert close_gradient(grad[kept], expected[3])
    assert (grad[~kept] == 0).all()
    assert torch.equal(kd_loss(s, t, y, ignore_index=-100, backend=backend), loss)


@named_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distill_ignored_is_soft_on_all_rows_and_hard_on_the_labelled(backend, reduction):
    s, t, y = inputs(dtype=torch.float64)
    kept = y != -100
    options = {"reduction": reduction, "backend": backend, "return_terms": True}
    terms = kd_loss(s, t, y, distill_ignored=True, **options)
    soft_alone = kd_loss(s, t, alpha=1.0, **options)
    hard_alone = kd_loss(s[kept], t[kept], y[kept], alpha=0.0, **options)
    assert close(terms.soft, soft_alone.soft)
    hard = terms.hard[kept] if reduction == "none" else terms.hard
    assert close(hard, hard_alone.hard)
    assert close(terms.loss, 0.9 * terms.soft + 0.1 * terms.hard)
    if reduction == "none":
        assert (terms.hard[~kept] == 0).all()
        assert (terms.soft[~kept] > 0).all()
    else:
        assert not close(terms.soft, kd_loss(s, t, y, **options).soft)


@named_backends
def test_a_batch_without_labels_is_still_distilled_if_asked(backend):
    s, t, y = inputs(dtype=torch.float64)
    y[:] = -100
    loss, grad = value_and_grad(kd_loss, s, t, y, distill_ignored=True, backend=backend)
    soft, soft_grad = value_and_grad(kd_loss, s, t, alpha=1.0, backend=backend)
    assert close(loss, 0.9 * soft)
    assert close_gradient(grad, 0.9 * soft_grad)


@named_backends
def test_each_term_is_a_mean_over_its_own_rows(backend):
    """KL over the rows that count, the cross entropy over their weights: no count is shared."""
    s, t, y = inputs(dtype=torch.float64)
    w = weights().double()
    kept = y != -100
    rows = kd_loss(s, t, y, weight=w, reduction="none", return_terms=True, backend=backend)
    for distill_ignored, count in ((False, int(kept.sum())), (True, len(y))):
        options = {"weight": w, "distill_ignored": distill_ignored, "backend": backend}
        terms = kd_loss(s, t, y, return_terms=True, **options)
        rows = kd_loss(s, t, y, return_terms=True, reduction="none", **options)
        assert count != w[y[kept]].sum()
        assert close(terms.soft, rows.soft.sum() / count)
        assert close(terms.hard, rows.hard.sum() / w[y[kept]].sum())
        sums = kd_loss(s, t, y, return_terms=True, reduction="sum", **options)
        assert close(sums.soft, rows.soft.sum())
        assert close(sums.hard, rows.hard.sum())


def test_options_may_be_ints_and_numpy_scalars():
    numpy = pytest.importorskip("numpy")
    s, t, y = inputs()
    y[y == -100] = 2
    expected = kd_loss(s, t, y, temperature=2.0, alpha=1.0, ignore_index=1)
    assert torch.equal(kd_loss(s, t, y, temperature=2, alpha=1, ignore_index=1), expected)
    got = kd_loss(
        s,
        t,
        y,
        temperature=numpy.float32(2),
        alpha=numpy.float64(1),
        ignore_index=numpy.int64(1),
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_none_picks_the_compiled_backend_for_cpu_tensors(dtype):
    assert backends.select(None, torch.device("cpu"), dtype, torch.float32).name == "cpu"
    assert backends.select(None, torch.device("cpu"), torch.float32, dtype).name == "cpu"
    assert backends.select("reference", torch.device("cpu"), dtype, dtype).name == "reference"


def test_other_devices_are_served_by_the_reference():
    s, t, y = (x.to("meta") for x in inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing: there is no kernel to be had
        loss = kd_loss(s.requires_grad_(), t, y)
    assert loss.device.type == "meta"
    assert loss.shape == ()


def assert_is_a_report(text):
    heading, *lines = text.strip().splitlines()
    assert f"kdkernels {kdkernels.__version__}" in heading
    assert f"torch {torch.__version__}" in heading
    rows = [re.fullmatch(r"\s+(\w+)\s+(yes|no)\s+(\S.*)", line) for line in lines]
    assert all(rows), lines
    assert [row[1] for row in rows] == list(backends.NAMES)
    return {row[1]: (row[2], row[3]) for row in rows}


def test_info_prints_what_is_available(capsys):
    assert main(["info"]) == 0
    rows = assert_is_a_report(capsys.readouterr().out)
    assert rows["cpu"][0] == "yes"
    assert re.search("portable|avx2|avx512", rows["cpu"][1])
    assert rows["reference"][0] == "yes"


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def test_info_from_the_command_line():
    assert_is_a_report(python("-m", "kdkernels", "info").stdout)


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_import_error", "the file is not there", raising=False)
    backends.select.cache_clear()  # it remembers what could run
    yield
    backends.select.cache_clear()


@pytest.mark.usefixtures("not_compiled")
def test_info_says_why_a_backend_is_not_available(capsys):
    assert main(["info"]) == 0
    rows = assert_is_a_report(capsys.readouterr().out)
    assert rows["cpu"][0] == "no"
    assert re.search("not built|the file is not there", rows["cpu"][1])
    assert rows["reference"][0] == "yes"


@pytest.mark.usefixtures("not_compiled")
def test_the_fallback_to_the_reference_warns_once():
    s, t, y = inputs(dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="slower reference.*'cpu' cannot run") as caught:
        kd_loss(s, t, y)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the caller's line, not one of ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, grad = value_and_grad(kd_loss, s, t, y)
        FusedKDLoss()(s, t, y)
    expected = oracle(s, t, y)
    assert close(loss, expected[0])
    assert close_gradient(grad, expected[3])


@pytest.mark.usefixtures("not_compiled")
def test_no_warning_for_the_reference_by_name():
    s, t, y = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd_loss(s, t, y, backend="reference")


WITHOUT_THE_COMPILED_MODULE = """
import sys, warnings
sys.modules["kdkernels._cpu"] = None  # import kdkernels._cpu raises ImportError
import torch
from kdkernels import kd_loss
from kdkernels.__main__ import main
main(["info"])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        kd_loss(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
print("warnings:", *(w.message for w in caught), sep=" | ")
"""


def test_a_missing_module_is_reported_and_the_reference_serves():
    report, told = python("-c", WITHOUT_THE_COMPILED_MODULE).stdout.split("warnings: | ")
    assert assert_is_a_report(report)["cpu"][0] == "no"
    assert len(told.strip().split(" | ")) == 1
    assert re.search("slower reference.*'cpu' cannot run: .*(not built|import)", told)


@pytest.mark.parametrize("shape", [(4, 10), (4, 300_000)])
def test_the_default_device_is_not_that_of_the_logits(shape):
    """Set before the import, too, as scripts do: pointers of another device would be written to."""
    script = (
        "import torch; torch.set_default_device('meta'); import kdkernels\n"
        f"x, t = torch.ones(2, *{shape}, device='cpu').unbind()\n"
        "x = x.clone().requires_grad_()\n"
        "loss = kdkernels.kd_loss(x, t, alpha=1.0)\n"
        "(grad,) = torch.autograd.grad(loss, x, torch.ones((), device='cpu'))\n"
        "assert loss.device.type == grad.device.type == 'cpu' and loss == 0 and not grad.any()\n"
        "mixture = {'jsd': 1.0, 'hard': 0.5}\n"
        "several = {'divergence': mixture, 'temperature': [1.0, 2.0], 'agreement': 0.1}\n"
        "for backend in ('cpu', 'reference'):\n"
        "    options = {'alpha': 1.0, 'backend': backend, 'taid': 0.5, **several}\n"
        "    got = kdkernels.kd_loss(x, [t, t], return_terms='metrics', **options)\n"
        "    assert {v.device.type for v in got} == {'cpu'} and got.top1_agreement == 1, got"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
