"""The LLaMA table's pattern, in seconds, on a drawn Llama, and on one from a folder with data as Alpaca and MMLU."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

import cells
from limbeck import params
from limbeck.adapters.layer import NolaLayer
from limbeck.experiments.nola import arms, instruction
from limbeck.experiments.nola import texts as text_loss
from limbeck.experiments.nola.instruction import InstructionDecoder
from limbeck.models import language
from limbeck.tasks import instructions, meanings
from limbeck.tasks.instructions import Question

SCORES = {"train/loss", "validation/loss", "validation/gap", "test/accuracy", "test/accuracy_of_sums"}


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "table_instruction", "smoke", instruction.Params)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruction")
    return cells.run_all(instruction, section, folder, seeds=(0, 1)), folder


def bench(section, folder):
    return InstructionDecoder(section.texts, cells.place(folder, "x"), section.asking)


def attached(made, section, arm, seed=0):
    options = {"layers": section.texts.layers, "share": section.nola_share, "targets": instruction.LINEAR_LAYERS}
    return arms.attach(arm, made.load(), section.adapters, seed=seed, **options)


def prepared(section):
    return instruction.prepare(section.texts, section.asking)


def alone(model, prompt, target):
    """log p of each token of one target, from the whole model in float64 without batch, states or padding."""
    ids = torch.tensor([[*prompt, *target]])
    found = model.double()(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return found.gather(1, torch.tensor(target)[:, None])[:, 0]


def moved(model):
    """The model with another value in every number that trains."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=source))
    return model


def test_the_smoke_section_runs_and_every_arm_has_every_score(ran, section):
    found, _ = ran
    final = [run for run in found if run["cell"]["phase"] == "final"]
    assert [run["cell"]["arm"] for run in final] == [*section.arms, *section.arms]
    for run in final:
        metrics, trained = run["metrics"], run["cell"]["arm"] != "none"
        assert set(metrics) >= SCORES
        assert metrics["validation/gap"] == pytest.approx(metrics["validation/loss"] - metrics["train/loss"])
        assert metrics["adapter/parameters"] == run["trainable_parameters"]
        assert bool(run["curve"]) == bool(run["trainable_parameters"]) == trained
    curves = [json.dumps(run["curve"]) for run in found if run["curve"]]
    assert len(set(curves)) == len(curves), "two runs took the same steps"


def test_the_rate_is_the_one_with_the_smallest_validation_loss_and_no_other_score_is_known_then(ran, section):
    found, _ = ran
    for arm in ("lora_1", "nola"):
        tried = {r["cell"]["learning_rate"]: r["metrics"] for r in found if r["wave"] == 1 and r["cell"]["arm"] == arm}
        assert list(tried) == list(section.rates(arm))
        assert not any(SCORES & set(metrics) - {"validation/loss"} for metrics in tried.values())
        best = min(tried, key=lambda rate: tried[rate]["validation/loss"])
        for seed in (0, 1):
            run = cells.pick(found, phase="final", arm=arm, seed=seed)
            assert run["metrics"]["adapter/learning_rate"] == best


def test_without_an_adapter_every_seed_has_the_scores_of_the_model_itself(ran, section):
    found, folder = ran
    one, other = (cells.pick(found, phase="final", arm="none", seed=seed)["metrics"] for seed in (0, 1))
    assert one == other
    model, made = bench(section, folder).load(), bench(section, folder)
    told = [alone(model, pair.prompt, pair.target) for pair in made.data.pairs["validation"]]
    assert one["validation/loss"] == pytest.approx(-torch.cat(told).mean().item(), rel=1e-5)


@pytest.mark.parametrize("arm", ["lora_1", "nola"])
def test_every_linear_layer_of_the_adapted_layers_is_adapted_and_no_other(section, tmp_path, arm):
    section = cells.changed(section, nola_share=0.3)
    made = bench(section, tmp_path)
    plain = {name for name, layer in made.load().named_modules() if isinstance(layer, nn.Linear)}
    wanted = {name for name in plain if name.startswith("model.layers.1.")}
    assert len(wanted) == 7
    model = attached(made, section, arm, seed=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {
        name.removeprefix("base_model.model.").partition(".lora_")[0].partition(".nola_")[0] for name in trained
    } == (wanted)
    shapes = [dict(made.load().named_modules())[name].weight.shape for name in wanted]
    lora, count = sum(map(sum, shapes)), sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    share = {"lora_1": 1.0, "nola": 0.3}[arm]
    assert share * lora - 2 * len(wanted) < count <= share * lora
    assert (count == lora) == (arm == "lora_1")
    for layer in (layer for layer in model.modules() if isinstance(layer, NolaLayer)):
        assert layer.scaling["default"] == section.adapters.nola_scale


def test_a_start_changes_nothing_and_is_the_seeds(section, tmp_path):
    made = bench(section, tmp_path)
    ids = torch.tensor([made.data.pairs["train"][0].read])
    plain = made.load()(input_ids=ids).logits
    for arm in ("lora_1", "nola"):
        torch.testing.assert_close(attached(made, section, arm, seed=0)(input_ids=ids).logits, plain)
        outputs = [moved(attached(made, section, arm, seed=seed))(input_ids=ids).logits for seed in (0, 0, 1)]
        assert outputs[0].equal(outputs[1])
        assert not outputs[0].equal(outputs[2])


def test_the_likeliest_choice_is_found_by_the_mean_of_its_tokens_and_by_their_sum(ran, section):
    """From the states of the frozen layers and in batches, against each choice alone through the whole model."""
    _, folder = ran
    made = bench(section, folder)
    model, hits = moved(attached(made, section, "nola", seed=0)), Counter()
    found = made.accuracies(model)
    listed = iter(made.data.pairs["choices"])
    logprobs = instruction.choice_logprobs(model, made.texts["choices"], torch.float32)
    twin = moved(attached(made, section, "nola", seed=0))
    for at, question in enumerate(made.data.questions):
        told = [alone(twin, *dataclasses.astuple(next(listed))) for _ in question.choices]
        for mine, theirs in zip(logprobs[4 * at : 4 * at + 4], told, strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)
        for name, values in {"accuracy": [x.mean() for x in told], "accuracy_of_sums": [x.sum() for x in told]}.items():
            hits[name] += max(range(4), key=values.__getitem__) == question.answer
    assert found == {f"test/{name}": hits[name] / 4 for name in ("accuracy", "accuracy_of_sums")}


def test_a_long_right_answer_wins_by_the_mean_and_loses_by_the_sum(section, tmp_path, monkeypatch):
    told = [torch.full((length,), value) for length, value in ((2, -2.0), (8, -1.0), (3, -3.0), (4, -3.0))]
    made = bench(section, tmp_path)
    made.__dict__["data"] = dataclasses.replace(made.data, questions=[Question("?", ("a", "b", "c", "d"), 1)])
    made.__dict__["texts"] = {"choices": None}
    monkeypatch.setattr(instruction, "choice_logprobs", lambda *_: told)
    assert made.accuracies(made.load()) == {"test/accuracy": 1.0, "test/accuracy_of_sums": 0.0}


def test_questions_have_a_text_of_the_meaning_and_three_of_meanings_one_slot_away_that_nothing_is_trained_on():
    train, _, rest = meanings.splits("camrest_meanings", (20, 5, -1), seed=3)
    sizes, options = (20, 5, 40), {"train_texts": -1, "references": 1, "seed": 3}
    learned, _, questions = instructions.load("camrest_meanings", "", sizes, **options)
    of_train = {text for meaning in train for text in meaning.texts}
    assert {asked.text for asked in learned} == of_train
    assert len(questions) == 40
    known = {instructions.instruction(meaning): meaning for meaning in rest}
    for question in questions:
        meaning = known[question.prompt]
        assert question.choices[question.answer] in meaning.texts
        for at, text in enumerate(question.choices):
            owners = [set(other.slots) for other in rest if other.act == meaning.act and text in other.texts]
            away = {(len({*meaning.slots} - slots), len(slots - {*meaning.slots})) for slots in owners}
            assert ((0, 0) if at == question.answer else (1, 1)) in away
    assert {question.answer for question in questions} == {0, 1, 2, 3}, "the right answer stands anywhere"


def test_too_few_meanings_for_so_many_questions_are_refused():
    with pytest.raises(ValueError, match=r"received 90 questions to make, expected at most \d+ of these meanings"):
        instructions.load("camrest_meanings", "", (5, 5, 90), train_texts=-1, references=1, seed=0)


def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(section, tmp_path, global_generators):
    made = bench(cells.changed(section, layers=0, longest=40), tmp_path)
    model, texts, rows = moved(attached(made, section, "nola", seed=0)).double(), made.texts["train"], torch.arange(7)
    assert len({len(texts.pairs[row].target) for row in range(7)}) > 1, "else any mean of means would do"
    whole, gradients, before = text_loss.loss_of(model, texts, torch.float32), [], global_generators()
    for loss in (whole, instruction.in_parts(whole, texts, 3)):
        model.zero_grad()
        value = loss(rows)["loss/ce"]
        value.backward()
        gradients.append([value.detach(), *(w.grad.clone() for w in model.parameters() if w.requires_grad)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert global_generators() == before


def test_a_killed_cell_goes_on_to_the_same_bits(ran, section):
    found, folder = ran
    whole = cells.pick(found, phase="final", arm="nola", seed=1)
    (cell,) = [c for c in instruction.cells(section, (0, 1)) if c.coordinates == whole["cell"]]
    where = cells.place(folder, "cut", [run for run in found if run["wave"] < 2])
    assert cells.drive(instruction, section, cell, where, kill_at=2) is None
    torch.rand(7)
    assert vars(cells.drive(instruction, section, cell, where)).items() <= whole.items()


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}=>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The paper's section on a tiny Llama from a folder, with local data of Alpaca's and MMLU's columns."""
    folder = tmp_path_factory.mktemp("paper")
    asked = [
        {"instruction": f"say {a}", "input": "twice" if i % 2 else "", "output": f"{a} {a} {a}"}
        for i, a in enumerate("abcdefghijkl")
    ]
    asked.append({"instruction": "say nothing", "input": "", "output": ""})
    rows = {
        split: [
            {"question": f"which {i} of {split} ?", "subject": subject, "choices": list("wxyz"), "answer": i % 4}
            for i in range(number)
            for subject in ("old_maps", "new maps")
        ]
        for split, number in (("dev", 6), ("test", 5))
    }
    for name, splits in {"alpaca": {"train": asked}, "mmlu": rows}.items():
        (folder / name).mkdir()
        for split, lines in splits.items():
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [*map(str, asked), *map(str, rows["dev"]), "A B C D A B C D ### Instruction Response : . =>"] * 2
    tokenizer = language.load_tokenizer("llama-1x16", words)
    language.load("llama-2x64", tokenizer, seed=0).save_pretrained(folder / "model")
    for width in (32, 96):
        language.load(f"llama-2x{width}", tokenizer, seed=0).save_pretrained(folder / str(width))
        tokenizer.save_pretrained(folder / str(width))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    committed = params.load("nola", "table_instruction", "paper", instruction.Params)
    small = {
        "model": str(folder / "model"),
        "data": f"alpaca/{folder / 'alpaca'}",
        "questions": f"mmlu/{folder / 'mmlu'}",
    }
    small |= {
        "split_sizes": (-1, 4, -1),
        "batch_size": 4,
        "micro_texts": 3,
        "steps": 2,
        "save_every": 1,
        "replicates": 1,
    }
    return cells.changed(committed, **small, longest=8)


@pytest.mark.slow
def test_the_paper_section_runs_on_a_llama_from_a_folder_with_the_same_columns(folders, tmp_path):
    found = cells.run_all(instruction, folders, tmp_path)
    assert {run["cell"]["phase"] for run in found} == {"selection", "final"}, "all layers are adapted: no states"
    final = {run["cell"]["arm"]: run for run in found if run["cell"]["phase"] == "final"}
    assert set(final) == {"none", "lora_1", "nola"}
    assert all(set(run["metrics"]) >= SCORES for run in final.values())
    assert final["nola"]["trainable_parameters"] < 0.05 * final["lora_1"]["trainable_parameters"]
    made = bench(folders, tmp_path)
    model, hits = made.load(), []
    for question in made.data.questions:
        prompt = made.data.tokenizer(question.prompt)["input_ids"]
        letters = [made.data.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "ABCD"]
        next_token = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        hits.append(max(range(4), key=lambda i, said=next_token, ids=letters: said[ids[i][0]]) == question.answer)
    assert final["none"]["metrics"]["test/accuracy"] == sum(hits) / len(hits) == sum(hits) / 10


NF4 = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]  # QLoRA, appendix E
NF4 += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]


def rounded(weight):
    """Every weight at its nearest level, with one scale for 64 of them, by looking at all levels."""
    blocks, levels = weight.detach().view(-1, 64), torch.tensor(NF4)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scales).view_as(weight)


def test_a_model_in_four_bits_multiplies_by_its_weights_at_their_nearest_levels(folders, tmp_path):
    """But for the rounding of the scales, to 8 bits, and for that of the products, to bfloat16."""
    plain = bench(cells.changed(folders, base_bits=32), tmp_path).load()
    weights = {name: layer.weight for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    modules = bench(folders, tmp_path).load().named_modules()
    held = {name: layer for name, layer in modules if isinstance(layer, Linear4bit)}
    assert set(held) == set(weights) - {"lm_head"}
    for name, layer in held.items():
        twin = rounded(weights[name])
        assert 0.05 < (twin - weights[name]).norm() / weights[name].norm() < 0.1, name
        inputs = torch.randn(8, twin.shape[1], generator=torch.Generator().manual_seed(0))
        outputs, expected = layer(inputs.bfloat16()).float(), inputs @ twin.T
        assert (outputs - expected).norm() < 0.03 * expected.norm(), name


@pytest.mark.parametrize("width", [32, 96])
def test_a_layer_whose_rows_are_no_whole_blocks_of_four_bits_is_refused(folders, tmp_path, width):
    uneven = cells.changed(folders, model=str(Path(folders.texts.model).with_name(str(width))))
    with pytest.raises(ValueError, match=rf"self_attn\.q_proj of {width} inputs, expected a multiple of 64"):
        bench(uneven, tmp_path).load()


def test_a_model_in_four_bits_learns_by_either_adapter(folders, tmp_path):
    folders = cells.changed(folders, steps=12, nola_share=0.3)
    for arm, rate in (("lora_1", 1e-3), ("nola", 0.03)):
        made = bench(folders, tmp_path / arm)
        model = attached(made, folders, arm, seed=0)
        before = made.loss(model, "train")
        base = {name: value.clone() for name, value in model.named_parameters()}
        list(made.fit(model, made.train_loss(model), folders.loop, learning_rate=rate, seed=0))
        assert made.loss(model, "train") < before
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, base[name])}
        assert changed
        assert all(".lora_" in name or ".nola_" in name for name in changed)
    with pytest.raises(ValueError, match=r"received a weight of torch.uint8, expected floating point; `to_lora` needs"):
        model.merge_adapter()


def test_of_alpaca_and_mmlu_the_prompts_are_those_of_the_released_kind(folders):
    data = prepared(folders)
    assert (len(data.train), len(data.validation), len(data.questions)) == (8, 4, 10), (
        "a text without an answer is left"
    )
    (twice,) = [a for a in [*data.train, *data.validation] if a.instruction == "say b\n\ntwice"]
    pair = data.pair(twice)
    said = data.tokenizer("### Instruction:\nsay b\n\ntwice\n\n### Response: b b b")["input_ids"]
    assert [*pair.prompt, *pair.target] == [*said, data.tokenizer.eos_token_id]
    assert len(pair.target) == 4
    (question,) = [q for q in data.questions if "which 2 of test" in q.prompt and "old maps" in q.prompt]
    parts = question.prompt.split("\n\n")
    assert parts[0] == "The following are multiple choice questions (with answers) about old maps."
    assert parts[1] == "which 0 of dev ?\nA. w\nB. x\nC. y\nD. z\nAnswer: A"
    assert [part[-1] for part in parts[1:]] == [*"ABCDA", ":"]
    assert (question.answer, question.plain) == (2, True)


def test_a_chat_has_an_empty_system_turn_and_one_of_the_user(folders):
    data = prepared(cells.changed(folders, chat=True))
    asked = data.train[0]
    wanted = data.tokenizer(f"<system>  <user> {asked.instruction} =>{asked.text}", add_special_tokens=False)[
        "input_ids"
    ]
    pair = data.pair(asked)
    assert [*pair.prompt, *pair.target] == [*wanted, data.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("none", "dora")}, "arm must be one of none, lora_1, nola; got 'dora'"),
        ({"nola_rates": (0.1,)}, "expected as many of each"),
        ({"nola_share": 0.0}, "nola_share must be above 0, got 0.0"),
        ({"micro_texts": 0}, "micro_texts must be above 0, got 0"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"base_bits": 8}, "base_bits must be one of 4, 32; got 8"),
        ({"questions": "mmlu/x"}, "questions 'mmlu/x' with data 'camrest_meanings', expected 'camrest_meanings'"),
        ({"data": "alpaca/x"}, "questions 'camrest_meanings' with data 'alpaca/x', expected 'mmlu/<data set>'"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)


def test_seeds_and_chats_that_are_not_there_are_refused(section):
    with pytest.raises(ValueError, match=r"received the seeds \(5,\), expected at least 2"):
        instruction.cells(section, (5,))
    with pytest.raises(ValueError, match="received chat: true, expected a chat template"):
        prepared(cells.changed(section, chat=True))
