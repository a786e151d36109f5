"""A run's folder: what is written stays, what is half-written goes, and two configurations never mix."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from nabla_rl.run_folder import RunFolder, flatten
from nabla_rl.types import UserError

CONFIG = {"model": {"beta": 1.0, "decoders": ["greedy", "nabla"], "name": None}, "seed": 0}


def rows(folder: RunFolder, *ids: str, decoder: str = "greedy", **more) -> list[dict]:
    return [{"id": key, "decoder": decoder, "config": folder.config_hash, "seconds": 0.5, **more} for key in ids]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_configuration_is_written_and_can_be_read_back(tmp_path):
    RunFolder(tmp_path / "a" / "b", CONFIG)
    assert yaml.safe_load((tmp_path / "a" / "b" / "config.yaml").read_text()) == CONFIG


def test_lines_are_on_disk_when_append_returns_and_are_found_again(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    assert folder.missing(["a", "b"], "greedy") == ["a", "b"]
    folder.append(rows(folder, "a", "b"))
    assert [row["id"] for row in read(tmp_path / "results.jsonl")] == ["a", "b"]
    again = RunFolder(tmp_path, CONFIG)
    assert again.missing(["a", "b", "c"], "greedy") == ["c"]
    assert again.missing(["a"], "nabla") == ["a"]
    assert again.rows == folder.rows


def test_append_is_flushed_and_fsynced(tmp_path, monkeypatch):
    folder, synced = RunFolder(tmp_path, CONFIG), []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(read(folder.file)))
    folder.append(rows(folder, "a", "b"))
    assert [len(lines) for lines in synced] == [2]


def test_a_finished_line_is_never_replaced(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a", text="first"))
    before = folder.file.read_bytes()
    folder.append(rows(folder, "a", text="second"))
    assert folder.file.read_bytes() == before
    folder.append(rows(folder, "a", "b", text="second"))
    assert folder.file.read_bytes().startswith(before)
    assert [(row["id"], row["text"]) for row in read(folder.file)] == [("a", "first"), ("b", "second")]


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_half_written_last_line_is_cut_and_the_others_keep_their_bytes(tmp_path, cut):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a", "b", "c", text="é\u2028ü"))
    whole = folder.file.read_bytes()
    kept = whole[: whole.rstrip(b"\n").rfind(b"\n") + 1]
    folder.file.write_bytes(whole[:-cut])
    again = RunFolder(tmp_path, CONFIG)
    assert again.file.read_bytes() == kept
    assert again.missing(["a", "b", "c"], "greedy") == ["c"]
    again.append(rows(again, "c", text="é\u2028ü"))
    assert again.file.read_bytes() == whole


def test_zeros_after_a_power_cut_are_cut(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a"))
    whole = folder.file.read_bytes()
    folder.file.write_bytes(whole + b"\0" * 512)
    assert list(RunFolder(tmp_path, CONFIG).rows) == [("a", "greedy")]
    assert folder.file.read_bytes() == whole


def test_broken_line_in_the_middle_is_named_and_nothing_is_touched(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a", "b", "c"))
    lines = folder.file.read_text().split("\n")
    folder.file.write_text("\n".join([lines[0], lines[1][:20], lines[2], lines[0][:10]]))
    before = folder.file.read_bytes()
    with pytest.raises(UserError, match=r"results.jsonl, line 2.*Delete that line"):
        RunFolder(tmp_path, CONFIG)
    assert folder.file.read_bytes() == before


@pytest.mark.parametrize("content", ['{"x": 1}\n', "[1]\n", "notes\nof mine"])
def test_a_file_that_is_no_result_file_is_refused_and_left_alone(tmp_path, content):
    file = tmp_path / "results.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match="expected a result in"):
        RunFolder(tmp_path, CONFIG)
    assert file.read_text() == content
    assert os.listdir(tmp_path) == ["results.jsonl"]


def test_texts_with_unicode_line_separators_survive(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a\u2028b", text="\u2028 \u2029 \u0085 \x0b \x1e \n"))
    assert RunFolder(tmp_path, CONFIG).rows == folder.rows


def test_infinities_become_null_since_json_has_none(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a", trace=[{"norm": float("nan"), "energy": float("inf"), "reward": 1.5}]))
    line = folder.file.read_text()
    assert "NaN" not in line and "Infinity" not in line
    assert json.loads(line)["trace"] == [{"norm": None, "energy": None, "reward": 1.5}]


def changed(**values) -> dict:
    return {**CONFIG, **values}


def test_another_configuration_is_refused_by_the_name_of_what_differs(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a"))
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    other = changed(model={**CONFIG["model"], "beta": 2.0})
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path, other)
    assert str(tmp_path) in str(error.value) and "found model.beta = 1.0 there and 2.0 now" in str(error.value)
    assert "Choose another `run_dir`" in str(error.value)
    with pytest.raises(UserError, match="and 1 more settings"):
        RunFolder(tmp_path, changed(seed=1, model={**CONFIG["model"], "beta": 2.0}))
    with pytest.raises(UserError, match="extra = None there and 3 now"):
        RunFolder(tmp_path, changed(extra=3))
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before


def test_a_folder_without_results_takes_a_new_configuration(tmp_path):
    """A first command with a slip in it must not block the folder for the corrected one."""
    RunFolder(tmp_path, CONFIG)
    folder = RunFolder(tmp_path, changed(seed=1))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1
    assert folder.rows == {}


def test_results_of_another_configuration_are_refused_even_if_its_file_is_gone(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a"))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match="found those of another on line 1"):
        RunFolder(tmp_path, changed(seed=1))
    assert list(RunFolder(tmp_path, CONFIG).rows) == [("a", "greedy")]


@pytest.mark.parametrize("content", ["a: [", "- 1", "3", ""])
def test_a_configuration_that_cannot_be_read_is_an_error_of_the_input(tmp_path, content):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a"))
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="run_dir: expected"):
        RunFolder(tmp_path, CONFIG)


def test_hash_depends_on_values_alone(tmp_path):
    """Not on the order of keys, nor on whether a tuple or a list, nor on a null that is written out."""
    one = RunFolder(tmp_path / "1", {"a": {"x": 1, "y": (1, 2)}, "b": None})
    two = RunFolder(tmp_path / "2", {"a": {"y": [1, 2], "x": 1}})
    assert one.config_hash == two.config_hash != RunFolder(tmp_path / "3", {"a": {"x": 2, "y": [1, 2]}}).config_hash
    one.append(rows(one, "a"))
    assert RunFolder(tmp_path / "1", {"a": {"y": [1, 2], "x": 1}}).rows == one.rows


def test_infinite_beta_is_the_same_configuration_again(tmp_path):
    folder = RunFolder(tmp_path, {"beta": float("inf")})
    folder.append(rows(folder, "a"))
    assert RunFolder(tmp_path, {"beta": float("inf")}).rows == folder.rows


def test_merge_orders_by_problem_then_decoder(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    for decoder in ("nabla", "greedy"):
        folder.append(rows(folder, "c", "a", decoder=decoder))
    folder.append(rows(folder, "b", decoder="nabla"))
    merged = folder.merge(["a", "b", "c"], ["greedy", "nabla"])
    order = [("a", "greedy"), ("a", "nabla"), ("b", "nabla"), ("c", "greedy"), ("c", "nabla")]
    assert [(row["id"], row["decoder"]) for row in merged] == order
    assert read(folder.file) == merged
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "results.jsonl"]


def test_rank_files_are_written_apart_and_merged_by_id(tmp_path):
    ranks = [RunFolder(tmp_path, CONFIG, rank=rank, world_size=2) for rank in range(2)]
    ranks[0].append(rows(ranks[0], "a", "c"))
    ranks[1].append(rows(ranks[1], "b", "d"))
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "results.rank0.jsonl", "results.rank1.jsonl"]
    merged = ranks[0].merge(["a", "b", "c", "d"], ["greedy"])
    assert [row["id"] for row in merged] == ["a", "b", "c", "d"]
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "results.jsonl"]
    assert read(tmp_path / "results.jsonl") == merged


def test_a_killed_run_of_two_processes_goes_on_with_one_and_with_three(tmp_path):
    two = RunFolder(tmp_path, CONFIG, rank=1, world_size=2)
    two.append(rows(two, "b", "d"))
    with two.file.open("a") as file:
        file.write('{"id": "f"')
    one = RunFolder(tmp_path, CONFIG)
    assert one.missing(["a", "b", "c", "d"], "greedy") == ["a", "c"]
    one.append(rows(one, "a"))
    three = RunFolder(tmp_path, CONFIG, rank=2, world_size=3)
    assert three.missing(["a", "b", "c", "d"], "greedy") == ["c"]
    three.append(rows(three, "c"))
    assert [row["id"] for row in three.merge(["a", "b", "c", "d"], ["greedy"])] == ["a", "b", "c", "d"]


def test_killed_between_merging_and_cleaning_up(tmp_path):
    """results.jsonl is there and so are the rank files: every line counts once."""
    folder = RunFolder(tmp_path, CONFIG, rank=0, world_size=2)
    folder.append(rows(folder, "a", "b"))
    copy = folder.file.read_bytes()
    folder.merge(["a", "b"], ["greedy"])
    folder.file.write_bytes(copy)
    assert len(RunFolder(tmp_path, CONFIG).merge(["a", "b"], ["greedy"])) == 2
    assert len(read(tmp_path / "results.jsonl")) == 2


def test_write_json_is_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.write_json("summary.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("summary.json", {"a": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}


def test_a_path_that_is_a_file_or_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere/run"):
        with pytest.raises(UserError, match="run_dir: expected a folder that can be written, found none at"):
            RunFolder(path, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        RunFolder(tmp_path / "run", CONFIG)
    tmp_path.chmod(0o700)


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(rows(folder, "a"))

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        folder.append(rows(folder, "b"))
    with pytest.raises(UserError, match="No space left on device"):
        folder.merge(["a", "b"], ["greedy"])
    monkeypatch.undo()
    assert ("a", "greedy") in RunFolder(tmp_path, CONFIG).rows
