"""A judge is taught its gradient by a LoRA on a copy of it, saved alone, and loaded as proposer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nabla_rl.cli.train_tiny import TaughtOptions, TrainTinyOptions, train
from nabla_rl.data.tiny import SORTING
from nabla_rl.models.adapters import LoraOptions, build_adapter
from nabla_rl.models.loading import RewardOptions, load_classifier, load_policy
from nabla_rl.rewards.loading import load_reward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.tiny_world.taught import TaughtBatches, TinyTaught, taught_loss
from nabla_rl.types import UserError

CPU = torch.device("cpu")


def parts(lora: LoraOptions) -> TinyTaught:
    policy = load_policy("sorting/tiny-policy", device=CPU)
    judge, tokenizer = load_classifier("sorting/tiny-reward", RewardOptions(), device=CPU)
    copy, _ = load_classifier("sorting/tiny-reward", RewardOptions(), device=CPU)
    copy.set_attn_implementation("eager")
    reward = SequenceClassifierReward(judge, tokenizer, proposer=copy)
    adapter = build_adapter(copy, lora, argument="model.taught.lora")
    return TinyTaught(reward, policy, SORTING, batch_size=4, alternatives=4, adapter=adapter)


def test_only_the_matrices_train_and_they_learn():
    """On one batch the loss falls by a half; weights other than the LoRA's, the score head's included, stay."""
    module = parts(LoraOptions(r=8, lora_alpha=16))
    trained = [name for name, weight in module.model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("score" in name for name in trained)
    before = {name: w.clone() for name, w in module.model.named_parameters() if "lora_" not in name}
    policy, reward = module.policy[0], module.reward[0]
    batch = TaughtBatches(SORTING, policy, reward, batch_size=4, alternatives=4, seed=5).draw(0)
    optimizer, losses = torch.optim.AdamW([w for w in module.parameters() if w.requires_grad], lr=1e-2), []
    for _ in range(25):
        predicted = module.reward[0].fork_changes(
            batch.tracks, batch.positions, batch.ids, batch.mask, batch.alternatives, create_graph=True
        )
        loss = taught_loss(predicted, batch.changes, batch.logps, batch.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(w, before[name]) for name, w in module.model.named_parameters() if name in before)


def test_the_command_saves_an_adapter_that_decoding_loads_as_proposer(tmp_path: Path):
    """From problems in a file to the proposer: it proposes otherwise than the judge, whose values are untouched."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": word}) + "\n" for word in ("dcbaefgh", "hgfedcba", "qwertyui")))
    folder = tmp_path / "adapter"
    options = TrainTinyOptions(
        str(folder), "sorting", max_steps=3, batch_size=3, warmup=1,
        taught=TaughtOptions(problems=str(problems), max_new_tokens=12, lora=LoraOptions(r=4)),
    )  # fmt: skip
    assert train(options, run_dir=str(tmp_path / "run"), accelerator="cpu") == folder
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (folder / "model.safetensors").exists()
    plain = load_reward("sorting/tiny-reward", device=CPU)
    taught = load_reward("sorting/tiny-reward", taught=str(folder), device=CPU)
    assert isinstance(plain, SequenceClassifierReward) and isinstance(taught, SequenceClassifierReward)
    policy = load_policy("sorting/tiny-policy", device=CPU)
    batch = next(iter(TaughtBatches(SORTING, policy, plain, batch_size=3, alternatives=4, seed=1)))
    found = [
        judge.fork_changes(batch.tracks, batch.positions, batch.ids, batch.mask, batch.alternatives)[batch.mask]
        for judge in (plain, taught)
    ]
    assert torch.isfinite(found[1]).all() and not torch.allclose(found[0], found[1], atol=1e-4)
    forks = (batch.tracks, batch.positions, batch.ids, batch.mask)
    assert torch.equal(plain.fork_values(*forks)[batch.mask], taught.fork_values(*forks)[batch.mask])


@pytest.mark.parametrize(
    ("name", "taught", "names"),
    [
        ("tiny-lora", TaughtOptions(lora=LoraOptions()), "name"),
        ("./x", TaughtOptions(lora=LoraOptions(target_modules=["nothing"])), "taught.lora.target_modules"),
        ("./x", TaughtOptions(problems="nowhere.jsonl"), "taught.problems"),
        ("./x", TaughtOptions(judge="./nowhere"), "taught.judge"),
        ("./x", TaughtOptions(policy="./nowhere"), "taught.policy"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(name: str, taught: TaughtOptions, names: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        train(TrainTinyOptions(name, "sorting", taught=taught), run_dir=str(tmp_path), accelerator="cpu")
    assert names in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_of_another_judge_is_refused_in_one_line(tmp_path: Path):
    other, _ = load_classifier("words/tiny-reward", RewardOptions(), device=CPU)
    build_adapter(other, LoraOptions(r=4), argument="x").save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["no_such_layer"]}))
    with pytest.raises(UserError, match="reward.taught: expected an adapter of this model"):
        load_reward("sorting/tiny-reward", taught=str(tmp_path), device=CPU)
