"""The sampler on vLLM, held to a stand-in with vLLM's interface that samples with the built-in one."""

import gc
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from limbeck import sampling, vllm_sampling
from limbeck.sampling import Sampler
from limbeck.vllm_sampling import VllmSampled

END, VOCABULARY = 3, 11
PROMPTS = ((5, 6, 7), (4,), (8, 9, 5, 6))
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZE |= {"num_key_value_heads": 1, "max_position_embeddings": 40, "initializer_range": 0.4, "tie_word_embeddings": True}


def drawn(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, eos_token_id=END, **SIZE)).eval()


class Worker:
    """The model inside the engine: it takes weights by name, as vLLM's do, a tied head once."""

    def __init__(self):
        self.model = drawn(99)

    def load_weights(self, weights):
        mine = dict(self.model.named_parameters())
        given = dict(weights)
        assert given.keys() == mine.keys()
        with torch.no_grad():
            for name, weight in given.items():
                assert not weight.requires_grad
                mine[name].copy_(weight)


@pytest.fixture
def engines(monkeypatch):
    """Every engine that was built while vllm stood in: its options, and what it was asked."""
    built = []

    class LLM:
        def __init__(self, **options):
            self.options, self.asked, self.cached = options, [], False
            runner = SimpleNamespace(model_runner=SimpleNamespace(model=Worker()))
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
            built.append(self)

        def reset_prefix_cache(self):
            self.cached = False

        def generate(self, prompts, params, *, use_tqdm):
            assert not self.cached, "keys and values of older weights would be used"
            assert not use_tqdm
            self.cached = True
            self.asked.append(params)
            return [self._answer(tuple(p["prompt_token_ids"]), x) for p, x in zip(prompts, params, strict=True)]

        def _answer(self, prompt, x):
            assert x.ignore_eos
            assert x.logprobs == 0
            (end,) = x.stop_token_ids
            model = self.llm_engine.model_executor.driver_worker.model_runner.model.model
            sampler = sampling.Sampled(model, end, x.temperature)
            sampled = sampler([prompt], [0], group_size=x.n, longest=x.max_tokens, seed=x.seed)
            outputs = []
            for row, logprobs, ended in zip(
                sampled.rows(), sampled.logprobs.tolist(), sampled.ended.tolist(), strict=True
            ):
                each = [{token: SimpleNamespace(logprob=value)} for token, value in zip(row, logprobs, strict=False)]
                reason = "stop" if ended else "length"
                outputs.append(SimpleNamespace(token_ids=list(row), logprobs=each, finish_reason=reason))
            return SimpleNamespace(outputs=outputs)

    vllm = ModuleType("vllm")
    vllm.__spec__ = SimpleNamespace(name="vllm")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return built


def draw(sampler, seed=0, names=(0, 1, 2)):
    return sampler(PROMPTS, names, group_size=4, longest=7, seed=seed)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_it_says_of_its_samples_is_what_the_model_says(engines, temperature):
    model = drawn(0)
    sampler = VllmSampled(model, END, temperature)
    assert isinstance(sampler, Sampler)
    sampled = draw(sampler)
    rows, prompts = sampled.rows(), [prompt for prompt in PROMPTS for _ in range(4)]
    assert len(rows) == 12
    assert sampled.ended.tolist() == [row[-1] == END for row in rows]
    assert 0 < sampled.ended.sum() < 12
    assert all(END not in row[:-1] for row in rows)
    with torch.no_grad():
        logits, kept = sampling.completion_logits(model, prompts, rows, temperature=temperature)
        expected = sampling.completion_logprobs(logits, kept, rows)
    assert torch.equal(sampled.mask, kept)
    torch.testing.assert_close(sampled.logprobs, expected, atol=1e-5, rtol=0)
    assert [params.temperature for params in engines[0].asked[0]] == [temperature] * 3


def test_the_engine_follows_the_model_and_is_built_once(engines):
    model = drawn(0)
    first = draw(VllmSampled(model, END))
    with torch.no_grad():
        for weight, other in zip(model.parameters(), drawn(1).parameters(), strict=True):
            weight.copy_(other)
    second = draw(VllmSampled(model, END))
    assert len(engines) == 1
    assert second.rows() != first.rows()
    assert second.rows() == draw(VllmSampled(drawn(1), END)).rows()
    assert len(engines) == 2
    options = engines[0].options
    assert (options["load_format"], options["logprobs_mode"]) == ("dummy", "processed_logprobs")
    assert options["hf_overrides"] == {"vocab_size": VOCABULARY}


def test_an_engine_goes_with_its_model(engines):
    before = len(vllm_sampling._engines)
    draw(VllmSampled(drawn(0), END))
    gc.collect()
    assert len(vllm_sampling._engines) == before
    assert len(engines) == 1


def test_seed_and_name_decide_the_samples(engines):
    sampler = VllmSampled(drawn(0), END)
    rows = draw(sampler).rows()
    assert rows == draw(sampler).rows()
    assert rows != draw(sampler, seed=1).rows()
    assert rows[:4] == draw(sampler, names=(0, 8, 9)).rows()[:4]
    assert rows[4:] != draw(sampler, names=(0, 8, 9)).rows()[4:]


def test_what_cannot_be_sampled_is_refused(engines, monkeypatch):
    with pytest.raises(ValueError, match=r"received temperature 0\.0, expected"):
        VllmSampled(drawn(0), END, 0.0)
    with pytest.raises(ValueError, match="expected at most the 40 together"):
        VllmSampled(drawn(0), END)([tuple(range(5)) * 8], ["x"], group_size=2, longest=3, seed=0)
    assert not engines
    monkeypatch.delitem(sys.modules, "vllm")
    with pytest.raises(ValueError, match="received sampler vllm, expected it to be installed"):
        VllmSampled(drawn(0), END)


def test_several_ends_and_an_empty_completion_are_taken(engines):
    outputs = [SimpleNamespace(token_ids=[], logprobs=[], finish_reason="length")]
    row = [{5: SimpleNamespace(logprob=-1.0)}, {4: SimpleNamespace(logprob=-2.0)}]
    outputs.append(SimpleNamespace(token_ids=[5, 4], logprobs=row, finish_reason="stop"))
    sampled = vllm_sampling._completions(outputs, torch.device("cpu"))
    assert sampled.rows() == [(), (5, 4)]
    assert (sampled.tokens.dtype, sampled.logprobs.dtype) == (torch.long, torch.float32)
    assert sampled.logprobs.tolist() == [[0.0, 0.0], [-1.0, -2.0]]
    draw(VllmSampled(drawn(0), [END]))
    assert engines[0].asked[0][0].stop_token_ids == [END]
    with pytest.raises(ValueError, match="received a PeftModel, whose weights the engine has no names for"):
        VllmSampled(get_peft_model(drawn(0), LoraConfig(target_modules=["q_proj"])), END)
