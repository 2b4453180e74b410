"""What the documentation says is run: every Python block, every doctest, every command of the README."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import danlu

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FAMILIES = sorted(
    path.parent.name
    for path in (ROOT / "src" / "danlu").glob("*/__init__.py")
    if path.parent.name not in ("_common", "kernels", "lab", "integrations")
)
MODULES = sorted(m.name for m in pkgutil.walk_packages(danlu.__path__, "danlu.") if not m.name.endswith("__main__"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page share one namespace, as a reader pastes them one after the other."""
    text = "\n".join(blocks(page, "python"))
    if "transformers" in text:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    if name.startswith("danlu.integrations.transformers"):
        pytest.importorskip("transformers")
    if name.endswith("_triton"):
        pytest.importorskip("triton")
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


README_COMMANDS = [
    line.split("#")[0].strip() for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()
]


def test_readme_has_its_commands():
    assert "make demo" in README_COMMANDS
    assert sum(command.startswith("danlu ") for command in README_COMMANDS) == 4


def test_readme_commands_of_danlu_run(tmp_path):
    """As written and in their order, but for a budget of seconds and a store of their own."""
    for command in README_COMMANDS:
        if not command.startswith("danlu "):
            continue
        words = command.replace("--size demo", "--size ci").split()[1:]
        done = subprocess.run(
            [sys.executable, "-m", "danlu", *words, "--store", str(tmp_path / "store")],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("command", [c for c in README_COMMANDS if c.startswith("make ")])
def test_readme_targets_of_make_exist(command):
    """Running them from a test would recurse; continuous integration runs `make test`."""
    done = subprocess.run(
        ["make", "--dry-run", command.split()[1]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "danlu run tiger tailr rerope" in done.stdout or "pytest" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_every_public_name_has_an_api_page():
    for family in FAMILIES:
        page = (ROOT / "docs" / "api" / f"{family}.md").read_text()
        assert f"::: danlu.{family}" in page
    for name in (
        "danlu.integrations.transformers",
        "danlu.integrations.transformers_attention",
        "danlu.integrations.transformers_penalty",
        "danlu.lab.trial",
        "danlu.lab.runner",
        "danlu.lab.stats",
    ):
        assert any(f"::: {name}" in path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")), name


def test_site_builds_without_warnings(tmp_path):
    if not importlib.util.find_spec("zensical"):
        pytest.skip("zensical is not installed; `make docs` builds the site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "docs")}
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (ROOT / "site").rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert [one for one in loaded if "canonical" not in one] == [], page
