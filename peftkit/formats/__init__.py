"""Adapters in other libraries' formats, both ways. docs/formats.md says what each can carry.

A format knows no method: it goes by what a method's class declares of itself (`Method.hf`), or by its adapters' form
(`LowRank`). What a format cannot carry is an error that names it.
"""
