"""Claims about every decoder: determinism, independence of the batch, and results that are what they say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from nabla_rl.data.problems import Problem, extract_line
from nabla_rl.decoding import (
    MCTS,
    AbstractDecoder,
    BeamSearch,
    BestOfN,
    Decoded,
    Greedy,
    Nabla,
    Sample,
    Sampling,
    SelfConsistency,
    Setting,
)
from nabla_rl.dto import DTOConfig
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError
from tests import toys_hf as toys

SAMPLING = Sampling(1.0, max_new_tokens=8)
STEPS = {"num_steps": 4, "step_size": 1.0, "final_step_size": 1.0}
NABLA = Nabla(DTOConfig(**STEPS), max_rollouts=4, min_entropy=0.5, sweeps=1)
PUBLISHED = Nabla(
    DTOConfig(), acceptance="reward", max_rollouts=8, min_entropy=0.25, min_gradient_norm=8.0,
    resample_temperature=0.5, resample_top_p=0.95, sweeps=1,
)  # fmt: skip
DECODERS: dict[str, AbstractDecoder] = {
    "greedy": Greedy(),
    "sample": Sample(),
    "self_consistency": SelfConsistency(n=3),
    "best_of_n-energy": BestOfN(n=4),
    "best_of_n-reward": BestOfN(n=4, choose_by="reward"),
    "best_of_n-vote": BestOfN(n=4, choose_by="weighted_vote"),
    "beam-token": BeamSearch(width=3, expand=3, step="token"),
    "beam-line": BeamSearch(width=3, expand=2, step_tokens=3, score="reward"),
    "mcts-line": MCTS(iterations=6, branching=2, step_tokens=3),
    "mcts-token": MCTS(iterations=6, branching=2, step="token", selection="uct"),
    "nabla": NABLA,
    "nabla-published": PUBLISHED,
    "nabla-support": replace(NABLA, support=4),
    "nabla-reward": replace(NABLA, acceptance="reward"),
    "nabla-metropolis": replace(NABLA, acceptance="metropolis", sweeps=2),
    "nabla-gumbel": replace(NABLA, dto=DTOConfig(relaxation="gumbel_softmax", **STEPS)),
    "nabla-softmax": replace(NABLA, dto=DTOConfig(relaxation="softmax", **STEPS), support=5),
    "nabla-sweeps": replace(NABLA, sweeps=3, max_rollouts=12, min_gradient_norm=2.0),
    "nabla-nucleus": replace(NABLA, resample_temperature=0.7, resample_top_p=0.9),
}
GIVEN: dict[str, dict] = {
    "sample": {"seed": 3},
    "beam-line": {"seed": 2},
    **{name: {"seed": 1} for name in DECODERS if name.startswith("nabla")},
    "nabla-published": {"beta": 1e-3, "sampling": Sampling(0.6, 0.95, 8)},
    "nabla-reward": {"seed": 1, "beta": 0.1},
    "nabla-nucleus": {"seed": 1, "sampling": Sampling(0.7, 0.9, 8)},
}
"""What each of them is given besides `SAMPLING`."""
NABLAS = [name for name in DECODERS if name.startswith("nabla")]
SEARCHES = [*NABLAS, "beam-token", "beam-line", "mcts-line", "mcts-token"]


def decode(
    decoder: str | AbstractDecoder, problems: list[Problem], policy=None, reward=None, **given
) -> tuple[list[Decoded], Ledger]:
    """What one of `DECODERS`, or another decoder, answers."""
    setting = {"sampling": SAMPLING, "extract": extract_line, **given}
    if isinstance(decoder, str):
        decoder, setting = DECODERS[decoder], {**setting, **GIVEN.get(decoder, {})}
    return toys.decode(decoder, problems, policy, reward, **setting)


@cache
def double_models() -> tuple[Policy, SequenceClassifierReward]:
    policy = Policy(toys.build_llama(eos_token_id=[2, 9, 17]).double(), toys.tokenizer())
    return policy, SequenceClassifierReward(toys.build_classifier().double(), toys.tokenizer())


def assert_same(found: Decoded, expected: Decoded) -> None:
    """The same decisions exactly, the same figures to float tolerance."""
    assert (found.problem_id, found.text, found.ids) == (expected.problem_id, expected.text, expected.ids)
    assert (found.finished, found.proposals, found.accepted) == (
        expected.finished,
        expected.proposals,
        expected.accepted,
    )
    assert found.counts == expected.counts
    assert [c.ids for c in found.rollouts] == [c.ids for c in expected.rollouts]
    assert found.logps == pytest.approx(expected.logps, abs=1e-4)
    assert (found.reward is None) == (expected.reward is None)
    if found.reward is not None:
        assert found.reward == pytest.approx(expected.reward, abs=1e-4)
    for edit, other in zip(found.trace, expected.trace, strict=True):
        named = ("position", "old_token", "new_token", "accepted")
        assert [getattr(edit, n) for n in named] == [getattr(other, n) for n in named]
        for name in ("reward_before", "reward_after", "energy_before", "energy_after", "gradient_norm", "entropy"):
            assert getattr(edit, name) == pytest.approx(getattr(other, name), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_results_do_not_depend_on_the_batch(name: str):
    """The same seed gives the same decisions and costs for 16 problems at once, shuffled, in threes and alone.

    In float64: which kernel multiplies a matrix depends on the batch and the machine, and of the thousands of draws
    here some uniform number lies within float32's rounding of a boundary between two tokens, now and then.
    """
    problems = toys.problems(16)
    models = double_models()
    whole, ledger = decode(name, problems, *models)
    assert len({len(r.ids) for r in whole}) > 2
    order = torch.randperm(16).tolist()
    batches = [order, [0, 1, 2], [7, 3, 5], *([i] for i in range(5))]
    for batch in batches:
        part, costs = decode(name, [problems[i] for i in batch], *models)
        for row, i in enumerate(batch):
            assert_same(part[row], whole[i])
            for model in ("policy", "reward"):
                found, expected = costs.cost(row, model=model), ledger.cost(i, model=model)
                assert (found.calls, found.sequential, found.tokens) == (
                    expected.calls, expected.sequential, expected.tokens,
                )  # fmt: skip
                assert found.flops == pytest.approx(expected.flops, rel=1e-9)
            assert costs.cached[row] == ledger.cached[i]


def test_the_seed_and_the_problem_decide():
    """Another seed draws other completions; problems of the same text but other ids are drawn independently."""
    problems = [Problem(f"q{i}", "cab") for i in range(6)]
    one, two = (decode(Sample(), problems, seed=seed)[0] for seed in (0, 1))
    assert [r.ids for r in one] != [r.ids for r in two]
    assert len({r.ids for r in one}) > 3
    greedy, _ = decode(Greedy(), problems)
    assert len({r.ids for r in greedy}) == 1


def likelihood_reward(tokenizer) -> LikelihoodReward:
    return LikelihoodReward(Policy(toys.build_llama(seed=5), tokenizer))


REWARDS = {
    "classifier": lambda tokenizer: SequenceClassifierReward(toys.build_classifier(), tokenizer),
    "likelihood": likelihood_reward,
}


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("name", [*SEARCHES, "best_of_n-energy"])
def test_every_rollout_is_what_a_fresh_computation_says(name: str, kind: str, template: bool):
    """log π(y|x) and r(x, y) of every rollout equal those of the whole sequence, computed without a cache."""
    tokenizer = toys.chat_tokenizer() if template else toys.tokenizer()
    policy = Policy(toys.build_llama(eos_token_id=[2, 9, 17]), tokenizer)
    reward = REWARDS[kind](tokenizer)
    problems = toys.problems(4)
    results, _ = decode(name, problems, policy, reward)
    for problem, result in zip(problems, results, strict=True):
        prompt = policy.encode_prompt(problem.problem)
        for tried in result.rollouts:
            ids, mask = toys.pad_right([tried.ids])
            fresh = toys.prefill(policy, [prompt])
            logps = float(toys.reference_logps(policy.backbone.model, prompt, tried.ids).sum())
            assert tried.logps == pytest.approx(logps, abs=2e-4)
            assert tried.logps == pytest.approx(float(policy.completion_logps(fresh, ids, mask).sum()), abs=2e-4)
            scored = reward.score(reward.prefill([problem.problem], torch.tensor([0]), Ledger(1)), ids, mask)
            assert tried.reward == pytest.approx(float(scored.reward), abs=2e-4)
            if kind == "classifier" and not template:
                whole = toys.reference_reward(reward.backbone.model, prompt, tried.ids)
                assert tried.reward == pytest.approx(whole, abs=2e-4)
            assert tried.text == policy.decode(tried.ids)
            assert 1 <= len(tried.ids) <= SAMPLING.length
            ends = set(policy.eos_ids.tolist())
            assert not ends & set(tried.ids[:-1])
        chosen = next(c for c in result.rollouts if c.ids == result.ids)
        assert (result.text, result.reward) == (chosen.text, chosen.reward)
        assert result.logps == pytest.approx(chosen.logps)
        assert result.finished == (result.ids[-1] in policy.eos_ids.tolist())


def test_best_of_one_is_the_sample():
    """Best-of-1, self-consistency with 1, and ∇-Reasoner and tree search with one rollout give the plain sample."""
    problems = toys.problems(6)
    samples, _ = decode(Sample(), problems, seed=4)
    for decoder in (BestOfN(n=1), SelfConsistency(n=1), replace(NABLA, max_rollouts=1), MCTS(iterations=1)):
        found, _ = decode(decoder, problems, seed=4)
        assert [r.ids for r in found] == [s.ids for s in samples]
        assert [r.logps for r in found] == pytest.approx([s.logps for s in samples], abs=1e-4)


def test_more_draws_contain_the_fewer():
    """Draw j depends on (seed, problem, j): best-of-4's first two rollouts are best-of-2's."""
    problems = toys.problems(4)
    four, two = (decode(BestOfN(n=n), problems)[0] for n in (4, 2))
    for many, few in zip(four, two, strict=True):
        assert [c.ids for c in many.rollouts[:2]] == [c.ids for c in few.rollouts]
        assert len({c.ids for c in many.rollouts}) > 1


def test_the_best_is_chosen():
    """On real rollouts, best-of-n by reward has the highest reward, and by energy the lowest -r/β - log π."""
    problems = toys.problems(6)
    by_reward, _ = decode(BestOfN(n=4, choose_by="reward"), problems)
    by_energy, _ = decode(BestOfN(n=4), problems, beta=0.5)
    for result in by_reward:
        assert result.reward == max(c.reward for c in result.rollouts)
    for result in by_energy:
        energies = [-c.reward / 0.5 - c.logps for c in result.rollouts]
        assert -result.reward / 0.5 - result.logps == pytest.approx(min(energies))


@pytest.mark.parametrize("name", ["best_of_n-energy", "nabla", "beam-token", "mcts-line"])
def test_a_decoder_that_needs_a_reward_says_so(name: str):
    """Without a reward model the refusal names the decoder and the argument."""
    with pytest.raises(
        UserError,
        match=f"^reward.name: expected a reward model for {DECODERS[name].name}, found none. Name one, or leave",
    ):
        DECODERS[name].decode(toys.problems(1), Setting(toys.policy(), None, Ledger(1)))


@pytest.mark.parametrize("name", ["greedy", "best_of_n-energy", "nabla"])
def test_what_does_not_fit_the_context_is_refused_by_problem(name: str):
    """Prompt and completion that exceed the context together are an error with the problem's id and the figures."""
    problems = [*toys.problems(1), Problem("long", "a" * 90)]
    with pytest.raises(UserError, match=r"problem 'long': .*context of 96 tokens, found 92 \+ 8"):
        decode(name, problems)
    with pytest.raises(UserError, match="expected a non-empty text"):
        decode(name, [Problem("blank", " ")])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["nabla", "nabla-support", "nabla-softmax", "best_of_n-energy"])
def test_other_precisions_decode(name: str, dtype: torch.dtype):
    """Weights in float64 or bfloat16 decode, with finite figures, and float64 makes float32's decisions."""
    policy = Policy(toys.build_llama(eos_token_id=[2, 9, 17]).to(dtype), toys.tokenizer())
    reward = SequenceClassifierReward(toys.build_classifier().to(dtype), toys.tokenizer())
    results, ledger = decode(name, toys.problems(5), policy, reward)
    assert all(
        torch.isfinite(torch.tensor([r.logps, r.reward, ledger.cost(i).flops])).all() for i, r in enumerate(results)
    )
    if dtype == torch.float64:
        expected, _ = decode(name, toys.problems(5))
        assert [r.ids for r in results] == [r.ids for r in expected]


def test_learned_positions_decode():
    """A GPT-2 policy whose context prompt and completion just fill decodes: no row runs beyond its positions."""
    policy = Policy(toys.build_gpt2(n_positions=16), toys.tokenizer())
    reward = SequenceClassifierReward(toys.build_gpt2_classifier(n_positions=16), toys.tokenizer())
    problems = [Problem(f"p{i}", "abcdef") for i in range(8)]
    results, _ = decode(
        replace(NABLA, sweeps=2, max_rollouts=8, acceptance="reward"), problems, policy, reward, seed=1
    )
    assert sum(r.proposals for r in results) > 20


@pytest.mark.parametrize("name", ["nabla", "nabla-support", "nabla-softmax"])
def test_a_reward_model_padded_to_another_size_decodes_alike(name: str):
    """Embedding rows beyond the shared vocabulary, as models of one family have, change no decision."""
    model, wide = toys.build_classifier(), toys.build_classifier(vocab_size=toys.VOCAB + 5)
    weights = model.state_dict()
    table = wide.get_input_embeddings().weight.detach().clone()
    table[: toys.VOCAB] = weights["model.embed_tokens.weight"]
    wide.load_state_dict({**weights, "model.embed_tokens.weight": table})
    results = [
        decode(name, toys.problems(5), reward=SequenceClassifierReward(m, toys.tokenizer()))[0] for m in (model, wide)
    ]
    assert sum(r.proposals for r in results[0]) > 5
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)
