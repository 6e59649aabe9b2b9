"""A tiny GPT of Megatron-Core in one of several processes on CPUs, run as a script with MEGATRON_RANK, MEGATRON_WORLD and a port:

save FOLDER SEED …: a checkpoint with the weights of that seed, in every folder. load FOLDER OUT …: its tensors of this rank."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

LAYERS, CLASSES = 2, 64


def main(what, *pairs):
    rank, world = (int(os.environ[f"MEGATRON_{name}"]) for name in ("RANK", "WORLD"))
    # What it asks of a GPU that is not there.
    torch.cuda.current_device, torch.cuda.synchronize = lambda: "cpu", lambda *_: None
    dist.init_process_group("gloo", init_method=os.environ["MEGATRON_MEETING"], rank=rank, world_size=world)
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel(world, 1)
    for folder, other in zip(pairs[::2], pairs[1::2], strict=True):
        if what == "save":
            model = make(int(other), world)
            Path(folder).mkdir(exist_ok=True)
            dist_checkpointing.save(model.sharded_state_dict(prefix=""), folder)
        else:
            model = make(99, world)
            # As --dist-ckpt-strictness says it to Megatron-LM: a merge lacks what is kept beside tensors.
            state = dist_checkpointing.load(model.sharded_state_dict(prefix=""), folder, strict="log_all")
            model.load_state_dict(state, strict=False)
            tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
            torch.save(tensors, f"{other}.{rank}")
    dist.destroy_process_group()


def make(seed, world):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = {"num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4, "gated_linear_unit": True}
    on_cpu = {"use_cpu_initialization": True, "gradient_accumulation_fusion": False, "masked_softmax_fusion": False}
    config = TransformerConfig(**shape, **on_cpu, pipeline_dtype=torch.float32, tensor_model_parallel_size=world)
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=CLASSES, max_sequence_length=16)
    torch.manual_seed(1000 * seed + dist.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            shared = not getattr(parameter, "tensor_model_parallel", False)  # alike on all ranks
            parameter.copy_(torch.randn_like(parameter))
            if shared:
                dist.broadcast(parameter, 0)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
