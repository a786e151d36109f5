"""One-token steps: the short way through a Llama model is the long way, to the last bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaModel

from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.models.stepping import GenericSteps, LlamaSteps, is_plain_llama, open_steps
from tests import toys_hf as toys

PROMPTS = {"padded": [[5, 6, 7, 8], [6], [7, 8, 9], [5, 5]], "even": [[5, 6, 7], [6, 7, 8], [7, 8, 9], [9, 8, 7]]}
SHAPES = {
    "plain": {},
    "grouped heads": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "own head size": {"head_dim": 24},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", PROMPTS)
@torch.no_grad()
def test_the_short_way_is_the_models_own_forward_to_the_last_bit(prompts: str, shape: str, dtype: torch.dtype):
    """States, keys and values agree exactly over steps, rows that leave included."""
    policy = Policy(toys.build_llama(**SHAPES[shape]), toys.tokenizer()).to(dtype)
    prefix = policy.prefill(PROMPTS[prompts], torch.arange(4), Ledger(4))
    ways = [LlamaSteps(policy.backbone, prefix), GenericSteps(policy.backbone, prefix)]
    tokens = torch.tensor([5, 9, 6, 7])
    for step in range(6):
        if step == 3:
            tokens = tokens[torch.tensor([0, 2])]
            for way in ways:
                way.keep(torch.tensor([0, 2]))
        ours, theirs = (way.step(tokens, way.columns.sum(-1)) for way in ways)
        assert torch.equal(ours, theirs)
        assert torch.equal(ways[0].columns, ways[1].columns)
        for mine, other in zip(ways[0].tensors(), ways[1].tensors(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        tokens = policy.logits(ours).argmax(-1)
    assert len(prefix.keys[0][0, 0]) == len(PROMPTS[prompts][0])  # the prefix is as it was


@pytest.mark.parametrize("greedy", [False, True])
def test_a_rollout_and_its_account_are_the_same_either_way(greedy: bool):
    """Tokens, log-probabilities, encodings and every count of the ledger, with rows that end at different steps."""
    found = []
    for hooked in (False, True):
        policy = Policy(toys.build_llama(eos_token_id=[2, 9, 17]), toys.tokenizer())
        handle = policy.backbone.base.register_forward_hook(lambda *_: None) if hooked else None
        assert is_plain_llama(policy.backbone) != hooked
        ledger = Ledger(2)
        prefix = policy.prefill(PROMPTS["padded"], torch.tensor([0, 0, 1, 1]), ledger)
        rollout = policy.rollout(
            prefix, Sampling(0.0 if greedy else 1.0, max_new_tokens=9), [seeded_generator(0, i) for i in range(4)],
            keep_states=True, keep_top=3,
        )  # fmt: skip
        found.append((rollout, ledger))
        if handle is not None:
            handle.remove()
    (ours, mine), (theirs, other) = found
    assert greedy or len(ours.mask.sum(-1).unique()) > 1
    for name in ("ids", "mask", "logps", "sampling_logps", "finished", "entropy", "top_ids", "top_logps"):
        assert torch.equal(ours.__dict__[name], theirs.__dict__[name]), name
    assert ours.encoded is not None and theirs.encoded is not None
    assert all(torch.equal(a, b) for a, b in zip(ours.encoded.keys, theirs.encoded.keys, strict=True))
    for key, account in mine.rows.items():
        assert torch.equal(account[:, :4], other.rows[key][:, :4]), key


def test_steps_booked_together_are_booked_as_one_by_one():
    """`record_steps` says what one `record` for every step says, seconds to rounding."""
    problems, fed = torch.tensor([0, 2, 2]), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    flops, seconds = torch.rand(3, 3, dtype=torch.float64), [0.5, 0.25, 2.0]
    together, apart = Ledger(3), Ledger(3)
    together.record_steps("policy", "forward", problems, fed, (flops * fed).sum(-1), seconds)
    for step in range(3):
        apart.record("policy", "forward", problems, fed[:, step].long(), flops[:, step], seconds[step])
    (ours,), (theirs,) = together.rows.values(), apart.rows.values()
    assert torch.equal(ours[:, :3], theirs[:, :3])
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert ours[1].sum() == 0 and ours[:, 4].sum() == pytest.approx(2.75)


def test_other_models_and_kernels_go_through_their_own_forward():
    """Only what is known to be exact takes the short way."""
    eager = Policy(toys.build_llama(attn_implementation="eager"), toys.tokenizer())
    assert isinstance(eager.backbone.base, LlamaModel)
    prefix = eager.prefill([[5, 6]], torch.arange(1), Ledger(1))
    assert isinstance(open_steps(eager.backbone, prefix), GenericSteps)
