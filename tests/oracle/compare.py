"""Ours and theirs, tensor by tensor."""

from collections.abc import Mapping

from torch import Tensor

TOLERANCE = 1e-4


def assert_same(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """The same names, and for each |ours - theirs| / |theirs| within the tolerance."""
    assert ours.keys() == theirs.keys()
    assert all(tensor.norm() > 0 for tensor in theirs.values())
    errors = {
        name: float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items()
    }
    # Not "greater than": NaN is wrong, too.
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong
