"""Trials of this machine: what works.

host.py     versions, CPU, memory, disk, extras
device.py   a training step in each format, compiled and fused, a collective: each device
doctor.py   all of them
"""
