"""Says that e4m3 holds all integers up to 127; it holds those up to 16.

fails: test_the_numbers_of_a_format_are_what_it_says
says: rounds some values
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug


class IsNotExact(Int8):
    name = "is_not_exact"

    exact_in = (torch.float32, torch.float8_e4m3fn)


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(IsNotExact())
