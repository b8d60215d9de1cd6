#!/bin/sh
# Stage 4: merges the adapter into its base model and writes one self-contained folder (weights, tokenizer, processor).
# Reads  output/Med3DVLM-Qwen-2.5-7B-finetune/model_with_lora.bin, whose base model is recorded beside it and checked
# Writes models/Med3DVLM-Qwen-2.5-7B
set -eu
. "$(dirname -- "$0")/lib/env.sh"

run med3dvlm.train.merge \
    --model_with_lora "$ROOT/output/Med3DVLM-Qwen-2.5-7B-finetune/model_with_lora.bin" \
    --output_dir "$ROOT/models/Med3DVLM-Qwen-2.5-7B" \
    "$@"
