"""Write into the other scripts what they share with spowl_continuous.py.

A variant, whose docstring says "Differs from SCRIPT in", shares every definition that it does not list there, the
imports, the headings, and all of what surrounds the method. Another method, whose docstring says "Shares with SCRIPT",
shares the definitions listed there, the imports, and what surrounds the method but for definitions listed as its own.

    python tools/sync.py            # write
    python tools/sync.py --check    # exit status 1 and a list if something would be written
"""
import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FULL = ROOT / "spowl_continuous.py"
KINDS = ("changed", "removed", "added", "flags")
SURROUND = "# From here on, what surrounds the method"


parsed = cache(ast.parse)  # nobody changes these trees


@cache
def relation(source):
    """How a script is related to which other one, and the lines that say in what: "Differs from" or "Shares with"."""
    found = re.search(r"(Differs from|Shares with) (\S+\.py).*\n((?: {4}.*\n?)+)", ast.get_docstring(parsed(source)))
    return (found[1], ROOT / found[2], found[3].rstrip()) if found else (None, None, "")


def scripts(how):
    """The scripts that are so related to another one, those related to the full agent first: {path: the other one}."""
    every = sorted({*ROOT.glob("spowl_*.py"), *ROOT.glob("ablations/*.py"), *ROOT.glob("baselines/*.py")} - {FULL})
    found = {path: relation(path.read_text()) for path in every}
    chosen = {path: other for path, (kind, other, _) in found.items() if kind == how}
    return dict(sorted(chosen.items(), key=lambda item: item[1] != FULL))


def claims(source):
    """What a script's docstring lists: {kind: names} from lines such as `changed: act, Actor - why`."""
    how, _, section = relation(source)
    listed = {kind: set() for kind in (KINDS if how == "Differs from" else ("same", "own"))}
    for line in re.sub(r"\n {8,}", " ", section).splitlines():
        kind, names, _ = re.fullmatch(r" {4}(\w+): ([\w, ]+) - (.+)", line).groups()
        listed[kind] |= set(names.split(", "))
    return listed


VARIANTS, OTHERS = scripts("Differs from"), scripts("Shares with")


def name_of(node):
    """The name that a statement defines, None if it does something else."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return getattr(target, "id", None)


def flags_of(node):
    """The flags that a dataclass holds."""
    dataclass = isinstance(node, ast.ClassDef) and node.decorator_list
    return {name_of(field) for field in node.body if isinstance(field, ast.AnnAssign)} if dataclass else set()


@cache
def segments(source):
    """(name, what stands above it, its own text, its syntax tree) of every statement after the module's docstring."""
    lines, tree = source.splitlines(keepends=True), parsed(source)
    found, above = [], tree.body[0].end_lineno
    for node in tree.body[1:]:
        first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])]) - 1
        found.append((name_of(node), "".join(lines[above:first]), "".join(lines[first:node.end_lineno]), node))
        above = node.end_lineno
    return found


def fields(text):
    """The text of a dataclass before its flags, and {name: text} of these with their docstrings."""
    lines, (node,) = text.splitlines(keepends=True), ast.parse(text).body
    starts = [(name_of(field), field.lineno - 1) for field in node.body if isinstance(field, ast.AnnAssign)]
    ends = [start for _, start in starts[1:]] + [len(lines)]
    return "".join(lines[:starts[0][1]]), {name: "".join(lines[start:end]) for (name, start), end in zip(starts, ends)}


def with_flags(full, own, flags):
    """A dataclass of the full agent with the variant's own text of those flags, new ones after the same one as now."""
    head, shared = fields(full)
    text, last = head, None
    theirs = fields(own)[1] if own else {}
    new = {name: before for before, name in zip([None, *theirs], theirs) if name in flags and name not in shared}
    for name in shared:
        if not own or name not in flags or name in theirs:  # a listed flag that is not there is removed
            text, last = text + (theirs[name] if name in flags and name in theirs else shared[name]), name
        while follower := next((flag for flag, before in new.items() if before == last), None):
            text, last = text + theirs[follower], follower
    return text


def synced(full, variant):
    """A variant's source with everything that it shares taken from the full agent's."""
    listed, ours = claims(variant), segments(variant)
    own, names = {name: text for name, _, text, _ in ours if name}, [name for name, *_ in ours]
    text, skipped = "".join(variant.splitlines(keepends=True)[:parsed(variant).body[0].end_lineno]), ""
    for name, above, body, node in segments(full):
        if name in listed["removed"]:
            skipped = skipped or (above if "# ---" in above else "")  # a heading stays for what follows
            continue
        if name in listed["changed"] or name == "Args":
            body = own.get(name, body)
        elif flags_of(node):
            body = with_flags(body, own.get(name), listed["flags"])
        text, skipped = text + (skipped or above) + body, ""
        for added, heading, definition, _ in ours:  # what is its own follows the same definition as now
            if added in listed["added"] and name == names[names.index(added) - 1]:
                text, name = text + heading + definition, added  # and may be followed by more of its own
    return text


def imports(source):
    """A script's text between the module's docstring and its first definition or heading."""
    after = "".join(source.splitlines(keepends=True)[parsed(source).body[0].end_lineno:])
    return after[:after.index("\n# ---")]


def surrounded(full, other):
    """Another method's source with the full agent's imports, the definitions listed as the same, and what surrounds the
    method, but for what is its own there."""
    listed, own = claims(other), {name: text for name, _, text, _ in segments(other)}
    shared = {name: text for name, _, text, _ in segments(full) if name in listed["same"]}
    method = other[:other.index(SURROUND)].replace(imports(other), imports(full), 1)
    for name, _, text, _ in segments(method):
        if name in shared:
            method = method.replace(text, shared[name], 1)
    surround = full[full.index(SURROUND):]
    for name, _, text, _ in segments(full):
        if name in listed["own"]:
            surround = surround.replace(text, own[name], 1)
    return method + surround


def main():
    if set(sys.argv[1:]) - {"--check"}:
        sys.exit("python tools/sync.py [--check]")
    stale = False
    for write, paths in ((surrounded, OTHERS), (synced, VARIANTS)):
        for path, other in paths.items():
            source = path.read_text()
            if (written := write(other.read_text(), source)) != source:
                stale = True
                print(path.relative_to(ROOT))
                if "--check" not in sys.argv:
                    path.write_text(written)
    sys.exit(stale and "--check" in sys.argv)


if __name__ == "__main__":
    main()
