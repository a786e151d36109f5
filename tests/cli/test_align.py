"""The align command: what a run leaves behind, that it can be killed, two processes, both engines, bad input."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nabla_rl.alignment.trl_engine import Report
from nabla_rl.cli import app as cli
from tests.cli.toys_cli import ROOT, save_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FIGURES = "accuracy greedy_accuracy reward gold_reward kl objective".split()
TRL_METRICS = (
    "reward reward_std frac_reward_zero_std kl entropy loss grad_norm learning_rate num_tokens rewards/judge/mean "
    "rewards/judge/std completions/mean_length completions/clipped_ratio clip_ratio/region_mean"
).split()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def options(models: Path, run_dir: Path, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "data.family": "sorting",
        "data.eval_limit": 4,
        "data.answers": "exact",
        "model.policy.name": models / "policy",
        "model.reward.name": models / "reward",
        "model.gold.name": models / "gold",
        "model.rl.num_generations": 4,
        "model.rl.per_device_train_batch_size": 8,
        "model.rl.max_steps": 6,
        "model.rl.gradient_accumulation_steps": 1,
        "model.rl.max_completion_length": 6,
        "model.rl.learning_rate": 0.01,
        "model.rl.save_steps": 1,
        "model.lora.r": 4,
        "model.lora.lora_alpha": 8,
        "model.eval_generations": 2,
        "run_dir": run_dir,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "align.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        # a shell lets its background jobs ignore Ctrl-C, and what they start inherits it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.align(options(models, run_dir)) == 0
    return run_dir


def test_the_folder_has_everything(whole):
    assert {"config.yaml", "metrics.jsonl", "adapter", "summary.json", "tensorboard"} <= set(os.listdir(whole))
    assert list((whole / "tensorboard").glob("events*"))
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in TRL_METRICS:
        assert all(isinstance(line[name], float) for line in lines), name
    samples = [json.loads(line) for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 4 and set(samples[0]) == {"step", "prompt", "completion", "reward"}


def test_the_summary_has_before_and_after(whole):
    summary = json.loads((whole / "summary.json").read_text())
    for when in ("before", "after"):
        assert all(isinstance(summary[when][name], float) for name in FIGURES)
    assert summary["before"]["kl"] < 1e-6 < summary["after"]["kl"]
    assert summary["flops"] > 0 and summary["seconds"] > 0
    card = (whole / "adapter" / "README.md").read_text()
    for said in (
        "library_name: peft", "| data | the tiny world; held out: 4 problems |", "| reward | judge; reward model ",
        "| β | 1.0", "| KL reached |", "rloo", "peft 0", "| accuracy |",
    ):  # fmt: skip
        assert said in card, said


def test_a_finished_run_is_shown_again(whole, models, capsys):
    before = (whole / "summary.json").stat().st_mtime_ns
    assert cli.align(options(models, whole)) == 0
    assert "finished" in capsys.readouterr().out
    assert (whole / "summary.json").stat().st_mtime_ns == before


def test_decode_takes_the_adapter(whole, models, tmp_path):
    arguments = {
        "data.family": "sorting", "data.limit": 2, "model.policy.name": models / "policy",
        "model.policy.adapter": whole / "adapter", "model.reward.name": models / "reward",
        "model.gold.name": "null", "model.decoders": "[greedy]", "model.sampling.max_new_tokens": 6,
        "run_dir": tmp_path / "run",
    }  # fmt: skip
    assert cli.decode([text for name, value in arguments.items() for text in (f"--{name}", str(value))]) == 0


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda sent: sent.name)
def test_killed_and_continued_is_unbroken_bit_for_bit(whole, models, tmp_path, sent):
    run_dir = tmp_path / "run"
    process = start(options(models, run_dir))
    deadline = time.monotonic() + 120
    while not list((run_dir / "checkpoints").glob("*.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        said = [line for line in errors.splitlines() if "━" not in line and not line.startswith("note: ")]
        assert said == ["error: interrupted. What is finished is kept; the same command resumes it."]
    assert not (run_dir / "summary.json").exists()
    done = start(options(models, run_dir))
    shown, errors = done.communicate(timeout=240)
    assert done.returncode == 0, errors
    assert "training" in shown and "6/6" in shown  # the bar is of the whole run
    ours, theirs = adapter(run_dir), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    timeless = [{n: v for n, v in line.items() if n != "seconds"} for line in metrics(run_dir)]
    assert timeless == [{n: v for n, v in line.items() if n != "seconds"} for line in metrics(whole)]


def test_two_processes_train_as_one_with_the_same_global_batch(whole, models, tmp_path):
    run_dir = tmp_path / "run"
    changes = {"model.rl.per_device_train_batch_size": 4, "trainer.devices": 2, "trainer.accelerator": "cpu"}
    process = start(options(models, run_dir, **changes, **{"trainer.strategy": "ddp"}))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    ours, theirs = adapter(run_dir), adapter(whole)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-5)
    for line, other in zip(metrics(run_dir), metrics(whole), strict=True):
        assert line["reward"] == pytest.approx(other["reward"], abs=1e-4)
        assert line["num_tokens"] == other["num_tokens"]
        assert line["flops"] == pytest.approx(other["flops"], rel=1e-6)


def test_trls_engine_leaves_the_same_folder(models, tmp_path):
    run_dir = tmp_path / "run"
    assert cli.align([*options(models, run_dir, **{"model.algorithm": "grpo"}), "--engine", "trl"]) == 0
    assert {"config.yaml", "metrics.jsonl", "adapter", "summary.json", "tensorboard"} <= set(os.listdir(run_dir))
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(name in lines[0] for name in TRL_METRICS)
    assert adapter(run_dir).keys() == adapter_names(models, tmp_path)


def adapter_names(models: Path, tmp_path: Path) -> set[str]:
    from nabla_rl.models.adapters import LoraOptions, attach_adapter
    from nabla_rl.models.loading import load_policy

    policy = load_policy(str(models / "policy"), device="cpu")
    return set(attach_adapter(policy, LoraOptions(r=4)).state())


def test_trls_engine_interrupted_and_continued_is_unbroken_bit_for_bit(models, tmp_path, monkeypatch, capsys):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert cli.align([*options(models, whole), "--engine", "trl"]) == 0
    step_end = Report.on_step_end

    def interrupted(self, args, state, control, **more):
        step_end(self, args, state, control, **more)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Report, "on_step_end", interrupted)
        assert cli.align([*options(models, run_dir), "--engine", "trl"]) == 130
    assert "interrupted" in capsys.readouterr().err and not (run_dir / "summary.json").exists()
    torch.manual_seed(99)
    assert cli.align([*options(models, run_dir), "--engine", "trl"]) == 0
    ours, theirs = adapter(run_dir), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    for name in ("num_tokens", "flops"):
        totals = [json.loads((folder / "summary.json").read_text())[name] for folder in (run_dir, whole)]
        assert totals[0] == totals[1], name


def test_trls_engine_trains_on_what_a_search_finds(models, tmp_path):
    """By rollout_func; what is logged is the rewards, not the scaled return that TRL was given."""
    run_dir = tmp_path / "run"
    changes = {"model.rollouts": "mixed", "model.rl.max_steps": 2, "model.rl.eval_steps": 1}
    assert cli.align([*options(models, run_dir, **changes), "--engine", "trl"]) == 0
    lines = metrics(run_dir)
    assert all(name in lines[0] for name in TRL_METRICS)
    assert lines[0]["reward"] == pytest.approx(lines[0]["rewards/judge/mean"], abs=1e-5)
    assert lines[0]["kl_sequence"] == pytest.approx(0.0, abs=1e-5)
    points = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [0, 1, 2] and 0 < points[1]["flops"] < points[2]["flops"]
    assert json.loads((run_dir / "summary.json").read_text())["after"]["kl"] > 0


@pytest.mark.parametrize("changes", [{"model.stop_at_kl": 1e-9}, {"model.rl.learning_rate": 1e30}], ids=str)
def test_trls_engine_stops_where_the_other_one_does(models, tmp_path, capsys, changes):
    """Too far from the reference: early. Numbers that are no numbers: in one line."""
    changes |= {"model.rl.max_grad_norm": 0, "model.rl.report_to": "none"}
    code = cli.align([*options(models, tmp_path / "run", **changes), "--engine", "trl"])
    said = capsys.readouterr()
    if "model.stop_at_kl" in changes:
        file = tmp_path / "run" / "summary.json"
        summary, weights = json.loads(file.read_text()), adapter(tmp_path / "run")
        assert code == 0 and "above stop_at_kl" in said.out and summary["stopped_at"] < 6
        file.unlink()  # as if killed after its last step: it does not go on
        assert cli.align([*options(models, tmp_path / "run", **changes), "--engine", "trl"]) == 0
        again = json.loads(file.read_text())
        assert all(torch.equal(weight, weights[name]) for name, weight in adapter(tmp_path / "run").items())
        for name in ("stopped", "stopped_at", "flops", "num_tokens", "after"):
            assert again[name] == summary[name], name
    else:
        assert code == 2 and said.err.strip().splitlines()[-1].startswith("error: ")
        assert "found NaN or infinity" in said.err and not (tmp_path / "run" / "adapter").exists()


def test_held_out_figures_while_it_trains_cost_the_training_nothing(whole, models, tmp_path):
    """The same adapter, the same FLOPs; killed and continued, one line for each evaluation."""
    run_dir = tmp_path / "run"
    assert cli.align(options(models, run_dir, **{"model.rl.eval_steps": 2})) == 0
    points = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    assert all(torch.equal(weight, adapter(run_dir)[name]) for name, weight in adapter(whole).items())
    ours, other = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, whole))
    assert ours["flops"] == other["flops"] == points[-1]["flops"]
    assert points[0]["accuracy"] == ours["before"]["accuracy"] and points[-1]["kl"] == ours["after"]["kl"]
    assert points[1]["evaluation_flops"] > 0 == points[0]["flops"]


class FakeRun:
    """What Lightning's WandbLogger asks of a run."""

    id = "stub"

    def __init__(self):
        self.logged: list[dict] = []
        self.config = {}

    def define_metric(self, *args: object, **options: object) -> None:
        pass

    def log(self, metrics: dict, **options: object) -> None:
        self.logged.append(metrics)


def test_weights_and_biases_where_it_is_installed(models, tmp_path, monkeypatch):
    """With a stub in its place: the metrics arrive at its run."""
    run = FakeRun()
    stub = types.ModuleType("wandb")
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stub.run, stub.init, stub.Settings = None, lambda **options: run, lambda **options: None  # pyright: ignore
    stub.Table = lambda columns, data, dataframe: (columns, data)  # pyright: ignore
    part = types.ModuleType("wandb.part")
    part.RunDisabled, part.Run, part.require = type("RunDisabled", (), {}), FakeRun, None  # pyright: ignore
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"):
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    changes = {"model.rl.report_to": "wandb", "model.rl.max_steps": 2}
    assert cli.align(options(models, tmp_path / "run", **changes)) == 0
    numbers, texts = ([row for row in run.logged if name in row] for name in ("reward", "completions"))
    assert [row["trainer/global_step"] for row in numbers] == [1, 2] == [row["trainer/global_step"] for row in texts]
    columns, rows = texts[0]["completions"]
    assert columns == ["prompt", "completion", "reward"] and len(rows) == 4
    assert [row["reward"] for row in numbers] == [line["reward"] for line in metrics(tmp_path / "run")]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="W&B is installed")
@pytest.mark.parametrize("engine", ["lightning", "trl"])
def test_weights_and_biases_where_it_is_not_installed(models, tmp_path, capsys, engine):
    changes = {"model.rl.report_to": "wandb", "engine": engine}
    assert cli.align(options(models, tmp_path / "run", **changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "--model.rl.report_to" in said[0] and "Run `pip install wandb`" in said[0]
    assert not (tmp_path / "run").exists()


def test_rewards_of_ones_own_and_weights(models, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {
        "model.reward_funcs": "[judge,grader,my_rewards.length]", "model.rl.reward_weights": "[1.0,2.0,0.5]",
        "model.rl.max_steps": 1,
    }  # fmt: skip
    assert cli.align(options(models, tmp_path / "run", **changes)) == 0
    [line] = metrics(tmp_path / "run")
    parts = [line[f"rewards/{name}/mean"] for name in ("judge", "grader", "length")]
    assert line["reward"] == pytest.approx(parts[0] + 2 * parts[1] + 0.5 * parts[2], abs=1e-4)


# Bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model.rl.beta": -1}, "--model.rl.beta: expected a number of at least 0, found -1.0"),
        ({"model.rl.per_device_train_batch_size": 10}, "expected whole groups of 4 completions, found 10"),
        ({"model.lora.target_modules": "[query]"}, "found 'query', which matches none"),
        ({"model.reward_funcs": "[nowhere.at_all]"}, "found 'nowhere.at_all'"),
        ({"model.rl.betta": 1}, "--model.rl.betta: expected an option of this command"),
        ({"model.rl.loss_type": "ppo"}, "--model.rl.loss_type: expected one of grpo, dapo, dr_grpo"),
        ({"data.path": "nowhere.jsonl"}, "--data.path: expected a JSONL file, found nothing"),
        ({"model.policy.name": "./nowhere"}, "--model.policy.name: expected a model folder"),
        ({"model.rl.max_completion_length": 500}, "--model.rl.max_completion_length"),
        ({"model.rl.eval_steps": 0}, "--model.rl.eval_steps: expected at least 1 or null, found 0"),
        ({"model.rollouts": "search", "model.algorithm": "grpo"}, "--model.rollouts: expected sample"),
        (
            {"model.rollouts": "search", "model.search": "edit_search"},
            "--model.search: expected a search whose completions of a group differ",
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_line(models, tmp_path, capsys, changes, complaint):
    assert cli.align(options(models, tmp_path / "run", **changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and complaint in said[0], said


def test_another_configuration_is_refused(whole, models, capsys):
    assert cli.align(options(models, whole, **{"model.rl.beta": 2.0})) == 2
    assert "= 1.0 there and 2.0 now" in capsys.readouterr().err


def test_weights_that_explode_end_in_one_line(models, tmp_path, capsys):
    changes = {"model.rl.learning_rate": 1e30, "model.rl.max_grad_norm": 0}
    assert cli.align(options(models, tmp_path / "run", **changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "NaN" in said
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in last["state_dict"].values())
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_that_has_not_changed_is_not_saved(models, tmp_path, capsys):
    """Rewards that are all alike: a warning that says what to do, and no adapter."""
    (tmp_path / "flat_rewards.py").write_text(
        "def flat(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        changes = {"model.reward_funcs": "[flat_rewards.flat]", "model.rl.max_steps": 11, "model.algorithm": "grpo"}
        assert cli.align(options(models, tmp_path / "run", **changes)) == 2
    finally:
        sys.path.remove(str(tmp_path))
    said = capsys.readouterr().err
    assert "found all equal for 10 steps" in said and "Raise rl.num_generations" in said
    assert said.strip().splitlines()[-1].startswith("error: adapter: expected weights that training has changed")
    assert not (tmp_path / "run" / "adapter").exists()
