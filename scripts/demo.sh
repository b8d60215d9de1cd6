#!/bin/sh
# Asks one question about one scan, in the terminal:
#   sh scripts/demo.sh --image_path scan.nii.gz --question "Is there a lesion in the liver?"
set -eu
. "$(dirname -- "$0")/lib/env.sh"

run med3dvlm.demo --model_name_or_path "$ROOT/models/Med3DVLM-Qwen-2.5-7B" "$@"
