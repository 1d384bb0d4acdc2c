"""peft's own LoRA tests, with our layer in place of peft's: `python tests/peft/run.py`.

They come from the source distribution of the installed peft and are unpacked to a temporary folder. Those that need a
model hub fail with either layer. What fails with our layer is run again with peft's: a test that then passes is a
difference, and an error unless it is in `EXPECTED`.
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
    test_arrow test_bdlora test_custom_models test_helpers test_initialization test_integrations test_lora_conversion
    test_lora_ga test_lora_intruders test_lora_variants test_lorafa test_loraplus test_low_level_api test_mapping
    test_mixed test_other test_riemannian_lora test_target_parameters test_trainable_tokens test_tuners_utils
    test_velora
""".split()
EXPECTED = {}
MERGED = 300  # tests in which the merged product must have run


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(Path(folder))
        ours = run(root, [f"tests/{name}.py" for name in FILES])
        failed = [test for test, (outcome, _) in ours.items() if outcome == "failed"]
        stock = run(root, failed, "--stock", "--tb=no")
        different = [test for test in failed if stock[test][0] != "failed"]
    merged = sum(products > 0 for _, products in ours.values())
    print(
        f"{len(ours)} of peft's tests, merged in {merged}; {len(failed)} fail, {len(different)} with our layer alone:"
    )
    for test in different:
        print(f"  {test}: {EXPECTED.get(test.split('::', 1)[1], 'NOT EXPECTED')}")
    if merged < MERGED:
        print(f"the merged product should have run in at least {MERGED} tests")
    return int(merged < MERGED or any(test.split("::", 1)[1] not in EXPECTED for test in different))


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
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    paths = os.pathsep.join(map(str, (HERE, HERE.parent.parent, root)))
    command = [sys.executable, "-m", "pytest", "-p", "merged_layer", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-q", "--no-header", "--no-summary", "-W", "ignore", "--outcomes", outcomes, *options, *tests]
    subprocess.run(command, cwd=root, env=os.environ | offline | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    return json.loads(outcomes.read_text())


if __name__ == "__main__":
    sys.exit(main())
