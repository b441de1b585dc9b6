"""Shared fixtures. Shapes and types in signatures are checked wherever a test imports the package."""

import random

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("limbeck", "beartype.beartype")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Quick tests first, then slow ones, then notebooks, so that a mistake shows early."""
    items.sort(key=lambda item: (item.path.suffix == ".ipynb", item.get_closest_marker("slow") is not None))


@pytest.fixture
def global_generators():
    """A function that tells the state of torch's and numpy's global generators (beartype draws from random's)."""

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002

    return state


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a BERT of three narrow layers and a tokenizer of a few words, as `save_pretrained` leaves them."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("tiny_bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    # BERT's own range of 0.02 is for a width of 768: so narrow, it would give every text the same output.
    config = BertConfig(vocab_size=len(words), initializer_range=0.2, **size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).bert.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory):
    """A folder that `datasets.load_dataset` reads: three classes told apart by their first letter."""
    import json  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("tiny_texts")
    source = random.Random(0)
    for split, rows in (("train", 160), ("test", 60)):
        lines = []
        for _ in range(rows):
            label = source.choice("xyz")
            lines.append(
                {"text": " ".join([label, *source.choices("abcdefgh", k=source.randint(2, 8))]), "label": label}
            )
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)
