"""What ``test_distributed.py`` runs in each of several processes: ``distributed_cases.py FILE RANK
WORLD``. A case is a function called ``case_...``; all processes go through all of them in order."""

import contextlib
import copy
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_numerics import GRAD_BOUND, LOSS_BOUND, inputs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdkernels import FusedKDLoss, VocabParallel, kd_loss

INF = torch.inf
CLASSES = 37
CUTS = {2: (0, 5, 37), 4: (0, 1, 20, 21, 37)}  # uneven on purpose, one of a single class


def my_shard(classes=CLASSES):
    rank, world = dist.get_rank(), dist.get_world_size()
    cuts = CUTS[world] if classes == CLASSES else [classes * k // world for k in range(world + 1)]
    return VocabParallel(None, cuts[rank], cuts[rank + 1])


def batch(rows=12, classes=CLASSES, dtype=torch.float32):
    """The same in every process; of the labels some on each shard, and some ignored."""
    s, t, y = inputs(rows, classes, dtype=dtype)
    y[: min(rows, 4)] = torch.tensor([0, 20, 36, 10])[: min(rows, 4)] % classes
    y[5::6] = -100
    return s, t, y


def here(x, shard):
    return x[..., shard.start : shard.stop].clone()


def same_everywhere(value):
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    return all(torch.equal(part, parts[0]) for part in parts)


def compare(s, t, y, incoming=1.0, loss_fn=kd_loss, bound=None, **options):
    """With the loss of the whole logits in float64."""
    shard = my_shard(s.shape[-1])
    x = s.clone().double().requires_grad_()
    truth = kd_loss(x, t.double(), y, backend="reference", **options)
    (truth.sum() * incoming).backward()
    z = here(s, shard).requires_grad_()
    loss = loss_fn(z, here(t, shard), y, vocab_parallel=shard, **options)
    (loss.sum() * incoming).backward()
    assert same_everywhere(loss)
    finite = truth.isfinite()
    assert torch.equal(loss.detach()[~finite].double(), truth.detach()[~finite]), (loss, truth)
    error = (loss.detach() - truth.detach())[finite].abs()
    assert (error <= LOSS_BOUND * (1 + truth.detach()[finite].abs())).all(), (loss, truth, options)
    bound = bound or GRAD_BOUND[s.dtype]
    off = (z.grad.double() - here(x.grad, shard)).norm()
    assert off <= bound * x.grad.norm() + 1e-12, (off / x.grad.norm(), options)


OPTIONS = [
    {},
    {"alpha": 1.0},
    {"alpha": 0.0},
    {"temperature": 1.0, "teacher_temperature": 2.0},
    {"temperature": 20.0, "scale_by_t2": False},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"distill_ignored": True},
    {"logit_softcap": 5.0, "logit_scale": (0.5, 2.0)},
    {"sample_weight": torch.arange(12.0)},
    {"num_items": 30},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.3},
    {"divergence": "jsd", "beta": 1.0},
    {"divergence": "skew_forward_kl"},
    {"divergence": "skew_reverse_kl"},
    {"divergence": "total_variation"},
    {"divergence": "alpha", "divergence_alpha": 0.5},
    {"divergence": "alpha", "divergence_alpha": 1.0},
    {"divergence": "renyi", "divergence_alpha": 2.0},
    {"divergence": {"forward_kl": 0.5, "renyi": 2.0, "jsd": 0.0}},
]


def case_equals_the_unsharded_loss():
    for options in OPTIONS:
        compare(*batch(), **options)


def case_every_dtype():
    for dtype in GRAD_BOUND:
        compare(*batch(dtype=dtype), **({"divergence": "jsd"} if dtype == torch.bfloat16 else {}))
    s, t, y = batch(dtype=torch.float16)
    compare(s, t, y, incoming=2.0**16, num_items=1e6)


def case_more_rows_than_one_look_takes():
    compare(*batch(64, 5000))


def case_the_student_all_but_equals_its_teacher():
    s, _, y = batch()
    compare(s + 1e-4 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1)), s, y)
    shard = my_shard()
    z = here(s, shard).requires_grad_()
    loss = kd_loss(z, here(s, shard), alpha=1.0, vocab_parallel=shard)
    loss.backward()
    assert 0 <= abs(loss.item()) <= 2e-6
    assert not z.grad.abs().max() > 1e-12


def case_leading_dimensions_shift_and_strides():
    s, t, y = batch()
    s, t, y = s.reshape(3, 4, -1), t.reshape(3, 4, -1), y.reshape(3, 4)
    compare(s, t, y, shift=1)
    shard = my_shard()
    wide = torch.zeros(3, 4, 3 * (shard.stop - shard.start))
    z = wide[..., : shard.stop - shard.start].copy_(here(s, shard)).requires_grad_()
    loss = kd_loss(z, here(t, shard), y, vocab_parallel=shard)
    assert torch.equal(loss, kd_loss(here(s, shard), here(t, shard), y, vocab_parallel=shard))
    (a,) = torch.autograd.grad(loss, z)
    w = here(s, shard).requires_grad_()
    (b,) = torch.autograd.grad(kd_loss(w, here(t, shard), y, vocab_parallel=shard), w)
    assert torch.equal(a, b)


def case_masked_classes_and_large_logits():
    shard = my_shard()
    s, t, y = batch()
    both = slice(0, 5) if dist.get_world_size() == 2 else slice(1, 20)  # all that a shard has
    y[y < 20] = 30
    y[5::6] = -100
    for name in ("forward_kl", "jsd"):
        a, b = s.clone(), t.clone()
        a[:, both], b[:, both] = -INF, -INF
        compare(a, b, y, divergence=name)
        b = t.clone()
        b[:, both] = -INF
        compare(s, b, y, divergence=name)
    b, a = t.clone(), s.clone()
    a[1, 3] = -INF  # where the teacher has mass
    compare(a, b, y, reduction="none", alpha=1.0, bound=INF)
    compare(s + 6e4, t - 6e4, y, bound=2e-2)  # float32 has lost digits, and not these alone
    loss = kd_loss(here(s, shard) * INF, here(t, shard), y, vocab_parallel=shard)
    assert loss.isnan()


def case_ignored_rows_are_not_read():
    shard = my_shard()
    s, t, y = batch()
    clean, _ = value_and_grad(here(s, shard), here(t, shard), y, vocab_parallel=shard)
    s[y == -100], t[y == -100] = torch.nan, INF
    loss, grad = value_and_grad(here(s, shard), here(t, shard), y, vocab_parallel=shard)
    assert torch.equal(loss, clean)
    assert not grad[y == -100].any()
    y[:] = -100
    loss, grad = value_and_grad(here(s, shard), here(t, shard), y, vocab_parallel=shard)
    assert loss == 0
    assert not grad.any()


def value_and_grad(s, t, y=None, **options):
    x = s.detach().requires_grad_()
    loss = kd_loss(x, t, y, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


def case_a_few_numbers_per_row_travel():
    sent = []
    kept = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def watched(name, tensor_of):
        def call(*args, **kwargs):
            sent.append(tensor_of(args).nbytes)
            return kept[name](*args, **kwargs)

        return call

    rows, classes = 64, 4000
    s, t, y = batch(rows, classes)
    shard = my_shard(classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", watched("all_gather", lambda args: args[1]))
        patch.setattr(dist, "all_reduce", watched("all_reduce", lambda args: args[0]))
        for divergence, most in (("forward_kl", 56), ("jsd", 72)):
            sent.clear()
            value_and_grad(
                here(s, shard), here(t, shard), y, vocab_parallel=shard, divergence=divergence
            )
            assert sum(sent) <= most * (rows + 1), (divergence, sum(sent) / rows)
            assert len(sent) == (1 if divergence == "forward_kl" else 2)


def case_gradients_flow_as_usual():
    shard = my_shard()
    s, t, y = batch()
    z = here(s, shard).requires_grad_()
    teacher = here(t, shard)
    first = kd_loss(z, teacher, y, vocab_parallel=shard)
    second = kd_loss(z, teacher, y, vocab_parallel=shard, divergence="jsd")
    (a,) = torch.autograd.grad(first, z, retain_graph=True)
    (b,) = torch.autograd.grad(first, z)
    assert torch.equal(a, b)
    (both,) = torch.autograd.grad(second + kd_loss(z, teacher, y, vocab_parallel=shard), z)
    (c,) = torch.autograd.grad(kd_loss(z, teacher, y, vocab_parallel=shard, divergence="jsd"), z)
    torch.testing.assert_close(both, a + c)
    x = here(s, shard).requires_grad_()
    logits = x * 1
    kd_loss(logits, teacher, y, vocab_parallel=shard, inplace=True).backward()
    assert torch.equal(x.grad, a)
    terms = kd_loss(z, teacher, y, vocab_parallel=shard, return_terms=True)
    torch.testing.assert_close(terms.loss, 0.9 * terms.soft + 0.1 * terms.hard)
    loss = kd_loss(z, teacher, y, vocab_parallel=shard)
    with pytest.raises(RuntimeError, match="vocab_parallel has no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


def case_sharded_tensors_of_torch_say_it_themselves():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    s, t, y = batch(8, CLASSES)
    expected, grad = value_and_grad(s, t, y)
    x = distribute_tensor(s, mesh, [Shard(-1)]).requires_grad_()
    teacher = distribute_tensor(t, mesh, [Shard(1)])
    for labels in (y, distribute_tensor(y, mesh, [Replicate()])):
        x.grad = None
        loss = FusedKDLoss()(x, teacher, labels)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(x.grad.full_tensor(), grad, rtol=1e-5, atol=1e-7)
    with pytest.raises(TypeError, match="teacher_logits must be a DTensor"):
        kd_loss(x, t, y)
    with pytest.raises(ValueError, match="must be sharded over the classes"):
        kd_loss(distribute_tensor(s, mesh, [Shard(0)]), teacher, y)
    with pytest.raises(ValueError, match="says what a DTensor knows"):
        kd_loss(x, teacher, y, vocab_parallel=my_shard())
    with pytest.raises(ValueError, match="labels must be replicated"):
        kd_loss(x, teacher, distribute_tensor(y, mesh, [Shard(0)]))


def case_what_is_wrong_raises_in_every_process():
    shard = my_shard()
    s, t, y = batch()
    s, t = here(s, shard), here(t, shard)

    def raises(error, text, labels=y, given=shard, **options):
        with pytest.raises(error, match=text):
            kd_loss(s, t, labels, vocab_parallel=given, **options)

    beyond = y.clone()
    beyond[3] = CLASSES
    raises(IndexError, r"labels\[3\] is none of the 37 classes", labels=beyond)
    moved = VocabParallel(None, shard.start + 1, shard.stop + 1)
    raises(ValueError, r"make \[0, C\) without gaps", given=moved)
    raises(ValueError, "student_logits must hold the 3 classes", given=VocabParallel(None, 0, 3))
    raises(ValueError, "at least one class", given=VocabParallel(None, 3, 3))
    raises(TypeError, "start must be an int", given=VocabParallel(None, 0.0, 3))
    raises(TypeError, r"must be VocabParallel\(group, start, stop\), got tuple", given=(None, 0, 3))
    first = dist.new_group([0])
    if dist.get_rank() > 0:
        mine = VocabParallel(first, shard.start, shard.stop)
        raises(ValueError, "group must be one that this process belongs to", given=mine)
    for options, named in (
        ({"divergence": "dkd"}, "divergence='dkd'"),
        ({"divergence": "hard"}, "divergence='hard'"),
        ({"divergence": {"jsd": torch.ones(12)}}, "the weight of 'jsd' per row"),
        ({"divergence": "jsd", "beta": torch.rand(12)}, "beta per row"),
        ({"temperature": [1.0, 2.0]}, "several temperatures"),
        ({"temperature": torch.tensor(2.0)}, "a temperature that is a tensor"),
        ({"standardize": True}, "standardize"),
        ({"taid": 0.5}, "taid"),
        ({"agreement": 0.1}, "agreement"),
        ({"entropy_gap": 0.1}, "entropy_gap"),
        ({"num_classes": 3}, "num_classes"),
        ({"return_terms": "metrics"}, 'return_terms="metrics"'),
        ({"weight": torch.ones(s.shape[-1])}, "weight"),
        ({"logit_bias": torch.ones(s.shape[-1])}, "logit_bias"),
    ):
        raises(ValueError, f"vocab_parallel and {named} do not go together", **options)
    with pytest.raises(ValueError, match="a top-k teacher or several do not go together"):
        kd_loss(s, [t, t], y, vocab_parallel=shard)


def case_compiled_models_leave_the_loss_to_python():
    if dist.get_world_size() > 2:  # to import the compiler takes each process seconds
        return
    shard = my_shard()
    s, t, y = batch()
    s, t = here(s, shard), here(t, shard)
    loss_fn = FusedKDLoss(vocab_parallel=shard)
    step = torch.compile(lambda x: loss_fn(2 * x, t, y) + 1, backend="eager")
    torch.testing.assert_close(step(s), loss_fn(2 * s, t, y) + 1)


# ---- means over processes ------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def forward(self, x):
        return self.layers(x)


def task():
    """Rows for each process, unequal numbers of them active."""
    generator = torch.Generator().manual_seed(5)
    rows = 5 * dist.get_world_size()
    x, t = (
        torch.randn(rows, 6, generator=generator),
        torch.randn(rows, CLASSES, generator=generator),
    )
    y = torch.randint(CLASSES, (rows,), generator=generator)
    y[:4], y[6] = -100, -100
    mine = slice(5 * dist.get_rank(), 5 * dist.get_rank() + 5)
    return x, t, y, mine


def whole_gradients(**options):
    x, t, y, _ = task()
    model = Model()
    loss = kd_loss(model(x), t, y, **options)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


WEIGHT = torch.linspace(0.5, 2, CLASSES)
MEANS = [{}, {"distill_ignored": True}, {"weight": WEIGHT}, {"label_smoothing": 0.1}]


def case_the_mean_under_ddp_is_over_the_rows_of_all():
    x, t, y, mine = task()
    for options in MEANS:
        expected, grads = whole_gradients(**options)
        model = DistributedDataParallel(Model())
        loss = FusedKDLoss(group=dist.group.WORLD, **options)(model(x[mine]), t[mine], y[mine])
        loss.backward()
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-8)
        dist.all_reduce(loss.detach_())
        torch.testing.assert_close(loss / dist.get_world_size(), expected)


def case_the_mean_under_ddp_with_row_weights():
    x, t, y, mine = task()
    w = torch.linspace(0, 3, len(x))
    _, grads = whole_gradients(sample_weight=w)
    model = DistributedDataParallel(Model())
    options = {"sample_weight": w[mine], "group": dist.group.WORLD}
    kd_loss(model(x[mine]), t[mine], y[mine], **options).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-8)


def case_accumulated_under_ddp_with_the_items_of_the_whole_step():
    x, t, y, mine = task()
    _, grads = whole_gradients()
    model = DistributedDataParallel(Model())
    items = (y != -100).sum() / dist.get_world_size()  # as DDP divides the sum by that
    x, t, y = x[mine], t[mine], y[mine]
    for part in (slice(0, 2), slice(2, 5)):
        is_last = part.stop == 5
        with contextlib.nullcontext() if is_last else model.no_sync():
            kd_loss(model(x[part]), t[part], y[part], num_items=items).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-8)


def case_the_mean_under_fsdp2_is_over_the_rows_of_all():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, t, y, mine = task()
    _, grads = whole_gradients()
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    loss = kd_loss(model(x[mine]), t[mine], y[mine], group=dist.group.WORLD)
    loss.backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), grad, rtol=1e-5, atol=1e-8)


def case_a_mean_over_processes_compiles():
    if dist.get_world_size() > 2:
        return
    x, t, y, mine = task()
    expected = kd_loss(x[mine], x[mine], y[mine] % 6, group=dist.group.WORLD)
    del t
    loss_fn = torch.compile(
        FusedKDLoss(group=dist.group.WORLD), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(loss_fn(x[mine], x[mine], y[mine] % 6), expected)


def case_nothing_active_in_any_process():
    s, t, y = batch()
    y[:] = -100
    loss, grad = value_and_grad(s, t, y, group=dist.group.WORLD)
    assert loss == 0
    assert not grad.any()


def case_data_and_vocabulary_parallel_together():
    if dist.get_world_size() < 4:
        return
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    s, t, y = batch(8)
    y[1:4] = -100
    expected, grad = value_and_grad(s, t, y)
    row, column = mesh.get_local_rank("data"), mesh.get_local_rank("vocabulary")
    rows = slice(0, 3) if row == 0 else slice(3, 8)
    shard = VocabParallel(mesh.get_group("vocabulary"), *((0, 11), (11, CLASSES))[column])
    options = {"vocab_parallel": shard, "group": mesh.get_group("data")}
    mine = here(s[rows], shard), here(t[rows], shard), y[rows]
    loss, of_shard = value_and_grad(*mine, **options)
    torch.testing.assert_close(of_shard, 2 * here(grad[rows], shard), rtol=1e-5, atol=1e-8)
    dist.all_reduce(loss, group=mesh.get_group("data"))
    torch.testing.assert_close(loss / 2, expected)


def main(path, rank, world):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    for name, case in copy.copy(globals()).items():
        if name.startswith("case_"):
            print(name, flush=True)
            case()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
