import numpy as np
import pytest
import torch

from data_pipeline.stream import BatchPlan
from pretrain.config import Config, parse_config
from pretrain.metrics.flops import Extent
from pretrain.metrics.peaks import peak_by_name
from pretrain.metrics.utilization import extent_of_batch, peak_of_device, utilization

CPU = torch.device("cpu")


def config_of(**settings: dict) -> Config:
    attention = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 4}
    model = {"d_model": 64, "n_layers": 2, "vocab_size": 128, "attention": attention}
    pattern = {"layer_pattern": ["softmax"], "moe": {"n_experts": 0}}
    return parse_config({"model": model | pattern, "data": {"seq_len": 12}, **settings})


def plan_of(continues: list[bool] | None = None) -> BatchPlan:
    """Rows of 12 tokens: a document of 12, which began 5 tokens before, and others of 7 and 5."""
    pieces = np.array([[0, 3, 5, 17], [0, 4, 0, 7], [0, 5, 0, 5]])
    return BatchPlan(pieces, np.array([0, 1, 3]), continues and np.array(continues))


def test_the_extent_of_a_batch_is_that_of_its_documents():
    pairs = 12 * 13 // 2 + 7 * 8 // 2 + 5 * 6 // 2
    alone = (1 + 2 + 3 + 9 * 4) + (1 + 2 + 3 + 4 * 4) + (1 + 2 + 3 + 2 * 4)
    assert extent_of_batch(config_of(), plan_of()) == Extent(24, pairs, alone)
    # With memory of the row before, a window is full from the first token on.
    going_on = extent_of_batch(config_of(), plan_of([True, False]))
    assert going_on == Extent(24, pairs, alone + 3 + 2 + 1)


def test_utilization_is_of_all_devices_together():
    config = config_of()
    one = utilization(config, plan_of(), 0, seconds=2.0, devices=1, peak=1e9)
    two = utilization(config, plan_of(), 0, seconds=1.0, devices=4, peak=1e9)
    assert one["perf/mfu"] == pytest.approx(2 * two["perf/mfu"])
    assert one["perf/mfu"] == pytest.approx(one["perf/tflops_per_device"] * 1e12 / 1e9)
    assert one["perf/mfu"] < one["perf/hfu"] < 1.1 * one["perf/mfu"]


def test_six_operations_for_each_active_weight_and_token():
    config = config_of()
    model = config.model
    weights = 2 * (3 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * model.d_ff) + 64 * 128
    attention = 2 * 12 * 64 * extent_of_batch(config, plan_of()).pairs
    measured = utilization(config, plan_of(), 0, 1.0, 1, None)
    assert measured == {"perf/tflops_per_device": (6 * 24 * weights + attention) / 1e12}


@pytest.mark.parametrize(
    ("name", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GB200", None),
    ],
)
def test_devices_are_known_by_whole_words(name, bfloat16):
    assert peak_by_name(name, torch.bfloat16) == bfloat16


def test_float32_is_not_measured_by_the_peak_of_tensor_cores():
    assert peak_by_name("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12


def test_a_cpu_has_no_peak_unless_it_is_configured():
    assert peak_of_device(config_of(), CPU) is None
    assert peak_of_device(config_of(train={"peak_tflops": 0.5}), CPU) == 0.5e12
