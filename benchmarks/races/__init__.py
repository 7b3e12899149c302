"""Races: peftkit and its peers in turn with a common base, row by row of one table.

`timing` takes turns and computes the statistics, `libraries` says how each library is called, `steps` and `around`
build what is raced, `rows` is the table with its targets, and `report` writes what came out.
"""
