"""What is wrong with the input is said in one line: what, expected, found, what to do. Exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from nabla_rl.cli import app as cli
from nabla_rl.cli.base import explain
from nabla_rl.data.tiny import WORDS, build_tokenizer
from nabla_rl.decoding import module as decoding_module
from nabla_rl.decoding.run import Job
from tests import toys_hf
from tests.cli.toys_cli import options, read_results, save, save_models, start


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    for name in ("policy", "reward"):
        model = toys_hf.build_llama() if name == "policy" else toys_hf.build_classifier()
        with torch.no_grad():
            model.get_input_embeddings().weight[5:] = torch.nan
        save(model, folder / f"nan-{name}")
    words = build_tokenizer(WORDS)
    save(toys_hf.build_classifier(vocab_size=len(words)), folder / "words-reward", words)
    save(toys_hf.build_classifier(num_labels=3), folder / "three-labels")
    save(toys_hf.build_llama(max_position_embeddings=24), folder / "short-policy")
    save(toys_hf.build_classifier(max_position_embeddings=24), folder / "short-reward")
    toys_hf.build_llama().save_pretrained(folder / "no-tokenizer")
    for name, weights in (("broken", b"not safetensors at all"), ("empty", None)):
        save(toys_hf.build_llama(), folder / name)
        (folder / name / "model.safetensors").unlink()
        if weights is not None:
            (folder / name / "model.safetensors").write_bytes(weights)
    save(toys_hf.build_llama(), folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(toys_hf.build_llama().state_dict(), folder / "pickled" / "pytorch_model.bin")
    save(toys_hf.build_llama(), folder / "other-shape")
    toys_hf.build_llama(hidden_size=32).config.save_pretrained(folder / "other-shape")
    save(toys_hf.build_llama(), folder / "bad-config")
    (folder / "bad-config" / "config.json").write_text("{")
    return folder


@pytest.fixture
def refused(models, tmp_path, capsys):
    """Run and expect the one line; return it without its "error: "."""

    def run(*arguments: str, **changes: object) -> str:
        capsys.readouterr()
        code = cli.decode([*options(models, changes.pop("run_dir", tmp_path / "run"), **changes), *arguments])
        out, err = capsys.readouterr()
        assert code == 2, (out, err)
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in out + err
        assert len(err) < 1000
        return err.removeprefix("error: ").strip()

    return run


def expects(message: str, *fragments: object) -> None:
    for fragment in fragments:
        assert str(fragment) in message, message


# Options


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--modle.beta", "3"], ["--modle.beta: expected an option", "Did you mean --model.beta?", "See --help."]),
        (["--nothing-like-it"], ["--nothing-like-it: expected an option", "See --help."]),
        (["--data.limt=3"], ["--data.limt: expected an option", "Did you mean --data.limit?"]),
        (["stray"], ["stray", "See --help."]),
        (["--data.limit"], ["--data.limit: expected a value, found none"]),
        (["--data.limit", "many"], ["--data.limit: expected a whole number or null, found 'many'"]),
        (["--data.limit", "1.5"], ["--data.limit: expected a whole number or null, found '1.5'"]),
        (["--seed", "x"], ["--seed: expected a whole number, found 'x'"]),
        (["--model.beta", "x"], ["--model.beta: expected a number, found 'x'"]),
        (["--data.skip_bad", "maybe"], ["--data.skip_bad: expected true or false, found 'maybe'"]),
        (["--model.nabla.support", "x"], ["--model.nabla.support: expected a whole number or null, found 'x'"]),
        (["--model.nabla.dto.betas", "[0.9]"], ["--model.nabla.dto.betas: expected", "2 elements", "[0.9]"]),
        (
            ["--model.decoders", "[foo]"],
            ["--model.decoders: expected one of greedy, sample, best_of_n", "found 'foo'"],
        ),
        (
            ["--model.decoders", "greedy"],
            ["--model.decoders: expected a list [a,b] or null", "[a,b]", "found 'greedy'"],
        ),
        (["--data.split", "exam"], ["--data.split: expected one of train, validation, test, hard", "found 'exam'"]),
        (["--data.family", "chess"], ["--data.family: expected one of words, sorting", "found 'chess'"]),
        (["--data.answers", "x"], ["--data.answers: expected one of boxed, exact or null, found 'x'"]),
        (["--model.best_of_n.choose_by", "x"], ["expected one of energy, reward, weighted_vote, found 'x'"]),
        (["--model.nabla.acceptance", "x"], ["expected one of energy, reward, metropolis, found 'x'"]),
        (
            ["--model.reward.kind", "x"],
            ["--model.reward.kind: expected one of sequence_classifier, likelihood, or a class path", "found 'x'"],
        ),
        (["--model.policy.dtype", "int8"], ["--model.policy.dtype: expected one of auto, float32", "found 'int8'"]),
        (["--model.sampling", "3"], ["--model.sampling: expected a YAML file, found '3'", "--model.sampling.NAME"]),
        (["--model.family", "words"], ["--model.family: expected to be set by --data.family"]),
        (["--model.nabla.dto.beta", "1"], ["--model.nabla.dto.beta: expected to be set by --model.beta"]),
        (["--trainer.accelerator", "abacus"], ["--trainer: expected", "abacus"]),
        (["--trainer.devices", "0"], ["--trainer: expected", "0"]),
        (["--trainer.precision", "bf16-mixed"], ["--trainer.precision: expected none", "--model.policy.dtype"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_options(refused, arguments, fragments):
    expects(refused(*arguments), *fragments)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("model.beta", "0", "0.0"),
        ("model.beta", "-1", "-1.0"),
        ("model.beta", ".nan", "nan"),
        ("data.limit", "0", "0"),
        ("data.limit", "-3", "-3"),
        ("data.batch_size", "0", "0"),
        ("model.best_of_n.n", "0", "0"),
        ("model.self_consistency.n", "-1", "-1"),
        ("model.sampling.temperature", "-0.1", "-0.1"),
        ("model.sampling.temperature", ".nan", "nan"),
        ("model.sampling.top_p", "0", "0.0"),
        ("model.sampling.top_p", "1.1", "1.1"),
        ("model.sampling.max_new_tokens", "0", "0"),
        ("model.nabla.max_rollouts", "0", "0"),
        ("model.nabla.min_entropy", "-1", "-1.0"),
        ("model.nabla.min_gradient_norm", "-1", "-1.0"),
        ("model.nabla.resample_temperature", "-1", "-1.0"),
        ("model.nabla.resample_top_p", "0", "0.0"),
        ("model.nabla.resample_top_p", "1.5", "1.5"),
        ("model.nabla.support", "1", "1"),
        ("model.nabla.dto.num_steps", "-1", "-1"),
        ("model.nabla.dto.step_size", "-0.1", "-0.1"),
        ("model.nabla.dto.step_size", ".inf", "inf"),
        ("model.nabla.dto.tau", "0", "0.0"),
        ("model.nabla.dto.eps", "0", "0.0"),
        ("model.nabla.dto.betas", "[1.0,0.9]", "(1.0, 0.9)"),
        ("model.nabla.dto.weight_decay", "-1", "-1.0"),
    ],
)
def test_values(refused, monkeypatch, name, value, found):
    """Found before any model is loaded."""
    monkeypatch.setattr(decoding_module, "load_policy", lambda *_, **__: pytest.fail("models were loaded"))
    message = refused(f"--{name}", value)
    expects(message, f"--{name}: expected", f"found {found}")


@pytest.mark.parametrize("decoders", ["[]", "[greedy,greedy]"])
def test_decoders_must_be_some_and_different(refused, decoders):
    expects(refused("--model.decoders", decoders), "--model.decoders: expected a list of different decoders, found [")


def test_settings_that_do_not_go_together(refused):
    message = refused(model__nabla__dto__relaxation="softmax", model__nabla__dto__caching="true")
    expects(message, "--model.nabla.dto.caching: expected None or False with relaxation='softmax'", "found True")


@pytest.mark.parametrize("decoders", ["[best_of_n]", "[greedy,nabla]"])
def test_no_reward_where_one_is_needed(refused, monkeypatch, decoders):
    monkeypatch.setattr(decoding_module, "load_policy", lambda *_, **__: pytest.fail("models were loaded"))
    message = refused("--model.reward.name", "null", "--model.decoders", decoders)
    expects(message, "--model.reward.name: expected a reward model for", decoders.strip("[]").split(",")[-1], "none")


# Configuration files


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ["--config: expected a YAML file, found none at", "Check the path."]),
        ("data: [\n", ["--config: expected YAML in", "line 2, column 1", "Mend the file."]),
        ("data:\n\tlimit: 3\n", ["--config: expected YAML in", "line 2, column 1"]),
        ("", ["--config: expected options and their values in", "found nothing"]),
        ("- 1\n", ["--config: expected options and their values in", "found [1]"]),
        (b"\xff\xfe\x00", ["--config: expected text in UTF-8 in"]),
        ("modle: 3\n", ["--modle: expected an option", "See --help."]),
        ("model:\n  sampling:\n    temprature: 1\n", ["--model.sampling.temprature", "model.sampling.temperature?"]),
        ("data:\n  limit: many\n", ["--data.limit: expected a whole number or null, found 'many'"]),
    ],
)
def test_config_files(refused, tmp_path, content, fragments):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused("--config", str(file))
    expects(message, *fragments)
    if message.startswith("--config"):
        assert str(file) in message


def test_the_broken_one_of_two_config_files_is_named(refused, tmp_path):
    (tmp_path / "good.yaml").write_text("data:\n  limit: 3\n")
    (tmp_path / "broken.yaml").write_text("data: ]\n")
    message = refused("-c", str(tmp_path / "good.yaml"), f"--config={tmp_path / 'broken.yaml'}")
    expects(message, tmp_path / "broken.yaml")
    assert "good.yaml" not in message


# Problems


@pytest.mark.parametrize(
    ("lines", "fragments"),
    [
        (None, ["--data.path: expected a JSONL file, found nothing at"]),
        ([], ["expected at least one problem, found none"]),
        (['{"problem": "abc"}', "not json"], ["line 2: expected JSON, found 'not json'", "--data.skip_bad true"]),
        (['{"problem": "abc"}', '{"answer": "abc"}'], ["line 2: expected the field `problem`, found `answer`"]),
        (['{"problem": ""}'], ["line 1: expected `problem` to be a non-empty string"]),
        (['{"id": "a", "problem": "x"}'] * 2, ["line 2: expected a new id, found 'a' again (first on line 1)"]),
    ],
)
def test_problem_files(refused, tmp_path, lines, fragments):
    file = tmp_path / "mine.jsonl"
    if lines is not None:
        file.write_text("".join(f"{line}\n" for line in lines))
    message = refused("--data.path", str(file))
    expects(message, str(file), *fragments)


def long_problem(tmp_path: Path, length: int) -> str:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "short", "problem": "abc"}\n' + json.dumps({"id": "long", "problem": "a" * length}) + "\n")
    return str(file)


def test_a_problem_longer_than_the_policy_can_read(refused, models, tmp_path, monkeypatch):
    """Found before anything is decoded, however late it comes in the file."""
    monkeypatch.setattr(Job, "lines", lambda *_, **__: pytest.fail("decoded"))
    message = refused("--data.path", long_problem(tmp_path, 200))
    expects(message, "problem 'long'", "policy model's context of 96 tokens", "found 202 + 10", "Shorten the problem")
    message = refused("--data.path", long_problem(tmp_path, 20), model__policy__name=models / "short-policy")
    expects(message, "problem 'long'", "policy model's context of 24 tokens")


@pytest.mark.parametrize("role", ["reward", "gold"])
def test_a_problem_longer_than_a_judge_can_read(refused, models, tmp_path, monkeypatch, role):
    monkeypatch.setattr(Job, "lines", lambda *_, **__: pytest.fail("decoded"))
    judge = {f"model__{role}__name": models / "short-reward"}
    message = refused("--data.path", long_problem(tmp_path, 20), **judge)
    expects(message, "problem 'long'", f"{role} model's context of 24 tokens", "found 22 + 10")


# Models


@pytest.mark.parametrize("role", ["policy", "reward", "gold"])
@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("missing", "expected a model folder with config.json, found none at"),
        ("no-tokenizer", "expected a tokenizer beside"),
        ("broken", "cannot be loaded"),
        ("empty", "cannot be loaded"),
        ("pickled", "cannot be loaded"),
        ("bad-config", "cannot be loaded"),
        ("other-shape", "cannot be loaded"),
    ],
)
def test_model_folders(refused, models, role, name, fragment):
    kind = {} if role == "policy" else {f"model__{role}__kind": "likelihood"}
    message = refused(**{f"model__{role}__name": models / name}, **kind)
    expects(message, f"--model.{role}.name: ", fragment, models / name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "not a name!"])
def test_hub_names_that_are_not_there(refused, name):
    message = refused("--model.policy.name", name)
    expects(message, "--model.policy.name: expected a folder, a Hub name or an embedded model", f"found '{name}'")


@pytest.mark.parametrize("role", ["reward", "gold"])
def test_a_language_model_is_no_trained_classifier(refused, models, role):
    """Its missing head would be filled with random weights, and every reward would be noise."""
    message = refused(**{f"model__{role}__name": models / "policy"})
    expects(message, f"--model.{role}.name: expected a trained sequence classifier", "without score.weight")


def test_a_classifier_is_no_trained_language_model(refused, models):
    message = refused(model__policy__name=models / "reward")
    expects(message, "--model.policy.name: expected a trained language model", "without lm_head.weight")


def test_tied_embeddings_lack_nothing(models, tmp_path):
    """Their output matrix is in no checkpoint, since it is the input matrix."""
    tied = save(toys_hf.build_llama(tie_word_embeddings=True), tmp_path / "tied")
    changes = {"model__policy__name": tied, "model__decoders": "[greedy]", "data__limit": 1}
    assert cli.decode(options(models, tmp_path / "run", **changes)) == 0


def test_a_classifier_with_several_labels(refused, models):
    message = refused(model__reward__name=models / "three-labels")
    expects(
        message,
        "--model.reward.name: expected a sequence classifier with one label",
        "3 labels",
        "Take a reward model.",
    )


@pytest.mark.parametrize("role", ["reward", "gold"])
def test_vocabularies_that_differ(refused, models, role):
    ours, theirs = toys_hf.tokenizer().get_vocab(), build_tokenizer(WORDS).get_vocab()
    differing = sum(theirs.get(token) != index for token, index in ours.items()) + len(theirs.keys() - ours.keys())
    message = refused(**{f"model__{role}__name": models / "words-reward"})
    wanted = f"--model.{role}.name: expected the policy's vocabulary of {len(ours)} tokens"
    expects(message, wanted, len(theirs), differing)


@pytest.mark.parametrize(
    ("role", "fragment"),
    [
        ("policy", "--model.policy.dtype: expected finite logits"),
        ("reward", "expected finite scores"),
        ("gold", "expected finite"),
    ],
)
def test_weights_that_are_not_numbers(refused, models, tmp_path, role, fragment):
    name = "nan-policy" if role == "policy" else "nan-reward"
    message = refused(**{f"model__{role}__name": models / name})
    expects(message, fragment, "NaN", "Check the weights")


def test_a_likelihood_that_is_not_a_number(refused, models):
    changes = {"model__gold__kind": "likelihood", "model__gold__name": models / "nan-policy"}
    message = refused(**changes)
    expects(message, "problem 'sorting-test-0-0': expected a finite score of the gold model, found nan")


def test_what_was_finished_before_an_error_is_kept(models, tmp_path, capsys, monkeypatch):
    lines, calls = Job.lines, []

    def out_of_memory(self, decoder, problems, **more):
        calls.append(decoder.name)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1.")
        return lines(self, decoder, problems, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "lines", out_of_memory)
        assert cli.decode(options(models, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: expected enough memory, found too little (CUDA out of memory)") and err.count("\n") == 1
    )
    assert "--data.batch_size" in err
    assert len(read_results(tmp_path / "run")) == 10


def test_errors_of_our_own_are_not_hidden(models, tmp_path, monkeypatch):
    def broken(self, decoder, problems, **more):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Job, "lines", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.decode(options(models, tmp_path / "run"))


# The run folder


def test_a_run_folder_of_another_configuration(refused, models, tmp_path):
    changes = {"model__decoders": "[greedy]", "data__limit": 1}
    assert cli.decode(options(models, tmp_path / "run", **changes)) == 0
    before = {file: (tmp_path / "run" / file).read_bytes() for file in os.listdir(tmp_path / "run")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_module, "load_policy", lambda *_, **__: pytest.fail("models were loaded"))
        message = refused(**changes, model__sampling__top_p=0.5)
    expects(message, "--run_dir: expected", tmp_path / "run", "model.sampling.top_p = 1.0 there and 0.5 now")
    expects(message, "Choose another --run_dir")
    assert {file: (tmp_path / "run" / file).read_bytes() for file in os.listdir(tmp_path / "run")} == before


def test_a_slip_does_not_block_the_folder_for_the_corrected_command(refused, models, tmp_path, capsys):
    expects(refused(model__policy__name=models / "missing"), "--model.policy.name")
    assert cli.decode(options(models, tmp_path / "run", model__decoders="[greedy]", data__limit=1)) == 0


@pytest.mark.parametrize("change", ["text", "gone"])
def test_a_file_of_problems_that_changed_under_a_run(refused, models, tmp_path, change):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "a", "problem": "abc"}\n{"id": "b", "problem": "bcd"}\n')
    changes = {"model__decoders": "[greedy]", "data__path": file}
    assert cli.decode(options(models, tmp_path / "run", **changes)) == 0
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    file.write_text('{"id": "a", "problem": "abc"}\n' + ('{"id": "b", "problem": "x"}\n' if change == "text" else ""))
    message = refused(**changes)
    now = "'x' now" if change == "text" else "no such problem now"
    expects(message, "--run_dir: expected", "'b' = 'bcd' there and", now, "Choose another --run_dir")
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("place", ["file", "below a file", "cannot be made"])
def test_a_run_folder_that_cannot_be_one(refused, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    places = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "cannot be made": "/proc/no/run"}
    path = places[place]
    expects(refused(run_dir=path), "--run_dir: expected a folder that can be written, found none at", path)
    assert (tmp_path / "file").read_text() == "mine"


# The process


def test_the_process_itself_ends_with_2_and_one_line(models, tmp_path):
    process = start([*options(models, tmp_path / "run"), "--data.limit", "0"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err == "error: --data.limit: expected at least 1, found 0.\n"


# The translation of jsonargparse's messages, beyond those met above


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("something new\n  over two lines", "something new over two lines See --help."),
        ("unrecognized arguments: --x 1 --y 2", "--x: expected an option of this command, found an unknown one. See"),
        (
            "Parser key \"a.b\":\n  Expected a <class 'Path'>. Got value: x",
            "--a.b: expected Path, found 'x'. See --help.",
        ),
    ],
)
def test_explain(message, said):
    assert explain(message, ["--model.beta"]).startswith(said)
