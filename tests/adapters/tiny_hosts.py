"""Host models a few numbers wide, each with inputs, and where its adapters go."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from limbeck.adapters import NolaConfig
from limbeck.adapters.layer import NolaLayer


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(5, 6, 1)
        self.dilated = nn.Conv2d(6, 4, (3, 2), padding=1, dilation=2, padding_mode="reflect", bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.dilated(torch.relu(self.narrow(torch.relu(self.wide(x))))).mean((2, 3)))


def _gpt2():
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=20, n_positions=16, **tokens))


def _llama():
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_attention_heads=2, num_key_value_heads=1, **sizes))


def _t5():
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, pad_token_id=0, **sizes))


def _vit():
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


TARGETS = {
    "mlp": {"target_modules": ["first", "second"], "modules_to_save": ["head"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fused_slices": {"c_attn": ("q", "v")}},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "t5": {"target_modules": ["q", "v", "wo"]},
    "vit": {"target_modules": ["fc1", "fc2"], "modules_to_save": ["classifier"]},
    "conv": {"target_modules": ["wide", "narrow", "dilated"], "modules_to_save": ["head"]},
}
HOSTS = {"mlp": Mlp, "gpt2": _gpt2, "llama": _llama, "t5": _t5, "vit": _vit, "conv": Conv}


def host(name, dtype=torch.float32):
    """The model, always with the same weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HOSTS[name]()
        if name == "mlp":
            return model.to(dtype).eval()
        for parameter in model.parameters():  # larger than the usual start, so that an adapter shows
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def config(name, **options):
    """An adapter for the host, where `options` do not say otherwise with rank 3 and 7 and 5 bases."""
    return NolaConfig(**{"r": 3, "num_basis": (7, 5), "nola_alpha": 6} | TARGETS[name] | options)


def outputs(name, model, dtype=torch.float32):
    """What the model makes of one fixed batch, in float64."""
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 20, (2, 6), generator=source)
    images = torch.randn(2, 3, 8, 8, generator=source).to(dtype)
    if name == "mlp":
        return model(torch.randn(4, 6, generator=source).to(dtype)).double()
    if name == "conv":
        return model(images).double()
    if name == "vit":
        return model(pixel_values=images).logits.double()
    extra = {"decoder_input_ids": tokens.flip(1)} if name == "t5" else {}
    return model(input_ids=tokens, **extra).logits.double()


def perturb(model, seed=0, spread=0.5):
    """Give every number that trains a value of its own; returns the model."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape, generator=source).to(parameter.dtype))
    return model


def adapted(name, dtype=torch.float32, **options):
    """The host with an adapter named default."""
    return get_peft_model(host(name, dtype), config(name, **options))


def nola_layers(model):
    """Full name in the host -> layer."""
    layers = ((key, module) for key, module in model.named_modules() if isinstance(module, NolaLayer))
    return {key.removeprefix("base_model.model."): layer for key, layer in layers}
