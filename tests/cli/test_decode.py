"""The decode command: what a run leaves behind, that it can be killed at any moment, and what does not change it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from nabla_rl.cli import app as cli
from nabla_rl.cli import configs
from nabla_rl.cli import decode as decode_cli
from nabla_rl.cli.decode import DecodeCLI
from nabla_rl.data.module import ProblemData
from nabla_rl.data.tiny import FAMILIES
from nabla_rl.decoding import DECODERS as DECODERS_BY_NAME
from nabla_rl.decoding.module import DecodingModule
from nabla_rl.decoding.run import Job
from nabla_rl.models.loading import ASSETS
from nabla_rl.report import decoded as decoded_page
from tests.cli.toys_cli import (
    DECODERS,
    options,
    read_results,
    read_summary,
    save_models,
    start,
    timeless_results,
    timeless_summary,
)

SUMMARY_ROW = (
    "decoder accuracy accuracy_low accuracy_high mean_reward gold_reward rollouts policy_calls reward_calls flops "
    "seconds acceptance_rate"
).split()
EDIT = (
    "position old_token new_token reward_before reward_after energy_before energy_after accepted gradient_norm "
    "entropy score"
).split()
EDITORS = ("nabla", "edit_search")
IDS = [f"sorting-test-0-{number}" for number in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.decode(options(models, run_dir)) == 0
    return run_dir


@pytest.fixture(autouse=True)
def quick_report(monkeypatch) -> None:
    """The page takes longer to draw than a small run to compute; `whole` is made before this and has a real one."""
    monkeypatch.setattr(decoded_page, "write_report", lambda path, *_, **__: path.write_text("</html>"))


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[str, str]]:
    """The (problem, decoder) pairs that are really decoded, in order."""
    pairs: list[tuple[str, str]] = []
    lines = Job.lines

    def noted(self, decoder, problems, **more):
        pairs.extend((problem.id, decoder.name) for problem in problems)
        return lines(self, decoder, problems, **more)

    monkeypatch.setattr(Job, "lines", noted)
    return pairs


# What a run leaves behind


def test_the_folder_has_everything(whole):
    assert sorted(os.listdir(whole)) == ["config.yaml", "report.html", "results.jsonl", "summary.json"]
    assert "<html" in (whole / "report.html").read_text()


def test_the_table_is_printed_and_nothing_wraps(models, tmp_path, capsys):
    assert cli.main(["decode", *options(models, tmp_path / "run", data__limit=2)]) == 0
    out, err = capsys.readouterr()
    for decoder in DECODERS:
        assert len([line for line in out.splitlines() if line.startswith(f" {decoder} ")]) == 1
    assert "2 problems (sorting, test split)" in out
    assert str(tmp_path / "run") in out.replace("\n", "")
    assert "error" not in err and "Traceback" not in err


def test_summary_schema(whole):
    summary = read_summary(whole)
    assert summary["problems"] == 4 and summary["seed"] == 0
    assert [row["decoder"] for row in summary["rows"]] == list(DECODERS)
    for row in summary["rows"]:
        assert list(row) == SUMMARY_ROW
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["policy_calls"] > 0 and row["flops"] > 0 and row["seconds"] > 0
        numbers = {name: value for name, value in row.items() if name not in ("decoder", "acceptance_rate")}
        assert all(isinstance(value, float) for value in numbers.values()), numbers
    rows = {row["decoder"]: row for row in summary["rows"]}
    assert rows["greedy"]["reward_calls"] == rows["self_consistency"]["reward_calls"] == 0
    assert rows["greedy"]["rollouts"] == 1 and rows["best_of_n"]["rollouts"] == 3
    assert 0 <= rows["nabla"]["acceptance_rate"] <= 1
    assert all(rows[name]["acceptance_rate"] is None for name in DECODERS if name not in EDITORS)


def test_results_have_one_line_per_problem_and_decoder(whole):
    rows = read_results(whole)
    assert [(row["id"], row["decoder"]) for row in rows] == [(key, name) for key in IDS for name in DECODERS]
    for row in rows:
        assert isinstance(row["prompt"], str) and isinstance(row["completion"], str)
        assert row["answer"] is None or row["answer"] == row["completion"].strip()
        assert row["correct"] is (row["completion"].strip() == row["expected"])
        assert isinstance(row["reward"], float) and isinstance(row["gold_reward"], float) and row["logps"] < 0
        assert row["energy"] == pytest.approx(-row["reward"] - row["logps"], abs=1e-5)
        assert 1 <= len(row["rollouts"]) <= 3
        assert row["seconds"] > 0
        cost = row["cost"]
        for total, model in (("policy_calls", "policy"), ("reward_calls", "reward")):
            assert cost[total] == sum(entry["calls"] for entry in cost["rows"] if entry["model"] == model)
        assert cost["flops"] == pytest.approx(sum(entry["flops"] for entry in cost["rows"]))


def test_searches_leave_a_trace_of_edits(whole):
    rows = [row for row in read_results(whole) if row["decoder"] in EDITORS]
    edits = [edit for row in rows for edit in row["trace"]]
    assert edits and all(list(edit) == EDIT for edit in edits)
    for row in rows:
        assert len(row["trace"]) == row["proposals"] == len(row["rollouts"]) - 1
        assert sum(edit["accepted"] for edit in row["trace"]) == row["accepted"]
    assert all(row["trace"] == [] for row in read_results(whole) if row["decoder"] not in EDITORS)


def test_edit_search_answers_with_the_lowest_energy_it_has_seen(models, tmp_path):
    changes = {"model__edit_search__min_drop": 0.0, "model__decoders": "[edit_search]", "model__budget__rollouts": 4}
    assert cli.main(["decode", *options(models, tmp_path / "run", **changes)]) == 0
    rows = read_results(tmp_path / "run")
    assert "probe" in {entry["phase"] for row in rows for entry in row["cost"]["rows"]}
    for row in rows:
        assert len(row["trace"]) == row["proposals"] == len(row["rollouts"]) - 1
        assert row["energy"] == pytest.approx(min(-c["reward"] - c["logps"] for c in row["rollouts"]), abs=1e-4)
        assert row["curve"][-1][1] == pytest.approx(row["cost"]["flops"])
    assert any(row["trace"] for row in rows)


def test_every_line_names_its_configuration(whole):
    assert len({row["config"] for row in read_results(whole)}) == 1
    assert re.fullmatch("[0-9a-f]{12}", read_results(whole)[0]["config"])


def test_the_saved_configuration_is_complete_and_runs_again(models, whole, tmp_path, decoded):
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["data"]["limit"] == 4 and config["model"]["nabla"]["dto"]["num_steps"] == 4
    assert config["model"]["policy"]["system_prompt"] is None  # what is null is said too
    assert "batch_size" not in config["data"] and "trainer" not in config and "run_dir" not in config
    again = ["--config", str(whole / "config.yaml"), "--run_dir"]
    assert cli.decode([*again, str(tmp_path / "run"), "--data.batch_size", "2"]) == 0
    assert timeless_results(tmp_path / "run") == timeless_results(whole)
    assert len(decoded) == 20
    decoded.clear()
    assert cli.decode([*again, str(whole)]) == 0  # the same configuration: nothing is left to do
    assert decoded == []


def test_without_run_dir_the_folder_is_named_after_the_config_file(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("data:\n  limit: 1\n")
    arguments = options(models, model__decoders="[greedy]")
    arguments[arguments.index("--data.limit") : arguments.index("--data.limit") + 2] = []
    assert cli.decode(["--config", "mine.yaml", *arguments]) == 0
    assert read_summary(tmp_path / "runs" / "decode" / "mine")["problems"] == 1
    assert cli.decode([*arguments, "--data.limit", "2"]) == 0
    assert read_summary(tmp_path / "runs" / "decode" / "default")["problems"] == 2


def test_the_default_file_lies_under_everything_else(models, tmp_path, monkeypatch):
    """Its values hold where neither another file nor the command line says otherwise, and the folder has its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        configs, "default", lambda verb, name="default": (tmp_path / f"{name}.yaml") if name == "default" else None
    )
    mine = tmp_path / "default.yaml"
    mine.write_text("model:\n  beta: 0.5\n  best_of_n:\n    n: 5\nseed: 7\n")
    (tmp_path / "mine.yaml").write_text("model:\n  beta: 0.25\n")
    arguments = options(models, model__decoders="[greedy]", data__limit=1)
    at = arguments.index("--model.beta")
    arguments = arguments[:at] + arguments[at + 2 :]
    for given, name, beta in (([], "default", 0.5), (["--config", "mine.yaml"], "mine", 0.25)):
        assert cli.decode([*given, *arguments]) == 0
        config = yaml.safe_load((tmp_path / "runs" / "decode" / name / "config.yaml").read_text())
        assert (config["model"]["beta"], config["model"]["nabla"]["dto"]["beta"]) == (beta, beta)
        assert (config["model"]["best_of_n"]["n"], config["seed"], config["model"]["seed"]) == (3, 7, 7)
        assert list(config) == ["model", "data", "seed"]


def test_a_file_without_answers_has_no_accuracy(models, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"problem": "hello"}\n{"id": "x", "problem": "world", "answer": "dlorw"}\n')
    arguments = options(models, tmp_path / "run", data__path=tmp_path / "mine.jsonl", model__decoders="[greedy,nabla]")
    assert cli.decode(arguments) == 0
    rows = read_results(tmp_path / "run")
    assert [(row["id"], row["expected"], row["correct"] is None) for row in rows[::2]] == [
        ("1", None, True),
        ("x", "dlorw", False),
    ]
    (tmp_path / "none.jsonl").write_text('{"problem": "hello"}\n')
    arguments = options(models, tmp_path / "none", data__path=tmp_path / "none.jsonl", model__decoders="[greedy]")
    assert cli.decode(arguments) == 0
    (row,) = read_summary(tmp_path / "none")["rows"]
    assert row["accuracy"] is row["accuracy_low"] is row["accuracy_high"] is None
    assert row["mean_reward"] is not None


def test_bad_lines_are_left_out_with_a_warning_when_asked(models, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"problem": "hello"}\nnonsense\n{"problem": "world"}\n{"problem": "x"}\n')
    changes = {"data__path": tmp_path / "mine.jsonl", "data__skip_bad": "true", "model__decoders": "[greedy]"}
    assert cli.decode(options(models, tmp_path / "run", **changes, data__limit=2)) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "line 2: expected JSON, found 'nonsense'" in warnings[0]
    assert "all but the first 2 of 3 problems" in warnings[1]
    assert [row["id"] for row in read_results(tmp_path / "run")] == ["1", "3"]


def test_greedy_needs_no_judge(models, tmp_path):
    changes = {
        "model__reward__name": "null",
        "model__gold__name": "null",
        "model__decoders": "[greedy,self_consistency]",
    }
    assert cli.decode(options(models, tmp_path / "run", **changes)) == 0
    rows = read_results(tmp_path / "run")
    assert {(row["reward"], row["gold_reward"], row["energy"]) for row in rows} == {(None, None, None)}
    assert [row["mean_reward"] for row in read_summary(tmp_path / "run")["rows"]] == [None, None]


def test_no_decoder_sees_the_second_judge(models, whole, tmp_path):
    assert cli.decode(options(models, tmp_path / "run", model__gold__name="null")) == 0
    for ours, theirs in zip(timeless_results(tmp_path / "run"), timeless_results(whole), strict=True):
        assert ours.pop("gold_reward") is None and theirs.pop("gold_reward") is not None
        assert ours.pop("config") != theirs.pop("config")
        assert ours == theirs


def test_a_language_model_as_the_judge(models, tmp_path):
    changes = {"model__reward__kind": "likelihood", "model__reward__name": models / "policy", "data__limit": 2}
    assert cli.decode(options(models, tmp_path / "run", **changes)) == 0
    for row in read_results(tmp_path / "run"):
        assert row["reward"] == pytest.approx(row["logps"], abs=1e-4)  # the policy judges itself


def test_the_seed_decides(models, whole, tmp_path):
    assert cli.decode(options(models, tmp_path / "same")) == 0
    assert timeless_results(tmp_path / "same") == timeless_results(whole)
    assert timeless_summary(tmp_path / "same") == timeless_summary(whole)
    assert cli.decode(options(models, tmp_path / "other", seed=1)) == 0
    ours, theirs = (
        {name: [row["completion"] for row in read_results(run) if row["decoder"] == name] for name in DECODERS}
        for run in (tmp_path / "other", whole)
    )
    assert ours["greedy"] == theirs["greedy"]
    assert ours["best_of_n"] != theirs["best_of_n"] and ours["nabla"] != theirs["nabla"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedded_models_run_by_name(tmp_path, family):
    names = ("tiny-policy", "tiny-reward", "tiny-gold")
    if not all((ASSETS / family / name / "model.safetensors").is_file() for name in names):
        pytest.skip("no embedded models of this family")
    arguments = ["--data.family", family, "--data.limit", "2", "--run_dir", str(tmp_path / "run")]
    assert cli.decode([*arguments, "--model.decoders", "[greedy,best_of_n]", "--model.best_of_n.n", "2"]) == 0
    assert [row["id"] for row in read_results(tmp_path / "run")][::2] == [f"{family}-test-0-0", f"{family}-test-0-1"]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_results_do_not_depend_on_the_batch_size(models, whole, tmp_path, batch_size):
    assert cli.decode(options(models, tmp_path / "run", data__batch_size=batch_size)) == 0
    for ours, theirs in zip(read_results(tmp_path / "run"), read_results(whole), strict=True):
        for name in (
            "id",
            "decoder",
            "config",
            "completion",
            "correct",
            "finished",
            "proposals",
            "accepted",
            "counts",
        ):
            assert ours[name] == theirs[name], (ours["id"], ours["decoder"], name)
        for name in ("reward", "gold_reward", "logps", "energy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
        assert [c["text"] for c in ours["rollouts"]] == [c["text"] for c in theirs["rollouts"]]
        assert ours["cost"] == theirs["cost"]
        for edit, other in zip(ours["trace"], theirs["trace"], strict=True):
            assert {k: v for k, v in edit.items() if not isinstance(v, float)} == {
                k: v for k, v in other.items() if not isinstance(v, float)
            }


# Interruptions


def cut(whole: Path, run_dir: Path, lines: int, torn: int = 0) -> list[bytes]:
    """A run folder as a kill leaves it: the first lines, and the first bytes of the next one."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    every = (whole / "results.jsonl").read_bytes().splitlines(keepends=True)
    written = batch_order(every)[: lines + 1]
    kept = written[:lines]
    (run_dir / "results.jsonl").write_bytes(b"".join(kept) + (written[lines][:torn] if lines < len(written) else b""))
    return kept


def batch_order(lines: list[bytes]) -> list[bytes]:
    """Lines as a run writes them: batch by batch, decoder by decoder."""
    rows = [(json.loads(line), line) for line in lines]
    place = {(key, name): (IDS.index(key) // 2, DECODERS.index(name), key) for key in IDS for name in DECODERS}
    return [line for row, line in sorted(rows, key=lambda pair: place[pair[0]["id"], pair[0]["decoder"]])]


@pytest.mark.parametrize(("lines", "torn"), [(0, 7), (6, 50), (8, 0), (14, 300), (20, 0)])
def test_a_killed_run_goes_on_where_it_was(models, whole, tmp_path, decoded, lines, torn):
    kept = cut(whole, tmp_path / "run", lines, torn)
    finished = {(row["id"], row["decoder"]) for row in map(json.loads, kept)}
    assert cli.decode(options(models, tmp_path / "run")) == 0
    assert not finished & set(decoded)
    assert len(decoded) == 20 - lines
    again = (tmp_path / "run" / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert set(kept) <= set(again)  # byte for byte, with the seconds of the first run
    assert timeless_results(tmp_path / "run") == timeless_results(whole)
    assert timeless_summary(tmp_path / "run") == timeless_summary(whole)


def test_a_batch_torn_in_the_middle_is_computed_whole_and_its_finished_line_kept(models, whole, tmp_path, decoded):
    """The other half of the batch must come out as an unbroken run would have had it, to the last bit."""
    kept = cut(whole, tmp_path / "run", 3, torn=40)
    assert cli.decode(options(models, tmp_path / "run")) == 0
    assert decoded[:2] == [(IDS[0], "best_of_n"), (IDS[1], "best_of_n")]
    again = (tmp_path / "run" / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert set(kept) <= set(again)
    assert timeless_results(tmp_path / "run") == timeless_results(whole)


def test_a_finished_run_is_not_touched_again(models, whole, tmp_path, decoded):
    assert cli.decode(options(models, tmp_path / "run")) == 0
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    decoded.clear()
    for more in ([], ["--data.batch_size", "5"], ["--trainer.accelerator", "cpu"]):
        assert cli.decode([*options(models, tmp_path / "run"), *more]) == 0
    assert decoded == []
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before


def test_interrupting_keeps_what_is_finished_and_says_so(models, whole, tmp_path, monkeypatch, capsys):
    lines, calls = Job.lines, []

    def interrupted(self, decoder, problems, **more):
        calls.append(decoder.name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return lines(self, decoder, problems, **more)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Job, "lines", interrupted)
        assert cli.decode(options(models, tmp_path / "run")) == 130
    assert signal.getsignal(signal.SIGINT) == handler
    out, err = capsys.readouterr()
    assert err == "error: interrupted. What is finished is kept; the same command resumes it.\n"
    assert "the 2 finished of 4 problems" in out
    assert read_summary(tmp_path / "run")["problems"] == 2  # those that every decoder has finished
    assert len(read_results(tmp_path / "run")) == 14
    assert "</html>" in (tmp_path / "run" / "report.html").read_text()
    assert cli.decode(options(models, tmp_path / "run")) == 0
    assert timeless_results(tmp_path / "run") == timeless_results(whole)
    assert timeless_summary(tmp_path / "run") == timeless_summary(whole)


def wait_for_lines(process, run_dir: Path, count: int) -> list[str]:
    """Wait until that many lines are on the disk (of a run that has not ended)."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = sorted(run_dir.glob("results*.jsonl"))
        if sum(file.read_bytes().count(b"\n") for file in files) >= count:
            return [file.name for file in files]
        if process.poll() is not None:
            raise AssertionError(f"the run ended early: {process.communicate()}")
        time.sleep(0.005)
    raise AssertionError("the run wrote nothing in time")


def test_kill_9_and_again(models, tmp_path):
    """Killed twice at different depths, then finished: as if nothing had happened."""
    changes = {"data__limit": 16, "data__batch_size": 1, "model__decoders": "[greedy,nabla]"}
    run_dir, kept = tmp_path / "run", []
    for count in (3, 13):
        process = start(options(models, run_dir, **changes))
        wait_for_lines(process, run_dir, count)
        process.kill()
        process.communicate(timeout=60)
        content = (run_dir / "results.jsonl").read_bytes()
        assert content.count(b"\n") < 32, "the run was over before it was killed"
        assert content.startswith(b"".join(kept))
        kept = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    assert cli.decode(options(models, run_dir, **changes)) == 0
    assert set(kept) <= set((run_dir / "results.jsonl").read_bytes().splitlines(keepends=True))
    assert cli.decode(options(models, tmp_path / "whole", **changes)) == 0
    assert timeless_results(run_dir) == timeless_results(tmp_path / "whole")
    assert timeless_summary(run_dir) == timeless_summary(tmp_path / "whole")


def test_ctrl_c_ends_with_130_and_one_line(models, tmp_path):
    process = start(options(models, tmp_path / "run", data__limit=2000))
    wait_for_lines(process, tmp_path / "run", 2 * 2 * len(DECODERS))  # two batches of two problems
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted. What is finished is kept; the same command resumes it.\n"
    assert "finished of 2,000 problems" in out
    assert read_summary(tmp_path / "run")["problems"] >= 2


@pytest.mark.slow
def test_sigterm_ends_a_run_too(models, tmp_path):
    process = start(options(models, tmp_path / "run", data__limit=2000))
    wait_for_lines(process, tmp_path / "run", 8)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.startswith("error: interrupted.")
    assert len(read_results(tmp_path / "run")) >= 8


# Several processes


TWO_PROCESSES = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(models, tmp_path):
    """An odd number of problems, and batches of one, so that both runs have the same batches."""
    changes = {"data__batch_size": 1, "data__limit": 3}
    process = start([*options(models, tmp_path / "two", **changes), *TWO_PROCESSES])
    assert cli.decode(options(models, tmp_path / "one", **changes)) == 0
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert sorted(os.listdir(tmp_path / "two")) == ["config.yaml", "report.html", "results.jsonl", "summary.json"]
    assert out.count("3 problems (sorting, test split)") == 1
    assert timeless_results(tmp_path / "two") == timeless_results(tmp_path / "one")
    assert timeless_summary(tmp_path / "two") == timeless_summary(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_with_one(models, tmp_path):
    changes = {"data__batch_size": 1, "data__limit": 24, "model__decoders": "[greedy,nabla]"}
    process = start([*options(models, tmp_path / "run", **changes), *TWO_PROCESSES], start_new_session=True)
    names = wait_for_lines(process, tmp_path / "run", 8)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert set(names) <= {"results.rank0.jsonl", "results.rank1.jsonl"}
    for run_dir in (tmp_path / "run", tmp_path / "whole"):
        assert cli.decode(options(models, run_dir, **changes)) == 0
    assert timeless_results(tmp_path / "run") == timeless_results(tmp_path / "whole")


# Questions about the command itself


@pytest.mark.parametrize("entry", [cli.decode, lambda rest: cli.main(["decode", *rest])], ids=["script", "verb"])
def test_help_explains_the_options(entry, capsys):
    with pytest.raises(SystemExit) as exit_info:
        entry(["--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: nabla-rl decode [--config NAME]")
    for fragment in (
        "--model.policy.name [tiny-policy] Folder, Hub name, or embedded model",
        "--model.beta [1.0] KL coefficient",
        "--model.nabla.dto.tau [1.0] Temperature of the relaxation",
        "--model.nabla.acceptance {energy,reward,metropolis} [energy]",
        "--model.sampling.temperature [0.8] Sampling temperature for rollouts; 0 is greedy.",
        "--data.path [null]",
        "--run_dir [null] Folder of the results",
        "--help trainer",
        "--help mcts",
    ):
        assert fragment in text, fragment
    assert "--trainer.accelerator" not in text and "--model.mcts.branching" not in text
    assert "--optimizer" not in text and "--lr_scheduler" not in text


def test_help_fits(capsys):
    """At most 80 options, one line of help for each, and no line beyond 100 columns."""
    with pytest.raises(SystemExit):
        cli.decode(["--help"])
    lines = capsys.readouterr().out.splitlines()
    named = [number for number, line in enumerate(lines) if line.startswith("  --") and "[" in line]
    assert 40 < len(named) <= 80
    for number in named:
        assert lines[number + 1].startswith("      ") and lines[number + 1].strip()
        assert lines[number + 2] == "" or lines[number + 2].startswith("  --")
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize(("topic", "option"), [("mcts", "--model.mcts.branching"), ("trainer", "--trainer.devices")])
def test_help_on_a_group(topic, option, capsys):
    with pytest.raises(SystemExit):
        cli.decode(["--help", topic])
    assert option in capsys.readouterr().out
    assert cli.decode(["--help", topic[:-1]]) == 2
    assert f"Did you mean {topic}?" in capsys.readouterr().err


def test_the_printed_configuration_is_the_run(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        decode_cli.main([*options(models, tmp_path / "run", model__beta=0.25)], prints_config=True)
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    config = yaml.safe_load(out)
    assert config["model"]["beta"] == 0.25 and config["data"]["limit"] == 4 and "trainer" not in config
    assert "# Sampling temperature for rollouts; 0 is greedy." in out
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine.yaml").write_text(out)
    assert cli.decode(["--config", str(tmp_path / "mine.yaml"), "--model.decoders", "[greedy]"]) == 0
    assert read_summary(tmp_path / "run")["problems"] == 4


STRANGER = '''
from dataclasses import dataclass
from typing import ClassVar

from nabla_rl.decoding import AbstractDecoder, BestOfN


@dataclass(frozen=True)
class Luck(AbstractDecoder):
    """The best of a few."""

    few: int = 2
    """Number of completions drawn."""

    name: ClassVar[str] = "luck"

    def decode(self, problems, setting):
        return BestOfN(self.few).decode(problems, setting)
'''


def test_a_decoder_of_ones_own_by_its_class_path(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_decoders.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.decode(["--model.decoders", "[my_decoders.Luck]", "--help"])
    assert "--model.luck.few [2]\n      Number of completions drawn." in capsys.readouterr().out
    named = {"model__decoders": "[greedy,my_decoders.Luck]", "model__luck__few": 3}
    assert cli.decode(options(models, tmp_path / "run", **named)) == 0
    rows = read_results(tmp_path / "run")
    assert {row["decoder"] for row in rows} == {"greedy", "luck"}
    assert {len(row["rollouts"]) for row in rows if row["decoder"] == "luck"} == {3}
    assert cli.decode(options(models, tmp_path / "no", model__decoders="[my_decoders.Lick]")) == 2
    assert "--model.decoders: expected one of greedy" in capsys.readouterr().err


@pytest.mark.parametrize("name", DECODERS_BY_NAME)
def test_the_command_line_builds_the_class_of_that_name_with_its_own_defaults(models, name):
    """One name, one class, one set of defaults, in Python and on the command line."""
    for given in ([], ["--data.family", "sorting"]):
        arguments = [*given, "--model.decoders", f"[{name}]"]
        built = DecodeCLI.read(arguments, DecodingModule, ProblemData).model.decoders[name]
        assert type(built) is DECODERS_BY_NAME[name]
        assert built == DECODERS_BY_NAME[name]()


def test_a_policy_that_is_not_embedded_gets_no_embedded_reward_models(models, tmp_path, capsys):
    """The README's command for one's own models, with and without a reward model of one's own."""
    (tmp_path / "mine.jsonl").write_text('{"problem": "hello"}\n')
    arguments = ["--data.path", str(tmp_path / "mine.jsonl"), "--model.policy.name", str(models / "policy")]
    arguments += ["--run_dir", str(tmp_path / "run")]
    assert cli.decode(arguments) == 0
    err = capsys.readouterr().err
    assert "is not embedded: " in err and "reward.name null" in err and "beta 0.3" in err
    assert {row["decoder"] for row in read_results(tmp_path / "run")} == {"greedy", "self_consistency"}
    arguments[-1] = str(tmp_path / "judged")
    assert cli.decode([*arguments, "--model.reward.name", str(models / "reward")]) == 0
    assert {row["decoder"] for row in read_results(tmp_path / "judged")} == set(DECODERS)
    config = yaml.safe_load((tmp_path / "judged" / "config.yaml").read_text())
    assert config["model"]["gold"]["name"] is None and config["model"]["sampling"]["max_new_tokens"] is None


def test_verbs(capsys):
    assert cli.main([]) == 0
    assert "nabla-rl <verb> --help" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+.*\n", capsys.readouterr().out)
    assert cli.main(["dcode"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "expected" in err and "decode" in err and err.count("\n") == 1
