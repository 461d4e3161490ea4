"""Live memory, as operations make it and as it is given back."""

import torch

from pretrain.dry_run.tracker import StepTracker

KIB = 256  # float32 elements


def test_memory_is_counted_once_until_its_last_user_is_gone() -> None:
    with StepTracker({}) as tracker:
        x = torch.zeros(4 * KIB)
        view = x[KIB:]
        y = x + 1
        assert tracker.live == 8 * 1024
        del x
        assert tracker.live == 8 * 1024
        del view, y
        assert tracker.live == 0
        assert tracker.peak == 8 * 1024
        tracker.reset()
        assert tracker.peak == 0


def test_what_backward_passes_wait_for_is_alive() -> None:
    weight = torch.ones(KIB, requires_grad=True)
    with StepTracker({}) as tracker:
        out = (weight * 2).exp().sum()
        assert tracker.live >= 1024
        out.backward()
        del out
    assert tracker.live == 1024, "the gradient"


def test_memory_that_is_freed_and_restored_counts_as_gathered() -> None:
    with StepTracker({}) as tracker:
        gathered, other = torch.zeros(KIB), torch.zeros(2 * KIB)
        storage = gathered.untyped_storage()
        storage.resize_(0)
        assert (tracker.live, tracker.gathered) == (2048, 0)
        storage.resize_(1024)
        assert (tracker.live, tracker.gathered) == (3072, 1024)
        tracker.reset()
        assert tracker.gathered_at_peak == 1024
        del gathered, storage, other
    assert (tracker.live, tracker.gathered) == (0, 0)
