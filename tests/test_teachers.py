"""Teachers that are not one tensor of logits, and logits that are more than they seem."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from formulas import backend, compare, everywhere, forward_kl, kl, sizes, truth
from test_numerics import inputs

from kdkernels import FusedKDLoss, TopKTeacher, kd_loss

INF = math.inf


# ---- k classes of a row --------------------------------------------------------------------------


def jsd(log_p, log_q):
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def total_variation(log_p, log_q):
    return (log_p.exp() - log_q.exp()).abs().sum() / 2


def skew_reverse_kl(log_p, log_q):
    return kl(log_q, (0.9 * log_p.exp() + 0.1 * log_q.exp()).log())


def renyi(log_p, log_q):
    return (log_p / 2 + log_q / 2).exp().sum().log() / -0.5


OF_LOGS = {
    "forward_kl": kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "skew_reverse_kl": skew_reverse_kl,
    "renyi": renyi,
}


TAKEN_AT = 1.5  # the temperature of log-probabilities that are brought to another


def of_top_k(divergence, tail, values, indices, T):
    """The divergence of a row over the classes that the tail leaves to it."""

    def row_loss(s, t, label, i):
        log_q, of_row = F.log_softmax(s / T, 0), values[i].double()
        inside = torch.zeros(len(s), dtype=torch.bool)
        inside[indices[i].long()] = True
        if tail == "renormalize":
            log_p = torch.full_like(log_q, -INF)
            log_p[indices[i].long()] = F.log_softmax(of_row * TAKEN_AT / T, 0)
            return T**2 * divergence(log_p, log_q)
        known = log_q[indices[i].long()]
        if tail == "zero" or inside.all():
            return T**2 * divergence(of_row, known)
        rest = torch.log1p(-of_row.exp().sum())
        both = (
            torch.cat((of_row, rest[None])),
            torch.cat((known, log_q[~inside].logsumexp(0)[None])),
        )
        return T**2 * divergence(*both)

    return row_loss


@everywhere
@sizes
@pytest.mark.parametrize("tail", ["renormalize", "bucket", "zero"])
def test_top_k(backend, dtype, c, tail):
    for k, T, scale in ((1, 1.0, 1.0), (min(c, 20), 2.0, 4.0), (c, 3.0, 1.0)):
        s, t, y = inputs(3, c, scale, dtype)
        y[0] = -100
        taken_at = TAKEN_AT if tail == "renormalize" else T
        teacher = TopKTeacher.from_logits(t, k, tail, taken_at)
        for name in ["forward_kl", "jsd"] if dtype != torch.float32 else OF_LOGS:
            row_loss = of_top_k(OF_LOGS[name], tail, teacher.values, teacher.indices, T)
            compare(
                truth(row_loss, s, t, y), s, teacher, y, backend, divergence=name, temperature=T
            )


@backend
@pytest.mark.parametrize("margin", [30.0, 90.0, 400.0])
def test_a_tail_that_holds_nearly_nothing_or_all(backend, margin):
    """1 - the sum of the known is 0, or the sum of the others' exponentials is."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    for c in (9, 3000):
        s, t, y = inputs(3, c, 1.0, dtype)
        teacher = TopKTeacher.from_logits(t, 4, "bucket")
        for sign in (1, -1):
            x = s.scatter_add(
                1, teacher.indices.long(), torch.full((3, 4), sign * margin, dtype=dtype)
            )
            row_loss = of_top_k(kl, "bucket", teacher.values, teacher.indices, 1.0)
            compare(
                truth(row_loss, x, t, y, alpha=1.0),
                x,
                teacher,
                y,
                backend,
                temperature=1.0,
                alpha=1.0,
            )


@backend
def test_all_classes_known_is_the_whole_teacher(backend):
    s, t, y = inputs(4, 11, dtype=torch.float64)
    for tail in ("renormalize", "bucket", "zero"):
        teacher = TopKTeacher.from_logits(t, 11, tail, 2.0)
        x, z = s.clone().requires_grad_(), s.clone().requires_grad_()
        kd_loss(x, teacher, y, temperature=2.0, backend=backend).backward()
        kd_loss(z, t, y, temperature=2.0, backend=backend).backward()
        torch.testing.assert_close(x.grad, z.grad)


@backend
def test_masked_and_left_out_classes_of_top_k(backend):
    s, t, y = inputs(3, 8, dtype=torch.float64)
    values, indices = t.topk(4)
    values[0, 3] = -INF  # fewer than k: the class counts as any other
    teacher = TopKTeacher(values, indices)
    fewer = TopKTeacher(values[:1, :3], indices[:1, :3])
    s[1, next(j for j in range(8) if j not in indices[1].tolist())] = -INF
    s[2, indices[2, 0]] = -INF  # where the teacher has mass
    x = s.clone().requires_grad_()
    rows = kd_loss(x, teacher, y, reduction="none", alpha=1.0, backend=backend)
    torch.testing.assert_close(rows[0], kd_loss(s[:1], fewer, y[:1], alpha=1.0, backend=backend))
    assert torch.isfinite(rows[:2]).all()
    assert rows[2] == INF
    rows[:2].sum().backward()
    assert torch.isfinite(x.grad[:2]).all()


@backend
def test_top_k_beside_all_else(backend):
    """Per-row options, several temperatures, agreement, padding and metrics."""
    s, t, y = inputs(5, 12, dtype=torch.float64)
    y[1] = -100
    teacher = TopKTeacher.from_logits(t, 3)
    dense = torch.full_like(t, -INF).scatter(1, teacher.indices.long(), teacher.values)
    for options in (
        {"temperature": [1.0, 2.0], "temperature_reduction": "sum"},
        {"temperature": torch.linspace(1, 3, 5).double()},
        {"sample_weight": torch.linspace(0, 2, 5).double()},
        {"divergence": {"jsd": 0.5, "forward_kl": torch.linspace(-1, 1, 5).double()}},
        {"agreement": 0.5},
        {"divergence": "hard"},
        {"label_smoothing": 0.1, "weight": torch.linspace(1, 2, 12).double()},
    ):
        x, z = s.clone().requires_grad_(), s.clone().requires_grad_()
        kd_loss(x, teacher, y, backend=backend, **options).backward()
        kd_loss(z, dense, y, backend="reference", **options).backward()
        torch.testing.assert_close(x.grad, z.grad)
    # What is known of the teacher is taken as it is.
    capped = kd_loss(4 * torch.tanh(s / 4), dense, y, backend="reference")
    torch.testing.assert_close(kd_loss(s, teacher, y, logit_softcap=4.0, backend=backend), capped)
    got = kd_loss(s, teacher, y, return_terms="metrics", backend=backend)
    torch.testing.assert_close(got, kd_loss(s, dense, y, return_terms="metrics"))


def test_a_teacher_on_disk(tmp_path):
    _, t, _ = inputs(100, 50)
    teacher = TopKTeacher.from_logits(t.bfloat16(), 8)
    assert teacher.values.dtype == torch.bfloat16
    assert teacher.indices.dtype == torch.int32
    teacher.save(tmp_path / "teacher.safetensors")
    loaded = TopKTeacher.load(tmp_path / "teacher.safetensors")
    assert torch.equal(loaded.values, teacher.values)
    assert torch.equal(loaded.indices, teacher.indices)
    assert (loaded.tail, loaded.temperature) == (teacher.tail, teacher.temperature)
    assert len(loaded) == 100
    batch = loaded[torch.tensor([3, 5])]
    assert torch.equal(batch.values, teacher.values[[3, 5]])
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"weights": torch.ones(2)}, other)
    with pytest.raises(ValueError, match=r"was not written by TopKTeacher\.save"):
        TopKTeacher.load(other)


def test_storing_a_teacher_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    _, t, _ = inputs(2, 5)
    with pytest.raises(ImportError, match=r"pip install 'kdkernels\[cache\]'"):
        TopKTeacher.from_logits(t, 2).save(tmp_path / "teacher.safetensors")
    with pytest.raises(ImportError, match=r"pip install 'kdkernels\[cache\]'"):
        TopKTeacher.load(tmp_path / "teacher.safetensors")


K = 3
TOP_K_WRONG = [
    (lambda v, i: (v.long(), i), TypeError, "values must be floating point"),
    (lambda v, i: (v, i.float()), TypeError, "indices must be integers"),
    (lambda v, i: (v, i[:, :2]), ValueError, r"must both be \(\.\.\., k\)"),
    (lambda v, i: (v[:2], i[:2]), ValueError, "must have the rows of student_logits"),
    (lambda v, i: (v, i + 4), IndexError, "indices of row 0 hold"),
    (lambda v, i: (v, i * 0 + 1), ValueError, "indices of row 0 hold 1 more than once"),
    (lambda v, i: (v, i, "rest"), ValueError, "tail must be one of"),
    (lambda v, i: (v, i, "zero", -1.0), ValueError, "temperature must be a number > 0"),
    (lambda v, i: (v, i, "bucket", 4.0), ValueError, "needs log-probabilities, and those of a row"),
    (lambda v, i: (v, i, "zero", 1.0), ValueError, "taken at the temperature in use, 4.0, and its"),
]


@pytest.mark.parametrize(("change", "error", "message"), TOP_K_WRONG)
def test_a_wrong_top_k_teacher_is_named(change, error, message):
    s, t, y = inputs(4, 6)
    values, indices = t.topk(K)
    with pytest.raises(error, match=message):
        kd_loss(s, TopKTeacher(*change(values + 10, indices)), y)


def test_what_a_top_k_teacher_does_not_go_together_with():
    s, t, y = inputs(4, 6)
    for options, name in (
        ({"standardize": True}, "standardize"),
        ({"taid": 0.5}, "taid"),
        ({"divergence": "dkd"}, "divergence='dkd'"),
        ({"divergence": "nkd"}, "divergence='nkd'"),
        ({"divergence": "dist"}, "dist_gamma"),
        ({"entropy_gap": 1.0}, "entropy_gap"),
    ):
        with pytest.raises(ValueError, match=rf"TopKTeacher\(tail='renormalize'\) and {name}"):
            kd_loss(s, TopKTeacher.from_logits(t, 2), y, **options)
    bucket = TopKTeacher.from_logits(t, 2, "bucket", 4.0)
    for options, name in (
        ({"divergence": "hard", "temperature": 4.0}, "divergence='hard'"),
        ({"agreement": 0.1}, "agreement"),
        ({"return_terms": "metrics"}, "return_terms"),
    ):
        with pytest.raises(ValueError, match=rf"TopKTeacher\(tail='bucket'\) and {name}"):
            kd_loss(s, bucket, y, **options)
    with pytest.raises(ValueError, match="k must be between 1 and the number of classes, 6, got 7"):
        TopKTeacher.from_logits(t, 7)


# ---- log-probabilities, several teachers, TAID ---------------------------------------------------


@everywhere
@pytest.mark.parametrize("c", [10, 2049])
def test_log_probabilities_are_logits(backend, dtype, c):
    s, t, y = inputs(3, c, 2.0, dtype)
    log_p = F.log_softmax(t.double(), -1).to(dtype)

    def row_loss(row, u, label, i):
        return forward_kl(row, u[i].double(), label, 2.0)

    compare(truth(row_loss, s, log_p, y), s, log_p, y, backend, temperature=2.0)


@everywhere
@sizes
@pytest.mark.parametrize("ensemble", ["probs", "losses", "logits"])
def test_several_teachers(backend, dtype, c, ensemble):
    T, weights = 2.0, torch.tensor([1.0, 2.0, 0.5]).double()
    shares = weights / weights.sum()
    s, _, y = inputs(3, c, 3.0, dtype)
    teachers = [inputs(3, c, 3.0, dtype, seed=k)[1] for k in range(3)]

    def row_loss(row, t, label, i):
        of_row = torch.stack([u[i].double() for u in teachers])
        if ensemble == "losses":
            return sum(
                w * forward_kl(row, u, label, T) for w, u in zip(shares, of_row, strict=True)
            )
        if ensemble == "logits":
            return forward_kl(row, shares @ of_row, label, T)
        p = shares @ F.softmax(of_row / T, 1)
        return forward_kl(row, T * p.log(), label, T)

    expected = truth(row_loss, s, None, y)
    options = {"temperature": T, "ensemble": ensemble, "teacher_weights": weights.tolist()}
    compare(expected, s, teachers, y, backend, **options)
    compare(expected, s, torch.stack(teachers), y, backend, **options)


@backend
def test_a_teacher_of_weight_zero_is_not_read(backend):
    s, t, y = inputs(3, 6)
    options = {"ensemble": "logits", "teacher_weights": [1.0, 0.0], "backend": backend}
    got = kd_loss(s, [t, torch.full_like(t, math.nan)], y, **options)
    torch.testing.assert_close(got, kd_loss(s, t, y, backend=backend))


@everywhere
@pytest.mark.parametrize("c", [3, 100, 2049])
def test_taid(backend, dtype, c):
    s, t, y = inputs(3, c, 3.0, dtype)
    for share in (0.0, 0.3, 1.0):
        expected = truth(
            lambda row, u, label, i, share=share: forward_kl(
                row, (1 - share) * row.detach() + share * u[i].double(), label, 2.0
            ),
            s,
            t,
            y,
        )
        compare(expected, s, t, y, backend, temperature=2.0, taid=share)


# ---- logits that are scaled, capped, biased or padded --------------------------------------------


@everywhere
@sizes
def test_softcap_scale_and_bias(backend, dtype, c):
    generator = torch.Generator().manual_seed(c)
    bias = torch.randn(c, generator=generator)
    for cap, (of_s, of_t), scale in (
        (30.0, (1.0, 1.0), 20.0),
        (None, (0.25, 2.0), 5.0),
        (4.0, (2.0, 2.0), 3.0),
    ):
        s, t, y = inputs(3, c, scale, dtype)
        for biased in (False, True):

            def effective(v, factor, cap=cap, biased=biased):
                v = factor * (v + bias.double() if biased else v)
                return v if cap is None else cap * torch.tanh(v / cap)

            x = s.detach().double().requires_grad_()
            e = torch.stack([effective(row, of_s) for row in x])
            u = torch.stack([effective(row, of_t) for row in t.double()])
            rows = torch.stack([forward_kl(e[i], u[i], y[i], 2.0) for i in range(3)])
            loss = 0.9 * rows.mean() + 0.1 * F.cross_entropy(e, y)
            (grad,) = torch.autograd.grad(loss, x)
            compare(
                (loss.detach(), grad),
                s,
                t,
                y,
                backend,
                temperature=2.0,
                logit_softcap=cap,
                logit_scale=(of_s, of_t),
                logit_bias=bias if biased else None,
            )


@everywhere
@pytest.mark.parametrize("c", [3, 100, 2049])
def test_z_loss(backend, dtype, c):
    for scale, offset in ((1.0, 0.0), (8.0, 20.0)):
        s, t, y = inputs(4, c, scale, dtype)
        s = s + offset
        y[1] = -100
        expected = truth(
            lambda row, u, label, i: (
                forward_kl(row, u[i].double(), label, 2.0)
                + 0.1 / 0.9 * 0.02 * torch.logsumexp(row, 0) ** 2
            ),
            s,
            t,
            y,
        )
        compare(expected, s, t, y, backend, temperature=2.0, z_loss=0.02)


@backend
def test_padded_classes(backend):
    s, t, y = inputs(4, 9, dtype=torch.float64)
    y = y.clamp(max=5)
    for student, teacher in ((s, t[:, :7]), (s[:, :7], t), (s, t)):
        x, z = student.clone().requires_grad_(), s[:, :6].clone().requires_grad_()
        got = kd_loss(x, teacher, y, num_classes=6, backend=backend)
        expected = kd_loss(z, t[:, :6], y, backend=backend)
        (got + expected).backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(x.grad[:, :6], z.grad)
        assert x.grad[:, 6:].eq(0).all()
        leaf = student.clone().requires_grad_()
        kd_loss(leaf * 1, teacher, y, num_classes=6, inplace=True, backend=backend).backward()
        torch.testing.assert_close(leaf.grad, x.grad)
    with pytest.raises(ValueError, match="num_classes says how many classes the two have"):
        kd_loss(s, t[:, :7], y)
    y[0] = 6
    with pytest.raises(IndexError, match=r"labels\[0\] is 6: expected 0 <= label < 6"):
        kd_loss(s, t, y, num_classes=6, backend=backend)


@everywhere
@pytest.mark.parametrize("c", [10, 2049])
def test_sample_weight(backend, dtype, c):
    weights = torch.tensor([0.5, 0.0, 3.0, 1.0])
    s, t, y = inputs(4, c, 3.0, dtype)
    s[1] = math.nan  # of weight 0, and so left out
    y[3] = -100
    kept = torch.tensor([0, 2])
    for reduction in ("mean", "sum"):
        loss, of_kept = truth(
            lambda row, u, label, i: forward_kl(row, u[kept[i]].double(), label, 2.0),
            s[kept],
            t,
            y[kept],
            weights=weights[kept],
            reduction=reduction,
        )
        grad = torch.zeros(4, c).double().index_put((kept,), of_kept)
        compare(
            (loss, grad),
            s,
            t,
            y,
            backend,
            temperature=2.0,
            sample_weight=weights,
            reduction=reduction,
        )
    module = FusedKDLoss(temperature=2.0, backend=backend)
    torch.testing.assert_close(
        module(s, t, y, weights), kd_loss(s, t, y, temperature=2.0, sample_weight=weights)
    )
