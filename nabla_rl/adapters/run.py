"""What every training of an adapter needs: trainer, checkpoints, loggers, run folder, figures."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from nabla_rl.adapters.config import AdapterConfig
from nabla_rl.adapters.training import AdapterTraining
from nabla_rl.data.problems import Problem
from nabla_rl.models.loading import ASSETS
from nabla_rl.models.policy import Policy
from nabla_rl.run_folder import flatten
from nabla_rl.types import UserError

Engine = Literal["lightning", "trl"]


def build_trainer(settings: AdapterConfig, *, device: torch.device | str | None = None) -> L.Trainer:
    """Lightning's trainer for these settings on one device; None is the GPU where there is one."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = place.type == "cuda"
    return L.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=[place.index or 0] if cuda else 1,
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.gradient_accumulation_steps,
        gradient_clip_val=norm_or_none(settings.max_grad_norm),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def norm_or_none(norm: float) -> float | None:
    """Lightning writes None where the gradient is never clipped."""
    return norm or None


def fit(module: AdapterTraining, trainer: L.Trainer, folder: Path, callbacks: Sequence[L.Callback] = ()) -> None:
    """Train with Lightning; a run with a checkpoint resumes from it."""
    checkpoints = folder / "checkpoints"
    trainer.loggers = build_loggers(module.settings, folder)
    trainer.callbacks += [  # pyright: ignore
        *callbacks,
        ModelCheckpoint(
            checkpoints,
            filename="{step}",
            every_n_train_steps=module.settings.save_steps,
            save_last=True,
            save_top_k=1,
        ),
    ]
    last = checkpoints / "last.ckpt"
    with interruptible():
        trainer.fit(module, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    trainer.strategy.barrier()
    module.to(trainer.strategy.root_device)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt, which Lightning turns into SystemExit."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise


def check_logger(report_to: str, section: str) -> None:
    """Refuse W&B where it is not installed, before anything is loaded or trained; `section` holds the setting."""
    if report_to == "wandb" and find_spec("wandb") is None:
        raise UserError(
            f"{section}.report_to", "an installed logger", "no wandb", "Run `pip install wandb`, or use tensorboard."
        )


def build_loggers(settings: AdapterConfig, folder: Path) -> list[Logger]:
    """The loggers that get the metrics besides metrics.jsonl."""
    if settings.report_to == "tensorboard":
        return [TensorBoardLogger(folder, name="tensorboard", version="")]
    if settings.report_to == "wandb":
        return [WandbLogger(name=folder.name, save_dir=folder)]
    return []


def figure_names(figures: Mapping[str, Any]) -> list[str]:
    """The names of the figures that have a value."""
    skip = ("problems", "generations", "evaluation_flops")
    return [n for n, v in figures.items() if n not in skip and not n.endswith("_error") and v is not None]


def with_error(figures: Mapping[str, Any], name: str) -> str:
    """A figure with its standard error."""
    value, error = figures[name], figures.get(f"{name}_error")
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def versions() -> dict[str, str]:
    """Versions of the packages that made the adapter."""
    found = {}
    for name in ("nabla-rl", "torch", "transformers", "peft", "trl", "lightning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def named(model: Any) -> Any:
    """What config.yaml says of a model: its name, its options where there are more, or the class of a loaded one."""
    if model is None or isinstance(model, str):
        return model
    if isinstance(model, Policy):
        own = model.backbone.model
        folder = Path(own.name_or_path or type(own).__name__)
        return f"{folder.parent.name}/{folder.name}" if folder.parent.parent == ASSETS else str(folder)
    return asdict(model) if is_dataclass(model) and not isinstance(model, type) else type(model).__name__


def fingerprint(rows: Iterable[Any]) -> str:
    """A short text that differs where problems, or other rows of plain values, differ."""
    plain = [asdict(row) if isinstance(row, Problem) else row for row in rows]
    return f"{len(plain)} ({blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=6).hexdigest()})"


def claim_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml, or refuse a folder that holds a run of another configuration."""
    file = folder / "config.yaml"
    if file.is_file():
        there = yaml.safe_load(file.read_text(encoding="utf-8"))
        there, here = flatten(there if isinstance(there, dict) else {}), flatten(config)
        differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        if differing:
            name = differing[0]
            more = f" and {len(differing) - 1} more settings" if len(differing) > 1 else ""
            raise UserError(
                "run_dir",
                f"{folder} to hold this configuration",
                f"{name} = {there.get(name)!r} there and {here.get(name)!r} now{more}",
                "Choose another {run_dir}, or delete that folder.",
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(
            "run_dir",
            "a folder that can be written",
            f"none at {folder} ({error.strerror or error})",
            "Choose another {run_dir}.",
        ) from error


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the GPU, or of the process where the device is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
