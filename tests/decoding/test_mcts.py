"""Tree search: where it draws, what it backs up, and what it finds when it may draw a lot."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nabla_rl.decoding import MCTS, AbstractDecoder, BestOfN, Decoded, Sampling
from nabla_rl.decoding import mcts as module
from nabla_rl.decoding.steps import cut_steps
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.types import UserError
from tests import toys_hf as toys
from tests.decoding.test_beam import energies, every_completion, reward_of
from tests.test_ledger import hooked

TREE = MCTS(iterations=12, branching=3, step="segment", step_tokens=2)
GIVEN = {"beta": 0.5, "sampling": Sampling(1.0, max_new_tokens=8)}


def decode(decoder: AbstractDecoder, problems, reward=None, **changes) -> tuple[list[Decoded], Ledger]:
    return toys.decode(decoder, problems, reward=reward, **{**GIVEN, **changes})


def grown(decoder: MCTS, problems, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Decoded], list]:
    """Results and trees."""
    trees: dict[str, object] = {}
    back_up = MCTS._back_up
    monkeypatch.setattr(
        MCTS, "_back_up", lambda self, tree, *rest: (trees.update({tree.problem.id: tree}), back_up(self, tree, *rest))
    )
    results, _ = decode(decoder, problems)
    return results, [trees[problem.id] for problem in problems]


def test_with_many_iterations_it_finds_the_best_completion():
    """On completions of two tokens, many draws end with the one of lowest energy of all that there are."""
    policy, reward = toys.policy(), toys.reward()
    completions = every_completion(policy, 2)
    decoder = replace(TREE, iterations=400, branching=120, step="token", exploration=4.0)
    problems = toys.problems(3)
    results, _ = decode(decoder, problems, sampling=Sampling(1.0, max_new_tokens=2))
    for problem, result in zip(problems, results, strict=True):
        expected = energies(problem, policy, reward, completions, 0.5)
        assert list(result.ids) == completions[int(expected.argmin())]


@pytest.mark.parametrize("selection", ["puct", "uct"])
@pytest.mark.parametrize("step", ["token", "segment", "line"])
def test_the_tree_is_what_the_rollouts_say(step: str, selection: str, monkeypatch: pytest.MonkeyPatch):
    """Visits, values and probabilities of every node are those of the rollouts through it; full nodes are closed."""
    decoder = replace(TREE, step=step, selection=selection)
    problems = toys.problems(4)
    results, trees = grown(decoder, problems, monkeypatch)
    ends, most = module.line_ends(toys.tokenizer()) if step == "line" else (), 1 if step == "token" else 2
    for problem, result, tree in zip(problems, results, trees, strict=True):
        prompt = toys.policy().encode_prompt(problem.problem)
        paths = [cut_steps(candidate.ids, ends, most) for candidate in result.rollouts]

        def check(node, path, prompt=prompt, paths=paths, result=result):
            through = [
                candidate
                for candidate, other in zip(result.rollouts, paths, strict=True)
                if other[: len(path)] == path
            ]
            ids = [token for part in path for token in part]
            assert (node.visits, node.length) == (len(through), len(ids))
            assert node.total == pytest.approx(sum(1 / (1 + math.exp(-c.reward)) for c in through))
            if path:
                logps = toys.reference_logps(toys.policy().backbone.model, prompt, ids)
                assert node.logp == pytest.approx(float(logps[-len(path[-1]) :].sum()), abs=1e-4)
            assert node.draws <= decoder.branching
            open_below = [child for child in node.children.values() if not child.closed]
            assert node.closed == (not open_below and (node.draws == decoder.branching or not node.children))
            for part, child in node.children.items():
                check(child, [*path, part])

        check(tree.root, [])
        assert result.counts["nodes"] == 1 + len({tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)})


def test_selection_is_the_formula():
    """A child's preference is Q + c P √N / (1 + n) or Q + c √(ln N / n), by hand."""
    parent = module._Node(0, 0.0, 0, visits=9)
    child, other = module._Node(1, math.log(0.3), 0, visits=3, total=1.5), module._Node(1, math.log(0.1), 0, visits=6)
    parent.children = {(5,): child, (6,): other}
    puct = replace(TREE, exploration=2.0)._preference(child, parent, 0.4)
    assert puct == pytest.approx(0.5 + 2.0 * 0.75 * 3 / 4)
    uct = replace(TREE, exploration=2.0, selection="uct")._preference(child, parent, 0.4)
    assert uct == pytest.approx(0.5 + 2.0 * math.sqrt(math.log(9) / 3))


def test_the_first_draws_are_best_of_ns():
    """Until the root is full, rollouts are the samples of best-of-n; wide open, the whole search is best-of-n."""
    problems = toys.problems(5)
    samples, _ = decode(BestOfN(n=12), problems)
    narrow, wide = (decode(replace(TREE, branching=branching), problems)[0] for branching in (3, 12))
    for sampled, few, many in zip(samples, narrow, wide, strict=True):
        assert [c.ids for c in few.rollouts[:3]] == [c.ids for c in sampled.rollouts[:3]]
        assert [c.ids for c in many.rollouts] == [c.ids for c in sampled.rollouts]
        assert many.ids == sampled.ids


def test_it_draws_where_the_reward_is_high():
    """Later rollouts of one search have more reward on average than the first ones; with much exploration, less so."""
    decoder = replace(TREE, iterations=40, branching=4, step="token", exploration=0.1)
    gains = []
    for exploration in (0.1, 50.0):
        results, _ = decode(replace(decoder, exploration=exploration), toys.problems(16))
        first = [sum(c.reward for c in r.rollouts[:4]) / 4 for r in results]
        later = [sum(c.reward for c in r.rollouts[-12:]) / len(r.rollouts[-12:]) for r in results]
        gains.append(sum(later) / 16 - sum(first) / 16)
    assert gains[0] > 0 and gains[0] > gains[1]


def test_it_ends_when_nothing_is_left():
    """A greedy policy has one completion: after `branching` draws of it every node is closed."""
    results, _ = decode(TREE, toys.problems(4), sampling=Sampling(0.0, 1.0, 8))
    for result in results:
        assert len(result.rollouts) == 3 and len({c.ids for c in result.rollouts}) == 1


@pytest.mark.parametrize("kind", ["classifier", "template", "likelihood"])
def test_the_ledger_is_what_hooks_count(kind: str):
    """Passes, tokens and sequences are those that hooks see, and each rollout reads only what is new."""
    policy, reward = toys.policy(), reward_of(kind)
    judge = reward.judge.backbone if kind == "likelihood" else reward.backbone
    for problem in toys.problems(3):
        with hooked(policy.backbone.base, judge.base) as (ours, theirs):
            (result,), ledger = decode(TREE, [problem], reward)
        for hook, model in ((ours, "policy"), (theirs, "reward")):
            cost = ledger.cost(0, model=model)
            assert (cost.sequential, cost.calls, cost.tokens) == (hook.forwards, hook.forwards, hook.positions)
        whole = sum(len(c.ids) for c in result.rollouts)
        closing = len(reward.tail) * len(result.rollouts) if kind == "template" else 0
        assert ledger.cost(0, phase="score").tokens - closing < whole


def test_the_same_seed_gives_the_same_output():
    """Rollouts are drawn by seed, problem and number."""
    problems = toys.problems(6)
    one, two, other = (decode(TREE, problems, seed=seed)[0] for seed in (0, 0, 1))
    assert [r.rollouts for r in one] == [r.rollouts for r in two]
    assert [[c.ids for c in r.rollouts] for r in one] != [[c.ids for c in r.rollouts] for r in other]


def test_the_answer_is_the_rollout_of_lowest_energy():
    """At every point of the curve, among the rollouts so far."""
    policy = toys.policy()
    assert isinstance(policy, Policy)
    for result in decode(TREE, toys.problems(6))[0]:
        values = torch.tensor([-c.logps - c.reward / 0.5 for c in result.rollouts])
        assert [point.rollouts for point in result.curve] == list(range(1, len(values) + 1))
        for point in result.curve:
            assert point.chosen == int(values[: point.rollouts].argmin())


@pytest.mark.parametrize("name", ["iterations", "branching", "step_tokens", "exploration"])
def test_bad_settings_are_refused_by_name(name: str):
    """A setting out of range names itself, dotted as the Python API has it."""
    with pytest.raises(UserError, match=f"mcts.{name}: expected at least"):
        replace(TREE, **{name: -1})
