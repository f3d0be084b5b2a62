"""The formulas of the README in float64, written independently of ``kdkernels.reference``.

Loss, both terms and the gradient by its closed form: no autograd, no ``log_softmax``, no
``cross_entropy``. Each row is computed on its own; rows that are left out are never read.
"""

import torch


def _log_softmax(v):
    """log softmax of a float64 row; -inf stays -inf, NaN and +inf make NaN."""
    shifted = v - v.max()
    return shifted - shifted.exp().sum().log()


def _soft(s, t, temperature):
    """T² KL(p ‖ q) of one row and its gradient T (q - p)."""
    log_q, log_p = _log_softmax(s / temperature), _log_softmax(t / temperature)
    q, p = log_q.exp(), log_p.exp()
    seen = t > -torch.inf
    kl = (p[seen] * (log_p[seen] - log_q[seen])).sum()
    return temperature**2 * kl, temperature * (q - p)


def _hard(s, label, weight, label_smoothing):
    """Cross entropy with the smoothed label of one row and its gradient."""
    log_r = _log_softmax(s)
    target = label_smoothing / len(s) * weight
    target[label] += (1 - label_smoothing) * weight[label]
    asked = target > 0
    return -(target[asked] * log_r[asked]).sum(), target.sum() * log_r.exp() - target


def oracle(
    student,
    teacher,
    labels=None,
    *,
    temperature=4.0,
    alpha=0.9,
    ignore_index=-100,
    label_smoothing=0.0,
    weight=None,
    reduction="mean",
    distill_ignored=False,
):
    """(loss, soft, hard, gradient of the summed loss), float64, shaped as ``kd_loss`` promises."""
    shape, classes = student.shape, student.shape[-1]
    student, teacher = (v.detach().double().reshape(-1, classes) for v in (student, teacher))
    rows = len(student)
    weight = torch.ones(classes).double() if weight is None else weight.double()
    labels = None if labels is None else labels.reshape(-1).tolist()
    hard_rows = [i for i in range(rows) if labels is not None and labels[i] != ignore_index]
    soft_rows = list(range(rows)) if labels is None or distill_ignored else hard_rows

    soft, hard = torch.zeros(2, rows, dtype=torch.float64)
    soft_grad, hard_grad = torch.zeros(2, rows, classes, dtype=torch.float64)
    for i in soft_rows:
        soft[i], soft_grad[i] = _soft(student[i], teacher[i], temperature)
    for i in hard_rows:
        hard[i], hard_grad[i] = _hard(student[i], labels[i], weight, label_smoothing)

    if reduction == "none":
        soft, hard = soft.reshape(shape[:-1]), hard.reshape(shape[:-1])
    else:
        mean = reduction == "mean"
        soft_count = (len(soft_rows) if mean else 1) or 1
        hard_count = (sum(weight[labels[i]].item() for i in hard_rows) if mean else 1) or 1
        soft, soft_grad = soft.sum() / soft_count, soft_grad / soft_count
        hard, hard_grad = hard.sum() / hard_count, hard_grad / hard_count
    if alpha == 1:
        loss, grad = soft, soft_grad
    elif alpha == 0:
        loss, grad = hard, hard_grad
    else:
        loss = alpha * soft + (1 - alpha) * hard
        grad = alpha * soft_grad + (1 - alpha) * hard_grad
    return loss, soft, hard, grad.reshape(shape)
