"""Base and task vectors as flat buffers: in memory, in a file, quantised, as LoRA factors."""
