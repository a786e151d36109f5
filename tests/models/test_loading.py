"""Models come from folders; what cannot be loaded is one line, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_classifier, load_policy, resolve_dtype
from nabla_rl.types import UserError
from tests import toys_hf as toys

CPU = torch.device("cpu")


def test_a_saved_model_comes_back_the_same(tmp_path: Path):
    """Policy and classifier from a folder give the logits of the models that were saved, in the type asked for."""
    policy, model = toys.build_llama(), toys.build_classifier()
    for name, saved in (("policy", policy), ("reward", model)):
        saved.save_pretrained(tmp_path / name)
        toys.tokenizer().save_pretrained(tmp_path / name)
    loaded = load_policy(PolicyOptions(name=str(tmp_path / "policy"), dtype="float64"), family="sorting", device=CPU)
    assert loaded.backbone.weight.dtype == torch.float64
    assert loaded.encode_prompt("cab") == toys.policy().encode_prompt("cab")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(
        loaded.backbone.model(input_ids=ids).logits.float(), policy(input_ids=ids).logits, atol=1e-5, rtol=1e-5
    )
    judge, tokenizer = load_classifier(RewardOptions(name=str(tmp_path / "reward")), family="sorting", device=CPU)
    assert tokenizer.get_vocab() == toys.tokenizer().get_vocab()
    torch.testing.assert_close(judge(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    """A path without config.json, an unknown name and a model without a tokenizer each name their argument."""
    with pytest.raises(UserError, match="--model.policy.name: expected a model folder"):
        load_policy(PolicyOptions(name=str(tmp_path)), family="sorting", device=CPU)
    with pytest.raises(UserError, match="--model.reward.name: expected a folder, a Hub name"):
        load_classifier(RewardOptions(name="no-such-model"), family="sorting", device=CPU)
    toys.build_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="expected a tokenizer beside"):
        load_policy(PolicyOptions(name=str(tmp_path / "bare")), family="sorting", device=CPU)


def test_auto_is_float32_off_the_gpu():
    """The automatic type is bfloat16 on a GPU and float32 elsewhere."""
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
