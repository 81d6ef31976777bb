"""One callback that accelerates the model of a transformers Trainer; so of TRL, LLaMA-Factory and ms-swift.

    from sloth_hf_trainer import SlothCallback

    trainer = SFTTrainer(model, args=args, train_dataset=data, peft_config=lora, callbacks=[SlothCallback()])

The model is patched when the Trainer has been built (`on_init_end`, which sees PEFT models that TRL makes),
and the work is completed when training begins (for `model_init`, and for a callback that was added later).
Figures go through the Trainer's own log.
"""

from sloth_hf_trainer.callback import SlothCallback

__all__ = ["SlothCallback"]
