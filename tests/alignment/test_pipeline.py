"""`align` as Python calls it: loaded models or their names, problems of every form, resumed runs, refused input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import nabla_rl as nr
from nabla_rl.adapters.snapshots import AdapterSnapshots, snapshot_folder
from nabla_rl.alignment.config import RLConfig
from nabla_rl.alignment.pipeline import Alignment, align
from nabla_rl.cli import app as cli
from nabla_rl.data.problems import Problem, grade_exact
from nabla_rl.models.adapters import LoraOptions
from nabla_rl.models.loading import PolicyOptions
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward
from tests import toys_hf
from tests.cli.toys_cli import save_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROBLEMS = toys_hf.problems(10)
RL = RLConfig(
    num_generations=4, per_device_train_batch_size=8, max_steps=4, max_completion_length=6, learning_rate=0.01,
    save_steps=1, report_to="none",
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "rl": RL, "lora": LoraOptions(r=4, lora_alpha=8), "eval_generations": 2, "grade": grade_exact,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def loaded(models: Path) -> tuple[Policy, AbstractReward]:
    reward = nr.load_reward(str(models / "reward"))
    assert reward is not None
    return nr.load_policy(str(models / "policy")), reward


def weights(done: Alignment) -> dict[str, torch.Tensor]:
    return load_file(done.adapter / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def figures(done: Alignment) -> dict[str, Any]:
    return {when: done.summary[when] for when in ("before", "after")}


@pytest.fixture(scope="module")
def named(models, tmp_path_factory) -> Alignment:
    """An alignment whose models are given by their folders. Not to be written to."""
    folder = tmp_path_factory.mktemp("named") / "run"
    return align(str(models / "policy"), str(models / "reward"), PROBLEMS, folder=folder, **OPTIONS)


def test_a_run_leaves_an_adapter_its_card_and_its_summary(named, models):
    assert named.adapter == named.folder / "adapter"
    assert json.loads((named.folder / "summary.json").read_text()) == named.summary
    assert named.summary["before"]["kl"] < 1e-6 < named.summary["after"]["kl"]
    card = (named.adapter / "README.md").read_text()
    assert f"base_model: {models / 'policy'}" in card and "problems of the caller; held out: 2 problems" in card
    assert json.loads((named.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        models / "policy"
    )


def test_decoding_takes_the_adapter(named, models):
    policy = nr.load_policy(str(models / "policy"), adapter=str(named.adapter))
    assert nr.decode("dcba", policy, decoder="greedy", sampling=nr.Sampling(0.0, max_new_tokens=4))[0].text


def test_loaded_models_train_as_named_ones_do(named, models, tmp_path):
    policy, reward = loaded(models)
    done = nr.align(policy, reward, PROBLEMS, folder=tmp_path, **OPTIONS)
    assert same(weights(done), weights(named)) and figures(done) == figures(named)


def test_a_loaded_policy_is_left_as_it_was(models, tmp_path):
    policy, reward = loaded(models)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    flops = policy.backbone.formula
    first, second = (
        align(policy, reward, PROBLEMS, folder=tmp_path / name, **OPTIONS) for name in ("first", "second")
    )
    assert same(policy.state_dict(), before) and policy.backbone.formula == flops
    assert same(weights(first), weights(second))


def test_problems_may_be_a_file_texts_or_objects(named, models, tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer} for p in PROBLEMS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = str(models / "policy"), str(models / "reward")
    assert same(weights(align(*names, file, folder=tmp_path / "file", **OPTIONS)), weights(named))
    texts = align(*names, [p.problem for p in PROBLEMS], held_out=["ba", "cab"], folder=tmp_path / "texts", **OPTIONS)
    assert texts.summary["before"]["problems"] == 2 and texts.summary["before"]["accuracy"] is None


def test_the_command_line_trains_the_same_adapter(named, models, tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer} for p in PROBLEMS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {
        "data.family": "sorting", "data.path": file, "data.answers": "exact", "model.policy.name": models / "policy",
        "model.reward.name": models / "reward", "model.gold.name": "null", "model.eval_generations": 2,
        "model.lora.r": 4, "model.lora.lora_alpha": 8, "run_dir": tmp_path / "run",
    }  # fmt: skip
    given |= {
        f"model.rl.{name}": getattr(RL, name)
        for name in "num_generations per_device_train_batch_size max_steps max_completion_length learning_rate "
        "save_steps report_to beta gradient_accumulation_steps temperature lr_scheduler_type".split()
    }
    assert cli.align([text for name, value in given.items() for text in (f"--{name}", str(value))]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    run = Alignment(tmp_path / "run" / "adapter", summary, tmp_path / "run")
    assert same(weights(run), weights(named)) and figures(run) == figures(named)


class StopAt(L.Callback):
    """Interrupts a training after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("as_object", [False, True], ids=["names", "objects"])
def test_the_same_call_resumes(named, models, tmp_path, as_object):
    given = loaded(models) if as_object else (str(models / "policy"), str(models / "reward"))
    with pytest.raises(KeyboardInterrupt):
        align(*given, PROBLEMS, folder=tmp_path, callbacks=[StopAt(2)], **OPTIONS)
    done = align(*given, PROBLEMS, folder=tmp_path, **OPTIONS)
    assert same(weights(done), weights(named)) and figures(done) == figures(named)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_finished_run_is_returned_as_it_is(named, models):
    stamp = (named.folder / "summary.json").stat().st_mtime_ns
    again = align(str(models / "policy"), str(models / "reward"), PROBLEMS, folder=named.folder, **OPTIONS)
    assert again == named and (named.folder / "summary.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 2.0},
        {"problems": [Problem("p0", "zz", "zz"), *PROBLEMS[1:]]},
        {"held_out": ["ba"]},
        {"gold": "gold"},
        {"stop_at_kl": 9.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_folder_of_other_settings_is_refused(named, models, changes):
    if "gold" in changes:
        changes = {"gold": str(models / "gold")}
    given = {"problems": PROBLEMS, **OPTIONS, **changes}
    complaint = f"run_dir: expected .* to hold this configuration, found .*{next(iter(changes))}"
    with pytest.raises(nr.UserError, match=complaint):
        align(str(models / "policy"), str(models / "reward"), folder=named.folder, **given)


def short(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def test_reward_functions_may_be_functions(models, tmp_path):
    done = align(str(models / "policy"), None, PROBLEMS, folder=tmp_path, reward_funcs=["grader", short], **OPTIONS)
    assert {"rewards/grader", "rewards/short"} <= set(done.summary["after"])


def test_an_embedded_policy_brings_its_problems(tmp_path):
    rl = RLConfig(
        num_generations=2, per_device_train_batch_size=4, max_steps=1, max_completion_length=20, report_to="none",
        learning_rate=0.01,
    )  # fmt: skip
    options = {"rl": rl, "eval_limit": 16, "eval_generations": 1}
    named = align("sorting/tiny-policy", "sorting/tiny-reward", folder=tmp_path / "named", **options)
    policy, reward = nr.load_policy("sorting/tiny-policy"), nr.load_reward("sorting/tiny-reward")
    assert same(weights(named), weights(align(policy, reward, folder=tmp_path / "loaded", **options)))
    assert named.summary["before"]["accuracy"] > 0


def test_searched_completions_and_snapshots(models, tmp_path):
    search = nr.EditSearch(temperature=1.0, max_rollouts=3)
    done = align(
        str(models / "policy"), str(models / "reward"), PROBLEMS, folder=tmp_path, rollouts="mixed", search=search,
        callbacks=[AdapterSnapshots([2])], progress=True, **OPTIONS,
    )  # fmt: skip
    assert (snapshot_folder(tmp_path, 2) / "adapter_model.safetensors").is_file()
    assert done.summary["steps"] == 4


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"problems": None}, "problems: expected problems to train on, found none"),
        ({"problems": ["ba", ""]}, "problems: expected texts that are not empty"),
        ({"held_out": []}, "held_out: expected at least one problem"),
        ({"problems": ["a", "b"]}, "problems: expected at least 5 problems to hold some out, found 2"),
        ({"reward": None, "reward_funcs": ["judge"]}, "reward.name: expected a reward model for judge, found none"),
        ({"policy": PolicyOptions("there", adapter="old")}, "policy.adapter: expected none"),
        ({"policy": "nowhere"}, "policy.name: expected a folder, a Hub name or an embedded model"),
        ({"rollouts": "search"}, "rollouts: expected sample, found search or mixed"),
        ({"rollouts": "search", "search": nr.EditSearch(), "rl": RL}, "search: expected a search whose completions"),
        ({"beta": -1.0}, "rl.beta: expected a number of at least 0, found -1.0"),
        ({"problems": [Problem("1", "abc" * 40)] * 1, "held_out": ["abc" * 40]}, "problem '1': expected prompt and"),
    ],
)
def test_what_cannot_be_used_is_refused(models, tmp_path, changes, complaint):
    given = {"policy": str(models / "policy"), "reward": str(models / "reward"), "problems": PROBLEMS, **OPTIONS}
    given |= changes
    if changes == {"rollouts": "search"}:
        given["algorithm"] = "grpo"
    with pytest.raises(nr.UserError) as caught:
        align(given.pop("policy"), given.pop("reward"), given.pop("problems"), folder=tmp_path / "run", **given)
    assert str(caught.value).startswith(complaint)
