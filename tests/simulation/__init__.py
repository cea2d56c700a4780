"""Simulates whole deployments on a virtual clock, with faults drawn from a seed.

`python -m tests.simulation --help` runs it. One process simulates one deployment at a time: its
gateway, targets and drafters run the code of the product, unchanged, each on an event loop of its
own; the network, the clock and the models are simulated.
"""
