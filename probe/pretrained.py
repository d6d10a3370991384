"""Keep what --evaluate needs of a run, and nothing else: its flags and its networks (1.2 MB of the laptop preset).

    python probe/pretrained.py runs/RUN benchmark/pretrained/NAME

Weights are rounded to half precision, as which they are loaded into single. The optimisers' state and the target heads
are set to zero and the replay buffer left out, so such a directory cannot be resumed."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spowl_continuous as spowl


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """run directory, whose newest checkpoint is taken"""
    to: tyro.conf.Positional[Path]
    """directory to make"""


def main(options):
    found = spowl.checkpoints(options.run)
    if not found:
        raise SystemExit(f"{options.run} has no checkpoint")
    if options.to.exists():
        raise SystemExit(f"{options.to} is there already: name another directory")
    try:
        info = json.loads((options.run / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{options.run} is not a run directory: {error}")
    with np.load(found[-1]) as file:
        kept = {name: file[name] for name in file.files if name == "counters" or name.startswith("['agent']")}
    counters = json.loads(str(kept["counters"]))
    counters = {name: counters[name] for name in ("step", "simulated", "cost")}
    for name, value in kept.items():
        if re.search("_opt|optimizers|target", name):
            kept[name] = np.zeros_like(value)
        elif value.ndim and value.dtype == np.float32:
            kept[name] = value.astype(np.float16)
    options.to.mkdir(parents=True)
    (options.to / "args.json").write_text(json.dumps(info, indent=2) + "\n")
    np.savez_compressed(options.to / found[-1].name, **kept | {"counters": np.array(json.dumps(counters))})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
