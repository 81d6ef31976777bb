"""SlothCallback in the plain HF Trainer: when it patches, that it changes only speed, and what it logs."""

from __future__ import annotations

import copy
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, ForwardCalls, forwards, relative_difference, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from sloth_hf_trainer import SlothCallback
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

import sloth_plugins as sloth
from sloth_plugins.numerics import FORMULA_TOLERANCE

GPU = torch.cuda.is_available()
LENGTH = 16
FAMILY = pytest.mark.parametrize("family", ["llama", "qwen3"])
# The sites of the tiny models, two layers each.
SITES = {
    "llama": {"rms_norm": 5, "gated_mlp": 2, "rope": 2, "linear_cross_entropy": 1},
    "qwen3": {"rms_norm": 5, "gated_mlp": 2, "qk_norm_rope": 6, "linear_cross_entropy": 1},
}
# A tiny model's with LoRA on every linear layer: four of an attention, and a whole MLP.
LORA_SITES = {
    family: {op: n for op, n in sites.items() if op != "gated_mlp"} | {"lora_linear": 8, "lora_mlp": 2}
    for family, sites in SITES.items()
}
FIGURES = {"sloth/tokens_per_s", "sloth/peak_bytes", "sloth/patched", "sloth/skipped"}
Row = dict[str, torch.Tensor]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not GPU,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    made = TrainingArguments(**{**settings, **changes})
    made._n_gpu = min(made.n_gpu, 1)  # on several it would be torch.nn.DataParallel, which is left alone
    return made


def rows(count: int = 16, length: int = LENGTH, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arithmetic_rows(count: int) -> list[Row]:
    """Sequences that go up in constant steps, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    start, step = (torch.randint(1, 8, (count, 1), generator=generator) for _ in range(2))
    ids = 3 + (start + step * torch.arange(LENGTH)) % 24
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def padded_rows(side: str) -> list[Row]:
    """Rows of different lengths with an attention mask and no loss on the padding."""
    padded = rows()
    for index, row in enumerate(padded):
        hole = slice(LENGTH - 1 - index % 6, None) if side == "right" else slice(0, 1 + index % 6)
        row["attention_mask"] = torch.ones(LENGTH, dtype=torch.long)
        for name, filler in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            row[name][hole] = filler
    return padded


def packed_rows() -> list[Row]:
    """Three documents a row, told apart by position ids that begin anew; no loss where one begins."""
    packed = rows()
    for row in packed:
        row["position_ids"] = torch.cat([torch.arange(n) for n in (3, LENGTH - 8, 5)])
        row["labels"][row["position_ids"] == 0] = -100
    return packed


def block_diagonal_rows() -> list[Row]:
    """Packed rows with the mask that keeps the documents apart spelt out: 1 x queries x keys, additive."""
    packed = packed_rows()
    for row in packed:
        document = (row["position_ids"] == 0).cumsum(0)
        allowed = (document[:, None] == document[None, :]).tril()
        row["attention_mask"] = torch.zeros(allowed.shape).masked_fill(
            ~allowed, torch.finfo(torch.float32).min
        )[None]
    return packed


def lora(model: Any, seed: int = 0) -> Any:
    """LoRA on every linear layer, with B away from zero so that every gradient is alive."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def trainer_for(
    folder: Path, model: Any, *callbacks: TrainerCallback, data: list[Row] | None = None, **changes: Any
) -> Trainer:
    source = (
        {"model_init": model}
        if callable(model) and not isinstance(model, torch.nn.Module)
        else {"model": model}
    )
    data = rows() if data is None else data
    return Trainer(
        **source,
        args=arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data[:6],
        callbacks=[*callbacks],
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ops(acceleration: sloth.Acceleration | None) -> dict[str, int]:
    """Patched sites by op, without the layers into which a residual addition and a norm are fused."""
    assert acceleration is not None and acceleration.active
    assert not acceleration.report.skipped, acceleration.report.skipped
    found = Counter(row.op for row in acceleration.report.patched)
    del found["add_rms_norm"]
    return dict(found)


# When it patches


@FAMILY
def test_patches_when_the_trainer_is_built(tmp_path: Path, family: str, kernel_calls: Counter[str]) -> None:
    callback = SlothCallback()
    trainer = trainer_for(tmp_path, tiny_model(family), callback)
    built = callback.acceleration
    assert ops(built) == SITES[family]
    kernel_calls.clear()
    trainer.train()
    assert callback.acceleration is built, "on_train_begin is idempotent"
    steps = 4
    assert kernel_calls["gated_mlp"] == 2 * steps and set(SITES[family]) <= set(kernel_calls)


def test_completes_when_training_begins_where_it_was_added_later(
    tmp_path: Path, kernel_calls: Counter[str]
) -> None:
    model = tiny_model("llama")
    trainer = trainer_for(tmp_path, model)
    callback = SlothCallback()
    trainer.add_callback(callback)
    assert callback.acceleration is None and not forwards(model)
    trainer.train()
    assert ops(callback.acceleration) == SITES["llama"]
    assert kernel_calls["gated_mlp"] >= 8
    assert trainer.state.log_history[0].keys() >= FIGURES


def test_model_init_gets_every_model_patched(tmp_path: Path, kernel_calls: Counter[str]) -> None:
    callback = SlothCallback()
    trainer = trainer_for(tmp_path, lambda: tiny_model("llama"), callback, max_steps=2)
    accelerations = [callback.acceleration]
    for _ in range(2):
        kernel_calls.clear()
        trainer.train()
        accelerations.append(callback.acceleration)
        assert ops(callback.acceleration) == SITES["llama"] and kernel_calls["gated_mlp"] >= 4
        assert callback.acceleration.model is trainer.model
    assert len({id(a) for a in accelerations}) == 3
    assert [a.active for a in accelerations if a] == [False, False, True], (
        "those of replaced models are undone"
    )


@pytest.mark.parametrize("later", [False, True], ids=["given to the Trainer", "added later"])
def test_evaluation_only(tmp_path: Path, later: bool, kernel_calls: Counter[str]) -> None:
    plain = trainer_for(tmp_path, tiny_model("llama")).evaluate()["eval_loss"]
    callback = SlothCallback()
    trainer = trainer_for(tmp_path, tiny_model("llama"), *([] if later else [callback]))
    if later:
        trainer.add_callback(callback)
    kernel_calls.clear()
    got = trainer.evaluate()["eval_loss"]
    assert ops(callback.acceleration) == SITES["llama"]
    assert kernel_calls["gated_mlp"] >= 2 * (2 if later else 3), (
        "no event comes before the first of the three batches"
    )
    assert relative_difference([got], [plain]) <= FORMULA_TOLERANCE[torch.float32]


def test_two_trainers_on_one_model_share_the_patches(tmp_path: Path, kernel_calls: Counter[str]) -> None:
    model = tiny_model("llama")
    first, second = SlothCallback(), SlothCallback()
    trainer_for(tmp_path, model, first).train()
    again = trainer_for(tmp_path, model, second)
    assert second.acceleration is first.acceleration
    kernel_calls.clear()
    again.train()
    assert second.acceleration is first.acceleration and kernel_calls["gated_mlp"] == 2 * 4


def test_one_callback_serves_one_trainer_after_another(tmp_path: Path, kernel_calls: Counter[str]) -> None:
    callback = SlothCallback()
    one, two = tiny_model("llama"), tiny_model("qwen3")
    first = trainer_for(tmp_path, one, callback)
    second = trainer_for(tmp_path, two, callback)
    assert not forwards(one) and ops(callback.acceleration) == SITES["qwen3"]
    for trainer, model, family in ((first, one, "llama"), (second, two, "qwen3")):
        kernel_calls.clear()
        trainer.train()
        assert callback.acceleration.model is model and ops(callback.acceleration) == SITES[family]
        assert kernel_calls["gated_mlp"] >= 8 and trainer.state.log_history[0].keys() >= FIGURES
    first.evaluate()
    assert callback.acceleration.model is one


# That it changes nothing but speed


def full(model: Any) -> Any:
    return model


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": dict(adapt=lora),
    "bf16 autocast": dict(bf16=True, precision=torch.bfloat16),
    "bf16 autocast, lora": dict(bf16=True, precision=torch.bfloat16, adapt=lora),
    "bf16 weights": dict(dtype=torch.bfloat16, precision=torch.bfloat16),
    "fp16 autocast": dict(fp16=True, precision=torch.float16, gpu=True),
    "accumulation": dict(gradient_accumulation_steps=2),
    "padding right": dict(data=padded_rows("right")),
    "padding left": dict(data=padded_rows("left")),
    "packing, sdpa": dict(data=packed_rows(), per_device_train_batch_size=1),
    "packing, eager": dict(data=packed_rows(), per_device_train_batch_size=1, attention="eager"),
    "packing, block-diagonal mask": dict(data=block_diagonal_rows()),
    "recompute": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "recompute, reentrant": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "recompute, lora": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, adapt=lora
    ),
}


@FAMILY
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.gpu if CASES[name].get("gpu") else ()) for name in CASES]
)
def test_trains_as_without_it(tmp_path: Path, family: str, case: str, kernel_calls: Counter[str]) -> None:
    changes = dict(CASES[case])
    adapt: Callable[[Any], Any] = changes.pop("adapt", full)
    precision, dtype = changes.pop("precision", torch.float32), changes.pop("dtype", torch.float32)
    attention, data = changes.pop("attention", "sdpa"), changes.pop("data", None)
    changes.pop("gpu", None)
    learning_rate = 1e-3  # so small that a few steps don't amplify a rounding

    def run(*callbacks: TrainerCallback) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = adapt(tiny_model(family, dtype=dtype, attn_implementation=attention))
        trainer = trainer_for(
            tmp_path, model, *callbacks, data=copy.deepcopy(data), learning_rate=learning_rate, **changes
        )
        kernel_calls.clear()
        trainer.train()
        return losses(trainer), model.state_dict()

    plain, plain_state = run()
    assert not kernel_calls
    callback = SlothCallback()
    got, state = run(callback)
    assert ops(callback.acceleration) == (LORA_SITES if adapt is lora else SITES)[family]
    again = "recompute" in case and not GPU  # which has room to keep all: a plan says so
    passes = changes.get("gradient_accumulation_steps", 1) * (2 if again else 1)
    assert kernel_calls["lora_mlp" if adapt is lora else "gated_mlp"] == 2 * 4 * passes
    assert relative_difference(got, plain) <= FORMULA_TOLERANCE[precision]
    assert list(state) == list(plain_state)
    frozen = [name for name in state if adapt is lora and "lora_" not in name]
    assert all(torch.equal(state[name], plain_state[name]) for name in frozen)
    assert not torch.isnan(torch.tensor(got)).any() and len(set(got)) == 4, "it did learn"


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch_compile=True leaves environment variables behind, which every later Trainer obeys."""
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@FAMILY
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(
    tmp_path: Path, family: str, backend: str, compiling: None, clock: TrainerCallback
) -> None:
    def run(*callbacks: TrainerCallback) -> Trainer:
        trainer = trainer_for(
            tmp_path,
            tiny_model(family),
            *callbacks,
            learning_rate=1e-3,
            torch_compile=True,
            torch_compile_backend=backend,
        )
        trainer.train()
        torch._dynamo.reset()
        return trainer

    plain = run()
    callback = SlothCallback()
    trainer = run(callback, clock)
    assert ops(callback.acceleration) == SITES[family]
    assert relative_difference(losses(trainer), losses(plain)) <= FORMULA_TOLERANCE[torch.float32]
    rates = [entry.get("sloth/tokens_per_s") for entry in trainer.state.log_history if "loss" in entry]
    assert rates == [2 * LENGTH] * 4, "tokens are counted outside the compiled graph"


@FAMILY
def test_undo_after_training_gives_the_same_forwards_and_bits(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    before = {name: module.forward.__func__ for name, module in model.named_modules()}
    assert not forwards(model)
    callback = SlothCallback()
    trainer = trainer_for(tmp_path, model, callback)
    trainer.train()
    assert forwards(model)
    callback.acceleration.undo()
    assert not forwards(model)
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == before
    untouched = tiny_model(family).to(model.device)
    untouched.load_state_dict(model.state_dict())
    ids = rows()[0]["input_ids"][None].to(model.device)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, untouched.eval()(input_ids=ids).logits)


# Checkpoints


def files(folder: Path) -> dict[str, list[str] | None]:
    """Every file below `folder`, with the keys of what is in it where it has keys."""
    found: dict[str, list[str] | None] = {}
    for path in sorted(folder.rglob("*")):
        keys = None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                keys = list(opened.keys())
        elif path.suffix == ".json":
            keys = list(json.loads(path.read_text()))
        if path.is_file():
            found[str(path.relative_to(folder))] = keys
    return found


@pytest.mark.parametrize("adapt", [full, lora], ids=["full", "lora"])
@pytest.mark.parametrize("first", [True, False], ids=["written with it", "resumed with it"])
def test_checkpoints_are_the_plain_trainers(tmp_path: Path, first: bool, adapt: Callable[[Any], Any]) -> None:
    def trainer(name: str, callback: bool) -> Trainer:
        model = adapt(tiny_model("llama"))
        callbacks = [SlothCallback()] if callback else []
        return trainer_for(
            tmp_path / name,
            model,
            *callbacks,
            save_strategy="steps",
            save_steps=2,
            learning_rate=1e-3,
            seed=1,
        )

    whole = trainer("plain", False)
    whole.train()
    written = trainer("mixed", first)
    written.train()
    checkpoint = tmp_path / "mixed" / "checkpoint-2"
    listed = files(tmp_path / "mixed")
    assert listed == files(tmp_path / "plain") and any("safetensors" in name for name in listed)
    resumed = trainer("mixed", not first)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert relative_difference(losses(resumed)[2:], losses(whole)[2:]) <= FORMULA_TOLERANCE[torch.float32]
    whole.save_model(str(tmp_path / "a"))
    resumed.save_model(str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    config = "adapter_config.json" if adapt is lora else "config.json"
    assert (tmp_path / "a" / config).read_bytes() == (tmp_path / "b" / config).read_bytes()


# What goes wrong


def test_data_parallel_leaves_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    args = arguments(tmp_path)
    assert args.device is not None
    args._n_gpu = 2
    callback = SlothCallback()
    with pytest.warns(UserWarning) as caught:
        trainer = Trainer(model=model, args=args, train_dataset=rows(), callbacks=[callback])
        trainer.train()
    ours = [str(w.message) for w in caught if str(w.message).startswith("sloth: ")]
    assert len(ours) == 1 and "torchrun" in ours[0]
    assert callback.acceleration is None and not forwards(model)
    assert type(trainer.model_wrapped).__name__ == "DataParallel" and len(losses(trainer)) == 4


def test_a_quantized_model_beside_idle_gpus_is_patched(tmp_path: Path) -> None:
    """The Trainer never wraps a 4-bit model in DataParallel, so other GPUs are no reason against it."""
    model = tiny_model("llama")
    model.is_loaded_in_4bit = True
    args = arguments(tmp_path)
    assert args.device is not None
    args._n_gpu = 2
    callback = SlothCallback()
    Trainer(model=model, args=args, train_dataset=rows(), callbacks=[callback])
    assert ops(callback.acceleration) == SITES["llama"]


def test_strict_names_the_skipped_site(tmp_path: Path) -> None:
    model = tiny_model("llama")
    norm = model.model.norm
    norm.forward = lambda x, own=norm.forward: own(x)
    with pytest.raises(sloth.SkippedSiteError, match=r"model\.norm"):
        trainer_for(tmp_path, model, SlothCallback(strict=True))
    assert list(forwards(model)) == ["model.norm"], "nothing stays half patched"
    with pytest.warns(UserWarning, match="1 sites are left"):
        trainer = trainer_for(tmp_path, model, SlothCallback())
    trainer.train()
    assert trainer.state.log_history[0]["sloth/skipped"] == 1


def test_a_failure_inside_is_one_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer_for(tmp_path, tiny_model("llama"))
    plain.train()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the survey fell over")

    monkeypatch.setattr(sloth, "accelerate", broken)
    with pytest.warns(UserWarning) as caught:
        trainer = trainer_for(tmp_path, tiny_model("llama"), SlothCallback())
        trainer.train()
        trainer.evaluate()
    ours = [str(w.message) for w in caught if str(w.message).startswith("sloth: ")]
    assert len(ours) == 1 and "RuntimeError: the survey fell over" in ours[0]
    assert losses(trainer) == losses(plain)
    with pytest.raises(RuntimeError, match="fell over"):
        trainer_for(tmp_path, tiny_model("llama"), SlothCallback(strict=True))


def test_bad_settings_are_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match=r"SlothCallback\(\).*'kernels'"):
        SlothCallback(kernel="triton")
    with pytest.raises(ValueError, match="kernels='cuda'"):
        SlothCallback(kernels="cuda")
    settings = sloth.Settings(kernels="torch")
    assert SlothCallback(settings, strict=True).settings == sloth.Settings(kernels="torch", strict=True)


def test_models_are_not_kept_alive(tmp_path: Path) -> None:
    """A search over model_init would run out of memory if the callback held every model that it has seen."""
    import weakref

    seen: list[Any] = []

    def make() -> Any:
        model = tiny_model("llama")
        seen.append(weakref.ref(model))
        return model

    trainer = trainer_for(tmp_path, make, SlothCallback(), max_steps=1)
    for _ in range(3):
        trainer.train()
    gc.collect()
    assert [reference() is not None for reference in seen] == [False] * 3 + [True]


# Figures


class Tracker(TrainerCallback):
    """Keeps what it is given in the moment that it is given it, as the trackers of report_to do."""

    instances: list[Tracker] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        Tracker.instances.append(self)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("later", [False, True], ids=["given to the Trainer", "added later"])
def test_figures_reach_trackers_and_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "sloth_tracker", Tracker)
    callback = SlothCallback()
    trainer = trainer_for(
        tmp_path,
        tiny_model("llama"),
        *([] if later else [callback]),
        report_to=["sloth_tracker"],
        eval_strategy="epoch",
    )
    tracker = Tracker.instances[-1]
    if later:
        trainer.add_callback(callback)
    order = trainer.callback_handler.callbacks
    assert later == (order.index(tracker) < order.index(callback))
    count = len(order)
    result = trainer.train()
    assert len(order) == count and order.count(callback) == 1
    history = trainer.state.log_history
    assert [
        {**logs, "step": entry["step"]} for logs, entry in zip(tracker.seen, history, strict=True)
    ] == history
    for entry in history:
        assert entry.keys() >= FIGURES or ("loss" not in entry and "train_loss" not in entry), entry
        assert not any(key.startswith("sloth/") for key in entry if "eval_loss" in entry)
    assert result.metrics.keys() >= FIGURES
    report = callback.acceleration.report
    assert history[0]["sloth/patched"] == len(report.patched) > 0 and history[0]["sloth/skipped"] == 0
    parameters = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert history[0]["sloth/peak_bytes"] > parameters
    assert all(entry["sloth/tokens_per_s"] > 0 for entry in history if "loss" in entry)
    json.dumps(history)


def test_the_peak_of_a_cpu_run_beside_a_gpu_is_the_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, logs = SlothCallback(), {"loss": 1.0}
    callback.acceleration = sloth.accelerate(tiny_model("llama"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 7)
    callback.on_log(TrainingArguments(tmp_path, use_cpu=True), TrainerState(), TrainerControl(), logs=logs)
    assert logs["sloth/peak_bytes"] > 2**20, "no byte of the model is on that GPU"


@pytest.mark.parametrize("adapt", [full, lora], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_tokens_are_counted_right(
    tmp_path: Path, clock: TrainerCallback, adapt: Callable[[Any], Any], checkpointing: bool
) -> None:
    accumulation, batch, logging_steps = 2, 2, 2
    trainer = trainer_for(
        tmp_path,
        adapt(tiny_model("llama")),
        clock,
        SlothCallback(),
        data=padded_rows("right"),
        gradient_accumulation_steps=accumulation,
        logging_steps=logging_steps,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    trainer.train()
    expected = accumulation * batch * LENGTH
    assert [e["sloth/tokens_per_s"] for e in trainer.state.log_history if "loss" in e] == [expected] * 2
    assert trainer.state.log_history[-1]["sloth/tokens_per_s"] == expected, "the summary covers the whole run"


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_without_a_budget_a_plan_takes_the_place_of_the_trainers_checkpointing(
    tmp_path: Path, theirs: bool, offloading: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within what the GPU has, of which a CPU is given some here; TRL's activation_offloading is kept."""
    monkeypatch.setattr(TrainingArguments, "activation_offloading", offloading, raising=False)
    monkeypatch.setattr("sloth_plugins.checkpointing.execute.usable_bytes", lambda device: 2**40)
    recomputed: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layers = kwargs["model"].model.layers
            recomputed.append(any(layer.gradient_checkpointing for layer in layers))

    changes: dict[str, Any] = dict(gradient_checkpointing=theirs)
    if theirs:
        changes["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    plain = trainer_for(tmp_path, tiny_model("llama"), Look(), **changes)
    plain.train()
    assert recomputed == [theirs] * 4
    recomputed.clear()
    callback = SlothCallback()
    trainer = trainer_for(tmp_path, tiny_model("llama"), Look(), callback, **changes)
    trainer.train()
    assert recomputed == [theirs and offloading] * 4
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-4)
    assert callback.acceleration is not None
    report = callback.acceleration.report
    assert ("left to the trainer" in report.checkpointing["chosen"]) == offloading
    assert ("gives way to the plan" in report.checkpointing["reason"]) == (theirs and not offloading)
    assert any("activation_offloading=True is kept" in note for note in report.notes) == offloading


def test_counting_survives_a_run_that_failed(tmp_path: Path, clock: TrainerCallback) -> None:
    class Stop(TrainerCallback):
        armed = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt

    stop = Stop()
    trainer = trainer_for(tmp_path, lambda: tiny_model("llama"), clock, SlothCallback(), stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stop.armed = False
    trainer.train()
    assert [e["sloth/tokens_per_s"] for e in trainer.state.log_history if "loss" in e] == [2 * LENGTH] * 4


def test_a_run_without_a_loss_log_still_reports(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, tiny_model("llama"), SlothCallback(), logging_strategy="no")
    trainer.train()
    (summary,) = trainer.state.log_history
    assert summary.keys() >= FIGURES


@pytest.mark.parametrize("show", [True, False])
def test_the_report_is_printed_once_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], show: bool
) -> None:
    trainer = trainer_for(tmp_path, tiny_model("llama"), SlothCallback(show_report=show))
    trainer.train()
    trainer.train()
    assert capsys.readouterr().err.count("sloth patched") == int(show)


# Fifty steps


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fifty_steps_stay_within_the_spread_of_eager(
    tmp_path: Path, family: str, dtype: torch.dtype, kernel_calls: Counter[str]
) -> None:
    """Eager runs that add up the same numbers in another order drift apart; patched runs drift no farther.

    The other orders: the rows of each batch permuted, and each batch in micro-batches that are accumulated.
    On a GPU the kernels are Triton's.
    """
    steps, batch = 50, 8
    data = arithmetic_rows(steps * batch)

    def permuted(by: int) -> list[Row]:
        return [data[step * batch + (by * row + 1) % batch] for step in range(steps) for row in range(batch)]

    def run(data: list[Row], *callbacks: TrainerCallback, micro: int = batch) -> torch.Tensor:
        trainer = trainer_for(
            tmp_path,
            tiny_model(family, dtype=dtype),
            *callbacks,
            data=data,
            max_steps=steps,
            learning_rate=3e-3,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
        )
        trainer.train()
        return torch.tensor(losses(trainer), dtype=torch.float64)

    eager = [
        run(data),
        *(run(permuted(by)) for by in (3, 5, 7)),
        *(run(data, micro=micro) for micro in (1, 2, 4)),
    ]
    spread = max((a - b).abs().max() for i, a in enumerate(eager) for b in eager[:i])
    assert not kernel_calls
    callback = SlothCallback()
    patched = run(data, callback)
    assert ops(callback.acceleration) == SITES[family] and kernel_calls["gated_mlp"] >= 2 * steps
    assert patched[-1] < 0.7 * patched[0], "it learns, so the runs had the chance to drift"
    print(f"drift {(patched - eager[0]).abs().max():.1e}, spread of eager {spread:.1e}")
    assert 0 < spread < 0.1 * eager[0][0]
    assert (patched - eager[0]).abs().max() <= spread


@FAMILY
def test_original_forwards_never_run(tmp_path: Path, family: str) -> None:
    callback = SlothCallback()
    trainer = trainer_for(tmp_path, tiny_model(family), callback)
    calls = ForwardCalls(callback.acceleration)
    with calls.watching():
        trainer.train()
    calls.check()
    assert calls.patched["model.norm"] == 4
