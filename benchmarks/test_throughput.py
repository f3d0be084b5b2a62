"""Fused against eager PyTorch, forward + backward: ``pytest benchmarks``."""

from __future__ import annotations

import pytest
import torch

from benchmarks.providers import PROVIDERS, Case

# CIFAR-10, CIFAR-100 and ImageNet batches; a language model's; one with a large vocabulary.
SHAPES = [(128, 10), (128, 100), (128, 1000), (512, 32000), (256, 128256)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def case(request):
    return Case(*request.param, temperature=4.0, dtype=torch.float32)


@pytest.mark.parametrize("provider", [*PROVIDERS, "copy_floor"])
def test_forward_backward(benchmark, case, provider):
    benchmark.group = f"{tuple(case.student.shape)} float32, forward + backward"
    step = case.copy_three_arrays if provider == "copy_floor" else case.step(provider)
    iterations = 1 if case.student.numel() > 1e6 else 200
    benchmark.pedantic(step, rounds=7, warmup_rounds=2, iterations=iterations)
