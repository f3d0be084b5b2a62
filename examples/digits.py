"""scikit-learn's digits, a student and a teacher trained on them: what the examples have in common.

In their place stand your own data and models; the loops are what the examples are about.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
HELD_OUT = 297  # of 1,797 images, for the accuracy


def images_and_labels() -> TensorDataset:
    """Images (1797, 1, 8, 8) from 0 to 1, labels (1797,)."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.get_default_dtype()).unsqueeze(1)
    return TensorDataset(images, torch.tensor(data.target))


def loader(batch_size: int = 100) -> DataLoader:
    """1,500 digits in batches, in the same order in every run."""
    train = TensorDataset(*images_and_labels()[:-HELD_OUT])
    generator = torch.Generator().manual_seed(0)
    return DataLoader(train, batch_size, shuffle=True, generator=generator)


def network(width: int) -> nn.Module:
    """Images to logits (N, 10); the same weights in every run."""
    torch.manual_seed(0)
    hidden = [nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, CLASSES))


def trained_teacher(epochs: int = 3) -> nn.Module:
    teacher, batches = network(width=256), loader()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in batches:
            F.cross_entropy(teacher(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return teacher


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the digits that no loader has."""
    images, labels = images_and_labels()[-HELD_OUT:]
    return (model.eval()(images).argmax(dim=-1) == labels).double().mean().item()
