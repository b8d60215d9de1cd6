#!/bin/sh
# Visual question answering: open questions with the text metrics; with --close_ended, accuracy of the chosen letter.
# Reads  data/M3D-VQA, data/M3D_Cap_npy, models/Med3DVLM-Qwen-2.5-7B
# Writes output/eval_open_vqa or output/eval_close_vqa, below the current folder unless --output_dir says otherwise
set -eu
. "$(dirname -- "$0")/lib/env.sh"

run med3dvlm.evaluation.vqa \
    --model_name_or_path "$ROOT/models/Med3DVLM-Qwen-2.5-7B" \
    --data_root "$ROOT/data" \
    --vqa_data_test_path "$ROOT/data/M3D-VQA/M3D_VQA_test.csv" \
    "$@"
