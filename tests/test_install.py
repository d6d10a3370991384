"""The installation: both requirements.txt, the header that `uv run` reads, what is there, the simulator's import."""
import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import spowl_continuous as spowl

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("spowl_*.py"))
FOLDERS = [ROOT / name for name in ("ablations", "baselines", "benchmark", "probe", "tests", "tools")]
SOURCES = SCRIPTS + [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "safety_gymnasium": "safety-gymnasium"}
HEADER = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", re.MULTILINE)
WITH_HEADER = [path for path in SOURCES if path in SCRIPTS or HEADER.search(path.read_text())]


FILES = (ROOT / "requirements.txt", ROOT / "benchmark" / "requirements.txt")


def read_requirements(files=FILES):
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for path in files for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def applies(requirement, python):
    """Whether a requirement is selected on this system with that Python."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def exact_version(requirement):
    """The version in `name==version`, None for any other specifier."""
    specifiers = list(requirement.specifier)
    is_exact = len(specifiers) == 1 and specifiers[0].operator == "==" and "*" not in specifiers[0].version
    return specifiers[0].version if is_exact else None


def pins(python):
    """{name: version} of both files for that Python."""
    return {canonicalize_name(r.name): exact_version(r) for r in read_requirements() if applies(r, python)}


def imported_packages(path):
    """The third-party top-level modules that a file imports, at its top or inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    local = {source.stem for source in SOURCES} | {source.parent.name for source in SOURCES}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - local


@functools.cache
def installed_modules():
    """Import name -> distributions; reading it takes a second."""
    return metadata.packages_distributions()


def distribution(module):
    """import name -> canonical distribution name, e.g. yaml -> pyyaml."""
    found = installed_modules().get(module, [module])
    return canonicalize_name(DISTRIBUTIONS.get(module, found[0]))


def read_header(path):
    """The `# /// script` block of a file as a dict."""
    blocks = HEADER.findall(path.read_text())
    assert len(blocks) == 1, f"{path.name} needs exactly one script header"
    return tomllib.loads("\n".join(line[2:] for line in blocks[0].splitlines()))


def run_python(code, *arguments, folder):
    """The JSON in the last line that code prints in a fresh interpreter, whose directory and home are `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-B", "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Pins
# ----------------------------------------------------------------------------------------------------------------------
def test_there_are_scripts_to_check():
    assert ROOT / "spowl_continuous.py" in SCRIPTS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_pinned(path):
    missing = {module for module in imported_packages(path) if distribution(module) not in pins("3.11")}
    assert not missing


def test_the_scripts_need_the_first_file_alone():
    """Only sweep.py and its test need more; plots and the measurement of speed do not."""
    first = {canonicalize_name(requirement.name) for requirement in read_requirements(FILES[:1])}
    needy = {path.name for path in SOURCES
             if any(distribution(module) not in first for module in imported_packages(path))}
    assert needy == {"sweep.py", "test_sweep.py"}


def test_every_requirement_is_exact():
    assert [str(r) for r in read_requirements() if exact_version(r) is None or r.url or r.extras] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_name_is_selected_once(python):
    names = sorted(canonicalize_name(r.name) for r in read_requirements() if applies(r, python))
    assert names == sorted({canonicalize_name(r.name) for r in read_requirements()})


def test_installed_versions_are_the_pins():
    expected = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    assert {name: installed.get(name) for name in expected} == expected


# ----------------------------------------------------------------------------------------------------------------------
# Script headers
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", WITH_HEADER, ids=lambda path: path.name)
def test_header_admits_these_pythons(path):
    admitted = SpecifierSet(read_header(path)["requires-python"])
    assert [python for python in ("3.10", *PYTHONS, "3.15") if admitted.contains(f"{python}.1")] == list(PYTHONS)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("path", WITH_HEADER, ids=lambda path: path.name)
def test_header_resolves_to_the_pins(path, python):
    header = read_header(path)
    overrides = [Requirement(text) for text in header["tool"]["uv"]["override-dependencies"]]
    dependencies = [Requirement(text) for text in header["dependencies"]]
    overridden = {canonicalize_name(r.name) for r in overrides}
    chosen = [r for r in overrides if applies(r, python)]
    chosen += [r for r in dependencies if applies(r, python) and canonicalize_name(r.name) not in overridden]
    versions = {canonicalize_name(r.name): exact_version(r) for r in chosen}
    assert len(versions) == len(chosen)
    assert versions.items() <= pins(python).items()
    assert all(r.specifier.contains(pins(python)[canonicalize_name(r.name)]) for r in dependencies)
    assert not (overridden - versions.keys()) & pins(python).keys()  # what the header leaves out, requirements.txt does


@pytest.mark.parametrize("path", WITH_HEADER, ids=lambda path: path.name)
def test_header_names_every_import(path):
    named = {canonicalize_name(Requirement(text).name) for text in read_header(path)["dependencies"]}
    assert {distribution(module) for module in imported_packages(path)} <= named


# ----------------------------------------------------------------------------------------------------------------------
# Importing the script, and the simulator through it
# ----------------------------------------------------------------------------------------------------------------------
IMPORT_SCRIPT = """
import json, os, sys, threading
written = []

def watch(event, details):
    writes = event == "open" and (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and details[0] != os.devnull
    if writes or event in ("os.mkdir", "os.rename", "subprocess.Popen", "os.fork"):
        written.append([event, str(details[0]) if details else ""])

import jax, numpy, optax, tyro  # their own doings are not the script's
sys.addaudithook(watch)
before, path = dict(os.environ), list(sys.path)
sys.argv += ["--no-such-flag"]
import spowl_continuous
from jax._src import xla_bridge
print(json.dumps({
    "backends": list(xla_bridge._backends), "environment": dict(os.environ) == before, "path": sys.path == path,
    "simulator": sorted({"safety_gymnasium", "gymnasium", "mujoco", "gymnasium_robotics"} & sys.modules.keys()),
    "x64": jax.config.jax_enable_x64, "threads": threading.active_count(), "written": written}))
"""


def test_import_has_no_side_effects(tmp_path):
    seen = run_python(IMPORT_SCRIPT, folder=tmp_path)
    assert seen == {"backends": [], "environment": True, "path": True, "simulator": [], "x64": False, "threads": 1,
                    "written": []}
    assert list(tmp_path.iterdir()) == []


ROLL_OUT = """
import hashlib, json, sys
import numpy as np
import yaml
from spowl_continuous import import_safety_gymnasium

simulator = import_safety_gymnasium()
assert import_safety_gymnasium() is simulator  # a second call changes nothing
if sys.argv[1] == "stock":
    simulator.world.yaml = yaml
environment = simulator.make(sys.argv[2])
rng = np.random.default_rng(0)
seen = [environment.reset(seed=7)[0]]
for step in range(150):
    action = rng.uniform(environment.action_space.low, environment.action_space.high)
    obs, reward, cost, terminated, truncated, _ = environment.step(action)
    seen += [obs, [reward, cost, terminated, truncated]]
    seen += [environment.reset()[0]] if terminated or truncated or step == 99 else []
trace = np.concatenate(seen)
texture = int(environment.unwrapped.task.model.tex_height.max())
print(json.dumps({"trace": hashlib.sha256(trace.tobytes()).hexdigest(), "dtype": str(trace.dtype),
                  "distinct": len({np.asarray(part).tobytes() for part in seen}), "texture": texture}))
"""


@pytest.mark.parametrize("env_id", ["SafetyPointGoal1-v0", pytest.param("SafetyAntGoal1-v0", marks=pytest.mark.long)])
def test_cheap_sky_changes_no_number(env_id, tmp_path):
    cheap, stock = (run_python(ROLL_OUT, sky, env_id, folder=tmp_path) for sky in ("cheap", "stock"))
    assert cheap["distinct"] > 150 and cheap["dtype"] == "float64"
    assert cheap["trace"] == stock["trace"]
    assert cheap["texture"] == 192 and stock["texture"] > 10_000  # a gradient instead of six images


class RenamedGeom:
    """A mark of a picture as MuJoCo 3.2 has it: other fields cannot be set."""

    __slots__ = ("objtype", "objid", "dataid", "category", "emission", "specular", "shininess", "reflectance", "type",
                 "size", "pos", "mat", "rgba", "label", "matid", "texcoord")

    def __init__(self):
        self.size, self.pos, self.mat, self.rgba = np.zeros(3), np.zeros(3), np.zeros((3, 3)), np.zeros(4)


@pytest.mark.parametrize("version", ["installed", "renamed"])
def test_marks_of_the_lidar_can_be_drawn(monkeypatch, version):
    """gymnasium 0.28 sets fields that are gone in MuJoCo 3.2: what it is asked to draw stands in the scene nonetheless,
    in this MuJoCo's and in one without these fields. No picture is needed for that."""
    import mujoco

    if version == "installed":
        scene = mujoco.MjvScene(mujoco.MjModel.from_xml_string("<mujoco/>"), maxgeom=3)
    else:
        monkeypatch.setattr(mujoco, "MjvGeom", type("MjvGeom", (RenamedGeom,), {"__slots__": ()}))
        scene = types.SimpleNamespace(maxgeom=3, ngeom=0, geoms=[mujoco.MjvGeom() for _ in range(3)])
        assert not {"texid", "texuniform", "texrepeat"} & {*dir(mujoco.MjvGeom)}
    spowl.import_safety_gymnasium()
    from gymnasium.envs.mujoco.mujoco_rendering import BaseRender

    for height in (1.0, 2.0):
        BaseRender._add_marker_to_scene(types.SimpleNamespace(scn=scene), {
            "pos": np.array([0.5, 0.25, height]), "size": 0.125 * np.ones(3), "type": mujoco.mjtGeom.mjGEOM_SPHERE,
            "rgba": np.array([0.0, 1.0, 0.0, 0.5]), "label": ""})
    (one, other), sphere = scene.geoms[:2], mujoco.mjtGeom.mjGEOM_SPHERE
    assert scene.ngeom == 2 and (one.type, other.type) == (sphere, sphere)
    assert [one.pos.tolist(), other.pos.tolist()] == [[0.5, 0.25, 1.0], [0.5, 0.25, 2.0]]
    assert one.size.tolist() == [0.125] * 3 and one.rgba.tolist() == [0.0, 1.0, 0.0, 0.5]
    assert np.array_equal(one.mat, np.eye(3))
