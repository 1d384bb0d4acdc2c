"""The command line: `python -m abm_vision.vtab` or `abm-vtab`. The only place that prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vtab_tasks
from abm_vision.abm.bars import watched
from abm_vision.runs.cli import guarded, print_config, run_guarded, say, settings_of, value_of
from abm_vision.runs.device import resolve_device
from abm_vision.runs.log import opened
from abm_vision.vtab.config import RunConfig
from abm_vision.vtab.parsers import (
    COMPARED,
    compare_parser,
    list_parser,
    predict_parser,
    prepare_parser,
    report_parser,
    run_parser,
    suite_parser,
)

PROGRAM = "abm-vtab"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS.get(words[0] if words else "", _run)
    return guarded(
        PROGRAM,
        lambda: command(words[1:] if command is not _run else words),
        smaller="--batch-size, --image-size or --model",
    )


def _run(words: list[str]) -> int:
    options = vars(run_parser().parse_args(words))
    keys = ("out", "rerun", "diagnose", "log", "json", "quiet")
    out, rerun, diagnose, kind, as_json, quiet = (options.pop(key) for key in keys)
    config = settings_of(options, RunConfig)
    quiet = quiet or as_json
    if not quiet:
        print_config(config)

    from abm_vision.vtab.run import run  # imports timm: `--help` and a wrong flag answer at once

    note = None if quiet else say
    with opened(kind, Path(out) / config.run_name()) as log:
        result = run_guarded(
            PROGRAM, lambda: run(config, out, rerun=rerun, quiet=quiet, diagnose=diagnose, say=note, log=log)
        )
    print(json.dumps(result) if as_json else summary(result))
    return 0


def summary(result: dict[str, Any]) -> str:
    """The run in one line, with what kind of data it was tested on, and where its files are."""
    test, config = result["test"], result["config"]
    data = result["data"]["test"]
    images = f"{test['count']} {test['split']} images"
    return (
        f"{config['task']} [{data['source']}]  top-1 {100 * test['top1']:.2f} % of {images}  "
        f"init {config['init']}  seed {config['seed']}  {sum(result['seconds'].values()):.0f} s  {result['folder']}"
    )


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
        note = None if quiet else say
        inits, rates = init.split(","), _numbers("lr", lr)
        found, diverged = run_guarded(
            PROGRAM, lambda: compare.run_all(task.split(","), inits, seeds, rates, options, out, quiet=quiet, say=note)
        )
    compared = comparison.compare(found, diverged)
    paths = compare.write_report(compared, report or out)
    if as_json:
        print(json.dumps([asdict(row) for row in compared.rows]))
    else:
        print(compare.to_text(compared), *paths, sep="\n")
    return 0


LOCAL_FLAGS = ("jobs",)
RAY_FLAGS = {"cpus_per_run": "cpus", "gpus_per_run": "gpus", "ray_address": "address"}  # to those of `on_ray`


def _suite(words: list[str]) -> int:
    options = vars(suite_parser().parse_args(words))
    tasks, init, seeds, grid, out, diagnose, executor, dry_run, quiet = (
        options.pop(name) for name in "tasks init seeds grid out diagnose executor dry_run quiet".split()
    )
    given = {name: options.pop(name) for name in (*LOCAL_FLAGS, *RAY_FLAGS) if name in options}
    others = LOCAL_FLAGS if executor == "ray" else RAY_FLAGS
    foreign = [f"--{name.replace('_', '-')}" for name in given if name in others]
    if foreign:
        raise ValueError(f"{', '.join(foreign)} is not for --executor {executor}")

    from abm_vision.vtab import executors, suite

    wanted = suite.Suite(
        suite.parse_tasks(tasks), tuple(init.split(",")), seeds, options, _grid(grid), diagnose=diagnose
    )
    if dry_run:
        _print_plan(wanted, out)
        return 0
    if executor == "ray":
        execute = executors.on_ray(**{RAY_FLAGS[name]: value for name, value in given.items()})
    elif given.get("jobs", 1) == 1:
        execute = executors.in_this_process(None if quiet else say)
    else:
        execute = executors.local(given["jobs"])
    note = (lambda line: None) if quiet else say
    outcomes = run_guarded(PROGRAM, lambda: suite.run_suite(wanted, out, execute, note))
    failed = {config: outcome for config, outcome in outcomes.items() if outcome.state == "failed"}
    for config, outcome in failed.items():
        print(f"failed: {config.run_name()}: {outcome.reason}", file=sys.stderr)
    if not quiet:
        say(f"{len(outcomes) - len(failed)} runs finished, {len(failed)} failed; results in {out}")
    return 1 if failed else 0


def _grid(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`lr=1e-3,2e-3` to {"lr": (0.001, 0.002)}, by the type of the setting."""
    kinds = {name: value_of(setting) for name, setting in RunConfig.settings().items()}
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        flag, _, values = word.partition("=")
        name = flag.replace("-", "_")
        if name in grid:
            raise ValueError(f"--grid names {name} twice: give all its values at once, with commas between")
        if name not in kinds or not values:
            raise ValueError(f"--grid {word!r} is not SETTING=A,B with a setting of a run, such as lr=1e-3,2e-3")
        try:
            grid[name] = tuple(kinds[name](value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"--grid {word!r}: {name} takes values of type {kinds[name].__name__}") from None
    return grid


def _print_plan(wanted: Any, out: str) -> None:
    from abm_vision.vtab import suite

    throughput, origin = suite.measure(wanted, out)
    planned = suite.plan(wanted, out, throughput)
    for one in planned:
        kind = "selection" if one.config.evaluate == "val" else "final"
        print(
            f"{one.config.run_name():<44} {kind:<10} lr {one.config.lr:<8g} {one.state:<14} {one.seconds / 60:7.1f} min"
        )
    for one in planned:
        if one.reason:
            print(one.reason, file=sys.stderr)
    hours = sum(one.seconds for one in planned) / 3600
    finished = sum(one.state == "finished" for one in planned)
    speed = f"{throughput['train']:.0f} images/s in training and {throughput['test']:.0f} in testing ({origin})"
    print(
        f"{len(planned)} runs, {finished} finished; about {hours:.1f} h one after another, at {speed}; drawing or "
        "decoding images for the first time is extra"
    )


def _report(words: list[str]) -> int:
    options = report_parser().parse_args(words)

    from abm_vision.vtab import collection, report

    found = collection.collect(options.folder)
    paths = report.write_report(found, options.out or options.folder)
    print(report.to_markdown(found), *paths, sep="\n")
    return 0


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give numbers with commas between") from None


def _list(words: list[str]) -> int:
    options = list_parser().parse_args(words)
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
    options = prepare_parser().parse_args(words)
    tasks = list(vtab_tasks.TASKS) if options.task == "all" else options.task.split(",")
    for task in tasks:
        vtab_tasks.get_task(task)
    if options.to == "tfds":
        if options.out or options.source != "auto":
            raise ValueError("--out and --source go with --to folder; TFDS data is written to --data-dir")

        from vtab_tasks.prepare import prepare

        prepare(tasks, options.data_dir, manual_dir=options.manual_dir, say=say)
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
            show_progress_bar=not options.quiet and watched(),
        )
        say(f"{task}: {folder}")
    return 0


def _predict(words: list[str]) -> int:
    options = predict_parser().parse_args(words)

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
