"""Completions of a law, by whatever way they are made, and what judges and the policy say of each: plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.data.problems import Problem
from nabla_rl.decoding import AbstractDecoder, EditSearch, Greedy, Sampling
from nabla_rl.decoding.base import draw_rollouts, prefill
from nabla_rl.decoding.descent import Descent
from nabla_rl.decoding.module import Decoding, judge_completions
from nabla_rl.dto import DTOConfig
from nabla_rl.functional.kl import reverse_kl
from nabla_rl.functional.logps import sequence_logps
from nabla_rl.ledger import Ledger
from nabla_rl.models.groups import group_logits
from nabla_rl.models.policy import Policy
from nabla_rl.types import UserError

Row = dict[str, Any]
Ids = tuple[int, ...]
Density = Literal["known", "point", "unknown"]
"""Of a law at its completions: the policy's own (sampling), one completion (a deterministic decoder), or none that
could be evaluated (a search with random numbers)."""

BATCH = 256
"""Completions that go through a model side by side."""
MOST_ROWS = 2048
"""Completions that are drawn side by side at most, by fewer problems at once where each has many."""


@dataclass(frozen=True)
class Source:
    """A law of completions: a policy, perhaps with an adapter, and a way to decode it.

    Attributes:
        curve: the line of a figure that it belongs to.
        beta: strength of the whole, where it has one; β of the decoder unless `options` say otherwise.
        at: its place on the curve, where that is not β: a number of steps or rounds.
        decoder: a decoder of the decode command, `sample` (temperature 1, untruncated) or `dto` (DTO alone).
        samples: completions of each problem.
        adapter: which of the study's adapters is in the policy; null: none.
        step: after how many steps of its training; null: at its end.
        tilt: β of a reweighting of the samples by exp(r/β); null: they are taken as they are.
        options: dotted options of the decode command.
    """

    curve: str
    beta: float | None = None
    at: float | None = None
    decoder: str = "sample"
    samples: int = 1
    adapter: str | None = None
    step: int | None = None
    tilt: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        if self.samples < 1:
            raise UserError(f"--variants: expected samples of at least 1, found {self.samples}.")
        for name in ("beta", "tilt"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--variants: expected a positive {name}, found {value}.")
        if self.tilt is not None and self.decoder != "sample":
            raise UserError(f"--variants: expected tilt with samples of a policy alone, found it with {self.decoder}.")


@dataclass
class Drawn:
    """The completions of a law.

    Attributes:
        completions: of each problem, in order.
        flops: of each problem's completions together.
        density: whether the law's density is known.
    """

    completions: list[list[Ids]]
    flops: list[float]
    density: Density


def draw(source: Source, module: Decoding, problems: Sequence[Problem], extract: Any, *, batch_size: int) -> Drawn:
    """Completions of every problem by the way that the source names, from the models that `module` holds."""
    found = Drawn([], [], "known")
    seed = module.seed
    size = max(1, min(batch_size, MOST_ROWS // source.samples)) if source.decoder == "sample" else batch_size
    for start in range(0, len(problems), size):
        part = problems[start : start + size]
        ledger = Ledger(len(part))
        if source.decoder == "sample":
            found.completions += _samples(source, module, part, ledger)
        else:
            several: list[list[Ids]] = [[] for _ in part]
            for number in range(source.samples):
                module.seed = seed + 1000 * number
                decoder = _decoder(source, module, extract)
                found.density = "point" if is_deterministic(decoder) else "unknown"
                for answers, result in zip(
                    several, decoder.decode(part, module.policy, module.reward, ledger), strict=True
                ):
                    answers.append(tuple(result.ids))
            module.seed = seed
            found.completions += several
        found.flops += [ledger.cost(k).flops / source.samples for k in range(len(part))]
    return found


def _samples(source: Source, module: Decoding, problems: Sequence[Problem], ledger: Ledger) -> list[list[Ids]]:
    sampling = Sampling(1.0, 1.0, module.sampling.max_new_tokens)
    prefix = prefill(problems, module.policy, ledger, sampling.max_new_tokens)
    rollout = draw_rollouts(problems, module.policy, prefix, sampling, n=source.samples, seed=module.seed)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]
    return [rows[k * source.samples : (k + 1) * source.samples] for k in range(len(problems))]


def _decoder(source: Source, module: Decoding, extract: Any) -> AbstractDecoder:
    if source.decoder == "dto":
        config: DTOConfig = module.nabla.dto
        return Descent(config, Sampling(1.0, 1.0, module.sampling.max_new_tokens), module.seed)
    return module.build_decoder(source.decoder, extract)


def is_deterministic(decoder: AbstractDecoder) -> bool:
    """Does the decoder answer a problem in one way only, whatever its seed?"""
    if isinstance(decoder, EditSearch):
        return decoder.sampling.temperature == 0 and not decoder.proposals.startswith("random")
    return isinstance(decoder, Greedy)


def judge(drawn: Drawn, module: Decoding, reference: Policy, problems: Sequence[Problem], grade: Any) -> Row:
    """Rewards, correctness and -log π_ref of every completion, and the KL of each problem's law from the reference
    where the law is a policy's: exact over the vocabulary at every position of its samples, summed over the
    completion (unbiased, and less noisy than log-ratios). Those, log π - log π_ref, are there for such a law, too.

    Equal completions of a problem are judged once, so that they have equal values to the last bit.
    """
    different = [sorted(set(answers)) for answers in drawn.completions]
    owners = [problem for problem, ids in zip(problems, different, strict=True) for _ in ids]
    flat = [ids for each in different for ids in each]
    texts = [module.policy.decode(ids) for ids in flat]
    columns = {
        "rewards": judge_completions(module.reward, owners, flat, batch_size=BATCH),
        "gold": judge_completions(module.gold, owners, flat, role="gold_reward", batch_size=BATCH),
        "correct": [
            None if owner.answer is None else float(grade(text, owner.answer))
            for owner, text in zip(owners, texts, strict=True)
        ],
        "surprisal": [-value for value in completion_logps(reference, owners, flat)],
    }
    if drawn.density == "known":
        own = completion_logps(module.policy, owners, flat) if module.policy is not reference else None
        columns["log_ratio"] = [
            0.0 if own is None else own[k] + surprisal for k, surprisal in enumerate(columns["surprisal"])
        ]
    sizes = [len(each) for each in different]
    row: Row = {"completions": [[list(ids) for ids in answers] for answers in drawn.completions]}
    for name, values in columns.items():
        judged = [
            dict(zip(ids, part, strict=True)) for ids, part in zip(different, _split(values, sizes), strict=True)
        ]
        row[name] = [[mine[ids] for ids in answers] for mine, answers in zip(judged, drawn.completions, strict=True)]
    known = drawn.density == "known"
    row["kl"] = policy_kl(module.policy, reference, problems, drawn.completions) if known else None
    return row | {"flops": drawn.flops, "density": drawn.density}


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _padded(rows: Sequence[Ids], policy: Policy) -> tuple[Tensor, Tensor]:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=policy.pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.to(policy.device), mask.to(policy.device)


@torch.no_grad()
def completion_logps(policy: Policy, owners: Sequence[Problem], completions: Sequence[Ids]) -> list[float]:
    """log π(y|x) of one completion for each entry of `owners`."""
    values: list[float] = []
    for start in range(0, len(owners), BATCH):
        part = owners[start : start + BATCH]
        prompts = [policy.encode_prompt(problem.problem) for problem in part]
        prefix = policy.prefill(prompts, torch.arange(len(part)), Ledger(len(part)))
        ids, mask = _padded(completions[start : start + BATCH], policy)
        values += policy.completion_logps(prefix, ids, mask).double().sum(-1).tolist()
    return values


@torch.no_grad()
def policy_kl(
    policy: Policy, reference: Policy, problems: Sequence[Problem], completions: Sequence[Sequence[Ids]]
) -> list[float]:
    """KL(policy‖reference) of each problem, from samples of the policy: at every position the exact KL of the next
    token, summed over the completion; the mean over the problem's samples."""
    if policy is reference:
        return [0.0] * len(problems)
    size, found = len(completions[0]), []
    each = max(1, BATCH // size)
    for start in range(0, len(problems), each):
        prompts = [policy.encode_prompt(problem.problem) for problem in problems[start : start + each]]
        ids, mask = _padded([ids for answers in completions[start : start + each] for ids in answers], policy)
        laws = [group_logits(model, prompts, ids, mask, Ledger(1)).log_softmax(-1) for model in (policy, reference)]
        sums = sequence_logps(reverse_kl(*laws), mask).double()
        found += sums.view(-1, size).mean(1).tolist()
    return found


@torch.no_grad()
def features(policy: Policy, owners: Sequence[Problem], completions: Sequence[Ids]) -> Tensor:
    """What a probe sees of a completion: the policy's hidden states over it, their mean and the last one, and its
    length, (rows, 2 · hidden + 1) float64."""
    found = []
    for start in range(0, len(owners), BATCH):
        part = owners[start : start + BATCH]
        prompts = [policy.encode_prompt(problem.problem) for problem in part]
        prefix = policy.prefill(prompts, torch.arange(len(part)), Ledger(len(part)))
        ids, mask = _padded(completions[start : start + BATCH], policy)
        hidden = policy.backbone.encode(prefix, ids, mask).hidden[:, 1:].double()
        lengths = mask.sum(-1, keepdim=True)
        mean = (hidden * mask[..., None]).sum(1) / lengths
        last = hidden.gather(1, (lengths - 1)[..., None].expand(-1, -1, hidden.shape[-1])).squeeze(1)
        found.append(torch.cat([mean, last, lengths.double()], 1).cpu())
    return torch.cat(found)
