"""What every training of an adapter has in common: optimiser, checkpoints, metrics, and the count of what it cost."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from transformers.optimization import get_scheduler

from nabla_rl.adapters.config import AdapterConfig
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.functions import Text
from nabla_rl.types import UserError


class StepEnd(L.Callback):
    """Has the module finish its step before a checkpoint of it is saved."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand on, after the last batch of a step."""
        assert isinstance(pl_module, AdapterTraining)
        if (batch[0] + 1) % pl_module.settings.gradient_accumulation_steps == 0:
            pl_module.end_step()


class AdapterTraining(L.LightningModule):
    """Trains the adapter of a policy. The first entry of a batch is its number, counted from the run's start.

    Attributes:
        files: files of lines with a `step`, which are cut back to the checkpoint that a run goes on from.
        settings: how the weights are trained.
        policy, adapter: what is trained.
        ledger: what it costs.
        all_tokens, all_flops: of all processes, after each step.
    """

    strict_loading = False  # checkpoints hold the adapter alone  # pyright: ignore
    files: ClassVar[tuple[str, ...]] = ("metrics.jsonl",)

    def __init__(self, settings: AdapterConfig):
        super().__init__()
        self.settings = settings
        self.policy: Any = None
        self.adapter: Any = None
        self.run_dir: Path | None = None
        self.ledger = Ledger(1)
        self.flops_before, self.seconds_before, self.started = 0.0, 0.0, time.perf_counter()
        self.num_tokens, self.all_tokens, self.all_flops = 0.0, 0.0, 0.0
        self._metrics: list[dict[str, float]] = []

    def end_step(self) -> None:
        """At the end of an optimiser step, before it is saved."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """AdamW or plain descent on the adapter, with its schedule."""
        own, weights = self.settings, self.adapter.parameters()
        if own.optim == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(weights, lr=own.learning_rate)
        else:
            betas = (own.adam_beta1, own.adam_beta2)
            optimizer = torch.optim.AdamW(weights, lr=own.learning_rate, betas=betas, weight_decay=own.weight_decay)
        schedule = get_scheduler(
            own.lr_scheduler_type, optimizer, num_warmup_steps=own.warmup_steps, num_training_steps=own.max_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Start the clock; forget lines of metrics after the checkpoint that is gone on from."""
        self.started = time.perf_counter()
        if self.trainer.is_global_zero and self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            for name in self.files:
                keep_steps(self.run_dir / name, self.trainer.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A gradient that is not finite must not reach the weights."""
        norms = [weight.grad.norm() for weight in self.adapter.parameters() if weight.grad is not None]
        norm = torch.stack(norms).norm() if norms else torch.zeros(())
        self.stop_if_not_finite(norm, "gradient")
        self._metrics[-1]["grad_norm"] = norm.item()

    def configure_callbacks(self) -> list[L.Callback]:
        """Lightning saves checkpoints before this module's own hook, and a line must not be missing where one is."""
        return [StepEnd()]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are text: what is made of them is put where the models are."""
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The adapter alone, and what has been counted."""
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if n in trained}
        checkpoint["cost"] = {
            "flops": self.all_flops / self.world_size,
            "num_tokens": self.all_tokens / self.world_size,
            "seconds": self.seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        kept = checkpoint["cost"]
        self.flops_before, self.seconds_before = kept["flops"], kept["seconds"]
        self.num_tokens = kept["num_tokens"]
        self.all_flops, self.all_tokens = kept["flops"] * self.world_size, kept["num_tokens"] * self.world_size

    # Across processes, and into files

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self._trainer.world_size if self._trainer is not None else 1

    def stop_if_not_finite(self, value: Tensor, what: str) -> None:
        """End the run, on all processes, before a value that is no number does harm."""
        finite = bool(torch.isfinite(value).all())
        if self.world_size > 1:
            finite = self.trainer.strategy.reduce_boolean_decision(finite, all=True)
        if finite:
            return
        step, own = self.trainer.global_step + 1, self.settings
        raise UserError(
            f"{own.section}.learning_rate",
            f"a finite {what}",
            f"NaN or infinity at step {step}",
            f"Lower it (now {own.learning_rate}) or {{{own.section}.max_grad_norm}}; the last checkpoint is kept, "
            "and no weight has been touched since.",
        )

    def merge_metrics(self) -> dict[str, float]:
        """Means over the parts of a step and over the processes."""
        names = self._metrics[-1]
        merged = {
            name: sum(part[name] for part in self._metrics if name in part)
            / sum(name in part for part in self._metrics)
            for name in names
        }
        self._metrics, costs = [], torch.tensor([self.num_tokens, self.flops], dtype=torch.float64)
        if self.world_size > 1:
            costs = self.trainer.strategy.reduce(costs.to(self.policy.device), reduce_op="sum")
            values = torch.tensor(list(merged.values()), dtype=torch.float64, device=self.policy.device)
            values = self.trainer.strategy.reduce(values.float(), reduce_op="mean")
            merged = dict(zip(merged, values.tolist(), strict=True))  # pyright: ignore
        self.all_tokens, self.all_flops = costs.tolist()  # pyright: ignore
        return merged

    @property
    def flops(self) -> float:
        """Floating-point operations of this process so far, rewards included."""
        return self.flops_before + self.ledger.cost(0).flops

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.seconds_before + time.perf_counter() - self.started

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to the logger."""
        row = metrics | {
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "num_tokens": self.all_tokens,
            "flops": self.all_flops,
            "seconds": self.seconds,
        }
        for logger in self.trainer.loggers:
            logger.log_metrics({name: value for name, value in row.items()}, step=step)
        if self.run_dir is not None:
            append_line(self.run_dir / "metrics.jsonl", {"step": step} | row)


def epoch_order(size: int, start: int, stop: int, *, seed: int) -> list[int]:
    """Entries `start` to `stop` of an endless walk through `size` rows: each epoch is a new order of all of them."""
    orders: dict[int, list[int]] = {}
    places = []
    for index in range(start, stop):
        epoch, place = divmod(index, size)
        if epoch not in orders:
            orders[epoch] = torch.randperm(size, generator=seeded_generator(seed, "order", epoch)).tolist()
        places.append(orders[epoch][place])
    return places


def trl_prompt(policy: Policy, problem: str) -> Text:
    """What TRL's `prompt` column holds, so that its tokenisation gives this policy's own prompt ids."""
    if policy.tokenizer.chat_template is None:
        return f"{problem}\n"
    system = [{"role": "system", "content": policy.system_prompt}] if policy.system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def append_line(file: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON; JSON has no NaN, so that becomes null."""
    plain = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(plain, ensure_ascii=False) + "\n")


def keep_steps(file: Path, last: int) -> None:
    """Cut a file of lines with a `step` after that step, and a line that was not written to its end."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    kept = [line for line in lines if json.loads(line)["step"] <= last]
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
