"""Learning curves of alignment as a study: a folder for every variant and seed, curves, resumption, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nabla_rl.cli import app as cli
from nabla_rl.studies import curves as module
from nabla_rl.studies import trainings
from nabla_rl.studies.base import Design
from nabla_rl.studies.curves import Curves
from nabla_rl.types import UserError
from tests.cli.toys_cli import save_models

VARIANTS = {"small": {"model.rl.learning_rate": 0.001}, "large": {"model.rl.learning_rate": 0.05}}


def fixed(models: Path) -> dict:
    return {
        "data.family": "sorting", "data.eval_limit": 4, "model.policy.name": str(models / "policy"),
        "model.reward.name": str(models / "reward"), "model.gold.name": None, "model.lora.r": 4,
        "model.rl.per_device_train_batch_size": 8, "model.rl.num_generations": 4, "model.rl.max_completion_length": 8,
        "model.rl.gradient_accumulation_steps": 1, "model.rl.max_steps": 2, "model.rl.eval_steps": 1,
        "model.rl.report_to": "none", "model.eval_generations": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict:
    """A finished small study."""
    folder = tmp_path_factory.mktemp("curves")
    models = save_models(folder / "models")
    content = {"study": "curves", "seeds": [0, 3], "fixed": fixed(models), "variants": VARIANTS}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ["--config", str(file), "--run_dir", str(folder / "run")]
    assert cli.ablate(arguments) == 0
    return {"run": folder / "run", "content": content, "arguments": arguments, "models": models}


def test_every_variant_and_seed_is_an_alignment_in_a_folder_of_its_own(study):
    cells = sorted(str(file.parent.relative_to(study["run"])) for file in study["run"].rglob("evaluations.jsonl"))
    assert cells == ["large/seed0", "large/seed3", "small/seed0", "small/seed3"]
    for cell in cells:
        assert (study["run"] / cell / "adapter" / "adapter_config.json").is_file()


def test_curves_are_written(study):
    found = json.loads((study["run"] / "curves.json").read_text())
    assert {row["variant"] for row in found["rows"]} == set(VARIANTS)
    assert all(row["seeds"] == 2 for row in found["rows"])
    assert found["at_equal_flops"]
    for name in ("curves.csv", "curves.svg", "curves.png", "curves.html"):
        assert (study["run"] / name).stat().st_size > 0
    assert not (study["run"] / "results.jsonl").exists()


def test_a_finished_study_trains_nothing_anew(study, monkeypatch, capsys):
    monkeypatch.setattr(trainings.alignment, "train", lambda *_, **__: pytest.fail("trained"))
    assert cli.ablate(study["arguments"]) == 0
    assert "4 held-out problems (sorting), seeds 0, 3" in capsys.readouterr().out


def test_an_interrupted_study_shows_what_is_finished_and_resumes(study, tmp_path, monkeypatch, capsys):
    train, calls = module.train, []

    def interrupted(command, options, **more):
        calls.append(more["folder"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(command, options, **more)

    monkeypatch.setattr(module, "train", interrupted)
    arguments = [*study["arguments"][:2], "--run_dir", str(tmp_path / "run")]
    assert cli.ablate(arguments) == 130
    found = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert {(row["variant"], row["seeds"]) for row in found["rows"]} == {("small", 1)}
    kept = (tmp_path / "run" / "small" / "seed0" / "summary.json").read_bytes()
    assert cli.ablate(arguments) == 0
    assert (tmp_path / "run" / "small" / "seed0" / "summary.json").read_bytes() == kept
    assert len(list((tmp_path / "run").rglob("summary.json"))) == 4


def test_other_options_under_a_finished_variant_are_refused(study, tmp_path, capsys):
    content = {**study["content"], "variants": {"small": {"model.rl.learning_rate": 0.5}}}
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(content))
    assert cli.ablate(["--config", str(file), "--run_dir", str(study["run"])]) == 2
    error = capsys.readouterr().err
    assert "--run_dir: expected" in error and "model.rl.learning_rate = 0.001 there and 0.5 now" in error


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ({}, "variants: expected labels and their options for a curves study"),
        ({"a/b": {}}, "variants: expected labels of letters"),
        ({"a": {"model.rl.bta": 1.0}}, "variants.a.model.rl.bta: expected an option of align, .* model.rl.beta"),
        ({"a": {"model.rl.beta": -1.0}}, "variants.a.model.rl.beta: expected"),
        ({"a": {"teacher.beta": 1.0}}, "variants.a.teacher.beta: expected an option of align"),
        ({"a": {"model.rollouts": "search", "model.search": "edit_search"}},
         "variants.a.model.search: expected a search"),
        ({"a": {"beta": 1.0}}, "variants.a.beta: expected a dotted option"),
    ],
)  # fmt: skip
def test_bad_variants_are_named_before_anything_is_trained(variants, said):
    with pytest.raises(UserError, match=said):
        Curves(Design([0], {}, {}, variants))
