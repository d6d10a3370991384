"""The scripts are one program but for what each variant's docstring lists: by syntax tree and to the letter."""
import ast
import copy
import difflib
import re
from functools import cache

import pytest
from tools import diffs, sync
from tools.sync import FULL, OTHERS, ROOT, SURROUND, VARIANTS, claims, flags_of, name_of, parsed

EVERY_SCRIPT, EVERY_VARIANT = (pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)
                               for paths in ([FULL, *OTHERS, *VARIANTS], VARIANTS))
BY_NAME = {path.stem: path for path in VARIANTS}


# ----------------------------------------------------------------------------------------------------------------------
# A script as named pieces of text
# ----------------------------------------------------------------------------------------------------------------------
@cache
def without_docstrings(node):
    """A definition's syntax tree as text, its docstrings taken out of it."""
    node = copy.deepcopy(node)
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(node)


@cache
def pieces(source):
    """-> {name: text} of every top-level definition and, as Args.x, of every flag, in order; {name: syntax tree} of the
    definitions; and the lines that belong to none of them (the module's docstring and that of Args left out)."""
    tree, lines = parsed(source), source.splitlines()
    (args,) = (node for node in tree.body if name_of(node) == "Args")
    groups = [node for node in tree.body if flags_of(node)]
    texts, trees, outside = {}, {}, set(range(len(lines)))

    def take(name, node, last):
        first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
        assert name not in texts, f"{name} is defined twice"
        texts[name] = "\n".join(lines[first - 1:last])
        outside.difference_update(range(first - 1, last))

    for node in tree.body:
        if name_of(node) is not None and node not in [args, *groups]:
            take(name_of(node), node, node.end_lineno)
            trees[name_of(node)] = node
    for group in groups:
        for node, following in zip(group.body, group.body[1:] + [None]):
            if isinstance(node, ast.AnnAssign):
                take(f"Args.{node.target.id}", node, (following or node).end_lineno)
    for docstring in (tree.body[0], args.body[0]):
        outside.difference_update(range(docstring.lineno - 1, docstring.end_lineno))
    return texts, trees, [lines[i] for i in sorted(outside) if lines[i].strip()]


def drift(full, variant, listed=None):
    """Where a variant's source is not what its docstring (or `listed`) says, one sentence each."""
    listed = listed or claims(variant)
    (ours, our_trees, our_rest), (theirs, their_trees, their_rest) = pieces(full), pieces(variant)
    flags = {f"Args.{name}" for name in listed["flags"]}
    allowed = listed["changed"] | flags
    found = [f"{name} is listed twice" for name in listed["changed"] & (listed["removed"] | listed["added"])]
    found += [f"{name} is listed as changed but does not exist in both" for name in listed["changed"]
              if name not in ours.keys() & theirs.keys()]
    found += [f"{name} is listed as changed but is the same" for name in listed["changed"] & ours.keys() & theirs.keys()
              if without_docstrings(our_trees[name]) == without_docstrings(their_trees[name])]
    found += [f"{name} is listed but is the same" for name in flags if ours.get(name) == theirs.get(name)]
    found += [f"{name} differs" for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]
              and name not in allowed]
    found += [f"{name} is missing" for name in ours.keys() - theirs.keys() - listed["removed"] - flags]
    found += [f"{name} is listed as removed" for name in listed["removed"] if name in theirs or name not in ours]
    found += [f"{name} is extra" for name in theirs.keys() - ours.keys() - listed["added"] - flags]
    found += [f"{name} is listed as added" for name in listed["added"] if name in ours or name not in theirs]
    order = [[name for name in one if name in other] for one, other in ((ours, theirs), (theirs, ours))]
    found += ["the order of the definitions differs"] * (order[0] != order[1])
    found += ["imports, headings, comments or the header differ"] * (our_rest != their_rest)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The scripts as they are
# ----------------------------------------------------------------------------------------------------------------------
def test_all_variants_are_compared():
    assert {path.stem for path in VARIANTS} >= {"spowl_fixed_threshold", "spowl_plan_only", "spowl_policy_only",
                                                "spowl_decoder"}
    folders = ("spowl_*.py", "ablations/*.py", "baselines/*.py")  # other files in the root are their owner's
    extra = {path for folder in folders for path in ROOT.glob(folder)} - {FULL, *OTHERS, *VARIANTS}
    assert not extra, f"the docstring of {extra} must say 'Differs from' or 'Shares with' which script, and in what"


@EVERY_VARIANT
def test_variant_is_the_other_script_but_for_what_it_lists(path):
    assert drift(VARIANTS[path].read_text(), path.read_text()) == []


@EVERY_VARIANT
def test_sync_has_nothing_to_write(path):
    assert sync.synced(VARIANTS[path].read_text(), path.read_text()) == path.read_text()


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_another_method_has_the_same_around_it(path):
    """What surrounds the method but for what is listed as its own, the imports, the header and the definitions listed
    as the same are the other script's."""
    full, other = OTHERS[path].read_text(), path.read_text()
    around = full.partition(SURROUND)[2]
    for name in claims(other)["own"]:
        theirs, its = (pieces(source)[0][name] for source in (full, other))
        assert around.count(theirs) == 1 and theirs != its, name
        around = around.replace(theirs, its)
    assert around == other.partition(SURROUND)[2]
    assert sync.imports(full) == sync.imports(other) and full.partition('"""')[0] == other.partition('"""')[0]
    ours, theirs = pieces(full)[0], pieces(other)[0]
    for name in claims(other)["same"]:
        assert ours[name] == theirs[name], name
    method = {name for name, text in pieces(other.partition(SURROUND)[0])[0].items() if ours.get(name) == text}
    assert {name for name in method if not name.startswith("Args.")} == claims(other)["same"]
    assert sync.surrounded(full, other) == other
    change = lambda source: source.replace("least=300.0", "least=301.0").replace("INT\", whole", "INT\", float")
    assert change(full).count("least=301.0") == change(full).count("INT\", float") == 1
    assert sync.surrounded(change(full), other) == change(other)


@EVERY_SCRIPT
def test_nothing_is_left_over(path):
    """Every definition and every import of a script is used in it."""
    tree = parsed(path.read_text())
    imported = {(alias.asname or alias.name).split(".")[0] for node in tree.body
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert (imported | {name_of(node) for node in tree.body} - {None}) - used == set()


@EVERY_SCRIPT
def test_every_flag_is_read_or_said_to_be_without_effect(path):
    texts = pieces(path.read_text())[0]
    flags = {name.removeprefix("Args."): text for name, text in texts.items() if name.startswith("Args.")}
    code = "\n".join(text for name, text in texts.items() if not name.startswith("Args.") and name != "rules")
    silent = {name for name in flags if "without effect" in flags[name]}
    read = {name for name in flags if re.search(rf"\b(args|Args\(\)\))\.{name}\b", code)}
    assert read == flags.keys() - silent


@EVERY_SCRIPT
def test_a_script_stands_alone(path):
    """No script imports another, or anything else of this repository."""
    nodes = list(ast.walk(parsed(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    folders = {found.name for found in ROOT.iterdir() if found.is_dir() and found.name not in (".venv", "runs")}
    ours = folders | {found.stem for place in (".", *folders) for found in (ROOT / place).glob("*.py")}
    assert {"benchmark", "tools", "sync", "spowl_continuous"} <= ours
    assert {name.split(".")[0] for name in names} & ours == set()


AIMS = {"spowl_plan_only": 60, "spowl_policy_only": 60, "spowl_fixed_threshold": 80, "spowl_decoder": 40}


@pytest.mark.parametrize("path", [BY_NAME[name] for name in AIMS], ids=AIMS)
def test_a_variant_is_a_short_diff(path):
    """Lines that a variant has and the full agent has not."""
    lines = list(difflib.unified_diff(VARIANTS[path].read_text().splitlines(), path.read_text().splitlines(), n=0))[2:]
    assert 0 < sum(line.startswith("+") for line in lines) < AIMS[path.stem]


# ----------------------------------------------------------------------------------------------------------------------
# Drift on purpose
# ----------------------------------------------------------------------------------------------------------------------
PLANTED = {  # what somebody might do to one script and forget in the others -> what is reported
    "a constant in a shared function": ("+ 1e-5)", "+ 1e-6)", ["layer_norm differs"]),
    "an argument of a shared function": ("def symlog(x):", "def symlog(x, base=None):", ["symlog differs"]),
    "a shared docstring": ("Inverse of symlog.", "The inverse of symlog.", ["symexp differs"]),
    "a comment in a shared function": ("# the oldest row first", "# in order", ["begin differs"]),
    "a decorator": ('"num_updates"), donate_argnames="agent")', '"num_updates"))', ["update_many differs"]),
    "a field of a tuple": ("    head: jax.Array\n", "    first: jax.Array\n", ["Buffer differs"]),
    "a default": (" gamma: Share = 0.975", " gamma: Share = 0.99", ["Args.gamma differs"]),
    "a range": ("    num_q: Count", "    num_q: Natural", ["Args.num_q differs"]),
    "a flag's docstring": ('"""sequences per update"""', '"""batch"""', ["Args.batch_size differs"]),
    "an assignment": ('FREE_ON_RESUME = ("total_timesteps", ', "FREE_ON_RESUME = (", ["FREE_ON_RESUME differs"]),
    "another name": ("def masked_mean(", "def average(", ["average is extra", "masked_mean is missing"]),
    "a new function": ("def symexp(x):", "def identity(x):\n    return x\n\n\ndef symexp(x):", ["identity is extra"]),
    "a new flag": ("    num_q: Count = 5", "    num_r: Count = 5\n    num_q: Count = 5", ["Args.num_r is extra"]),
    "an import": ("import ctypes\n", "", ["imports, headings, comments or the header differ"]),
    "a pin": ("optax==0.2.8", "optax==0.2.7", ["imports, headings, comments or the header differ"]),
    "a heading": ("\n# Losses\n", "\n# All losses\n", ["imports, headings, comments or the header differ"]),
    "a statement": ("norm_mish.defvjp(", "norm_mish.def_vjp(", ["imports, headings, comments or the header differ"]),
}


@pytest.mark.parametrize("path", list(VARIANTS)[:1], ids=lambda path: path.stem)
@pytest.mark.parametrize("what", PLANTED)
def test_planted_drift_is_reported(path, what):
    """In whichever of the two it is planted."""
    old, new, expected = PLANTED[what]
    full, variant = FULL.read_text(), path.read_text()
    assert full.count(old) > 0 and variant.count(old) > 0
    assert set(expected) <= set(drift(full, variant.replace(old, new)))
    assert drift(full.replace(old, new), variant) != []
    assert drift(full.replace(old, new), variant.replace(old, new)) == []


@EVERY_VARIANT
def test_an_untrue_list_is_reported(path):
    """A listed name that is the same, one that is gone on both sides, and a change that is not listed."""
    full, variant = VARIANTS[path].read_text(), path.read_text()
    listed = claims(variant)
    claim = lambda kind, name: drift(full, variant, listed | {kind: listed[kind] | {name}})
    assert claim("changed", "write_csv") == ["write_csv is listed as changed but is the same"]
    assert claim("changed", "nowhere") == ["nowhere is listed as changed but does not exist in both"]
    assert claim("flags", "env_id") == ["Args.env_id is listed but is the same"]
    assert claim("removed", "write_csv") == ["write_csv is listed as removed"]
    assert claim("added", "write_csv") == ["write_csv is listed as added"]
    for kind, names in listed.items():
        for name in names:
            (sentence,) = drift(full, variant, listed | {kind: names - {name}})
            assert re.fullmatch(rf"(Args\.)?{name} (differs|is missing|is extra)", sentence)


@EVERY_VARIANT
def test_another_order_is_reported(path):
    source = path.read_text()
    one, other = (pieces(source)[0][name] for name in ("write_csv", "checkpoints"))
    before, _, rest = source.partition(one)
    between, _, after = rest.partition(other)
    moved = before + other + between + one + after
    assert drift(VARIANTS[path].read_text(), moved) == ["the order of the definitions differs"]


SHARED = {  # what is changed in the full agent alone, and then written into the others
    "a constant": ("+ 1e-5)", "+ 1e-6)"), "a heading": ("\n# Losses\n", "\n# All losses\n"),
    "an import": ("import copy\n", "import cmd\nimport copy\n"),
    "a flag": ("    num_q: Count = 5", "    num_q: Count = 7"),
    "a new function": ("def symexp(x):", "def identity(x):\n    return x\n\n\ndef symexp(x):"),
    "a removed function": ("def episode_seed(", "def seed_of_episode("),
    "what surrounds the method": ("# From here on, what surrounds", "# From here on what surrounds"),
}


@pytest.mark.parametrize("path", [BY_NAME["spowl_policy_only"], BY_NAME["tdmpc2"]], ids=lambda path: path.stem)
@pytest.mark.parametrize("what", SHARED)
def test_sync_writes_what_is_shared_and_keeps_what_is_not(path, what):
    old, new = SHARED[what]
    full, variant = FULL.read_text(), path.read_text()
    assert full.count(old) == 1 or what == "a constant"
    changed = full.replace(old, new)
    assert drift(changed, variant) != []
    written = sync.synced(changed, variant)
    assert drift(changed, written) == [] and new in written
    assert sync.synced(full, written) == variant


def test_page_of_diffs_is_current():
    """tools/diffs.md is what `python tools/diffs.py` writes."""
    assert (ROOT / "tools" / "diffs.md").read_text() == diffs.page()
