"""Large gradients lie in memory that is kept from step to step: nobody else's, and given back."""

import copy
import io
import threading

import pytest
import torch

import kdkernels
from kdkernels import _cpu, kd_loss
from kdkernels.backends.cpu import KEPT_BYTES

ROWS, CLASSES = 4, KEPT_BYTES // 4 // 4  # as small as a kept gradient may be


@pytest.fixture(autouse=True)
def nothing_kept():
    kdkernels.empty_cache()
    yield
    kdkernels.empty_cache()


def gradient(seed, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, rows, CLASSES, generator=generator).unbind()
    x = s.requires_grad_()
    kd_loss(x, t, alpha=1.0).backward()
    return x.grad


def test_a_freed_gradient_makes_room_for_the_next():
    first = gradient(0)
    address = first.data_ptr()
    del first
    assert gradient(1).data_ptr() == address


def test_a_gradient_that_lives_is_left_alone():
    grads = [gradient(seed) for seed in range(3)]
    bits = [g.clone() for g in grads]
    assert len({g.data_ptr() for g in grads}) == 3
    del grads[1]
    for seed in range(3, 6):
        gradient(seed)
    assert torch.equal(grads[0], bits[0])
    assert torch.equal(grads[1], bits[2])


def test_a_view_keeps_its_memory():
    row = gradient(0)[1]
    bits = row.clone()
    gradient(1)
    assert torch.equal(row, bits)


def test_used_memory_gives_the_bits_of_fresh_memory():
    fresh = gradient(0).clone()
    gradient(1)
    assert torch.equal(gradient(0), fresh)


def test_two_blocks_are_kept_and_no_more():
    grads = [gradient(seed) for seed in range(4)]
    assert kdkernels.empty_cache() == 0
    grads.clear()
    assert kdkernels.empty_cache() == 2 * KEPT_BYTES
    assert kdkernels.empty_cache() == 0


@pytest.mark.parametrize("sizes", [(ROWS, 4 * ROWS), (4 * ROWS, ROWS)])
def test_a_block_that_is_too_small_or_much_too_large_is_not_taken(sizes):
    kept, asked = sizes
    address = gradient(0, rows=kept).data_ptr()
    assert gradient(1, rows=asked).data_ptr() != address


def test_a_gradient_is_a_tensor_like_any_other():
    grad = gradient(0)
    expected = grad.clone()
    assert grad.is_contiguous()
    assert not grad._is_view()
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    assert torch.equal(copy.deepcopy(grad), expected)
    assert torch.equal(grad.mul_(2), 2 * expected)
    weight = torch.zeros(ROWS, CLASSES, requires_grad=True)
    weight.grad = grad
    torch.optim.SGD([weight], lr=1.0).step()
    assert torch.equal(weight.detach(), -2 * expected)


def test_gradients_freed_by_several_threads():
    def work(seed):
        for step in range(5):
            grad = gradient(seed)
            bits = grad.clone()
            gradient(seed + 100 + step)
            if not torch.equal(grad, bits):
                wrong.append(seed)

    wrong = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_that_there_is_not_is_an_error_and_not_a_crash():
    with pytest.raises(MemoryError):
        _cpu.Memory(1 << 60)
