"""Machine code of NVIDIA's GPUs, run one warp at a time to count instructions."""
