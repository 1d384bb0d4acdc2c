"""Results of finished runs: found, read, and named by what differs between them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from abm_vision.runs.content import shortened
from abm_vision.runs.folder import CONFIG, RESULT, State
from abm_vision.runs.view import Result, View

OTHER_DATA = "other data"
_CODE = "initialisation"
_IDENTITY = ("task", "init", "seed")
# Settings as they were asked for; the result records what was used.
_ASKED = ("weights", "precision", "device", "abm_reference", "plugin")
# May differ between runs of one method.
_CIRCUMSTANCES = ("device", "commit")
Unfinished: TypeAlias = list[tuple[str, str]]  # run folder, why it has no result
Key, Item = TypeVar("Key"), TypeVar("Item")


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by their key; keys and items in the order of the items."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


@dataclass(frozen=True)
class Finished:
    """A finished run among others: its result, and what is derived from it and them.

    Args:
        result: the content of its `result.json`.
        file: that file, relative to the folder of the runs.
        task, kind: what the harness's view calls its task and the kind of its data.
        facts: settings and circumstances that a reader must know to be equal; those that its initialisation has a use
            for.
        own: those of the facts that tell it from other runs of its initialisation and task.
    """

    result: Result
    file: str
    task: str
    kind: str
    facts: Mapping[str, Any]
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def init(self) -> str:
        return self.result["config"]["init"]

    @property
    def seed(self) -> int:
        return self.result["config"]["seed"]

    @property
    def method(self) -> str:
        """Its initialisation, and what tells it from others of that."""
        return ", ".join([self.init, *(f"{name} {value}" for name, value in self.own.items())])


# --------------------------------------------------------------------------------------------------- found and read


def read_results(folders: Iterable[str | Path], view: View) -> tuple[list[Result], Unfinished]:
    """The results of finished runs, given by their folders or by folders of runs; what `find` leaves out of these.

    Raises:
        FileNotFoundError: one is not finished, or there is none.
        ValueError: one that is given by itself is damaged, or another harness's.
    """
    results, unfinished = [], []
    for folder in map(Path, folders):
        if not (folder / CONFIG).is_file() and any(folder.glob(f"*/{CONFIG}")):
            found, others = find(folder, view)
            results += [run.result for run in found]
            unfinished += others
        else:
            results.append(read_finished(folder, view))
    return results, unfinished


def read_finished(folder: str | Path, view: View) -> Result:
    """The result of a run that must be finished.

    Raises:
        FileNotFoundError: it is not, or there is none.
        ValueError: it is damaged, or another harness's.
    """
    result = view.kept.read(Path(folder))
    if result is None:
        raise FileNotFoundError(f"no {RESULT} in {folder}: pass the folder of a finished run, or one that holds some")
    return result


def find(folder: Path, view: View) -> tuple[list[Finished], Unfinished]:
    """The finished runs below a folder, by task, method and seed; and what has no result, with the reason in a line.

    Runs of a selection, and those made as another run's reference alone, are left out.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    states = {path.parent.name: view.kept.state(path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))}
    final = {f"{name}/{RESULT}": state.result for name, state in states.items() if _is_final(state.result, view)}
    if not final:
        raise FileNotFoundError(_nothing(folder, view, states))
    unfinished = [(name, _why(state)) for name, state in states.items() if state.result is None]
    runs, again = _once(_named(_load(final, view)), view)
    runs.sort(key=lambda run: (view.tasks.index(run.task), run.method, run.seed))
    return runs, [(name, " ".join(why.split())) for name, why in unfinished + again]


def _is_final(result: Result | None, view: View) -> bool:
    return bool(result) and not view.is_selection(result["config"]) and not result.get("reference_only")


def _why(state: State) -> str:
    """Why a run has no result."""
    return f"not readable: {state.reason}" if state.name == "not readable" else state.reason or state.name


def _nothing(folder: Path, view: View, states: Mapping[str, State]) -> str:
    """What to say where no run is finished."""
    chosen = sum(view.is_selection(state.result["config"]) for state in states.values() if state.result)
    selections = f" ({chosen} scored on {view.selection.split} are no results)" if chosen else ""
    unread = [name for name, state in states.items() if state.name in ("not readable", "another harness")]
    by_reason = grouped(unread, lambda name: _why(states[name]))
    others = "".join(f"; {', '.join(names)} is {why}" for why, names in by_reason.items())
    return f"no finished run below {folder}{selections}: give the folder that was --out of the runs{others}"


def _load(results: Mapping[str, Result], view: View) -> list[Finished]:
    """The runs of these files, with their facts."""
    others = _other_data([*results.values()], view)
    return [
        Finished(result, file, view.task_of(result), view.data.kind(result), _facts(result, view, other))
        for (file, result), other in zip(results.items(), others, strict=True)
    ]


def _other_data(results: Sequence[Result], view: View) -> list[str | None]:
    """Of every run None if it is on the data that most runs of its task are on, else their hash.

    A part of the scored split of another size is another one of the same data.
    """
    digests = [hashlib.sha256(repr(data_content(result, view)).encode()).hexdigest()[:8] for result in results]
    keys = [(view.data_of(result), view.data.kind(result), view.data.counted(result)[0]) for result in results]
    alike = grouped(zip(keys, digests, strict=True), lambda pair: pair[0])
    usual = {key: Counter(pairs).most_common(1)[0][0][1] for key, pairs in alike.items()}
    return [None if digest == usual[key] else digest for key, digest in zip(keys, digests, strict=True)]


def data_content(run: Result, view: View) -> dict[str, str]:
    """Hashes of the run's data, in short."""
    return {name: shortened(value) for name, value in view.data.content(run).items()}


def _facts(run: Result, view: View, other_data: str | None) -> dict[str, Any]:
    environment, sha256, reference = run["environment"], run["weights"]["sha256"], run["reference"]
    commit = environment["commit"]
    return {
        **settings_in_use(run, view),
        "weights": f"sha256 {sha256[:12]}" if sha256 else "random",
        **view.circumstances(run),
        "data": view.data.source(run),
        OTHER_DATA: other_data,
        _CODE: run["origin"]["initialisation"],
        "precision": run["precision"],
        # A reference tuned by the run itself is another one for every seed.
        "reference": reference["folder"] if reference and run["config"]["abm_reference"] else "none given",
        "device": environment["device"],
        "commit": f"{commit['id'][:12]}{', modified' if commit['modified'] else ''}" if commit else "none",
    }


def settings_in_use(run: Result, view: View) -> dict[str, Any]:
    """Those that the initialisation has a use for, but for what the run is of and what the result says elsewhere."""
    config, elsewhere = run["config"], (*_IDENTITY, *_ASKED, *view.asked)
    return {name: v for name, v in config.items() if name not in elsewhere and view.config.uses(config["init"], name)}


def _named(runs: Sequence[Finished]) -> list[Finished]:
    """The runs with what differs between those of one initialisation and task as their `own`.

    What differs between tasks only, as a selection makes it, stays within one method.
    """
    differing: dict[str, set[str]] = {}
    for (init, *_), alike in grouped(runs, lambda run: (run.init, run.task, run.kind)).items():
        first = alike[0].facts
        names = {name for name in first if any(run.facts[name] != first[name] for run in alike)}
        differing.setdefault(init, set()).update(names - {*_CIRCUMSTANCES, OTHER_DATA})
    named = []
    for run in runs:
        names = [*sorted(differing[run.init]), *([OTHER_DATA] if run.facts[OTHER_DATA] else [])]
        named.append(replace(run, own={name: run.facts[name] for name in names}))
    return named


def _once(runs: Sequence[Finished], view: View) -> tuple[list[Finished], Unfinished]:
    """Leave out runs that repeat another one; returns the rest, and why each was left out."""
    found: dict[tuple[Any, ...], Finished] = {}
    again = []
    for run in runs:
        first = found.setdefault((run.task, run.method, run.seed, run.kind), run)
        if first is run:
            continue
        made, before = ((r["loss_per_step"], view.score.columns(r)) for r in (run.result, first.result))
        why = (
            f"it is {first.file} again"
            if made == before
            else f"it has the settings of {first.file} and another result on the same data: report each apart"
        )
        again.append((run.file, f"left out, {why}"))
    return list(found.values()), again


def compare_facts(runs: Sequence[Finished]) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]]]:
    """What all runs have in common; and of what they have not, fact to value to the files of its runs."""
    common, differing = {}, {}
    for name in dict.fromkeys(name for run in runs for name in run.facts if name not in (OTHER_DATA, _CODE)):
        those = [run for run in runs if name in run.facts]  # the initialisations that have a use for it
        values = grouped(those, lambda run, name=name: str(run.facts[name]))
        if len(values) == 1:
            common[name] = those[0].facts[name]
        else:
            differing[name] = {value: [run.file for run in found] for value, found in values.items()}
    return common, differing
