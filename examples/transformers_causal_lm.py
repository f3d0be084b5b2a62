"""Transformers, language models. What changes: ``DistillationTrainer`` in the place of ``Trainer``.
The labels stay as they are, -100 where nothing is to be learned: ``shift=1`` compares each with the
logits of the token before it, and copies no logits."""

import tempfile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers_trainer import DistillationTrainer

from kdkernels import FusedKDLoss

VOCABULARY, PROMPT = 32, 2


def llama(width: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": VOCABULARY}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(bos_token_id=None, eos_token_id=None, **sizes, **layers))


def sequences(number: int = 512) -> list[Tensor]:
    """Of 4 to 16 tokens, each of which says what the next is."""
    torch.manual_seed(0)
    lengths = torch.randint(4, 17, (number,)).tolist()
    tokens = [torch.randint(VOCABULARY, (number,))]
    for _ in range(max(lengths) - 1):
        tokens.append((5 * tokens[-1] + 3) % VOCABULARY)
    return [row[:length] for row, length in zip(torch.stack(tokens, 1), lengths, strict=True)]


def collate(batch: list[Tensor]) -> dict[str, Tensor]:
    """Padded at the end; neither the padding nor the prompt is to be learned."""
    padded = pad_sequence(batch, batch_first=True, padding_value=-100)
    labels = padded.clone()
    labels[:, :PROMPT] = -100
    mask = (padded != -100).long()
    return {"input_ids": padded.clamp_min(0), "attention_mask": mask, "labels": labels}


def main() -> tuple[float, float]:
    """The student's loss before and after."""
    data = sequences()
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 16, "num_train_epochs": 2, "learning_rate": 1e-2}
        quiet = {"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}
        args = TrainingArguments(folder, **options, **quiet)
        teacher = llama(width=32)
        Trainer(teacher, args, collate, data).train()
        loss_fn = FusedKDLoss(temperature=2.0, alpha=0.5, shift=1)
        trainer = DistillationTrainer(
            llama(width=16), args, collate, data, data, teacher=teacher, loss_fn=loss_fn
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # quicker with models of this size
    print("loss {:.3f}, after training {:.3f}".format(*main()))
