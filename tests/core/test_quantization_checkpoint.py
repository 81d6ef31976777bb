"""`sloth quantize`: an ordinary bitsandbytes checkpoint, the same after an interruption, or one sentence."""

from __future__ import annotations

import errno
import json
import pydoc_data.topics
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

import sloth_plugins as sloth
from sloth_plugins import cli
from sloth_plugins.quantization import Options, QuantizationPlan, quantize, run
from sloth_plugins.quantization.rounding import expand_tensors
from sloth_plugins.quantization.stream import Checkpoint, open_stream

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

WIDE = dict(hidden_size=64, intermediate_size=128, head_dim=16)
CPU = torch.device("cpu")


def texts(count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices("abcdefgh 12345", k=50)) for _ in range(count)]


def save(directory: Path, family: str = "llama", **changes: Any) -> Path:
    tiny_model(family, dtype=torch.bfloat16, **{**WIDE, **changes}).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two files of texts."""
    root = tmp_path_factory.mktemp("quantize")
    save(root / "model", num_hidden_layers=3)
    for name, seed in (("calibration", 1), ("held_out", 2)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(10, seed)))
    return root


def quantized(place: Path, out: Path, **options: Any) -> run.Result:
    model = options.pop("model", place / "model")
    own = {
        name: options.pop(name)
        for name in ("evaluation", "progress", "restart", "calibration")
        if name in options
    }
    calibration = own.pop("calibration", place / "calibration.jsonl")
    device = options.pop("device", "cpu")
    return quantize(model, out, calibration, options=Options(**options), device=device, **own)


def load(directory: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def dequantized(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_plain_transformers_loads_it_with_our_values(place: Path, tmp_path: Path) -> None:
    result = quantized(place, tmp_path / "out", budget=1.2, evaluation=[place / "held_out.jsonl"])
    assert not (tmp_path / "out.partial").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "sloth" not in json.dumps(config)
    assert config["quantization_config"]["llm_int8_skip_modules"] == result.plan.skip_modules
    model, original = load(tmp_path / "out"), load(place / "model")
    got = dequantized(model)
    assert set(got) == {choice.module for choice in result.plan.choices if choice.bits == 4}
    assert 0 < len(got) < len(result.plan.choices)
    for name, value in original.state_dict().items():
        if name.removesuffix(".weight") not in got:
            assert torch.equal(model.state_dict()[name], value), name  # what stays is what it was
    for name, value in got.items():
        original.get_submodule(name).weight.data = value
    ids = torch.tensor([[1, 10, 20, 30, 40]])
    with torch.no_grad():  # bitsandbytes' own matmul on a CPU rounds in another order
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0.05, atol=0.02)
    measured = result.evaluation["held_out.jsonl"]
    assert measured["original"]["kl"] == 0 and measured["original"]["top1"] == 1
    assert measured["sloth"]["kl"] < 0.3 * measured["uniform NF4"]["kl"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:the rounding kernel failed")
def test_on_a_gpu(place: Path, tmp_path: Path) -> None:
    """Loaded with the weights as expanded, better than uniform NF4, the same after an interruption."""
    pytest.importorskip("peft")
    options: dict[str, Any] = dict(budget=1.15, block_sizes=(64, 32), lora_init=8, device="cuda")
    result = quantized(place, tmp_path / "out", evaluation=[place / "held_out.jsonl"], **options)
    measured = result.evaluation["held_out.jsonl"]
    assert measured["sloth"]["kl"] < 0.3 * measured["uniform NF4"]["kl"]
    assert measured["sloth + lora_init"]["kl"] < measured["sloth"]["kl"]
    stored = Checkpoint(tmp_path / "out")
    got = dequantized(load(tmp_path / "out", device_map={"": 0}))
    assert set(got) == {choice.module for choice in result.plan.choices if choice.bits == 4}
    for name, value in got.items():
        key = f"{name}.weight"
        own = {k: stored.tensor(k) for k in stored.shapes if k == key or k.startswith(f"{key}.")}
        assert value.device.type == "cuda" and torch.equal(value.cpu(), expand_tensors(own, key)), name

    def interrupt(what: str, done: int, of: int) -> None:
        if (what, done) == ("calibrating", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(place, tmp_path / "again", progress=interrupt, **options)
    quantized(place, tmp_path / "again", **options)
    weights = [contents(tmp_path / name)["model.safetensors"] for name in ("out", "again")]
    assert weights[0] == weights[1]


def test_the_stream_computes_what_the_model_computes(place: Path) -> None:
    stream, whole = open_stream(place / "model", CPU, False)
    assert whole is None and all(p.is_meta for p in stream.layers.parameters())
    rows = [torch.tensor([[1, 10, 20, 30]]), torch.tensor([[1, 5, 6]])]
    hidden = stream.start(rows)
    for index in range(len(stream)):
        layer = stream.load(index)
        hidden = [stream.run(index, layer, states, row) for row, states in enumerate(hidden)]
    model = load(place / "model", dtype=torch.float32)
    for row, ids in enumerate(rows):
        with torch.no_grad():
            torch.testing.assert_close(stream.logits(hidden[row], row), model(ids).logits[0])
    assert all(p.is_meta for p in stream.layers.parameters())


RESUMABLE: dict[str, Any] = dict(budget=1.15, block_sizes=(64, 32), drift_share=0.5, samples=5)


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Path:
    quantized(place, place / "whole", **RESUMABLE, evaluation=[place / "held_out.jsonl"])
    return place / "whole"


@pytest.mark.parametrize("where", [("calibrating", 2), ("measuring sensitivity", 2), ("evaluating", 1)])
def test_interrupted_and_resumed_is_the_same(
    place: Path, uninterrupted: Path, tmp_path: Path, where: tuple[str, int]
) -> None:
    options = {**RESUMABLE, "evaluation": [place / "held_out.jsonl"]}

    def interrupt(what: str, done: int, of: int) -> None:
        if (what, done) == where:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantized(place, out, progress=interrupt, **options)
    finished = sorted(path.name for path in (tmp_path / "out.partial").glob("turn-0/layer-*"))
    assert not out.exists() and len(finished) == {"calibrating": 2, "evaluating": 3}.get(where[0], 0)
    quantized(place, out, **options)
    assert contents(out) == contents(uninterrupted)


def test_the_smallest_checkpoint_with_a_kl(place: Path, tmp_path: Path) -> None:
    """Found in turns, each of which an interrupted run goes on from; rows held back are not calibrated on."""
    evaluation = [place / "held_out.jsonl"]
    least = quantized(place, tmp_path / "least", sweeps=0, evaluation=evaluation)
    target = least.evaluation["held_out.jsonl"]["sloth"]["kl"] / 4
    options = dict(target_kl=target, sweeps=0, evaluation=evaluation)
    turns: list[int] = []

    def count(what: str, done: int, of: int) -> None:
        turns.append(done) if (what, done) == ("calibrating", 0) else None

    whole = quantized(place, tmp_path / "whole", progress=count, **options)
    assert whole.reached_kl is not None and 0.5 * target < whole.reached_kl <= target and len(turns) > 1
    assert 1.0 < whole.plan.ratio < 2 and any(choice.bits == 4 for choice in whole.plan.choices)
    assert whole.evaluation["held_out.jsonl"]["sloth"]["kl"] < 4 * target  # the held-back row is another
    turns.clear()

    def interrupt(what: str, done: int, of: int) -> None:
        count(what, done, of)
        if len(turns) == 2 and (what, done) == ("calibrating", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(place, tmp_path / "out", progress=interrupt, **options)
    assert (tmp_path / "out.partial/turn-1/plan.json").is_file()
    quantized(place, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "curve", [lambda e: 0.02 * e, lambda e: 0.9 * e, lambda e: e**2, lambda e: 5 * e**0.5]
)
@pytest.mark.parametrize("target", [1e-3, 0.05, 0.4])
def test_the_search_ends_with_at_most_the_target(curve: Callable[[float], float], target: float) -> None:
    """Whatever calibrated rounding leaves of what is expected, up to an expected KL of 3."""
    asked: list[float] = []

    def made(at: int, expected: float | None) -> Any:
        assert at == len(asked) < 40 and expected is not None
        asked.append(expected)
        size = 1.0 if expected >= 3 else 2.0
        plan = SimpleNamespace(total_bytes=size, uniform_bytes=1.0, expected_kl=expected)
        return SimpleNamespace(kl=curve(min(expected, 3)), plan=plan)

    found = run._search(made, target)
    assert found.kl <= target
    best = next((e / 1000 for e in range(3000, 0, -1) if curve(e / 1000) <= target), 0.0)
    assert found.kl >= 0.6 * min(target, curve(best)) and len(asked) < 30


def test_an_adapter_that_starts_where_the_original_was(place: Path, tmp_path: Path) -> None:
    """The checkpoint is the same without it, and a resumed run writes the same adapter."""
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = dict(budget=1.15, evaluation=[place / "held_out.jsonl"])
    plain = quantized(place, tmp_path / "plain", **options)
    for name in "ab":
        (tmp_path / name).mkdir()
    result = quantized(place, tmp_path / "a/out", lora_init=8, **options)
    figures = result.evaluation["held_out.jsonl"]
    assert figures["sloth"] == plain.evaluation["held_out.jsonl"]["sloth"]
    assert figures["sloth + lora_init"]["kl"] < 0.9 * figures["sloth"]["kl"]
    one, other = contents(tmp_path / "plain"), contents(tmp_path / "a/out")
    assert {name for name in one if one[name] != other[name]} == {run.REPORT}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "a/out/lora_init").iterdir()} == adapter

    def interrupt(what: str, done: int, of: int) -> None:
        if (what, done) == ("calibrating", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(place, tmp_path / "b/out", lora_init=8, progress=interrupt, **options)
    quantized(place, tmp_path / "b/out", lora_init=8, **options)
    assert contents(tmp_path / "b/out") == other
    written = [(tmp_path / name / "out/lora_init/adapter_model.safetensors").read_bytes() for name in "ab"]
    assert written[0] == written[1]
    model = peft.PeftModel.from_pretrained(
        load(tmp_path / "a/out"), tmp_path / "a/out/lora_init", is_trainable=True
    )
    assert sum(p.requires_grad for p in model.parameters()) == 3 * 7 * 2
    kept = [choice.module for choice in result.plan.choices if choice.bits == 16]
    for name in kept:  # in 16 bits: they begin as PEFT's own do
        module = model.get_base_model().get_submodule(name)
        assert not module.lora_B.default.weight.any() and module.lora_A.default.weight.any()
    assert kept


def test_a_kl_that_no_plan_reaches_is_said() -> None:
    """Linears whose own KL was measured as 0 do something together after all."""
    asked: list[float] = []

    def made(at: int, expected: float | None) -> Any:
        asked.append(expected or 0.0)
        left = expected if expected and expected > 1e-4 else 0.0
        plan = SimpleNamespace(total_bytes=2.0, uniform_bytes=1.0, expected_kl=left)
        return SimpleNamespace(kl=0.01 + left, plan=plan)

    with pytest.raises(ValueError, match=r"target_kl=0\.005: allowed is 0\.01 or more for this model"):
        run._search(made, 0.005)
    assert len(asked) < 40


def test_checkpoints_are_evaluated_as_they_are_stored(place: Path, tmp_path: Path) -> None:
    held_out, other = place / "held_out.jsonl", tmp_path / "other.txt"
    other.write_text("\n\n".join(texts(4, 3)))
    made = quantized(place, tmp_path / "out", budget=1.2, evaluation=[held_out, other])
    assert set(made.evaluation) == {"held_out.jsonl", "other.txt"}
    found = run.evaluate_checkpoints(
        place / "model", {"sloth": tmp_path / "out"}, {"a": held_out, "b": other}, device="cpu"
    )
    assert list(found.values()) == list(made.evaluation.values())
    with pytest.raises(ValueError, match="is quantized already"):
        run.evaluate_checkpoints(tmp_path / "out", {}, {"a": held_out}, device="cpu")


@pytest.mark.parametrize("stored", ["checkpoint", "plan"])
@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_trainers_fuse_what_it_wrote(place: Path, tmp_path: Path, stored: str, trainer: str) -> None:
    """A calibrated checkpoint, and a model that is quantized by a plan while it is loaded."""
    peft = pytest.importorskip("peft")
    if stored == "checkpoint":
        result = quantized(place, tmp_path / "out", budget=1.2)
        plan, model = result.plan, load(tmp_path / "out")
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
        plan = sloth.plan_quantization(place / "model", texts(10, 1), 1.2, tokenizer=tokenizer, device="cpu")
        model = load(place / "model", quantization_config=plan.to_bnb_config("float32"), dtype=torch.float32)
    assert set(dequantized(model)) == {choice.module for choice in plan.choices if choice.bits == 4}
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (8, 12))]
    if trainer == "hf":
        from sloth_hf_trainer import SlothCallback

        callback = SlothCallback(show_report=False)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[], save_strategy="no"
        )
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        report = callback.acceleration.report
    else:
        lightning = pytest.importorskip("lightning", reason="needs lightning")
        import sloth_lightning

        class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.lm = model

            def training_step(self, batch: Any, index: int) -> Any:
                return self.lm(**batch).loss

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)

        strategy = sloth_lightning.SlothStrategy(show_report=False)
        lightning.Trainer(
            strategy=strategy,
            accelerator="cpu",
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(Module(), torch.utils.data.DataLoader(rows, batch_size=2))
        (acceleration,) = strategy.accelerations
        report = acceleration.report
    done = Counter(patch.op for patch in report.patched)
    assert done["lora_linear"] >= 3 and done["lora_linear"] + done["lora_mlp"] >= 6


def test_another_run_does_not_go_on_from_its_files(place: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(place, tmp_path / "out", progress=interrupt)
    with pytest.raises(ValueError, match=r"out\.partial' is of a run with another model, text or option"):
        quantized(place, tmp_path / "out", sweeps=1)
    quantized(place, tmp_path / "out", sweeps=1, restart=True)


def test_skipped_names_do_not_take_others_with_them(tmp_path: Path, place: Path) -> None:
    model = save(tmp_path / "model", num_hidden_layers=12, hidden_size=64)
    keep = ("model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    result = quantized(place, tmp_path / "out", model=model, keep=keep, samples=2)
    assert result.plan.skip_modules == ["model.layers.1.self_attn.q_proj", keep[0], "lm_head"]
    assert len(dequantized(load(tmp_path / "out"))) == 12 * 7 - 2


def test_sizes_that_blocks_do_not_divide_stay(tmp_path: Path, place: Path) -> None:
    model = save(tmp_path / "model", intermediate_size=96)
    result = quantized(place, tmp_path / "out", model=model)
    kept = {choice.module: choice.reason for choice in result.plan.choices if choice.bits == 16}
    assert set(kept) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert all(reason.startswith("its 96 inputs are no multiple of 64") for reason in kept.values())
    assert result.plan.ratio == 1
    assert len(dequantized(load(tmp_path / "out"))) == 12


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),  # biases
        ("gemma3_text", {"num_hidden_layers": 6}),  # two kinds of masks and of rotary embeddings
        ("phi3", {}),  # joint projections
        ("qwen3_moe", {"moe_intermediate_size": 64}),  # experts, fused into 3-D parameters in transformers 5
    ],
)
def test_families(tmp_path: Path, place: Path, family: str, changes: dict[str, Any]) -> None:
    model = save(tmp_path / "model", family, **changes)
    result = quantized(place, tmp_path / "out", model=model, evaluation=[place / "held_out.jsonl"])
    assert (
        result.evaluation["held_out.jsonl"]["sloth"]["kl"]
        < 0.6 * result.evaluation["held_out.jsonl"]["uniform NF4"]["kl"]
    )
    loaded = load(tmp_path / "out")
    assert set(dequantized(loaded)) == {choice.module for choice in result.plan.choices if choice.bits == 4}
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.tensor([[1, 10, 20]])).logits).all()
    if family == "qwen3_moe":
        assert any("fused 3-D parameters" in note for note in result.notes)
        # Its files name each expert: the layers can't be read from them one by one.
        assert any(note.startswith("the model is in memory as a whole: ") for note in result.notes)


def test_several_shards_are_read_and_written(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(place, tmp_path / "one")
    load(place / "model").save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    monkeypatch.setattr(run, "_SHARD_BYTES", 50_000)
    quantized(place, tmp_path / "many", model=tmp_path / "sharded")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_peft_trains_on_it(tmp_path: Path, place: Path) -> None:
    peft = pytest.importorskip("peft")
    quantized(place, tmp_path / "out", samples=4)
    model = peft.get_peft_model(
        load(tmp_path / "out"), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = torch.tensor([[1, 10, 20, 30, 40, 50]])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = model(input_ids=ids, labels=ids).loss
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


# Bad input


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["quantize", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _written(text: str) -> Callable[[Path, Path], dict[str, Any]]:
    def make(place: Path, scratch: Path) -> dict[str, Any]:
        (scratch / "given.jsonl").write_text(text)
        return {"--calibration": scratch / "given.jsonl"}

    return make


def _already_quantized(place: Path, scratch: Path) -> dict[str, Any]:
    shutil.copytree(place / "model", scratch / "model")
    config = json.loads((scratch / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (scratch / "model/config.json").write_text(json.dumps(config))
    return {"model": scratch / "model"}


def _occupied(place: Path, scratch: Path) -> dict[str, Any]:
    (scratch / "full").mkdir()
    (scratch / "full/file").touch()
    return {"--out": scratch / "full"}


def _few_rows(place: Path, scratch: Path) -> dict[str, Any]:
    return {**_written('"some text"\n"more text"\n')(place, scratch), "--target-kl": 0.1}


WRONG: dict[str, tuple[Any, str]] = {
    "budget": ({"--budget": 0.9}, "budget=0.9: allowed is a ratio"),
    "no folder": ({"model": "/not/there"}, "'/not/there' does not exist"),
    "module": ({"--keep": "model.layers.0.mlp.down_prj"}, "Did you mean 'model.layers.0.mlp.down_proj'"),
    "no calibration": ({"--calibration": "/not/there.jsonl"}, "calibration='/not/there.jsonl' can't be read"),
    "empty calibration": (_written("\n\n"), "holds no text"),
    "broken line": (_written('{"text": "fine"}\n{"text": \n'), "line 2"),
    "no text": (_written('{"text": "fine"}\n\n{"words": "a"}\n'), 'line 3: {"words": "a"} is no text'),
    "one token": (_written('"a"\n'), "no text of two tokens or more"),
    "quantized": (_already_quantized, "quantized already: its config.json has .* quant_method 'gptq'"),
    "out": (_occupied, "is there already: allowed is a new directory"),
    "the same text": (
        lambda place, scratch: {"--evaluate": place / "calibration.jsonl"},
        "10 of its 10 are calibration texts too",
    ),
    "size": ({"--budget": "1KB"}, r"budget='1KB': allowed are \d+ bytes, uniform NF4's, or more"),
    "both": ({"--budget": 1.1, "--target-kl": 0.1}, "target_kl=0.1 with budget=1.1: allowed is one of them"),
    "few rows": (_few_rows, "gives 2 rows: target_kl needs 8 or more"),
    "rank": ({"--lora-init": 65}, "lora_init=65: allowed is a rank from 1 to 32"),
    "block size": ({"--block-sizes": 48}, r"block_sizes=\(48,\): allowed are 64, 32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_sentence(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = WRONG[name]
    values = given(place, tmp_path) if callable(given) else given
    arguments = {"--out": tmp_path / "out", "--calibration": place / "calibration.jsonl", **values}
    model = arguments.pop("model", place / "model")
    code, out, err = command(capsys, model, *(part for pair in arguments.items() for part in pair))
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and last.startswith("sloth: ") and "Traceback" not in err
    assert re.search(message, last), err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_or_gets_full(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match="1000 bytes are free there: needed are"):
            quantized(place, tmp_path / "out")
    plain = safetensors_torch.save_file

    def full(tensors: Any, path: Any, **options: Any) -> None:
        if "layer-00001" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_torch, "save_file", full)
        with pytest.raises(ValueError, match=r"the disk is full; .* goes on from there"):
            quantized(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantized(place, tmp_path / "out")
    quantized(place, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# The command


def test_the_command_prints_tables_and_json_and_draws(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (place / "model", "--calibration", place / "calibration.jsonl", "--budget", "1.1")
    evaluate = ("--evaluate", place / "held_out.jsonl")
    code, out, err = command(capsys, *arguments, *evaluate, "--out", tmp_path / "table")
    assert code == 0 and "calibrating: 3 layers" in err
    for part in ("uniform NF4", "On held-out text", "16 bits", "is finished"):
        assert part in out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "table/sloth_quantization.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = command(capsys, *arguments, *evaluate, "--out", tmp_path / "json", "--json")
    values = json.loads(out)
    assert (
        code == 0
        and values["ratio"] <= 1.1
        and set(values["evaluation"]["held_out.jsonl"])
        == {
            "original",
            "uniform NF4",
            "sloth",
        }
    )
    stored = json.loads((tmp_path / "json/sloth_quantization.json").read_text())
    assert stored["evaluation"] == values["evaluation"]
    assert QuantizationPlan.from_dict(values["plan"]).ratio == values["ratio"]


@pytest.mark.slow
def test_real_weights_and_text_of_another_kind(tmp_path: Path) -> None:
    """The first three layers of SmolLM2, calibrated on some of Python's documentation, measured on other."""
    from sloth_plugins import smollm2

    try:
        directory = smollm2.smollm2_dir()
    except smollm2.MissingPackageError as error:
        pytest.skip(str(error))
    load(directory, num_hidden_layers=3).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "model")
    topics = [pydoc_data.topics.topics[name][:800] for name in sorted(pydoc_data.topics.topics)]
    for name, some in (("calibration", topics[:16]), ("held_out", topics[40:44])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in some))
    result = quantized(tmp_path, tmp_path / "out", evaluation=[tmp_path / "held_out.jsonl"], sweeps=1)
    assert (
        result.evaluation["held_out.jsonl"]["sloth"]["kl"]
        < 0.6 * result.evaluation["held_out.jsonl"]["uniform NF4"]["kl"]
    )
