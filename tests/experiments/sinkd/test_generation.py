import json
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import cells
from limbeck import params
from limbeck.evaluation.answers import Question
from limbeck.experiments.sinkd import decoder, generation
from limbeck.experiments.sinkd.generation import TEACHER
from limbeck.models import language
from limbeck.training import supervised

TABLES = {"table_decoder": decoder, "table_encoder_decoder": generation}


@pytest.fixture(scope="session")
def texts(tiny_texts, tmp_path_factory):
    """The tiny texts with classes of two words, of which two begin alike."""
    folder = tmp_path_factory.mktemp("texts")
    for file in Path(tiny_texts).glob("*.jsonl"):
        text = file.read_text()
        for letter, label in (("x", "left-one"), ("y", "left-two"), ("z", "right-one")):
            text = text.replace(f'"label": "{letter}"', f'"label": "{label}"')
        (folder / file.name).write_text(text)
    return str(folder)


@pytest.fixture(params=TABLES)
def table(request, texts):
    """An experiment, and its smoke section on texts from a folder, as a hub name would be used."""
    module = TABLES[request.param]
    section = params.load("sinkd", request.param, "smoke", module.Params)
    return module, cells.changed(section, data=texts, longest=12, batch_size=8)


def shared(section):
    """What both experiments have in their sections."""
    return getattr(section, "generation", section)


def test_the_whole_experiment_runs_and_every_arm_takes_its_chosen_weights(table, tmp_path):
    module, section = table
    measured = cells.run_all(module, section, tmp_path)
    section, added = shared(section), len(shared(section).arms) - 1
    assert len(measured) == 1 + added * len(section.multiples) + len(section.arms)
    assert (tmp_path / TEACHER).is_file()
    for run in measured:
        assert all(0 <= value <= 1 for name, value in run["metrics"].items() if not name.startswith("weight/"))
    final = {run["cell"]["arm"]: run for run in measured if run["cell"]["phase"] == "final"}
    kl = final["ce+kl"]["metrics"]["weight/kl"]
    for arm, run in final.items():
        weights = {name.removeprefix("weight/") for name in run["metrics"] if name.startswith("weight/")}
        assert weights == set(arm.split("+")[1:])
        assert run["metrics"].get("weight/kl", kl) == kl, "KL's weight is not held at its choice"
        assert set(run["curve"]) == {f"loss/{term}" for term in arm.split("+")} | {"optimiser/gradient_norm"}
    first = [(run["curve"]["loss/kl"][0], run["metrics"]["weight/kl"]) for run in measured if run["wave"] == 1]
    assert len({weight for _, weight in first}) == len(section.multiples)
    assert [loss / weight for loss, weight in first] == pytest.approx([first[0][0] / first[0][1]] * len(first))
    losses = [tuple(run["curve"]["loss/ce"]) for run in final.values()]
    assert len(set(losses)) == len(section.arms), "two arms took the same steps"


def test_a_killed_cell_goes_on_to_the_same_bits(table, tmp_path):
    module, section = table
    section = cells.changed(section, save_every=2)
    teacher, *_ = every = module.cells(section, (0,))
    whole = cells.drive(module, section, teacher, cells.place(tmp_path, "whole"))
    bits = (tmp_path / TEACHER).read_bytes()
    assert cells.drive(module, section, teacher, cells.place(tmp_path, "cut"), kill_at=4) is None
    torch.rand(7)
    assert cells.drive(module, section, teacher, cells.place(tmp_path, "cut")) == whole
    assert (tmp_path / TEACHER).read_bytes() == bits
    chosen = next(cell for cell in every if cell.coordinates["arm"] == "ce+kl")
    whole = cells.drive(module, section, chosen, cells.place(tmp_path, "student"))
    assert cells.drive(module, section, chosen, cells.place(tmp_path, "again"), kill_at=3) is None
    assert cells.drive(module, section, chosen, cells.place(tmp_path, "again")) == whole


def test_terms_are_selected_one_after_another_and_a_seed_changes_no_other_cell(table):
    module, section = table

    def by_name(section, seeds):
        return {json.dumps(cell.coordinates): cell for cell in module.cells(section, seeds)}

    one, two = by_name(section, (0,)), by_name(section, (0, 1))
    assert one == {name: two[name] for name in one}
    arms = set(shared(section).arms)
    turns = {0: {"teacher"}, 1: {"ce+kl"}, 2: arms - {"ce", "ce+kl"}, 3: arms}
    for turn, ran in turns.items():
        assert {cell.coordinates["arm"] for cell in one.values() if cell.wave == turn} == ran
    wider = by_name(cells.changed(section, multiples=(*shared(section).multiples, 9.0)), (0,))
    assert {name for name in one if wider[name] != one[name]} == {n for n, cell in one.items() if cell.wave > 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("ce", "ce+tvd")}, "term of arm ce.tvd must be one of .* got 'tvd'"),
        ({"arms": ("ce", "kl")}, "an arm is ce and up to 2 other terms, joined by .*, got 'kl'"),
        ({"arms": ("ce", "ce+kl", "ce+kl+kl")}, "an arm is ce and .* got 'ce.kl.kl'"),
        ({"arms": ("ce", "ce+kl+sinkhorn_answer")}, "without its last term must be one of .* got 'ce.kl'"),
        ({"split_sizes": (1, 2)}, r"one number each for train, validation, test, got \(1, 2\)"),
        ({"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(table, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(table[1], **change)


def test_the_choice_is_the_best_on_validation_and_of_equals_the_smallest_multiple():
    scores = {1.0: 0.7, 0.1: 0.5, 3.0: 0.7}
    measured = [
        {
            "cell": {"phase": phase, "arm": arm, "multiple": multiple},
            "metrics": {"validation/accuracy": score + bonus, "weight/kl": 10 * multiple},
        }
        for phase, arm, bonus in (("selection", "ce+kl", 0), ("selection", "ce+kl+sinkhorn_answer", 0.2))
        for multiple, score in scores.items()
    ]
    assert generation.chosen_weights(measured, "ce+kl") == {"kl": 10.0}


@pytest.fixture
def run(table, tmp_path):
    """A student in training whose answers have one, two and three tokens, and what a teacher left for it."""
    module, section = table[0], shared(table[1])
    tokenizer = language.load_tokenizer(section.teacher, list("abcdefgh") * 2)
    questions = [Question((3, 4, 5), ((6,), (7, 8), (8, 9, 10)), row % 3) for row in range(6)]
    model = language.load("t5-1x16" if module is generation else "llama-1x16", tokenizer, seed=0)
    source = torch.Generator().manual_seed(0)
    taught = {
        "states": torch.randn(6, 3, 16, generator=source),
        "head.weight": torch.randn(len(tokenizer), 16, generator=source),
    }
    where = cells.place(tmp_path, "run")
    return generation.LanguageRun(model, [], section.loop, where, {"train": questions}, section), taught


EVERY = ["kl", *generation.FORMS]


@pytest.mark.parametrize("rows", [[0, 3], [1, 4], [0, 1, 2]], ids=["one token", "two tokens", "mixed"])
def test_every_term_has_a_gradient_whether_answers_have_one_token_or_more(run, rows):
    run, taught = run
    for name, value in run.terms(torch.tensor(rows), EVERY, taught).items():
        assert value.isfinite()
        assert supervised.gradient_norm(run.parameters, value) > 0, name


def test_what_the_teacher_left_behind_the_end_of_an_answer_enters_no_term(run):
    run, taught = run
    rows = torch.arange(6)
    spoilt = taught["states"].clone()
    for row, question in enumerate(run.data["train"]):
        spoilt[row, len(question.right) :] = torch.nan
    clean = run.terms(rows, EVERY, taught)
    dirty = run.terms(rows, EVERY, taught | {"states": spoilt})
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
        norms = [supervised.gradient_norm(run.parameters, terms[name]) for terms in (clean, dirty)]
        assert norms[0] == norms[1], name


def test_cross_entropy_is_the_mean_over_all_tokens_of_the_right_answers_and_no_padding(run):
    run, taught = run
    rows = torch.arange(6)
    sums = []
    for row, question in zip(rows, run.data["train"], strict=True):
        sums.append(len(question.right) * run.terms(row[None], [], taught)["ce"])
    expected = sum(sums) / sum(len(question.right) for question in run.data["train"])
    torch.testing.assert_close(run.terms(rows, [], taught)["ce"], expected)


@pytest.mark.parametrize("term", EVERY)
def test_the_matched_weight_makes_both_gradients_equally_long(run, term):
    run, taught = run
    rows = torch.arange(6)
    run.batches = [rows]
    weight = run.gradient_matched_weight(lambda rows: run.terms(rows, [term], taught))
    terms = run.terms(rows, [term], taught)
    norm = supervised.gradient_norm(run.parameters, weight * terms[term])
    assert norm == pytest.approx(supervised.gradient_norm(run.parameters, terms["ce"]), rel=1e-5)


def test_the_first_layers_of_a_teacher_start_alike_for_every_seed_and_keep_its_head():
    section = params.load("sinkd", "table_decoder", "smoke", decoder.Params).generation
    tokenizer = language.load_tokenizer(section.teacher, ["a a"])
    teacher = language.load(section.teacher, tokenizer, seed=section.loop.teacher_seed)
    student = decoder.student_at_start(section, tokenizer)
    assert student.config.num_hidden_layers == 2
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert not student.lm_head.weight.requires_grad


@pytest.fixture
def superglue(tmp_path):
    """A folder with a data set in the columns and splits of SuperGLUE's COPA."""
    folder = tmp_path / "copy" / "copa"
    folder.mkdir(parents=True)
    for split, rows in (("train", 24), ("validation", 8)):
        lines = [
            {
                "premise": f"a b {'cd'[i % 2]}.",
                "choice1": "e f.",
                "choice2": "g h i.",
                "question": "cause",
                "label": i % 2,
            }
            for i in range(rows)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"superglue/copa@{folder.parent}"


def saved(folder, name, seed):
    """A tiny GPT-Neo or T5 with a tokenizer in a folder, as `save_pretrained` leaves them."""
    words = [*"abcdefghi01.:?", "Question", "What", "was", "the", "cause", "Answer"]
    tokenizer = language.load_tokenizer("t5-1x16", words * 2)
    if name == "t5":
        model = language.load("t5-1x16", tokenizer, seed=seed)
    else:
        config = GPTNeoConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, window_size=4,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=64, bos_token_id=None, eos_token_id=1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPTNeoForCausalLM(config)
    model.save_pretrained(folder / f"{name}-{seed}")
    tokenizer.save_pretrained(folder / f"{name}-{seed}")
    return str(folder / f"{name}-{seed}")


@pytest.mark.parametrize(("name", "model"), [("table_decoder", "gpt_neo"), ("table_encoder_decoder", "t5")])
def test_the_papers_architectures_run_from_folders_on_a_data_set_like_superglue(name, model, superglue, tmp_path):
    module = TABLES[name]
    committed = params.load("sinkd", name, "paper", module.Params)
    small = {"teacher": saved(tmp_path, model, 1), "student": saved(tmp_path, model, 2), "data": superglue}
    small |= {"split_sizes": (16, 8, 8), "teacher_epochs": 1, "epochs": 1, "multiples": (1.0,), "selection_texts": 8}
    if name == "table_decoder":
        small["teacher_trained_layers"] = 1
    measured = cells.run_all(module, cells.changed(committed, **small), tmp_path / "runs")
    assert len(measured) == 2 * len(shared(committed).arms)
    assert all("test/accuracy" in run["metrics"] for run in measured if run["cell"]["phase"] == "final")
