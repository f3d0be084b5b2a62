"""Accuracy, cross entropy and the confusion of classes, over all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.train import distributed
from kdkernels.train.data import Labelled, as_dataset, batches
from kdkernels.train.errors import SetupError


@dataclass
class Evaluation:
    """Accuracy and mean cross entropy; ``confusion`` counts images by (true, predicted) class."""

    accuracy: float
    loss: float
    confusion: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Labelled, normalize: nn.Module | None = None, batch_size: int = 256
) -> Evaluation:
    """Look at all images once, in eval mode, shared by the processes that there are.

    Raises:
        SetupError: a label that is not a class of the model, or fewer images than processes.
    """
    dataset = as_dataset(data)
    distributed.same_buffers(model)
    model.eval()
    device, count = next(model.parameters()).device, len(dataset)
    if count < distributed.world_size():
        raise SetupError("there are fewer images to evaluate than processes")
    index = list(range(count))[distributed.rank() :: distributed.world_size()]
    parts = [index[i : i + batch_size] for i in range(0, len(index), batch_size)]
    loss = confusion = torch.zeros((), dtype=torch.float64, device=device)
    for images, labels, _ in batches(dataset, parts, 0):
        images, labels = images.to(device), labels.to(device)
        logits = model(images if normalize is None else normalize(images)).float()
        classes = logits.shape[1]
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise SetupError(f"labels to evaluate with must be in [0, {classes})")
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        pairs = (labels * classes + logits.argmax(1)).bincount(minlength=classes * classes)
        confusion = confusion + pairs
    square = distributed.sum(confusion).cpu().long().view(classes, classes)
    loss_sum = distributed.sum(loss).item()
    return Evaluation(square.diagonal().sum().item() / count, loss_sum / count, square)
