"""Each rule by which a digest sees meaning and not layout, on a small package, and what the real one reaches."""

import json
import subprocess
import sys

import nbformat
import pytest

from limbeck import definitions, digests, paths

TOP = """
from limbeck.losses import bottom

def run(cell, rate=bottom.RATE):
    '''Doc.'''
    total = bottom.halved(cell) + rate
    return total
"""
BOTTOM = """
RATE = 3

def halved(x):
    return half(x)

def half(value):
    return value / 2
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes modules of a package and gives the digest of `limbeck.top.run`, or of another name."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    digests._files.cache_clear()
    folder = tmp_path / "src" / "limbeck"

    def written(name="limbeck.top.run", **modules):
        for module, text in {"top": TOP, "losses/bottom": BOTTOM, **modules}.items():
            file = folder / f"{module}.py"
            for parent in (folder, file.parent):
                parent.mkdir(parents=True, exist_ok=True)
                (parent / "__init__.py").touch()
            file.write_text(text)
        definitions._parsed.cache_clear()
        return digests.of_names(name)

    written.folder = folder
    yield written
    digests._files.cache_clear()


def top(body, *, imports="from limbeck.losses import bottom"):
    return f"{imports}\n\n{body}"


@pytest.mark.parametrize(
    ("changed", "old", "new"),
    [
        ("top", "total", "answer"),  # a local
        ("top", "cell", "coordinates"),  # a parameter that nothing spells
        ("top", "'''Doc.'''", "'''Another.'''\n    'and a bare text'"),
        ("top", "    total =", "    # why\n\n    total = "),
        ("top", "def run(cell, rate=bottom.RATE):", "def run(cell: int, rate: float = bottom.RATE) -> float:"),
        ("top", "from limbeck.losses import bottom", "import json\nimport limbeck.losses.bottom as bottom"),
        ("bottom", "half(", "divided("),  # a function and its call
        ("bottom", "RATE = 3", "RATE: int = 3"),
        ("bottom", "def half(", "def unused():\n    return 7\n\ndef half("),
        ("bottom", "return half(x)", "pass\n    return half(x)"),
    ],
)
def test_names_layout_documents_and_what_nothing_calls_leave_a_digest_alone(package, changed, old, new):
    before = package()
    text = TOP if changed == "top" else BOTTOM
    assert old in text
    name = "top" if changed == "top" else "losses/bottom"
    assert package(**{name: text.replace(old, new)}) == before


def test_a_moved_a_renamed_and_a_split_module_leave_a_digest_alone(package):
    before = package()
    moved = TOP.replace("limbeck.losses import bottom", "limbeck.other import depth as bottom")
    assert package(**{"top": moved, "other/depth": BOTTOM}) == before
    first, second = BOTTOM.split("def half(")
    split = {"losses/bottom": "from limbeck.second import half\n" + first, "second": "def half(" + second}
    assert package(**split) == before
    assert (
        package("limbeck.renamed.run", renamed=TOP.replace("bottom", "b").replace("import b", "import bottom as b"))
        == before
    )
    shim = "from limbeck.top import run\n"
    assert package("limbeck.shim.run", shim=shim) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("top", "+ rate", "- rate"),
        ("top", "return total", "return cell"),
        ("top", "rate=bottom.RATE", "rate=4"),
        ("losses/bottom", "RATE = 3", "RATE = 3.0"),
        ("losses/bottom", "value / 2", "value // 2"),
        ("losses/bottom", "return half(x)", "return half(half(x))"),
    ],
)
def test_a_changed_expression_changes_what_reaches_it_and_nothing_else(package, name, old, new):
    aside = "from limbeck.losses.bottom import other\n"
    extra = {"aside": aside + "def run():\n    return other()\n"}
    bottom = BOTTOM + "\ndef other():\n    return 1\n"
    before, untouched = package(**extra, **{"losses/bottom": bottom}), digests.of_names("limbeck.aside.run")
    text = TOP if name == "top" else bottom
    assert old in text
    changed = package(**(extra | {"losses/bottom": bottom, name: text.replace(old, new)}))
    assert changed != before
    assert digests.of_names("limbeck.aside.run") == untouched


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lambda a, b: a - b", "lambda b, a: a - b"),
        ("[a - b for a, b in x]", "[b - a for a, b in x]"),
        ("[a for a in x for b in a]", "[b for a in x for b in a]"),
        ("x.real", "x.imag"),
        ("1", "True"),
        ("'1'", "1"),
        ("x[1:]", "x[:1]"),
        ("f'{x!r}'", "f'{x!s}'"),
        ("torch.sum(x)", "torch.mean(x)"),
        ("dict(a=x)", "dict(b=x)"),
    ],
)
def test_two_expressions_that_differ_in_what_they_do_differ(package, one, other):
    texts = [top(f"import torch\ndef run(x):\n    return {text}\n") for text in (one, other)]
    assert package(top=texts[0]) != package(top=texts[1])


def test_aliases_of_other_packages_drop_out(package):
    one = "import torch.nn.functional as F\ndef run(x):\n    return F.relu(x)\n"
    other = "from torch import nn\ndef run(y):\n    return nn.functional.relu(y)\n"
    inside = "def run(z):\n    import torch\n    return torch.nn.functional.relu(z)\n"
    assert package(top=one) == package(top=other) == package(top=inside)


CLASS = """
import torch
from limbeck.losses import bottom

def doubled(cls):
    return cls

class Base:
    def helper(self):
        return 1

@doubled
class Params(Base):
    '''Doc.'''
    size: int = 3

    def update_layer(self, adapter_name):
        return bottom.half(adapter_name)

class Function(torch.autograd.Function):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2

def run(params):
    return Params(params), Function
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return bottom.half(adapter_name)", "return adapter_name"),  # a method that only PEFT calls
        ("gradient * 2", "gradient * 3"),  # and one that only autograd calls
        ("size: int = 3", "size: float = 3"),  # the annotation of a field, by which params convert
        ("size: int = 3", "size: int = 4"),
        ("size: int", "length: int"),
        ("return 1", "return 2"),  # in a base class
        ("return cls", "return None"),  # in a decorator
        ("@doubled\n", ""),
        ("class Params(Base)", "class Params"),
        ("def update_layer(", "def replace_layer("),
        ("gradient):\n        return gradient", "grad):\n        return grad"),  # outsiders may call by keyword
    ],
)
def test_a_reached_class_counts_whole(package, old, new):
    assert old in CLASS
    assert package(top=CLASS) != package(top=CLASS.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [("Params", "Section"), ("'''Doc.'''", "'''Other.'''"), ("adapter_name", "name"), ("Base", "Shared")],
)
def test_the_name_and_the_documents_of_a_class_drop_out(package, old, new):
    assert package(top=CLASS) == package(top=CLASS.replace(old, new))


def test_a_change_below_a_method_of_a_class_is_seen(package):
    before = package(top=CLASS)
    assert package(**{"top": CLASS, "losses/bottom": BOTTOM.replace("value / 2", "value")}) != before


TABLE = """
def a():
    return 1

def b():
    return 2

ARMS = {'a': a}
ARMS |= {'b': b}

def run(x):
    return ARMS[x]()
"""


@pytest.mark.parametrize(
    ("old", "new"), [("return 2", "return 3"), ("'b': b", "'c': b"), ("ARMS |= {'b': b}\n", ""), ("'a': a", "'a': b")]
)
def test_a_table_counts_with_all_that_it_names(package, old, new):
    assert package(top=TABLE) != package(top=TABLE.replace(old, new))


def test_names_of_one_assignment_do_not_count_for_each_other_but_by_their_place(package):
    text = "START, END = 1, 2\n\ndef run():\n    return START\n"
    assert package(top=text) != package(top=text.replace("START, END =", "END, START ="))
    assert package(top=text) == package(top=text.replace("END", "LAST"))


def test_what_modules_and_the_packages_around_them_do_when_loaded_counts(package):
    before = package()
    registered = "from limbeck.losses.bottom import half\nTABLE = {}\nTABLE['half'] = half\n"
    with_effect = package(**{"losses/__init__": registered})
    assert with_effect != before
    assert package(**{"losses/__init__": registered.replace("['half']", "['whole']")}) != with_effect
    assert package(**{"losses/__init__": "", "losses/bottom": BOTTOM + "\nprint(RATE)\n"}) != before
    assert package(**{"losses/bottom": BOTTOM + "\nif __name__ == '__main__':\n    print(RATE)\n"}) == before


def test_a_decorator_of_the_package_that_enters_a_function_in_a_table_counts(package):
    entered = (
        BOTTOM + "\nTABLE = {}\ndef entry(f):\n    TABLE[1] = f\n    return f\n\n@entry\ndef one():\n    return 1\n"
    )
    assert package(**{"losses/bottom": entered}) != package(
        **{"losses/bottom": entered.replace("return 1", "return 2")}
    )


def test_an_annotation_drops_out_but_what_it_names_is_reached(package):
    text = "class Params:\n    size: int\n\ndef run(params: Params):\n    return 1\n"
    before = package(top=text)
    assert package(top=text.replace("size: int", "size: float")) != before
    assert package(top=text.replace("params: Params", "params: 'Params | None'")) == before
    assert package(top=text.replace("params: Params", "params: int")) != before
    local = "class Params:\n    size: int\n\ndef run(params):\n    section: Params = params\n    return section\n"
    assert package(top=local) != package(top=local.replace("size: int", "size: float"))


CYCLE = """
def run(n):
    return odd(n)

def odd(n):
    return even(n - 1)

def even(n):
    return odd(n - 2) or leaf(n)

def leaf(n):
    return 1
"""


def test_definitions_that_call_each_other_are_hashed_together(package):
    before = package(top=CYCLE)
    assert package(top=CYCLE.replace("odd", "uneven").replace("even(n - 1)", "even(n - 1)")) == before
    assert package(top=CYCLE.replace("n - 2", "n - 3")) != before
    assert package(top=CYCLE.replace("return 1", "return 2")) != before
    assert package(top=CYCLE.replace("return odd(n)\n\ndef odd", "return even(n)\n\ndef odd")) != before


def test_a_module_that_is_handed_on_as_a_value_counts_whole(package):
    text = top("def run(name):\n    return getattr(bottom, name)\n")
    before = package(top=text)
    assert package(**{"top": text, "losses/bottom": BOTTOM.replace("value / 2", "value")}) != before
    assert package(**{"top": text, "losses/bottom": BOTTOM.replace("half(", "whole(")}) != before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bottom.halved(cell)", "bottom.missing(cell)", "has no missing"),
        ("bottom.halved(cell)", "nowhere(cell)", "has no nowhere"),
        ("import bottom", "import bottom, absent", "has no absent"),
        ("bottom.halved(cell)", "eval(cell)", "eval reaches cannot be read"),
        ("bottom.halved(cell)", "locals()", "locals reaches cannot be read"),
    ],
)
def test_what_cannot_be_resolved_is_an_error(package, old, new, words):
    text = TOP.replace(old, new).replace("return total", "return total, absent" if "absent" in new else "return total")
    with pytest.raises(ValueError, match=words):
        package(top=text)


def test_a_module_that_is_imported_by_a_built_name_is_an_error(package):
    with pytest.raises(ValueError, match=r"importlib\.import_module reaches cannot be read"):
        package(top="import importlib\ndef run(x):\n    return importlib.import_module(x)\n")


@pytest.mark.parametrize("call", ["run(1, rate=2)", "run(**{'rate': 2})", "run(**vars(Section()))"])
def test_the_name_of_a_parameter_counts_where_code_can_spell_it(package, call):
    text = (
        f"class Section:\n    rate: int = 1\n\ndef other():\n    return {call}\n\ndef run(x, rate):\n    return rate\n"
    )
    assert package("limbeck.top.other", top=text) != package(
        "limbeck.top.other", top=text.replace("x, rate):\n    return rate", "x, pace):\n    return pace")
    )
    assert package("limbeck.top.other", top=text) == package("limbeck.top.other", top=text.replace("run(x,", "run(y,"))


def test_nested_functions_and_what_they_share_are_told_apart(package):
    inner = "    def inner():\n        nonlocal a\n        a = b\n        return a\n    return inner\n"
    text = "def run():\n    a, b = 1, 2\n" + inner
    assert package(top=text) == package(top=text.replace("inner", "other").replace(" a", " c"))
    assert package(top=text) != package(top=text.replace("        nonlocal a\n", ""))
    assert package(top=text) != package(top=text.replace("a = b", "b = a"))


def test_a_file_of_the_package_that_a_text_names_counts(package):
    text = "def run():\n    return open('look.mplstyle')\n"
    package(top=text)
    style = package.folder / "exhibits" / "look.mplstyle"
    style.parent.mkdir()
    style.write_text("font.size: 9")
    digests._files.cache_clear()
    before = package(top=text)
    style.write_text("font.size: 10")
    assert package(top=text) != before
    assert package() == package()


def notebook(path, *cells, text="Text."):
    content = nbformat.v4.new_notebook()
    content.cells = [nbformat.v4.new_markdown_cell(text), *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(content, path)
    return digests.of_notebook(path)


def test_what_is_there_to_try_counts_for_nothing(package, tmp_path):
    package()
    path = tmp_path / "exhibit.ipynb"
    before = notebook(path, "from limbeck.losses import bottom")
    made = nbformat.read(path, as_version=4)
    made.cells.append(nbformat.v4.new_code_cell("bottom.half(2)", metadata={"tags": ["try-it"]}))
    nbformat.write(made, path)
    assert digests.of_notebook(path) == before


def test_a_notebook_counts_by_the_text_of_its_code_and_by_what_that_reaches(package, tmp_path):
    package()
    path, cells = (
        tmp_path / "exhibit.ipynb",
        ("%matplotlib inline\nfrom limbeck.losses import bottom", "x = bottom.half(2)"),
    )
    before = notebook(path, *cells)
    assert notebook(path, *cells, text="Other.") == before
    assert notebook(path, cells[0], "x  = bottom.half(2)") != before
    package(**{"losses/bottom": BOTTOM.replace("RATE = 3", "RATE = 4")})
    assert notebook(path, *cells) == before
    package(**{"losses/bottom": BOTTOM.replace("value / 2", "value")})
    assert notebook(path, *cells) != before


def definitions_reached(*names):
    return set(digests._Closure([digests._named(name) for name in names], []).forms)


def test_the_half_of_the_ledger_that_runs_a_cell_counts_for_every_experiment():
    reached = definitions_reached(digests._EXECUTE)
    assert definitions.Definition("limbeck.experiments.runs", "execute") in reached
    assert not any(definition.module.endswith("ledger") for definition in reached)


def test_an_experiment_reaches_what_registers_nola_and_neither_figures_nor_claims():
    module = digests.module_of("nola", "fig_pranc_loss")
    modules = {
        definition.module for definition in definitions_reached(*(f"{module}.{name}" for name in digests._ROOTS))
    }
    assert {"limbeck.adapters.layer", "limbeck.seeding"} <= modules
    assert not [module for module in modules if module.split(".")[-1] in ("figures", "claims", "ledger")]


def test_every_experiment_and_every_exhibit_has_a_digest_and_the_committed_ones_are_of_this_code():
    code = "import json; from limbeck import digests; print(json.dumps(digests.everything()))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # unchecked: quick
    everything = json.loads(told.stdout)
    for paper in ("kdrl", "nola", "sinkd"):
        assert {path.stem for path in (paths.NOTEBOOKS / paper).glob("*.ipynb")} <= set(everything[paper])
        assert {f"{name}-train" for name in digests.experiments(paper)} <= set(everything[paper])
    assert json.loads(digests.FILE.read_text()) == everything, "run `make pipeline`"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = RATE", "RATE = RATE + 0"),  # the body
        ("value / 2", "value"),  # behind a field that is named like its module
        ("weight: float", "weight: int"),  # behind a quoted annotation
        ("RATE = 3", "RATE = 4"),  # behind a name that the body binds anew
    ],
)
def test_what_a_name_of_a_class_stood_for_before_its_body_bound_it_is_reached(package, old, new):
    text = (
        "from limbeck.losses import bottom\nfrom limbeck.losses.bottom import RATE\n\nclass Inner:\n    weight: float\n"
    )
    text += "\nclass Params:\n    RATE = RATE\n    bottom: bottom.half\n    inner: 'Inner'\n"
    text += "\ndef run():\n    return Params\n"
    before = package(top=text)
    assert package(**{"top": text.replace(old, new), "losses/bottom": BOTTOM.replace(old, new)}) != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def run():\n    global a\n    a = 1\n", "global statement"),
        ("from .losses import bottom\n\ndef run():\n    return bottom\n", "absolute import of names"),
        ("from limbeck.losses.bottom import *\n\ndef run():\n    return half\n", "absolute import of names"),
        (
            "from limbeck.losses.bottom import half\nhalf = half\n\ndef run():\n    return half\n",
            "imports and defines half",
        ),
        ("def run():\n    import json as a\n    import ast as a\n    return a\n", "imports a twice"),
        ("import sys\n\ndef run():\n    return sys.modules\n", "sys.modules reaches cannot be read"),
    ],
)
def test_a_name_of_which_the_text_does_not_say_one_meaning_is_an_error(package, text, words):
    with pytest.raises(ValueError, match=words):
        package(top=text)


def test_the_order_of_effects_a_table_written_beside_a_name_and_an_else_for_machines_count(package):
    run = "\ndef run():\n    return TABLE\n"
    one, other = "TABLE = {}\nTABLE['a'] = 1\nTABLE['a'] = 2\n", "TABLE = {}\nTABLE['a'] = 2\nTABLE['a'] = 1\n"
    assert package(top=one + run) != package(top=other + run)
    beside = "TABLE = {}\nTABLE['a'] = y = 1\n" + run
    assert package(top=beside) != package(top=beside.replace("= 1", "= 2"))
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import json\nelse:\n    TABLE = 1\n" + run
    assert package(top=typed) != package(top=typed.replace("= 1", "= 2"))
    assert package(top="S, *TABLE = 1, 2\n" + run) != package(top="*TABLE, S = 1, 2\n" + run)
