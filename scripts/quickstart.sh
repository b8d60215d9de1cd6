#!/bin/sh
# The whole pipeline on synthetic scans, with tiny models: from raw slices to a trained model that answers.
# About 10 minutes on 2 CPU cores and 8 GB of memory, the installation included. The tiny twin of docs/reproducing.md:
# the same commands, at the published sizes, are what a cluster runs.
#   sh scripts/quickstart.sh [--seed S] [--output DIR]
# Interrupted, it goes on where it was when it is started again. A folder takes one run at a time.
# Results: DIR/report.html and DIR/summary.json.
set -eu
. "$(dirname -- "$0")/lib/env.sh"

SEED=0
OUT=$ROOT/output/quickstart
while [ $# -gt 0 ]; do
    case $1 in
        --seed) SEED=${2:?--seed needs a number}; shift 2 ;;
        --seed=*) SEED=${1#*=}; shift ;;
        --output) OUT=${2:?--output needs a folder}; shift 2 ;;
        --output=*) OUT=${1#*=}; shift ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) die "unknown argument $1; see --help" ;;
    esac
done
case $SEED in '' | *[!0-9]*) die "--seed takes a number, not '$SEED'" ;; esac

[ -z "${MED3DVLM_DRY_RUN:-}" ] || die "the quickstart is many commands and has no dry run (MED3DVLM_DRY_RUN); see --help"

setup_venv requirements-cpu.txt
mkdir -p "$OUT"
OUT=$(CDPATH='' cd -- "$OUT" && pwd -P)
DATA=$OUT/data
CAPTIONS=$DATA/M3D_Cap_npy/M3D_Cap.json
TRAIN="--preset quickstart --seed $SEED --resume_from_checkpoint auto --use_cpu True"

stage() { "$PY" "$ROOT/scripts/lib/stage.py" "$OUT" "$SEED" "$@"; }
python_stage() { # NAME MODULE [ARG...]
    name=$1 module=$2
    shift 2
    stage "$name" "$PY" -m "$module" "$@"
}

if stage ask_scan; then
    say "Finished before: $OUT/report.html (another --output starts afresh)"
    exit 0
fi

exec 9>>"$OUT/.lock"
"$PY" "$ROOT/scripts/lib/stage.py" --lock "$OUT" 9 # held until this script, and the stage that it runs, have ended

# 1. Data: raw slices and reports as M3D has them, prepared volumes, tables that name them
python_stage phantom med3dvlm.data.phantom --output "$DATA" --cases 4000 --seed "$SEED"
stage prepare "$PY" "$ROOT/utls/m3d_cap_data_prepare_128.py" \
    --input_dir "$DATA/M3D_Cap" --output_dir "$DATA/M3D_Cap_npy" --size 32 64 64 --dtype uint8
stage rename "$PY" "$ROOT/utls/rename_csv.py" "$DATA/M3D-VQA" "$CAPTIONS"

# 2. In place of ClinicalBERT and Qwen2.5, which no package brings: a tiny text encoder and a tiny language model
# shellcheck disable=SC2086
python_stage base med3dvlm.train.stand_in $TRAIN --data_root "$DATA" --cap_data_path "$CAPTIONS" \
    --vqa_data_train_path "$DATA/M3D-VQA/M3D_VQA_train.csv" \
    --vqa_yn_data_train_path "$DATA/M3D-VQA/M3D_VQA_yn_train.csv" --output_dir "$OUT/base"

# 3. Training: contrastive, projector, LoRA; then the merge
# shellcheck disable=SC2086
python_stage clip med3dvlm.train.clip $TRAIN --data_root "$DATA" --cap_data_path "$CAPTIONS" \
    --language_model_name_or_path "$OUT/base/text_encoder" --output_dir "$OUT/clip"
train_vlm() { # NAME [ARG...]
    name=$1
    shift
    # shellcheck disable=SC2086
    python_stage "$name" med3dvlm.train.vlm $TRAIN --data_root "$DATA" --cap_data_path "$CAPTIONS" \
        --vqa_data_train_path "$DATA/M3D-VQA/M3D_VQA_train.csv" \
        --vqa_yn_data_train_path "$DATA/M3D-VQA/M3D_VQA_yn_train.csv" \
        --model_name_or_path "$OUT/base/language_model" \
        --pretrain_vision_model "$OUT/clip/pretrained_ViT.bin" --output_dir "$OUT/$name" "$@"
}
train_vlm projector --tune_mm_mlp_adapter True
train_vlm lora --lora_enable True --pretrain_mm_mlp_adapter "$OUT/projector/mm_projector.bin"
python_stage merge med3dvlm.train.merge --model_with_lora "$OUT/lora" --output_dir "$OUT/model" \
    --model_name_or_path "$OUT/base/language_model"

# 4. Evaluation on held-out phantoms, with images exchanged between cases as the control
python_stage retrieval med3dvlm.evaluation.retrieval --model_name_or_path "$OUT/clip" --data_root "$DATA" \
    --cap_data_path "$CAPTIONS" --pool_sizes 64 256 --output_dir "$OUT/eval/retrieval"
evaluate_captions() { # NAME [ARG...]
    name=$1
    shift
    python_stage "$name" med3dvlm.evaluation.caption --model_name_or_path "$OUT/model" --data_root "$DATA" \
        --cap_data_path "$CAPTIONS" --max_new_tokens 48 --batch_size 64 --output_dir "$OUT/eval/$name" "$@"
}
evaluate_vqa() { # NAME [ARG...]
    name=$1
    shift
    python_stage "$name" med3dvlm.evaluation.vqa --model_name_or_path "$OUT/model" --data_root "$DATA" \
        --vqa_data_test_path "$DATA/M3D-VQA/M3D_VQA_test.csv" --max_new_tokens 12 --batch_size 64 \
        --output_dir "$OUT/eval/$name" "$@"
}
evaluate_captions caption
evaluate_captions caption_shuffled --baseline shuffled
evaluate_vqa vqa_closed --close_ended
evaluate_vqa vqa_closed_shuffled --close_ended --baseline shuffled
evaluate_vqa vqa_open

python_stage report med3dvlm.evaluation.report --run_dir "$OUT"

# 5. Ask the model, about a phantom that it never saw and about somebody's scan (of which it can know nothing)
ask() { # NAME IMAGE QUESTION
    python_stage "$1" med3dvlm.demo --model_name_or_path "$OUT/model" --image_path "$2" --question "$3" \
        --max_new_tokens 24
}
phantom=$("$PY" -c 'import json, sys; print(json.load(open(sys.argv[1]))["test"][0]["image"])' "$CAPTIONS")
scan=$("$PY" -c 'import nibabel, pathlib; print(pathlib.Path(nibabel.__file__).parent / "tests/data/anatomical.nii")')
ask ask_phantom "$DATA/$phantom" "Where is the lesion?"
ask ask_scan "$scan" "Which plane is shown?"
say "Open $OUT/report.html"
