"""The aligner: TRL's own trainers as the oracle, exact laws on an enumerable policy, resuming, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, RLOOConfig

from nabla_rl.adapters.training import keep_steps
from nabla_rl.alignment.aligner import PolicyAligner
from nabla_rl.alignment.config import RLConfig
from nabla_rl.alignment.data import AlignmentData, Draws
from nabla_rl.alignment.rollouts import Completions, MicroBatch
from nabla_rl.alignment.trl_engine import build_trl_trainer
from nabla_rl.alignment.trl_search import SearchRollouts
from nabla_rl.data.problems import Problem, grade_exact
from nabla_rl.data.tiny import SORTING, build_tokenizer
from nabla_rl.decoding import EditSearch, Nabla
from nabla_rl.functional.policy_gradient import group_relative_advantages
from nabla_rl.ledger import Ledger
from nabla_rl.models.adapters import LoraOptions
from nabla_rl.models.groups import group_logits
from nabla_rl.models.policy import Policy
from nabla_rl.types import UserError
from tests import toys_hf

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LORA = LoraOptions(r=4, lora_alpha=8)


class Few:
    """Problems to train on, of prompts of different lengths."""

    family, grade = SORTING, staticmethod(grade_exact)

    def __init__(self, texts: Sequence[str] = ("ba", "dcbaefg", "zyx", "hgfe")):
        self.problems = [Problem(f"p{i}", text, "".join(sorted(text))) for i, text in enumerate(texts)]
        self.held_out = self.problems

    def training(self, draw: int, count: int) -> list[Problem]:
        return [self.problems[(draw * count + i) % len(self.problems)] for i in range(count)]


def toy_policy() -> Policy:
    return Policy(toys_hf.build_llama(eos_token_id=[2, 9, 17]), toys_hf.tokenizer())


def early_letters(completions: Sequence[str], **columns: Any) -> list[float]:
    return [sum(c < "k" for c in text) - 0.1 * len(text) for text in completions]


def build(
    policy: Policy | None = None, data: Any = None, reward: Any = early_letters, **options: Any
) -> PolicyAligner:
    rl = RLConfig(
        **{
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 6,
            "learning_rate": 0.05,
            "beta": 0.2,
            "max_steps": 6,
            "report_to": "none",
            **options.pop("rl", {}),
        }  # fmt: skip
    )
    module = PolicyAligner(rl=rl, lora=options.pop("lora", LORA), eval_generations=2, **options)
    module.use(policy or toy_policy(), data or Few(), functions=[reward])
    return module


def fit(module: PolicyAligner, *, callbacks: Sequence[L.Callback] = (), **options: Any) -> PolicyAligner:
    trainer = L.Trainer(
        max_steps=module.rl.max_steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=module.rl.max_grad_norm or None, callbacks=list(callbacks),
        accumulate_grad_batches=module.rl.gradient_accumulation_steps,
    )  # fmt: skip
    trainer.fit(module, **options)
    return module


def weights(module: PolicyAligner) -> Tensor:
    state = get_peft_model_state_dict(module.adapter.peft)
    return torch.cat([state[name].flatten() for name in sorted(state)])


def perturb(module: PolicyAligner) -> None:
    """So that policy and reference differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in module.adapter.peft.named_parameters():
            if "lora_B.default" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def gradient(module: PolicyAligner, loss: Tensor) -> Tensor:
    module.adapter.peft.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in module.adapter.parameters()])  # pyright: ignore


# TRL's vocabulary


def test_every_setting_is_one_of_trls():
    """By name; and each algorithm's TRL config takes all that are not the other one's."""
    ours = {entry.name for entry in dataclasses.fields(RLConfig)}
    grpo, rloo = ({entry.name for entry in dataclasses.fields(config)} for config in (GRPOConfig, RLOOConfig))
    assert ours <= grpo
    assert ours - rloo == {"loss_type", "scale_rewards", "use_bias_correction_kl"}


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_settings_arrive_at_trl(algorithm, tmp_path):
    rl = RLConfig(
        beta=0.3, num_generations=4, per_device_train_batch_size=8, learning_rate=0.5, top_p=0.9, epsilon=0.1
    )
    theirs = rl.to_trl(algorithm, output_dir=str(tmp_path), use_cpu=True)
    for entry in dataclasses.fields(RLConfig):
        if entry.name in {f.name for f in dataclasses.fields(theirs)} and entry.name != "report_to":
            assert getattr(theirs, entry.name) == getattr(rl, entry.name), entry.name


def test_defaults_have_a_reference_and_do_not_truncate():
    rl = RLConfig()
    assert rl.beta > 0 and rl.top_k == 0 and rl.top_p == 1.0


# Parity with TRL

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rloo": ("rloo", {"temperature": 0.7}),
    "grpo": ("grpo", {"loss_type": "grpo"}),
    "grpo, epsilon_high": ("grpo", {"loss_type": "grpo", "epsilon_high": 0.28, "scale_rewards": "batch"}),
    "dapo": ("grpo", {"loss_type": "dapo", "temperature": 1.3}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_trls_on_its_own_rollouts(case, tmp_path):
    """Left-padded prompts, completions of different lengths, a policy that has left the reference.

    In float64: in float32 the two engines' forwards, which are batched differently, differ by up to 1e-6 themselves.
    """
    algorithm, rl = CASES[case]
    module = build(algorithm=algorithm, rl=rl)
    module.adapter.peft.double()
    trainer = build_trl_trainer(module, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    perturb(module)
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    torch.manual_seed(5)
    inputs = trainer._generate_and_score_completions(rows)
    assert not inputs["prompt_mask"].all() and not inputs["completion_mask"].all()
    theirs = trainer.compute_loss(trainer.model, inputs)
    their_gradient = gradient(module, theirs)

    ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
    prompts = [
        row[kept.bool()].tolist() for row, kept in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    problems = [Problem(row["id"], row["problem"], row["answer"]) for row in rows[::4]]
    rewards = module.reward(problems, ids, mask)
    part = MicroBatch(prompts[::4], ids, mask, rewards, rewards.sum(1), torch.ones(8).bool())
    if algorithm == "grpo":
        part.advantages = group_relative_advantages(part.total, 4, scale=module.rl.scale_rewards)
    ours, metrics = module.loss(part)
    our_gradient = gradient(module, ours)
    assert part.advantages is not None
    torch.testing.assert_close(part.advantages, inputs["advantages"], rtol=1e-5, atol=1e-6, check_dtype=False)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    assert (our_gradient - their_gradient).norm() <= 1e-6 * their_gradient.norm()
    assert metrics["kl"] == pytest.approx(trainer._metrics["train"]["kl"][-1], rel=1e-4)
    assert metrics["entropy"] == pytest.approx(trainer._metrics["train"]["entropy"][-1], rel=1e-4)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=["whole", "accumulated"])
def test_four_sgd_steps_end_at_trls_adapter(algorithm, more, tmp_path):
    """The same seed, the same data, the same draws: TRL's trainer is handed this package's sampler."""
    rl = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
    ours = fit(build(algorithm=algorithm, rl=rl | more))
    other = build(algorithm=algorithm, rl=rl | more)
    start = weights(other)
    trainer = build_trl_trainer(other, tmp_path, save_strategy="no")

    def generate(self: Any, prompt_ids: list, *rest: Any) -> Any:
        number, size = self.state.global_step, other.rl.num_generations
        problems = other.data.training(number, len(prompt_ids) // size)
        rows = other.rollout(problems, prompt_ids[::size], number).rows()
        return (rows, None) if algorithm == "grpo" else rows

    trainer._generate_single_turn = MethodType(generate, trainer)
    trainer.train()
    assert (weights(ours) - start).norm() > 0.01
    assert (weights(ours) - weights(other)).norm() <= 1e-4 * (weights(ours) - start).norm()


# Exact laws

LENGTH = 2


def enumerable() -> Policy:
    """Seven tokens, two of them at most: 43 completions."""
    family = dataclasses.replace(SORTING, tokens=("a", "b", "\n"))
    torch.manual_seed(0)
    shape = {**toys_hf.SHAPE, **toys_hf.SPECIAL, "vocab_size": 7, "hidden_size": 32, "num_hidden_layers": 1}
    return Policy(LlamaForCausalLM(LlamaConfig(**shape)), build_tokenizer(family))


def every_completion() -> tuple[Tensor, Tensor]:
    rows = [(2,), *(pair for pair in itertools.product(range(7), repeat=2) if pair[0] != 2)]
    return toys_hf.pad_right(rows)


def table_reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A number of its own for every completion, about standard normal."""
    table = torch.randn(7, 8, generator=torch.Generator().manual_seed(11))
    return [float(table[ids[0], ids[1] if len(ids) > 1 else 7]) for ids in completion_ids]


def exact(module: PolicyAligner) -> tuple[float, float, float]:
    """J(π), β log Z and KL(π‖ρ*), by enumeration."""
    ids, mask = every_completion()
    prompt = [module.policy.encode_prompt("ab")]
    with torch.no_grad():

        def logps() -> Tensor:
            logits = group_logits(module.policy, prompt, ids, mask, Ledger(1)).double()
            return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1).masked_fill(~mask, 0.0).sum(-1)

        policy = logps()
        with module.adapter.disabled():
            ref = logps()
    assert float(policy.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    beta = module.rl.beta
    rewards = torch.tensor(table_reward([row[kept].tolist() for row, kept in zip(ids, mask, strict=True)])).double()
    log_partition = (ref + rewards / beta).logsumexp(0)
    target = ref + rewards / beta - log_partition
    objective = (policy.exp() * (rewards - beta * (policy - ref))).sum()
    return float(objective), float(beta * log_partition), float((policy.exp() * (policy - target)).sum())


def enumerable_module(beta: float, **options: Any) -> PolicyAligner:
    rl = {
        "beta": beta, "num_generations": 256, "per_device_train_batch_size": 256, "max_completion_length": LENGTH,
        "learning_rate": 0.01, "max_steps": 110, "lr_scheduler_type": "cosine", "log_completions": False,
    }  # fmt: skip
    return build(
        enumerable(), Few(["ab"]), table_reward, rl=rl | options.pop("rl", {}), lora=LoraOptions(r=8, lora_alpha=16),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.8, 1.5, 2.5])
def test_training_reaches_the_tilted_policy(beta):
    """J(π) = β log Z within 1%, KL(π‖ρ*) at most 0.01 nats."""
    module = enumerable_module(beta)
    start, best, before = exact(module)
    assert before > 0.03 and start < best
    objective, best, distance = exact(fit(module))
    assert distance <= 0.01
    assert abs(objective - best) <= 0.01 * abs(best)


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_every_estimator_of_the_kl_leads_there(estimator):
    module = enumerable_module(1.5, kl_estimator=estimator)
    objective, best, distance = exact(fit(module))
    assert distance <= 0.01
    assert abs(objective - best) <= 0.01 * abs(best)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.8, 1.5, 2.5])
def test_trls_engine_reaches_it_too(beta, tmp_path):
    module = enumerable_module(beta)
    build_trl_trainer(module, tmp_path, save_strategy="no").train()
    objective, best, distance = exact(module)
    assert distance <= 0.01
    assert abs(objective - best) <= 0.01 * abs(best)


# Draws


def test_a_draw_is_whole_groups_with_rewards_by_trls_signature():
    seen: dict[str, Any] = {}

    def reward(**columns: Any) -> list[float | None]:
        seen.update(columns)
        return [float(len(ids)) if index % 4 else None for index, ids in enumerate(columns["completion_ids"])]

    module = build(reward=reward)
    [part] = module.draw(module.data.problems[:2], 0)
    assert part.ids.shape[0] == 8 and len(part.prompts) == 2
    assert seen["prompts"] == ["ba\n"] * 4 + ["dcbaefg\n"] * 4
    assert seen["problem"][3:5] == ["ba", "dcbaefg"] and seen["answer"][0] == "ab"
    assert [len(ids) for ids in seen["completion_ids"]] == part.mask.sum(-1).tolist()
    assert part.total.isnan().tolist() == [True, False, False, False] * 2
    loss, metrics = module.loss(part)
    assert torch.isfinite(loss) and part.advantages is not None and part.advantages[0] == 0.0
    assert metrics["reward"] == pytest.approx(part.total.nanmean().item())


def test_samples_do_not_depend_on_what_is_drawn_beside_them():
    module = build()
    problems = module.data.problems
    prompts = [module.policy.encode_prompt(problem.problem) for problem in problems]
    whole, alone = module.rollout(problems, prompts, 7), module.rollout(problems[2:3], prompts[2:3], 7)
    assert whole.rows()[8:12] == alone.rows()


def test_one_draw_serves_several_steps_and_is_clipped():
    """With num_iterations the ratio leaves 1, and the draw is made once."""
    module = build(
        rl={"num_iterations": 2, "max_steps": 4, "optim": "sgd", "learning_rate": 5.0, "max_grad_norm": 0.0}
    )
    draws: list[int] = []
    draw = module.draw
    module.draw = lambda problems, number: draws.append(number) or draw(problems, number)  # pyright: ignore
    merged: list[dict[str, float]] = []
    loss = module.loss

    def noted(part: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        value, metrics = loss(part)
        merged.append(metrics)
        return value, metrics

    module.loss = noted  # pyright: ignore
    fit(module)
    assert draws == [0, 1]
    assert merged[0]["clip_ratio/region_mean"] == 0.0 and merged[1]["clip_ratio/region_mean"] > 0.0


def searching(**options: Any) -> PolicyAligner:
    """Trained on what ∇-Reasoner finds, by a learned judge."""
    rl = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "report_to": "none"}
    module = PolicyAligner(
        rl=RLConfig(**rl | options.pop("rl", {})),
        lora=LORA,
        **{"rollouts": "search", "nabla": Nabla(max_rollouts=4), **options},
    )  # fmt: skip
    module.use(toy_policy(), Few(), {"reward": toys_hf.reward()})
    return module


EDITS = {"search": "edit_search", "edit_search": EditSearch(temperature=1.0, max_rollouts=3)}


@pytest.mark.parametrize("options", [{}, {"rollouts": "mixed"}, EDITS], ids=["nabla", "mixed", "edit_search"])
def test_decoded_completions_train_as_off_policy_data(options):
    """∇-Reasoner's completions, the same for the same seed; their gradients reach the adapter alone."""
    module = searching(**options)
    [part] = module.draw(module.data.problems[:2], 0)
    assert part.ids.shape[0] == 8 and part.mask.any(-1).all()
    assert not any(weight.grad is not None for weight in module.adapter.parameters())
    assert module.flops > 0
    loss, _ = module.loss(part)
    assert torch.isfinite(gradient(module, loss)).all()
    [again] = module.draw(module.data.problems[:2], 0)
    assert torch.equal(part.ids, again.ids)


def test_mixed_is_half_samples_and_half_found():
    """The first half of each group is what the policy samples, the second what ∇-Reasoner finds."""
    prompts = [toy_policy().encode_prompt(problem.problem) for problem in Few().problems[:2]]
    rows = {
        name: searching(rollouts=name).rollout(Few().problems[:2], prompts, 3).rows()
        for name in ("sample", "search", "mixed")
    }
    for group in (0, 4):
        assert rows["mixed"][group : group + 2] == rows["sample"][group : group + 2]
        assert rows["mixed"][group + 2 : group + 4] == rows["search"][group + 2 : group + 4]
    assert rows["sample"] != rows["search"]


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=["whole", "accumulated"])
@pytest.mark.parametrize("rollouts", ["search", "mixed"])
def test_decoded_completions_train_trls_trainer_to_the_same_adapter(rollouts, more, tmp_path):
    """TRL's GRPOTrainer, fed through its rollout_func, takes this package's RLOO steps."""
    rl = {
        "optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "max_grad_norm": 1.0, "beta": 0.5, "logging_steps": 1
    }  # fmt: skip
    ours, theirs = (searching(rollouts=rollouts, rl=rl | more) for _ in range(2))
    start = weights(ours)
    fit(ours)
    trainer = build_trl_trainer(theirs, tmp_path, save_strategy="no")
    drawn: list[dict[str, Any]] = []
    rollout = trainer.rollout_func
    trainer.rollout_func = lambda prompts, trainer: drawn.append(rollout(prompts, trainer)) or drawn[-1]
    trainer.train()
    assert len(drawn) == 4 and all(draw["logprobs"] is None for draw in drawn)
    assert (weights(ours) - start).norm() > 0.01
    assert (weights(ours) - weights(theirs)).norm() <= 1e-4 * (weights(ours) - start).norm()
    logged = SearchRollouts.plain_metrics(trainer.state.log_history[0])
    assert not any(name.startswith("nabla_") or "return" in name for name in logged)
    assert {"reward", "reward_std", "kl", "kl_sequence", "rewards/judge/mean"} <= logged.keys()
    if not more:
        first = searching(rollouts=rollouts, rl=rl)
        _, metrics = first.loss(first.draw(first.data.training(0, 2), 0)[0])
        for name in ("reward", "rewards/judge/mean", "rewards/judge/std", "kl_sequence", "frac_reward_zero_std"):
            assert logged[name] == pytest.approx(metrics[name], abs=1e-4), name


def test_completions_of_any_law_lead_to_the_tilted_policy():
    """Drawn uniformly, never by the policy, and without weights: what ∇-Reasoner's completions rely on."""
    module = enumerable_module(1.5)
    ids, mask = every_completion()
    ids, mask = ids.repeat(6, 1)[:256], mask.repeat(6, 1)[:256]
    everything = Completions(ids, mask, torch.ones(256).bool())
    module.rollout = lambda problems, prompts, number: everything  # pyright: ignore
    objective, best, distance = exact(fit(module))
    assert distance <= 0.01
    assert abs(objective - best) <= 0.01 * abs(best)


# Interruptions


@pytest.mark.parametrize(
    "rl", [{}, {"num_iterations": 2, "gradient_accumulation_steps": 2}, {"loss_type": "dapo"}], ids=str
)
def test_resumed_is_unbroken_bit_for_bit(rl, tmp_path):
    algorithm = "grpo" if "loss_type" in rl else "rloo"
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(build(algorithm=algorithm, rl=rl), callbacks=[saved])
    for step in (1, 3, 4):
        torch.manual_seed(step)
        again = fit(
            build(algorithm=algorithm, rl=rl), ckpt_path=str(tmp_path / f"step={step}.ckpt"), weights_only=True
        )
        assert torch.equal(weights(whole), weights(again)), step
    assert whole.flops == pytest.approx(again.flops)
    assert whole.num_tokens == again.num_tokens


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    module = fit(build(rl={"max_steps": 1}), callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=1)])
    [file] = tmp_path.glob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert sum(weight.numel() for weight in state.values()) == module.adapter.num_weights


def test_lines_after_the_checkpoint_are_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_steps(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_stops_when_the_kl_is_too_large(tmp_path):
    module = build(stop_at_kl=0.05, rl={"max_steps": 50, "beta": 0.01})
    fit(module)
    assert "KL of" in module.stopped
    assert module.trainer.global_step < 50


def test_a_run_that_stopped_and_was_killed_then_does_not_go_on(tmp_path):
    """The checkpoint of its last step knows that the KL is too large."""
    options: dict[str, Any] = {"stop_at_kl": 0.05, "rl": {"max_steps": 50, "beta": 0.01}}
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(build(**options), callbacks=[saved])
    last = tmp_path / f"step={whole.stopped_at}.ckpt"
    again = fit(build(**options), ckpt_path=str(last), weights_only=True)
    assert torch.equal(weights(whole), weights(again))
    assert (again.stopped, again.stopped_at) == (whole.stopped, whole.stopped_at)


def test_loss_that_is_not_finite_stops_before_it_reaches_the_weights():
    module = build()
    loss, calls = module.loss, []

    def broken(part: MicroBatch) -> Any:
        calls.append(weights(module))
        value, metrics = loss(part)
        return (value * float("nan") if len(calls) == 3 else value), metrics

    module.loss = broken  # pyright: ignore
    with pytest.raises(UserError, match="expected a finite loss, found NaN or infinity at step 3"):
        fit(module)
    assert torch.equal(weights(module), calls[2])
    assert torch.isfinite(weights(module)).all()


def test_rewards_that_are_all_equal_are_said_once(capsys):
    fit(build(reward=lambda completions, **columns: [1.0] * len(completions), rl={"max_steps": 13}))
    said = capsys.readouterr().err
    assert said.count("warning: expected rewards that differ within a group") == 1


# Problems


@pytest.mark.parametrize("parts", [1, 2])
def test_processes_share_a_draw_in_whole_groups(parts):
    """Each problem, with all its completions, is one process's; together they have what one process would draw."""
    sizes = {"num_generations": 4, "gradient_accumulation_steps": parts, "num_iterations": 2}
    one = RLConfig(per_device_train_batch_size=16, **sizes)
    two = dataclasses.replace(one, per_device_train_batch_size=8)
    data = AlignmentData(family="sorting", eval_limit=1)
    ticks = 4 * parts
    alone = itertools.islice(Draws(data, one, start=0), ticks)
    shared = [itertools.islice(Draws(data, two, start=0, rank=r, world_size=2), ticks) for r in (0, 1)]
    for (tick, whole), *mine in zip(alone, *shared, strict=True):
        assert [each for each, _ in mine] == [tick, tick]
        halves = [problems[2 * part :][:2] for part in range(parts) for _, problems in mine]
        assert whole == [problem for half in halves for problem in half] and len(whole) == 4 * parts
        assert all(len(problems) * 4 % two.per_device_train_batch_size == 0 for _, problems in mine)


def test_fresh_problems_depend_on_the_draw_alone_and_are_never_held_out():
    data = AlignmentData(family="sorting", eval_limit=20)
    first = data.training(3, 5)
    assert first == AlignmentData(family="sorting").training(3, 8)[:5]
    held = {problem.answer for problem in data.held_out}
    assert not held & {problem.answer for draw in range(20) for problem in data.training(draw, 5)}


def test_a_file_is_gone_through_in_epochs_and_every_fifth_is_held_out(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(f'{{"id": "{i}", "problem": "ab{chr(97 + i)}", "answer": "x"}}\n' for i in range(10)))
    data = AlignmentData(family="sorting", path=str(file))
    assert [problem.id for problem in data.held_out] == ["4", "9"]
    ids = [problem.id for draw in range(4) for problem in data.training(draw, 4)]
    assert sorted(ids[:8]) == sorted(ids[8:]) == sorted(set("0123456789") - {"4", "9"})
    assert ids[:8] != ids[8:]


def test_evaluation_measures_the_policy_and_its_distance(tmp_path):
    module = build()
    before = module.evaluate(module.data.held_out)
    assert before["kl"] == pytest.approx(0.0, abs=1e-6)
    perturb(module)
    flops = module.flops
    after = module.evaluate(module.data.held_out, batch_size=3)
    assert after["kl"] > 0.05 and module.flops == flops
    assert after["objective"] == pytest.approx(after["reward"] - 0.2 * after["kl"], abs=1e-5)
    for name, value in module.evaluate(module.data.held_out, batch_size=1).items():
        assert value == pytest.approx(after[name], abs=1e-4), name


# Bad input


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"beta": -0.1}, "rl.beta: expected a number of at least 0, found -0.1"),
        ({"per_device_train_batch_size": 10}, "expected whole groups of 8 completions, found 10"),
        ({"num_generations": 1}, "rl.num_generations: expected at least 2, found 1"),
        ({"max_steps": 0}, "rl.max_steps: expected at least 1, found 0"),
        ({"learning_rate": 0.0}, "rl.learning_rate: expected a positive number"),
        ({"top_p": 0.0}, "rl.top_p: expected a number in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        RLConfig(**settings)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"reward_funcs": []}, "reward_funcs: expected at least one"),
        ({"rl": RLConfig(reward_weights=[1.0, 2.0])}, "expected one for each of 1 reward functions, found 2"),
        ({"stop_at_kl": 0.0}, "stop_at_kl: expected a positive number"),
        (
            {"algorithm": "grpo", "kl_estimator": "k1", "rl": RLConfig(use_bias_correction_kl=False)},
            "kl_estimator: expected k3 or exact",
        ),
        ({"rollouts": "search", "algorithm": "grpo"}, "rollouts: expected sample, found search"),
        ({"rollouts": "mixed", "rl": RLConfig(beta=0.0)}, "rollouts: expected sample, found search or mixed"),
        ({"rollouts": "search", "rl": RLConfig(num_iterations=2)}, "rollouts: expected sample"),
        ({"rollouts": "search", "reward_funcs": ["grader"]}, "reward_funcs: expected judge among them"),
        ({"rollouts": "mixed", "stop_at_kl": 1.0}, "stop_at_kl: expected null with"),
        ({"rollouts": "search", "search": "edit_search"}, "search: expected a search whose completions"),
        ({"rl": RLConfig(top_k=50, max_completion_length=6)}, "rl.top_k: expected 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        module = PolicyAligner(**options)
        module.use(toy_policy(), Few(), functions=[early_letters])
        module.draw(Few().problems, 0)


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        (lambda completions, **columns: [0.0], "expected one reward for each of 8 completions, found 1"),
        (lambda completions, **columns: [float("inf")] * len(completions), "expected numbers, found infinity"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(reward, complaint):
    module = build(reward=reward)
    with pytest.raises(UserError, match=complaint):
        module.draw(module.data.problems[:2], 0)


def test_trl_has_its_own_estimators(tmp_path: Path):
    with pytest.raises(UserError, match="expected auto or k1 with `engine` trl, found exact"):
        build_trl_trainer(build(kl_estimator="exact"), tmp_path)
