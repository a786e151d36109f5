"""The public names, and `decode` as a plain function."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import nabla_rl as nr
from nabla_rl.decoding.run import build_decoder
from tests import toys_hf as toys
from tests.test_imports import PROBE

SAMPLING = nr.Sampling(max_new_tokens=8)


def asked(n: int = 5) -> list[nr.Problem]:
    return toys.problems(n)


def told(answers) -> list[tuple]:
    """All of an answer that a seed determines."""
    return [(one.problem_id, one.text, tuple(one.ids), one.reward, one.logps, one.cost.flops) for one in answers]


def test_importing_the_package_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", PROBE, "nabla_rl"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "transformers", "lightning", "trl", "peft"} & set(done.stdout.split())


@pytest.mark.parametrize("name", [name for name in nr.__all__ if name != "__version__"])
def test_every_public_name_resolves_and_says_what_it_is(name):
    found = getattr(nr, name)
    assert name in dir(nr)
    assert found.__doc__ or isinstance(found, dict)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'decoed'"):
        nr.decoed  # noqa: B018


@pytest.mark.parametrize("name", sorted(nr.DECODERS))
def test_a_name_a_class_and_an_instance_decode_alike(name):
    kind = nr.DECODERS[name]
    answers = [
        told(nr.decode(asked(2), *toys.models(), decoder, sampling=SAMPLING, seed=3))
        for decoder in (name, kind, kind())
    ]
    assert answers[0] == answers[1] == answers[2]
    assert [row[0] for row in answers[0]] == [problem.id for problem in asked(2)]


def test_answers_do_not_depend_on_the_batch_or_the_order():
    def run(problems, batch_size):
        return nr.decode(problems, *toys.models(), nr.BestOfN(3), sampling=SAMPLING, batch_size=batch_size)

    whole = {one.problem_id: one.text for one in run(asked(), 16)}
    assert {one.problem_id: one.text for one in run(asked()[::-1], 2)} == whole


def test_a_run_folder_is_resumed_and_another_configuration_is_refused(tmp_path):
    def run(problems, **more):
        given = {"sampling": SAMPLING, "run_dir": tmp_path / "run", "batch_size": 2, **more}
        return nr.decode(problems, *toys.models(), nr.BestOfN(3), **given)

    first = run(asked())
    lines = tmp_path / "run" / "results.jsonl"
    kept = lines.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(kept) == 5
    lines.write_text("".join(kept[:3]), encoding="utf-8")
    assert [one.text for one in run(asked())] == [one.text for one in first]
    ids = [json.loads(line)["id"] for line in lines.read_text(encoding="utf-8").splitlines()]
    assert ids == [problem.id for problem in asked()]
    before = lines.read_bytes()
    with pytest.raises(nr.UserError, match="run_dir"):
        run(asked(), beta=2.0)
    assert lines.read_bytes() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decoder": "best_of"}, "best_of_n"),
        ({"beta": 0.0}, "beta"),
        ({"batch_size": 0}, "batch_size"),
        ({"problems": "there_is_no_such_file.jsonl"}, "problems"),
        ({"reward": None}, "reward"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(given, message):
    policy, reward = toys.models()
    call = {"problems": asked(1), "policy": policy, "reward": reward, "decoder": "best_of_n", **given}
    with pytest.raises(nr.UserError, match=message) as caught:
        nr.decode(**call)
    assert "--" not in str(caught.value)


def test_a_decoder_with_other_options_is_built_from_its_class():
    assert build_decoder(nr.BestOfN) == nr.BestOfN()
    assert replace(build_decoder("best_of_n"), n=5) == nr.BestOfN(5)
