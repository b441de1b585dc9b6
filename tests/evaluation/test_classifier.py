"""Outputs of a classifier, row by row, and its scores against their formulas."""

import math

import pytest
import torch

from limbeck.evaluation import classifier
from limbeck.models import encoders
from limbeck.tasks.classification import Encoded

RIGHT = [(0, 0)] * 5 + [(1, 1)] * 3  # (label, predicted)
WRONG = [(0, 1)] * 2 + [(1, 0)] * 4


def scores(metric, rows, classes=2):
    labels, predicted = torch.tensor(rows).T
    return classifier.score(metric, torch.nn.functional.one_hot(predicted, classes).float(), labels)


def test_each_metric_has_the_value_of_its_formula():
    negative, positive, false_positive, false_negative = 5, 3, 2, 4
    pairs = (positive + false_positive, positive + false_negative, negative + false_positive, negative + false_negative)
    covariance = positive * negative - false_positive * false_negative
    assert scores("accuracy", RIGHT + WRONG) == pytest.approx(8 / 14)
    assert scores("f1", RIGHT + WRONG) == pytest.approx(2 * positive / (2 * positive + false_positive + false_negative))
    assert scores("matthews", RIGHT + WRONG) == pytest.approx(covariance / math.sqrt(math.prod(pairs)))


def test_the_right_answer_scores_1_and_the_opposite_does_not():
    for metric in ("accuracy", "f1", "matthews"):
        assert scores(metric, RIGHT) == 1
        assert scores(metric, [(label, 1 - predicted) for label, predicted in RIGHT]) <= 0


def test_accuracy_counts_any_number_of_classes():
    assert scores("accuracy", [(0, 0), (1, 2), (2, 2), (1, 1)], classes=3) == 0.75


@pytest.fixture
def encoder(tiny_bert):
    return encoders.read_first_token(encoders.load_encoder(tiny_bert, classes=3, seed=0))


def data(rows):
    """Texts of 2 to 9 tokens, the longest first, padded with 0."""
    source = torch.Generator().manual_seed(0)
    lengths = torch.arange(rows, 0, -1) % 8 + 2
    ids = torch.randint(5, 31, (rows, 9), generator=source) * (torch.arange(9) < lengths[:, None])
    return Encoded(ids, lengths, torch.zeros(rows, dtype=torch.long))


def test_the_outputs_of_all_rows_are_those_of_each_row_alone_and_in_its_place(encoder, monkeypatch):
    monkeypatch.setattr(classifier, "_BATCH", 4)
    rows = data(11)
    outputs = classifier.all_rows(encoder, rows, torch.float32, states=True)
    assert (outputs.logits.shape, outputs.states.shape) == ((11, 3), (3, 11, 16))
    with torch.inference_mode():
        for row in range(11):
            alone = encoder(rows.ids[row : row + 1, : int(rows.lengths[row])]).logits
            torch.testing.assert_close(outputs.logits[row], alone[0], atol=1e-5, rtol=1e-5)


def test_the_states_are_the_first_token_after_every_layer(encoder):
    """A model of fewer layers ends where the states of a deeper one say, also where it spares the other tokens."""
    rows, every = data(5), torch.arange(5)
    states = classifier.forward(encoder, rows, every, torch.float32, states=True).states
    assert states.requires_grad
    ids, mask = rows.rows(every)
    for layers in (1, 2, 3):
        part = encoders.first_layers(encoder, layers).base_model
        expected = part(ids, attention_mask=mask).last_hidden_state[:, 0]
        torch.testing.assert_close(states[layers - 1], expected, atol=1e-6, rtol=1e-5)


def test_states_are_left_out_unless_asked_for_and_change_no_logit(encoder):
    rows = data(5)
    plain = classifier.all_rows(encoder, rows, torch.float32)
    assert plain.states is None
    assert torch.equal(plain.logits, classifier.all_rows(encoder, rows, torch.float32, states=True).logits)
    assert classifier.forward(encoder, rows, torch.arange(5), torch.float32).states is None


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="received metric 'bleu', expected accuracy or one of"):
        scores("bleu", RIGHT)


def test_logits_that_are_no_numbers_are_refused_by_row():
    class_logits = torch.zeros(4, 3)
    class_logits[2, 1] = torch.nan
    for metric in ("accuracy", "f1", "matthews"):
        with pytest.raises(ValueError, match=r"1 NaN among the logits, the first in row \[2\], expected none"):
            classifier.score(metric, class_logits, torch.zeros(4, dtype=torch.long))


def test_the_outputs_of_all_rows_are_those_of_evaluation_mode_and_the_mode_stays(encoder):
    expected = classifier.all_rows(encoder, data(11), torch.float32).logits
    dropouts = [module for module in encoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.5
    assert torch.equal(classifier.all_rows(encoder.train(), data(11), torch.float32).logits, expected)
    assert all(module.training for module in encoder.modules())
