"""The configuration tree: what it accepts, and how it says no."""

import subprocess
import sys

import pytest
import yaml

from pretrain.config import load_config, parse_config, recipe_names
from pretrain.errors import UserError
from pretrain.layouts import Layout, resolve_layout


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_shipped_recipe_survives_a_round_trip(recipe: str) -> None:
    config = load_config(recipe)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_an_override_beats_the_recipe_and_the_recipe_beats_the_default(tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {steps: 7}\noptim: {lr: 0.5}\n")
    config = load_config(str(recipe), ["optim.lr=1e-3"])
    assert (config.train.steps, config.optim.lr, config.train.global_batch) == (7, 1e-3, 8)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", ["optim.learning_rate", "section optim has", "lr"]),
        ("model.moe.n_expert=8", ["model.moe.n_expert", "did you mean model.moe.n_experts?"]),
        ("lr=1", ["did you mean optim.lr?"]),
        ("optim.lr=-1", ["optim.lr", "-1", "greater than 0"]),
        ("train.dtype=fp8", ["train.dtype", "fp8", "'float32' or 'bfloat16'"]),
        ("train.dtype=bfloat", ["did you mean bfloat16?"]),
        ("train.steps=true", ["train.steps", "not true or false"]),
        ("data.shards=[]", ["data.shards", "sample"]),
        ("data.shards=3", ["data.shards = 3", "sample"]),
        ("data.seed=-1", ["data.seed = -1"]),
        ("optim.betas=[0.9,1.0]", ["optim.betas.1 = 1.0", "less than 1"]),
        ("optim.lr=.inf", ["optim.lr = inf", "finite"]),
        ("model.norm_eps=.nan", ["model.norm_eps = nan", "finite"]),
        ("model.attention.rope_base=0", ["rope_base = 0", "more than zero"]),
        ("model.attention.positions=[]", ["positions is empty", "rope, none"]),
        ("model.attention.positions=[nope]", ["positions.0 = 'nope'", "'rope' or 'none'"]),
        ("model.attention.yarn.factor=0.5", ["yarn.factor = 0.5", "1 or more"]),
        ("model.attention.yarn.beta_slow=64", ["32.0, 64", "first must be above the second"]),
        ("model.attention.yarn.lenght=1", ["yarn.lenght", "yarn.original_length"]),
        ("model.moe.aux_loss=-1", ["model.moe.aux_loss = -1", "zero or more"]),
        ("model.moe.bias_rate=0", ["model.moe.bias_rate = 0", "more than zero"]),
        ("model.moe.capacity_factor=0", ["model.moe.capacity_factor = 0", "more than zero"]),
        ("model.moe.balance=sequences", ["model.moe.balance", "did you mean sequence?"]),
        ("train.steps=many", ["train.steps", "many", "integer"]),
        ("parallel.pipeline.schedule=zvb", ["did you mean zbv?", "In which order"]),
        ("parallel.pipeline.layers_per_stage=even", ["'balanced'", "or a list of numbers"]),
        ("model.d_model=0", ["model.d_model = 0", "more than zero"]),
        ("model.moe.d_expert=20", ["model.moe.d_expert = 20", "multiple of 8"]),
        ("model.moe.top_k=9", ["model.moe.top_k = 9", "8"]),
        ("model.attention.n_kv_heads=3", ["n_kv_heads", "multiple"]),
        ("model.layer_pattern=[]", ["model.layer_pattern", "linear, softmax, sliding"]),
        ("model.layer_pattern=[linear, slide]", ["layer_pattern.1", "did you mean sliding?"]),
        ("model.attention.window=0", ["model.attention.window = 0", "more than zero"]),
        ("model.attention.window=null", ["model.attention.window = None", "integer"]),
        ("train.steps", ["key=value"]),
        ("train=3", ["train = 3"]),
        ("data.shards=[{weight: 2}]", ["data.shards.0.path", "required"]),
    ],
)
def test_a_wrong_setting_is_refused_with_field_value_and_remedy(override, words) -> None:
    with pytest.raises(UserError) as refusal:
        load_config("tiny-hybrid-moe", [override])
    for word in words:
        assert word in str(refusal.value)


def test_a_wrong_entry_of_a_list_is_refused_alone() -> None:
    with pytest.raises(UserError) as refusal:
        load_config("tiny-hybrid-moe", ["parallel.recompute=[full, sometimes]"])
    (line,) = str(refusal.value).splitlines()
    assert "parallel.recompute.1 = 'sometimes'" in line


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("tinny", ["did you mean tiny?"]), ("gone.yaml", ["gone.yaml", "no such file"])],
)
def test_an_unknown_recipe_is_refused(recipe, words) -> None:
    with pytest.raises(UserError) as refusal:
        load_config(recipe)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1,\n", "\x00"])
def test_a_recipe_that_is_no_mapping_is_refused_by_its_path(tmp_path, text) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(str(path))


def test_reading_a_configuration_does_not_load_torch() -> None:
    code = (
        "import sys, pretrain.layouts as l; from pretrain.config import load_config;"
        "l.resolve_layout(load_config('tiny'), 2); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("ranks", "overrides", "layout"),
    [
        (1, [], Layout()),
        (4, ["parallel.ep=2"], Layout(dp_shard=4, ep=2)),
        (
            4,
            ["parallel.dp_replicate=2", "parallel.ep=2"],
            Layout(dp_replicate=2, dp_shard=2, ep=2),
        ),
        (8, ["parallel.tp=2", "parallel.pp=2"], Layout(pp=2, dp_shard=2, tp=2)),
    ],
)
def test_auto_fills_dp_shard(ranks, overrides, layout) -> None:
    assert resolve_layout(load_config("tiny-hybrid-moe", overrides), ranks) == layout


@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (4, ["parallel.ep=3"], ["ep = 3", "dp_shard x cp x tp = 4", "ep=4"]),
        (
            3,
            ["parallel.ep=3", "train.global_batch=6"],
            ["n_experts = 8", "dp_shard=3 cp=1 ulysses=1 ep=1"],
        ),
        (4, ["parallel.dp_shard=3"], ["4 ranks", "dp_shard=4"]),
        (
            4,
            ["parallel.dp_replicate=3"],
            ["dp_replicate x cp x tp = 3", "dp_replicate=4 dp_shard=1"],
        ),
        (3, ["parallel.cp=3", "train.global_batch=6"], ["cp x tp = 3 x 1", "dp_shard=3 cp=1"]),
        (3, ["parallel.tp=3", "train.global_batch=6"], ["seq_len = 256", "dp_shard=3"]),
        (4, ["train.global_batch=6"], ["train.global_batch = 6", "train.global_batch=8"]),
        (
            24,
            ["parallel.ep=2", "model.d_model=104", "train.global_batch=48"],
            ["12 ranks share each expert", "model.d_model = 104", "dp_shard=8 cp=1 ulysses=1 ep=2"],
        ),
        (2, ["model.moe.n_experts=0", "parallel.ep=2"], ["dense", "ep=1"]),
        (2, ["parallel.tp=2", "model.vocab_size=2047"], ["model.vocab_size = 2047", "tp=1"]),
        (
            8,
            ["parallel.tp=8", "train.microbatch=1"],
            ["parallel.tp = 8 does not divide model.attention.n_heads = 4", "tp=4"],
        ),
        (
            2,
            ["parallel.tp=2", "model.linear.n_key_heads=3", "model.linear.n_value_heads=6"],
            ["neither a divisor nor a multiple of model.linear.n_key_heads = 3", "tp=1"],
        ),
        (
            2,
            ["parallel.tp=2", "model.moe.n_experts=0", "model.d_ff=99"],
            ["parallel.tp = 2 does not divide model.d_ff = 99", "tp=1"],
        ),
        (
            4,
            ["parallel.pp=4", "parallel.pipeline.schedule=zbv"],
            ["model.n_layers = 4", "8 stages", "pp=2"],
        ),
        (
            2,
            ["parallel.pp=2", "parallel.pipeline.layers_per_stage=[1, 2]"],
            ["layers_per_stage = [1, 2] adds up to 3", "pp=1"],
        ),
        (
            4,
            ["parallel.pp=4", "train.global_batch=6"],
            ["parallel.pipeline.schedule = 1f1b", "3 microbatches", "train.global_batch=8"],
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_nearest_that_works(
    ranks, overrides, words
) -> None:
    with pytest.raises(UserError, match="layout") as refusal:
        resolve_layout(load_config("tiny-hybrid-moe", overrides), ranks)
    for word in words:
        assert word in str(refusal.value)


def test_timeouts_that_let_nccl_end_the_ranks_before_they_know_who_hangs_are_refused() -> None:
    with pytest.raises(UserError, match=r"must be at least 460, which is four times.* = 100 and a"):
        load_config("tiny", ["train.hang_timeout_s=100", "train.collective_timeout_s=459"])
    load_config("tiny", ["train.hang_timeout_s=100", "train.collective_timeout_s=460"])


@pytest.mark.parametrize(("hang", "collective"), [(15, 1800), (86400, 345660)])
def test_the_collective_timeout_follows_the_hang_timeout(hang: int, collective: int) -> None:
    config = load_config("tiny", [f"train.hang_timeout_s={hang}"])
    assert config.train.collective_timeout_s == collective
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
