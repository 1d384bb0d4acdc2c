"""The tables of the documents, printed from the committed result files and the code.

python benchmarks/tables.py            # print them
python benchmarks/tables.py --write    # put them into the documents, between their markers
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import tables_code as code
import tables_costs as costs
import tables_evidence as evidence
import tables_runs as runs

ROOT = Path(__file__).parent.parent
TABLES: dict[Path, tuple[Callable[[], str], ...]] = {
    ROOT / "docs" / "measurements.md": (
        costs.training_step,
        costs.nlp_step,
        costs.attention,
        costs.abm_init,
        costs.nlp_init,
        evidence.cifar10,
        evidence.smollm,
        runs.suite,
        runs.families,
    ),
    ROOT / "benchmarks" / "README.md": (
        costs.information_loss,
        costs.rendering,
        costs.data_path,
        runs.schedule,
        runs.screening,
        runs.confirmation,
        runs.sweep,
        runs.directions,
        runs.from_adapter,
        runs.nlp_initializers,
    ),
    ROOT / "docs" / "gpu.md": (costs.gpu_step, costs.gpu_init, code.whole("examples/cuda_graph.py")),
    ROOT / "docs" / "fast_layer.md": (costs.fast_layer,),
    ROOT / "docs" / "own_images.md": (costs.tune, costs.workers),
    ROOT / "docs" / "deploy.md": (costs.export,),
    ROOT / "docs" / "concepts.md": (code.initialisations,),
    ROOT / "docs" / "pipelines.md": (
        code.whole("examples/own_images.py"),
        code.whole("examples/plain_loop.py"),
        code.whole("examples/timm_training.py"),
        code.whole("examples/transformers_trainer.py"),
        code.whole("examples/lightning_module.py"),
        code.whole("examples/ddp.py"),
    ),
    ROOT / "docs" / "own_initialisation.md": (code.whole("examples/noise.py"),),
    ROOT / "docs" / "clusters.md": (
        code.whole("examples/suite.sbatch"),
        code.whole("examples/ddp.py"),
    ),
    ROOT / "docs" / "language_models.md": (code.whole("examples/trl_sft.py"),),
    ROOT / "docs" / "troubleshooting.md": (code.troubleshooting,),
    ROOT / "docs" / "commands.md": (
        code.options("abm_vision.vtab"),
        code.options("abm_vision.vtab", "suite"),
        code.options("abm_vision.vtab", "report"),
        code.options("abm_vision.vtab", "compare"),
        code.options("abm_vision.vtab", "prepare"),
        code.options("abm_vision.vtab", "list"),
        code.options("abm_vision.tune"),
        code.options("abm_vision.tune", "predict"),
        code.options("abm_vision.tune", "evaluate"),
        code.options("abm_vision.tune", "export"),
        code.options("abm_vision.tune", "demo"),
        code.options("nlp_ext.glue"),
        code.options("nlp_ext.instruct"),
        code.options("nlp_ext.instruct", "chat"),
        code.options("nlp_ext.instruct", "mt-bench"),
        code.options("nlp_ext.models", "fetch"),
    ),
}


def fill(path: Path) -> str:
    """Return the document with every `<!-- table: NAME -->` ... `<!-- end -->` filled."""
    text = path.read_text(encoding="utf-8")
    for make in TABLES[path]:
        pattern = re.compile(rf"(<!-- table: {re.escape(make.__name__)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"{path.name} has {count} places for the table {make.__name__}, it needs one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the documents")
    write = parser.parse_args().write
    for path, makers in TABLES.items():
        if write:
            path.write_text(fill(path), encoding="utf-8")
        else:
            print("\n\n".join(f"{make.__name__}\n\n{make()}" for make in makers))


if __name__ == "__main__":
    main()
