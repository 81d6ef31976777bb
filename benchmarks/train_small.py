"""Train a small Qwen3 from nothing, where no real model of a second family is at hand.

    python benchmarks/train_small.py TEXTS.jsonl OUT_DIR --minutes 15

A byte-level BPE tokenizer and a decoder of 11 million parameters, on texts as `sloth quantize` reads them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import tokenizers
import torch
import transformers

from sloth_plugins.quantization.texts import read_texts

ROW = 256
CONFIG = dict(
    vocab_size=4096,
    hidden_size=320,
    intermediate_size=960,
    num_hidden_layers=8,
    num_attention_heads=5,
    num_key_value_heads=5,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {ROW} tokens in a step")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    texts = read_texts(arguments.texts, None, "texts")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts, CONFIG["vocab_size"], special_tokens=["<|end|>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    random.shuffle(texts)
    ids = torch.tensor([i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    rows = ids[: len(ids) // ROW * ROW].view(-1, ROW)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.1, betas=(0.9, 0.95))
    began, step, average = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - began) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, (step + 1) / 50) * (1 - share)
        batch = rows[torch.randint(len(rows), (arguments.batch,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, average = step + 1, 0.98 * average + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0:
            seen = step * arguments.batch * ROW
            print(json.dumps({"step": step, "tokens": seen, "loss": round(average, 3)}), flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
