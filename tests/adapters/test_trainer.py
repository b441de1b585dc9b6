"""transformers.Trainer trains an adapter, saves, resumes where it stopped, and its files load."""

import pytest
import tiny_hosts
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

pytestmark = pytest.mark.slow

STEPS = 6


def rows(name):
    source = torch.Generator().manual_seed(0)
    if name == "gpt2":
        tokens = torch.randint(1, 20, (24, 6), generator=source)
        return [{"input_ids": row, "labels": row} for row in tokens]
    images = torch.randn(24, 3, 8, 8, generator=source)
    return [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]


def trainer(name, folder, steps=STEPS, **options):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=3,
        seed=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    data = {"train_dataset": rows(name), "eval_dataset": rows(name)[:4]}
    return Trainer(model=tiny_hosts.adapted(name, cache_bytes=0), args=arguments, **data)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_a_run_that_resumes_ends_as_one_that_never_stopped(name, tmp_path):
    whole = trainer(name, tmp_path / "whole")
    start = {key: p.clone() for key, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    losses = [entry["train_loss"] for entry in whole.state.log_history if "train_loss" in entry]
    assert losses
    assert all((p != start[key]).any() for key, p in whole.model.named_parameters() if p.requires_grad)
    resumed = trainer(name, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == STEPS
    for (key, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=key)
    read = PeftModel.from_pretrained(tiny_hosts.host(name), str(tmp_path / "whole" / f"checkpoint-{STEPS}"))
    with torch.no_grad():
        assert torch.equal(tiny_hosts.outputs(name, read), tiny_hosts.outputs(name, whole.model.eval()))
    state = load_file(tmp_path / "whole" / "checkpoint-6" / "adapter_model.safetensors")
    assert not [key for key in state if "base_layer" in key]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True},
    ],
    ids=["gradient checkpointing", "bf16", "best model"],
)
def test_options_of_the_trainer_work(options, tmp_path):
    run = trainer("gpt2", tmp_path, **options)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
