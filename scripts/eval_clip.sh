#!/bin/sh
# Image-text retrieval: R@1, R@5 and R@10 in both directions on the first 100, 500, 1000 and 2000 test pairs.
# Reads  data/M3D_Cap_npy, output/DCFormer_SigLIP
# Writes output/eval_retrieval*, below the current folder unless --output_dir says otherwise
set -eu
. "$(dirname -- "$0")/lib/env.sh"

run med3dvlm.evaluation.retrieval \
    --model_name_or_path "$ROOT/output/DCFormer_SigLIP" \
    --data_root "$ROOT/data" \
    --cap_data_path "$ROOT/data/M3D_Cap_npy/M3D_Cap.json" \
    --max_length 512 \
    "$@"
