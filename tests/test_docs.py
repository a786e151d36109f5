"""What the documentation says is true of the code: its Python runs, its links, options and commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").rglob("*.md")])
LOG = ROOT / "docs" / "log.md"
"""The record of what was run: its commands are those of the commits that it names."""
MAX_WIDTH = 120

FENCE = re.compile(r"^( *)(```+|~~~+)(.*)$")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|!\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--((?:model|data)\.[a-z_]+(?:\.[a-z_]+)*)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


on_every_page = pytest.mark.parametrize("page", PAGES, ids=name)
on_current_pages = pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=name)


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its first line's number, its text."""

    info: str
    line: int
    text: str


def split(page: Path) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and the page without them (line numbers kept)."""
    blocks: list[Block] = []
    prose: list[str] = []
    fence, info, start, held = "", "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        found = FENCE.match(line)
        if not fence and found:
            fence, info, start, held = found[2], found[3].strip(), number + 1, []
        elif fence and line.strip() == fence:
            blocks.append(Block(info, start, "\n".join(held)))
            fence = ""
        elif fence:
            held.append(line)
        prose.append("" if fence or found else line)
    assert not fence, f"{name(page)}: the block opened before line {start} is not closed"
    return blocks, "\n".join(prose)


def python_blocks(page: Path) -> list[Block]:
    return [block for block in split(page)[0] if block.info.split()[:1] == ["python"] and "no-run" not in block.info]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name)
def test_python_blocks_run_in_order(page, monkeypatch, tmp_path, capsys):
    """Each page is one program: its blocks share a namespace, and an error names the page's own line."""
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for block in python_blocks(page):
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(page), "exec"), module.__dict__)  # noqa: S102


EXTENDING = ROOT / "docs" / "extending.md"
TITLE = re.compile(r'python title="([\w.]+)"')


def extension_commands() -> list[str]:
    """The commands of the page on extending, each on one line."""
    blocks = [block.text.replace("\\\n", " ") for block in split(EXTENDING)[0] if block.info == "bash"]
    return [line for text in blocks for line in text.splitlines()]


@pytest.mark.parametrize("command", extension_commands(), ids=lambda command: command.split("python ")[1][:60])
def test_extensions_are_named_on_the_command_line(command, tmp_path):
    """A block with a file name is a file in the working folder, and the page's commands find what it defines."""
    for block in split(EXTENDING)[0]:
        if titled := TITLE.fullmatch(block.info):
            (tmp_path / titled[1]).write_text(block.text + "\n", encoding="utf-8")
    (tmp_path / "mine.jsonl").write_text('{"problem": "Ada has 3 apples. Ada buys 4 more.", "answer": "7"}\n')
    words = [word for word in shlex.split(command) if word != "PYTHONPATH=."]
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, str(ROOT / words[1]), *words[2:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def anchor(heading: str) -> str:
    """The id that GitHub and mkdocs give a heading of plain words."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@on_every_page
def test_relative_links_resolve(page):
    for match in LINK.finditer(split(page)[1]):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = page if not path else (page.parent / path)
        assert file.exists(), f"{name(page)}: no {target}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", split(file)[1], flags=re.MULTILINE)
            assert fragment in map(anchor, headings), f"{name(page)}: no heading #{fragment} in {path or 'this page'}"


@cache
def known_options() -> frozenset[str]:
    """The options of `decode`, `align` and `distill`, as the real parsers have them, and of `train_tiny`, whose
    optional groups are no actions of their own."""
    from nabla_rl.alignment.aligner import PolicyAligner
    from nabla_rl.alignment.data import AlignmentData
    from nabla_rl.cli.align import AlignCLI
    from nabla_rl.cli.decode import DecodeCLI
    from nabla_rl.cli.distill import DistillCLI
    from nabla_rl.cli.train_tiny import JudgeOptions, TaughtOptions, TrainTinyOptions
    from nabla_rl.data.module import ProblemData
    from nabla_rl.decoding.module import DecodingModule
    from nabla_rl.distillation.data import DistillationData
    from nabla_rl.distillation.distiller import PolicyDistiller

    taken: list[str] = []
    for cli, module, data in (
        (DecodeCLI, DecodingModule, ProblemData),
        (AlignCLI, PolicyAligner, AlignmentData),
        (DistillCLI, PolicyDistiller, DistillationData),
    ):

        class Collect(cli):
            def parse_arguments(self, parser, args):
                taken.extend(option for action in parser._actions for option in action.option_strings)
                raise StopIteration

        with pytest.raises(StopIteration):
            Collect.read([], module, data)
    taken += [f"--model.{field.name}" for field in fields(TrainTinyOptions)]
    for group, options in (("judge", JudgeOptions), ("taught", TaughtOptions)):
        taken += [f"--model.{group}.{field.name}" for field in fields(options)]
    return frozenset(taken)


def own_options(page: Path) -> set[str]:
    """The options of decoders that a page defines: `name` and fields of a dataclass in a file of its own."""
    found = set()
    for block in split(page)[0]:
        for named in re.findall(r'name: ClassVar\[str\] = "(\w+)"', block.text):
            found |= {f"model.{named}.{option}" for option in re.findall(r"^    (\w+): ", block.text, re.MULTILINE)}
    return found


@on_current_pages
def test_options_exist(page):
    """In prose and in every block: an option that was renamed is renamed here too."""
    for option in set(OPTION.findall(page.read_text(encoding="utf-8"))) - own_options(page):
        assert f"--{option}" in known_options(), f"{name(page)}: no option --{option}"


@on_current_pages
def test_named_scripts_configs_and_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"python (scripts/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), f"{name(page)}: no {script}"
    for config in re.findall(r"configs/[\w/.-]+\.yaml", text):
        assert (ROOT / config).is_file(), f"{name(page)}: no {config}"
    for verb, config in re.findall(r"scripts/(\w+)\.py [^`\n]*--config (\w+)(?![\w/.])", text):
        assert (ROOT / "configs" / verb / f"{config}.yaml").is_file(), f"{name(page)}: no {config} of {verb}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in targets, f"{name(page)}: no target {target} in the Makefile"


@on_every_page
def test_lines_are_short(page):
    """120 characters; tables, links and display mathematics cannot be broken."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        unbreakable = line.startswith("|") or re.fullmatch(r"\S*https?://\S*", line.strip())
        assert len(line) <= MAX_WIDTH or unbreakable, f"{name(page)}, line {number}: {len(line)} characters"


def test_navigation_has_every_page():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page != README}


def test_api_references_resolve():
    """What mkdocstrings is asked for (`::: dotted.name`) can be imported."""
    import importlib

    for page in PAGES:
        for dotted in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            try:
                importlib.import_module(dotted)
            except ModuleNotFoundError:
                owner, _, attribute = dotted.rpartition(".")
                assert attribute in vars(importlib.import_module(owner)), f"{name(page)}: no {dotted}"


def test_the_file_tree_is_the_real_one():
    """Every file and folder it names exists, and it names every module of the package."""
    page = ROOT / "docs" / "developer" / "design_principles.md"
    tree = next(block.text for block in split(page)[0] if block.info == "tree")
    folder, named = ROOT, set()
    for line in tree.splitlines():
        entry = line.split()[0]
        if line.startswith("  "):
            path = folder / entry
        else:
            path = ROOT / entry
            folder = path if entry.endswith("/") else ROOT
        assert path.exists(), f"{name(page)}: no {path.relative_to(ROOT)}"
        named.add(path)
    modules = {p for p in (ROOT / "nabla_rl").iterdir() if p.name not in ("__init__.py", "__pycache__")}
    missing = {p.relative_to(ROOT).as_posix() for p in modules - named if p.suffix in ("", ".py")}
    assert not missing, f"{name(page)}: the tree lacks {', '.join(sorted(missing))}"
