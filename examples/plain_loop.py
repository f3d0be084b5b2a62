"""A plain PyTorch loop. What changes: the teacher gives its logits without a gradient, and one call
takes the place of the criterion."""

import torch
from digits import accuracy, loader, network, trained_teacher
from torch import nn

from kdkernels import FusedKDLoss


def train(student: nn.Module, teacher: nn.Module, loss_fn: nn.Module, epochs: int = 3) -> None:
    batches = loader()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)  # not the teacher's
    student.train()
    teacher.eval()  # else its batch norm would go on learning
    for _ in range(epochs):
        for images, labels in batches:
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = loss_fn(student(images), teacher_logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> float:
    """The accuracy of the student."""
    student = network(width=16)
    train(student, trained_teacher(), FusedKDLoss(temperature=4.0, alpha=0.9))
    return accuracy(student)


if __name__ == "__main__":
    print(f"accuracy {main():.1%}")
