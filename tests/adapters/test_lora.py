"""LoRA's start: within the bound of each layer, from its name and the seed alone."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from limbeck.adapters.baselines import draw_start


def started(targets):
    host = nn.ModuleDict({"flat": nn.Linear(200, 3), "twin": nn.Linear(200, 3), "kernel": nn.Conv2d(8, 3, 5)})
    with torch.random.fork_rng(devices=[]):
        model = inject_adapter_in_model(LoraConfig(r=16, target_modules=targets), host)
    return model


def starts(model):
    return {name: module["default"].weight for name, module in model.named_modules() if name.endswith("lora_A")}


def test_a_start_is_uniform_within_one_over_the_root_of_the_inputs(global_generators):
    model, before = started(["flat", "twin", "kernel"]), global_generators()
    draw_start(model, 3)
    assert global_generators() == before
    for weight in starts(model).values():
        scaled = weight.detach() * 200**0.5  # 8 * 5 * 5 inputs as well
        assert 0.99 < scaled.abs().max() <= 1
        assert abs(scaled.mean()) < 0.04, "3,200 draws, 4 sigma"
        assert abs(scaled.var() - 1 / 3) < 0.022, "4 sigma"
    assert not any(parameter.any() for name, parameter in model.named_parameters() if ".lora_B." in name)


def test_a_start_depends_on_the_name_and_the_seed_alone():
    drawn = []
    for targets, seed in ((["flat", "twin", "kernel"], 3), (["kernel"], 3), (["kernel"], 4)):
        model = started(targets)
        draw_start(model, seed)
        drawn.append(starts(model))
    both, alone, other = drawn
    assert torch.equal(both["kernel.lora_A"], alone["kernel.lora_A"])
    assert not torch.equal(alone["kernel.lora_A"], other["kernel.lora_A"])
    assert not torch.equal(both["flat.lora_A"], both["twin.lora_A"])


def test_the_numbers_are_drawn_on_the_cpu_wherever_the_layer_is(monkeypatch):
    """A CPU's generator cannot draw into a tensor elsewhere."""
    model, draw, where = started(["flat", "kernel"]).to("meta"), torch.Tensor.uniform_, []

    def watched(self, *bounds, **options):
        where.append(self.device)
        return draw(self, *bounds, **options)

    monkeypatch.setattr(torch.Tensor, "uniform_", watched)
    draw_start(model, 3)
    assert where == [torch.device("cpu")] * 2
