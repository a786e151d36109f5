"""Models by folder, Hub name, or the name of an embedded tiny model. Safetensors only, no code from the checkpoint."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nabla_rl.models.policy import Policy
from nabla_rl.types import UserError

ASSETS = Path(__file__).parents[1] / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class PolicyOptions:
    """Which policy."""

    name: str = "words/tiny-policy"
    """Folder, Hub name, or embedded model (tiny-policy, tiny-student, tiny-strong)."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is bfloat16 on a GPU, float32 elsewhere."""
    system_prompt: str | None = None
    """System turn of the chat template; null is none."""
    trust_remote_code: bool = False
    """Permission to run Python code that comes with the checkpoint."""
    adapter: str | None = None
    """Folder of a PEFT adapter to merge into the weights; null is none."""


@dataclass(frozen=True)
class RewardOptions:
    """Which reward model."""

    name: str | None = "words/tiny-reward"
    """Folder, Hub name, or embedded model (tiny-reward, tiny-gold); null is no reward model."""
    kind: str = "sequence_classifier"
    """Kind of reward: sequence_classifier, likelihood, or the class path of your own."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is bfloat16 on a GPU, float32 elsewhere."""
    system_prompt: str | None = None
    """System turn of the reward model's chat template; null is none."""
    trust_remote_code: bool = False
    """Permission to run Python code that comes with the checkpoint."""
    taught: str | None = None
    """Copy that was taught its gradient, a model or an adapter's folder; null is none."""


def is_embedded(name: str | None) -> bool:
    """Whether a name is that of an embedded model, such as words/tiny-policy."""
    return bool(name) and not Path(str(name)).exists() and (ASSETS / str(name) / "config.json").is_file()


def qualified(name: str, family: str) -> str:
    """A model's name, with the family before the bare name of an embedded one: tiny-policy is words/tiny-policy."""
    return f"{family}/{name}" if "/" not in name and is_embedded(f"{family}/{name}") else name


def embedded_names() -> list[str]:
    """The embedded models."""
    return sorted(f"{file.parent.parent.name}/{file.parent.name}" for file in ASSETS.glob("*/*/config.json"))


def resolve_name(name: str) -> str:
    """The folder of an embedded model, or the name as it is."""
    return str(ASSETS / name) if is_embedded(name) else name


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type that "auto" stands for on a device."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[dtype]


def load_policy(
    name: str | PolicyOptions = "words/tiny-policy",
    *,
    device: torch.device | str | None = None,
    argument: str = "policy",
    **options: Any,
) -> Policy:
    """A frozen policy with its tokenizer.

    Args:
        name: A folder, a Hub name, or an embedded model such as "words/tiny-policy"; or all options at once.
        device: Where the weights are put; None is the GPU where there is one.
        argument: The setting that errors are about.
        options: Fields of `PolicyOptions`: dtype, adapter, system_prompt, trust_remote_code.

    Raises:
        UserError: There is no such model, or it cannot be loaded.
    """
    given = replace(name, **options) if isinstance(name, PolicyOptions) else PolicyOptions(name, **options)
    place = default_device() if device is None else torch.device(device)
    folder = resolve_name(given.name)
    model = load_weights(AutoModelForCausalLM, f"{argument}.name", folder, given, place)
    if given.adapter is not None:
        from nabla_rl.models.adapters import merge_adapter  # PEFT takes seconds to import

        model = merge_adapter(model, given.adapter, argument=f"{argument}.adapter")
    tokenizer = load_tokenizer(f"{argument}.name", folder, given.trust_remote_code)
    return Policy(model, tokenizer, system_prompt=given.system_prompt)


def load_classifier(
    name: str, options: RewardOptions, *, device: torch.device, argument: str = "reward.name"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with its tokenizer, on a device. `argument` is the setting that errors are about."""
    folder = resolve_name(name)
    model = load_weights(AutoModelForSequenceClassification, argument, folder, options, device)
    return model, load_tokenizer(argument, folder, options.trust_remote_code)


def load_tokenizer(argument: str, name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            argument, f"a tokenizer beside '{name}'", f"none ({_first_line(error)})", "Save one there."
        ) from error


def load_weights(
    auto: type, argument: str, name: str, options: PolicyOptions | RewardOptions, device: torch.device
) -> PreTrainedModel:
    """A model of one of transformers' auto classes, whole, from safetensors alone."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.exists() or name.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise UserError(
            argument, "a model folder with config.json", f"none at '{name}'", "Check the path, or give a Hub name."
        )
    if not looks_local:
        _check_hub(argument, name)
    try:
        model, info = auto.from_pretrained(
            name,
            dtype=resolve_dtype(options.dtype, device),
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise UserError(
            argument,
            "a folder, a Hub name or an embedded model",
            f"'{name}', which cannot be loaded ({_first_line(error)})",
            _similar(name) or "Check the name, or download it to a folder first.",
        ) from error
    # transformers fills what a checkpoint lacks with random weights and says so in a log only
    untrained = sorted(info["missing_keys"])
    if untrained:
        kind = "language model" if auto is AutoModelForCausalLM else "sequence classifier"
        raise UserError(
            argument,
            f"a trained {kind}",
            f"'{name}' without {', '.join(untrained[:3])} ({len(untrained)} missing in all)",
            f"Take a checkpoint of a {kind}.",
        )
    return model.to(device)


def _similar(name: str) -> str | None:
    """The advice where a name is nearly that of an embedded model."""
    known = embedded_names()
    close = get_close_matches(name, [*known, *(each.partition("/")[2] for each in known)], 1, 0.75)
    if not close:
        return None
    found = next(each for each in known if each == close[0] or each.endswith(f"/{close[0]}"))
    return f"Did you mean the embedded model {found}?"


def _check_hub(argument: str, name: str) -> None:
    """Ask the Hub for a model once or twice: the libraries keep asking for most of a minute before they give up.

    A model in the cache is not asked for. Whatever the Hub answers, the libraries deal with.
    """
    try:
        if is_offline_mode() or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        url = hf_hub_url(name, "config.json")
    except ValueError:  # no name that the Hub could have
        return
    for pause in (0.0, 1.0):
        time.sleep(pause)
        try:
            get_hf_file_metadata(url)
            return
        except Exception as error:  # the Hub's client changes its HTTP library, and so its errors, between versions
            failure = _connection_failure(error)
            if failure is None:
                return
    raise UserError(
        argument,
        "a folder, a Hub name or an embedded model",
        f"'{name}', which is no folder, not embedded, not in the cache, and the Hub cannot be reached "
        f"({url.split('/' + name)[0]}: {failure})",
        _similar(name) or "Check the name, connect, or download it to a folder first.",
    )


def _connection_failure(error: BaseException | None) -> OSError | None:
    """The socket's own error behind another one; None where the other side was reached."""
    while error is not None:
        if isinstance(error, (socket.gaierror, ConnectionError, TimeoutError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
