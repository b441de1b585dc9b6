"""EfficientNet-Lite0 against a float64 twin, and with its real weights on two photographs."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from sklearn.datasets import load_sample_image

from limbeck import assets, paths
from limbeck.adapters import NolaConfig
from limbeck.models import efficientnet

STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]  # of the sixteen blocks
SKIPS = {2, 4, 6, 7, 9, 10, 12, 13, 14}
fetched = pytest.mark.skipif(
    not (paths.DATA / "raw" / efficientnet.ASSET).is_dir(),
    reason=f"needs `python -m limbeck.assets {efficientnet.ASSET}`",
)


@pytest.fixture(scope="module")
def model():
    """In float64, with batch-norm statistics and affine parts that are not the trivial ones."""
    made = efficientnet.draw(classes=4, seed=0).double()
    source = torch.Generator().manual_seed(1)
    for name, tensor in made.state_dict().items():
        if "_bn" in name and tensor.is_floating_point():
            tensor.add_(0.2 * torch.rand(tensor.shape, generator=source, dtype=torch.float64))
    return made


def images(*size):
    return 255 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "sides"),  # sides: left, right, top, bottom
    [
        ((8, 8), 3, 2, (0, 1, 0, 1)),
        ((7, 8), 3, 2, (0, 1, 1, 1)),
        ((8, 7), 5, 2, (2, 2, 1, 2)),
        ((8, 9), 5, 1, (2, 2, 2, 2)),
        ((5, 6), 1, 1, (0, 0, 0, 0)),
        ((2, 1), 1, 2, (0, 0, 0, 0)),
    ],
)
def test_padding_is_that_of_tensorflow(size, kernel, stride, sides):
    module = efficientnet._conv(3, 4, kernel, stride).double()
    padded = module(images(*size))
    assert padded.shape[2:] == tuple(-(-n // stride) for n in size)
    expected = F.conv2d(F.pad(images(*size), sides), module.weight, stride=stride)
    torch.testing.assert_close(padded, expected, atol=0, rtol=0)


def twin(state, x):
    """The features, from the checkpoint's names alone."""

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        total = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in x.shape[2:]]
        sides = (total[1] // 2, -(-total[1] // 2), total[0] // 2, -(-total[0] // 2))
        return F.conv2d(F.pad(x, sides), weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def norm(x, name):
        mean, var, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = norm(conv((x - 127) / 128, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for index, stride in enumerate(STRIDES):
        block, inner = f"_blocks.{index}", x
        if index:
            inner = norm(conv(x, f"{block}._expand_conv"), f"{block}._bn0").clamp(0, 6)
        inner = norm(conv(inner, f"{block}._depthwise_conv", stride), f"{block}._bn1").clamp(0, 6)
        inner = norm(conv(inner, f"{block}._project_conv"), f"{block}._bn2")
        x = x + inner if index in SKIPS else inner
    return norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))


def test_features_and_logits_equal_a_twin_in_float64(model):
    state, x = model.state_dict(), images(40, 33)
    features = twin(state, x)
    assert features.std() > 0.1
    torch.testing.assert_close(model.features(x), features, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model(x), features @ state["_fc.weight"].T + state["_fc.bias"], atol=1e-10, rtol=1e-10)


def test_it_never_leaves_evaluation_mode(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.nn.Sequential(model).train()
    model(images(32, 32))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_seed_draws_the_weights_and_no_global_generator_is_touched(global_generators):
    before = global_generators()
    one, same, other = (efficientnet.draw(classes=3, seed=seed).state_dict() for seed in (0, 0, 1))
    assert global_generators() == before
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["_fc.weight"], other["_fc.weight"])
    assert one["_fc.weight"].std() == pytest.approx(1280**-0.5, rel=0.05)


def test_adapters_stand_beside_its_convolutions_and_pad_as_they_do(model):
    config = NolaConfig(r=2, num_basis=5, target_modules=r".*(_conv_stem|_expand_conv|_project_conv|_conv_head)")
    adapted = get_peft_model(efficientnet.draw(classes=4, seed=0).double(), config)
    before = adapted(images(33, 32))
    coefficients = [tensor for name, tensor in adapted.named_parameters() if "nola_" in name]
    assert len(coefficients) == 2 * (1 + 15 + 16 + 1)
    source = torch.Generator().manual_seed(0)
    for tensor in coefficients:
        tensor.data.normal_(0, 0.1, generator=source)  # more, and 33 layers deep round-off is all there is
    separate = adapted(images(33, 32))
    merged = adapted.merge_and_unload()
    assert isinstance(merged._conv_stem, efficientnet.SameConv2d)
    torch.testing.assert_close(merged(images(33, 32)), separate, atol=1e-9, rtol=1e-9)
    assert (separate - before).abs().max() > 0.1


@fetched
def test_the_real_weights_know_a_palace_and_a_daisy_and_a_fresh_head_leaves_the_features():
    model, fresh = (efficientnet.load(classes=classes, seed=0) for classes in (None, 5))
    for name, label in {"china.jpg": 698, "flower.jpg": 985}.items():
        photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None].float()
        photo = F.interpolate(photo, scale_factor=256 / 427, mode="bilinear", antialias=True)
        top, left = ((side - 224) // 2 for side in photo.shape[2:])
        crop = photo[..., top : top + 224, left : left + 224]
        with torch.no_grad():
            assert model(crop).argmax().item() == label
            assert torch.equal(model.features(crop), fresh.features(crop))
            assert fresh(crop).shape == (1, 5)


def test_without_the_asset_loading_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setattr(assets.paths, "DATA", tmp_path)
    (tmp_path / "assets.yaml").write_text((paths.ROOT / "data" / "assets.yaml").read_text())
    with pytest.raises(ValueError, match=f"run `python -m limbeck.assets {efficientnet.ASSET}`"):
        efficientnet.load(classes=2, seed=0)
