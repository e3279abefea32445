"""Three real tasks, each trained with softmax alone and with softmax + center loss.

`python -m examples` runs all of them, `python -m examples.glyphs` one.
"""
