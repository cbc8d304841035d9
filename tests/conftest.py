import torch
from hypothesis import settings

# Threads that wait for each other spin; one thread a test is faster where several processes share few cores.
torch.set_num_threads(1)

# Machines stall, and how long an example takes is no property of ours.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
