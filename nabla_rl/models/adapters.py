"""LoRA adapters by PEFT: put into a policy, switched off for the reference, saved with a card, merged for decoding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from nabla_rl.models.flops import FlopFormula
from nabla_rl.models.policy import Policy
from nabla_rl.types import UserError

FILES = ("adapter_config.json", "adapter_model.safetensors")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraOptions:
    """The adapter: W + (lora_alpha / r) B A with B = 0 at the start (Hu et al., 2021, Eq. 3; PEFT's names)."""

    r: int = 16
    """Rank of the update of each weight matrix."""
    lora_alpha: int = 32
    """Scale of the update, which is multiplied by lora_alpha / r."""
    target_modules: list[str] | str = ALL_LINEAR
    """Linear layers adapted, by name or end of name; all-linear is all but the output layer."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"lora.{name}", "at least 1", str(getattr(self, name)))

    @property
    def targets(self) -> list[str] | str:
        """The target modules with a single name as a list of one."""
        single = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        return [self.target_modules] if single else self.target_modules  # pyright: ignore

    def to_peft(self, base_name: str | None = None) -> LoraConfig:
        """The same as PEFT's config; without dropout, completions are sampled and scored by one distribution."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=self.targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_name,
        )


class Adapter:
    """The LoRA matrices inside a policy, the only weights of it that train.

    All passes of the policy go through the matrices while they are in it. Within `disabled()` the same policy is its
    own reference, without a second copy of the weights.

    Attributes:
        peft: The PEFT model around the policy's own. It is no part of the policy, but shares its modules.
        num_weights: Number of trainable weights.
    """

    def __init__(self, policy: Policy, peft: PeftModel):
        self.policy, self.peft = policy, peft
        self.num_weights = sum(weight.numel() for weight in self.parameters())
        policy.backbone.formula = FlopFormula.of(policy.backbone.model)
        self._start = self.state()

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights."""
        return [weight for weight in self.peft.parameters() if weight.requires_grad]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, the policy is the reference."""
        with self.peft.disable_adapter():
            yield

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU, by PEFT's names."""
        return {name: w.detach().cpu().clone() for name, w in get_peft_model_state_dict(self.peft).items()}

    def changed(self) -> bool:
        """Whether any weight differs from what it was when the adapter was put in."""
        now = self.state()
        return any(not torch.equal(now[name], weight) for name, weight in self._start.items())

    def remove(self) -> None:
        """Take the matrices out of the policy, which is then as it was before they were put in."""
        self.peft.unload()
        self.policy.backbone.formula = FlopFormula.of(self.policy.backbone.model)

    def save(self, folder: str | Path, card: str, *, section: str = "rl") -> Path:
        """Write the adapter as `PeftModel.from_pretrained` and vLLM read it, with `card` as its README.md.

        `section` is the group of options that errors name.

        Raises:
            UserError: no weight has changed (there is nothing to save), or one is not finite.
        """
        folder = Path(folder)
        if not self.changed():
            raise UserError(
                "the adapter",
                "weights that training has changed",
                f"none changed, so nothing is saved in {folder}",
                f"Take more steps, a larger {{{section}.learning_rate}}, or a reward that tells completions apart.",
            )
        if not all(torch.isfinite(weight).all() for weight in self.parameters()):
            raise UserError(
                "the adapter",
                "finite weights",
                f"NaN or infinity, so nothing is saved in {folder}",
                f"Lower {{{section}.learning_rate}}.",
            )
        self.peft.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)
        return folder


def build_adapter(model: PreTrainedModel, options: LoraOptions, *, seed: int = 0, argument: str) -> PeftModel:
    """Put fresh LoRA matrices into a sequence classifier, its score head left out, drawn from `seed` alone.

    Raises:
        UserError: a target matches no linear layer; `argument` is the group of options that it names.
    """
    check_targets(model, options.targets, argument=argument)
    config = LoraConfig(
        r=options.r, lora_alpha=options.lora_alpha, target_modules=options.targets, lora_dropout=0.0,
        exclude_modules=["score"], base_model_name_or_path=model.name_or_path,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # pyright: ignore


def attach_adapter(policy: Policy, options: LoraOptions, *, seed: int = 0, base_name: str | None = None) -> Adapter:
    """Put fresh LoRA matrices into a policy, drawn from `seed` alone.

    Raises:
        UserError: a target matches no linear layer, or is the output layer.
    """
    model = policy.backbone.model
    check_targets(model, options.targets)
    config = options.to_peft(base_name)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads names that transformers is leaving behind
        torch.manual_seed(seed)
        return Adapter(policy, get_peft_model(model, config))  # pyright: ignore


def check_targets(model: PreTrainedModel, targets: Sequence[str] | str, *, argument: str = "lora") -> None:
    """Refuse targets that match nothing, with the names that there are."""
    if targets == ALL_LINEAR:
        return
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if not targets:
        raise UserError(f"{argument}.target_modules", "at least one name", "none", "Use all-linear.")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"{argument}.target_modules",
                f"names of linear layers below the output layer ({known})",
                f"{target!r}, which matches none",
                "Use some of them, or all-linear.",
            )


def merge_adapter(model: PreTrainedModel, folder: str, *, argument: str = "policy.adapter") -> PreTrainedModel:
    """The model with a saved adapter added to its weights: decoding then costs what it did without.

    Raises:
        UserError: there is no adapter in the folder, or it belongs to another model.
    """
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(
            argument,
            "a PEFT adapter folder",
            f"no {missing[0]} in '{folder}'",
            "Give the adapter/ folder of an align run.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            merged = PeftModel.from_pretrained(model, folder).merge_and_unload()  # pyright: ignore
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = next((line.strip() for line in lines if "size mismatch" in line), lines[0])[:200]
        raise UserError(
            argument,
            "an adapter of this model",
            f"'{folder}', which does not fit ({found})",
            "Take the model that it was trained on.",
        ) from error
    return merged
