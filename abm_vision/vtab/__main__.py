"""The command line: `python -m abm_vision.vtab` or `abm-vtab`. The only place that prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, NoReturn

import vtab_tasks
from abm_vision.vtab.config import PRESETS, SOURCES, RunConfig, make_config, read_config, resolve_device

EPILOG = (
    "Other commands: suite (many tasks, starts and seeds), report (of finished runs), compare (starts side by side), "
    "prepare (fetch data sets, or write them as image folders), list (the tasks and where their data is), predict "
    "(classify image files)."
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS.get(words[0] if words else "", _run)
    try:
        return command(words[1:] if command is not _run else words)
    except (ValueError, OSError) as error:
        print(f"abm-vtab: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nabm-vtab: interrupted", file=sys.stderr)
        return 130


def run_parser() -> argparse.ArgumentParser:
    """One flag for every field of `RunConfig`, and those that do not change a result."""
    parser = _Parser("abm-vtab", description="Adapt a pretrained timm ViT to a VTAB-1K task.", epilog=EPILOG)
    _add_settings(parser)
    parser.add_argument("--config", metavar="FILE", help="settings from a run's config.json or result.json; flags win")
    parser.add_argument("--out", default="results", help="folder of the results, one folder a run (default: results)")
    parser.add_argument("--rerun", action="store_true", help="start afresh even if the run is finished or half done")
    parser.add_argument(
        "--diagnose", action="store_true", help="measure the information loss of the start, and draw it"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON, nothing else")
    parser.add_argument("--quiet", action="store_true", help="no configuration, stages and progress bars")
    return parser


def _add_settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """A flag for every field of `RunConfig`; those not given are not set."""
    for field in fields(RunConfig):
        if field.name in without:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        kind = {"int": int, "float": float}.get(str(field.type), str)
        choices = tuple(PRESETS) if field.name == "preset" else field.metadata.get("choices")
        default = "none" if field.default is None or field.default is MISSING else field.default
        text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
        parser.add_argument(flag, type=kind, choices=choices, default=argparse.SUPPRESS, help=text)


def _run(words: list[str]) -> int:
    options = vars(run_parser().parse_args(words))
    out, rerun, diagnose, as_json, quiet = (options.pop(k) for k in ("out", "rerun", "diagnose", "json", "quiet"))
    path = options.pop("config")
    if path and "preset" in options:
        raise ValueError("--config sets every field, so --preset would only change the name: give one of them")
    config = make_config(**{**(read_config(path) if path else {}), **options})
    quiet = quiet or as_json
    if not quiet:
        print_config(config)

    from abm_vision.vtab.run import run  # imports timm: `--help` and a wrong flag answer at once

    try:
        result = run(config, out, rerun=rerun, quiet=quiet, diagnose=diagnose, say=None if quiet else _say)
    except KeyboardInterrupt:
        words = "the same command (without --rerun) goes on from the last whole epoch"
        print(f"\nabm-vtab: interrupted; {words}", file=sys.stderr)
        return 130
    print(json.dumps(result) if as_json else summary(result))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def print_config(config: RunConfig) -> None:
    """Every setting, marked where it differs from the default."""
    defaults = asdict(RunConfig())
    for name, value in asdict(config).items():
        print(f"{'*' if value != defaults[name] else ' '} {name:<18} {value}")


def summary(result: dict[str, Any]) -> str:
    """The run in one line, with what kind of data it was tested on, and where its files are."""
    test, config = result["test"], result["config"]
    data = result["data"]["test"]
    images = f"{test['count']} {test['split']} images"
    return (
        f"{config['task']} [{data['source']}]  top-1 {100 * test['top1']:.2f} % of {images}  "
        f"init {config['init']}  seed {config['seed']}  {sum(result['seconds'].values()):.0f} s  {result['folder']}"
    )


# What is compared unless it is said otherwise.
COMPARED = {"task": RunConfig.task, "init": "kaiming,abm", "lr": "5e-4,1e-3,2e-3,4e-3", "seeds": 3}


def compare_parser() -> argparse.ArgumentParser:
    """What is to be compared, and the settings that all runs share."""
    parser = _Parser(
        "abm-vtab compare",
        description="Train every start with every learning rate and seed, and compare each at its own best rate. "
        "Finished runs are reused, a killed comparison goes on. Or compare the finished runs in given folders.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs, instead of running any")
    for name, text in {
        "task": "tasks with commas between",
        "init": "starts with commas between, kaiming among them",
        "lr": "learning rates with commas between",
        "seeds": "number of seeds, from 0 on",
    }.items():
        default = COMPARED[name]
        kind = type(default)
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    parser.add_argument("--out", default="results", help="folder of the runs (default: results)")
    parser.add_argument("--report", metavar="DIR", help="folder of compare.md, .csv and .png (default: as --out)")
    parser.add_argument("--json", action="store_true", help="print the rows as one line of JSON, nothing else")
    parser.add_argument("--quiet", action="store_true", help="no stages and progress bars, only the table")
    _add_settings(parser, without=("task", "init", "lr", "seed"))
    return parser


def _compare(words: list[str]) -> int:
    options = vars(compare_parser().parse_args(words))
    runs, out, report, as_json, quiet = (options.pop(k) for k in ("runs", "out", "report", "json", "quiet"))

    from abm_vision.vtab import compare, comparison, results

    if runs:
        if options:
            raise ValueError(f"finished runs have their settings: leave out {', '.join(options)}")
        found, diverged = [results.read_finished(folder) for folder in runs], []
    else:
        quiet = quiet or as_json
        task, init, lr, seeds = (options.pop(name, default) for name, default in COMPARED.items())
        found, diverged = compare.run_all(
            task.split(","),
            init.split(","),
            seeds,
            _numbers("lr", lr),
            options,
            out,
            quiet=quiet,
            say=None if quiet else _say,
        )
    compared = comparison.compare(found, diverged)
    paths = compare.write_report(compared, report or out)
    if as_json:
        print(json.dumps([asdict(row) for row in compared.rows]))
    else:
        print(compare.to_text(compared), *paths, sep="\n")
    return 0


SUITE_SETTINGS = ("task", "init", "seed", "evaluate")  # what a suite sets by itself


def suite_parser() -> argparse.ArgumentParser:
    """What is to be run, how, and the settings that all runs share."""
    parser = _Parser(
        "abm-vtab suite",
        description="Run tasks, starts and seeds after the protocol of VTAB-1K. Finished runs are reused, killed ones "
        "go on, failed ones are recorded and do not stop the rest; several suites may share one --out.",
    )
    parser.add_argument("--tasks", default="all", help="all, natural, specialized, structured, or names (default: all)")
    parser.add_argument("--init", default="abm,kaiming", help="starts with commas between (default: abm,kaiming)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds 0, 1, ... (default: 1)")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SETTING=A,B",
        help="choose this setting on train800/val200, for every task from the same values; may be given several times",
    )
    _add_settings(parser, without=SUITE_SETTINGS)
    parser.add_argument("--out", default="results", help="folder of the runs (default: results)")
    parser.add_argument("--diagnose", action="store_true", help="measure the information loss of every start")
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="where (default: local)")
    parser.add_argument("--jobs", type=int, default=1, help="local: runs at a time (default: 1)")
    parser.add_argument("--ray-address", help="ray: the cluster's address (default: found, or started here)")
    parser.add_argument("--cpus-per-run", type=float, default=1.0, help="ray: CPUs that a run takes (default: 1)")
    parser.add_argument("--gpus-per-run", type=float, default=0.0, help="ray: GPUs, or a fraction (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and the time they are likely to take")
    parser.add_argument("--quiet", action="store_true", help="nothing but the failures")
    return parser


def _suite(words: list[str]) -> int:
    options = vars(suite_parser().parse_args(words))
    names = "tasks init seeds grid out diagnose executor jobs ray_address cpus_per_run gpus_per_run dry_run quiet"
    tasks, init, seeds, grid, out, diagnose, executor, jobs, address, cpus, gpus, dry_run, quiet = (
        options.pop(name) for name in names.split()
    )

    from abm_vision.vtab import executors, suite

    wanted = suite.Suite(
        suite.parse_tasks(tasks), tuple(init.split(",")), seeds, options, _grid(grid), diagnose=diagnose
    )
    if dry_run:
        _print_plan(wanted, out)
        return 0
    if executor == "ray":
        execute = executors.on_ray(cpus, gpus, address)
    elif jobs == 1:
        execute = executors.in_this_process(None if quiet else _say)
    else:
        execute = executors.local(jobs)
    outcomes = suite.run_suite(wanted, out, execute, (lambda line: None) if quiet else _say)
    failed = {config: outcome for config, outcome in outcomes.items() if outcome.state == "failed"}
    for config, outcome in failed.items():
        print(f"failed: {config.run_name()}: {outcome.reason}", file=sys.stderr)
    if not quiet:
        _say(f"{len(outcomes) - len(failed)} runs finished, {len(failed)} failed; results in {out}")
    return 1 if failed else 0


def _grid(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`lr=1e-3,2e-3` to {"lr": (0.001, 0.002)}, by the type of the setting."""
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(RunConfig)}
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        flag, _, values = word.partition("=")
        name = flag.replace("-", "_")
        if name not in kinds or not values:
            raise ValueError(f"--grid {word!r} is not SETTING=A,B with a setting of a run, such as lr=1e-3,2e-3")
        try:
            grid[name] = tuple(kinds[name](value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"--grid {word!r}: {name} takes values of type {kinds[name].__name__}") from None
    return grid


def _print_plan(wanted: Any, out: str) -> None:
    import tempfile

    from abm_vision.vtab import suite
    from abm_vision.vtab.run import run

    short = suite.short(wanted)
    throughput = suite.measured(out, short)
    origin = f"finished runs in {out}"
    if throughput is None:
        origin = f"one epoch of {short.task} just now"
        with tempfile.TemporaryDirectory() as folder:
            run(short, folder)
            throughput = suite.measured(folder, short)
    planned = suite.plan(wanted, out, throughput)
    for one in planned:
        kind = "selection" if one.config.evaluate == "val" else "final"
        print(
            f"{one.config.run_name():<44} {kind:<10} lr {one.config.lr:<8g} {one.state:<14} {one.seconds / 60:7.1f} min"
        )
    hours = sum(one.seconds for one in planned) / 3600
    finished = sum(one.state == "finished" for one in planned)
    speed = f"{throughput['train']:.0f} images/s in training and {throughput['test']:.0f} in testing ({origin})"
    print(
        f"{len(planned)} runs, {finished} finished; about {hours:.1f} h one after another, at {speed}; drawing or "
        "decoding images for the first time is extra"
    )


def _report(words: list[str]) -> int:
    parser = _Parser(
        "abm-vtab report",
        description="Tables, figures and statistics of the finished runs in a folder, as Markdown, CSV, "
        "LaTeX and one HTML page.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the runs: --out of a suite or of single runs")
    parser.add_argument("--out", metavar="DIR", help="where to write report.md, .csv, .tex and .html (default: there)")
    options = parser.parse_args(words)

    from abm_vision.vtab import report

    found = report.collect(options.folder)
    paths = report.write_report(found, options.out or options.folder)
    print(report.to_markdown(found), *paths, sep="\n")
    return 0


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give numbers with commas between") from None


def _list(words: list[str]) -> int:
    parser = _Parser("abm-vtab list", description="The tasks, and where their data was found.")
    parser.add_argument("--data-dir", help="folder with vtab-1k files or with prepared TFDS data")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)
    rows = [
        {
            "task": task.name,
            "group": task.group,
            "classes": task.num_classes,
            "test_images": task.size("test"),
            "data": [
                f"{source}: {place or 'drawn offline'}"
                for source, place in vtab_tasks.locate(task.name, options.data_dir)
            ],
        }
        for task in vtab_tasks.TASKS.values()
    ]
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"{'task':<16}{'group':<13}{'classes':>7}{'test':>9}  data")
    for row in rows:
        print(
            f"{row['task']:<16}{row['group']:<13}{row['classes']:>7}{row['test_images']:>9}  {', '.join(row['data'])}"
        )
    return 0


def _prepare(words: list[str]) -> int:
    parser = _Parser(
        "abm-vtab prepare",
        description="Download and prepare official data sets with tensorflow-datasets (this alone needs TensorFlow: "
        'pip install "abm-lora[prepare]"). Or, with --to folder, write images in the community\'s layout, as PNG.',
    )
    parser.add_argument("--task", required=True, help="tasks with commas between, or all")
    parser.add_argument("--data-dir", help="where prepared data is, or is to be (default: TFDS's own folder)")
    parser.add_argument("--manual-dir", help="files fetched by hand (default: DATA_DIR/downloads/manual)")
    parser.add_argument("--to", choices=("tfds", "folder"), default="tfds", help="what to write (default: tfds)")
    parser.add_argument("--out", metavar="DIR", help="with --to folder: writes DIR/vtab-1k/TASK")
    parser.add_argument(
        "--source", choices=SOURCES, default="auto", help="with --to folder: where images come from (default: auto)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(words)
    tasks = list(vtab_tasks.TASKS) if options.task == "all" else options.task.split(",")
    for task in tasks:
        vtab_tasks.get_task(task)
    if options.to == "tfds":
        if options.out or options.source != "auto":
            raise ValueError("--out and --source go with --to folder; TFDS data is written to --data-dir")

        from vtab_tasks.prepare import prepare

        prepare(tasks, options.data_dir, manual_dir=options.manual_dir, say=_say)
        return 0
    if not options.out:
        raise ValueError("--to folder needs --out, the folder to write vtab-1k/TASK below")
    if options.manual_dir:
        raise ValueError("--manual-dir goes with --to tfds")

    from vtab_tasks.export import export

    for task in tasks:
        folder = export(
            task,
            options.out,
            source=options.source,
            data_dir=options.data_dir,
            show_progress_bar=not options.quiet and sys.stderr.isatty(),
        )
        _say(f"{task}: {folder}")
    return 0


def _predict(words: list[str]) -> int:
    parser = _Parser("abm-vtab predict", description="Classify image files with a saved adapter.")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="a run's folder, or the adapter's own")
    parser.add_argument("--weights", help="of the backbone, as for a run (default: as the run had them)")
    parser.add_argument("--device", default="auto", help="auto, or a torch device (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    options = parser.parse_args(words)

    from abm_vision.vtab.predict import predict

    device = resolve_device(options.device)
    rows = predict(options.adapter, options.images, weights=options.weights, device=device)
    if options.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            data = f"{row['task']} [{row['trained_on']}]"
            print(f"{row['image']}: class {row['label']} of {data}, probability {row['probability']:.3f}")
    return 0


COMMANDS = {
    "compare": _compare,
    "list": _list,
    "predict": _predict,
    "prepare": _prepare,
    "report": _report,
    "suite": _suite,
}

if __name__ == "__main__":
    sys.exit(main())
