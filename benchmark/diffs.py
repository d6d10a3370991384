"""Write diffs.md: how each variant differs from the script it is a variant of, removed definitions in their first line.

    python benchmark/diffs.py
"""
import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FULL = ROOT / "spowl_continuous.py"
PAIRS = {ROOT / name: FULL for name in ("spowl_plan_only.py", "spowl_policy_only.py", "spowl_fixed_threshold.py",
                                        "ablations/spowl_decoder.py", "baselines/tdmpc2.py")}
PAIRS[ROOT / "baselines" / "cpo.py"] = ROOT / "baselines" / "ppo_lagrangian.py"
INTRODUCTION = """# The variants as diffs

What `diff SCRIPT VARIANT` shows, SCRIPT the one that it is a variant of, after the module's docstring. `@@` names the
definition a change lies in; a definition that is removed whole is shown by its first line. Written by `python benchmark/diffs.py`; a test compares
this page with the scripts.
"""
DEFINITION = ("def ", "class ", "@")


def split(path):
    """A script's docstring and the lines that follow it."""
    source = path.read_text()
    tree = ast.parse(source)
    return ast.get_docstring(tree), source.splitlines()[tree.body[0].end_lineno:]


def hunks(full, variant):
    """The lines of a diff without context, each hunk under the name of the definition that it begins in."""
    shown = []
    for kind, start, end, their_start, their_end in difflib.SequenceMatcher(None, full, variant, False).get_opcodes():
        if kind == "equal":
            continue
        removed, added = full[start:end], variant[their_start:their_end]
        if kind == "delete" and any(line.startswith(DEFINITION) for line in removed):
            removed = [line for line in removed if line.startswith(DEFINITION)]
        else:
            above = [line for line in full[:start + 1] if line.startswith(DEFINITION[:2])]
            shown.append("@@ " + above[-1].split()[1].split("(")[0].rstrip(":"))
        shown += [("-" + line).rstrip() for line in removed] + [("+" + line).rstrip() for line in added]
    return shown


def page():
    """The text of diffs.md."""
    parts = [INTRODUCTION]
    for path, other in PAIRS.items():
        (_, full), (docstring, variant), lines = split(other), split(path), other.read_text().splitlines()
        name, differs = re.search(r"Differs from (\S+) in\n((?: {4}.*\n?)+)", docstring).groups()
        every = list(difflib.unified_diff(lines, path.read_text().splitlines(), n=0))[2:]
        removed, added = (sum(line.startswith(sign) for line in every) for sign in "-+")
        left = len(lines) - removed + added
        parts.append(f"## {path.relative_to(ROOT)}\n\n{left} lines: {removed} of the {len(lines)} of {name} removed or "
                     f"replaced, {added} of its own.\n\n```\n{differs.rstrip()}\n```\n\n```diff\n"
                     + "\n".join(hunks(full, variant)) + "\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "benchmark" / "diffs.md").write_text(page())
