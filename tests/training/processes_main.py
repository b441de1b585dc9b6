"""What each of the processes runs that test_processes.py starts: four steps of the loop, under accelerate."""

import json
import sys

from accelerate import Accelerator
from safetensors.torch import save_file

from training import test_grpo

accelerator = Accelerator(cpu=True)
records, curve, weights = test_grpo.train(test_grpo.make(micro_tokens=40), 4)
folder, rank = sys.argv[1], accelerator.process_index
save_file(weights, f"{folder}/{rank}.safetensors")
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump([accelerator.num_processes, records, curve], file)
