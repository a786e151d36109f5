"""The folder of a run: `config.yaml`, `results.jsonl`, `summary.json`, `report.html`.

Results are appended as they are made and flushed to the disk, so that a killed run loses at most what it was working on. The
same command continues it; another configuration is refused. Several processes write one file each, merged at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
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
        self.config = config
        self.config_hash = blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=6).hexdigest()
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_config()
        name = "results.jsonl" if world_size == 1 else f"results.rank{rank}.jsonl"
        self.file = self.path / name
        for file in self._files():
            _repair(file)
        self.rows = self._read()

    def _files(self) -> list[Path]:
        return [self.path / "results.jsonl", *sorted(self.path.glob("results.rank*.jsonl"))]

    def _check_config(self) -> None:
        file = self.path / "config.yaml"
        if not file.is_file():
            _write_atomically(file, yaml.safe_dump(dict(self.config), sort_keys=False))
            return
        there, here = flatten(yaml.safe_load(file.read_text()) or {}), flatten(self.config)
        differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        if differing:
            name = differing[0]
            more = f" and {len(differing) - 1} more settings" if len(differing) > 1 else ""
            raise UserError(
                f"--run_dir: expected {self.path} to hold this configuration, found {name} = {there.get(name)!r} there and "
                f"{here.get(name)!r} now{more}. Choose another --run_dir, or delete that folder."
            )

    def _read(self) -> dict[Key, dict]:
        rows: dict[Key, dict] = {}
        for file in self._files():
            if file.is_file():
                for line in file.read_text(encoding="utf-8").splitlines():
                    row = json.loads(line)
                    rows.setdefault((row["id"], row["decoder"]), row)
        return rows

    def missing(self, ids: Iterable[str], decoder: str) -> list[str]:
        """Those of `ids` that this decoder has no finished line for."""
        return [key for key in ids if (key, decoder) not in self.rows]

    def append(self, rows: Iterable[dict]) -> None:
        """Add lines, in one write that is on the disk when this returns."""
        new = [row for row in rows if (row["id"], row["decoder"]) not in self.rows]
        if not new:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {(row["id"], row["decoder"]): row for row in new}

    def merge(self, ids: Iterable[str], decoders: Iterable[str]) -> list[dict]:
        """All lines in the order of the problems, then of the decoders; written as one file."""
        self.rows = self._read()
        decoders = list(decoders)
        keys = [(key, decoder) for key in ids for decoder in decoders]
        ordered = [self.rows[key] for key in keys if key in self.rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        _write_atomically(self.path / "results.jsonl", text)
        for file in self.path.glob("results.rank*.jsonl"):
            file.unlink()
        return ordered

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole or not at all."""
        return _write_atomically(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _repair(file: Path) -> None:
    """Cut a last line that was not written to its end."""
    if not file.is_file():
        return
    content = file.read_bytes()
    good = content.rfind(b"\n") + 1
    while good:
        start = content.rfind(b"\n", 0, good - 1) + 1
        try:
            json.loads(content[start:good])
            break
        except ValueError:
            good = start
    if good != len(content):
        with file.open("r+b") as handle:
            handle.truncate(good)


def _write_atomically(file: Path, text: str) -> Path:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    return file
