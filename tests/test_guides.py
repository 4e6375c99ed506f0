"""The commands of the guides: each one is understood by the program it names, and many are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from cluster.cli import _parser, main
from pipeline.spec import FrameOf, Lora, Memory, Output, PromptAt, Shot, Storyboard, Transition, parse_spec

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STORYBOARD = re.compile(r"^```yaml\n(.*?^shots:.*?)^```$", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", re.MULTILINE)
MODELS: dict[str, type[BaseModel]] = {
    "The film": Storyboard,
    "`shots`": Shot,
    "A prompt in a list": PromptAt,
    "`frame_of`": FrameOf,
    "`transition`": Transition,
    "`loras`": Lora,
    "`memory`": Memory,
    "`output`": Output,
}
"""By the heading under which docs/storyboard.md tells of their fields."""
REDIRECT = re.compile(r"\s>\s*\S+")


def commands(program: str) -> list[tuple[str, str]]:
    """(page, command line) of every fenced command of a program, without redirections."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if words_of(line)[:1] == [program]:
                    found.append((page.name, line))
    return found


def words_of(line: str) -> list[str]:
    return shlex.split(REDIRECT.sub("", line), comments=True)


LONGTAKE = commands("longtake")


def anchors(page: Path) -> set[str]:
    """What a link can name in a page: its headings, in lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())]
    assert len(links) > 25
    for page, link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), (page.name, link)
        assert not anchor or anchor in anchors(target), (page.name, link)


def test_tests_that_are_named_exist() -> None:
    named = {
        found
        for page in PAGES
        for found in re.findall(r"((?:tests/)?(?:chaos/)?test_\w+\.py)::(test_\w+)", page.read_text())
    }
    assert len(named) > 25
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert [name for file, name in named if f"def {name}(" not in files.get(Path(file).name, "")] == []


def test_storyboards_in_the_guides_are_storyboards() -> None:
    shown = [text for page in PAGES for text in STORYBOARD.findall(page.read_text())]
    # One with variables is made a storyboard by its schedule.
    whole = [text for text in shown if "${" not in text]
    examples = [path.read_text() for path in sorted((ROOT / "examples").glob("*.yaml"))]
    assert len(whole) > 1 and len(examples) > 5
    for text in whole + examples:
        parse_spec(text)


def test_every_field_of_a_storyboard_is_told_of_with_its_choices_and_default() -> None:
    _, *sections = re.split(r"^##+ (.*)$", (ROOT / "docs/storyboard.md").read_text(), flags=re.MULTILINE)
    assert sections[::2] == list(MODELS)
    for heading, text in zip(sections[::2], sections[1::2], strict=True):
        fields = {info.alias or name: info for name, info in MODELS[heading].model_fields.items()}
        rows = {name: (default.strip("`"), told) for name, default, told in FIELD.findall(text)}
        assert list(rows) == list(fields)
        for name, info in fields.items():
            default, told = rows[name]
            parts = get_args(info.annotation)
            choices = [choice for part in parts for choice in (part, *get_args(part)) if isinstance(choice, str)]
            assert [choice for choice in choices if f"`{choice}`" not in told] == [], name
            assert (default == "needed") == info.is_required(), name
            if info.default is None or isinstance(info.default, str | int | float):
                assert default == ("-" if info.default is None else str(info.default) or '""'), name


def test_there_are_commands_to_check() -> None:
    assert len(LONGTAKE) > 25
    assert {page for page, _ in LONGTAKE} >= {"README.md", "deployment.md", "settings.md"}


@pytest.mark.parametrize(("page", "line"), LONGTAKE, ids=[f"{page}:{line[:60]}" for page, line in LONGTAKE])
def test_longtake_understands_it(page: str, line: str) -> None:
    options = _parser().parse_args(words_of(line)[1:])
    assert callable(options.command)


@pytest.mark.parametrize(("page", "line"), commands("ray"))
def test_ray_understands_it(page: str, line: str) -> None:
    from ray.scripts.scripts import cli

    words = words_of(line)[1:]
    a_file = str(ROOT / "pyproject.toml")
    words = [a_file if word.endswith(".yaml") and words[0] != "job" else word for word in words]
    if words[0] == "job":
        words, inner = words[1:], words[words.index("--") + 2 :]
        _parser().parse_args(inner)
        from ray.dashboard.modules.job.cli import job_cli_group as cli
    cli.commands[words[0]].make_context(words[0], words[1:])


RUN = [
    (page, line)
    for page, line in LONGTAKE
    if words_of(line)[1] in ("manifest", "schedule", "schema") and "--schedules s3:" not in line
]
"""Those that need no object storage."""
RUN_PAGES = sorted({page for page, _ in RUN})


@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_commands_that_can_run_here_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], page: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.schedules.render", lambda request: 0)
    Path("film.yaml").write_text("shots:\n  - {duration: 2s, prompt: a red circle}\n")
    guide = (ROOT / "docs/deployment.md").read_text()
    [template] = re.findall(r"^```yaml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    Path("news.yaml").write_text(template)
    Path("cities.csv").write_text("city,sky,seconds\nOslo,clear,2\nRome,cloudy,3s\n")
    for line in (line for name, line in RUN if name == page):
        assert main(words_of(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
        assert capsys.readouterr().out, line


def test_the_pages_that_run_are_those_with_something_to_run() -> None:
    assert {"README.md", "deployment.md"} <= set(RUN_PAGES)
    assert len(RUN) >= 12
