"""What the tests of the GPU backends compare."""

import torch
from test_numerics import GRAD_BOUND

from kdkernels import kd_loss


def value_and_grad(backend, s, t, y=None, incoming=None, **options):
    """Loss, both terms and the gradient."""
    x = s.detach().requires_grad_()
    terms = kd_loss(x, t, y, return_terms=True, backend=backend, **options)
    incoming = torch.ones_like(terms.loss) if incoming is None else incoming
    (grad,) = torch.autograd.grad(terms.loss, x, incoming)
    return *(term.detach() for term in terms), grad


def assert_same_bits(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def assert_close(grad, truth):
    error = (grad.double() - truth).norm()
    assert error <= GRAD_BOUND[grad.dtype] * truth.norm() + 1e-30
