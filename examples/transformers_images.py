"""Transformers' ``Trainer``, for images: a ResNet teaches a MobileNet. What changes: the trainer is
given a teacher, and its ``compute_loss`` is one call, for which the model computes no loss itself."""

import tempfile
from typing import Any

import torch
from digits import CLASSES, HELD_OUT, images_and_labels
from torch import Tensor, nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from kdkernels import kd_loss


class DistillationTrainer(Trainer):
    loss_fn = staticmethod(kd_loss)

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        inputs = dict(inputs)  # the trainer needs the labels again
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        loss = self.loss_fn(outputs.logits, teacher_logits, labels, temperature=4.0, alpha=0.9)
        return (loss, outputs) if return_outputs else loss
