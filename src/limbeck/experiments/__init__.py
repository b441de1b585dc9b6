"""Wiring: which model, task, loss and loop make an arm. One module per experiment, named like the exhibit it feeds.

A module has `Params` (its section of params/<paper>.yaml), `cells(params, seeds)` (what there is to run, in order) and
`run(cell, params, workspace)` (a generator that yields one mapping a step and returns a `Result`).
"""
