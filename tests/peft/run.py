"""peft's own LoRA tests, with our layer in place of peft's: `python tests/peft/run.py`.

They come from the source distribution of the installed peft and are unpacked to a temporary folder. Those that need a
model hub fail with either layer; files in which nearly all do are left out. What fails with our layer is run again with
peft's: a test that then passes is a difference, and an error unless it is in `EXPECTED`.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = """
    test_bdlora test_custom_models test_helpers test_initialization test_integrations test_lora_ga test_lora_variants
    test_lorafa test_loraplus test_low_level_api test_mapping test_mixed test_other test_riemannian_lora
    test_tuners_utils test_velora
""".split()
EXPECTED = {  # test to reason
    "test_repr_lora_linear": "class name",
    "test_modules_to_save_targets_lora_layer_raises": "class name",
    "test_module_type_small": "class name",
    "test_module_type_large": "class name",
    "test_target_parameters_and_target_modules": "class name",
    "test_mixed_adapter_batches_partly_overlapping_target_layers": "rounding: merged here, summed there, in float32",
}
MERGED = 300  # tests in which the merged product must have run


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(Path(folder))
        ours = run(root, [f"tests/{name}.py" for name in FILES])
        failed = [test for test, (outcome, _) in ours.items() if outcome == "failed"]
        stock = run(root, failed, "--stock")
        different = [test for test in failed if stock[test][0] != "failed"]
    merged = sum(products > 0 for _, products in ours.values())
    print(
        f"{len(ours)} of peft's tests, merged in {merged}; {len(failed)} fail, {len(different)} with our layer alone:"
    )
    reasons = {test: EXPECTED.get(test.split("::")[-1].split("[")[0]) for test in different}
    for test, reason in reasons.items():
        print(f"  {test}: {reason or 'NOT EXPECTED'}")
    if merged < MERGED:
        print(f"the merged product should have run in at least {MERGED} tests")
    return int(merged < MERGED or not all(reasons.values()))


def unpack(folder: Path) -> Path:
    """The folder of the installed peft's source distribution."""
    wanted = f"peft=={version('peft')}"
    options = ["--quiet", "--no-deps", "--no-binary", "peft", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", folder, wanted], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    root = archive.with_name(archive.name.removesuffix(".tar.gz"))
    (root / "tests" / "__init__.py").touch()  # they import each other, and the archive lacks it
    return root


def run(root: Path, tests: list[str], *options: str) -> dict[str, tuple[str, int]]:
    """Each test's outcome, and how often the merged product ran in it."""
    outcomes = root / "outcomes.json"
    # One thread in each of pytest-xdist's processes, of which there is one a core.
    alone = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"), "1")
    paths = os.pathsep.join(map(str, (HERE, HERE.parent.parent, root)))
    flags = "-p merged_layer -p no:cacheprovider -n auto --maxprocesses 8 --dist worksteal -o addopts="
    quiet = "-q --no-header --no-summary --tb=line -W ignore"
    command = [sys.executable, "-m", "pytest", *flags.split(), *quiet.split(), "--outcomes", outcomes, *options, *tests]
    environment = os.environ | alone | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: some tests failed
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return json.loads(outcomes.read_text())


if __name__ == "__main__":
    sys.exit(main())
