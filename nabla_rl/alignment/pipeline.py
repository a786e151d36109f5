"""Alignment as a function: train an adapter towards the tilted policy, measure it, and save it with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from nabla_rl.adapters.progress import TrainingProgress
from nabla_rl.adapters.run import (
    Engine,
    build_trainer,
    check_logger,
    claim_folder,
    figure_names,
    fingerprint,
    fit,
    interruptible,
    named,
    peak_memory_mb,
    versions,
    with_error,
)
from nabla_rl.alignment.aligner import PolicyAligner
from nabla_rl.alignment.config import Algorithm, KLEstimator, RLConfig
from nabla_rl.alignment.data import AlignmentData
from nabla_rl.alignment.evaluation import KL_ESTIMATE
from nabla_rl.alignment.rollouts import Rollouts
from nabla_rl.data.problems import Grader, Problem, as_problems
from nabla_rl.decoding.base import AbstractDecoder
from nabla_rl.decoding.run import embedded_family, plain
from nabla_rl.models.adapters import LoraOptions
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_policy, resolve_name
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.functions import RewardFunction, reward_name
from nabla_rl.rewards.loading import load_reward
from nabla_rl.run_folder import write_atomically

Problems = str | Path | Problem | Sequence[str | Problem]


@dataclass(frozen=True)
class Alignment:
    """A finished alignment.

    Attributes:
        adapter: Folder of the PEFT adapter.
        summary: Held-out figures before and after, and what training cost.
        folder: The run folder.
    """

    adapter: Path
    summary: dict[str, Any]
    folder: Path


def align(
    policy: str | PolicyOptions | Policy,
    reward: str | RewardOptions | AbstractReward | None = None,
    problems: Problems | None = None,
    *,
    folder: str | Path,
    beta: float | None = None,
    held_out: Problems | None = None,
    gold: str | RewardOptions | AbstractReward | None = None,
    reward_funcs: Sequence[str | RewardFunction] | None = None,
    algorithm: Algorithm = "rloo",
    kl_estimator: KLEstimator = "auto",
    rollouts: Rollouts = "sample",
    search: AbstractDecoder | None = None,
    rl: RLConfig | None = None,
    lora: LoraOptions | None = None,
    stop_at_kl: float | None = None,
    eval_generations: int = 4,
    eval_limit: int = 200,
    grade: Grader | None = None,
    seed: int = 0,
    engine: Engine = "lightning",
    callbacks: Sequence[L.Callback] = (),
    progress: bool = False,
    device: torch.device | str | None = None,
) -> Alignment:
    """Train a LoRA adapter towards the tilted policy ρ* ∝ π exp(r/β), by KL-regularised reinforcement learning.

    The same call resumes a run that was interrupted, and returns a finished one as it is.

    Args:
        policy: A folder, a Hub name, an embedded model such as "sorting/tiny-policy", or a loaded policy, which is
            left as it was.
        reward: The same of a reward model; None where other reward functions are named.
        problems: Training problems: texts, `Problem`s or a JSONL file; None is the embedded family's.
        folder: Run folder for checkpoints, metrics, the adapter and the summary.
        beta: KL coefficient β, the same as in decoding; None is that of `rl`.
        held_out: Problems to measure on; None is every fifth of `problems`, or the family's test problems.
        gold: A second reward model that training never sees.
        reward_funcs: Reward functions with TRL's signature, or the names judge and grader; None is judge with a reward
            model, grader without.
        algorithm: rloo or grpo.
        kl_estimator: auto, k1, k3 or exact.
        rollouts: sample, search or mixed.
        search: The decoder that searches, for `rollouts` other than sample.
        rl: Settings of reinforcement learning, in TRL's words.
        lora: Settings of the adapter, in PEFT's words.
        stop_at_kl: Mean KL in nats per completion at which training stops; None is never.
        eval_generations: Number of completions of each held-out problem in the summary.
        eval_limit: Maximum number of held-out problems.
        grade: Says whether a completion is right; None is the family's, or math-verify.
        seed: Random seed.
        engine: Who trains: "lightning" (this package) or "trl".
        callbacks: Further Lightning callbacks, such as `AdapterSnapshots`.
        progress: Show a progress bar; the engine trl always shows its own.
        device: Where models given by name are loaded; None is the GPU where there is one.

    Raises:
        UserError: Something given cannot be used; the message says what and why.
    """
    settings = rl or RLConfig()
    settings = settings if beta is None else replace(settings, beta=beta)
    named_funcs = list(reward_funcs or (["judge"] if reward is not None else ["grader"]))
    family = embedded_family(policy)
    module = PolicyAligner(
        policy=policy if isinstance(policy, PolicyOptions) else PolicyOptions(named(policy)),
        reward=_reward_options(reward),
        gold=_reward_options(gold),
        algorithm=algorithm,
        reward_funcs=[each if isinstance(each, str) else reward_name(each) for each in named_funcs],
        kl_estimator=kl_estimator,
        rollouts=rollouts,
        stop_at_kl=stop_at_kl,
        rl=settings,
        lora=lora or LoraOptions(),
        eval_generations=eval_generations,
        family=family or "words",
        seed=seed,
        **({} if search is None else {"search": search.name, search.name: search}),
    )
    data = AlignmentData.of(
        None if problems is None else as_problems(problems),
        None if held_out is None else as_problems(held_out, argument="held_out"),
        family=family, eval_limit=eval_limit, grade=grade, seed=seed,
    )  # fmt: skip
    config = {
        "policy": named(policy),
        "reward": named(reward),
        "gold": named(gold),
        "problems": family if data.own is None else fingerprint(data.own),
        "held_out": fingerprint(data.held_out),
        "algorithm": algorithm,
        "kl_estimator": kl_estimator,
        "reward_funcs": module.reward_names,
        "rollouts": rollouts,
        "search": None if rollouts == "sample" else plain({module.searcher.name: asdict(module.searcher)}),  # pyright: ignore
        "rl": plain(asdict(settings)),
        "lora": plain(asdict(module.lora)),
        "stop_at_kl": stop_at_kl,
        "eval_generations": eval_generations,
        "seed": seed,
        "engine": engine,
    }
    check_logger(settings.report_to, settings.section)
    done = read_finished(Path(folder), config)
    if done is not None:
        return done
    trainer = build_trainer(settings, device=policy.device if isinstance(policy, Policy) else device)
    where = trainer.strategy.root_device
    loaded = policy if isinstance(policy, Policy) else load_policy(policy, device=where)
    judges = {
        role: given if isinstance(given, AbstractReward) else load_reward(given, device=where, argument=role)
        for role, given in (("reward", reward), ("gold", gold))
    }
    try:
        module.use(loaded, data, judges, base_name=resolve_name(module.policy_options.name), functions=named_funcs)
        bar = [TrainingProgress()] if progress and engine == "lightning" else []
        return train(module, data, trainer, Path(folder), config, engine=engine, callbacks=[*bar, *callbacks])
    finally:
        if isinstance(policy, Policy) and module.adapter is not None:
            module.adapter.remove()


def _reward_options(given: str | RewardOptions | AbstractReward | None) -> RewardOptions:
    """What the module and its card are told of a reward model."""
    return given if isinstance(given, RewardOptions) else RewardOptions(named(given))


def read_finished(folder: Path, config: Mapping[str, Any]) -> Alignment | None:
    """The run that the folder holds, where it is finished; a run of another configuration is refused."""
    claim_folder(folder, config)
    if not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Alignment(folder / "adapter", summary, folder)


def train(
    module: PolicyAligner,
    data: AlignmentData,
    trainer: L.Trainer,
    folder: Path,
    config: Mapping[str, Any],
    *,
    engine: Engine = "lightning",
    callbacks: Sequence[L.Callback] = (),
) -> Alignment:
    """Train a module whose models are loaded, and finish. The first process writes."""
    module.run_dir = folder
    if module.policy is None:
        module.prepare(trainer.strategy.root_device, data)
    with interruptible():
        if engine == "trl":
            from nabla_rl.alignment.trl_engine import fit_with_trl

            fit_with_trl(module, folder)
        else:
            fit(module, trainer, folder, callbacks)
    summary = finish(module, folder, config) if trainer.is_global_zero else {}
    return Alignment(folder / "adapter", summary, folder)


def finish(module: PolicyAligner, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the policy before and after, save the adapter with its card, write the summary."""
    seconds, flops = module.seconds, module.all_flops
    with module.adapter.disabled() if module.adapter.changed() else nullcontext():
        before = module.evaluate(module.data.held_out)
    after = module.evaluate(module.data.held_out)
    summary: dict[str, Any] = {
        "algorithm": module.algorithm,
        "beta": module.rl.beta,
        "kl_estimator": module.kl_estimator,
        "kl_measured_as": KL_ESTIMATE,
        "steps": module.rl.max_steps if not module.stopped else None,
        "stopped": module.stopped or None,
        "stopped_at": module.stopped_at if module.stopped else None,
        "before": before,
        "after": after,
        "flops": flops,
        "seconds": seconds,
        "num_tokens": module.all_tokens,
        "trainable_weights": module.adapter.num_weights,
        "peak_memory_mb": peak_memory_mb(module.policy.device),
        "versions": versions(),
    }
    module.adapter.save(folder / "adapter", model_card(summary, module, config))
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def model_card(summary: Mapping[str, Any], module: PolicyAligner, config: Mapping[str, Any]) -> str:
    """The README.md of an adapter: data, reward, settings, cost, and held-out figures before and after."""
    rl, base = module.rl, module.policy_options.name
    data = config.get("data") or {}
    problems = data.get("path") or ("problems of the caller" if module.data.own is not None else "the tiny world")
    held = data.get("eval_path") or f"{summary['before']['problems']} problems"
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base}",
        f"tags: [lora, {module.algorithm}, trl, nabla_rl]",
        "---",
        "",
        f"# A LoRA adapter of {base}",
        "",
        f"Trained by `nabla-rl align` ({module.algorithm}, engine {config['engine']}) towards the tilted policy "
        "ρ* ∝ π exp(r/β).",
        "",
        "| | |",
        "|---|---|",
        f"| data | {problems}; held out: {held} |",
        f"| reward | {', '.join(module.reward_names)}; reward model {module.reward_options['reward'].name}; never "
        f"seen: {module.reward_options['gold'].name} |",
        f"| β | {rl.beta} (KL estimator {summary['kl_estimator']}) |",
        f"| KL reached | {with_error(summary['after'], 'kl')} nats per completion |",
        f"| steps | {summary['steps'] or summary['stopped']} of {rl.num_generations} × "
        f"{rl.per_device_train_batch_size // rl.num_generations} completions |",
        f"| cost | {summary['flops']:.3e} FLOPs, {summary['seconds']:.0f} s |",
        f"| versions | {', '.join(f'{name} {number}' for name, number in summary['versions'].items())} |",
        "",
        f"Held-out figures ({summary['before']['problems']} problems, {summary['before']['generations']} samples of "
        "each, ± standard error):",
        "",
        "| figure | before | after |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {with_error(summary['before'], name)} | {with_error(summary['after'], name)} |"
        for name in figure_names(summary["before"])
    ]
    return "\n".join([*lines, ""])
