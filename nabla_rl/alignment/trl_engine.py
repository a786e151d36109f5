"""The other engine: the same adapter, problems, rewards and settings, trained by TRL's GRPOTrainer or RLOOTrainer.

It brings what TRL has and this package does not own: vLLM rollouts, DeepSpeed, FSDP. Start several processes with
`accelerate launch` or `torchrun`. Completions of a search come in by GRPOTrainer's `rollout_func`. TRL's RLOOTrainer
has none, so GRPOTrainer is set up to take RLOO's steps for them (`nabla_rl.alignment.trl_search`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch.loggers import TensorBoardLogger
from peft import set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from nabla_rl.adapters.training import append_line, keep_steps
from nabla_rl.alignment.aligner import EVALUATIONS, PolicyAligner
from nabla_rl.alignment.trl_search import SearchRollouts, build_search_trainer, training_rows
from nabla_rl.types import UserError

OURS = "nabla_rl.json"
"""In a checkpoint: what the run has cost, as far as this package counts it, and whether it has come to its end."""


class Report(TrainerCallback):
    """Metrics, a progress bar, and the end of a run whose KL is too large, as the lightning engine has them."""

    def __init__(self, module: PolicyAligner, folder: Path):
        self.module, self.folder = module, folder
        self.logger = None
        if module.rl.report_to == "tensorboard":
            self.logger = TensorBoardLogger(folder, name="tensorboard", version="")
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        self.task = self.bar.add_task("TRL", total=module.rl.max_steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines of metrics that are later than the checkpoint."""
        self.module.started = time.perf_counter()
        if state.is_world_process_zero:
            for name in ("metrics.jsonl", EVALUATIONS):
                keep_steps(self.folder / name, state.global_step)
            self.bar.start()
            if state.global_step == 0:
                self.module.evaluate_step(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A gradient that is not finite must not reach the weights, nor a checkpoint."""
        norms = [weight.grad.norm() for weight in self.module.adapter.parameters() if weight.grad is not None]
        if norms and not bool(torch.stack(norms).isfinite().all()):
            raise not_finite(self.module, "gradient", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)
        if state.is_world_process_zero:
            count_cost(self.module, state)
            self.module.evaluate_step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put beside TRL's checkpoint what TRL does not know: the rewards' operations, the time, and the end by KL."""
        if state.is_world_process_zero:
            folder = get_last_checkpoint(args.output_dir)
            assert folder is not None
            module = self.module
            known = {"flops": module.flops, "seconds": module.seconds}
            known |= {"stopped": module.stopped, "stopped_at": module.stopped_at}
            (Path(folder) / OURS).write_text(json.dumps(known), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line, and see to the KL."""
        logs = dict(logs or {})
        if "reward" not in logs:  # what comes at the very end
            return
        if self.module.rollouts != "sample":
            logs = SearchRollouts.plain_metrics(logs)
        if "kl_sequence" not in logs:
            # the mean over tokens times their mean number is the mean over completions of the sum
            logs["kl_sequence"] = logs.get("kl", 0.0) * logs["completions/mean_length"]
        logs["objective"] = logs["reward"] - self.module.rl.beta * logs["kl_sequence"]
        if self.module.enough(state.global_step, logs):
            control.should_training_stop = True
        if not state.is_world_process_zero:
            return
        append_line(self.folder / "metrics.jsonl", {"step": state.global_step, **logs})
        if self.logger is not None:
            self.logger.log_metrics({n: v for n, v in logs.items() if isinstance(v, float)}, step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.bar.stop()


def build_trl_trainer(module: PolicyAligner, folder: Path, **more: Any) -> Any:
    """TRL's trainer of this module's algorithm on its policy; `more` are further fields of TRL's config.

    The adapter is handed over inside the model. TRL then keeps a frozen copy of it as it starts, which is the
    reference: its update is zero.
    """
    own = {"rloo": "k1", "grpo": "k3"}[module.algorithm]
    if module.kl_estimator != own:
        raise UserError(
            "kl_estimator",
            f"auto or {own} with {{engine}} trl",
            str(module.kl_estimator),
            f"TRL's {module.algorithm.upper()} has no other.",
        )
    report_to = "wandb" if module.rl.report_to == "wandb" else "none"
    on_cpu = module.policy.device.type == "cpu"
    settings = {
        "output_dir": str(folder / "trl"), "use_cpu": on_cpu, "report_to": report_to, "seed": module.seed,
        "shuffle_dataset": False, "disable_tqdm": True, "save_total_limit": 1, "log_completions": False,
    }  # fmt: skip
    if module.rollouts != "sample":
        trainer = build_search_trainer(module, **(settings | more))
        trainer.remove_callback(PrinterCallback)
        return trainer
    config = module.rl.to_trl(module.algorithm, **(settings | more))
    trainer = {"rloo": RLOOTrainer, "grpo": GRPOTrainer}[module.algorithm](
        model=module.adapter.peft,
        reward_funcs=module.functions,
        args=config,
        train_dataset=Dataset.from_list(training_rows(module, config.world_size)),
        processing_class=module.policy.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fit_with_trl(module: PolicyAligner, folder: Path) -> None:
    """Train by TRL, from its last checkpoint where there is one."""
    trainer = build_trl_trainer(module, folder)
    trainer.add_callback(Report(module, folder))
    last = get_last_checkpoint(str(folder / "trl")) if (folder / "trl").is_dir() else None
    if last is not None and (Path(last) / OURS).is_file():
        known = json.loads((Path(last) / OURS).read_text(encoding="utf-8"))
        module.flops_before, module.seconds_before = known["flops"], known["seconds"]
        module.stopped, module.stopped_at = known["stopped"], known["stopped_at"]
    if last is not None and module.stopped:  # it had gone too far when it was interrupted
        set_peft_model_state_dict(module.adapter.peft, load_file(Path(last) / "adapter_model.safetensors"))
        module.started = time.perf_counter()
        count_cost(module, TrainerState.load_from_json(str(Path(last) / "trainer_state.json")))
        return
    try:
        trainer.train(resume_from_checkpoint=last)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise not_finite(module, "logits", trainer.state.global_step) from error
    count_cost(module, trainer.state)


def not_finite(module: PolicyAligner, what: str, step: int) -> UserError:
    """What to say when numbers are no numbers."""
    return UserError(
        "rl.learning_rate",
        f"finite {what}",
        f"NaN or infinity after step {step}",
        f"Lower it (now {module.rl.learning_rate}); the last checkpoint is kept, and no weight was touched since.",
    )


def count_cost(module: PolicyAligner, state: Any) -> None:
    """Put down what TRL's training has cost so far.

    TRL keeps no ledger: the linear layers' operations. A forward and a backward to train, and a forward each to
    sample, to score anew and for the reference; of ∇-Reasoner's completions these are in the module's own ledger.
    """
    module.all_tokens = float(state.num_input_tokens_seen)
    passes = 2
    if module.rollouts == "sample":
        passes += 1 + (module.algorithm == "rloo") + (module.rl.beta > 0)
    weights = module.policy.backbone.formula.block_weights
    module.all_flops = module.flops + 2.0 * weights * module.all_tokens * passes
