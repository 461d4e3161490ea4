"""Models on ranks that share each row are those of transformers on whole rows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import hf
from pretrain.model.transformer import Transformer
from tests.parity.test_transformers import (
    CASES,
    assert_close,
    assert_same_gradients,
    random_tokens,
    randomise,
    their_gradients,
    their_model,
)
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("shared_rows_cases.py")
MODELS = ["qwen3-next-moe", "qwen3-next-dense-tied", "qwen3-moe-sliding"]
Shared = dict[str, tuple[Tensor, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of each model, and what it is asked."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("shared-rows")
    vocabulary = {"<|endoftext|>": 0, "a": 1}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")).save(str(folder / "t.json"))
    for name in MODELS:
        config, out = CASES[name], folder / name
        model = Transformer(config)
        randomise(model)
        tokens = random_tokens(config)
        hf.export(
            config,
            model.state_dict(),
            folder / "t.json",
            out,
            eos_id=0,
            max_positions=tokens.shape[1],
        )
        generator = torch.Generator().manual_seed(2)
        d_logits = torch.randn(*tokens.shape, config.vocab_size, generator=generator)
        torch.save((tokens, d_logits), out / "inputs.pt")
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> Shared:
    run_on_ranks(2, SCRIPT, *(str(folder / name) for name in MODELS))
    return {name: torch.load(folder / name / "shared.pt") for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(
    name: str, folder: Path, shared: Shared
) -> None:
    theirs = their_model(folder / name)
    tokens, d_logits = torch.load(folder / name / "inputs.pt")
    their_logits = theirs(tokens).logits
    their_logits.backward(d_logits)
    logits, gradients = shared[name]
    assert_close(logits, their_logits, 1e-5, "logits")
    assert_same_gradients(gradients, their_gradients(CASES[name], theirs))
