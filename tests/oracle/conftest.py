"""The oracles run on the CPU, also where there is a GPU."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
