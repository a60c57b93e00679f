"""confirm-offer beside its afternoon versions: rate, CPU, latency, memory. ``make bench`` renews docs/performance.md.

Takes about 25 minutes, and 35 more with ``--growth``. All runs in turn on this machine, each program several times.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click

from benchmarks.contenders import AFTERNOON, ALL, OURS, Contender, prepare
from benchmarks.rig import Rig, quantile
from benchmarks.seed import seed
from benchmarks.throughput import Case, Drained, backlog, drain, middle, one_by_one, spike
from tests.system import PROJECT

PAGE = PROJECT / "docs" / "performance.md"
PLOT = PROJECT / "docs" / "performance.svg"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
CASES = (
    *(
        Case(latency, in_flight, processes)
        for processes in (1, 2)
        for latency in (0.05, 0.2)
        for in_flight in (64, 256)
    ),
    Case(0.05, 64, 3),
)
EASE = Case(0.05, 64)
RATE = 20.0  # jobs a second at ease
Rounds = dict[tuple[Case, Contender], list[Drained]]


def rounds_of(rig: Rig, cases: tuple[Case, ...], contenders: tuple[Contender, ...], rounds: int, jobs: int) -> Rounds:
    found: Rounds = {}
    for number in range(rounds):
        for case in cases:
            for contender in contenders:
                enough = max(jobs, 6 * case.in_flight * case.processes)  # so that those in flight at the start are few
                drained = drain(rig, contender, case, enough, f"{number}-{time.time_ns()}")
                found.setdefault((case, contender), []).append(drained)
                click.echo(f"{case}: {contender.name} {drained.rate:.0f}/s {drained.cpu:.2f} ms", err=True)
    return found


def side_by_side(found: Rounds) -> Iterator[str]:
    yield "| XONE, calls, processes | program | a second | CPU ms | PostgreSQL ms | MiB | rate ×[^×] | CPU ÷[^×] |"
    yield "|---|---|---|---|---|---|---|---|"
    for (case, contender), drained in found.items():
        pairs = list(zip(drained, found[case, AFTERNOON], strict=True))
        rate = [it.rate / theirs.rate for it, theirs in pairs]
        cpu = [theirs.cpu / it.cpu for it, theirs in pairs]
        yield (
            f"| {case} | {contender.name} | {spread([it.rate for it in drained], 0)}"
            f" | {spread([it.cpu for it in drained])} | {middle([it.database for it in drained]):.2f}"
            f" | {middle([it.memory for it in drained]):.0f}"
            + (" | | |" if contender is AFTERNOON else f" | {spread(rate)} | {spread(cpu)} |")
        )
    yield ""
    yield f"[^×]: Times the rate of '{AFTERNOON.name}', and what part of its CPU, each of the same round."


def spread(values: list[float], digits: int = 2) -> str:
    """The middle, and in brackets the least and the most."""
    return f"{middle(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def at_ease(rig: Rig, contenders: tuple[Contender, ...], seconds: float) -> Iterator[str]:
    yield "| program | p50 ms | p95 ms | p99 ms | longest ms |"
    yield "|---|---|---|---|---|"
    for contender in contenders:
        took = one_by_one(rig, contender, EASE, RATE, seconds, f"ease-{time.time_ns()}")
        figures = [quantile(took, share) * 1000 for share in (0.5, 0.95, 0.99)] + [max(took) * 1000]
        yield f"| {contender.name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |"


def long_backlog(rig: Rig, jobs: int) -> Iterator[str]:
    case = Case(0.05, 256, 2)
    yield f"{jobs:,} jobs that wait, by tenths, {case}:\n"
    yield "| tenth | a second | MiB of one |"
    yield "|---|---|---|"
    for number, (rate, memory) in enumerate(backlog(rig, OURS, case, jobs, 10), 1):
        yield f"| {number} | {rate:.0f} | {memory:.0f} |"


def sudden(rig: Rig, jobs: int, rate: float) -> Iterator[str]:
    published, ended = spike(rig, OURS, Case(0.05, 256), jobs)
    yield (
        f"{jobs:,} jobs at once: published in {published:.1f} s, the last event after {ended:.1f} s; at the rate above"
        f" they take {jobs / rate:.1f} s. None failed."
    )


def growth(rig: Rig, rows: int, rounds: int, jobs: int) -> Iterator[str]:
    def measured() -> dict[str, str]:
        drained = rounds_of(rig, (EASE,), (OURS,), rounds, jobs)[EASE, OURS]
        took = one_by_one(rig, OURS, EASE, RATE, 20, f"grown-{time.time_ns()}")
        return {
            "confirmations a second": spread([it.rate for it in drained], 0),
            "CPU ms": spread([it.cpu for it in drained]),
            "PostgreSQL ms": spread([it.database for it in drained]),
            "p50 and p99 at ease, ms": f"{quantile(took, 0.5) * 1000:.1f}, {quantile(took, 0.99) * 1000:.1f}",
            **{f"`{words}`, s": f"{seconds:.2f}" for words, seconds in commands(rig).items()},
        }

    empty = measured()
    began = time.monotonic()
    seed(rig.engine, rows)
    yield f"{rows:,} confirmations with all that hangs on them, added in {time.monotonic() - began:.0f} s:\n"
    full = measured()
    yield "| | before | with them |"
    yield "|---|---|---|"
    for name, before in empty.items():
        yield f"| {name} | {before} | {full[name]} |"


COMMANDS = (
    "failed",
    "failed --code http-422 --list --limit 20",
    "show seeded-7",
    "batches",
    "purge --older-than 36500d --dry-run",
)


def commands(rig: Rig) -> dict[str, float]:
    """Seconds that each takes, the start of Python included."""

    def run(words: str) -> float:
        began = time.monotonic()
        environment = {**rig.environment, "PATH": "/usr/bin:/bin"}
        subprocess.run(
            [sys.executable, "-m", "worker", *words.split()], env=environment, cwd=PROJECT, capture_output=True
        )
        return time.monotonic() - began

    return {words: middle([run(words) for _ in range(3)]) for words in COMMANDS}


def plot(found: Rounds) -> None:
    """Rates and CPU of all cases as bars, with their spread."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams.update(
        {"svg.hashsalt": "confirm-offer", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    figures: tuple[tuple[str, Callable[[Drained], float]], ...] = (
        ("confirmations a second", lambda it: it.rate),
        ("worker CPU for one, ms", lambda it: it.cpu),
    )
    cases = list(dict.fromkeys(case for case, _ in found))
    for axis, (title, of) in zip(axes, figures, strict=True):
        for number, contender in enumerate(ALL):
            values = [[of(it) for it in found[case, contender]] for case in cases]
            middles = [middle(several) for several in values]
            errors = [
                [at - min(several) for at, several in zip(middles, values, strict=True)],
                [max(several) - at for at, several in zip(middles, values, strict=True)],
            ]
            places = [at + (number - 1.5) * 0.21 for at in range(len(cases))]
            axis.bar(
                places,
                middles,
                0.2,
                yerr=errors,
                label=contender.name,
                color=("#b8b8b8", "#8f9db3", "#1f6f5c", "#57a773")[number],
            )
        axis.set_ylabel(title)
    axes[0].legend(frameon=False)
    labels = [
        f"{case.latency * 1000:.0f} ms\n{case.in_flight} in flight\n{case.processes} process"
        + "es" * (case.processes > 1)
        for case in cases
    ]
    axes[1].set_xticks(range(len(cases)), labels)
    figure.savefig(PLOT, metadata={"Date": None})


@contextmanager
def rig_in_a_folder() -> Iterator[Rig]:
    folder = Path(tempfile.mkdtemp(prefix="confirm-offer-bench-"))
    with Rig(folder) as rig:
        prepare(rig)
        yield rig
    shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024**2
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return f"{os.cpu_count()} cores ({model or platform.machine()}), {memory} GiB, Python {platform.python_version()}"


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--jobs", default=2000, show_default=True, type=click.IntRange(200), help="Of each run.")
@click.option("--waiting", default=100_000, show_default=True, type=click.IntRange(0), help="Jobs of the long backlog.")
@click.option("--grown", default=0, show_default=True, type=click.IntRange(0), help="Rows to measure growth with.")
@click.option("--write/--print", default=True, help="Renew docs/performance.md, or print what it would hold.")
def main(rounds: int, jobs: int, waiting: int, grown: int, write: bool) -> None:
    with rig_in_a_folder() as rig:
        measured = f"Measured on {datetime.now(UTC):%Y-%m-%d} with {machine()}"
        found = rounds_of(rig, CASES, ALL, rounds, jobs)
        rate = middle([it.rate for it in found[Case(0.05, 256), OURS]])
        sections = [
            f"{measured}; {rounds} rounds of {jobs} jobs or more; the middle (least to most).\n",
            "### Side by side\n", *side_by_side(found), "\n![rate and CPU](performance.svg)\n",
            f"### At ease: {RATE:.0f} jobs a second, publish to event less XONE's 50 ms\n", *at_ease(rig, ALL, 30),
            *(["\n### Backlog\n", *long_backlog(rig, waiting)] if waiting else []),
            "\n### Spike\n", *sudden(rig, 2000, rate),
            *(["\n### Growth\n", *growth(rig, grown, rounds, jobs)] if grown else []),
        ]  # fmt: skip
    text = "\n".join(sections) + "\n"
    if write:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(head + BEGIN + text + END + rest.partition(END)[2])
        plot(found)
    click.echo(text)


if __name__ == "__main__":
    main()
