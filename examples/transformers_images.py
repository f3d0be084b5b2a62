"""Transformers, images: a ResNet teaches a MobileNet. What changes: ``DistillationTrainer`` for the
student, where the teacher had Transformers' own ``Trainer``."""

import tempfile

import torch
from digits import CLASSES, HELD_OUT, images_and_labels
from torch import Tensor
from transformers import (
    EvalPrediction,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers_trainer import DistillationTrainer

from kdkernels import FusedKDLoss


def resnet() -> ResNetForImageClassification:
    small = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    config = ResNetConfig(num_channels=1, num_labels=CLASSES, layer_type="basic", **small)
    return ResNetForImageClassification(config)


def mobilenet() -> MobileNetV1ForImageClassification:
    small = {"image_size": 8, "depth_multiplier": 0.25, "classifier_dropout_prob": 0.0}
    config = MobileNetV1Config(num_channels=1, num_labels=CLASSES, **small)
    return MobileNetV1ForImageClassification(config)


def dataset() -> list[dict[str, Tensor]]:
    images, labels = images_and_labels()[:]
    return [{"pixel_values": i, "labels": y} for i, y in zip(images, labels, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main() -> float:
    """The accuracy of the student."""
    torch.manual_seed(0)
    data = dataset()
    train, held_out = data[:-HELD_OUT], data[-HELD_OUT:]
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 100, "num_train_epochs": 3, "learning_rate": 1e-2}
        quiet = {"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}
        args = TrainingArguments(folder, **options, **quiet)
        teacher = resnet()
        Trainer(teacher, args, train_dataset=train).train()
        trainer = DistillationTrainer(
            mobilenet(),
            args,
            train_dataset=train,
            eval_dataset=held_out,
            compute_metrics=accuracy,
            teacher=teacher,
            loss_fn=FusedKDLoss(temperature=4.0, alpha=0.9),
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # quicker with images of this size
    print(f"accuracy {main():.1%}")
