import torch

# Threads that wait for each other spin; one thread a test is faster where several processes share few cores.
torch.set_num_threads(1)
