"""Prints the HLO of all programs of test_xla_gpu.py as XLA lowers them for a GPU, in JSON."""

import json

# Before the package: its XLA library takes the emulated call only if that is loaded first.
import stand_in_xla

stand_in_xla.take_the_place_of_a_gpu()

import test_xla_gpu

print(json.dumps(test_xla_gpu.all_programs()))
