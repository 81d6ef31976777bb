"""What this machine can do for a fine-tune: the facts, and what follows from them, for `sloth doctor`.

`examine()` looks and never raises: what can't be found out becomes a sentence in its place. `advise()` draws
the conclusions from the facts alone, so that it can be tested for machines that aren't at hand.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, entry_points, version
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
# Packages that are imported, and the extra that installs each; None: it comes with torch, or by itself.
PACKAGES = {
    "torch": None,
    "triton": None,
    "transformers": "hf",
    "accelerate": "hf",
    "peft": "hf",
    "trl": None,
    "bitsandbytes": "quant",
}
# Trainers: the module that is installed, ours for it, and the extra.
ADAPTERS = {
    "HF Trainer": ("transformers", "sloth_hf_trainer", "hf"),
    "Axolotl": ("axolotl", "sloth_axolotl", "axolotl"),
    "Lightning": ("lightning", "sloth_lightning", "lightning"),
}
NEEDS = ("gpu", "triton", "hf", "trl", "quant", "cudnn-attention")
OLDEST = {"transformers": (5, 0), "trl": (1, 9), "peft": (0, 18), "bitsandbytes": (0, 48)}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Plain sentences; `broken` are those about what was asked for: an installed plugin, or a need."""

    works: tuple[str, ...]
    install: tuple[str, ...]
    broken: tuple[str, ...]


def examine(say: Callable[[str], None] = lambda _: None) -> Facts:
    """The facts, as JSON types; `say` is told before each slow part."""
    say("looking at torch and the GPU")
    facts: Facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts["torch"], facts["gpus"] = _torch()
    facts["driver"] = _driver()
    facts["packages"] = {}
    for name in PACKAGES:
        say(f"importing {name}")
        facts["packages"][name] = _package(name)
    facts["bitsandbytes"] = _bitsandbytes(facts)
    facts["triton"] = _triton()
    facts["attention"] = _tried(_attention)
    say("loading plugins")
    facts["plugins"], facts["kernels"] = _plugins()
    if facts["triton"]["why_not"] is None:
        say("compiling and running one Triton kernel")
        facts["triton"]["trial"] = _triton_trial()
    facts["adapters"] = {
        trainer: {"package": ours, "here": _findable(ours), "trainer_installed": _findable(theirs)}
        for trainer, (theirs, ours, _) in ADAPTERS.items()
    }
    return facts


def advise(facts: Mapping[str, Any], needs: tuple[str, ...] = ()) -> Advice:
    """What will work, what to install, and what is broken. `needs`, some of NEEDS, are asked for."""
    works: list[str] = []
    install: list[str] = []
    failing: dict[str, str] = {}
    packages, gpus = facts["packages"], facts["gpus"]

    def missing(name: str) -> str | None:
        """Why a package can't be used, or None."""
        package = packages[name]
        if package["version"] is None:
            return f"{name} is not installed"
        if package["problem"] is not None:
            return f"{name} {package['version']} can't be imported ({package['problem']})"
        oldest, found = OLDEST.get(name, ()), _numbers(package["version"])
        if found and found < oldest:
            return f"{name} {package['version']} is older than {'.'.join(map(str, oldest))}"
        return None

    # The GPU
    if gpus:
        works.append(f"torch {facts['torch']['version']} sees {_listed([gpu['name'] for gpu in gpus])}.")
    else:
        why = facts["torch"]["why_no_gpu"]
        failing["gpu"] = f"torch {facts['torch']['version']} sees no GPU: {why}."
        works.append(
            f"On this machine models run on the CPU ({why}): patching and verification work, but nothing "
            "gets faster."
        )
        if facts["driver"] is not None and facts["torch"]["cuda"] is None:
            install.append(
                f"A GPU driver ({facts['driver']}) is here, but torch {facts['torch']['version']} is built "
                "without CUDA: install a CUDA build of torch, see https://pytorch.org/get-started/locally/."
            )
        elif facts["driver"] is not None:
            install.append(
                f"torch is built for CUDA {facts['torch']['cuda']} and finds no GPU through the driver "
                f"{facts['driver']}: look at CUDA_VISIBLE_DEVICES, update the driver, or install a torch for "
                "an older CUDA."
            )

    # Triton
    triton = facts["triton"]
    why = triton["why_not"] or triton["trial"]
    if why is None and triton["interpreted"]:
        works.append(
            "TRITON_INTERPRET=1 is set: the Triton kernels run in Triton's interpreter, which is for tests "
            "and very slow."
        )
    elif why is None:
        works.append("The Triton kernels work: one was compiled and run here, with the right result.")
    else:
        failing["triton"] = f"The Triton kernels can't be used: {why}."
        works.append(
            f"The PyTorch references take the place of the Triton kernels ({why}): right, but not faster."
        )
    if gpus and why is not None:
        if packages["triton"]["version"] is None:
            install.append("For the Triton kernels: pip install triton.")
        elif triton["trial"] is not None:
            install.append(
                "Triton compiles a small C program when it starts: it needs a C compiler and Python's "
                "headers (on Debian and Ubuntu: apt install gcc python3-dev)."
            )

    # Trainers
    hf = missing("transformers") or missing("accelerate")
    adapter = facts["adapters"]["HF Trainer"]
    if hf is None and adapter["here"]:
        works.append(
            f"SlothCallback() in the HF Trainer of transformers {packages['transformers']['version']} "
            "(from sloth_hf_trainer import SlothCallback)."
        )
    else:
        why = hf or "the package sloth_hf_trainer is not importable"
        failing["hf"] = f"The HF Trainer can't be accelerated: {why}."
        install.append(f"For the HF Trainer: pip install 'sloth-plugins[hf]' ({why}).")
    if (why := missing("trl") or failing.get("hf")) is None:
        works.append(
            f"SlothCallback() in the SFT, DPO and GRPO trainers of trl {packages['trl']['version']}."
        )
    else:
        failing["trl"] = f"TRL can't be accelerated: {why.rstrip('.')}."
        if missing("trl") is not None:
            install.append(f"For TRL: pip install 'trl>=1.9' ({missing('trl')}).")
    if (why := missing("peft")) is None:
        works.append(f"LoRA with peft {packages['peft']['version']}.")
    else:
        install.append(f"For LoRA: pip install 'sloth-plugins[hf]' ({why}).")
    for trainer in ("Axolotl", "Lightning"):
        adapter = facts["adapters"][trainer]
        if adapter["trainer_installed"] and not adapter["here"]:
            works.append(
                f"{trainer} is installed, and this version of sloth-plugins has no adapter for it: call "
                "sloth_plugins.accelerate(model) before the optimizer is built."
            )
        elif adapter["trainer_installed"]:
            works.append(f"{trainer}, through {adapter['package']}.")

    # bitsandbytes
    bitsandbytes = facts["bitsandbytes"]
    if (why := missing("bitsandbytes")) is not None:
        failing["quant"] = f"4-bit models can't be loaded: {why}."
        install.append(f"For 4-bit models (QLoRA): pip install 'sloth-plugins[quant]' ({why}).")
    elif gpus and not bitsandbytes["cuda_build"]:
        failing["quant"] = f"4-bit models can't be loaded: {bitsandbytes['why_not']}."
        install.append(
            f"For 4-bit models on this GPU: {bitsandbytes['why_not']}; run `python -m bitsandbytes` to see "
            "which CUDA library it looks for."
        )
    else:
        where = "on the GPU" if bitsandbytes["cuda_build"] and gpus else "on the CPU"
        works.append(
            f"4-bit models (QLoRA) {where}, with bitsandbytes {packages['bitsandbytes']['version']}."
        )

    # Attention
    attention = facts["attention"]
    if (problem := attention.get("problem")) is not None:
        failing["cudnn-attention"] = f"Which attention torch would choose could not be found out: {problem}."
    else:
        chosen = attention["chosen"]["causal"]
        works.append(
            f"Attention (SDPA) without a mask runs on {chosen}; cuDNN's: {attention['cudnn_attention']}."
        )
        if chosen != "CUDNN_ATTENTION" and not attention["cudnn_usable"]:
            failing["cudnn-attention"] = f"cuDNN attention: {attention['cudnn_attention']}."
        if (
            (loaded := attention["cudnn_loaded"])
            and (packaged := attention["cudnn_packaged"])
            and attention["cudnn_shadowed"]
        ):
            install.append(
                f"Another cuDNN ({loaded}, {attention['cudnn_library'] or 'path unknown'}) is loaded in "
                f"place of the one installed with torch ({packaged}): take it out of LD_LIBRARY_PATH."
            )

    # Plugins
    broken = [f"A plugin is broken: {problem}." for problem in facts["plugins"]["problems"]]
    broken += [failing[need] for need in needs if need in failing]
    return Advice(works=tuple(works), install=tuple(install), broken=tuple(broken))


def _torch() -> tuple[Facts, list[Facts]]:
    import torch

    facts: Facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "why_no_gpu": None,
    }
    gpus: list[Facts] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if torch.version.cuda is None and torch.version.hip is None:
            facts["why_no_gpu"] = "torch is built without CUDA"
        elif os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
            facts["why_no_gpu"] = "CUDA_VISIBLE_DEVICES hides every GPU"
        else:
            facts["why_no_gpu"] = _one_line(said[0].message) if said else "no driver or no GPU was found"
        return facts, gpus
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "bf16": properties.major >= 8,
            "free_bytes": None,
        }
        with contextlib.suppress(Exception):  # makes a context, for which a full GPU has no room
            gpu["free_bytes"] = torch.cuda.mem_get_info(index)[0]
        gpus.append(gpu)
    return facts, gpus


def _driver() -> str | None:
    """The NVIDIA driver's version; None where there is none, or where it can't be found out."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        if found:
            return found[0]
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text):
            return match[1]
    return None


def _package(name: str) -> Facts:
    """Version, and whether the import succeeds. What a package prints meanwhile is no part of our output."""
    try:
        found = version(name)
    except PackageNotFoundError:
        found = None
    if found is None and not _findable(name):
        return {"version": None, "problem": None}
    try:
        with _quiet():
            module = importlib.import_module(name)
    except Exception as error:
        return {"version": found or "of unknown version", "problem": _failure(error)}
    return {"version": found or str(getattr(module, "__version__", "of unknown version")), "problem": None}


def _bitsandbytes(facts: Mapping[str, Any]) -> Facts:
    package = facts["packages"]["bitsandbytes"]
    if package["version"] is None or package["problem"] is not None:
        return {"cuda_build": False, "why_not": package["problem"] or "it is not installed"}
    try:
        library = importlib.import_module("bitsandbytes.cextension").lib
        if type(library).__name__.startswith(
            "ErrorHandler"
        ):  # loading failed, and is reported at the first call
            return {"cuda_build": False, "why_not": "bitsandbytes could not load its native library"}
        cuda = bool(getattr(library, "compiled_with_cuda", False))
    except Exception as error:
        return {"cuda_build": False, "why_not": _failure(error)}
    return {"cuda_build": cuda, "why_not": None if cuda else "bitsandbytes loaded its library without CUDA"}


def _triton() -> Facts:
    """`why_not`: None where Triton can launch; `trial`: why a real launch failed, filled in later."""
    try:
        from sloth_kernels._library import INTERPRETED, triton_unavailable

        return {"why_not": triton_unavailable(), "interpreted": bool(INTERPRETED), "trial": None}
    except Exception as error:
        return {"why_not": _failure(error), "interpreted": False, "trial": None}


def _triton_trial() -> str | None:
    """Compile and run one small kernel, and compare its result; None where that is right.

    Importing Triton and finding a driver says little: the compiler that Triton calls may be missing.
    """
    import torch

    try:
        from sloth_kernels.rms_norm import rms_norm, rms_norm_reference

        from sloth_plugins.numerics import FORMULA_TOLERANCE, relative_error

        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 64, generator=generator).to(device)
        weight = torch.randn(64, generator=generator).to(device)
        with _quiet():
            got = rms_norm(x, weight, eps=1e-6)
        error = relative_error(got, rms_norm_reference(x.double(), weight.double(), eps=1e-6))
        if not error <= FORMULA_TOLERANCE[torch.float32]:
            return f"a trial kernel is wrong by {error:.1e}"
    except Exception as error:
        return f"a trial kernel failed: {_failure(error)}"
    return None


def _attention() -> Facts:
    """Which backend `scaled_dot_product_attention` would take in training, and how cuDNN's stands."""
    import torch
    from torch.nn.attention import SDPBackend

    members: Mapping[str, Any] = SDPBackend.__members__
    names = {int(member): name for name, member in members.items()}
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    q = torch.randn(1, 4, 128, 128, device=device, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, 128, 128, device=device, dtype=torch.bool).tril()
    backends: Any = torch.backends.cuda
    enabled = {
        "FLASH_ATTENTION": backends.flash_sdp_enabled(),
        "EFFICIENT_ATTENTION": backends.mem_efficient_sdp_enabled(),
        "MATH": backends.math_sdp_enabled(),
        "CUDNN_ATTENTION": backends.cudnn_sdp_enabled(),
    }
    facts: Facts = {
        "enabled": enabled,
        "forced": _forced(enabled),
        "chosen": {
            "causal": names[int(torch._fused_sdp_choice(q, q, q, None, 0.0, True))],
            "with a mask": names[int(torch._fused_sdp_choice(q, q, q, mask, 0.0, False))],
        },
        "cudnn_usable": False,
        **_cudnn(),
    }
    if not cuda:
        facts["cudnn_attention"] = "no GPU to run on"
        return facts
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parameters = backends.SDPAParams(q, q, q, None, 0.0, True, False)
        facts["cudnn_usable"] = bool(backends.can_use_cudnn_attention(parameters, debug=True))
    if facts["chosen"]["causal"] == "CUDNN_ATTENTION":
        facts["cudnn_attention"] = "chosen"
    elif not enabled["CUDNN_ATTENTION"]:
        facts["cudnn_attention"] = "switched off (torch.backends.cuda.enable_cudnn_sdp(True) switches it on)"
    elif facts["cudnn_usable"]:
        facts["cudnn_attention"] = (
            f"available, but shadowed by {facts['chosen']['causal']}, which torch asks first"
        )
    else:
        reason = _one_line(said[-1].message) if said else "torch gives no reason"
        facts["cudnn_attention"] = f"not usable ({reason})"
    return facts


def _forced(enabled: Mapping[str, bool]) -> str | None:
    """The one fused backend that is left where all the others were switched off, or None."""
    left = [name for name, on in enabled.items() if on and name != "MATH"]
    return left[0] if len(left) == 1 else "MATH" if not left and enabled["MATH"] else None


def _cudnn() -> Facts:
    """cuDNN as loaded, as installed beside torch, and whether the first is another one than the second."""
    import torch

    cudnn: Any = torch.backends.cudnn
    number = cudnn.version() if cudnn.is_available() else None
    loaded = packaged = library = None
    if number is not None:  # 91002 is 9.10.2, and 8907 was 8.9.7
        major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
        loaded = f"{major}.{rest // 100}.{rest % 100}"
        for distribution in distributions():
            if re.fullmatch(r"nvidia-cudnn-cu\d+", distribution.metadata["Name"] or ""):
                packaged = distribution.version
        with contextlib.suppress(OSError):
            maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
            library = next((line.split()[-1] for line in maps.splitlines() if "libcudnn" in line), None)
    shadowed = bool(loaded and packaged and _numbers(loaded)[:3] != _numbers(packaged)[:3])
    return {
        "cudnn_loaded": loaded,
        "cudnn_packaged": packaged,
        "cudnn_library": library,
        "cudnn_shadowed": shadowed,
    }


def _plugins() -> tuple[Facts, list[Facts]]:
    """The plugins, their origin and problems; and every kernel that they offer, with why it can't be used."""
    import torch

    from sloth_plugins.hookspecs import PROJECT
    from sloth_plugins.manager import BUILT_INS, default_manager

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sloth: ")  # the same problems stand in `manager.problems`
        manager = default_manager()
    origins = {point.name: point for point in entry_points(group=PROJECT)}
    loaded = []
    for name in manager.names():
        if name in BUILT_INS:
            origin = f"built in ({BUILT_INS[name]})"
        elif (point := origins.get(name)) is not None:
            source = point.dist
            origin = f"{source.name} {source.version} ({point.value})" if source else point.value
        else:
            origin = "registered by code"
        loaded.append({"name": name, "from": origin})
    problems = list(manager.problems)
    kernels: list[Facts] = []
    try:
        offered = manager.kernels()
    except Exception as error:
        problems.append(_failure(error))
        offered = []
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    for kernel in offered:
        try:
            why_not = kernel.unavailable()
        except Exception as error:
            why_not = _failure(error)
        if why_not is None and device_type not in kernel.device_types:
            why_not = f"it does not run on {device_type}"
        kernels.append(
            {
                "op": kernel.op,
                "name": kernel.name,
                "backend": kernel.backend,
                "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes),
                "usable": why_not is None,
                "why_not": why_not,
            }
        )
    return {"loaded": loaded, "disabled": sorted(manager.disabled), "problems": problems}, kernels


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor prints of what is imported or run inside."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _tried(probe: Callable[[], Facts]) -> Facts:
    try:
        return probe()
    except Exception as error:  # private interfaces of torch are asked here, and may change
        return {"problem": _failure(error)}


def _findable(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(value: object, length: int = 200) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "5.23.0.dev0" is (5, 23, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _listed(names: list[str]) -> str:
    counts = {name: names.count(name) for name in names}
    return ", ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items())
