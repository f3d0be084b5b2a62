"""PyTorch Lightning. What changes: the module holds the teacher where Lightning does not see it,
and one call takes the place of the criterion in ``training_step``."""

import lightning
import torch
from digits import accuracy, loader, network, trained_teacher
from torch import Tensor, nn

from kdkernels import FusedKDLoss


class Distillation(lightning.LightningModule):
    def __init__(self, student: nn.Module, teacher: nn.Module, loss_fn: nn.Module) -> None:
        super().__init__()
        self.student, self.loss_fn = student, loss_fn
        # In a list it is no submodule: not in the checkpoints, nor in what DDP wraps.
        self.teacher = [teacher.eval()]

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            teacher_logits = self.teacher[0](images)
        return self.loss_fn(self.student(images), teacher_logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)


def train(student: nn.Module, teacher: nn.Module, loss_fn: nn.Module, epochs: int = 3) -> None:
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(Distillation(student, teacher, loss_fn), loader())


def main() -> float:
    """The accuracy of the student."""
    student = network(width=16)
    train(student, trained_teacher(), FusedKDLoss(temperature=4.0, alpha=0.9))
    return accuracy(student)


if __name__ == "__main__":
    print(f"accuracy {main():.1%}")
