"""Models by folder, Hub name, or the name of an embedded tiny model. Safetensors only, no code from the checkpoint."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True)
class PolicyOptions:
    """Which policy."""

    name: str = "tiny-policy"
    """A folder, a Hub name, or an embedded model (tiny-policy, tiny-student, tiny-strong)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Weights' type; auto is bfloat16 on a GPU, float32 elsewhere. Logits and log-probabilities: float32 at least."""
    system_prompt: str | None = None
    """The system turn of the chat template."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for publishers you trust."""
    adapter: str | None = None
    """A PEFT adapter folder (what align.py writes) to add to the weights. null: none."""


@dataclass(frozen=True)
class RewardOptions:
    """Which reward model."""

    name: str | None = "tiny-reward"
    """A folder, a Hub name, or an embedded model (tiny-reward, tiny-gold; tiny-strong for likelihood). null: none."""
    kind: Literal["sequence_classifier", "likelihood"] = "sequence_classifier"
    """Reads a classifier's logit at the last token, or the log-likelihood under a stronger language model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """As for the policy."""
    system_prompt: str | None = None
    """The system turn of the reward model's own chat template."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for publishers you trust."""
    taught: str | None = None
    """A copy of the reward that was taught its gradient (tiny-taught, a folder, or a PEFT adapter's folder), for
    proposals by gradient."""


def resolve_name(name: str, family: str) -> str:
    """The folder of an embedded model, or the name as it is."""
    embedded = ASSETS / family / name
    return str(embedded) if embedded.is_dir() else name


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type that "auto" stands for on a device."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[dtype]


def load_policy(
    options: PolicyOptions, *, family: str, device: torch.device, argument: str = "model.policy.name"
) -> Policy:
    """A frozen policy with its tokenizer, on a device. `argument` is the option that errors name.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    name = resolve_name(options.name, family)
    model = _load(AutoModelForCausalLM, argument, name, options, device)
    if options.adapter is not None:
        from nabla_rl.models.adapters import merge_adapter  # PEFT takes seconds to import

        model = merge_adapter(model, options.adapter, argument=f"{argument.rpartition('.')[0]}.adapter")
    tokenizer = load_tokenizer(argument, name, options.trust_remote_code)
    return Policy(model, tokenizer, system_prompt=options.system_prompt)


def load_classifier(
    options: RewardOptions, *, family: str, device: torch.device, argument: str = "model.reward.name"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with its tokenizer, on a device. `argument` is the option that errors name."""
    assert options.name is not None
    name = resolve_name(options.name, family)
    model = _load(AutoModelForSequenceClassification, argument, name, options, device)
    return model, load_tokenizer(argument, name, options.trust_remote_code)


def load_tokenizer(argument: str, name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--{argument}: expected a tokenizer beside '{name}', found none ({_first_line(error)}). Save one there."
        ) from error


def _load(
    auto: type, argument: str, name: str, options: PolicyOptions | RewardOptions, device: torch.device
) -> PreTrainedModel:
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.exists() or name.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise UserError(
            f"--{argument}: expected a model folder with config.json, found none at '{name}'. Check the path, or give "
            "a Hub name."
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
            f"--{argument}: expected a folder, a Hub name or an embedded model, found '{name}', which cannot be "
            f"loaded ({_first_line(error)}). Check the name, or download it to a folder first."
        ) from error
    # transformers fills what a checkpoint lacks with random weights and says so in a log only
    untrained = sorted(info["missing_keys"])
    if untrained:
        kind = "language model" if auto is AutoModelForCausalLM else "sequence classifier"
        raise UserError(
            f"--{argument}: expected a trained {kind}, found '{name}' without {', '.join(untrained[:3])} "
            f"({len(untrained)} missing in all). Take a checkpoint of a {kind}."
        )
    return model.to(device)


def _check_hub(argument: str, name: str) -> None:
    """Ask the Hub for a model once or twice: the libraries go on asking for most of a minute before they give up.

    What is in the cache is not asked for. Whatever the Hub answers, the libraries deal with.
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
        f"--{argument}: expected a folder, a Hub name or an embedded model, found '{name}', which is no folder, not "
        f"embedded, not in the cache, and the Hub cannot be reached ({url.split('/' + name)[0]}: {failure}). Check "
        "the name, connect, or download it to a folder first."
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
