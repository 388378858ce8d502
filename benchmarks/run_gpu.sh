#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes: GPU tests, then two benchmarks.
#
#   benchmarks/run_gpu.sh [FOLDER]      results go to FOLDER, benchmarks/results by default
#
# Requires only this checkout, PyTorch >= 2.11 with Triton, and pytest (with pytest-xdist tests run in
# parallel). With pytorchvideo there are more peers, with the package's other dependencies also the
# tests of training.
set -uo pipefail
cd "$(dirname "$0")/.."
results="${1:-benchmarks/results}"
mkdir -p "$results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
failed=0
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-p xdist -n 6)

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)' || exit 1
# Tests of the kernels, without the fixtures of tests/ and the project's pytest options, which require
# packages that a bare GPU machine lacks.
timeout 150 "$python" -m pytest -q "${parallel[@]}" -p no:cacheprovider --noconftest -c /dev/null --rootdir . \
    --import-mode=importlib tests/norm/test_fused.py 2>&1 | tee "$results/gpu_tests.log" || failed=1
if "$python" -c 'import av, omegaconf, pyarrow, pytest_timeout, safetensors, yaml' 2>/dev/null; then
    mapfile -t others < <(grep -rl 'mark\.gpu' tests | grep -v test_fused)
    timeout 150 "$python" -m pytest -v "${parallel[@]}" -p no:cacheprovider -m gpu "${others[@]}" 2>&1 \
        | tee -a "$results/gpu_tests.log" || failed=1
fi
timeout 110 "$python" benchmarks/bench_norm.py \
    --json "$results/norm_gpu.json" --markdown "$results/norm_gpu.md" || failed=1
timeout 160 "$python" benchmarks/bench_train_step.py \
    --json "$results/train_step_gpu.json" --markdown "$results/train_step_gpu.md" || failed=1
exit "$failed"
