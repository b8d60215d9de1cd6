#!/bin/sh
# Stage 1: contrastive training of DCFormer with SigLIP on image-report pairs. Everything trains.
# Reads  data/M3D_Cap_npy
# Writes output/DCFormer_SigLIP (the dual encoder, and pretrained_ViT.bin for the next stages)
# Published batch: 64 a GPU, bf16, ZeRO-2. Flags given at the end override those below; --help lists all.
set -eu
. "$(dirname -- "$0")/lib/env.sh"

launch med3dvlm.train.clip \
    --language_model_name_or_path medicalai/ClinicalBERT \
    --vision_encoder dcformer \
    --loss_type sigmoid \
    --data_root "$ROOT/data" \
    --cap_data_path "$ROOT/data/M3D_Cap_npy/M3D_Cap.json" \
    --max_length 512 \
    --output_dir "$ROOT/output/DCFormer_SigLIP" \
    --num_train_epochs 100 \
    --per_device_train_batch_size 64 \
    --learning_rate 1e-4 \
    --weight_decay 0.1 \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --save_strategy steps \
    --save_steps 1000 \
    --save_total_limit 1 \
    --dataloader_num_workers 4 \
    "$@"
