"""Measures confirm-offer beside its afternoon versions: rate, CPU, latency, memory.

``make bench`` renews docs/performance.md. It takes 45 minutes with ``--jobs 1000``, and longer with the default. The
programs take turns in several rounds.
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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from unittest.mock import patch

import click
from sqlalchemy import text

from benchmarks.contenders import AFTERNOON, ALL, OURS, Contender, prepare
from benchmarks.rig import Rig, quantile
from benchmarks.seed import seed
from benchmarks.throughput import Case, Drained, backlog, drain, one_by_one, spike
from tasks.privacy import purge
from tests.support.system import PROJECT
from worker.runtime import Runtime
from worker.services.outbox_relay import OutboxRelay
from worker.services.scheduler import Scheduler

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
RATE = 20.0  # jobs per second at ease
Rounds = dict[tuple[Case, Contender], list[Drained]]


def rounds_of(rig: Rig, cases: tuple[Case, ...], contenders: tuple[Contender, ...], rounds: int, jobs: int) -> Rounds:
    """Each contender drains a backlog of at least ``jobs`` jobs in each case, once a round."""
    measured: Rounds = {}
    for number in range(rounds):
        for case in cases:
            for contender in contenders:
                # With enough jobs, those in flight at the start hardly count.
                total = max(jobs, 6 * case.in_flight * case.processes)
                drained = drain(rig, contender, case, total, f"{number}-{time.time_ns()}")
                measured.setdefault((case, contender), []).append(drained)
                click.echo(f"{case}: {contender.name} {drained.rate:.0f}/s {drained.cpu:.2f} ms", err=True)
    return measured


def side_by_side(measured: Rounds) -> Iterator[str]:
    """Lines of a table. Ratios are those of the same round."""
    yield "| XONE, calls, processes | program | a second | CPU ms | PostgreSQL ms | MiB | rate ×[^×] | CPU ÷[^×] |"
    yield "|---|---|---|---|---|---|---|---|"
    for (case, contender), drained in measured.items():
        pairs = list(zip(drained, measured[case, AFTERNOON], strict=True))
        rate = [ours.rate / afternoon.rate for ours, afternoon in pairs]
        cpu = [afternoon.cpu / ours.cpu for ours, afternoon in pairs]
        yield (
            f"| {case} | {contender.name} | {spread([run.rate for run in drained])}"
            f" | {spread([run.cpu for run in drained])} | {median([run.database for run in drained]):.2f}"
            f" | {median([run.memory for run in drained]):.0f}"
            + (" | | |" if contender is AFTERNOON else f" | {spread(rate)} | {spread(cpu)} |")
        )
    yield ""
    yield f"[^×]: Times the rate of '{AFTERNOON.name}', and what part of its CPU, each of the same round."


def spread(values: list[float]) -> str:
    """The median, with minimum and maximum in brackets."""
    digits = 0 if median(values) >= 50 else 2
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def at_ease(rig: Rig, contenders: tuple[Contender, ...], rounds: int, seconds: float) -> Iterator[str]:
    """Lines of a table: time from publish to event, less XONE's, of jobs that come one by one."""
    measured: dict[Contender, list[list[float]]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            latencies = one_by_one(rig, contender, EASE, RATE, seconds, f"ease-{time.time_ns()}")
            measured[contender].append([quantile(latencies, share) * 1000 for share in (0.5, 0.95, 0.99, 1.0)])
            click.echo(f"at ease: {contender.name} p50 {measured[contender][-1][0]:.1f} ms", err=True)
    yield "| program | p50 ms | p95 ms | p99 ms | longest ms |"
    yield "|---|---|---|---|---|"
    for contender, figures in measured.items():
        columns = (spread(list(column)) for column in zip(*figures, strict=True))
        yield f"| {contender.name} | {' | '.join(columns)} |"


def long_backlog(rig: Rig, jobs: int) -> Iterator[str]:
    """Lines of a table: rate and memory over each tenth of a long backlog."""
    case = Case(0.05, 256, 2)
    yield f"{jobs:,} jobs that wait, by tenths, {case}:\n"
    yield "| tenth | a second | MiB of one |"
    yield "|---|---|---|"
    for number, (rate, memory) in enumerate(backlog(rig, OURS, case, jobs, 10), 1):
        yield f"| {number} | {rate:.0f} | {memory:.0f} |"


def sudden(rig: Rig, jobs: int, rate: float) -> Iterator[str]:
    """A line on jobs that come all at once. rate: confirmations per second of a drained backlog."""
    published, ended = spike(rig, OURS, Case(0.05, 256), jobs)
    yield (
        f"{jobs:,} jobs at once: published in {published:.1f} s, the last event after {ended:.1f} s; at the rate above"
        f" they take {jobs / rate:.1f} s. None failed."
    )


def growth(rows: int, rounds: int, jobs: int) -> Iterator[str]:
    """Lines of a table that compares a rig with full tables to one with empty tables. Rounds alternate the order."""
    with rig_in_a_folder() as empty, rig_in_a_folder() as full:
        began = time.monotonic()
        seed(full.engine, rows)
        with full.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("checkpoint"))
        full.engine.dispose()
        os.sync()
        yield f"{rows:,} confirmations with all that hangs on them, made in {time.monotonic() - began:.0f} s:\n"
        rigs = [empty, full]
        measured: dict[Rig, list[dict[str, float]]] = {empty: [], full: []}
        for _ in range(rounds):
            for rig in rigs:
                measured[rig].append(measure_grown(rig, jobs))
            rigs.reverse()
    yield "| | empty tables | full tables | full ÷ empty |"
    yield "|---|---|---|---|"
    for name in measured[empty][0]:
        before, after = ([figures[name] for figures in measured[rig]] for rig in (empty, full))
        ratio = [with_rows / without for without, with_rows in zip(before, after, strict=True)]
        yield f"| {name} | {spread(before)} | {spread(after)} | {spread(ratio)} |"


def measure_grown(rig: Rig, jobs: int) -> dict[str, float]:
    """Figures of one rig by their labels in docs/performance.md."""
    drained = drain(rig, OURS, EASE, jobs, f"drain-{time.time_ns()}")
    latencies = one_by_one(rig, OURS, EASE, RATE, 40, f"ease-{time.time_ns()}")
    figures = {
        "confirmations a second": drained.rate,
        "CPU ms": drained.cpu,
        "PostgreSQL ms": drained.database,
        "at ease p50 ms": quantile(latencies, 0.5) * 1000,
        "at ease p99 ms": quantile(latencies, 0.99) * 1000,
        **times_of_services(rig),
        **{f"`{words}` s": seconds_of(lambda words=words: command(rig, words), 3) for words in COMMANDS},
    }
    click.echo(", ".join(f"{name} {figure:.2f}" for name, figure in figures.items()), err=True)
    return figures


def times_of_services(rig: Rig) -> dict[str, float]:
    """Milliseconds of a run of Scheduler and Relay that finds nothing to do, and of a purge of 100 confirmations."""
    with patch.dict(os.environ, rig.environment):
        runtime = Runtime()
        scheduler, relay = Scheduler(runtime), OutboxRelay(runtime)

        def purge_step() -> None:
            with runtime.engine.begin() as connection:
                purge.purge(connection, datetime.now(UTC) - timedelta(days=2))

        functions = {
            "Scheduler's turn ms": scheduler.run_once,
            "Relay's turn ms": relay.run_once,
            "purge of 100 ms": purge_step,
        }
        times = {name: seconds_of(function, 20) * 1000 for name, function in functions.items()}
        scheduler.close()
        relay.close()
        runtime.close()
    return times


COMMANDS = (
    "failed",
    "failed --code http-422 --list --limit 20",
    "show seeded-7",
    "purge --older-than 36500d --dry-run",
)


def command(rig: Rig, words: str) -> None:
    environment = {**rig.environment, "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-m", "worker", *words.split()], env=environment, cwd=PROJECT, capture_output=True)


def seconds_of(function: Callable[[], object], times: int) -> float:
    """The median duration of so many calls."""

    def duration() -> float:
        began = time.monotonic()
        function()
        return time.monotonic() - began

    return median(duration() for _ in range(times))


def plot(measured: Rounds) -> None:
    """Draws rates and CPU of all cases as bars, with minimum and maximum, to PLOT."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams.update(
        {"svg.hashsalt": "confirm-offer", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    figures: tuple[tuple[str, Callable[[Drained], float]], ...] = (
        ("confirmations a second", lambda drained: drained.rate),
        ("worker CPU for one, ms", lambda drained: drained.cpu),
    )
    cases = list(dict.fromkeys(case for case, _ in measured))
    for axis, (title, value_of) in zip(axes, figures, strict=True):
        for number, contender in enumerate(ALL):
            values = [[value_of(drained) for drained in measured[case, contender]] for case in cases]
            medians = [median(of_case) for of_case in values]
            errors = [
                [middle - min(of_case) for middle, of_case in zip(medians, values, strict=True)],
                [max(of_case) - middle for middle, of_case in zip(medians, values, strict=True)],
            ]
            positions = [place + (number - 1.5) * 0.21 for place in range(len(cases))]
            axis.bar(
                positions,
                medians,
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
    """A prepared rig in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="confirm-offer-bench-"))
    with Rig(folder) as rig:
        prepare(rig)
        yield rig
    shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    """Cores, memory and Python of this machine."""
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
@click.option("--rows", default=2_000_000, show_default=True, type=click.IntRange(0), help="Of the full tables.")
@click.option("--write/--print", default=True, help="Renew docs/performance.md, or print what it would hold.")
def main(rounds: int, jobs: int, waiting: int, rows: int, write: bool) -> None:
    with rig_in_a_folder() as rig:
        heading = f"Measured on {datetime.now(UTC):%Y-%m-%d} with {machine()}"
        measured = rounds_of(rig, CASES, ALL, rounds, jobs)
        rate = median([drained.rate for drained in measured[Case(0.05, 256), OURS]])
        sections = [
            f"{heading}; {rounds} rounds of {jobs} jobs or more; the middle (least to most).\n",
            "### Side by side\n", *side_by_side(measured), "\n![rate and CPU](performance.svg)\n",
            f"### At ease: {RATE:.0f} jobs a second, publish to event less XONE's 50 ms\n",
            *at_ease(rig, ALL, rounds, 30),
            *(["\n### Backlog\n", *long_backlog(rig, waiting)] if waiting else []),
            "\n### Spike\n", *sudden(rig, 2000, rate),
            *(["\n### Growth\n", *growth(rows, rounds, jobs)] if rows else []),
        ]  # fmt: skip
    page = "\n".join(sections) + "\n"
    if write:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(head + BEGIN + page + END + rest.partition(END)[2])
        plot(measured)
    click.echo(page)


if __name__ == "__main__":
    main()
