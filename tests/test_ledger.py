"""The ledger books what runs: no more, no less, and as much as torch's own FLOP counter says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nabla_rl.decoding import BestOfN, Greedy, Nabla, Sample, Sampling, SelfConsistency
from nabla_rl.dto import DTOConfig
from nabla_rl.functional import SoftTokens
from nabla_rl.ledger import Cost, Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from tests import toys_hf as toys

GIVEN = {"sampling": Sampling(1.0, max_new_tokens=8), "seed": 1}
NABLA = Nabla(
    DTOConfig(num_steps=4, step_size=1.0, final_step_size=1.0), max_rollouts=4, sweeps=1, min_entropy=0.5, support=6
)
DECODERS = {
    "nabla": NABLA,
    "best_of_n": BestOfN(n=3),
    "greedy": Greedy(),
    "sample": Sample(),
    "self_consistency": SelfConsistency(n=3),
}


class Hooks:
    """Forward calls, fed positions and backward passes of a transformer, counted by torch's hooks."""

    def __init__(self, base: torch.nn.Module):
        self.forwards = self.positions = self.backwards = 0
        self.handles = [
            base.register_forward_hook(self.forward, with_kwargs=True),
            base.norm.register_full_backward_hook(self.backward),
        ]

    def forward(self, module, args, kwargs, output) -> None:
        self.forwards += 1
        self.positions += output.last_hidden_state.shape[:2].numel()

    def backward(self, module, grad_input, grad_output) -> None:
        self.backwards += 1


@contextmanager
def hooked(*bases: torch.nn.Module) -> Iterator[list[Hooks]]:
    hooks = [Hooks(base) for base in bases]
    try:
        yield hooks
    finally:
        for hook in hooks:
            for handle in hook.handles:
                handle.remove()


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_the_ledger_is_what_hooks_on_both_models_count(name: str, template: bool):
    """For every decoder, sequential passes, tokens and backwards of each model are those that torch's hooks see."""
    tokenizer = toys.chat_tokenizer() if template else toys.tokenizer()
    policy = Policy(toys.build_llama(eos_token_id=[2, 9, 17]), tokenizer)
    reward = SequenceClassifierReward(toys.build_classifier(), tokenizer)
    backwards = 0
    for problem in toys.problems(4):
        with hooked(policy.backbone.base, reward.backbone.base) as (ours, theirs):
            _, ledger = toys.decode(DECODERS[name], [problem], policy, reward, **GIVEN)
        for hook, model in ((ours, "policy"), (theirs, "reward")):
            forward, backward = (ledger.cost(0, model=model, direction=d) for d in ("forward", "backward"))
            assert forward.sequential == hook.forwards
            assert backward.sequential == hook.backwards
            if DECODERS[name].__dict__.get("n", 1) == 1:
                assert forward.calls == hook.forwards
                assert forward.tokens == hook.positions  # a batch of one has no padding
            else:
                assert forward.calls > forward.sequential or model == "reward"
                assert forward.tokens <= hook.positions
            backwards += hook.backwards
    assert (backwards > 8) == (name == "nabla")


def test_backward_tokens_are_the_forwards():
    """In the optimisation phases, every forward that is differentiated has one backward over the same tokens."""
    _, ledger = toys.decode(NABLA, toys.problems(4), **GIVEN)
    for phase in ("probe", "dto"):
        for problem in range(4):
            for model in ("policy", "reward"):
                forward, backward = (
                    ledger.cost(problem, phase=phase, model=model, direction=d) for d in ("forward", "backward")
                )
                assert (forward.calls, forward.tokens) == (backward.calls, backward.tokens)
    assert ledger.cost(0, direction="backward").calls > 0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["policy", "support", "reward", "likelihood", "template"])
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_flops_agree_with_torchs_counter(kind: str, part: str, cached: bool):
    """Forward, and forward with backward to the tokens, are within 2% of FlopCounterMode, on any prefix."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "attn_implementation": "eager"}
    tokenizer = toys.chat_tokenizer() if kind == "template" else toys.tokenizer()
    if kind in ("reward", "template"):
        model = SequenceClassifierReward(toys.build_classifier(**shape), tokenizer)
        backbone = model.backbone
    else:
        judge = Policy(toys.build_llama(**shape), tokenizer)
        backbone, model = judge.backbone, LikelihoodReward(judge) if kind == "likelihood" else judge
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, toys.VOCAB, (3, 9), generator=generator)
    mask, support = torch.ones_like(ids).bool(), None
    probs, tokens = toys.one_hot(ids), ids if cached else None
    if kind == "support":
        support, probs, tokens = ids[..., None].expand(-1, -1, 6), torch.full((3, 9, 6), 1 / 6), None
    probs.requires_grad_(part == "backward")
    prefix = toys.prefill(backbone, [[5] * (20 if cached else 1)] * 3)
    ledger, prefix.earned = prefix.ledger, torch.zeros(3)
    before = sum(ledger.cost(i).flops for i in range(3))
    with FlopCounterMode(display=False) as counter:
        if isinstance(model, Policy):
            value = model.completion_log_probs(prefix, SoftTokens(probs, tokens), mask, support=support)
        else:
            value = model(prefix, SoftTokens(probs, tokens), mask, support=support)
        if part == "backward":
            value.sum().backward()
    booked = sum(ledger.cost(i).flops for i in range(3)) - before
    counted = counter.get_total_flops()
    if kind == "support" and part == "backward":
        # the mean output embedding, which the backward needs, is made in the forward
        assert booked == pytest.approx(counted, rel=0.05)
        return
    if kind == "support":
        counted -= 2 * 3 * 9 * toys.VOCAB * 32
    if kind == "template" and part == "backward":
        assert booked == pytest.approx(counted, rel=0.04)  # the closing tokens' own embeddings need no gradient
        return
    assert booked == pytest.approx(counted, rel=0.02)


def test_the_flops_of_a_rollout_agree_with_torchs_counter():
    """Prefill and step-by-step decoding, heads included, are within 2% of FlopCounterMode."""
    policy = Policy(toys.build_llama(attn_implementation="eager", hidden_size=32, eos_token_id=None), toys.tokenizer())
    ledger = Ledger(2)
    with FlopCounterMode(display=False) as counter:
        prefix = policy.prefill([[5, 6, 7, 8], [6, 5, 4, 3]], torch.arange(2), ledger)
        drawn = toys.greedy(policy, prefix, 6)
    assert drawn.mask.all()
    assert sum(ledger.cost(i).flops for i in range(2)) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert ledger.cost(0).tokens == 4 + 5  # the last token is never fed


def test_a_problems_account_does_not_depend_on_the_batch():
    """Calls, tokens, FLOPs and cached steps of each problem are the same alone and among others, padding excluded."""
    problems = toys.problems(6)
    for name, decoder in DECODERS.items():
        _, together = toys.decode(decoder, problems, **GIVEN)
        for index, problem in enumerate(problems):
            _, alone = toys.decode(decoder, [problem], **GIVEN)
            found, expected = together.table(index), alone.table(0)
            for row, other in zip(found, expected, strict=True):
                assert row.pop("seconds") > 0 or row["calls"] == 0
                other.pop("seconds")
                assert row.pop("flops") == pytest.approx(other.pop("flops"), rel=1e-12)
                assert row == other, (name, problem.id)
            assert together.cached[index] == alone.cached[0]


def test_steps_served_from_the_cache_are_counted():
    """Cached steps and evaluations of the optimisation add up to its steps, and only evaluations cost passes."""
    results, ledger = toys.decode(NABLA, toys.problems(6), **GIVEN)
    for index, result in enumerate(results):
        counts = result.counts
        steps, evaluations = counts.get("dto_steps", 0), counts.get("dto_evaluations", 0)
        assert ledger.cached[index] == steps - evaluations
        assert ledger.cost(index, phase="dto", model="reward", direction="forward").calls == evaluations
    assert ledger.cached.sum() > 0 and sum(r.counts.get("dto_evaluations", 0) for r in results) > 0


def test_sums_of_rows():
    """cost() adds up exactly the rows that match, table() leaves out rows without work, and phases nest."""
    ledger, problems = Ledger(3), torch.tensor([0, 0, 2])
    with ledger.phase("probe"):
        ledger.record("policy", "forward", problems, torch.tensor([2, 3, 0]), torch.tensor([10, 20, 99]), 4.0)
        with ledger.phase("dto"):
            ledger.record("reward", "backward", problems, torch.tensor([1, 1, 1]), torch.tensor([1, 2, 3]), 2.0)
        ledger.record("policy", "forward", problems, torch.tensor([1, 1, 1]), torch.tensor([5, 5, 5]), is_pass=False)
    assert ledger.phase_name == "rollout"
    assert ledger.cost(0, phase="probe") == Cost(2, 1, 5, 40.0, 4.0)
    assert ledger.cost(0) == ledger.cost(0, model="policy") + ledger.cost(0, direction="backward")
    # the seconds of a pass are shared by its problems
    assert ledger.cost(0, model="reward") == Cost(2, 1, 2, 3.0, 1.0)
    assert ledger.cost(1) == Cost() and ledger.table(1) == []
    assert [(row["phase"], row["pass"], row["flops"]) for row in ledger.table(2)] == [
        ("dto", "backward", 3.0), ("probe", "forward", 5.0),
    ]  # fmt: skip
    ledger.record_cached(torch.tensor([2, 2, 0]))
    assert ledger.cached.tolist() == [1, 0, 2]
