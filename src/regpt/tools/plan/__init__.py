"""The plan of a run: memory, time and cost, before it runs.

request.py     what is asked for
target.py      the device it is planned for: a GPU of the table, or this machine
shape.py       a model's sizes, counted on the model itself
memory.py      memory by part: the model's own step on fake tensors
room.py        the path that computes a step, the largest micro-batch
speed.py       milliseconds a step from figures of the device
calibrate.py   milliseconds a step from small pieces measured here
warn.py        what deserves a second thought
plan.py        all of it together
"""
