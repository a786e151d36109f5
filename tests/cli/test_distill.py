"""The distill command: what a run leaves behind, that it can be killed at any stage, both engines, bad input."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nabla_rl.cli import app as cli
from nabla_rl.data.problems import Problem
from nabla_rl.distillation.data import DistillationData
from nabla_rl.report.amortisation import amortise, recovered_share
from tests import toys_hf
from tests.cli.toys_cli import ROOT, save, save_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def options(models: Path, run_dir: Path, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "data.family": "sorting", "data.limit": 80, "data.eval_limit": 4, "data.validation_limit": 3,
        "data.filters.min_reward": -100, "teacher.policy.name": models / "policy",
        "teacher.reward.name": models / "reward", "teacher.gold.name": models / "gold",
        "data.answers": "exact", "teacher.sampling.max_new_tokens": 8, "teacher.sampling.temperature": 1.0,
        "teacher.beta": 1.0, "teacher.edit_search.min_drop": 0.0, "teacher.edit_search.max_rollouts": 3,
        "model.training.gradient_accumulation_steps": 1, "model.policy.name": models / "policy",
        "model.training.per_device_train_batch_size": 8, "model.training.max_steps": 6,
        "model.training.learning_rate": 0.01, "model.training.save_steps": 1, "model.training.eval_steps": 3,
        "model.lora.r": 4, "model.lora.lora_alpha": 8, "run_dir": run_dir,
    }  # fmt: skip
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "distill.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.distill(options(models, run_dir)) == 0
    return run_dir


def test_the_folder_has_everything(whole):
    expected = "config.yaml data metrics.jsonl checkpoints adapter eval summary.json amortisation.svg amortisation.png"
    assert set(expected.split()) <= set(os.listdir(whole))
    assert {"train.jsonl", "dataset", "decode", "made.json"} <= set(os.listdir(whole / "data"))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [3, 6]
    assert all(isinstance(line[name], float) for line in lines for name in ("loss", "grad_norm", "entropy", "flops"))
    card = (whole / "adapter" / "README.md").read_text()
    for said in ("library_name: peft", "80 decoded", "pays for itself", "| teacher greedy |", "peft 0"):
        assert said in card, said


def test_the_summary_has_figures_costs_and_the_crossing(whole):
    summary = summary_of(whole)
    assert set(summary["figures"]) == {"teacher_greedy", "teacher", "before", "after"}
    assert all(isinstance(row["accuracy"], float) for row in summary["figures"].values())
    made, cost = summary["data"], summary["amortisation"]
    assert made["counts"]["read"] == 80 and 0 < made["counts"]["kept"] <= 80
    total = made["decode_flops"] + made["target_flops"] + summary["training"]["flops"]
    assert cost["fixed_flops"] == total > 0
    assert cost["curve"][0]["questions"] == 1.0 and cost["teacher_flops"] > cost["student_flops"] > 0
    assert {"after - before", "after - teacher", "recovered"} <= set(summary["comparisons"])
    lines = (whole / "data" / "decode" / "results.jsonl").read_text().splitlines()
    assert made["decode_flops"] == pytest.approx(sum(json.loads(line)["cost"]["flops"] for line in lines))


def test_nothing_held_out_is_learned_from(whole):
    trained = {json.loads(line)["prompt"] for line in (whole / "data" / "train.jsonl").read_text().splitlines()}
    tested = {
        json.loads(line)["prompt"] for line in (whole / "eval" / "student" / "results.jsonl").read_text().splitlines()
    }
    assert trained and tested and not trained & tested


def test_a_finished_run_is_shown_again(whole, models, capsys):
    before = (whole / "summary.json").stat().st_mtime_ns
    assert cli.distill(options(models, whole)) == 0
    assert "finished" in capsys.readouterr().out
    assert (whole / "summary.json").stat().st_mtime_ns == before


def test_decode_takes_the_adapter(whole, models, tmp_path):
    arguments = {
        "data.family": "sorting", "data.limit": 4, "model.policy.name": models / "policy",
        "model.policy.adapter": whole / "adapter", "model.reward.name": models / "reward",
        "model.gold.name": "null", "model.decoders": "[greedy]", "model.sampling.max_new_tokens": 8,
        "run_dir": tmp_path / "run",
    }  # fmt: skip
    assert cli.decode([text for name, value in arguments.items() for text in (f"--{name}", str(value))]) == 0
    ours = [json.loads(line)["completion"] for line in (tmp_path / "run" / "results.jsonl").open()]
    kept = [json.loads(line)["completion"] for line in (whole / "eval" / "student" / "results.jsonl").open()]
    assert ours == kept


def test_killed_at_every_stage_and_continued_is_unbroken_bit_for_bit(whole, models, tmp_path):
    """Half of the decoding is there, its last line cut short; then the training is killed; then it goes on."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole / "data" / "decode", run_dir / "data" / "decode")
    shutil.copy(whole / "config.yaml", run_dir)
    file = run_dir / "data" / "decode" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:64]) + lines[64][:100])
    process = start(options(models, run_dir))
    deadline = time.monotonic() + 120
    while not list((run_dir / "checkpoints").glob("*.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "summary.json").exists()
    assert [line.split('"seconds"')[0] for line in file.read_text().splitlines()][:64] == [
        line.split('"seconds"')[0] for line in lines[:64]
    ]
    assert cli.distill(options(models, run_dir)) == 0
    assert (run_dir / "data" / "train.jsonl").read_bytes() == (whole / "data" / "train.jsonl").read_bytes()
    ours, theirs = adapter(run_dir), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("amortisation", "comparisons"):
        assert summary_of(run_dir)[name] == summary_of(whole)[name]


def test_killed_while_it_measures_it_neither_learns_nor_answers_again(whole, models, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "summary.json").unlink()
    file = run_dir / "eval" / "student" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:50])
    assert cli.distill(options(models, run_dir)) == 0
    assert file.read_text().splitlines(keepends=True)[:2] == lines[:2]
    assert all(torch.equal(weight, adapter(whole)[name]) for name, weight in adapter(run_dir).items())
    assert (run_dir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    for name in ("amortisation", "comparisons"):
        assert summary_of(run_dir)[name] == summary_of(whole)[name]


def test_two_processes_learn_as_one_with_the_same_global_batch(whole, models, tmp_path):
    run_dir = tmp_path / "run"
    changes = {
        "model.training.per_device_train_batch_size": 4, "trainer.devices": 2, "trainer.accelerator": "cpu",
        "trainer.strategy": "ddp", "data.results": f"[{whole / 'data' / 'decode'}]",
    }  # fmt: skip
    process = start(options(models, run_dir, **changes))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    ours, theirs = adapter(run_dir), adapter(whole)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["preference", "soft", "weighted"])
def test_every_way_runs_from_results_to_adapter(method, whole, models, tmp_path):
    changes = {"model.method": method, "data.results": f"[{whole / 'data' / 'decode'}]"}
    assert cli.distill(options(models, tmp_path / "run", **changes)) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["method"] == method and (summary["data"]["target_flops"] > 0) == (method == "soft")
    assert not (tmp_path / "run" / "data" / "decode").exists()


def test_a_lighter_student_is_measured_before_and_after(whole, models, tmp_path):
    student = save(toys_hf.build_llama(seed=5, num_hidden_layers=1), tmp_path / "student")
    changes = {"model.policy.name": student, "data.results": f"[{whole / 'data' / 'decode'}]"}
    assert cli.distill(options(models, tmp_path / "run", **changes)) == 0
    figures = summary_of(tmp_path / "run")["figures"]
    assert figures["before"]["flops"] < figures["teacher_greedy"]["flops"]


def test_mixed_precision_and_accumulation_from_the_command_line(whole, models, tmp_path):
    changes = {
        "trainer.precision": "bf16-mixed", "model.training.gradient_accumulation_steps": 2,
        "model.training.per_device_train_batch_size": 4, "data.results": f"[{whole / 'data' / 'decode'}]",
    }  # fmt: skip
    assert cli.distill(options(models, tmp_path / "run", **changes)) == 0
    ours, theirs = adapter(tmp_path / "run"), adapter(whole)
    assert {weight.dtype for weight in ours.values()} == {torch.float32}
    # the same rows in every step, in halves: AdamW's steps differ where a small gradient's sign does
    assert sum((ours[name] - theirs[name]).norm() for name in ours) < 0.3 * sum(w.norm() for w in theirs.values())


@pytest.mark.parametrize("method", ["sft", "preference"])
def test_trl_trains_from_the_command_line(method, whole, models, tmp_path):
    changes = {"engine": "trl", "model.method": method, "data.results": f"[{whole / 'data' / 'decode'}]"}
    assert cli.distill(options(models, tmp_path / "run", **changes)) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["engine"] == "trl" and summary["training"]["flops"] > 0


# Bad input

BAD = {
    "no teacher": ({"teacher.policy.name": "/nowhere"}, "--teacher.policy.name: expected a model folder"),
    "two decoders": ({"teacher.decoders": "[greedy, nabla]"}, "--teacher.decoders: expected one decoder"),
    "beta": ({"teacher.beta": -1}, "--teacher.beta: expected"),
    "no student": ({"model.policy.name": "/nowhere"}, "--model.policy.name: expected a model folder"),
    "method": ({"model.method": "osmosis"}, "--model.method: expected one of"),
    "limit": ({"data.limit": 0}, "--data.limit: expected at least 1"),
    "results": ({"data.results": "[/nowhere]"}, "--data.results: expected results.jsonl"),
    "empty": ({"data.filters.min_reward": 1e9}, "expected answers to learn from, found none of 80 left: the filter `"),
    "trl": ({"engine": "trl", "model.method": "soft"}, "--model.method: expected sft or preference with --engine trl"),
    "training": ({"model.training.learning_rate": 0}, "--model.training.learning_rate: expected a positive number"),
    "diverges": ({"model.training.learning_rate": 1e30}, "--model.training.learning_rate: expected a finite"),
    "option": ({"model.training.learing_rate": 1}, "Did you mean --model.training.learning_rate?"),
    "precision": ({"trainer.precision": "64-true"}, "--trainer.precision: expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, whole, models, tmp_path, capsys):
    changes, said = BAD[name]
    if name not in ("results", "no teacher"):
        changes = {"data.results": f"[{whole / 'data' / 'decode'}]", **changes}
    assert cli.distill(options(models, tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error, error
    assert not (tmp_path / "run" / "adapter").exists()


def test_results_of_held_out_problems_are_refused(whole, models, tmp_path, capsys):
    changes = {"data.results": f"[{whole / 'eval' / 'teacher'}]"}
    assert cli.distill(options(models, tmp_path / "run", **changes)) == 2
    assert "none of 4 left: the filter `contaminated` took 4" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data" / "train.jsonl").exists()


def test_another_configuration_leaves_the_folder_alone(whole, models, capsys):
    assert cli.distill(options(models, whole, model__training__learning_rate=0.5)) == 2
    assert "to hold this configuration" in capsys.readouterr().err


def other_student(folder: Path) -> Path:
    """A student whose tokenizer has the letters in another order."""
    tokenizer = copy.deepcopy(toys_hf.tokenizer())  # the original is shared by all tests
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    return save(toys_hf.build_llama(), folder, tokenizer)


def test_a_student_of_another_vocabulary_learns_from_text_alone(whole, models, tmp_path, capsys):
    changes = {"model.policy.name": other_student(tmp_path / "s"), "data.results": f"[{whole / 'data' / 'decode'}]"}
    assert cli.distill(options(models, tmp_path / "soft", **changes, **{"model.method": "soft"})) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--model.policy.name: expected a student with the teacher's vocabulary for --model.method soft" in error
    assert cli.distill(options(models, tmp_path / "sft", **changes)) == 0


# The curve


def test_the_curves_cross_where_the_totals_are_equal():
    found = amortise(fixed=1000.0, student=1.0, teacher=5.0, student_accuracy=0.8, teacher_accuracy=1.0)
    n = found["crossing"]
    assert n == 250.0 and 1000.0 + n * 1.0 == n * 5.0
    m = found["crossing_per_right_answer"]
    assert (1000.0 / m + 1.0) / 0.8 == pytest.approx(5.0)
    assert found["curve"][-1]["questions"] == pytest.approx(2500.0)
    first = [row["student_flops"] > row["teacher_flops"] for row in found["curve"]]
    assert first == sorted(first, reverse=True) and first[0] and not first[-1]


def test_a_student_that_costs_as_much_never_pays():
    found = amortise(fixed=1000.0, student=5.0, teacher=5.0)
    assert found["crossing"] is None and found["crossing_per_right_answer"] is None and found["curve"]


def test_the_recovered_share_is_that_of_the_gain():
    before, teacher = torch.tensor([1, 0, 0, 0, 0]), torch.tensor([1, 1, 1, 1, 1])
    after = torch.tensor([1, 1, 1, 0, 0])
    found = recovered_share(before.repeat(40), after.repeat(40), teacher.repeat(40))
    assert found["value"] == pytest.approx(0.5) and found["low"] < 0.5 < found["high"]  # pyright: ignore
    assert recovered_share(before, after, before)["value"] is None


def test_problems_of_ones_own_are_split_in_three(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"problem": f"question {n}", "answer": str(n)}) + "\n" for n in range(50)))
    data = DistillationData(path=str(file), limit=100, validation_limit=5, eval_limit=10)
    parts = [data.problems, data.validation, data.held_out]
    texts = [problem.problem for part in parts for problem in part]
    assert [len(part) for part in parts] == [35, 5, 10] and len(set(texts)) == 50
    assert all(isinstance(problem, Problem) and problem.problem in data.refused for problem in data.held_out)
