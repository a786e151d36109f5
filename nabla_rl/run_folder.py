"""The folder of a run: `config.yaml`, `results.jsonl`, `summary.json`, `report.html`.

Results are appended as they are made and flushed to the disk, so that a killed run loses at most what it was working
on. The same command continues it; another configuration is refused. Several processes write one file each, merged at
the end.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from nabla_rl.types import UserError

Key = tuple[str, str]
"""(problem id, decoder name)."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class RunFolder:
    """One run's files.

    Args:
        path: the folder; made when missing.
        config: everything that decides the results, nested and plain.
        rank: this process among those that write.
        world_size: how many processes write.

    Raises:
        UserError: the folder holds results of another configuration.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, rank: int = 0, world_size: int = 1):
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        known = {name: value for name, value in flatten(self.config).items() if value is not None}
        self.config_hash = blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=6).hexdigest()
        name = "results.jsonl" if world_size == 1 else f"results.rank{rank}.jsonl"
        self.file = self.path / name
        with as_user_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # a folder that is refused is left as it is
            if any(file.is_file() and file.stat().st_size for file in self._files()):
                self._check_config()
            self.rows = self._read()
            _repair(self.file)
            write_atomically(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def _files(self) -> list[Path]:
        return [self.path / "results.jsonl", *sorted(self.path.glob("results.rank*.jsonl"))]

    def _check_config(self) -> None:
        """Refuse the results of another configuration."""
        file = self.path / "config.yaml"
        if not file.is_file():
            return
        try:
            there = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
            raise UserError(
                "run_dir", f"the configuration of a run in {file}", "something else", "Choose another {run_dir}."
            ) from None
        here = flatten(self.config)
        differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        if differing:
            name = differing[0]
            more = f" and {len(differing) - 1} more settings" if len(differing) > 1 else ""
            raise UserError(
                "run_dir",
                f"{self.path} to hold this configuration",
                f"{name} = {there.get(name)!r} there and {here.get(name)!r} now{more}",
                "Choose another {run_dir}, or delete that folder.",
            )

    def _read(self) -> dict[Key, dict]:
        rows: dict[Key, dict] = {}
        for file in self._files():
            if not file.is_file():
                continue
            # not splitlines(): texts may hold U+2028 and its like as they are. After the last line break stands
            # nothing, or a line that was not written to its end.
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    key, config = (row["id"], row["decoder"]), row["config"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        "run_dir",
                        f"a result in {file}, line {number}",
                        repr(line[:40]),
                        "Delete that line, or choose another {run_dir}.",
                    ) from None
                if config != self.config_hash:
                    raise UserError(
                        "run_dir",
                        f"results of this configuration in {file}",
                        f"those of another on line {number}",
                        "Choose another {run_dir}, or delete that folder.",
                    )
                rows.setdefault(key, row)
        return rows

    def missing(self, ids: Iterable[str], decoder: str) -> list[str]:
        """Those of `ids` that this decoder has no finished line for."""
        return [key for key in ids if (key, decoder) not in self.rows]

    def append(self, rows: Iterable[dict]) -> None:
        """Add lines, in one write that is on the disk when this returns."""
        new = [row for row in rows if (row["id"], row["decoder"]) not in self.rows]
        if not new:
            return
        with as_user_error(self.path), self.file.open("a", encoding="utf-8") as file:
            file.write("".join(_line(row) for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {(row["id"], row["decoder"]): row for row in new}

    def merge(self, ids: Iterable[str], decoders: Iterable[str]) -> list[dict]:
        """All lines in the order of the problems, then of the decoders; written as one file."""
        self.rows = self._read()
        decoders = list(decoders)
        keys = [(key, decoder) for key in ids for decoder in decoders]
        ordered = [self.rows[key] for key in keys if key in self.rows]
        with as_user_error(self.path):
            write_atomically(self.path / "results.jsonl", "".join(map(_line, ordered)))
        for file in self.path.glob("results.rank*.jsonl"):
            file.unlink()
        return ordered

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole or not at all."""
        with as_user_error(self.path):
            return write_atomically(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """A folder that cannot be made, read or written is an error of the input."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "run_dir",
            "a folder that can be written",
            f"none at {path} ({error.strerror or error})",
            "Choose another {run_dir}, or make room; the same command goes on from what is there.",
        ) from error


def _line(row: dict) -> str:
    """A result as one line. JSON has no NaN and no infinity: they become null."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _repair(file: Path) -> None:
    """Cut a last line that was not written to its end."""
    if not file.is_file():
        return
    content = file.read_bytes()
    good = content.rfind(b"\n") + 1
    if good != len(content):
        with file.open("r+b") as handle:
            handle.truncate(good)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml` into a folder, which is made when missing."""
    with as_user_error(path):
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))


def write_atomically(file: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)
    return file
