"""The model card of a family's tiny models: measured on the test split, by one command, with nothing typed in by
hand."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import Family, generate
from nabla_rl.decoding import Greedy, Sampling, Setting
from nabla_rl.decoding.base import draw_rollouts, prefill
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.metrics import wilson_interval
from nabla_rl.models.loading import RewardOptions, load_classifier, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractProcessReward
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.tiny_world.judge import process_labels
from nabla_rl.tiny_world.taught import TaughtBatches, rank_correlation

NUM_GENERATIONS = 64
BATCH = 16
FORKED = 64
CPU = torch.device("cpu")


@dataclass
class Samples:
    """Completions of the policy on test problems and what every judge says of them; rows are problem-major."""

    correct: Tensor  # (problems, n)
    steps_right: Tensor  # (problems, n): right in every token, not only in the answer
    logps: Tensor  # (problems, n)
    labels: Tensor  # (tokens,): is the prefix right so far?
    rewards: dict[str, Tensor]  # (problems, n)
    values: dict[str, Tensor]  # (tokens,)


def write_card(family: Family, folder: Path, *, num_problems: int) -> str:
    """Measure the models in `folder` and write `card.json` and `README.md` beside them; returns the latter."""
    problems = list(islice(generate(family, "test", 0), num_problems))
    policy = load_policy(f"{family.name}/tiny-policy", device=CPU)
    judges: dict[str, AbstractProcessReward] = {}
    for name in ("tiny-reward", "tiny-gold"):
        judges[name] = SequenceClassifierReward(*load_classifier(f"{family.name}/{name}", RewardOptions(), device=CPU))
    judges["tiny-strong"] = LikelihoodReward(load_policy(f"{family.name}/tiny-strong", device=CPU))
    samples = draw(family, problems, policy, judges)
    figures = {
        "family": family.name,
        "problems": num_problems,
        "command": f"python scripts/train_tiny.py --card {family.name} --card_problems {num_problems}",
        "commit": commit(),
        "greedy": {
            name: greedy_accuracy(family, problems, name) for name in ("tiny-policy", "tiny-student", "tiny-strong")
        },
        "greedy_hard": {
            name: greedy_accuracy(family, list(islice(generate(family, "hard", 0), num_problems)), name)
            for name in ("tiny-policy", "tiny-strong")
        },
        "sampled_accuracy": samples.correct.float().mean().item(),
        "pass_at": {k: group_mean(samples.correct, samples.correct.double(), k, best_of_all=True) for k in (8, 64)},
        "auc": {
            n: binary_auroc(r.flatten(), samples.correct.flatten().long()).item() for n, r in samples.rewards.items()
        },
        "auc_steps": {
            n: binary_auroc(r.flatten(), samples.steps_right.flatten().long()).item()
            for n, r in samples.rewards.items()
        },
        "answer_right_steps_wrong": (samples.correct & ~samples.steps_right).sum().item()
        / samples.correct.sum().item(),
        "process_auc": {n: binary_auroc(v, samples.labels.long()).item() for n, v in samples.values.items()},
        "best_of_n": best_of_n(samples),
        "first_order": {name: first_order(family, policy, taught) for name, taught in proposers(family).items()},
    }
    (folder / "card.json").write_text(json.dumps(figures, indent=2) + "\n")
    text = render(figures, folder)
    (folder / "README.md").write_text(text)
    return text


@torch.no_grad()
def draw(family: Family, problems: list[Problem], policy: Policy, judges: dict[str, AbstractProcessReward]) -> Samples:
    """Sample `NUM_GENERATIONS` completions of each problem at temperature 1 and have them judged."""
    sampling = Sampling(temperature=1.0, max_new_tokens=family.max_new_tokens)
    correct, steps_right, logps, labels = [], [], [], []
    rewards: dict[str, list[Tensor]] = {name: [] for name in judges}
    values: dict[str, list[Tensor]] = {name: [] for name in judges}
    for start in track(range(0, len(problems), BATCH), description="sampling and judging"):
        batch = problems[start : start + BATCH]
        ledger = Ledger(len(batch))
        setting = Setting(policy, None, ledger, sampling=sampling)
        prefix = prefill(batch, setting)
        rollout = draw_rollouts(batch, setting, prefix, n=NUM_GENERATIONS)
        repeated = torch.arange(len(batch)).repeat_interleave(NUM_GENERATIONS)
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]
        rights = [
            [*policy.tokenizer(p.solution, add_special_tokens=False).input_ids, policy.tokenizer.eos_token_id]
            for p in batch
        ]
        for row, which in zip(rows, repeated.tolist(), strict=True):
            correct.append(family.grade(policy.decode(row), str(batch[which].answer)))
            steps_right.append(row == rights[which])
            labels.extend(process_labels(row, rights[which]))
        logps.append(rollout.logps.double().sum(-1))
        last = rollout.mask.sum(-1) - 1
        for name, judge in judges.items():
            judged = judge.prefill([p.problem for p in batch], torch.arange(len(batch)), ledger).select(repeated)
            value = judge.values(judged, rollout.ids, rollout.mask)
            rewards[name].append(value.gather(1, last[:, None]).squeeze(1))
            values[name].append(value[rollout.mask])
    shape = (len(problems), NUM_GENERATIONS)
    return Samples(
        torch.tensor(correct).view(shape),
        torch.tensor(steps_right).view(shape),
        torch.cat(logps).view(shape),
        torch.tensor(labels).bool(),
        {name: torch.cat(parts).double().view(shape) for name, parts in rewards.items()},
        {name: torch.cat(parts) for name, parts in values.items()},
    )


def proposers(family: Family) -> dict[str, SequenceClassifierReward]:
    """tiny-reward, proposing by its own gradient, and by that of the copy that was taught."""
    judge, tokenizer = load_classifier(f"{family.name}/tiny-reward", RewardOptions(), device=CPU)
    taught, _ = load_classifier(f"{family.name}/tiny-taught", RewardOptions(), device=CPU)
    return {
        "tiny-reward": SequenceClassifierReward(judge, tokenizer),
        "tiny-taught": SequenceClassifierReward(judge, tokenizer, proposer=taught),
    }


def first_order(family: Family, policy: Policy, reward: SequenceClassifierReward) -> dict[str, float]:
    """How well first-order changes of the value predict true ones, over the policy's alternatives.

    Returns:
        `correlation`, Spearman's over all edits; `mended` and `mended_policy`, where some alternative raises the value
        by more than 4: the share of places at which the edit of largest log π + ΔV is the one truly largest, by first
        order and by the policy alone (the token that stands there left out).
    """
    data = TaughtBatches(family, policy, reward, batch_size=FORKED, alternatives=8, seed=0, split="test")
    found, true, hits, policy_hits = [], [], [], []
    for step in range(4):
        batch = data.draw(step)
        predicted = reward.fork_changes(batch.tracks, batch.positions, batch.ids, batch.mask, batch.alternatives)
        found.append(predicted[batch.mask].flatten())
        true.append(batch.changes[batch.mask].flatten())
        same = batch.alternatives == batch.ids[..., None]
        best = (batch.logps + batch.changes).masked_fill(same, -torch.inf).argmax(-1)
        hard = batch.mask & (batch.changes.amax(-1) > 4)
        hits.append((best == (batch.logps + predicted).masked_fill(same, -torch.inf).argmax(-1))[hard])
        policy_hits.append((best == batch.logps.masked_fill(same, -torch.inf).argmax(-1))[hard])
    return {
        "correlation": rank_correlation(torch.cat(found), torch.cat(true)),
        "mended": torch.cat(hits).float().mean().item(),
        "mended_policy": torch.cat(policy_hits).float().mean().item(),
        "places": len(torch.cat(hits)),
    }


def group_mean(correct: Tensor, score: Tensor, n: int, *, best_of_all: bool = False) -> dict[str, float]:
    """Accuracy of the highest score among n samples, averaged over disjoint groups, with its standard error over
    problems.

    Args:
        correct: (problems, samples).
        score: (problems, samples), what is maximised.
        n: group size, a divisor of the number of samples.
        best_of_all: pass@n: is any sample of the group right?
    """
    groups, scores = correct.view(len(correct), -1, n), score.view(len(correct), -1, n)
    if best_of_all:
        hits = groups.any(-1).double().mean(-1)
    else:
        hits = groups.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1).double().mean(-1)
    return {"mean": hits.mean().item(), "error": hits.std().item() / math.sqrt(len(hits))}


def best_of_n(samples: Samples) -> list[dict]:
    """Accuracy of best-of-n for n = 1, 2, 4, …, 64, chosen by the energy, by the reward, and by the strong model's
    likelihood."""
    energy = -compute_energy(samples.logps, samples.rewards["tiny-reward"], beta=1.0)
    scores = {"energy": energy, "reward": samples.rewards["tiny-reward"], "likelihood": samples.rewards["tiny-strong"]}
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        row: dict = {"n": n, "pass": group_mean(samples.correct, energy, n, best_of_all=True)}
        rows.append(row | {name: group_mean(samples.correct, score, n) for name, score in scores.items()})
    return rows


def greedy_accuracy(family: Family, problems: list[Problem], name: str) -> dict[str, float] | None:
    """Greedy accuracy of an embedded language model with its 95% Wilson interval; None where it is missing."""
    if not (Path(__file__).parents[1] / "assets" / family.name / name / "config.json").is_file():
        return None
    policy = load_policy(f"{family.name}/{name}", device=CPU)
    right = 0
    for start in range(0, len(problems), 128):
        batch = problems[start : start + 128]
        sampling = Sampling(max_new_tokens=family.max_new_tokens)
        results = Greedy().decode(batch, Setting(policy, None, Ledger(len(batch)), sampling=sampling))
        right += sum(family.grade(r.text, str(p.answer)) for r, p in zip(results, batch, strict=True))
    low, high = wilson_interval(right, len(problems))
    return {"accuracy": right / len(problems), "low": float(low), "high": float(high)}


def commit() -> str | None:
    """The commit that the figures were made on, where git is there to say."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def render(figures: dict, folder: Path) -> str:
    """The card as Markdown."""
    lines = [
        f"# Tiny models: {figures['family']}",
        "",
        "Made by `python scripts/train_tiny.py --config configs/train_tiny/"
        + figures["family"]
        + "/<model>.yaml`; weights in float16, "
        "run in float32. tiny-policy is an early checkpoint of the run that made tiny-strong, on purpose, so "
        "that it errs. tiny-reward is "
        "tiny-strong with fresh layers on top, trained to say at every token whether the solution is right so "
        "far, and at the end whether the answer is; tiny-gold is a second "
        "judge from another language model of another seed, which no decoder sees.",
        "",
        f"Figures on {figures['problems']} test problems, made by `{figures['command']}` on commit "
        f"{figures['commit']}.",
        "",
        "| language model | greedy accuracy [95%] | on the hard split |",
        "|---|---|---|",
    ]
    for name, value in figures["greedy"].items():
        if value is not None:
            hard = figures["greedy_hard"].get(name)
            shown = "" if hard is None else f"{hard['accuracy']:.3f} [{hard['low']:.3f}, {hard['high']:.3f}]"
            lines.append(f"| {name} | {value['accuracy']:.3f} [{value['low']:.3f}, {value['high']:.3f}] | {shown} |")
    lines += [
        "",
        f"tiny-policy sampled at temperature 1: accuracy {figures['sampled_accuracy']:.3f}, "
        + ", ".join(f"pass@{k} {v['mean']:.3f} ± {v['error']:.3f}" for k, v in figures["pass_at"].items())
        + ".",
        "",
        f"{figures['answer_right_steps_wrong']:.1%} of its right answers come out of wrong steps that "
        f"happened to recover.",
        "",
        "| judge | AUC on its samples: is the answer right? | is every step right? | AUC of the process "
        "values over prefixes |",
        "|---|---|---|---|",
        *(
            f"| {name} | {auc:.4f} | {figures['auc_steps'][name]:.4f} | {figures['process_auc'][name]:.4f} |"
            for name, auc in figures["auc"].items()
        ),
        "",
        "(tiny-strong judges by log-likelihood: `rewards/likelihood.py`.)",
        "",
        "Best-of-n, by what it is chosen by (mean over disjoint groups of 64 samples ± standard error over "
        "problems, β = 1):",
        "",
        "| n | energy r/β + log π | reward | likelihood under tiny-strong | pass@n |",
        "|---|---|---|---|---|",
    ]
    for row in figures["best_of_n"]:
        cells = " | ".join(
            f"{row[k]['mean']:.3f} ± {row[k]['error']:.3f}" for k in ("energy", "reward", "likelihood", "pass")
        )
        lines.append(f"| {row['n']} | {cells} |")
    lines += [
        "",
        "First-order changes of the value against true ones, over the policy's 8 likeliest tokens "
        "(docs/taught_judge.md):",
        "",
        "| gradient of | rank correlation | best edit found where one mends | by the policy alone | places |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures["first_order"].items():
        lines.append(
            f"| {name} | {row['correlation']:.3f} | {row['mended']:.3f} | {row['mended_policy']:.3f} | "
            f"{row['places']} |"
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return "\n".join([*lines, "", f"Size of this folder: {size / 2**20:.1f} MiB.", ""])
