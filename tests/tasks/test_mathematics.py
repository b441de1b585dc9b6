import json

import datasets
import pytest

from limbeck.tasks import mathematics
from limbeck.tasks.isolated import Isolated

COLUMNS = ("problem", "answer")


def write(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path):
    """Twenty problems in two parts, of which two come twice."""
    problems = tmp_path / "problems"
    train = [{"problem": f" What is {n} + 1?", "answer": f"{n + 1}", "source": "x"} for n in range(12)]
    test = [{"problem": f"What is {n} + 1?", "answer": f"{n + 1} ", "source": "x"} for n in range(10, 20)]
    write(problems, "train", train)
    write(problems, "test", test)
    return str(problems)


def test_problems_of_all_parts_come_once_each_with_their_answers(folder):
    examples = mathematics.examples(folder, 20, columns=COLUMNS, seed=0)
    assert {example.problem: example.gold for example in examples} == {
        f"What is {n} + 1?": str(n + 1) for n in range(20)
    }
    assert all(example.question.startswith(example.problem + " ") for example in examples)
    assert all("\\boxed{}" in example.question for example in examples)


def test_the_order_is_drawn_by_the_seed_and_a_shorter_list_begins_a_longer_one(folder, global_generators):
    before = global_generators()
    examples = mathematics.examples(folder, 20, columns=COLUMNS, seed=1)
    assert mathematics.examples(folder, 5, columns=COLUMNS, seed=1) == examples[:5]
    assert global_generators() == before
    other = mathematics.examples(folder, 20, columns=COLUMNS, seed=2)
    assert other != examples
    assert {example.problem for example in other} == {example.problem for example in examples}


def test_answers_that_are_numbers_and_other_names_of_columns_will_do(tmp_path):
    write(tmp_path / "numbers", "train", [{"asked": "What is half of 5?", "said": 2.5}])
    (example,) = mathematics.examples(str(tmp_path / "numbers"), 1, columns=("asked", "said"), seed=0)
    assert example == mathematics.Example("What is half of 5?", "2.5")


def test_a_hub_name_is_asked_for_as_it_is(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(train=datasets.Dataset.from_list([{"problem": "p", "answer": "1"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    mathematics.examples("someone/problems", 1, columns=COLUMNS, seed=0)
    assert asked == [("someone/problems",)]


def test_what_is_not_there_is_refused_with_what_is(folder):
    with pytest.raises(ValueError, match=r"columns \['problem', 'answer', 'source'\] in .*expected \['gold'\]"):
        mathematics.examples(folder, 3, columns=("problem", "gold"), seed=0)
    with pytest.raises(ValueError, match="received count 21, expected at most the 20 problems of"):
        mathematics.examples(folder, 21, columns=COLUMNS, seed=0)


@pytest.fixture(scope="module")
def judged():
    pytest.importorskip("math_verify")
    with Isolated(mathematics.reward, limit=20.0) as worker:
        yield worker


GOLD = ("42", "-5", "1,234", "0.5", "\\frac{1}{2}", "$\\frac{1}{2}$", "3\\sqrt{2}", "\\pi", "50\\%", "90^\\circ")
GOLD += ("0.\\overline{27}", "\\$1.50", "101_2", "12:00", "2:3", "1, 2, \\ldots, n", "2021-03-04")
GOLD += ("x^2+1", "2n-1", "x=3", "(1,2)", "\\{1,2\\}", "\\text{Friday}", "C", "12\\text{ cm}")
GOLD += ("\\begin{pmatrix}1\\\\2\\end{pmatrix}",)


@pytest.mark.parametrize("gold", GOLD)
def test_the_gold_answer_in_a_box_earns_1_and_garbage_0(judged, gold):
    bare = gold.strip("$")
    example = mathematics.Example("?", bare)
    for text in (mathematics.solution(example), f"Let me think.\n\nSo it is $\\boxed{{{bare}}}$.", f"It is ${bare}$."):
        assert judged(gold, text) == 1.0, text
    for text in ("", " ", "no idea", "\\boxed{}", "\\boxed{17\\sqrt{7}}", "\\boxed{", "The answer is 977."):
        assert judged(gold, text) == 0.0, text


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", 1.0),
        ("\\frac{1}{2}", "The answer is 1/2.", 1.0),
        ("\\frac{1}{2}", "\\boxed{0.51}", 0.0),
        ("(x+1)^2", "\\boxed{x^2+2x+1}", 1.0),
        ("(x+1)^2", "\\boxed{x^2+1}", 0.0),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", 1.0),
        ("42", "First I tried $7$. \\boxed{42} is what I found, not 9.", 1.0),
        ("9", "First I tried $7$. \\boxed{42} is what I found, not 9.", 0.0),
        ("42", "\\boxed{42} it is, though the final answer is 9", 1.0),
        ("42", "<think>Is it \\boxed{41}?</think> The answer is 42.", 0.0),
        ("42", "so 41, or 42", 1.0),
        ("41", "so 41, or 42", 0.0),
    ],
)
def test_an_equal_answer_is_right_and_a_box_goes_before_what_follows_it(judged, gold, text, reward):
    assert judged(gold, text) == reward


FALSE = (  # most are from public reports
    ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}"),
    ("\\frac{1}{2006!}", "\\frac{1}{2004!}"),
    ("1/2006!", "1/2004!"),
    ("10^{-20}", "10^{-21}"),
    ("0.0000001", "0.0000002"),
    ("\\frac{\\pi}{2^{98}}", "\\frac{\\pi}{2^{99}}"),
    ("\\frac{x}{2^{98}}", "\\frac{x}{2^{99}}"),
    ("x=2^{-98}", "x=2^{-99}"),
    ("e^{-100}", "e^{-101}"),
    ("(2^{-98}, 1)", "(2^{-99}, 1)"),
    ("\\{2^{-98}, 1\\}", "\\{2^{-99}, 1\\}"),
    ("\\begin{pmatrix}2^{-98}\\\\2\\end{pmatrix}", "\\begin{pmatrix}2^{-99}\\\\2\\end{pmatrix}"),
    ("\\sqrt{2} \\cdot 10^{-20}", "\\sqrt{3} \\cdot 10^{-20}"),
    ("\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", "\\frac{2^{2005}}{3 \\cdot 2^{2006}}"),
    ("2^{100}", "2^{100}+1"),
    ("1/3", "0.333333"),
    ("\\pi", "3.141592653589793"),
    ("\\infty", "-\\infty"),
    ("\\infty", "10^{400}"),
    ("1, 2, \\ldots, n", "1, 3, \\ldots, 2n-1"),
    ("1, 2, …, n", "1, 3, …, 2n-1"),
    ("1:2:3:\\ldots", "1:4:9:\\ldots"),
    ("1+2+\\ldots+10", "13"),
    ("13", "1+2+\\ldots+10"),
    ("3", "3\\ldots"),
    ("1 - \\frac{1}{\\mathrm{e}}", "1 + \\frac{1}{\\mathrm{e}}"),
    ("4", "4\\sqrt(2)"),
    ("f(x)=0", "\\forall x>0, f(x)=0"),
    ("\\pm 2021", "2021"),
    ("n=2, 3, 4", "n=1, 2, 3"),
    ("19, 46, \\text{ and } 82", "21, 36, and 82"),
    ("2021", "\\pm 2021"),
    ("9", "4\\sqrt{2} - x"),
    ("234", "1{,}234"),
    ("235", "1\\,234"),
    ("12:00", "1:00"),
    ("12:00", "12"),
    ("12", "12:00"),
    ("3:45\\text{ PM}", "3:45 \\text{ AM}"),
    ("12:30", "6:15"),
    ("1:2:3", "1:2:4"),
    ("1:2:3", "5"),
    ("2021-03-04", "2014"),
    ("2014", "2021-03-04"),
    ("2021-12-10", "1999"),
    ("101_2", "101_3"),
    ("101_2", "101"),
    ("50\\%", "5000\\%"),
    ("(5,2)", "(7,3)"),
    ("42", "10^{10^{10}}"),
    ("42", "9999999!"),
)


@pytest.mark.parametrize(("gold", "answer"), FALSE)
def test_what_is_not_equal_earns_0_in_a_box_or_out_of_it(judged, gold, answer):
    assert judged(gold, f"So it is \\boxed{{{answer}}}.") == 0.0
    if not answer.startswith(("10^{10^", "9999999!")):  # math-verify would compute these
        assert judged(gold, f"It is ${answer}$.") == 0.0


TRUE = (
    ("1234", "1{,}234"),
    ("1{,}234{,}567", "1234567"),
    ("1\\,234", "1{,}234"),
    ("1000", "1 000"),
    ("12:00", "12:00"),
    ("12:00", "12:00\\text{ noon}"),
    ("3:45\\text{ PM}", "3:45 p.m."),
    ("9:05", "09:05"),
    ("12:30", "2:5"),
    ("3:4", "6 : 8"),
    ("1:2", "\\frac{1}{2}"),
    ("1:2:3", "2:4:6"),
    ("2021-03-04", "2021-3-4"),
    ("1, 2, \\ldots, n", "1,2,…,n"),
    ("1 - \\frac{1}{\\mathrm{e}}", "1-e^{-1}"),
    ("\\frac{1}{2^{98}}", "2^{-98}"),
    ("0.\\overline{3}", "\\frac13"),
    ("\\frac{1}{2006!}", "\\frac{2007}{2007!}"),
    ("101_2", "5"),
    ("5", "5.0"),
    ("0.1", "\\frac{1}{10}"),
    ("(0.5, 1)", "(\\frac12, 1.0)"),
    ("50\\%", "0.5"),
    ("50\\%", "50"),
    ("1.5", "1\\frac{1}{2}"),
    ("\\sqrt{3+2\\sqrt{2}}", "1+\\sqrt{2}"),
    ("\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("0.5x", "\\frac{x}{2}"),
    ("9999999!", "9999999!"),
)


@pytest.mark.parametrize(("gold", "answer"), TRUE)
def test_what_is_equal_earns_1(judged, gold, answer):
    assert judged(gold, f"\\boxed{{1}}, no: \\boxed{{{answer}}}, and not 7.") == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("\\boxed{42} or rather \\boxed{43}", 1.0),
        ("\\boxed{43} or rather \\boxed{42}", 0.0),
        ("\\boxed{42} and \\boxed{43}", 1.0),
        ("\\boxed{43}. The answer is in \\boxed{}", 0.0),
    ],
)
def test_the_last_box_counts(judged, text, reward):
    assert judged("43", text) == reward


def test_numbers_that_are_too_large_to_be_compared_are_an_error_that_says_so(judged):
    with pytest.raises(ValueError, match=r"received '1/9999999!' where '0' is right, expected numbers of fewer than"):
        judged("0", "\\boxed{1/9999999!}")


@pytest.mark.parametrize("gold", ["", "\\frac{", "$$", "!?"])
def test_a_gold_answer_that_cannot_be_read_is_an_error_and_not_a_reward(judged, gold):
    with pytest.raises(ValueError, match=r"received the gold answer .* expected one that math-verify reads"):
        judged(gold, "\\boxed{1}")


def test_errors_inside_are_raised_and_not_a_reward_of_0(monkeypatch):
    verifier = pytest.importorskip("math_verify.grader")

    def broken(*_, **__):
        raise ArithmeticError("sympy gave up")

    assert mathematics.reward("\\pi", "\\boxed{41}") == 0.0
    monkeypatch.setattr(verifier, "sympy_expr_eq", broken)
    with pytest.raises(ArithmeticError, match="sympy gave up"):
        mathematics.reward("\\pi", "\\boxed{41}")


def test_without_its_parser_of_latex_nothing_is_a_silent_0(monkeypatch):
    """As with a version of antlr that does not fit: math-verify falls back to comparing texts."""
    parser = pytest.importorskip("math_verify.parser")

    def broken(*_, **__):
        raise ImportError("antlr")

    monkeypatch.setattr(parser, "parse_latex_cached", broken)
    parser.extract_latex.cache_clear()
    with pytest.raises(ValueError, match="expected one that math-verify reads"):
        mathematics.reward("\\frac{x}{3}", "\\boxed{\\frac{x}{3}}")
    parser.extract_latex.cache_clear()


def test_no_signal_is_set(monkeypatch):
    """math-verify's own limits would replace the alarm of the worker."""
    pytest.importorskip("math_verify")
    import signal  # noqa: PLC0415

    def refused(*_):
        raise AssertionError("a timer was set")

    monkeypatch.setattr(signal, "alarm", refused)
    assert mathematics.reward("42", "\\boxed{42}") == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("text", ["9**9**9**9", "\\boxed{x + \\sqrt{10^{10^{10}}}}"])
def test_a_power_that_never_ends_is_cut_off_and_the_next_text_is_judged(text):
    pytest.importorskip("math_verify")
    with Isolated(mathematics.reward, limit=2.0) as judged:
        with pytest.raises(TimeoutError):
            judged("42", text)
        judged.limit = 20.0  # the new worker imports sympy again
        assert judged("42", "\\boxed{42}") == 1.0


def test_a_text_is_never_run(judged, tmp_path):
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for text in (code, f"\\boxed{{{code}}}", f"the answer is {code}", f"$ {code} $", f"1+{code}+1"):
        assert judged("42", text) == 0.0
    assert not mark.exists()
