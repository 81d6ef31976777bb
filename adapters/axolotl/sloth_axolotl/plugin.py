"""SlothPlugin: see the package's docstring and adapters/axolotl/README.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from axolotl.integrations.base import BasePlugin, PluginManager
from torch import nn

import sloth_plugins as sloth
from sloth_axolotl import _dynamic
from sloth_axolotl.args import SlothOptions

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# An option of Axolotl or of its plugins that puts another kernel in a place -> what is then left alone.
THEIRS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*LORA_KERNELS[:3], "nvfp4_merge_aware"), ("lora_linear", "lora_mlp")),
    "liger_rope": ("rope", "qk_norm_rope"),
    **dict.fromkeys(("liger_rms_norm", "flash_attn_rms_norm"), ("rms_norm", "add_rms_norm", "qk_norm_rope")),
    "liger_layer_norm": ("layer_norm",),
    **dict.fromkeys(
        ("liger_glu_activation", "liger_swiglu", "flash_attn_fuse_mlp"), ("gated_mlp", "lora_mlp")
    ),
    **dict.fromkeys(
        (
            "liger_cross_entropy",
            "liger_fused_linear_cross_entropy",
            "chunked_cross_entropy",
            "cut_cross_entropy",
            "flash_attn_cross_entropy",
        ),
        ("head_loss",),
    ),
}

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _of_the_first(hook: Hook) -> Hook:
    """Do nothing in a second instance (the plugin may be listed under both names) or for an unlisted one.

    Axolotl keeps the plugins of an earlier config in the same process, and calls them.
    """

    @wraps(hook)
    def only_the_first(self: SlothPlugin, *args: Any, **kwargs: Any) -> Any:
        plugins = PluginManager.get_instance().plugins
        names = (args[0].get("plugins") or ()) if args else plugins
        listed = {str(name).replace(":", ".") for name in names}
        ours = (p for n, p in plugins.items() if isinstance(p, SlothPlugin) and n.replace(":", ".") in listed)
        return hook(self, *args, **kwargs) if next(ours, None) is self else None

    return only_the_first  # type: ignore[return-value]


class SlothPlugin(BasePlugin):  # type: ignore[misc]
    """Accelerates the model that Axolotl trains; what is called when stands in Axolotl's BasePlugin.

    It keeps nothing between the hooks: Axolotl may make it twice and load several models.
    Raises ValueError for a config that it can't serve, before anything is loaded.
    """

    @_of_the_first
    def get_input_args(self) -> str:
        """The class that Axolotl adds to its schema."""
        return "sloth_axolotl.args.SlothAxolotlArgs"

    @_of_the_first
    def register(self, cfg: Any) -> None:
        """See the raw config: refuse what can't work, and keep Axolotl from switching its kernels on."""
        _refuse(cfg)
        options = _options(cfg)
        if options.dynamic_4bit is not None:
            _dynamic.prepare(cfg, options.dynamic_4bit)
        ours = options.kernels != "off" and not {"lora_linear", "lora_mlp"} <= {*options.disable}
        # Axolotl switches them all on where none of them is given.
        if (ours or _no_gpu()) and cfg.get("adapter") and all(cfg.get(name) is None for name in LORA_KERNELS):
            for name in LORA_KERNELS:
                cfg[name] = False

    @_of_the_first
    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Without a GPU transformers refuses bf16 unless it is told so."""
        return {"use_cpu": True} if _no_gpu() else None

    @_of_the_first
    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """The last hook before Axolotl decides how to quantize: plan that, if it is asked for.

        Answers with Axolotl's own datasets where they were needed for it, so that they are loaded once.
        """
        options = _options(cfg)
        if options.dynamic_4bit is None or preprocess:
            return None
        return _dynamic.choose(cfg, options.dynamic_4bit, options.strict)

    @_of_the_first
    def pre_model_load(self, cfg: Any) -> None:
        """Refuse to load a model that should have a plan and has none."""
        if _options(cfg).dynamic_4bit is not None:
            _dynamic.require(cfg)

    @_of_the_first
    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        """See that the model is stored as planned."""
        options = _options(cfg)
        if options.dynamic_4bit is not None:
            _dynamic.check(cfg, options.dynamic_4bit, options.strict, model)

    @_of_the_first
    def pre_lora_load(self, cfg: Any, model: nn.Module) -> None:
        """Undo PEFT's cast of linears that stay in 16 bits to float32."""
        _dynamic.narrow(cfg, model)

    @_of_the_first
    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Patch, unless TRL will put the adapter on later."""
        from peft import PeftModel

        if cfg.merge_lora or (cfg.rl and cfg.adapter and not isinstance(model, PeftModel)):
            return
        _accelerate(model, settings_of(cfg)[0])

    @_of_the_first
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Patch what TRL built, complete the work when training begins, log figures, save the report."""
        from sloth_axolotl._callback import ReportingCallback

        handler = getattr(trainer, "callback_handler", None)
        if handler is None:
            _warn(f"{type(trainer).__name__} takes no callbacks: this run has no report and no figures")
            return
        if any(isinstance(callback, ReportingCallback) for callback in handler.callbacks):
            return
        settings, notes = settings_of(cfg)
        if (dynamic := _options(cfg).dynamic_4bit) is not None:
            notes.append(f"dynamic_4bit: {_dynamic.known(cfg, dynamic) or 'not planned, so uniform NF4'}")
        if isinstance(reference := getattr(trainer, "ref_model", None), nn.Module):
            _accelerate(reference, settings)
        callback = ReportingCallback(settings, notes, Path(cfg.output_dir))
        trainer.add_callback(callback)
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def _accelerate(model: nn.Module, settings: sloth.Settings) -> None:
    try:
        sloth.accelerate(model, settings)
    except sloth.SlothError:  # what the user asked for can't be done, in one sentence
        raise
    except Exception as error:  # an accelerator must never take a user's run down
        if settings.strict:
            raise
        _warn(f"the model is left as it is, because patching failed: {type(error).__name__}: {error}")


def _options(cfg: Mapping[str, Any]) -> SlothOptions:
    return SlothOptions.model_validate(cfg.get("sloth") or {})


def _warn(message: str) -> None:
    warnings.warn(f"sloth: {message}", stacklevel=4)


def settings_of(cfg: Mapping[str, Any]) -> tuple[sloth.Settings, list[str]]:
    """The Settings of a validated config, less what Axolotl's own options do; one line on each of those."""
    options = _options(cfg)
    disable, changes, notes = {*options.disable}, {}, []
    for name, ops in THEIRS.items():
        if not cfg.get(name):
            continue
        if ops == ("head_loss",):
            changes["head_loss"] = "off"
        else:
            disable |= {*ops}
        notes.append(f"{name}: true in the config is kept, so sloth leaves {', '.join(ops)} alone")
    offloads = {
        name: cfg.get(name) for name in ("activation_offloading", "layer_offloading") if cfg.get(name)
    }
    if isinstance(cfg.get("gradient_checkpointing"), str):
        offloads["gradient_checkpointing"] = cfg["gradient_checkpointing"]
    if offloads and options.checkpointing == "auto" and options.memory_budget_bytes is None:
        changes["checkpointing"] = "off"
        for name, value in offloads.items():
            shown = "true" if value is True else value
            notes.append(f"{name}: {shown} in the config is kept, so sloth plans no checkpointing of its own")
    if cfg.get("adapter") in ("lora", "qlora") and not any(cfg.get(name) for name in LORA_KERNELS):
        notes.append("Axolotl's own LoRA kernels are off; lora_mlp_kernel: true and its like keep them")
    return options.settings(disable=disable, **changes), notes


def _refuse(cfg: Mapping[str, Any]) -> None:
    """ValueError for what shards parameters so that no module has its own, and for contradictions."""
    if (stage := _zero_stage(cfg.get("deepspeed"))) == 3:
        raise ValueError(
            f"plugins: [sloth] with deepspeed: {cfg['deepspeed']!r} (ZeRO stage {stage}), which shards every "
            "parameter before it can be patched: use ZeRO 1 or 2, or fsdp_version: 2, or remove the plugin"
        )
    if (cfg.get("fsdp") or cfg.get("fsdp_config")) and str(
        cfg.get("fsdp_version") or (cfg.get("fsdp_config") or {}).get("fsdp_version")
    ) != "2":
        raise ValueError(
            "plugins: [sloth] with FSDP1 (fsdp or fsdp_config without fsdp_version: 2), which flattens the "
            "parameters that the patches use: set fsdp_version: 2, or remove the plugin"
        )
    options = cfg.get("sloth")
    if (
        isinstance(options, Mapping)
        and options.get("checkpointing") == "recompute"
        and cfg.get("gradient_checkpointing") is False
    ):
        raise ValueError(
            "checkpointing: recompute under sloth: and gradient_checkpointing: false contradict each other: "
            "remove one of the two keys"
        )


def _zero_stage(deepspeed: Any) -> int:
    """The ZeRO stage of Axolotl's `deepspeed:`, a mapping or the path of a JSON file; 0 where unknown."""
    if isinstance(deepspeed, str) and deepspeed:
        try:
            deepspeed = yaml.safe_load(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return 0
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, Mapping) else None
    return int((zero or {}).get("stage") or 0) if isinstance(zero or {}, Mapping) else 0


def _no_gpu() -> bool:
    return not torch.accelerator.is_available()
