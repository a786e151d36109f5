"""Decoding as a Lightning prediction loop: every decoder on every batch of problems, written down as it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch

from nabla_rl.budget import Budget
from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import AbstractDecoder, check_beta
from nabla_rl.decoding.run import Job, decoder_class
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_policy, qualified
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.loading import load_reward
from nabla_rl.run_folder import RunFolder
from nabla_rl.types import UserError

DEFAULT_DECODERS = ("greedy", "best_of_n", "self_consistency", "nabla", "edit_search")
"""What is compared where nothing else is asked for; without a reward model, those of them that need none."""


class DecodingModule(L.LightningModule):
    """Decodes batches of problems with several decoders, under one policy, one reward model and one β.

    Args:
        policy: Language model that is decoded.
        reward: Reward model that decoders use.
        gold: Second reward model that no decoder sees, for comparison; null is none.
        decoders: Names or class paths of the decoders, in the order of the table.
        beta: KL coefficient β = 1/λ of the energy L(y) = -r(x, y)/β - log π(y|x).
        sampling: Sampling of rollouts.
        budget: Limits of what one problem may cost.
        family: Family of the embedded models that a bare name means.
        seed: Random seed.
        options: Decoders by their names, where they have options; own options of a reward by its kind's name.
    """

    def __init__(
        self,
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008, frozen
        reward: RewardOptions = RewardOptions(),  # noqa: B008, frozen
        gold: RewardOptions = RewardOptions(name=None),  # noqa: B008, frozen
        decoders: list[str] | None = None,
        beta: float = 1.0,
        sampling: Sampling = Sampling(),  # noqa: B008, frozen
        budget: Budget = Budget(),  # noqa: B008, frozen
        family: str = "words",
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        check_beta(beta)
        names = chosen_decoders(decoders, reward)
        self.policy_options = replace(policy, name=qualified(policy.name, family))
        self.reward_options = {
            "reward": qualified_reward(reward, family),
            "gold": qualified_reward(gold, family),
        }
        self.own = {name: value for name, value in options.items() if not isinstance(value, AbstractDecoder)}
        self.decoders = build_decoders(names, options)
        needy = [name for name, decoder in self.decoders.items() if decoder.needs_reward]
        if reward.name is None and needy:
            listed = " and ".join(needy)
            raise UserError(
                "reward.name", f"a reward model for {listed}", "none",
                f"Name one, or leave {listed} out of {{decoders}}.",
            )  # fmt: skip
        self.beta, self.sampling, self.budget, self.seed = beta, sampling, budget, seed
        self.job: Any = None
        self.judge_curve = False
        self.run_folder: RunFolder | None = None
        self.on_rows: Callable[[list[dict]], None] = lambda rows: None

    @property
    def decoder_names(self) -> list[str]:
        """The names of the decoders, in order."""
        return list(self.decoders)

    def prepare(self, device: torch.device, data: ProblemData, *, like: DecodingModule | None = None) -> None:
        """Load the models, or take those of `like`, and check that every problem fits them, before anything is
        decoded."""
        if like is None:
            policy = load_policy(self.policy_options, device=device)
            rewards = {
                role: load_reward(given, device=device, argument=role, own=self.own.get(given.kind.rpartition(".")[2]))
                for role, given in self.reward_options.items()
            }
        else:
            policy, rewards = like.job.policy, {"reward": like.job.reward, "gold": like.job.gold}
        longest = self.sampling.max_new_tokens or policy.max_new_tokens
        self.job = Job(
            policy, **rewards, beta=self.beta, sampling=replace(self.sampling, max_new_tokens=longest),
            seed=self.seed, budget=self.budget, extract=data.extract, grade=data.grade,
        )  # fmt: skip
        self.job.check(data.problems)

    def setup(self, stage: str) -> None:
        """Load the models, where that was not done before."""
        if self.job is None:
            self.prepare(self.trainer.strategy.root_device, self.data)

    @property
    def data(self) -> ProblemData:
        """The problems that are being decoded."""
        data = self.trainer.datamodule  # pyright: ignore
        assert isinstance(data, ProblemData)
        return data

    def transfer_batch_to_device(
        self, batch: list[Problem], device: torch.device, dataloader_idx: int
    ) -> list[Problem]:
        """Problems are text: the decoders put what they make of them where the models are."""
        return batch

    def predict_step(self, batch: list[Problem], batch_index: int) -> None:
        """Decode one batch with every decoder that has not finished it."""
        folder = self.run_folder
        assert folder is not None
        # the decoders differentiate: Lightning's inference mode must not reach them
        with torch.inference_mode(False):
            for name, decoder in self.decoders.items():
                # a batch is decoded whole, so that a resumed run computes what an unbroken one would have
                if folder.missing([problem.id for problem in batch], name):
                    folder.append(
                        self.job.lines(
                            decoder, batch, config=folder.config_hash, name=name, judge_curve=self.judge_curve
                        )
                    )
                self.on_rows([folder.rows[problem.id, name] for problem in batch])


def chosen_decoders(decoders: Sequence[str] | None, reward: RewardOptions) -> list[str]:
    """The decoders that were asked for; by default those that the reward model can drive."""
    if decoders is None:
        return [name for name in DEFAULT_DECODERS if reward.name is not None or not decoder_class(name).needs_reward]
    if not decoders or len(set(decoders)) != len(decoders):
        raise UserError("decoders", "a list of different decoders", str(list(decoders)))
    return list(decoders)


def build_decoders(names: Sequence[str], options: dict[str, Any]) -> dict[str, AbstractDecoder]:
    """The decoders of these names or class paths, with their options where there are any, by what they are called."""
    found: dict[str, AbstractDecoder] = {}
    for name in names:
        kind = decoder_class(name, argument="decoders")
        found[kind.name] = options.get(kind.name) or kind()
    return found


def qualified_reward(options: RewardOptions, family: str) -> RewardOptions:
    """The options with the family before the bare names of embedded models."""
    names = {"name": options.name, "taught": options.taught}
    return replace(options, **{key: name if name is None else qualified(name, family) for key, name in names.items()})
