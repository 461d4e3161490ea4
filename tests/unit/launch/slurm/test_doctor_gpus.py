"""What the doctor says of GPUs, as an nvidia-smi on PATH tells of them."""

import os
from pathlib import Path

import pytest

from launch.slurm.doctor import gpus
from launch.slurm.doctor.findings import Finding
from launch.slurm.doctor.gpus import Gpus
from tests.nvidia_smi import smi, write_nvidia_smi


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where on PATH a test writes one."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return path


def _ranks(xml: str, *visible: str | None) -> list[Gpus]:
    return [gpus.parse(xml).model_copy(update={"visible": one}) for one in visible]


def _findings(**measured: list[Gpus]) -> tuple[Finding, ...]:
    return gpus.check(measured, wanted=True).findings


def test_healthy_gpus_are_read_and_nothing_is_said(nvidia_smi: Path) -> None:
    write_nvidia_smi(nvidia_smi, smi())
    measured = gpus.measure()
    assert (measured.driver, len(measured.gpus)) == ("570.124.06", 2)
    assert measured.gpus[0].persistent
    check = gpus.check({"a1": [measured, measured]}, wanted=True)
    assert check.findings == ()
    assert check.saw == "NVIDIA H100 80GB HBM3; a rank sees 2"
    assert Gpus.model_validate_json(measured.model_dump_json()) == measured


@pytest.mark.parametrize(
    ("element", "text", "says", "fix"),
    [
        ("dram_uncorrectable", "2", "has had 2 ECC errors that were not corrected", "drained"),
        ("remapped_row_pending", "Yes", "rows of its memory is pending", "drained"),
        ("remapped_row_failure", "Yes", "rows of its memory is failed", "drained"),
        ("gpu_recovery_action", "Reset", "has to be recovered: Reset", "drained"),
        ("persistence_mode", "Disabled", "is not in persistence mode", "nvidia-persistenced"),
        (
            "clocks_event_reason_hw_thermal_slowdown",
            "Active",
            "is too hot: slowed down by its hardware",
            "cooling",
        ),
        ("state", "In Progress", "not joined the NVLink fabric (In Progress)", "fabricmanager"),
        ("used", "70321 MiB", "70321 MiB of GPU 0", "end what runs there"),
    ],
)
def test_an_ill_gpu_is_named_with_its_illness(element: str, text: str, says: str, fix: str) -> None:
    ill = _ranks(smi(**{element: text}), "0", "1")
    (finding,) = _findings(a1=_ranks(smi(), "0", "1"), a2=ill)
    assert finding.where == "a2"
    assert "GPU 0 (NVIDIA H100 80GB HBM3, GPU-0a8f3c14" in finding.what
    assert says in finding.what
    assert fix in finding.fix


def test_drivers_before_the_renaming_say_why_clocks_are_low_in_another_element() -> None:
    xml = smi(clocks_event_reason_hw_slowdown="Active").replace("clocks_event", "clocks_throttle")
    (finding,) = _findings(a1=_ranks(xml, None))
    assert "is slowed down by its hardware" in finding.what


def test_what_a_gpu_does_not_tell_is_no_illness() -> None:
    xml = smi(
        count=1,
        persistence_mode="N/A",
        dram_uncorrectable="N/A",
        used="N/A",
        state="N/A",
        gpu_recovery_action="N/A",
        remapped_row_pending="N/A",
    )
    assert _findings(a1=_ranks(xml, None)) == ()


def test_ranks_without_a_gpu_are_told_what_they_see() -> None:
    (finding,) = _findings(a1=_ranks(smi(), "0", ""))
    assert finding.what == "1 of 2 ranks see no GPU (CUDA_VISIBLE_DEVICES is '', '0')"
    assert "gpus-per-node, gpus-per-task, gres" in finding.fix
    (finding,) = _findings(a1=_ranks(smi(), "5,0"))
    assert "1 of 1 ranks see no GPU" in finding.what


def test_ranks_that_would_share_a_gpu_are_found() -> None:
    (finding,) = _findings(a1=_ranks(smi(), "0", "0"))
    assert finding.what == "its ranks 0, 1 would share one GPU"
    # All see both, and each takes its own; so does each that sees one.
    assert _findings(a1=_ranks(smi(), "0,1", "0,1")) == ()
    assert _findings(a1=_ranks(smi(), "GPU-0a8f3c14", "GPU-1a8f3c14")) == ()
    (finding,) = _findings(a1=_ranks(smi(), None, None, None))
    assert finding.what == "its ranks 0, 2 would share one GPU"


def test_a_node_with_another_driver_or_other_gpus_is_found() -> None:
    (finding,) = _findings(
        a1=_ranks(smi(), None), a2=_ranks(smi(driver="550.54.15"), None), a3=_ranks(smi(), None)
    )
    assert finding.where == "a2"
    assert "with driver 550.54.15, elsewhere NVIDIA H100 80GB HBM3 with driver 570" in finding.what
    old = smi().replace("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
    (finding,) = _findings(a1=_ranks(smi(), None), a2=_ranks(smi(), None), a3=_ranks(old, None))
    assert finding.where == "a3"


def test_a_driver_that_does_not_answer_is_told_in_its_words(nvidia_smi: Path) -> None:
    write_nvidia_smi(
        nvidia_smi, "Failed to initialize NVML: Driver/library version mismatch\n", code=18
    )
    (finding,) = _findings(a1=[gpus.measure()])
    assert finding.what == (
        "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"
    )
    write_nvidia_smi(nvidia_smi, "<nvidia_smi_log>")
    assert "nvidia-smi prints no XML" in _findings(a1=[gpus.measure()])[0].what


def test_a_node_without_a_driver_is_found_only_where_gpus_are_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    measured = {"a1": [gpus.measure()]}
    (finding,) = gpus.check(measured, wanted=True).findings
    assert "there is no nvidia-smi" in finding.what
    assert gpus.check(measured, wanted=False).findings == ()


def test_gpus_that_are_not_asked_for_are_found_if_ranks_would_use_them() -> None:
    (finding,) = gpus.check({"a1": _ranks(smi(), None)}, wanted=False).findings
    assert finding.where == "a1"
    assert finding.what.startswith("ranks see 2 GPUs, which the profile does not ask for")
    assert gpus.check({"a1": _ranks(smi(), "")}, wanted=False).findings == ()
