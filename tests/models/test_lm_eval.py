"""A merged folder in lm-evaluation-harness: its "hf" model gives log-likelihoods of the merged weights. `make test-lm-eval`."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from vocabularies import write_model

from samerge_ext.cli.commands import app

PYTHON = os.environ.get("LM_EVAL_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs lm-evaluation-harness in an environment of its own: make test-lm-eval")

WORDS = ["<end>", "a", "b", "c", "d"]
QUESTIONS = [("a b c", ["d", "a a"]), ("d d", ["c", "b"]), ("a", ["a b", "d c b"])]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
PROGRAM = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, tasks = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": folder, "dtype": "float64"}, tasks=["tiny"], device="cpu", bootstrap_iters=0,
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
)
samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
print(json.dumps([[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in samples]))
"""


def test_the_harness_reads_a_merged_folder(tmp_path):
    for seed, name in enumerate(("one", "two")):
        write_model(tmp_path / name, WORDS, seed=seed)
        config = tmp_path / name / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<end>"}))
    models = ", ".join(f"{{model: {tmp_path / name}, parameters: {{weight: 0.5}}}}" for name in ("one", "two"))
    (tmp_path / "merge.yaml").write_text(f"merge_method: linear\nmodels: [{models}]\ndtype: float32\n")
    run = CliRunner().invoke(app, ["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "merged")])
    assert run.exit_code == 0, run.output

    (tmp_path / "tasks").mkdir()
    questions = [{"question": question, "choices": choices} for question, choices in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tasks/tiny.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [PYTHON, "-c", PROGRAM, str(tmp_path / "merged"), str(tmp_path / "tasks")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    parts = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_((parts[0][name].double() + parts[1][name].double()) / 2)
        expected = [[likelihood(model, question, choice) for choice in choices] for question, choices in QUESTIONS]
    for found, wanted in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def likelihood(model, question, choice):
    """log p(choice | question) of the model."""
    ids, given = (torch.tensor([[WORDS.index(word) for word in text.split()]]) for text in (f"{question} {choice}", question))
    log_p = model(ids).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, ids[0, 1:, None])[given.shape[1] - 1 :].sum().item()
