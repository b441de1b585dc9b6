"""Image classifiers: what a name gives, what an arm may change and how much that is, and what the head reads."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from limbeck import models
from limbeck.models import efficientnet, vision
from limbeck.training import supervised

SHAPE = "vit-2x64x14"
BLOCK = ("mlp.fc1", "mlp.fc2")


def shape(classes=3, seed=0):
    return vision.load(SHAPE, classes=classes, seed=seed)


@pytest.fixture
def pixels():
    return torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_a_shape_is_drawn_by_its_seed_alone(pixels, global_generators):
    before = global_generators()
    first = shape().state_dict()
    assert global_generators() == before
    torch.rand(7)
    again, other = shape().state_dict(), shape(seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert len(drawn) == 2 + 1 + 2 * 6 + 1, "token and positions, patches, blocks, head"


def test_a_shapes_matrices_keep_the_scale_of_a_signal():
    weights = {name: value for name, value in shape().state_dict().items() if name.endswith("weight")}
    for name, value in weights.items():
        if value.ndim > 1:
            expected = value[0].numel() ** -0.5
            error = 5 * expected / (2 * value.numel()) ** 0.5  # five sigma of a deviation's estimate
            assert value.std().item() == pytest.approx(expected, abs=error), name
        else:
            assert value.eq(1).all(), name


@pytest.mark.parametrize("name", ["vit-2x40x7", "vit-2x32x5", "vit-0x32x7", "vit-2x32x0"])
def test_a_shape_that_cannot_be_built_is_refused(name):
    with pytest.raises(ValueError, match=f"a width divisible by 32 and a patch that divides 28, got {name}"):
        vision.load(name, classes=2, seed=0)


def test_a_saved_vit_keeps_its_body_and_has_a_head_drawn_by_the_seed(tmp_path, global_generators):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    saved = ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=4, num_labels=7))
    saved.save_pretrained(tmp_path)
    before = global_generators()
    loaded, again = (vision.load(str(tmp_path), classes=3, seed=4) for _ in range(2))
    assert global_generators() == before
    assert not loaded.training
    for name, value in saved.vit.state_dict().items():
        assert torch.equal(loaded.vit.state_dict()[name], value), name
    assert loaded.classifier.weight.shape == (3, 16)
    assert torch.equal(loaded.classifier.weight, again.classifier.weight)
    assert loaded.classifier.bias.eq(0).all()
    assert not torch.equal(loaded.classifier.weight, vision.load(str(tmp_path), classes=3, seed=5).classifier.weight)


def test_features_are_what_the_head_turns_into_logits(pixels):
    model = shape()
    seen = vision.prepared(SHAPE, pixels, 28)
    features = vision.features(model, seen)
    expected = model.vit(pixel_values=seen).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected.detach())
    torch.testing.assert_close(model.classifier(features), vision.logits(model, seen))
    assert not model.classifier._forward_pre_hooks


def test_images_are_scaled_as_each_model_was_trained():
    pixels = torch.tensor([0.0, 1.0, 0.25]).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    assert vision.prepared(SHAPE, pixels, 4)[:, 0, 0, 0].tolist() == [-1, 1, -0.5]
    assert vision.prepared(SHAPE, pixels, 4).shape == (3, 1, 4, 4)
    hub = vision.prepared("google/vit", pixels, 8)
    assert hub.shape == (3, 3, 8, 8)
    assert hub.max().item() == 1
    assert vision.prepared(efficientnet.ASSET, pixels, 2)[:, 2, 1, 1].tolist() == [0, 255, 63.75]


@pytest.mark.parametrize(
    ("arm", "count"),
    [("linear", 0), ("lora_1", 2 * 2 * 128), ("lora_4", 4 * 512), ("nola", 512), ("nola_half", 256)],
)
def test_an_arm_trains_the_head_and_its_own_and_starts_as_the_base_model(arm, count, pixels, global_generators):
    base, model = shape(), shape()
    before = global_generators()
    assert vision.attach(model, arm, rank=3, seed=1) == count
    assert global_generators() == before
    trained = models.trainable(model)
    own = [name for name in trained if not name.startswith("classifier.")]
    assert len(trained) == len(own) + 2
    assert sum(trained[name].numel() for name in own) == count
    places = {name.split(".lora_")[0].split(".nola_")[0] for name in own}
    kind = {"l": ("q_proj", "v_proj"), "n": BLOCK}[arm[0]] if count else ()
    assert len(places) == 2 * len(kind)
    assert all(place.endswith(kind) for place in places)
    torch.testing.assert_close(vision.logits(model, pixels), vision.logits(base, pixels))


def test_full_fine_tuning_trains_everything_and_counts_all_but_the_head():
    model = shape()
    count = vision.attach(model, "full", rank=1, seed=0)
    assert len(models.trainable(model)) == len(list(model.parameters()))
    assert count == sum(parameter.numel() for parameter in model.vit.parameters())


def test_lora_has_scale_1_and_starts_kaiming_uniform_by_its_seed(pixels):
    drawn = {}
    for seed in (0, 0, 1):
        model = shape()
        torch.rand(3)
        vision.attach(model, "lora_4", rank=1, seed=seed)
        layer = model.vit.layers[0].attention.q_proj
        drawn.setdefault(seed, []).append(layer.lora_A["default"].weight.detach().clone())
        assert layer.scaling["default"] == 1
        assert layer.lora_B["default"].weight.eq(0).all()
    assert torch.equal(*drawn[0])
    assert not torch.equal(drawn[0][0], drawn[1][0])
    largest = drawn[0][0].abs().max().item()
    assert 0.9 * 64**-0.5 < largest <= 64**-0.5, "sqrt(6 / (1 + 5) / inputs)"


def test_nola_has_scale_1_at_every_rank_and_other_bases_with_another_seed():
    deltas = []
    for seed in (0, 1):
        model = shape()
        vision.attach(model, "nola", rank=4, seed=seed)
        layer = model.vit.layers[0].mlp.fc1
        assert layer.scaling["default"] == 1
        for coefficients in layer.coefficients("default"):
            nn.init.ones_(coefficients)
        deltas.append(layer.get_delta_weight("default"))
    assert torch.linalg.matrix_rank(deltas[0]) == 4
    assert not torch.allclose(*deltas)


def test_of_a_convolutional_network_all_1_x_1_convolutions_are_adapted_at_one_budget():
    model = efficientnet.draw(classes=5, seed=0)
    narrow = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1]
    budget = sum(layer.in_channels + layer.out_channels for layer in narrow)
    assert vision.budget(model) == budget
    images = vision.prepared(efficientnet.ASSET, torch.rand(2, 1, 32, 32), 32)
    expected = vision.logits(model, images).detach()
    for arm in ("lora_1", "nola", "nola_half"):
        model = efficientnet.draw(classes=5, seed=0)
        count = vision.attach(model, arm, rank=4, seed=0)
        allowed = budget // 2 if arm == "nola_half" else budget
        assert allowed - 2 * len(narrow) < count <= allowed
        torch.testing.assert_close(vision.logits(model, images), expected)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="received arm 'vera', expected linear, full"):
        vision.attach(shape(), "vera", rank=1, seed=0)


def test_an_efficientnet_that_goes_on_from_a_state_takes_the_same_steps(monkeypatch, tmp_path):
    """Moments come back in the order of their numbers, so a weight in another order would meet those of others."""
    monkeypatch.setattr(efficientnet, "load", efficientnet.draw)
    source = torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 3, 32, 32, generator=source) * 255, torch.tensor([0, 1, 2, 1])

    def steps(state, number):
        model = vision.load(efficientnet.ASSET, classes=3, seed=0).eval()
        weights = {name: weight.requires_grad_() for name, weight in model.named_parameters()}
        options = {"learning_rate": 0.01, "clip_norm": 1.0, "state": state, "save_every": 2}
        run = supervised.fit(
            weights,
            lambda rows: {"loss/ce": nn.functional.cross_entropy(model(images[rows]), labels[rows])},
            [torch.arange(4)] * 5,
            **options,
        )
        return [next(run)["loss/ce"] for _ in range(number)]

    whole = steps(None, 5)
    assert steps(tmp_path / "state", 3) == whole[:3]
    assert steps(tmp_path / "state", 3) == whole[2:], "saved after two steps"
    assert len(set(whole)) == 5
