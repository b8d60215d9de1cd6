"""Small data trees and tokenizers for tests: the golden ones unpacked, and synthetic ones in the published layout."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from med3dvlm.data.volume import write_prepared

GOLDEN_DATA = Path(__file__).parent.parent / "golden" / "data"
VQA_COLUMNS = ("Image Path", "Text", "Question Type", "Question", "Choice A", "Choice B", "Choice C", "Choice D",
               "Answer", "Answer Choice")  # fmt: skip


def unpack_tree(archive: str, folder) -> Path:
    """Write the files of a golden npz (key = relative path, value = bytes) into `folder`."""
    with np.load(GOLDEN_DATA / archive) as files:
        for name in files.files:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files[name].tobytes())
    return Path(folder)


def vlm_tokenizer(pad: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """The golden byte-level tokenizer (421 tokens with `<im_patch>`); `pad` may also be the end token `<|im_end|>`."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN_DATA / "tokenizer_a.json"), eos_token="<|im_end|>", pad_token=pad
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The golden tokenizer of the contrastive stage (423 tokens, [CLS] ... [SEP], [PAD])."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN_DATA / "tokenizer_a_clip.json"),
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
    )


def write_slices(folder, volume: np.ndarray) -> None:
    """Write a uint8 volume `[D, H, W]` as a raw series: 0.png, 1.png, ..."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, plane in enumerate(volume):
        Image.fromarray(plane).save(Path(folder) / f"{number}.png")


def write_prepared_tree(root, cases: int = 4, size=(8, 16, 16), seed: int = 0) -> Path:
    """Write a prepared data root with random volumes: `M3D_Cap_npy/` with M3D_Cap.json, and `M3D-VQA/*.csv`.

    The first half of the cases is the train split, the rest is validation and test. Every case has a plane question
    (closed or open) and a yes / no question.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    splits = {"train": [], "validation": [], "test": []}
    planes = ("Axial", "Coronal", "Sagittal")
    rows = {"train": [], "test": []}
    for number in range(cases):
        folder = f"M3D_Cap_npy/ct_case/{number:06d}"
        image, plane = f"{folder}/{planes[number % 3]}_C.nii.gz", planes[number % 3]
        write_prepared(root / image, rng.random(size, dtype=np.float32), "uint8")
        (root / folder / "text.txt").write_text(f"{plane} scan of case {number}. A small lesion is seen.")
        entry = {"image": image, "text": f"{folder}/text.txt"}
        for split in ("train",) if number < cases // 2 else ("validation", "test"):
            splits[split].append(entry)
        letter = "ABC"[number % 3]
        rows["train" if number < cases // 2 else "test"].append(
            [image, "", 1, "Which plane is shown?", *planes, "NA", plane, letter]
        )
    (root / "M3D_Cap_npy" / "M3D_Cap.json").write_text(json.dumps(splits))
    yes_no = [[r[0], "", 1, f"Is the plane {r[8].lower()}?", "Yes", "No", "", "", "Yes", "Yes"] for r in rows["train"]]
    tables = {"train": rows["train"], "val": rows["test"], "test": rows["test"], "yn_train": yes_no}
    for name, table in tables.items():
        write_table(root / "M3D-VQA" / f"M3D_VQA_{name}.csv", table)
    return root


def write_table(path, rows, columns=VQA_COLUMNS) -> Path:
    """Write an M3D-VQA table."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return Path(path)
