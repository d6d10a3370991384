"""Write diffs.md: how each variant differs from the script it is a variant of, removed definitions in their first line.

    python tools/diffs.py
"""
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.sync import VARIANTS, parsed, relation

INTRODUCTION = """# The variants as diffs

What `diff SCRIPT VARIANT` shows, SCRIPT the one that it is a variant of, after the module's docstring. `@@` names the
definition a change lies in; a definition that is removed whole is shown by its first line. Written by
`python tools/diffs.py`; a test compares this page with the scripts.
"""
DEFINITION = ("def ", "class ", "@")


def after_docstring(path):
    """The lines that follow a script's docstring."""
    source = path.read_text()
    return source.splitlines()[parsed(source).body[0].end_lineno:]


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
    for path in sorted(VARIANTS, key=lambda path: (len(path.parts), path)):  # those of the top level first
        _, other, differs = relation(path.read_text())
        lines, name = other.read_text().splitlines(), other.relative_to(ROOT)
        every = list(difflib.unified_diff(lines, path.read_text().splitlines(), n=0))[2:]
        removed, added = (sum(line.startswith(sign) for line in every) for sign in "-+")
        left = len(lines) - removed + added
        parts.append(f"## {path.relative_to(ROOT)}\n\n{left} lines: {removed} of the {len(lines)} of {name} removed or "
                     f"replaced, {added} of its own.\n\n```\n{differs}\n```\n\n```diff\n"
                     + "\n".join(hunks(after_docstring(other), after_docstring(path))) + "\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "tools" / "diffs.md").write_text(page())
