"""A learned merge within a memory budget, by each way to hold it: planned and measured peak memory, seconds per SAM step.

    python benchmarks/large_models.py                         # ~300 M parameters, 8 experts, CPU; a few minutes, 6 GB of disk
    python benchmarks/large_models.py --device cuda --shape 7B --cap 24GiB --task-vectors int4 --ways host,smallest
    python benchmarks/large_models.py --device cuda --shape 1B

A model of Llama's shape with random weights. The packed file is written by this script (a real one is made from folders with
PackedWeights.from_folders(file=)); then every way runs in a process of its own, under a budget:

    resident             none
    memory, host         what its plan says it needs: everything in memory, merged unit by unit
    quarter              a quarter of what the resident way needs
    own-weights          the same, for a model that comes with weights in memory; the others have none before they are merged
    smallest             what the least way needs: only a packed file, in small pieces, fits

On the CPU the peak is the process's largest resident memory (VmHWM), Python, torch and transformers included; on a GPU that of
torch's allocator, which --cap limits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

SHAPES = {  # hidden, intermediate, layers, heads, vocabulary; experts, batch, tokens, steps
    "test": (256, 704, 10, 4, 4096, 6, 2, 16, 2),
    "300M": (1024, 2816, 20, 16, 32000, 8, 1, 32, 2),
    "1B": (2048, 5632, 22, 32, 32000, 8, 2, 128, 3),
    "7B": (4096, 11008, 32, 32, 32000, 8, 2, 128, 3),
}
RESULTS = Path(__file__).parent / "results"


def llama(shape: str, with_weights: bool = False):
    """The model, by default without memory for its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from samerge_ext.models import parameters_on_meta

    hidden, intermediate, layers, heads, vocabulary, *_ = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    if with_weights:
        torch.ones(32 << 20, dtype=torch.uint8)  # freed: from now on malloc puts weights up to this size into its heap
    with nullcontext() if with_weights else parameters_on_meta():
        return LlamaForCausalLM(config)


def write_packed(path: Path, shape: str, form: str) -> None:
    """Random weights as a packed file: base in fp32, task vectors in bf16 or quantised, layer by layer."""
    import torch

    from samerge_ext.checkpoint_files import SAFETENSORS_CODES
    from samerge_ext.layout import Layout
    from samerge_ext.packed_file import PackedFileWriter, rows_of
    from samerge_ext.quantised import QuantisedTaskVectors

    module = llama(shape)
    layers = dict(module.named_parameters())
    experts = [f"task{t}" for t in range(SHAPES[shape][5])]
    shapes, dtypes = [p.shape for p in layers.values()], [torch.float32] * len(layers)
    layout = Layout.build(list(layers), shapes, dtypes, [True] * len(layers))
    of_tasks = {f"{kind}/{t}": {} for kind in ("buffers", "heads") for t in range(len(experts))}
    about = {
        "folder": str(path.parent),
        "experts": {},
        "form": None if form == "bf16" else form,
        "identity": {},
        "tasks": experts,
        "names": list(layers),
        "shapes": [list(each) for each in shapes],
        "dtypes": [SAFETENSORS_CODES[each] for each in dtypes],
        "packed": [True] * len(layers),
        "aliases": {"lm_head.weight": "model.embed_tokens.weight"},
        "small": {"unchanged": {}, "buffers": {}, **of_tasks},
    }
    rows = rows_of(len(experts), torch.float32, about["form"] or torch.bfloat16)
    writer = PackedFileWriter(path, layout, rows, {}, about)
    generator = torch.Generator().manual_seed(0)
    for layer, parameter in enumerate(layers.values()):
        if parameter.dim() == 1:
            base = torch.ones(parameter.shape)
        else:
            base = torch.randn(parameter.shape, generator=generator).mul_(0.02)
        # Random numbers are dear: task vectors are one draw, turned, with a different sign pattern for every task.
        draw = torch.randn(parameter.numel(), generator=generator).mul_(0.004).to(torch.bfloat16)
        task_vectors = (draw.roll(977 * t) * (-1) ** t for t in range(len(experts)))
        if about["form"]:
            codes = QuantisedTaskVectors.zeros(len(experts), layout.extent(layer)[1], form)
            for t, task_vector in enumerate(task_vectors):
                codes.write(t, 0, task_vector)
            task_vectors = [*codes.codes, *codes.scales]
        writer.write(layer, [base, *task_vectors])
    writer.finish()


def measure(arguments: argparse.Namespace) -> dict:
    """One way, in this process."""
    import torch

    import samerge_ext as sm
    from samerge_ext.memory import peak_resident_bytes
    from samerge_ext.plan import PLAN_FILE, parse_bytes, plan

    *_, experts, batch, tokens, steps = SHAPES[arguments.shape]
    device = torch.device(arguments.device)
    if device.type == "cuda" and arguments.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(arguments.cap) / total))
    packed = sm.PackedWeights.open(packed_path(arguments), device=device, verify=False)
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[arguments.shape][4]
    batches = {t: [torch.randint(vocabulary, (batch, tokens), generator=generator)] for t in packed.tasks}
    # The tasks share all of the model: one batch of all of them, so that every unit is merged twice a pass, not twice a task.
    logits = sm.models.SharedEncoder(lambda module, ids: module(input_ids=ids).logits[:, -1], lambda rows, task: rows)
    settings = {"steps": steps, "learning_rate": 1e-2, "progress": False, "device": str(device)}
    if arguments.plan_only:
        ways = plan(llama(arguments.shape), packed, batches, logits, sm.SAMergingConfig(**settings)).ways
        return {"ways": [{"name": w.name, "store": w.store, "bytes": w.device_bytes, "moved": w.moved} for w in ways]}

    times = []
    from samerge_ext import learning

    make_passes = learning.make_passes

    def timed_passes(*args):
        passes = make_passes(*args)

        def run(*inputs):
            started = time.perf_counter()
            outputs = passes(*inputs)
            outputs[0].sum().item()  # waits for the device
            times.append(time.perf_counter() - started)
            return outputs

        return run

    learning.make_passes = timed_passes
    state = arguments.work / f"state-{arguments.way}"
    (state / PLAN_FILE).unlink(missing_ok=True)
    (state / "state.pt").unlink(missing_ok=True)
    config = sm.SAMergingConfig(**settings, memory_budget=arguments.budget, checkpoint_dir=state)
    module = llama(arguments.shape, with_weights=arguments.way == "own-weights")
    result = sm.samerging(module, packed, batches, logits, config=config)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = peak_resident_bytes()  # rusage would count the parent's, from before the exec
    way = json.loads((state / PLAN_FILE).read_text())["way"]
    return {
        "way": arguments.way,
        "plan": way,
        "memory_budget": parse_bytes(arguments.budget),
        "planned_bytes": way["device_bytes"],
        "measured_bytes": peak,
        "seconds_per_step": min(times),
        "seconds_of_steps": times,
        "coefficients": result.coefficients.flatten().tolist(),
    }


def packed_path(arguments: argparse.Namespace) -> Path:
    return arguments.work / f"{arguments.shape}-{arguments.task_vectors}.packed"


def in_a_process(arguments: argparse.Namespace, **options) -> dict:
    command = [sys.executable, __file__, "--shape", arguments.shape, "--device", arguments.device, "--work", str(arguments.work)]
    command += ["--task-vectors", arguments.task_vectors]
    command += ["--cap", arguments.cap] if arguments.cap else []
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="300M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cap", help="the most memory that the process may take of a GPU, such as 24GiB")
    parser.add_argument("--task-vectors", choices=("bf16", "int8", "int4"), default="bf16", help="how they are stored")
    parser.add_argument("--work", type=Path, default=Path(".cache-large-models"), help="folder of the packed file")
    parser.add_argument("--ways", default="resident,memory,quarter,own-weights,smallest", help="which, and host")
    parser.add_argument("--out", type=Path, help="JSON to write; by default in benchmarks/results")
    for internal in ("--budget", "--way"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--plan-only", action="store_true", help="print what every way would take")
    arguments = parser.parse_args()
    if arguments.way or arguments.plan_only:
        print(json.dumps(measure(arguments)))
        return

    from report import environment

    from samerge_ext.plan import show

    arguments.work.mkdir(parents=True, exist_ok=True)
    packed = packed_path(arguments)
    if not packed.exists():
        write_packed(packed, arguments.shape, arguments.task_vectors)
    planned = in_a_process(arguments, plan_only=True)["ways"]
    resident = planned[0]["bytes"]
    slack = 1.03  # what the process takes before the plan is not the same to the byte from run to run
    budgets = {
        "resident": "1000TB",
        "memory": int(slack * next(way["bytes"] for way in planned if way["name"] == "streamed from memory")),
        "host": int(slack * next((way["bytes"] for way in planned if way["store"] == "host"), 1)),
        "quarter": resident // 4,
        "own-weights": resident // 4,
        "smallest": int(slack * planned[-1]["bytes"]),
    }
    rows = []
    for name in arguments.ways.split(","):
        row = in_a_process(arguments, way=name, budget=budgets[name])
        rows.append(row)
        print(
            f"{name:11} {show(row['planned_bytes']):>8} planned {show(row['measured_bytes']):>8} measured "
            f"{row['seconds_per_step']:8.2f} s/step  {row['plan']['store']} {row['plan']['piece'] or ''}", flush=True,
        )  # fmt: skip
    out = arguments.out or RESULTS / f"large-models-{arguments.shape}-{arguments.task_vectors}-{arguments.device}.json"
    hidden = {} if arguments.shape == "test" else {"coefficients": None}
    content = {
        "shape": arguments.shape,
        "task_vectors": arguments.task_vectors,
        "environment": environment(arguments.device),
        "planned": planned,
        "ways": [{key: value for key, value in row.items() if key not in hidden} for row in rows],
    }
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
