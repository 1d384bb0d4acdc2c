"""The flags of every command of `abm_vision.vtab`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from abm_vision.runs.cli import Parser, add_run_options, add_settings
from abm_vision.vtab.config import SET_BY_SUITE, SOURCES, RunConfig

EPILOG = (
    "Other commands: suite (many tasks, starts and seeds), report (of finished runs), compare (starts side by side), "
    "prepare (fetch data sets, or write them as image folders), list (the tasks and where their data is), predict "
    "(classify image files)."
)


def run_parser() -> argparse.ArgumentParser:
    """One flag for every field of `RunConfig`, and those that do not change a result."""
    parser = Parser("abm-vtab", description="Adapt a pretrained timm ViT to a VTAB-1K task.", epilog=EPILOG)
    add_settings(parser, RunConfig)
    add_run_options(parser)
    return parser


# What is compared unless it is said otherwise.
COMPARED = {"task": RunConfig.task, "init": "kaiming,abm", "lr": "5e-4,1e-3,2e-3,4e-3", "seeds": 3}


def compare_parser() -> argparse.ArgumentParser:
    """What is to be compared, and the settings that all runs share."""
    parser = Parser(
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
    add_settings(parser, RunConfig, without=("task", "init", "lr", "seed"))
    return parser


def suite_parser() -> argparse.ArgumentParser:
    """What is to be run, how, and the settings that all runs share."""
    parser = Parser(
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
    add_settings(parser, RunConfig, without=SET_BY_SUITE)
    parser.add_argument("--out", default="results", help="folder of the runs (default: results)")
    parser.add_argument("--diagnose", action="store_true", help="measure the information loss of every start")
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="where (default: local)")
    unset = {"default": argparse.SUPPRESS}  # a flag of the other executor is told, not passed over
    parser.add_argument("--jobs", type=int, **unset, help="local: runs at a time (default: 1)")
    parser.add_argument("--ray-address", **unset, help="ray: the cluster's address (default: found, or started here)")
    parser.add_argument("--cpus-per-run", type=float, **unset, help="ray: CPUs that a run takes (default: 1)")
    parser.add_argument("--gpus-per-run", type=float, **unset, help="ray: GPUs, or a fraction (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and the time they are likely to take")
    parser.add_argument("--quiet", action="store_true", help="nothing but the failures")
    return parser


def list_parser() -> argparse.ArgumentParser:
    """The tasks, and where to look for their data."""
    parser = Parser("abm-vtab list", description="The tasks, and where their data was found.")
    parser.add_argument("--data-dir", help="folder with vtab-1k files or with prepared TFDS data")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """An adapter, and images."""
    parser = Parser("abm-vtab predict", description="Classify image files with a saved adapter.")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="a run's folder, or the adapter's own")
    parser.add_argument("--weights", help="of the backbone, as for a run (default: as the run had them)")
    parser.add_argument("--device", default="auto", help="auto, or a torch device (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    return parser


def prepare_parser() -> argparse.ArgumentParser:
    """Data sets to prepare, or to write as image folders."""
    parser = Parser(
        "abm-vtab prepare",
        description="Download and prepare official data sets with tensorflow-datasets (this alone needs TensorFlow: "
        'pip install -e ".[prepare]"). Or, with --to folder, write images in the community\'s layout, as PNG.',
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
    return parser


def report_parser() -> argparse.ArgumentParser:
    """A folder of runs."""
    parser = Parser(
        "abm-vtab report",
        description="Tables, figures and statistics of the finished runs in a folder, as Markdown, CSV, "
        "LaTeX and one HTML page.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the runs: --out of a suite or of single runs")
    parser.add_argument("--out", metavar="DIR", help="where to write report.md, .csv, .tex and .html (default: there)")
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "": run_parser,
    "suite": suite_parser,
    "report": report_parser,
    "compare": compare_parser,
    "prepare": prepare_parser,
    "list": list_parser,
    "predict": predict_parser,
}
