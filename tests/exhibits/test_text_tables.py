"""What the three exhibits on meanings and texts share."""

import pandas as pd
import pytest

from limbeck.exhibits import figures, text_tables

ARMS = {"none": (1.0, 4.0), "lora_1": (30.0, 2.0), "nola": (28.0, 2.2), "nola_fifth": (20.0, 2.6)}


@pytest.fixture
def final():
    rows = [
        dict.fromkeys(text_tables.METRICS, 1.0)
        | {"arm": arm, "seed": seed, "test/bleu": bleu + seed, "validation/loss": loss}
        for arm, (bleu, loss) in ARMS.items()
        for seed in (-1, 0, 1)
    ]
    return pd.DataFrame(rows)


def test_the_table_has_a_row_for_each_arm_and_metric_with_its_mean_over_seeds(final):
    rows = pd.DataFrame(text_tables.table(final)).set_index(["arm", "metric"])
    assert len(rows) == len(ARMS) * len(text_tables.METRICS)
    assert {arm: rows.loc[(arm, "test/bleu"), "mean"] for arm in ARMS} == {arm: bleu for arm, (bleu, _) in ARMS.items()}


def test_the_figure_shows_trained_arms_alone_and_tells_the_bleu_of_all(final):
    drawn = text_tables.figure(final)
    assert [axes.get_xlabel().split("\n")[0] for axes in drawn.axes] == ["test BLEU", "validation loss / nats a token"]
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == [figures.look(arm).label for arm in ARMS if arm != "none"]
    title = " ".join(text.get_text() for text in drawn.texts) + str(drawn.get_suptitle())
    assert all(f"({bleu:.1f})" in " ".join(title.split()) for bleu, _ in ARMS.values())
