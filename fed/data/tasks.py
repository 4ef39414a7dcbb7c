"""Classification tasks of GLUE: how a row is put to a language model, and the words that stand for the labels.

(Wang et al. 2018, arXiv 1804.07461. STS-B is a regression and has no label words, so it is not among them.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fed.data.template import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueTask:
    """A task of GLUE.

    Attributes:
        name: As the hub calls it.
        prompt: Template of what the model reads.
        words: Label words by label; labels are told as text.
        numbers: Labels by the number the hub has for them; in that order.
    """

    name: str
    prompt: str
    words: Mapping[str, str]
    numbers: tuple[str, ...] = field(default=("0", "1"))

    def template(self) -> Template:
        """The task's template for rows with a `label` field."""
        return Template(prompt=self.prompt, response="{label}", label="{label}", group=self.name, choices=self.words)


_YES_NO: Final = {"1": " yes", "0": " no"}
_ENTAILED: Final = {"entailment": " yes", "not_entailment": " no"}

GLUE: Final[Mapping[str, GlueTask]] = {
    task.name: task
    for task in (
        GlueTask(
            name="sst2",
            prompt="Review: {sentence}\nSentiment:",
            words={"0": " negative", "1": " positive"},
        ),
        GlueTask(
            name="qnli",
            prompt="Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question? Answer:",
            words=_ENTAILED,
            numbers=("entailment", "not_entailment"),
        ),
        GlueTask(
            name="qqp",
            prompt="Question 1: {question1}\nQuestion 2: {question2}\nDo both ask the same? Answer:",
            words=_YES_NO,
        ),
        GlueTask(
            name="mrpc",
            prompt="Sentence 1: {sentence1}\nSentence 2: {sentence2}\nDo both say the same? Answer:",
            words=_YES_NO,
        ),
        GlueTask(
            name="rte",
            prompt="Text: {sentence1}\nClaim: {sentence2}\nDoes the claim follow from the text? Answer:",
            words=_ENTAILED,
            numbers=("entailment", "not_entailment"),
        ),
        GlueTask(
            name="wnli",
            prompt="Text: {sentence1}\nClaim: {sentence2}\nDoes the claim follow from the text? Answer:",
            words=_YES_NO,
        ),
        GlueTask(
            name="cola",
            prompt="Sentence: {sentence}\nIs the sentence grammatical? Answer:",
            words=_YES_NO,
        ),
        GlueTask(
            name="mnli",
            prompt="Text: {premise}\nClaim: {hypothesis}\nIs the claim true, unknown or false? Answer:",
            words={"entailment": " true", "neutral": " unknown", "contradiction": " false"},
            numbers=("entailment", "neutral", "contradiction"),
        ),
    )
}
"""Tasks by name."""
