#!/bin/sh
# Stage 3: fine-tuning on reports and questions. LoRA on every linear layer of the language model; encoder, projector,
# token embeddings and lm_head train in full.
# Reads  data/, output/DCFormer_SigLIP/pretrained_ViT.bin, output/Med3DVLM-Qwen-2.5-7B-pretrain/mm_projector.bin
# Writes output/Med3DVLM-Qwen-2.5-7B-finetune (model_with_lora.bin)
# Published batch: 8 a GPU, bf16, ZeRO-2. Flags given at the end override those below; --help lists all.
set -eu
. "$(dirname -- "$0")/lib/env.sh"

launch med3dvlm.train.vlm \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --vision_tower dcformer \
    --pretrain_vision_model "$ROOT/output/DCFormer_SigLIP/pretrained_ViT.bin" \
    --mm_projector_type mixer \
    --pretrain_mm_mlp_adapter "$ROOT/output/Med3DVLM-Qwen-2.5-7B-pretrain/mm_projector.bin" \
    --tune_mm_mlp_adapter True \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    --data_root "$ROOT/data" \
    --cap_data_path "$ROOT/data/M3D_Cap_npy/M3D_Cap.json" \
    --vqa_data_train_path "$ROOT/data/M3D-VQA/M3D_VQA_train.csv" \
    --vqa_yn_data_train_path "$ROOT/data/M3D-VQA/M3D_VQA_yn_train.csv" \
    --output_dir "$ROOT/output/Med3DVLM-Qwen-2.5-7B-finetune" \
    --num_train_epochs 5 \
    --per_device_train_batch_size 8 \
    --learning_rate 5e-5 \
    --weight_decay 0 \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --save_strategy steps \
    --save_steps 1000 \
    --save_total_limit 1 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    "$@"
