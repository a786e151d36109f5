"""Completions of a distribution, by whatever way they are made, and what reward models and the policy say of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.data.problems import Problem
from nabla_rl.decoding import AbstractDecoder, Nabla, Sampling, Setting
from nabla_rl.decoding.base import draw_rollouts, prefill
from nabla_rl.decoding.descent import Descent
from nabla_rl.decoding.run import Job, judge_completions
from nabla_rl.functional.kl import reverse_kl
from nabla_rl.functional.logps import sequence_logps
from nabla_rl.ledger import Ledger
from nabla_rl.models.groups import group_logits
from nabla_rl.models.policy import Policy
from nabla_rl.report.rows import Row
from nabla_rl.studies.jobs import Decoding
from nabla_rl.types import UserError

Ids = tuple[int, ...]
Density = Literal["known", "point", "unknown"]
"""Whether a distribution's density is known at its completions: the policy's own (sampling), one completion (a
deterministic decoder), or none that could be evaluated (a search with random numbers)."""

BATCH = 256
"""Completions that go through a model side by side."""
MOST_ROWS = 2048
"""Completions that are drawn side by side at most, by fewer problems at once where each has many."""


@dataclass(frozen=True)
class Source:
    """A distribution of completions: a policy, perhaps with an adapter, and a way to decode it.

    Attributes:
        curve: Line of a figure that it belongs to.
        beta: Strength of the whole, where it has one; β of the decoder unless `model.beta` says otherwise.
        at: Place on the curve, where that is not β: a number of steps or rounds.
        decoder: A decoder, `sample` (temperature 1, untruncated) or `dto` (DTO alone, with `model.nabla.dto`).
        samples: Completions of each problem.
        adapter: Which of the study's adapters is in the policy; null is none.
        step: Number of steps of its training; null is all of them.
        tilt: β of a reweighting of the samples by exp(r/β); null takes them as they are.
        seed: Random seed in place of the point's; null is the point's.
    """

    curve: str
    beta: float | None = None
    at: float | None = None
    decoder: str = "sample"
    samples: int = 1
    adapter: str | None = None
    step: int | None = None
    tilt: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.samples < 1:
            raise UserError("samples", "at least 1", str(self.samples))
        for name in ("beta", "tilt"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(name, "a positive number", str(value))
        if self.tilt is not None and self.decoder != "sample":
            raise UserError("tilt", "none but with samples of a policy", f"{self.tilt} with {self.decoder}")

    @property
    def decoders(self) -> list[str]:
        """The decoder whose options it takes."""
        return {"sample": ["sample"], "dto": ["nabla"]}.get(self.decoder, [self.decoder])


@dataclass
class Drawn:
    """The completions of a distribution.

    Attributes:
        completions: Those of each problem, in order.
        flops: Mean cost of a completion, for each problem.
        density: Whether the density is known.
    """

    completions: list[list[Ids]]
    flops: list[float]
    density: Density


def draw(source: Source, decoding: Decoding, job: Job) -> Drawn:
    """Completions of every problem by the way that the source names."""
    found = Drawn([], [], "known")
    problems, size = decoding.data.problems, decoding.data.batch_size
    if source.decoder == "sample":
        size = max(1, min(size, MOST_ROWS // source.samples))
    for start in range(0, len(problems), size):
        part = problems[start : start + size]
        ledger = Ledger(len(part))
        if source.decoder == "sample":
            found.completions += _samples(source, job, part, ledger)
        else:
            decoder = decoder_of(source, decoding)
            found.density = "point" if decoder.is_deterministic(job.sampling) else "unknown"
            several: list[list[Ids]] = [[] for _ in part]
            for number in range(source.samples):
                setting = _setting(source, job, ledger, job.seed + 1000 * number)
                for answers, result in zip(several, decoder.decode(part, setting), strict=True):
                    answers.append(tuple(result.ids))
            found.completions += several
        found.flops += [ledger.cost(k).flops / source.samples for k in range(len(part))]
    return found


def _setting(source: Source, job: Job, ledger: Ledger, seed: int) -> Setting:
    """The setting of one draw; samples and what DTO starts from are the whole distribution's."""
    whole = source.decoder in ("sample", "dto")
    sampling = Sampling(1.0, 1.0, job.sampling.max_new_tokens) if whole else job.sampling
    return Setting(job.policy, job.reward, ledger, job.beta, sampling, seed, job.budget, job.extract)


def _samples(source: Source, job: Job, problems: Sequence[Problem], ledger: Ledger) -> list[list[Ids]]:
    setting = _setting(source, job, ledger, job.seed)
    rollout = draw_rollouts(problems, setting, prefill(problems, setting), n=source.samples)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]
    return [rows[k * source.samples : (k + 1) * source.samples] for k in range(len(problems))]


def decoder_of(source: Source, decoding: Decoding) -> AbstractDecoder:
    """The decoder that a source names; `dto` is the optimisation of ∇-Reasoner by itself."""
    decoder = decoding.decoder
    if source.decoder == "dto":
        assert isinstance(decoder, Nabla)
        return Descent(decoder.dto)
    return decoder


def judge(drawn: Drawn, job: Job, reference: Policy, problems: Sequence[Problem]) -> Row:
    """Rewards, correctness and -log π_ref of every completion, and the KL of each problem's distribution from the
    reference where the distribution is a policy's: exact over the vocabulary at every position of its samples, summed
    over the completion (unbiased, and less noisy than log-ratios). The log-ratios log π - log π_ref are there for such
    a distribution, too.

    Equal completions of a problem are judged once, so that they have equal values to the last bit.
    """
    different = [sorted(set(answers)) for answers in drawn.completions]
    owners = [problem for problem, ids in zip(problems, different, strict=True) for _ in ids]
    flat = [ids for each in different for ids in each]
    graded = [job.graded(job.policy.decode(ids), owner) for ids, owner in zip(flat, owners, strict=True)]
    columns = {
        "rewards": judge_completions(job.reward, owners, flat, batch_size=BATCH),
        "gold": judge_completions(job.gold, owners, flat, role="gold", batch_size=BATCH),
        "correct": [None if right is None else float(right) for right in graded],
        "surprisal": [-value for value in completion_logps(reference, owners, flat)],
    }
    if drawn.density == "known":
        own = completion_logps(job.policy, owners, flat) if job.policy is not reference else None
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
    row["kl"] = policy_kl(job.policy, reference, problems, drawn.completions) if known else None
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
        logps = [group_logits(model, prompts, ids, mask, Ledger(1)).log_softmax(-1) for model in (policy, reference)]
        sums = sequence_logps(reverse_kl(*logps), mask).double()
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
