"""∇-Reasoner: its limits, what its trace says, and what it does not compute twice."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nabla_rl.budget import Budget
from nabla_rl.data.problems import Problem
from nabla_rl.decoding import Decoded, Nabla, Sampling
from nabla_rl.decoding import nabla as module
from nabla_rl.decoding.acceptance import Standing
from nabla_rl.decoding.objective import Objective, choose_support, gradient_candidates
from nabla_rl.dto import DTOConfig
from nabla_rl.functional.energy import energy_gradient
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from tests import toys_hf as toys

STEPS = {"num_steps": 4, "step_size": 1.0, "final_step_size": 1.0}
NABLA = Nabla(DTOConfig(**STEPS), max_rollouts=6, min_entropy=0.5, sweeps=1)
GIVEN = {"beta": 0.3, "sampling": Sampling(1.0, max_new_tokens=8), "seed": 1}
POLICY_ONLY = replace(NABLA, dto=DTOConfig(num_steps=0))
RANDOM = torch.Generator


def decode(decoder: Nabla, problems: list[Problem], reward=None, **changes) -> tuple[list[Decoded], Ledger]:
    return toys.decode(decoder, problems, reward=reward, **{**GIVEN, **changes})


def other_reward() -> SequenceClassifierReward:
    return SequenceClassifierReward(toys.build_classifier(seed=8), toys.tokenizer())


def energy(candidate, beta: float) -> float:
    return -candidate.logps - (0.0 if math.isinf(beta) else candidate.reward / beta)


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("acceptance", ["energy", "reward", "metropolis"])
def test_a_trace_is_the_history_of_the_rollouts(acceptance: str, sweeps: int):
    """Each edit changes one token of the current completion, leaves what is before it, and says what was decided."""
    decoder = replace(NABLA, acceptance=acceptance, sweeps=sweeps, max_rollouts=10)
    policy, results = toys.policy(), decode(replace(decoder), toys.problems(10))[0]
    for result in results:
        assert len(result.rollouts) == 1 + len(result.trace) <= 10
        assert result.proposals == len(result.trace)
        assert result.accepted == sum(edit.accepted for edit in result.trace)
        current = result.rollouts[0]
        positions = [edit.position for edit in result.trace]
        if sweeps == 1:
            assert all(a < b for a, b in pairwise(positions))
        for edit, proposed in zip(result.trace, result.rollouts[1:], strict=True):
            at = edit.position
            assert proposed.ids[:at] == current.ids[:at] and proposed.ids[at] != current.ids[at]
            assert edit.old_token == policy.decode([current.ids[at]])
            assert edit.new_token == policy.decode([proposed.ids[at]])
            assert (edit.reward_before, edit.reward_after) == (current.reward, proposed.reward)
            assert edit.energy_before == pytest.approx(energy(current, 0.3), abs=1e-6)
            assert edit.energy_after == pytest.approx(energy(proposed, 0.3), abs=1e-6)
            assert edit.entropy > decoder.min_entropy and edit.gradient_norm > 0
            if acceptance == "energy":
                assert edit.accepted == (edit.energy_after < edit.energy_before)
            elif acceptance == "reward":
                assert edit.accepted == (edit.reward_after > edit.reward_before)
            current = proposed if edit.accepted else current
        assert result.ids == current.ids
    assert 0 < sum(r.accepted for r in results) < sum(r.proposals for r in results)


def test_the_energy_never_rises_and_the_reward_never_falls():
    """With acceptance by energy the answer's energy is at most the first rollout's; by reward, its reward at least."""
    for acceptance in ("energy", "reward"):
        results, _ = decode(replace(NABLA, acceptance=acceptance), toys.problems(12))
        for result in results:
            kept = [result.rollouts[0]]
            kept += [c for c, edit in zip(result.rollouts[1:], result.trace, strict=True) if edit.accepted]
            values = [energy(c, 0.3) if acceptance == "energy" else -c.reward for c in kept]
            assert all(a > b for a, b in pairwise(values))
        assert any(r.accepted for r in results)


def test_metropolis_is_given_the_right_standings(monkeypatch: pytest.MonkeyPatch):
    """Energies and proposal log-probabilities that the rule sees are those recomputed from scratch."""
    seen: list[tuple[Standing, Standing, float]] = []

    def record(current: Standing, proposed: Standing, uniform: float) -> bool:
        seen.append((current, proposed, uniform))
        return len(seen) % 2 == 0

    monkeypatch.setitem(module.RULES, "metropolis", record)
    decoder = replace(POLICY_ONLY, acceptance="metropolis", resample_temperature=1.3, sweeps=3, max_rollouts=12)
    policy = toys.policy()
    for problem in toys.problems(6):
        seen.clear()
        (result,), _ = decode(decoder, [problem], sampling=Sampling(0.8, 0.9, 8))
        prompt, current = policy.encode_prompt(problem.problem), result.rollouts[0]
        assert len(seen) == len(result.trace)
        for (standing, new, uniform), edit, proposed in zip(seen, result.trace, result.rollouts[1:], strict=True):
            assert 0 <= uniform < 1
            for found, candidate in ((standing, current), (new, proposed)):
                assert found.reward == candidate.reward
                assert found.energy == pytest.approx(energy(candidate, 0.3), abs=1e-6)
                log_probs = toys.reference_log_probs(policy.backbone.model, prompt, candidate.ids)
                first = (log_probs / 1.3).log_softmax(-1)[edit.position, candidate.ids[edit.position]]
                law = module.top_p_filter(log_probs / 0.8, 0.9).log_softmax(-1)
                rest = law.gather(-1, torch.tensor(candidate.ids)[:, None])[edit.position + 1 :].sum()
                assert found.proposal_logp == pytest.approx(float(first + rest), abs=1e-3)
            current = proposed if edit.accepted else current


def test_metropolis_accepts_the_policys_own_proposals_without_a_reward():
    """With β infinite and no gradient step, proposals are draws of the target: every one of them is accepted."""
    decoder = replace(POLICY_ONLY, acceptance="metropolis")
    results, _ = decode(decoder, toys.problems(10), beta=math.inf)
    assert sum(r.proposals for r in results) > 20
    assert all(edit.accepted for r in results for edit in r.trace)


def test_without_a_reward_weight_the_reward_has_no_say():
    """At β = ∞ the energy is -log π, and another reward model changes neither proposals, gradients nor decisions."""
    (ours, _), (others, _) = (
        decode(NABLA, toys.problems(8), r, beta=math.inf) for r in (toys.reward(), other_reward())
    )
    for one, two in zip(ours, others, strict=True):
        assert [c.ids for c in one.rollouts] == [c.ids for c in two.rollouts]
        for edit, other in zip(one.trace, two.trace, strict=True):
            assert edit.energy_before == other.energy_before and edit.energy_after == other.energy_after
            assert edit.gradient_norm == other.gradient_norm and edit.accepted == other.accepted
            assert edit.reward_after != other.reward_after
        for candidate, edit in zip(one.rollouts[1:], one.trace, strict=True):
            assert edit.energy_after == pytest.approx(-candidate.logps)
    finite = [decode(NABLA, toys.problems(8), r)[0] for r in (toys.reward(), other_reward())]
    assert [r.ids for r in finite[0]] != [r.ids for r in finite[1]]


def test_without_steps_proposals_are_the_policys_own():
    """At T = 0 the first edit's token is drawn from the policy's own law, and no gradient is paid for."""
    problems = [Problem(f"q{i}", "cab") for i in range(600)]
    decoder = replace(POLICY_ONLY, max_rollouts=2, min_entropy=0.0, resample_temperature=0.8)
    results, ledger = decode(decoder, problems, sampling=Sampling(0.0, 1.0, 4))
    assert {phase for phase, _, _ in ledger.rows} == {"prefill", "rollout", "score", "accept"}
    assert not any(direction == "backward" for _, _, direction in ledger.rows) and ledger.cached.sum() == 0
    policy = toys.policy()
    greedy = results[0].rollouts[0]
    log_probs = toys.reference_log_probs(policy.backbone.model, policy.encode_prompt("cab"), greedy.ids)
    law = (log_probs[0] / 0.8).softmax(-1)
    tokens = [r.rollouts[1].ids[0] if r.trace and r.trace[0].position == 0 else greedy.ids[0] for r in results]
    counts = torch.bincount(torch.tensor(tokens), minlength=toys.VOCAB).double()
    expected = law.double() * len(problems)
    big = expected >= 5
    statistic = float(((counts - expected)[big] ** 2 / expected[big]).sum())
    freedom = int(big.sum())
    assert freedom > 4 and statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_descent_moves_proposals_down_the_energy():
    """With steps and a strong reward, proposals differ from the policy's own, and raise the reward more."""
    decoder = replace(NABLA, resample_temperature=0.0, min_entropy=0.0, max_rollouts=20)
    moved, _ = decode(replace(decoder, dto=DTOConfig(num_steps=20, step_size=0.5)), toys.problems(8), beta=0.05)
    plain, _ = decode(replace(decoder, dto=DTOConfig(num_steps=0)), toys.problems(8), beta=0.05)
    assert [r.trace for r in moved] != [r.trace for r in plain]
    gain = [sum(e.reward_after - e.reward_before for e in r.trace) / max(len(r.trace), 1) for r in moved]
    base = [sum(e.reward_after - e.reward_before for e in r.trace) / max(len(r.trace), 1) for r in plain]
    assert sum(gain) > sum(base)


@pytest.mark.parametrize("relaxation", ["straight_through", "gumbel_softmax"])
@pytest.mark.parametrize("support", [None, 5])
def test_caching_changes_nothing_but_the_cost(relaxation: str, support: int | None):
    """Gradients from the cache give the same trace and rewards: alone to the bit, in a batch the same decisions."""
    cached = replace(NABLA, support=support, dto=DTOConfig(relaxation=relaxation, **STEPS))
    plain = replace(cached, dto=replace(cached.dto, caching=False))
    problems, saved = toys.problems(3), 0
    for problem in problems:
        ((one,), costs), ((two,), full) = decode(cached, [problem]), decode(plain, [problem])
        assert (one.ids, one.rollouts, one.reward, one.trace) == (two.ids, two.rollouts, two.reward, two.trace)
        assert one.counts.get("flips") == two.counts.get("flips")
        assert two.counts.get("dto_evaluations") == two.counts.get("dto_steps")
        assert full.cached[0] == 0
        saved += int(costs.cached[0])
        assert costs.cost(0).flops <= full.cost(0).flops
    assert saved > 5
    (one, _), (two, _) = decode(cached, problems), decode(plain, problems)
    for found, expected in zip(one, two, strict=True):
        assert [c.ids for c in found.rollouts] == [c.ids for c in expected.rollouts]
        assert [e.accepted for e in found.trace] == [e.accepted for e in expected.trace]


@pytest.mark.parametrize("support", [None, 6])
def test_model_calls_are_what_the_trace_implies(support: int | None):
    """Nothing is read twice: a rollout costs a step for each token but its last, an edit one scoring of the new."""
    decoder = replace(NABLA, support=support, sweeps=2, max_rollouts=8)
    for problem in toys.problems(6):
        (result,), ledger = decode(decoder, [problem])
        prompt = len(toys.policy().encode_prompt(problem.problem))
        starts = [0, *(edit.position for edit in result.trace)]
        lengths = [len(c.ids) - start for c, start in zip(result.rollouts, starts, strict=True)]

        def cost(model: str, phase: str, direction: str = "forward", ledger=ledger):
            return ledger.cost(0, model=model, phase=phase, direction=direction)

        assert (cost("policy", "prefill").calls, cost("policy", "prefill").tokens) == (1, prompt)
        assert (cost("reward", "prefill").calls, cost("reward", "prefill").tokens) == (1, prompt)
        assert cost("policy", "rollout").calls == cost("policy", "rollout").tokens == sum(n - 1 for n in lengths)
        assert (cost("reward", "score").calls, cost("reward", "score").tokens) == (1, lengths[0])
        assert cost("reward", "accept").calls == result.proposals
        assert cost("reward", "accept").tokens == sum(lengths[1:])
        assert cost("policy", "accept").calls == 0
        probes = result.counts.get("probes", 0)
        assert cost("reward", "probe").calls == probes * (1 if support is None else 2)
        assert cost("reward", "dto", "backward").calls == result.counts.get("dto_evaluations", 0)
        assert cost("policy", "dto").calls <= result.counts.get("dto_evaluations", 0)
        if decoder.sweeps == 1:
            assert probes <= 1 + result.accepted


@pytest.mark.parametrize("optimizer", ["sgd", "exponentiated"])
def test_proposals_are_as_far_from_the_policy_as_the_trust_region_says(optimizer: str):
    """One step in a trust region: the law of the new token is that far from the policy, at every position visited."""
    step = DTOConfig(1, optimizer=optimizer, weight_decay=0.0, trust_region=0.07)  # type: ignore[arg-type]
    for support in (None, 6):
        results, _ = decode(replace(NABLA, dto=step, support=support), toys.problems(6))
        assert all(r.proposal_kl == pytest.approx(0.07, abs=1e-4) for r in results if r.counts.get("visited", 0))
        assert any(r.counts.get("visited", 0) > 1 for r in results)


def test_without_a_gradient_proposals_are_as_far_as_their_temperature_says():
    """At T = 0 the law of the new token is the policy (KL 0), or the policy sharpened: KL(p^(1/τ)/Z ‖ p)."""
    results, _ = decode(POLICY_ONLY, toys.problems(4))
    assert all(r.proposal_kl == pytest.approx(0.0, abs=1e-6) for r in results if r.counts.get("visited", 0))
    problem, policy = toys.problems(1)[0], toys.policy()
    (result,), _ = decode(POLICY_ONLY, [problem], budget=Budget(rollouts=1))
    assert result.proposal_kl is None  # no position was visited
    for temperature in (0.5, 0.0):
        decoder = replace(POLICY_ONLY, resample_temperature=temperature, max_rollouts=2, min_entropy=0.0)
        (result,), _ = decode(decoder, [problem])
        ids, visited = result.rollouts[0].ids, result.counts["visited"]
        own = toys.reference_log_probs(policy.backbone.model, policy.encode_prompt(problem.problem), ids)
        # up to the first edit, after which the search ends: positions 0, 1, … of the first rollout
        kl = [float(-row.max()) if temperature == 0 else float(_sharpened(row, temperature)) for row in own[:visited]]
        assert result.proposal_kl == pytest.approx(sum(kl) / visited, abs=1e-4)


def _sharpened(log_probs: torch.Tensor, temperature: float) -> torch.Tensor:
    new = (log_probs / temperature).log_softmax(-1)
    return (new.exp() * (new - log_probs)).sum()


def test_gradients_start_where_the_first_visit_can_be(monkeypatch: pytest.MonkeyPatch):
    """Positions before the first one that is picked are read as a prefix, which changes the FLOPs and nothing else."""
    decoder = replace(NABLA, sweeps=3, min_entropy=1.2)
    short, cheap = decode(decoder, toys.problems(8))
    monkeypatch.setattr(Nabla, "_first", lambda self, search: 0)
    long, dear = decode(decoder, toys.problems(8))
    assert [r.ids for r in short] == [r.ids for r in long] and [r.counts for r in short] == [r.counts for r in long]
    costs = [[ledger.cost(i, phase="probe").flops for i in range(8)] for ledger in (cheap, dear)]
    assert all(a <= b for a, b in zip(*costs, strict=True)) and sum(costs[0]) < sum(costs[1])


def test_a_selector_that_picks_nothing_leaves_the_sample():
    """No position above the entropy threshold: no probe, no gradient, the first rollout is the answer."""
    results, ledger = decode(replace(NABLA, min_entropy=10.0), toys.problems(3))
    assert all(len(r.rollouts) == 1 and r.counts == {"skipped": len(r.ids)} for r in results)
    assert ledger.cost(0, phase="probe").flops == ledger.cost(0, direction="backward").flops == 0
    results, ledger = decode(replace(NABLA, min_gradient_norm=1e6, sweeps=3), toys.problems(3))
    assert all(len(r.rollouts) == 1 for r in results)
    assert ledger.cost(0, phase="probe").calls > 0 and ledger.cost(0, phase="dto").calls == 0


def test_every_sweep_is_made_with_a_gradient_threshold(monkeypatch: pytest.MonkeyPatch):
    """A search whose gradient does not reach back to the start of a new sweep is probed again, not given up."""
    searches: list = []
    answer = module._answer
    monkeypatch.setattr(module, "_answer", lambda search: searches.append(search) or answer(search))
    decoder = replace(NABLA, sweeps=3, max_rollouts=40, min_gradient_norm=8.0, resample_temperature=2.0)
    results, _ = decode(decoder, toys.problems(8))
    assert all(search.sweep == 3 for search in searches)
    assert any(sum(a >= b for a, b in pairwise([e.position for e in r.trace])) == 2 for r in results)
    for result in results:
        assert result.counts.get("visited", 0) == result.counts.get("unchanged", 0) + result.proposals


def objective(kind: str, rows: list[list[int]], support: torch.Tensor | None = None) -> tuple[Objective, torch.Tensor]:
    policy = toys.policy()
    reward = toys.reward()
    if kind == "likelihood":
        reward = LikelihoodReward(Policy(toys.build_llama(seed=5), toys.tokenizer()))
    questions = [p.problem for p in toys.problems(len(rows))]
    accounts = torch.arange(len(rows))
    ours = policy.prefill([policy.encode_prompt(q) for q in questions], accounts, Ledger(len(rows)))
    ids, mask = toys.pad_right(rows)
    return Objective(
        policy, reward, ours, reward.prefill(questions, accounts, Ledger(len(rows))), mask, support, True
    ), ids


def gradient_of(goal: Objective, ids: torch.Tensor, beta: float) -> torch.Tensor:
    width = toys.VOCAB if goal.support is None else goal.support.shape[-1]
    index = ids if goal.support is None else (goal.support == ids[..., None]).int().argmax(-1)
    rows = torch.arange(len(ids))
    result = energy_gradient(toys.one_hot(index, width), goal.mask, rows, goal.log_probs, goal.rewards, beta=beta)
    assert result.gradient is not None
    return result.gradient


@pytest.mark.parametrize("kind", ["classifier", "likelihood"])
def test_a_support_of_the_whole_vocabulary_is_the_whole_vocabulary(kind: str):
    """The energy gradient on a permuted full support is the full one permuted; on a small one, gathered."""
    rows = toys.completions(4)
    goal, ids = objective(kind, rows)
    full = gradient_of(goal, ids, 0.4)
    order = torch.rand(*ids.shape, toys.VOCAB, generator=RANDOM().manual_seed(0)).argsort(-1)
    small = choose_support(torch.zeros(*ids.shape, toys.VOCAB), ids, 4)
    for support in (order, small):
        goal.support = support
        torch.testing.assert_close(gradient_of(goal, ids, 0.4), full.gather(-1, support), atol=5e-5, rtol=1e-4)


def test_gradient_candidates_are_the_tokens_that_the_full_gradient_likes_best():
    """Found a few positions at a time, they are the first ones of the dense gradient of the energy."""
    rows = toys.completions(4)
    goal, ids = objective("classifier", rows)
    logits = torch.zeros(*ids.shape, toys.VOCAB)
    for row, problem in enumerate(toys.problems(4)):
        prompt = goal.policy.encode_prompt(problem.problem)
        logits[row, : len(rows[row])] = toys.reference_log_probs(goal.policy.backbone.model, prompt, rows[row])
    full = gradient_of(goal, ids, 0.4)
    found = gradient_candidates(goal, ids, logits, 0.4, 3)
    expected = full.topk(3, largest=False).indices
    assert torch.equal(found[goal.mask], expected[goal.mask])
    support = choose_support(logits, ids, 6, found)
    assert (support == ids[..., None]).any(-1)[goal.mask].all()
    assert (support[..., None] == found[..., None, :]).any(-2).all(-1)[goal.mask].all()


@pytest.mark.parametrize("kind", ["classifier", "likelihood"])
def test_a_last_token_has_candidates_too(kind: str):
    """A completion of one token, which the policy never reads, still has its candidates by the other pieces."""
    goal, ids = objective(kind, [[5], [7]])
    logits = goal.policy.next_logits(goal.policy_prefix)[:, None]
    found = gradient_candidates(goal, ids, logits, 0.4, 3)
    assert found.shape == (2, 1, 3)
    if kind == "classifier":
        assert torch.equal(found, gradient_of(goal, ids, 0.4).topk(3, largest=False).indices)


def test_a_support_wide_enough_is_the_full_decoder():
    """A support of the whole vocabulary's size decodes as without one; small ones propose only their own tokens."""
    problems = toys.problems(6)
    full, _ = decode(NABLA, problems)
    wide, _ = decode(replace(NABLA, support=toys.VOCAB), problems)
    assert [(r.ids, r.trace) for r in full] == [(r.ids, r.trace) for r in wide]
    narrow, _ = decode(replace(NABLA, support=2, resample_temperature=5.0), problems)
    tokens = {e.new_token for r in narrow for e in r.trace}
    spread = {e.new_token for r in decode(replace(NABLA, resample_temperature=5.0), problems)[0] for e in r.trace}
    assert len(tokens) < len(spread)
