"""LoRA in a policy: the reference is the policy without it, and what is saved is what was trained."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nabla_rl.ledger import Ledger
from nabla_rl.models.adapters import LoraOptions, attach_adapter, merge_adapter
from nabla_rl.models.flops import FlopFormula
from nabla_rl.models.groups import group_logits
from nabla_rl.models.loading import load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.types import UserError
from tests import toys_hf
from tests.cli import toys_cli

PROMPTS, OPTIONS = [[5, 6, 7], [8, 9]], LoraOptions(r=4, lora_alpha=8)


def policy() -> Policy:
    return Policy(toys_hf.build_llama(), toys_hf.tokenizer())


def change(adapter) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


def logits(actor: Policy) -> torch.Tensor:
    ids, mask = toys_hf.pad_right([[4, 5, 6], [7, 2], [3, 3, 3], [9, 8, 7]])
    return group_logits(actor, PROMPTS, ids, mask, Ledger(1))[mask]


def test_without_training_policy_and_reference_agree_and_afterwards_only_the_policy_has_moved():
    actor = policy()
    before = logits(actor)
    adapter = attach_adapter(actor, OPTIONS)
    torch.testing.assert_close(logits(actor), before)
    change(adapter)
    assert (logits(actor) - before).abs().max() > 0.1
    with adapter.disabled():
        torch.testing.assert_close(logits(actor), before, rtol=0, atol=0)
    assert (logits(actor) - before).abs().max() > 0.1


def test_only_the_adapter_trains():
    actor = policy()
    adapter = attach_adapter(actor, OPTIONS)
    names = {name for name, weight in actor.named_parameters() if weight.requires_grad}
    assert names and all("lora_" in name for name in names)
    assert adapter.num_weights == sum(weight.numel() for weight in adapter.parameters())
    assert actor.backbone.formula.block_weights == FlopFormula.of(actor.backbone.model).block_weights


def test_the_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = attach_adapter(policy(), OPTIONS, seed=3).state()
    torch.manual_seed(2)
    again, other = attach_adapter(policy(), OPTIONS, seed=3).state(), attach_adapter(policy(), OPTIONS, seed=4).state()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_group_logits_are_those_of_whole_sequences_with_their_gradients():
    """Prompts of different lengths read once for their groups, against one uncached pass for each completion."""
    actor = policy()
    adapter = attach_adapter(actor, OPTIONS)
    change(adapter)
    completions = [[4, 5, 6], [7, 2], [3, 3, 3], [9, 8, 7]]
    weight = torch.randn(31, generator=torch.Generator().manual_seed(0))

    def gradient(rows: list[torch.Tensor]) -> torch.Tensor:
        adapter.peft.zero_grad()
        torch.stack([(row.log_softmax(-1) @ weight).sum() for row in rows]).sum().backward()
        return torch.cat([w.grad.flatten() for w in adapter.parameters()])  # pyright: ignore

    ids, mask = toys_hf.pad_right(completions)
    shared = group_logits(actor, PROMPTS, ids, mask, Ledger(1))
    ours = [row[kept] for row, kept in zip(shared, mask, strict=True)]
    theirs = []
    for index, ids in enumerate(completions):
        prompt = PROMPTS[index // 2]
        whole = actor.backbone.model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0]
        theirs.append(whole[len(prompt) - 1 : -1])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    expected = gradient(theirs)
    assert (gradient(ours) - expected).norm() < 1e-5 * expected.norm()


def test_the_ledger_has_forward_and_backward_of_a_group():
    actor = policy()
    adapter = attach_adapter(actor, OPTIONS)
    ids, mask = toys_hf.pad_right([[4, 5, 6], [7, 2], [3, 3, 3], [9, 8, 7]])
    ledger = Ledger(1)
    group_logits(actor, PROMPTS, ids, mask, ledger, trainable=adapter.num_weights)
    forward, backward = (ledger.cost(0, direction=name) for name in ("forward", "backward"))
    assert forward.tokens == 5 + 2 + 1 + 2 + 2 == backward.tokens
    assert backward.flops > forward.flops > 2 * actor.backbone.formula.block_weights * forward.tokens


# Saved and loaded


def test_saved_adapter_loads_in_a_fresh_process_and_decodes(tmp_path):
    """By `PeftModel.from_pretrained`, and merged by `PolicyOptions.adapter`: the same logits as when it was saved."""
    base = toys_cli.save(toys_hf.build_llama(), tmp_path / "base")
    actor = load_policy(str(base), device="cpu")
    adapter = attach_adapter(actor, OPTIONS)
    change(adapter)
    expected = logits(actor)
    folder = adapter.save(tmp_path / "adapter", "# A card\n")
    assert (folder / "README.md").read_text() == "# A card\n"
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    loaded = load_policy(str(base), adapter=str(folder), device="cpu")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
print(*model(input_ids=torch.tensor([[5, 6, 7, 4]])).logits[0, 2].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(base), str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor([float(number) for number in done.stdout.split()])
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)


def test_an_unchanged_adapter_is_not_saved(tmp_path):
    adapter = attach_adapter(policy(), OPTIONS)
    with pytest.raises(UserError, match="expected weights that training has changed, found none changed"):
        adapter.save(tmp_path / "adapter", "")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_with_nan_is_not_saved(tmp_path):
    adapter = attach_adapter(policy(), OPTIONS)
    with torch.no_grad():
        adapter.parameters()[0].fill_(float("nan"))
    with pytest.raises(UserError, match="expected finite weights"):
        adapter.save(tmp_path / "adapter", "")


@pytest.mark.parametrize("target", ["query", "lm_head", "proj"])
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(target):
    with pytest.raises(UserError, match=r"\(down_proj, .*v_proj\), found '" + target):
        attach_adapter(policy(), LoraOptions(target_modules=[target, "q_proj"]))


def test_a_single_target_may_be_written_without_brackets():
    adapter = attach_adapter(policy(), LoraOptions(target_modules="q_proj"))
    assert all("q_proj" in name for name, weight in adapter.peft.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_sizes_are_checked(field):
    with pytest.raises(UserError, match=f"lora.{field}: expected at least 1, found 0"):
        LoraOptions(**{field: 0})


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="policy.adapter: expected a PEFT adapter folder, found no adapter_conf"):
        merge_adapter(toys_hf.build_llama(), str(tmp_path))


def test_another_models_adapter_is_refused(tmp_path):
    adapter = attach_adapter(policy(), OPTIONS)
    change(adapter)
    adapter.save(tmp_path / "adapter", "")
    with pytest.raises(UserError, match="expected an adapter of this model, found"):
        merge_adapter(toys_hf.build_llama(hidden_size=32), str(tmp_path / "adapter"))
