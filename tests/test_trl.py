"""TRL's distillation losses, and the calls that give its own functions' value and gradient."""

import copy

import pytest
import torch

from kdkernels import TopKTeacher, kd_loss

pytestmark = pytest.mark.usefixtures("one_thread")
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TRAINERS = {"gkd": "GKDTrainer", "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer"}
B, L, C, WIDTH = 3, 7, 37, 8
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}  # of a norm; theirs has float32's own rounding


def batch(dtype=torch.float64, classes=C):
    """Logits (B, L, C) of student and teacher, labels (B, L) of which some are to be left out."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, B, L, classes, generator=generator, dtype=dtype) * 3
    labels = torch.randint(classes, (B, L), generator=generator)
    labels[0, 2:] = labels[1, :3] = -100
    return s, t, labels


def check_equal(theirs, ours, x):
    """Loss and gradient of two functions of x."""
    found = []
    for loss_fn in (theirs, ours):
        leaf = x.clone().requires_grad_()
        loss = loss_fn(leaf)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for expected, got in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= BOUND[x.dtype] * expected.norm()


@pytest.fixture(params=TRAINERS)
def their_jsd(request, example):
    """``generalized_jsd_loss`` of a trainer."""
    trainers = example(f"trl.experimental.{request.param}")
    return getattr(trainers, TRAINERS[request.param]).generalized_jsd_loss


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_examples_loss_is_theirs(example, their_jsd, beta, temperature, dtype):
    ours = example("trl_gkd").generalized_jsd_loss
    s, t, labels = batch(dtype)
    for options in ({}, {"reduction": "sum"}, {"num_items_in_batch": torch.tensor(40)}):
        options |= {"beta": beta, "temperature": temperature}
        check_equal(
            lambda x, options=options: their_jsd(x, t, labels, **options),
            lambda x, options=options: ours(x, t, labels, **options),
            s,
        )


def test_what_their_other_reductions_are(their_jsd):
    """By the names of F.kl_div: none has a number per class, mean is over the classes as well, and
    without labels batchmean is a sum over the positions of a sequence."""
    s, t, labels = batch()
    options = {"alpha": 1.0, "divergence": "jsd", "temperature": 1.0, "scale_by_t2": False}
    check_equal(
        lambda x: their_jsd(x, t, reduction="none").sum(-1),
        lambda x: kd_loss(x, t, reduction="none", **options),
        s,
    )
    check_equal(
        lambda x: their_jsd(x, t, labels, reduction="mean"),
        lambda x: kd_loss(x, t, labels, **options) / C,
        s,
    )
    check_equal(lambda x: their_jsd(x, t), lambda x: kd_loss(x, t, num_items=B, **options), s)


def test_a_step_without_a_label_is_zero_as_theirs(example, their_jsd):
    s, t, labels = batch()
    ours, nothing = example("trl_gkd").generalized_jsd_loss, torch.full_like(labels, -100)
    check_equal(lambda x: their_jsd(x, t, nothing), lambda x: ours(x, t, nothing), s)


@pytest.mark.parametrize("method", ["sdft", "sdpo"])
@pytest.mark.parametrize("alpha", BETAS)
def test_self_distillation_over_the_vocabulary(example, method, alpha):
    losses = example(f"trl.experimental.{method}.loss_utils")
    s, t, _ = batch()
    check_equal(
        lambda x: losses.compute_full_logit_self_distillation_loss(x, t, distillation_alpha=alpha),
        lambda x: kd_loss(
            x, t, temperature=1.0, alpha=1.0, divergence="jsd", beta=alpha, reduction="none"
        ),
        s,
    )


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_largest_classes_and_a_bucket_for_the_others(example, beta, divergence):
    """``top_k`` and ``add_tail`` of IW-OPD: the teacher's classes for forward KL, the student's
    for reverse KL."""
    trainer = example("trl.experimental.iw_opd").IWOPDTrainer
    s, t, labels = batch()
    chosen = (t if beta == 0 else s).topk(5).indices
    teacher = TopKTeacher(t.log_softmax(-1).gather(-1, chosen), chosen, tail="bucket")
    check_equal(
        lambda x: trainer.generalized_jsd_loss(x, t, labels, beta=beta, top_k=5, add_tail=True),
        lambda x: kd_loss(
            x, teacher, labels, temperature=1.0, alpha=1.0, divergence=divergence, scale_by_t2=False
        ),
        s,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_loss_of_distillation_trainer(example, beta):
    """From hidden states and the weights of the last layer; ours from the logits that they make."""
    module = example("trl.trainer.distillation_trainer")
    hidden, taught, labels = batch(torch.float32, classes=WIDTH)  # they compute in it alone
    weights, teacher_weights, bias = torch.randn(3, C, WIDTH, generator=torch.Generator())
    bias = bias[:, 0]

    def theirs(x):
        return module._chunked_divergence_loss(
            x,
            taught,
            weights,
            teacher_weights,
            labels != -100,
            beta,
            num_items_in_batch=40,
            student_lm_head_bias=bias,
            student_logit_scale=0.5,
            teacher_logit_scale=2.0,
            student_final_logit_softcapping=5.0,
            teacher_final_logit_softcapping=5.0,
            temperature=1.5,
        )[0]

    def ours(x):
        return kd_loss(
            x @ weights.T,
            taught @ teacher_weights.T,
            labels,  # any class: there is no cross entropy
            temperature=1.5,
            alpha=1.0,
            divergence="jsd",
            beta=beta,
            scale_by_t2=False,
            num_items=40,
            logit_bias=(bias, None),
            logit_scale=(0.5, 2.0),
            logit_softcap=5.0,
        )

    check_equal(theirs, ours, hidden)


gradient_checkpointing = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")


@gradient_checkpointing  # which TRL sets by a name that Transformers has deprecated
def test_the_example_learns(example):
    before, after = example("trl_gkd").main()
    assert after < before / 4


@gradient_checkpointing
def test_the_example_trains_as_gkd_trainer(example, in_double, tmp_path):
    trl_gkd, causal_lm = example("trl_gkd"), example("transformers_causal_lm")
    torch.manual_seed(0)
    untrained, teacher = causal_lm.llama(width=16), causal_lm.llama(width=32)
    data = trl_gkd.Dataset.from_dict({"tokens": causal_lm.sequences(32)}).with_format("torch")
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    args = trl_gkd.GKDConfig(
        str(tmp_path),
        lmbda=0.0,
        bf16=False,
        num_train_epochs=1,
        learning_rate=0.05,
        optim="sgd",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        **quiet,
    )
    trained = []
    for trainer_class in (trl_gkd.FusedGKDTrainer, trl_gkd.GKDTrainer):
        student = copy.deepcopy(untrained)
        given = (student, teacher, args, trl_gkd.collate_rows, data)
        trainer_class(*given, processing_class=trl_gkd.tokenizer()).train()
        trained.append(torch.nn.utils.parameters_to_vector(student.parameters()).detach())
    ours, theirs = trained
    before = torch.nn.utils.parameters_to_vector(untrained.parameters()).detach()
    assert (ours - theirs).norm() <= 1e-9 * (theirs - before).norm()
