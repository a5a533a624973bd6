"""Zero-shot tasks: our definitions against lm-eval's own on the same documents, and our scores against plain logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from specquant.runtime import zeroshot
from specquant.runtime.artifact import open_artifact
from specquant.runtime.cli import main
from specquant.runtime.lm_eval_model import ArtifactLM, TorchLM
from specquant.runtime.session import load

ARC = [
    {
        "question": 'Which is "hot"?',
        "choices": {"text": ["the sun", "it's ice"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    {
        "question": "How many\nlegs?",
        "choices": {"text": ["2", "4 ", "six [6]", "none"], "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    },
]
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [
        {"text": 'He said "go" to Harlin,\nwho cares about  signs'},
        {"text": "{{ braces }} and the 'end' of it"},
    ],
    "hellaswag": [
        {
            "activity_label": "Roof removal",
            "ctx_a": "A man's on a roof [step] now.",
            "ctx_b": "he LOOKS",
            "endings": [' uses "wrap" [title] again', "rips  tiles off. [substeps] Good.", "'s", "d"],
            "label": "3",
        },
        {
            "activity_label": "[header] How",
            "ctx_a": "To cook [title] Rice",
            "ctx_b": "",
            "endings": ["a", "b"],
            "label": "0",
        },
    ],
    "piqa": [
        {"goal": "dresser", "sol1": "replace drawer ", "sol2": 'it\'s "wood"', "label": 1},
        {"goal": "How?", "sol1": "so", "sol2": "not so", "label": 0},
    ],
    "winogrande": [
        {
            "sentence": "Sarah was better than Maria so _ got the cases. ",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        {"sentence": '_\'s "dog" barked at it.', "option1": "O'Neil", "option2": "she", "answer": "1"},
    ],
    "boolq": [
        {"question": "is it so", "answer": True, "passage": "It is.\nSo.", "title": "So"},
        {"question": "is it", "answer": False, "passage": "No.", "title": "It"},
    ],
    "social_iqa": [
        {
            "context": "Tracy went.",
            "question": "Why?",
            "answerA": "a",
            "answerB": "b's",
            "answerC": 'c "c"',
            "label": "3",
        },
        {"context": "X", "question": "How?", "answerA": "1", "answerB": "2", "answerC": "3", "label": "1"},
    ],
    "arc_easy": ARC,
    "arc_challenge": ARC[::-1],
    "openbookqa": [
        {"question_stem": "Fog is around", "choices": ARC[0]["choices"], "answerKey": "A"},
        {"question_stem": "It's", "choices": ARC[1]["choices"], "answerKey": " 2"},
    ],
}


LM_EVAL = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


def lm_eval_task(name: str, documents: list[dict[str, Any]]) -> Any:
    """lm-eval's own definition, with these documents instead of the hub's."""
    if name == "boolq":  # SuperGLUE's columns
        documents = [
            {"passage": f"{d['title']} -- {d['passage']}", "question": d["question"], "label": int(d["answer"])}
            for d in documents
        ]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / LM_EVAL[name])
    data = Dataset.from_list(documents)
    splits = {split: data for split in ("train", "validation", "test")}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **metadata: splits})


@pytest.mark.parametrize("name", zeroshot.TASKS)
def test_definitions_equal_those_of_lm_eval(name: str, rng: np.random.Generator) -> None:
    documents = DOCUMENTS[name]
    ours, theirs = zeroshot.local_task(name, documents), lm_eval_task(name, documents)
    for task in (ours, theirs):
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
    assert [x.args for x in ours.instances] == [x.args for x in theirs.instances]
    assert (ours.OUTPUT_TYPE, ours.VERSION) == (theirs.OUTPUT_TYPE, theirs.VERSION)
    assert ours.aggregation() == theirs.aggregation()
    assert ours.higher_is_better() == theirs.higher_is_better()
    assert zeroshot.TASKS[name][0] in ours.aggregation()
    for our_document, their_document in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        count = 1 if ours.config.doc_to_choice is None else len(ours.doc_to_choice(our_document))
        for _ in range(20):
            scores = [(float(-x), bool(x > 0.5)) for x in rng.uniform(size=count)]
            assert ours.process_results(our_document, scores) == theirs.process_results(their_document, scores)


def requests(rng: np.random.Generator, count: int) -> list[Instance]:
    """Contexts that share beginnings, continuations of one token and of many; one is far beyond the context of 96."""
    words = ["The capital", " of France", " is Paris.", " Der Fluß", " fließt", " 日本", "の首都", " x"]
    pairs = [("".join(rng.choice(words, 5)), "".join(rng.choice(words, n))) for n in rng.integers(1, 4, count)]
    pairs += [
        (pairs[0][0], " is"),
        (pairs[0][0], " of France"),
        (pairs[0][0] + " ", "x"),
        ("", "The capital of France"),
    ]
    pairs.append((" ".join(rng.choice(words, 60)), " is Paris."))
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]


def test_scores_equal_lm_evals_own_model(
    llama: Any, tokenizer: Any, float_folder: Path, rng: np.random.Generator
) -> None:
    """The same weights in transformers, by lm-eval's class for it, which shares no cache between requests."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    theirs = HFLM(pretrained=llama, tokenizer=wrapped, batch_size=3, max_length=96)
    done: list[int] = []
    ours = ArtifactLM(load(float_folder, custom_ops=False), done.append)
    asked = requests(rng, 12)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], rtol=1e-4, atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(done) == len(asked)
    done.clear()
    in_torch = TorchLM(llama, wrapped, 200, done.append).loglikelihood(asked)
    np.testing.assert_allclose([s for s, _ in in_torch], [s for s, _ in expected], rtol=1e-4, atol=1e-3)
    assert [greedy for _, greedy in in_torch] == [greedy for _, greedy in expected]
    assert sum(done) == len(asked)


def test_greedy_is_what_the_model_would_write(float_folder: Path) -> None:
    model = load(float_folder, custom_ops=False)
    ids = model.encode("The capital of France").tolist()
    written: list[int] = []
    for _ in range(5):
        written.append(int(model.logits(ids + written)[-1].argmax()))
    lm = ArtifactLM(model)
    scored = lm._loglikelihood_tokens(
        [(("", ""), ids, written), (("", ""), ids, [*written[:4], (written[4] + 1) % 320])]
    )
    assert [greedy for _, greedy in scored] == [True, False]


def write_data(folder: Path, names: list[str]) -> None:
    for name in names:
        lines = [json.dumps(document, ensure_ascii=False) for document in DOCUMENTS[name]]
        (folder / zeroshot.TASKS[name][1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_command(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    names = ["winogrande", "arc_easy", "lambada_openai"]
    write_data(tmp_path, names)
    common = [
        "eval",
        "zeroshot",
        str(folder),
        "--data-dir",
        str(tmp_path),
        "--tasks",
        ",".join(names),
        "--no-custom-ops",
    ]
    assert main([*common, "--json", "--record", "-q"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    tasks = found["tasks"]
    assert list(tasks) == names
    assert tasks["arc_easy"]["metric"] == "acc_norm"
    assert set(tasks["arc_easy"]["values"]) == {"acc", "acc_norm"}
    assert set(tasks["lambada_openai"]["values"]) == {"acc", "perplexity"}
    assert all(task["documents"] == 2 for task in tasks.values())
    values = [task["values"][task["metric"]] for task in tasks.values()]
    assert found["average"] == pytest.approx(np.mean(values))
    # The same by hand, one request at a time through the whole model.
    model, right = load(folder, custom_ops=False), 0
    task = zeroshot.local_task("arc_easy", DOCUMENTS["arc_easy"])
    for document in task.eval_docs:
        context = f"Question: {document['question']}\nAnswer:"
        normed = []
        for choice in document["choices"]["text"]:
            prefix, ids = model.encode(context), model.encode(f"{context} {choice}")
            logits = model.logits(ids)[len(prefix) - 1 : -1].astype(np.float64)
            chosen = logits[np.arange(len(logits)), ids[len(prefix) :]]
            normed.append(float((chosen - np.log(np.exp(logits).sum(-1))).sum()) / len(choice))
        right += document["choices"]["label"][int(np.argmax(normed))] == document["answerKey"]
    assert tasks["arc_easy"]["values"]["acc_norm"] == right / 2
    assert open_artifact(folder).evaluation["zeroshot"]["average"] == found["average"]
    assert main(["inspect", str(folder)]) == 0
    assert f"{100 * found['average']:.2f} % on average of 3 tasks" in capsys.readouterr().out
    assert main([*common, "--limit", "1", "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "%", "±", "documents"]
    assert [line.split()[-1] for line in lines[1:4]] == ["1", "1", "1"]


def test_float_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tests.model_folder import random_llama, save_model_folder

    source = save_model_folder(tmp_path / "source", random_llama(5))
    write_data(tmp_path, ["boolq", "winogrande"])
    common = ["eval", "zeroshot", str(source), "--data-dir", str(tmp_path), "--tasks", "boolq,winogrande", "-q"]
    assert main([*common, "--json", "--batch-tokens", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert set(found["tasks"]) == {"boolq", "winogrande"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_easy,mmlu"], "there is no task 'mmlu'"),
        (["--tasks", "piqa", "--data-dir", "{tmp}"], "piqa_validation.jsonl cannot be read: No such file"),
        (["--tasks", "boolq", "--data-dir", "{tmp}"], "line 2 of"),
        (["--tasks", "winogrande", "--data-dir", "{tmp}"], "line 1 of"),
        (["--tasks", "arc_easy", "--data-dir", "{tmp}"], "is empty"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--batch-tokens", "0"], "--batch-tokens must be 1 or more"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "boolq_validation.jsonl").write_text(json.dumps(DOCUMENTS["boolq"][0]) + "\nnot JSON\n")
    (tmp_path / "winogrande_xl_validation.jsonl").write_text('{"sentence": "a _ b", "option1": "a"}\n')
    (tmp_path / "arc_easy_test.jsonl").write_text("")
    code = main(["eval", "zeroshot", str(folder), "-q", *(item.format(tmp=tmp_path) for item in arguments)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert message in error
