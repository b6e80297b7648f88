"""Promises a tenth of the error that eight bits can have.

fails: test_normal_weights_come_back_within_what_is_promised
says: is promised
promises: 0.0008
"""

from moeplug_int8.hooks import Int8

import moeplug


class PromisesTooMuch(Int8):
    name = "promises_too_much"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(PromisesTooMuch())
