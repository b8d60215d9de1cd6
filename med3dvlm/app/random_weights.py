"""A tiny model with random weights: the whole app can be tried without a model. Its answers mean nothing."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from med3dvlm.configuration import IMAGE_TOKEN, VLMConfig
from med3dvlm.data.preprocess import PUBLISHED_SIZE, PreprocessConfig
from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.processing import VLMProcessor

_END, _UNKNOWN = "<|im_end|>", "[unknown]"


def write_random_model(folder: Path, seed: int = 0) -> None:
    """Write a complete model folder of about a million parameters: the published input size, a nano encoder.

    The same seed writes the same weights; the random state of the caller stays as it is.
    """
    tokenizer = _tokenizer()
    depth, height, width = PUBLISHED_SIZE
    config = VLMConfig(
        vision_variant="nano",
        input_size=(height, width, depth),
        mm_projector_type="mlp",
        mm_hidden_size=256,  # the width of the nano encoder's last hidden state
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=2048,
        initializer_range=0.2,  # at the usual 0.02 one word would be repeated for ever
        tie_word_embeddings=False,
        image_splice="placeholder",
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VLMForCausalLM(config)
    model.config.proj_out_num = model.num_image_tokens
    model.save_pretrained(folder)
    steps = PreprocessConfig("published", PUBLISHED_SIZE)
    VLMProcessor(tokenizer, model.num_image_tokens, steps).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, those of the prompts: what comes out are at least words."""
    words = sorted({word for prompt in CAPTION_PROMPTS for word in re.findall(r"\w+", prompt.lower())})
    vocabulary = {word: index for index, word in enumerate([_END, IMAGE_TOKEN, _UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([_END, IMAGE_TOKEN, _UNKNOWN])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, unk_token=_UNKNOWN)
