"""timm's distillation task. What changes: ``forward`` computes both terms in one call. Labels are
classes: where mixup makes distributions of them keep the criterion, and replace the KL alone by
``kd_loss(student_logits, teacher_logits, temperature=T, alpha=1.0)``."""

import timm
import torch
from digits import CLASSES, loader
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from kdkernels import kd_loss


class FusedDistillationTask(LogitDistillationTask):
    """``criterion`` is an ``nn.CrossEntropyLoss``, with or without label smoothing."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student_logits = self.trainable_module(input)
        with torch.no_grad():
            input = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher_logits = self.teacher(input)
        weights = self.task_loss_weight + self.distill_loss_weight
        loss, soft, hard = kd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            alpha=self.distill_loss_weight / weights,
            label_smoothing=self.criterion.label_smoothing,
            return_terms=True,
        )
        return {
            "loss": weights * loss,
            "output": student_logits,
            "task_loss": hard,
            "kd_loss": soft,
        }


def network(name: str = "test_resnet") -> nn.Module:
    """One of timm's smallest, with random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES)


def main(device: str = "cpu") -> tuple[float, float]:
    """The loss of the first step and of the last."""
    criterion = nn.CrossEntropyLoss()
    task = FusedDistillationTask(
        network(), network("test_efficientnet"), criterion, task_loss_weight=0.3, temperature=4.0
    ).to(device)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for images, labels in loader():
        images = images.expand(-1, 3, -1, -1)  # the colours that timm's models expect
        loss = task(images.to(device), labels.to(device))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("loss {:.3f}, after training {:.3f}".format(*main(device)))
