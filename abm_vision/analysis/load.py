"""Results of finished runs: found, read, named by what differs between them, and checked to be comparable."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abm_vision.analysis.view import Result, View
from abm_vision.initializers import BASELINE
from abm_vision.runs.content import shortened
from abm_vision.runs.folder import CONFIG, FAILURE, RESULT
from abm_vision.runs.records import Failure, read_record

OTHER_DATA = "other data"
_CODE = "initialisation"
_IDENTITY = ("task", "init", "seed")
# Settings as they were asked for; the result records what was used.
_ASKED = ("weights", "precision", "device", "abm_reference", "plugin")
# May differ between runs of one method.
_CIRCUMSTANCES = ("device", "commit")
Unfinished = list[tuple[str, str]]  # run folder, why it has no result


def read_finished(folder: str | Path, view: View) -> Result:
    """The result of a run that must be finished.

    Raises:
        FileNotFoundError: it is not, or there is none.
        ValueError: it is damaged.
    """
    result = view.kept.read(Path(folder))
    if result is None:
        raise FileNotFoundError(f"no {RESULT} in {folder}: pass the folder of a finished run")
    return result


def find(folder: Path, view: View) -> tuple[list[Result], Unfinished]:
    """The results of the finished runs below a folder, with their `file` relative to it, by task, method and seed.

    Every one has a `method`, the name that tells it from others of its initialisation, and `own`, what differs. Runs of
    a selection, and those made as another run's reference alone, are left out. A result that cannot be read is named
    among what has none, with the reason.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    runs, unfinished, selections = [], [], 0
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        try:
            result = view.kept.read(path.parent)
        except ValueError as error:
            unfinished.append((path.parent.name, f"not readable: {error}"))
            continue
        if result is None:
            unfinished.append((path.parent.name, _why(path.parent, view)))
        elif view.is_selection(result["config"]):
            selections += 1
        elif not result.get("reference_only"):
            runs.append({**result, "file": f"{path.parent.name}/{RESULT}"})
    if not runs:
        others = f" ({selections} scored on {view.selection_split} are no results)" if selections else ""
        unread = "".join(f"; {name} is {why}" for name, why in unfinished if why.startswith("not readable"))
        raise FileNotFoundError(
            f"no finished run below {folder}{others}: give the folder that was --out of the runs{unread}"
        )
    runs, again = _once(_named(_with_data(runs, view), view), view)
    runs.sort(key=lambda run: (view.tasks.index(view.task_of(run)), run["method"], run["config"]["seed"]))
    return runs, unfinished + again


def _why(folder: Path, view: View) -> str:
    if (folder / FAILURE).is_file():
        try:
            return read_record(folder / FAILURE, Failure)["reason"]
        except ValueError as error:
            return f"failed; why is not readable: {error}"
    return "interrupted" if view.kept.is_interrupted(folder) else "not begun"


def _with_data(runs: Sequence[Result], view: View) -> list[Result]:
    """The runs with `other_data`: None for those on the data that most runs of their task are on, else their hash.

    A part of the scored split of another size is another one of the same data.
    """
    groups: dict[tuple[Any, ...], Counter[str]] = {}
    digests = [hashlib.sha256(repr(data_content(run, view)).encode()).hexdigest()[:8] for run in runs]
    keys = [(view.data_of(run), view.kind(run), view.counted(run)[0]) for run in runs]
    for key, digest in zip(keys, digests, strict=True):
        groups.setdefault(key, Counter()).update([digest])
    most = {key: found.most_common(1)[0][0] for key, found in groups.items()}
    return [
        {**run, "other_data": None if digest == most[key] else digest}
        for run, key, digest in zip(runs, keys, digests, strict=True)
    ]


def data_content(run: Result, view: View) -> dict[str, str]:
    """Hashes of the run's data, in short."""
    return {name: shortened(value) for name, value in view.content(run).items()}


def _named(runs: Sequence[Result], view: View) -> list[Result]:
    """The runs with `own`, what differs between runs of one initialisation and task, and `method`, a name with that.

    What differs between tasks only, as a selection makes it, stays within one method.
    """
    found = [facts(run, view) for run in runs]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run, fact in zip(runs, found, strict=True):
        groups.setdefault((run["config"]["init"], view.task_of(run), view.kind(run)), []).append(fact)
    differing: dict[str, set[str]] = {}
    for (init, *_), alike in groups.items():
        names = {name for name in alike[0] if any(fact[name] != alike[0][name] for fact in alike)}
        differing.setdefault(init, set()).update(names - {*_CIRCUMSTANCES, OTHER_DATA})
    named = []
    for run, fact in zip(runs, found, strict=True):
        init = run["config"]["init"]
        own = {name: fact[name] for name in sorted(differing[init])}
        if fact[OTHER_DATA]:
            own[OTHER_DATA] = fact[OTHER_DATA]
        named.append({**run, "own": own, "method": ", ".join([init, *(f"{k} {v}" for k, v in own.items())])})
    return named


def _once(runs: Sequence[Result], view: View) -> tuple[list[Result], Unfinished]:
    """Leave out runs that repeat another one; returns the rest, and why each was left out."""
    found: dict[tuple[Any, ...], Result] = {}
    again = []
    for run in runs:
        first = found.setdefault((view.task_of(run), run["method"], run["config"]["seed"], view.kind(run)), run)
        if first is run:
            continue
        same = run["loss_per_step"] == first["loss_per_step"] and view.details(run) == view.details(first)
        why = (
            f"it is {first['file']} again"
            if same
            else f"it has the settings of {first['file']} and another result on the same data: report each apart"
        )
        again.append((run["file"], f"left out, {why}"))
    return list(found.values()), again


def facts(run: Result, view: View) -> dict[str, Any]:
    """Settings and circumstances that a reader must know to be equal; those that the initialisation has a use for."""
    environment, sha256, reference = run["environment"], run["weights"]["sha256"], run["reference"]
    commit = environment["commit"]
    return {
        **_settings(run, view),
        "weights": f"sha256 {sha256[:12]}" if sha256 else "random",
        **view.circumstances(run),
        "data": view.source(run),
        OTHER_DATA: run["other_data"],
        _CODE: run["origin"]["initialisation"],
        "precision": run["precision"],
        # A reference tuned by the run itself is another one for every seed.
        "reference": reference["folder"] if reference and run["config"]["abm_reference"] else "none given",
        "device": environment["device"],
        "commit": f"{commit['id'][:12]}{', modified' if commit['modified'] else ''}" if commit else "none",
    }


def _settings(run: Result, view: View) -> dict[str, Any]:
    config, elsewhere = run["config"], (*_IDENTITY, *_ASKED, *view.asked)
    return {name: v for name, v in config.items() if name not in elsewhere and view.config.uses(config["init"], name)}


def compare_facts(runs: Sequence[Result], view: View) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]]]:
    """What all runs have in common; and of what they have not, fact to value to the files of its runs."""
    every = [facts(run, view) for run in runs]
    common, differing = {}, {}
    for name in dict.fromkeys(name for fact in every for name in fact if name not in (OTHER_DATA, _CODE)):
        values: dict[str, list[str]] = {}
        for fact, run in zip(every, runs, strict=True):
            if name in fact:  # an initialisation without a use for a setting has no value of it
                values.setdefault(str(fact[name]), []).append(run["file"])
        if len(values) == 1:
            common[name] = next(fact[name] for fact in every if name in fact)
        else:
            differing[name] = values
    return common, differing


# ------------------------------------------------------------------------------------------- runs that are compared


def common_settings(results: Sequence[Result], view: View) -> dict[str, Any]:
    """The settings that all runs have in common.

    They may differ in task, initialisation, learning rate and seed, and in settings of the initialisation alone.

    Raises:
        ValueError: they differ in more; the message names it. Or there is no run.
    """
    if not results:
        raise ValueError("there is nothing to compare: no run has finished")
    for same in dict.fromkeys(map(view.data_of, results)):
        _equal([{**view.sources(r), **data_content(r, view)} for r in results if view.data_of(r) == same])
    for init in dict.fromkeys(result["config"]["init"] for result in results):
        _equal([_code(result) for result in results if result["config"]["init"] == init])
    return _equal([_shared(result, view) for result in results])


def _shared(result: Result, view: View) -> dict[str, Any]:
    """What must be equal for a difference to be the initialisation's."""
    shared = view.config.shared() - {"lr"}
    return {
        **{name: value for name, value in _settings(result, view).items() if name in shared},
        "weights": result["weights"]["sha256"],
        **view.circumstances(result),
        "precision": result["precision"],
        "device": result["environment"]["device"],
    }


def _code(result: Result) -> dict[str, Any]:
    """Of one initialisation: that of its function. The reference that it is given is a setting of its own."""
    init = result["config"]["init"]
    return {f"code of {init}": result["origin"]["initialisation"]} if "origin" in result else {}


def _equal(common: Sequence[dict[str, Any]]) -> dict[str, Any]:
    differing = {
        name: sorted({str(settings[name]) for settings in common})
        for name in common[0]
        if any(settings[name] != common[0][name] for settings in common)
    }
    if differing:
        words = "; ".join(f"{name} ({', '.join(values)})" for name, values in differing.items())
        raise ValueError(
            f"the runs differ in more than task, initialisation, rate and seed: {words}. Compare like with like"
        )
    return common[0]


def check_seeds(groups: Mapping[tuple[str, str], Sequence[Result]]) -> None:
    """Raise a ValueError unless every initialisation of a task has the seeds of the baseline, each once."""
    for (task, init), runs in groups.items():
        if (task, BASELINE) not in groups:
            raise ValueError(f"{task} has no run with init {BASELINE}, which all others are compared with: add it")
        seeds, wanted = ([r["config"]["seed"] for r in found] for found in (runs, groups[task, BASELINE]))
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{init} on {task} has several runs of one seed: their own settings differ")
        if seeds != wanted:
            raise ValueError(f"{init} on {task} has seeds {seeds}, {BASELINE} has {wanted}: differences are paired")
