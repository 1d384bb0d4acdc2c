#!/usr/bin/env bash
# What a GPU is asked, in one command that ends with its tables: the step, the initialisations, one VTAB task with the
# papers' preset on drawn data (random weights: time does not depend on them).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

# Blocks are compiled once for each variant, all at the same time, into the compiler's own cache.
for model in vit_small_patch16_224 vit_base_patch16_224; do
  for variant in floor peft ours full; do
    TORCHINDUCTOR_COMPILE_THREADS=4 python benchmarks/gpu_step.py --models $model --ranks 8 --modes compiled \
      --variants $variant --out "$runs/$model-$variant.json" > "$runs/$model-$variant.txt" &
  done
done
wait

python benchmarks/gpu_step.py --out "$out/gpu_step.json" > "$runs/step.txt"
python benchmarks/gpu_init.py --out "$out/gpu_init.json" > "$runs/init.txt"
python -m abm_vision.vtab --task dsprites_loc --preset paper --weights none --init kaiming --epochs 10 --test-images 5000 \
  --out "$runs" > "$runs/vtab.txt"

cat "$runs/step.txt" "$runs/init.txt"
python - "$runs" "$out/gpu_vtab.json" <<'TIMES'
import json, pathlib, sys

(path,) = pathlib.Path(sys.argv[1]).glob("*/result.json")
result = json.loads(path.read_text())
epoch, test = min(result["seconds_per_epoch"]), result["seconds"]["test"] / result["test"]["count"]
hours = 19 * 3 * (100 * epoch + 20_000 * test) / 3600  # test splits have about 20,000 images each
times = {"seconds_per_epoch": epoch, "seconds_per_test_image": test, "hours_of_19_tasks_3_seeds": hours}
times |= {"step": result["step"], "images_per_second": result["images_per_second"], "environment": result["environment"]}
pathlib.Path(sys.argv[2]).write_text(json.dumps(times, indent=1))
print(f"paper preset: an epoch {epoch:.2f} s ({result['step']}), a test image {1e3 * test:.2f} ms, "
      f"19 tasks with 3 seeds about {hours:.1f} h")
TIMES
