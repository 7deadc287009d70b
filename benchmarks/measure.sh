#!/usr/bin/env bash
# Writes the figures of benchmarks/results on this machine's GPU: benchmarks/measure.sh OUT [SCRATCH]
# SCRATCH gets one synthetic checkpoint of up to 23 GB at a time. About eight minutes on an H200 with an empty kernel cache.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
scratch=${2:-$(mktemp -d)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run() { python -m moe_nvfp4.launch.cli "$@"; }
gpu=$(python -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())')

run bench kernels --json "$out/kernels-$gpu.json"
for model in qwen3.6-35b:nvidia/Qwen3.6-35B-A3B-NVFP4 gemma-4-26b:nvidia/Gemma-4-26B-A4B-NVFP4; do
    name=${model%%:*} folder=$scratch/${model##*/}
    run synthesize "${model#*:}" "$folder"
    run generate --model "$folder" --prompt-ids 1,2,3 --max-new-tokens 8 --ignore-eos --self-test --quiet >/dev/null
    run bench decode --model "$folder" --batch 1,2,4,8,16,32,64,128,256 --json "$out/decode-$name-$gpu.json"
    run bench prefill --model "$folder" --json "$out/prefill-$name-$gpu.json"
    run bench serve-offline --model "$folder" --json "$out/serve-offline-$name-$gpu.json"
    rm -r "$folder"
done
