r"""Writes the page of results, from the JSON files that runs leave.

A claim of the paper is turned into a bound on a figure, or on the ratio of two. It is put to the
runs of each setting, seed by seed. In a ratio, both figures are of the same seed.

Run it as

    python examples/results_page.py [FOLDER [PAGE]]
"""

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
HALF = 0.55  # and what rounds to it
ALIKE = 2.5  # distances whose ratio is at most this
# Settings that other methods have no use for, and their names on the page
OF_GAMES = {
    "encoder_steps": "encoder moves in a step",
    "num_proposals": "proposals",
    "code_warmup": "steps of code warm-up",
    "last_word": "part of the steps for the encoder alone",
}
# Test NLL (nats) of belief networks, static binarisation (Yin, Zhou, ICLR 2019, table 2)
LITERATURE = {
    "linear": {"wake-sleep": 107.7, "NVIL": 99.8, "ARM": 96.7},
    "nonlinear": {"NVIL": 102.2, "ARM": 98.4},
}
METHODS = {"game": "game", "elbo": "ELBO", "rws": "reweighted wake-sleep"}
HOLDS, NOT_RUN, NONE = "holds", "not run", "–"

Figures = dict[str, float]


class RecordError(Exception):
    """A file that can't be used; the message says what to do."""


class Record:
    """What a run has left.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self.content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{path.name} is no JSON file: {error}. Run it again.") from error

    def get(self, *keys: str) -> Any:
        """What lies at a place.

        Args:
            keys: The keys that lead there.
        """
        found = self.content
        for i, key in enumerate(keys, 1):
            if not isinstance(found, dict) or key not in found:
                place = "/".join(keys[:i])
                raise RecordError(f"{self.name} has no {place!r}. Run its program again.")
            found = found[key]
        return found

    @property
    def preset(self) -> str:
        """The preset, of which each program has ``laptop`` as its default."""
        return self._options.get("--preset", "laptop")

    @property
    def setting(self) -> str:
        """The name of its setting, among those of one experiment."""
        net = self.get("settings").get("net")
        return ", ".join(filter(None, [self.preset, net, *self.asked]))

    @property
    def asked(self) -> list[str]:
        """What was asked for instead of what is in the preset, in words."""
        options, told = self._options, []
        if "--steps" in options:
            told.append(f"{self.get('settings', 'steps'):,} steps")
        if part := options.get("--annealed"):
            told.append(f"annealed {part}" if float(part) else "constant rate")
        if "--warp" in options:
            told.append(f"images warped by {options['--warp']}")
        return told

    @property
    def _options(self) -> dict[str, str]:
        """The options of its command, each with what follows it."""
        arguments = [
            part
            for argument in shlex.split(self.get("command"))
            for part in (argument.split("=", 1) if argument.startswith("--") else [argument])
        ]
        return dict(zip(arguments, arguments[1:], strict=False))

    @property
    def method(self) -> str:
        """The name of the method."""
        method = self.get("settings").get("method", "game")
        return METHODS.get(method, method)

    @property
    def space(self) -> str:
        """The name of Fréchet distances between images, in their feature space."""
        found = re.findall(r"^(frechet\[.+\])/decoder$", "\n".join(self.get("figures")), re.M)
        return found[0] if found else "frechet[...]"

    @property
    def identity(self) -> dict[str, Any]:
        """What its figures depend on."""
        unused = () if self.method == METHODS["game"] else OF_GAMES
        used = {name: x for name, x in self.get("settings").items() if name not in unused}
        given = {"seed": self.get("settings", "seed"), "method": self.method}
        return used | given | {"feature space": self.space}

    @property
    def environment(self) -> str:
        """Where it ran, and with what versions."""
        device, machine, cores, threads = (
            self.get("hardware", key) for key in ("device", "machine", "cores", "threads")
        )
        versions = ", ".join(f"{name} {number}" for name, number in self.get("versions").items())
        return f"{device} ({machine}, {cores} cores, threads: {threads}), {versions}"


@dataclass(frozen=True)
class Claim:
    """A bound on a figure, or on its ratio to another.

    Args:
        text: What is claimed.
        figure: The figure.
        over: The other one, if there is one.
        low: The least value with which the claim holds.
        high: The largest one.
    """

    text: str
    figure: str
    over: str | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def asked(self) -> str:
        """What is asked for, in words."""
        what = "" if self.over is None else "ratio "
        if self.low == -math.inf:
            return f"{what}at most {number(self.high)}"
        if self.high == math.inf:
            return f"{what}at least {number(self.low)}"
        return f"{what}{number(self.low)} to {number(self.high)}"

    def values(self, runs: Iterable[Figures]) -> list[float]:
        """What is measured, in those runs that tell it."""
        needed = [self.figure] if self.over is None else [self.figure, self.over]
        told = [[run[name] for name in needed] for run in runs if run.keys() >= set(needed)]
        return [first / math.prod(rest) for first, *rest in told]

    def verdict(self, runs: Iterable[Figures]) -> str:
        """Whether the claim holds."""
        held = [self.low <= value <= self.high for value in self.values(runs)]
        if not held:
            return NOT_RUN
        if all(held):
            return HOLDS
        return f"holds for {sum(held)} of {len(held)} seeds" if any(held) else "doesn't hold"


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Args:
        title: Its name.
        program: The program that repeats it.
        options: The options of each of its runs.
        settings: The settings by which its runs are known.
        told: Reads its figures from a record.
        published: The published figures by name.
        source: Where they come from, in a sentence or two.
        claims: What is claimed.
        features: The features of the published Fréchet distances, if there are any.
        presets: The presets that are looked for.
    """

    title: str
    program: str
    options: Sequence[str]
    settings: Mapping[str, str]
    told: Callable[[Record], Figures]
    published: Figures
    source: str
    claims: Sequence[Claim]
    features: str = ""
    presets: Sequence[str] = ("laptop", "paper")

    def has(self, record: Record) -> bool:
        """Whether a record belongs to it."""
        settings = record.get("settings")
        return record.get("program") == self.program and all(
            settings.get(name) == value for name, value in self.settings.items()
        )


@dataclass
class Column:
    """The runs of an experiment in one setting, where each method has a learning rate of its own.

    Args:
        name: The name of the setting.
        records: What the runs have left.
        runs: Their figures by seed, those of all methods together.
    """

    name: str
    records: list[Record] = field(default_factory=list)
    runs: dict[int, Figures] = field(default_factory=dict)

    def add(self, record: Record, figures: Figures) -> None:
        """Adds a run, which must be like the others in all but seed, method and what is its own."""
        own = record.identity
        for other in self.records:
            theirs = other.identity
            differing = {k for k in own.keys() | theirs if _unlike(own.get(k), theirs.get(k))}
            if not differing:
                raise RecordError(f"{record.name} repeats {other.name}. Remove one.")
            own_to_method = {"learning_rate", *OF_GAMES} if "method" in differing else set()
            free = {"seed", "method"} | own_to_method
            if others := differing - free:
                raise RecordError(
                    f"{record.name} and {other.name} differ in {', '.join(sorted(others))}, so "
                    "there is no mean of the two. Remove one."
                )
        self.records.append(record)
        self.runs.setdefault(own["seed"], {}).update(figures)


def _unlike(value: Any, other: Any) -> bool:
    """Whether two values of a setting differ; one that older records lack counts as off."""
    return bool(value or other) and value != other


def hierarchical(record: Record) -> Figures:
    """The figures of ``mnist_hvae.py``, by its method."""
    space, owner = record.space, f"{record.method}'s"
    limiting = f"{space}/limiting"
    looks = [look[limiting] for look in record.get("history") if limiting in look]
    draws = record.get("settings", "num_draws")
    learned = ", of images learned from" if record.get("settings").get("learns_all") else ""
    told = {
        "decoder distance": record.get("figures", f"{space}/decoder"),
        "limiting distance": record.get("figures", limiting),
        f"log-likelihood{learned} (nats)": record.get("figures", f"log-likelihood/{draws} draws"),
        "floor of distances": record.get("figures", f"{space}/floor"),
    }
    own = record.identity
    told |= {label: own[name] for name, label in OF_GAMES.items() if name in own}
    if looks:
        told["limiting distance in the last quarter, most / least"] = max(looks) / min(looks)
    return {f"{owner} {name}": value for name, value in told.items()}


def labelled(record: Record) -> Figures:
    """The figures of ``mnist_labelled.py``."""
    space = record.space
    return {
        "accuracy (%)": 100 * record.get("figures", "held-out accuracy"),
        "decoder distance": record.get("figures", f"{space}/decoder"),
        "limiting distance": record.get("figures", f"{space}/limiting"),
        "floor of distances": record.get("figures", f"{space}/floor"),
    }


def likelihood(record: Record) -> Figures:
    """The figures of ``mnist_nll.py``."""
    return {
        "game's test NLL (nats)": record.get("figures", "test NLL (nats)"),
        "its standard error (nats)": record.get("figures", "its standard error (nats)"),
        "number of draws": record.get("figures", "number of draws K"),
    }


def implicit(record: Record) -> Figures:
    """The figures of ``implicit_prior.py``: the first error that it tells."""
    held_out = record.get("figures", "held out")
    error, *_ = record.get("figures", "held out", "the game")
    return {f"error with {name}": told[error] for name, told in held_out.items()}


def _hierarchical(
    title: str,
    data: str,
    factorisation: str,
    game: tuple[float, float],
    elbo: tuple[float, float],
) -> Experiment:
    """The experiment with a hierarchical VAE, and the published distances of both methods."""
    names = "decoder distance", "limiting distance"
    published = {
        f"{owner}'s {name}": value
        for owner, values in (("game", game), ("ELBO", elbo))
        for name, value in zip(names, values, strict=True)
    }
    decoder, limiting, elbo_decoder, elbo_limiting = published
    common = f"--data {data} --factorisation {factorisation} --net tanh"
    return Experiment(
        title,
        "mnist_hvae.py",
        [f"{common} --method {method}" for method in ("game", "elbo")],
        {"data": data, "factorisation": factorisation},
        hierarchical,
        published,
        "Section 5 of the paper, with Fig. 1: the game's pair is more consistent than ELBO's, and "
        "its images are slightly better. Published are the authors' runs, of 200,000 steps of "
        "1,024 images, with tanh networks.",
        [
            Claim(
                "The game's decoder distance is half of ELBO's or less",
                decoder,
                elbo_decoder,
                high=HALF,
            ),
            Claim(
                "The game's limiting distance is half of ELBO's or less",
                limiting,
                elbo_limiting,
                high=HALF,
            ),
            Claim(
                "The game's limiting distance is near to its decoder distance",
                limiting,
                decoder,
                1 / ALIKE,
                ALIKE,
            ),
            Claim(
                "ELBO's limiting distance is far above its decoder distance",
                elbo_limiting,
                elbo_decoder,
                low=ALIKE,
            ),
        ],
        features="Inception",
    )


def _likelihood(title: str, network: str) -> Experiment:
    """An experiment with the likelihood of a belief network."""
    published = LITERATURE[network]
    return Experiment(
        title,
        "mnist_nll.py",
        [f"--data static --network {network}"],
        {"binarisation": "static", "network": network},
        likelihood,
        {f"{method}'s test NLL (nats)": value for method, value in published.items()},
        "The paper has no such figures; its game is near to wake-sleep. Published are those of Yin "
        "and Zhou (ICLR 2019, table 2).",
        [
            Claim(f"NLL is as low as {method}'s (nats)", "game's test NLL (nats)", high=value)
            for method, value in published.items()
        ],
    )


def _implicit(title: str, data: str) -> Experiment:
    """An experiment with a prior that can only be sampled."""
    game = "error with the game"
    told, guessed = "error with true instrument", "error with first guess of it"
    return Experiment(
        title,
        "implicit_prior.py",
        [f"--data {data}"],
        {"data": data},
        implicit,
        {},
        "The paper claims that the game can be played with such a prior, and gives no figures. "
        "The encoder of the game is compared with one that is told the true decoder, and with one "
        "whose decoder stays what it is at first.",
        [
            Claim("The game's encoder errs as little as one that is told", game, told, high=1.1),
            Claim("The game's encoder errs less than one with the guess", game, guessed, high=1.0),
        ],
        presets=("laptop",),
    )


EXPERIMENTS = [
    _hierarchical("MNIST, ladder", "mnist", "ladder", (1.65, 4.10), (3.22, 36.6)),
    _hierarchical("MNIST, reverse", "mnist", "reverse", (1.47, 4.96), (5.29, 14.2)),
    _hierarchical("Fashion-MNIST, ladder", "fashion", "ladder", (43.6, 42.4), (37.8, 119)),
    Experiment(
        "MNIST with labels",
        "mnist_labelled.py",
        ["--data mnist"],
        {"data": "mnist"},
        labelled,
        {"accuracy (%)": 99, "decoder distance": 2.9, "limiting distance": 4.0},
        "Section 5 of the paper: the encoder of eq. 16 classifies, and images are hardly worse than "
        "without labels.",
        [
            Claim("An encoder that learns from dreams classifies (%)", "accuracy (%)", low=99),
            Claim(
                "The limiting distance is near to the decoder distance",
                "limiting distance",
                "decoder distance",
                1 / ALIKE,
                ALIKE,
            ),
        ],
        features="Inception",
    ),
    _likelihood("MNIST, likelihood of two linear layers", "linear"),
    _likelihood("MNIST, likelihood of one nonlinear layer", "nonlinear"),
    _implicit("A simulator as prior", "walk"),
    _implicit("Codes of another generator as prior", "codes"),
]

HEAD = """\
# Results

What the paper claims
([Flach, Schlesinger, Shekhovtsov, AISTATS 2024](https://arxiv.org/abs/2307.09883)), what has been
published, and what we find. `make results` makes this page from the files in `docs/results/`, which
the examples leave at the end of a run. To add a run, put its JSON file there.

- A claim is a bound on a figure or on the ratio of two, near to what has been published for MNIST
  and a ladder, and the same for other data, where published figures needn't keep to it; 0.55 is
  what rounds to a half. It *holds* if each seed keeps to the bound, and *doesn't hold* if none does.
- Figures are means over seeds, with the least and the largest in brackets.
- Distances are Fréchet distances from real images, in the feature space named. They can't be
  compared across feature spaces; their ratios can, roughly. The floor is the distance between two
  halves of the real images.
- In a step, a game may move its encoder several times, and let its decoder choose among several
  proposals, which takes more time, see [Runs](#runs).
- Presets, `laptop`, `desktop` and `paper`, tell how much is computed, and not on what machine.
"""


def read(folder: Path) -> list[Record]:
    """Reads the files of a folder, in the order of their names.

    Raises:
        RecordError: There is none.
    """
    if not (found := [Record(path) for path in sorted(folder.glob("*.json"))]):
        raise RecordError(f"There is no JSON file in {folder}. Give the folder of the results.")
    return found


def columns(experiment: Experiment, records: Iterable[Record]) -> list[Column]:
    """The settings of an experiment, those without runs too."""
    found: dict[str, Column] = {}
    for record in records:
        name = record.setting
        found.setdefault(name, Column(name)).add(record, experiment.told(record))
    missing = [
        Column(preset)
        for preset in experiment.presets
        if not any(
            record.preset == preset and not record.asked
            for column in found.values()
            for record in column.records
        )
    ]
    return [*found.values(), *missing]


def page(records: Sequence[Record]) -> str:
    """The page, in Markdown."""
    for record in records:
        if not any(experiment.has(record) for experiment in EXPERIMENTS):
            raise RecordError(f"{record.name} is of no experiment on the page. Remove it.")
    found = [
        (each, columns(each, [record for record in records if each.has(record)]))
        for each in EXPERIMENTS
    ]
    parts = [HEAD, *_summary(found)]
    for experiment, settings in found:
        parts += [f"## {experiment.title}\n", experiment.source + "\n"]
        parts += [_claims(experiment, settings), _figures(experiment, settings)]
    return "\n".join(filter(None, [*parts, *_runs(found)]))


Found = Sequence[tuple[Experiment, Sequence[Column]]]


def _summary(found: Found) -> Iterator[str]:
    """How many claims hold, each that doesn't, and what hasn't been run."""
    holding, short, missing = [], [], []
    for experiment, settings in found:
        if names := [each.name for each in settings if not each.records]:
            missing.append(f"{experiment.title}: {', '.join(names)}")
        for column in settings:
            verdicts = {each: each.verdict(column.runs.values()) for each in experiment.claims}
            place = [experiment.title, column.name]
            if column.records:
                told = [verdict for verdict in verdicts.values() if verdict != NOT_RUN]
                holding.append([*place, f"{told.count(HOLDS)} of {len(told)}"])
            for claim, verdict in verdicts.items():
                if verdict == NOT_RUN and column.records:
                    missing.append(f"{'; '.join(place)}: {claim.text}")
                elif verdict not in (HOLDS, NOT_RUN):
                    values = spread(claim.values(column.runs.values()))
                    short.append([claim.text, *place, claim.asked, f"{values}, {verdict}"])
    yield "## What holds\n"
    yield _table(["experiment", "setting", "claims that hold"], holding)
    yield "## Where we fall short\n"
    head = ["claim", "experiment", "setting", "asked for", "found"]
    yield _table(head, short) if short else "Nowhere.\n"
    yield "## What has not been run\n"
    yield "\n".join(f"- {item}" for item in missing or ["Nothing."]) + "\n"


def _claims(experiment: Experiment, settings: Sequence[Column]) -> str:
    """The table of claims."""
    rows = []
    for claim in experiment.claims:
        every = [[experiment.published], *(column.runs.values() for column in settings)]
        told = [(spread(claim.values(runs)), claim.verdict(runs)) for runs in every]
        published, *cells = (
            verdict if verdict == NOT_RUN else f"{values}, {verdict}" for values, verdict in told
        )
        rows.append([f"{claim.text}: {claim.asked}", published.replace(NOT_RUN, NONE), *cells])
    return _table(["claim", "published", *(column.name for column in settings)], rows)


def _figures(experiment: Experiment, settings: Sequence[Column]) -> str:
    """The table of figures."""
    every = [experiment.published, *(run for column in settings for run in column.runs.values())]
    rows = []
    if experiment.features:
        spaces = (f"`{c.records[0].space}`" if c.records else NOT_RUN for c in settings)
        rows.append(["features", experiment.features, *spaces])
    for name in dict.fromkeys(name for figures in every for name in figures):
        row = [name, spread(_values(name, [experiment.published]))]
        for column in settings:
            values = _values(name, column.runs.values())
            row.append(spread(values) if column.runs else NOT_RUN)
        rows.append(row)
    names = [column.name for column in settings]
    return _table(["figure", "published", *names], rows) if rows else ""


def _values(name: str, runs: Iterable[Figures]) -> list[float]:
    """A figure, in those runs that tell it."""
    return Claim("", name).values(runs)


def _runs(found: Found) -> Iterator[str]:
    """Where the runs ran, how long they took, and by which commands."""
    rows: dict[str, list[list[str]]] = {}
    commands = []
    for experiment, settings in found:
        for column in settings:
            for (environment, method), group in _groups(column.records).items():
                run = f"{experiment.title}; {column.name}; {method}"
                seeds = ", ".join(str(record.get("settings", "seed")) for record in group)
                steps, size, rate = (
                    group[0].get("settings", key)
                    for key in ("steps", "batch_size", "learning_rate")
                )
                seconds = [sum(record.get("seconds").values()) for record in group]
                row = [run, seeds, f"{steps:,} of {size:,}", f"{rate:g}", spread(seconds)]
                rows.setdefault(environment, []).append(row)
                commands += [f"# {run}; seeds {seeds}", command(group[0])]
    yield "## Runs\n"
    yield "Times are longer where a machine was shared by several runs.\n"
    for environment, each in rows.items():
        yield f"On {environment}:\n"
        yield _table(["run", "seeds", "steps", "learning rate", "time of all parts (s)"], each)
    yield from _listed("The commands, each with `--seed` and a number:", commands)
    yield from _listed("Those that have not been run:", list(_missing(found)))


def _groups(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records by environment and method."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.environment, record.method), []).append(record)
    return groups


def _missing(found: Found) -> Iterator[str]:
    """The commands of settings without runs."""
    for experiment, settings in found:
        for column in settings:
            if not column.records:
                yield f"# {experiment.title}; {column.name}"
                for options in experiment.options:
                    program = f"examples/{experiment.program}"
                    yield f"python {program} --preset {column.name} {options}"


def _listed(text: str, commands: Sequence[str]) -> Iterator[str]:
    if commands:
        yield f"{text}\n"
        yield "\n".join(["```shell", *commands, "```\n"])


def command(record: Record) -> str:
    """The command of a run, without its seed and what tells of the machine alone.

    Args:
        record: What the run has left.
    """
    kept: list[str] = []
    left_out = ("--seed", "--device", "--out", "--data-root")
    arguments = iter(shlex.split(record.get("command")))
    for argument in arguments:
        if argument in left_out:
            next(arguments, None)
        elif not argument.startswith((*(f"{each}=" for each in left_out), "--resume", "--tensor")):
            kept.append(argument)
    return shlex.join(kept)


def number(value: float) -> str:
    """A number in three digits, or with one after the point."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.1f}".removesuffix(".0")


def spread(values: Sequence[float]) -> str:
    """The mean of some values, with the least and the largest of them."""
    if not values:
        return NONE
    mean = number(sum(values) / len(values))
    least, largest = number(min(values)), number(max(values))
    return mean if least == largest else f"{mean} ({least} to {largest})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    given = [Path(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    if len(given) > 2:
        raise SystemExit("Usage: python examples/results_page.py [FOLDER [PAGE]]")
    folder, target = given + [DOCS / "results", DOCS / "results.md"][len(given) :]
    try:
        target.write_text(page(read(folder)), encoding="utf-8")
    except (OSError, RecordError) as error:
        raise SystemExit(f"results_page.py: {error}") from error
    print(f"The page is {target}.")


if __name__ == "__main__":
    main()
