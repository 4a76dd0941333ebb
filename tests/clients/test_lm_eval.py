"""lm-evaluation-harness: the results of its own model class, with few-shot examples computed once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import ConfigError, PromptError, attach, detach
from tests.model._lab import BLOCK, Lab, random_ids, run, tokens

if TYPE_CHECKING:
    from pathlib import Path

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

# ruff: noqa: E402
# pyright: reportMissingImports=false
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager

from kvembed.lm_eval import KVEmbedLM

HFLM: Any = huggingface.HFLM  # its decorator makes it any LM for type checkers

SHOTS = 3
QUESTIONS = [
    ("Which of these lives in water?", ["a trout", "a finch", "an ant", "a goat"], 0),
    ("Which of these can fly?", ["a trout", "a finch", "a worm", "a goat"], 1),
    ("Which has eight legs?", ["a dog", "a gull", "an ant", "a spider"], 3),
    ("Which gives milk?", ["a snake", "a finch", "a goat", "a bee"], 2),
    ("Which makes honey?", ["a bee", "a finch", "a cow", "a goat"], 0),
    ("Which sleeps through winter?", ["a gull", "a bear", "a cow", "a trout"], 1),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A task of each kind of request, with data in local files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    for name, part in (("shots", rows[:SHOTS]), ("test", rows[SHOTS:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(folder / f"{name}.jsonl") for name in ("shots", "test")}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    few = {"fewshot_split": "shots", "num_fewshot": SHOTS, "fewshot_config": {"sampler": "first_n"}}
    question = "Question: {{question}}\nAnswer:"
    return {
        "choices": {
            **common,
            **few,
            "task": "choices",
            "output_type": "multiple_choice",
            "description": "The following are questions about animals.\n\n",
            "doc_to_text": question,
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "texts": {
            **common,
            **few,
            "task": "texts",
            "output_type": "generate_until",
            "doc_to_text": question,
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        "whole": {
            **common,
            "task": "whole",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{choices}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }


def options() -> dict[str, Any]:
    """Arguments of every evaluation: without the harness's own tasks, whose 14,000 files take half a minute to read."""
    return {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}


def evaluate(model: Any, task: dict[str, Any]) -> tuple[dict[str, float], list[Any]]:
    """Return the metrics, and the model's raw answers document by document."""
    found = lm_eval.simple_evaluate(model=model, tasks=[task], log_samples=True, **options())
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    metrics = {name: value for name, value in found["results"][task["task"]].items() if isinstance(value, float)}
    return metrics, [sample["resps"] for sample in samples]


def assert_same(ours: Any, theirs: Any) -> None:
    """Numbers within 1e-3, texts and flags equal."""
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-3)
    else:
        assert ours == theirs


def requests(*pairs: tuple[Any, ...], kind: str = "loglikelihood") -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_choices_with_examples(lab: Lab, request: Any, tiny_tokenizer: Any, tasks: Any, family: str) -> None:
    make = request.getfixturevalue(f"tiny_{family}")
    theirs = evaluate(HFLM(make(), tokenizer=tiny_tokenizer), tasks["choices"])
    model = KVEmbedLM(lab.wrap(make(), tokenizer=tiny_tokenizer))
    ours = evaluate(model, tasks["choices"])
    assert ours[0] == theirs[0]
    assert {"acc,none", "acc_norm,none"} <= set(ours[0])
    assert_same(ours[1], theirs[1])
    # Description and examples were computed for the first question only; every context once for its four answers.
    questions = len(QUESTIONS) - SHOTS
    lengths = [len(f"Question: {question}\nAnswer:") for question, _, _ in QUESTIONS[SHOTS:]]
    shared = model.prompt_tokens // questions - max(lengths)
    assert shared > 10 * BLOCK
    assert model.cached_tokens >= (questions - 1) * shared
    assert model.prompt_tokens - model.cached_tokens < shared + sum(lengths) + questions * BLOCK
    # Another evaluation, of the same questions, computes next to nothing.
    before = model.cached_tokens
    assert evaluate(model, tasks["choices"])[0] == theirs[0]
    computed = model.prompt_tokens // 2 - (model.cached_tokens - before)
    # All but the last token, or, where windows keep a live cache from being cut back, but for less than two blocks.
    assert computed == questions if family == "llama" else computed < questions * 2 * BLOCK


@pytest.mark.parametrize("task", ["texts", "whole"])
def test_texts_and_perplexity(lab: Lab, tiny_llama: Any, tiny_tokenizer: Any, tasks: Any, task: str) -> None:
    theirs = evaluate(HFLM(tiny_llama(), tokenizer=tiny_tokenizer), tasks[task])
    cached = lab.wrap(tiny_llama(), tokenizer=tiny_tokenizer)
    ours = evaluate(KVEmbedLM(cached), tasks[task])
    assert_same(list(ours[0].values()), list(theirs[0].values()))
    assert_same(ours[1], theirs[1])
    if task == "texts":
        assert cached.usage.bypass_reason is None
        assert cached.usage.cached_tokens > 10 * BLOCK
        assert all("e" not in text and len(text) <= 12 for [[text]] in ours[1])


def test_contexts_that_do_not_fit_are_cut_as_hf_cuts_them(lab: Lab, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    pairs = [("x" * n + "abc", " " + "d" * m) for n in (30, 56, 61, 90) for m in (1, 2, 7)] + [
        ("", "alone"),
        ("", "<|bos|>b"),
    ]
    windows = [("The sky above the port was the colour of television, tuned to a dead channel. " * 3,)]
    generated = [("y" * n, {"until": ["q"], "max_gen_toks": 20}) for n in (10, 70)]
    model = tiny_llama(max_position_embeddings=64)
    # What the model would write itself, and nearly that.
    prompt = random_ids(20)
    greedy = tokens(run(model, prompt, 4))[-4:]
    known = [(("", ""), prompt[0].tolist(), ids) for ids in (greedy, greedy[:1], [*greedy[:3], (greedy[3] + 1) % 250])]
    theirs, ours = (
        [
            harness.loglikelihood(requests(*pairs)),
            harness.loglikelihood_rolling(requests(*windows, kind="loglikelihood_rolling")),
            harness.generate_until(requests(*generated, kind="generate_until")),
            harness._loglikelihood_tokens(known),
        ]
        for harness in (
            HFLM(model, tokenizer=tiny_tokenizer),
            KVEmbedLM(lab.wrap(model), tokenizer=tiny_tokenizer),
        )
    )
    assert_same(ours, theirs)
    assert [is_greedy for _, is_greedy in ours[-1]] == [True, True, False]


def test_by_its_name_with_a_store_of_its_own(
    lab: Lab, tiny_llama: Any, tiny_tokenizer: Any, tasks: Any, tmp_path: Path
) -> None:
    folder = str(tmp_path / "model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    arguments = f"pretrained={folder},store={tmp_path / 'cache'},block_size={BLOCK}"
    found = [
        lm_eval.simple_evaluate(name, args, [tasks["choices"]], batch_size=1, device="cpu", **options())
        for name, args in (("hf", f"pretrained={folder}"), ("kvembed", arguments))
    ]
    assert found[0]["results"]["choices"]["acc,none"] == found[1]["results"]["choices"]["acc,none"]
    assert found[1]["config"]["kvembed_cached_tokens"] > found[1]["config"]["kvembed_prompt_tokens"] / 2
    assert (tmp_path / "cache" / "blocks").is_dir()


def test_an_attached_model_and_wrong_options(lab: Lab, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    cached = attach(model, tiny_tokenizer, store=lab.store(), block_size=BLOCK, progress=False)
    try:
        harness = KVEmbedLM(model)
        assert harness.cached_model is cached
        assert harness.tokenizer is tiny_tokenizer
        with pytest.raises(ConfigError, match="cache_salt: this model has a cache already"):
            KVEmbedLM(model, cache_salt="x")
        with pytest.raises(ConfigError, match="softmax_dtype"):
            KVEmbedLM(model, softmax_dtype="float32")
        with pytest.raises(ConfigError, match="causal"):
            KVEmbedLM(model, backend="seq2seq")
        with pytest.raises(PromptError, match="0 tokens"):
            harness.loglikelihood(requests(("context", "")))
    finally:
        detach(model)


def test_without_the_harness_the_pip_line_is_named() -> None:
    code = "import sys; sys.modules['lm_eval'] = None\nimport kvembed\nimport kvembed.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: kvembed.lm_eval needs lm-evaluation-harness: pip install 'kvembed[lm-eval]'" in done.stderr


def test_the_command_line_is_that_of_the_harness() -> None:
    done = subprocess.run([sys.executable, "-m", "kvembed.lm_eval", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "lm-eval run" in done.stdout
