"""Beam search: what it keeps, what it finds when it keeps everything, and that nothing is read twice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nabla_rl.decoding import BeamSearch, Decoded, Sampling
from nabla_rl.decoding.steps import cut_steps, line_ends
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError
from tests import toys_hf as toys
from tests.test_ledger import hooked

TOKEN = BeamSearch(width=3, expand=4, step="token")
LINE = BeamSearch(width=3, expand=3, step="line", step_tokens=4)
GIVEN = {"beta": 0.5, "sampling": Sampling(1.0, max_new_tokens=8)}


def reward_of(kind: str):
    tokenizer = toys.chat_tokenizer() if kind == "template" else toys.tokenizer()
    if kind == "likelihood":
        return LikelihoodReward(Policy(toys.build_llama(seed=5), tokenizer))
    return SequenceClassifierReward(toys.build_classifier(), tokenizer)


def decode(decoder: BeamSearch, problems, reward=None, policy=None, **changes) -> tuple[list[Decoded], Ledger]:
    return toys.decode(decoder, problems, policy, reward, **{**GIVEN, **changes})


def every_completion(policy: Policy, length: int) -> list[list[int]]:
    """All token sequences that end by themselves, or at `length`."""
    ends, done, going = set(policy.get_buffer("eos_ids").tolist()), [], [[]]
    for _ in range(length):
        longer = [[*ids, token] for ids in going for token in range(toys.VOCAB)]
        done += [ids for ids in longer if ids[-1] in ends]
        going = [ids for ids in longer if ids[-1] not in ends]
    return done + going


def energies(problem, policy: Policy, reward: AbstractReward, completions, beta: float) -> torch.Tensor:
    """The energy of each completion, computed at once from nothing."""
    ids, mask = toys.pad_right(completions)
    rows = torch.zeros(len(ids), dtype=torch.int64)
    ours = toys.prefill(policy, [policy.encode_prompt(problem.problem)]).select(rows)
    theirs = reward.prefill([problem.problem], torch.tensor([0]), Ledger(1)).select(rows)
    logps = policy.completion_logps(ours, ids, mask).double().sum(-1)
    return -logps - reward.score(theirs, ids, mask).reward.double() / beta


@pytest.mark.parametrize("kind", ["classifier", "template", "likelihood"])
def test_a_beam_that_keeps_everything_finds_the_best_completion(kind: str):
    """With every token proposed and none dropped, the answer has the lowest energy of all completions there are."""
    policy, reward = toys.policy(), reward_of(kind)
    if kind == "template":
        policy = Policy(toys.build_llama(eos_token_id=[2, 9, 17]), toys.chat_tokenizer())
    completions = every_completion(policy, 2)
    decoder = replace(TOKEN, width=len(completions), expand=toys.VOCAB)
    problems = toys.problems(3)
    results, _ = decode(decoder, problems, reward, policy, sampling=Sampling(max_new_tokens=2))
    for problem, result in zip(problems, results, strict=True):
        expected = energies(problem, policy, reward, completions, 0.5)
        assert sorted(c.ids for c in result.rollouts) == sorted(tuple(ids) for ids in completions)
        assert list(result.ids) == completions[int(expected.argmin())]
        assert -result.logps - result.reward / 0.5 == pytest.approx(float(expected.min()), abs=1e-3)


@pytest.mark.parametrize("score", ["energy", "reward"])
def test_the_best_of_each_step_are_kept(score: str):
    """A search written out by hand, without a cache, one beam at a time, ends with the same completions."""
    policy, reward = toys.policy(), toys.reward()
    decoder = replace(TOKEN, score=score)
    ends = set(policy.get_buffer("eos_ids").tolist())
    for problem in toys.problems(5):
        prompt, beams, found = policy.encode_prompt(problem.problem), [((), 0.0)], []

        def key(beam, prompt=prompt):
            value = toys.reference_reward(reward.backbone.model, prompt, beam[0])
            return -value if score == "reward" else -beam[1] - value / 0.5

        while beams:
            longer = []
            for ids, logps in beams:
                best = toys.reference_log_probs(policy.backbone.model, prompt, [*ids, 5])[-1].topk(4)
                longer += [
                    ((*ids, int(token)), logps + float(logp))
                    for token, logp in zip(best.indices, best.values, strict=True)
                ]
            kept = sorted(longer, key=key)[: 3 - len(found)]
            over = [beam for beam in kept if beam[0][-1] in ends or len(beam[0]) == 8]
            found += over
            beams = [beam for beam in kept if beam not in over]
        (result,), _ = decode(decoder, [problem])
        assert {c.ids for c in result.rollouts} == {ids for ids, _ in found}
        assert result.ids == min(found, key=key)[0]
        assert result.finished == (result.ids[-1] in ends)


def test_a_width_of_one_that_proposes_one_token_is_greedy():
    """One beam with its likeliest token each time is the policy's greedy completion, whatever the judge says."""
    policy, problems = toys.policy(), toys.problems(6)
    results, _ = decode(replace(TOKEN, width=1, expand=1), problems)
    for problem, result in zip(problems, results, strict=True):
        prefix = toys.prefill(policy, [policy.encode_prompt(problem.problem)])
        greedy = toys.greedy(policy, prefix, 8)
        assert result.ids == tuple(greedy.ids[0, greedy.mask[0]].tolist())
        assert result.finished == bool(greedy.finished[0])


def test_more_width_helps():
    """Over some problems, the energy found falls with the width, and with β small the reward found rises."""
    problems = toys.problems(12)
    for step in ("token", "line"):
        means = []
        for width in (1, 2, 6):
            results, _ = decode(replace(TOKEN, step=step, step_tokens=3, width=width, expand=6), problems)
            means.append(sum(-r.logps - r.reward / 0.5 for r in results) / len(results))
        assert means[0] > means[-1]
    low, high = (decode(TOKEN, problems, beta=beta)[0] for beta in (0.01, 100.0))
    assert sum(r.reward for r in low) > sum(r.reward for r in high)


def test_lines_end_where_lines_end():
    """Steps of a line stop at the break, at the cap, and at the end; equal lines are judged once."""
    newline = toys.tokenizer().convert_tokens_to_ids("\n")
    assert line_ends(toys.tokenizer()) == {newline}
    policy = Policy(toys.build_llama(eos_token_id=[2, 9, 17]), toys.tokenizer())
    with torch.no_grad():
        policy.head_weight[newline] *= 2
    broken = 0
    for problem in toys.problems(6):
        prefix = toys.prefill(policy, [policy.encode_prompt(problem.problem)])
        generator = torch.Generator().manual_seed(3)
        nine = Sampling(1.0, max_new_tokens=9)
        rollout = policy.rollout(prefix, nine, [generator], stops=torch.tensor([newline]))
        whole = policy.rollout(prefix, nine, [generator.manual_seed(3)])
        ids, whole_ids = (r.ids[0, r.mask[0]].tolist() for r in (rollout, whole))
        assert ids == list(cut_steps(whole_ids, {newline}, 9)[0])
        assert bool(rollout.finished[0]) == (ids[-1] in {2, 9, 17})
        broken += ids[-1] == newline
    assert broken > 0
    (result,), _ = decode(LINE, toys.problems(1), sampling=Sampling(0.0, 1.0, 8))
    assert result.counts["judged"] == result.counts["steps"] and len(result.rollouts) == 1


def test_steps_are_cut():
    """Every step ends with a token of the set, at the cap, or at the end; together they are the completion."""
    assert cut_steps([], {9}, 3) == []
    assert cut_steps([9, 9, 1, 2, 3, 4], {9}, 3) == [(9,), (9,), (1, 2, 3), (4,)]
    assert cut_steps([1, 2, 3], frozenset(), 1) == [(1,), (2,), (3,)]


@pytest.mark.parametrize("kind", ["classifier", "template", "likelihood"])
@pytest.mark.parametrize("decoder", [TOKEN, LINE], ids=["token", "line"])
def test_the_ledger_is_what_hooks_count(decoder: BeamSearch, kind: str):
    """Sequential passes are those that hooks see, and no token is read twice by either model."""
    policy, reward = toys.policy(), reward_of(kind)
    judge = reward.judge.backbone if kind == "likelihood" else reward.backbone
    for problem in toys.problems(3):
        with hooked(policy.backbone.base, judge.base) as (ours, theirs):
            (result,), ledger = decode(decoder, [problem], reward, policy)
        assert ledger.cost(0, model="policy").sequential == ours.forwards
        assert ledger.cost(0, model="reward").sequential == theirs.forwards
        assert ledger.cost(0, model="policy").tokens <= ours.positions
        assert ledger.cost(0, phase="rollout", model="reward").calls == 0
        closing = len(reward.tail) * len(result.rollouts) if kind == "template" else 0
        read = ledger.cost(0, phase="score", model="reward").tokens - closing
        if decoder.step == "token":
            assert read == result.counts["judged"]
            fed = ledger.cost(0, phase="rollout", model="policy").tokens
            assert fed <= decoder.width * (result.counts["steps"] - 1)
        else:
            assert read <= result.counts["judged"] * decoder.step_tokens


def test_the_same_seed_gives_the_same_output():
    """Lines are drawn by seed, step and beam."""
    problems = toys.problems(6)
    one, two, other = (decode(LINE, problems, seed=seed)[0] for seed in (0, 0, 1))
    assert [r.rollouts for r in one] == [r.rollouts for r in two]
    assert [r.ids for r in one] != [r.ids for r in other]


def test_what_it_cannot_do_is_said():
    """A reward that judges whole completions alone is refused, and so are settings out of range."""

    class Outcome(AbstractReward):
        def prefill(self, problems, accounts, ledger): ...

        def forward(self, prefix, tokens, mask, *, support=None): ...

        def score(self, prefix, ids, mask): ...

    with pytest.raises(UserError, match="^reward.kind: .* with values of prefixes for beam, found Outcome"):
        decode(TOKEN, toys.problems(1), Outcome())
    for name in ("width", "expand", "step_tokens"):
        with pytest.raises(UserError, match=f"beam.{name}: expected at least 1, found 0"):
            replace(TOKEN, **{name: 0})


def test_without_a_reward_weight_the_judge_has_no_say():
    """At β = ∞ it is plain beam search: another judge changes nothing."""
    other = SequenceClassifierReward(toys.build_classifier(seed=8), toys.tokenizer())
    ours, others = (decode(TOKEN, toys.problems(6), reward, beta=math.inf)[0] for reward in (toys.reward(), other))
    assert [[c.ids for c in r.rollouts] for r in ours] == [[c.ids for c in r.rollouts] for r in others]
