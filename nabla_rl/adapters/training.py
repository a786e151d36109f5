"""The Lightning module below every training of an adapter: optimiser, checkpoints, metrics, and the count of cost."""

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
    """Lets the module finish its step before a checkpoint is saved."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step after its last batch."""
        assert isinstance(pl_module, AdapterTraining)
        if (batch[0] + 1) % pl_module.settings.gradient_accumulation_steps == 0:
            pl_module.end_step()


class AdapterTraining(L.LightningModule):
    """Trains the adapter of a policy. The first entry of a batch is its number, counted from the start of the run.

    Attributes:
        files: Files of lines with a `step`, which are cut back to the checkpoint that a run resumes from.
        settings: How the weights are trained.
        policy: The policy that is trained.
        adapter: Its adapter, the only weights that change.
        ledger: What the training costs this process.
        all_tokens: Tokens of all processes so far.
        all_flops: FLOPs of all processes so far.
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
        """The optimiser of the adapter's weights, AdamW or plain gradient descent, with its schedule."""
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
        """Start the clock, and drop lines of metrics that are later than the checkpoint."""
        self.started = time.perf_counter()
        if self.trainer.is_global_zero and self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            for name in self.files:
                keep_steps(self.run_dir / name, self.trainer.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite reaches the weights."""
        norms = [weight.grad.norm() for weight in self.adapter.parameters() if weight.grad is not None]
        norm = torch.stack(norms).norm() if norms else torch.zeros(())
        self.stop_if_not_finite(norm, "gradient")
        self._metrics[-1]["grad_norm"] = norm.item()

    def configure_callbacks(self) -> list[L.Callback]:
        """A callback that ends steps: Lightning saves checkpoints before it calls the module's own hook."""
        return [StepEnd()]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch as it is: it holds texts, and what is made of them goes where the models are."""
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter alone of all weights, and the cost so far."""
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if n in trained}
        checkpoint["cost"] = {
            "flops": self.all_flops / self.world_size,
            "num_tokens": self.all_tokens / self.world_size,
            "seconds": self.seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume counting the cost."""
        kept = checkpoint["cost"]
        self.flops_before, self.seconds_before = kept["flops"], kept["seconds"]
        self.num_tokens = kept["num_tokens"]
        self.all_flops, self.all_tokens = kept["flops"] * self.world_size, kept["num_tokens"] * self.world_size

    # Across processes, and into files

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return self._trainer.world_size if self._trainer is not None else 1

    def stop_if_not_finite(self, value: Tensor, what: str) -> None:
        """End the run on all processes where a value is NaN or infinite."""
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
        """The metrics of a step, averaged over its parts and over the processes."""
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
        """FLOPs of this process so far, those of reward models included."""
        return self.flops_before + self.ledger.cost(0).flops

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.seconds_before + time.perf_counter() - self.started

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics.jsonl, and hand the same to the logger."""
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
    """The entry of TRL's `prompt` column whose tokenisation gives this policy's own prompt ids."""
    if policy.tokenizer.chat_template is None:
        return f"{problem}\n"
    system = [{"role": "system", "content": policy.system_prompt}] if policy.system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def append_line(file: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON, in which NaN becomes null."""
    plain = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(plain, ensure_ascii=False) + "\n")


def keep_steps(file: Path, last: int) -> None:
    """Drop a file's lines of steps after `last`, and a line that was not written to its end."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    kept = [line for line in lines if json.loads(line)["step"] <= last]
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
