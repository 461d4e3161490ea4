import pytest

from data_pipeline.errors import DataError
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.eval_config import longest_position
from pretrain.evals.request import Request, parse_lengths, prepared


def config(*overrides: str) -> Config:
    return load_config("tiny-hybrid-moe", ["data.seq_len=1024", *overrides])


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("8k,32k, 128K", (8192, 32768, 131072)), ("1m,64,64", (64, 1 << 20)), (" 100 ", (100,))],
)
def test_lengths_are_read(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["8kb", "0", "-1", "1e3", "eight"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--lengths {text}: must be a number of tokens, as in"):
        parse_lengths(f"64,{text}")


def test_no_length_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="--lengths is empty: give at least one"):
        parse_lengths(" , ")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tasks": ("needles",)}, DataError, "'needles' is not known, did you mean needle"),
        ({"tasks": ()}, UserError, "--tasks is empty, and there are no --shards"),
        ({"form": "words"}, UserError, "--form words is not known; allowed: auto, tokens, text"),
        ({"pairs": 0}, DataError, "pairs = 0: must be at least 1"),
        ({"gap": -1}, DataError, "gap = -1: must be 0 or more tokens"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields, error, message) -> None:
    with pytest.raises(error, match=message):
        Request(**{"lengths": (64,), **fields})


@pytest.mark.parametrize(
    ("overrides", "nproc", "length", "message"),
    [
        (["parallel.cp=4"], 4, 1001, "cp x tp = 4 x 1 does not divide it; .* is 1000"),
        (["parallel.cp=2", "parallel.tp=2"], 4, 1, "cp x tp = 2 x 2 .* nearest .* is 4"),
        (
            ["context.segments=8", "model.attention.positions=[none]"],
            1,
            1000,
            "--lengths 1000: it is no whole number of the run's segments of 128 tokens; .* is 1024",
        ),
        ([], 1, 2048, r"--lengths 2048: .* trained for 1024 tokens.*data.seq_len=2048"),
        (["parallel.ep=2"], 1, 512, "layout refused: parallel.ep = 2 does not divide"),
    ],
)
def test_lengths_that_the_run_cannot_take_are_refused(overrides, nproc, length, message) -> None:
    with pytest.raises(UserError, match=message):
        prepared(config(), overrides, [64, length], nproc)


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        ([], 1024),
        (["model.attention.yarn={factor: 4.0, original_length: 512}"], 2048),
        (["model.attention.yarn={factor: 4.0, original_length: 128}"], 1024),
        (["model.attention.positions=[none]"], None),
        (["model.layer_pattern=[linear, sliding]"], None),
    ],
)
def test_only_rotary_positions_over_all_tokens_have_an_end(overrides, longest) -> None:
    assert longest_position(config(*overrides)) == longest


def test_what_is_evaluated_beside_training_need_not_fit() -> None:
    run = config("eval={every: 5, seq_len: 256}", "data.seq_len=256")
    assert prepared(run, ["data.seq_len=128"], [64], 1).data.seq_len == 64


def test_a_forward_pass_has_as_many_tokens_as_one_of_training() -> None:
    run = config("train.microbatch=4", "model.attention.positions=[none]")
    for longest, microbatch in ((512, 8), (1024, 4), (1 << 20, 1)):
        made = prepared(run, [], [64, longest], 1)
        assert made.data.seq_len == longest
        assert made.train.microbatch == microbatch


@pytest.mark.parametrize(
    ("trained", "overrides", "longest", "segments"),
    [
        (["context.segments=8"], [], 512, 4),
        (["context.segments=8"], ["data.seq_len=4096"], 4096, 32),
        (["context.segments=8"], ["context.segments=4"], 512, 2),
        (["context.segments=8"], ["context.segments=1"], 1024, 1),
        (["context.segments=8"], [], 64, 1),
        ([], ["context.segments=4"], 1024, 4),
    ],
)
def test_segments_are_as_long_as_in_training(trained, overrides, longest, segments) -> None:
    assert prepared(config(*trained), overrides, [longest], 1).context.segments == segments
