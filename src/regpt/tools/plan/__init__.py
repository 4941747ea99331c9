"""What a run will take, before it runs.

request.py        what is asked for
shape.py          a model's sizes, counted on the model itself
coefficients.py   every empirical number, with its origin
memory.py         memory by part, the largest micro-batch
room.py           which path computes a step, what fits
machine.py        what it is planned for: a GPU of the table, or this machine
speed.py          milliseconds a step from figures of the device
calibrate.py      milliseconds a step from small pieces measured here
scaling.py        the loss that a fitted law predicts
warn.py           what deserves a second thought
plan.py           all of it together
"""
