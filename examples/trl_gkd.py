"""TRL's GKD. What changes: one static method of ``GKDTrainer``; that of ``GOLDTrainer`` and
``IWOPDTrainer`` has the same name. TRL multiplies by no T² and leaves out what is labelled -100."""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers_causal_lm import VOCABULARY, collate, llama, sequences
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdkernels import kd_loss


def generalized_jsd_loss(
    student_logits: Tensor,  # (B, L, C)
    teacher_logits: Tensor,  # (B, L, C)
    labels: Tensor,  # (B, L)
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    return kd_loss(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        alpha=1.0,  # no cross entropy
        divergence="jsd",
        beta=beta,
        scale_by_t2=False,
        reduction={"batchmean": "mean", "sum": "sum"}[reduction],
        num_items=num_items_in_batch,
    )


class FusedGKDTrainer(GKDTrainer):
    generalized_jsd_loss = staticmethod(generalized_jsd_loss)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each token. TRL asks for a tokenizer also where the data has tokens."""
    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


def collate_rows(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return collate([row["tokens"] for row in rows])


def main() -> tuple[float, float]:
    """The loss before and after training."""
    data = sequences()
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 16, "num_train_epochs": 2, "learning_rate": 1e-2}
        quiet = {"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}
        teacher = llama(width=32)
        Trainer(teacher, TrainingArguments(folder, **options, **quiet), collate, data).train()
        # lmbda 0: nothing is sampled. TRL's defaults need a GPU that has bfloat16.
        args = GKDConfig(folder, lmbda=0.0, bf16=False, **options, **quiet)
        data = Dataset.from_dict({"tokens": data}).with_format("torch")
        trainer = FusedGKDTrainer(
            llama(width=16), teacher, args, collate_rows, data, data, processing_class=tokenizer()
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # quicker with models of this size
    print("loss {:.3f}, after training {:.3f}".format(*main()))
