"""Sampling and scoring of tiny models of many architectures, held to one uncached forward of each row alone.

Among them: caches that are not attention's (Mamba, Jamba, Lfm2, RecurrentGemma), and logits that change after the head
(Gemma 2, Cohere, Granite, Falcon-H1).
"""

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from limbeck import models, sampling

PROMPTS = ((5, 6, 7, 8, 9, 11), (4,), (8, 9, 5, 6, 7, 10, 12, 13))
ENDS = (2, 3, 7, 9, 17, 21)
GROUPED = {"num_key_value_heads": 2}
MAMBA = {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 1}
FALCON_H1 = {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_d_conv": 4, "mamba_chunk_size": 8}
JAMBA = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8}
ARCHITECTURES = {  # its own sizes; whether the cache serves, whether the head is last
    "Llama": (GROUPED, True, True),
    "Mistral": (GROUPED | {"sliding_window": 4}, True, True),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, True, True),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, True, True),
    "Bloom": ({"n_head": 4, "n_layer": 2}, True, True),
    "Mixtral": (GROUPED | {"num_local_experts": 4}, True, True),
    "Gemma2": (GROUPED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}, True, False),
    "Cohere": (GROUPED | {"logit_scale": 0.25}, True, False),
    "Granite": (GROUPED | {"logits_scaling": 3.0}, True, False),
    "FalconH1": (GROUPED | MAMBA | FALCON_H1, False, False),
    "RecurrentGemma": (GROUPED | {"lru_width": 32, "attention_window_size": 8, "head_dim": 8}, False, False),
    "Mamba": ({"state_size": 4}, False, True),
    "Jamba": (GROUPED | JAMBA | {"mamba_d_state": 4, "mamba_dt_rank": 4}, False, True),
    "Lfm2": (GROUPED | LFM2, False, True),
}


def drawn(name, **more):
    """An untrained model, sharp enough to prefer something; in training mode, with dropout where it has one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **tokens, **ARCHITECTURES[name][0], **more)
    model_class = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        for weight in model.parameters():
            if weight.ndim > 1 and weight.std() < 0.1:
                weight.mul_(0.4 / weight.std().clamp_min(1e-6))
    return model.train()


@torch.no_grad()
def held_to_single_rows(model, *, longest=9):
    """Sample and score in batches; compare with the model's own words on each row alone."""
    sampled = sampling.Sampled(model, ENDS)(PROMPTS, range(3), group_size=3, longest=longest, seed=0)
    prompts, rows = [prompt for prompt in PROMPTS for _ in range(3)], sampled.rows()
    assert all(module.training for module in model.modules())
    model.eval()
    logits, mask = sampling.completion_logits(model, prompts, rows, temperature=1.0)
    scored = sampling.completion_logprobs(logits, mask, rows)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        said = model(torch.tensor([[*prompt, *row]]), use_cache=False).logits[0, -len(prompt + row) :].float()
        expected = said.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(row)[:, None])[:, 0]
        for received in (sampled.logprobs, scored):
            torch.testing.assert_close(received[index, : len(row)], expected, atol=3e-5, rtol=0)
        assert not set(row[:-1]) & set(ENDS)
        assert sampled.ended[index] == (row[-1] in ENDS)
    assert len(set(map(len, rows))) > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampling_and_scoring_are_one_uncached_forward_whatever_the_mode(name):
    model = drawn(name)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    held_to_single_rows(model)
    assert models._agreed[model] == dict(zip(("cache", "head"), ARCHITECTURES[name][1:], strict=True))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_an_adapter_before_the_prompt_is_part_of_the_model_too(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(drawn("Llama"), config)
    held_to_single_rows(model.train())


def test_a_model_of_few_positions_is_sampled():
    held_to_single_rows(drawn("Llama", max_position_embeddings=12), longest=4)
