#!/usr/bin/env bash
# Writes the figures of benchmarks/results on this machine's first GPUs: benchmarks/measure.sh OUT [SCRATCH]
# SCRATCH gets two synthetic checkpoints of 19 and 23 GB. With two GPUs each model has one of them; what is measured over
# both comes last. About ten minutes on an H200 with an empty kernel cache.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
scratch=${2:-$(mktemp -d)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run() { python -m moe_nvfp4.launch.cli "$@"; }
gpu=$(python -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())')
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')

measure() { # name, checkpoint, GPU
    local model=$scratch/$1
    export CUDA_VISIBLE_DEVICES=$3
    run synthesize "$2" "$model"
    run generate --model "$model" --prompt-ids 1,2,3 --max-new-tokens 8 --ignore-eos --self-test --quiet >/dev/null
    run bench decode --model "$model" --batch 1,2,4,8,16,32,64,128,256 --json "$out/decode-$1-$gpu.json"
    run bench prefill --model "$model" --json "$out/prefill-$1-$gpu.json"
    run bench steps --model "$model" --json "$out/steps-$1-$gpu.json"
    run bench serve-offline --model "$model" --json "$out/serve-offline-$1-$gpu.json"
    run bench serve-offline --model "$model" --stretch 2.25 --json "$out/serve-offline-cut-$1-$gpu.json"
}

run bench kernels --json "$out/kernels-$gpu.json"
(measure qwen3.6-35b nvidia/Qwen3.6-35B-A3B-NVFP4 0) &
((gpus > 1)) || wait $!
(measure gemma-4-26b nvidia/Gemma-4-26B-A4B-NVFP4 $((gpus > 1))) &
for job in $(jobs -p); do wait "$job"; done
if ((gpus > 1)); then
    run bench ep --model "$scratch/qwen3.6-35b" --ranks 2 --explain --json "$out/ep-qwen3.6-35b-2x$gpu.json"
fi
rm -r "$scratch/qwen3.6-35b" "$scratch/gemma-4-26b"
