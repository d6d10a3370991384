"""What SafeDreamer's world model sees: pictures of its two cameras beside those that it decodes.

    python probe/reconstruct.py runs/RUN --picture reconstruction.png

RUN is a run directory of baselines/safedreamer.py --inputs vision. The newest agent steps of its replay buffer that lie
in one episode are filtered as in training. Above what was seen, below what the model decodes: up to the red line from
states that have seen the pictures so far, beyond it imagined from the actions alone."""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines import safedreamer


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """run directory whose newest checkpoint holds model and buffer"""
    picture: Path
    """png to write"""
    environment: int = 0
    """whose pictures"""
    seen: int = 6
    """agent steps whose pictures the model sees"""
    imagined: int = 6
    """agent steps after them, whose pictures it does not see"""


def window(rows, length):
    """The newest `length` rows (T, ...) that lie in one episode."""
    ends = np.flatnonzero(rows.done > 0) + 1
    for end in [len(rows.done), *ends[::-1]]:
        begin = max(ends[ends < end], default=0)
        if end - begin >= length:
            return jax.tree.map(lambda x: x[end - length:end], rows)
    raise SystemExit(f"no episode in the buffer is {length} agent steps long: lower --seen or --imagined")


def decoded(args, model, rows, seen, key):
    """Pictures (T, O) that the model decodes for the next observations of rows (T, 1, ...): of filtered states up to
    `seen`, of imagined ones after it."""
    key_filter, *keys = jax.random.split(key, 1 + len(rows.reward))
    (latents, _), _ = safedreamer.observe(args, model, jax.tree.map(lambda x: x[:seen], rows), key_filter)
    pictures, latent = list(safedreamer.decode(args, model, latents)), jax.tree.map(lambda x: x[-1], latents)
    for action, key in zip(rows.action[seen:], keys):
        latent = safedreamer.imagine(args, model, latent, action, key)
        pictures.append(safedreamer.decode(args, model, latent))
    return np.stack(pictures)[:, 0]


def sheet(true, made, seen):
    """(T, O) each -> one picture: front as seen, as decoded, back as seen, as decoded, a column for every step."""
    rows = []
    for colours in (slice(0, 3), slice(3, 6)):
        for each in (true, made):
            views = each.reshape(len(each), safedreamer.PIXELS, safedreamer.PIXELS, safedreamer.COLOURS)[..., colours]
            rows.append(np.concatenate(list(np.pad(views, [(0, 0), (2, 2), (2, 2), (0, 0)], constant_values=1.0)), 1))
    picture = np.round(255 * np.clip(np.concatenate(rows), 0.0, 1.0)).astype(np.uint8)
    column = seen * (safedreamer.PIXELS + 4)
    picture[:, column - 1:column + 1] = (200, 0, 0)
    return picture


def main(options):
    try:
        info = json.loads((options.run / "args.json").read_text())
        args = safedreamer.Args(**info["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{options.run} is not a run directory of safedreamer.py: {error}")
    if args.inputs != "vision":
        raise SystemExit(f"{options.run} was not trained with --inputs vision")
    if not 0 <= options.environment < args.num_envs:
        raise SystemExit(f"--environment must be from 0 to {args.num_envs - 1}")
    if min(options.seen, options.imagined) < 1:
        raise SystemExit("--seen and --imagined must be at least 1")
    if not options.picture.parent.is_dir():
        raise SystemExit(f"--picture {options.picture}: there is no directory {options.picture.parent}")
    if options.picture.suffix != ".png":
        raise SystemExit(f"--picture {options.picture} must end in .png")
    obs_dim, found = safedreamer.PIXELS**2 * safedreamer.COLOURS, safedreamer.checkpoints(options.run)
    if not found:
        raise SystemExit(f"{options.run} has no checkpoint")
    with np.load(found[-1]) as file:
        if "['buffer'].rows.action" not in file:
            raise SystemExit(f"{found[-1]} holds no replay buffer: it is an agent alone")
        actions = file["['buffer'].rows.action"].shape[-1]
    shapes = jax.eval_shape(partial(safedreamer.fresh, args, (obs_dim, actions)), jax.random.key(0))
    trees, _ = safedreamer.load_checkpoint(options.run, {name: shapes[name] for name in ("agent", "buffer")})
    buffer = trees["buffer"]
    order = np.arange(int(buffer.head) - int(buffer.size), int(buffer.head))  # oldest first
    rows = jax.tree.map(lambda x: np.asarray(x)[order, options.environment], buffer.rows)
    rows = window(rows, options.seen + options.imagined)
    rows = rows._replace(obs=rows.obs / np.float32(255), next_obs=rows.next_obs / np.float32(255))
    batch = jax.tree.map(lambda x: jnp.asarray(x)[:, None], rows)
    made = decoded(args, trees["agent"].model, batch, options.seen, jax.random.key(0))
    Image.fromarray(sheet(rows.next_obs, made, options.seen)).save(options.picture)
    error = ((made - rows.next_obs) ** 2).mean(-1)
    print(f"mean squared error of a pixel, seen and imagined: {error[:options.seen].mean():.4f}, "
          f"{error[options.seen:].mean():.4f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
