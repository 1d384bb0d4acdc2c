"""Gigabytes that `pip install -e ".[offline]"` downloads and unpacks on this platform, and without CUDA's libraries.

    python benchmarks/install_size.py [--cpu-torch 2.13.0+cpu]

Downloads are the lengths of the files that pip's dry run names; on disk are the files of the same distributions in this
environment, where they must be installed. `--cpu-torch` is a version of torch for CPUs, from an index that pip knows,
which stands in the place of torch and of the libraries for CUDA; torchvision is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import distribution
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

from abm_vision.abm.files import write_json

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "install_size.json"
CUDA = re.compile(r"nvidia-|cuda-|triton$")


def files(*wanted: str) -> dict[str, str]:
    """Name and address of every distribution that pip would install into an empty environment."""
    words = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *wanted]
    done = subprocess.run([sys.executable, "-m", "pip", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    found = {row["metadata"]["name"].lower(): row["download_info"]["url"] for row in json.loads(done.stdout)["install"]}
    return {name: url for name, url in found.items() if not url.startswith(ROOT.as_uri())}


def downloaded(url: str) -> int:
    with urlopen(url) as answer:
        return int(answer.headers["Content-Length"])


def unpacked(name: str) -> int:
    return sum(file.locate().stat().st_size for file in distribution(name).files if file.locate().is_file())


def gigabytes(sizes: Mapping[str, int]) -> dict[str, float]:
    """All of them, and those that a CPU has no use for."""
    cuda = sum(size for name, size in sizes.items() if CUDA.match(name))
    return {"all": sum(sizes.values()) / 1e9, "torch": sizes["torch"] / 1e9, "cuda": cuda / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-torch", metavar="VERSION")
    options = parser.parse_args()
    found = files("-e", ".[offline]")
    download = {name: downloaded(url) for name, url in found.items()}
    on_disk = {name: unpacked(name) for name in found}
    result = {"platform": sys.platform, "python": sys.version.split()[0], "distributions": len(found)}
    result |= {"download": gigabytes(download), "on_disk": gigabytes(on_disk)}
    if options.cpu_torch:
        url = files("--no-deps", f"torch=={options.cpu_torch}")["torch"]
        with urlopen(url) as answer:
            content = answer.read()
        inside = sum(entry.file_size for entry in zipfile.ZipFile(BytesIO(content)).infolist())
        cpu = {"download": len(content) / 1e9, "on_disk": inside / 1e9}
        without = {kind: result[kind]["all"] - result[kind]["torch"] - result[kind]["cuda"] + cpu[kind] for kind in cpu}
        result |= {"cpu_torch": {"version": options.cpu_torch} | cpu, "without_cuda": without}
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
