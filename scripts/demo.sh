#!/bin/sh
# Asks a model about scans, in the terminal (docs/inference.md):
#   sh scripts/demo.sh --image_path scan.nii.gz                                          a chat
#   sh scripts/demo.sh --image_path scan.nii.gz --question "Is there a lesion in the liver?"
#   sh scripts/demo.sh --image_path scans/ --report --output reports.csv                 many scans
# --model_name_or_path names another model, --help lists everything.
set -eu
. "$(dirname -- "$0")/lib/env.sh"

run med3dvlm.demo --model_name_or_path "$ROOT/models/Med3DVLM-Qwen-2.5-7B" "$@"
