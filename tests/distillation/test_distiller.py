"""The distiller: TRL's own trainers as the oracle, exact soft targets, resuming, accumulation, and bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, SFTConfig

from nabla_rl.data.problems import Problem, grade_exact
from nabla_rl.data.tiny import SORTING
from nabla_rl.distillation.config import DistillConfig
from nabla_rl.distillation.distiller import PolicyDistiller, encode_completion
from nabla_rl.distillation.rows import Row
from nabla_rl.distillation.soft_targets import add_soft_targets
from nabla_rl.distillation.trl_engine import Report, build_trl_trainer, fit_with_trl
from nabla_rl.ledger import Ledger
from nabla_rl.models.adapters import LoraOptions
from nabla_rl.models.loading import PolicyOptions
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError
from tests import toys_hf

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LORA = LoraOptions(r=4, lora_alpha=8)
TEXTS = (("ba", "ab"), ("dcbaefg", "abcdefg"), ("zyx", "xyz"), ("hgfe", "efgh"))


class Few:
    """What a distiller asks of its data."""

    family, grade = SORTING, staticmethod(grade_exact)
    held_out: list[Problem] = []

    def __init__(self, validation: Sequence[Problem] = ()):
        self.validation = list(validation)


def rows_of(method: str) -> list[Row]:
    if method == "preference":
        return [{"id": p, "prompt": p, "chosen": c, "rejected": c[::-1] + "a"} for p, c in TEXTS]
    rows: list[Row] = [{"id": p, "prompt": p, "completion": c} for p, c in TEXTS]
    if method == "weighted":
        return [row | {"weight": weight} for row, weight in zip(rows, (0.1, 0.9, 0.5, 0.5), strict=True)]
    return soft_rows(rows) if method == "soft" else rows


def toy_policy() -> Policy:
    return Policy(toys_hf.build_llama(), toys_hf.tokenizer())


def toy_judge() -> SequenceClassifierReward:
    return SequenceClassifierReward(toys_hf.build_classifier(), toys_hf.tokenizer())


def soft_rows(rows: list[Row], beta: float = 0.5, alternatives: int = 4) -> list[Row]:
    return add_soft_targets(rows, toy_policy(), toy_judge(), beta=beta, alternatives=alternatives)[0]


def build(method: str = "sft", *, data: Any = None, rows: list[Row] | None = None, **training: Any) -> PolicyDistiller:
    settings = {
        "per_device_train_batch_size": 4, "learning_rate": 0.05, "max_steps": 6, "report_to": "none",
        "eval_steps": 2, **training,
    }  # fmt: skip
    module = PolicyDistiller(method=method, training=DistillConfig(**settings), lora=LORA, max_completion_length=8)  # pyright: ignore
    module.use(toy_policy(), data or Few())
    module.learn_from(rows_of(method) if rows is None else rows)
    return module


def fit(
    module: PolicyDistiller, *, callbacks: Sequence[L.Callback] = (), precision: Any = None, **options: Any
) -> PolicyDistiller:
    own = module.training_config
    trainer = L.Trainer(
        max_steps=own.max_steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=own.max_grad_norm or None, callbacks=list(callbacks),
        accumulate_grad_batches=own.gradient_accumulation_steps, precision=precision,
    )  # fmt: skip
    trainer.fit(module, **options)
    return module


def weights(module: PolicyDistiller) -> Tensor:
    state = get_peft_model_state_dict(module.adapter.peft)
    return torch.cat([state[name].flatten() for name in sorted(state)])


def perturb(module: PolicyDistiller) -> None:
    """So that policy and reference differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in module.adapter.peft.named_parameters():
            if "lora_B.default" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def gradient(module: PolicyDistiller, loss: Tensor) -> Tensor:
    module.adapter.peft.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in module.adapter.parameters()])  # pyright: ignore


# TRL's vocabulary, batches and losses


def test_every_setting_is_one_of_trls():
    ours = {entry.name for entry in dataclasses.fields(DistillConfig)}
    sft, dpo = ({entry.name for entry in dataclasses.fields(config)} for config in (SFTConfig, DPOConfig))
    assert ours <= dpo and ours - sft == {"beta", "loss_weights"}


BOTH = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}


@pytest.mark.parametrize(("method", "more"), [("sft", {}), ("preference", {}), ("preference", BOTH)])
def test_loss_and_gradient_are_trls_on_its_own_batch(method, more, tmp_path):
    """Prompts and completions of different lengths, tokenised by TRL, and a policy that has left the reference."""
    module = build(method, **more)
    trainer = build_trl_trainer(module, tmp_path)
    perturb(module)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    their_gradient = gradient(module, theirs)
    ours, _ = module.loss(module.rows)
    our_gradient = gradient(module, ours)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    assert (our_gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()


def test_trl_reads_the_very_ids_that_we_do(tmp_path):
    module = build()
    data = build_trl_trainer(module, tmp_path).train_dataset
    for row, ours in zip(data, module.rows, strict=True):
        prompt = module.policy.encode_prompt(ours["prompt"])
        assert row["input_ids"] == prompt + module.completions(ours)[0]


@pytest.mark.parametrize("method", ["sft", "preference"])
def test_sgd_steps_end_at_trls_adapter(method, tmp_path):
    """All rows in every batch, so that their order does not matter."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
    ours = fit(build(method, **settings))
    theirs = build(method, **settings, logging_steps=1, save_steps=2)
    start = weights(theirs)
    fit_with_trl(theirs, tmp_path)
    assert (weights(ours) - start).norm() > 1e-4
    torch.testing.assert_close(weights(theirs), weights(ours), rtol=1e-4, atol=1e-6)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert theirs.all_flops > 0


@pytest.mark.parametrize("method", ["sft", "preference"])
def test_trl_interrupted_goes_on_to_the_same_adapter(method, tmp_path):
    settings = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 2}
    whole, broken, again = (build(method, **settings) for _ in range(3))
    fit_with_trl(whole, tmp_path / "whole")

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = build_trl_trainer(broken, tmp_path / "run")
    trainer.add_callback(Report(tmp_path / "run"))
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not torch.equal(weights(broken), weights(again))
    fit_with_trl(again, tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", ["soft", "weighted"])
def test_trl_has_no_such_way(method, tmp_path):
    with pytest.raises(UserError, match="method: expected sft or preference with `engine` trl"):
        build_trl_trainer(build(method), tmp_path)


# Weights and soft targets


def test_weights_count_rows_by_their_tokens():
    module = build("weighted")
    perturb(module)
    single = [module.loss([row | {"weight": 1.0}]) for row in module.rows]
    tokens = [row["weight"] * len(module.completions(row)[0]) for row in module.rows]
    expected = sum(n * loss.item() for n, (loss, _) in zip(tokens, single, strict=True)) / sum(tokens)
    assert module.loss(module.rows)[0].item() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_are_the_law_by_one_pass_for_each_alternative():
    """log π and V of every prefix that ends with an alternative, each computed alone."""
    policy, judge, beta, prompt = toy_policy(), toy_judge(), 0.5, "dcb"
    [row], flops = add_soft_targets(
        [{"id": "p", "prompt": prompt, "completion": "bcd"}], policy, judge, beta=beta, alternatives=4
    )
    completion = encode_completion(policy, "bcd")
    assert row["completion_ids"] == completion and len(row["target_ids"]) == len(completion) == 4 and flops > 0
    ids = policy.encode_prompt(prompt)
    ledger, account = Ledger(1), torch.zeros(1, dtype=torch.int64)
    for place, (tokens, logps) in enumerate(zip(row["target_ids"], row["target_logps"], strict=True)):
        assert completion[place] in tokens and len(set(tokens)) == 4
        prefix = completion[:place]
        logits = policy.backbone.model(torch.tensor([ids + prefix])).logits[0, -1].log_softmax(-1)
        values = []
        for token in tokens:
            given = torch.tensor([[*prefix, token]])
            judged = judge.prefill([prompt], account, ledger)
            values.append(judge.values(judged, given, torch.ones_like(given).bool())[0, -1])
        expected = (logits[tokens] + torch.stack(values) / beta).log_softmax(-1)
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-3, atol=2e-4)


def test_soft_targets_do_not_depend_on_the_batch():
    rows = rows_of("sft")
    together = soft_rows(rows)
    alone = [soft_rows([row])[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        assert one["target_ids"] == other["target_ids"]
        torch.testing.assert_close(
            torch.tensor(one["target_logps"]), torch.tensor(other["target_logps"]), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("method", ["sft", "preference", "soft", "weighted"])
def test_every_way_learns(method):
    module = build(method, max_steps=20, lr_scheduler_type="constant")
    with torch.no_grad():
        before = module.loss(module.rows)[0].item()
    fit(module)
    with torch.no_grad():
        assert module.loss(module.rows)[0].item() < 0.7 * before
    assert module.adapter.changed() and module.all_flops > 0


def test_reverse_and_forward_targets_differ():
    module = build("soft")
    forward = module.loss(module.rows)[0].item()
    module.direction = "reverse"
    assert module.loss(module.rows)[0].item() != pytest.approx(forward, rel=1e-3)


# Steps


def test_accumulated_parts_are_one_batch():
    """Also where the parts have different numbers of tokens."""
    for method in ("weighted", "preference"):
        whole = fit(build(method, optim="sgd", learning_rate=0.2, max_steps=3))
        parts = fit(
            build(
                method, optim="sgd", learning_rate=0.2, max_steps=3, per_device_train_batch_size=1,
                gradient_accumulation_steps=4,
            )
        )  # fmt: skip
        torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-6)


def test_resumed_is_unbroken_bit_for_bit(tmp_path):
    """In the middle of an epoch and with the best weights so far."""
    validation = [Problem("v", "ba", "ab")]
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 6}
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(build(data=Few(validation), **options), callbacks=[saver])
    again = fit(build(data=Few(validation), **options), ckpt_path=str(tmp_path / "step=3.ckpt"), weights_only=True)
    assert torch.equal(weights(again), weights(whole))
    assert again.all_flops == whole.all_flops and again.all_tokens == whole.all_tokens
    assert whole.best is not None and again.best is not None
    assert {n: whole.best[n] for n in ("step", "accuracy")} == {n: again.best[n] for n in ("step", "accuracy")}
    finished = build(data=Few(validation), **options)
    fit(finished, ckpt_path=str(tmp_path / "step=6.ckpt"), weights_only=True)
    assert torch.equal(weights(finished), weights(whole)) and finished.all_flops == whole.all_flops


def test_the_best_weights_on_validation_are_kept(monkeypatch):
    accuracies = iter([0.2, 0.7, 0.5])
    module, seen = build(data=Few([Problem("v", "ba", "ab")])), []
    monkeypatch.setattr(module, "validate", lambda: seen.append(weights(module).clone()) or next(accuracies))
    fit(module)
    assert not torch.equal(weights(module), seen[1])
    module.restore_best()
    assert torch.equal(weights(module), seen[1])
    assert module.best is not None and module.best["step"] == 4


def test_without_validation_problems_the_last_weights_are_kept():
    module = fit(build())
    last = weights(module).clone()
    module.restore_best()
    assert module.best is None and torch.equal(weights(module), last)


def test_the_reference_of_a_fresh_adapter_is_the_policy():
    loss, metrics = build("preference").loss(rows_of("preference"))
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("method", ["sft", "preference", "soft", "weighted"])
def test_mixed_precision_learns_the_same_with_weights_in_float32(method):
    """Products are bfloat16, which has 8 bits: steps of plain descent then end within a few percent."""
    settings = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 3, "lr_scheduler_type": "constant"}
    whole, mixed = build(method, **settings), build(method, **settings)
    start = weights(whole)
    fit(whole)
    seen: list[torch.dtype] = []
    hook = mixed.policy.backbone.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    fit(mixed, precision="bf16-mixed")
    hook.remove()
    assert torch.bfloat16 in seen and all(weight.dtype == torch.float32 for weight in mixed.adapter.parameters())
    moved, off = weights(whole) - start, weights(mixed) - weights(whole)
    assert moved.norm() > 1e-3 and 0 < off.norm() < 0.1 * moved.norm()


# Bad input


def test_a_row_that_is_too_long_is_named():
    with pytest.raises(
        UserError, match="problem 'x': expected prompt and completion to fit the student's context of 96"
    ):
        build(rows=[{"id": "x", "prompt": "ab", "completion": "a" * 200}])


def test_a_loss_that_is_no_number_reaches_no_weight():
    module = build()
    with torch.no_grad():
        next(iter(module.adapter.parameters())).fill_(torch.nan)
    with pytest.raises(UserError, match="training.learning_rate: expected a finite loss"):
        fit(module)


@pytest.mark.parametrize(
    ("field", "value"), [("beta", 0.0), ("learning_rate", -1.0), ("eval_steps", 0), ("warmup_steps", -1)]
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=f"training.{field}: expected"):
        DistillConfig(**{field: value})


def test_an_adapter_under_the_new_one_is_refused():
    with pytest.raises(UserError, match="policy.adapter: expected none"):
        PolicyDistiller(policy=PolicyOptions(adapter=str(Path("somewhere"))))
