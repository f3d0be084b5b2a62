"""``python -m benchmarks.objectives``: each objective beside forward KL and beside its eager form.

The eager forms are what people write: a few lines of PyTorch in float32, without the care that
kdkernels' reference takes of masked classes. Writes ``benchmarks/results/<device>-objectives.md``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.gpu_results import table
from benchmarks.providers import ALPHA, Case
from benchmarks.readme import one_line
from benchmarks.results import stem
from benchmarks.timing import Step, interleaved, spread
from kdkernels import kd_loss

RESULTS = Path(__file__).parent / "results"
SHAPES = [(128, 100), (128, 1000), (512, 32000)]
TEMPERATURE = 2.0  # of each but those whose paper has another


class Logits(NamedTuple):
    """What an eager form is computed of: logits and log-probabilities, (N, C), and labels."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    temperature: float

    @property
    def log_q(self) -> Tensor:
        return F.log_softmax(self.student / self.temperature, -1)

    @property
    def log_p(self) -> Tensor:
        return F.log_softmax(self.teacher / self.temperature, -1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)


def forward_kl(x: Logits) -> Tensor:
    return _kl(x.log_p, x.log_q)


def reverse_kl(x: Logits) -> Tensor:
    return _kl(x.log_q, x.log_p)


def jsd(x: Logits) -> Tensor:
    log_p, log_q = x.log_p, x.log_q
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def skew_forward_kl(x: Logits) -> Tensor:
    p, q = x.log_p.exp(), x.log_q.exp()
    return _kl(p.log(), (0.1 * p + 0.9 * q).log())


def skew_reverse_kl(x: Logits) -> Tensor:
    p, q = x.log_p.exp(), x.log_q.exp()
    return _kl(q.log(), (0.1 * q + 0.9 * p).log())


def total_variation(x: Logits) -> Tensor:
    return (x.log_p.exp() - x.log_q.exp()).abs().sum(-1).mean() / 2


def alpha(x: Logits) -> Tensor:
    return ((1 - (0.5 * (x.log_p + x.log_q)).exp().sum(-1)) * 4).mean()


def renyi(x: Logits) -> Tensor:
    return (-2 * torch.logsumexp(0.5 * (x.log_p + x.log_q), -1)).mean()


def jeffreys(x: Logits) -> Tensor:
    log_p, log_q = x.log_p, x.log_q
    return (_kl(log_p, log_q) + _kl(log_q, log_p)) / 2


def _but_the_label(x: Logits) -> tuple[Tensor, Tensor, Tensor]:
    label = F.one_hot(x.labels, x.student.shape[-1]).bool()
    others = [(v / x.temperature).masked_fill(label, -1000.0) for v in (x.student, x.teacher)]
    return label, others[0], others[1]


def dkd(x: Logits) -> Tensor:
    label, student, teacher = _but_the_label(x)
    two = []
    for log in (x.log_p, x.log_q):
        at = log.exp().masked_fill(~label, 0.0).sum(-1)
        two.append(torch.stack((at, 1 - at), -1).log())
    rest = _kl(F.log_softmax(teacher, -1), F.log_softmax(student, -1))
    return _kl(two[0], two[1]) + 8 * rest


def nkd(x: Logits) -> Tensor:
    label, student, teacher = _but_the_label(x)
    at = x.labels[:, None]
    of_label = -F.softmax(x.teacher, -1).gather(-1, at) * F.log_softmax(x.student, -1).gather(
        -1, at
    )
    rest = -(F.softmax(teacher, -1) * F.log_softmax(student, -1)).masked_fill(label, 0.0).sum(-1)
    return of_label.mean() + 1.5 * rest.mean()


def wsld(x: Logits) -> Tensor:
    with torch.no_grad():
        student = F.cross_entropy(x.student, x.labels, reduction="none")
        teacher = F.cross_entropy(x.teacher, x.labels, reduction="none")
        weight = 1 - torch.exp(-student / (teacher + 1e-7))
    return 2.25 * (weight * -(x.log_p.exp() * x.log_q).sum(-1)).mean()


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return F.cosine_similarity(a, b, dim=dim).mean()


def dist(x: Logits) -> Tensor:
    p, q = x.log_p.exp(), x.log_q.exp()
    return (1 - _pearson(p, q, -1)) + (1 - _pearson(p, q, 0))


def dist_rows(x: Logits) -> Tensor:
    return 1 - _pearson(x.log_p.exp(), x.log_q.exp(), -1)


def hard(x: Logits) -> Tensor:
    return F.cross_entropy(x.student, x.teacher.argmax(-1)) / x.temperature**2


def standardized(x: Logits) -> Tensor:
    student, teacher = (
        (v - v.mean(-1, keepdim=True)) / (v.std(-1, keepdim=True) + 1e-7)
        for v in (x.student, x.teacher)
    )
    return forward_kl(x._replace(student=student, teacher=teacher))


def several_temperatures(x: Logits) -> Tensor:
    rows = [t**2 * forward_kl(x._replace(temperature=t)) for t in (2.0, 3.0, 4.0)]
    return (rows[0] + rows[1] + rows[2]) / 3 / x.temperature**2


def softcapped(logits: Tensor) -> Tensor:
    return 30 * torch.tanh(logits / 30)


def taid(x: Logits) -> Tensor:
    return forward_kl(x._replace(teacher=0.5 * x.student.detach() + 0.5 * x.teacher))


def agreement(x: Logits) -> Tensor:
    log_p, log_q = F.log_softmax(x.teacher, -1), F.log_softmax(x.student, -1)
    return forward_kl(x) - torch.logsumexp(log_p + log_q, -1).mean() / (ALPHA * x.temperature**2)


def entropy_gap(x: Logits) -> Tensor:
    log_p, log_q = F.log_softmax(x.teacher, -1), F.log_softmax(x.student, -1)
    gap = ((log_q.exp() * log_q).sum(-1) - (log_p.exp() * log_p).sum(-1)) ** 2
    return forward_kl(x) + gap.mean() / (ALPHA * x.temperature**2)


class Objective(NamedTuple):
    eager: Callable[[Logits], Tensor]  # the soft term without its T²
    options: dict[str, Any]
    temperature: float = TEMPERATURE
    of_logits: Callable[[Tensor], Tensor] = lambda logits: logits


def _of(eager: Callable[[Logits], Tensor], temperature: float = TEMPERATURE) -> Objective:
    return Objective(eager, {"divergence": eager.__name__}, temperature)


OBJECTIVES = {
    "forward_kl": _of(forward_kl),
    "reverse_kl": _of(reverse_kl),
    "jsd": _of(jsd),
    "skew_forward_kl": _of(skew_forward_kl),
    "skew_reverse_kl": _of(skew_reverse_kl),
    "total_variation": _of(total_variation),
    "alpha": _of(alpha),
    "renyi": _of(renyi),
    "forward and reverse KL": Objective(
        jeffreys, {"divergence": {"forward_kl": 0.5, "reverse_kl": 0.5}}
    ),
    "dkd": _of(dkd),
    "nkd": _of(nkd, 1.0),
    "wsld": _of(wsld),
    "dist": _of(dist, 1.0),
    "dist, dist_gamma=0": Objective(dist_rows, {"divergence": "dist", "dist_gamma": 0.0}, 1.0),
    "hard": _of(hard, 1.0),
    "standardize=True": Objective(standardized, {"standardize": True}),
    "temperature=[2, 3, 4]": Objective(several_temperatures, {"temperature": [2.0, 3.0, 4.0]}),
    "logit_softcap=30": Objective(forward_kl, {"logit_softcap": 30.0}, of_logits=softcapped),
    "taid=0.5": Objective(taid, {"taid": 0.5}),
    "agreement=1": Objective(agreement, {"agreement": 1.0}),
    "entropy_gap=1": Objective(entropy_gap, {"entropy_gap": 1.0}),
}


def _eager_step(case: Case, objective: Objective) -> None:
    case.drop_gradient()
    student, teacher = objective.of_logits(case.student), objective.of_logits(case.teacher)
    x = Logits(student, teacher, case.labels, objective.temperature)
    soft = objective.eager(x) * objective.temperature**2
    (ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, case.labels)).backward()


def _fused(case: Case, objective: Objective) -> Tensor:
    options = {"temperature": objective.temperature} | objective.options
    return kd_loss(case.student, case.teacher, case.labels, alpha=ALPHA, **options)


def _fused_step(case: Case, objective: Objective) -> None:
    case.drop_gradient()
    _fused(case, objective).backward()


def check(case: Case, name: str) -> None:
    """That the two compute the same."""
    objective = OBJECTIVES[name]
    _fused_step(case, objective)
    fused = case.student.grad
    _eager_step(case, objective)
    assert fused is not None
    assert case.student.grad is not None
    difference = torch.linalg.vector_norm(fused - case.student.grad)
    share = float(difference / torch.linalg.vector_norm(case.student.grad))
    if not share < 1e-3:
        raise AssertionError(f"{name}: the gradients differ by {share:.1e} of their norm")


def measure(rows: int, classes: int, seconds: float, names: list[str]) -> str:
    """A table: each objective next to its eager form, and next to forward KL in the same turns."""
    case = Case(rows, classes, TEMPERATURE, torch.float32)
    lines = []
    for name in names:
        check(case, name)
        # Whoever comes after the eager form finds the caches and the memory as that left them.
        chosen = {"again": name, "base": "forward_kl", "fused": name}
        steps = {"eager": Step(functools.partial(_eager_step, case, OBJECTIVES[name]))}
        for key, n in chosen.items():
            steps[key] = Step(functools.partial(_fused_step, case, OBJECTIVES[n]))
        times = {k: spread(turns)["seconds"] for k, turns in interleaved(steps, seconds).items()}
        fused = times["fused"]
        cells = [f"{fused * 1e3:.3g} ms", f"{fused / times['base']:.2f}×"]
        lines.append([name, *cells, f"{times['eager'] / fused:.1f}×"])
        print(*lines[-1], sep="\t", flush=True)
    return table(["objective", "kdkernels", "of forward KL", "eager / kdkernels"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each objective and shape")
    parser.add_argument("--only", nargs="*", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--shape", nargs=2, type=int, action="append", help="rows and classes")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    arguments = parser.parse_args()
    known = environment()
    parts = [
        "# What each objective costs",
        "Forward + backward beside the cross entropy, float32, medians. Each objective takes turns "
        f"with forward KL at T = {TEMPERATURE:g} and with its eager form. "
        + one_line({"environment": known}),
    ]
    for shape in arguments.shape or SHAPES:
        print(tuple(shape))
        parts += [f"## {tuple(shape)}", measure(*shape, arguments.seconds, arguments.only)]
    if arguments.write:
        text = "\n\n".join(parts) + "\n"
        (RESULTS / f"{stem(known)}-objectives.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
