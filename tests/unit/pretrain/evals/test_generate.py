from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.errors import TrainingError, UserError
from pretrain.evals.generate import generate

VOCAB = 12


class NextIsSum(nn.Module):
    """Prefers the sum of the prefix modulo VOCAB, then the ids after it, each less likely."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Parameter(torch.eye(VOCAB))

    def forward(self, tokens, documents=None, output=None):
        preferred = tokens.cumsum(1) % VOCAB
        distance = (torch.arange(VOCAB) - preferred.unsqueeze(-1)) % VOCAB
        return SimpleNamespace(value=output(-0.5 * distance.float(), self.lm_head))


def test_greedy_takes_the_likeliest_token_after_the_whole_prefix():
    assert generate(NextIsSum(), [1, 2], 5) == [3, 6, 0, 0, 0]


def test_generation_ends_before_the_stop_token():
    assert generate(NextIsSum(), [1, 2], 5, stop_id=6) == [3]
    assert generate(NextIsSum(), [1, 2], 0) == []


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample = generate(NextIsSum(), [1], 30, temperature=2.0, seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert sample == generate(NextIsSum(), [1], 30, temperature=2.0, seed=5)
    assert sample != generate(NextIsSum(), [1], 30, temperature=2.0, seed=6)


def test_sampling_follows_the_softmax_at_its_temperature():
    draws = 2000
    firsts = torch.tensor(
        [generate(NextIsSum(), [0], 1, temperature=2.0, seed=s)[0] for s in range(draws)]
    )
    expected = torch.softmax(-0.25 * torch.arange(VOCAB), 0)
    share = torch.bincount(firsts, minlength=VOCAB) / draws
    assert (share - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize("temperature", [1e-9, 1e-45, 1e-320])
def test_hardly_any_temperature_is_as_none(temperature):
    greedy = generate(NextIsSum(), [1, 2], 5)
    assert generate(NextIsSum(), [1, 2], 5, temperature=temperature) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_told(temperature):
    model = NextIsSum()
    model.lm_head.data[3] = torch.nan
    with pytest.raises(TrainingError, match="logits are not finite"):
        generate(model, [1], 1, temperature=temperature)


def test_top_k_samples_among_the_k_likeliest():
    firsts = {generate(NextIsSum(), [4], 1, temperature=9.0, top_k=3, seed=s)[0] for s in range(60)}
    assert firsts == {4, 5, 6}


@pytest.mark.parametrize("seed", [-(2**63), 2**63, 2**64 - 1])
def test_any_seed_of_64_bits_is_taken(seed):
    assert len(generate(NextIsSum(), [1], 3, temperature=1.0, seed=seed)) == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([1], {"temperature": -0.1}, "temperature = -0.1"),
        ([1], {"temperature": 1.0, "top_k": 0}, "top_k = 0"),
        ([1], {"temperature": 1.0, "seed": 2**64}, r"seed = 18446744073709551616: .* below 2\^64"),
        ([1], {"temperature": 1.0, "seed": -(2**63) - 1}, r"must be at least -2\^63 and"),
    ],
)
def test_bad_requests_are_refused(prompt, options, message):
    with pytest.raises(UserError, match=message):
        generate(NextIsSum(), prompt, 3, **options)
