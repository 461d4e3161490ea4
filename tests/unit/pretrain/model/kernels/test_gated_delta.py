"""The chunked gated delta rule against its token-by-token definition and against transformers."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_next import modeling_qwen3_next

from pretrain.model.kernels import gated_delta_forms, gated_delta_scan
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.gated_delta import gated_delta_recurrent, gated_delta_rule

SEGMENT = gated_delta_forms.CPU_SEGMENT
FORMS = {"by chunk": gated_delta_forms.BY_CHUNK, "by transfer": gated_delta_forms.BY_TRANSFER}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Each way to compute a segment, that of GPUs too."""
    monkeypatch.setattr(gated_delta_scan, "form_on", lambda _: FORMS[request.param])


def random_inputs(length, dtype=torch.float64, decay=0.2, key_heads=2):
    """q, k, v, g, beta and the initial state of 2 rows, 4 value heads, D = 8, E = 12."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(key_heads, length, 8), dim=-1) for _ in range(2))
    g = -decay * F.softplus(normal(4, length))
    beta = normal(4, length).sigmoid()
    beta[..., ::5], beta[..., 1::5] = 0, 1
    inputs = (q, k, normal(4, length, 12), g, beta, normal(4, 8, 12))
    return [x.to(dtype).requires_grad_() for x in inputs]


def results(rule, inputs, documents=None):
    """Output, final state and the gradients of a function of both."""
    out, state = rule(*inputs[:5], documents=documents, initial_state=inputs[5])
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, state)
    ]
    scalar = sum((x * y).sum() for x, y in zip((out, state), directions, strict=True))
    return [out, state, *torch.autograd.grad(scalar, inputs)]


def assert_close(actual, expected, tolerance):
    names = ("out", "state", "dq", "dk", "dv", "dg", "dbeta", "d_initial")
    for name, x, y in zip(names, actual, expected, strict=True):
        assert (x - y).norm() <= tolerance * y.norm(), name


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("decay", [0.2, 7.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130, SEGMENT + 70])
@pytest.mark.usefixtures("form")
def test_equals_the_recurrence(length, decay, key_heads):
    inputs = random_inputs(length, decay=decay, key_heads=key_heads)
    assert_close(results(gated_delta_rule, inputs), results(gated_delta_recurrent, inputs), 1e-12)


def gradient_of_all_decays(rule, inputs, direction):
    """Of a factor of the decays of a head: the sum over rows and tokens, in which much cancels."""
    out, _ = rule(*inputs)
    (dg,) = torch.autograd.grad((out * direction).sum(), inputs[3])
    return (dg * inputs[3].detach()).sum((0, 2)).double()


def test_the_gradient_of_the_decay_stays_precise_in_the_sum_over_tokens():
    errors = []
    for group in range(7):
        sums = exact = torch.zeros(4, dtype=torch.float64)
        for length in range(40 + 8 * group, 48 + 8 * group):
            *inputs, _ = random_inputs(length, torch.float32)
            wide = [x.double() for x in inputs]
            direction = torch.randn(2, 4, length, 12, generator=torch.Generator().manual_seed(0))
            sums = sums + gradient_of_all_decays(gated_delta_rule, inputs, direction)
            exact = exact + gradient_of_all_decays(gated_delta_recurrent, wide, direction)
        errors.append(float((sums - exact).norm() / exact.norm()))
    assert sorted(errors)[len(errors) // 2] <= 1e-6


PACKED = [
    [[1, 1, 62, 1, 65], [64, 66]],
    [[128, 2], [130]],
    [[SEGMENT - 1, 2, 69], [SEGMENT, 70]],
]


@pytest.mark.parametrize("decay", [0.2, 7.0])
@pytest.mark.parametrize("rows", PACKED, ids=str)
@pytest.mark.usefixtures("form")
def test_equals_the_recurrence_with_documents(rows, decay):
    inputs, documents = random_inputs(sum(rows[0]), decay=decay), Documents.from_lengths(rows)
    assert_close(
        results(gated_delta_rule, inputs, documents),
        results(gated_delta_recurrent, inputs, documents),
        1e-12,
    )


def test_packed_documents_equal_separate_ones():
    lengths = [1, 63, 64, 2, 200]
    inputs = random_inputs(sum(lengths))
    documents = Documents.from_lengths([lengths, lengths])
    packed, last_state = gated_delta_rule(*inputs[:5], documents=documents, initial_state=inputs[5])
    state, separate = inputs[5], []
    for document in zip(*(x.split(lengths, 2) for x in inputs[:5]), strict=True):
        out, final_state = gated_delta_rule(*document, initial_state=state)
        separate.append(out)
        state = None
    torch.testing.assert_close(packed, torch.cat(separate, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(last_state, final_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.2, 7.0])
@pytest.mark.parametrize("length", [65, SEGMENT + 70])
def test_equals_transformers(length, decay):
    chunk_rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)

    def theirs(q, k, v, g, beta, *, documents, initial_state):
        time_first = (x.transpose(1, 2) for x in (q, k, v, g, beta))
        out, state = chunk_rule(*time_first, initial_state=initial_state, output_final_state=True)
        return out.transpose(1, 2), state

    inputs = random_inputs(length, torch.float32, decay)
    assert_close(results(gated_delta_rule, inputs), results(theirs, inputs), 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("decay", [0.2, 7.0])
@pytest.mark.usefixtures("form")
def test_lower_precision_stays_close(dtype, tolerance, decay):
    inputs = random_inputs(300, dtype, decay)
    documents = Documents.from_lengths([[100, 200], [300]])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    actual = results(gated_delta_rule, inputs, documents)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_close(actual, results(gated_delta_recurrent, exact, documents), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, [[100, 600], [700]]], ids=str)
def test_the_compiled_form_of_gpus_equals_the_recurrence(rows, monkeypatch):
    compiled_form = gated_delta_forms.form_on(torch.device("cuda"))
    monkeypatch.setattr(gated_delta_scan, "form_on", lambda _: compiled_form)
    inputs = random_inputs(700, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    documents = None if rows is None else Documents.from_lengths(rows)
    with warnings.catch_warnings():
        # It warns where it runs uncompiled.
        warnings.simplefilter("error", UserWarning)
        actual = results(gated_delta_rule, inputs, documents)
    assert_close(actual, results(gated_delta_recurrent, exact, documents), 2e-5)


def test_other_chunk_sizes_and_scales_agree():
    inputs = random_inputs(150)[:5]
    expected = gated_delta_recurrent(*inputs, scale=0.7)
    for chunk_size in (16, 128):
        actual = gated_delta_rule(*inputs, scale=0.7, chunk_size=chunk_size)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_saves_little_but_its_inputs():
    inputs = random_inputs(131072, torch.float32)[:5]
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gated_delta_rule(*inputs)
    input_bytes = sum(x.untyped_storage().nbytes() for x in inputs)
    assert input_bytes < sum(saved.values()) < 1.1 * input_bytes


PEAK_MEMORY = """
import re
import torch
from pretrain.model.kernels.gated_delta import gated_delta_rule

def resident_bytes(field):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", status.read())[1])

def growth(length):
    before = resident_bytes("VmRSS")
    q, k, v = (torch.rand(1, 4, length, 32, requires_grad=True) for _ in range(3))
    g, beta = (torch.rand(1, 4, length, requires_grad=True) for _ in range(2))
    out, _ = gated_delta_rule(q, k / 8, v, -g, beta)
    out.backward(torch.ones_like(out))
    return resident_bytes("VmHWM") - before

torch.set_num_threads(1)
growth(1024)
print(growth(32768), growth(131072))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_is_linear_in_the_length():
    printed = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True
    )
    short, long = map(int, printed.stdout.split())
    assert 3 < long / short < 5
    tensor_bytes = 131072 * 4 * 32 * 4
    assert long < 11 * tensor_bytes  # q, k, k / 8, v, out and the gradient of each


def test_refuses_shapes_that_do_not_fit():
    q, k, v, g, beta, state = random_inputs(10)
    with pytest.raises(ValueError, match=r"beta has shape \(2, 4, 9\).*\(2, 4, 10\)"):
        gated_delta_rule(q, k, v, g, beta[..., :9])
    with pytest.raises(ValueError, match="initial_state"):
        gated_delta_rule(q, k, v, g, beta, initial_state=state[:, :2])
    with pytest.raises(ValueError, match=r"documents.position has shape \(2, 9\)"):
        gated_delta_rule(q, k, v, g, beta, documents=Documents.whole_rows(2, 9))
    with pytest.raises(ValueError, match="4 value heads are not a multiple of 3 key heads"):
        gated_delta_rule(*(x[:, :1].expand(-1, 3, -1, -1) for x in (q, k)), v, g, beta)
