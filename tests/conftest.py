"""What all tests share: four fake CPU devices, no network, one small corpus and one small run."""

import os

# Before anything imports jax or a hub client.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# In a collective each device blocks a thread of XLA's pool; with none to spare, any other work would deadlock it.
os.environ["NPROC"] = "16"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

pytest_plugins = ["tests.fixtures_data", "tests.fixtures_run"]
