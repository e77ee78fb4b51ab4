"""Train `smol`'s adapter: an hour or two on a free core, longer on a shared machine; a stopped run continues.

    python tests/long/smol_train.py build/smol --work build/smol-work --out build/smol-adapter

The environment that makes a step several times faster on a shared machine is in `edgesafe/reference/smol/run.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.reference.smol.run import make_adapter
from edgesafe.reference.smol.train import Settings


def main() -> None:
    """Train, and print where the adapter lies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path, help="`smol` without an adapter, as `edgesafe reference smol` builds it")
    parser.add_argument("--work", type=Path, required=True, help="pictures, states, answers, log; a stopped run continues here")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets adapter.safetensors")
    parser.add_argument("--start", type=Path, help="an adapter's folder: go on from it, by the last two stages")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of everything drawn (default: %(default)s)")
    parser.add_argument("--lean", type=int, default=Settings.lean, help="pictures that show a part of their patches")
    parser.add_argument("--whole", type=int, default=Settings.whole, help="pictures in whole")
    parser.add_argument("--whole-lr", type=float, default=Settings.whole_lr, help="learning rate beside these")
    parser.add_argument("--often", type=int, default=Settings.often, help="times as often a dangerous thing comes in both")
    parser.add_argument("--harm-weight", type=float, default=Settings.harm_weight, help="of a harmful request's loss, for 1")
    args = parser.parse_args()
    settings = Settings(
        seed=args.seed,
        lean=args.lean,
        whole=args.whole,
        whole_lr=args.whole_lr,
        often=args.often,
        harm_weight=args.harm_weight,
    )
    print(make_adapter(args.base, args.work, args.out, settings, args.start))


if __name__ == "__main__":
    main()
