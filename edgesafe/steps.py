"""The steps of `ship` that do not depend on the device: draw, evaluate the untouched model, align.

Each writes a folder of its own, which is not made again while its inputs are the same. Of the reference model a clone carries
the two long ones, the evaluation and the alignment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesafe import __version__
from edgesafe.carried import MADE_OF, carry_evaluation, evaluation_key, has_exits, is_carried, unpack_evaluation
from edgesafe.errors import ConfigError
from edgesafe.format.files import digest_folder, held, sha256_file, write_atomically
from edgesafe.format.suite import ROWS
from edgesafe.format.targets import check_target, work_folder
from edgesafe.progress import step

if TYPE_CHECKING:
    from edgesafe.align.settings import AlignConfig

REFERENCE = Path(__file__).parent / "reference" / "weights"
# What `make align` wrote: what alignment changes in the reference model, and what the untouched model answers to its suite.
ALIGNED, EVALUATED = REFERENCE.parent / "aligned", REFERENCE.parent / "evaluated"
OWN = REFERENCE.parent / "align.toml"  # the settings of the reference model
TRAINING_ROWS = 40_000


@dataclass(frozen=True)
class Shared:
    """The folders of the steps that are the same for every device."""

    data: Path
    suite: Path
    before: Path
    aligned: Path
    carried: tuple[str, ...]  # the steps whose results came with the clone, of "before" and "aligned"


def settings_for(model: Path) -> Path:
    """The file of settings that a model is aligned with where none is named: the reference model's own, or the default."""
    from edgesafe.align.config import default_config

    shapes = [folder / "config.json" for folder in (model, REFERENCE)]
    if not all(path.is_file() for path in shapes) or len({path.read_bytes() for path in shapes}) > 1:
        return default_config()  # without a digest of what may be many GB
    return OWN if digest_model(model) == digest_model(REFERENCE) else default_config()


def shared_steps(
    model: Path,
    work: Path,
    *,
    config: Path | None = None,
    data: Path | None = None,
    suite: Path | None = None,
    retrain: bool = False,
    exits: str | None = None,
) -> Shared:
    """Draw rows and suite, evaluate the untouched model, align it: what does not depend on the device.

    A step lies in WORK/STEP-KEY/STEP; KEY is a digest of what it is made of, which inputs.json beside it lists. So other models
    and settings lie side by side, and a step that is there is not run again. A cut-off alignment resumes.

    Args:
        model: checkpoint folder.
        work: the folder that holds all steps.
        config: alignment settings; by default `settings_for` the model.
        data: training rows of your own.
        suite: certification suite of your own.
        retrain: evaluate and align the reference model here, though the clone carries the results.
        exits: at which the untouched model is evaluated; every depth where None.
    """
    from edgesafe.align.config import read_config
    from edgesafe.checkpoint.changes import MADE_OF as CHANGES
    from edgesafe.checkpoint.changes import apply_changes, made_of

    tower, drawn = digest_model(model), data is None
    data = data or _rows(work)
    suite = suite or _suite(work)
    settings = read_config(config or settings_for(model), data=str(data))
    same = {
        "before": _carries_evaluation(tower, suite, exits or ""),
        "aligned": drawn and made_of(ALIGNED) == carried_key(tower, settings),
    }
    carried = () if retrain else tuple(name for name, is_same in same.items() if is_same)
    before = _before(model, work, tower, suite, "before" in carried, exits or "")
    if "aligned" in carried:
        title = "take the alignment that the clone carries (--retrain aligns here)"
        made = [sha256_file(ALIGNED / CHANGES)]
        aligned = make_step(work, "aligned", made, lambda o: apply_changes(model, ALIGNED, o), title)
    else:
        aligned = _aligned(model, work, tower, settings)
    return Shared(data, suite, before, aligned, carried)


def carry(work: Path) -> None:
    """Align the reference model by its own settings and write what came out, for the clone to carry.

    The untouched model is evaluated too, unless the clone carries that: its answers are the same for every alignment of it.

    Args:
        work: the folder that holds all steps, as for `shared_steps`.
    """
    from edgesafe.align.config import read_config
    from edgesafe.checkpoint.changes import is_changes, write_changes

    check_target(ALIGNED, "stored alignment", is_changes)
    check_target(EVALUATED, "stored evaluation", is_carried)
    settings = read_config(settings_for(REFERENCE), data=str(_rows(work)))
    tower, suite = digest_model(REFERENCE), _suite(work)
    write_changes(REFERENCE, _aligned(REFERENCE, work, tower, settings), ALIGNED, carried_key(tower, settings))
    exits = ",".join(filter(None, ["all", settings.ladder]))  # so that another ladder finds its depths
    if not _carries_evaluation(tower, suite, exits):
        before = _before(REFERENCE, work, tower, suite, False, exits)
        carry_evaluation(before, EVALUATED, _digest(_evaluation_inputs(tower, suite)))


def carried_key(tower: str, settings: AlignConfig) -> str:
    """Digest of the weights, rows and settings of an alignment, the same on every machine.

    Pictures count by the code that draws them: their bytes depend on the machine's PNG encoder.

    Args:
        tower: digest of the checkpoint.
        settings: of the alignment; their data is a folder of rows.
    """
    rows = sha256_file(Path(settings.data) / ROWS), [sha256_file(REFERENCE.parent / name) for name in ("draw.py", "kinds.py")]
    return _digest([tower, align_inputs(settings) | {"data": rows}])


def _rows(work: Path) -> Path:
    """The training rows that are drawn from the reference world."""
    from edgesafe.reference.data import write_training

    inputs = [TRAINING_ROWS, digest_world(REFERENCE.parent)]
    return make_step(work, "data", inputs, lambda o: write_training(o, TRAINING_ROWS), "draw the training rows")


def _suite(work: Path) -> Path:
    """The certification suite that is drawn from the reference world."""
    from edgesafe.reference.data import write_split

    inputs = [digest_world(REFERENCE.parent)]
    return make_step(work, "suite", inputs, lambda o: write_split(o, "cert"), "draw the certification suite")


def _before(model: Path, work: Path, tower: str, suite: Path, carried: bool, exits: str) -> Path:
    """The evaluation of the untouched model at some exits, every depth where none is named; `carried`: the clone's own."""
    from edgesafe.evaluate.evaluate import evaluate

    if carried:
        title = "take the untouched model's evaluation that the clone carries (--retrain evaluates here)"
        made = [sha256_file(EVALUATED / MADE_OF)]
        return make_step(work, "before", made, lambda o: unpack_evaluation(EVALUATED, o), title)
    inputs = [*_evaluation_inputs(tower, suite), *([exits] if exits else [])]
    title = f"evaluate before alignment, {f'exits {exits}' if exits else 'every depth'}"
    return make_step(work, "before", inputs, lambda o: evaluate(model, suite, o, exits=exits or "all"), title)


def _carries_evaluation(tower: str, suite: Path, exits: str) -> bool:
    """Whether the clone carries a model's evaluation on a suite at some exits, every depth where none is named."""
    return evaluation_key(EVALUATED) == _digest(_evaluation_inputs(tower, suite)) and has_exits(EVALUATED, exits)


def _evaluation_inputs(tower: str, suite: Path) -> list[Any]:
    """Another judge, other rates; and an earlier edgesafe's evaluation, which names exits by depth, is made again."""
    from edgesafe.certify.string_judge import JUDGE

    return [tower, [digest_folder(suite), JUDGE["sha256"], "exits by text"]]


def _digest(inputs: list[Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _aligned(model: Path, work: Path, tower: str, settings: AlignConfig) -> Path:
    return make_step(
        work, "aligned", [model.name, tower, align_inputs(settings)], lambda o: _align(model, settings, o), "align"
    )


def digest_model(model: Path) -> str:
    """Digest of a checkpoint without its model card."""
    files = {path.name: sha256_file(path) for path in model.iterdir() if path.is_file() and path.suffix != ".md"}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def make_step(work: Path, name: str, inputs: list[Any], make: Callable[[Path], Any], title: str) -> Path:
    """The folder of a step, made unless it is there. Of two runs that want it at once, one makes it and the other waits.

    Args:
        work: the folder of all steps.
        name: of the step, and of the folder that comes out.
        inputs: what it is made of, as JSON values.
        make: writes the folder, whole or not at all.
        title: what a person is shown meanwhile.
    """
    made_of = json.dumps({"edgesafe": __version__, "inputs": inputs}, sort_keys=True, indent=1).encode()
    home = work / f"{name}-{hashlib.sha256(made_of).hexdigest()[:12]}"
    folder = home / name
    if folder.is_dir():
        return folder
    with step(title), held(home, wait=True):
        if not folder.is_dir():  # else another run has just made it
            write_atomically(home / "inputs.json", made_of + b"\n")
            make(folder)
    return folder


def align_inputs(settings: AlignConfig) -> dict[str, Any]:
    """The settings but the ladder, with every folder that they name as its name and digest: both end up in the record."""
    plain = asdict(settings)
    del plain["ladder"]
    for part, key in ((plain, "data"), (plain["eval"], "suite"), (plain["reward"], "model")):
        folder = Path(part[key])
        if part[key] and folder.is_dir():
            part[key] = [folder.name, digest_folder(folder)]
    return plain


def _align(model: Path, settings: AlignConfig, out: Path) -> None:
    """Align, from the last checkpoint of a run that was cut off where there is one."""
    from edgesafe.align.files import done_updates
    from edgesafe.align.train import align

    if done_updates(work_folder(out)):
        # The key says that it is the same run. Where a setting is left to the machine, another machine starts over.
        with contextlib.suppress(ConfigError):
            align(model, settings, out, resume=True)
            return
    align(model, settings, out)


def digest_world(folder: Path) -> str:
    """Digest of the code that draws rows and suites: what an earlier version drew is drawn again.

    Args:
        folder: the package `edgesafe.reference`.
    """
    code = (path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"\0".join(code)).hexdigest()
