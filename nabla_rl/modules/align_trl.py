"""The other engine: the same adapter, problems, rewards and settings, trained by TRL's GRPOTrainer or RLOOTrainer.

It brings what TRL has and this package does not own: vLLM rollouts, DeepSpeed, FSDP. Start several processes with
`accelerate launch` or `torchrun`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from nabla_rl.modules.adapter_training import append_line, keep_steps, trl_prompt
from nabla_rl.modules.aligner import PolicyAligner
from nabla_rl.types import UserError


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
        """Forget lines of metrics after the checkpoint that is gone on from."""
        if state.is_world_process_zero:
            keep_steps(self.folder / "metrics.jsonl", state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line, and see to the KL."""
        logs = dict(logs or {})
        if "reward" not in logs:  # what comes at the very end
            return
        # the mean over tokens times their mean number is the mean over completions of the sum
        logs["kl_sequence"] = logs.get("kl", 0.0) * logs["completions/mean_length"]
        logs["objective"] = logs["reward"] - self.module.rl.beta * logs["kl_sequence"]
        limit = self.module.stop_at_kl
        if limit is not None and logs["kl_sequence"] > limit:
            self.module.stopped = (
                f"KL of {logs['kl_sequence']:.3f} nats at step {state.global_step}, above --model.stop_at_kl {limit}"
            )
            control.should_training_stop = True
        if not state.is_world_process_zero:
            return
        append_line(self.folder / "metrics.jsonl", {"step": state.global_step, **logs})
        if self.logger is not None:
            self.logger.log_metrics({n: v for n, v in logs.items() if isinstance(v, float)}, step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.bar.stop()


def training_rows(module: PolicyAligner, world_size: int = 1) -> list[dict[str, Any]]:
    """The problems of all draws of a run in order, as TRL's data set has them."""
    rl = module.rl
    count = rl.gradient_accumulation_steps * world_size * rl.prompts_per_batch
    return [
        {
            "prompt": trl_prompt(module.policy, problem.problem),
            "problem": problem.problem,
            "answer": problem.answer,
            "id": problem.id,
        }
        for draw in range(-(-rl.max_steps // rl.num_iterations))
        for problem in module.data.training(draw, count)
    ]


def build_trl_trainer(module: PolicyAligner, folder: Path, **more: Any) -> Any:
    """TRL's trainer of this module's algorithm on its policy; `more` are further fields of TRL's config.

    The adapter is handed over inside the model. TRL then keeps a frozen copy of it as it starts, which is the
    reference: its update is zero.
    """
    own = {"rloo": "k1", "grpo": "k3"}[module.algorithm]
    if module.kl_estimator != own:
        raise UserError(
            f"--model.kl_estimator: expected auto or {own} with --engine trl, found {module.kl_estimator}. TRL's "
            f"{module.algorithm.upper()} has no other."
        )
    if module.rollouts != "sample":
        raise UserError(
            "--model.rollouts: expected sample with --engine trl, found nabla. TRL's RLOO takes no completions of "
            "another law; use the lightning engine."
        )
    report_to = "wandb" if module.rl.report_to == "wandb" else "none"
    on_cpu = module.policy.device.type == "cpu"
    settings = {
        "output_dir": str(folder / "trl"), "use_cpu": on_cpu, "report_to": report_to, "seed": module.seed,
        "shuffle_dataset": False, "disable_tqdm": True, "save_total_limit": 1, "log_completions": False,
    }  # fmt: skip
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
    try:
        trainer.train(resume_from_checkpoint=last)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"--model.rl.learning_rate: expected finite logits, found NaN or infinity after step "
            f"{trainer.state.global_step}. Lower it (now {module.rl.learning_rate}); the last checkpoint is kept."
        ) from error
    module.all_tokens = float(trainer.state.num_input_tokens_seen)
    # TRL keeps no ledger: the linear layers' operations. A forward each to sample, to score anew, for the reference
    # and to train, and a backward.
    passes = 3 + (module.algorithm == "rloo") + (module.rl.beta > 0)
    weights = module.policy.backbone.formula.block_weights
    module.all_flops = module.flops + 2.0 * weights * module.all_tokens * passes
