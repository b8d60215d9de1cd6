"""The section "Your own data" of docs/data.md, followed to its end: its examples, its commands, phantoms as scans."""

import re
import shlex

import nibabel as nib
import numpy as np
import pytest

from med3dvlm import demo
from med3dvlm.data import convert, prepare
from med3dvlm.data.datasets import CaptionDataset, VQADataset
from med3dvlm.data.manifest import read_caption_manifest, read_vqa_csv
from med3dvlm.data.preprocess import PreprocessConfig, preprocess
from med3dvlm.data.volume import load_volume
from med3dvlm.processing import VLMProcessor
from med3dvlm.train import merge, vlm
from med3dvlm.train.arguments import QADataArguments
from med3dvlm.train.data import preparation_of
from tests.data.test_sources import RAD, ct_rate
from tests.helpers.commands import ROOT, dry_run
from tests.helpers.dicom_files import write_series
from tests.helpers.tiny_data import vlm_tokenizer, write_table
from tests.helpers.tiny_model import TINY_PROJECTORS, write_tiny_language_model
from tests.helpers.tiny_stages import TRAINING, VISION

SIZE = ["--size", "32", "64", "64"]  # of the tiny model
MIXER = TINY_PROJECTORS["mixer"]
TINY = [*TRAINING, *VISION, "--low_output_size", *map(str, MIXER["low_output_size"]), "--high_output_size",
        *map(str, MIXER["high_output_size"]), "--lora_r", "4", "--max_steps", "1", "--pretrain_vision_model", "",
        "--pretrain_mm_mlp_adapter", "", "--dataloader_num_workers", "0", "--gradient_checkpointing", "False",
        "--deepspeed", "", "--per_device_train_batch_size", "2"]  # fmt: skip


def section() -> str:
    text = (ROOT / "docs/data.md").read_text()
    return text.partition("\n## Your own data\n")[2].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(), flags=re.M | re.S)


def commands() -> dict[str, list[str]]:
    """What the page says to type, by output folder, or by program where there is none; with its arguments."""
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    return {f"{line[2] if line[1] == '-m' else line[1]} {_output(line)}": line for line in lines}


def _output(line: list[str]) -> str:
    return line[line.index("--output_dir") + 1] if "--output_dir" in line else ""


def phantom_hu(seed: int) -> np.ndarray:
    """A body in air with a bright organ, int16 HU, [k, j, i]."""
    volume = np.full((12, 24, 28), -1000, np.int16)
    volume[1:-1, 3:-3, 3:-3] = 40
    volume[3 + seed % 4 :, 6:12, 8:14] = 120
    return volume + np.random.default_rng(seed).integers(-5, 5, volume.shape).astype(np.int16)


def run(name: str, *more: str):
    """Carry out a command of the page in this process. Returns what its `main` does."""
    line = commands()[name]
    module = {"med3dvlm.data.convert": convert, "med3dvlm.data.prepare": prepare, "med3dvlm.demo": demo}[line[2]]
    return module.main([*line[3:], *more])


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """The list of the page, and its scans."""
    monkeypatch.chdir(tmp_path)
    table = blocks("csv")[0]
    (tmp_path / "scans.csv").write_text(table)
    (tmp_path / "scans").mkdir()
    for number, name in enumerate(sorted(set(re.findall(r"scans/\d+\.nii\.gz", table)))):
        nib.save(nib.Nifti1Image(phantom_hu(number).T, np.diag([0.8, 0.8, 2.5, 1])), name)
    return tmp_path


def datasets(root) -> list:
    """What the LoRA stage reads of the page's data."""
    processor = VLMProcessor(vlm_tokenizer(), 8, PreprocessConfig("ct_abdomen", (32, 64, 64)))
    own = root / "data/own"
    return [
        CaptionDataset(read_caption_manifest(own / "M3D_Cap.json", root / "data", "train"), processor, 128),
        VQADataset(read_vqa_csv(own / "M3D_VQA_train.csv", root / "data"), processor, 128, kind="closed"),
        VQADataset(read_vqa_csv(own / "M3D_VQA_open_train.csv", root / "data"), processor, 128, kind="yes_no"),
    ]


def test_the_list_is_converted_and_prepared_to_the_same(listed):
    assert run("med3dvlm.data.convert data/own", *SIZE) == 0
    linked = [[dict(item) for item in dataset] for dataset in datasets(listed)]
    assert (listed / "data/own/003/0003.nii.gz").is_symlink()
    records = read_caption_manifest("data/own/M3D_Cap.json", "data", "train")
    config, profile = preparation_of(records, QADataArguments(data_root="data"))
    assert config == PreprocessConfig("ct_abdomen", (32, 64, 64)) and profile.values == "HU" and profile.cases == 4
    assert run("med3dvlm.data.prepare data/own", *SIZE, "--num_workers", "1") == 0
    assert not (listed / "data/own/003/0003.nii.gz").is_symlink()
    prepared = [list(dataset) for dataset in datasets(listed)]
    assert [len(items) for items in prepared] == [len(items) for items in linked] == [2, 1, 1]
    for before, after in zip(sum(linked, []), sum(prepared, []), strict=True):
        assert (before["question"], before["answer"]) == (after["question"], after["answer"])
        assert np.abs(before["image"].numpy() - after["image"].numpy() / np.float32(255)).max() <= 1 / 510 + 1e-6
    assert prepared[2][0]["answer"] == "Left kidney"
    tables = {path.name for path in (listed / "data/own").glob("*.csv")}
    assert tables == {f"M3D_VQA_{n}.csv" for n in ("train", "open_train", "val", "test", "open_test")}
    expected = preprocess(load_volume("scans/0003.nii.gz"), "ct_abdomen", (32, 64, 64))
    assert np.abs(load_volume("data/own/003/0003.nii.gz").array - expected[0].numpy()).max() <= 1 / 510 + 1e-6


def test_ct_rate_with_3d_rad_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ct_rate(tmp_path / "CT-RATE")
    write_table(tmp_path / "3D-RAD/train/Task1_x/a.csv", [
        ["Task1", "-", "train_1_a_1.nii.gz", "Is there a nodule?", "No", "Close", "B", "Yes", "No", "-", "-"],
    ], RAD)  # fmt: skip
    assert run("med3dvlm.data.convert data/ct_rate") == 0
    (question,) = read_vqa_csv("data/ct_rate/M3D_VQA_train.csv", "data")
    assert question.answer == "No" and (tmp_path / "data/ct_rate/unmatched.csv").is_file()


def test_the_export_is_converted_with_its_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports.csv").write_text(blocks("csv")[1])
    for number, accession in enumerate(("A1001", "A1002"), 1):
        write_series(tmp_path / f"export/Doe_{number}", phantom_hu(number), PatientID=f"Doe {number}",
                     StudyInstanceUID=f"1.2.{number}", AccessionNumber=accession)  # fmt: skip
    assert run("med3dvlm.data.convert data/hospital", *SIZE, "--num_workers", "1") == 0
    out = tmp_path / "data/hospital"
    assert sorted(path.read_text() for path in out.rglob("text.txt")) == ["A cyst in the liver.", "No finding."]
    assert (tmp_path / "hospital.key").stat().st_mode & 0o777 == 0o600
    said = capsys.readouterr().out + (out / "data_card.md").read_text() + "".join(map(str, out.rglob("*")))
    assert "Doe" not in said.replace(str(tmp_path), "") and "prepared, not linked" in said


def test_fine_tuning_merging_and_asking(listed, capsys):
    """One step on the data of the page, with a tiny model in the place of Qwen."""
    base = str(write_tiny_language_model(listed / "base"))
    assert run("med3dvlm.data.prepare data/own", *SIZE, "--num_workers", "1") == 0
    train = commands()["scripts/finetune_lora.sh output/own"]
    printed = dry_run(*train[1:], cwd=listed)
    arguments = printed[printed.index("med3dvlm.train.vlm") + 1 :]
    metrics = vlm.main([*arguments, *TINY, "--model_name_or_path", base])
    assert np.isfinite(metrics["train_loss"])
    joining = commands()["scripts/merge_lora_weights_and_save_hf_model.sh models/own"]
    printed = dry_run(*joining[1:], cwd=listed)
    merge.main([*printed[printed.index("med3dvlm.train.merge") + 1 :], "--model_name_or_path", base])
    capsys.readouterr()
    assert run("med3dvlm.demo ", "--device", "cpu", "--max_new_tokens", "4").failed == 0
    assert "ct_abdomen" in (listed / "models/own/processor_config.json").read_text()


def test_the_json_line_of_the_page_is_a_row_of_its_list(listed):
    (listed / "scans.jsonl").write_text(blocks("json")[0])
    columns = commands()["med3dvlm.data.convert data/own"]
    flags = ["--output_dir", "data/line", *columns[columns.index("--columns") :]]
    assert convert.main(["--input_dir", "scans.jsonl", *flags]) == 0
    assert (listed / "data/line/004/text.txt").read_text() == "Small pleural effusion."
    assert read_vqa_csv("data/line/M3D_VQA_train.csv", "data")[0].choices == ("Yes", "No", None, None)
