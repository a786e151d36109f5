"""Monte Carlo tree search with the reward at the leaves: the search of "Reasoning via planning" (RAP).

    root: the empty completion;  nodes: partial completions that end with a step (a line, a token, or so many tokens)
    repeat   descend from the root by PUCT or UCT to a node from which fewer than `branching` rollouts were drawn
             draw one rollout from there to the end with the policy;  its steps become nodes of the tree
             back up σ(r(x, y)) to every node that it passes through
    until    nothing is left to be tried, or the budget is used up;  the answer is the rollout of lowest energy

(Hao et al., 2023, arXiv 2305.14992, Algorithm 1, with the judge as its reward; PUCT: Silver et al., 2017, Nature 550.)
One iteration is one rollout for each problem, all problems side by side. Differences from RAP: children are drawn one
by one, each as the first step of a rollout, so that no sampled token is thrown away; and a rollout's whole path stays
in the tree. A node is full when `branching` rollouts were drawn through it, and left out when nothing below it is
open. Keys and values of both models are kept for every rollout, so that a node is a prefix without a pass.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from nabla_rl.budget import Point, spent
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Candidate,
    Decoded,
    Setting,
    decoded,
    energies,
    prefill,
    prefill_reward,
    require_reward,
)
from nabla_rl.decoding.steps import cut_steps, line_ends
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.backbone import Prefix, Track
from nabla_rl.rewards.base import AbstractReward

TreeStep = Literal["token", "line", "segment"]
Selection = Literal["puct", "uct"]


@dataclass
class _Node:
    """A partial completion.

    Attributes:
        length: its tokens.
        logp: log π of the step that leads here from its parent.
        rollout: index of a rollout that passes through it.
        children: by the tokens of the step that leads to them.
        draws: rollouts in which the policy chose what follows.
        visits, total: rollouts below it, and the sum of their values.
        closed: nothing below it is left to be tried.
    """

    length: int
    logp: float
    rollout: int
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    draws: int = 0
    visits: int = 0
    total: float = 0.0
    closed: bool = False


@dataclass
class _Tree:
    """One problem's tree, its rollouts, and what the models have read of them."""

    problem: Problem
    account: int
    root: _Node = field(default_factory=lambda: _Node(0, 0.0, 0))
    tried: list[Candidate] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)  # of each rollout's tokens
    policy_tracks: list[Track] = field(default_factory=list)
    reward_tracks: list[Track] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class MCTS(AbstractDecoder):
    """Monte Carlo tree search; one rollout of each problem in an iteration, which is a step of the budget."""

    iterations: int = 16
    """Maximum number of rollouts for each problem."""
    branching: int = 4
    """Number of rollouts drawn from a node before the search goes below it."""
    exploration: float = 1.0
    """Weight c of the exploration term; values lie in (0, 1)."""
    selection: Selection = "puct"
    """Selection rule: puct (Q + c P √N / (1 + n)) or uct (Q + c √(ln N / n))."""
    step: TreeStep = "line"
    """Unit of a node: line, token, or segment (of `step_tokens` tokens)."""
    step_tokens: int = 24
    """Maximum tokens of a line or segment."""

    name: ClassVar[str] = "mcts"

    def __post_init__(self) -> None:
        """Check the values."""
        self.check(iterations=1, branching=1, step_tokens=1, exploration=0)

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        judge, policy, ledger = require_reward(self.name, setting.reward), setting.policy, setting.ledger
        ours, theirs = prefill(problems, setting), prefill_reward(problems, judge, ledger)
        trees = [_Tree(problem, account) for account, problem in enumerate(problems)]
        ends = line_ends(policy.tokenizer) if self.step == "line" else frozenset()
        active = trees
        while active:
            paths = [self._descend(tree.root) for tree in active]
            self._roll_out(active, paths, ours, theirs, setting, judge)
            for tree, path in zip(active, paths, strict=True):
                self._back_up(tree, path, ends)
                chosen = int(energies(tree.tried, setting.beta).argmin())
                tree.curve.append(spent(ledger, tree.account, rollouts=len(tree.tried), chosen=chosen))
            active = [
                tree
                for tree in active
                if not tree.root.closed and len(tree.tried) < self.iterations and setting.budget.allows(tree.curve[-1])
            ]
        results = []
        for tree in trees:
            chosen = tree.curve[-1].chosen
            result = decoded(tree.problem, chosen, tree.tried, tree.finished[chosen], tree.curve)
            result.counts = {"nodes": _count(tree.root)}
            results.append(result)
        return results

    def _descend(self, root: _Node) -> list[_Node]:
        """The path from the root to the node that the next rollout is drawn from."""
        path = [root]
        while path[-1].draws >= self.branching:
            node = path[-1]
            opened = [child for child in node.children.values() if not child.closed]
            mass = sum(math.exp(child.logp) for child in node.children.values())
            path.append(max(opened, key=lambda child, node=node, mass=mass: self._preference(child, node, mass)))
        return path

    def _preference(self, child: _Node, parent: _Node, mass: float) -> float:
        value = child.total / child.visits
        if self.selection == "uct":
            return value + self.exploration * math.sqrt(math.log(parent.visits) / child.visits)
        prior = math.exp(child.logp) / mass if mass > 0 else 1 / len(parent.children)
        return value + self.exploration * prior * math.sqrt(parent.visits) / (1 + child.visits)

    def _roll_out(
        self,
        trees: list[_Tree],
        paths: list[list[_Node]],
        ours: Prefix,
        theirs: Prefix,
        setting: Setting,
        judge: AbstractReward,
    ) -> None:
        """One rollout of each tree from the last node of its path, scored."""
        policy, ledger = setting.policy, setting.ledger
        nodes = [path[-1] for path in paths]
        starts = [node.length for node in nodes]
        if trees[0].tried:
            rows = list(zip(trees, nodes, strict=True))
            ours = Prefix.cat([tree.policy_tracks[node.rollout].prefix_at(node.length) for tree, node in rows])
            theirs = Prefix.cat([tree.reward_tracks[node.rollout].prefix_at(node.length) for tree, node in rows])
        room = torch.tensor([setting.sampling.length - start for start in starts])
        rollout = policy.rollout(
            ours, setting.sampling,
            [seeded_generator(setting.seed, t.problem.id, "rollout", len(t.tried)) for t in trees],
            lengths=room, keep_states=True,
        )  # fmt: skip
        with ledger.phase("score"):
            scored = judge.score(theirs, rollout.ids, rollout.mask)
        assert rollout.encoded is not None
        policy_tracks, reward_tracks = rollout.encoded.tracks(starts), scored.encoded.tracks(starts)
        for row, (tree, node) in enumerate(zip(trees, nodes, strict=True)):
            ids, logps = (tensor[row, rollout.mask[row]].tolist() for tensor in (rollout.ids, rollout.logps))
            ours_read, theirs_read = policy_tracks[row], reward_tracks[row]
            if tree.tried:
                ids = [*tree.tried[node.rollout].ids[: node.length], *ids]
                logps = [*tree.logps[node.rollout][: node.length], *logps]
                ours_read = tree.policy_tracks[node.rollout].spliced(ours_read)
                theirs_read = tree.reward_tracks[node.rollout].spliced(theirs_read)
            tree.tried.append(Candidate(policy.decode(ids), tuple(ids), sum(logps), float(scored.reward[row])))
            tree.finished.append(bool(rollout.finished[row]))
            tree.logps.append(logps)
            tree.policy_tracks.append(ours_read)
            tree.reward_tracks.append(theirs_read)

    def _back_up(self, tree: _Tree, path: list[_Node], ends: Collection[int]) -> None:
        """Add the steps of the last rollout to the tree, and its value to every node that it passes through."""
        candidate, logps, node = tree.tried[-1], tree.logps[-1], path[-1]
        most = 1 if self.step == "token" else self.step_tokens
        for step in cut_steps(candidate.ids[node.length :], ends, most):
            node.draws += 1
            length = node.length + len(step)
            if step not in node.children:
                logp = sum(logps[node.length : length])
                node.children[step] = _Node(length, logp, len(tree.tried) - 1)
            node = node.children[step]
            path.append(node)
        assert candidate.reward is not None
        value = float(torch.tensor(candidate.reward, dtype=torch.float64).sigmoid())
        for node in path:
            node.visits += 1
            node.total += value
        path[-1].closed = True
        for node in reversed(path[:-1]):
            node.closed = node.draws >= self.branching and all(child.closed for child in node.children.values())


def _count(root: _Node) -> int:
    """Nodes of a tree."""
    nodes, waiting = 0, [root]
    while waiting:
        nodes += 1
        waiting += waiting.pop().children.values()
    return nodes
