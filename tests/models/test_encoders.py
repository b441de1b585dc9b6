import pytest
import torch

from limbeck import models
from limbeck.models import encoders


@pytest.fixture
def encoder(tiny_bert):
    return encoders.load_encoder(tiny_bert, classes=3, seed=0)


def test_loading_draws_the_head_from_the_seed_and_leaves_the_global_state(tiny_bert, global_generators):
    before = global_generators()
    first = encoders.load_encoder(tiny_bert, classes=3, seed=1).classifier.weight
    assert global_generators() == before
    torch.rand(5)
    assert torch.equal(encoders.load_encoder(tiny_bert, classes=3, seed=1).classifier.weight, first)
    assert not torch.equal(encoders.load_encoder(tiny_bert, classes=3, seed=2).classifier.weight, first)


def test_the_head_is_normal_with_the_initializer_range_to_five_sigma(tiny_bert):
    weights = encoders.load_encoder(tiny_bert, classes=2000, seed=0).classifier.weight
    assert weights.std().item() == pytest.approx(0.2, rel=5 / (2 * weights.numel()) ** 0.5)


def test_a_student_computes_what_its_teacher_computes_in_its_first_layers(encoder):
    ids = torch.arange(5, 13).reshape(2, 4)
    student = encoders.first_layers(encoder, 2)
    states = encoder(ids, output_hidden_states=True).hidden_states
    assert torch.equal(student(ids, output_hidden_states=True).hidden_states[-1], states[2])
    assert len(encoder.base_model.encoder.layer) == 3


@pytest.mark.parametrize("layers", [0, 4])
def test_a_student_deeper_than_its_teacher_is_refused(encoder, layers):
    with pytest.raises(ValueError, match=f"between 1 and the model's 3, got {layers}"):
        encoders.first_layers(encoder, layers)


def test_redrawn_layers_are_normal_with_the_initializer_range_biases_0_and_norms_1(encoder, global_generators):
    before = {name: weight.clone() for name, weight in encoder.named_parameters()}
    state = global_generators()
    assert encoders.redraw_layers(encoder, 1) is encoder
    assert global_generators() == state
    drawn = []
    for name, weight in encoder.named_parameters():
        if "embeddings" in name or "classifier" in name:
            assert torch.equal(weight, before[name]), name
        elif weight.ndim == 1:
            assert weight.eq("LayerNorm.weight" in name).all(), name
        else:
            drawn.append(weight.flatten())
    drawn = torch.cat(drawn)
    # 5 sigma: the standard error of a standard deviation is sigma / sqrt(2 n), that of a mean sigma / sqrt(n).
    assert drawn.std().item() == pytest.approx(0.2, rel=5 / (2 * len(drawn)) ** 0.5)
    assert abs(drawn.mean().item()) < 5 * 0.2 / len(drawn) ** 0.5


def test_layers_are_redrawn_from_the_seed_alone(tiny_bert, encoder):
    """Whatever they held before, and whatever head they have."""
    trained = encoders.load_encoder(tiny_bert, classes=2, seed=9)
    with torch.no_grad():
        for weight in trained.base_model.encoder.parameters():
            weight.add_(1)
    one, two = (encoders.redraw_layers(model, 3).base_model.encoder for model in (encoder, trained))
    for (name, weight), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(weight, other), name
    held = one.layer[0].attention.self.query.weight.clone()
    assert not torch.equal(
        encoders.redraw_layers(encoder, 4).base_model.encoder.layer[0].attention.self.query.weight, held
    )


def test_reading_only_the_first_token_changes_neither_values_nor_gradients(encoder):
    ids = torch.arange(5, 17).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    spared = encoders.read_first_token(encoders.first_layers(encoder, 3)).double()
    whole = encoders.first_layers(encoder, 3).double()
    assert type(spared.base_model.encoder.layer[-1]) is not type(whole.base_model.encoder.layer[-1])
    for masks in (mask, torch.ones_like(mask)):
        outputs = [model(ids, attention_mask=masks).logits for model in (spared, whole)]
        torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)
        for model, output in zip((spared, whole), outputs, strict=True):
            model.zero_grad()
            output.square().sum().backward()
        for (name, left), right in zip(spared.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(left.grad, right.grad, atol=1e-12, rtol=0, msg=name)


def test_frozen_embeddings_are_left_out_of_what_is_trained(encoder):
    names = models.trainable(encoders.freeze_embeddings(encoder))
    assert names
    assert not [name for name in names if "embeddings" in name]


def test_bfloat16_is_chosen_on_cuda_alone_and_float32_on_every_cpu(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: True)
    assert (models.precision("auto", cpu), models.precision("auto", cuda)) == (torch.float32, torch.bfloat16)
    assert models.precision("bfloat16", cpu) is torch.bfloat16
    assert models.precision("float32", cuda) is torch.float32


def test_low_precision_rounds_the_products_and_leaves_float32_and_the_parameters_alone(encoder):
    """A product has 8 bits: against float32, off by more than 2 ** -20 and less than 2 ** -5 of the largest logit."""
    ids, cpu = torch.arange(5, 17).reshape(3, 4), torch.device("cpu")
    whole = encoder(ids).logits
    with models.autocast(cpu, torch.float32):
        assert torch.equal(encoder(ids).logits, whole)
    with models.autocast(cpu, torch.bfloat16):
        low = encoder(ids).logits
    assert low.dtype is torch.bfloat16
    low.float().sum().backward()
    assert {p.grad.dtype for p in models.trainable(encoder).values() if p.grad is not None} == {torch.float32}
    assert 2**-20 < ((low.float() - whole).abs().max() / whole.abs().max()).item() < 2**-5
    assert torch.backends.cuda.flash_sdp_enabled(), "the choice of attention outlives the block"


def test_a_device_can_be_named_or_found():
    assert models.device("cpu") == torch.device("cpu")
    assert models.device("auto").type in ("cpu", "cuda")
    for unknown in ("cudaa", "gpu", "", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])):
        with pytest.raises(ValueError, match=f"received device '{unknown}'.*expected auto"):
            models.device(unknown)
