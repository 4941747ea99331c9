"""What this machine can do, tried and not guessed.

trial.py      one trial: what was tried, whether it works, a line about it
host.py       versions, CPU, memory, disk, extras: what needs no GPU and cannot fail badly
device.py     precisions, attention, rates, a training step: each device
software.py   torch.compile, FlexAttention, process groups
child.py      a group of trials in a process of its own, which may crash or hang
doctor.py     all of them
"""
