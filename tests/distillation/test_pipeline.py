"""`distill` as Python calls it: answers or problems, loaded models or their names, resumed runs, refused input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import nabla_rl as nr
from nabla_rl.cli import app as cli
from nabla_rl.data.problems import Problem, grade_exact
from nabla_rl.distillation.config import DistillConfig
from nabla_rl.distillation.pipeline import Distilled, distill
from nabla_rl.distillation.rows import Filters
from nabla_rl.models.adapters import LoraOptions
from nabla_rl.models.loading import PolicyOptions
from tests import toys_hf
from tests.cli.toys_cli import save_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROBLEMS = toys_hf.problems(30)
SEARCH = nr.EditSearch(max_rollouts=3, min_drop=0.0)
TRAINING = DistillConfig(
    per_device_train_batch_size=8, max_steps=4, learning_rate=0.01, save_steps=1, eval_steps=2, report_to="none"
)
LEARNING: dict[str, Any] = {
    "training": TRAINING, "lora": LoraOptions(r=4, lora_alpha=8), "filters": Filters(accept=[]), "grade": grade_exact,
}  # fmt: skip
SAMPLING = nr.Sampling(1.0, max_new_tokens=8)
TEACHING: dict[str, Any] = {"decoder": SEARCH, "sampling": SAMPLING, **LEARNING}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def names(models: Path) -> dict[str, Any]:
    return {"policy": str(models / "policy"), "reward": str(models / "reward")}


def loaded(models: Path) -> dict[str, Any]:
    return {"policy": nr.load_policy(str(models / "policy")), "reward": nr.load_reward(str(models / "reward"))}


def weights(done: Distilled) -> dict[str, torch.Tensor]:
    return load_file(done.adapter / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def figures(done: Distilled) -> dict[str, Any]:
    """Held-out figures without what the clock says."""
    return {
        who: {name: value for name, value in row.items() if name != "seconds"}
        for who, row in done.summary["figures"].items()
    }


@pytest.fixture(scope="module")
def named(models, tmp_path_factory) -> Distilled:
    """A distillation of problems whose models are given by their folders. Not to be written to."""
    folder = tmp_path_factory.mktemp("named") / "run"
    return distill(PROBLEMS, str(models / "policy"), folder=folder, **names(models), **TEACHING)


@pytest.fixture(scope="module")
def answers(models) -> list[nr.Decoded]:
    return nr.decode(PROBLEMS, **names(models), decoder=SEARCH, sampling=SAMPLING, grade=grade_exact)


@pytest.fixture(scope="module")
def learned(models, answers, tmp_path_factory) -> Distilled:
    """A distillation of answers. Not to be written to."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    return distill(answers, str(models / "policy"), folder=folder, sampling=SAMPLING, **LEARNING)


def test_a_run_leaves_an_adapter_its_card_and_its_summary(named, models):
    assert named.adapter == named.folder / "adapter"
    assert json.loads((named.folder / "summary.json").read_text()) == named.summary
    assert set(figures(named)) == {"teacher_greedy", "teacher", "before", "after"}
    assert named.summary["teacher"] == {"policy": str(models / "policy"), "decoder": "edit_search"}
    assert named.summary["problems"] == 6 and named.summary["data"]["counts"]["kept"] <= 24
    card = (named.adapter / "README.md").read_text()
    assert f"base_model: {models / 'policy'}" in card and "24 decoded of the caller's problems" in card
    config = json.loads((named.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models / "policy")


def test_decoding_takes_the_adapter(named, models):
    policy = nr.load_policy(str(models / "policy"), adapter=str(named.adapter))
    found = nr.decode(PROBLEMS[4::5], policy, decoder="greedy", sampling=nr.Sampling(0.0, max_new_tokens=8))
    rows = [json.loads(line) for line in (named.folder / "eval" / "student" / "results.jsonl").open()]
    assert [answer.text for answer in found] == [row["completion"] for row in rows]


def test_loaded_models_teach_and_learn_as_named_ones_do(named, models, tmp_path):
    given = loaded(models)
    done = nr.distill(PROBLEMS, nr.load_policy(str(models / "policy")), folder=tmp_path, **given, **TEACHING)
    assert same(weights(done), weights(named)) and figures(done) == figures(named)


def test_the_teachers_policy_may_be_the_student_and_stays_as_it_was(named, models, tmp_path):
    given = loaded(models)
    before = {name: weight.clone() for name, weight in given["policy"].state_dict().items()}
    done = distill(PROBLEMS, given["policy"], folder=tmp_path, **given, **TEACHING)
    assert same(given["policy"].state_dict(), before)
    assert same(weights(done), weights(named)) and figures(done) == figures(named)


def test_answers_teach_as_their_decoder_does(named, learned):
    assert same(weights(learned), weights(named))
    of = {who: {**row, "reward": None} for who, row in figures(named).items()}
    assert figures(learned) == {who: of[who] for who in ("before", "after")}
    assert learned.summary["teacher"] is None and learned.summary["amortisation"] is None
    assert "on given answers." in (learned.adapter / "README.md").read_text()


def test_answers_say_whether_they_are_right(learned, answers):
    right = [grade_exact(answer.text, answer.problem.answer) for answer in answers]
    assert learned.summary["data"]["accuracy"] == sum(right) / len(right)
    assert learned.summary["data"]["decode_flops"] == sum(answer.cost.flops for answer in answers)


@pytest.mark.parametrize("form", ["folder", "path", "file", "list"])
def test_answers_may_be_a_decode_run(learned, models, tmp_path, form):
    run = tmp_path / "decoded"
    nr.decode(PROBLEMS, **names(models), decoder=SEARCH, sampling=SAMPLING, grade=grade_exact, run_dir=run)
    given = {"folder": str(run), "path": run, "file": run / "results.jsonl", "list": [run]}[form]
    done = distill(given, str(models / "policy"), folder=tmp_path / "run", sampling=SAMPLING, **LEARNING)
    assert same(weights(done), weights(learned)) and figures(done) == figures(learned)


def test_answers_with_their_teacher_compare_the_two(named, models, answers, tmp_path):
    done = distill(answers, str(models / "policy"), folder=tmp_path, **names(models), **TEACHING)
    assert same(weights(done), weights(named)) and figures(done) == figures(named)
    assert not (tmp_path / "data" / "decode").exists() and (tmp_path / "amortisation.svg").is_file()


def test_the_command_line_trains_the_same_adapter(named, models, tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer} for p in PROBLEMS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {
        "data.family": "sorting", "data.path": file, "data.answers": "exact", "data.validation_limit": 0,
        "data.filters.accept": "[]", "teacher.policy.name": models / "policy", "run_dir": tmp_path / "run",
        "teacher.reward.name": models / "reward", "teacher.gold.name": "null", "teacher.beta": 1.0,
        "teacher.edit_search.max_rollouts": 3, "teacher.edit_search.min_drop": 0.0,
        "teacher.sampling.temperature": 1.0, "teacher.sampling.max_new_tokens": 8,
        "model.policy.name": models / "policy", "model.lora.r": 4, "model.lora.lora_alpha": 8,
    }  # fmt: skip
    given |= {
        f"model.training.{name}": getattr(TRAINING, name)
        for name in "per_device_train_batch_size max_steps learning_rate save_steps eval_steps report_to "
        "gradient_accumulation_steps lr_scheduler_type".split()
    }
    assert cli.distill([text for name, value in given.items() for text in (f"--{name}", str(value))]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    run = Distilled(tmp_path / "run" / "adapter", summary, tmp_path / "run")
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
    given = loaded(models) if as_object else names(models)
    student = given["policy"]
    with pytest.raises(KeyboardInterrupt):
        distill(PROBLEMS, student, folder=tmp_path, callbacks=[StopAt(2)], **given, **TEACHING)
    made = (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns
    done = distill(PROBLEMS, student, folder=tmp_path, **given, **TEACHING)
    assert (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns == made
    assert same(weights(done), weights(named)) and figures(done) == figures(named)


def test_a_finished_run_is_returned_as_it_is(named, models):
    stamp = (named.folder / "summary.json").stat().st_mtime_ns
    again = distill(PROBLEMS, str(models / "policy"), folder=named.folder, **names(models), **TEACHING)
    assert again == named and (named.folder / "summary.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 2.0}, {"answers": [*PROBLEMS[:29], Problem("p29", "zz", "zz")]}, {"decoder": nr.EditSearch()},
        {"method": "weighted"}, {"sampling": nr.Sampling(0.5, max_new_tokens=8)}, {"validation": ["ba"]},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused(named, models, changes):
    given = {"answers": PROBLEMS, "student": str(models / "policy"), **names(models), **TEACHING, **changes}
    with pytest.raises(nr.UserError, match="run_dir: expected .* to hold this configuration"):
        distill(folder=named.folder, **given)


def test_weights_follow_the_beta_that_is_given(models, answers, tmp_path):
    for beta in (0.5, 2.0):
        distill(
            answers, str(models / "policy"), folder=tmp_path / str(beta), beta=beta, method="weighted",
            sampling=SAMPLING, **LEARNING,
        )  # fmt: skip
    rows = [
        [json.loads(line)["weight"] for line in (tmp_path / name / "data" / "train.jsonl").open()]
        for name in ("0.5", "2.0")
    ]
    assert rows[0] != rows[1]


def test_soft_targets_of_answers_and_the_best_weights(models, answers, tmp_path):
    done = distill(
        answers, str(models / "policy"), folder=tmp_path, method="soft", validation=PROBLEMS[4::5], progress=True,
        **names(models), **TEACHING,
    )  # fmt: skip
    assert done.summary["training"]["best_step"] in (2, 4) and done.summary["data"]["target_flops"] > 0


def test_preferences_of_answers(models, tmp_path):
    drawn = nr.decode(PROBLEMS, **names(models), decoder=nr.BestOfN(6), sampling=SAMPLING)
    done = distill(
        drawn, str(models / "policy"), folder=tmp_path, method="preference", sampling=SAMPLING, **LEARNING
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").open()]
    assert len(rows) == done.summary["data"]["counts"]["kept"] > 0 and {"chosen", "rejected"} < set(rows[0])


def test_filters_by_default_ask_for_a_reward_where_there_is_one(models, tmp_path):
    options = {**LEARNING, "filters": None, "sampling": SAMPLING}
    drawn = nr.decode(PROBLEMS, names(models)["policy"], decoder="sample", sampling=SAMPLING)
    done = distill(drawn, str(models / "policy"), folder=tmp_path, **options)
    assert "reward" not in done.summary["data"]["counts"]


def test_an_embedded_student_learns_from_an_embedded_teacher(tmp_path):
    problems = [Problem(str(i), text) for i, text in enumerate(("dcba", "zyx", "hgfe", "ponm", "cab", "tsr", "vu"))]
    policy, reward = nr.load_policy("sorting/tiny-policy"), nr.load_reward("sorting/tiny-reward")
    done = distill(
        problems, "sorting/tiny-student", folder=tmp_path, policy=policy, reward=reward, decoder="greedy",
        training=TRAINING, filters=Filters(accept=[]),
    )  # fmt: skip
    assert done.summary["teacher"]["policy"] == "sorting/tiny-policy"
    assert done.summary["student"] == "sorting/tiny-student"
    assert done.summary["figures"]["after"]["accuracy"] is None  # no answer is known


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"policy": None}, "policy: expected a policy that answers the problems, or answers in their place"),
        ({"answers": []}, "problems: expected at least one problem, found none"),
        ({"answers": PROBLEMS[:3]}, "problems: expected at least 5 problems to hold some out, found 3"),
        ({"student": PolicyOptions("there", adapter="old")}, "policy.adapter: expected none"),
        ({"student": "nowhere"}, "student.name: expected a folder, a Hub name or an embedded model"),
        ({"policy": "nowhere"}, "policy.name: expected a folder, a Hub name or an embedded model"),
        ({"reward": None}, "reward.name: expected a reward model for edit_search"),
        ({"validation": [""]}, "validation: expected texts that are not empty"),
        ({"beta": 0.0}, "beta: expected a positive number, found 0.0"),
        ({"max_completion_length": 0}, "max_completion_length: expected at least 1"),
        ({"filters": Filters(accept=["verifier"])}, "data: expected answers to learn from, found none of 24 left"),
        ({"decoder": "no_such"}, "decoder: expected"),
    ],
)
def test_what_cannot_be_used_is_refused(models, tmp_path, changes, complaint):
    given = {"answers": PROBLEMS, "student": str(models / "policy"), **names(models), **TEACHING, **changes}
    with pytest.raises(nr.UserError) as caught:
        distill(folder=tmp_path / "run", **given)
    assert str(caught.value).startswith(complaint)


def test_soft_targets_need_a_teacher(models, answers, tmp_path):
    with pytest.raises(nr.UserError, match="^method: expected sft, preference or weighted without a teacher"):
        distill(answers, str(models / "policy"), folder=tmp_path, method="soft", **LEARNING)
