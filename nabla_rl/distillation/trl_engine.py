"""The other engine: the same rows, adapter and settings, trained by TRL's SFTTrainer or DPOTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from nabla_rl.adapters.training import append_line, keep_steps, trl_prompt
from nabla_rl.distillation.distiller import PolicyDistiller
from nabla_rl.distillation.rows import Row
from nabla_rl.models.policy import Policy


class Report(TrainerCallback):
    """Metrics as the lightning engine has them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines of metrics that are later than the checkpoint."""
        if state.is_world_process_zero:
            keep_steps(self.folder / "metrics.jsonl", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line, but of what comes at the very end."""
        if state.is_world_process_zero and "loss" in (logs or {}):
            append_line(self.folder / "metrics.jsonl", {"step": state.global_step, **logs})


def trl_row(policy: Policy, row: Row) -> dict[str, Any]:
    """A row as TRL's data set has it, in the form of its prompt: text, or turns of a conversation."""
    prompt = trl_prompt(policy, row["prompt"])
    texts = {name: row[name] for name in ("completion", "chosen", "rejected") if name in row}
    if isinstance(prompt, str):
        return {"prompt": prompt, **texts}
    return {"prompt": prompt, **{n: [{"role": "assistant", "content": text}] for n, text in texts.items()}}


def build_trl_trainer(module: PolicyDistiller, folder: Path, **more: Any) -> Any:
    """TRL's trainer of this module's way to learn on its rows; `more` are further fields of TRL's config."""
    settings = {
        "output_dir": str(folder / "trl"), "use_cpu": module.policy.device.type == "cpu", "seed": module.seed,
        "report_to": "wandb" if module.settings.report_to == "wandb" else "none", "disable_tqdm": True,
        "save_total_limit": 1, "eval_steps": None,
    }  # fmt: skip
    config = module.training_config.to_trl(module.method, **(settings | more))
    trainer = (SFTTrainer if module.method == "sft" else DPOTrainer)(
        model=module.adapter.peft,
        args=config,
        train_dataset=Dataset.from_list([trl_row(module.policy, row) for row in module.rows]),
        processing_class=module.policy.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def config_rows(args: Any) -> int:
    """Rows that a run goes through."""
    return args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def fit_with_trl(module: PolicyDistiller, folder: Path) -> None:
    """Train by TRL, from its last checkpoint where there is one."""
    trainer = build_trl_trainer(module, folder)
    trainer.add_callback(Report(folder))
    last = get_last_checkpoint(str(folder / "trl")) if (folder / "trl").is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    rows = config_rows(trainer.args)
    tokens = sum(len(module.policy.encode_prompt(row["prompt"])) + len(ids) for row in module.rows
                 for ids in module.completions(row))  # fmt: skip
    module.all_tokens = rows * tokens / len(module.rows)  # exact for whole epochs
    # TRL keeps no ledger: the linear layers' operations, of a forward and a backward, and of the reference's forward
    passes = 2 + (module.method == "preference")
    module.all_flops = 2.0 * module.policy.backbone.formula.block_weights * module.all_tokens * passes
