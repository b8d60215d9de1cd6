#!/bin/sh
# Report generation: BLEU, ROUGE, METEOR, and BERTScore where a local model is named.
# Reads  data/M3D_Cap_npy, models/Med3DVLM-Qwen-2.5-7B
# Writes output/eval_caption*, below the current folder unless --output_dir says otherwise
set -eu
. "$(dirname -- "$0")/lib/env.sh"

run med3dvlm.evaluation.caption \
    --model_name_or_path "$ROOT/models/Med3DVLM-Qwen-2.5-7B" \
    --data_root "$ROOT/data" \
    --cap_data_path "$ROOT/data/M3D_Cap_npy/M3D_Cap.json" \
    "$@"
