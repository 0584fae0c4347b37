"""Behind `scripts/gpu`: the project on a GPU machine, also on one that reaches no package registry.

`pack` makes, where registries are reachable, what such a machine lacks; `unpack` installs it there; `run` measures.
`parts` cuts what is carried into folders of a set size, `fatbin` leaves out what another generation of GPU would need.
`unpack` and what it imports need nothing but Python.
"""
