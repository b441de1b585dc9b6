"""The LLaMA table's pattern: no adapter, LoRA of rank 1 and a much smaller NOLA, on every linear layer but the head.

The states below the adapted layers come first. Then a run of one seed for each learning rate and method; of the same
number of rates each method gets that with the smallest validation loss. Then the arms by seed, which fixes the start
and the order of the texts. The questions are answered after the last step; they choose nothing.

An instruction is put in the model's chat template, with an empty system turn, or, without one, in Alpaca's form. Of the
four answers to a question, that with the largest mean log-probability of a token is the model's; the sum is measured
too.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, models
from limbeck.adapters.factor import require_read_back
from limbeck.experiments.nola import arms, frozen_decoder, texts
from limbeck.experiments.nola.arms import AdapterSettings, Model
from limbeck.experiments.nola.frozen_decoder import FrozenDecoder, Loop, TextSettings
from limbeck.experiments.nola.texts import Pair, Texts
from limbeck.experiments.runs import Cell, Result, Workspace, best, result
from limbeck.models import language
from limbeck.params import one_of, positive
from limbeck.sampling import Tokens
from limbeck.tasks import instructions
from limbeck.tasks.instructions import Asked, Question
from limbeck.training.supervised import Terms

ARMS = ("none", "lora_1", "nola")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_UNTRAINED = "none"
_BLOCK = 64  # weights that share a scale in NF4
_PLAIN = "### Instruction:\n{}\n\n### Response:"


@dataclass(frozen=True)
class InstructionSettings:
    """How a decoder is asked; sources stand in params/nola.yaml.

    With `base_bits` 4 the frozen model is held in NF4, its scales quantised too, and multiplied in bfloat16, as in the
    paper's released scripts (QLoRA, arXiv 2305.14314); with 32 as it comes.
    """

    questions: str
    base_bits: int
    chat: bool
    longest_prompt: int

    def __post_init__(self) -> None:
        positive(longest_prompt=self.longest_prompt)
        one_of("base_bits", self.base_bits, (4, 32))


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there. Of the seeds, the first `replicates` are used.

    `split_sizes` as in `instructions.load`. Gradients of a batch are computed `micro_texts` texts at a time, which
    changes their last bits alone.
    """

    texts: TextSettings
    asking: InstructionSettings
    adapters: AdapterSettings
    loop: Loop
    nola_share: float
    micro_texts: int
    arms: tuple[str, ...]
    lora_rates: tuple[float, ...]
    nola_rates: tuple[float, ...]
    selection_seed: int
    replicates: int

    def __post_init__(self) -> None:
        positive(nola_share=self.nola_share, micro_texts=self.micro_texts)
        instructions.require_pair(self.texts.data, self.asking.questions)
        for arm in self.arms:
            one_of("arm", arm, ARMS)
        if not 0 < len(self.lora_rates) == len(self.nola_rates):
            raise ValueError(f"received rates {self.lora_rates} and {self.nola_rates}, expected as many of each")

    def rates(self, arm: str) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return {_UNTRAINED: (0.0,), "lora_1": self.lora_rates}.get(arm, self.nola_rates)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The states, the choice of each arm's rate, then the arms by seed. Raises ValueError for too few seeds."""
    inputs = frozen_decoder.shared_inputs(params, seeds, ("arms", "replicates"))
    planned = frozen_decoder.state_cells(params.texts, inputs)
    for arm in params.arms:
        for rate in params.rates(arm):
            coordinates = {"phase": "selection", "arm": arm, "learning_rate": rate, "seed": params.selection_seed}
            planned.append(Cell(coordinates, inputs, wave=1))
    for seed in seeds[: params.replicates]:
        planned += [Cell({"phase": "final", "arm": arm, "seed": seed}, inputs, wave=2) for arm in params.arms]
    return planned


def run(cell: Cell, params: Params, workspace: Workspace) -> Generator[dict[str, float], None, Result]:
    """Run one cell; yields once per step."""
    decoder, coordinates = InstructionDecoder(params.texts, workspace, params.asking), cell.coordinates
    if coordinates["phase"] == frozen_decoder.STATES:
        return (yield from frozen_decoder.write_states(cell, decoder))
    arm, final = coordinates["arm"], coordinates["phase"] == "final"
    if arm == _UNTRAINED and final:  # the same for every seed: as measured once
        yield {"step": 1, "steps": 1}
        measured = (record for record in workspace.records if record["cell"]["arm"] == arm)
        (record,) = (record for record in measured if record["cell"]["phase"] == "selection")
        return Result(record["metrics"], {}, 0, record["dtype"])
    rate = _chosen_rate(arm, workspace) if final else coordinates["learning_rate"]
    model, curve = _attached(arm, decoder, params, coordinates["seed"]), {}
    if arm == _UNTRAINED:
        yield {"step": 1, "steps": 1}
    else:
        loss = in_parts(decoder.train_loss(model), decoder.texts["train"], params.micro_texts)
        curve = yield from decoder.fit(model, loss, params.loop, learning_rate=rate, seed=coordinates["seed"])
    metrics = {"adapter/learning_rate": rate, "adapter/parameters": float(arms.trainable_count(model))}
    metrics["validation/loss"] = decoder.loss(model, "validation")
    if final or arm == _UNTRAINED:
        metrics |= {"train/loss": decoder.loss(model, "train"), **decoder.accuracies(model)}
        metrics["validation/gap"] = metrics["validation/loss"] - metrics["train/loss"]
    return result(metrics, curve, weights=models.trainable(model), dtype=decoder.workspace.dtype)


def _attached(arm: str, decoder: "InstructionDecoder", params: Params, seed: int) -> Model:
    layers, share = params.texts.layers, params.nola_share
    return arms.attach(
        arm, decoder.load(), params.adapters, seed=seed, layers=layers, share=share, targets=LINEAR_LAYERS
    )


def _chosen_rate(arm: str, workspace: Workspace) -> float:
    where = {"phase": "selection", "arm": arm}
    return best(workspace.records, where, "learning_rate", ["validation/loss"], highest=[False])


@dataclass(frozen=True)
class Data:
    """The texts in tokens."""

    settings: TextSettings
    asking: InstructionSettings
    tokenizer: PreTrainedTokenizerBase
    train: list[Asked]
    validation: list[Asked]
    questions: list[Question]

    def prompt(self, text: str, *, plain: bool) -> Tokens:
        """An instruction in the section's form, or a plain text, as its last tokens."""
        if self.asking.chat and not plain:
            turns = [{"role": "system", "content": ""}, {"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer(text if plain else _PLAIN.format(text))["input_ids"]
        return tuple(ids[-self.asking.longest_prompt :])

    def answer(self, text: str, *, plain: bool) -> Tokens:
        """What follows a prompt, without an end token; after a space, where no turn of a chat has begun."""
        spaced = text if self.asking.chat and not plain else f" {text}"
        return tuple(self.tokenizer(spaced, add_special_tokens=False)["input_ids"])

    def pair(self, asked: Asked) -> Pair:
        """An instruction and its answer, which ends in the end token unless it is cut."""
        end = language.solution_end(self.tokenizer, chat=self.asking.chat)
        target = (*self.answer(asked.text, plain=False), end)
        return Pair(self.prompt(asked.instruction, plain=False), target[: self.settings.longest])

    @functools.cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """What is learned, what the loss is measured on, and every choice of every question."""
        parts = {name: [self.pair(asked) for asked in getattr(self, name)] for name in ("train", "validation")}
        parts["choices"] = [
            Pair(self.prompt(question.prompt, plain=question.plain), self.answer(choice, plain=question.plain))
            for question in self.questions
            for choice in question.choices
        ]
        return parts


@functools.lru_cache(maxsize=2)
def prepare(settings: TextSettings, asking: InstructionSettings) -> Data:
    """The texts and questions in tokens. Raises ValueError for `chat` with a tokenizer that has no template."""
    parts = instructions.load(
        settings.data,
        asking.questions,
        settings.split_sizes,
        train_texts=settings.train_texts,
        references=settings.references,
        seed=settings.split_seed,
    )
    words = (text for asked in parts[0] for text in (_PLAIN.format(asked.instruction), asked.text))
    tokenizer = language.load_tokenizer(settings.model, words)
    if asking.chat and tokenizer.chat_template is None:
        raise ValueError(f"received chat: true, expected a chat template with the tokenizer of {settings.model}")
    return Data(settings, asking, tokenizer, *parts)


@dataclass(frozen=True)
class InstructionDecoder(FrozenDecoder):
    """A frozen decoder that follows instructions, and which of four answers it finds likeliest."""

    asking: InstructionSettings

    @functools.cached_property
    def data(self) -> Data:
        """The texts and questions, in words and in tokens."""
        return prepare(self.settings, self.asking)

    def load(self) -> PreTrainedModel:
        """The model, frozen."""
        if self.asking.base_bits == 4:
            return in_four_bits(self.settings.model, self.workspace.device)
        return super().load()

    def accuracies(self, model: Model) -> dict[str, float]:
        """The share of questions whose right answer is the likeliest: by the mean over its tokens, and by their sum."""
        logprobs = choice_logprobs(model, self.texts["choices"], self.workspace.dtype)
        questions, start, right = self.data.questions, 0, {"accuracy": 0, "accuracy_of_sums": 0}
        for question in questions:
            mine, start = logprobs[start : start + len(question.choices)], start + len(question.choices)
            for name, values in {
                "accuracy": [x.mean() for x in mine],
                "accuracy_of_sums": [x.sum() for x in mine],
            }.items():
                right[name] += int(models.likeliest(torch.stack(values))) == question.answer
        return {f"test/{name}": count / len(questions) for name, count in right.items()}


def in_four_bits(name: str, where: torch.device) -> PreTrainedModel:
    """A decoder from a local folder or the hub, frozen, its linear layers but the head in NF4; needs bitsandbytes.

    Raises ValueError for a layer whose rows are no whole blocks, narrower than one or not a multiple: their weights are
    read back wrong by a fifth, without a word, by bitsandbytes 0.50 on CPUs with AVX-512.
    """
    form = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**form, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        assets.source(name), quantization_config=config, dtype=torch.bfloat16, device_map={"": str(where)}
    )
    model.eval().requires_grad_(False)
    for path, layer in model.named_modules():
        if hasattr(getattr(layer, "weight", None), "quant_state") and layer.in_features % _BLOCK:
            raise ValueError(f"received {path} of {layer.in_features} inputs, expected a multiple of {_BLOCK}")
        require_read_back(layer, path)
    return model


def in_parts(loss: Callable[[Tensor], Terms], learned: Texts, size: int) -> Callable[[Tensor], Terms]:
    """The same mean over a batch's tokens from `size` texts at a time, each computed again in the backward."""

    def whole(rows: Tensor) -> Terms:
        if len(rows) <= size:
            return loss(rows)
        counts = torch.tensor([len(learned.pairs[row].target) for row in rows.tolist()])
        total = torch.zeros(())
        for part, count in zip(rows.split(size), counts.split(size), strict=True):
            value = checkpoint(lambda some: loss(some)["loss/ce"], part, use_reentrant=False, preserve_rng_state=False)
            total = total.to(value) + value * (count.sum() / counts.sum()).to(value)
        return {"loss/ce": total}

    return whole


@torch.no_grad()
def choice_logprobs(model: Model, choices: Texts, dtype: torch.dtype) -> list[Tensor]:
    """log p of each token of each target, in nats."""
    by_row: dict[int, Tensor] = {}
    for rows in texts.by_length(choices.pairs):
        some = choices.rows(rows)
        with models.autocast(model.device, dtype):
            logits, tokens = texts.target_logits(model, some)
        values = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        by_row |= dict(zip(rows, values.split([len(pair.target) for pair in some.pairs]), strict=True))
    return [by_row[row] for row in range(len(choices))]
