"""Training of the bundled checkpoint on films of the drawn world. The door is `python -m model.train`.

Order: `vae`, `films` (a cache of encoded films), `dit`, `distill`, `pairs`, `refine`, `pack`. Every stage can be
stopped at any time and goes on from its last state under the same command; the batch of a step depends on
the seed and the step alone, so a resumed run equals an uninterrupted one.
"""
