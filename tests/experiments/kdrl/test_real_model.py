"""The experiment on pretrained models, whole, in seconds: on a drawn student, and on a pair of Qwen2 from folders."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import cells
from experiments.kdrl.parts import changed
from limbeck import params, seeding
from limbeck.experiments.kdrl import real_model
from limbeck.experiments.kdrl.problems import WordProblems
from limbeck.losses import divergence
from limbeck.models import language
from limbeck.training import grpo, rollouts

SCORES = {f"test/{name}" for name in ("accuracy", "length", "ended", "unjudged", "greedy")}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} =>{% endif %}"
ANSWERS = ("one of 1", "one of 2")
FILE = "teacher.safetensors"


@pytest.fixture(scope="module")
def section():
    return params.load("kdrl", "fig_real_model", "smoke", real_model.Params)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    """The records of the smoke section, with an arm of each other kind, and its folder."""
    section = changed(section, arms=(*section.arms, "rejection", "kd_then_rl"), steps=3)
    folder = tmp_path_factory.mktemp("real_model")
    return cells.run_all(real_model, section, folder), folder, section


def problems_of(section):
    return WordProblems(section.words, section.student, lambda *_: 0.0, together=section.loop.prompts)


def student(section, folder):
    return real_model.load_student(section, problems_of(section), cells.place(folder, "x"))


def teacher(section, folder):
    return real_model.load_teacher(section, problems_of(section), cells.place(folder, "x"))


def cell_of(section, arm, phase="final"):
    (cell,) = [c for c in real_model.cells(section, (0,)) if c.coordinates == {"phase": phase, "arm": arm, "seed": 0}]
    return cell


def check(runs, section):
    """What every run of the experiment must have."""
    final = {run["cell"]["arm"]: run for run in runs if run["cell"]["phase"] == "final"}
    assert list(final) == sorted(section.arms, key=lambda arm: final[arm]["wave"])
    for arm, run in final.items():
        assert set(run["metrics"]) >= SCORES
        assert all(0 <= run["metrics"][f"test/{name}"] <= 1 for name in ("accuracy", "ended", "unjudged", "greedy"))
        assert bool(run["curve"]) == bool(run["trainable_parameters"]) == (arm not in ("start", "teacher"))
        for name in ("validation/accuracy", "rollout/tokens", "rollout/reward") if run["curve"] else ():
            assert len(run["curve"][name]) == section.loop.steps
    curves = [json.dumps(run["curve"]) for run in runs if run["curve"]]
    assert len(set(curves)) == len(curves), "two arms took the same steps"
    return final


def test_the_smoke_section_runs_and_needs_no_asset(ran):
    runs, folder, section = ran
    assert runs[0]["cell"] == {"phase": "teacher", "arm": "teacher", "seed": 0}
    assert (folder / FILE).is_file()
    assert "validation/accuracy" in runs[0]["metrics"]
    assert len(runs[0]["curve"]["loss/ce"]) == section.further_steps
    final = check(runs, section)
    assert final["kd_then_rl"]["metrics"]["kd/switch"] == 2.0, "nothing rose"
    assert all(cell.inputs["assets"] == [] for cell in real_model.cells(section, (0,)))
    own = {run["curve"]["rollout/length"][0] for arm, run in final.items() if run["curve"] and arm != "rejection"}
    assert len(own) == 1, "before the first step, arms have the same completions"


def test_the_teacher_is_the_student_but_for_its_last_layers(ran):
    _, folder, section = ran
    start, other = (dict(load(section, folder).named_parameters()) for load in (student, teacher))
    last = {name for name in start if ".layers." in name or name == "model.norm.weight"}
    assert {name for name, weight in other.items() if not torch.equal(weight, start[name])} == last
    assert set(load_file(folder / FILE)) == last
    assert {name for name, weight in start.items() if weight.requires_grad} == last


def test_the_teacher_is_fine_tuned_on_solutions_of_problems_that_no_arm_meets(section, tmp_path):
    """The batches' losses at no rate are the mean over the solutions' tokens, row by row."""
    long = changed(section, further_steps=6, further_batch=4, further_learning_rate=1e-9)
    problems, losses = problems_of(long), []
    drawn = rollouts.batches(24, size=4, steps=6, source=seeding.generator(0, "further"))
    model = student(long, tmp_path)
    for rows in drawn:
        chosen = []
        for row in rows:
            example = problems.teacher_train[row]
            prompt, solution = problems.prompt(example), problems.worked(example)
            logprobs = model(torch.tensor([[*prompt, *solution]])).logits[0].log_softmax(-1)
            chosen += [logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(solution)]
        losses.append(-sum(chosen) / len(chosen))
    cell = real_model.cells(long, (0,))[0]
    result = cells.drive(real_model, long, cell, cells.place(tmp_path, "x"))
    assert result.curve["loss/ce"] == pytest.approx(losses, rel=1e-4)


def test_with_trained_layers_0_all_parameters_are_trained(section, tmp_path):
    whole = changed(section, trained_layers=0)
    assert all(weight.requires_grad for weight in student(whole, tmp_path).parameters())


@pytest.mark.parametrize(("phase", "arm"), [("teacher", "teacher"), ("final", "kdrl")])
def test_a_killed_cell_goes_on_to_the_same_bits(ran, tmp_path, phase, arm):
    runs, folder, section = ran
    whole = cells.pick(runs, phase=phase, arm=arm)
    if phase == "final":
        (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    cell, where = cell_of(section, arm, phase), cells.place(tmp_path, "cut")
    assert cells.drive(real_model, section, cell, where, kill_at=2) is None
    torch.rand(7)
    assert vars(cells.drive(real_model, section, cell, where)).items() <= whole.items()
    for file in cell.checkpoint_files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


class HandedError(Exception):
    """Raised with what a cell hands to the loop."""


def test_all_arms_of_a_seed_meet_the_same_prompts_and_rows_come_once_an_epoch(ran, monkeypatch):
    _, folder, section = ran
    long = changed(section, steps=24, prompts=3)

    def fit(run, weights, problems, *_, **__):
        raise HandedError(run, problems)

    monkeypatch.setattr(grpo, "fit", fit)
    seen = []
    for arm in ("grpo", "kd", "kdrl", "rejection"):
        with pytest.raises(HandedError) as caught:
            cells.drive(real_model, long, cell_of(long, arm), cells.place(folder, "x"))
        run, problems = caught.value.args
        seen.append(problems)
        assert (run.teacher is None) == (arm in ("grpo", "rejection"))
        assert (run.sampler.model is run.policy) == (arm != "rejection")
        assert (run.sampler.temperature, run.settings.seed) == (long.words.temperature, 0)
    assert all(problems == seen[0] for problems in seen)
    flat = [problem.name for step in seen[0] for problem in step]
    questions = {example.question for example in problems_of(long).train}
    epochs = [flat[start : start + 24] for start in (0, 24, 48)]
    assert all(set(epoch) == questions for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_cells_have_the_seeds_that_were_asked_for_and_an_added_seed_changes_none(section):
    two = changed(section, replicates=2)
    one, both = real_model.cells(section, (5, 6)), real_model.cells(two, (5, 6))
    assert {cell.coordinates["seed"] for cell in one[1:]} == {5}
    assert [cell for cell in both if cell.coordinates["seed"] != 6] == one
    assert [cell.wave for cell in one] == [0] + [1] * len(section.arms)
    with pytest.raises(ValueError, match=r"received the seeds \(5,\), expected at least 2"):
        real_model.cells(two, (5,))


def test_what_is_only_measured_is_sampled_anew_for_every_seed(ran):
    _, folder, section = ran
    listed = real_model.cells(changed(section, replicates=3), (0, 1, 2))
    every = [cell for cell in listed if cell.coordinates["arm"] == "start"]
    results = [cells.drive(real_model, section, cell, cells.place(folder, "x")) for cell in every]
    assert len({result.metrics["test/length"] for result in results}) > 1


def test_a_teacher_that_has_a_name_is_not_trained_here(section):
    other = changed(section, teacher="llama-1x32", further_steps=0, taught_size=0)
    assert {cell.coordinates["phase"] for cell in real_model.cells(other, (0,))} == {"final"}


def test_the_assets_that_a_section_names_are_part_of_what_a_cell_depends_on():
    section = params.load("kdrl", "fig_real_model", "full", real_model.Params)
    assert all(len(cell.inputs["assets"]) == 1 for cell in real_model.cells(section, range(5)))


def saved(folder, *, words, spare, seed, steps):
    """A tiny Qwen2 with a tokenizer, taught to say one answer or the other; `spare` rows pad its vocabulary."""
    tokenizer = language.load_tokenizer("llama-1x16", words * 2)
    tokenizer.chat_template = TEMPLATE
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    texts = [[*tokenizer.encode(f"Is it this ? => {answer}"), tokenizer.eos_token_id] for answer in ANSWERS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer) + spare, **size, **ends)).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=torch.tensor(texts), labels=torch.tensor(texts)).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


WORDS = ["Say", "this", "Is", "it", "=>", "Please reason step by step , and put your final answer within"]
WORDS += ["\\", "boxed", "{}.", "?", "a b c d e f g h i j k l", *ANSWERS]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A section as the paper's, on tiny models and a local data set."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "problems").mkdir()
    rows = [
        {"problem": f"Say this {letter} ?", "answer": "12"[i % 2], "solution": ""}
        for i, letter in enumerate("abcdefghijkl")
    ]
    (folder / "problems" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = {
        name: saved(folder / name, words=WORDS, spare=spare, seed=spare, steps=steps)
        for name, spare, steps in (("student", 3, 25), ("teacher", 7, 50))
    }
    small = {"task": f"math/{folder / 'problems'}", "train_size": 6, "validation_size": 2, "test_size": 4, "longest": 8}
    small |= {"steps": 2, "prompts": 2, "group_size": 4, "save_every": 1, "measure_every": 1, "verify_limit": 60.0}
    small |= {"validation_samples": 2, "test_samples": 2, "micro_tokens": 256, "sampler": "transformers"}
    committed = params.load("kdrl", "fig_real_model", "paper", real_model.Params)
    return changed(committed, **models, **small)


@pytest.mark.slow
def test_the_paper_section_runs_on_a_pair_of_qwen2_from_folders_with_math_verify(pair, tmp_path):
    pytest.importorskip("math_verify")
    runs = cells.run_all(real_model, pair, tmp_path)
    final = check(runs, pair)
    assert set(final) == set(pair.arms) >= {"grpo", "kd", "kdrl", "annealed"}
    rewards = [reward for run in final.values() for reward in run["curve"].get("rollout/reward", [])]
    assert any(0 < reward < 1 for reward in rewards), "a run without rewards tests little"
    for arm in ("kd", "kdrl", "annealed"):
        assert all(value > 0 for value in final[arm]["curve"]["policy/reverse_kl"])
    coefficients = {arm: final[arm]["curve"]["kd/coefficient"][0] for arm in ("kd", "kdrl", "annealed")}
    assert coefficients == pytest.approx({"kd": 1.0, "kdrl": 2e-3, "annealed": 5e-3}), "the paper's"
    assert {run["curve"]["rollout/unjudged"][0] for run in final.values() if run["curve"]} == {0.0}
    assert len({run["trainable_parameters"] for run in final.values() if run["curve"]}) == 1


def test_the_rows_that_pad_a_vocabulary_are_cut_and_change_no_distribution_over_tokens(
    pair, tmp_path, global_generators
):
    problems = problems_of(pair)
    size = len(problems.tokenizer)
    before = global_generators()
    models = student(pair, tmp_path), teacher(pair, tmp_path)
    assert global_generators() == before
    ids = torch.tensor([problems.prompt(problems.train[0])])
    for name, cut in zip(("student", "teacher"), models, strict=True):
        whole = language.load(getattr(pair, name), problems.tokenizer, seed=0)
        assert whole.config.vocab_size > cut.config.vocab_size == size
        torch.testing.assert_close(cut(input_ids=ids).logits, whole(input_ids=ids).logits[..., :size])
    assert divergence.reverse_kl(*(model(input_ids=ids).logits for model in models)).isfinite()


def test_a_teacher_of_another_vocabulary_is_refused(pair, tmp_path):
    other = saved(tmp_path / "other", words=[*WORDS, "more"], spare=0, seed=0, steps=0)
    section = changed(pair, teacher=other)
    with pytest.raises(ValueError, match=r"received vocabularies of .* expected equal ones"):
        teacher(section, tmp_path)


def test_prompts_are_in_the_models_chat_template(pair):
    problems = problems_of(pair)
    example = problems.train[0]
    expected = problems.tokenizer.encode(f"{example.question} =>", add_special_tokens=False)
    assert list(problems.prompt(example)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("grpo", "kd_then_rl")}, r"expected kd among them: one switches where kd stops"),
        ({"arms": ("grpo", "dpo")}, "received arm 'dpo', expected one of sft, rejection, grpo"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"replicates": 0}, "replicates must be above 0, got 0"),
        ({"kd_coef": 0.0}, "kd_coef must be above 0, got 0.0"),
        ({"further_batch": 0}, "further_batch must be above 0, got 0"),
        ({"taught_size": 0}, "taught_size must be above 0, got 0"),
        ({"further_steps": 0}, "further_steps must be above 0, got 0"),
        ({"validation_samples": 0}, "validation_samples must be above 0, got 0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        changed(section, **change)
