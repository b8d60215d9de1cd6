#!/bin/sh
# Stage 2: projector pre-training. The projector and the token embeddings train; encoder and language model are frozen.
# Reads  data/, output/DCFormer_SigLIP/pretrained_ViT.bin
# Writes output/Med3DVLM-Qwen-2.5-7B-pretrain (mm_projector.bin)
# Published batch: 16 a GPU, bf16, ZeRO-2. Flags given at the end override those below; --help lists all.
set -eu
. "$(dirname -- "$0")/lib/env.sh"

launch med3dvlm.train.vlm \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --vision_tower dcformer \
    --pretrain_vision_model "$ROOT/output/DCFormer_SigLIP/pretrained_ViT.bin" \
    --mm_projector_type mixer \
    --tune_mm_mlp_adapter True \
    --data_root "$ROOT/data" \
    --cap_data_path "$ROOT/data/M3D_Cap_npy/M3D_Cap.json" \
    --vqa_data_train_path "$ROOT/data/M3D-VQA/M3D_VQA_train.csv" \
    --vqa_yn_data_train_path "$ROOT/data/M3D-VQA/M3D_VQA_yn_train.csv" \
    --output_dir "$ROOT/output/Med3DVLM-Qwen-2.5-7B-pretrain" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 16 \
    --learning_rate 1e-4 \
    --weight_decay 0 \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --save_strategy steps \
    --save_steps 2000 \
    --save_total_limit 1 \
    --dataloader_num_workers 4 \
    "$@"
