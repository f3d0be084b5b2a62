"""Accelerate. What changes: the teacher is prepared in evaluation mode, out of DDP's sight, and one
call takes the place of the criterion. Its loss goes to ``accelerator.backward`` as any other."""

import torch
from accelerate import Accelerator
from digits import accuracy, loader, network, trained_teacher
from torch import nn

from kdkernels import FusedKDLoss


def train(student: nn.Module, teacher: nn.Module, loss_fn: nn.Module, epochs: int = 3) -> None:
    accelerator = Accelerator()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    student.train()
    student, optimizer, batches = accelerator.prepare(student, optimizer, loader())
    teacher = accelerator.prepare_model(teacher.eval(), evaluation_mode=True)
    for _ in range(epochs):
        for images, labels in batches:
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = loss_fn(student(images), teacher_logits, labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def main() -> float:
    """The accuracy of the student."""
    student = network(width=16)
    train(student, trained_teacher(), FusedKDLoss(temperature=4.0, alpha=0.9))
    return accuracy(student)


if __name__ == "__main__":
    print(f"accuracy {main():.1%}")
