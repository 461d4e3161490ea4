import pytest
import torch
import torch.distributed as dist

from parallel.call_stack import activity_at_error
from parallel.mesh import alone


def test_an_error_of_a_group_that_has_been_given_up_is_told() -> None:
    with alone():
        group = dist.new_group([0])
        dist.destroy_process_group(group)
        with pytest.raises(ValueError, match="Process group") as error:
            dist.broadcast(torch.zeros(1), 0, group=group)
        found = activity_at_error(error.value)
    assert found.what.endswith("(a group that has been given up)")
    assert found.ranks == ()
