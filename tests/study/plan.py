"""What the study runs: one line a run. Change a number here and the runs that it concerns are run again.

The settings are the study's own (`configs`), not the product's: the kept answers were made with them, and a default that is
tuned later must not change what the tables compare. A test holds the plan to the records of the kept answers.
"""

from __future__ import annotations

from dataclasses import dataclass

# Updates of each method at equal compute: language-model token positions processed, a backward pass counted as two forward
# passes. Measured on the reference model with the settings in `configs`, a thousand positions an update: self-distill and l-sft
# 8.2 (the teacher's 560 in all come on top for self-distill), l-dpo 22.1 (and 650 to find its pairs), l-ppo 66.3. About
# 3 million each; the table `methods` shows how equal they came out.
STEPS = {"self-distill": 300, "l-sft": 365, "l-dpo": 108, "l-ppo": 46, "l-ppo-paper": 46}
MAPS_STEPS = 400  # of both trainings of the maps' plan: a sixth of the product's
# Of the other objectives, from mapped states: what so many updates of l-sft process, counted as above. l-ppo is run longer too,
# and l-dpo by its preference alone.
MAPS_EQUAL = {"self-distill": 345, "l-dpo": 165, "l-ppo": 60}
ASKED = "4,6,8,12"  # the exits that these answer, for asking takes as long as training
MAPS_LONGER = 180
# How many training rows are drawn. The kept answers are of a day when fewer of the drawn rows were tasks.
TRAINING_ROWS = 16_000
L_PPO = "l-ppo"
METHODS = ("self-distill", "l-sft", "l-dpo", L_PPO)
LONGER, ALONE = f"{L_PPO}-longer", "l-dpo-alone"
SEEDS = (0, 1, 2)
WINNER = "l-sft"  # the default objective: transfer, cost, controls and quantization are shown on it
CONTROL_NAMES = ("text-only", "blank", "noise", "rescaled")
CONTROLS, BUNDLE = "controls", "bundle"
DEVICE = "rpi5"  # whose schemes (int8 vision, int4 text) the quantized bundle has
BEFORE = "before"


@dataclass(frozen=True)
class Run:
    """One run: a training and the answers of what came out, or the answers of another run's model seen in another way.

    name: also the name of its raw file. config: TOML file of `configs` without its ending, "" = no training.
    seed, steps, exits: win over the file's ("" = the file's exits). of: the run whose checkpoint is asked, "" = its own, or the
    untouched model where nothing is trained. how: "" = as it is, `CONTROLS`, `BUNDLE`, exported and quantized, or one of
    `KINDS`, its states through maps of that kind. pictures: how many of the training rows' pictures exit maps are fitted to,
    `NOISE`, or one of `FOLDERS`; "" = no maps. asked: exits that answer, "" = all. reduction: how tokens are made fewer, one of
    `REDUCTIONS`; "" = as the product does. scheme: the text weights of a bundle, whatever that does to the answers; "" = the
    device's.
    """

    name: str
    config: str = ""
    seed: int = 0
    steps: int = 0
    exits: str = ""
    of: str = ""
    how: str = ""
    pictures: str = ""
    asked: str = ""
    reduction: str = ""
    scheme: str = ""


def method_run(method: str, seed: int) -> str:
    """The name of a method's run.

    >>> method_run("l-sft", 2)
    'l-sft-2'
    """
    return f"{method}-{seed}"


FIRST = method_run(WINNER, SEEDS[0])
SINGLE, PAPER, THREE, EVEN = "single", "paper", "three", "even"
QUANTIZED = "quantized"
EXITS = {SINGLE: "6", THREE: "4,8,12", EVEN: "2,4,6,8,10,12"}
CONTROLLED = {BEFORE: "before-controls", FIRST: "after-controls"}


def control_file(run: str, control: str) -> str:
    """The name of a control's raw file.

    >>> control_file("before-controls", "blank")
    'before-controls-blank'
    """
    return f"{run}-{control}"


def files_of(run: Run) -> tuple[str, ...]:
    """Names of the raw files that a run leaves."""
    return tuple(control_file(run.name, c) for c in CONTROL_NAMES) if run.how == CONTROLS else (run.name,)


RAW_STATES, MAPPED, MAPPED_NOISE = "raw", "mapped", "mapped-noise"
NOISE, NOISE_PICTURES = "noise", 600
FEW = ("10", "60", "6000")  # pictures, beside the product's own number
FOLDERS = ("emoji", "photographs")  # pictures of other worlds: their folders are named where the runs are started
RESCALED = "rescaled"
# Of `study.other_maps`, which needs torch; the tables do not.
KINDS = (
    RESCALED,
    "nonlinear",
    "map by position",
    "means by position",
    "least ridge",
    "most ridge",
    "rank a quarter",
    "rank a sixteenth",
    "nonlinear, four times",
)
SOME = "5"  # the exit that comparisons are made at


def few_run(pictures: str) -> str:
    """The name of the run with maps from so many or other pictures, or of a kind.

    >>> few_run("60"), few_run("nonlinear, four times")
    ('mapped-60', 'mapped-nonlinear-four-times')
    """
    return "-".join([MAPPED, *pictures.replace(",", "").split()])


def retrained_run(seed: int, *, mapped: bool) -> str:
    """The name of a training of the default objective, from mapped states or raw ones."""
    return f"{MAPPED if mapped else RAW_STATES}-{WINNER}-{seed}"


def mapped_run(method: str, seed: int) -> str:
    """The name of an objective's training from mapped states.

    >>> mapped_run("l-dpo", 1), mapped_run(LONGER, 0)
    ('mapped-l-dpo-1', 'mapped-l-ppo-longer-0')
    """
    return f"{MAPPED}-{method}-{seed}"


def maps_plan() -> tuple[Run, ...]:
    """What exit maps do by themselves and before retraining, at equal updates; another suite than the objectives' plan.

    >>> len({run.name for run in maps_plan()}) == len(maps_plan())
    True
    """
    first = (Run(RAW_STATES), Run(MAPPED, pictures="600"), Run(MAPPED_NOISE, pictures=NOISE))
    few = [Run(few_run(pictures), pictures=pictures) for pictures in FEW]
    trained = [
        Run(retrained_run(seed, mapped=bool(pictures)), "maps-l-sft", seed, MAPS_STEPS, pictures=pictures)
        for seed in SEEDS
        for pictures in ("", "600")
    ]
    objectives = [
        Run(mapped_run(method, seed), f"maps-{method}", seed, steps, pictures="600", asked=ASKED)
        for seed in SEEDS
        for method, steps in MAPS_EQUAL.items()
    ]
    more = [
        Run(mapped_run(name, SEEDS[0]), config, SEEDS[0], steps, pictures="600", asked=ASKED)
        for name, config, steps in ((LONGER, f"maps-{L_PPO}", MAPS_LONGER), (ALONE, f"maps-{ALONE}", MAPS_EQUAL["l-dpo"]))
    ]
    others = [Run(few_run(name), pictures=name, asked=SOME) for name in FOLDERS]
    kinds = [Run(few_run(kind), how=kind, pictures="600", asked="" if kind == RESCALED else SOME) for kind in KINDS]
    return (*first, *few, *trained, *kinds[:3], *others, *kinds[3:], *objectives, *more)


RUNG_DEPTHS, RUNG_TOKENS = ("4", "6", "8", "12"), ("", "@9", "@4", "@1")
DEPTHS, TOKENS, GRID = "depths", "tokens", "grid"
# What each training draws; the reference is in every batch.
DRAWN = {
    DEPTHS: ",".join(RUNG_DEPTHS),
    TOKENS: ",".join(f"12{fewer}" for fewer in RUNG_TOKENS),
    GRID: ",".join(depth + fewer for depth in RUNG_DEPTHS for fewer in RUNG_TOKENS),
}
RUNG_STEPS = 240  # of each training of the rungs' plan: a tenth of the product's
COMPARED = ",".join(depth + fewer for depth in ("6", "12") for fewer in RUNG_TOKENS[1:])  # where reductions are
# Of `study.fewer`, which needs torch; two of them are trained too.
AVERAGED_BEFORE, STRIDED = "averaged before", "strided"
REDUCTIONS = (STRIDED, AVERAGED_BEFORE, "random places", "smaller picture", "blurred picture", "most attended")
SCHEMES = {"int8": "int8-block32", "int4": "int4-block32"}


def rung_run(drawn: str, seed: int, reduction: str = "") -> str:
    """The name of a training on rungs.

    >>> rung_run("grid", 0), rung_run("grid", 1, "averaged before")
    ('grid-0', 'grid-averaged-before-1')
    """
    return "-".join([drawn, *reduction.split(), str(seed)])


def scheme_run(bits: str) -> str:
    """The name of the run that asks the first seed's bundle."""
    return f"{rung_run(GRID, SEEDS[0])}-{bits}"


def rungs_plan() -> tuple[Run, ...]:
    """What exits with fewer visual tokens do, untouched and trained, and what other reductions would; on half the test split.

    >>> len({run.name for run in rungs_plan()}) == len(rungs_plan())
    True
    """
    grid = DRAWN[GRID]

    def trained(drawn: str, seed: int, reduction: str = "") -> Run:
        name = rung_run(drawn, seed, reduction)
        return Run(name, "rungs-l-sft", seed, RUNG_STEPS, DRAWN[drawn], pictures="600", asked=grid, reduction=reduction)

    untouched = (Run(RAW_STATES, asked=grid), Run(MAPPED, pictures="600", asked=grid))
    others = [Run(few_run(how), of=MAPPED, asked=COMPARED, reduction=how) for how in REDUCTIONS]
    ways = [(GRID, ""), (DEPTHS, ""), (TOKENS, ""), (GRID, STRIDED)]
    runs = [[trained(drawn, seed, reduction) for drawn, reduction in ways] for seed in SEEDS]
    runs[0].append(trained(GRID, SEEDS[0], AVERAGED_BEFORE))
    first = rung_run(GRID, SEEDS[0])
    bundles = [Run(scheme_run(bits), of=first, how=BUNDLE, asked=grid, scheme=text) for bits, text in SCHEMES.items()]
    return (*untouched, *others, *runs[0], *bundles, *(run for more in runs[1:] for run in more))


def plan() -> tuple[Run, ...]:
    """Every run of the study, in the order they are started; a run comes after the one whose checkpoint it asks.

    >>> len({run.name for run in plan()}) == len(plan())
    True
    """
    methods = [Run(method_run(m, s), m, s, STEPS[m]) for s in SEEDS for m in METHODS]
    ours = [Run(name, WINNER, SEEDS[0], STEPS[WINNER], exits) for name, exits in EXITS.items()]
    paper = Run(PAPER, "l-ppo-paper", SEEDS[0], STEPS["l-ppo-paper"], EXITS[SINGLE])
    controls = [Run(name, of=of, how=CONTROLS) for of, name in CONTROLLED.items()]
    return (Run(BEFORE), *methods, *ours, paper, *controls, Run(QUANTIZED, of=FIRST, how=BUNDLE))


PLANS = {"objectives": plan, "maps": maps_plan, "rungs": rungs_plan}
SHARES = {"rungs": 0.5}  # of the test split that a plan is asked; all of it where it is not named
