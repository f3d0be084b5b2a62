"""Transformers' ``Trainer``. What changes: it is given a teacher, and its ``compute_loss`` is one
call, so that the student computes no loss of its own. The two examples beside it train with it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer


class DistillationTrainer(Trainer):
    def __init__(self, *args: Any, teacher: nn.Module, loss_fn: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_fn = loss_fn
        self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        features = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**features)
        with torch.no_grad():
            teacher_logits = self.teacher(**features).logits
        # The trainer counts the labels of all the micro-batches of a step, so that the loss is
        # that of one large batch. Where it does, it does not divide the loss by their number.
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # And of all the processes, over which DDP takes the mean of the gradients.
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        loss = self.loss_fn(
            outputs.logits, teacher_logits, inputs["labels"], num_items=num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss
