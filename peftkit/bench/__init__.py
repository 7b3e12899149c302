"""`peftkit bench`: methods on workloads, measured for memory, speed and quality, in one document.

`engine` runs it all, each cell by a `worker` in a process of its own; `exact`, `timing` and `quality` measure;
`document`, `report` and `compare` read what came of it.
"""
