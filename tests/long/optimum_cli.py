"""`optimum-cli export edgesafe` from the installed wheel: the bundle of `edgesafe export`, by its digest.

`make optimum` runs it under build/optimum: the wheel is built and installed there alone, in front of all else on the path. What
the export extra brings is this environment's. The checkpoint is a tiny random LLaVA.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import make_tiny_llava
from wheel import ROOT, build, run

OPTIONS = ("--device", "host", "--vision-scheme", "fp32", "--text-scheme", "fp32", "--exits", "1,3", "--json")
ASKS = ["-m", "optimum.commands.optimum_cli", "export", "edgesafe"]


def main() -> int:
    """Build, install, export twice, compare; then a wrong model, whose exit code must come through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "optimum", help="made anew (build/optimum)")
    folder = parser.parse_args().folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    site, model = folder / "site", folder / "model"
    run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", site, build(folder))
    make_tiny_llava(model)
    python = [sys.executable, "-W", "ignore"]
    where = run(*python, "-c", "import edgesafe_export as e; print(e.__file__)", cwd=folder, PYTHONPATH=str(site)).strip()
    if not Path(where).is_relative_to(site):
        sys.exit(f"edgesafe_export is imported from {where}")
    ours = run(*python, "-m", "edgesafe", "export", model, *OPTIONS, "--out", "ours", cwd=folder, PYTHONPATH=str(site))
    theirs = run(*python, *ASKS, "--model", model, *OPTIONS, "theirs", cwd=folder, PYTHONPATH=str(site))
    digests = [json.loads(text)["digest"] for text in (ours, theirs)]
    if digests[0] != digests[1]:
        sys.exit(f"edgesafe export made {digests[0]}, optimum-cli {digests[1]}")
    line = [*python, *ASKS, "--model", "nothing", "--device", "host", "none"]
    env = os.environ | {"PYTHONPATH": str(site)}
    wrong = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if wrong.returncode != 11 or "InputError" not in wrong.stderr or (folder / "none").exists():
        sys.exit(f"a missing model ended with {wrong.returncode}:\n{wrong.stderr}")
    print(f"optimum-cli and edgesafe export made the same bundle: {digests[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
