"""Students and teachers of the encoder experiments before and while they are trained."""

import dataclasses
import functools

import pytest
import torch
from safetensors.torch import load_file

import cells
from limbeck import models
from limbeck.experiments.sinkd import arms, distillation, permutation
from limbeck.experiments.sinkd.distillation import SPLITS
from limbeck.losses import sinkd
from limbeck.models import encoders

TEACHER_LAYERS, WIDTH = 3, 16
ROWS = torch.tensor([9, 2, 17, 5, 30, 11, 4])


@pytest.fixture(scope="module")
def section(tiny_bert, tiny_texts):
    return cells.section("fig_permutation", tiny_bert, task=tiny_texts, student="first-2")


@pytest.fixture(scope="module")
def run(section, tmp_path_factory):
    """An untrained student; nothing here changes it."""
    where = cells.place(tmp_path_factory.mktemp("run"), "run")
    return distillation.start(section.setup, section.task, where, seed=0, student="first-2")


@pytest.fixture(scope="module")
def outputs(run):
    """What a teacher might have left."""
    source = torch.Generator().manual_seed(0)
    rows = len(run.data["train"])
    found = {split: torch.randn(len(run.data[split]), 3, generator=source) for split in SPLITS}
    found["assistant"] = torch.randn(rows, 3, generator=source)
    return found | {"states": torch.randn(TEACHER_LAYERS, rows, WIDTH, generator=source)}


def gradient(run, arm, weights, outputs, rows):
    """The gradient of an arm's whole loss, as one vector."""
    loss = distillation.distillation_loss(run, arm, weights, outputs)(rows)
    parts = torch.autograd.grad(sum(loss.values()), list(run.parameters.values()), materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def test_a_random_student_is_drawn_from_its_seed_over_the_pretrained_embeddings(section, global_generators):
    before = global_generators()
    start = functools.partial(distillation.pretrained, section.setup.model, 3)
    first, again, other = (start(seed, "random-2") for seed in (1, 1, 2))
    assert global_generators() == before
    whole = encoders.load_encoder(section.setup.model, classes=3, seed=1)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name
        if "embeddings" in name:
            assert torch.equal(weight, whole.get_parameter(name)) and torch.equal(weight, other.get_parameter(name))
        elif weight.ndim > 1:
            assert not torch.equal(weight, other.get_parameter(name)), name
    assert first.config.num_hidden_layers == 2


def test_a_first_student_starts_as_its_teacher_and_only_what_the_checkpoint_lacks_depends_on_the_seed(section):
    teacher = distillation.pretrained(section.setup.model, 3, 0)
    start = functools.partial(distillation.pretrained, section.setup.model, 3)
    first, other = (start(seed, "first-2") for seed in (0, 1))
    for name, weight in first.named_parameters():
        assert torch.equal(weight, teacher.get_parameter(name)), name
        drawn = "layer." not in name and "embeddings" not in name and weight.ndim > 1
        assert torch.equal(weight, other.get_parameter(name)) == (not drawn), name
    assert not [name for name in models.trainable(first) if "embeddings" in name]


@pytest.mark.parametrize("student", ["last-2", "first", "first-two", "random--1", "2"])
def test_another_spelling_of_a_student_is_refused(student):
    with pytest.raises(ValueError, match=f"first-N or random-N, N layers, got '{student}'"):
        distillation.layers_of(student)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_sizes": (1, 2)}, r"one number each for train, validation, test, got \(1, 2\)"),
        ({"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
        ({"rkd_angle": -1.0}, "rkd_angle must be above 0, got -1.0"),
        ({"group": 0}, "group must be above 0, got 0"),
        ({"student": "whole"}, "first-N or random-N.* got 'whole'"),
        ({"arms": ("kl", "ce+kl")}, r"arm must be one of .*sinkhorn.* got 'ce\+kl'"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)


def test_a_run_of_fewer_texts_sees_the_first_rows_each_once_an_epoch(section, tmp_path):
    section = cells.changed(section, epochs=2)
    place = cells.place(tmp_path, "run")
    few = distillation.start(section.setup, section.task, place, seed=0, student="first-2", texts=20)
    assert sorted(torch.cat(few.batches).tolist()) == sorted(2 * list(range(20)))
    whole = distillation.start(section.setup, section.task, place, seed=0)
    assert sorted(torch.cat(whole.batches).tolist()) == sorted(10 * list(range(48))), (
        "a teacher has its own number of epochs"
    )


@pytest.mark.parametrize("name", arms.NAMES)
def test_every_term_at_a_weight_changes_the_gradient_and_an_absent_one_does_not_appear(run, outputs, name):
    plain, alone = (gradient(run, arm, w, outputs, ROWS) for arm, w in (("ce", []), (name, [1.0])))
    assert alone.norm() > 0
    joined = gradient(run, f"ce+{name}", [0.5], outputs, ROWS)
    torch.testing.assert_close(joined, plain + 0.5 * alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient(run, f"ce+{name}", [0.0], outputs, ROWS), plain)
    assert set(distillation.distillation_loss(run, "ce", [], outputs)(ROWS)) == {"loss/ce"}
    assert set(distillation.distillation_loss(run, name, [1.0], outputs)(ROWS)) == {f"loss/{name}"}
    assert set(distillation.distillation_loss(run, f"ce+{name}", [1.0], outputs)(ROWS)) == {"loss/ce", f"loss/{name}"}


def test_a_term_named_twice_counts_with_the_sum_of_its_weights(run, outputs):
    twice = distillation.distillation_loss(run, "ce+kl+kl", [0.5, 0.25], outputs)(ROWS)
    once = distillation.distillation_loss(run, "ce+kl", [0.75], outputs)(ROWS)
    assert list(twice) == list(once) == ["loss/ce", "loss/kl"]
    torch.testing.assert_close(twice, once)


def test_the_papers_arm_is_the_librarys_loss(run, outputs):
    """`sinkd_loss` is what a user calls; the comparison adds up the same terms, so that each has a curve of its own."""
    weights, options = [0.7, 0.03], run.terms
    ours = sum(distillation.distillation_loss(run, "ce+kl+sinkhorn", weights, outputs)(ROWS).values())
    theirs = sinkd.sinkd_loss(
        run.outputs(ROWS).logits,
        outputs["train"][ROWS],
        run.data["train"].labels[ROWS],
        ce_coef=1.0,
        kl_coef=weights[0],
        sinkhorn_coef=weights[1],
        kl_temperature=options.kl_temperature,
        sinkhorn_temperature=options.temperature,
        epsilon=options.epsilon,
        iterations=options.iterations,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", arms.NAMES)
def test_the_matched_weight_makes_both_gradients_equally_long(run, outputs, name):
    weight = distillation.gradient_matched_weight(run, name, outputs)
    rows = run.batches[0]
    norms = [gradient(run, arm, w, outputs, rows).norm().item() for arm, w in (("ce", []), (name, [weight]))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_term_that_has_no_gradient_has_no_matched_weight(run):
    weight = next(iter(run.parameters.values()))
    with pytest.raises(ValueError, match="expected a term with a gradient, got one whose gradient is 0 on every batch"):
        run.gradient_matched_weight(lambda _: {"loss/ce": weight.sum(), "loss/none": 0 * weight.sum()})


def test_the_matched_weight_is_the_ratio_of_the_mean_norms_over_the_first_batches(run, outputs, section):
    run = dataclasses.replace(run, loop=dataclasses.replace(section.setup.loop, matching_batches=2))
    norms = [
        [gradient(run, arm, w, outputs, rows).norm().item() for rows in run.batches[:2]]
        for arm, w in (("ce", []), ("js", [1.0]))
    ]
    assert distillation.gradient_matched_weight(run, "js", outputs) == pytest.approx(
        sum(norms[0]) / sum(norms[1]), rel=1e-4
    )


@pytest.mark.parametrize("name", arms.NAMES)
def test_a_term_reads_the_teachers_states_its_logits_or_takd_the_assistants(run, outputs, name):
    def value(changed):
        return distillation.distillation_loss(run, name, [1.0], outputs | changed)(ROWS)[f"loss/{name}"].item()

    before, unread = value({}), ("rkd", "pkd", "takd")
    assert (value({"train": outputs["train"].flip(0)}) == before) == (name in unread)
    assert (value({"assistant": outputs["train"].flip(0)}) == before) == (name != "takd")
    assert (value({"states": outputs["states"].flip(1)}) != before) == (name in ("rkd", "pkd"))
    elsewhere = {key: tensor.clone() for key, tensor in outputs.items()}
    others = [row for row in range(48) if row not in ROWS]
    elsewhere["train"][others], elsewhere["states"][:, others] = torch.nan, torch.nan
    elsewhere["assistant"][others] = torch.nan
    assert value(elsewhere) == before, "a term reads rows of another batch"


def test_a_teacher_leaves_its_logits_of_every_split_and_its_states_of_the_training_split(section, tmp_path):
    place = cells.place(tmp_path, "run")
    teacher, *_ = permutation.cells(section, (0,))
    result = cells.drive(permutation, section, teacher, place)
    (file,) = teacher.checkpoint_files
    found = load_file(tmp_path / file)
    data, _ = distillation.splits(section.setup.model, section.task, section.setup.texts)
    for split in SPLITS:
        right = found[split].argmax(-1) == data[split].labels
        assert result.metrics[f"{split}/score"] == right.double().mean()
    assert found["states"].shape == (TEACHER_LAYERS, 48, WIDTH)
    assert result.trainable_parameters == sum(
        p.numel() for p in models.trainable(distillation.pretrained(section.setup.model, 3, 0)).values()
    )
    # The last of the states, through the pooler and head of the same run done again, give the logits.
    run = distillation.start(section.setup, section.task, place, seed=section.setup.loop.teacher_seed)
    list(
        run.fit(
            lambda rows: {"ce": arms.cross_entropy(run.outputs(rows).logits, run.data["train"].labels[rows])},
            section.setup.loop.teacher_learning_rate,
        )
    )
    with torch.inference_mode():
        base = run.model.base_model
        again = run.model.classifier(base.pooler(found["states"][-1][:, None]))
    torch.testing.assert_close(again, found["train"], atol=1e-5, rtol=1e-5)


def test_scores_and_agreement_are_shares_of_a_split(run, outputs):
    with torch.inference_mode():
        ids, mask = run.data["test"].rows(torch.arange(24))
        said = run.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    expected = {
        "test/score": (said == run.data["test"].labels).double().mean().item(),
        "test/agreement": (said == outputs["test"].argmax(-1)).double().mean().item(),
    }
    assert run.scores("test", outputs) == pytest.approx(expected)
