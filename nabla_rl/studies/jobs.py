"""Decoding as studies do it: options become jobs, points share loaded models, batches fill run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nabla_rl.budget import Budget
from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.decoding import DECODERS, AbstractDecoder
from nabla_rl.decoding.base import check_beta
from nabla_rl.decoding.module import build_decoders, chosen_decoders, qualified_reward
from nabla_rl.decoding.run import Job, batches, check_same_problems, decoder_class
from nabla_rl.models.loading import PolicyOptions, RewardOptions, default_device, load_policy, qualified
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.report.decoded import finish
from nabla_rl.report.rows import Row
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.loading import REWARDS, load_reward, reward_class
from nabla_rl.run_folder import RunFolder
from nabla_rl.studies.base import Options, Watch
from nabla_rl.studies.options import OptionReader
from nabla_rl.types import UserError

SECTIONS = ("model", "data")
"""How the options of decoding begin."""
EMBEDDED = {"policy.name": "tiny-policy", "reward.name": "tiny-reward", "gold.name": "tiny-gold"}
"""The models of a study that names none: those of its family of problems."""


@dataclass(frozen=True)
class Decoding:
    """What decodes which problems under what; no model is loaded for it.

    Attributes:
        policy, reward, gold: Which models.
        decoders: Decoders with their options, by name.
        beta: KL coefficient β.
        sampling: How rollouts are drawn.
        budget: The most that one problem may cost.
        data: The problems, and how their answers are read.
        seed: Random seed.
        own: Options of each reward's own kind, by role.
        config: Everything that decides the results, as plain values.
    """

    policy: PolicyOptions
    reward: RewardOptions
    gold: RewardOptions
    decoders: Mapping[str, AbstractDecoder]
    beta: float
    sampling: Sampling
    budget: Budget
    data: ProblemData
    seed: int
    own: Mapping[str, Any] = field(default_factory=dict)
    config: Row = field(default_factory=dict)

    def with_seed(self, seed: int) -> Decoding:
        """The same decoding with other random numbers."""
        return replace(self, seed=seed, config={**self.config, "seed": seed})

    @property
    def decoder(self) -> AbstractDecoder:
        """The only decoder, of a point that has one."""
        (decoder,) = self.decoders.values()
        return decoder


def decoding_parts(section: str, strangers: Sequence[str]) -> dict[str, Any]:
    """The sections of options that describe models, decoders and sampling, and whose arguments they are."""
    kinds = {kind.name: kind for kind in (*DECODERS.values(), *map(decoder_class, strangers))}
    parts: dict[str, Any] = {
        "policy": PolicyOptions, "reward": RewardOptions, "gold": RewardOptions, "sampling": Sampling,
        "budget": Budget, **kinds,
    }  # fmt: skip
    return {f"{section}.{name}": part for name, part in parts.items()}


@cache
def decode_reader(strangers: tuple[str, ...], own: tuple[tuple[str, str], ...]) -> OptionReader:
    """The reader of decoding's options, with those of decoders and rewards that are given by class path."""
    return OptionReader(
        "decode",
        {**decoding_parts("model", strangers), "data": ProblemData},
        {"model.beta": (float, 1.0), "model.decoders": (list[str] | None, None)},
        {f"model.{name}": value for name, value in EMBEDDED.items()},
        loaders={own_section(kind): reward_class(kind, argument=f"{role}.kind") for role, kind in own},
    )


def own_section(kind: str) -> str:
    """Where the options of a reward's own class stand."""
    return f"model.{kind.rpartition('.')[2]}"


def read_decoding(options: Options, *, seed: int, decoders: Sequence[str] | None = None) -> Decoding:
    """The decoding that the options describe, by the names of `nabla-rl decode`.

    Args:
        options: Dotted options under `model` and `data`.
        seed: Random seed.
        decoders: Names or class paths of the decoders; None is what `model.decoders` says.

    Raises:
        UserError: An option is unknown, or has a wrong value; it is named where the study file has it.
    """
    given = options.get("model.decoders") if decoders is None else decoders
    named = [name for name in given if isinstance(name, str)] if isinstance(given, (list, tuple)) else []
    kinds = ((role, options.get(f"model.{role}.kind")) for role in ("reward", "gold"))
    own = tuple((role, kind) for role, kind in kinds if isinstance(kind, str) and kind not in REWARDS)
    with options.placing():
        for name in named:
            decoder_class(name, argument="decoders")
        reader = decode_reader(tuple(name for name in named if name not in DECODERS), own)
    parsed = reader.parse(options)
    built = reader.build(parsed, options)
    with options.placing():
        return _decoding(reader.plain(parsed), built, seed, decoders, dict(own))


def _decoding(plain: Row, built: Any, seed: int, names: Sequence[str] | None, own: Mapping[str, str]) -> Decoding:
    """The parts put together, what does not go together refused."""
    model, data = built.model, built.data
    check_beta(model.beta)
    chosen = list(names) if names is not None else chosen_decoders(model.decoders, model.reward)
    options = {name: value for name, value in vars(model).items() if isinstance(value, AbstractDecoder)}
    decoders = build_decoders(chosen, options)
    needy = [name for name, decoder in decoders.items() if decoder.needs_reward]
    if model.reward.name is None and needy:
        raise UserError("model.reward.name", f"a reward model for {' and '.join(needy)}", "none", "Name one.")
    family = data.family.name
    kept = {*decoders, "policy", "reward", "gold", "sampling", "budget", "beta"}
    settings = {name: value for name, value in plain["model"].items() if name in kept}
    problems = {name: value for name, value in plain["data"].items() if name != "batch_size"}
    extra = {role: vars(model[own_section(kind).removeprefix("model.")]) for role, kind in own.items()}
    return Decoding(
        replace(model.policy, name=qualified(model.policy.name, family)),
        qualified_reward(model.reward, family), qualified_reward(model.gold, family),
        decoders, model.beta, model.sampling, model.budget, data, seed, extra,
        {"seed": seed, "model": {**settings, "decoders": chosen}, "data": problems},
    )  # fmt: skip


class Models:
    """Loaded models, each loaded once for all points that ask for the same one.

    Args:
        device: Where they are put; None is the GPU where there is one.
        keep: Number of models that are kept, those that were asked for last.
    """

    def __init__(self, device: torch.device | None = None, keep: int = 8):
        self.device = device or default_device()
        self.keep = keep
        self._loaded: dict[str, Any] = {}

    def policy(self, options: PolicyOptions, *, argument: str = "policy") -> Policy:
        """A policy."""
        return self._once(options, lambda: load_policy(options, device=self.device, argument=argument))

    def reward(self, options: RewardOptions, role: str, own: Any = None) -> AbstractReward | None:
        """A reward model; None where the options name none."""
        return self._once((options, own), lambda: load_reward(options, device=self.device, argument=role, own=own))

    def _once(self, key: Any, load: Callable[[], Any]) -> Any:
        name = repr(key)
        found = self._loaded.pop(name) if name in self._loaded else load()
        self._loaded[name] = found
        while len(self._loaded) > self.keep:
            del self._loaded[next(iter(self._loaded))]
        return found

    def job(self, decoding: Decoding) -> Job:
        """The job of a decoding, after a check that every problem fits its models."""
        policy = self.policy(decoding.policy)
        longest = decoding.sampling.max_new_tokens or policy.max_new_tokens
        job = Job(
            policy,
            self.reward(decoding.reward, "reward", decoding.own.get("reward")),
            self.reward(decoding.gold, "gold", decoding.own.get("gold")),
            beta=decoding.beta, sampling=replace(decoding.sampling, max_new_tokens=longest), seed=decoding.seed,
            budget=decoding.budget, extract=decoding.data.extract, grade=decoding.data.grade,
        )  # fmt: skip
        job.check(decoding.data.problems)
        return job


def decode_batch(
    job: Job, decoding: Decoding, folder: RunFolder, batch: Sequence[Problem], *, judge_curve: bool = False
) -> None:
    """Answer one batch with every decoder that has not finished it, and write it down."""
    for name, decoder in decoding.decoders.items():
        # a batch is decoded whole, so that a resumed run computes what an unbroken one would have
        if folder.missing([problem.id for problem in batch], name):
            folder.append(job.lines(decoder, batch, config=folder.config_hash, name=name, judge_curve=judge_curve))


def decode_into(path: Path, decoding: Decoding, models: Models, watch: Watch) -> list[Row]:
    """The lines of a decoding in a run folder of its own, batch by batch; what is there is not decoded again."""
    folder, problems = RunFolder(path, decoding.config), decoding.data.problems
    check_same_problems(folder, problems)
    ids, names = [problem.id for problem in problems], list(decoding.decoders)
    if any(folder.missing(ids, name) for name in names):
        job = models.job(decoding)
        done = 0
        for batch in batches(problems, decoding.data.batch_size):
            watch.step(done, len(problems), f"problem {done + 1} of {len(problems)}")
            decode_batch(job, decoding, folder, batch)
            done += len(batch)
        watch.step(done, len(problems))
    finish(folder, ids, names, more={"seed": decoding.seed})
    return [folder.rows[key, name] for key in ids for name in names]
