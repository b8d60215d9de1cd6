"""The encoder's benchmark compares what it says, and prints every table. No times are asserted."""

import pytest
import torch

from med3dvlm.benchmark import encoder, encoder_gpu, infer


def test_both_modes_give_a_row_for_every_encoder(capsys, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    monkeypatch.setattr(encoder, "peak_growth", lambda *arguments: "7")  # a process for each: seconds
    monkeypatch.setattr(encoder, "ceilings", lambda: "")
    arguments = ["--variants", "phantom", "nano", "--size", "16", "32", "32", "--batch", "2", "--repeats", "1"]
    assert encoder.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows] == ["encoder", "---", "phantom", "nano"] * 2
    assert all(len(row) == 17 for row in rows[:4]) and all(len(row) == 15 for row in rows[4:])
    found = dict(zip(rows[0], rows[2], strict=True))
    assert float(found["largest deviation fp32"]) < 5e-6 and 0 < float(found["relative L2 bf16"]) < 1.5e-2


def test_the_two_candidates_are_two_formulations():
    network = encoder.build("nano", [16, 32, 32]).eval()
    volume = torch.rand(1, 1, 16, 32, 32)
    with torch.inference_mode():
        encoder.plain(network, volume)
        assert not network.fused_cache
        encoder.fused(network, volume)
        assert network.fused_cache


def test_times_without_the_malloc_setting_are_refused(capsys, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert encoder.main([]) == 2
    assert "sh scripts/benchmark.sh encoder" in capsys.readouterr().err


def test_every_step_from_file_to_tokens_is_reported(tmp_path, monkeypatch):
    infer.draw(tmp_path / "ct.nii.gz", slices=6, width=48)
    monkeypatch.setattr(infer, "build", lambda variant, size: encoder.build("nano", size))
    config = infer.VLMConfig(hidden_size=8, low_input_size=[256, 128], high_input_size=[32, 256])
    monkeypatch.setattr(infer, "VLMConfig", lambda **sizes: config)
    report = infer.report(tmp_path / "ct.nii.gz", 1)
    steps = [line.split("|")[1].strip() for line in report.splitlines()[2:]]
    assert steps == [
        "read",
        "preprocess",
        "encode, fp32",
        "encode, bf16",
        "project",
        "plain encoder, fp32",
        "whole, fp32",
    ]


def test_without_a_gpu_its_benchmark_ends_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert encoder.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device cuda needs a GPU, and torch finds none here\n"


def test_the_benchmark_for_gpus_gives_a_row_for_every_batch(monkeypatch):
    """Its machinery, on a CPU: the same rows, with the CPU's path in the place of the GPU's."""
    monkeypatch.setattr(encoder_gpu, "ceilings", lambda device: (10.0, 100.0))
    monkeypatch.setattr("torch.compile", lambda function: function)  # half a minute
    arguments = encoder.parse_arguments(["--variants", "phantom", "--size", "16", "32", "32", "--batch", "2", "3",
                                         "--repeats", "1", "--device", "cuda"])  # fmt: skip
    assert encoder.parse_arguments(["--device", "cuda"]).batch == [1, 8, 64]
    arguments.device = "cpu"
    head, *tables = encoder_gpu.report(arguments)
    assert "10 GB/s" in head and len(tables) == 2
    for lines in tables:
        rows = [line.strip("| ").split(" | ") for line in lines.splitlines() if "phantom" in line]
        assert [row[:2] for row in rows] == [["phantom", "2"], ["phantom", "3"]]
        assert all(len(row) == len(encoder_gpu.HEADS) and row[-1] == "fused" for row in rows)


def test_what_does_not_fit_a_gpu_is_said(monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder_gpu, "alternate", full)
    arguments = encoder.parse_arguments(["--variants", "phantom", "--size", "16", "32", "32"])
    assert encoder_gpu.row("phantom", "inference", 2, arguments, (1.0, 1.0))[2:5] == ["out of memory"] * 3


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    arguments = encoder.parse_arguments(["--size", "64", "128", "128"])
    assert float(encoder.peak_growth("nano", arguments, encoder.plain)) > 5
