"""Arms on tiny decoders: what is trained, how much, and that nothing else moves."""

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from limbeck import models
from limbeck.adapters import to_lora
from limbeck.experiments.nola import arms, comparison
from limbeck.models import language

SETTINGS = arms.AdapterSettings(lora_scale=8.0, nola_rank=3, nola_scale=1.0)
IDS = torch.tensor([[3, 4, 5, 3, 1]])


def llama(layers=3):
    tokenizer = language.load_tokenizer("llama-3x32", ["a b c d e f g"] * 2)
    return language.load(f"llama-{layers}x32", tokenizer, seed=0)


def gpt2():
    config = GPT2Config(vocab_size=12, n_embd=16, n_layer=3, n_head=2, n_positions=16, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        for layer in model.transformer.h:
            layer.attn.c_attn.bias.data.normal_()
    return model


HOSTS = {"llama": (llama, 32), "gpt2": (gpt2, 16)}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("layers", [2, 0])
def test_every_arm_starts_as_the_base_with_its_own_parameters_in_its_own_layers(host, layers, global_generators):
    make, width = HOSTS[host]
    number = layers or 3
    matrices = 2 * number
    expected = {
        "none": 0,
        "lora_4": 4 * matrices * 2 * width,
        "lora_1": matrices * 2 * width,
        "vera": matrices * (width + 4),
        "nola": matrices * 2 * width,
        "nola_half": matrices * width,
        "nola_fifth": matrices * 2 * (width // 5),
    }
    for arm, count in expected.items():
        base, before = make(), global_generators()
        logits = base(IDS).logits
        model = arms.attach(arm, base, SETTINGS, layers=layers, vera_rank=4, seed=0)
        assert global_generators() == before, arm
        assert arms.trainable_count(model) == count, arm
        torch.testing.assert_close(model(IDS).logits, logits, atol=2e-6, rtol=1e-5)
        found = {int(name.split(".h." if host == "gpt2" else ".layers.")[1][0]) for name in models.trainable(model)}
        assert found == (set(range(3 - number, 3)) if count else set())
        assert all(".q_proj." in name or ".v_proj." in name for name in models.trainable(model))


def test_full_trains_the_top_layers_with_the_last_norm_or_everything():
    some = models.trainable(arms.attach("full", llama(), SETTINGS, layers=1, vera_rank=4, seed=0))
    assert {name.removeprefix("model.")[:8] for name in some} == {"layers.2", "norm.wei"}
    whole = arms.attach("full", llama(), SETTINGS, layers=0, vera_rank=4, seed=0)
    assert arms.trainable_count(whole) == sum(parameter.numel() for parameter in whole.parameters())


def test_a_gpt2_taken_apart_computes_the_same_and_its_keys_are_never_adapted():
    whole, apart = gpt2().double(), arms.unfuse(gpt2().double())
    torch.testing.assert_close(apart(IDS).logits, whole(IDS).logits, atol=1e-12, rtol=1e-12)
    assert arms.shapes(apart, [0, 2]) == [(16, 16)] * 4
    model = arms.attach("nola", gpt2(), SETTINGS, layers=0, vera_rank=4, seed=0)
    for parameter in models.trainable(model).values():
        parameter.data.fill_(0.5)
    inner, outer = model.get_base_model().transformer.h[0].attn.c_attn, gpt2().transformer.h[0].attn.c_attn
    x = torch.linspace(-1, 1, 32).view(2, 16)
    moved = (inner(x) - outer(x)).abs().amax(0).split(16)
    assert moved[1].max() < 1e-6, "float32"
    assert min(moved[0].max(), moved[2].max()) > 0.01


def test_nola_has_as_many_bases_as_the_budget_allows():
    model = language.load("llama-3x32", language.load_tokenizer("llama-3x32", ["a b"] * 2), seed=0)
    assert [arms.bases_for(model, [1, 2], share) for share in (1.0, 0.5, 0.2, 1e-9)] == [32, 16, 6, 1]
    model.model.layers[2].self_attn.v_proj = torch.nn.Linear(32, 8)  # grouped values: 64 + 64 + 64 + 40 over 8
    assert arms.bases_for(model, [1, 2], 1.0) == 29


def test_lora_starts_by_kaimings_rule_from_its_seed_at_the_given_scale():
    first, again, other = (arms.attach_lora(llama(), [2], rank=64, scale=8.0, seed=seed) for seed in (1, 1, 2))
    left, right, odd = (models.trainable(model) for model in (first, again, other))
    for name, parameter in left.items():
        assert torch.equal(parameter, right[name])
        if ".lora_B." in name:
            assert not parameter.any()
        else:
            bound = 32**-0.5
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), "2,048 draws, 3 sigma"
            assert not torch.equal(parameter, odd[name])
    layer = first.get_base_model().model.layers[2].self_attn.q_proj
    assert layer.scaling["default"] == 8.0


def test_nola_takes_its_scale_and_its_kind_of_bases():
    model = arms.attach_nola(
        llama(), [0, 1], rank=4, number=(3, 5), scale=0.5, seed=7, share_basis=False, distribution="normal"
    )
    config = model.peft_config["default"]
    assert (config.r, config.numbers, config.basis_seed, config.basis_distribution) == (4, (3, 5), 7, "normal")
    assert not config.share_basis
    assert to_lora(model)[1].lora_alpha / to_lora(model)[1].r == 0.5
    assert arms.trainable_count(model) == 4 * 8


def test_bytes_on_disk_are_those_of_the_files_wherever_the_base_lies(tmp_path):
    base = llama()
    base.name_or_path = str(tmp_path / ("long" * 20))
    model, plain = (arms.attach("nola", host, SETTINGS, layers=2, vera_rank=4, seed=0) for host in (base, llama()))
    assert isinstance(model, PeftModel)
    plain.save_pretrained(tmp_path / "saved")
    files = [tmp_path / "saved" / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    assert comparison.bytes_on_disk(model) == sum(file.stat().st_size for file in files)
    assert comparison.bytes_on_disk(arms.attach("none", llama(), SETTINGS, layers=2, vera_rank=4, seed=0)) == 0
    full = arms.attach("full", llama(), SETTINGS, layers=2, vera_rank=4, seed=0)
    assert 4 * arms.trainable_count(full) < comparison.bytes_on_disk(full) < 4 * arms.trainable_count(full) + 4096


@pytest.mark.parametrize(
    ("arm", "layers", "message"),
    [
        ("nola_third", 2, "received arm 'nola_third', expected one of none, full, lora_4"),
        ("nola", 4, "received layers 4, expected 0, for all, to the model's 3"),
        ("nola", -1, "received layers -1, expected 0"),
    ],
)
def test_an_arm_or_a_depth_that_does_not_exist_is_refused(arm, layers, message):
    with pytest.raises(ValueError, match=message):
        arms.attach(arm, llama(), SETTINGS, layers=layers, vera_rank=4, seed=0)
