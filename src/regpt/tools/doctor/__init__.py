"""Trials of this machine: what works, and how fast.

host.py     versions, CPU, memory, disk, extras
device.py   a training step in each format, compiled and fused, a collective: each device
child.py    a group of trials in a process of its own, which may crash or hang
doctor.py   all of them
"""
