"""README and docs/: links lead somewhere, every script has its page, every logged number is explained on it. Lint."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tools/diffs.md")),
         *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [*sorted(ROOT.glob("spowl_*.py")), *sorted(ROOT.glob("ablations/*.py")), *sorted(ROOT.glob("baselines/*.py"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
TAG = re.compile(r"""["'{ ](?:charts|cvpo|eval|critic|losses|lagrangian|planner|time)/[a-zA-Z_]+""")


def anchors(page):
    """The fragments that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if not link.startswith("http"):
            path, _, fragment = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_has_its_page_and_the_readme_leads_to_it(script):
    page = ROOT / "docs" / f"{script.stem}.md"
    assert f"]({Path('..') / script.relative_to(ROOT)})" in page.read_text()
    assert f"](docs/{page.name})" in (ROOT / "README.md").read_text()


def logged_tags(script):
    """Every tag in a script's text; names that are put together are written out here, from the dicts they come from."""
    text = script.read_text()
    tags = {tag[1:] for tag in TAG.findall(text)}
    for terms in re.findall(r"    terms = \{.*?    \}", text, re.DOTALL):
        tags |= {f"losses/{name}" for name in re.findall(r'^        "(\w+)": ', terms, re.MULTILINE)}
    tags |= {f"losses/{name}" for name in re.findall(r'    losses\["(\w+)"\] = ', text)}
    for *groups, before in re.findall(r'groups = .*"(\w+)", "(\w+)", \*\(f"(before_)', text):  # of the critic
        for tag in [tag for tag in tags if tag.startswith("critic/") and tag.endswith("_")]:
            tags = tags - {tag} | {tag + name for name in (*groups, *(f"{before}{k}" for k in range(1, 6)))}
    for begin, ends in {"charts/episodic_": ("return", "cost", "length"), "time/": ("env", "act", "update"),
                        "eval/": ("episodic_return", "episodic_cost", "balance")}.items():
        assert f'f"{begin}{{' in text  # the names that follow stand beside it
        tags |= {begin + end for end in ends}
    return tags - {"losses/", "charts/episodic_"}


def test_the_tags_are_found():
    """The full agent's, counted by hand: 13 losses, 3 of the multiplier, 4 of the planner, 7 charts, 3 times, 3 eval,
    15 of the critic."""
    assert len(logged_tags(ROOT / "spowl_continuous.py")) == 13 + 3 + 4 + 7 + 3 + 3 + 15


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_logged_number_is_explained(script):
    """On the script's own page, or on the full agent's, which it refers to."""
    explained = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in (script.stem, "spowl_continuous"))
    assert {tag for tag in logged_tags(script) if f"`{tag}`" not in explained} == set()


def test_ruff_finds_nothing():
    folders = [ROOT / name for name in ("ablations", "baselines", "benchmark", "probe", "tests", "tools")]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *ROOT.glob("spowl_*.py"), *folders]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
