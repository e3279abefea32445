"""Three tasks on real data, each trained with softmax alone and with softmax + center loss.

`python -m examples` runs all tasks, `python -m examples.glyphs` runs one.
"""
