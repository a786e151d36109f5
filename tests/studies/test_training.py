"""Studies of training: the commands that points become, what is shared between them, and what a table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nabla_rl.cli import app as cli
from nabla_rl.studies.base import Design, Point
from nabla_rl.studies.training import DistillGrid, compared, figures
from nabla_rl.types import UserError
from tests.cli.toys_cli import read_results, save_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def row(right: str, before: str = "0000", teacher: str = "1111", **more: Any) -> dict[str, Any]:
    """Of four problems, 1 where an answer is right."""
    texts = {"right": right, "before": before, "teacher": teacher}
    return {name: {str(n): each == "1" for n, each in enumerate(text)} for name, text in texts.items()} | more


def test_a_problem_counts_once_whatever_the_number_of_seeds():
    line = figures([row("1100", crossing=10.0), row("1000", crossing=30.0)])
    assert line["accuracy"] == 0.375 and line["problems"] == 4 and line["seeds"] == 2 and line["crossing"] == 20.0
    assert line["accuracy_low"] <= 0.375 <= line["accuracy_high"]
    assert line["step"] is None  # alignment keeps no best step


def test_the_difference_is_that_of_the_same_problems():
    line = compared([row("1110")], [row("1000")], same=False)
    assert line["difference"] == 0.5 and line["difference_low"] >= 0.0
    assert "difference" not in compared([row("1110")], [row("1110")], same=True)


def test_the_recovered_share_is_of_the_references_gain():
    line = compared(
        [row("1110", before="1111", teacher="1111")], [row("0000", before="1000", teacher="1111")], same=False
    )
    assert line["before"] == 0.25 and line["teacher"] == 1.0
    assert line["recovered"] == pytest.approx((0.75 - 0.25) / 0.75)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The folder of a small study: two ways that share their data, the twin, and alignment."""
    folder = tmp_path_factory.mktemp("study")
    models = save_models(folder / "models")
    policy = {"model.policy.name": str(models / "policy"), "model.lora.r": 4, "model.lora.lora_alpha": 8}
    content = {
        "study": "distill",
        "seeds": [0, 1],
        "fixed": {
            **policy, "data.family": "sorting", "data.limit": 70, "data.eval_limit": 4, "data.validation_limit": 3,
            "data.problem_seed": 5, "data.filters.min_reward": -100, "teacher.policy.name": str(models / "policy"),
            "teacher.reward.name": str(models / "reward"), "teacher.gold.name": None,
            "teacher.sampling.max_new_tokens": 8, "teacher.edit_search.max_rollouts": 2,
            "model.training.per_device_train_batch_size": 8, "model.training.max_steps": 2,
            "model.training.report_to": "none",
        },
        "variants": {
            "sft": {},
            "weighted": {"data_of": "sft", "model.method": "weighted"},
            "twin": {"teacher.decoders": ["best_of_n"], "teacher.best_of_n.n": 2},
            "align": {
                **policy, "command": "align", "against": "weighted", "model.reward.name": str(models / "reward"),
                "model.gold.name": None, "model.rl.max_steps": 1, "model.rl.per_device_train_batch_size": 8,
                "model.rl.max_completion_length": 8, "model.rl.report_to": "none",
            },
        },
    }  # fmt: skip
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert cli.ablate(["--config", str(file), "--run_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_every_point_is_a_run_of_its_command(study):
    found = {line["id"]: line for line in read_results(study)}
    assert len(found) == 8
    for name, line in found.items():
        assert (study / "points" / name / "adapter" / "adapter_config.json").is_file()
        answers = read_results(study / "points" / name / "eval" / "student")
        assert line["right"] == {answer["id"]: answer["correct"] for answer in answers} and len(answers) == 4
        assert line["training_flops"] > 0


def test_ways_with_the_same_teacher_share_what_it_decoded(study):
    for seed in (0, 1):
        first, second = (study / "points" / Point({"variant": v}, seed).id for v in ("sft", "weighted"))
        assert not (second / "data" / "decode").exists()
        made = [json.loads((folder / "data" / "made.json").read_text()) for folder in (first, second)]
        assert made[0]["decode_flops"] == made[1]["decode_flops"] > 0
        assert read_results(first / "eval" / "teacher") == read_results(second / "eval" / "teacher")


def test_all_variants_answer_the_same_held_out_problems(study):
    found = read_results(study)
    assert len({tuple(sorted(line["right"])) for line in found}) == 1
    assert all("sorting-test-5-" in problem for line in found for problem in line["right"])


def test_the_table_has_a_line_for_each_variant(study, capsys):
    table = json.loads((study / "table.json").read_text())
    assert [line["variant"] for line in table] == ["sft", "weighted", "twin", "align"]
    assert all(line["seeds"] == 2 and line["problems"] == 4 for line in table)
    assert [("difference" in line and line["difference"] is not None) for line in table] == [False, True, True, True]
    assert table[3]["data_flops"] == 0.0


@pytest.mark.parametrize(
    ("variants", "fixed", "said"),
    [
        ({}, {}, "grid: expected none with a distill study"),
        ({"a": {"command": "decode"}}, {}, "variants.a.command: expected one of align, distill, found 'decode'"),
        ({"a": {}, "b": {"against": "c"}}, {}, "variants.b.against: expected one of a, b, found 'c'"),
        ({"a": {"data_of": "b"}, "b": {}}, {}, "variants.a.data_of: expected none for the first variant, found 'b'"),
        ({"a": {"teacher.beta": 1.0, "command": "align"}}, {}, "variants.a.teacher.beta: expected an option of align"),
        ({"a": {}}, {"beta": 1.0}, "fixed.beta: expected a dotted option of distill"),
        (
            {"a": {"model.training.max_stps": 3}},
            {},
            "variants.a.model.training.max_stps: expected an option",
        ),
        ({"a": {"model.training.max_steps": "x"}}, {}, "variants.a.model.training.max_steps: expected a whole number"),
        ({"a": {"model.training.max_steps": 0}}, {}, "variants.a.model.training.max_steps: expected at least 1"),
        ({"a": {"againts": "a"}}, {}, "variants.a.againts: expected one of .* Did you mean against?"),
    ],
)
def test_bad_variants_are_named(variants, fixed, said):
    with pytest.raises(UserError, match=said):
        DistillGrid(Design([0], {}, fixed, variants))
