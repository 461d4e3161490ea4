import torch
from torch.nn import functional as F

from pretrain.evals.predictions import NOTHING, predict
from pretrain.model.kernels.cross_entropy import VocabularyShard

PLACES, D, VOCAB, RANKS = 37, 8, 48, 4


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PLACES, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, D, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(VOCAB, (PLACES,), generator=generator)


def predict_sharded(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each rank. Collectives are played back: what all ranks gave in the round before."""
    given: list[list[torch.Tensor]] = []
    while True:
        results, rounds = [], []
        for rank, rows in enumerate(weight.chunk(RANKS)):
            calls: list[torch.Tensor] = []

            def gather(x: torch.Tensor, calls: list[torch.Tensor] = calls) -> torch.Tensor:
                calls.append(x)
                known = len(given) >= len(calls)
                return torch.stack(given[len(calls) - 1]) if known else torch.stack([x] * RANKS)

            shard = VocabularyShard(rank * len(rows), gather)
            results.append(predict(hidden, rows, labels, 10, shard))
            rounds.append(calls)
        if len(given) == len(rounds[0]):
            return results
        given.append([calls[len(given)] for calls in rounds])


def test_predictions_and_losses_are_those_of_all_logits() -> None:
    hidden, weight, labels = inputs()
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels, reduction="none")
    for predicted, loss in (predict(hidden, weight, labels, 7), *predict_sharded(*inputs())):
        assert torch.equal(predicted, logits.argmax(-1))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_of_equal_logits_the_lowest_id_counts_whoever_has_it() -> None:
    hidden, weight, labels = inputs()
    # Rows of the last rank, of the first, and two of one rank win everywhere.
    weight[:] = 0
    hidden[:] = 1
    weight[[45, 14, 13, 30]] = 1
    for predicted, _ in (
        predict(hidden, weight, labels, 7),
        *predict_sharded(hidden, weight, labels),
    ):
        assert predicted.tolist() == [13] * PLACES


def test_what_is_not_finite_predicts_nothing() -> None:
    hidden, weight, labels = inputs()
    hidden[3] = torch.nan
    for predicted, loss in (
        predict(hidden, weight, labels, 7),
        *predict_sharded(hidden, weight, labels),
    ):
        assert (predicted == NOTHING).nonzero().flatten().tolist() == [3]
        assert loss.isnan().nonzero().flatten().tolist() == [3]


def test_no_places_at_all() -> None:
    hidden, weight, labels = inputs()
    predicted, loss = predict(hidden[:0], weight, labels[:0], 7)
    assert predicted.shape == loss.shape == (0,)
