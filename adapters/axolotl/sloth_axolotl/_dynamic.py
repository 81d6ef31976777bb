"""`dynamic_4bit:` which linears of a QLoRA run stay in 16 bits, chosen before Axolotl loads the model.

Axolotl makes its BitsAndBytesConfig from `bnb_config_kwargs`, after the datasets are loaded and before
`pre_model_load`. So a plan that is there already is set when the config is registered, which every command
does, and `load_datasets`, which training alone calls, measures one.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from axolotl.integrations.base import BasePlugin, PluginManager
from torch import nn

import sloth_plugins as sloth
from sloth_axolotl.args import Dynamic4bit
from sloth_plugins.quantization.run import check_model
from sloth_plugins.quantization.texts import read_texts

PLAN = "sloth_quantization_plan.json"
SKIPS = "llm_int8_skip_modules"
WHERE = "dynamic_4bit under sloth:"
# Below this name, because Axolotl prints no other's lines.
LOG = logging.getLogger("axolotl.sloth")

T = TypeVar("T")


def prepare(cfg: Any, options: Dynamic4bit) -> None:
    """Use the plan that is given or that an earlier run saved. ValueError for what can't work."""
    if not cfg.get("merge_lora") and not (cfg.get("adapter") == "qlora" and cfg.get("load_in_4bit")):
        raise ValueError(
            f"{WHERE} with adapter: {cfg.get('adapter')!r} and load_in_4bit: {cfg.get('load_in_4bit')!r}: "
            "needed are adapter: qlora and load_in_4bit: true, for it chooses among linears in 4 bits"
        )
    if options.calibration is not None and not Path(options.calibration).is_file():
        raise ValueError(f"{WHERE} calibration: {options.calibration!r} is no file")
    plan = known(cfg, options)
    theirs = (cfg.get("bnb_config_kwargs") or {}).get(SKIPS)
    if theirs is not None and (plan is None or [*theirs] != plan.skip_modules):
        raise ValueError(
            f"bnb_config_kwargs: {SKIPS} and {WHERE} both say which linears stay in 16 bits: name yours as "
            "keep: under dynamic_4bit, or remove one of the two"
        )
    if plan is None:
        return
    _use(cfg, plan)
    if cfg.get("merge_lora") and cfg.get("merge_method") != "legacy" and _skip_lists() is None:
        warnings.warn(
            "sloth: dynamic_4bit: merge-lora of this Axolotl rounds every linear to NF4 before it adds the "
            "adapter, those that were kept in 16 bits too: merge_method: legacy rounds none",
            stacklevel=4,
        )


def known(cfg: Mapping[str, Any], options: Dynamic4bit) -> sloth.QuantizationPlan | None:
    """The plan that is given, or that lies beside the resumed checkpoint or in the output folder."""
    paths = [Path(options.plan)] if options.plan else [path for path in _places(cfg) if path.is_file()]
    try:
        plan = sloth.QuantizationPlan.load(paths[0]) if paths else None
        if plan is not None:
            plan.to_bnb_config()  # refuses blocks that only a checkpoint can have
    except ValueError as error:
        raise ValueError(f"{WHERE} {'plan: ' if options.plan else ''}{error}") from error
    return plan


def choose(cfg: Any, options: Dynamic4bit, strict: bool) -> Any:
    """Measure and save a plan, unless one is given or belongs to the checkpoint that training goes on from.

    Answers with Axolotl's datasets where the plan needed them, else None. Raises ValueError for a user's
    mistake; anything else that goes wrong leaves uniform NF4, with one warning, or is raised if `strict`.
    """
    plan = known(cfg, options) if options.plan or _resumes(cfg) else None
    if plan is not None:
        _on_main(partial(_save, cfg, plan))
        return None
    directory = _on_main(lambda: _directory(cfg))
    datasets = _datasets(cfg) if options.calibration is None else None
    plan = _on_main(lambda: _measured(cfg, options, strict, directory, datasets))
    _use(cfg, plan)
    return datasets


def require(cfg: Any) -> None:
    """ValueError where the model is about to be loaded in 4 bits and nobody could plan it."""
    if cfg.get("load_in_4bit") and SKIPS not in (cfg.get("bnb_config_kwargs") or {}):
        raise ValueError(
            f"{WHERE} {str(_places(cfg)[-1])!r} is not there, and only `axolotl train` measures a plan: "
            "train first, or give a saved one as plan:"
        )


def check(cfg: Any, options: Dynamic4bit, strict: bool, model: nn.Module) -> None:
    """Say so where the loaded model has other linears in 16 bits than the plan."""
    modules = dict(model.named_modules())
    wrong = [name for name in _skips(cfg) if name not in modules or _in_4_bits(modules[name])]
    if not wrong or not cfg.get("load_in_4bit"):
        return
    message = (
        f"{WHERE} {len(wrong)} linears that the plan keeps in 16 bits, such as {wrong[0]}, "
        f"{'are in 4 bits' if wrong[0] in modules else 'are not'} in {type(model).__name__}"
    )
    if options.plan:
        raise ValueError(f"{message}: {options.plan!r} is of another model")
    if strict:
        raise sloth.SlothError(message)
    warnings.warn(f"sloth: {message}", stacklevel=3)


def narrow(cfg: Any, model: nn.Module) -> None:
    """Cast the linears that a 4-bit model keeps in 16 bits back to the dtype that they were loaded in.

    PEFT's preparation for k-bit training casts everything in 16 bits to float32, which takes twice the bytes
    that a plan counts and, under autocast, computes the same. Meant are linears whose full dotted names are
    in the skip list, as in plans and in what `sloth quantize` writes; the head is Axolotl's affair.
    """
    dtype = cfg.get("torch_dtype")
    names = getattr(getattr(getattr(model, "config", None), "quantization_config", None), SKIPS, None) or ()
    if dtype not in (torch.bfloat16, torch.float16) or not cfg.get("load_in_4bit"):
        return
    trained = {*(cfg.get("lora_modules_to_save") or ())}
    for name, module in model.named_modules():
        listed = "." in name and name in names and name.rpartition(".")[2] not in trained
        if listed and isinstance(module, nn.Linear) and not _in_4_bits(module):
            module.to(dtype)


def _measured(
    cfg: Any, options: Dynamic4bit, strict: bool, directory: Path, datasets: Any
) -> sloth.QuantizationPlan | None:
    from axolotl.loaders import load_tokenizer

    own = _axolotls_own(cfg.get("model_config_type"))
    if own:
        raise ValueError(
            f"{WHERE} with a {cfg.get('model_config_type')} model, of which Axolotl keeps {', '.join(own)} "
            "in 16 bits by a list of its own: remove dynamic_4bit"
        )
    tokenizer = load_tokenizer(cfg)
    _places(cfg)[-1].unlink(missing_ok=True)  # of an earlier training with perhaps other text
    try:
        texts = (
            read_texts(Path(options.calibration), tokenizer, "calibration")
            if options.calibration is not None
            else _rows(datasets.train_dataset, options.samples)
        )
        LOG.info("dynamic_4bit: measuring which linears gain most from 16 bits, layer by layer")
        plan = sloth.plan_quantization(
            directory,
            texts[: options.samples],
            options.budget,
            tokenizer=tokenizer,
            keep=options.keep,
            trust_remote_code=bool(cfg.get("trust_remote_code")),
        )
        plan.to_bnb_config()
        _save(cfg, plan)
    except ValueError as error:
        raise ValueError(f"{WHERE} {error}") from error
    except Exception as error:  # the run can go on as it would without us
        if strict:
            raise
        warnings.warn(
            f"sloth: dynamic_4bit: the model is loaded in uniform NF4, because planning failed: "
            f"{type(error).__name__}: {error}",
            stacklevel=4,
        )
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    LOG.info("dynamic_4bit: %s", plan)
    return plan


def _rows(dataset: Any, count: int) -> list[str | list[int]]:
    """Some of the training rows, as token ids, or as text where TRL will tokenize them."""
    if hasattr(dataset, "__len__"):  # rows may be sorted, and few of them are measured on
        picked = random.Random(0).sample(range(len(dataset)), min(count, len(dataset)))
        rows = [dataset[i] for i in picked]
    else:
        rows = [*itertools.islice(dataset, count)]
    found: list[str | list[int]] = []
    for row in rows:
        texts = [row.get("prompt"), row.get("chosen", row.get("completion"))]
        if (ids := row.get("input_ids")) is not None:
            found.append([int(i) for i in ids])
        elif all(isinstance(text, str) for text in texts):
            found.append("".join(texts))
        else:
            raise ValueError(
                f"the training rows hold no tokens and no text, only {', '.join(row)}: give calibration, "
                "a file"
            )
    return found


def _datasets(cfg: Any) -> Any:
    from axolotl.common.datasets import load_datasets, load_preference_datasets

    for name, plugin in PluginManager.get_instance().plugins.items():
        ours = type(plugin).__module__.startswith("sloth_axolotl.")
        if not ours and type(plugin).load_datasets is not BasePlugin.load_datasets:
            raise ValueError(
                f"{WHERE} the training rows may be those of the plugin {name}, which can't be asked twice: "
                "give calibration, a file"
            )
    return (load_preference_datasets if cfg.get("rl") else load_datasets)(cfg=cfg)


def _directory(cfg: Any) -> Path:
    """The base model's directory, downloaded as Axolotl would. ValueError for what can't be planned."""
    name = str(cfg.get("base_model"))
    directory = Path(name)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        try:
            directory = Path(
                snapshot_download(
                    name,
                    revision=cfg.get("revision_of_model"),
                    allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
                    ignore_patterns=["*/*", "consolidated*"],
                )
            )
        except Exception as error:
            raise ValueError(
                f"{WHERE} base_model: {name!r} is no directory, and its files are neither in the local cache "
                f"nor to be had from the hub: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    try:
        check_model(directory)
    except ValueError as error:
        raise ValueError(
            f"{WHERE} base_model: {error}; a model that is quantized already needs no dynamic_4bit"
        ) from error
    return directory


def _skip_lists() -> Callable[[str | None], list[str] | None] | None:
    """0.21's function of an architecture, which merge-lora uses too; 0.19 and 0.20 have none."""
    try:
        from axolotl.utils.nf4 import bnb_4bit_skip_modules
    except ImportError:
        return None
    return bnb_4bit_skip_modules  # type: ignore[no-any-return]


def _axolotls_own(model_type: str | None) -> list[str]:
    """The skip list that Axolotl has for this architecture, which ours would replace."""
    if (lists := _skip_lists()) is None:
        return ["out_proj"] if model_type == "falcon_h1" else []
    return lists(model_type) or []


def _on_main(make: Callable[[], T]) -> T:
    """What `make` gives on the main process, or its ValueError, in every process."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from axolotl.utils.distributed import init_distributed_state

        init_distributed_state()
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    # A group of its own: the others wait longer than NCCL's timeout allows, and need no device for it.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except ValueError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=group)
    dist.destroy_process_group(group)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]  # type: ignore[no-any-return]


def _places(cfg: Mapping[str, Any]) -> list[Path]:
    """Where a saved plan may lie; it is saved in the last."""
    resumed = cfg.get("resume_from_checkpoint")
    folders = [Path(resumed).parent] if isinstance(resumed, str) and resumed else []
    return [folder / PLAN for folder in (*folders, Path(cfg.get("output_dir") or "./model-out"))]


def _resumes(cfg: Mapping[str, Any]) -> bool:
    found = _places(cfg)[-1].parent.glob("checkpoint-*") if cfg.get("auto_resume_from_checkpoints") else ()
    return bool(cfg.get("resume_from_checkpoint") or any(found))


def _save(cfg: Mapping[str, Any], plan: sloth.QuantizationPlan) -> None:
    path = _places(cfg)[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    plan.save(partial)
    os.replace(partial, path)


def _use(cfg: Any, plan: sloth.QuantizationPlan | None) -> None:
    cfg["bnb_config_kwargs"] = {**(cfg.get("bnb_config_kwargs") or {}), SKIPS: plan and plan.skip_modules}


def _skips(cfg: Mapping[str, Any]) -> list[str]:
    return [*((cfg.get("bnb_config_kwargs") or {}).get(SKIPS) or ())]


def _in_4_bits(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "quant_state")
